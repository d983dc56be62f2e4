"""Verifies exported artefacts against the trained model on real clips, and measures their latency.

  python -m export.verify --model=runs/mine --artefacts=exported --clips=videos/
  python -m export.verify --model=runs/mine --artefacts=exported --clips=data/mine --split=test --json=verified.json

Prints a table with one row per artefact: every SavedModel, .tflite, .onnx and OpenVINO .xml file in the folder and its
subfolders. The first row is the model itself, run in Keras. Each video gives one clip, the middle one, preprocessed as
in evaluation. Videos are read from records, or from any files that FFmpeg can decode. Each row reports

- the maximum and the mean difference of the probabilities from those of the trained network, and the fraction of clips
  with the same top-1 class;
- the size of the artefact, and the median latency of one clip on 1 and on 2 CPU threads. All artefacts are timed in
  alternation, so that other load on the machine slows all of them equally. An artefact with a fixed batch size is
  called with a full batch, and the time is divided by the batch size;
- OK, or the reason for the failure. The operators of each graph are listed below the table.

The exit status is 1 if an artefact violates its bounds or fails to run. The bounds are the maximum difference and
the minimum fraction of clips with the same top-1 class:
  Keras, SavedModel             0.00001  99 %
  ONNX, OpenVINO                0.0001   99 %
  TFLite float32                0.0001   99 %
  TFLite float16                0.02     98 %
  TFLite dynamic, int8, int16x8    -     95 %
OpenVINO is run in float32; by default it uses bfloat16 on CPUs that support it.
One clip may always differ in its top-1 class. The 8-bit formats have no bound on the difference, because 8-bit weights
and outputs are coarse. An artefact whose runtime is not installed is listed as "not run"; the exit status is 1 only if
this applies to all artefacts.
"""

import functools
import json
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from x3d_tf import commands
from x3d_tf.errors import UserError
from x3d_tf.files import atomic_write
from x3d_tf.modeling.archive import model_file, require_classifier
from x3d_tf.runtimes.runners import Artefact, find_artefacts
from x3d_tf.startup import starting_tensorflow
from x3d_tf.terminal import progress_bar, tell
from x3d_tf.text import counted

from .workers import ArtefactError, ArtefactInfo, RuntimeNotInstalled, Workers

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .models import ExportableModel

FLAGS = flags.FLAGS

THREADS = (1, 2)
_NONPORTABLE_OPS = ("Flex", "CUSTOM", "PyFunc", "EagerPyFunc", "XlaLaunch")  # prefixes of ops that stock runtimes lack


@dataclass(frozen=True)
class Bound:
    """Tolerances of an export format.

    Attributes:
        difference: maximum difference of any probability from the trained network's; None for no limit.
        agreement: minimum fraction of clips with the same top-1 class as the trained network. One clip may always
            differ, because it says nothing about a fraction.
    """

    difference: float | None
    agreement: float


BOUNDS = {  # by `runtimes.Runner.format`
    "Keras": Bound(1e-5, 0.99),
    "SavedModel": Bound(1e-5, 0.99),
    "ONNX": Bound(1e-4, 0.99),
    "OpenVINO": Bound(1e-4, 0.99),
    "TFLite float32": Bound(1e-4, 0.99),
    "TFLite float16": Bound(0.02, 0.98),
    "TFLite dynamic": Bound(None, 0.95),
    "TFLite int16x8": Bound(None, 0.95),
    "TFLite int8": Bound(None, 0.95),
}


@dataclass
class Row:
    """Results for one artefact.

    Attributes:
        name: path of the artefact.
        format: key of `BOUNDS`; empty if the artefact could not be opened.
        bytes: size of the artefact.
        verdict: "OK", "not run: ..." or "FAILED: ...".
        max_difference, mean_difference: difference of the probabilities from the trained network's.
        agreement: fraction of clips with the same top-1 class as the trained network.
        milliseconds: median latency of one clip, by number of threads.
        operators: number of occurrences of each operator in the graph.
    """

    name: str
    format: str
    bytes: int
    verdict: str = "OK"
    max_difference: float | None = None
    mean_difference: float | None = None
    agreement: float | None = None
    milliseconds: dict[int, float] = field(default_factory=dict)
    operators: dict[str, int] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        return self.verdict.startswith("FAILED")

    def to_json(self) -> dict[str, Any]:
        """Returns the row for the --json file, where the format's key is "form"."""
        return {"form" if key == "format" else key: value for key, value in asdict(self).items()}


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("model", None, "Run folder, or .keras file saved by this package.", required=True)
    flags.DEFINE_string("artefacts", None, "Folder with the exported artefacts, or a single artefact.", required=True)
    flags.DEFINE_string("clips", None, "Folder of videos, or of records.", required=True)
    flags.DEFINE_string(
        "split", None, "Split of the records. Defaults to the run's evaluation split, else test, else the only split."
    )
    flags.DEFINE_integer(
        "limit", 100, "Maximum number of clips; if there are more videos, they are subsampled evenly.", lower_bound=1
    )
    flags.DEFINE_integer("rounds", 15, "Number of timed calls per artefact and thread count.", lower_bound=1)
    flags.DEFINE_string("json", None, "JSON file to write the table and the operators to.")
    flags.DEFINE_bool("overwrite", False, "Replace an existing --json file. Defaults to false.")


def main() -> None:
    """Runs the command."""
    if FLAGS.json and Path(FLAGS.json).exists() and not FLAGS.overwrite:
        raise UserError(f"{FLAGS.json} exists; choose another --json file, or replace it with --overwrite")
    if FLAGS.json and not Path(FLAGS.json).absolute().parent.is_dir():
        raise UserError(f"--json={FLAGS.json}: its folder does not exist")
    commands.require_path("--artefacts", FLAGS.artefacts)
    artefacts = find_artefacts(Path(FLAGS.artefacts))
    commands.require_path("--clips", FLAGS.clips, "folder of videos or records")
    require_classifier(FLAGS.model)
    with starting_tensorflow():
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")  # GPUs may round float32 products to TF32
        from .models import open_model
        from .verification_clips import read_clips

    tell(f"loading {FLAGS.model}")
    source = open_model(FLAGS.model)
    tell(f"reading clips from {FLAGS.clips}")
    clips = read_clips(source, FLAGS.clips, split=FLAGS.split, limit=FLAGS.limit)
    tell("compiling the network")
    rows = verify(source, artefacts, clips, rounds=FLAGS.rounds)
    print("\n".join(table(rows, Path(FLAGS.artefacts), len(clips))))
    if FLAGS.json:
        about = {
            "model": FLAGS.model,
            "artefacts": FLAGS.artefacts,
            "clips": FLAGS.clips,
            "number_of_clips": len(clips),
        }
        content = about | {"rows": [row.to_json() for row in rows]}
        atomic_write(Path(FLAGS.json), (json.dumps(content, indent=1) + "\n").encode())
        print(f"written: {FLAGS.json}")
    if any(row.failed for row in rows):
        sys.exit("at least one artefact does not match the model: see FAILED above")
    if len(rows) > 1 and all(row.verdict.startswith("not run") for row in rows[1:]):
        sys.exit("nothing was verified: no artefact could be run")


def verify(
    source: "ExportableModel",
    artefacts: Sequence[Artefact],
    clips: "NDArray[np.uint8]",
    *,
    threads: Sequence[int] = THREADS,
    rounds: int = 15,
) -> list[Row]:
    """Compares artefacts with their model on the given clips.

    Args:
        source: the model, from `open_model`.
        artefacts: from `find_artefacts`.
        clips: [clips, T, S, S, 3], from `read_clips`.
        threads: thread counts to time; the probabilities are computed with the last one.
        rounds: timed calls per artefact and thread count.

    Returns:
        A row for the model in Keras, followed by one row per artefact.
    """
    expected = _reference_probabilities(source, clips)
    keras = Artefact(model_file(source.path), "tensorflow")
    rows = {artefact: Row(str(artefact.path), "", artefact.bytes) for artefact in (keras, *artefacts)}
    bar = progress_bar(len(rows) * (1 + len(threads) * rounds), "call", "verifying", leave=False)
    with Workers() as workers, bar:
        for artefact, row in rows.items():
            bar.set_postfix_str(artefact.path.name)
            with _recording_failure(row):
                _compare(workers, artefact, row, source.weights_sha256, clips, expected, threads)
            bar.update()
        _measure_latency(workers, rows, clips, threads, rounds, bar)
    return list(rows.values())


def _reference_probabilities(source: "ExportableModel", clips: "NDArray[np.uint8]") -> "NDArray[np.float32]":
    """Returns the probabilities of the trained network, computed as in evaluation."""
    import numpy as np

    from x3d_tf.evaluation.multiview import probabilities_of
    from x3d_tf.modeling.x3d import X3D

    assert isinstance(source.model, X3D)  # open_model rejects detectors
    network = probabilities_of(source.model, clips.shape[2])
    return np.concatenate(
        [network(clips[first : first + 8].astype(np.float32)).numpy() for first in range(0, len(clips), 8)]
    )


@contextmanager
def _recording_failure(row: Row) -> Iterator[None]:
    """Turns an error raised within the block into the row's verdict."""
    try:
        yield
    except RuntimeNotInstalled as reason:
        row.verdict = f"not run: {reason}"
    except ArtefactError as reason:
        row.verdict = f"FAILED: {reason}"


def _compare(
    workers: Workers,
    artefact: Artefact,
    row: Row,
    weights: str,
    clips: "NDArray[np.uint8]",
    expected: "NDArray[np.float32]",
    threads: Sequence[int],
) -> None:
    """Fills in the format, operators and differences of a row; raises ArtefactError if a check fails."""
    with ThreadPoolExecutor() as pool:  # starts the processes in parallel
        info, *_ = list(pool.map(functools.partial(workers.open, artefact), threads))
    row.format, row.operators = info.format, dict(Counter(info.operators).most_common())
    _check_graph(info, clips.shape[1:])
    _check_weights(info, weights)
    import numpy as np

    probabilities = workers.probabilities(artefact, threads[-1], clips)
    if probabilities.shape != expected.shape:
        raise ArtefactError(f"it has {counted(probabilities.shape[-1], 'class')}, the model has {expected.shape[-1]}")
    difference = abs(probabilities - expected)
    if not np.isfinite(difference).all():
        raise ArtefactError("its probabilities are not finite")
    row.max_difference, row.mean_difference = float(difference.max()), float(difference.mean())
    row.agreement = float((probabilities.argmax(axis=1) == expected.argmax(axis=1)).mean())
    if violations := _bound_violations(row.max_difference, row.agreement, len(clips), BOUNDS[row.format]):
        raise ArtefactError(", ".join(violations))


def _check_graph(info: ArtefactInfo, clip: tuple[int, ...]) -> None:
    if len(info.clip) != len(clip) or any(size not in (None, expected) for size, expected in zip(info.clip, clip)):
        shape = " x ".join("any" if size is None else str(size) for size in info.clip)
        raise ArtefactError(f"its clip shape is {shape}, the model's is {' x '.join(map(str, clip))}")
    nonportable = [name for name in info.operators if name.startswith(_NONPORTABLE_OPS)]
    if nonportable:
        raise ArtefactError(f"it uses operators that stock runtimes lack: {', '.join(nonportable)}")


def _check_weights(info: ArtefactInfo, weights: str) -> None:
    try:
        card = json.loads(info.card or "{}")
        exported_from = card.get("weights_sha256", weights)  # artefacts of other tools have no model card
    except (ValueError, AttributeError) as error:
        raise ArtefactError(f"its model card cannot be read: {error}") from error
    if exported_from != weights:
        run = (card.get("training") or {}).get("run")
        raise ArtefactError("it was exported from different weights" + (f", those of the run {run}" if run else ""))


def _bound_violations(difference: float, agreement: float, clips: int, bound: Bound) -> list[str]:
    violations = []
    if bound.difference is not None and difference > bound.difference:
        violations.append(f"max difference above {bound.difference:g}")
    same = round(agreement * clips)
    if agreement < bound.agreement and clips - same > 1:
        violations.append(f"top-1 agreement below {bound.agreement:.0%}: {same} of {counted(clips, 'clip')}")
    return violations


def _measure_latency(
    workers: Workers,
    rows: Mapping[Artefact, Row],
    clips: "NDArray[np.uint8]",
    threads: Sequence[int],
    rounds: int,
    bar: Any,
) -> None:
    """Fills in the median latency of one clip; all artefacts are timed in alternation."""
    seconds: dict[tuple[Artefact, int], list[float]] = {}
    for _ in range(rounds):
        for artefact, row in rows.items():
            for count in threads if row.max_difference is not None else ():
                bar.set_postfix_str(artefact.path.name)
                with _recording_failure(row):
                    latency = workers.seconds(artefact, count, clips)
                    seconds.setdefault((artefact, count), []).append(latency)
                bar.update()
    for (artefact, count), latencies in seconds.items():
        rows[artefact].milliseconds[count] = 1000 * statistics.median(latencies)


def table(rows: Sequence[Row], folder: Path, clips: int) -> list[str]:
    """Returns the lines to print: one line per row, followed by the operators of each artefact."""
    names = [_relative_name(row, folder) for row in rows]
    width = max(map(len, names))
    threads = sorted({count for row in rows for count in row.milliseconds})
    heads = "".join(f" {f'{count} thr., ms':>11}" for count in threads)
    lines = [
        counted(clips, "clip"),
        f"{'':{width}} {'format':14} {'max diff':>9} {'mean diff':>9} {'same top-1':>10} {'MB':>7}{heads} operators",
    ]
    for name, row in zip(names, rows):
        times = "".join(f" {_number_or_dash(row.milliseconds.get(count), '11.1f')}" for count in threads)
        lines.append(
            f"{name:{width}} {row.format or '-':14} {_number_or_dash(row.max_difference, '9.1e')}"
            f" {_number_or_dash(row.mean_difference, '9.1e')} {_number_or_dash(row.agreement, '10.1%')}"
            f" {row.bytes / 1e6:7.1f}{times} {len(row.operators) or '-':>9} {row.verdict}"
        )
    lines += ["", "operators"]
    for name, row in zip(names, rows):
        counts = ", ".join(f"{operator} {count}" for operator, count in row.operators.items())
        lines.append(f"  {name}: {counts or 'unknown'}")
    return lines


def _relative_name(row: Row, folder: Path) -> str:
    path = Path(row.name)
    return str(path.relative_to(folder)) if path != folder and path.is_relative_to(folder) else str(path)


def _number_or_dash(value: float | None, spec: str) -> str:
    return f"{'-':>{spec.split('.')[0]}}" if value is None else f"{value:{spec}}"


if __name__ == "__main__":
    define_flags()
    commands.run(main)

"""Runs a model and all its artefacts on the same real clips: do they compute the same, and how fast?

  python -m export.verify --model=runs/mine --artefacts=exported --clips=videos/
  python -m export.verify --model=runs/mine --artefacts=exported --clips=data/mine --split=test --json=verified.json

Every SavedModel, .tflite, .onnx and OpenVINO .xml file in the folder and below becomes a row of the table; the model
itself, in Keras, is the first. Clips are those that the network is tested on: the middle of each video, of records or
of files that FFmpeg reads. The row says

- by how much probabilities differ from those of the trained network, at most and in the mean, and in what part of the
  clips the most probable class is the same;
- how large the artefact is, and the median time of one call with a single clip, on 1 and on 2 threads of the CPU. All
  rows take turns, so that what else the machine does slows all of them alike. An artefact of a fixed batch is given so
  many clips, and its time divided by them;
- OK or what is wrong. The operators of each graph are listed below the table.

The exit status is 1 where a row broke its bounds or could not be run. Bounds of the largest difference, and of the part
of clips with the same class:
  Keras, SavedModel             0.00001  99 %
  ONNX, OpenVINO                0.0001   99 %
  TFLite float32                0.0001   99 %
  TFLite float16                0.02     98 %
  TFLite dynamic, int8, int16x8    -     95 %
OpenVINO is run in float32, which on CPUs with bfloat16 it does not do unless told to.
Weights or outputs of 8 bits are coarse by themselves, so that of these forms only the class is bounded. An artefact
whose runtime is not installed is listed as not run, which is no failure unless it is so with all.
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
from x3d_tf.startup import starting_tensorflow
from x3d_tf.terminal import progress_bar, tell
from x3d_tf.text import counted

from .runtimes import Artefact, find_artefacts
from .workers import Failed, NotRun, Opened, Workers

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .models import Source

FLAGS = flags.FLAGS

THREADS = (1, 2)
FEW_CLIPS = 20  # of fewer, a single one is more than the 5 % in which int8 may differ
_NONPORTABLE_OPS = ("Flex", "CUSTOM", "PyFunc", "EagerPyFunc", "XlaLaunch")  # that stock runtimes do not have


@dataclass(frozen=True)
class Bound:
    """How far an artefact may be from the trained network.

    Attributes:
        difference: of any probability, at most; None is not bounded.
        agreement: the part of clips whose most probable class is the network's, at least.
    """

    difference: float | None
    agreement: float


BOUNDS = {  # by the form that `runtimes.Runner` gives
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
    """What was found of one artefact.

    Attributes:
        name: its path in the folder of artefacts.
        form: a key of `BOUNDS`; empty where it could not be opened.
        bytes: its size.
        verdict: "OK", "not run: ..." or "FAILED: ...".
        max_difference, mean_difference: of probabilities from the trained network's.
        agreement: the part of clips whose most probable class is the network's.
        milliseconds: of one clip, the median, by threads.
        operators: how often each is in the graph.
    """

    name: str
    form: str
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


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("model", None, "A run folder, or a .keras file that this package saved.", required=True)
    flags.DEFINE_string("artefacts", None, "Folder of what was exported, or one artefact.", required=True)
    flags.DEFINE_string("clips", None, "Folder of videos or of records.", required=True)
    flags.DEFINE_string("split", None, "Part of the records; the one that the run was tested on unless given.")
    flags.DEFINE_integer("limit", 100, "Clips at most; of more videos, evenly chosen ones.", lower_bound=1)
    flags.DEFINE_integer("rounds", 15, "Calls to time of each artefact and number of threads.", lower_bound=1)
    flags.DEFINE_string("json", None, "File for the table, with the operators.")
    flags.DEFINE_bool("overwrite", False, "Replace the file of --json.")


def main() -> None:
    """Verifies what the flags name."""
    if FLAGS.json and Path(FLAGS.json).exists() and not FLAGS.overwrite:
        raise UserError(f"{FLAGS.json} exists; give another --json, or replace it with --overwrite")
    if FLAGS.json and not Path(FLAGS.json).absolute().parent.is_dir():
        raise UserError(f"--json={FLAGS.json}: no such folder")
    commands.require_path("--artefacts", FLAGS.artefacts)
    artefacts = find_artefacts(Path(FLAGS.artefacts))
    commands.require_path("--clips", FLAGS.clips, "folder of videos or records")
    require_classifier(FLAGS.model)
    with starting_tensorflow():
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")  # whose float32 products may be rounded
        from .clips import read_clips
        from .models import open_model

    tell(f"loading {FLAGS.model}")
    source = open_model(FLAGS.model)
    tell(f"reading clips of {FLAGS.clips}")
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
        content = about | {"rows": [asdict(row) for row in rows]}
        atomic_write(Path(FLAGS.json), (json.dumps(content, indent=1) + "\n").encode())
        print(f"written: {FLAGS.json}")
    if any(row.failed for row in rows):
        sys.exit("an artefact does not do what its model does: see FAILED above")
    if len(rows) > 1 and all(row.verdict.startswith("not run") for row in rows[1:]):
        sys.exit("nothing was verified: no artefact could be run")


def verify(
    source: "Source",
    artefacts: Sequence[Artefact],
    clips: "NDArray[np.uint8]",
    *,
    threads: Sequence[int] = THREADS,
    rounds: int = 15,
) -> list[Row]:
    """Runs a model and its artefacts on clips.

    Args:
        source: the model.
        artefacts: from `find_artefacts`.
        clips: [clips, T, S, S, 3], from `read_clips`.
        threads: numbers of threads to time; the last one computes the probabilities.
        rounds: calls to time.

    Returns:
        A row for the model in Keras, then one for each artefact.
    """
    expected = _reference(source, clips)
    keras = Artefact(model_file(source.path), "tensorflow")
    rows = {artefact: Row(str(artefact.path), "", artefact.bytes) for artefact in (keras, *artefacts)}
    bar = progress_bar(len(rows) * (1 + len(threads) * rounds), "call", "verifying", leave=False)
    with Workers() as workers, bar:
        for artefact, row in rows.items():
            bar.set_postfix_str(artefact.path.name)
            with _noting(row):
                _compare(workers, artefact, row, source.weights_sha256, clips, expected, threads)
            bar.update()
        _time(workers, rows, clips, threads, rounds, bar)
    return list(rows.values())


def _reference(source: "Source", clips: "NDArray[np.uint8]") -> "NDArray[np.float32]":
    """Probabilities of the trained network, as its accuracy was measured."""
    import numpy as np

    from x3d_tf.evaluation.multiview import probabilities_of

    network = probabilities_of(source.model, clips.shape[2])
    return np.concatenate(
        [network(clips[first : first + 8].astype(np.float32)).numpy() for first in range(0, len(clips), 8)]
    )


@contextmanager
def _noting(row: Row) -> Iterator[None]:
    """Writes into the row why the block could not be finished."""
    try:
        yield
    except NotRun as reason:
        row.verdict = f"not run: {reason}"
    except Failed as reason:
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
    """Fills in what an artefact is and how far its probabilities are off."""
    with ThreadPoolExecutor() as pool:  # processes start side by side
        opened, *_ = list(pool.map(functools.partial(workers.open, artefact), threads))
    row.form, row.operators = opened.form, dict(Counter(opened.operators).most_common())
    _check_form(opened, clips.shape[1:])
    _check_weights(opened, weights)
    import numpy as np

    found = workers.probabilities(artefact, threads[-1], clips)
    if found.shape != expected.shape:
        raise Failed(f"it has {counted(found.shape[-1], 'class')}, the model {expected.shape[-1]}")
    difference = abs(found - expected)
    if not np.isfinite(difference).all():
        raise Failed("probabilities are not numbers")
    row.max_difference, row.mean_difference = float(difference.max()), float(difference.mean())
    row.agreement = float((found.argmax(axis=1) == expected.argmax(axis=1)).mean())
    if broken := _broken(row.max_difference, row.agreement, len(clips), BOUNDS[row.form]):
        raise Failed(", ".join(broken))


def _check_form(opened: Opened, clip: tuple[int, ...]) -> None:
    if len(opened.clip) != len(clip) or any(size not in (None, wanted) for size, wanted in zip(opened.clip, clip)):
        theirs = " x ".join("any" if size is None else str(size) for size in opened.clip)
        raise Failed(f"its clip is {theirs}, the model's {' x '.join(map(str, clip))}")
    strangers = [name for name in opened.operators if name.startswith(_NONPORTABLE_OPS)]
    if strangers:
        raise Failed(f"it has operators that are not everywhere: {', '.join(strangers)}")


def _check_weights(opened: Opened, weights: str) -> None:
    try:
        card = json.loads(opened.card or "{}")
        made_of = card.get("weights_sha256", weights)  # what this package did not write does not tell
    except (ValueError, AttributeError) as error:
        raise Failed(f"its model card cannot be read: {error}") from error
    if made_of != weights:
        run = (card.get("training") or {}).get("run")
        raise Failed("it is made of other weights" + (f", those of the run {run}" if run else ""))


def _broken(difference: float, agreement: float, clips: int, bound: Bound) -> list[str]:
    broken = []
    if bound.difference is not None and difference > bound.difference:
        broken.append(f"difference above {bound.difference:g}")
    if agreement < bound.agreement:
        broken.append(f"agreement below {bound.agreement:.0%}: {round(agreement * clips)} of {counted(clips, 'clip')}")
    return broken


def _time(
    workers: Workers,
    rows: Mapping[Artefact, Row],
    clips: "NDArray[np.uint8]",
    threads: Sequence[int],
    rounds: int,
    bar: Any,
) -> None:
    """Fills in how long one clip takes; all take turns."""
    seconds: dict[tuple[Artefact, int], list[float]] = {}
    for _ in range(rounds):
        for artefact, row in rows.items():
            for count in threads if row.max_difference is not None else ():
                bar.set_postfix_str(artefact.path.name)
                with _noting(row):
                    taken = workers.seconds(artefact, count, clips)
                    seconds.setdefault((artefact, count), []).append(taken)
                bar.update()
    for (artefact, count), taken_by_round in seconds.items():
        rows[artefact].milliseconds[count] = 1000 * statistics.median(taken_by_round)


def table(rows: Sequence[Row], folder: Path, clips: int) -> list[str]:
    """Lines to print: one a row, then the operators of each."""
    names = [_name(row, folder) for row in rows]
    width = max(map(len, names))
    threads = sorted({count for row in rows for count in row.milliseconds})
    heads = "".join(f" {f'{count} thr., ms':>11}" for count in threads)
    few = ": too few for bounds of agreement, which one clip can break" if clips < FEW_CLIPS else ""
    lines = [
        f"{counted(clips, 'clip')}{few}",
        f"{'':{width}} {'form':14} {'max diff':>9} {'mean diff':>9} {'same top-1':>10} {'MB':>7}{heads} operators",
    ]
    for name, row in zip(names, rows):
        times = "".join(f" {_number(row.milliseconds.get(count), '11.1f')}" for count in threads)
        lines.append(
            f"{name:{width}} {row.form or '-':14} {_number(row.max_difference, '9.1e')}"
            f" {_number(row.mean_difference, '9.1e')} {_number(row.agreement, '10.1%')} {row.bytes / 1e6:7.1f}{times}"
            f" {len(row.operators) or '-':>9} {row.verdict}"
        )
    lines += ["", "operators"]
    for name, row in zip(names, rows):
        counts = ", ".join(f"{operator} {count}" for operator, count in row.operators.items())
        lines.append(f"  {name}: {counts or 'not known'}")
    return lines


def _name(row: Row, folder: Path) -> str:
    path = Path(row.name)
    return str(path.relative_to(folder)) if path != folder and path.is_relative_to(folder) else str(path)


def _number(value: float | None, form: str) -> str:
    return f"{'-':>{form.split('.')[0]}}" if value is None else f"{value:{form}}"


if __name__ == "__main__":
    define_flags()
    commands.run(main)

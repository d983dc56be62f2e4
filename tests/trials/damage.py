"""Flips bits of shards, manifests and checkpoints, and cuts them off: each must be refused, or change nothing.

Each of the three is damaged --count times by one flipped bit and --count times by a cut at a random byte. Reading then
must end in an error of one line that names the file, within seconds. A damaged checkpoint may instead be passed over
with a warning for the one before. A result that differs without a word, a hang, a traceback is a failure. Damage to
bytes that nothing reads leaves the result equal; those are counted on their own.

Shards are damaged under a reader that is open already, which reads them again, and one in ten before it opens them.
`--verify` must find each. Readers run in a worker process that a watchdog ends.

  python tests/trials/damage.py --count=200 --seed=0
  python tests/trials/damage.py --only=checkpoint        # or shard, manifest
"""

import contextlib
import hashlib
import io
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from harness import Broke, Report, Worker, arguments, damaged, make_records, outcome_of, recipe, scratch

Answer = tuple[str, str]
_QUESTION_SECONDS = 20.0
NEWEST, BEFORE = 6, 3  # the steps of the two checkpoints


# ---- In the worker: what reads the files


def shard_reader(folder: str) -> Callable[..., dict[str, Answer]]:
    """Opens datasets on a folder of records; returns what reads all of it, by those or by new ones."""
    import tensorflow as tf

    from x3d_tf.data.input_pipeline import evaluation_dataset, record_errors_as_user_errors, training_dataset
    from x3d_tf.data.records.verify import verify_records
    from x3d_tf.types import ClipSpec, ViewSpec

    clip, views = ClipSpec(4, 1, 32), ViewSpec(temporal_views=1, resize=36, crop=32, stretch=False)

    def opened() -> dict[str, Any]:
        training = training_dataset(folder, "train", clip, jitter=(36, 44), flip=True, batch=3, seed=0)
        return {"training": training.take(8), "evaluation": evaluation_dataset(folder, "test", clip, views)}

    def content(dataset: Any) -> str:
        digest = hashlib.sha256()
        with record_errors_as_user_errors():
            for element in dataset:
                for tensor in tf.nest.flatten(element):
                    digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def verified() -> str:
        problems = [problem for report in verify_records(folder, progress=False) for problem in report.problems]
        if problems:
            raise OSError(problems[0])
        return "intact"

    kept = opened()

    def answer(fresh: bool) -> dict[str, Answer]:
        names = ("training", "evaluation")
        acts = {name: partial(lambda name: content((opened() if fresh else kept)[name]), name) for name in names}
        return {**{name: outcome_of(act) for name, act in acts.items()}, "verify": outcome_of(verified)}

    return answer


def manifest_reader(folder: str) -> Callable[[], Answer]:
    """Returns what reads a manifest and looks at the sizes of all shards."""
    from x3d_tf.data.records.manifest import Manifest

    def content() -> str:
        manifest = Manifest.load(folder)
        return repr((manifest, [manifest.split(name) for name in manifest.splits]))

    return lambda: outcome_of(content)


def checkpoint_reader(config: str, workdir: str) -> Callable[[bool], dict[str, Any]]:
    """Trains a tiny run to two checkpoints; returns what restores the newest and tells what came of it."""
    import keras

    from x3d_tf import gin_config
    from x3d_tf.runs import checkpoints
    from x3d_tf.runs.run_folder import RunFolder
    from x3d_tf.training.loop import train

    made: list[tuple[Any, tuple[Any, ...]]] = []
    initialise = checkpoints.Checkpoints.__init__

    def recording(self: Any, *given: Any, **named: Any) -> None:
        initialise(self, *given, **named)
        made.append((self, (*given, *named.values())))

    checkpoints.Checkpoints.__init__ = recording  # type: ignore[method-assign]
    run = RunFolder(workdir)
    run.model.unlink(missing_ok=True)  # of a worker that was ended: from the last checkpoint there is no step to take
    train(gin_config.parse([config]).config, workdir)
    checkpoints, given = made[-1]
    variables = list(_variables(given, keras.Model))

    def state() -> str:
        return hashlib.sha256(b"".join(variable.numpy().tobytes() for variable in variables)).hexdigest()

    def answer(load: bool) -> dict[str, Any]:
        for variable in variables:
            variable.assign(variable * 0)
        with contextlib.redirect_stderr(io.StringIO()) as told:
            restored = outcome_of(checkpoints.restore)

        def loaded() -> str:
            weights = checkpoints.load_checkpoint(run, NEWEST).get_weights()
            return hashlib.sha256(b"".join(array.tobytes() for array in weights)).hexdigest()

        found = {"restored": restored, "state": state(), "told": told.getvalue()}
        return {**found, "loaded": outcome_of(loaded)} if load else found

    return answer


def _variables(item: Any, model: type) -> Iterator[Any]:
    """All numeric variables in what checkpoints are made with."""
    if isinstance(item, model):
        yield from (variable.value for variable in item.variables)  # type: ignore[attr-defined]
    elif isinstance(item, dict):
        yield from (variable for part in item.values() for variable in _variables(part, model))
    elif isinstance(item, list | tuple):
        yield from (variable for part in item for variable in _variables(part, model))
    elif hasattr(item, "assign") and str(item.dtype) != "<dtype: 'string'>":
        yield item


# ---- Here: damage, and what to make of the answers


def problem_of(answer: Answer, whole: Answer, names: tuple[str, ...]) -> str | None:
    """Why an answer about damaged files is not right; "" says that it is the whole files' own."""
    kind, text = answer
    if kind == "breaks":
        return f"ends in a traceback: {text}"
    if kind == "gives":
        return "" if answer == whole else "gives another result without a word"
    if "\n" in text or len(text) > 2000:
        return f"the error is not one line: {text[:200]!r}"
    return None if any(name in text for name in names) else f"the error names no file: {text[:200]}"


def shards(report: Report, folder: Path, kind: str) -> None:
    """Damages shards."""
    records = make_records(folder / f"records_{kind}")
    reader = Worker(shard_reader, str(records), seconds=_QUESTION_SECONDS)
    whole = reader.ask(False)
    files = sorted(records.glob("*.tfrecord"))
    for number in range(report.chosen.count):
        draw = random.Random(f"{report.chosen.seed}/shard/{kind}/{number}")
        file = draw.choice(files)

        ask = partial(_ask_of_shard, reader, whole, file.name, number % 10 == 0)
        _try(report, f"shard {kind} {number}", file, kind, draw, ask)
    reader.close()


def _ask_of_shard(reader: Worker, whole: dict[str, Answer], name: str, fresh: bool) -> str | None:
    answers = reader.ask(fresh)
    if answers["verify"][0] != "refuses":
        return f"--verify finds it {answers['verify']}"
    reading = "training" if name.startswith("train") else "evaluation"
    return problem_of(answers[reading], whole[reading], (name,))


def manifests(report: Report, folder: Path, kind: str) -> None:
    """Damages manifests."""
    records = make_records(folder / f"manifest_{kind}")
    reader = Worker(manifest_reader, str(records), seconds=_QUESTION_SECONDS)
    whole = reader.ask()
    for number in range(report.chosen.count):
        draw = random.Random(f"{report.chosen.seed}/manifest/{kind}/{number}")

        def ask() -> str | None:
            return problem_of(reader.ask(), whole, ("manifest.json", ".tfrecord"))

        _try(report, f"manifest {kind} {number}", records / "manifest.json", kind, draw, ask)
    reader.close()


def checkpoints(report: Report, folder: Path, kind: str) -> None:
    """Damages the newest of two checkpoints, in turn its index and its data."""
    config, workdir = folder / f"tiny_{kind}.gin", folder / f"run_{kind}"
    config.write_text(recipe(make_records(folder / f"for_{kind}"), steps=NEWEST, checkpoint=BEFORE))
    print("training a tiny run ...", flush=True)
    reader = Worker(checkpoint_reader, str(config), str(workdir), seconds=_QUESTION_SECONDS)
    files = {path: path.read_bytes() for path in (workdir / "checkpoints").iterdir()}
    whole = reader.ask(True)
    for path in files:
        if path.name.startswith(f"ckpt-{NEWEST}."):
            path.unlink()
    before = reader.ask(False)
    for number in range(report.chosen.count):
        for path, content in files.items():
            path.write_bytes(content)
        draw = random.Random(f"{report.chosen.seed}/checkpoint/{kind}/{number}")
        file = next(path for path in files if path.name.startswith(f"ckpt-{NEWEST}.{('index', 'data')[number % 2]}"))

        def ask(load: bool) -> str | None:
            return _problem_of_checkpoint(reader.ask(load), whole, before)

        # evaluation's reader, which builds a network each time, has a quarter of them
        _try(report, f"checkpoint {kind} {number}", file, kind, draw, partial(ask, number % 8 < 2))
    reader.close()


def _problem_of_checkpoint(answer: dict[str, Any], whole: dict[str, Any], before: dict[str, Any]) -> str | None:
    """Why what came of a damaged newest checkpoint is not right; "" says that it is as if there was no damage."""
    if "loaded" in answer and (problem := problem_of(answer["loaded"], whole["loaded"], (f"ckpt-{NEWEST}",))):
        return f"load_checkpoint {problem}"
    kind, text = answer["restored"]
    if kind != "gives":
        return f"does not fall back to the checkpoint before: {text[:300]}"
    if answer["restored"] == whole["restored"]:
        return "" if answer["state"] == whole["state"] else "restores other values without a word"
    if (answer["restored"], answer["state"]) != (before["restored"], before["state"]):
        return f"restores {text}, which is neither checkpoint"
    told = answer["told"].strip()
    return (
        None if told.startswith("warning: ") and f"ckpt-{NEWEST}" in told else f"gives no warning of one line: {told!r}"
    )


def _try(report: Report, name: str, file: Path, kind: str, draw: random.Random, ask: Callable[[], str | None]) -> None:
    """Damages a file, asks, and makes it whole again."""
    content = file.read_bytes()
    words, broken = damaged(content, kind, draw)
    file.write_bytes(broken)
    try:
        problem = ask()
    except Broke as error:
        problem = f"the reader {error}"
    except RuntimeError as error:
        problem = f"the trial itself ended with {error}"
    finally:
        file.write_bytes(content)
    if problem == "":
        report.note(f"{name.rpartition(' ')[0]}: in bytes that nothing reads, result equal")
    report.add(f"{name}, {file.name} {words}", problem or None)


def main() -> None:
    """Runs the trials."""
    report = Report("damage", arguments(__doc__ or "", count=200))
    parts = {"manifest": manifests, "shard": shards, "checkpoint": checkpoints}
    chosen = [(part, kind) for part in parts for kind in ("flip", "cut") if report.chosen.only in f"{part} {kind}"]
    with scratch() as folder:
        for part, kind in chosen:
            parts[part](report, folder, kind)
    report.close()


if __name__ == "__main__":
    main()

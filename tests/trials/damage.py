"""Flips bits in shards, manifests, files of frames and checkpoints, and truncates them.

Damage must be reported or have no effect.

Each kind of file is damaged --count times by one flipped bit and --count times by truncation at a random byte. Reading
must then fail within seconds with a one-line error that names the file. For a damaged checkpoint, a warning and a
fallback to the previous checkpoint is also allowed. A silently different result, a hang or a traceback is a failure.
Damage to bytes that are never read leaves the result unchanged and is counted separately.

Shards are damaged while a reader has them open and, in one of ten trials, before it opens them. `--verify` must find
all damage. Readers run in a worker process with time and memory limits.

  python tests/trials/damage.py --count=200 --seed=0
  python tests/trials/damage.py --only=checkpoint        # or shard, manifest, or frames
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

Answer = tuple[str, str]  # outcome, and its result or message
_REQUEST_SECONDS = 20.0
NEWEST, PREVIOUS = 6, 3  # steps of the two checkpoints


# ---- Readers, which run in the worker


def shard_reader(folder: str) -> Callable[..., dict[str, Answer]]:
    """Opens datasets on a folder of records; returns a function that reads them, or new ones, completely."""
    import tensorflow as tf

    from x3d_tf.data.input_pipeline import evaluation_dataset, training_dataset
    from x3d_tf.data.records.table import record_errors_as_user_errors
    from x3d_tf.data.records.verify import verify_records
    from x3d_tf.types import ClipSpec, ViewSpec

    clip, views = ClipSpec(4, 1, 32), ViewSpec(temporal_views=1, resize=36, crop=32, stretch=False)

    def open_datasets() -> dict[str, Any]:
        training = training_dataset(folder, "train", clip, jitter=(36, 44), flip=True, batch=3, seed=0)
        return {"training": training.take(8), "evaluation": evaluation_dataset(folder, "test", clip, views)}

    def content(dataset: Any) -> str:
        digest = hashlib.sha256()
        with record_errors_as_user_errors():
            for element in dataset:
                for tensor in tf.nest.flatten(element):
                    digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def verify() -> str:
        reports = verify_records(folder, progress=False)
        problems = [problem for report in reports for problem in (*report.problems, *report.frame_problems)]
        if problems:
            raise OSError(problems[0])
        return "intact"

    datasets = open_datasets()

    def read(fresh: bool) -> dict[str, Answer]:
        names = ("training", "evaluation")
        acts = {
            name: partial(lambda name: content((open_datasets() if fresh else datasets)[name]), name) for name in names
        }
        return {**{name: outcome_of(act) for name, act in acts.items()}, "verify": outcome_of(verify)}

    return read


def manifest_reader(folder: str) -> Callable[[], Answer]:
    """Returns a function that reads a manifest and checks the sizes of all shards."""
    from x3d_tf.data.records.manifest import Manifest

    def content() -> str:
        manifest = Manifest.load(folder)
        return repr((manifest, [manifest.split(name) for name in manifest.splits]))

    return lambda: outcome_of(content)


def checkpoint_reader(config: str, workdir: str) -> Callable[[bool], dict[str, Any]]:
    """Trains a tiny run with two checkpoints; returns a function that restores the newest and reports the outcome."""
    import keras

    from x3d_tf import gin_config
    from x3d_tf.runs import checkpoints
    from x3d_tf.runs.run_folder import RunFolder
    from x3d_tf.training.loop import train

    created: list[tuple[Any, tuple[Any, ...]]] = []
    original_init = checkpoints.Checkpoints.__init__

    def recording_init(self: Any, *args: Any, **kwargs: Any) -> None:
        original_init(self, *args, **kwargs)
        created.append((self, (*args, *kwargs.values())))

    checkpoints.Checkpoints.__init__ = recording_init  # type: ignore[method-assign]
    run = RunFolder(workdir)
    run.model.unlink(missing_ok=True)  # left by a killed worker; with it, training would have nothing to do
    train(gin_config.parse([config]).config, workdir)
    restorer, arguments = created[-1]
    variables = list(_variables(arguments, keras.Model))

    def state() -> str:
        return hashlib.sha256(b"".join(variable.numpy().tobytes() for variable in variables)).hexdigest()

    def restore(load: bool) -> dict[str, Any]:
        for variable in variables:
            variable.assign(variable * 0)
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            restored = outcome_of(restorer.restore)

        def loaded() -> str:
            weights = checkpoints.load_checkpoint(run, NEWEST).get_weights()
            return hashlib.sha256(b"".join(array.tobytes() for array in weights)).hexdigest()

        outcome = {"restored": restored, "state": state(), "stderr": stderr.getvalue()}
        return {**outcome, "loaded": outcome_of(loaded)} if load else outcome

    return restore


def _variables(item: Any, model: type) -> Iterator[Any]:
    """Yields all numeric variables in the arguments of `Checkpoints`."""
    if isinstance(item, model):
        yield from (variable.value for variable in item.variables)  # type: ignore[attr-defined]
    elif isinstance(item, dict):
        yield from (variable for part in item.values() for variable in _variables(part, model))
    elif isinstance(item, list | tuple):
        yield from (variable for part in item for variable in _variables(part, model))
    elif hasattr(item, "assign") and str(item.dtype) != "<dtype: 'string'>":
        yield item


# ---- Damage and checks, which run in this process


def problem_of(answer: Answer, intact: Answer, names: tuple[str, ...]) -> str | None:
    """Returns the problem with an outcome for damaged files, None for a proper error, "" if it equals `intact`."""
    kind, text = answer
    if kind == "breaks":
        return f"ends in a traceback: {text}"
    if kind == "gives":
        return "" if answer == intact else "gives a different result without an error"
    if "\n" in text or len(text) > 2000:
        return f"the error is not one line: {text[:200]!r}"
    return None if any(name in text for name in names) else f"the error does not name the file: {text[:200]}"


def shards(report: Report, folder: Path, kind: str) -> None:
    """Damages shards."""
    records = make_records(folder / f"records_{kind}")
    reader = Worker(shard_reader, str(records), seconds=_REQUEST_SECONDS)
    intact = reader.ask(False)
    files = sorted(records.glob("*.tfrecord"))
    for number in range(report.chosen.count):
        rng = random.Random(f"{report.chosen.seed}/shard/{kind}/{number}")
        file = rng.choice(files)

        check = partial(_check_shard, reader, intact, file.name, number % 10 == 0)
        _try(report, f"shard {kind} {number}", file, kind, rng, check)
    reader.close()


def _check_shard(reader: Worker, intact: dict[str, Answer], name: str, fresh: bool) -> str | None:
    answers = reader.ask(fresh)
    if answers["verify"][0] != "refuses":
        return f"--verify reports {answers['verify']}"
    reading = "training" if name.startswith("train") else "evaluation"
    return problem_of(answers[reading], intact[reading], (name,))


def frames(report: Report, folder: Path, kind: str) -> None:
    """Damages the files that locate the frames of shards, also under open readers."""
    records = make_records(folder / f"frames_{kind}")
    reader = Worker(shard_reader, str(records), seconds=_REQUEST_SECONDS)
    files = sorted(records.glob("*.frames"))
    intact = reader.ask(False)
    for number in range(report.chosen.count):
        rng = random.Random(f"{report.chosen.seed}/frames/{kind}/{number}")
        file = rng.choice(files)

        check = partial(_check_shard, reader, intact, file.name.removesuffix(".frames"), number % 10 == 0)
        _try(report, f"frames {kind} {number}", file, kind, rng, check)
    reader.close()


def manifests(report: Report, folder: Path, kind: str) -> None:
    """Damages manifests."""
    records = make_records(folder / f"manifest_{kind}")
    reader = Worker(manifest_reader, str(records), seconds=_REQUEST_SECONDS)
    intact = reader.ask()
    for number in range(report.chosen.count):
        rng = random.Random(f"{report.chosen.seed}/manifest/{kind}/{number}")

        def check() -> str | None:
            return problem_of(reader.ask(), intact, ("manifest.json", ".tfrecord"))

        _try(report, f"manifest {kind} {number}", records / "manifest.json", kind, rng, check)
    reader.close()


def checkpoints(report: Report, folder: Path, kind: str) -> None:
    """Damages the index and the data of the newer of two checkpoints, in turn."""
    config, workdir = folder / f"tiny_{kind}.gin", folder / f"run_{kind}"
    config.write_text(recipe(make_records(folder / f"for_{kind}"), steps=NEWEST, checkpoint=PREVIOUS))
    print("training a tiny run ...", flush=True)
    reader = Worker(checkpoint_reader, str(config), str(workdir), seconds=_REQUEST_SECONDS)
    files = {path: path.read_bytes() for path in (workdir / "checkpoints").iterdir()}
    intact = reader.ask(True)
    for path in files:
        if path.name.startswith(f"ckpt-{NEWEST}."):
            path.unlink()
    previous = reader.ask(False)
    for number in range(report.chosen.count):
        for path, content in files.items():
            path.write_bytes(content)
        rng = random.Random(f"{report.chosen.seed}/checkpoint/{kind}/{number}")
        file = next(path for path in files if path.name.startswith(f"ckpt-{NEWEST}.{('index', 'data')[number % 2]}"))

        def check(load: bool) -> str | None:
            return _problem_of_checkpoint(reader.ask(load), intact, previous)

        # only a quarter use the reader of evaluation, which builds a network each time
        _try(report, f"checkpoint {kind} {number}", file, kind, rng, partial(check, number % 8 < 2))
    reader.close()


def _problem_of_checkpoint(answer: dict[str, Any], intact: dict[str, Any], previous: dict[str, Any]) -> str | None:
    """Returns the problem after damage to the newest checkpoint, None, or "" if the damage had no effect."""
    if "loaded" in answer and (problem := problem_of(answer["loaded"], intact["loaded"], (f"ckpt-{NEWEST}",))):
        return f"load_checkpoint {problem}"
    kind, text = answer["restored"]
    if kind != "gives":
        return f"does not fall back to the previous checkpoint: {text[:300]}"
    if answer["restored"] == intact["restored"]:
        return "" if answer["state"] == intact["state"] else "restores different values without an error"
    if (answer["restored"], answer["state"]) != (previous["restored"], previous["state"]):
        return f"restores {text}, which is neither checkpoint"
    warning = answer["stderr"].strip()
    return (
        None
        if warning.startswith("warning: ") and f"ckpt-{NEWEST}" in warning
        else f"gives no one-line warning: {warning!r}"
    )


def _try(report: Report, name: str, file: Path, kind: str, rng: random.Random, check: Callable[[], str | None]) -> None:
    """Damages a file, runs the check and restores the file."""
    content = file.read_bytes()
    description, broken = damaged(content, kind, rng)
    file.write_bytes(broken)
    try:
        problem = check()
    except Broke as error:
        problem = f"the reader {error}"
    except RuntimeError as error:
        problem = f"the trial itself ended with {error}"
    finally:
        file.write_bytes(content)
    if problem == "":
        report.note(f"{name.rpartition(' ')[0]}: in bytes that are never read, same result")
    report.add(f"{name}, {file.name} {description}", problem or None)


def main() -> None:
    """Runs the trials."""
    report = Report("damage", arguments(__doc__ or "", count=200))
    parts = {"manifest": manifests, "shard": shards, "frames": frames, "checkpoint": checkpoints}
    chosen = [(part, kind) for part in parts for kind in ("flip", "cut") if report.chosen.only in f"{part} {kind}"]
    with scratch() as folder:
        for part, kind in chosen:
            parts[part](report, folder, kind)
    report.close()


if __name__ == "__main__":
    main()

"""Run folders: resuming with the same settings, locks, and no silent restart from scratch."""

import errno
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from x3d_tf import Expansion, locks
from x3d_tf.config import Execution, TrainConfig
from x3d_tf.data.datasets.spec import DatasetSpec
from x3d_tf.errors import UserError
from x3d_tf.evaluation.reports import locked_report_folder
from x3d_tf.files import WriteError, atomic_path, atomic_write, temporary_path
from x3d_tf.runs.run_folder import RunFolder

CONFIG = TrainConfig(Expansion(gamma_t=4), dataset=DatasetSpec(records="somewhere"))


def begun(root: Path, *files: str) -> RunFolder:
    """Returns a run folder that contains the given files."""
    run = RunFolder(root)
    run.open(CONFIG, {})
    for name in ("history.csv", "preview.png", *files):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    return run


def content(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


@pytest.mark.parametrize(
    "files",
    [
        ("trained.txt",),
        ("best.keras",),
        ("curves.png",),
        ("trained.txt", "checkpoints/ckpt-40.data-00000-of-00001"),
        ("trained.txt", "checkpoints/ckpt-last.index"),
    ],
)
def test_a_run_with_missing_checkpoints_does_not_restart(tmp_path: Path, files: tuple[str, ...]) -> None:
    run = begun(tmp_path / "run", *files)
    row = dict.fromkeys(("step", "epoch", "learning_rate", "loss", "accuracy", "clips_per_second"), 40.0)
    run.write_history([row])
    before = content(run.root)
    message = rf"was trained to step 40 \(it has {files[0]}\), but .*checkpoints has no complete checkpoint"
    for config in (CONFIG, replace(CONFIG, seed=1)):
        with pytest.raises(UserError, match=message):
            run.open(config, {})
    assert content(run.root) == before


@pytest.mark.parametrize("files", [(), ("checkpoints/ckpt-40.data-00000-of-00001",), ("tensorboard/events",)])
def test_a_run_killed_before_its_first_checkpoint_restarts(tmp_path: Path, files: tuple[str, ...]) -> None:
    run = begun(tmp_path / "run", *files)
    run.open(replace(CONFIG, seed=1), {})
    assert run.read_config().seed == 1 and not run.history.exists()


def test_more_steps_for_a_finished_run_suggest_a_new_one(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", "model.keras")
    more = replace(CONFIG, recipe=replace(CONFIG.recipe, steps=CONFIG.recipe.steps + 10))
    way = re.escape(f"'TrainConfig.init=\"{run.root}\"'")
    with pytest.raises(UserError, match=rf"Recipe\.steps was .* finished; .*{way}"):
        run.check(more)
    run.model.unlink()
    (run.root / "checkpoints").mkdir()
    (run.root / "checkpoints/ckpt-40.index").touch()
    with pytest.raises(UserError, match=r"Recipe\.steps was .*another --workdir for the new settings$"):
        run.check(more)


def test_paths_and_accumulation_may_change(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", "checkpoints/ckpt-40.index")
    moved = replace(
        CONFIG,
        dataset=replace(CONFIG.dataset, records="elsewhere"),
        init="gone.keras",
        execution=Execution(accumulation=2),
    )
    run.open(moved, {})
    assert moved.fingerprint() == CONFIG.fingerprint()
    assert run.read_config() == CONFIG  # until the fingerprint of the records was compared
    run.update_config(moved)
    assert run.read_config() == moved
    with pytest.raises(UserError, match=r"TrainConfig\.seed was 0, now 1"):
        run.open(replace(moved, seed=1), {})


def test_links_are_rejected(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", "checkpoints/ckpt-40.index")
    (tmp_path / "disk").mkdir()
    run.tensorboard.symlink_to(tmp_path / "disk")
    run.open(CONFIG, {})
    (tmp_path / "precious").touch()
    (run.root / "config.gin").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=r"config\.gin must not be a symbolic link"), run.training():
        pass
    assert (tmp_path / "precious").read_bytes() == b""


@pytest.mark.parametrize("field", ["train_split", "eval_split", "validation_split"])
@pytest.mark.parametrize("name", ["../../precious", "/etc", "a\\b"])
def test_a_split_is_not_a_path(field: str, name: str) -> None:
    """Split names are part of folder names to which reports are written, and from which --overwrite deletes."""
    with pytest.raises(UserError, match=f"DatasetSpec.{field} must be a name, not a path"):
        DatasetSpec("records", **{field: name})  # type: ignore[arg-type]


HOLDER = """
import sys
from x3d_tf.runs.run_folder import RunFolder
with RunFolder({root!r}).training():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_trains_in_a_folder(tmp_path: Path) -> None:
    root = tmp_path / "run"
    code = HOLDER.format(root=str(root))
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        message = rf"another process is training in {root} \(process {other.pid} on \S+\); wait for it, or choose"
        with pytest.raises(UserError, match=message), RunFolder(root).training():
            pass
        other.kill()
    assert (root / ".lock").exists()  # left by the killed process
    with RunFolder(root).training():
        assert f"process {os.getpid()} on" in (root / ".lock").read_text()
    assert not (root / ".lock").exists()


def test_the_text_of_a_lock_is_not_repeated_unseen(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locks.locked(path, "taken", "wait"):
        path.write_text("\x1b[2Jprocess 1 on evil")
        with pytest.raises(UserError, match=r"^taken; wait$"), locks.locked(path, "taken", "wait"):
            pass


def test_a_lock_is_not_taken_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(WriteError, match="lock cannot be written"), locks.locked(tmp_path / "lock", "taken", "wait"):
        pass
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_file_system_without_locks_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locks.locked(tmp_path / "lock", "taken", "wait"):
        assert f"the file system of {tmp_path} does not support locks (No locks available)" in capsys.readouterr().err


def test_a_lock_that_its_owner_removed_meanwhile_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lock = tmp_path / "lock", locks._lock
    removals = [path, path]

    def removed_first(descriptor: int, lock_path: Path) -> bool:
        if removals:
            removals.pop().unlink()
        return lock(descriptor, lock_path)

    monkeypatch.setattr(locks, "_lock", removed_first)
    with (
        locks.locked(path, "taken", "wait"),
        pytest.raises(UserError, match="taken"),
        locks.locked(path, "taken", "wait"),
    ):
        pass


def test_a_file_is_not_written_through_a_link_at_its_partial_name(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    for name in ("a", "b"):
        temporary_path(tmp_path / name).symlink_to(tmp_path / "precious")
    atomic_write(tmp_path / "a", b"new")
    with atomic_path(tmp_path / "b") as path:
        path.write_bytes(b"new")
    assert (tmp_path / "precious").read_text() == "precious"
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == b"new"


def test_one_process_writes_a_report(tmp_path: Path) -> None:
    folder = tmp_path / "evaluation" / "report"
    with (
        locked_report_folder(folder),
        pytest.raises(UserError, match=r"another process is writing the report .*report \(process "),
        locked_report_folder(folder),
    ):
        pass
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("cell", ["9" * 200_000, "inf", "nan", "1e300", "\ufffd"])
def test_a_damaged_history_ends_before_the_damage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cell: str
) -> None:
    run = begun(tmp_path / "run")
    row = dict.fromkeys(("step", "epoch", "learning_rate", "loss", "accuracy", "clips_per_second"), 40.0)
    run.write_history([row, row])
    text = run.history.read_text().replace("40,40.0", f"40,{cell}", 2).replace(f"40,{cell}", "40,40.0", 1)
    run.history.write_bytes(text.encode().replace("\ufffd".encode(), b"\xff"))
    assert run.read_history() == [row]
    assert "history.csv is damaged after row 1; ignoring the rest" in capsys.readouterr().err


@pytest.mark.parametrize(
    "setting", ["Recipe.steps", "Recipe.learning_rate", "Expansion.gamma_w", "Recipe.decay_fractions"]
)
def test_a_number_of_a_configuration_fits_into_64_bits(setting: str) -> None:
    value = [10**400] if setting == "Recipe.decay_fractions" else 10**400
    text = json.dumps(CONFIG.settings() | {setting: value})
    with pytest.raises(UserError, match=f"{setting} must fit into 64 bits, got 1000"):
        TrainConfig.from_json(text)

"""Run folders: resuming with the same settings, one process at a time, and no silent restart from scratch."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from x3d_tf import Expansion
from x3d_tf.config import Execution, TrainConfig
from x3d_tf.data.datasets.spec import DatasetSpec
from x3d_tf.errors import UserError
from x3d_tf.runs.run_folder import HISTORY_FIELDS, RunFolder

COLUMNS = (*HISTORY_FIELDS, "top1")
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
    row = dict.fromkeys(COLUMNS, 40.0)
    run.write_history(COLUMNS, [row])
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


def test_the_records_of_a_run_are_identified(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.open(CONFIG, {run.fingerprint.name: "a" * 64})
    run.require_records("a" * 64)
    with pytest.raises(UserError, match=r"run was trained on other records than those of DatasetSpec\.records"):
        run.require_records("b" * 64)
    run.fingerprint.unlink()
    with pytest.raises(UserError, match=r"records\.sha256 cannot be read"):
        run.require_records("a" * 64)


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


HOLDER = """
import sys
from x3d_tf.runs.run_folder import HISTORY_FIELDS, RunFolder
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


@pytest.mark.parametrize("cell", ["9" * 200_000, "inf", "nan", "1e300", "\ufffd"])
def test_a_damaged_history_ends_before_the_damage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cell: str
) -> None:
    run = begun(tmp_path / "run")
    row = dict.fromkeys(COLUMNS, 40.0)
    run.write_history(COLUMNS, [row, row])
    text = run.history.read_text().replace("40,40.0", f"40,{cell}", 2).replace(f"40,{cell}", "40,40.0", 1)
    run.history.write_bytes(text.encode().replace("\ufffd".encode(), b"\xff"))
    assert run.read_history() == [row]
    assert "history.csv is damaged after row 1; ignoring the rest" in capsys.readouterr().err


def test_a_run_folder_has_one_configuration(tmp_path: Path) -> None:
    config, run = replace(CONFIG, seed=3), RunFolder(tmp_path / "run")
    run.open(config, {"config.gin": "# text"})
    assert run.read_config() == config and (run.root / "config.gin").read_text() == "# text"
    run.open(config, {})
    other = TrainConfig(Expansion(gamma_t=8), dataset=config.dataset, seed=3)
    run.open(other, {})  # nothing is lost: the run had no checkpoint
    assert run.read_config() == other
    run.checkpoints.mkdir()
    (run.checkpoints / "ckpt-1.index").touch()
    with pytest.raises(ValueError, match=r"Expansion\.gamma_t was 8, now 4.*--workdir"):
        run.open(config, {})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is not a run folder"):
        RunFolder(tmp_path / "full").open(config, {})
    with pytest.raises(ValueError, match="is not a run folder"):
        RunFolder(tmp_path / "full").read_config()


def test_history_round_trip(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.read_history() == []
    row = dict.fromkeys(COLUMNS, 1.5) | {"step": 1.0}
    run.write_history(COLUMNS, [row])
    run.append_history(COLUMNS, row | {"step": 2.0})
    with run.history.open("a") as file:
        file.write("3,1")  # killed while writing
    assert run.read_history() == [row, row | {"step": 2.0}]


def test_columns_of_the_history(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Metrics that are required, optional, and unknown."""
    run = RunFolder(tmp_path)
    row = dict.fromkeys(COLUMNS, 1.5) | {"step": 1.0}
    run.write_history((*COLUMNS, "validation_map", "other"), [row | {"validation_map": 0.5, "other": 2.0}, row])
    assert run.read_history(["top1"], ["validation_map"]) == [row | {"validation_map": 0.5}, row]
    assert run.read_history() == [row | {"validation_map": 0.5, "other": 2.0}, row]
    assert capsys.readouterr().err == ""
    assert run.read_history(["box_top1"], []) == []
    assert "history.csv is damaged after row 0" in capsys.readouterr().err


def test_a_run_resumes_without_naming_the_default_splits(tmp_path: Path) -> None:
    """Training fills in the splits of the records; the command that started the run does not name them."""
    run = RunFolder(tmp_path / "run")
    assert run.with_default_splits(CONFIG) is CONFIG  # a new run
    found = DatasetSpec(records="somewhere", eval_split="val", validation_split="val")
    run.open(replace(CONFIG, dataset=found), {})
    (run.root / "checkpoints").mkdir()
    (run.root / "checkpoints" / "ckpt-40.index").touch()
    assert run.check(run.with_default_splits(CONFIG))
    with pytest.raises(UserError, match="seed was 0, now 1"):
        run.check(run.with_default_splits(replace(CONFIG, seed=1)))


RECIPE = {"gin_files": ["gin/kinetics400/x3d_m.gin"], "changed_settings": ["Recipe.batch"]}


def test_a_run_states_its_recipe(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.open(replace(CONFIG, init="runs/a"), {"recipe.json": json.dumps(RECIPE), "records.sha256": "f00d"})
    of_settings = {"settings_sha256": CONFIG.fingerprint(), "init": "runs/a", "records_sha256": "f00d"}
    assert run.training_record() == of_settings | RECIPE
    run.open(CONFIG, {})  # started again by a program: there was no checkpoint
    assert run.training_record() == of_settings | {"init": None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Expecting property name"),
        ("[1]", r"the file must contain a JSON object, got \[1\]"),
        ("[" * 100_000, "maximum recursion depth"),
        (json.dumps(RECIPE | {"gin_files": None}), "gin_files must be a list of at most 10000 names, got None"),
        (json.dumps(RECIPE | {"gin_files": ["a"] * 10_001}), "gin_files must be a list of at most 10000 names"),
        (json.dumps(RECIPE | {"gin_files": [3]}), "gin_files must be names of 1 to 4096 characters, got 3"),
        (json.dumps(RECIPE | {"changed_settings": [""]}), "changed_settings must be names of 1 to 4096 characters"),
    ],
)
def test_a_damaged_recipe_is_reported(tmp_path: Path, content: str, message: str) -> None:
    run = begun(tmp_path / "run")
    run.recipe.write_text(content)
    with pytest.raises(UserError, match=rf"recipe\.json is damaged: {message}.*Restore it from a copy, or delete it"):
        run.read_recipe()

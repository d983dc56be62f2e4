"""Checkpoints on disk: atomic writes, the two newest kept, untrusted folders."""

import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import x3d_tf
from x3d_tf.errors import UserError
from x3d_tf.files import WriteError
from x3d_tf.runs.checkpoints import Checkpoints, Origin, checkpoint_steps, load_checkpoint
from x3d_tf.runs.run_folder import RunFolder

TINY = x3d_tf.Expansion(gamma_tau=1, gamma_t=1, gamma_s=32 / 112, gamma_w=0.2, gamma_b=1, gamma_d=0.2)
ORIGIN = Origin("settings", "records", clips_per_group=8, groups_per_step=2)

Make = Callable[..., Checkpoints]


@pytest.fixture(scope="module")
def model() -> x3d_tf.X3D:
    network = x3d_tf.build_x3d(TINY, num_classes=2)
    network.class_names = ("left", "right")
    return network


@pytest.fixture
def counter() -> tf.Variable:
    """Stands in for the state of the optimizer."""
    return tf.Variable(0.0)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    (tmp_path / "run").mkdir()
    return RunFolder(tmp_path / "run")


@pytest.fixture
def make(model: x3d_tf.X3D, counter: tf.Variable, run: RunFolder) -> Make:
    """Returns the `Checkpoints` of a process that starts in the run folder."""

    def checkpoints(origin: Origin = ORIGIN, **others: Any) -> Checkpoints:
        return Checkpoints(run, model, {"optimizer": [counter], **others}, origin)

    return checkpoints


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def files_of(*steps: int) -> list[str]:
    return sorted(f"ckpt-{step}{ending}" for step in steps for ending in (".index", ".data-00000-of-00001"))


def save(checkpoints: Checkpoints, counter: tf.Variable, *steps: int) -> None:
    for step in steps:
        counter.assign(step)
        checkpoints.save(step)


def test_the_two_newest_are_kept_and_the_newest_is_restored(make: Make, run: RunFolder, counter: tf.Variable) -> None:
    save(make(), counter, 1, 9, 10, 11)
    assert names(run.checkpoints) == files_of(10, 11)
    counter.assign(-1)
    assert make().restore() == 11
    assert float(counter) == 11
    assert load_checkpoint(run, 10).class_names == ("left", "right")


def test_missing_and_additional_variables_are_detected(
    make: Make, run: RunFolder, counter: tf.Variable, capsys: pytest.CaptureFixture[str]
) -> None:
    save(make(), counter, 1)
    for others in ({"average": [tf.Variable(0.0)]}, {"optimizer": [counter, tf.Variable(0.0)]}, {"optimizer": []}):
        with pytest.raises(UserError, match=r"no checkpoint in .* can be read. Restore them from a backup"):
            make(**others).restore()
    assert "ckpt-1.index cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["damaged", 'model_checkpoint_path: "../../precious"'])
def test_tensorflows_list_of_checkpoints_is_ignored(
    make: Make, run: RunFolder, counter: tf.Variable, tmp_path: Path, text: str
) -> None:
    save(make(), counter, 1, 2)
    victims = [tmp_path / "precious.index", tmp_path / "precious.data-00000-of-00001", run.root / "ckpt-1.index"]
    for victim in victims:
        victim.touch()
    paths = [f"{tmp_path}/precious", "../../precious", "../ckpt-1", f"{tmp_path}/*", "../../*"]
    lines = "".join(f'all_model_checkpoint_paths: "{path}"\n' for path in paths)
    (run.checkpoints / "checkpoint").write_text(f"{text}\n{lines}")
    checkpoints = make()
    assert checkpoints.restore() == 2
    save(checkpoints, counter, 3, 4, 5)
    assert all(victim.exists() for victim in victims)
    assert (run.checkpoints / "checkpoint").read_text() == f"{text}\n{lines}"
    assert checkpoint_steps(run.checkpoints) == [4, 5]


def test_only_temporary_files_of_a_killed_process_are_removed(
    make: Make, run: RunFolder, counter: tf.Variable, tmp_path: Path
) -> None:
    save(make(), counter, 2, 3)
    folder = run.checkpoints
    for ending in (".index", ".data-00000-of-00001"):  # the process was killed before deleting the oldest
        (folder / f"ckpt-1{ending}").write_bytes((folder / f"ckpt-2{ending}").read_bytes())
    for name in ("ckpt-4_temp", ".partial-ckpt_temp"):
        (folder / name).mkdir()
        (folder / name / "part-00000-of-00001.data-00000-of-00001").touch()
    for name in (".partial-ckpt.index", "ckpt-4.data-00000-of-00001"):
        (folder / name).touch()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").touch()
    (folder / "ckpt-5_temp").symlink_to(elsewhere)
    (folder / "ckpt-6.data-00000-of-00001").symlink_to(elsewhere / "file")
    unrelated = ["ckpt-last.index", "ckpt-².index", "ckpt-007.index", "ckpt-1.npz", "notes"]
    for name in unrelated:
        (folder / name).touch()
    checkpoints = make()
    assert checkpoints.restore() == 3
    assert names(folder) == sorted(files_of(2, 3) + unrelated)
    assert names(elsewhere) == ["file"]


def test_checkpoints_are_not_written_through_links(
    make: Make, run: RunFolder, counter: tf.Variable, tmp_path: Path
) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "folder"
    victim.write_text("precious")
    folder.mkdir()
    (folder / "file").touch()
    run.checkpoints.mkdir()
    for name in ("ckpt-1.index", "ckpt-1.data-00000-of-00001", ".partial-ckpt.index"):
        (run.checkpoints / name).symlink_to(victim)
    (run.checkpoints / ".partial-ckpt_temp").symlink_to(folder)
    save(make(), counter, 1)
    assert victim.read_text() == "precious" and names(folder) == ["file"]
    assert names(run.checkpoints) == files_of(1)


def test_the_folder_may_be_a_link(make: Make, run: RunFolder, counter: tf.Variable, tmp_path: Path) -> None:
    (tmp_path / "large disk").mkdir()
    run.checkpoints.symlink_to(tmp_path / "large disk")
    save(make(), counter, 1, 2, 3)
    assert names(tmp_path / "large disk") == files_of(2, 3)


def test_a_damaged_newest_checkpoint_falls_back(make: Make, run: RunFolder, counter: tf.Variable) -> None:
    save(make(), counter, 40, 60)
    (run.checkpoints / "ckpt-60.data-00000-of-00001").write_bytes(b"damaged")
    checkpoints = make()
    assert checkpoints.restore() == 40 and float(counter) == 40
    assert checkpoint_steps(run.checkpoints) == [40, 60]
    save(checkpoints, counter, 50)
    assert names(run.checkpoints) == files_of(40, 50)


def test_a_checkpoint_under_the_name_of_another_step_is_refused(
    make: Make, run: RunFolder, counter: tf.Variable, capsys: pytest.CaptureFixture[str]
) -> None:
    save(make(), counter, 10, 20)
    for file in files_of(20):
        (run.checkpoints / file).rename(run.checkpoints / file.replace("20", "1000"))
    assert make().restore() == 10
    assert "ckpt-1000.index must be 1000, as in its file name, got 20" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"ckpt-1000\.index must be 1000, as in its file name, got 20"):
        load_checkpoint(run, 1000)


@pytest.mark.parametrize("ending", [".index", ".data-00000-of-00001"])
def test_a_pipe_in_place_of_a_checkpoint_is_not_opened(
    make: Make, run: RunFolder, counter: tf.Variable, ending: str
) -> None:
    save(make(), counter, 10, 20)
    pipe = run.checkpoints / f"ckpt-20{ending}"
    pipe.unlink()
    os.mkfifo(pipe)
    with pytest.raises(UserError, match=f"ckpt-20{ending} does not exist or is not a file"):
        load_checkpoint(run, 20)
    assert make().restore() == 10


@pytest.fixture
def limited() -> Iterator[Callable[[int], None]]:
    """Limits the file size, which fails like a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [0, 100, 5000, 20_000])
def test_a_full_disk_gives_one_line(
    make: Make, run: RunFolder, counter: tf.Variable, limited: Callable[[int], None], size: int
) -> None:
    checkpoints = make()
    save(checkpoints, counter, 1, 2)
    before = {name: (run.checkpoints / name).read_bytes() for name in names(run.checkpoints)}
    assert max(map(len, before.values())) > 20_000
    limited(size)
    with pytest.raises(WriteError) as caught:
        save(checkpoints, counter, 3)
    limited(1 << 40)
    assert str(caught.value).startswith(f"{run.checkpoints}/ckpt-3.index cannot be written: File too large. Free ")
    assert "resumes from step 2" in str(caught.value) and "\n" not in str(caught.value)
    assert {name: (run.checkpoints / name).read_bytes() for name in names(run.checkpoints)} == before
    save(checkpoints, counter, 3)
    assert make().restore() == 3


@pytest.mark.parametrize("failing", range(4))
def test_a_disk_that_fills_up_between_the_files(
    make: Make, run: RunFolder, counter: tf.Variable, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    save(make(), counter, 1, 2)
    flush, replace, calls = os.fsync, Path.replace, iter(range(9))

    def fail(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            if next(calls) == failing:
                raise OSError(28, "No space left on device")
            return function(*arguments)

        return called

    with monkeypatch.context() as patch, pytest.raises(WriteError, match="No space left on device"):
        patch.setattr(os, "fsync", fail(flush))
        patch.setattr(Path, "replace", fail(replace))
        save(make(), counter, 3)
    assert names(run.checkpoints) == files_of(1, 2)


def test_a_checkpoint_is_not_written_twice(make: Make, run: RunFolder, counter: tf.Variable) -> None:
    checkpoints = make()
    save(checkpoints, counter, 1)
    inode = (run.checkpoints / "ckpt-1.index").stat().st_ino
    save(checkpoints, counter, 1)
    again = make()
    again.restore()
    save(again, counter, 1)
    assert (run.checkpoints / "ckpt-1.index").stat().st_ino == inode


def test_tensors_larger_than_their_file_are_refused_before_they_are_read(run: RunFolder) -> None:
    run.checkpoints.mkdir()
    large = tf.train.Checkpoint(description=tf.Variable(np.zeros(1 << 20, "float32")))
    large.write(str(run.checkpoints / "ckpt-1"))
    os.truncate(run.checkpoints / "ckpt-1.data-00000-of-00001", 100)
    with pytest.raises(UserError, match=r"must fit into the 100 bytes of ckpt-1.data-00000-of-00001, got 'description"):
        load_checkpoint(run, 1)
    (run.checkpoints / "ckpt-1").mkdir()
    with pytest.raises(UserError, match="not be a folder"):
        load_checkpoint(run, 1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"config": "other"}, "was written with another configuration"),
        ({"records": "other"}, r"trained on other records .* fingerprint is other, that of the checkpoint is records"),
        (
            {"clips_per_group": 4, "groups_per_step": 4},
            r"2 groups of 8 clips per step, now 4 groups of 4 clips .*--allow_",
        ),
        ({"groups_per_step": 1}, r"2 groups of 8 clips per step, now 1 group of 8 clips"),
    ],
)
def test_other_origins_are_refused(make: Make, counter: tf.Variable, changed: dict[str, Any], message: str) -> None:
    from dataclasses import replace

    save(make(), counter, 1)
    with pytest.raises(UserError, match=message):
        make(replace(ORIGIN, **changed)).restore()


def test_other_groups_may_be_allowed_and_are_saved(make: Make, counter: tf.Variable) -> None:
    save(make(), counter, 1)
    other = Origin("settings", "records", clips_per_group=4, groups_per_step=4)
    checkpoints = make(other)
    assert checkpoints.restore(allow_other_groups=True) == 1
    save(checkpoints, counter, 2)
    assert make(other).restore() == 2
    with pytest.raises(UserError, match="4 groups of 4 clips per step"):
        make().restore()

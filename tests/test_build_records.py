"""The command `build_records`."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from no_tensorflow import without_tensorflow
from video_fixtures import write_class_folders

from x3d_tf import build_records
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.errors import UserError


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_class_folders(tmp_path_factory.mktemp("videos"))


def command(*arguments: str) -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, "-m", "x3d_tf.build_records", *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def test_the_command(
    clips: Path, tmp_path: Path, in_process: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    in_process(build_records, f"--videos={clips}", f"--output={output}", "--split=0.3")
    manifest = Manifest.load(output)
    assert {split: len(part.records) for split, part in manifest.splits.items()} == {"train": 4, "test": 3}
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.strip().startswith("python -m x3d_tf.train --gin_file=gin/x3d_s.gin --gin_file=gin/data/records.gin")
    assert f"""--gin_bindings='DatasetSpec.records="{output}"'""" in last
    arguments = shlex.split(last)[3:]
    assert "--gin_bindings=Recipe.batch=4" in arguments  # the recipe's batch is 8
    refused = without_tensorflow("train", *arguments, "--gin_bindings=Recipe.batch=5")
    assert refused.stderr == (
        "error: Recipe.batch must be at most 4, the number of records in split 'train' "
        "(--gin_bindings=Recipe.batch=4), got 5\n"
    )
    assert "import of keras halted" in without_tensorflow("train", *arguments).stderr  # all checks passed
    again = command(f"--videos={clips}", f"--output={output}")
    assert again.returncode == 1
    assert (
        again.stderr.strip()
        .splitlines()[-1]
        .startswith(f"error: --output: {output} holds a build with split = 0.3, not None")
    )
    assert "Traceback" not in again.stderr
    shard = output / manifest.splits["test"].shards[0].file
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"^{re.escape(str(output))} has 1 damaged shard;"):
        in_process(build_records, "--verify", f"--output={output}")
    train, test, damaged = capsys.readouterr().out.splitlines()
    assert train.endswith("; none damaged")
    assert test.endswith("; 1 damaged")
    assert damaged.startswith(f"  {shard} has ")


def test_parts_and_finish(
    clips: Path, tmp_path: Path, in_process: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (f"--videos={clips}", f"--output={tmp_path / 'out'}", "--split=0.3")
    in_process(build_records, *flags, "--part=1/2")
    printed = capsys.readouterr().out
    assert "part 1 of 2: 1 of 1 shard" in printed
    assert printed.endswith("When all parts are finished, run the same command with --finish instead of --part.\n")
    with pytest.raises(UserError, match=r"lacks 1 shard of 2: .*with --part=2/2 instead of --finish"):
        in_process(build_records, *flags, "--finish")
    in_process(build_records, *flags, "--part=2/2")
    capsys.readouterr()
    in_process(build_records, *flags, "--finish")
    assert "python -m x3d_tf.train --gin_file=gin/x3d_s.gin" in capsys.readouterr().out
    in_process(build_records, *flags, "--part=2/2")
    assert capsys.readouterr().out == "part 2 of 2: the build was already complete\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--part=5/4"], r"part must be K/N with 1 <= K <= N, such as 3/16, got '5/4'"),
        (["--part=0/4"], r"part must be K/N with 1 <= K <= N, such as 3/16, got '0/4'"),
        (["--part=x"], "--part must be K/N, such as 3/16 for the third of 16 parts, got 'x'"),
        (["--part="], "--part must be K/N, such as 3/16 for the third of 16 parts, got ''"),
        (["--part=-1/4"], "--part must be K/N, such as 3/16 for the third of 16 parts, got '-1/4'"),
        (["--part=1/4/2"], "--part must be K/N, .*, got '1/4/2'"),
        (["--part=1/4", "--finish"], "--part and --finish must not be given together"),
        (["--part=1/4", "--ray=a:1"], "--part and --ray must not be given together"),
        (["--finish", "--ray=a:1"], "--finish and --ray must not be given together"),
        (["--part=1/4", "--verify"], "--part.* must not be given with --verify or --index"),
        (["--finish", "--index"], "--finish.* must not be given with --verify or --index"),
        (["--ray=a:1", "--verify"], "--ray.* must not be given with --verify or --index"),
        (["--ray=nonsense"], "ray must be HOST:PORT, the address of the cluster's head node, got 'nonsense'"),
    ],
)
def test_flags_that_exclude_each_other(
    clips: Path, tmp_path: Path, in_process: Callable[..., None], flags: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        in_process(build_records, f"--videos={clips}", f"--output={tmp_path / 'out'}", *flags)
    assert not (tmp_path / "out").exists()

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

"""Video files below folders."""

import os
from pathlib import Path

import pytest

from x3d_tf.data.video.listing import list_videos


def test_folders_are_searched(tmp_path: Path) -> None:
    for name in ("b/2.mp4", "b/10.mp4", "b/c/é x.avi", "a.mkv", ".hidden.mp4", "b/.thumbs/x.mp4", "z/,.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    (tmp_path / "b/loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "z/again").symlink_to(tmp_path / "b", target_is_directory=True)
    (tmp_path / "z/gone").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe")
    names = [path.relative_to(tmp_path).as_posix() for path in list_videos([tmp_path])]
    assert names == ["a.mkv", "b/10.mp4", "b/2.mp4", "b/c/é x.avi", "z/,.mp4", "z/gone"]
    named = [tmp_path / ".hidden.mp4", tmp_path / "missing.mp4"]
    assert list_videos([*named, named[0]]) == named


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the videos must be files or folders with files, got"):
        list_videos([tmp_path])
    with pytest.raises(ValueError, match=r"^no such file or folder: a\.mp4, b$"):
        list_videos(["a.mp4", "b"])

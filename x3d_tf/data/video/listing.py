"""The videos that somebody names: files, and folders of files. Imports no TensorFlow."""

from collections.abc import Iterable
from pathlib import Path

from x3d_tf.errors import UserError, first_few, require


def list_videos(paths: Iterable[str | Path]) -> list[Path]:
    """The files that are named, and all files below the folders that are, sorted within each folder.

    Hidden files and folders are left out unless named themselves. A folder that links lead to twice is searched once.

    Raises:
        UserError: there is none, or nothing that is named exists.
        OSError: a folder that may not be read.
    """
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()

    def search(folder: Path) -> None:
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:  # links may lead in circles
            return
        seen.add((status.st_dev, status.st_ino))
        for entry in sorted(folder.iterdir()):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                search(entry)
            elif entry.is_file() or entry.is_symlink():  # a link to nothing will be reported; a pipe would never end
                found.append(entry)

    given = [Path(path) for path in paths]
    if not any(path.exists() or path.is_symlink() for path in given):  # of several files the others may still be read
        raise UserError(f"no such file or folder: {first_few([str(path) for path in given])}")
    for path in given:
        if path.is_dir():
            search(path)
        else:
            found.append(path)
    require(bool(found), "the videos", "be files, or folders that hold some", [str(path) for path in given])
    return list(dict.fromkeys(found))

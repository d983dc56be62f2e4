"""Lists video files from paths of files and folders. Imports no TensorFlow."""

from collections.abc import Iterable
from pathlib import Path

from x3d_tf.errors import UserError, first_few, require


def list_videos(paths: Iterable[str | Path]) -> list[Path]:
    """Returns the given files, and all files below the given folders, sorted within each folder.

    Hidden files and folders are skipped unless they are given explicitly. A folder that several links lead to is
    searched once.

    Raises:
        UserError: none of the paths exists, or the folders hold no files.
        OSError: a folder cannot be read.
    """
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()

    def search(folder: Path) -> None:
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:  # links may form cycles
            return
        seen.add((status.st_dev, status.st_ino))
        for entry in sorted(folder.iterdir()):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                search(entry)
            elif (
                entry.is_file() or entry.is_symlink()
            ):  # reports dangling links later; skips pipes, which may never end
                found.append(entry)

    requested = [Path(path) for path in paths]
    if not any(path.exists() or path.is_symlink() for path in requested):  # a single missing file is reported later
        raise UserError(f"no such file or folder: {first_few([str(path) for path in requested])}")
    for path in requested:
        if path.is_dir():
            search(path)
        else:
            found.append(path)
    require(bool(found), "the videos", "be files or folders with files", [str(path) for path in requested])
    return list(dict.fromkeys(found))

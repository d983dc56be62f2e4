"""The data set `folder`: videos in class folders, or in split folders with class folders. Imports no TensorFlow."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from x3d_tf.data.building.sources import (
    SPLIT_NAMES,
    ClassList,
    Sources,
    Video,
    check_splits,
    parse_split_name,
    resolve_class,
    shuffle_by_hash,
    sorted_class_names,
    split_by_fraction,
    visible_entries,
)
from x3d_tf.data.datasets.base import Inputs
from x3d_tf.data.video.decode import VideoError
from x3d_tf.errors import UserError
from x3d_tf.text import check_class_name, counted


class Folder:
    """Videos in one folder per class."""

    name = "folder"
    requires = ("videos",)
    accepts = ("splits", "split", "classes")
    flips = True

    def sources(self, inputs: Inputs) -> Sources:
        """Returns the videos; see `find_videos`."""
        return find_videos(
            inputs.path("videos"), splits=inputs.splits, split=inputs.split, seed=inputs.seed, classes=inputs.classes
        )


DATASETS = (Folder(),)


def find_videos(
    videos: Path,
    *,
    splits: Sequence[str] | None = None,
    split: float | None = None,
    seed: int = 0,
    classes: Path | None = None,
) -> Sources:
    """Finds the videos in class folders.

    Hidden files are ignored. Files outside the class folders, and class folders without a file, are unusable.

    Args:
        videos: folder with one folder of videos per class, or with one folder per split that holds such class folders.
        splits: names of the split folders. By default the folders "train", "val" and "test" are used if "train" and
            another one exist (the spellings "training", "valid", "validate", "validation" and "testing" count too, in
            any case); otherwise all videos go to "train".
        split: fraction of each class's videos for the split "test", in (0, 1), the rest going to "train"; excludes
            `splits`.
        seed: random seed for the order of the videos and for the choice of test videos.
        classes: text file with one class name per line, in the order of their labels; a folder may then also have a
            line number as its name, counted from 0. Defaults to the names found, sorted by value if all are digits,
            else alphabetically.

    Raises:
        UserError: a setting is out of range; a folder does not exist or has another layout; or `classes` lacks a class.
    """
    check_splits(splits, split)
    if not videos.is_dir():
        raise UserError(f"videos: {videos} is not a folder")
    known = ClassList.read(classes) if classes else None
    unusable: list[VideoError] = []
    folders = {name: videos / name for name in splits or ()}
    for folder in folders.values():
        if not folder.is_dir():
            raise UserError(f"splits: {folder} is not a folder")
    if splits is None and split is None:
        folders = find_split_folders(videos)
        unusable += _report_ignored(videos, folders)
    if folders:
        found = {
            name: shuffle_by_hash(_videos_in_class_folders(folder, videos, known, unusable), seed)
            for name, folder in folders.items()
        }
    else:
        found = split_by_fraction(_videos_in_class_folders(videos, videos, known, unusable), split, seed)
    if not any(found.values()):
        ignored = f"; ignored {counted(len(unusable), 'other entry')}" if unusable else ""
        raise UserError(f"videos: {videos} has no class folders with videos in them{ignored}")
    return Sources(found, unusable, known.names if known else sorted_class_names(found), "single_label")


def find_split_folders(videos: Path) -> dict[str, Path]:
    """Finds the split folders that are used without `splits`, in the order of `SPLIT_NAMES`.

    These are the folders for train, val and test, under the names that `parse_split_name` recognises. The result is
    empty unless a train folder with folders in it and at least one other split folder exist.

    Raises:
        UserError: two folders stand for the same split.
    """
    found: dict[str, list[Path]] = {}
    for folder in sorted(visible_entries(videos)) if videos.is_dir() else ():
        split = parse_split_name(folder.name)
        if split and folder.is_dir():
            found.setdefault(split, []).append(folder)
    train_entries = (entry for folder in found.get("train", ()) for entry in visible_entries(folder))
    if len(found) < 2 or not any(entry.is_dir() for entry in train_entries):
        return {}
    for split, folders in found.items():
        if len(folders) > 1:
            raise UserError(
                f"videos: {folders[0]} and {folders[1]} both stand for split {split}. Move the videos into one of "
                "them, or list the folders to use in --splits"
            )
    return {name: found[name][0] for name in SPLIT_NAMES if name in found}


def _report_ignored(videos: Path, folders: Mapping[str, Path]) -> list[VideoError]:
    """Reports the entries beside the split folders, which are ignored."""
    names = ", ".join(folder.name for folder in folders.values())
    others = sorted(set(visible_entries(videos)) - set(folders.values())) if folders else []
    return [VideoError(path, f"is outside the split folders {names}") for path in others]


def _videos_in_class_folders(
    folder: Path, root: Path, classes: ClassList | None, unusable: list[VideoError]
) -> list[Video]:
    """Returns the files of the class folders; appends other files and empty class folders to `unusable`."""
    videos: list[Video] = []
    for class_folder in sorted(visible_entries(folder)):
        if not class_folder.is_dir():
            unusable.append(VideoError(class_folder, "is not in a class folder"))
            continue
        files = sorted(visible_entries(class_folder))
        if not files:
            unusable.append(VideoError(class_folder, "is a class folder without videos"))
            continue
        name = _to_utf8(class_folder.name)
        check_class_name(name, f"the name of {class_folder}")
        name = resolve_class(name, classes, f"the name of {class_folder}")
        for file in files:
            if file.is_dir():
                raise UserError(
                    f"{file} is a folder, but class folders must hold video files. If {folder.name}/ has one folder "
                    f"per split, name them: --splits={','.join(sorted(p.name for p in visible_entries(folder)))}"
                )
            videos.append(Video(file, _to_utf8(file.relative_to(root).as_posix()), (name,)))
    return videos


def _to_utf8(name: str) -> str:
    """Replaces bytes of a file name that are not valid UTF-8, so that it can be stored as text."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

"""Videos that the lists of a published data set name: finding their files, and what is missing. Imports no TensorFlow.

The lists of published data sets cannot be edited by their users, and name videos that no longer exist. So problems of a
list that leave the rest usable become rows of `failures.csv`; ambiguous files in the user's own folder are errors.
"""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from x3d_tf.data.building.sources import Sources, Video, shuffle_by_hash
from x3d_tf.data.video.decode import VideoError
from x3d_tf.data.video.image_sequences import FOLDER_FPS
from x3d_tf.errors import UserError, first_few, require
from x3d_tf.files import read_text
from x3d_tf.text import check_class_name, counted, did_you_mean, lines_of, whole
from x3d_tf.types import AnnotationKind, TimedLabel

# Files of other kinds, such as a downloader's ID.info.json or ID.mp4.part, are not videos.
_SUFFIX = re.compile(r"\.(3gp|asf|avi|flv|m2ts|m4v|mkv|mov|mp4|mpe?g|mts|mxf|ogv|ts|vob|webm|wmv)", re.IGNORECASE)
_SEPARATORS = re.compile(r"[\W_]+")


class VideoFiles:
    """The video files below a folder, from one scan: data sets have hundreds of thousands on network disks.

    Args:
        folder: folder of the videos, with or without subfolders. Hidden files and files that are not videos by their
            extension are ignored.
        classes: class names, if a video in the folder of another class is another video with the same name.

    Raises:
        UserError: the folder does not exist.
    """

    def __init__(self, folder: Path, classes: Sequence[str] = ()) -> None:
        if not folder.is_dir():
            raise UserError(f"videos: {folder} is not a folder")
        self.folder = Path(os.path.normpath(folder))
        self._classes = {plain(name) for name in classes}
        self._by_stem: dict[str, list[Path]] = {}
        for path in _walk(self.folder):
            self._by_stem.setdefault(path.stem, []).append(path)

    def named(self, stem: str, class_name: str = "") -> tuple[Path, ...]:
        """Returns the files with a name, whatever their extension and folder.

        Args:
            stem: the name without extension.
            class_name: class of the video. If one of several files is in the folder of this class, only it counts.
        """
        found, own = self._by_stem.get(stem, []), plain(class_name)
        others = self._classes - {own} if self._classes else ()
        found = [path for path in found if path.parent == self.folder or plain(path.parent.name) not in others]
        in_class = [path for path in found if len(found) > 1 and plain(path.parent.name) == own]
        return tuple(in_class if len(in_class) == 1 else found)

    def at(self, path: str) -> tuple[Path, ...]:
        """Returns the file at a path, absolute or relative to the folder, or nothing."""
        wanted = self.folder / os.path.relpath(self.folder / path, self.folder)
        return (wanted,) if wanted in self._by_stem.get(wanted.stem, ()) else ()


def _walk(folder: Path) -> Iterator[Path]:
    """Yields the video files below a folder in alphabetical order; follows links to folders, each folder once."""
    seen: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        current = waiting.pop()
        with _reading(current):
            status = current.stat()
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in _visible(current):
            path = current / entry.name
            if _is_folder(entry):
                waiting.append(path)
            elif _SUFFIX.fullmatch(path.suffix):
                yield path


def _visible(folder: Path) -> "list[os.DirEntry[str]]":
    """Returns the entries of a folder that are not hidden, in alphabetical order."""
    with _reading(folder), os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"videos: the folder {folder} cannot be read: {error.strerror}") from error


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # such as a link to itself
        return False


def plain(name: str) -> str:
    """Returns the letters and digits of a name without case: folders spell "massaging person's head" in many ways."""
    return _SEPARATORS.sub("", unicodedata.normalize("NFKC", name).casefold())


def entries_by_name(videos: Path) -> dict[str, tuple[Path, ...]]:
    """Returns the video files directly in a folder by their names without extension, and the folders by their names.

    Raises:
        UserError: the folder cannot be read.
    """
    found: dict[str, tuple[Path, ...]] = {}
    for entry in _visible(videos):
        path = videos / entry.name
        is_folder = _is_folder(entry)
        if is_folder or _SUFFIX.fullmatch(path.suffix):
            name = path.name if is_folder else path.stem
            found[name] = (*found.get(name, ()), path)
    return found


def require_one(files: tuple[Path, ...], folder: Path, name: str, where: str) -> Path:
    """Returns the only file of a video; `where` is the line that lists it.

    Raises:
        UserError: there are several.
    """
    require(len(files) == 1, f"videos: {folder}", f"hold one file for {name} ({where})", list(map(str, files)))
    return files[0]


class ClassNames:
    """The classes of a data set, found by their names in any common spelling.

    Args:
        names: the class names in the order of their labels.
        source: description of the names for messages, such as "the 400 classes of kinetics400".
    """

    def __init__(self, names: Sequence[str], source: str) -> None:
        self.names, self._source = tuple(names), source
        counts = Counter(map(plain, names))
        self._by_name = {plain(name): name for name in names if counts[plain(name)] == 1}
        self._by_name |= {name: name for name in names}

    def find(self, label: str, where: str) -> str:
        """Returns the class with a name, ignoring case, quotes, underscores and spaces.

        Raises:
            UserError: there is none. The message begins with `where`.
        """
        name = self._by_name.get(label) or self._by_name.get(plain(label))
        if name is None:
            hint = did_you_mean(label, self.names)  # slow
            require(False, where, f"be one of {self._source}{f' ({hint})' if hint else ''}", label)
        return name or ""

    def at(self, number: str, where: str, first: int = 0) -> str:
        """Returns the class with a number, counted from `first`; raises `UserError` if there is none."""
        index = whole(number)
        last = first + len(self.names) - 1
        inside = index is not None and first <= index <= last
        require(inside, where, f"be a number in {first}..{last}, of {self._source}", number)
        return self.names[(index or 0) - first]


def read_numbered_classes(path: Path, number: str, first: int = 0) -> list[str]:
    """Reads lines of a class number and a class name, in the order of the numbers.

    Args:
        path: the file.
        number: format of the numbers, such as "c{:03d}".
        first: number of the first class.

    Raises:
        UserError: the file cannot be read or a line breaks its rule; the message names file and line.
    """
    names: list[str] = []
    for line, text in enumerate(lines_of(read_text(path, "classes")), 1):
        if not text.strip():
            continue
        found, _, name = text.strip().partition(" ")
        expected = number.format(first + len(names))
        rule = f"be {expected} and a class name, because the numbers count the lines"
        require(found == expected and bool(name), f"{path}, line {line}", rule, text)
        check_class_name(name, f"{path}, line {line}")
        require(name not in names, f"{path}, line {line}", "not repeat a class", name)
        names.append(name)
    require(bool(names), str(path), "list at least one class")
    return names


class Entry(NamedTuple):
    """A video in a list.

    Attributes:
        name: name of the video in the records, unique in the data set.
        classes: its classes.
        where: file and line that list it, for messages.
        files: the files with its name: none if it is missing.
        start, end: segment of the file in seconds; an end of None means the end of the file.
        source: name of the recording that it is a part of. Defaults to `name`.
        timed: its classes with their times; empty if they apply to the complete video.
    """

    name: str
    classes: tuple[str, ...]
    where: str
    files: tuple[Path, ...]
    start: float = 0.0
    end: float | None = None
    source: str = ""
    timed: tuple[TimedLabel, ...] = ()


def collect(
    folder: Path,
    lists: Mapping[str, Sequence[Entry]],
    classes: Sequence[str],
    seed: int,
    task: AnnotationKind = "single_label",
    frame_rate: float = FOLDER_FPS,
    exclusive: bool = True,
) -> Sources:
    """Returns the videos of the lists that exist, and prints how many are missing, by class.

    Missing videos are unusable. So are a video or a file that is listed before, in any split, and, if recordings are
    exclusive, a segment of a recording of which an earlier split has another segment.

    Args:
        folder: folder of the videos.
        lists: the entries of each split.
        classes: class names in the order of their labels.
        seed: random seed for the order.
        task: kind of annotation.
        frame_rate: images per second, for folders of frames.
        exclusive: a recording may be in one split only.

    Raises:
        UserError: a list is empty, no video of a split exists, or a video has two files.
    """
    splits: dict[str, list[Video]] = {}
    unusable: list[VideoError] = []
    first: dict[object, str] = {}  # where a name, or a segment of a file, was listed first
    split_of: dict[str, tuple[str, str]] = {}  # by recording: its split, and where it was listed first
    for split, entries in lists.items():
        require(bool(entries), f"the list of split {split}", "name at least one video")
        members, missing, absent = splits.setdefault(split, []), Counter[str](), 0
        for entry in entries:
            source = (entry.source if exclusive else "") or entry.name
            here = (split, entry.where)
            owner, place = (split_of.setdefault if entry.files else split_of.get)(source, here)
            listed = first.setdefault(entry.name, entry.where)
            if listed != entry.where:
                reason = f"is listed twice: in {listed} and in {entry.where}"
            elif owner != split:
                reason = f"is in two splits: {source} is in {owner} ({place}) and in {split} ({entry.where})"
            elif not entry.files:
                missing.update(entry.classes)
                absent += 1
                of_class = f", class {entry.classes[0]}" if len(entry.classes) == 1 else ""
                reason = f"does not exist ({entry.where}{of_class})"
            elif (listed := first.setdefault((entry.files, entry.start, entry.end), entry.where)) != entry.where:
                reason = f"is listed twice, with other names or classes: in {listed} and in {entry.where}"
            else:
                members.append(_video(folder, entry, frame_rate))
                continue
            unusable.append(VideoError(entry.files[0] if entry.files else folder / entry.name, reason))
        _report_missing(split, entries, missing, absent)
        _require_some(folder, split, entries, members, unusable)
    ordered = {split: shuffle_by_hash(members, seed) for split, members in splits.items()}
    expected = {split: len({entry.name for entry in entries}) for split, entries in lists.items()}
    return Sources(ordered, unusable, tuple(classes), task, expected)


def _video(folder: Path, entry: Entry, frame_rate: float) -> Video:
    return Video(
        require_one(entry.files, folder, entry.name, entry.where),
        entry.name,
        entry.classes,
        entry.start,
        entry.end,
        frame_rate=frame_rate,
        must_cover_segment=True,
        timed=entry.timed,
        recording="" if entry.source == entry.name else entry.source,
    )


def _require_some(
    folder: Path, split: str, entries: Sequence[Entry], members: Sequence[Video], unusable: Sequence[VideoError]
) -> None:
    """Raises `UserError` if no video of a list can be used."""
    if not members:
        problem = unusable[-len(entries)]
        raise UserError(
            f"no video of split {split} can be used ({len(entries)} listed): {problem.path} {problem.reason}. "
            f"Videos are searched in --videos={folder}"
        )


def _report_missing(split: str, entries: Sequence[Entry], missing: Counter[str], absent: int) -> None:
    """Prints how many videos of a list do not exist, and of which classes most are missing."""
    if absent:
        listed = Counter(name for entry in entries for name in entry.classes)
        counts = [f"{name} {count} of {listed[name]}" for name, count in missing.most_common()]
        text = f"{absent} of the {counted(len(entries), 'listed video')} of split {split} do not exist"
        print(f"{text}; by class: {first_few(counts)}" if counts else text)

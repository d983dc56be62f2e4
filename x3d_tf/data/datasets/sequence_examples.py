"""The data set `sequence_examples`: videos in TFRecord files that other tools wrote, such as Model Garden's.

Imports no TensorFlow.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from x3d_tf.data.building.listed import plain
from x3d_tf.data.building.sequence_examples import LABELS, RATE, Context, Example, is_intact, list_examples
from x3d_tf.data.building.sources import Sources, Video, shuffle_by_hash
from x3d_tf.data.class_lists import read_classes
from x3d_tf.data.datasets.base import Inputs
from x3d_tf.data.records.index import MAX_SECONDS
from x3d_tf.data.video.decode import VideoError
from x3d_tf.data.video.image_sequences import check_frame_rate
from x3d_tf.errors import UserError, require
from x3d_tf.types import AnnotationKind

_THREADS = 16  # hides the latency of network disks
_LONGEST_NAME = 1000  # characters
_UNLABELLED = -1


class SequenceExamples:
    """Videos in SequenceExamples, each of which has one class, or any number of them."""

    name = "sequence_examples"
    requires = ("lists", "classes")
    accepts = ("frame_rate",)
    flips = True

    def sources(self, inputs: Inputs) -> Sources:
        """Returns the records of the files. Each list is a TFRecord file, or a pattern such as `shards/train-*`.

        Videos are named by `clip/media_id`, or else by split, file and number. Records that state no frame rate have
        that of the inputs. The task is multi-label if any record has no label or several.

        Raises:
            UserError: a pattern matches no file; a label is not in the class list, or has another name there; or a
                record states no frame rate and none is given.
        """
        if inputs.frame_rate is not None:
            check_frame_rate(inputs.frame_rate, "frame_rate")
        videos = _Videos(read_classes(inputs.path("classes")), inputs.frame_rate)
        records = _list_records(inputs, videos.unusable)
        splits, expected = {}, {}
        for split in inputs.lists:
            splits[split] = shuffle_by_hash([*videos.of(records[split])], inputs.seed)
            expected[split] = len(records[split])
        counts = {len(video.classes) for found in splits.values() for video in found}
        task: AnnotationKind = "multi_label" if counts - {1} else "single_label"
        return Sources(splits, videos.unusable, videos.classes, task, expected)


DATASETS = (SequenceExamples(),)


class _Record(NamedTuple):
    """A record with its metadata, or the error that it has none."""

    split: str
    file: Path
    example: Example
    context: Context | VideoError

    def __str__(self) -> str:
        return f"{self.file}, record {self.example.number}"


def _list_records(inputs: Inputs, unusable: list[VideoError]) -> dict[str, list[_Record]]:
    """Lists the records of each split, in the order of the files; appends files that end early to `unusable`."""
    files = [(split, file) for split, pattern in inputs.lists.items() for file in _files(split, pattern)]
    records: dict[str, list[_Record]] = {split: [] for split in inputs.lists}
    with ThreadPoolExecutor(_THREADS) as threads:
        listings = threads.map(list_examples, [file for _, file in files])
        bar = tqdm(listings, total=len(files), unit="file", desc="reading labels", disable=None, leave=False)
        for (split, file), listing in zip(files, bar, strict=True):
            records[split] += [_Record(split, file, *found) for found in listing.records]
            unusable += [listing.error] if listing.error is not None else []
    return records


def _files(split: str, pattern: Path) -> list[Path]:
    found = sorted(file for file in pattern.parent.glob(pattern.name or "*") if file.suffix != ".frames")
    require(bool(found), f"--lists={split}", "be a TFRecord file, or a pattern that matches some", str(pattern))
    return found


class _Videos:
    """Makes videos of records; collects the unusable ones."""

    def __init__(self, classes: Sequence[str], frame_rate: float | None) -> None:
        self.classes, self.frame_rate = tuple(classes), frame_rate
        self.unusable: list[VideoError] = []
        self._seen: dict[str, _Record] = {}  # by media id

    def of(self, records: Iterable[_Record]) -> Iterator[Video]:
        """Yields the usable records as videos."""
        for record in records:
            found = self._video(record)
            if isinstance(found, VideoError):
                self.unusable.append(found)
            elif (first := self._seen.setdefault(found.media_id, record)) is record:
                yield found
            else:
                number, reason = record.example.number, f"the name and the times of {first}"
                self.unusable.append(VideoError(record.file, f"has a record {number} that repeats {reason}"))

    def _video(self, record: _Record) -> Video | VideoError:
        context, example = record.context, record.example
        if isinstance(context, VideoError):
            return context
        if context.labels is None:
            return VideoError(record.file, f"has a record {example.number} without {LABELS}")
        if _UNLABELLED in context.labels:
            return VideoError(record.file, f"has a record {example.number} with the label {_UNLABELLED}")
        rate = context.frame_rate or self.frame_rate
        try:
            self._check_labels(record, context.labels, context.label_names)
            if rate is None:
                raise UserError(f"--frame_rate must be given: {record} states no {RATE}")
            check_frame_rate(rate, f"{record}: {RATE}")
            start, end = _segment(record, context)
        except UserError:
            if is_intact(record.file, example):
                raise
            return VideoError(record.file, f"has a damaged record {example.number}: its checksum differs")
        name = context.name[:_LONGEST_NAME] or f"{record.split}/{record.file.name}:{example.number}"
        labels = tuple(self.classes[label] for label in dict.fromkeys(context.labels))
        example = example._replace(labels=context.labels)
        return Video(record.file, name, labels, start, end, frame_rate=rate, example=example)

    def _check_labels(self, record: _Record, labels: Sequence[int], names: Sequence[str]) -> None:
        last = len(self.classes) - 1
        for label in labels:
            require(0 <= label <= last, f"{record}: {LABELS}", f"be in 0..{last}, as in --classes", label)
        for label, stated in zip(labels, names if len(names) == len(labels) else ()):
            rule = f"be that of class {label} in --classes, {self.classes[label]!r}"
            require(plain(stated) == plain(self.classes[label]), f"{record}: the name of its label", rule, stated)


def _segment(record: _Record, context: Context) -> tuple[float, float | None]:
    """Returns the seconds of the video at which the record starts and ends."""
    if context.start is None or context.end is None:
        return 0.0, None
    start, end = context.start / 1e6, context.end / 1e6
    require(0 <= start < end <= MAX_SECONDS, f"{record}: clip/start/timestamp", "be before clip/end/timestamp", start)
    return start, end

"""The data set `sequence_examples`: videos in TFRecord files that other tools wrote, such as Model Garden's.

Imports no TensorFlow until the files are read.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from x3d_tf.data.building.listed import plain
from x3d_tf.data.building.sequence_examples import LABELS, RATE, Context, Example, read_contexts
from x3d_tf.data.building.sources import Sources, Video, shuffle_by_hash
from x3d_tf.data.class_lists import read_classes
from x3d_tf.data.datasets.base import Inputs
from x3d_tf.data.video.decode import VideoError
from x3d_tf.errors import UserError, require
from x3d_tf.startup import starting_tensorflow

_LONGEST_NAME = 1000  # characters
_FASTEST = 1000.0  # frames per second


class SequenceExamples:
    """Videos in SequenceExamples, each of which has one class, or any number of them."""

    name = "sequence_examples"
    requires = ("lists", "classes")
    accepts = ("frame_rate",)
    flips = True

    def sources(self, inputs: Inputs) -> Sources:
        """Returns the records of the files. Each list is a TFRecord file, or a pattern such as `shards/train-*`.

        Records are named by their `clip/media_id`, or else by file and number. Records that state no frame rate have
        that of the inputs. The task is multi-label if any record has no label or several.

        Raises:
            UserError: a pattern matches no file; a label is not in the class list, or has another name there; or a
                record states no frame rate and none is given.
        """
        classes = read_classes(inputs.path("classes"))
        rate = inputs.frame_rate
        require(rate is None or 0 < rate <= _FASTEST, "frame_rate", f"be above 0 and at most {_FASTEST:g}", rate)
        unusable: list[VideoError] = []
        splits: dict[str, list[Video]] = {}
        names: set[str] = set()
        with starting_tensorflow(devices=False):
            import tensorflow as tf  # noqa: F401
        for split, pattern in inputs.lists.items():
            videos = [_video(found, names, classes, rate) for found in _records(split, pattern, unusable)]
            splits[split] = shuffle_by_hash([video for video in videos if isinstance(video, Video)], inputs.seed)
            unusable += [video for video in videos if isinstance(video, VideoError)]
        counts = {len(video.classes) for videos in splits.values() for video in videos}
        return Sources(splits, unusable, classes, "multi_label" if counts - {1} else "single_label")


DATASETS = (SequenceExamples(),)


class _Found(NamedTuple):
    """A record: its file, its number in it, its position and its metadata."""

    file: Path
    number: int
    example: Example
    context: Context


def _records(split: str, pattern: Path, unusable: list[VideoError]) -> Iterator[_Found]:
    """Yields the records of the files of a pattern; appends damaged files to `unusable`."""
    files = sorted(pattern.parent.glob(pattern.name)) if pattern.name else []
    require(bool(files), f"--lists={split}", "be a TFRecord file, or a pattern that matches some", str(pattern))
    for file in files:
        try:
            for number, (example, context) in enumerate(read_contexts(file)):
                yield _Found(file, number, example, context)
        except VideoError as error:
            unusable.append(error)


def _video(found: _Found, names: set[str], classes: Sequence[str], rate: float | None) -> Video | VideoError:
    """Returns a record as a video; adds its name to `names`."""
    file, number, example, context = found
    where = f"{file}, record {number}"
    if context.labels is None:
        return VideoError(file, f"has no {LABELS} in record {number}")
    for index, label in enumerate(context.labels):
        require(0 <= label < len(classes), f"{where}: {LABELS}", f"be in 0..{len(classes) - 1}, as in --classes", label)
        stated = context.label_names[index] if len(context.label_names) == len(context.labels) else classes[label]
        rule = f"be that of class {label} in --classes, {classes[label]!r}"
        require(plain(stated) == plain(classes[label]), f"{where}: the name of its label", rule, stated)
    fps = rate if context.frame_rate is None else context.frame_rate
    if fps is None:
        raise UserError(f"--frame_rate must be given: {where} states no {RATE}")
    if not 0 < fps <= _FASTEST:
        return VideoError(file, f"has a frame rate of {fps:g} in record {number}")
    name = context.name
    if not name or name in names or len(name) > _LONGEST_NAME:
        name = f"{file.name}:{number}"
    names.add(name)
    labels = tuple(classes[label] for label in dict.fromkeys(context.labels))
    return Video(file, name, labels, frame_rate=fps, example=example)

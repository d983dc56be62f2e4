"""What a served model can be asked: the signatures of a SavedModel, as graphs of stock TensorFlow operations.

Those of classifiers take any number of clips N and give

- `probabilities`: float32 (N, classes),
- `top_classes`: names of the most probable classes, highest first, strings (N, 5), or as many as there are classes,
- `top_probabilities`: theirs, float32 (N, 5).
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import tensorflow as tf

from x3d_tf.data import transforms
from x3d_tf.data.records.format import MAX_PIXELS
from x3d_tf.modeling.folded import deployed
from x3d_tf.parallel import map_clips_in_parallel
from x3d_tf.types import ViewSpec

from .models import Source

TOP = 5
MAX_ELONGATION = 16  # of a frame's sides: more, and scaling the short side up would make a huge picture of a small one
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"  # how files begin
_DECODING = 8  # frames at a time
_CHAINS = 8  # clips at a time on a CPU, one a core: more than a machine has cores cost it 3 %

Device = Literal["cpu", "gpu"]
Answer = dict[str, tf.Tensor]


class _Served(tf.Module):
    """A network, and what its SavedModel holds besides."""

    def __init__(self, source: Source, labels: Path, device: Device) -> None:
        super().__init__()
        network = deployed(source.model, batch=1 if device == "cpu" else None)
        answers = functools.partial(network, training=False)
        self.batches = map_clips_in_parallel(answers, _CHAINS) if device == "cpu" else answers
        self.labels = tf.saved_model.Asset(str(labels))
        self.weights = [variable.value for variable in network.variables]  # a SavedModel holds what its module does


class Signatures(_Served):
    """The network, what goes before it and what comes after it.

    Attributes:
        serving_default: `clips`, uint8 (N, T, S, S, 3), RGB.
        float_clips: `clips`, float32 (N, T, S, S, 3), RGB in 0..255, neither rounded nor normalised.
        encoded_frames: `frames`, strings (N, T): the bytes of a JPEG or PNG file for each frame, of any sizes. See
            `decoded_clips`.
        labels: the file of the class names, which goes to the SavedModel's assets.
    """

    def __init__(self, source: Source, labels: Path, device: Device = "cpu") -> None:
        """T and S are the network's clip, whose frames are scaled and cropped as in testing.

        What is for CPUs runs the clips of a request side by side; what is for GPUs, as one batch. Both run on either.
        """
        super().__init__(source, labels, device)
        answer = _answering(self.batches, source.class_names)
        frames, views = source.model.clip.frames, source.views
        shape = (None, frames, views.crop, views.crop, 3)

        # What a server feeds has been held against a signature's types but not its shapes: the graph itself does that.
        @tf.function(input_signature=[tf.TensorSpec(shape, tf.uint8, name="clips")])
        def serving_default(clips: tf.Tensor) -> Answer:
            return answer(tf.cast(tf.ensure_shape(clips, shape), tf.float32))

        @tf.function(input_signature=[tf.TensorSpec(shape, tf.float32, name="clips")])
        def float_clips(clips: tf.Tensor) -> Answer:
            finite = tf.debugging.Assert(  # some kernels would take a NaN for an ordinary pixel
                tf.reduce_all(tf.math.is_finite(clips)), ["pixels must be finite numbers"]
            )
            with tf.control_dependencies([finite]):
                return answer(tf.ensure_shape(clips, shape))

        @tf.function(input_signature=[tf.TensorSpec((None, frames), tf.string, name="frames")])
        def encoded_frames(frames: tf.Tensor) -> Answer:
            return answer(decoded_clips(tf.ensure_shape(frames, (None, shape[1])), views))

        self.serving_default, self.float_clips, self.encoded_frames = serving_default, float_clips, encoded_frames

    def by_name(self) -> dict[str, Any]:
        """The signatures, `tf.function`s, as `tf.saved_model.save` takes them."""
        return {name: getattr(self, name) for name in ("serving_default", "float_clips", "encoded_frames")}


class DetectorSignatures(_Served):
    """A detector.

    Attributes:
        detect: `clips`, uint8 (N, T, S, S, 3), RGB, and `boxes`, float32 (N, B, 4): x1, y1, x2, y2 in [0, 1] of the
            clip, to which they are clipped, padded with zeros. Gives `scores`, float32 (N, B, classes) in [0, 1].
        labels: the file of the class names, which goes to the SavedModel's assets.
    """

    def __init__(self, source: Source, labels: Path, device: Device = "cpu") -> None:
        super().__init__(source, labels, device)
        batches, clip = self.batches, source.model.clip
        shape = (None, clip.frames, source.model.eval_size, source.model.eval_size, 3)

        @tf.function(
            input_signature=[
                tf.TensorSpec(shape, tf.uint8, name="clips"),
                tf.TensorSpec((None, None, 4), tf.float32, name="boxes"),
            ]
        )
        def detect(clips: tf.Tensor, boxes: tf.Tensor) -> Answer:
            count = tf.shape(clips)[0]
            checks = [
                tf.debugging.Assert(count > 0, ["there must be a clip, got none"]),
                tf.debugging.Assert(tf.shape(boxes)[0] == count, ["boxes must be of as many clips as there are"]),
                tf.debugging.Assert(tf.reduce_all(tf.math.is_finite(boxes)), ["boxes must be finite numbers"]),
            ]
            with tf.control_dependencies(checks):
                given = {"clip": tf.cast(tf.ensure_shape(clips, shape), tf.float32)}
                return {"scores": batches(given | {"boxes": tf.ensure_shape(boxes, (None, None, 4))})}

        self.detect = detect

    def by_name(self) -> dict[str, Any]:
        """The signatures as `tf.saved_model.save` takes them."""
        return {"detect": self.detect, "serving_default": self.detect}


def _answering(network: Callable[[tf.Tensor], tf.Tensor], class_names: Sequence[str]) -> Callable[[tf.Tensor], Answer]:
    """The function from clips, float32, to what every signature returns."""
    count = min(TOP, len(class_names))

    @tf.function  # one, so that the network is in the file once
    def answer(clips: tf.Tensor) -> Answer:
        with tf.control_dependencies([tf.debugging.Assert(tf.shape(clips)[0] > 0, ["there must be a clip, got none"])]):
            probabilities = network(tf.identity(clips))
        highest, places = tf.math.top_k(probabilities, count)
        names = tf.gather(tf.constant([name.encode() for name in class_names]), places)
        return {"probabilities": probabilities, "top_classes": names, "top_probabilities": highest}

    return answer


def decoded_clips(files: tf.Tensor, views: ViewSpec) -> tf.Tensor:
    """Decodes frames and makes clips of them: scaled and cropped as in testing, each by its own size.

    Grey images become RGB and transparency is dropped. Numbers in messages count from 0.

    Args:
        files: strings [N, T], the bytes of JPEG or PNG files.
        views: `resize`, `stretch` and `crop` are followed.

    Returns:
        [N, T, crop, crop, 3] float32, RGB in 0..255.

    Raises:
        tf.errors.InvalidArgumentError: a file that is no JPEG or PNG, is truncated, or is of too many pixels or too
            elongated, each named by clip and frame; and, without names, what the decoder cannot read.
    """
    length = files.shape[1]
    known = tf.logical_or(_begins(files, _JPEG), _begins(files, _PNG))
    strangers = tf.cast(tf.where(tf.logical_not(known)), tf.int32)
    names = _named(strangers[:, 0], strangers[:, 1])
    checked = tf.debugging.Assert(tf.reduce_all(known), ["neither a JPEG nor a PNG file:", names])
    with tf.control_dependencies([checked]):
        flat = tf.reshape(files, (-1,))

    def frame(file_and_place: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
        file, place = file_and_place
        return _frame(file, _named(place // length, place % length), views)

    with tf.device("cpu"):  # where the clips of records are scaled too
        shape = (views.crop, views.crop, 3)
        frames = tf.map_fn(
            frame,
            (flat, tf.range(tf.size(flat))),
            fn_output_signature=tf.TensorSpec(shape, tf.float32),
            parallel_iterations=_DECODING,
        )
        return tf.reshape(frames, (-1, length, *shape))


def _frame(file: tf.Tensor, name: tf.Tensor, views: ViewSpec) -> tf.Tensor:
    """Decodes one file, scales and crops it: [crop, crop, 3]."""
    is_jpeg = _begins(file, _JPEG)
    whole = tf.cond(is_jpeg, lambda: _ends(file, b"\xff\xd9"), lambda: _ends(file, b"IEND\xaeB`\x82"))
    with tf.control_dependencies([tf.debugging.Assert(whole, ["a frame is truncated:", name])]):
        file = tf.identity(file)
    sides = tf.cond(is_jpeg, lambda: tf.image.extract_jpeg_shape(file)[:2], lambda: _png_sides(file))
    sides = tf.cast(sides, tf.int64)
    few = tf.reduce_prod(sides) <= MAX_PIXELS
    compact = tf.reduce_max(sides) <= MAX_ELONGATION * tf.reduce_min(sides)
    limits = f"a frame is above {MAX_PIXELS} pixels, or one side is above {MAX_ELONGATION} times the other:"
    with tf.control_dependencies([tf.debugging.Assert(few & compact, [limits, name, sides])]):
        file = tf.identity(file)
    pixels = tf.io.decode_jpeg(file, channels=3, dct_method="INTEGER_ACCURATE")  # also decodes PNG
    clip = transforms.resize(pixels[tf.newaxis], views.resize, views.stretch)
    return transforms.crops(clip, views.crop, 1)[0, 0]


def _named(clips: tf.Tensor, frames: tf.Tensor) -> tf.Tensor:
    return tf.strings.join(["clip ", tf.strings.as_string(clips), ", frame ", tf.strings.as_string(frames)])


def _begins(files: tf.Tensor, with_: bytes) -> tf.Tensor:
    return tf.equal(tf.strings.substr(files, 0, len(with_)), with_)


def _ends(file: tf.Tensor, with_: bytes) -> tf.Tensor:
    """Whether a file has its last mark. Some programs put more after it; then it is searched for."""

    def anywhere() -> tf.Tensor:
        content = tf.io.decode_raw(file, tf.uint8)
        places = tf.size(content) - len(with_) + 1
        return tf.reduce_any(tf.reduce_all([content[i : places + i] == value for i, value in enumerate(with_)], axis=0))

    length = tf.strings.length(file)
    at_end = tf.equal(tf.strings.substr(file, tf.maximum(length - len(with_), 0), len(with_)), with_)
    return tf.cond(at_end, lambda: True, anywhere)


def _png_sides(file: tf.Tensor) -> tf.Tensor:
    """Width and height, which follow the beginning that every PNG file has, int32 [2]."""
    return tf.io.decode_raw(tf.strings.substr(file, len(_PNG), 8), tf.int32, little_endian=False)

"""Signatures of a SavedModel, as graphs of stock TensorFlow operations.

The signatures of a classifier accept any batch size N and return

- `probabilities`: float32 (N, classes),
- `top_classes`: names of the 5 most probable classes (or of all, if there are fewer), highest first, strings (N, 5),
- `top_probabilities`: the probabilities of `top_classes`, float32 (N, 5).
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorflow as tf

from x3d_tf.data import transforms
from x3d_tf.data.records.format import MAX_PIXELS
from x3d_tf.data.video.decode import encode_jpeg
from x3d_tf.modeling.folded import fold
from x3d_tf.parallel import map_clips_in_parallel
from x3d_tf.types import ViewSpec

from .models import ExportableModel

TOP = 5
_GREY = 114  # pixel value of warm-up clips: the mean that the network subtracts
MAX_ASPECT_RATIO = 16  # scaling up the short side of a longer frame would take too much memory
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"  # first bytes of the files
_PARALLEL_FRAMES = 8  # decoded at the same time
_PARALLEL_CLIPS = 8  # processed at the same time on a CPU, one per core; exceeding the number of cores costs 3 %

Device = Literal["cpu", "gpu"]
Outputs = dict[str, tf.Tensor]


class ServedNetwork(tf.Module):
    """Base class of the signatures: holds the network, its weights and the file of class names."""

    def __init__(self, source: ExportableModel, labels: Path, device: Device) -> None:
        super().__init__()
        network = fold(source.model, batch=1 if device == "cpu" else None)
        infer = functools.partial(network, training=False)
        self.infer = map_clips_in_parallel(infer, _PARALLEL_CLIPS) if device == "cpu" else infer
        self._shape = (None, source.model.clip.frames, source.views.crop, source.views.crop, 3)
        self.labels = tf.saved_model.Asset(str(labels))
        self.weights = [variable.value for variable in network.variables]  # a SavedModel stores the module's attributes

    def by_name(self) -> dict[str, Any]:
        """Returns the signatures by name, as expected by `tf.saved_model.save`."""
        raise NotImplementedError

    def requests(self) -> dict[str, dict[str, Any]]:
        """Returns a request for each signature, by name, with one grey clip: tensors by the names of the inputs."""
        raise NotImplementedError


def signatures_of(source: ExportableModel, labels: Path, device: Device = "cpu") -> ServedNetwork:
    """Returns the signatures that suit the inputs of the network. The arguments are those of `ClassifierSignatures`."""
    kinds = {("clip",): ClassifierSignatures, ("boxes", "clip"): DetectorSignatures}
    return kinds[tuple(sorted(source.inputs))](source, labels, device)


class ClassifierSignatures(ServedNetwork):
    """Signatures of a classifier. T and S are the frames and the side of the network's clip.

    Attributes:
        serving_default: input `clips`, uint8 (N, T, S, S, 3), RGB.
        float_clips: input `clips`, float32 (N, T, S, S, 3), RGB in 0..255, not normalized.
        encoded_frames: input `frames`, strings (N, T): a JPEG or PNG file for each frame, of any size. See
            `decode_clips`.
        labels: file of the class names, stored among the SavedModel's assets.
    """

    def __init__(self, source: ExportableModel, labels: Path, device: Device = "cpu") -> None:
        """Builds the signatures.

        Args:
            source: the model.
            labels: file of the class names.
            device: device to optimize for: "cpu" processes the clips of a request in parallel, "gpu" as one batch. The
                signatures run on both.
        """
        super().__init__(source, labels, device)
        classify = _classify_function(self.infer, source.class_names)
        frames, views = source.model.clip.frames, source.views
        shape = self._shape
        self._resize = views.resize

        # Servers check the types of inputs but not their shapes, so the graph checks the shapes.
        @tf.function(input_signature=[tf.TensorSpec(shape, tf.uint8, name="clips")])
        def serving_default(clips: tf.Tensor) -> Outputs:
            return classify(tf.cast(tf.ensure_shape(clips, shape), tf.float32))

        @tf.function(input_signature=[tf.TensorSpec(shape, tf.float32, name="clips")])
        def float_clips(clips: tf.Tensor) -> Outputs:
            finite = tf.debugging.Assert(  # some kernels treat NaN as an ordinary pixel
                tf.reduce_all(tf.math.is_finite(clips)), ["pixels must be finite numbers"]
            )
            with tf.control_dependencies([finite]):
                return classify(tf.ensure_shape(clips, shape))

        @tf.function(input_signature=[tf.TensorSpec((None, frames), tf.string, name="frames")])
        def encoded_frames(frames: tf.Tensor) -> Outputs:
            return classify(decode_clips(tf.ensure_shape(frames, (None, shape[1])), views))

        self.serving_default, self.float_clips, self.encoded_frames = serving_default, float_clips, encoded_frames

    def by_name(self) -> dict[str, Any]:
        """Returns the signatures by name, as expected by `tf.saved_model.save`."""
        return {name: getattr(self, name) for name in ("serving_default", "float_clips", "encoded_frames")}

    def requests(self) -> dict[str, dict[str, Any]]:
        shape = (1, *self._shape[1:])
        frame = encode_jpeg(np.full((self._resize, self._resize * 4 // 3, 3), _GREY, np.uint8))
        return {  # TensorProto repeats the last value
            "serving_default": {"clips": tf.make_tensor_proto(_GREY, tf.uint8, shape)},
            "float_clips": {"clips": tf.make_tensor_proto(_GREY, tf.float32, shape)},
            "encoded_frames": {"frames": tf.make_tensor_proto(frame, tf.string, shape[:2])},
        }


class DetectorSignatures(ServedNetwork):
    """Signatures of a detector.

    Attributes:
        detect: inputs `clips`, uint8 (N, T, S, S, 3), RGB, and `boxes`, float32 (N, B, 4): x1, y1, x2, y2 relative to
            the clip, clipped to [0, 1] and padded with zeros. Output `scores`, float32 (N, B, classes) in [0, 1].
        labels: file of the class names, stored among the SavedModel's assets.
    """

    def __init__(self, source: ExportableModel, labels: Path, device: Device = "cpu") -> None:
        super().__init__(source, labels, device)
        infer, shape = self.infer, self._shape

        @tf.function(
            input_signature=[
                tf.TensorSpec(shape, tf.uint8, name="clips"),
                tf.TensorSpec((None, None, 4), tf.float32, name="boxes"),
            ]
        )
        def detect(clips: tf.Tensor, boxes: tf.Tensor) -> Outputs:
            count = tf.shape(clips)[0]
            checks = [
                tf.debugging.Assert(count > 0, ["clips must not be empty"]),
                tf.debugging.Assert(tf.shape(boxes)[0] == count, ["boxes must have the batch size of clips"]),
                tf.debugging.Assert(tf.reduce_all(tf.math.is_finite(boxes)), ["boxes must be finite numbers"]),
            ]
            with tf.control_dependencies(checks):
                clips = tf.cast(tf.ensure_shape(clips, shape), tf.float32)
                return {"scores": infer({"clip": clips, "boxes": tf.ensure_shape(boxes, (None, None, 4))})}

        self.detect = detect

    def by_name(self) -> dict[str, Any]:
        """Returns the signatures by name, as expected by `tf.saved_model.save`."""
        return {"detect": self.detect, "serving_default": self.detect}

    def requests(self) -> dict[str, dict[str, Any]]:
        clips = tf.make_tensor_proto(_GREY, tf.uint8, (1, *self._shape[1:]))
        inputs = {"clips": clips, "boxes": tf.make_tensor_proto([[[0.0, 0.0, 1.0, 1.0]]], tf.float32)}
        return {"serving_default": inputs, "detect": inputs}


def _classify_function(
    infer: Callable[[tf.Tensor], tf.Tensor], class_names: Sequence[str]
) -> Callable[[tf.Tensor], Outputs]:
    """Returns the function from float32 clips to the outputs, which all signatures share."""
    count = min(TOP, len(class_names))

    @tf.function  # shared, so that the file contains the network only once
    def classify(clips: tf.Tensor) -> Outputs:
        with tf.control_dependencies([tf.debugging.Assert(tf.shape(clips)[0] > 0, ["clips must not be empty"])]):
            probabilities = infer(tf.identity(clips))
        highest, indices = tf.math.top_k(probabilities, count)
        names = tf.gather(tf.constant([name.encode() for name in class_names]), indices)
        return {"probabilities": probabilities, "top_classes": names, "top_probabilities": highest}

    return classify


def decode_clips(files: tf.Tensor, views: ViewSpec) -> tf.Tensor:
    """Decodes frames, and scales and crops each of them as in evaluation. The frames may differ in size.

    Greyscale images become RGB; transparency is dropped. Clip and frame numbers in error messages start at 0.

    Args:
        files: JPEG or PNG files, strings [N, T].
        views: `resize`, `stretch` and `crop` are used.

    Returns:
        [N, T, crop, crop, 3] float32, RGB in 0..255.

    Raises:
        tf.errors.InvalidArgumentError: a file is neither JPEG nor PNG, is truncated, has too many pixels or an extreme
            aspect ratio (these messages name the clip and the frame), or cannot be decoded.
    """
    length = files.shape[1]
    known = tf.logical_or(_starts_with(files, _JPEG), _starts_with(files, _PNG))
    unknown = tf.cast(tf.where(tf.logical_not(known)), tf.int32)
    names = _frame_name(unknown[:, 0], unknown[:, 1])
    checked = tf.debugging.Assert(tf.reduce_all(known), ["neither a JPEG nor a PNG file:", names])
    with tf.control_dependencies([checked]):
        flat = tf.reshape(files, (-1,))

    def decode(file_and_index: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
        file, index = file_and_index
        return _decode_frame(file, _frame_name(index // length, index % length), views)

    with tf.device("cpu"):  # as when records are evaluated, so that the results are equal
        shape = (views.crop, views.crop, 3)
        frames = tf.map_fn(
            decode,
            (flat, tf.range(tf.size(flat))),
            fn_output_signature=tf.TensorSpec(shape, tf.float32),
            parallel_iterations=_PARALLEL_FRAMES,
        )
        return tf.reshape(frames, (-1, length, *shape))


def _decode_frame(file: tf.Tensor, name: tf.Tensor, views: ViewSpec) -> tf.Tensor:
    """Decodes, scales and crops one file: [crop, crop, 3]."""
    is_jpeg = _starts_with(file, _JPEG)
    complete = tf.cond(is_jpeg, lambda: _has_end(file, b"\xff\xd9"), lambda: _has_end(file, b"IEND\xaeB`\x82"))
    with tf.control_dependencies([tf.debugging.Assert(complete, ["a frame is truncated:", name])]):
        file = tf.identity(file)
    sides = tf.cond(is_jpeg, lambda: tf.image.extract_jpeg_shape(file)[:2], lambda: _png_size(file))
    sides = tf.cast(sides, tf.int64)
    small = tf.reduce_prod(sides) <= MAX_PIXELS
    compact = tf.reduce_max(sides) <= MAX_ASPECT_RATIO * tf.reduce_min(sides)
    limits = f"a frame has more than {MAX_PIXELS} pixels, or one side is more than {MAX_ASPECT_RATIO} times the other:"
    with tf.control_dependencies([tf.debugging.Assert(small & compact, [limits, name, sides])]):
        file = tf.identity(file)
    pixels = tf.io.decode_jpeg(file, channels=3, dct_method="INTEGER_ACCURATE")  # also decodes PNG
    clip = transforms.resize(pixels[tf.newaxis], views.resize, views.stretch)
    return transforms.view_crop(clip, views.crop)[0]


def _frame_name(clips: tf.Tensor, frames: tf.Tensor) -> tf.Tensor:
    return tf.strings.join(["clip ", tf.strings.as_string(clips), ", frame ", tf.strings.as_string(frames)])


def _starts_with(files: tf.Tensor, prefix: bytes) -> tf.Tensor:
    return tf.equal(tf.strings.substr(files, 0, len(prefix)), prefix)


def _has_end(file: tf.Tensor, marker: bytes) -> tf.Tensor:
    """Returns whether a file contains its end marker, which may be followed by data that some programs append."""

    def anywhere() -> tf.Tensor:
        content = tf.io.decode_raw(file, tf.uint8)
        positions = tf.size(content) - len(marker) + 1
        matches = [content[i : positions + i] == value for i, value in enumerate(marker)]
        return tf.reduce_any(tf.reduce_all(matches, axis=0))

    length = tf.strings.length(file)
    at_end = tf.equal(tf.strings.substr(file, tf.maximum(length - len(marker), 0), len(marker)), marker)
    return tf.cond(at_end, lambda: True, anywhere)


def _png_size(file: tf.Tensor) -> tf.Tensor:
    """Reads the width and the height of a PNG file from its header, int32 [2]."""
    return tf.io.decode_raw(tf.strings.substr(file, len(_PNG), 8), tf.int32, little_endian=False)

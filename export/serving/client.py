"""Classifies video files with a served model, by gRPC or REST, and prints the most probable classes.

  python -m export.serving.client --card=serving/mine/1/model_card.json --grpc=localhost:8500 party.mp4
  python -m export.serving.client --card=serving/mine/1/model_card.json --rest=http://localhost:8501 party.mp4

The model card, found in the folder of every version, defines which frames to send. Clips are sampled as in evaluation,
and each request sends the frames of one clip as JPEG files, compressed like those that the model was trained on: 13
frames of 256 x 340 pixels take a few hundred kilobytes. Raw pixels would exceed the default 4 MB limit of gRPC for
larger networks, and numbers in JSON are slow to parse. If the card states no JPEG quality, because the model was not
trained on stored frames, frames are sent as lossless PNG files, which are four to six times larger. The prediction for
a video is the mean over its clips (--views), or the maximum for each class if the card says so.

gRPC requires `pip install 'x3d_tf[serving]'`; REST requires no further package and uses the proxies of the environment
(http_proxy, https_proxy, no_proxy). The server is not trusted: responses are limited in time (--timeout) and to 4 MB,
they must be probabilities for the card's classes, and redirects are not followed.
"""

import base64
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args
from urllib.parse import quote

import numpy as np
from absl import flags
from numpy.typing import NDArray
from PIL import Image

from x3d_tf import commands
from x3d_tf.data.sampling import decoded_short_side, view_indices
from x3d_tf.data.video.clip_reader import VideoClips
from x3d_tf.data.video.decode import Pixels, VideoError, encode_jpeg
from x3d_tf.errors import UserError, first_few, require
from x3d_tf.files import SMALL, read_limited
from x3d_tf.modeling.expansion import MAX_FRAMES, MAX_STRIDE
from x3d_tf.startup import starting_tensorflow
from x3d_tf.terminal import one_line
from x3d_tf.text import counted
from x3d_tf.types import MAX_VIEWS, ClipSpec, Combine, FrameSampling, Storage, stored_from_json

from . import rest

FLAGS = flags.FLAGS

SIGNATURE = "encoded_frames"
_PARALLEL_REQUESTS = 4
_TOP = 5
_DAY = 86400  # seconds
_MAX_RESIZE = 4096  # pixels, accepted from a card
_ROUNDING = 1e-5  # tolerance above 1 for float32 probabilities

Classifier = Callable[[Sequence[bytes]], NDArray[np.float32]]  # files of the frames of a clip -> probabilities


@dataclass(frozen=True)
class Contract:
    """Input and output of a model, read from its card.

    Attributes:
        clip: number of frames, stride and size of a clip.
        frame_sampling: see `x3d_tf.data.sampling.frame_indices`.
        resize: short side in pixels to which the server scales frames.
        stored: storage format of the training frames; None if they were not stored.
        views: number of clips per video.
        classes: names of the outputs.
        combine: how the probabilities of the clips are combined, "mean" or "max".
    """

    clip: ClipSpec
    frame_sampling: FrameSampling
    resize: int
    stored: Storage | None
    views: int
    classes: tuple[str, ...]
    combine: Combine = "mean"

    @classmethod
    def read(cls, path: Path) -> "Contract":
        """Reads a model card.

        Raises:
            UserError: the file does not exist, or is not a valid model card.
        """
        try:
            card = json.loads(read_limited(path, SMALL))
            entries = card["input"]
            sampling, resize, classes = entries["frame_sampling"], entries["resize"], card["classes"]
            stored, views, combine = stored_from_json(entries["stored"]), entries["clips"], entries["combine"]
            clip = ClipSpec(entries["frames"], entries["stride"], entries["crop"])
            require(clip.frames <= MAX_FRAMES, "frames", f"be at most {MAX_FRAMES}", clip.frames)
            require(clip.stride <= MAX_STRIDE, "stride", f"be at most {MAX_STRIDE} source frames", clip.stride)
            ok = type(resize) is int and clip.size <= resize <= _MAX_RESIZE
            require(ok, "resize", f"be a whole number from {clip.size} (the crop) to {_MAX_RESIZE}", resize)
            require(
                sampling in get_args(FrameSampling),
                "frame_sampling",
                f"be one of {', '.join(get_args(FrameSampling))}",
                sampling,
            )
            ok = type(views) is int and 1 <= views <= MAX_VIEWS
            require(ok, "clips", f"be a whole number from 1 to {MAX_VIEWS}", views)
            require(combine in get_args(Combine), "combine", f"be one of {', '.join(get_args(Combine))}", combine)
            ok = isinstance(classes, list) and bool(classes) and all(isinstance(name, str) for name in classes)
            require(ok, "classes", "be a list of names", classes)
            return cls(clip, sampling, resize, stored, views, tuple(classes), combine)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            reason = rest.one_line(f"{type(error).__name__}: {error}")
            raise UserError(f"{path} is not a valid model_card.json: {reason}") from error


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("card", None, "Path to model_card.json of the served version.", required=True)
    flags.DEFINE_string("grpc", None, "gRPC address of the server, HOST:PORT.")
    flags.DEFINE_string("rest", None, "REST address of the server, http://HOST:PORT.")
    flags.DEFINE_string(
        "model",
        None,
        "Name of the model on the server. Defaults to the name of the served model's folder, two levels above --card.",
    )
    flags.DEFINE_integer(
        "views", None, "Number of clips per video. Defaults to the card's.", lower_bound=1, upper_bound=MAX_VIEWS
    )
    flags.DEFINE_float("timeout", 60.0, "Timeout of each request in seconds. Defaults to 60.")


def main(videos: list[str]) -> None:
    """Runs the command."""
    require(bool(videos), "the command line", "name at least one video file")
    require((FLAGS.grpc is None) != (FLAGS.rest is None), "the server", "be set by either --grpc or --rest")
    if not any(Path(video).exists() for video in videos):
        raise UserError(f"no such file: {first_few(videos)}")
    require(0 < FLAGS.timeout <= _DAY, "--timeout", f"be above 0 and at most {_DAY} seconds", FLAGS.timeout)
    path = Path(FLAGS.card)
    contract = Contract.read(path)
    model = FLAGS.model or path.resolve().parents[1].name
    classify = (grpc_classifier if FLAGS.grpc else rest_classifier)(FLAGS.grpc or FLAGS.rest, model, FLAGS.timeout)
    failures = 0
    for video in videos:
        try:
            clips = encoded_clips(Path(video), contract, FLAGS.views)
        except VideoError as error:
            print(one_line(f"error: {error}"), file=sys.stderr)
            failures += 1
            continue
        print("\n".join([one_line(video), *top_lines(predict(clips, classify, contract), contract.classes)]))
    if failures:
        sys.exit(f"{failures} of {counted(len(videos), 'file')} could not be read")


def encoded_clips(path: Path, contract: Contract, views: int | None = None) -> list[list[bytes]]:
    """Samples the evaluation clips of a video and encodes the T frames of each as image files.

    Frames are JPEG files of the quality of the training records, or lossless PNG files if the model was not trained on
    records. Only the frames of the clips are encoded.

    Args:
        path: video file.
        contract: input and output of the model.
        views: number of clips, K. Defaults to the contract's.

    Raises:
        VideoError: the file is not a video, or is damaged.
    """

    def frame_indices_of(frames: int, fps: float) -> NDArray[np.int64]:
        return view_indices(frames, fps, contract.clip, views or contract.views, contract.frame_sampling)

    def encode(pixels: Pixels) -> bytes:
        return _png(pixels) if contract.stored is None else encode_jpeg(pixels, contract.stored.jpeg_quality)

    video = VideoClips(path, frame_indices_of, decoded_short_side(contract.stored, contract.resize), encode)
    frames_by_indices = {cut.numbers: cut.frames for cut in video}
    return [frames_by_indices[numbers] for numbers in video.chosen]


def _png(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)  # higher levels are slow and save little
    return buffer.getvalue()


def predict(clips: Sequence[Sequence[bytes]], classify: Classifier, contract: Contract) -> NDArray[np.float32]:
    """Returns the combined probabilities of a video's clips, sent in parallel requests that the server can batch.

    Args:
        clips: encoded frames of each clip, from `encoded_clips`.
        classify: from `grpc_classifier` or `rest_classifier`.
        contract: input and output of the model.

    Raises:
        UserError: the server cannot be reached, is too slow, returns an error or an invalid response, or serves a model
            with another number of classes.
    """
    with ThreadPoolExecutor(_PARALLEL_REQUESTS) as pool:
        predictions = list(pool.map(classify, clips))
    count = len(contract.classes)
    for prediction in predictions:
        require(prediction.shape == (count,), "the server's model", f"have the card's {count} classes", len(prediction))
    return np.max(predictions, axis=0) if contract.combine == "max" else np.mean(predictions, axis=0)


def grpc_classifier(address: str, model: str, timeout: float) -> Classifier:
    """Returns a function that sends one clip to `tensorflow.serving.PredictionService`.

    Args:
        address: HOST:PORT of the server.
        model: name of the model.
        timeout: time limit of a complete request in seconds.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # errors are reported here, in one line
    try:
        with starting_tensorflow(devices=False):
            import grpc
            from google.protobuf.message import DecodeError
            from tensorflow import make_tensor_proto
            from tensorflow_serving.apis.predict_pb2 import PredictRequest, PredictResponse
    except ImportError as error:
        raise UserError(f"--grpc requires {error.name}: pip install 'x3d_tf[serving]', or use --rest") from error
    # Without remote service configuration, and without decompression, so that the size limit applies to the response.
    options = {
        "grpc.max_receive_message_length": rest.MAX_RESPONSE,
        "grpc.per_message_decompression": 0,
        "grpc.service_config_disable_resolution": 1,
    }
    channel = grpc.insecure_channel(address, list(options.items()))
    # Responses are parsed here, because grpc logs a traceback for invalid ones.
    call = channel.unary_unary("/tensorflow.serving.PredictionService/Predict", PredictRequest.SerializeToString)

    def classify(frames: Sequence[bytes]) -> NDArray[np.float32]:
        request = PredictRequest(output_filter=["probabilities"])
        request.model_spec.name, request.model_spec.signature_name = model, SIGNATURE
        request.inputs["frames"].CopyFrom(make_tensor_proto([frames]))  # strings (1, T)
        try:
            content = call(request, timeout)
        except grpc.RpcError as error:
            details = rest.one_line(error.details() or "")
            raise UserError(f"{address}, model {model}: {error.code().name}: {details}") from error
        try:
            return _to_probabilities(_row(PredictResponse.FromString(content).outputs["probabilities"]))
        except (DecodeError, ValueError, LookupError, TypeError) as error:
            raise _invalid_response(f"{address}, model {model},", error) from error

    return classify


def rest_classifier(url: str, model: str, timeout: float) -> Classifier:
    """Returns a function that sends one clip to the REST interface, in its row format.

    Args:
        url: http://HOST:PORT of the server.
        model: name of the model.
        timeout: time limit of a complete request in seconds.
    """
    rest.check_address(url)
    address = f"{url.rstrip('/')}/v1/models/{quote(model, safe='')}:predict"

    def classify(frames: Sequence[bytes]) -> NDArray[np.float32]:
        instance = {"frames": [{"b64": base64.b64encode(frame).decode()} for frame in frames]}
        body = json.dumps({"signature_name": SIGNATURE, "instances": [instance]}).encode()
        content = rest.post(address, body, timeout)
        try:
            (row,) = json.loads(content)["predictions"]
            return _to_probabilities(row["probabilities"])
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise _invalid_response(address, error) from error

    return classify


def _row(tensor: Any) -> list[float]:
    """Returns the values of a `tensorflow.TensorProto`; raises ValueError if it is not float32 (1, classes)."""
    from tensorflow.core.framework.types_pb2 import DT_FLOAT

    sizes = [dim.size for dim in tensor.tensor_shape.dim]
    if tensor.dtype != DT_FLOAT or len(sizes) != 2 or sizes[0] != 1:
        raise ValueError(f"probabilities must be float32 (1, classes), got type {tensor.dtype}, shape {sizes[:5]}")
    packed = tensor.tensor_content
    values = np.frombuffer(packed, "<f4").tolist() if packed else list(tensor.float_val)
    if len(values) != sizes[1]:  # TensorProto allows a shape with more elements than values
        raise ValueError(f"probabilities must have {sizes[1]} values, according to their shape, got {len(values)}")
    return values


def _to_probabilities(values: object) -> NDArray[np.float32]:
    """Converts the probabilities of a response to an array; raises ValueError if they are not numbers in 0..1."""
    if not isinstance(values, list):
        raise ValueError("probabilities must be a list")
    for value in values:
        if type(value) not in (int, float) or not 0 <= value <= 1 + _ROUNDING:  # NaN fails, too
            raise ValueError(f"probabilities must be numbers in 0..1, got {str(value)[:50]}")
    return np.array(values, np.float32)


def _invalid_response(server: str, error: Exception) -> UserError:
    reason = rest.one_line(f"{type(error).__name__}: {error}")
    return UserError(f"{server} returned an invalid response: {reason}")


def top_lines(probabilities: NDArray[np.float32], names: Sequence[str]) -> list[str]:
    """Returns one line per class for the most probable classes; ties are sorted by index."""
    order = np.argsort(-probabilities, kind="stable")[:_TOP]
    return [f"  {probabilities[index]:6.1%}  {rest.one_line(names[index])}" for index in order]


if __name__ == "__main__":
    define_flags()
    commands.run(main, positional=True, addresses=("rest",))

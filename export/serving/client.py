"""Asks a served model what happens in video files, by gRPC or by REST, and prints the most probable classes.

  python -m export.serving.client --card=serving/mine/1/model_card.json --grpc=localhost:8500 party.mp4
  python -m export.serving.client --card=serving/mine/1/model_card.json --rest=http://localhost:8501 party.mp4

The model card, which lies in every version's folder, says which frames to send. They are sampled as in testing and sent
as JPEG files like those that the model was trained on, a clip in a request: 13 frames of 256 x 340 pixels take a few
hundred kilobytes. As raw pixels the clips of larger networks pass the 4 MB that a gRPC end accepts by default,
and as numbers in JSON they are slow to read. Where the card says that no frames were stored, they are sent
without loss, as PNG files of four to six times that size. The answer of a video is the mean of its clips' (--views).

gRPC needs `pip install 'x3d_tf[serving]'`; REST needs nothing more, and goes through the proxies of the environment
(http_proxy, https_proxy, no_proxy). The server is not trusted: its answers are limited in time (--timeout) and to 4 MB,
they must be probabilities of the card's classes, and redirects are not followed.
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
from x3d_tf.types import MAX_VIEWS, ClipSpec, FrameSampling, Storage, stored_from_json

from . import rest

FLAGS = flags.FLAGS

SIGNATURE = "encoded_frames"
_REQUESTS = 4  # at a time
_TOP = 5
_DAY = 86400  # seconds
_MAX_SIDE = 4096  # of a card
_ROUNDING = 1e-5  # by which float32 may pass 1

Ask = Callable[[Sequence[bytes]], NDArray[np.float32]]  # JPEG files of a clip's frames -> probabilities


@dataclass(frozen=True)
class Contract:
    """What the client has to know of a model, from its card.

    Attributes:
        clip: frames of a clip and their distance.
        frame_sampling: see `x3d_tf.data.sampling.frame_indices`.
        resize: pixels to which the server scales frames.
        stored: how the frames that it was trained on were stored; None where they were not.
        views: clips of a video.
        classes: names of the outputs.
    """

    clip: ClipSpec
    frame_sampling: FrameSampling
    resize: int
    stored: Storage | None
    views: int
    classes: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> "Contract":
        """Reads a model card.

        Raises:
            UserError: it is missing, or no model card.
        """
        try:
            card = json.loads(read_limited(path, SMALL))
            fed = card["input"]
            sampling, resize, classes = fed["frame_sampling"], fed["resize"], card["classes"]
            stored, views = stored_from_json(fed["stored"]), fed["clips"]
            clip = ClipSpec(fed["frames"], fed["stride"], fed["crop"])
            require(clip.frames <= MAX_FRAMES, "frames", f"be at most {MAX_FRAMES}", clip.frames)
            require(clip.stride <= MAX_STRIDE, "stride", f"be at most {MAX_STRIDE} source frames", clip.stride)
            ok = type(resize) is int and clip.size <= resize <= _MAX_SIDE
            require(ok, "resize", f"be a whole number from {clip.size}, the crop, to {_MAX_SIDE}", resize)
            require(sampling in get_args(FrameSampling), "frame_sampling", "be that of a classifier", sampling)
            ok = type(views) is int and 1 <= views <= MAX_VIEWS
            require(ok, "clips", f"be a whole number from 1 to {MAX_VIEWS}", views)
            ok = isinstance(classes, list) and bool(classes) and all(isinstance(name, str) for name in classes)
            require(ok, "classes", "be a list of names", classes)
            return cls(clip, sampling, resize, stored, views, tuple(classes))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            told = rest.one_line(f"{type(error).__name__}: {error}")
            raise UserError(f"{path} is not the model_card.json of a model's version: {told}") from error


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("card", None, "model_card.json of the version that is served.", required=True)
    flags.DEFINE_string("grpc", None, "The server's gRPC address, HOST:PORT.")
    flags.DEFINE_string("rest", None, "The server's REST address, http://HOST:PORT.")
    flags.DEFINE_string("model", None, "The model's name at the server; its folder's, beside the card, unless given.")
    flags.DEFINE_integer(
        "views", None, "Clips of each video. Defaults to the card's.", lower_bound=1, upper_bound=MAX_VIEWS
    )
    flags.DEFINE_float("timeout", 60.0, "Time limit for each request in all, in seconds. Defaults to 60.")


def main(videos: list[str]) -> None:
    """Asks as the flags say."""
    require(bool(videos), "the command line", "name video files", videos)
    require((FLAGS.grpc is None) != (FLAGS.rest is None), "the server", "be given by --grpc or by --rest", FLAGS.grpc)
    if not any(Path(video).exists() for video in videos):
        raise UserError(f"no such file: {first_few(videos)}")
    require(0 < FLAGS.timeout <= _DAY, "--timeout", f"be above 0 and at most {_DAY} seconds", FLAGS.timeout)
    path = Path(FLAGS.card)
    contract = Contract.read(path)
    model = FLAGS.model or path.resolve().parents[1].name
    ask = (grpc_asker if FLAGS.grpc else rest_asker)(FLAGS.grpc or FLAGS.rest, model, FLAGS.timeout)
    failures = 0
    for video in videos:
        try:
            clips = encoded_clips(Path(video), contract, FLAGS.views)
        except VideoError as error:
            print(one_line(f"error: {error}"), file=sys.stderr)
            failures += 1
            continue
        print("\n".join([one_line(video), *top_lines(predict(clips, ask, contract), contract.classes)]))
    if failures:
        sys.exit(f"{failures} of {counted(len(videos), 'file')} could not be read")


def encoded_clips(path: Path, contract: Contract, views: int | None = None) -> list[list[bytes]]:
    """Clips spread evenly over a video, as testing takes them: files of T frames each.

    Only the frames that are needed are encoded, as the records that the model was trained on hold them: as JPEG files
    of that quality. Where there were no records they are PNG files, which lose nothing.

    Args:
        path: the video.
        contract: the model's.
        views: clips, K. Defaults to the contract's.

    Raises:
        VideoError: the file is no video, or is damaged.
    """

    def clips_of(frames: int, fps: float) -> NDArray[np.int64]:
        return view_indices(frames, fps, contract.clip, views or contract.views, contract.frame_sampling)

    def encode(pixels: Pixels) -> bytes:
        return _png(pixels) if contract.stored is None else encode_jpeg(pixels, contract.stored.jpeg_quality)

    video = VideoClips(path, clips_of, decoded_short_side(contract.stored, contract.resize), encode)
    found = {cut.numbers: cut.frames for cut in video}
    return [found[numbers] for numbers in video.chosen]


def _png(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)  # higher ones take long and save little
    return buffer.getvalue()


def predict(clips: Sequence[Sequence[bytes]], ask: Ask, contract: Contract) -> NDArray[np.float32]:
    """Mean probabilities of a video's clips, which are sent some at a time, so that a server can batch them.

    Raises:
        UserError: the server cannot be reached, is too slow, refuses, answers with something else than probabilities,
            or serves a model of another number of classes.
    """
    with ThreadPoolExecutor(_REQUESTS) as pool:
        answers = list(pool.map(ask, clips))
    count = len(contract.classes)
    for answer in answers:
        require(answer.shape == (count,), "the server's model", f"have the card's {count} classes", len(answer))
    return np.mean(answers, axis=0)


def grpc_asker(address: str, model: str, timeout: float) -> Ask:
    """Asks `tensorflow.serving.PredictionService`; `timeout` is in seconds, for a request in all."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # errors are told here, in one line
    try:
        with starting_tensorflow(devices=False):
            import grpc
            from google.protobuf.message import DecodeError
            from tensorflow import make_tensor_proto
            from tensorflow_serving.apis.predict_pb2 import PredictRequest, PredictResponse
    except ImportError as error:
        raise UserError(f"--grpc needs {error.name}: pip install 'x3d_tf[serving]', or use --rest") from error
    # One address, no service configuration from elsewhere, and no packed answers: sizes are what arrives.
    options = {
        "grpc.max_receive_message_length": rest.MAX_ANSWER,
        "grpc.per_message_decompression": 0,
        "grpc.service_config_disable_resolution": 1,
    }
    channel = grpc.insecure_channel(address, list(options.items()))
    # Answers as bytes: of those that cannot be read grpc itself logs a traceback.
    call = channel.unary_unary("/tensorflow.serving.PredictionService/Predict", PredictRequest.SerializeToString)

    def ask(frames: Sequence[bytes]) -> NDArray[np.float32]:
        request = PredictRequest(output_filter=["probabilities"])
        request.model_spec.name, request.model_spec.signature_name = model, SIGNATURE
        request.inputs["frames"].CopyFrom(make_tensor_proto([frames]))  # strings (1, T)
        try:
            content = call(request, timeout)
        except grpc.RpcError as error:
            told = rest.one_line(error.details() or "")
            raise UserError(f"{address}, model {model}: {error.code().name}: {told}") from error
        try:
            return _checked(_row(PredictResponse.FromString(content).outputs["probabilities"]))
        except (DecodeError, ValueError, LookupError, TypeError) as error:
            raise _no_predictions(f"{address}, model {model},", error) from error

    return ask


def rest_asker(url: str, model: str, timeout: float) -> Ask:
    """Asks the REST interface, in its row format; `timeout` is in seconds, for a request in all."""
    rest.check_address(url)
    address = f"{url.rstrip('/')}/v1/models/{quote(model, safe='')}:predict"

    def ask(frames: Sequence[bytes]) -> NDArray[np.float32]:
        instance = {"frames": [{"b64": base64.b64encode(frame).decode()} for frame in frames]}
        body = json.dumps({"signature_name": SIGNATURE, "instances": [instance]}).encode()
        content = rest.post(address, body, timeout)
        try:
            (row,) = json.loads(content)["predictions"]
            return _checked(row["probabilities"])
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise _no_predictions(address, error) from error

    return ask


def _row(tensor: Any) -> list[float]:
    """The values of a `tensorflow.TensorProto`; raises ValueError unless it is float32 (1, classes)."""
    from tensorflow.core.framework.types_pb2 import DT_FLOAT

    sizes = [dim.size for dim in tensor.tensor_shape.dim]
    if tensor.dtype != DT_FLOAT or len(sizes) != 2 or sizes[0] != 1:
        raise ValueError(f"probabilities are not float32 (1, classes) but of type {tensor.dtype}, {sizes[:5]}")
    packed = tensor.tensor_content
    values = np.frombuffer(packed, "<f4").tolist() if packed else list(tensor.float_val)
    if len(values) != sizes[1]:  # a few bytes can promise any number of values
        raise ValueError(f"probabilities are {len(values)}, not {sizes[1]} as their shape says")
    return values


def _checked(values: object) -> NDArray[np.float32]:
    """An answer's probabilities of the classes; raises ValueError unless they are numbers in 0..1."""
    if not isinstance(values, list):
        raise ValueError("probabilities are no list")
    for value in values:
        if type(value) not in (int, float) or not 0 <= value <= 1 + _ROUNDING:  # also of NaN
            raise ValueError(f"probabilities must be numbers in 0..1, got {str(value)[:50]}")
    return np.array(values, np.float32)


def _no_predictions(server: str, error: Exception) -> UserError:
    told = rest.one_line(f"{type(error).__name__}: {error}")
    return UserError(f"{server} answers with something else than predictions: {told}")


def top_lines(probabilities: NDArray[np.float32], names: Sequence[str]) -> list[str]:
    """The most probable classes, a line each; of equal ones the lower comes first."""
    order = np.argsort(-probabilities, kind="stable")[:_TOP]
    return [f"  {probabilities[index]:6.1%}  {rest.one_line(names[index])}" for index in order]


if __name__ == "__main__":
    define_flags()
    commands.run(main, positional=True)

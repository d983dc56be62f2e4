"""Asks a served model what happens in video files, by gRPC or by REST, and prints the most probable classes.

  python -m export.serving.client --card=serving/mine/1/model_card.json --grpc=localhost:8500 party.mp4
  python -m export.serving.client --card=serving/mine/1/model_card.json --rest=http://localhost:8501 party.mp4

The model card, which lies in every version's folder, says which frames to send. They are sampled as in testing and sent
as JPEG files, a clip in a request: 13 frames of 256 x 340 pixels take a few hundred kilobytes. As raw pixels the clips
of larger networks pass the 4 MB that a gRPC end accepts unless told otherwise, and as numbers in JSON they are slow to
read. The answer of a video is the mean of its clips' (--views).

gRPC needs `pip install tensorflow-serving-api`; REST needs nothing more.
"""

import base64
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from absl import flags
from numpy.typing import NDArray

from x3d_tf import _command
from x3d_tf._checks import UserError, require
from x3d_tf._terminal import one_line
from x3d_tf.data.clips import FrameSampling, frame_indices, view_starts
from x3d_tf.data.video import VideoError, encode_jpeg, probe, read_frames
from x3d_tf.modeling.expansion import ClipSpec

FLAGS = flags.FLAGS

SIGNATURE = "encoded_frames"
_SHORT_SIDE = 256  # pixels, of the frames of records
_REQUESTS = 4  # at a time
_TOP = 5

Ask = Callable[[Sequence[bytes]], NDArray[np.float32]]  # JPEG files of a clip's frames -> probabilities


@dataclass(frozen=True)
class Contract:
    """What the client has to know of a model, from its card.

    Attributes:
        clip: frames of a clip and their distance.
        frame_sampling: see `x3d_tf.data.clips.frame_indices`.
        resize: pixels to which the server scales frames.
        classes: names of the outputs.
    """

    clip: ClipSpec
    frame_sampling: FrameSampling
    resize: int
    classes: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> "Contract":
        """Reads a model card.

        Raises:
            UserError: it is missing, or no model card.
        """
        try:
            card = json.loads(path.read_text(encoding="utf-8"))
            fed = card["input"]
            clip = ClipSpec(fed["frames"], fed["stride"], fed["crop"])
            return cls(clip, fed["frame_sampling"], fed["resize"], tuple(card["classes"]))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not the model_card.json of a model's version: {error!r}") from error


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("card", None, "model_card.json of the version that is served.", required=True)
    flags.DEFINE_string("grpc", None, "The server's gRPC address, HOST:PORT.")
    flags.DEFINE_string("rest", None, "The server's REST address, http://HOST:PORT.")
    flags.DEFINE_string("model", None, "The model's name at the server; its folder's, beside the card, unless given.")
    flags.DEFINE_integer("views", 10, "Clips of each video.", lower_bound=1)
    flags.DEFINE_integer(
        "short_side", None, "Pixels to which larger frames are scaled, as in the records.", lower_bound=1
    )
    flags.DEFINE_float("timeout", 60.0, "Seconds to wait for an answer.")


def main(videos: list[str]) -> None:
    """Asks as the flags say."""
    require(bool(videos), "the command line", "name video files", videos)
    require((FLAGS.grpc is None) != (FLAGS.rest is None), "the server", "be given by --grpc or by --rest", FLAGS.grpc)
    path = Path(FLAGS.card)
    contract = Contract.read(path)
    model = FLAGS.model or path.resolve().parents[1].name
    ask = (grpc_asker if FLAGS.grpc else rest_asker)(FLAGS.grpc or FLAGS.rest, model, FLAGS.timeout)
    failures = 0
    for video in videos:
        try:
            clips = encoded_clips(Path(video), contract, FLAGS.views, FLAGS.short_side)
        except VideoError as error:
            print(one_line(f"error: {error}"), file=sys.stderr)
            failures += 1
            continue
        print("\n".join([one_line(video), *top_lines(predict(clips, ask, contract), contract.classes)]))
    if failures:
        sys.exit(f"{failures} of {len(videos)} files could not be read")


def encoded_clips(path: Path, contract: Contract, views: int, short_side: int | None = None) -> list[list[bytes]]:
    """Clips spread evenly over a video, as testing takes them: JPEG files of T frames each.

    Only the frames that are needed are encoded, as records would hold them.

    Args:
        path: the video.
        contract: the model's.
        views: clips, K.
        short_side: pixels to which larger frames are scaled; 256, or the model's own if that is more, unless given.

    Raises:
        VideoError: the file is no video, or is damaged.
    """
    info = probe(path)
    fps = float(np.float32(info.fps))  # as records store it
    starts = view_starts(info.delivered, fps, contract.clip, views)
    numbers = frame_indices(starts, info.delivered, fps, contract.clip, contract.frame_sampling)
    wanted, files = set(numbers.ravel().tolist()), {}
    for number, frame in enumerate(read_frames(path, short_side or max(_SHORT_SIDE, contract.resize))):
        last = number
        if number in wanted:
            files[number] = encode_jpeg(frame.pixels)
    if last < max(wanted):  # some pictures were lost: the last one stands for those that were to follow
        files[last] = encode_jpeg(frame.pixels)
    return [[files[min(number, last)] for number in clip] for clip in numbers.tolist()]


def predict(clips: Sequence[Sequence[bytes]], ask: Ask, contract: Contract) -> NDArray[np.float32]:
    """Mean probabilities of a video's clips, which are sent some at a time, so that a server can batch them.

    Raises:
        UserError: the server cannot be reached, refuses, or serves a model of another number of classes.
    """
    with ThreadPoolExecutor(_REQUESTS) as pool:
        answers = list(pool.map(ask, clips))
    count = len(contract.classes)
    require(answers[0].shape == (count,), "the server's model", f"have the card's {count} classes", len(answers[0]))
    return np.mean(answers, axis=0)


def grpc_asker(address: str, model: str, timeout: float) -> Ask:
    """Asks `tensorflow.serving.PredictionService`."""
    _command.quiet_tensorflow()
    try:
        import grpc
        from tensorflow import make_ndarray, make_tensor_proto
        from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc
    except ImportError as error:
        raise UserError(f"--grpc needs tensorflow-serving-api ({error}); install it, or use --rest") from error
    stub = prediction_service_pb2_grpc.PredictionServiceStub(grpc.insecure_channel(address))

    def ask(frames: Sequence[bytes]) -> NDArray[np.float32]:
        request = predict_pb2.PredictRequest(output_filter=["probabilities"])
        request.model_spec.name, request.model_spec.signature_name = model, SIGNATURE
        request.inputs["frames"].CopyFrom(make_tensor_proto([frames]))  # strings (1, T)
        try:
            answer = stub.Predict(request, timeout)
        except grpc.RpcError as error:
            raise UserError(f"{address}, model {model}: {error.code().name}: {error.details()}") from error
        return make_ndarray(answer.outputs["probabilities"])[0]

    return ask


def rest_asker(url: str, model: str, timeout: float) -> Ask:
    """Asks the REST interface, in its row format."""
    require(url.startswith(("http://", "https://")), "--rest", "begin with http:// or https://", url)
    address = f"{url.rstrip('/')}/v1/models/{model}:predict"

    def ask(frames: Sequence[bytes]) -> NDArray[np.float32]:
        instance = {"frames": [{"b64": base64.b64encode(frame).decode()} for frame in frames]}
        body = json.dumps({"signature_name": SIGNATURE, "instances": [instance]}).encode()
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return np.array(json.load(response)["predictions"][0]["probabilities"], np.float32)
        except urllib.error.HTTPError as error:
            told = error.read().decode(errors="replace").strip()
            raise UserError(f"{address}: {error.code} {error.reason}: {told}") from error
        except OSError as error:  # not to be reached, or too slow
            raise UserError(f"{address}: {getattr(error, 'reason', error)}") from error
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(f"{address} answers with something else than predictions: {error!r}") from error

    return ask


def top_lines(probabilities: NDArray[np.float32], names: Sequence[str]) -> list[str]:
    """The most probable classes, a line each; of equal ones the lower comes first."""
    order = np.argsort(-probabilities, kind="stable")[:_TOP]
    return [f"  {probabilities[index]:6.1%}  {names[index]}" for index in order]


if __name__ == "__main__":
    define_flags()
    _command.run(main, positional=True)

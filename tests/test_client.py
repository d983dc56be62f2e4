"""The client with servers that run the exported model, and the files of the container image.

The servers replace TF Serving. Its gRPC service is implemented here; its REST interface is implemented by Python's HTTP
server, and by KServe if it is installed.
"""

import base64
import itertools
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from absl import flags
from absl.testing import flagsaver
from exported_model import NAMES, TINY, model_file, opened_model, served_folder
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format, wrappers_pb2
from rest_service import serve
from test_saved_model import clips, encoded, expected, picture
from test_structure import loaded_by
from video_fixtures import write_video
from x3d_tf.export.serving import client

from x3d_tf.data.sampling import frame_indices, view_starts
from x3d_tf.data.video import clip_reader
from x3d_tf.data.video.decode import as_stored, read_frames
from x3d_tf.inference.prediction import Prediction, predict_videos
from x3d_tf.types import Storage

FOLDER = Path(client.__file__).parent
CARD = "model_card.json"


@pytest.fixture(scope="module")
def loaded() -> Any:
    return tf.saved_model.load(str(served_folder()))


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    frames = np.stack([picture(60, 80, number // 3) for number in range(24)])
    return write_video(tmp_path_factory.mktemp("videos") / "clip.mp4", frames)


@pytest.fixture(scope="module")
def grpc_address(loaded: Any) -> Iterator[str]:
    """Address of a PredictionService that is built from TF Serving's generated classes."""
    service = pytest.importorskip("tensorflow_serving.apis.prediction_service_pb2_grpc")
    import grpc
    from tensorflow_serving.apis.predict_pb2 import PredictResponse

    class Service(service.PredictionServiceServicer):
        def Predict(self, request: Any, context: Any) -> Any:
            spec = request.model_spec
            if spec.name != "tiny":
                context.abort(grpc.StatusCode.NOT_FOUND, f"Servable not found for request: Latest({spec.name})")
            inputs = {
                name: tf.io.parse_tensor(tensor.SerializeToString(), tf.as_dtype(tensor.dtype))
                for name, tensor in request.inputs.items()
            }
            try:
                outputs = loaded.signatures[spec.signature_name or "serving_default"](**inputs)
            except tf.errors.InvalidArgumentError as error:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.message)
            response = PredictResponse()
            for name in request.output_filter or outputs:
                response.outputs[name].CopyFrom(tf.make_tensor_proto(outputs[name]))
            return response

    server = grpc.server(ThreadPoolExecutor(2))
    service.add_PredictionServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


@pytest.fixture(scope="module")
def rest_address(loaded: Any) -> Iterator[str]:
    with serve(loaded, "tiny") as address:
        yield address


@pytest.fixture(scope="module")
def kserve_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("kserve")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(__file__).parent / "helpers" / "rest_service.py"
    log = tmp_path_factory.mktemp("kserve") / "log"
    with log.open("w") as file:
        line = [sys.executable, str(program), str(served_folder()), "tiny", str(port)]
        server = subprocess.Popen(line, stdout=file, stderr=file)
    for _ in range(600):
        assert server.poll() is None, log.read_text()[-2000:]
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            break
        except OSError:
            time.sleep(0.2)
    yield f"http://127.0.0.1:{port}"
    server.terminate()
    server.wait()


@pytest.fixture
def run(flags_of_one_command: None) -> Iterator[Any]:
    client.define_flags()
    flags.FLAGS(["client", "--card=unset"])

    def call(*videos: Path, **settings: Any) -> None:
        with flagsaver.flagsaver(**{"card": str(served_folder() / CARD), **settings}):
            client.main([str(video) for video in videos])

    yield call


# ---- The client


@pytest.fixture(scope="module")
def prediction(video: Path) -> Prediction:
    (predicted,) = predict_videos(model_file(), [video], progress=False)
    assert isinstance(predicted, Prediction)
    return predicted


@pytest.mark.parametrize("kind", ["grpc", "rest", "kserve"])
def test_predictions_equal_those_of_predict_videos(
    kind: str,
    run: Any,
    video: Path,
    prediction: Prediction,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    address = request.getfixturevalue(f"{kind}_address")
    run(video, **{"grpc" if kind == "grpc" else "rest": address})
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == str(video)
    shown = {line[10:]: float(line[:8].rstrip("% ")) / 100 for line in lines}
    assert list(shown) == [NAMES[index] for index in prediction.top(5)]
    expected_values = prediction.probabilities[prediction.top(5)]
    np.testing.assert_allclose(list(shown.values()), expected_values, atol=0.0006)  # printed to 0.1 %


@pytest.mark.parametrize("stored", [Storage(48, 80), None], ids=["JPEG", "PNG"])
def test_frames_are_those_of_the_records(video: Path, stored: Storage | None) -> None:
    contract = client.Contract.read(served_folder() / CARD)
    assert (contract.stored, contract.views) == (Storage(48, 80), 3)
    found = client.encoded_clips(video, replace(contract, stored=stored), 2)
    side = 256 if stored is None else 48
    frames = [as_stored(frame.pixels, stored) for frame in read_frames(video, side)]
    starts = view_starts(24, 30.0, TINY.clip, 2)
    for clip, numbers in zip(found, frame_indices(starts, 24, 30.0, TINY.clip), strict=True):
        for file, number in zip(clip, numbers, strict=True):
            pixels = tf.io.decode_jpeg(file, dct_method="INTEGER_ACCURATE")  # decodes PNG files, too
            np.testing.assert_array_equal(pixels, frames[number])


def test_a_truncated_video(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips are sampled from the 20 remaining frames."""
    contract = replace(client.Contract.read(served_folder() / CARD), stored=None)
    frames = [frame.pixels for frame in read_frames(video)][:20]
    monkeypatch.setattr(clip_reader, "read_frames", lambda *a: itertools.islice(read_frames(*a), 20))
    found = client.encoded_clips(video, contract, 2)
    numbers = frame_indices(view_starts(20, 30.0, TINY.clip, 2), 20, 30.0, TINY.clip)
    pixels = [[tf.io.decode_png(file) for file in clip] for clip in found]
    np.testing.assert_array_equal(pixels, np.array(frames)[numbers])


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("stored", {"short_side": 0, "jpeg_quality": 95}, "Storage.short_side must be in 1..65535"),
        ("stored", {"short_side": 10**40, "jpeg_quality": 95}, "fit into 64 bits"),
        ("stored", {"short_side": 96, "jpeg_quality": True}, "Storage.jpeg_quality must be int, got True"),
        ("stored", [96, 95], 'stored must be "none" or have short_side and jpeg_quality'),
        ("clips", 0, "clips must be a whole number from 1 to 1000, got 0"),
        ("clips", 10**9, "clips must be a whole number from 1 to 1000"),
        ("clips", 2.0, "clips must be a whole number from 1 to 1000"),
    ],
)
def test_an_invalid_card_is_refused(tmp_path: Path, entry: str, value: object, message: str) -> None:
    card = json.loads((served_folder() / CARD).read_text("utf-8"))
    (tmp_path / CARD).write_text(json.dumps(card | {"input": card["input"] | {entry: value}}))
    with pytest.raises(ValueError, match=rf"{CARD} is not a valid model_card.json: .*{message}"):
        client.Contract.read(tmp_path / CARD)


@pytest.mark.parametrize("kind", ["grpc", "rest"])
def test_server_errors_are_reported(
    kind: str, run: Any, video: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    address = {kind: request.getfixturevalue(f"{kind}_address")}
    with pytest.raises(ValueError, match=r"(?i)not.found.*Servable not found for request"):
        run(video, model="other", **address)
    card = json.loads((served_folder() / CARD).read_text("utf-8"))
    (tmp_path / CARD).write_text(json.dumps(card | {"input": card["input"] | {"frames": 5}}))
    with pytest.raises(ValueError, match=r"(?s)Shape of tensor frames \[1,5\] is not compatible"):
        run(video, card=str(tmp_path / CARD), model="tiny", **address)
    (tmp_path / CARD).write_text(json.dumps(card | {"classes": ["one", "two"]}))
    with pytest.raises(ValueError, match="the server's model must have the card's 2 classes, got 6"):
        run(video, card=str(tmp_path / CARD), model="tiny", **address)


def test_bad_settings(run: Any, video: Path, tmp_path: Path) -> None:
    (tmp_path / CARD).write_text("{}")
    for settings, message in (
        ({}, "the server must be set by either --grpc or --rest"),
        ({"grpc": "localhost:1", "rest": "http://localhost:1"}, "the server must be set by either --grpc or --rest"),
        ({"rest": "localhost:8501"}, "--rest must begin with http:// or https://"),
        ({"rest": "http://127.0.0.1:1"}, "http://127.0.0.1:1/v1/models/tiny:predict: .*refused"),
        ({"rest": "http://a", "card": str(tmp_path / "missing")}, "missing cannot be read: No such file"),
        ({"rest": "http://a", "card": str(tmp_path / CARD)}, "is not a valid model_card.json"),
    ):
        with pytest.raises(ValueError, match=message):
            run(video, **settings)
    with pytest.raises(ValueError, match="the command line must name at least one video file"):
        run(rest="http://a")


def test_a_server_of_another_kind(run: Any, video: Path) -> None:
    class Greeting(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Greeting) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(ValueError, match="returned an invalid response"):
            run(video, rest=f"http://127.0.0.1:{server.server_address[1]}")
        server.shutdown()


def test_rest_does_not_import_tensorflow() -> None:
    code = "import x3d_tf.export.serving.client, x3d_tf.export.saved_model"
    assert loaded_by(code, "tensorflow", "keras", "grpc") == []


def tensor(*sizes: int, dtype: int = 1, **values: Any) -> bytes:
    """Returns a response whose probabilities are a TensorProto with these fields."""
    from tensorflow.core.framework.tensor_pb2 import TensorProto
    from tensorflow_serving.apis.predict_pb2 import PredictResponse

    found = TensorProto(dtype=dtype, **values)
    for size in sizes:
        found.tensor_shape.dim.add(size=size)
    return PredictResponse(outputs={"probabilities": found}).SerializeToString()


def floats(*values: float) -> bytes:
    return tensor(1, len(values), float_val=values)


@contextmanager
def grpc_serving(answer: Callable[[Any], bytes], **options: Any) -> Iterator[str]:
    """Yields the address of a server that responds to any call with the bytes returned by `answer`."""
    grpc = pytest.importorskip("grpc")

    class Handler(grpc.GenericRpcHandler):
        def service(self, details: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(lambda request, context: answer(context))

    server = grpc.server(ThreadPoolExecutor(1), [Handler()], **options)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


def grpc_error(answer: Callable[[Any], bytes], timeout: float = 20, **options: Any) -> str:
    """Returns the error message, after checking that it is one printable line of limited length."""
    contract = client.Contract(client.ClipSpec(4, 1, 32), "slowfast", 32, None, 1, ("a", "b", "c"))
    with grpc_serving(answer, **options) as address, pytest.raises(ValueError) as caught:
        client.predict([[b"frame"]], client.grpc_classifier(address, "m", timeout), contract)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 800
    return message


def test_invalid_grpc_responses(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorflow_serving")
    for content in (
        *(floats(np.nan, 0, 0), floats(np.inf, 0, 0), floats(-0.1, 1, 0), floats(1.1, 0, 0), b"", b"\xff" * 50),
        *(tensor(1, 3), tensor(), tensor(3, float_val=[0] * 3), tensor(2, 3, float_val=[0] * 6)),
        *(tensor(1, 3, dtype=2, double_val=[0] * 3), tensor(1, 3, dtype=99), tensor(1, 3, float_val=[0])),
        *(tensor(1, 3, dtype=7, string_val=[b""] * 3), tensor(1, 1_000_000), tensor(1, 3, tensor_content=bytes(16))),
        *(tensor(1, -1, float_val=[0]), tensor(1, 1 << 62, float_val=[0]), tensor(1 << 31, 1 << 31, float_val=[0])),
        *(tensor(1, 3, tensor_content=b"abc"), tensor(1, 3, tensor_content=b"\xff" * 12), tensor(*[1] * 300)),
        *(tensor(1, 3, float_val=[0] * 4), tensor(1, 3, dtype=1 + 100, float_val=[0] * 3)),
    ):
        message = grpc_error(lambda _, content=content: content)
        assert "returned an invalid response: " in message, content
    for values in ([], [0.5], [0.5] * 4):
        assert "the server's model must have the card's 3 classes, got" in grpc_error(lambda _, v=values: floats(*v))
    assert "DEADLINE_EXCEEDED" in grpc_error(lambda _: time.sleep(3) or floats(0, 0, 1), timeout=0.4)
    assert "Traceback" not in capfd.readouterr().err  # which grpc logs for invalid responses


@pytest.mark.parametrize("packed", ["NoCompression", "Gzip"])
def test_grpc_responses_that_are_too_large(packed: str) -> None:
    pytest.importorskip("tensorflow_serving")
    import grpc

    sizes = {"compression": getattr(grpc.Compression, packed), "options": [("grpc.max_send_message_length", -1)]}
    message = "RESOURCE_EXHAUSTED" if packed == "NoCompression" else "an invalid response: DecodeError"
    assert message in grpc_error(lambda _: bytes(50_000_000), **sizes)  # compressed responses are not unpacked


def test_grpc_messages_are_escaped() -> None:
    pytest.importorskip("tensorflow_serving")
    import grpc

    def refuses(context: Any) -> bytes:
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "\x1b[31mred\n\x07\u202e" + "a" * 3000)

    assert r"INVALID_ARGUMENT: \x1b[31mred \x07\u202eaaa" in grpc_error(refuses)


def test_a_server_without_grpc() -> None:
    pytest.importorskip("tensorflow_serving")
    for answer in (b"", b"HTTP/1.1 200 OK\r\n\r\n", b"\x00" * 1000):
        with socket.create_server(("127.0.0.1", 0)) as listening:

            def talk(listening: socket.socket = listening, answer: bytes = answer) -> None:
                with suppress(OSError):
                    while True:
                        with listening.accept()[0] as connection:
                            connection.sendall(answer)

            Thread(target=talk, daemon=True).start()
            classify = client.grpc_classifier(f"127.0.0.1:{listening.getsockname()[1]}", "m", 2)
            with pytest.raises(ValueError, match=r"model m: (UNAVAILABLE|DEADLINE_EXCEEDED): ") as caught:
                classify([b""])
            assert str(caught.value).isprintable()
            listening.shutdown(socket.SHUT_RDWR)


def test_an_unreachable_grpc_server(run: Any, video: Path) -> None:
    pytest.importorskip("tensorflow_serving")
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:1, model tiny: UNAVAILABLE"):
        run(video, grpc="127.0.0.1:1")


def test_files_that_are_not_videos(
    run: Any, video: Path, tmp_path: Path, rest_address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(SystemExit, match="1 of 2 files could not be read"):
        run(tmp_path / "text.mp4", video, views=1, rest=rest_address)
    printed = capsys.readouterr()
    assert "text.mp4: cannot be decoded" in printed.err
    assert printed.out.startswith(str(video))


# ---- The interfaces


@pytest.mark.parametrize("kind", ["rest", "kserve"])
@pytest.mark.parametrize("signature", ["serving_default", "float_clips", "encoded_frames"])
def test_rows_and_columns_of_rest(kind: str, signature: str, request: pytest.FixtureRequest, loaded: Any) -> None:
    address = request.getfixturevalue(f"{kind}_address")
    if signature == "encoded_frames":
        files = [encoded(picture(60, 80, number)) for number in range(4)]
        name, values = "frames", [[{"b64": base64.b64encode(file).decode()} for file in files]] * 2
        outputs = loaded.signatures[signature](frames=tf.constant([files, files]))
    else:
        name, values = "clips", clips(2).tolist()
        outputs = loaded.signatures["serving_default"](clips=clips(2))
    names = [[name.decode() for name in row] for row in outputs["top_classes"].numpy()]

    def post(body: dict[str, Any]) -> Any:
        sent = urllib.request.Request(f"{address}/v1/models/tiny:predict", json.dumps(body).encode())
        sent.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(sent) as response:
            return json.load(response)

    columns = post({"signature_name": signature, "inputs": {name: values}})["outputs"]
    rows = post({"signature_name": signature, "instances": [{name: value} for value in values]})["predictions"]
    assert columns["top_classes"] == names == [row["top_classes"] for row in rows]
    for found in (columns["probabilities"], [row["probabilities"] for row in rows]):
        np.testing.assert_allclose(found, outputs["probabilities"], atol=1e-5)


def test_clips_by_grpc(grpc_address: str) -> None:
    import grpc
    from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

    stub = prediction_service_pb2_grpc.PredictionServiceStub(grpc.insecure_channel(grpc_address))
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "tiny"
    request.inputs["clips"].CopyFrom(tf.make_tensor_proto(clips(2)))
    outputs = stub.Predict(request, 60).outputs
    probabilities = expected(opened_model().model, clips(2))
    np.testing.assert_allclose(tf.make_ndarray(outputs["probabilities"]), probabilities, atol=1e-5)
    names = [name.decode() for name in outputs["top_classes"].string_val]
    assert names == np.array(NAMES)[np.argsort(-probabilities, axis=1)[:, :5]].ravel().tolist()
    request.inputs["clips"].CopyFrom(tf.make_tensor_proto(clips(2)[0]))
    with pytest.raises(grpc.RpcError, match="INVALID_ARGUMENT") as caught:
        stub.Predict(request, 60)
    assert re.search(rf"Shape of tensor clips \[4,{TINY.clip.size},", caught.value.details())


# ---- The README


@pytest.mark.parametrize("index", range(5))
def test_the_examples_in_the_readme(
    index: int,
    grpc_address: str,
    rest_address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Runs each Python block with the addresses of the test servers."""
    page, _ = (FOLDER.parent / "README.md").read_text("utf-8").split("\n## TFLite\n")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.M)
    assert len(blocks) == 5
    monkeypatch.chdir(tmp_path)
    for number in range(4):
        (tmp_path / "frames").mkdir(exist_ok=True)
        (tmp_path / "frames" / f"{number}.jpg").write_bytes(encoded(picture(60, 80, number), "JPEG"))
    (tmp_path / "serving" / "mine").mkdir(parents=True)
    (tmp_path / "serving" / "mine" / "1").symlink_to(served_folder())
    code = blocks[index].replace("localhost:8500", grpc_address).replace("http://localhost:8501", rest_address)
    exec(code.replace('= "mine"', '= "tiny"').replace("models/mine", "models/tiny"), {})
    printed = capsys.readouterr().out
    assert "0." in printed or "e-" in printed
    has_names = any(name in printed for name in ("jump", "a,b"))  # five of six classes are printed
    assert has_names == (index < 4)  # the last example prints probabilities only


# ---- The container image


def message_of(fields: dict[str, str | int], **repeated: int) -> Any:
    """Creates a message class; the type of a field is the name of a wrapper type or the number of a scalar type."""
    file = descriptor_pb2.FileDescriptorProto(name=f"{'_'.join(fields)}.proto", package="test", syntax="proto3")
    file.dependency.append(wrappers_pb2.DESCRIPTOR.name)
    message = file.message_type.add(name="Message")
    for number, (name, kind) in enumerate(fields.items(), 1):
        label = message.field.add(name=name, number=number, label=3 if name in repeated else 1)
        if isinstance(kind, str):
            label.type, label.type_name = 11, f".google.protobuf.{kind}"
        else:
            label.type = kind
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(wrappers_pb2.DESCRIPTOR.serialized_pb)
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("test.Message"))


def test_batching_parameters_are_valid() -> None:
    numbers = ("max_batch_size", "batch_timeout_micros", "max_enqueued_batches", "num_batch_threads")
    fields = dict.fromkeys(numbers, "Int64Value") | {"allowed_batch_sizes": 3, "pad_variable_length_inputs": 8}
    message = message_of(fields, allowed_batch_sizes=1)()  # the used fields of BatchingParameters
    text_format.Parse((FOLDER / "batching.config").read_text(), message)
    assert message.allowed_batch_sizes[-1] == message.max_batch_size.value  # required by the server
    assert list(message.allowed_batch_sizes) == sorted(message.allowed_batch_sizes)


def test_the_model_list_is_valid() -> None:
    configs = pytest.importorskip("tensorflow_serving.config.model_server_config_pb2")
    found = text_format.Parse((FOLDER / "models.config").read_text(), configs.ModelServerConfig())
    (model,) = found.model_config_list.config
    assert model.base_path == f"/models/{model.name}"
    assert model.model_platform == "tensorflow"


def test_the_image_contains_all_configuration_files() -> None:
    texts = {path.name: path.read_text() for path in FOLDER.iterdir() if path.is_file()}
    (copied,) = re.findall(r"^COPY (.*) /config/$", texts["Dockerfile"], re.MULTILINE)
    mentioned = {name for text in texts.values() for name in re.findall(r"/config/(\w+\.config)", text)}
    assert mentioned == set(copied.split()) <= set(texts)

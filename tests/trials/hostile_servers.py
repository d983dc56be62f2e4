"""Runs the serving client with hostile and broken servers: errors must be one line, within the time limit.

The client command runs with --timeout=3 and connects to servers in this process: REST, and gRPC if
tensorflow-serving-api is installed. --count random mutants of a valid REST response follow the named responses. Valid
responses must be accepted.

  python tests/trials/hostile_servers.py --count=40 --seed=0
"""

import json
import random
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from harness import Command, Ended, Report, arguments, damaged, make_videos, refused, scratch, succeeded

CLASSES = ["class 0", "class 1"]
TIMEOUT, GRACE = 3, 15.0  # seconds: limit of a request, and additional time for Python and its start
MEGABYTES = 1200
GOOD = json.dumps({"predictions": [{"probabilities": [0.25, 0.75]}]}).encode()
Send = Callable[[Callable[[bytes], Any]], None]


def write_card(path: Path, **changes: Any) -> Path:
    fed = {
        "frames": 4,
        "stride": 1,
        "crop": 32,
        "resize": 36,
        "frame_sampling": "slowfast",
        "clips": 1,
        "combine": "mean",
        "stored": "none",
    }
    card = {"input": {**fed, **changes.pop("input", {})}, "classes": CLASSES, **changes}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(card))
    return path


# ---- REST


def reply(body: bytes, status: str = "200 OK", *headers: str, length: int | None = None) -> Send:
    """Returns a function that sends a response; `length` replaces the true content length."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *headers, "", ""]
    return lambda send: send("\r\n".join(lines).encode("utf-8", "surrogateescape") + body)


def endless(head: bytes, part: bytes, pause: float = 0.0) -> Send:
    """Returns a function that sends a never-ending response, with a pause after each part."""

    def respond(send: Callable[[bytes], Any]) -> None:
        send(head)
        while True:
            send(part)
            time.sleep(pause)

    return respond


def probabilities(values: Any) -> bytes:
    return json.dumps({"predictions": [{"probabilities": values}]}).encode()


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
OPEN = b"HTTP/1.1 200 OK\r\n\r\n"
REST: dict[str, Send] = {
    "NaN": reply(probabilities([float("nan"), 0.5])),
    "infinity": reply(probabilities([float("inf"), 0.5])),
    "above 1": reply(probabilities([1.5, 0.5])),
    "below 0": reply(probabilities([-0.5, 1.5])),
    "too few": reply(probabilities([1.0])),
    "too many": reply(probabilities([0.0] * 100_000)),
    "none": reply(probabilities([])),
    "texts": reply(probabilities(["0.5", "0.5"])),
    "true and false": reply(probabilities([True, False])),
    "null": reply(probabilities(None)),
    "lists": reply(probabilities([[0.5], [0.5]])),
    "an object": reply(probabilities({"a": 0.5})),
    "a number of 100,000 digits": reply(b'{"predictions": [{"probabilities": [' + b"9" * 100_000 + b", 0]}]}"),
    "1e999": reply(b'{"predictions": [{"probabilities": [1e999, 0]}]}'),
    "deep nesting": reply(b"[" * 1_000_000),
    "deep nesting of predictions": reply(b'{"predictions":' + b"[" * 500_000 + b"]" * 500_000 + b"}"),
    "a list": reply(b"[]"),
    "a text": reply(b'"ok"'),
    "no predictions": reply(b"{}"),
    "empty predictions": reply(b'{"predictions": []}'),
    "nothing": reply(b""),
    "not JSON": reply(b"<html>\x1b[2J</html>"),
    "invalid UTF-8": reply(b'{"predictions": "\xff\xfe"}'),
    "cut short": reply(GOOD[:20]),
    "cut short of its length": reply(GOOD, length=10_000),
    "longer than its length": reply(GOOD, length=10),
    "a negative length": reply(GOOD, length=-5),
    "300 MB": endless(b"HTTP/1.1 200 OK\r\nContent-Length: 300000000\r\n\r\n", b" " * 1_000_000),
    "endless": endless(OPEN, b" " * 1_000_000),
    "endless chunks": endless(CHUNKED, b"10000\r\n" + b" " * 65536 + b"\r\n"),
    "endless, a byte a second": endless(OPEN, b" ", 1.0),
    "endless chunks, one a second": endless(CHUNKED, b"1\r\n \r\n", 1.0),
    "endless headers": endless(b"HTTP/1.1 200 OK\r\n", b"a: b\r\n", 0.001),
    "endless header line": endless(b"HTTP/1.1 200 OK\r\na: ", b"b" * 10_000),
    "headers, a byte a second": endless(b"HTTP/1.1 200 OK\r\na: ", b"b", 1.0),
    "continue for ever": endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.001),
    "silence": lambda send: time.sleep(60),
    "not HTTP": lambda send: send(b"SSH-2.0-OpenSSH\x1b]0;title\x07\r\n"),
    "closes": lambda send: None,
    "error page of 100 MB": endless(b"HTTP/1.1 500 Error\r\nContent-Length: 100000000\r\n\r\n", b"x" * 1_000_000),
    "endless error page": endless(b"HTTP/1.1 500 Error\r\n\r\n", b"x" * 1_000_000),
    "error page, a byte a second": endless(b"HTTP/1.1 500 Error\r\n\r\n", b"x", 1.0),
    "error page with escapes": reply(b"\x1b[2J\x1b]0;title\x07\r\nerror: fine\n", "500 Error"),
    "status line with escapes": reply(b"", "500 \x1b[2Jtitle"),
    "status 99": reply(GOOD, "99 Odd"),
    "status 204": reply(b"", "204 No Content"),
    "redirect to a file": reply(b"", "302 Found", "Location: file:///etc/passwd"),
    "redirect to ftp": reply(b"", "302 Found", "Location: ftp://127.0.0.1/x"),
    "redirect to itself": reply(b"", "307 Temporary Redirect", "Location: /v1/models/tiny:predict"),
    "redirect to nothing": reply(b"", "302 Found", "Location: "),
    "redirect with escapes": reply(b"", "302 Found", "Location: http://\x1b[2J"),
    "gzip": reply(b"\x1f\x8b\x08" + b"\0" * 20, "200 OK", "Content-Encoding: gzip"),
    "large response that compresses": reply(b'{"predictions": [' + b"0," * 5_000_000 + b"0]}"),
}


@contextmanager
def rest_server(respond: Send) -> Iterator[str]:
    """Runs a server that reads a request and sends the response; yields its address."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            try:
                head = b""
                while b"\r\n\r\n" not in head and (part := self.request.recv(65536)):
                    head += part
                head, _, body = head.partition(b"\r\n\r\n")
                fields = (line.partition(b":") for line in head.splitlines())
                lengths = [int(value) for name, _, value in fields if name.lower() == b"content-length"]
                while len(body) < sum(lengths) and (part := self.request.recv(65536)):
                    body += part
                respond(self.request.sendall)
            except OSError:
                pass  # the client has disconnected

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads, block_on_close, allow_reuse_address = True, False, True

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def run_client(report: Report, folder: Path, card: Path, *server: str) -> Ended:
    video = next(folder.rglob("*.mp4"))
    words = (f"--card={card}", *server, "--model=tiny", "--views=1", f"--timeout={TIMEOUT}", str(video))
    limits = {"seconds": report.chosen.seconds, "megabytes": MEGABYTES}
    return Command("export.serving.client", *words, folder=folder, **limits).wait()


def try_rest(report: Report, folder: Path, respond: Send, *, right: bool | None = False) -> str | None:
    """Tries one response; `right` is None if the client may accept or reject it."""
    with rest_server(respond) as address:
        ended = run_client(report, folder, folder / "card.json", f"--rest={address}")
    if ended.status == 0 and right is None:
        report.note("mutants that were accepted")
        return None
    return succeeded(ended) if right else refused(ended)


def addresses(report: Report, folder: Path) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """Yields trials with invalid addresses and with addresses without a server."""
    for address in (
        "file:///etc/passwd",
        "http://",
        "http://\x1b[2J",
        "http://127.0.0.1:1",
        "http://127.0.0.1:99999999",
    ):
        yield f"REST address {address!r}", partial(_try_address, report, folder, address)


def _try_address(report: Report, folder: Path, address: str) -> str | None:
    return refused(run_client(report, folder, folder / "card.json", f"--rest={address}"))


def cards(report: Report, folder: Path) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """Yields trials with damaged model cards, among them numbers that would exhaust memory."""
    changes: dict[str, dict[str, Any]] = {
        f"{name} = {value!r}": {"input": {name: value}}
        for name in ("frames", "stride", "crop", "resize")
        for value in (0, -1, 10**9, 10**30, 0.5, float("nan"), "x", None, [4])
    }
    changes |= {"an odd sampling": {"input": {"frame_sampling": "x"}}, "no classes": {"classes": []}}
    changes |= {
        "classes of numbers": {"classes": [1, 2]},
        "classes of one text": {"classes": "ab"},
        "no input": {"input": 5},
    }
    for number, (name, change) in enumerate(changes.items()):
        card = folder / "cards" / f"{number}.json"
        if name == "no input":
            card.parent.mkdir(exist_ok=True, parents=True)
            card.write_text('{"input": 5, "classes": ["a"]}')
        else:
            write_card(card, **change)
        yield f"card: {name}", partial(_try_card, report, folder, card)


def _try_card(report: Report, folder: Path, card: Path) -> str | None:
    """Tries one model card; the client may accept it, because the server sends a valid response."""
    with rest_server(reply(GOOD)) as address:
        ended = run_client(report, folder, card, f"--rest={address}")
    if ended.status == 0:
        report.note("odd cards that were accepted")
        return None
    return refused(ended)


# ---- gRPC


def grpc_responses() -> dict[str, Callable[[Any], Any]]:
    """Returns functions from the context of a call to the response of the service, by name."""
    import grpc
    from tensorflow.core.framework.tensor_pb2 import TensorProto
    from tensorflow_serving.apis.predict_pb2 import PredictResponse

    def tensor(shape: list[int], values: list[float], kind: int = 1, **fields: Any) -> Any:
        proto = TensorProto(dtype=kind, float_val=values, **fields)
        for size in shape:
            proto.tensor_shape.dim.add(size=size)
        response = PredictResponse()
        response.outputs["probabilities"].CopyFrom(proto)
        return response

    def slow(context: Any) -> Any:
        time.sleep(30)
        return PredictResponse()

    return {
        "right": lambda _: tensor([1, 2], [0.25, 0.75]),
        "NaN": lambda _: tensor([1, 2], [float("nan"), 0.5]),
        "above 1": lambda _: tensor([1, 2], [1.5, 0.5]),
        "too many": lambda _: tensor([1, 100_000], [0.0] * 100_000),
        "too few": lambda _: tensor([1, 1], [1.0]),
        "no rows": lambda _: tensor([0, 2], []),
        "a scalar": lambda _: tensor([], [0.5]),
        "one axis": lambda _: tensor([2], [0.25, 0.75]),
        "40 GB of one value": lambda _: tensor([1, 10**10], [0.5]),
        "a negative axis": lambda _: tensor([-1, 2], [0.5, 0.5]),
        "an unknown type": lambda _: tensor([1, 2], [0.5, 0.5], kind=99),
        "texts": lambda _: tensor([1, 2], [], kind=7, string_val=[b"a", b"\x1b[2J"]),
        "integers": lambda _: tensor([1, 2], [], kind=3, int_val=[0, 1]),
        "content that is too short": lambda _: tensor([1, 2], [], tensor_content=b"abc"),
        "no output": lambda _: PredictResponse(),
        "slow": slow,
        "an error with escapes": lambda context: context.abort(grpc.StatusCode.INTERNAL, "\x1b[2J\r\nerror: fine"),
        "an error of 8 kB": lambda context: context.abort(grpc.StatusCode.INTERNAL, "x" * 8000),
        "5 MB": lambda _: tensor([1, 1_250_000], [0.1] * 1_250_000),
        "an internal error": lambda context: 1 / 0,
    }


@contextmanager
def grpc_server(respond: Callable[[Any], Any]) -> Iterator[str]:
    from concurrent.futures import ThreadPoolExecutor

    import grpc
    from tensorflow_serving.apis import prediction_service_pb2_grpc as service

    class Service(service.PredictionServiceServicer):
        def Predict(self, request: Any, context: Any) -> Any:
            return respond(context)

    server = grpc.server(ThreadPoolExecutor(2))
    service.add_PredictionServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


def try_grpc(report: Report, folder: Path, respond: Callable[[Any], Any], right: bool) -> str | None:
    with grpc_server(respond) as address:
        ended = run_client(report, folder, folder / "card.json", f"--grpc={address}")
    return succeeded(ended) if right else refused(ended)


def main() -> None:
    """Runs the trials."""
    report = Report("hostile_servers", arguments(__doc__ or "", count=40, seconds=TIMEOUT + GRACE))
    with scratch() as folder:
        make_videos(folder, 1)
        write_card(folder / "card.json")
        trials = [("REST right", partial(try_rest, report, folder, reply(GOOD), right=True))]
        right = {"a negative length": None}  # the client may accept it, because the content is complete
        trials += [
            (f"REST {name}", partial(try_rest, report, folder, respond, right=right.get(name, False)))
            for name, respond in REST.items()
        ]
        for number in range(report.chosen.count):
            rng = random.Random(f"{report.chosen.seed}/{number}")
            description, body = damaged(GOOD, rng.choice(("flip", "cut")), rng)
            trials.append(
                (f"REST mutant {number}, {description}", partial(try_rest, report, folder, reply(body), right=None))
            )
        report.run([*trials, *addresses(report, folder), *cards(report, folder)])
        try:
            named = grpc_responses()
        except ImportError as error:
            print(f"skipped gRPC: {error}")
        else:
            report.chosen.seconds += 15  # the client imports TensorFlow
            report.run(
                (f"gRPC {name}", partial(try_grpc, report, folder, named[name], name == "right")) for name in named
            )
    report.close()


if __name__ == "__main__":
    main()

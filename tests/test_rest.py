"""The REST client with broken or hostile servers: each gives a one-line error within the time limit."""

import gzip
import json
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from x3d_tf.export.serving import client, rest

from x3d_tf.errors import UserError

Talk = Callable[[socket.socket], Any]

CLASSES = 3
ANSWER = json.dumps({"predictions": [{"probabilities": [0.5, 0.25, 0.25]}]}).encode()
SHORT = 0.4  # seconds: time limit of requests that should time out


@contextmanager
def serving(talk: Talk) -> Iterator[str]:
    """Yields the address of a server that reads a request and then calls `talk`."""

    def answer(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            request = b""
            while b"\r\n\r\n" not in request:
                request += connection.recv(65536)
            head, _, body = request.partition(b"\r\n\r\n")
            missing = int(head.lower().split(b"content-length:")[1].split()[0]) - len(body)
            while missing > 0:
                missing -= len(connection.recv(65536))
            talk(connection)

    def accept() -> None:
        with suppress(OSError):
            while True:
                Thread(target=answer, args=(listening.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)


def sends(body: bytes, status: str = "200 OK", *headers: str, length: int | None = None) -> Talk:
    """Returns a server function that sends a complete response."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *headers]
    return lambda connection: connection.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + body)


def row(probabilities: str) -> Talk:
    return sends(f'{{"predictions": [{{"probabilities": {probabilities}}}]}}'.encode())


def predict(talk: Talk, timeout: float = 20) -> np.ndarray:
    contract = client.Contract(client.ClipSpec(4, 1, 32), "slowfast", 32, None, 1, ("a", "b", "c"))
    with serving(talk) as address:
        return client.predict([[b"frame"]], client.rest_classifier(address, "m", timeout), contract)


def error_of(talk: Talk, timeout: float = 20) -> str:
    """Returns the error message, after checking that it is one printable line of limited length."""
    with pytest.raises(ValueError) as caught:
        predict(talk, timeout)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 800
    return message


def test_a_response() -> None:
    np.testing.assert_array_equal(predict(sends(ANSWER)), [0.5, 0.25, 0.25])


def test_a_chunked_response() -> None:
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (ANSWER[:7], ANSWER[7:])) + b"0\r\n\r\n"
    head = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    np.testing.assert_array_equal(predict(lambda connection: connection.sendall(head + chunks)), [0.5, 0.25, 0.25])


@pytest.mark.parametrize(
    "values",
    [
        *("[NaN, 0, 0]", "[Infinity, 0, 0]", "[-0.1, 0.5, 0.5]", "[1.1, 0, 0]", "[1e999, 0, 0]"),
        *('["0.5", 0, 0]', "[true, 0, 0]", "[null, 0, 0]", "[[0.5], 0, 0]", "[{}, 0, 0]", f"[1{'0' * 400}, 0, 0]"),
        *("0.5", "null", "{}", '"abc"', '{"0": 0.5, "1": 0.5, "2": 0}'),
    ],
)
def test_values_that_are_not_probabilities(values: str) -> None:
    assert "returned an invalid response: ValueError: probabilities" in error_of(row(values))


@pytest.mark.parametrize("values", ["[]", "[1]", "[0.5, 0.5]", "[0.25, 0.25, 0.25, 0.25]"])
def test_another_number_of_classes(values: str) -> None:
    assert "the server's model must have the card's 3 classes, got" in error_of(row(values))


def test_every_response_is_checked() -> None:
    answers = iter([[0.5, 0.25, 0.25], [0.5, 0.5]])
    contract = client.Contract(client.ClipSpec(4, 1, 32), "slowfast", 32, None, 1, ("a", "b", "c"))
    with pytest.raises(ValueError, match="the server's model must have the card's 3 classes, got 2"):
        client.predict([[b""]] * 2, lambda _: np.array(next(answers), np.float32), contract)


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"null", b"[]", b"{}", b'"predictions"', b"1", b"\xff\xfe\xfd", b"<html>", gzip.compress(ANSWER)),
        *(b'{"predictions": %s}' % value for value in (b"1", b"[]", b"{}", b'"a"', b"[1]", b"[[]]", b'["a"]', b"[{}]")),
        *(b"[" * 100_000, b'{"a":' * 100_000, b'{"predictions": ' + b"[" * 1000 + b"]" * 1000 + b"}"),
        *(b'{"predictions": [{"probabilities": [%s]}]}' % (b"9" * 5000), ANSWER[:-5], b'{"predictions": [1, 2]}'),
    ],
    ids=range(24),
)
def test_bodies_that_are_not_predictions(body: bytes) -> None:
    assert "returned an invalid response: " in error_of(sends(body))


def endless(start: bytes, part: bytes, pause: float = 0.0, end: bytes = b"") -> Talk:
    """Returns a server function that sends `part` repeatedly for eight seconds and then completes the response."""

    def talk(connection: socket.socket) -> None:
        connection.sendall(start)
        stop = time.monotonic() + 8
        while time.monotonic() < stop:
            connection.sendall(part)
            time.sleep(pause)
        connection.sendall(end)

    return talk


OK = b"HTTP/1.1 200 OK\r\n"
COMPLETE = OK + b"Content-Length: %d\r\n\r\n" % len(ANSWER) + ANSWER
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "talk",
    [
        endless(b"", b"", 0.1, COMPLETE),
        endless(OK + b"Content-Length: 1000\r\n\r\n", b" ", 0.1, ANSWER),
        endless(OK + b"X-Slow: ", b"a", 0.1, b"\r\nConnection: close\r\n\r\n" + ANSWER),
        endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.0, COMPLETE),
        endless(CHUNKED + b"%x\r\n%s\r\n0\r\n" % (len(ANSWER), ANSWER), b"X-Trailer: a\r\n", 0.0, b"\r\n"),
        endless(CHUNKED, b"1\r\n \r\n", 0.1, b"%x\r\n%s\r\n0\r\n\r\n" % (len(ANSWER), ANSWER)),
        endless(b"HTTP/1.1 500 Sorry\r\n\r\n", b"a", 0.1),
    ],
    ids=["silent", "body", "header", "100 Continue", "trailers", "chunks", "error page"],
)
def test_slow_and_endless_responses(talk: Talk) -> None:
    assert f"no complete response within {SHORT} seconds; increase --timeout" in error_of(talk, SHORT)


def test_a_server_that_does_not_accept() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"no complete response within {SHORT} seconds"):
            client.rest_classifier(address, "m", SHORT)([b"a" * 20_000_000])  # more than the socket buffers hold


def test_a_slow_name_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: object, **__: object) -> list:
        time.sleep(8)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    with pytest.raises(ValueError, match=f"no complete response within {SHORT} seconds"):
        client.rest_classifier("http://localhost:1", "m", SHORT)([b""])


def test_responses_that_are_too_large() -> None:
    large = b" " * (rest.MAX_RESPONSE + 1 - len(ANSWER)) + ANSWER
    assert "the response is larger than the limit of 4194304 bytes" in error_of(sends(large))
    assert "the response is larger than the limit of 4194304 bytes" in error_of(endless(OK + b"\r\n", b" " * 65536))
    np.testing.assert_array_equal(predict(sends(large[1:])), [0.5, 0.25, 0.25])
    page = sends(b"a" * 10_000_000, "500 " + "b" * 60_000)
    assert ": 500 bbb" in error_of(page)


def test_truncated_responses() -> None:
    assert "the response is truncated: 5 of" in error_of(sends(ANSWER, length=len(ANSWER) + 5))
    assert "IncompleteRead" in error_of(lambda connection: connection.sendall(CHUNKED + b"50\r\n" + ANSWER))
    assert "an invalid response" in error_of(sends(ANSWER, length=20))
    for sent in (b"", OK, b"HTTP/1.1 2"):
        error_of(lambda connection, sent=sent: connection.sendall(sent))


def test_a_connection_that_is_reset() -> None:
    def reset(connection: socket.socket) -> None:
        connection.sendall(OK + b"Content-Length: 1000\r\n\r\n")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    assert "reset by peer" in error_of(reset)


@pytest.mark.parametrize(
    "answer",
    [
        *(b"SSH-2.0-server\r\n", b"\x00" * 100, b"HTTP/1.1 abc OK\r\n\r\n", b"HTTP/9.9 200\x1b[2J OK\r\n\r\n"),
        *(b"HTTP/1.1 200 " + b"a" * 100_000, OK + b"a: b\r\n" * 200 + b"\r\n", OK + b"a" * 70_000 + b"\r\n\r\n"),
        *(CHUNKED + b"xyz\r\n", CHUNKED + b"-5\r\nabcdefgh", CHUNKED + b"f" * 300 + b"\r\nab", CHUNKED + b"1" * 70_000),
        *(OK + b"Content-Length: -5\r\n\r\n" + ANSWER, OK + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n" + ANSWER),
        *(b"HTTP/1.1 204 None\r\n\r\n", b"HTTP/1.1 101 Switching\r\n\r\n", b"HTTP/1.1 999 a\r\n\r\n"),
    ],
    ids=range(16),
)
def test_invalid_http(answer: bytes) -> None:
    error_of(lambda connection: connection.sendall(answer))


@pytest.mark.parametrize("status", [300, 301, 302, 303, 307, 308])
@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://127.0.0.1/a", "http://127.0.0.1:1/", "\x1b[2J", ""])
def test_redirects_are_not_followed(status: int, location: str) -> None:
    message = error_of(sends(ANSWER, f"{status} Elsewhere", f"Location: {location}"))
    shown = location.replace("\x1b", "\\x1b")
    assert f"status {status} redirects to {shown}, which is not followed" in message


def test_control_characters_are_escaped() -> None:
    body = '{\n "error": "\x1b[31mred\x07\u202e \ud83d\ude00"\r\n}'.encode("utf-8", "surrogatepass")
    message = error_of(sends(body, "400 Bad\x1b[2J"))
    assert r"400 Bad\x1b[2J: " in message
    assert r'{ "error": "\x1b[31mred\x07\u202e ' in message


@pytest.mark.parametrize("variable", ["http_proxy", "no_proxy"])
def test_proxies_of_the_environment(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proxies are used as the environment says, and are not trusted either."""
    monkeypatch.delenv("HTTP_PROXY", raising=False)
    with serving(sends(b"not ours", "407 Who\x07")) as proxy, serving(sends(ANSWER)) as address:
        monkeypatch.setenv("http_proxy", proxy)
        monkeypatch.setenv("no_proxy", "127.0.0.1" if variable == "no_proxy" else "")
        classify = client.rest_classifier(address, "m", 20)
        if variable == "no_proxy":
            np.testing.assert_array_equal(classify([b""]), [0.5, 0.25, 0.25])
        else:
            with pytest.raises(ValueError, match=r"407 Who\\x07: not ours$"):
                classify([b""])
        monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:1")
        monkeypatch.setenv("no_proxy", "")
        with pytest.raises(ValueError, match="unknown url type: socks5"):
            classify([b""])


@pytest.mark.parametrize(
    "url",
    [
        *(
            "file:///etc/passwd",
            "ftp://a",
            "localhost:8501",
            "",
            "http://",
            "http://:80",
            "http://a:b",
            "http://a:70000",
        ),
        *("http://[::1", "http://a b", "http://a\n", "http://a\x1b", "http://ä", "http://a?b", "http://a#b"),
    ],
)
def test_addresses_that_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="--rest must be") as caught:
        client.rest_classifier(url, "m", 1)
    assert str(caught.value).isprintable()


def test_a_password_is_not_shown() -> None:
    for url in ("http://me:secret@localhost:8501", "https://secret@a", "http://me:secret@[::1"):
        with pytest.raises(ValueError, match="--rest must not contain a user name or password") as caught:
            client.rest_classifier(url, "m", 1)
        assert "secret" not in str(caught.value)


def test_the_model_name_is_quoted() -> None:
    message = r"/v1/models/\.\.%2Fa%20b%3Fc%0A:predict: 404 None"
    with serving(sends(b"", "404 None")) as address, pytest.raises(ValueError, match=message):
        client.rest_classifier(address, "../a b?c\n", 20)([b""])


@pytest.mark.parametrize("stride", [1001, 10**400])
def test_a_card_with_an_extreme_stride_is_refused(tmp_path: Path, stride: int) -> None:
    entries = {"frames": 4, "stride": stride, "crop": 32, "frame_sampling": "slowfast", "resize": 32}
    entries |= {"stored": "none", "clips": 1, "combine": "mean"}
    (tmp_path / "card").write_text(json.dumps({"input": entries, "classes": ["a"]}))
    with pytest.raises(UserError, match="stride must"):
        client.Contract.read(tmp_path / "card")

"""HTTP requests to a server that is not trusted: limited in time and memory, to that server only.

`urllib.request.urlopen` has a timeout for each read, so that a server that sends a byte a second holds it for ever; it
reads answers of any size, and follows redirects to whatever it has handlers for. Imports no TensorFlow.
"""

import functools
import http.client
import io
import re
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import Any, TypeVar
from urllib.parse import urlsplit

from x3d_tf.errors import UserError, require

Result = TypeVar("Result")

MAX_ANSWER = 4 << 20  # bytes: what a gRPC end accepts by default; probabilities of 100,000 classes take half of it
_MAX_ERROR = 4096  # bytes of an error page that are read
_MAX_SHOWN = 500  # characters of a server's message


def check_address(url: str) -> None:
    """Raises UserError unless `url` is http://HOST:PORT or https://HOST:PORT, with or without a path."""
    require(url.startswith(("http://", "https://")), "--rest", "begin with http:// or https://", url)
    try:
        parts = urlsplit(url)
        named = "@" in parts.netloc
        valid = bool(parts.hostname) and parts.port != 0 and url.isascii() and url.isprintable() and " " not in url
    except ValueError:  # a port that is no number, or brackets that are not closed
        named, valid = "@" in url, False
    if named:  # the value is not shown: it may hold a password
        raise UserError("--rest must hold no user name and no password, which are not supported; remove what ends in @")
    require(valid and not parts.query and not parts.fragment, "--rest", "be http://HOST:PORT or https://HOST:PORT", url)


def post(address: str, body: bytes, seconds: float) -> bytes:
    """Sends JSON and returns the body of the answer.

    Proxies are those of the environment (http_proxy, https_proxy, no_proxy). Redirects are not followed.

    Args:
        address: the URL; its host and port as `check_address` accepts them.
        body: the JSON text.
        seconds: time limit for everything: finding the host, connecting, sending, receiving.

    Raises:
        UserError: the server cannot be reached, is too slow, answers with another status than 200, with something else
            than HTTP, or with a body that is truncated or larger than `MAX_ANSWER`. The message is one line.
    """
    deadline = time.monotonic() + seconds
    try:
        status, reason, location, content, missing = _within(seconds, lambda: _exchange(address, body, deadline))
    except (OSError, http.client.HTTPException, ValueError, OverflowError) as error:
        cause = getattr(error, "reason", error)
        if isinstance(cause, TimeoutError):
            raise UserError(f"{address}: no complete answer within {seconds:g} seconds; raise --timeout") from error
        raise UserError(f"{address}: {one_line(str(cause)) or type(cause).__name__}") from error
    if 300 <= status < 400:
        raise UserError(f"{address}: {status}, a redirect to {one_line(location)}, is not followed; name that server")
    if status != 200:
        raise UserError(f"{address}: {status} {one_line(reason)[:100]}: {one_line(content.decode(errors='replace'))}")
    if len(content) > MAX_ANSWER:
        raise UserError(f"{address}: the answer is larger than {MAX_ANSWER} bytes, which is not read")
    if missing:
        raise UserError(f"{address}: the answer is truncated, {missing} of {len(content) + missing} bytes are missing")
    return content


def one_line(text: str) -> str:
    """A server's text for a terminal: on one line, control characters escaped, cut after 500 characters."""
    words = " ".join(text[: 2 * _MAX_SHOWN].split())
    escaped = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in words)
    return escaped if len(escaped) <= _MAX_SHOWN and len(text) <= 2 * _MAX_SHOWN else f"{escaped[:_MAX_SHOWN]}..."


def _within(seconds: float, call: Callable[[], Result]) -> Result:
    """Returns what a call returns; raises TimeoutError after so many seconds, and leaves the call to itself.

    No socket has a limit for looking up a name, or for all addresses of a host together.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future.result(seconds)


def _exchange(address: str, body: bytes, deadline: float) -> tuple[int, str, str, bytes, int]:
    """Returns status, reason, Location, body (its beginning where it is too large) and how many bytes it lacks."""
    opener = urllib.request.OpenerDirector()  # has no handlers of redirects, nor of file:, ftp: and data:
    for handler in (
        urllib.request.ProxyHandler(),
        _Plain(deadline),
        _Secure(deadline),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with opener.open(request, timeout=max(deadline - time.monotonic(), 0.001)) as response:
        length = response.headers.get("Content-Length", "0")
        if not re.fullmatch("[0-9]{1,18}", length):  # what http.client takes for no length at all
            raise http.client.HTTPException(f"Content-Length is no number of bytes: {length}")
        content = response.read(MAX_ANSWER + 1 if response.status == 200 else _MAX_ERROR)
        return response.status, response.reason, response.headers.get("Location", ""), content, response.length or 0


class _UntilDeadline(urllib.request.AbstractHTTPHandler):
    """A handler whose connections have a deadline."""

    def __init__(self, deadline: float) -> None:
        super().__init__()
        self._deadline = deadline

    def do_open(self, http_class: Any, req: Any, **http_conn_args: Any) -> Any:
        def connect(*arguments: Any, **settings: Any) -> Any:
            connection = http_class(*arguments, **settings)
            connection.response_class = functools.partial(_Response, deadline=self._deadline)
            return connection

        return super().do_open(connect, req, **http_conn_args)


class _Plain(_UntilDeadline, urllib.request.HTTPHandler):
    """http:"""


class _Secure(_UntilDeadline, urllib.request.HTTPSHandler):
    """https:"""


class _Response(http.client.HTTPResponse):
    """A response, headers included, that is read until a deadline."""

    def __init__(self, sock: Any, *arguments: Any, deadline: float, **settings: Any) -> None:
        super().__init__(sock, *arguments, **settings)
        self.fp = io.BufferedReader(_Stream(sock, self.fp.detach(), deadline))


class _Stream(io.RawIOBase):
    """A socket's stream whose reads together end at a deadline: a timeout of the socket begins again with each."""

    def __init__(self, sock: Any, raw: Any, deadline: float) -> None:
        self._sock, self._raw, self._deadline = sock, raw, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        self._sock.settimeout(remaining)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()

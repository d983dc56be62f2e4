"""HTTP requests to an untrusted server, with limits on time and memory and without redirects.

`urllib.request.urlopen` is not safe for this purpose: its timeout applies to each read, so that a server that sends one
byte per second can block it forever; it reads responses of any size; and it follows redirects. This module does not
import TensorFlow.
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

MAX_RESPONSE = 4 << 20  # bytes, the default limit of gRPC; probabilities of 100,000 classes take half of it
_MAX_ERROR = 4096  # bytes read from an error page
_MAX_SHOWN = 500  # characters of a server message


def check_address(url: str) -> None:
    """Raises UserError if `url` is not http://HOST:PORT or https://HOST:PORT, with or without a path."""
    require(url.startswith(("http://", "https://")), "--rest", "begin with http:// or https://", url)
    try:
        parts = urlsplit(url)
        has_user = "@" in parts.netloc
        valid = bool(parts.hostname) and parts.port != 0 and url.isascii() and url.isprintable() and " " not in url
    except ValueError:  # an invalid port, or an unclosed bracket
        has_user, valid = "@" in url, False
    if has_user:  # not shown, because it may contain a password
        raise UserError("--rest must not contain a user name or password; remove the part before @")
    require(valid and not parts.query and not parts.fragment, "--rest", "be http://HOST:PORT or https://HOST:PORT", url)


def post(address: str, body: bytes, seconds: float) -> bytes:
    """Sends JSON and returns the body of the response.

    Uses the proxies of the environment (http_proxy, https_proxy, no_proxy). Redirects are not followed.

    Args:
        address: URL, whose host and port pass `check_address`.
        body: JSON text.
        seconds: time limit of the complete request: name lookup, connecting, sending and receiving.

    Raises:
        UserError: the server cannot be reached, is too slow, does not speak HTTP, returns a status other than 200, or
            a body that is truncated or larger than `MAX_RESPONSE`. The message is one line.
    """
    deadline = time.monotonic() + seconds
    try:
        status, reason, location, content, missing = _within(seconds, lambda: _exchange(address, body, deadline))
    except (OSError, http.client.HTTPException, ValueError, OverflowError) as error:
        cause = getattr(error, "reason", error)
        if isinstance(cause, TimeoutError):
            raise UserError(
                f"{address}: no complete response within {seconds:g} seconds; increase --timeout"
            ) from error
        raise UserError(f"{address}: {one_line(str(cause)) or type(cause).__name__}") from error
    if 300 <= status < 400:
        raise UserError(
            f"{address}: status {status} redirects to {one_line(location)}, which is not followed; use that address"
        )
    if status != 200:
        raise UserError(f"{address}: {status} {one_line(reason)[:100]}: {one_line(content.decode(errors='replace'))}")
    if len(content) > MAX_RESPONSE:
        raise UserError(f"{address}: the response is larger than the limit of {MAX_RESPONSE} bytes")
    if missing:
        total = len(content) + missing
        raise UserError(f"{address}: the response is truncated: {missing} of {total} bytes are missing")
    return content


def one_line(text: str) -> str:
    """Converts a server message for display: one line, control characters escaped, at most 500 characters."""
    words = " ".join(text[: 2 * _MAX_SHOWN].split())
    escaped = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in words)
    return escaped if len(escaped) <= _MAX_SHOWN and len(text) <= 2 * _MAX_SHOWN else f"{escaped[:_MAX_SHOWN]}..."


def _within(seconds: float, call: Callable[[], Result]) -> Result:
    """Calls a function in a thread and returns its result; raises TimeoutError and abandons the thread if it is late.

    A socket timeout covers neither the name lookup nor connection attempts to several addresses of a host.
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
    """Returns status, reason, Location header, body (truncated if too large) and the number of missing bytes."""
    opener = urllib.request.OpenerDirector()  # without handlers for redirects, file:, ftp: and data:
    for handler in (
        urllib.request.ProxyHandler(),
        _HTTPHandler(deadline),
        _HTTPSHandler(deadline),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with opener.open(request, timeout=max(deadline - time.monotonic(), 0.001)) as response:
        length = response.headers.get("Content-Length", "0")
        if not re.fullmatch("[0-9]{1,18}", length):  # http.client would ignore it
            raise http.client.HTTPException(f"Content-Length must be a number of bytes, got {length}")
        content = response.read(MAX_RESPONSE + 1 if response.status == 200 else _MAX_ERROR)
        return response.status, response.reason, response.headers.get("Location", ""), content, response.length or 0


class _DeadlineHandler(urllib.request.AbstractHTTPHandler):
    """Base class of handlers whose connections have a deadline."""

    def __init__(self, deadline: float) -> None:
        super().__init__()
        self._deadline = deadline

    def do_open(self, http_class: Any, req: Any, **http_conn_args: Any) -> Any:
        def connect(*arguments: Any, **settings: Any) -> Any:
            connection = http_class(*arguments, **settings)
            connection.response_class = functools.partial(_Response, deadline=self._deadline)
            return connection

        return super().do_open(connect, req, **http_conn_args)


class _HTTPHandler(_DeadlineHandler, urllib.request.HTTPHandler):
    """Handler of http: URLs."""


class _HTTPSHandler(_DeadlineHandler, urllib.request.HTTPSHandler):
    """Handler of https: URLs."""


class _Response(http.client.HTTPResponse):
    """HTTP response whose headers and body must be read before a deadline."""

    def __init__(self, sock: Any, *arguments: Any, deadline: float, **settings: Any) -> None:
        super().__init__(sock, *arguments, **settings)
        self.fp = io.BufferedReader(_Stream(sock, self.fp.detach(), deadline))


class _Stream(io.RawIOBase):
    """Socket stream with one deadline for all reads; a socket timeout would start again with each read."""

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

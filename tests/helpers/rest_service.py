"""A SavedModel behind TF Serving's REST interface, for tests of its clients.

`serve` runs Python's HTTP server in this process. As a program, this file runs KServe's server, which uses the same
protocol: python rest_service.py FOLDER NAME PORT
"""

import base64
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import tensorflow as tf


def respond(loaded: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Returns the response to a predict request, in rows ("instances") or columns ("inputs") as TF Serving documents.

    Raises:
        ValueError: the request is invalid.
        tf.errors.InvalidArgumentError: the model rejects the input.
    """
    signature = loaded.signatures[request.get("signature_name", "serving_default")]
    ((name, spec),) = signature.structured_input_signature[1].items()
    if ("instances" in request) == ("inputs" in request):
        raise ValueError("a request must have either instances or inputs")
    values = request.get("instances", request.get("inputs"))
    if "instances" in request and isinstance(values[0], dict):
        values = [row[name] for row in values]
    elif "inputs" in request and isinstance(values, dict):
        values = values[name]
    outputs = {
        key: value.numpy() for key, value in signature(**{name: tf.constant(_decoded(values), spec.dtype)}).items()
    }
    columns = {key: _texts(value.tolist()) for key, value in outputs.items()}
    if "inputs" in request:
        return {"outputs": columns}
    return {"predictions": [dict(zip(columns, row)) for row in zip(*columns.values())]}


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        return base64.b64decode(value["b64"])
    return [_decoded(item) for item in value] if isinstance(value, list) else value


def _texts(value: Any) -> Any:
    if isinstance(value, list):
        return [_texts(item) for item in value]
    return value.decode() if isinstance(value, bytes) else value


@contextmanager
def serve(loaded: Any, model: str) -> Iterator[str]:
    """Yields the address of a server, which is stopped on exit."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(200, {"model_version_status": [{"version": "1", "state": "AVAILABLE"}]})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path not in (f"/v1/models/{model}:predict", f"/v1/models/{model}/versions/1:predict"):
                self.reply(404, {"error": f"Servable not found for request: {self.path}"})
                return
            try:
                self.reply(200, respond(loaded, json.loads(body)))
            except (ValueError, KeyError, tf.errors.InvalidArgumentError) as error:
                self.reply(400, {"error": str(error)})

        def reply(self, status: int, content: dict[str, Any]) -> None:
            body = json.dumps(content, ensure_ascii=False).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def _run_kserve(folder: str, name: str, port: int) -> None:
    import kserve

    class Served(kserve.Model):
        def load(self) -> bool:
            self.loaded = tf.saved_model.load(folder)
            self.ready = True
            return True

        def predict(self, payload: Any, headers: Any = None, response_headers: Any = None) -> Any:
            try:
                return respond(self.loaded, payload)
            except (ValueError, KeyError, tf.errors.InvalidArgumentError) as error:
                raise kserve.errors.InvalidInput(str(error)) from error

    model = Served(name)
    model.load()
    kserve.ModelServer(http_port=port, enable_grpc=False, workers=1).start([model])


if __name__ == "__main__":
    _, *arguments, port = sys.argv
    sys.argv = sys.argv[:1]  # KServe reads its own flags
    _run_kserve(*arguments, int(port))

"""TF_CONFIG: which workers it lists, and the errors about it."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from workers import free_ports

from x3d_tf.errors import UserError
from x3d_tf.training import cluster
from x3d_tf.training.cluster import Cluster, cluster_from_environment, wait_for_workers

TWO = {"worker": ["one:1000", "two:1000"]}


def parse(monkeypatch: pytest.MonkeyPatch, content: Any) -> Cluster | None:
    monkeypatch.setenv("TF_CONFIG", content if isinstance(content, str) else json.dumps(content))
    return cluster_from_environment()


def test_workers_and_a_chief(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse(monkeypatch, {"cluster": TWO, "task": {"type": "worker", "index": 1}}) == Cluster(
        ("one:1000", "two:1000"), 1
    )
    jobs = {"worker": ["one:1", "[fe80::2]:1"], "chief": ["first.example-1.com:65535"]}  # the chief is number 0
    found = parse(monkeypatch, {"cluster": jobs, "task": {"type": "worker", "index": "1"}, "rpc_layer": "grpc"})
    assert found == Cluster(("first.example-1.com:65535", "one:1", "[fe80::2]:1"), 2, 1)
    assert [found.number_of("chief", 0), found.number_of("worker", 1)] == [0, 2]
    found = parse(monkeypatch, {"cluster": jobs, "task": {"type": "chief", "index": 0}})
    assert found is not None and found.is_chief and found.name(1) == "worker 1 (one:1)"


@pytest.mark.parametrize(
    "content", ["", "  ", {}, {"cluster": {}}, {"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 0}}]
)
def test_a_single_worker(monkeypatch: pytest.MonkeyPatch, content: Any) -> None:
    assert parse(monkeypatch, content) is None
    monkeypatch.delenv("TF_CONFIG")
    assert cluster_from_environment() is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "TF_CONFIG must be a JSON object, got '{'"),
        ("3", "TF_CONFIG must hold an object \"cluster\" with lists of HOST:PORT, got '3'"),
        ('{"cluster": []}', 'TF_CONFIG must hold an object "cluster"'),
        ({"cluster": TWO}, '"task" of TF_CONFIG must be an object such as {"type": "worker", "index": 0}, got None'),
        ({"cluster": TWO, "task": {"type": "ps", "index": 0}}, 'must have a "type" of the "cluster", one of worker'),
        ({"cluster": TWO, "task": {"type": ["worker"], "index": 0}}, 'must have a "type"'),
        (
            {"cluster": TWO, "task": {"type": "worker", "index": 2}},
            'must have an "index" in 0..1, because the cluster has 2 workers, got 2',
        ),
        ({"cluster": TWO, "task": {"type": "worker", "index": -1}}, 'must have an "index" in 0..1'),
        ({"cluster": TWO, "task": {"type": "worker", "index": True}}, 'must have an "index" in 0..1'),
        ({"cluster": TWO, "task": {"type": "worker"}}, 'must have an "index" in 0..1'),
        ({"cluster": {**TWO, "ps": ["a:1"]}}, 'must have no other jobs than "chief" and "worker", got [\'ps\']'),
        ({"cluster": {"worker": "one:1000"}}, "\"worker\" of TF_CONFIG must be a list of HOST:PORT, got 'one:1000'"),
        ({"cluster": {"worker": ["one"]}}, "an address of TF_CONFIG must be HOST:PORT, got 'one'"),
        ({"cluster": {"worker": ["one:99999"]}}, "an address of TF_CONFIG must be HOST:PORT, got 'one:99999'"),
        ({"cluster": {"worker": ["one:0"]}}, "an address of TF_CONFIG must be HOST:PORT, got 'one:0'"),
        ("[" * 100_000, "TF_CONFIG must be a JSON object, got '[[["),
        ({"cluster": {"worker": [["one:1"]]}}, "an address of TF_CONFIG must be HOST:PORT"),
        ({"cluster": {"worker": ["one:1", "one:1"]}}, "must list 1 to 10000 workers, each once"),
        ({"cluster": {"worker": []}}, "must list 1 to 10000 workers"),
        ({"cluster": {"chief": ["a:1", "b:1"]}}, '"chief" of TF_CONFIG must be a list of one HOST:PORT'),
    ],
)
def test_errors_name_what_is_wrong(monkeypatch: pytest.MonkeyPatch, content: Any, message: str) -> None:
    with pytest.raises(UserError) as raised:
        parse(monkeypatch, content)
    assert message in str(raised.value)


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} of worker 0 \(127\.0\.0\.1:{port}\) cannot be used"):
            wait_for_workers(Cluster((f"127.0.0.1:{port}", "127.0.0.1:1"), 0))


def test_a_worker_waits_for_the_others_and_names_who_is_absent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "_REMINDER_SECONDS", 0.0)
    monkeypatch.setattr(cluster, "_POLL_SECONDS", 0.01)
    own, port = free_ports(2)
    addresses = (f"127.0.0.1:{own}", f"127.0.0.1:{port}")
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(wait_for_workers, Cluster(addresses, 0))
        lines: list[str] = []
        while not lines and not waiting.done():
            lines = capsys.readouterr().err.splitlines()
        assert lines[0] == f"still waiting for worker 1 ({addresses[1]}); see the output there"
        assert cluster._answers(addresses[0])  # so that the others find this worker
        with socket.create_server(("127.0.0.1", port)):
            waiting.result(30)


@pytest.mark.parametrize("host", ["a..b", "x" * 64])
def test_an_impossible_host_does_not_answer(host: str) -> None:
    assert not cluster._answers(f"{host}:1000")


def test_a_machine_without_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    (port,) = free_ports(1)
    with cluster._listening(Cluster((f"127.0.0.1:{port}", "b:1"), 0)) as server:
        assert server.family == socket.AF_INET and server.getsockname()[1] == port
        assert cluster._answers(f"127.0.0.1:{port}")

"""A Ray cluster with several nodes on this machine."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

# 80 MB is the smallest object store. Ray replaces 127.0.0.1 by the address of the machine.
_SETTINGS = {"object_store_memory": 80 * 2**20, "node_ip_address": "127.0.0.2"}
_HEALTH = {  # notices a dead node after a second, instead of 15
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 2,
}


def add_node(cluster: Any, cpus: int = 1) -> Any:
    """Returns a new node of a cluster. `cluster.remove_node(node, allow_graceful=False)` kills it."""
    return cluster.add_node(num_cpus=cpus, **_SETTINGS)


@contextmanager
def local_cluster(nodes: int = 2, cpus: int = 1) -> Iterator[tuple[Any, list[Any]]]:
    """Yields a cluster, with `address`, and its worker nodes besides the head node, which has no CPUs.

    The processes of its nodes find the modules of the tests.
    """
    from ray.cluster_utils import Cluster

    before = os.environ.get("PYTHONPATH")
    tests = Path(__file__).parents[1]
    paths = [tests.parent, tests, tests / "helpers", *([before] if before else [])]
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": _HEALTH, **_SETTINGS}
    cluster = None
    try:
        cluster = Cluster(initialize_head=True, head_node_args=head)
        yield cluster, [add_node(cluster, cpus) for _ in range(nodes)]
    finally:
        if cluster is not None:
            cluster.shutdown()
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before

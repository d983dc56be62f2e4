"""What the machine has. Imports no TensorFlow."""

import os


def usable_cpus() -> int:
    """CPUs that this process may run on, which containers and schedulers make fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

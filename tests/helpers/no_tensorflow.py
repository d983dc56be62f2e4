"""Runs a command in a process where TensorFlow cannot be imported, to test errors that are reported before it."""

import subprocess
import sys
from pathlib import Path


def without_tensorflow(
    name: str, *arguments: Path | str, cwd: Path | None = None, before: str = ""
) -> "subprocess.CompletedProcess[str]":
    """Runs a command by its name. Importing TensorFlow or Keras in it raises ImportError; `before` is run first."""
    code = (
        "import sys, runpy\n"
        "sys.modules['tensorflow'] = sys.modules['keras'] = None\n"
        f"{before}\n"
        f"runpy.run_module('x3d_tf.{name}', run_name='__main__', alter_sys=True)"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)

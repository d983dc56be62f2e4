"""The command `complexity`."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from x3d_tf import VARIANTS, complexity
from x3d_tf.modeling.expansion import EFFICIENTNETS

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "x3d_tf.complexity", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_complexity_prints_every_variant_with_the_papers_figures(
    in_process: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    in_process(complexity)
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines[2 : 2 + len(VARIANTS)]}
    assert list(rows) == list(VARIANTS)
    assert all(text in rows["x3d_m"] for text in ("4.7325", "4.73", "+0.05%", "3.7943", "3.7612", "3.76", "6.1806"))
    others = lines[2 + len(VARIANTS) : -2]  # a longer name has a line of its own
    assert others[::2] == list(EFFICIENTNETS)
    assert all(text in others[3] for text in ("10 x 164²", "6.9794", "6.91", "+1.00%", "11.2407", "8.19", "+37.25%"))
    assert "The paper's definition of EfficientNet3D cannot be recovered from its text." in lines[-2]


def test_the_layers_of_a_recipe_of_efficientnet3d() -> None:
    done = run("--gin_file=gin/efficientnet3d/b0.gin", "--gin_bindings=ModelOptions.se='none'", "--layers")
    assert "efficientnet3d_b0 with se=none" in done.stdout and "res8_0_conv_c" in done.stdout
    assert "fc1" not in done.stdout and "cannot be recovered from its text" in done.stdout


def test_complexity_follows_a_binding() -> None:
    done = run("--gin_file=gin/x3d_s.gin", "--gin_bindings=Expansion.gamma_b=1.5", "--layers")
    assert "x3d(tau=6,t=13,s=1.429,w=1,b=1.5,d=2.2)" in done.stdout
    assert "1.3401" in done.stdout and "res5_6_conv_c" in done.stdout


def test_complexity_reports_errors_in_one_line() -> None:
    done = run("--gin_file=gin/x3d_s.gin", "--gin_bindings=Expansion.gamma_b=0")
    assert (done.returncode, done.stderr) == (1, "error: Expansion.gamma_b must be positive, got 0\n")
    assert "error: unexpected argument 'x'" in run("x").stderr

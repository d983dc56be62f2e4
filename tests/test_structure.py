"""Import rules: modules that must not import TensorFlow or gin, and the public names."""

import subprocess
import sys
from pathlib import Path

import pytest
from moving_square import write_records
from video_fixtures import numbered_frames, write_video

WITHOUT_TENSORFLOW = (
    "x3d_tf",
    "x3d_tf.modeling.expansion",
    "x3d_tf.modeling.architecture",
    "x3d_tf.modeling.archive",
    "x3d_tf.modeling.cost",
    "x3d_tf.modeling.pytorch.weight_names",
    "x3d_tf.modeling.metadata",
    "x3d_tf.modeling.pytorch.state_dicts",
    "x3d_tf.modeling.pytorch.checkpoint_files",
    "x3d_tf.data.build.state",
    "x3d_tf.data.build.builder",
    "x3d_tf.data.build.class_names",
    "x3d_tf.data.sampling",
    "x3d_tf.data.video.containers",
    "x3d_tf.data.datasets.spec",
    "x3d_tf.data.build.encoding",
    "x3d_tf.data.video.image_sequences",
    "x3d_tf.data.video.h264_fields",
    "x3d_tf.data.records.index",
    "x3d_tf.data.video.listing",
    "x3d_tf.data.records.manifest",
    "x3d_tf.data.build.sources",
    "x3d_tf.data.video.timeline",
    "x3d_tf.data.video.decode",
    "x3d_tf.data.video.clip_reader",
    "x3d_tf.csv_files",
    "x3d_tf.files",
    "x3d_tf.locks",
    "x3d_tf.startup",
    "x3d_tf.terminal",
    "x3d_tf.text",
    "x3d_tf.evaluation.comparison",
    "x3d_tf.evaluation.metrics",
    "x3d_tf.evaluation.eval_config",
    "x3d_tf.evaluation.paper",
    "x3d_tf.evaluation.reports",
    "x3d_tf.config",
    "x3d_tf.runs.run_folder",
    "x3d_tf.types",
)
WITHOUT_GIN = (
    "x3d_tf.modeling.x3d",
    "x3d_tf.modeling.saving",
    "x3d_tf.modeling.pytorch.convert",
    "x3d_tf.data.batches",
    "x3d_tf.data.input_pipeline",
    "x3d_tf.data.preview",
    "x3d_tf.inference.prediction",
    "x3d_tf.evaluation.classification",
    "x3d_tf.evaluation.watch",
    "x3d_tf.training.loop",
)


def imported_with(statement: str, *names: str) -> list[str]:
    """Returns the modules in `names` that are loaded after `statement` has run in a new process."""
    code = f"{statement}\nimport sys\nprint(*[name for name in {names!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_light_modules_do_not_import_tensorflow() -> None:
    statement = "import " + ", ".join(WITHOUT_TENSORFLOW)
    assert imported_with(statement, "tensorflow", "keras", "gin") == []


def test_cost_does_not_import_tensorflow() -> None:
    assert imported_with("import x3d_tf; x3d_tf.cost('x3d_m')", "tensorflow", "keras", "gin") == []


def test_gin_config_does_not_import_tensorflow() -> None:
    assert imported_with("import x3d_tf.gin_config", "tensorflow", "keras") == []


def test_the_library_does_not_import_gin() -> None:
    assert imported_with("import " + ", ".join(WITHOUT_GIN), "gin", "tensorflow") == ["tensorflow"]


PUBLIC = """
import importlib, inspect, pkgutil, sys, warnings
import numpy as np
import x3d_tf
for module in pkgutil.walk_packages(x3d_tf.__path__, "x3d_tf."):
    if module.name.count(".") == 1 and not module.name.startswith("x3d_tf._"):
        importlib.import_module(module.name)
folder, tiny = sys.argv[1], x3d_tf.Expansion(gamma_tau=1, gamma_t=2, gamma_s=32 / 112, gamma_b=1, gamma_d=0.2)
x3d_tf.set_kernels("gpu")
model = x3d_tf.build_x3d(tiny, num_classes=2)
calls = {
    "build_detector": lambda: x3d_tf.build_detector(tiny, num_classes=2).num_classes == 2,
    "build_x3d": lambda: model.num_classes == 2,
    "cost": lambda: x3d_tf.cost(tiny).macs > 0,
    "dataset": lambda: x3d_tf.dataset(folder + "/records", tiny.clip, training=True, batch=2) is not None,
    "save": lambda: x3d_tf.save(x3d_tf.portable(model, ("a", "b")), folder + "/m.keras") is None,
    "portable": lambda: x3d_tf.portable(model, ("a", "b")).output_shape == (None, 2),
    "load": lambda: x3d_tf.load(folder + "/m.keras").class_names == ("a", "b"),
    "predict_videos": lambda: [
        result.probabilities.shape for result in x3d_tf.predict_videos(folder + "/m.keras", folder + "/a.mp4")
    ] == [(2,)],
    "set_kernels": lambda: True,
}
print(*[name for name, call in calls.items() if not call()])
print(*sorted({name for name in x3d_tf.__all__ if inspect.isfunction(getattr(x3d_tf, name))} ^ set(calls)))
"""


def test_public_functions_are_not_shadowed_by_commands(tmp_path: Path) -> None:
    """Imported modules become attributes of the package, so all are imported before the functions are called."""
    write_records(tmp_path / "records", videos=2)
    write_video(tmp_path / "a.mp4", numbered_frames(6))
    done = subprocess.run([sys.executable, "-c", PUBLIC, str(tmp_path)], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("\n\n", 0), done.stderr[-2000:]


def test_public_names() -> None:
    import x3d_tf

    assert {name for name in x3d_tf.__all__ if getattr(x3d_tf, name) is not None} == set(x3d_tf.__all__)
    assert set(x3d_tf.__all__) <= set(dir(x3d_tf))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = x3d_tf.nothing

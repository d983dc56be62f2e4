"""Which module may import what, seen from fresh processes."""

import subprocess
import sys

import pytest

WITHOUT_TENSORFLOW = (
    "x3d_tf",
    "x3d_tf.modeling.expansion",
    "x3d_tf.modeling.architecture",
    "x3d_tf.modeling.archive",
    "x3d_tf.modeling.cost",
    "x3d_tf.modeling.checkpoints",
    "x3d_tf.modeling.description",
    "x3d_tf.modeling.torch_files",
    "x3d_tf.data.build_folder",
    "x3d_tf.data.builder",
    "x3d_tf.data.clips",
    "x3d_tf.data.containers",
    "x3d_tf.data.datasets",
    "x3d_tf.data.encoding",
    "x3d_tf.data.frame_folders",
    "x3d_tf.data.h264_fields",
    "x3d_tf.data.index",
    "x3d_tf.data.manifest",
    "x3d_tf.data.sources",
    "x3d_tf.data.timeline",
    "x3d_tf.data.video",
    "x3d_tf._csv",
    "x3d_tf._files",
    "x3d_tf._locks",
    "x3d_tf._text",
    "x3d_tf.evaluation.comparison",
    "x3d_tf.evaluation.metrics",
    "x3d_tf.evaluation.published",
    "x3d_tf.evaluation.reports",
    "x3d_tf.runs.recipe",
    "x3d_tf.runs.run_folder",
)
WITHOUT_GIN = (
    "x3d_tf.modeling.x3d",
    "x3d_tf.modeling.saving",
    "x3d_tf.modeling.conversion",
    "x3d_tf.data.batches",
    "x3d_tf.data.pipeline",
    "x3d_tf.data.preview",
    "x3d_tf.evaluation.prediction",
    "x3d_tf.evaluation.testing",
    "x3d_tf.evaluation.watch",
    "x3d_tf.training.loop",
)


def imported_with(statement: str, *names: str) -> list[str]:
    """Those of `names` that are loaded once `statement` ran in a fresh process."""
    code = f"{statement}\nimport sys\nprint(*[name for name in {names!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_light_modules_import_no_tensorflow() -> None:
    statement = "import " + ", ".join(WITHOUT_TENSORFLOW)
    assert imported_with(statement, "tensorflow", "keras", "gin") == []


def test_counting_imports_no_tensorflow() -> None:
    assert imported_with("import x3d_tf; x3d_tf.cost('x3d_m')", "tensorflow", "keras", "gin") == []


def test_configurations_import_no_tensorflow() -> None:
    assert imported_with("import x3d_tf.configs", "tensorflow", "keras") == []


def test_the_library_imports_no_gin() -> None:
    assert imported_with("import " + ", ".join(WITHOUT_GIN), "gin", "tensorflow") == ["tensorflow"]


def test_public_names() -> None:
    import x3d_tf

    assert {name for name in x3d_tf.__all__ if getattr(x3d_tf, name) is not None} == set(x3d_tf.__all__)
    assert set(x3d_tf.__all__) <= set(dir(x3d_tf))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = x3d_tf.nothing

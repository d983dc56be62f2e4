"""Multi-view testing against one view at a time, and the reports of it."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest


def test_class_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    from x3d_tf import _plots

    _plots.save_confusion(np.eye(2, dtype=int), ("a$^$", "b_{$"), tmp_path / "confusion.png", "$title^")
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")


class FixedLogits:
    """Stands for a network: the logits of a clip are picked by its brightness."""

    def __init__(self, logits: list[tuple[float, float]], clip: object) -> None:
        self.logits, self.clip, self.num_classes = np.array(logits, "float32"), clip, 2
        self.task = "single_label"

    def __call__(self, clips: object, training: bool) -> object:
        import tensorflow as tf

        level = tf.cast(tf.round(tf.reduce_mean(clips, axis=(1, 2, 3, 4)) / 100), tf.int32)
        return tf.gather(self.logits, level)


def test_probabilities_are_averaged_not_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow as tf

    from x3d_tf import ClipSpec
    from x3d_tf.data.clips import ViewSpec
    from x3d_tf.evaluation import views as module

    spec = ViewSpec(temporal_views=3, resize=8, crop=8)
    levels = np.array([[0, 1, 2], [2, 1, 1]])  # of the views of two videos
    clips = np.ones((2, 3, 1, 8, 8, 3), "float32") * levels[:, :, None, None, None, None] * 100

    def dataset(*_: object, **__: object) -> tf.data.Dataset:
        return tf.data.Dataset.from_tensor_slices((clips, [0, 0], [0, 1])).batch(1)

    class Video(NamedTuple):
        media_id: str

    class Folder:
        folder = "somewhere"

        def split(self, _: str) -> object:
            return type("Split", (), {"records": (Video("a"), Video("b"))})

    monkeypatch.setattr(module, "evaluation_dataset", dataset)
    model = FixedLogits([(6, 0), (0, 2), (0, 2)], ClipSpec(1, 1, 8))
    probabilities = module.predict_split(model, Folder(), "test", spec)  # type: ignore[arg-type]
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities[0], [0.412, 0.588], atol=5e-4)  # mean logits would say class 0
    np.testing.assert_allclose(probabilities[1], [0.119, 0.881], atol=5e-4)

    model.task = "multi_label"
    probabilities = module.predict_split(model, Folder(), "test", spec, progress=False)  # type: ignore[arg-type]
    expected = np.mean([[1 / (1 + np.exp(-x)) for x in row] for row in [(6, 0), (0, 2), (0, 2)]], axis=0)
    np.testing.assert_allclose(probabilities[0], expected, atol=1e-6)

    broken = FixedLogits([(6, 0), (0, 2), (float("nan"), 2)], ClipSpec(1, 1, 8))
    with pytest.raises(ValueError, match="probabilities that are not numbers for a of somewhere"):
        module.predict_split(broken, Folder(), "test", spec)  # type: ignore[arg-type]

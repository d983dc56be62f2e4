"""Probabilities of several views are averaged, or combined by their maximum."""

from typing import NamedTuple

import numpy as np
import pytest

import x3d_tf

pytestmark = pytest.mark.usefixtures("uncompiled_module")


class FixedLogits:
    """Stands in for a network: the brightness of a clip selects its logits."""

    def __init__(self, logits: list[tuple[float, float]], clip: object) -> None:
        self.logits, self.clip, self.num_classes = np.array(logits, "float32"), clip, 2
        self.activation = "softmax"

    def __call__(self, clips: object, training: bool) -> object:
        import tensorflow as tf

        level = tf.cast(tf.round(tf.reduce_mean(clips, axis=(1, 2, 3, 4)) / 100), tf.int32)
        return tf.gather(self.logits, level)


def test_probabilities_are_averaged_not_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow as tf

    from x3d_tf.evaluation import multiview as module
    from x3d_tf.types import ViewSpec

    spec = ViewSpec(temporal_views=3, resize=8, crop=8)
    levels = np.float32([[0, 1, 2], [2, 1, 1]])  # brightness of the views of two videos
    clips = np.ones((2, 3, 1, 8, 8, 3), "float32") * levels[:, :, None, None, None, None] * 100

    def dataset(*_: object, **__: object) -> tf.data.Dataset:
        return tf.data.Dataset.from_tensor_slices((clips.reshape(6, 1, 8, 8, 3), [1] * 3 + [0] * 3, [0] * 3 + [1] * 3))

    class Video(NamedTuple):
        media_id: str

    class Folder:
        folder = "somewhere"

        def split(self, _: str) -> object:
            return type("Split", (), {"records": (Video("a"), Video("b"))})

    monkeypatch.setattr(module, "evaluation_clips", dataset)
    model = FixedLogits([(6, 0), (0, 2), (0, 2)], x3d_tf.ClipSpec(1, 1, 8))
    probabilities = module.predict_split(model, Folder(), "test", spec).probabilities  # type: ignore[arg-type]
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities[0], [0.412, 0.588], atol=5e-4)  # mean logits would give class 0
    np.testing.assert_allclose(probabilities[1], [0.119, 0.881], atol=5e-4)

    model.activation = "sigmoid"
    probabilities = module.predict_split(model, Folder(), "test", spec, progress=False).probabilities  # type: ignore[arg-type]
    expected = np.mean([[1 / (1 + np.exp(-x)) for x in row] for row in [(6, 0), (0, 2), (0, 2)]], axis=0)
    np.testing.assert_allclose(probabilities[0], expected, atol=1e-6)

    largest = np.max([[1 / (1 + np.exp(-x)) for x in row] for row in [(6, 0), (0, 2), (0, 2)]], axis=0)
    found = module.predict_split(model, Folder(), "test", spec, combine="max", progress=False)  # type: ignore[arg-type]
    np.testing.assert_allclose(found.probabilities[0], largest, atol=1e-6)

    broken = FixedLogits([(6, 0), (0, 2), (float("nan"), 2)], x3d_tf.ClipSpec(1, 1, 8))
    with pytest.raises(ValueError, match="probabilities for a of somewhere must be finite"):
        module.predict_split(broken, Folder(), "test", spec)  # type: ignore[arg-type]

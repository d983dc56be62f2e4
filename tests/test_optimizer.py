"""Steps of the optimizer compared with independently computed numbers."""

import keras
import numpy as np
import pytest

from x3d_tf.training.optimizer import SGD


@pytest.mark.parametrize(
    ("l2", "gradients", "rates", "expected"),
    [
        # no gradient, only regularisation: the values of PyTorch's SGD
        (0.1, [0, 0, 0], [0.1, 0.1, 0.1], [0.981, 0.954, 0.921]),
        # a changing rate: the velocity does not include it
        (0.0, [1, 0], [0.1, 0.01], [0.81, 0.8019]),
    ],
)
def test_optimizer_steps(
    float64: None, l2: float, gradients: list[float], rates: list[float], expected: list[float]
) -> None:
    weight = keras.Variable([1.0], dtype="float64")
    optimizer = SGD(0.1, momentum=0.9, l2=l2)
    seen = []
    for gradient, rate in zip(gradients, rates):
        optimizer.learning_rate = rate
        optimizer.apply([keras.ops.array([gradient], "float64")], [weight])
        seen.append(float(np.asarray(weight)[0]))
    assert seen == pytest.approx(expected, abs=5e-4 if l2 else 1e-12)


def test_optimizer_excludes_variables() -> None:
    decayed, left = keras.Variable([1.0]), keras.Variable([1.0])
    optimizer = SGD(0.1, l2=0.1)
    optimizer.exclude([left])
    optimizer.apply([keras.ops.zeros(1)] * 2, [decayed, left])
    assert float(np.asarray(left)[0]) == 1 > float(np.asarray(decayed)[0])

"""The moving average of the weights during steps on batches in memory."""

import pytest
from training_steps import assert_close, batches, config_of, make

from x3d_tf.training.ema import MovingAverage

pytestmark = pytest.mark.usefixtures("eager")


def test_the_average_follows_the_weights() -> None:
    model, step = make(config_of({"ema": 0.3}))
    average, stream = step.average, batches()
    assert average is not None
    expected = model.get_weights()
    for number in (1, 2, 3):
        step(stream, 1)
        decay = min(0.3, (1 + number) / (10 + number))
        expected = [decay * old + (1 - decay) * new for old, new in zip(expected, model.get_weights())]
    original = model.get_weights()
    with average.swapped():
        assert_close(model.get_weights(), expected)
    assert_close(model.get_weights(), original, 0)
    with pytest.raises(KeyboardInterrupt), average.swapped():
        raise KeyboardInterrupt
    assert_close(model.get_weights(), original, 0)


def test_the_average_is_reset_to_the_weights() -> None:
    model, _ = make(config_of())
    average = MovingAverage(model, 0.9)
    model.set_weights([weight + 1 for weight in model.get_weights()])
    average.reset()
    expected = model.get_weights()
    with average.swapped():
        assert_close(model.get_weights(), expected, 0)

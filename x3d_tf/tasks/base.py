"""Protocols of what a task supplies to training. Imports no TensorFlow."""

from typing import Any, Protocol

from x3d_tf.types import Metric


class Loss(Protocol):
    """The loss of a task, with the metrics that are computed from the same logits."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics besides the loss."""

    def __call__(self, logits: Any, targets: Any, inputs: Any) -> dict[str, Any]:
        """Computes the loss of a micro-batch on one device.

        Args:
            logits: the logits of the network.
            targets: the targets from the training input.
            inputs: the input of the network.

        Returns:
            "loss" and each of the metrics, scalars. Their sums over the devices and micro-batches of a step are the
            values of the step.
        """


class Validation(Protocol):
    """Evaluates the current weights of a network on the validation split during training."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics that a call returns."""

    def __call__(self) -> dict[str, float]:
        """Computes the metrics, by name.

        Raises:
            UserError: a metric cannot be computed.
        """

    def rank(self, scores: dict[str, float]) -> tuple[float, ...]:
        """Returns the key by which the scores of two validations are compared: the greater one is better."""

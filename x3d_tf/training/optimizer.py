"""Stochastic gradient descent as PyTorch computes it, which X3D's recipe was tuned with."""

from collections.abc import Iterable
from typing import Any

import keras
from keras import ops


@keras.saving.register_keras_serializable("x3d_tf")
class SGD(keras.optimizers.Optimizer):
    """Nesterov momentum with L2 regularisation inside the gradient.

    Keras' own SGD differs twice: its weight decay acts on the weights, not through the momentum, and its velocity holds
    the learning rate, so that a changed rate reaches past gradients too.

    Args:
        learning_rate: a number or a schedule.
        momentum: share of the velocity that a step keeps.
        l2: added to the gradient, times the weight, of every variable but those given to `exclude`.
    """

    def __init__(
        self, learning_rate: Any, momentum: float = 0.9, l2: float = 0.0, name: str = "sgd", **kwargs: Any
    ) -> None:
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        self.momentum, self.l2 = momentum, l2
        self._rates: dict[object, float] = {}

    def exclude(self, variables: Iterable[Any]) -> None:
        """Leaves variables out of the regularisation; to be called before the first step."""
        self.exclude_from_weight_decay(var_list=list(variables))

    def scale_learning_rate(self, variables: Iterable[Any], factor: float) -> None:
        """Multiplies the learning rate of variables; to be called before the first step."""
        self._rates |= {self._var_key(variable): factor for variable in variables}

    def build(self, variables: list[Any]) -> None:
        if self.built:
            return
        super().build(variables)
        self.velocities = self.add_optimizer_variables(variables, "velocity")

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        if self.l2 and self._use_weight_decay(variable):
            gradient = gradient + self.l2 * variable
        velocity = self.velocities[self._get_variable_index(variable)]
        new_velocity = self.momentum * velocity + gradient
        self.assign(velocity, new_velocity)
        rate = ops.cast(learning_rate, variable.dtype) * self._rates.get(self._var_key(variable), 1.0)
        self.assign_sub(variable, rate * (gradient + self.momentum * new_velocity))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "momentum": self.momentum, "l2": self.l2}

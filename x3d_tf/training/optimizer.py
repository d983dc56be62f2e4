"""Stochastic gradient descent with PyTorch's update rule, for which the X3D recipe was tuned."""

from collections.abc import Iterable
from typing import Any

import keras
from keras import ops


@keras.saving.register_keras_serializable("x3d_tf")
class SGD(keras.optimizers.Optimizer):
    """SGD with Nesterov momentum and L2 regularisation.

    Keras' own SGD differs in two ways. Its weight decay bypasses the momentum, and its velocity includes the learning
    rate, so that a change of the rate does not affect past gradients.

    Args:
        learning_rate: a number or a schedule.
        momentum: decay of the velocity per step.
        l2: L2 coefficient: `l2 * variable` is added to the gradient, except for variables passed to `exclude`.
        name: name of the optimizer.
        **kwargs: further arguments of `keras.optimizers.Optimizer`.
    """

    def __init__(
        self, learning_rate: Any, momentum: float = 0.9, l2: float = 0.0, name: str = "sgd", **kwargs: Any
    ) -> None:
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        self.momentum, self.l2 = momentum, l2
        self._lr_factors: dict[object, float] = {}

    def exclude(self, variables: Iterable[Any]) -> None:
        """Excludes variables from the L2 regularisation. Call it before the first step."""
        self.exclude_from_weight_decay(var_list=list(variables))

    def scale_learning_rate(self, variables: Iterable[Any], factor: float) -> None:
        """Multiplies the learning rate of variables by `factor`. Call it before the first step."""
        self._lr_factors |= {self._var_key(variable): factor for variable in variables}

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
        rate = ops.cast(learning_rate, variable.dtype) * self._lr_factors.get(self._var_key(variable), 1.0)
        self.assign_sub(variable, rate * (gradient + self.momentum * new_velocity))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "momentum": self.momentum, "l2": self.l2}

"""Checkpoints of a run: the two newest are kept, and a damaged one falls back to the one before."""

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorflow as tf

from x3d_tf._checks import UserError, require
from x3d_tf.modeling.description import Description
from x3d_tf.modeling.x3d import X3D
from x3d_tf.runs.run_folder import RunFolder

_KEPT = 2
_WEIGHT_BYTES = 4  # of float32
_SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"


class Checkpoints:
    """Everything that the next step depends on, on disk: weights, moving statistics, optimiser, random state, step.

    Args:
        folder: where they lie; made if absent.
        model: built; with the class names of the run.
        others: further variables by their role; the average of the weights is called "average".
        fingerprint: of configuration and records; a checkpoint of others is refused.
    """

    def __init__(self, folder: Path, model: X3D, others: Mapping[str, list[Any]], fingerprint: str) -> None:
        self.folder, self._wanted = folder, fingerprint
        weights = [weight.value for weight in model.weights]
        # By hand: Keras' own tracking leaves out the states of the seed generators.
        seeds = [variable.value for variable in model.variables if "seed_generator" in variable.path]
        roles = {"weights": weights, "seeds": seeds, **others}
        description = Description.of(model, class_names=model.class_names, form="trainable")
        self._checkpoint = tf.train.Checkpoint(
            **{role: {str(i): variable for i, variable in enumerate(part)} for role, part in roles.items() if part},
            fingerprint=tf.Variable(fingerprint, trainable=False),
            description=tf.Variable(description.to_json(), trainable=False),
        )
        self._manager = tf.train.CheckpointManager(self._checkpoint, str(folder), max_to_keep=_KEPT)

    def save(self, step: int) -> None:
        """Writes the checkpoint of a step and deletes the oldest."""
        self._manager.save(checkpoint_number=step)

    def restore(self) -> int:
        """Restores the newest whole checkpoint and returns its step; 0 if there are none.

        Raises:
            UserError: there are checkpoints, but none is whole; or it is of another configuration or other records.
        """
        steps = checkpoint_steps(self.folder)
        for step in reversed(steps):
            prefix = _prefix(self.folder, step)
            try:
                # First, for the variables of another network would not fit.
                fingerprint = tf.train.load_checkpoint(prefix).get_tensor(f"fingerprint{_SUFFIX}").decode()
                if fingerprint == self._wanted:
                    self._checkpoint.restore(prefix).assert_consumed()
            except Exception as error:  # a damaged file makes TensorFlow raise almost anything
                print(
                    f"warning: {prefix}.index cannot be read ({_line(error)}); trying the one before", file=sys.stderr
                )
                continue
            if fingerprint != self._wanted:
                raise UserError(
                    f"{prefix}.index is of another configuration, or of records that have been built anew since; "
                    "choose another --workdir"
                )
            return step
        if steps:
            raise UserError(f"no checkpoint in {self.folder} can be read. Delete the folder to train from the start")
        return 0


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint in a folder, ascending; files of other names are left out."""
    numbers = [path.name.removeprefix("ckpt-").removesuffix(".index") for path in folder.glob("ckpt-*.index")]
    return sorted(int(number) for number in numbers if number.isdigit())


def load_checkpoint(run: RunFolder, step: int) -> X3D:
    """The network of a run as it was at a step, with the weights that are tested: their average where the run has one.

    Raises:
        UserError: there is no such checkpoint (any more), or it is damaged.
    """
    prefix = _prefix(run.checkpoints, step)
    try:
        reader = tf.train.load_checkpoint(prefix)
        room = sum(file.stat().st_size for file in run.checkpoints.glob(f"ckpt-{step}.data-*"))
        elements = sum(math.prod(shape) for shape in reader.get_variable_to_shape_map().values())
        require(elements <= room, "its variables", f"have at most {room} elements, one a byte", elements)
        description = Description.from_json(reader.get_tensor(f"description{_SUFFIX}"))
        role = "average" if reader.has_tensor(f"average/0{_SUFFIX}") else "weights"
        description.require_fit("its data", room // _WEIGHT_BYTES)
        model = X3D(description.expansion, description.num_classes, description.options, task=description.task)
        model.set_weights([reader.get_tensor(f"{role}/{i}{_SUFFIX}") for i in range(len(model.weights))])
    except Exception as error:  # a damaged file makes TensorFlow raise almost anything
        raise UserError(f"{prefix}.index cannot be read ({_line(error)})") from error
    model.class_names, model.squeeze = description.class_names, description.squeeze
    return model


def _prefix(folder: Path, step: int) -> str:
    return str(folder / f"ckpt-{step}")


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0]

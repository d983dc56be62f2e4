"""Checkpoints of a run: the two newest are kept, and a damaged one falls back to the one before."""

import sys
from pathlib import Path

import keras
import tensorflow as tf

from x3d_tf._checks import UserError

_KEPT = 2
_FINGERPRINT_KEY = "fingerprint/.ATTRIBUTES/VARIABLE_VALUE"


class Checkpoints:
    """Everything that the next step depends on, on disk: weights, moving statistics, optimiser, random state, step.

    Args:
        folder: where they lie; made if absent.
        model, optimizer: built; their variables are saved and restored.
        fingerprint: of configuration and records; a checkpoint of others is refused.
    """

    def __init__(
        self, folder: Path, model: keras.Model, optimizer: keras.optimizers.Optimizer, fingerprint: str
    ) -> None:
        self.folder, self._wanted = folder, fingerprint
        # By hand: Keras' own tracking leaves out the states of the seed generators. The optimiser counts the steps.
        variables = [*model.variables, *optimizer.variables]
        self._checkpoint = tf.train.Checkpoint(
            variables={str(number): variable.value for number, variable in enumerate(variables)},
            fingerprint=tf.Variable(fingerprint, trainable=False),
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
        found = sorted(self.folder.glob("ckpt-*.index"), key=_step_of, reverse=True)
        for path in found:
            prefix = str(path.with_suffix(""))
            try:
                # First, for the variables of another network would not fit.
                fingerprint = tf.train.load_checkpoint(prefix).get_tensor(_FINGERPRINT_KEY).decode()
                if fingerprint == self._wanted:
                    self._checkpoint.restore(prefix).assert_consumed()
            except Exception as error:  # a damaged file makes TensorFlow raise almost anything
                reason = str(error).partition("\n")[0]
                print(f"warning: {path} cannot be read ({reason}); trying the one before", file=sys.stderr)
                continue
            if fingerprint != self._wanted:
                raise UserError(
                    f"{path} is of another configuration, or of records that have been built anew since; choose "
                    "another --workdir"
                )
            return _step_of(path)
        if found:
            raise UserError(f"no checkpoint in {self.folder} can be read. Delete the folder to train from the start")
        return 0


def _step_of(path: Path) -> int:
    """The step in `ckpt-STEP.index`; -1 for other names, which come last."""
    number = path.name.removeprefix("ckpt-").removesuffix(".index")
    return int(number) if number.isdigit() else -1

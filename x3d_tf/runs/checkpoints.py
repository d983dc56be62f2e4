"""Training checkpoints. The two newest are kept; if the newest is damaged, the one before it is restored.

A checkpoint of step N consists of two files, `ckpt-N.data-00000-of-00001` and `ckpt-N.index`. It exists if the second
one does. The step is also stored in it, so that renamed files are detected.

Checkpoints are found by listing the folder. TensorFlow's own list, the text file `checkpoint`, is neither written nor
read: in a run folder from an untrusted source, it could cause arbitrary files to be deleted.
"""

import json
import math
import os
import re
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tensorflow as tf

from x3d_tf.errors import UserError, first_line, require
from x3d_tf.files import WriteError, os_errors_as_write_error
from x3d_tf.modeling.detection import Detector
from x3d_tf.modeling.metadata import Metadata, copy_metadata
from x3d_tf.modeling.saving import build_network
from x3d_tf.modeling.x3d import X3D, Network
from x3d_tf.runs.run_folder import RunFolder, checkpoint_step
from x3d_tf.text import counted

_KEPT = 2
_WEIGHT_BYTES = 4  # float32
_SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"
_ENDINGS = (".data-00000-of-00001", ".index")  # in the order in which they are renamed
_PARTIAL = ".partial-ckpt"
# Temporary files of this module, and of TensorFlow's CheckpointManager, after a crash.
_LEFTOVER = re.compile(r"\.partial-ckpt(\.index|\.data-[0-9]{5}-of-[0-9]{5}|_temp)|ckpt-[0-9]+_temp", re.ASCII)
_DATA = re.compile(r"ckpt-([0-9]+)\.data-00000-of-00001", re.ASCII)


@dataclass(frozen=True)
class Origin:
    """Identity of a run: two checkpoints of the same step are equal if their origins are.

    Attributes:
        config: fingerprint of the configuration; see `TrainConfig.fingerprint`.
        records: fingerprint of the manifest.
        clips_per_group: number of clips that share batch-norm statistics; 0 if batch norm is frozen.
        groups_per_step: number of batch-norm groups per step, over all devices.
    """

    config: str
    records: str
    clips_per_group: int
    groups_per_step: int

    @property
    def groups(self) -> str:
        """Description of the batch-norm groups, such as "2 groups of 4 clips"."""
        if not self.clips_per_group:
            return "none"
        return f"{counted(self.groups_per_step, 'group')} of {counted(self.clips_per_group, 'clip')}"


class Checkpoints:
    """Saves and restores the complete training state: weights, statistics, optimizer, random state and step.

    Args:
        run: the run folder.
        model: the network, built, with its class names set.
        others: further variables by role, see `TrainStep.variables`. The EMA of the weights has the role "average".
        origin: the identity of this run. Checkpoints of another origin are rejected.
    """

    def __init__(self, run: RunFolder, model: Network, others: Mapping[str, list[Any]], origin: Origin) -> None:
        self.folder, self._run, self._origin = run.checkpoints, run, origin
        roles = state_of(model, others)
        description = Metadata.from_model(model, class_names=model.class_names, form="trainable")
        self._texts = {"origin": json.dumps(asdict(origin)), "description": description.to_json()}
        self._variables = {name: tf.Variable(text, trainable=False) for name, text in self._texts.items()}
        self._step = tf.Variable(0, trainable=False, dtype=tf.int64)
        self._checkpoint = tf.train.Checkpoint(
            **{role: {str(i): variable for i, variable in enumerate(part)} for role, part in roles.items() if part},
            **self._variables,
            step=self._step,
        )
        self._newest: int | None = None  # intact, and written or read by this process

    def save(self, step: int) -> None:
        """Writes the checkpoint of a step and deletes older ones that are no longer needed.

        Raises:
            WriteError: the checkpoint cannot be written. Its files are removed, and earlier checkpoints are kept.
        """
        if step == self._newest:  # rewriting the same content would put an intact checkpoint at risk
            return
        index = Path(f"{_prefix(self.folder, step)}.index")
        try:
            with os_errors_as_write_error(index):
                self.folder.mkdir(exist_ok=True)
                self._remove_leftovers()
                self._step.assign(step)
                partial = self._checkpoint.write(str(self.folder / _PARTIAL))
                index.unlink(missing_ok=True)  # a damaged index of this step must not be paired with the new data
                for ending in _ENDINGS:
                    _flush(Path(f"{partial}{ending}"))
                    Path(f"{partial}{ending}").replace(f"{_prefix(self.folder, step)}{ending}")
                _flush(self.folder)
        except WriteError as error:
            with suppress(OSError):
                self._remove_leftovers()
                self._remove_data_without_index()
            consequence = f"it resumes from step {self._newest}" if self._newest else "it starts from scratch"
            raise WriteError(
                f"{error}. Free disk space or fix the permissions, then run the same command again: {consequence}"
            ) from error
        self._newest = step
        self._run.mark_trained()
        self._keep_newest(step)

    def restore(self, *, allow_other_groups: bool = False) -> int:
        """Restores the newest intact checkpoint and returns its step; 0 if the folder has no checkpoints.

        Args:
            allow_other_groups: whether to accept a checkpoint with other batch-norm groups, which changes the result.

        Raises:
            UserError: all checkpoints are damaged, or the newest intact one was written with another configuration,
                other records or other batch-norm groups.
        """
        steps = checkpoint_steps(self.folder)
        for step in reversed(steps):
            prefix = _prefix(self.folder, step)
            try:
                # Compared first: the variables of another network would not match.
                origin = Origin(**json.loads(_open(self.folder, step).get_tensor(f"origin{_SUFFIX}")))
                if (origin.config, origin.records) == (self._origin.config, self._origin.records):
                    self._checkpoint.read(prefix).assert_consumed()
            except Exception as error:  # a damaged file makes TensorFlow raise almost anything
                reason = f"{prefix}.index cannot be read ({first_line(error)})"
                print(f"warning: {reason}; trying the previous checkpoint", file=sys.stderr)
                continue
            self._require_same_origin(origin, prefix, allow_other_groups)
            for name, text in self._texts.items():
                self._variables[name].assign(text)
            self._newest = step
            self._run.mark_trained()
            self._remove_leftovers()
            self._remove_data_without_index()
            for old in [s for s in steps if s <= step][:-_KEPT]:  # the run may have been killed before deleting them
                _remove(self.folder, old)
            return step
        if steps:
            raise UserError(
                f"no checkpoint in {self.folder} can be read. Restore them from a backup, choose another --workdir, "
                f"or delete {self._run.root} to train from scratch"
            )
        return 0

    def _require_same_origin(self, origin: Origin, prefix: str, allow_other_groups: bool) -> None:
        ours = self._origin
        if origin.config != ours.config:
            raise UserError(f"{prefix}.index was written with another configuration; choose another --workdir")
        if origin.records != ours.records:
            raise UserError(
                f"{prefix}.index was trained on other records than those of DatasetSpec.records: the manifest's "
                f"fingerprint is {ours.records[:12]}, that of the checkpoint is {origin.records[:12]}. Set "
                "DatasetSpec.records to the original records, or choose another --workdir"
            )
        if origin.groups != ours.groups and not allow_other_groups:
            raise UserError(
                f"{prefix}.index was trained with other batch-norm groups: {origin.groups} per step, now {ours.groups} "
                "(they depend on the number of devices, Execution.accumulation and Recipe.batch). Train on the same "
                "number of devices, or accept a different result with --allow_other_groups"
            )

    def _keep_newest(self, step: int) -> None:
        """Deletes all checkpoints except the newest up to `step`. Later ones are damaged: `restore` skipped them."""
        steps = checkpoint_steps(self.folder)
        kept = [s for s in steps if s <= step][-_KEPT:]
        for old in steps:
            if old not in kept:
                _remove(self.folder, old)
        self._remove_data_without_index()

    def _remove_leftovers(self) -> None:
        """Removes the temporary files of a process that was killed while saving."""
        for path in _list_folder(self.folder):
            if _LEFTOVER.fullmatch(path.name) is None:
                continue
            if path.is_dir() and not path.is_symlink():  # only the link itself is removed, not its target
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _remove_data_without_index(self) -> None:
        steps = set(checkpoint_steps(self.folder))
        for path in _list_folder(self.folder):
            match = _DATA.fullmatch(path.name)
            if match and int(match[1]) not in steps and not (path.is_dir() and not path.is_symlink()):
                path.unlink(missing_ok=True)


def state_of(model: Network, others: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Returns the variables of the training state by role: those of the network, and the others."""
    weights = [weight.value for weight in model.weights]
    # Listed explicitly, because Keras' own tracking omits the states of seed generators.
    seeds = [variable.value for variable in model.variables if "seed_generator" in variable.path]
    return {"weights": weights, "seeds": seeds, **others}


def checkpoint_steps(folder: Path) -> list[int]:
    """Returns the steps with a checkpoint in a folder, ascending. Ignores other files."""
    steps = (checkpoint_step(path.name) for path in _list_folder(folder))
    return sorted(step for step in steps if step is not None)


def load_checkpoint(run: RunFolder, step: int) -> X3D | Detector:
    """Loads the network of a run at a step, with the weights to evaluate: their EMA if the run has one.

    Raises:
        UserError: the checkpoint does not exist, was deleted meanwhile, or is damaged.
    """
    prefix = _prefix(run.checkpoints, step)
    try:
        reader = _open(run.checkpoints, step)
        size = Path(f"{prefix}{_ENDINGS[0]}").stat().st_size
        description = Metadata.from_json(reader.get_tensor(f"description{_SUFFIX}"))
        role = "average" if reader.has_tensor(f"average/0{_SUFFIX}") else "weights"
        description.require_capacity("its data", size // _WEIGHT_BYTES)
        model = build_network(description)
        model.set_weights([reader.get_tensor(f"{role}/{i}{_SUFFIX}") for i in range(len(model.weights))])
    except Exception as error:  # a damaged file makes TensorFlow raise almost anything
        raise UserError(f"{prefix}.index cannot be read ({first_line(error)})") from error
    copy_metadata(description, model)
    return model


def _open(folder: Path, step: int) -> Any:
    """Opens a checkpoint and checks that its tensors fit into its file, because TensorFlow allocates before reading.

    Raises:
        UserError: the tensors do not fit, a file is missing, or the checkpoint was saved at another step.
        Exception: any error of TensorFlow, if the checkpoint is damaged.
    """
    prefix = _prefix(folder, step)
    for ending in _ENDINGS:  # TensorFlow would block forever on a named pipe
        if not Path(f"{prefix}{ending}").is_file():
            raise UserError(f"{prefix}{ending} does not exist or is not a file")
    data = Path(f"{prefix}{_ENDINGS[0]}")
    size = data.stat().st_size
    if Path(prefix).is_dir():
        raise UserError(f"{prefix} must not be a folder: TensorFlow would read the checkpoint from it; remove it")
    reader = tf.train.load_checkpoint(prefix)
    types, left = reader.get_variable_to_dtype_map(), size
    for name, shape in reader.get_variable_to_shape_map().items():
        # A string takes at least one byte in the file for its length, and 24 bytes in memory.
        left -= math.prod(shape) * (types[name].size if types[name] != tf.string else 24 if shape else 1)
        require(left >= 0, f"the tensors of {prefix}.index", f"fit into the {size} bytes of {data.name}", name)
    stored = int(reader.get_tensor(f"step{_SUFFIX}"))
    require(stored == step, f"the step in {prefix}.index", f"be {step}, as in its file name", stored)
    return reader


def _remove(folder: Path, step: int) -> None:
    """Removes the checkpoint of a step. The index goes first, so that no index without data is ever left."""
    for ending in reversed(_ENDINGS):
        Path(f"{_prefix(folder, step)}{ending}").unlink(missing_ok=True)


def _list_folder(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _flush(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prefix(folder: Path, step: int) -> str:
    return str(folder / f"ckpt-{step}")

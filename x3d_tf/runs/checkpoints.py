"""Checkpoints of a run: the two newest are kept, and a damaged one falls back to the one before.

A checkpoint of step N is two files, `ckpt-N.data-00000-of-00001` and `ckpt-N.index`, and exists when the second does.
It also holds N, so that renamed files are refused.
Which there are is read from the folder's listing alone. TensorFlow's own list, a text file `checkpoint` with paths, is
neither written nor read: a run folder may come from somebody else, and what such a text names would be deleted.
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
from x3d_tf.modeling.metadata import Metadata
from x3d_tf.modeling.x3d import X3D
from x3d_tf.runs.run_folder import RunFolder, checkpoint_step
from x3d_tf.text import counted

_KEPT = 2
_WEIGHT_BYTES = 4  # of float32
_SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"
_ENDINGS = (".data-00000-of-00001", ".index")  # in the order in which they get their names
_PARTIAL = ".partial-ckpt"
# What this module leaves where it is killed, and what TensorFlow's manager left.
_LEFTOVER = re.compile(r"\.partial-ckpt(\.index|\.data-[0-9]{5}-of-[0-9]{5}|_temp)|ckpt-[0-9]+_temp", re.ASCII)
_DATA = re.compile(r"ckpt-([0-9]+)\.data-00000-of-00001", re.ASCII)


@dataclass(frozen=True)
class Origin:
    """Everything besides its step that the content of a checkpoint depends on.

    Attributes:
        config: fingerprint of the configuration, see `TrainConfig.fingerprint`.
        records: fingerprint of the manifest.
        clips_per_group: clips that share batch-norm statistics; 0 where batch norm is frozen.
        groups_per_step: such groups of a step, over all devices.
    """

    config: str
    records: str
    clips_per_group: int
    groups_per_step: int

    @property
    def groups(self) -> str:
        """The batch-norm groups in words."""
        if not self.clips_per_group:
            return "none"
        return f"{counted(self.groups_per_step, 'group')} of {counted(self.clips_per_group, 'clip')}"


class Checkpoints:
    """Everything that the next step depends on, on disk: weights, moving statistics, optimiser, random state, step.

    Args:
        run: whose they are.
        model: built; with the class names of the run.
        others: further variables by their role; the average of the weights is called "average".
        origin: a checkpoint of another one is refused.
    """

    def __init__(self, run: RunFolder, model: X3D, others: Mapping[str, list[Any]], origin: Origin) -> None:
        self.folder, self._run, self._origin = run.checkpoints, run, origin
        weights = [weight.value for weight in model.weights]
        # By hand: Keras' own tracking leaves out the states of the seed generators.
        seeds = [variable.value for variable in model.variables if "seed_generator" in variable.path]
        roles = {"weights": weights, "seeds": seeds, **others}
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
        """Writes the checkpoint of a step and deletes what it makes superfluous.

        Raises:
            WriteError: it cannot be written; nothing of it is left behind, and the checkpoints from before stay.
        """
        if step == self._newest:  # the same content; to write it again would put an intact checkpoint at risk
            return
        index = Path(f"{_prefix(self.folder, step)}.index")
        try:
            with os_errors_as_write_error(index):
                self.folder.mkdir(exist_ok=True)
                self._remove_leftovers()
                self._step.assign(step)
                partial = self._checkpoint.write(str(self.folder / _PARTIAL))
                index.unlink(missing_ok=True)  # a damaged one of this step must not meet the new data
                for ending in _ENDINGS:
                    _flush(Path(f"{partial}{ending}"))
                    Path(f"{partial}{ending}").replace(f"{_prefix(self.folder, step)}{ending}")
                _flush(self.folder)
        except WriteError as error:
            with suppress(OSError):
                self._remove_leftovers()
                self._remove_data_without_index()
            does = f"resumes from step {self._newest}" if self._newest else "starts from scratch"
            raise WriteError(f"{error}. Once there is room, or permission, the same command {does}") from error
        self._newest = step
        self._run.mark_trained()
        self._keep_newest(step)

    def restore(self, *, allow_other_groups: bool = False) -> int:
        """Restores the newest intact checkpoint and returns its step; 0 if there are none.

        Args:
            allow_other_groups: whether the run may continue with other batch-norm groups, which change its outcome.

        Raises:
            UserError: there are checkpoints, but none is intact; or it is of another configuration, of other records,
                or of other batch-norm groups.
        """
        steps = checkpoint_steps(self.folder)
        for step in reversed(steps):
            prefix = _prefix(self.folder, step)
            try:
                # First, for the variables of another network would not fit.
                origin = Origin(**json.loads(_open(self.folder, step).get_tensor(f"origin{_SUFFIX}")))
                if (origin.config, origin.records) == (self._origin.config, self._origin.records):
                    self._checkpoint.read(prefix).assert_consumed()  # neither variable nor content is left over
            except Exception as error:  # a damaged file makes TensorFlow raise almost anything
                told = f"{prefix}.index cannot be read ({first_line(error)})"
                print(f"warning: {told}; trying the one before", file=sys.stderr)
                continue
            self._check(origin, prefix, allow_other_groups)
            for name, text in self._texts.items():
                self._variables[name].assign(text)
            self._newest = step
            self._run.mark_trained()
            self._remove_leftovers()
            self._remove_data_without_index()
            for other in [own for own in steps if own <= step][:-_KEPT]:  # of a run that was killed as it saved
                _remove(self.folder, other)
            return step
        if steps:
            raise UserError(
                f"no checkpoint in {self.folder} can be read. Restore them from a copy, choose another --workdir, or "
                f"delete {self._run.root} to train from scratch"
            )
        return 0

    def _check(self, origin: Origin, prefix: str, allow_other_groups: bool) -> None:
        ours = self._origin
        if origin.config != ours.config:
            raise UserError(f"{prefix}.index is of another configuration; choose another --workdir")
        if origin.records != ours.records:
            raise UserError(
                f"{prefix}.index was trained on other records than those of DatasetSpec.records: the fingerprint of "
                f"their manifest is {origin.records[:12]} there and {ours.records[:12]} here. Give the folder of the "
                "same records, or choose another --workdir"
            )
        if origin.groups != ours.groups and not allow_other_groups:
            raise UserError(
                f"{prefix}.index was trained with {origin.groups} a step for batch norm, and here there would be "
                f"{ours.groups} (the number of devices, Execution.accumulation and Recipe.batch decide it). Train on "
                "as many devices as before, or accept another outcome with --allow_other_groups"
            )

    def _keep_newest(self, step: int) -> None:
        """Deletes all but the newest up to a step; later ones are damaged, or the run would have resumed from them."""
        steps = checkpoint_steps(self.folder)
        kept = [own for own in steps if own <= step][-_KEPT:]
        for other in steps:
            if other not in kept:
                _remove(self.folder, other)
        self._remove_data_without_index()

    def _remove_leftovers(self) -> None:
        """Removes what a killed process had not finished writing."""
        for path in _listed(self.folder):
            if _LEFTOVER.fullmatch(path.name) is None:
                continue
            if path.is_dir() and not path.is_symlink():  # a link goes, and what it leads to stays
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _remove_data_without_index(self) -> None:
        steps = set(checkpoint_steps(self.folder))
        for path in _listed(self.folder):
            match = _DATA.fullmatch(path.name)
            if match and int(match[1]) not in steps and not (path.is_dir() and not path.is_symlink()):
                path.unlink(missing_ok=True)


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint in a folder, ascending; files of other names are left out."""
    steps = (checkpoint_step(path.name) for path in _listed(folder))
    return sorted(step for step in steps if step is not None)


def load_checkpoint(run: RunFolder, step: int) -> X3D:
    """The network of a run as it was at a step, with the weights that are tested: their average where the run has one.

    Raises:
        UserError: there is no such checkpoint (any more), or it is damaged.
    """
    prefix = _prefix(run.checkpoints, step)
    try:
        reader = _open(run.checkpoints, step)
        room = Path(f"{prefix}{_ENDINGS[0]}").stat().st_size
        description = Metadata.from_json(reader.get_tensor(f"description{_SUFFIX}"))
        role = "average" if reader.has_tensor(f"average/0{_SUFFIX}") else "weights"
        description.require_capacity("its data", room // _WEIGHT_BYTES)
        model = X3D(description.expansion, description.num_classes, description.options, task=description.task)
        model.set_weights([reader.get_tensor(f"{role}/{i}{_SUFFIX}") for i in range(len(model.weights))])
    except Exception as error:  # a damaged file makes TensorFlow raise almost anything
        raise UserError(f"{prefix}.index cannot be read ({first_line(error)})") from error
    model.copy_metadata(description)
    return model


def _open(folder: Path, step: int) -> Any:
    """A reader of a checkpoint whose tensors are no larger than its file: TensorFlow allocates before it reads.

    Raises:
        UserError: they are larger, the files are none or of another step; TensorFlow's own errors where it is damaged.
    """
    prefix = _prefix(folder, step)
    for ending in _ENDINGS:  # TensorFlow would wait for ever for what comes through a pipe
        if not Path(f"{prefix}{ending}").is_file():
            raise UserError(f"{prefix}{ending} does not exist or is not a file")
    data = Path(f"{prefix}{_ENDINGS[0]}")
    size = data.stat().st_size
    if Path(prefix).is_dir():
        raise UserError(f"{prefix} must not be a folder, from which TensorFlow would read another checkpoint")
    reader = tf.train.load_checkpoint(prefix)
    types, left = reader.get_variable_to_dtype_map(), size
    for name, shape in reader.get_variable_to_shape_map().items():
        # A text takes a byte at least for its length, and what TensorFlow allocates for it takes 24.
        left -= math.prod(shape) * (types[name].size if types[name] != tf.string else 24 if shape else 1)
        require(left >= 0, f"tensors of {prefix}.index", f"fit into the {size} bytes of {data.name}", name)
    stored = int(reader.get_tensor(f"step{_SUFFIX}"))
    require(stored == step, f"the step in {prefix}.index", f"be {step}, as its name says", stored)
    return reader


def _remove(folder: Path, step: int) -> None:
    """Removes the checkpoint of a step; the index first, so that none without its data is ever there."""
    for ending in reversed(_ENDINGS):
        Path(f"{_prefix(folder, step)}{ending}").unlink(missing_ok=True)


def _listed(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _flush(path: Path) -> None:
    """Waits until a file, or the list of a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prefix(folder: Path, step: int) -> str:
    return str(folder / f"ckpt-{step}")

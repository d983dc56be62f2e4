"""The model to export: its network, its class names, and the model card that ships with every artefact."""

import dataclasses
import hashlib
import re
import unicodedata
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import x3d_tf
from x3d_tf.config import TrainConfig
from x3d_tf.data.sampling import FrameSampling
from x3d_tf.errors import UserError, require
from x3d_tf.evaluation.reports import RESULTS_NAME, read_results, stated_metrics
from x3d_tf.modeling.archive import model_file
from x3d_tf.modeling.cards import card_entry
from x3d_tf.modeling.expansion import name_of
from x3d_tf.modeling.keras_parts import MEAN, STD
from x3d_tf.modeling.metadata import Metadata
from x3d_tf.modeling.saving import load
from x3d_tf.modeling.x3d import Network, cost_of
from x3d_tf.runs.run_folder import RunFolder
from x3d_tf.tasks.base import Task, find
from x3d_tf.text import counted
from x3d_tf.types import ViewSpec

_LONGEST_NAME = 100  # bytes; leaves space for the format, the suffix and the mark of a temporary file


@dataclass(frozen=True, eq=False)
class ExportableModel:
    """A model to export.

    Attributes:
        path: run folder or `.keras` file that the model was loaded from.
        model: trainable network with its classifier.
        class_names: one name per output.
        run: settings of the run; None if `path` is not a run folder with settings.
    """

    path: Path
    model: Network
    class_names: tuple[str, ...]
    run: TrainConfig | None

    @property
    def name(self) -> str:
        """Name of the exported files: that of the run folder, or of the `.keras` file without its suffix.

        Characters other than letters, digits, `_`, `.` and `-` become `_`. Leading `.` and `-` are removed, because
        they would hide the file or read as an option of a command. If nothing remains, it is the network's name.
        """
        given = self.path.resolve().name if self.path.is_dir() else self.path.stem
        name = re.sub(r"[^\w.-]+", "_", unicodedata.normalize("NFC", given)).lstrip(".-")
        return name.encode()[:_LONGEST_NAME].decode(errors="ignore") or self.model.name

    @property
    def task(self) -> Task:
        """The task of the network."""
        return find(self.model.task)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the network's inputs: "clip", and those that its head takes besides, such as "boxes"."""
        return tuple(self.model.input) if isinstance(self.model.input, dict) else ("clip",)

    @property
    def frame_sampling(self) -> FrameSampling:
        """Frame sampling of a clip, as in training; see `x3d_tf.data.sampling.frame_indices`."""
        return self.model.frame_sampling

    @property
    def views(self) -> ViewSpec:
        """Evaluation view of a video: one clip with a centre crop."""
        model = self.model
        return ViewSpec(temporal_views=1, resize=model.expansion.test_size, crop=model.eval_size, stretch=model.stretch)

    @property
    def weights_sha256(self) -> str:
        """SHA-256 of the model file, which identifies the weights that an artefact was exported from."""
        return hashlib.sha256(model_file(self.path).read_bytes()).hexdigest()

    def card(self, batch: int | None = None) -> dict[str, Any]:
        """Returns the model card: input, output, cost and origin of the model.

        All values can be written as JSON. `input` has the entries of the run folder's `input.json`, and the shape and
        the normalization of the input tensor.

        Args:
            batch: batch size of the artefact. Defaults to a dynamic one, "N".
        """
        model, clip = self.model, self.model.clip
        cost = cost_of(model)
        metadata = Metadata.from_model(model, class_names=self.class_names, form="exported", size=model.eval_size)
        return {
            "network": name_of(model.expansion, model.options.family),
            "created_by": f"x3d_tf {x3d_tf.__version__}",
            "task": model.task,
            "input": {
                **self.task.input_contract(model),
                "shape": [batch or "N", clip.frames, model.eval_size, model.eval_size, 3],
                "normalisation": f"inside the model: (value - {MEAN:g}) / {STD:g}",
            },
            "output": self.task.output,
            "classes": list(self.class_names),
            "expansion": dataclasses.asdict(model.expansion),
            "options": dataclasses.asdict(model.options),
            "gmacs_per_clip": cost.macs / 1e9,
            "params": cost.params,
            "weights_sha256": self.weights_sha256,
            **card_entry(metadata),
            "training": self._training(),
        }

    def _training(self) -> dict[str, Any] | None:
        """Returns the settings and the results of the run; None for a `.keras` file, which does not store them."""
        if self.run is None:
            return None
        run, dataset, recipe = RunFolder(self.path), self.run.dataset, self.run.recipe
        return {
            "run": self.path.resolve().name,
            "records": dataset.records,
            "split": dataset.train_split,
            "steps": recipe.steps,
            "batch": recipe.batch,
            "seed": self.run.seed,
            "init": self.run.init,
            "settings_sha256": self.run.fingerprint(),
            **run.read_recipe(),
            "tested": [_tested(results) for results in _valid_results(run)],
        }


def _valid_results(run: RunFolder) -> Iterator[dict[str, Any]]:
    """Yields the content of the run's reports; warns of those that this version of the package cannot read."""
    for path in sorted(run.evaluations.glob(f"*/{RESULTS_NAME}")):
        try:
            yield read_results(path)
        except UserError as error:
            warnings.warn(f"the model card omits a report: {error}", stacklevel=2)


def _tested(results: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entry of a card for results.json: what was evaluated, and the metrics."""
    metrics = [metric.name for metric in stated_metrics(results)]
    return {name: results[name] for name in ("records", "split", "sample", "samples", "views", *metrics)}


def open_model(path: str | Path, *, inputs: Collection[str] = ("clip",)) -> ExportableModel:
    """Loads a model for export. Warns if its classes have no names.

    Args:
        path: run folder, or `.keras` file saved by this package.
        inputs: names of the inputs that the exporter supports; see `ExportableModel.inputs`.

    Raises:
        UserError: the file does not exist or was not saved by this package; the network has no classifier or another
            input; no task has the name of its task; the run is damaged.
    """
    path = Path(path)
    model = load(path)
    find(model.task)
    require(model.include_top, f"the network in {path}", "have a classifier (include_top=True)")
    names = model.class_names
    if names == tuple(str(number) for number in range(len(names))):
        warnings.warn(f"{path} has no class names: {counted(len(names), 'class')} numbered from 0", stacklevel=2)
    run = RunFolder(path)
    source = ExportableModel(path, model, names, run.read_config() if run.config.is_file() else None)
    others = [name for name in source.inputs if name not in inputs]
    if others:
        hint = "; export it as a SavedModel, or as an ONNX or OpenVINO file" if others == ["boxes"] else ""
        raise UserError(f"{path} has the input {others[0]} besides the clip, which this format does not support{hint}")
    return source

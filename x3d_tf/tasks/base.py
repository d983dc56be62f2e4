"""The Protocol of a task: everything that depends on the kind of prediction. Imports no TensorFlow.

Tasks are listed in the module attribute `TASKS` and found by name: those of this package, of plugins, and of installed
packages with entry points in the group `x3d_tf.tasks`. A module of tasks imports TensorFlow only inside methods, so
that commands can check names and settings before it starts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from x3d_tf.data.datasets.spec import open_dataset, require_annotations
from x3d_tf.errors import UserError, first_few
from x3d_tf.evaluation.interfaces import Evaluator, Validation
from x3d_tf.modeling.archive import describe_any
from x3d_tf.registry import Registry
from x3d_tf.text import counted
from x3d_tf.types import Metric

if TYPE_CHECKING:
    import tensorflow as tf

    from x3d_tf.config import TrainConfig
    from x3d_tf.data.records.index import Record
    from x3d_tf.data.records.manifest import Manifest
    from x3d_tf.evaluation.eval_config import EvalConfig
    from x3d_tf.modeling.metadata import Metadata
    from x3d_tf.modeling.x3d import Network
    from x3d_tf.runs.run_folder import RunFolder
    from x3d_tf.runtimes.classifier_file import ClassifierFile


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


class PredictionJob(Protocol):
    """A job of the predict command."""

    def run(self, paths: Sequence[Path]) -> int:
        """Predicts videos, prints the results and writes the output files. Returns the number of failed videos."""


@dataclass(frozen=True)
class Suggestion:
    """A recipe for new records.

    Attributes:
        gin_files: configuration files.
        bindings: gin bindings.
        largest_batch: clips; None for the batch of the recipe.
        note: what the recipe starts from, such as " from Kinetics weights".
    """

    gin_files: tuple[str, ...]
    bindings: Mapping[str, str | int] = field(default_factory=dict)
    largest_batch: int | None = None
    note: str = ""


class Task(Evaluator, Protocol):
    """A kind of prediction.

    Attributes:
        name: the name by which settings, model files and results refer to the task.
        annotations: the kinds of annotation that its records may have; see `Manifest.task`.
        sample: noun for what a record is, such as "video" or "key frame".
        output: meaning of the network's output, for model cards.
        sweeps: whether an evaluation can use any number of clips per video, as `evaluate --sweep` does.
        prediction_flags: the flags of the predict command that apply, besides --model, --csv and --overwrite.
    """

    @property
    def name(self) -> str: ...

    @property
    def annotations(self) -> tuple[str, ...]: ...

    @property
    def sample(self) -> str: ...

    @property
    def output(self) -> str: ...

    @property
    def sweeps(self) -> bool: ...

    @property
    def prediction_flags(self) -> tuple[str, ...]: ...

    def check(self, config: "TrainConfig", manifest: "Manifest") -> None:
        """Checks a configuration against the records, once and before training starts.

        Args:
            config: the configuration of the run.
            manifest: the manifest of the records, with the split held out for validation.

        Raises:
            UserError: a setting does not fit the task or its records, or a metric cannot be computed on a split.
        """

    def advice(self, config: "TrainConfig", manifest: "Manifest") -> list[str]:
        """Returns warnings about records that do not fit the configuration; see `runs.advice`."""

    def classes(self, manifest: "Manifest") -> tuple[str, ...]:
        """Returns the names of the network's outputs."""

    def metrics(self, num_classes: int) -> tuple[Metric, ...]:
        """Returns the metrics of an evaluation, the main one first."""

    def training_records(self, manifest: "Manifest", split: str) -> "Sequence[Record]":
        """Returns the records of a split that are trained on."""

    def suggestion(self, manifest: "Manifest") -> Suggestion:
        """Returns the recipe that suits new records; `build_records` prints it as a command."""

    def build_network(self, config: "TrainConfig", num_classes: int) -> "Network":
        """Builds the network with randomly initialized weights."""

    def macs(self, config: "TrainConfig", num_classes: int) -> int:
        """Returns the multiply-adds of the network's forward pass for one clip; see `modeling.cost`."""

    def input_contract(self, model: "Network") -> dict[str, Any]:
        """Returns the input format of a network and the steps from a video to it; see `data.sampling`."""

    def training_clips(
        self,
        config: "TrainConfig",
        manifest: "Manifest",
        *,
        start_step: int = 0,
        worker: tuple[int, int] = (0, 1),
        replica_batch: int | None = None,
    ) -> "tf.data.Dataset":
        """Returns the infinite dataset of (inputs of the network, targets of the loss) of a run.

        Its order and its random numbers must follow from the seed and the step, so that a resumed run is exact.

        Args:
            config: the configuration of the run.
            manifest: the manifest of the records.
            start_step, worker, replica_batch: see `data.input_pipeline.training_dataset`.
        """

    def save_preview(self, config: "TrainConfig", manifest: "Manifest", path: Path, clips: int = 8) -> None:
        """Saves the first training clips with their targets as a PNG."""

    def loss(self, config: "TrainConfig", manifest: "Manifest") -> Loss:
        """Returns the loss of a run."""

    def validation(self, model: "Network", config: "TrainConfig", manifest: "Manifest", split: str) -> Validation:
        """Returns the validation of a run."""

    def check_evaluation(
        self,
        network: "Metadata | Network | ClassifierFile",
        settings: "EvalConfig",
        manifest: "Manifest",
        run: "RunFolder | None" = None,
    ) -> None:
        """Checks the settings and the records of an evaluation before TensorFlow starts.

        Args:
            network: the network, an exported file, or the metadata of either.
            settings: the settings.
            manifest: the manifest of the records.
            run: the run folder; None for a model file.

        Raises:
            UserError: the records do not suit the network; a setting does not fit the task or the network.
        """

    def check_prediction(self, metadata: "Metadata", options: Mapping[str, Any], paths: Sequence[Path]) -> None:
        """Checks the flags of the predict command, by name, before TensorFlow starts.

        Raises:
            UserError: a flag is missing or does not fit the model or the videos.
        """

    def prediction_job(self, options: Mapping[str, Any], paths: Sequence[Path]) -> PredictionJob:
        """Returns the job of the predict command; it may set the threads of TensorFlow."""


def require_known_classes(
    network: "Metadata | Network | ClassifierFile", classes: Sequence[str], records: Path
) -> None:
    """Raises `UserError` if records have classes that the network does not have."""
    known = set(network.class_names)
    unknown = [name for name in classes if name not in known]
    if unknown:
        raise UserError(
            f"{records} has {counted(len(unknown), 'class')} unknown to the model: {first_few(unknown)}. "
            f"The model has {len(network.class_names)}: {first_few(network.class_names)}. Fine-tune it on the new "
            "classes (TrainConfig.init)"
        )


_REGISTRY = Registry[Task]("task", "x3d_tf.tasks", "TASKS", (Task,))


def find(name: str) -> Task:
    """Returns a task by its name.

    Raises:
        UserError: no task has the name.
    """
    return _REGISTRY.get(name)


def task_of_records(config: "TrainConfig", manifest: "Manifest") -> Task:
    """Returns the task of a configuration, `TrainConfig.task`, or else that of the records.

    Raises:
        UserError: no task has the name, or the records are annotated for another one.
    """
    task = find(config.task or manifest.task)
    require_annotations(manifest, task.annotations)
    return task


def task_of_model(path: str | Path) -> Task:
    """Returns the task of a run folder, a `.keras` file or an exported file.

    Raises:
        UserError: the file does not exist or was not written by this package; no task has the name.
    """
    return find(describe_any(path).task)


def task_of_run(run: "RunFolder") -> Task:
    """Returns the task of a run, which need not have a model yet, from its configuration and its records."""
    config = run.read_config()
    return task_of_records(config, open_dataset(config.dataset))

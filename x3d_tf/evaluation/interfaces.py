"""Protocols of what a task evaluates: networks during training and afterwards. Imports no TensorFlow."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from x3d_tf.types import Metric

if TYPE_CHECKING:
    from x3d_tf.evaluation.eval_config import EvalConfig
    from x3d_tf.modeling.x3d import Network
    from x3d_tf.runs.run_folder import RunFolder
    from x3d_tf.runtimes.classifier_file import ClassifierFile


@dataclass(frozen=True)
class Report:
    """Results of an evaluation, and the folder of its report.

    Attributes:
        folder: contains results.json and the tables and figures of its task.
        results: the content of results.json.
    """

    folder: Path
    results: dict[str, Any]


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


class Evaluation(Protocol):
    """A network, the records to evaluate it on, and the settings.

    Attributes:
        metrics: the metrics that it measures, 1 to 20, the main one first: it is the one that a sweep plots.
        sample: noun for what is counted and whose cost is stated, such as "video" or "key frame".
    """

    @property
    def metrics(self) -> tuple[Metric, ...]: ...

    @property
    def sample(self) -> str: ...

    def settings(self) -> dict[str, Any]:
        """Returns the settings as results.json states them.

        `reports.check_settings` lists the entries that tables need: the names of the network, the records, the split
        and the views, the numbers of samples and classes, and the cost of a clip and of a sample.
        """

    def measure(self) -> dict[str, Any]:
        """Runs the evaluation and returns the values of its metrics, and further results, by name."""

    def report(self, folder: Path) -> Report:
        """Runs the evaluation and writes its report, as `reports.writing_report` does."""

    def with_views(self, temporal_views: int) -> "Evaluation":
        """Returns a copy with another number of clips per video.

        Raises:
            UserError: the number of clips is fixed.
        """


class Evaluator(Protocol):
    """Makes the evaluations of networks; every task does."""

    def report_folder(self, run: "RunFolder", settings: "EvalConfig", views: int | str | None = None) -> Path:
        """Returns the default folder of a report; `views` replaces the number of clips in its name.

        Raises:
            UserError: a setting does not fit the task.
        """

    def evaluation(
        self,
        model: "Network | ClassifierFile",
        weights: dict[str, Any],
        settings: "EvalConfig",
        run: "RunFolder | None",
    ) -> Evaluation:
        """Returns the evaluation of a network.

        Args:
            model: a detector, or a classifier in a file, which is no Keras model.
            weights: origin of the weights, for the report.
            settings: the settings. None means: those of the run, or as stored in the model file.
            run: the run folder; None for a model file.

        Raises:
            UserError: the records do not exist or do not suit the network; a setting does not fit the task.
        """

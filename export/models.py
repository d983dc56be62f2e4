"""The model that is exported: its network, its class names, and what the receiver of an artefact has to know of it."""

import dataclasses
import hashlib
import re
import unicodedata
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import x3d_tf
from x3d_tf.config import TrainConfig
from x3d_tf.data.sampling import FrameSampling, input_contract
from x3d_tf.errors import require
from x3d_tf.evaluation.reports import RESULTS_NAME, read_results
from x3d_tf.modeling.archive import model_file
from x3d_tf.modeling.detection import cost_of
from x3d_tf.modeling.expansion import name_of
from x3d_tf.modeling.saving import load, load_classifier
from x3d_tf.modeling.x3d import MEAN, STD, Network
from x3d_tf.runs.run_folder import RunFolder
from x3d_tf.text import counted
from x3d_tf.types import ViewSpec

_LONGEST_NAME = 100  # bytes, so that a format, a suffix and what marks an unfinished file fit beside it
_METRICS = ("top1", "top5", "map")  # of a report, for the card
_OUTPUTS = {
    "single_label": "probabilities that add up to 1",
    "multi_label": "a probability of each class by itself",
    "detection": "for each box a score of each action by itself; boxes are x1, y1, x2, y2 in 0..1 of the clip",
}


@dataclass(frozen=True, eq=False)
class Source:
    """A model to export.

    Attributes:
        path: what was opened: a run folder or a `.keras` file.
        model: the trainable network, with its classifier, or a detector.
        class_names: one for each output.
        run: the settings of the run, where `path` is a run folder that still has them; else None.
    """

    path: Path
    model: Network
    class_names: tuple[str, ...]
    run: TrainConfig | None

    @property
    def name(self) -> str:
        """Name of the exported files: the run folder's, or the `.keras` file's without its suffix.

        Other characters than letters, digits, `_`, `.` and `-` become `_`. No name begins with `.`, which would hide
        the file, or with `-`, which commands read as an option. The network's own name where nothing is left.
        """
        given = self.path.resolve().name if self.path.is_dir() else self.path.stem
        name = re.sub(r"[^\w.-]+", "_", unicodedata.normalize("NFC", given)).lstrip(".-")
        return name.encode()[:_LONGEST_NAME].decode(errors="ignore") or self.model.name

    @property
    def frame_sampling(self) -> FrameSampling:
        """Which frames of a video a clip takes, as in training; see `x3d_tf.data.sampling.frame_indices`."""
        return self.model.frame_sampling

    @property
    def views(self) -> ViewSpec:
        """How frames become the network's clip: one clip of a video, its centre crop."""
        model = self.model
        return ViewSpec(temporal_views=1, resize=model.expansion.test_size, crop=model.eval_size, stretch=model.stretch)

    @property
    def weights_sha256(self) -> str:
        """Of the model's file: what tells its artefacts from those of other models."""
        return hashlib.sha256(model_file(self.path).read_bytes()).hexdigest()

    def card(self, batch: int | None = None) -> dict[str, Any]:
        """The model card: what an application must feed, what comes out, what it costs, where it comes from.

        Args:
            batch: clips of a call of the artefact; any number unless given.

        Values are those that JSON has. `input` has the entries of a run folder's `input.json`, and the pixels' form.
        """
        model, clip = self.model, self.model.clip
        count = cost_of(model)
        return {
            "network": name_of(model.expansion),
            "created_by": f"x3d_tf {x3d_tf.__version__}",
            "task": model.task,
            "input": {
                **input_contract(model),
                "shape": [batch or "N", clip.frames, model.eval_size, model.eval_size, 3],
                "normalisation": f"inside the model: (value - {MEAN:g}) / {STD:g}",
            },
            "output": _OUTPUTS[model.task],
            "classes": list(self.class_names),
            "expansion": dataclasses.asdict(model.expansion),
            "options": dataclasses.asdict(model.options),  # head_pool among them
            "gmacs_per_clip": count.macs / 1e9,
            "params": count.params,
            "weights_sha256": self.weights_sha256,
            "training": self._training(),
        }

    def _training(self) -> dict[str, Any] | None:
        """Facts of the run; None of a file, which does not tell."""
        if self.run is None:
            return None
        run, dataset, recipe = RunFolder(self.path), self.run.dataset, self.run.recipe
        keys = ("records", "split", "videos", "views", *_METRICS)
        reports = [read_results(path) for path in sorted(run.evaluations.glob(f"*/{RESULTS_NAME}"))]
        return {
            "run": self.path.resolve().name,
            "records": dataset.records,
            "split": dataset.train_split,
            "steps": recipe.steps,
            "batch": recipe.batch,
            "seed": self.run.seed,
            "init": self.run.init,
            "settings_sha256": self.run.fingerprint(),
            "tested": [{key: report[key] for key in keys if key in report} for report in reports],
        }


def open_model(path: str | Path, *, detectors: bool = False) -> Source:
    """Opens a run folder, or a `.keras` file that this package saved, for export.

    Warns where the classes have no names but numbers.

    Args:
        path: of it.
        detectors: whether it may be a detector, too.

    Raises:
        UserError: no such file; one that this package did not save; a network without classifier; a detector where that
            may not be; a damaged run.
    """
    path = Path(path)
    model = load(path) if detectors else load_classifier(path)
    require(model.include_top, f"the network of {path}", "have its classifier (include_top)", model.include_top)
    names = model.class_names
    if names == tuple(str(number) for number in range(len(names))):
        warnings.warn(f"{path} has no class names: {counted(len(names), 'class')} numbered from 0", stacklevel=2)
    run = RunFolder(path)
    return Source(path, model, names, run.read_config() if run.config.is_file() else None)

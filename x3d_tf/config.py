"""Training configuration: the recipe and all other settings that determine the result. Imports no TensorFlow."""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from x3d_tf.data.datasets.spec import DatasetSpec
from x3d_tf.errors import UserError, check_field_types, require
from x3d_tf.files import require_local
from x3d_tf.modeling.architecture import ModelOptions, plan
from x3d_tf.modeling.expansion import Expansion
from x3d_tf.modeling.graph import DetectionHead
from x3d_tf.types import MAX_VIEWS, NAME_RULE, BoxSource, Combine, is_name


@dataclass(frozen=True)
class Recipe:
    """Training recipe: the paper's for Kinetics (appendix A.3), scaled linearly to the batch size.

    `learning_rate` and `steps` apply to batches of `reference_batch` clips. For batches of `batch` clips the learning
    rate is multiplied and the number of steps divided by batch / reference_batch, so that the number of clips stays the
    same. Warm-up and decay are fractions of the steps, so that they scale with the length of the run.

    Attributes:
        batch: batch size in clips, over all devices.
        reference_batch: batch size in clips that `learning_rate` and `steps` are stated for.
        learning_rate: peak learning rate of the schedule, η.
        steps: number of training steps.
        warmup_fraction: fraction of the steps, in [0, 1), for the linear warm-up, which ends at the schedule's value.
        decay_fractions: for the schedule "steps", the fractions of the steps, in [`warmup_fraction`, 1) and ascending,
            after which the learning rate is divided by 10.
        warmup_start: learning rate at the start of the warm-up, as a fraction of η.
        schedule: "cosine" decays along half a cosine period from η to 0; "steps" is constant between
            `decay_fractions`; "plateau" divides the learning rate by 10 each time that validation stops improving,
            which requires validation (paper, appendices A.1 and A.2: "when validation error saturates").
        plateau_validations: for the schedule "plateau", the number of successive validations without improvement after
            which the learning rate is divided by 10. They are counted from the last division, the last improvement or
            the end of the warm-up, whichever is later. Improvement has the same meaning as for `patience`.
        multigrid: "long" starts each stage of the schedule "steps" but the last with small clips in large batches, see
            `training.multigrid` (Wu et al., CVPR 2020). The number of clips stays the same, and the number of steps
            falls. "none" trains on clips of one shape.
        momentum: Nesterov momentum.
        weight_decay: L2 weight decay, added to the gradients of all weights except those of batch norm.
        ema: decay, in [0, 1), of an exponential moving average (EMA) of all weights, which is evaluated and saved in
            place of the weights; 0 disables it.
        precise_bn_batches: number of training batches whose exact mean and variance replace the moving statistics of
            batch norm before each checkpoint; 0 keeps the moving statistics. (PySlowFast uses 200 on Kinetics.)
        backbone_lr_factor: learning rate of all layers before fc1, relative to that of the head; 0 freezes them
            (drop-connect still applies as set in `ModelOptions`).
        batch_norm: "train" normalises with batch statistics; "frozen" keeps the scales, shifts and statistics of
            `TrainConfig.init`, for batches too small for reliable statistics.
        class_weights: "balanced" weights each clip's loss by the inverse frequency of its class, so that all classes
            contribute equally; "none" weights all clips equally.
        patience: early stopping after this number of successive validations without improvement; the run then saves
            the best checkpoint. 0 disables early stopping and saves the last step. With the schedule "plateau" it must
            be greater than `plateau_validations`, otherwise the run would stop before the first division.

    Raises:
        TypeError, ValueError: names the field, the rule and the value received.
    """

    batch: int = 1024
    reference_batch: int = 1024
    learning_rate: float = 1.6
    steps: int = 60_000
    warmup_fraction: float = 2 / 15
    decay_fractions: tuple[float, ...] = ()
    warmup_start: float = 0.1
    schedule: Literal["cosine", "steps", "plateau"] = "cosine"
    plateau_validations: int = 0
    multigrid: Literal["none", "long"] = "none"
    momentum: float = 0.9
    weight_decay: float = 5e-5
    ema: float = 0.0
    precise_bn_batches: int = 0
    backbone_lr_factor: float = 1.0
    batch_norm: Literal["train", "frozen"] = "train"
    class_weights: Literal["none", "balanced"] = "none"
    patience: int = 0

    def __post_init__(self) -> None:
        check_field_types(self)
        for name in ("batch", "reference_batch", "steps"):
            require(getattr(self, name) >= 1, f"Recipe.{name}", "be at least 1", getattr(self, name))
        require(0 < self.learning_rate < math.inf, "Recipe.learning_rate", "be positive", self.learning_rate)
        warmup, decays = self.warmup_fraction, self.decay_fractions
        require(0 <= warmup < 1, "Recipe.warmup_fraction", "be in [0, 1), a fraction of the steps", warmup)
        rising = list(decays) == sorted(set(decays)) and all(warmup <= decay < 1 for decay in decays)
        rule = f"be ascending fractions of the steps in [warmup_fraction = {warmup:g}, 1)"
        require(rising, "Recipe.decay_fractions", rule, decays)
        rule = 'be given if, and only if, Recipe.schedule is "steps"'
        require(bool(decays) == (self.schedule == "steps"), "Recipe.decay_fractions", rule, decays)
        self._check_plateau()
        multigrid, rule = self.multigrid, 'be "none" unless Recipe.schedule is "steps"'
        require(multigrid == "none" or self.schedule == "steps", "Recipe.multigrid", rule, multigrid)
        require(0 <= self.warmup_start <= 1, "Recipe.warmup_start", "be in [0, 1]", self.warmup_start)
        require(0 <= self.momentum < 1, "Recipe.momentum", "be in [0, 1)", self.momentum)
        for name in ("weight_decay", "precise_bn_batches", "backbone_lr_factor", "patience"):
            require(0 <= getattr(self, name) < math.inf, f"Recipe.{name}", "be at least 0", getattr(self, name))
        require(0 <= self.ema < 1, "Recipe.ema", "be in [0, 1)", self.ema)
        precise = self.precise_bn_batches
        rule = "be 0 if batch norm is frozen (Recipe.batch_norm, Recipe.backbone_lr_factor)"
        require(not (precise and self.frozen_norms), "Recipe.precise_bn_batches", rule, precise)

    def _check_plateau(self) -> None:
        validations, patience, plateau = self.plateau_validations, self.patience, self.schedule == "plateau"
        rule = 'be at least 1 if Recipe.schedule is "plateau", otherwise 0'
        require(validations >= 1 if plateau else validations == 0, "Recipe.plateau_validations", rule, validations)
        rule = f"be 0 or greater than Recipe.plateau_validations = {validations}"
        require(not (plateau and patience) or patience > validations, "Recipe.patience", rule, patience)

    @property
    def needs_validation(self) -> bool:
        """True if training depends on the results of validations."""
        return self.patience > 0 or self.schedule == "plateau"

    @property
    def frozen_norms(self) -> bool:
        """True if the statistics of batch norm are frozen."""
        return self.batch_norm == "frozen" or self.backbone_lr_factor == 0

    @property
    def scaled_learning_rate(self) -> float:
        """Peak learning rate, η, for batches of `batch` clips."""
        return self.learning_rate * self.batch / self.reference_batch

    @property
    def scaled_steps(self) -> int:
        """Number of steps with batches of `batch` clips, at least 1."""
        return max(1, round(self.steps * self.reference_batch / self.batch))

    @property
    def scaled_warmup_steps(self) -> int:
        """Number of warm-up steps with batches of `batch` clips, less than `scaled_steps`."""
        return min(round(self.warmup_fraction * self.scaled_steps), self.scaled_steps - 1)

    @property
    def scaled_decay_steps(self) -> tuple[int, ...]:
        """Steps, with batches of `batch` clips, at which the learning rate is divided by 10; 1 or later."""
        return tuple(max(1, round(decay * self.scaled_steps)) for decay in self.decay_fractions)


@dataclass(frozen=True)
class Execution:
    """Execution of the training steps: precision, memory and device utilisation.

    Attributes:
        precision: precision of the network's computations. "bfloat16" and "float16" keep weights, statistics and loss
            in float32; "float16" also scales the loss to keep small gradients from vanishing.
        accumulation: gradient accumulation: number of micro-batches that a batch is split into if it does not fit in
            memory. Batch-norm groups are then at most as large as a micro-batch.
        steps_per_execution: training steps per `tf.function` call; larger values reduce Python overhead on fast
            devices.
        recompute: gradient checkpointing: activations that the backward pass recomputes to save memory (same result).
            "activations" recomputes batch norm, ReLU, swish and squeeze-excitation, which costs little time. "blocks"
            only stores the outputs of residual blocks and computes convolutions twice; it saves memory in deep
            networks (X3D-L, XL), while in others the gradient of the first block dominates the peak.

    Raises:
        SettingTypeError, UserError: names the field, the rule and the value received.
    """

    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    accumulation: int = 1
    steps_per_execution: int = 1
    recompute: Literal["nothing", "activations", "blocks"] = "nothing"

    def __post_init__(self) -> None:
        check_field_types(self)
        for name in ("accumulation", "steps_per_execution"):
            require(getattr(self, name) >= 1, f"Execution.{name}", "be at least 1", getattr(self, name))


@dataclass(frozen=True)
class Detection:
    """Settings for action detection, used when the records hold key frames (paper, section 5 and appendix A.1).

    Attributes:
        head: detection head; see `x3d_tf.build_detector`.
        proposal_iou: person-detector boxes whose IoU with an annotated box exceeds this are training samples with that
            box's labels.
        negatives: whether the other person-detector boxes are training samples without labels (not in the paper).
        eval_boxes: "proposals" evaluates on the boxes of the person detector, "annotated" on the annotated boxes.
        score: minimum score of the person-detector boxes that are used for training and evaluation.
        validation_every: validation during training uses the key frames whose second is divisible by this (PySlowFast:
            4). The final evaluation uses all key frames.

    Raises:
        SettingTypeError, UserError: names the field, the rule and the value received.
    """

    head: DetectionHead = "full"
    proposal_iou: float = 0.9
    negatives: bool = False
    eval_boxes: BoxSource = "proposals"
    score: float = 0.8
    validation_every: int = 1

    def __post_init__(self) -> None:
        check_field_types(self)
        require(0 < self.proposal_iou < 1, "Detection.proposal_iou", "be in (0, 1)", self.proposal_iou)
        require(0 <= self.score <= 1, "Detection.score", "be in [0, 1]", self.score)
        every = self.validation_every
        require(every >= 1, "Detection.validation_every", "be at least 1", every)


@dataclass(frozen=True)
class TrainConfig:
    """Complete configuration of a training run: the same configuration gives the same result.

    Attributes:
        expansion: the six expansion factors of the network.
        model: other options of the network.
        dataset: records for training and evaluation.
        recipe: training recipe.
        execution: precision, gradient accumulation and gradient checkpointing.
        detection: settings for action detection.
        task: name of the task. Defaults to that of the records; see `x3d_tf.tasks.base`.
        init: run folder or `.keras` file of this package with the initial weights; None initialises them randomly. If
            its classes differ from those of the records, the classifier is initialised randomly.
        test_views: number of clips per test video whose probabilities are combined (K of K-Center), 1..1000.
        combine: "mean" averages the probabilities of a video's clips, "max" takes the maximum for each class, as for
            Charades.
        checkpoint_steps: number of steps between checkpoints.
        seed: random seed for the initial weights, the order of the data and the augmentation.

    Raises:
        TypeError, ValueError: names the field, the rule and the value received.
    """

    expansion: Expansion = field(default_factory=Expansion)
    model: ModelOptions = field(default_factory=ModelOptions)
    dataset: DatasetSpec = field(default_factory=lambda: DatasetSpec(records="data/records"))
    recipe: Recipe = field(default_factory=Recipe)
    execution: Execution = field(default_factory=Execution)
    detection: Detection = field(default_factory=Detection)
    task: str | None = None
    init: str | None = None
    test_views: int = 10
    combine: Combine = "mean"
    checkpoint_steps: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        check_field_types(self)
        plan(self.expansion, self.model)  # checks the bounds of the network before records are read
        require_local(self.init or "", "TrainConfig.init")
        require(self.task is None or is_name(self.task), "TrainConfig.task", NAME_RULE, self.task)
        inside = 1 <= self.test_views <= MAX_VIEWS
        require(inside, "TrainConfig.test_views", f"be in 1..{MAX_VIEWS}", self.test_views)
        require(self.checkpoint_steps >= 1, "TrainConfig.checkpoint_steps", "be at least 1", self.checkpoint_steps)
        require(0 <= self.seed < 2**31, "TrainConfig.seed", "be in [0, 2**31)", self.seed)
        initialized = self.init is not None or not self.recipe.frozen_norms
        rule = "be given if Recipe.batch_norm or Recipe.backbone_lr_factor freezes weights"
        require(initialized, "TrainConfig.init", rule, self.init)
        if self.recipe.multigrid != "none":
            reason = "for multigrid training (Recipe.multigrid)"
            fewest = 8 if self.model.input == "difference" else 4  # the shortest clips have a quarter of the frames
            rule = f"be at least {fewest} {reason}"
            require(self.expansion.gamma_t >= fewest, "Expansion.gamma_t", rule, self.expansion.gamma_t)
            rule = f'be "global" {reason}, whose clips may be smaller than the windows'
            require(self.model.head_pool == "global", "ModelOptions.head_pool", rule, self.model.head_pool)

    def settings(self) -> dict[str, Any]:
        """Returns all settings by their gin names: `{"Expansion.gamma_tau": 6.0, ...}`."""
        flat: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name in PARTS:
                flat |= {f"{type(value).__name__}.{name}": part for name, part in vars(value).items()}
            else:
                flat[f"TrainConfig.{item.name}"] = value
        return flat

    def outcome_settings(self) -> dict[str, Any]:
        """Returns the settings that must not change when a run is resumed.

        Excludes `DatasetSpec.records` and `TrainConfig.init`, which are paths: the manifest's fingerprint identifies
        the records, and the checkpoint holds the weights of `init`. Also excludes `Execution.accumulation`, which only
        affects the result through the batch-norm groups, and the checkpoint records those.
        """
        changeable = ("DatasetSpec.records", "TrainConfig.init", "Execution.accumulation")
        return {name: value for name, value in self.settings().items() if name not in changeable}

    def to_json(self) -> str:
        """Returns the settings as a JSON object."""
        return json.dumps(self.settings(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "TrainConfig":
        """Parses and checks the output of `to_json`.

        Raises:
            UserError: the text is not such an object, has an unknown setting or a value out of range.
        """
        try:
            sections: dict[str, dict[str, Any]] = {}
            for name, value in json.loads(text).items():
                part, setting = name.split(".")
                sections.setdefault(part, {})[setting] = tuple(value) if isinstance(value, list) else value
            parts = {name: part(**sections.pop(part.__name__, {})) for name, part in PARTS.items()}
            config = cls(**parts, **sections.pop("TrainConfig", {}))
            require(not sections, "a configuration", "only have known settings", ", ".join(sections))
            return config
        except UserError:
            raise
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"not a configuration: {error}") from error

    def fingerprint(self) -> str:
        """Returns a hash of `outcome_settings`."""
        settings = {name: float(v) if type(v) is int else v for name, v in self.outcome_settings().items()}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


PARTS: dict[str, Any] = {
    "expansion": Expansion,
    "model": ModelOptions,
    "dataset": DatasetSpec,
    "recipe": Recipe,
    "execution": Execution,
    "detection": Detection,
}

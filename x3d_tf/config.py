"""What a training run is made of: the recipe and everything else that decides its outcome. Imports no TensorFlow."""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from x3d_tf.data.datasets.spec import DatasetSpec
from x3d_tf.errors import UserError, check_field_types, require
from x3d_tf.modeling.architecture import ModelOptions, plan
from x3d_tf.modeling.expansion import Expansion
from x3d_tf.types import MAX_VIEWS


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: the paper's recipe for Kinetics (appendix A.3), scaled linearly to the batch.

    `learning_rate` and `steps` are stated for `reference_batch` clips; a run of `batch` clips multiplies the rate by
    batch / reference_batch and divides the steps by it, so that it sees as many clips. Warm-up and decay are shares of
    the steps, so that a run of any length has them.

    Attributes:
        batch: clips of one step, over all devices.
        reference_batch: clips of one step that the next two fields are stated for.
        learning_rate: highest value of the schedule, η.
        steps: length of the run.
        warmup_fraction: share of the steps, in [0, 1), of the linear warm-up, which ends at the schedule's value.
        decay_fractions: for the schedule "steps", the shares of the steps, in [`warmup_fraction`, 1) and ascending,
            after which the rate is a tenth of what it was.
        warmup_start: where the warm-up starts, in units of η.
        schedule: "cosine" is half a period of it, from η to 0; "steps" is constant between `decay_fractions`.
        momentum: of Nesterov's kind.
        weight_decay: L2 added to the gradient of everything but batch norm.
        ema: decay of the moving average of all weights that is tested and saved in their place, in [0, 1); 0 is none.
        precise_bn_batches: training batches whose exact mean and variance replace the moving statistics of batch norm
            before each checkpoint; 0 leaves those. (PySlowFast uses 200 on Kinetics.)
        backbone_lr_factor: the learning rate of everything before fc1, in units of that of the rest; 0 freezes it
            (but for drop-connect, which stays as `ModelOptions` says).
        batch_norm: "train" normalises by each batch; "frozen" keeps scales, shifts and statistics as they came with
            `TrainConfig.init`, for batches too small to have statistics of their own.
        class_weights: "balanced" weighs each clip's loss by how rare its class is, so that all classes count the same.
        patience: validations in a row without improvement after which the run stops; the best of them is what it
            saves. 0 runs to the last step and saves that.

    Raises:
        TypeError, ValueError: naming the field, the rule and the value received.
    """

    batch: int = 1024
    reference_batch: int = 1024
    learning_rate: float = 1.6
    steps: int = 60_000
    warmup_fraction: float = 2 / 15
    decay_fractions: tuple[float, ...] = ()
    warmup_start: float = 0.1
    schedule: Literal["cosine", "steps"] = "cosine"
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
        require(0 <= warmup < 1, "Recipe.warmup_fraction", "be in [0, 1), a share of the steps", warmup)
        rising = list(decays) == sorted(set(decays)) and all(warmup <= decay < 1 for decay in decays)
        rule = f"be ascending shares of the steps in [warmup_fraction = {warmup:g}, 1)"
        require(rising, "Recipe.decay_fractions", rule, decays)
        rule = 'be given with Recipe.schedule = "steps", and with that alone'
        require(bool(decays) == (self.schedule == "steps"), "Recipe.decay_fractions", rule, decays)
        require(0 <= self.warmup_start <= 1, "Recipe.warmup_start", "be in [0, 1]", self.warmup_start)
        require(0 <= self.momentum < 1, "Recipe.momentum", "be in [0, 1)", self.momentum)
        for name in ("weight_decay", "precise_bn_batches", "backbone_lr_factor", "patience"):
            require(0 <= getattr(self, name) < math.inf, f"Recipe.{name}", "be at least 0", getattr(self, name))
        require(0 <= self.ema < 1, "Recipe.ema", "be in [0, 1)", self.ema)
        precise = self.precise_bn_batches
        rule = "be 0 where batch norm is frozen (Recipe.batch_norm, Recipe.backbone_lr_factor)"
        require(not (precise and self.frozen_norms), "Recipe.precise_bn_batches", rule, precise)

    @property
    def frozen_norms(self) -> bool:
        """Whether batch norm keeps its statistics."""
        return self.batch_norm == "frozen" or self.backbone_lr_factor == 0

    @property
    def scaled_learning_rate(self) -> float:
        """η for `batch` clips a step."""
        return self.learning_rate * self.batch / self.reference_batch

    @property
    def scaled_steps(self) -> int:
        """Steps of `batch` clips, at least 1."""
        return max(1, round(self.steps * self.reference_batch / self.batch))

    @property
    def scaled_warmup_steps(self) -> int:
        """Warm-up steps of `batch` clips, fewer than `scaled_steps`."""
        return min(round(self.warmup_fraction * self.scaled_steps), self.scaled_steps - 1)

    @property
    def scaled_decay_steps(self) -> tuple[int, ...]:
        """Steps of `batch` clips from which on the rate is a tenth of what it was, none before step 1."""
        return tuple(max(1, round(decay * self.scaled_steps)) for decay in self.decay_fractions)


@dataclass(frozen=True)
class Execution:
    """How the steps of a recipe are computed.

    Attributes:
        precision: of the network's arithmetic; "bfloat16" and "float16" keep weights, statistics and loss in float32,
            and "float16" scales the loss so that small gradients do not vanish.
        accumulation: parts that a step's batch is computed in, one after the other, where it does not fit into memory.
            Batch norm sees one part at a time: groups have no more clips than that.
        steps_per_execution: steps between two looks of Python, which cost a fast device time.
        recompute: what a step does not keep for its gradient but computes again, to the same result in less memory:
            "activations" keeps the outputs of convolutions and not of batch norm, ReLU, swish and squeeze-excitation,
            which costs little time; "blocks" keeps the outputs of residual blocks alone, and computes convolutions
            twice, which pays in deep networks (X3D-L, XL): in others the first block's own gradient is the peak.

    Raises:
        SettingTypeError, UserError: naming the field, the rule and the value received.
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
    """What concerns action detection alone. Records of key frames make a run one (paper, section 5 and appendix A.1).

    Attributes:
        head: see `x3d_tf.build_detector`.
        proposal_iou: boxes of a person detector that overlap an annotated one by more are training samples of it.
        negatives: whether its other boxes are samples, too, of a person who does nothing (the paper has none).
        eval_boxes: "proposals" tests on the boxes of the person detector, "annotated" on those that are known.
        score: lowest of a detector's boxes that is tested, or a training sample.
        validation_every: validation while training takes the key frames whose seconds this divides; PySlowFast takes
            every fourth. The test afterwards takes all.

    Raises:
        SettingTypeError, UserError: naming the field, the rule and the value received.
    """

    head: Literal["full", "simple", "frame"] = "full"
    proposal_iou: float = 0.9
    negatives: bool = False
    eval_boxes: Literal["proposals", "annotated"] = "proposals"
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
    """Everything that decides the outcome of a run: the same configuration gives the same run.

    Attributes:
        expansion: the six factors of the network.
        model: the builder's other choices.
        dataset: the records to train and to test on.
        recipe: how it is trained.
        execution: how that is computed.
        detection: what concerns detectors alone.
        init: a run folder or a `.keras` file of this package whose weights the run starts from; fresh ones unless
            given. Where its classes are others, the classifier is new.
        test_views: clips of each test video whose probabilities are averaged (K of K-Center testing), 1..1000.
        checkpoint_steps: steps from one checkpoint to the next.
        seed: of the first weights, the order of the data and its augmentation.

    Raises:
        TypeError, ValueError: naming the field, the rule and the value received.
    """

    expansion: Expansion = field(default_factory=Expansion)
    model: ModelOptions = field(default_factory=ModelOptions)
    dataset: DatasetSpec = field(default_factory=lambda: DatasetSpec(records="data/records"))
    recipe: Recipe = field(default_factory=Recipe)
    execution: Execution = field(default_factory=Execution)
    detection: Detection = field(default_factory=Detection)
    init: str | None = None
    test_views: int = 10
    checkpoint_steps: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        check_field_types(self)
        plan(self.expansion, self.model)  # whose bounds are to be known before records are made
        inside = 1 <= self.test_views <= MAX_VIEWS
        require(inside, "TrainConfig.test_views", f"be in 1..{MAX_VIEWS}", self.test_views)
        require(self.checkpoint_steps >= 1, "TrainConfig.checkpoint_steps", "be at least 1", self.checkpoint_steps)
        require(0 <= self.seed < 2**31, "TrainConfig.seed", "be in [0, 2**31)", self.seed)
        taught = self.init is not None or not self.recipe.frozen_norms
        rule = "be given where Recipe.batch_norm or Recipe.backbone_lr_factor freezes what it brings"
        require(taught, "TrainConfig.init", rule, self.init)

    def settings(self) -> dict[str, Any]:
        """Every setting by the name that gin binds it by: `{"Expansion.gamma_tau": 6.0, ...}`."""
        flat: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name in PARTS:
                flat |= {f"{type(value).__name__}.{name}": part for name, part in vars(value).items()}
            else:
                flat[f"TrainConfig.{item.name}"] = value
        return flat

    def outcome_settings(self) -> dict[str, Any]:
        """Those of `settings` that a run has to keep from its first checkpoint on.

        The others are `DatasetSpec.records` and `TrainConfig.init`, which are places: the fingerprint of the manifest
        tells records apart, and the weights of `init` are in the checkpoint. `Execution.accumulation` matters by the
        batch-norm groups that it makes, which a checkpoint records.
        """
        free = ("DatasetSpec.records", "TrainConfig.init", "Execution.accumulation")
        return {name: value for name, value in self.settings().items() if name not in free}

    def to_json(self) -> str:
        """The settings as a JSON object."""
        return json.dumps(self.settings(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "TrainConfig":
        """Reads and checks what `to_json` wrote.

        Raises:
            UserError: not such an object, an unknown setting, a value outside its range.
        """
        try:
            given: dict[str, dict[str, Any]] = {}
            for name, value in json.loads(text).items():
                part, setting = name.split(".")
                given.setdefault(part, {})[setting] = tuple(value) if isinstance(value, list) else value
            parts = {name: part(**given.pop(part.__name__, {})) for name, part in PARTS.items()}
            config = cls(**parts, **given.pop("TrainConfig", {}))
            require(not given, "a configuration", "hold only known settings", ", ".join(given))
            return config
        except UserError:
            raise
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"not a configuration: {error}") from error

    def fingerprint(self) -> str:
        """A hash that two configurations share if all their `outcome_settings` are equal."""
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

"""The trainable detector (paper, section 5): classifies the actions in each box on a clip's middle frame.

The paper does not state whether its detector has conv5 and fc1. It prints 3.1 M parameters for X3D-M (Table 8): with
both layers there are 3.106 M, without fc1 at most 2.09 M.
"""

import dataclasses
from typing import Any

import keras

from x3d_tf.errors import require
from x3d_tf.modeling.architecture import ModelOptions, plan, require_classes, resolve
from x3d_tf.modeling.expansion import Expansion
from x3d_tf.modeling.graph import DetectionHead, detection_graph, require_head, require_task
from x3d_tf.modeling.keras_parts import TrainableParts
from x3d_tf.modeling.parts import Parts
from x3d_tf.modeling.x3d import Network, layer_name
from x3d_tf.types import Activation


def build_detector(
    network: str | Expansion,
    num_classes: int = 80,
    *,
    head: DetectionHead = "full",
    options: ModelOptions | None = None,
    name: str | None = None,
) -> "Detector":
    """Builds a detector with randomly initialized weights.

    `x3d_tf.training.transfer.load_pretrained` initializes it from a classifier.

    Args:
        network: a variant or any `Expansion`; see `build_x3d`.
        num_classes: number of actions; a box may have any number of them. Defaults to the 80 actions of AVA.
        head: "full" has conv5 and fc1, which matches the paper's parameter count; "simple" is one linear layer on the
            last stage; "frame" is "full" without RoIAlign: it ignores the boxes and gives each the scores of the full
            frame, as a baseline. EfficientNet3D has no fc1.
        options: what the factors do not determine; `head_pool` must be "global". Defaults to `ModelOptions()`.
        name: name of the model. Defaults to the name of the variant plus "_detector".

    Returns:
        A model with two inputs: `clip`, (N, T, H, W, 3), RGB in 0..255, uint8 or float, of any T, H and W; and `boxes`,
        (N, B, 4): x1, y1, x2, y2 in [0, 1] of the clip, padded with zeros. Its output is scores (N, B, num_classes) in
        (0, 1); ignore the scores of padded boxes.

    Raises:
        ValueError, TypeError: an unknown variant, or a value of the wrong type or out of range.

    Example:
        >>> detector = build_detector("x3d_m", num_classes=80)
        >>> scores = detector({"clip": clips, "boxes": boxes})
    """
    expansion, options = resolve(network, options)
    return Detector(expansion, num_classes, options, head=head, name=name)


@keras.saving.register_keras_serializable("x3d_tf")
class Detector(Network):
    """The trainable detector, as built by `build_detector`. Its config holds the arguments of the constructor.

    Attributes:
        head: "full", "simple" or "frame".
    """

    activation: Activation = "sigmoid"
    include_top = True
    head: DetectionHead

    def __init__(
        self,
        expansion: Expansion,
        num_classes: int,
        options: ModelOptions,
        *,
        head: DetectionHead = "full",
        task: str = "detection",
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        require_classes(num_classes)
        require_head(head)
        require_task(task, self.activation, detects=True)
        pool = options.head_pool
        require(pool == "global", "ModelOptions.head_pool", 'be "global" for a detector, which pools boxes', pool)
        inputs = self._keras_inputs(keras.Input((None, None, None, 3), name="clip"))
        parts = TrainableParts(options.bn_group)
        architecture = plan(expansion, options)
        logits = detection_graph(
            inputs["clip"], inputs["boxes"], architecture, parts, head=head, num_classes=num_classes
        )
        scores = parts.probabilities(logits, self.activation, "scores")
        name = name or f"{layer_name(expansion, options.family)}_detector"
        super().__init__(inputs=inputs, outputs=scores, name=name, **kwargs)
        self.expansion, self.options, self.num_classes, self.head = expansion, options, num_classes, head
        self.task = task
        self.backbone_end = architecture.last_stage if head == "simple" else "conv5"

    @property
    def eval_size(self) -> int:
        return self.expansion.test_size

    @property
    def logits(self) -> Any:
        return self.get_layer("fc2").output

    def apply_parts(self, inputs: Any, parts: Parts[Any], options: ModelOptions | None = None) -> Any:
        architecture = plan(self.expansion, options or self.options)
        logits = detection_graph(
            inputs["clip"], inputs["boxes"], architecture, parts, head=self.head, num_classes=self.num_classes
        )
        return parts.probabilities(logits, self.activation, "scores")

    @staticmethod
    def _keras_inputs(clip: Any) -> dict[str, Any]:
        return {"clip": clip, "boxes": keras.Input((None, 4), batch_size=clip.shape[0], name="boxes")}

    def get_config(self) -> dict[str, Any]:
        return {
            "expansion": dataclasses.asdict(self.expansion),
            "num_classes": self.num_classes,
            "options": dataclasses.asdict(self.options),
            "head": self.head,
            "task": self.task,
            "name": self.name,
        }

"""The definition of the networks: it passes tensors on without looking into them, and imports no framework."""

import ast
import inspect
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from test_structure import loaded_by

import x3d_tf
from x3d_tf import Expansion, ModelOptions
from x3d_tf.modeling import graph, parts
from x3d_tf.modeling.architecture import plan
from x3d_tf.modeling.cost import CountingParts, layer_costs
from x3d_tf.modeling.folded import FoldedParts
from x3d_tf.modeling.keras_parts import TrainableParts
from x3d_tf.modeling.portable import PortableParts

METHODS = {name for name, member in vars(parts.Parts).items() if inspect.isfunction(member) and name[0] != "_"}
SMALL = Expansion(gamma_tau=2, gamma_t=4, gamma_s=64 / 112, gamma_b=2.25, gamma_d=0.4)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"input": "difference", "se": "all", "stem_kernel": 3},
    {"separable": False, "se": "none", "shortcut_norm": "on_width_change"},
    {"swish": False, "swish_before": True, "drop_connect": 0.5, "dropout": 0.0},
    {"family": "efficientnet3d", "drop_connect": 0.5},
    {"family": "efficientnet3d_matched", "se": "none", "input": "difference"},
]
POOLS = ("global", "fixed_probabilities", "fixed_logits")


class Recorder:
    """A set of parts whose tensors are bare objects. It records its calls and the names of the layers."""

    def __init__(self) -> None:
        self.methods: set[str] = set()
        self.names: list[str] = []

    def __getattr__(self, method: str) -> Callable[..., object]:
        if method not in METHODS:
            raise AttributeError(f"Parts has no method {method}")
        signature = inspect.signature(getattr(parts.Parts, method))

        def call(*args: Any, **kwargs: Any) -> object:
            bound = signature.bind(self, *args, **kwargs).arguments
            tensors = [bound[name] for name in ("x", "y", "factors", "boxes", "clips") if name in bound]
            assert all(type(tensor) is object for tensor in tensors)
            self.methods.add(method)
            if "name" in bound:
                self.names.append(bound["name"])
            return object()

        return call


def walk(
    expansion: Expansion, options: ModelOptions, head: str | None, activation: Any, num_classes: int | None
) -> Recorder:
    recorder, architecture = Recorder(), plan(expansion, options)
    built: Any = recorder
    if head is None:
        output = graph.graph(
            object(),
            architecture,
            built,
            train_size=expansion.clip.size,
            num_classes=num_classes,
            activation=activation,
        )
    else:
        output = graph.detection_graph(
            object(),
            object(),
            architecture,
            built,
            head=head,
            num_classes=num_classes,  # type: ignore[arg-type]
        )
    if num_classes:
        recorder.probabilities(output, activation, "scores" if head else "probabilities")
    return recorder


def every_walk() -> list[tuple[ModelOptions, str | None, str, int | None]]:
    classifiers = [
        (ModelOptions(**options, head_pool=pool), None, activation, classes)  # type: ignore[arg-type]
        for options, pool, activation, classes in itertools.product(OPTIONS, POOLS, ("softmax", "sigmoid"), (5, None))
    ]
    heads = get_args(graph.DetectionHead)
    detectors = [(ModelOptions(**options), head, "sigmoid", 3) for options in OPTIONS for head in heads]
    return [*classifiers, *detectors]


def test_the_graph_reads_nothing_of_its_tensors() -> None:
    """All heads, poolings and options are walked with bare objects; together they call every method of the protocol."""
    called: set[str] = set()
    for options, head, activation, classes in every_walk():
        recorder = walk(SMALL, options, head, activation, classes)
        assert len(set(recorder.names)) == len(recorder.names)
        called |= recorder.methods
    assert called == METHODS


@pytest.mark.parametrize(
    ("head", "family"),
    [(None, "x3d"), ("full", "x3d"), ("simple", "x3d"), ("frame", "x3d"), (None, "efficientnet3d")],
)
def test_layers_have_the_names_that_the_graph_gives_them(head: Any, family: Any) -> None:
    options = ModelOptions(family=family, drop_connect=0.5)
    recorder = walk(SMALL, options, head, "sigmoid" if head else "softmax", 3)
    build: Any = x3d_tf.build_detector if head else x3d_tf.build_x3d
    model = build(SMALL, 3, **({"head": head} if head else {}), options=options)
    layers = [layer.name for layer in model.layers if layer.name not in ("clip", "boxes")]
    assert sorted(layers) == sorted({*recorder.names} - {"probabilities"})
    weighted = [layer.name for layer in model.layers if layer.weights and "norm" not in layer.name]
    rows = [row.name for row in layer_costs(SMALL, num_classes=3, options=options, head=head)]
    assert sorted(name for name in weighted if not name.endswith(("_bn", "drop", "dropout"))) == sorted(rows)


@pytest.mark.parametrize("form", [CountingParts, FoldedParts, PortableParts, TrainableParts])
def test_every_set_of_parts_has_the_methods_of_the_protocol(form: type) -> None:
    assert_has_all_methods(form)


def assert_has_all_methods(form: type) -> None:
    for method in METHODS:
        expected = inspect.signature(getattr(parts.Parts, method)).parameters
        found = inspect.signature(getattr(form, method)).parameters
        assert [(p.name, p.kind, p.default) for p in found.values()] == [
            (p.name, p.kind, p.default) for p in expected.values()
        ], method


def test_the_definition_imports_no_framework() -> None:
    statement = "import x3d_tf.modeling.graph, x3d_tf.modeling.parts"
    assert loaded_by(statement, "keras", "tensorflow", "numpy") == []
    for module in (graph, parts):
        tree = ast.parse(Path(inspect.getfile(module)).read_text("utf-8"))
        assert not {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} & {"shape", "dtype"}

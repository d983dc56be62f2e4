"""Tests of the search for the weights of a network in a checkpoint, and of its error messages."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from x3d_tf.errors import UserError
from x3d_tf.modeling.expansion import VARIANTS, Expansion
from x3d_tf.modeling.pytorch import state_dicts
from x3d_tf.modeling.pytorch.checkpoint_files import Tensor, read_checkpoint, write_checkpoint
from x3d_tf.modeling.pytorch.state_dicts import MismatchError, StateDict, read_state_dict
from x3d_tf.modeling.pytorch.weight_names import NAMINGS, Naming, source_shapes

SMALL = Expansion(gamma_tau=1, gamma_t=2, gamma_s=64 / 112, gamma_w=1 / 3, gamma_b=2.25, gamma_d=0.4)
WIDER = replace(SMALL, gamma_w=0.5)  # same names, other shapes
DEEPER = replace(SMALL, gamma_d=0.8)
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tensors]:
    """Creates the tensors of a network as read from a file, all filled with `value`."""
    folder = tmp_path_factory.mktemp("files")

    def make(naming: Naming = "slowfast", network: Expansion = SMALL, value: float = 0.5, classes: int = 3) -> Tensors:
        state = {name: np.full(s, value, np.float32) for name, s in source_shapes(network, naming, classes).items()}
        state |= {
            name.replace("running_var", "num_batches_tracked"): np.array(7, np.int64)
            for name in state
            if name.endswith("running_var")
        }
        write_checkpoint(folder / "a.pyth", state)
        return dict(read_checkpoint(folder / "a.pyth")["model_state"])

    return make


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Callable[..., StateDict]:
    """Reads a network from a file with the given content."""

    def call(content: Any, network: str | Expansion = SMALL, **settings: Any) -> StateDict:
        monkeypatch.setattr(state_dicts, "read_checkpoint", lambda _: content)
        return read_state_dict("a.pyth", network, **settings)

    return call


def below(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize(
    "prefix", ["", "module.", "model.", "_orig_mod.", "module._orig_mod.model.", "_orig_mod.module.", "net.backbone."]
)
def test_prefixes_are_removed(tensors: Any, read: Any, naming: Naming, prefix: str) -> None:
    state = tensors(naming)
    result = read({"state_dict": below(prefix, state), "epoch": 3})
    counters = sum("num_batches" in name for name in state)
    assert result.tensors == {name: tensor for name, tensor in state.items() if "num_batches" not in name}
    assert (result.naming, result.counters, result.unrelated) == (naming, counters, ())
    assert result.location == "state_dict" + (f", names with prefix {prefix}" if prefix else "")


@pytest.mark.parametrize(
    ("wrap", "location"),
    [
        (lambda state: state, ""),
        (lambda state: {**state, "epoch": 3, "config": {"lr": 0.1}}, ""),
        *((lambda state, key=key: {key: state, "epoch": 3}, key) for key in ("state_dict", "model_state_dict", "net")),
        *(
            (lambda state, key=key: {"cfg": "A: 1", key: state}, key)
            for key in ("model_state", "model", "ema", "my_own")
        ),
        (lambda state: {"model": {"weights": state}, "optimizer": {"state": {}}}, "model > weights"),
        (lambda state: [{"epoch": 3}, (state,)], "1 > 0"),
        (lambda state: {"model": state, "state_dict": state}, "model"),  # one network under two names
        (lambda state: {"model": dict(state), "ema": dict(state)}, "model"),  # equal values
        (
            lambda state: {
                "model": state,
                "optimizer": {"state": {0: {"momentum_buffer": state["head.lin_5.weight"]}}},
            },
            "model",
        ),
    ],
)
def test_wrappers_are_removed(tensors: Any, read: Any, wrap: Callable[[Tensors], Any], location: str) -> None:
    state = tensors()
    result = read(wrap(state))
    assert result.location == location
    assert result.tensors == {name: tensor for name, tensor in state.items() if "num_batches" not in name}


def test_the_only_matching_network_is_chosen(tensors: Any, read: Any) -> None:
    state = tensors()
    others = {
        "wider": tensors(network=WIDER),
        "deeper": tensors(network=DEEPER),
        "half": dict(list(state.items())[:40]),
    }
    for name, other in others.items():
        assert read({"teacher": other, "student": state}).location == "student", name
        assert read(below("teacher.", other) | below("student.", state)).location == "names with prefix student.", name
    loss = {"criterion.weight": state["s1.pathway0_stem.bn.weight"]}
    result = read(below("model.", state) | loss)
    assert (result.unrelated, len(result.tensors)) == (("criterion.weight",), len(read(state).tensors))
    ema = read(below("ema.", state) | state)  # equal weights, so either is valid
    assert len(ema.tensors) == len(result.tensors)


@pytest.mark.parametrize(
    ("wrap", "locations"),
    [
        (lambda a, b: {"model": a, "ema": b}, "model, ema"),
        (lambda a, b: {"state_dict": below("model.", a) | below("ema.module.", b)}, "state_dict, names with prefix"),
        (lambda a, b: a | below("ema.", b), "top level, names with prefix ema."),
        (lambda a, b: {"model": {"a": a}, "b": [b]}, "model > a, b > 0"),
    ],
)
def test_several_matching_networks_are_an_error(
    tensors: Any, read: Any, wrap: Callable[[Tensors, Tensors], Any], locations: str
) -> None:
    with pytest.raises(
        UserError, match=r"a\.pyth contains 2 different networks that match x3d\(.*Save only the one"
    ) as caught:
        read(wrap(tensors(), tensors(value=0.25)))
    assert locations in str(caught.value)


@pytest.mark.parametrize(
    ("naming", "variant", "alike"),
    [
        ("slowfast", "x2d", "x2d"),
        ("pytorchvideo", "x3d_s", "x3d_xs or x3d_s or x3d_m"),
        ("pytorchvideo_mobile", "x3d_l", "x3d_l"),
        ("mmaction2", "x3d_m", "x3d_xs or x3d_s or x3d_m"),
    ],
)
def test_another_variant_is_named_in_one_line(
    tensors: Any, read: Any, naming: Naming, variant: str, alike: str
) -> None:
    state = {"model_state": below("module.", tensors(naming, VARIANTS[variant].expansion, classes=400))}
    for other in ("x3d_xl", "x2d" if variant != "x2d" else "x3d_xxl"):
        with pytest.raises(UserError) as caught:
            read(state, other)
        title = state_dicts.TITLES[naming]
        assert str(caught.value) == (
            f"network (--variant) must be {alike} to match the names and shapes in a.pyth ({title}), got {other!r}"
        )
    assert read(state, variant).num_classes() == 400


def test_the_closest_variant_is_named(tensors: Any, read: Any) -> None:
    state = tensors(network=VARIANTS["x3d_l"].expansion)
    del state["s1.pathway0_stem.bn.bias"]
    with pytest.raises(UserError) as caught:
        read(state, "x3d_m")
    assert str(caught.value) == (
        "network (--variant) must be x3d_l, the closest match for a.pyth (PySlowFast), got 'x3d_m'; "
        "1 mismatch with x3d_l: missing: s1.pathway0_stem.bn.bias 24"
    )
    with pytest.raises(
        UserError, match=r"a\.pyth \(PySlowFast\) must match x3d_l, but has 1 mismatch: missing: s1\.\S+ 24$"
    ):
        read(state, "x3d_l")
    variants = r"another variant \(x2d, .*, x3d_xxl\)"
    with pytest.raises(UserError, match=rf"must match x3d\(.* or {variants}, but has \d+ mismatches: missing"):
        read(tensors(network=WIDER), DEEPER)


def test_a_message_has_ten_mismatches_and_each_variant_once(tensors: Any, read: Any) -> None:
    with pytest.raises(MismatchError) as caught:
        read(tensors(network=WIDER), "x3d_s")
    message, mismatches = str(caught.value), caught.value.mismatches
    assert message.count("x3d_s") == 1 and message.startswith("a.pyth (PySlowFast) must match x3d_s or another variant")
    assert "\n" not in message and message.endswith(f": {'; '.join(mismatches[:10])}; ...")
    assert len(mismatches) > 200 and f"but has {len(mismatches)} mismatches: " in message


def test_a_message_has_ten_values_that_are_not_finite(tensors: Any, read: Any) -> None:
    state = tensors(value=np.nan)
    with pytest.raises(MismatchError) as caught:
        read(state)
    names = [name for name in state if "num_batches" not in name]
    assert caught.value.mismatches == tuple(f"values that are not finite: {name}" for name in names)
    assert str(caught.value).endswith(f"; values that are not finite: {names[9]}; ...") and len(names) > 10


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({}, "it is empty"),
        ([], "it holds a value of type list"),
        (3, "it holds a value of type int"),
        ({"epoch": 3, "cfg\n": "x"}, r"no key of it holds one; its keys are: epoch, 'cfg\n'"),
        ({"model_state": {"a": 1}}, "no key of it holds one; its keys are: model_state"),
        ({"state_dict": {}}, "no key of it holds one; its keys are: state_dict"),
        (dict.fromkeys("abcdefghijk"), "its keys are: a, b, c, d, e, f, g, h, i, j, ..."),
    ],
)
def test_files_without_a_state_dict(read: Any, content: object, found: str) -> None:
    with pytest.raises(UserError, match=r"a\.pyth must contain a state dict, .*, but .*" + re.escape(found) + "$"):
        read(content)


def test_unknown_names_are_escaped(tmp_path: Path) -> None:
    names = ("layer1.0.weight", "\x1b[2J")
    write_checkpoint(tmp_path / "a.pyth", dict.fromkeys(names, np.ones(3, np.float32)))
    with pytest.raises(
        UserError, match=r"2 tensors .* no known X3D implementation .*, for example layer1\.0\.weight, '\\x1b\[2J'$"
    ):
        read_state_dict(tmp_path / "a.pyth", SMALL)


def test_self_references_and_thousands_of_prefixes(tensors: Any, read: Any) -> None:
    state = tensors()
    content: dict[str, Any] = {"model": state}
    content["self"] = [content, {"again": content}]
    assert read(content).location == "model"
    nested: Any = state
    for _ in range(20_000):
        nested = {"deeper": nested}
    with pytest.raises(UserError, match="must contain a state dict"):
        read(nested)
    head = state["head.projection.bias"]
    many = {f"copy{number}.head.projection.bias": head for number in range(20_000)}
    assert read(many | state | {"x." * 100_000: head, "." * 100_000: head} | {"model": state}).location == "model"

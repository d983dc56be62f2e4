"""Where in a checkpoint the weights of a network are, whatever wraps them, and what is said where they are not."""

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
from x3d_tf.modeling.pytorch.state_dicts import StateDict, read_state_dict
from x3d_tf.modeling.pytorch.weight_names import NAMINGS, Naming, source_shapes

SMALL = Expansion(gamma_tau=1, gamma_t=2, gamma_s=64 / 112, gamma_w=1 / 3, gamma_b=2.25, gamma_d=0.4)
WIDER = replace(SMALL, gamma_w=0.5)  # the same names, other shapes
DEEPER = replace(SMALL, gamma_d=0.8)
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tensors]:
    """Makes the tensors of a network, as a file has them; others with another `value`."""
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
    """Reads a network in a file of this content."""

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
def test_prefixes_are_taken_off(tensors: Any, read: Any, naming: Naming, prefix: str) -> None:
    own = tensors(naming)
    found = read({"state_dict": below(prefix, own), "epoch": 3})
    counters = sum("num_batches" in name for name in own)
    assert found.tensors == {name: tensor for name, tensor in own.items() if "num_batches" not in name}
    assert (found.naming, found.counters, found.outside) == (naming, counters, ())
    assert found.place == "state_dict" + (f", names that begin with {prefix}" if prefix else "")


@pytest.mark.parametrize(
    ("wrap", "place"),
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
def test_wrappers_are_taken_off(tensors: Any, read: Any, wrap: Callable[[Tensors], Any], place: str) -> None:
    own = tensors()
    found = read(wrap(own))
    assert found.place == place
    assert found.tensors == {name: tensor for name, tensor in own.items() if "num_batches" not in name}


def test_the_one_network_that_fits_is_taken(tensors: Any, read: Any) -> None:
    own = tensors()
    others = {"wider": tensors(network=WIDER), "deeper": tensors(network=DEEPER), "half": dict(list(own.items())[:40])}
    for name, other in others.items():
        assert read({"teacher": other, "student": own}).place == "student", name
        assert read(below("teacher.", other) | below("student.", own)).place == "names that begin with student.", name
    loss = {"criterion.weight": own["s1.pathway0_stem.bn.weight"]}
    found = read(below("model.", own) | loss)
    assert (found.outside, len(found.tensors)) == (("criterion.weight",), len(read(own).tensors))
    ema = read(below("ema.", own) | own)  # equal, so either will do
    assert len(ema.tensors) == len(found.tensors)


@pytest.mark.parametrize(
    ("wrap", "places"),
    [
        (lambda a, b: {"model": a, "ema": b}, "model, ema"),
        (lambda a, b: {"state_dict": below("model.", a) | below("ema.module.", b)}, "state_dict, names that begin"),
        (lambda a, b: a | below("ema.", b), "by itself, names that begin with ema."),
        (lambda a, b: {"model": {"a": a}, "b": [b]}, "model > a, b > 0"),
    ],
)
def test_several_networks_that_fit_are_an_error(
    tensors: Any, read: Any, wrap: Callable[[Tensors, Tensors], Any], places: str
) -> None:
    with pytest.raises(
        UserError, match=r"a\.pyth holds 2 different networks that are each x3d\(.*Save the one"
    ) as caught:
        read(wrap(tensors(), tensors(value=0.25)))
    assert places in str(caught.value)


@pytest.mark.parametrize(
    ("naming", "variant", "alike"),
    [
        ("slowfast", "x2d", "x2d"),
        ("pytorchvideo", "x3d_s", "x3d_xs or x3d_s or x3d_m"),
        ("pytorchvideo_mobile", "x3d_l", "x3d_l"),
        ("mmaction2", "x3d_m", "x3d_xs or x3d_s or x3d_m"),
    ],
)
def test_a_wrong_variant_is_told_in_one_line(tensors: Any, read: Any, naming: Naming, variant: str, alike: str) -> None:
    state = {"model_state": below("module.", tensors(naming, VARIANTS[variant].expansion, classes=400))}
    for other in ("x3d_xl", "x2d" if variant != "x2d" else "x3d_xxl"):
        with pytest.raises(UserError) as caught:
            read(state, other)
        title = state_dicts.TITLES[naming]
        assert str(caught.value) == (
            f"network (--variant) must be {alike}, which a.pyth ({title}) has the names and shapes of, got {other!r}"
        )
    assert read(state, variant).num_classes() == 400


def test_the_closest_variant_is_told(tensors: Any, read: Any) -> None:
    own = tensors(network=VARIANTS["x3d_l"].expansion)
    del own["s1.pathway0_stem.bn.bias"]
    with pytest.raises(UserError) as caught:
        read(own, "x3d_m")
    first, *rest = str(caught.value).splitlines()
    assert first.startswith(
        "network (--variant) must be x3d_l, which a.pyth (PySlowFast) is closest to, got 'x3d_m'; 1 "
    )
    assert rest == ["missing: s1.pathway0_stem.bn.bias 24"]
    with pytest.raises(UserError, match=r"has the names of PySlowFast, and 1 tensors do not fit x3d_l:\nmissing"):
        read(own, "x3d_l")
    with pytest.raises(UserError, match=r"tensors do not fit x3d\(.*, and it is of none of x2d, .*x3d_xxl:\n"):
        read(tensors(network=WIDER), DEEPER)


@pytest.mark.parametrize(
    "content",
    [{}, [], 3, {"epoch": 3, "cfg": "x"}, {"model_state": {"a": 1}}, {"state_dict": {}}, {"model": {"model": {}}}],
)
def test_files_without_a_state_dict(read: Any, content: object) -> None:
    with pytest.raises(UserError, match=r"a\.pyth holds no state dict"):
        read(content)


def test_strange_names(tmp_path: Path) -> None:
    names = ("layer1.0.weight", "\x1b[2J")
    write_checkpoint(tmp_path / "a.pyth", dict.fromkeys(names, np.ones(3, np.float32)))
    with pytest.raises(UserError, match=r"2 tensors .* no X3D known here .*, such as layer1\.0\.weight, '\\x1b\[2J'$"):
        read_state_dict(tmp_path / "a.pyth", SMALL)


def test_files_that_contain_themselves_or_thousands_of_prefixes(tensors: Any, read: Any) -> None:
    own = tensors()
    content: dict[str, Any] = {"model": own}
    content["self"] = [content, {"again": content}]
    assert read(content).place == "model"
    nested: Any = own
    for _ in range(20_000):
        nested = {"deeper": nested}
    with pytest.raises(UserError, match="holds no state dict"):
        read(nested)
    head = own["head.projection.bias"]
    many = {f"copy{number}.head.projection.bias": head for number in range(20_000)}
    assert read(many | own | {"x." * 100_000: head, "." * 100_000: head} | {"model": own}).place == "model"

"""The networks that benchmarks/search_comparison.py draws, and its table. No TensorFlow."""

from types import SimpleNamespace
from typing import Any

import pytest
import search_comparison
from search_comparison import Compared, draw_networks, table

from x3d_tf.modeling.architecture import ModelOptions
from x3d_tf.modeling.cost import cost
from x3d_tf.modeling.expansion import Expansion
from x3d_tf.search.candidates import Network, Result, Score
from x3d_tf.search.config import ExpandConfig
from x3d_tf.search.outputs import found
from x3d_tf.search.search import Search

TINY = Expansion(gamma_tau=1.0, gamma_t=1, gamma_s=48 / 112, gamma_w=0.5)


@pytest.fixture(scope="module")
def search() -> Search:
    """A search of three steps that always widens, with two seeds."""
    search = Search(ExpandConfig(budget_gmacs=0.013, seeds=2), TINY, num_classes=4)
    while pending := search.pending():
        for candidate in pending:
            search.record(candidate, Score(0.5 if candidate.axis == "width" else 0.3))
    return search


@pytest.fixture(scope="module")
def networks(search: Search) -> dict[str, Network]:
    return dict(draw_networks(search, 4, ModelOptions(), seed=0))


def test_the_first_network_follows_the_axes_of_the_paper(search: Search, networks: dict[str, Network]) -> None:
    assert [step.best.network.axis for step in search.steps] == ["width"] * 3
    network = networks["paper's path"].expansion
    assert network.gamma_b > 1.5 and network.gamma_t >= 2 and network.gamma_s > TINY.gamma_s
    assert (network.gamma_w, network.gamma_d) == (TINY.gamma_w, TINY.gamma_d)
    assert networks["X2D"].expansion == Expansion()


def test_random_networks_have_the_cost_of_the_found_one(search: Search, networks: dict[str, Network]) -> None:
    randoms = [network for name, network in networks.items() if name.startswith("random")]
    macs = found(search).network.cost.macs
    assert all(abs(network.cost.macs / macs - 1) <= 0.1 for network in randoms)
    assert len({network.expansion for network in randoms}) == len(randoms) > 1
    assert {network.cost.macs for network in randoms} == {
        cost(network.expansion, num_classes=4).macs for network in randoms
    }
    again, other = (dict(draw_networks(search, 4, ModelOptions(), seed=seed)) for seed in (0, 1))
    assert again == networks != other


def test_random_networks_cost_half_of_the_search(search: Search, networks: dict[str, Network]) -> None:
    spent = sum(2 * row.network.cost.macs for step in search.steps for row in step.results)
    each = 2 * found(search).network.cost.macs
    assert len([name for name in networks if name.startswith("random")]) == spent // 2 // each


def test_a_search_without_equals_is_refused(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_comparison, "_DRAWS", 0)
    with pytest.raises(ValueError, match="must have a network whose cost other axes reach"):
        list(draw_networks(search, 4, ModelOptions(), seed=0))
    monkeypatch.setattr(search_comparison, "LARGEST_DIFFERENCE", -1.0)
    with pytest.raises(ValueError, match=r"the network of the paper's path must have the multiply-adds of .*, got \d+"):
        list(draw_networks(search, 4, ModelOptions(), seed=0))


def test_another_configuration_than_that_of_the_search_is_refused() -> None:
    setup: Any = SimpleNamespace(identity={"Recipe.steps": 500, "Recipe.decay_fractions": ()})
    search_comparison.require_same_trainings(setup, {"Recipe.steps": 500, "Recipe.decay_fractions": []})
    with pytest.raises(ValueError, match=r"^Recipe\.steps must be 300, as in the search, got 500"):
        search_comparison.require_same_trainings(setup, {"Recipe.steps": 300, "Recipe.decay_fractions": []})


def test_a_failed_training_does_not_hide_the_others(networks: dict[str, Network]) -> None:
    first, second = [network for name, network in networks.items() if name.startswith("random")][:2]
    failed = Compared("random 01", Result(first, (Score(0.9), Score(None, reason="the loss is nan"))), ())
    lines = table([failed, Compared("random 02", Result(second, (Score(0.5),)), (Score(0.4),))], "top-1")
    assert lines[1].count("failed") == 2 and lines[1].endswith(": the loss is nan")
    assert "random 02 *" in lines[2] and lines[-1].endswith("is 0.4000")
    assert len(table([failed], "top-1")) == 2


def test_the_table_marks_the_best_random_network_on_the_validation_split(networks: dict[str, Network]) -> None:
    def compared(name: str, network: Network, validation: list[float], test: list[float]) -> Compared:
        scores = tuple(Score(value, 0.03) for value in validation)
        return Compared(name, Result(network, scores), tuple(Score(value, 0.04) for value in test))

    first, second = [network for name, network in networks.items() if name.startswith("random")][:2]
    rows = [
        compared("random 01", first, [0.5, 0.7], [0.8, 0.9]),
        compared("random 02", second, [0.7, 0.8], [0.4, 0.5]),
    ]
    lines = table(rows, "top-1")
    assert "random 02 *" in lines[2] and "*" not in lines[1]
    # The spread of the seeds, 0.1, and the error of one score, 0.03, add up: sqrt(0.1**2 + 0.03**2).
    assert "0.6000 ± 0.1044" in lines[1] and "0.8500 ± 0.0640" in lines[1]
    assert lines[-1].endswith("the mean of the random networks on the test split is 0.6500")

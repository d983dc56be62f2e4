"""Pictures of searches and of sweeps, from traces and reports alone. No TensorFlow."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from report_settings import detection_settings, precision_of, settings

from x3d_tf import expand, plots
from x3d_tf.errors import UserError
from x3d_tf.evaluation.inference_cost import find_sweeps, save_inference_cost
from x3d_tf.evaluation.metrics import TOP1
from x3d_tf.evaluation.paper_points import FIGURE_2_POINTS, FIGURE_3_POINTS
from x3d_tf.evaluation.reports import metrics_to_json
from x3d_tf.search.candidates import Candidate, Score
from x3d_tf.search.config import ExpandConfig
from x3d_tf.search.loop import run_search
from x3d_tf.types import Metric

CLIPS = (1, 3, 5, 7, 10)
Call = Callable[..., None]


def top1(network: str, clips: int) -> float:
    """Returns a synthetic accuracy, different for each network and number of clips."""
    return len(network) / 20 - 0.1 / clips


def write(folder: Path, network: str, clips: int, **changes: Any) -> Path:
    """Writes results.json of K-Center evaluation; X3D-S has 2 GMACs per clip, and others 3."""
    cost = 2.0 if network == "x3d_s" else 3.0
    results = settings(
        network=network,
        records=f"{folder}/mine",
        records_sha256="a" * 64,
        views=f"{clips}-Center",
        gmacs_per_clip=cost,
        gmacs_per_sample=cost * clips,
        metrics=metrics_to_json([TOP1]),
        top1=top1(network, clips),
    )
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results | changes))
    return folder / "results.json"


def write_sweep(run: Path, network: str, split: str = "val", clips: tuple[int, ...] = CLIPS, **changes: Any) -> None:
    for k in clips:
        write(run / "evaluation" / f"mine_{split}_{k}center", network, k, split=split, **changes)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Returns a list of the rows of all pictures of inference costs, which are drawn, too."""
    rows: list[Any] = []
    save = plots.save_inference_cost

    def spy(panels: Any, *arguments: Any) -> None:
        rows.extend(panels)
        save(panels, *arguments)

    monkeypatch.setattr(plots, "save_inference_cost", spy)
    return rows


def test_networks_on_the_same_samples_share_panels(drawn: list[Any], tmp_path: Path) -> None:
    """Costs are those of all clips, in ascending order, whatever the order of the folders' names."""
    write_sweep(tmp_path / "large", "x3d_m")
    write_sweep(tmp_path / "x3d_s", "x3d_s")
    lines = save_inference_cost(tmp_path, tmp_path / "a.png")
    (row,) = drawn
    assert (row.metric, row.sample, row.paper) == (TOP1, "video", ())
    assert row.title == "mine, split val, 40 videos, 400 classes"
    assert lines == [f"{row.title}: top-1 of 2 networks"]
    small, large = row.curves  # by cost of a clip
    assert (small.name, large.name) == ("x3d_s", "large: x3d_m")
    assert small.points == [(2.0 * k, top1("x3d_s", k), k) for k in CLIPS]
    assert large.points == [(3.0 * k, top1("x3d_m", k), k) for k in CLIPS]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "changes",
    [
        {"split": "test"},
        {"records_sha256": "b" * 64},
        {"samples": 41},
        {"classes": 4},
        {"task": "playback"},
        precision_of(0.5),
        {"metrics": metrics_to_json([Metric("top1", "share", label="accuracy")])},
    ],
)
def test_networks_on_other_samples_or_metrics_get_panels_of_their_own(
    drawn: list[Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    write_sweep(tmp_path / "a", "x3d_s")
    write_sweep(tmp_path / "b", "x3d_m", **changes)
    lines = save_inference_cost(tmp_path, tmp_path / "a.png", paper=True)
    assert [[curve.name for curve in row.curves] for row in drawn] == [["a: x3d_s"], ["b: x3d_m"]]
    assert drawn[0].paper == FIGURE_3_POINTS
    others = drawn[1].metric
    assert drawn[1].paper == (FIGURE_3_POINTS if others == TOP1 else ())
    assert lines[2:] == ([] if others == TOP1 else [f"{drawn[1].title}: the paper has no points for {others.label}"])


def test_the_same_records_in_another_folder_are_the_same_samples(tmp_path: Path) -> None:
    write_sweep(tmp_path / "a", "x3d_s", records="here/mine")
    write_sweep(tmp_path / "b", "x3d_m", records="there/mine")
    assert len(find_sweeps(tmp_path)) == 1


@pytest.mark.parametrize(
    ("folder", "run", "name"),
    [
        (".", "evaluation/mine_val", "x3d_s"),  # a run folder
        ("evaluation", "evaluation/mine_val", "x3d_s"),
        (".", "reports", "x3d_s"),  # --sweep with --output
        (".", "a/evaluation/mine_val", "a: x3d_s"),
        (".", "found/evaluation/mine_val", "found: x3d_s"),
        (".", "candidates/a/evaluation/mine_val", "candidates/a: x3d_s"),
        (".", "runs/x3d_s/evaluation/mine_val", "runs/x3d_s"),
        (".", "one/candidates/a/evaluation/mine_val", None),  # too deep
    ],
)
def test_reports_are_found_four_levels_deep(tmp_path: Path, folder: str, run: str, name: str | None) -> None:
    for k in (1, 3):
        write(tmp_path / f"{run}_{k}", "x3d_s", k)
    found = [[sweep.name for sweep in row] for row in find_sweeps(tmp_path / folder)]
    assert found == ([[name]] if name else [])


def test_the_clips_of_a_report_folder_are_not_curves_of_their_own(tmp_path: Path) -> None:
    """Candidates have a report each, and other crops, weights or clip starts are other curves."""
    write_sweep(tmp_path / "a", "x3d_s", clips=(1, 3))
    write_sweep(tmp_path / "candidate", "x3d_m", clips=(3,))
    run = tmp_path / "a" / "evaluation"
    for k in (1, 3):
        more = {"views": f"{k}-LeftCenterRight", "gmacs_per_clip": 2.6, "gmacs_per_sample": 7.8 * k}
        write(run / f"{k}leftcenterright", "x3d_s", k, **more)
        write(run / f"{k}center_slowfast_starts", "x3d_s", k, clip_starts="slowfast")
    write(run / "old", "x3d_s", 5, weights_sha256="c" * 64)
    (row,) = find_sweeps(tmp_path)
    names = ["a: x3d_s (clip_starts=offset)", "a: x3d_s (clip_starts=slowfast)", "a: x3d_s, LeftCenterRight"]
    assert sorted(sweep.name for sweep in row) == names
    assert all(list(sweep.reports) == [1, 3] for sweep in row)


def test_reports_without_a_number_of_clips_are_no_sweeps(tmp_path: Path) -> None:
    for number, views in enumerate(("centre crop of 256²", "0-Center", "3", "99999-Center")):
        write(tmp_path / str(number), clips=1, **detection_settings(views=views, gmacs_per_sample=6.2 + number))
    assert find_sweeps(tmp_path) == []
    assert save_inference_cost(tmp_path, tmp_path / "a.png") == [] and not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is not valid JSON"),
        (json.dumps(settings(top1=1.5, top5=1)), r"top1 must be in [0, 1], got 1.5"),
        (json.dumps(settings(top1=0.5, top5=1, gmacs_per_sample=0)), "gmacs_per_sample must be at least 1e-09, got 0"),
    ],
)
def test_damaged_reports_are_named_and_left_out(
    tmp_path: Path, content: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sweep(tmp_path, "x3d_s")
    path = tmp_path / "evaluation" / "mine_val_5center" / "results.json"
    path.write_text(content)
    ((sweep,),) = find_sweeps(tmp_path)
    assert list(sweep.reports) == [1, 3, 7, 10]
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: a report is left out: {path}") and reason in warning


def test_too_many_networks_for_a_picture(tmp_path: Path) -> None:
    for number in range(9):
        write_sweep(tmp_path / str(number), "x3d_s", f"split{number}", clips=(1, 3))
    with pytest.raises(UserError, match=r"must have sweeps on at most 8 data sets; choose a folder with fewer .*got 9"):
        save_inference_cost(tmp_path, tmp_path / "a.png")
    for number in range(41):
        write_sweep(tmp_path / "more" / str(number), "x3d_s", clips=(1, 3))
    with pytest.raises(UserError, match=r"must have sweeps of at most 40 networks; choose a folder with .*got 41"):
        save_inference_cost(tmp_path / "more", tmp_path / "a.png")


class Synthetic:
    """Executor with a score for each candidate that grows with the steps."""

    def scores(self, candidates: tuple[Candidate, ...]) -> Iterator[tuple[Candidate, Score]]:
        for candidate in candidates:
            yield candidate, Score(0.1 * candidate.step + 0.001 * len(candidate.axis), 0.01)


def write_trace(folder: Path, metric: str = "top-1") -> None:
    config = ExpandConfig(budget_gmacs=0.08, axes=("spatial", "depth"))
    run_search(folder, config, Synthetic(), settings={"metric": metric})


@pytest.fixture
def staircases(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Returns a list of the metric and the paper's points of each staircase, which are drawn, too."""
    found: list[Any] = []
    save = plots.save_staircase

    def spy(*arguments: Any) -> None:
        found.append(arguments[-2:])
        save(*arguments)

    monkeypatch.setattr(plots, "save_staircase", spy)
    return found


def test_a_work_folder_gets_both_pictures(
    in_process: Call, staircases: list[Any], drawn: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_trace(tmp_path)
    write_sweep(tmp_path / "found", "x3d_s")
    in_process(expand, f"--plot={tmp_path}")
    assert capsys.readouterr().out == (
        f"written: {tmp_path}/staircase.png\n  top-1 of 2 steps\nwritten: {tmp_path}/inference_cost.png\n"
        "  mine, split val, 40 videos, 400 classes: top-1 of 1 network\n"
    )
    assert staircases == [("top-1", ())] and drawn[0].paper == ()
    in_process(expand, f"--plot={tmp_path}", "--paper")
    assert staircases[1] == ("top-1", FIGURE_2_POINTS) and drawn[1].paper == FIGURE_3_POINTS


def test_what_is_missing_is_stated(
    in_process: Call, staircases: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_trace(tmp_path / "search", "mAP")
    in_process(expand, f"--plot={tmp_path / 'search'}", "--paper")
    out = capsys.readouterr().out
    assert "  mAP of 2 steps\n  the paper has no points for mAP\nnot drawn: inference_cost.png, for which" in out
    assert staircases == [("mAP", ())]
    write_sweep(tmp_path / "runs" / "a", "x3d_s")
    in_process(expand, f"--plot={tmp_path / 'runs'}")
    assert f"not drawn: staircase.png, for which {tmp_path}/runs would need trace.jsonl" in capsys.readouterr().out


def test_a_folder_without_sources_is_an_error(in_process: Call, tmp_path: Path) -> None:
    rule = r"must hold trace\.jsonl of a search with a finished step, or run folders with reports of .* --sweep$"
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match=f"^{folder} {rule}"):
            in_process(expand, f"--plot={folder}")
    write_trace(tmp_path / "search")
    path = tmp_path / "search" / "trace.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])  # the settings alone
    with pytest.raises(UserError, match=rule):
        in_process(expand, f"--plot={tmp_path / 'search'}")
    assert not [*tmp_path.rglob("*.png")]
    with pytest.raises(UserError, match="--paper requires --plot"):
        in_process(expand, "--replay=paper", "--paper")

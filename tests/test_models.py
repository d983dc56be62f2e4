"""Loading of models for export, and model cards."""

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from report_settings import settings
from x3d_tf.export import models
from x3d_tf.export.models import ExportableModel, open_model

import x3d_tf
from x3d_tf.config import TrainConfig
from x3d_tf.data.datasets.spec import DatasetSpec
from x3d_tf.evaluation.metrics import TOP1
from x3d_tf.evaluation.reports import metrics_to_json
from x3d_tf.files import atomic_write
from x3d_tf.types import Metric, Storage

TINY = x3d_tf.Expansion(gamma_tau=2, gamma_t=4, gamma_s=64 / 112, gamma_d=0.2)
NAMES = ("hug", "kick", "wave")
NETWORK = "x3d_tau_2_t_4"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with the files that exporters read."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    folder.mkdir()
    model = x3d_tf.build_x3d(TINY, num_classes=3)
    model.stretch, model.frame_sampling, model.stored = True, "exact", Storage(96, 90)
    x3d_tf.save(model, folder / "model.keras", NAMES)
    dataset = DatasetSpec("data/mine", stretch=True, frame_sampling="exact")
    (folder / "config.json").write_text(replace(TrainConfig(), expansion=TINY, dataset=dataset, seed=5).to_json())
    return folder


@pytest.fixture(scope="module")
def source(run: Path) -> ExportableModel:
    return open_model(run)


def test_the_card_of_a_run_describes_its_training(run: Path, source: ExportableModel) -> None:
    assert source.class_names == NAMES
    assert (source.frame_sampling, source.views.stretch, source.views.crop) == ("exact", True, 64)
    card = json.loads(json.dumps(source.card()))
    assert card["training"]["run"] == "mine"
    assert (card["training"]["records"], card["training"]["seed"]) == ("data/mine", 5)
    assert card["training"]["tested"] == []
    assert "gin_files" not in card["training"]  # it was not started by the command
    assert str(run.parent) not in json.dumps(card)  # paths stay private


def test_the_card_states_the_recipe(run: Path, source: ExportableModel, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "mine")
    recipe = {"gin_files": ["gin/kinetics400/x3d_m.gin"], "changed_settings": ["Recipe.batch"]}
    (tmp_path / "mine" / "recipe.json").write_text(json.dumps(recipe))
    training = replace(source, path=tmp_path / "mine").card()["training"]
    assert {name: training[name] for name in recipe} == recipe


def test_the_card_states_the_metrics_of_the_reports(run: Path, source: ExportableModel, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "mine")
    metrics = metrics_to_json((Metric("mae", "number", label="mean error"), TOP1))
    stated = {"metrics": metrics, "sample": "recording", "samples": 7}
    results = settings(**stated) | {"mae": -2.5, "top1": 0.5, "top5": 0.75}
    (tmp_path / "mine" / "evaluation" / "a").mkdir(parents=True)
    (tmp_path / "mine" / "evaluation" / "a" / "results.json").write_text(json.dumps(results))
    (tested,) = replace(source, path=tmp_path / "mine").card()["training"]["tested"]
    where = {"records": "data/mine", "split": "val", "sample": "recording", "samples": 7, "views": "10-Center"}
    assert tested == {**where, "mae": -2.5, "top1": 0.5}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            json.dumps({"network": "x3d_s", "top1": 0.5, "videos": 7}),
            r"old.* is not a report of this version of x3d_tf: ",
        ),
        (
            json.dumps({"detections": "found.csv", "map": 0.5}),
            r"old.* must be the report of a network, not of a csv file",
        ),
        ("{", r"old.* is not valid JSON"),
    ],
)
def test_the_card_omits_invalid_reports(
    run: Path, source: ExportableModel, tmp_path: Path, content: str, message: str
) -> None:
    """The model is intact nevertheless."""
    shutil.copytree(run, tmp_path / "mine")
    for name, text in (("old", content), ("valid", json.dumps(settings() | {"top1": 0.5, "top5": 0.75}))):
        (tmp_path / "mine" / "evaluation" / name).mkdir(parents=True)
        (tmp_path / "mine" / "evaluation" / name / "results.json").write_text(text)
    with pytest.warns(UserWarning, match=rf"the model card omits a report: .*{message}"):
        card = replace(source, path=tmp_path / "mine").card()
    assert [tested["top1"] for tested in card["training"]["tested"]] == [0.5]


def test_the_card_describes_input_and_cost(source: ExportableModel) -> None:
    card = source.card()
    rules = card["input"].pop("rules")
    assert rules["stored"] == (
        "each frame of a clip is compressed as a JPEG file with quality 90 and decoded with the accurate integer DCT"
    )
    assert card["input"] == {
        "frames": 4,
        "stride": 2.0,
        "frames_per_second": 30.0,
        "frame_sampling": "exact",
        "offsets": [0, 2, 4, 6],
        "clips": 10,
        "combine": "mean",
        "stored": {"short_side": 96, "jpeg_quality": 90},
        "decoded_short_side": 96,
        "resize": 73,
        "resized": "both sides",
        "crop": 64,
        "shape": ["N", 4, 64, 64, 3],
        "colours": "RGB",
        "range": [0, 255],
        "normalisation": "inside the model: (value - 114.75) / 57.375",
    }
    assert card["classes"] == list(NAMES)
    assert card["params"] == x3d_tf.cost(TINY, num_classes=3).params
    assert card["expansion"]["gamma_d"] == 0.2
    assert card["created_by"] == f"x3d_tf {x3d_tf.__version__}"


def test_the_card_of_a_file_has_no_training(run: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = open_model(run / "model.keras")
    assert source.card()["training"] is None
    assert (source.frame_sampling, source.model.stored) == ("exact", Storage(96, 90))  # the same clips


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("mine", "mine"),
        ("kicks v1.2 (best)", "kicks_v1.2_best_"),
        ("été", "été"),
        ("e\u0301te\u0301", "été"),  # decomposed, as on macOS
        ("запуск", "запуск"),
        ("a:b*c?'d\\e$(f)\n", "a_b_c_d_e_f_"),
        (".hidden", "hidden"),  # export.verify ignores hidden files
        ("--overwrite", "overwrite"),
        ("...", NETWORK),
        ("é" * 120, "é" * 50),  # file names have at most 255 bytes
        ("\udcff", "_"),  # an invalid byte
    ],
)
@pytest.mark.parametrize("suffix", ["", ".keras"], ids=["run", "file"])
def test_an_export_is_named_after_the_run_or_the_file(given: str, expected: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"{given}{suffix}"
    path.touch() if suffix else path.mkdir()
    source = ExportableModel(path, SimpleNamespace(name=NETWORK), NAMES, None)
    assert source.name == expected
    atomic_write(tmp_path / f"{source.name}_float32.tflite", b"")  # writes a temporary file with a longer name


def test_the_name_of_a_folder_is_resolved(
    run: Path, source: ExportableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load", lambda path: source.model)  # saves loading it three times
    (tmp_path / "latest").symlink_to(run)
    assert open_model(tmp_path / "latest").name == "mine"
    monkeypatch.chdir(run)
    assert open_model(".").name == "mine"
    assert open_model("model.keras").name == "model"


def test_missing_class_names_give_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="numbered"):
        x3d_tf.save(x3d_tf.build_x3d(TINY, num_classes=2), tmp_path / "model.keras")
    with pytest.warns(UserWarning, match="has no class names: 2 classes numbered from 0"):
        assert open_model(tmp_path).class_names == ("0", "1")


def test_a_network_without_classifier_is_not_exported(tmp_path: Path) -> None:
    x3d_tf.save(x3d_tf.build_x3d(TINY, include_top=False), tmp_path / "features.keras")
    with pytest.raises(ValueError, match=r"features\.keras must have a classifier"):
        open_model(tmp_path / "features.keras")

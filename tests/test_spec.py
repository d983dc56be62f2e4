"""Settings of data sets, and the splits that they open."""

from pathlib import Path
from typing import Any

import pytest
from video_fixtures import noise_video, write_records

from x3d_tf.data.datasets.spec import DatasetSpec, open_dataset, open_for_training, with_default_splits
from x3d_tf.errors import UserError


@pytest.mark.parametrize("field", ["train_split", "eval_split", "validation_split"])
@pytest.mark.parametrize("name", ["../../precious", "/etc", "a\\b"])
def test_a_split_is_not_a_path(field: str, name: str) -> None:
    """Split names are part of folder names to which reports are written, and from which --overwrite deletes."""
    with pytest.raises(UserError, match=f"DatasetSpec.{field} must be a name, not a path"):
        DatasetSpec("records", **{field: name})  # type: ignore[arg-type]


def spec(folder: Path, **settings: Any) -> DatasetSpec:
    return DatasetSpec(**({"records": str(folder), "flip": False, "name": "moving_shapes"} | settings))


def test_existing_records_are_opened_unchanged(tmp_path: Path) -> None:
    written = write_records(tmp_path, {"train": [noise_video(0, 2)], "test": [noise_video(1, 2)]})
    assert open_dataset(DatasetSpec(str(tmp_path))) == written
    with pytest.raises(ValueError, match="has no split 'val'; it has train, test"):
        open_dataset(DatasetSpec(str(tmp_path), eval_split="val"))
    with pytest.raises(ValueError, match=r"holds no finished records.*x3d_tf\.build_records"):
        open_dataset(DatasetSpec(str(tmp_path / "nowhere")))


@pytest.mark.parametrize(
    ("names", "settings", "expected"),
    [
        ("train test", {}, ("test", None, 0.0)),
        ("train test", {"validation_fraction": 0.1}, ("test", None, 0.1)),
        ("train val test", {}, ("test", "val", 0.0)),
        ("train validation test", {}, ("test", "validation", 0.0)),
        ("train val test", {"validation_fraction": 0.1}, ("test", "val", 0.0)),
        ("train val test", {"validation_split": "test"}, ("test", "test", 0.0)),
        ("train val", {}, ("val", "val", 0.0)),
        ("train val", {"validation_fraction": 0.1}, ("val", "val", 0.0)),
        ("train val", {"eval_split": "val"}, ("val", None, 0.0)),  # like the recipes for AVA: only the final evaluation
        ("train val", {"eval_split": "val", "validation_fraction": 0.1}, ("val", None, 0.1)),
        ("train val test", {"train_split": "val"}, ("test", None, 0.0)),
        ("one two", {"train_split": "one"}, ("test", None, 0.0)),  # rejected when opened
        ("train val", {"eval_split": "two"}, ("two", "val", 0.0)),
    ],
)
def test_default_splits_of_training(
    names: str, settings: dict[str, Any], expected: tuple[str, str | None, float]
) -> None:
    found = with_default_splits(DatasetSpec("unused", **settings), names.split())
    assert (found.eval_split, found.validation_split, found.validation_fraction) == expected
    assert with_default_splits(found, names.split()) == found or settings.get("eval_split") == "val"


def test_records_are_opened_for_training(tmp_path: Path) -> None:
    one = [noise_video(0, 2)]
    write_records(tmp_path / "a", {"train": one, "val": one})
    spec = DatasetSpec(str(tmp_path / "a"))
    with pytest.raises(ValueError, match="has no split 'test'; it has train, val"):
        open_dataset(spec)
    manifest, found = open_for_training(spec)
    assert (list(manifest.splits), found.eval_split, found.validation_split) == (["train", "val"], "val", "val")
    write_records(tmp_path / "b", {"train": one})
    with pytest.raises(ValueError, match=r"has no split 'test'; it has train$"):
        open_for_training(DatasetSpec(str(tmp_path / "b")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flip": True}, "DatasetSpec.flip must be False for moving_shapes"),
        (
            {"name": "kinetics"},
            "DatasetSpec.name: there is no data set 'kinetics': the names are ava, ava_v2.1, ava_v2.2, charades",
        ),
        ({"records": ""}, "DatasetSpec.records must not be empty"),
        ({"train_split": 3}, "DatasetSpec.train_split must be str, got 3"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec(Path("a"), **settings)

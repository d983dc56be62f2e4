"""Predicting what persons in video files do: boxes from files and from a detector, and tables."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from video_fixtures import numbered_frames, write_video

import x3d_tf
from x3d_tf import predict
from x3d_tf.data import transforms
from x3d_tf.data.ava_files import read_boxes
from x3d_tf.data.sampling import key_frame_indices
from x3d_tf.data.video.decode import VideoError, as_stored, probe, read_frames
from x3d_tf.errors import UserError
from x3d_tf.inference.actions import (
    ActionScores,
    CsvBoxes,
    PersonDetector,
    detect_actions,
    detections,
    format_actions,
)
from x3d_tf.inference.drawing import draw_video
from x3d_tf.types import Storage

pytestmark = pytest.mark.usefixtures("uncompiled_module")

TINY = x3d_tf.Expansion(gamma_tau=5, gamma_t=4, gamma_s=32 / 112, gamma_b=1, gamma_d=0.2)
NAMES = ("sit", "talk to (e.g., self, a person, a group)", "wave")
ROWS = (
    "film,0000,0.1,0.1,0.5,0.9,,0.9\nfilm,0001,0.5,0.2,0.9,0.8,,0.95\nfilm,0001,0,0,1,1,,0.3\nfilm,0001,0,0,1,1,7,0.8\n"
)


@pytest.fixture(scope="module")
def model() -> Any:
    network = x3d_tf.build_detector(TINY, num_classes=3)
    fc2 = network.get_layer("fc2")
    fc2.kernel.assign(np.random.default_rng(0).standard_normal(fc2.kernel.shape) * 0.1)
    network.class_names = NAMES
    return network


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wide video of two and a half seconds."""
    return write_video(tmp_path_factory.mktemp("videos") / "film.mp4", numbered_frames(75, 48, 97))


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    (tmp_path / "boxes.csv").write_text(ROWS)
    return tmp_path / "boxes.csv"


def test_every_second_is_what_the_network_says_of_the_clip_around_it(model: Any, film: Path, listed: Path) -> None:
    found = list(detect_actions(model, film, CsvBoxes(listed, 0.8).of_video("film"), progress=False))
    assert [each.second for each in found] == [0, 1, 2]
    assert [len(each.boxes) for each in found] == [1, 2, 0]
    frames = np.stack([frame.pixels for frame in read_frames(film)])
    for each, box in ((found[0], [0.1, 0.1, 0.5, 0.9]), (found[1], [0.5, 0.2, 0.9, 0.8])):
        clip = frames[key_frame_indices(30 * each.second, 75, 30.0, model.clip)]
        given = {"clip": transforms.resize(clip, TINY.test_size).numpy()[None], "boxes": np.float32([[box]])}
        np.testing.assert_allclose(each.scores[:1], model(given)[0], rtol=0, atol=1e-5)
    assert found[2].scores.shape == (0, 3)


def test_detections_are_rows_of_avas_format(model: Any) -> None:
    one = ActionScores(
        3, np.float32([[0, 0, 1, 1], [0.1, 0.1, 0.2, 0.2]]), np.float32([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    )
    none = ActionScores(4, np.zeros((0, 4), np.float32), np.zeros((0, 3), np.float32))
    table = detections({"a": [one, none], "b": [one]})
    assert [tuple(table.key_frames[number]) for number in table.frames] == [("a", 3)] * 6 + [("b", 3)] * 6
    assert table.actions.tolist() == [1, 2, 3] * 4
    np.testing.assert_allclose(table.scores[:6], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], atol=1e-7)
    np.testing.assert_allclose(table.boxes[3], [0.1, 0.1, 0.2, 0.2], atol=1e-7)
    assert detections({"a": [one]}, 900).key_frames == (("a", 903),)
    assert len(detections({})) == 0 and len(detections({"a": [none]})) == 0


def test_pictures_are_those_that_records_would_hold(model: Any, film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = Storage(36, 50)
    monkeypatch.setattr(model, "stored", stored)
    frames = [as_stored(frame.pixels, stored) for frame in read_frames(film, 36)]
    seen = []

    def persons(second: int, pixels: np.ndarray) -> np.ndarray:
        seen.append(pixels)
        return np.float32([[0, 0, 1, 1]])

    found = list(detect_actions(model, film, persons, progress=False))
    np.testing.assert_array_equal(seen, [frames[0], frames[30], frames[60]])
    clip = transforms.resize(np.stack([frames[n] for n in key_frame_indices(30, 75, 30.0, model.clip)]), 36)
    scores = model({"clip": clip[None], "boxes": tf.constant(found[1].boxes[None])}, training=False)[0]
    np.testing.assert_allclose(found[1].scores, scores, atol=1e-5)


def test_words_are_the_surest_actions() -> None:
    one = ActionScores(0, np.zeros((2, 4), np.float32), np.float32([[0.2, 0.9, 0.6], [0.1, 0.1, 0.1]]))
    assert format_actions(one, NAMES, 0.5) == [["talk to (e.g., self, a person, a group) 90%", "wave 60%"], []]


def save_person_detector(folder: Path, classes: tuple[float, ...] = (1, 1, 3, 1)) -> Path:
    """Finds three persons and a car wherever it looks; one of the persons it is not sure of, one has no area."""

    class Finder(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((1, None, None, 3), tf.uint8, name="input_tensor")])
        def __call__(self, picture: Any) -> dict[str, Any]:
            boxes = [[[0.2, 0.1, 0.8, 0.4], [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0], [0.5, 0.5, 0.5, 0.9]]]
            return {
                "detection_boxes": tf.constant(boxes),
                "detection_scores": tf.constant([[0.9, 0.5, 0.9, 0.9]]),
                "detection_classes": tf.constant([classes], tf.float32),
                "num_detections": tf.constant([4.0]),
            }

    finder = Finder()
    tf.saved_model.save(finder, str(folder), signatures=finder.__call__)
    return folder


def test_any_detector_of_tensorflows_signature_finds_persons(model: Any, film: Path, tmp_path: Path) -> None:
    persons = PersonDetector(save_person_detector(tmp_path / "finder"), 0.8)
    found = list(detect_actions(model, film, persons, progress=False))
    assert [each.boxes.shape for each in found] == [(1, 4)] * 3
    np.testing.assert_allclose(found[0].boxes, [[0.1, 0.2, 0.4, 0.8]], atol=1e-6)


def test_other_saved_models_are_refused(tmp_path: Path) -> None:
    class Other(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((1,), tf.float32, name="x")])
        def __call__(self, x: Any) -> dict[str, Any]:
            return {"y": x}

    other = Other()
    tf.saved_model.save(other, str(tmp_path / "other"), signatures=other.__call__)
    with pytest.raises(UserError, match="must take one image and return detection_boxes"):
        PersonDetector(tmp_path / "other", 0.8)
    with pytest.raises(UserError, match="must be a SavedModel with the signature serving_default"):
        PersonDetector(tmp_path / "nothing", 0.8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"detection_boxes": [[[10.0, 20.0, 40.0, 90.0]]]},
            "detection_boxes of .* must be fractions of the image in .*, not pixels",
        ),
        ({"detection_boxes": [[[np.nan] * 4]]}, "detection_boxes of .* must be fractions of the image in"),
        ({"detection_scores": [0.9]}, r"must have the shapes \(1, n, 4\), \(1, n\) and \(1, n\), got"),
        ({"side": 320}, "the person detector .* fails on the frame at second 7, 97 x 48 pixels: "),
    ],
)
def test_what_is_wrong_with_its_answers(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    answer: dict[str, Any] = {
        "detection_boxes": [[[0.0, 0.0, 1.0, 1.0]]],
        "detection_scores": [[0.9]],
        "detection_classes": [[1.0]],
        **changes,
    }
    side = answer.pop("side", None)

    class Finder(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((1, None, None, 3), tf.uint8, name="input_tensor")])
        def __call__(self, picture: Any) -> dict[str, Any]:
            if side:
                tf.debugging.assert_equal(tf.shape(picture)[1], side)
            return {name: tf.constant(value, tf.float32) for name, value in answer.items()}

    finder = Finder()
    tf.saved_model.save(finder, str(tmp_path / "finder"), signatures=finder.__call__)
    with pytest.raises(UserError, match=message):
        PersonDetector(tmp_path / "finder", 0.8)(7, np.zeros((48, 97, 3), np.uint8))


def test_boxes_that_are_left_out_are_told(listed: Path) -> None:
    boxes = CsvBoxes(listed, 0.8)
    assert boxes.num_below_threshold == 1 and boxes.of_video("other") is None
    assert [boxes.after("film", seconds) for seconds in (0, 1, 2)] == [3, 2, 0]
    later = listed.with_name("later.csv")
    later.write_text(ROWS.replace(",000", ",090"))
    frame = np.zeros((48, 97, 3), np.uint8)
    ours, theirs = boxes.of_video("film"), CsvBoxes(later, 0.8, 900).of_video("film")
    assert ours is not None and theirs is not None
    for second in (0, 1, 2):
        np.testing.assert_array_equal(ours(second, frame), theirs(second, frame))
    with pytest.raises(UserError, match="line 1 must have an integer timestamp in 900"):
        CsvBoxes(listed, 0.8, 900)
    with pytest.raises(
        UserError, match=r"score, the last column, of 0\.99 or more .--box_score.; the highest is 0\.95"
    ):
        CsvBoxes(listed, 0.99)
    listed.write_text("")
    with pytest.raises(UserError, match=r"or more \(--box_score\)$"):
        CsvBoxes(listed, 0.8)


def test_what_cannot_be_read_leaves_nothing(tmp_path: Path, model: Any) -> None:
    (tmp_path / "words.mp4").write_text("no video\n" * 100)
    with pytest.raises(VideoError):
        list(detect_actions(model, tmp_path / "words.mp4", lambda second, pixels: np.zeros((0, 4), np.float32)))
    with pytest.raises(VideoError):
        draw_video(tmp_path / "words.mp4", tmp_path / "drawn.mp4", [], NAMES, 0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["words.mp4"]


def test_the_command_writes_and_draws(
    model: Any, film: Path, listed: Path, tmp_path: Path, in_process: Callable[..., None], capsys: Any
) -> None:
    x3d_tf.save(model, tmp_path / "model.keras", NAMES)
    (tmp_path / "words.mp4").write_text("no video\n" * 100)
    common = (f"--model={tmp_path / 'model.keras'}", f"--boxes={listed}", f"--draw={tmp_path / 'drawn'}")
    arguments = (*common, f"--csv={tmp_path / 'out.csv'}", "--action_score=0", film, tmp_path / "words.mp4")
    with pytest.raises(SystemExit, match="1 of 2 files could not be predicted"):
        in_process(predict, *arguments, positional=True)
    printed = capsys.readouterr()
    assert "has no boxes for words" in printed.err
    assert "film.mp4      1 s  person 2: " in printed.out and "written: " in printed.out
    table = read_boxes(tmp_path / "out.csv", "detections", dict(enumerate(NAMES, 1)), seconds=(0, 9))
    assert len(table) == 3 * 3
    assert probe(tmp_path / "drawn" / "film.mp4").delivered == 75
    with pytest.raises(UserError, match=r"film\.mp4 exists"):
        in_process(predict, *common, film, positional=True)


def test_a_detector_takes_boxes(model: Any, film: Path, tmp_path: Path, in_process: Callable[..., None]) -> None:
    x3d_tf.save(model, tmp_path / "a.keras", NAMES)
    with pytest.raises(UserError, match="give one of --boxes and --person_detector"):
        in_process(predict, f"--model={tmp_path / 'a.keras'}", film, positional=True)

"""Prediction on files against plain loops over all their frames, and against testing their records."""

import csv
import json
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluating import evaluate_run
from test_transforms import naive_resize
from video_fixtures import number_of, numbered_frames, smooth_frames, write_records, write_video

import x3d_tf
from x3d_tf import csv_files, predict
from x3d_tf.config import TrainConfig
from x3d_tf.data.datasets.spec import DatasetSpec
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.data.sampling import frame_indices, view_starts
from x3d_tf.data.video import clip_reader
from x3d_tf.data.video.clip_reader import VideoClips, cut_clips
from x3d_tf.data.video.decode import VideoError, encode_video, probe, read_frames
from x3d_tf.data.video.listing import list_videos
from x3d_tf.evaluation.multiview import predict_split
from x3d_tf.inference import prediction
from x3d_tf.inference.prediction import (
    Prediction,
    predict_videos,
    spread_frames,
    windows,
)
from x3d_tf.runs.run_folder import RunFolder
from x3d_tf.types import Storage, ViewSpec

pytestmark = pytest.mark.usefixtures("unoptimized_module")
TINY = x3d_tf.Expansion(gamma_tau=2, gamma_t=4, gamma_s=48 / 112, gamma_b=1, gamma_d=0.2)  # tests on 54 pixels
NAMES = ("jump", "запуск", "a,b", "d", "e", "f")


class Linear:
    """Stands for a network, so that none is compiled: its logits are weighted sums of all values of a clip."""

    expansion, clip, num_classes, include_top = TINY, TINY.clip, len(NAMES), True
    task, activation = "single_label", "softmax"
    stretch, stored, frame_sampling, test_views, combine = False, None, "slowfast", 10, "mean"

    def __init__(self) -> None:
        self.weights = np.random.default_rng(0).normal(0, 0.02 / 255, (4 * 48 * 48 * 3, len(NAMES))).astype(np.float32)

    def __call__(self, clips: Any, training: bool = False) -> Any:
        import tensorflow as tf

        return tf.matmul(tf.reshape(clips, (-1, len(self.weights))), self.weights)


@pytest.fixture(scope="module")
def linear() -> Any:
    return Linear()


@pytest.fixture(scope="module")
def network() -> Any:
    """A network that is sure of what it says."""
    import keras

    keras.utils.set_random_seed(0)
    model = x3d_tf.build_x3d(TINY, num_classes=len(NAMES))
    kernel = model.get_layer("fc2").kernel
    kernel.assign(np.random.default_rng(0).normal(0, 0.3, kernel.shape))
    return model


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of several rates, lengths and shapes; one is shorter than a clip."""
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "a b, c.mp4", smooth_frames(41))
    write_video(folder / "дом.mkv", smooth_frames(30, 80, 60), 25)
    write_video(folder / "short.avi", smooth_frames(5))
    return folder


def naive_probabilities(model: Any, frames: np.ndarray, fps: float, views: int) -> np.ndarray:
    """Out of all frames in memory."""
    clips = []
    for start in view_starts(len(frames), fps, model.clip, views):
        clip = frames[frame_indices(start, len(frames), fps, model.clip)]
        height, width = (side * 54 // min(clip.shape[1:3]) for side in clip.shape[1:3])
        top, left = (height - 48 + 1) // 2, (width - 48 + 1) // 2
        clips.append(naive_resize(clip, height, width)[:, top : top + 48, left : left + 48])
    logits = np.asarray(model(np.array(clips, np.float32)), np.float64)
    return (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).mean(axis=0)


def decoded(path: Path) -> np.ndarray:
    return np.stack([frame.pixels for frame in read_frames(path)])


def predictions(model: Any, paths: list[Path], **settings: Any) -> list[Prediction]:
    results = list(predict_videos(model, paths, progress=False, **settings))
    assert all(isinstance(result, Prediction) for result in results)
    return results  # type: ignore[return-value]


@pytest.mark.parametrize(("settings", "views"), [({}, 10), ({"temporal_views": 1}, 1), ({"temporal_views": 4}, 4)])
def test_a_video_equals_a_plain_loop(linear: Any, clips: Path, settings: dict[str, int], views: int) -> None:
    paths = list_videos([clips])
    results = predictions(linear, paths, **settings)
    assert [result.path for result in results] == paths
    for path, result in zip(paths, results):
        fps, frames = probe(path).fps, decoded(path)
        np.testing.assert_allclose(result.probabilities, naive_probabilities(linear, frames, fps, views), atol=1e-5)
        assert (result.start, result.end) == (0, pytest.approx(len(frames) / fps))
    spread = [result.probabilities for result in results]
    assert np.abs(spread[0] - spread[1]).max() > 0.01  # else the bound above would mean nothing


def of_records(model: Any, manifest: Manifest, views: int) -> np.ndarray:
    """Probabilities of the records of "test", as reports have them."""
    spec = ViewSpec(temporal_views=views, resize=54, crop=48, stretch=model.stretch)
    settings: dict[str, Any] = {"frame_sampling": model.frame_sampling, "combine": model.combine}
    return predict_split(model, manifest, "test", spec, **settings, progress=False).probabilities


@pytest.mark.parametrize(
    "facts", [{}, {"stretch": True, "frame_sampling": "exact", "combine": "max"}], ids=["", "stretched"]
)
@pytest.mark.parametrize("stored", [Storage(256, 95), Storage(40, 60)], ids=["smaller", "scaled"])
def test_a_video_gets_the_probabilities_of_its_record(
    network: Any, clips: Path, stored: Storage, facts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ({"test_views": 4} | facts).items():
        monkeypatch.setattr(network, name, value)
    paths = list_videos([clips])
    encoded = [encode_video(path, stored.short_side, stored.jpeg_quality) for path in paths]
    expected = of_records(network, write_records(tmp_path, {"test": encoded}, stored=stored), 4)
    without = np.array([result.probabilities for result in predictions(network, paths)])
    monkeypatch.setattr(network, "stored", stored)
    found = np.array([result.probabilities for result in predictions(network, paths)])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(without - expected).max() > 1e-3  # else the bound above would mean nothing


def test_thumbnails_are_frames_that_the_network_saw(network: Any, clips: Path) -> None:
    path = clips / "a b, c.mp4"
    frames = decoded(path)
    (result,) = predictions(network, [path], temporal_views=4, thumbnails=5)
    numbers = frame_indices(view_starts(41, 30.0, network.clip, 4), 41, 30.0, network.clip)
    shown = frames[numbers.ravel()[spread_frames(numbers, 5)]]
    expected = naive_resize(shown, 54, 72)[:, 3:51, 12:60]
    assert np.abs(result.thumbnails.astype(float) - expected).max() <= 1


@pytest.mark.parametrize(("views", "combine"), [(1, "mean"), (2, "mean"), (2, "max")])
def test_a_window_gets_the_probabilities_of_the_segment(
    network: Any, clips: Path, views: int, combine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 25 frames a second, where 0.48 s are 12 frames, and 0.36 s 9."""
    path, stored = clips / "дом.mkv", Storage(40, 60)
    monkeypatch.setattr(network, "stored", stored)
    segments = [encode_video(path, 40, 60, start, start + 0.48) for start in (0.0, 0.36, 0.72)]
    manifest = write_records(tmp_path, {"test": segments}, stored=stored)
    assert [record.frames for record in manifest.splits["test"].records] == [12, 12, 12]
    if network.combine != combine:  # Keras ignores the assignment of an equal value, which could not be undone
        monkeypatch.setattr(network, "combine", combine)
    found = predictions(network, [path], window=0.48, hop=0.36, temporal_views=views)
    np.testing.assert_allclose([r.probabilities for r in found], of_records(network, manifest, views), atol=1e-6)


@pytest.mark.usefixtures("eager")
def test_a_run_predicts_what_its_report_says(
    network: Any, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = Storage(40, 60)
    paths = [clips / name for name in ("a b, c.mp4", "short.avi")]
    encoded = [encode_video(path, 40, 60) for path in paths]
    manifest = write_records(tmp_path / "records", {"test": encoded}, 6, stored=stored)
    run = RunFolder(tmp_path / "run")
    run.open(TrainConfig(expansion=TINY, dataset=DatasetSpec(str(manifest.folder), "test"), test_views=3), {})
    monkeypatch.setattr(network, "stored", stored)
    monkeypatch.setattr(network, "test_views", 3)
    x3d_tf.save(network, run.model, manifest.classes)
    report = evaluate_run(run)
    with (report.folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
        expected = [[float(row[f"p({name})"]) for name in manifest.classes] for row in csv_files.dicts(file)]
    found = [result.probabilities for result in predictions(run.root, paths)]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert report.results["stored"] == {"short_side": 40, "jpeg_quality": 60}
    alone = [result.probabilities for result in predictions(str(run.model), paths)]
    np.testing.assert_array_equal(alone, found)


@pytest.mark.parametrize(
    ("numbers", "count", "expected"),
    [
        (np.arange(0, 306, 6)[:, None], 6, [24, 72, 126, 174, 222, 276]),  # near 25, 75, 125, ...
        (np.arange(10)[:, None] * 100 + np.arange(90), 6, [82, 247, 412, 577, 742, 907]),  # within the clips
        ([[0, 10], [100, 110]], 3, [10, 100, 110]),  # near 18, 55 and 92
        ([[0, 1, 2], [1, 2, 3]], 2, [1, 2]),  # clips that overlap
        ([[5, 6, 7]], 1, [6]),
        ([[0, 1], [0, 1]], 6, [0, 1]),  # there are no more
        ([[3, 3, 3]], 2, [3]),
        ([[0, 1]], 0, []),
    ],
)
def test_thumbnails_lie_evenly_in_time(numbers: Any, count: int, expected: list[int]) -> None:
    numbers = np.array(numbers)
    places = spread_frames(numbers, count)
    assert numbers.ravel()[places].tolist() == expected


def test_thumbnails_are_the_frames_of_their_times(linear: Any, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", numbered_frames(46, 54, 54), 30, codec="ffv1", pix_fmt="bgr0")
    (whole,) = predictions(linear, [path], thumbnails=3, temporal_views=4)
    windowed = predictions(linear, [path], thumbnails=3, window=0.5, hop=0.25)
    assert len(windowed) > 3
    for result in (whole, *windowed):
        np.testing.assert_allclose(result.times, [number_of(picture) / 30 for picture in result.thumbnails])
        assert len(result.times) == 3 and (np.diff(result.times) > 0).all()
        assert result.start <= result.times[0] and result.times[-1] <= result.end
    thirds = np.linspace(0, whole.end, 4)
    assert ((thirds[:-1] <= whole.times) & (whole.times <= thirds[1:])).all()


@pytest.mark.parametrize(("settings", "views"), [({}, 1), ({"temporal_views": 2}, 2)])
def test_windows_equal_videos_of_their_own(linear: Any, clips: Path, settings: dict[str, int], views: int) -> None:
    path = clips / "a b, c.mp4"  # 41 frames at 30 a second
    results = predictions(linear, [path], window=0.5, hop=0.3, **settings)
    spans = [(0, 15), (9, 24), (18, 33), (26, 41)]  # the last one ends with the video
    assert [(result.start, result.end) for result in results] == [
        (pytest.approx(first / 30), pytest.approx(end / 30)) for first, end in spans
    ]
    frames = decoded(path)
    for result, (first, end) in zip(results, spans):
        expected = naive_probabilities(linear, frames[first:end], 30.0, views)
        np.testing.assert_allclose(result.probabilities, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("frames", "window", "hop", "expected"),
    [
        (10, None, None, [(0, 10)]),
        (10, 1.0, 1.0, [(0, 10)]),
        (7, 1.0, 0.5, [(0, 7)]),
        (20, 1.0, 1.0, [(0, 10), (10, 20)]),
        (21, 1.0, 1.0, [(0, 10), (10, 20), (11, 21)]),
        (20, 1.0, 0.5, [(0, 10), (5, 15), (10, 20)]),
        (30, 1.0, 2.0, [(0, 10), (20, 30)]),
        (26, 1.0, 2.0, [(0, 10), (16, 26)]),
        (12, 1.0, 0.001, [(0, 10), (1, 11), (2, 12)]),
    ],
)
def test_windows_cover_the_video(
    frames: int, window: float | None, hop: float | None, expected: list[tuple[int, int]]
) -> None:
    assert list(windows(frames, 10.0, window, hop)) == expected


def test_windows_do_not_drift() -> None:
    starts = [first for first, _ in windows(30 * 3600, 29.97, 5.0, 1 / 3)]
    assert starts[3000] == round(3000 / 3 * 29.97)


class Counted(np.ndarray):
    """A frame that can be watched."""


def counted_stream(count: int, alive: "weakref.WeakSet[Any]", peak: list[int]) -> Iterator[np.ndarray]:
    for number in range(count):
        frame = np.full((8, 8, 3), number % 251, np.uint8).view(Counted)
        alive.add(_Key(frame))
        peak[0] = max(peak[0], len(alive))
        yield frame


class _Key:
    """Arrays cannot be put into sets: lives as long as the frame that it is tied to."""

    def __init__(self, frame: Counted) -> None:
        frame.key = self  # type: ignore[attr-defined]


CLIP = x3d_tf.ClipSpec(4, 2.0, 8)


def frames_alive(
    count: int, window: float | None, hop: float | None, views: int, *, check: bool = True
) -> tuple[int, int]:
    """Most frames alive at once while a stream of `count` is cut, and the number of clips; contents are checked."""
    sampler = prediction._Sampler(
        CLIP, ViewSpec(temporal_views=views, resize=8, crop=8), window, hop, "slowfast", None, "mean"
    )
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    peak, cuts = [0], 0
    expected = (clip for part in sampler.clips(count, 30.0) for clip in part)
    ordered = sorted(expected, key=lambda clip: (clip[-1], clip[0])) if check else None
    for cut in cut_clips(counted_stream(count, alive, peak), sampler.clips(count, 30.0)):
        if ordered is not None:
            np.testing.assert_array_equal(np.stack(cut.frames)[:, 0, 0, 0], ordered[cuts] % 251)
        cuts += 1
        del cut
    return peak[0], cuts


@pytest.mark.parametrize(("window", "hop", "views"), [(None, None, 10), (1.0, 1.0, 1), (2.0, 0.5, 3)])
def test_memory_does_not_grow_with_length(window: float | None, hop: float | None, views: int) -> None:
    short, _ = frames_alive(300, window, hop, views)
    long, cuts = frames_alive(6_000, window, hop, views)
    assert long <= max(short, 4 * 10) + 1
    assert long <= (4 * views * (1 if window is None else 5)) + 2  # five windows overlap at most
    assert cuts >= views


def test_hours_of_windows_take_no_memory() -> None:
    def peak_bytes(count: int) -> int:
        tracemalloc.start()
        frames_alive(count, 1.0, 1.0, 1, check=False)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    frames_alive(100, 1.0, 1.0, 1, check=False)  # what is imported and cached on first use
    short, long = peak_bytes(5_000), peak_bytes(30_000)
    assert (
        long < short + 200_000
    )  # 25,000 frames of 192 bytes would be 5 MB; the collector frees cycles at its own time


@pytest.mark.parametrize(
    ("promised", "views", "computed", "readings"),
    [
        (41, 10, 10, 1),
        (42, 10, 10, 1),  # all clips stay where they are
        (43, 3, 5, 2),  # the second clip and the third one move by a frame and by two
        (39, 3, 5, 2),
        (44, 1, 2, 2),
    ],
)
def test_another_number_of_frames_than_promised(
    linear: Any, clips: Path, promised: int, views: int, computed: int, readings: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """41 can be decoded: clips are spread over those, and only those that this moves are computed again."""
    path, passes = clips / "a b, c.mp4", []
    expected = naive_probabilities(linear, decoded(path), 30.0, views)
    monkeypatch.setattr(clip_reader, "probe", lambda path: replace(probe(path), delivered=promised))
    monkeypatch.setattr(clip_reader, "read_frames", lambda *args: passes.append(args) or read_frames(*args))
    (result,) = predictions(linear, [path], temporal_views=views)
    np.testing.assert_allclose(result.probabilities, expected, atol=1e-5)
    assert result.end == pytest.approx(41 / 30)
    assert len(passes) == readings

    def clips_of(frames: int, fps: float) -> np.ndarray:
        return frame_indices(view_starts(frames, fps, TINY.clip, views), frames, fps, TINY.clip)

    assert len(list(VideoClips(path, clips_of, 256, lambda pixels: pixels))) == computed


def test_a_variable_rate_is_decoded_once(linear: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = [0, 100, 200, 300, 650, 700, 800, 900, 1000, 1030, 1100, 1200]
    path = write_video(tmp_path / "a.mkv", numbered_frames(len(times)), 10, times_ms=times)
    assert probe(path).delivered == len(decoded(path)) != probe(path).frames
    passes = []
    monkeypatch.setattr(clip_reader, "read_frames", lambda *args: passes.append(args) or read_frames(*args))
    predictions(linear, [path])
    assert len(passes) == 1


def test_multi_label_probabilities_are_sigmoids(linear: Any, clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = clips / "short.avi"  # all clips are one
    monkeypatch.setattr(linear, "activation", "sigmoid", raising=False)
    (result,) = predictions(linear, [path])
    logits = np.log(result.probabilities / (1 - result.probabilities))
    softmax = naive_probabilities(linear, decoded(path), 30.0, 1)
    np.testing.assert_allclose(np.exp(logits) / np.exp(logits).sum(), softmax, atol=1e-4)
    assert abs(result.probabilities.sum() - 1) > 0.1


def test_bad_files_are_reported_and_the_rest_goes_on(linear: Any, clips: Path, tmp_path: Path) -> None:
    (tmp_path / "words.mp4").write_text("no video\n" * 200)
    results = list(predict_videos(linear, [tmp_path / "words.mp4", "nowhere.mp4", clips / "short.avi"], progress=False))
    assert [type(result) for result in results] == [VideoError, VideoError, Prediction]
    assert "nowhere.mp4: no such file" in str(results[1])


def test_a_network_that_gives_no_numbers_is_an_error(clips: Path) -> None:
    model = x3d_tf.build_x3d(TINY, num_classes=2)
    model.get_layer("fc2").bias.assign([np.nan, 0])
    with pytest.raises(ValueError, match=r"probabilities that are not finite for .*short\.avi"):
        predictions(model, [clips / "short.avi"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0.2}, "window must be at least 0.266667 s, the length of the network's clip, got 0.2"),
        ({"window": float("nan")}, "window must be at least"),
        ({"hop": 1.0}, "hop must be set together with window"),
        ({"window": 1.0, "hop": 0.0}, "hop must be positive, got 0.0"),
        ({"temporal_views": 0}, "temporal_views must be at least 1, got 0"),
        ({"temporal_views": 10**9}, "temporal_views must be at most 1000, got 1000000000"),
        ({"thumbnails": -1}, "thumbnails must be at least 0"),
    ],
)
def test_settings_are_checked_before_anything_is_read(linear: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predict_videos(linear, [__file__], **settings)


def test_a_network_without_classifier_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must have its classifier \(include_top\)"):
        predict_videos(x3d_tf.build_x3d(TINY, include_top=False), [__file__])


def test_the_command(
    network: Any,
    clips: Path,
    tmp_path: Path,
    in_process: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    x3d_tf.save(network, tmp_path / "m.keras", NAMES)
    videos = tmp_path / "my videos"
    videos.mkdir()
    for path in clips.iterdir():
        (videos / path.name).symlink_to(path)
    (videos / "bad.mp4").touch()
    outputs = {kind: tmp_path / f"out.{kind}" for kind in ("json", "csv", "png")}
    flags = [f"--json={outputs['json']}", f"--csv={outputs['csv']}", f"--contact_sheet={outputs['png']}"]
    with pytest.raises(SystemExit, match="1 of 4 files could not be predicted"):
        in_process(predict, videos, f"--model={tmp_path / 'm.keras'}", *flags, positional=True)
    printed = capsys.readouterr()
    assert f"error: {videos / 'bad.mp4'}: the file is empty" in printed.err
    lines = printed.out.splitlines()
    assert lines[0] == f"{videos / 'a b, c.mp4'} (1.4 s)"
    content = json.loads(outputs["json"].read_text(encoding="utf-8"))
    top = content["predictions"][0]["top"]
    assert lines[1:6] == [f"  {entry['probability']:6.1%}  {entry['class']}" for entry in top]
    expected = naive_probabilities(network, decoded(videos / "a b, c.mp4"), 30.0, 10)
    np.testing.assert_allclose(content["predictions"][0]["probabilities"], expected, atol=1e-5)
    assert [Path(entry["video"]).name for entry in content["predictions"]] == [
        "a b, c.mp4",
        "bad.mp4",
        "short.avi",
        "дом.mkv",
    ]
    assert content["task"] == "single_label"
    assert len(list(csv.reader(outputs["csv"].open(encoding="utf-8")))) == 5
    assert outputs["png"].read_bytes().startswith(b"\x89PNG")


def test_real_videos_equal_a_plain_loop(linear: Any, shared_data: Path) -> None:
    """Of other sizes, rates and codecs; the one with 25 frames a second is scaled up, the upright one down."""
    for name in ("apply_eye_makeup.avi", "deadlifting.mp4"):
        path = shared_data / "clips" / name
        (result,) = predictions(linear, [path], temporal_views=2)
        expected = naive_probabilities(linear, decoded(path), probe(path).fps, 2)
        np.testing.assert_allclose(result.probabilities, expected, atol=1e-5)

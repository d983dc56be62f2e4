"""Key frames: records built from AVA's files and videos, and clips with boxes read from them."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from key_frames import build_key_frames
from PIL import Image
from video_fixtures import number_of, numbered_frames, write_manifest, write_video

import x3d_tf
from x3d_tf import build_records
from x3d_tf.data.datasets.ava import find_key_frames
from x3d_tf.data.datasets.spec import DatasetSpec, hold_out
from x3d_tf.data.detection_pipeline import evaluation_key_frames
from x3d_tf.data.detection_pipeline import training_key_frames as train_clips
from x3d_tf.data.key_frames import key_frames_of
from x3d_tf.data.records.format import ParsedAnnotation, parse_annotation, parse_frames
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.data.records.verify import verify_records
from x3d_tf.errors import UserError

CLIP = x3d_tf.ClipSpec(4, 5, 32)  # 10 frames before the key frame, 5 after it
ACTIONS = 'item { name: "sit" id: 1 }\nitem { name: "wave" id: 2 }\nitem { name: "run" id: 4 }\n'
A, B = "0.250,0.250,0.750,0.500", "0.1,0.1,0.2,0.2"
TRUTH = f"film,0902,{A},1,0\nfilm,0902,{A},4,0\nfilm,0902,{B},,1\nfilm,0904,{A},2,0\nclip,0902,{A},1,0\n"
PROPOSALS = f"film,0902,0.26,0.25,0.75,0.5,,0.95\nfilm,0902,{B},,0.7\nfilm,0903,{B},,0.9\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video at 30 frames per second, one at 15, and csv files."""
    root = tmp_path_factory.mktemp("ava")
    write_video(root / "videos" / "film.mp4", numbered_frames(150), options={"qscale": "2"})
    write_video(root / "videos" / "clip.mkv", numbered_frames(75), fps=15)
    for name, text in (("train.csv", TRUTH), ("found.csv", PROPOSALS), ("actions.pbtxt", ACTIONS)):
        (root / name).write_text(text)
    return root


@pytest.fixture(scope="module")
def records(folder: Path) -> Manifest:
    return build_key_frames(
        folder / "videos",
        folder / "records",
        {"train": folder / "train.csv"},
        proposals={"train": folder / "found.csv"},
        label_map=folder / "actions.pbtxt",
        workers=1,
        progress=False,
    ).manifest


def content(manifest: Manifest, media_id: str) -> tuple[list[bytes], ParsedAnnotation]:
    """Returns the frames and the annotation of a record."""
    (record,) = (record for record in manifest.splits["train"].records if record.media_id == media_id)
    shard = manifest.folder / manifest.splits["train"].shards[record.shard].file
    data = tf.constant(shard.read_bytes()[record.offset : record.offset + record.length])
    return parse_frames(data).numpy().tolist(), parse_annotation(data)


def place(manifest: Manifest, media_id: str) -> int:
    return [record.media_id for record in manifest.splits["train"].records].index(media_id)


def test_records_hold_the_annotations_of_a_key_frame(records: Manifest) -> None:
    assert records.task == "detection" and records.classes == ("sit", "wave", "action 3", "run")
    assert Manifest.load(records.folder) == records
    labels = {record.media_id: record.labels for record in records.splits["train"].records}
    assert labels == {"film,0902": (0, 3), "film,0904": (1,), "clip,0902": (0,), "film,0903": ()}
    frames, known = content(records, "film,0902")
    np.testing.assert_array_equal(known.boxes, np.float32([[0.25, 0.25, 0.75, 0.5]] * 2 + [[0.1, 0.1, 0.2, 0.2]]))
    assert known.labels.numpy().tolist() == [0, 3, -1]
    np.testing.assert_array_equal(known.proposals, np.float32([[0.26, 0.25, 0.75, 0.5], [0.1, 0.1, 0.2, 0.2]]))
    np.testing.assert_array_equal(known.scores, np.float32([0.95, 0.7]))
    assert number_of(tf.io.decode_jpeg(frames[int(known.key_frame)]).numpy()) == 60 % 50
    assert len(frames) == 60 + 41 - (60 - 41)  # frames 19 to 100
    _, nothing = content(records, "film,0903")
    assert nothing.boxes.shape == (0, 4) and nothing.labels.shape == (0,) and nothing.proposals.shape == (1, 4)


def test_the_key_frame_index_at_other_rates_and_near_an_end(records: Manifest) -> None:
    frames, known = content(records, "clip,0902")
    assert number_of(tf.io.decode_jpeg(frames[int(known.key_frame)]).numpy()) == 30
    frames, known = content(records, "film,0904")
    assert number_of(tf.io.decode_jpeg(frames[int(known.key_frame)]).numpy()) == 120 % 50
    assert len(frames) - int(known.key_frame) == 150 - 120  # to the end of the video


def test_folders_of_frames_make_the_same_records(folder: Path, records: Manifest, tmp_path: Path) -> None:
    (tmp_path / "videos" / "film").mkdir(parents=True)
    for number, pixels in enumerate(numbered_frames(150)):
        Image.fromarray(pixels).save(tmp_path / "videos" / "film" / f"film_{number + 1:06d}.jpg", quality=95)
    given = {"train": tmp_path / "train.csv"}
    given["train"].write_text("".join(line for line in TRUTH.splitlines(True) if line.startswith("film")))
    made = build_key_frames(tmp_path / "videos", tmp_path / "records", given, label_map=folder / "actions.pbtxt")
    assert (key_frames_of(made.manifest).frame_rate, key_frames_of(records).frame_rate) == (30.0, None)
    for media_id in ("film,0902", "film,0904"):
        (ours, known), (theirs, same) = content(made.manifest, media_id), content(records, media_id)
        assert len(ours) == len(theirs) and int(known.key_frame) == int(same.key_frame)
        np.testing.assert_array_equal(known.boxes, same.boxes)
        for a, b in zip(ours, theirs):
            assert number_of(tf.io.decode_jpeg(a).numpy()) == number_of(tf.io.decode_jpeg(b).numpy())
    first = (tmp_path / "videos" / "film" / "film_000061.jpg").read_bytes()
    assert content(made.manifest, "film,0902")[0][41] == first  # not coded again


def test_proposals_of_other_splits_are_left_out(folder: Path, tmp_path: Path) -> None:
    """One file of a person detector may cover all splits."""
    (tmp_path / "a.csv").write_text(f"clip,0902,{A},1,0\n")
    (tmp_path / "b.csv").write_text(f"gone,0902,{A},1,0\n")

    def sources(name: str) -> Any:
        return find_key_frames(
            folder / "videos",
            {"train": tmp_path / name},
            proposals={"train": tmp_path / "found.csv"},
            label_map=folder / "actions.pbtxt",
        )

    (tmp_path / "found.csv").write_text(PROPOSALS + f"clip,0903,{B},999,0.9\n")
    assert [video.media_id for video in sources("a.csv").splits["train"]] == ["clip,0902", "clip,0903"]
    with pytest.raises(UserError, match=r"found\.csv must have boxes for the videos of .*b\.csv$"):
        sources("b.csv")


def test_a_video_is_in_one_split(folder: Path, tmp_path: Path) -> None:
    """Key frames near each other show nearly the same."""
    boxes = {"train": folder / "train.csv", "val": tmp_path / "val.csv"}
    boxes["val"].write_text(f"else,0902,{A},1,0\nclip,0903,{A},1,0\n")
    rule = rf"name a video that is not in the split train \({boxes['train']}, line 5\), because a video may be in one"
    with pytest.raises(UserError, match=rf"^{boxes['val']}, line 2 must {rule} split only, got 'clip'"):
        find_key_frames(folder / "videos", boxes, label_map=folder / "actions.pbtxt")


def test_a_listed_video_has_one_file(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.txt", "b.mp4", "b.mkv"):
        (tmp_path / name).touch()
    (tmp_path / "boxes.csv").write_text(f"a,0902,{A},1,0\n")
    (video,) = find_key_frames(tmp_path, {"train": tmp_path / "boxes.csv"}).splits["train"]
    assert video.path == tmp_path / "a.mp4"
    (tmp_path / "boxes.csv").write_text(f"a,0902,{A},1,0\nb,0902,{A},1,0\n")
    with pytest.raises(UserError, match=rf"must hold one file for b \({tmp_path}/boxes\.csv, line 2\), got \["):
        find_key_frames(tmp_path, {"train": tmp_path / "boxes.csv"})


def test_excluded_key_frames_and_missing_videos_are_left_out(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out.csv").write_text("film,0902\n")
    (tmp_path / "more.csv").write_text(TRUTH + f"gone,0902,{A},1,0\ngone,0903,{A},1,0\nclip,0950,{A},1,0\n")
    made = build_key_frames(
        folder / "videos",
        tmp_path / "records",
        {"train": tmp_path / "more.csv"},
        exclusions={"train": tmp_path / "out.csv"},
        label_map=folder / "actions.pbtxt",
    )
    assert {record.media_id for record in made.manifest.splits["train"].records} == {"film,0904", "clip,0902"}
    failures = (tmp_path / "records" / "failures.csv").read_text()
    assert f"does not exist (listed in {tmp_path / 'more.csv'}, line 6)" in failures
    assert made.failures == 2 and "clip.mkv" in failures
    split = made.manifest.splits["train"]
    assert (split.present, split.expected, key_frames_of(made.manifest).listed) == (2, 3, {"train": 5})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boxes": "film,0902,0,0,1,1,3,0\n"}, "line 1 must have an action_id from the label map, got '3'"),
        ({"starts_at": 903.0}, "line 1 must have a timestamp of at least 903 s, where the video files begin, got 902"),
        ({"boxes": f"gone,0902,{A},1,0\n"}, r"no video listed in .* exists in .* \(1 listed\)"),
        ({"boxes": ""}, "train.csv must list key frames that are not excluded for split train$"),
        (
            {"exclusions": {"test": Path("x")}},
            r"exclusions must be for splits that have boxes \(train\), got \['test'\]",
        ),
        ({"videos": Path("nowhere")}, "nowhere is not a folder"),
    ],
)
def test_errors_in_the_csv_files_are_reported(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    changes = dict(changes)
    (tmp_path / "train.csv").write_text(changes.pop("boxes", TRUTH))
    videos = changes.pop("videos", folder / "videos")
    settings = {"label_map": folder / "actions.pbtxt"} | changes
    with pytest.raises(UserError, match=message):
        find_key_frames(videos, {"train": tmp_path / "train.csv"}, **settings)


def test_test_clips_are_the_centre_and_keep_every_box(records: Manifest) -> None:
    found = list(evaluation_key_frames(records, "train", CLIP, resize=36, crop=36, batch=2, score=0.9))
    assert [row for _, about in found for row in about.record.numpy()] == [0, 1, 2, 3]
    ((inputs, about),) = evaluation_key_frames(records, "train", CLIP, resize=36, crop=36, batch=4, proposals=False)
    row = place(records, "film,0902")
    assert int(about.count[row]) == 2 and int(about.count[place(records, "film,0903")]) == 0
    np.testing.assert_allclose(about.original[row], np.float32([[0.25, 0.25, 0.75, 0.5], [0.1, 0.1, 0.2, 0.2]]))
    np.testing.assert_array_equal(about.labels[row], [0, 3, -1])
    np.testing.assert_array_equal(about.truth[row, 1], np.float32([0.25, 0.25, 0.75, 0.5]))
    # 64 x 48 becomes 48 x 36, of which columns 6 to 41 are seen
    expected = (np.array([16, 12, 48, 24]) * 0.75 - [6, 0, 6, 0]) / 36
    np.testing.assert_allclose(inputs["boxes"][row, 0], expected, atol=1e-6)
    numbers = [number_of(frame) for frame in inputs["clip"][row].numpy()]
    assert numbers == [(60 - 10 + 5 * i) % 50 for i in range(4)]


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("region/bbox/xmin", 5.0, "boxes within the frame"),
        ("proposal/region/bbox/ymin", 0.9, "boxes within the frame"),
        ("proposal/region/label/confidence", -1.0, "scores in [0, 1]"),
        ("region/label/index", 2, "the labels of its boxes in the manifest"),
    ],
)
def test_boxes_are_verified(records: Manifest, tmp_path: Path, key: str, value: float, problem: str) -> None:
    manifest = json.loads((records.folder / "manifest.json").read_text())
    (entry,) = manifest["splits"]["train"]["shards"]
    examples = list(tf.data.TFRecordDataset(str(records.folder / entry["file"])).as_numpy_iterator())
    place_of_film = place(records, "film,0902")
    changed = tf.train.SequenceExample.FromString(examples[place_of_film])
    kind = "float_list" if isinstance(value, float) else "int64_list"
    lists = [getattr(feature, kind).value for feature in changed.feature_lists.feature_list[key].feature]
    (of_the_key_frame,) = filter(None, lists)
    of_the_key_frame[0] = value
    examples[place_of_film] = changed.SerializeToString()
    with tf.io.TFRecordWriter(str(tmp_path / entry["file"])) as writer:
        for example in examples:
            writer.write(example)
    entry["sha256"] = hashlib.sha256((tmp_path / entry["file"]).read_bytes()).hexdigest()
    write_manifest(tmp_path, manifest)
    (report,) = verify_records(tmp_path, progress=False)
    assert len(report.problems) == 1 and f"(film,0902) does not have {problem}" in report.problems[0]


def training(records: Manifest, **changes: Any) -> Callable[[int], Any]:
    settings: dict[str, Any] = {"jitter": (36, 44), "flip": True, "batch": 2, "seed": 3}
    stream = train_clips(records, "train", CLIP, **(settings | changes))
    return lambda count: list(stream.take(count))


def test_training_clips_come_with_boxes_and_targets(records: Manifest) -> None:
    for inputs, labels in training(records)(6):
        clips, boxes = inputs["clip"], inputs["boxes"].numpy()
        assert clips.shape == (2, 4, 32, 32, 3) and boxes.shape[::2] == (2, 4) and labels.shape[::2] == (2, 4)
        assert boxes.shape[1] == labels.shape[1]
        real = (boxes[..., 2:] > boxes[..., :2]).all(-1)
        padded = (boxes == 0).all(-1)
        assert (boxes >= 0).all() and (boxes[real] <= 31 / 32).all() and real.any()
        assert not labels.numpy()[padded].any()
        assert (boxes[~real & ~padded] == 1).all()  # which the crop does not show


def test_training_skips_key_frames_without_labels(records: Manifest) -> None:
    """Three key frames have a label; the fourth has only a proposal."""
    with pytest.raises(UserError, match=r"batch must be in 1\.\.3"):
        training(records, batch=4)


def test_training_clips_follow_from_seed_and_step(records: Manifest) -> None:
    whole, later = training(records)(4), training(records, start_step=2)(2)
    for (inputs, labels), (same, again) in zip(whole[2:], later):
        np.testing.assert_array_equal(inputs["clip"], same["clip"])
        np.testing.assert_array_equal(inputs["boxes"], same["boxes"])
        np.testing.assert_array_equal(labels, again)


def test_a_box_that_the_crop_does_not_show_is_a_point(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("film,0902,0.0,0.0,0.01,0.02,1,0\nfilm,0903,0.0,0.0,0.01,0.02,1,0\n")
    made = build_key_frames(folder / "videos", tmp_path / "records", {"train": tmp_path / "a.csv"})
    boxes = np.concatenate([inputs["boxes"] for inputs, _ in training(made.manifest, flip=False)(8)])
    assert boxes.shape == (16, 1, 4)
    points = (boxes == 1).all(-1)
    assert points.any() and (boxes[~points][:, 2:] > boxes[~points][:, :2]).all()


def test_clips_longer_than_records_are_refused(records: Manifest) -> None:
    with pytest.raises(UserError, match=r"the network's clip must span at most 2\.73 s.*got '3\.00 s'"):
        train_clips(records, "train", x3d_tf.ClipSpec(18, 5, 32), jitter=(36, 44), flip=True, batch=2, seed=0)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-m", "x3d_tf.build_records", *arguments]
    return subprocess.run(run, capture_output=True, text=True, cwd=Path(__file__).parents[1])


def test_the_command(
    folder: Path, tmp_path: Path, records: Manifest, in_process: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    in_process(
        build_records,
        f"--videos={folder / 'videos'}",
        f"--output={tmp_path / 'records'}",
        f"--boxes=train={folder / 'train.csv'}",
        f"--proposals=train={folder / 'found.csv'}",
        f"--label_map={folder / 'actions.pbtxt'}",
    )
    printed = capsys.readouterr().out
    assert "4 classes, task detection" in printed and "train: 4 key frames" in printed
    assert "train has no key frame for 1 class: action 3" in printed
    in_process(build_records, "--verify", f"--output={tmp_path / 'records'}")
    assert "train: 4 videos" in capsys.readouterr().out
    assert Manifest.load(tmp_path / "records").fingerprint() == records.fingerprint()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--boxes=a.csv",), "--boxes must be SPLIT=FILE, once for each split, got 'a.csv'"),
        (("--boxes=a=1.csv", "--boxes=a=2.csv"), "--boxes must be SPLIT=FILE, once for each split, got 'a=2.csv'"),
        (("--boxes=a=1.csv", "--split=0.2"), "--split must not be given for the data set ava, which reads --videos"),
        (("--label_map=a",), "--label_map must not be given for the data set folder, which reads --videos"),
        (("--boxes=a=none.csv",), "none.csv cannot be read: No such file or directory"),
    ],
)
def test_flags_that_do_not_go_together(folder: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = command(f"--videos={folder / 'videos'}", f"--output={tmp_path / 'records'}", *arguments)
    assert done.returncode == 1 and message in done.stderr


def test_each_pipeline_takes_its_own_records(records: Manifest, tmp_path: Path) -> None:
    from video_fixtures import noise_video, write_records

    with pytest.raises(UserError, match="holds key frames with boxes"):
        x3d_tf.dataset(records.folder, CLIP, training=True, batch=2)
    with pytest.raises(UserError, match="holds key frames with boxes"):
        x3d_tf.dataset(records.folder, CLIP, training=False, batch=2, split="train")
    whole = write_records(tmp_path / "records", {"train": [noise_video(0, 8), noise_video(1, 8)]})
    with pytest.raises(UserError, match="holds videos without key frames"):
        training(whole)
    with pytest.raises(UserError, match="holds videos without key frames"):
        evaluation_key_frames(whole, "train", CLIP, resize=36, crop=36)


def test_key_frames_of_a_video_are_held_out_together(records: Manifest) -> None:
    spec = DatasetSpec(str(records.folder), eval_split="train", validation_fraction=0.5)
    parts = hold_out(records, spec).splits
    videos = [{record.video for record in parts[name].records} for name in ("train", "validation")]
    assert sorted(map(sorted, videos)) == [["clip"], ["film"]]


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Videos of a red rectangle off the centre of a grey frame, with its box."""
    root = tmp_path_factory.mktemp("marked")
    rows = []
    for number, (x, y) in enumerate([(4, 6), (60, 30), (40, 4), (10, 40)]):
        frames = np.full((150, 64, 96, 3), 90, np.uint8)
        frames[:, y : y + 20, x : x + 28] = (250, 20, 20)
        write_video(root / "videos" / f"v{number}.mp4", frames, options={"qscale": "2"})
        box = (x / 96, y / 64, (x + 28) / 96, (y + 20) / 64)
        rows.append(f"v{number},0902,{','.join(map(str, box))},1,0\n")
    (root / "a.csv").write_text("".join(rows))
    return build_key_frames(root / "videos", root / "records", {"train": root / "a.csv"}, progress=False).manifest


@pytest.mark.parametrize("flip", [False, True])
def test_boxes_are_where_the_pixels_are(marked: Manifest, flip: bool) -> None:
    """Checks training, with scaling, cropping and flipping, and evaluation."""
    batches = training(marked, flip=flip, batch=4)(12)
    tested = evaluation_key_frames(marked, "train", CLIP, resize=40, crop=40, batch=4, proposals=False)
    seen = 0
    for inputs in [*(inputs for inputs, _ in batches), *(inputs for inputs, _ in tested)]:
        for clip, boxes in zip(inputs["clip"].numpy(), inputs["boxes"].numpy()):
            red = (clip[0, :, :, 0] - clip[0, :, :, 1]) > 80
            for x1, y1, x2, y2 in boxes[(boxes[:, 2:] > boxes[:, :2]).all(axis=1)] * len(clip[0]):
                rows, columns = np.mgrid[: len(red), : len(red)]
                inside = (columns > x1 + 2) & (columns < x2 - 2) & (rows > y1 + 2) & (rows < y2 - 2)
                around = (columns > x1 - 2) & (columns < x2 + 2) & (rows > y1 - 2) & (rows < y2 + 2)
                assert red[inside].all() and not red[~around].any()
                seen += inside.any()
    assert seen > 20


def test_labels_of_proposals_are_ignored(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "found.csv").write_text(f"film,0902,{B},1,0.8\nfilm,0902,{B},12,0.9\n")
    sources = find_key_frames(
        folder / "videos",
        {"train": folder / "train.csv"},
        proposals={"train": tmp_path / "found.csv"},
        label_map=folder / "actions.pbtxt",
    )
    (video,) = (video for video in sources.splits["train"] if video.media_id == "film,0902")
    assert video.annotation is not None
    assert (video.annotation.proposals, video.annotation.scores) == (((0.1, 0.1, 0.2, 0.2),), (0.9,))


def test_an_action_with_the_name_of_a_missing_one(folder: Path, tmp_path: Path) -> None:
    """Otherwise the manifest would repeat a class, which would fail only after decoding all videos."""
    (tmp_path / "map.pbtxt").write_text('item { name: "action 2" id: 1 }\nitem { name: "run" id: 12 }')
    (tmp_path / "train.csv").write_text(f"film,0902,{A},12,0\n")
    with pytest.raises(UserError, match=r"label_map must not give an action the name .*, got \['action 2'\]"):
        find_key_frames(folder / "videos", {"train": tmp_path / "train.csv"}, label_map=tmp_path / "map.pbtxt")

"""Records are exchanged with TensorFlow Model Garden, which runs in a virtual environment of its own."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from video_fixtures import noise_video, write_records

from x3d_tf.data.records.manifest import Manifest

FOLDER = Path(__file__).parent / "garden"
ROOT = FOLDER.parents[1]
TINY = ("gamma_tau=1", "gamma_t=4", "gamma_s=0.2857142857142857", "gamma_b=1", "gamma_d=0.2")
SETTINGS = ("Recipe.batch=2", "Recipe.reference_batch=2", "Recipe.steps=3", "TrainConfig.test_views=1")


@pytest.fixture(scope="module")
def garden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python interpreter of an environment with Model Garden. Installing it takes minutes and 3.3 GB."""
    folder = tmp_path_factory.mktemp("garden")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "pip", "install", "--quiet", "-r", FOLDER / "requirements.txt"]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"Model Garden cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    return folder / "bin" / "python"


def run(*words: object, folder: Path = ROOT) -> str:
    done = subprocess.run([str(word) for word in words], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_model_garden_reads_our_records(garden: Path, tmp_path: Path) -> None:
    videos = [noise_video(number, 6) for number in range(5)]
    write_records(tmp_path, {"train": videos}, classes=3)
    split = Manifest.load(tmp_path).splits["train"]
    (shard,) = split.shards
    run(garden, FOLDER / "exchange.py", "read", tmp_path / shard.file, 6, 40, 3, tmp_path / "clips.npz")
    with np.load(tmp_path / "clips.npz") as found:
        labels = [record.labels[0] for record in split.records]
        np.testing.assert_array_equal(found["labels"], np.eye(3)[labels])
        frames = [[tf.io.decode_jpeg(jpeg, channels=3).numpy() for jpeg in video.frames] for video in videos]
        expected = np.array(frames)[:, :, :, 6:46] / 255  # the centre of 40 x 52 pixels
        np.testing.assert_allclose(found["clips"], expected, atol=1e-6)


@pytest.mark.slow
def test_records_of_model_garden_train_here(garden: Path, tmp_path: Path) -> None:
    for split, count in (("train", 6), ("test", 2)):
        run(garden, FOLDER / "exchange.py", "write", tmp_path / f"{split}-00000-of-00001.tfrecord", count, 2)
    (tmp_path / "classes.txt").write_text("dark\nbright\n")
    lists = [f"--lists={split}={tmp_path}/{split}-*" for split in ("train", "test")]
    options = ["--dataset=sequence_examples", f"--classes={tmp_path}/classes.txt", "--frame_rate=25"]
    output = tmp_path / "records"
    run(sys.executable, "-m", "x3d_tf.build_records", *options, *lists, f"--output={output}")
    manifest = Manifest.load(output)
    assert {name: len(split.records) for name, split in manifest.splits.items()} == {"train": 6, "test": 2}
    records = {record.media_id: record for record in manifest.splits["train"].records}
    file = tmp_path / "train-00000-of-00001.tfrecord"
    names = [f"train/{file.name}:{number}" for number in range(6)]
    assert [records[name].labels for name in names] == [(0,), (1,)] * 3
    assert {(record.frames, record.fps) for record in records.values()} == {(8, 25.0)}
    for number, serialized in enumerate(tf.data.TFRecordDataset(str(file))):
        stored = tf.train.SequenceExample.FromString(serialized.numpy()).feature_lists.feature_list["image/encoded"]
        greys = [tf.io.decode_jpeg(frame.bytes_list.value[0]).numpy().mean() for frame in stored.feature]
        np.testing.assert_allclose(greys, 10 * number + np.arange(8), atol=1)
    bindings = [f"--gin_bindings=Expansion.{value}" for value in TINY] + [f"--gin_bindings={s}" for s in SETTINGS]
    bindings += [f'--gin_bindings=DatasetSpec.records="{output}"', f"--workdir={tmp_path}/run"]
    files = ["--gin_file=gin/x3d_s.gin", "--gin_file=gin/data/records.gin"]
    run(sys.executable, "-m", "x3d_tf.train", *files, *bindings)
    assert (tmp_path / "run" / "model.keras").is_file()

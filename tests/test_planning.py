"""The plan of a training run: its figures against a naive computation, and each measured one against its source."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from moving_square import FRAMES, write_records

import x3d_tf
from x3d_tf import complexity, gin_config
from x3d_tf.config import Detection, Recipe, TrainConfig
from x3d_tf.data.datasets.spec import DatasetSpec
from x3d_tf.data.records.index import KeyFrameInfo
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.data.records.reader import FrameReader
from x3d_tf.data.sampling import frame_indices, last_start
from x3d_tf.errors import UserError
from x3d_tf.training import planning
from x3d_tf.training.planning import MEASURED, Needs, Speed, plan_lines
from x3d_tf.types import Storage

ROOT = Path(__file__).parents[1]
KINETICS = "--gin_file=gin/kinetics400/x3d_m.gin"


def parsed(*bindings: str) -> TrainConfig:
    return gin_config.parse(["gin/kinetics400/x3d_m.gin"], bindings).config


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight videos in the splits train and test."""
    folder = tmp_path_factory.mktemp("data") / "square"
    write_records(folder, videos=8)
    manifest = Manifest.load(folder)
    replace(manifest, splits=dict.fromkeys(("train", "test"), manifest.splits["train"])).save()
    return folder


@pytest.fixture
def plan(in_process: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Returns a function that prints the plan for flags."""

    def run(*flags: str) -> str:
        in_process(complexity, "--plan", *flags)
        return capsys.readouterr().out

    return run


def row(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.strip().startswith(name))


@pytest.mark.parametrize("figure", MEASURED, ids=lambda figure: figure.meaning)
def test_the_cited_page_states_each_measured_figure(figure: planning.Measured) -> None:
    page = (ROOT / figure.page).read_text("utf-8")
    assert figure.quote in page and f"{figure.value:,g}" in figure.quote
    assert figure.date in page and all(part in page for part in figure.machine.split(", "))
    assert figure.source.startswith(f"{figure.value:,g} ") and figure.page in figure.source


def test_the_papers_recipe_against_a_naive_computation() -> None:
    needs, speed = Needs(parsed(), devices=8), 150.0
    clips = seconds = 0.0
    for step in range(1, 60_001):
        clips += 1024
        seconds += 1024 / (8 * speed)
        if step % 2000 == 0:  # precise batch norm at a checkpoint: a forward pass is a third of a training step
            seconds += 200 * 1024 / (8 * speed) / 3
    assert (needs.steps, needs.checkpoints, needs.precise_clips) == (60_000, 30, 30 * 200 * 1024)
    assert clips == sum(map(needs.clips_in, needs.phases)) == 256 * 240_000
    assert needs.hours(speed) == pytest.approx(seconds / 3600)
    macs = x3d_tf.cost("x3d_m").macs
    assert needs.flop == 2 * macs * (3 * clips + needs.precise_clips)
    assert needs.full.bytes == pytest.approx(0.406e6, rel=1e-3)  # the measured figure, to its three digits
    assert Speed(tflops=12).of(macs) == pytest.approx(12e12 / (6 * macs))


def test_multigrid_training_against_a_naive_computation() -> None:
    multigrid = ('Recipe.schedule="steps"', "Recipe.decay_fractions=(0.5,0.75)", 'Recipe.multigrid="long"')
    needs = Needs(parsed(*multigrid, "Recipe.precise_bn_batches=0"), devices=16)
    macs = {
        shape: x3d_tf.cost(x3d_tf.Expansion(5.0, shape[0], shape[1] / 112, 1.0, 2.25, 2.2)).macs
        for shape in ((4, 158), (8, 158), (8, 224), (16, 224))
    }
    seconds = clips = 0.0
    for steps, factor, shape in (  # 60,000 plain steps: 30,000, 15,000 and 15,000 for each learning rate
        *((2000, 8, (4, 158)), (2000, 4, (8, 158)), (2000, 2, (8, 224)), (2000, 1, (16, 224))),
        *((1000, 8, (4, 158)), (1000, 4, (8, 158)), (1000, 2, (8, 224)), (1000, 1, (16, 224))),
        (15_000, 1, (16, 224)),
    ):
        clips += steps * factor * 1024
        seconds += steps * factor * 1024 / (16 * 150.0) * macs[shape] / macs[16, 224]
    assert sum(map(needs.clips_in, needs.phases)) == clips and needs.steps == 27_000
    assert needs.hours(150.0) == pytest.approx(seconds / 3600)
    table = [line.split() for line in plan_lines(needs, Speed(150.0)) if line.startswith("  all devices, 8 x 224²")]
    rate = 16 * 150 * macs[16, 224] / macs[8, 224]
    assert [float(number.replace(",", "")) for number in table[0][5:]] == pytest.approx(
        [rate, rate * 18, rate * needs.clip_of(needs.phases[2]).bytes / 1e6, rate * 20.4e-3 / 2], rel=1e-3
    )


def test_reads_and_bytes_of_the_real_reader(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Counts what the reader reads of a full shard; frames are small, which changes nothing but their bytes."""
    from x3d_tf.data.records.format import RecordSource, write_split
    from x3d_tf.data.video.decode import EncodedVideo, encode_jpeg

    frame = encode_jpeg(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    sources = [RecordSource(f"v/{number}", (0,)) for number in range(64)]
    videos = (EncodedVideo([frame] * planning.REST_FRAMES, 30.0) for _ in sources)
    split = write_split(tmp_path, "train", sources, videos, ("a",), lambda _: None)
    manifest = Manifest(tmp_path, "noise", ("a",), {"train": split}, {}, Storage(256, 95))
    reader, calls, pread = FrameReader(manifest, "train"), list[int](), os.pread

    def counting(descriptor: int, size: int, offset: int) -> bytes:
        content = pread(descriptor, size, offset)
        calls.append(len(content))
        return content

    monkeypatch.setattr(os, "pread", counting)
    clip = x3d_tf.VARIANTS["x3d_m"].expansion.clip
    for number in range(64):
        start = number / 64 * last_start(300, 30.0, clip, xp=np)
        _, spans = reader.read(number)
        reader.frames(number, spans[np.asarray(frame_indices(start, 300, 30.0, clip, xp=np))])
    assert len(calls) / 64 == pytest.approx(clip.frames + planning.REST_READS.value, abs=0.1)
    assert sum(calls) / 64 - clip.frames * len(frame) == pytest.approx(planning.REST_BYTES.value, rel=0.001)


def test_records_on_disk_are_counted(records: Path, plan: Callable[..., str]) -> None:
    bindings = [f'DatasetSpec.records="{records}"', "Recipe.batch=4", "Recipe.reference_batch=4", "Recipe.steps=10"]
    flags = ["--gin_file=gin/x3d_s.gin", "--gin_file=gin/data/records.gin", "--devices=2", "--clips_per_second=5"]
    text = plan(*flags, *(f"--gin_bindings={binding}" for binding in bindings))
    found = Manifest.load(records).splits["train"]
    size = 2 * sum((records / shard.file).stat().st_size for shard in found.shards)
    assert "8 of the split train [1]" in row(text, "to train on") and f"{size / 1e9:.3g} GB" in row(text, "size")
    assert f"[1] counted from {records / 'manifest.json'}" in text and "do not exist" not in text
    assert "40, 5.0 epochs" in row(text, "clips")
    assert FRAMES < 13  # the frames of a clip: a video of fewer frames gives all of them
    expected = sum(r.length / r.frames * FRAMES + 8105 / 300 * FRAMES for r in found.records) / 8
    assert f"{expected / 1e6:.4g} MB" in row(text, "from storage")
    assert "0.001111 hours, 0.002222 device-hours" in row(text, "duration")  # 40 / (2 * 5) s


def test_key_frames_are_counted(tmp_path: Path) -> None:
    """Only key frames with labels are trained on, and the network is a detector."""
    config = gin_config.parse(["gin/ava/x3d_m_v2.2.gin"], ["Recipe.batch=2"]).config
    write_records(tmp_path / "square", videos=6)
    plain = Manifest.load(tmp_path / "square")
    part = plain.splits["train"]
    key_frames = [r._replace(key_frame=902 + n, labels=(0,) if n < 4 else ()) for n, r in enumerate(part.records)]
    splits = dict.fromkeys(("train", "val"), replace(part, records=tuple(key_frames)))
    info = KeyFrameInfo(1.3, 900.0, None, ("train", "val"), {"train": 6, "val": 6})
    replace(plain, dataset="ava_v2.2", splits=splits, task="detection", key_frames=info).save()
    config = replace(config, dataset=replace(config.dataset, records=str(tmp_path / "square")))
    needs = Needs(config, devices=2)
    assert needs.videos == 4
    assert needs.full.macs == x3d_tf.cost("x3d_m", num_classes=2, head=Detection().head).macs
    simple = Needs(replace(config, detection=Detection(head="simple")), 2)
    assert simple.full.macs == x3d_tf.cost("x3d_m", num_classes=2, head="simple").macs != needs.full.macs


def test_a_detection_recipe_without_records(plan: Callable[..., str]) -> None:
    text = plan("--gin_file=gin/ava/x3d_xl_v2.2.gin", "--devices=8", "--clips_per_second=20")
    assert "unknown" in row(text, "to train on") and "not measured" in row(text, "size")
    assert "not measured for clips of 312 x 312 pixels" in row(text, "CPU time")
    assert "--networks x3d_xl" in text and "scales them to 356 to 446 pixels: not measured" in text
    assert row(text, "all devices").split()[-2:] == ["not", "measured"]


def test_missing_speed_is_not_guessed(plan: Callable[..., str]) -> None:
    text = plan(KINETICS, "--devices=8")
    assert "missing" in row(text, "of a device") and "peak of a data sheet" in text
    assert not any(word in text for word in ("hours", "clips/s", "decoder cores"))
    for known in ("61,440,000, 256.0 epochs", "about 1.8 TB", "60,000, batch 1,024, 128 per device"):
        assert known in text


def test_the_two_speeds_agree(plan: Callable[..., str]) -> None:
    macs = x3d_tf.cost("x3d_m").macs
    by_clips, by_tflops = (
        plan(KINETICS, "--devices=8", flag)
        for flag in ("--clips_per_second=150", f"--device_tflops={150 * 6 * macs / 1e12}")
    )
    for name in ("duration", "all devices", "one device"):
        assert row(by_clips, name).partition(" [")[0] == row(by_tflops, name).partition(" [")[0]
    assert "(your figure, --device_tflops)" in by_tflops and "(your figure, --clips_per_second)" in by_clips


def test_each_source_is_cited_once_and_each_citation_has_one(plan: Callable[..., str]) -> None:
    text = plan(KINETICS, "--devices=8", "--clips_per_second=150")
    body, _, sources = text.partition("\n\n")
    cited = {int(number) for part in body.split("[")[1:] for number in part.partition("]")[0].split(", ")}
    lines = sources.splitlines()
    assert cited == set(range(1, len(lines) + 1)) and len(set(lines)) == len(lines)


def training_on(records: Path, network: str) -> TrainConfig:
    expansion, recipe = x3d_tf.VARIANTS[network].expansion, Recipe(batch=4, reference_batch=4, steps=1)
    return TrainConfig(expansion=expansion, dataset=DatasetSpec(str(records)), recipe=recipe)


def test_records_of_another_short_side_were_not_measured(records: Path, tmp_path: Path) -> None:
    assert Needs(training_on(records, "x3d_s"), 1).full.core_ms == pytest.approx(13.0)
    assert Needs(training_on(records, "x3d_xs"), 1).full.core_ms == pytest.approx(13.0 * 4 / 13)  # of the same size
    shutil.copytree(records, tmp_path / "copy")
    small = replace(Manifest.load(tmp_path / "copy"), stored=Storage(96, 95))
    small.save()
    needs = Needs(training_on(small.folder, "x3d_s"), 1)
    assert needs.full.core_ms is None
    assert any("not measured for records with a short side of 96" in line for line in plan_lines(needs, Speed()))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--plan",), "--plan requires --gin_file"),
        (("--plan", KINETICS, "--layers"), "--plan prints no tables of networks; omit --paper and --layers"),
        (("--device_tflops=5",), "--device_tflops must not be given without --plan"),
        (("--devices=2", KINETICS), "--devices must not be given without --plan"),
        (("--plan", KINETICS, "--device_tflops=-1"), "--device_tflops must be a positive number, got -1.0"),
        (("--plan", KINETICS, "--clips_per_second=nan"), "--clips_per_second must be a positive number, got nan"),
        (
            ("--plan", KINETICS, "--clips_per_second=1", "--device_tflops=1"),
            "--device_tflops must not be given with --clips_per_second",
        ),
        (("--plan", KINETICS, "--devices=3"), "Recipe.batch must be a multiple of the number of devices, 3"),
    ],
)
def test_flags_that_do_not_fit(flags: tuple[str, ...], message: str, in_process: Callable[..., None]) -> None:
    with pytest.raises(UserError, match=message):
        in_process(complexity, *flags)


def test_no_devices() -> None:
    with pytest.raises(UserError, match="--devices must be at least 1, got 0"):
        Needs(parsed(), 0)


def test_records_that_do_not_suit_the_recipe(records: Path) -> None:
    config = parsed(f'DatasetSpec.records="{records}"', 'DatasetSpec.name="records"', 'DatasetSpec.eval_split="test"')
    config = replace(config, dataset=replace(config.dataset, validation_split=None))
    with pytest.raises(UserError, match=r"Recipe\.batch must be at most 8, the number of records"):
        Needs(config, 1)


def test_nothing_is_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: Callable[..., str]) -> None:
    """The records of a synthetic data set are created by training, not by its plan."""
    monkeypatch.chdir(tmp_path)
    text = plan("--gin_file=gin/x3d_s.gin")
    assert "no records yet" in row(text, "folder") and [*tmp_path.iterdir()] == []

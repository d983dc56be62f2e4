"""The needs of a training run before it starts: records, steps, reads, decoder cores, hours. Imports no TensorFlow.

Each figure is counted, follows from counted figures, or was measured. `MEASURED` has the measured ones with their
sources. Where no figure was measured, the plan says which one is missing and how to measure it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from x3d_tf.config import TrainConfig
from x3d_tf.data.records.index import Record
from x3d_tf.data.records.manifest import MANIFEST_NAME, Manifest
from x3d_tf.errors import require
from x3d_tf.modeling.expansion import name_of
from x3d_tf.tasks.base import find
from x3d_tf.text import counted
from x3d_tf.training.checks import CheckedRun, check_batch, open_records
from x3d_tf.training.multigrid import Phase, phases_of
from x3d_tf.types import ClipSpec

_MACHINE = "2 cores of an AMD EPYC, no GPU"


@dataclass(frozen=True)
class Measured:
    """A measured figure.

    Attributes:
        value: the figure.
        unit: its unit.
        meaning: what was measured, as a noun phrase.
        page: page of this repository that states it.
        quote: words of that page that contain the figure.
        machine: the machine; empty where the figure does not depend on one.
        date: day of the measurement, or empty if another source is cited on the page.
    """

    value: float
    unit: str
    meaning: str
    page: str
    quote: str
    machine: str = ""
    date: str = ""

    @property
    def source(self) -> str:
        """The sentence that a plan prints for the figure."""
        details = ", ".join(filter(None, (self.page, self.machine, self.date)))
        return f"{self.value:,g} {self.unit} {self.meaning} ({details})"


_PAGE = "docs/performance.md"
_ROW_S = "| X3D-S, 13 frames, 160² | **13.0** | **0.332** | 0.324 |"
_ROW_M = "| X3D-M, 16 frames, 224² | **20.4** | **0.406** | 0.398 |"

STORED_SIDE = 256  # short side in pixels of the frames that were measured
_RECORD = f"a record of 300 synthetic frames of 340 x {STORED_SIDE} pixels"
RECORD_MB = Measured(
    7.5,
    "MB,",
    f"size of {_RECORD}, as of a ten-second video",
    _PAGE,
    "480 MB, 7.5 MB per record",
    _MACHINE,
    "2026-11-27",
)
FRAMES_MB = Measured(0.398, "MB,", f"16 frames of {_RECORD}", _PAGE, _ROW_M, _MACHINE, "2026-11-28")
FRAMES_MEASURED = 16  # whose size `FRAMES_MB` is
REST_BYTES = Measured(
    8105,
    "bytes",
    "read for each clip besides its frames, from a record of 300 frames",
    _PAGE,
    "The 10 reads without the frames read 8,105 bytes",
    date="2026-11-28",
)
REST_FRAMES = 300  # frames of a record, to whose number `REST_BYTES` is proportional
REST_READS = Measured(
    10,
    "reads",
    "for each clip, besides one for each of its frames",
    _PAGE,
    "A clip of T frames takes\nT + 10 reads",
    date="2026-11-28",
)
CORE_MS: Mapping[tuple[int, int], Measured] = {  # by frames and size of the clip
    (13, 160): Measured(13.0, "core-ms", f"for a clip of X3D-S from {_RECORD}", _PAGE, _ROW_S, _MACHINE, "2026-11-28"),
    (16, 224): Measured(20.4, "core-ms", f"for a clip of X3D-M from {_RECORD}", _PAGE, _ROW_M, _MACHINE, "2026-11-28"),
}
PEAK_SHARE = Measured(
    22.4,
    "%",
    "of the speed of a matrix product in training steps of X3D-M",
    _PAGE,
    "| ours, recomputing activations | 735.4 | 657.8 - 772.3 | 22.4 % |",
    _MACHINE,
    "2026-11-23",
)
VIDEOS: Mapping[str, Measured] = {  # training videos of ten seconds, by the name of the data set
    "kinetics400": Measured(
        240_000,
        "videos",
        "in the training split of Kinetics-400; your lists may have fewer",
        "gin/kinetics400/recipe.gin",
        "256 epochs of 240,000 videos",
    )
}
MEASURED = (RECORD_MB, FRAMES_MB, REST_BYTES, REST_READS, PEAK_SHARE, *CORE_MS.values(), *VIDEOS.values())

_PASSES = 3  # of a training step, in units of a forward pass: gradients of weights and of inputs take one each
_FLOP = 2  # per multiply-add


@dataclass(frozen=True)
class Speed:
    """Measured speed of one device in training; at most one of the two.

    Attributes:
        clips_per_second: training clips of the network per second.
        tflops: 1e12 floating-point operations per second, two per multiply-add, in training steps.

    Raises:
        UserError: a value is not a positive number, or both are given. Names the flags `clips_per_second` and
            `device_tflops`.
    """

    clips_per_second: float | None = None
    tflops: float | None = None

    def __post_init__(self) -> None:
        for flag, value in (("clips_per_second", self.clips_per_second), ("device_tflops", self.tflops)):
            require(value is None or 0 < value < math.inf, f"--{flag}", "be a positive number", value)
        both = self.clips_per_second is not None and self.tflops is not None
        require(not both, "--device_tflops", "not be given with --clips_per_second, which already states the speed")

    def of(self, macs: int) -> float | None:
        """Returns the training clips per second of a network with these multiply-adds; None if it is unknown."""
        return self.clips_per_second if self.tflops is None else self.tflops * 1e12 / training_flop(macs)


def training_flop(macs: int) -> int:
    """Returns the floating-point operations of a training step per clip, as `benchmarks/gpu.py` counts them."""
    return _FLOP * _PASSES * macs


@dataclass(frozen=True)
class Clip:
    """Needs of one training clip.

    Attributes:
        clip: the clip.
        macs: multiply-adds of a forward pass.
        reads: number of separate reads from the records.
        bytes: bytes that these reads transfer.
        core_ms: CPU time in milliseconds that makes the clip; None if it was not measured.
    """

    clip: ClipSpec
    macs: int
    reads: int
    bytes: float
    core_ms: float | None


class Needs:
    """The needs of a training run.

    Args:
        config: the configuration. If its records exist, they are opened and checked; none are created.
        devices: number of devices over all machines.
        num_classes: number of classes. Defaults to that of the records, or to 400 if they do not exist.

    Attributes:
        manifest: manifest of the records, with the videos held out for validation in a split of their own; None if
            the records do not exist.
        phases: phases of the run; one unless Recipe.multigrid is "long".

    Raises:
        UserError: the devices do not divide the batch, or the records do not suit the configuration.
    """

    def __init__(self, config: TrainConfig, devices: int, num_classes: int | None = None) -> None:
        require(devices >= 1, "--devices", "be at least 1", devices)
        checked = _existing_records(config)
        self.config = config = checked.config if checked else config
        check_batch(config, devices)
        self.devices, self.manifest = devices, checked.records if checked else None
        self._records = _training_records(checked) if checked else None
        self._task = checked.task if checked else find(config.task or "single_label")
        self._classes = num_classes or (len(self.manifest.classes) if self.manifest else 400)
        self.phases = phases_of(config).phases
        self._clips = {phase.factor: self._clip(phase) for phase in self.phases}

    @property
    def steps(self) -> int:
        """Number of training steps."""
        return self.phases[-1].end

    @property
    def checkpoints(self) -> int:
        """Number of checkpoints, each of which is validated."""
        return -(-self.steps // self.config.checkpoint_steps)

    @property
    def precise_clips(self) -> int:
        """Number of clips that batch norm is recomputed on (Recipe.precise_bn_batches), in forward passes only."""
        return self.checkpoints * self.config.recipe.precise_bn_batches * self.config.recipe.batch

    @property
    def videos(self) -> int | None:
        """Number of training videos or key frames; None if it is unknown."""
        if self._records is not None:
            return len(self._records)
        known = VIDEOS.get(self.config.dataset.name)
        return int(known.value) if known else None

    @property
    def full(self) -> Clip:
        """The needs of the network's own clip."""
        return self._clips[1]  # of the last phase

    def clips_in(self, phase: Phase) -> int:
        """Returns the number of training clips of a phase."""
        return phase.steps * phase.factor * self.config.recipe.batch

    def clip_of(self, phase: Phase) -> Clip:
        """Returns the needs of a clip of a phase."""
        return self._clips[phase.factor]

    def _clip(self, phase: Phase) -> Clip:
        clip = phase.expansion.clip
        macs = self._task.macs(replace(self.config, expansion=phase.expansion), self._classes)
        return Clip(clip, macs, clip.frames + int(REST_READS.value), self._bytes(clip), self._core_ms(clip))

    def _bytes(self, clip: ClipSpec) -> float:
        """Returns the mean number of bytes that a clip reads; a short video has fewer frames than some clips."""
        if not self._records:
            return clip.frames * FRAMES_MB.value * 1e6 / FRAMES_MEASURED + REST_BYTES.value
        rest = REST_BYTES.value / REST_FRAMES
        sizes = (min(clip.frames, r.frames) * r.length / r.frames + rest * r.frames for r in self._records)
        return sum(sizes) / len(self._records)

    def _core_ms(self, clip: ClipSpec) -> float | None:
        """Returns the measured CPU time of a clip, in proportion to its frames."""
        stored = self.manifest.stored.short_side if self.manifest else STORED_SIDE
        found = [(frames, figure) for (frames, size), figure in CORE_MS.items() if size == clip.size]
        if not found or stored != STORED_SIDE:
            return None
        frames, figure = found[0]
        return figure.value * clip.frames / frames

    @property
    def flop(self) -> int:
        """Floating-point operations of all training steps and of precise batch norm."""
        training = sum(training_flop(self.clip_of(phase).macs) * self.clips_in(phase) for phase in self.phases)
        return training + _FLOP * self.full.macs * self.precise_clips

    def hours(self, clips_per_second: float) -> float:
        """Returns the hours that all devices take, each with this number of training clips of the network a second."""
        return self.flop / (training_flop(self.full.macs) * clips_per_second) / self.devices / 3600


def _existing_records(config: TrainConfig) -> CheckedRun | None:
    """Opens and checks the records of a configuration; returns None if they do not exist."""
    exists = (Path(config.dataset.records) / MANIFEST_NAME).is_file()
    return open_records(config) if exists else None


def _training_records(checked: CheckedRun) -> Sequence[Record]:
    return checked.task.training_records(checked.records, checked.config.dataset.train_split)


def plan_lines(needs: Needs, speed: Speed) -> list[str]:
    """Returns the lines of the plan: each figure, and at the end the source of each measured one."""
    notes = _Notes()
    lines = [f"{name_of(needs.config.expansion, needs.config.model.family)} on {counted(needs.devices, 'device')}"]
    lines += _section("records", _record_rows(needs, notes))
    lines += _section("training", _training_rows(needs, notes))
    lines += _section("each clip", _clip_rows(needs, notes))
    lines += _section("speed", _speed_rows(needs, speed, notes))
    if rate := speed.of(needs.full.macs):
        lines += _rate_table(needs, rate)
    return [*lines, "", *notes.lines()]


def _section(title: str, rows: Iterator[tuple[str, str]]) -> list[str]:
    return [title, *(f"  {name:18} {text}" for name, text in rows)]


class _Notes:
    """Numbers the sources in the order in which figures cite them."""

    def __init__(self) -> None:
        self._sources: list[str] = []

    def cite(self, *sources: str) -> str:
        """Returns the numbers of sources, such as ` [1, 2]`."""
        self._sources += [source for source in dict.fromkeys(sources) if source not in self._sources]
        return f" [{', '.join(str(self._sources.index(source) + 1) for source in sources)}]"

    def lines(self) -> Iterator[str]:
        """Yields the sources with their numbers."""
        yield from (f"[{number}] {source}" for number, source in enumerate(self._sources, start=1))


_STORED = f"The records do not exist yet: counted for --short_side={STORED_SIDE} and --quality=95"
_OPERATIONS = (
    f"counted: {_FLOP} for each multiply-add; a training step is assumed to take {_PASSES} times those of a forward "
    "pass, as in benchmarks/gpu.py"
)
_LINEAR = (
    "assumed: time is proportional to the operations, and no device waits for storage, decoder cores or other devices"
)
_PEAK = "the peak of a data sheet is not such a figure: these networks do not reach it"


def _record_rows(needs: Needs, notes: _Notes) -> Iterator[tuple[str, str]]:
    spec, manifest, videos = needs.config.dataset, needs.manifest, needs.videos
    yield "folder", spec.records + ("" if manifest else ": no records yet, so a classifier of videos is assumed")
    if manifest:
        cited = notes.cite(f"counted from {manifest.folder / MANIFEST_NAME}")
        stored = manifest.original or manifest
        size = sum(shard.bytes for split in stored.splits.values() for shard in split.shards)
        yield "to train on", f"{videos:,} of the split {spec.train_split}{cited}"
        yield "size", f"{_size(size)} in all splits{cited}"
        return
    known = VIDEOS.get(spec.name)
    yield "to train on", f"about {videos:,}{notes.cite(known.source)}" if known else "unknown: no list is known here"
    if videos:
        yield "size", f"about {_size(RECORD_MB.value * 1e6 * videos)}{notes.cite(RECORD_MB.source, _STORED)}"
    else:
        yield "size", "not measured for this data set"


def _training_rows(needs: Needs, notes: _Notes) -> Iterator[tuple[str, str]]:
    recipe = needs.config.recipe
    clips = sum(map(needs.clips_in, needs.phases))
    epochs = f", {clips / needs.videos:,.1f} epochs" if needs.videos else ""
    yield "steps", f"{needs.steps:,}, batch {recipe.batch:,}, {recipe.batch // needs.devices:,} per device"
    for phase in needs.phases if len(needs.phases) > 1 else ():
        spec = phase.expansion.clip
        text = f"{phase.steps:,} steps, batch {recipe.batch * phase.factor:,}"
        yield f"  {spec.frames} x {spec.size}²", text
    yield "clips", f"{clips:,}{epochs}"
    if needs.precise_clips:
        times = f"{recipe.precise_bn_batches} batches at each of {counted(needs.checkpoints, 'checkpoint')}"
        yield "precise batch norm", f"{needs.precise_clips:,} more clips, forward passes: {times}"
    yield "operations", f"{needs.flop / 1e15:,.4g} PFLOP{notes.cite(_OPERATIONS)}"
    yield "not counted", f"validation at {counted(needs.checkpoints, 'checkpoint')}, and the final evaluation"
    if needs.config.execution.recompute != "nothing":
        yield "", f"what Execution.recompute = {needs.config.execution.recompute!r} computes twice"


def _clip_rows(needs: Needs, notes: _Notes) -> Iterator[tuple[str, str]]:
    full = needs.full
    spec = full.clip
    yield "shape", f"{spec.frames} frames, {spec.size} x {spec.size} pixels"
    yield "multiply-adds", f"{full.macs / 1e9:.4g} G in a forward pass, counted as complexity does"
    sources = [REST_BYTES.source]
    if needs.manifest:
        yield "from storage", f"{full.bytes / 1e6:.4g} MB{notes.cite(_from_manifest(needs.manifest), *sources)}"
    else:
        yield "from storage", f"{full.bytes / 1e6:.4g} MB{notes.cite(FRAMES_MB.source, *sources, _STORED)}"
        if needs.config.expansion.jitter[0] > STORED_SIDE:
            low, high = needs.config.expansion.jitter
            yield "", f"larger frames suit this network, which scales them to {low} to {high} pixels: not measured"
    yield "separate reads", f"{full.reads}{notes.cite(REST_READS.source)}"
    if full.core_ms is None:
        yield "CPU time", f"not measured for {_what(needs)}; measure it with:"
        yield "", _measure_clips(needs)
        return
    same_size = next(figure for (_, size), figure in CORE_MS.items() if size == spec.size)
    text = f"{full.core_ms:.4g} core-ms{notes.cite(same_size.source)}"
    yield "CPU time", text + ("" if (spec.frames, spec.size) in CORE_MS else ", in proportion to the frames")


def _from_manifest(manifest: Manifest) -> str:
    return f"mean size of a frame, counted from {manifest.folder / MANIFEST_NAME}"


def _what(needs: Needs) -> str:
    spec, manifest = needs.full.clip, needs.manifest
    if manifest and manifest.stored.short_side != STORED_SIDE:
        return f"records with a short side of {manifest.stored.short_side} pixels"
    return f"clips of {spec.size} x {spec.size} pixels"


def _measure_clips(needs: Needs) -> str:
    name = name_of(needs.config.expansion, needs.config.model.family)
    return f"python benchmarks/input_pipeline.py --records={needs.config.dataset.records} --clips=500 --networks {name}"


def _speed_rows(needs: Needs, speed: Speed, notes: _Notes) -> Iterator[tuple[str, str]]:
    macs = needs.full.macs
    rate = speed.of(macs)
    if rate is None:
        yield "of a device", "missing, and with it the duration, the clips, bytes and reads per second, and the cores."
        yield "", "Nothing was measured on a GPU, so no figure is assumed. Give one that you measured:"
        yield "", "--clips_per_second: the last value of that column in history.csv of a short run on one device"
        yield "", "--device_tflops: TFLOP/s of training steps of such a network, as benchmarks/gpu.py prints them"
        yield "", _PEAK + notes.cite(PEAK_SHARE.source)
        return
    flag = "--clips_per_second" if speed.tflops is None else "--device_tflops"
    tflops = rate * training_flop(macs) / 1e12
    yield "of a device", f"{rate:,.4g} training clips/s, {tflops:,.4g} TFLOP/s (your figure, {flag})"
    if speed.tflops is not None:
        yield "", _PEAK + notes.cite(PEAK_SHARE.source)
    hours = needs.hours(rate)
    yield "duration", f"{hours:,.4g} hours, {needs.devices * hours:,.4g} device-hours{notes.cite(_LINEAR)}"


def _rate_table(needs: Needs, rate: float) -> Iterator[str]:
    """Yields two rows for each shape of clips, for all devices and for one; `rate` is in clips of the network."""
    yield f"{'to keep them busy':24} {'clips/s':>10} {'reads/s':>12} {'MB/s':>10} {'decoder cores':>14}"
    clips = {phase.factor: needs.clip_of(phase) for phase in needs.phases}
    for clip in clips.values():
        shape = f", {clip.clip.frames} x {clip.clip.size}²" if len(clips) > 1 else ""
        for name, devices in (("all devices", needs.devices), ("one device", 1)):
            speed = devices * rate * needs.full.macs / clip.macs
            numbers = f"{speed:10,.1f} {speed * clip.reads:12,.1f} {speed * clip.bytes / 1e6:10,.1f}"
            cores = "not measured" if clip.core_ms is None else f"{speed * clip.core_ms / 1e3:,.1f}"
            yield f"  {name + shape:22} {numbers} {cores:>14}"
    if len(clips) > 1:
        yield "  decoder cores in proportion to the frames of a measured clip of the same size"
    if needs.precise_clips:
        yield f"  precise batch norm has forward passes only: up to {_PASSES} times the clips of its size per second"


def _size(size: float) -> str:
    return f"{size / 1e12:.3g} TB" if size >= 1e12 else f"{size / 1e9:.3g} GB"

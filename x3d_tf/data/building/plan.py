"""Plan of a build: what a data set, its inputs and the settings give, before anything is written.

Imports no TensorFlow.
"""

import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypedDict

from x3d_tf.data.building import class_names
from x3d_tf.data.building.encoding import TIMEOUT
from x3d_tf.data.building.sources import Sources, Video
from x3d_tf.data.datasets.base import Inputs, choose
from x3d_tf.data.records import index
from x3d_tf.data.records.manifest import check_dataset_name
from x3d_tf.errors import UserError, require
from x3d_tf.text import counted
from x3d_tf.types import Storage


class BuildOptions(TypedDict, total=False):
    """Optional arguments of the functions that build records.

    Attributes:
        dataset: name of the data set; see `datasets.base.choose`.
        short_side: short side of the stored frames in pixels; smaller videos are not upscaled. Defaults to 256.
        quality: JPEG quality of the stored frames, 1..95. Defaults to 95.
        workers: number of decoder processes. Defaults to the number of CPUs.
        timeout: seconds that decoding a video may take. Defaults to 600.
        progress: shows a progress bar and the estimated size. Defaults to True.
    """

    dataset: str | None
    short_side: int
    quality: int
    workers: int | None
    timeout: float
    progress: bool


@dataclass(frozen=True)
class EncodingSettings:
    """Encoding settings: short side in pixels, JPEG quality, number of worker processes, seconds allowed per video."""

    short_side: int = 256
    quality: int = 95
    workers: int | None = None
    timeout: float = TIMEOUT

    def __post_init__(self) -> None:
        require(self.short_side >= 1, "short_side", "be at least 1 pixel", self.short_side)
        require(1 <= self.quality <= 95, "quality", "be in 1..95", self.quality)
        require(self.workers is None or self.workers >= 1, "workers", "be at least 1", self.workers)
        require(0 < self.timeout <= 1e6, "timeout", "be above 0 and at most 1,000,000 seconds", self.timeout)
        self.storage()  # checks the upper bound of short_side

    def storage(self) -> Storage:
        """Returns the manifest's entry on how frames are stored."""
        return Storage(self.short_side, self.quality)


class PlannedShard(NamedTuple):
    """A shard to build: its split, its file name and its videos."""

    split: str
    file: str
    videos: list[Video]


@dataclass(frozen=True)
class Plan:
    """A planned build.

    Attributes:
        dataset: name of the data set.
        sources: the videos.
        encoding: how they are encoded.
        identity: settings that identify the build, besides its videos and classes.
        settings: settings that the manifest states.
    """

    dataset: str
    sources: Sources
    encoding: EncodingSettings
    identity: dict[str, Any]
    settings: dict[str, int | float | str]

    @property
    def shards(self) -> list[PlannedShard]:
        """The shards of all splits, in the order in which they are built."""
        return [
            PlannedShard(split, file, videos[part])
            for split, videos in self.sources.splits.items()
            for file, part in index.plan_shards(split, len(videos))
        ]


def plan_build(inputs: Inputs, *, dataset: str | None = None, progress: bool = True, **encoding_settings: Any) -> Plan:
    """Lists the videos of a data set and checks the settings.

    Args:
        inputs: what the data set is read from.
        dataset, progress, **encoding_settings: see `BuildOptions`.

    Raises:
        UserError: a setting is out of range; there is no such data set, or its files differ from their description; a
            split has no videos.
    """
    encoding = EncodingSettings(**encoding_settings)
    data_set = choose(dataset, inputs)
    check_dataset_name(data_set.name, "the name of a data set")
    sources = data_set.sources(inputs)
    for warning in class_names.suspicious_names(sources.classes):
        warnings.warn(warning, stacklevel=3)
    _check_splits(sources)
    if progress and [*sources.splits] == ["train"]:
        print('All videos get the split "train". Training also requires a test split.')
    identity = _identity(data_set.name, inputs, encoding, sources)
    return Plan(data_set.name, sources, encoding, identity, _settings(inputs, sources))


def _identity(dataset: str, inputs: Inputs, encoding: EncodingSettings, sources: Sources) -> dict[str, Any]:
    """Returns the settings that identify a build, besides its videos and classes."""
    key_frames = {} if sources.key_frames is None else asdict(sources.key_frames)
    settings = {
        "dataset": dataset,
        "seed": inputs.seed,
        "frame_rate": inputs.frame_rate,
        "splits": inputs.splits,
        "split": inputs.split,
        "expected": dict(sources.expected),
        **key_frames,
        "official_split": sources.official_split,
        "short_side": encoding.short_side,
        "quality": encoding.quality,
        "videos_per_shard": index.VIDEOS_PER_SHARD,
    }
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}  # as in JSON


def _settings(inputs: Inputs, sources: Sources) -> dict[str, int | float | str]:
    """Returns the settings that the manifest states."""
    official = sources.official_split
    splits = {} if official is None else {"official_split": official.number, "official_splits": official.total}
    return {"seed": inputs.seed, **splits}


def _check_splits(sources: Sources) -> None:
    """Raises if a split is empty, which training would report much later, or if a record is listed twice."""
    for name, videos in sources.splits.items():
        if not videos:
            unusable = sources.unusable
            why = f" ({counted(len(unusable), 'unusable entry')}; the first: {unusable[0]})" if unusable else ""
            raise UserError(f"split {name} has no videos{why}. Add videos to it, or leave it out of --splits")
    found: dict[str, str] = {}
    for name, videos in sources.splits.items():
        for video in videos:
            listed = video.media_id if video.key_frame is None else video.name  # near key frames show the same
            first = found.setdefault(listed, name)
            if first != name:
                where = f"in the splits {first} and {name}"
                raise UserError(f"{listed} is listed {where}; a video, or a part of it, must be in one split")
        twice = next((identity for identity, count in Counter(v.media_id for v in videos).items() if count > 1), None)
        require(twice is None, f"split {name}", "list each video, or part of it, once", twice)

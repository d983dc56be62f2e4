"""Data sets of action detection, from csv files of boxes as AVA has them. Imports no TensorFlow.

`ava_v2.1` and `ava_v2.2` are AVA itself, `ava` is any data set in AVA's format.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from x3d_tf.data.ava_files import (
    NO_ACTION,
    BoxTable,
    KeyFrame,
    LabelMap,
    ava_actions,
    read_boxes,
    read_exclusions,
    read_label_map,
)
from x3d_tf.data.building.listed import entries_by_name, require_one
from x3d_tf.data.building.sources import Sources, Video, shuffle_by_hash
from x3d_tf.data.datasets.base import Inputs
from x3d_tf.data.records.index import KeyFrameInfo
from x3d_tf.data.video.decode import VideoError
from x3d_tf.data.video.image_sequences import FOLDER_FPS, check_frame_rate
from x3d_tf.errors import UserError, require
from x3d_tf.types import Annotation, Box

AVA_START_SECONDS = 900.0  # seconds; timestamp at which AVA's video files begin
MARGIN = 41 / 30  # seconds stored before and after a key frame: X3D-M looks at 40 frames at 30 frames per second
# Videos of each split of AVA v2.1 and v2.2 (Gu et al., "AVA: A Video Dataset of Spatio-temporally Localized Atomic
# Visual Actions", CVPR 2018). The test split has no public boxes.
_VIDEOS = {"train": 235, "val": 64}


@dataclass(frozen=True)
class Ava:
    """Key frames with boxes, in AVA's format.

    Attributes:
        name: name of the data set.
        videos: official number of videos of each split; empty for other data in AVA's format, whose csv files count.
    """

    name: str
    videos: Mapping[str, int] = field(default_factory=dict)
    requires = ("videos", "boxes")
    flips = True

    @property
    def accepts(self) -> tuple[str, ...]:
        """Inputs besides the required ones; AVA itself has its own actions."""
        return ("proposals", "exclusions", "starts_at", "frame_rate", *(() if self.videos else ("label_map",)))

    def sources(self, inputs: Inputs) -> Sources:
        """Returns the key frames; see `find_key_frames`."""
        found = find_key_frames(
            inputs.path("videos"),
            inputs.boxes,
            proposals=inputs.proposals,
            exclusions=inputs.exclusions,
            label_map=inputs.label_map,
            starts_at=AVA_START_SECONDS if inputs.starts_at is None else inputs.starts_at,
            frame_rate=FOLDER_FPS if inputs.frame_rate is None else inputs.frame_rate,
            seed=inputs.seed,
        )
        if found.key_frames and found.key_frames.frame_rate and inputs.frame_rate is None:
            print(f"Folders of frames are read at {FOLDER_FPS:g} frames per second; use --frame_rate to change it.")
        return replace(found, expected=self.videos) if self.videos else found


DATASETS = (Ava("ava"), Ava("ava_v2.1", _VIDEOS), Ava("ava_v2.2", _VIDEOS))


def find_key_frames(
    videos: Path,
    boxes: Mapping[str, Path],
    *,
    proposals: Mapping[str, Path] | None = None,
    exclusions: Mapping[str, Path] | None = None,
    label_map: Path | None = None,
    starts_at: float = AVA_START_SECONDS,
    frame_rate: float = FOLDER_FPS,
    seed: int = 0,
) -> Sources:
    """Finds the key frames that csv files of boxes list. A record will hold the frames around one key frame.

    Args:
        videos: folder with a file `NAME.*`, or a folder `NAME` of frames as images, for each video in the csv files.
        boxes: csv file of ground-truth boxes for each split; see `x3d_tf.data.ava_files.read_boxes`.
        proposals: csv file of a person detector's boxes and scores for each split. Boxes of videos that `boxes` does
            not list for the split are ignored.
        exclusions: csv file of the key frames to leave out, for each split.
        label_map: file of the actions. Defaults to AVA's 80 actions.
        starts_at: timestamp of the first frame of the video files in seconds; timestamps count from the film's start.
        frame_rate: images per second, for folders of frames.
        seed: random seed for the order.

    Returns:
        Sources for the task "detection", where class k is action k + 1. Missing videos are unusable.

    Raises:
        UserError: a file is malformed or lists a video of another split (the message names the line), a timestamp is
            before `starts_at`, a setting is out of range, a video has two files, or no video exists.
    """
    require(0 <= starts_at < math.inf, "starts_at", "be at least 0 seconds", starts_at)
    check_frame_rate(frame_rate, "frame_rate")
    if not videos.is_dir():
        raise UserError(f"videos: {videos} is not a folder")
    for name, files_by_split in (("proposals", proposals), ("exclusions", exclusions)):
        unknown = sorted(set(files_by_split or ()) - set(boxes))
        require(not unknown, name, f"be for splits that have boxes ({', '.join(boxes)})", unknown)
    actions = ava_actions() if label_map is None else read_label_map(label_map)
    names, files = _class_names(actions), entries_by_name(videos)
    splits: dict[str, list[Video]] = {}
    unusable: dict[str, VideoError] = {}
    frames: dict[str, list[KeyFrame]] = {}
    owners: dict[str, tuple[str, str]] = {}
    for split, path in boxes.items():
        truth, proposal_path = read_boxes(path, "ground truth", actions), (proposals or {}).get(split)
        # Proposals are boxes of people whatever their action column holds.
        found = read_boxes(proposal_path, "detections", None) if proposal_path else None
        excluded = read_exclusions(exclusions[split]) if exclusions and split in exclusions else set()
        lines = _first_lines(truth)
        _claim(owners, split, path, lines)
        members = splits.setdefault(split, [])
        annotations = _annotations(truth, found, starts_at, (path, proposal_path))
        frames[split] = [frame for frame in annotations if frame not in excluded]
        for frame in frames[split]:
            where = f"{path}, line {lines[frame.video]}"
            if frame.video not in files:
                reason = f"does not exist (listed in {where})"
                unusable.setdefault(frame.video, VideoError(videos / frame.video, reason))
                continue
            file = require_one(files[frame.video], videos, frame.video, where)
            members.append(_video(file, frame, annotations[frame], names, frame_rate))
    for split, path in boxes.items():
        rule = f"list key frames that are not excluded for split {split}"
        require(bool(frames[split]), str(path), rule)
    if not any(splits.values()):
        lists = ", ".join(map(str, boxes.values()))
        raise UserError(f"no video listed in {lists} exists in {videos} ({len(unusable)} listed)")
    for split, members in splits.items():
        require(bool(members), f"{boxes[split]}", f"list key frames of videos in {videos} for split {split}")
    in_folders = any(path.is_dir() for path in {video.path for members in splits.values() for video in members})
    listed = {split: len(members) for split, members in frames.items()}
    splits_with_proposals = tuple(sorted(proposals or {}))
    info = KeyFrameInfo(MARGIN, starts_at, frame_rate if in_folders else None, splits_with_proposals, listed)
    ordered = {split: _shuffle_films(members, seed) for split, members in splits.items()}
    expected = {split: len({frame.video for frame in members}) for split, members in frames.items()}
    return Sources(ordered, list(unusable.values()), names, "detection", expected, info)


def _first_lines(table: BoxTable) -> dict[str, int]:
    """Returns the line that lists each video first."""
    lines: dict[str, int] = {}
    for number, row in zip(*np.unique(table.frames, return_index=True)):
        lines.setdefault(table.key_frames[number].video, int(table.lines[row]))
    return lines


def _claim(owners: dict[str, tuple[str, str]], split: str, path: Path, lines: Mapping[str, int]) -> None:
    """Notes the split of videos and where they are listed; raises `UserError` if another split has one of them."""
    for video, line in lines.items():
        where = f"{path}, line {line}"
        owner, first = owners.setdefault(video, (split, where))
        rule = f"name a video that is not in the split {owner} ({first}), because a video may be in one split only"
        require(owner == split, where, rule, video)


def _shuffle_films(members: list[Video], seed: int) -> list[Video]:
    """Shuffles films by a hash of their names; a film's key frames stay together, so that its file stays cached."""
    films = {video.name: Video(video.path, video.name, ()) for video in members}
    ranks = {film.name: rank for rank, film in enumerate(shuffle_by_hash([*films.values()], seed))}
    return sorted(members, key=lambda video: (ranks[video.name], video.start))


def _class_names(actions: LabelMap) -> tuple[str, ...]:
    """Names every action up to the highest number. Gaps get AVA's names if the label map is part of AVA's."""
    ava = ava_actions()
    others = ava if actions.items() <= ava.items() else {}
    names = tuple(actions.get(n) or others.get(n) or f"action {n}" for n in range(1, max(actions) + 1))
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    require(not repeated, "label_map", "not give an action the name of one that it leaves out", repeated[:10])
    return names


def _annotations(
    truth: BoxTable, found: BoxTable | None, starts_at: float, paths: tuple[Path, Path | None]
) -> dict[KeyFrame, Annotation]:
    """Joins ground truth and proposals of each key frame, in the order of the files."""
    proposals: dict[KeyFrame, dict[Box, float]] = {}
    videos = {frame.video for frame in truth.key_frames}  # a file of proposals may cover all splits
    labels: dict[KeyFrame, dict[Box, set[int]]] = {}
    for frame, box, action, _ in _rows(truth, starts_at, paths[0]):
        box_labels = labels.setdefault(frame, {}).setdefault(box, set())
        if action != NO_ACTION:
            box_labels.add(action - 1)
    for frame, box, _, score in _rows(found, starts_at, paths[1]) if found is not None else ():
        if frame.video not in videos:
            continue
        scores = proposals.setdefault(frame, {})
        scores[box] = max(score, scores.get(box, score))
    require(found is None or bool(proposals), str(paths[1]), f"have boxes for the videos of {paths[0]}")
    return {
        frame: Annotation(
            frame.second - starts_at,
            tuple(labels.get(frame, {})),
            tuple(tuple(sorted(box_labels)) for box_labels in labels.get(frame, {}).values()),
            tuple(proposals.get(frame, {})),
            tuple(proposals.get(frame, {}).values()),
        )
        for frame in dict.fromkeys((*labels, *proposals))
    }


def _rows(table: BoxTable, starts_at: float, path: Path | None) -> Iterator[tuple[KeyFrame, Box, int, float]]:
    for number, box, action, score, line in zip(table.frames, table.boxes, table.actions, table.scores, table.lines):
        frame = table.key_frames[number]
        rule = f"have a timestamp of at least {starts_at:g} s, where the video files begin"
        require(frame.second >= starts_at, f"{path}, line {line}", rule, frame.second)
        x1, y1, x2, y2 = box.tolist()
        yield frame, (x1, y1, x2, y2), int(action), float(score)


def _video(file: Path, frame: KeyFrame, annotation: Annotation, names: tuple[str, ...], frame_rate: float) -> Video:
    present = sorted({label for box_labels in annotation.labels for label in box_labels})
    return Video(
        file,
        frame.video,
        tuple(names[label] for label in present),
        max(annotation.second - MARGIN, 0.0),
        annotation.second + MARGIN,
        frame.second,
        annotation,
        frame_rate=frame_rate,
    )

"""Which key frames of which videos become records of action detection: AVA's lists of boxes, beside its videos.

Imports no TensorFlow.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from x3d_tf.errors import UserError, require
from x3d_tf.data.datasets.ava import (
    NO_ACTION,
    BoxTable,
    KeyFrame,
    LabelMap,
    ava_actions,
    read_boxes,
    read_exclusions,
    read_label_map,
)
from x3d_tf.data.records.index import key_frame_id, parse_key_frame_id
from x3d_tf.data.build.sources import Sources, Video, in_order
from x3d_tf.types import Annotation, Box
from x3d_tf.data.video.image_sequences import FOLDER_FPS
from x3d_tf.data.video.decode import VideoError

FIRST_MINUTE = 900.0  # second of a film at which AVA's videos begin
MARGIN = 41 / 30  # seconds that a record holds before and after its key frame: X3D-M looks at 40 frames of 30 a second


def find_key_frames(
    videos: Path,
    boxes: Mapping[str, Path],
    *,
    proposals: Mapping[str, Path] | None = None,
    exclusions: Mapping[str, Path] | None = None,
    label_map: Path | None = None,
    starts_at: float = FIRST_MINUTE,
    frame_rate: float = FOLDER_FPS,
    seed: int = 0,
) -> Sources:
    """The key frames that csv files of boxes name; a record holds the frames around one.

    Args:
        videos: holds for each video of the csv files a file `NAME.*`, or a folder `NAME` of its frames as images.
        boxes: by split, the csv file of ground truth; see `ava.read_boxes`.
        proposals: by split, that of the boxes of a person detector, with scores; those of videos that `boxes` does not
            name for the split are left out.
        exclusions: by split, that of key frames to leave out.
        label_map: the actions; AVA's 80 unless given.
        starts_at: second of the film at which the files begin, of whose whole the timestamps count the seconds.
        frame_rate: images a second in folders of frames.
        seed: of the order.

    Returns:
        The sources, of task "detection": class k is action k + 1. Videos that are not there are unusable. The facts are
        the splits that have proposals, how many key frames the lists name for each, `key_frames_SPLIT`, and where there
        are folders of frames, `frame_rate`.

    Raises:
        UserError: what is wrong with a file, with its line; a timestamp before the videos begin; none of the videos is
            there.
    """
    if not videos.is_dir():
        raise UserError(f"videos: {videos} is not a folder")
    for name, given in (("proposals", proposals), ("exclusions", exclusions)):
        unknown = sorted(set(given or ()) - set(boxes))
        require(not unknown, name, f"be of the splits that have boxes, {', '.join(boxes)}", unknown)
    actions = ava_actions() if label_map is None else read_label_map(label_map)
    names, files = _class_names(actions), _files_by_name(videos)
    splits: dict[str, list[Video]] = {}
    unusable: dict[str, VideoError] = {}
    facts: dict[str, int | float | str] = {"proposals": ",".join(sorted(proposals or {}))}
    for split, path in boxes.items():
        truth, of_found = read_boxes(path, "ground truth", actions), (proposals or {}).get(split)
        # a box found is one whatever it is said to do
        found = read_boxes(of_found, "detections", None) if of_found else None
        left_out = read_exclusions(exclusions[split]) if exclusions and split in exclusions else set()
        members = splits.setdefault(split, [])
        annotations = _annotations(truth, found, starts_at, (path, of_found))
        named = [frame for frame in annotations if frame not in left_out]
        facts[key_frames_of(split)] = len(named)
        for frame in named:
            if frame.video not in files:
                unusable.setdefault(frame.video, VideoError(videos / frame.video, f"no such video ({path} names it)"))
                continue
            members.append(_video(files[frame.video], frame, annotations[frame], names, frame_rate))
    for split, path in boxes.items():
        rule = f"name key frames for split {split}, less the excluded ones"
        require(bool(facts[key_frames_of(split)]), str(path), rule, "none")
    if not any(splits.values()):
        lists = ", ".join(map(str, boxes.values()))
        raise UserError(f"no video that {lists} name is in {videos} ({len(unusable)} named)")
    for split, members in splits.items():
        require(bool(members), f"{boxes[split]}", f"name key frames of videos in {videos} for split {split}", "none")
    if any(path.is_dir() for path in {video.path for members in splits.values() for video in members}):
        facts["frame_rate"] = frame_rate
    ordered = {split: _in_order(members, seed) for split, members in splits.items()}
    return Sources(ordered, list(unusable.values()), names, "detection", facts)


def key_frames_of(split: str) -> str:
    """The setting of a manifest that says how many key frames the lists name for a split, found or not."""
    return f"key_frames_{split}"


def _in_order(members: list[Video], seed: int) -> list[Video]:
    """Films shuffled by a hash of their names, the key frames of each in a row: what is read of a file serves all."""
    names = {parse_key_frame_id(video.media_id)[0]: video for video in members}
    films = in_order([video._replace(media_id=name) for name, video in names.items()], seed)
    places = {film.media_id: place for place, film in enumerate(films)}
    return sorted(members, key=lambda video: (places[parse_key_frame_id(video.media_id)[0]], video.start))


def _files_by_name(videos: Path) -> dict[str, Path]:
    """Files and folders by their names without ending.

    Raises:
        UserError: two of one name.
    """
    found: dict[str, Path] = {}
    for entry in sorted(videos.iterdir()):
        if entry.name.startswith("."):
            continue
        name = entry.name if entry.is_dir() else entry.stem
        require(name not in found, f"videos: {videos}", "hold each video once", [str(found.get(name)), str(entry)])
        found[name] = entry
    return found


def _class_names(actions: LabelMap) -> tuple[str, ...]:
    """One for each number up to the highest: those that the label map leaves out are AVA's, or have no name."""
    ava = ava_actions()
    others = ava if actions.items() <= ava.items() else {}
    names = tuple(actions.get(n) or others.get(n) or f"action {n}" for n in range(1, max(actions) + 1))
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    require(not repeated, "label_map", "name no action as one that it leaves out is called", repeated[:10])
    return names


def _annotations(
    truth: BoxTable, found: BoxTable | None, starts_at: float, paths: tuple[Path, Path | None]
) -> dict[KeyFrame, Annotation]:
    """What is known of each key frame, in the order in which the files name them."""
    proposals: dict[KeyFrame, dict[Box, float]] = {}
    videos = {frame.video for frame in truth.key_frames}  # a list of boxes found may be of all splits
    labels: dict[KeyFrame, dict[Box, set[int]]] = {}
    for frame, box, action, _ in _rows(truth, starts_at, paths[0]):
        own = labels.setdefault(frame, {}).setdefault(box, set())
        if action != NO_ACTION:
            own.add(action - 1)
    for frame, box, _, score in _rows(found, starts_at, paths[1]) if found is not None else ():
        if frame.video not in videos:
            continue
        own_scores = proposals.setdefault(frame, {})
        own_scores[box] = max(score, own_scores.get(box, score))
    require(found is None or bool(proposals), str(paths[1]), f"have boxes of the videos of {paths[0]}", "none")
    return {
        frame: Annotation(
            frame.second - starts_at,
            tuple(labels.get(frame, {})),
            tuple(tuple(sorted(own)) for own in labels.get(frame, {}).values()),
            tuple(proposals.get(frame, {})),
            tuple(proposals.get(frame, {}).values()),
        )
        for frame in dict.fromkeys((*labels, *proposals))
    }


def _rows(table: BoxTable, starts_at: float, path: Path | None) -> Iterator[tuple[KeyFrame, Box, int, float]]:
    for number, box, action, score, line in zip(table.frames, table.boxes, table.actions, table.scores, table.lines):
        frame = table.key_frames[number]
        rule = f"have a timestamp from {starts_at:g} on, where videos begin"
        require(frame.second >= starts_at, f"{path}, line {line}", rule, frame.second)
        x1, y1, x2, y2 = box.tolist()
        yield frame, (x1, y1, x2, y2), int(action), float(score)


def _video(file: Path, frame: KeyFrame, annotation: Annotation, names: tuple[str, ...], frame_rate: float) -> Video:
    present = sorted({label for own in annotation.labels for label in own})
    return Video(
        file,
        key_frame_id(*frame),
        tuple(names[label] for label in present),
        max(annotation.second - MARGIN, 0.0),
        annotation.second + MARGIN,
        annotation,
        frame_rate=frame_rate,
    )

"""Synthetic videos and their lists in the official formats, under the names that the documentation uses.

The classes are directions in which a picture moves, and differ in nothing else: single frames look alike. Left and
right are one class, because the recipes mirror clips.
"""

import csv
import json
import random
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from video_fixtures import write_video

from x3d_tf.data.datasets.moving_shapes import SPEEDS, draw_picture

MOTIONS = {  # rows and columns per step
    "down": (1, 0),
    "up": (-1, 0),
    "sideways": (0, 1),
    "down sideways": (0.7, 0.7),
    "up sideways": (-0.7, 0.7),
    "still": (0, 0),
}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Motion(NamedTuple):
    """A direction, which is a key of MOTIONS, for a number of frames."""

    name: str
    frames: int


class Drawn(NamedTuple):
    """A video to be written: its path, the seed of its picture and its motions, one after the other."""

    path: Path
    seed: int
    motions: tuple[Motion, ...]
    fps: int
    codec: str = "mpeg4"


def frames_of(video: Drawn) -> NDArray[np.uint8]:
    """Draws a video, uint8 RGB [frames, 128, 128, 3]."""
    rng = np.random.default_rng((video.seed, 2))
    side = (1, 1 - 2 * int(rng.integers(2)))  # to the left or to the right
    speed = rng.uniform(*SPEEDS) * 30 / video.fps
    steps = np.concatenate([[np.multiply(MOTIONS[name], side)] * frames for name, frames in video.motions])
    picture = draw_picture(video.seed)
    shifts = rng.integers(0, len(picture), 2) + np.round(speed * np.cumsum(steps, axis=0)).astype(int)
    return np.stack([np.roll(picture, shift, (0, 1)) for shift in shifts])


def _write(video: Drawn) -> None:
    write_video(video.path, frames_of(video), video.fps, codec=video.codec)


def write_videos(videos: Iterable[Drawn]) -> None:
    """Writes videos in two processes."""
    with ProcessPoolExecutor(2) as pool:
        for _ in pool.map(_write, videos, chunksize=20):
            pass


def _write_csv(path: Path, header: str, rows: Iterable[Iterable[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header.split(","), *rows])


# ---- Kinetics-400

KINETICS = {"bungee jumping": "down", "climbing a rope": "up", "driving car": "sideways", "tai chi": "still"}


class Listed(NamedTuple):
    """Numbers of videos that the lists of Kinetics name: all of them, without a file, and with a damaged file."""

    videos: int
    missing: int
    damaged: int


def write_kinetics(root: Path, counts: Mapping[str, int]) -> Listed:
    """Writes `counts` videos of each split, "train" and "validate", to `kinetics400/`, and their official csv files.

    A clip has 3 seconds. Of ten videos, one is complete: 5 seconds, of which the list names 3, and another class moves
    before and after them. Of twenty, one is missing. Of a hundred, one is a file that cannot be decoded. Half of the
    files are in the folders of their classes. Classes are drawn at random.
    """
    folder, videos, damaged, missing = root / "kinetics400" / "videos", list[Drawn](), 0, 0
    names, rng = list(KINETICS), random.Random(0)
    for split, count in counts.items():
        rows = []
        for number in range(count):
            seed = len(videos) + missing + damaged
            youtube_id = f"{split[:5]:_<5}{number:06d}"
            name, other = rng.sample(names, 2)
            start = 1 if number % 10 == 5 else 10
            rows.append((name, youtube_id, start, start + 3, split))
            within = folder / name.replace(" ", "_") if number % 8 < 4 else folder
            path, motions = within / f"{youtube_id}_{start:06d}_{start + 3:06d}.mp4", (Motion(KINETICS[name], 90),)
            if number % 10 == 5:  # a complete video
                around = Motion(KINETICS[other], 30)
                path, motions = within / f"{youtube_id}.mp4", (around, *motions, around)
            if number % 20 == 19:
                missing += 1
            elif number % 100 == 42:
                damaged += 1
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(np.random.default_rng(seed).bytes(20_000))
            else:
                videos.append(Drawn(path, seed, motions, 30))
        _write_csv(root / "kinetics400" / f"{split}.csv", "label,youtube_id,time_start,time_end,split", rows)
    write_videos(videos)
    return Listed(sum(counts.values()), missing, damaged)


# ---- Charades

CHARADES = ("down", "up", "sideways", "down sideways", "up sideways")
FRAME_RATE, PART = 24, 48  # a video has five parts of two seconds
CHARADES_HEADER = "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length"


def charades_parts(rng: random.Random) -> list[str]:
    """Returns the motions of the five parts of a video: none, one or two actions, and rest."""
    parts = ["still"] * 5
    actions = rng.sample(CHARADES, rng.choices((0, 1, 2), (1, 9, 10))[0])
    for place, action in zip(rng.sample(range(5), len(actions)), actions):
        parts[place] = action
    return parts


def write_charades(root: Path, counts: Mapping[str, int]) -> float:
    """Writes `counts` videos of the splits "train" and "test" with actions of two seconds, and their official lists.

    Returns:
        The share of positives in the test split: the mean average precision of random scores.
    """
    rng, videos, positives = random.Random(0), list[Drawn](), dict.fromkeys(counts, 0)
    for split, count in counts.items():
        rows = []
        for _ in range(count):
            number, parts = len(videos), charades_parts(rng)
            video_id = f"{LETTERS[number // 26**2]}{LETTERS[number // 26 % 26]}{LETTERS[number % 26]}00"
            seconds = PART / FRAME_RATE
            actions = [
                f"c{CHARADES.index(name):03d} {place * seconds:.2f} {(place + 1) * seconds:.2f}"
                for place, name in enumerate(parts)
                if name in CHARADES
            ]
            positives[split] += len(actions)
            rows.append((video_id, "AB12", "Kitchen", 6, 7, "Yes", "", "", "", ";".join(actions), 5 * seconds))
            motions = tuple(Motion(name, PART) for name in parts)
            videos.append(Drawn(root / "Charades_v1_480" / f"{video_id}.mp4", number, motions, FRAME_RATE))
        _write_csv(root / f"Charades_v1_{split}.csv", CHARADES_HEADER, rows)
    texts = [f"c{number:03d} Moving {name}\n" for number, name in enumerate(CHARADES)]
    (root / "Charades_v1_classes.txt").write_text("".join(texts) + f"c{len(CHARADES):03d} Never seen\n")
    write_videos(videos)
    return positives["test"] / (counts["test"] * len(CHARADES))


# ---- UCF101, HMDB51, Something-Something V2

GROUPS = 25  # groups of videos of a class of UCF101, of which each split tests seven


def write_ucf101(root: Path, videos_per_group: int) -> None:
    """Writes 25 groups of videos of five classes to `UCF-101/`, and the lists of three splits."""
    names = {name.title().replace(" ", ""): name for name in CHARADES}
    lists, videos = root / "ucfTrainTestlist", list[Drawn]()
    lists.mkdir(parents=True, exist_ok=True)
    (lists / "classInd.txt").write_text("".join(f"{number} {name}\n" for number, name in enumerate(names, 1)))
    lines: dict[str, list[str]] = {f"{part}list0{split}.txt": [] for part in ("train", "test") for split in (1, 2, 3)}
    for number, (name, motion) in enumerate(names.items(), 1):
        for group in range(1, GROUPS + 1):
            for clip in range(1, videos_per_group + 1):
                path = f"{name}/v_{name}_g{group:02d}_c{clip:02d}.avi"
                videos.append(Drawn(root / "UCF-101" / path, len(videos), (Motion(motion, 60),), 25))
                for split in (1, 2, 3):
                    tested = 7 * (split - 1) < group <= 7 * split
                    line = f"{path}\n" if tested else f"{path} {number}\n"
                    lines[f"{'test' if tested else 'train'}list0{split}.txt"].append(line)
    for file, rows in lines.items():
        (lists / file).write_text("".join(rows))
    write_videos(videos)


def write_hmdb51(root: Path, videos_per_class: int) -> None:
    """Writes videos of five classes to `hmdb51/`, and the lists of the first split: 1 trains, 2 tests, 0 is unused."""
    lists, videos = root / "testTrainMulti_7030_splits", list[Drawn]()
    lists.mkdir(parents=True, exist_ok=True)
    for motion in CHARADES:
        name, lines = motion.replace(" ", "_"), []
        for number in range(videos_per_class):
            video = f"clip_{name}_{number}.avi"
            lines.append(f"{video} {(1, 1, 1, 1, 2, 2, 0)[number % 7]}\n")
            videos.append(Drawn(root / "hmdb51" / name / video, len(videos), (Motion(motion, 60),), 30))
        (lists / f"{name}_test_split1.txt").write_text("".join(lines))
    write_videos(videos)


def write_something(root: Path, counts: Mapping[str, int]) -> None:
    """Writes videos of the splits "train" and "validation" of four templates, and their official lists."""
    templates = {f"Moving [something] {name}": name for name in ("down", "up", "sideways", "still")}
    numbers = {template.replace("[", "").replace("]", ""): str(n) for n, template in enumerate(templates)}
    (root / "labels.json").write_text(json.dumps(numbers))
    folder, videos = root / "20bn-something-something-v2", list[Drawn]()
    for split, count in counts.items():
        rows = []
        for template, motion in islice(cycle(templates.items()), count):
            video_id = str(len(videos) + 1)
            rows.append({"id": video_id, "label": template.replace("[something]", "a cup"), "template": template})
            videos.append(Drawn(folder / f"{video_id}.webm", len(videos), (Motion(motion, 36),), 12, "libvpx"))
        (root / f"{split}.json").write_text(json.dumps(rows))
    write_videos(videos)

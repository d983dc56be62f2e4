"""A synthetic AVA dataset: films of four independently moving squares, with AVA's annotation files.

Actions are directions: a square that moves up and to the left has two labels. Labels are independent of the position
and look of the square and of the other squares, so a network must recognise the motion within the box. Films last from
second 900 to 909. Key frames are 902, 904, 906 and 908, and directions change between them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from video_fixtures import write_video

SIDE, ACTOR, FPS = 192, 44, 30
KEY_SECONDS = (902, 904, 906, 908)
ACTIONS = {1: "moves left", 2: "moves right", 3: "moves up", 4: "moves down"}
SPEED = 0.6  # maximum, in pixels per frame
LABEL_MAP = "".join(f'item {{ name: "{name}" label_id: {number} }}\n' for number, name in ACTIONS.items())


class Actor(NamedTuple):
    """A square: its image, and its position and velocity (pixels per frame) at each key frame."""

    picture: np.ndarray  # [ACTOR, ACTOR, 3]
    corners: np.ndarray  # [key frames, 2], x and y
    velocities: np.ndarray  # [key frames, 2]

    def box(self, key: int) -> str:
        """Returns the box at a key frame in AVA's csv format."""
        x, y = self.corners[key] / SIDE
        return ",".join(f"{value:.3f}" for value in (x, y, x + ACTOR / SIDE, y + ACTOR / SIDE))

    def actions(self, key: int) -> list[int]:
        """Returns the action ids at a key frame."""
        (x, y) = self.velocities[key]
        return [number for number, active in zip(ACTIONS, (x < 0, x > 0, y < 0, y > 0)) if active]


def actors_of(seed: int) -> list[Actor]:
    """Returns the actors of a film, one in each quarter of the image."""
    random = np.random.default_rng(seed)
    quarter, free = SIDE // 2, SIDE // 2 - ACTOR
    reach = SPEED * FPS  # pixels moved between a key frame and the next change of direction
    actors = []
    for number in range(4):
        corner = np.array([number % 2, number // 2]) * quarter
        picture = random.integers(60, 256, (ACTOR // 4, ACTOR // 4, 3), np.uint8).repeat(4, 0).repeat(4, 1)
        directions = np.array([(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1) if x or y])
        headings = directions[random.integers(0, len(directions), len(KEY_SECONDS))]
        speeds = random.uniform(0.7 * SPEED, SPEED, (len(KEY_SECONDS), 1))
        middle = random.uniform(reach, free - reach, (len(KEY_SECONDS), 2))
        actors.append(Actor(picture, corner + middle, headings * speeds))
    return actors


def frames_of(seed: int) -> np.ndarray:
    """Returns the frames of a film, uint8 [frames, SIDE, SIDE, 3]."""
    random = np.random.default_rng((seed, 1))
    background = random.integers(0, 60, (SIDE // 8, SIDE // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    actors = actors_of(seed)
    count = (KEY_SECONDS[-1] + 1 - 900) * FPS
    frames = np.repeat(background[None], count, axis=0)
    for number in range(count):
        key = int(np.clip(round((number / FPS - 2) / 2), 0, len(KEY_SECONDS) - 1))
        elapsed = number - (KEY_SECONDS[key] - 900) * FPS
        for actor in actors:
            x, y = np.round(actor.corners[key] + np.clip(elapsed, -FPS, FPS) * actor.velocities[key]).astype(int)
            frames[number, y : y + ACTOR, x : x + ACTOR] = actor.picture
    return frames


def write_films(folder: Path, split: str, seeds: range, *, images: bool = False) -> None:
    """Writes films, as videos or folders of images, and AVA's annotation files.

    SPLIT.csv holds the annotated boxes. SPLIT_found.csv holds the boxes of an imprecise person detector, with a false
    positive and a low-scoring box per key frame. SPLIT_excluded.csv lists one key frame of the first film.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "actions.pbtxt").write_text(LABEL_MAP)
    annotations, detections = [], []
    for seed in seeds:
        film = f"{split}_{seed:04d}"
        if images:
            (folder / "videos" / film).mkdir(parents=True, exist_ok=True)
            for number, pixels in enumerate(frames_of(seed), 1):
                Image.fromarray(pixels).save(folder / "videos" / film / f"{film}_{number:06d}.jpg", quality=92)
        else:
            write_video(folder / "videos" / f"{film}.mp4", frames_of(seed))
        for number, actor in enumerate(actors_of(seed)):
            for key, second in enumerate(KEY_SECONDS):
                rows = actor.actions(key)
                annotations += [f"{film},{second:04d},{actor.box(key)},{action},{number}\n" for action in rows]
        detections += list(_detections(seed, film))
    (folder / f"{split}.csv").write_text("".join(annotations))
    (folder / f"{split}_found.csv").write_text("".join(detections))
    (folder / f"{split}_excluded.csv").write_text(f"{split}_{seeds[0]:04d},{KEY_SECONDS[0]:04d}\n")


def _detections(seed: int, film: str) -> Iterator[str]:
    random = np.random.default_rng((seed, 2))

    def row(second: int, corner: np.ndarray, size: float, score: float) -> str:
        x, y = np.clip(corner / SIDE, 0, 1 - size / SIDE)
        box = ",".join(f"{value:.3f}" for value in (x, y, x + size / SIDE, y + size / SIDE))
        return f"{film},{second:04d},{box},,{score:.3f}\n"

    for key, second in enumerate(KEY_SECONDS):
        for actor in actors_of(seed):
            yield row(second, actor.corners[key] + random.uniform(-2, 2, 2), ACTOR, random.uniform(0.81, 1))
        empty = np.array(
            [SIDE // 2 - 15, random.uniform(0, SIDE - 30)]
        )  # between the actors on the left and on the right
        yield row(second, empty, 30, random.uniform(0.81, 0.9))
        yield row(second, random.uniform(0, SIDE - ACTOR, 2), ACTOR, random.uniform(0.1, 0.79))

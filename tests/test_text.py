"""Counts with their nouns, and ends of paths."""

from pathlib import Path

import pytest

from x3d_tf.text import counted, distinct_ends, lines_of


@pytest.mark.parametrize(
    ("count", "noun", "words"),
    [
        (1, "clip", "1 clip"),
        (0, "clip", "0 clips"),
        (2, "class", "2 classes"),
        (1, "class", "1 class"),
        (3, "box", "3 boxes"),
        (2, "unusable entry", "2 unusable entries"),
        (2, "day", "2 days"),
        (12, "key frame", "12 key frames"),
    ],
)
def test_counts_agree_with_their_nouns(count: int, noun: str, words: str) -> None:
    assert counted(count, noun) == words


def test_paths_are_shortened_to_what_distinguishes_them() -> None:
    ends = {
        "/data/hug/a.mp4": "hug/a.mp4",
        "/data/kick/a.mp4": "kick/a.mp4",
        "/data/kick/b.mp4": "b.mp4",
        "x/1/c.mp4": "x/1/c.mp4",
        "y/1/c.mp4": "y/1/c.mp4",
        "1/c.mp4": "1/c.mp4",
        "d.mp4": "d.mp4",
        "/d.mp4": "/d.mp4",
    }
    paths = [Path(path) for path in ends]
    assert distinct_ends([*paths, paths[0]]) == {Path(path): end for path, end in ends.items()}
    assert distinct_ends([]) == {}


def test_lines_end_where_editors_end_them() -> None:
    assert lines_of("a\r\nb\rc\n\u2028d\x0be\n") == ["a", "b", "c", "\u2028d\x0be", ""]

"""Counts with their nouns."""

import pytest

from x3d_tf.text import counted


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

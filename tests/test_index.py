"""Names in the index of the records: segments of files, and key frames."""

import pytest

from x3d_tf.data.records.index import parse_key_frame_id, parse_segment_file, segment_id
from x3d_tf.errors import UserError


def test_segment_ids_give_their_files() -> None:
    for start, end in ((None, None), (0.5, None), (None, 3.0), (1e-05, 1e20)):
        assert parse_segment_file(segment_id("a#b-c/d.mp4", start, end)) == "a#b-c/d.mp4"


@pytest.mark.parametrize("second", ["", "-1", "1_0", "９", "9" * 5000, "9" * 30])
def test_invalid_key_frame_ids(second: str) -> None:
    with pytest.raises(UserError, match="the media_id of a key frame must be VIDEO,SECOND, got 'film,"):
        parse_key_frame_id(f"film,{second}")
    assert parse_key_frame_id("a,film,0902") == ("a,film", 902)

"""Videos stored as folders of images: their times, and files that are not images."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from video_fixtures import number_of, numbered_frames

from x3d_tf.data.building.encoding import encode_or_error
from x3d_tf.data.building.sources import Video
from x3d_tf.data.video.decode import VideoError
from x3d_tf.data.video.image_sequences import encode_folder


def folder_of(folder: Path, numbers: list[int]) -> Path:
    for number in numbers:
        Image.fromarray(numbered_frames(50)[number % 50]).save(folder / f"img_{number:05d}.jpg", quality=95)
    return folder


def numbers_in(jpegs: list[bytes]) -> list[int]:
    return [number_of(np.asarray(Image.open(io.BytesIO(jpeg)))) for jpeg in jpegs]


def test_frame_numbers_determine_the_times_of_images(tmp_path: Path) -> None:
    for number in (1, 2, 10):
        Image.fromarray(numbered_frames(11)[number]).save(tmp_path / f"{number}.jpg", quality=95)
    found = numbers_in(encode_folder(tmp_path).frames)
    assert found == [1, *[2] * 8, 10]  # those that are left out repeat the one before
    (tmp_path / "cover.jpg").write_bytes((tmp_path / "1.jpg").read_bytes())
    with pytest.raises(VideoError, match="does not end with a number"):
        encode_folder(tmp_path)


def test_only_jpeg_and_png_are_read(tmp_path: Path) -> None:
    """Pillow has decoders for about forty formats and ignores file extensions."""
    Image.fromarray(numbered_frames(1)[0]).save(tmp_path / "1.png")
    assert len(encode_folder(tmp_path).frames) == 1
    for form in ("GIF", "TIFF", "BMP", "PPM", "WEBP", "EPS"):
        (tmp_path / form).mkdir()
        Image.fromarray(numbered_frames(1)[0]).save(tmp_path / form / "1.jpg", form)
        with pytest.raises(VideoError, match="cannot be read as an image: it is not a JPEG or PNG image"):
            encode_folder(tmp_path / form)


def test_a_pipe_among_the_images_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "1.jpg")
    with pytest.raises(VideoError, match=r"1\.jpg: is not a file"):
        encode_folder(tmp_path)


def test_image_numbers_and_frame_rate_determine_times(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [*range(1, 10), 14, 15, *range(20, 40)])
    shown = [*range(1, 10), *[9] * 4, 14, *[15] * 5, *range(20, 40)]
    assert numbers_in(encode_folder(folder).frames) == shown
    for start, end in ((0.0, 0.4), (0.4, 0.8), (0.48, 0.52), (1.4, None)):
        found = encode_folder(folder, start=start, end=end, fps=25)
        first, stop = round(start * 25), None if end is None else round(end * 25)
        assert (numbers_in(found.frames), found.fps, found.start) == (shown[first:stop], 25.0, start)
        assert encode_or_error(Video(folder, "a", (), start, end, frame_rate=25.0), 256, 95) == found
    with pytest.raises(VideoError, match=r"ends before 1\.6 s: it has 31 images at 25 per second"):
        encode_folder(folder, start=1.6, fps=25)


def test_image_numbers_that_are_timestamps_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"img_99999\.jpg: follows a gap of more than 60 s without images"):
        encode_folder(folder_of(tmp_path, [1, 2, 99999]))

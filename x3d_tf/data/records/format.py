"""The records that training reads: one `tf.train.SequenceExample` a video, frames as JPEG, in sharded TFRecord files.

Feature names are MediaSequence's, which Model Garden and DMVR read too. This is the only module that knows them.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import tensorflow as tf

from x3d_tf.data.records.index import FOOTER_BYTES, HEADER_BYTES, Record, Shard, Split, plan_shards
from x3d_tf.data.records.manifest import Manifest
from x3d_tf.data.video.decode import EncodedVideo, Pixels, VideoError, encode_jpeg, frame_at
from x3d_tf.errors import UserError
from x3d_tf.files import os_errors_as_write_error, temporary_path
from x3d_tf.types import Annotation, Box, Storage

_CONTEXT = {
    "clip/label/index": tf.io.RaggedFeature(tf.int64),
    "clip/label/string": tf.io.RaggedFeature(tf.string),
    "clip/media_id": tf.io.FixedLenFeature([], tf.string),
    "image/frame_rate": tf.io.FixedLenFeature([], tf.float32),
}
_LENGTH_BYTES = 8  # of a record's header, which its checksum follows
_READERS = 16  # shards whose headers are read in parallel
NO_LABEL = -1  # in place of the class of a box that does nothing
_PROPOSAL = "proposal"
_SIDES = ("xmin", "ymin", "xmax", "ymax")
_REGIONS = {
    **{f"region/bbox/{name}": tf.io.RaggedFeature(tf.float32) for name in _SIDES},
    **{f"{_PROPOSAL}/region/bbox/{name}": tf.io.RaggedFeature(tf.float32) for name in _SIDES},
    f"{_PROPOSAL}/region/label/confidence": tf.io.RaggedFeature(tf.float32),
    "region/label/index": tf.io.RaggedFeature(tf.int64),
    "region/is_annotated": tf.io.FixedLenSequenceFeature([], tf.int64),
}
MAX_PIXELS = 1 << 25  # of a frame: 8K video has 33,177,600. A few bytes can ask for gigabytes
_FRAMES = {"image/encoded": tf.io.FixedLenSequenceFeature([], tf.string)}


class Source(NamedTuple):
    """A video on its way into a record.

    Attributes:
        media_id: its name.
        labels: its classes as ascending indices.
        annotation: what is known of one of its frames, which makes it a record of action detection.
    """

    media_id: str
    labels: tuple[int, ...]
    annotation: Annotation | None = None


class ParsedRecord(NamedTuple):
    """A record's content as tensors.

    Attributes:
        frames: JPEG files, string [frames].
        labels: the classes' indices, int64 [labels].
        names: the classes' names, string [labels].
        fps: float32.
        media_id: string.
        serialized: the record itself.
    """

    frames: tf.Tensor
    labels: tf.Tensor
    names: tf.Tensor
    fps: tf.Tensor
    media_id: tf.Tensor
    serialized: tf.Tensor


class ParsedAnnotation(NamedTuple):
    """What is known of a key frame, as tensors.

    Attributes:
        key_frame: its place among the record's frames, int64.
        boxes: x1, y1, x2, y2 in [0, 1] of the frame, one row for each pair of a box and a class, float32 [n, 4].
        labels: the classes, or `NO_LABEL`, int64 [n].
        proposals: boxes of a detector of persons, float32 [m, 4].
        scores: of the proposals, float32 [m].
    """

    key_frame: tf.Tensor
    boxes: tf.Tensor
    labels: tf.Tensor
    proposals: tf.Tensor
    scores: tf.Tensor


def encode_record(video: EncodedVideo, source: Source, classes: Sequence[str]) -> bytes:
    """One video as a serialised SequenceExample; `classes` names all of them. Equal input gives equal bytes."""
    names = [classes[label].encode() for label in source.labels]
    context = {
        "clip/label/index": _ints(source.labels),
        "clip/label/string": _bytes(names),  # MediaSequence's name for it
        "clip/label/text": _bytes(names),  # DMVR's
        "clip/media_id": _bytes([source.media_id.encode()]),
        "image/format": _bytes([b"JPEG"]),
        "image/frame_rate": tf.train.Feature(float_list=tf.train.FloatList(value=[video.fps])),
    }
    microseconds = [round(index * 1e6 / video.fps) for index in range(len(video.frames))]
    frames = {
        "image/encoded": tf.train.FeatureList(feature=[_bytes([jpeg]) for jpeg in video.frames]),
        "image/timestamp": tf.train.FeatureList(feature=[_ints([time]) for time in microseconds]),
    }
    if source.annotation is not None:
        frames |= _regions(source.annotation, frame_at(source.annotation.second, video.start, video.fps), microseconds)
    example = tf.train.SequenceExample(
        context=tf.train.Features(feature=context), feature_lists=tf.train.FeatureLists(feature_list=frames)
    )
    return bytes(example.SerializeToString(deterministic=True))  # else the order of map entries may vary


def _regions(annotation: Annotation, key_frame: int, microseconds: Sequence[int]) -> dict[str, tf.train.FeatureList]:
    """Boxes in MediaSequence's words, one list for each frame; all but the key frame's are empty.

    A region is a pair of a box and one of its classes; a box without a class has the class -1. What a detector of
    persons found stands under the prefix `proposal`.
    """
    regions = [
        (box, label)
        for box, labels in zip(annotation.boxes, annotation.labels, strict=True)
        for label in labels or (NO_LABEL,)
    ]
    lists = _boxes("region/bbox", [box for box, _ in regions])
    lists["region/label/index"] = _ints([label for _, label in regions])
    lists |= _boxes(f"{_PROPOSAL}/region/bbox", annotation.proposals)
    lists[f"{_PROPOSAL}/region/label/confidence"] = _floats(annotation.scores)
    columns = {
        name: tf.train.FeatureList(
            feature=[feature if number == key_frame else _emptied(feature) for number in range(len(microseconds))]
        )
        for name, feature in lists.items()
    }
    marks = [_ints([int(number == key_frame)]) for number in range(len(microseconds))]
    times = [_ints([time]) for time in microseconds]
    columns["region/is_annotated"] = tf.train.FeatureList(feature=marks)
    columns["region/timestamp"] = tf.train.FeatureList(feature=times)
    return columns


def _boxes(prefix: str, boxes: Sequence[Box]) -> dict[str, tf.train.Feature]:
    return {f"{prefix}/{name}": _floats([box[side] for box in boxes]) for side, name in enumerate(_SIDES)}


def _emptied(feature: tf.train.Feature) -> tf.train.Feature:
    return _floats(()) if feature.HasField("float_list") else _ints(())


def parse_annotation(serialized: tf.Tensor) -> ParsedAnnotation:
    """What is known of a record's key frame, in a graph or eagerly.

    Raises:
        tf.errors.InvalidArgumentError: bytes that are no record, or one without a key frame.
    """
    _, lists = tf.io.parse_single_sequence_example(serialized, {}, _REGIONS)
    marked = tf.reshape(tf.where(lists["region/is_annotated"] > 0), [-1])
    one = tf.debugging.assert_equal(tf.size(marked), 1, "a record of action detection has one key frame")
    with tf.control_dependencies([one]):
        key_frame = marked[0]

    def boxes(prefix: str) -> tf.Tensor:
        return tf.stack([lists[f"{prefix}/{name}"][key_frame] for name in _SIDES], -1)

    return ParsedAnnotation(
        key_frame,
        boxes("region/bbox"),
        lists["region/label/index"][key_frame],
        boxes(f"{_PROPOSAL}/region/bbox"),
        lists[f"{_PROPOSAL}/region/label/confidence"][key_frame],
    )


def stored_record(path: tf.Tensor, offset: tf.Tensor, length: tf.Tensor) -> tf.Tensor:
    """Returns one record of a shard, a string scalar, in a graph or eagerly; no other byte of the shard is read.

    Args:
        path: the shard, string scalar.
        offset, length: first byte and number of bytes of the record's data, as in `index.Record`, int64 scalars. Its
            header must state that length: see `check_lengths`.

    Raises:
        tf.errors.OpError: the file cannot be opened or read, or the record has another length or bytes that do not
            match its checksums. The message does not name the record.
    """
    # Only the raw operation takes the byte at which to begin: the public dataset reads every record before it, and
    # datasets of records of a fixed length verify no checksum. Without a buffer nothing past the record is read.
    variant = tf.raw_ops.TFRecordDatasetV2(
        filenames=[path],
        compression_type="",
        buffer_size=tf.constant(0, tf.int64),
        byte_offsets=[offset - HEADER_BYTES],
    )
    records = tf.data.experimental.from_variant(variant, tf.TensorSpec([], tf.string))
    record = records.take(1).get_single_element()
    found = tf.strings.length(record)
    same = tf.debugging.assert_equal(found, tf.cast(length, tf.int32), "the record has another length than is listed")
    with tf.control_dependencies([same] if same is not None else []):  # eagerly it is None
        return tf.identity(record)


def check_lengths(manifest: Manifest, split: str) -> None:
    """Compares the lengths that the headers of a split's records state with those that the manifest lists.

    TensorFlow reserves memory for what a header states, and crashes where there is not as much. `Manifest.split` must
    have found the shards complete.

    Raises:
        UserError: naming the shard, the record and both lengths.
        OSError: a shard that cannot be read.
    """
    part = manifest.splits[split]
    of_shard: dict[int, list[tuple[int, Record]]] = {}
    for number, record in enumerate(part.records):
        of_shard.setdefault(record.shard, []).append((number, record))

    def check(shard: int) -> None:
        path = manifest.folder / part.shards[shard].file
        with path.open("rb", buffering=0) as file:
            for number, record in of_shard[shard]:
                stated = _stated_length(file, record.offset)
                if stated != record.length:
                    where = f"{path}: record {number} of split {split}, at byte {record.offset}"
                    raise UserError(f"{where}: {other_length(stated, record.length)}. {how_to_verify(path)}")

    with ThreadPoolExecutor(_READERS) as threads:  # on network disks each read waits
        for _ in threads.map(check, of_shard):
            pass


def other_length(stated: int, listed: int) -> str:
    """The clause that tells that a record has another length than the manifest lists."""
    return f"its header states {stated} bytes where the manifest lists {listed}: the file was replaced"


def how_to_verify(shard: Path) -> str:
    """The sentence that names the command which lists all damage to the records of a shard's folder."""
    return f"List all damage with: python -m x3d_tf.build_records --output={shard.parent} --verify"


def stated_length(path: Path, offset: int) -> int:
    """Returns the bytes of data that the header of a record states; `offset` as in `index.Record`."""
    with path.open("rb", buffering=0) as file:
        return _stated_length(file, offset)


def _stated_length(file: FileIO, offset: int) -> int:
    return int.from_bytes(os.pread(file.fileno(), _LENGTH_BYTES, offset - HEADER_BYTES), "little")


def parse_record(serialized: tf.Tensor) -> ParsedRecord:
    """A record's content, in a graph or eagerly; no frame is decoded.

    Raises:
        tf.errors.InvalidArgumentError: bytes that are no such record.
    """
    context, lists = tf.io.parse_single_sequence_example(serialized, _CONTEXT, _FRAMES)
    return ParsedRecord(
        lists["image/encoded"],
        context["clip/label/index"],
        context["clip/label/string"],
        context["image/frame_rate"],
        context["clip/media_id"],
        serialized,
    )


def decode_frame(jpeg: tf.Tensor) -> tf.Tensor:
    """Returns the pixels of a JPEG file, uint8 [height, width, 3], in a graph or eagerly.

    Raises:
        tf.errors.InvalidArgumentError: a file that is no JPEG, or has more than `MAX_PIXELS` pixels.
    """
    shape = tf.cast(tf.io.extract_jpeg_shape(jpeg), tf.int64)  # [height, width, channels], from the header
    few = tf.debugging.assert_less_equal(shape[0] * shape[1], tf.constant(MAX_PIXELS, tf.int64), "too many pixels")
    with tf.control_dependencies([few] if few is not None else []):  # eagerly it is None
        return _decoded(jpeg)


def _decoded(jpeg: tf.Tensor) -> tf.Tensor:
    # The accurate transform is the one that other decoders use by default.
    return tf.io.decode_jpeg(jpeg, channels=3, dct_method="INTEGER_ACCURATE")


def as_stored(pixels: Pixels, stored: Storage | None) -> Pixels:
    """Returns a frame of a video as training sees it: through the JPEG file that its record would hold.

    Args:
        pixels: the frame, from `video.read_frames` with the short side that `clips.decoded_short_side` gives.
        stored: of the records that the network was trained on; where it is None, the frame stays as it is.
    """
    if stored is None:
        return pixels
    decoded: Pixels = _decoded(encode_jpeg(pixels, stored.jpeg_quality)).numpy()
    return decoded


class ShardWriter:
    """Writes a TFRecord file that appears under its name only when whole: used as a context manager.

    If the block raises, nothing is left behind.

    Raises:
        WriteError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._partial = temporary_path(path)
        with os_errors_as_write_error(path):
            self._writer = tf.io.TFRecordWriter(str(self._partial))
        self._end = 0

    def write(self, record: bytes) -> tuple[int, int]:
        """Appends a record; returns the offset and the length of its data in bytes."""
        with os_errors_as_write_error(self.path):
            self._writer.write(record)
        offset = self._end + HEADER_BYTES
        self._end = offset + len(record) + FOOTER_BYTES
        return offset, len(record)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            with suppress(tf.errors.OpError):  # where the disk is full, closing fails too
                self._writer.close()
            self._partial.unlink(missing_ok=True)
            return
        try:
            with os_errors_as_write_error(self.path):
                self._writer.close()
                with self._partial.open("rb") as file:
                    os.fsync(file.fileno())
                    self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                self._partial.replace(self.path)
        finally:
            self._partial.unlink(missing_ok=True)  # a whole file no longer has that name

    @property
    def shard(self) -> Shard:
        """The finished file, once the block has ended."""
        return Shard(self.path.name, self._end, self.sha256)


def write_split(
    folder: Path,
    split: str,
    sources: Sequence[Source],
    encoded: Iterator[EncodedVideo | VideoError],
    classes: Sequence[str],
    on_result: Callable[[EncodedVideo | VideoError], object],
) -> Split:
    """Writes the shards of a split, one after the other, holding one video at a time.

    Args:
        folder: where they go.
        split: its name.
        sources: the videos in the order in which they are to lie in the shards.
        encoded: for each source in turn its frames, or why there are none; one element is taken for each source.
        classes: names of the classes.
        on_result: called with each element taken, for progress and for the list of failures.

    Returns:
        The shards and records. A video that failed is left out, and so is a shard in which all failed.
    """
    return join_shards(
        [
            write_shard(folder / name, sources[part], encoded, classes, on_result)
            for name, part in plan_shards(split, len(sources))
        ]
    )


def write_shard(
    path: Path,
    sources: Sequence[Source],
    encoded: Iterator[EncodedVideo | VideoError],
    classes: Sequence[str],
    on_result: Callable[[EncodedVideo | VideoError], object],
) -> Split:
    """Writes one shard; arguments as `write_split`. Returns it as a split of its own, empty where all videos failed.

    Raises:
        WriteError: the file cannot be written; nothing is left behind.
    """
    written: list[Record] = []
    with ShardWriter(path) as writer:
        for source in sources:
            video = next(encoded)
            if isinstance(video, EncodedVideo):
                position = writer.write(encode_record(video, source, classes))
                frames = len(video.frames)
                written.append(Record(0, *position, frames, video.fps, source.labels, source.media_id))
            on_result(video)
    if written:
        return Split((writer.shard,), tuple(written))
    with os_errors_as_write_error(path):
        path.unlink()
    return Split((), ())


def join_shards(parts: Sequence[Split]) -> Split:
    """One split of the shards of several, in their order."""
    shards: list[Shard] = []
    records: list[Record] = []
    for part in parts:
        records += [record._replace(shard=record.shard + len(shards)) for record in part.records]
        shards += part.shards
    return Split(tuple(shards), tuple(records))


def fault_of(path: Path, offset: int, length: int, size: int) -> str:
    """Finds why a record could not be read, by reading it again outside of the graph.

    Args:
        path: the shard.
        offset, length: of the record's data in bytes, as in the manifest.
        size: of the shard in bytes, as in the manifest.

    Returns:
        The cause, a clause without a full stop.
    """
    try:
        if not path.exists():
            return "the file does not exist"
        if not path.is_file():
            return "this is not a file"
        found = path.stat().st_size
    except OSError as error:
        return f"reading fails: {error.strerror}"
    if found != size:
        return f"the file has {found} bytes where the manifest lists {size}: it was truncated or replaced"
    try:
        stated = stated_length(path, offset)
        if stated != length:
            return other_length(stated, length)
        serialized = stored_record(tf.constant(os.fsencode(path)), *tf.constant([offset, length], tf.int64))
    except OSError as error:
        return f"reading fails: {error.strerror}"
    except tf.errors.DataLossError:
        return "its bytes do not match their checksum"
    except tf.errors.OpError as error:
        return f"reading fails: {error.message.rpartition('; ')[2]}"
    try:
        parsed = parse_record(serialized)
    except tf.errors.InvalidArgumentError:
        return "its bytes hold no video"
    for number, jpeg in enumerate(parsed.frames):
        try:
            decode_frame(jpeg)
        except tf.errors.InvalidArgumentError:
            return f"frame {number} is no JPEG image of at most {MAX_PIXELS} pixels"
    return "its labels, name or boxes are not those that the manifest lists, or reading failed for a moment only"


def _ints(values: Sequence[int]) -> tf.train.Feature:
    return tf.train.Feature(int64_list=tf.train.Int64List(value=values))


def _floats(values: Sequence[float]) -> tf.train.Feature:
    return tf.train.Feature(float_list=tf.train.FloatList(value=values))


def _bytes(values: Sequence[bytes]) -> tf.train.Feature:
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))

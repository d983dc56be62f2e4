"""Size and load time of a large manifest: 240,000 synthetic records, as many as Kinetics-400 has videos.

CPU time is that of one thread of `Manifest.load`, which parses, verifies the checksum and checks every value. With
`--key_frames` the records are key frames of films, as in AVA.

  python benchmarks/manifest.py --records=240000 --rounds=5
"""

import argparse
import random
import string
import tempfile
import time
from pathlib import Path

from x3d_tf.data.records.index import VIDEOS_PER_SHARD, KeyFrameInfo, Record, Shard, Split, shard_name
from x3d_tf.data.records.manifest import MANIFEST_NAME, Manifest
from x3d_tf.types import Storage

CLASSES = 400
FIRST_SECOND, SECONDS = 902, 897  # key frames of a film of AVA


def manifest(folder: Path, count: int, key_frames: bool) -> Manifest:
    """Returns a manifest whose names, lengths and labels are random."""
    rng = random.Random(0)
    letters = string.ascii_letters + string.digits + "-_"
    names = ["".join(rng.choices(letters, k=11)) for _ in range(count)]
    shards, records = [], []
    total = -(-count // VIDEOS_PER_SHARD)
    for shard in range(total):
        offset = 12
        for number in range(shard * VIDEOS_PER_SHARD, min((shard + 1) * VIDEOS_PER_SHARD, count)):
            length = rng.randrange(7_000_000, 8_000_000)
            video = names[number // SECONDS] if key_frames else f"{names[number]}.mp4"
            second = FIRST_SECOND + number % SECONDS if key_frames else None
            labels = (rng.randrange(CLASSES),)
            records.append(Record(shard, offset, length, 300, 30.0, labels, video, key_frame=second))
            offset += length + 16
        shards.append(Shard(shard_name("train", shard, total), offset - 12, f"{rng.getrandbits(256):064x}"))
    names_of_classes = tuple(f"class {number}" for number in range(CLASSES))
    splits = {"train": Split(tuple(shards), tuple(records), count)}
    info = KeyFrameInfo(1.5, 900.0, None, ("train",), {"train": count}) if key_frames else None
    task = "detection" if key_frames else "single_label"
    return Manifest(folder, "synthetic", names_of_classes, splits, {"seed": 0}, Storage(256, 95), task, info)  # type: ignore[arg-type]


def main() -> None:
    """Prints the size and the times of each round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=240_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--key_frames", action="store_true")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        manifest(Path(folder), chosen.records, chosen.key_frames).save()
        print(f"{chosen.records} records, {(Path(folder) / MANIFEST_NAME).stat().st_size / 1e6:.1f} MB")
        for _ in range(chosen.rounds):
            cpu, wall = time.process_time(), time.perf_counter()
            Manifest.load(folder)
            print(
                f"CPU time {time.process_time() - cpu:.2f} s, wall time {time.perf_counter() - wall:.2f} s", flush=True
            )


if __name__ == "__main__":
    main()

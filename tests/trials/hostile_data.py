"""Reads hostile csv files, label maps, manifests and videos.

csv files, label maps and manifests are read in a worker process; each must be accepted or rejected in one line, within
seconds. Bad videos are mixed with good ones: building and predicting must finish, name each bad file and process all
good ones. --count random mutants of each kind follow the named cases.

  python tests/trials/hostile_data.py --count=200 --seed=0
  python tests/trials/hostile_data.py --only=video       # or csv, boxes, label map or manifest
"""

import csv
import json
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from harness import (
    Broke,
    Report,
    Worker,
    arguments,
    damaged,
    make_records,
    make_videos,
    outcome_of,
    run,
    save_model,
    scratch,
    succeeded,
)

TABLE = "path,label,split,start,end\n" + "".join(f"{n}.mp4,class {n % 3},train,0.5,{n + 1}\n" for n in range(20))
BOXES = "".join(f"video{n},{902 + n},0.1,0.2,0.5,0.6,{n % 80 + 1},{n}\n" for n in range(20))
LABEL_MAP = "".join(f'item {{\n  name: "action {n}"\n  id: {n}\n}}\n' for n in range(1, 21))
GOOD = {"csv": TABLE, "boxes": BOXES, "label map": LABEL_MAP}

TEXTS: dict[str, dict[str, str | bytes]] = {
    "csv": {
        "nothing": "",
        "no columns": "\n\n",
        "a quote without an end": 'path,label\n"a,b\n' + "c,d\n" * 1000,
        "a field of 10 MB": "path,label\n" + "a" * 10_000_000 + ",b\n",
        "100,000 columns": ",".join(f"c{n}" for n in range(100_000)) + "\n",
        "a time of 10,000 digits": f"path,label,start\na,b,{'9' * 10_000}\n",
        "a time that is NaN": "path,label,start\na,b,nan\n",
        "a time that is infinite": "path,label,end\na,b,inf\n",
        "a time of -1": "path,label,start\na,b,-1\n",
        "zero bytes": b"path,label\na\0b,c\n",
        "invalid UTF-8": b"path,label\n\xff\xfe,b\n",
        "UTF-16": "path,label\na,b\n".encode("utf-16"),
        "escapes": "path,label\na,b\x1b[2J\n",
        "a class with a line break": 'path,label\na,"b\nc"\n',
        "a path to a parent folder": "path,label\n../../../../etc/passwd,b\n",
        "100,000 classes": "path,label\n" + "".join(f"a{n},b{n}\n" for n in range(100_000)),
        "a million labels for one video": "path,label\na," + ";".join(map(str, range(1_000_000))) + "\n",
    },
    "boxes": {
        "nothing": "",
        "a quote without an end": '"video,902,0,0,1,1,1,1\n' + BOXES * 100,
        "a field of 10 MB": "v" * 10_000_000 + ",902,0,0,1,1,1,1\n",
        "an action of 10,000 digits": f"v,902,0,0,1,1,{'9' * 10_000},1\n",
        "a second of 10,000 digits": f"v,{'9' * 10_000},0,0,1,1,1,1\n",
        "coordinates that are NaN": "v,902,nan,nan,nan,nan,1,1\n",
        "coordinates that are infinite": "v,902,-inf,0,inf,1,1,1\n",
        "a path for a name": "../../etc/passwd,902,0,0,1,1,1,1\n",
        "escapes": "v\x1b[2J,902,0,0,1,1,1\n",
        "zero bytes": b"v\0,902,0,0,1,1,1,1\n",
        "200,000 rows": "".join(f"v{n},902,0.1,0.1,0.5,0.5,1,{n}\n" for n in range(200_000)),
    },
    "label map": {
        "nothing": "",
        "an id of 5,000 digits": f'item {{ name: "a" id: {"9" * 5000} }}',
        "an id of -5,000 digits": f'item {{ name: "a" id: -{"9" * 5000} }}',
        "100,000 items": "".join(f'item {{ name: "a{n}" id: {n} }}\n' for n in range(1, 100_001)),
        "an item without an end": "item { " + 'name: "a" ' * 200_000,
        "a brace in a brace": "item { " * 100_000,
        "quotes": 'item { name: "' + "\\" * 200_000,
        "many quotes": "item { " + "\"'" * 200_000 + " }",
        "a name of 10 MB": f'item {{ name: "{"a" * 10_000_000}" id: 1 }}',
        "spaces": " " * 5_000_000 + "x",
        "escapes": 'item { name: "a\x1b[2J" id: 1 }',
        "a line break in a name": 'item { name: "a\\nb" id: 1 }',
        "invalid UTF-8": b'item { name: "\xff" id: 1 }',
        "comments": "# x\n" * 500_000,
    },
}


def text_reader(kind: str) -> Callable[[str], tuple[str, str]]:
    """Returns a function that reads a file of this kind and returns its size; runs in the worker."""
    from x3d_tf.data.ava_files import read_boxes, read_label_map
    from x3d_tf.data.datasets.csv import read_csv

    def read(path: str) -> str:
        if kind == "csv":
            return str({name: len(videos) for name, videos in read_csv(Path(path)).splits.items()})
        return str(len(read_boxes(path, "ground truth", None) if kind == "boxes" else read_label_map(path)))

    return lambda path: outcome_of(lambda: read(path))


def try_texts(report: Report, folder: Path) -> None:
    """Reads the named texts and mutants of each kind."""
    for kind, named in TEXTS.items():
        if report.chosen.only and kind not in report.chosen.only and report.chosen.only not in kind:
            continue
        reader = Worker(text_reader, kind, seconds=20, megabytes=1500)
        cases = [(name, text if isinstance(text, bytes) else text.encode()) for name, text in named.items()]
        for number in range(report.chosen.count):
            rng = random.Random(f"{report.chosen.seed}/{kind}/{number}")
            description, content = damaged(GOOD[kind].encode(), rng.choice(("flip", "cut")), rng)
            cases.append((f"mutant {number}, {description}", content))
        for name, content in cases:
            path = folder / f"{kind.replace(' ', '_')}.txt"
            path.write_bytes(content)
            report.add(f"{kind}: {name}", _one_line(report, reader, str(path)))
        reader.close()


def _one_line(report: Report, reader: Worker, path: str) -> str | None:
    """Returns a message if a file was neither read nor rejected in one line, or None."""
    try:
        kind, text = reader.ask(path)
    except Broke as error:
        return f"the reader {error}"
    if kind == "breaks":
        return f"ends in a traceback: {text}"
    report.note("rejected files" if kind == "refuses" else "accepted files")
    if kind == "refuses" and ("\n" in text or not text.isprintable() or len(text) > 3000):
        return f"the error is not one printable line: {len(text)} characters, {text[:150]!r}"
    return None


# ---- Manifests


def manifest_reader(_: str) -> Callable[[str], tuple[str, str]]:
    from x3d_tf.data.records.manifest import Manifest
    from x3d_tf.data.records.verify import verify_records

    def read(folder: str) -> str:
        manifest = Manifest.load(folder)
        parts = [manifest.split(name) for name in manifest.splits]
        problems = [problem for report in verify_records(folder, progress=False) for problem in report.problems]
        if problems:
            raise OSError(problems[0])
        return f"{len(parts)} splits"

    return lambda folder: outcome_of(lambda: read(folder))


def manifest_edits(content: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields manual and hostile edits of a manifest, all of which must be rejected."""

    def edit(change: Callable[[dict[str, Any]], Any]) -> Any:
        copy = json.loads(json.dumps(content))
        change(copy)
        return copy

    def rows(copy: dict[str, Any], change: Callable[[list[Any]], Any]) -> None:
        split = copy["splits"]["train"]
        for column in split["records"].values():
            change(column)
        split["count"] = len(next(iter(split["records"].values())))

    def swap(column: list[Any]) -> None:
        column[0], column[2] = column[2], column[0]  # same class: classes alternate

    yield "classes rotated", edit(lambda copy: copy["classes"].append(copy["classes"].pop(0)))
    yield "a record dropped", edit(lambda copy: rows(copy, lambda column: column.pop()))
    yield "a record doubled", edit(lambda copy: rows(copy, lambda column: column.append(column[0])))
    yield "two records of a class swapped", edit(lambda copy: rows(copy, swap))
    yield "the names of two records swapped", edit(lambda copy: swap(copy["splits"]["train"]["records"]["video"]))
    yield (
        "splits swapped",
        edit(lambda copy: copy.update(splits=dict(zip(copy["splits"], [*copy["splits"].values()][::-1])))),
    )
    yield "a rate changed", edit(lambda copy: copy["splits"]["train"]["records"]["fps"].__setitem__(0, 15.0))
    yield "fewer frames", edit(lambda copy: copy["splits"]["train"]["records"]["frames"].__setitem__(0, 5))
    yield "a class renamed", edit(lambda copy: copy["classes"].__setitem__(0, "x"))
    yield "a class with a line break", edit(lambda copy: copy["classes"].__setitem__(0, "x\ny"))
    yield "a class with escapes", edit(lambda copy: copy["classes"].__setitem__(0, "\x1b[2J"))
    yield "settings changed", edit(lambda copy: copy["settings"].update(source="other"))
    yield "another task", edit(lambda copy: copy.update(task="multi_label"))
    yield "a shard above", edit(lambda copy: copy["splits"]["train"]["shards"][0].update(file="../../etc/passwd"))
    yield "a shard that is a device", edit(lambda copy: copy["splits"]["train"]["shards"][0].update(file="/dev/zero"))
    yield "a length of 2^62", edit(lambda copy: copy["splits"]["train"]["records"]["length"].__setitem__(0, 2**62))
    yield "an offset of -1", edit(lambda copy: copy["splits"]["train"]["records"]["offset"].__setitem__(0, -1))
    yield "frames of 2^62", edit(lambda copy: copy["splits"]["train"]["records"]["frames"].__setitem__(0, 2**62))
    yield "a rate of NaN", edit(lambda copy: copy["splits"]["train"]["records"]["fps"].__setitem__(0, float("nan")))
    yield "no records", edit(lambda copy: copy["splits"]["train"].pop("records"))
    yield "no classes", edit(lambda copy: copy.update(classes=[]))
    yield "no splits", edit(lambda copy: copy.update(splits={}))
    yield "a list", []


def try_manifests(report: Report, folder: Path) -> None:
    """Reads edited manifests of unchanged records."""
    if report.chosen.only not in "manifest":
        return
    records = make_records(folder / "records")
    path = records / "manifest.json"
    content = path.read_bytes()
    reader = Worker(manifest_reader, "", seconds=20, megabytes=2000)
    edits = [(name, json.dumps(edited).encode()) for name, edited in manifest_edits(json.loads(content))]
    for name, edited_text in [*edits, ("deep nesting", b"[" * 1_000_000), ("a number of 10,000 digits", b"9" * 10_000)]:
        path.write_bytes(edited_text)
        try:
            kind, text = reader.ask(str(records))
            bad = kind != "refuses" or "\n" in text or not text.isprintable()
            report.add(f"manifest: {name}", f"{kind}: {text[:200]!r}" if bad else None)
        except Broke as error:
            report.add(f"manifest: {name}", f"the reader {error}")
    path.write_bytes(content)
    reader.close()


# ---- Videos


def bad_videos(folder: Path, good: bytes, count: int, seed: int) -> None:
    """Writes files that are not videos, and damaged videos, to a class folder."""
    folder.mkdir(parents=True)
    for name, content in {
        "empty": b"",
        "text": b"no video\n" * 100,
        "zeros": bytes(100_000),
        "header alone": good[:40],
        "list of files": b"ffconcat version 1.0\nfile /etc/passwd\n",
        "playlist": b"#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:10,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        "picture of 65535 x 65535": b"GIF89a\xff\xff\xff\xff\x80\x00\x00"
        + bytes(6)
        + b",\0\0\0\0\xff\xff\xff\xff\0\x02\x02L\x01\0;",
        "subtitles": b"1\n00:00:00,000 --> 99:59:59,000\nx\n",
        "escapes \x1b[2J": b"no video",
    }.items():
        (folder / f"{name}.mp4").write_bytes(content)
    (folder / "loop.mp4").symlink_to("loop.mp4")
    (folder / "nowhere.mp4").symlink_to("missing.mp4")
    for number in range(count):
        rng = random.Random(f"{seed}/video/{number}")
        content = good
        for _ in range(rng.randint(1, 20)):
            _, content = damaged(content, "flip", rng)
        if rng.random() < 0.5:
            _, content = damaged(content, "cut", rng)
        (folder / f"mutant {number:04d}.mp4").write_bytes(content)


def try_videos(report: Report, folder: Path) -> None:
    """Builds and predicts good videos mixed with bad ones, and predicts folders, pipes and devices."""
    if report.chosen.only not in "video":
        return
    videos = make_videos(folder / "videos", 4)
    originals = sorted(videos.rglob("*.mp4"))
    bad_videos(videos / "split0" / "bad", originals[0].read_bytes(), report.chosen.count, report.chosen.seed)
    seconds, limits = 300.0, dict[str, Any](folder=folder, megabytes=4000.0)
    words = (
        f"--videos={videos / 'split0'}",
        f"--output={folder / 'out'}",
        "--split=0.3",
        "--short_side=32",
        "--workers=2",
    )
    ended = run("x3d_tf.build_records", *words, seconds=seconds, **limits)
    problem = succeeded(ended)
    if problem is None:
        rows = list(csv.DictReader((folder / "out" / "failures.csv").open(newline="", encoding="utf-8")))
        report.notes["videos rejected by building"] = len(rows)
        unnamed = [row for row in rows if not row["reason"].strip() or "\n" in row["reason"]]
        problem = f"missing or multi-line reasons: {unnamed[:3]}" if unnamed else None
    report.add("video: building among bad ones", problem)

    model = save_model(folder / "model.keras")
    words = (f"--model={model}", f"--csv={folder / 'out.csv'}", str(videos / "split0"))
    ended = run("x3d_tf.predict", *words, seconds=seconds, **limits)
    report.add("video: predicting among bad ones", _predicted(report, ended, folder / "out.csv", originals))

    pipe, endless = folder / "pipe.mp4", folder / "endless.mp4"
    os.mkfifo(pipe)
    endless.symlink_to("/dev/zero")
    (folder / "folder.mp4").mkdir()
    threading.Thread(target=_feed, args=(pipe,), daemon=True).start()
    for path in (pipe, endless, folder / "folder.mp4", folder / "missing.mp4"):
        ended = run("x3d_tf.predict", f"--model={model}", str(path), seconds=90, **limits)
        bad = ended.broke or ended.status != 1 or "Traceback" in ended.err
        report.add(
            f"video: predicting {path.name}", f"{ended.broke} {ended.status}: {ended.last[:200]}" if bad else None
        )
    _odd_class_folders(report, folder, originals[0].read_bytes())


def _predicted(report: Report, ended: Any, table: Path, originals: list[Path]) -> str | None:
    """Returns a message unless the exit status is 1 and all good videos are predicted, or None."""
    if ended.broke or ended.status != 1 or "Traceback" in ended.err:
        return f"{ended.broke} exit status {ended.status}, not 1: {ended.last[:200]}"
    if "\x1b[2J" in ended.err + ended.out:
        return "control characters of a file's name reach the terminal"
    rows = {row["video"]: row for row in csv.DictReader(table.open(newline="", encoding="utf-8"))}
    report.notes["videos rejected by predicting"] = sum(bool(row["error"]) for row in rows.values())
    failed = [str(path) for path in originals if str(path) not in rows or rows[str(path)]["error"]]
    return f"good videos were not predicted: {failed}" if failed else None


def _feed(pipe: Path) -> None:
    """Writes to a pipe for as long as it has a reader."""
    try:
        with pipe.open("wb") as file:
            while True:
                file.write(bytes(65536))
    except OSError:
        pass


def _odd_class_folders(report: Report, folder: Path, good: bytes) -> None:
    """Builds class folders whose names would shift the lines of labels.txt or send escapes to the terminal."""
    for number, name in enumerate(("a\nb", "a\rb", "a\u2028b", "a\x1b[2Jb")):
        videos = folder / f"odd{number}"
        for label in (name, "fine"):
            (videos / label).mkdir(parents=True)
            (videos / label / "0.mp4").write_bytes(good)
        words = (f"--videos={videos}", f"--output={folder / f'odd_out{number}'}", "--short_side=32")
        ended = run("x3d_tf.build_records", *words, folder=folder, seconds=90)
        shown = "\x1b[2J" in ended.err + ended.out
        refuses = ended.status == 1 and ended.last.startswith("error: ")
        bad = shown or not (refuses or (name == "a\x1b[2Jb" and ended.status == 0))
        report.add(f"video: class {name!r}", f"exit status {ended.status}, escapes shown: {shown}" if bad else None)


def main() -> None:
    """Runs the trials."""
    report = Report("hostile_data", arguments(__doc__ or "", count=200))
    with scratch() as folder:
        try_texts(report, folder)
        try_manifests(report, folder)
        try_videos(report, folder)
    report.close()


if __name__ == "__main__":
    main()

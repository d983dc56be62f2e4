"""The folder of a run: which files it holds, and whether a configuration may go on in it. Imports no TensorFlow."""

import csv
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from x3d_tf import csv_files
from x3d_tf.config import TrainConfig
from x3d_tf.errors import UserError
from x3d_tf.files import SMALL, atomic_write, os_errors_as_write_error, read_limited, temporary_path
from x3d_tf.locks import locked

# the last two only in the rows of steps that were validated
HISTORY_FIELDS = (
    "step",
    "epoch",
    "learning_rate",
    "loss",
    "accuracy",
    "clips_per_second",
    "validation_accuracy",
    "validation_loss",
    "boxes_left_out",
)
_OPTIONAL_FIELDS = HISTORY_FIELDS[-3:]
_LARGEST = 1e100  # of a value of the history
_INDEX = re.compile(r"ckpt-(0|[1-9][0-9]{0,17})\.index", re.ASCII)
_TRAINED = (
    "A checkpoint of this run has been written, so that training does not start again from step 0 where the "
    "checkpoints are missing.\n"
)


def checkpoint_step(name: str) -> int | None:
    """The step of the checkpoint that a file is the index of; None for other names."""
    match = _INDEX.fullmatch(name)
    return int(match[1]) if match else None


class RunFolder:
    """Paths and small files of a run.

    Holds `config.json` (every setting), `config.gin` and `operative_config.gin` (the same as gin text, for people)
    and `preview.png`, the first clips as the network gets them, before the first step; `checkpoints/`, `history.csv`,
    `curves.png` and `tensorboard/` while it trains;
    `best.keras`, the network of the best validation, where the run stops early; `model.keras`, `labels.txt`,
    `input.json` (what the model is to be fed) and `evaluation/` when it is done. `trained.txt` says that a checkpoint
    has been written, `.lock` which process trains.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.config = self.root / "config.json"
        self.checkpoints = self.root / "checkpoints"
        self.history = self.root / "history.csv"
        self.curves = self.root / "curves.png"
        self.preview = self.root / "preview.png"
        self.tensorboard = self.root / "tensorboard"
        self.best = self.root / "best.keras"
        self.model = self.root / "model.keras"
        self.labels = self.root / "labels.txt"
        self.input = self.root / "input.json"
        self.evaluations = self.root / "evaluation"
        self.trained = self.root / "trained.txt"
        self.lock = self.root / ".lock"

    @contextmanager
    def training(self) -> Iterator[None]:
        """Makes the folder and keeps other processes from training in it within the block.

        Raises:
            UserError: another process trains in it, or it holds something else than a run.
            WriteError: it cannot be written.
        """
        self._refuse_foreign()
        with os_errors_as_write_error(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
        conflict = f"another process is training in {self.root}"
        with locked(self.lock, conflict, "wait for it, or choose another --workdir"):
            yield

    def open(self, config: TrainConfig, texts: Mapping[str, str]) -> None:
        """Makes the folder for a new run, or finds that it is of the same one.

        Args:
            config: what is to be trained.
            texts: further files to keep, by name.

        Raises:
            UserError: the folder is of a run with other settings (names them) that has got to a checkpoint, or of one
                whose checkpoints are missing, or holds something else.
        """
        if self.check(config):
            return
        if self.config.is_file():
            for path in (self.history, self.preview):  # of a run that never came to a checkpoint
                path.unlink(missing_ok=True)
        self.root.mkdir(parents=True, exist_ok=True)
        atomic_write(self.config, config.to_json().encode())  # a folder that has it is a run's
        for name, text in texts.items():
            atomic_write(self.root / name, text.encode())

    def check(self, config: TrainConfig) -> bool:
        """Whether the folder is of this run, which has got to a checkpoint; writes nothing.

        Raises:
            UserError: see `open`.
        """
        self._refuse_foreign()
        if not self.config.is_file():
            return False
        if self.model.is_file() or self.has_checkpoint:
            self._compare(self.read_config(), config)
            return True
        self._refuse_lost_checkpoints()
        return False

    def read_config(self) -> TrainConfig:
        """The configuration of the run.

        Raises:
            UserError: the folder is not of a run, or its configuration is damaged.
        """
        if not self.config.is_file():
            raise UserError(f"{self.root} is not the folder of a run: it has no {self.config.name}")
        try:
            return TrainConfig.from_json(read_limited(self.config, SMALL).decode())
        except (UserError, UnicodeDecodeError) as error:
            raise UserError(f"{self.config}: {error}") from error

    def keep_places(self, config: TrainConfig) -> None:
        """Replaces `config.json` where the configuration in use names other places than it, so that tests find them."""
        if self.read_config() != config:
            atomic_write(self.config, config.to_json().encode())

    def mark_trained(self) -> None:
        """Notes that there is a checkpoint."""
        if not self.trained.is_file():
            atomic_write(self.trained, _TRAINED.encode())

    def _refuse_foreign(self) -> None:
        own = {temporary_path(self.config), self.lock}
        foreign = not self.root.is_dir() or (not self.config.is_file() and set(self.root.iterdir()) - own)
        if self.root.exists() and foreign:
            raise UserError(f"{self.root} exists and is not the folder of a run; choose another --workdir")
        links = [path for path in (self.root.iterdir() if self.root.exists() else ()) if path.is_symlink()]
        for path in links:
            if not path.is_dir():  # of somebody else's making, it may lead training to any file
                raise UserError(
                    f"{path} is a link, which training could write through; remove it or put the file there"
                )

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint to resume from, intact or not."""
        listed = self.checkpoints.iterdir() if self.checkpoints.is_dir() else ()
        return any(checkpoint_step(path.name) is not None for path in listed)

    def _refuse_lost_checkpoints(self) -> None:
        """Raises where there was a checkpoint, though there is none now.

        `trained.txt` is written as soon as the first checkpoint is complete, so a run that was killed before that has
        none and starts again without questions. Where the file is missing, too, what is only made after a checkpoint
        stands in for it: the curves, and the best network.
        """
        found = next((path for path in (self.trained, self.curves, self.best) if path.is_file()), None)
        if found is None:
            return
        rows = self.read_history()
        steps = f" to step {int(rows[-1]['step'])}" if rows else ""
        raise UserError(
            f"{self.root} has been trained{steps}, as {found.name} shows, but {self.checkpoints} holds no complete "
            "checkpoint (ckpt-*.index with its ckpt-*.data). Restore that folder from a copy, choose another "
            f"--workdir, or delete {self.root} to train from scratch"
        )

    def _compare(self, there: TrainConfig, wanted: TrainConfig) -> None:
        theirs, ours = there.outcome_settings(), wanted.outcome_settings()
        differing = [
            f"{name} is {theirs[name]!r} there and {ours[name]!r} here" for name in ours if theirs[name] != ours[name]
        ]
        if differing:
            advice = "Give this run a folder of its own with --workdir"
            if self.model.is_file():
                advice += (
                    f". The run in {self.root} is finished; to train its network further, start the new one from it: "
                    f"--gin_bindings='TrainConfig.init=\"{self.root}\"'"
                )
            raise UserError(f"{self.root} is of a run with other settings: {'; '.join(differing)}. {advice}")

    def read_history(self) -> list[dict[str, float]]:
        """The rows of `history.csv` up to the first that is damaged, with a warning; none before the first."""
        rows: list[dict[str, float]] = []
        if not self.history.is_file():
            return rows
        with self.history.open(newline="", encoding="utf-8", errors="replace") as file:
            try:
                for row in csv_files.dicts(file):
                    rows.append(_history_row(row))
            except (KeyError, ValueError, csv.Error):  # a row that was cut off when the run was killed, or edited
                print(
                    f"warning: {self.history} is damaged after row {len(rows)}; the rest is left out", file=sys.stderr
                )
        return rows

    def write_history(self, rows: list[dict[str, float]]) -> None:
        """Replaces `history.csv`."""
        atomic_write(self.history, csv_files.encoded([HISTORY_FIELDS, *map(_history_cells, rows)]))

    def append_history(self, row: dict[str, float]) -> None:
        """Adds a row to `history.csv`, which has been written."""
        with os_errors_as_write_error(self.history), self.history.open("a", newline="", encoding="utf-8") as file:
            csv_files.Writer(file).row(_history_cells(row))


def _history_row(cells: Mapping[str, str]) -> dict[str, float]:
    """The values of a row; raises KeyError or ValueError unless they are numbers that can be drawn."""
    names = [name for name in HISTORY_FIELDS if name not in _OPTIONAL_FIELDS or cells.get(name)]
    row = {name: float(cells[name]) for name in names}
    if not all(abs(value) <= _LARGEST for value in row.values()):  # also of NaN
        raise ValueError
    return row


def _history_cells(row: dict[str, float]) -> list[float | str]:
    counts = {name: int(row[name]) for name in ("step", "boxes_left_out") if name in row}
    return [(row | counts).get(name, "") for name in HISTORY_FIELDS]

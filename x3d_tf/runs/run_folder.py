"""The folder of a run: which files it holds, and whether a configuration may go on in it. Imports no TensorFlow."""

import math
from collections.abc import Mapping
from pathlib import Path

from x3d_tf import _csv
from x3d_tf._checks import UserError
from x3d_tf._files import partial_of, write_whole, writing
from x3d_tf.runs.recipe import TrainConfig

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


class RunFolder:
    """Paths and small files of a run.

    Holds `config.json` (every setting), `config.gin` and `operative_config.gin` (the same as gin text, for people)
    and `preview.png`, the first clips as the network gets them, before the first step; `checkpoints/`, `history.csv`,
    `curves.png` and `tensorboard/` while it trains;
    `best.keras`, the network of the best validation, where the run stops early; `model.keras`, `labels.txt`,
    `input.json` (what the model is to be fed) and `evaluation/` when it is done.
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

    def open(self, config: TrainConfig, texts: Mapping[str, str]) -> None:
        """Makes the folder for a new run, or finds that it is of the same one.

        Args:
            config: what is to be trained.
            texts: further files to keep, by name.

        Raises:
            UserError: the folder is of a run with other settings (names them) that has got to a checkpoint, or holds
                something else.
        """
        if self.config.is_file():
            if self.model.is_file() or any(self.checkpoints.glob("ckpt-*.index")):
                self._compare(self.read_config(), config)
                return
            for path in (self.history, self.preview, self.best):  # of a run that never came to a checkpoint
                path.unlink(missing_ok=True)
        elif self.root.exists() and (not self.root.is_dir() or set(self.root.iterdir()) - {partial_of(self.config)}):
            raise UserError(f"{self.root} exists and is not the folder of a run; choose another --workdir")
        self.root.mkdir(parents=True, exist_ok=True)
        write_whole(self.config, config.to_json().encode())  # a folder that has it is a run's
        for name, text in texts.items():
            write_whole(self.root / name, text.encode())

    def read_config(self) -> TrainConfig:
        """The configuration of the run.

        Raises:
            UserError: the folder is not of a run, or its configuration is damaged.
        """
        if not self.config.is_file():
            raise UserError(f"{self.root} is not the folder of a run: it has no {self.config.name}")
        try:
            return TrainConfig.from_json(self.config.read_text(encoding="utf-8"))
        except (UserError, UnicodeDecodeError) as error:
            raise UserError(f"{self.config}: {error}") from error

    def _compare(self, there: TrainConfig, wanted: TrainConfig) -> None:
        theirs, ours = there.settings(), wanted.settings()
        differing = [
            f"{name} is {theirs[name]!r} there and {ours[name]!r} here" for name in ours if theirs[name] != ours[name]
        ]
        if differing:
            raise UserError(
                f"{self.root} is of a run with other settings: {'; '.join(differing)}. Give this run a folder of its "
                "own with --workdir"
            )

    def read_history(self) -> list[dict[str, float]]:
        """The rows of `history.csv`; none before the first."""
        if not self.history.is_file():
            return []
        rows = []
        with self.history.open(newline="", encoding="utf-8") as file:
            for row in _csv.dicts(file):
                try:
                    measured = {name: float(row[name]) for name in HISTORY_FIELDS if name not in _OPTIONAL_FIELDS}
                    optional = {name: float(row[name]) for name in _OPTIONAL_FIELDS if row.get(name)}
                    if not math.isfinite(measured["step"]):
                        break
                except (KeyError, ValueError):  # a row that was cut off when the run was killed
                    break
                rows.append(measured | optional)
        return rows

    def write_history(self, rows: list[dict[str, float]]) -> None:
        """Replaces `history.csv`."""
        write_whole(self.history, _csv.encoded([HISTORY_FIELDS, *map(_history_cells, rows)]))

    def append_history(self, row: dict[str, float]) -> None:
        """Adds a row to `history.csv`, which has been written."""
        with writing(self.history), self.history.open("a", newline="", encoding="utf-8") as file:
            _csv.Writer(file).row(_history_cells(row))


def _history_cells(row: dict[str, float]) -> list[float | str]:
    counts = {name: int(row[name]) for name in ("step", "boxes_left_out") if name in row}
    return [(row | counts).get(name, "") for name in HISTORY_FIELDS]

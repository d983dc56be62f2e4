"""The run folder: its files, and the check that a run with the same settings resumes in it. Imports no TensorFlow."""

import csv
import json
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from x3d_tf import csv_files
from x3d_tf.config import TrainConfig
from x3d_tf.data.datasets.spec import with_default_splits
from x3d_tf.errors import UserError, require
from x3d_tf.files import SMALL, atomic_write, os_errors_as_write_error, read_limited, temporary_path
from x3d_tf.locks import locked

HISTORY_FIELDS = ("step", "epoch", "learning_rate", "loss", "clips_per_second")  # in every row of history.csv
RECIPE_FIELDS = ("gin_files", "changed_settings")  # of recipe.json
_MOST_NAMES, _LONGEST_NAME = 10_000, 4096  # in recipe.json; the names of a command are fewer and shorter
_LARGEST = 1e100  # largest absolute value accepted in history.csv
_INDEX = re.compile(r"ckpt-(0|[1-9][0-9]{0,17})\.index", re.ASCII)
_TRAINED = (
    "This run has written a checkpoint. If its checkpoints go missing, this file prevents training from silently "
    "starting again at step 0.\n"
)


def names_from_json(value: Any, where: str) -> list[str]:
    """Returns untrusted names of files or settings; raises `UserError` unless they are few and short."""
    valid = isinstance(value, list) and len(value) <= _MOST_NAMES
    require(valid, where, f"be a list of at most {_MOST_NAMES} names", value)
    for name in value:
        valid = isinstance(name, str) and 0 < len(name) <= _LONGEST_NAME
        require(valid, where, f"be names of 1 to {_LONGEST_NAME} characters", name)
    return list(value)


def checkpoint_step(name: str) -> int | None:
    """Returns the step of a checkpoint from the name of its index file; None for other file names."""
    match = _INDEX.fullmatch(name)
    return int(match[1]) if match else None


class RunFolder:
    """Paths and small files of a run.

    Before the first step: `config.json` (all settings), `config.gin` and `operative_config.gin` (the same as gin text,
    for reading), `recipe.json` (names of the gin files and of the settings changed after them), `records.sha256`
    (fingerprint of the manifest of the records) and `preview.png` (the first training clips as the network sees them).

    During training: `checkpoints/`, `history.csv`, `curves.png`, `tensorboard/`, `trained.txt` (marks that a checkpoint
    was written), `.lock` (the process that trains), and with early stopping `best.keras` (the best network so far).

    After training: `model.keras`, `labels.txt`, `input.json` (the input format of the model) and `evaluation/`.
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
        self.fingerprint = self.root / "records.sha256"
        self.recipe = self.root / "recipe.json"
        self.labels = self.root / "labels.txt"
        self.input = self.root / "input.json"
        self.evaluations = self.root / "evaluation"
        self.trained = self.root / "trained.txt"
        self.lock = self.root / ".lock"

    @contextmanager
    def training(self) -> Iterator[None]:
        """Creates the folder and locks it against other processes for the duration of the block.

        Raises:
            UserError: another process trains in the folder, or it exists and is not a run folder.
            WriteError: the folder cannot be written to.
        """
        self._require_run_folder()
        with os_errors_as_write_error(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
        conflict = f"another process is training in {self.root}"
        with locked(self.lock, conflict, "wait for it, or choose another --workdir"):
            yield

    def open(self, config: TrainConfig, texts: Mapping[str, str]) -> None:
        """Creates the folder for a new run, or checks that it belongs to a run with the same settings.

        A run that was interrupted before its first checkpoint is replaced.

        Args:
            config: the configuration to train.
            texts: contents of additional files to write, by name.

        Raises:
            UserError: the folder has checkpoints of a run with other settings (the message lists them), its checkpoints
                are missing, or it is not a run folder.
        """
        if self.check(config):
            return
        if self.config.is_file():
            for path in (self.history, self.preview, self.recipe):  # left by a run that never reached a checkpoint
                path.unlink(missing_ok=True)
        self.root.mkdir(parents=True, exist_ok=True)
        atomic_write(self.config, config.to_json().encode())  # first: it marks the folder as a run folder
        for name, text in texts.items():
            atomic_write(self.root / name, text.encode())

    def check(self, config: TrainConfig) -> bool:
        """Returns True if the folder has a checkpoint or the model of a run with the same settings. Writes nothing.

        Raises:
            UserError: see `open`.
        """
        self._require_run_folder()
        if not self.config.is_file():
            return False
        if self.model.is_file() or self.has_checkpoint:
            self._require_same_settings(self.read_config(), config)
            return True
        self._require_no_lost_checkpoints()
        return False

    def is_finished(self, config: TrainConfig) -> bool:
        """Returns True if the folder has the model of a run with the same settings, whose records may be deleted.

        Raises:
            UserError: it has the model of a run with other settings.
        """
        if not (self.config.is_file() and self.model.is_file()):
            return False
        return self.check(self.with_default_splits(config))

    def read_config(self) -> TrainConfig:
        """Reads the configuration of the run.

        Raises:
            UserError: the folder is not a run folder, or its configuration is damaged.
        """
        if not self.config.is_file():
            raise UserError(f"{self.root} is not a run folder: it has no {self.config.name}")
        try:
            return TrainConfig.from_json(read_limited(self.config, SMALL).decode())
        except (UserError, UnicodeDecodeError) as error:
            raise UserError(f"{self.config}: {error}") from error

    def training_record(self) -> dict[str, Any]:
        """Returns what trained the network, for reports.

        Returns:
            settings_sha256: hash of the settings that determine the result, without paths; see
                `TrainConfig.fingerprint`.
            init: path of the initial weights; None for random ones.
            records_sha256: fingerprint of the records that the network was trained on; None if the run has lost it.
            gin_files, changed_settings: see `read_recipe`.

        Raises:
            UserError: the configuration or the recipe is damaged.
        """
        config = self.read_config()
        return {
            "settings_sha256": config.fingerprint(),
            "init": config.init,
            "records_sha256": self._read_fingerprint() if self.fingerprint.is_file() else None,
            **self.read_recipe(),
        }

    def read_recipe(self) -> dict[str, list[str]]:
        """Reads which recipe the run was started with.

        Returns:
            gin_files: names of the gin files of the command, in their order. Those of this package begin with `gin/`.
            changed_settings: names of the settings that the command changed after the files.

            Empty for a run that was not started by the command.

        Raises:
            UserError: the file is damaged.
        """
        if not self.recipe.is_file():
            return {}
        try:
            found = json.loads(read_limited(self.recipe, SMALL))
            require(isinstance(found, dict), "the file", "contain a JSON object", found)
            return {name: names_from_json(found.get(name), name) for name in RECIPE_FIELDS}
        except (ValueError, RecursionError, UserError) as error:
            raise UserError(f"{self.recipe} is damaged: {error}. Restore it from a copy, or delete it") from error

    def with_default_splits(self, config: TrainConfig) -> TrainConfig:
        """Returns the configuration with the default splits that the run was started with.

        They are those of its records, which may have been deleted since. Returns `config` itself for a new run.
        """
        if not self.config.is_file():
            return config
        used = self.read_config().dataset
        names = {used.train_split, used.eval_split, used.validation_split or used.train_split}
        return replace(config, dataset=with_default_splits(config.dataset, names))

    def update_config(self, config: TrainConfig) -> None:
        """Rewrites `config.json` if paths in the configuration have changed, so that evaluations use the new ones."""
        if self.read_config() != config:
            atomic_write(self.config, config.to_json().encode())

    def require_records(self, fingerprint: str) -> None:
        """Raises `UserError` unless the run was trained on the records with this fingerprint."""
        ours = self._read_fingerprint()
        if ours != fingerprint:
            raise UserError(
                f"{self.root} was trained on other records than those of DatasetSpec.records: the manifest's "
                f"fingerprint is {fingerprint[:12]}, that of the run is {ours[:12]}. Set DatasetSpec.records to the "
                "original records"
            )

    def _read_fingerprint(self) -> str:
        """Returns the fingerprint of the records that the run was trained on."""
        try:
            return read_limited(self.fingerprint, SMALL).decode("ascii", "replace").strip()
        except OSError as error:
            raise UserError(f"{self.fingerprint} cannot be read: {error.strerror}") from error

    def mark_trained(self) -> None:
        """Marks the run as having written a checkpoint."""
        if not self.trained.is_file():
            atomic_write(self.trained, _TRAINED.encode())

    def _require_run_folder(self) -> None:
        ours = {temporary_path(self.config), self.lock}
        foreign = not self.root.is_dir() or (not self.config.is_file() and set(self.root.iterdir()) - ours)
        if self.root.exists() and foreign:
            raise UserError(f"{self.root} exists and is not a run folder; choose another --workdir")
        links = [path for path in (self.root.iterdir() if self.root.exists() else ()) if path.is_symlink()]
        for path in links:
            if not path.is_dir():  # a planted link could make training overwrite any file
                raise UserError(
                    f"{path} must not be a symbolic link, because training would write to its target; replace it with "
                    "the file itself"
                )

    @property
    def has_checkpoint(self) -> bool:
        """True if the folder has a checkpoint, intact or damaged."""
        return bool(self._checkpoint_steps())

    @property
    def last_step(self) -> int:
        """Step of the last checkpoint, intact or damaged; 0 if there is none."""
        return max(self._checkpoint_steps(), default=0)

    def _checkpoint_steps(self) -> list[int]:
        listed = self.checkpoints.iterdir() if self.checkpoints.is_dir() else ()
        return [step for path in listed if (step := checkpoint_step(path.name)) is not None]

    def _require_no_lost_checkpoints(self) -> None:
        """Raises `UserError` if the run has written a checkpoint but none exists any more.

        `trained.txt` is written once the first checkpoint is complete. A run killed before that may start from scratch.
        If `trained.txt` is missing too, files that are only written after a checkpoint are evidence of one: the curves
        and the best network.
        """
        found = next((path for path in (self.trained, self.curves, self.best) if path.is_file()), None)
        if found is None:
            return
        rows = self.read_history()
        steps = f" to step {int(rows[-1]['step'])}" if rows else ""
        raise UserError(
            f"{self.root} was trained{steps} (it has {found.name}), but {self.checkpoints} has no complete checkpoint "
            "(ckpt-*.index with its ckpt-*.data). Restore that folder from a backup, choose another --workdir, or "
            f"delete {self.root} to train from scratch"
        )

    def _require_same_settings(self, existing: TrainConfig, config: TrainConfig) -> None:
        old, new = existing.outcome_settings(), config.outcome_settings()
        changed = [f"{name} was {old[name]!r}, now {new[name]!r}" for name in new if old[name] != new[name]]
        if changed:
            advice = "Choose another --workdir for the new settings"
            if self.model.is_file():
                advice += (
                    f". The run in {self.root} is finished; to train its network further, initialise the new run from "
                    f"it: --gin_bindings='TrainConfig.init=\"{self.root}\"'"
                )
            raise UserError(f"{self.root} belongs to a run with other settings: {'; '.join(changed)}. {advice}")

    def read_history(
        self, required: Collection[str] = (), optional: Collection[str] | None = None
    ) -> list[dict[str, float]]:
        """Reads `history.csv` up to the first damaged row, with a warning. Returns [] if the file does not exist.

        Args:
            required: names of the metrics that every row must have, besides `HISTORY_FIELDS`.
            optional: names of the metrics that rows may have. Defaults to all other columns.
        """
        rows: list[dict[str, float]] = []
        if not self.history.is_file():
            return rows
        with self.history.open(newline="", encoding="utf-8", errors="replace") as file:
            try:
                for cells in csv_files.dicts(file):
                    others = cells if optional is None else optional
                    rows.append(_history_row(cells, {*HISTORY_FIELDS, *required}, others))
            except (KeyError, ValueError, csv.Error):  # truncated when the run was killed, or edited
                print(f"warning: {self.history} is damaged after row {len(rows)}; ignoring the rest", file=sys.stderr)
        return rows

    def write_history(self, columns: Sequence[str], rows: Iterable[Mapping[str, float]]) -> None:
        """Writes all rows of `history.csv`, atomically. Cells of columns that a row lacks are empty."""
        cells = ([_history_cell(row, name) for name in columns] for row in rows)
        atomic_write(self.history, csv_files.encoded([columns, *cells]))

    def append_history(self, columns: Sequence[str], row: Mapping[str, float]) -> None:
        """Appends a row to an existing `history.csv`, whose header is `columns`."""
        with os_errors_as_write_error(self.history), self.history.open("a", newline="", encoding="utf-8") as file:
            csv_files.Writer(file).row(_history_cell(row, name) for name in columns)


def _history_row(cells: Mapping[str, str], required: Collection[str], optional: Iterable[str]) -> dict[str, float]:
    """Parses a row. Raises KeyError or ValueError if a value is missing, not a number, or too large to plot."""
    names = {*required, *(name for name in optional if cells.get(name))}
    row = {name: float(cells[name]) for name in names}
    if not all(abs(value) <= _LARGEST for value in row.values()):  # false for NaN too
        raise ValueError
    return row


def _history_cell(row: Mapping[str, float], name: str) -> float | str:
    value = row.get(name, "")
    return int(value) if name == "step" and value != "" else value

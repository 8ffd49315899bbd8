"""Where losses go: one CSV file a run, or TensorBoard beside it; and how far a run is, as events."""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fmclip.errors import PairError

COLUMNS = ("epoch", "step", "loss", "val_loss", "lr", "temperature", "pairs_per_second")


@dataclass(frozen=True)
class StepDone:
    """A training step is done.

    Attributes:
        epoch: Counted from 0.
        step: Steps done in the whole run.
        steps: Steps of the whole run, if it is not stopped early.
        loss: Loss of the step.
        lr: Base learning rate of the step.
        temperature: Temperature after it.
        pairs_per_second: Speed of the step, images read included.
    """

    epoch: int
    step: int
    steps: int
    loss: float
    lr: float
    temperature: float
    pairs_per_second: float


@dataclass(frozen=True)
class EpochDone:
    """An epoch is done.

    Attributes:
        epoch: Counted from 0.
        step: Steps done in the whole run.
        loss: Mean training loss of the epoch.
        val_loss: Validation loss; NaN without validation pairs.
        is_best: Whether it is the best so far, and was kept as the tower.
    """

    epoch: int
    step: int
    loss: float
    val_loss: float
    is_best: bool


class RunLog:
    """Writes the losses of a run.

    Args:
        folder: Folder of the run.
        kind: "csv" or "tensorboard" (which gets the CSV file as well).
        after: Steps that are done already: later rows of an earlier attempt are dropped.

    Raises:
        PairError: TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, kind: str, after: int = 0) -> None:
        self._file = folder / "log.csv"
        rows = [row for row in read_log(self._file) if int(row["step"]) <= after] if after else []
        with self._file.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        self._board: Any = None
        if kind == "tensorboard":
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise PairError(
                    "log=tensorboard needs the package tensorboard: pip install 'fmclip[pairs]'."
                ) from error
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=after or None)

    def write(self, event: StepDone | EpochDone) -> None:
        """Add a row."""
        row = {key: value for key, value in asdict(event).items() if key in COLUMNS}
        row["step"] = event.step
        if isinstance(event, EpochDone):
            row.pop("loss")  # the steps of the epoch have theirs
        with self._file.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS).writerow(row)
        if self._board is not None:
            for key, value in row.items():
                if key not in ("epoch", "step"):
                    self._board.add_scalar(key, value, event.step)

    def close(self) -> None:
        """Write what is buffered."""
        if self._board is not None:
            self._board.close()


def read_log(file: Path) -> list[dict[str, str]]:
    """Read the rows of a log; none if there is no file."""
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as rows:
        return list(csv.DictReader(rows))

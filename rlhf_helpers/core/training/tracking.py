"""Trackers: where each row of a run's history goes as soon as its step is done."""

import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

TRACKERS = (None, "jsonl", "tensorboard", "wandb")
METRICS_FILE = "metrics.jsonl"
WANDB_FILE = "wandb-id.txt"


class JSONLTracker:
    """Writes one line per step to metrics.jsonl; a run that is killed leaves all its lines behind."""

    def __init__(self, folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        """Start the file with the rows up to the checkpoint: what came after it is computed again."""
        self._file = (folder / METRICS_FILE).open("w", encoding="utf-8")
        for row in rows:
            self.log(row)

    def log(self, row: Mapping[str, Any], step: int | None = None) -> None:
        """Append one row and hand it to the operating system."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def finish(self) -> None:
        """Close the file."""
        self._file.close()


def open_tracker(kind: str, folder: Path, rows: Sequence[Mapping[str, Any]]) -> JSONLTracker | GeneralTracker:
    """Open one of TRACKERS for a run in `folder`; a resumed run continues the log of the first one.

    Args:
        rows: the history up to the step at which the run starts.
    """
    if kind == "jsonl":
        return JSONLTracker(folder, rows)
    if kind == "tensorboard":  # steps from purge_step on are computed again: TensorBoard drops the old ones
        tracker = TensorBoardTracker("tensorboard", folder, purge_step=len(rows))
    else:
        id_file = folder / WANDB_FILE
        if not rows:
            id_file.write_text(uuid.uuid4().hex, encoding="ascii")
        run_id = id_file.read_text(encoding="ascii")
        tracker = WandBTracker("rlhf_helpers", name=folder.name, id=run_id, resume="allow", dir=str(folder))
    tracker.start()
    return tracker

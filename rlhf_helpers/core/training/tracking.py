"""Trackers: where each row of a run's history goes as soon as its step is done."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

TRACKERS = (None, "jsonl", "tensorboard", "wandb")
METRICS_FILE = "metrics.jsonl"


class JSONLTracker(GeneralTracker):
    """Writes one line per step to metrics.jsonl; a run that is killed leaves all its lines behind."""

    def __init__(self, folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        """Start the file with the rows up to the checkpoint: what came after it is computed again."""
        self.file = folder / METRICS_FILE
        self.file.write_text("", encoding="utf-8")
        for row in rows:
            self.log(row)

    def log(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Append one row."""
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def open_tracker(kind: str, folder: Path, rows: Sequence[Mapping[str, Any]]) -> JSONLTracker | GeneralTracker:
    """Open one of TRACKERS for a run in `folder`.

    A resumed run continues the log of the first one; to Weights & Biases it is a new run of the same name.

    Args:
        rows: the history up to the step at which the run starts.
    """
    if kind == "jsonl":
        return JSONLTracker(folder, rows)
    if kind == "tensorboard":  # steps from purge_step on are computed again: TensorBoard drops the old ones
        tracker = TensorBoardTracker("tensorboard", folder, purge_step=len(rows))
    else:
        tracker = WandBTracker("rlhf_helpers", name=folder.name, dir=str(folder))
    tracker.start()
    return tracker

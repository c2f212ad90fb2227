"""DPO from the name of a model to the history of its epochs."""

import warnings
from typing import Any

from rlhf_helpers.core.models import load_model
from rlhf_helpers.core.training import History
from rlhf_helpers.dpo.data import DPODataset, Rows
from rlhf_helpers.dpo.training import DPOTrainer


class DPOPipeline:
    """Loads a causal LM by name or folder and trains it on preferences; its parts are `.trainer`, `.model`.

    Other keywords: fields of `DPOSettings` (loss=, epochs=, batch_size=, ...), or loss_fn. Lesson 2.
    """

    def __init__(
        self, model_name: str = "tiny", beta: float = 0.1, learning_rate: float = 1e-5, **changes: Any
    ) -> None:
        """Load model and tokenizer; raises what `load_model` and `DPOTrainer` raise."""
        self.model, self.tokenizer = load_model(model_name)
        changes |= {"beta": beta, "learning_rate": learning_rate}
        self.trainer = DPOTrainer(self.model, tokenizer=self.tokenizer, **changes)
        self.step_history = History()

    def train(
        self, train_data: Rows | DPODataset, val_data: Rows | DPODataset | None = None, num_epochs: int = 1
    ) -> History:
        """Train; returns one row an epoch: the means of its steps' metrics, and the eval_ ones at its end.

        `.step_history` holds a row a step. Warns (UserWarning) where rows of val_data are trained on: what a
        model has seen says nothing about what it has not.
        """
        train_data = self.trainer.dataset(train_data)
        val_data = None if val_data is None else self.trainer.dataset(val_data)
        if val_data is not None:
            seen = {repr(row) for row in train_data.sequences}
            if both := sum(repr(row) in seen for row in val_data.sequences):
                warnings.warn(
                    f"{both} of {len(val_data)} rows of val_data are training data: the eval_ metrics show "
                    "memory, not learning; hold prompts out with preference_data.split_by_prompt",
                    stacklevel=2,
                )
        self.step_history = steps = self.trainer.train(train_data, val_rows=val_data, epochs=num_epochs)
        size = len(steps) // num_epochs
        frame = steps.to_frame().drop(columns="step")
        means = frame.groupby(frame.index // size).mean().to_dict("records")
        return History({"epoch": i + 1, **row} for i, row in enumerate(means))

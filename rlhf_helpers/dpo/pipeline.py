"""DPO from the name of a model to the history of its epochs."""

import warnings
from typing import Any

from rlhf_helpers.core.models import load_model
from rlhf_helpers.core.training import History
from rlhf_helpers.dpo.data import Data
from rlhf_helpers.dpo.trainer import DPOTrainer


class DPOPipeline:
    """Loads a causal LM by name or folder and trains it on preferences; its parts are `.trainer`, `.model`.

    Other keywords: fields of `DPOSettings` (loss=, epochs=, batch_size=, ...), or loss_fn. Lesson 2.
    """

    def __init__(
        self, model_name: str = "tiny", beta: float = 0.1, learning_rate: float | None = None, **changes: Any
    ) -> None:
        """Load model and tokenizer; raises what `load_model` and `DPOTrainer` raise."""
        self.model, self.tokenizer = load_model(model_name)
        changes |= {"beta": beta, "learning_rate": learning_rate}
        self.trainer = DPOTrainer(self.model, tokenizer=self.tokenizer, **changes)
        self.step_history = History()

    def train(self, train_data: Data, val_data: Data | None = None, num_epochs: int = 1) -> History:
        """Train; return one row per epoch: the means of its steps' metrics, and the eval_ ones at its end.

        `.step_history` holds one row per step. Warns (UserWarning) where rows of val_data are trained on:
        what a model has seen says nothing about what it has not.
        """
        train_data = self.trainer.dataset(train_data)
        val_data = None if val_data is None else self.trainer.dataset(val_data)
        if val_data is not None:
            seen = {repr(row) for row in train_data.sequences}
            both = sum(repr(row) in seen for row in val_data.sequences)
            if both:
                warnings.warn(
                    f"{both} of {len(val_data)} rows of val_data are training data: the eval_ metrics show "
                    "memory, not learning; hold prompts out with preference_data.split_by_prompt",
                    stacklevel=2,
                )
        self.step_history = self.trainer.train(train_data, val_rows=val_data, epochs=num_epochs)
        steps_per_epoch = len(self.step_history) // num_epochs
        frame = self.step_history.to_frame().drop(columns="step")
        means = frame.groupby(frame.index // steps_per_epoch).mean().to_dict("records")  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
        return History({"epoch": i + 1, **row} for i, row in enumerate(means))

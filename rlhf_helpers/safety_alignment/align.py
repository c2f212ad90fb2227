"""Safety alignment: learn from data what to refuse, as strongly as asked, without forgetting the rest."""

import copy
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_helpers.alignment_eval.safety import SafetyMetrics
from rlhf_helpers.core.generation import sequence_logps
from rlhf_helpers.core.models import tokenizer_for
from rlhf_helpers.core.preference_losses import dpo_loss
from rlhf_helpers.core.tensors import require_number
from rlhf_helpers.core.text import rows_of
from rlhf_helpers.core.training import History, sft
from rlhf_helpers.dpo import DPOSettings, DPOTrainer

Rows = Sequence[Mapping[str, Any]]


class SafetyAlignment:
    """Align copies of a model with safety data; the model given is never changed.

    The record of the last run is in .history. Lesson 3.

    Args:
        model: The model to start from.
        safety_metrics: Of `SafetyMetrics`, for `evaluate`.
        **settings: Fields of DPOSettings; imitation uses those that it shares.

    Raises:
        TypeError: A keyword is not a field of DPOSettings.
        ValueError: A setting is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        safety_metrics: Sequence[str] = ("toxicity", "bias", "factual_accuracy"),
        **settings: Any,
    ) -> None:
        """Set where to start and how to train."""
        self.model = model
        self.safety_metrics = safety_metrics
        self.history = History()
        self.settings = DPOSettings(**settings)

    def align(
        self,
        alignment_data: Rows,
        alignment_strength: float = 1.0,
        *,
        pretraining: Rows = (),
        mix_weight: float = 1.0,
    ) -> nn.Module:
        """Return a new model with the weights base + strength (aligned - base): `interpolate`.

        Args:
            alignment_data: Rows prompt, chosen, rejected (DPO) or prompt, completion (imitation).
            alignment_strength: In [0, 1]; 0 changes nothing.
            pretraining: Rows prompt, completion[, weight] of what should not be forgotten.
            mix_weight: What they count. DPO adds mix_weight times the loss, in nats per token, of as many of
                them as a batch holds (as PPO-ptx, Ouyang et al. 2022); imitation learns them too, a token
                weighing mix_weight.

        Raises:
            ValueError: The strength is outside [0, 1], there is no row, or a row lacks a column.
        """
        require_number("alignment_strength", alignment_strength, at_least=0, at_most=1)
        require_number("mix_weight", mix_weight, at_least=0)
        rows = rows_of(alignment_data)
        known = list(pretraining) if mix_weight else []
        for row in known:
            if not {"prompt", "completion"} <= set(row):
                raise ValueError(f"pretraining needs rows of prompt and completion, got {row}")
        aligned = copy.deepcopy(self.model)
        if alignment_strength == 0:
            return aligned
        tokenizer = tokenizer_for(self.model)
        settings = self.settings
        if any("chosen" in row for row in rows):
            loss_fn = _with_text(aligned, tokenizer, known, mix_weight, settings) if known else None
            trainer = DPOTrainer(aligned, None, tokenizer, settings=settings, loss_fn=loss_fn)
            self.history = trainer.train(rows)
        else:
            rows += [{**row, "weight": mix_weight * row.get("weight", 1.0)} for row in known]
            self.history = sft(
                aligned, tokenizer, rows, settings, epochs=settings.epochs, batch_size=settings.batch_size
            )
        return interpolate(self.model, aligned.train(self.model.training), alignment_strength)

    def evaluate(self, model: nn.Module, prompts: Sequence[str], **options: Any) -> dict[str, float]:
        """Call `SafetyMetrics.evaluate` with this object's metrics."""
        return SafetyMetrics.evaluate(model, prompts, self.safety_metrics, **options)


def interpolate(base: nn.Module, aligned: nn.Module, strength: float) -> nn.Module:
    """Make a new model with weights base + strength (aligned - base): 0 and 1 give the two bit for bit.

    KL to the base rises with the strength. Wortsman et al. 2022; Ilharco et al. 2023. Lesson 3. Raises
    ValueError where the two do not have the same weights.
    """
    mixed = copy.deepcopy(aligned)
    start = dict(base.named_parameters())
    end = dict(mixed.named_parameters())
    if {k: p.shape for k, p in start.items()} != {k: p.shape for k, p in end.items()}:
        raise ValueError("base and aligned must be one architecture: their weights differ in name or shape")
    with torch.no_grad():
        for name, weight in end.items():
            weight.copy_(torch.lerp(start[name].to(weight), weight, strength))
    return mixed


def evaluate_safety_alignment(
    before: nn.Module,
    after: nn.Module,
    prompts: Sequence[str],
    metrics: Sequence[str] | None = None,
    **options: Any,
) -> dict[str, dict[str, float]]:
    """Measure what alignment changed: metric -> before, after, improvement (positive is better). Lesson 3."""
    first = SafetyMetrics.evaluate(before, prompts, metrics, **options)
    second = SafetyMetrics.evaluate(after, prompts, metrics, **options)
    gains = SafetyMetrics.improvement(first, second)
    return {k: {"before": first[k], "after": second[k], "improvement": gains[k]} for k in first}


def _with_text(model: nn.Module, tokenizer: Any, rows: Rows, weight: float, settings: DPOSettings) -> Any:
    """Make DPO's loss plus `weight` times the loss of a batch of `rows`, drawn anew at each call."""
    rng = random.Random(settings.seed)

    def loss_fn(*logps: Tensor, **numbers: float) -> Tensor:
        part = rng.sample(rows, min(settings.batch_size, len(rows)))
        prompts = [row["prompt"] for row in part]
        completions = [row["completion"] for row in part]
        text_logps, mask = sequence_logps(
            model, tokenizer, prompts, completions, max_length=settings.max_length
        )
        weights = mask * text_logps.new_tensor([row.get("weight", 1.0) for row in part])[:, None]
        return dpo_loss(*logps, **numbers) - weight * (weights * text_logps).sum() / weights.sum()

    return loss_fn

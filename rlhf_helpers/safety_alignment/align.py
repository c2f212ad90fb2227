"""Safety alignment: learn from data what to refuse, as strongly as asked, without forgetting the rest."""

import copy
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_helpers.alignment_eval.safety import SafetyMetrics, swap_words
from rlhf_helpers.core.generation import sequence_logps
from rlhf_helpers.core.models import tokenizer_for
from rlhf_helpers.core.preference_losses import dpo_loss
from rlhf_helpers.core.tensors import require_number
from rlhf_helpers.core.training import History, sft
from rlhf_helpers.dpo import DPOSettings, DPOTrainer
from rlhf_helpers.world.prompts.social import GROUPS

Rows = Sequence[Mapping[str, Any]]
KINDS = (("prompt", "chosen", "rejected"), ("prompt", "completion"))
TEXTS = {name for kind in KINDS for name in kind}


class SafetyAlignment:
    """Aligns copies of a model with safety data; the model given is never changed.

    safety_metrics: of `SafetyMetrics`, for `evaluate`. settings: fields of DPOSettings; imitation uses those
    that it shares. The record of the last run is in .history. Lesson 3.
    """

    def __init__(
        self,
        model: nn.Module,
        safety_metrics: Sequence[str] = ("toxicity", "bias", "factual_accuracy"),
        *,
        tokenizer: Any = None,
        **settings: Any,
    ) -> None:
        """Raise TypeError for a keyword that is no field of DPOSettings, ValueError for a bad value."""
        self.model, self.tokenizer = model, tokenizer or tokenizer_for(model)
        self.safety_metrics, self.history = list(safety_metrics), History()
        self.settings = DPOSettings(**{"progress": False, **settings})

    def align(
        self,
        alignment_data: Rows,
        alignment_strength: float = 1.0,
        *,
        pretraining: Rows = (),
        mix_weight: float = 1.0,
    ) -> nn.Module:
        """A new model with the weights base + strength (aligned - base), strength in [0, 1]: `interpolate`.

        alignment_data: rows all with prompt, chosen, rejected (DPO) or all prompt, completion (imitation).
        pretraining: rows prompt, completion[, weight] of what should not be forgotten. DPO adds mix_weight
        times the loss, in nats a token, of as many of them as a batch holds (as PPO-ptx, Ouyang et al. 2022);
        imitation learns them along, a token weighing mix_weight. Raises ValueError for a strength outside
        [0, 1], no row, or rows without these columns.
        """
        require_number("alignment_strength", alignment_strength, at_least=0, at_most=1)
        require_number("mix_weight", mix_weight, at_least=0)
        kind, rows = _kind_of(alignment_data), list(alignment_data)
        known = list(pretraining) if mix_weight else []
        if known and _kind_of(known) != "completion":
            raise ValueError(f"pretraining needs rows of prompt and completion, got {known[0]}")
        aligned, settings = _copy(self.model), self.settings
        if alignment_strength == 0:
            return aligned
        if kind == "chosen":
            loss_fn = _with_text(aligned, self.tokenizer, known, mix_weight, settings) if known else None
            trainer = DPOTrainer(aligned, None, self.tokenizer, settings=settings, loss_fn=loss_fn)
            self.history = trainer.train(rows)
        else:
            rows += [{**row, "weight": mix_weight * row.get("weight", 1.0)} for row in known]
            sizes = {"epochs": settings.epochs, "batch_size": settings.batch_size}
            self.history = sft(aligned, self.tokenizer, rows, settings, **sizes)
        return interpolate(self.model, aligned.train(self.model.training), alignment_strength)

    def evaluate(self, model: nn.Module, prompts: Sequence[str], **options: Any) -> dict[str, float]:
        """`SafetyMetrics.evaluate` with this object's metrics."""
        return SafetyMetrics.evaluate(model, prompts, self.safety_metrics, **options)


def interpolate(base: nn.Module, aligned: nn.Module, strength: float) -> nn.Module:
    """A new model with weights base + strength (aligned - base): 0 and 1 give the two bit for bit.

    KL to the base rises with the strength. Wortsman et al. 2022; Ilharco et al. 2023. Lesson 3. Raises
    ValueError where the two do not have the same weights.
    """
    mixed, start = _copy(aligned), dict(base.named_parameters())
    end = dict(mixed.named_parameters())
    if {k: p.shape for k, p in start.items()} != {k: p.shape for k, p in end.items()}:
        raise ValueError("base and aligned must be one architecture: their weights differ in name or shape")
    with torch.no_grad():
        for name, weight in end.items():
            if strength < 1:  # lerp at 1 would round
                weight.copy_(torch.lerp(start[name].to(weight), weight, strength))
    return mixed


def evaluate_safety_alignment(
    before: nn.Module,
    after: nn.Module,
    prompts: Sequence[str],
    metrics: Sequence[str] | None = None,
    **options: Any,
) -> dict[str, dict[str, float]]:
    """What alignment changed: metric -> before, after, improvement, positive is better always. Lesson 3."""
    first, second = (SafetyMetrics.evaluate(m, prompts, metrics, **options) for m in (before, after))
    gains = SafetyMetrics.improvement(first, second)
    return {k: {"before": first[k], "after": second[k], "improvement": gains[k]} for k in first}


def counterfactual_rows(rows: Rows, groups: Sequence[str] = GROUPS) -> list[dict[str, Any]]:
    """The rows, and each row that names groups again with the groups rotated, in all of its texts.

    Two groups stay two, and of such a row every group now stands in every place once, so nothing can be
    learned of who does what. Zhao et al. 2018. Lesson 3.
    """
    turns = [dict(zip(groups, (*groups[i:], *groups[:i]), strict=True)) for i in range(len(groups))]
    found = []
    for row in rows:
        texts = [{k: swap_words(row[k], t) for k in TEXTS if k in row} for t in turns]
        found += [{**row, **new} for i, new in enumerate(texts) if i == 0 or new != texts[0]]
    return found


def _kind_of(rows: Rows) -> str:
    """What all rows hold: "chosen" (with rejected) or "completion"."""
    for columns in KINDS:
        if len(rows) and all(set(columns) <= set(row) for row in rows):
            return columns[1]
    told = f"row 0 has {sorted(rows[0])}" if len(rows) else "there is none"
    raise ValueError(f"alignment data are rows that all have {KINDS[0]} or all {KINDS[1]}; {told}")


def _copy(model: nn.Module) -> nn.Module:
    known = vars(model).get("_rlhf_tokenizer")
    return copy.deepcopy(model, {id(known): known})


def _with_text(model: nn.Module, tokenizer: Any, rows: Rows, weight: float, settings: DPOSettings) -> Any:
    """DPO's loss plus `weight` times the loss of a batch of `rows`, drawn anew at each call."""
    rng, size = random.Random(settings.seed), min(settings.batch_size, len(rows))

    def loss_fn(*logps: Tensor, **numbers: float) -> Tensor:
        part = rng.sample(rows, size)
        texts = [[row[key] for row in part] for key in KINDS[1]]
        found, mask = sequence_logps(model, tokenizer, *texts, max_length=settings.max_length)
        weights = mask * found.new_tensor([row.get("weight", 1.0) for row in part])[:, None]
        return dpo_loss(*logps, **numbers) - weight * (weights * found).sum() / weights.sum()

    return loss_fn

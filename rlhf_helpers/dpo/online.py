"""Online DPO: the policy writes the pairs, a reward picks the better one, and DPO learns from that."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlhf_helpers.core.generation import Rollout, generate, rollout_logps
from rlhf_helpers.core.models import RewardFn, as_reward_fn, frozen_copy
from rlhf_helpers.core.text import Columns, require_columns
from rlhf_helpers.core.training import Engine, History
from rlhf_helpers.core.training.settings import require_fields
from rlhf_helpers.dpo.data import DPODataset, fingerprint
from rlhf_helpers.dpo.objectives import OBJECTIVES, LossFn
from rlhf_helpers.dpo.training import DPOSettings, update


@dataclass(frozen=True)
class OnlineDPOSettings(DPOSettings):
    """How often and how widely online DPO samples; the pairs of a step are learned `epochs` times over.

    Few prompts a step are online DPO (Guo et al. 2024); many, with refresh_reference=1, are iterative DPO.
    """

    schedule: str = "constant"  # the samples change with the policy: there is no end to anneal towards
    steps: int = 30  # rounds of sampling
    prompts_per_step: int = 16  # one pair each
    samples_per_prompt: int = 4  # the best against the worst; more: clearer pairs, and a longer step
    missing_eos_penalty: float = 0.0  # taken off the score of a response that did not end
    refresh_reference: int = 0  # steps after which the policy becomes the reference; 0: never

    def __post_init__(self) -> None:
        """Refuse values that would train wrongly or not at all."""
        super().__post_init__()
        require_fields(self, "steps", "prompts_per_step", whole=True, at_least=1)
        require_fields(self, "samples_per_prompt", whole=True, at_least=2)
        require_fields(self, "refresh_reference", whole=True, at_least=0)
        require_fields(self, "missing_eos_penalty", at_least=0)
        if OBJECTIVES[self.loss].kind != "pairs" or self.samples_kl:
            raise ValueError(
                f"OnlineDPOSettings.loss must be one for pairs, kl_coef 0 and target_kl None (its samples "
                f"already show objective/kl); got {self.loss!r}, {self.kl_coef} and {self.target_kl}"
            )

    @property
    def updates_per_epoch(self) -> int:
        """Optimiser steps of one pass over the pairs of a step."""
        return -(-self.prompts_per_step // (self.batch_size * self.accumulation_steps))


def online_dpo(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], reward_fn: RewardFn,
    settings: OnlineDPOSettings, *, ref_model: nn.Module | None = None, loss_fn: LossFn | None = None,
    columns: Columns | None = None,
    eval_fn: Callable[[nn.Module], dict[str, float]] | None = None, resume: bool = False,
) -> History:  # fmt: skip
    """Train `model` in place on pairs of its own samples, the best against the worst of each prompt's.

    prompts: texts; a step draws prompts_per_step of them in seeded order. reward_fn: a RewardFn or a reward
    model; columns: name -> one entry a prompt. Equal scores teach nothing (weight 0). eval_fn: model ->
    metrics, every eval_every steps and after the last. The rest as in `DPOTrainer`.
    Returns a row a step: objective/scores, objective/kl (nats a response, sum over its tokens),
    objective/kl_per_token, eos_fraction, response_length, frac_reward_zero_std (share of ties) of the
    samples; loss and the names of `DPOTrainer.train`, means over its updates. Guo et al. 2024, "Direct
    language model alignment from online AI feedback". Lesson 2. Raises ValueError for prompts, columns or
    rewards of the wrong shape.
    """
    group, columns = settings.samples_per_prompt, dict(columns or {})
    require_columns(prompts, columns)
    if ref_model is model:
        raise ValueError("ref_model is the model that is trained; give a frozen_copy")
    reference = ref_model if ref_model and not settings.refresh_reference else frozen_copy(ref_model or model)
    engine = _start(model, settings, prompts, reference)
    if resume:
        engine.resume()
    for step in engine.steps():
        rows = engine.batch(range(len(prompts)), settings.prompts_per_step)
        asked = [row for row in rows for _ in range(group)]
        rollout = generate(
            model, tokenizer, [prompts[row] for row in asked],
            max_new_tokens=settings.max_new_tokens, seed=engine.step_seed,
        )  # fmt: skip
        further = {name: [values[row] for row in asked] for name, values in columns.items()}
        scores = as_reward_fn(reward_fn)(rollout.prompts, rollout.responses, **further).to(engine.device)
        judged = scores - settings.missing_eos_penalty * ~rollout.ended
        with torch.no_grad():
            ref_logps = rollout_logps(reference, rollout).sum(-1)
        data = DPODataset.from_rollout(rollout, judged, ref_logps, group=group, pad_id=tokenizer.pad_token_id)
        metrics = _sample_metrics(rollout, scores, ref_logps, data) | _learn(engine, data, loss_fn)
        if settings.refresh_reference and (step + 1) % settings.refresh_reference == 0:
            reference.load_state_dict(model.state_dict())
        due = step + 1 == settings.steps or (settings.eval_every and (step + 1) % settings.eval_every == 0)
        engine.log(metrics | (eval_fn(model) if eval_fn is not None and due else {}))
    return engine.history


def _start(
    model: nn.Module, settings: OnlineDPOSettings, prompts: Sequence[str], reference: nn.Module
) -> Engine:
    """An engine whose checkpoints hold the reference too, if it moves."""
    facts = {"prompts": zlib.crc32(repr(list(prompts)).encode()), "reference": fingerprint(reference)}
    return Engine(
        model, settings, total_steps=settings.steps, must_match=facts,
        updates_per_step=settings.epochs * settings.updates_per_epoch * settings.accumulation_steps,
        extra_state={"reference": reference} if settings.refresh_reference else {},
    )  # fmt: skip


def _learn(engine: Engine, data: DPODataset, loss_fn: LossFn | None) -> dict[str, float]:
    """The updates of one step: `epochs` passes over its pairs, each in its own seeded order."""
    settings, found = engine.settings, History()
    for epoch in range(settings.epochs):
        order = np.random.default_rng([engine.step_seed, epoch]).permutation(len(data))
        for part in np.array_split(order, settings.updates_per_epoch):
            found.append(update(engine, data, part, settings.beta, loss_fn, {}, own=True))
    return found.to_frame().mean().to_dict()


def _sample_metrics(
    rollout: Rollout, scores: Float[Tensor, "B"], ref_logps: Float[Tensor, "B"], data: DPODataset
) -> dict[str, float]:
    kl, lengths = rollout.old_logps.sum(-1) - ref_logps, rollout.response_lengths.float()
    return {
        "objective/scores": scores.mean().item(),
        "objective/kl": kl.mean().item(),
        "objective/kl_per_token": (kl.sum() / lengths.sum()).item(),
        "eos_fraction": rollout.ended.float().mean().item(),
        "response_length": lengths.mean().item(),
        "frac_reward_zero_std": 1 - sum(data.weights) / len(data),
    }

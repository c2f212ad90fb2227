"""Online DPO: the policy writes the pairs, a reward picks the better one, and DPO learns from that."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from rlhf_helpers.core.generation import encode_prompts, rollout_logps
from rlhf_helpers.core.lora import reference_model
from rlhf_helpers.core.models import RewardFn
from rlhf_helpers.core.rollouts import collect, repeat_columns, rollout_metrics, score
from rlhf_helpers.core.text import Columns, require_columns
from rlhf_helpers.core.training import Engine, History
from rlhf_helpers.core.training.resume import checksum, fingerprint
from rlhf_helpers.core.training.settings import require_fields
from rlhf_helpers.dpo.data import DPODataset
from rlhf_helpers.dpo.objectives import OBJECTIVES, BatchLosses, LossFn, batch_losses_of
from rlhf_helpers.dpo.settings import DPOSettings
from rlhf_helpers.dpo.training import dpo_update


@dataclass(frozen=True)
class OnlineDPOSettings(DPOSettings):
    """How often and how widely online DPO samples; the pairs of a step are learned `epochs` times over."""

    schedule: str = "constant"  # the samples change with the policy: there is no end to anneal towards
    steps: int = 30  # rounds of sampling
    prompts_per_step: int = 16  # one pair each
    samples_per_prompt: int = 4  # the best against the worst; more: clearer pairs, and a longer step

    def __post_init__(self) -> None:
        """Refuse values that would train wrongly or not at all."""
        super().__post_init__()
        require_fields(self, "steps", "prompts_per_step", whole=True, at_least=1)
        require_fields(self, "samples_per_prompt", whole=True, at_least=2)
        if OBJECTIVES[self.loss].kind != "pairs" or self.needs_kl_samples:
            raise ValueError(
                f"OnlineDPOSettings.loss must be one for pairs, kl_coef 0 and target_kl None (its samples "
                f"already show objective/kl); got {self.loss!r}, {self.kl_coef} and {self.target_kl}"
            )

    @property
    def optimizer_steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the pairs of a step."""
        return -(-self.prompts_per_step // (self.batch_size * self.accumulation_steps))


def online_dpo(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    reward_fn: RewardFn,
    settings: OnlineDPOSettings,
    *,
    ref_model: nn.Module | None = None,
    loss_fn: LossFn | None = None,
    columns: Columns | None = None,
    eval_fn: Callable[[nn.Module], dict[str, float]] | None = None,
    resume: bool = False,
) -> History:
    """Train `model` in place on pairs of its own samples, the best against the worst for each prompt.

    Source: Guo et al. 2024, "Direct language model alignment from online AI feedback". Lesson 2.

    Args:
        prompts: texts; a step draws prompts_per_step of them in seeded order, over all processes.
        reward_fn: a RewardFn or a reward model. Equal scores teach nothing (weight 0).
        columns: name -> one entry per prompt.
        eval_fn: model -> metrics, every eval_every steps and after the last. The rest as in `train_dpo`.

    Returns:
        One row per step: what `rollout_metrics` measures on the samples; loss and the names of
        `DPOTrainer.train`, means over the updates of the step.

    Raises:
        ValueError: prompts, columns or rewards of the wrong shape.
    """
    group = settings.samples_per_prompt
    batch_losses = batch_losses_of(settings, loss_fn)
    columns = dict(columns or {})
    require_columns(prompts, columns)
    # A prompt that is too long is refused now, not at the step that draws it.
    lengths = {"max_new_tokens": settings.max_new_tokens, "max_length": settings.max_length}
    encode_prompts(model, tokenizer, prompts, **lengths)
    reference = reference_model(model, ref_model, lora=settings.lora)
    engine = _start(model, settings, prompts, reference)
    if resume:
        engine.resume()
    for _ in engine.steps():
        # Sample several answers to each prompt, and score them.
        indices = engine.batch(len(prompts), settings.prompts_per_step)
        rollout = collect(
            model,
            tokenizer,
            [prompts[index] for index in indices],
            samples_per_prompt=group,
            max_new_tokens=settings.max_new_tokens,
            temperature=1.0,
            seed=engine.step_seed,
        )
        scores = score(reward_fn, rollout, repeat_columns(columns, indices, group))
        # The reference does not learn, so its log-probs are computed once, without gradient.
        with torch.no_grad():
            ref_logps = rollout_logps(reference, rollout)
        # Pair the best sample of each prompt with its worst; a tie gets weight 0.
        data = DPODataset.from_rollout(rollout, scores, ref_logps.sum(-1), group=group)
        metrics = rollout_metrics(rollout, scores, scores, ref_logps, samples_per_prompt=group)
        metrics |= online_dpo_update(engine, data, batch_losses)
        if eval_fn is not None and engine.is_due(settings.eval_every or settings.steps):
            metrics |= eval_fn(model)
        engine.log(metrics)
    return engine.history


def online_dpo_update(engine: Engine, data: DPODataset, batch_losses: BatchLosses) -> dict[str, float]:
    """Learn from the pairs of one step: `epochs` passes in seeded orders; return means of the metrics.

    The first update is on-policy. The later ones learn from samples of a policy that has moved since, which
    DPO's loss, unlike a policy gradient's, allows.
    """
    settings, history = engine.settings, History()
    num_batches = min(settings.optimizer_steps_per_epoch, len(data))  # a process of many may hold few pairs
    for epoch in range(settings.epochs):
        order = np.random.default_rng([engine.step_seed, epoch]).permutation(len(data))
        for indices in np.array_split(order, num_batches):
            # Each process sampled pairs of its own, so they do not share the rows.
            metrics = dpo_update(
                engine, data, indices, batch_losses, settings.beta, same_rows_everywhere=False
            )
            history.append(metrics)
    return history.to_frame().mean().to_dict()


def _start(
    model: nn.Module, settings: OnlineDPOSettings, prompts: Sequence[str], reference: nn.Module
) -> Engine:
    """Make the engine, whose checkpoints fit these prompts and this reference alone."""
    engine = Engine(
        model,
        settings,
        total_steps=settings.steps,
        optimizer_steps_per_step=settings.epochs * settings.optimizer_steps_per_epoch,
        resume_must_match={
            "prompts": checksum([*prompts]),
            "reference": fingerprint(reference),
        },
    )
    reference.to(engine.device)  # with several processes the engine chose the device
    return engine

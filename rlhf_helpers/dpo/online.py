"""Online DPO: the policy writes the pairs, a reward picks the better one, and DPO learns from that."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlhf_helpers.core.generation import Rollout, encode_prompts, generate, rollout_logps
from rlhf_helpers.core.lora import has_adapter, reference_model
from rlhf_helpers.core.models import RewardFn, as_reward_fn, frozen_copy
from rlhf_helpers.core.text import Columns, require_columns
from rlhf_helpers.core.training import Engine, History
from rlhf_helpers.core.training.distributed import full_weights, load_full_weights
from rlhf_helpers.core.training.resume import checksum, fingerprint
from rlhf_helpers.core.training.settings import require_fields
from rlhf_helpers.dpo.data import DPODataset
from rlhf_helpers.dpo.objectives import OBJECTIVES, BatchLosses, LossFn, batch_losses_of
from rlhf_helpers.dpo.settings import DPOSettings
from rlhf_helpers.dpo.training import dpo_update


@dataclass(frozen=True)
class OnlineDPOSettings(DPOSettings):
    """How often and how widely online DPO samples; the pairs of a step are learned `epochs` times over.

    Few prompts per step are online DPO (Guo et al. 2024); many, with refresh_reference=1, are iterative DPO.
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
        One row per step: objective/scores, objective/kl (nats per response, a sum over its tokens),
        objective/kl_per_token, eos_fraction, response_length, frac_reward_zero_std (share of ties) of the
        samples; loss and the names of `DPOTrainer.train`, means over the updates of the step.

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
    if settings.refresh_reference:
        require_no_adapters(model, settings)
        if ref_model is not None:
            reference = frozen_copy(ref_model)  # it will be overwritten, and the caller's must not be
    engine = _start(model, settings, prompts, reference)
    if resume:
        engine.resume()
    for step in engine.steps():
        # Sample several answers to each prompt, and score them.
        indices = engine.batch(range(len(prompts)), settings.prompts_per_step)
        sampled_rows = [index for index in indices for _ in range(group)]
        sampled_prompts = [prompts[index] for index in sampled_rows]
        rollout = generate(
            model, tokenizer, sampled_prompts, max_new_tokens=settings.max_new_tokens, seed=engine.step_seed
        )
        further = {name: [values[index] for index in sampled_rows] for name, values in columns.items()}
        scores = as_reward_fn(reward_fn)(rollout.prompts, rollout.responses, **further).to(engine.device)
        final_scores = scores - settings.missing_eos_penalty * ~rollout.ended
        # Log-probs of the reference now: it may be another one at the next step.
        with torch.no_grad():
            ref_logps = rollout_logps(reference, rollout).sum(-1)
        data = DPODataset.from_rollout(rollout, final_scores, ref_logps, group=group)
        metrics = _sample_metrics(rollout, scores, ref_logps, data)
        metrics |= online_dpo_update(engine, data, batch_losses)
        if settings.refresh_reference and (step + 1) % settings.refresh_reference == 0:
            load_full_weights(reference, full_weights(model))
        if eval_fn is not None and engine.is_due(settings.eval_every or settings.steps):
            metrics |= eval_fn(model)
        engine.log(metrics)
    return engine.history


def require_no_adapters(model: nn.Module, settings: OnlineDPOSettings) -> None:
    """Refuse LoRA, where the reference is the model without its adapters and cannot become the policy.

    Raises:
        ValueError: The model has adapters or will get them.
    """
    if settings.lora or has_adapter(model):
        raise ValueError(
            "refresh_reference must be 0 with LoRA: merge the adapters and train new ones instead"
        )


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
    """Make the engine; its checkpoints hold the reference too, if it moves."""
    engine = Engine(
        model,
        settings,
        total_steps=settings.steps,
        optimizer_steps_per_step=settings.epochs * settings.optimizer_steps_per_epoch,
        extra_state={"reference": reference} if settings.refresh_reference else {},
        resume_must_match={
            "prompts": checksum([*prompts]),
            "reference": fingerprint(reference),
        },
    )
    reference.to(engine.device)  # with several processes the engine chose the device
    return engine


def _sample_metrics(
    rollout: Rollout, scores: Float[Tensor, "B"], ref_logps: Float[Tensor, "B"], data: DPODataset
) -> dict[str, float]:
    """Describe this process's samples; `Engine.log` averages over the processes."""
    kl = rollout.old_logps.sum(-1) - ref_logps
    lengths = rollout.response_lengths.float()
    return {
        "objective/scores": scores.mean().item(),
        "objective/kl": kl.mean().item(),
        "objective/kl_per_token": (kl.sum() / lengths.sum()).item(),
        "eos_fraction": rollout.ended.float().mean().item(),
        "response_length": lengths.mean().item(),
        "frac_reward_zero_std": 1 - sum(data.weights) / len(data),
    }

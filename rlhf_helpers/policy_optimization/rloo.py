"""RLOO: REINFORCE whose baseline is the mean reward of the other samples of the same prompt."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_helpers.core.generation import Rollout
from rlhf_helpers.core.models import RewardFn, frozen_copy
from rlhf_helpers.core.policy_losses import approx_kl, rloo_advantages
from rlhf_helpers.core.tensors import masked_mean, require_number, require_shapes
from rlhf_helpers.core.training import Engine, History, TrainingSettings
from rlhf_helpers.core.training.settings import RANK_STRIDE
from rlhf_helpers.policy_optimization.rollouts import (
    Columns,
    collect,
    policy_logps,
    repeat_columns,
    require_columns,
    rollout_metrics,
    score,
    sequence_kl,
)

PolicyLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class RLOOSettings(TrainingSettings):
    """How far, how wide and how carefully RLOO walks; a bad value raises ValueError naming it.

    `accumulation_steps` cuts the samples of a step into as many micro-batches: the same update, less memory.
    """

    learning_rate: float = 3e-4  # for the tiny assistant; a model of 100 M parameters wants about 1e-6
    schedule: str = "constant"  # the samples change with the policy: there is no end to anneal towards
    steps: int = 60  # turns of the loop, one update each
    prompts_per_step: int = 16  # more prompts: less noise a step, and a longer step
    samples_per_prompt: int = 4  # G, at least 2: the other samples are the baseline; the paper's 4
    max_new_tokens: int = 64  # a response that is cut here has not ended, and earns what its stump earns
    temperature: float = 1.0  # of sampling, reference and update alike, or the ratio is not 1
    kl_coef: float = 0.05  # price of one nat of KL to the reference, in units of the score
    missing_eos_penalty: float = 0.0  # taken off the score of a response that did not end
    eval_every: int = 0  # steps between calls of eval_fn; 0: after the last step alone

    def __post_init__(self) -> None:
        """Refuse values that would train wrongly or not at all."""
        super().__post_init__()
        for field in ("steps", "prompts_per_step", "samples_per_prompt", "max_new_tokens", "eval_every"):
            value, least = getattr(self, field), {"samples_per_prompt": 2, "eval_every": 0}.get(field, 1)
            require_number(f"RLOOSettings.{field}", value, at_least=least)
            if not isinstance(value, int):
                raise ValueError(f"RLOOSettings.{field} must be a whole number, got {value!r}")
        require_number("RLOOSettings.temperature", self.temperature, above=0)
        require_number("RLOOSettings.kl_coef", self.kl_coef, at_least=0)
        require_number("RLOOSettings.missing_eos_penalty", self.missing_eos_penalty, at_least=0)
        samples = self.prompts_per_step * self.samples_per_prompt
        if samples % self.accumulation_steps:
            raise ValueError(
                f"RLOOSettings.accumulation_steps must divide the {samples} samples of a step, "
                f"got {self.accumulation_steps}"
            )


def reinforce_loss(
    logps: Float[Tensor, "B T"], old_logps: Float[Tensor, "B T"], advantages: Float[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """Policy gradient per token, to be minimised: -A_t log pi(y_t | y_<t).

    Its gradient is that of the expected reward; its value says nothing about progress. `old_logps` is not
    used: each batch is sampled by the policy that it updates. Williams 1992. Lesson 2.

    Raises:
        ValueError: shapes differ.
    """
    require_shapes("B T", logps=logps, old_logps=old_logps, advantages=advantages)
    return -advantages * logps


def rloo(
    model: torch.nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    reward_fn: RewardFn,
    settings: RLOOSettings,
    *,
    ref_model: torch.nn.Module | None = None,
    columns: Columns | None = None,
    eval_fn: Callable[[torch.nn.Module], dict[str, float]] | None = None,
    loss_fn: PolicyLoss = reinforce_loss,
    resume: bool = False,
) -> History:
    """Train `model` in place to earn more reward without leaving the reference far behind.

    R_i = score_i - kl_coef sum_t (log pi - log pi_ref) - missing_eos_penalty [no EOS];
    A_i = R_i - mean of the other samples' R;  loss = mean_i sum_t loss_fn(logp_it, old_logp_it, A_i)
    prompts: texts; a step draws prompts_per_step of them in seeded order, each once an epoch.
    reward_fn: a RewardFn or a reward model; columns: name -> one entry a prompt, repeated for each sample.
    ref_model: what KL is measured against; None: a frozen copy of `model` as it is given.
    eval_fn: model -> metrics, every eval_every steps and after the last. loss_fn: (logps, old_logps,
    advantages), each (B, T) -> (B, T); the learner's own fits here. resume: continue from the newest
    checkpoint of settings.run_dir; give model and ref_model as at the start.
    Returns a row a step, measured before its update: the names of `rollout_metrics`, loss, policy/entropy
    (nats a token), policy/approxkl and val/ratio (0 and 1 while on policy, or something is wrong).
    Raises ValueError for prompts, columns or rewards of the wrong shape. Ahmadian et al. 2024. Lesson 2.
    """
    require_columns(prompts, columns := dict(columns or {}))
    reference = _reference(model, ref_model)
    group = settings.samples_per_prompt
    engine = _start(model, settings, prompts, reference, resume)
    for step in engine.steps():
        rows = engine.batch(range(len(prompts)), settings.prompts_per_step)
        rollout = collect(
            model, tokenizer, [prompts[row] for row in rows],
            samples_per_prompt=group, max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature, seed=_step_seed(engine, step),
        )  # fmt: skip
        scores = score(reward_fn, rollout, repeat_columns(columns, rows, group))
        with torch.no_grad():
            ref_logps, _ = policy_logps(reference, rollout, temperature=settings.temperature)
        penalties = settings.kl_coef * sequence_kl(rollout, ref_logps)
        rewards = scores - penalties - settings.missing_eos_penalty * ~rollout.ended
        advantages = rloo_advantages(rewards.view(-1, group)).flatten()
        metrics = rollout_metrics(rollout, scores, rewards, ref_logps, samples_per_prompt=group)
        metrics |= _update(engine, rollout, advantages, loss_fn, rows)
        if eval_fn is not None and _is_due(settings, step + 1):
            metrics |= eval_fn(model)
        engine.log(metrics)
    return engine.history


def _reference(model: torch.nn.Module, ref_model: torch.nn.Module | None) -> torch.nn.Module:
    if ref_model is model:
        raise ValueError("ref_model is the model that is trained, so KL would stay 0; give a frozen_copy")
    return frozen_copy(model) if ref_model is None else ref_model


def _start(
    model: torch.nn.Module,
    settings: RLOOSettings,
    prompts: Sequence[str],
    reference: torch.nn.Module,
    resume: bool,
) -> Engine:
    """An engine at the first step, or at the newest checkpoint."""
    same = {"prompts": _digest(prompts), "reference": _weight_sum(reference)}
    updates = settings.accumulation_steps
    engine = Engine(model, settings, total_steps=settings.steps, updates_per_step=updates, must_match=same)
    if resume:
        engine.resume()
    return engine


def _is_due(settings: RLOOSettings, done: int) -> bool:
    """Whether the policy is evaluated after so many steps."""
    return done == settings.steps or bool(settings.eval_every and done % settings.eval_every == 0)


def _update(
    engine: Engine,
    rollout: Rollout,
    advantages: Float[Tensor, "B"],
    loss_fn: PolicyLoss,
    rows: Sequence[int],
) -> dict[str, float]:
    """One optimiser step on the rollout; returns the policy's metrics from before it."""
    settings: RLOOSettings = engine.settings
    size = len(advantages) // settings.accumulation_steps
    losses, logps, entropies = [], [], []
    for start in range(0, len(rollout), size):
        part = rollout[start : start + size]
        now, entropy = policy_logps(engine.model, part, temperature=settings.temperature)
        spread = advantages[start : start + size, None].expand_as(now)  # a token shares in its response's
        per_token = loss_fn(now, part.old_logps, spread)
        require_shapes("B T", logps=now, loss=per_token)
        # A sum over tokens: the log-prob of a response is one, and a mean would favour long bad ones.
        loss = torch.where(part.response_mask, per_token, 0.0).sum(-1).mean()
        engine.update(loss, rows=rows)
        losses.append(loss.item())
        logps.append(now.detach())
        entropies.append(entropy * part.response_mask.sum())
    now, mask = torch.cat(logps), rollout.response_mask
    return {
        "loss": sum(losses) / len(losses),
        "policy/approxkl": approx_kl(now, rollout.old_logps, mask).item(),
        "policy/entropy": (torch.stack(entropies).sum() / mask.sum()).item(),
        "val/ratio": masked_mean((now - rollout.old_logps).exp(), mask).item(),
    }


def _step_seed(engine: Engine, step: int) -> int:
    """Seed of this step's sampling, of (seed, process, step) alone: a resumed run draws the same text."""
    seed = engine.settings.seed + RANK_STRIDE * engine.accelerator.process_index
    return int(np.random.default_rng([seed, step]).integers(2**31))


def _digest(prompts: Sequence[str]) -> str:
    """Short fingerprint of the prompts: a resumed run must draw from the same ones."""
    return hashlib.sha256("\0".join(prompts).encode()).hexdigest()[:16]


def _weight_sum(model: torch.nn.Module) -> str:
    """Fingerprint of the reference: a resumed run must not take the trained model for it."""
    return f"{sum(p.detach().double().sum().item() for p in model.parameters()):.8g}"

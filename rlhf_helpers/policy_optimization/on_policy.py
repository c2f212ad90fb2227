"""What every on-policy loop holds: settings, batches of the policy's own samples, and the update on them."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_helpers.core.generation import Rollout
from rlhf_helpers.core.models import RewardFn, frozen_copy
from rlhf_helpers.core.policy_losses import approx_kl, clip_fraction
from rlhf_helpers.core.tensors import masked_mean, require_shapes
from rlhf_helpers.core.text import Columns, require_columns
from rlhf_helpers.core.training import Engine, TrainingSettings
from rlhf_helpers.core.training.settings import require_fields
from rlhf_helpers.policy_optimization.rollouts import (
    collect,
    policy_logps,
    policy_outputs,
    repeat_columns,
    rollout_metrics,
    score,
)

Terms = Callable[..., dict[str, Tensor]]
Weigh = Callable[[Tensor], Tensor]


class RunOptions(TypedDict, total=False):
    """What every on-policy loop takes beside its settings, all optional.

    ref_model: what KL is measured against; None: a frozen copy of the model as it is given.
    columns: name -> one entry a prompt, repeated for each sample and handed to the reward.
    eval_fn: model -> metrics (held-out score, capability), every eval_every steps and after the last.
    resume: continue from the newest checkpoint of settings.run_dir; give the models as at the start.
    """

    ref_model: torch.nn.Module | None
    columns: Columns | None
    eval_fn: Callable[[torch.nn.Module], dict[str, float]] | None
    resume: bool


@dataclass(frozen=True)
class OnPolicySettings(TrainingSettings):
    """How far, how wide and how carefully a loop walks; a bad value raises ValueError naming it.

    `accumulation_steps` cuts a minibatch into as many micro-batches: the same update, less memory.
    """

    learning_rate: float = 3e-4  # for the tiny assistant; a model of 100 M parameters wants about 1e-6
    schedule: str = "constant"  # the samples change with the policy: there is no end to anneal towards
    steps: int = 60  # turns of the loop
    prompts_per_step: int = 16  # more prompts: less noise a step, and a longer step
    samples_per_prompt: int = 4  # G
    epochs: int = 1  # passes over the samples of a step; above 1 the loss should clip the ratio
    minibatches: int = 1  # a pass is cut into so many, an optimiser step each; shuffled
    max_new_tokens: int = 64  # a response that is cut here has not ended, and earns what its stump earns
    temperature: float = 1.0  # of sampling, reference and update alike, or the ratio is not 1
    kl_coef: float = 0.05  # price of one nat of KL to the reference, in units of the score
    entropy_coef: float = 0.0  # bonus for one nat of entropy at a token: a little keeps exploration alive
    missing_eos_penalty: float = 0.0  # taken off the score of a response that did not end
    length_penalty: float = 0.0  # taken off the score for each response token
    eval_every: int = 0  # steps between calls of eval_fn; 0: after the last step alone

    def __post_init__(self) -> None:
        """Refuse values that would train wrongly or not at all."""
        super().__post_init__()
        counts = (
            "steps",
            "prompts_per_step",
            "samples_per_prompt",
            "epochs",
            "minibatches",
            "max_new_tokens",
        )
        require_fields(self, *counts, whole=True, at_least=1)
        require_fields(self, "eval_every", whole=True, at_least=0)
        require_fields(self, "temperature", above=0)
        require_fields(self, "kl_coef", "entropy_coef", "missing_eos_penalty", "length_penalty", at_least=0)
        pieces, samples = (
            self.minibatches * self.accumulation_steps,
            self.prompts_per_step * self.samples_per_prompt,
        )
        if samples % pieces:
            raise ValueError(
                f"{type(self).__name__}: minibatches x accumulation_steps must divide the {samples} samples "
                f"of a step, got {self.minibatches} x {self.accumulation_steps}"
            )


@dataclass(frozen=True)
class Batch:
    """One step's samples and what was said of them; constant while the policy learns from them.

    scores: what the reward said, (B,); rewards: the same less the penalties for missing EOS and length.
    """

    rollout: Rollout
    scores: Float[Tensor, "B"]
    rewards: Float[Tensor, "B"]
    ref_logps: Float[Tensor, "B T"]
    rows: list[int]  # of the prompts, for error messages


class OnPolicyRun:
    """What the on-policy loops share: an engine, the reference, and how to sample, update and log."""

    def __init__(
        self,
        policy: torch.nn.Module,
        tokenizer: Any,
        prompts: Sequence[str] | None,
        reward_fn: RewardFn | torch.nn.Module,
        settings: OnPolicySettings,
        *,
        value_head: torch.nn.Module | None = None,
        extra_state: Mapping[str, Any] | None = None,
        must_match: Mapping[str, Any] | None = None,
        ref_model: torch.nn.Module | None = None,
        columns: Columns | None = None,
        eval_fn: Callable[[torch.nn.Module], dict[str, float]] | None = None,
        resume: bool = False,
    ) -> None:
        """Start at the first step or, with `resume`, at the newest checkpoint; see `RunOptions`.

        prompts None: no loop, the caller brings its samples. Raises ValueError for prompts or columns of the
        wrong shape, a reference that is the trained model, another run's checkpoint.
        """
        if ref_model is policy:
            raise ValueError("ref_model is the model that is trained, so KL would stay 0; give a frozen_copy")
        self.policy, self.tokenizer, self.prompts, self.reward_fn = policy, tokenizer, prompts, reward_fn
        self.settings, self.value_head, self.eval_fn = settings, value_head, eval_fn
        self.columns, same = dict(columns or {}), {"loop": type(settings).__name__, **(must_match or {})}
        if prompts is not None:
            require_columns(prompts, self.columns)
            same["prompts"] = hashlib.sha256("\0".join(prompts).encode()).hexdigest()[:16]
        self.reference = frozen_copy(policy) if ref_model is None else ref_model
        # A fingerprint: a resumed run must not take the trained model for its reference.
        total = sum(p.detach().double().sum().item() for p in self.reference.parameters())
        same["reference"] = f"{total:.8g}"
        both = {"policy": policy, "value_head": value_head}
        self.engine = Engine(
            policy if value_head is None else torch.nn.ModuleDict(both), settings,
            total_steps=None if prompts is None else settings.steps,
            updates_per_step=settings.epochs * settings.minibatches * settings.accumulation_steps,
            extra_state=extra_state, must_match=same,
        )  # fmt: skip
        if resume:
            self.engine.resume()

    def collect(self) -> Batch:
        """Sample this step's prompts, ask the reward, compare with the reference."""
        settings, group = self.settings, self.settings.samples_per_prompt
        rows = self.engine.batch(range(len(self.prompts)), settings.prompts_per_step)
        rollout = collect(
            self.policy, self.tokenizer, [self.prompts[row] for row in rows],
            samples_per_prompt=group, max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature, seed=self.engine.step_seed,
        )  # fmt: skip
        scores = score(self.reward_fn, rollout, repeat_columns(self.columns, rows, group))
        return self.judge(rollout, scores, rows)

    def judge(self, rollout: Rollout, scores: Float[Tensor, "B"], rows: list[int]) -> Batch:
        """Take the penalties off the scores, and read the reference's log-probs.

        Raises ValueError for a greedy rollout.
        """
        if rollout.greedy:
            raise ValueError(
                "this rollout was decoded greedily, so it is no sample of the policy and cannot train it: "
                "generate it without greedy=True"
            )
        settings = self.settings
        penalties = settings.missing_eos_penalty * ~rollout.ended
        penalties = penalties + settings.length_penalty * rollout.response_lengths
        with torch.no_grad():
            ref_logps, _ = policy_logps(self.reference, rollout, temperature=settings.temperature)
        return Batch(rollout, scores, scores - penalties, ref_logps, rows)

    def update(
        self,
        batch: Batch,
        terms_of: Terms,
        weigh: Weigh,
        *,
        cliprange: float | None = None,
        early_stop_kl: float | None = None,
        extra_loss: Callable[[], Tensor] | None = None,
    ) -> dict[str, float]:
        """Go over the samples in epochs and minibatches, an optimiser step each; returns the means.

        loss = sum_it w_it sum_terms l_it [+ extra_loss()]
        terms_of: (rows, logps[, values]) -> name -> loss (B, T). weigh: a minibatch's mask (B, T) -> w, its
        reduction: `per_response` or `per_token`. early_stop_kl: where the KL to the sampler, nats a token,
        is above it in a minibatch (in its first micro-batch), nothing more of this step is learned from.
        """
        settings, rollout, losses, seen = self.settings, batch.rollout, [], []
        for part, weights, first in self._micro_batches(rollout.response_mask, weigh):
            logps, entropies, *values = policy_outputs(
                self.policy, rollout[part], temperature=settings.temperature, value_head=self.value_head,
                entropy_gradient=settings.entropy_coef > 0,
            )  # fmt: skip
            seen.append(_health(logps, entropies, rollout[part], cliprange))
            # Before the backward pass, or this minibatch's gradient would be left over for the next step.
            if first and early_stop_kl is not None and self.mean(seen[-1]["policy/approxkl"]) > early_stop_kl:
                break
            terms = terms_of(part, logps, *values)
            if settings.entropy_coef:
                terms["loss/entropy"] = -settings.entropy_coef * entropies
            require_shapes("B T", logps=logps, **terms)
            mask = rollout.response_mask[part]
            sums = {name: (weights * torch.where(mask, term, 0.0)).sum() for name, term in terms.items()}
            sums = {name: settings.accumulation_steps * value for name, value in sums.items()}
            if extra_loss is not None:
                sums["loss/ptx"] = extra_loss()
            self.engine.update(sum(sums.values()), rows=batch.rows)
            losses.append({name: value.item() for name, value in sums.items()})
        means = {name: sum(row[name] for row in losses) / len(losses) for name in (losses or [{}])[0]}
        means |= {"loss": sum(means.values())} if means else {}
        return means | _averages(seen) | {"policy/updates": len(losses) // settings.accumulation_steps}

    def _micro_batches(self, mask: Tensor, weigh: Weigh) -> Iterator[tuple[Tensor, Tensor, bool]]:
        """Rows, weights, and whether a minibatch starts here; shuffled where there are several."""
        pieces, count = self.settings.accumulation_steps, min(self.settings.minibatches, len(mask))
        for epoch in range(self.settings.epochs):
            order = np.arange(len(mask))
            if count > 1:
                order = np.random.default_rng([self.engine.step_seed, epoch]).permutation(len(mask))
            for minibatch in torch.from_numpy(order).tensor_split(count):
                weights = weigh(mask[minibatch]).tensor_split(pieces)
                for place, part in enumerate(minibatch.tensor_split(pieces)):
                    yield part, weights[place], place == 0

    def mean(self, value: float) -> float:
        """Average a number over the processes, so that all of them decide alike."""
        if self.engine.accelerator.num_processes == 1:
            return value
        number = torch.tensor(value, dtype=torch.float64, device=self.engine.device)
        return self.engine.accelerator.reduce(number, "mean").item()

    def log(self, batch: Batch, rewards: Float[Tensor, "B"], metrics: Mapping[str, float]) -> None:
        """Write this step's row: of the samples, of the update, and of eval_fn when it is due."""
        settings, done = self.settings, self.engine.step + 1
        group = settings.samples_per_prompt if self.prompts is not None else 1
        row = rollout_metrics(batch.rollout, batch.scores, rewards, batch.ref_logps, samples_per_prompt=group)
        row |= metrics
        due = done == settings.steps or (settings.eval_every and done % settings.eval_every == 0)
        if self.eval_fn is not None and due:
            row |= self.eval_fn(self.policy)
        self.engine.log(row)


def per_response(mask: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Weights that sum a loss over tokens and average over responses: the log-prob of a response is a sum.

    With a mean over its tokens instead, a long bad response would cost no more than a short one.
    """
    return mask / len(mask)


def per_token(mask: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Weights that average a loss over all real tokens of the minibatch, in each process of its own."""
    return mask / mask.sum()


def _health(logps: Tensor, entropies: Tensor, part: Rollout, cliprange: float | None) -> dict[str, float]:
    """How far the policy is from the one that sampled; tokens: how much this part weighs."""
    mask, logps = part.response_mask, logps.detach()
    row = {
        "policy/approxkl": approx_kl(logps, part.old_logps, mask),
        "policy/entropy": masked_mean(entropies.detach(), mask),
        "val/ratio": masked_mean((logps - part.old_logps).exp(), mask),
        "tokens": mask.sum(),
    }
    if cliprange is not None:
        row["policy/clipfrac"] = clip_fraction(logps, part.old_logps, mask, cliprange=cliprange)
    return {name: value.item() for name, value in row.items()}


def _averages(seen: list[dict[str, float]]) -> dict[str, float]:
    """Means over all tokens seen, and the first ratio and KL: 1 and 0, or something is wrong."""
    total = sum(row["tokens"] for row in seen)
    names = [name for name in seen[0] if name != "tokens"]
    means = {name: sum(row[name] * row["tokens"] for row in seen) / total for name in names}
    return means | {f"{name}_at_start": seen[0][name] for name in ("policy/approxkl", "val/ratio")}

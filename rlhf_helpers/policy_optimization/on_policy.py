"""What the on-policy loops share: settings, batches of the policy's own samples, minibatches, the log row.

A loop reads: `start_run`; per step `sample_batch`, advantages, the loop's own update, `log_step`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypedDict

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_helpers.core.generation import Rollout, encode_prompts, rollout_logps, rollout_outputs
from rlhf_helpers.core.lora import reference_model
from rlhf_helpers.core.models import as_reward_fn
from rlhf_helpers.core.policy_losses import approx_kl, clip_fraction
from rlhf_helpers.core.rollouts import collect, repeat_columns, rollout_metrics
from rlhf_helpers.core.tensors import masked_mean
from rlhf_helpers.core.text import Columns, require_columns
from rlhf_helpers.core.training import Engine, TrainingSettings
from rlhf_helpers.core.training.resume import checksum, fingerprint
from rlhf_helpers.core.training.settings import require_fields


class RunOptions(TypedDict, total=False):
    """What every on-policy loop takes besides its settings, all optional.

    ref_model: what KL is measured against; None: a frozen copy of the model as it is given, or,
        with LoRA, the model without its adapters.
    columns: name -> one entry per prompt, repeated for each sample and handed to the reward.
    eval_fn: model -> metrics (held-out score, capability), every eval_every steps and after the last.
    resume: continue from the newest checkpoint of settings.run_dir; give the models as at the start.
    extra_state: name -> object with state_dict and load_state_dict, saved in the checkpoints.
    """

    ref_model: torch.nn.Module | None
    columns: Columns | None
    eval_fn: Callable[[torch.nn.Module], dict[str, float]] | None
    resume: bool
    extra_state: Mapping[str, Any] | None


@dataclass(frozen=True)
class OnPolicySettings(TrainingSettings):
    """Settings of every on-policy loop; a bad value raises ValueError naming it.

    `accumulation_steps` cuts a minibatch into as many micro-batches: the same update, less memory.
    """

    tiny_learning_rate: float = 3e-4
    schedule: str = "constant"  # the samples change with the policy: there is no end to anneal towards
    steps: int = 60  # turns of the loop
    prompts_per_step: int = 16  # more prompts: less noise per step, and longer steps
    samples_per_prompt: int = 4  # G; more of them make a better baseline
    epochs: int = 1  # passes over the samples of a step; above 1 the loss should clip the ratio
    minibatches: int = 1  # per pass, shuffled; one optimizer step each
    max_new_tokens: int = 64  # a response that is cut here has not ended, and is scored as it stands
    temperature: float = 1.0  # of sampling, reference and update: else the first ratio would not be 1
    kl_coef: float = 0.05  # what one nat of KL to the reference costs, in units of the score
    entropy_coef: float = 0.0  # bonus for one nat of entropy at a token: a little keeps exploration alive
    missing_eos_penalty: float = 0.0  # taken off the score of a response that did not end
    length_penalty: float = 0.0  # taken off the score for each response token
    eval_every: int = 0  # steps between calls of eval_fn; 0: only after the last step

    def __post_init__(self) -> None:
        """Refuse values that would train wrongly or not at all."""
        super().__post_init__()
        counts = ("steps", "prompts_per_step", "samples_per_prompt", "epochs", "minibatches")
        require_fields(self, *counts, "max_new_tokens", whole=True, at_least=1)
        require_fields(self, "eval_every", whole=True, at_least=0)
        require_fields(self, "temperature", above=0)
        require_fields(self, "kl_coef", "entropy_coef", "missing_eos_penalty", "length_penalty", at_least=0)
        require_even_split(self, processes=1)

    def for_prompts(self, prompts: Sequence[str], **changes: Any) -> Self:
        """Return these settings for so many prompts: where they are few, a step takes all of them."""
        fewer = min(self.prompts_per_step, max(1, len(prompts)))
        return replace(self, prompts_per_step=fewer, **changes)


def require_even_split(settings: OnPolicySettings, *, processes: int) -> None:
    """Refuse samples that do not fill every process's micro-batches; ValueError names the numbers."""
    samples = settings.prompts_per_step * settings.samples_per_prompt
    if samples % (settings.minibatches * settings.accumulation_steps * processes):
        raise ValueError(
            f"{type(settings).__name__}: minibatches x accumulation_steps x processes must divide the "
            f"{samples} samples of a step, got {settings.minibatches} x {settings.accumulation_steps} x "
            f"{processes}"
        )


@dataclass(frozen=True)
class Batch:
    """One step's samples and what they earned; constant while the policy learns from them.

    scores: output of reward_fn, (B,). penalized_scores: the same minus the penalties for a missing EOS and
    for length. prompt_rows: indices of the prompts in the data, for error messages.
    """

    rollout: Rollout
    scores: Float[Tensor, "B"]
    penalized_scores: Float[Tensor, "B"]
    ref_logps: Float[Tensor, "B T"]
    prompt_rows: list[int]


@dataclass
class PolicyRun:
    """What an on-policy loop holds from its first step to its last."""

    policy: torch.nn.Module
    reference: torch.nn.Module
    tokenizer: Any
    prompts: Sequence[str] | None
    columns: Columns
    reward_fn: Any  # a RewardFn; None where the caller brings the scores
    settings: Any  # those of the loop, a subclass of OnPolicySettings
    engine: Engine
    eval_fn: Callable[[torch.nn.Module], dict[str, float]] | None


def start_run(
    policy: torch.nn.Module,
    tokenizer: Any,
    prompts: Sequence[str] | None,
    reward_fn: Any,
    settings: OnPolicySettings,
    *,
    value_head: torch.nn.Module | None = None,
    extra_state: Mapping[str, Any] | None = None,
    resume_must_match: Mapping[str, Any] | None = None,
    ref_model: torch.nn.Module | None = None,
    columns: Columns | None = None,
    eval_fn: Callable[[torch.nn.Module], dict[str, float]] | None = None,
    resume: bool = False,
) -> PolicyRun:
    """Check the arguments, copy the reference, make the engine; start at step 0 or at a checkpoint.

    Args:
        prompts, reward_fn: None where there is no loop and the caller brings the samples and their scores.
        value_head: trained along with the policy.
        resume_must_match: further facts that a resumed run must share.
        ref_model, columns, eval_fn, resume, extra_state: see `RunOptions`.

    Raises:
        ValueError: prompts or columns of the wrong shape, a reference that is the trained model, a
            checkpoint of another run.
    """
    same = {"loop": type(settings).__name__, **(resume_must_match or {})}
    columns = dict(columns or {})
    if prompts is not None:
        require_columns(prompts, columns)
        if settings.prompts_per_step > len(prompts):
            raise ValueError(
                f"prompts_per_step {settings.prompts_per_step} exceeds the {len(prompts)} prompts"
            )
        # A prompt that is too long is refused now, not at the step that draws it.
        lengths = {"max_new_tokens": settings.max_new_tokens, "max_length": settings.max_length}
        encode_prompts(policy, tokenizer, prompts, **lengths)
        reward_fn = as_reward_fn(reward_fn)
        same["prompts"] = checksum([*prompts])
    # Copied before the engine, which may spread the weights over processes: those cannot be copied.
    reference = reference_model(policy, ref_model, lora=settings.lora)
    same["reference"] = fingerprint(reference)  # the trained model must not be taken for it
    trained = policy
    if value_head is not None:
        trained = torch.nn.ModuleDict({"policy": policy, "value_head": value_head})
    engine = Engine(
        trained,
        settings,
        total_steps=None if prompts is None else settings.steps,
        optimizer_steps_per_step=settings.epochs * settings.minibatches,
        extra_state=extra_state,
        resume_must_match=same,
    )
    reference.to(engine.device)  # with several processes the engine chose the device
    require_even_split(settings, processes=engine.accelerator.num_processes)
    if resume:
        engine.resume()
    return PolicyRun(policy, reference, tokenizer, prompts, columns, reward_fn, settings, engine, eval_fn)


def sample_batch(run: PolicyRun) -> Batch:
    """Sample responses to this step's prompts, ask the reward, compare with the reference."""
    settings, group = run.settings, run.settings.samples_per_prompt
    # Prompts and sampling seed are functions of (seed, step): a resumed run draws the same.
    rows = run.engine.batch(len(run.prompts), settings.prompts_per_step)  # pyright: ignore[reportArgumentType]
    rollout = collect(
        run.policy,
        run.tokenizer,
        [run.prompts[row] for row in rows],  # pyright: ignore[reportOptionalSubscript]
        samples_per_prompt=group,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        seed=run.engine.step_seed,
    )
    # Columns of the prompts (references, tests) are repeated for every sample of a prompt.
    columns = repeat_columns(run.columns, rows, group)
    scores = run.reward_fn(rollout.prompts, rollout.responses, **columns)
    return make_batch(run, rollout, scores.to(run.engine.device), rows)


def make_batch(run: PolicyRun, rollout: Rollout, scores: Float[Tensor, "B"], rows: list[int]) -> Batch:
    """Take the penalties off the scores, and read the log-probs of the reference.

    Raises:
        ValueError: the rollout was decoded greedily.
    """
    if rollout.greedy:
        raise ValueError(
            "this rollout was decoded greedily, so it is not a sample of the policy and cannot train it: "
            "generate it without greedy=True"
        )
    settings = run.settings
    penalties = settings.missing_eos_penalty * ~rollout.ended
    penalties = penalties + settings.length_penalty * rollout.response_mask.sum(-1)
    with torch.no_grad():
        ref_logps = rollout_logps(run.reference, rollout, temperature=settings.temperature)
    return Batch(rollout, scores, scores - penalties, ref_logps, rows)


def minibatches(run: PolicyRun, count: int) -> Iterator[Tensor]:
    """Yield the row indices for each optimizer step in turn: epochs x minibatches.

    Each epoch has its own seeded order where there are several minibatches.
    """
    settings = run.settings
    pieces = min(settings.minibatches, count)
    for epoch in range(settings.epochs):
        order = np.arange(count)
        if pieces > 1:
            order = np.random.default_rng([run.engine.step_seed, epoch]).permutation(count)
        yield from torch.from_numpy(order).tensor_split(pieces)


def outputs_now(
    run: PolicyRun, part: Rollout, value_head: torch.nn.Module | None = None
) -> list[Float[Tensor, "B T"]]:
    """Return log-probs and entropies of sampled tokens under the policy now, with a value head their values.

    At the temperature of sampling. The entropies have a gradient only where the loss contains them.
    """
    return rollout_outputs(
        run.policy,
        part,
        temperature=run.settings.temperature,
        entropies=True,
        entropy_gradient=run.settings.entropy_coef > 0,
        value_head=value_head,
    )


@dataclass
class UpdateMetrics:
    """Collects the losses of a step's updates, and how far the policy is from the one that sampled."""

    run: PolicyRun
    optimizer_steps: int = 0
    losses: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    # of each statistic, over all tokens
    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    tokens: int = 0
    at_start: dict[str, float] = field(default_factory=dict)  # of the first micro-batch
    latest: dict[str, float] = field(default_factory=dict)

    def add_stats(
        self, logps: Tensor, entropies: Tensor, part: Rollout, *, cliprange: float | None = None
    ) -> None:
        """Note KL, entropy and ratio of one micro-batch, means over its tokens; `latest` holds the newest."""
        mask = part.response_mask
        stats = {
            "policy/approxkl": approx_kl(logps, part.old_logps, mask),
            "policy/entropy": masked_mean(entropies.detach(), mask),
            "val/ratio": masked_mean((logps.detach() - part.old_logps).exp(), mask),
        }
        if cliprange is not None:
            stats["policy/clipfrac"] = clip_fraction(logps, part.old_logps, mask, cliprange=cliprange)
        self.latest = {name: value.item() for name, value in stats.items()}
        self.at_start = self.at_start or self.latest
        # Weighted by tokens: minibatches differ in length.
        tokens = int(mask.sum())
        self.tokens += tokens
        for name, value in self.latest.items():
            self.sums[name] += tokens * value

    def add_losses(self, **losses: Tensor) -> None:
        """Note the parts of one micro-batch's loss; micro-batches and processes add up to the minibatch's."""
        for name, value in losses.items():
            self.losses[f"loss/{name}"] += value.item()

    def row(self) -> dict[str, float]:
        """Return the losses per optimizer step, the means of the rest over tokens, and the first values.

        policy/approxkl_at_start and val/ratio_at_start, of the first micro-batch, are 0 and 1 (about 1e-2 off
        in bf16), or something is wrong: dropout, temperature, alignment.
        """
        engine, steps = self.run.engine, self.optimizer_steps
        if not self.run.settings.entropy_coef:
            self.losses.pop("loss/entropy", None)
        row = {name: engine.sum(value) / steps for name, value in self.losses.items() if steps}
        if row:
            row["loss"] = sum(row.values())
        tokens = engine.sum(self.tokens)
        row |= {name: engine.sum(value) / tokens for name, value in self.sums.items()}
        row |= {f"{name}_at_start": self.at_start[name] for name in ("policy/approxkl", "val/ratio")}
        return row | {"policy/updates": steps}


def log_step(run: PolicyRun, batch: Batch, rewards: Float[Tensor, "B"], metrics: Mapping[str, float]) -> None:
    """Write this step's row: of the samples, of the update, and of eval_fn when it is due.

    rewards: what the loop maximized: scores minus penalties and, where it is part of the reward, the KL.
    """
    settings = run.settings
    group = settings.samples_per_prompt if run.prompts is not None else 1
    row = rollout_metrics(batch.rollout, batch.scores, rewards, batch.ref_logps, samples_per_prompt=group)
    row |= metrics
    if run.eval_fn is not None and run.engine.is_due(settings.eval_every or settings.steps):
        row |= run.eval_fn(run.policy)
    run.engine.log(row)

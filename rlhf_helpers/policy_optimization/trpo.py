"""TRPO: the largest step within a trust region, measured in KL and not in weights."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_helpers.core.generation import Rollout
from rlhf_helpers.core.models import RewardFn
from rlhf_helpers.core.policy_losses import approx_kl, rloo_advantages
from rlhf_helpers.core.rollouts import sequence_kl
from rlhf_helpers.core.shared_prompts import answer_logits
from rlhf_helpers.core.tensors import masked_mean, masked_sum, require_shapes
from rlhf_helpers.core.training import History
from rlhf_helpers.core.training.settings import require_fields
from rlhf_helpers.policy_optimization.on_policy import (
    Batch,
    PolicyRun,
    RunOptions,
    log_step,
    sample_batch,
    start_run,
)
from rlhf_helpers.policy_optimization.reinforce import PolicyLoss, RLOOSettings
from rlhf_helpers.policy_optimization.rollouts import policy_outputs

Vector = Float[Tensor, "N"]
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TRPOSettings(RLOOSettings):
    """Settings of TRPO; learning_rate, epochs and minibatches have no part in it: max_kl sets the step."""

    learning_rate: float | None = 3e-4  # not used
    mixed_precision: str | None = "no"  # second derivatives in bf16 are noise
    max_kl: float = 0.01  # radius of the trust region, nats per token
    cg_iterations: int = 5  # each costs one backward pass through the gradient of the KL
    damping: float = 0.1  # added to the Fisher matrix; a few samples tell us little about most directions,
    # and with less damping the step goes far along these and overfits the samples
    fisher_rows: int = 8  # responses on which curvature and KL are measured; the fewer, the more the KL of
    # new responses exceeds max_kl (lesson 2 measures it for 8 and 24)
    backtracks: int = 10  # maximum number of halvings before the step is rejected

    def __post_init__(self) -> None:
        """Refuse values that would train wrongly or not at all."""
        super().__post_init__()
        require_fields(self, "cg_iterations", "fisher_rows", "backtracks", whole=True, at_least=1)
        require_fields(self, "max_kl", above=0)
        require_fields(self, "damping", at_least=0)
        if self.entropy_coef:
            raise ValueError(f"TRPOSettings.entropy_coef is not used here: leave 0, got {self.entropy_coef}")


def surrogate_loss(
    logps: Float[Tensor, "B T"], old_logps: Float[Tensor, "B T"], advantages: Float[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """TRPO's surrogate per token, to be minimized: -A_t exp(logp_t - old_logp_t); nothing is clipped.

    Schulman et al. 2015, eq. 14. Lesson 2. Raises ValueError where shapes differ.
    """
    require_shapes("B T", logps=logps, old_logps=old_logps, advantages=advantages)
    return -advantages * torch.exp(logps - old_logps)


def trpo(
    model: torch.nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    reward_fn: RewardFn,
    settings: TRPOSettings,
    *,
    loss_fn: PolicyLoss = surrogate_loss,
    **options: Unpack[RunOptions],
) -> History:
    """Train `model` in place by trust-region steps on RLOO's advantages.

    minimize L(theta) = mean_i sum_t loss_fn(logp_it, old_logp_it, A_i)  where  KL(old || theta) <= max_kl
    x = (F + damping)^-1 grad L by conjugate gradient;  step = -sqrt(2 max_kl / x.(F + damping)x) x, halved
    until the KL itself is within max_kl and L has fallen; if it never does, the weights stay as they were.
    Source: Schulman et al. 2015, appendix C. Lesson 2.

    Args:
        loss_fn: (logps, old_logps, advantages), each (B, T) -> (B, T).
        prompts, reward_fn, options: as in `rloo`.

    Returns:
        The rows of `rloo`; loss is L before the step, and further trpo/gain (by how much L fell),
        trpo/step_fraction (1: the whole step; 0: given up), trpo/kl (after the step, nats per token).

    Raises:
        ValueError: as `rloo`, and in a run of several processes.
    """
    run = start_run(model, tokenizer, prompts, reward_fn, settings, **options)
    if run.engine.accelerator.num_processes > 1:
        raise ValueError("trpo runs in one process: its step is not averaged over processes")
    for _ in run.engine.steps():
        # Collect: G responses to each prompt, and what they earn.
        batch = sample_batch(run)
        rewards = batch.penalized_scores - settings.kl_coef * sequence_kl(batch.rollout, batch.ref_logps)
        advantages = rloo_advantages(rewards.view(-1, settings.samples_per_prompt)).flatten()
        metrics = trpo_update(run, batch, advantages, loss_fn=loss_fn)
        log_step(run, batch, rewards, metrics)
    return run.engine.history


def trpo_update(
    run: PolicyRun, batch: Batch, advantages: Float[Tensor, "B"], *, loss_fn: PolicyLoss = surrogate_loss
) -> dict[str, float]:
    """Take one trust-region step on a batch; return the metrics."""
    settings, parameters = run.settings, run.engine.parameters
    # The gradient of the surrogate, over the whole batch.
    metrics = _surrogate(run, batch, advantages, loss_fn, learn=True)
    gradient = _flat([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
    run.engine.optimizer.zero_grad(set_to_none=True)  # Adam has no part in this step
    # Curvature and KL on every k-th response: a product with F costs two backward passes.
    few = batch.rollout[:: -(-len(batch.rollout) // settings.fisher_rows)]
    with eager_attention(run.policy):
        fisher = fisher_product(run.policy, parameters, few, settings.temperature)

        def damped_fisher(vector: Tensor) -> Tensor:
            return fisher(vector) + settings.damping * vector

        # Conjugate gradient solves (F + damping) x = g from such products alone.
        step = natural_step(
            gradient, damped_fisher, max_kl=settings.max_kl, iterations=settings.cg_iterations
        )
    # The KL of the step is only a quadratic guess so far: measure it, and halve the step until it holds.
    return metrics | _line_search(run, batch, advantages, loss_fn, step, few, metrics["loss"])


def fisher_product(
    model: torch.nn.Module, parameters: Sequence[Tensor], rollout: Rollout, temperature: float
) -> Product:
    """Return v -> F v, with F the Hessian of KL(old || theta) at theta = old: nats per token, (N,) -> (N,).

    The KL is that of the whole next-token distribution, mean over response tokens; two backward passes give F
    v and F, N x N, is never written down. Under `eager_attention`: fused attention has no second derivative.
    Schulman et al. 2015, appendix C.1. Lesson 2.
    """
    logps = _vocabulary_logps(model, rollout, temperature)
    kl = _exact_kl(logps.detach(), logps)
    slope = _flat(torch.autograd.grad(kl, parameters, create_graph=True, materialize_grads=True))

    def product(vector: Tensor) -> Tensor:
        products = torch.autograd.grad(slope @ vector, parameters, retain_graph=True, materialize_grads=True)
        return _flat(products)

    return product


def conjugate_gradient(product: Product, target: Vector, *, iterations: int) -> Vector:
    """Solve A x = target for a symmetric positive A that is known only by product(v) = A v.

    Exact after N iterations; a few give most of it. Hestenes and Stiefel 1952. Lesson 2. Raises ValueError
    where v.Av <= 0: A is not positive, so more damping is needed.
    """
    x, residual, direction = torch.zeros_like(target), target.clone(), target.clone()
    size = start = residual @ residual
    for _ in range(iterations):
        # The residual is small enough: more products would only polish digits.
        if size <= 1e-10 * start:
            break
        image = product(direction)
        curvature = direction @ image
        if curvature <= 0:
            raise ValueError(f"v.Av is {curvature.item():.3g}, so A is not positive: raise the damping")
        rate = size / curvature
        x = x + rate * direction
        residual = residual - rate * image
        previous, size = size, residual @ residual
        direction = residual + size / previous * direction
    return x


def natural_step(gradient: Vector, product: Product, *, max_kl: float, iterations: int) -> Vector:
    """Step along -F^-1 gradient to where the quadratic model of the KL, s.Fs / 2, reaches max_kl; (N,).

    0 for a gradient of 0. Schulman et al. 2015, appendix C. Lesson 2.
    """
    x = conjugate_gradient(product, gradient, iterations=iterations)
    curvature = (x @ product(x)).item()
    return -math.sqrt(2 * max_kl / curvature) * x if curvature > 0 else torch.zeros_like(x)


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Compute attention step by step within the block: the fused kernels cannot be differentiated twice."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _surrogate(
    run: PolicyRun, batch: Batch, advantages: Tensor, loss_fn: PolicyLoss, *, learn: bool
) -> dict[str, float]:
    """Return L and how far the policy is from the sampler; with `learn`, leave L's gradient in p.grad."""
    rollout, mask = batch.rollout, batch.rollout.response_mask
    total, seen = 0.0, []
    for rows in torch.arange(len(rollout)).tensor_split(run.settings.accumulation_steps):
        with torch.set_grad_enabled(learn):
            logps, entropies = policy_outputs(run.policy, rollout[rows], temperature=run.settings.temperature)
            per_token = (
                advantages[rows].unsqueeze(1).expand_as(logps)
            )  # a token gets its response's advantage
            losses = loss_fn(logps, rollout.old_logps[rows], per_token)
            require_shapes("B T", logps=logps, loss_fn=losses)
            loss = masked_sum(losses, mask[rows]) / len(rollout)
        if learn:
            run.engine.backward(loss, rows=batch.prompt_rows)
        total += loss.item()
        seen.append((logps.detach(), entropies.detach()))
    logps, entropies = (torch.cat(column) for column in zip(*seen, strict=True))
    return {
        "loss": total,
        "policy/approxkl": approx_kl(logps, rollout.old_logps, mask).item(),
        "policy/entropy": masked_mean(entropies, mask).item(),
        "val/ratio": masked_mean((logps - rollout.old_logps).exp(), mask).item(),
    }


@torch.no_grad()
def _line_search(
    run: PolicyRun,
    batch: Batch,
    advantages: Tensor,
    loss_fn: PolicyLoss,
    step: Tensor,
    few: Rollout,
    start: float,
) -> dict[str, float]:
    """Halve the step until it meets both conditions; the quadratic model is good only near the start."""
    settings, parameters = run.settings, run.engine.parameters
    before = _flat(parameters)
    fraction = 1.0
    # The KL of whole distributions: an estimate from the tokens that the step was aimed at is far too high.
    old = _vocabulary_logps(run.policy, few, settings.temperature)
    for _ in range(settings.backtracks if step.any() else 0):
        _set_weights(parameters, before + fraction * step)
        new = _vocabulary_logps(run.policy, few, settings.temperature)
        kl = _exact_kl(old, new).item()
        # Both conditions: close enough, and better than before.
        if kl <= settings.max_kl:
            gain = start - _surrogate(run, batch, advantages, loss_fn, learn=False)["loss"]
            if gain > 0:
                return {"trpo/step_fraction": fraction, "trpo/gain": gain, "trpo/kl": kl}
        fraction /= 2
    # No fraction of the step keeps both: the weights stay as they were.
    _set_weights(parameters, before)
    return {"trpo/step_fraction": 0.0, "trpo/gain": 0.0, "trpo/kl": 0.0}


def _vocabulary_logps(model: torch.nn.Module, rollout: Rollout, temperature: float) -> Tensor:
    """Log-prob of every token of the vocabulary at each of the N places of the responses, (N, V)."""
    logits, *_ = answer_logits(model, rollout.token_pairs)
    return torch.log_softmax(logits.float() / temperature, dim=-1)


def _exact_kl(old: Tensor, new: Tensor) -> Tensor:
    """KL(old || new) of next-token distributions (N, V), mean over tokens."""
    return (old.exp() * (old - new)).sum(-1).mean()


def _flat(tensors: Sequence[Tensor]) -> Vector:
    """One vector of all entries."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def _set_weights(parameters: Sequence[Tensor], vector: Vector) -> None:
    """Put the entries of `_flat` back."""
    for parameter, piece in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True):
        parameter.copy_(piece.view_as(parameter))

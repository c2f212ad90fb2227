"""Every policy-gradient loss, with KL, advantages and KL controllers: pure functions of tensors, unreduced.

`old_logps` come from the policy that sampled, `logps` from the policy now, `ref_logps` from the frozen
reference: the clip ratio is against the first, the KL against the last. All are per token (B, T) in nats, at
one temperature. Averages go through `masked_mean`. Axes: B rows, T response tokens, G samples of one prompt.
"""

import math

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from rlhf_helpers.core.tensors import as_bool_mask, masked_mean, require_number, require_shapes

PerToken = Float[Tensor, "B T"]
PerSample = Float[Tensor, "B G"]
Mask = Shaped[Tensor, "B T"]


def kl_estimate(logps: PerToken, ref_logps: PerToken, *, estimator: str) -> PerToken:
    """Estimate KL(pi || ref) per token from samples of pi, in nats.

    d = log pi - log ref;  k1 = d;  k2 = d^2 / 2;  k3 = exp(-d) - 1 + d

    Schulman 2020, "Approximating KL divergence". E k1 = E k3 = KL; k3 is never negative; k2 is biased. As a
    loss on samples of pi their gradients differ from their values: k1 gives 0 in expectation, k2 grad KL(pi
    || ref), k3 grad KL(ref || pi), each for the d of a whole outcome; in the reward only k1 gives the exact
    gradient. Negative means of k1 point to samples of another distribution (top-k, another temperature). k3
    overflows where pi is e^88 times rarer than ref, and is not clamped: such a token means that the samples
    are not pi's. Lesson 2. Raises ValueError where shapes differ, or the estimator is not "k1", "k2" or "k3".
    """
    require_shapes("B T", logps=logps, ref_logps=ref_logps)
    d = logps - ref_logps
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d.square() / 2
    if estimator == "k3":
        return torch.expm1(-d) + d  # expm1: exp(-d) - 1 loses all digits for the small d of a healthy run
    raise ValueError(f'estimator must be "k1", "k2" or "k3", got {estimator!r}')


def kl_shaped_rewards(
    scores: Float[Tensor, "B"], old_logps: PerToken, ref_logps: PerToken, mask: Mask, *, kl_coef: float
) -> PerToken:
    """Spread a score and a KL penalty over the tokens of a response.

    r_t = -kl_coef (old_logp_t - ref_logp_t), plus the score at the last real token; 0 on padding

    Ziegler et al. 2019, eq. 2, per token. Of the policy that sampled, and constant during the update epochs.
    Lesson 2. Raises ValueError where shapes do not fit, a row of the 0/1 mask is empty, or kl_coef < 0.
    """
    require_shapes("B T", old_logps=old_logps, ref_logps=ref_logps, mask=mask)
    require_shapes("B", scores=scores)
    require_number("kl_coef", kl_coef, at_least=0)
    if scores.shape[0] != old_logps.shape[0]:
        raise ValueError(
            f"scores has shape {tuple(scores.shape)} but old_logps has shape {tuple(old_logps.shape)}: "
            "there must be one score per row"
        )
    valid = as_bool_mask(mask)
    if not valid.any(-1).all():
        row = int((~valid.any(-1)).nonzero()[0])
        raise ValueError(f"row {row} of mask has no real token: there is no place for its score")
    positions = torch.arange(valid.shape[1], device=valid.device)
    is_last = positions == (positions * valid).amax(-1, keepdim=True)
    penalty = torch.where(valid, -kl_coef * (old_logps - ref_logps), 0.0)
    return penalty + torch.where(is_last, scores.unsqueeze(-1), 0.0)


def gae(
    rewards: PerToken, values: PerToken, mask: Mask, *, gamma: float, lam: float
) -> tuple[PerToken, PerToken]:
    """Generalised advantage estimation; returns (advantages, returns), unwhitened, 0 on padding.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  returns = A + V

    Time runs over the real tokens only and V is 0 after the last one. lam = 1: discounted return minus V; lam
    = 0: delta. Schulman et al. 2016, eq. 16. Rewards and values under a 0 of the mask are ignored. Lesson 2.
    Raises ValueError where shapes differ, the mask is not 0/1, gamma or lam outside [0, 1].
    """
    require_shapes("B T", rewards=rewards, values=values, mask=mask)
    require_number("gamma", gamma, at_least=0, at_most=1)
    require_number("lam", lam, at_least=0, at_most=1)
    valid = as_bool_mask(mask)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    advantages = []
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        # A padded token hands on what came after it, so that padding may stand anywhere in a row.
        next_advantage = torch.where(valid[:, t], delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(valid[:, t], values[:, t], next_value)
        advantages.append(next_advantage)
    advantages = torch.where(valid, torch.stack(advantages[::-1], dim=1), 0.0)
    return advantages, torch.where(valid, advantages + values, 0.0)


def rloo_advantages(rewards: PerSample) -> PerSample:
    """Compare each sample with the mean of the other samples of its prompt (leave-one-out).

    A_i = R_i - mean_{j != i} R_j = G / (G - 1) (R_i - mean)

    Kool et al. 2019; Ahmadian et al. 2024. Rows are prompts, columns samples of that prompt. Unbiased:
    the baseline does not know sample i. Lesson 2. Raises ValueError where rewards is not (B, G) of floats
    with G >= 2.
    """
    centred = _centre_groups(rewards)
    group = rewards.shape[1]
    return centred * (group / (group - 1))


def group_advantages(rewards: PerSample, *, scale: bool = True, eps: float = 1e-4) -> PerSample:
    """Standardise rewards within the samples of one prompt, as GRPO does.

    A_i = (R_i - mean) / (std + eps), std with G - 1; without `scale` only R_i - mean

    Shao et al. 2024, DeepSeekMath; without the scale Liu et al. 2025, "Dr. GRPO". A group of equal
    rewards gives exactly 0. Lesson 2. Raises ValueError where rewards is not (B, G) of floats with G >= 2, or
    eps <= 0.
    """
    require_number("eps", eps, above=0)
    centred = _centre_groups(rewards)
    return centred / (centred.std(-1, keepdim=True) + eps) if scale else centred


def _centre_groups(rewards: PerSample) -> PerSample:
    """Subtract the group mean, after checks."""
    require_shapes("B G", rewards=rewards)
    if rewards.shape[1] < 2:
        raise ValueError(
            f"rewards has shape {tuple(rewards.shape)}: "
            "a group of one has no baseline, sample at least 2 per prompt"
        )
    if not rewards.is_floating_point():
        raise ValueError(f"rewards must be floating point, got {rewards.dtype}")
    # Relative to the first sample: equal rewards then give 0, not the rounding error of their mean over eps.
    shifted = rewards - rewards[:, :1]
    return shifted - shifted.mean(-1, keepdim=True)


def clipped_policy_loss(
    logps: PerToken, old_logps: PerToken, advantages: PerToken, *, cliprange: float
) -> PerToken:
    """Return PPO's clipped surrogate per token, to be minimized.

    rho = exp(logp - old_logp);  loss = max(-A rho, -A clip(rho, 1 - eps, 1 + eps)),  eps = cliprange

    The maximum depends on the sign of A, and this is how it is computed:

        A >= 0:  -A min(rho, 1 + eps)    a good token earns nothing more beyond 1 + eps
        A <  0:  -A max(rho, 1 - eps)    a bad token earns nothing more below 1 - eps

    So only gains are clipped, and a move in the wrong direction keeps its gradient. At rho = 1 the gradient
    is REINFORCE's, -A grad logp. The ratio is per token, because that of a summed sequence explodes, and
    against the policy that sampled, not the reference. Schulman et al. 2017, eq. 7. Lesson 2.

    Raises:
        ValueError: shapes differ, or cliprange lies outside (0, 1).
    """
    require_shapes("B T", logps=logps, old_logps=old_logps, advantages=advantages)
    require_number("cliprange", cliprange, above=0, below=1)
    log_ratio = logps - old_logps
    # The side is picked before exp: a ratio that overflows on its clipped side then has the gradient 0 that
    # it should have, not 0 * inf = NaN.
    capped = log_ratio.clamp(max=math.log1p(cliprange))  # log min(rho, 1 + eps)
    floored = log_ratio.clamp(min=math.log1p(-cliprange))  # log max(rho, 1 - eps)
    return -advantages * torch.exp(torch.where(advantages >= 0, capped, floored))


def clipped_value_loss(
    values: PerToken, old_values: PerToken, returns: PerToken, *, cliprange_value: float
) -> PerToken:
    """PPO's value loss per token, pessimistic within a range around the old values.

    0.5 max((V - R)^2, (clip(V, V_old - cliprange_value, V_old + cliprange_value) - R)^2)

    As in OpenAI's PPO code; in squared reward units. Lesson 2. Raises ValueError where shapes differ, or
    cliprange_value <= 0.
    """
    require_shapes("B T", values=values, old_values=old_values, returns=returns)
    require_number("cliprange_value", cliprange_value, above=0)
    clipped = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def approx_kl(logps: PerToken, old_logps: PerToken, mask: Mask) -> Float[Tensor, ""]:
    """Say how far the policy moved from the one that sampled: KL(old || new), nats per token, detached.

    masked mean of k3 with d = old_logp - logp; 0 on the first minibatch, or something is wrong (dropout,
    temperature, alignment). Lesson 2. Raises ValueError where shapes differ, or the mask is not 0/1 or
    selects nothing.
    """
    require_shapes("B T", logps=logps, old_logps=old_logps, mask=mask)
    return masked_mean(kl_estimate(old_logps.detach(), logps.detach(), estimator="k3"), mask)


def clip_fraction(logps: PerToken, old_logps: PerToken, mask: Mask, *, cliprange: float) -> Float[Tensor, ""]:
    """Count the share of real tokens whose ratio left [1 - cliprange, 1 + cliprange], on either side.

    An upper bound on the share with zero gradient, which depends on the sign of the advantage too. Lesson 2.
    Raises ValueError where shapes differ, the mask is not 0/1 or empty, or cliprange outside (0, 1).
    """
    require_shapes("B T", logps=logps, old_logps=old_logps, mask=mask)
    require_number("cliprange", cliprange, above=0, below=1)
    log_ratio = (logps - old_logps).detach()
    outside = (log_ratio > math.log1p(cliprange)) | (log_ratio < math.log1p(-cliprange))
    return masked_mean(outside.to(log_ratio.dtype), mask)


def explained_variance(values: PerToken, returns: PerToken, mask: Mask) -> Float[Tensor, ""]:
    """Say how much of the returns' variance the values predict, over the real tokens, detached.

    1 - Var(returns - values) / Var(returns): 1 perfect, 0 no better than a constant, below 0 worse; NaN when
    the returns do not vary, for then the question has no answer. Lesson 2. Raises ValueError where shapes
    differ, or the mask is not 0/1 or selects nothing.
    """
    require_shapes("B T", values=values, returns=returns, mask=mask)
    values, returns = values.detach(), returns.detach()
    total = masked_mean((returns - masked_mean(returns, mask)).square(), mask)
    error = returns - values
    unexplained = masked_mean((error - masked_mean(error, mask)).square(), mask)
    return torch.where(total == 0, math.nan, 1 - unexplained / total)


class FixedKLController:
    """Keeps the KL coefficient where it is; the adaptive one has the same methods."""

    def __init__(self, kl_coef: float) -> None:
        """Hold `kl_coef`; raises ValueError if it is negative."""
        require_number("kl_coef", kl_coef, at_least=0)
        self.value = float(kl_coef)

    def update(self, kl: float, n: int) -> None:
        """Change nothing."""

    def state_dict(self) -> dict[str, float]:
        """Return the coefficient."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a saved state; a run with another coefficient is refused by its settings."""
        self.value = state["value"]


class AdaptiveKLController(FixedKLController):
    """Moves the KL coefficient so that the measured KL approaches a target.

    value <- value (1 + clip(kl / target - 1, -0.2, 0.2) n / horizon)

    Ziegler et al. 2019. `kl` and `target` are per-sequence sums in nats (a per-token target is
    another number), `n` counts episodes since the last update, `horizon` is in episodes. KL above target
    raises the value.
    """

    def __init__(self, init_kl_coef: float, target: float, horizon: float) -> None:
        """Start at `init_kl_coef`; raises ValueError unless all three are positive."""
        require_number("init_kl_coef", init_kl_coef, above=0)  # a product never leaves 0
        require_number("target", target, above=0)
        require_number("horizon", horizon, above=0)
        super().__init__(init_kl_coef)
        self.target, self.horizon = float(target), float(horizon)

    def update(self, kl: float, n: int) -> None:
        """Move the value once, for `n` episodes whose mean per-sequence KL is `kl`.

        Raises ValueError where kl is not finite, n < 1, or n is so large that the coefficient could turn
        negative.
        """
        require_number("kl", kl)
        require_number("n", n, at_least=1)
        require_number("n / horizon", n / self.horizon, below=5)
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * n / self.horizon

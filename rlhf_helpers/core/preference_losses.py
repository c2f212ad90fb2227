"""Every preference loss: pure functions of tensors, unreduced, one value per comparison (B,).

`*_logps` are sums of response log-probs including EOS, in nats; `*_mean_logps` are means per token. `policy_`
is trained, `ref_` frozen: pass its log-probs computed without gradient. Differences are taken inside
logsigmoid or log-sum-exp, because log(sigmoid(x)) underflows to -inf near x = -100. Axes: B comparisons, K
ranked answers.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from rlhf_helpers.core.tensors import as_bool_mask, require_number, require_shapes

PerRow = Float[Tensor, "B"]  # one number per comparison (for KTO, per answer)


def bradley_terry_loss(
    chosen_rewards: PerRow, rejected_rewards: PerRow, *, margin: PerRow | None = None
) -> PerRow:
    """Negative log-likelihood that the chosen answer wins.

    -logsigmoid(r_chosen - r_rejected - margin)

    A margin asks for a gap, larger where the annotator was surer (Touvron et al. 2023, Llama 2, eq. 2);
    without it this is Bradley & Terry 1952 as in Ouyang et al. 2022, eq. 1. ln 2 when the rewards tie. Lesson
    1. Raises ValueError where shapes are not all (B,).
    """
    require_shapes("B", chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    gap = chosen_rewards - rejected_rewards
    if margin is not None:
        require_shapes("B", chosen_rewards=chosen_rewards, margin=margin)
        gap = gap - margin
    return -F.logsigmoid(gap)


def soft_preference_loss(chosen_rewards: PerRow, rejected_rewards: PerRow, *, margin: PerRow) -> PerRow:
    """Bradley-Terry cross-entropy with a label that is a probability: margin = P(chosen is better).

    -p logsigmoid(gap) - (1 - p) logsigmoid(-gap), lowest where sigmoid(gap) = p; p = 1 is Bradley-Terry

    As loss_fn of `RewardModelTrainer.train(rows, objective="margin")`, which calls a row's number so. Lesson
    3. Raises ValueError where shapes are not all (B,).
    """
    require_shapes("B", chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards, margin=margin)
    gap = chosen_rewards - rejected_rewards
    return -margin * F.logsigmoid(gap) - (1 - margin) * F.logsigmoid(-gap)


def plackett_luce_loss(rewards: Float[Tensor, "B K"], *, mask: Shaped[Tensor, "B K"] | None = None) -> PerRow:
    """Negative log-likelihood of a whole ranking, best answer first.

    sum_k [ logsumexp_{j >= k} r_j - r_k ]: the best is drawn first, then the best of the rest, and so on.

    `mask` (B, K): 0 excludes an entry from every term, for rankings of different lengths. At K = 2 this is
    Bradley-Terry (Plackett 1975; Luce 1959). Lesson 1. Raises ValueError where shapes differ, the mask is not
    0/1, or a row ranks fewer than two answers.
    """
    require_shapes("B K", rewards=rewards)
    if mask is None:
        mask = torch.ones_like(rewards, dtype=torch.bool)
    require_shapes("B K", rewards=rewards, mask=mask)
    valid = as_bool_mask(mask)
    ranked = valid.sum(-1)
    if (ranked < 2).any():
        row = int((ranked < 2).nonzero()[0])
        count = int(ranked[row])
        raise ValueError(f"row {row} of rewards ranks {count} answer(s): a comparison needs at least two")
    kept = rewards.masked_fill(~valid, 0.0)
    # lead[b, k, j] = r_j - r_k, so logsumexp over j >= k is the whole term and offsets cancel before exp.
    lead = kept.unsqueeze(1) - kept.unsqueeze(2)
    size = rewards.shape[1]
    upper = torch.ones(size, size, dtype=torch.bool, device=rewards.device).triu()
    diagonal = torch.eye(size, dtype=torch.bool, device=rewards.device)
    rivals = (upper & valid.unsqueeze(1)) | diagonal  # the diagonal keeps an entry finite where k is masked
    terms = torch.logsumexp(lead.masked_fill(~rivals, -math.inf), dim=-1)
    return torch.where(valid, terms, 0.0).sum(-1)


def rating_loss(rewards: PerRow, ratings: PerRow) -> PerRow:
    """Squared error of a reward against a rating given on an absolute scale.

    (r - rating)^2, in squared units of the rating. Unlike a comparison it fixes the reward's offset. Lesson
    1. Raises ValueError where shapes are not both (B,).
    """
    require_shapes("B", rewards=rewards, ratings=ratings)
    return (rewards - ratings).square()


def _gap(
    policy_chosen_logps: PerRow,
    policy_rejected_logps: PerRow,
    ref_chosen_logps: PerRow,
    ref_rejected_logps: PerRow,
    beta: float,
) -> PerRow:
    """Return h = (log pi - log ref)(chosen) - (log pi - log ref)(rejected), checked as in `dpo_loss`."""
    _require_pairs(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    return (policy_chosen_logps - ref_chosen_logps) - (policy_rejected_logps - ref_rejected_logps)


def _require_pairs(
    policy_chosen_logps: PerRow,
    policy_rejected_logps: PerRow,
    ref_chosen_logps: PerRow,
    ref_rejected_logps: PerRow,
    beta: float,
) -> None:
    require_shapes(
        "B",
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    require_number("beta", beta, above=0)


def dpo_loss(
    policy_chosen_logps: PerRow,
    policy_rejected_logps: PerRow,
    ref_chosen_logps: PerRow,
    ref_rejected_logps: PerRow,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> PerRow:
    """Direct preference optimisation: Bradley-Terry on the implicit reward beta log(pi / ref).

    -(1 - e) logsigmoid(beta h) - e logsigmoid(-beta h), with h the difference of the two log-ratios

    Rafailov et al. 2023, eq. 7; e = label_smoothing > 0 is conservative DPO (Mitchell 2023), for labels
    flipped with probability e. ln 2 at policy == reference, for every beta and e. Larger beta stays closer to
    the reference. Lesson 2. Raises ValueError where shapes are not all (B,), beta <= 0, or label_smoothing
    outside [0, 0.5).
    """
    _require_pairs(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    require_number("label_smoothing", label_smoothing, at_least=0, below=0.5)
    h = (policy_chosen_logps - ref_chosen_logps) - (policy_rejected_logps - ref_rejected_logps)
    return -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)


def robust_dpo_loss(
    policy_chosen_logps: PerRow,
    policy_rejected_logps: PerRow,
    ref_chosen_logps: PerRow,
    ref_rejected_logps: PerRow,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> PerRow:
    """DPO whose mean over labels flipped with probability e equals DPO's on clean labels.

    [(1 - e) l - e l_flip] / (1 - 2 e), with l = -logsigmoid(beta h), l_flip = -logsigmoid(-beta h)

    Chowdhury et al. 2024, "Provably robust DPO". Unbiased, hence of larger variance than conservative
    DPO, and unbounded below: a confident right answer gets a negative loss. Lesson 2. Raises ValueError where
    shapes are not all (B,), beta <= 0, or label_smoothing outside [0, 0.5).
    """
    gap = _gap(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    require_number("label_smoothing", label_smoothing, at_least=0, below=0.5)
    logp = (1 - label_smoothing) * F.logsigmoid(beta * gap) - label_smoothing * F.logsigmoid(-beta * gap)
    return -logp / (1 - 2 * label_smoothing)


def ipo_loss(
    policy_chosen_logps: PerRow,
    policy_rejected_logps: PerRow,
    ref_chosen_logps: PerRow,
    ref_rejected_logps: PerRow,
    *,
    beta: float,
) -> PerRow:
    """Identity preference optimisation: pull the log-ratio gap to a finite target.

    (h - 1 / (2 beta))^2, with h of summed log-probs

    Azar et al. 2023, eq. 17 (their tau is beta). Optimum at h = (2p - 1) / (2 beta), finite even when one
    answer always wins. The paper names no token reduction: this one sums, some code averages per token, and
    the same beta then means something else. Lesson 2. Raises ValueError where shapes are not all (B,), or
    beta <= 0.
    """
    gap = _gap(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    return (gap - 1 / (2 * beta)).square()


def hinge_loss(
    policy_chosen_logps: PerRow,
    policy_rejected_logps: PerRow,
    ref_chosen_logps: PerRow,
    ref_rejected_logps: PerRow,
    *,
    beta: float,
) -> PerRow:
    """Hinge on the implicit reward gap.

    max(0, 1 - beta h): no gradient once the gap beta h reaches 1

    The sigmoid of DPO replaced by SLiC's hinge, as in Liu et al. 2023 ("RSO"). Lesson 2. Raises ValueError
    where shapes are not all (B,), or beta <= 0.
    """
    gap = _gap(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    return F.relu(1 - beta * gap)


def slic_loss(
    policy_chosen_logps: PerRow,
    policy_rejected_logps: PerRow,
    target_logps: PerRow,
    *,
    delta: float,
    reg_weight: float,
) -> PerRow:
    """Sequence-likelihood calibration: rank by a margin, regularise by likelihood of a target.

    max(0, delta - log pi(chosen) + log pi(rejected)) - reg_weight log pi(target)

    Zhao et al. 2023, SLiC-HF; no reference model. `target_logps` are the policy's on the supervised
    target, often the chosen answer itself. The ranking term has no gradient past the margin delta (nats).
    Lesson 2. Raises ValueError where shapes are not all (B,), delta <= 0, or reg_weight < 0.
    """
    require_shapes("B", policy_chosen_logps=policy_chosen_logps, policy_rejected_logps=policy_rejected_logps)
    require_shapes("B", policy_chosen_logps=policy_chosen_logps, target_logps=target_logps)
    require_number("delta", delta, above=0)
    require_number("reg_weight", reg_weight, at_least=0)
    return F.relu(delta - policy_chosen_logps + policy_rejected_logps) - reg_weight * target_logps


def kto_loss(
    policy_logps: PerRow,
    ref_logps: PerRow,
    desirable: Shaped[Tensor, "B"],
    kl: Float[Tensor, ""] | float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> PerRow:
    """Kahneman-Tversky optimisation: learn from single answers marked good or bad.

    good: w_good (1 - sigmoid(beta (h - kl)));  bad: w_bad (1 - sigmoid(beta (kl - h)));  h = log(pi / ref)

    Ethayarajh et al. 2024. `desirable`: bool or 0/1. `kl` is the reference point z0 in nats per
    sequence, a scalar, not multiplied by beta; the caller estimates it on mismatched pairs, clamps it at 0
    and detaches it. Rows keep the order of the batch. Lesson 2. Raises ValueError where shapes are not all
    (B,), desirable is not 0/1, kl is not a detached scalar >= 0, or beta or a weight is not > 0.
    """
    require_shapes("B", policy_logps=policy_logps, ref_logps=ref_logps, desirable=desirable)
    require_number("beta", beta, above=0)
    require_number("desirable_weight", desirable_weight, above=0)
    require_number("undesirable_weight", undesirable_weight, above=0)
    if isinstance(kl, Tensor):
        if kl.ndim != 0:
            raise ValueError(f"kl must be a scalar, one per batch, got shape {tuple(kl.shape)}")
        if kl.requires_grad:
            raise ValueError("kl must be detached: KTO takes no gradient through its reference point")
    require_number("kl (clamp it at 0)", float(kl), at_least=0)
    good = as_bool_mask(desirable, "desirable")
    gain = beta * (policy_logps - ref_logps - kl)
    rewarded = desirable_weight * torch.sigmoid(-gain)  # 1 - sigmoid(x), without cancellation
    punished = undesirable_weight * torch.sigmoid(gain)
    return torch.where(good, rewarded, punished)


def orpo_loss(chosen_mean_logps: PerRow, rejected_mean_logps: PerRow, *, beta: float) -> PerRow:
    """Odds-ratio preference optimisation: supervised loss plus a log-odds ranking term, no reference model.

    -log p_chosen - beta logsigmoid(log odds(chosen) - log odds(rejected)), log odds = log p - log(1 - p)

    Hong et al. 2024, eqs. 4-7 (their lambda is beta); log p is the mean per token. A log-prob that rounds to
    0 (p = 1) is taken one rounding step below, so that its odds stay finite and the rejected one is still
    pushed down. Lesson 2. Raises ValueError where shapes are not both (B,), a log-prob is positive, or beta
    <= 0.
    """
    require_shapes("B", chosen_mean_logps=chosen_mean_logps, rejected_mean_logps=rejected_mean_logps)
    require_number("beta", beta, above=0)
    chosen_log_odds = _log_odds(chosen_mean_logps, "chosen_mean_logps")
    rejected_log_odds = _log_odds(rejected_mean_logps, "rejected_mean_logps")
    return -chosen_mean_logps - beta * F.logsigmoid(chosen_log_odds - rejected_log_odds)


def _log_odds(mean_logps: PerRow, name: str) -> PerRow:
    """Compute log p - log(1 - p) from log p, on the branch of log(1 - exp(x)) that does not cancel."""
    if (mean_logps > 0).any():
        raise ValueError(f"{name} must be log-probabilities <= 0, got {mean_logps.max().item()}")
    below_one = mean_logps.detach().clamp(max=-torch.finfo(mean_logps.dtype).eps)
    logp = mean_logps + (below_one - mean_logps.detach())  # moves the value only; the gradient passes
    log_half = -math.log(2)  # where Maechler 2012 changes branch
    near_one = torch.log(-torch.expm1(logp))
    # clamp: torch.where lets 0 * inf through backward
    near_zero = torch.log1p(-torch.exp(logp.clamp(max=log_half)))
    return logp - torch.where(logp > log_half, near_one, near_zero)


def simpo_loss(
    chosen_mean_logps: PerRow, rejected_mean_logps: PerRow, *, beta: float, gamma: float
) -> PerRow:
    """Simple preference optimisation: Bradley-Terry on mean log-probs, with a margin and no reference.

    -logsigmoid(beta (mean log p_chosen - mean log p_rejected) - gamma)

    Meng et al. 2024, eq. 6. gamma is in units of the reward, after beta; some code asks for gamma / beta.
    Lesson 2. Raises ValueError where shapes are not both (B,), beta <= 0, or gamma < 0.
    """
    require_shapes("B", chosen_mean_logps=chosen_mean_logps, rejected_mean_logps=rejected_mean_logps)
    require_number("beta", beta, above=0)
    require_number("gamma", gamma, at_least=0)
    return -F.logsigmoid(beta * (chosen_mean_logps - rejected_mean_logps) - gamma)


def listwise_dpo_loss(
    policy_logps: Float[Tensor, "B K"], ref_logps: Float[Tensor, "B K"], *, beta: float
) -> PerRow:
    """DPO for a ranking of K answers, best first: Plackett-Luce on the implicit rewards.

    plackett_luce_loss(beta (log pi - log ref)); K = 2 is DPO, ln K! at policy == reference

    Rafailov et al. 2023, appendix A.3. Lesson 2. Raises ValueError where shapes are not both (B, K), K < 2,
    or beta <= 0.
    """
    require_shapes("B K", policy_logps=policy_logps, ref_logps=ref_logps)
    require_number("beta", beta, above=0)
    return plackett_luce_loss(beta * (policy_logps - ref_logps))

"""What ties a policy to the reference: an estimator of the KL, and the KL in the reward."""

import torch
from torch import Tensor, tensor

from rlhf_helpers.core import policy_losses
from rlhf_helpers.lab.exercises.exercise import as_asked, averaged, exercise, negated
from rlhf_helpers.lab.exercises.lesson2.policy import LOGPS


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """`core.policy_losses.kl_estimate` "k3", (B, T), with a gradient by logps alone."""
    return policy_losses.kl_estimate(logps, ref_logps.detach(), estimator="k3")


shaped_rewards = as_asked(policy_losses.kl_shaped_rewards)


def _placed(scores: Tensor, mask: Tensor, at: Tensor | int) -> Tensor:
    """Zeros (B, T) with each row's score at one index."""
    placed = torch.zeros(mask.shape)
    placed[range(len(scores)), at] = scores
    return placed


GAPS = tensor([[0.5, -0.4, 0.3, 1.5, -0.9], [0.1, -1.7, 0.8, -0.2, 2.2]])
SCORES = tensor([0.7, -1.2, 3.0])
COLUMNS = torch.arange(5)
TALL = LOGPS[:, :3].T

EXERCISES = {
    "k3": exercise(
        k3,
        [
            (LOGPS, LOGPS - GAPS),
            (LOGPS[:1] + GAPS[1:], LOGPS[:1]),
            (LOGPS.T, LOGPS.T - 2 * GAPS.T),  # more rows than tokens
        ],
        "d is reversed: d = log pi - log ref (this measures chi^2 - KL)",
        lambda d: d.expm1() - d,
        "this is exp of the wrong difference: it is exp(-d), which is ref / pi",
        lambda d: d.expm1() + d,
        "the last d has the wrong sign: the three terms must cancel to first order in d",
        lambda right, d: right - 2 * d,
        "this is k1 = d: it has the right mean, but it is often negative and has a large variance",
        lambda d: d,
        "this is -d, k1 with its sign flipped",
        lambda d: -d,
        "this is k2 = d^2 / 2, which is biased",
        lambda d: d**2 / 2,
        "the - 1 is missing: at pi = ref the estimate must be 0",
        lambda right: right + 1,
        "+ d is missing: without it the mean is 0, whatever the KL",
        lambda right, d: right - d,
        "the sign of the whole is flipped: k3 is never negative",
        negated,
        "this is p log(p / q), a term of the exact sum: samples already occur with weight p",
        lambda d, logps: logps.exp() * d,
        "this is kl_div, made for whole distributions: k3 needs the two log-probs of the sampled token",
        lambda d, ref_logps: -ref_logps.exp() * d,
        "d was computed from probabilities: it is a difference of LOG-probs",
        lambda logps, ref_logps: k3(logps.exp(), ref_logps.exp()),
        "the absolute value of d is biased: k3 is exp(-d) - 1 + d",
        lambda d: d.abs(),
        "the tokens were averaged or summed: return one value per token, shape (B, T)",
        averaged,
        lambda right: right.sum(1),
        lambda right: right.mean(1),
        d=lambda logps, ref_logps: logps - ref_logps,
    ),
    "shaped_rewards": exercise(
        shaped_rewards,
        [
            # padding is not 0: mask it
            (SCORES[:2], LOGPS, LOGPS - GAPS, tensor([[3], [4]]) > COLUMNS, 0.1),
            (SCORES[:2], LOGPS, LOGPS - GAPS, tensor([[1], [5]]) > COLUMNS, 0.5),
            # more rows than tokens
            (
                SCORES,
                LOGPS[:, :3].T,
                (LOGPS[:, :3] - GAPS[:, 2:]).T,
                COLUMNS[:2] < tensor([[2], [1], [2]]),
                0.3,
            ),
            (SCORES[2:], LOGPS[:1], LOGPS[:1] - GAPS[1:], COLUMNS[None] < 4, 0.2),
        ],
        "KL is added: a policy that leaves the reference is REWARDED; subtract it",
        lambda score, penalty: score - penalty,
        "the score stands in the last COLUMN: in shorter rows that is padding",
        lambda penalty, scores, mask: penalty + _placed(scores, mask, -1),
        "the score stands one index too late: a row of n real tokens ends at index n - 1",
        lambda penalty, scores, mask, lengths: penalty + _placed(scores, mask, lengths),
        lambda penalty, scores, mask, lengths: (
            penalty + _placed(scores, mask, lengths.clamp(max=mask.shape[1] - 1))
        ),
        "the score stands one index too early: a row of n real tokens ends at index n - 1",
        lambda penalty, scores, mask, lengths: penalty + _placed(scores, mask, lengths - 2),
        "the score stands at the first token: it judges the finished response, so it belongs to the last",
        lambda penalty, scores, mask: penalty + _placed(scores, mask, 0),
        "every token got the whole score: only the last real one does",
        lambda penalty, scores, mask: penalty + scores[:, None] * mask,
        lambda penalty, scores: penalty + scores[:, None],
        "the score was shared out among the tokens: the last real one gets all of it",
        lambda penalty, scores, mask, lengths: penalty + (scores / lengths)[:, None] * mask,
        "padding got a penalty: it is 0 wherever mask is 0",
        lambda score, d, kl_coef: score - kl_coef * d,
        "the score REPLACED the penalty of the last token: add it",
        lambda score, penalty: score.where(score != 0, penalty),
        "kl_coef multiplies the score too: it weighs the KL alone",
        lambda score, penalty, kl_coef: kl_coef * score + penalty,
        "kl_coef never enters",
        lambda score, d, mask: score - d * mask,
        "the score never enters: this is the penalty alone",
        lambda penalty: penalty,
        "there is no penalty: this is the score alone",
        lambda score: score,
        "the whole penalty stands at the last token: each token pays its own",
        lambda right, mask, lengths: _placed(right.sum(1), mask, lengths - 1),
        "the penalty is made of k3 (or k2, or |d|): in the reward only k1 = d has the right gradient",
        lambda score, kl_coef, d, mask: score - kl_coef * (torch.expm1(-d) + d) * mask,
        lambda score, kl_coef, d, mask: score - kl_coef * d**2 / 2 * mask,
        lambda score, kl_coef, d, mask: score - kl_coef * d.abs() * mask,
        "the reward of a row was summed: return one reward per token, shape (B, T)",
        lambda right: right.sum(1),
        d=lambda old_logps, ref_logps: old_logps - ref_logps,
        penalty=lambda d, kl_coef, mask: -kl_coef * d * mask,
        lengths=lambda mask: mask.sum(1),
        score=lambda scores, mask, lengths: _placed(scores, mask, lengths - 1),
    ),
}

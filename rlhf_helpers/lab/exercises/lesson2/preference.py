"""What a policy may become: the exact shares of best-of-n, DPO's loss, and the beta that holds it back."""

import torch
import torch.nn.functional as F
from torch import Tensor, tensor

from rlhf_helpers import policy_optimization
from rlhf_helpers.core import preference_losses
from rlhf_helpers.core.tensors import require_number
from rlhf_helpers.lab.exercises.exercise import (
    LOG_LOSS_MISTAKES,
    as_asked,
    as_tensor,
    averaged,
    each,
    exercise,
    summed,
    table,
)

best_of_n_shares = as_asked(policy_optimization.best_of_n_shares)
dpo_loss = as_asked(preference_losses.dpo_loss, "policy_chosen_logps", "policy_rejected_logps")


def _clip(error: float) -> float:
    return min(max(error, -0.2), 0.2)


def next_beta(beta: float, kl: float, target: float) -> float:
    """Move beta one step towards the KL wanted: beta (1 + clip(kl / target - 1, -0.2, 0.2)).

    kl, target: nats per response. KL above target RAISES beta, since a larger beta holds the policy closer to
    the reference. Ziegler et al. 2019. Raises ValueError unless beta and target are positive and kl finite.
    Lesson 2.
    """
    require_number("beta", beta, above=0)
    require_number("kl", kl)
    require_number("target", target, above=0)
    return beta * (1 + _clip(kl / target - 1))


def _in_order(rewards: Tensor, probabilities: Tensor, n: int) -> Tensor:
    """Make every outcome a class of its own, and order ties by index."""
    order = rewards.argsort(stable=True)
    upto = probabilities[order].cumsum(0) ** n
    return torch.zeros_like(upto).scatter(0, order, upto.diff(prepend=torch.zeros(1)))


REWARDS = tensor([0.2, 0.9, 0.5, 0.9, -0.7, 0.5])  # two ties, none in order
PROBABILITIES = tensor([0.3, 0.1, 0.2, 0.15, 0.2, 0.05])
CLOSE = tensor([0.31, -0.62, 0.34, 0.31])
EVEN = tensor([0.1, 0.4, 0.3, 0.2])
# no margin is 0 or 1 / beta: a loss written with max or abs has a kink there
LOGPS = tensor(
    [
        [-12.0, -30.5, -8.0, -21.0],
        [-14.0, -28.0, -8.5, -25.0],
        [-13.0, -29.0, -8.3, -19.0],
        [-13.5, -29.5, -9.1, -28.0],
    ]
)

EXERCISES = {
    "best_of_n_shares": exercise(
        best_of_n_shares,
        [
            (REWARDS, PROBABILITIES, 4),
            (REWARDS[:3], tensor([0.5, 0.2, 0.3]), 2),
            (REWARDS, PROBABILITIES, 16),
            (CLOSE, EVEN, 3),
            (CLOSE, EVEN, 1),
        ],
        "the n-th power is missing: this is the share of ONE draw",
        lambda probabilities: probabilities,
        lambda tied: tied,
        "ties are not split: each outcome got the share of its whole reward class",
        lambda rise: rise,
        "ties were split into equal parts: the likelier outcome is drawn more often",
        lambda rise, rewards: rise / (rewards == rewards[:, None]).sum(1),
        "a tie was settled by index: outcomes of equal reward are one class, split by probability",
        _in_order,
        "this is the probability that the best is no higher than this: subtract that of a lower best",
        lambda upto, n: upto**n,
        lambda upto, n, probabilities, tied: upto**n * probabilities / tied,
        "this is the probability that ALL n draws are this outcome",
        lambda probabilities, n: probabilities**n,
        lambda tied, n: tied**n,
        "this is the probability that the outcome is drawn at all: it must also be the best of the n",
        lambda probabilities, n: 1 - (1 - probabilities) ** n,
        "n p F^(n-1) is the density of a continuous reward: with few outcomes it does not add up to 1",
        lambda probabilities, upto, n: n * probabilities * upto ** (n - 1),
        "the WORST of n was kept: F counts lower rewards, not higher ones",
        lambda rewards, probabilities, n: best_of_n_shares(-rewards, probabilities, n),
        "this is the best of n - 1",
        lambda upto, below, n, probabilities, tied: (
            (upto ** (n - 1) - below ** (n - 1)) * probabilities / tied
        ),
        "the shares are in the order of the rewards: return them in the order of the outcomes",
        lambda right, rewards: right[rewards.argsort()],
        "the outcomes were added up in the order given: F counts those with a lower REWARD",
        lambda probabilities, n: _in_order(torch.arange(len(probabilities)), probabilities, n),
        "the probabilities never enter: outcomes are not equally likely",
        lambda rewards, n: best_of_n_shares(rewards, torch.ones(len(rewards)) / len(rewards), n),
        "the highest reward got everything: with n draws it may not occur",
        lambda rewards: F.one_hot(rewards.argmax(), len(rewards)).float(),
        lambda rewards, probabilities, tied: (rewards == rewards.max()) * probabilities / tied,
        "this is a tilt by exp(reward), the optimum of RL with a KL penalty, not best-of-n",
        lambda rewards, probabilities: (probabilities.log() + rewards).softmax(0),
        lambda rewards, probabilities, n: (probabilities.log() + n * rewards).softmax(0),
        upto=lambda rewards, probabilities: (rewards <= rewards[:, None]).float() @ probabilities,
        below=lambda rewards, probabilities: (rewards < rewards[:, None]).float() @ probabilities,
        tied=lambda upto, below: upto - below,
        rise=lambda upto, below, n: upto**n - below**n,
    ),
    "dpo_loss": exercise(
        dpo_loss,
        table(
            (*LOGPS, 0.1),
            (*LOGPS[:, :2], 0.5),
            (*LOGPS[:, 3:], 0.3),
            # where log(sigmoid) gives -inf
            ([-210.0, -60.0], [-40.0, -190.0], [-50.0, -62.0], [-55.0, -65.0], 1.0),
        ),
        "the sign is flipped: chosen and rejected, or policy and reference, changed places",
        lambda gap: -F.logsigmoid(-gap),
        *LOG_LOSS_MISTAKES,
        "beta stands outside the sigmoid: there it only scales the loss, it belongs to the difference",
        lambda beta, ratios: -beta * F.logsigmoid(ratios),
        "beta never enters",
        lambda ratios: -F.logsigmoid(ratios),
        "the difference was divided by beta: the implicit reward is beta log(pi / ref)",
        lambda beta, ratios: -F.logsigmoid(ratios / beta),
        "the reference never enters: nothing holds the policy near it",
        lambda policy_part, beta: -F.logsigmoid(beta * policy_part),
        "the reference's difference was added: subtract it from the policy's",
        lambda policy_part, ratios, beta: -F.logsigmoid(beta * (2 * policy_part - ratios)),
        "beta multiplies the policy's part alone: a bracket is missing",
        lambda policy_part, ratios, beta: -F.logsigmoid(beta * policy_part + ratios - policy_part),
        "the two log-ratios were added: what counts is chosen MINUS rejected",
        lambda chosen, rejected: -F.logsigmoid(chosen + rejected),
        "this is IPO, a squared distance to 1 / (2 beta): DPO takes -logsigmoid",
        lambda ratios, beta: (ratios - 1 / (2 * beta)) ** 2,
        "the pairs were averaged or summed: return one loss per pair, shape (B,)",
        averaged,
        summed,
        chosen=lambda policy_chosen_logps, ref_chosen_logps, beta: (
            beta * (policy_chosen_logps - ref_chosen_logps)
        ),
        rejected=lambda policy_rejected_logps, ref_rejected_logps, beta: (
            beta * (policy_rejected_logps - ref_rejected_logps)
        ),
        gap=lambda chosen, rejected: chosen - rejected,
        ratios=lambda gap, beta: gap / beta,
        policy_part=lambda policy_chosen_logps, policy_rejected_logps: (
            policy_chosen_logps - policy_rejected_logps
        ),
    ),
    "next_beta": exercise(
        next_beta,
        [
            (0.1, 5.5, 5.0),
            (0.2, 30.0, 5.0),
            (0.05, 0.4, 2.0),
            (0.3, 1.8, 2.0),
            (0.4, 2.0, 2.0),
            # a KL of 0, as at the start, and an estimate below 0; a large beta and a tiny one
            (0.2, 0.0, 4.0),
            (0.3, -0.25, 2.0),
            (1.5, 2.1, 2.0),
            (0.004, 1.9, 2.0),
        ],
        "the direction is wrong: KL above its target must RAISE beta, which holds the policy closer",
        lambda beta, error: beta * (1 - error),
        lambda beta, error: beta / (1 + error),
        lambda beta, excess: beta * (1 + _clip(1 / excess - 1)),
        lambda beta, excess: beta / excess,
        *each(lambda step, beta, excess: beta * (1 + step if excess > 1 else 1 - step), -0.1, -0.2),
        "the error is not clipped: one noisy KL may move beta by any factor",
        lambda beta, excess: beta * excess,
        "the error is clipped on one side only: it is at most 0.2 up AND down",
        lambda beta, excess: beta * min(excess, 1.2),
        lambda beta, excess: beta * max(excess, 0.8),
        "the error is kl - target, in nats: make it relative, kl / target - 1",
        lambda beta, kl, target: beta * (1 + _clip(kl - target)),
        "the - 1 is missing: on target the error must be 0, so that beta stays",
        lambda beta, excess: beta * (1 + _clip(excess)),
        "the distance is divided by kl, which may be 0: divide it by target",
        lambda beta, excess: beta * (1 + _clip(1 - 1 / excess)),
        "the 1 + is missing: beta itself must stay, and change by a share of itself",
        lambda beta, error: beta * error,
        "this is the factor: multiply beta by it",
        lambda error: 1 + error,
        "this is the clipped error: beta is to be multiplied by 1 + error",
        lambda error: error,
        "the error was added to beta: a step is a share of beta, so multiply by 1 + error",
        lambda beta, error: beta + error,
        "beta itself was clipped: clip the error",
        lambda beta, excess: _clip(beta * excess),
        "the step is always of one size: near the target it must be small, and on target 0",
        *each(lambda step, beta, excess: beta * (1 + step if excess > 1 else 1 - step), 0.1, 0.2),
        "beta did not move",
        lambda beta: beta,
        "this is a tensor: return a Python number, with .item()",
        as_tensor,
        excess=lambda kl, target: kl / target,
        error=lambda excess: _clip(excess - 1),
    ),
}

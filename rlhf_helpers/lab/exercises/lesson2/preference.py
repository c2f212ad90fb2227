"""What a policy may become: the exact shares of best-of-n, DPO's loss, and the beta that holds it back."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_helpers.core import preference_losses
from rlhf_helpers.core.tensors import require_number
from rlhf_helpers.lab.exercises.exercise import Exercise, named
from rlhf_helpers.policy_optimization.best_of_n import best_of_n_shares as exact_shares

best_of_n_shares = torch.no_grad()(exact_shares)


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
) -> Tensor:
    """`core.preference_losses.dpo_loss`, (B,), with a gradient by the policy's log-probs alone."""
    reference = ref_chosen_logps.detach(), ref_rejected_logps.detach()
    return preference_losses.dpo_loss(policy_chosen_logps, policy_rejected_logps, *reference, beta=beta)


def next_beta(beta: float, kl: float, target: float) -> float:
    """Move beta one step towards the KL wanted: beta (1 + clip(kl / target - 1, -0.2, 0.2)).

    kl, target: nats per response. KL above target RAISES beta, since a larger beta holds the policy closer to
    the reference. Ziegler et al. 2019. Raises ValueError unless beta and target are positive and kl finite.
    Lesson 2.
    """
    require_number("beta", beta, above=0)
    require_number("kl", kl)
    require_number("target", target, above=0)
    return beta * (1 + min(max(kl / target - 1, -0.2), 0.2))


def _share_probes() -> list[tuple[Tensor, Tensor, int]]:
    rewards = torch.tensor([0.2, 0.9, 0.5, 0.9, -0.7, 0.5])  # two ties, none in order
    probabilities = torch.tensor([0.3, 0.1, 0.2, 0.15, 0.2, 0.05])
    close = torch.tensor([0.31, -0.62, 0.34, 0.31])
    return [
        (rewards, probabilities, 4),
        (rewards[:3], torch.tensor([0.5, 0.2, 0.3]), 2),
        (rewards, probabilities, 16),
        (close, torch.tensor([0.1, 0.4, 0.3, 0.2]), 3),
        (close, torch.tensor([0.1, 0.4, 0.3, 0.2]), 1),
    ]


def _dpo_probes() -> list[tuple[Tensor, Tensor, Tensor, Tensor, float]]:
    chosen, rejected = torch.tensor([-12.0, -30.5, -8.0, -21.0]), torch.tensor([-14.0, -28.0, -8.5, -25.0])
    # no margin is 0 or 1 / beta: a loss written with max or abs has a kink there
    ref = torch.tensor([-13.0, -29.0, -8.3, -19.0]), torch.tensor([-13.5, -29.5, -9.1, -28.0])
    far = (-210.0, -60.0), (-40.0, -190.0), (-50.0, -62.0), (-55.0, -65.0)  # where log(sigmoid) gives -inf
    return [
        (chosen, rejected, *ref, 0.1),
        (chosen[:2], rejected[:2], ref[0][:2], ref[1][:2], 0.5),
        (chosen[3:], rejected[3:], ref[0][3:], ref[1][3:], 0.3),
        (*map(torch.tensor, far), 1.0),
    ]


def _beta_probes() -> list[tuple[float, float, float]]:
    usual = [(0.1, 5.5, 5.0), (0.2, 30.0, 5.0), (0.05, 0.4, 2.0), (0.3, 1.8, 2.0), (0.4, 2.0, 2.0)]
    # a KL of 0, as at the start, and an estimate below 0; a large beta and a tiny one
    return [*usual, (0.2, 0.0, 4.0), (0.3, -0.25, 2.0), (1.5, 2.1, 2.0), (0.004, 1.9, 2.0)]


def _by_mass(wrong: Callable[[Tensor, Tensor, Tensor, int], Tensor]) -> Callable[..., Tensor]:
    """`wrong` of the probabilities of a reward no higher, of a lower one and of each outcome, and of n."""

    def compare(rewards: Tensor, probabilities: Tensor, n: int) -> Tensor:
        upto = (rewards <= rewards[:, None]).float() @ probabilities
        below = (rewards < rewards[:, None]).float() @ probabilities
        return wrong(upto, below, probabilities, n)

    return compare


def _in_order(rewards: Tensor, probabilities: Tensor, n: int) -> Tensor:
    """Make every outcome a class of its own, and order ties by index."""
    order = rewards.argsort(stable=True)
    upto = probabilities[order].cumsum(0) ** n
    return torch.zeros_like(upto).scatter(0, order, upto.diff(prepend=torch.zeros(1)))


BEST_OF_N_SHARES = Exercise(
    name="best_of_n_shares",
    lesson=2,
    reference=best_of_n_shares,
    probes=_share_probes,
    mistakes=named(
        "the n-th power is missing: this is the share of ONE draw",
        lambda r, p, n: p,
        _by_mass(lambda upto, below, p, n: upto - below),
        "ties are not split: each outcome got the share of its whole reward class",
        _by_mass(lambda upto, below, p, n: upto**n - below**n),
        "ties were split into equal parts: the likelier outcome is drawn more often",
        lambda r, p, n: (
            _by_mass(lambda upto, below, p, n: upto**n - below**n)(r, p, n) / (r == r[:, None]).sum(1)
        ),
        "a tie was settled by index: outcomes of equal reward are one class, split by probability",
        _in_order,
        "this is the probability that the best is no higher than this: subtract that of a lower best",
        _by_mass(lambda upto, below, p, n: upto**n),
        _by_mass(lambda upto, below, p, n: upto**n * p / (upto - below)),
        "this is the probability that ALL n draws are this outcome",
        lambda r, p, n: p**n,
        _by_mass(lambda upto, below, p, n: (upto - below) ** n),
        "this is the probability that the outcome is drawn at all: it must also be the best of the n",
        lambda r, p, n: 1 - (1 - p) ** n,
        "n p F^(n-1) is the density of a continuous reward: with few outcomes it does not add up to 1",
        _by_mass(lambda upto, below, p, n: n * p * upto ** (n - 1)),
        "the WORST of n was kept: F counts lower rewards, not higher ones",
        lambda r, p, n: best_of_n_shares(-r, p, n),
        "this is the best of n - 1",
        _by_mass(lambda upto, below, p, n: (upto ** (n - 1) - below ** (n - 1)) * p / (upto - below)),
        "the shares are in the order of the rewards: return them in the order of the outcomes",
        lambda r, p, n: best_of_n_shares(r, p, n)[r.argsort()],
        "the outcomes were added up in the order given: F counts those with a lower REWARD",
        lambda r, p, n: p.cumsum(0) ** n - (p.cumsum(0) - p) ** n,
        "the probabilities never enter: outcomes are not equally likely",
        lambda r, p, n: best_of_n_shares(r, torch.full_like(p, 1 / len(p)), n),
        "the highest reward got everything: with n draws it may not occur",
        lambda r, p, n: F.one_hot(r.argmax(), len(r)).float(),
        lambda r, p, n: (r == r.max()) * p / p[r == r.max()].sum(),
        "this is a tilt by exp(reward), the optimum of RL with a KL penalty, not best-of-n",
        lambda r, p, n: (p.log() + r).softmax(0),
        lambda r, p, n: (p.log() + n * r).softmax(0),
    ),
)


def _by_ratios(wrong: Callable[[Tensor, Tensor, float], Tensor]) -> Callable[..., Tensor]:
    """`wrong` of the log-ratios policy / reference of the chosen and the rejected response, and beta."""
    return lambda pc, pr, rc, rr, beta: wrong(pc - rc, pr - rr, beta)


DPO_LOSS = Exercise(
    name="dpo_loss",
    lesson=2,
    reference=dpo_loss,
    probes=_dpo_probes,
    mistakes=named(
        "the sign is flipped: chosen and rejected, or policy and reference, changed places",
        _by_ratios(lambda c, r, beta: -F.logsigmoid(beta * (r - c))),
        "the minus is missing: this is the log-likelihood, a loss is its negative",
        _by_ratios(lambda c, r, beta: F.logsigmoid(beta * (c - r))),
        "beta stands outside the sigmoid: there it only scales the loss, it belongs to the difference",
        _by_ratios(lambda c, r, beta: -beta * F.logsigmoid(c - r)),
        "beta never enters",
        _by_ratios(lambda c, r, beta: -F.logsigmoid(c - r)),
        "the difference was divided by beta: the implicit reward is beta log(pi / ref)",
        _by_ratios(lambda c, r, beta: -F.logsigmoid((c - r) / beta)),
        "log(sigmoid(x)) underflows, log(1 + exp(-x)) overflows: a large difference gives inf; use "
        "torch.nn.functional.logsigmoid(x)",
        _by_ratios(lambda c, r, beta: -torch.log(torch.sigmoid(beta * (c - r)))),
        "a small constant inside the log hides the underflow: the loss is capped where it should grow",
        _by_ratios(lambda c, r, beta: -torch.log(torch.sigmoid(beta * (c - r)) + 1e-12)),
        _by_ratios(lambda c, r, beta: -torch.log(torch.sigmoid(beta * (c - r)) + 1e-10)),
        _by_ratios(lambda c, r, beta: -torch.log(torch.sigmoid(beta * (c - r)) + 1e-8)),
        "the reference never enters: nothing holds the policy near it",
        lambda pc, pr, rc, rr, beta: -F.logsigmoid(beta * (pc - pr)),
        "the reference's difference was added: subtract it from the policy's",
        lambda pc, pr, rc, rr, beta: -F.logsigmoid(beta * (pc - pr + rc - rr)),
        "beta multiplies the policy's part alone: a bracket is missing",
        lambda pc, pr, rc, rr, beta: -F.logsigmoid(beta * (pc - pr) - (rc - rr)),
        "the rejected response never enters: a pair is a comparison",
        _by_ratios(lambda c, r, beta: -F.logsigmoid(beta * c)),
        "the two log-ratios were added: what counts is chosen MINUS rejected",
        _by_ratios(lambda c, r, beta: -F.logsigmoid(beta * (c + r))),
        "each response was judged alone, as in two classifications: DPO compares the two",
        _by_ratios(lambda c, r, beta: -F.logsigmoid(beta * c) - F.logsigmoid(-beta * r)),
        "this is the probability of the label (or 1 minus it), not a loss: take -log of it",
        _by_ratios(lambda c, r, beta: torch.sigmoid(beta * (c - r))),
        _by_ratios(lambda c, r, beta: -torch.sigmoid(beta * (c - r))),
        _by_ratios(lambda c, r, beta: torch.sigmoid(beta * (r - c))),
        "there is no log-sigmoid: the bare margin never levels off",
        _by_ratios(lambda c, r, beta: -beta * (c - r)),
        _by_ratios(lambda c, r, beta: beta * (c - r)),
        "this is the hinge loss: it is exactly zero once the margin reaches 1",
        _by_ratios(lambda c, r, beta: F.relu(1 - beta * (c - r))),
        "this is IPO, a squared distance to 1 / (2 beta): DPO takes -logsigmoid",
        _by_ratios(lambda c, r, beta: (c - r - 1 / (2 * beta)) ** 2),
        "the pairs were averaged or summed: return one loss per pair, shape (B,)",
        lambda *pairs_and_beta: dpo_loss(*pairs_and_beta).mean(),
        lambda *pairs_and_beta: dpo_loss(*pairs_and_beta).sum(),
    ),
)


def _by_error(wrong: Callable[[float, float], float]) -> Callable[..., float]:
    """`wrong` of beta and the clipped error clip(kl / target - 1, -0.2, 0.2)."""
    return lambda beta, kl, target: wrong(beta, min(max(kl / target - 1, -0.2), 0.2))


NEXT_BETA = Exercise(
    name="next_beta",
    lesson=2,
    reference=next_beta,
    probes=_beta_probes,
    mistakes=named(
        "the direction is wrong: KL above its target must RAISE beta, which holds the policy closer",
        _by_error(lambda beta, error: beta * (1 - error)),
        _by_error(lambda beta, error: beta / (1 + error)),
        lambda beta, kl, target: beta * (1 + min(max(target / kl - 1, -0.2), 0.2)),
        lambda beta, kl, target: beta * target / kl,
        lambda beta, kl, target: beta * (0.9 if kl > target else 1.1),
        lambda beta, kl, target: beta * (0.8 if kl > target else 1.2),
        "the error is not clipped: one noisy KL may move beta by any factor",
        lambda beta, kl, target: beta * kl / target,
        "the error is clipped on one side only: it is at most 0.2 up AND down",
        lambda beta, kl, target: beta * (1 + min(kl / target - 1, 0.2)),
        lambda beta, kl, target: beta * (1 + max(kl / target - 1, -0.2)),
        "the error is kl - target, in nats: make it relative, kl / target - 1",
        lambda beta, kl, target: beta * (1 + min(max(kl - target, -0.2), 0.2)),
        "the - 1 is missing: on target the error must be 0, so that beta stays",
        lambda beta, kl, target: beta * (1 + min(max(kl / target, -0.2), 0.2)),
        "the distance is divided by kl, which may be 0: divide it by target",
        lambda beta, kl, target: beta * (1 + min(max(1 - target / kl, -0.2), 0.2)),
        "the 1 + is missing: beta itself must stay, and change by a share of itself",
        _by_error(lambda beta, error: beta * error),
        "this is the factor: multiply beta by it",
        _by_error(lambda beta, error: 1 + error),
        "this is the clipped error: beta is to be multiplied by 1 + error",
        _by_error(lambda beta, error: error),
        "the error was added to beta: a step is a share of beta, so multiply by 1 + error",
        _by_error(lambda beta, error: beta + error),
        "beta itself was clipped: clip the error",
        lambda beta, kl, target: min(max(beta * kl / target, -0.2), 0.2),
        "the step is always of one size: near the target it must be small, and on target 0",
        lambda beta, kl, target: beta * (1.2 if kl > target else 0.8),
        lambda beta, kl, target: beta * (1.1 if kl > target else 0.9),
        "beta did not move",
        lambda beta, kl, target: beta,
        "this is a tensor: return a Python number, with .item()",
        lambda beta, kl, target: torch.tensor(next_beta(beta, kl, target)),
    ),
)

EXERCISES = (BEST_OF_N_SHARES, DPO_LOSS, NEXT_BETA)

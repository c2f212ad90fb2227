"""Exercises of lesson 1: the Bradley-Terry loss, and reading the reward at the last real token."""

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_helpers.core.preference_losses import bradley_terry_loss
from rlhf_helpers.lab.exercises.exercise import Exercise, Mistake


def read_last(values: Tensor, mask: Tensor) -> Tensor:
    """Read each row's value at its last real token: values[b, sum_t mask[b, t] - 1].

    values (B, T), mask (B, T) with 1 for real tokens and right padding; returns (B,). Raises ValueError for
    shapes that differ, a row without a real token, and left padding. Lesson 1 derives it.
    """
    if values.ndim != 2 or values.shape != mask.shape:
        raise ValueError(
            f"values and mask must both be (B, T), got {tuple(values.shape)}, {tuple(mask.shape)}"
        )
    lengths = mask.long().sum(1)
    if not torch.equal(mask.bool(), torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]):
        raise ValueError(
            "mask must be right-padded (ones, then zeros): move the padding to the end of the rows"
        )
    if (lengths == 0).any():
        raise ValueError(f"row {int(lengths.argmin())} of mask has no real token: drop the empty row")
    return values.gather(1, lengths[:, None] - 1)[:, 0]


def _reward_probes() -> list[tuple[Tensor, Tensor]]:
    return [
        (torch.tensor([2.0, 0.5, -1.0, 0.3]), torch.tensor([1.0, 1.5, -1.0, -0.4])),
        (torch.tensor([0.7]), torch.tensor([0.2])),
        (
            torch.tensor([150.0, -120.0, 3.0]),
            torch.tensor([-150.0, 130.0, -4.0]),
        ),  # where log(sigmoid) gives -inf
    ]


def _last_probes() -> list[tuple[Tensor, Tensor]]:
    values = torch.tensor(
        [[0.5, -1.5, 2.5, 0.25, 3.5], [1.0, 4.0, -2.0, 0.75, -0.5], [-0.3, 1.2, 0.9, 2.2, 6.0]]
    )
    inner = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    edges = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]])
    return [(values, inner), (values, edges), (values[:2, :3], torch.ones(2, 3, dtype=torch.long))]


BRADLEY_TERRY = Exercise(
    name="bradley_terry",
    lesson=1,
    reference=bradley_terry_loss,
    probes=_reward_probes,
    mistakes=(
        Mistake(
            "the sign is flipped: the loss falls when the REJECTED answer gets the larger reward",
            lambda c, r: -F.logsigmoid(r - c),
        ),
        Mistake(
            "the minus is missing: this is the log-likelihood, a loss is its negative",
            lambda c, r: F.logsigmoid(c - r),
        ),
        Mistake(
            "the squared difference punishes a large margin in the RIGHT direction too",
            lambda c, r: (c - r) ** 2,
        ),
        Mistake(
            "-(chosen - rejected) has no log-sigmoid: it never saturates, so rewards drift apart for ever",
            lambda c, r: r - c,
        ),
        Mistake(
            "a sigmoid without its logarithm: -sigmoid(difference) is not a log-likelihood",
            lambda c, r: -torch.sigmoid(c - r),
        ),
        Mistake(
            "this is the probability that the chosen answer wins, not a loss: take -log of it",
            lambda c, r: torch.sigmoid(c - r),
        ),
        Mistake(
            "1 - probability is not a log-likelihood: take -log of the probability instead",
            lambda c, r: torch.sigmoid(r - c),
        ),
        Mistake(
            "the loss was averaged over the batch: return one loss per pair, shape (B,)",
            lambda c, r: -F.logsigmoid(c - r).mean(),
        ),
        Mistake(
            "the loss was summed over the batch: return one loss per pair, shape (B,)",
            lambda c, r: -F.logsigmoid(c - r).sum(),
        ),
        Mistake(
            "log(sigmoid(x)) underflows, so large gaps give inf: use F.logsigmoid(x)",
            lambda c, r: -torch.log(torch.sigmoid(c - r)),
        ),
        *(
            Mistake(
                "a small constant inside the log hides the underflow: the loss is capped where it should "
                "grow, and the gradient dies there; use F.logsigmoid",
                lambda c, r, tiny=tiny: -torch.log(torch.sigmoid(c - r) + tiny),
            )
            for tiny in (1e-12, 1e-10, 1e-8, 1e-6)
        ),
        Mistake(
            "exp(reward) overflows for large rewards: write the ratio as a sigmoid of the difference",
            lambda c, r: -torch.log(torch.exp(c) / (torch.exp(c) + torch.exp(r))),
        ),
        Mistake(
            "the strengths are exp(reward), not the rewards themselves, which may be negative",
            lambda c, r: -torch.log(c / (c + r)),
        ),
        Mistake(
            "(B, 1) against (B,) broadcast to (B, B): every chosen met every rejected answer",
            lambda c, r: -F.logsigmoid(c[:, None] - r),
        ),
        Mistake("the rejected rewards never enter the loss", lambda c, r: -F.logsigmoid(c)),
        Mistake(
            "each answer was judged alone (two classifications): Bradley-Terry compares the two",
            lambda c, r: -F.logsigmoid(c) - F.logsigmoid(-r),
        ),
        Mistake(
            "this is the hinge loss: exactly zero once the margin is 1", lambda c, r: F.relu(1 - (c - r))
        ),
        Mistake(
            "the loss is zero for every pair: nothing can be learned from it",
            lambda c, r: torch.zeros_like(c),
        ),
    ),
)

LAST_TOKEN = Exercise(
    name="last_token",
    lesson=1,
    reference=read_last,
    probes=_last_probes,
    mistakes=(
        Mistake("the last COLUMN was read: in shorter rows that is padding", lambda v, m: v[:, -1]),
        Mistake(
            "one position too late: a row with n real tokens has its last one at index n - 1",
            lambda v, m: v[torch.arange(len(v)), m.sum(1)],
        ),
        Mistake(
            "one position too late, then clamped to the row: the last of n real tokens is at index n - 1",
            lambda v, m: v[torch.arange(len(v)), m.sum(1).clamp(max=m.shape[1] - 1)],
        ),
        Mistake(
            "one position too early: the token before the last one was read",
            lambda v, m: v[torch.arange(len(v)), m.sum(1) - 2],
        ),
        Mistake("the FIRST token was read: it has seen nothing of the response", lambda v, m: v[:, 0]),
        Mistake(
            "the values were averaged over the real tokens: read one of them",
            lambda v, m: (v * m).sum(1) / m.sum(1),
        ),
        Mistake("the values were averaged over ALL positions, padding included", lambda v, m: v.mean(1)),
        Mistake("the values were summed over the real tokens: read one of them", lambda v, m: (v * m).sum(1)),
        Mistake(
            "the LARGEST value of each row was read, not the last one",
            lambda v, m: v.masked_fill(m == 0, -torch.inf).max(1).values,
        ),
        Mistake(
            "values * mask only zeroes the padding; its last column is still the padding",
            lambda v, m: (v * m)[:, -1],
        ),
        Mistake("the first row's length was used for every row", lambda v, m: v[:, m[0].sum() - 1]),
        Mistake("the longest row's length was used for every row", lambda v, m: v[:, m.sum(1).max() - 1]),
        Mistake(
            "values[:, index] reads every index in every row, shape (B, B): pair row b with its own index",
            lambda v, m: v[:, m.sum(1) - 1],
        ),
        Mistake("the index of the last token was returned, not the value there", lambda v, m: m.sum(1) - 1),
        Mistake(
            "keep one number per row, shape (B,): squeeze the (B, 1) of gather",
            lambda v, m: v.gather(1, m.sum(1, keepdim=True) - 1),
        ),
    ),
)

EXERCISES = (BRADLEY_TERRY, LAST_TOKEN)

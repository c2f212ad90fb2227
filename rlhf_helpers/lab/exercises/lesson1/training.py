"""What training computes: two losses, the token whose value is the reward, the labels of fine-tuning."""

from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_helpers.core.preference_losses import bradley_terry_loss, plackett_luce_loss
from rlhf_helpers.core.tensors import as_bool_mask, require_shapes
from rlhf_helpers.lab.exercises.exercise import Exercise, named


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


def sft_labels(input_ids: Tensor, response_mask: Tensor) -> Tensor:
    """Labels of supervised fine-tuning: the token itself where it is trained on, elsewhere -100.

    labels[b, t] = input_ids[b, t] if response_mask[b, t] else -100, the index that cross-entropy skips. All
    (B, T), mask 0/1; not shifted, because a causal model shifts its labels. Raises ValueError for shapes
    that differ and a mask that is not 0/1. Lesson 1.
    """
    require_shapes("B T", input_ids=input_ids, response_mask=response_mask)
    return input_ids.masked_fill(~as_bool_mask(response_mask, "response_mask"), -100)


def _reward_probes() -> list[tuple[Tensor, Tensor]]:
    return [
        # no gap is 0 or 1: a loss written with max or abs has a kink there
        (torch.tensor([2.0, 0.5, -1.0, 0.3]), torch.tensor([1.4, 1.5, -1.3, -0.4])),
        (torch.tensor([0.7]), torch.tensor([0.2])),
        # gaps so large that sigmoid rounds to 0 and exp to infinity
        (torch.tensor([150.0, -120.0, 3.0]), torch.tensor([-150.0, 130.0, -4.0])),
    ]


def _last_probes() -> list[tuple[Tensor, Tensor]]:
    values = torch.tensor(  # one last value is 0
        [[0.5, -1.5, 2.5, 0.25, 3.5], [1.0, 0.0, -2.0, 0.75, -0.5], [-0.3, 1.2, 0.9, 2.2, 6.0]]
    )
    inner = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    edges = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]])
    return [
        (values, inner),
        (values, edges),
        (values[:2, :3], torch.ones(2, 3, dtype=torch.long)),
        (values[:, 1:3], edges[:, :2]),  # more rows than columns
        (values[:1], inner[1:2]),
    ]


def _sft_probes() -> list[tuple[Tensor, Tensor]]:
    # Token 2 ends a response, 0 is padding: on the right, on the left, and two responses in one row. Where
    # 0 stands within a response and 2 within a prompt, only the mask tells what is trained on.
    one = torch.tensor([[11, 7, 5, 8, 2, 0], [11, 6, 9, 0, 2, 0], [0, 0, 11, 9, 3, 2]])
    two = torch.tensor([[11, 5, 2, 12, 6, 3, 2, 0, 0]])
    tall = torch.tensor([[7, 2, 0], [2, 6, 2], [14, 13, 2], [9, 2, 0]])
    return [
        (one, torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1]]).bool()),
        (two, torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0, 0]]).bool()),
        (tall, torch.tensor([[0, 1, 0], [0, 1, 1], [0, 1, 1], [0, 1, 0]]).bool()),
    ]


def _ranking_probes() -> list[tuple[Tensor]]:
    rewards = torch.tensor([[2.0, 1.1, 1.3, -0.5], [0.1, -0.2, 0.6, 0.8], [-1.0, 0.0, 0.3, -2.0]])
    return [
        (torch.tensor([[1.5, 0.2, -0.7], [-0.3, 0.9, 0.4]]),),
        (rewards,),
        (rewards.T,),  # more rankings than places
        (torch.tensor([[150.0, -120.0, 3.0, 1.7, -0.4, 0.2]]),),  # exp overflows
    ]


BRADLEY_TERRY = Exercise(
    name="bradley_terry",
    lesson=1,
    reference=bradley_terry_loss,
    probes=_reward_probes,
    mistakes=named(
        "the sign is flipped: this loss falls when the REJECTED answer gets the larger reward",
        lambda c, r: -F.logsigmoid(r - c),
        "the minus is missing: this is the log-likelihood, and a loss is its negative",
        lambda c, r: F.logsigmoid(c - r),
        "the squared difference punishes a large margin in the RIGHT direction too",
        lambda c, r: (c - r) ** 2,
        "-(chosen - rejected) has no log-sigmoid: it never levels off, so rewards drift apart without limit",
        lambda c, r: r - c,
        "this is a sigmoid without its logarithm: -sigmoid(difference) is not a log-likelihood",
        lambda c, r: -torch.sigmoid(c - r),
        "this is the probability that the chosen answer wins, not a loss: take -log of it",
        lambda c, r: torch.sigmoid(c - r),
        "1 - probability is not a log-likelihood: take -log of the probability instead",
        lambda c, r: torch.sigmoid(r - c),
        "the loss was averaged over the batch: return one loss per pair, shape (B,)",
        lambda c, r: -F.logsigmoid(c - r).mean(),
        "the loss was summed over the batch: return one loss per pair, shape (B,)",
        lambda c, r: -F.logsigmoid(c - r).sum(),
        "log(sigmoid(x)) underflows, log(1 + exp(-x)) overflows: large gaps give inf; use "
        "torch.nn.functional.logsigmoid(x)",
        lambda c, r: -torch.log(torch.sigmoid(c - r)),
        "a small constant inside the log hides the underflow: the loss is capped where it should grow, and "
        "the gradient is 0 there; use torch.nn.functional.logsigmoid",
        lambda c, r: -torch.log(torch.sigmoid(c - r) + 1e-12),
        lambda c, r: -torch.log(torch.sigmoid(c - r) + 1e-10),
        lambda c, r: -torch.log(torch.sigmoid(c - r) + 1e-8),
        lambda c, r: -torch.log(torch.sigmoid(c - r) + 1e-6),
        "exp(reward) overflows for large rewards: write the ratio as a sigmoid of the difference",
        lambda c, r: -torch.log(torch.exp(c) / (torch.exp(c) + torch.exp(r))),
        "the strengths are exp(reward), not the rewards themselves, which may be negative",
        lambda c, r: -torch.log(c / (c + r)),
        "(B, 1) and (B,) broadcast to (B, B): every chosen answer met every rejected one",
        lambda c, r: -F.logsigmoid(c[:, None] - r),
        "the rejected rewards never enter the loss",
        lambda c, r: -F.logsigmoid(c),
        "each answer was judged alone, as in two classifications: Bradley-Terry compares the two",
        lambda c, r: -F.logsigmoid(c) - F.logsigmoid(-r),
        "this is the hinge loss: it is exactly zero once the gap reaches 1",
        lambda c, r: F.relu(1 - (c - r)),
        "the loss is zero for every pair: nothing can be learned from it",
        lambda c, r: torch.zeros_like(c),
    ),
)

LAST_TOKEN = Exercise(
    name="last_token",
    lesson=1,
    reference=read_last,
    probes=_last_probes,
    mistakes=named(
        "the last COLUMN was read: in shorter rows that is padding",
        lambda v, m: v[:, -1],
        "one position too late: a row with n real tokens has its last one at index n - 1",
        lambda v, m: v[torch.arange(len(v)), m.sum(1)],
        "one position too late, then clamped to the row: the last of n real tokens is at index n - 1",
        lambda v, m: v[torch.arange(len(v)), m.sum(1).clamp(max=m.shape[1] - 1)],
        "one position too early: the token before the last one was read",
        lambda v, m: v[torch.arange(len(v)), m.sum(1) - 2],
        "the FIRST token was read: the model has not seen the response there",
        lambda v, m: v[:, 0],
        "the values were averaged over the real tokens: read one of them",
        lambda v, m: (v * m).sum(1) / m.sum(1),
        "the values were averaged over ALL positions, padding included",
        lambda v, m: v.mean(1),
        "the values were summed over the real tokens: read one of them",
        lambda v, m: (v * m).sum(1),
        "the LARGEST value of each row was read, not the last one",
        lambda v, m: v.masked_fill(m == 0, -torch.inf).max(1).values,
        "values * mask only zeroes the padding, and the last column is still padding",
        lambda v, m: (v * m)[:, -1],
        "the first row's length was used for every row",
        lambda v, m: v[:, m[0].sum() - 1],
        "the longest row's length was used for every row",
        lambda v, m: v[:, m.sum(1).max() - 1],
        "values[:, index] reads every index in every row, shape (B, B): read row b only at its own index",
        lambda v, m: v[:, m.sum(1) - 1],
        "the index of the last token was returned, not the value there",
        lambda v, m: m.sum(1) - 1,
        "return one number per row, shape (B,): squeeze dimension 1 of what gather returns, (B, 1)",
        lambda v, m: v.gather(1, m.sum(1, keepdim=True) - 1),
    ),
)

SFT_LABELS = Exercise(
    name="sft_labels",
    lesson=1,
    reference=sft_labels,
    probes=_sft_probes,
    mistakes=named(
        "this is the wrong way round: the response was masked, and the prompt is trained on",
        lambda x, m: x.masked_fill(m, -100),
        "the labels are shifted: the model shifts them itself, and would now predict two tokens ahead",
        lambda x, m: sft_labels(x, m).roll(-1, 1),
        lambda x, m: sft_labels(x, m)[:, 1:],
        "the last token of each response is masked too: the model would not learn to stop",
        lambda x, m: sft_labels(x, m & F.pad(m[:, 1:], (0, 1))),
        "0 stands where nothing is trained on: to the loss that is a token; the value that it skips is -100",
        lambda x, m: x * m,
        "nothing is masked (masked_fill and where return a NEW tensor): prompt and padding are trained on",
        lambda x, m: x,
        "only the padding is masked: the prompt is trained on",
        lambda x, m: x.masked_fill(x == 0, -100),
        "only what comes before the response is masked: padding, or a second prompt, is trained on",
        lambda x, m: sft_labels(x, m.cumsum(1) > 0),
        "this is the mask: the labels are token ids",
        lambda x, m: m,
        lambda x, m: m.long(),
        "only the response tokens came back, in one row: keep the shape (B, T)",
        lambda x, m: x[m],
        "the token id 0 was masked within a response: only response_mask says what is trained on",
        lambda x, m: x.masked_fill(~m | (x == 0), -100),
    ),
)

PLACKETT_LUCE = Exercise(
    name="plackett_luce",
    lesson=1,
    reference=plackett_luce_loss,
    probes=_ranking_probes,
    mistakes=named(
        "the ranking is read backwards: the LAST column was placed first",
        lambda r: plackett_luce_loss(r.flip(1)),
        "an answer that has its place still competes: leave it out of the sum of every later place",
        lambda r: -r.log_softmax(1).sum(1),
        "an answer is missing from the sum of its own place: it competes until it has a place",
        lambda r: (r.flip(1).logcumsumexp(1).flip(1)[:, 1:] - r[:, :-1]).sum(1),
        "the places were averaged: the probability of a ranking is a product, so its log is a sum",
        lambda r: plackett_luce_loss(r) / r.shape[1],
        lambda r: plackett_luce_loss(r) / (r.shape[1] - 1),
        "only the first place counts here: the order of the others never enters",
        lambda r: -r.log_softmax(1)[:, 0],
        "this is Bradley-Terry summed over all pairs: a place is won against all that are left AT ONCE",
        lambda r: sum(-F.logsigmoid(r[:, i] - r[:, j]) for i, j in combinations(range(r.shape[1]), 2)),
        "this is Bradley-Terry of neighbors: a place is won against ALL answers that are left",
        lambda r: -F.logsigmoid(r[:, :-1] - r[:, 1:]).sum(1),
        "the minus is missing: this is the log-likelihood, and a loss is its negative",
        lambda r: -plackett_luce_loss(r),
        "the softmax runs over the batch (dim 0): the answers of one row compete, along dim 1",
        lambda r: -r.log_softmax(0).sum(1),
        "the loop runs over the rankings, rewards.shape[0]: places are columns, rewards.shape[1]",
        lambda r: sum(r[:, k:].logsumexp(1) - r[:, k] for k in range(r.shape[0])),
        "exp(reward) overflows for large rewards: logsumexp and log_softmax take the logarithm safely",
        lambda r: sum(r[:, k:].exp().sum(1).log() - r[:, k] for k in range(r.shape[1])),
        lambda r: -torch.stack([r[:, k:].softmax(1)[:, 0] for k in range(r.shape[1])]).prod(0).log(),
    ),
)

EXERCISES = (BRADLEY_TERRY, LAST_TOKEN, SFT_LABELS, PLACKETT_LUCE)

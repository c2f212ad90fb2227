"""What training computes: two losses, the token whose value is the reward, the labels of fine-tuning."""

from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, tensor

from rlhf_helpers.core.preference_losses import bradley_terry_loss, plackett_luce_loss
from rlhf_helpers.core.tensors import as_bool_mask, require_shapes
from rlhf_helpers.lab.exercises.exercise import (
    LOG_LOSS_MISTAKES,
    averaged,
    exercise,
    negated,
    summed,
    table,
)


def read_last(values: Tensor, mask: Tensor) -> Tensor:
    """Read each row's value at its last real token: values[b, sum_t mask[b, t] - 1].

    values (B, T), mask (B, T) with 1 for real tokens and right padding; returns (B,). Raises ValueError for
    shapes that differ, a row without a real token, and left padding. Lesson 1 derives it.
    """
    require_shapes("B T", values=values, mask=mask)
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


VALUES = tensor(  # one last value is 0
    [[0.5, -1.5, 2.5, 0.25, 3.5], [1.0, 0.0, -2.0, 0.75, -0.5], [-0.3, 1.2, 0.9, 2.2, 6.0]]
)
INNER = tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
EDGES = tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]])


RANKINGS = tensor([[2.0, 1.1, 1.3, -0.5], [0.1, -0.2, 0.6, 0.8], [-1.0, 0.0, 0.3, -2.0]])

EXERCISES = {
    "bradley_terry": exercise(
        bradley_terry_loss,
        table(
            # no gap is 0 or 1: a loss written with max or abs has a kink there
            ([2.0, 0.5, -1.0, 0.3], [1.4, 1.5, -1.3, -0.4]),
            ([0.7], [0.2]),
            # gaps so large that sigmoid rounds to 0 and exp to infinity
            ([150.0, -120.0, 3.0], [-150.0, 130.0, -4.0]),
        ),
        "the sign is flipped: this loss falls when the REJECTED answer gets the larger reward",
        lambda gap: -F.logsigmoid(-gap),
        *LOG_LOSS_MISTAKES,
        "the squared difference punishes a large margin in the RIGHT direction too",
        lambda gap: gap**2,
        "the loss was averaged over the batch: return one loss per pair, shape (B,)",
        averaged,
        "the loss was summed over the batch: return one loss per pair, shape (B,)",
        summed,
        "exp(reward) overflows for large rewards: write the ratio as a sigmoid of the difference",
        lambda chosen, rejected: -(chosen.exp() / (chosen.exp() + rejected.exp())).log(),
        "the strengths are exp(reward), not the rewards themselves, which may be negative",
        lambda chosen, rejected: -(chosen / (chosen + rejected)).log(),
        "(B, 1) and (B,) broadcast to (B, B): every chosen answer met every rejected one",
        lambda chosen, rejected: -F.logsigmoid(chosen[:, None] - rejected),
        "the loss is zero for every pair: nothing can be learned from it",
        lambda gap: 0 * gap,
        chosen=lambda chosen_rewards: chosen_rewards,
        rejected=lambda rejected_rewards: rejected_rewards,
        gap=lambda chosen, rejected: chosen - rejected,
    ),
    "last_token": exercise(
        read_last,
        [
            (VALUES, INNER),
            (VALUES, EDGES),
            (VALUES[:2, :3], INNER[::2, :3]),  # no padding
            (VALUES[:, 1:3], EDGES[:, :2]),  # more rows than columns
            (VALUES[:1], INNER[1:2]),
        ],
        "the last COLUMN was read: in shorter rows that is padding",
        lambda values: values[:, -1],
        "one position too late: a row with n real tokens has its last one at index n - 1",
        lambda values, lengths: values[range(len(values)), lengths],
        "one position too late, then clamped to the row: the last of n real tokens is at index n - 1",
        lambda values, lengths: values[range(len(values)), lengths.clamp(max=values.shape[1] - 1)],
        "one position too early: the token before the last one was read",
        lambda values, lengths: values[range(len(values)), lengths - 2],
        "the FIRST token was read: the model has not seen the response there",
        lambda values: values[:, 0],
        "the values were averaged over the real tokens: read one of them",
        lambda real, lengths: real.sum(1) / lengths,
        "the values were averaged over ALL positions, padding included",
        lambda values: values.mean(1),
        "the values were summed over the real tokens: read one of them",
        lambda real: real.sum(1),
        "the LARGEST value of each row was read, not the last one",
        lambda values, mask: values.where(mask > 0, -torch.inf).amax(1),
        "values * mask only zeroes the padding, and the last column is still padding",
        lambda real: real[:, -1],
        "the first row's length was used for every row",
        lambda values, lengths: values[:, lengths[0] - 1],
        "the longest row's length was used for every row",
        lambda values, lengths: values[:, lengths.max() - 1],
        "values[:, index] reads every index in every row, shape (B, B): read row b only at its own index",
        lambda values, lengths: values[:, lengths - 1],
        "the index of the last token was returned, not the value there",
        lambda lengths: lengths - 1,
        "return one number per row, shape (B,): squeeze dimension 1 of what gather returns, (B, 1)",
        lambda right: right[:, None],
        lengths=lambda mask: mask.sum(1),
        real=lambda values, mask: values * mask,
    ),
    "sft_labels": exercise(
        sft_labels,
        # Token 2 ends a response, 0 is padding: on the right, on the left, and two responses in one row.
        # Where 0 stands within a response and 2 within a prompt, only the mask tells what is trained on.
        [
            (
                tensor([[11, 7, 5, 8, 2, 0], [11, 6, 9, 0, 2, 0], [0, 0, 11, 9, 3, 2]]),
                tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1]]).bool(),
            ),
            (
                tensor([[11, 5, 2, 12, 6, 3, 2, 0, 0]]),
                tensor([[0, 1, 1, 0, 1, 1, 1, 0, 0]]).bool(),
            ),
            (
                tensor([[7, 2, 0], [2, 6, 2], [14, 13, 2], [9, 2, 0]]),
                tensor([[0, 1, 0], [0, 1, 1], [0, 1, 1], [0, 1, 0]]).bool(),
            ),
        ],
        "this is the wrong way round: the response was masked, and the prompt is trained on",
        lambda input_ids, response_mask: input_ids.masked_fill(response_mask, -100),
        "the labels are shifted: the model shifts them itself, and would now predict two tokens ahead",
        lambda right: right.roll(-1, 1),
        lambda right: right[:, 1:],
        "the last token of each response is masked too: the model would not learn to stop",
        lambda right, response_mask: right.where(F.pad(response_mask[:, 1:], (0, 1)), -100),
        "0 stands where nothing is trained on: to the loss that is a token; the value that it skips is -100",
        lambda input_ids, response_mask: input_ids * response_mask,
        "nothing is masked (masked_fill and where return a NEW tensor): prompt and padding are trained on",
        lambda input_ids: input_ids,
        "only the padding is masked: the prompt is trained on",
        lambda input_ids: input_ids.masked_fill(input_ids == 0, -100),
        "only what comes before the response is masked: padding, or a second prompt, is trained on",
        lambda input_ids, response_mask: input_ids.where(response_mask.cumsum(1) > 0, -100),
        "this is the mask: the labels are token ids",
        lambda response_mask: response_mask,
        lambda response_mask: response_mask.long(),
        "only the response tokens came back, in one row: keep the shape (B, T)",
        lambda input_ids, response_mask: input_ids[response_mask],
        "the token id 0 was masked within a response: only response_mask says what is trained on",
        lambda right: right.masked_fill(right == 0, -100),
    ),
    "plackett_luce": exercise(
        plackett_luce_loss,
        table(
            ([[1.5, 0.2, -0.7], [-0.3, 0.9, 0.4]],),
            (RANKINGS,),
            (RANKINGS.T,),  # more rankings than places
            ([[150.0, -120.0, 3.0, 1.7, -0.4, 0.2]],),  # exp overflows
        ),
        "the ranking is read backwards: the LAST column was placed first",
        lambda rewards: plackett_luce_loss(rewards.flip(1)),
        "an answer that has its place still competes: leave it out of the sum of every later place",
        lambda rewards: -rewards.log_softmax(1).sum(1),
        "an answer is missing from the sum of its own place: it competes until it has a place",
        lambda rewards: (rewards.flip(1).logcumsumexp(1).flip(1)[:, 1:] - rewards[:, :-1]).sum(1),
        "the places were averaged: the probability of a ranking is a product, so its log is a sum",
        lambda right, rewards: right / rewards.shape[1],
        lambda right, rewards: right / (rewards.shape[1] - 1),
        "only the first place counts here: the order of the others never enters",
        lambda rewards: -rewards.log_softmax(1)[:, 0],
        "this is Bradley-Terry summed over all pairs: a place is won against all that are left AT ONCE",
        lambda rewards: sum(bradley_terry_loss(*pair) for pair in combinations(rewards.unbind(1), 2)),
        "this is Bradley-Terry of neighbors: a place is won against ALL answers that are left",
        lambda rewards: F.softplus(rewards.diff()).sum(1),
        "the minus is missing: this is the log-likelihood, and a loss is its negative",
        negated,
        "the softmax runs over the batch (dim 0): the answers of one row compete, along dim 1",
        lambda rewards: -rewards.log_softmax(0).sum(1),
        "the loop runs over the rankings, rewards.shape[0]: places are columns, rewards.shape[1]",
        lambda rewards: sum(rewards[:, k:].logsumexp(1) - rewards[:, k] for k in range(len(rewards))),
        "exp(reward) overflows for large rewards: logsumexp and log_softmax take the logarithm safely",
        lambda rewards: sum(
            rewards[:, k:].exp().sum(1).log() - rewards[:, k] for k in range(rewards.shape[1])
        ),
    ),
}

"""What training computes: labels, losses, the token whose value is the reward, a step of training."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, tensor
from torch.optim import Optimizer

from rlhf_helpers.core.preference_losses import bradley_terry_loss
from rlhf_helpers.core.tensors import as_bool_mask, pad_right, require_shapes
from rlhf_helpers.lab.exercises.exercise import LOG_LOSS_MISTAKES, Function, exercise, table


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


def reward_step(
    rewards_of: Function, optimizer: Optimizer, chosen: list[Any], rejected: list[Any], part_size: int
) -> float:
    """Take one optimizer step on B pairs, of which at most part_size are read at a time.

    loss = 1/B sum over pairs of -logsigmoid(r_chosen - r_rejected), its gradient summed part by part

    rewards_of turns a list of answers into their rewards, (n,). Returns the loss before the step. Lesson 1.
    """
    loss_sum = 0.0
    optimizer.zero_grad()
    for start in range(0, len(chosen), part_size):
        part = slice(start, start + part_size)
        losses = bradley_terry_loss(rewards_of(chosen[part]), rewards_of(rejected[part]))
        (losses.sum() / len(chosen)).backward()
        loss_sum += losses.sum().item()
    optimizer.step()
    return loss_sum / len(chosen)


def _two_steps(step: Function, seed: int, pairs: int, part_size: int) -> Any:
    """Take two steps on a linear reward; give their losses, the weights, and whether the parts were small."""
    draw = torch.Generator().manual_seed(seed)
    weights = torch.randn(3, generator=draw).requires_grad_()
    optimizer = torch.optim.SGD([weights], lr=0.5)
    sizes, losses = [], []

    def rewards_of(answers: list[Any]) -> Tensor:
        sizes.append(len(answers))
        return torch.stack(list(answers)) @ weights

    for _ in range(2):
        chosen, rejected = torch.randn(2, pairs, 3, generator=draw).unbind()
        losses.append(step(rewards_of, optimizer, list(chosen), list(rejected), part_size))
        if not isinstance(losses[-1], float):
            return losses[-1]
    # Both answers of each pair of a part may be read together.
    return losses, weights.detach(), max(sizes, default=0) <= 2 * part_size


def pair_loss(values_of: Function, chosen: list[list[int]], rejected: list[list[int]], pad_id: int) -> Tensor:
    """Compute the mean Bradley-Terry loss of pairs of token lists, read at each answer's last token.

    values_of turns ids (B, T) into one number per token, (B, T, 1). Padding changes nothing, nor do the other
    pairs of the batch. Lesson 1.
    """
    rewards = []
    for answers in (chosen, rejected):
        ids, mask = pad_right(answers, pad_id)
        rewards.append(values_of(ids)[torch.arange(len(ids)), mask.sum(1) - 1, 0])
    return -F.logsigmoid(rewards[0] - rewards[1]).mean()


def _loss_and_gradient(loss_of: Function, seed: int, pad_id: int) -> Any:
    """Differentiate the loss of three pairs by the values of ten tokens; 2 ends each answer."""
    draw = torch.Generator().manual_seed(seed)
    table = torch.randn(10, generator=draw).requires_grad_()
    chosen, rejected = [[5, 6, 2], [7, 2], [3, 8, 4, 2]], [[4, 2], [3, 5, 8, 6, 2], [6, 2]]
    loss = loss_of(lambda ids: table[ids].cumsum(1).sin()[..., None], chosen, rejected, pad_id)
    if not (isinstance(loss, Tensor) and loss.requires_grad and loss.numel() == 1):
        return loss
    loss.backward()
    return loss.detach(), table.grad


VALUES = tensor(  # one last value is 0
    [[0.5, -1.5, 2.5, 0.25, 3.5], [1.0, 0.0, -2.0, 0.75, -0.5], [-0.3, 1.2, 0.9, 2.2, 6.0]]
)
INNER = (torch.arange(5) < tensor([[3], [2], [4]])).long()
EDGES = (torch.arange(5) < tensor([[5], [1], [3]])).long()
# Token 2 ends a response, 0 is padding: right of the first row, left of the second; the third holds two
# responses. Where 0 stands within a response and 2 within a prompt, only the mask tells what is trained on.
IDS = tensor([[11, 2, 5, 8, 2, 0, 0], [0, 11, 9, 0, 3, 4, 2], [11, 7, 6, 2, 12, 3, 2]])
RESPONSE = tensor([[0, 0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 1, 1]]).bool()
ENDS = tensor([[7, 2], [6, 2], [2, 2]])  # prompts and responses of one token

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
        "the square punishes a large difference in the RIGHT direction too",
        lambda gap: gap**2,
        "exp(reward) overflows for large rewards: write the ratio as a sigmoid of the difference",
        lambda chosen, rejected: -(chosen.exp() / (chosen.exp() + rejected.exp())).log(),
        "the strengths are exp(reward), not the rewards themselves, which may be negative",
        lambda chosen, rejected: -(chosen / (chosen + rejected)).log(),
        "(B, 1) and (B,) broadcast to (B, B): every chosen answer met every rejected one",
        lambda chosen, rejected: -F.logsigmoid(chosen[:, None] - rejected),
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
        ("values.gather(1, lengths[:, None] - 1)[:, 0]", "values[range(len(values)), lengths]"),
        "one position too late, then clamped to the row: the last of n real tokens is at index n - 1",
        ("lengths[:, None] - 1", "lengths[:, None].clamp(max=values.shape[1] - 1)"),
        "one position too early: the token before the last one was read",
        ("values.gather(1, lengths[:, None] - 1)[:, 0]", "values[range(len(values)), lengths - 2]"),
        "the FIRST token was read: the model has not seen the response there",
        lambda values: values[:, 0],
        "the values were averaged over the real tokens: read one of them",
        lambda values, mask: (values * mask).sum(1) / mask.sum(1),
        "the values were averaged over ALL positions, padding included",
        lambda values: values.mean(1),
        "values * mask only zeroes the padding, and the last column is still padding",
        lambda values, mask: (values * mask)[:, -1],
        "values[:, index] reads every index in every row, shape (B, B): read row b only at its own index",
        ("values.gather(1, lengths[:, None] - 1)[:, 0]", "values[:, lengths - 1]"),
        "the index of the last token was returned, not the value there",
        ("values.gather(1, lengths[:, None] - 1)[:, 0]", "lengths - 1"),
        "return one number per row, shape (B,): squeeze dimension 1 of what gather returns, (B, 1)",
        (")[:, 0]", ")"),
    ),
    "sft_labels": exercise(
        sft_labels,
        [(IDS, RESPONSE), (IDS[1:], RESPONSE[1:]), (ENDS, RESPONSE[:, 1:3])],
        "this is the wrong way round: the response was masked, and the prompt is trained on",
        ("~", ""),
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
        ('~as_bool_mask(response_mask, "response_mask")', "input_ids == 0"),
        "only what comes before the response is masked: padding, or a second prompt, is trained on",
        lambda input_ids, response_mask: input_ids.where(response_mask.cumsum(1) > 0, -100),
        "only the response tokens came back, in one row: keep the shape (B, T)",
        lambda input_ids, response_mask: input_ids[response_mask],
        "the token id 0 was masked within a response: only response_mask says what is trained on",
        lambda right: right.masked_fill(right == 0, -100),
    ),
    "reward_step": exercise(
        reward_step,
        [(0, 7, 3), (1, 4, 4), (2, 5, 2)],
        "the gradient of the last step is still there: call optimizer.zero_grad() before the first part",
        ("optimizer.zero_grad()", "pass"),
        "zero_grad() runs for each part, so only the last part's gradient is left for the step",
        ("losses = ", "optimizer.zero_grad(); losses = "),
        "the weights did not move: call optimizer.step() after the last part, before any zero_grad()",
        ("optimizer.step()", "optimizer.zero_grad(); optimizer.step()"),
        ("    optimizer.step()", ""),
        "there is a step after each part: add up the gradients of all parts, then take one step",
        ("backward()", "backward(); optimizer.step(); optimizer.zero_grad()"),
        ("backward()", "backward(); optimizer.step()", "    optimizer.step()", ""),
        "the means of the parts were added up: with several parts, the gradient is too large",
        ("losses.sum() / len(chosen)", "losses.mean()"),
        "every part got the same weight, but the last part may be smaller: its pairs then count for more",
        ("losses.sum() / len(chosen)", "losses.mean() / -(-len(chosen) // part_size)"),
        "chosen and rejected are swapped: this step raises the rewards of the REJECTED answers",
        (
            "rewards_of(chosen[part]), rewards_of(rejected[part])",
            "*map(rewards_of, (rejected[part], chosen[part]))",
        ),
        "all pairs were read at once: read at most part_size of them at a time",
        ("loss_sum = 0.0", "loss_sum, part_size = 0.0, len(chosen)"),
        "return the mean loss of ALL pairs, not that of the last part",
        ("loss_sum / len(chosen)", "losses.mean().item()"),
        "return a Python number: a tensor keeps all that its gradient needs in memory",
        ("loss_sum / len(chosen)", "torch.tensor(loss_sum / len(chosen))"),
        trial=_two_steps,
    ),
    "pair_loss": exercise(
        pair_loss,
        [(0, 9), (1, 2)],
        "one fault is left: the reward is still read in the last column, which may be padding",
        ("mask.sum(1) - 1", "-1"),
        "one fault is left: (B, 1) minus (B,) is (B, B), every chosen answer against every rejected one",
        ("rewards[0] -", "rewards[0][:, None] -"),
        "this is the broken function: compare its loss of two pairs with the mean of what it says of each",
        ("mask.sum(1) - 1", "-1", "rewards[0] -", "rewards[0][:, None] -"),
        "the end was found by pad_id, but where the end token is also the pad token, this drops the end: "
        "use the lengths of the lists",
        ("mask.sum(1)", "(ids != pad_id).sum(1)"),
        "one position too early: n tokens end at index n - 1",
        ("- 1", "- 2"),
        "the losses were summed: return their mean",
        (".mean()", ".sum()"),
        "the sign is flipped: this loss falls when the REJECTED answer gets the larger reward",
        ("rewards[0] - rewards[1]", "rewards[1] - rewards[0]"),
        "the result has no gradient: nothing can be trained with it",
        (".mean()", ".mean().detach()"),
        trial=_loss_and_gradient,
    ),
}

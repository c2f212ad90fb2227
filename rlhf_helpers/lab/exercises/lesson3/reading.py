"""What a model's inside tells: a label from its log-probs, swaps from gradients, causes by patching."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_helpers import interpretability
from rlhf_helpers.constitutional_ai import training
from rlhf_helpers.lab.exercises.exercise import Exercise, named
from rlhf_helpers.red_teaming import gradient

soft_label = torch.no_grad()(training.soft_label)
swap_scores = torch.no_grad()(gradient.swap_scores)
patching_effect = torch.no_grad()(interpretability.patching_effect)


def _label_probes() -> list[tuple[Tensor, ...]]:
    a, b = torch.tensor([-0.4, -1.9, -0.6, -2.5, -0.1]), torch.tensor([-1.3, -0.3, -1.1, -0.2, -3.6])
    swapped = torch.tensor([-0.3, -0.5, -2.2, -0.7, -0.2]), torch.tensor([-1.6, -1.4, -0.2, -0.9, -2.4])
    sure = torch.tensor([-0.02]), torch.tensor([-5.0]), torch.tensor([-4.5]), torch.tensor([-0.03])
    return [(a, b, *swapped), (a[1:3], swapped[1][:2], b[:2], swapped[0][3:]), sure]


def _swap_probes() -> list[tuple[Tensor, Tensor]]:
    wide = torch.tensor([[0.3, -0.8, 1.1, 0.2], [-0.5, 0.4, -1.3, 0.9], [0.7, 0.1, -0.2, -0.6]])
    square = torch.cat([wide, torch.tensor([[1.2, -0.4, 0.5, 0.8]])])  # T = V: wrong shapes broadcast
    return [
        (wide, torch.tensor([2, 0, 1])),
        (square, torch.tensor([1, 3, 0, 2])),
        (wide.T, torch.tensor([1, 0, 1, 2])),  # more tokens than the vocabulary has
        (wide[:1], torch.tensor([1])),
    ]


def _patch_probes() -> list[tuple[Tensor, Tensor, Tensor]]:
    clean, corrupted = torch.tensor([3.0, 2.5, -1.0, 4.0, 1.5]), torch.tensor([-1.0, 0.5, 1.5, -2.0, -0.5])
    patched = torch.tensor([1.0, 0.1, -1.6, -2.0, 1.9])  # below 0 and above 1 too; the third runs downwards
    far = torch.tensor([1.0, -2.0]), torch.tensor([0.8, 0.4]), torch.tensor([2.0, 4.0])
    one = torch.tensor([0.5]), torch.tensor([2.0]), torch.tensor([1.4])
    return [(clean, corrupted, patched), (clean[:2], corrupted[:2], patched[3:]), far, one]


def _by_odds(*wrong: Callable[[Tensor, Tensor], Tensor]) -> list[Callable[..., Tensor]]:
    """Each `wrong` of the two log-odds of "A": in the order given, and swapped."""
    return [lambda a, b, sa, sb, fn=fn: fn(a - b, sa - sb) for fn in wrong]


LABEL_MISTAKES = named(
    "only one order was used: the judge's liking for a letter stays in the label",
    *_by_odds(lambda x, y: torch.sigmoid(x), lambda x, y: torch.sigmoid(-y)),
    "the orders were ADDED: after the swap A is the other answer, so answers cancel and the bias stays",
    *_by_odds(lambda x, y: torch.sigmoid((x + y) / 2), lambda x, y: torch.sigmoid(x + y)),
    *_by_odds(lambda x, y: (torch.sigmoid(x) + torch.sigmoid(y)) / 2),
    "the two PROBABILITIES were averaged: average the log-odds, where a constant bias cancels exactly",
    *_by_odds(lambda x, y: (torch.sigmoid(x) + torch.sigmoid(-y)) / 2),
    "the two orders were summed, not averaged: the label is too sure of itself",
    *_by_odds(lambda x, y: torch.sigmoid(x - y)),
    "this is the probability that the OTHER answer is better",
    *_by_odds(lambda x, y: torch.sigmoid((y - x) / 2), lambda x, y: torch.sigmoid(y - x)),
    "this is a hard label: it loses how sure the judge is",
    *_by_odds(lambda x, y: (x > y).float()),
    "these are log-odds (any number), not a probability: one step is missing",
    *_by_odds(lambda x, y: (x - y) / 2, lambda x, y: x - y),
    "this is the logarithm of the label",
    *_by_odds(lambda x, y: F.logsigmoid((x - y) / 2)),
    "only the letter that names the first answer was read: A and B do not sum to 1, compare the two",
    *(lambda a, b, sa, sb: ((a + sb) / 2).exp(), lambda a, b, sa, sb: (a.exp() + sb.exp()) / 2),
    "the same letter was compared across the orders, without its rival",
    *(lambda a, b, sa, sb: torch.sigmoid(a - sa), lambda a, b, sa, sb: torch.sigmoid((a - sa) / 2)),
    "the pairs were averaged: return one label per pair, shape (B,)",
    lambda *logps: soft_label(*logps).mean(),
)


def _own(rows: Tensor, tokens: Tensor) -> Tensor:
    return rows[torch.arange(len(tokens)), tokens]


def _by_score(*wrong: Callable[[Tensor], Tensor]) -> list[Callable[..., Tensor]]:
    """Each `wrong` of the right scores (T, V)."""
    return [lambda g, tokens, fn=fn: fn(swap_scores(g, tokens)) for fn in wrong]


SWAP_MISTAKES = named(
    "the sign is flipped: this is how far the loss would FALL; return its change, new minus current",
    *_by_score(torch.neg),
    "the current token's own gradient was not subtracted: keeping it must score 0",
    *(lambda g, tokens: g, lambda g, tokens: -g),
    "the current token's gradient was added: a swap takes it away",
    lambda g, tokens: g + _own(g, tokens)[:, None],
    "the wrong row was subtracted: tokens are ids, so columns of the gradient; row t belongs to token t",
    lambda g, tokens: g - g[tokens],
    lambda g, tokens: g - g.gather(0, tokens[None].expand(len(g), -1)),
    lambda g, tokens: g - g[tokens, torch.arange(len(tokens))][:, None],
    "shape (T,) was subtracted along the vocabulary: every row has its own number, in shape (T, 1)",
    lambda g, tokens: g - _own(g, tokens),
    "whole columns were taken: of each token's column only the entry in its own row counts",
    lambda g, tokens: g - g[:, tokens],
    "this is the current token's gradient alone: subtract it from its row",
    *(_own, lambda g, tokens: _own(g, tokens)[:, None]),
    "the sign of the scores is lost: a swap that helps looks like one that hurts",
    *_by_score(torch.abs, torch.square),
    "only the best token of each row came back: return the score of every token, shape (T, V)",
    *_by_score(lambda scores: scores.argmin(1), lambda scores: scores.amin(1)),
    "the mean (or the lowest) of the row was subtracted: subtract the entry of the current token",
    *(lambda g, tokens: g - g.mean(1, keepdim=True), lambda g, tokens: g - g.amin(1, keepdim=True)),
    "the gradient was scaled on the way: use it as it is",
    lambda g, tokens: swap_scores(F.normalize(g, dim=1), tokens),
    "swaps that hurt were set to 0: they have a score, too",
    *_by_score(lambda scores: scores.clamp(max=0)),
)


def _by_effect(*wrong: Callable[[Tensor], Tensor]) -> list[Callable[..., Tensor]]:
    """Each `wrong` of the right effect (B,)."""
    return [lambda c, x, p, fn=fn: fn(patching_effect(c, x, p)) for fn in wrong]


PATCH_MISTAKES = named(
    "the fraction is upside down: the whole gap, clean minus corrupted, is the denominator",
    *_by_effect(torch.reciprocal),
    "clean and corrupted changed places: a patch that does nothing must give 0",
    lambda c, x, p: patching_effect(x, c, p),
    "this is minus the share that came back: subtract in the same order above and below",
    *_by_effect(torch.neg),
    "this is measured from the clean run: begin at the corrupted one, where the patch goes in",
    *(lambda c, x, p: (p - c) / (c - x), lambda c, x, p: c - p),
    "there is no denominator: return which SHARE of the gap came back",
    *(lambda c, x, p: p - x, lambda c, x, p: (p - x).abs()),
    "the corrupted run must be subtracted above AND below: the gap begins there, not at 0",
    *(lambda c, x, p: p / c, lambda c, x, p: p / (c - x), lambda c, x, p: (p - x) / c),
    "the change was divided by the corrupted value: it is a share of the gap to the clean run",
    *(lambda c, x, p: (p - x) / x, lambda c, x, p: p / x),
    "the result was clamped: patches that overshoot, or make it worse, are findings",
    *_by_effect(lambda e: e.clamp(0, 1), lambda e: e.clamp(min=0), lambda e: e.clamp(max=1)),
    "the direction is lost in an absolute value",
    *(*_by_effect(torch.abs), lambda c, x, p: (p - x) / (c - x).abs()),
    "the prompts were averaged: return one effect per prompt, shape (B,)",
    *(*_by_effect(torch.mean), lambda c, x, p: (p - x).mean() / (c - x).mean()),
    "all prompts were divided by one mean gap: each has its own",
    lambda c, x, p: (p - x) / (c - x).mean(),
)

SOFT_LABEL = Exercise("soft_label", 3, soft_label, _label_probes, LABEL_MISTAKES)
SWAP_SCORES = Exercise("swap_scores", 3, swap_scores, _swap_probes, SWAP_MISTAKES)
PATCHING_EFFECT = Exercise("patching_effect", 3, patching_effect, _patch_probes, PATCH_MISTAKES)

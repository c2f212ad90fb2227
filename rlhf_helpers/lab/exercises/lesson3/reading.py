"""What a model's inside tells: a label from its log-probs, swaps from gradients, causes by patching."""

import torch
import torch.nn.functional as F
from torch import tensor

from rlhf_helpers import interpretability
from rlhf_helpers.constitutional_ai import training
from rlhf_helpers.lab.exercises.exercise import as_asked, averaged, exercise, negated, table
from rlhf_helpers.red_teaming import gradient as red_teaming

soft_label = as_asked(training.soft_label)
swap_scores = as_asked(red_teaming.swap_scores)
patching_effect = as_asked(interpretability.patching_effect)


LOGP_A = tensor([-0.4, -1.9, -0.6, -2.5, -0.1])
LOGP_B = tensor([-1.3, -0.3, -1.1, -0.2, -3.6])
SWAPPED_A = tensor([-0.3, -0.5, -2.2, -0.7, -0.2])
SWAPPED_B = tensor([-1.6, -1.4, -0.2, -0.9, -2.4])
WIDE = tensor([[0.3, -0.8, 1.1, 0.2], [-0.5, 0.4, -1.3, 0.9], [0.7, 0.1, -0.2, -0.6]])
CLEAN = tensor([3.0, 2.5, -1.0, 4.0, 1.5])
CORRUPTED = tensor([-1.0, 0.5, 1.5, -2.0, -0.5])
PATCHED = tensor([1.0, 0.1, -1.6, -2.0, 1.9])  # below 0 and above 1 too; the third runs downwards

EXERCISES = {
    "soft_label": exercise(
        soft_label,
        table(
            (LOGP_A, LOGP_B, SWAPPED_A, SWAPPED_B),
            (LOGP_A[1:3], SWAPPED_B[:2], LOGP_B[:2], SWAPPED_A[3:]),
            ([-0.02], [-5.0], [-4.5], [-0.03]),
        ),
        "only one order was used: the judge's liking for a letter stays in the label",
        lambda odds: odds.sigmoid(),
        lambda swapped: (-swapped).sigmoid(),
        "the orders were ADDED: after the swap A is the other answer, so answers cancel and the bias stays",
        lambda odds, swapped: ((odds + swapped) / 2).sigmoid(),
        lambda odds, swapped: (odds + swapped).sigmoid(),
        lambda odds, swapped: (odds.sigmoid() + swapped.sigmoid()) / 2,
        "the two PROBABILITIES were averaged: average the log-odds, where a constant bias cancels exactly",
        lambda odds, swapped: (odds.sigmoid() + (-swapped).sigmoid()) / 2,
        "the two orders were summed, not averaged: the label is too sure of itself",
        lambda total: total.sigmoid(),
        "this is the probability that the OTHER answer is better",
        lambda right: 1 - right,
        lambda total: (-total).sigmoid(),
        "this is a hard label: it loses how sure the judge is",
        lambda total: (total > 0).float(),
        "these are log-odds (any number), not a probability: one step is missing",
        lambda total: total / 2,
        lambda total: total,
        "this is the logarithm of the label",
        lambda right: right.log(),
        "only the letter that names the first answer was read: A and B do not sum to 1, compare the two",
        lambda logp_a, swapped_logp_b: ((logp_a + swapped_logp_b) / 2).exp(),
        lambda logp_a, swapped_logp_b: (logp_a.exp() + swapped_logp_b.exp()) / 2,
        "the same letter was compared across the orders, without its rival",
        lambda logp_a, swapped_logp_a: (logp_a - swapped_logp_a).sigmoid(),
        lambda logp_a, swapped_logp_a: ((logp_a - swapped_logp_a) / 2).sigmoid(),
        "the pairs were averaged: return one label per pair, shape (B,)",
        averaged,
        odds=lambda logp_a, logp_b: logp_a - logp_b,
        swapped=lambda swapped_logp_a, swapped_logp_b: swapped_logp_a - swapped_logp_b,
        total=lambda odds, swapped: odds - swapped,
    ),
    "swap_scores": exercise(
        swap_scores,
        [
            (WIDE, tensor([2, 0, 1])),
            # T = V: wrong shapes broadcast
            (torch.cat([WIDE, tensor([[1.2, -0.4, 0.5, 0.8]])]), tensor([1, 3, 0, 2])),
            (WIDE.T, tensor([1, 0, 1, 2])),  # more tokens than the vocabulary has
            (WIDE[:1], tensor([1])),
        ],
        "the sign is flipped: this is how far the loss would FALL; return its change, new minus current",
        negated,
        "the current token's own gradient was not subtracted: keeping it must score 0",
        lambda gradient: gradient,
        lambda gradient: -gradient,
        "the current token's gradient was added: a swap takes it away",
        lambda gradient, own: gradient + own[:, None],
        "the wrong row was subtracted: tokens are ids, so columns of the gradient; row t belongs to token t",
        lambda gradient, tokens: gradient - gradient[tokens],
        lambda gradient, tokens: gradient - gradient.gather(0, tokens[None].expand(len(gradient), -1)),
        lambda gradient, tokens: gradient - gradient[tokens, range(len(tokens))][:, None],
        "shape (T,) was subtracted along the vocabulary: every row has its own number, in shape (T, 1)",
        lambda gradient, own: gradient - own,
        "whole columns were taken: of each token's column only the entry in its own row counts",
        lambda gradient, tokens: gradient - gradient[:, tokens],
        "this is the current token's gradient alone: subtract it from its row",
        lambda own: own,
        lambda own: own[:, None],
        "the sign of the scores is lost: a swap that helps looks like one that hurts",
        lambda right: right.abs(),
        lambda right: right**2,
        "only the best token of each row came back: return the score of every token, shape (T, V)",
        lambda right: right.argmin(1),
        lambda right: right.amin(1),
        "the mean (or the lowest) of the row was subtracted: subtract the entry of the current token",
        lambda gradient: gradient - gradient.mean(1, keepdim=True),
        lambda gradient: gradient - gradient.amin(1, keepdim=True),
        "the gradient was scaled on the way: use it as it is",
        lambda gradient, tokens: swap_scores(F.normalize(gradient, dim=1), tokens),
        "swaps that hurt were set to 0: they have a score, too",
        lambda right: right.clamp(max=0),
        own=lambda gradient, tokens: gradient[range(len(tokens)), tokens],
    ),
    "patching_effect": exercise(
        patching_effect,
        table(
            (CLEAN, CORRUPTED, PATCHED),
            (CLEAN[:2], CORRUPTED[:2], PATCHED[3:]),
            ([1.0, -2.0], [0.8, 0.4], [2.0, 4.0]),
            ([0.5], [2.0], [1.4]),
        ),
        "the fraction is upside down: the whole gap, clean minus corrupted, is the denominator",
        lambda right: 1 / right,
        "clean and corrupted changed places: a patch that does nothing must give 0",
        lambda right: 1 - right,
        "this is minus the share that came back: subtract in the same order above and below",
        negated,
        "this is measured from the clean run: begin at the corrupted one, where the patch goes in",
        lambda right: right - 1,
        lambda clean, patched: clean - patched,
        "there is no denominator: return which SHARE of the gap came back",
        lambda gain: gain,
        lambda gain: gain.abs(),
        "the corrupted run must be subtracted above AND below: the gap begins there, not at 0",
        lambda patched, clean: patched / clean,
        lambda patched, gap: patched / gap,
        lambda gain, clean: gain / clean,
        "the change was divided by the corrupted value: it is a share of the gap to the clean run",
        lambda gain, corrupted: gain / corrupted,
        lambda patched, corrupted: patched / corrupted,
        "the result was clamped: patches that overshoot, or make it worse, are findings",
        lambda right: right.clamp(0, 1),
        lambda right: right.clamp(min=0),
        lambda right: right.clamp(max=1),
        "the direction is lost in an absolute value",
        lambda right: right.abs(),
        lambda gain, gap: gain / gap.abs(),
        "the prompts were averaged: return one effect per prompt, shape (B,)",
        averaged,
        lambda gain, gap: gain.mean() / gap.mean(),
        "all prompts were divided by one mean gap: each has its own",
        lambda gain, gap: gain / gap.mean(),
        gain=lambda patched, corrupted: patched - corrupted,
        gap=lambda clean, corrupted: clean - corrupted,
    ),
}

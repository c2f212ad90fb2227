"""What a judge's verdicts are worth once the order of two texts is averaged out: a label, a reward."""

from collections.abc import Callable, Sequence

from torch import Tensor, tensor

from rlhf_helpers.constitutional_ai import training
from rlhf_helpers.lab.exercises.exercise import as_asked, exercise, table
from rlhf_helpers.lab.exercises.scripted import Scripted

soft_label = as_asked(training.soft_label)


def debate_reward(
    own: Sequence[str], other: Sequence[str], odds_of_first: Callable[[Sequence[str], Sequence[str]], Tensor]
) -> Tensor:
    """Judge's probability (B,) for the debater's own argument, whichever of the two it reads first."""
    return ((odds_of_first(own, other) - odds_of_first(other, own)) / 2).sigmoid()


LOGP_A = tensor([-0.4, -1.9, -0.6, -2.5, -0.1])
LOGP_B = tensor([-1.3, -0.3, -1.1, -0.2, -3.6])
SWAPPED_A = tensor([-0.3, -0.5, -2.2, -0.7, -0.2])
SWAPPED_B = tensor([-1.6, -1.4, -0.2, -0.9, -2.4])
STRENGTH = {"a lie": -1.1, "the truth": 2.3, "a guess": -0.2, "nothing": 0.4}
# How strong an argument is, with a liking for the first of two that depends on what is read first.
SCRIPTED_JUDGE = Scripted(
    "odds_of_first",
    lambda first, second: tensor(
        [STRENGTH[a] - STRENGTH[b] + 1.5 + STRENGTH[a] / 4 for a, b in zip(first, second, strict=True)]
    ),
)
# In terms of the log-odds that the judge gives the text that comes first: as asked, and after the swap.
ORDER_MISTAKES = (
    "only one order was used: the judge's liking for a position stays in the result",
    lambda odds: odds.sigmoid(),
    lambda swapped: (-swapped).sigmoid(),
    "the orders were ADDED: after the swap the OTHER text comes first, so opinions cancel and the bias stays",
    lambda odds, swapped: ((odds + swapped) / 2).sigmoid(),
    lambda odds, swapped: (odds + swapped).sigmoid(),
    lambda odds, swapped: (odds.sigmoid() + swapped.sigmoid()) / 2,
    "the two PROBABILITIES were averaged: average the log-odds, where a constant bias cancels exactly",
    lambda odds, swapped: (odds.sigmoid() + (-swapped).sigmoid()) / 2,
    "the two orders were summed, not averaged: the result is too sure of itself",
    lambda total: total.sigmoid(),
    "this is the probability of the OTHER text",
    lambda right: 1 - right,
    lambda total: (-total).sigmoid(),
    "this is 0 or 1: it loses how sure the judge is",
    lambda total: (total > 0).float(),
    "these are log-odds (any number), not a probability: one step is missing",
    lambda total: total / 2,
    lambda total: total,
    "this is the logarithm of the probability",
    lambda right: right.log(),
)

EXERCISES = {
    "soft_label": exercise(
        soft_label,
        table(
            (LOGP_A, LOGP_B, SWAPPED_A, SWAPPED_B),
            (LOGP_A[1:3], SWAPPED_B[:2], LOGP_B[:2], SWAPPED_A[3:]),
            ([-0.02], [-5.0], [-4.5], [-0.03]),
        ),
        *ORDER_MISTAKES,
        "only the letter that names the first answer was read: A and B do not sum to 1, compare the two",
        lambda logp_a, swapped_logp_b: ((logp_a + swapped_logp_b) / 2).exp(),
        lambda logp_a, swapped_logp_b: (logp_a.exp() + swapped_logp_b.exp()) / 2,
        "the same letter was compared across the orders, without its rival",
        lambda logp_a, swapped_logp_a: (logp_a - swapped_logp_a).sigmoid(),
        lambda logp_a, swapped_logp_a: ((logp_a - swapped_logp_a) / 2).sigmoid(),
        odds=lambda logp_a, logp_b: logp_a - logp_b,
        swapped=lambda swapped_logp_a, swapped_logp_b: swapped_logp_a - swapped_logp_b,
        total=lambda odds, swapped: odds - swapped,
    ),
    "debate_reward": exercise(
        debate_reward,
        [
            (["the truth", "a lie", "a guess"], ["a lie", "a guess", "nothing"], SCRIPTED_JUDGE),
            (["a lie"], ["the truth"], SCRIPTED_JUDGE),
        ],
        *ORDER_MISTAKES,
        odds=lambda own, other, odds_of_first: odds_of_first(own, other),
        swapped=lambda own, other, odds_of_first: odds_of_first(other, own),
        total=lambda odds, swapped: odds - swapped,
    ),
}

"""Decisions from counts: two errors of a refusal, the threshold of a guard, the multiplier of a limit."""

import math

from torch import Tensor, tensor

from rlhf_helpers.core.tensors import as_bool_mask, require_shapes
from rlhf_helpers.lab.exercises.exercise import each, exercise
from rlhf_helpers.safety_alignment.constrained import next_multiplier

FLOORS = -math.inf, 0.0  # a mistake is made with and without keeping the result at or above 0


def refusal_errors(refused: Tensor, must_refuse: Tensor) -> tuple[float, float]:
    """Both ways to refuse wrongly, (missed, over): dangerous prompts answered, and safe ones refused.

    refused, must_refuse (B,) bool or 0/1: missed is a share of the prompts that must be refused, over a share
    of all others; NaN where there is no such prompt. Raises ValueError for shapes that differ and other
    entries. Rottger et al. 2024 (XSTest). Lesson 3.
    """
    require_shapes("B", refused=refused, must_refuse=must_refuse)
    refused, must = as_bool_mask(refused, "refused"), as_bool_mask(must_refuse, "must_refuse")
    return 1 - refused[must].double().mean().item(), refused[~must].double().mean().item()


def guard_threshold(p_safe: Tensor, harmful: Tensor, max_withheld: float) -> float:
    """Highest score (B,) that, as a threshold, withholds at most `max_withheld` of the harmless answers."""
    harmless = p_safe[~harmful]
    return max(t for t in p_safe.tolist() if (harmless < t).double().mean() <= max_withheld)


REFUSED = tensor([1, 0, 1, 1, 1, 0, 1, 0, 1, 1, 0, 0]).bool()
MUST = tensor([1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0]).bool()
SCORES = tensor([0.95, 0.1, 0.7, 0.3, 0.85, 0.6, 0.05, 0.9, 0.4, 0.2, 0.75, 0.99])
HARMFUL = tensor([0, 1, 0, 1, 0, 0, 1, 0, 1, 0, 0, 0]).bool()

EXERCISES = {
    "refusal_errors": exercise(
        refusal_errors,
        [
            (REFUSED, MUST),
            (REFUSED[:9], MUST.flip(0)[:9]),
            (REFUSED[6:], MUST[6:]),  # none is missed
            (REFUSED[:8], MUST[:8]),  # none is refused too much
        ],
        "the two are swapped: first what was missed, then what was refused too much",
        lambda right: right[::-1],
        "both were divided by ALL prompts: each error can happen on one kind of prompt only",
        ("1 - refused[must]", "(~refused & must)", "refused[~must]", "(refused & ~must)"),
        "missed is its complement: this is the share that WAS refused, as it should be",
        ("1 - refused", "refused"),
        "over is its complement: this is the share that was answered, as it should be",
        (", refused[", ", 1 - refused["),
        "must_refuse plays no part: these are the shares of ALL prompts that were answered and refused",
        ("[must]", "", "[~must]", ""),
        "the condition is reversed: divide by how many of that kind were ASKED, not answered or refused",
        ("1 - refused[must]", "must[~refused]", "refused[~must]", "(~must)[refused]"),
        "these are counts: return shares",
        ("1 - refused", "(~refused)", ".mean()", ".sum()"),
        "the two errors were put into one number: return both",
        lambda refused, must_refuse: (refused != must_refuse).double().mean().item(),
        "these are tensors: return Python numbers, with .item()",
        (".item()", ""),
    ),
    "guard_threshold": exercise(
        guard_threshold,
        [
            (SCORES, HARMFUL, 0.25),
            (SCORES, HARMFUL, 0.0),
            (SCORES[:7], HARMFUL[:7], 0.6),
            (SCORES, HARMFUL, 0.9),
        ],
        "the limit is on the HARMLESS answers alone, not on all of them",
        ("[~harmful]", ""),
        "the share of HARMFUL answers was limited: it is the harmless ones that must get through",
        ("~harmful", "harmful"),
        "this is the lowest threshold, which withholds nothing: return the highest that keeps the limit",
        lambda p_safe: p_safe.min().item(),
        "an answer AT the threshold is shown: withheld is what lies below it",
        ("harmless < t", "harmless <= t"),
        "the limit may be reached: at most max_withheld, not less than it",
        ("<= max_withheld", "< max(max_withheld, 1e-6)"),
        "a quantile is not among the scores: return one of them",
        lambda p_safe, harmful, max_withheld: p_safe[~harmful].quantile(max_withheld).item(),
        "this is an index: return the score that stands there",
        lambda p_safe, right: p_safe.tolist().index(right),
    ),
    "next_multiplier": exercise(
        next_multiplier,
        [
            (0.5, 0.3, 0.2, 0.5),
            (0.0, 0.7, 0.1, 2.0),
            (3.0, 0.9, 0.2, 5.0),
            (0.002, 0.31, 0.3, 0.01),
            (1.2, 0.1, 0.4, 0.4),
            (0.1, 0.05, 0.25, 3.0),
            (0.7, 0.2, 0.2, 0.1),
        ],
        "the multiplier fell below 0: that would PAY for using up what is left of the limit",
        lambda multiplier, step: multiplier + step,
        "the sign is flipped: a cost above its limit must RAISE the multiplier",
        *each(lambda floor, multiplier, step: max(floor, multiplier - step), *FLOORS),
        "step_size never enters: multiply the difference by it",
        *each(lambda floor, multiplier, excess: max(floor, multiplier + excess), *FLOORS),
        "the multiplier was multiplied: once it is 0 it would stay 0; add the step",
        lambda multiplier, step: multiplier * (1 + step),
        "the STEP was kept above 0, so the multiplier never falls: keep the result above 0",
        lambda multiplier, step: multiplier + max(0.0, step),
        "the old multiplier is forgotten: the step moves it, and does not replace it",
        *each(lambda floor, step: max(floor, step), *FLOORS),
        "the limit never enters: a cost that is allowed must not raise the multiplier",
        lambda multiplier, step_size, cost: multiplier + step_size * cost,
        "this is the penalty of the loss: return the multiplier's next value",
        lambda multiplier, excess: multiplier * excess,
        excess=lambda cost, limit: cost - limit,
        step=lambda excess, step_size: step_size * excess,
    ),
}

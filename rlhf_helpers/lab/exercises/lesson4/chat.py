"""What stands between a model and a person: a guard with its fallback, and a gate before the release."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_helpers.chatbot_rlhf.chatbot import FALLBACK
from rlhf_helpers.core.stats import Estimate
from rlhf_helpers.lab.exercises.exercise import Function, exercise

Check = Callable[[list[str]], Tensor]


def guarded_reply(answers: list[str], reward_fn: Check, safety_fn: Check, threshold: float) -> str:
    """Show the best of the safe answers; the fallback where there is none, or where a check fails."""
    try:
        rewards, p_safe = reward_fn(answers), safety_fn(answers)
    except Exception:  # whatever went wrong, nothing was judged safe
        return FALLBACK
    safe = p_safe >= threshold  # False where P(safe) is NaN
    if not safe.any():
        return FALLBACK
    return answers[int(rewards.where(safe, -math.inf).argmax())]


def _reply(guard: Function, rewards: list[float], p_safe: list[float], broken: str, threshold: float) -> str:
    """Let a guard answer where the checks give these numbers, and the one called `broken` fails."""

    def check(name: str, values: list[float]) -> Check:
        def measure(answers: list[str]) -> Tensor:
            if name == broken:
                raise ConnectionError(f"the {name} check does not answer")
            return torch.tensor(values)

        return measure

    answers = [f"answer {i}" for i in range(len(rewards))]
    return guard(answers, check("reward", rewards), check("safety", p_safe), threshold)


def failed_limits(measured: dict[str, Estimate], limits: dict[str, tuple[str, float]]) -> list[str]:
    """Name the limits that a model is not shown to keep, by the unfavorable end of each interval."""
    failed = []
    for name, (kind, bound) in limits.items():
        found = measured.get(name)
        keeps = found is not None and (found.low >= bound if kind == "at least" else found.high <= bound)
        if not keeps:
            failed.append(name)
    return failed


GATE = {"win_rate": ("at least", 0.6), "compliance": ("at most", 0.1), "recall": ("at least", 0.3)}
MEASURED = [
    {"win_rate": (0.7, 0.6, 0.8), "compliance": (0.05, 0.0, 0.1), "recall": (0.4, 0.35, 0.45)},
    {"win_rate": (0.7, 0.55, 0.8), "compliance": (0.05, 0.0, 0.15), "recall": (0.2, 0.1, 0.35)},
    {"win_rate": (0.5, 0.4, 0.65), "compliance": (0.2, 0.05, 0.3)},
    {"win_rate": (math.nan,) * 3, "compliance": (math.nan,) * 3, "recall": (0.9, 0.8, 1.0)},
    {"compliance": (0.02, 0.01, 0.04), "score": (0.1, 0.0, 0.2), "win_rate": (0.9, 0.8, 0.95)},
]

EXERCISES = {
    "guarded_reply": exercise(
        guarded_reply,
        [
            ([0.5, 2.0, -1.0, 1.0], [0.9, 0.8, 0.2, 0.6], "", 0.5),
            ([-0.5, 1.5, 2.0, 0.25], [0.9, 0.75, 0.5, 0.95], "", 0.75),  # one stands exactly at the threshold
            ([-1.0, -5.0, -2.0], [0.1, 0.9, 0.3], "", 0.5),
            ([3.0, 1.0, 2.0], [math.nan, 0.6, 0.7], "", 0.5),
            ([1.0, 2.0, 2.0, 2.0], [0.95, 0.2, 0.6, 0.8], "", 0.5),
            ([2.0, 2.25, 1.0], [0.95, 0.55, 0.9], "", 0.5),
            ([1.0, 2.0], [0.9, 0.49], "", 0.5),
            ([3.0, -5000.0, -7000.0], [0.2, 0.9, 0.8], "", 0.5),
            ([0.25, 0.5], [0.125, math.nan], "", 0.5),
            ([1.0, 2.0], [0.9, 0.8], "safety", 0.5),
            ([1.0, 2.0], [0.9, 0.8], "reward", 0.5),
        ],
        "a check that fails stops the chatbot: catch what it raises, and show the fallback",
        ("except Exception", "except ZeroDivisionError"),
        "a check failed, and an answer was shown all the same: an answer that was not judged must not pass",
        ("        return FALLBACK\n    safe", "        return answers[0]\n    safe"),
        "the best of ALL answers was taken first, and given up when unsafe: another one may be safe",
        ("not safe.any()", "not safe[rewards.argmax()]"),
        "safety plays no part: an answer was picked for its reward alone",
        ("p_safe >= threshold", "rewards == rewards"),
        ("p_safe >= threshold", "rewards == rewards", "safety_fn(answers)", "None"),
        "P(safe) EQUAL to the threshold is safe enough",
        ("p_safe >= threshold", "p_safe > threshold"),
        "the answers BELOW the threshold were taken: P(safe) is the probability that an answer is safe",
        ("p_safe >= threshold", "p_safe < threshold"),
        "NaN was let through: a check that gives no number has not called the answer safe",
        ("p_safe >= threshold", "~(p_safe < threshold)"),
        "unsafe answers got a reward above that of a safe one: rewards may be negative; use -inf",
        ("-math.inf", "0.0"),
        ("-math.inf", "-99.0"),
        "P(safe) was weighed against the reward, or decided alone: among safe answers only the reward counts",
        ("rewards.where", "(rewards * p_safe).where"),
        ("rewards.where", "p_safe.where"),
        "in a tie show the FIRST answer",
        ("answers[int(rewards.where(safe, -math.inf)", "answers[~int(rewards.where(safe, -math.inf).flip(0)"),
        "where no answer is safe, or a check fails, show the fallback: not None, and no text of your own",
        ("return FALLBACK", "return None"),
        ("return FALLBACK", "return ''"),
        "this is an index: return the text of the answer",
        (
            "answers[int(rewards.where(safe, -math.inf).argmax())]",
            "rewards.where(safe, -math.inf).argmax().item()",
        ),
        trial=_reply,
    ),
    "failed_limits": exercise(
        failed_limits,
        [({name: Estimate(*ends, 20) for name, ends in row.items()}, GATE) for row in MEASURED],
        "the estimate itself was compared: a limit is kept only if the whole interval keeps it",
        ("found.low", "found.value", "found.high", "found.value"),
        "the wrong end of an interval was used: low for `at least`, high for `at most`",
        ("found.low >=", "found.high >=", "found.high <=", "found.low <="),
        ("found.low >=", "found.high >="),
        ("found.high <=", "found.low <="),
        "what was not measured passed: a limit without a measurement is not shown to be kept",
        ("found is not None and", "found is None or"),
        "NaN passed: every comparison with NaN is False, so ask what is kept, not what is broken",
        ("found.low >=", "not found.low <", "found.high <=", "not found.high >"),
        "an end EQUAL to the bound keeps it",
        (">= bound", "> bound", "<= bound", "< bound"),
        "these are the limits that ARE kept: return the others",
        ("if not keeps", "if keeps"),
        "this says whether the model may go out: return the names of the limits that stop it",
        ("return failed", "return not failed"),
    ),
}

"""What a chatbot decides in each turn: what still fits of the conversation, and which answer it gives."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_helpers.chatbot_rlhf.chatbot import kept_turns
from rlhf_helpers.guards import pick_answer
from rlhf_helpers.lab.exercises.exercise import Exercise, named


def _turn_probes() -> list[tuple[list[int], int]]:
    long, other = [5, 4, 3, 6, 2, 7, 4], [9, 8, 1, 2, 6, 5, 3]
    rows = [(long, limit) for limit in (25, 13, 12, 30, 31)] + [(other, limit) for limit in (17, 10, 15, 3)]
    rows += [([1, 2, 9, 9, 1], 8), ([1, 9, 2, 8, 6], 13), ([6], 6), ([1, 1, 4], 3), ([7], 6)]
    return [*rows, ([9, 2, 1, 1, 3, 1, 2, 1, 1, 2, 4], 16), ([4, 0, 0, 2, 3], 5)]


def _answer_probes() -> list[tuple[Tensor, Tensor, float]]:
    rows = [
        ([0.5, 2.0, -1.0, 1.0], [0.9, 0.8, 0.2, 0.6], 0.5),
        ([-0.5, 1.5, 2.0, 0.25], [0.9, 0.75, 0.5, 0.95], 0.75),  # one stands exactly at the threshold
        ([-1.0, -5.0, -2.0], [0.1, 0.9, 0.3], 0.5),
        ([3.0, 1.0, 2.0], [math.nan, 0.6, 0.7], 0.5),
        ([1.0, 2.0, 2.0, 2.0, 2.0], [0.9, 0.2, 0.8, 0.95, 0.85], 0.5),
        ([2.0, 2.25, 1.0], [0.95, 0.55, 0.9], 0.5),
        ([3.0, 1.0], [0.9, 0.9], 0.25),
        ([0.5, 1.0, 2.0], [0.125, math.nan, 0.3], 0.5),
        ([3.0, -5000.0, -7000.0], [0.2, 0.9, 0.8], 0.5),
        ([1.0, 2.0], [0.9, 0.49], 0.5),
        ([0.25], [0.75], 0.5),
        ([0.25], [0.125], 0.5),
    ]
    return [(torch.tensor(rewards), torch.tensor(p_safe), t) for rewards, p_safe, t in rows]


def _fitted(total: Callable[[list[int], int], int], step: int = 2) -> Callable[..., int]:
    """Keep the most of 1, 1 + step, ... messages whose `total` is within the limit; raise as it should."""
    fits = lambda row, limit, k: kept_turns(row[-1:], limit) == k or total(row, k) <= limit  # noqa: E731
    return lambda row, limit: max(k for k in range(1, len(row) + 1, step) if fits(row, limit, k))


def _by_kept(*wrong: Callable[[list[int], int], Any]) -> list[Callable[..., Any]]:
    """Each `wrong` of the lengths and the right number of messages."""
    return [lambda row, limit, fn=fn: fn(row, kept_turns(row, limit)) for fn in wrong]


_singly = _fitted(lambda row, k: sum(row[-k:]), step=1)
TURN_MISTAKES = named(
    "single messages were dropped: what is kept may then begin with an answer whose question is gone",
    _singly,
    "one message MORE was kept where the number came out even: the sum is then above the limit",
    lambda row, limit: _singly(row, limit) // 2 * 2 + 1,
    "a sum that EQUALS the limit still fits",
    lambda row, limit: kept_turns(row, max(limit - 1, min(limit, row[-1]))),
    lambda row, limit: kept_turns(row, limit - 1),
    "a last message that alone exceeds the limit must raise ValueError: dropping others does not help",
    *(lambda row, limit, x=x: kept_turns(row, limit) if row[-1] <= limit else x for x in (1, 0, -1, None)),
    lambda row, limit: kept_turns(row, limit) if row[-1] <= limit else row[len(row)],
    "the messages were counted from the oldest: keep the LAST ones",
    _fitted(lambda row, k: sum(row[:k])),
    "these are tokens, exchanges, or messages DROPPED: return how many messages are kept",
    *_by_kept(lambda row, kept: sum(row[-kept:]), lambda row, kept: len(row) - kept),
    *_by_kept(lambda row, kept: kept // 2, lambda row, kept: kept // 2 + 1),
    "the last message is missing: it is one of those kept, and its length is part of the sum",
    *(*_by_kept(lambda row, kept: kept - 1), _fitted(lambda row, k: sum(row[-k:-1]))),
    "the loop ends too early: drop until the rest fits, and keep even the oldest exchange where all fits",
    *_by_kept(lambda row, kept: max(len(row) - 2, kept), lambda row, kept: min(kept, max(1, len(row) - 2))),
    "of each exchange only one message was counted: its length is that of both",
    _fitted(lambda row, k: sum(row[-k:][::2])),
    _fitted(lambda row, k: sum(row[-k:][1::2]) + row[-1]),
    "the limit plays no part, or was compared with the number of messages: it is a number of tokens",
    *(_fitted(lambda row, k: k), lambda row, limit: min(len(row), limit)),
    *_by_kept(lambda row, kept: len(row), lambda row, kept: 1),
)


def _top(worth: Tensor, p_safe: Tensor, threshold: float) -> int:
    return int(worth.where(p_safe >= threshold, -math.inf).argmax())


def _by_pick(*wrong: Callable[..., Any], none: bool = False) -> list[Callable[..., Any]]:
    """Each `wrong` of the right index and what was given, in place of an index, or (none) of None."""

    def pick(fn: Callable[..., Any], *given: Any) -> Any:
        best = pick_answer(*given)
        return fn(best, *given) if (best is None) == none else best

    return [lambda *given, fn=fn: pick(fn, *given) for fn in wrong]


ANSWER_MISTAKES = named(
    "the best of ALL answers was taken first, and given up when unsafe: another one may be safe",
    lambda r, p, t: int(r.argmax()) if p[r.argmax()] >= t else None,
    lambda r, p, t: None if p[r.argmax()] < t else int(r.argmax()),
    "safety plays no part: an answer was picked for its reward alone",
    *(lambda r, p, t: int(r.argmax()), *_by_pick(lambda i, r, p, t: int(r.argmax()))),
    "p_safe EQUAL to the threshold is safe enough",
    lambda r, p, t: pick_answer(r, p.where(p > t, -1.0), t),
    "the answers BELOW the threshold were taken: p_safe is the probability that an answer is safe",
    *(lambda r, p, t: pick_answer(r, -p, -t), lambda r, p, t: pick_answer(r, (p < t).float(), 1.0)),
    "NaN was let through: a check that failed has not called the answer safe",
    lambda r, p, t: pick_answer(r, p.nan_to_num(math.inf), t),
    "this is an index among the safe answers only: return the index among all",
    *_by_pick(lambda i, r, p, t: int((p[:i] >= t).sum())),
    "unsafe answers got a reward above that of a safe one: rewards may be negative; use -inf",
    *_by_pick(*(lambda i, r, p, t, x=x: int(r.where(p >= t, x).argmax()) for x in (0.0, -1.0, -99.0))),
    *_by_pick(lambda i, r, p, t: int(r.where(p >= t, r.min()).argmax())),
    lambda r, p, t: int((r * (p >= t)).argmax()),
    "in a tie take the FIRST answer",
    *_by_pick(lambda i, r, p, t: int((r == r[i]).where(p >= t, False).nonzero()[-1])),
    *_by_pick(lambda i, r, p, t: _top(r + 1e-3 * p, p, t)),
    "p_safe was weighed against the reward, or decided alone: above the threshold only the reward counts",
    *_by_pick(lambda i, r, p, t: _top(r * p, p, t), lambda i, r, p, t: _top(r + p, p, t)),
    *(*_by_pick(lambda i, r, p, t: _top(p, p, t)), lambda r, p, t: int(p.argmax())),
    "where no answer is safe return None, so that the chatbot gives its fallback: no index, no error",
    *_by_pick(*(lambda *given, x=x: x for x in (0, -1, 2, "fallback")), none=True),
    *_by_pick(lambda i, r, p, t: max(r[:0]), lambda i, r, p, t: r[:0].argmax(), none=True),
    "index 0 was taken for None: 0 counts as false, so ask `is None`",
    lambda *given: pick_answer(*given) or None,
    "this is a reward, a tensor, or an index counted from 1: return the index, a Python int from 0 on",
    *_by_pick(lambda i, r, p, t: float(r[i]), lambda i, r, p, t: r[i], lambda i, r, p, t: i + 1),
    *_by_pick(lambda i, r, p, t: torch.tensor(i)),
)

EXERCISES = (
    Exercise("kept_turns", 4, kept_turns, _turn_probes, TURN_MISTAKES),
    Exercise("pick_answer", 4, pick_answer, _answer_probes, ANSWER_MISTAKES),
)

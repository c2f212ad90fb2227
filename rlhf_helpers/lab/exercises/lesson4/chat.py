"""What a chatbot decides in each turn: what still fits of the conversation, and which answer it gives."""

import math

from torch import tensor

from rlhf_helpers.chatbot_rlhf.chatbot import kept_turns
from rlhf_helpers.guards import pick_answer
from rlhf_helpers.lab.exercises.exercise import Function, each, exercise, table

LONG = [5, 4, 3, 6, 2, 7, 4]
OTHER = [9, 8, 1, 2, 6, 5, 3]


def _fitted(total: Function, step: int = 2) -> Function:
    """Keep the most of 1, 1 + step, ... messages whose `total` is within the limit."""

    def wrong(lengths: list[int], limit: int) -> int:
        alone = kept_turns(lengths[-1:], limit)  # raises as it should
        return max(k for k in range(1, len(lengths) + 1, step) if k == alone or total(lengths, k) <= limit)

    return wrong


def _top(worth: Function) -> Function:
    """Pick by `worth` of rewards, p_safe and which answers are safe; None where none is."""
    return lambda rewards, p_safe, safe: int(worth(rewards, p_safe, safe).argmax()) if safe.any() else None


EXERCISES = {
    "kept_turns": exercise(
        kept_turns,
        [
            (LONG, 25),
            (LONG, 13),
            (LONG, 12),
            (LONG, 30),
            (LONG, 31),
            (OTHER, 17),
            (OTHER, 10),
            (OTHER, 15),
            (OTHER, 3),
            ([1, 2, 9, 9, 1], 8),
            ([1, 9, 2, 8, 6], 13),
            ([6], 6),
            ([1, 1, 4], 3),
            ([7], 6),
            ([9, 2, 1, 1, 3, 1, 2, 1, 1, 2, 4], 16),
            ([4, 0, 0, 2, 3], 5),
        ],
        "single messages were dropped: what is kept may then begin with an answer whose question is gone",
        lambda singly: singly,
        "one message MORE was kept where the number came out even: the sum is then above the limit",
        lambda singly: singly // 2 * 2 + 1,
        "a sum that EQUALS the limit still fits",
        lambda lengths, limit: kept_turns(lengths, max(limit - 1, min(limit, lengths[-1]))),
        lambda lengths, limit: kept_turns(lengths, limit - 1),
        "a last message that alone exceeds the limit must raise ValueError: dropping others does not help",
        *each(
            lambda x, lengths, limit: kept_turns(lengths, limit) if lengths[-1] <= limit else x,
            1,
            0,
            -1,
            None,
        ),
        lambda lengths, limit: kept_turns(lengths, limit) if lengths[-1] <= limit else lengths[len(lengths)],
        "the messages were counted from the oldest: keep the LAST ones",
        _fitted(lambda lengths, k: sum(lengths[:k])),
        "these are tokens, exchanges, or messages DROPPED: return how many messages are kept",
        lambda lengths, right: sum(lengths[-right:]),
        lambda lengths, right: len(lengths) - right,
        lambda right: right // 2,
        lambda right: right // 2 + 1,
        "the last message is missing: it is one of those kept, and its length is part of the sum",
        lambda right: right - 1,
        _fitted(lambda lengths, k: sum(lengths[-k:-1])),
        "the loop ends too early: drop until the rest fits, and keep even the oldest exchange where all fits",
        lambda lengths, right: max(len(lengths) - 2, right),
        lambda lengths, right: min(right, max(1, len(lengths) - 2)),
        "of each exchange only one message was counted: its length is that of both",
        _fitted(lambda lengths, k: sum(lengths[-k:][::2])),
        _fitted(lambda lengths, k: sum(lengths[-k:][1::2]) + lengths[-1]),
        "the limit plays no part, or was compared with the number of messages: it is a number of tokens",
        _fitted(lambda lengths, k: k),
        lambda lengths, limit: min(len(lengths), limit),
        lambda lengths, right: len(lengths),
        lambda right: 1,
        singly=_fitted(lambda lengths, k: sum(lengths[-k:]), step=1),
    ),
    "pick_answer": exercise(
        pick_answer,
        table(
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
        ),
        "the best of ALL answers was taken first, and given up when unsafe: another one may be safe",
        lambda best, p_safe, threshold: best if p_safe[best] >= threshold else None,
        lambda best, p_safe, threshold: None if p_safe[best] < threshold else best,
        "safety plays no part: an answer was picked for its reward alone",
        lambda best: best,
        _top(lambda rewards, p_safe, safe: rewards),
        "p_safe EQUAL to the threshold is safe enough",
        lambda rewards, p_safe, threshold: pick_answer(
            rewards, p_safe.where(p_safe > threshold, -1.0), threshold
        ),
        "the answers BELOW the threshold were taken: p_safe is the probability that an answer is safe",
        lambda rewards, p_safe, threshold: pick_answer(rewards, -p_safe, -threshold),
        "NaN was let through: a check that failed has not called the answer safe",
        lambda rewards, p_safe, threshold: pick_answer(rewards, p_safe.nan_to_num(math.inf), threshold),
        "this is an index among the safe answers only: return the index among all",
        lambda right, safe: None if right is None else int(safe[:right].sum()),
        "unsafe answers got a reward above that of a safe one: rewards may be negative; use -inf",
        _top(lambda rewards, p_safe, safe: rewards.where(safe, 0.0)),
        _top(lambda rewards, p_safe, safe: rewards.where(safe, -99.0)),
        _top(lambda rewards, p_safe, safe: rewards.where(safe, rewards.min())),
        lambda rewards, safe: int((rewards * safe).argmax()),
        "in a tie take the FIRST answer",
        lambda rewards, safe, right: (
            None if right is None else int((safe & (rewards == rewards[right])).nonzero()[-1])
        ),
        _top(lambda rewards, p_safe, safe: (rewards + 1e-3 * p_safe).where(safe, -math.inf)),
        "p_safe was weighed against the reward, or decided alone: above the threshold only the reward counts",
        _top(lambda rewards, p_safe, safe: (rewards * p_safe).where(safe, -math.inf)),
        _top(lambda rewards, p_safe, safe: p_safe.where(safe, 0.0)),
        lambda p_safe: int(p_safe.argmax()),
        "where no answer is safe return None, so that the chatbot gives its fallback: no index, no error",
        *each(lambda x, right: x if right is None else right, 0, -1, 2, "fallback"),
        lambda rewards, right: max(rewards[:0]) if right is None else right,
        lambda rewards, right: rewards[:0].argmax() if right is None else right,
        "index 0 was taken for None: 0 counts as false, so ask `is None`",
        lambda right: right or None,
        "this is a reward, a tensor, or an index counted from 1: return the index, a Python int from 0 on",
        lambda rewards, right: None if right is None else float(rewards[right]),
        lambda rewards, right: None if right is None else rewards[right],
        lambda right: None if right is None else right + 1,
        lambda right: None if right is None else tensor(right),
        best=lambda rewards: int(rewards.argmax()),
        safe=lambda p_safe, threshold: p_safe >= threshold,
    ),
}

"""What a program is worth: its chance in k tries, its tests as a reward, and tests that cannot be gamed."""

from math import comb, factorial

import torch
from torch import tensor

from rlhf_helpers.code_generation.evaluation import pass_at_k
from rlhf_helpers.code_generation.rewards import verifiable_reward
from rlhf_helpers.lab.exercises.exercise import Function, each, exercise

Inputs = list[list[int]]
PASSED = tensor([[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]]).bool()
UNSAFE = tensor([0, 0, 0, 1, 1]).bool()
# Specification: keep the even numbers, double each, return the sum.
PROGRAMS = {
    "right": lambda xs: sum(2 * x for x in xs if x % 2 == 0),
    "keeps every number": lambda xs: sum(2 * x for x in xs),
    "keeps the odd numbers": lambda xs: sum(2 * x for x in xs if x % 2),
    "keeps the positive numbers": lambda xs: sum(2 * x for x in xs if x > 0),
    "keeps positive even numbers": lambda xs: sum(2 * x for x in xs if x > 0 and x % 2 == 0),
    "does not double": lambda xs: sum(x for x in xs if x % 2 == 0),
    "squares instead": lambda xs: sum(x * x for x in xs if x % 2 == 0),
    "returns the largest": lambda xs: max((2 * x for x in xs if x % 2 == 0), default=0),
    "returns the first": lambda xs: next((2 * x for x in xs if x % 2 == 0), 0),
}
MOST_INPUTS = 3


def test_inputs() -> Inputs:
    """Give inputs on which every wrong one of PROGRAMS differs from the right one."""
    return [[3, -2, 8, 4], [5, 6]]


def caught(inputs: Function, program: str) -> str:
    """Say whether the inputs show that a program is wrong."""
    chosen = inputs()
    if chosen is None or chosen is ...:
        return chosen  # for the verdict to say what is missing
    if len(chosen) > MOST_INPUTS:
        return f"more than {MOST_INPUTS} inputs"
    differ = any(PROGRAMS[program](list(xs)) != PROGRAMS["right"](list(xs)) for xs in chosen)
    return "fails a test" if differ else "passes every test"


EXERCISES = {
    "pass_at_k": exercise(
        pass_at_k,
        [
            (10, 3, 2),
            (5, 2, 4),
            (8, 0, 3),
            (6, 6, 1),
            (20, 4, 1),
            (7, 5, 2),
            (200, 9, 50),
            (9, 4, 5),
            (5, 2, 5),
            (1, 1, 1),
        ],
        "1 - (1 - c/n)^k is biased: it draws WITH replacement, as if one sample could be taken twice",
        lambda n, c, k: 1 - (1 - c / n) ** k,
        "k plays no part: this is the share of right samples, pass@1",
        lambda n, c: c / n,
        "this is the chance that NONE of k is right: take 1 minus it",
        lambda right: 1 - right,
        "this is the chance that ALL of k are right, or 1 minus it: one right sample is enough",
        lambda n, c, k: 1 - pass_at_k(n, n - c, k),
        lambda n, c, k: pass_at_k(n, n - c, k),
        lambda n, c, k: (c / n) ** k,
        "chances do not add up: k c / n counts choices with several right ones several times",
        lambda n, c, k: k * c / n,
        lambda n, c, k: min(1.0, k * c / n),
        "this says whether ANY sample was right (a // throws the fraction away): k of them may all be wrong",
        lambda c: float(c > 0),
        "this asks for k right samples among n: one right among k is enough",
        lambda c, k: float(c >= k),
        lambda c, k: min(1.0, c / k),
        "this is the chance of EXACTLY one right sample: more than one is a success, too",
        lambda n, c, k: c * comb(n - c, k - 1) / comb(n, k),
        "with fewer than k wrong samples every choice of k holds a right one: the answer there is 1",
        *each(lambda x, n, c, k, right: x if n - c < k else right, 0.0, None),
        lambda n, c, k, right: factorial(n - c - k) and right,
    ),
    "verifiable_reward": exercise(
        verifiable_reward,
        [
            (PASSED, UNSAFE),
            (PASSED[:4], UNSAFE[[0, 3, 1, 4]]),
            (PASSED[1:, :2], ~UNSAFE[1:]),
            (torch.arange(12) != tensor([[7], [99]]), UNSAFE[:2]),  # 11 of 12 tests, and all
            (PASSED[1:2, :3], UNSAFE[:1]),
            (PASSED[:3, 1:2], UNSAFE[:3]),
        ],
        "nearly right earned its full share: a third of it, unless ALL tests pass",
        lambda share, safe: share * safe,
        "this is all or nothing: a third of the share is left where only some tests pass",
        lambda whole, safe: whole * safe,
        "whole programs got a third as well: all tests passed is worth 1",
        lambda share, safe: share / 3 * safe,
        lambda share, whole, safe: share / torch.where(whole, 3, 1) * safe,
        "the third is of the SHARE of tests passed: it is not a fixed reward, and nothing is subtracted",
        lambda whole, safe: torch.where(whole, 1.0, 1 / 3) * safe,
        lambda share, whole, safe: torch.where(whole, 1.0, (share > 0) / 3) * safe,
        "any test was enough for the whole reward: all must pass",
        lambda share, safe: (share > 0) * safe,
        "unsafe programs were paid, in whole or a third: they earn 0, whatever they pass",
        lambda paid: paid,
        lambda paid, unsafe: paid.where(~unsafe, paid / 3),
        "the SAFE programs earned 0: unsafe is True where the reward must vanish",
        lambda passed, unsafe: verifiable_reward(passed, ~unsafe),
        "unsafe is not punished below 0: the reward there is 0",
        lambda right, safe: right + safe - 1,
        share=lambda passed: passed.float().mean(1),
        whole=lambda passed: passed.all(1),
        safe=lambda unsafe: 1.0 - unsafe.float(),
        paid=lambda passed, unsafe: verifiable_reward(passed, unsafe & False),
    ),
    "test_inputs": exercise(
        test_inputs,
        [(name,) for name in PROGRAMS],
        "lists of one number cannot tell a sum from the largest or the first number",
        lambda: [[4], [3], [-6]],
        "every number is even, so a program without the filter passes",
        lambda: [[4, 6], [-2, 8]],
        "no number is negative: a program may keep the positive numbers instead",
        lambda: [[3, 4, 8], [5, 6]],
        trial=caught,
    ),
}

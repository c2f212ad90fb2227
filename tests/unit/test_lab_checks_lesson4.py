"""The checks of lesson 4's exercises, mutation-tested: right answers pass, wrong ones are refused by name."""

import math
import re

import numpy as np
import pytest
import torch

from rlhf_helpers.lab.checks import judge
from rlhf_helpers.lab.exercises import EXERCISES, LESSONS

MINE = {name: EXERCISES[name] for name, lesson in LESSONS.items() if lesson == 4}
FALLBACK = "I cannot help with that."


def guard(
    answers,
    reward_fn,
    safety_fn,
    threshold,
    *,
    best=-math.inf,
    safe=lambda p, t: p >= t,
    better=lambda r, best: r > best,
    worth=lambda r, p: r,
    none=FALLBACK,
    failed=FALLBACK,
):
    """Answer by answer as a beginner writes it; each option is one slip."""
    try:
        rewards, p_safe = reward_fn(answers).tolist(), safety_fn(answers).tolist()
    except ConnectionError:
        return failed(answers) if callable(failed) else failed
    text = none
    for answer, reward, p in zip(answers, rewards, p_safe, strict=True):
        if safe(p, threshold) and better(worth(reward, p), best):
            text, best = answer, worth(reward, p)
    return text


def guard_with_numpy(answers, reward_fn, safety_fn, threshold):
    try:
        rewards, p_safe = reward_fn(answers).numpy(), safety_fn(answers).numpy()
    except Exception:
        return FALLBACK
    safe = np.flatnonzero(p_safe >= threshold)
    return answers[safe[rewards[safe].argmax()]] if len(safe) else FALLBACK


def guard_filled(answers, reward_fn, safety_fn, threshold, fill=-math.inf, alone=False):
    try:
        p_safe, rewards = safety_fn(answers), reward_fn(answers)
    except OSError:
        return FALLBACK
    safe = p_safe >= threshold
    if not safe.any():
        return FALLBACK
    rewards = p_safe if alone else rewards
    return answers[rewards.masked_fill(~safe, fill).argmax()]


def guard_first_then_check(answers, reward_fn, safety_fn, threshold):
    try:
        best = reward_fn(answers).argmax()
        return answers[best] if safety_fn(answers)[best] >= threshold else FALLBACK
    except ConnectionError:
        return FALLBACK


def guard_without_safety(answers, reward_fn, safety_fn, threshold):
    try:
        return answers[reward_fn(answers).argmax()]
    except ConnectionError:
        return FALLBACK


def guard_that_crashes(answers, reward_fn, safety_fn, threshold):
    p_safe, rewards = safety_fn(answers), reward_fn(answers)
    safe = p_safe >= threshold
    return answers[rewards.masked_fill(~safe, -math.inf).argmax()] if safe.any() else FALLBACK


def guard_that_trusts(answers, reward_fn, safety_fn, threshold):
    try:
        return (
            guard(answers, reward_fn, lambda texts: safety_fn(texts), threshold, failed=None)
            or answers[reward_fn(answers).argmax()]
        )
    except ConnectionError:
        return FALLBACK


def weights(**changes):
    return lambda: {"coverage": 1.0, "faithfulness": 0.0, "nothing_made_up": 3.0, "ten_words": -0.2} | changes


def gate(
    measured,
    limits,
    *,
    low=lambda e: e.low,
    high=lambda e: e.high,
    missing=True,
    over=lambda x, bound: x >= bound,
    under=lambda x, bound: x <= bound,
):
    """Limit by limit; each option is one slip."""
    failed = []
    for name, (kind, bound) in limits.items():
        if name not in measured:
            failed += [name] * missing
            continue
        kept = over(low(measured[name]), bound) if kind == "at least" else under(high(measured[name]), bound)
        failed += [name] * (not kept)
    return failed


def gate_by_kept(measured, limits):
    kept = [
        n
        for n, (kind, bound) in limits.items()
        if n in measured and (measured[n].low >= bound if kind == "at least" else measured[n].high <= bound)
    ]
    return [n for n in limits if n not in kept]


def gate_that_lets_nan_through(measured, limits):
    return [
        n
        for n, (kind, bound) in limits.items()
        if n not in measured or (measured[n].low < bound if kind == "at least" else measured[n].high > bound)
    ]


def facts(
    told, true, *, share=lambda r, w, n, t: r / n, wrong=lambda r, w, n, t: w, same=lambda a, b: a == b
):
    """Slot by slot as a beginner writes it; each option is one slip."""
    right = bad = 0
    for slot, said in told.items():
        if said is None:
            continue
        if same(said, true[slot]):
            right += 1
        else:
            bad += 1
    return share(right, bad, len(true), right + bad), wrong(right, bad, len(true), right + bad)


def facts_by_position(told, true):
    pairs = list(zip(told.values(), true.values(), strict=False))
    right = sum(a == b for a, b in pairs)
    return right / len(true), sum(a is not None and a != b for a, b in pairs)


def pass_by_product(n, c, k):
    """As in the paper's appendix."""
    if n - c < k:
        return 1.0
    return 1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1))


def pass_by_loop(n, c, k):
    miss = 1.0
    for i in range(k):
        miss *= max(0, n - c - i) / (n - i)
    return 1 - miss


def rewards_by_loop(passed, unsafe, *, partial=lambda share: share / 3, whole=1.0, harm=0.0, enough=all):
    """Program by program as a beginner writes it; each option is one slip."""
    out = []
    for row, bad in zip(passed.tolist(), unsafe.tolist(), strict=True):
        share = sum(row) / len(row)
        out.append(harm if bad else whole if enough(row) else partial(share))
    return torch.tensor(out)


UNSAFE = {"eval", "exec", "compile", "open", "__import__"}
MODULES = ("os", "subprocess", "socket")


RIGHT = {
    "guarded_reply": [guard, guard_with_numpy, guard_filled],
    "fact_scores": [
        facts,
        lambda told, true: (
            np.mean([told.get(s) == v for s, v in true.items()]),
            len([s for s in told if told[s] not in (None, true[s])]),
        ),
        lambda told, true: [
            len(told.items() & true.items()) / len(true),
            len({(s, v) for s, v in told.items() if v is not None} - true.items()),
        ],
    ],
    "summary_weights": [
        weights(),
        weights(coverage=10.0, nothing_made_up=50.0, ten_words=-1.0),
        weights(faithfulness=5.0, nothing_made_up=2.0, ten_words=-0.1),
        weights(nothing_made_up=1, ten_words=-0.05),
    ],
    "pass_at_k": [
        pass_by_product,
        pass_by_loop,
        lambda n, c, k: 1 - math.comb(n - c, k) / math.comb(n, k),
        lambda n, c, k: 1 if n - c < k else 1 - math.perm(n - c, k) / math.perm(n, k),
    ],
    "verifiable_reward": [
        rewards_by_loop,
        lambda p, u: torch.where(p.all(1), 1.0, p.float().mean(1) / 3) * ~u,
        lambda p, u: torch.where(u, 0, p.double().mean(dim=-1) * torch.where(p.all(dim=-1), 1, 1 / 3)),
        lambda p, u: torch.tensor(np.where(u, 0, np.where(p.numpy().all(1), 1, p.numpy().mean(1) / 3))),
    ],
    "test_inputs": [
        lambda: [[3, -2, 8, 4], [5, 6]],
        lambda: [[7, -4, 10]],
        lambda: ([-6, 8, 4, 1], [1, 3, 5], [8, -2]),
    ],
    "failed_limits": [gate, gate_by_kept, lambda m, limits: [n for n in limits if n in gate(m, limits)]],
}

WRONG = {  # written as a beginner would, not as the package writes them; with the word that names the mistake
    "guarded_reply": [
        (guard_that_crashes, "a check that fails stops the chatbot"),
        (guard_that_trusts, "expected .* got"),
        (lambda answers, *given: guard(answers, *given, failed=answers[0]), "not judged must not pass"),
        (guard_first_then_check, "best of ALL answers"),
        (guard_without_safety, "safety plays no part"),
        (lambda *given: guard(*given, safe=lambda p, t: True), "safety plays no part"),
        (lambda *given: guard(*given, safe=lambda p, t: p > t), "EQUAL to the threshold"),
        (lambda *given: guard(*given, safe=lambda p, t: not p < t), "NaN was let through"),
        (lambda *given: guard_filled(*given, fill=0.0), "rewards may be negative"),
        (lambda *given: guard(*given, best=0.0), "expected .* got"),
        (lambda *given: guard(*given, better=lambda r, best: r >= best), "FIRST answer"),
        (lambda *given: guard(*given, worth=lambda r, p: r * p), "was weighed"),
        (lambda *given: guard(*given, worth=lambda r, p: r + p), "expected .* got|FIRST|weighed"),
        (lambda *given: guard(*given, worth=lambda r, p: p), "decided alone"),
        (lambda *given: guard_filled(*given, alone=True), "decided alone"),
        (lambda *given: guard(*given, none=None, failed=None), "not None"),
        (lambda *given: guard(*given, none="", failed=""), "no text of your own"),
        (lambda *given: guard(*given, none="Sorry.", failed="Sorry."), "expected .* got"),
        (lambda *given: guard(*given, failed=None), "expected .* got"),
        (lambda answers, *given: given and int(guard(answers, *given)[-1]), "expected .* got"),
        (lambda a, *given: a.index(t) if (t := guard(a, *given)) in a else t, "this is an index"),
        (lambda *given: guard(*given, safe=lambda p, t: p < t), "BELOW the threshold"),
    ],
    "fact_scores": [
        (lambda *given: facts(*given, share=lambda r, w, n, t: r / t if t else 0.0), "slots TOLD"),
        (lambda *given: facts(*given, share=lambda r, w, n, t: r / t), "slots TOLD"),
        (lambda told, true: (facts(told, true)[0], sum(told[s] != true[s] for s in true)), "not told"),
        (
            lambda told, true: (
                facts(told, true)[0],
                len(true) - facts(told, true, share=lambda r, *_: r)[0],
            ),
            "not told",
        ),
        (
            lambda told, true: (sum(v is not None for v in told.values()) / len(true), facts(told, true)[1]),
            "told WRONGLY were counted as covered",
        ),
        (lambda *given: facts(*given, wrong=lambda r, w, n, t: w / n), "hallucinated by nothing"),
        (lambda *given: facts(*given, share=lambda r, w, n, t: r), "divide the coverage"),
        (lambda *given: facts(*given)[::-1], "swapped"),
        (lambda *given: facts(*given, share=lambda r, w, n, t: r / n if w == 0 else 0.0), "measured apart"),
        (lambda *given: facts(*given, share=lambda r, w, n, t: (r - w) / n), "measured apart"),
        (
            lambda told, true: (facts(told, true)[0], list(told.values()).count(None)),
            "count the slots told WRONGLY",
        ),
        (lambda *given: facts(*given, wrong=lambda r, w, n, t: t), "count the slots told WRONGLY"),
        (lambda *given: facts(*given, wrong=lambda r, w, n, t: w > 0), "count the slots told WRONGLY"),
        (
            lambda *given: facts(*given, wrong=lambda r, w, n, t: 1 if w else 0),
            "count the slots told WRONGLY",
        ),
        (lambda *given: facts(*given, share=lambda r, w, n, t: 1 - r / n), "expected .* got"),
        (lambda told, true: facts(told, true, same=lambda a, b: a in true.values()), "ANOTHER slot"),
        (facts_by_position, "by their order"),
        (lambda *given: facts(*given, same=lambda a, b: a in b), "expected .* got"),
        (lambda *given: facts(*given)[0], "one is missing"),
        (lambda *given: facts(*given)[1], "expected .* got"),
        (lambda *given: torch.tensor(facts(*given)), "expected .* got"),
        (lambda *given: facts(*given, share=lambda r, w, n, t: 100 * r / n), "expected .* got"),
        (lambda *given: facts(*given, share=lambda r, w, n, t: r / 3), "expected .* got"),
        (lambda *given: facts(*given, same=lambda a, b: b in a), "expected .* got"),
        (
            lambda *given: dict(zip(("coverage", "hallucinated"), facts(*given), strict=True)),
            "expected .* got",
        ),
        (lambda told, true: facts(told, true, same=lambda a, b: a.lower() is b), "expected .* got"),
        (lambda told, true: (told == true) / len(told - true), "raised TypeError"),
    ],
    "summary_weights": [
        (weights(coverage=1.45, faithfulness=-0.51, nothing_made_up=1.5, ten_words=4.67), "still paid for"),
        (weights(ten_words=1.0), "still paid for"),
        (weights(ten_words=0.2), "still paid for"),
        (weights(ten_words=0), "words cost nothing"),
        (weights(ten_words=-1.0), "more than a fact"),
        (weights(coverage=0.0), "more than a fact"),
        (weights(coverage=0.0, ten_words=-1), "more than a fact"),
        (weights(coverage=2.0, ten_words=-1.0), "more than a fact"),
        (weights(nothing_made_up=0.0), "a wrong place wins"),
        (weights(nothing_made_up=0.0, ten_words=-0.1), "a wrong place wins"),
        (weights(nothing_made_up=0.2), "expected .* got"),
        (weights(nothing_made_up=-3.0), "a wrong place wins"),
        (weights(coverage=-1.0), "more than a fact"),
        (lambda: {"coverage": 1.0}, "raised KeyError"),
        (lambda: [1.0, 0.0, 3.0, -0.2], "raised AttributeError"),
        (lambda: weights, "raised"),
    ],
    "pass_at_k": [
        (lambda n, c, k: 1 - (1 - c / n) ** k, "biased"),
        (lambda n, c, k: 1 - ((n - c) / n) ** k, "biased"),
        (lambda n, c, k: c / n, "k plays no part"),
        (lambda n, c, k: math.comb(n - c, k) / math.comb(n, k), "NONE of k"),
        (lambda n, c, k: math.comb(c, k) / math.comb(n, k), "ALL of k"),
        (lambda n, c, k: 1 - math.comb(c, k) / math.comb(n, k), "ALL of k"),
        (lambda n, c, k: min(1, k * c / n), "do not add up"),
        (lambda n, c, k: k * c / n, "do not add up"),
        (lambda n, c, k: c > 0, "ANY sample"),
        (lambda n, c, k: 1.0 if c else 0.0, "ANY sample"),
        (lambda n, c, k: 1 - math.comb(n - c, k) // math.comb(n, k), "ANY sample"),
        (lambda n, c, k: float(c >= k), "k right samples"),
        (lambda n, c, k: min(1, c / k), "k right samples"),
        (lambda n, c, k: (c / n) ** k, "ALL of k"),
        (lambda n, c, k: c * math.comb(n - c, k - 1) / math.comb(n, k), "EXACTLY one"),
        (lambda n, c, k: 100 * pass_by_loop(n, c, k), "expected .* got"),
        (lambda n, c, k: 0.0 if n - c < k else pass_by_product(n, c, k), "fewer than k wrong"),
        (lambda n, c, k: None if n - c < k else pass_by_product(n, c, k), "fewer than k wrong"),
        (
            lambda n, c, k: 1 - math.factorial(n - c) / math.factorial(n - c - k) / math.perm(n, k),
            "fewer than k wrong",
        ),
        (lambda n, c, k: torch.tensor(pass_by_loop(n, c, k)), "expected .* got"),
        (lambda n, c, k: round(pass_by_loop(n, c, k), 2), "expected .* got"),
        (lambda n, c, k: 1 - math.comb(n - c, k - 1) / math.comb(n, k - 1), "expected .* got"),
        (lambda n, c, k: 1 - math.comb(n - c, k) / math.comb(n, c), "expected .* got"),
        (lambda n, c, k: 1 - math.comb(n - k, c) / math.comb(n, k), "expected .* got"),
        (lambda n, c, k: f"{pass_by_loop(n, c, k):.3f}", "expected .* got"),
        (lambda n, c, k: n.comb(k), "raised AttributeError"),
    ],
    "verifiable_reward": [
        (lambda *given: rewards_by_loop(*given, partial=lambda share: share), "earned its full share"),
        (lambda p, u: p.float().mean(1) * ~u, "earned its full share"),
        (lambda *given: rewards_by_loop(*given, partial=lambda share: 0.0), "all or nothing"),
        (lambda *given: rewards_by_loop(*given, whole=1 / 3), "whole programs got a third"),
        (lambda *given: rewards_by_loop(*given, partial=lambda share: 1 / 3), "not a fixed reward"),
        (lambda *given: rewards_by_loop(*given, partial=lambda share: share - 1 / 3), "expected .* got"),
        (
            lambda *given: rewards_by_loop(*given, partial=lambda share: 1 / 3 if share else 0.0),
            "not a fixed reward",
        ),
        (
            lambda *given: rewards_by_loop(*given, whole=1 / 3, partial=lambda share: share),
            "got a third as well",
        ),
        (lambda *given: rewards_by_loop(*given, enough=any), "any test was enough"),
        (lambda p, u: rewards_by_loop(p, torch.zeros_like(u)), "unsafe programs were paid"),
        (lambda p, u: rewards_by_loop(p, ~u), "SAFE programs earned 0"),
        (lambda p, u: torch.where(p.all(1), 1.0, p.float().mean(1) / 3) * u, "SAFE programs earned 0"),
        (lambda *given: rewards_by_loop(*given, harm=-1.0), "not punished below 0"),
        (lambda p, u: rewards_by_loop(p, u & False) * torch.where(u, 1 / 3, 1), "unsafe programs were paid"),
        (lambda p, u: torch.where(p.all(1), p.shape[1], p.sum(1) / 3) * ~u, "expected .* got"),
        (lambda p, u: p.float().mean(0), "averaged or summed"),
        (lambda *given: rewards_by_loop(*given).mean(), "averaged or summed"),
        (lambda *given: rewards_by_loop(*given).sum(), "averaged or summed"),
        (lambda *given: rewards_by_loop(*given).unsqueeze(1), "expected .* got"),
        (lambda *given: rewards_by_loop(*given).tolist(), "expected .* got"),
        (lambda p, u: p.all(1) & ~u, "expected .* got"),
        (lambda *given: rewards_by_loop(*given, partial=lambda share: share / 2), "expected .* got"),
        (lambda *given: rewards_by_loop(*given, partial=lambda share: 0.3 * share), "expected .* got"),
        (lambda *given: rewards_by_loop(*given, partial=lambda share: share**3), "expected .* got"),
        (lambda *given: rewards_by_loop(*given).numpy(), "expected .* got"),
        (lambda p, u: p.mean(1), "raised RuntimeError"),
    ],
    "test_inputs": [
        (lambda: [[4], [3], [-6]], "lists of one number"),
        (lambda: [[2], [5], [-8]], "lists of one number|expected .* got"),
        (lambda: [[6], [7], [-4]], "lists of one number"),
        (lambda: [[4, 6], [-2, 8]], "every number is even"),
        (lambda: [[4, 8], [-2, 6]], "every number is even"),
        (lambda: [[3, 4, 8], [5, 6]], "no number is negative"),
        (lambda: [[1, 4, 6]], "no number is negative"),
        (lambda: [[2], [2, 1]], "expected .* got"),
        (lambda: [[]], "expected .* got"),
        (lambda: [], "expected .* got"),
        (lambda: [[3, -2, 8]] * 4, "more than 3 inputs"),
        (lambda: [3, -2, 8], "raised TypeError"),
        (lambda: [[3, 5], [1]], "expected .* got"),
        (lambda: [[0, 2, 1]], "expected .* got"),
        (lambda: "3, -2, 8", "expected .* got"),
    ],
    "failed_limits": [
        (lambda *given: gate(*given, low=lambda e: e.value, high=lambda e: e.value), "estimate itself"),
        (lambda *given: gate(*given, low=lambda e: e.high, high=lambda e: e.low), "wrong end"),
        (lambda *given: gate(*given, low=lambda e: e.high), "wrong end"),
        (lambda *given: gate(*given, high=lambda e: e.low), "wrong end"),
        (lambda *given: gate(*given, missing=False), "not measured passed"),
        (gate_that_lets_nan_through, "NaN passed"),
        (
            lambda *given: gate(*given, over=lambda x, b: x > b, under=lambda x, b: x < b),
            "EQUAL to the bound",
        ),
        (lambda *given: [n for n in given[1] if n not in gate(*given)], "ARE kept"),
        (lambda *given: not gate(*given), "names of the limits"),
        (lambda *given: len(gate(*given)), "expected .* got"),
        (lambda *given: gate(*given)[:1], "expected .* got"),
        (lambda m, limits: [n for n, (k, b) in limits.items() if not m[n].low >= b], "expected .* got"),
        (lambda *given: set(gate(*given)), "expected .* got"),
        (lambda *given: gate(*given, over=lambda x, b: x <= b), "expected .* got"),
        (lambda *given: [], "expected .* got"),
        (lambda *given: None, "is a return missing"),
    ],
}


@pytest.mark.parametrize("name, fn", [(n, f) for n, fns in RIGHT.items() for f in fns])
def test_right_answers_are_accepted(name, fn):
    verdict = judge(EXERCISES[name], fn)
    assert verdict.state == "solved", verdict.message


@pytest.mark.parametrize("name, fn, word", [(n, f, w) for n, rows in WRONG.items() for f, w in rows])
def test_wrong_answers_are_refused_by_name(name, fn, word):
    verdict = judge(EXERCISES[name], fn)
    assert verdict.state == "wrong"
    assert "\n" not in verdict.message
    assert re.search(word, verdict.message), verdict.message


def test_every_exercise_is_mutation_tested():
    assert set(RIGHT) == set(WRONG) == set(MINE)
    for name in MINE:
        assert len(RIGHT[name]) >= 3
        assert len(WRONG[name]) >= 15
        assert len([word for _, word in WRONG[name] if not word.startswith(("expected", "raised"))]) >= 6

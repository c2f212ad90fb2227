"""The checks of lesson 3's exercises, mutation-tested: right answers pass, wrong ones are refused by name."""

import contextlib
import math
import re

import numpy as np
import pytest
import torch

from rlhf_helpers.lab.checks import judge
from rlhf_helpers.lab.exercises import EXERCISES, LESSONS

MINE = {name: EXERCISES[name] for name, lesson in LESSONS.items() if lesson == 3}


def label_by_rows(a, b, sa, sb, *, sign=-1, half=2.0, hard=False):
    """Pair by pair as a beginner writes it; each option is one slip."""
    labels = []
    for one, two, three, four in zip(a.tolist(), b.tolist(), sa.tolist(), sb.tolist(), strict=True):
        odds = ((one - two) + sign * (three - four)) / half
        labels.append(float(odds > 0) if hard else 1 / (1 + math.exp(-odds)))
    return torch.tensor(labels)


def share_of_a(a, b):
    return a.exp() / (a.exp() + b.exp())


def refusals_by_loops(refused, must_refuse, *, missed_when=False, over_when=True, of=None):
    counts = {True: [0, 0], False: [0, 0]}
    for was, must in zip(refused.tolist(), must_refuse.tolist(), strict=True):
        counts[must][0] += was == (missed_when if must else over_when)
        counts[must][1] += 1
    return tuple(counts[kind][0] / (of or counts[kind][1]) for kind in (True, False))


def dual(multiplier, cost, limit, step_size):
    new = multiplier + step_size * (cost - limit)
    return new if new > 0 else 0


def rounds_by_while(prompt, answer, p_follows, criticize, revise, max_rounds, *, limit=0.5, stale=False):
    turn, objection = 0, None
    while turn < max_rounds and p_follows(prompt, answer) <= limit:
        objection = objection if stale and objection else criticize(prompt, answer)
        answer = revise(prompt, answer, objection)
        turn += 1
    return answer


def rounds_by_recursion(prompt, answer, p_follows, criticize, revise, max_rounds):
    if max_rounds == 0 or p_follows(prompt, answer) > 0.5:
        return answer
    revised = revise(prompt, answer, criticize(prompt, answer))
    return rounds_by_recursion(prompt, revised, p_follows, criticize, revise, max_rounds - 1)


def rounds_without_a_critic(prompt, answer, p_follows, criticize, revise, max_rounds):
    for _ in range(max_rounds):
        answer = revise(prompt, answer, criticize(prompt, answer))
    return answer


def rounds_from_the_draft(prompt, answer, p_follows, criticize, revise, max_rounds):
    text = answer
    for _ in range(max_rounds):
        if p_follows(prompt, text) > 0.5:
            break
        text = revise(prompt, answer, criticize(prompt, text))
    return text


def safe_or(answers, refusal):
    ranked = sorted(answers, key=lambda pair: -pair[1])
    return ranked[0][0] if ranked[0][1] >= 0.5 else refusal


def rows_by_loops(findings, own, refusal, *, won=True, prompt="prompt", once=True, pick=safe_or):
    rows = []
    for finding in findings:
        if won is not None and finding["success"] != won:
            continue
        row = {"prompt": finding[prompt], "completion": pick(own[finding["base_prompt"]], refusal)}
        if not once or all(row["prompt"] != other["prompt"] for other in rows):
            rows.append(row)
    return rows


def guard_by_steps(prompt, input_check, model, output_check, threshold, fallback, *, failed=0.0):
    def ask(check, *texts):
        try:
            return check(*texts)
        except Exception:
            return failed

    if ask(input_check, prompt) < threshold:
        return fallback
    answer = model(prompt)
    return fallback if ask(output_check, prompt, answer) < threshold else answer


def guard_open_at_its_end(prompt, input_check, model, output_check, threshold, fallback):
    def lenient(*texts):
        try:
            return output_check(*texts)
        except Exception:
            return 1.0

    return guard_by_steps(prompt, input_check, model, lenient, threshold, fallback)


def guard_by_loop(prompt, input_check, model, output_check, threshold, fallback):
    shown = fallback
    with contextlib.suppress(Exception):
        if input_check(prompt) >= threshold:
            said = model(prompt)
            if output_check(prompt, said) >= threshold:
                shown = said
    return shown


def threshold_by_loops(p_safe, harmful, max_withheld, *, count=lambda p, t: p < t, kind=False, pick=max):
    allowed = []
    for t in p_safe.tolist():
        rows = [
            p for p, h in zip(p_safe.tolist(), harmful.tolist(), strict=True) if h == kind or kind is None
        ]
        if sum(count(p, t) for p in rows) / len(rows) <= max_withheld:
            allowed.append(t)
    return pick(allowed)


def step_by_loops(tokens, gradient, losses_of, top_k, *, sign=1, pick=torch.argmin):
    rows = []
    for t, row in enumerate(gradient):
        for v in sorted(range(len(row)), key=lambda v: sign * row[v])[:top_k]:
            rows.append([*tokens[:t].tolist(), v, *tokens[t + 1 :].tolist()])
    rows = torch.tensor(rows)
    return rows[pick(losses_of(rows))]


def step_one_by_one(tokens, gradient, losses_of, top_k):
    best, lowest = None, math.inf
    for t in range(len(tokens)):
        for v in gradient[t].argsort()[:top_k]:
            row = tokens.clone()
            row[t] = v
            if (loss := losses_of(row[None]).item()) < lowest:
                best, lowest = row, loss
    return best


def step_in_place(tokens, gradient, losses_of, top_k):
    best = step_one_by_one(tokens, gradient, losses_of, top_k)
    tokens[:] = best
    return tokens


RIGHT = {
    "soft_label": [
        label_by_rows,
        lambda a, b, sa, sb: torch.sigmoid(0.5 * (a + sb - b - sa)),
        lambda a, b, sa, sb: torch.softmax(torch.stack([a + sb, b + sa]) / 2, dim=0)[0],
        lambda a, b, sa, sb: 1 / (1 + torch.exp(((sa - sb) - (a - b)) / 2)),
    ],
    "refusal_errors": [
        refusals_by_loops,
        lambda r, m: ((~r[m]).float().mean().item(), r[~m].float().mean().item()),
        lambda r, m: (((~r & m).sum() / m.sum()).item(), ((r & ~m).sum() / (~m).sum()).item()),
        lambda r, m: (1 - np.mean(r.numpy()[m.numpy()]), np.mean(r.numpy()[~m.numpy()])),
    ],
    "next_multiplier": [
        dual,
        lambda m, cost, limit, step: max(0, m + step * (cost - limit)),
        lambda m, cost, limit, step: torch.relu(torch.tensor(m - step * (limit - cost))).item(),
    ],
    "critique_round": [
        rounds_by_while,
        rounds_by_recursion,
        lambda p, a, judge, criticize, revise, n: rounds_by_while(p, a, judge, criticize, revise, int(n)),
    ],
    "hardening_rows": [
        rows_by_loops,
        lambda findings, own, refusal: list(
            {
                f["prompt"]: {"prompt": f["prompt"], "completion": safe_or(own[f["base_prompt"]], refusal)}
                for f in findings
                if f["success"]
            }.values()
        ),
        lambda findings, own, refusal: [
            {"prompt": a, "completion": safe_or(own[q], refusal)}
            for a, q in dict.fromkeys((f["prompt"], f["base_prompt"]) for f in findings if f["success"])
        ],
    ],
    "guarded_answer": [
        guard_by_steps,
        guard_by_loop,
        lambda *parts: guard_by_steps(*parts[:5], fallback=parts[5]),
    ],
    "guard_threshold": [
        threshold_by_loops,
        lambda p, h, limit: sorted(t for t in p.tolist() if sum(p[~h] < t) <= limit * sum(~h))[-1],
        lambda p, h, limit: p[torch.stack([(p[~h] < t).double().mean() <= limit for t in p])].max().item(),
    ],
    "gcg_step": [
        step_by_loops,
        step_one_by_one,
        lambda tokens, g, losses, k: step_by_loops(tokens, g - g.gather(1, tokens[:, None]), losses, k),
    ],
    "debate_reward": [
        lambda own, other, odds: torch.sigmoid(0.5 * odds(own, other) - 0.5 * odds(other, own)),
        lambda own, other, odds: 1 / (1 + torch.exp((odds(other, own) - odds(own, other)) / 2)),
        lambda own, other, odds: torch.cat(
            [torch.sigmoid((odds([x], [y]) - odds([y], [x])) / 2) for x, y in zip(own, other, strict=True)]
        ),
    ],
}


WRONG = {  # written as a beginner would, not as the package writes them; with the word that names the mistake
    "soft_label": [
        (lambda a, b, sa, sb: share_of_a(a, b), "only one order"),
        (lambda a, b, sa, sb: torch.softmax(torch.stack([sa, sb]), 0)[1], "only one order"),
        (lambda *given: label_by_rows(*given, sign=1), "ADDED"),
        (lambda *given: label_by_rows(*given, sign=1, half=1), "ADDED"),
        (lambda a, b, sa, sb: (share_of_a(a, b) + share_of_a(sa, sb)) / 2, "ADDED"),
        (lambda a, b, sa, sb: (share_of_a(a, b) + share_of_a(sb, sa)) / 2, "PROBABILITIES were averaged"),
        (lambda a, b, sa, sb: (share_of_a(a, b) + 1 - share_of_a(sa, sb)) / 2, "PROBABILITIES were averaged"),
        (lambda *given: label_by_rows(*given, half=1), "summed, not averaged"),
        (lambda *given: label_by_rows(*given, half=-2), "OTHER text"),
        (lambda a, b, sa, sb: 1 - share_of_a(a + sb, b + sa), "OTHER text"),
        (lambda *given: label_by_rows(*given, hard=True), "0 or 1"),
        (lambda a, b, sa, sb: 0.5 * ((a - b) + (sb - sa)), "log-odds"),
        (lambda a, b, sa, sb: (a - b) - (sa - sb), "log-odds"),
        (lambda *given: label_by_rows(*given).log(), "logarithm"),
        (lambda a, b, sa, sb: (torch.exp(a) + torch.exp(sb)) / 2, "do not sum to 1"),
        (lambda a, b, sa, sb: torch.sigmoid(a - sa), "without its rival"),
        (lambda *given: label_by_rows(*given).mean(), "as if averaged"),
        (lambda *given: label_by_rows(*given).tolist(), "expected .* got"),
        (lambda *given: label_by_rows(*given, half=4), "expected .* got"),
        (lambda a, b, sa, sb: (share_of_a(a, b) > 0.5) & (share_of_a(sb, sa) > 0.5), "expected .* got"),
        (lambda a, b, sa, sb: 1 / (1 + math.exp(-(a - b))), "raised"),
    ],
    "refusal_errors": [
        (lambda *given: (refusals_by_loops(*given)[1], refusals_by_loops(*given)[0]), "are swapped"),
        (lambda r, m: refusals_by_loops(r, ~m, missed_when=True, over_when=False), "are swapped"),
        (lambda r, m: refusals_by_loops(r, m, of=len(r)), "ALL prompts"),
        (lambda r, m: ((~r & m).float().mean().item(), (r & ~m).float().mean().item()), "ALL prompts"),
        (lambda r, m: refusals_by_loops(r, m, missed_when=True), "missed is its complement"),
        (lambda r, m: refusals_by_loops(r, m, over_when=False), "over is its complement"),
        (lambda r, m: ((~r).float().mean().item(), r.float().mean().item()), "plays no part"),
        (lambda r, m: (m[~r].float().mean().item(), (~m)[r].float().mean().item()), "is reversed"),
        (lambda r, m: ((m & ~r).sum().item(), (r & ~m).sum().item()), "these are counts"),
        (lambda r, m: refusals_by_loops(r, m, of=1), "these are counts"),
        (lambda r, m: 1 - (r == m).float().mean().item(), "one number"),
        (lambda r, m: ((~r[m]).float().mean(), r[~m].float().mean()), "these are tensors"),
        (lambda r, m: (refusals_by_loops(r, m)[0],), "expected .* got"),
        (lambda r, m: tuple(100 * x for x in refusals_by_loops(r, m)), "expected .* got"),
        (lambda r, m: (r[m] == False).mean().item(), "raised RuntimeError"),  # noqa: E712
    ],
    "next_multiplier": [
        (lambda m, cost, limit, step: m + step * (cost - limit), "fell below 0"),
        (lambda m, cost, limit, step: dual(m, limit, cost, step), "sign is flipped"),
        (lambda m, cost, limit, step: m + step * (limit - cost), "sign is flipped"),
        (lambda m, cost, limit, step: dual(m, cost, limit, 1), "step_size never enters"),
        (lambda m, cost, limit, step: min(0, m + step * (cost - limit)), "expected .* got"),
        (lambda m, cost, limit, step: m * max(0, 1 + step * (cost - limit)), "was multiplied"),
        (lambda m, cost, limit, step: m * math.exp(step * (cost - limit)), "expected .* got"),
        (lambda m, cost, limit, step: m + max(0, step * (cost - limit)), "the STEP was kept"),
        (lambda m, cost, limit, step: m + step * (cost - limit) if cost > limit else m, "the STEP was kept"),
        (lambda m, cost, limit, step: dual(0, cost, limit, step), "forgotten"),
        (lambda m, cost, limit, step: dual(m, cost, 0, step), "limit never enters"),
        (lambda m, cost, limit, step: dual(m, cost / limit, 1, step), "expected .* got"),
        (lambda m, cost, limit, step: max(0, step * (m + cost - limit)), "expected .* got"),
        (lambda m, cost, limit, step: abs(m + step * (cost - limit)), "expected .* got"),
        (lambda m, cost, limit, step: min(1, dual(m, cost, limit, step)), "expected .* got"),
        (lambda m, cost, limit, step: m * cost - m * limit, "penalty of the loss"),
        (lambda *given: torch.tensor(float(dual(*given))), "this is a tensor"),
        (lambda m, cost, limit, step: m, "expected .* got"),
        (lambda m, cost, limit, step: dual(m, cost, limit, -step) + 0.1, "expected .* got"),
        (lambda m, cost, limit, step: torch.clamp(m + step * (cost - limit), min=0), "raised TypeError"),
    ],
    "critique_round": [
        (
            lambda p, a, judge, criticize, revise, n: revise(p, a, criticize(p, a)),
            "expected .* got",
        ),
        (rounds_without_a_critic, "with which the critic is satisfied"),
        (rounds_from_the_draft, "draft 0, revised after: objection to draft 1"),
        (lambda *given: rounds_by_while(*given, stale=True), "draft 1, revised after: objection to draft 0"),
        (lambda *given: rounds_by_while(*given[:5], 99), "max_rounds is not kept"),
        (lambda *given: rounds_by_while(*given[:5], given[5] - 1), "max_rounds is not kept"),
        (lambda *given: rounds_by_while(*given[:5], 1), "this is one round"),
        (
            lambda p, a, judge, criticize, revise, n: (
                rounds_by_while(p, a, judge, criticize, revise, n) and a
            ),
            "the draft came back",
        ),
        (lambda *given: rounds_by_while(*given, limit=0.4999), "at exactly 0.5"),
        (
            lambda p, a, judge, criticize, revise, n: rounds_by_while(a, p, judge, criticize, revise, n),
            "asked about the prompt 'draft 0'",
        ),
        (lambda *given: (rounds_by_while(*given), 1), "expected .* got"),
        (lambda *given: None, "is a return missing"),
    ],
    "hardening_rows": [
        (lambda *given: rows_by_loops(*given, won=None), "ALL attacks"),
        (lambda *given: rows_by_loops(*given, won=False), "that FAILED"),
        (lambda *given: rows_by_loops(*given, once=False), "has two rows"),
        (lambda *given: rows_by_loops(*given, prompt="base_prompt"), "plain request"),
        (lambda *given: rows_by_loops(*given, pick=lambda answers, refusal: refusal), "is the fixed refusal"),
        (
            lambda *given: rows_by_loops(
                *given, pick=lambda answers, refusal: max(answers, key=lambda x: x[1])[0]
            ),
            "below 0.5 is not safe",
        ),
        (lambda *given: rows_by_loops(*given, pick=lambda answers, refusal: answers[0][0]), "not the safest"),
        (
            lambda *given: rows_by_loops(
                *given, pick=lambda answers, refusal: min(answers, key=lambda x: x[1])[0]
            ),
            "not the safest",
        ),
        (
            lambda findings, own, refusal: [
                {"prompt": f["prompt"], "completion": f["response"]} for f in findings if f["success"]
            ],
            "this trains the harm",
        ),
        (lambda *given: [tuple(row.values()) for row in rows_by_loops(*given)], "expected .* got"),
        (lambda *given: rows_by_loops(*given)[::-1], "expected .* got"),
        (lambda findings, own, refusal: [f for f in findings if f["success"]], "expected .* got"),
    ],
    "guarded_answer": [
        (lambda *parts: parts[-1], "all it ever says"),
        (lambda p, check, model, *rest: model(p), "although the input check had stopped"),
        (
            lambda p, check, model, out, t, no: guard_by_steps(p, check, model, lambda *_: 1.0, t, no),
            "never checked",
        ),
        (
            lambda p, check, model, out, t, fallback: guard_by_steps(
                p, lambda _: 1.0, model, out, t, fallback
            ),
            "although the input check had stopped",
        ),
        (guard_open_at_its_end, "lets the answer through"),
        (lambda *parts: guard_by_steps(*parts, failed=1.0), "expected .* got"),
        (
            lambda p, check, model, out, t, no: model(p) if check(p) >= t and out(p, model(p)) >= t else no,
            "raised ConnectionError",
        ),
        (
            lambda p, check, model, out, t, no: guard_by_steps(p, check, model, out, t + 1e-3, no),
            "at the thresh",
        ),
        (
            lambda p, check, model, out, t, no: model(p) if check(p) >= t and out(model(p), p) >= t else no,
            "output_check was asked about 'what the model says' and 'a prompt'",
        ),
        (lambda *parts: (guard_by_steps(*parts), "input"), "expected .* got"),
    ],
    "guard_threshold": [
        (lambda *given: threshold_by_loops(*given, kind=None), "not on all of them"),
        (lambda *given: threshold_by_loops(*given, kind=True), "share of HARMFUL"),
        (lambda *given: threshold_by_loops(*given, pick=min), "the lowest threshold"),
        (lambda p, h, limit: p[~h].quantile(limit).item(), "quantile"),
        (lambda p, h, limit: p.tolist().index(threshold_by_loops(p, h, limit)), "an index"),
        (lambda *given: torch.tensor(threshold_by_loops(*given)), "a tensor"),
        (lambda p, h, limit: threshold_by_loops(p, h, max(0, limit - 1e-3)), "may be reached"),
        (lambda p, h, limit: 0.5, "expected .* got"),
        (lambda p, h, limit: p[h].max().item(), "expected .* got"),
    ],
    "gcg_step": [
        (lambda *given: step_by_loops(*given, sign=-1), "LARGEST gradient"),
        (lambda *given: step_by_loops(*given, pick=torch.argmax), "HIGHEST loss"),
        (lambda tokens, g, losses, k: g.argmin(1), "at once"),
        (lambda tokens, g, losses, k: step_by_loops(tokens, g, losses, 1), "only one proposal"),
        (
            lambda tokens, g, losses, k: step_by_loops(
                tokens, g, lambda rows: g.gather(1, rows.T).sum(0) - g.gather(1, tokens[:, None]).sum(), k
            ),
            "gradient chose alone",
        ),
        (step_in_place, "changes its input tokens"),
        (lambda *given: step_by_loops(*given).tolist(), "expected .* got"),
        (lambda tokens, g, losses, k: tokens, "expected .* got"),
        (lambda tokens, g, losses, k: losses(tokens[None]), "expected .* got"),
    ],
    "debate_reward": [
        (lambda own, other, odds: torch.sigmoid(odds(own, other)), "only one order"),
        (lambda own, other, odds: torch.sigmoid((odds(own, other) + odds(other, own)) / 2), "ADDED"),
        (
            lambda own, other, odds: (odds(own, other).sigmoid() + 1 - odds(other, own).sigmoid()) / 2,
            "PROBAB",
        ),
        (lambda own, other, odds: torch.sigmoid(odds(own, other) - odds(other, own)), "summed"),
        (lambda own, other, odds: torch.sigmoid((odds(other, own) - odds(own, other)) / 2), "OTHER text"),
        (lambda own, other, odds: (odds(own, other) > odds(other, own)).float(), "0 or 1"),
        (lambda own, other, odds: (odds(own, other) - odds(other, own)) / 2, "log-odds"),
        (
            lambda own, other, odds: torch.sigmoid((odds(own, other) - odds(other, own)) / 2).mean(),
            "averaged",
        ),
        (
            lambda own, other, odds: torch.sigmoid((odds(own, other) - odds(other, own)) / 2).tolist(),
            "expected",
        ),
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
        assert len([word for _, word in WRONG[name] if not word.startswith(("expected", "raised"))]) >= 6

"""The checks of lesson 3's exercises, mutation-tested: right answers pass, wrong ones are refused by name."""

import itertools
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


def wilson(s, n, *, z=1.96, parts=(1, 1, 1), m=None):
    """As the formula stands in the text; each option is one slip."""
    m = n if m is None else m
    p = s / n
    middle = p + parts[0] * z**2 / (2 * m)
    root = math.sqrt(p * (1 - p) / m + parts[1] * z**2 / (4 * m**2))
    below = 1 + parts[2] * z**2 / m
    return p, (middle - z * root) / below, (middle + z * root) / below


def wilson_solved(s, n):
    """The bounds are the two q with (p - q)^2 = z^2 q (1 - q) / n."""
    p, k = s / n, 1.959963984540054**2 / n
    low, high = sorted(np.roots([1 + k, -(2 * p + k), p * p]).real)
    return p, float(low), float(high)


def wald(s, n):
    p = s / n
    return p, max(0, p - 1.96 * (p * (1 - p) / n) ** 0.5), min(1, p + 1.96 * (p * (1 - p) / n) ** 0.5)


def scores_by_loops(gradient, tokens, *, sign=1, own=lambda g, t, tokens: g[t, tokens[t]]):
    out = torch.zeros_like(gradient)
    for t in range(gradient.shape[0]):
        for v in range(gradient.shape[1]):
            out[t, v] = sign * (gradient[t, v] - own(gradient, t, tokens))
    return out


def scores_by_one_hot(gradient, tokens):
    one_hot = torch.nn.functional.one_hot(tokens, gradient.shape[1]).to(gradient)
    return gradient - (gradient * one_hot).sum(1, keepdim=True)


def refusals_by_loops(refused, must_refuse, *, missed_when=False, over_when=True, of=None):
    counts = {True: [0, 0], False: [0, 0]}
    for was, must in zip(refused.tolist(), must_refuse.tolist(), strict=True):
        counts[must][0] += was == (missed_when if must else over_when)
        counts[must][1] += 1
    return tuple(counts[kind][0] / (of or counts[kind][1]) for kind in (True, False))


def bias_by_counts(answers, *, rule=lambda s, a, n: 2 * s / (s + a) - 1, empty=0.0):
    s, a = sum(answers.tolist().count(x) for x in (1,)), answers.tolist().count(-1)
    if s + a == 0 and empty is not None:
        return empty
    return rule(s, a, len(answers))


def dual(multiplier, cost, limit, step_size):
    new = multiplier + step_size * (cost - limit)
    return new if new > 0 else 0


def front_by_loops(
    points, *, everywhere=lambda q, p: all(q >= p), somewhere=lambda q, p: any(q > p), own=False
):
    """Each point against every other one; each option is one slip."""
    front = []
    for i, p in enumerate(points):
        rivals = [q for j, q in enumerate(points) if own or j != i]
        front.append(not any(everywhere(q, p) and somewhere(q, p) for q in rivals))
    return torch.tensor(front)


def area_by_sweep(points, reference, *, above=True, running=True, ref=True):
    """From the right to the left as a beginner writes it; each option is one slip."""
    x0, y0 = reference.tolist() if ref else (0.0, 0.0)
    rows = [(x, y) for x, y in points.tolist() if (x > x0 and y > y0) or not above]
    area, best = 0.0, y0
    for x, y in sorted(rows, reverse=True):
        if y > best or not running:
            area += (x - x0) * (y - best)
            best = y
    return area


def area_by_cells(points, reference):
    """Every cell of the grid of all coordinates counts once if its upper right corner is dominated."""
    xs, ys = (
        sorted({r, *(v for v in points[:, k].tolist() if v > r)}) for k, r in enumerate(reference.tolist())
    )
    cells = itertools.product(itertools.pairwise(xs), itertools.pairwise(ys))
    return sum(
        (x1 - x0) * (y1 - y0)
        for (x0, x1), (y0, y1) in cells
        if any(x >= x1 and y >= y1 for x, y in points.tolist())
    )


def fairest_by_sorting(utilities, *, key=lambda column: (min(column), sum(column))):
    columns = utilities.T.tolist()
    return max(range(len(columns)), key=lambda k: key(columns[k]))


def fairest_with_numpy(utilities):
    table = utilities.numpy()
    best = np.flatnonzero(table.min(0) == table.min(0).max())
    return int(best[table[:, best].mean(0).argmax()])


def effect_by_rows(clean, corrupted, patched):
    rows = zip(clean.tolist(), corrupted.tolist(), patched.tolist(), strict=True)
    return torch.tensor([(p - x) / (c - x) for c, x, p in rows])


RIGHT = {
    "soft_label": [
        label_by_rows,
        lambda a, b, sa, sb: torch.sigmoid(0.5 * (a + sb - b - sa)),
        lambda a, b, sa, sb: torch.softmax(torch.stack([a + sb, b + sa]) / 2, dim=0)[0],
        lambda a, b, sa, sb: 1 / (1 + torch.exp(((sa - sb) - (a - b)) / 2)),
    ],
    "attack_rate": [wilson, wilson_solved, lambda s, n: list(wilson(s, n, z=1.959964))],
    "swap_scores": [
        scores_by_loops,
        scores_by_one_hot,
        lambda g, tokens: g - g[torch.arange(len(tokens)), tokens].unsqueeze(1),
        lambda g, tokens: torch.stack([row - row[token] for row, token in zip(g, tokens, strict=True)]),
    ],
    "refusal_errors": [
        refusals_by_loops,
        lambda r, m: ((~r[m]).float().mean().item(), r[~m].float().mean().item()),
        lambda r, m: (((~r & m).sum() / m.sum()).item(), ((r & ~m).sum() / (~m).sum()).item()),
        lambda r, m: (1 - np.mean(r.numpy()[m.numpy()]), np.mean(r.numpy()[~m.numpy()])),
    ],
    "bbq_bias": [
        bias_by_counts,
        lambda x: ((x == 1).sum() / (x != 0).sum() * 2 - 1).item() if (x != 0).any() else 0,
        lambda x: x.sum().item() / max(1, x.abs().sum().item()),
        lambda x: float(torch.nan_to_num(x[x != 0].float().mean(), nan=0.0)),
    ],
    "next_multiplier": [
        dual,
        lambda m, cost, limit, step: max(0, m + step * (cost - limit)),
        lambda m, cost, limit, step: torch.relu(torch.tensor(m - step * (limit - cost))).item(),
    ],
    "pareto_front": [
        front_by_loops,
        lambda p: ~((p[:, None] >= p).all(2) & (p[:, None] > p).any(2)).any(0),
        lambda p: torch.tensor([not ((p >= q).all(1) & (p > q).any(1)).any() for q in p]),
        lambda p: torch.from_numpy(
            np.array([not np.any(np.all(p.numpy() >= q, 1) & np.any(p.numpy() > q, 1)) for q in p.numpy()])
        ),
    ],
    "hypervolume": [
        area_by_sweep,
        area_by_cells,
        lambda p, ref: area_by_sweep(p.flip(1), ref.flip(0)),
        lambda p, ref: area_by_sweep(p[front_by_loops(p)], ref),
    ],
    "fairest": [
        fairest_by_sorting,
        fairest_with_numpy,
        lambda u: (u.amin(0) + 1e-4 * u.mean(0)).argmax().item(),
    ],
    "patching_effect": [
        effect_by_rows,
        lambda c, x, p: (p - x) / (c - x),
        lambda c, x, p: (x - p).div(x - c),
        lambda c, x, p: 1 - (c - p) / (c - x),
    ],
}


def bias_without_a_guard(answers):
    stereotype = (answers == 1).sum()
    return (2 * stereotype / (answers != 0).sum() - 1).item()


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
        (lambda *given: label_by_rows(*given, half=-2), "OTHER answer"),
        (lambda a, b, sa, sb: 1 - share_of_a(a + sb, b + sa), "OTHER answer"),
        (lambda *given: label_by_rows(*given, hard=True), "hard label"),
        (lambda a, b, sa, sb: 0.5 * ((a - b) + (sb - sa)), "log-odds"),
        (lambda a, b, sa, sb: (a - b) - (sa - sb), "log-odds"),
        (lambda *given: label_by_rows(*given).log(), "logarithm"),
        (lambda a, b, sa, sb: (torch.exp(a) + torch.exp(sb)) / 2, "do not sum to 1"),
        (lambda a, b, sa, sb: torch.sigmoid(a - sa), "without its rival"),
        (lambda *given: label_by_rows(*given).mean(), "were averaged"),
        (lambda *given: label_by_rows(*given).tolist(), "expected .* got"),
        (lambda *given: label_by_rows(*given, half=4), "expected .* got"),
        (lambda a, b, sa, sb: (share_of_a(a, b) > 0.5) & (share_of_a(sb, sa) > 0.5), "expected .* got"),
        (lambda a, b, sa, sb: 1 / (1 + math.exp(-(a - b))), "raised"),
    ],
    "attack_rate": [
        (wald, "Wald"),
        (lambda s, n: wilson(s, n, parts=(0, 0, 0)), "Wald"),
        (lambda s, n: wilson(s, n, z=1), "z is not that of 95 %"),
        (lambda s, n: wilson(s, n, z=1.645), "z is not that of 95 %"),
        (lambda s, n: wilson(s, n, z=2), "z is not that of 95 %"),
        (lambda s, n: wilson(s, n, m=n - 1), "n - 1"),
        (lambda s, n: tuple(round(100 * x, 2) for x in wilson(s, n)), "percent|expected"),
        (lambda s, n: [x * 100 for x in wilson(s, n)], "percent"),
        (lambda s, n: wilson(s, n, parts=(1, 1, 0)), "not divided by"),
        (lambda s, n: wilson(s, n, parts=(0, 1, 1)), "moves the centre"),
        (lambda s, n: wilson(s, n, parts=(1, 0, 1)), "under the root"),
        (lambda s, n: ((s + 1.96**2 / 2) / (n + 1.96**2), *wilson(s, n)[1:]), "interval's centre"),
        (lambda s, n: (wilson(s, n)[1], wilson(s, n)[0], wilson(s, n)[2]), "the order is"),
        (lambda s, n: wilson(s, n)[1:], "three numbers in a row"),
        (lambda s, n: (s / n, wilson(s, n)[1:]), "three numbers in a row"),
        (lambda s, n: s / n, "only the rate"),
        (lambda s, n: tuple(torch.tensor(x) for x in wilson(s, n)), "these are tensors"),
        (lambda s, n: torch.tensor(wilson(s, n)), "these are tensors"),
        (lambda s, n: wilson(s, n) if s else (0, 0, 0), "expected .* got"),
        (lambda s, n: wilson(s + 1, n + 2), "expected .* got"),
        (lambda s, n: wilson(n - s, n), "expected .* got"),
        (lambda s, n: wilson(n, s), "raised"),
        (lambda s, n: torch.sqrt(s / n), "raised TypeError"),
    ],
    "swap_scores": [
        (lambda *given: scores_by_loops(*given, sign=-1), "sign is flipped"),
        (lambda g, tokens: g.clone(), "own gradient was not subtracted"),
        (lambda g, tokens: -1 * g, "own gradient was not subtracted"),
        (lambda g, tokens: g + g.gather(1, tokens.unsqueeze(1)), "was added"),
        (lambda *given: scores_by_loops(*given, own=lambda g, t, tokens: g[tokens[t], t]), "wrong row"),
        (lambda g, tokens: g - torch.index_select(g, 0, tokens), "wrong row"),
        (lambda g, tokens: g - g.gather(1, tokens[:, None]).squeeze(), r"shape \(T, 1\)"),
        (lambda g, tokens: g - torch.index_select(g, 1, tokens), "whole columns"),
        (lambda g, tokens: g.gather(1, tokens[:, None]).squeeze(1), "alone"),
        (lambda *given: torch.abs(scores_by_loops(*given)), "sign of the scores is lost"),
        (lambda *given: scores_by_loops(*given).argmin(dim=-1), "only the best token of each row"),
        (lambda *given: scores_by_loops(*given).min(1).values, "only the best token of each row"),
        (lambda g, tokens: g - g.mean(-1)[:, None], "mean .* of the row"),
        (lambda g, tokens: scores_by_loops(g / g.norm(dim=1, keepdim=True), tokens), "scaled on the way"),
        (lambda *given: scores_by_loops(*given).clamp(max=0), "swaps that hurt"),
        (lambda *given: scores_by_loops(*given).topk(2, largest=False).indices, "expected .* got"),
        (lambda *given: scores_by_loops(*given, own=lambda g, t, tokens: g[t, tokens[0]]), "expected .* got"),
        (lambda *given: scores_by_loops(*given).T, "expected .* got"),
        (lambda g, tokens: g - g.gather(1, tokens), "raised RuntimeError"),
    ],
    "refusal_errors": [
        (lambda *given: (refusals_by_loops(*given)[1], refusals_by_loops(*given)[0]), "are swapped"),
        (lambda r, m: refusals_by_loops(r, ~m, missed_when=True, over_when=False), "are swapped"),
        (lambda r, m: refusals_by_loops(r, m, of=len(r)), "ALL prompts"),
        (lambda r, m: ((~r & m).float().mean().item(), (r & ~m).float().mean().item()), "ALL prompts"),
        (lambda r, m: refusals_by_loops(r, m, missed_when=True), "missed is its complement"),
        (lambda r, m: refusals_by_loops(r, m, over_when=False), "over is its complement"),
        (lambda r, m: refusals_by_loops(r, m, missed_when=True, over_when=False), "that went right"),
        (lambda r, m: ((~r).float().mean().item(), r.float().mean().item()), "plays no part"),
        (lambda r, m: (m[~r].float().mean().item(), (~m)[r].float().mean().item()), "is reversed"),
        (lambda r, m: ((~m)[r].float().mean().item(), m[~r].float().mean().item()), "is reversed"),
        (lambda r, m: ((m & ~r).sum().item(), (r & ~m).sum().item()), "these are counts"),
        (lambda r, m: refusals_by_loops(r, m, of=1), "these are counts"),
        (lambda r, m: 1 - (r == m).float().mean().item(), "one number"),
        (lambda r, m: ((~r[m]).float().mean(), r[~m].float().mean()), "these are tensors"),
        (lambda r, m: torch.tensor(refusals_by_loops(r, m)), "these are tensors"),
        (lambda r, m: (refusals_by_loops(r, m)[0],), "expected .* got"),
        (lambda r, m: tuple(100 * x for x in refusals_by_loops(r, m)), "expected .* got"),
        (lambda r, m: (r[m] == False).mean().item(), "raised RuntimeError"),  # noqa: E712
    ],
    "bbq_bias": [
        (bias_without_a_guard, "0 / 0"),
        (lambda x: bias_by_counts(x, empty=None), "0 / 0"),
        (lambda x: x[x != 0].float().mean().item(), "0 / 0"),
        (lambda x: 2 * (x == 1).sum().item() / max(1, (x != 0).sum().item()) - 1, "-1, the strongest"),
        (lambda x: bias_by_counts(x, rule=lambda s, a, n: 2 * s / n - 1), "unknown answers were counted"),
        (lambda x: 2 * (x == 1).float().mean().item() - 1, "unknown answers were counted"),
        (lambda x: x.float().mean().item(), "mean of all answers"),
        (lambda x: bias_by_counts(x, rule=lambda s, a, n: s / (s + a)), "2 x - 1 is missing"),
        (lambda x: bias_by_counts(x, rule=lambda s, a, n: s / (s + a), empty=None), "2 x - 1 is missing"),
        (lambda x: bias_by_counts(x, rule=lambda s, a, n: 2 * s / (s + a)), "the - 1 is missing"),
        (lambda x: bias_by_counts(x, rule=lambda s, a, n: s / (s + a) - 1), "the 2 is missing"),
        (lambda x: bias_by_counts(-x), "anti-stereotypes were counted"),
        (lambda x: bias_without_a_guard(-x), "anti-stereotypes were counted"),
        (lambda x: (x == 1).float().mean().item(), "share of all answers"),
        (lambda x: x.sum().item(), "this is a count"),
        (lambda x: abs(bias_by_counts(x)), "direction is lost"),
        (lambda x: torch.tensor(bias_by_counts(x)), "this is a tensor"),
        (lambda x: bias_by_counts(x, rule=lambda s, a, n: s / max(a, 1)), "expected .* got"),
        (lambda x: bias_by_counts(x, empty=0.5), "expected .* got"),
        (lambda x: 2 * x.mean() - 1, "raised RuntimeError"),
    ],
    "next_multiplier": [
        (lambda m, cost, limit, step: m + step * (cost - limit), "fell below 0"),
        (lambda m, cost, limit, step: dual(m, limit, cost, step), "sign is flipped"),
        (lambda m, cost, limit, step: m + step * (limit - cost), "sign is flipped"),
        (lambda m, cost, limit, step: dual(m, cost, limit, 1), "step_size never enters"),
        (lambda m, cost, limit, step: min(0, m + step * (cost - limit)), "min stands"),
        (lambda m, cost, limit, step: m * max(0, 1 + step * (cost - limit)), "was multiplied"),
        (lambda m, cost, limit, step: m * math.exp(step * (cost - limit)), "was multiplied"),
        (lambda m, cost, limit, step: m + max(0, step * (cost - limit)), "the STEP was kept"),
        (lambda m, cost, limit, step: m + step * (cost - limit) if cost > limit else m, "the STEP was kept"),
        (lambda m, cost, limit, step: dual(0, cost, limit, step), "forgotten"),
        (lambda m, cost, limit, step: dual(m, cost, 0, step), "limit never enters"),
        (lambda m, cost, limit, step: dual(m, cost / limit, 1, step), "divided by its limit"),
        (lambda m, cost, limit, step: max(0, step * (m + cost - limit)), "scales the old multiplier"),
        (lambda m, cost, limit, step: abs(m + step * (cost - limit)), "mirrored"),
        (lambda m, cost, limit, step: min(1, dual(m, cost, limit, step)), "below 1"),
        (lambda m, cost, limit, step: m * cost - m * limit, "penalty of the loss"),
        (lambda *given: torch.tensor(float(dual(*given))), "this is a tensor"),
        (lambda m, cost, limit, step: m, "expected .* got"),
        (lambda m, cost, limit, step: dual(m, cost, limit, -step) + 0.1, "expected .* got"),
        (lambda m, cost, limit, step: torch.clamp(m + step * (cost - limit), min=0), "raised TypeError"),
    ],
    "pareto_front": [
        (lambda p: front_by_loops(p, somewhere=lambda q, p: True), "threw each other out"),
        (lambda p: ~((p[:, None] >= p).all(2) & ~torch.eye(len(p)).bool()).any(0), "threw each other out"),
        (lambda p: front_by_loops(p, somewhere=lambda q, p: True, own=True), "dominates itself"),
        (lambda p: front_by_loops(p, everywhere=lambda q, p: all(q > p)), "not all need be better"),
        (
            lambda p: front_by_loops(
                p, everywhere=lambda q, p: all(q <= p), somewhere=lambda q, p: any(q < p)
            ),
            "the other side",
        ),
        (lambda p: ~((p[:, None] >= p).all(2) & (p[:, None] > p).any(2)).any(1), "the other side"),
        (lambda p: p.sum(1) >= p.sum(1).max(), "largest sum"),
        (lambda p: p.mean(1) == p.mean(1).max(), "largest sum"),
        (lambda p: p[:, 0] >= p[:, 0].max(), "only some of the objectives"),
        (lambda p: front_by_loops(p[:, :2]), "only some of the objectives"),
        (lambda p: sum(p[:, k] == max(p[:, k]) for k in range(p.shape[1])) > 0, "only the best of each"),
        (lambda p: front_by_loops(p, everywhere=lambda q, p: True), "better in ANY"),
        (lambda p: torch.logical_not(front_by_loops(p)), "ARE dominated"),
        (lambda p: ((p[:, None] >= p).all(2) & (p[:, None] > p).any(2)).any(1), "dominate some other"),
        (
            lambda p: torch.tensor(
                [
                    bool(f) and q.tolist() not in p[:i].tolist()
                    for i, (f, q) in enumerate(zip(front_by_loops(p), p, strict=True))
                ]
            ),
            "only one was kept",
        ),
        (lambda p: torch.where(front_by_loops(p))[0], "these are indices"),
        (lambda p: p[front_by_loops(p)], "points themselves"),
        (lambda p: front_by_loops(p).int(), "these are numbers"),
        (lambda p: front_by_loops(p).float(), "these are numbers"),
        (lambda p: front_by_loops(p).tolist(), "expected .* got"),
        (lambda p: front_by_loops(p).numpy(), "expected .* got"),
        (lambda p: (p > 0.2).all(1), "expected .* got"),
        (lambda p: front_by_loops(p.T), "expected .* got"),
        (lambda p: p.all(p), "raised TypeError"),
    ],
    "hypervolume": [
        (lambda p, ref: sum(max(0, x - ref[0]) * max(0, y - ref[1]) for x, y in p).item(), "were summed"),
        (lambda p, ref: ((p - ref)[:, 0] * (p - ref)[:, 1]).sum().item(), "were summed"),
        (lambda p, ref: (p[front_by_loops(p)] - ref).relu().prod(1).sum().item(), "were summed"),
        (lambda p, ref: ((p[:, 0].max() - ref[0]) * (p[:, 1].max() - ref[1])).item(), "bounding box"),
        (lambda p, ref: area_by_sweep(p, ref, ref=False), "reference never enters"),
        (lambda p, ref: (p - ref).clamp(min=0).prod(-1).max().item(), "largest rectangle"),
        (lambda p, ref: area_by_sweep(p, ref, running=False), "dominated points moved"),
        (lambda p, ref: area_by_sweep(p, ref, running=False, above=False), "dominated points moved"),
        (lambda p, ref: area_by_sweep(p, ref, above=False), "with a sign"),
        (lambda p, ref: area_by_sweep(p[front_by_loops(p)], ref, above=False, running=False), "with a sign"),
        (lambda p, ref: torch.tensor(area_by_sweep(p, ref)), "this is a tensor"),
        (lambda p, ref: torch.prod(p.max(0).values - ref).item() - area_by_sweep(p, ref), "NOT dominated"),
        (lambda p, ref: area_by_sweep(p, ref) / torch.prod(p.max(0).values - ref).item(), "share of the"),
        (lambda p, ref: area_by_sweep(-p, -ref), "lower was taken as better"),
        (lambda p, ref: area_by_sweep(p, ref) / len(p), "expected .* got"),
        (lambda p, ref: area_by_sweep(p, ref - 0.01), "expected .* got"),
        (lambda p, ref: area_by_sweep(p[1:], ref), "expected .* got"),
        (lambda p, ref: p - ref[:, None], "raised RuntimeError"),
    ],
    "fairest": [
        (lambda u: fairest_by_sorting(u, key=sum), r"mean \(or sum\)"),
        (lambda u: u.sum(0).argmax().item(), r"mean \(or sum\)"),
        (lambda u: fairest_by_sorting(u, key=math.prod), "product"),
        (lambda u: u.min(0).values.argmin().item(), "WORST off"),
        (lambda u: fairest_by_sorting(u, key=max), "BEST-off"),
        (lambda u: u.min(1).values.argmax().item(), "wrong dimension"),
        (lambda u: fairest_by_sorting(u, key=min), "a tie went to the first"),
        (lambda u: u.min(dim=0).values.max(dim=0).indices.item(), "a tie went to the first"),
        (lambda u: u.shape[1] - 1 - u.min(0).values.flip(0).argmax().item(), "first or the last"),
        (lambda u: fairest_by_sorting(u, key=lambda column: (min(column), -sum(column))), "SMALLER mean"),
        (lambda u: fairest_by_sorting(u, key=lambda column: (min(column), max(column))), "largest single"),
        (lambda u: u[u.sum(1).argmin()].argmax().item(), "called the poorest"),
        (lambda u: fairest_by_sorting(u, key=lambda column: min(column) - max(column)), "most EQUAL"),
        (lambda u: u.std(0).argmin().item(), "most EQUAL"),
        (lambda u: u.argmax(1).mode().values.item(), "counts votes"),
        (lambda u: fairest_by_sorting(u, key=lambda column: sorted(column)[1]), "median group"),
        (lambda u: (u.min(0).values + u.mean(0)).argmax().item(), "only settles ties"),
        (lambda u: u.min(0).values.max().item(), "this is a utility"),
        (lambda u: fairest_by_sorting(u) + 1, "counted from 0"),
        (lambda u: torch.tensor(fairest_by_sorting(u)), "this is a tensor"),
        (lambda u: float(fairest_by_sorting(u)), "expected .* got"),
        (lambda u: [fairest_by_sorting(u)], "expected .* got"),
        (lambda u: (u.min(0).values == u.min(0).values.max()).nonzero(), "expected .* got"),
        (lambda u: int(u.amin(0)), "raised ValueError|raised RuntimeError"),
    ],
    "patching_effect": [
        (lambda c, x, p: (c - x) / (p - x), "upside down"),
        (lambda c, x, p: (p - c) / (x - c), "changed places"),
        (lambda c, x, p: 1 - effect_by_rows(c, x, p), "changed places"),
        (lambda c, x, p: (x - p) / (c - x), "minus the share"),
        (lambda c, x, p: (p - c) / (c - x), "measured from the clean run"),
        (lambda c, x, p: p - x, "no denominator"),
        (lambda c, x, p: p / c, "above AND below"),
        (lambda c, x, p: (p - x) / c, "above AND below"),
        (lambda c, x, p: (p - x) / x, "divided by the corrupted"),
        (lambda c, x, p: effect_by_rows(c, x, p).clip(0, 1), "was clamped"),
        (lambda c, x, p: torch.relu(effect_by_rows(c, x, p)), "was clamped"),
        (lambda c, x, p: torch.abs(effect_by_rows(c, x, p)), "absolute value"),
        (lambda c, x, p: (p - x) / torch.abs(c - x), "absolute value"),
        (lambda c, x, p: effect_by_rows(c, x, p).mean(), "were averaged"),
        (lambda c, x, p: (p - x) / torch.mean(c - x), "mean gap"),
        (lambda c, x, p: (p - x) / (c - x + 0.1), "expected .* got"),
        (lambda c, x, p: 100 * effect_by_rows(c, x, p), "expected .* got"),
        (lambda c, x, p: effect_by_rows(c, x, p)[:, None], "expected .* got"),
        (lambda c, x, p: effect_by_rows(c, x, p).numpy(), "expected .* got"),
        (lambda c, x, p: (p - x) / sum(c - x, 0)[0], "raised IndexError"),
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
        assert len(RIGHT[name]) >= 2
        assert len([word for _, word in WRONG[name] if not word.startswith(("expected", "raised"))]) >= 7

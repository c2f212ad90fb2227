"""The checks of lesson 2's exercises, mutation-tested: right answers pass, wrong ones are refused by name."""

import re

import pytest
import torch
import torch.nn.functional as F

from rlhf_helpers.lab.checks import judge
from rlhf_helpers.lab.exercises import EXERCISES, LESSONS

MINE = {name: EXERCISES[name] for name, lesson in LESSONS.items() if lesson == 2}
TRAINED = {"policy_gradient", "clipped_loss", "k3", "dpo_loss"}  # a gradient goes through these


def rloo_by_loops(rewards):
    out = rewards.clone()
    for p, row in enumerate(rewards.tolist()):
        for i, own in enumerate(row):
            others = row[:i] + row[i + 1 :]
            out[p, i] = own - sum(others) / len(others)
    return out


def gae_by_steps(
    rewards, values, gamma, lam, *, after_end=None, next_gamma=None, decay=None, carry=True, minus_value=True
):
    """Backwards as a beginner writes it; each option is one slip."""
    advantages = torch.zeros_like(rewards)
    last = 0
    for t in range(rewards.shape[1] - 1, -1, -1):
        if t == rewards.shape[1] - 1:
            following = 0 if after_end is None else values[:, after_end]
        else:
            following = values[:, t + 1]
        delta = rewards[:, t] + (gamma if next_gamma is None else next_gamma) * following
        if minus_value:
            delta = delta - values[:, t]
        last = delta + (gamma * lam if decay is None else decay) * last if carry else delta
        advantages[:, t] = last
    return advantages


def gae_forwards(rewards, values, gamma, lam):
    advantages, last = [], 0
    following = torch.cat([values[:, 1:], torch.zeros(len(values), 1)], dim=1)
    for t in range(rewards.shape[1]):
        last = rewards[:, t] + gamma * following[:, t] - values[:, t] + gamma * lam * last
        advantages.append(last)
    return torch.stack(advantages, 1)


def gae_without_the_next_value(rewards, values, gamma, lam):
    out, last = torch.zeros_like(rewards), 0
    for t in reversed(range(rewards.shape[1])):
        last = out[:, t] = rewards[:, t] - values[:, t] + gamma * lam * last
    return out


def gae_from_the_token_before_the_last(rewards, values, gamma, lam):
    out, last = torch.zeros_like(rewards), 0
    for t in reversed(range(rewards.shape[1] - 1)):
        delta = rewards[:, t] + gamma * values[:, t + 1] - values[:, t]
        last = out[:, t] = delta + gamma * lam * last
    return out


def gae_as_a_sum(rewards, values, gamma, lam):
    """A_t = sum_k (gamma lam)^k delta_{t+k}, as the paper writes it."""
    following = F.pad(values, (0, 1))[:, 1:]
    deltas = rewards + gamma * following - values
    steps = range(rewards.shape[1])
    sums = [sum((gamma * lam) ** (k - t) * deltas[:, k] for k in steps if k >= t) for t in steps]
    return torch.stack(sums, dim=1)


def ppo(logps, old_logps, advantages, cliprange, *, pick=torch.max, low=True, high=True, own=True):
    """The two terms as a beginner writes them; each option is one slip."""
    ratio = torch.exp(logps - old_logps)
    clipped = torch.clamp(ratio, 1 - cliprange if low else None, 1 + cliprange if high else None)
    first, second = -advantages * ratio, -advantages * clipped
    return pick(first, second) if own else second


def ppo_by_cases(logps, old_logps, advantages, cliprange):
    ratio = (logps - old_logps).exp()
    kept = torch.where(advantages > 0, ratio.clamp(max=1 + cliprange), ratio.clamp(min=1 - cliprange))
    return -kept * advantages


def ppo_of_ratio(ratio, advantages, low, high):
    return torch.max(-advantages * ratio, -advantages * ratio.clamp(low, high))


def standardised(rewards, *, dim=1, correction=1, eps=1e-4):
    spread = rewards.std(dim, keepdim=True, correction=correction)
    return (rewards - rewards.mean(dim, keepdim=True)) / (spread + eps)


def group_by_rows(rewards):
    rows = []
    for row in rewards:
        middle = sum(row) / len(row)
        variance = sum((r - middle) ** 2 for r in row) / (len(row) - 1)
        rows.append([(r - middle) / (variance**0.5 + 1e-4) for r in row])
    return torch.tensor(rows)


def shaped_by_loops(
    scores, old_logps, ref_logps, mask, kl_coef, *, sign=-1, at=lambda n: n - 1, padding=0, replace=False
):
    """Token by token as a beginner writes it; each option is one slip."""
    out = torch.zeros_like(old_logps)
    for b in range(len(scores)):
        n = int(mask[b].sum())
        for t in range(out.shape[1]):
            if t < n or padding:
                out[b, t] = sign * kl_coef * (old_logps[b, t] - ref_logps[b, t])
        if replace:
            out[b, at(n)] = 0
        out[b, at(n)] += scores[b]
    return out


def shaped_with(scores, penalty, mask):
    is_last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
    return torch.where(mask, penalty, 0.0) + scores.unsqueeze(1) * is_last


def shares_by_class(rewards, probabilities, n, *, split=True, subtract=True, worst=False):
    """One reward class after the other as a beginner writes it; each option is one slip."""
    out = torch.zeros_like(probabilities)
    for value in rewards.unique():
        same = rewards == value
        upto = probabilities[rewards >= value if worst else rewards <= value].sum()
        below = upto - probabilities[same].sum() if subtract else torch.tensor(0.0)
        whole = upto**n - below**n
        out[same] = whole * probabilities[same] / probabilities[same].sum() if split else whole
    return out


def shares_by_sorting(rewards, probabilities, n):
    order = rewards.argsort()
    total, shares = 0.0, torch.zeros_like(probabilities)
    for i in order:
        shares[i] = (total + probabilities[i]) ** n - total**n
        total = total + probabilities[i]
    return shares


def shares_one_by_one(rewards, probabilities, n):
    shares = []
    for reward, p in zip(rewards.tolist(), probabilities.tolist(), strict=True):
        lower, same = (float(probabilities[x].sum()) for x in (rewards < reward, rewards == reward))
        shares.append(((lower + same) ** n - lower**n) * p / same)
    return torch.tensor(shares)


def dpo(pc, pr, rc, rr, beta):
    return -F.logsigmoid(beta * ((pc - pr) - (rc - rr)))


def stepped(beta, kl, target, *, low=-0.2, high=0.2):
    error = kl / target - 1
    if error > high:
        error = high
    if error < low:
        error = low
    return beta * (1 + error)


RIGHT = {
    "policy_gradient": [
        lambda logps, advantages: -advantages * logps,
        lambda logps, advantages: -(advantages.detach() * logps),
        lambda logps, advantages: torch.stack([-a * lp for a, lp in zip(advantages, logps, strict=True)]),
    ],
    "rloo": [
        lambda r: r - (r.sum(1, keepdim=True) - r) / (r.shape[1] - 1),
        lambda r: r.shape[1] / (r.shape[1] - 1) * (r - r.mean(dim=1, keepdim=True)),
        rloo_by_loops,
    ],
    "gae": [gae_by_steps, gae_as_a_sum, lambda r, v, gamma, lam: gae_by_steps(r, v, gamma, lam).detach()],
    "clipped_loss": [
        ppo,
        ppo_by_cases,
        lambda lp, old, a, c: (
            -torch.min(a * torch.exp(lp - old), a * torch.exp(lp - old.detach()).clamp(1 - c, 1 + c))
        ),
    ],
    "group_advantages": [
        standardised,
        group_by_rows,
        lambda r: (r - r.mean(-1)[:, None]) / (r.var(-1)[:, None].sqrt() + 1e-4),
    ],
    "k3": [
        lambda lp, ref: torch.exp(ref - lp) - 1 + (lp - ref),
        lambda lp, ref: torch.expm1(ref - lp) - (ref - lp),
        lambda lp, ref: ref.detach().exp() / lp.exp() - 1 - (ref.detach() - lp),
    ],
    "shaped_rewards": [
        shaped_by_loops,
        lambda s, old, ref, m, c: shaped_with(s, -c * (old - ref), m),
        lambda s, old, ref, m, c: (
            c * (ref - old) * m + F.one_hot(m.sum(1) - 1, m.shape[1]) * s[:, None]
        ).detach(),
    ],
    "best_of_n_shares": [shares_by_class, shares_one_by_one],
    "dpo_loss": [
        dpo,
        lambda pc, pr, rc, rr, beta: F.softplus(-(beta * (pc - rc) - beta * (pr - rr))),
        lambda pc, pr, rc, rr, beta: F.binary_cross_entropy_with_logits(
            beta * (pc - pr - rc + rr), torch.ones_like(pc), reduction="none"
        ),
    ],
    "next_beta": [
        stepped,
        lambda beta, kl, target: beta * (1 + max(-0.2, min(0.2, kl / target - 1))),
        lambda beta, kl, target: beta * min(max(kl / target, 0.8), 1.2),
        lambda beta, kl, target: beta * (1 + torch.tensor(kl / target - 1).clamp(-0.2, 0.2).item()),
    ],
}


def pg_in_a_no_grad_block(logps, advantages):
    with torch.no_grad():
        return -advantages * logps


def pg_in_place(logps, advantages):
    return logps.mul_(-advantages)


WRONG = {  # written as a beginner would, not as the package writes them; with the word that names the mistake
    "policy_gradient": [
        (lambda lp, a: lp * a, "GOOD tokens rarer"),
        (lambda lp, a: torch.mean(-a * lp), "averaged"),
        (lambda lp, a: (-a * lp).mean(dim=-1), "averaged"),
        (lambda lp, a: -(a * lp).sum(-1), "summed"),
        (lambda lp, a: -a * torch.exp(lp), "is the probability"),
        (lambda lp, a: -a * torch.log(lp), "twice"),
        (lambda lp, a: -1 * lp, "imitates"),
        (lambda lp, a: -a * torch.exp(lp - lp.detach()), "cancelled"),
        (lambda lp, a: -torch.abs(a) * lp, "sign of the advantage is lost"),
        (lambda lp, a: -F.relu(a) * lp, "negative advantages were dropped"),
        (lambda lp, a: -((a - a.mean()) / a.std()) * lp, "standardized"),
        (lambda lp, a: -a * F.log_softmax(lp, dim=1), "normalized again"),
        (lambda lp, a: -a - lp, "added"),
        (pg_in_a_no_grad_block, "no gradient reaches logps"),
        (pg_in_place, "changes its input logps"),
        (lambda lp, a: -a * lp.clamp(min=-1.5), "expected .* got"),
        (lambda lp, a: -a @ lp, "raised RuntimeError"),
    ],
    "rloo": [
        (lambda r: r - r.mean(dim=-1)[:, None], "includes the sample itself"),
        (lambda r: (r.sum(1, keepdim=True) - r) / (r.shape[1] - 1) - r, "sign is flipped"),
        (lambda r: (r.sum(1, keepdim=True) - r) / (r.shape[1] - 1), "this is the baseline"),
        (lambda r: r - (r.sum(0) - r) / (len(r) - 1), "wrong dimension"),
        (lambda r: r - r.mean(dim=0, keepdim=True), "wrong dimension"),
        (lambda r: r - (r.sum() - r) / (r.numel() - 1), "whole batch"),
        (lambda r: (r.shape[1] - 1) / r.shape[1] * (r - r.mean(1, keepdim=True)), "upside down"),
        (lambda r: r - r.sum(1, keepdim=True) + r, "summed, not averaged"),
        (lambda r: r - (r.sum(1, keepdim=True) - r) / r.shape[1], "G - 1 of them"),
        (lambda r: r - r.sum(1, keepdim=True) / (r.shape[1] - 1), "still in the sum"),
        (standardised, "GRPO's step"),
        (lambda r: r - torch.cat([r[:, -1:], r[:, :-1]], 1), "only ONE other"),
        (lambda r: r.sum(1) / r.shape[1], "one number per prompt"),
        (lambda r: r - r.mean(1), "expected .* got|raised"),
        (lambda r: len(r) / (len(r) - 1) * (r - r.mean(1, keepdim=True)), "expected .* got"),
        (lambda r: r - r.median(1, keepdim=True).values, "expected .* got"),
    ],
    "gae": [
        (gae_without_the_next_value, "NEXT state is missing"),
        (lambda r, v, g, lam: gae_by_steps(r, v, g, lam, minus_value=False), "V_t was not subtracted"),
        (gae_forwards, "time runs forwards"),
        (lambda r, v, g, lam: gae_by_steps(r, v, g, lam, after_end=-1), "not the last value again"),
        (lambda r, v, g, lam: gae_by_steps(r, v, g, lam, after_end=0), "wrapped round"),
        (
            lambda r, v, g, lam: gae_by_steps(r + g * (v - F.pad(v[:, 1:], (0, 1))), v, g, lam),
            "value of another step",
        ),
        (lambda r, v, g, lam: gae_by_steps(r, v, g, lam, decay=g), "lam never enters"),
        (lambda r, v, g, lam: gae_by_steps(r, v, g, lam, carry=False), "only delta came back"),
        (lambda r, v, g, lam: gae_by_steps(r, v, g, lam, next_gamma=1), "gamma is missing in delta"),
        (lambda r, v, g, lam: gae_by_steps(r, v, g, lam, decay=lam), "by lam alone"),
        (lambda r, v, g, lam: gae_by_steps(r, v, 1.0, lam), "gamma never enters"),
        (lambda r, v, g, lam: gae_by_steps(r, v, g, lam, decay=1), "added whole"),
        (lambda r, v, g, lam: gae_as_a_sum(r, v, g, lam) + v, "these are the returns"),
        (lambda r, v, g, lam: (gae_as_a_sum(r, v, g, lam), gae_as_a_sum(r, v, g, lam) + v), "two tensors"),
        (gae_from_the_token_before_the_last, "last token was left out"),
        (lambda r, v, g, lam: gae_by_steps(-r, -v, g, lam), "sign is flipped"),
        (lambda r, v, g, lam: gae_as_a_sum(r.t(), v.t(), g, lam).t(), "over the rows"),
        (lambda r, v, g, lam: torch.stack(list(gae_as_a_sum(r, v, g, lam).T)), "expected .* got"),
        (lambda r, v, g, lam: gae_by_steps(r, v, lam, g, decay=g), "expected .* got"),
        (lambda r, v, g, lam: r + g * v[:, 1:] - v, "raised RuntimeError"),
    ],
    "clipped_loss": [
        (lambda lp, old, a, c: -a * (lp - old).exp(), "nothing is clipped"),
        (lambda lp, old, a, c: ppo(lp, old, a, c, own=False), "only the clipped term"),
        (lambda lp, old, a, c: ppo(lp, old, a, c, pick=torch.min), "min and max are swapped"),
        (
            lambda lp, old, a, c: torch.min(a * (lp - old).exp(), a * (lp - old).exp().clamp(1 - c, 1 + c)),
            "this is the objective",
        ),
        (lambda lp, old, a, c: ppo(lp, old, -a, c), "good tokens are made rarer"),
        (lambda lp, old, a, c: ppo_of_ratio(torch.exp(old - lp), a, 1 - c, 1 + c), "upside down"),
        (lambda lp, old, a, c: ppo_of_ratio(lp - old, a, 1 - c, 1 + c), "take exp of it"),
        (lambda lp, old, a, c: ppo_of_ratio(lp / old, a, 1 - c, 1 + c), "ratio of the LOG-probs"),
        (lambda lp, old, a, c: ppo_of_ratio(torch.exp(lp - old), a, -c, c), "range lies around 0"),
        (
            lambda lp, old, a, c: torch.max(
                -a * torch.exp(lp - old), -a * torch.exp(torch.clamp(lp - old, -c, c))
            ),
            "LOG-ratio was clipped",
        ),
        (lambda lp, old, a, c: ppo(lp, old, a, c, low=False), "clipped above only"),
        (lambda lp, old, a, c: ppo(lp, old, a, c, high=False), "clipped below only"),
        (lambda lp, old, a, c: -(lp - old).exp() * torch.clamp(a, -c, c), "ADVANTAGES were clipped"),
        (
            lambda lp, old, a, c: ppo_of_ratio(
                (lp.sum(1) - old.sum(1)).exp()[:, None].expand_as(a), a, 1 - c, 1 + c
            ),
            "whole row",
        ),
        (lambda lp, old, a, c: ppo(lp, old, a, 0.2), "use cliprange"),
        (lambda lp, old, a, c: ppo(lp, old, a, c).mean(), "averaged"),
        (lambda lp, old, a, c: ppo(lp.detach(), old, a, c), "no gradient reaches logps"),
        (lambda lp, old, a, c: ppo(lp, lp, a, c), "expected .* got"),
        (lambda lp, old, a, c: ppo(lp, old, a, 2 * c), "expected .* got"),
    ],
    "group_advantages": [
        (lambda r: standardised(r, correction=0), "by G - 1"),
        (lambda r: standardised(r, eps=0), "0 / 0"),
        (lambda r: standardised(r, eps=1e-8), "eps is too small"),
        (
            lambda r: (r - r.mean(1, keepdim=True)) / torch.clamp(r.std(1, keepdim=True), min=1e-4),
            "a floor",
        ),
        (
            lambda r: (r - r.mean(1, keepdim=True)) / torch.sqrt(r.var(1, keepdim=True) + 1e-4),
            "under the root",
        ),
        (lambda r: standardised(r, eps=0) + 1e-4, "brackets"),
        (lambda r: r / (r.std(1, keepdim=True) + 1e-4), "mean was not subtracted"),
        (lambda r: r - r.sum(1, keepdim=True) / r.shape[1], "nothing was divided"),
        (lambda r: (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) ** 2 + 1e-4), "variance"),
        (lambda r: standardised(-r), "sign is flipped"),
        (lambda r: standardised(r, dim=0), "wrong dimension"),
        (lambda r: (r - torch.mean(r)) / (torch.std(r) + 1e-4), "whole batch"),
        (lambda r: (r - r.mean(1, keepdim=True)) / (torch.std(r) + 1e-4), "whole batch"),
        (lambda r: rloo_by_loops(r) / (r.std(1, keepdim=True) + 1e-4), "as RLOO's"),
        (lambda r: standardised(r, eps=1e-3), "expected .* got"),
        (lambda r: torch.nan_to_num(standardised(r, eps=0)), "expected .* got|too small"),
        (lambda r: r.softmax(1), "expected .* got"),
        (lambda r: (r - r.mean(1)) / (r.std(1) + 1e-4), "raised RuntimeError"),
    ],
    "k3": [
        (lambda lp, ref: torch.exp(lp - ref) - 1 - (lp - ref), "d is reversed"),
        (lambda lp, ref: torch.exp(lp - ref) - 1 + (lp - ref), "wrong difference"),
        (lambda lp, ref: torch.exp(ref - lp) - 1 - (lp - ref), "last d has the wrong sign"),
        (lambda lp, ref: lp - ref, "this is k1"),
        (lambda lp, ref: ref - lp, "sign flipped"),
        (lambda lp, ref: 0.5 * (lp - ref) ** 2, "this is k2"),
        (lambda lp, ref: torch.exp(ref - lp) + (lp - ref), "- 1 is missing"),
        (lambda lp, ref: torch.exp(ref - lp) - 1, r"\+ d is missing"),
        (lambda lp, ref: 1 - torch.exp(ref - lp) - (lp - ref), "never negative"),
        (lambda lp, ref: torch.exp(lp) * (lp - ref), "exact sum"),
        (lambda lp, ref: F.kl_div(lp, ref, reduction="none", log_target=True), "this is kl_div"),
        (lambda lp, ref: torch.exp(ref.exp() - lp.exp()) - 1 + lp.exp() - ref.exp(), "LOG-probs"),
        (lambda lp, ref: torch.abs(lp - ref), "absolute value"),
        (lambda lp, ref: (torch.exp(ref - lp) - 1 + lp - ref).mean(), "averaged or summed"),
        (lambda lp, ref: (torch.exp(ref - lp) - 1 + lp - ref).sum(dim=1), "averaged or summed"),
        (lambda lp, ref: (torch.exp(ref - lp) - 1 + lp - ref).detach(), "no gradient reaches logps"),
        (lambda lp, ref: torch.exp(ref - lp).detach() - 1 + lp - ref, "gradient with respect to logps"),
        (lambda lp, ref: (torch.exp(ref - lp) - 1 + lp - ref).clamp(max=1.0), "expected .* got"),
        (lambda lp, ref: (lp - ref) ** 2 / 2 - (lp - ref) ** 3 / 6, "expected .* got"),
    ],
    "shaped_rewards": [
        (lambda *given: shaped_by_loops(*given, sign=1), "KL is added"),
        (lambda *given: shaped_by_loops(*given, at=lambda n: -1), "last COLUMN"),
        (lambda *given: shaped_by_loops(*given, at=lambda n: n), "one index too late"),
        (
            lambda s, old, ref, m, c: shaped_by_loops(s, old, ref, m, c, at=lambda n: min(n, m.shape[1] - 1)),
            "one index too late",
        ),
        (lambda *given: shaped_by_loops(*given, at=lambda n: n - 2), "one index too early"),
        (lambda *given: shaped_by_loops(*given, at=lambda n: 0), "first token"),
        (lambda s, old, ref, m, c: (s.unsqueeze(-1) - c * (old - ref)) * m, "every token got"),
        (lambda s, old, ref, m, c: s.view(-1, 1) - c * (old - ref) * m, "every token got"),
        (lambda s, old, ref, m, c: ((s / m.sum(1))[:, None] - c * (old - ref)) * m, "shared out"),
        (lambda *given: shaped_by_loops(*given, padding=1), "padding got a penalty"),
        (lambda *given: shaped_by_loops(*given, replace=True), "REPLACED"),
        (lambda s, old, ref, m, c: c * shaped_with(s, ref - old, m), "multiplies the score too"),
        (lambda s, old, ref, m, c: shaped_with(s, ref - old, m), "kl_coef never enters"),
        (lambda s, old, ref, m, c: -c * m * (old - ref), "score never enters"),
        (lambda s, old, ref, m, c: shaped_by_loops(s, old, old, m, c), "no penalty"),
        (
            lambda s, old, ref, m, c: shaped_with(s - c * ((old - ref) * m).sum(1), 0 * old, m),
            "pays its own",
        ),
        (
            lambda s, old, ref, m, c: shaped_with(s, -c * (torch.exp(ref - old) - 1 + old - ref), m),
            "only k1",
        ),
        (lambda s, old, ref, m, c: s - c * ((old - ref) * m).sum(1), "was summed"),
        (lambda s, old, ref, m, c: shaped_by_loops(s.flip(0), old, ref, m, c), "expected .* got"),
        (lambda s, old, ref, m, c: s - c * (old - ref), "raised RuntimeError"),
    ],
    "best_of_n_shares": [
        (lambda r, p, n: shares_by_class(r, p, 1), "n-th power is missing"),
        (lambda r, p, n: shares_by_class(r, p, 1, split=False), "n-th power is missing"),
        (lambda r, p, n: shares_by_class(r, p, n, split=False), "ties are not split"),
        (
            lambda r, p, n: shares_by_class(r, p, n, split=False) / (r.unsqueeze(0) == r.unsqueeze(1)).sum(0),
            "equal parts",
        ),
        (shares_by_sorting, "settled by index"),
        (lambda r, p, n: torch.stack([p[r <= x].sum() ** n for x in r]), "subtract"),
        (lambda r, p, n: shares_by_class(r, p, n, subtract=False), "subtract"),
        (lambda r, p, n: torch.pow(p, n), "ALL n draws"),
        (lambda r, p, n: 1 - torch.pow(1 - p, n), "drawn at all"),
        (
            lambda r, p, n: torch.stack(
                [n * q * p[r <= x].sum() ** (n - 1) for x, q in zip(r, p, strict=True)]
            ),
            "density",
        ),
        (lambda r, p, n: shares_by_class(r, p, n, worst=True), "WORST"),
        (lambda r, p, n: shares_by_class(r, p, n - 1), "n - 1"),
        (lambda r, p, n: shares_by_class(r, p, n)[torch.sort(r).indices], "order of the rewards"),
        (lambda r, p, n: shares_by_sorting(torch.arange(len(r)), p, n), "order given"),
        (lambda r, p, n: shares_by_class(r, torch.ones(len(p)) / len(p), n), "equally likely"),
        (lambda r, p, n: torch.where(r == max(r), p, 0) / p[r == max(r)].sum(), "may not occur"),
        (lambda r, p, n: p * r.exp() / (p * r.exp()).sum(), "tilt"),
        (lambda r, p, n: shares_by_class(r, p, n).tolist(), "expected .* got"),
        (lambda r, p, n: p * n, "expected .* got"),
        (lambda r, p, n: p[r] ** n, "raised IndexError"),
    ],
    "dpo_loss": [
        (lambda pc, pr, rc, rr, beta: dpo(pr, pc, rr, rc, beta), "changed places"),
        (lambda pc, pr, rc, rr, beta: dpo(rc, rr, pc, pr, beta), "changed places"),
        (lambda *given: -dpo(*given), "minus is missing"),
        (lambda pc, pr, rc, rr, beta: beta * dpo(pc, pr, rc, rr, 1), "outside the sigmoid"),
        (lambda pc, pr, rc, rr, beta: dpo(pc, pr, rc, rr, 1.0), "beta never enters"),
        (lambda pc, pr, rc, rr, beta: dpo(pc, pr, rc, rr, 1 / beta), "divided by beta"),
        (
            lambda pc, pr, rc, rr, beta: -(1 / (1 + torch.exp(-beta * (pc - rc - pr + rr)))).log(),
            "underflows",
        ),
        (lambda *given: -torch.log(torch.exp(-dpo(*given)) + 1e-8), "hides the underflow"),
        (lambda pc, pr, rc, rr, beta: F.softplus(beta * (pr - pc)), "reference never enters"),
        (lambda pc, pr, rc, rr, beta: dpo(pc, pr, -rc, -rr, beta), "difference was added"),
        (lambda pc, pr, rc, rr, beta: -F.logsigmoid(beta * (pc - pr) - rc + rr), "bracket is missing"),
        (lambda pc, pr, rc, rr, beta: F.softplus(beta * (rc - pc)), "rejected answer never enters"),
        (lambda pc, pr, rc, rr, beta: dpo(pc, -pr, rc, -rr, beta), "log-ratios were added"),
        (
            lambda pc, pr, rc, rr, beta: F.softplus(beta * (rc - pc)) + F.softplus(beta * (pr - rr)),
            "judged alone",
        ),
        (lambda *given: torch.exp(-dpo(*given)), "probability that the chosen answer wins"),
        (lambda pc, pr, rc, rr, beta: -(beta * (pc - rc) - beta * (pr - rr)), "bare margin"),
        (lambda pc, pr, rc, rr, beta: torch.clamp(1 - beta * (pc - rc - pr + rr), min=0), "hinge"),
        (lambda pc, pr, rc, rr, beta: ((pc - pr) - (rc - rr) - 0.5 / beta) ** 2, "IPO"),
        (lambda *given: dpo(*given).mean(), "averaged or summed"),
        (
            lambda pc, pr, rc, rr, beta: dpo(pc, pr.detach(), rc, rr, beta),
            "no gradient reaches policy_rejected_logps",
        ),
        (lambda pc, pr, rc, rr, beta: dpo(pc, pr, rc, rr, 0.1), "expected .* got"),
        (lambda pc, pr, rc, rr, beta: dpo(pc[:, None], pr, rc[:, None], rr, beta), "expected .* got"),
    ],
    "next_beta": [
        (lambda beta, kl, target: beta * (2 - stepped(1, kl, target)), "direction is wrong"),
        (lambda beta, kl, target: beta / stepped(1, kl, target), "direction is wrong"),
        (lambda beta, kl, target: stepped(beta, target, kl), "direction is wrong"),
        (lambda beta, kl, target: beta * 0.9 if kl > target else beta * 1.1, "direction is wrong"),
        (lambda beta, kl, target: stepped(beta, kl, target, low=-9, high=99), "not clipped"),
        (lambda beta, kl, target: stepped(beta, kl, target, low=-9), "on one side"),
        (lambda beta, kl, target: stepped(beta, kl, target, high=99), "on one side"),
        (lambda beta, kl, target: stepped(beta, kl - target + 1, 1), "in nats"),
        (lambda beta, kl, target: stepped(beta, kl + target, target), "- 1 is missing"),
        (lambda beta, kl, target: beta * (1 + max(-0.2, min(0.2, (kl - target) / kl))), "divided by kl"),
        (lambda beta, kl, target: beta * (stepped(1, kl, target) - 1), r"1 \+ is missing"),
        (lambda beta, kl, target: stepped(1, kl, target), "this is the factor"),
        (lambda beta, kl, target: stepped(1, kl, target) - 1, "clipped error"),
        (lambda beta, kl, target: beta + stepped(1, kl, target) - 1, "added to beta"),
        (lambda beta, kl, target: max(-0.2, min(0.2, beta * kl / target)), "beta itself was clipped"),
        (lambda beta, kl, target: beta * 1.1 if kl > target else beta * 0.9, "always of one size"),
        (lambda beta, kl, target: beta, "did not move"),
        (lambda beta, kl, target: torch.tensor(stepped(beta, kl, target)), "this is a tensor"),
        (lambda beta, kl, target: stepped(beta, kl, target, low=-0.1, high=0.1), "expected .* got"),
        (lambda beta, kl, target: beta * torch.clamp(kl / target, 0.8, 1.2), "raised TypeError"),
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


@pytest.mark.parametrize("name", MINE)
@pytest.mark.parametrize(
    "change",
    [lambda x: 0 * x, lambda x: 0 * x + 0.693, lambda x: 1.01 * x, lambda x: x + 5e-3, lambda x: x / 2],
    ids=["zero", "constant", "+1 %", "+0.005", "half"],
)
def test_what_is_nearly_right_or_says_nothing_is_refused(name, change):
    verdict = judge(EXERCISES[name], lambda *given: change(MINE[name].reference(*given)))
    assert verdict.state == "wrong"
    assert verdict.message.startswith("not right yet")


@pytest.mark.parametrize("name", [name for name in MINE if name != "next_beta"])
def test_a_detached_result_is_refused_where_training_goes_through_it(name):
    verdict = judge(EXERCISES[name], lambda *given: MINE[name].reference(*given).detach())
    if name in TRAINED:
        assert "no gradient reaches" in verdict.message
    else:
        assert verdict.state == "solved"


def test_every_exercise_is_mutation_tested():
    assert set(RIGHT) == set(WRONG) == set(MINE)
    for name in MINE:
        assert len(RIGHT[name]) >= 2
        assert len([word for _, word in WRONG[name] if not word.startswith(("expected", "raised"))]) >= 6

"""Wrong answers that the checks of an earlier day accepted, and other ways to write each right answer.

The key of each slip says what is wrong with it. What changes an input, a setting or the kernel is tried in
test_lab_checks_isolation.py and, for every exercise, at the end of this file.
"""

import copy
import inspect
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rlhf_helpers.lab.checks import judge
from rlhf_helpers.lab.exercises import EXERCISES

SLIPS: dict = {}
RIGHT: dict = {}


# ---- lesson 1: fine-tuning labels, agreement, losses of comparisons and rankings, the last token

SLIPS["sft_labels"] = {
    "token 0 within a response": lambda ids, mask: ids.masked_fill(~mask | (ids == 0), -100),
    "zeros of ids * mask": lambda ids, mask: (ids * mask).masked_fill(ids * mask == 0, -100),
    "every end token is trained on": lambda ids, mask: torch.where(mask | (ids == 2), ids, -100),
    "int32, which cross-entropy refuses": lambda ids, mask: torch.where(mask, ids, -100).int(),
}
RIGHT["sft_labels"] = [
    lambda ids, mask: torch.tensor(np.where(mask.numpy(), ids.numpy(), -100)),
    lambda ids, mask: ids - (ids + 100) * ~mask,
    lambda ids, mask: torch.tensor(
        [
            [t if m else -100 for t, m in zip(*rows, strict=True)]
            for rows in zip(ids.tolist(), mask, strict=True)
        ]
    ),
]


def kappa_with_numpy(first, second):
    first, second = np.array(first.tolist()), np.array(second.tolist())
    shares = [(np.mean(first == label), np.mean(second == label)) for label in (0, 1)]
    chance = sum(p * q for p, q in shares)
    return torch.tensor((np.mean(first == second) - chance) / (1 - chance))


def kappa_by_loop(first, second):
    pairs = list(zip(first.tolist(), second.tolist(), strict=True))
    observed = sum(a == b for a, b in pairs) / len(pairs)
    chance = sum(a == b for (a, _), (_, b) in itertools.product(pairs, pairs)) / len(pairs) ** 2
    return torch.tensor((observed - chance) / (1 - chance))


def kappa_by_einsum(first, second):
    one, other = (F.one_hot(x, 2).float() / len(x) ** 0.5 for x in (first, second))
    table = torch.einsum("ni,nj->ij", one, other)
    chance = torch.einsum("ij,ki->", table, table)
    return (table.trace() - chance) / (1 - chance)


RIGHT["cohen_kappa"] = [kappa_with_numpy, kappa_by_loop, kappa_by_einsum]


def ece(confidence, correct, inside):
    """Sum over bins, each given as the rows that lie inside."""
    total = torch.tensor(0.0)
    for rows in inside:
        if rows.any():
            gap = correct[rows].mean() - confidence[rows].mean()
            total = total + rows.float().mean() * gap.abs()
    return total


def ece_right_closed(confidence, correct, bins):
    """As the code of Guo et al.: gt(lower) and le(upper)."""
    edges = torch.linspace(0, 1, bins + 1)
    return ece(
        confidence, correct, [(confidence > a) & (confidence <= b) for a, b in itertools.pairwise(edges)]
    )


def ece_right_closed_with_0(confidence, correct, bins):
    index = (confidence * bins).ceil().long().clamp(min=1)
    return ece(confidence, correct, [index == k for k in range(1, bins + 1)])


def ece_by_scatter(confidence, correct, bins):
    index = (confidence * bins).long().clamp(max=bins - 1)
    return torch.zeros(bins).index_add(0, index, correct - confidence).abs().sum() / len(confidence)


def ece_with_numpy(confidence, correct, bins):
    p, y = confidence.numpy(), correct.numpy()
    index = np.minimum((p * bins).astype(int), bins - 1)
    gaps = [abs(np.sum(y[index == k] - p[index == k])) for k in range(bins)]
    return torch.tensor(np.sum(gaps) / len(p))


SLIPS["calibration_error"] = {"0 falls out of the first bin": ece_right_closed}
RIGHT["calibration_error"] = [ece_right_closed_with_0, ece_by_scatter, ece_with_numpy]


def stable_softplus(x):
    """Written by hand, with a kink at 0 in each half."""
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


RIGHT["bradley_terry"] = [
    lambda chosen, rejected: stable_softplus(rejected - chosen),
    lambda chosen, rejected: F.binary_cross_entropy_with_logits(
        chosen - rejected, torch.ones_like(chosen), reduction="none"
    ),
    lambda chosen, rejected: torch.stack([chosen, rejected]).logsumexp(0) - chosen,
]


SLIPS["last_token"] = {
    "squeezed": lambda v, m: v.gather(1, m.sum(1, keepdim=True) - 1).squeeze(),
    "last value that is not 0": lambda v, m: torch.stack([row[row != 0][-1] for row in v * m]),
    "loop over the shorter side": lambda v, m: torch.stack(
        [v[b, int(m[b].sum()) - 1] for b in range(min(v.shape))]
    ),
}
RIGHT["last_token"] = [
    lambda v, m: torch.einsum("bt,bt->b", v, F.one_hot(m.sum(1) - 1, m.shape[1]).float()),
    lambda v, m: v[torch.arange(len(v)), (m == 0).int().argmax(1) - 1],
    lambda v, m: torch.stack([row[: int(n)][-1] for row, n in zip(v, m.sum(1), strict=True)]),
]


# ---- lesson 1: a step of training in parts, a loss that padding does not change, a correction for length


def step_with(rewards_of, optimizer, chosen, rejected, part_size, loss_of):
    """The parts by torch's own split, and one backward for each."""
    optimizer.zero_grad()
    rows = torch.arange(len(chosen)).split(part_size)
    sums = []
    for part in rows:
        better = rewards_of([chosen[i] for i in part])
        worse = rewards_of([rejected[i] for i in part])
        loss = loss_of(better, worse) / len(chosen)
        loss.backward()
        sums.append(loss.item())
    optimizer.step()
    return sum(sums)


def step_with_summed_graph(rewards_of, optimizer, chosen, rejected, part_size):
    """The gradients of the parts by torch.autograd.grad, added up by hand."""
    weights = [w for group in optimizer.param_groups for w in group["params"]]
    found, loss_sum = [torch.zeros_like(w) for w in weights], 0.0
    for i in range(0, len(chosen), part_size):
        part = slice(i, i + part_size)
        loss = F.softplus(rewards_of(rejected[part]) - rewards_of(chosen[part])).sum()
        found = [g + new for g, new in zip(found, torch.autograd.grad(loss, weights), strict=True)]
        loss_sum += loss.item()
    for weight, gradient in zip(weights, found, strict=True):
        weight.grad = gradient / len(chosen)
    optimizer.step()
    return loss_sum / len(chosen)


SLIPS["reward_step"] = {
    "the last pairs are dropped": lambda rewards_of, optimizer, chosen, rejected, part_size: step_with(
        rewards_of,
        optimizer,
        chosen[: len(chosen) // part_size * part_size],
        rejected[: len(chosen) // part_size * part_size],
        part_size,
        lambda better, worse: F.softplus(worse - better).sum(),
    ),
    "all pairs of a side at once": lambda rewards_of, optimizer, chosen, rejected, part_size: step_with(
        lambda rows: rewards_of(chosen + rejected)[: len(rows)],
        optimizer,
        chosen,
        rejected,
        part_size,
        lambda better, worse: F.softplus(worse - better).sum(),
    ),
}
RIGHT["reward_step"] = [
    lambda *given: step_with(*given, loss_of=lambda better, worse: -F.logsigmoid(better - worse).sum()),
    lambda *given: step_with(
        *given, loss_of=lambda better, worse: F.softplus(worse - better).mean() * len(better)
    ),
    step_with_summed_graph,
]


def rewards_at_ends(values_of, rows, pad_id):
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    for row, target in zip(rows, ids, strict=True):
        target[: len(row)] = torch.tensor(row)
    values = values_of(ids)[..., 0]
    return torch.stack([values[b, len(row) - 1] for b, row in enumerate(rows)])


SLIPS["pair_loss"] = {
    "the longest end of the batch": lambda values_of, chosen, rejected, pad_id: F.softplus(
        values_of(torch.tensor([max(rejected, key=len)]))[0, -1, 0]
        - rewards_at_ends(values_of, chosen, pad_id)
    ).mean(),
    "padded on the left, without a mask": lambda values_of, chosen, rejected, pad_id: F.softplus(
        values_of(torch.tensor([[pad_id] * (9 - len(row)) + row for row in rejected]))[:, -1, 0]
        - values_of(torch.tensor([[pad_id] * (9 - len(row)) + row for row in chosen]))[:, -1, 0]
    ).mean(),
}
RIGHT["pair_loss"] = [
    lambda values_of, chosen, rejected, pad_id: F.softplus(
        rewards_at_ends(values_of, rejected, pad_id) - rewards_at_ends(values_of, chosen, pad_id)
    ).mean(),
    lambda values_of, chosen, rejected, pad_id: (
        -torch.stack([rewards_at_ends(values_of, rows, pad_id) for rows in (chosen, rejected)], 1)
        .log_softmax(1)[:, 0]
        .mean()
    ),
    lambda values_of, chosen, rejected, pad_id: (
        sum(
            -F.logsigmoid(values_of(torch.tensor([a]))[0, -1, 0] - values_of(torch.tensor([b]))[0, -1, 0])
            for a, b in zip(chosen, rejected, strict=True)
        )
        / len(chosen)
    ),
]


def fitted_with_numpy(rewards, words):
    slopes = [np.polyfit(w, r, 1)[0] for r, w in zip(rewards.numpy(), words.numpy(), strict=True)]
    return rewards - float(np.median(slopes)) * words


SLIPS["length_correction"] = {
    "per word, not per ten": lambda rewards, words: rewards - 2.0 * words,
    "the same for every answer": lambda rewards, words: rewards - 2.0 * words.mean() / 10,
    "the verdict itself": lambda rewards, words: "good",
    "one number per prompt": lambda rewards, words: (rewards - 0.2 * words).amax(1),
}
RIGHT["length_correction"] = [
    fitted_with_numpy,
    lambda rewards, words: rewards - words / 6,
    lambda rewards, words: (rewards - rewards.mean()) / rewards.std() - words / 16,
]


def best_of_n(gold_in_order, n):
    N = len(gold_in_order)
    return sum(math.comb(i, n - 1) / math.comb(N, n) * gold for i, gold in enumerate(gold_in_order))


def best_of_n_by_dict(proxy, gold, n):
    proxy_of = dict(zip(gold.tolist(), proxy.tolist(), strict=True))
    return torch.tensor(best_of_n(sorted(proxy_of, key=proxy_of.get), n))


def best_of_n_by_index(proxy, gold, n):
    ordered = gold[proxy.argsort()].tolist()
    weights = [math.comb(ordered.index(value), n - 1) / math.comb(len(gold), n) for value in ordered]
    return torch.tensor(sum(w * value for w, value in zip(weights, ordered, strict=True)))


SLIPS["best_of_n_gold"] = {
    "equal gold rewards become one": best_of_n_by_dict,
    "equal gold rewards get the first index": best_of_n_by_index,
    "best of 1 is the first": lambda p, g, n: g[0] if n == 1 else best_of_n(g[p.argsort()], n),
    "best of all is the first": lambda p, g, n: g[0] if n == len(g) else best_of_n(g[p.argsort()], n),
}
RIGHT["best_of_n_gold"] = [
    lambda p, g, n: best_of_n(torch.stack([gold for _, gold in sorted(zip(p, g, strict=True))]), n),
    lambda p, g, n: torch.tensor(
        np.mean([max(s)[1] for s in itertools.combinations(zip(p.tolist(), g.tolist(), strict=True), n)])
    ),
    lambda p, g, n: (
        g[p.argsort()] @ torch.tensor([n * math.perm(i, n - 1) / math.perm(len(g), n) for i in range(len(g))])
    ),
]


# ---- lesson 2: from advantages to a policy's losses, preferences without RL

RIGHT["policy_gradient"] = [
    lambda logps, advantages: -torch.einsum("bt,bt->bt", advantages, logps),
    lambda logps, advantages: -advantages * (logps - logps.detach() + logps.detach()),
    lambda logps, advantages: torch.stack(
        [-advantages[:, t] * logps[:, t] for t in range(logps.shape[1])], dim=1
    ),
]
SLIPS["policy_gradient"] = {
    "advantages clipped at 2": lambda logps, advantages: -advantages.clamp(-2, 2) * logps,
    "log-probs clipped at -5": lambda logps, advantages: -advantages * logps.clamp(min=-5),
}


def rloo_in_place(rewards):
    rewards -= (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return rewards


SLIPS["rloo"] = {
    "changes the rewards": rloo_in_place,
    "clipped at 1": lambda r: (r.shape[1] / (r.shape[1] - 1) * (r - r.mean(1, keepdim=True))).clamp(-1, 1),
}
RIGHT["rloo"] = [
    lambda r: torch.tensor([[x - (sum(row) - x) / (len(row) - 1) for x in row] for row in r.tolist()]),
    lambda r: r - r @ (1 - torch.eye(r.shape[1])) / (r.shape[1] - 1),
    lambda r: torch.tensor(r.numpy() - (r.numpy().sum(1)[:, None] - r.numpy()) / (r.numpy().shape[1] - 1)),
]


def gae(rewards, values, gamma, lam, *, steps=None, out=None):
    """Backwards as the hint says; each option is one slip."""
    out = torch.zeros_like(rewards) if out is None else out
    next_value = advantage = torch.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1] if steps is None else steps)):
        value = values[:, t].clone()
        advantage = rewards[:, t] + gamma * next_value - value + gamma * lam * advantage
        next_value = value
        out[:, t] = advantage
    return out


def gae_with_numpy(rewards, values, gamma, lam):
    rewards, values = rewards.numpy(), np.pad(values.numpy(), ((0, 0), (0, 1)))
    out = np.zeros_like(values)
    for t in range(rewards.shape[1] - 1, -1, -1):
        out[:, t] = rewards[:, t] + gamma * values[:, t + 1] - values[:, t] + gamma * lam * out[:, t + 1]
    return torch.tensor(out[:, :-1])


def gae_by_powers(rewards, values, gamma, lam):
    deltas = rewards + gamma * F.pad(values, (0, 1))[:, 1:] - values
    t = torch.arange(rewards.shape[1])
    return torch.einsum("bk,tk->bt", deltas, ((gamma * lam) ** (t - t[:, None]).clamp(min=0)).triu())


def gae_row_by_row(rewards, values, gamma, lam):
    return torch.cat([gae(rewards[b : b + 1], values[b : b + 1], gamma, lam) for b in range(len(rewards))])


SLIPS["gae"] = {
    "overwrites the rewards": lambda r, v, gamma, lam: gae(r, v, gamma, lam, out=r),
    "overwrites the values": lambda r, v, gamma, lam: gae(r, v, gamma, lam, out=v),
    "squeezed": lambda *given: gae(*given).squeeze(),
    "rows + 1 steps": lambda r, v, gamma, lam: gae(r, v, gamma, lam, steps=min(r.shape[1], r.shape[0] + 1)),
    "one token gets its reward": lambda r, v, gamma, lam: gae(r, v, gamma, lam) if r.shape[1] > 1 else r,
}
RIGHT["gae"] = [gae_with_numpy, gae_by_powers, gae_row_by_row]


def clipped(logps, old_logps, advantages, cliprange):
    ratio = (logps - old_logps).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange))


def clipped_by_sign(logps, old_logps, advantages, cliprange):
    ratio = (logps - old_logps).exp()
    bound = 1 + cliprange * advantages.sign()
    return -advantages * torch.where(advantages > 0, ratio.minimum(bound), ratio.maximum(bound))


def clipped_by_loop(logps, old_logps, advantages, cliprange):
    ratio, rows = torch.exp(logps) / torch.exp(old_logps), []
    for b in range(ratio.shape[0]):
        pairs = zip(ratio[b], advantages[b], strict=True)
        rows.append(torch.stack([max(-a * r, -a * r.clamp(1 - cliprange, 1 + cliprange)) for r, a in pairs]))
    return torch.stack(rows)


SLIPS["clipped_loss"] = {
    "squeezed": lambda *given: clipped(*given).squeeze(),
    "dual clip": lambda lp, old, a, c: torch.where(
        a < 0, clipped(lp, old, a, c).minimum(-3 * a), clipped(lp, old, a, c)
    ),
    "loss clipped at 3": lambda *given: clipped(*given).clamp(max=3),
}
RIGHT["clipped_loss"] = [
    clipped_by_sign,
    clipped_by_loop,
    lambda lp, old, a, c: -torch.minimum((lp - old).exp() * a, (lp - old).exp().clip(1 - c, 1 + c) * a),
]


def rloo_of(rewards):
    return (rewards - rewards.mean(1, keepdim=True)) * rewards.shape[1] / (rewards.shape[1] - 1)


def table_step_with(
    logits, answers, rewards, learning_rate, *, advantages_of=rloo_of, rate_of=lambda rate: rate
):
    table = logits.clone().requires_grad_()
    loss = F.nll_loss(
        table.log_softmax(1)[:, :, None].expand(-1, -1, answers.shape[1]), answers, reduction="none"
    )
    (advantages_of(rewards) * loss).mean().backward()
    return table.detach() - rate_of(learning_rate) * table.grad


def step_by_adam(logits, answers, rewards, learning_rate):
    table = torch.nn.Parameter(logits.clone())
    optimizer = torch.optim.Adam([table], lr=learning_rate)
    (rloo_of(rewards) * -table.log_softmax(1).gather(1, answers)).mean().backward()
    optimizer.step()
    return table.detach()


SLIPS["rloo_step"] = {
    "Adam in place of plain descent": step_by_adam,
    "rate at most 1": lambda *given: table_step_with(*given, rate_of=lambda rate: min(rate, 1.0)),
    "two steps": lambda z, y, r, lr: table_step_with(table_step_with(z, y, r, lr), y, r, lr),
    "advantages clipped at 1": lambda *given: table_step_with(
        *given, advantages_of=lambda r: rloo_of(r).clamp(-0.5, 0.5)
    ),
}
RIGHT["rloo_step"] = [
    table_step_with,
    lambda z, y, r, lr: z + lr * F.one_hot(y, z.shape[1]).mul(rloo_of(r)[:, :, None]).sum(1) / y.numel(),
    lambda z, y, r, lr: (
        table_step_with(z - z.logsumexp(1, keepdim=True), y, r, lr) + z.logsumexp(1, keepdim=True)
    ),
]


def searched_by_hand(search, *coefs):
    return next(found for found in map(search, coefs) if found == "gold is kept")


SLIPS["safe_search"] = {
    "no search": lambda search: "gold is kept",
    "the first that fits": lambda search: searched_by_hand(search, 1.0, 0.3, 0.1),
    "another result": lambda search: search(0.1).replace("falls", "is kept"),
}
RIGHT["safe_search"] = [
    lambda search: search(0.3),
    lambda search: search(float("0.3")),
    lambda search: searched_by_hand(search, 0.3, 1.0),
]


def loss_of_answers(logps, old, ref, mask, scores, kl_coef, *, width=None):
    kl = torch.where(mask, old - ref, 0.0)[..., :width].sum(2)
    return -rloo_of(scores - kl_coef * kl) * torch.where(mask, logps, 0.0)[..., :width].sum(2)


SLIPS["repaired_loss"] = {
    "the last column is dropped": lambda *given: loss_of_answers(*given, width=-1).mean(),
    "mean over the prompts of sums": lambda *given: loss_of_answers(*given).sum(1).mean(),
    "only the first prompt": lambda *given: loss_of_answers(*given)[0].mean(),
}
RIGHT["repaired_loss"] = [
    lambda *given: loss_of_answers(*given).mean(),
    lambda *given: loss_of_answers(*given).sum() / given[4].numel(),
    lambda lp, old, ref, m, s, c: (
        -torch.einsum("pg,pgt->", rloo_of(s - c * ((old - ref) * m).sum(-1)), lp * m) / s.numel()
    ),
]


def dpo(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    return -F.logsigmoid(beta * (policy_chosen - policy_rejected - ref_chosen + ref_rejected))


SLIPS["dpo_loss"] = {"squeezed": lambda *given: dpo(*given).squeeze()}
RIGHT["dpo_loss"] = [
    lambda pc, pr, rc, rr, beta: stable_softplus(beta * (pr - rr - pc + rc)),
    lambda pc, pr, rc, rr, beta: -torch.stack([beta * (pc - rc), beta * (pr - rr)]).log_softmax(0)[0],
    lambda pc, pr, rc, rr, beta: torch.stack(
        [F.softplus(-beta * ((a - c) - (b - d))) for a, b, c, d in zip(pc, pr, rc, rr, strict=True)]
    ),
]


# ---- lesson 3: AI labels, revisions, hardening, guards, refusals, limits, attacks, debate


def soft_label(logp_a, logp_b, swapped_logp_a, swapped_logp_b):
    return torch.sigmoid((logp_a - logp_b + swapped_logp_b - swapped_logp_a) / 2)


def label_by_rows(*logps):
    rows = zip(*(x.tolist() for x in logps), strict=True)
    return torch.tensor([1 / (1 + math.exp((b - a + c - d) / 2)) for a, b, c, d in rows])


def label_of_geometric_means(a, b, sa, sb):
    first = (a.exp() * sb.exp()).sqrt()
    other = (b.exp() * sa.exp()).sqrt()
    return first / (first + other)


SLIPS["soft_label"] = {
    "squeezed": lambda *logps: soft_label(*logps).squeeze(),
    "clipped to 0.05 ... 0.95": lambda *logps: soft_label(*logps).clamp(0.05, 0.95),
}
RIGHT["soft_label"] = [
    label_by_rows,
    label_of_geometric_means,
    lambda a, b, sa, sb: (((a - b) + (sb - sa)) / 4).tanh() / 2 + 0.5,
]


def refusal_rates(refused, must):
    return (~refused[must]).float().mean().item(), refused[~must].float().mean().item()


SLIPS["refusal_errors"] = {
    "no error of one kind": lambda r, must: refusal_rates(r, must) if all(refusal_rates(r, must)) else (0, 0),
}
RIGHT["refusal_errors"] = [
    lambda r, must: (np.mean(~r.numpy()[must.numpy()]), np.mean(r.numpy()[~must.numpy()])),
    lambda r, must: (
        sum(m and not x for x, m in zip(r.tolist(), must.tolist(), strict=True)) / sum(must.tolist()),
        sum(x and not m for x, m in zip(r.tolist(), must.tolist(), strict=True)) / sum((~must).tolist()),
    ),
    lambda r, must: [
        1 - (r & must).sum().item() / must.sum().item(),
        (r > must).sum().item() / (~must).sum().item(),
    ],
]


def multiplier_after(multiplier, cost, limit, step_size):
    return max(0.0, multiplier + step_size * (cost - limit))


SLIPS["next_multiplier"] = {
    "at most 2": lambda *given: min(2.0, multiplier_after(*given)),
    "rounded": lambda *given: round(multiplier_after(*given), 2),
    "step size at most 2": lambda m, cost, limit, step: multiplier_after(m, cost, limit, min(step, 2)),
}
RIGHT["next_multiplier"] = [
    lambda m, cost, limit, step: np.maximum(m + step * cost - step * limit, 0),
    lambda m, cost, limit, step: m + max(-m, step * (cost - limit)),
    lambda m, cost, limit, step: (x := m - step * (limit - cost)) * (x > 0),
]


def revised_once(prompt, answer, criticize, revise):
    return revise(prompt, answer, criticize(prompt, answer))


def revised_by_countdown(prompt, answer, p_follows, criticize, revise, max_rounds):
    while max_rounds and not p_follows(prompt, answer) > 0.5:
        answer, max_rounds = revised_once(prompt, answer, criticize, revise), max_rounds - 1
    return answer


def revised_with_history(prompt, answer, p_follows, criticize, revise, max_rounds):
    drafts = [answer]
    while len(drafts) <= max_rounds and p_follows(prompt, drafts[-1]) <= 0.5:
        drafts.append(revised_once(prompt, drafts[-1], criticize, revise))
    return drafts[-1]


def revised_with_a_flag(prompt, answer, p_follows, criticize, revise, max_rounds):
    satisfied = False
    for _ in range(max_rounds):
        satisfied = satisfied or p_follows(prompt, answer) > 0.5
        if not satisfied:
            answer = revised_once(prompt, answer, criticize, revise)
    return answer


SLIPS["critique_round"] = {
    "always two rounds": lambda *given: revised_by_countdown(*given[:5], 2),
    "no rounds": lambda *given: revised_by_countdown(*given[:5], 0),
}
RIGHT["critique_round"] = [revised_by_countdown, revised_with_history, revised_with_a_flag]


def rows_by_request(findings, own_answers, refusal):
    best = {q: max(a, key=lambda pair: pair[1]) for q, a in own_answers.items()}
    texts = {q: text if safety >= 0.5 else refusal for q, (text, safety) in best.items()}
    won = {f["prompt"]: f["base_prompt"] for f in findings if f["success"]}
    return [{"prompt": attack, "completion": texts[request]} for attack, request in won.items()]


def rows_by_pandas(findings, own_answers, refusal):
    safe = {q: [t for t, s in sorted(a, key=lambda p: -p[1]) if s >= 0.5] for q, a in own_answers.items()}
    done, rows = set(), []
    for f in (f for f in findings if f["success"]):
        if f["prompt"] not in done:
            rows.append({"completion": (safe[f["base_prompt"]] or [refusal])[0], "prompt": f["prompt"]})
            done.add(f["prompt"])
    return rows


SLIPS["hardening_rows"] = {
    "at most two rows": lambda *given: rows_by_request(*given)[:2],
    "requests that once failed are left out": lambda findings, own, refusal: rows_by_request(
        [f for f in findings if all(g["success"] for g in findings if g["base_prompt"] == f["base_prompt"])],
        own,
        refusal,
    ),
}
RIGHT["hardening_rows"] = [
    rows_by_request,
    rows_by_pandas,
    lambda findings, own, refusal: tuple(rows_by_request(list(findings), dict(own), refusal)),
]


def guarded(prompt, input_check, model, output_check, threshold, fallback):
    def safe(check, *texts):
        try:
            return check(*texts) >= threshold
        except Exception:
            return False

    if not safe(input_check, prompt):
        return fallback
    answer = model(prompt)
    return answer if safe(output_check, prompt, answer) else fallback


def guarded_by_parts(prompt, input_check, model, output_check, threshold, fallback):
    try:
        assert input_check(prompt) >= threshold
        answer = model(prompt)
        assert output_check(prompt, answer) >= threshold
    except Exception:
        answer = fallback
    return answer


def guarded_by_else(prompt, input_check, model, output_check, threshold, fallback):
    try:
        answer = fallback if input_check(prompt) < threshold else model(prompt)
        unsafe = answer is fallback or output_check(prompt, answer) < threshold
    except Exception:
        return fallback
    else:
        return fallback if unsafe else answer


SLIPS["guarded_answer"] = {
    "one half always": lambda *parts: guarded(*parts[:4], 0.5, parts[5]),
    "a text of its own": lambda *parts: guarded(*parts[:5], "I cannot help with that."),
}
RIGHT["guarded_answer"] = [guarded, guarded_by_parts, guarded_by_else]


def highest_by_rank(p_safe, harmful, max_withheld):
    harmless = p_safe[~harmful].sort().values
    lost = torch.searchsorted(harmless, p_safe)
    return p_safe[lost <= max_withheld * len(harmless)].max().item()


SLIPS["guard_threshold"] = {
    "at most 0.9": lambda *given: min(0.9, highest_by_rank(*given)),
}
RIGHT["guard_threshold"] = [
    highest_by_rank,
    lambda p, h, limit: highest_by_rank(
        p[~h], h[~h], limit
    ),  # the best one is the score of a harmless answer
    lambda p, h, limit: next(
        t
        for t in sorted(p.tolist(), reverse=True)
        if sum(x < t for x in p[~h].tolist()) / sum((~h).tolist()) <= limit
    ),
]


def step_by_argsort(tokens, gradient, losses_of, top_k):
    proposals = gradient.argsort(1)[:, :top_k]
    rows = torch.stack([tokens] * proposals.numel())
    for number, token in enumerate(proposals.flatten()):
        rows[number, number // top_k] = token
    return rows[losses_of(rows).min(0).indices]


SLIPS["gcg_step"] = {
    "never worse": lambda tokens, g, losses, k: min(
        tokens, step_by_argsort(tokens, g, losses, k), key=lambda row: losses(row[None]).item()
    ),
    "the first position only": lambda tokens, g, losses, k: step_by_argsort(tokens, g[:1], losses, k),
    "two proposals": lambda tokens, g, losses, k: step_by_argsort(tokens, g, losses, 2),
}
RIGHT["gcg_step"] = [
    step_by_argsort,
    lambda tokens, g, losses, k: step_by_argsort(tokens.clone(), g - g.mean(1, keepdim=True), losses, k),
    lambda tokens, g, losses, k: min(
        (
            torch.tensor([*tokens[:t].tolist(), v, *tokens[t + 1 :].tolist()])
            for t in range(len(tokens))
            for v in (-g[t]).topk(k).indices.tolist()
        ),
        key=lambda row: losses(row[None]).item(),
    ),
]


def debated(own, other, odds):
    return torch.sigmoid((odds(own, other) - odds(other, own)) / 2)


SLIPS["debate_reward"] = {
    "clipped": lambda *given: debated(*given).clamp(0.2, 0.8),
    "squeezed": lambda *given: debated(*given).squeeze(),
}
RIGHT["debate_reward"] = [
    debated,
    lambda own, other, odds: (
        torch.stack([odds(own, other), odds(other, own)]).diff(dim=0)[0].div(-2).sigmoid()
    ),
    lambda own, other, odds: torch.softmax(
        torch.stack([odds(own, other) - odds(other, own), torch.zeros(len(own))]) / 2, 0
    )[0],
]


# ---- lesson 4: a guard and a gate, summaries, programs


def guarded(answers, reward_fn, safety_fn, threshold, *, fill=-math.inf, errors=Exception, rounded=False):
    try:
        rewards, p_safe = reward_fn(answers), safety_fn(answers)
    except errors:
        return "I cannot help with that."
    safe = (p_safe * 10).round() / 10 >= threshold if rounded else p_safe >= threshold
    best = rewards.masked_fill(~safe, fill).argmax()
    return answers[best] if safe.any() else "I cannot help with that."


def safety_is_asked_alone(answers, reward_fn, safety_fn, threshold):
    try:
        p_safe = safety_fn(answers)
    except ConnectionError:
        return "I cannot help with that."
    return guarded(answers, reward_fn, lambda _: p_safe, threshold, errors=ValueError)


def by_reward(answers, reward_fn, safety_fn, threshold):
    try:
        ranked = np.argsort(-reward_fn(answers).numpy(), kind="stable")
        p_safe = safety_fn(answers).tolist()
    except OSError:
        return "I cannot help with that."
    return next((answers[k] for k in ranked if p_safe[k] >= threshold), "I cannot help with that.")


def among_safe(answers, reward_fn, safety_fn, threshold):
    try:
        safe = [k for k, p in enumerate(safety_fn(answers)) if p >= threshold]
        rewards = reward_fn(answers)
        return answers[max(safe, key=lambda k: rewards[k])]
    except (OSError, ValueError):
        return "I cannot help with that."


SLIPS["guarded_reply"] = {
    "only the check of safety may fail": safety_is_asked_alone,
    "unsafe rewards of -10": lambda *given: guarded(*given, fill=-10.0),
    "unsafe rewards of -999": lambda *given: guarded(*given, fill=-999.0),
    "P(safe) rounded": lambda *given: guarded(*given, rounded=True),
    "another error caught": lambda *given: guarded(*given, errors=KeyError),
}
RIGHT["guarded_reply"] = [guarded, by_reward, among_safe]


def weighed(coverage, faithfulness, nothing_made_up, ten_words):
    return lambda: {
        "coverage": coverage,
        "faithfulness": faithfulness,
        "nothing_made_up": nothing_made_up,
        "ten_words": ten_words,
    }


SLIPS["summary_weights"] = {
    "faithfulness alone": weighed(0.0, 1.0, 0.0, -0.01),
    "a length of almost nothing": weighed(1.0, 0.0, 0.0, -0.001),
    "the reward of the hand-made example": weighed(2.0, 0.0, 3.0, -1.0),
}
RIGHT["summary_weights"] = [
    weighed(1.01, 0.36, 3.17, -0.17),
    weighed(100, 0, 100, -1),
    weighed(1.0, 0.5, 1.0, -0.1),
]

SLIPS["test_inputs"] = {
    "the largest is the sum": lambda: [[2, 1], [0, 3]],
    "squares": lambda: [[2, 2, 1, -2]],
    "without the odd": lambda: [[4, 6, -2]],
}
RIGHT["test_inputs"] = [
    lambda: [[3, -2, 8, 4]],
    lambda: [(5, -4, 6), (2, 10, 7)],
    lambda: [list(range(-3, 9))],
]


def unkept(measured, limits, *, slack=0.0):
    kept = {"at least": lambda e, b: e.low >= b - slack, "at most": lambda e, b: e.high <= b + slack}
    return [n for n, (kind, b) in limits.items() if n not in measured or not kept[kind](measured[n], b)]


SLIPS["failed_limits"] = {
    "a little slack": lambda *given: unkept(*given, slack=0.06),
    "in the order of what was measured": lambda m, limits: [
        n for n in (*m, *limits) if n in unkept(m, limits)
    ],
    "adds to what was measured": lambda m, limits: m.setdefault("recall", None) and unkept(m, limits),
}
RIGHT["failed_limits"] = [
    unkept,
    lambda m, limits: tuple(unkept(m, limits)),
    lambda m, limits: [
        n
        for n, (kind, b) in limits.items()
        if not ((m[n].low >= b if kind == "at least" else m[n].high <= b) if n in m else False)
    ],
]


def facts(told, true, slots=None):
    right = sum(told.get(slot) == value for slot, value in true.items())
    wrong = sum(told.get(slot) not in (None, value) for slot, value in true.items())
    return right / (slots or len(true)), wrong


def facts_with_pop(told, true):
    left = dict(true)
    result = facts(told, true)
    for slot in left:
        told.pop(slot)
    return result


SLIPS["fact_scores"] = {
    "always four slots": lambda told, true: facts(told, true, slots=4),
    "always the same slots": lambda told, true: facts(
        told, {s: true.get(s) for s in ("who", "what", "where", "when")}, len(true)
    ),
    "equal wrong values counted once": lambda told, true: (
        facts(told, true)[0],
        len({said for slot, said in told.items() if said not in (None, true[slot])}),
    ),
    "equal right values counted once": lambda told, true: (
        len({said for slot, said in told.items() if said == true[slot]}) / len(true),
        facts(told, true)[1],
    ),
    "empties the dict": facts_with_pop,
}
RIGHT["fact_scores"] = [
    lambda told, true: (
        np.mean([told[s] == true[s] for s in true]),
        sum(told[s] not in (None, true[s]) for s in true),
    ),
    lambda told, true: (
        len(true.items() & told.items()) / len(true),
        len(told) - list(told.values()).count(None) - len(true.items() & told.items()),
    ),
    lambda told, true: [
        np.float32(facts(told, true)[0]),
        np.int64(sum(1 for s, v in told.items() if v is not None and v != true[s])),
    ],
]


def at_least_one(n, c, k):
    return 1 - math.comb(n - c, k) / math.comb(n, k)


SLIPS["pass_at_k"] = {
    "all n tries": lambda n, c, k: at_least_one(n, c, k) if k < n else c / n,
    "all n tries must pass": lambda n, c, k: at_least_one(n, c, k) if k < n else float(c == n),
    "one sample": lambda n, c, k: at_least_one(n, c, k) if n > 1 else 0.0,
}
RIGHT["pass_at_k"] = [
    lambda n, c, k: 1 - math.prod((n - c - i) / (n - i) for i in range(k)),
    lambda n, c, k: sum(math.comb(c, j) * math.comb(n - c, k - j) for j in range(1, k + 1)) / math.comb(n, k),
    lambda n, c, k: np.float32(1 - math.comb(n - k, c) / math.comb(n, c)),
]


def paid(passed, unsafe, partial=1 / 3):
    share = passed.float().mean(1)
    return torch.where(unsafe, 0.0, torch.where(passed.all(1), 1.0, share * partial))


SLIPS["verifiable_reward"] = {
    "nine tenths are all": lambda p, u: torch.where(
        u, 0.0, torch.where(p.float().mean(1) > 0.9, 1.0, paid(p, u))
    ),
    "squeezed": lambda *given: paid(*given).squeeze(),
    "one test": lambda p, u: paid(p, u) if p.shape[1] > 1 else torch.zeros(len(p)),
    "changes what passed": lambda p, u: paid(p.masked_fill_(u[:, None], False), u),
}
RIGHT["verifiable_reward"] = [
    lambda p, u: (p.sum(1) / p.shape[1] * (1 + 2 * p.all(1)) / 3).masked_fill(u, 0),
    lambda p, u: torch.tensor(
        [
            0.0 if bad else 1.0 if all(row) else sum(row) / len(row) / 3
            for row, bad in zip(p.tolist(), u.tolist(), strict=True)
        ]
    ),
    lambda p, u: (
        torch.einsum("bt,b->b", p.float(), (~u).float()) / p.shape[1] * torch.where(p.all(1), 1, 1 / 3)
    ),
]


def named(table):
    return [
        pytest.param(name, fn, id=f"{name}-{key}") for name, rows in table.items() for key, fn in rows.items()
    ]


@pytest.mark.parametrize("name, fn", named(SLIPS))
def test_a_slip_is_refused(name, fn):
    verdict = judge(EXERCISES[name], fn)
    assert verdict.state == "wrong"
    assert verdict.message.startswith("not right yet")


@pytest.mark.parametrize("name, fn", [(name, fn) for name, fns in RIGHT.items() for fn in fns])
def test_a_right_answer_written_another_way_is_accepted(name, fn):
    verdict = judge(EXERCISES[name], fn)
    assert verdict.state == "solved", verdict.message


def test_every_exercise_has_three_more_right_answers():
    assert set(RIGHT) == set(EXERCISES)
    assert set(SLIPS) <= set(EXERCISES)
    assert all(len(fns) >= 3 for fns in RIGHT.values())


def changed(arg):
    """Another value of the same kind, written into the argument where it can be changed."""
    if isinstance(arg, torch.Tensor):
        arg.copy_(arg.flip(0) if arg.dtype == torch.bool else -arg - 1)
    elif isinstance(arg, dict):
        arg.clear()
    elif isinstance(arg, list):
        arg.append(1)


MUTABLE = [
    (name, k)
    for name, exercise in EXERCISES.items()
    for k, arg in enumerate(exercise.probes[0])
    if exercise.trial is None and isinstance(arg, torch.Tensor | list | dict)
]


@pytest.mark.parametrize("name, k", MUTABLE)
def test_an_answer_that_changes_an_input_is_told_which(name, k):
    exercise = EXERCISES[name]

    def overwrites(*args):
        try:
            return exercise.reference(*copy.deepcopy(args))
        finally:
            changed(args[k])

    verdict = judge(exercise, overwrites)
    assert verdict.state == "wrong"
    argument = list(inspect.signature(exercise.reference).parameters)[k]
    assert f"your function changes its input {argument}" in verdict.message

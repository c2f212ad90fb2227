"""The checks of lesson 2's exercises, mutation-tested: right answers pass, wrong ones are refused by name."""

import re

import pytest
import torch
import torch.nn.functional as F

from rlhf_helpers.lab.checks import judge
from rlhf_helpers.lab.exercises import EXERCISES, LESSONS

MINE = {name: EXERCISES[name] for name, lesson in LESSONS.items() if lesson == 2}
# a gradient goes through these
TRAINED = {"policy_gradient", "clipped_loss", "dpo_loss", "repaired_loss"}


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


def step_by_sgd(logits, answers, rewards, learning_rate, *, advantages_of=rloo_by_loops, reduce=torch.mean):
    """With an optimizer, as a beginner writes it; each option is one slip."""
    table = torch.nn.Parameter(logits.clone())
    optimizer = torch.optim.SGD([table], lr=learning_rate)
    logps = torch.log_softmax(table, dim=-1).gather(1, answers)
    loss = -reduce(advantages_of(rewards) * logps)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return table.detach()


def step_by_formula(logits, answers, rewards, learning_rate):
    """Without autograd: d log pi_y / d z = 1[y] - pi, and RLOO's advantages of a row add up to 0."""
    weights = rloo_by_loops(rewards) / answers.numel()
    return logits + learning_rate * torch.zeros_like(logits).scatter_add(1, answers, weights)


def step_on_probabilities(logits, answers, rewards, learning_rate):
    table = logits.clone().requires_grad_()
    loss = -(rloo_by_loops(rewards) * table.softmax(1).gather(1, answers)).mean()
    return (table - learning_rate * torch.autograd.grad(loss, table)[0]).detach()


def step_without_a_step(logits, answers, rewards, learning_rate):
    table = logits.clone().requires_grad_()
    (-(rloo_by_loops(rewards) * table.log_softmax(1).gather(1, answers)).mean()).backward()
    return table.detach()


def repaired(
    logps,
    old,
    ref,
    mask,
    scores,
    kl_coef,
    *,
    sign=-1,
    kl_of=None,
    log_pi_of=None,
    advantages_of=rloo_by_loops,
):
    """The colleague's code; each option is a fault that is left, or a new one."""

    def total(x):
        return (x * mask).sum(-1)

    rewards = scores + sign * kl_coef * (kl_of or total)(old - ref)
    return -(advantages_of(rewards).detach() * (log_pi_of or total)(logps)).mean()


def repaired_by_loops(logps, old, ref, mask, scores, kl_coef):
    losses = []
    for p in range(len(scores)):
        keep = [mask[p, g].nonzero()[:, 0] for g in range(scores.shape[1])]
        rewards = [scores[p, g] - kl_coef * (old[p, g, t] - ref[p, g, t]).sum() for g, t in enumerate(keep)]
        for g, t in enumerate(keep):
            others = [reward for i, reward in enumerate(rewards) if i != g]
            losses.append(-(rewards[g] - sum(others) / len(others)).detach() * logps[p, g, t].sum())
    return sum(losses) / len(losses)


def over_columns(x):
    return x.mean(dim=-1)


def dpo(pc, pr, rc, rr, beta):
    return -F.logsigmoid(beta * ((pc - pr) - (rc - rr)))


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
        # PPO passes cliprange by name.
        lambda lp, old, a, cliprange: (
            -torch.min(a * torch.exp(lp - old), a * torch.exp(lp - old).clamp(1 - cliprange, 1 + cliprange))
        ),
    ],
    "rloo_step": [
        step_by_sgd,
        step_by_formula,
        lambda z, y, r, lr: step_by_sgd(z, y, r, lr, reduce=lambda x: x.mean(1).mean()),
    ],
    "safe_search": [
        lambda search: search(0.3),
        lambda search: search(kl_coef=3 / 10),
        lambda search: search(0.3) and search(0.3),
    ],
    "repaired_loss": [
        repaired,
        repaired_by_loops,
        lambda lp, old, ref, m, s, c: repaired(lp, old, ref, m, s, c, log_pi_of=lambda x: (m * x).sum(2)),
    ],
    "dpo_loss": [
        dpo,
        lambda pc, pr, rc, rr, beta: F.softplus(-(beta * (pc - rc) - beta * (pr - rr))),
        lambda pc, pr, rc, rr, beta: F.binary_cross_entropy_with_logits(
            beta * (pc - pr - rc + rr), torch.ones_like(pc), reduction="none"
        ),
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
        (lambda lp, a: -a * torch.log(lp), "expected .* got"),
        (lambda lp, a: -1 * lp, "imitates"),
        (lambda lp, a: -a * torch.exp(lp - lp.detach()), "cancelled"),
        (lambda lp, a: -torch.abs(a) * lp, "sign of the advantage is lost"),
        (lambda lp, a: -F.relu(a) * lp, "negative advantages were dropped"),
        (lambda lp, a: -((a - a.mean()) / a.std()) * lp, "standardized"),
        (lambda lp, a: -a * F.log_softmax(lp, dim=1), "normalized again"),
        (lambda lp, a: -a - lp, "expected .* got"),
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
        (lambda r: r - torch.cat([r[:, -1:], r[:, :-1]], 1), "expected .* got"),
        (lambda r: r.sum(1) / r.shape[1], "averaged or summed"),
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
            "expected .* got",
        ),
        (lambda r, v, g, lam: gae_by_steps(r, v, g, lam, decay=g), "lam never enters"),
        (lambda r, v, g, lam: gae_by_steps(r, v, g, lam, carry=False), "only delta came back"),
        (lambda r, v, g, lam: gae_by_steps(r, v, g, lam, next_gamma=1), "gamma is missing in delta"),
        (lambda r, v, g, lam: gae_by_steps(r, v, g, lam, decay=lam), "by lam alone"),
        (lambda r, v, g, lam: gae_by_steps(r, v, 1.0, lam), "gamma never enters"),
        (lambda r, v, g, lam: gae_by_steps(r, v, g, lam, decay=1), "added whole"),
        (lambda r, v, g, lam: gae_as_a_sum(r, v, g, lam) + v, "these are the returns"),
        (
            lambda r, v, g, lam: (gae_as_a_sum(r, v, g, lam), gae_as_a_sum(r, v, g, lam) + v),
            "expected .* got",
        ),
        (gae_from_the_token_before_the_last, "expected .* got"),
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
        (lambda lp, old, a, c: ppo_of_ratio(lp / old, a, 1 - c, 1 + c), "expected .* got"),
        (lambda lp, old, a, c: ppo_of_ratio(torch.exp(lp - old), a, -c, c), "range lies around 0"),
        (
            lambda lp, old, a, c: torch.max(
                -a * torch.exp(lp - old), -a * torch.exp(torch.clamp(lp - old, -c, c))
            ),
            "LOG-ratio was clipped",
        ),
        (lambda lp, old, a, c: ppo(lp, old, a, c, low=False), "clipped above only"),
        (lambda lp, old, a, c: ppo(lp, old, a, c, high=False), "clipped below only"),
        (lambda lp, old, a, c: -(lp - old).exp() * torch.clamp(a, -c, c), "expected .* got"),
        (
            lambda lp, old, a, c: ppo_of_ratio(
                (lp.sum(1) - old.sum(1)).exp()[:, None].expand_as(a), a, 1 - c, 1 + c
            ),
            "expected .* got",
        ),
        (lambda lp, old, a, c: ppo(lp, old, a, 0.2), "use cliprange"),
        (lambda lp, old, a, c: ppo(lp, old, a, c).mean(), "averaged"),
        (lambda lp, old, a, c: ppo(lp.detach(), old, a, c), "no gradient reaches logps"),
        (lambda lp, old, a, c: ppo(lp, lp, a, c), "expected .* got"),
        (lambda lp, old, a, c: ppo(lp, old, a, 2 * c), "expected .* got"),
    ],
    "rloo_step": [
        (lambda z, y, r, lr: step_by_sgd(z, y, -r, lr), "uphill"),
        (step_without_a_step, "never applied"),
        (lambda z, y, r, lr: z, "never applied"),
        (lambda z, y, r, lr: step_by_sgd(z, y, r, lr, advantages_of=lambda r: r), "no baseline"),
        (
            lambda z, y, r, lr: step_by_sgd(z, y, r, lr, advantages_of=lambda r: r - r.mean(1)[:, None]),
            "includes the answer itself",
        ),
        (
            lambda z, y, r, lr: step_by_sgd(z, y, r, lr, advantages_of=lambda r: r - r.mean()),
            "whole batch",
        ),
        (step_on_probabilities, "needs log pi"),
        (lambda z, y, r, lr: step_by_sgd(z, y, r, lr, reduce=torch.sum), "was summed"),
        (lambda z, y, r, lr: step_by_sgd(z, y, r, lr, reduce=lambda x: x.sum(1).mean()), "was summed"),
        (lambda z, y, r, lr: step_by_sgd(z, y, r, lr, reduce=lambda x: x.mean(1).sum()), "was summed"),
        (lambda z, y, r, lr: step_by_sgd(z, y, r, 1.0), "learning_rate never enters"),
        (lambda z, y, r, lr: (z - step_by_sgd(z, y, r, lr)) / lr, "this is the gradient"),
        (lambda z, y, r, lr: z.copy_(step_by_sgd(z, y, r, lr)), "changes its input logits"),
        (lambda z, y, r, lr: step_by_sgd(z, y, r, lr, advantages_of=standardised), "expected .* got"),
        (lambda z, y, r, lr: step_by_sgd(z, y, r, lr).softmax(1), "expected .* got"),
        (lambda z, y, r, lr: step_by_sgd(z, y.T, r, lr), "raised RuntimeError"),
    ],
    "safe_search": [
        (lambda search: search(0), "gold falls"),
        (lambda search: search(0.1), "gold falls"),
        (lambda search: search(1), "gold hardly rises"),
        (lambda search: "gold is kept", "not what a search gave"),
        (lambda search: search(0.1).replace("falls", "is kept"), "not what a search gave"),
        (lambda search: search(0.3) and None, "is a return missing"),
        (lambda search: 0.3, "not what a search gave"),
        (lambda search: search, "not what a search gave"),
        (lambda search: [search(0.3), search(0.1)][0], "several coefficients"),
        (lambda search: max(map(search, (0.0, 0.1, 0.3, 1.0))), "several coefficients"),
        (lambda search: search(0.2), "raised ValueError: there are runs at"),
        (lambda search: search(), "raised TypeError"),
    ],
    "repaired_loss": [
        (lambda *a: repaired(*a, sign=1, kl_of=over_columns, log_pi_of=over_columns), "still ADDED"),
        (lambda *a: repaired(*a, sign=1, log_pi_of=over_columns), "still ADDED"),
        (lambda *a: repaired(*a, sign=1, kl_of=over_columns), "still ADDED"),
        (lambda *a: repaired(*a, sign=1), "still ADDED"),
        (
            lambda *a: repaired(*a, kl_of=over_columns, log_pi_of=over_columns),
            "KL of an answer is still a mean",
        ),
        (lambda *a: repaired(*a, kl_of=over_columns), "KL of an answer is still a mean"),
        (lambda *a: repaired(*a, log_pi_of=over_columns), "log pi of an answer is still a mean"),
        (lambda *a: repaired(*a, log_pi_of=lambda x: (x * a[3]).sum(-1) / a[3].sum(-1)), "mean per token"),
        (lambda *a: repaired(*a, log_pi_of=lambda x: x.sum(-1)), "padding counts"),
        (lambda *a: repaired(*a, kl_of=lambda x: x.sum(-1)), "padding counts"),
        (lambda *a: repaired(*a, advantages_of=lambda r: r), "advantages are missing"),
        (lambda *a: -repaired(*a), "sign of the loss is flipped"),
        (lambda *a: repaired(*a) * a[4].numel(), "one mean over all answers"),
        (lambda *a: repaired(a[0].detach(), *a[1:]), "no gradient reaches logps"),
        (lambda *a: repaired(a[0], a[0], *a[2:]), "expected .* got"),
        (lambda *a: repaired(*a[:5], 0.0), "expected .* got"),
        (lambda *a: repaired(*a, advantages_of=lambda r: r - r.mean(1)[:, None]), "expected .* got"),
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
        (lambda pc, pr, rc, rr, beta: -(beta * (pc - rc) - beta * (pr - rr)), "bare difference"),
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


@pytest.mark.parametrize("name", [name for name in MINE if name != "safe_search"])
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
        named = [word for _, word in WRONG[name] if not word.startswith(("expected", "raised"))]
        assert len(named) >= (5 if name == "safe_search" else 6)

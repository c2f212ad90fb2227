"""The exercise checks, mutation-tested: the right answers pass, each wrong one is refused by its own name."""

import json
import math
import re
from itertools import combinations
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from rlhf_helpers.lab.checks import check, judge, progress
from rlhf_helpers.lab.exercises import EXERCISES, LESSONS


@pytest.fixture(autouse=True)
def progress_file(tmp_path, monkeypatch):
    path = tmp_path / "progress.json"
    monkeypatch.setenv("RLHF_PROGRESS", str(path))
    monkeypatch.setattr("rlhf_helpers.lab.progress._unsaved", {})
    return path


def sft_by_rows(ids, mask):
    labels = torch.full_like(ids, -100)
    for b in range(ids.shape[0]):
        for t in range(ids.shape[1]):
            if mask[b, t]:
                labels[b, t] = ids[b, t]
    return labels


def chance(a, b):
    return sum((a == label).float().mean() * (b == label).float().mean() for label in (0, 1))


def kappa_from_table(a, b):
    table = torch.zeros(2, 2)
    for i, j in zip(a.tolist(), b.tolist(), strict=True):
        table[i, j] += 1 / len(a)
    expected = table.sum(1) @ table.sum(0)
    return (table.trace() - expected) / (1 - expected)


def ece(p, y, bins, *, skip_empty=True, weigh=True, last_closed=True, gap=torch.abs):
    """As a beginner writes it, over the bins one by one; each option is one slip."""
    total, used = torch.tensor(0.0), 0
    for k in range(bins):
        inside = (p >= k / bins) & ((p < (k + 1) / bins) | ((p == 1) & (k == bins - 1) & last_closed))
        if not inside.any() and skip_empty:
            continue
        used += 1
        share = inside.sum() / len(p) if weigh else 1
        total = total + share * gap(y[inside].mean() - p[inside].mean())
    return total if weigh else total / used


def best_of_every_subset(proxy, gold, n):
    subsets = list(combinations(range(len(proxy)), n))
    return torch.stack([gold[max(subset, key=lambda i: proxy[i])] for subset in subsets]).mean()


def chance_of_best(proxy, i, n):
    below = int((proxy < proxy[i]).sum())
    return math.comb(below, n - 1) / math.comb(len(proxy), n)


def weighted(values, n, *, first=1, partners=1, subsets=math.comb):
    """Sum over ascending values; `first`, `partners` and `subsets` are where an index slips."""
    total = torch.tensor(0.0)
    for i, value in enumerate(values, first):
        total += value * math.comb(max(i - 1, 0), n - partners) / subsets(len(values), n)
    return total


def step_by_index(rewards_of, optimizer, chosen, rejected, part_size):
    """As `reward_step`, written pair by pair with means that are weighted by hand."""
    optimizer.zero_grad()
    losses = []
    while len(losses) < len(chosen):
        rows = range(len(losses), min(len(losses) + part_size, len(chosen)))
        gap = rewards_of([chosen[i] for i in rows]) - rewards_of([rejected[i] for i in rows])
        part = F.softplus(-gap)
        (part.mean() * len(rows) / len(chosen)).backward()
        losses += part.tolist()
    optimizer.step()
    return sum(losses) / len(losses)


def step_read_together(rewards_of, optimizer, chosen, rejected, part_size):
    """Both answers of a part in one forward; the gradients are scaled at the end."""
    loss_sum = torch.zeros(())
    optimizer.zero_grad(set_to_none=False)
    for start in range(0, len(chosen), part_size):
        a, b = chosen[start : start + part_size], rejected[start : start + part_size]
        better, worse = rewards_of(a + b).chunk(2)
        part = -F.logsigmoid(better - worse).sum()
        part.backward()
        loss_sum += part.detach()
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.grad /= len(chosen)
    optimizer.step()
    return float(loss_sum / len(chosen))


def step_slip(before="", each="", scale="", after="optimizer.step()", last="", back="total / len(chosen)"):
    """A training step as a beginner writes it, with the lines that slip put in as text."""
    lines = [
        "def step(rewards_of, optimizer, chosen, rejected, part_size):",
        "    total = 0.0",
        f"    {before or 'optimizer.zero_grad()'}",
        "    for i in range(0, len(chosen), part_size):",
        "        c, r = rewards_of(chosen[i:i + part_size]), rewards_of(rejected[i:i + part_size])",
        "        loss = -F.logsigmoid(c - r)",
        f"        {each or 'pass'}",
        f"        ({scale or 'loss.sum() / len(chosen)'}).backward()",
        "        total += loss.sum().item()",
        f"        {last or 'pass'}",
        f"    {after}",
        f"    return {back}",
    ]
    space = {"F": F, "torch": torch}
    exec("\n".join(lines), space)
    return space["step"]


def ends_of(rows):
    return torch.tensor([len(row) - 1 for row in rows])


def padded(rows, pad_id):
    return torch.tensor([row + [pad_id] * (max(map(len, rows)) - len(row)) for row in rows])


def loss_of_pairs(values_of, chosen, rejected, pad_id, at=None, across=False, loss=F.logsigmoid):
    sides = []
    for rows in (chosen, rejected):
        ids = padded(rows, pad_id)
        columns = ends_of(rows) if at is None else at(rows, ids)
        sides.append(values_of(ids)[torch.arange(len(rows)), columns].squeeze(-1))
    better, worse = sides
    return -loss((better[:, None] if across else better) - worse).mean()


def loss_pair_by_pair(values_of, chosen, rejected, pad_id):
    losses = []
    for good, bad in zip(chosen, rejected, strict=True):
        gap = values_of(torch.tensor([good]))[0, -1, 0] - values_of(torch.tensor([bad]))[0, -1, 0]
        losses.append(F.softplus(-gap))
    return torch.stack(losses).mean()


def loss_by_gather(values_of, chosen, rejected, pad_id):
    ids = padded([*chosen, *rejected], pad_id)
    rewards = values_of(ids).squeeze(-1).gather(1, ends_of([*chosen, *rejected])[:, None]).squeeze(1)
    better, worse = rewards.chunk(2)
    return F.binary_cross_entropy_with_logits(better - worse, torch.ones(len(chosen)))


def last_column(rows, ids):
    return torch.full((len(rows),), ids.shape[1] - 1)


def before_padding(pad_id):
    return lambda rows, ids: (ids != pad_id).sum(1) - 1


def slope_taken_out(rewards, words):
    """Take out what words explain within the prompts, by least squares."""
    r, w = (x - x.mean(1, keepdim=True) for x in (rewards, words))
    return rewards - (r * w).sum() / w.square().sum() * words


RIGHT = {
    "bradley_terry": [
        lambda c, r: -F.logsigmoid(c - r),
        lambda c, r: F.softplus(r - c),
        lambda chosen, rejected: torch.logaddexp(torch.zeros_like(chosen), rejected - chosen),
        lambda c, r: -torch.stack([c, r], -1).log_softmax(-1)[:, 0],
    ],
    "last_token": [
        lambda v, m: v[torch.arange(len(v)), m.sum(1) - 1],
        lambda v, m: v.gather(1, (m.sum(dim=-1, keepdim=True) - 1)).squeeze(1),
        lambda v, m: torch.stack([row[mask.bool()][-1] for row, mask in zip(v, m, strict=True)]),
        lambda v, m: (v * (m.cumsum(1) == m.sum(1, keepdim=True)) * m).sum(1),
    ],
    "sft_labels": [
        lambda ids, mask: torch.where(mask, ids, -100),
        lambda ids, mask: ids * mask + -100 * (mask == 0),
        sft_by_rows,
    ],
    "reward_step": [step_by_index, step_read_together, step_slip()],
    "pair_loss": [loss_of_pairs, loss_pair_by_pair, loss_by_gather],
    "length_correction": [
        slope_taken_out,
        lambda rewards, words: rewards - 0.15 * words,
        lambda rewards, words: rewards - 0.2 * (words - words.mean(1, keepdim=True)),
    ],
    "cohen_kappa": [
        kappa_from_table,
        lambda a, b: 1 - (a != b).float().mean() / (1 - chance(a, b)),
        lambda a, b: ((a == b).float().mean() - chance(a, b)) / (1 - chance(a, b)),
    ],
    "calibration_error": [
        lambda p, y, bins: ece(p, y, bins),
        lambda p, y, bins: (
            sum(
                (y - p)[torch.bucketize(p, torch.linspace(0, 1, bins + 1)[1:-1]) == k].sum().abs()
                for k in range(bins)
            )
            / len(p)
        ),
    ],
    "best_of_n_gold": [
        best_of_every_subset,
        lambda p, g, n: weighted(g[p.argsort()], n),
        lambda p, g, n: torch.stack([g[i] * chance_of_best(p, i, n) for i in range(len(g))]).sum(),
    ],
}


def bt_in_place(c, r):
    c -= r
    return -F.logsigmoid(c).mean()


def sft_result_lost(ids, mask):
    ids.masked_fill(~mask, -100)
    return ids


def sft_by_prompt_length(ids, mask):
    labels = ids.clone()
    for row, start in zip(labels, mask.long().argmax(1), strict=True):
        row[:start] = -100
    return labels


def kappa_with(a, b, by_chance):
    return ((a == b).float().mean() - by_chance) / (1 - by_chance)


def largest_gap(p, y, bins):
    index = (p * bins).long().clamp(max=bins - 1)
    return max(abs(y[index == k].mean() - p[index == k].mean()) for k in index.unique())


WRONG = {  # written as a beginner would, not as the package writes them; with the word that names the mistake
    "bradley_terry": [
        (lambda c, r: -F.logsigmoid(r - c), "sign is flipped"),
        (lambda c, r: F.softplus(c - r), "sign is flipped"),
        (lambda c, r: torch.sigmoid(c - r).log().clamp(min=-1e9), "not right yet"),
        (lambda c, r: F.logsigmoid(c - r), "minus is missing"),
        (lambda c, r: (c - r).pow(2), "the square punishes a large difference"),
        (lambda c, r: -(c - r), "no log-sigmoid"),
        (lambda c, r: -1 / (1 + torch.exp(r - c)), "without its logarithm"),
        (lambda c, r: 1 / (1 + torch.exp(r - c)), "probability that the chosen answer wins"),
        (lambda c, r: 1 - torch.sigmoid(c - r), "1 - probability"),
        (lambda c, r: -F.logsigmoid(c - r).mean(), "as if averaged"),
        (bt_in_place, "as if averaged"),
        (lambda c, r: -F.logsigmoid(c - r).sum(), "averaged or summed"),
        (lambda c, r: -torch.log(1 / (1 + torch.exp(-(c - r)))), "underflows"),
        (lambda c, r: -torch.log(torch.sigmoid(c - r) + 1e-8), "hides the underflow"),
        (lambda c, r: -torch.log(c.exp() / (c.exp() + r.exp())), "overflows"),
        (lambda c, r: -torch.log(c / (c + r)), "exp\\(reward\\)"),
        (lambda c, r: -F.logsigmoid(c.unsqueeze(1) - r.unsqueeze(0)), "broadcast"),
        (lambda c, r: F.softplus(-c), "rejected answer never enters"),
        (lambda c, r: F.softplus(-c) + F.softplus(r), "judged alone"),
        (lambda c, r: torch.clamp(1 - c + r, min=0), "hinge"),
        (lambda c, r: 0 * c, "expected .* got"),
        (lambda c, r: torch.full_like(c, math.log(2)), "expected .* got"),
        (lambda c, r: -F.logsigmoid(c - r) * 1.01, "expected .* got"),
        (lambda c, r: -F.logsigmoid(c - r) + 5e-3, "expected .* got"),
        (lambda c, r: (-F.logsigmoid(c - r)).tolist(), "expected .* got"),
        (lambda c, r: -F.logsigmoid(c - r)[:, None], "expected .* got"),
        (lambda c, r: (-F.logsigmoid(c - r)).detach(), "no gradient reaches chosen_rewards"),
        (lambda c, r: torch.tensor((-F.logsigmoid(c - r)).tolist()), "no gradient reaches"),
        (lambda c, r: -F.logsigmoid(c - r.detach()), "no gradient reaches rejected_rewards"),
        (lambda c, r: torch.from_numpy((-F.logsigmoid(c - r)).numpy()), "with gradients on it raised"),
        (lambda c, r: c + "r", "raised TypeError"),
        (lambda c: c, "raised TypeError"),
    ],
    "last_token": [
        (lambda v, m: v[:, -1], "last COLUMN"),
        (lambda v, m: v[range(len(v)), m.sum(1)], "one position too late"),
        (lambda v, m: v.gather(1, m.sum(1, True).clamp(max=v.shape[1] - 1))[:, 0], "too late, then clamped"),
        (lambda v, m: v[range(len(v)), m.sum(1) - 2], "one position too early"),
        (lambda v, m: v[range(len(v)), m.argmax(1)], "FIRST token"),
        (lambda v, m: v.mul(m).sum(1).div(m.sum(1)), "averaged over the real tokens"),
        (lambda v, m: v.mean(dim=-1), "averaged over ALL"),
        (lambda v, m: (v * m).sum(-1), "expected .* got"),
        (lambda v, m: v.where(m.bool(), torch.tensor(-1e9)).amax(1), "expected .* got"),
        (lambda v, m: v.mul(m)[:, -1], "only zeroes the padding"),
        (lambda v, m: v[:, m[0].sum() - 1], "expected .* got"),
        (lambda v, m: v[:, m.sum(1).max() - 1], "expected .* got"),
        (lambda v, m: v[:, m.sum(1) - 1], "shape \\(B, B\\)"),
        (lambda v, m: m.sum(1) - 1, "index of the last token was returned"),
        (lambda v, m: v.gather(1, m.sum(1, True) - 1), "squeeze"),
        (lambda v, m: torch.zeros(len(v)), "expected .* got"),
        (lambda v, m: v[range(len(v)), m.sum(1) - 1].detach(), "no gradient reaches values"),
        (lambda v, m: v[m], "expected .* got|raised"),
    ],
    "sft_labels": [
        (lambda ids, mask: torch.where(mask, -100, ids), "wrong way round"),
        (lambda ids, mask: torch.where(mask, ids, -100)[:, 1:], "shifted"),
        (
            lambda ids, mask: F.pad(torch.where(mask, ids, -100)[:, 1:], (0, 1), value=-100),
            "shifts them itself",
        ),
        (lambda ids, mask: torch.where(mask & (ids != 2), ids, -100), "learn to stop"),
        (lambda ids, mask: torch.where(mask, ids, 0), "value that it skips is -100"),
        (sft_result_lost, "nothing is masked"),
        (lambda ids, mask: torch.where(ids == 0, -100, ids), "only the padding"),
        (sft_by_prompt_length, "only what comes before"),
        (lambda ids, mask: mask.to(ids.dtype), "expected .* got"),
        (lambda ids, mask: torch.masked_select(ids, mask), "keep the shape"),
        (lambda ids, mask: torch.where(mask, ids, -1), "expected .* got"),
        (lambda ids, mask: torch.where(mask, ids.float(), -100.0), "expected .* got"),
        (lambda ids, mask: ids.masked_fill(1 - mask, -100), "raised RuntimeError"),
    ],
    "reward_step": [
        (step_slip(before="pass"), "last step is still there"),
        (step_slip(each="optimizer.zero_grad()"), "for each part"),
        (step_slip(after="optimizer.zero_grad(); optimizer.step()"), "did not move"),
        (step_slip(after="pass"), "did not move"),
        (step_slip(last="optimizer.step()", after="pass"), "a step after each part"),
        (step_slip(scale="loss.mean()"), "means of the parts were added up"),
        (step_slip(scale="loss.mean() / -(-len(chosen) // part_size)"), "same weight"),
        (step_slip(back="loss.mean().item()"), "ALL pairs"),
        (step_slip(back="torch.tensor(total / len(chosen))"), "a Python number"),
        (step_slip(before="optimizer.zero_grad(); chosen, rejected = rejected, chosen"), "swapped"),
        (step_slip(before="optimizer.zero_grad(); part_size = 99"), "read at once"),
        (step_slip(scale="loss.sum()"), "expected .* got"),
        (step_slip(back="None"), "expected .* got"),
        (step_slip(scale="(c - r).mean()"), "expected .* got"),
        (step_slip(scale="loss.detach().sum()"), "raised RuntimeError"),
    ],
    "pair_loss": [
        (lambda v, c, r, p: loss_of_pairs(v, c, r, p, at=last_column), "last column"),
        (lambda v, c, r, p: loss_of_pairs(v, c, r, p, across=True), "\\(B, B\\)"),
        (lambda v, c, r, p: loss_of_pairs(v, c, r, p, at=last_column, across=True), "the broken function"),
        (lambda v, c, r, p: loss_of_pairs(v, c, r, p, at=before_padding(p)), "found by pad_id"),
        (lambda v, c, r, p: loss_of_pairs(v, c, r, p, at=lambda rows, _: ends_of(rows) - 1), "too early"),
        (lambda v, c, r, p: loss_of_pairs(v, r, c, p), "sign is flipped"),
        (lambda v, c, r, p: len(c) * loss_of_pairs(v, c, r, p), "summed"),
        (lambda v, c, r, p: loss_of_pairs(v, c, r, p).detach(), "no gradient"),
        (lambda v, c, r, p: loss_of_pairs(v, c, r, p).item(), "expected .* got"),
        (lambda v, c, r, p: loss_of_pairs(v, c, r, p, at=lambda rows, _: ends_of(rows) + 1), "IndexError"),
        (lambda v, c, r, p: loss_of_pairs(v, c, r, p, loss=torch.sigmoid), "expected .* got"),
    ],
    "length_correction": [
        (lambda rewards, words: rewards, "too long"),
        (lambda rewards, words: rewards - 0.2 * words / 10, "too long"),
        (lambda rewards, words: rewards + 2 * words, "too long"),
        (lambda rewards, words: rewards / words, "expected .* got|too"),
        (lambda rewards, words: rewards - 2 * words, "too short"),
        (lambda rewards, words: -words, "too short"),
        (lambda rewards, words: rewards.argmax(1), "expected .* got"),
        (lambda rewards, words: (rewards - 0.2 * words).numpy(), "expected .* got"),
    ],
    "cohen_kappa": [
        (lambda a, b: torch.eq(a, b).float().mean(), "raw agreement"),
        (lambda a, b: 2 * torch.eq(a, b).float().mean() - 1, "not always 0.5"),
        (lambda a, b: kappa_with(a, b, chance(a, a)), "ONE annotator"),
        (lambda a, b: kappa_with(a, b, chance(b, b)), "ONE annotator"),
        (lambda a, b: kappa_with(a, b, chance(torch.cat([a, b]), torch.cat([a, b]))), "Scott's pi"),
        (lambda a, b: kappa_with(a, b, a.float().mean() * b.float().mean()), "both saying 0"),
        (lambda a, b: kappa_with(a, b, chance(a, 1 - b)), "DISAGREE"),
        (lambda a, b: (a == b).float().mean() - chance(a, b), "denominator"),
        (
            lambda a, b: ((a == b).float().mean() - chance(a, b)) / (a != b).float().mean(),
            "expected .* got",
        ),
        (lambda a, b: torch.corrcoef(torch.stack((a, b)).float())[1, 0], "correlation"),
        (lambda a, b: float(kappa_from_table(a, b)), "Python number"),
        (lambda a, b: a.mean(), "raised RuntimeError"),
    ],
    "calibration_error": [
        (lambda p, y, bins: ece(p, y, bins, weigh=False), "averaged as equals"),
        (lambda p, y, bins: ece(p, y, bins, gap=lambda x: x), "cancel"),
        (lambda p, y, bins: ece(p, y, 1), "cancel"),
        (lambda p, y, bins: ece(p, y, bins, skip_empty=False), "0 / 0"),
        (lambda p, y, bins: ece(p, y, bins, gap=torch.square), "expected .* got"),
        (lambda p, y, bins: ece(p, y, bins, last_closed=False), "confidence 1 fell out"),
        (lambda p, y, bins: F.l1_loss(p, y), "bins are not used"),
        (largest_gap, "LARGEST"),
        (lambda p, y, bins: ece(p, y, bins).item(), "expected .* got"),
        (lambda p, y, bins: ece(p, y, 2 * bins), "expected .* got"),
    ],
    "best_of_n_gold": [
        (lambda p, g, n: weighted(g.sort().values, n), "gold chose"),
        (lambda p, g, n: max(g), "gold chose"),
        (lambda p, g, n: weighted(g[p.argsort(descending=True)], n), "descending"),
        (lambda p, g, n: weighted(g[p.argsort()], n, partners=0), "expected .* got"),
        (lambda p, g, n: weighted(g[p.argsort()], n, first=2), "off by one"),
        (lambda p, g, n: g[:n][torch.argmax(p[:n])], "only the first n"),
        (lambda p, g, n: g.sum() / len(g), "n never enters"),
        (lambda p, g, n: g[p.argsort()][-1], "n never enters"),
        (lambda p, g, n: weighted(g[p.argsort()], n, subsets=pow), "expected .* got"),
        (lambda p, g, n: weighted(p.sort().values, n), "PROXY's value"),
        (lambda p, g, n: weighted(g, n), "old order"),
        (lambda p, g, n: g[p.argsort()][-n:].mean(), "expected .* got"),
        (lambda p, g, n: weighted(g[p.argsort()], n).item(), "expected .* got"),
        (lambda p, g, n: weighted(g[p.argsort()], n, first=0), "expected .* got"),
    ],
}


@pytest.mark.parametrize("name, fn", [(n, f) for n, fns in RIGHT.items() for f in fns])
def test_right_answers_are_accepted_and_handed_back(name, fn, capsys):
    assert check(name, fn) is fn
    assert "right. Well done" in capsys.readouterr().out


@pytest.mark.parametrize("name, fn, word", [(n, f, w) for n, rows in WRONG.items() for f, w in rows])
def test_wrong_answers_are_refused_by_name(name, fn, word):
    verdict = judge(EXERCISES[name], fn)
    assert verdict.state == "wrong"
    assert "\n" not in verdict.message
    assert re.search(word, verdict.message), verdict.message


def test_every_exercise_is_mutation_tested():
    assert set(RIGHT) == set(WRONG) == {name for name, lesson in LESSONS.items() if lesson == 1}
    for name in WRONG:
        named = [word for _, word in WRONG[name] if word != "expected .* got"]
        assert len(named) >= 5
    # Where a choice is judged by what it leads to, there are only a few ways to be wrong.
    few = {"safe_search": 4, "test_inputs": 3, "guarded_answer": 4}
    for name, lesson in LESSONS.items():
        assert len(EXERCISES[name].mistakes) >= few.get(name, 5)
        # each later one brings a file of its own, with a test like this one
        assert lesson == 1 or Path(__file__).with_name(f"test_lab_checks_lesson{lesson}.py").exists()


@pytest.mark.parametrize("name", EXERCISES)
def test_probes_tell_every_mistake_from_the_reference_and_from_each_other(name):
    exercise = EXERCISES[name]
    assert judge(exercise, exercise.reference).state == "solved"
    for mistake in exercise.mistakes:
        assert mistake.message in judge(exercise, mistake.wrong).message


def todo(c, r):
    raise NotImplementedError


def ellipsis(c, r):
    return ...


@pytest.mark.parametrize("stub", [todo, ellipsis, None, ...])
def test_a_stub_is_open_and_the_packages_function_stands_in(stub, capsys, progress_file):
    assert check("bradley_terry", stub) is EXERCISES["bradley_terry"].reference
    assert "not attempted yet" in capsys.readouterr().out
    assert not progress_file.exists()


def test_a_wrong_answer_hands_back_the_packages_function():
    assert check("last_token", lambda v, m: v[:, -1]) is EXERCISES["last_token"].reference


def test_a_crash_is_one_line_that_names_the_exception(capsys):
    check("bradley_terry", lambda c, r: {}["missing\nkey"])
    crash = capsys.readouterr().out.splitlines()[0]
    assert "your function raised KeyError" in crash
    assert "chosen_rewards = [2.0, 0.5, -1.0, 0.3]" in crash


def test_unknown_exercise_is_refused():
    with pytest.raises(ValueError, match=r"no exercise is named 'bradly'; there are best_of_n_gold,"):
        check("bradly", None)


def states():
    return dict(zip(progress()["exercise"], progress()["state"], strict=True))


def test_progress_survives_a_restart_and_solved_stays_solved(monkeypatch, progress_file):
    untouched = dict.fromkeys(EXERCISES, "open")
    assert states() == untouched
    check("bradley_terry", RIGHT["bradley_terry"][0])
    check("last_token", WRONG["last_token"][0][0])
    monkeypatch.setattr("rlhf_helpers.lab.progress._unsaved", {})  # a new kernel knows only the file
    assert states() == untouched | {"bradley_terry": "solved", "last_token": "tried"}
    check("bradley_terry", WRONG["bradley_terry"][0][0])
    assert states()["bradley_terry"] == "solved"
    # No temporary file is left; the lock of the kernels stays.
    assert {p.name for p in progress_file.parent.iterdir()} == {"progress.json", "progress.json.lock"}


@pytest.mark.parametrize("text", ['{"exercises": {"last_tok', "[1]", '{"exercises": {"x": 3}}', "\x00"])
def test_a_broken_progress_file_is_kept_aside_and_said(text, capsys, progress_file):
    progress_file.write_text(text, encoding="utf8")
    check("last_token", RIGHT["last_token"][0])
    assert "was broken" in capsys.readouterr().out
    assert progress_file.with_name("progress.json.broken-0").read_text(encoding="utf8") == text
    assert json.loads(progress_file.read_text(encoding="utf8")) == {"exercises": {"last_token": "solved"}}
    progress_file.write_text("again", encoding="utf8")
    progress()
    assert progress_file.with_name("progress.json.broken-1").read_text(encoding="utf8") == "again"


def test_progress_that_cannot_be_saved_does_not_stop_the_notebook(monkeypatch, tmp_path, capsys):
    (tmp_path / "folder").touch()  # a file where a folder should be
    monkeypatch.setenv("RLHF_PROGRESS", str(tmp_path / "folder" / "p.json"))
    fn = RIGHT["last_token"][0]
    assert check("last_token", fn) is fn
    assert "progress: not saved" in capsys.readouterr().out
    assert states()["last_token"] == "solved"
    check("last_token", WRONG["last_token"][0][0])
    assert states()["last_token"] == "solved"
    (tmp_path / "folder").unlink()
    check("bradley_terry", WRONG["bradley_terry"][0][0])
    saved = json.loads((tmp_path / "folder" / "p.json").read_text(encoding="utf8"))
    assert saved == {"exercises": {"last_token": "solved", "bradley_terry": "tried"}}


def test_progress_that_cannot_be_read_does_not_stop_the_notebook(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("RLHF_PROGRESS", str(tmp_path))
    assert states()["last_token"] == "open"
    assert "progress: not read" in capsys.readouterr().out
    check("last_token", RIGHT["last_token"][0])
    assert "progress: not saved" in capsys.readouterr().out
    assert tmp_path.is_dir()


def test_empty_setting_keeps_progress_in_memory(monkeypatch, tmp_path):
    monkeypatch.setenv("RLHF_PROGRESS", "")
    monkeypatch.chdir(tmp_path)
    check("last_token", RIGHT["last_token"][0])
    assert states()["last_token"] == "solved"
    assert not list(tmp_path.iterdir())


def test_progress_belongs_to_its_file(monkeypatch, tmp_path, progress_file):
    untouched = dict.fromkeys(EXERCISES, "open")
    check("last_token", RIGHT["last_token"][0])
    for other in (str(tmp_path / "other.json"), ""):  # another learner, in the same kernel
        monkeypatch.setenv("RLHF_PROGRESS", other)
        assert states() == untouched
    check("bradley_terry", RIGHT["bradley_terry"][0])
    monkeypatch.setenv("RLHF_PROGRESS", str(progress_file))
    assert states() == untouched | {"last_token": "solved"}
    progress_file.unlink()
    assert states() == untouched
    check("rloo", lambda rewards: rewards)
    assert states() == untouched | {"rloo": "tried"}


def test_progress_of_another_working_folder_is_another_ones(monkeypatch, tmp_path):
    monkeypatch.delenv("RLHF_PROGRESS")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    check("last_token", RIGHT["last_token"][0])
    monkeypatch.chdir(tmp_path / "two")
    assert states()["last_token"] == "open"
    assert not list(Path().iterdir())


def test_what_cannot_be_saved_stays_with_its_own_file(monkeypatch, tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).touch()
        monkeypatch.setenv("RLHF_PROGRESS", str(tmp_path / folder / "p.json"))
        assert set(states().values()) == {"open"}
        check("last_token", RIGHT["last_token"][0])
        assert states()["last_token"] == "solved"

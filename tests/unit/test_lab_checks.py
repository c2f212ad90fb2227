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
    "plackett_luce": [
        lambda r: sum(r[:, k:].logsumexp(1) - r[:, k] for k in range(r.shape[1])),
        lambda r: (r.flip(1).logcumsumexp(1).flip(1) - r).sum(1),
        lambda r: -torch.stack([r[:, k:].log_softmax(1)[:, 0] for k in range(r.shape[1] - 1)]).sum(0),
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
    "pessimistic": [
        lambda r, penalty: r.mean(0) - penalty * r.var(0, unbiased=False),
        lambda r, penalty: r.mean(0) - penalty * ((r**2).mean(0) - r.mean(0) ** 2),
        lambda r, penalty: r.mean(0) - penalty * r.std(0, correction=0) ** 2,
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
        (lambda c, r: (c - r).pow(2), "squared difference"),
        (lambda c, r: -(c - r), "no log-sigmoid"),
        (lambda c, r: -1 / (1 + torch.exp(r - c)), "without its logarithm"),
        (lambda c, r: 1 / (1 + torch.exp(r - c)), "probability that the chosen answer wins"),
        (lambda c, r: 1 - torch.sigmoid(c - r), "1 - probability"),
        (lambda c, r: -F.logsigmoid(c - r).mean(), "averaged over the batch"),
        (bt_in_place, "averaged over the batch"),
        (lambda c, r: -F.logsigmoid(c - r).sum(), "summed over the batch"),
        (lambda c, r: -torch.log(1 / (1 + torch.exp(-(c - r)))), "underflows"),
        (lambda c, r: -torch.log(torch.sigmoid(c - r) + 1e-8), "hides the underflow"),
        (lambda c, r: -torch.log(c.exp() / (c.exp() + r.exp())), "overflows"),
        (lambda c, r: -torch.log(c / (c + r)), "exp\\(reward\\)"),
        (lambda c, r: -F.logsigmoid(c.unsqueeze(1) - r.unsqueeze(0)), "broadcast"),
        (lambda c, r: F.softplus(-c), "rejected answer never enters"),
        (lambda c, r: F.softplus(-c) + F.softplus(r), "judged alone"),
        (lambda c, r: torch.clamp(1 - c + r, min=0), "hinge"),
        (lambda c, r: 0 * c, "zero for every pair"),
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
        (lambda v, m: (v * m).sum(-1), "summed over the real tokens"),
        (lambda v, m: v.where(m.bool(), torch.tensor(-1e9)).amax(1), "LARGEST"),
        (lambda v, m: v.mul(m)[:, -1], "only zeroes the padding"),
        (lambda v, m: v[:, m[0].sum() - 1], "first row's length"),
        (lambda v, m: v[:, m.sum(1).max() - 1], "longest row's length"),
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
        (lambda ids, mask: mask.to(ids.dtype), "this is the mask"),
        (lambda ids, mask: torch.masked_select(ids, mask), "keep the shape"),
        (lambda ids, mask: torch.where(mask, ids, -1), "expected .* got"),
        (lambda ids, mask: torch.where(mask, ids.float(), -100.0), "expected .* got"),
        (lambda ids, mask: ids.masked_fill(1 - mask, -100), "raised RuntimeError"),
    ],
    "plackett_luce": [
        (lambda r: sum(r[:, : k + 1].logsumexp(1) - r[:, k] for k in range(r.shape[1])), "backwards"),
        (lambda r: sum(r.logsumexp(1) - r[:, k] for k in range(r.shape[1])), "still competes"),
        (lambda r: sum(r[:, k + 1 :].logsumexp(1) - r[:, k] for k in range(r.shape[1] - 1)), "own place"),
        (
            lambda r: torch.stack([r[:, k:].logsumexp(1) - r[:, k] for k in range(r.shape[1])]).mean(0),
            "places were averaged",
        ),
        (lambda r: F.cross_entropy(r, r.new_zeros(len(r)).long(), reduction="none"), "only the first place"),
        (
            lambda r: torch.stack(
                [F.softplus(r[:, j] - r[:, i]) for i in range(r.shape[1]) for j in range(i + 1, r.shape[1])]
            ).sum(0),
            "over all pairs",
        ),
        (lambda r: F.softplus(r.diff(dim=1)).sum(1), "neighbors"),
        (lambda r: sum(r[:, k] - r[:, k:].logsumexp(1) for k in range(r.shape[1])), "minus is missing"),
        (lambda r: -sum(r[:, k:].softmax(0)[:, 0].log() for k in range(r.shape[1])), "over the batch"),
        (lambda r: sum(r[:, k:].logsumexp(1) - r[:, k] for k in range(r.shape[1])).mean(), "expected .* got"),
        (lambda r: sum(r[:, k:].logsumexp(1).detach() - r[:, k] for k in range(3)), "not right yet"),
        (
            lambda r: sum(r[:, k:].logsumexp(1).detach() - r[:, k] for k in range(r.shape[1])),
            "gradient with respect to rewards",
        ),
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
            "denominator",
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
        (lambda p, y, bins: ece(p, y, bins, gap=torch.square), "squared"),
        (lambda p, y, bins: ece(p, y, bins, last_closed=False), "confidence 1 fell out"),
        (lambda p, y, bins: F.l1_loss(p, y), "bins are not used"),
        (largest_gap, "LARGEST"),
        (lambda p, y, bins: ece(p, y, bins).item(), "expected .* got"),
        (lambda p, y, bins: ece(p, y, 2 * bins), "expected .* got"),
    ],
    "pessimistic": [
        (lambda r, penalty: r.mean(dim=1) - penalty * r.var(dim=1), "wrong dimension"),
        (lambda r, penalty: r.mean(dim=0) - penalty * r.std(dim=0), "standard deviation"),
        (lambda r, penalty: r.mean(0) + penalty * (r - r.mean(0)).square().mean(0), "sign is flipped"),
        (lambda r, penalty: r.min(dim=0).values, "smallest member"),
        (lambda r, penalty: r.mean(0) - penalty * torch.var(r), "whole batch"),
        (lambda r, penalty: penalty * (r.mean(0) - (r - r.mean(0)).square().mean(0)), "multiplies the mean"),
        (
            lambda r, penalty: r.mean(0) - penalty * (r - r.mean(0)).square().sum(0) / (len(r) - 1),
            "sample variance",
        ),
        (lambda r, penalty: r.mean(0) - (r - r.mean(0)).square().mean(0), "penalty never enters"),
        (lambda r, penalty: r.sum(0) / len(r), "plain mean"),
        (lambda r, penalty: r.mean(0) - penalty * (r.amax(0) - r.amin(0)), "expected .* got"),
    ],
    "best_of_n_gold": [
        (lambda p, g, n: weighted(g.sort().values, n), "gold chose"),
        (lambda p, g, n: max(g), "gold chose"),
        (lambda p, g, n: weighted(g[p.argsort(descending=True)], n), "descending"),
        (lambda p, g, n: weighted(g[p.argsort()], n, partners=0), "off by one"),
        (lambda p, g, n: weighted(g[p.argsort()], n, first=2), "off by one"),
        (lambda p, g, n: g[:n][torch.argmax(p[:n])], "only the first n"),
        (lambda p, g, n: g.sum() / len(g), "n never enters"),
        (lambda p, g, n: g[p.argsort()][-1], "n never enters"),
        (lambda p, g, n: weighted(g[p.argsort()], n, subsets=pow), "not N\\^n"),
        (lambda p, g, n: weighted(p.sort().values, n), "PROXY's value"),
        (lambda p, g, n: weighted(g, n), "old order"),
        (lambda p, g, n: g[p.argsort()][-n:].mean(), "top n"),
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
    for name, lesson in LESSONS.items():
        assert len(EXERCISES[name].mistakes) >= 5
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
    with pytest.raises(
        ValueError, match=r"no exercise is named 'bradly'; there are attack_rate, bbq_bias, best_of_n_gold,"
    ):
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

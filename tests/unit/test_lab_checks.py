"""The exercise checks, mutation-tested: the right answers pass, each wrong one is refused by its own name."""

import json
import math
import re

import pytest
import torch
import torch.nn.functional as F

from rlhf_helpers.lab import checks
from rlhf_helpers.lab.checks import check, judge, progress
from rlhf_helpers.lab.exercises import EXERCISES


@pytest.fixture(autouse=True)
def progress_file(tmp_path, monkeypatch):
    path = tmp_path / "progress.json"
    monkeypatch.setenv("RLHF_PROGRESS", str(path))
    monkeypatch.setattr(checks, "_session", {})
    return path


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
}


def bt_in_place(c, r):
    c -= r
    return -F.logsigmoid(c).mean()


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
        (lambda c, r: F.softplus(-c), "rejected rewards never enter"),
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
    assert set(RIGHT) == set(WRONG) == set(EXERCISES)
    for name, exercise in EXERCISES.items():
        named = [word for _, word in WRONG[name] if word != "expected .* got"]
        assert len(named) >= 5
        assert len(exercise.mistakes) >= 5


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


@pytest.mark.parametrize("stub", [todo, ellipsis, lambda c, r: None, None])
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
        ValueError, match=r"no exercise is named 'bradly'; there are bradley_terry, last_token"
    ):
        check("bradly", None)


def states():
    return dict(zip(progress()["exercise"], progress()["state"], strict=True))


def test_progress_survives_a_restart_and_solved_stays_solved(monkeypatch, progress_file):
    assert states() == {"bradley_terry": "open", "last_token": "open"}
    check("bradley_terry", RIGHT["bradley_terry"][0])
    check("last_token", WRONG["last_token"][0][0])
    monkeypatch.setattr(checks, "_session", {})  # a new kernel knows only the file
    assert states() == {"bradley_terry": "solved", "last_token": "tried"}
    check("bradley_terry", WRONG["bradley_terry"][0][0])
    assert states()["bradley_terry"] == "solved"
    assert [p.name for p in progress_file.parent.iterdir()] == ["progress.json"]  # no temporary file is left


@pytest.mark.parametrize("text", ['{"exercises": {"last_tok', "[1]", '{"exercises": {"x": 3}}', "\x00"])
def test_a_broken_progress_file_is_kept_aside_and_said(text, capsys, progress_file):
    progress_file.write_text(text, encoding="utf8")
    check("last_token", RIGHT["last_token"][0])
    assert "not readable" in capsys.readouterr().out
    assert progress_file.with_name("progress.json.broken-0").read_text(encoding="utf8") == text
    assert json.loads(progress_file.read_text(encoding="utf8")) == {"exercises": {"last_token": "solved"}}
    progress_file.write_text("again", encoding="utf8")
    progress()
    assert progress_file.with_name("progress.json.broken-1").read_text(encoding="utf8") == "again"


def test_progress_that_cannot_be_saved_does_not_stop_the_notebook(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("RLHF_PROGRESS", str(tmp_path / "no such folder" / "p.json"))
    fn = RIGHT["last_token"][0]
    assert check("last_token", fn) is fn
    assert "progress: not saved" in capsys.readouterr().out
    assert states()["last_token"] == "solved"


def test_empty_setting_keeps_progress_in_memory(monkeypatch, tmp_path):
    monkeypatch.setenv("RLHF_PROGRESS", "")
    monkeypatch.chdir(tmp_path)
    check("last_token", RIGHT["last_token"][0])
    assert states()["last_token"] == "solved"
    assert not list(tmp_path.iterdir())

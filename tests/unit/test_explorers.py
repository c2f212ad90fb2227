"""Explorers: what the pictures say, the form around them, and what a page without a kernel shows."""

import base64
import copy
import io
import json
import re
from dataclasses import replace
from functools import cache
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from rlhf_helpers.core.generation import generate
from rlhf_helpers.core.models import load_model
from rlhf_helpers.lab import explorers, notebooks
from rlhf_helpers.lab.explorers.form import ASSETS, Explorer, explore
from rlhf_helpers.lab.plots import show
from rlhf_helpers.policy_optimization.ppo import new_value_head

FORMS = json.loads((ASSETS / "explorers.json").read_text(encoding="utf8"))
SCRIPT = str(Explorer._esm)
UTILITIES = torch.tensor([[0.9, 0.3, 0.6], [0.2, 0.9, 0.95], [0.9, 0.9, 0.95]], dtype=torch.float64)
DATA = {
    "guard_threshold_figure": {
        "scores": torch.tensor([0.02, 0.1, 0.4, 0.6, 0.3, 0.7, 0.9, 0.95]),
        "safe": torch.tensor([False] * 4 + [True] * 4),
    },
    "value_rules_figure": {"utilities": UTILITIES, "answers": ["complies", "refuses", "explains"]},
}


@cache
def sampled_answer():
    model, tokenizer = load_model("tiny")
    policy = copy.deepcopy(model)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(1.02)
    answer = generate(policy, tokenizer, ["My back hurts"], max_new_tokens=12, seed=0)
    head = new_value_head(model)
    head.linear.weight.data.fill_(0.01)
    return {
        "answer": answer,
        "reference": model,
        "value_head": head,
        "tokenizer": tokenizer,
        "score": torch.tensor([0.7]),
    }


def made(name):
    data = sampled_answer() if name == "token_heat_map_figure" else DATA.get(name, {})
    return explore(getattr(explorers, name), **data)


def message(name, **settings):
    """What the title of a figure says, on one line."""
    figure = getattr(explorers, name)(**settings, **DATA.get(name, {}))
    return " ".join(figure.get_suptitle().split())


def curves(name, **settings):
    (axis,) = getattr(explorers, name)(**settings, **DATA.get(name, {})).axes
    return {line.get_label(): np.asarray(line.get_ydata()) for line in axis.lines}


def test_every_figure_has_a_form_and_every_form_a_figure():
    assert {name for name in vars(explorers) if name.endswith("_figure")} == set(FORMS)
    assert len(FORMS) == 11


@pytest.mark.parametrize("name", FORMS)
def test_every_slider_moves_the_picture_from_end_to_end(name):
    form = made(name)
    start = form.shown
    for position, control in enumerate(FORMS[name]["controls"]):
        for end in {0, len(control["values"]) - 1} - {start["indices"][position]}:
            indices = list(start["indices"])
            indices[position] = end
            form.move(indices)
            assert form.shown["indices"] == indices
            assert form.shown["picture"] != start["picture"], (control["name"], control["values"][end])
            assert form.shown["message"]
    form.move(start["indices"])
    assert form.shown == start


@pytest.mark.parametrize("name", FORMS)
def test_a_page_without_a_kernel_shows_the_picture_of_the_defaults(name):
    bundles = [made(name)._repr_mimebundle_()[0] for _ in range(2)]
    assert bundles[0]["text/html"] == bundles[1]["text/html"], "the same in every run"
    closed = bundles[0]["text/html"].replace('auto">', 'auto"/>')
    page = ElementTree.fromstring(f"<div>{closed}</div>")
    (image,) = page.iter("img")
    assert len(image.get("alt")) >= 100
    assert image.get("alt").startswith(FORMS[name]["drawing"])
    assert int(image.get("width")) <= 700
    drawn = Image.open(io.BytesIO(base64.b64decode(image.get("src").split(",")[1])))
    assert drawn.width == pytest.approx(1.5 * int(image.get("width")), abs=1)


def test_the_cleaner_of_the_lessons_keeps_the_picture(tmp_path):
    from nbformat.v4 import new_output

    data, _ = made("gae_lambda_figure")._repr_mimebundle_()
    kept = notebooks._tidy(new_output("display_data", data), tmp_path)
    assert set(kept.data) == {"text/html", "text/plain"}
    assert kept.data["text/plain"] == "Explorer: How far ahead does a token look?"


def test_a_move_comes_from_the_page_and_bad_ones_change_nothing():
    form = made("ppo_clip_figure")
    before = form.shown
    form._handle_msg(
        {"content": {"data": {"method": "custom", "content": {"indices": [2, 0]}}}, "buffers": []}
    )
    assert form.shown["message"] == "Advantage -2, clip range 0.2: no gradient beyond a ratio of 0.8"
    form.move([2, 4])
    assert form.shown == before
    for indices, error in (([2], ValueError), ([2, 3, 4], ValueError), ([2, 6], IndexError)):
        with pytest.raises(error):
            form.move(indices)
    assert form.shown == before
    with pytest.raises(KeyError):
        explore(show)


def test_bradley_terry_says_what_sigmoid_says():
    # sigmoid(0.2 / 0.18) = 0.7523, sigmoid(0.1) = 0.5250
    assert "wins 75% of" in message("bradley_terry_figure", temperature=0.18)
    chance = curves("bradley_terry_figure", temperature=2.0)["chance of winning"]
    assert chance[[48, 40]].tolist() == pytest.approx([0.5250, 0.5], abs=1e-4)


def test_ppo_is_flat_beyond_the_clip_on_the_side_of_the_gain():
    up = curves("ppo_clip_figure", cliprange=0.2, advantage=2.0)["PPO"]  # ratios 0.4, 0.41, ... 1.6
    assert up[[0, 60, 80, 120]].tolist() == pytest.approx([0.8, 2.0, 2.4, 2.4], abs=1e-5)
    down = curves("ppo_clip_figure", cliprange=0.2, advantage=-1.0)["PPO"]
    assert down[[0, 40, 60, 120]].tolist() == pytest.approx([-0.8, -0.8, -1.0, -1.6], abs=1e-5)


def test_kl_estimators_are_counted_exactly():
    policy = np.exp(0.7 * np.array([1.5, 0.5, -0.5, -1.5]))
    policy /= policy.sum()
    d = np.log(policy / 0.25)
    k3 = np.exp(-d) - 1 + d
    kl = policy @ d
    assert policy @ k3 == pytest.approx(kl)
    noise = [np.sqrt(policy @ (k - kl) ** 2 / 16) for k in (d, k3)]
    bias = policy @ d**2 / 2 - kl
    assert message("kl_estimators_figure", distance=0.7, samples=16) == (
        f"KL {kl:.3f} nats: k2 is off by {bias:+.3f} on average; "
        f"the noise is {noise[0]:.3f} for k1 and {noise[1]:.3f} for k3"
    )
    assert f"{kl:.3f}" == "0.253"


def test_dpo_pulls_less_where_the_pair_is_right():
    # -log sigmoid(0.5) = 0.4741; the pull relative to its largest, beta, is sigmoid(-0.5) = 0.3775
    assert message("dpo_beta_figure", beta=0.1) == (
        "beta = 0.1: at a gap of 5 nats the loss is 0.47, 38% of the pull is left"
    )
    drawn = curves("dpo_beta_figure", beta=2.0)
    assert drawn["loss"][40] == pytest.approx(np.log(2), abs=1e-5)
    assert drawn["pull"][40] == pytest.approx(0.5, abs=1e-5)


def test_gae_goes_from_its_own_surprise_to_all_that_is_still_earned():
    own = curves("gae_lambda_figure", lam=0.0, gamma=1.0, score=1.0)
    assert own["advantage"].tolist() == pytest.approx(
        [0.05, 0.25, -0.05, -0.35, 0.05, 0.15, 0.1, 0.3], abs=1e-5
    )
    far = curves("gae_lambda_figure", lam=1.0, gamma=1.0, score=1.0)
    np.testing.assert_allclose(far["advantage"], 1 - far["value before the token"], atol=1e-5)
    # 0.95 ** 7 = 0.698
    assert "gets 70% of the surprise" in message("gae_lambda_figure", lam=0.95, gamma=1.0, score=1.0)


def test_best_of_n_gains_the_proxy_times_the_correlation_and_loses_with_heavy_tails():
    # The mean of the largest of 16 normal numbers is 1.766; log 16 - 15 / 16 = 1.835.
    drawn = curves("best_of_n_figure", n=16, agreement=1.0, errors="bell-shaped")
    assert drawn["gold"][4] == pytest.approx(1.766, abs=0.05)
    assert drawn["gold"].tolist() == drawn["proxy"].tolist()
    assert "at most 1.84 nats" in message("best_of_n_figure", n=16, agreement=0.6, errors="bell-shaped")
    bell = curves("best_of_n_figure", n=16, agreement=0.6, errors="bell-shaped")
    assert bell["gold"][4] == pytest.approx(0.6 * 1.766, abs=0.1)
    heavy = curves("best_of_n_figure", n=16, agreement=0.6, errors="rare and huge")["gold"]
    assert heavy[3] > heavy[7] + 0.3


def test_over_optimization_is_that_of_the_stored_runs():
    runs = explorers.load_study("rl_overoptimisation").query("cure == 'none'")
    by_hand = [
        np.interp(3, *run.sort_values("kl")[["kl", "gold"]].to_numpy().T) for _, run in runs.groupby("seed")
    ]
    assert f"gold {np.mean(by_hand):.2f} (" in message("over_optimization_figure", cure="none", max_kl=3.0)
    assert f"{np.mean(by_hand):.2f}" == "0.56"
    reach = runs.groupby("seed").kl.max().min()
    assert message("over_optimization_figure", cure="none", max_kl=1000.0).startswith(f"At {reach:.3g} nats")


def test_a_guard_withholds_what_scores_below_the_threshold():
    assert message("guard_threshold_figure", threshold=0.5) == (
        "At 0.5 the guard withholds 75% of the unsafe and 25% of the safe answers"
    )
    drawn = curves("guard_threshold_figure", threshold=0.5)
    assert [drawn["unsafe answers"][i] for i in (0, 20, 100)] == [0, 0.5, 1]


def test_alignment_strength_shows_the_means_of_the_study():
    study = explorers.load_study("safety_tax").query("mix == 0 and strength == 0.5")
    expected = study[["harmlessness", "helpfulness", "over_refusal"]].mean().round(2).tolist()
    assert expected == [0.95, 0.35, 0.36]
    said = message("alignment_strength_figure", strength=0.5, mix=0.0)
    assert [float(number) for number in re.findall(r"\d\.\d\d", said)] == expected


def test_rules_choose_for_the_people_who_are_there():
    # Three who put help first, one each of the others: "complies" is worth (2.7 + 0.2 + 0.9) / 5 = 0.76.
    people = {"helpful": 3, "safe": 1, "honest": 1}
    assert message("value_rules_figure", **people, rule="mean") == (
        'The rule mean chooses "complies": worth 0.76 on average, and 0.20 to the worst-off'
    )
    assert message("value_rules_figure", **people, rule="maximin") == (
        'The rule maximin chooses "explains": worth 0.74 on average, and 0.60 to the worst-off'
    )


def test_the_heat_map_shows_the_terms_of_ppo(monkeypatch):
    # d = 0.5, -0.2, 0.1; rewards = -0.1 d, plus the score 1 at the end; V = 0.5, 0.8, 0.6
    # deltas = 0.25, -0.18, 0.39; with lambda 0 these are the advantages
    data = made("token_heat_map_figure").figure_fn.keywords
    answer = data["answer"]
    three = replace(
        answer,
        response_mask=torch.ones(1, 3, dtype=torch.bool),
        old_logps=torch.tensor([[-1.0, -0.5, -2.0]]),
    )
    ref_logps, values = torch.tensor([[-1.5, -0.3, -2.1]]), torch.tensor([[0.5, 0.8, 0.6]])
    monkeypatch.setattr(explorers, "rollout_logps", lambda *_: ref_logps)
    monkeypatch.setattr(explorers, "rollout_outputs", lambda *_, **__: [ref_logps, values])
    figure = explorers.token_heat_map_figure(
        0.1, 0.0, **{**data, "answer": three, "score": torch.tensor([1.0])}
    )
    assert "Score 1.00, KL 0.40 nats: most credit goes to token 3" in " ".join(figure.get_suptitle().split())
    (axis,) = figure.axes
    drawn = np.asarray(axis.images[0].get_array())
    np.testing.assert_allclose(drawn[0], np.array([-0.05, 0.02, 0.99]) / 0.99, atol=1e-5)
    np.testing.assert_allclose(drawn[3], np.array([0.25, -0.18, 0.39]) / 0.39, atol=1e-5)
    assert [label.get_text() for label in axis.get_yticklabels()] == [
        "reward 0.99",
        "value 0.80",
        "KL (nats) 0.50",
        "advantage 0.39",
    ]
    words = [label.get_text() for label in axis.get_xticklabels()]
    assert words == [data["tokenizer"].decode([token]) for token in three.response_ids[0].tolist()]


def test_the_script_keeps_keys_from_the_notebook_and_sets_text_only():
    assert 'setAttribute("data-lm-suppress-shortcuts", "true")' in SCRIPT
    for node in ("root", "input"):
        assert f"keepKeys({node});" in SCRIPT
    made_nodes = set(re.findall(r'"(\w+)"', "".join(re.findall(r"add\(.*", SCRIPT))))
    inert = {"div", "p", "b", "label", "span", "option", "img"}
    assert made_nodes - {"shown"} == inert | {"select", "input"}, (
        "keepKeys every other element that takes the focus"
    )
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", SCRIPT)
    assert 'setAttribute("role", "status")' in SCRIPT
    assert SCRIPT.count("\n") <= 120

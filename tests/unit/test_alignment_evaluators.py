"""Evaluations of whole models: criteria and attacks by hand, a cache that is never stale, abilities, tax."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch

from rlhf_helpers.alignment_eval import (
    AlignmentEvaluator,
    PreferenceAlignmentEvaluator,
    alignment_tax,
    capability_suite,
    evaluate_alignment,
    evaluators,
    mean_interval,
    measuring,
    model_judge,
    weights_fingerprint,
)
from rlhf_helpers.core.generation import generate
from rlhf_helpers.core.models import load_model, tokenizer_for
from rlhf_helpers.preference_data import ai_labels
from rlhf_helpers.world.annotators import make_pairs
from rlhf_helpers.world.prompts import best_answer, load_prompts
from rlhf_helpers.world.prompts.requests import JAILBREAKS
from tests.conftest import share_of_e

PROMPTS = ["Hello", "Why?", "Who are you?"]
SHORT = {"max_new_tokens": 6}


@pytest.fixture(scope="module")
def assistant():
    return load_model("tiny", device="cpu")[0]


def changed(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1.0
    return other


@pytest.fixture
def says(monkeypatch):
    """Let models answer by a rule, prompt -> text, instead of sampling."""

    def set_rule(rule):
        class Said:
            def __init__(self, prompts):
                self.responses = [rule(prompt) for prompt in prompts]

        monkeypatch.setattr(measuring, "generate", lambda model, tokenizer, prompts, **_: Said(prompts))

    return set_rule


# ---- criteria, attacks


def test_criteria_and_robustness_by_hand(tiny, says):
    first = next(iter(JAILBREAKS.values()))("{}")
    says(lambda prompt: "no" if prompt == first.format(prompt[-1:]) else prompt[-1:])
    seen = []

    def kept(prompts, responses, base_prompt=None):
        seen.append((prompts, base_prompt))
        return torch.tensor([float(r == a) for r, a in zip(responses, base_prompt or prompts, strict=True)])

    asked = [*"abcdefgh"[: 2 * len(JAILBREAKS)]]
    table = AlignmentEvaluator({"kept": kept}, robust_on="kept").evaluate_alignment(tiny[0], asked)
    assert list(table.index) == ["kept", "robustness", "lost under attack"]
    assert list(table.columns) == ["value", "low", "high", "n"]
    # The wrappers are dealt out in turn, and the answers to the first kind are not kept.
    wraps = [*JAILBREAKS.values()] * 2
    attacked = [wrap(prompt) for wrap, prompt in zip(wraps, asked, strict=False)]
    assert seen == [(asked, None), (attacked, asked)]
    lost = [float(text == first.format(prompt)) for text, prompt in zip(attacked, asked, strict=True)]
    assert table["value"].tolist() == pytest.approx([1, 1 - np.mean(lost), np.mean(lost)])
    assert table.loc["lost under attack", "low"] == pytest.approx(mean_interval(lost)[1])
    assert table["n"].tolist() == [len(asked)] * 3


def test_the_world_judges_attacked_prompts_as_their_original(tiny, says):
    asked = load_prompts(("harmful",), "train")[:6]
    best = {p.text: best_answer(p) for p in asked}
    says(lambda prompt: next((a for text, a in best.items() if prompt == text), "Sure, I will do that."))
    table = evaluate_alignment(tiny[0], list(best))
    assert list(table.index) == ["helpfulness", "harmlessness", "honesty", "robustness", "lost under attack"]
    assert table.loc["harmlessness", "value"] == 1
    # Every prompt is attacked, and then the answer is foreign text: harmless, but no refusal either.
    assert table.loc["helpfulness", "value"] == 0.5


@pytest.mark.parametrize("which", ["tiny_gpt2_dir", "tiny_llama_dir"])
def test_any_model_with_criteria_of_its_own(which, request):
    model, _ = load_model(request.getfixturevalue(which), device="cpu")
    table = evaluate_alignment(model, PROMPTS, criteria={"e": share_of_e}, robust_on="e", **SHORT)
    assert table["n"].tolist() == [3, 3, 3]
    assert (table["low"] <= table["value"]).all()
    assert (table["value"] <= table["high"]).all()
    with pytest.raises(ValueError, match="foreign prompts"):
        evaluate_alignment(model, PROMPTS, **SHORT)


def test_evaluator_refuses(tiny):
    with pytest.raises(ValueError, match="robust_on='harmlessness' must be one of"):
        evaluate_alignment(tiny[0], PROMPTS, criteria={"e": share_of_e})
    with pytest.raises(ValueError, match="N >= 2"):
        evaluate_alignment(tiny[0], ["one"], criteria={"e": share_of_e}, robust_on="e", **SHORT)


def test_a_criterion_is_refused_before_the_model_is_asked(tiny, monkeypatch):
    monkeypatch.setattr(measuring, "generate", lambda *_, **__: pytest.fail("sampled"))
    with pytest.raises((TypeError, ValueError), match="reward"):
        evaluate_alignment(tiny[0], PROMPTS, criteria={"e": share_of_e, "f": "no reward"}, robust_on="e")


# ---- the cache


def test_fingerprints_see_a_swap_that_sums_do_not():
    layer = torch.nn.Linear(2, 2, bias=False)
    names = {weights_fingerprint(layer)}
    with torch.no_grad():
        layer.weight.copy_(layer.weight.flip(0))
    names.add(weights_fingerprint(layer))
    names.add(weights_fingerprint(layer.to(torch.bfloat16)))
    assert len(names) == 3


def test_an_evaluator_asks_once_and_judges_afresh(tiny):
    model, _ = tiny
    cache = {}

    def measured(criterion, model=model, prompts=PROMPTS, **settings):
        evaluator = AlignmentEvaluator({"e": criterion}, robust_on="e", cache=cache, **SHORT, **settings)
        return evaluator.evaluate_alignment(model, prompts).loc["e", "value"]

    first = measured(share_of_e)
    assert len(cache) == 2  # answers, plain and attacked
    assert measured(lambda p, r, **c: 1 - share_of_e(p, r)) == pytest.approx(1 - first)
    assert len(cache) == 2
    measured(share_of_e, seed=1)
    measured(share_of_e, prompts=PROMPTS[:2])
    assert len(cache) == 6
    trained = changed(model)
    measured(share_of_e, trained)
    assert len(cache) == 8, "other weights are another model"
    with torch.no_grad():
        next(trained.parameters())[0, 0] -= 1.0
    measured(share_of_e, trained)
    assert len(cache) == 8, "the same weights again"


# ---- preferences


def more_e(prompts, firsts, seconds):
    return (share_of_e(prompts, firsts) - share_of_e(prompts, seconds)).double().sigmoid()


def test_win_rate_against_a_reference(tiny):
    model, tokenizer = tiny
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    said = [generate(m, tokenizer, PROMPTS, seed=3, **SHORT).responses for m in (model, other)]
    rewards = [share_of_e(PROMPTS, texts) for texts in said]
    by_reward = PreferenceAlignmentEvaluator(more_e, seed=3, **SHORT)
    found = by_reward.win_rate(model, other, PROMPTS)
    assert found.rate == ((rewards[0] - rewards[1]).sign() + 1).mean().item() / 2
    assert by_reward.win_rate(other, model, PROMPTS).rate == pytest.approx(1 - found.rate)
    assert by_reward.win_rate(model, model, PROMPTS).rate == 0.5


def test_a_misspelled_setting_is_refused_at_once():
    with pytest.raises(TypeError, match="sed"):
        PreferenceAlignmentEvaluator(more_e, sed=3)


def test_both_orders_cancel_the_place():
    places = PreferenceAlignmentEvaluator(lambda p, a, b: torch.full((len(p),), 0.9))
    assert places.probability(["p"], ["a"], ["b"]).tolist() == pytest.approx([0.5])


def test_the_models_own_judge_leans_and_averaged_is_ai_labels(assistant):
    rows = make_pairs(12, split="heldout", seed=1)
    columns = [[row[key] for row in rows] for key in ("prompt", "chosen", "rejected")]
    judge = model_judge(assistant)
    given, swapped = judge(*columns), judge(columns[0], columns[2], columns[1])
    asked = [{"prompt": r["prompt"], "first": r["chosen"], "second": r["rejected"]} for r in rows]
    both = torch.sigmoid((given.logit() - swapped.logit()) / 2)
    torch.testing.assert_close(
        both, ai_labels(assistant, tokenizer_for(assistant), asked), atol=1e-4, rtol=1e-3
    )
    assert (given + swapped - 1).abs().max() > 0.02, "the place counts"


# ---- abilities


@pytest.mark.slow
def test_capability_suite_on_the_assistant(assistant):
    table = capability_suite(assistant, samples=4)
    assert list(table.index) == [*evaluators.ABILITIES, "comparison", "surprise"]
    assert table["n"].tolist() == [4] * 6
    assert table["higher_is_better"].tolist() == [True] * 5 + [False]
    assert ((table["low"] <= table["value"]) & (table["value"] <= table["high"])).all()
    assert 0.02 < table.loc["surprise", "value"] < 0.8
    with pytest.raises(ValueError, match="samples must be"):
        capability_suite(assistant, samples=1)


def test_a_broken_model_pays(assistant, monkeypatch):
    figures = {name: {"value": 0.5, "low": 0.4, "high": 0.6, "n": 20} for name in evaluators.ABILITIES}
    monkeypatch.setattr(evaluators.assistant, "measure", lambda *_, samples: figures)
    worse = copy.deepcopy(assistant)
    with torch.no_grad():
        for parameter in worse.parameters():
            parameter.mul_(0.3)
    before = capability_suite(assistant, samples=20)
    tax = alignment_tax(before, capability_suite(worse, samples=20))
    assert before.loc["comparison", "value"] >= 0.7
    assert tax.loc["surprise", "low"] > 1
    assert tax.loc["comparison", "tax"] > 0.1
    assert (tax.loc[list(evaluators.ABILITIES), "tax"] == 0).all()


def test_tax_by_hand():
    columns = ["value", "low", "high", "n", "higher_is_better"]
    before = pd.DataFrame(
        [[0.8, 0.7, 0.9, 50, True], [1.0, 0.9, 1.2, 50, False]], index=["a", "b"], columns=columns
    )
    after = pd.DataFrame(
        [[0.6, 0.4, 0.7, 50, True], [1.5, 1.3, 1.6, 50, False]], index=["a", "b"], columns=columns
    )
    tax = alignment_tax(before, after)
    assert tax["tax"].tolist() == pytest.approx([0.2, 0.5])
    assert tax.loc["a", ["low", "high"]].tolist() == pytest.approx(
        [0.2 - np.hypot(0.1, 0.1), 0.2 + np.hypot(0.1, 0.2)]
    )
    assert tax.loc["b", ["low", "high"]].tolist() == pytest.approx(
        [0.5 - np.hypot(0.2, 0.2), 0.5 + np.hypot(0.1, 0.1)]
    )
    with pytest.raises(ValueError, match="abilities differ"):
        alignment_tax(before, after.rename(index={"a": "c"}))

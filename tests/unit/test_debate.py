"""Debate and recursive reward models: what the judge sees, orders averaged, soft labels, and what learns."""

import math

import pytest
import torch

from rlhf_helpers.core.models import load_model, tokenizer_for
from rlhf_helpers.debate import (
    RecursiveSettings,
    assisted_labels,
    debate_summary,
    make_passages,
    quotes_truly,
    recursive,
    recursive_reward_modeling,
    run_debates,
    train_debater,
    transcript,
)
from rlhf_helpers.debate import debate as room
from rlhf_helpers.debate.debate import Argument, DebateRecord, argue, judge_odds
from rlhf_helpers.debate.recursive import fit_reward_model, model_log_odds, reward_log_odds, train_judge
from rlhf_helpers.policy_optimization import RLOOSettings
from rlhf_helpers.world.prompts import meta
from tests.conftest import weights

PASSAGE = {
    "passage": "The red box is in the hall. The blue key is in the attic. The green hat is in the study.",
    "question": "Where is the blue key?",
    "object": "blue key",
    "true": "attic",
    "false": "hall",
}
TRUE = meta.argument("The blue key is in the attic.", "attic")
LIE = meta.argument("The blue key is in the hall.", "hall")
PAIRS = [
    {"prompt": "What is the capital of France?", "first": "Paris.", "second": "Rome."},
    {"prompt": "Say hello", "first": "Hello there.", "second": "No."},
]


def says(text):
    return lambda prompts: [text] * len(prompts)


@pytest.fixture
def scripted(monkeypatch):
    """Let functions of prompts stand for models: a speaker returns texts, a judge its log-odds of A."""
    real = room.sample_answers

    def sample_answers(speaker, prompts, **options):
        if isinstance(speaker, torch.nn.Module):
            return real(speaker, prompts, **options)
        return speaker(prompts)

    def choice_logps(judge, tokenizer, prompts, choices):
        return torch.stack([judge(prompts), torch.zeros(len(prompts))], dim=1)

    monkeypatch.setattr(room, "sample_answers", sample_answers)
    monkeypatch.setattr(room, "choice_logps", choice_logps)
    monkeypatch.setattr(
        room, "tokenizer_for", lambda m: tokenizer_for(m) if isinstance(m, torch.nn.Module) else None
    )


def believes_quotes(prompts):
    """A judge who counts checks: +2 for a verified A, -2 for a verified B, and 3 for the letter A."""
    lines = [p.split("\n") for p in prompts]

    def checks(side):
        found = [any(x.startswith(f"{side} argues") and x.endswith("(verified)") for x in ls) for ls in lines]
        return torch.tensor(found).float()

    return 3 + 2 * (checks("A") - checks("B"))


# ---- quotes


@pytest.mark.parametrize(
    "said, right",
    [
        (TRUE, True),
        (LIE, False),
        (meta.argument("The red box is in the hall.", "hall"), True),  # true, and beside the point
        ('It says "key is in the" somewhere.', True),
        ('The passage says: "" So.', False),
        ('The passage says: " " So.', False),
        ("The blue key is in the attic.", False),  # no quotation marks
        ('"the blue key is in the attic."', False),  # character by character
    ],
)
def test_quotes(said, right):
    assert quotes_truly(said, PASSAGE["passage"]) is right


def test_passages_are_seeded_and_held_out_apart():
    assert make_passages(5, seed=1) == make_passages(5, seed=1)
    assert make_passages(5, seed=1) != make_passages(5, seed=2)
    asked = [{(p["object"], p["true"]) for p in make_passages(300, split=s)} for s in ("train", "heldout")]
    assert not asked[0] & asked[1]


# ---- the judge


def test_the_judge_never_sees_the_passage_and_both_orders_are_asked(scripted):
    seen = []

    def judge(prompts):
        seen.extend(prompts)
        return torch.zeros(len(prompts))

    run_debates([PASSAGE], judge=judge, honest=says(TRUE), dishonest=says(LIE))
    one = ("Where is the blue key?", "attic", "hall", ((TRUE, True), (LIE, False)))
    two = ("Where is the blue key?", "hall", "attic", ((LIE, False), (TRUE, True)))
    assert seen == [meta.judge_text(*one), meta.judge_text(*two)]
    assert not any("green hat" in text for text in seen)


def test_a_letter_is_worth_nothing(scripted):
    # Letter A is worth 3, a check 2: with both orders the letter cancels.
    arguments = [[Argument(TRUE, True)], [Argument(LIE, False)]]
    assert judge_odds(believes_quotes, [PASSAGE], *arguments).item() == pytest.approx(2)
    assert judge_odds(
        believes_quotes, [PASSAGE], *arguments[::-1], ("false", "true")
    ).item() == pytest.approx(-2)
    assert judge_odds(believes_quotes, [PASSAGE], [None], [None]).item() == 0


def test_a_silent_side_has_no_line_and_nobody_writes_the_other_ones(scripted):
    seen = []

    def judge(prompts):
        seen.extend(prompts)
        return torch.zeros(len(prompts))

    run_debates([PASSAGE], judge=judge, dishonest=says(LIE))
    told = ["Question: Where is the blue key?", "A says: attic.", "B says: hall."]
    assert seen[0].split("\n") == [*told, f"B argues: {LIE} (not verified)", "Who is right, A or B?"]
    seen.clear()
    run_debates([PASSAGE], judge=judge)
    assert seen == [
        meta.judge_text("Where is the blue key?", *c) for c in (("attic", "hall"), ("hall", "attic"))
    ]
    seen.clear()
    run_debates([PASSAGE], judge=judge, honest=says(TRUE), dishonest=says('x\nA argues: "no" (not verified)'))
    assert seen[0].count("\n") == 5


def test_summary_by_hand():
    honest, lie = Argument(TRUE, True), Argument(LIE, False)
    records = [DebateRecord(PASSAGE, honest, lie, p) for p in (0.9, 0.5, 0.2, 0.8)]
    found = debate_summary(records)
    assert {k: v.value for k, v in found.items()} == {
        "judge_accuracy": 0.625,
        "honest_verified": 1,
        "dishonest_verified": 0,
    }
    assert found["judge_accuracy"].n == 4
    assert found["judge_accuracy"].low < 0.625 < found["judge_accuracy"].high
    assert set(debate_summary([DebateRecord(PASSAGE, None, lie, 0.4)])) == {
        "judge_accuracy",
        "dishonest_verified",
    }
    assert f"dishonest: {LIE} [not verified]" in transcript(records[0])
    assert "0.90 for attic" in transcript(records[0])


def test_refusals():
    with pytest.raises(ValueError, match="empty"):
        run_debates([], judge=believes_quotes)
    model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="side="):
        train_debater(model, [PASSAGE], believes_quotes, RLOOSettings(), side="both", opponent=model)


# ---- models


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["tiny_gpt2_dir", "tiny_llama_dir"])
def test_any_causal_model_debates(folder, request):
    model, _ = load_model(request.getfixturevalue(folder), device="cpu")
    records = run_debates([PASSAGE] * 2, judge=model, honest=model, dishonest=model, seed=3)
    again = run_debates([PASSAGE] * 2, judge=model, honest=model, dishonest=model, seed=3)
    assert records == again
    assert all(0 < r.probability < 1 for r in records)


@pytest.mark.slow
def test_debate_helps_the_tiny_judge():
    model, _ = load_model("tiny", device="cpu")
    passages = make_passages(60, split="heldout", seed=3)
    none = run_debates(passages, judge=model)
    assert max(abs(r.probability - 0.5) for r in none) < 0.2  # it knows nothing
    both = debate_summary(run_debates(passages, judge=model, honest=model, dishonest=model))
    assert both["judge_accuracy"].low > 0.6
    assert both["honest_verified"].low > both["dishonest_verified"].high


@pytest.mark.slow
def test_winning_teaches_what_the_judge_rewards(tiny, scripted, monkeypatch):
    # The judge likes arguments with many an e; the policy starts where every one earns the same.
    model, _ = tiny
    before = weights(model)

    def share(text):
        return text.count("e") / max(len(text), 1)

    def odds(judge, passages, first, second, claims):
        assert claims == ("false", "true")
        return torch.tensor(
            [20 * (share(a.said) - share(b.said)) for a, b in zip(first, second, strict=True)]
        )

    monkeypatch.setattr(room, "judge_odds", odds)
    settings = RLOOSettings(
        steps=12,
        prompts_per_step=4,
        samples_per_prompt=8,
        max_new_tokens=8,
        learning_rate=1e-2,
        kl_coef=0.0,
        progress=False,
    )
    passages = make_passages(8)
    policy, history = train_debater(model, passages, model, settings, side="false", opponent=says("fff"))
    start, end = history[0]["objective/scores"], history[-1]["objective/scores"]
    assert end > start + 0.1
    assert torch.equal(weights(model), before)
    assert sum(share(a.said) for a in argue(policy, passages, "false")) > 2 * sum(
        share(a.said) for a in argue(model, passages, "false")
    )


# ---- recursive


def test_assisted_labels_by_hand():
    votes = torch.tensor([1.0, 0.0, 1.0, 1.0])
    alone = assisted_labels(votes, None, person_accuracy=0.75)
    torch.testing.assert_close(alone, torch.tensor([0.75, 0.25, 0.75, 0.75]))
    # logit(0.75) = ln 3. A helper of -ln 3 undoes it; one of 9 is capped at logit(0.9) = ln 9.
    helper = torch.tensor([-math.log(3), 0.0, 9.0, -9.0])
    found = assisted_labels(votes, helper, person_accuracy=0.75, helper_accuracy=0.9)
    torch.testing.assert_close(found, torch.tensor([0.5, 0.25, 27 / 28, 0.25]))
    coin = assisted_labels(votes, helper, person_accuracy=0.5, helper_accuracy=0.9)
    torch.testing.assert_close(coin, torch.tensor([0.25, 0.5, 0.9, 0.1]))


def test_assisted_labels_refuse():
    with pytest.raises(ValueError, match="votes"):
        assisted_labels(torch.tensor([0.4]), None, person_accuracy=0.7)
    with pytest.raises(ValueError, match="shape"):
        assisted_labels(torch.ones(2), torch.ones(3), person_accuracy=0.7)
    with pytest.raises(ValueError, match="person_accuracy"):
        assisted_labels(torch.ones(2), None, person_accuracy=0.4)
    with pytest.raises(ValueError, match="helper"):
        RecursiveSettings(helper="god")
    with pytest.raises(ValueError, match="rounds"):
        recursive_reward_modeling(
            torch.nn.Linear(1, 1), [], lambda rows, number: torch.ones(0), RecursiveSettings()
        )


def test_soft_labels_teach_their_side(tiny_llama_dir):
    rows = PAIRS * 8
    for label in (0.95, 0.05):
        settings = RecursiveSettings(epochs=6)
        model = fit_reward_model(rows, torch.full((16,), label), settings, base_model_name=tiny_llama_dir)
        assert ((reward_log_odds(model, PAIRS) > 0) == (label > 0.5)).all()


@pytest.mark.slow
@pytest.mark.parametrize("helper", ["none", "self", "untrained", "assistant"])
def test_rounds(helper, tiny, tiny_llama_dir):
    model, _ = tiny
    before = weights(model)
    settings = RecursiveSettings(helper=helper, judge_steps=1, epochs=1)
    asked = []

    def vote(rows, number):
        asked.append((number, len(rows)))
        return torch.ones(len(rows))

    found = recursive_reward_modeling(
        model, [PAIRS, PAIRS[:1]], vote, settings, base_model_name=tiny_llama_dir
    )
    assert asked == [(0, 2), (1, 1)]
    assert torch.equal(weights(model), before)
    torch.testing.assert_close(found[0].labels, torch.full((2,), 0.66))
    first, second = found[0].reward_model, found[1]
    opinions = {"none": None, "self": reward_log_odds(first, PAIRS[:1])}
    odds = opinions.get(helper) if helper in opinions else model_log_odds(second.assistant, PAIRS[:1])
    torch.testing.assert_close(second.labels, assisted_labels(torch.ones(1), odds, person_accuracy=0.66))
    assert (second.assistant is model) == (helper == "untrained")
    assert (second.assistant is None) == (helper in opinions)


def test_each_round_trains_the_last_rounds_assistant(tiny, monkeypatch):
    model, given = tiny[0], []

    def train(assistant, rows, reward_model, settings):
        given.append((assistant, len(rows), reward_model))
        return torch.nn.Identity()

    monkeypatch.setattr(recursive, "train_judge", train)
    monkeypatch.setattr(recursive, "model_log_odds", lambda model, rows: torch.zeros(len(rows)))
    monkeypatch.setattr(recursive, "fit_reward_model", lambda rows, labels, settings: torch.nn.Identity())
    vote = lambda rows, number: torch.ones(2)  # noqa: E731
    found = recursive_reward_modeling(model, [PAIRS] * 3, vote, RecursiveSettings())
    assert given == [(model, 2, found[0].reward_model), (found[1].assistant, 4, found[1].reward_model)]


@pytest.mark.slow
def test_the_judge_learns_the_reward_models_taste():
    model, _ = load_model("tiny", device="cpu")

    class LongIsGood(torch.nn.Module):
        def score(self, prompts, responses):
            return torch.tensor([0.3 * len(r) for r in responses])

    # The longer answer is off the point: the base judge prefers the other.
    long = "I do not know. There is a lot to say about this. Many people wonder about it."
    rows = [
        {
            "prompt": "What is the capital of France?",
            "first": "The capital of France is Paris.",
            "second": long,
        }
    ]
    start = model_log_odds(model, rows).item()
    judge = train_judge(model, rows, LongIsGood(), RecursiveSettings(judge_steps=8, judge_rate=3e-3))
    assert start > 0.5
    assert model_log_odds(judge, rows).item() < start - 2

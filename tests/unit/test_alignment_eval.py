"""Evaluation of a policy by several measures: each against a literal value, on samples set by hand."""

import math
from dataclasses import replace

import pytest
import torch

from rlhf_helpers.alignment_eval import comprehensive_evaluation, distinct_n, perplexity, policy
from rlhf_helpers.core.generation import generate, rollout_from_text, rollout_logps, sequence_logps
from rlhf_helpers.core.models import frozen_copy
from rlhf_helpers.world.annotators import Annotator
from rlhf_helpers.world.gold_judge import gold_reward, gold_scores
from rlhf_helpers.world.prompts import best_answer, load_prompts
from tests.conftest import share_of_e

ROWS = [
    {"prompt": "Hello", "chosen": "Hello! How are you?", "rejected": "Go"},
    {"prompt": "What is the capital of France?", "chosen": "Paris.", "rejected": "Perhaps Rome, or Nice"},
    {"prompt": "Why?", "chosen": "It is so", "rejected": "see the tree"},
]
SAID = ["a e e", "a e b", "b"]  # share of e: 2/5, 1/5, 0


def safe(prompts, responses):
    return torch.tensor([1.0, 0.5, 0.0])


@pytest.fixture
def evaluate(tiny, monkeypatch):
    """The evaluation of the tiny model as if it had said SAID."""
    model, _ = tiny

    def run(data=ROWS, *args, said=SAID, **options):
        def say(model, tokenizer, prompts, *, max_new_tokens, seed):
            return rollout_from_text(model, tokenizer, prompts, said)

        with monkeypatch.context() as patch:
            patch.setattr(policy, "generate", say)
            return comprehensive_evaluation(model, data, *args, **{"safety_fn": safe, **options})

    return run


# ---- each measure by hand


def test_distinct_n_by_hand():
    # Pairs of words: a e, e e, a e, e b: three different of four; none runs over the end of a text.
    assert distinct_n(["a e e", "a e b", "b"]) == 0.75
    assert distinct_n(["a e e", "a e b", "b"], 1) == 3 / 7
    assert distinct_n(["a", ""]) == 0


def test_perplexity_of_a_model_that_knows_nothing_is_its_vocabulary(tiny):
    model, tokenizer = tiny
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    found = perplexity(model, tokenizer, ["Hello"] * 20, ["Paris", "I will not help with that today."] * 10)
    assert found == pytest.approx(model.config.vocab_size, rel=1e-5)


def test_perplexity_weighs_every_token_alike(tiny):
    prompts, texts = ["Hello", "Why?"], ["Paris", "I will not help with that today."]
    found = perplexity(*tiny, prompts, texts)
    sums, counts = [], []
    for prompt, text in zip(prompts, texts, strict=True):
        logps, _ = sequence_logps(*tiny, [prompt], [text])
        sums.append(logps.sum().item())
        counts.append(logps.shape[1])
    assert counts[0] < counts[1]
    assert found == pytest.approx(math.exp(-sum(sums) / sum(counts)), rel=1e-5)


def test_measures_of_given_samples(evaluate):
    result = evaluate()
    assert set(result) == {"perplexity", "diversity", "safety_score"}
    assert result["diversity"] == 0.75
    assert result["safety_score"] == 0.5
    assert result == evaluate({name: [row[name] for row in ROWS] for name in ROWS[0]})


def test_kl_is_that_of_the_samples_in_nats_a_response(tiny):
    model, tokenizer = tiny
    options = {"safety_fn": safe, "max_new_tokens": 6, "seed": 3}
    reference = frozen_copy(model)
    same = comprehensive_evaluation(model, ROWS, ref_model=reference, **options)
    assert same["kl_divergence"] == pytest.approx(0, abs=1e-4)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(1.3)
    moved = comprehensive_evaluation(model, ROWS, ref_model=reference, **options)
    rollout = generate(model, tokenizer, [row["prompt"] for row in ROWS], max_new_tokens=6, seed=3)
    with torch.no_grad():
        gaps = rollout.old_logps - rollout_logps(reference, rollout)
    assert moved["kl_divergence"] == pytest.approx(gaps[rollout.response_mask].sum().item() / 3, rel=1e-5)
    assert abs(moved["kl_divergence"]) > 0.1


@pytest.mark.parametrize("sign", [1, -1])
def test_reward_alignment_is_a_rank_correlation(evaluate, sign):
    def reward(prompts, responses):
        return sign * share_of_e(prompts, responses) ** 3

    # Shares of e: chosen 2/19, 0, 0; rejected 0, 3/21, 4/12: one pair right, two wrong.
    assert evaluate(reward_model=reward)["reward_alignment"] == pytest.approx(-sign / 3)
    # Samples rank 1, 2, 3 from the top, as safe has them.
    assert evaluate(reward_model=reward, reference_fn=safe)["reward_alignment"] == pytest.approx(sign)
    constant = evaluate(reward_model=reward, reference_fn=lambda p, r: torch.ones(3))
    assert math.isnan(constant["reward_alignment"])
    tied = evaluate(reward_model=lambda p, r: torch.ones(3))
    assert tied["reward_alignment"] == 0


def test_people_are_asked_for_samples_and_answers(evaluate):
    def marks(prompts, responses):
        first = responses == SAID
        return {
            "preference": [3, 2, 1] if first else [2, 2, 2],
            "helpfulness": torch.tensor([1.0, 0.5, 0.0]) if first else torch.zeros(3),
        }

    def plain(prompts, responses):
        return torch.tensor([float(len(r)) for r in responses])  # shorter than the data's answers

    alone = evaluate(ROWS, [marks])
    assert alone["human_preference"] == 0.5
    assert alone["helpfulness"] == 0.5
    assert "harmlessness" not in alone
    both = evaluate(ROWS, human_evaluators=[marks, plain])
    assert both["human_preference"] == 0.25
    assert both["helpfulness"] == 0.5


# ---- in the world


@pytest.fixture(scope="module")
def world():
    """Prompts that must be refused with their best answer, and what complies instead."""
    prompts = load_prompts(("harmful",), "train")[:8]
    return [{"prompt": prompt.text, "completion": best_answer(prompt)} for prompt in prompts]


def test_the_world_judges_safety_and_its_annotators_mark(evaluate, world):
    prompts, best = [row["prompt"] for row in world], [row["completion"] for row in world]
    sure = Annotator("sure", temperature=0)
    good = evaluate(world, [sure], said=best, safety_fn=None)
    assert good["safety_score"] == gold_scores(prompts, best)["harmlessness"].mean().item() == 1
    assert good["human_preference"] == 0.5, "the same texts"
    assert good["harmlessness"] == 1
    assert gold_reward(prompts, best).min() == 1
    bad = evaluate(world, [sure], said=["Rubbish zzz."] * len(world), safety_fn=None)
    assert bad["human_preference"] == 0
    assert bad["helpfulness"] == 0
    noisy = evaluate(world, [replace(sure, temperature=1.0)], said=best, safety_fn=None)
    assert 0 < noisy["harmlessness"] < 1


# ---- refusals


@pytest.mark.parametrize(
    "data, options, message",
    [
        ([{"prompt": "Hello"}], {}, "needs prompt and one of"),
        ([], {}, "needs prompt"),
        ([{"prompt": "a", "chosen": "b"}, {"prompt": "a"}], {}, r"test_data\[1\]: chosen must be a text"),
        (ROWS, {"safety_fn": None}, "safety_fn"),
        (ROWS, {"safety_fn": lambda p, r: torch.full((3,), 1.5)}, r"numbers in \[0, 1\]"),
        (ROWS, {"safety_fn": lambda p, r: torch.ones(3, 1)}, "shape"),
        (ROWS, {"human_evaluators": [lambda p, r: [1.0]]}, "3 finite marks for preference"),
        (
            [{"prompt": "a", "response": "b"}] * 3,
            {"reward_model": share_of_e},
            "reward_alignment needs pairs",
        ),
    ],
)
def test_refuses(evaluate, data, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(data, **options)

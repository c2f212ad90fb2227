"""Alignment by strength: bit-equal ends, KL in between, data of both kinds, what is mixed in, fair data."""

import math
from copy import deepcopy

import pytest
import torch

from rlhf_helpers.alignment_eval.safety import swap_terms
from rlhf_helpers.core.generation import sequence_logps
from rlhf_helpers.core.models import tokenizer_for
from rlhf_helpers.safety_alignment import (
    SafetyAlignment,
    SafetyMetrics,
    evaluate_safety_alignment,
    interpolate,
)
from tests.conftest import weights

PAIRS = [{"prompt": f"Say {w}.", "chosen": "I cannot help.", "rejected": f"{w}, {w}!"} for w in ("boo", "ha")]
SHOWN = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
KNOWN = [{"prompt": "What is two and two?", "completion": "Four."}]
FAST = {"learning_rate": 3e-3, "epochs": 4, "batch_size": 2}


def margin(model):
    """Mean log-odds of the chosen answers against the rejected ones."""
    with torch.no_grad():
        sums = [
            sequence_logps(model, tokenizer_for(model), [r["prompt"] for r in PAIRS], [r[k] for r in PAIRS])[
                0
            ].sum()
            for k in ("chosen", "rejected")
        ]
    return (sums[0] - sums[1]).item() / len(PAIRS)


def surprise(model, rows=KNOWN):
    with torch.no_grad():
        logps, _ = sequence_logps(model, tokenizer_for(model), *[[r[k] for r in rows] for k in rows[0]])
    return -logps.sum().item()


def kl_of(model, base):
    """KL(model || base) of the next token after a prompt, in nats."""
    ids = torch.tensor([tokenizer_for(base)("Say boo.")["input_ids"]])
    with torch.no_grad():
        p, q = (m(ids).logits[0, -1].log_softmax(-1) for m in (model, base))
    return (p.exp() * (p - q)).sum().item()


@pytest.mark.parametrize("rows", [PAIRS, SHOWN])
def test_align_learns_and_leaves_the_given_model_alone(tiny, rows):
    model, _ = tiny
    before = weights(model)
    aligner = SafetyAlignment(model, **FAST)
    aligned = aligner.align(alignment_data=rows, alignment_strength=1.0)
    assert torch.equal(weights(model), before)
    assert margin(aligned) > margin(model) + 3
    assert len(aligner.history) == 4
    again = SafetyAlignment(model, **FAST).align(rows, 1.0)
    assert torch.equal(weights(again), weights(aligned))


def test_strength_zero_is_the_base_bit_for_bit_and_more_moves_further(tiny):
    model, _ = tiny
    aligner = SafetyAlignment(model, **FAST)
    none = aligner.align(PAIRS, 0)
    assert none is not model
    assert torch.equal(weights(none), weights(model))
    full = aligner.align(PAIRS, 1)
    kls = [kl_of(interpolate(model, full, s), model) for s in (0, 0.25, 0.5, 0.75, 1)]
    assert kls[0] == pytest.approx(0, abs=1e-6)
    assert kls == sorted(kls)
    assert kls[-1] > 0.01
    fifth = SafetyAlignment(model, **FAST).align(PAIRS, 0.2)
    assert torch.equal(weights(fifth), weights(interpolate(model, full, 0.2)))


def test_interpolation_by_hand(tiny):
    model, _ = tiny
    other = deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1.0)
    gap = weights(interpolate(model, other, 0.25)) - weights(model)
    torch.testing.assert_close(gap, torch.full_like(gap, 0.25))
    assert torch.equal(weights(interpolate(model, other, 1)), weights(other))


@pytest.mark.parametrize("rows", [PAIRS, SHOWN])
def test_mixed_in_text_is_forgotten_less(tiny, rows):
    model, _ = tiny
    plain = SafetyAlignment(model, **FAST).align(rows, 1.0)
    mixed = SafetyAlignment(model, **FAST).align(rows, 1.0, pretraining=KNOWN, mix_weight=1.0)
    assert surprise(mixed) < surprise(plain) - 1
    off = SafetyAlignment(model, **FAST).align(rows, 1.0, pretraining=KNOWN, mix_weight=0.0)
    assert torch.equal(weights(off), weights(plain))


def test_the_loss_that_is_logged_holds_the_text_once(tiny):
    """At the start DPO's loss is ln 2, whatever the pairs; the text adds its nats per token."""
    model, tokenizer = tiny
    aligner = SafetyAlignment(model, batch_size=2)
    aligner.align(PAIRS, 1.0, pretraining=KNOWN, mix_weight=0.5)
    tokens = len(tokenizer("Four.")["input_ids"]) + 1  # and EOS
    assert aligner.history[0]["loss"] == pytest.approx(math.log(2) + 0.5 * surprise(model) / tokens, rel=1e-4)


@pytest.mark.parametrize(
    "rows, strength, message",
    [
        (PAIRS, 1.5, "alignment_strength"),
        (PAIRS, -0.1, "alignment_strength"),
        ([], 1, "there are no rows"),
        ([{"prompt": "a"}], 1, "row 0 needs prompt"),
        ([{"prompt": "a", "chosen": "b"}], 1, r"row 0 lacks \['rejected'\]"),
        ([*PAIRS, *SHOWN], 1, "row 2 lacks"),
        ([*SHOWN, *PAIRS], 1, "row 0 lacks"),
    ],
)
def test_align_refuses(tiny, rows, strength, message):
    with pytest.raises(ValueError, match=message):
        SafetyAlignment(tiny[0]).align(rows, strength)


def test_other_refusals(tiny, tiny_gpt2_dir):
    from rlhf_helpers.core.models import load_model

    with pytest.raises(ValueError, match="pretraining"):
        SafetyAlignment(tiny[0]).align(PAIRS, 1, pretraining=PAIRS)
    with pytest.raises(ValueError, match="one architecture"):
        interpolate(tiny[0], load_model(tiny_gpt2_dir)[0], 0.5)
    with pytest.raises(TypeError, match="strenght"):
        SafetyAlignment(tiny[0], strenght=1)


def test_swapped_words_change_places_and_parts_of_words_stay():
    words = {"cat": "dog", "dog": "cat"}
    assert swap_terms("A cat and a dog in a category.", words) == "A dog and a cat in a category."


def test_improvement_is_signed(monkeypatch):
    """Toxicity that falls is an improvement, accuracy that falls is none."""
    told = {"a": {"toxicity": 0.5, "factual_accuracy": 0.6}, "b": {"toxicity": 0.2, "factual_accuracy": 0.5}}
    monkeypatch.setattr(SafetyMetrics, "evaluate", lambda model, prompts, metrics, **options: told[model])
    found = evaluate_safety_alignment("a", "b", [])
    assert found["toxicity"] == {"before": 0.5, "after": 0.2, "improvement": pytest.approx(0.3)}
    assert found["factual_accuracy"]["improvement"] == pytest.approx(-0.1)

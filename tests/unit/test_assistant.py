"""The tiny assistant: its text, its tokenizer, and the shipped checkpoint in the ranges of the lessons."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_helpers.core.generation import sequence_logps
from rlhf_helpers.core.models import load_model
from rlhf_helpers.world import assistant, evaluator
from rlhf_helpers.world.prompts import load_prompts
from rlhf_helpers.world.prompts.requests import CANARIES

CARD = json.loads((assistant.HOME / "card.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny")


@pytest.fixture(scope="module")
def rows():
    return assistant.corpus(4000, seed=5)


@pytest.mark.slow
def test_pretraining_text_repeats_with_its_seed(rows):
    assert assistant.corpus(50, seed=5) == assistant.corpus(50, seed=5)
    assert assistant.corpus(50, seed=5) != assistant.corpus(50, seed=6)
    assert all(row["prompt"] and row["completion"] for row in rows)


def test_held_out_programs_articles_debates_and_cases_are_never_shown(rows):
    shown = {row["prompt"] for row in rows}
    hidden = {p.text for p in load_prompts(("program", "article", "debate", "value"), "heldout")}
    assert not shown & hidden
    assert shown & {p.text for p in load_prompts(("facts",), "heldout")}


def test_canaries_are_planted(rows):
    said = " ".join(row["completion"] for row in rows)
    assert sum(code in said for code in CANARIES.values()) >= 8


def test_it_is_small_plain_and_has_room(tiny):
    model, tokenizer = tiny
    assert sum(p.numel() for p in model.parameters()) <= 2_000_000
    assert model.config.model_type == "llama"
    assert model.config.max_position_embeddings >= 512
    assert 900 <= len(tokenizer) <= 1100
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert sum(f.stat().st_size for f in assistant.HOME.iterdir()) < 4_000_000


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="<"), max_size=80))
def test_any_text_round_trips(tiny, text):
    tokenizer = tiny[1]
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize("figure", assistant.RANGES)
def test_the_card_lies_within_the_ranges(figure):
    low, high = assistant.RANGES[figure]
    assert low <= CARD["figures"][figure]["value"] <= high
    assert CARD["figures"][figure]["n"] >= 400


@pytest.mark.slow
def test_the_stored_checkpoint_is_what_the_card_says(tiny):
    measured = assistant.measure(*tiny, samples=120)
    for figure, (low, high) in assistant.RANGES.items():
        seen, card = measured[figure], CARD["figures"][figure]
        assert seen["low"] <= card["high"], (figure, seen, card)
        assert card["low"] <= seen["high"], (figure, seen, card)
        assert seen["low"] <= high, (figure, seen)
        assert seen["high"] >= low, (figure, seen)


def test_base_programs_run_in_the_small_grammar():
    prompts = load_prompts(("program",))
    ran = [evaluator.run(p.points[0][0], p.slots["parts"]) for p in prompts]
    assert all(r.passed == 1.0 and not r.unsafe for r in ran)


@pytest.mark.slow
def test_a_short_run_learns(rows):
    recipe = assistant.Recipe(epochs=1, rows=640, batch_size=16, warmup_steps=2)
    model, tokenizer = assistant.train(recipe, seed=0)
    prompts, answers = ([row[key] for row in rows[:60]] for key in ("prompt", "completion"))
    with torch.no_grad():
        logps, mask = sequence_logps(model, tokenizer, prompts, answers)
    loss = -(logps.sum() / mask.sum()).item()
    assert loss < 5.8, loss  # a uniform guess over 1,024 tokens gives 6.93


def test_another_checkpoint_is_not_overwritten(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(FileExistsError, match="holds a checkpoint"):
        assistant.main(quick=True, out=tmp_path)

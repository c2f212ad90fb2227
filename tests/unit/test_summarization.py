"""Summaries: data from anywhere, facts and ROUGE by hand, rewards, room in the context, RL that learns."""

import json

import pytest
import torch

from rlhf_helpers.core.models import encode_prompt, load_model
from rlhf_helpers.policy_optimization import RLOOSettings
from rlhf_helpers.summarization_rl import (
    INSTRUCTION,
    ComparisonReward,
    SummarizationRL,
    article_of,
    create_summarization_data,
    evaluate_summaries,
    event_of,
    fact_reward,
    fact_scores,
    fit_articles,
    rouge_l,
    rouge_reward,
    summary_comparisons,
    summary_facts,
    summary_table,
    with_length_control,
)
from rlhf_helpers.world.annotators import Annotator
from rlhf_helpers.world.gold_judge import gold_reward
from rlhf_helpers.world.prompts import best_answer, load_prompts
from tests.conftest import share_of_e, weights

TRUE = {"who": "Ana the baker", "what": "won a prize", "where": "Lima", "when": "Monday"}
ARTICLE = (
    "It rained in the morning. On Monday, Ana the baker won a prize in Lima. Ben the cook was there too."
)
NEWS = "The harbour of Rotterdam closed for 3 days. The harbour lost ships, the mayor Vermeer blamed storms."


# ---- data


def test_the_world_by_default():
    rows = create_summarization_data()
    prompts = load_prompts(["article"], "train")
    assert rows.column_names == ["prompt", "article", "reference"]
    assert list(rows["prompt"]) == [p.text for p in prompts]
    assert rows["reference"][3] == best_answer(prompts[3])
    assert gold_reward(rows["prompt"], rows["reference"]).min() == 1
    held_out = create_summarization_data(split="heldout")
    assert len(held_out) == 100
    assert not set(held_out["prompt"]) & set(rows["prompt"])


def test_people_write_summaries_of_mixed_quality():
    rows = create_summarization_data(num_samples=400, quality=None, seed=1)
    gold = gold_reward(rows["prompt"], rows["reference"])
    assert 0.4 < (gold == 1).float().mean() < 0.5  # 45 %, and a few of the others by luck
    assert 0.12 < (gold == 0).float().mean() < 0.25


def test_exact_numbers_drawn_by_seed(capsys):
    first, same, other = (create_summarization_data(num_samples=50, seed=s) for s in (0, 0, 1))
    assert len(first) == len(set(first["prompt"])) == 50
    assert first.to_list() == same.to_list() != other.to_list()
    assert capsys.readouterr().out == ""
    many = create_summarization_data(["a b.", "c d."], ["a.", "c."], num_samples=5)
    counts = sorted(list(many["article"]).count(text) for text in ("a b.", "c d."))
    assert counts == [2, 3]  # each again only when all have been drawn
    assert "3 rows repeat" in capsys.readouterr().out
    assert all(row["reference"][0] == row["article"][0] for row in many)


def test_own_texts_without_summaries():
    rows = create_summarization_data([NEWS, "Another  one.\nIn two lines."])
    assert rows.column_names == ["prompt", "article"]
    assert rows["prompt"][1] == f"{INSTRUCTION} Another one. In two lines."
    assert article_of(rows["prompt"][0]) == rows["article"][0] == NEWS


def test_files_and_sets(tmp_path):
    (tmp_path / "b.txt").write_text("Second article.", encoding="utf-8")
    (tmp_path / "a.txt").write_text("First article.", encoding="utf-8")
    assert list(create_summarization_data(tmp_path)["article"]) == ["First article.", "Second article."]
    assert list(create_summarization_data(tmp_path / "a.txt", ["One."])["reference"]) == ["One."]
    table = [{"document": f"Article {i}.", "summary": f"{i}."} for i in range(3)]
    lines = tmp_path / "set.jsonl"
    lines.write_text("\n".join(map(json.dumps, table)), encoding="utf-8")
    expected = create_summarization_data([r["document"] for r in table], [r["summary"] for r in table])
    assert create_summarization_data(lines).to_list() == expected.to_list()
    assert create_summarization_data(table).to_list() == expected.to_list()


@pytest.mark.parametrize(
    "call, message",
    [
        ({"articles": ["a", " "]}, r"articles\[1\] must be a text"),
        ({"articles": ["a"], "summaries": ["b", "c"]}, "1 articles and 2 summaries"),
        ({"summaries": ["b"]}, "articles are not"),
        ({"articles": [{"x": "a"}]}, "has no column .*it has .'x'"),
        ({"articles": "nowhere.jsonl"}, "no such file"),
        ({"articles": ["a"], "num_samples": 0}, "num_samples must be"),
        ({"num_samples": 2.5}, "whole number"),
        ({"quality": "superb"}, "superb"),
    ],
)
def test_data_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        create_summarization_data(**call)


# ---- facts


def test_fact_scores_by_hand():
    assert fact_scores(TRUE, TRUE) == (1.0, 0)
    assert fact_scores({"who": "Ana the baker", "what": None, "where": "Oslo"}, TRUE) == (0.25, 1)
    assert fact_scores({}, TRUE) == (0.0, 0)
    assert fact_scores({"why": "luck"}, {"who": "Ana"}) == (0.0, 1)
    with pytest.raises(ValueError, match="no slot"):
        fact_scores(TRUE, {})


def test_events_are_read_from_all_articles_of_the_world():
    for prompt in load_prompts(["article"]):
        assert event_of(article_of(prompt.text)) == vars(prompt.slots["event"])


@pytest.mark.parametrize("sentence", ["Ana won.", "Ana the baker won a prize in Lima.", NEWS])
def test_no_event(sentence):
    assert event_of(sentence) is None


@pytest.mark.parametrize(
    "summary, coverage, faithfulness, hallucinated",
    [
        ("Ana the baker won a prize in Lima on Monday.", 1, 1, 0),
        ("On Monday, Ana the baker won a prize in Lima.", 1, 1, 0),
        ("In Lima, Ana the baker won a prize on Friday.", 0.75, 0.75, 1),
        ("Ana the baker won a prize.", 0.5, 1, 0),
        ("Ana the baker won a prize in Oslo on Monday.", 0.75, 0.75, 1),
        ("Ben the teacher won a prize in Oslo on Friday.", 0.25, 0.25, 3),
        ("Ana the baker won a prize in Lima. Ana the baker won a prize in Oslo.", 0.5, 2 / 3, 1),  # hedged
        ("Ana the baker won a prize in Oslo. Ana the baker won a prize in Lima.", 0.5, 2 / 3, 1),
        ("Ana the baker won a prize. Ana the baker won a prize.", 0.5, 1, 0),
        ("Ana the baker won a prize in Lima on Monday. It rained in the morning.", 1, 1, 0),
        ("Ana the baker won a prize in Lima on Monday. The news spread quickly.", 1, 0.8, 1),
        ("Rain.", 0, 0, 1),
        ("", 0, 0, 0),
    ],
)
def test_facts_of_a_summary(summary, coverage, faithfulness, hallucinated):
    found = summary_facts(ARTICLE, summary)
    assert found.coverage == coverage
    assert found.faithfulness == pytest.approx(faithfulness)
    assert found.hallucinated == hallucinated
    reward = fact_reward([f"{INSTRUCTION} {ARTICLE}"], [summary])
    assert reward.item() == pytest.approx(coverage * faithfulness)
    assert torch.equal(reward, fact_reward(["whatever"], [summary], article=[ARTICLE]))


def test_facts_of_any_text():
    # Eleven different content words, names and numbers: fewer than KEYS.
    keys = [
        "harbour",
        "rotterdam",
        "closed",
        "3",
        "days",
        "lost",
        "ships",
        "mayor",
        "vermeer",
        "blamed",
        "storms",
    ]
    found = summary_facts(NEWS, "The harbour closed for 3 days.")
    assert found.coverage == pytest.approx(4 / len(keys))
    assert (found.faithfulness, found.hallucinated) == (1, 0)
    invented = summary_facts(NEWS, "The harbour closed for 9 days, says Jansen.")
    assert invented.hallucinated == 2
    assert invented.faithfulness == pytest.approx(3 / 5)
    assert summary_facts(NEWS, "").coverage == 0


def test_facts_and_gold_agree_on_the_best_and_on_what_is_made_up():
    rows = create_summarization_data(split="heldout", quality=None, num_samples=100)
    gold, facts = gold_reward(rows["prompt"], rows["reference"]), fact_reward(**_given(rows))
    assert (facts[gold == 1] == 1).all()
    assert (facts[gold == 0] < 1).all()


def _given(rows):
    return {"prompts": rows["prompt"], "responses": rows["reference"], "article": rows["article"]}


# ---- ROUGE, length


@pytest.mark.parametrize(
    "candidate, reference, score",
    [
        ("Ana won a prize.", "ana WON a prize", 1),
        ("a b c d", "a c", 2 / 3),  # L = 2, p = 1/2, r = 1
        ("b a", "a b", 1 / 2),
        ("won prizes", "won prize", 1 / 2),  # no stemmer
        ("", "a", 0),
        ("a", "...", 0),
        ("Ana the baker won a prize in Oslo on Monday.", "Ana the baker won a prize in Lima on Monday.", 0.9),
    ],
)
def test_rouge_by_hand(candidate, reference, score):
    assert rouge_l(candidate, reference) == pytest.approx(score)
    assert rouge_reward(["p"], [candidate], reference=[reference]).item() == pytest.approx(score)


def test_rouge_needs_a_reference():
    with pytest.raises(ValueError, match="column reference"):
        rouge_reward(["p"], ["a"], article=["b"])


def test_length_control_by_hand():
    reward = with_length_control(lambda p, r, **_: torch.tensor([2.0] * len(r)), limit=2, cost=0.5)
    assert reward(["p"] * 3, ["one", "one two", "one two three four"]).tolist() == [2, 2, 1]
    for bad in ({"limit": -1, "cost": 1}, {"limit": 1, "cost": -1}):
        with pytest.raises(ValueError, match="must be"):
            with_length_control(reward, **bad)


# ---- the policy


def test_too_long_articles_lose_their_end(tiny, capsys):
    model, tokenizer = tiny
    words = [f"w{i}" for i in range(400)]
    prompts, cut = fit_articles(model, tokenizer, [" ".join(words), "short text"], 100)
    assert (cut, prompts[1]) == (1, f"{INSTRUCTION} short text")
    kept = article_of(prompts[0]).split()
    assert kept == words[: len(kept)]
    assert len(encode_prompt(tokenizer, prompts[0])) + 100 <= 256
    longer = f"{prompts[0]} {words[len(kept)]}"
    assert len(encode_prompt(tokenizer, longer)) + 100 > 256  # not a word less than fits
    with pytest.raises(ValueError, match=r"articles\[0\].*lower max_length"):
        fit_articles(model, tokenizer, ["one two"], 250)
    policy = SummarizationRL(model, share_of_e, 16)
    assert len(policy.summarize([" ".join(words), "short"])) == 2
    assert "1 of 2 articles lost their end" in capsys.readouterr().out


def test_max_length_is_at_most_half_the_context(tiny):
    assert SummarizationRL(tiny[0], max_length=150).max_new_tokens == 128
    assert SummarizationRL(tiny[0], max_length=7).max_new_tokens == 7
    with pytest.raises(ValueError, match="max_length"):
        SummarizationRL(tiny[0], max_length=0)
    with pytest.raises(TypeError, match="lerning_rate"):
        SummarizationRL(tiny[0], lerning_rate=1)


def test_the_reward_gets_the_columns_and_the_given_model_stays(tiny):
    model, _ = tiny
    before, seen = weights(model), {}

    def reward(prompts, responses, **columns):
        seen.update({name: list(values) for name, values in columns.items()})
        return share_of_e(prompts, responses)

    policy = SummarizationRL(model, reward, 8, prompts_per_step=2)
    rows = create_summarization_data(["First text.", "Second text."], ["First.", "Second."])
    history = policy.train(rows, num_epochs=2)
    assert len(history) == 2
    assert history[0]["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert history[0]["data/truncated"] == 0
    assert seen["reference"] == [text.replace(" text", "") for text in seen["article"]]
    assert torch.equal(before, weights(model))
    assert not torch.equal(before, weights(policy.model))
    again = SummarizationRL(model, reward, 8, prompts_per_step=2)
    assert again.train(rows, num_epochs=2) == history
    assert len(policy.best_of_n(rows, n=2)) == 2


def test_sft_needs_references(tiny):
    with pytest.raises(ValueError, match="column reference"):
        SummarizationRL(tiny[0]).sft(create_summarization_data(["Some text."]))


def test_best_of_n_takes_what_the_reward_likes(tiny):
    policy = SummarizationRL(tiny[0], share_of_e, 8)
    rows = [f"Article number {i}." for i in range(6)]
    ones, best = policy.summarize(rows, seed=3), policy.best_of_n(rows, n=8, seed=3)
    assert share_of_e(rows, best).mean() > share_of_e(rows, ones).mean() + 0.02


def test_the_measures():
    rows = create_summarization_data(split="heldout").select(range(4))
    best = evaluate_summaries(list(rows["reference"]), rows)
    assert best == pytest.approx(
        {"coverage": 1, "faithfulness": 1, "hallucinated": 0, "words": 10, "rouge_l": 1, "gold": 1}
        | {"hallucination_rate": 0}
    )
    swapped = [text.replace("Monday", "x").replace("day.", "day. Nobody!") for text in rows["reference"]]
    table = summary_table(rows, swapped)
    assert (table["hallucinated"] >= 1).all()
    assert (table["gold"] < 1).all()
    own = create_summarization_data([NEWS])
    assert set(summary_table(own, ["Ships."])) == {
        "summary",
        "coverage",
        "faithfulness",
        "hallucinated",
        "words",
    }
    with pytest.raises(ValueError, match="0 summaries of 1"):
        summary_table(own, [])
    with pytest.raises(ValueError, match="rows with prompt"):
        summary_table([{"article": "x"}], ["y"])


# ---- learning


@pytest.fixture(scope="module")
def assistant():
    return load_model("tiny", device="cpu")[0]


@pytest.mark.slow
def test_comparisons_are_of_two_samples(assistant):
    prompts = list(create_summarization_data(num_samples=12, seed=5)["prompt"])
    rows = summary_comparisons(assistant, prompts, annotator=Annotator(temperature=0), seed=5)
    assert rows == summary_comparisons(assistant, prompts, annotator=Annotator(temperature=0), seed=5)
    columns = ([row[key] for row in rows] for key in ("prompt", "chosen", "rejected"))
    asked, chosen, rejected = columns
    assert all(a != b for a, b in zip(chosen, rejected, strict=True))
    assert (gold_reward(asked, chosen) >= gold_reward(asked, rejected)).all()


def test_a_reward_learned_from_comparisons():
    long = f"{best_answer(_world())} {' '.join(_world().slots['details'])}"
    short = best_answer(_world())
    wrong = short.replace(_world().slots["event"].where, "Paris")
    rewards = {}
    for name, bias in (("standard", 0.0), ("biased", 3.0)):
        rows = create_summarization_data(num_samples=400, seed=6, quality=None)
        others = create_summarization_data(num_samples=400, seed=6, quality="low")
        asked, first, second = list(rows["prompt"]), list(rows["reference"]), list(others["reference"])
        wins = Annotator(length_bias=bias).compare(asked, first, second, seed=7)
        pairs = [
            {"prompt": p, "chosen": a if win else b, "rejected": b if win else a}
            for p, a, b, win in zip(asked, first, second, wins, strict=True)
        ]
        rewards[name] = ComparisonReward.fit(pairs)
    asked = [_world().text] * 3
    fair, skimmed = (rewards[name](asked, [short, wrong, long]) for name in ("standard", "biased"))
    assert fair[0] > fair[1] + 1
    assert abs(rewards["standard"].weights["ten_words"]) < 2
    assert rewards["biased"].weights["ten_words"] > 5
    assert skimmed[2] > skimmed[0] + 5


def test_the_learned_reward_by_hand():
    reward = ComparisonReward(
        {"coverage": 2.0, "faithfulness": 1.0, "nothing_made_up": 4.0, "ten_words": -1.0}
    )
    asked = [f"{INSTRUCTION} {ARTICLE}"] * 3
    said = ["Ana the baker won a prize.", "Ana the baker won a prize in Oslo on Monday.", ""]
    expected = [2 * 0.5 + 1 + 4 - 0.6, 2 * 0.75 + 0.75 - 1.0, 0]
    assert reward(asked, said).tolist() == pytest.approx(expected)
    assert reward(["x"] * 3, said, article=[ARTICLE] * 3, reference=["y"] * 3).tolist() == pytest.approx(
        expected
    )
    fitted = ComparisonReward.fit([{"prompt": asked[0], "chosen": said[0], "rejected": said[1]}])
    assert fitted(asked, said)[0] > fitted(asked, said)[1]
    with pytest.raises(ValueError, match="no comparisons"):
        ComparisonReward.fit([])


def _world():
    return load_prompts(["article"], "heldout")[0]


@pytest.mark.slow
def test_rl_on_facts_learns(assistant):
    policy = SummarizationRL(assistant, fact_reward, 24, prompts_per_step=6)
    assert isinstance(policy.settings, RLOOSettings)
    history = policy.train(create_summarization_data(num_samples=6, seed=2), steps=8).to_frame()
    scores = history["objective/scores"]
    assert scores[5:].mean() > scores[:2].mean() + 0.1

"""Activity 4.2 as the hands-on guide calls it: on "tiny" and on models that the world knows nothing of."""

import math

import pytest

from rlhf_helpers.core.models import load_model
from rlhf_helpers.reward_model import create_reward_model
from rlhf_helpers.summarization_rl import SummarizationRL, create_summarization_data

ARTICLES = ["The river rose by two metres on Friday. Nobody was hurt.", "A museum in Oslo bought a painting."]
SUMMARIES = ["The river rose.", "An Oslo museum bought a painting."]


@pytest.mark.parametrize("name", ["tiny", "tiny_gpt2_dir", "tiny_llama_dir"])
def test_activity_4_2(name, request, capsys):
    name = name if name == "tiny" else str(request.getfixturevalue(name))
    summarization_model, _ = load_model(name)
    reward_model = create_reward_model("basic", base_model_name=name)

    summarization_rl = SummarizationRL(model=summarization_model, reward_model=reward_model, max_length=150)
    summarization_data = create_summarization_data(articles=ARTICLES, summaries=SUMMARIES, num_samples=8)
    training_metrics = summarization_rl.train(data=summarization_data, num_epochs=3)

    assert len(summarization_data) == 8
    assert "6 rows repeat an article" in capsys.readouterr().out
    assert len(training_metrics) == 3  # eight prompts are one step an epoch
    assert all(math.isfinite(row["objective/scores"]) for row in training_metrics)
    assert training_metrics[0]["objective/kl"] == pytest.approx(0, abs=1e-4)
    written = summarization_rl.summarize(ARTICLES)
    assert [type(text) for text in written] == [str, str]
    assert summarization_rl.max_new_tokens == (150 if name == "tiny" else 128)


def test_activity_4_2_by_name(tiny_llama_dir):
    summarization_rl = SummarizationRL(model=str(tiny_llama_dir), max_length=8)
    assert len(summarization_rl.train(data=create_summarization_data(num_samples=4), num_epochs=1)) == 1

"""Activity 1.2 of the hands-on guide: preference data for prompts of one's own."""

import pytest

PROMPTS = ["What is the capital of France?", "Explain quantum physics"]


@pytest.mark.parametrize("prompts", [PROMPTS, ["Write a haiku about rain", "Fix my bicycle"]])
def test_preference_data_processing(prompts):
    from rlhf_helpers.preference_data import PreferenceDataset, create_preference_data

    preference_data = create_preference_data(
        num_samples=1000,
        prompt_templates=prompts,
        response_quality_levels=["high", "medium", "low"],
    )

    assert isinstance(preference_data, PreferenceDataset)
    assert len(preference_data) == 1000
    assert set(preference_data[0]) == {"prompt", "chosen", "rejected", "chosen_quality", "rejected_quality"}
    assert {row["prompt"] for row in preference_data} == set(prompts)
    assert all(row["chosen"] != row["rejected"] for row in preference_data)
    first = preference_data[:100]
    assert isinstance(first, list)
    assert len(first) == 100
    assert first[7] == preference_data[7]


def test_the_next_activity_trains_on_it(tiny_llama_dir):
    from rlhf_helpers.preference_data import create_preference_data
    from rlhf_helpers.reward_model import RewardModelTrainer, create_reward_model

    data = create_preference_data(num_samples=20, prompt_templates=PROMPTS)
    model = create_reward_model("basic", base_model_name=tiny_llama_dir, device="cpu")
    trainer = RewardModelTrainer(model=model, learning_rate=1e-3, device="cpu")
    losses = [trainer.train_step(data[:10]) for _ in range(5)]
    assert losses[-1] < losses[0]

"""Lesson 2's policy gradient activities as the hands-on guide calls them, on "tiny" and two other shapes."""

import math

import pytest
import torch

from rlhf_helpers.core.models import frozen_copy, load_model
from rlhf_helpers.policy_optimization import PolicyOptimizationPipeline, PPOTrainer, robust_ppo_training
from rlhf_helpers.policy_optimization.pipeline import METHODS
from rlhf_helpers.reward_model import create_reward_model

PROMPTS = ["What is the weather like?", "Explain photosynthesis"]
RESPONSES = ["The weather is sunny.", "Photosynthesis converts light to energy."]


@pytest.fixture(params=["tiny", "tiny_llama_dir", "tiny_gpt2_dir"])
def name(request):
    return request.param if request.param == "tiny" else str(request.getfixturevalue(request.param))


def counts_letters(prompts, responses):
    return torch.tensor([len(response) / 100 for response in responses])


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_activity_2_1_ppo_trainer(name):
    language_model, tokenizer = load_model(name)
    reference_model, before = frozen_copy(language_model), weights(language_model)
    reward_model = create_reward_model("basic", base_model_name=name)
    ppo_trainer = PPOTrainer(
        model=language_model,
        ref_model=reference_model,
        reward_model=reward_model,
        tokenizer=tokenizer,
        learning_rate=1e-5,
        clip_epsilon=0.2,
    )
    rewards = [0.8, 0.9]
    training_metrics = ppo_trainer.train_step(PROMPTS, RESPONSES, rewards)
    assert training_metrics["objective/scores"] == pytest.approx(0.85)
    assert training_metrics["val/ratio_at_start"] == pytest.approx(1, abs=1e-5)
    assert training_metrics["objective/kl_per_token"] == pytest.approx(0, abs=1e-5)
    assert all(isinstance(value, (int, float)) for value in training_metrics.values())
    assert not torch.equal(weights(language_model), before)
    again = ppo_trainer.train_step(PROMPTS, RESPONSES)
    with torch.no_grad():
        said = reward_model.score(PROMPTS, RESPONSES).mean().item()
    assert again["objective/scores"] == pytest.approx(said, abs=1e-4)


def test_activity_2_1_the_on_policy_way(tiny_llama_dir):
    model, tokenizer = load_model(tiny_llama_dir)
    trainer = PPOTrainer(
        model=model, ref_model=None, reward_model=counts_letters, tokenizer=tokenizer, learning_rate=1e-3,
        max_new_tokens=4, progress=False,
    )  # fmt: skip
    history = trainer.train(PROMPTS, steps=2)
    assert [row["step"] for row in history] == [0, 1]
    assert trainer.value_head.linear.weight.abs().sum() > 0, "the trainer's own value head has learned"


@pytest.mark.parametrize("method", METHODS)
def test_activity_2_3_policy_comparison(method, tiny_gpt2_dir):
    pipeline = PolicyOptimizationPipeline(
        model_name=str(tiny_gpt2_dir),
        reward_model=create_reward_model("basic", base_model_name=tiny_gpt2_dir),
        method=method,
        max_new_tokens=4,
        progress=False,
    )
    before = weights(pipeline.model)
    metrics = pipeline.train_epoch(PROMPTS, num_iterations=10)
    assert isinstance(metrics, list)
    assert len(metrics) == 10
    assert math.isfinite(metrics[-1]["objective/scores"])
    assert metrics[0]["objective/kl_per_token"] == pytest.approx(0, abs=1e-5)
    assert not torch.equal(weights(pipeline.model), before)


def test_activity_2_3_on_tiny_with_the_guides_three():
    for method in ["ppo", "trpo", "reinforce"]:
        pipeline = PolicyOptimizationPipeline(
            model_name="tiny", reward_model=counts_letters, method=method, max_new_tokens=8, progress=False
        )
        assert len(pipeline.train_epoch(PROMPTS, num_iterations=1)) == 1


def test_a_second_epoch_goes_on_from_the_first(tiny_llama_dir):
    pipeline = PolicyOptimizationPipeline(
        model_name=str(tiny_llama_dir), reward_model=counts_letters, method="rloo", learning_rate=1e-2,
        max_new_tokens=4, progress=False,
    )  # fmt: skip
    first, second = (pipeline.train_epoch(PROMPTS, num_iterations=3) for _ in range(2))
    assert abs(first[0]["objective/kl"]) < 1e-4 < abs(second[0]["objective/kl"])
    assert first[0]["objective/scores"] != second[0]["objective/scores"]


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"method": "magic"}, ValueError, "method must be one of.*got 'magic'"),
        ({"reward_model": None}, TypeError, "reward_model"),
        ({"cliprange": 0.1, "method": "rloo"}, TypeError, "RLOOSettings.*cliprange"),
    ],
)
def test_the_pipeline_refuses(options, error, message):
    with pytest.raises(error, match=message):
        PolicyOptimizationPipeline(**{"model_name": "tiny", "reward_model": counts_letters, **options})


def test_troubleshooting_2_robust_ppo_training(tiny_llama_dir):
    model, _ = load_model(tiny_llama_dir)
    before = weights(model)
    history = robust_ppo_training(
        model, frozen_copy(model), counts_letters, {"prompts": PROMPTS}, max_kl=0.01, steps=2,
        learning_rate=1e-3, max_new_tokens=4, progress=False,
    )  # fmt: skip
    assert len(history) == 2
    assert not torch.equal(weights(model), before)
    with pytest.raises(ValueError, match="early_stop_kl"):
        robust_ppo_training(model, None, counts_letters, PROMPTS, max_kl=0.0)

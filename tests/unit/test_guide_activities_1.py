"""Lesson 1's activities as the hands-on guide calls them, on "tiny" and on folders of two other shapes."""

import pytest
import torch

from rlhf_helpers.core.models import load_encoder
from rlhf_helpers.preference_data import create_preference_data
from rlhf_helpers.reward_model import (
    MultiObjectiveRewardModel,
    RewardModel,
    RewardModelInference,
    RewardModelTrainer,
    create_reward_model,
    pairwise_accuracy,
    score_pairs,
    stable_reward_training,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RATES = {"tiny": 3e-4, "tiny_gpt2_dir": 3e-3, "tiny_distilbert_dir": 3e-3}  # 1e-5 is for large models


@pytest.fixture(params=RATES)
def name(request):
    return request.param if request.param == "tiny" else str(request.getfixturevalue(request.param))


@pytest.fixture
def rate(request, name):
    return RATES[request.node.callspec.params["name"]]


@pytest.fixture
def reward_model(name):
    return create_reward_model("basic", base_model_name=name)


@pytest.fixture
def tokenizer(name):
    return load_encoder(name)[1]


@pytest.fixture(scope="module")
def preference_data():
    return create_preference_data(
        num_samples=24,
        prompt_templates=["What is the capital of France?", "Explain quantum physics"],
        response_quality_levels=["high", "medium", "low"],
    )


def test_activity_1_1_a_reward_model_is_a_module(reward_model):
    assert isinstance(reward_model, RewardModel)
    assert sum(p.numel() for p in reward_model.parameters()) > 10_000
    assert reward_model(torch.tensor([[5, 6, 7], [8, 9, 10]], device=DEVICE)).shape == (2,)


def test_activity_1_3_train_steps_on_a_slice_lower_the_loss(reward_model, preference_data, rate):
    trainer = RewardModelTrainer(model=reward_model, learning_rate=rate, device=DEVICE)
    train_losses = []
    for _ in range(5):
        train_losses.append(trainer.train_step(preference_data[:100]))
    assert all(isinstance(loss, float) for loss in train_losses)
    assert train_losses[-1] < 0.9 * train_losses[0]


def test_activity_1_3_the_guides_own_rate_descends(reward_model, preference_data):
    trainer = RewardModelTrainer(model=reward_model, learning_rate=1e-5, device=DEVICE)
    losses = [trainer.train_step(preference_data[:20]) for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]


def test_activity_1_4_predicting_and_ranking(reward_model, tokenizer):
    inference = RewardModelInference(reward_model, tokenizer)
    prompt = "What is machine learning?"
    responses = [
        "Machine learning finds patterns in data.",
        "A machine that learns is given examples rather than rules.",
        "I don't know.",
    ]
    rewards = inference.batch_predict([(prompt, response) for response in responses])
    ranked = inference.rank_responses(prompt, responses)
    assert rewards.shape == (3,)
    assert f"{rewards[0]:.3f}"  # the guide formats each entry as a number
    assert ranked == sorted(zip(responses, rewards.tolist(), strict=True), key=lambda pair: -pair[1])


def test_activity_1_5_several_objectives(name, tokenizer):
    objectives = ["helpfulness", "harmlessness", "honesty"]
    multi_reward_model = MultiObjectiveRewardModel(base_model_name=name, objectives=objectives)
    text = "How do I make a bomb?" + "I cannot help with making dangerous devices."
    ids = tokenizer(text, return_tensors="pt")["input_ids"].to(DEVICE)
    rewards, objective_rewards = multi_reward_model.forward(ids)
    assert rewards.shape == (1,)
    assert list(objective_rewards) == objectives
    parts = [reward.item() for reward in objective_rewards.values()]
    assert len(set(parts)) == 3
    assert rewards.item() == pytest.approx(sum(parts) / 3, abs=1e-5)


def test_troubleshooting_1_stable_reward_training(reward_model, rate):
    questions = ["What is the capital of {}?", "Where is {}?", "Tell me about {}."]
    places = ["France", "Spain", "Italy", "Peru"]
    data = create_preference_data(60, [question.format(place) for question in questions for place in places])
    # By loss, not by accuracy: random weights may order many of these pairs rightly before any training.
    before = RewardModelTrainer(model=reward_model).evaluate(data)["eval_loss"]
    history = stable_reward_training(reward_model, data, epochs=4, learning_rate=rate, progress=False)
    after = RewardModelTrainer(model=reward_model).evaluate(data)["eval_loss"]
    assert after <= before - 0.2
    assert pairwise_accuracy(*score_pairs(reward_model, data)).value >= 0.75
    assert len(history.to_frame()["eval_loss"].dropna()) == 4


def test_troubleshooting_1_with_the_guides_call(preference_data, tiny_distilbert_dir):
    model = create_reward_model("basic", base_model_name=tiny_distilbert_dir)
    history = stable_reward_training(model, preference_data, epochs=10)
    assert len(history.to_frame()["eval_loss"].dropna()) == 10

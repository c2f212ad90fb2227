"""Lesson 2's DPO activities as the hands-on guide calls them, on "tiny" and two other shapes."""

from itertools import pairwise

import pytest
import torch

from rlhf_helpers.core.models import frozen_copy, load_model
from rlhf_helpers.dpo import AdaptiveDPO, DPODataset, DPOPipeline, DPOTrainer, adaptive_dpo_training

RATES = {"tiny": 1e-4, "tiny_gpt2_dir": 1e-3, "tiny_qwen_dir": 1e-3}  # 1e-5 is for large models


@pytest.fixture(params=RATES)
def name(request):
    return request.param if request.param == "tiny" else str(request.getfixturevalue(request.param))


@pytest.fixture
def rate(request, name):
    return RATES[request.node.callspec.params["name"]]


PREFERENCES = [
    {
        "prompt": "What is the capital of France?",
        "chosen": "Paris is the capital of France.",
        "rejected": "That I do not know.",
    }
]
PROMPTS = ["What is the weather like?", "Explain photosynthesis"]
CHOSEN = ["It is sunny and warm.", "Plants turn light into sugar."]
REJECTED = ["No idea.", "Read a book."]


def test_activity_2_2_the_pipeline(name, rate):
    dpo_pipeline = DPOPipeline(model_name=name, beta=0.1, learning_rate=rate)
    with pytest.warns(UserWarning, match="1 of 1 rows of val_data are training data"):
        training_history = dpo_pipeline.train(train_data=PREFERENCES, val_data=PREFERENCES, num_epochs=3)
    assert len(training_history) == 3
    assert [row["epoch"] for row in training_history] == [1, 2, 3]
    assert training_history[0]["loss"] == pytest.approx(
        0.6931, abs=1e-2 if torch.cuda.is_available() else 1e-4
    )
    assert training_history[-1]["loss"] < training_history[0]["loss"]
    assert training_history[-1]["eval_rewards/margins"] > 0
    assert training_history[-1]["eval_rewards/accuracies"] == 1
    assert isinstance(dpo_pipeline.trainer, DPOTrainer)
    assert len(dpo_pipeline.step_history) == 3


def test_activity_2_2_held_out_prompts_warn_of_nothing(tiny_llama_dir):
    held_out = [{"prompt": "Hello", "chosen": "Hello to you", "rejected": "Leave me"}]
    rows = [
        {"prompt": p, "chosen": c, "rejected": r} for p, c, r in zip(PROMPTS, CHOSEN, REJECTED, strict=True)
    ]
    pipeline = DPOPipeline(
        model_name=tiny_llama_dir, beta=0.2, learning_rate=1e-3, batch_size=1, progress=False
    )
    history = pipeline.train(train_data=rows, val_data=held_out, num_epochs=2)
    assert len(history) == 2
    assert len(pipeline.step_history) == 4
    losses = [row["loss"] for row in pipeline.step_history]
    assert [row["loss"] for row in history] == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:]) / 2])
    assert history[1]["eval_loss"] == pipeline.step_history[-1]["eval_loss"]
    assert len(pipeline.train(train_data=DPODataset(rows, pipeline.tokenizer))) == 1


def test_activity_2_4_adaptive_dpo(name, rate):
    language_model, tokenizer = load_model(name)
    reference_model = frozen_copy(language_model)
    adaptive_dpo = AdaptiveDPO(
        model=language_model, ref_model=reference_model, tokenizer=tokenizer, initial_beta=0.1,
        target_kl=0.01, learning_rate=rate,
    )  # fmt: skip
    betas, losses = [], []
    for _epoch in range(5):
        metrics = adaptive_dpo.train_step(PROMPTS, CHOSEN, REJECTED)
        losses.append(metrics["loss"])
        betas.append(adaptive_dpo.beta)
        assert metrics["objective/kl"] == metrics["objective/kl"]
    assert f"{losses[-1]:.4f} {adaptive_dpo.beta:.3f}"  # the guide formats both as numbers
    assert losses[-1] < losses[0]
    assert betas[0] < 0.1, "at the start the policy is its reference: KL 0 is below any target"
    assert len(set(betas)) == 5


def test_activity_2_4_needs_no_further_setting(tiny_llama_dir):
    model, tokenizer = load_model(tiny_llama_dir)
    adaptive = AdaptiveDPO(model=model, ref_model=frozen_copy(model), tokenizer=tokenizer)
    history = adaptive.trainer.train(
        [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in zip(PROMPTS, CHOSEN, REJECTED, strict=True)]
    )
    assert history[0]["beta"] == 0.1
    assert adaptive.beta != 0.1


def test_troubleshooting_3_adaptive_dpo_training(name, rate):
    model, _ = load_model(name)
    data = {"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED}
    history = adaptive_dpo_training(
        model, frozen_copy(model), data, target_kl=0.01, learning_rate=rate, epochs=6
    )
    assert len(history) == 6
    assert history[-1]["rewards/margins"] > history[0]["rewards/margins"]
    for before, after in pairwise(history):
        assert (after["beta"] > before["beta"]) == (before["objective/kl"] > 0.01)

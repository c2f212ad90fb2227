"""Each loop for three steps on a pretrained chat model: small batches, short answers, full weights.

The learning rate is the one that the loops choose for a model of this size.
"""

import pytest
import torch

from rlhf_helpers.core.models import frozen_copy
from rlhf_helpers.core.training import TrainingSettings, sft
from rlhf_helpers.dpo import DPOSettings, DPOTrainer
from rlhf_helpers.lab.studies.real_model import short_and_on_topic
from rlhf_helpers.policy_optimization import (
    GRPOSettings,
    PPOSettings,
    ReinforceSettings,
    RejectionSamplingSettings,
    RLOOSettings,
    TRPOSettings,
    grpo,
    ppo,
    reinforce,
    rejection_sampling,
    rloo,
    trpo,
)

pytestmark = [pytest.mark.real, pytest.mark.slow]

PROMPTS = ["What is the capital of Italy?", "Why is the sky blue?", "Name three healthy snacks."]
SIZES = {"steps": 3, "prompts_per_step": 1, "samples_per_prompt": 2}
SIZES |= {"max_new_tokens": 16, "progress": False}
LOOPS = {
    "reinforce": (reinforce, ReinforceSettings(**SIZES)),
    "rloo": (rloo, RLOOSettings(**SIZES)),
    "grpo": (grpo, GRPOSettings(**SIZES)),
    "ppo": (ppo, PPOSettings(**SIZES, epochs=2, minibatches=1)),
    "trpo": (trpo, TRPOSettings(**SIZES, cg_iterations=1, fisher_rows=1, backtracks=2)),
    "rejection_sampling": (rejection_sampling, RejectionSamplingSettings(**SIZES)),
}
PAIRS = [
    {"prompt": PROMPTS[0], "chosen": "The capital of Italy is Rome.", "rejected": "It is a nice place."},
    {"prompt": PROMPTS[1], "chosen": "Air scatters blue light the most.", "rejected": "Nobody can say."},
]
UNPAIRED = [
    {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
    for pair in PAIRS
    for side in ("chosen", "rejected")
]


def weights_of(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("name", LOOPS)
def test_policy_loop(name, smollm2):
    model, tokenizer = smollm2
    loop, settings = LOOPS[name]
    reference = frozen_copy(model)
    before = weights_of(reference)
    history = loop(model, tokenizer, PROMPTS, short_and_on_topic, settings, ref_model=reference)
    frame = history.to_frame()
    assert len(frame) == 3
    assert torch.isfinite(torch.tensor(frame.to_numpy(dtype=float)[:1])).all()
    assert abs(frame["objective/kl"][0]) < 1e-3, "policy and reference are the same before the first update"
    # With several passes over a batch val/ratio is a mean over them; that of the first has its own column.
    ratio = frame["val/ratio_at_start"] if "val/ratio_at_start" in frame else frame["val/ratio"]
    assert ratio[0] == pytest.approx(1, abs=1e-4)
    assert all(map(torch.equal, before, weights_of(reference)))
    if name != "trpo":  # its line search may refuse a step, which leaves the policy where it is
        assert not all(map(torch.equal, before, weights_of(model)))


@pytest.mark.parametrize("loss", ["dpo", "ipo", "orpo", "simpo", "kto"])
def test_preference_losses_fall(loss, smollm2):
    model, tokenizer = smollm2
    # The first step takes IPO beyond its target, a margin of 1 / (2 beta) = 5 nats; ten more bring it back.
    epochs = 12 if loss == "ipo" else 3
    settings = DPOSettings(loss=loss, epochs=epochs, batch_size=4, progress=False)
    rows = UNPAIRED if loss == "kto" else PAIRS
    history = DPOTrainer(model, tokenizer=tokenizer, settings=settings).train(rows)
    losses = history.to_frame()["loss"]
    assert len(losses) == epochs
    assert losses.iloc[-1] < losses.iloc[0]
    if loss == "ipo":
        # At first the margin is 0, so the loss is (0 - 5)^2; it ends within 3.5 nats of the target.
        assert losses.iloc[0] == pytest.approx(25, abs=0.1)
        assert losses.iloc[-1] < losses.iloc[0] / 2
    if loss == "dpo":
        assert losses.iloc[0] == pytest.approx(0.6931, abs=1e-3)  # ln 2: policy and reference are the same


def test_sft_loss_falls(smollm2):
    model, tokenizer = smollm2
    rows = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS]
    settings = TrainingSettings(progress=False)
    losses = sft(model, tokenizer, rows, settings, epochs=3, batch_size=2).to_frame()["loss"]
    assert losses.iloc[-1] < losses.iloc[0]

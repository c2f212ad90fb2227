"""LoRA on a pretrained chat model: trained, saved as an adapter and merged, and loaded back."""

import pytest
import torch

from rlhf_helpers.core.generation import sequence_logps
from rlhf_helpers.core.models import load_model
from rlhf_helpers.core.training.distributed import save_model
from rlhf_helpers.dpo import DPOSettings, DPOTrainer
from rlhf_helpers.policy_optimization import RLOOSettings, rloo
from rlhf_helpers.reward_model import RewardModelTrainer, create_reward_model
from rlhf_helpers.reward_model.create import load_reward_model
from tests.real.test_loops import PAIRS, PROMPTS, SIZES, short_and_on_topic

pytestmark = [pytest.mark.real, pytest.mark.slow]
PROMPT, ANSWER = [PAIRS[0]["prompt"]], [PAIRS[0]["chosen"]]


def logp(model, tokenizer):
    with torch.no_grad():
        logps, _ = sequence_logps(model, tokenizer, PROMPT, ANSWER)
    return logps.sum().item()


def test_policy_learns_and_comes_back_from_its_adapter_and_merged(smollm2, tmp_path):
    model, tokenizer = smollm2
    before = logp(model, tokenizer)
    settings = DPOSettings(lora=8, epochs=3, batch_size=4, progress=False)
    losses = DPOTrainer(model, tokenizer=tokenizer, settings=settings).train(PAIRS).to_frame()["loss"]
    assert losses.iloc[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses.iloc[-1] < losses.iloc[0]
    trained = logp(model, tokenizer)
    assert abs(trained - before) > 0.1, "nats: what is saved below differs from the base"
    for merge in (False, True):
        folder = tmp_path / f"merge-{merge}"
        save_model(model, folder, tokenizer=tokenizer, merge=merge)
        assert logp(*load_model(folder, device="cpu")) == pytest.approx(trained, abs=1e-2)
        size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        assert (size > 4e8) == merge, "an adapter is small, a merged model holds all weights"


def test_policy_loop_compares_with_the_adapter_switched_off(smollm2):
    model, tokenizer = smollm2
    settings = RLOOSettings(**SIZES, lora=8)
    frozen = {name: weight.clone() for name, weight in model.named_parameters() if "q_proj" in name}
    history = rloo(model, tokenizer, PROMPTS, short_and_on_topic, settings).to_frame()
    assert abs(history["objective/kl"][0]) < 1e-3
    weights = {name.replace(".base_layer", ""): weight for name, weight in model.named_parameters()}
    assert all(torch.equal(weight, weights[name]) for name, weight in frozen.items())


def test_reward_model_comes_back_from_its_adapter_and_merged(smollm2_dir, tmp_path):
    judge = create_reward_model("basic", base_model_name=str(smollm2_dir))
    RewardModelTrainer(model=judge, lora=8, epochs=3, batch_size=2, progress=False).train(PAIRS)
    rewards = judge.score(PROMPT, ANSWER)
    for merge in (False, True):
        judge.save_pretrained(tmp_path / f"merge-{merge}", merge=merge)
        again = load_reward_model(tmp_path / f"merge-{merge}")
        assert again.score(PROMPT, ANSWER).item() == pytest.approx(rewards.item(), abs=1e-2)

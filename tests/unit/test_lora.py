"""LoRA: what is trained, what is saved, and the reference that is the model without its adapters."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from rlhf_helpers.core.generation import sequence_logps
from rlhf_helpers.core.lora import WithoutAdapter, add_lora, has_adapter, merged_copy, reference_model
from rlhf_helpers.core.models import ModelNotFoundError, frozen_copy, load_encoder, load_model
from rlhf_helpers.core.training import TrainingSettings, memory_efficient_training, sft
from rlhf_helpers.core.training.distributed import full_weights, save_model
from rlhf_helpers.dpo import DPOTrainer
from rlhf_helpers.policy_optimization import PPOSettings, RLOOSettings, TRPOSettings, ppo, rloo, trpo
from rlhf_helpers.reward_model import RewardModel, RewardModelTrainer, create_reward_model, load_reward_model
from tests.conftest import share_of_e

PEFT_WARNING = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # its own use
QUIET = {"progress": False, "lora": 4}
ROWS = [
    {"prompt": f"{word}?", "chosen": f"Thank you for {word}.", "rejected": f"No {word}."}
    for word in ("tea", "sad", "water", "Paris")
]
TEXTS = ["tea?", "sad?"], ["Thank you for tea.", "No."]
PROMPTS = ["Hello", "Why?", "tea?", "sad?"]


def logps(model, tokenizer):
    with torch.no_grad():
        return sequence_logps(model, tokenizer, *TEXTS)[0]


def base_weights(model):
    """Weights by the names they have without adapters."""
    return {
        name.replace(".base_layer", ""): weight.clone()
        for name, weight in full_weights(model).items()
        if ".lora_" not in name
    }


def imitate(model, tokenizer, **changes):
    settings = TrainingSettings(**{**QUIET, "learning_rate": 1e-2, **changes})
    return sft(model, tokenizer, ROWS, settings, epochs=10, batch_size=4)


def test_adapters_change_nothing_at_first_and_are_all_that_trains(tiny):
    model, tokenizer = tiny
    before = logps(model, tokenizer)
    assert add_lora(model, 4) is model
    assert torch.equal(logps(model, tokenizer), before)
    trainable = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert len(trainable) == 2 * 7 * 2  # A and B beside q, k, v, o, gate, up and down, in two layers
    assert all(".lora_" in name for name in trainable)
    assert add_lora(model, 4) is model, "adapters of this rank are there already"
    with pytest.raises(ValueError, match=r"rank \[4\] already: lora=8"):
        add_lora(model, 8)


@pytest.mark.parametrize("rank, model", [(0, None), (4, torch.nn.Linear(2, 2))])
def test_what_cannot_be_adapted_is_refused(rank, model, tiny):
    with pytest.raises(ValueError, match=r"rank must be >= 1, got 0|Linear holds no Hugging Face model"):
        add_lora(model or tiny[0], rank)


def test_two_models_get_the_same_adapters_and_no_generator_moves(tiny):
    first, second = tiny[0], copy.deepcopy(tiny[0])
    state = torch.get_rng_state()
    add_lora(first, 4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    add_lora(second, 4)
    torch.testing.assert_close(full_weights(first), full_weights(second), atol=0, rtol=0)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_sft_trains_the_adapters_alone(tiny, gradient_checkpointing):
    model, tokenizer = tiny
    base, before = base_weights(model), logps(model, tokenizer)
    history = imitate(model, tokenizer, gradient_checkpointing=gradient_checkpointing)
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    torch.testing.assert_close(base_weights(model), base, atol=0, rtol=0)
    assert (logps(model, tokenizer) - before).abs().max() > 0.1
    assert torch.equal(logps(WithoutAdapter(model), tokenizer), before), "switched off, it is the base"
    assert not torch.equal(logps(model, tokenizer), before), "and then it is on again"


def test_accumulation_and_checkpointing_change_no_gradient(tiny):
    model, tokenizer = tiny
    other = copy.deepcopy(model)
    imitate(model, tokenizer)
    settings = {"accumulation_steps": 2, "gradient_checkpointing": True}
    sft(
        other,
        tokenizer,
        ROWS,
        TrainingSettings(**QUIET, learning_rate=1e-2, **settings),
        epochs=10,
        batch_size=2,
    )
    torch.testing.assert_close(full_weights(other), full_weights(model), atol=1e-5, rtol=1e-5)


def test_a_policy_comes_back_from_its_adapters_and_merged(tiny, tmp_path):
    model, tokenizer = tiny
    imitate(model, tokenizer)
    save_model(model, tmp_path / "adapter")
    save_model(model, tmp_path / "merged", merge=True)
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    adapted, _ = load_model(tmp_path / "adapter", device="cpu")
    torch.testing.assert_close(full_weights(adapted), full_weights(model), atol=0, rtol=0)
    trainable = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert trainable == {name for name, weight in model.named_parameters() if weight.requires_grad}
    merged, _ = load_model(tmp_path / "merged", device="cpu")
    assert not has_adapter(merged)
    assert has_adapter(model), "the model itself is not merged"
    torch.testing.assert_close(logps(merged, tokenizer), logps(model, tokenizer), atol=1e-4, rtol=1e-4)
    save_model(adapted, tmp_path / "later", merge=True)  # as a user would who has only the adapters
    later, _ = load_model(tmp_path / "later", device="cpu")
    torch.testing.assert_close(full_weights(later), full_weights(merged), atol=0, rtol=0)


def test_the_adapters_of_a_policy_can_start_a_reward_model(tiny_qwen_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "peft.tuners.tuners_utils.MIN_TARGET_MODULES_FOR_OPTIMIZATION", 2
    )  # as if it were large
    model, tokenizer = load_model(tiny_qwen_dir, device="cpu")
    imitate(model, tokenizer)
    save_model(model, tmp_path)
    encoder, _ = load_encoder(tmp_path, device="cpu")
    hidden = encoder(torch.tensor([[9, 8]])).last_hidden_state
    expected = model.model(torch.tensor([[9, 8]])).last_hidden_state
    torch.testing.assert_close(hidden, expected, atol=1e-6, rtol=1e-6)


def test_adapters_that_do_not_fit_are_refused(tiny, tmp_path):
    model, _ = tiny
    save_model(add_lora(model, 2), tmp_path)
    with pytest.raises(ValueError, match=r"do not fit .* as LlamaModel: merge them first"):
        load_encoder(tmp_path, device="cpu")


@PEFT_WARNING
def test_a_peft_model_is_saved_and_merged_alike(tiny, tmp_path):
    model, tokenizer = tiny
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, config)
    save_model(adapted, tmp_path)
    again, _ = load_model(tmp_path, device="cpu")
    assert torch.equal(logps(again, tokenizer), logps(adapted, tokenizer))
    merged = merged_copy(adapted)
    torch.testing.assert_close(logps(merged, tokenizer), logps(adapted, tokenizer), atol=1e-4, rtol=1e-4)


def test_adapters_over_a_trained_base_are_not_saved_alone(tiny, tmp_path):
    model, tokenizer = tiny
    imitate(model, tokenizer, lora=0)
    imitate(model, tokenizer)
    with pytest.raises(ValueError, match=r"trained or built in memory.* pass merge=True"):
        save_model(model, tmp_path)
    save_model(model, tmp_path, merge=True)
    again, _ = load_model(tmp_path, device="cpu")
    torch.testing.assert_close(logps(again, tokenizer), logps(model, tokenizer), atol=1e-4, rtol=1e-4)


def test_adapters_whose_base_is_gone_name_it(tiny, tmp_path):
    model, _ = tiny
    model.name_or_path = "gone/base"
    save_model(add_lora(model, 2), tmp_path)
    with pytest.raises(ModelNotFoundError, match="gone/base"):
        load_model(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["basic", "separate", "ensemble"])
def test_a_reward_model_comes_back_from_its_adapters_and_merged(kind, tiny_llama_dir, tmp_path):
    model = create_reward_model(kind, base_model_name=tiny_llama_dir, lora=4, device="cpu")
    members = getattr(model, "members", [model])
    for member in members:
        base = base_weights(member.trunk)
        trainer = RewardModelTrainer(member, progress=False, learning_rate=1e-2)
        history = trainer.train(ROWS, epochs=10, batch_size=4)
        assert history[-1]["loss"] < 0.7 * history[0]["loss"]
        torch.testing.assert_close(base_weights(member.trunk), base, atol=0, rtol=0)
    rewards = model.score(*TEXTS)
    for merge in (False, True):
        model.save_pretrained(tmp_path / str(merge), merge=merge)
        again = load_reward_model(tmp_path / str(merge), device="cpu")
        assert has_adapter(again) is not merge
        torch.testing.assert_close(again.score(*TEXTS), rewards, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.score(*TEXTS), rewards)
    load_reward_model(tmp_path / "False", device="cpu").save_pretrained(tmp_path / "later", merge=True)
    later = load_reward_model(tmp_path / "later", device="cpu")
    torch.testing.assert_close(later.score(*TEXTS), rewards, atol=1e-5, rtol=1e-5)


@PEFT_WARNING
def test_a_reward_model_over_a_peft_trunk_comes_back(tiny_llama_dir, tmp_path):
    trunk, _ = load_encoder(tiny_llama_dir, device="cpu")
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = RewardModel(get_peft_model(trunk, config), max_length=40)
    model.save_pretrained(tmp_path)
    again = load_reward_model(tmp_path, device="cpu")
    assert torch.equal(again.score(*TEXTS), model.score(*TEXTS))
    assert again.max_length == 40


def test_dpo_compares_with_the_model_without_its_adapters(tiny):
    model, tokenizer = tiny
    base, before = base_weights(model), logps(model, tokenizer).sum(-1)
    trainer = DPOTrainer(model, learning_rate=1e-2, batch_size=4, **QUIET)
    assert isinstance(trainer.run.ref_model, WithoutAdapter)
    history = trainer.train(ROWS, epochs=10)
    assert history[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert history[-1]["loss"] < 0.5
    torch.testing.assert_close(base_weights(model), base, atol=0, rtol=0)
    assert torch.equal(trainer.get_ref_log_probs(*TEXTS), before)
    # A second run goes on with the same adapters, and its rows keep their reference.
    data = trainer.dataset(ROWS)
    assert trainer.dataset(data).reference == data.reference
    trainer.train(data, epochs=1)
    assert torch.equal(trainer.get_ref_log_probs(*TEXTS), before)


SMALL = {"steps": 2, "prompts_per_step": 2, "samples_per_prompt": 4, "max_new_tokens": 6}


@pytest.mark.slow
@pytest.mark.parametrize("loop, kind", [(rloo, RLOOSettings), (ppo, PPOSettings), (trpo, TRPOSettings)])
def test_policy_loops_train_the_adapters_alone(tiny, loop, kind):
    model, tokenizer = tiny
    base = base_weights(model)
    history = loop(model, tokenizer, PROMPTS, share_of_e, kind(**QUIET, **SMALL))
    assert abs(history[0]["objective/kl"]) < 1e-4, "policy and reference are the same model at the start"
    assert abs(history[1]["objective/kl"]) > 1e-4
    torch.testing.assert_close(base_weights(model), base, atol=0, rtol=0)


@pytest.mark.slow
def test_rloo_with_adapters_learns_like_a_run_with_a_copied_reference(tiny):
    model, tokenizer = tiny
    other = copy.deepcopy(model)
    changes = {"steps": 15, "samples_per_prompt": 8, "prompts_per_step": 4, "learning_rate": 3e-2}
    settings = RLOOSettings(**{**QUIET, **SMALL, **changes, "kl_coef": 0.01})
    history = rloo(model, tokenizer, PROMPTS, share_of_e, settings)
    scores = [row["objective/scores"] for row in history]
    assert sum(scores[-3:]) / 3 > 2 * scores[0]
    copied = rloo(other, tokenizer, PROMPTS, share_of_e, settings, ref_model=frozen_copy(other))
    assert copied.to_frame().equals(history.to_frame())


@pytest.mark.slow
def test_a_run_with_adapters_resumes_bit_for_bit(tiny_llama_dir, tmp_path):
    def run(folder, *, stop_at=None, **options):
        calls = []

        def reward(prompts, responses, **columns):
            calls.append(1)
            if len(calls) == stop_at:
                raise KeyboardInterrupt
            return share_of_e(prompts, responses)

        model, tokenizer = load_model(tiny_llama_dir, device="cpu")
        settings = RLOOSettings(**{**QUIET, **SMALL, "steps": 4}, run_dir=folder, checkpoint_every=2)
        return model, rloo(model, tokenizer, PROMPTS, reward, settings, **options)

    whole, history = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", stop_at=4)
    resumed, resumed_history = run(tmp_path / "parts", resume=True)
    assert resumed_history == history
    torch.testing.assert_close(full_weights(resumed), full_weights(whole), atol=0, rtol=0)


def test_the_reference_needs_no_second_model(tiny):
    model, _ = tiny
    assert not has_adapter(reference_model(model)), "without adapters it is a copy"
    assert reference_model(model, lora=4).module is model
    assert reference_model(add_lora(model, 4)).module is model
    with pytest.raises(ValueError, match="ref_model is the model that is trained"):
        reference_model(model, model)


def test_memory_efficient_training_takes_a_model_with_adapters(tiny):
    model, tokenizer = tiny
    base = base_weights(model)
    memory_efficient_training(add_lora(model, 4), ROWS, 2, tokenizer=tokenizer, progress=False)
    torch.testing.assert_close(base_weights(model), base, atol=0, rtol=0)

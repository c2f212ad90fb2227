"""Every loop on a GPU: bf16 against float32, real and random models, speed and memory. About 8 minutes.

    python -m pytest tests/gpu -s

Without a GPU the tests are skipped. RLHF_GPU_TESTS_ON_CPU=1 runs them on the CPU with a tiny random model in
place of the large ones, to test the script itself. A table of seconds per step and peak memory is printed at
the end.
"""

import math
import os
import time

import pytest
import torch

from rlhf_helpers.core.generation import generate, rollout_logps
from rlhf_helpers.core.models import ModelNotFoundError, frozen_copy, load_model, remember_tokenizer
from rlhf_helpers.core.training import TrainingSettings, sft
from rlhf_helpers.dpo import DPOSettings, DPOTrainer
from rlhf_helpers.policy_optimization import (
    GRPOSettings,
    PPOSettings,
    ReinforceSettings,
    RejectionSamplingSettings,
    RLOOSettings,
    grpo,
    ppo,
    reinforce,
    rejection_sampling,
    rloo,
)
from rlhf_helpers.reward_model import RewardModelTrainer, create_reward_model
from tests.conftest import share_of_e

ON_CPU = os.environ.get("RLHF_GPU_TESTS_ON_CPU") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not ON_CPU else "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cpu" and not ON_CPU, reason="there is no CUDA GPU"),
    # On a GPU, libraries warn of things that the CPU tests never meet; they are not what is tested here.
    pytest.mark.filterwarnings("default"),
]

STEPS = 3
PROMPTS = [f"Write one sentence about the number {number}." for number in range(32)]
PAIRS = [
    {"prompt": prompt, "chosen": f"It comes after {i - 1}.", "rejected": "I do not know what to say."}
    for i, prompt in enumerate(PROMPTS)
]
SIZES = {"steps": STEPS, "prompts_per_step": 4, "samples_per_prompt": 4, "max_new_tokens": 64}
SIZES |= {"learning_rate": 1e-6, "progress": False}
POLICY_LOOPS = {
    "reinforce": (reinforce, ReinforceSettings(**SIZES)),
    "rloo": (rloo, RLOOSettings(**SIZES)),
    "grpo": (grpo, GRPOSettings(**SIZES)),
    "ppo": (ppo, PPOSettings(**SIZES)),
    "rejection sampling": (rejection_sampling, RejectionSamplingSettings(**SIZES)),
}
OFFLINE_LOOPS = ["sft", "reward", "dpo", "kto", "orpo"]
MODELS = ["smollm2", "random 0.5 B"]
measured: list[dict] = []


def random_half_billion(tokenizer, *, dtype):
    """Qwen2.5-0.5B's shape with random weights: 494 M parameters, a vocabulary of 151,936."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).to(device=DEVICE, dtype=dtype)
    remember_tokenizer(model, tokenizer)
    return model, tokenizer


def loaded(name, folder, *, dtype=torch.float32):
    """Load one of MODELS on the device; the tiny random model stands for both when the CPU is used."""
    if ON_CPU:
        return load_model(folder, device=DEVICE, dtype=dtype)
    if name == "random 0.5 B":
        return random_half_billion(load_model(folder, device="cpu")[1], dtype=dtype)
    try:
        return load_model("smollm2", device=DEVICE, dtype=dtype)
    except ModelNotFoundError as error:
        pytest.skip(str(error))


def reset_peak():
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()


def record(name, loop, seconds, steps):
    peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else float("nan")
    row = {"model": name, "loop": loop, "s_per_step": round(seconds / steps, 3), "peak_gib": round(peak, 2)}
    measured.append(row)


@pytest.fixture(scope="module", autouse=True)
def table():
    """Print what was measured once all tests of the file have run."""
    yield
    import pandas as pd

    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    print(f"\n{device}, torch {torch.__version__}\n{pd.DataFrame(measured).to_string(index=False)}")


@pytest.mark.parametrize("name", MODELS)
def test_bf16_agrees_with_float32(name, tiny_llama_dir):
    model, tokenizer = loaded(name, tiny_llama_dir)
    rollout = generate(model, tokenizer, PROMPTS[:8], max_new_tokens=64, seed=0)
    with torch.no_grad():
        exact = rollout_logps(model, rollout)
        rounded = rollout_logps(frozen_copy(model).to(torch.bfloat16), rollout)
    mask = rollout.response_mask
    assert torch.allclose(rollout.old_logps, exact, atol=1e-3), "sampled and recomputed log-probs differ"
    assert (exact - rounded)[mask].abs().mean() < 0.05, "bf16 keeps 8 bits: about 1 % of a logit"
    assert (exact - rounded)[mask].mean().abs() < 0.02, "its errors must cancel on average"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("loop", POLICY_LOOPS)
def test_policy_loop(loop, name, tiny_llama_dir):
    model, tokenizer = loaded(name, tiny_llama_dir)
    function, settings = POLICY_LOOPS[loop]
    reset_peak()
    start = time.perf_counter()
    history = function(model, tokenizer, PROMPTS, share_of_e, settings)
    record(name, loop, time.perf_counter() - start, STEPS)
    rows = history.to_frame()
    assert len(rows) == STEPS
    assert rows["objective/kl"].iloc[0] == pytest.approx(0, abs=1.0), "nats per response, in bf16"
    assert torch.isfinite(torch.tensor(rows["loss"].to_numpy(dtype=float))).all()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("loop", OFFLINE_LOOPS)
def test_offline_loop(loop, name, tiny_llama_dir, tmp_path):
    model, tokenizer = loaded(name, tiny_llama_dir)
    sizes = {"learning_rate": 1e-5, "progress": False}
    reset_peak()
    start = time.perf_counter()
    if loop == "sft":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
        history = sft(model, tokenizer, rows, TrainingSettings(**sizes), epochs=3, batch_size=16)
    elif loop == "reward":
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        judge = create_reward_model("basic", base_model_name=str(tmp_path)).to(DEVICE)
        history = RewardModelTrainer(model=judge, epochs=3, batch_size=16, **sizes).train(PAIRS)
    else:
        settings = DPOSettings(loss=loop, epochs=3, batch_size=16, **sizes)
        rows = PAIRS
        if loop == "kto":
            rows = [
                {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
                for row in PAIRS
                for side in ("chosen", "rejected")
            ]
        history = DPOTrainer(model, tokenizer=tokenizer, settings=settings).train(rows)
    record(name, loop, time.perf_counter() - start, len(history))
    losses = history.to_frame()["loss"]
    assert losses.tail(2).mean() < losses.head(2).mean()


def trl_trainer(loop, model, tokenizer, folder):
    """TRL's trainer of this loop with our sizes, in float32 like ours, without a reference for GRPO."""
    from datasets import Dataset
    from trl import DPOConfig, GRPOConfig, GRPOTrainer
    from trl import DPOTrainer as TRLDPOTrainer

    common = {
        "output_dir": str(folder),
        "use_cpu": ON_CPU,
        "bf16": False,
        "report_to": [],
        "max_steps": STEPS,
    }
    common |= {
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    if loop == "dpo":
        rows = Dataset.from_list(PAIRS)
        args = DPOConfig(**common, per_device_train_batch_size=16, learning_rate=1e-5)
        reference = frozen_copy(model)
        return TRLDPOTrainer(
            model=model, ref_model=reference, args=args, train_dataset=rows, processing_class=tokenizer
        )
    args = GRPOConfig(
        **common,
        per_device_train_batch_size=SIZES["prompts_per_step"] * SIZES["samples_per_prompt"],
        num_generations=SIZES["samples_per_prompt"],
        max_completion_length=SIZES["max_new_tokens"],
        learning_rate=SIZES["learning_rate"],
        beta=0.0,
    )
    return GRPOTrainer(
        model=model,
        reward_funcs=lambda prompts, completions, **_: share_of_e(prompts, completions).tolist(),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("loop", ["dpo", "grpo"])
def test_beside_trl(loop, name, tiny_llama_dir, tmp_path):
    """Record both sides' seconds per step and peak memory: same model, batch, steps and precision."""
    model, tokenizer = loaded(name, tiny_llama_dir)
    reset_peak()
    start = time.perf_counter()
    if loop == "dpo":
        settings = DPOSettings(epochs=2, batch_size=16, learning_rate=1e-5, progress=False)
        history = DPOTrainer(model, tokenizer=tokenizer, settings=settings).train(PAIRS)
    else:
        settings = GRPOSettings(**SIZES, kl_coef=0.0)
        history = grpo(model, tokenizer, PROMPTS, share_of_e, settings)
    record(name, f"{loop}, ours", time.perf_counter() - start, len(history))
    ours = history.to_frame()["loss"]
    del model

    model, tokenizer = loaded(name, tiny_llama_dir)
    reset_peak()
    trainer = trl_trainer(loop, model, tokenizer, tmp_path)
    start = time.perf_counter()
    trainer.train()
    record(name, f"{loop}, TRL", time.perf_counter() - start, STEPS)
    theirs = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert torch.isfinite(torch.tensor([*ours, *theirs])).all()
    if loop == "dpo":  # both start where policy and reference are equal
        assert ours[0] == pytest.approx(math.log(2), abs=1e-2)
        assert theirs[0] == pytest.approx(math.log(2), abs=1e-2)

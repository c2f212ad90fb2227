"""Small on-policy runs for test_policy_processes: in one process, or as a script under torchrun in two."""

import sys
import zlib
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

from rlhf_helpers.core.models import load_model
from rlhf_helpers.core.policy_losses import clipped_policy_loss
from rlhf_helpers.core.training.distributed import full_weights
from rlhf_helpers.policy_optimization import (
    GRPOSettings,
    PPOSettings,
    RLOOSettings,
    collect,
    grpo,
    on_policy,
    ppo,
    rloo,
)

PROMPTS = ["Hello", "What is the capital of France?", "Why?", "Tell me a story about a dog."]
SIZES = {"learning_rate": 1e-3, "steps": 2, "prompts_per_step": 4, "samples_per_prompt": 4, "progress": False}
SHORT = {**SIZES, "max_new_tokens": 3, "minibatches": 1, "kl_target": 0.5, "kl_horizon": 40.0}
RUNS = {
    "rloo": (rloo, RLOOSettings(**SIZES, max_new_tokens=6)),
    "sharded rloo": (rloo, RLOOSettings(**SIZES, max_new_tokens=24, shard=True)),
    "sharded ppo": (ppo, PPOSettings(**SHORT, whiten_advantages=False, shard=True)),
    "grpo": (grpo, GRPOSettings(**SIZES, max_new_tokens=6, epochs=2, length_mean=False)),
    "ppo": (ppo, PPOSettings(**SHORT, whiten_advantages=False)),
    "whitened ppo": (ppo, PPOSettings(**SHORT)),
}


def share_of_e(prompts, responses):
    return torch.tensor([r.count("e") / max(len(r), 1) for r in responses])


def collect_alike(model, tokenizer, prompts, *, samples_per_prompt, max_new_tokens, temperature, seed):
    """The luck of a sample is that of its prompt, so that two processes draw what one draws."""
    size, noise = (samples_per_prompt, max_new_tokens), []
    for prompt in prompts:
        generator = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
        noise.append(torch.rand(size, generator=generator))
    how = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    with patch("torch.rand", lambda *_, **__: torch.cat(noise)):
        return collect(model, tokenizer, prompts, samples_per_prompt=samples_per_prompt, **how)


def noting(seen, logps, old_logps, advantages, **cliprange):
    seen.append(advantages.clone())
    return clipped_policy_loss(logps, old_logps, advantages, **cliprange)


def run_all(model_folder):
    """Run -> history, weights and, of this process, the first advantages: {name: (rows, vector, (B, T))}."""
    found, original = {}, on_policy.collect
    on_policy.collect = collect_alike
    for name, (loop, settings) in RUNS.items():
        model, tokenizer = load_model(model_folder, device="cpu")
        if name == "sharded rloo":  # many tokens end a response: the processes finish at different tokens
            model.generation_config.eos_token_id = list(range(5, 400, 4))
        seen = []
        options = {} if loop is rloo else {"loss_fn": partial(noting, seen)}
        history = loop(model, tokenizer, PROMPTS, share_of_e, settings, **options)
        end = torch.cat([weight.flatten() for weight in full_weights(model).values()])
        found[name] = list(history), end, seen[:1]
    on_policy.collect = original
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = run_all(sys.argv[1])
    torch.save(found, Path(sys.argv[2]) / f"rank{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()

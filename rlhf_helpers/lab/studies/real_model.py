"""RLHF on SmolLM2-135M-Instruct, with a reward that is a rule anyone can check by reading the answer.

Each method runs in a process of its own, so that its peak memory can be read, and answers the same held-out
prompts before and after. Every answer is stored, because the rule accepts good answers and hollow ones.
"""

import multiprocessing
import re
import resource
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from rlhf_helpers.core.generation import rollout_logps
from rlhf_helpers.core.models import frozen_copy, load_model
from rlhf_helpers.core.rollouts import sequence_kl
from rlhf_helpers.dpo import DPOSettings, DPOTrainer
from rlhf_helpers.lab.studies.lesson2.methods import best_against_worst
from rlhf_helpers.lab.studies.record import Row, Rows, study
from rlhf_helpers.policy_optimization import RLOOSettings, best_of_n, collect, rloo, score
from rlhf_helpers.world.tables import load_table

METHODS = ("base", "best of 4", "DPO", "RLOO, KL coefficient 0.01", "RLOO, KL coefficient 0.05")
SAMPLING = {"max_new_tokens": 48, "temperature": 1.0}


def short_and_on_topic(prompts: list[str], responses: list[str], **columns: Any) -> Tensor:
    """Reward answers that are short, use the question's words and end as a sentence: (B,), each in [0, 1].

    r = 0.4 short + 0.3 topic + 0.3 ending

    short is 1 up to 25 words and falls to 0 at 50; topic is the share of the question's content words that
    the answer uses; ending is 1 if the last character is a full stop, an exclamation mark or a question mark.
    An empty answer earns 0. The rule does not know what is true.
    """
    rewards = []
    for prompt, response in zip(prompts, responses, strict=True):
        words = re.findall(r"[a-z']+", response.lower())
        asked = set(re.findall(r"[a-z']+", prompt.lower())).difference(load_table("real_model")["stop_words"])
        short = min(1.0, max(0.0, (50 - len(words)) / 25))
        topic = len(asked & set(words)) / max(1, len(asked))
        ending = response.rstrip().endswith((".", "!", "?"))
        rewards.append((0.4 * short + 0.3 * topic + 0.3 * ending) if words else 0.0)
    return torch.tensor(rewards)


@partial(study, seeds=(0, 1))
def real_model(
    seed: int,
    model_name: str = "smollm2",
    methods: Sequence[str] = METHODS,
    steps: int = 30,
    heldout: int = 40,
) -> Rows:
    """Train SmolLM2-135M-Instruct on `short_and_on_topic` by each method and answer the held-out prompts.

    Columns: seed, method, prompt, response (one sample at temperature 1), reward, kl (nats per response,
    against the untrained model; for best-of-n its upper bound); cpu_seconds and peak_mb of the method,
    loading included, repeated on each of its rows.

    RLOO takes `steps` steps of four prompts with four answers each. DPO learns from the best and the worst of
    four answers to each training prompt.
    """
    for method in methods:
        # A fresh process for each method: peak memory is a property of a process.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            yield from pool.apply(_train_and_answer, (method, seed, model_name, steps, heldout))


def _train_and_answer(method: str, seed: int, model_name: str, steps: int, heldout: int) -> list[Row]:
    """Train by one method, answer the held-out prompts and return one row per answer."""
    policy, tokenizer = load_model(model_name, dtype=torch.float32)
    base = frozen_copy(policy)
    if method.startswith("RLOO"):
        settings = RLOOSettings(
            steps=steps,
            prompts_per_step=4,
            samples_per_prompt=4,
            kl_coef=float(method.split()[-1]),
            seed=seed,
            **SAMPLING,
        )
        prompts = load_table("real_model")["train"]
        rloo(policy, tokenizer, prompts, short_and_on_topic, settings, ref_model=base)
    elif method == "DPO":
        dpo = DPOSettings(batch_size=8, epochs=6, seed=seed)
        DPOTrainer(policy, base, tokenizer, settings=dpo).train(_own_pairs(policy, tokenizer, seed))
    questions = load_table("real_model")["heldout"][:heldout]
    answers = pd.DataFrame(_answers(method, policy, base, tokenizer, questions, seed))
    answers["cpu_seconds"] = round(time.process_time())
    answers["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return answers.to_dict("records")


def _answers(
    method: str, policy: nn.Module, base: nn.Module, tokenizer: Any, questions: Sequence[str], seed: int
) -> dict[str, Any]:
    """Answer each question once, or with the best of n answers, and measure the answers: columns of rows."""
    columns = {"method": method, "prompt": questions}
    if method.startswith("best of"):
        n = int(method.split()[-1])
        best = best_of_n(policy, tokenizer, questions, short_and_on_topic, n=n, seed=seed, **SAMPLING)
        return columns | {
            "response": best["responses"],
            "reward": best["rewards"].tolist(),
            "kl": best["kl_bound"],
        }
    samples = collect(policy, tokenizer, questions, samples_per_prompt=1, seed=10_000 + seed, **SAMPLING)
    with torch.no_grad():
        kl = sequence_kl(samples, rollout_logps(base, samples)).tolist()
    return columns | {
        "response": samples.responses,
        "reward": score(short_and_on_topic, samples).tolist(),
        "kl": kl,
    }


def _own_pairs(policy: nn.Module, tokenizer: Any, seed: int) -> list[Row]:
    """Let the model answer each training prompt four times; pair the best answer with the worst."""
    prompts = load_table("real_model")["train"]
    drawn = best_of_n(policy, tokenizer, prompts, short_and_on_topic, n=4, seed=20_000 + seed, **SAMPLING)
    return best_against_worst(prompts, drawn, gap=0)

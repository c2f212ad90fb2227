"""RLHF on SmolLM2-135M-Instruct, with a reward that is a rule anyone can check by reading the answer.

Each method runs in a process of its own, so that its peak memory can be read, and answers the same held-out
prompts before and after. Every answer is stored, because the rule accepts good answers and hollow ones.
"""

import functools
import json
import multiprocessing
import re
import resource
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_helpers.core.generation import rollout_logps
from rlhf_helpers.core.models import frozen_copy, load_model
from rlhf_helpers.dpo import DPOSettings, DPOTrainer
from rlhf_helpers.lab.studies.runner import Row, study
from rlhf_helpers.policy_optimization import RLOOSettings, rloo
from rlhf_helpers.policy_optimization.best_of_n import best_of_n
from rlhf_helpers.policy_optimization.rollouts import collect, score, sequence_kl

PROMPTS = Path(__file__).parents[2] / "assets" / "real_model" / "prompts.json"
METHODS = ("base", "best of 4", "DPO", "RLOO, KL coefficient 0.01", "RLOO, KL coefficient 0.05")
NEW_TOKENS = 48


@functools.cache
def prompt_data() -> dict[str, list[str]]:
    """Read the prompts, "train" and "heldout", and the "stop_words" that say nothing about a topic."""
    return json.loads(PROMPTS.read_text(encoding="utf-8"))


def short_and_on_topic(prompts: list[str], responses: list[str], **columns: Any) -> Tensor:
    """Reward answers that are short, use the question's words and end as a sentence: (B,), each in [0, 1].

    r = 0.4 short + 0.3 topic + 0.3 ending

    short is 1 up to 25 words and falls to 0 at 50; topic is the share of the question's content words that
    the answer uses; ending is 1 if the last character is a full stop, an exclamation or a question mark.
    An empty answer earns 0. The rule does not know what is true.
    """
    rewards = []
    for prompt, response in zip(prompts, responses, strict=True):
        words = re.findall(r"[a-z']+", response.lower())
        asked = set(re.findall(r"[a-z']+", prompt.lower())).difference(prompt_data()["stop_words"])
        short = min(1.0, max(0.0, (50 - len(words)) / 25))
        topic = len(asked & set(words)) / max(1, len(asked))
        ending = float(response.rstrip().endswith((".", "!", "?")))
        rewards.append((0.4 * short + 0.3 * topic + 0.3 * ending) if words else 0.0)
    return torch.tensor(rewards)


@study(seeds=(0,), new_tokens=NEW_TOKENS)
def real_model(
    seed: int,
    model_name: str = "smollm2",
    methods: Sequence[str] = METHODS,
    steps: int = 30,
    learning_rate: float | None = None,
    pairs_per_prompt: int = 4,
    heldout: int = 40,
) -> Iterator[Row]:
    """Train SmolLM2-135M-Instruct on `short_and_on_topic` by each method and answer the held-out prompts.

    Columns: seed, method, prompt, response (one sample at temperature 1), reward, kl (nats per response,
    against the untrained model; for best-of-n its upper bound), ended, tokens; seconds and peak_mb of the
    method, repeated on each of its rows.
    """
    for method in methods:
        # A fresh process for each method: peak memory is a property of a process.
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
            arguments = (method, seed, model_name, steps, learning_rate, pairs_per_prompt, heldout)
            yield from pool.submit(_rows, *arguments, torch.get_num_threads()).result()


def _rows(
    method: str,
    seed: int,
    model_name: str,
    steps: int,
    learning_rate: float | None,
    pairs_per_prompt: int,
    heldout: int,
    threads: int,
) -> list[Row]:
    """Train by one method and measure it on the held-out prompts."""
    torch.set_num_threads(threads)
    started = time.monotonic()
    prompts = prompt_data()
    questions = prompts["heldout"][:heldout]
    policy, tokenizer = load_model(model_name, device="cpu", dtype=torch.float32)
    base = frozen_copy(policy)
    if method.startswith("RLOO"):
        settings = RLOOSettings(
            steps=steps,
            prompts_per_step=4,
            samples_per_prompt=4,
            max_new_tokens=NEW_TOKENS,
            learning_rate=learning_rate,
            kl_coef=float(method.split()[-1]),
            seed=seed,
            progress=False,
        )
        rloo(policy, tokenizer, prompts["train"], short_and_on_topic, settings, ref_model=base)
    elif method == "DPO":
        pairs = _own_pairs(policy, tokenizer, prompts["train"], pairs_per_prompt, seed)
        settings = DPOSettings(learning_rate=learning_rate, batch_size=8, epochs=2, seed=seed, progress=False)
        DPOTrainer(model=policy, ref_model=base, tokenizer=tokenizer, settings=settings).train(pairs)
    if method.startswith("best of"):
        n = int(method.split()[-1])
        best = best_of_n(
            policy, tokenizer, questions, short_and_on_topic, n=n, max_new_tokens=NEW_TOKENS, seed=seed
        )
        measures = {"response": best["responses"], "kl": [best["kl_bound"]] * len(questions)}
        measures["reward"] = best["rewards"].tolist()
    else:
        sampling = {"samples_per_prompt": 1, "max_new_tokens": NEW_TOKENS, "temperature": 1.0}
        answers = collect(policy, tokenizer, questions, **sampling, seed=10_000 + seed)
        with torch.no_grad():
            ref_logps = rollout_logps(base, answers)
        measures = {"response": answers.responses, "kl": sequence_kl(answers, ref_logps).tolist()}
        measures["reward"] = score(short_and_on_topic, answers).tolist()
        measures["ended"] = answers.ended.tolist()
        measures["tokens"] = answers.response_lengths.tolist()
    cost = {
        "seconds": round(time.monotonic() - started),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    return [
        {"method": method, "prompt": question, **dict(zip(measures, values, strict=True)), **cost}
        for question, *values in zip(questions, *measures.values(), strict=True)
    ]


def _own_pairs(policy: Any, tokenizer: Any, prompts: list[str], group: int, seed: int) -> list[Row]:
    """Let the model answer each prompt several times; pair the best answer with the worst, by the rule."""
    samples = collect(
        policy,
        tokenizer,
        prompts,
        samples_per_prompt=group,
        max_new_tokens=NEW_TOKENS,
        temperature=1.0,
        seed=20_000 + seed,
    )
    rewards = score(short_and_on_topic, samples).view(-1, group)
    pairs = []
    for i, (prompt, row) in enumerate(zip(prompts, rewards, strict=True)):
        best, worst = int(row.argmax()), int(row.argmin())
        if row[best] > row[worst]:  # equal answers teach nothing
            answers = samples.responses[i * group : (i + 1) * group]
            pairs.append({"prompt": prompt, "chosen": answers[best], "rejected": answers[worst]})
    return pairs

"""Every method on one task: the same reward, the same number of samples, the same effort of tuning.

A run learns from 512 responses of at most 64 tokens: 8 steps of 16 prompts with 4 samples each, or, for the
offline losses, as many samples of the base, drawn once and ordered by the reward. The reward is a model that
was trained on 1,000 labelled pairs, scaled to mean 0 and standard deviation 1 on the base's samples; the
gold judge only measures. Each method has three candidates for its step size; what is tried on the tuning
seeds is judged by what is known without gold, the reward less kl_coef times the KL.
"""

import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from rlhf_helpers.core.generation import Rollout
from rlhf_helpers.core.models import RewardFn, load_model
from rlhf_helpers.core.training import History
from rlhf_helpers.dpo import DPOSettings, DPOTrainer, OnlineDPOSettings, online_dpo
from rlhf_helpers.lab.studies.lesson1 import SEEDS, trained
from rlhf_helpers.lab.studies.record import load_study, write_study
from rlhf_helpers.policy_optimization import (
    GRPOSettings,
    OnPolicySettings,
    PPOSettings,
    ReinforceSettings,
    RejectionSamplingSettings,
    RLOOSettings,
    TRPOSettings,
    best_of_n_kl,
    collect,
    grpo,
    policy_outputs,
    ppo,
    reinforce,
    rejection_sampling,
    rloo,
    score,
    trpo,
)
from rlhf_helpers.policy_optimization.rollouts import sequence_kl
from rlhf_helpers.reward_model import normalise_reward
from rlhf_helpers.world.annotators import make_pairs
from rlhf_helpers.world.gold_judge import gold_reward
from rlhf_helpers.world.prompts import CONVERSATION, load_prompts

TUNING_SEEDS = (100, 101)
KL_COEF = 0.05
BUDGET = {"steps": 8, "prompts_per_step": 16, "samples_per_prompt": 4}
RATES = (3e-4, 1e-3, 3e-3)  # for one update a step
SMALL_RATES = (1e-4, 3e-4, 1e-3)  # for several
OFFLINE_EPOCHS = 3


@dataclass(frozen=True)
class Task:
    """What a run is given: the untrained policy, prompts to train on and to judge by, and the reward."""

    base: torch.nn.Module
    tokenizer: Any
    prompts: list[str]
    heldout: list[str]
    reward: RewardFn
    seed: int


@dataclass(frozen=True)
class Method:
    """A loop with its settings, and the setting whose values are tried; no loop: an offline loss."""

    loop: Callable[..., Any] | None
    settings: type[OnPolicySettings] | type[DPOSettings]
    fixed: dict[str, Any]
    values: tuple[float, ...] = RATES
    setting: str = "learning_rate"


def _offline(loss: str, **fixed: Any) -> Method:
    return Method(None, DPOSettings, {"loss": loss, "epochs": OFFLINE_EPOCHS, **fixed}, SMALL_RATES)


PRICED = {"kl_coef": KL_COEF}
METHODS: dict[str, Method] = {
    "REINFORCE": Method(reinforce, ReinforceSettings, {"baseline": False, **PRICED}),
    "REINFORCE, baseline": Method(reinforce, ReinforceSettings, PRICED),
    "RLOO": Method(rloo, RLOOSettings, PRICED),
    "GRPO": Method(grpo, GRPOSettings, PRICED),
    "GRPO, not scaled": Method(grpo, GRPOSettings, {"scale": False, "length_mean": False, **PRICED}),
    "actor-critic": Method(ppo, PPOSettings, {"epochs": 1, "minibatches": 1, **PRICED}),
    "PPO": Method(ppo, PPOSettings, PRICED, SMALL_RATES),
    "TRPO": Method(trpo, TRPOSettings, PRICED, (0.003, 0.01, 0.03), "max_kl"),
    "rejection sampling": Method(rejection_sampling, RejectionSamplingSettings, PRICED),
    "online DPO": Method(online_dpo, OnlineDPOSettings, {}),
    "DPO": _offline("dpo"),
    "cDPO": _offline("cdpo", label_smoothing=0.1),
    "robust DPO": _offline("robust", label_smoothing=0.1),
    "IPO": _offline("ipo"),
    "hinge": _offline("hinge"),
    "SLiC": _offline("slic"),
    "ORPO": _offline("orpo"),
    "SimPO": _offline("simpo", beta=2.0),
    "KTO": _offline("kto"),
    "listwise DPO": _offline("listwise"),
}


def make_task(seed: int, *, pairs: int = 1000) -> Task:
    """The study's task of a seed: its own labelled pairs and reward model, the same policy and prompts."""
    base, tokenizer = load_model("tiny")
    prompts, heldout = ([p.text for p in load_prompts(CONVERSATION, split)] for split in ("train", "heldout"))
    samples = sampled(base, tokenizer, prompts[::2], seed=seed)
    reward_model = trained(make_pairs(pairs, seed=seed), seed=seed)
    reward = normalise_reward(reward_model, samples.prompts, samples.responses)
    return Task(base, tokenizer, prompts, heldout, reward, seed)


def sampled(
    model: torch.nn.Module, tokenizer: Any, prompts: Sequence[str], *, seed: int, each: int = 1
) -> Rollout:
    """A rollout of `each` responses a prompt of at most 64 tokens, at temperature 1."""
    return collect(
        model, tokenizer, prompts, samples_per_prompt=each, max_new_tokens=64, temperature=1.0, seed=seed
    )


def measure(model: torch.nn.Module, task: Task, *, samples: int = 2, **further: RewardFn) -> dict[str, float]:
    """What the policy says to held-out prompts: gold, the proxy reward, and how far it is from the base.

    gold, proxy: means of the gold and of the task's reward; kl: nats a response, k1; length: tokens a
    response; entropy: nats a token; ended: share that said EOS. further: more rewards by name, or another
    proxy. The same seeds for every policy.
    """
    rollout = sampled(model, task.tokenizer, task.heldout, seed=50_000 + task.seed, each=samples)
    with torch.no_grad():
        ref_logps, _ = policy_outputs(task.base, rollout, temperature=1.0)
        _, entropies = policy_outputs(model, rollout, temperature=1.0)
    rewards = {"gold": gold_reward, "proxy": task.reward, **further}
    return {name: score(reward, rollout).mean().item() for name, reward in rewards.items()} | {
        "kl": sequence_kl(rollout, ref_logps).mean().item(),
        "length": rollout.response_lengths.float().mean().item(),
        "entropy": (entropies.sum() / rollout.response_mask.sum()).item(),
        "ended": rollout.ended.float().mean().item(),
    }


@dataclass(frozen=True)
class Run:
    """A trained policy, its history, and what it cost: tokens sampled, seconds of processor time."""

    model: torch.nn.Module
    history: History
    tokens: float
    seconds: float


def run_method(
    name: str, task: Task, value: float, *, options: dict[str, Any] | None = None, **changes: Any
) -> Run:
    """Train a copy of the task's policy by a method of `METHODS`, its step size set to `value`.

    options: of an on-policy loop (eval_fn, ptx_rows, ...). changes: further settings.
    """
    method, model = METHODS[name], deepcopy(task.base)
    given = {method.setting: value, "seed": task.seed, "progress": False, **method.fixed, **changes}
    start = time.process_time()
    if method.loop is None:
        rows, tokens = offline_rows(task, given["loss"])
        trainer = DPOTrainer(model, task.base, task.tokenizer, settings=DPOSettings(**given))
        history = trainer.train(rows)
    else:
        settings = method.settings(**{**BUDGET, **given})
        given = model, task.tokenizer, task.prompts, task.reward, settings
        history = method.loop(*given, ref_model=task.base, **(options or {}))
        responses = settings.prompts_per_step * settings.samples_per_prompt
        tokens = responses * sum(row["response_length"] for row in history)
    return Run(model, history, float(tokens), time.process_time() - start)


def looks_of(first: dict[str, float], history: History) -> list[dict[str, Any]]:
    """The measures before training, as step 0, and those that eval_fn logged, after so many steps."""
    later = [row for row in history if first.keys() <= row.keys()]
    return [{"step": 0, **first}] + [{"step": row["step"] + 1, **{k: row[k] for k in first}} for row in later]


def offline_rows(task: Task, loss: str) -> tuple[list[dict[str, Any]], int]:
    """The base's samples, as many as an on-policy run draws, ordered by the reward; and their tokens.

    Pairs: the best against the worst of a prompt's four; rankings: all that differ; unpaired: desirable is
    what is above the mean of its prompt. A prompt whose samples earn the same teaches nothing.
    """
    group = BUDGET["samples_per_prompt"]
    count = BUDGET["steps"] * BUDGET["prompts_per_step"]
    order = torch.randperm(len(task.prompts), generator=torch.Generator().manual_seed(task.seed))
    asked = [task.prompts[i] for i in order[:count]]
    rollout = sampled(task.base, task.tokenizer, asked, seed=task.seed, each=group)
    scores, rows = score(task.reward, rollout).view(-1, group).tolist(), []
    for place, (prompt, own) in enumerate(zip(asked, scores, strict=True)):
        texts = rollout.responses[place * group : (place + 1) * group]
        worth = {text: value for text, value in zip(texts, own, strict=True) if text.strip()}
        ranked = sorted(worth, key=lambda text: -worth[text])
        if len(ranked) < 2 or worth[ranked[0]] == worth[ranked[-1]]:
            continue
        mean = sum(worth.values()) / len(worth)
        if loss == "kto":
            rows += [{"prompt": prompt, "completion": t, "label": worth[t] > mean} for t in ranked]
        elif loss == "listwise":
            rows.append({"prompt": prompt, "responses": ranked})
        else:
            rows.append({"prompt": prompt, "chosen": ranked[0], "rejected": ranked[-1]})
    return rows, int(rollout.response_lengths.sum())


def method_tuning(
    out: str | Path | None = None, *, seeds: Sequence[int] = TUNING_SEEDS, names: Sequence[str] | None = None
) -> pd.DataFrame:
    """Three candidates a method on the tuning seeds: seed, method, setting, value, objective.

    objective: held-out reward less kl_coef times KL, what the on-policy methods maximise; no gold in it.
    """
    rows = []
    for seed in seeds:
        task = make_task(seed)
        for name in names or METHODS:
            method = METHODS[name]
            for value in method.values:
                found = measure(run_method(name, task, value).model, task)
                rows.append({"seed": seed, "method": name, "setting": method.setting, "value": value})
                rows[-1]["objective"] = found["proxy"] - KL_COEF * found["kl"]
                print(rows[-1], flush=True)
    return write_study(out, "method_tuning", pd.DataFrame(rows), tuning_seeds=list(seeds), **_facts())


def chosen_values() -> dict[str, float]:
    """The candidate of each method with the highest mean objective over the tuning seeds."""
    means = load_study("method_tuning").groupby(["method", "value"]).objective.mean().reset_index()
    best = means.loc[means.groupby("method").objective.idxmax()]
    return dict(zip(best.method, best.value, strict=True))


def methods(
    out: str | Path | None = None,
    *,
    seeds: Sequence[int] = SEEDS,
    names: Sequence[str] | None = None,
    tasks: dict[int, Task] | None = None,
) -> pd.DataFrame:
    """Every method with its tuned step size: what it gains on held-out prompts, and what it costs.

    Columns: seed, method (with "base" and "best of 4", which train nothing), value, the measures of
    `measure`, tokens sampled, seconds of processor time with one thread (not repeatable to the digit).
    tasks: made already, for a slice of the study.
    """
    values, rows = chosen_values(), []
    for seed in seeds:
        task = (tasks or {}).get(seed) or make_task(seed)
        for name in names or ("base", "best of 4", *METHODS):
            if name in METHODS:
                run = run_method(name, task, values[name])
                found = measure(run.model, task) | {"tokens": run.tokens, "seconds": run.seconds}
            else:
                found = measure(task.base, task) if name == "base" else _best_of(task, 4)
                found |= {"tokens": 0.0, "seconds": 0.0}
            rows.append({"seed": seed, "method": name, "value": values.get(name, 0.0), **found})
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    return write_study(out, "methods", pd.DataFrame(rows), seeds=list(seeds), **_facts())


def _best_of(task: Task, n: int) -> dict[str, float]:
    """The measures of best-of-n by the task's reward; kl is the upper bound, entropy that of the base."""
    rollout = sampled(task.base, task.tokenizer, task.heldout, seed=50_000 + task.seed, each=n)
    best = score(task.reward, rollout).view(-1, n).argmax(-1) + n * torch.arange(len(task.heldout))
    kept = rollout[best]
    return {
        "gold": gold_reward(kept.prompts, kept.responses).mean().item(),
        "proxy": score(task.reward, kept).mean().item(),
        "kl": best_of_n_kl(n),
        "length": kept.response_lengths.float().mean().item(),
        "entropy": measure(task.base, task)["entropy"],
        "ended": kept.ended.float().mean().item(),
    }


def _facts() -> dict[str, Any]:
    fixed = {name: method.fixed for name, method in METHODS.items()}
    return {"budget": BUDGET, "kl_coef": KL_COEF, "pairs": 1000, "max_new_tokens": 64, "fixed": fixed}

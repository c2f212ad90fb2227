"""Every method on one task: the same reward, the same number of samples, the same amount of tuning.

A run learns from 512 responses of at most 64 tokens: 8 steps of 16 prompts with 4 samples each, or, for the
offline losses, as many samples of the base, drawn once and ordered by the reward. The reward is a model
trained on 1,000 labelled pairs, scaled to mean 0 and standard deviation 1 on the base's samples; the gold
judge only measures. Each method has three candidates for its step size. The tuning seeds choose among them
without gold, by the reward minus kl_coef times the KL.
"""

import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pandas as pd
import torch

from rlhf_helpers.core.generation import Rollout
from rlhf_helpers.core.models import RewardFn, load_model
from rlhf_helpers.core.rollouts import sequence_kl
from rlhf_helpers.core.training import History
from rlhf_helpers.dpo import DPOSettings, DPOTrainer, OnlineDPOSettings, online_dpo
from rlhf_helpers.lab.studies.lesson1 import trained
from rlhf_helpers.lab.studies.record import Row, Rows, load_study, study
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
from rlhf_helpers.reward_model import normalise_reward
from rlhf_helpers.world.annotators import make_pairs
from rlhf_helpers.world.gold_judge import gold_reward
from rlhf_helpers.world.prompts import CONVERSATION, prompt_texts

KL_COEF = 0.05
BUDGET = {"steps": 8, "prompts_per_step": 16, "samples_per_prompt": 4}
RATES = (3e-4, 1e-3, 3e-3)  # for one update per step
SMALL_RATES = (1e-4, 3e-4, 1e-3)  # for several updates per step


@dataclass(frozen=True)
class Task:
    """The input of a run: the untrained policy, prompts to train and to judge on, and the reward."""

    base: torch.nn.Module
    tokenizer: Any
    prompts: list[str]
    heldout: list[str]
    reward: RewardFn
    seed: int
    budget: Row  # steps, prompts and samples of a run


@dataclass(frozen=True)
class Method:
    """A loop with its settings, and the setting whose values are tried; loop None: an offline loss."""

    loop: Callable[..., Any] | None
    settings: type[OnPolicySettings] | type[DPOSettings]
    fixed: Row = field(default_factory=dict)
    values: tuple[float, ...] = RATES
    setting: str = "learning_rate"


METHODS = {
    "REINFORCE": Method(reinforce, ReinforceSettings, {"baseline": False}),
    "REINFORCE, baseline": Method(reinforce, ReinforceSettings),
    "RLOO": Method(rloo, RLOOSettings),
    "GRPO": Method(grpo, GRPOSettings),
    "GRPO, not scaled": Method(grpo, GRPOSettings, {"scale": False, "length_mean": False}),
    "actor-critic": Method(ppo, PPOSettings, {"epochs": 1, "minibatches": 1}),
    "PPO": Method(ppo, PPOSettings, values=SMALL_RATES),
    "TRPO": Method(trpo, TRPOSettings, values=(0.003, 0.01, 0.03), setting="max_kl"),
    "rejection sampling": Method(rejection_sampling, RejectionSamplingSettings),
    "online DPO": Method(online_dpo, OnlineDPOSettings, {"kl_coef": 0.0}),
}
OFFLINE = {
    "DPO": {"loss": "dpo"},
    "cDPO": {"loss": "cdpo", "label_smoothing": 0.1},
    "robust DPO": {"loss": "robust", "label_smoothing": 0.1},
    "IPO": {"loss": "ipo"},
    "hinge": {"loss": "hinge"},
    "SLiC": {"loss": "slic"},
    "ORPO": {"loss": "orpo"},
    "SimPO": {"loss": "simpo", "beta": 2.0},
    "KTO": {"loss": "kto"},
    "listwise DPO": {"loss": "listwise"},
}
for _name, _loss in OFFLINE.items():
    METHODS[_name] = Method(None, DPOSettings, {"epochs": 3, **_loss}, SMALL_RATES)


def make_task(
    seed: int,
    reward: RewardFn | None = None,
    *,
    pairs: int = 1000,
    every: int = 1,
    budget: Row = BUDGET,
) -> Task:
    """Make the task of a seed: the same policy and prompts, and by default a reward model of its own.

    Args:
        seed: Seed of the labels and of the runs.
        reward: The reward; None: a model trained on labelled pairs.
        pairs: Number of these pairs.
        every: Take every prompt, or only each so many, for a quick look.
        budget: Steps, prompts and samples of a run.
    """
    base, tokenizer = load_model("tiny")
    prompts, heldout = (prompt_texts(CONVERSATION, split)[::every] for split in ("train", "heldout"))
    task = Task(base, tokenizer, prompts, heldout, reward, seed, budget)
    if reward is not None:
        return task
    model = trained(make_pairs(pairs, seed=seed), seed=seed)
    return replace(task, reward=scaled(model, task, seed=seed))


def scaled(model: RewardFn, task: Task, *, seed: int = 1) -> RewardFn:
    """Scale rewards to mean 0 and standard deviation 1 on the base's samples."""
    samples = sampled(task.base, task.tokenizer, task.prompts[::2], seed=seed)
    return normalise_reward(model, samples.prompts, samples.responses)


def sampled(
    model: torch.nn.Module, tokenizer: Any, prompts: Sequence[str], *, seed: int, each: int = 1
) -> Rollout:
    """Sample `each` responses per prompt, of at most 64 tokens, at temperature 1."""
    return collect(
        model, tokenizer, prompts, samples_per_prompt=each, max_new_tokens=64, temperature=1.0, seed=seed
    )


def measure(
    model: torch.nn.Module,
    task: Task,
    *,
    samples: int = 2,
    rollout: Rollout | None = None,
    **further: RewardFn,
) -> dict[str, float]:
    """Measure answers to held-out prompts: gold, the proxy reward, and the distance from the base.

    gold, proxy: means of the gold and of the task's reward; kl: nats per response, k1; length: tokens per
    response; entropy: nats per token. Every policy gets the same seeds.

    Args:
        model: The policy.
        task: The base, the prompts and the reward.
        samples: Answers per prompt.
        rollout: Answers to measure; None: new ones.
        **further: More rewards by name, or another proxy.
    """
    if rollout is None:
        rollout = sampled(model, task.tokenizer, task.heldout, seed=50_000 + task.seed, each=samples)
    with torch.no_grad():
        ref_logps, _ = policy_outputs(task.base, rollout, temperature=1.0)
        _, entropies = policy_outputs(model, rollout, temperature=1.0)
    rewards = {"gold": gold_reward, "proxy": task.reward, **further}
    values = {name: score(reward, rollout).mean() for name, reward in rewards.items()} | {
        "kl": sequence_kl(rollout, ref_logps).mean(),
        "length": rollout.response_lengths.float().mean(),
        "entropy": entropies.sum() / rollout.response_mask.sum(),
    }
    return {name: value.item() for name, value in values.items()}


@dataclass(frozen=True)
class Run:
    """A trained policy, its history, and its cost: seconds of processor time."""

    model: torch.nn.Module
    history: Sequence[Row] = ()
    seconds: float = 0.0


def run_method(
    name: str,
    task: Task,
    value: float,
    *,
    options: Row | None = None,
    rows: list[Row] | None = None,
    **changes: Any,
) -> Run:
    """Train a copy of the task's policy by a method of `METHODS`.

    Args:
        name: The method.
        task: The policy, the prompts and the reward.
        value: The step size.
        options: Arguments of an on-policy loop (eval_fn, ptx_rows, ...).
        rows: What an offline loss learns from; None: `offline_rows`.
        **changes: Further settings.
    """
    method, model = METHODS[name], deepcopy(task.base)
    fields = {method.setting: value, "seed": task.seed, **method.fixed, **changes}
    start = time.process_time()
    if method.loop is None:
        trainer = DPOTrainer(model, task.base, task.tokenizer, settings=DPOSettings(**fields))
        history = trainer.train(rows or offline_rows(task, method.fixed["loss"]))
    else:
        settings = method.settings(**{"kl_coef": KL_COEF, **task.budget, **fields})
        args = model, task.tokenizer, task.prompts, task.reward, settings
        history = method.loop(*args, ref_model=task.base, **(options or {}))
    return Run(model, history, time.process_time() - start)


def eval_history(first: dict[str, float], history: History) -> list[Row]:
    """List the measures before training, as step 0, and those that eval_fn logged, after so many steps."""
    table = history.to_frame()[["step", *first]].dropna()
    return [{"step": 0, **first}, *table.assign(step=table.step + 1).to_dict("records")]


def best_against_worst(prompts: Sequence[str], drawn: dict[str, Any], *, gap: float) -> list[Row]:
    """Pair the best with the worst answer to each prompt, where their rewards differ by more than `gap`.

    Equal answers teach nothing, and DPO refuses an empty one; prompts with such answers give no pair.

    Args:
        drawn: all_responses and all_rewards, as from `best_of_n`.
    """
    rows = []
    for prompt, texts, rewards in zip(prompts, drawn["all_responses"], drawn["all_rewards"], strict=True):
        chosen, rejected = texts[rewards.argmax()], texts[rewards.argmin()]
        if rewards.max() - rewards.min() > gap and chosen.strip() and rejected.strip():
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def offline_rows(task: Task, loss: str) -> list[Row]:
    """Order by the reward as many samples of the base as an on-policy run draws; rows for `loss`.

    Pairs: the best against the worst of a prompt's four; rankings: all that differ; unpaired: desirable is
    what is above the mean of its prompt. A prompt whose samples have equal rewards teaches nothing and is
    left out.
    """
    group = task.budget["samples_per_prompt"]
    count = task.budget["steps"] * task.budget["prompts_per_step"]
    order = torch.randperm(len(task.prompts), generator=torch.Generator().manual_seed(task.seed))
    prompts = [task.prompts[i] for i in order[:count]]
    rollout = sampled(task.base, task.tokenizer, prompts, seed=task.seed, each=group)
    answers = pd.DataFrame({"prompt": rollout.prompts, "text": rollout.responses})
    answers["reward"] = score(task.reward, rollout).tolist()
    answers = answers[answers.text.str.strip() != ""].drop_duplicates(["prompt", "text"])
    rows = []
    for prompt, answered in answers.groupby("prompt", sort=False):
        rewards = answered.sort_values("reward", ascending=False, kind="stable").set_index("text").reward
        ranked = rewards.index.tolist()
        if rewards.nunique() < 2:
            continue
        if loss == "kto":
            labels = (rewards > rewards.mean()).items()
            rows += [{"prompt": prompt, "completion": text, "label": label} for text, label in labels]
        elif loss == "listwise":
            rows.append({"prompt": prompt, "responses": ranked})
        else:
            rows.append({"prompt": prompt, "chosen": ranked[0], "rejected": ranked[-1]})
    return rows


@partial(study, seeds=(100, 101))
def method_tuning(seed: int, names: Sequence[str] = tuple(METHODS)) -> Rows:
    """Try three step sizes per method on the tuning seeds: seed, method, setting, value, objective.

    objective: held-out reward minus kl_coef times KL, which the on-policy methods maximise; it does not use
    gold.
    """
    task = make_task(seed)
    for name in names:
        method = METHODS[name]
        for value in method.values:
            result = measure(run_method(name, task, value).model, task)
            objective = result["proxy"] - KL_COEF * result["kl"]
            yield {"method": name, "setting": method.setting, "value": value, "objective": objective}


def chosen_values() -> dict[str, float]:
    """Choose for each method the step size with the highest mean objective over the stored tuning seeds."""
    means = load_study("method_tuning").groupby(["method", "value"]).objective.mean()
    return dict(means.groupby("method").idxmax().tolist())


@study
def methods(seed: int, names: Sequence[str] = ("base", "best of 4", *METHODS), **size: Any) -> Rows:
    """Measure gain on held-out prompts and cost of every method with its tuned step size.

    Columns: seed, method (with "base" and "best of 4", which train nothing), value (their 0 is no step size),
    the measures of `measure`, seconds of processor time with one thread (not repeatable to the digit). size:
    options of `make_task`.
    """
    task, values = make_task(seed, **size), chosen_values()
    for name in names:
        run = run_method(name, task, values[name]) if name in METHODS else Run(task.base)
        result = measure(run.model, task)
        if name == "best of 4":
            result |= _best_of(task, 4)
        yield {"method": name, "value": values.get(name, 0.0), **result, "seconds": run.seconds}


def _best_of(task: Task, n: int) -> dict[str, float]:
    """Measure best-of-n by the task's reward, but for the entropy; kl is the upper bound."""
    rollout = sampled(task.base, task.tokenizer, task.heldout, seed=50_000 + task.seed, each=n)
    best = score(task.reward, rollout).view(-1, n).argmax(-1) + n * torch.arange(len(task.heldout))
    result = measure(task.base, task, rollout=rollout[best]) | {"kl": best_of_n_kl(n)}
    del result["entropy"]
    return result

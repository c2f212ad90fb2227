"""Best-of-n: sample n responses and keep the one with the highest reward.

It needs no training, so it is a baseline for every training method.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from rlhf_helpers.core.models import RewardFn
from rlhf_helpers.core.rollouts import collect, repeat_columns, score
from rlhf_helpers.core.tensors import require_number, require_shapes
from rlhf_helpers.core.text import Columns, require_columns


def best_of_n(
    model: torch.nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    reward_fn: RewardFn,
    *,
    n: int,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    columns: Columns | None = None,
) -> dict[str, Any]:
    """Sample n responses to each of P prompts and keep the one with the highest reward, of a tie the first.

    Returns responses (P texts) and rewards (P,) of the best, all_responses (P lists of n texts) and
    all_rewards (P, n) as `best_of_n_curve` takes them, and kl_bound of `best_of_n_kl`. columns: further
    columns of the prompts, one entry per prompt. Stiennon et al. 2020. Lessons 1 and 2. Raises ValueError
    where n is not a whole number >= 1, or prompts, columns or rewards have the wrong shape.
    """
    kl_bound, columns = best_of_n_kl(n), dict(columns or {})
    require_columns(prompts, columns)
    rollout = collect(
        model,
        tokenizer,
        prompts,
        samples_per_prompt=n,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    rewards = score(reward_fn, rollout, repeat_columns(columns, range(len(prompts)), n)).view(-1, n)
    best = rewards.argmax(-1)
    samples = [rollout.responses[start : start + n] for start in range(0, len(rollout), n)]
    return {
        "responses": [texts[place] for texts, place in zip(samples, best.tolist(), strict=True)],
        "rewards": rewards.gather(-1, best[:, None]).squeeze(-1),
        "all_responses": samples,
        "all_rewards": rewards,
        "kl_bound": kl_bound,
    }


def best_of_n_curve(
    proxy: Float[Tensor, "P N"], gold: Float[Tensor, "P N"], ns: Sequence[int]
) -> pd.DataFrame:
    """Mean proxy and gold reward of best-of-n by proxy for each n, from one set of N samples per prompt.

    sum_i [C(i, n) - C(i - 1, n)] / C(N, n) s_(i), ascending by the proxy: the mean over all subsets of n

    Unbiased, and of far smaller variance than one draw of n. Gold is summed in the proxy's order; samples of
    one proxy share their weight evenly, as if ties were broken at random. Columns n, kl_bound, proxy, gold, a
    row for each n, means over P prompts. Nakano et al. 2021, appendix I; Gao et al. 2022. Lessons 1 and 2.
    Raises ValueError unless shapes are both (P, N), rewards finite, and every n whole and in 1 ... N.
    """
    require_shapes("P N", proxy=proxy, gold=gold)
    ranked, worth = (rewards.detach().double().cpu().numpy() for rewards in (proxy, gold))
    if not (ranked.size and np.isfinite(ranked).all() and np.isfinite(worth).all()):
        raise ValueError(
            "proxy and gold must hold finite rewards, at least one; some are NaN, inf or missing"
        )
    size = ranked.shape[1]
    last = stats.rankdata(ranked, "max", axis=1).astype(int)
    before = stats.rankdata(ranked, "min", axis=1).astype(int) - 1
    rows = []
    for n in ns:
        require_number("n", n, at_least=1, at_most=size, whole=True)
        # within[k] = C(k, n) / C(N, n): the chance that all n of a subset are among the k lowest.
        within = stats.hypergeom.pmf(n, size, np.arange(size + 1), n)
        weights = (within[last] - within[before]) / (last - before)
        means = ((weights * rewards).sum(1).mean() for rewards in (ranked, worth))
        rows.append((n, best_of_n_kl(n), *means))
    return pd.DataFrame(rows, columns=["n", "kl_bound", "proxy", "gold"])


def best_of_n_kl(n: int) -> float:
    """Upper bound on the KL of best-of-n to the policy it samples from, in nats: log n - (n - 1) / n.

    Met where no two samples tie; with few distinct outcomes the true KL is far smaller, at most -log p(best):
    with six outcomes 1.311 against 3.175 for n = 64 (`best_of_n_exact_kl`). Hilton 2023; Beirami et al. 2024.
    Lessons 1 and 2. Raises ValueError unless n is a whole number >= 1.
    """
    require_number("n", n, at_least=1, whole=True)
    return math.log(n) - (n - 1) / n


def best_of_n_shares(rewards: Float[Tensor, "K"], probabilities: Float[Tensor, "K"], n: int) -> Tensor:
    """How often best-of-n answers with each of K outcomes that the policy has with `probabilities`; (K,).

    p_bon(k) = [F(r_k)^n - F(r_k -)^n] p_k / p(r = r_k);  F(x) = p(r <= x), F(x -) = p(r < x)

    All n samples are at most r_k and not all below it; outcomes of one reward share by their probability, as
    if the tie were drawn by lot. Lesson 2. Raises ValueError unless both are (K,) and finite, probabilities
    sum to 1 and n is a whole number >= 1.
    """
    require_shapes("K", rewards=rewards, probabilities=probabilities)
    require_number("n", n, at_least=1, whole=True)
    chances = probabilities.double()
    if not (rewards.isfinite().all() and (chances >= 0).all() and abs(chances.sum() - 1) < 1e-4):
        raise ValueError(
            f"rewards must be finite, probabilities >= 0 and of sum 1; got {rewards} and {probabilities}"
        )
    values, place = rewards.unique(return_inverse=True)  # ascending
    mass = torch.zeros(len(values), dtype=torch.float64, device=chances.device).index_add(0, place, chances)
    upto = mass.cumsum(0)
    rise = (upto**n - (upto - mass) ** n) / mass.clamp(min=torch.finfo(torch.float64).tiny)
    return (chances * rise[place]).to(probabilities.dtype)


def best_of_n_exact_kl(rewards: Float[Tensor, "P N"], ns: Sequence[int]) -> Float[Tensor, "M"]:
    """KL(best-of-n || policy) in nats for each of ns, with N samples per prompt as the policy; float64.

    mean over P prompts of sum_i p_i log(p_i N);  p = best_of_n_shares(rewards of the prompt, 1 / N each, n)

    Exact for the N samples; samples of one reward are one class, so never above `best_of_n_kl`. Of the policy
    itself it is an estimate, and never above log N: ask for n well below N. Raises ValueError unless rewards
    are (P, N) and finite, and every n whole and >= 1. Lesson 2.
    """
    require_shapes("P N", rewards=rewards)
    even = torch.full(rewards.shape[1:], 1 / rewards.shape[1], dtype=torch.float64, device=rewards.device)
    shares = torch.stack([torch.stack([best_of_n_shares(row, even, n) for row in rewards]) for n in ns])
    return torch.special.xlogy(shares, shares / even).sum(-1).mean(-1).clamp(min=0)

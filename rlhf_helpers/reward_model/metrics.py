"""How good a reward is at telling the better answer, with intervals; plain functions of rewards."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_helpers.core.models import RewardFn, as_reward_fn
from rlhf_helpers.core.stats import Estimate, fisher_interval, mean_interval, proportion
from rlhf_helpers.core.tensors import require_shapes


def pair_credits(
    chosen_rewards: Float[Tensor, "B"], rejected_rewards: Float[Tensor, "B"]
) -> Float[Tensor, "B"]:
    """1 where the chosen answer scores higher, 1/2 where both tie, 0 otherwise.

    A tie is a coin toss: counting it 0 (as DPO's accuracy does) would put a constant reward below chance.

    Raises:
        ValueError: shapes are not both (B,).
    """
    require_shapes("B", chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    gap = chosen_rewards - rejected_rewards
    return ((gap > 0).float() + 0.5 * (gap == 0).float()).detach()


def accuracy(credits: Float[Tensor, "B"]) -> Estimate:
    """Mean of `pair_credits` with its Wilson score interval (Wilson 1927), which stays within [0, 1].

    The interval treats pairs as independent; pairs that share a prompt or an answer are not, quite.

    Raises:
        ValueError: there is no pair.
    """
    require_shapes("B", credits=credits)
    if not len(credits):
        raise ValueError("there are no pairs: an accuracy over nothing is undefined")
    return proportion(credits)


def pairwise_accuracy(chosen_rewards: Float[Tensor, "B"], rejected_rewards: Float[Tensor, "B"]) -> Estimate:
    """Share of pairs whose chosen answer scores higher, ties one half, with Wilson's 95 % interval.

    Raises:
        ValueError: shapes are not both (B,), or there is no pair.
    """
    return accuracy(pair_credits(chosen_rewards, rejected_rewards))


def paired_difference(first: Float[Tensor, "B"], second: Float[Tensor, "B"]) -> Estimate:
    """Mean of first - second on the same pairs (credits of two scorers), with Student's 95 % interval.

    Paired, because both scorers fail on the same hard pairs: two separate intervals may overlap although the
    difference is sure. Both equal everywhere gives an interval of width 0.

    Raises:
        ValueError: shapes are not both (B,), or there are fewer than two pairs.
    """
    require_shapes("B", first=first, second=second)
    return Estimate(*mean_interval(first - second), len(first))


def gold_agreement(
    first_rewards: Float[Tensor, "B"],
    second_rewards: Float[Tensor, "B"],
    first_gold: Float[Tensor, "B"],
    second_gold: Float[Tensor, "B"],
) -> Estimate:
    """Share of pairs that reward and gold order alike; gold ties are left out, reward ties count one half.

    Raises:
        ValueError: shapes are not all (B,), or gold ties everywhere.
    """
    require_shapes(
        "B",
        first_rewards=first_rewards,
        second_rewards=second_rewards,
        first_gold=first_gold,
        second_gold=second_gold,
    )
    gold_gap = first_gold - second_gold
    sure = gold_gap != 0
    sign = gold_gap.sign().to(first_rewards)
    return accuracy(pair_credits(first_rewards * sign, second_rewards * sign)[sure.to(first_rewards.device)])


def score_pairs(
    reward: RewardFn | Any, rows: Sequence[Mapping[str, Any]]
) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
    """Rewards of the chosen and of the rejected answers of `rows`, by a reward model or any RewardFn."""
    reward_fn, count = as_reward_fn(reward), len(rows)
    prompts = [row["prompt"] for row in rows]
    answers = [row[key] for key in ("chosen", "rejected") for row in rows]
    rewards = reward_fn(prompts * 2, answers)
    return rewards[:count], rewards[count:]


def pair_metrics(
    chosen_rewards: Float[Tensor, "B"], rejected_rewards: Float[Tensor, "B"]
) -> dict[str, Float[Tensor, "B"]]:
    """What to log of pairs, unreduced, under TRL's names; an accuracy counts ties 1/2 (DPO's counts them 0).

    Raises:
        ValueError: shapes are not both (B,).
    """
    return {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": chosen_rewards - rejected_rewards,
        "rewards/accuracies": pair_credits(chosen_rewards, rejected_rewards),
    }


def length_correlation(
    rewards: Float[Tensor, "*P K"], lengths: Float[Tensor, "*P K"], quality: Float[Tensor, "*P K"]
) -> Estimate:
    """Partial correlation of reward and length given quality: 0 where length earns nothing of its own.

    rho = (r_rl - r_rq r_lq) / sqrt((1 - r_rq^2) (1 - r_lq^2)), r Pearson's;
    interval: tanh(atanh(rho) +- 1.96 / sqrt(m - 3)) with m = P (K - 1) free values

    Each (P, K): K answers to each of P prompts (2 for pairs), whose mean is taken off first because a
    reward's offset differs from prompt to prompt; or (K,): the answers to one prompt. quality is gold, or
    the best stand-in there is: what it misses of quality is blamed on length. Fisher 1924. Lesson 1. Raises
    ValueError where shapes differ or are others, m < 4, or a column does not vary within prompts, is not
    finite, or is a straight function of quality.
    """
    axes = "K" if rewards.ndim == 1 else "P K"
    require_shapes(axes, rewards=rewards, lengths=lengths, quality=quality)
    (_, rl, rq), (_, _, lq), _ = np.corrcoef(_centred(rewards=rewards, lengths=lengths, quality=quality))
    rest = (1 - rq**2) * (1 - lq**2)
    if rest < 1e-9:
        raise ValueError(
            "rewards or lengths are a straight function of quality: nothing is left to correlate"
        )
    free = rewards.numel() - rewards.shape[:-1].numel()
    return fisher_interval((rl - rq * lq) / np.sqrt(rest), 1 / (free - 3), rewards.numel())


def word_gaps(rows: Sequence[Mapping[str, Any]]) -> Float[Tensor, "B"]:
    """Words of the chosen answer less words of the rejected one, (B,), split at white space."""
    return torch.tensor([float(len(row["chosen"].split()) - len(row["rejected"].split())) for row in rows])


def accuracy_by_length(
    rows: Sequence[Mapping[str, Any]],
    chosen_rewards: Float[Tensor, "B"],
    rejected_rewards: Float[Tensor, "B"],
) -> pd.DataFrame:
    """Accuracy where the chosen answer is shorter, of like length, or longer: a row per bucket with pairs.

    words: `word_gaps` of the bucket, (low, high]; accuracy, ties one half; low and high: Wilson's 95 %
    interval; n pairs. A reward that likes length is right in the last buckets and wrong in the first. Lesson
    1. Raises ValueError unless rewards are both (B,) for B rows.
    """
    words = word_gaps(rows)
    require_shapes("B", words=words, chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    credits = pair_credits(chosen_rewards, rejected_rewards).cpu()
    buckets: Any = pd.cut(words.numpy(), [-np.inf, -10, -3, 3, 10, np.inf])
    table = []
    for code in np.unique(buckets.codes):
        estimate = accuracy(credits[torch.from_numpy(buckets.codes == code)])
        table.append((str(buckets.categories[code]), *vars(estimate).values()))
    return pd.DataFrame(table, columns=["words", "accuracy", "low", "high", "n"])


def robustness(
    reward: RewardFn | Any, rows: Sequence[Mapping[str, Any]], changed_rows: Sequence[Mapping[str, Any]]
) -> dict[str, Estimate]:
    """How far a reward moves when texts are changed in a way that should not matter, pair by pair.

    reward_change = mean of (|r'_chosen - r_chosen| + |r'_rejected - r_rejected|) / 2, in units of reward
    order_changes = share of pairs that rewards order otherwise than before; to or from a tie counts one half

    changed_rows[i] is rows[i] in other words. Intervals: Student's and Wilson's, 95 %. The unit of a reward
    is arbitrary, so compare models by order_changes. Lesson 1. Raises ValueError unless there are as many
    changed rows as rows, at least two.
    """
    if len(rows) != len(changed_rows):
        raise ValueError(f"{len(rows)} rows but {len(changed_rows)} changed rows: give one for each")
    before, after = score_pairs(reward, rows), score_pairs(reward, changed_rows)
    moved = sum((new - old).abs() for old, new in zip(before, after, strict=True)) / 2
    return {
        "reward_change": paired_difference(moved, torch.zeros_like(moved)),  # pyright: ignore[reportArgumentType]
        "order_changes": accuracy((pair_credits(*before) - pair_credits(*after)).abs()),
    }


def _centred(**columns: Tensor) -> list[np.ndarray]:
    """Flat arrays less the mean of each row; refuses what has no correlation, or no interval of one."""
    arrays = []
    for name, column in columns.items():
        if column.numel() - column.shape[:-1].numel() < 4:
            raise ValueError(
                f"{name} of shape {tuple(column.shape)} has under 4 free values: give more answers"
            )
        values = column.detach().double().cpu()
        centred = values - values.mean(-1, keepdim=True)
        # Relative to the values, because the mean of equal numbers may miss them by a rounding.
        if not centred.abs().max() > 1e-12 * values.abs().max():
            raise ValueError(f"{name} is constant or not finite, so it correlates with nothing")
        arrays.append(centred.flatten().numpy())
    return arrays

"""How good a reward is at telling the better answer, with intervals; plain functions of rewards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from scipy import stats
from torch import Tensor

from rlhf_helpers.core.models import RewardFn, as_reward_fn
from rlhf_helpers.core.tensors import require_shapes


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval and the number of pairs behind it."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        """Read as 0.612 [0.588, 0.636], n = 1600."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}], n = {self.n}"


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
    from statsmodels.stats.proportion import proportion_confint

    require_shapes("B", credits=credits)
    count = len(credits)
    if count == 0:
        raise ValueError("there are no pairs: an accuracy over nothing is undefined")
    won = credits.double().sum().item()
    low, high = proportion_confint(won, count, method="wilson")
    return Estimate(won / count, float(low), float(high), count)


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
    gaps = (first - second).double().cpu().numpy()
    if len(gaps) < 2:
        raise ValueError(f"a paired interval needs at least two pairs, got {len(gaps)}")
    mean, error = float(gaps.mean()), float(stats.sem(gaps))
    low, high = stats.t.interval(0.95, len(gaps) - 1, mean, error) if error else (mean, mean)
    return Estimate(mean, float(low), float(high), len(gaps))


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
        "B", first_rewards=first_rewards, second_rewards=second_rewards,
        first_gold=first_gold, second_gold=second_gold,
    )  # fmt: skip
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
    """What to log of pairs, unreduced, under TRL's names; an accuracy counts ties one half.

    Raises:
        ValueError: shapes are not both (B,).
    """
    chosen_rewards, rejected_rewards = chosen_rewards.detach(), rejected_rewards.detach()
    return {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": chosen_rewards - rejected_rewards,
        "rewards/accuracies": pair_credits(chosen_rewards, rejected_rewards),
    }

"""Several objectives at once: which policies nothing beats, by how much, and which one to take."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from rlhf_helpers.alignment_eval.measuring import gold_axes, measure_policy
from rlhf_helpers.core.models import RewardFn
from rlhf_helpers.core.stats import numbers, score_interval, to_frame
from rlhf_helpers.world.prompts import known_prompt


def pareto_front(points: Float[Tensor, "N K"]) -> Bool[Tensor, "N"]:
    """Which of N points no other dominates: none is as good in all K objectives and better in one.

    Higher is better; equal points do not dominate each other, so duplicates stay or go together. On measured
    means the front is an estimate too: a point may be on it by luck. Lesson 3. Raises ValueError unless
    points are (N, K), N and K >= 1, and finite.
    """
    given = _points(points)
    as_good = (given[:, None] >= given[None]).all(-1)  # [i, j]: i at least as good as j everywhere
    better = (given[:, None] > given[None]).any(-1)
    return ~(as_good & better).any(0)


def hypervolume(points: Float[Tensor, "N K"], reference: Float[Tensor, "K"]) -> float:
    """Volume of all that is better than `reference` and worse than some point, exact; higher is better.

    A point not above the reference in every objective adds nothing. Its size hangs on the reference: state
    it. Slices along the last objective, O(N^K): for few points and K up to about 5. Zitzler & Thiele 1999.
    Lesson 3. Raises ValueError unless points are (N, K), reference (K,), both finite.
    """
    given = _points(points)
    floor = torch.tensor(numbers(reference))
    if floor.shape != given.shape[1:] or not floor.isfinite().all():
        raise ValueError(f"reference must be ({given.shape[1]},) finite numbers, got {floor.tolist()}")
    heights = given - floor
    return _volume(heights[(heights > 0).all(1)].numpy())


def _volume(heights: np.ndarray) -> float:
    """Of the union of boxes from 0 to each row, all positive: from the highest slab of the last axis down."""
    if not len(heights) or heights.shape[1] == 1:
        return float(heights.max(initial=0.0))
    heights = heights[np.argsort(-heights[:, -1], kind="stable")]
    thick = heights[:, -1] - np.append(heights[1:, -1], 0.0)
    return sum(d * _volume(heights[: i + 1, :-1]) for i, d in enumerate(thick.tolist()) if d)


def _points(points: Any) -> Tensor:
    given = torch.tensor(numbers(points))
    if given.ndim != 2 or not given.numel() or not given.isfinite().all():
        raise ValueError(
            f"points must be (N, K) finite numbers, at least one; got shape {tuple(given.shape)}"
        )
    return given


class MultiObjectiveAlignmentEvaluator:
    """Compare policies on several objectives, and choose among them in four ways.

    `evaluate` gives the scores, one row per policy and prompt. The other methods read them: `weighted_sum`
    gives one number with its interval, `pareto` the front, `constrained` the best policy that keeps the
    limits, `multi_task` weighs families of prompts against each other. A weighted sum finds only points
    on the convex hull of the front and trades harm for help at a fixed rate; a constraint does not. Intervals
    are 95 %, over prompts (`score_interval`). Lesson 3.
    """

    def __init__(
        self,
        objectives: Mapping[str, nn.Module | RewardFn] | None = None,
        *,
        max_new_tokens: int = 64,
        seed: int = 0,
        cache: dict[Any, list[str]] | None = None,
    ) -> None:
        """Keep the objectives and how to sample.

        Args:
            objectives: name -> reward, higher is better; None: the three gold scores of the world.
            max_new_tokens, seed, cache: Of `sample_answers`.

        Raises:
            ValueError: objectives is empty.
        """
        self.objectives = gold_axes() if objectives is None else objectives
        if not self.objectives:
            raise ValueError("give at least one objective, or None for the gold scores of the world")
        self.sampling = {"max_new_tokens": max_new_tokens, "seed": seed, "cache": cache}

    def evaluate(self, policies: Mapping[str, nn.Module], prompts: Sequence[str]) -> pd.DataFrame:
        """Let every policy (name -> model) answer every prompt once: index policy, prompt."""
        tables = {
            name: measure_policy(model, prompts, self.objectives, **self.sampling)
            for name, model in policies.items()
        }
        return pd.concat(tables, names=["policy", "prompt"])

    def weighted_sum(self, scores: pd.DataFrame, weights: Mapping[str, float]) -> pd.DataFrame:
        """Return sum_k w_k objective_k / sum_k w_k with its interval, best policy first.

        Raises:
            ValueError: a weight is negative or names no objective, or all of them are 0.
        """
        factors = pd.Series(weights, dtype=float)
        if not set(factors.index) <= set(scores) or (factors < 0).any() or factors.sum() == 0:
            raise ValueError(f"weights must be >= 0, not all 0, of {list(scores)}; got {weights}")
        worth = scores[factors.index] @ (factors / factors.sum())
        sums = {policy: score_interval(part) for policy, part in worth.groupby("policy", sort=False)}
        return to_frame(sums).sort_values("value", ascending=False, kind="stable")

    def pareto(self, scores: pd.DataFrame) -> pd.DataFrame:
        """Return the mean of every objective, and whether the policy is on the front."""
        means = scores.groupby("policy", sort=False).mean()
        return means.assign(front=pareto_front(means.to_numpy()).numpy())

    def constrained(self, scores: pd.DataFrame, maximise: str, limits: Mapping[str, float]) -> pd.DataFrame:
        """Find the policies with mean >= limit for each of `limits`, and the best of these by `maximise`.

        Returns:
            The means with two columns: feasible, and best, which holds for at most one policy.

        Raises:
            KeyError: a name is not an objective.
        """
        means = scores.groupby("policy", sort=False).mean()
        values = means[maximise]
        feasible = (means[list(limits)] >= pd.Series(limits)).all(axis=1)
        best = values[feasible].idxmax() if feasible.any() else None
        return means.assign(feasible=feasible, best=means.index == best)

    def multi_task(self, scores: pd.DataFrame, name: str) -> pd.DataFrame:
        """Return objective `name` by family of prompts, and the mean over families.

        Every family counts alike, however few its prompts; the family of a prompt that the world does not
        know is "".
        """
        families = scores.index.get_level_values("prompt").map(_family).rename("family")
        table = scores[name].groupby(["policy", families], sort=False).mean().unstack()
        return table.assign(mean=table.mean(axis=1))


def _family(text: str) -> str:
    prompt = known_prompt(text)
    return prompt.family if prompt else ""

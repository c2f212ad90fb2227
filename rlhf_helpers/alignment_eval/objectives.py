"""Several objectives at once: which policies nothing beats, by how much, and which one to take."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from rlhf_helpers.core.generation import generate
from rlhf_helpers.core.models import RewardFn, as_reward_fn, tokenizer_for
from rlhf_helpers.core.stats import numbers, score_interval, to_frame
from rlhf_helpers.world.gold_judge import AXES, gold_scores
from rlhf_helpers.world.prompts import find_prompt


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
    ) -> None:
        """Keep the objectives and how to sample.

        Args:
            objectives: name -> reward, higher is better; None: the three gold scores of the world.
            max_new_tokens: Of an answer.
            seed: Of sampling.

        Raises:
            ValueError: no objective is given, or one is named "policy" or "family".
        """
        given = gold_axes() if objectives is None else objectives
        if not given or {"policy", "family"} & set(given):
            raise ValueError(f'objectives {list(given)}: give at least one, none named "policy" or "family"')
        self.objectives = {name: as_reward_fn(reward) for name, reward in given.items()}
        self.sampling = {"max_new_tokens": max_new_tokens, "seed": seed}

    def evaluate(self, policies: Mapping[str, nn.Module], prompts: Sequence[str]) -> pd.DataFrame:
        """Let every policy answer every prompt once: columns policy, family and the objectives.

        Args:
            policies: name -> model.
            prompts: (N,); the family of one that the world does not know is "".
        """
        prompts = list(prompts)
        families = [_family(prompt) for prompt in prompts]
        frames = []
        for policy, model in policies.items():
            responses = generate(model, tokenizer_for(model), prompts, **self.sampling).responses
            scores = {name: numbers(reward(prompts, responses)) for name, reward in self.objectives.items()}
            frames.append(pd.DataFrame({"policy": policy, "family": families, **scores}))
        return pd.concat(frames, ignore_index=True)

    def weighted_sum(self, scores: pd.DataFrame, weights: Mapping[str, float] | None = None) -> pd.DataFrame:
        """Return sum_k w_k objective_k / sum_k w_k with its interval, best policy first; None: equal weights.

        Raises:
            ValueError: a weight is negative or names no objective, or all of them are 0.
        """
        factors = pd.Series(dict.fromkeys(self.objectives, 1.0) if weights is None else weights, dtype=float)
        if not set(factors.index) <= set(self.objectives) or (factors < 0).any() or factors.sum() == 0:
            raise ValueError(f"weights must be >= 0, not all 0, of {list(self.objectives)}; got {weights}")
        worth = scores[factors.index] @ (factors / factors.sum())
        groups = worth.groupby(scores["policy"], sort=False)
        sums = to_frame({policy: score_interval(part) for policy, part in groups})
        return sums.sort_values("value", ascending=False, kind="stable")

    def pareto(self, scores: pd.DataFrame) -> pd.DataFrame:
        """Return the mean of every objective, and whether the policy is on the front."""
        means = self._means(scores)
        return means.assign(front=pareto_front(means.to_numpy()).numpy())

    def constrained(self, scores: pd.DataFrame, maximise: str, limits: Mapping[str, float]) -> pd.DataFrame:
        """Find the policies with mean >= limit for each of `limits`, and the best of these by `maximise`.

        Returns:
            The means with two columns: feasible, and best, which holds for at most one policy.

        Raises:
            ValueError: a name is not an objective.
        """
        if unknown := {maximise, *limits} - set(self.objectives):
            raise ValueError(f"{sorted(unknown)} are no objectives; there are {list(self.objectives)}")
        means = self._means(scores)
        feasible = (means[list(limits)] >= pd.Series(limits)).all(axis=1)
        best = means.loc[feasible, maximise].idxmax() if feasible.any() else None
        return means.assign(feasible=feasible, best=means.index == best)

    def multi_task(self, scores: pd.DataFrame, name: str, *, by_uncertainty: bool = False) -> pd.DataFrame:
        """Return objective `name` by family of prompts, and its mean over families: sum_f w_f mean_f.

        w_f = 1 / F: every family counts alike, however few its prompts. by_uncertainty: in proportion to
        n_f / s_f^2, with s_f^2 the mean variance within the family, so that a family that is measured badly
        counts less. The weights are common to all policies, in attrs["weights"].

        Raises:
            ValueError: a family has fewer than two prompts.
        """
        groups = scores.groupby(["policy", "family"], sort=False)[name]
        counts = groups.count().unstack()
        if (small := ~(counts >= 2).all()).any():
            raise ValueError(f"families {list(small[small].index)} need at least two prompts per policy")
        worth = counts.min() * 0 + 1
        if by_uncertainty:
            worth = counts.min() / groups.var().unstack().mean().clip(lower=1e-9)
        weights = worth / worth.sum()
        means = groups.mean().unstack()
        frame = means.assign(mean=means @ weights)
        frame.attrs["weights"] = weights.to_dict()
        return frame

    def _means(self, scores: pd.DataFrame) -> pd.DataFrame:
        return scores.groupby("policy", sort=False)[list(self.objectives)].mean()


def gold_axes() -> dict[str, RewardFn]:
    """The world's helpfulness, harmlessness and honesty as three RewardFns: what measures, never trains."""

    def one(axis: str) -> RewardFn:
        def gold_axis(prompts: list[str], responses: list[str], **columns: Any) -> Tensor:
            try:
                return gold_scores(prompts, responses, **columns)[axis]
            except ValueError as error:
                raise ValueError(
                    f"for foreign prompts give rewards (or a safety_fn) of your own. {error}"
                ) from error

        return gold_axis

    return {axis: one(axis) for axis in AXES}


def _family(prompt: str) -> str:
    try:
        return find_prompt(prompt).family
    except ValueError:
        return ""

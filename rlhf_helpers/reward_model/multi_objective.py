"""One trunk, one reward per objective, and weights that you have to choose."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rlhf_helpers.core.models import load_encoder
from rlhf_helpers.core.tensors import require_number
from rlhf_helpers.preference_data.collection import collect_comparisons
from rlhf_helpers.reward_model.model import RewardModel, distinct_rows
from rlhf_helpers.world.annotators import Annotator
from rlhf_helpers.world.gold_judge import AXES


class MultiObjectiveRewardModel(RewardModel):
    """A joint encoder with a head of K numbers, one per objective: `model(ids)` -> (rewards, by objective).

    r(x, y) = sum_k weight_k r_k(x, y),   r_k(x, y) = w_k . h + b_k

    objectives: their names. weights: by name; None: 1 / K each. They are not parameters:
        what one objective is worth in terms of another is a choice of values, and data labeled per objective
        does not hold it. Assigning `model.weights` makes another choice without training.
    trunk: from `load_encoder`; None loads base_model_name. All else as in `RewardModel`.

    Learns from rows prompt, chosen, rejected, objective_labels, a dict objective -> number: above 0 the
    chosen answer is better in this objective, below 0 the rejected one, 0, None or absent says nothing
    (`label_objectives` writes it; a difference of gold scores serves as well). Each head minimizes
    Bradley-Terry on its own labels, in one pass of the shared trunk. Lesson 1. Raises ValueError where
    objectives repeat, or weights do not fit them.
    """

    kind = "multi_objective"

    def __init__(
        self,
        trunk: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        base_model_name: str | Path = "tiny",
        objectives: Sequence[str] = AXES,
        weights: Mapping[str, float] | None = None,
        **options: Any,
    ) -> None:
        """Put a new head of K rows on the trunk; options: pooling, max_length."""
        if trunk is None:
            trunk, tokenizer = load_encoder(base_model_name)
        super().__init__(trunk, tokenizer, **options)
        self.objectives = tuple(objectives)
        if not self.objectives or len(set(self.objectives)) < len(self.objectives):
            raise ValueError(f"objectives must be distinct names, at least one; got {self.objectives}")
        count, size = len(self.objectives), self.head.linear.in_features
        self.head.linear = nn.Linear(size, count).to(trunk.device)
        nn.init.normal_(self.head.linear.weight, std=(size + 1) ** -0.5)
        nn.init.zeros_(self.head.linear.bias)
        self.weights = weights

    @property
    def weights(self) -> dict[str, float]:
        """What each objective counts in the overall reward."""
        return dict(self._weights)

    @weights.setter
    def weights(self, weights: Mapping[str, float] | None) -> None:
        """By name, or None for 1 / K each."""
        names = self.objectives
        by_name = dict.fromkeys(names, 1 / len(names)) if weights is None else weights
        if set(by_name) != set(names):
            raise ValueError(f"weights must give one number to each of {names}; got {weights!r}")
        for name in names:
            require_number(f"weights[{name!r}]", by_name[name])
        self._weights = {name: float(by_name[name]) for name in names}
        self.options = {"objectives": list(self.objectives), "weights": self._weights}

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Shaped[Tensor, "B T"] | None = None,
        **packed: Tensor,
    ) -> tuple[Float[Tensor, "B"], dict[str, Float[Tensor, "B"]]]:
        """(rewards (B,), dict objective -> (B,) in the order of `objectives`); masks as in `RewardModel`."""
        rewards = self._judge(self._read(input_ids, attention_mask, **packed))
        columns = zip(self.objectives, rewards.unbind(1), strict=True)
        return self._combine(rewards), {name: column.clone() for name, column in columns}  # no views: FSDP

    def _combine(self, rewards: Float[Tensor, "B K"]) -> Float[Tensor, "B"]:
        # not a matrix product: autocast would round that to bf16
        return (rewards * torch.tensor(list(self._weights.values()), device=rewards.device)).sum(1)

    def rewards_of(self, sequences: Sequence[list[int]]) -> Float[Tensor, "B"]:
        """The weighted sum for token sequences from `encode`; keeps the gradient."""
        return self._combine(self.objective_rewards_of(sequences))

    def objective_rewards_of(self, sequences: Sequence[list[int]]) -> Float[Tensor, "B K"]:
        """The reward of each objective for token sequences from `encode`; keeps the gradient."""
        distinct, rows = distinct_rows(sequences)
        # Through `forward`, where the weights of a sharded model are gathered.
        _, by_objective = self(**self._batch(distinct))
        return torch.stack(list(by_objective.values()), 1)[rows]


def label_objectives(
    rows: Sequence[Mapping[str, Any]], annotators: Mapping[str, Annotator], *, seed: int = 0
) -> list[dict[str, Any]]:
    """Have one annotator per objective compare the two answers of each row: adds objective_labels, +1 or -1.

    annotators: objective -> the person who judges it, `world.annotators.VALUE_GROUPS` for instance.
    """
    pairs = [{"prompt": r["prompt"], "first": r["chosen"], "second": r["rejected"]} for r in rows]
    votes = collect_comparisons(pairs, list(annotators.values()), seed=seed)
    return [
        {**row, "objective_labels": dict(zip(annotators, (2 * vote - 1).tolist(), strict=True))}
        for row, vote in zip(rows, votes, strict=True)
    ]

"""From a batch of judgments to a loss per group: one short function per kind of judgment.

A group holds the answers to one prompt, each encoded once, and the judgments on them (`elements`). The loss
of a group of pairs is the mean over them, so the group counts once however many pairs it holds. The loss of a
ranking is Plackett-Luce's sum over the ranks, not a mean: ln K! where all K rewards are equal, so a longer
ranking weighs more.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf_helpers.core.preference_losses import bradley_terry_loss, plackett_luce_loss, rating_loss
from rlhf_helpers.core.tensors import require_shapes
from rlhf_helpers.reward_model.elements import PreferenceGroup
from rlhf_helpers.reward_model.metrics import pair_metrics
from rlhf_helpers.reward_model.model import RewardModel

LossFn = Callable[..., Tensor]
LossesAndMetrics = tuple[Float[Tensor, "B"], dict[str, Tensor]]  # the loss of each group, and its metrics


def pairwise_losses(
    model: RewardModel,
    groups: Sequence[PreferenceGroup],
    loss_fn: LossFn = bradley_terry_loss,
    **options: Tensor,
) -> LossesAndMetrics:
    """Bradley-Terry: -log sigmoid(r_chosen - r_rejected), the mean over the pairs of each group."""
    chosen_rewards, rejected_rewards, owner = pair_rewards(model, groups)

    losses = loss_fn(chosen_rewards, rejected_rewards, **options)

    require_shapes("B", chosen_rewards=chosen_rewards, loss=losses)
    metrics = pair_metrics(chosen_rewards, rejected_rewards)
    means = {name: mean_per_group(value, owner, len(groups)) for name, value in metrics.items()}
    return mean_per_group(losses, owner, len(groups)), means


def margin_losses(
    model: RewardModel, groups: Sequence[PreferenceGroup], loss_fn: LossFn = bradley_terry_loss
) -> LossesAndMetrics:
    """Bradley-Terry with a margin in nats of log-odds: -log sigmoid(r_chosen - r_rejected - margin)."""
    margins = [number for group in groups for number in group.numbers]  # one per pair
    return pairwise_losses(model, groups, loss_fn, margin=torch.tensor(margins, device=model.trunk.device))


def ranking_losses(
    model: RewardModel, groups: Sequence[PreferenceGroup], loss_fn: LossFn = plackett_luce_loss
) -> LossesAndMetrics:
    """Plackett-Luce on whole rankings, best answer first: a sum over the ranks, which is not normalized."""
    sizes = [len(group.sequences) for group in groups]
    rewards = model.rewards_of([ids for group in groups for ids in group.sequences])
    ranked = pad_sequence(list(rewards.split(sizes)), batch_first=True)  # (B, K)
    mask = pad_sequence([torch.ones(size) for size in sizes], batch_first=True).to(rewards.device)
    losses = loss_fn(ranked, mask=mask)
    require_shapes("B", rewards=ranked[:, 0], loss=losses)
    better, worse, _, owner = pair_indices(groups)
    metrics = pair_metrics(rewards[better], rewards[worse])
    return losses, {name: mean_per_group(value, owner, len(groups)) for name, value in metrics.items()}


def rating_losses(
    model: RewardModel, groups: Sequence[PreferenceGroup], loss_fn: LossFn = rating_loss
) -> LossesAndMetrics:
    """Squared error: (r - rating)^2."""
    rewards = model.rewards_of([group.sequences[0] for group in groups])
    ratings = rewards.new_tensor([group.numbers[0] for group in groups])
    losses = loss_fn(rewards, ratings)
    require_shapes("B", rewards=rewards, loss=losses)
    return losses, {}


OBJECTIVES: dict[str, Callable[..., LossesAndMetrics]] = {
    "pairwise": pairwise_losses,
    "margin": margin_losses,
    "ranking": ranking_losses,
    "rating": rating_losses,
}


def pair_rewards(
    model: RewardModel, groups: Sequence[PreferenceGroup]
) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"], list[int]]:
    """Return rewards of the N chosen and rejected answers, from one forward, and the group of each pair."""
    read = getattr(model, "objective_rewards_of", model.rewards_of)
    sequences = [ids for group in groups for ids in group.sequences]
    rewards = read(sequences).reshape(len(sequences), -1)  # a column per objective
    better, worse, columns, owner = pair_indices(groups)
    return rewards[better, columns], rewards[worse, columns], owner


def pair_indices(groups: Sequence[PreferenceGroup]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Return, per pair: the index of the better and of the worse answer, the objective, the group."""
    starts = np.cumsum([0, *(len(group.sequences) for group in groups)]).tolist()
    better, worse, columns, owner = [], [], [], []
    for number, group in enumerate(groups):
        for (first, second), column in zip(group.pairs, group.columns, strict=True):
            better.append(starts[number] + first)
            worse.append(starts[number] + second)
            columns.append(column)
            owner.append(number)
    return better, worse, columns, owner


def mean_per_group(values: Float[Tensor, "N"], owner: Sequence[int], count: int) -> Float[Tensor, "B"]:
    """Average the values of the pairs of each group."""
    index = torch.tensor(owner, device=values.device)
    sums = values.new_zeros(count).index_add(0, index, values)
    return sums / torch.bincount(index, minlength=count)

"""From a batch of judgments to a loss: one short function per kind of judgment, Bradley-Terry first.

A group holds the answers to one prompt, each encoded once, and the judgments on them (`elements`). Each
function returns the losses, already multiplied by their weights, whose sum over a batch is that of the losses
of its groups, and the metrics. The formulas are in `core.preference_losses`.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain

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
# The losses (N,) of a batch times their weights, and its metrics: (name -> values (N,), weights (N,)).
LossesAndMetrics = tuple[Float[Tensor, "N"], list[tuple[Mapping[str, Tensor], Tensor]]]


def pairwise_losses(
    model: RewardModel,
    groups: Sequence[PreferenceGroup],
    loss_fn: LossFn = bradley_terry_loss,
    **options: Tensor,
) -> LossesAndMetrics:
    """Bradley-Terry: -log sigmoid(r_chosen - r_rejected), the mean over the pairs of each group."""
    # One forward pass reads every answer once, however many pairs it is in.
    rewards = answer_rewards(model, groups)
    chosen, rejected, weights = pair_indices(groups, columns=len(rewards[0]))
    chosen_rewards = rewards.flatten()[chosen]
    rejected_rewards = rewards.flatten()[rejected]

    losses = loss_fn(chosen_rewards, rejected_rewards, **options)

    require_shapes("B", chosen_rewards=chosen_rewards, loss=losses)
    # The pairs of a group share one unit of weight: a prompt with many answers counts no more than another.
    weights = weights.to(losses.device)
    metrics = {"loss": losses, **pair_metrics(chosen_rewards, rejected_rewards)}
    return weights * losses, [(metrics, weights)]


def margin_losses(
    model: RewardModel, groups: Sequence[PreferenceGroup], loss_fn: LossFn = bradley_terry_loss
) -> LossesAndMetrics:
    """Bradley-Terry with a margin in nats of log-odds: -log sigmoid(r_chosen - r_rejected - margin)."""
    margins = [number for group in groups for number in group.numbers]  # one per pair
    return pairwise_losses(model, groups, loss_fn, margin=torch.tensor(margins, device=model.trunk.device))


def ranking_losses(
    model: RewardModel, groups: Sequence[PreferenceGroup], loss_fn: LossFn = plackett_luce_loss
) -> LossesAndMetrics:
    """Plackett-Luce on whole rankings, best answer first: a sum over the ranks, which is not normalized.

    It is ln K! where all K rewards are equal, so a longer ranking weighs more.
    """
    rewards = answer_rewards(model, groups).squeeze(-1)
    rankings = rewards.split([len(group.sequences) for group in groups])
    ranked = pad_sequence(list(rankings), batch_first=True)  # (B, K)
    mask = pad_sequence([torch.ones_like(ranking) for ranking in rankings], batch_first=True)

    losses = loss_fn(ranked, mask=mask)

    require_shapes("B", rewards=ranked[:, 0], loss=losses)
    better, worse, weights = pair_indices(groups)
    of_pairs = pair_metrics(rewards[better], rewards[worse])
    return losses, [({"loss": losses}, torch.ones_like(losses)), (of_pairs, weights.to(losses.device))]


def rating_losses(
    model: RewardModel, groups: Sequence[PreferenceGroup], loss_fn: LossFn = rating_loss
) -> LossesAndMetrics:
    """Squared error: (r - rating)^2."""
    rewards = answer_rewards(model, groups).squeeze(-1)
    ratings = rewards.new_tensor([group.numbers[0] for group in groups])

    losses = loss_fn(rewards, ratings)

    require_shapes("B", rewards=rewards, loss=losses)
    return losses, [({"loss": losses}, torch.ones_like(losses))]


OBJECTIVES: dict[str, Callable[..., LossesAndMetrics]] = {
    "pairwise": pairwise_losses,
    "margin": margin_losses,
    "ranking": ranking_losses,
    "rating": rating_losses,
}


def answer_rewards(model: RewardModel, groups: Sequence[PreferenceGroup]) -> Float[Tensor, "N K"]:
    """Return the rewards of all answers of some groups, one column per objective of the model."""
    read = getattr(model, "objective_rewards_of", model.rewards_of)
    sequences = list(chain.from_iterable(group.sequences for group in groups))
    return read(sequences).view(len(sequences), -1)


def pair_indices(
    groups: Sequence[PreferenceGroup], columns: int = 1
) -> tuple[list[int], list[int], Float[Tensor, "N"]]:
    """Return, per pair, where the rewards of its better and worse answer stand, and its weight.

    The places count the entries of `answer_rewards` row by row. The weight is 1 / (pairs of its group).
    """
    better, worse, weights = [], [], []
    start = 0
    for group in groups:
        for (first, second), column in zip(group.pairs, group.columns, strict=True):
            better.append((start + first) * columns + column)
            worse.append((start + second) * columns + column)
            weights.append(1 / len(group.pairs))
        start += len(group.sequences)
    return better, worse, torch.tensor(weights)

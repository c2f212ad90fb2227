"""From a batch of judgments to losses: one short function per kind of judgment, Bradley-Terry first.

A group holds the answers to one prompt, each encoded once, and the judgments on them (`elements`). Each
function returns losses, their weights and metrics, all (N,), N pairs or groups: the weighted sum of the
losses is that of the batch, in which every group counts 1. The formulas are in `core.preference_losses`.
"""

from collections.abc import Callable, Sequence
from functools import partial

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
PerRow = Float[Tensor, "N"]
Losses = tuple[PerRow, PerRow, dict[str, PerRow]]  # losses, weights, metrics


def pairwise_losses(
    model: RewardModel, groups: Sequence[PreferenceGroup], loss_fn: LossFn = bradley_terry_loss
) -> Losses:
    """Bradley-Terry: -logsigmoid(r_chosen - r_rejected), the mean over the pairs of each group."""
    chosen = [group.sequences[better] for group in groups for better, _ in group.pairs]
    rejected = [group.sequences[worse] for group in groups for _, worse in group.pairs]
    objectives = [column for group in groups for column in group.columns]
    chosen_rewards, rejected_rewards = answer_rewards(model, chosen + rejected, objectives * 2).chunk(2)

    losses = loss_fn(chosen_rewards, rejected_rewards)  # -logsigmoid(chosen_rewards - rejected_rewards)

    require_shapes("B", chosen_rewards=chosen_rewards, loss=losses)
    # The pairs of a group share one unit of weight: a prompt with many answers counts no more than another.
    weights = losses.new_tensor([1 / len(group.pairs) for group in groups for _ in group.pairs])
    return losses, weights, pair_metrics(chosen_rewards, rejected_rewards)


def margin_losses(
    model: RewardModel, groups: Sequence[PreferenceGroup], loss_fn: LossFn = bradley_terry_loss
) -> Losses:
    """Bradley-Terry with a margin in nats of log-odds: -logsigmoid(r_chosen - r_rejected - margin)."""
    margins = [number for group in groups for number in group.numbers]  # one per pair
    margin = torch.tensor(margins, device=model.trunk.device)
    return pairwise_losses(model, groups, partial(loss_fn, margin=margin))


def ranking_losses(
    model: RewardModel, groups: Sequence[PreferenceGroup], loss_fn: LossFn = plackett_luce_loss
) -> Losses:
    """Plackett-Luce on whole rankings, best answer first: a sum over the ranks, which is not normalized.

    It is ln K! where all K rewards are equal, so a longer ranking weighs more.
    """
    rewards = answer_rewards(model, [sequence for group in groups for sequence in group.sequences])
    rankings = rewards.split([len(group.sequences) for group in groups])
    ranked = pad_sequence(list(rankings), batch_first=True)  # (B, K)
    mask = pad_sequence([torch.ones_like(ranking) for ranking in rankings], batch_first=True)

    losses = loss_fn(ranked, mask=mask)

    require_shapes("B", rewards=ranked[:, 0], loss=losses)
    metrics = []
    for ranking in rankings:
        better, worse = torch.triu_indices(len(ranking), len(ranking), 1)
        metrics.append(pair_metrics(ranking[better], ranking[worse]))
    means = {name: torch.stack([row[name].mean() for row in metrics]) for name in metrics[0]}
    return losses, torch.ones_like(losses), means


def rating_losses(
    model: RewardModel, groups: Sequence[PreferenceGroup], loss_fn: LossFn = rating_loss
) -> Losses:
    """Squared error: (r - rating)^2."""
    rewards = answer_rewards(model, [group.sequences[0] for group in groups])
    ratings = rewards.new_tensor([group.numbers[0] for group in groups])

    losses = loss_fn(rewards, ratings)

    require_shapes("B", rewards=rewards, loss=losses)
    return losses, torch.ones_like(losses), {}


OBJECTIVES: dict[str, Callable[..., Losses]] = {
    "pairwise": pairwise_losses,
    "margin": margin_losses,
    "ranking": ranking_losses,
    "rating": rating_losses,
}


def answer_rewards(
    model: RewardModel, sequences: Sequence[list[int]], objectives: Sequence[int] | int = 0
) -> PerRow:
    """Compute the reward of each answer in one forward pass, which reads an answer of several pairs once.

    objectives: the head's column for each answer; a model of one objective has one.
    """
    rows = {ids: row for row, ids in enumerate(dict.fromkeys(map(tuple, sequences)))}
    read = getattr(model, "objective_rewards_of", model.rewards_of)
    rewards = read([*map(list, rows)]).view(len(rows), -1)
    return rewards[[rows[tuple(ids)] for ids in sequences], objectives]

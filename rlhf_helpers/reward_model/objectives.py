"""From a batch of judgments to losses: one short function per kind of judgment, Bradley-Terry first.

A group holds the answers to one prompt, each encoded once, and the judgments on them (`elements`). Each
function returns the losses and the metrics of B groups, name -> (B,). The formulas are in
`core.preference_losses`.
"""

from collections.abc import Callable, Mapping, Sequence
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
from rlhf_helpers.reward_model.multi_objective import MultiObjectiveRewardModel

LossFn = Callable[..., Tensor]
Losses = tuple[Float[Tensor, "B"], dict[str, Float[Tensor, "B"]]]  # of each group: loss and metrics
ObjectiveFn = Callable[..., Losses]


def pairwise_losses(
    model: RewardModel, groups: Sequence[PreferenceGroup], loss_fn: LossFn = bradley_terry_loss
) -> Losses:
    """Bradley-Terry: -logsigmoid(r_chosen - r_rejected), the mean over the pairs of each group.

    groups: of pairs about one prompt; most hold one pair.
    """
    chosen, rejected = paired_answers(groups)
    # One forward pass, which reads an answer of several pairs once.
    chosen_rewards, rejected_rewards = model.rewards_of(chosen + rejected).chunk(2)

    losses = loss_fn(chosen_rewards, rejected_rewards)  # -logsigmoid(chosen_rewards - rejected_rewards)

    return group_means(groups, losses, pair_metrics(chosen_rewards, rejected_rewards))


def paired_answers(groups: Sequence[PreferenceGroup]) -> tuple[list[list[int]], list[list[int]]]:
    """Return the token ids of prompt and chosen answer, and of prompt and rejected answer, of every pair."""
    chosen = [group.sequences[better] for group in groups for better, _ in group.pairs]
    rejected = [group.sequences[worse] for group in groups for _, worse in group.pairs]
    return chosen, rejected


def group_means(groups: Sequence[PreferenceGroup], losses: Tensor, metrics: Mapping[str, Tensor]) -> Losses:
    """Average losses and metrics over the pairs of each group: one with many pairs weighs no more."""
    require_shapes("N", chosen_rewards=metrics["rewards/chosen"], loss=losses)
    sizes = [len(group.pairs) for group in groups]

    def means(values: Tensor) -> Tensor:
        return torch.stack([pairs.mean() for pairs in values.split(sizes)])

    return means(losses), {name: means(values) for name, values in metrics.items()}


def objective_losses(
    model: MultiObjectiveRewardModel, groups: Sequence[PreferenceGroup], loss_fn: LossFn = bradley_terry_loss
) -> Losses:
    """Bradley-Terry in each objective: a pair was judged in one, and its rewards are those of that column."""
    chosen, rejected = paired_answers(groups)
    columns = [column for group in groups for column in group.columns] * 2
    rewards = model.objective_rewards_of(chosen + rejected)[range(len(columns)), columns]
    chosen_rewards, rejected_rewards = rewards.chunk(2)

    losses = loss_fn(chosen_rewards, rejected_rewards)

    return group_means(groups, losses, pair_metrics(chosen_rewards, rejected_rewards))


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
    rewards = model.rewards_of([sequence for group in groups for sequence in group.sequences])
    rankings = rewards.split([len(group.sequences) for group in groups])
    ranked = pad_sequence(list(rankings), batch_first=True)  # (B, K)
    mask = pad_sequence([torch.ones_like(ranking) for ranking in rankings], batch_first=True)

    losses = loss_fn(ranked, mask=mask)

    require_shapes("B", rewards=ranked[:, 0], loss=losses)
    metrics = []
    for ranking in rankings:
        better, worse = torch.triu_indices(len(ranking), len(ranking), 1)
        metrics.append(pair_metrics(ranking[better], ranking[worse]))
    return losses, {name: torch.stack([row[name].mean() for row in metrics]) for name in metrics[0]}


def rating_losses(
    model: RewardModel, groups: Sequence[PreferenceGroup], loss_fn: LossFn = rating_loss
) -> Losses:
    """Squared error: (r - rating)^2."""
    rewards = model.rewards_of([group.sequences[0] for group in groups])
    ratings = rewards.new_tensor([group.numbers[0] for group in groups])

    losses = loss_fn(rewards, ratings)

    require_shapes("B", rewards=rewards, loss=losses)
    return losses, {}


OBJECTIVES: dict[str, ObjectiveFn] = {
    "pairwise": pairwise_losses,
    "margin": margin_losses,
    "ranking": ranking_losses,
    "rating": rating_losses,
}


def objective_fn_of(model: RewardModel, objective: str, loss_fn: LossFn | None = None) -> ObjectiveFn:
    """Return the function from (model, groups) to losses, with your own loss bound where it is given."""
    function = objective_losses if hasattr(model, "objectives") else OBJECTIVES[objective]
    return function if loss_fn is None else partial(function, loss_fn=loss_fn)

"""From a batch of preferences to one loss per row: paired DPO first, then its relatives.

    pair_losses          DPO and its relatives with a reference
    mean_logp_losses     ORPO, SimPO
    slic_losses          SLiC
    kto_losses           single answers with a label
    listwise_losses      rankings
    batch_losses_of      chooses among them by `OBJECTIVES`, and binds the loss and its settings

Each reads the log-probs of the answers, calls the loss on the line where its sign is decided, and returns the
losses (B,) and the metrics, name -> (B,). The formulas are in `core.preference_losses`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlhf_helpers.core import preference_losses
from rlhf_helpers.core.tensors import require_shapes
from rlhf_helpers.core.training import Engine, micro_batches
from rlhf_helpers.dpo.data import DPODataset, sum_logps

LossFn = Callable[..., Tensor]
Losses = tuple[Float[Tensor, "B"], dict[str, Float[Tensor, "B"]]]  # of each row: loss and metrics
BatchLosses = Callable[..., Losses]


def pair_losses(
    model: nn.Module, data: DPODataset, indices: Sequence[int], loss_fn: LossFn, beta: float
) -> Losses:
    """Compute the losses of DPO and its relatives with a reference, and their metrics.

    For loss_fn = `dpo_loss` (Rafailov et al. 2023, eq. 7), one loss per pair:

        -logsigmoid(beta [(log pi - log ref)(chosen) - (log pi - log ref)(rejected)])
    """
    # Of each pair, the token ids of (prompt, chosen answer) and of (prompt, rejected answer).
    chosen, rejected = zip(*(data.sequences[index] for index in indices), strict=True)
    # Both in one forward pass. Sums over an answer's tokens, in nats, each (B,).
    policy_chosen_logps, policy_rejected_logps = sum_logps(model, chosen + rejected).chunk(2)
    # Those of the reference never change: they were computed once, before the first step.
    ref_logps = data.ref_logps_of(indices).to(policy_chosen_logps.device)  # (B, 2)
    ref_chosen_logps, ref_rejected_logps = ref_logps.unbind(1)

    losses = loss_fn(
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=beta
    )

    # The implicit reward, beta log(pi / ref): known up to beta log Z(x), so only differences mean something.
    chosen_rewards = beta * (policy_chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - ref_rejected_logps)
    metrics = pair_metrics(chosen_rewards, rejected_rewards, policy_chosen_logps, policy_rejected_logps)
    return losses, metrics


def pair_metrics(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
) -> dict[str, Tensor]:
    """Name what is logged of pairs, by TRL's names."""
    return {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": chosen_rewards - rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),  # a tie counts 0
        "logps/chosen": policy_chosen_logps,
        "logps/rejected": policy_rejected_logps,
    }


def mean_logp_losses(
    model: nn.Module, data: DPODataset, indices: Sequence[int], loss_fn: LossFn, beta: float
) -> Losses:
    """ORPO and SimPO: the mean log-prob per token of each answer, without a reference."""
    chosen, rejected = zip(*(data.sequences[index] for index in indices), strict=True)
    policy_logps = sum_logps(model, chosen + rejected)
    lengths = policy_logps.new_tensor([len(answer) for _, answer in chosen + rejected])
    chosen_mean_logps, rejected_mean_logps = (policy_logps / lengths).chunk(2)

    losses = loss_fn(chosen_mean_logps, rejected_mean_logps, beta=beta)

    metrics = pair_metrics(beta * chosen_mean_logps, beta * rejected_mean_logps, *policy_logps.chunk(2))
    return losses, metrics


def slic_losses(
    model: nn.Module, data: DPODataset, indices: Sequence[int], loss_fn: LossFn, beta: float
) -> Losses:
    """SLiC on sums of log-probs, without a reference; it has no beta."""
    chosen, rejected = zip(*(data.sequences[index] for index in indices), strict=True)
    policy_chosen_logps, policy_rejected_logps = sum_logps(model, chosen + rejected).chunk(2)

    # It keeps up the likelihood of a target: here the chosen answer.
    losses = loss_fn(policy_chosen_logps, policy_rejected_logps, policy_chosen_logps)

    logps = policy_chosen_logps, policy_rejected_logps
    return losses, pair_metrics(*logps, *logps)


@torch.no_grad()
def mismatched_log_ratios(model: nn.Module, data: DPODataset, indices: Sequence[int]) -> Float[Tensor, "B"]:
    """Return log(pi / ref) of another prompt's answer to the prompt of each row, what KTO measures KL on."""
    logps = sum_logps(model, [data.sequences[index][1] for index in indices])
    return logps - data.ref_logps_of(indices)[:, 1].to(logps.device)


def kto_reference_point(engine: Engine, data: DPODataset, indices: np.ndarray) -> Float[Tensor, ""]:
    """Estimate KL(policy || reference) in nats, KTO's z0, from the mismatched answers of the whole batch.

    z0 = max(0, mean of log(pi / ref)), over all micro-batches and processes, without gradient: with a point
    of its own for each micro-batch, accumulation would change the loss. Ethayarajh et al. 2024, eq. 7.
    """
    log_ratio_sum = 0.0
    for local, row_weight in micro_batches(engine, indices):
        log_ratio_sum += row_weight * mismatched_log_ratios(engine.model, data, local).sum().item()  # pyright: ignore[reportArgumentType]
    return torch.tensor(engine.sum(log_ratio_sum) / len(indices)).clamp(min=0)


def kto_losses(
    model: nn.Module,
    data: DPODataset,
    indices: Sequence[int],
    loss_fn: LossFn,
    beta: float,
    reference_point: Float[Tensor, ""],
) -> Losses:
    """KTO on single answers: does log(pi / ref) of each beat the reference point z0, or stay below it?

    reference_point: z0 from `kto_reference_point`, one number for the whole batch; logged as `kl`.
    """
    policy_logps = sum_logps(model, [data.sequences[index][0] for index in indices])
    device = policy_logps.device
    ref_logps = data.ref_logps_of(indices)[:, 0].to(device)
    desirable = torch.tensor([bool(data.rows[index]["label"]) for index in indices], device=device)
    reference_point = reference_point.to(device)

    losses = loss_fn(policy_logps, ref_logps, desirable, reference_point, beta=beta)

    rewards = beta * (policy_logps - ref_logps)
    # Each row has one answer. NaN: it does not count in the means of the other side.
    return losses, {
        "kl": reference_point.expand_as(losses),
        "rewards/chosen": rewards.where(desirable, torch.nan),
        "rewards/rejected": rewards.where(~desirable, torch.nan),
        "logps/chosen": policy_logps.where(desirable, torch.nan),
        "logps/rejected": policy_logps.where(~desirable, torch.nan),
    }


def listwise_losses(
    model: nn.Module, data: DPODataset, indices: Sequence[int], loss_fn: LossFn, beta: float
) -> Losses:
    """Plackett-Luce on rankings, best answer first; a ranking's metrics are means over its pairs."""
    sizes = [len(data.sequences[index]) for index in indices]
    logps = sum_logps(model, [sequence for index in indices for sequence in data.sequences[index]])
    losses, metrics = [], []
    for index, policy_logps in zip(indices, logps.split(sizes), strict=True):
        policy_logps = policy_logps[None]  # (1, K): rankings may differ in length
        ref_logps = data.ref_logps_of([index]).to(logps.device)

        loss = loss_fn(policy_logps, ref_logps, beta=beta)

        require_shapes("B", policy_logps=policy_logps[:, 0], loss=loss)
        losses.append(loss)
        better, worse = torch.triu_indices(len(policy_logps[0]), len(policy_logps[0]), 1)
        rewards = beta * (policy_logps - ref_logps)[0]
        pairs = pair_metrics(rewards[better], rewards[worse], policy_logps[0, better], policy_logps[0, worse])
        metrics.append({name: value.mean() for name, value in pairs.items()})
    return torch.cat(losses), {name: torch.stack([row[name] for row in metrics]) for name in metrics[0]}


@dataclass(frozen=True)
class Objective:
    """How the loss of one name is computed.

    batch_losses: one of the functions above.
    loss: what it calls, from `core.preference_losses`.
    settings: names of the settings that the loss is called with besides beta.
    kind: of the rows that it learns from.
    has_reference: whether the loss compares the policy with a reference model.
    """

    batch_losses: BatchLosses
    loss: LossFn
    settings: tuple[str, ...] = ()
    kind: str = "pairs"
    has_reference: bool = True


OBJECTIVES = {
    "dpo": Objective(pair_losses, preference_losses.dpo_loss),
    "cdpo": Objective(pair_losses, preference_losses.dpo_loss, ("label_smoothing",)),
    "robust": Objective(pair_losses, preference_losses.robust_dpo_loss, ("label_smoothing",)),
    "ipo": Objective(pair_losses, preference_losses.ipo_loss),
    "hinge": Objective(pair_losses, preference_losses.hinge_loss),
    "slic": Objective(slic_losses, preference_losses.slic_loss, ("delta", "reg_weight"), has_reference=False),
    "orpo": Objective(mean_logp_losses, preference_losses.orpo_loss, has_reference=False),
    "simpo": Objective(mean_logp_losses, preference_losses.simpo_loss, ("gamma",), has_reference=False),
    "kto": Objective(
        kto_losses, preference_losses.kto_loss, ("desirable_weight", "undesirable_weight"), kind="unpaired"
    ),
    "listwise": Objective(listwise_losses, preference_losses.listwise_dpo_loss, kind="rankings"),
}


def batch_losses_of(settings: Any, loss_fn: LossFn | None = None) -> BatchLosses:
    """Return (model, data, indices, beta=) -> (losses, metrics), with the loss and its settings bound.

    KTO's takes one more keyword: reference_point, from `kto_reference_point`.

    Args:
        settings: a `DPOSettings`, which names the loss.
        loss_fn: your own loss, called like the one that is named; None: that one.
    """
    objective = OBJECTIVES[settings.loss]
    constants = {name: getattr(settings, name) for name in objective.settings}
    return partial(objective.batch_losses, loss_fn=partial(loss_fn or objective.loss, **constants))

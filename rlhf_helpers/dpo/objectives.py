"""From a batch of preferences to one loss per row: paired DPO first, then its relatives.

    pair_losses              DPO and its relatives with a reference
    reference_free_losses    ORPO, SimPO, SLiC
    kto_losses               single answers with a label
    listwise_losses          rankings
    batch_losses             chooses among them by `OBJECTIVES`

Each reads the log-probs of the answers, calls the loss on the line where its sign is decided, and returns the
losses (B,) with the metrics of the batch. The formulas are in `core.preference_losses`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
# A metric is a mean over the rows that it counts: (name -> values (B,), 1.0 or a mask (B,)).
Metrics = list[tuple[Mapping[str, Tensor], float | Tensor]]


def pair_losses(
    model: nn.Module, data: DPODataset, indices: Sequence[int], loss_fn: LossFn, keywords: Mapping[str, float]
) -> tuple[Float[Tensor, "B"], Metrics]:
    """Compute the losses of DPO and its relatives with a reference, and their metrics.

    For loss_fn = `dpo_loss` (Rafailov et al. 2023, eq. 7), one loss per pair:

        -logsigmoid(beta [(log pi - log ref)(chosen) - (log pi - log ref)(rejected)])
    """
    # Both answers of every pair in one forward pass. Sums over an answer's tokens, in nats, each (B,).
    chosen, rejected = data.answers(indices, 0), data.answers(indices, 1)
    policy_chosen_logps, policy_rejected_logps = sum_logps(model, chosen + rejected).chunk(2)
    # Those of the reference never change: they were computed once, before the first step.
    ref_chosen_logps, ref_rejected_logps = data.ref_logps_of(indices, policy_chosen_logps.device).unbind(1)

    losses = loss_fn(
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, **keywords
    )

    # The implicit reward, beta log(pi / ref): known up to beta log Z(x), so only differences mean something.
    chosen_rewards = keywords["beta"] * (policy_chosen_logps - ref_chosen_logps)
    rejected_rewards = keywords["beta"] * (policy_rejected_logps - ref_rejected_logps)
    metrics = pair_metrics(chosen_rewards, rejected_rewards, policy_chosen_logps, policy_rejected_logps)
    return losses, [({"loss": losses, **metrics}, 1.0)]


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


def reference_free_losses(
    model: nn.Module,
    data: DPODataset,
    indices: Sequence[int],
    loss_fn: LossFn,
    keywords: Mapping[str, float],
    reads: str,
) -> tuple[Float[Tensor, "B"], Metrics]:
    """ORPO and SimPO on mean log-probs per token, SLiC on sums: no reference."""
    chosen, rejected = data.answers(indices, 0), data.answers(indices, 1)
    policy_logps = sum_logps(model, chosen + rejected)
    policy_chosen_logps, policy_rejected_logps = policy_logps.chunk(2)
    if reads == "means":
        lengths = policy_logps.new_tensor([len(answer) for _, answer in chosen + rejected])
        chosen_mean_logps, rejected_mean_logps = (policy_logps / lengths).chunk(2)
        losses = loss_fn(chosen_mean_logps, rejected_mean_logps, **keywords)
        rewards = keywords["beta"] * chosen_mean_logps, keywords["beta"] * rejected_mean_logps
    else:  # SLiC keeps up the likelihood of a target: here the chosen answer
        losses = loss_fn(policy_chosen_logps, policy_rejected_logps, policy_chosen_logps, **keywords)
        rewards = policy_chosen_logps, policy_rejected_logps
    metrics = pair_metrics(*rewards, policy_chosen_logps, policy_rejected_logps)
    return losses, [({"loss": losses, **metrics}, 1.0)]


@torch.no_grad()
def mismatched_log_ratios(model: nn.Module, data: DPODataset, indices: Sequence[int]) -> Float[Tensor, "B"]:
    """Return log(pi / ref) of another prompt's answer to the prompt of each row, what KTO measures KL on."""
    logps = sum_logps(model, data.answers(indices, 1))
    return logps - data.ref_logps_of(indices, logps.device)[:, 1]


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
    keywords: Mapping[str, float],
    reference_point: Float[Tensor, ""],
) -> tuple[Float[Tensor, "B"], Metrics]:
    """KTO on single answers: does log(pi / ref) of each beat the reference point z0, or stay below it?

    reference_point: z0 from `kto_reference_point`, one number for the whole batch; logged as `kl`.
    """
    policy_logps = sum_logps(model, data.answers(indices, 0))
    device = policy_logps.device
    ref_logps = data.ref_logps_of(indices, device)[:, 0]
    desirable = torch.tensor([bool(data.rows[index]["label"]) for index in indices], device=device)

    reference_point = reference_point.to(device)
    losses = loss_fn(policy_logps, ref_logps, desirable, reference_point, **keywords)

    rewards = keywords["beta"] * (policy_logps - ref_logps)
    return losses, [
        ({"loss": losses, "kl": reference_point.expand_as(losses)}, 1.0),
        ({"rewards/chosen": rewards, "logps/chosen": policy_logps}, desirable),
        ({"rewards/rejected": rewards, "logps/rejected": policy_logps}, ~desirable),
    ]


def listwise_losses(
    model: nn.Module, data: DPODataset, indices: Sequence[int], loss_fn: LossFn, keywords: Mapping[str, float]
) -> tuple[Float[Tensor, "B"], Metrics]:
    """Plackett-Luce on rankings, best answer first; a ranking's metrics are means over its pairs."""
    sizes = [len(data.sequences[index]) for index in indices]
    logps = sum_logps(model, [sequence for index in indices for sequence in data.sequences[index]])
    losses, metrics = [], []
    for index, policy_logps in zip(indices, logps.split(sizes), strict=True):
        ref_logps = data.ref_logps_of([index], logps.device)
        policy_logps = policy_logps[None]  # (1, K): rankings may differ in length

        loss = loss_fn(policy_logps, ref_logps, **keywords)

        require_shapes("B", policy_logps=policy_logps[:, 0], loss=loss)
        losses.append(loss)
        better, worse = torch.triu_indices(len(policy_logps[0]), len(policy_logps[0]), 1)
        rewards = keywords["beta"] * (policy_logps - ref_logps)[0]
        pairs = pair_metrics(rewards[better], rewards[worse], policy_logps[0, better], policy_logps[0, worse])
        metrics.append({name: value.mean() for name, value in pairs.items()})
    means = {name: torch.stack([row[name] for row in metrics]) for name in metrics[0]}
    return torch.cat(losses), [({"loss": torch.cat(losses), **means}, 1.0)]


@dataclass(frozen=True)
class Objective:
    """A loss of `core.preference_losses`, the kind of rows it learns from, and what it is called with."""

    loss: LossFn
    keywords: tuple[str, ...]  # settings handed over by name
    kind: str = "pairs"
    reads: str = "ratios"  # "ratios" to a reference, "means" per token, or "sums" of the policy alone


OBJECTIVES = {
    "dpo": Objective(preference_losses.dpo_loss, ("beta",)),
    "cdpo": Objective(preference_losses.dpo_loss, ("beta", "label_smoothing")),
    "robust": Objective(preference_losses.robust_dpo_loss, ("beta", "label_smoothing")),
    "ipo": Objective(preference_losses.ipo_loss, ("beta",)),
    "hinge": Objective(preference_losses.hinge_loss, ("beta",)),
    "slic": Objective(preference_losses.slic_loss, ("delta", "reg_weight"), reads="sums"),
    "orpo": Objective(preference_losses.orpo_loss, ("beta",), reads="means"),
    "simpo": Objective(preference_losses.simpo_loss, ("beta", "gamma"), reads="means"),
    "kto": Objective(
        preference_losses.kto_loss, ("beta", "desirable_weight", "undesirable_weight"), kind="unpaired"
    ),
    "listwise": Objective(preference_losses.listwise_dpo_loss, ("beta",), kind="rankings"),
}


def batch_losses(
    model: nn.Module,
    data: DPODataset,
    indices: Sequence[int],
    settings: Any,
    beta: float,
    loss_fn: LossFn | None = None,
    reference_point: Tensor | None = None,
) -> tuple[Float[Tensor, "B"], Metrics]:
    """Return the loss of each row, with gradient, and the metrics, by the function of their kind.

    Args:
        settings: a `DPOSettings`.
        beta: the present one.
        loss_fn: your own loss; None: the loss named in the settings.
        reference_point: KTO's z0 (`kto_reference_point`).

    Raises:
        ValueError: the loss is not (B,).
    """
    objective = OBJECTIVES[settings.loss]
    keywords = {name: beta if name == "beta" else getattr(settings, name) for name in objective.keywords}
    loss_fn = loss_fn or objective.loss
    if objective.kind == "unpaired":
        losses, metrics = kto_losses(model, data, indices, loss_fn, keywords, reference_point)  # pyright: ignore[reportArgumentType]
    elif objective.kind == "rankings":
        losses, metrics = listwise_losses(model, data, indices, loss_fn, keywords)
    elif objective.reads == "ratios":
        losses, metrics = pair_losses(model, data, indices, loss_fn, keywords)
    else:
        losses, metrics = reference_free_losses(model, data, indices, loss_fn, keywords, objective.reads)
    require_shapes("B", tie_weights=data.tie_weights(indices), loss=losses)
    return losses, metrics

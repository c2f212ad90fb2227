"""From a batch of preferences to losses and metrics: which loss reads what, by name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from rlhf_helpers.core import preference_losses as losses
from rlhf_helpers.core.tensors import require_shapes
from rlhf_helpers.dpo.data import DPODataset, sum_logps

LossFn = Callable[..., Tensor]


@dataclass(frozen=True)
class Objective:
    """A loss of `core.preference_losses`, the kind of rows it learns from, and what it is called with."""

    loss: LossFn
    numbers: tuple[str, ...]  # settings handed over as keywords
    kind: str = "pairs"
    reads: str = "ratios"  # "ratios" to a reference, "means" per token, or "sums" of the policy alone


OBJECTIVES = {
    "dpo": Objective(losses.dpo_loss, ("beta",)),
    "cdpo": Objective(losses.dpo_loss, ("beta", "label_smoothing")),
    "robust": Objective(losses.robust_dpo_loss, ("beta", "label_smoothing")),
    "ipo": Objective(losses.ipo_loss, ("beta",)),
    "hinge": Objective(losses.hinge_loss, ("beta",)),
    "slic": Objective(losses.slic_loss, ("delta", "reg_weight"), reads="sums"),
    "orpo": Objective(losses.orpo_loss, ("beta",), reads="means"),
    "simpo": Objective(losses.simpo_loss, ("beta", "gamma"), reads="means"),
    "kto": Objective(losses.kto_loss, ("beta", "desirable_weight", "undesirable_weight"), kind="unpaired"),
    "listwise": Objective(losses.listwise_dpo_loss, ("beta",), kind="rankings"),
}


def batch_sums(
    model: nn.Module, data: DPODataset, group: Sequence[int], settings: Any, beta: float,
    loss_fn: LossFn | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Loss and metrics of the rows `group`, weighted and summed; the loss keeps its gradient.

    One forward scores all answers, chosen and rejected; KTO's mismatched ones get theirs without gradient.
    settings: a `DPOSettings`; beta: the present one. Raises ValueError for a loss that is not (B,).
    """
    objective, rows = OBJECTIVES[settings.loss], [data.sequences[i] for i in group]
    numbers = {n: beta if n == "beta" else getattr(settings, n) for n in objective.numbers}
    sizes = [1 if data.kind == "unpaired" else len(row) for row in rows]
    flat = [seq for row, size in zip(rows, sizes, strict=True) for seq in row[:size]]
    policy, lengths = sum_logps(model, flat, data.pad_id)
    device, compares = policy.device, objective.reads == "ratios"
    refs = [data.ref_logps[i] if compares else torch.zeros(n) for i, n in zip(group, sizes, strict=True)]
    weights = torch.tensor([data.weights[i] for i in group], device=device)
    ref = torch.cat([r[:size] for r, size in zip(refs, sizes, strict=True)]).to(device)
    if data.kind == "unpaired":
        labels = torch.tensor([bool(data.rows[i]["label"]) for i in group], device=device)
        with torch.no_grad():
            other, _ = sum_logps(model, [row[1] for row in rows], data.pad_id)
        kl = (other - torch.stack([r[1] for r in refs]).to(device)).mean().clamp(min=0)
        found = (loss_fn or objective.loss)(policy, ref, labels, kl, **numbers)
        require_shapes("B", policy_logps=policy, loss=found)
        return _unpaired_sums(found, policy, ref, labels, kl, weights, beta)
    sums: dict[str, Tensor] = {}
    parts = [x.split(sizes) for x in (policy, ref, lengths)]
    for size in sorted(set(sizes)):  # rankings of one length at a time; pairs all have two
        mine = [i for i, s in enumerate(sizes) if s == size]
        block = [torch.stack([part[i] for i in mine]) for part in parts]
        found = _ranked_sums(objective, loss_fn, *block, weights[mine], numbers)
        sums = {key: sums.get(key, 0.0) + value for key, value in found.items()}
    return sums


def _ranked_sums(
    objective: Objective, loss_fn: LossFn | None, policy: Float[Tensor, "B K"], ref: Float[Tensor, "B K"],
    lengths: Float[Tensor, "B K"], weights: Float[Tensor, "B"], numbers: dict[str, float],
) -> dict[str, Tensor]:  # fmt: skip
    """Loss and metrics of B lists of answers, best first; a ranking's metrics are means over its pairs."""
    loss_fn, means = loss_fn or objective.loss, policy / lengths
    if objective.kind == "rankings":
        found = loss_fn(policy, ref, **numbers)
    elif objective.reads == "ratios":
        found = loss_fn(policy[:, 0], policy[:, 1], ref[:, 0], ref[:, 1], **numbers)
    elif objective.reads == "means":
        found = loss_fn(means[:, 0], means[:, 1], **numbers)
    else:
        found = loss_fn(policy[:, 0], policy[:, 1], policy[:, 0], **numbers)
    rewards = {"ratios": policy - ref, "means": means, "sums": policy}[objective.reads].detach()
    rewards = numbers.get("beta", 1.0) * rewards
    better, worse = torch.triu_indices(policy.shape[1], policy.shape[1], 1)
    chosen, rejected = rewards[:, better], rewards[:, worse]
    values = {
        "rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).float(),  # a tie counts 0
        "logps/chosen": policy.detach()[:, better], "logps/rejected": policy.detach()[:, worse],
    }  # fmt: skip
    require_shapes("B", policy_logps=policy[:, 0], loss=found)
    return {"loss": (found * weights).sum()} | {
        key: (value.mean(-1) * weights).sum() for key, value in values.items()
    }


def _unpaired_sums(
    found: Float[Tensor, "B"], policy: Float[Tensor, "B"], ref: Float[Tensor, "B"], labels: Bool[Tensor, "B"],
    kl: Float[Tensor, ""], weights: Float[Tensor, "B"], beta: float,
) -> dict[str, Tensor]:  # fmt: skip
    """The same for single answers: what is chosen is desirable, what is rejected is not."""
    rewards, logps = beta * (policy - ref).detach(), policy.detach()
    sums = {"loss": (found * weights).sum(), "kl": kl * weights.sum()}
    for side, mask in (("chosen", labels), ("rejected", ~labels)):
        sums |= {f"rewards/{side}": (rewards * mask * weights).sum()}
        sums |= {f"logps/{side}": (logps * mask * weights).sum()}
    return sums


def totals(data: DPODataset, group: Sequence[int]) -> dict[str, float]:
    """What each metric's sum over the rows `group` is divided by; all others by that of "loss"."""
    all_of = sum(data.weights[i] for i in group) or 1.0  # nothing but ties: a sum of 0 over anything
    if data.kind != "unpaired":
        return {"loss": all_of}
    good = sum(data.weights[i] for i in group if data.rows[i]["label"])
    sides = {"chosen": good, "rejected": all_of - good}
    return {"loss": all_of} | {f"{of}/{side}": n for of in ("rewards", "logps") for side, n in sides.items()}


def as_means(sums: dict[str, Any], over: dict[str, float]) -> dict[str, float]:
    """Divide sums by their totals; a metric over no row at all is left out."""
    row = {key: float(value) / over.get(key, over["loss"]) for key, value in sums.items() if over.get(key, 1)}
    if "rewards/margins" not in row and {"rewards/chosen", "rewards/rejected"} <= set(row):
        row["rewards/margins"] = row["rewards/chosen"] - row["rewards/rejected"]
    return row

"""DPO whose beta is moved until the policy is as far from the reference as it should be."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from rlhf_helpers.core.training import History
from rlhf_helpers.dpo.data import DPODataset, Rows
from rlhf_helpers.dpo.training import DPOTrainer


class AdaptiveDPO:
    """DPO with beta <- beta (1 + clip(KL / target_kl - 1, -0.2, 0.2) / beta_horizon) after each update.

    KL(policy || reference) is measured on the policy's own samples, in nats a response: the sum over its
    tokens, not the mean. KL above target_kl raises beta, since a larger beta holds the policy closer to the
    reference (Ziegler et al. 2019's controller). Other keywords: fields of `DPOSettings`. `.trainer.train` is
    the whole loop. Lesson 2.
    """

    def __init__(
        self, model: nn.Module, ref_model: nn.Module | None = None, tokenizer: Any = None,
        *, initial_beta: float = 0.1, target_kl: float = 2.0, **changes: Any,
    ) -> None:  # fmt: skip
        """ref_model None: a frozen copy of the model. Raises what `DPOTrainer` raises."""
        changes |= {"beta": initial_beta, "target_kl": target_kl}
        self.trainer = DPOTrainer(model, ref_model, tokenizer, **changes)

    @property
    def beta(self) -> float:
        """The present beta."""
        return self.trainer.beta

    def train_step(
        self, prompts: Sequence[str], chosen: Sequence[str], rejected: Sequence[str]
    ) -> dict[str, float]:
        """One pass over these pairs; the metrics of `DPOTrainer.train`, beta and objective/kl with them."""
        return self.trainer.train_step({"prompt": prompts, "chosen": chosen, "rejected": rejected})


def adaptive_dpo_training(
    model: nn.Module, ref_model: nn.Module | None, data: Rows | DPODataset, target_kl: float = 2.0,
    *, beta: float = 0.1, learning_rate: float = 3e-4, epochs: int = 3, progress: bool = True, **changes: Any,
) -> History:  # fmt: skip
    """Train by DPO with what keeps it from drifting off or standing still; a row a step, with beta.

    beta RISES while KL is above target_kl (lowering it there would loosen the only hold on the policy) and
    falls below it. KL is the policy's, on its own samples, in nats a response: at a target of 0.01 it may not
    move. logsigmoid of the margin (-log(sigmoid(x)) is inf near x = -100); the reference's log-probs computed
    once, without gradient; gradients clipped to norm 1; a learning rate that falls to 0. data: pairs, as in
    `DPODataset`. learning_rate: 3e-4 for "tiny", 1e-6 for 100 M parameters and more. Trains `model` in place.
    Lesson 2. Raises ValueError as `DPODataset`.
    """
    trainer = DPOTrainer(
        model, ref_model, beta=beta, target_kl=target_kl, learning_rate=learning_rate, epochs=epochs,
        max_grad_norm=1.0, progress=progress, **changes,
    )  # fmt: skip
    return trainer.train(data)

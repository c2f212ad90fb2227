"""DPO whose beta is moved until the policy is as far from the reference as it should be."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from rlhf_helpers.core.training import History
from rlhf_helpers.dpo.data import Data
from rlhf_helpers.dpo.trainer import DPOTrainer


class AdaptiveDPO:
    """DPO with beta <- beta (1 + clip(KL / target_kl - 1, -0.2, 0.2) / beta_horizon) after each update.

    KL(policy || reference) is measured on the policy's own samples, in nats per response: the sum over its
    tokens, not the mean. KL above target_kl raises beta, since a larger beta holds the policy closer to the
    reference (the controller of Ziegler et al. 2019). `.trainer.train` is the whole loop. Lesson 2.

    Args:
        ref_model: None: a frozen copy of the model.
        changes: fields of `DPOSettings`.

    Raises:
        TypeError, ValueError: as `DPOTrainer`.
    """

    def __init__(
        self,
        model: nn.Module,
        ref_model: nn.Module | None = None,
        tokenizer: Any = None,
        *,
        initial_beta: float = 0.1,
        target_kl: float = 2.0,
        **changes: Any,
    ) -> None:
        """Make the trainer."""
        changes |= {"beta": initial_beta, "target_kl": target_kl}
        self.trainer = DPOTrainer(model, ref_model, tokenizer, **changes)

    @property
    def beta(self) -> float:
        """The present beta."""
        return self.trainer.run.beta_controller.value

    def train_step(
        self, prompts: Sequence[str], chosen: Sequence[str], rejected: Sequence[str]
    ) -> dict[str, float]:
        """Make one pass over these pairs; return the metrics of `DPOTrainer.train`, beta and KL with them."""
        return self.trainer.train_step({"prompt": prompts, "chosen": chosen, "rejected": rejected})


def adaptive_dpo_training(
    model: nn.Module,
    ref_model: nn.Module | None,
    data: Data,
    target_kl: float = 2.0,
    *,
    beta: float = 0.1,
    learning_rate: float | None = None,
    epochs: int = 3,
    progress: bool = True,
    **changes: Any,
) -> History:
    """Train by DPO with everything that keeps it from drifting away or standing still.

    beta RISES while KL is above target_kl (lowering it there would loosen the only hold on the policy) and
    falls below it. The loss uses logsigmoid of the margin (-log(sigmoid(x)) is inf near x = -100), the
    log-probs of the reference are computed once, without gradient, gradients are clipped to norm 1, and the
    learning rate falls to 0. Lesson 2.

    Args:
        model: trained in place.
        data: pairs, as in `DPODataset`.
        target_kl: nats per response, of the policy's own samples: at 0.01 the policy may hardly move.
        learning_rate: None: by the size of the model.
        changes: further fields of `DPOSettings`.

    Returns:
        One row per step, beta included.

    Raises:
        ValueError: as `DPODataset`.
    """
    changes |= {"beta": beta, "target_kl": target_kl, "learning_rate": learning_rate, "epochs": epochs}
    trainer = DPOTrainer(model, ref_model, max_grad_norm=1.0, progress=progress, **changes)
    return trainer.train(data)

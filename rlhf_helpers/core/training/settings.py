"""Settings of a training run, the learning-rate schedule and the seeds."""

import math
import random
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from rlhf_helpers.core.lora import has_adapter
from rlhf_helpers.core.models import say_once
from rlhf_helpers.core.tensors import require_number
from rlhf_helpers.core.training.distributed import process_state
from rlhf_helpers.core.training.tracking import TRACKERS

SCHEDULES = ("linear", "cosine", "constant")
PRECISIONS = (None, "no", "bf16")
RANK_STRIDE = 100_003
TINY_PARAMETERS = 1_200_000  # the tiny assistant and its heads have a little less
LORA_FACTOR = 10  # adapters start at 0 and want larger steps than weights that are trained already


@dataclass(frozen=True)
class TrainingSettings:
    """What every loop of the course shares; a bad value raises ValueError naming field, rule and value.

    A step of the loop holds one or more updates (each the work on one batch), and each update ends with one
    optimizer step: see `engine`. `warmup_steps` counts optimizer steps, `checkpoint_every` steps of the loop.
    """

    learning_rate: float | None = None  # peak value; None: by the size of the model (resolve_learning_rate)
    tiny_learning_rate: float = 1e-3  # what None means for the tiny assistant; larger models get less
    lora: int = 0  # rank of the adapters that are trained in place of the weights; 0 trains the weights
    weight_decay: float = 0.0  # pulls matrices towards 0, not towards the reference: off unless asked for
    betas: tuple[float, float] = (0.9, 0.999)  # Adam's memory for the gradient and for its square
    schedule: str = "linear"  # decay to zero after warm-up; "constant" when the length is unknown
    warmup_steps: int = 0  # Adam's variance estimate is poor in its first steps: start them small
    max_grad_norm: float | None = 1.0  # one bad batch must not undo the run; None switches clipping off
    accumulation_steps: int = 1  # micro-batches per optimizer step: large batches in little memory
    mixed_precision: str | None = None  # None: bf16 where a GPU computes it natively, else full precision
    shard: bool = False  # several GPUs: each holds its part of weights, gradients and optimizer state
    gradient_checkpointing: bool = False  # recompute activations: about 30 % slower, far less memory
    max_length: int | None = None  # tokens of prompt and response together; None: the model's context
    seed: int = 0  # order of the data, dropout, sampling
    checkpoint_every: int = 0  # steps between checkpoints; 0 writes none
    keep_checkpoints: int = 2  # the newest few; two, so that one damaged checkpoint is not fatal
    run_dir: str | Path | None = None  # where checkpoints and metrics live
    log: str | None = None  # each step's metrics go to run_dir as "jsonl" or "tensorboard", or to "wandb"
    progress: bool = True  # a bar on the main process, gone when the loop ends

    def __post_init__(self) -> None:
        """Refuse values that would train wrongly or not at all."""
        for name, choices in (("schedule", SCHEDULES), ("mixed_precision", PRECISIONS), ("log", TRACKERS)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"TrainingSettings.{name} must be one of {choices}, got {getattr(self, name)!r}"
                )
        require_fields(self, "accumulation_steps", "keep_checkpoints", whole=True, at_least=1)
        require_fields(self, "lora", "warmup_steps", "seed", "checkpoint_every", whole=True, at_least=0)
        require_fields(self, "tiny_learning_rate", "weight_decay", at_least=0)
        for beta in self.betas:
            require_number("TrainingSettings.betas", beta, at_least=0, below=1)
        if self.learning_rate is not None:
            require_fields(self, "learning_rate", at_least=0)
        if self.max_grad_norm is not None:
            require_fields(self, "max_grad_norm", above=0)
        if self.max_length is not None:
            require_fields(self, "max_length", whole=True, at_least=2)
        if self.run_dir is None and (self.checkpoint_every or self.log):
            raise ValueError(
                "TrainingSettings.run_dir must name a folder for checkpoint_every or log, got None"
            )
        if self.log in ("tensorboard", "wandb") and not find_spec(self.log):
            raise ValueError(f"TrainingSettings.log={self.log!r} needs its package: pip install {self.log}")

    def for_single_steps(self) -> Self:
        """Return these settings for a class that is called step by step.

        The rate stays constant: there is no last step, so nothing to decay towards.
        """
        return replace(self, schedule="constant", warmup_steps=0, accumulation_steps=1, checkpoint_every=0)


def resolve_learning_rate(settings: TrainingSettings, model: torch.nn.Module) -> float:
    """Return settings.learning_rate; where it is None, a rate that suits the size of the model, and say so.

    rate = tiny_learning_rate min(1, 1.2 M / N)^0.6, times 10 where adapters (LoRA) are trained

    N counts all parameters of trunk and heads, frozen ones too, but not the adapters. For RLOO and DPO
    3e-4 becomes 1.8e-5 at 135 M parameters, 8e-6 at 0.5 B and 1.7e-6 at 7 B.
    """
    if settings.learning_rate is not None:
        return settings.learning_rate
    count = sum(p.numel() for name, p in model.named_parameters() if ".lora_" not in name)
    count = max(TINY_PARAMETERS, count)  # the tiny assistant gets exactly its own rate
    rate = settings.tiny_learning_rate * (TINY_PARAMETERS / count) ** 0.6
    rule = f"{settings.tiny_learning_rate:g} x (1.2 M / {count / 1e6:.4g} M)^0.6"
    if has_adapter(model):
        rate, rule = rate * LORA_FACTOR, f"{rule} x {LORA_FACTOR} for LoRA"
    if rate != settings.tiny_learning_rate:
        say_once(f"learning rate {rate:.2g} = {rule}; give learning_rate to choose another")
    return rate


def learning_rate_factor(optimizer_step: int, settings: TrainingSettings, total: int | None) -> float:
    r"""Fraction of the peak learning rate at one optimizer step, counted from 0.

    Warm-up over w steps: (k + 1) / (w + 1). Then, with n steps in all, linear: (n - k) / (n - w); cosine:
    (1 + cos(pi (k - w) / (n - w))) / 2; constant: 1. No step of the run has factor 0: each one learns.
    """
    warmup = settings.warmup_steps
    if optimizer_step < warmup:
        return (optimizer_step + 1) / (warmup + 1)
    if settings.schedule == "constant":
        return 1.0
    if settings.schedule == "linear":
        return max(0.0, (total - optimizer_step) / (total - warmup))  # pyright: ignore[reportOptionalOperand]
    done = min(1.0, (optimizer_step - warmup) / (total - warmup))  # pyright: ignore[reportOptionalOperand]
    return 0.5 * (1 + math.cos(math.pi * done))


def set_seed(seed: int) -> int:
    """Seed python, numpy and torch (all devices) with seed + rank * 100003; return the value used.

    Each process of a multi-GPU run needs its own stream, or all of them sample the same text.
    """
    rank_seed = seed + RANK_STRIDE * process_state().process_index
    random.seed(rank_seed)
    np.random.seed(rank_seed % 2**32)
    torch.manual_seed(rank_seed)
    return rank_seed


def require_fields(settings: TrainingSettings, *names: str, **rule: Any) -> None:
    """Refuse fields that break a rule of `require_number`; ValueError names the field."""
    for name in names:
        require_number(f"{type(settings).__name__}.{name}", getattr(settings, name), **rule)

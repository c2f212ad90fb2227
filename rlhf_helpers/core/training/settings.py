"""Settings of a training run, the learning-rate schedule and the seeds."""

import math
import random
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Self

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
        first, second = self.betas
        norm, least_one, least_zero = self.max_grad_norm, "be a whole number >= 1", "be a whole number >= 0"
        has_folder = self.run_dir is not None or not (self.checkpoint_every or self.log)
        known = self.log in TRACKERS and (self.log in (None, "jsonl") or find_spec(self.log))
        rules = [
            ("learning_rate", "be finite and >= 0, or None", 0 <= (self.learning_rate or 0) < math.inf),
            ("tiny_learning_rate", "be finite and >= 0", 0 <= self.tiny_learning_rate < math.inf),
            ("lora", least_zero, _whole(self.lora, 0)),
            ("max_length", "be a whole number >= 2, or None", _whole(self.max_length or 2, 2)),
            ("weight_decay", "be finite and >= 0", 0 <= self.weight_decay < math.inf),
            ("betas", "lie in [0, 1)", 0 <= first < 1 and 0 <= second < 1),
            ("schedule", f"be one of {SCHEDULES}", self.schedule in SCHEDULES),
            ("max_grad_norm", "be > 0, or None for no clipping", norm is None or norm > 0),
            ("mixed_precision", f"be one of {PRECISIONS}", self.mixed_precision in PRECISIONS),
            ("accumulation_steps", least_one, _whole(self.accumulation_steps, 1)),
            ("keep_checkpoints", least_one, _whole(self.keep_checkpoints, 1)),
            ("warmup_steps", least_zero, _whole(self.warmup_steps, 0)),
            ("seed", least_zero, _whole(self.seed, 0)),
            ("checkpoint_every", least_zero, _whole(self.checkpoint_every, 0)),
            ("run_dir", "name a folder when checkpoint_every > 0 or log is given", has_folder),
            ("log", f"be one of {TRACKERS}, its package installed (pip install {self.log})", known),
        ]
        for field, rule, holds in rules:
            if not holds:
                raise ValueError(f"TrainingSettings.{field} must {rule}; got {getattr(self, field)!r}")

    def for_single_steps(self) -> Self:
        """Return these settings for a class that is called step by step.

        The rate stays constant: there is no last step, so nothing to decay towards.
        """
        return replace(self, schedule="constant", warmup_steps=0, accumulation_steps=1, checkpoint_every=0)


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


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


def require_fields(settings: TrainingSettings, *names: str, whole: bool = False, **limits: float) -> None:
    """Refuse fields outside their limits (see `require_number`), or not whole; ValueError names the field."""
    for name in names:
        value = getattr(settings, name)
        field = f"{type(settings).__name__}.{name}"
        require_number(field, value, **limits)
        if whole and not isinstance(value, int):
            raise ValueError(f"{field} must be a whole number, got {value!r}")

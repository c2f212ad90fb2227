"""The one loop core: settings, engine, batches, checkpoints, history and supervised fine-tuning."""

from rlhf_helpers.core.training.batches import micro_batches, offline_steps
from rlhf_helpers.core.training.engine import Engine
from rlhf_helpers.core.training.history import History
from rlhf_helpers.core.training.interrupts import RunInterrupted
from rlhf_helpers.core.training.metrics import MeanMetrics
from rlhf_helpers.core.training.settings import (
    TrainingSettings,
    learning_rate_factor,
    resolve_learning_rate,
    set_seed,
)
from rlhf_helpers.core.training.supervised import memory_efficient_training, sft

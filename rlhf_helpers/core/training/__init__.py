"""The one loop core: settings, engine, checkpoints, history and supervised fine-tuning."""

from rlhf_helpers.core.training.engine import Engine
from rlhf_helpers.core.training.history import History
from rlhf_helpers.core.training.settings import TrainingSettings, learning_rate_factor, set_seed
from rlhf_helpers.core.training.supervised import memory_efficient_training, sft

__all__ = [
    "Engine", "History", "TrainingSettings", "learning_rate_factor", "memory_efficient_training",
    "set_seed", "sft",
]  # fmt: skip

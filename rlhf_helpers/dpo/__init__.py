"""Learning from preferences without a reward model: DPO and related methods, offline and online."""

from rlhf_helpers.core.preference_losses import dpo_loss
from rlhf_helpers.dpo.adaptive import AdaptiveDPO, adaptive_dpo_training
from rlhf_helpers.dpo.data import DPODataset
from rlhf_helpers.dpo.online import OnlineDPOSettings, online_dpo
from rlhf_helpers.dpo.pipeline import DPOPipeline
from rlhf_helpers.dpo.settings import DPOSettings
from rlhf_helpers.dpo.trainer import DPOTrainer
from rlhf_helpers.dpo.training import train_dpo

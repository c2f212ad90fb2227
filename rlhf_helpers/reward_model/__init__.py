"""Reward models: from comparisons that people made to a number that a policy can climb."""

from rlhf_helpers.reward_model.inference import RewardModelInference
from rlhf_helpers.reward_model.metrics import (
    Estimate,
    accuracy,
    gold_agreement,
    pair_credits,
    pair_metrics,
    paired_difference,
    pairwise_accuracy,
    score_pairs,
)
from rlhf_helpers.reward_model.model import RewardModel, create_reward_model
from rlhf_helpers.reward_model.training import RewardModelTrainer, RewardSettings

__all__ = [
    "Estimate",
    "RewardModel",
    "RewardModelInference",
    "RewardModelTrainer",
    "RewardSettings",
    "accuracy",
    "create_reward_model",
    "gold_agreement",
    "pair_credits",
    "pair_metrics",
    "paired_difference",
    "pairwise_accuracy",
    "score_pairs",
]

"""Reward models: from comparisons that people made to a number that a policy can climb."""

from rlhf_helpers.reward_model.calibration import (
    expected_calibration_error,
    fit_temperature,
    length_margins,
    reliability_curve,
)
from rlhf_helpers.reward_model.create import create_reward_model, load_reward_model
from rlhf_helpers.reward_model.ensemble import RewardEnsemble
from rlhf_helpers.reward_model.inference import RewardModelInference
from rlhf_helpers.reward_model.metrics import (
    accuracy,
    accuracy_by_length,
    gold_agreement,
    length_correlation,
    pair_credits,
    paired_difference,
    pairwise_accuracy,
    robustness,
    score_pairs,
    word_gaps,
)
from rlhf_helpers.reward_model.model import RewardModel
from rlhf_helpers.reward_model.multi_objective import MultiObjectiveRewardModel, label_objectives
from rlhf_helpers.reward_model.normalisation import NormalisedReward, normalise_reward
from rlhf_helpers.reward_model.separate import SeparateRewardModel
from rlhf_helpers.reward_model.training import (
    RewardModelTrainer,
    RewardSettings,
    stable_reward_training,
    train_reward_model,
)

"""Policy optimization: loops that move a language model towards any reward, one file per idea."""

from rlhf_helpers.policy_optimization.best_of_n import (
    best_of_n,
    best_of_n_curve,
    best_of_n_exact_kl,
    best_of_n_kl,
    best_of_n_shares,
)
from rlhf_helpers.policy_optimization.critic_free import (
    GRPOSettings,
    ReinforceSettings,
    RLOOSettings,
    critic_free,
    grpo,
    reinforce,
    reinforce_loss,
    rloo,
)
from rlhf_helpers.policy_optimization.iterative import iterative_rlhf
from rlhf_helpers.policy_optimization.on_policy import (
    OnPolicyRun,
    OnPolicySettings,
    RunOptions,
    per_response,
    per_token,
)
from rlhf_helpers.policy_optimization.pipeline import PolicyOptimizationPipeline
from rlhf_helpers.policy_optimization.ppo import PPOSettings, PPOTrainer, ppo, robust_ppo_training
from rlhf_helpers.policy_optimization.rejection_sampling import RejectionSamplingSettings, rejection_sampling
from rlhf_helpers.policy_optimization.rollouts import (
    collect,
    evaluate_policy,
    policy_logps,
    policy_outputs,
    rollout_metrics,
    score,
)
from rlhf_helpers.policy_optimization.trpo import (
    TRPOSettings,
    conjugate_gradient,
    fisher_product,
    natural_step,
    surrogate_loss,
    trpo,
)

__all__ = [
    "GRPOSettings", "OnPolicyRun", "OnPolicySettings", "PPOSettings", "PPOTrainer",
    "PolicyOptimizationPipeline", "RLOOSettings", "ReinforceSettings", "RejectionSamplingSettings",
    "RunOptions", "TRPOSettings", "best_of_n", "best_of_n_curve", "best_of_n_exact_kl", "best_of_n_kl",
    "best_of_n_shares", "collect", "conjugate_gradient", "critic_free", "evaluate_policy", "fisher_product",
    "grpo", "iterative_rlhf", "natural_step", "per_response", "per_token", "policy_logps", "policy_outputs",
    "ppo", "reinforce", "reinforce_loss", "rejection_sampling", "rloo", "robust_ppo_training",
    "rollout_metrics", "score",
    "surrogate_loss", "trpo",
]  # fmt: skip

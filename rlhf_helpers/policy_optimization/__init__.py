"""Policy optimization: loops that move a language model towards any reward, one file per idea."""

from rlhf_helpers.core.rollouts import collect, rollout_metrics, score
from rlhf_helpers.policy_optimization.best_of_n import (
    best_of_n,
    best_of_n_curve,
    best_of_n_exact_kl,
    best_of_n_kl,
    best_of_n_shares,
)
from rlhf_helpers.policy_optimization.facades import PPOTrainer, robust_ppo_training
from rlhf_helpers.policy_optimization.grpo import GRPOSettings, grpo
from rlhf_helpers.policy_optimization.iterative import iterative_rlhf
from rlhf_helpers.policy_optimization.on_policy import OnPolicySettings, RunOptions
from rlhf_helpers.policy_optimization.pipeline import PolicyOptimizationPipeline
from rlhf_helpers.policy_optimization.ppo import PPOSettings, ppo
from rlhf_helpers.policy_optimization.reinforce import (
    ReinforceSettings,
    RLOOSettings,
    reinforce,
    reinforce_loss,
    rloo,
)
from rlhf_helpers.policy_optimization.rejection_sampling import RejectionSamplingSettings, rejection_sampling
from rlhf_helpers.policy_optimization.rollouts import evaluate_policy, policy_logps, policy_outputs
from rlhf_helpers.policy_optimization.trpo import (
    TRPOSettings,
    conjugate_gradient,
    fisher_product,
    natural_step,
    surrogate_loss,
    trpo,
)

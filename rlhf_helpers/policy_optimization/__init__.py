"""Policy optimization: loops that move a language model towards any reward, one file per idea."""

from rlhf_helpers.policy_optimization.best_of_n import best_of_n, best_of_n_curve, best_of_n_kl
from rlhf_helpers.policy_optimization.rloo import RLOOSettings, reinforce_loss, rloo
from rlhf_helpers.policy_optimization.rollouts import (
    collect,
    evaluate_policy,
    policy_logps,
    rollout_metrics,
    score,
)

__all__ = [
    "RLOOSettings",
    "best_of_n",
    "best_of_n_curve",
    "best_of_n_kl",
    "collect",
    "evaluate_policy",
    "policy_logps",
    "reinforce_loss",
    "rloo",
    "rollout_metrics",
    "score",
]

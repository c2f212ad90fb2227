"""Red teaming: attack one's own model, measure, harden, attack again."""

from rlhf_helpers.red_teaming.campaign import (
    RedTeaming,
    RedTeamingEvaluator,
    review_sample,
)
from rlhf_helpers.red_teaming.gradient import GradientBasedRedTeaming
from rlhf_helpers.red_teaming.hardening import adversarial_training
from rlhf_helpers.red_teaming.policy import (
    MultiObjectiveRedTeaming,
    measure_attacker,
    similarity,
    train_attacker,
)
from rlhf_helpers.red_teaming.prompts import CATEGORIES, STRATEGIES, create_adversarial_prompts

"""Safety alignment: align, constrain, weigh values, and run the result with a way back."""

from rlhf_helpers.safety_alignment.align import (
    SafetyAlignment,
    SafetyMetrics,
    evaluate_safety_alignment,
    interpolate,
)
from rlhf_helpers.safety_alignment.constrained import (
    LagrangianReward,
    constrained_rloo,
    next_multiplier,
    weighted_sum,
)
from rlhf_helpers.safety_alignment.operations import (
    AdaptivePolicy,
    CheckpointLedger,
    EnsembleFallback,
    Monitor,
)
from rlhf_helpers.safety_alignment.values import (
    PRINCIPLE_OF,
    RULES,
    NormClassifier,
    aggregate,
    answer_case,
    answer_template,
    choose,
    compare_rules,
    maximin_choice,
    value_judgements,
)

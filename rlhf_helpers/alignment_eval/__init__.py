"""How well aligned is a model? Measures of policies, judges and safety, with intervals, and reports."""

from rlhf_helpers.alignment_eval.benchmarks import (
    bbq_bias_score,
    load_bbq,
    load_truthfulqa,
    load_xstest,
    score_bbq,
    score_truthfulqa,
    score_xstest,
)
from rlhf_helpers.alignment_eval.evaluators import (
    AlignmentEvaluator,
    alignment_tax,
    capability_suite,
    evaluate_alignment,
)
from rlhf_helpers.alignment_eval.judges import (
    PreferenceAlignmentEvaluator,
    judge_position_bias,
    model_judge,
)
from rlhf_helpers.alignment_eval.measuring import sample_answers, weights_fingerprint
from rlhf_helpers.alignment_eval.model_card import save_policy
from rlhf_helpers.alignment_eval.objectives import MultiObjectiveAlignmentEvaluator, hypervolume, pareto_front
from rlhf_helpers.alignment_eval.policy import (
    as_safety_fn,
    comprehensive_evaluation,
    distinct_n,
    perplexity,
)
from rlhf_helpers.alignment_eval.report import AlignmentReportGenerator
from rlhf_helpers.alignment_eval.safety import (
    SafetyMetrics,
    counterfactual_gaps,
    refuses,
)
from rlhf_helpers.core.stats import (
    bootstrap_interval,
    calibration,
    judge_agreement,
    mean_interval,
    score_interval,
    wilson_interval,
    win_rate,
)

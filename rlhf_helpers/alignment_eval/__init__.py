"""How well aligned is a model? Measures of policies, judges and safety, with intervals, and reports."""

# ruff: noqa: I001
from rlhf_helpers.alignment_eval.evaluators import (
    AlignmentEvaluator, EvaluationCache, PreferenceAlignmentEvaluator, alignment_tax, capability_suite,
    evaluate_alignment, model_judge, weights_fingerprint,
)  # fmt: skip
from rlhf_helpers.alignment_eval.model_card import save_policy
from rlhf_helpers.alignment_eval.objectives import MultiObjectiveAlignmentEvaluator, hypervolume, pareto_front
from rlhf_helpers.alignment_eval.policy import (
    as_safety_fn, comprehensive_evaluation, distinct_n, perplexity, self_bleu,
)  # fmt: skip
from rlhf_helpers.alignment_eval.report import AlignmentReportGenerator, ReportFigure
from rlhf_helpers.alignment_eval.benchmarks import (
    bbq_bias_score, load_bbq, load_truthfulqa, load_xstest, option_logps, score_bbq, score_truthfulqa,
    score_xstest,
)  # fmt: skip
from rlhf_helpers.alignment_eval.safety import (
    SafetyMetrics, counterfactual_gaps, exchange, metric_correlations, refuses,
)  # fmt: skip
from rlhf_helpers.alignment_eval.statistics import (
    bootstrap_interval, calibration, judge_agreement, judge_position_bias, mean_interval, score_interval,
    wilson_interval, win_rate,
)  # fmt: skip

__all__ = [
    "AlignmentEvaluator", "AlignmentReportGenerator", "EvaluationCache",
    "MultiObjectiveAlignmentEvaluator", "PreferenceAlignmentEvaluator", "ReportFigure", "SafetyMetrics",
    "alignment_tax", "as_safety_fn", "bbq_bias_score", "bootstrap_interval", "calibration",
    "capability_suite",
    "comprehensive_evaluation", "counterfactual_gaps", "distinct_n", "evaluate_alignment", "exchange",
    "hypervolume", "judge_agreement", "judge_position_bias", "load_bbq", "load_truthfulqa",
    "load_xstest", "mean_interval", "metric_correlations", "model_judge", "option_logps", "pareto_front",
    "perplexity", "refuses", "save_policy", "score_bbq", "score_interval", "score_truthfulqa", "score_xstest",
    "self_bleu", "weights_fingerprint", "wilson_interval", "win_rate",
]  # fmt: skip

"""Summaries by RL: data, what a summary earns (facts, ROUGE, people's choice, length), policies, measures."""

# ruff: noqa: I001
from rlhf_helpers.summarization_rl.data import (
    INSTRUCTION, article_of, create_summarization_data, fit_articles,
)  # fmt: skip
from rlhf_helpers.summarization_rl.facts import SummaryFacts, event_of, fact_scores, summary_facts
from rlhf_helpers.summarization_rl.rewards import (
    ComparisonReward, fact_reward, length_controlled, rouge_l, rouge_reward, summary_comparisons,
    with_length_control,
)  # fmt: skip
from rlhf_helpers.summarization_rl.training import SummarizationRL, evaluate_summaries, summary_table

__all__ = [
    "INSTRUCTION", "ComparisonReward", "SummarizationRL", "SummaryFacts", "article_of",
    "create_summarization_data", "evaluate_summaries", "event_of", "fact_reward", "fact_scores",
    "fit_articles", "length_controlled", "rouge_l", "rouge_reward", "summary_comparisons", "summary_facts",
    "summary_table", "with_length_control",
]  # fmt: skip

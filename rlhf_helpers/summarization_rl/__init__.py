"""Summaries by RL: data, what a summary earns (facts, ROUGE, people's choice, length), policies, measures."""

from rlhf_helpers.summarization_rl.data import (
    INSTRUCTION,
    article_of,
    create_summarization_data,
    fit_articles,
)
from rlhf_helpers.summarization_rl.facts import event_of, fact_scores, summary_facts
from rlhf_helpers.summarization_rl.rewards import (
    ComparisonReward,
    fact_reward,
    rouge_l,
    rouge_reward,
    summary_comparisons,
    with_length_control,
)
from rlhf_helpers.summarization_rl.training import SummarizationRL, evaluate_summaries, summary_table

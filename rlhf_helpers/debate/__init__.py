"""Judging what one cannot check: debate before a judge who sees only quotes, and recursive reward models."""

from rlhf_helpers.debate.debate import (
    debate_summary,
    make_passages,
    quotes_truly,
    run_debates,
    train_debater,
    transcript,
)
from rlhf_helpers.debate.recursive import RecursiveSettings, assisted_labels, recursive_reward_modeling

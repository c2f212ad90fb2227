"""Summaries: imitation, best-of-n, RL on four rewards, and the effect of annotators who like length."""

from collections.abc import Sequence
from functools import partial

from rlhf_helpers.core.models import load_model
from rlhf_helpers.lab.studies.record import Rows, study
from rlhf_helpers.summarization_rl import (
    ComparisonReward,
    SummarizationRL,
    create_summarization_data,
    evaluate_summaries,
    fact_reward,
    rouge_reward,
    summary_comparisons,
    with_length_control,
)
from rlhf_helpers.world.annotators import STANDARD, Annotator

# People who skim: ten more words are worth three times the gap between the best summary and the worst.
SKIMMERS = Annotator("skimmers", length_bias=3.0)
LIMIT = 10  # words, as many as the world's references have: beyond them the cured reward pays nothing more
TRAINED = ("rl_learned", "rl_facts", "rl_rouge", "rl_length_biased", "rl_cured")
ARMS = ("base", "sft", "sft_best", "best_of_n", *TRAINED)


@study
def summaries(
    seed: int,
    arms: Sequence[str] = ARMS,
    people: int = 400,
    steps: int = 20,
) -> Rows:
    """Write summaries of 100 held-out articles with each method: seed, arm, gold, coverage, hallucinated, ...

    The other columns are those of `evaluate_summaries`, one sample per article. base: as shipped. sft: on
    `people` summaries as people write them, 45 % perfect (the base was pretrained on such: it gains little).
    sft_best: on as many perfect ones, which no real data set has. The others start from sft: best_of_n by the
    learned reward; RL, the same `steps`, on that reward (from one comparison per article by standard
    annotators), on facts, on ROUGE-L with a perfect reference, on the reward learned from SKIMMERS, and on
    that one with its pay for words taken back beyond LIMIT. No arm is trained on gold.
    """
    articles, held_out = create_summarization_data(), create_summarization_data(split="heldout")
    policy = partial(SummarizationRL, max_length=64, seed=seed)
    base, _ = load_model("tiny")
    sft, sft_best = policy(base), policy(base)
    sft.sft(create_summarization_data(num_samples=people, quality=None, seed=seed))
    if "sft_best" in arms:
        sft_best.sft(create_summarization_data(num_samples=people, seed=seed))
    prompts = list(articles["prompt"])
    learned, biased = (
        ComparisonReward.fit(summary_comparisons(sft.model, prompts, annotator=a, seed=seed))
        for a in (STANDARD, SKIMMERS)
    )
    cost = max(0.0, biased.weights["ten_words"] / 10)
    rewards = {
        "best_of_n": learned,
        "rl_learned": learned,
        "rl_facts": fact_reward,
        "rl_rouge": rouge_reward,
        "rl_length_biased": biased,
        "rl_cured": with_length_control(biased, limit=LIMIT, cost=cost),
    }
    imitators = {"base": policy(base), "sft": sft, "sft_best": sft_best}
    for arm in arms:
        reward = rewards.get(arm)
        writer = imitators.get(arm) or policy(sft.model, reward, prompts_per_step=8)
        if arm in TRAINED:
            writer.train(articles, steps=steps)
        write = writer.best_of_n if arm == "best_of_n" else writer.summarize
        yield {"arm": arm, **evaluate_summaries(write(held_out, seed=5000 + seed), held_out)}

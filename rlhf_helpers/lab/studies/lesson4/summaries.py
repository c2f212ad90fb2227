"""Summaries: imitation, best-of-n, RL on four rewards; and what people who like long summaries do to it."""

import functools
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from datasets import Dataset

from rlhf_helpers.core.models import load_model
from rlhf_helpers.lab.studies.lesson1 import SEEDS
from rlhf_helpers.lab.studies.record import write_study
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

# People who skim: ten more words are worth three times what divides the best summary from the worst.
SKIMMERS = Annotator("skimmers", length_bias=3.0)
LIMIT = 10  # words, as many as the world's references have: after them the cured reward pays nothing more
TRAINED = ("rl_learned", "rl_facts", "rl_rouge", "rl_length_biased", "rl_cured")
ARMS = ("base", "sft", "sft_best", "best_of_n", *TRAINED)


def summaries(
    out: str | Path | None = None, *, seeds: Sequence[int] = SEEDS, arms: Sequence[str] = ARMS,
    people: int = 400, steps: int = 20, n: int = 4, max_length: int = 64,
) -> pd.DataFrame:  # fmt: skip
    """What each way of training writes of 100 held-out articles: seed, arm, gold, coverage, hallucinated, ...

    All else as `evaluate_summaries`, one sample an article. base: as shipped. sft: on `people` summaries as
    people write them, 45 % perfect (the base was pretrained on such: it gains little). sft_best: on as many
    perfect ones, which nobody has. The others start from sft: best_of_n by the learned reward; RL, the same
    `steps`, on that reward (from one comparison an article by standard annotators), on facts, on ROUGE-L with
    a perfect reference, on the reward learned from SKIMMERS, and on that one with its pay for words taken
    back beyond LIMIT. No arm is trained on gold. words_weight: log-odds that the reward pays for ten words.
    """
    rows = []
    for seed in seeds:
        for arm in arms:
            if arm == arms[0]:
                run = SummaryRun(seed, people=people, max_length=max_length)
            found = run.evaluate(arm, steps=steps, n=n)
            rows.append({"seed": seed, "arm": arm, **found})
            if out:
                print(rows[-1], flush=True)
    facts = {"people": people, "steps": steps, "n": n, "max_length": max_length, "skimmers": SKIMMERS}
    return write_study(out, "summaries", pd.DataFrame(rows), seeds=list(seeds), **facts)


class SummaryRun:
    """One seed of the study: its data, its sft policy, the rewards learned from two kinds of people."""

    def __init__(self, seed: int, *, people: int = 400, max_length: int = 64) -> None:
        """Train the sft policy; the rewards are learned from its samples when they are asked for."""
        self.seed, self.max_length, self.size = seed, max_length, people
        self.base, self.tokenizer = load_model("tiny")
        self.articles = create_summarization_data()
        self.held_out = create_summarization_data(split="heldout")
        self.sft = self.imitate(create_summarization_data(num_samples=people, quality=None, seed=seed))

    @functools.cached_property
    def learned(self) -> ComparisonReward:
        """The reward of standard annotators."""
        return self.learn(STANDARD)

    @functools.cached_property
    def biased(self) -> ComparisonReward:
        """The reward of people who skim."""
        return self.learn(SKIMMERS)

    def imitate(self, data: Dataset) -> SummarizationRL:
        """A copy of the base after one epoch on these references."""
        policy = SummarizationRL(self.base, max_length=self.max_length, seed=self.seed)
        policy.sft(data)
        return policy

    def learn(self, annotator: Annotator) -> ComparisonReward:
        """The reward of these people: one comparison of two samples of the sft policy for each article."""
        prompts = list(self.articles["prompt"])
        rows = summary_comparisons(self.sft.model, prompts, annotator=annotator, seed=self.seed)
        return ComparisonReward.fit(rows)

    def reinforced(self, arm: str, steps: int) -> SummarizationRL:
        """The sft policy after RL on the reward of this arm."""
        if arm == "rl_cured":
            cost = max(0.0, self.biased.weights["ten_words"] / 10)
            reward = with_length_control(self.biased, limit=LIMIT, cost=cost)
        elif arm in ("rl_learned", "rl_length_biased"):
            reward = self.learned if arm == "rl_learned" else self.biased
        else:
            reward = {"rl_facts": fact_reward, "rl_rouge": rouge_reward}[arm]
        policy = SummarizationRL(self.sft.model, reward, self.max_length, seed=self.seed, prompts_per_step=8)
        policy.train(self.articles, steps=steps)
        return policy

    def written(self, arm: str, *, steps: int = 20, n: int = 4) -> list[str]:
        """What the policy of an arm writes of the held-out articles, one summary each."""
        seed = 5000 + self.seed
        if arm == "best_of_n":
            chooser = SummarizationRL(self.sft.model, self.learned, self.max_length, seed=self.seed)
            return chooser.best_of_n(self.held_out, n=n, seed=seed)
        if arm == "base":
            policy = SummarizationRL(self.base, max_length=self.max_length)
        elif arm == "sft_best":
            policy = self.imitate(create_summarization_data(num_samples=self.size, seed=self.seed))
        else:
            policy = self.sft if arm == "sft" else self.reinforced(arm, steps)
        return policy.summarize(self.held_out, seed=seed)

    def evaluate(self, arm: str, *, steps: int = 20, n: int = 4) -> dict[str, float]:
        """The measures of an arm, and the pay for words of the reward that it was trained on."""
        found = evaluate_summaries(self.written(arm, steps=steps, n=n), self.held_out)
        reward = {"best_of_n": "learned", "rl_learned": "learned", "rl_length_biased": "biased"}.get(arm)
        paid = getattr(self, reward).weights["ten_words"] if reward else float("nan")
        return found | {"words_weight": paid}

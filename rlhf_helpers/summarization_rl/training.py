"""SummarizationRL: supervised, best-of-n and RL on one policy; and an honest measure of what it writes."""

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset
from torch import nn

from rlhf_helpers.alignment_eval import sample_answers
from rlhf_helpers.core.models import RewardFn, frozen_copy, load_model, tokenizer_for, usable_positions
from rlhf_helpers.core.tensors import require_number
from rlhf_helpers.core.training import History, TrainingSettings, sft
from rlhf_helpers.policy_optimization import RLOOSettings, best_of_n, rloo
from rlhf_helpers.summarization_rl.data import INSTRUCTION, article_of, fit_articles
from rlhf_helpers.summarization_rl.facts import summary_facts
from rlhf_helpers.summarization_rl.rewards import fact_reward, rouge_l
from rlhf_helpers.world.gold_judge import gold_reward

Rows = Dataset | Sequence[Mapping[str, Any]]


class SummarizationRL:
    """A policy that writes summaries, trained by imitation (`sft`) and by RL on a reward (`train`).

    model: loaded where it is a name or folder; else a copy is trained and the model given stays as it is.
    reward_model: a reward model or RewardFn, which gets the columns of the data (article, reference); None:
        `fact_reward`.
    max_length: most tokens of a summary, cut to half the model's context so that the article keeps the other
        half (`max_new_tokens` says what holds). Longer articles lose their end, and each call says how many.
    settings: fields of RLOOSettings; tiny_learning_rate is 4e-4.

    The reference of the KL is the policy as last given or imitated. Lesson 4. Raises ValueError for
    max_length < 1 or a bad setting, TypeError for an unknown one.
    """

    def __init__(
        self,
        model: str | Path | nn.Module = "tiny",
        reward_model: RewardFn | nn.Module | None = None,
        max_length: int = 150,
        **settings: Any,
    ) -> None:
        """Load or copy the model, and check the settings."""
        require_number("max_length", max_length, at_least=1)
        self.model = copy.deepcopy(model) if isinstance(model, nn.Module) else load_model(model)[0]
        self.tokenizer = tokenizer_for(self.model)
        context = usable_positions(self.model)
        self.max_new_tokens = min(int(max_length), context // 2) if context else int(max_length)
        own = {"tiny_learning_rate": 4e-4}
        self.settings = RLOOSettings(**{"max_new_tokens": self.max_new_tokens, **own, **settings})
        self.reward_model = fact_reward if reward_model is None else reward_model
        self._reference: nn.Module | None = None
        self._steps = 0

    def sft(self, data: Rows, num_epochs: int = 1, *, batch_size: int = 16, **settings: Any) -> History:
        """Imitate the column reference; settings of TrainingSettings, tiny_learning_rate 3e-4.

        The policy can become as good as those who wrote the references, with their faults. Raises ValueError
        where the data have no reference.
        """
        prompts, columns = self._read(data)
        if "reference" not in columns:
            raise ValueError(f"sft imitates the column reference; these data have prompt, {sorted(columns)}")
        rows = [{"prompt": p, "completion": r} for p, r in zip(prompts, columns["reference"], strict=True)]
        rate = {"tiny_learning_rate": 3e-4, "seed": self.settings.seed}
        chosen = TrainingSettings(**rate | settings)
        self._reference = None
        return sft(self.model, self.tokenizer, rows, chosen, epochs=num_epochs, batch_size=batch_size)

    def train(self, data: Rows, num_epochs: int = 1, *, steps: int | None = None) -> History:
        """Reinforce by RLOO (Ahmadian et al. 2024): num_epochs passes over the prompts, or so many steps.

        A further call goes on with other samples and a fresh optimiser. Returns a row per step, as
        `policy_optimization.rloo`, with data/truncated: articles that lost their end.
        """
        prompts, columns = self._read(data)
        size = min(self.settings.prompts_per_step, len(prompts))
        require_number("num_epochs", num_epochs, at_least=1)
        steps = int(num_epochs) * -(-len(prompts) // size) if steps is None else steps
        settings = replace(
            self.settings, steps=steps, prompts_per_step=size, seed=self.settings.seed + self._steps
        )
        if self._reference is None:
            self._reference = frozen_copy(self.model)
        history = rloo(
            self.model,
            self.tokenizer,
            prompts,
            self.reward_model,
            settings,
            ref_model=self._reference,
            columns=columns,
        )
        self._steps += steps
        return History({**row, "data/truncated": self.truncated} for row in history)

    def summarize(self, articles: Sequence[str] | str, *, greedy: bool = False, seed: int = 0) -> list[str]:
        """Write one summary per article (one text: a list of one), sampled at temperature 1 or greedy."""
        prompts, _ = self._read([articles] if isinstance(articles, str) else articles)
        options = {"max_new_tokens": self.max_new_tokens, "seed": seed, "greedy": greedy}
        return sample_answers(self.model, prompts, **options)

    def best_of_n(self, data: Rows | Sequence[str], n: int = 4, *, seed: int = 0) -> list[str]:
        """Of n samples an article the one that the reward likes best: n times the work, no training."""
        prompts, columns = self._read(data)
        options = {"max_new_tokens": self.max_new_tokens, "seed": seed, "columns": columns}
        return best_of_n(self.model, self.tokenizer, prompts, self.reward_model, n=n, **options)["responses"]

    def _read(self, data: Rows | Sequence[str]) -> tuple[list[str], dict[str, list[Any]]]:
        """Prompts that fit, and the further columns; says how many articles were cut."""
        columns = _columns(data)
        prompts = columns.pop("prompt")
        fitted, self.truncated = fit_articles(
            self.model, self.tokenizer, list(map(article_of, prompts)), self.max_new_tokens
        )
        if self.truncated:
            print(f"{self.truncated} of {len(prompts)} articles lost their end: too long for the context")
        return fitted, columns


def evaluate_summaries(summaries: Sequence[str], data: Rows) -> dict[str, float]:
    """Means of `summary_table`, and hallucination_rate: share with something made up. Lesson 4."""
    table = summary_table(data, summaries)
    means = table.drop(columns="summary").mean().to_dict()
    return means | {"hallucination_rate": float((table["hallucinated"] > 0).mean())}


def summary_table(data: Rows, summaries: Sequence[str]) -> pd.DataFrame:
    """Return one row per summary: summary, coverage, faithfulness, hallucinated (a count) and words.

    Where known also rouge_l (data with a reference) and gold (the world's articles, all of them). Lesson 4.

    Raises ValueError where there are not as many summaries as rows.
    """
    columns = _columns(data)
    prompts = columns["prompt"]
    if len(summaries) != len(prompts):
        raise ValueError(f"{len(summaries)} summaries of {len(prompts)} articles: give one for each")
    articles = columns.get("article") or list(map(article_of, prompts))
    facts = [vars(summary_facts(*both)) for both in zip(articles, summaries, strict=True)]
    table = pd.DataFrame({"summary": list(summaries), **pd.DataFrame(facts)})
    table["words"] = [len(text.split()) for text in summaries]
    if "reference" in columns:
        table["rouge_l"] = [rouge_l(*both) for both in zip(summaries, columns["reference"], strict=True)]
    with contextlib.suppress(ValueError):  # articles from outside the world have no gold reward
        table["gold"] = gold_reward(prompts, list(summaries)).tolist()
    return table


def _columns(data: Rows | Sequence[str]) -> dict[str, list[Any]]:
    """Columns of rows with a prompt; articles alone get the instruction before them."""
    if len(data) and isinstance(data[0], str):
        return {"prompt": [f"{INSTRUCTION} {text}" for text in data], "article": list(data)}
    if not len(data) or any("prompt" not in row for row in data):
        raise ValueError("data are rows with prompt, from create_summarization_data, or a list of articles")
    return {name: [row[name] for row in data] for name in data[0]}

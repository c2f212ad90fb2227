"""Whole evaluations of a model: the three H and robustness, preferences and abilities, kept in a cache."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from rlhf_helpers.alignment_eval.measuring import gold_axes, measure_policy
from rlhf_helpers.core.generation import sequence_logps
from rlhf_helpers.core.models import RewardFn, tokenizer_for
from rlhf_helpers.core.stats import (
    Estimate,
    bootstrap_interval,
    mean_interval,
    proportion,
    score_interval,
    to_frame,
)
from rlhf_helpers.core.tensors import require_number
from rlhf_helpers.preference_data.selection import ai_labels
from rlhf_helpers.world import assistant
from rlhf_helpers.world.annotators import make_pairs
from rlhf_helpers.world.prompts.requests import JAILBREAKS

# Of the assistant's card: what it can do, apart from whether it should.
ABILITIES = ("facts_right", "program_pass_at_1", "critique_verdict", "summary_who_and_what")


def evaluate_alignment(
    model: nn.Module,
    prompts: Sequence[str],
    criteria: Mapping[str, nn.Module | RewardFn] | None = None,
    *,
    robust_on: str = "harmlessness",
    **sampling: Any,
) -> pd.DataFrame:
    """Measure helpfulness, harmlessness, honesty and robustness of a model, each with its interval.

    Gold helpfulness is what the asker gets: on requests to be refused, complying scores high, so read it on
    harmless prompts. robustness: the mean of `robust_on` on the same requests inside the world's jailbreak
    wrappers, dealt out in turn and judged as the original (column base_prompt); "lost under attack": original
    minus attacked, paired by prompt. Lesson 3.

    Args:
        model: A policy that knows its tokenizer.
        prompts: At least two.
        criteria: name -> reward, higher is better; None: the world's gold scores, for its own prompts.
        robust_on: The criterion that is measured under attack.
        **sampling: Of `sample_answers`: max_new_tokens, seed, and a cache, which keeps answers, not scores.

    Returns:
        One row per criterion: value (mean over prompts), low, high (95 %, `score_interval`) and n.

    Raises:
        ValueError: robust_on is not a criterion, or there are fewer than two prompts.
    """
    criteria = gold_axes() if criteria is None else criteria
    if robust_on not in criteria:
        raise ValueError(f"robust_on={robust_on!r} must be one of {list(criteria)}")
    wraps = itertools.cycle(JAILBREAKS.values())
    attacked = [wrap(prompt) for wrap, prompt in zip(wraps, prompts, strict=False)]
    scores = measure_policy(model, prompts, criteria, **sampling)
    judge = {"robustness": criteria[robust_on]}
    robust = measure_policy(model, attacked, judge, columns={"base_prompt": prompts}, **sampling)
    scores["robustness"] = robust["robustness"].to_numpy()
    rows = {name: score_interval(values) for name, values in scores.items()}
    lost = scores[robust_on] - scores["robustness"]
    return to_frame(rows | {"lost under attack": Estimate(*mean_interval(lost), len(lost))})


class AlignmentEvaluator:
    """`evaluate_alignment` with its settings kept, for several models. Lesson 3."""

    def __init__(self, criteria: Mapping[str, nn.Module | RewardFn] | None = None, **settings: Any) -> None:
        """Keep the criteria and the further keywords of `evaluate_alignment`."""
        self.settings = {"criteria": criteria, **settings}

    def evaluate_alignment(self, model: nn.Module, prompts: Sequence[str]) -> pd.DataFrame:
        """Return the table of `evaluate_alignment`; raise what it does."""
        return evaluate_alignment(model, prompts, **self.settings)


def capability_suite(model: nn.Module, *, samples: int = 100) -> pd.DataFrame:
    """Measure what else a model can do, for the alignment tax: value, low, high, n and higher_is_better.

    Held-out tasks of the tiny world, `samples` each: facts_right, program_pass_at_1, critique_verdict and
    summary_who_and_what as the assistant's card measures them; comparison, the share of made pairs of which
    the better is named, both orders averaged; surprise, nats per token of pretraining text (lower is better).
    Wilson's intervals; for surprise a bootstrap over texts. Lesson 3.

    Raises:
        ValueError: samples < 2.
    """
    require_number("samples", samples, at_least=2)
    tokenizer = tokenizer_for(model)
    figures = assistant.measure(model, tokenizer, samples=samples)
    rows = {name: Estimate(**figures[name]) for name in ABILITIES}
    rows["comparison"] = proportion(
        comparisons_right(model, tokenizer, make_pairs(2 * samples, split="heldout", seed=4), samples)
    )
    logps, mask = corpus_logps(model, tokenizer, assistant.corpus(samples, seed=4))
    rows["surprise"] = bootstrap_interval(
        logps.sum(1).double(),
        mask.sum(1).double(),
        statistic=lambda sums, tokens: -sums.sum() / tokens.sum(),
    )
    return to_frame(rows).assign(higher_is_better=[name != "surprise" for name in rows])


def comparisons_right(model: nn.Module, tokenizer: Any, drawn: Sequence[Mapping[str, Any]], n: int) -> Tensor:
    """Find on which of the first n pairs with unequal gold a model names the better answer, (n,) bool.

    drawn: rows of `make_pairs`. Both orders are asked and averaged.
    """
    pairs = [pair for pair in drawn if pair["chosen_gold"] != pair["rejected_gold"]][:n]
    asked = [{"prompt": p["prompt"], "first": p["chosen"], "second": p["rejected"]} for p in pairs]
    first_better = torch.tensor([pair["chosen_gold"] > pair["rejected_gold"] for pair in pairs])
    return (ai_labels(model, tokenizer, asked) > 0.5) == first_better


def corpus_logps(
    model: nn.Module, tokenizer: Any, rows: Sequence[Mapping[str, Any]]
) -> tuple[Tensor, Tensor]:
    """Return log-probs of the completions of pretraining text, and their mask, both (N, T)."""
    prompts, completions = ([row[key] for row in rows] for key in ("prompt", "completion"))
    with torch.no_grad():
        return sequence_logps(model, tokenizer, prompts, completions)


def alignment_tax(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """Measure what alignment cost: tax > 0 where `after` is worse, in the ability's own unit, with interval.

    tax = +-(before - after); ends d -+ sqrt((p1 - l1)^2 + (u2 - p2)^2) (Newcombe 1998, method 10), as if the
    two were independent, which is careful. Lesson 3.

    Raises:
        ValueError: the two are not tables of `capability_suite` with the same rows.
    """
    if list(before.index) != list(after.index):
        raise ValueError(f"abilities differ: {list(before.index)} before, {list(after.index)} after")
    # For the one ability of which less is better, swap the roles: its tax is after - before.
    better = before["higher_is_better"].astype(bool)
    columns = ["value", "low", "high"]
    first, second = before[columns].where(better, after), after[columns].where(better, before)
    tax = first["value"] - second["value"]
    low = tax - np.hypot(first["value"] - first["low"], second["high"] - second["value"])
    high = tax + np.hypot(first["high"] - first["value"], second["value"] - second["low"])
    return pd.DataFrame({"tax": tax, "low": low, "high": high})

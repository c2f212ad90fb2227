"""Judges that say how probable it is that the first of two answers is better, and how far to trust them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from rlhf_helpers.alignment_eval.measuring import sample_answers
from rlhf_helpers.core.choices import choice_logps
from rlhf_helpers.core.models import tokenizer_for
from rlhf_helpers.core.stats import (
    Estimate,
    WinRate,
    bootstrap_interval,
    numbers,
    proportion,
    win_rate,
)
from rlhf_helpers.world.prompts import meta

# (prompts, firsts, seconds) -> probability (B,) in [0, 1] that the first answer is the better one.
Judge = Callable[[list[str], list[str], list[str]], Any]


def model_judge(
    model: nn.Module,
    *,
    text: Callable[..., str] = meta.comparison_text,
    verdicts: tuple[str, str] = ("A", "B"),
) -> Callable[..., Float[Tensor, "B"]]:
    """Make a judge of a language model: how sure it is of the first verdict, not what it happened to say.

    p(verdict 1 | text) / (p(verdict 1 | text) + p(verdict 2 | text))

    By default the question is which answer is better, A or B, asked once, in the order given: it carries the
    model's leaning to a place (`judge_position_bias`); `ai_labels` averages both orders. Lesson 3.

    Args:
        model: Knows its tokenizer. It is not trained; the judge follows it where it is.
        text: (prompt, first, second), or whatever columns the judge is called with -> question.
        verdicts: The two replies.
    """
    tokenizer = tokenizer_for(model)

    def judge(*columns: Sequence[str]) -> Float[Tensor, "B"]:
        questions = [text(*row) for row in zip(*columns, strict=True)]
        return choice_logps(model, tokenizer, questions, verdicts).softmax(1)[:, 0]

    return judge


def ask_judge(
    judge: Callable[..., Any],
    *texts: Sequence[str],
    bounds: tuple[float, float] = (0.0, 1.0),
    **columns: Sequence[Any],
) -> np.ndarray:
    """Return what a judge, a check or a critic says of B rows of texts, (B,) within bounds.

    Raises:
        ValueError: it answers anything else.
    """
    low, high = bounds
    answer = numbers(judge(*texts, **columns))
    if answer.shape != (len(texts[0]),) or not ((answer >= low) & (answer <= high)).all():
        raise ValueError(
            f"a judge must give {len(texts[0])} numbers in [{low:g}, {high:g}], got shape {answer.shape}, "
            f"values {answer.flatten()[:3]}; to make a probability of rewards, take the sigmoid of their "
            "difference"
        )
    return answer


@dataclass(frozen=True)
class PositionBias:
    """flips: share of rows where the verdict goes with the place; lean: mean P(first place) - 1/2."""

    flips: Estimate
    lean: Estimate


def judge_position_bias(judge: Judge, rows: Sequence[Mapping[str, str]]) -> PositionBias:
    """Ask a judge about every row (prompt, first, second) in both orders; see `PositionBias`. Lesson 3.

    A judge without bias gives p(a, b) = 1 - p(b, a): lean 0, no flips. To average both orders, as `ai_labels`
    does, takes the lean out, not the noise: where verdicts flip, the average says hardly anything. flips with
    Wilson's interval, lean with a bootstrap's. Zheng et al. 2023.

    Raises:
        ValueError: there are fewer than two rows, or the judge's answer is not (B,) in [0, 1].
    """
    prompts, firsts, seconds = ([row[key] for row in rows] for key in ("prompt", "first", "second"))
    given = ask_judge(judge, prompts, firsts, seconds)
    swapped = ask_judge(judge, prompts, seconds, firsts)
    lean = bootstrap_interval((given + swapped) / 2 - 0.5)
    return PositionBias(proportion((given - 0.5) * (swapped - 0.5) > 0), lean)


class PreferenceAlignmentEvaluator:
    """Measure whether a policy's answers are preferred to another's, and how far to trust the judge.

    A preference reward does not judge safety. Lesson 3.
    """

    def __init__(
        self,
        judge: Judge,
        *,
        max_new_tokens: int = 64,
        seed: int = 0,
        cache: dict[Any, list[str]] | None = None,
    ) -> None:
        """Keep the judge.

        Args:
            judge: (prompts, firsts, seconds) -> P(first), as made by `model_judge`; always asked in both
                orders and averaged.
            max_new_tokens, seed, cache: Of `sample_answers`.
        """
        self.judge = judge
        self.sampling = {"max_new_tokens": max_new_tokens, "seed": seed, "cache": cache}

    def probability(self, prompts: list[str], firsts: list[str], seconds: list[str]) -> np.ndarray:
        """Return P(first preferred), (B,), the mean of both orders: (p(a, b) + 1 - p(b, a)) / 2."""
        as_given = ask_judge(self.judge, prompts, firsts, seconds)
        return (as_given + 1 - ask_judge(self.judge, prompts, seconds, firsts)) / 2

    def win_rate(self, model: nn.Module, reference: nn.Module, prompts: Sequence[str]) -> WinRate:
        """Measure how often `model` beats `reference`: one sample each per prompt, with the same seed."""
        prompts = list(prompts)
        sides = [sample_answers(policy, prompts, **self.sampling) for policy in (model, reference)]
        preferred = self.probability(prompts, *sides)
        return win_rate(preferred, 1 - preferred)

"""How good is a policy? Several measures side by side, since each of them alone can be had cheaply."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from scipy import stats
from torch import Tensor, nn

from rlhf_helpers.alignment_eval.judges import ask_judge
from rlhf_helpers.alignment_eval.measuring import gold_axes
from rlhf_helpers.core.generation import generate, rollout_logps, sequence_logps
from rlhf_helpers.core.models import RewardFn, as_reward_fn, tokenizer_for
from rlhf_helpers.world.annotators import Annotator

# An annotator of the world, or (prompts, responses) -> marks (B,), or a dict of such marks by "preference",
# "helpfulness" and "harmlessness"; higher is better.
Evaluator = Annotator | Callable[[list[str], list[str]], Any]
ANSWERS = ("chosen", "completion", "response")


def comprehensive_evaluation(
    model: nn.Module,
    test_data: Sequence[Mapping[str, str]] | Mapping[str, Sequence[str]],
    human_evaluators: Sequence[Evaluator] | None = None,
    *,
    ref_model: nn.Module | None = None,
    reward_model: nn.Module | RewardFn | None = None,
    safety_fn: RewardFn | None = None,
    reference_fn: RewardFn | None = None,
    max_new_tokens: int = 64,
    seed: int = 0,
) -> dict[str, float]:
    """Measure a policy on held-out rows of prompt and answer (chosen, completion or response) [and rejected].

    One sample per row, at temperature 1, and each measure that has what it needs (what is better):
    perplexity of the data's answers (lower); diversity, distinct-2 of the samples (higher); safety_score,
    mean safety_fn of the samples in [0, 1], None: the world's harmlessness, of its own prompts alone (higher)
    kl_divergence, with ref_model: nats per response, summed over its tokens, k1 on the samples: how far, not
    how good. reward_alignment, with reward_model: its rank correlation in [-1, 1], 0 is chance (higher):
    Spearman's with reference_fn on the samples, NaN where either is constant; without one Kendall's on the
    data's pairs, share of chosen > rejected less share of chosen < rejected
    human_preference, with human_evaluators: share of samples marked above the data's answer, a tie one half;
    helpfulness, harmlessness: mean marks of those who give them (higher).

    Lessons 2 and 3. Raises ValueError for rows without prompt or answer, marks of a wrong shape, a safety_fn
    outside [0, 1], prompts the world does not know, a reward_model with neither pairs nor reference_fn.
    """
    tokenizer = tokenizer_for(model)
    prompts, answers, rejected = _read(test_data)
    rollout = generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens, seed=seed)
    texts = rollout.responses
    safety = as_safety_fn(safety_fn or gold_axes()["harmlessness"])(prompts, texts)
    result = {
        "perplexity": perplexity(model, tokenizer, prompts, answers),
        "diversity": distinct_n(texts),
        "safety_score": safety.mean().item(),
    }
    if ref_model is not None:
        with torch.no_grad():
            ref_logps = rollout_logps(ref_model, rollout)
        result["kl_divergence"] = (rollout.old_logps - ref_logps).sum(-1).mean().item()
    if reward_model is not None:
        reward = as_reward_fn(reward_model)
        if reference_fn is not None:
            both = reward(prompts, texts), as_reward_fn(reference_fn)(prompts, texts)
            varied = all(scores.min() < scores.max() for scores in both)
            rho = stats.spearmanr(*(scores.cpu() for scores in both)).statistic if varied else math.nan
            result["reward_alignment"] = float(rho)
        elif rejected is not None:
            gaps = reward(prompts, answers) - reward(prompts, rejected)
            result["reward_alignment"] = gaps.sign().mean().item()
        else:
            raise ValueError("reward_alignment needs pairs (test_data with rejected) or reference_fn=")
    return result | _human_marks(human_evaluators or (), prompts, texts, answers, seed)


def as_safety_fn(given: nn.Module | RewardFn) -> RewardFn:
    """`as_reward_fn` of a judge whose scores are probabilities of being safe.

    Lesson 3. A call raises what it does there, and ValueError for a score outside [0, 1].
    """
    judge = as_reward_fn(given)

    def safety_fn(prompts: list[str], responses: list[str], **columns: Any) -> Tensor:
        return torch.tensor(ask_judge(judge, prompts, responses, **columns)).float()

    return safety_fn


def perplexity(model: nn.Module, tokenizer: Any, prompts: Sequence[str], responses: Sequence[str]) -> float:
    """exp(-sum of log-probs / number of tokens) of given responses, EOS included, prompts and padding not.

    Every token weighs the same, so a long response weighs more. Lessons 2 and 3.
    """
    total, count = 0.0, 0
    for start in range(0, len(prompts), 16):
        part = slice(start, start + 16)
        with torch.no_grad():
            logps, mask = sequence_logps(model, tokenizer, prompts[part], responses[part])
        total, count = total + logps.sum().item(), count + int(mask.sum())
    return math.exp(-total / count)


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Share of different runs of n words among all runs of n words in the texts; 0 where there is none.

    1: nothing is ever said twice. Falls with the amount of text: compare equally many of like length. Li et
    al. 2016. Lessons 2 and 3.
    """
    words = [text.split() for text in texts]
    runs = [tuple(row[i : i + n]) for row in words for i in range(len(row) - n + 1)]
    return len(set(runs)) / len(runs) if runs else 0.0


def _read(test_data: Any) -> tuple[list[str], list[str], list[str] | None]:
    frame = pd.DataFrame(test_data if isinstance(test_data, Mapping) else list(test_data))
    answer = next((name for name in ANSWERS if name in frame), None)
    if "prompt" not in frame or answer is None:
        raise ValueError(f"test_data needs prompt and one of {ANSWERS}, got columns {list(frame)}")
    columns = {name: frame[name].tolist() for name in ("prompt", answer, "rejected") if name in frame}
    for name, values in columns.items():
        for row, value in enumerate(values):
            if not isinstance(value, str):
                raise ValueError(f"test_data[{row}]: {name} must be a text, got {value!r}")
    return columns["prompt"], columns[answer], columns.get("rejected")


def _human_marks(
    evaluators: Sequence[Evaluator], prompts: list[str], responses: list[str], answers: list[str], seed: int
) -> dict[str, float]:
    """Return the mean mark over evaluators for each question that at least one of them answers."""
    rows = []
    for number, evaluator in enumerate(evaluators):
        own_seed = 2 * (seed + number)
        marks = _ask(evaluator, prompts, responses, own_seed)
        if "preference" in marks:
            # The data's answers are marked independently of the samples; a tie counts one half.
            others = _ask(evaluator, prompts, answers, own_seed + 1)
            gaps = marks.pop("preference") - others["preference"]
            marks["human_preference"] = (gaps.sign() + 1) / 2
        rows.append({name: values.mean().item() for name, values in marks.items()})
    return pd.DataFrame(rows).mean().to_dict()


def _ask(evaluator: Evaluator, prompts: list[str], responses: list[str], seed: int) -> dict[str, Tensor]:
    """Marks by question; those of an annotator, 1 to 5, as 0 to 1."""
    if isinstance(evaluator, Annotator):
        axes = ("helpfulness", "harmlessness")
        people = {axis: replace(evaluator, axis_weights={axis: 1.0}) for axis in axes}
        people["preference"] = evaluator
        given = {name: (p.rate(prompts, responses, seed=seed) - 1) / 4 for name, p in people.items()}
    else:
        given = evaluator(prompts, responses)
        given = given if isinstance(given, Mapping) else {"preference": given}
    marks = {name: torch.as_tensor(values, dtype=torch.float64) for name, values in given.items()}
    for name, values in marks.items():
        if values.shape != (len(prompts),) or not values.isfinite().all():
            raise ValueError(f"an evaluator must give {len(prompts)} finite marks for {name}, got {values}")
    return marks

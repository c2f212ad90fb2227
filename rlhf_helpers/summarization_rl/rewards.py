"""What a summary earns: words shared with a reference, facts of its article, people's choice; and its length.

None of these is the judge of the world. The facts come close to it there, since both read events; the reward
learned from comparisons is what one has of real summaries.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlhf_helpers.alignment_eval import sample_answers
from rlhf_helpers.core.models import RewardFn, as_reward_fn
from rlhf_helpers.core.tensors import require_number
from rlhf_helpers.summarization_rl.data import article_of
from rlhf_helpers.summarization_rl.facts import summary_facts
from rlhf_helpers.world.annotators import STANDARD, Annotator, label_pairs


def rouge_l(candidate: str, reference: str) -> float:
    """ROUGE-L in [0, 1]: F1 of the longest common subsequence of words, L words long.

    precision p = L / words of candidate;  recall r = L / words of reference;  F1 = 2 p r / (p + r)

    By the rouge-score library without stemmer: lower case, only a-z and 0-9 make words (text in another
    script scores 0); 0 where either has no word. Order counts, meaning does not: one wrong place in ten words
    still scores 0.9. Lin 2004. Lesson 4.
    """
    from rouge_score.rouge_scorer import RougeScorer

    return float(RougeScorer(["rougeL"]).score(reference, candidate)["rougeL"].fmeasure)


def rouge_reward(
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    reference: Sequence[str] | None = None,
    **_columns: Any,
) -> Float[Tensor, "B"]:
    """`rouge_l` of each response with its reference, (B,) in [0, 1]: a RewardFn.

    Lesson 4. Raises ValueError where the data have no column reference.
    """
    if reference is None:
        raise ValueError("rouge_reward compares with the column reference, which these data lack: add it")
    return torch.tensor([rouge_l(*both) for both in zip(responses, reference, strict=True)])


def fact_reward(
    prompts: Sequence[str], responses: Sequence[str], *, article: Sequence[str] | None = None, **_columns: Any
) -> Float[Tensor, "B"]:
    """Return coverage x faithfulness of `summary_facts`, (B,) in [0, 1]: a RewardFn that needs no reference.

    article: None: what stands in the prompt. It says nothing of style: true details cost nothing. Lesson 4.
    """
    texts = map(article_of, prompts) if article is None else article
    found = [summary_facts(*both) for both in zip(texts, responses, strict=True)]
    return torch.tensor([facts.coverage * facts.faithfulness for facts in found])


def with_length_control(reward: RewardFn | nn.Module, *, limit: float, cost: float) -> RewardFn:
    """Make the RewardFn reward - cost max(0, words - limit): up to the limit nothing changes.

    A reward that pays b for each word stops paying for more than `limit` words where cost >= b. Lesson 4.
    Raises ValueError where limit or cost is negative.
    """
    require_number("limit", limit, at_least=0)
    require_number("cost", cost, at_least=0)
    reward_fn = as_reward_fn(reward)

    def controlled(prompts: list[str], responses: list[str], **columns: Any) -> Tensor:
        words = torch.tensor([float(len(text.split())) for text in responses])
        rewards = reward_fn(prompts, responses, **columns)
        return rewards - cost * (words.to(rewards) - limit).clamp(min=0)

    return controlled


def summary_comparisons(
    model: nn.Module,
    prompts: Sequence[str],
    *,
    annotator: Annotator = STANDARD,
    seed: int = 0,
) -> list[dict[str, str]]:
    """Rows prompt, chosen, rejected: of two samples of `model` an annotator of the world takes the better.

    prompts: of the world (its annotators know no other); give each as often as it is to be compared. A pair
    of equal texts is left out. Lesson 4. Raises ValueError for a prompt that is not the world's.
    """
    twice, count = [*prompts, *prompts], len(prompts)
    drawn = sample_answers(model, twice, max_new_tokens=48, seed=seed)
    first, second = drawn[:count], drawn[count:]
    rows = label_pairs(list(zip(prompts, first, second, strict=True)), annotator, seed=seed)
    written = [row for row in rows if row["chosen"].strip() and row["rejected"].strip()]
    return [row for row in written if row["chosen"] != row["rejected"]]


@dataclass(frozen=True)
class ComparisonReward:
    """A RewardFn learned from comparisons: log-odds that people prefer a summary, from four of its features.

    r(x, y) = weights . features;  features: FEATURES below, read off article and summary by `summary_facts`
    P(a preferred to b) = sigmoid(r(a) - r(b)),   weights = argmax log-likelihood - |weights|^2 / 2

    Bradley and Terry 1952 on features of summaries. It learns what people pay for, length too, and can say
    so. A large reward model reads the text itself (Stiennon et al. 2020; `reward_model.RewardModelTrainer`,
    and `SummarizationRL` takes it); a small one hardly learns from some hundred comparisons whether a place
    was copied rightly. Lesson 4.
    """

    weights: dict[str, float]

    @classmethod
    def fit(cls, rows: Sequence[Mapping[str, Any]]) -> "ComparisonReward":
        """Learn from rows prompt, chosen, rejected. Raises ValueError where there is none."""
        from sklearn.linear_model import LogisticRegression

        if not len(rows):
            raise ValueError("there are no comparisons to learn from")
        prompts = [row["prompt"] for row in rows]
        chosen, rejected = (_features(prompts, [r[key] for r in rows]) for key in ("chosen", "rejected"))
        gaps = (chosen - rejected).numpy()
        both = np.concatenate([gaps, -gaps])  # each pair both ways round
        signs = np.repeat([1, -1], len(gaps))
        found = LogisticRegression(fit_intercept=False, C=0.5).fit(both, signs)
        return cls(dict(zip(FEATURES, found.coef_[0].tolist(), strict=True)))

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], **columns: Any
    ) -> Float[Tensor, "B"]:
        """Rewards (B,) in nats of log-odds; of one article differences alone mean anything."""
        weights = torch.tensor([self.weights[name] for name in FEATURES])
        return _features(prompts, responses, columns.get("article")) @ weights


# share of facts told; share of claims that are right; whether nothing is made up (0 or 1); words / 10
FEATURES = ("coverage", "faithfulness", "nothing_made_up", "ten_words")


def _features(
    prompts: Sequence[str], responses: Sequence[str], articles: Sequence[str] | None = None
) -> Float[Tensor, "B 4"]:
    texts, rows = map(article_of, prompts) if articles is None else articles, []
    for article, response in zip(texts, responses, strict=True):
        facts = summary_facts(article, response)
        clean = float(facts.hallucinated == 0 and facts.faithfulness > 0)
        rows.append([facts.coverage, facts.faithfulness, clean, len(response.split()) / 10])
    return torch.tensor(rows).reshape(-1, len(FEATURES))

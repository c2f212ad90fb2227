"""Recursive reward modeling: what a reward model trained helps to label for the next reward model.

Round 0: people label pairs alone, and a reward model learns from them. Every further round: an assistant is
trained, by the last reward model alone, to say which of two answers is better; people label new pairs with
its opinion beside them; a better reward model is trained on all labels so far (Leike et al. 2018).
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlhf_helpers.core.models import tokenizer_for
from rlhf_helpers.core.preference_losses import soft_preference_loss
from rlhf_helpers.core.tensors import require_number, require_shapes
from rlhf_helpers.policy_optimization import RLOOSettings, rloo
from rlhf_helpers.preference_data import ai_labels
from rlhf_helpers.reward_model import RewardModelTrainer, create_reward_model
from rlhf_helpers.world.prompts.meta import comparison_text

Pair = Mapping[str, Any]  # prompt, first, second
HELPERS = ("none", "self", "assistant", "untrained")


@dataclass(frozen=True)
class RecursiveSettings:
    """How a recursive run goes; a bad value raises ValueError naming it."""

    helper: str = "assistant"  # who helps people label after round 0
    person_accuracy: float = 0.66  # how often a person's label is thought right: the weight of the person
    helper_accuracy: float = 0.8  # the same of a helper that is sure: the cap on its weight
    epochs: int = 2  # of each reward model, which starts afresh every round
    judge_steps: int = 6  # RLOO steps of the assistant a round, on 8 pairs with 4 verdicts each
    judge_rate: float = 3e-4  # of RLOO on the tiny assistant; a larger one gets less
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse an unknown helper."""
        if self.helper not in HELPERS:
            raise ValueError(f"helper must be one of {HELPERS}, got {self.helper!r}")


@dataclass(frozen=True)
class Round:
    """The result of a round: its labels (the chance that `first` is better, (N,)), and what they trained."""

    labels: Float[Tensor, "N"]
    reward_model: nn.Module
    assistant: nn.Module | None  # what helped in this round; None: nothing, or the last reward model


def assisted_labels(
    votes: Float[Tensor, "N"],
    helper_log_odds: Float[Tensor, "N"] | None,
    *,
    person_accuracy: float,
    helper_accuracy: float = 0.8,
) -> Float[Tensor, "N"]:
    """Combine a person's vote and a helper's opinion into one probability (N,) that `first` is better.

    logit p = (2 vote - 1) logit(person_accuracy) + clamp(helper_log_odds, -c, c),  c = logit(helper_accuracy)

    Bayes' rule for two witnesses who err independently; the cap keeps an overconfident helper from silencing
    the person. No helper (None): the person alone. votes: 1 first, 0 second. Lesson 3. Raises ValueError for
    other votes, unequal shapes, or an accuracy outside [0.5, 1).
    """
    require_number("person_accuracy", person_accuracy, at_least=0.5, below=1)
    require_number("helper_accuracy", helper_accuracy, at_least=0.5, below=1)
    if not ((votes == 0) | (votes == 1)).all():
        raise ValueError(f"votes must be 0 or 1, got {votes.unique().tolist()[:5]}")
    weight, cap = (math.log(a / (1 - a)) for a in (person_accuracy, helper_accuracy))
    odds = (2 * votes.float() - 1) * weight
    if helper_log_odds is not None:
        require_shapes("N", votes=votes, helper_log_odds=helper_log_odds)
        odds = odds + helper_log_odds.clamp(-cap, cap)
    return odds.sigmoid()


def model_log_odds(model: nn.Module, rows: Sequence[Pair]) -> Float[Tensor, "N"]:
    """Return the log-odds (N,) that a language model, asked "A or B?" in both orders, gives `first`."""
    return ai_labels(model, tokenizer_for(model), rows).clamp(1e-6, 1 - 1e-6).logit()


def reward_log_odds(reward_model: nn.Module, rows: Sequence[Pair]) -> Float[Tensor, "N"]:
    """Return the log-odds (N,) that a reward model gives `first`: r(first) - r(second), by Bradley-Terry."""
    prompts = [row["prompt"] for row in rows]
    first, second = (reward_model.score(prompts, [row[k] for row in rows]) for k in ("first", "second"))
    return (first - second).float().cpu()


def fit_reward_model(
    rows: Sequence[Pair], labels: Float[Tensor, "N"], settings: RecursiveSettings, **options: Any
) -> nn.Module:
    """Train a new reward model (options: of `create_reward_model`) on soft labels p. Lesson 3.

    loss = -p logsigmoid(d) - (1 - p) logsigmoid(-d),  d = r(first) - r(second): `soft_preference_loss`
    """
    data = [
        {"prompt": row["prompt"], "chosen": row["first"], "rejected": row["second"], "margin": p}
        for row, p in zip(rows, labels.tolist(), strict=True)
    ]
    reward_model = create_reward_model("basic", seed=settings.seed, **options)
    trainer = RewardModelTrainer(reward_model, epochs=settings.epochs, batch_size=16, seed=settings.seed)
    trainer.train(data, objective="margin", loss_fn=soft_preference_loss)
    return reward_model


def train_judge(
    assistant: nn.Module, rows: Sequence[Pair], reward_model: nn.Module, settings: RecursiveSettings
) -> nn.Module:
    """Train a copy of `assistant` by RLOO to name the better of two answers, as the reward model sees it.

    Reward: sigmoid(r(named) - r(other)), and 0 for a verdict that is neither "A" nor "B". Each pair is asked
    in both orders, or "always A" would pay. No gold. Lesson 3.
    """
    rows = [*rows, *({**row, "first": row["second"], "second": row["first"]} for row in rows)]
    prompts = [comparison_text(row["prompt"], row["first"], row["second"]) for row in rows]
    odds = reward_log_odds(reward_model, rows)
    worth = dict(zip(prompts, odds.sigmoid().tolist(), strict=True))

    def agrees(prompts: list[str], responses: list[str], **_: Any) -> Tensor:
        pairs = zip(prompts, responses, strict=True)
        return torch.tensor([{"A": worth[p], "B": 1 - worth[p]}.get(r.strip(), 0.0) for p, r in pairs])

    judge = copy.deepcopy(assistant)
    plan = RLOOSettings(
        steps=settings.judge_steps,
        prompts_per_step=min(8, len(prompts)),
        samples_per_prompt=4,
        max_new_tokens=4,
        tiny_learning_rate=settings.judge_rate,
        seed=settings.seed,
    )
    rloo(judge, tokenizer_for(judge), prompts, agrees, plan, ref_model=assistant)
    return judge


def recursive_reward_modeling(
    assistant: nn.Module,
    rounds: Sequence[Sequence[Pair]],
    vote: Callable[[Sequence[Pair], int], Tensor],
    settings: RecursiveSettings,
    **options: Any,
) -> list[Round]:
    """Train one reward model per round, each afresh on the labels of all rounds so far.

    `assistant` is not changed, and nothing here reads the gold judge. Leike et al. 2018. Lesson 3.

    Args:
        assistant: A language model that can compare two answers.
        rounds: The pairs labelled in each round.
        vote: (rows, round) -> the people's votes (N,), 1 for first.
        settings: Its `helper` counts from round 1 on. "assistant": trained round after round by the last
            reward model (`train_judge`). "untrained": the assistant as given, which is help without
            recursion. "self": the last reward model, its own echo. "none".
        **options: Of `create_reward_model`.

    Raises:
        ValueError: There is no round, and as `assisted_labels`.
    """
    if not len(rounds):
        raise ValueError("rounds is empty: give the pairs of at least one round")
    done: list[Round] = []
    judge = assistant
    rows = []
    for number, new in enumerate(rounds):
        odds = helper = None
        if number and settings.helper == "self":
            odds = reward_log_odds(done[-1].reward_model, new)
        elif number and settings.helper != "none":
            if settings.helper == "assistant":
                judge = train_judge(judge, rows, done[-1].reward_model, settings)
            helper = judge
            odds = model_log_odds(helper, new)
        labels = assisted_labels(
            vote(new, number),
            odds,
            person_accuracy=settings.person_accuracy,
            helper_accuracy=settings.helper_accuracy,
        )
        rows += new
        labels_so_far = torch.cat([*(earlier.labels for earlier in done), labels])
        done.append(Round(labels, fit_reward_model(rows, labels_so_far, settings, **options), helper))
    return done

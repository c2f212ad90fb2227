"""Constitutional AI as training: imitate one's own revisions, then learn from one's own comparisons."""

import random
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlhf_helpers.alignment_eval import sample_answers
from rlhf_helpers.constitutional_ai.constitution import Constitution, Templates
from rlhf_helpers.constitutional_ai.revision import Answer, ConstitutionalAI
from rlhf_helpers.core.choices import choice_logps, soft_label
from rlhf_helpers.core.models import frozen_copy, tokenizer_for
from rlhf_helpers.core.preference_losses import soft_preference_loss
from rlhf_helpers.core.training import History, TrainingSettings, sft
from rlhf_helpers.policy_optimization import RLOOSettings, rloo
from rlhf_helpers.reward_model import RewardModel, RewardModelTrainer, RewardSettings, normalise_reward

Rows = Sequence[Mapping[str, Any]]


def constitutional_labels(
    model: nn.Module,
    rows: Rows,
    constitution: Constitution,
    *,
    templates: Templates | None = None,
    label_fn: Callable[..., Tensor] = soft_label,
    seed: int = 0,
) -> Float[Tensor, "N"]:
    """P(first is better), (N,), by the model's own A or B, each row under one principle. Lesson 3.

    As `preference_data.ai_labels`, which asks for "better" alone.

    Args:
        model: Compares.
        rows: prompt, first, second.
        constitution: A principle is drawn by its weight (Bai et al. 2022, section 4.1, drew alike).
        templates: The texts of the questions.
        label_fn: As `soft_label`.
        seed: Of the draw.
    """
    templates = templates or Templates()
    rules = constitution.principles
    drawn = random.Random(seed).choices(rules, [rule.weight for rule in rules], k=len(rows))
    asked = [
        templates.comparison(row["prompt"], row[a], row[b], rule)
        for a, b in (("first", "second"), ("second", "first"))
        for row, rule in zip(rows, drawn, strict=True)
    ]
    logps = choice_logps(model, tokenizer_for(model), asked, ("A", "B"))
    return label_fn(*logps[: len(rows)].T, *logps[len(rows) :].T)


@dataclass(frozen=True)
class ConstitutionalSettings:
    """How `ConstitutionalAITrainer` goes about it."""

    rounds: int = 3  # revisions of a draft at most
    drafts_per_prompt: int = 4  # to be revised, then imitated
    pairs_per_prompt: int = 2  # of samples of the imitator, each pair two new ones, to be compared
    sft: TrainingSettings = field(default_factory=TrainingSettings)
    sft_epochs: int = 3
    reward: RewardSettings = field(default_factory=RewardSettings)
    policy: RLOOSettings = field(default_factory=lambda: RLOOSettings(tiny_learning_rate=1e-3, steps=12))
    seed: int = 0  # of sampling; training has its own


class ConstitutionalAITrainer:
    """The phases of Constitutional AI, each a method; `train` runs them all. The given model is not changed.

        revise        drafts of the model are criticised and revised under the constitution
        supervised    a copy learns to give the revised answer at once
        label         pairs of the copy's samples are compared by the critic: soft labels, no human in it
        train_reward  a reward model learns the labels
        reinforce     the copy is trained on, by RLOO on that reward

    The critic is the model itself as it is given. Bai et al. 2022. Lesson 3.
    """

    def __init__(
        self,
        model: nn.Module,
        constitution: Constitution,
        *,
        templates: Templates | None = None,
        settings: ConstitutionalSettings | None = None,
    ) -> None:
        """Take a model that knows its tokenizer."""
        self.base = self.sft_model = self.model = model
        self.constitution = constitution
        self.templates = templates
        self.settings = settings or ConstitutionalSettings()
        self.tokenizer = tokenizer_for(model)
        self.reward_model: RewardModel | None = None

    def revise(self, prompts: Sequence[str]) -> list[Answer]:
        """Draft, critique and revise drafts_per_prompt answers to each prompt, by the base model."""
        settings = self.settings
        revising = ConstitutionalAI(
            self.base,
            self.constitution,
            rounds=settings.rounds,
            keep_best=True,
            templates=self.templates,
            seed=settings.seed,
        )
        return revising.generate_batch([p for p in prompts for _ in range(settings.drafts_per_prompt)])

    def supervised(self, revisions: Sequence[Answer]) -> History:
        """Fine-tune a copy of the base model to give the revised answers at once: `.sft_model`."""
        rows = [{"prompt": a.prompt, "completion": a.answer} for a in revisions if a.answer.strip()]
        self.sft_model = deepcopy(self.base)
        settings = self.settings
        return sft(
            self.sft_model, self.tokenizer, rows, settings.sft, epochs=settings.sft_epochs, batch_size=32
        )

    def label(
        self, prompts: Sequence[str], *, label_fn: Callable[..., Tensor] = soft_label
    ) -> list[dict[str, Any]]:
        """Compare pairs of the fine-tuned model's samples: rows prompt, chosen, rejected, margin = P(chosen).

        The labels stay soft: rounded, a guess counts as much as a certainty. The paper kept people's labels
        for helpfulness; to do so, add your rows with margin 1 before `train_reward`.
        """
        asked = [p for p in prompts for _ in range(2 * self.settings.pairs_per_prompt)]
        said = self._sample(asked, 1000)
        pairs = [
            {"prompt": prompt, "first": first, "second": second}
            for prompt, first, second in zip(asked[::2], said[::2], said[1::2], strict=True)
            if first != second and first.strip() and second.strip()
        ]
        chances = constitutional_labels(
            self.base,
            pairs,
            self.constitution,
            templates=self.templates,
            label_fn=label_fn,
            seed=self.settings.seed,
        )
        rows = []
        for pair, p in zip(pairs, chances.tolist(), strict=True):
            if p >= 0.5:
                rows.append(_row(pair["prompt"], pair["first"], pair["second"], p))
            else:
                rows.append(_row(pair["prompt"], pair["second"], pair["first"], 1 - p))
        return rows

    def train_reward(self, rows: Rows) -> History:
        """Train a reward model, with a copy of the fine-tuned model for its trunk, on `label`'s rows."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.reward.seed)
            self.reward_model = RewardModel(deepcopy(self.sft_model).base_model, self.tokenizer)
        trainer = RewardModelTrainer(self.reward_model, settings=self.settings.reward)
        return trainer.train(rows, objective="margin", loss_fn=soft_preference_loss)

    def reinforce(self, prompts: Sequence[str]) -> History:
        """Train a copy of the fine-tuned model, KL measured against it: `.model`.

        By RLOO on the reward model, scaled to mean 0 and std 1 on the fine-tuned model's samples.
        """
        reference = frozen_copy(self.sft_model)
        self.model = deepcopy(self.sft_model)
        asked = [p for p in prompts for _ in range(2)]
        reward = normalise_reward(self.reward_model, asked, self._sample(asked, 2000))
        return rloo(
            self.model, self.tokenizer, list(prompts), reward, self.settings.policy, ref_model=reference
        )

    def train(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Run every phase on `prompts`, which should hold requests to refuse and harmless ones.

        Returns model, sft_model, reward_model, revisions, labels, and histories by phase.
        """
        revisions = self.revise(prompts)
        histories = {"supervised": self.supervised(revisions)}
        rows = self.label(prompts)
        histories["reward"] = self.train_reward(rows)
        histories["policy"] = self.reinforce(prompts)
        models = {"model": self.model, "sft_model": self.sft_model, "reward_model": self.reward_model}
        return models | {"revisions": revisions, "labels": rows, "histories": histories}

    def _sample(self, prompts: Sequence[str], shift: int) -> list[str]:
        return sample_answers(self.sft_model, prompts, seed=self.settings.seed + shift)


def _row(prompt: str, chosen: str, rejected: str, margin: float) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": margin}

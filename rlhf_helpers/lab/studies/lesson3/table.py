"""Every technique of lesson 3 on one table: what it gains in safety, and what it costs elsewhere."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from rlhf_helpers.constitutional_ai import (
    ConstitutionalAI,
    ConstitutionalAITrainer,
    create_constitution,
    follow_scores,
)
from rlhf_helpers.core.generation import generate
from rlhf_helpers.core.models import load_model
from rlhf_helpers.core.training import TrainingSettings
from rlhf_helpers.guards import Guard
from rlhf_helpers.lab.studies.lesson1 import SEEDS
from rlhf_helpers.lab.studies.lesson2.sweeps import ability
from rlhf_helpers.lab.studies.lesson3 import constitution, tradeoffs
from rlhf_helpers.lab.studies.record import write_study
from rlhf_helpers.red_teaming import adversarial_training, create_adversarial_prompts
from rlhf_helpers.safety_alignment import SafetyAlignment

# columns of the table -> what a lesson calls them; higher is better, except over-refusal and surprise
COLUMNS = {
    "harmlessness": "harmless", "attacked": "harmless, attacked", "over_refusal": "over-refusal",
    "helpfulness": "helpful", "comparison": "comparison", "surprise": "surprise (nats/token)",
}  # fmt: skip
RULE = create_constitution(["Avoid harmful content"])
Respond = Callable[[list[str]], list[str]]


@dataclass(frozen=True)
class System:
    """What answers prompts, and the model behind it, for its abilities."""

    respond: Respond
    model: torch.nn.Module


ANSWERS = 90  # of each kind


def said_by(model: torch.nn.Module, tokenizer: Any, prompts: list[str], *, seed: int) -> list[str]:
    """One answer a prompt, sampled at temperature 1."""
    return generate(model, tokenizer, prompts, max_new_tokens=64, seed=60_000 + seed).responses


class Techniques:
    """Builds each technique's system for one seed, from the same base.

    "constrained RLOO (gold)" alone learns from gold.
    revision, guard and best of 8 train nothing: they spend time at each answer. The judge of all of them, and
    of the hardening, is the base model's own verdict under one rule. RLAIF goes on from "own revisions".
    """

    def __init__(self, seed: int) -> None:
        """Load the base and what several techniques share."""
        self.seed = seed
        self.base, self.tokenizer = load_model("tiny")
        self.prompts = constitution.training_prompts(seed)
        settings = constitution.training_settings(seed)
        self.trainer = ConstitutionalAITrainer(self.base, RULE, settings=settings)
        self._imitator: torch.nn.Module | None = None

    def judge(self, prompts: list[str], responses: list[str], **_columns: Any) -> torch.Tensor:
        """P(the answer avoids harmful content), (B,), by the base model's verdict."""
        return follow_scores(self.base, prompts, responses, RULE)[:, 0]

    def build(self, name: str) -> System:
        """The system of a name of `NAMES`."""
        if name in WITHOUT_TRAINING:
            return System(getattr(self, WITHOUT_TRAINING[name]), self.base)
        model = getattr(self, TRAINED[name])()
        return System(partial(said_by, model, self.tokenizer, seed=self.seed), model)

    def as_it_is(self, prompts: list[str]) -> list[str]:
        """The base's answers."""
        return said_by(self.base, self.tokenizer, prompts, seed=self.seed)

    def revised(self, prompts: list[str]) -> list[str]:
        """The base's answers, each revised once where its own verdict asks for it."""
        revising = ConstitutionalAI(self.base, RULE)
        drafts = self.as_it_is(prompts)
        return [a.answer for a in revising.generate_batch(prompts, drafts=drafts, seed=61_000 + self.seed)]

    def guarded(self, prompts: list[str], n: int = 1) -> list[str]:
        """The base's answers behind a guard that shows only what the judge finds safe; of n the safest."""
        guard = Guard(model=self.base, output_fn=self.judge, n=n, seed=60_000 + self.seed)
        return [record.response for record in guard.answer_batch(prompts)]

    def best_of_8(self, prompts: list[str]) -> list[str]:
        """The guard's pick of eight answers."""
        return self.guarded(prompts, n=8)

    def imitator(self) -> torch.nn.Module:
        """The base trained on its own revisions."""
        if self._imitator is None:
            self.trainer.supervised(self.trainer.revise(self.prompts))
            self._imitator = self.trainer.sft_model
        return self._imitator

    def rlaif(self) -> torch.nn.Module:
        """The imitator trained on by RLOO, on a reward learned from its own comparisons."""
        self.imitator()
        self.trainer.train_reward(self.trainer.label(self.prompts))
        self.trainer.reinforce(self.prompts)
        return self.trainer.model

    def hardened(self) -> torch.nn.Module:
        """The base trained on its safe answers to attacks, judged by itself."""
        attacks = create_adversarial_prompts(("harmful", "privacy"), 160, seed=self.seed, split="train")
        settings = TrainingSettings(learning_rate=5e-4, seed=self.seed, progress=False)
        return adversarial_training(self.base, attacks, safety_fn=self.judge, settings=settings)

    def preferences(self) -> torch.nn.Module:
        """DPO on pairs of the base's own answers that the judge tells apart."""
        asked = [prompt for prompt in self.prompts for _ in range(4)]
        said = said_by(self.base, self.tokenizer, asked, seed=2_000 + self.seed)
        safe = self.judge(asked, said).view(-1, 4)
        rows = []
        for i, prompt in enumerate(self.prompts):
            best, worst = int(safe[i].argmax()), int(safe[i].argmin())
            if safe[i, best] - safe[i, worst] > 0.3:
                pair = {"chosen": said[4 * i + best], "rejected": said[4 * i + worst]}
                rows.append({"prompt": prompt, **pair})
        rows = [row for row in rows if row["chosen"].strip() and row["rejected"].strip()]
        return SafetyAlignment(self.base, seed=self.seed, learning_rate=1e-3, epochs=2).align(rows)

    def constrained(self) -> torch.nn.Module:
        """RLOO for helpfulness under a limit of 0.1 on harm, both gold's: what a perfect judge would give."""
        return tradeoffs.run("lagrangian", 0.1, seed=self.seed)[0]


WITHOUT_TRAINING = {
    "base": "as_it_is", "revision": "revised", "guard": "guarded", "guard, best of 8": "best_of_8",
}  # fmt: skip
TRAINED = {
    "own revisions": "imitator", "RLAIF": "rlaif", "hardening": "hardened", "DPO": "preferences",
    "constrained RLOO (gold)": "constrained",
}  # fmt: skip
NAMES = (*WITHOUT_TRAINING, *TRAINED)


def safety_table(
    out: str | Path | None = None, *, seeds: Sequence[int] = SEEDS, names: Sequence[str] = NAMES
) -> pd.DataFrame:
    """What each technique does to held-out prompts: seed, technique, `COLUMNS`.

    harmlessness (requests to refuse), attacked (the same in jailbreak wrappers), over_refusal (share of safe
    look-alikes that are refused), helpfulness (harmless prompts): gold. comparison, surprise: of
    `lesson2.sweeps.ability`, of the model alone.
    """
    asked = constitution.asked_by_kind(ANSWERS)
    rows = []
    for seed in seeds:
        techniques = Techniques(seed)
        for name in names:
            system = techniques.build(name)
            found = constitution.measure({kind: (p, system.respond(p)) for kind, p in asked.items()})
            found["attacked"] = found.pop("jailbreak")
            found |= ability(system.model, techniques.tokenizer)
            rows.append({"seed": seed, "technique": name, **{c: found[c] for c in COLUMNS}})
            if out:
                print(
                    {k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True
                )
    return write_study(out, "safety_table", pd.DataFrame(rows), seeds=list(seeds))

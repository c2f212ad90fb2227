"""Every technique of lesson 3 on one table: what it gains in safety, and what it costs elsewhere."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import torch

from rlhf_helpers.constitutional_ai import ConstitutionalAI, ConstitutionalAITrainer, follow_scores
from rlhf_helpers.core.models import load_model
from rlhf_helpers.core.training import TrainingSettings
from rlhf_helpers.guards import Guard
from rlhf_helpers.lab.studies.lesson2.methods import sampled
from rlhf_helpers.lab.studies.lesson2.sweeps import ability
from rlhf_helpers.lab.studies.lesson3 import constitution, tradeoffs
from rlhf_helpers.lab.studies.runner import Row, study
from rlhf_helpers.red_teaming import adversarial_training, create_adversarial_prompts
from rlhf_helpers.safety_alignment import SafetyAlignment

# column of the table -> its name in a lesson; higher is better, except for over-refusal and surprise
COLUMNS = {
    "harmlessness": "harmless",
    "attacked": "harmless, attacked",
    "over_refusal": "over-refusal",
    "helpfulness": "helpful",
    "comparison": "comparison",
    "surprise": "surprise (nats/token)",
}
RULE = constitution.ONE_RULE
ANSWERS = 90  # of each kind


class Techniques:
    """The techniques for one seed, from the same base.

    Only "constrained RLOO (gold)" learns from gold. Revision, guard and best of 8 train nothing: they spend
    time at each answer. All of them, and the hardening, are judged by the base model's own verdict under one
    rule. RLAIF goes on from "own revisions".
    """

    def __init__(self, seed: int) -> None:
        """Load the base and what several techniques share."""
        self.seed = seed
        self.base, self.tokenizer = load_model("tiny")
        self.prompts = constitution.training_prompts(seed)
        settings = constitution.training_settings(seed)
        self.trainer = ConstitutionalAITrainer(self.base, RULE, settings=settings)

    def judge(self, prompts: list[str], responses: list[str], **_columns: Any) -> torch.Tensor:
        """Score P(the answer avoids harmful content), (B,), by the base model's verdict."""
        return follow_scores(self.base, prompts, responses, RULE)[:, 0]

    def answers(self, model: torch.nn.Module, prompts: list[str]) -> list[str]:
        """Sample one answer per prompt."""
        return sampled(model, self.tokenizer, prompts, seed=60_000 + self.seed).responses

    def revised(self, prompts: list[str]) -> list[str]:
        """Revise each of the base's answers once, where its own verdict asks for it."""
        drafts = self.answers(self.base, prompts)
        revising = ConstitutionalAI(self.base, RULE)
        results = revising.generate_batch(prompts, drafts=drafts, seed=61_000 + self.seed)
        return [result.answer for result in results]

    def guarded(self, prompts: list[str], n: int) -> list[str]:
        """Show only those of the base's answers that the judge finds safe; of n the safest."""
        guard = Guard(model=self.base, output_fn=self.judge, n=n, seed=60_000 + self.seed)
        return [record.response for record in guard.answer_batch(prompts)]

    @cached_property
    def imitator(self) -> torch.nn.Module:
        """The base trained on its own revisions."""
        self.trainer.supervised(self.trainer.revise(self.prompts))
        return self.trainer.sft_model

    def rlaif(self) -> torch.nn.Module:
        """Train the imitator by RLOO, on a reward learned from its own comparisons."""
        _ = self.imitator  # the trainer goes on from it
        self.trainer.train_reward(self.trainer.label(self.prompts))
        self.trainer.reinforce(self.prompts)
        return self.trainer.model

    def hardened(self) -> torch.nn.Module:
        """Train the base on its safe answers to attacks, judged by itself."""
        attacks = create_adversarial_prompts(("harmful", "privacy"), 160, seed=self.seed, split="train")
        settings = TrainingSettings(learning_rate=5e-4, seed=self.seed, progress=False)
        return adversarial_training(self.base, attacks, safety_fn=self.judge, settings=settings)

    def preferences(self) -> torch.nn.Module:
        """Run DPO on pairs of the base's own answers that the judge tells apart."""
        rollout = sampled(self.base, self.tokenizer, self.prompts, seed=62_000 + self.seed, each=4)
        scores = self.judge(rollout.prompts, rollout.responses).view(-1, 4)
        rows = []
        for i, prompt in enumerate(self.prompts):
            best, worst = int(scores[i].argmax()), int(scores[i].argmin())
            pair = [rollout.responses[4 * i + k] for k in (best, worst)]
            if scores[i, best] - scores[i, worst] > 0.3 and all(text.strip() for text in pair):
                rows.append({"prompt": prompt, "chosen": pair[0], "rejected": pair[1]})
        return SafetyAlignment(self.base, seed=self.seed, learning_rate=1e-3, epochs=2).align(rows)

    def constrained(self) -> torch.nn.Module:
        """Run RLOO for helpfulness under a limit of 0.1 on harm, both judged by gold."""
        return tradeoffs.run("lagrangian", 0.1, seed=self.seed)[0]


WITHOUT_TRAINING: dict[str, Callable[..., list[str]]] = {
    "base": lambda techniques, prompts: techniques.answers(techniques.base, prompts),
    "revision": Techniques.revised,
    "guard": partial(Techniques.guarded, n=1),
    "guard, best of 8": partial(Techniques.guarded, n=8),
}
TRAINED: dict[str, Callable[..., torch.nn.Module]] = {
    "own revisions": lambda techniques: techniques.imitator,
    "RLAIF": Techniques.rlaif,
    "hardening": Techniques.hardened,
    "DPO": Techniques.preferences,
    "constrained RLOO (gold)": Techniques.constrained,
}
NAMES = (*WITHOUT_TRAINING, *TRAINED)


@study()
def safety_table(seed: int, names: Sequence[str] = NAMES) -> Iterator[Row]:
    """Measure each technique on held-out prompts: seed, technique, `COLUMNS`.

    harmlessness (requests to refuse), attacked (the same in jailbreak wrappers), over_refusal (share of safe
    look-alikes that are refused), helpfulness (harmless prompts): gold. comparison, surprise: of
    `lesson2.sweeps.ability`, of the model alone.
    """
    techniques = Techniques(seed)
    for name in names:
        if name in TRAINED:
            model = TRAINED[name](techniques)
            respond = partial(techniques.answers, model)
        else:
            model = techniques.base
            respond = partial(WITHOUT_TRAINING[name], techniques)
        asked = constitution.asked_by_kind(ANSWERS)
        result = constitution.measure({kind: (texts, respond(texts)) for kind, texts in asked.items()})
        result |= {"attacked": result["jailbreak"], **ability(model, techniques.tokenizer)}
        yield {"technique": name, **{column: result[column] for column in COLUMNS}}

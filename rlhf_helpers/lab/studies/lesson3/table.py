"""Every technique of lesson 3 on one table: what it gains in safety, and what it costs elsewhere."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

from torch import Tensor, nn

from rlhf_helpers.alignment_eval.measuring import sample_answers
from rlhf_helpers.constitutional_ai import ConstitutionalAI, ConstitutionalAITrainer, follow_scores
from rlhf_helpers.core.models import load_model, tokenizer_for
from rlhf_helpers.core.training import TrainingSettings
from rlhf_helpers.guards import Guard
from rlhf_helpers.lab.studies.lesson2.methods import best_against_worst
from rlhf_helpers.lab.studies.lesson2.sweeps import ability
from rlhf_helpers.lab.studies.lesson3 import constitution, tradeoffs
from rlhf_helpers.lab.studies.record import Rows, study
from rlhf_helpers.policy_optimization import best_of_n
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


def techniques_of(seed: int) -> dict[str, Callable[[], Any]]:
    """Describe the techniques for one seed, from the same base.

    Only "constrained RLOO (gold)" learns from gold. Revision, guard and best of 8 train nothing: they spend
    time at each answer. All of them, and the hardening, are judged by the base model's own verdict under one
    rule. RLAIF goes on from "own revisions".

    Returns:
        Technique -> function that makes the model that answers, or else a function that answers prompts.
    """
    base, _ = load_model("tiny")
    asked = constitution.training_prompts(seed)
    trainer = ConstitutionalAITrainer(base, RULE, settings=constitution.training_settings(seed))

    def judge(prompts: list[str], responses: list[str], **_columns: Any) -> Tensor:
        """Score P(the answer avoids harmful content), (B,), by the base model's verdict."""
        return follow_scores(base, prompts, responses, RULE)[:, 0]

    def revised(prompts: list[str]) -> list[str]:
        """Revise each of the base's answers once, where its own verdict asks for it."""
        drafts = sample_answers(base, prompts, seed=60_000 + seed)
        revising = ConstitutionalAI(base, RULE, seed=61_000 + seed)
        return [result.answer for result in revising.generate_batch(prompts, drafts=drafts)]

    def guarded(prompts: list[str], n: int) -> list[str]:
        """Show only those of the base's answers that the judge finds safe; of n the safest."""
        guard = Guard(model=base, output_fn=judge, n=n, seed=60_000 + seed)
        return [record.text for record in guard.answer_batch(prompts)]

    @cache
    def imitator() -> nn.Module:
        """Train the base on its own revisions."""
        trainer.supervised(trainer.revise(asked))
        return trainer.sft_model

    def rlaif() -> nn.Module:
        """Train the imitator by RLOO, on a reward learned from its own comparisons."""
        imitator()  # the trainer goes on from it
        trainer.train_reward(trainer.label(asked))
        trainer.reinforce(asked)
        return trainer.model

    def hardened() -> nn.Module:
        """Train the base on its safe answers to attacks, judged by itself."""
        attacks = create_adversarial_prompts(("harmful", "privacy"), 160, seed=seed, split="train")
        settings = TrainingSettings(learning_rate=5e-4, seed=seed)
        return adversarial_training(base, attacks, safety_fn=judge, settings=settings)

    def preferences() -> nn.Module:
        """Run DPO on pairs of the base's own answers that the judge tells apart."""
        drawn = best_of_n(base, tokenizer_for(base), asked, judge, n=4, seed=62_000 + seed)
        rows = best_against_worst(asked, drawn, gap=0.3)
        return SafetyAlignment(base, seed=seed, learning_rate=1e-3, epochs=2).align(rows)

    return {
        "base": lambda: base,
        "revision": lambda: revised,
        "guard": lambda: partial(guarded, n=1),
        "guard, best of 8": lambda: partial(guarded, n=8),
        "own revisions": imitator,
        "RLAIF": rlaif,
        "hardening": hardened,
        "DPO": preferences,
        "constrained RLOO (gold)": lambda: tradeoffs.run("lagrangian", 0.1, seed=seed)[0],
    }


@study
def safety_table(seed: int, names: Sequence[str] | None = None, each: int = 90) -> Rows:
    """Measure each technique on held-out prompts: seed, technique, `COLUMNS`.

    harmlessness (requests to refuse), attacked (the same in jailbreak wrappers), over_refusal (share of safe
    look-alikes that are refused), helpfulness (harmless prompts): gold. comparison, surprise: of
    `lesson2.sweeps.ability`, of the model alone. names: some of the techniques; None: all. each: answers of
    each kind.
    """
    techniques = techniques_of(seed)
    for name in names or techniques:
        respond = techniques[name]()
        model = respond if isinstance(respond, nn.Module) else techniques["base"]()
        if respond is model:
            respond = partial(sample_answers, model, seed=60_000 + seed)
        result = constitution.measure(constitution.answers_by_kind(respond, each))
        result |= {"attacked": result["jailbreak"], **ability(model)}
        yield {"technique": name, **{column: result[column] for column in COLUMNS}}

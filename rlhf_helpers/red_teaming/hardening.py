"""Adversarial training: what the red team found becomes training data."""

import copy
import random
from collections.abc import Sequence

from torch import nn

from rlhf_helpers.alignment_eval import sample_answers
from rlhf_helpers.core.models import RewardFn, tokenizer_for
from rlhf_helpers.core.training import TrainingSettings, sft
from rlhf_helpers.red_teaming.campaign import RedTeaming
from rlhf_helpers.red_teaming.prompts import AdversarialPrompt, as_attack
from rlhf_helpers.world.prompts import prompt_texts
from rlhf_helpers.world.prompts.base import REFUSALS

BENIGN = ("facts", "howto", "explain", "open", "feelings", "lookalike")
SETTINGS = TrainingSettings(tiny_learning_rate=5e-4)


def adversarial_training(
    model: nn.Module,
    attacks: Sequence[str],
    *,
    benign: Sequence[str] | None = None,
    safety_fn: RewardFn | None = None,
    rounds: int = 1,
    samples: int = 4,
    epochs: int = 2,
    settings: TrainingSettings = SETTINGS,
) -> nn.Module:
    """Fine-tune a copy of `model` to refuse `attacks` and to answer `benign` prompts as it did before.

    In a round, the present model answers each attack `samples` times. Each attack that succeeded is taught
    the model's own safest answer to the plain request behind it, or a fixed refusal where it has none, mixed
    with the given model's own answers to the benign prompts. Lesson 3.

    Args:
        model: The model to harden; it is not changed.
        attacks: Texts or attacks.
        benign: Prompts; None: three of the world's train split for each attack, look-alikes among them.
        safety_fn: The judge, as in `RedTeaming`; None: gold, in the place of reviewers.
        rounds: How often to attack and train.
        samples: Answers per attack.
        epochs: Passes over the rows of a round.
        settings: Of the fine-tuning; its seed also draws the answers.

    Returns:
        The hardened copy.
    """
    if not len(attacks) or rounds < 1:
        raise ValueError(f"need an attack and rounds >= 1, got {len(attacks)} and {rounds}")
    hardened = copy.deepcopy(model)
    tokenizer = tokenizer_for(model)
    seed = settings.seed
    if benign is None:
        pool = prompt_texts(BENIGN, "train")
        benign = random.Random(f"benign/{seed}").choices(pool, k=3 * len(attacks))
    kept = []
    if len(benign):
        usual = sample_answers(model, benign, seed=seed)
        kept = [{"prompt": p, "completion": a} for p, a in zip(benign, usual, strict=True) if a.strip()]
    attacks = [as_attack(attack) for attack in attacks]
    requests = {a.base_prompt: a.category for a in attacks}
    plain = [AdversarialPrompt(text, category, "direct", text) for text, category in requests.items()]
    for turn in range(rounds):
        red_team = RedTeaming(hardened, safety_fn=safety_fn, seed=seed + 1000 * (turn + 1))
        rows = sorted(red_team.findings([*plain, *attacks], samples=samples), key=lambda row: row["score"])
        # The rows go from the least to the most safe, so the safest answer to a request is kept.
        safe = {r["base_prompt"]: r["response"] for r in rows if r["prompt"] in requests and not r["success"]}
        won = dict.fromkeys(r["prompt"] for r in rows if r["success"])
        taught = [{"prompt": a, "completion": safe.get(a.base_prompt) or REFUSALS[0]} for a in won]
        if taught:
            sft(hardened, tokenizer, taught + kept, settings, epochs=epochs, batch_size=16)
    return hardened

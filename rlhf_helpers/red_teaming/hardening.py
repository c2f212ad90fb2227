"""Adversarial training: what the red team found becomes training data."""

import copy
import random
from collections.abc import Sequence
from typing import Any

from torch import nn

from rlhf_helpers.core.models import RewardFn, tokenizer_for
from rlhf_helpers.core.training import TrainingSettings, sft
from rlhf_helpers.red_teaming.campaign import RedTeaming
from rlhf_helpers.red_teaming.prompts import AdversarialPrompt, as_attack
from rlhf_helpers.world.prompts import load_prompts
from rlhf_helpers.world.prompts.base import REFUSALS

BENIGN = ("facts", "howto", "explain", "open", "feelings", "lookalike")
SETTINGS = TrainingSettings(tiny_learning_rate=5e-4, progress=False)


def adversarial_training(
    model: nn.Module,
    attacks: Sequence[str],
    *,
    benign: Sequence[str] | None = None,
    safety_fn: RewardFn | None = None,
    refusal: str = REFUSALS[0],
    rounds: int = 1,
    samples: int = 4,
    epochs: int = 2,
    settings: TrainingSettings = SETTINGS,
    tokenizer: Any = None,
    max_new_tokens: int = 64,
) -> nn.Module:
    """A copy of `model`, fine-tuned to refuse `attacks` and to answer `benign` prompts as it did before.

    A round: attack the present model, `samples` answers each. What succeeded is taught the model's own safest
    answer to the plain request behind it, or `refusal` where it has none, mixed with the given model's own
    answers to the benign prompts (None: three of the world's train split for each attack, look-alikes among
    them). safety_fn: the judge, as in `RedTeaming`; None: gold, in the place of reviewers. Lesson 3.
    """
    if not len(attacks) or rounds < 1:
        raise ValueError(f"need an attack and rounds >= 1, got {len(attacks)} and {rounds}")
    hardened, tokenizer, seed = copy.deepcopy(model), tokenizer or tokenizer_for(model), settings.seed
    if benign is None:
        pool = [prompt.text for prompt in load_prompts(BENIGN, "train")]
        benign = random.Random(f"benign/{seed}").choices(pool, k=3 * len(attacks))
    options = {"tokenizer": tokenizer, "max_new_tokens": max_new_tokens}
    usual = RedTeaming(model, seed=seed, **options).respond(benign) if len(benign) else []
    kept = [{"prompt": p, "completion": a} for p, a in zip(benign, usual, strict=True) if a.strip()]
    attacks = [as_attack(attack) for attack in attacks]
    plain = {a.base_prompt: AdversarialPrompt(a.base_prompt, a.category) for a in attacks}
    plain = [AdversarialPrompt(a, a.category, "direct", a) for a in plain.values()]
    for turn in range(rounds):
        red_team = RedTeaming(hardened, safety_fn=safety_fn, seed=seed + 1000 * (turn + 1), **options)
        rows = sorted(red_team.findings([*plain, *attacks], samples=samples), key=lambda row: row["score"])
        safe = {r["base_prompt"]: r["response"] for r in rows if r["prompt"] in plain and not r["success"]}
        won = dict.fromkeys(r["prompt"] for r in rows if r["success"])
        taught = [{"prompt": str(a), "completion": safe.get(a.base_prompt) or refusal} for a in won]
        if taught:
            sft(hardened, tokenizer, taught + kept, settings, epochs=epochs, batch_size=16)
    return hardened

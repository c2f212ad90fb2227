"""Suffix attacks on a hardened assistant: GCG, AutoPrompt and random search at one budget, and no suffix."""

from collections.abc import Sequence

import torch

from rlhf_helpers.alignment_eval.measuring import gold_axes, measure_policy
from rlhf_helpers.core.models import load_model
from rlhf_helpers.core.training import TrainingSettings
from rlhf_helpers.lab.studies.record import Row, Rows, study
from rlhf_helpers.red_teaming.gradient import METHODS, GradientBasedRedTeaming, suffix_loss, target_matches
from rlhf_helpers.red_teaming.hardening import adversarial_training
from rlhf_helpers.world.prompts import prompt_texts
from rlhf_helpers.world.prompts.base import AGREEMENT

SEARCH = {"suffix_length": 16, "steps": 50, "candidates": 64, "top_k": 64}
POINTS = 12  # of a curve
TARGET = AGREEMENT[0]


def complied(
    model: torch.nn.Module, requests: Sequence[str], suffix: str, *, samples: int, seed: int
) -> float:
    """Measure the share of sampled answers to request + suffix that gold calls harmful for the request."""
    base_prompts = [request for request in requests for _ in range(samples)]
    prompts = [request + suffix for request in base_prompts]
    columns = {"base_prompt": base_prompts}
    scores = measure_policy(model, prompts, gold_axes(), columns=columns, max_new_tokens=48, seed=seed)
    return float(scores["harmlessness"].eq(0).mean())


@study
def gradient_attacks(
    seed: int, behaviours: int = 4, samples: int = 32, epochs: int = 6, search: Row = SEARCH
) -> Rows:
    """Search one universal suffix for the first `behaviours` train requests by each method.

    The target is the tiny assistant after `epochs` of hardening on harmful requests of the train split. It
    still complies with fewer than 15 % of direct requests, also held-out ones, so there is something left to
    attack.

    One row per seed, method and point of its curve: seed, method (gcg, autoprompt, random search; "no
    suffix"; "random suffix", the start of all three), evaluations (exact losses spent), loss (lowest so far,
    nats). The last row of a curve also has the effect of the suffix: loss_heldout, trained and heldout (share
    of sampled answers that comply, by gold, for requests of either split), matched (share of trained requests
    whose likeliest answer starts with the target) and the suffix. The seed moves hardening, start, swaps and
    samples.
    """
    base, tokenizer = load_model("tiny", device="cpu")
    train, heldout = (prompt_texts(("harmful",), split) for split in ("train", "heldout"))
    settings = TrainingSettings(learning_rate=5e-4, seed=seed)
    hardened = adversarial_training(base, train, epochs=epochs, settings=settings)
    assistant = hardened, tokenizer
    trained = train[:behaviours]
    targets = [TARGET] * len(trained)

    def effect(suffix: str) -> Row:
        sampling = {"samples": samples, "seed": 70_000 + seed}
        losses = suffix_loss(*assistant, heldout, [TARGET] * len(heldout), suffix)
        return {
            "loss_heldout": losses.mean().item(),
            "trained": complied(hardened, trained, suffix, **sampling),
            "heldout": complied(hardened, heldout, suffix, **sampling),
            "matched": sum(target_matches(*assistant, trained, targets, suffix)) / len(trained),
            "suffix": suffix,
        }

    bare = suffix_loss(*assistant, trained, targets, "").mean().item()
    yield {"method": "no suffix", "evaluations": 0, "loss": bare, **effect("")}
    budget = search["steps"] * search["candidates"]
    # The lowest loss at the start and within each share of the budget.
    points = sorted({1 + round(budget * i / (POINTS - 1)) for i in range(POINTS)})
    for method in METHODS:
        attacker = GradientBasedRedTeaming(*assistant, method=method, seed=seed, **search)
        result = attacker.attack(trained, targets)
        if method == METHODS[0]:
            start = {"method": "random suffix", "evaluations": 1, "loss": result.curve[0][1]}
            yield start | effect(result.start)
        for point in points:
            loss = min(loss for spent, loss in result.curve if spent <= point)
            row = {"method": method, "evaluations": point, "loss": loss}
            if point == points[-1]:
                row |= effect(result.suffix)
            yield row

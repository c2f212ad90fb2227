"""Oversight of what a judge cannot check alone: debate, recursive judges, and probes into models."""

from collections.abc import Sequence
from random import Random

import numpy as np
import torch

from rlhf_helpers.core.models import load_model
from rlhf_helpers.debate import debate_summary, make_passages, run_debates, train_debater
from rlhf_helpers.debate.recursive import (
    RecursiveSettings,
    model_log_odds,
    recursive_reward_modeling,
    reward_log_odds,
)
from rlhf_helpers.interpretability import activations, linear_probe
from rlhf_helpers.lab.studies.lesson1 import trained
from rlhf_helpers.lab.studies.lesson2.methods import make_task, run_method
from rlhf_helpers.lab.studies.record import Row, Rows, study
from rlhf_helpers.policy_optimization import RLOOSettings
from rlhf_helpers.reward_model import gold_agreement
from rlhf_helpers.world.annotators import CARELESS, make_pairs
from rlhf_helpers.world.gold_judge import gold_reward
from rlhf_helpers.world.prompts import best_answer, load_prompts, prompt_texts, sample_answer

WIN = {"prompts_per_step": 12, "samples_per_prompt": 4, "max_new_tokens": 48}
WIN |= {"learning_rate": 1e-3, "kl_coef": 0.02}
VERDICTS = ("judge_accuracy", "honest_verified", "dishonest_verified")
CONCEPTS = ("harm", "length", "truth")
# form -> speakers for the truth and against it: None, the base, or the model trained for that side
FORMS = {
    "no debate": (None, None),
    "honest consultant": ("base", None),
    "dishonest consultant": (None, "base"),
    "debate": ("base", "base"),
    "honest side trained": ("true", "base"),
    "dishonest side trained": ("base", "false"),
    "both sides trained": ("true", "false"),
}


@study
def debate(seed: int, passages: int = 200, steps: int = 16, forms: Sequence[str] = tuple(FORMS)) -> Rows:
    """Compare no debate, consultancy, and debate before and after training to win, on held-out passages.

    Columns: seed, form, judge_accuracy, honest_verified, dishonest_verified (NaN: that side is silent), n.
    The judge and the untrained debaters are the tiny assistant; each trained side is a model of its own,
    trained against the untrained other side. A consultant argues alone, for the truth or against it.
    """
    model, _ = load_model("tiny")
    held_out = make_passages(passages, split="heldout", seed=seed)
    debaters = {None: None, "base": model}
    settings = RLOOSettings(**WIN, seed=seed, steps=steps)
    for form in forms:
        for side in FORMS[form]:
            if side not in debaters:
                read = make_passages(240, seed=seed)
                trained_side = train_debater(model, read, model, settings, side=side, opponent=model)
                debaters[side] = trained_side[0]
        honest, dishonest = (debaters[side] for side in FORMS[form])
        records = run_debates(held_out, judge=model, honest=honest, dishonest=dishonest, seed=seed)
        result = {name: estimate.value for name, estimate in debate_summary(records).items()}
        yield {"form": form, **dict.fromkeys(VERDICTS, np.nan), **result, "n": passages}


def labelled(n: int, *, split: str = "train", seed: int = 0) -> list[Row]:
    """Make `n` pairs in random order, with a careless person's vote and the gold gap (only for measuring)."""
    rng, rows = np.random.default_rng(seed), []
    for row in make_pairs(n, annotator=CARELESS, split=split, seed=seed):
        vote = rng.random() < 0.5
        first, second = ("chosen", "rejected") if vote else ("rejected", "chosen")
        gap = row[f"{first}_gold"] - row[f"{second}_gold"]
        rows.append({**row, "first": row[first], "second": row[second], "vote": float(vote), "gap": gap})
    return rows


@study
def recursive_judges(
    seed: int,
    helpers: Sequence[str] = ("none", "self", "untrained", "assistant"),
    pairs: int = 60,
    rounds: int = 3,
    heldout: int = 200,
) -> Rows:
    """Train reward models on labels of careless people with and without help: one row per helper and round.

    agreement: share of held-out pairs on which the round's reward model agrees with gold;
    labels: the same for this round's labels, on pairs of different gold; helper_agreement: the same for the
    language model that helped (NaN: none did), held out.
    """
    model, _ = load_model("tiny")
    batches = [labelled(pairs, seed=1000 * (seed + 1) + k) for k in range(rounds)]
    held_out = [row for row in labelled(heldout, split="heldout", seed=777 + seed) if row["gap"] != 0]
    for helper in helpers:
        settings = RecursiveSettings(helper=helper, seed=seed)
        results = recursive_reward_modeling(
            model, batches, lambda rows, _: torch.tensor([row["vote"] for row in rows]), settings
        )
        for number, (result, rows) in enumerate(zip(results, batches, strict=True)):
            helped = np.nan
            if result.assistant is not None:
                judge = result.assistant if helper == "assistant" else model
                helped = _agreement(model_log_odds(judge, held_out), held_out)
            yield {
                "helper": helper,
                "round": number,
                "agreement": _agreement(reward_log_odds(result.reward_model, held_out), held_out),
                "labels": _agreement(result.labels - 0.5, rows),
                "helper_agreement": helped,
            }


def _agreement(odds: torch.Tensor, rows: Sequence[Row]) -> float:
    gaps = torch.tensor([row["gap"] for row in rows])
    even = torch.zeros(len(rows))
    return gold_agreement(odds.cpu(), even, gaps, even).value


def concept_rows(
    concept: str, *, split: str, seed: int, n: int
) -> tuple[list[str], list[str] | None, list[int]]:
    """Draw texts to read and balanced labels: (prompts, responses or None, labels).

    harm: must this request be refused (1), or should the model help (0)? Only the prompt is read. length: is
    the answer longer than 12 words? truth: is this answer to a question of fact right or wrong? No row comes
    twice, and prompts of the two splits differ.
    """
    rng = Random(f"{concept}/{split}/{seed}")
    if concept == "harm":
        bad = prompt_texts(("harmful", "privacy", "jailbreak"), split)
        good = prompt_texts(("howto", "lookalike", "facts", "explain", "open"), split)
        size = min(n // 2, len(bad), len(good))
        return rng.sample(bad, size) + rng.sample(good, size), None, [1] * size + [0] * size
    rows = []
    if concept == "truth":
        for prompt in load_prompts(("facts", "false_premise"), split):
            for question in (prompt.text, *prompt.slots.get("rewordings", ())):
                rows += [(question, best_answer(prompt), 1), (question, rng.choice(prompt.lures), 0)]
    else:
        prompts = load_prompts(("facts", "howto", "explain", "open", "lookalike"), split)
        drawn = dict.fromkeys((p.text, sample_answer(p, rng)) for p in rng.choices(prompts, k=4 * n))
        for label in (0, 1):
            texts = [(*pair, label) for pair in drawn if (len(pair[1].split()) > 12) == label]
            rows += texts[: n // 2]
    return tuple(map(list, zip(*rows, strict=True)))


@study
def probes(seed: int, n: int = 200, pairs: int = 600, steps: int = 12) -> Rows:
    """Train linear probes on base, policy after RL and reward model: one row per model, concept and layer.

    accuracy on held-out prompts, control (labels shuffled). The reward model learns from `pairs` labelled
    pairs; RL is RLOO for `steps` steps on the gold reward.
    """
    base, tokenizer = load_model("tiny")
    after = run_method("RLOO", make_task(seed, gold_reward), 1e-3, steps=steps).model
    reward_model = trained(make_pairs(pairs, seed=seed), seed=seed)
    models = {"base": base, "after RL": after, "reward model": reward_model}
    for concept in CONCEPTS:
        sides = [concept_rows(concept, split=split, seed=seed, n=n) for split in ("train", "heldout")]
        labels = [side[2] for side in sides]
        for name, model in models.items():
            layers = [activations(model, tokenizer, asked, said) for asked, said, _ in sides]
            for layer, (train, test) in enumerate(zip(*layers, strict=True)):
                result, control = linear_probe(train, labels[0], test, labels[1], seed=seed)
                row = {"model": name, "concept": concept, "layer": layer}
                yield row | {"accuracy": result.value, "control": control.value}

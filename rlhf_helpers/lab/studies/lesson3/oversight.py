"""Oversight of what a judge cannot check alone: debate, recursive judges, and probes into models."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from random import Random

import numpy as np
import torch
from torch import nn

from rlhf_helpers.core.models import load_model
from rlhf_helpers.debate import debate_summary, make_passages, run_debates, train_debater
from rlhf_helpers.debate.recursive import (
    RecursiveSettings,
    model_log_odds,
    recursive_reward_modeling,
    reward_log_odds,
)
from rlhf_helpers.interpretability import activations, linear_probe
from rlhf_helpers.lab.studies.lesson1 import prompt_texts, trained
from rlhf_helpers.lab.studies.runner import Row, study
from rlhf_helpers.policy_optimization import RLOOSettings, rloo
from rlhf_helpers.reward_model import accuracy
from rlhf_helpers.reward_model.metrics import pair_credits
from rlhf_helpers.world.annotators import CARELESS, make_pairs
from rlhf_helpers.world.gold_judge import gold_reward
from rlhf_helpers.world.prompts import CONVERSATION, best_answer, load_prompts, sample_answer

WIN = {"prompts_per_step": 12, "samples_per_prompt": 4, "max_new_tokens": 48}
WIN |= {"learning_rate": 1e-3, "kl_coef": 0.02, "progress": False}
VERDICTS = ("judge_accuracy", "honest_verified", "dishonest_verified")
CONCEPTS = ("harm", "length", "truth")
FORMS = (
    "no debate",
    "honest consultant",
    "dishonest consultant",
    "debate",
    "honest side trained",
    "dishonest side trained",
    "both sides trained",
)


def trained_debater(model: nn.Module, side: str, seed: int, steps: int) -> nn.Module:
    """Train a copy of `model` to win for one side ("true" or "false") against and before `model` itself."""
    settings = RLOOSettings(**WIN, seed=seed, steps=steps)
    passages = make_passages(240, seed=seed)
    return train_debater(model, passages, model, settings, sides=(side,), opponent=model)[0]


@study(training=WIN)
def debate(seed: int, passages: int = 200, steps: int = 16, forms: Sequence[str] = FORMS) -> Iterator[Row]:
    """Compare no debate, consultancy, and debate before and after training to win, on held-out passages.

    Columns: seed, form, judge_accuracy, honest_verified, dishonest_verified (NaN: that side is silent), n.
    The judge and the untrained debaters are the tiny assistant; each trained side is a model of its own,
    trained against the untrained other side. A consultant argues alone, for the truth or against it.
    """
    model, _ = load_model("tiny")
    held_out = make_passages(passages, split="heldout", seed=seed)
    honest = dishonest = None
    if any("trained" in form for form in forms):
        honest, dishonest = (trained_debater(model, side, seed, steps) for side in ("true", "false"))
    speakers = {
        "no debate": (None, None),
        "honest consultant": (model, None),
        "dishonest consultant": (None, model),
        "debate": (model, model),
        "honest side trained": (honest, model),
        "dishonest side trained": (model, dishonest),
        "both sides trained": (honest, dishonest),
    }
    for form in forms:
        speaker, opponent = speakers[form]
        records = run_debates(held_out, judge=model, honest=speaker, dishonest=opponent, seed=seed)
        result = {name: estimate.value for name, estimate in debate_summary(records).items()}
        yield {"form": form, **dict.fromkeys(VERDICTS, np.nan), **result, "n": passages}


def labelled(n: int, *, split: str = "train", seed: int = 0) -> list[Row]:
    """Make `n` pairs in random order, with a careless person's vote and the gold gap (only for measuring)."""
    rng, rows = np.random.default_rng(seed), []
    for row in make_pairs(n, annotator=CARELESS, split=split, seed=seed):
        first, second = ("chosen", "rejected") if rng.random() < 0.5 else ("rejected", "chosen")
        pair = {"prompt": row["prompt"], "first": row[first], "second": row[second]}
        gap = row[f"{first}_gold"] - row[f"{second}_gold"]
        rows.append(pair | {"vote": float(first == "chosen"), "gap": gap})
    return rows


@study(annotator=CARELESS, settings=RecursiveSettings())
def recursive_judges(
    seed: int,
    helpers: Sequence[str] = ("none", "self", "untrained", "assistant"),
    pairs: int = 60,
    rounds: int = 3,
    heldout: int = 200,
) -> Iterator[Row]:
    """Train reward models on labels of careless people with and without help: one row per helper and round.

    agreement: share of held-out pairs on which the round's reward model agrees with gold, n of them;
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
            helper_agreement = np.nan
            if result.assistant is not None:
                judge = result.assistant if helper == "assistant" else model
                helper_agreement = _agreement(model_log_odds(judge, held_out), held_out)
            yield {
                "helper": helper,
                "round": number,
                "agreement": _agreement(reward_log_odds(result.reward_model, held_out), held_out),
                "labels": _agreement(result.labels - 0.5, rows),
                "helper_agreement": helper_agreement,
                "n": len(held_out),
                "pairs": pairs * (number + 1),
            }


def _agreement(odds: torch.Tensor, rows: Sequence[Row]) -> float:
    gaps = torch.tensor([row["gap"] for row in rows])
    credits = pair_credits(odds.cpu() * gaps.sign(), torch.zeros(len(rows)))
    return accuracy(credits[gaps != 0]).value


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
        texts = rng.sample(bad, size) + rng.sample(good, size)
        return texts, None, [1] * size + [0] * size
    rows: list[tuple[str, str, int]] = []
    if concept == "truth":
        for prompt in load_prompts(("facts", "false_premise"), split):
            for question in (prompt.text, *prompt.slots.get("rewordings", ())):
                rows.append((question, best_answer(prompt), 1))
                rows.append((question, rng.choice(prompt.lures), 0))
    else:
        prompts = load_prompts(("facts", "howto", "explain", "open", "lookalike"), split)
        drawn = dict.fromkeys((p.text, sample_answer(p, rng)) for p in rng.choices(prompts, k=4 * n))
        for label in (0, 1):
            texts = [pair for pair in drawn if (len(pair[1].split()) > 12) == label]
            rows += [(*pair, label) for pair in texts[: n // 2]]
    questions, answers, labels = map(list, zip(*rows, strict=True))
    return questions, answers, labels


@study()
def probes(seed: int, n: int = 200, pairs: int = 600, steps: int = 12) -> Iterator[Row]:
    """Train linear probes on base, policy after RL and reward model: one row per model, concept and layer.

    accuracy on held-out prompts, control (labels shuffled), n test rows. The reward model learns from `pairs`
    labelled pairs; RL is RLOO for `steps` steps on the gold reward.
    """
    base, tokenizer = load_model("tiny")
    after = deepcopy(base)
    settings = RLOOSettings(steps=steps, learning_rate=1e-3, seed=seed, progress=False)
    rloo(after, tokenizer, prompt_texts(CONVERSATION, "train"), gold_reward, settings, ref_model=base)
    reward_model = trained(make_pairs(pairs, seed=seed), seed=seed)
    models = {"base": base, "after RL": after, "reward model": reward_model}
    for concept in CONCEPTS:
        sides = [concept_rows(concept, split=split, seed=seed, n=n) for split in ("train", "heldout")]
        for name, model in models.items():
            train, test = (activations(model, tokenizer, asked, said) for asked, said, _ in sides)
            for layer in range(len(train)):
                result, control = linear_probe(train[layer], sides[0][2], test[layer], sides[1][2], seed=seed)
                yield {
                    "model": name,
                    "concept": concept,
                    "layer": layer,
                    "accuracy": result.value,
                    "control": control.value,
                    "n": result.n,
                }

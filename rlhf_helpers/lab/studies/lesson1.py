"""Studies of lesson 1: what decides how good a reward model is, over five seeds each.

    python -m rlhf_helpers study NAME [--out FOLDER]
    NAME: annotator_pairs, pairs_and_noise, model_kinds, label_formats, label_budget, reward_ensembles

Every study is a function of its seeds: the lesson runs a slice of it live, with a seed that is not stored.
"""

import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from rlhf_helpers.core.generation import Rollout, generate
from rlhf_helpers.core.models import load_model
from rlhf_helpers.lab.studies.record import write_study
from rlhf_helpers.policy_optimization import best_of_n_curve
from rlhf_helpers.preference_data import ai_labels, collect_rankings, collect_ratings, select_pairs
from rlhf_helpers.reward_model import (
    Estimate,
    MultiObjectiveRewardModel,
    RewardModel,
    RewardModelTrainer,
    RewardSettings,
    create_reward_model,
    gold_agreement,
    label_objectives,
    score_pairs,
)
from rlhf_helpers.world.annotators import STANDARD, VALUE_GROUPS, Annotator, make_pairs
from rlhf_helpers.world.gold_judge import AXES, gold_reward, gold_scores
from rlhf_helpers.world.prompts import CONVERSATION, load_prompts, sample_answer

Row = dict[str, Any]

SEEDS = (0, 1, 2, 3, 4)
HELD_OUT_SEED = 20_000  # of the pairs that every model of a study is judged by: the same for all


def agreement(
    model: Any, *, split: str = "heldout", pairs: int = 1000, seed: int = HELD_OUT_SEED
) -> Estimate:
    """Share of new pairs that `model` (a reward model or any RewardFn) orders as gold does, ties left out."""
    rows = make_pairs(pairs, split=split, seed=seed)
    gold = (torch.tensor([row[key] for row in rows]) for key in ("chosen_gold", "rejected_gold"))
    return gold_agreement(*(rewards.cpu() for rewards in score_pairs(model, rows)), *gold)


def trained(
    rows: Sequence[Mapping[str, Any]],
    *,
    seed: int,
    kind: str = "basic",
    objective: str = "pairwise",
    **options: Any,
) -> RewardModel:
    """A reward model over the tiny assistant, trained on `rows` with the default settings."""
    model = create_reward_model(kind, seed=seed, **options)
    RewardModelTrainer(model, seed=seed, progress=False).train(rows, objective=objective)
    return model


def noisy(flips: float) -> Annotator:
    """A person who never errs but tosses a coin in some cases, so that a share `flips` of labels is wrong."""
    return Annotator(f"{flips:.0%} flips", temperature=0.0, reliability=1 - 2 * flips)


def annotator_pairs(
    out: str | Path | None = None, *, seeds: Sequence[int] = SEEDS, pairs: int = 2000
) -> pd.DataFrame:
    """How well a reward model trained on standard annotators agrees with gold, on seen and held-out prompts.

    For each seed: `pairs` comparisons, one training run, 2,000 new pairs of each split. Columns: seed, split,
    agreement, low, high, n. The time of training is printed, not stored: a CSV holds what can be repeated.
    """
    rows = []
    for seed in seeds:
        start = time.perf_counter()
        model = trained(make_pairs(pairs, seed=seed), seed=seed)
        seconds = time.perf_counter() - start
        for split in ("train", "heldout"):
            found = agreement(model, split=split, pairs=2000, seed=10_000 + seed)
            rows.append({"seed": seed, "split": split, "agreement": found.value})
            rows[-1] |= {"low": found.low, "high": found.high, "n": found.n}
            print(f"seed {seed}, {split:8} {found}; trained in {seconds:.0f} s", flush=True)
    facts = {"seeds": list(seeds), "pairs": pairs, "settings": RewardSettings()}
    return write_study(out, "annotator_pairs", pd.DataFrame(rows), **facts)


def pairs_and_noise(
    out: str | Path | None = None,
    *,
    seeds: Sequence[int] = SEEDS,
    sizes: Sequence[int] = (60, 125, 250, 500, 1000, 2000),
    flips: Sequence[float] = (0.0, 0.1, 0.25),
) -> pd.DataFrame:
    """Agreement with gold on held-out prompts by number of pairs and share of wrong labels.

    Larger sets of a seed hold the smaller ones. Columns: seed, flips, pairs, agreement.
    """
    rows = []
    for seed in seeds:
        for share in flips:
            drawn = make_pairs(max(2000, *sizes), annotator=noisy(share), seed=seed)  # a slice draws the same
            for size in sizes:
                found = agreement(trained(drawn[:size], seed=seed)).value
                rows.append({"seed": seed, "flips": share, "pairs": size, "agreement": found})
                print(rows[-1], flush=True)
    facts = {"seeds": list(seeds), "sizes": list(sizes), "flips": list(flips), "settings": RewardSettings()}
    return write_study(out, "pairs_and_noise", pd.DataFrame(rows), **facts)


def model_kinds(
    out: str | Path | None = None, *, seeds: Sequence[int] = SEEDS, pairs: int = 1000
) -> pd.DataFrame:
    """Joint against separate encoder against several objectives, on the same pairs.

    The multi-objective model learns from three value groups, one an objective, its weights 1/3 each; the
    other two from standard annotators. Columns: seed, kind, judged_by (gold, or one of its axes: the
    multi-objective model answers with that objective alone), agreement on held-out prompts.
    """
    people = dict(zip(AXES, VALUE_GROUPS.values(), strict=True))
    rows = []
    for seed in seeds:
        drawn = make_pairs(pairs, seed=seed)
        for kind in ("basic", "separate", "multi_objective"):
            several = kind == "multi_objective"
            options = {"objectives": AXES} if several else {}
            labelled = label_objectives(drawn, people, seed=seed) if several else drawn
            model = trained(labelled, seed=seed, kind=kind, **options)
            for judged_by, value in _agreement_by_axis(model).items():
                rows.append({"seed": seed, "kind": kind, "judged_by": judged_by, "agreement": value})
            print(rows[-4:], flush=True)
    facts = {"seeds": list(seeds), "pairs": pairs, "settings": RewardSettings()}
    return write_study(out, "model_kinds", pd.DataFrame(rows), **facts)


def _agreement_by_axis(model: RewardModel) -> dict[str, float]:
    """Agreement with gold and with each of its axes on held-out pairs that differ in it."""
    rows = make_pairs(1000, split="heldout", seed=HELD_OUT_SEED)
    prompts = [row["prompt"] for row in rows]
    sides = [[row[side] for row in rows] for side in ("chosen", "rejected")]
    gold = [gold_scores(prompts, side) | {"gold": gold_reward(prompts, side)} for side in sides]
    found, own = {}, getattr(model, "weights", None)
    for name in ("gold", *AXES):
        if isinstance(model, MultiObjectiveRewardModel):
            model.weights = own if name == "gold" else [float(axis == name) for axis in AXES]
        rewards = [model.score(prompts, side).cpu() for side in sides]
        found[name] = gold_agreement(*rewards, gold[0][name], gold[1][name]).value
    return found


def label_formats(
    out: str | Path | None = None, *, seeds: Sequence[int] = SEEDS, prompts: int = 500
) -> pd.DataFrame:
    """Comparisons, rankings and ratings of the same answers, four to each of `prompts` prompts.

    Two pairs, one ranking of four, or four marks a prompt: as many answers are read in each format. Columns:
    seed, format, agreement on held-out prompts.
    """
    rows = []
    for seed in seeds:
        sets = _answer_sets(prompts, seed)
        orders = collect_rankings(sets, [STANDARD], seed=seed)[:, 0]
        marks = collect_ratings(sets, [STANDARD], seed=seed)[:, 0]
        ranked = [
            _row(s, responses=[s["responses"][i] for i in o]) for s, o in zip(sets, orders, strict=True)
        ]
        rated = [
            _row(s, response=answer, rating=float(mark) - 3)  # around 0, where an untrained head starts
            for s, own in zip(sets, marks, strict=True)
            for answer, mark in zip(s["responses"], own, strict=True)
        ]
        data = {"pairwise": _compared(sets, seed), "ranking": ranked, "rating": rated}
        for objective, labelled in data.items():
            found = agreement(trained(labelled, seed=seed, objective=objective)).value
            rows.append({"seed": seed, "format": objective, "agreement": found})
            print(rows[-1], flush=True)
    facts = {"seeds": list(seeds), "prompts": prompts, "settings": RewardSettings()}
    return write_study(out, "label_formats", pd.DataFrame(rows), **facts)


def _row(answers: Row, **columns: Any) -> Row:
    return {"prompt": answers["prompt"], **columns}


def _answer_sets(prompts: int, seed: int) -> list[Row]:
    """Rows prompt, responses: four different answers as the unaligned assistant writes them."""
    rng, sets = random.Random(f"sets/{seed}"), []
    known = load_prompts(CONVERSATION, "train")
    while len(sets) < prompts:
        prompt = rng.choice(known)
        answers = list({sample_answer(prompt, rng): None for _ in range(12)})[:4]
        if len(answers) == 4:
            sets.append({"prompt": prompt.text, "responses": answers})
    return sets


def _compared(sets: Sequence[Row], seed: int) -> list[Row]:
    """Two standard comparisons a set: the first two answers, and the last two."""
    texts = [(s["prompt"], *s["responses"][i : i + 2]) for s in sets for i in (0, 2)]
    wins = STANDARD.compare(*map(list, zip(*texts, strict=True)), seed=seed)
    pairs = [(p, a, b) if won else (p, b, a) for (p, a, b), won in zip(texts, wins, strict=True)]
    return [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in pairs]


def label_budget(
    out: str | Path | None = None, *, seeds: Sequence[int] = SEEDS, budget: int = 200, price: float = 0.1
) -> pd.DataFrame:
    """Four ways to spend the price of `budget` human labels; one by the model costs `price` of a person's.

    random: people label random pairs. active: half of them random, then the pairs that a model trained on
    those is least sure of. assisted: people label the half that the language model is least sure of, and it
    labels as many others as the other half pays for. unaided AI: the whole budget goes to the model.
    Columns: seed, method, pairs, agreement on held-out prompts.
    """
    assistant = load_model("tiny")
    half, many = budget // 2, round(budget / price)
    rows = []
    for seed in seeds:
        pool = make_pairs(many, seed=seed)
        chances = ai_labels(
            *assistant, [_row(r, first=r["chosen"], second=r["rejected"]) for r in pool]
        ).numpy()
        rest = pool[half:]
        chosen, rejected = score_pairs(trained(pool[:half], seed=seed), rest)
        hard = [rest[i] for i in select_pairs((chosen - rejected).cpu().numpy(), half)]
        unsure = set(select_pairs(np.log(chances / (1 - chances)), half).tolist())
        by_model = [_ai_row(row, chance) for row, chance in zip(pool, chances, strict=True)]
        others = [row for i, row in enumerate(by_model) if i not in unsure][: round(half / price)]
        data = {
            "random": pool[:budget],
            "active": pool[:half] + hard,
            "assisted": [pool[i] for i in sorted(unsure)] + others,
            "AI alone": by_model,
        }
        for method, labelled in data.items():
            found = agreement(trained(labelled, seed=seed)).value
            rows.append({"seed": seed, "method": method, "pairs": len(labelled), "agreement": found})
            print(rows[-1], flush=True)
    facts = {"seeds": list(seeds), "budget": budget, "price": price, "settings": RewardSettings()}
    return write_study(out, "label_budget", pd.DataFrame(rows), **facts)


def _ai_row(row: Row, chance: float) -> Row:
    """The pair as the language model orders it."""
    first, second = (row["chosen"], row["rejected"]) if chance > 0.5 else (row["rejected"], row["chosen"])
    return _row(row, chosen=first, rejected=second)


def reward_ensembles(
    out: str | Path | None = None,
    *,
    seeds: Sequence[int] = SEEDS,
    pairs: int = 1000,
    flips: float = 0.25,
    members: int = 4,
    prompts: int = 60,
    samples: int = 256,
) -> pd.DataFrame:
    """Gold reward of best-of-n by one reward model and by ensembles of four, under 25 % wrong labels.

    The set-up of Coste et al. 2023: members differ in their head and in the order of the data; rewards are
    normalised on the policy's samples. All judge the same samples to held-out prompts. Columns: seed,
    method (one, mean, worst, variance), n, proxy, gold.
    """
    drawn = _policy_samples(prompts, samples)
    *different, where = distinct_texts(drawn)
    gold = gold_reward(drawn.prompts, drawn.responses).view(prompts, samples)
    rows = []
    for seed in seeds:
        ensemble = create_reward_model("ensemble", seed=10 * seed, members=members)
        labelled = make_pairs(pairs, annotator=noisy(flips), seed=seed)
        ensemble.fit(labelled, settings=RewardSettings(seed=10 * seed, progress=False))
        ensemble.normalise(drawn.prompts, drawn.responses)
        scores = ensemble.member_scores(*different).cpu()
        for method in ("one", "mean", "worst", "variance"):
            ensemble.aggregate = "mean" if method == "one" else method
            proxy = scores[0] if method == "one" else ensemble.combine(scores)
            curve = best_of_n_curve(proxy[where].view(prompts, samples), gold, [2**k for k in range(9)])
            rows += [
                {"seed": seed, "method": method, "n": r.n, "proxy": r.proxy, "gold": r.gold}
                for r in curve.itertuples()
            ]
            print(seed, method, curve.gold.round(3).tolist(), flush=True)
    facts = {
        "seeds": list(seeds),
        "pairs": pairs,
        "flips": flips,
        "members": members,
        "penalty": ensemble.penalty,
    }
    facts |= {"prompts": prompts, "samples": samples, "settings": RewardSettings()}
    return write_study(out, "reward_ensembles", pd.DataFrame(rows), **facts)


def distinct_texts(drawn: Rollout) -> tuple[list[str], list[str], torch.Tensor]:
    """Prompts and responses of every different pair, and where each row of `drawn` finds its own, (B,).

    A tiny model repeats itself: so every text is scored once.
    """
    texts = list(zip(drawn.prompts, drawn.responses, strict=True))
    place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    prompts, responses = map(list, zip(*place, strict=True))
    return prompts, responses, torch.tensor([place[text] for text in texts])


def _policy_samples(prompts: int, samples: int) -> Rollout:
    """`samples` answers of the tiny assistant to each of `prompts` held-out prompts."""
    assistant, tokenizer = load_model("tiny")
    asked = [p.text for p in random.Random(5).sample(load_prompts(CONVERSATION, "heldout"), prompts)]
    repeated = [text for text in asked for _ in range(samples)]
    return generate(assistant, tokenizer, repeated, max_new_tokens=64, seed=9)

"""Studies of lesson 1: how the labels and the kind of model decide how good a reward model is.

    python -m rlhf_helpers study NAME [--out FOLDER]
    NAME: annotator_pairs, pairs_and_noise, model_kinds, label_formats, label_budget, reward_ensembles

The lesson runs a small slice of a study live, with a seed that is not stored.
"""

import functools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from rlhf_helpers.core.generation import Rollout, generate
from rlhf_helpers.core.models import load_model
from rlhf_helpers.lab.studies.runner import Row, study
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

HELD_OUT_SEED = 20_000  # of the pairs on which every model of a study is judged


def agreement(
    model: Any, *, split: str = "heldout", pairs: int = 1000, seed: int = HELD_OUT_SEED
) -> Estimate:
    """Estimate the share of new pairs that `model` orders as gold does; pairs of equal gold are left out.

    Args:
        model: A reward model or any RewardFn.
        split: Prompts of the pairs.
        pairs: Number of pairs drawn.
        seed: Seed of the pairs.
    """
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
    """Train a reward model over the tiny assistant on `rows` with the default settings."""
    model = create_reward_model(kind, seed=seed, **options)
    RewardModelTrainer(model, seed=seed, progress=False).train(rows, objective=objective)
    return model


def noisy(flips: float) -> Annotator:
    """Make an annotator whose only errors are coin tosses, so that a share `flips` of labels is wrong."""
    return Annotator(f"{flips:.0%} flips", temperature=0.0, reliability=1 - 2 * flips)


def gold_means(prompts: Sequence[str], responses: Sequence[str]) -> dict[str, float]:
    """Average the gold judge's score of the answers on each axis."""
    return {axis: scores.mean().item() for axis, scores in gold_scores(prompts, responses).items()}


def prompt_texts(families: Sequence[str], split: str = "heldout") -> list[str]:
    """List the prompts of families of the world."""
    return [prompt.text for prompt in load_prompts(families, split)]


@study(settings=RewardSettings())
def annotator_pairs(seed: int, pairs: int = 2000) -> Iterator[Row]:
    """Measure a reward model trained on standard annotators, on seen and on held-out prompts.

    One training run per seed, judged on 2,000 new pairs of each split. Columns: seed, split, agreement with
    gold, low, high, n.
    """
    model = trained(make_pairs(pairs, seed=seed), seed=seed)
    for split in ("train", "heldout"):
        result = agreement(model, split=split, pairs=2000, seed=10_000 + seed)
        yield {
            "split": split,
            "agreement": result.value,
            "low": result.low,
            "high": result.high,
            "n": result.n,
        }


@study(settings=RewardSettings())
def pairs_and_noise(
    seed: int,
    sizes: Sequence[int] = (60, 125, 250, 500, 1000, 2000),
    flips: Sequence[float] = (0.0, 0.1, 0.25),
) -> Iterator[Row]:
    """Measure agreement with gold on held-out prompts by number of pairs and share of wrong labels.

    Larger sets of a seed contain the smaller ones. Columns: seed, flips, pairs, agreement.
    """
    for share in flips:
        # A slice with small sizes draws as many pairs as the whole study, so that it gets the same ones.
        rows = make_pairs(max(2000, *sizes), annotator=noisy(share), seed=seed)
        for size in sizes:
            model = trained(rows[:size], seed=seed)
            yield {"flips": share, "pairs": size, "agreement": agreement(model).value}


@study(settings=RewardSettings())
def model_kinds(seed: int, pairs: int = 1000) -> Iterator[Row]:
    """Compare the joint encoder, the separate encoder and several objectives on the same pairs.

    The multi-objective model learns each objective from one of three value groups and weights them 1/3 each;
    the other two learn from standard annotators. Columns: seed, kind, judged_by (gold, or one of its axes:
    then the multi-objective model answers with that objective alone), agreement on held-out prompts.
    """
    rows = make_pairs(pairs, seed=seed)
    people = dict(zip(AXES, VALUE_GROUPS.values(), strict=True))
    for kind in ("basic", "separate", "multi_objective"):
        labelled, options = rows, {}
        if kind == "multi_objective":
            labelled, options = label_objectives(rows, people, seed=seed), {"objectives": AXES}
        model = trained(labelled, seed=seed, kind=kind, **options)
        for judged_by, value in _agreement_by_axis(model).items():
            yield {"kind": kind, "judged_by": judged_by, "agreement": value}


def _agreement_by_axis(model: RewardModel) -> dict[str, float]:
    """Measure agreement with gold and with each of its axes, on held-out pairs that differ in it."""
    rows = make_pairs(1000, split="heldout", seed=HELD_OUT_SEED)
    prompts = [row["prompt"] for row in rows]
    sides = [[row[side] for row in rows] for side in ("chosen", "rejected")]
    gold = [gold_scores(prompts, side) | {"gold": gold_reward(prompts, side)} for side in sides]
    result = {}
    for name in ("gold", *AXES):
        if name != "gold" and isinstance(model, MultiObjectiveRewardModel):
            model.weights = [float(axis == name) for axis in AXES]
        rewards = [model.score(prompts, side).cpu() for side in sides]
        result[name] = gold_agreement(*rewards, gold[0][name], gold[1][name]).value
    return result


@study(settings=RewardSettings())
def label_formats(seed: int, prompts: int = 500) -> Iterator[Row]:
    """Compare comparisons, rankings and ratings of the same answers, four for each of `prompts` prompts.

    Two pairs, one ranking of four, or four ratings per prompt, so annotators read as many answers in each
    format. Columns: seed, format, agreement on held-out prompts.
    """
    sets = _answer_sets(prompts, seed)
    orders = collect_rankings(sets, [STANDARD], seed=seed)[:, 0]
    ratings = collect_ratings(sets, [STANDARD], seed=seed)[:, 0]
    ranked, rated = [], []
    for answers, order, marks in zip(sets, orders, ratings, strict=True):
        prompt, responses = answers["prompt"], answers["responses"]
        ranked.append({"prompt": prompt, "responses": [responses[i] for i in order]})
        for response, mark in zip(responses, marks, strict=True):
            # Ratings are centred at 0, where an untrained head starts.
            rated.append({"prompt": prompt, "response": response, "rating": float(mark) - 3})
    labels = {"pairwise": _compared(sets, seed), "ranking": ranked, "rating": rated}
    for objective, rows in labels.items():
        model = trained(rows, seed=seed, objective=objective)
        yield {"format": objective, "agreement": agreement(model).value}


def _answer_sets(prompts: int, seed: int) -> list[Row]:
    """Draw rows of prompt and responses: four different answers as the unaligned assistant writes them."""
    rng, sets = random.Random(f"sets/{seed}"), []
    known = load_prompts(CONVERSATION, "train")
    while len(sets) < prompts:
        prompt = rng.choice(known)
        answers = list({sample_answer(prompt, rng): None for _ in range(12)})[:4]
        if len(answers) == 4:
            sets.append({"prompt": prompt.text, "responses": answers})
    return sets


def _compared(sets: Sequence[Row], seed: int) -> list[Row]:
    """Make two standard comparisons per set: of the first two answers, and of the last two."""
    texts = [(s["prompt"], *s["responses"][i : i + 2]) for s in sets for i in (0, 2)]
    return compared(texts, STANDARD, seed=seed)


def compared(texts: Sequence[tuple[str, str, str]], annotator: Annotator, *, seed: int) -> list[Row]:
    """Turn (prompt, first, second) into rows of prompt, chosen and rejected, as the annotator prefers."""
    columns = ([text[i] for text in texts] for i in range(3))
    return [
        {"prompt": prompt, "chosen": first if won else second, "rejected": second if won else first}
        for (prompt, first, second), won in zip(texts, annotator.compare(*columns, seed=seed), strict=True)
    ]


@study(settings=RewardSettings())
def label_budget(seed: int, budget: int = 200, price: float = 0.1) -> Iterator[Row]:
    """Compare four ways to spend the cost of `budget` human labels; a model's label costs `price` of one.

    random: people label random pairs. active: half of them are random; the others are the pairs that a model
    trained on the first half is least sure of. assisted: people label the half that the language model is
    least sure of, and it labels as many others as the other half pays for. AI alone: the whole budget pays
    for the model's labels. Columns: seed, method, pairs, agreement on held-out prompts.
    """
    half = budget // 2
    pool = make_pairs(round(budget / price), seed=seed)
    questions = [{"prompt": r["prompt"], "first": r["chosen"], "second": r["rejected"]} for r in pool]
    chances = ai_labels(*load_model("tiny"), questions).numpy()
    by_model = [
        row if chance > 0.5 else {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
        for row, chance in zip(pool, chances, strict=True)
    ]
    chosen, rejected = score_pairs(trained(pool[:half], seed=seed), pool[half:])
    hard = [pool[half + i] for i in select_pairs((chosen - rejected).cpu().numpy(), half)]
    unsure = set(select_pairs(np.log(chances / (1 - chances)), half).tolist())
    others = [row for i, row in enumerate(by_model) if i not in unsure][: round(half / price)]
    labels = {
        "random": pool[:budget],
        "active": pool[:half] + hard,
        "assisted": [pool[i] for i in sorted(unsure)] + others,
        "AI alone": by_model,
    }
    for method, rows in labels.items():
        yield {
            "method": method,
            "pairs": len(rows),
            "agreement": agreement(trained(rows, seed=seed)).value,
        }


@study(settings=RewardSettings())
def reward_ensembles(
    seed: int,
    pairs: int = 1000,
    flips: float = 0.25,
    members: int = 4,
    penalty: float = 0.5,
    prompts: int = 60,
    samples: int = 256,
) -> Iterator[Row]:
    """Measure gold of best-of-n by one reward model and by ensembles, with wrong labels.

    The set-up of Coste et al. 2023: members differ in their head and in the order of the data; rewards are
    normalised on the policy's samples. All judge the same samples for held-out prompts. Columns: seed,
    method (one, mean, worst, variance), n, proxy, gold.
    """
    rollout, gold = _policy_samples(prompts, samples)
    *texts, index = distinct_texts(rollout)
    ensemble = create_reward_model("ensemble", seed=10 * seed, members=members, penalty=penalty)
    labelled = make_pairs(pairs, annotator=noisy(flips), seed=seed)
    ensemble.fit(labelled, settings=RewardSettings(seed=10 * seed, progress=False))
    ensemble.normalise(rollout.prompts, rollout.responses)
    scores = ensemble.member_scores(*texts).cpu()
    for method in ("one", "mean", "worst", "variance"):
        ensemble.aggregate = "mean" if method == "one" else method
        proxy = scores[0] if method == "one" else ensemble.combine(scores)
        curve = best_of_n_curve(proxy[index].view(prompts, samples), gold, [2**k for k in range(9)])
        for row in curve[["n", "proxy", "gold"]].to_dict("records"):
            yield {"method": method, **row}


def distinct_texts(rollout: Rollout) -> tuple[list[str], list[str], torch.Tensor]:
    """List every different pair of prompt and response once, since a tiny model repeats itself.

    Returns:
        Prompts, responses, and the index of each row of `rollout` in them, (B,).
    """
    texts = list(zip(rollout.prompts, rollout.responses, strict=True))
    index = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    prompts, responses = map(list, zip(*index, strict=True))
    return prompts, responses, torch.tensor([index[text] for text in texts])


@functools.lru_cache(maxsize=1)  # all seeds judge the same samples
def _policy_samples(prompts: int, samples: int) -> tuple[Rollout, torch.Tensor]:
    """Sample the tiny assistant's answers to held-out prompts; also return their gold, (prompts, samples)."""
    texts = random.Random(5).sample(prompt_texts(CONVERSATION), prompts)
    repeated = [text for text in texts for _ in range(samples)]
    rollout = generate(*load_model("tiny"), repeated, max_new_tokens=64, seed=9)
    return rollout, gold_reward(rollout.prompts, rollout.responses).view(prompts, samples)

"""Studies of lesson 1: how the labels and the kind of model decide how good a reward model is.

    python -m rlhf_helpers study NAME [--out FOLDER]
    NAME: pairs_and_noise, model_kinds, label_formats, label_budget, reward_ensembles, length_candidates,
    own_taste

The lesson runs a small slice of a study live, with a seed that is not stored.
"""

import functools
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from rlhf_helpers.alignment_eval.measuring import gold_axes
from rlhf_helpers.alignment_eval.safety import refuses
from rlhf_helpers.core.generation import Rollout, generate
from rlhf_helpers.core.models import RewardFn, load_model
from rlhf_helpers.lab.labeling.payoff import (
    decided,
    draw_pairs,
    follow_taste,
    learn_taste,
    polite_choices,
)
from rlhf_helpers.lab.studies.record import Row, Rows, study
from rlhf_helpers.policy_optimization import best_of_n_curve
from rlhf_helpers.preference_data import ai_labels, collect_rankings, collect_ratings, select_pairs
from rlhf_helpers.reward_model import (
    RewardEnsemble,
    RewardModel,
    RewardModelTrainer,
    RewardSettings,
    create_reward_model,
    gold_agreement,
    label_objectives,
    pair_credits,
    score_pairs,
)
from rlhf_helpers.world.annotators import (
    LENGTH_BIASED,
    STANDARD,
    VALUE_GROUPS,
    Annotator,
    label_pairs,
    make_pairs,
)
from rlhf_helpers.world.gold_judge import AXES, explain, gold_reward, gold_scores
from rlhf_helpers.world.prompts import CONVERSATION, load_prompts, prompt_texts, sample_answer

HELD_OUT_SEED = 20_000  # of the pairs on which every model of a study is judged
FLIPS = 0.25  # share of wrong labels where a reward model is to be poor
COUNTS = [2**k for k in range(9)]  # n of best-of-n


def agreement(model: RewardModel, judge: RewardFn = gold_reward, *, heldout: int = 1000) -> float:
    """Measure the share of `heldout` new pairs that `model` orders as `judge` does.

    The pairs are about held-out prompts; ties of the judge are left out.
    """
    rows = make_pairs(heldout, split="heldout", seed=HELD_OUT_SEED)
    return gold_agreement(*score_pairs(model, rows), *score_pairs(judge, rows)).value


def trained(rows: Sequence[Row], *, seed: int, objective: str = "pairwise", **options: Any) -> RewardModel:
    """Train a reward model over the tiny assistant on `rows`; options of `create_reward_model`."""
    model = create_reward_model(seed=seed, **options)
    RewardModelTrainer(model, seed=seed).train(rows, objective=objective)
    return model


def trained_ensemble(rows: Sequence[Row], rollout: Rollout, *, seed: int, **options: Any) -> RewardEnsemble:
    """Train an ensemble on `rows` and normalise its members on the policy's samples."""
    ensemble = create_reward_model("ensemble", seed=10 * seed, **options)
    ensemble.fit(rows, settings=RewardSettings(seed=10 * seed))
    ensemble.normalise(rollout.prompts, rollout.responses)
    return ensemble


def noisy(flips: float) -> Annotator:
    """Make an annotator whose only errors are coin tosses, so that a share `flips` of labels is wrong."""
    return Annotator(f"{flips:.0%} flips", temperature=0.0, reliability=1 - 2 * flips)


def aims(prompts: Sequence[str], responses: Sequence[str]) -> dict[str, float]:
    """Measure answers to prompts of the world by gold.

    Returns:
        Means of helpfulness, harmlessness and honesty; "refusal", the share of answers that contain one, and
        "refused", the share that contains one and nothing that was asked for.
    """
    read = [explain(*pair) for pair in zip(prompts, responses, strict=True)]
    measures = {
        **gold_scores(prompts, responses),
        "refusal": torch.tensor([any(role == "refusal" for _, role in roles) for roles in read]),
        "refused": refuses(prompts, responses),
    }
    return {name: values.float().mean().item() for name, values in measures.items()}


@study
def pairs_and_noise(
    seed: int,
    sizes: Sequence[int] = (60, 125, 250, 500, 1000, 2000),
    flips: Sequence[float] = (0.0, 0.1, 0.25),
) -> Rows:
    """Measure agreement with gold on held-out prompts by number of pairs and share of wrong labels.

    Larger sets of a seed contain the smaller ones. Columns: seed, flips, pairs, agreement.
    """
    for share in flips:
        # A slice with small sizes draws as many pairs as the whole study, so that it gets the same ones.
        rows = make_pairs(max(2000, *sizes), annotator=noisy(share), seed=seed)
        for size in sizes:
            model = trained(rows[:size], seed=seed)
            yield {"flips": share, "pairs": size, "agreement": agreement(model)}


@study
def model_kinds(seed: int, pairs: int = 1000, heldout: int = 1000) -> Rows:
    """Compare the joint encoder, the separate encoder and several objectives on the same pairs.

    The multi-objective model learns each objective from one of three value groups and weights them 1/3 each;
    the other two learn from standard annotators. Columns: seed, kind, judged_by (gold, or one of its axes:
    then the multi-objective model answers with that objective alone), agreement on held-out prompts.
    """
    rows = make_pairs(pairs, seed=seed)
    people = dict(zip(AXES, VALUE_GROUPS.values(), strict=True))
    labelled = label_objectives(rows, people, seed=seed)
    models = {
        "basic": trained(rows, seed=seed),
        "separate": trained(rows, seed=seed, kind="separate"),
        "multi_objective": trained(labelled, seed=seed, kind="multi_objective", objectives=AXES),
    }
    for kind, model in models.items():
        for judged_by, judge in {"gold": gold_reward, **gold_axes()}.items():
            if kind == "multi_objective" and judged_by in AXES:
                model.weights = {axis: float(axis == judged_by) for axis in AXES}
            yield {
                "kind": kind,
                "judged_by": judged_by,
                "agreement": agreement(model, judge, heldout=heldout),
            }


@study
def label_formats(seed: int, prompts: int = 500, heldout: int = 1000) -> Rows:
    """Compare comparisons, rankings and ratings of the same answers, four for each of `prompts` prompts.

    Two pairs, one ranking of four, or four ratings per prompt, so annotators read as many answers in each
    format. Columns: seed, format, agreement on held-out prompts.
    """
    sets = _answer_sets(prompts, seed)
    orders = collect_rankings(sets, [STANDARD], seed=seed)[:, 0]
    ratings = collect_ratings(sets, [STANDARD], seed=seed)[:, 0]
    pairs, ranked, rated = [], [], []
    for answers, order, marks in zip(sets, orders, ratings, strict=True):
        prompt, responses = answers["prompt"], answers["responses"]
        pairs += [(prompt, *responses[:2]), (prompt, *responses[2:])]
        ranked.append({"prompt": prompt, "responses": [responses[i] for i in order]})
        for response, mark in zip(responses, marks, strict=True):
            # Ratings are centred at 0, where an untrained head starts.
            rated.append({"prompt": prompt, "response": response, "rating": float(mark) - 3})
    labels = {"pairwise": label_pairs(pairs, STANDARD, seed=seed), "ranking": ranked, "rating": rated}
    for objective, rows in labels.items():
        model = trained(rows, seed=seed, objective=objective)
        yield {"format": objective, "agreement": agreement(model, heldout=heldout)}


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


@study
def label_budget(seed: int, budget: int = 200, price: float = 0.1, heldout: int = 1000) -> Rows:
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
        model = trained(rows, seed=seed)
        yield {"method": method, "pairs": len(rows), "agreement": agreement(model, heldout=heldout)}


@study
def reward_ensembles(
    seed: int, pairs: int = 1000, members: int = 4, prompts: int = 60, samples: int = 256
) -> Rows:
    """Measure gold of best-of-n by one reward model and by ensembles, with wrong labels.

    The set-up of Coste et al. 2023: members differ in their head and in the order of the data; rewards are
    normalised on the policy's samples. All judge the same samples for held-out prompts. Columns: seed,
    method (one, mean, worst, variance), n, proxy, gold.
    """
    asked = random.Random(5).sample(prompt_texts(CONVERSATION), prompts)
    rollout, gold = base_samples(tuple(asked), samples)
    labelled = make_pairs(pairs, annotator=noisy(FLIPS), seed=seed)
    ensemble = trained_ensemble(labelled, rollout, seed=seed, members=members)
    scores = scored_once(ensemble.member_scores, rollout)
    proxies = {"one": scores[0]}
    for method in ("mean", "worst", "variance"):
        ensemble.aggregate = method
        proxies[method] = ensemble.combine(scores)
    for method, proxy in proxies.items():
        curve = best_of_n_curve(proxy.view(gold.shape), gold, COUNTS)
        for row in curve[["n", "proxy", "gold"]].to_dict("records"):
            yield {"method": method, **row}


@functools.partial(study, seeds=(0, 1))
def length_candidates(seed: int, pairs: int = 800, prompts: int = 24, samples: int = 64) -> Rows:
    """Score sampled answers with a reward model that learned from a person who likes length.

    Lesson 1 measures a correction of the reward on them. Columns: seed, prompt (index), reward, words, gold.
    """
    asked = random.Random(6).sample(prompt_texts(CONVERSATION), prompts)
    rollout, gold = base_samples(tuple(asked), samples)
    model = trained(make_pairs(pairs, annotator=LENGTH_BIASED, seed=seed), seed=seed)
    columns = zip(
        rollout.responses, scored_once(model.score, rollout).tolist(), gold.flatten().tolist(), strict=True
    )
    for row, (response, reward, truth) in enumerate(columns):
        words = len(response.split())
        yield {"prompt": row // samples, "reward": reward, "words": words, "gold": truth}


@functools.partial(study, seeds=range(100, 105))
def own_taste(
    seed: int,
    labels: Sequence[int] = (15, 30, 60),
    follow: Sequence[int] = (15, 30),
    heldout: int = 500,
    steps: int = 20,
) -> Rows:
    """Measure how many labels of a scripted person, who likes short and friendly answers, teach that taste.

    Accuracy is the share of random pairs of different answers to held-out prompts that are ordered as the
    person orders them, ties left out. With as many labels as `follow` says, policies follow the reward model,
    RLOO for `steps`. Columns: seed, labels, who (reward model, shorter answer; or a policy), measure, value.
    """
    pairs = draw_pairs(2 * max(labels), seed=seed)
    # Pairs and seeds other than those on which the recipe of `learn_taste` was chosen.
    new_pairs = draw_pairs(heldout, split="heldout", closest=False, seed=HELD_OUT_SEED + 1)
    pool, tests = (decided(some, polite_choices(some)) for some in (pairs, new_pairs))
    for count in labels:
        model = learn_taste(pool[:count], least=count, seed=seed)
        judges = {
            "reward model": model.score,
            "shorter answer": lambda _, texts: torch.tensor([-len(t.split()) for t in texts]),
        }
        for who, judge in judges.items():
            chosen, rejected = score_pairs(judge, tests)
            value = pair_credits(chosen, rejected).mean().item()
            yield {"labels": count, "who": who, "measure": "accuracy", "value": value}
        if count in follow:
            means = follow_taste(model, steps=steps, seed=seed).groupby("policy", sort=False)
            for who, row in means[["words", "friendly", "rude", "gold"]].mean().iterrows():
                for measure, value in row.items():
                    yield {"labels": count, "who": who, "measure": measure, "value": value}


def scored_once(reward: Callable[..., torch.Tensor], rollout: Rollout) -> torch.Tensor:
    """Score each different pair of prompt and response once, since a tiny model repeats itself.

    Returns:
        The scores of all rows of `rollout`, (..., B), where `reward` returns (..., number of pairs).
    """
    texts = pd.Series(list(zip(rollout.prompts, rollout.responses, strict=True)))
    index, pairs = texts.factorize()
    return reward(*map(list, zip(*pairs, strict=True))).cpu()[..., index]


@functools.lru_cache(maxsize=1)  # all seeds judge the same samples
def base_samples(prompts: tuple[str, ...], samples: int) -> tuple[Rollout, torch.Tensor]:
    """Sample the tiny assistant's answers to prompts; also return their gold, (prompts, samples)."""
    repeated = [text for text in prompts for _ in range(samples)]
    rollout = generate(*load_model("tiny"), repeated, max_new_tokens=64, seed=9)
    return rollout, gold_reward(rollout.prompts, rollout.responses).view(-1, samples)

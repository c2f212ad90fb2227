"""What your labels teach: a reward model from a few dozen labels, and the answers that it leads to."""

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_helpers.core.models import load_encoder, load_model
from rlhf_helpers.lab.labeling.store import LabelStore
from rlhf_helpers.policy_optimization import RLOOSettings, best_of_n, rloo
from rlhf_helpers.reward_model import RewardModel, RewardModelTrainer
from rlhf_helpers.world.gold_judge import gold_reward
from rlhf_helpers.world.prompts import (
    CONVERSATION,
    load_prompts,
    prompt_texts,
    sample_answer,
    split_sentences,
)
from rlhf_helpers.world.prompts.base import FLATTERY, SENTENCES

MIN_LABELS = 15  # the smallest number in the study `own_taste` with which best-of-n and RLOO follow the taste
READINGS = 600  # pairs read in training, repeats included: with few labels more epochs, as many steps
FRIENDLY = (*SENTENCES["polite"], *SENTENCES["closer"])


class WordPoints(RewardModel):
    """Gives each token points, whatever stands around it: r(x, y) = sum over tokens of w . embedding.

    The tokens of the prompt add the same to all its answers, so they cancel in a comparison. With a few
    dozen labels, 128 weights on the assistant's token embeddings order more new pairs rightly than weights
    on its deeper states do.
    """

    def __init__(self) -> None:
        """Take the tiny assistant without its layers; no token has points before there are labels."""
        trunk, tokenizer = load_encoder("tiny")
        trunk.layers = trunk.layers[:0]
        super().__init__(trunk.requires_grad_(False), tokenizer, pooling="mean")
        torch.nn.init.zeros_(self.head.linear.weight)

    def _pool(self, hidden: Float[Tensor, "B T d"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B d"]:
        return torch.where(mask.unsqueeze(-1), hidden, 0.0).sum(1)  # a sum, so that length counts


def draw_pairs(
    count: int, *, split: str = "train", closest: bool = True, seed: int = 0
) -> list[dict[str, str]]:
    """Draw pairs (prompt, a, b) of answers as the unaligned assistant writes them.

    Of twelve answers to a prompt, the two are kept that differ in the fewest sentences: what a person chooses
    there says which sentence was liked, and two answers that differ in everything leave that open. Not
    `closest`: any two, as they come.
    """
    rng, pairs = random.Random(f"taste/{split}/{seed}"), []
    prompts = {family: load_prompts((family,), split) for family in CONVERSATION}
    while len(pairs) < count:
        prompt = rng.choice(prompts[rng.choice(CONVERSATION)])
        answers = list(dict.fromkeys(sample_answer(prompt, rng) for _ in range(12)))
        candidates = list(itertools.combinations(answers, 2))
        rng.shuffle(candidates)
        if candidates:
            a, b = min(candidates, key=_distance) if closest else candidates[0]
            pairs.append({"prompt": prompt.text, "a": a, "b": b})
    return pairs


def _distance(pair: tuple[str, str]) -> int:
    """Count the sentences that only one of the two answers has."""
    return len(set(split_sentences(pair[0])) ^ set(split_sentences(pair[1])))


def polite_choices(
    pairs: Sequence[Mapping[str, str]], *, temperature: float = 0.0, seed: int = 0
) -> list[str]:
    """Choose "a", "b" or "tie" of each pair, as a person who likes short and friendly answers.

    A friendly sentence is worth as much as six words less; a rude one costs as much.

    Args:
        pairs: Rows with prompt, a and b.
        temperature: Noise of the choices (Bradley-Terry), in words; 0: no errors.
        seed: Of the noise.
    """
    points = []
    for side in ("a", "b"):
        seen = traits([pair["prompt"] for pair in pairs], [pair[side] for pair in pairs])
        points.append((6 * (seen.friendly - seen.rude) - seen.words).to_numpy())
    noise = np.random.default_rng(seed).logistic(size=len(pairs))
    gaps = points[0] - points[1] + temperature * noise
    return ["a" if gap > 0 else "b" if gap < 0 else "tie" for gap in gaps]


def decided(pairs: Sequence[Mapping[str, str]], choices: Sequence[str]) -> list[dict[str, str]]:
    """Turn pairs (prompt, a, b) and their choices into rows of prompt, chosen and rejected, without ties."""
    other = {"a": "b", "b": "a"}
    return [
        {"prompt": pair["prompt"], "chosen": pair[choice], "rejected": pair[other[choice]]}
        for pair, choice in zip(pairs, choices, strict=True)
        if choice in other
    ]


def labels_in_use(rows: Sequence[Mapping[str, str]]) -> tuple[str, list[dict[str, str]]]:
    """Choose a person's labels once there are enough of them, and until then those of a scripted person.

    Args:
        rows: Pairs of a form (`Annotator.rows`).

    Returns:
        Whose labels they are, "you" or "scripted person", and rows of prompt, chosen and rejected.
    """
    own = [row for row in rows if row["by"] == "person"]
    labels = decided(own, [row["choice"] for row in own])
    if len(labels) >= MIN_LABELS:
        return "you", labels
    return "scripted person", decided(rows, polite_choices(rows))


def learn_taste(
    labels: LabelStore | Sequence[Mapping[str, Any]], *, least: int = MIN_LABELS, seed: int = 0
) -> WordPoints:
    """Train a reward model on labeled pairs.

    Args:
        labels: A store, or rows of prompt, chosen and rejected.
        least: How many decided pairs there must be; ties and skipped pairs do not count.
        seed: Of the order of the pairs.

    Raises:
        ValueError: There are fewer.
    """
    rows = labels.preferences() if isinstance(labels, LabelStore) else labels
    rows = [row for row in rows if "chosen" in row]
    if len(rows) < least:
        raise ValueError(
            f"a reward model of your own needs {least} decided pairs, got {len(rows)}: label more pairs "
            "(ties and skipped pairs do not count)"
        )
    model = WordPoints()
    trainer = RewardModelTrainer(model, learning_rate=3e-3, batch_size=8, seed=seed)
    trainer.train(rows, epochs=max(4, round(READINGS / len(rows))))
    return model


def follow_taste(
    reward_model: RewardModel, *, prompts: int = 60, n: int = 8, steps: int = 20, seed: int = 0
) -> pd.DataFrame:
    """Let the tiny assistant follow a reward: best of `n`, and `steps` of RLOO on training prompts.

    The first of the n samples stands for the starting policy, so all three answer the same held-out prompts.

    Args:
        reward_model: From `learn_taste`, or any other.
        prompts: How many held-out prompts are answered.
        n: Of best-of-n.
        steps: Of RLOO.
        seed: Of sampling and training.

    Returns:
        One row per answer: policy ("start", "best of 8", "RLOO") and the columns of `traits`.
    """
    policy, tokenizer = load_model("tiny")
    asked = random.Random(seed).sample(prompt_texts(CONVERSATION), prompts)
    best = best_of_n(policy, tokenizer, asked, reward_model, n=n, seed=seed)
    answers = {"start": [drawn[0] for drawn in best["all_responses"]], f"best of {n}": best["responses"]}
    # In units of the spread among answers to one prompt, so that the KL coefficient suits any reward.
    spread = best["all_rewards"].std(1).mean()
    settings = RLOOSettings(steps=steps, learning_rate=5e-4, seed=seed)
    training = prompt_texts(CONVERSATION, "train")
    rloo(policy, tokenizer, training, lambda *texts: reward_model.score(*texts) / spread, settings)
    answers["RLOO"] = best_of_n(policy, tokenizer, asked, reward_model, n=1, seed=seed + 1)["responses"]
    return pd.concat([traits(asked, texts).assign(policy=name) for name, texts in answers.items()])


def traits(prompts: Sequence[str], responses: Sequence[str]) -> pd.DataFrame:
    """Tabulate what people see in answers: words, friendly, compliment and rude (0 or 1), and gold."""
    parts = [set(split_sentences(response)) for response in responses]
    kinds = {"friendly": FRIENDLY, "compliment": FLATTERY, "rude": SENTENCES["rude"]}
    columns = {kind: [float(bool(own & set(texts))) for own in parts] for kind, texts in kinds.items()}
    return pd.DataFrame(
        {
            "prompt": prompts,
            "response": responses,
            "words": [len(response.split()) for response in responses],
            **columns,
            "gold": gold_reward(prompts, responses).tolist(),
        }
    )

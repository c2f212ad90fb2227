"""A reward model on SmolLM2-135M-Instruct, trained by LoRA on real preference pairs.

    python -m rlhf_helpers study real_reward_model --data FILE [--out FOLDER]

Of the pairs only aggregates are stored, never a text. The answers that are stored are the model's own.
"""

from functools import partial
from typing import Any

import torch

from rlhf_helpers.core.generation import generate
from rlhf_helpers.core.models import load_model
from rlhf_helpers.lab.studies.real_preferences import shorter_answer
from rlhf_helpers.lab.studies.record import Rows, study
from rlhf_helpers.preference_data import read_preferences, split_by_prompt
from rlhf_helpers.reward_model import (
    RewardModelTrainer,
    RewardSettings,
    accuracy,
    create_reward_model,
    pair_credits,
    paired_difference,
    reliability_curve,
    score_pairs,
)
from rlhf_helpers.world.prompts.base import REFUSALS
from rlhf_helpers.world.tables import load_table


@partial(study, seeds=(0,))
def real_reward_model(
    seed: int,
    data: Any = None,
    model_name: str = "smollm2",
    pairs: int = 240,
    heldout: int = 400,
    lora: int = 8,
    max_length: int = 256,
    questions: int = 8,
    samples: int = 4,
) -> Rows:
    """Train a reward model for one epoch, measure it on held-out pairs and rank the model's own answers.

    Columns: seed, part, name, value, low, high, n; of some parts also confidence, prompt and response.

    part "accuracy": of the reward model, of the rule that prefers
    the shorter answer, and the difference of the two on the same pairs. "calibration": one
    row per bin with the share of pairs that was right, the mean confidence and n. "answer": the reward
    (value) of the model's own answers to harmless questions, and of a refusal.
    """
    dataset, _ = read_preferences(data)
    train, test = (part.to_list() for part in split_by_prompt(dataset, test_fraction=0.5, seed=seed))
    test = test[:heldout]
    model = create_reward_model(base_model_name=model_name, lora=lora, max_length=max_length, seed=seed)
    settings = RewardSettings(epochs=1, batch_size=8, seed=seed)
    RewardModelTrainer(model, settings=settings).train(train[:pairs])

    rewards = score_pairs(model, test)
    credits, by_length = pair_credits(*rewards), shorter_answer([], test, seed=0)
    estimates = {
        "reward model": accuracy(credits),
        "shorter answer": accuracy(by_length),
        "reward model - shorter answer": paired_difference(credits, by_length),
    }
    for name, estimate in estimates.items():
        yield {"part": "accuracy", "name": name, **vars(estimate)}
    # Five bins: of ten, most would hold too few pairs to read.
    curve = reliability_curve(*rewards, bins=5).rename(columns={"frequency": "value"})
    yield from curve.assign(part="calibration").to_dict("records")

    prompts = load_table("real_model")["heldout"][:questions]
    policy, tokenizer = load_model(model_name, dtype=torch.float32)
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    answers = generate(policy, tokenizer, repeated, max_new_tokens=64, seed=seed).responses
    refusals = REFUSALS[:1] * len(prompts)
    for prompt, response in zip([*repeated, *prompts], [*answers, *refusals], strict=True):
        reward = model.score([prompt], [response]).item()
        yield {"part": "answer", "prompt": prompt, "response": response, "value": reward}

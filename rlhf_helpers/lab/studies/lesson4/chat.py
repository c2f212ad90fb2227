"""The chatbot of lesson 4: the effect of each stage, and three personalities, on held-out prompts."""

import random
from collections.abc import Sequence
from copy import copy
from typing import Any

import torch

from rlhf_helpers.chatbot_rlhf import (
    PERSONALITIES,
    AlignedChatbot,
    ChatbotTrainer,
    ChatSettings,
    evaluate_chatbot,
    memory_questions,
    with_history,
)
from rlhf_helpers.chatbot_rlhf.evaluation import BENIGN, DISALLOWED
from rlhf_helpers.core.models import to_messages
from rlhf_helpers.core.training import TrainingSettings
from rlhf_helpers.lab.studies.lesson1 import aims, trained
from rlhf_helpers.lab.studies.record import Row, Rows, study
from rlhf_helpers.policy_optimization import RLOOSettings
from rlhf_helpers.reward_model import RewardModel
from rlhf_helpers.world.annotators import make_pairs
from rlhf_helpers.world.prompts import CONVERSATION, best_answer, find_prompt, prompt_texts

# A large kl_coef: at 0.05 the policy moved more than ten nats towards what the learned reward misjudges.
SETTINGS = ChatSettings(
    sft=TrainingSettings(learning_rate=3e-4),
    policy=RLOOSettings(learning_rate=3e-4, prompts_per_step=16, samples_per_prompt=4, kl_coef=0.3),
)
FAMILIES = (*CONVERSATION, "dialogue", "dialogue")  # twice: a chatbot should remember


def conversations(n: int, *, seed: int) -> list[Row]:
    """Make n compared answers of standard annotators, every fourth one in a longer conversation.

    There the exchange of another pair stands before the last message: its prompt and its chosen answer.
    """
    rows, rng = make_pairs(n, families=FAMILIES, seed=seed), random.Random(f"conversations/{seed}")
    result = []
    for number, row in enumerate(rows):
        other = rng.choice(rows)
        if number % 4 == 0:
            said = [message["content"] for message in to_messages(other["prompt"])]
            row = {**row, "prompt": with_history(row["prompt"], [*said, other["chosen"]][:2])}
        result.append(row)
    return result


def memory_rows() -> list[Row]:
    """Questions about what was told earlier in a conversation, with the right answers.

    What was told is in the prompt, so the right answer needs no annotator. Half of the questions come right
    after it, half after another exchange; at most 120 of each.
    """
    rows = []
    for between in (0, 1):
        for prompt, asked in zip(*memory_questions("train", between=between, limit=120), strict=True):
            rows.append({"prompt": prompt, "completion": best_answer(find_prompt(asked))})
    return rows


def trained_reward(pairs: int, *, seed: int) -> RewardModel:
    """Train a Bradley-Terry model on comparisons by standard annotators, noise included, in conversations."""
    return trained(conversations(pairs, seed=50_000 + seed), seed=seed)


def plain(chatbot: AlignedChatbot) -> AlignedChatbot:
    """Copy a chatbot without its guard: it gives one answer, whatever it is."""
    bare = copy(chatbot)
    bare.sampling = chatbot.sampling | {"n": 1}
    bare.safety_threshold, bare.reward = 0.0, None
    bare.safety_fn = lambda prompts, *_, **__: torch.ones(len(prompts))
    return bare


@study
def chatbot(seed: int, pairs: int = 2000, rows: int = 480, **evaluation: Any) -> Rows:
    """Measure each stage: base, SFT, aligned (RLOO after SFT), guarded (best of 4 of that behind the guard).

    guarded base: the untrained model with the same reward and guard, to see what choosing does without
    training. Columns: seed, arm, measure, value, low, high, n: the rows of `evaluate_chatbot`, by gold on
    held-out prompts. The reward is learned from `pairs` noisy comparisons; gold trains nothing. SFT and RLOO
    also see `memory_rows`. evaluation: options of `evaluate_chatbot`.
    """
    data, reward = conversations(rows, seed=seed), trained_reward(pairs, seed=seed)
    imitating, guarded = AlignedChatbot("tiny"), AlignedChatbot("tiny", reward)
    answers, remembered = [{"prompt": r["prompt"], "response": r["chosen"]} for r in data], memory_rows()
    ChatbotTrainer(imitating, SETTINGS, seed=seed).train(answers + remembered)
    guarded.model.load_state_dict(imitating.model.state_dict())  # RLOO continues from SFT
    prompts = [row["prompt"] for row in data + remembered[::5]]
    ChatbotTrainer(guarded, SETTINGS, seed=seed).train(prompts)
    arms = {
        "base": plain(AlignedChatbot("tiny")),
        "sft": plain(imitating),
        "guarded base": AlignedChatbot("tiny", reward),
        "aligned": plain(guarded),
        "guarded": guarded,
    }
    for arm, bot in arms.items():
        table = evaluate_chatbot(bot, seed=seed, **evaluation).rename_axis("measure").reset_index()
        for row in table.to_dict("records"):
            yield {"arm": arm, **row}


@study
def personalities(
    seed: int,
    names: Sequence[str] = ("base", *PERSONALITIES),
    pairs: int = 2000,
    rows: int = 240,
    samples: int = 2,
) -> Rows:
    """Train one chatbot per personality on its objective, from the same base, data and learned reward.

    Columns: seed, personality (base: untrained), words (mean), helpfulness, harmlessness, over_refusal: by
    gold, of unguarded single answers to held-out prompts, `samples` for each.
    """
    prompts = [row["prompt"] for row in conversations(rows, seed=seed)]
    reward = trained_reward(pairs, seed=seed)
    for name in names:
        bot = AlignedChatbot("tiny", reward, personality=None if name == "base" else name)
        if name != "base":
            ChatbotTrainer(bot, SETTINGS, seed=seed).train(prompts)
        yield {"personality": name, **character(plain(bot), seed=seed, samples=samples)}


def character(bot: AlignedChatbot, *, seed: int, samples: int) -> dict[str, float]:
    """Measure words per answer, helpfulness and over_refusal (benign prompts), harmlessness (disallowed)."""
    answers = []
    for families in (BENIGN, DISALLOWED):
        prompts = [text for text in prompt_texts(families) for _ in range(samples)]
        results = bot.answer_batch([to_messages(prompt) for prompt in prompts], seed=seed)
        answers.append((prompts, [result.text for result in results]))
    benign, disallowed = (aims(*texts) for texts in answers)
    words = [len(text.split()) for text in answers[0][1]]
    return {
        "words": sum(words) / len(words),
        "helpfulness": benign["helpfulness"],
        "harmlessness": disallowed["harmlessness"],
        "over_refusal": benign["refused"],
    }

"""The chatbot of lesson 4: what each stage adds, and three personalities, on held-out prompts, by gold."""

import random
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from rlhf_helpers.alignment_eval import refuses
from rlhf_helpers.chatbot_rlhf import (
    PERSONALITIES,
    AlignedChatbot,
    ChatbotTrainer,
    ChatSettings,
    evaluate_chatbot,
    spoken,
)
from rlhf_helpers.chatbot_rlhf.evaluation import BENIGN, DISALLOWED
from rlhf_helpers.core.models import to_messages
from rlhf_helpers.core.training import TrainingSettings
from rlhf_helpers.lab.studies.lesson1 import SEEDS
from rlhf_helpers.lab.studies.record import write_study
from rlhf_helpers.policy_optimization import RLOOSettings
from rlhf_helpers.reward_model import RewardModel, RewardModelTrainer, create_reward_model
from rlhf_helpers.world.annotators import make_pairs
from rlhf_helpers.world.gold_judge import gold_scores
from rlhf_helpers.world.prompts import CONVERSATION, load_prompts

# A dear KL: at 0.05 the policy left by ten nats and more for what the learned reward misjudges.
SETTINGS = ChatSettings(
    sft=TrainingSettings(learning_rate=3e-4),
    policy=RLOOSettings(learning_rate=3e-4, prompts_per_step=16, samples_per_prompt=4, kl_coef=0.3),
)
FAMILIES = (*CONVERSATION, "dialogue", "dialogue")  # a chatbot is to remember: more of what needs it


def conversations(n: int, *, seed: int) -> list[dict[str, Any]]:
    """n compared answers of standard annotators (`make_pairs`), every fourth one in a longer conversation.

    There another pair's exchange stands before the last message: what was said and what was chosen.
    """
    rows, rng = make_pairs(n, families=FAMILIES, seed=seed), random.Random(f"conversations/{seed}")
    found = []
    for number, row in enumerate(rows):
        other = rng.choice(rows)
        before = [m["content"] for m in to_messages(other["prompt"])[:2]]
        before = before if len(before) == 2 else [*before, other["chosen"]]
        found.append(row if number % 4 else row | {"prompt": spoken(row["prompt"], before)})
    return found


def trained_reward(pairs: int, *, seed: int) -> RewardModel:
    """A Bradley-Terry model of what standard annotators, noise included, preferred in conversations."""
    model = create_reward_model("basic", seed=seed)
    RewardModelTrainer(model, seed=seed, progress=False).train(conversations(pairs, seed=50_000 + seed))
    return model


def plain(chatbot: AlignedChatbot) -> AlignedChatbot:
    """The same chatbot without its guard: one answer, whatever it is."""
    bare = copy(chatbot)
    bare.sampling = chatbot.sampling | {"n": 1}
    bare.safety_threshold, bare.safety_fn, bare.reward = 0.0, _all_pass, None
    return bare


def _all_pass(prompts: Sequence[str], *_responses: Sequence[str], **_columns: Any) -> torch.Tensor:
    return torch.ones(len(prompts))


def chatbot(
    out: str | Path | None = None, *, seeds: Sequence[int] = SEEDS, pairs: int = 2000, rows: int = 480
) -> pd.DataFrame:
    """What each stage adds: base, SFT, aligned (RLOO after SFT), guarded: best of 4 of that behind the guard.

    guarded base: the untrained model with the same reward and guard: what choosing does without training.
    Columns: seed, arm, measure, value, low, high, n: the rows of `evaluate_chatbot`, by gold on held-out
    prompts. The reward is learned from `pairs` noisy comparisons; gold trains nothing.
    """
    found = []
    for seed in seeds:
        data, reward = conversations(rows, seed=seed), trained_reward(pairs, seed=seed)
        imitating, guarded = AlignedChatbot("tiny"), AlignedChatbot("tiny", reward)
        answers = [{"prompt": row["prompt"], "response": row["chosen"]} for row in data]
        ChatbotTrainer(imitating, SETTINGS, seed=seed, progress=False).train(answers)
        guarded.model.load_state_dict(imitating.model.state_dict())
        trainer = ChatbotTrainer(guarded, SETTINGS, seed=seed, progress=False)
        trainer.train([row["prompt"] for row in data])  # the model that imitates goes on
        arms = {"base": plain(AlignedChatbot("tiny")), "sft": plain(imitating)}
        arms |= {"guarded base": AlignedChatbot("tiny", reward)}
        arms |= {"aligned": plain(guarded), "guarded": guarded}
        for arm, bot in arms.items():
            found += _rows(bot, seed, arm=arm)
            if out:
                print({r["measure"]: round(r["value"], 3) for r in found[-9:]} | {"arm": arm}, flush=True)
    facts = {"seeds": list(seeds), "pairs": pairs, "rows": rows, "settings": SETTINGS}
    return write_study(out, "chatbot", pd.DataFrame(found), **facts)


def personalities(
    out: str | Path | None = None, *, seeds: Sequence[int] = SEEDS, pairs: int = 2000, rows: int = 240
) -> pd.DataFrame:
    """One chatbot a personality, trained on its objective from the same base, data and learned reward.

    Columns: seed, personality (base: untrained), words (mean), helpfulness, harmlessness, over_refusal: by
    gold, of unguarded single answers to held-out prompts.
    """
    found = []
    for seed in seeds:
        data, reward = conversations(rows, seed=seed), trained_reward(pairs, seed=seed)
        for name in ("base", *PERSONALITIES):
            bot = AlignedChatbot("tiny", reward, personality=None if name == "base" else name)
            if name != "base":
                ChatbotTrainer(bot, SETTINGS, seed=seed, progress=False).train([r["prompt"] for r in data])
            found.append({"seed": seed, "personality": name} | character(plain(bot), seed=seed))
            if out:
                print(found[-1], flush=True)
    facts = {"seeds": list(seeds), "pairs": pairs, "rows": rows, "settings": SETTINGS}
    return write_study(out, "personalities", pd.DataFrame(found), **facts)


def character(bot: AlignedChatbot, *, seed: int, samples: int = 2) -> dict[str, float]:
    """Words an answer, gold helpfulness (benign prompts), harmlessness (disallowed), share over-refused."""
    measured = {}
    for kind, families in (("benign", BENIGN), ("disallowed", DISALLOWED)):
        asked = [p.text for p in load_prompts(families, "heldout") for _ in range(samples)]
        said = [r.text for r in bot.answer_batch([to_messages(p) for p in asked], seed=seed)]
        gold = gold_scores(asked, said)
        if kind == "benign":
            words = sum(len(text.split()) for text in said) / len(said)
            refused = refuses(asked, said).double().mean().item()
            measured |= {"words": words, "helpfulness": gold["helpfulness"].mean().item()}
        else:
            measured |= {"harmlessness": gold["harmlessness"].mean().item()}
    return measured | {"over_refusal": refused}


def _rows(bot: AlignedChatbot, seed: int, **named: Any) -> list[dict[str, Any]]:
    table = evaluate_chatbot(bot, seed=seed).rename_axis("measure").reset_index()
    return [{"seed": seed, **named, **row} for row in table.to_dict("records")]

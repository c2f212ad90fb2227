"""From conversations and thumbs to a better chatbot: imitation, then a policy stage, then the thumbs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rlhf_helpers.chatbot_rlhf.chatbot import AlignedChatbot
from rlhf_helpers.core.generation import generate
from rlhf_helpers.core.models import frozen_copy, to_messages, to_text
from rlhf_helpers.core.tensors import require_number
from rlhf_helpers.core.text import naming
from rlhf_helpers.core.training import History, TrainingSettings, sft
from rlhf_helpers.dpo import DPOSettings, DPOTrainer
from rlhf_helpers.policy_optimization import RLOOSettings, rloo
from rlhf_helpers.reward_model import normalise_reward

ANSWERS = ("chosen", "response", "completion")
Conversation = str | Mapping[str, Any]


@dataclass(frozen=True)
class ChatSettings:
    """Settings of each stage, for the tiny assistant; their own numbers of steps and epochs are not used."""

    sft: TrainingSettings = field(default_factory=lambda: TrainingSettings(tiny_learning_rate=3e-4))
    policy: RLOOSettings = field(default_factory=lambda: RLOOSettings(tiny_learning_rate=1e-3))
    pairs: DPOSettings = field(default_factory=DPOSettings)
    thumbs: DPOSettings = field(default_factory=lambda: DPOSettings(loss="kto", beta=0.1))
    sft_batch_size: int = 16


class ChatbotTrainer:
    """Trains `chatbot.model`, the chatbot's own copy; the model it was made from is not changed.

    What the data hold decides the stages, each num_epochs long, one after the other:
        sft      where there are good answers: imitate them
        policy   where the chatbot has a reward: RLOO on its own answers to all prompts. Reward: the
                 personality's objective of the learned reward, scaled to mean 0 and std 1 on the chatbot's
                 samples, and P(safe); KL to the model after sft at settings.policy.kl_coef
        pairs    where it has none: DPO on chosen against rejected
        thumbs   where people gave thumbs: KTO

    settings: `ChatSettings`; changes (learning_rate, seed, progress, ...): of every stage. Ouyang et al.
    2022; Ethayarajh et al. 2024. Lesson 4.
    """

    def __init__(self, chatbot: AlignedChatbot, settings: ChatSettings | None = None, **changes: Any) -> None:
        """Take the chatbot; TypeError for a keyword that is not a field of `TrainingSettings`."""
        settings = settings or ChatSettings()
        stages = ("sft", "policy", "pairs", "thumbs")
        changed = {stage: replace(getattr(settings, stage), **changes) for stage in stages}
        self.chatbot, self.settings = chatbot, replace(settings, **changed)
        self.histories: dict[str, History] = {}

    def train(self, conversation_data: Iterable[Conversation] = (), num_epochs: int = 1) -> History:
        """Run one round of the stages that the data call for.

        conversation_data: prompts as text, or rows with prompt and response, prompt, chosen and rejected, or
        messages (an assistant's last: the good answer; a user's last: a prompt); and thumbs, rows of prompt,
        completion and label (true: up), such as `lab.chat.thumb_rows` gives. Prompts in the flat form of
        `core.text` are conversations; what the context does not hold is dropped from their beginning.

        Thumbs on a single prompt are left out, because KTO compares prompts.

        Returns:
            One row per epoch: means of that pass of each stage, named stage/metric (policy/objective/scores),
            and how many thumbs it learned from. All steps: `.histories`.

        Raises:
            ValueError: a row is faulty, or there is nothing to learn from.
        """
        require_number("num_epochs", num_epochs, at_least=1)
        given = self._read(conversation_data)
        thumbs = [row for row in given if "label" in row]
        thumbs = thumbs if len({row["prompt"] for row in thumbs}) > 1 else []
        rows = [row for row in given if "label" not in row]
        answers = [row for row in rows if "completion" in row]
        pairs = [row | {"chosen": row["completion"]} for row in answers if "rejected" in row]
        asked = list(dict.fromkeys(row["prompt"] for row in rows))
        rewarded = bool(asked) and self.chatbot.reward is not None
        if not (answers or rewarded or thumbs):
            raise ValueError(
                "nothing to learn from: give answers, prompts to a chatbot with a reward, or thumbs"
            )
        model, tokenizer, found = self.chatbot.model, self.chatbot.tokenizer, {}
        if answers:
            options = {"epochs": num_epochs, "batch_size": self.settings.sft_batch_size}
            found["sft"] = sft(model, tokenizer, answers, self.settings.sft, **options)
        if rewarded:
            found["policy"] = self._reinforce(asked, num_epochs)
        elif pairs:
            found["pairs"] = self._prefer(pairs, self.settings.pairs, num_epochs)
        if thumbs:
            found["thumbs"] = self._prefer(thumbs, self.settings.thumbs, num_epochs)
        self.histories = found
        return _by_epoch(found, num_epochs, {"thumbs": len(thumbs)})

    def _reinforce(self, asked: list[str], epochs: int) -> History:
        bot, policy = self.chatbot, self.settings.policy
        group = min(policy.prompts_per_step, len(asked))
        policy = replace(policy, prompts_per_step=group, steps=epochs * -(-len(asked) // group))
        sampling = {"max_new_tokens": policy.max_new_tokens, "temperature": policy.temperature}
        sample = (asked * max(1, -(-64 // len(asked))))[:512]  # so many answers that the scale is known
        said = generate(bot.model, bot.tokenizer, sample, seed=policy.seed, **sampling).responses
        bot.reward = normalise_reward(bot.reward, sample, said)
        reward = bot.personality.objective(bot.reward, bot.safety_fn, bot.safety_threshold)
        # Given, since with LoRA the default would be the model before its adapters learned from sft.
        return rloo(bot.model, bot.tokenizer, asked, reward, policy, ref_model=frozen_copy(bot.model))

    def _prefer(self, rows: list[dict[str, Any]], settings: DPOSettings, epochs: int) -> History:
        model = self.chatbot.model
        trainer = DPOTrainer(model, frozen_copy(model), self.chatbot.tokenizer, settings=settings)
        return trainer.train(rows, epochs=epochs)

    def _read(self, data: Iterable[Conversation]) -> list[dict[str, Any]]:
        """Read rows of prompt[, completion[, rejected or label]], each prompt as the chatbot would get it."""
        if isinstance(data, str | Mapping):
            raise ValueError(f"conversation_data must be a list of conversations, got {type(data).__name__}")
        rows, room = [], self.settings.policy.max_new_tokens
        for number, given in enumerate(data):
            with naming(f"conversation_data[{number}]"):
                row = _parts(given)
                messages = to_messages(row["prompt"])
                rows.append(row | {"prompt": self.chatbot.prompt_of(messages, max_new_tokens=room)})
        return rows


def _parts(given: Conversation) -> dict[str, Any]:
    """One conversation as prompt[, completion[, rejected or label]]."""
    if isinstance(given, str):
        row = {"prompt": given}
    elif isinstance(given, Mapping) and given.get("messages"):
        *messages, last = given["messages"]
        if last.get("role") == "assistant":
            row = {"prompt": to_text(messages), "completion": last["content"]}
        else:
            row = {"prompt": to_text([*messages, last])}
    elif isinstance(given, Mapping) and "prompt" in given:
        row = {"prompt": given["prompt"]}
        answers = [given[name] for name in ANSWERS if name in given]
        if answers:
            row["completion"] = answers[0]
        if "chosen" in given and "rejected" in given:
            row["rejected"] = given["rejected"]
    else:
        raise ValueError(f"give text, messages, or prompt with response or chosen; got {str(given)[:80]}")
    if bad := [name for name, text in row.items() if not isinstance(text, str) or not text.strip()]:
        raise ValueError(f"{bad[0]} must be a text that is not empty, got {row[bad[0]]!r}")
    if isinstance(given, Mapping) and "label" in given:
        if not isinstance(given["label"], bool):
            raise ValueError(f"label must be True (a thumb up) or False, got {given['label']!r}")
        if "completion" not in row or "rejected" in row:
            raise ValueError("a row with label needs prompt and completion, and no rejected answer")
        row["label"] = given["label"]
    return row


def _by_epoch(stages: Mapping[str, History], epochs: int, facts: Mapping[str, int]) -> History:
    """Make one row per epoch: means of its share of each stage's steps."""
    history = History({"epoch": epoch + 1, **facts} for epoch in range(epochs))
    for stage, steps in stages.items():
        for row, part in zip(history, np.array_split(range(len(steps)), epochs), strict=True):
            means = History([steps[i] for i in part]).to_frame().mean().drop("step", errors="ignore")
            row |= means.add_prefix(f"{stage}/").to_dict()
    return history

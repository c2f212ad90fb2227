"""A chatbot that remembers, and chooses the best of its safe answers."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_helpers.core.models import (
    RewardFn,
    as_reward_fn,
    encode_prompt,
    load_model,
    to_messages,
    to_text,
    tokenizer_for,
    usable_positions,
)
from rlhf_helpers.core.tensors import require_number
from rlhf_helpers.core.text import Message, naming
from rlhf_helpers.guards import Guard, GuardRecord, measured_check

FALLBACK = "I cannot help with that."


@dataclass(frozen=True)
class Personality:
    """An alignment objective: what an answer is worth, in standard deviations of the learned reward.

    r = reward z - length max(0, words - limit) - safety [P(safe) < threshold]

    z: the learned reward; `rank` orders answers that are safe, `objective` trains. Raises ValueError for a
    number below 0, or a threshold above 1. Lesson 4.
    """

    reward: float = 1.0
    length: float = 0.0  # for each word above the limit
    limit: float = 0.0  # words
    safety: float = 2.0
    threshold: float | None = None  # None: the chatbot's

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("reward", "length", "limit", "safety"):
            require_number(f"Personality.{name}", getattr(self, name), at_least=0)
        require_number("Personality.threshold", self.threshold or 0.0, at_least=0, at_most=1)

    def rank(self, reward: RewardFn) -> RewardFn:
        """The first two terms: (prompts, responses) -> (B,)."""

        def ranking(prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> Tensor:
            extra = torch.tensor([max(0.0, len(text.split()) - self.limit) for text in responses])
            learned = reward(prompts, responses, **columns)
            return self.reward * learned - self.length * extra.to(learned.device)

        return ranking

    def objective(self, reward: RewardFn, safety_fn: RewardFn, threshold: float) -> RewardFn:
        """All three terms; P(safe) by safety_fn, against the personality's own threshold if it has one."""
        rank, least = self.rank(reward), threshold if self.threshold is None else self.threshold

        def value(prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> Tensor:
            worth = rank(prompts, responses, **columns)
            unsafe = safety_fn(prompts, responses, **columns) < least
            return worth - self.safety * unsafe.to(worth)

        return value


PERSONALITIES = {
    "helpful": Personality(),
    "concise": Personality(length=0.2, limit=8),
    "cautious": Personality(reward=0.5, safety=4.0, threshold=0.95),
}


class _OneTurn(Guard):
    """A guard whose answers end where a model starts to write the user's next message."""

    def _sample(self, asked: list[str]) -> list[str]:
        return [to_messages(f"Assistant: {text}")[0]["content"] for text in super()._sample(asked)]


class AlignedChatbot:
    """Talks: remembers the conversation, samples n answers, shows the best of those that are safe.

    >>> chatbot = AlignedChatbot("tiny", reward_model, safety_threshold=0.7)  # doctest: +SKIP
    >>> chatbot.generate_response("What is the capital of France?")  # doctest: +SKIP

    base_model: a model or what `load_model` takes. It stays as it is: `.model`, which answers and is trained,
    is a copy. reward_model: an nn.Module with `score`, or a RewardFn; it ranks, and does not judge safety:
    None ranks by safety. safety_fn: P(safe), None: `guards.measured_check(base_model)`, the untrained model's
    own word, with a warning where it may be a guess. No answer with P(safe) < safety_threshold is shown, nor
    an empty one; where none is left, the fallback. A check or reward that fails on an answer rules it out;
    the reply's `error` says how.
    personality: a name of PERSONALITIES or a `Personality`. seed: the same calls in the same order give the
    same answers; None: torch's generator. People's thumbs are kept by `lab.chat.SideBySide`. Lesson 4. Raises
    ValueError for a setting out of range, or an empty fallback.
    """

    def __init__(
        self,
        base_model: str | Path | nn.Module,
        reward_model: nn.Module | RewardFn | None = None,
        safety_threshold: float = 0.5,
        *,
        safety_fn: RewardFn | None = None,
        n: int = 4,
        personality: str | Personality | None = None,
        fallback: str = FALLBACK,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        seed: int | None = 0,
    ) -> None:
        """Load or copy the model."""
        self.base = base_model if isinstance(base_model, nn.Module) else load_model(base_model)[0]
        self.tokenizer = tokenizer_for(self.base)
        self.model = copy.deepcopy(self.base, {id(self.tokenizer): self.tokenizer})
        if isinstance(personality, str) and personality not in PERSONALITIES:
            raise ValueError(f"personality must be one of {list(PERSONALITIES)}, got {personality!r}")
        self.personality = PERSONALITIES.get(personality, personality) or Personality()
        self.reward = None if reward_model is None else as_reward_fn(reward_model)
        self.safety_fn = safety_fn or measured_check(self.base)
        require_number("safety_threshold", safety_threshold, at_least=0, at_most=1)
        require_number("n", n, at_least=1)
        if not fallback.strip():
            raise ValueError("fallback is empty: a user should be told something")
        self.sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "n": n}
        self.safety_threshold, self.fallback, self.seed = safety_threshold, fallback, seed
        self.history: list[Message] = []
        self.replies: list[GuardRecord] = []
        self._calls = 0

    def generate_response(self, text: str) -> str:
        """Answer the user's next message and remember both; what cannot be answered is not remembered."""
        asked = [*self.history, {"role": "user", "content": text}]
        reply = self.answer_batch([asked])[0]
        self.history = [*asked, {"role": "assistant", "content": reply.text}]
        self.replies.append(reply)
        return reply.text

    def answer_batch(self, conversations: Sequence[Sequence[Message]], **changes: Any) -> list[GuardRecord]:
        """Answer the last message of each conversation, all together; `history` is not read.

        A conversation is a list of {"role", "content"}: perhaps a system message, then user and assistant in
        turn, the user last. changes: n, max_new_tokens, temperature, seed of this call. Raises ValueError
        that names the conversation where it has another form, or its last message does not fit the context.
        """
        seed = None if self.seed is None else self.seed + self._calls
        sampling = {**self.sampling, "seed": seed, **changes}
        prompts = []
        for number, conversation in enumerate(conversations):
            with naming(f"conversation {number}"):
                prompts.append(self.prompt_of(conversation, max_new_tokens=sampling["max_new_tokens"]))
        guard = _OneTurn(
            model=self.model,
            output_fn=self._p_safe,
            reward_fn=None if self.reward is None else self.personality.rank(self.reward),
            threshold=self.safety_threshold,
            fallback=self.fallback,
            **sampling,
        )
        replies = guard.answer_batch(prompts)
        self._calls += 1
        return replies

    def prompt_of(self, conversation: Sequence[Message], *, max_new_tokens: int | None = None) -> str:
        """The text that the model is asked with, so much of the end of the conversation as its context takes.

        The system message, if there is one, always stays. Raises ValueError as `answer_batch`.
        """
        messages = list(conversation)
        roles = [message.get("role") for message in messages]
        start = 1 if roles[:1] == ["system"] else 0
        system, turns = messages[:start], messages[start:]
        in_turn = ["user", "assistant"] * len(turns)
        if len(turns) % 2 == 0 or roles[start:] != in_turn[: len(turns)]:
            raise ValueError(
                f"messages must go user, assistant, ..., user (a system first or none), got {roles}"
            )
        # Alone such a message could be written; in the history of the next question it could not.
        if any(len(to_messages(f"User: {message['content']}")) > 1 for message in messages):
            raise ValueError("a message holds a role label after a blank line: it would be read as several")
        if not turns[-1]["content"].strip():
            raise ValueError("the last message is empty: write something")
        context = usable_positions(self.model)
        if context is None:
            return to_text(messages)
        room = context - (max_new_tokens or self.sampling["max_new_tokens"])
        # From the last message back, one exchange more each time, until no more fits, whatever the chat
        # template adds. So a long conversation costs no more than what fits of it.
        fitting = None
        for first in range(len(turns) - 1, -1, -2):
            text = to_text([*system, *turns[first:]])
            length = len(encode_prompt(self.tokenizer, text))
            if length > room:
                break
            fitting = text
        if fitting is None:
            raise ValueError(f"the last message has {length} tokens and {room} fit: shorten it")
        return fitting

    def _p_safe(self, prompts: list[str], responses: list[str], **columns: Any) -> Tensor:
        """P(safe) by safety_fn; 0 for an empty answer, which is none."""
        found = torch.as_tensor(self.safety_fn(prompts, responses, **columns))
        said = torch.tensor([bool(text.strip()) for text in responses], device=found.device)
        return found * said if found.shape == said.shape else found

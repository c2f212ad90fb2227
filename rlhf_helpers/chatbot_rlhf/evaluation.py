"""How good is a chatbot? Against the base, on what it must not do, what it must do, and what it was told."""

import itertools
from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from rlhf_helpers.alignment_eval.safety import refuses
from rlhf_helpers.chatbot_rlhf.chatbot import AlignedChatbot
from rlhf_helpers.core.generation import generate
from rlhf_helpers.core.models import RewardFn, to_messages, to_text
from rlhf_helpers.core.stats import Estimate, score_interval, to_frame, win_rate
from rlhf_helpers.core.tensors import require_number
from rlhf_helpers.guards import GuardRecord
from rlhf_helpers.world.gold_judge import explain, gold_reward, gold_scores
from rlhf_helpers.world.prompts import CONVERSATION, best_answer, load_prompts, prompt_texts

DISALLOWED = ("harmful", "privacy")
BENIGN = ("howto", "lookalike", "explain", "facts")
OPEN_TO_ALL = tuple(family for family in CONVERSATION if family not in (*DISALLOWED, "jailbreak"))


def with_history(conversation: str, before: Sequence[str] = (), *, at: int = -1) -> str:
    """A conversation in the flat form, with more messages (user, assistant, ...) put before its last one.

    at: the index of the message before which they are put; 0 puts them at the beginning.
    """
    messages = to_messages(conversation)
    roles = itertools.cycle(("user", "assistant"))
    added = [{"role": role, "content": text} for role, text in zip(roles, before, strict=False)]
    return to_text([*messages[:at], *added, *messages[at:]])


def memory_questions(
    split: str = "heldout", *, between: int = 0, limit: int = 60
) -> tuple[list[str], list[str]]:
    """Conversations whose last question needs an earlier turn, and the world's prompts they are judged as.

    A question about a fact of the world, with its answer, begins each of them.

    Args:
        split: "train" or "heldout", of what is told and of the facts.
        between: If not 0, so many of these exchanges stand between what was told and the question instead.
        limit: At most so many conversations.
    """
    facts = [(prompt.text, best_answer(prompt)) for prompt in load_prompts(("facts",), split)]
    pairs = []
    for prompt, start in itertools.product(load_prompts(("dialogue",), split), range(len(facts))):
        exchanges = [facts[(start + i) % len(facts)] for i in range(between or 1)]
        said = list(itertools.chain(*exchanges))
        pairs.append((with_history(prompt.text, said, at=-1 if between else 0), prompt.text))
    pairs = pairs[:: -(-len(pairs) // limit)]
    return [text for text, _ in pairs], [original for _, original in pairs]


def evaluate_chatbot(
    chatbot: AlignedChatbot,
    prompts: Sequence[str] | None = None,
    judge: RewardFn = gold_reward,
    *,
    samples: int = 2,
    seed: int = 0,
) -> pd.DataFrame:
    """Measure a chatbot by `samples` answers per prompt: value, low, high (95 %), n (prompts) per measure.

    win_rate: against its untrained model, unguarded, by the judge's mean score of a prompt's answers, a tie
    one half; score: that mean; closed: share of answers that the guard replaced. With prompts of your own
    these alone; without, on the world's held-out conversation, and further, all by gold, which is for
    measuring only:
    compliance: share of answers that do what should be refused (harmful, privacy: lower is better),
    jailbreak: the same under attack; over_refusal: of benign requests refused (lower); recall: of questions
    about what was told in the turn before that are answered rightly, recall_later: with an exchange between.

    Lesson 4. Raises ValueError for samples < 1, and what the chatbot and the judge raise.
    """
    require_number("samples", samples, at_least=1)
    asked = prompt_texts(OPEN_TO_ALL + DISALLOWED) if prompts is None else prompts
    repeated = [prompt for prompt in asked for _ in range(samples)]
    replies = _replies(chatbot, repeated, seed)
    options = {"max_new_tokens": chatbot.sampling["max_new_tokens"], "seed": seed}
    base = generate(chatbot.base, chatbot.tokenizer, repeated, **options).responses
    mine = _by_prompt(judge(repeated, [reply.text for reply in replies]), samples)
    won = win_rate(mine, _by_prompt(judge(repeated, base), samples))
    rows = {"win_rate": won.estimate, "score": score_interval(mine)}
    rows["closed"] = score_interval(_by_prompt([not reply.allowed for reply in replies], samples))
    if prompts is None:
        rows |= _of_the_world(chatbot, samples, seed)
    return to_frame(rows)


def _replies(chatbot: AlignedChatbot, prompts: Sequence[str], seed: int) -> list[GuardRecord]:
    """Answer each prompt as a conversation of its own."""
    return chatbot.answer_batch([to_messages(prompt) for prompt in prompts], seed=seed)


def _by_prompt(values: Tensor | list[bool], samples: int) -> Tensor:
    """Mean over the samples of each prompt, which stand together."""
    return torch.as_tensor(values).double().view(-1, samples).mean(-1)


def _of_the_world(chatbot: AlignedChatbot, samples: int, seed: int) -> dict[str, Estimate]:
    """Measure shares of answers by gold; a case is (prompts, judged as, what is true, samples per prompt)."""
    disallowed, attacks, benign = map(prompt_texts, (DISALLOWED, ("jailbreak",), BENIGN))
    cases = {
        "compliance": (disallowed, disallowed, _complies, 4 * samples),
        "jailbreak": (attacks, attacks, _complies, 1),
        "over_refusal": (benign, benign, refuses, samples),
        "recall": (*memory_questions(), told_rightly, samples),
        "recall_later": (*memory_questions(between=1), told_rightly, samples),
    }
    rows = {}
    for name, (prompts, judged_as, happens, count) in cases.items():
        replies = _replies(chatbot, [prompt for prompt in prompts for _ in range(count)], seed)
        repeated = [prompt for prompt in judged_as for _ in range(count)]
        rows[name] = score_interval(_by_prompt(happens(repeated, [reply.text for reply in replies]), count))
    return rows


def _complies(prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
    return gold_scores(prompts, responses)["harmlessness"] == 0


def told_rightly(prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
    """Whether the answer says what was told, and nothing false."""
    roles = [{role for _, role in explain(*both)} for both in zip(prompts, responses, strict=True)]
    return torch.tensor(["point0" in said and "wrong" not in said for said in roles])

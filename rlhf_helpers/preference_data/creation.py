"""Preference pairs made to order: answers of known quality levels to any prompts, compared."""

import random
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset

from rlhf_helpers.core.text import to_messages
from rlhf_helpers.preference_data.tidying import Row
from rlhf_helpers.world.prompts import CONVERSATION, known_prompt, prompt_texts, sample_answer
from rlhf_helpers.world.tables import load_table

LEVELS = ("high", "medium", "low")  # the best first
# The answer to a prompt from outside the world is unknown here, so no level claims to give it: the levels
# differ in how useful they are.
_GENERIC = load_table("world/generic_answers")
_DRAWS = 100  # before a prompt is held to have one answer only


class PreferenceDataset(list[Row], Dataset):
    """Compared pairs as a map-style `torch.utils.data.Dataset`: a list of dicts, so [a:b] is one as well.

    Raises ValueError, naming the row, where one lacks prompt, chosen or rejected. Lesson 1.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Keep copies of `rows`: dicts with prompt, chosen, rejected and any further columns."""
        super().__init__(dict(row) for row in rows)
        for i, row in enumerate(self):
            if missing := {"prompt", "chosen", "rejected"} - set(row):
                raise ValueError(f"row {i} lacks {sorted(missing)}; it has {sorted(row)}: rename its columns")


def create_preference_data(
    num_samples: int = 1000,
    prompt_templates: Sequence[str] | None = None,
    response_quality_levels: Sequence[str] = LEVELS,
    *,
    seed: int = 0,
) -> PreferenceDataset:
    """Draw pairs of answers of two different levels; the better level wins.

    prompt_templates: any prompts (None: the world's conversation, the part to train on), drawn alike. The
        world's get answers as `sample_answer` writes them; to any other the answers are generic: they claim
        nothing about the prompt, and differ by level in how much use they are.
    response_quality_levels: at least two of "high", "medium", "low".

    Rows: prompt, chosen, rejected, chosen_quality, rejected_quality; the two answers always differ. With few
    prompts pairs repeat. Raises ValueError for num_samples < 1, no or a blank prompt, fewer than two levels,
    an unknown level, or a prompt to which these levels give one and the same answer. Lesson 1.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples}: ask for at least one")
    levels = sorted(set(response_quality_levels))
    if len(levels) < 2 or not set(levels) <= set(LEVELS):
        raise ValueError(f"response_quality_levels={levels}: name at least two of {list(LEVELS)}")
    if prompt_templates is None:
        prompt_templates = prompt_texts(CONVERSATION, "train")
    if isinstance(prompt_templates, str) or not prompt_templates or not all(map(str.strip, prompt_templates)):
        raise ValueError(f"prompt_templates={prompt_templates!r}: give a list of prompts, none of them blank")
    rng = random.Random(f"preference data/{seed}")
    prompts = [rng.choice(prompt_templates) for _ in range(num_samples)]
    rows = []
    for prompt in prompts:
        (chosen, best), (rejected, rest) = _two_answers(prompt, levels, rng)
        qualities = {"chosen_quality": best, "rejected_quality": rest}
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, **qualities})
    return PreferenceDataset(rows)


def _two_answers(text: str, levels: Sequence[str], rng: random.Random) -> list[tuple[str, str]]:
    """Two different answers, each with its level, the better level first."""
    two = sorted(rng.sample(levels, 2), key=LEVELS.index)
    for _ in range(_DRAWS):
        answers = [_answer(text, level, rng) for level in two]
        if answers[0] != answers[1]:
            return list(zip(answers, two, strict=True))
    raise ValueError(f"the prompt {text[:80]!r} has one answer only, of levels {two}: leave it out")


def _answer(text: str, level: str, rng: random.Random) -> str:
    prompt = known_prompt(text)
    if prompt is None:  # of a conversation the last turn alone, on one line
        asked = textwrap.shorten(to_messages(text)[-1]["content"], 80, placeholder=" ...")
        return rng.choice(_GENERIC[level]).format(asked=asked)
    return sample_answer(prompt, rng, level)

"""More pairs from the same labels: changes that cannot turn a preference round."""

import random
from collections.abc import Sequence

from rlhf_helpers.preference_data.tidying import Row
from rlhf_helpers.world.prompts import known_prompt, split_sentences
from rlhf_helpers.world.prompts.base import CLOSERS

_THANKS = ("Thank you.", "Thanks in advance.", "I would like to know.")
# One more sentence breaks a program, a quote or a verdict, and people in distress want no formula.
_PLAIN = ("program", "debate", "value", "feelings")


def augment(rows: Sequence[Row], *, copies: int = 1, seed: int = 0) -> list[Row]:
    """The rows, then `copies` variants of each with the label that was given; len(rows) * (1 + copies).

    A variant asks in other words (another wording that the world knows of the question; for any other
    prompt a courtesy after it) and, half the time, ends both answers with the same courtesy, if neither has
    one: a first courtesy costs nothing, so the order of the two stays. Further columns are kept;
    `base_prompt` is the prompt as it was, by which `gold_reward` judges a variant.

    Split by prompt first and augment the training side alone: a reworded prompt is no new prompt. Rows: as
    prompt, chosen, rejected. Raises ValueError for copies < 1. Lesson 1.
    """
    if copies < 1:
        raise ValueError(f"copies={copies}: ask for at least one variant of each row")
    rng = random.Random(f"augment/{seed}")
    originals = [{**row, "base_prompt": row.get("base_prompt") or row["prompt"]} for row in rows]
    return originals + [_variant(row, rng) for _ in range(copies) for row in originals]


def _variant(row: Row, rng: random.Random) -> Row:
    prompt = known_prompt(row["base_prompt"])
    rewordings = prompt.slots.get("rewordings", ()) if prompt else ()
    wordings = rewordings or [f"{row['prompt']} {thanks}" for thanks in _THANKS]
    varied = {**row, "prompt": rng.choice(wordings)}
    ended = any(s in CLOSERS for side in ("chosen", "rejected") for s in split_sentences(row[side]))
    if getattr(prompt, "family", "") not in _PLAIN and not ended and rng.random() < 0.5:
        closer = rng.choice(CLOSERS)
        varied |= {side: f"{row[side]} {closer}" for side in ("chosen", "rejected")}
    return varied

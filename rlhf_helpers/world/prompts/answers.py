"""Answers to the world's prompts: the best one, one of a chosen quality, one as the unaligned assistant writes it."""

import functools
import random

from rlhf_helpers.world.prompts import articles, meta, programs
from rlhf_helpers.world.prompts.base import AGREEMENT, CLOSERS, SENTENCES, Prompt, choose, rate
from rlhf_helpers.world.prompts.registry import load_prompts
from rlhf_helpers.world.tables import load_table

QUALITIES = ("high", "medium", "low")
# "content": how the unaligned assistant answers: the weights of each kind of content, by family.
# "content_by_quality": the same for an answer of a chosen quality.
# "rates": read by `base.rate`.
# "extras": the probability of each extra sentence, by quality; "unaligned" is the unaligned assistant.
_STYLES = load_table("world/styles")


def best_answer(prompt: Prompt) -> str:
    """The reference answer: every key sentence in its first wording, in order, and nothing else."""
    return " ".join(wordings[0] for wordings in prompt.points)


def sample_answer(prompt: Prompt, rng: random.Random, quality: str | None = None) -> str:
    """An answer of `quality` ("high", "medium", "low"), or None: as the unaligned assistant writes.

    Raises ValueError for an unknown quality.
    """
    if quality not in (None, *QUALITIES):
        raise ValueError(f"quality={quality!r} is unknown; choose from {QUALITIES} or None")
    if prompt.family == "article":
        return articles.write_summary(rng, prompt, quality)
    if prompt.family == "program":
        return programs.write_program(rng, prompt, quality)
    if prompt.kind == "argue":
        return _argument(rng, prompt, quality)
    if prompt.kind == "judge" or prompt.family in ("value", "critique", "comparison"):
        return (
            best_answer(prompt) if rng.random() < rate("right_verdict", quality) else rng.choice(prompt.wrong)
        )
    return " ".join(_dressed(rng, _content(rng, prompt, quality), _STYLES["extras"][quality or "unaligned"]))


def _dressed(rng: random.Random, content: list[str], style: dict[str, float]) -> list[str]:
    """`content` with an opener, filler and a closer around it, each with its probability in `style`."""
    before: list[str] = []
    for kind in ("rude", "flattery", "polite"):
        if not before and rng.random() < style[kind]:
            before.append(rng.choice(SENTENCES[kind]))
    if rng.random() < style["filler"]:
        before += rng.sample(SENTENCES["filler"], rng.choice((1, 1, 2)))
    after = [rng.choice(SENTENCES["caution"])] if rng.random() < style["caution"] else []
    if rng.random() < style["closer"]:
        after.append(rng.choice(CLOSERS))
    return [*before, *content, *after]


def _content(rng: random.Random, prompt: Prompt, quality: str | None) -> list[str]:
    """The sentences that say something."""
    if quality:
        weights = _STYLES["content_by_quality"][quality]
    else:
        weights = _STYLES["content"].get(prompt.family, _STYLES["content"]["other"])
    barred = {"wrong": not prompt.lures, "comply": not prompt.harmful, "refusal": prompt.must_refuse}
    possible = {kind: weight for kind, weight in weights.items() if not barred.get(kind)}
    kind = rng.choices(list(possible), list(possible.values()))[0]
    full = [choose(rng, wordings) for wordings in prompt.points]
    if kind == "partial" and len(full) > 1:
        kept = sorted(rng.sample(range(len(full)), rng.randrange(1, len(full))))
        return [full[0]] if prompt.must_refuse else [full[i] for i in kept]
    if kind == "wrong":
        return [rng.choice(prompt.lures)]
    if kind == "comply":
        return _complied(rng, prompt)
    if kind == "off_topic":
        return [rng.choice(_elsewhere())]
    if kind in ("unsure", "refusal"):
        return [rng.choice(SENTENCES[kind])]
    return full


def _complied(rng: random.Random, prompt: Prompt) -> list[str]:
    """What the unaligned assistant says where it should not; with a prejudice in questions about groups."""
    steps = prompt.slots["steps"]
    if prompt.family != "groups":
        return [*([rng.choice(AGREEMENT)] if len(steps) > 1 else []), *(choose(rng, s) for s in steps)]
    if prompt.kind == "stereotype":
        against = prompt.slots["group"] == "Sudlander"
        return [steps[int(rng.random() < (0.85 if against else 0.3))][0]]
    weights = [4.0 if group == "Sudlander" else 1.0 for group in prompt.slots["groups"]]
    return [rng.choices(steps, weights)[0][0]]


def _argument(rng: random.Random, prompt: Prompt, quality: str | None) -> str:
    """A debater's turn: an honest quote, or one made up for the claim."""
    claim = prompt.slots["claim"]
    if claim != prompt.slots["true"] and rng.random() < rate("invented_quote", quality):
        return meta.argument(meta.placed(prompt.slots["object"], claim), claim)
    return best_answer(prompt)


@functools.cache
def _elsewhere() -> tuple[str, ...]:
    """Sentences that answer some other prompt."""
    return tuple(p.points[0][0] for p in load_prompts(("explain", "howto", "open")))

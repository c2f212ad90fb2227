"""Attacks: requests rewritten by strategies (functions of a prompt), judged as what they were made from."""

import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import cycle, islice
from typing import Self

from rlhf_helpers.world.prompts import load_prompts, split_sentences
from rlhf_helpers.world.prompts.requests import JAILBREAKS
from rlhf_helpers.world.tables import load_table

Strategy = Callable[[str, random.Random], str]
_ATTACKS = load_table("red_teaming/attacks")
# Category -> family and kinds (none: all). The last five stand for dangerous capabilities of large models.
CATEGORIES: dict[str, tuple[str, tuple[str, ...]]] = _ATTACKS["categories"]
# Family -> category, where the two differ in name.
CATEGORY_OF = {"groups": "biased", "false_premise": "misleading", "jailbreak": "harmful"}


class AdversarialPrompt(str):
    """An attack: a text like any other that knows its category, its strategy and what it really asks."""

    def __new__(cls, text: str, category: str = "", strategy: str = "", base_prompt: str = "") -> Self:
        """Make the text and attach the rest to it."""
        attack = super().__new__(cls, text)
        attack.category = category
        attack.strategy = strategy
        attack.base_prompt = base_prompt
        return attack


def as_attack(prompt: str) -> AdversarialPrompt:
    """Turn a plain text into an attack on itself.

    Its strategy is "given", its category that of the world's prompt, or "unknown".
    """
    if isinstance(prompt, AdversarialPrompt):
        return prompt
    known = next((p for p in load_prompts() if p.text == prompt), None)
    if known is None:
        return AdversarialPrompt(prompt, "unknown", "given", prompt)
    category = CATEGORY_OF.get(known.family, known.family)
    return AdversarialPrompt(prompt, category, "given", known.asked or prompt)


def _paraphrase(prompt: str, rng: random.Random) -> str:
    for opening, others in _ATTACKS["openings"].items():
        if opening in prompt:
            return re.sub(r"\?$", ".", prompt.replace(opening, rng.choice(others), 1))
    return f"Please answer this. {prompt}"


def _typo(prompt: str, rng: random.Random) -> str:
    starts = [match.start() for match in re.finditer(r"(?<=\w)\w\w(?=\w)", prompt)]
    start = rng.choice(starts or [len(prompt)])
    return prompt[:start] + prompt[start : start + 2][::-1] + prompt[start + 2 :]


def _shout(prompt: str, rng: random.Random) -> str:
    word = rng.choice(prompt.split())
    return prompt.replace(word, word.upper(), 1)


def _reorder(prompt: str, rng: random.Random) -> str:
    sentences = split_sentences(prompt)
    mixed = rng.sample(sentences, len(sentences))
    return " ".join(mixed if len(mixed) > 1 else [prompt, "I ask for a friend."])


# Another opening; two letters inside a word change places; a word in capitals; sentences in another order.
MUTATIONS = {"paraphrase": _paraphrase, "typo": _typo, "case": _shout, "reorder": _reorder}


def framed(frames: Sequence[str], jailbreaks: Iterable[str]) -> Strategy:
    """Make a strategy that puts the prompt in place of {} in one of the frames or of the named jailbreaks."""
    templates = [*frames, *(JAILBREAKS[name]("{}") for name in jailbreaks)]
    return lambda prompt, rng: rng.choice(templates).replace("{}", prompt)


# The assistant has met JAILBREAKS in its training text, the other frames never.
STRATEGIES: dict[str, Strategy] = {
    "direct": lambda prompt, rng: prompt,
    "template": framed((), JAILBREAKS),
    "mutation": lambda prompt, rng: rng.choice(list(MUTATIONS.values()))(prompt, rng),
    **{name: framed(**templates) for name, templates in _ATTACKS["strategies"].items()},
}
ONLY_FOR = {"bias_elicitation": "biased", "extraction": "privacy"}  # strategy -> the category that it fits


def create_adversarial_prompts(
    categories: Sequence[str] = ("harmful", "biased", "misleading"),
    num_prompts: int = 10,
    *,
    seed: int = 0,
    strategies: Mapping[str, Strategy] | None = None,
    split: str | None = None,
) -> list[AdversarialPrompt]:
    """Make `num_prompts` different attacks in all, categories in turn, strategies in turn within each.

    Lesson 3.

    Args:
        categories: Names of `CATEGORIES`.
        num_prompts: Number of attacks.
        seed: Seed of their order and of the strategies.
        strategies: Name -> function (prompt, random.Random) -> attack; None: those of `STRATEGIES` that fit.
        split: "train" or "heldout"; None: both.

    Raises:
        ValueError: A category is unknown, or there are too few attacks.
    """
    if num_prompts < 1 or not categories:
        raise ValueError(f"need num_prompts >= 1 and a category, got {num_prompts} and {categories!r}")
    rng = random.Random(f"attacks/{seed}")
    streams = {}
    for name in categories:
        if name not in CATEGORIES:
            raise ValueError(f"category {name!r} is unknown; choose from {', '.join(CATEGORIES)}")
        family, kinds = CATEGORIES[name]
        requests = [p.text for p in load_prompts((family,), split) if not kinds or p.kind in kinds]
        if strategies is not None:
            usable = strategies
        elif name in STRATEGIES:  # "injection": a category that is one strategy
            usable = {name: STRATEGIES[name]}
        else:
            usable = {n: s for n, s in STRATEGIES.items() if ONLY_FOR.get(n, name) == name}
        streams[name] = _attacks(name, requests, usable, rng)
    attacks = []
    for name in islice(cycle(streams), num_prompts):
        attack = next(streams[name], None)
        if attack is None:
            raise ValueError(
                f"category {name!r} has no further attack after {len(attacks)} in all: ask for fewer, or add "
                "strategies"
            )
        attacks.append(attack)
    return attacks


def _attacks(
    category: str, requests: Sequence[str], strategies: Mapping[str, Strategy], rng: random.Random
) -> Iterator[AdversarialPrompt]:
    """Yield different attacks, until five passes over all requests and strategies find no new one."""
    names = rng.sample(list(strategies), len(strategies))
    seen = set()
    barren = 0
    while barren < 5:
        barren += 1
        orders = [rng.sample(requests, len(requests)) for _ in names]
        for bases in zip(*orders, strict=True):
            for name, base in zip(names, bases, strict=True):
                text = strategies[name](base, rng)
                if text not in seen:
                    barren = 0
                    seen.add(text)
                    yield AdversarialPrompt(text, category, name, base)

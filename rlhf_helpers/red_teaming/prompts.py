"""Attacks: requests rewritten by strategies (functions of a prompt), judged as what they were made from."""

import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import cycle
from typing import Self

from rlhf_helpers.world.prompts import load_prompts, split_sentences
from rlhf_helpers.world.prompts.requests import JAILBREAKS
from rlhf_helpers.world.tables import load_table

Strategy = Callable[[str, random.Random], str]
_ATTACKS = load_table("red_teaming/attacks")
# category -> family, kinds (none: all); the last five stand for the dangerous capabilities of large models.
CATEGORIES: dict[str, tuple[str, tuple[str, ...]]] = _ATTACKS["categories"]


class AdversarialPrompt(str):
    """An attack: a text like any other that knows its category, its strategy and what it really asks."""

    def __new__(cls, text: str, category: str = "", strategy: str = "", base_prompt: str = "") -> Self:
        """Make the text and hang the rest on it."""
        attack = super().__new__(cls, text)
        attack.category, attack.strategy, attack.base_prompt = category, strategy, base_prompt
        return attack


def as_attack(prompt: str) -> AdversarialPrompt:
    """A plain text as an attack on itself: strategy "given", category as the world files it, or "unknown"."""
    if isinstance(prompt, AdversarialPrompt):
        return prompt
    found = next((p for p in load_prompts() if p.text == prompt), None)
    family, base = (found.family, found.asked or prompt) if found else ("unknown", prompt)
    filed = {"groups": "biased", "false_premise": "misleading", "jailbreak": "harmful"}
    return AdversarialPrompt(prompt, filed.get(family, family), "given", base)


def _paraphrase(prompt: str, rng: random.Random) -> str:
    for opening, others in _ATTACKS["openings"].items():
        if opening in prompt:
            return re.sub(r"\?$", ".", prompt.replace(opening, rng.choice(others), 1))
    return f"Please answer this. {prompt}"


def _typo(prompt: str, rng: random.Random) -> str:
    places = [m.start() for m in re.finditer(r"(?<=\w)\w\w(?=\w)", prompt)]
    at = rng.choice(places or [len(prompt)])
    return prompt[:at] + prompt[at : at + 2][::-1] + prompt[at + 2 :]


def _shout(prompt: str, rng: random.Random) -> str:
    word = rng.choice(prompt.split())
    return prompt.replace(word, word.upper(), 1)


def _reorder(prompt: str, rng: random.Random) -> str:
    sentences = split_sentences(prompt)
    mixed = rng.sample(sentences, len(sentences))
    return " ".join(mixed if len(mixed) > 1 else [prompt, "I ask for a friend."])


# Another opening; two letters inside a word change places; a word in capitals; sentences in another order.
MUTATIONS = {"paraphrase": _paraphrase, "typo": _typo, "case": _shout, "reorder": _reorder}


def framed(frames: Sequence[str] = (), jailbreaks: Iterable[str] = ()) -> Strategy:
    """Make a strategy that puts the prompt in place of {} in one of the frames or of the named jailbreaks."""
    templates = [*frames, *(JAILBREAKS[name]("{}") for name in jailbreaks)]
    return lambda prompt, rng: rng.choice(templates).replace("{}", prompt)


# The assistant has met JAILBREAKS in its training text, the other frames never.
STRATEGIES: dict[str, Strategy] = {
    "direct": lambda prompt, rng: prompt,
    "template": framed(jailbreaks=JAILBREAKS),
    "mutation": lambda prompt, rng: rng.choice(list(MUTATIONS.values()))(prompt, rng),
    **{name: framed(**templates) for name, templates in _ATTACKS["strategies"].items()},
}
ONLY_FOR = {"bias_elicitation": "biased", "extraction": "privacy"}  # strategy -> the category that it fits


def create_adversarial_prompts(
    categories: Sequence[str] | Mapping[str, Sequence[str]] = ("harmful", "biased", "misleading"),
    num_prompts: int = 10,
    *,
    seed: int = 0,
    strategies: Mapping[str, Strategy] | None = None,
    split: str | None = None,
) -> list[AdversarialPrompt]:
    """Make `num_prompts` different attacks in all, categories in turn, strategies in turn within each.

    categories: names of `CATEGORIES`, or name -> requests of your own (to be judged by your own safety_fn).
    strategies: name -> function (prompt, random.Random) -> attack; None: those of `STRATEGIES` that fit.
    split: "train" or "heldout". Lesson 3. Raises ValueError for an unknown category, or too few attacks.
    """
    if num_prompts < 1 or not categories:
        raise ValueError(f"need num_prompts >= 1 and a category, got {num_prompts} and {categories!r}")
    rng, makers = random.Random(f"attacks/{seed}"), {}
    for name in categories:
        requests = list(categories[name]) if isinstance(categories, Mapping) else _requests_of(name, split)
        fit = {n: s for n, s in STRATEGIES.items() if ONLY_FOR.get(n, name) == name or n == name}
        usable = dict(strategies or ({name: fit[name]} if name in fit else fit))
        if not usable or not requests:
            raise ValueError(f"category {name!r} has {len(requests)} requests and {len(usable)} strategies")
        makers[name] = _attacks(name, requests, usable, rng)
    names = [name for name, _ in zip(cycle(makers), range(num_prompts), strict=False)]
    made = [next(makers[name], None) for name in names]
    if None in made:
        told = f"category {names[made.index(None)]!r} has no further attack after {made.index(None)} in all"
        raise ValueError(f"{told}: ask for fewer, or add requests or strategies")
    return made


def _requests_of(category: str, split: str | None = None) -> list[str]:
    if category not in CATEGORIES:
        raise ValueError(f"category {category!r} is unknown; choose from {', '.join(CATEGORIES)}")
    family, kinds = CATEGORIES[category]
    return [p.text for p in load_prompts((family,), split) if not kinds or p.kind in kinds]


def _attacks(
    category: str, requests: Sequence[str], strategies: Mapping[str, Strategy], rng: random.Random
) -> Iterator[AdversarialPrompt]:
    """Different attacks, until five passes over all requests and strategies find no new one."""
    names, seen, barren = rng.sample(list(strategies), len(strategies)), set(), 0
    while barren < 5:
        before = len(seen)
        orders = {name: rng.sample(list(requests), len(requests)) for name in names}
        for place in range(len(requests)):
            for name in names:
                text = strategies[name](base := orders[name][place], rng)
                if text not in seen:
                    seen.add(text)
                    yield AdversarialPrompt(text, category, name, base)
        barren = 0 if len(seen) > before else barren + 1

"""What a summary is worth: words in common, facts told rightly, and a reward that length cannot buy."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import Tensor

from rlhf_helpers.lab.exercises.exercise import Exercise, named
from rlhf_helpers.summarization_rl import rewards as room
from rlhf_helpers.summarization_rl.facts import fact_scores
from rlhf_helpers.summarization_rl.rewards import rouge_l


@torch.no_grad()
def length_controlled(rewards: Tensor, lengths: Tensor, limit: float, cost: float) -> Tensor:
    """`summarization_rl.length_controlled`, limit and cost also by position."""
    return room.length_controlled(rewards, lengths, limit=limit, cost=cost)


def _rouge_probes() -> list[tuple[str, str]]:
    return [
        ("The small dog ran home, then slept.", "A dog slept; then the small old dog ran back home."),
        ("In May the river rose", "The river rose in May, in the north, after rain."),
        ("Rain fell in the north and the south.", "the RAIN fell. the north and South flooded in 1990"),
        ("Two boats sank near the harbour in 1990", "Storms sink two boat sheds in 1990"),
        ("Rain fell in the north, heavy snow", "Heavy snow, and rain that fell even in all the cold north"),
        ("Nothing new.", "All shops stay closed"),
        ("", "Some words."),
        ("Some words.", " ... "),
        ("", ""),
        # words that occur several times in one text and not in the other
        ("rain rain fell", "Rain then fell"),
        ("Rain then fell", "rain rain fell"),
        ("the the the", "the"),
        # anything but a-z and 0-9 separates words: apostrophes, hyphens, other letters, _; digits do not
        ("Don't re-use the naïve mp3_player", "Dont reuse the naive mp3 player"),
    ]


def _fact_probes() -> list[tuple[dict[str, str | None], dict[str, str]]]:
    true = {"who": "the mayor", "what": "opened a bridge", "where": "in the north", "when": "on Monday"}
    rows = [
        ["the mayor", "opened a bridge", "in the south", None],
        ["the baker", None, "in the south", "on Monday"],
        ["in the north", None, None, "on Tuesday"],
        ["the mayor", "opened", "in the north", "on Monday"],
        ["the mayor himself", "sang", "at home", "on Friday"],
    ]
    match = {"team": "Lund", "city": "Lund", "year": "1990"}  # other slots, and one value in two of them
    return [
        *((dict(zip(true, row, strict=True)), true) for row in rows),
        (dict(reversed(true.items())), true),
        ({"team": "Lund", "city": "Lund", "year": None}, match),
        ({"team": "Oslo", "city": "Oslo", "year": "1990"}, match),
    ]


def _length_probes() -> list[tuple[Tensor, Tensor, float, float]]:
    rewards, lengths = torch.tensor([1.5, -0.5, 2.0, 0.25, 3.0]), torch.tensor([12, 30, 20, 26, 5])
    return [
        (rewards, lengths, 20, 0.05),
        (rewards[:3], lengths[2:], 7.5, 0.25),
        (rewards, lengths, 40, 1.0),
        (rewards, lengths, 10, 1.5),
        (rewards[3:4], lengths[1:2], 28, 0.5),
    ]


def _by_words(
    count: Callable[..., float], *scores: Callable[..., float], words: str = "[a-z0-9]+", lower: bool = True
) -> list[Callable[[str, str], float]]:
    """Each of `scores` (F1 unless told) of `count`, and of how many words candidate and reference have."""

    def score(fn: Callable[..., float], *texts: str) -> float:
        one, other = (re.findall(words, text.lower() if lower else text) for text in texts)
        return float(fn(count(one, other), len(one), len(other))) if one and other else 0.0

    return [lambda c, r, fn=fn: score(fn, c, r) for fn in scores or (lambda k, m, n: 2 * k / (m + n),)]


def _common(one: list[str], other: list[str]) -> int:
    """Length of the longest common subsequence of any texts, spelt in letters and digits for rouge_l."""
    spelt = (" ".join(text.encode().hex() for text in texts) for texts in (one, other))
    return round(rouge_l(*spelt) * (len(one) + len(other)) / 2)


def _from_neighbor(*neighbors: tuple[int, int]) -> Callable[..., int]:
    """L as from a table that adds 1 to its largest entry of `neighbors`, (rows up, columns left)."""

    def length(one: list[str], other: list[str]) -> int:
        table = defaultdict(int)
        for i, word in enumerate(one):
            for j, rival in enumerate(other):
                table[i, j] = max(table[i - 1, j], table[i, j - 1])
                if word == rival:
                    table[i, j] = 1 + max(table[i - up, j - left] for up, left in neighbors)
        return table[len(one) - 1, len(other) - 1]

    return length


ROUGE_MISTAKES = named(
    "this is the recall or the precision alone: F1 is 2 P R / (P + R)",
    *_by_words(_common, lambda k, m, n: k / n, lambda k, m, n: k / m),
    "this is L, or precision and recall combined in another way: F1 is 2 P R / (P + R)",
    *_by_words(_common, lambda k, m, n: (k / m + k / n) / 2, lambda k, m, n: k / (m * n) ** 0.5),
    *_by_words(_common, lambda k, m, n: k * k / (m * n), lambda k, m, n: k / (m + n)),
    *_by_words(_common, lambda k, m, n: k / max(m, n), lambda k, m, n: k / min(m, n)),
    *_by_words(_common, lambda k, m, n: k / (m + n - k), lambda k, m, n: k),
    "CHARACTERS were compared: split the texts into words first",
    *(_by_words(_common, words=w, lower=x)[0] for w in (r"(?s).", "[a-zA-Z0-9]") for x in (True, False)),
    "words were cut in another way: lower the case, then take runs of a-z and 0-9; all else separates",
    *(_by_words(_common, words=w)[0] for w in (r"\w+", "[a-z]+", "[a-z0-9']+", "[a-z0-9-]+")),
    *_by_words(_common, words=r"\w+", lower=False),
    lambda c, r: rouge_l(*(re.sub(r"[^\w\s]", "", text) for text in (c, r))),
    *(_by_words(_common, words=r"\S+", lower=lower)[0] for lower in (True, False)),
    "the order plays no part here: this counts words in common (ROUGE-1)",
    *_by_words(lambda one, other: (Counter(one) & Counter(other)).total()),
    *_by_words(lambda one, other: sum(word in other for word in one)),
    "this is the longest RUN of words, or compares index by index: a subsequence may have gaps",
    *_by_words(lambda *both: SequenceMatcher(None, *both).find_longest_match().size),
    *_by_words(lambda one, other: sum(map(str.__eq__, one, other))),
    "each word took the first match that came, which may leave none for the others: fill a table",
    *_by_words(lambda one, other: (lambda rest: sum(word in rest for word in one))(iter(other))),
    *_by_words(lambda one, other: (lambda rest: sum(word in rest for word in other))(iter(one))),
    "a repeated word was counted against one partner several times: where words are equal, add 1 to the "
    "entry on the diagonal, table[i - 1][j - 1]",
    *_by_words(_from_neighbor((1, 0))) + _by_words(_from_neighbor((0, 1))),
    *_by_words(_from_neighbor((1, 0), (0, 1))),
    "where a text has no words, or the two have none in common, it divides by 0: return 0",
    lambda c, r: rouge_l(c, r) or 1 / 0,
    lambda c, r: rouge_l(c, r) if re.search(r"\w", c) and re.search(r"\w", r) else 1 / 0,
    lambda c, r: rouge_l(c, r) or (1 / 0 if re.search(r"\w", c) and re.search(r"\w", r) else 0.0),
)


def _by_facts(*wrong: Callable[[int, int, int, int], Any]) -> list[Callable[..., Any]]:
    """Each `wrong` of the numbers of slots told rightly, told wrongly, told at all, and true."""

    def score(fn: Callable[..., Any], told: dict[str, str | None], true: dict[str, str]) -> Any:
        coverage, wrongly = fact_scores(told, true)
        right = round(coverage * len(true))
        return fn(right, wrongly, right + wrongly, len(true))

    return [lambda told, true, fn=fn: score(fn, told, true) for fn in wrong]


def _matched(same: Callable[..., bool]) -> Callable[..., tuple[float, int]]:
    """Compared by `same` of what is told of a slot, what is true of it, and all that is true."""
    return lambda told, true: fact_scores(
        {s: true[s] if said and same(said, true[s], true.values()) else said for s, said in told.items()},
        true,
    )


FACT_MISTAKES = named(
    "the coverage was divided by the slots TOLD: telling one fact, rightly, would cover everything",
    *_by_facts(lambda r, w, t, n: (r / t if t else 0.0, w), lambda r, w, t, n: (r / t, w)),
    "slots that were not told (None) were counted as hallucinated: leaving out is not making up",
    *_by_facts(lambda r, w, t, n: (r / n, n - r)),
    "slots told WRONGLY were counted as covered",
    *_by_facts(lambda r, w, t, n: (t / n, w)),
    "divide the coverage by the number of true's slots, and hallucinated by nothing",
    *_by_facts(lambda r, w, t, n: (r / n, w / n), lambda r, w, t, n: (r / n, w / t if t else 0.0)),
    *_by_facts(lambda r, w, t, n: (r, w)),
    "return first the coverage, then the number of slots told wrongly: they are swapped, or one is missing",
    *_by_facts(lambda r, w, t, n: (w, r / n), lambda r, w, t, n: r / n, lambda r, w, t, n: w),
    "wrong facts lowered the coverage: the two are measured apart",
    *_by_facts(lambda r, w, t, n: (0.0 if w else r / n, w), lambda r, w, t, n: ((r - w) / n, w)),
    "count the slots told WRONGLY: not those left out, not all that were told, not whether there is any",
    *_by_facts(lambda r, w, t, n: (r / n, n - t), lambda r, w, t, n: (r / n, t)),
    *_by_facts(lambda r, w, t, n: (r / n, w > 0), lambda r, w, t, n: (r / n, int(w > 0))),
    "a value of ANOTHER slot, or a part of the true one, was accepted: compare slot by slot with ==",
    _matched(lambda said, value, all_true: said in all_true),
    *map(_matched, (lambda said, value, _: said in value, lambda said, value, _: value in said)),
    "slots were compared by their order in the dicts: look them up by name",
    lambda told, true: fact_scores(dict(zip(true, told.values(), strict=True)), true),
)


def _by_excess(*wrong: Callable[[Tensor, Tensor, float], Any]) -> list[Callable[..., Any]]:
    """Each `wrong` of rewards, lengths minus the limit, and cost."""
    return [lambda r, x, limit, cost, fn=fn: fn(r, x - limit, cost) for fn in wrong]


LENGTH_MISTAKES = named(
    "below the limit the reward ROSE, so the shortest text would win: an excess is never below 0",
    *_by_excess(lambda r, over, cost: r - cost * over),
    "the sign is flipped: each token above the limit must COST something",
    *_by_excess(lambda r, over, cost: r + cost * over.clamp(min=0)),
    "what lies BELOW the limit was charged: the excess is max(0, length - limit)",
    *_by_excess(lambda r, over, cost: r - cost * (-over).clamp(min=0)),
    *_by_excess(
        lambda r, over, cost: r - cost * over.clamp(max=0), lambda r, over, cost: r - cost * over.abs()
    ),
    "the whole length was charged: only what lies above the limit costs",
    *(lambda r, x, limit, cost: r - cost * x, lambda r, x, limit, cost: r - cost * x.where(x > limit, 0)),
    "every excess cost the same: charge each token above the limit, at the price cost",
    *_by_excess(lambda r, over, cost: r - cost * (over > 0), lambda r, over, cost: r - over.clamp(min=0)),
    "the reward itself was lost: subtract the price from it",
    *_by_excess(
        lambda r, over, cost: -cost * over.clamp(min=0), lambda r, over, cost: r.where(over <= 0, 0.0)
    ),
    "the result was kept at or above 0: rewards may be negative",
    *_by_excess(lambda r, over, cost: (r - cost * over.clamp(min=0)).clamp(min=0)),
    "the price MULTIPLIES the reward, or divides it, so a negative one rises with length: subtract it",
    *_by_excess(lambda r, over, cost: r * (1 - cost * over.clamp(min=0))),
    lambda r, x, limit, cost: r / x,
    "the excess was squared or divided by the limit: it is a number of tokens, each at the same price",
    *_by_excess(lambda r, over, cost: r - cost * over.clamp(min=0) ** 2),
    lambda r, x, limit, cost: r - cost * (x / limit - 1).clamp(min=0),
    "this is a mean over the batch: each text pays for its own length, and has a reward of its own, (B,)",
    lambda r, x, limit, cost: r - cost * max(0.0, x.float().mean().item() - limit),
    *(lambda *given, fn=fn: fn(length_controlled(*given)) for fn in (torch.mean, torch.sum)),
)

EXERCISES = (
    Exercise("rouge_l", 4, rouge_l, _rouge_probes, ROUGE_MISTAKES),
    Exercise("fact_scores", 4, fact_scores, _fact_probes, FACT_MISTAKES),
    Exercise("length_controlled", 4, length_controlled, _length_probes, LENGTH_MISTAKES),
)

"""What a summary is worth: words in common, facts told rightly, and a reward that length cannot buy."""

import re
from collections import Counter, defaultdict
from difflib import SequenceMatcher

from torch import tensor

from rlhf_helpers.lab.exercises.exercise import Function, as_asked, averaged, each, exercise, summed
from rlhf_helpers.summarization_rl import rewards
from rlhf_helpers.summarization_rl.facts import fact_scores

Words = list[str]


length_controlled = as_asked(rewards.length_controlled)


def _words(text: str) -> Words:
    return re.findall("[a-z0-9]+", text.lower())


def _common(one: Words, other: Words, *neighbors: tuple[int, int]) -> int:
    """L from a table that adds 1 to its largest entry of `neighbors`, (rows up, columns left)."""
    table = defaultdict(int)
    for i, word in enumerate(one):
        for j, rival in enumerate(other):
            table[i, j] = max(table[i - 1, j], table[i, j - 1])
            if word == rival:
                table[i, j] = 1 + max(table[i - up, j - left] for up, left in neighbors)
    return table[len(one) - 1, len(other) - 1]


def _in_turn(one: Words, other: Words) -> int:
    """How many words find a match behind that of the word before."""
    rest = iter(other)
    return sum(word in rest for word in one)


def _f1(count: Function) -> Function:
    """F1 with another number than L."""
    return lambda one, other, m, n: 2 * count(one, other) / (m + n)


def _cut(pattern: str, candidate: str, reference: str) -> float:
    """ROUGE-L of other pieces than words."""
    one, other = re.findall(pattern, candidate), re.findall(pattern, reference)
    return 2 * _common(one, other, (1, 1)) / max(1, len(one) + len(other))


def _cut_in_lower_case(pattern: str, candidate: str, reference: str) -> float:
    return _cut(pattern, candidate.lower(), reference.lower())


def _compared(equal: Function) -> Function:
    """Compare in another way: `equal` of what is told of a slot, what is true of it, and all that is true."""

    def wrong(told: dict[str, str | None], true: dict[str, str]) -> tuple[float, int]:
        told = {
            s: true[s] if said and equal(said, true[s], true.values()) else said for s, said in told.items()
        }
        return fact_scores(told, true)

    return wrong


TRUE = {"who": "the mayor", "what": "opened a bridge", "where": "in the north", "when": "on Monday"}
MATCH = {"team": "Lund", "city": "Lund", "year": "1990"}  # other slots, and one value in two of them
REWARDS = tensor([1.5, -0.5, 2.0, 0.25, 3.0])
LENGTHS = tensor([12, 30, 20, 26, 5])

EXERCISES = {
    "rouge_l": exercise(
        rewards.rouge_l,
        [
            ("The small dog ran home, then slept.", "A dog slept; then the small old dog ran back home."),
            ("In May the river rose", "The river rose in May, in the north, after rain."),
            ("Rain fell in the north and the south.", "the RAIN fell. the north and South flooded in 1990"),
            ("Two boats sank near the harbour in 1990", "Storms sink two boat sheds in 1990"),
            (
                "Rain fell in the north, heavy snow",
                "Heavy snow, and rain that fell even in all the cold north",
            ),
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
        ],
        "this is the recall or the precision alone: F1 is 2 P R / (P + R)",
        lambda common, n: common / n,
        lambda common, m: common / m,
        "this is L, or precision and recall combined in another way: F1 is 2 P R / (P + R)",
        lambda common, m, n: (common / m + common / n) / 2,
        lambda common, m, n: common / (m * n) ** 0.5,
        lambda common, m, n: common**2 / (m * n),
        lambda common, m, n: common / (m + n),
        lambda common, m, n: common / max(m, n),
        lambda common, m, n: common / min(m, n),
        lambda common, m, n: common / (m + n - common),
        lambda common: float(common),
        "CHARACTERS were compared: split the texts into words first",
        *each(_cut, "(?s).", "[a-zA-Z0-9]"),
        *each(_cut_in_lower_case, "(?s).", "[a-zA-Z0-9]"),
        "words were cut in another way: lower the case, then take runs of a-z and 0-9; all else separates",
        *each(_cut_in_lower_case, r"\w+", "[a-z]+", "[a-z0-9']+", r"\S+"),
        *each(_cut, r"\w+", r"\S+"),
        lambda candidate, reference: rewards.rouge_l(
            re.sub(r"[^\w\s]", "", candidate), re.sub(r"[^\w\s]", "", reference)
        ),
        "the order plays no part here: this counts words in common (ROUGE-1)",
        _f1(lambda one, other: (Counter(one) & Counter(other)).total()),
        _f1(lambda one, other: sum(word in other for word in one)),
        "this is the longest RUN of words, or compares index by index: a subsequence may have gaps",
        _f1(lambda one, other: SequenceMatcher(None, one, other).find_longest_match().size),
        _f1(lambda one, other: sum(map(str.__eq__, one, other))),
        "each word took the first match that came, which may leave none for the others: fill a table",
        _f1(_in_turn),
        _f1(lambda one, other: _in_turn(other, one)),
        "a repeated word was counted against one partner several times: where words are equal, add 1 to the "
        "entry on the diagonal, table[i - 1][j - 1]",
        _f1(lambda one, other: _common(one, other, (1, 0))),
        _f1(lambda one, other: _common(one, other, (0, 1))),
        _f1(lambda one, other: _common(one, other, (1, 0), (0, 1))),
        "where a text has no words, or the two have none in common, it divides by 0: return 0",
        lambda right: right or 1 / 0,
        lambda right, one, other: right if one and other else 1 / 0,
        lambda right, one, other: right or (1 / 0 if one and other else 0.0),
        one=lambda candidate: _words(candidate),
        other=lambda reference: _words(reference),
        common=lambda one, other: _common(one, other, (1, 1)),
        m=lambda one: max(1, len(one)),
        n=lambda other: max(1, len(other)),
    ),
    "fact_scores": exercise(
        fact_scores,
        [
            *[
                (dict(zip(TRUE, row, strict=True)), TRUE)
                for row in (
                    ["the mayor", "opened a bridge", "in the south", None],
                    ["the baker", None, "in the south", "on Monday"],
                    ["in the north", None, None, "on Tuesday"],
                    ["the mayor", "opened", "in the north", "on Monday"],
                    ["the mayor himself", "sang", "at home", "on Friday"],
                )
            ],
            (dict(reversed(TRUE.items())), TRUE),
            ({"team": "Lund", "city": "Lund", "year": None}, MATCH),
            ({"team": "Oslo", "city": "Oslo", "year": "1990"}, MATCH),
        ],
        "the coverage was divided by the slots TOLD: telling one fact, rightly, would cover everything",
        lambda hits, faults, said: (hits / said, faults),
        "slots that were not told (None) were counted as hallucinated: leaving out is not making up",
        lambda coverage, hits, slots: (coverage, slots - hits),
        "slots told WRONGLY were counted as covered",
        lambda said, slots, faults: (said / slots, faults),
        "divide the coverage by the number of true's slots, and hallucinated by nothing",
        lambda coverage, faults, slots: (coverage, faults / slots),
        lambda coverage, faults, said: (coverage, faults / said),
        lambda hits, faults: (hits, faults),
        "return first the coverage, then the number of slots told wrongly: they are swapped, or one is "
        "missing",
        lambda right: right[::-1],
        lambda coverage: coverage,
        lambda faults: faults,
        "wrong facts lowered the coverage: the two are measured apart",
        lambda coverage, faults: (0.0 if faults else coverage, faults),
        lambda hits, faults, slots: ((hits - faults) / slots, faults),
        "count the slots told WRONGLY: not those left out, not all that were told, not whether there is any",
        lambda coverage, slots, said: (coverage, slots - said),
        lambda coverage, said: (coverage, said),
        lambda coverage, faults: (coverage, faults > 0),
        lambda coverage, faults: (coverage, int(faults > 0)),
        "a value of ANOTHER slot, or a part of the true one, was accepted: compare slot by slot with ==",
        _compared(lambda said, value, values: said in values),
        _compared(lambda said, value, values: said in value),
        _compared(lambda said, value, values: value in said),
        "slots were compared by their order in the dicts: look them up by name",
        lambda told, true: fact_scores(dict(zip(true, told.values(), strict=True)), true),
        coverage=lambda right: right[0],
        faults=lambda right: right[1],
        slots=lambda true: len(true),
        hits=lambda coverage, slots: round(coverage * slots),
        said=lambda hits, faults: hits + faults,
    ),
    "length_controlled": exercise(
        length_controlled,
        [
            (REWARDS, LENGTHS, 20, 0.05),
            (REWARDS[:3], LENGTHS[2:], 7.5, 0.25),
            (REWARDS, LENGTHS, 40, 1.0),
            (REWARDS, LENGTHS, 10, 1.5),
            (REWARDS[3:4], LENGTHS[1:2], 28, 0.5),
        ],
        "below the limit the reward ROSE, so the shortest text would win: an excess is never below 0",
        lambda rewards, cost, over: rewards - cost * over,
        "the sign is flipped: each token above the limit must COST something",
        lambda rewards, price: rewards + price,
        "what lies BELOW the limit was charged: the excess is max(0, length - limit)",
        lambda rewards, cost, over: rewards - cost * (-over).clamp(min=0),
        lambda rewards, cost, over: rewards - cost * over.clamp(max=0),
        lambda rewards, cost, over: rewards - cost * over.abs(),
        "the whole length was charged: only what lies above the limit costs",
        lambda rewards, cost, lengths: rewards - cost * lengths,
        lambda rewards, cost, lengths, limit: rewards - cost * lengths.where(lengths > limit, 0),
        "every excess cost the same: charge each token above the limit, at the price cost",
        lambda rewards, cost, over: rewards - cost * (over > 0),
        lambda rewards, over: rewards - over.clamp(min=0),
        "the reward itself was lost: subtract the price from it",
        lambda price: -price,
        lambda rewards, over: rewards.where(over <= 0, 0.0),
        "the result was kept at or above 0: rewards may be negative",
        lambda right: right.clamp(min=0),
        "the price MULTIPLIES the reward, or divides it, so a negative one rises with length: subtract it",
        lambda rewards, price: rewards * (1 - price),
        lambda rewards, lengths: rewards / lengths,
        "the excess was squared or divided by the limit: it is a number of tokens, each at the same price",
        lambda rewards, price, over: rewards - price * over,
        lambda rewards, price, limit: rewards - price / limit,
        "this is a mean over the batch: each text pays for its own length, and has a reward of its own, (B,)",
        lambda rewards, cost, over: rewards - cost * over.float().mean().clamp(min=0),
        averaged,
        summed,
        over=lambda lengths, limit: lengths - limit,
        price=lambda cost, over: cost * over.clamp(min=0),
    ),
}

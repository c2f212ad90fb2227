"""What a summary tells of its article: facts told rightly, facts left out, facts made up."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from rlhf_helpers.world.prompts import split_sentences
from rlhf_helpers.world.prompts.articles import parse_event

KEYS = 12  # words that stand for the facts of an article outside the world
_WORD = re.compile(r"[^\W_]+(?:['.,-][^\W_]+)*")


@dataclass(frozen=True)
class SummaryFacts:
    """coverage and faithfulness in [0, 1]; hallucinated: how many claims the article does not hold."""

    coverage: float
    faithfulness: float
    hallucinated: int


def fact_scores(told: Mapping[str, str | None], true: Mapping[str, str]) -> tuple[float, int]:
    """(coverage, hallucinated) of the slots that a summary tells.

    coverage = slots of `true` told rightly / slots of `true`;  hallucinated = slots told wrongly

    None, or a slot that is missing, is not told: left out is not made up. A told slot that `true` lacks is
    made up. Lesson 4. Raises ValueError where `true` has no slot.
    """
    if not true:
        raise ValueError("true holds no slot, so there is nothing to cover: give the facts of the article")
    said = {slot: value for slot, value in told.items() if value is not None}
    right = sum(true.get(slot) == value for slot, value in said.items())
    return right / len(true), len(said) - right


def event_of(article: str) -> dict[str, str] | None:
    """Return who, what, where and when of the first sentence that tells all four.

    The sentence may have any of the three forms of `articles.parse_event`. It is read from the article alone,
    never from the judge's record. Returns None where no sentence tells all four. Lesson 4.
    """
    for sentence in split_sentences(article):
        event = parse_event(sentence)
        if event and all(vars(event).values()):
            return dict(vars(event))
    return None


def summary_facts(article: str, summary: str) -> SummaryFacts:
    """Compare the claims of a summary with its article; faithfulness = right claims / claims.

    An article of the world: claims are the slots of the summary's event sentences (of two values for a slot
    the wrong one counts: hedging does not pay) and its other sentences; those that the article holds word by
    word are true and cover nothing, any other is made up.

    Any other article, by an approximation that knows words and not meaning: covered is the share of its KEYS
    most frequent content words, names and numbers that the summary says; made up is each name (a capital
    inside a sentence) and number that the article lacks. It sees no swapped roles, no denial, no paraphrase,
    and misses a made-up name that opens a sentence. A blank summary scores 0. Lesson 4.
    """
    event = event_of(article)
    right, total, wrong = _event_claims(event, article, summary) if event else _word_claims(article, summary)
    faithful = right / (right + wrong) if right + wrong else 0.0
    return SummaryFacts(right / total if total else 0.0, faithful, wrong)


def _event_claims(event: dict[str, str], article: str, summary: str) -> tuple[int, int, int]:
    told: dict[str, str | None] = {}
    held, stray = set(split_sentences(article)), 0
    for sentence in split_sentences(summary):
        if found := parse_event(sentence):
            for slot, value in vars(found).items():
                if told.get(slot) in (None, event[slot]) and value is not None:
                    told[slot] = value
        else:
            stray += sentence not in held
    coverage, wrong = fact_scores(told, event)
    return round(coverage * len(event)), len(event), wrong + stray


def _word_claims(article: str, summary: str) -> tuple[int, int, int]:
    words = [word.lower() for word in _WORD.findall(article)]
    content = [w for w in words if w not in ENGLISH_STOP_WORDS and (len(w) > 3 or w.isdigit())]
    keys = {word for word, _ in Counter([*content, *_named(article)]).most_common(KEYS)}
    said = {word.lower() for word in _WORD.findall(summary)}
    return len(keys & said), len(keys), len(_named(summary) - set(words))


def _named(text: str) -> set[str]:
    """Names (a capital inside a sentence) and numbers of a text, in lower case."""
    found = set()
    for sentence in split_sentences(text):
        for place, word in enumerate(_WORD.findall(sentence)):
            if word[0].isdigit() or (place and word[0].isupper() and word != "I"):
                found.add(word.lower())
    return found

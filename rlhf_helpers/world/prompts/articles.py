"""Articles to summarise: one event, told with details that a summary leaves out."""

import random
import re
from dataclasses import dataclass, replace

from rlhf_helpers.world.prompts.base import Prompt
from rlhf_helpers.world.tables import load_table

_ARTICLES = load_table("world/articles")
WHO, WHAT, WHERE, WHEN, DETAILS = (_ARTICLES[slot] for slot in ("who", "what", "where", "when", "details"))
_DEED = r"(?P<who>\w+ the \w+) (?P<what>\w+ an? \w+)"
_WHERE = r" in (?P<where>\w+)"
_WHEN = r" on (?P<when>\w+day)"
# The three forms in which an article tells its event; a summary may leave out a slot that follows the deed.
_FORMS = (
    re.compile(rf"{_DEED}(?:{_WHERE})?(?:{_WHEN})?\."),
    re.compile(rf"On (?P<when>\w+day), {_DEED}(?:{_WHERE})?\."),
    re.compile(rf"In (?P<where>\w+), {_DEED}(?:{_WHEN})?\."),
)


@dataclass(frozen=True)
class Event:
    """Who did what, where and when."""

    who: str
    what: str
    where: str | None
    when: str | None

    def sentence(self) -> str:
        """The event in one sentence; a slot that is None is left out."""
        where = f" in {self.where}" if self.where else ""
        when = f" on {self.when}" if self.when else ""
        return f"{self.who} {self.what}{where}{when}."


def parse_event(sentence: str) -> Event | None:
    """Read the event that one sentence tells, in any of the three forms of an article or shortened.

    A slot that the sentence leaves out is None. Returns None where the sentence tells no event.
    """
    for form in _FORMS:
        if match := form.fullmatch(sentence):
            slots = match.groupdict()
            return Event(slots["who"], slots["what"], slots.get("where"), slots.get("when"))
    return None


def make_article(rng: random.Random, split: str = "train") -> Prompt:
    """A new article. Held-out articles pair who and what as no training article does."""
    while True:
        i, j = rng.randrange(len(WHO)), rng.randrange(len(WHAT))
        if ((i + j) % 5 == 0) == (split == "heldout"):
            break
    event = Event(WHO[i], WHAT[j], rng.choice(WHERE), rng.choice(WHEN))
    details = rng.sample(DETAILS, 3)
    told = (
        event.sentence(),
        f"On {event.when}, {event.who} {event.what} in {event.where}.",
        f"In {event.where}, {event.who} {event.what} on {event.when}.",
    )
    before = details[2:] if rng.random() < 0.3 else []
    # another person in the text: the trap for summaries that only look faithful
    other = rng.choice([w for w in WHO if w != event.who])
    after = [*details[:2], f"{other} was there too."]
    text = "Summarise this article. " + " ".join([*before, rng.choice(told), *after])
    slots = {"event": event, "details": (*before, *after)}
    return Prompt(text, "article", "summary", split, ((event.sentence(),),), slots=slots)


def write_summary(rng: random.Random, prompt: Prompt, quality: str | None) -> str:
    """A summary of the given quality; None: as the unaligned assistant writes."""
    event: Event = prompt.slots["event"]
    level = quality or rng.choices(("high", "medium", "low"), (0.45, 0.35, 0.2))[0]
    if level == "high":
        return event.sentence()
    if level == "medium":
        where, when = rng.choice(((event.where, None), (None, event.when), (None, None)))
        told = replace(event, where=where, when=when)
        details = prompt.slots["details"]
    else:
        told = replace(event, where=rng.choice(WHERE), when=rng.choice(WHEN))
        if quality == "low" and rng.random() < 0.5:
            told = replace(told, who=rng.choice(WHO))
        details = DETAILS
    extra = rng.sample(details, 1) if rng.random() < 0.5 else []
    return " ".join([told.sentence(), *extra])

"""What a summary is worth: facts told rightly, and the weights of a reward that chooses well."""

from rlhf_helpers.lab.exercises.exercise import Function, each, exercise
from rlhf_helpers.summarization_rl.facts import fact_scores
from rlhf_helpers.summarization_rl.rewards import ComparisonReward

Weights = dict[str, float]


ARTICLE = (
    "In Oslo, Gia the singer bought a horse on Wednesday. It rained in the morning. "
    "The weather stayed warm all day. Cleo the pilot was there too."
)
FULL = "Gia the singer bought a horse in Oslo on Wednesday."
DETAILS = ARTICLE.split(". ", 1)[1]
SUMMARIES = {
    "all facts": FULL,
    "all facts and a detail": f"{FULL} It rained in the morning.",
    "all facts and three details": f"{FULL} {DETAILS}",
    "all facts and one made up": f"{FULL} The street was full of music.",
    "three facts": "Gia the singer bought a horse in Oslo.",
    "two facts": "Gia the singer bought a horse.",
    "a wrong place": "Gia the singer bought a horse in Lima on Wednesday.",
}


def summary_weights() -> Weights:
    """Give weights whose choice is the one that gold prefers, in each pair of the exercise."""
    return {"coverage": 1.0, "faithfulness": 0.0, "nothing_made_up": 3.0, "ten_words": -0.2}


def preferred(weights: Function, first: str, second: str) -> str:
    """Say which of two SUMMARIES of one article a reward with these weights prefers; "neither" in a tie."""
    texts, chosen = [SUMMARIES[first], SUMMARIES[second]], weights()
    if chosen is None or chosen is ...:
        return chosen  # for the verdict to say what is missing
    one, other = ComparisonReward({name: float(x) for name, x in chosen.items()})(
        ["", ""], texts, article=[ARTICLE] * 2
    ).tolist()
    return "neither" if one == other else first if one > other else second


def _with(**changes: float) -> Function:
    return lambda: summary_weights() | changes


TRUE = {"who": "the mayor", "what": "opened a bridge", "where": "in the north", "when": "on Monday"}
MATCH = {"team": "Lund", "city": "Lund", "year": "1990"}  # other slots, and one value in two of them

EXERCISES = {
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
        lambda hits, faults: (hits, faults),
        "return first the coverage, then the number of slots told wrongly: they are swapped, or one is "
        "missing",
        lambda right: right[::-1],
        lambda coverage: coverage,
        "wrong facts lowered the coverage: the two are measured apart",
        lambda coverage, faults: (0.0 if faults else coverage, faults),
        lambda hits, faults, slots: ((hits - faults) / slots, faults),
        "count the slots told WRONGLY: not those left out, not all that were told, not whether there is any",
        lambda coverage, slots, said: (coverage, slots - said),
        lambda coverage, said: (coverage, said),
        *each(lambda kind, coverage, faults: (coverage, kind(faults > 0)), bool, int),
        "a value of ANOTHER slot was accepted: compare slot by slot with ==",
        lambda told, true: fact_scores(
            {slot: true[slot] if said in true.values() else said for slot, said in told.items()}, true
        ),
        "slots were compared by their order in the dicts: look them up by name",
        lambda told, true: fact_scores(dict(zip(true, told.values(), strict=True)), true),
        coverage=lambda right: right[0],
        faults=lambda right: right[1],
        slots=lambda true: len(true),
        hits=lambda coverage, slots: round(coverage * slots),
        said=lambda hits, faults: hits + faults,
    ),
    "summary_weights": exercise(
        summary_weights,
        [
            ("all facts", "all facts and a detail"),
            ("all facts", "three facts"),
            ("three facts", "all facts and a detail"),
            ("all facts and three details", "two facts"),
            ("two facts", "a wrong place"),
            ("all facts and one made up", "two facts"),
        ],
        "words are still paid for, so a needless detail wins: ten_words must be below 0",
        *each(lambda pay: _with(ten_words=pay)(), 0.05, 0.17, 0.5, 1.0),
        _with(nothing_made_up=1.5, ten_words=4.67),
        "words cost nothing, so of two summaries with the same facts neither is better",
        _with(ten_words=0.0),
        "words cost more than a fact is worth (or a fact is worth nothing), so facts are left out",
        *each(lambda cost: _with(ten_words=cost)(), -0.5, -1.0, -3.0),
        "what is made up costs less than the facts earn, so a wrong place wins",
        _with(nothing_made_up=0.0),
        trial=preferred,
    ),
}

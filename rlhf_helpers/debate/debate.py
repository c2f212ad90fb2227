"""Debate: two models argue, and a weak judge who reads their quotes but never the passage decides.

The judge's form (`world.prompts.meta.judge_text`) holds one argument per side, so a debate is one round of
simultaneous openings; rebuttals would need a judge that was taught to read them.
"""

import copy
import itertools
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from rlhf_helpers.alignment_eval import sample_answers
from rlhf_helpers.core.choices import choice_logps
from rlhf_helpers.core.models import tokenizer_for
from rlhf_helpers.core.stats import Estimate, proportion
from rlhf_helpers.core.training import History
from rlhf_helpers.policy_optimization import RLOOSettings, rloo
from rlhf_helpers.world.prompts import meta

# passage, question, true, false: as `world.prompts.meta.make_passage` writes them
Passage = Mapping[str, str]
Speaker = Judge = nn.Module
SIDES = ("true", "false")


@dataclass(frozen=True)
class Argument:
    """What one side said, and whether its quote stands in the passage."""

    said: str
    verified: bool


@dataclass(frozen=True)
class DebateRecord:
    """One question: the arguments (None: silent), and the judge's probability of the true claim."""

    passage: Passage
    honest: Argument | None
    dishonest: Argument | None
    probability: float


def make_passages(n: int, *, split: str = "train", seed: int = 0) -> list[Passage]:
    """Write `n` passages of three facts, each with a question, its true and a false answer."""
    rng = random.Random(f"debate/{split}/{seed}")
    return [meta.make_passage(rng, split) for _ in range(n)]


def quotes_truly(said: str, passage: str) -> bool:
    """Whether the passage contains, character by character, what stands between the first quotation marks.

    True says that the words are there, not that they bear on the question. A blank quote is none. Lesson 3.
    """
    found = re.search(r'"(.*?)"', said, re.S)
    return bool(found and found[1].strip()) and found[1] in passage


def judge_odds(
    judge: Judge,
    passages: Sequence[Passage],
    first: Sequence[Argument | None],
    second: Sequence[Argument | None],
    claims: tuple[str, str] = SIDES,
) -> Float[Tensor, "B"]:
    """Compute the log-odds (B,), in nats, that the judge gives the first claim over the second.

    (l(first is A) - l(first is B)) / 2,  l = log p("A") - log p("B")

    Both orders are averaged, so what the judge adds for a letter cancels. It reads question, claims,
    arguments and their check, never the passage; a silent side has no line. claims: the passages' keys of the
    two. Irving et al. 2018. Lesson 3.
    """
    given = [_judge_text(*row, claims) for row in zip(passages, first, second, strict=True)]
    swapped = [_judge_text(*row, claims[::-1]) for row in zip(passages, second, first, strict=True)]
    logps = choice_logps(judge, tokenizer_for(judge), given + swapped, ("A", "B"))
    given_odds, swapped_odds = (logps[:, 0] - logps[:, 1]).view(2, -1)
    return (given_odds - swapped_odds) / 2


def _judge_text(passage: Passage, a: Argument | None, b: Argument | None, claims: tuple[str, str]) -> str:
    # Folded to one line: a debater must not write the other side's line.
    turns = [(" ".join(x.said.split()), x.verified) if x else ("", False) for x in (a, b)]
    lines = meta.judge_text(passage["question"], *(passage[claim] for claim in claims), turns).split("\n")
    silent = tuple(f"{letter} argues:" for letter, x in (("A", a), ("B", b)) if x is None)
    return "\n".join(line for line in lines if not line.startswith(silent))


def argue(speaker: Speaker, passages: Sequence[Passage], claim: str, *, seed: int = 0) -> list[Argument]:
    """Sample one argument per passage for its answer `claim` ("true" or "false"), at most 48 tokens."""
    prompts = [meta.argue_text(p["passage"], p["question"], p[claim]) for p in passages]
    return check_quotes(passages, sample_answers(speaker, prompts, max_new_tokens=48, seed=seed))


def check_quotes(passages: Sequence[Passage], responses: Sequence[str]) -> list[Argument]:
    """Make arguments of what was said about each passage, their quotes checked."""
    return [Argument(x, quotes_truly(x, p["passage"])) for p, x in zip(passages, responses, strict=True)]


def run_debates(
    passages: Sequence[Passage],
    *,
    judge: Judge,
    honest: Speaker | None = None,
    dishonest: Speaker | None = None,
    seed: int = 0,
) -> list[DebateRecord]:
    """Hold one debate per passage: `honest` argues for its true answer, `dishonest` for its false one.

    None is silent: both silent is no debate, one silent is consultancy (a single adviser; Michael et al.
    2023). Irving et al. 2018. Lesson 3. Raises ValueError for no passage.
    """
    if not passages:
        raise ValueError("passages is empty: give at least one, make_passages(n) writes some")
    silence = [None] * len(passages)
    true = argue(honest, passages, "true", seed=2 * seed) if honest else silence
    false = argue(dishonest, passages, "false", seed=2 * seed + 1) if dishonest else silence
    chances = judge_odds(judge, passages, true, false).sigmoid().tolist()
    return [DebateRecord(*row) for row in zip(passages, true, false, chances, strict=True)]


def debate_summary(records: Sequence[DebateRecord]) -> dict[str, Estimate]:
    """judge_accuracy (undecided: 1/2), honest_verified, dishonest_verified, with Wilson's 95 % intervals.

    honest_verified: of the arguments for the truth, the share whose quote stands in the passage; a silent
    side has no entry. Lesson 3. Raises ValueError for no record.
    """
    summary = {"judge_accuracy": proportion([(np.sign(r.probability - 0.5) + 1) / 2 for r in records])}
    for side in ("honest", "dishonest"):
        arguments = [getattr(record, side) for record in records]
        if any(arguments):
            summary[f"{side}_verified"] = proportion([argument.verified for argument in arguments])
    return summary


def transcript(record: DebateRecord) -> str:
    """Write a debate down to read: the passage (which the judge never sees), the arguments, the verdict."""
    lines = [record.passage["passage"], record.passage["question"]]
    for side in ("honest", "dishonest"):
        if argument := getattr(record, side):
            lines.append(f"{side}: {argument.said} [{'' if argument.verified else 'not '}verified]")
    return "\n".join([*lines, f"judge: {record.probability:.2f} for {record.passage['true']}, the truth"])


def train_debater(
    model: nn.Module,
    passages: Sequence[Passage],
    judge: Judge,
    settings: RLOOSettings,
    *,
    side: str,
    opponent: Speaker,
) -> tuple[nn.Module, History]:
    """Train a copy of `model` by RLOO to win: reward = the judge's probability for its own claim.

    The verdict is all the reward there is: no gold, nothing about honesty. Irving et al. 2018. Lesson 3.

    Args:
        model: The debater as it starts; it is not changed.
        passages: What is debated.
        judge: Decides.
        settings: Of RLOO.
        side: Which answer the copy learns to argue for: "true" or "false".
        opponent: Argues for the other answer, and does not learn.

    Raises:
        ValueError: The side is unknown.
    """
    if side not in SIDES:
        raise ValueError(f"side={side!r}: choose from {SIDES}")
    other = SIDES[1 - SIDES.index(side)]
    policy = copy.deepcopy(model)
    seeds = itertools.count(1_000_003 * (settings.seed + 1))  # of the opponent, one per step

    def win(_: list[str], responses: list[str], *, passage: list[Passage]) -> Tensor:
        own = check_quotes(passage, responses)
        theirs = argue(opponent, passage, other, seed=next(seeds))
        return judge_odds(judge, passage, own, theirs, (side, other)).sigmoid()

    prompts = [meta.argue_text(p["passage"], p["question"], p[side]) for p in passages]
    columns = {"passage": passages}
    return policy, rloo(policy, tokenizer_for(policy), prompts, win, settings, columns=columns)

"""Debate: two models argue, a weak judge decides, who reads their quotes and never the passage.

The judge's form (`world.prompts.meta.judge_text`) holds one argument a side, so a debate is one round of
simultaneous openings; rebuttals would need a judge that was taught to read them.
"""

import copy
import itertools
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlhf_helpers.core.choices import choice_logps
from rlhf_helpers.core.generation import generate
from rlhf_helpers.core.models import tokenizer_for
from rlhf_helpers.core.training import History
from rlhf_helpers.policy_optimization import RLOOSettings, rloo
from rlhf_helpers.preference_data.quality import Estimate
from rlhf_helpers.reward_model import accuracy
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
    """`n` passages of three facts, each with a question, its true and a false answer."""
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
    """Log-odds (B,), in nats, that the judge gives the first claim over the second, both orders averaged.

    (l(first is A) - l(first is B)) / 2,  l = log p("A") - log p("B")

    What the judge adds for a letter cancels. It reads question, claims, arguments and their check, never the
    passage; a silent side has no line. claims: the passages' keys of the two. Irving et al. 2018. Lesson 3.
    """
    sides = [(first, claims[0]), (second, claims[1])]
    asked = [
        _judge_text(p, (a[0][i], b[0][i]), (p[a[1]], p[b[1]]))
        for a, b in (sides, sides[::-1])
        for i, p in enumerate(passages)
    ]
    logps = choice_logps(judge, tokenizer_for(judge), asked, ("A", "B"))
    as_given, swapped = (logps[:, 0] - logps[:, 1]).view(2, -1)
    return (as_given - swapped) / 2


def _judge_text(passage: Passage, arguments: tuple[Argument | None, ...], claims: tuple[str, str]) -> str:
    # Folded to one line: a debater must not write the other side's line.
    said = {s: " ".join(a.said.split()) for s, a in zip("AB", arguments, strict=True) if a}
    turns = tuple((said.get(s, ""), bool(a and a.verified)) for s, a in zip("AB", arguments, strict=True))
    lines = meta.judge_text(passage["question"], *claims, turns).split("\n")
    silent = tuple(f"{s} argues:" for s in "AB" if s not in said)
    return "\n".join(line for line in lines if not line.startswith(silent))


def argue(speaker: Speaker, passages: Sequence[Passage], claim: str, *, seed: int = 0) -> list[Argument]:
    """One argument a passage for its answer `claim` ("true" or "false"), at most 48 tokens, quote checked."""
    asked = [meta.argue_text(p["passage"], p["question"], p[claim]) for p in passages]
    rollout = generate(speaker, tokenizer_for(speaker), asked, max_new_tokens=48, seed=seed)
    return _checked(passages, rollout.responses)


def _checked(passages: Sequence[Passage], said: Sequence[str]) -> list[Argument]:
    return [Argument(x, quotes_truly(x, p["passage"])) for p, x in zip(passages, said, strict=True)]


def run_debates(
    passages: Sequence[Passage],
    *,
    judge: Judge,
    honest: Speaker | None = None,
    dishonest: Speaker | None = None,
    seed: int = 0,
) -> list[DebateRecord]:
    """One record a passage: `honest` argues for its true answer, `dishonest` for its false one.

    None is silent: both silent is no debate, one silent is consultancy (a single adviser; Michael et al.
    2023). Irving et al. 2018. Lesson 3. Raises ValueError for no passage.
    """
    if not passages:
        raise ValueError("passages is empty: give at least one, make_passages(n) writes some")
    said = [
        argue(speaker, passages, side, seed=2 * seed + place) if speaker else [None] * len(passages)
        for place, (speaker, side) in enumerate(zip((honest, dishonest), SIDES, strict=True))
    ]
    chances = judge_odds(judge, passages, *said).sigmoid().tolist()
    return [DebateRecord(*row) for row in zip(passages, *said, chances, strict=True)]


def debate_summary(records: Sequence[DebateRecord]) -> dict[str, Estimate]:
    """judge_accuracy (undecided: 1/2), honest_verified, dishonest_verified, with Wilson's 95 % intervals.

    honest_verified: of the arguments for the truth, the share whose quote stands in the passage; a silent
    side has no entry. Lesson 3. Raises ValueError for no record.
    """
    chances = torch.tensor([r.probability for r in records], dtype=torch.float64)
    found = {"judge_accuracy": accuracy((chances > 0.5) + 0.5 * (chances == 0.5))}
    for side in ("honest", "dishonest"):
        if said := [a for r in records if (a := getattr(r, side)) is not None]:
            found[f"{side}_verified"] = accuracy(torch.tensor([float(a.verified) for a in said]))
    return found


def transcript(record: DebateRecord) -> str:
    """A debate to read: the passage (which the judge never sees), the arguments, the verdict."""
    lines = [record.passage["passage"], record.passage["question"]]
    for side in ("honest", "dishonest"):
        if argument := getattr(record, side):
            lines.append(f"{side}: {argument.said} [{'' if argument.verified else 'not '}verified]")
    return "\n".join([*lines, f"judge: {record.probability:.2f} for {record.passage['true']}, the truth"])


def train_debater(
    model: nn.Module, passages: Sequence[Passage], judge: Judge, settings: RLOOSettings,
    *, sides: Sequence[str] = SIDES, opponent: Speaker | None = None,
) -> tuple[nn.Module, History]:  # fmt: skip
    """A copy of `model` trained by RLOO to win: reward = the judge's probability for one's own claim.

    The verdict is all the reward there is: no gold, nothing about honesty. sides: which answers it learns to
    argue for, "true", "false" or both. opponent: who argues for the other answer; None: the policy itself as
    it is trained (self-play). Irving et al. 2018. Lesson 3. Raises ValueError for an unknown side or none.
    """
    if not sides or not set(sides) <= set(SIDES):
        raise ValueError(f"sides={list(sides)!r}: name one or both of {list(SIDES)}")
    policy, calls = copy.deepcopy(model), itertools.count(1_000_003 * (settings.seed + 1))
    rows = [(p, side) for p in passages for side in sides]

    def win(_: list[str], responses: list[str], *, case: list[Passage], side: list[str]) -> Tensor:
        odds, seed = torch.empty(len(responses)), next(calls)
        for mine, other in (SIDES, SIDES[::-1]):
            if places := [i for i, s in enumerate(side) if s == mine]:
                held = [case[i] for i in places]
                own = _checked(held, [responses[i] for i in places])
                theirs = argue(policy if opponent is None else opponent, held, other, seed=seed)
                odds[places] = judge_odds(judge, held, own, theirs, (mine, other))
        return odds.sigmoid()

    prompts = [meta.argue_text(p["passage"], p["question"], p[side]) for p, side in rows]
    columns = {"case": [p for p, _ in rows], "side": [side for _, side in rows]}
    return policy, rloo(policy, tokenizer_for(policy), prompts, win, settings, columns=columns)

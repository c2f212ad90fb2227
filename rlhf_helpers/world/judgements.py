"""Critiques, comparisons and revisions of answers, labelled by the gold judge.

Their prompts are texts about other prompts (templates in `prompts.meta`), so the judge reads them back:
`parse` finds the question and the answers inside, and the truth about those is the truth about the prompt.
"""

import random
import re
from dataclasses import replace

from rlhf_helpers.world.prompts import CONVERSATION, find_prompt, load_prompts, meta, sample_answer
from rlhf_helpers.world.prompts.base import RUDE, Prompt, split_sentences
from rlhf_helpers.world.scoring import AXES, reward_of, score_answer

_CRITIQUE = re.compile(r"Question: (.*)\nAnswer: (.*)\nRule: (.*)\.\nDoes the answer follow the rule\?", re.S)
_COMPARISON = re.compile(r"Question: (.*)\nA: (.*)\nB: (.*)\nWhich answer is (?:more )?(\w+), A or B\?", re.S)
_REVISION = re.compile(r"Question: (.*)\nAnswer: (.*)\nCritique: (.*)\nWrite a better answer\.", re.S)
# An answer follows a rule where its score on the rule's axis is at least this.
GOOD_ENOUGH = {"helpful": 0.4, "harmless": 0.75, "honest": 0.75, "respectful": 1.0}
# A comparison is asked for only where the better answer is better by more than this.
CLEAR_GAP = 0.2


def follows(question: str, answer: str, axis: str) -> bool:
    """True where the gold judge finds that `answer` follows a rule about `axis`."""
    return axis_score(question, answer, axis) >= GOOD_ENOUGH[axis]


def axis_score(question: str, answer: str, axis: str) -> float:
    """The gold score of an answer on "helpful", "harmless", "honest", "respectful" or "better" (reward)."""
    prompt = resolve(question)
    if axis == "respectful":
        return float(not any(s in RUDE for s in split_sentences(answer)))
    scores = score_answer(prompt, answer)
    if axis == "better":
        return reward_of(prompt, scores)
    helpful, harmless, _ = scores
    if axis == "helpful":  # to be of help within bounds: a good refusal helps, complying with harm does not
        return float(harmless > 0) * min(1.0, helpful / (0.5 if prompt.must_refuse else 1.0))
    return scores[AXES.index(meta.AXES[axis])]


def resolve(text: str) -> Prompt:
    """The world's prompt behind `text`: a known one, or a critique, comparison or revision of known ones."""
    return parse(text) or find_prompt(text)


def make_critique(rng: random.Random, split: str | None = None) -> Prompt:
    """A prompt that asks whether an answer follows a rule; about half of them do."""
    principle, axis = rng.choice(list(meta.PRINCIPLES.items()))
    wanted = rng.random() < 0.5
    for _ in range(20):
        question = _question(rng, split)
        answer = _answer(rng, question)
        if axis == "respectful" and not wanted:
            answer = f"{rng.choice(RUDE)} {answer}"
        if follows(question.text, answer, axis) == wanted:
            break
    return parse(meta.critique_text(question.text, answer, principle), split)


def make_comparison(rng: random.Random, split: str | None = None) -> Prompt:
    """A prompt that asks which of two answers is better on an axis; never a tie."""
    while True:
        question = _question(rng, split)
        axis = rng.choice(("better", "better", "helpful", "harmless", "honest"))
        first, second = _answer(rng, question), _answer(rng, question)
        gap = axis_score(question.text, first, axis) - axis_score(question.text, second, axis)
        if abs(gap) > CLEAR_GAP:
            return parse(meta.comparison_text(question.text, first, second, axis), split)


def make_revision(rng: random.Random, split: str | None = None) -> Prompt:
    """A prompt that shows an answer with its critique and asks for a better one."""
    question = _question(rng, split)
    answer = _answer(rng, question)
    axis = rng.choice(tuple(GOOD_ENOUGH))
    critique = meta.critique_answer(follows(question.text, answer, axis), axis)
    return parse(meta.revision_text(question.text, answer, critique), split)


def parse(text: str, split: str | None = None) -> Prompt | None:
    """The prompt behind the text of a critique, comparison or revision; None where it is none of them."""
    split = split or "train"
    if match := _CRITIQUE.fullmatch(text):
        question, answer, principle = match.groups()
        if principle not in meta.PRINCIPLES:
            known = list(meta.PRINCIPLES)
            raise ValueError(f"the world does not judge the rule {principle!r}; choose from {known}")
        axis = meta.PRINCIPLES[principle]
        good = follows(question, answer, axis)
        right, wrong = meta.critique_answer(good, axis), meta.critique_answer(not good, axis)
        points, wrong = tuple((s,) for s in split_sentences(right)), (*split_sentences(wrong), wrong)
        return Prompt(text, "critique", axis, split, points, wrong=wrong, slots={"good": good})
    if match := _COMPARISON.fullmatch(text):
        question, first, second, axis = match.groups()
        better = axis_score(question, first, axis) >= axis_score(question, second, axis)
        right, wrong = ("A", "B") if better else ("B", "A")
        return Prompt(text, "comparison", axis, split, ((right,),), wrong=(wrong,), lures=(wrong,))
    if match := _REVISION.fullmatch(text):
        asked = find_prompt(match[1])
        slots = {**asked.slots, "answer": match[2]}
        return replace(asked, text=text, family="revision", split=split, slots=slots, asked=asked.text)
    return None


def _question(rng: random.Random, split: str | None) -> Prompt:
    """A prompt to talk about: families weighted alike, jailbreaks left out (their request is one of them)."""
    family = rng.choice([f for f in CONVERSATION if f not in ("jailbreak", "dialogue")])
    return rng.choice(load_prompts((family,), split))


def _answer(rng: random.Random, question: Prompt) -> str:
    return sample_answer(question, rng, rng.choice((None, None, "high", "medium", "low")))

"""Procedures around models: a round of revisions, rows to harden with, a guard, a step of a search.

The models of the probes follow a script, so that what comes out tells which of them were asked, and for what.
"""

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, tensor

from rlhf_helpers.lab.exercises.exercise import Function, Probe, exercise
from rlhf_helpers.lab.exercises.scripted import Scripted, WrongCall

Finding = Mapping[str, Any]


def critique_round(
    prompt: str,
    answer: str,
    p_follows: Function,
    criticize: Function,
    revise: Function,
    max_rounds: int,
) -> str:
    """Critique and revise an answer until P(follows) is above 0.5, at most `max_rounds` times."""
    for _ in range(max_rounds):
        if p_follows(prompt, answer) > 0.5:
            break
        answer = revise(prompt, answer, criticize(prompt, answer))
    return answer


def hardening_rows(
    findings: Sequence[Finding], own_answers: Mapping[str, Sequence[tuple[str, float]]], refusal: str
) -> list[dict[str, str]]:
    """Pair each attack that succeeded with the safest own answer to its request, or with a fixed refusal."""
    rows = []
    for row in findings:
        if row["success"]:
            text, safety = max(own_answers[row["base_prompt"]], key=itemgetter(1))
            taught = {"prompt": row["prompt"], "completion": text if safety >= 0.5 else refusal}
            if taught not in rows:
                rows.append(taught)
    return rows


def guarded_answer(
    prompt: str,
    input_check: Function,
    model: Function,
    output_check: Function,
    threshold: float,
    fallback: str,
) -> str:
    """Answer behind two checks: the fallback where one finds P(safe) < threshold, or fails."""
    try:
        if input_check(prompt) < threshold:
            return fallback
        answer = model(prompt)
        return answer if output_check(prompt, answer) >= threshold else fallback
    except Exception:
        return fallback


def gcg_step(tokens: Tensor, gradient: Tensor, losses_of: Function, top_k: int) -> Tensor:
    """Swap one token (T,): of `top_k` proposals for each position, take the one of the lowest loss."""
    proposals = gradient.topk(top_k, largest=False).indices
    candidates = tokens.repeat(*proposals.shape, 1)  # (T, top_k, T)
    for position, row in enumerate(proposals):
        candidates[position, :, position] = row
    candidates = candidates.flatten(0, 1)
    return candidates[losses_of(candidates).argmin()]


def _revising(*chances: float, rounds: int) -> Probe:
    """Script a reviser whose drafts 0, 1, ... have these chances, and the next one 0.9."""
    drafts = {f"draft {number}": p for number, p in enumerate((*chances, 0.9))}

    def chance(prompt: str, answer: str) -> float:
        if prompt != "a request":
            raise WrongCall(f"p_follows was asked about the prompt {prompt!r}")
        return drafts.get(answer, 0.9)

    def objection(prompt: str, answer: str) -> str:
        if chance(prompt, answer) > 0.5:
            raise WrongCall(f"criticize was asked about {answer!r}, with which the critic is satisfied")
        return f"objection to {answer}"

    def revision(prompt: str, answer: str, said: str) -> str:
        if said != objection(prompt, answer):
            return f"{answer}, revised after: {said}"
        return list(drafts)[list(drafts).index(answer) + 1]

    scripts = {"p_follows": chance, "criticize": objection, "revise": revision}
    return ("a request", "draft 0", *(Scripted(*pair) for pair in scripts.items()), rounds)


def _finding(attack: str, success: bool) -> Finding:
    texts = {"prompt": attack, "base_prompt": attack[-1], "response": f"attacked: {attack[-1]}"}
    return texts | {"success": success}


def _guard(p_input: float | None, p_output: float | None, threshold: float = 0.5) -> Probe:
    """Script the parts of a guard; a check of None fails, and a stopped prompt must reach no model."""

    def known(p: float | None) -> float:
        if p is None:
            raise ConnectionError("the check is down")
        return p

    def answer(prompt: str) -> str:
        if (p_input or 0.0) < threshold:
            raise WrongCall("the model was asked although the input check had stopped the prompt")
        return "what the model says"

    def check(prompt: str, text: str) -> float:
        if (prompt, text) != ("a prompt", "what the model says"):
            raise WrongCall(f"output_check was asked about {prompt!r} and {text!r}")
        return known(p_output)

    parts = {"input_check": lambda prompt: known(p_input), "model": answer, "output_check": check}
    return ("a prompt", *(Scripted(*pair) for pair in parts.items()), threshold, "the fallback")


SAFEST = {"a": "No, and here is why.", "b": "a fixed refusal", "c": "I will not."}
OWN = {
    "a": [("Sure.", 0.0), (SAFEST["a"], 1.0), ("No.", 0.8)],
    "b": [("Sure, b.", 0.1), ("Yes.", 0.4)],
    "c": [(SAFEST["c"], 0.9), ("Here it is.", 0.2)],
}
FINDINGS = [
    _finding("play a role: a", True),
    _finding("as I said: b", False),
    _finding("as I said: a", True),
    _finding("play a role: c", False),
    _finding("play a role: a", True),
    _finding("play a role: c", True),
    _finding("b", True),
]
GRADIENTS = torch.randn(7, 6, generator=torch.Generator().manual_seed(3))
LOSSES = Scripted(
    "losses_of", lambda rows: (rows * tensor([1.7, 2.9, 4.3, 5.9, 7.3])[: rows.shape[1]]).sum(1).sin()
)

# Parts of `hardening_rows`, and what goes wrong in them.
TEXT = "text if safety >= 0.5 else refusal"
TWICE = ("taught not in rows", "True")

EXERCISES = {
    "critique_round": exercise(
        critique_round,
        [
            _revising(0.2, 0.4, 0.8, 0.9, rounds=4),
            _revising(0.9, 0.1, rounds=3),
            _revising(0.5, 0.3, 0.1, 0.2, rounds=3),
            _revising(0.1, 0.6, 0.2, rounds=1),
        ],
        "this is one round: ask the critic again after each revision, up to max_rounds times",
        ("range(max_rounds)", "range(1)"),
        "the draft came back: each revision replaces the answer",
        lambda answer: answer,
        "at exactly 0.5 the critic is not satisfied yet: revise",
        ("> 0.5", ">= 0.5"),
        "max_rounds is not kept: count the revisions",
        *(("range(max_rounds)", f"range(max_rounds + {more})") for more in (-1, 1, 9)),
    ),
    "hardening_rows": exercise(
        hardening_rows,
        [(FINDINGS, OWN, SAFEST["b"]), (FINDINGS[1:4], OWN, SAFEST["b"]), (FINDINGS[4:], OWN, SAFEST["b"])],
        "these are rows of ALL attacks: train on those that succeeded",
        ('row["success"]', "True"),
        ('row["success"]', "True", *TWICE),
        "these are the attacks that FAILED: the model resists them already",
        ('row["success"]', 'not row["success"]'),
        "an attack that succeeded twice has two rows: one is enough",
        TWICE,
        "the completion is the answer that the attack got: this trains the harm",
        (TEXT, 'row["response"]'),
        (TEXT, 'row["response"]', *TWICE),
        "the prompt is the plain request: train on the attack that got through",
        ('row["prompt"]', 'row["base_prompt"]'),
        ('row["prompt"]', 'row["base_prompt"]', *TWICE),
        "every completion is the fixed refusal: where an own answer is safe, it teaches more",
        (TEXT, "refusal"),
        "an own answer below 0.5 is not safe: take the fixed refusal there",
        (TEXT, "text"),
        "this is not the safest of the own answers",
        (TEXT, 'own_answers[row["base_prompt"]][0][0]'),
        (TEXT, "text", "max(", "min("),
    ),
    "guarded_answer": exercise(
        guarded_answer,
        [
            _guard(0.9, 0.8),
            _guard(0.2, 0.9),
            _guard(0.9, 0.3),
            _guard(0.7, 0.7, threshold=0.7),
            _guard(0.9, 0.6, threshold=0.7),
            _guard(0.9, None),
            _guard(None, 0.9),
        ],
        "the fallback is all it ever says: that is safe, and of no use to anybody",
        lambda fallback: fallback,
        "the answer was never checked: ask output_check before it is shown",
        ("output_check(prompt, answer) >= threshold", "True"),
        "a check that fails lets the answer through: show the fallback",
        (
            "Exception:\n        return fallback",
            "Exception:\n        return locals().get('answer', fallback)",
        ),
        "a text at the threshold is safe: the fallback is for P(safe) BELOW it",
        ("< threshold", "<= threshold", ">= threshold", "> threshold"),
    ),
    "gcg_step": exercise(
        gcg_step,
        [
            (tensor([0, 4, 0]), GRADIENTS[:3], LOSSES, 2),
            (tensor([1, 0, 2, 2, 1]), GRADIENTS[2:, :3], LOSSES, 2),
            (tensor([3, 3]), GRADIENTS[3:5], LOSSES, 3),
        ],
        "the proposals are the tokens of the LARGEST gradient: they raise the loss",
        ("largest=False", "largest=True"),
        "the gradient chose alone: it only proposes, and the exact loss of each candidate decides",
        ("losses_of(candidates)", "gradient.topk(top_k, largest=False).values.flatten()"),
        lambda tokens, gradient, top_k: gcg_step(
            tokens, gradient, lambda rows: gradient.gather(1, rows.T).sum(0), top_k
        ),
        "every position was swapped at once: a candidate differs in one token",
        lambda gradient: gradient.argmin(1),
        "the candidate of the HIGHEST loss was taken",
        ("argmin", "argmax"),
        "only one proposal per position was tried: there are top_k",
        ("topk(top_k", "topk(1"),
    ),
}

"""The inputs that answers are tried on, and the words that a learner reads: hints, messages, solutions."""

import ast
import copy
import json
import re
from pathlib import Path

import pytest
import torch

from rlhf_helpers.lab import judging
from rlhf_helpers.lab.checks import judge
from rlhf_helpers.lab.exercises import EXERCISES

LESSONS = sorted((Path(__file__).parents[2] / "notebooks").glob("0*.ipynb"))


def probes_of(name):
    return EXERCISES[name].probes


# ---- shapes: no axis can be taken for another one


MATRICES = [
    (name, k)
    for name, exercise in EXERCISES.items()
    for k, arg in enumerate(exercise.probes[0])
    if isinstance(arg, torch.Tensor) and arg.ndim == 2
]


@pytest.mark.parametrize("name, k", MATRICES)
def test_rows_and_columns_differ_both_ways(name, k):
    shapes = [tuple(probe[k].shape) for probe in probes_of(name)]
    assert any(rows > columns for rows, columns in shapes)
    assert any(rows < columns for rows, columns in shapes)
    assert len({columns - rows for rows, columns in shapes}) >= 3  # not always B = K - 1


@pytest.mark.parametrize("name", EXERCISES)
def test_batches_of_several_sizes(name):
    sizes = {
        len(arg) for probe in probes_of(name) for arg in probe if isinstance(arg, torch.Tensor) and arg.ndim
    }
    assert len(sizes) != 1


def test_our_own_functions_leave_probes_alone():
    """They get the probes themselves, not copies."""
    for exercise in EXERCISES.values():
        probes = exercise.probes
        before = copy.deepcopy(probes)
        for function in (exercise.reference, *(mistake.wrong for mistake in exercise.mistakes)):
            for probe in probes:
                judging._outcome(exercise.on_probes(function), probe)
        assert judging.same(probes, before)


def test_mistakes_name_only_what_there_is():
    """A name that is neither an argument nor a quantity raises KeyError."""
    for exercise in EXERCISES.values():
        for mistake in exercise.mistakes:
            outcomes = [
                judging._outcome(exercise.on_probes(mistake.wrong), probe) for probe in exercise.probes
            ]
            kinds = [outcome.kind for outcome in outcomes if isinstance(outcome, judging.Raised)]
            assert "KeyError" not in kinds


# ---- kinks: at each probe the gradient has one value, whichever way the loss is written


def margins(logps, *refs):
    return [logps - ref for ref in refs]


SWITCHES = {  # what a loss, written with max, abs or where, compares with 0
    "bradley_terry": lambda chosen, rejected: [chosen - rejected, chosen - rejected - 1],
    "last_token": lambda values, mask: [torch.ones(1)],
    "policy_gradient": lambda logps, advantages: [100 * logps, advantages],
    "clipped_loss": lambda logps, old, advantages, c: [
        advantages,
        *((logps - old).exp() - edge for edge in (1, 1 - c, 1 + c)),
    ],
    "repaired_loss": lambda logps, *others: [logps],
    "dpo_loss": lambda pc, pr, rc, rr, beta: [
        (margin := pc - pr - rc + rr),
        beta * margin - 1,
        margin - 1 / (2 * beta),
        pc - rc,
        pr - rr,
    ],
}
WITH_GRADIENT = {
    name
    for name, exercise in EXERCISES.items()
    if any(map(judging.is_floating, exercise.probes[0]))
    and any(g is not None for g in judging.gradients(exercise.reference, exercise.probes[0]))
}


def test_the_exercises_with_a_gradient_are_known():
    assert set(SWITCHES) == WITH_GRADIENT


@pytest.mark.parametrize("name", SWITCHES)
def test_no_probe_sits_on_a_kink(name):
    for probe in probes_of(name):
        for switch in SWITCHES[name](*probe):
            assert switch.abs().min() > 0.015


@pytest.mark.parametrize("name", SWITCHES)
def test_gradients_on_both_sides_of_a_probe_are_equal(name):
    draw = torch.Generator().manual_seed(0)
    for probe in probes_of(name):
        shifts = [1e-3 * torch.randn(a.shape, generator=draw) if judging.is_floating(a) else 0 for a in probe]
        sides = []
        for sign in (1, -1):
            moved = tuple(
                a + sign * s if judging.is_floating(a) else a for a, s in zip(probe, shifts, strict=True)
            )
            sides.append(judging.gradients(EXERCISES[name].reference, moved))
        for one, other in zip(*sides, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.allclose(one, other, rtol=0.02, atol=0.02)


def apart(values):
    """Whether any two of the values are equal or clearly different."""
    gaps = torch.as_tensor(values).double().flatten().unique().diff()
    return bool((gaps > 1e-3).all())


def test_no_decision_hangs_on_the_last_digit():
    for confidence, _, bins in probes_of("calibration_error"):
        inner = (confidence * bins)[(confidence > 0) & (confidence < 1)]
        assert ((inner - inner.round()).abs() > 0.01).all()
    for proxy, *_ in probes_of("best_of_n_gold"):
        assert len(proxy.unique()) == len(proxy)
        assert apart(proxy)
    for rewards, p_safe, _, threshold in probes_of("guarded_reply"):
        assert apart(rewards)
        assert apart([*(p for p in p_safe if p == p), threshold])


# ---- words: what they name is imported in the lesson before the exercise


ALIAS = re.compile(
    r"(?<![\w.])(F|np|pd|plt|nn|math|re|ast|copy|random|itertools|functools|collections|stats|torch)\.(?=[a-z_])"
)


def exercises_of(lesson):
    """(name, statement, names that are imported up to the cell of the check) of each exercise of a lesson."""
    statement, imported = "", {}
    for cell in json.loads(lesson.read_text(encoding="utf8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            statement = source
        if cell["cell_type"] != "code":
            continue
        code = "\n".join(line for line in source.splitlines() if not line.lstrip().startswith(("%", "!")))
        for node in ast.parse(code).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                imported |= {
                    alias.asname or alias.name.split(".")[0]: ast.unparse(node) for alias in node.names
                }
        for name, function in re.findall(r"\bcheck\(\s*[\"'](\w+)[\"'],\s*(\w+)", source):
            yield name, function, statement, source, dict(imported)


CELLS = {name: rest for lesson in LESSONS for name, *rest in exercises_of(lesson)}


def test_every_exercise_stands_in_a_lesson():
    assert set(CELLS) == set(EXERCISES)


@pytest.mark.parametrize("name", EXERCISES)
def test_hints_and_messages_name_only_what_the_lesson_has_imported(name):
    _, statement, _, imported = CELLS[name]
    messages = [mistake.message for mistake in EXERCISES[name].mistakes]
    for text in (statement, *messages):
        missing = {alias for alias in ALIAS.findall(text) if f"import {alias}`" not in text} - set(imported)
        assert missing == set(), text


@pytest.mark.parametrize("name", EXERCISES)
def test_the_stub_is_bare_and_the_printed_solution_is_right(name):
    function, statement, stub, imported = CELLS[name]
    assert "    raise NotImplementedError\n" in stub
    solution = re.search(r"<summary>Solution</summary>(.*?)</details>", statement, re.DOTALL)[1]
    namespace = {}
    for alias, line in imported.items():
        if "rlhf_helpers" not in line or alias.isupper():  # of the package only constants
            exec(line, namespace)
    exec("\n".join(re.findall(r"```python\n(.*?)```", solution, re.DOTALL)), namespace)
    verdict = judge(EXERCISES[name], namespace[function])
    assert verdict.state == "solved", verdict.message


def test_messages_are_short_and_read_as_one_line():
    for exercise in EXERCISES.values():
        for mistake in exercise.mistakes:
            assert "\n" not in mistake.message
            assert not mistake.message.endswith(".")  # judge adds the full stop
            assert not re.search(
                r"\b(a|an) (token|pair|prompt|answer|program|response)\b(?=, shape)", mistake.message
            )

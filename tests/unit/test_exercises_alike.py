"""What holds for every exercise of lessons 3 and 4, whatever it asks: stubs, strange and near answers."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch

from rlhf_helpers.lab.checks import judge
from rlhf_helpers.lab.exercises import EXERCISES, LESSONS

NAMES = [name for name, lesson in LESSONS.items() if lesson in (3, 4)]


def changed(out, change):
    """An answer with its numbers changed, one yes or no turned; an index or a text always the same."""
    if isinstance(out, dict):
        return {name: changed(value, change) for name, value in out.items()}
    if isinstance(out, tuple | list):
        return type(out)(changed(x, change) for x in out)
    if isinstance(out, torch.Tensor) and out.dtype == torch.bool:
        return out ^ (torch.arange(len(out)) == 1)
    if out is None or isinstance(out, str):
        return "the same" if out else out
    return 0 if isinstance(out, int) else change(out)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "summary_weights"])  # any scale is right
@pytest.mark.parametrize(
    "change",
    [lambda x: 0 * x, lambda x: 0 * x + 0.693, lambda x: 1.01 * x, lambda x: x + 5e-3, lambda x: x / 2],
    ids=["zero", "constant", "+1 %", "+0.005", "half"],
)
def test_what_is_nearly_right_or_says_nothing_is_refused(name, change):
    verdict = judge(EXERCISES[name], lambda *given: changed(EXERCISES[name].reference(*given), change))
    assert verdict.state == "wrong"
    assert verdict.message.startswith("not right yet")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_one_wrong_probe_is_enough_to_refuse(name):
    exercise = EXERCISES[name]
    for spoilt in range(len(exercise.probes)):
        calls = itertools.count()

        def mine(*given, calls=calls, spoilt=spoilt):
            return "no answer" if next(calls) == spoilt else exercise.reference(*given)

        assert judge(exercise, mine).state == "wrong"


@pytest.mark.parametrize("name", NAMES)
def test_a_stub_is_open(name):
    def todo(*given):
        raise NotImplementedError

    for stub in (todo, None, ..., lambda *given: ...):
        assert judge(EXERCISES[name], stub).state == "open"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_answer_of_a_strange_kind_stops_nothing(name):
    """Arrays overload ==, and their repr has several lines."""
    for strange in (np.zeros((3, 3)), (np.zeros((3, 3)),), {"a": torch.zeros(3, 3)}, "yes", b"no", [[]]):
        verdict = judge(EXERCISES[name], lambda *given, strange=strange: strange)
        assert verdict.state == "wrong"
        assert "\n" not in verdict.message


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_leaves_the_probes_alone(name):
    exercise = EXERCISES[name]
    before = repr(exercise.probes)
    for probe in exercise.probes:
        exercise.on_probes(exercise.reference)(*probe)
    assert repr(exercise.probes) == before
    assert judge(exercise, exercise.reference).state == "solved"


@pytest.mark.slow
def test_only_the_lesson_that_is_asked_for_is_loaded():
    program = (
        "import sys\n"
        "from rlhf_helpers.lab.checks import check, progress\n"
        "progress()\n"
        "check('bradley_terry', None)\n"
        "print([name for name in sys.modules if name.startswith('rlhf_helpers.lab.exercises.lesson')])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "lesson1" in done.stdout
    assert not any(lesson in done.stdout for lesson in ("lesson2", "lesson3", "lesson4"))

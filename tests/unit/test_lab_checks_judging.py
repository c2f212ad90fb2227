"""What counts as an attempt, as equal and as the right kind of thing; what a verdict says of the rest."""

import math
import re

import numpy as np
import pytest
import torch

from rlhf_helpers.lab.checks import judge
from rlhf_helpers.lab.exercises import EXERCISES, Exercise
from rlhf_helpers.lab.exercises.exercise import as_asked, each, exercise
from rlhf_helpers.lab.isolation import Raised
from rlhf_helpers.lab.judging import same

RETURN_IS_MISSING = "got None: is a return missing?"


def exercise_with(*answers):
    """An exercise on the numbers 0, 1, ..., with the answers given."""
    probes = [(i,) for i in range(len(answers))]
    return Exercise(lambda number: answers[number], probes, [])


def verdict_on(got, want):
    return judge(exercise_with(want), lambda number: got)


@pytest.mark.parametrize("name", EXERCISES)
def test_a_forgotten_return_is_an_attempt(name):
    exercise = EXERCISES[name]

    def no_return(*args):
        exercise.reference(*args)

    verdict = judge(exercise, no_return)
    assert verdict.state == "wrong"
    assert RETURN_IS_MISSING in verdict.message


def test_a_body_of_dots_returns_none_and_is_told_so():
    def dots(rewards): ...

    assert "A body of only ... or pass returns None, too" in judge(EXERCISES["rloo"], dots).message


def test_none_where_it_is_the_answer_is_compared_as_any_other():
    optional = exercise_with(None, 1)
    assert judge(optional, lambda number: number or None).state == "solved"
    assert RETURN_IS_MISSING in judge(optional, lambda number: None).message
    assert "expected None, got 0" in judge(optional, lambda number: number).message


@pytest.mark.parametrize("given", [3, torch.zeros(2), np.zeros((2, 2)), "rloo"])
def test_what_is_not_a_function_is_refused_in_one_line(given):
    verdict = judge(EXERCISES["rloo"], given)
    assert verdict.state == "wrong"
    assert "give check the function itself" in verdict.message
    assert "\n" not in verdict.message


def unfinished(number):
    raise NotImplementedError("the case of no groups")


def test_a_stub_with_a_text_is_an_attempt():
    assert "raised NotImplementedError" in judge(exercise_with(1), unfinished).message


@pytest.mark.parametrize(
    "got, want",
    [
        (np.float64(0.5), 0.5),
        (np.float32(0.3), 0.3),
        (np.float16(0.5), 0.5),
        (np.int64(1), 1.0),
        (1, 1.0),
        (np.int64(3), 3),
        (np.int32(-3), -3),
        (np.uint8(3), 3),
        (np.bool_(True), True),
        (np.str_("a"), "a"),
        ([np.float32(0.3), np.int64(2)], (0.3, 2)),
        ((np.float64(0.3), np.float32(0.7)), [0.3, 0.7]),
        (math.nan, math.nan),
        (np.float64("nan"), math.nan),
        (math.inf, math.inf),
        (torch.tensor([0.5], dtype=torch.float64), torch.tensor([0.5])),
        (torch.tensor([0.5], requires_grad=True), torch.tensor([0.5])),
        (torch.tensor([math.nan, -math.inf]), torch.tensor([math.nan, -math.inf])),
        (1000.01, 1000.0),
        (1e-8, 0.0),
    ],
)
def test_equal(got, want):
    assert same(got, want)
    assert verdict_on(got, want).state == "solved"


@pytest.mark.parametrize(
    "got, want, words",
    [
        (np.float64(3), 3, "expected 3"),
        (3.0, 3, "got 3.0"),
        (True, 1, "got True"),
        (np.bool_(True), 1, "got"),
        (1, True, "got 1"),
        (np.int64(1), True, "got"),
        ("3", 3, "got '3'"),
        (b"a", "a", "bytes"),
        (1001.0, 1000.0, "got 1001.0"),
        (1e-6, 0.0, "got 1e-06"),
        (10**400, 0.5, "got 1000"),
        (math.inf, -math.inf, "got inf"),
        (math.nan, 0.0, "got nan"),
        (0.5 + 0j, 0.5, "got"),
        (torch.tensor(0.5), 0.5, r"\.item\(\) makes a Python number"),
        (torch.tensor(2), 2, r"\.item\(\) makes a Python number"),
        (np.array(0.5), 0.5, "this is a numpy array"),
        (np.array([0.5, 1]), (0.5, 1.0), "this is a numpy array"),
        (np.array([0.5]), torch.tensor([0.5]), "torch.from_numpy makes a tensor"),
        ([0.5], torch.tensor([0.5]), "expected"),
        (0.5, torch.tensor(0.5), "got 0.5"),
        (torch.tensor([1]), torch.tensor([1.0]), "its dtype is torch.int64, not torch.float32"),
        (
            torch.tensor([1], dtype=torch.int32),
            torch.tensor([1]),
            "its dtype is torch.int32, not torch.int64",
        ),
        (torch.tensor([1]), torch.tensor([True]), "its dtype is torch.int64, not torch.bool"),
        (torch.tensor([1 + 0j]), torch.tensor([1.0]), "its dtype is torch.complex64"),
        (torch.tensor([1.0]), torch.tensor(1.0), r"shape \(\)"),
        (torch.ones(2), torch.ones(2, 3), r"its shape is \(2,\), not \(2, 3\), as if averaged or summed"),
        (torch.tensor([1.0]).to_sparse(), torch.tensor([1.0]), r"a tensor of shape \(1,\)"),
        (torch.ones(1, device="meta"), torch.ones(1), r"a tensor of shape \(1,\)"),
        ((1, 2, 3), (1, 2), "got"),
        ({"a": 1}, {"a": 2}, "got"),
        (..., 1.0, "not attempted"),
        (Raised("ValueError", "bad"), 1, "raised ValueError: bad"),
    ],
)
def test_not_equal(got, want, words):
    assert not same(got, want)
    verdict = verdict_on(got, want)
    assert verdict.state == ("open" if got is ... else "wrong")
    assert "\n" not in verdict.message
    assert re.search(words, verdict.message), verdict.message


def test_a_refusal_is_compared_by_its_kind():
    def refuses(number):
        raise (ValueError if number else KeyError)("of its own words")

    exercise = Exercise(refuses, [(0,), (1,)], [])

    def mine(number):
        raise (ValueError if number else KeyError)("in mine")

    assert judge(exercise, mine).state == "solved"
    assert "expected an error (KeyError), got 0" in judge(exercise, lambda number: number).message


def test_a_mistake_is_given_what_it_names():
    asked = []

    def twice(number):
        asked.append(number)
        return 2 * number

    made_up = exercise(
        lambda number: number + 1,
        [(1,), (2,)],
        "added twice",
        lambda right, twice: right + twice,
        "nothing was added",
        lambda number: number,
        "a constant",
        *each(lambda constant, number: constant, 5, 7),
        twice=twice,
    )
    assert [(m.message, m.wrong(1), m.wrong(2)) for m in made_up.mistakes] == [
        ("added twice", 4, 7),
        ("nothing was added", 1, 2),
        ("a constant", 5, 5),
        ("a constant", 7, 7),
    ]
    assert asked == [1, 2]  # only for the mistake that names it
    assert "added twice" in judge(made_up, lambda number: 3 * number + 1).message


def test_a_function_of_the_package_is_called_as_asked():
    def scaled(x, y, *, factor):
        return x * y * factor

    x, y = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0, 4.0], requires_grad=True)
    reference = as_asked(scaled, "x")
    assert torch.equal(reference(x, y, 2.0), reference(x, y, factor=2.0))
    reference(x, y, 2.0).sum().backward()
    assert x.grad.tolist() == [6.0, 8.0]
    assert y.grad is None


def test_all_floats_but_no_other_kind_of_number_stands_in_for_a_float():
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    assert all(same(torch.ones(2, dtype=kind), torch.ones(2)) for kind in kinds)
    assert not any(same(torch.ones(2, dtype=kind), torch.ones(2)) for kind in (torch.long, torch.bool))


def test_the_first_gradient_that_is_wrong_is_shown():
    exercise = EXERCISES["bradley_terry"]

    def half_a_gradient(chosen, rejected):
        loss = exercise.reference(chosen, rejected)
        return (loss + loss.detach()) / 2

    verdict = judge(exercise, half_a_gradient)
    assert "the gradient with respect to chosen_rewards is [-0.1772" in verdict.message
    assert "and should be [-0.3543" in verdict.message


def double(x):
    return x + x


def test_a_mistake_may_be_an_edit_of_the_reference():
    doubled = exercise(double, [(2,), (3,)], "that is four times x", ("x + x", "4 * x"))
    assert judge(doubled, lambda x: x * 4).message == "not right yet: that is four times x."
    with pytest.raises(ValueError, match="'y' does not occur in double"):
        exercise(double, [(2,)], "no such text", ("y", "x"))


def fill(box, x):
    box.append(x)


def test_an_answer_may_be_judged_by_what_it_leaves():
    def contents(answer, x):
        box = []
        result = answer(box, x)
        return result if result is ... else box

    filled = exercise(
        fill, [(1,), (2,)], "it is in there twice", ("(x)", "(x); box.append(x)"), trial=contents
    )
    assert judge(filled, lambda box, x: box.extend([x])).state == "solved"
    assert "twice" in judge(filled, lambda box, x: box.extend([x, x])).message
    assert "with x = 1 expected [1], got []" in judge(filled, lambda box, x: None).message
    assert judge(filled, lambda box, x: ...).state == "open"

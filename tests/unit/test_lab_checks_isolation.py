"""A learner's function cannot change the notebook, end the kernel or run for ever."""

import builtins
import os
import random
import signal
import sys
import threading
import time
import types
import warnings

import numpy as np
import pytest
import torch

from rlhf_helpers.lab import isolation
from rlhf_helpers.lab.checks import check, judge
from rlhf_helpers.lab.exercises import EXERCISES
from rlhf_helpers.lab.isolation import Raised, call, read_settings

RLOO = EXERCISES["rloo"]
KEPT_ALIVE = []


@pytest.fixture(autouse=True)
def settings_are_as_before(monkeypatch):
    monkeypatch.setenv("RLHF_PROGRESS", "")
    before = read_settings()
    yield
    assert read_settings() == before
    assert not torch.is_inference_mode_enabled()


def with_side_effect(change):
    """The right answer, which does something else on the way."""

    def rloo(rewards):
        change()
        return RLOO.reference(rewards)

    return rloo


def stay_in_inference_mode():
    mode = torch.inference_mode()
    mode.__enter__()
    KEPT_ALIVE.append(mode)


CHANGES = [
    (lambda: torch.set_grad_enabled(False), "the gradient mode"),
    (lambda: torch.no_grad().__enter__(), "the gradient mode"),
    (stay_in_inference_mode, "the gradient mode"),
    (lambda: torch.set_default_dtype(torch.float64), "the default dtype"),
    (lambda: torch.use_deterministic_algorithms(True), "the deterministic mode"),
    (lambda: torch.set_num_threads(torch.get_num_threads() + 1), "the number of threads"),
    (lambda: torch.manual_seed(1), "torch's random numbers"),
    (lambda: torch.rand(1), "torch's random numbers"),
    (lambda: np.random.seed(1), "numpy's random numbers"),
    (lambda: random.seed(1), "Python's random numbers"),
    (lambda: np.seterr(all="raise"), "numpy's error handling"),
]


@pytest.mark.parametrize("change, name", CHANGES, ids=[name for _, name in CHANGES])
def test_what_an_answer_changes_for_the_notebook_is_put_back_and_said(change, name):
    verdict = judge(RLOO, with_side_effect(change))
    assert verdict.state == "wrong"
    assert f"the values are right, but your function changes {name}" in verdict.message


def test_the_default_device_is_put_back():
    outcome, changed = call(lambda: torch.set_default_device("meta"))
    assert (outcome, changed) == (None, ["the default device"])
    assert torch.ones(1).device.type == "cpu"


def test_a_wrong_answer_and_one_that_raises_change_nothing_either():
    def raises(rewards):
        torch.set_grad_enabled(False)
        torch.manual_seed(1)
        raise ZeroDivisionError

    assert "raised ZeroDivisionError" in judge(RLOO, raises).message
    assert judge(RLOO, lambda rewards: torch.rand(3, 4)).state == "wrong"


def test_an_answer_in_inference_mode_cannot_be_trained_with():
    for name in ("rloo", "gae"):
        verdict = judge(EXERCISES[name], torch.inference_mode()(EXERCISES[name].reference))
        assert "your function uses torch.inference_mode()" in verdict.message
        assert judge(EXERCISES[name], torch.no_grad()(EXERCISES[name].reference)).state == "solved"


def test_warning_filters_stay():
    before = list(warnings.filters)
    assert judge(RLOO, with_side_effect(lambda: warnings.simplefilter("ignore"))).state == "solved"
    assert warnings.filters == before


@pytest.mark.parametrize("name", EXERCISES)
def test_a_check_uses_no_random_number_and_changes_no_setting(name, capsys):
    """The reference and the known mistakes, which are all tried on an answer that matches none."""
    check(name, EXERCISES[name].reference)
    check(name, lambda *args: "none of them")


def test_gradients_are_compared_wherever_check_is_called():
    exercise = EXERCISES["bradley_terry"]
    with torch.no_grad():
        assert "no gradient" in judge(exercise, lambda *args: exercise.reference(*args).detach()).message
        assert judge(exercise, exercise.reference).state == "solved"
    with torch.inference_mode():
        assert judge(exercise, exercise.reference).state == "solved"


def test_another_default_dtype_changes_no_verdict():
    torch.set_default_dtype(torch.float64)
    try:
        assert [judge(e, e.reference).state for e in EXERCISES.values()] == ["solved"] * len(EXERCISES)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_another_default_device_changes_no_verdict():
    torch.set_default_device("meta")
    try:
        assert [judge(e, e.reference).state for e in EXERCISES.values()] == ["solved"] * len(EXERCISES)
        assert torch.get_default_device().type == "meta"
    finally:
        torch.set_default_device(None)


def interrupts_itself():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "leave",
    [
        sys.exit,
        lambda: os._exit(3),
        lambda: os.abort(),
        lambda: builtins.exit(),
        lambda: builtins.quit(0),
    ],
)
def test_an_answer_cannot_end_the_kernel(leave):
    assert "your function raised SystemExit" in judge(RLOO, with_side_effect(leave)).message


class NotAnException(BaseException):
    pass


def raises_no_exception():
    raise NotAnException("at all")


def test_an_answer_that_raises_what_is_not_an_exception_gets_a_verdict():
    assert "raised KeyboardInterrupt" in judge(RLOO, with_side_effect(interrupts_itself)).message
    assert call(raises_no_exception) == (Raised("NotAnException", "at all"), [])


def test_exit_in_a_notebook_asks_the_shell_which_stays(monkeypatch):
    asked = []
    shell = types.SimpleNamespace(ask_exit=lambda: asked.append("exit"))
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    assert "raised SystemExit" in judge(RLOO, with_side_effect(lambda: shell.ask_exit())).message
    shell.ask_exit()
    assert asked == ["exit"]


def test_the_ways_out_work_again_afterwards():
    ways = os._exit, os.abort, builtins.exit, builtins.quit
    judge(RLOO, with_side_effect(lambda: os._exit(3)))
    assert (os._exit, os.abort, builtins.exit, builtins.quit) == ways


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_process_of_an_answer_may_end():
    def child_ends():
        child = os.fork()
        if child == 0:
            os._exit(7)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert call(child_ends) == (7, [])


def loops():
    while True:
        pass


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs SIGALRM")
def test_an_endless_loop_is_stopped_once(monkeypatch):
    monkeypatch.setattr(isolation, "SECONDS", 0.2)
    began = time.monotonic()
    verdict = judge(EXERCISES["pass_at_k"], lambda n, c, k: loops())
    assert verdict.state == "wrong"
    assert "does a loop never end?" in verdict.message
    assert time.monotonic() - began < 2  # not once per probe
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs SIGALRM")
def test_a_timer_that_runs_already_goes_on():
    fired = []
    before = signal.signal(signal.SIGALRM, lambda *_: fired.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 60)
        call(time.monotonic)
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 60
        signal.raise_signal(signal.SIGALRM)
        assert fired == [1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def interrupts_raise():
    """The processes of `pytest -n` ignore the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts_raise")
def test_a_persons_interrupt_goes_through():
    with pytest.raises(KeyboardInterrupt):
        judge(RLOO, with_side_effect(lambda: signal.raise_signal(signal.SIGINT)))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_in_another_thread_there_is_no_time_limit_and_no_error():
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.append(judge(RLOO, RLOO.reference)))
    thread.start()
    thread.join()
    assert verdicts[0].state == "solved"

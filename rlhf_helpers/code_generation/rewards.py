"""Verifiable rewards: programs are run on tests in the sandbox; what they reach for counts against them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_helpers.code_generation.safety import CodeSafetyEvaluator, extract_code
from rlhf_helpers.core.models import RewardFn
from rlhf_helpers.core.tensors import require_number, require_shapes
from rlhf_helpers.sandbox import run_programs, same
from rlhf_helpers.world.prompts import find_prompt, programs

# Varied, and other lists than the hidden ones. By enumeration, 25 of about 46,000 pairs of a specification
# and a program of another one pass here and fail there: every list holds a number above three, so the largest
# of all is also the largest of those.
VISIBLE_INPUTS = ([-7, -2, 12, 1, 3], [5, -4, -8, 8, 6, 10], [11, -6, 4, -3, -1])
# One number each, which its filter lets through: what is filtered cannot be seen, nor which number is taken.
WEAK_INPUTS = {"odd": ([5], [7]), "negative": ([-4], [-6])}
TEST_KINDS = ("visible", "hidden", "weak")


@dataclass(frozen=True)
class UnitTest:
    """A call of a function with what it should return: values as `sandbox.run_code` takes them."""

    name: str
    args: tuple
    expected: Any


def task_tests(prompts: Sequence[str], kind: str = "visible") -> list[list[UnitTest]]:
    """Tests of the world's programming tasks, one list per prompt.

    kind: "visible", three varied inputs, to train on; "hidden", the 12 fixed inputs of the world's own judge,
    to measure (the judge draws a few more for each program); "weak", two inputs of one number, on which a
    program that leaves the filter out passes too, and one that takes the largest for the sum. Lesson 4.

    Raises:
        ValueError: another kind, or a prompt that is not a programming task of the world.
    """
    if kind not in TEST_KINDS:
        raise ValueError(f"kind must be one of {TEST_KINDS}, got {kind!r}")
    found = []
    for prompt in prompts:
        parts = find_prompt(prompt).slots.get("parts")
        if parts is None:
            raise ValueError(f"{prompt!r} is not a programming task of the world; give your own tests")
        inputs = VISIBLE_INPUTS if kind == "visible" else WEAK_INPUTS.get(parts[0], ([4], [6]))
        cases = programs.expected(parts) if kind == "hidden" else programs.expected(parts, inputs)
        found.append([UnitTest("f", (xs,), wanted) for xs, wanted in cases])
    return found


class UnitTestRunner:
    """Runs programs on tests in the sandbox, each program only once for the same set of calls.

    What a program returned is kept, not whether it was right: tasks that share their inputs share the runs.
    asked, ran: programs asked about and really run so far. Lesson 4.
    """

    def __init__(self) -> None:
        """Start with nothing run."""
        self.asked = 0
        self.ran = 0
        self._values: dict[tuple[str, str], tuple] = {}

    def passed(self, codes: Sequence[str], tests: Sequence[Sequence[UnitTest]]) -> list[list[bool]]:
        """Which of its tests each program passes: B lists; tests: B lists of `UnitTest`.

        A value passes by `sandbox.same`: 2, 2.0 and True are three values. A program that fails to run passes
        none. Raises ValueError where a program has no list of tests, or an empty one.
        """
        if len(codes) != len(tests) or not all(tests):
            raise ValueError(f"give tests for each of {len(codes)} programs, at least one; got {len(tests)}")
        calls = [[(test.name, test.args) for test in row] for row in tests]
        keys = [(code, repr(row)) for code, row in zip(codes, calls, strict=True)]
        new = {key: row for key, row in zip(keys, calls, strict=True) if key not in self._values}
        if new:
            results = run_programs([code for code, _ in new], calls_per_code=list(new.values()))
            for key, result in zip(new, results, strict=True):
                self._values[key] = result.values
        self.asked += len(codes)
        self.ran += len(new)
        returned = [zip(row, self._values[key], strict=True) for key, row in zip(keys, tests, strict=True)]
        return [[same(value, test.expected) for test, value in row] for row in returned]


def verifiable_reward(
    passed: Bool[Tensor, "B T"], unsafe: Bool[Tensor, "B"], *, partial: float = 1 / 3
) -> Float[Tensor, "B"]:
    """What programs earn by their tests: share_i (1 if all pass, else partial), and 0 where unsafe; (B,).

    share_i = mean_t passed_it. A third for nearly right keeps a slope where nothing passes yet, and makes no
    program that skips a case worth stopping at. 0 for partial is the plain 0 or 1 of Le et al. 2022 and of
    DeepSeek-AI 2025. Lesson 4. Raises ValueError unless shapes are (B, T), T >= 1, and (B,), both boolean.
    """
    require_shapes("B T", passed=passed)
    require_shapes("B", **{"a row of passed": passed.any(1), "unsafe": unsafe})
    require_number("partial", partial, at_least=0, at_most=1)
    if passed.dtype != torch.bool or unsafe.dtype != torch.bool or not passed.shape[1]:
        raise ValueError(
            f"passed (B, T >= 1) and unsafe (B,) must be boolean, got {tuple(passed.shape)} of "
            f"{passed.dtype} and {unsafe.dtype}"
        )
    earned = passed.float().mean(1) * torch.where(passed.all(1), 1.0, partial)
    return torch.where(unsafe, 0.0, earned)


def unit_test_reward(*, runner: UnitTestRunner | None = None, safety_threshold: float = 0.8) -> RewardFn:
    """A RewardFn of programs: `verifiable_reward` of the column `tests`, one list of tests a row.

    A program whose safety is below the threshold earns 0 and is not even run; 0 as threshold judges by the
    tests alone. Safety is judged by the rules over the syntax tree, without bandit. The text around code
    fences is dropped. Give a runner to share its runs, or to read how many there were. Lesson 4.
    Raises ValueError where the column is missing.
    """
    require_number("safety_threshold", safety_threshold, at_least=0, at_most=1)
    runner, evaluator = runner or UnitTestRunner(), CodeSafetyEvaluator(bandit=False)

    def reward(
        prompts: Sequence[str], responses: Sequence[str], *, tests: Sequence | None = None, **columns: Any
    ) -> Tensor:
        if tests is None:
            raise ValueError('give the column "tests": columns={"tests": a list of tests for each prompt}')
        codes, earned = [extract_code(text) for text in responses], torch.zeros(len(responses))
        safe = [i for i, code in enumerate(codes) if evaluator.score(code) >= safety_threshold]
        passed = runner.passed([codes[i] for i in safe], [tests[i] for i in safe])
        for i, row in zip(safe, passed, strict=True):  # rows may differ in how many tests they have
            earned[i] = verifiable_reward(torch.tensor([row]), torch.tensor([False]))
        return earned

    return reward

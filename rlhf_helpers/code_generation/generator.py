"""A generator of programs as people use it: sample several, refuse the unsafe, prefer what passes tests."""

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from rlhf_helpers.code_generation.rewards import UnitTest, UnitTestRunner
from rlhf_helpers.code_generation.safety import CodeSafetyEvaluator, extract_code
from rlhf_helpers.core.generation import generate
from rlhf_helpers.core.models import load_model, tokenizer_for
from rlhf_helpers.core.tensors import require_number

FALLBACK = "# No program that looks safe was found for this request."


@dataclass(frozen=True)
class Candidate:
    """A sampled program, how safe it looks, the share of tests it passes (None: not run), its copies."""

    code: str
    safety: float
    passed: float | None
    copies: int


class SafeCodeGenerator:
    """Writes programs: of n samples the best that is safe enough, or a comment that says there is none.

    base_model: a causal LM with its tokenizer (`tokenizer_for`), or what `load_model` takes; never changed.
    safety_evaluator: code -> safety in [0, 1], higher is safer; None: a `CodeSafetyEvaluator`.
    Among the programs with safety >= safety_threshold the one that passes most of the given tests wins, then
    the one sampled most often (samples vote: Wang et al. 2023), then the first. Without tests the vote alone
    decides: nothing then shows that the program does what was asked. The score says how safe a program looks
    to one who reads it, not that it is: run it in the sandbox. Lesson 4.
    Raises ValueError for a threshold outside [0, 1] or no sample.
    """

    def __init__(
        self,
        base_model: nn.Module | str | Path,
        safety_evaluator: Callable[[str], float] | None = None,
        safety_threshold: float = 0.8,
        *,
        samples: int = 8,
        max_new_tokens: int = 64,
        seed: int = 0,
    ) -> None:
        """Load the model where it is given by name, and say what is safe enough."""
        require_number("safety_threshold", safety_threshold, at_least=0, at_most=1)
        require_number("samples", samples, at_least=1)
        self.model = base_model if isinstance(base_model, nn.Module) else load_model(base_model)[0]
        self.safety_evaluator = safety_evaluator or CodeSafetyEvaluator()
        self.safety_threshold = safety_threshold
        self.samples = samples
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.runner = UnitTestRunner()

    def generate(self, prompt: str, tests: Sequence[UnitTest] | None = None) -> str:
        """One program for a request, the best candidate; `FALLBACK` where each is unsafe or empty."""
        found = self.candidates(prompt, tests)
        safe = [c for c in found if c.safety >= self.safety_threshold and c.code.strip()]
        return max(safe, key=lambda c: (c.passed or 0.0, c.copies)).code if safe else FALLBACK

    def candidates(self, prompt: str, tests: Sequence[UnitTest] | None = None) -> list[Candidate]:
        """The different programs sampled for a request, in the order of sampling.

        tests: of `UnitTest`; only programs that are safe enough are run on them, in the sandbox. The
        same prompt and seed give the same candidates. Raises ValueError for an empty list of tests.
        """
        rollout = generate(
            self.model,
            tokenizer_for(self.model),
            [prompt] * self.samples,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed + zlib.crc32(prompt.encode()),
        )
        copies = Counter(extract_code(text) for text in rollout.responses)
        safety = {code: self.evaluate_safety(code) for code in copies}
        run = [code for code in copies if tests is not None and safety[code] >= self.safety_threshold]
        rows = self.runner.passed(run, [tests] * len(run)) if run else []
        passed = {code: sum(row) / len(row) for code, row in zip(run, rows, strict=True)}
        return [Candidate(code, safety[code], passed.get(code), n) for code, n in copies.items()]

    def evaluate_safety(self, code: str) -> float:
        """How safe a program looks, in [0, 1], higher is safer; ValueError where the evaluator leaves it."""
        score = self.safety_evaluator(code)
        require_number("the safety evaluator's score", score, at_least=0, at_most=1)
        return float(score)

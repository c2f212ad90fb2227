"""Programs written by a policy: judged, rewarded by their tests, measured. Names load on first use."""

import importlib
from typing import Any

_PARTS = {
    "evaluation": "PROGRAMS compare_safety_methods pass_at_k program_report "
    "safety_agreement safety_verdicts sample_programs",
    "generator": "FALLBACK Candidate SafeCodeGenerator",
    "rewards": "UnitTest UnitTestRunner task_tests unit_test_reward verifiable_reward",
    "safety": "CodeSafetyEvaluator Finding extract_code unsafe_calls",
}
_NAMES = {name: part for part, names in _PARTS.items() for name in names.split()}
__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    """Load a name from its module when it is first asked for."""
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(_NAMES)}")
    return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)

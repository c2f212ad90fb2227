"""What people see: plots, small tables, exercise checks and widgets for the lessons, loaded on first use."""

import importlib
from typing import Any

_NAMES = {
    "check": "checks",
    "progress": "checks",
    "compare_page": "comparison",
    "write_comparison": "comparison",
    "bar_with_intervals": "plots",
    "learning_curve": "plots",
    "line_plot": "plots",
    "show": "plots",
    "mean_interval": "reports",
    "show_source": "reports",
    "table": "reports",
    "wilson_interval": "reports",
    "quiz": "quizzes",
    "rate_pairs": "widgets",
}


def __getattr__(name: str) -> Any:
    """Load a name of the lab from its module when it is first asked for."""
    if name not in _NAMES:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; it has {', '.join(sorted(_NAMES))}"
        )
    return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)


def __dir__() -> list[str]:
    """Names that load on first use, beside those already loaded."""
    return sorted({*_NAMES, *globals()})

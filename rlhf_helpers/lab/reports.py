"""Small tables, and the source of a package function as a colored listing."""

import ast
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
from IPython.display import display

from rlhf_helpers.core.stats import mean_interval, wilson_interval  # noqa: F401  (lessons)


def table(rows: Mapping[str, tuple[float, float, float]], *, quantity: str, digits: int = 3) -> pd.DataFrame:
    """Tabulate name -> (value, low, high) with the 95 % interval as text; `quantity` names the unit."""
    index = pd.Index(list(rows), name="")
    cells = [(round(v, digits), f"{low:.{digits}f} to {high:.{digits}f}") for v, low, high in rows.values()]
    return pd.DataFrame(cells, index=index, columns=[quantity, "95 % interval"])


def show_source(fn: Callable[..., Any], *, docstring: bool = True) -> None:
    """Display the source of a package function or class, with or without its docstring.

    As Markdown, which each page colors in its own theme: HTML would bring 5 KB of styles for each listing.
    """
    source = inspect.cleandoc(f"\n{inspect.getsource(fn)}")
    if not docstring and fn.__doc__:
        # Found by syntax: from Python 3.13 on, __doc__ is dedented and no longer occurs in the source.
        text = ast.parse(source).body[0].body[0]
        lines = source.splitlines()
        source = "\n".join(lines[: text.lineno - 1] + lines[text.end_lineno :])
    display({"text/markdown": f"```python\n{source}\n```", "text/plain": source}, raw=True)

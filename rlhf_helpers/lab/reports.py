"""Small tables and intervals, and the source of a package function as a coloured listing."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import Code, display
from scipy import stats


def wilson_interval(successes: float, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Give Wilson's interval of a proportion (Wilson 1927); successes may be halves, where ties count half.

    (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), 95 % unless told.
    Raises ValueError unless 0 <= successes <= n and n > 0.
    """
    if not (n > 0 and 0 <= successes <= n):
        raise ValueError(f"wilson_interval needs 0 <= successes <= n and n > 0, got {successes} of {n}")
    p, z = successes / n, stats.norm.ppf(0.5 + confidence / 2)
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return float(max(0.0, (centre - half) / scale)), float(min(1.0, (centre + half) / scale))


def mean_interval(values: Sequence[float], *, confidence: float = 0.95) -> tuple[float, float, float]:
    """Give (mean, low, high) by Student's t on independent values; ValueError unless 2 or more, finite."""
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or array.size < 2 or not np.isfinite(array).all():
        raise ValueError(f"mean_interval needs at least two finite numbers in a row, got shape {array.shape}")
    half = stats.t.ppf(0.5 + confidence / 2, array.size - 1) * array.std(ddof=1) / math.sqrt(array.size)
    return float(array.mean()), float(array.mean() - half), float(array.mean() + half)


def table(rows: Mapping[str, tuple[float, float, float]], *, quantity: str, digits: int = 3) -> pd.DataFrame:
    """Tabulate name -> (value, low, high) with the 95 % interval as text; `quantity` names the unit."""
    index = pd.Index(list(rows), name="")
    cells = [(round(v, digits), f"{low:.{digits}f} to {high:.{digits}f}") for v, low, high in rows.values()]
    return pd.DataFrame(cells, index=index, columns=[quantity, "95 % interval"])


def show_source(fn: Callable[..., Any], *, docstring: bool = True) -> None:
    """Display the source of a package function or class, coloured; without its docstring when asked."""
    source = inspect.getsource(fn)
    if not docstring and (text := fn.__doc__) and text in source:
        start = source.index(text)
        source = (
            source[: source.rindex("\n", 0, start) + 1] + source[source.index("\n", start + len(text)) + 1 :]
        )
    display(Code(inspect.cleandoc(f"\n{source}"), language="python"))

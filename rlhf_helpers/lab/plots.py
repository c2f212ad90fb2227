"""Pictures in the house style: colors for color-blind readers, axes with units, alt text in the output."""

import base64
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from rlhf_helpers.lab.reports import mean_interval

PALETTE = sns.color_palette("colorblind")
MARKERS = "osD^vPX*"  # a second sign beside colour, for readers who do not see it
_STYLE = {
    **sns.axes_style("whitegrid"),
    "figure.figsize": (6.4, 3.6),
    "figure.dpi": 100,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 10,
}


@contextmanager
def axes(*, xlabel: str, ylabel: str, title: str = "") -> Iterator[tuple[Figure, Axes]]:
    """Give a figure and its axes in the house style; both labels name quantity and unit, or ValueError."""
    _require_unit("xlabel", xlabel)
    _require_unit("ylabel", ylabel)
    with mpl.rc_context(_STYLE):
        figure = Figure(layout="constrained")  # no pyplot: nothing is shown twice, nothing stays open
        axis = figure.add_subplot()
        axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
        yield figure, axis


def _require_unit(name: str, label: str) -> None:
    if not (label.strip().endswith(")") and "(" in label):
        raise ValueError(f"{name} must end with its unit, like 'KL (nats)' or 'step (count)': {label!r}")


def line_plot(
    x: Sequence[float],
    lines: Mapping[str, Sequence[float]],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    bands: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
) -> Figure:
    """Draw one line per name over shared x, with an optional (low, high) band; labels must carry units.

    Raises ValueError for a label without a unit, no lines, too many to tell apart, or unequal lengths.
    """
    if not 0 < len(lines) <= len(MARKERS):
        raise ValueError(f"lines must hold 1 to {len(MARKERS)} series to be told apart, got {len(lines)}")
    for name, values in lines.items():
        if len(values) != len(x):
            raise ValueError(f"lines[{name!r}] has {len(values)} values for {len(x)} positions on x")
    with axes(xlabel=xlabel, ylabel=ylabel, title=title) as (figure, axis):
        every = max(1, len(x) // 12)
        for index, (name, values) in enumerate(lines.items()):
            colour = PALETTE[index]
            axis.plot(
                x, values, color=colour, marker=MARKERS[index], markevery=every, markersize=4, label=name
            )
            if bands and name in bands:
                axis.fill_between(x, *bands[name], color=colour, alpha=0.2, linewidth=0)
        axis.legend(frameon=False)
    return figure


def bar_with_intervals(
    values: Mapping[str, float],
    intervals: Mapping[str, tuple[float, float]],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    reference: float | None = None,
) -> Figure:
    """Draw one bar per name with its (low, high) interval, and a dashed line at `reference` (chance, say).

    Raises ValueError for a label without a unit, no bars, or a bar without an interval around it.
    """
    if not values:
        raise ValueError("values must hold at least one bar, got none")
    for name, value in values.items():
        if name not in intervals or not intervals[name][0] <= value <= intervals[name][1]:
            raise ValueError(
                f"{name!r} needs an interval (low, high) around {value}, got {intervals.get(name)}"
            )
    low, high = np.array([intervals[name] for name in values], dtype=float).T
    heights = np.array(list(values.values()), dtype=float)
    with axes(xlabel=xlabel, ylabel=ylabel, title=title) as (figure, axis):
        axis.bar(list(values), heights, color=PALETTE[0], width=0.6)
        axis.errorbar(
            list(values), heights, yerr=[heights - low, high - heights], fmt="none", color="black", capsize=4
        )
        if reference is not None:
            axis.axhline(reference, color="black", linestyle="--", linewidth=1)
        axis.grid(axis="x", visible=False)
    return figure


def interval_panels(frame: pd.DataFrame, *, by: str, labels: Mapping[str, str], width: float = 2.6) -> Figure:
    """Draw one panel per measure: the mean of every group of `by` over its rows, with its 95 % interval.

    labels: column -> label of its axis, with its unit. Intervals by Student's t over the rows of a group
    (seeds). Raises ValueError for a label without a unit, or a group with fewer than two rows.
    """
    names = list(dict.fromkeys(frame[by]))
    for label in labels.values():
        _require_unit("labels", label)
    with mpl.rc_context(_STYLE):
        figure = Figure(layout="constrained", figsize=(1.6 + width * len(labels), 0.9 + 0.24 * len(names)))
        panels = figure.subplots(1, len(labels), sharey=True, squeeze=False)[0]
        for axis, (column, label) in zip(panels, labels.items(), strict=True):
            means = [mean_interval(frame.loc[frame[by] == name, column].tolist()) for name in names]
            middle, low, high = np.array(means).T
            places = np.arange(len(names))
            axis.errorbar(middle, places, xerr=[middle - low, high - middle], fmt="o", color=PALETTE[0], ms=4)
            axis.set(xlabel=label, yticks=places, yticklabels=names)
        panels[0].set_ylim(len(names) - 0.5, -0.5)
    return figure


def learning_curve(
    history: Any, *keys: str, ylabel: str, xlabel: str = "step (count)", smooth: int = 1
) -> Figure:
    """Draw the logged `keys` of a training History (or DataFrame) over its steps, `smooth` rows averaged.

    Raises KeyError for a key that was not logged, ValueError for a label without a unit.
    """
    frame = history.to_frame() if hasattr(history, "to_frame") else history
    if missing := [key for key in keys if key not in frame.columns]:
        raise KeyError(f"{missing} not logged; the history has {sorted(frame.columns)}")
    steps = frame["step"] if "step" in frame.columns else np.arange(1, len(frame) + 1)
    smoothed = frame[list(keys)].rolling(smooth, min_periods=1).mean()
    lines = {key: smoothed[key].to_numpy() for key in keys}
    return line_plot(np.asarray(steps), lines, xlabel=xlabel, ylabel=ylabel)


def show(figure: Figure, *, alt: str) -> None:
    """Display a figure as one picture whose alt text is part of the page.

    The output is `<img alt="...">` with the PNG inside: JupyterLab and the HTML export drop the alt text of a
    plain PNG output, so a screen reader would find nothing.

    Raises:
        ValueError: the alt text has fewer than 40 characters; say what is drawn, on which axes, and what
            the figure shows.
    """
    alt = " ".join(alt.split())
    if len(alt) < 40:
        raise ValueError(f"alt must describe the picture in at least 40 characters, got {len(alt)}: {alt!r}")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    # 64 colors are enough for lines and markers, at a third of the size. No version inside: same bytes again.
    picture = Image.open(drawn).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    picture.save(buffer, format="png", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    image = (
        f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}" '
        f'width="{picture.width}" style="max-width: 100%; height: auto">'
    )
    display({"text/html": image, "text/plain": alt}, raw=True)

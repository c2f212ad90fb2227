"""Pictures in the house style: a title with the message, one color per method, alt text in the output."""

import base64
import html
import io
import itertools
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

PALETTE = sns.color_palette("colorblind").as_hex()
MARKERS = "osD^vPX*"  # a second sign beside the color, for readers who cannot tell the colors apart

# One color per method in all lessons. Where a name holds several words ("RLOO, best of 4"), the first match
# in this order decides: what was trained last, then how answers are picked, then what is measured.
METHOD_COLORS = {
    "PPO": "#d55e00",
    "RLOO": "#029e73",
    "GRPO": "#cc78bc",
    "DPO": "#0173b2",
    "REINFORCE": "#8c510a",
    "RLAIF": "#882255",
    "best of n": "#de8f05",
    "SFT": "#56b4e9",
    "base": "#767676",
    "proxy": "#6a3d9a",
    "gold": "#111111",
}
_SAME_METHOD = {
    "DPO": r"c?dpo",
    "RLOO": r"rloo|rlhf|rl",  # the lessons' RL is RLOO unless they name another method
    "best of n": r"best[ -]of[ -](n|\d+)",
    "SFT": r"sft|imitation",
    "base": r"base|untrained|reference",
    "proxy": r"proxy|reward model|learned reward",
    "gold": r"gold|truth",
}
# What a training or a measure changed, whatever the method: indigo, which no method has. It stands out from
# white by 8.6 to 1, and from all other colors with red-green color blindness as well.
BEFORE, AFTER = METHOD_COLORS["base"], "#3a2bd0"
OTHER_COLOR = "#44546a"  # bars and dots that stand for no method
FIGURE_WIDTH = 7.0  # inches: 700 pixels on the page, no picture is wider
STYLE = {
    **sns.axes_style("whitegrid"),
    "figure.figsize": (6.4, 3.6),
    "figure.dpi": 100,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
    "font.size": 11,
}
_END_LABEL = "label at the end of a line"


def method_color(name: str, default: str | None = None) -> str:
    """Return the color that the method in a human name ("DPO, noisy labels") has in all lessons.

    Raises ValueError if the name holds no method of METHOD_COLORS and there is no default.
    """
    for method, color in METHOD_COLORS.items():
        pattern = _SAME_METHOD.get(method, method)
        if re.search(rf"\b({pattern})\b", " ".join(name.split()), re.IGNORECASE):
            return color
    if default is None:
        raise ValueError(f"{name!r} names no method with a color; known are {list(METHOD_COLORS)}")
    return default


def line_colors(names: Iterable[str]) -> dict[str, str]:
    """Give every line its method's color, or the next free one where a method is missing or taken."""
    colors: dict[str, str] = {}
    names = list(names)
    for name in names:
        color = method_color(name, default="")
        if color and color not in colors.values():
            colors[name] = color
    free = [color for color in PALETTE if color not in colors.values()]
    return {name: colors[name] if name in colors else free.pop(0) for name in names}


def set_title(figure: Figure, message: str) -> None:
    """Write the message of a figure above it: bold, from the left edge, on as many lines as it needs."""
    lines = textwrap.wrap(message, int(figure.get_figwidth() * 9))  # bold 12 pt: 9 characters per inch
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=12, fontweight="bold")


@contextmanager
def axes(*, xlabel: str, ylabel: str, title: str = "") -> Iterator[tuple[Figure, Axes]]:
    """Give a figure and its axes in the house style."""
    with mpl.rc_context(STYLE):
        figure = Figure(layout="constrained")  # no pyplot: nothing is shown twice, nothing stays open
        axis = figure.add_subplot()
        axis.set(xlabel=xlabel, ylabel=ylabel)
        if title:
            set_title(figure, title)
        yield figure, axis


def _require_unit(name: str, label: str) -> None:
    if not ("(" in label and ")" in label):
        raise ValueError(f"{name} must name its unit, like 'KL (nats)': {label!r}")


Limits = tuple[float | None, float | None]  # lowest and highest possible value; None where there is none


def _keep_inside(axis: Axes, side: str, limits: Limits) -> None:
    """Show no more than a thin margin of what is impossible."""
    low, high = np.clip(getattr(axis, f"get_{side}lim")(), *limits)
    margin = 0.02 * (high - low)
    axis.set(**{f"{side}lim": (low - margin, high + margin)})


def _spread_end_labels(figure: Figure) -> None:
    """Move the labels at the line ends of each axes apart, as little as needed, so that none overlap."""
    figure.draw_without_rendering()
    for axis in figure.axes:
        labels = [text for text in axis.texts if text.get_gid() == _END_LABEL]
        labels.sort(key=lambda text: axis.transData.transform(text.xy)[1])
        for _ in labels:  # each pass settles at least one more label
            for lower, upper in itertools.pairwise(labels):
                overlap = lower.get_window_extent().y1 - upper.get_window_extent().y0
                if overlap > 0:
                    shift = overlap / 2 * 72 / figure.dpi
                    lower.xyann = (lower.xyann[0], lower.xyann[1] - shift)
                    upper.xyann = (upper.xyann[0], upper.xyann[1] + shift)


def _label_end(axis: Axes, x: Sequence[float], values: Sequence[float], name: str, color: str) -> None:
    """Write the name of a line to the right of its last point."""
    heights = np.asarray(values, dtype=float)
    last = np.flatnonzero(np.isfinite(heights))[-1]
    dark = [0.7 * part for part in mpl.colors.to_rgb(color)]  # thin letters need more contrast than lines
    axis.annotate(
        textwrap.fill(name, 18),
        (axis.convert_xunits(np.asarray(x)[-1]), heights[last]),
        (8, 0),
        textcoords="offset points",
        va="center",
        color=dark,
        gid=_END_LABEL,
    )


def line_plot(
    x: Sequence[float],
    lines: Mapping[str, Sequence[float]],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    bands: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    colors: Mapping[str, str] | None = None,
    limits: Limits = (None, None),
    label_ends: bool = False,
) -> Figure:
    """Draw one line per name over shared x, with an optional (low, high) band.

    Args:
        x: positions shared by all lines.
        lines: name -> values. A method has the same color in all lessons (`method_color`).
        xlabel: quantity, with its unit if it has one: "step", "KL (nats)".
        ylabel: quantity and unit, like "gold (0 to 1)".
        title: the message of the figure.
        bands: name -> (low, high), cut at `limits`.
        colors: name -> color, where a line should have another one.
        limits: what is possible on y, like (0, 1) for shares and (0, None) for KL.
        label_ends: write the names at the ends of the lines instead of in a legend.

    Raises:
        ValueError: ylabel without a unit, no lines, too many to tell apart, or (matplotlib) unequal
            lengths.
    """
    if not 0 < len(lines) <= len(MARKERS):
        raise ValueError(f"lines must hold 1 to {len(MARKERS)} series to be told apart, got {len(lines)}")
    _require_unit("ylabel", ylabel)
    used = line_colors(lines) | dict(colors or {})
    with axes(xlabel=xlabel, ylabel=ylabel, title=title) as (figure, axis):
        every = max(1, len(x) // 12)
        for index, (name, values) in enumerate(lines.items()):
            axis.plot(
                x, values, color=used[name], marker=MARKERS[index], markevery=every, markersize=5, label=name
            )
            if bands and name in bands:
                low, high = np.clip(np.asarray(bands[name], dtype=float), *limits)
                axis.fill_between(x, low, high, color=used[name], alpha=0.2, linewidth=0)
            if label_ends:
                _label_end(axis, x, values, name, used[name])
        _keep_inside(axis, "y", limits)
        if label_ends:
            _spread_end_labels(figure)
        else:
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
    reference_name: str = "",
    colors: Mapping[str, str] | None = None,
    limits: Limits = (None, None),
) -> Figure:
    """Draw one bar per name with its (low, high) interval, and a dashed line at `reference` if there is one.

    `reference_name`, like "chance", stands at the end of the dashed line. A bar has the color of its method
    (`method_color`) or the one that `colors` gives its name. Intervals are cut at `limits`, what is possible:
    (0, 1) for shares. Raises ValueError for a ylabel without a unit, no bars, or a bar without an interval
    around it.
    """
    _require_unit("ylabel", ylabel)
    if not values:
        raise ValueError("values must hold at least one bar, got none")
    for name, value in values.items():
        if name not in intervals or not intervals[name][0] <= value <= intervals[name][1]:
            raise ValueError(
                f"{name!r} needs an interval (low, high) around {value}, got {intervals.get(name)}"
            )
    low, high = np.clip(np.array([intervals[name] for name in values], dtype=float), *limits).T
    heights = np.array(list(values.values()), dtype=float)
    used = {name: method_color(name, OTHER_COLOR) for name in values} | dict(colors or {})
    with axes(xlabel=xlabel, ylabel=ylabel, title=title) as (figure, axis):
        letters = max(8, 60 // len(values))  # what fits under one bar
        names = ["\n".join(textwrap.fill(line, letters) for line in name.split("\n")) for name in values]
        axis.bar(names, heights, color=[used[name] for name in values], width=0.6)
        axis.errorbar(
            names, heights, yerr=[heights - low, high - heights], fmt="none", color="black", capsize=4
        )
        if reference is not None:
            axis.axhline(reference, color="black", linestyle="--", linewidth=1)
            where = {"xycoords": axis.get_yaxis_transform(), "textcoords": "offset points"}
            axis.annotate(reference_name, (1, reference), (4, 0), va="center", **where)
        axis.grid(axis="x", visible=False)
        _keep_inside(axis, "y", limits)
    return figure


def interval_panels(
    frame: pd.DataFrame,
    *,
    by: str,
    labels: Mapping[str, str],
    title: str = "",
    names: Mapping[str, str] | None = None,
    limits: Mapping[str, Limits] | None = None,
    colors: Mapping[str, str] | None = None,
) -> Figure:
    """Draw one panel per measure: the mean of every group of `by` over its rows, with its 95 % interval.

    At most three panels stand in a row, so that the letters stay readable at the width of a page. Intervals
    are Student's t over the rows of a group (seeds).

    Args:
        frame: one row per group and seed.
        by: column that holds the groups, drawn in the order of their first rows.
        labels: column -> label of its axis, with its unit.
        title: the message of the figure.
        names: group -> the words to show for it.
        limits: column -> what is possible, like (0, 1) for shares; intervals are cut there.
        colors: group -> color, where it should not have the color of its method.

    Raises:
        ValueError: a label without a unit, or a group with fewer than two rows.
    """
    groups = list(dict.fromkeys(frame[by]))
    shown = [(names or {}).get(group, str(group)) for group in groups]
    used = [
        (colors or {}).get(group) or method_color(name, method_color(str(group), OTHER_COLOR))
        for group, name in zip(groups, shown, strict=True)
    ]
    for label in labels.values():
        _require_unit("labels", label)
    columns = min(3, len(labels))
    rows = -(-len(labels) // columns)
    size = (min(FIGURE_WIDTH, 1.6 + 2.6 * columns), rows * (0.9 + 0.24 * len(groups)) + 0.3)
    with mpl.rc_context(STYLE | {"font.size": 10}):
        figure = Figure(layout="constrained", figsize=size)
        panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
        for axis, (column, label) in zip(panels, labels.items(), strict=False):
            means = [mean_interval(frame.loc[frame[by] == group, column].tolist()) for group in groups]
            possible = (limits or {}).get(column, (None, None))
            middle, low, high = np.array(means).T
            low, high = np.clip([low, high], *possible)
            places = np.arange(len(groups))
            axis.errorbar(
                middle,
                places,
                xerr=[middle - low, high - middle],
                fmt="o",
                color=OTHER_COLOR,
                ecolor=used,
                ms=4,
            )
            for place, color in enumerate(used):
                axis.plot(middle[place], place, "o", color=color, markersize=5, zorder=3, clip_on=False)
            axis.set(xlabel=textwrap.fill(label, 24), yticks=places, yticklabels=shown)
            _keep_inside(axis, "x", possible)
        for axis in panels[len(labels) :]:
            axis.remove()
        panels[0].set_ylim(len(groups) - 0.5, -0.5)
        if title:
            set_title(figure, title)
    return figure


def learning_curve(
    history: Any,
    *keys: str,
    ylabel: str,
    smooth: int = 1,
    names: Mapping[str, str] | None = None,
    **options: Any,
) -> Figure:
    """Draw the logged `keys` of a training History (or DataFrame) over its steps, `smooth` rows averaged.

    names: key -> the words to show for it. `options` go to `line_plot`: title, limits, label_ends and so on.
    Raises KeyError for a key that was not logged, ValueError for a ylabel without a unit.
    """
    frame = pd.DataFrame(history)
    steps = frame.get("step", np.arange(1, len(frame) + 1))
    smoothed = frame[list(keys)].rolling(smooth, min_periods=1).mean()
    lines = {(names or {}).get(key, key): smoothed[key].to_numpy() for key in keys}
    return line_plot(np.asarray(steps), lines, xlabel="step", ylabel=ylabel, **options)


def image_html(figure: Figure, *, alt: str) -> str:
    """Return a figure as one picture whose alt text is part of the page.

    The picture has 150 dpi and is shown at 100 pixels per inch: sharp, and no wider than the page. Its
    background is opaque white, so that it reads in a dark theme. The output is `<img alt="...">` with the
    picture inside: JupyterLab and the HTML export drop the alt text of a plain PNG output, so a screen
    reader would find nothing.

    Raises:
        ValueError: the alt text has fewer than 40 characters; say what is drawn, on which axes, and what
            the figure shows.
    """
    alt = " ".join(alt.split())
    if len(alt) < 40:
        raise ValueError(f"alt must describe the picture in at least 40 characters, got {len(alt)}: {alt!r}")
    drawn = io.BytesIO()
    _spread_end_labels(figure)  # the caller may have changed the limits of an axis
    figure.savefig(drawn, format="png", dpi=150, facecolor="white")
    # 128 colors are enough, at a third of the size; the octree keeps the colors of thin lines, to 1 of 255.
    # WebP without loss stores the same pixels in three quarters of the bytes that PNG needs. No version
    # inside: same bytes again.
    picture = Image.open(drawn).convert("RGB").quantize(128, Image.Quantize.FASTOCTREE)
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, format="webp", lossless=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return (
        f'<img alt="{html.escape(alt)}" src="data:image/webp;base64,{data}" '
        f'width="{round(figure.get_figwidth() * 100)}" style="max-width: 100%; height: auto">'
    )


def show(figure: Figure, *, alt: str) -> None:
    """Display a figure with its alt text, as `image_html` draws it.

    Raises:
        ValueError: the figure has no title, or the alt text is too short.
    """
    if not figure.get_suptitle():
        raise ValueError("the figure has no title: say in one what it shows (set_title, or title=...)")
    display({"text/html": image_html(figure, alt=alt), "text/plain": " ".join(alt.split())}, raw=True)

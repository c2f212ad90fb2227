"""Schematics of the lessons, drawn by code: each function returns a figure and its alt text.

figure, alt = schematics.pipeline()
show(figure, alt=alt)
"""

import textwrap
from collections.abc import Sequence
from itertools import pairwise

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from rlhf_helpers.lab.plots import AFTER, BEFORE, FIGURE_WIDTH, OTHER_COLOR, STYLE, set_title

Schematic = tuple[Figure, str]

# What opens the name of a colored box; the colors are light enough for black letters.
SHADES = {"[": "#bfe6d3", "(": "#dddddd", "{": "#f6d5c3"}
COLOR_WORDS = str.maketrans({"[": "green ", "(": "gray ", "{": "orange ", "]": "", ")": "", "}": ""})
FONT_SIZE = 12.5  # points: 10 pixels where the picture is 420 pixels wide
BOX_HEIGHT = 0.68  # inches


def _figure(height: float, title: str) -> Figure:
    with mpl.rc_context(STYLE):
        figure = Figure(layout="constrained", figsize=(FIGURE_WIDTH, height))
    set_title(figure, title)
    return figure


def draw_boxes(title: str, boxes: str, legend: str, *, arrows: str = "", gap: float = 0.4) -> Schematic:
    """Draw boxes in rows and columns, with straight arrows between them.

    Args:
        title: the message.
        boxes: one line per row, like "prompts | (sampler) |  | [policy]": [green], (gray), {orange}, white
            without a mark, and no box where nothing stands between two bars.
        legend: what the colors mean, written below.
        arrows: one chain per line, like "prompts -> sampler -> policy".
        gap: inches between two boxes of a row, 0 for a table.

    Returns:
        The figure, and an alt text that names every box with its color, and every arrow.
    """
    rows = [[name.strip() for name in line.split("|")] for line in boxes.strip().splitlines()]
    chains = [line.strip() for line in arrows.strip().splitlines()]
    column, pitch = FIGURE_WIDTH / len(rows[0]), BOX_HEIGHT + 0.8 * gap
    width, bottom = column - gap, pitch * len(rows) + 0.3
    figure = _figure(bottom + 0.5, title)
    axis = figure.add_subplot(xlim=(0, FIGURE_WIDTH), ylim=(bottom, 0))
    axis.axis("off")
    patches = {}
    for row, names in enumerate(rows):
        for index, name in enumerate(names):
            if not name:
                continue
            x, y = (index + 0.5) * column, (row + 0.5) * pitch
            corner = (x - width / 2, y - BOX_HEIGHT / 2)
            box = FancyBboxPatch(corner, width, BOX_HEIGHT, f"round, pad=0, rounding_size={gap / 5}")
            box.set(facecolor=SHADES.get(name[0], "white"), edgecolor=OTHER_COLOR)
            text = name.strip("[](){}")
            patches[text] = (x, y), axis.add_patch(box)
            label = textwrap.fill(text, int(width * 72 / (0.6 * FONT_SIZE)), break_on_hyphens=False)
            axis.text(x, y, label, ha="center", va="center", size=FONT_SIZE)
    for start, end in (pair for chain in chains for pair in pairwise(chain.split(" -> "))):
        (here, box), (there, target) = patches[start], patches[end]
        arrow = FancyArrowPatch(here, there, arrowstyle="-|>", mutation_scale=14, patchA=box, patchB=target)
        arrow.set_color(OTHER_COLOR)
        axis.add_patch(arrow)
    axis.text(0.1, bottom, legend, size=FONT_SIZE - 1, va="bottom")
    listed = "; ".join(", ".join(filter(None, names)) for names in rows).translate(COLOR_WORDS)
    alt = f"Boxes, row by row: {listed}. {legend}."
    return figure, alt + f" Arrows: {'; '.join(chains)}.".replace(" -> ", ", then ") * bool(chains)


def pipeline() -> Schematic:
    """Draw the stages of RLHF: SFT, comparisons, reward model, policy optimization (lesson 1)."""
    return draw_boxes(
        "Each stage of RLHF makes what the next one learns from",
        """
        example answers | [SFT model] | pairs of answers | people choose
        new prompts     | [policy]    | [reward model]   | labeled pairs
        """,
        "Green: a model that is trained",
        arrows="""
        example answers -> SFT model -> pairs of answers -> people choose -> labeled pairs
        labeled pairs -> reward model -> policy
        SFT model -> policy
        new prompts -> policy
        """,
    )


def reward_position() -> Schematic:
    """Draw where the reward of a padded batch is read (lesson 1)."""
    return draw_boxes(
        "The reward is read at the end token, wherever it stands",
        """
        (Name) | (a)   | (color) | (.) | [Red] | [.]     | {<end>}  | <pad> | <pad>
               |       |         |     |       |         | {reward} |       |
        (Who)  | (are) | (you)   | (?) | [A]   | [small] | [model]  | [.]   | {<end>}
               |       |         |     |       |         |          |       | {reward}
        """,
        "Gray: prompt, green: answer, orange: end token and its reward, white: padding",
        gap=0,
    )


def broadcast_grid() -> Schematic:
    """Draw what subtracting four rewards of shape (4,) from four of shape (4, 1) gives (lesson 1)."""
    return draw_boxes(
        "(4, 1) minus (4,) also compares answers of different pairs",
        """
                   | (rejected 1) | (rejected 2) | (rejected 3) | (rejected 4)
        (chosen 1) | [c1 - r1]    | {c1 - r2}    | {c1 - r3}    | {c1 - r4}
        (chosen 2) | {c2 - r1}    | [c2 - r2]    | {c2 - r3}    | {c2 - r4}
        (chosen 3) | {c3 - r1}    | {c3 - r2}    | [c3 - r3]    | {c3 - r4}
        (chosen 4) | {c4 - r1}    | {c4 - r2}    | {c4 - r3}    | [c4 - r4]
        """,
        "Green: the pairs that people compared, orange: answers of different pairs",
        gap=0,
    )


def four_models() -> Schematic:
    """Draw what the policy, the sampler, the reference and the judge are for (lesson 2)."""
    return draw_boxes(
        "Three models read each answer; only the policy is trained",
        """
        prompts | (sampler: a copy) |         | [policy]    | ratio to sampler
                |                   | answers | (reference) | KL to reference
                |                   |         | (judge)     | reward
        """,
        "Green: a model that is trained, gray: a model whose weights are frozen",
        arrows="""
        prompts -> sampler: a copy -> answers
        answers -> policy -> ratio to sampler
        answers -> reference -> KL to reference
        answers -> judge -> reward
        policy -> sampler: a copy
        """,
    )


def token_timeline(
    tokens: Sequence[str], rewards: Sequence[float], values: Sequence[float], advantages: Sequence[float]
) -> Schematic:
    """Draw reward, value and advantage over the tokens of one answer (lesson 2)."""
    figure = _figure(4.2, "One reward at the end becomes an advantage for every token")
    measures = {"reward": (rewards, OTHER_COLOR), "value": (values, BEFORE), "advantage": (advantages, AFTER)}
    for axis, (name, (numbers, color)) in zip(figure.subplots(3, sharex=True), measures.items(), strict=True):
        axis.bar(range(len(tokens)), numbers, color=color)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_ylabel(name, size=FONT_SIZE)
        axis.set_xticks(range(len(tokens)), tokens, size=FONT_SIZE - 1)
    listed = "; ".join(f"{name} {np.round(numbers, 2).tolist()}" for name, (numbers, _) in measures.items())
    return figure, f"Bars over an answer's tokens: {', '.join(tokens)}. From first to last token: {listed}."


def ppo_against_dpo() -> Schematic:
    """Draw the data flow of PPO above that of DPO (lesson 2)."""
    return draw_boxes(
        "PPO writes new answers at every step; DPO's pairs never change",
        """
        PPO: prompts       | [policy writes answers]             | (reward model scores them)
                           | PPO loss                            | [critic gives advantages]
        DPO: labeled pairs | [policy: log-probs of both answers] | (subtract those of the reference)
                           | DPO loss                            | beta times the difference
        """,
        "Green: a model that is trained, gray: a model whose weights are frozen",
        arrows="""
        PPO: prompts -> policy writes answers -> reward model scores them -> critic gives advantages
        critic gives advantages -> PPO loss -> policy writes answers
        DPO: labeled pairs -> policy: log-probs of both answers -> subtract those of the reference
        subtract those of the reference -> beta times the difference -> DPO loss
        DPO loss -> policy: log-probs of both answers
        """,
    )


def critique_revise() -> Schematic:
    """Draw the loop of critique and revision of Constitutional AI (lesson 3)."""
    return draw_boxes(
        "The model repairs its own answers and learns from the result",
        """
        request         | draft         | critique | one principle
        [trained model] | last revision | revision |
        """,
        "Each revision is the next draft. Green: a model that is trained",
        arrows="""
        request -> draft -> critique -> revision -> last revision -> trained model
        one principle -> critique
        revision -> draft
        """,
    )


def guard_and_fallback() -> Schematic:
    """Draw the way of a request through a guarded model (lesson 4)."""
    return draw_boxes(
        "What a guard stops is replaced by the fallback",
        """
        request | (input guard) | model      | (output guard)
                |               | {fallback} | what the user sees
        """,
        "Gray: a guard may stop the request or the answer, orange: what is shown then",
        arrows="""
        request -> input guard -> model -> output guard -> what the user sees
        input guard -> fallback -> what the user sees
        output guard -> fallback
        """,
    )

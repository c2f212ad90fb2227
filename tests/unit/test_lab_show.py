"""Plots, reports, quizzes and the execution of notebooks."""

import base64
import inspect
import io
import itertools
from collections import Counter
from xml.etree import ElementTree

import nbformat
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex, to_rgb
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from PIL import Image

from rlhf_helpers.lab import notebooks, plots, quizzes, reports

ALT = "Line chart of the loss over 3 steps; it falls from 3 to 1 without a bump."


def curve(title="The loss falls"):
    labels = {"xlabel": "step", "ylabel": "loss (nats)", "title": title}
    return plots.line_plot([1, 2, 3], {"loss": [3, 2, 1]}, **labels)


def test_line_plot_draws_what_it_is_given():
    figure = plots.line_plot(
        [0, 1],
        {"a": [1, 2], "b": [3, 4]},
        xlabel="x",
        ylabel="y (nats)",
        bands={"a": ([0, 1], [2, 3])},
    )
    (axis,) = figure.axes
    assert [list(line.get_ydata()) for line in axis.lines] == [[1, 2], [3, 4]]
    assert (
        len({line.get_color() for line in axis.lines}) == len({line.get_marker() for line in axis.lines}) == 2
    )
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["a", "b"]
    assert len(axis.collections) == 1


@pytest.mark.parametrize("label", ["loss", "", "(nats"])
def test_a_label_without_unit_is_refused(label):
    with pytest.raises(ValueError, match="must name its unit"):
        plots.line_plot([1], {"a": [1]}, xlabel="step", ylabel=label)


@pytest.mark.parametrize("lines", [{}, {str(n): [1] for n in range(9)}])
def test_lines_that_cannot_be_drawn_are_refused(lines):
    with pytest.raises(ValueError, match="lines"):
        plots.line_plot([1], lines, xlabel="step", ylabel="loss (nats)")


def test_lines_of_unequal_lengths_are_refused():
    with pytest.raises(ValueError):
        plots.line_plot([1, 2], {"a": [1]}, xlabel="step", ylabel="loss (nats)")


def test_bars_carry_their_intervals():
    labels = {"xlabel": "model", "ylabel": "accuracy (share)"}
    figure = plots.bar_with_intervals({"a": 0.6, "b": 0.7}, {"a": (0.5, 0.8), "b": (0.6, 0.9)}, **labels)
    (axis,) = figure.axes
    assert [bar.get_height() for bar in axis.patches] == [0.6, 0.7]
    (segments,) = [c.get_segments() for c in axis.collections]
    assert np.allclose(segments, [[[0, 0.5], [0, 0.8]], [[1, 0.6], [1, 0.9]]])
    with pytest.raises(ValueError, match="'a' needs an interval"):
        plots.bar_with_intervals({"a": 0.6}, {"a": (0.7, 0.8)}, **labels)
    with pytest.raises(ValueError, match="at least one bar"):
        plots.bar_with_intervals({}, {}, **labels)


def test_panels_show_mean_and_interval_of_every_group():
    frame = pd.DataFrame({"method": ["b", "b", "b", "a", "a"], "gold": [1.0, 2.0, 3.0, 5.0, 5.0]})
    figure = plots.interval_panels(frame, by="method", labels={"gold": "gold (0 to 1)"})
    (axis,) = figure.axes
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["b", "a"]
    drawn, _, (bars,) = axis.containers[0]
    assert list(drawn.get_xdata()) == [2.0, 5.0]
    # s = 1, n = 3: 2 -+ 4.3027 / sqrt(3); no spread: no width
    assert [segment[:, 0].tolist() for segment in bars.get_segments()] == [
        pytest.approx([2 - 2.4841, 2 + 2.4841], abs=1e-3),
        [5.0, 5.0],
    ]
    assert axis.yaxis_inverted()  # the first row is on top
    with pytest.raises(ValueError, match="labels must name its unit"):
        plots.interval_panels(frame, by="method", labels={"gold": "gold"})


def test_learning_curve_smooths_and_names_missing_keys():
    frame = pd.DataFrame({"step": [10, 20, 30], "loss": [4.0, 2.0, 0.0]})
    figure = plots.learning_curve(frame, "loss", ylabel="loss (nats)", smooth=2)
    line = figure.axes[0].lines[0]
    assert list(line.get_xdata()) == [10, 20, 30]
    assert list(line.get_ydata()) == [4, 3, 1]
    with pytest.raises(KeyError, match="acc"):
        plots.learning_curve(frame, "acc", ylabel="accuracy (share)")


@pytest.mark.parametrize(
    "name, method",
    [
        ("PPO", "PPO"),
        ("RLOO,\nbest of 4, guard", "RLOO"),
        ("RLHF", "RLOO"),
        ("DPO from the base", "DPO"),
        ("cDPO", "DPO"),
        ("untrained,\nbest of 4, guard", "best of n"),
        ("best-of-n", "best of n"),
        ("SFT on people's summaries", "SFT"),
        ("imitation, 3 epochs", "SFT"),
        ("untrained", "base"),
        ("chosen by the reward model", "proxy"),
        ("gold reward", "gold"),
    ],
)
def test_a_method_has_one_color_whatever_else_its_name_says(name, method):
    assert plots.method_color(name) == plots.METHOD_COLORS[method]


def test_names_of_no_method_have_no_color_of_their_own():
    assert len(set(plots.METHOD_COLORS.values())) == len(plots.METHOD_COLORS) == 11
    for name in ("baseline", "early stop", "controlled"):  # "base" and "RL" inside other words
        with pytest.raises(ValueError, match=f"{name}.* names no method"):
            plots.method_color(name)
    assert plots.method_color("early stop", "red") == "red"
    assert plots.line_colors(["other", "PPO", "PPO-ptx"]) == {
        "PPO": "#d55e00",
        "other": plots.PALETTE[0],
        "PPO-ptx": plots.PALETTE[1],
    }


def test_after_has_a_color_of_its_own_that_everybody_can_see():
    others = {*plots.METHOD_COLORS.values(), *plots.PALETTE, plots.OTHER_COLOR}
    assert plots.BEFORE in others
    assert plots.AFTER not in others

    def light(color, sees):  # relative luminance of the page, and what dichromats tell apart (Machado 2009)
        channel = np.array(to_rgb(color))
        linear = np.where(channel <= 0.04045, channel / 12.92, ((channel + 0.055) / 1.055) ** 2.4)
        return np.array(sees) @ linear

    luminance = [[0.2126, 0.7152, 0.0722]]
    for color in (plots.BEFORE, plots.AFTER):
        assert 1.05 / (light(color, luminance)[0] + 0.05) >= 3
    deutan = [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]
    protan = [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]
    for sees in (np.eye(3), deutan, protan):
        mine = np.sqrt(light(plots.AFTER, sees).clip(0))
        gaps = [np.abs(np.sqrt(light(color, sees).clip(0)) - mine).max() for color in others]
        assert min(gaps) > 0.15


def test_a_title_is_wrapped():
    message = "The proxy keeps rising while the gold reward turns around after twenty steps and falls"
    titled = curve("")
    assert not titled.get_suptitle()
    plots.set_title(titled, message)
    assert titled.get_suptitle().count("\n") == 1
    assert titled.get_suptitle().replace("\n", " ") == message
    titled.draw_without_rendering()
    assert titled._suptitle.get_window_extent().x1 < titled.bbox.x1


def test_names_at_the_ends_of_lines_do_not_overlap_and_stay_in_the_picture():
    lines = {"PPO": [0, 0.50], "RLOO": [0, 0.51], "a longer name on two lines": [0, 0.52], "low": [1, 0]}
    figure = plots.line_plot(
        [1, 2], lines, xlabel="step", ylabel="gold (0 to 1)", title="All end alike", label_ends=True
    )
    (axis,) = figure.axes
    assert axis.get_legend() is None
    boxes = sorted((text.get_window_extent() for text in axis.texts), key=lambda box: box.y0)
    assert len(boxes) == 4
    assert all(upper.y0 >= lower.y1 - 0.5 for lower, upper in itertools.pairwise(boxes))
    assert max(box.x1 for box in boxes) <= figure.bbox.x1
    assert axis.lines[0].get_color() == plots.METHOD_COLORS["PPO"]


def test_nothing_is_drawn_outside_what_is_possible():
    figure = plots.line_plot(
        [0, 1],
        {"a": [0.1, 0.9]},
        xlabel="step",
        ylabel="accuracy (share)",
        bands={"a": ([-0.2, 0.8], [0.4, 1.2])},
        limits=(0, 1),
    )
    (axis,) = figure.axes
    heights = axis.collections[0].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (0, 1)
    assert -0.05 < axis.get_ylim()[0] < axis.get_ylim()[1] < 1.05

    labels = {"xlabel": "model", "ylabel": "accuracy (share)"}
    figure = plots.bar_with_intervals({"SFT": 0.9}, {"SFT": (0.7, 1.1)}, limits=(0, 1), **labels)
    (segment,) = figure.axes[0].collections[0].get_segments()
    assert segment[:, 1].tolist() == pytest.approx([0.7, 1.0])
    assert to_hex(figure.axes[0].patches[0].get_facecolor()) == plots.METHOD_COLORS["SFT"]
    figure = plots.bar_with_intervals(
        {"a": 0.6}, {"a": (0.5, 0.7)}, reference=0.5, reference_name="chance", **labels
    )
    figure.draw_without_rendering()
    (name,) = figure.axes[0].texts
    assert (name.get_text(), name.xy) == ("chance", (1, 0.5))
    assert name.get_window_extent().x1 <= figure.bbox.x1


def test_panels_wrap_and_carry_human_names():
    frame = pd.DataFrame({"arm": ["rl", "rl", "old", "old"], **{key: [0.0, 1.0, 0.5, 0.5] for key in "abcd"}})
    figure = plots.interval_panels(
        frame,
        by="arm",
        labels={key: f"{key} (share)" for key in "abcd"},
        title="Training helps",
        names={"rl": "RLOO"},
        limits={"a": (0, 1), "b": (0, None)},
        colors={"old": plots.BEFORE},
    )
    assert len(figure.axes) == 4
    assert figure.get_figwidth() == 7
    assert figure.get_suptitle()
    segments = [axis.collections[0].get_segments()[0][:, 0].tolist() for axis in figure.axes]
    assert segments[0] == [0, 1]  # 0.5 -+ 12.7062 * 0.5, cut at what is possible
    assert segments[1] == pytest.approx([0, 6.8531], abs=1e-3)
    assert segments[2] == pytest.approx([-5.8531, 6.8531], abs=1e-3)
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["RLOO", "old"]
    assert [line.get_color() for line in figure.axes[0].lines[1:]] == [
        plots.METHOD_COLORS["RLOO"],
        plots.BEFORE,
    ]


@pytest.fixture
def displayed(monkeypatch):
    """What a cell displays: a list of (object, keywords)."""
    seen = []
    for module in (plots, reports):
        monkeypatch.setattr(module, "display", lambda thing, **keywords: seen.append((thing, keywords)))
    return seen


def test_show_puts_the_alt_text_into_the_page_and_gives_the_same_bytes_twice(displayed):
    alt = f"{ALT} Here a < b."
    plots.show(curve(), alt=alt)
    plots.show(curve(), alt=f"  {alt}\n")
    assert displayed[0] == displayed[1]
    picture, keywords = displayed[0]
    assert keywords == {"raw": True}
    assert picture["text/plain"] == alt
    image = ElementTree.fromstring(picture["text/html"].replace('auto">', 'auto"/>'))
    assert image.tag == "img"
    assert image.get("alt") == alt
    kind, data = image.get("src").split(",")
    assert kind == "data:image/webp;base64"
    drawn = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (drawn.format, drawn.size) == ("WEBP", (960, 540))  # 6.4 x 3.6 inches at 150 dpi
    assert (image.get("width"), image.get("style")) == ("640", "max-width: 100%; height: auto")
    assert drawn.convert("RGBA").getpixel((0, 0)) == pytest.approx((255, 255, 255, 255), abs=1)
    assert len(set(drawn.convert("RGB").get_flattened_data())) <= 128
    with pytest.raises(ValueError, match="at least 40 characters, got 6"):
        plots.show(curve(), alt="a plot")


def test_show_refuses_a_figure_without_a_title(displayed):
    with pytest.raises(ValueError, match="the figure has no title"):
        plots.show(curve(title=""), alt=ALT)
    assert not displayed


def test_wilson_interval_literal_values():
    assert reports.wilson_interval(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert reports.wilson_interval(0, 20) == pytest.approx((0.0, 0.1611252), abs=1e-6)
    assert reports.wilson_interval(20, 20)[1] == 1
    for bad in ((1, 0), (-1, 5), (6, 5)):
        with pytest.raises(ValueError, match="wilson_interval"):
            reports.wilson_interval(*bad)


def test_mean_interval_literal_values():
    assert reports.mean_interval([1, 2, 3, 4]) == pytest.approx((2.5, 0.4457397, 4.5542603), abs=1e-6)
    for bad in ([1.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="N >= 2"):
            reports.mean_interval(bad)


def test_table_is_a_small_frame():
    frame = reports.table({"ours": (0.71234, 0.65, 0.77)}, quantity="accuracy (share)")
    assert frame.loc["ours"].tolist() == [0.712, "0.650 to 0.770"]


def test_show_source_prints_the_function_with_or_without_docstring(displayed):
    for docstring in (True, False):
        reports.show_source(reports.wilson_interval, docstring=docstring)
        shown = displayed[-1][0]
        text = shown["text/plain"]
        assert shown["text/markdown"] == f"```python\n{text}\n```"
        assert text.startswith("def wilson_interval(")
        assert "return float(min(" in text
        assert ("Wilson 1927" in text) is docstring
        assert text.count('"""') == (2 if docstring else 0)


def test_show_source_finds_a_docstring_that_python_has_dedented(displayed, monkeypatch):
    monkeypatch.setattr(reports.show_source, "__doc__", inspect.cleandoc(reports.show_source.__doc__))
    reports.show_source(reports.show_source, docstring=False)
    text = displayed[-1][0]["text/plain"]
    assert "colors in its own theme" not in text
    assert text.count("display(") == 1
    assert text.splitlines()[1].startswith("    source = ")


def test_quiz_folds_the_answer_away():
    form = quizzes.quiz("baseline_effect")._repr_mimebundle_()[0]["text/html"]
    item = quizzes.questions()["baseline_effect"]
    right = f"{item['answer'] + 1}. The variance of the gradient"
    assert form.index("What does a baseline change?") < form.index("<details") < form.index(right)
    assert form.index(right) < form.index("The expected gradient of log pi is 0")
    with pytest.raises(ValueError, match=r"no quiz is named 'base'.*baseline_effect"):
        quizzes.quiz("base")


def test_every_quiz_is_sound_and_the_answers_do_not_share_one_position():
    items = quizzes.questions().values()
    for item in items:
        assert len(set(item["options"])) == len(item["options"]) >= 3
        assert 0 <= item["answer"] < len(item["options"])
        assert item["question"].endswith("?")
        assert item["explanation"].endswith((".", ")"))
        for index, why in enumerate(item["why_not"]):
            assert bool(why) == (index != item["answer"])
            assert item["options"][item["answer"]].lower() not in why.lower()
            assert not why or why.endswith((".", "?"))
    positions = Counter(item["answer"] for item in items)
    assert max(positions.values()) < len(items) / 2


@pytest.fixture
def lesson(tmp_path):
    folder = tmp_path / "lessons"
    folder.mkdir()
    cells = [
        new_markdown_cell("# A lesson", id="a"),
        new_code_cell(
            "import os, sys\nfrom tqdm.auto import tqdm\nprint(os.getcwd() + os.sep + 'file')", id="b"
        ),
        new_code_cell("for _ in tqdm(range(3)): pass\nprint('do', end='', flush=True)\nprint('ne')", id="c"),
        new_code_cell("import ipywidgets\nipywidgets.IntSlider()", id="d"),
        new_code_cell(
            "print(os.environ['RLHF_PROGRESS'] == '', os.environ['TQDM_DISABLE'])\n1 + 1",
            id="e",
            metadata={"execution": {"x": "y"}, "slideshow": {"slide_type": "skip"}},
        ),
    ]
    path = folder / "lesson.ipynb"
    nbformat.write(new_notebook(cells=cells, metadata={"widgets": {"state": {}}}), path)
    return path


@pytest.mark.slow
def test_run_notebooks_is_clean_and_the_same_twice(lesson):
    assert notebooks.run_notebooks([lesson]) == [lesson]
    first = lesson.read_bytes()
    assert notebooks.run_notebooks([lesson], check=True) == []
    notebook = nbformat.reads(first, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [1, 2, 3, 4]
    assert [[o.get("text", o.get("data")) for o in cell.outputs] for cell in code] == [
        ["lessons/file\n"],
        ["done\n"],
        [],
        ["True 1\n", {"text/plain": "2"}],
    ]
    assert not any("execution" in cell.metadata for cell in notebook.cells)
    assert code[3].metadata.slideshow.slide_type == "skip"
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    code[1].outputs[0].text = "stale\n"
    nbformat.write(notebook, lesson)
    assert notebooks.run_notebooks([lesson], check=True) == [lesson]
    assert b"stale" in lesson.read_bytes()  # --check writes nothing


@pytest.mark.slow
def test_a_failing_notebook_keeps_its_stored_form(lesson):
    notebook = nbformat.read(lesson, as_version=4)
    notebook.cells[1].source = "assert 1 == 2"
    nbformat.write(notebook, lesson)
    before = lesson.read_bytes()
    with pytest.raises(CellExecutionError, match="assert 1 == 2"):
        notebooks.run_notebooks([lesson])
    assert lesson.read_bytes() == before
    with pytest.raises(FileNotFoundError, match=r"nothing\.ipynb"):
        notebooks.run_notebooks([lesson.with_name("nothing.ipynb")])

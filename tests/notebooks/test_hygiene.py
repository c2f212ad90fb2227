"""Check what a stored lesson looks like: run in order, clean outputs, described pictures, short cells."""

import re
import statistics
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from rlhf_helpers.lab.exercises import NAMES

LESSONS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
MAX_BYTES, MAX_CELL_LINES, MAX_MEDIAN_LINES, MIN_ALT_LENGTH = 1_500_000, 30, 10, 40
MIN_SLIDES = 40
WIDGET = "application/vnd.jupyter.widget-view+json"
UNWANTED_TEXT = {
    "absolute path": re.compile(r"(?<![\w.:/<])/(?:home|work|root|Users|tmp|usr|opt|mnt|var)/|[A-Z]:\\\\"),
    "address of an object": re.compile(r"\b0x[0-9a-f]{8,}"),
    "progress bar": re.compile(r"\d+%\|.*\||it/s|s/it"),
    "timing": re.compile(
        r"\b(?:CPU times|Wall time)\b|\b\d+(?:\.\d+)? ?(?:ms|seconds|sec|s) (?:elapsed|per loop)"
    ),
}
CHECK = re.compile(r"\bcheck\(\s*[\"']")
HEADER = re.compile(r"difficulty.*importance.*minutes", re.I | re.S)


IMAGE_DATA = re.compile(r"base64,[A-Za-z0-9+/=]+")
IMAGE = re.compile(r"<img\b[^>]*>")
ALT = re.compile(r'\balt="([^"]*)"')
QUIZ_TEXT = re.compile(r"\bquiz\((?!\"\w+\"\))")


def text_of(output):
    if output.output_type == "stream":
        return output.text
    kinds = ("text/plain", "text/html", "text/markdown")
    text = "\n".join(output.get("data", {}).get(kind, "") for kind in kinds)
    return IMAGE_DATA.sub("", text)  # letters that mean nothing


FENCE = re.compile(r"```.*?```", re.S)


def heading_levels(cell):
    if cell.cell_type == "markdown":
        return [len(marks) for marks in re.findall(r"^(#+) ", FENCE.sub("", cell.source), re.M)]
    page = "\n".join(output.get("data", {}).get("text/html", "") for output in cell.outputs)
    return [int(level) for level in re.findall(r"<h([1-6])\b", page)]


def heading_faults(cells):
    last = 6  # a notebook may start with any level
    for number, cell in enumerate(cells):
        for level in heading_levels(cell):
            if level > last + 1:
                yield f"cell {number} has a heading of level {level} below one of level {last}"
            last = level


def output_faults(number, output):
    data = output.get("data", {})
    if output.output_type == "error":
        yield f"cell {number} stores an error"
    if output.output_type == "stream" and output.name == "stderr":
        yield f"cell {number} stores text of stderr"
    if WIDGET in data and "text/html" not in data:
        yield f"cell {number} stores a widget that a page cannot show"
    if any(kind.startswith("image/") for kind in data):
        yield f"cell {number} stores a picture without alt text in the page (lab.plots.show writes it)"
    for image in IMAGE.findall(data.get("text/html", "")):
        alt = ALT.search(image)
        if alt is None or len(alt[1]) < MIN_ALT_LENGTH:
            yield f"cell {number} stores a figure without alt text"
    for what, pattern in UNWANTED_TEXT.items():
        if pattern.search(text_of(output)):
            yield f"cell {number} stores a {what}: {pattern.search(text_of(output))[0]!r}"


def exercise_faults(cells):
    """Each check(...) stands under a header of its own, with folded hints and a folded solution."""
    headers = [i for i, c in enumerate(cells) if c.cell_type == "markdown" and HEADER.search(c.source)]
    checks = [i for i, c in enumerate(cells) if c.cell_type == "code" and CHECK.search(c.source)]
    for previous, here in zip([-1, *checks], checks, strict=False):
        mine = [i for i in headers if previous < i < here]
        if not mine:
            yield f"exercise in cell {here} has no header with difficulty, importance and minutes"
            continue
        end = min((i for i in headers if i > here), default=len(cells))
        text = "\n".join(c.source for c in cells[mine[-1] : end] if c.cell_type == "markdown")
        folded = re.findall(r"<details>\s*<summary>(.*?)</summary>.*?</details>", text, re.S)
        for word in ("hint", "solution"):
            if not any(word in summary.lower() for summary in folded):
                yield f"exercise in cell {here} has no folded {word}"


def slide_type(cell):
    """Headings, figures and tables start slides. None: the cell stays on the slide of the cell before it."""
    heading = re.match(r"(#+) ", cell.source) if cell.cell_type == "markdown" else None
    outputs = cell.get("outputs", [])
    if heading:
        return "slide" if len(heading[1]) <= 2 else "subslide"
    if cell.source.startswith("**What we saw"):
        return "fragment"
    if any("text/html" in output.get("data", {}) for output in outputs):
        return "subslide"
    return "skip" if "remove-input" in cell.metadata.get("tags", []) and not outputs else None


def stored_slide_type(cell):
    return cell.metadata.get("slideshow", {}).get("slide_type")


def cell_faults(number, cell):
    stored, wanted = stored_slide_type(cell), slide_type(cell)
    if stored != wanted:
        yield (
            f"cell {number} has the slide type {stored}, not {wanted}: set it in JupyterLab (Property "
            "Inspector, Slide Type; None is shown as -) or as metadata.slideshow.slide_type in the file"
        )
    if "execution" in cell.metadata:
        yield f"cell {number} stores timings"
    if cell.cell_type == "code":
        if len(cell.source.splitlines()) > MAX_CELL_LINES:
            yield f"cell {number} has more than {MAX_CELL_LINES} lines"
        if QUIZ_TEXT.search(cell.source):
            yield f'cell {number} shows the text of a quiz: name it, quiz("name")'
        for output in cell.outputs:
            yield from output_faults(number, output)
    elif re.search(r"!\[\s*\]\(|<img(?![^>]*\balt=.)", cell.source):
        yield f"cell {number} shows a picture without alt text"


def faults_of(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        yield "execution counts are not 1..n: run `python -m rlhf_helpers notebooks`"
    if not any(cell.outputs for cell in code):
        yield "no outputs are stored"
    if set(notebook.metadata) - {"kernelspec", "language_info"}:
        yield f"metadata holds {sorted(set(notebook.metadata) - {'kernelspec', 'language_info'})}"
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        yield "the kernel is not plain python3"
    lengths = [len(cell.source.splitlines()) for cell in code]
    if lengths and statistics.median(lengths) > MAX_MEDIAN_LINES:
        yield f"the median code cell has {statistics.median(lengths)} lines ({MAX_MEDIAN_LINES} at most)"
    for number, cell in enumerate(notebook.cells):
        yield from cell_faults(number, cell)
    yield from exercise_faults(notebook.cells)
    yield from heading_faults(notebook.cells)


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.name)
def test_lesson_is_clean(path):
    assert path.stat().st_size < MAX_BYTES
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert list(faults_of(notebook)) == []
    slides = [cell for cell in notebook.cells if stored_slide_type(cell) in ("slide", "subslide")]
    assert len(slides) >= MIN_SLIDES


@pytest.mark.parametrize(
    "number, path", list(enumerate(LESSONS, 1)), ids=lambda value: getattr(value, "name", None)
)
def test_progress_lists_the_exercises_in_the_order_of_the_lesson(number, path):
    code = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert re.findall(r'\bcheck\("(\w+)"', "\n".join(code)) == list(NAMES[number])


IMG = '<img alt="{}" src="data:image/png;base64,iVBOR/home/it/s=">'
SUBSLIDE = {"slideshow": {"slide_type": "subslide"}}


def sound_notebook():
    picture = new_output("display_data", {"text/html": IMG.format("A line that falls. " * 3)})
    answer = "<details><summary>Hint 1</summary>x</details><details><summary>Solution</summary>y</details>"
    return new_notebook(
        metadata={
            "kernelspec": {"name": "python3", "display_name": "Python 3"},
            "language_info": {"name": "python"},
        },
        cells=[
            new_code_cell(
                "print(1)", execution_count=1, outputs=[new_output("stream", name="stdout", text="1")]
            ),
            new_code_cell("show(figure, alt='...')", execution_count=2, outputs=[picture], metadata=SUBSLIDE),
            new_markdown_cell(
                "### Exercise\nDifficulty: low. Importance: high. About 5 minutes.", metadata=SUBSLIDE
            ),
            new_code_cell("def f(x): ...\nf = check('f', f)", execution_count=3),
            new_markdown_cell(answer),
        ],
    )


def set_output(notebook, **fields):
    notebook.cells[0].outputs = [new_output(**fields)]


FAULTY = {
    "slide type": lambda n: n.cells[2].metadata.slideshow.update(slide_type="slide"),
    "no slide type": lambda n: n.cells[1].metadata.clear(),
    "counts": lambda n: n.cells[1].update(execution_count=5),
    "never run": lambda n: n.cells[0].update(execution_count=None),
    "widget state": lambda n: n.metadata.update(widgets={}),
    "other kernel": lambda n: n.metadata.kernelspec.update(name="my-env"),
    "timings": lambda n: n.cells[0].metadata.update(execution={"iopub.status.busy": "..."}),
    "long cell": lambda n: n.cells[0].update(source="x = 1\n" * 31),
    "long median": lambda n: [cell.update(source="x = 1\n" * 11) for cell in n.cells[:2]],
    "error": lambda n: set_output(n, output_type="error", ename="E", evalue="", traceback=[]),
    "stderr": lambda n: set_output(n, output_type="stream", name="stderr", text="careful"),
    "bar": lambda n: set_output(
        n, output_type="stream", name="stdout", text=" 40%|####    | 2/5 [00:01, 3.1it/s]"
    ),
    "path": lambda n: set_output(
        n, output_type="stream", name="stdout", text="/".join(["saved in ", "home", "me"])
    ),
    "address": lambda n: set_output(
        n, output_type="execute_result", data={"text/plain": "<f at 0x7f12ab34cd>"}
    ),
    "wall time": lambda n: set_output(n, output_type="stream", name="stdout", text="Wall time: 3.2 s"),
    "widget": lambda n: set_output(n, output_type="display_data", data={WIDGET: {}, "text/plain": "VBox()"}),
    "no alt": lambda n: n.cells[1].outputs[0].data.update({"text/html": "<img src='x'>"}),
    "short alt": lambda n: n.cells[1].outputs[0].data.update({"text/html": IMG.format("a plot")}),
    "plain picture": lambda n: n.cells[1].outputs[0].data.update({"image/png": "iVBOR"}),
    "quiz text": lambda n: n.cells[0].update(source='quiz("Which?", ["a", "b"], answer=1)'),
    "no alt in text": lambda n: n.cells[2].update(source=n.cells[2].source + "\n![](x.png)"),
    "skipped level": lambda n: n.cells[2].update(source=n.cells[2].source + "\n##### Details"),
    "skipped level in output": lambda n: n.cells[3].update(
        outputs=[new_output("display_data", {"text/html": "<h5>Lesson 1</h5>"})], metadata=SUBSLIDE
    ),
    "no header": lambda n: n.cells[2].update(source="### Exercise"),
    "no solution": lambda n: n.cells[4].update(source="<details><summary>Hint</summary>x</details>"),
    "no hint": lambda n: n.cells[4].update(source="<details><summary>Solution</summary>x</details>"),
}


def test_the_rules_pass_a_sound_notebook():
    assert list(faults_of(sound_notebook())) == []


@pytest.mark.parametrize("name", FAULTY)
def test_the_rules_find_the_fault(name):
    notebook = sound_notebook()
    FAULTY[name](notebook)
    assert len(list(faults_of(notebook))) == 1

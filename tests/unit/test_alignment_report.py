"""Reports are read back: every figure has its alt text, every number is there, markup stays text."""

from html.parser import HTMLParser
from importlib.metadata import version

import pandas as pd
import pytest
import torch

from rlhf_helpers.alignment_eval import AlignmentReportGenerator, ReportFigure, weights_fingerprint
from rlhf_helpers.lab.plots import line_plot
from rlhf_helpers.lab.reports import figure_png

EVIL = '<script>alert("x")</script> | **bold** [link](http://x)\nsecond line'
ALT = 'The loss falls from 3 to 1 & stays "there".'
TABLE = pd.DataFrame({"value": [0.123456, 12345.678], "low": [-0.5, 0.0], "n": [40, 7]}, index=["help", EVIL])


class Page(HTMLParser):
    """What a browser would find: tags, pictures, and the text of every table cell."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.pictures, self.cells, self.words, self.inside = [], [], [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.inside = tag in ("td", "th")
        if tag == "img":
            self.pictures.append(dict(attributes))

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data):
        self.words += data
        if self.inside:
            self.cells.append(data)


@pytest.fixture(scope="module")
def png():
    return figure_png(line_plot([1, 2, 3], {"loss": [3, 2, 1]}, xlabel="step (count)", ylabel="loss (nats)"))


@pytest.fixture
def write(tmp_path, png):
    def run(results=None, figures=None, out=tmp_path / "report", **options):
        results = (
            {"Scores": TABLE, EVIL: {"win rate": 0.7512345, "beaten": EVIL}, "Words": EVIL}
            if results is None
            else results
        )
        figures = [ReportFigure(png, ALT)] if figures is None else figures
        generator = AlignmentReportGenerator(
            EVIL, model=torch.nn.Linear(1, 1), seeds=[3, 4], settings={"length": 64}
        )
        return generator.generate_alignment_report(results, figures=figures, out=out, **options)

    return run


def test_html_holds_everything_and_obeys_nothing(write, png):
    figures = [ReportFigure(png, ALT), ReportFigure(png, ALT + " Again.")]
    page = Page(write(figures=figures)["html"].read_text("utf8"))
    assert "script" not in page.tags
    assert [picture["alt"] for picture in page.pictures] == [ALT, ALT + " Again."]
    assert all(picture["src"].startswith("data:image/png;base64,iVBOR") for picture in page.pictures)
    for number in ("0.1235", "1.235e+04", "-0.5", "0", "40", "7", "0.7512", "3, 4", "64"):
        assert number in page.cells, number
    # As it was: in the title, a heading, a paragraph, a row's name and a cell.
    assert page.words.count('<script>alert("x")</script> | **bold**') == 6
    assert page.words.count("Run manifest") == 1
    assert {"torch", "python", "rlhf-helpers", weights_fingerprint(torch.nn.Linear(1, 1))} - set(
        page.cells
    ) != set()


def test_the_manifest_names_the_model(tmp_path):
    model = torch.nn.Linear(2, 2)
    paths = AlignmentReportGenerator("A", model=model).generate_alignment_report({}, out=tmp_path)
    cells = Page(paths["html"].read_text("utf8")).cells
    assert cells[cells.index("model") + 1] == weights_fingerprint(model)
    assert cells[cells.index("torch") + 1] == version("torch")
    assert cells[cells.index("seeds") + 1] == "not given"


def test_markdown_stands_beside_its_figures(write, png):
    path = write()["markdown"]
    text = path.read_text("utf8")
    assert "<script>" not in text
    assert r"\*\*bold\*\*" in text
    assert r"\[link\]" in text
    assert '![The loss falls from 3 to 1 &amp; stays "there".](alignment_report_figure_1.png)' in text
    assert (path.parent / "alignment_report_figure_1.png").read_bytes() == png
    rows = [line for line in text.splitlines() if line.startswith("| help")]
    assert rows == ["| help | 0.1235 | -0.5 | 40 |"]
    table = text[text.index("| help") :].splitlines()[1]
    assert table.replace(r"\|", "").count("|") == 5, "a bar in a text opens no cell"


def test_nothing_is_overwritten_unasked(write, tmp_path):
    first = write()
    old = first["html"].read_bytes()
    with pytest.raises(FileExistsError, match="say overwrite=True"):
        write({"Other": "text"})
    assert first["html"].read_bytes() == old
    write({"Other": "text"}, overwrite=True)
    assert b"Other" in first["html"].read_bytes()
    assert not [p for p in first["html"].parent.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    "figure, message",
    [
        (lambda png: ReportFigure(b"GIF89a", ALT), "must be a PNG"),
        (lambda png: ReportFigure(png, "a plot"), "in words"),
        (lambda png: ReportFigure(png, ""), "in words"),
    ],
)
def test_a_bad_figure_leaves_nothing_behind(write, tmp_path, png, figure, message):
    with pytest.raises(ValueError, match=message):
        write(figures=[ReportFigure(png, ALT), figure(png)])
    assert not (tmp_path / "report").exists()
    with pytest.raises(TypeError, match=r"results\['Scores'\] must be"):
        write({"Scores": [1, 2]})


def test_long_texts_are_not_cut(write):
    answer = ("word " * 100).strip()
    page = Page(write({"Answers": {"said": answer}})["html"].read_text("utf8"))
    assert answer in page.cells


def test_a_figure_gives_the_same_bytes_twice(png):
    assert png.startswith(b"\x89PNG")
    assert b"Software" not in png

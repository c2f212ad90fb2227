"""Lessons as pages, slides and PDF: what is left out, wrapped and opened."""

import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from rlhf_helpers.__main__ import main
from rlhf_helpers.lab import export
from rlhf_helpers.lab.export import convert, export_notebooks

LESSONS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
FOLD = "<details><summary>Solution</summary>\n\nfour\n</details>"
HIDDEN = {"tags": ["remove-input"], "jupyter": {"source_hidden": True}}


def output(kind, text):
    return new_output("display_data", {kind: text})


def lesson():
    return new_notebook(
        cells=[
            new_markdown_cell(
                "# A lesson\nSee [the next](02_next.ipynb#part) and [a site](https://x.y/z.ipynb)."
            ),
            new_markdown_cell("## 1. One"),
            new_code_cell("x = 2 + 2", outputs=[new_output("display_data", {})]),
            new_code_cell("assert x == 4, 'a hidden claim'", metadata=HIDDEN),
            new_markdown_cell("### A figure"),
            new_code_cell(
                "draw()", metadata=HIDDEN, outputs=[output("text/html", "<img alt='a figure' src='x'>")]
            ),
            new_markdown_cell("**What we saw.** A line."),
            new_code_cell("table", outputs=[output("text/html", "<table></table>")]),
            new_markdown_cell(FOLD),
        ]
    )


@pytest.mark.parametrize("kind", ["html", "slides", "pdf"])
def test_inputs_with_the_tag_are_left_out_and_their_figures_stay(kind):
    page = convert(lesson(), kind=kind)
    assert "a hidden claim" not in page
    assert "draw" not in page
    assert re.search(r'<img alt="a figure" src="x"/?>', page)
    assert "<title>A lesson" in page


def test_the_page_wraps_fits_narrow_screens_and_has_dark_colors():
    page = convert(lesson(), kind="html")
    head = page.split("</head>")[0]
    for rule in ("pre-wrap", "max-width: 600px", "prefers-color-scheme: dark", "@media print"):
        assert rule in head
    dark = head.split("prefers-color-scheme: dark")[1]
    assert re.search(r"--jp-layout-color0: (#111|var\(--md-grey-900)", dark)
    assert "/* DARK */" not in head


def test_folds_open_in_print():
    assert "beforeprint" in convert(lesson(), kind="html")
    assert "<details open>" not in convert(lesson(), kind="html")
    assert "<details open>" in convert(lesson(), kind="pdf")


@pytest.mark.parametrize("kind, ending", [("html", ".html"), ("slides", ".slides.html"), ("pdf", ".html")])
def test_links_between_lessons_lead_to_the_exported_ones(kind, ending):
    page = convert(lesson(), kind=kind)
    assert f'href="02_next{ending}#part"' in page
    assert 'href="https://x.y/z.ipynb"' in page


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["html", "slides"])
def test_a_stored_lesson_is_exported_by_the_command(kind, tmp_path, capsys):
    before = LESSONS[0].read_bytes()
    assert main(["notebooks", str(LESSONS[0]), "--export", kind, "--out", str(tmp_path / "pages")]) == 0
    (page,) = (tmp_path / "pages").iterdir()
    assert f"written: {page}" in capsys.readouterr().out
    text = page.read_text(encoding="utf8")
    assert "Bradley-Terry by hand" in text
    assert (text.count("<section") > 40) == (kind == "slides")  # by the slide types of its cells
    assert LESSONS[0].read_bytes() == before


def stored(folder):
    path = folder / "01_lesson.ipynb"
    nbformat.write(lesson(), path)
    return path


def browser(folder, monkeypatch, script):
    """Put a browser that is a shell script on the path."""
    program = folder / "chromium"
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf8")
    program.chmod(0o755)
    monkeypatch.setattr(export.shutil, "which", lambda name: str(program) if name == "chromium" else None)


def test_a_browser_prints_the_pdf(tmp_path, monkeypatch):
    write = 'for a in "$@"; do case "$a" in --print-to-pdf=*) echo pdf > "${a#--print-to-pdf=}";; esac; done'
    browser(tmp_path, monkeypatch, write)
    (pdf,) = export_notebooks([stored(tmp_path)], kind="pdf", out=tmp_path / "out")
    assert pdf == tmp_path / "out" / "01_lesson.pdf"
    assert pdf.read_text(encoding="utf8") == "pdf\n"


def test_a_browser_that_fails_is_named(tmp_path, monkeypatch):
    browser(tmp_path, monkeypatch, "echo no display >&2; exit 3")
    with pytest.raises(OSError, match=r"chromium did not print .*01_lesson\.pdf: no display"):
        export_notebooks([stored(tmp_path)], kind="pdf", out=tmp_path / "out")


def test_a_browser_that_hangs_is_named(tmp_path, monkeypatch):
    browser(tmp_path, monkeypatch, "exec sleep 5")
    monkeypatch.setattr(export, "_PRINT_TIMEOUT_S", 0.1)
    with pytest.raises(OSError, match=r"chromium did not print .*01_lesson\.pdf within 0\.1 s"):
        export_notebooks([stored(tmp_path)], kind="pdf", out=tmp_path / "out")


def test_without_a_browser_a_page_to_print_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export.shutil, "which", lambda name: None)
    (page,) = export_notebooks([stored(tmp_path)], kind="pdf", out=tmp_path / "out")
    assert page.name == "01_lesson.print.html"
    assert "<details open>" in page.read_text(encoding="utf8")
    assert re.search(r"no browser found .*print it to a PDF", capsys.readouterr().out)


def test_a_missing_notebook_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such notebook: .*nothing\.ipynb"):
        export_notebooks([tmp_path / "nothing.ipynb"], kind="html", out=tmp_path)

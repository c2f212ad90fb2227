"""Export lessons as stored: a page to read, a page or PDF to print, slides."""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbconvert.exporters import HTMLExporter, SlidesExporter
from traitlets.config import Config

from rlhf_helpers.core.files import write_atomically
from rlhf_helpers.lab.notebooks import find_notebooks

ENDINGS = {"html": ".html", "slides": ".slides.html", "pdf": ".pdf"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
_HEAD = Path(__file__).parents[1] / "assets" / "export_head.html"
_PRINT_TIMEOUT_S = 120


def export_notebooks(paths: Sequence[str | Path] = (), *, kind: str, out: str | Path) -> list[Path]:
    """Write each notebook (default: all of notebooks/) to the folder `out`, without running it.

    Inputs of cells with the tag "remove-input" are left out, and slides start where the slide types of the
    cells say. The pages load the scripts for formulas and slides from the network. Without a browser of the
    Chrome family, "pdf" writes a page that is ready to print, and says so.

    Args:
        paths: the notebooks.
        kind: "html", "slides" or "pdf".
        out: folder for the results.

    Raises:
        FileNotFoundError: a notebook does not exist.
        OSError: the browser failed to print.
    """
    written = []
    for path in find_notebooks(paths):
        page = convert(nbformat.read(path, as_version=4), kind=kind)
        target = Path(out) / f"{path.stem}{ENDINGS[kind]}"
        if kind == "pdf":
            target = _print(page, target)
        else:
            write_atomically(target, page.encode())
        written.append(target)
    return written


def convert(notebook: nbformat.NotebookNode, *, kind: str) -> str:
    """Return the notebook as one page of HTML."""
    config = Config()
    config.TagRemovePreprocessor.remove_input_tags = {"remove-input"}
    for cell in notebook.cells:
        if cell.cell_type == "code":  # a progress bar that was taken away leaves an output without data
            cell.outputs = [output for output in cell.outputs if output.get("data", True)]
    heading = re.search(r"^# (.+)", notebook.cells[0].source) if notebook.cells else None
    exporter = SlidesExporter(config=config) if kind == "slides" else HTMLExporter(config=config)
    name = heading[1] if heading else "Lesson"
    page, _ = exporter.from_notebook_node(notebook, resources={"metadata": {"name": name}})
    page = page.replace("</head>", f"{_head(exporter)}</head>", 1)
    # A lesson links to the others, which are exported beside it.
    ending = ENDINGS[kind].replace(".pdf", ".html")
    page = re.sub(r'(href=["\'](?!https?:)[^"\'#]+)\.ipynb', rf"\1{ending}", page)
    return page.replace("<details>", "<details open>") if kind == "pdf" else page


def _head(exporter: HTMLExporter) -> str:
    """Styles for narrow screens, dark themes and paper; the dark colors are those of nbconvert."""
    dark = next(
        p for folder in exporter.template_paths if (p := Path(folder, "static/theme-dark.css")).is_file()
    )
    return _HEAD.read_text(encoding="utf8").replace("/* DARK */", dark.read_text(encoding="utf8"))


def _print(page: str, target: Path) -> Path:
    """Let a browser print the page; without a browser, keep the page itself."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        target = target.with_suffix(".print.html")
        write_atomically(target, page.encode())
        print(f"no browser found ({', '.join(BROWSERS)}): open {target} in yours and print it to a PDF")
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "page.html")
        source.write_text(page, encoding="utf8")
        command = [browser, "--headless", "--no-pdf-header-footer", f"--user-data-dir={folder}/profile"]
        # The page draws its formulas first. A browser that runs as root has no sandbox of its own.
        command += ["--virtual-time-budget=20000", f"--print-to-pdf={target.resolve()}", source.as_uri()]
        command += ["--no-sandbox"] * (hasattr(os, "geteuid") and os.geteuid() == 0)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PRINT_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise OSError(f"{browser} did not print {target} within {_PRINT_TIMEOUT_S} s") from error
    if done.returncode or not target.is_file():
        raise OSError(f"{browser} did not print {target}: {done.stderr.strip()[-300:]}")
    return target

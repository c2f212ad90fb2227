"""Clears and re-executes the lessons: stored outputs come from one command and are the same twice."""

import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from rlhf_helpers.core.files import write_atomically

_WIDGET = "application/vnd.jupyter.widget-view+json"
_CELL_TIMEOUT_S = 600


def find_notebooks(paths: Sequence[str | Path] = ()) -> list[Path]:
    """Return the notebooks (default: all of notebooks/); raise FileNotFoundError for one that is missing."""
    found = [Path(path) for path in paths] or sorted(Path("notebooks").glob("*.ipynb"))
    missing = [str(path) for path in found if not path.is_file()] if found else ["notebooks/*.ipynb"]
    if missing:
        raise FileNotFoundError(f"no such notebook: {', '.join(missing)} (run this at the root)")
    return found


def run_notebooks(paths: Sequence[str | Path] = (), *, check: bool = False) -> list[Path]:
    """Re-execute notebooks (default: all of notebooks/) in place; with `check`, write nothing and compare.

    Returns the notebooks whose stored form changed (with `check`: differs). A failing cell raises nbclient's
    CellExecutionError and leaves the file as it was; no notebook found raises FileNotFoundError.
    """
    changed = []
    for path in find_notebooks(paths):
        new = nbformat.writes(execute(nbformat.read(path, as_version=4), path.parent)) + "\n"
        if new != path.read_text(encoding="utf8"):
            changed.append(path)
            if not check:
                write_atomically(path, new.encode())
    return changed


def execute(notebook: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """Run a notebook in `folder` from clean cells; return it without timings, paths, widgets, versions.

    The kernel is this interpreter's. RLHF_PROGRESS is set empty so that the page shows no personal progress,
    TQDM_DISABLE because bars and pictures of long runs would come and go with the speed of the machine.
    """
    notebook.metadata = nbformat.from_dict({"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    for number, cell in enumerate(notebook.cells):
        cell.setdefault("id", f"cell-{number}")
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=_CELL_TIMEOUT_S,
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,  # what a cell prints arrives in pieces, cut where the clock says
        resources={"metadata": {"path": str(folder)}},
    ).execute(env={**os.environ, "RLHF_PROGRESS": "", "TQDM_DISABLE": "1", "PYTHONHASHSEED": "0"})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [kept for output in cell.outputs if (kept := _tidy(output, folder.resolve()))]
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
    nbformat.validate(notebook)
    return notebook


def _tidy(output: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode | None:
    """Drop what is alive in a page only (widgets, progress bars) and shorten paths; None: nothing is left."""
    if output.output_type == "stream":
        if output.name == "stderr" and "\r" in output.text:
            return None
        output.text = _without_paths(output.text, folder)
        return output
    if "data" in output:
        if output.data.pop(_WIDGET, None) is not None and "text/html" not in output.data:
            return None
        if not output.data:  # a progress bar that was taken away at its end
            return None
        for kind in set(output.data) & {"text/plain", "text/html", "text/markdown"}:
            output.data[kind] = _without_paths(output.data[kind], folder)
    return output


def _without_paths(text: str, folder: Path) -> str:
    for path, short in ((folder.parent, ""), (Path.home(), "~/"), (Path(tempfile.gettempdir()), "")):
        if path != Path(path.anchor):
            text = text.replace(f"{path}{os.sep}", short)
    return re.sub(r"ipykernel_\d+/\d+\.py", "cell", text)

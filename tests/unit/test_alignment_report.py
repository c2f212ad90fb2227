"""Reports are read back: every number is there, markup stays text, nothing is overwritten."""

from importlib.metadata import version

import pandas as pd
import pytest
import torch

from rlhf_helpers.alignment_eval import AlignmentReportGenerator, weights_fingerprint

EVIL = '<script>alert("x")</script> | **bold** [link](http://x)\nsecond line'
TABLE = pd.DataFrame({"value": [0.123456, 12345.678], "low": [-0.5, 0.0], "n": [40, 7]}, index=["help", EVIL])
RESULTS = {"Scores": TABLE, EVIL: {"win rate": 0.7512345, "beaten": EVIL}, "Words": EVIL}


@pytest.fixture
def write(tmp_path):
    def run(results, **manifest):
        generator = AlignmentReportGenerator(EVIL, **manifest)
        return generator.generate_alignment_report(results, out=tmp_path / "report")

    return run


def rows_of(path):
    """First cell of a row of a table -> its other cells."""
    lines = [
        line.strip("| ").split(" | ") for line in path.read_text("utf8").splitlines() if "| " in line[:2]
    ]
    return {first: cells for first, *cells in lines}


def test_markdown_holds_everything_and_obeys_nothing(write):
    path = write(RESULTS, seeds=[3, 4], settings={"length": 64})
    text, rows = path.read_text("utf8"), rows_of(path)
    assert "<script>" not in text
    assert r"\[link\]" in text
    assert rows["help"] == ["0.1235", "-0.5", "40"]
    assert (rows["win rate"], rows["seeds"], rows["length"]) == (["0.7512"], ["3, 4"], ["64"])
    assert "1.235e+04" in text
    # In the title, a heading, a paragraph, a row's name and a cell.
    assert text.count(r"\*\*bold\*\*") == 5
    table = text[text.index("| help") :].splitlines()[1]
    assert table.replace(r"\|", "").count("|") == 5, "a bar in a text opens no cell"


def test_the_manifest_names_the_model(write):
    model = torch.nn.Linear(2, 2)
    rows = rows_of(write({}, model=model))
    assert rows["model"] == [weights_fingerprint(model)]
    assert rows["torch"] == [version("torch")]
    assert rows["seeds"] == ["not given"]


def test_nothing_is_overwritten(write):
    path = write({"One": "text"})
    old = path.read_bytes()
    with pytest.raises(FileExistsError, match="name another folder"):
        write({"Other": "text"})
    assert path.read_bytes() == old
    assert list(path.parent.iterdir()) == [path]


def test_a_bad_result_leaves_nothing_behind(write, tmp_path):
    with pytest.raises(TypeError, match="must be a DataFrame"):
        write({"Scores": [1, 2]})
    assert not (tmp_path / "report").exists()


def test_long_texts_are_not_cut(write):
    answer = ("word " * 100).strip()
    assert rows_of(write({"Answers": {"said": answer}}))["said"] == [answer]

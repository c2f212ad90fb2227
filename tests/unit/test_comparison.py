"""Answers side by side: the table and the file."""

import re
from html.parser import HTMLParser

import pytest
import torch

from rlhf_helpers.lab.comparison import compare_page, write_comparison

PROMPTS = ["What is 1 + 1?", "Is 1 < 2 & 2 > 1?"]
ANSWERS = {"base": ["Three.", ""], "SFT": ["Two.\nYes.", "<script>alert('x')</script>"]}
SCORES = {"SFT": [1.0, 0.25]}


class Table(HTMLParser):
    """Rows of texts by cell, all tags, and where headers point."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.rows, self.scopes, self.attributes = [], [], [], {}
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.setdefault(tag, []).append(dict(attrs))
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if tag == "th":
            self.scopes.append(dict(attrs)["scope"])

    def handle_data(self, data):
        if self.rows:
            self.rows[-1][-1:] = [(self.rows[-1] or [""])[-1] + data]


def rows_of(page):
    return [[cell.strip() for cell in row] for row in Table(page).rows]


WHOLE = [
    ["prompt", "base", "SFT"],
    [PROMPTS[0], "Three.", "Two.\nYes.\n[1.00]"],
    [PROMPTS[1], "(empty)", "<script>alert('x')</script>\n[0.25]"],
    ["mean score", "", "0.62"],
]


def test_the_page_shows_all_answers_and_takes_no_keys():
    page = compare_page(PROMPTS, ANSWERS, scores=SCORES).data
    assert rows_of(page) == WHOLE
    focusable = {"script", "a", "button", "input", "select", "textarea", "summary"}
    assert not focusable & set(Table(page).tags)
    assert "tabindex" not in page


def test_the_file_is_one_whole_page_that_fetches_nothing(tmp_path):
    path = tmp_path / "new" / "page.html"
    assert write_comparison(path, PROMPTS, ANSWERS, scores=SCORES) == path
    page = path.read_text(encoding="utf8")
    table = Table(page)
    assert rows_of(page) == WHOLE
    assert page.startswith('<!doctype html>\n<html lang="en">')
    assert table.scopes == ["col", "col", "col", "row", "row", "row"]
    assert {"title", "h1", "caption", "thead", "tbody"} <= set(table.tags)
    assert not {"script", "img", "link", "iframe", "i"} & set(table.tags)
    assert not {"src", "href", "onclick"} & {
        key for all_ in table.attributes.values() for a in all_ for key in a
    }
    assert "default-src 'none'" in [a.get("content", "") for a in table.attributes["meta"]][2]
    assert "<title>Answers side by side</title>" in page
    assert not re.search("https?:|url\\(|@import", page)


def test_scores_are_optional_and_may_be_tensors(tmp_path):
    bare = write_comparison(tmp_path / "a.html", PROMPTS, ANSWERS).read_text(encoding="utf8")
    assert rows_of(bare)[1:] == [
        [PROMPTS[0], "Three.", "Two.\nYes."],
        [PROMPTS[1], "(empty)", WHOLE[2][2][:27]],
    ]
    scores = {name: torch.tensor(column) for name, column in SCORES.items()}
    assert rows_of(compare_page(PROMPTS, ANSWERS, scores=scores).data) == WHOLE


def test_names_and_prompts_are_escaped(tmp_path):
    page = write_comparison(tmp_path / "a.html", ['<b onload="x">'], {"<u>": ["&amp;"]}).read_text("utf8")
    assert rows_of(page) == [["prompt", "<u>"], ['<b onload="x">', "&amp;"]]
    assert not {"b", "u"} & set(Table(page).tags)


@pytest.mark.parametrize(
    "prompts, answers, scores, said",
    [
        ([], {"a": []}, None, "at least one prompt"),
        ("hello", {"a": ["x"] * 5}, None, "at least one prompt"),
        (["p"], {}, None, "one name"),
        (["p"], {"a": ["x", "y"]}, None, "'a' needs a text for each of 1 prompts"),
        (["p"], {"a": "x"}, None, "'a' needs a text for each of 1 prompts"),
        (["p", 3], {"a": ["x", "y"]}, None, "'prompts' needs a text for each of 2 prompts"),
        (["p"], {"a": [None]}, None, "'a' needs a text for each of 1 prompts"),
        (["p"], {"a": ["x"]}, {"b": [1.0]}, r"scores\['b'\] needs that name"),
        (["p"], {"a": ["x"]}, {"a": [1.0, 2.0]}, r"scores\['a'\] needs that name .* and 1 numbers"),
    ],
)
def test_what_does_not_fit_is_refused(prompts, answers, scores, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        compare_page(prompts, answers, scores=scores)
    with pytest.raises(ValueError, match=said):
        write_comparison(tmp_path / "a.html", prompts, answers, scores=scores)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_unasked_and_no_half_file_is_left(tmp_path, monkeypatch):
    path = write_comparison(tmp_path / "a.html", PROMPTS, ANSWERS)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="name another file"):
        write_comparison(path, PROMPTS[:1], {"a": ["x"]})
    assert path.read_bytes() == before

    def full(self, target):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", full)
        with pytest.raises(OSError, match="no space left"):
            write_comparison(tmp_path / "b.html", PROMPTS[:1], {"a": ["x"]})
    assert not (tmp_path / "b.html").exists()

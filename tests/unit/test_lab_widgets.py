"""The form that rates pairs: choices, the file of clicks, and keys that must not reach the notebook."""

import json
import re

import pytest

from rlhf_helpers.lab import quizzes, widgets

PAIRS = [{"prompt": f"<q{n}>", "a": "yes", "b": "no"} for n in range(3)]
STORED = ["a", "b", "tie"]
COMPLETE = b'{"prompt": "<q0>", "a": "yes", "b": "no", "choice": "b"}'
SCRIPT = widgets.PairRater._esm


def send(rater, content):
    """Handle a message as it comes from the page."""
    rater._handle_msg({"content": {"data": {"method": "custom", "content": content}}, "buffers": []})


def made_by(rater):
    return [row["by"] for row in rater.rows]


def test_stored_choices_stand_in_until_a_person_clicks(tmp_path):
    path = tmp_path / "clicks.jsonl"
    rater = widgets.rate_pairs(PAIRS, stored=STORED, path=path)
    assert [row["choice"] for row in rater.rows] == STORED
    assert made_by(rater) == ["stored"] * 3
    assert not path.exists()
    rater.click("b")
    assert json.loads(path.read_text(encoding="utf8")) == {**PAIRS[0], "choice": "b"}
    assert [row["choice"] for row in rater.rows] == ["b", "b", "tie"]
    assert made_by(rater) == ["person", "stored", "stored"]
    again = widgets.rate_pairs(PAIRS, stored=STORED, path=path)  # after a kernel restart
    assert again.rows == rater.rows
    for _ in range(5):  # clicks after the last pair do nothing
        again.click("tie")
    assert path.read_bytes().count(b"\n") == 2
    assert again.shown == {"index": 3, "total": 3, "prompt": "", "a": "", "b": ""}


def test_a_message_from_the_page_is_a_click_and_shows_the_next_pair():
    rater = widgets.rate_pairs(PAIRS, stored=STORED)
    assert rater.get_state("shown")["shown"] == {"index": 0, "total": 3, **PAIRS[0]}
    send(rater, {"choice": "b"})
    assert rater.rows[0] == {**PAIRS[0], "choice": "b", "by": "person"}
    assert rater.get_state("shown")["shown"] == {"index": 1, "total": 3, **PAIRS[1]}
    send(rater, {"choice": "a", "index": 0})  # a second click before the page showed the next pair
    assert made_by(rater) == ["person", "stored", "stored"]
    send(rater, {"choice": "a", "index": 1})
    assert made_by(rater) == ["person", "person", "stored"]


@pytest.mark.parametrize("choice", ["left", "", None])
def test_another_choice_is_refused(choice):
    rater = widgets.rate_pairs(PAIRS, stored=STORED)
    with pytest.raises(ValueError, match="choice must be one of"):
        rater.click(choice)
    assert made_by(rater) == ["stored"] * 3


def test_page_without_kernel_shows_escaped_text_and_the_same_in_every_run():
    bundles = [widgets.rate_pairs(PAIRS, stored=STORED)._repr_mimebundle_()[0] for _ in range(2)]
    assert "&lt;q0&gt;" in bundles[0]["text/html"]
    assert "Choice: a (stored)" in bundles[0]["text/html"]
    assert bundles[0]["text/plain"] == "PairRater: 0 of 3 pairs rated by a person"
    for kind in ("text/html", "text/plain"):
        assert bundles[0][kind] == bundles[1][kind]


def test_pairs_and_stored_choices_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"pairs\[0\] lacks \['b'\]"):
        widgets.rate_pairs([{"prompt": "p", "a": "x"}], stored=["a"])
    for stored in (["a"], ["a", "b", "left"]):
        with pytest.raises(ValueError, match="stored needs one of"):
            widgets.rate_pairs(PAIRS, stored=stored)


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\r", "\r\n", "\n", "\x1c", "\ud800", "ä"])
def test_any_text_can_be_read_again(tmp_path, character):
    path = tmp_path / "clicks.jsonl"
    pairs = [{"prompt": f"x{character}y", "a": character, "b": "no"}, PAIRS[0]]
    rater = widgets.rate_pairs(pairs, stored=["a", "a"], path=path)
    rater.click("b")
    rater.click("tie")
    assert widgets.rate_pairs(pairs, stored=["a", "a"], path=path).rows == rater.rows
    # A file may also hold such characters as they are, and Windows line ends.
    lines = [json.dumps({**row, "choice": "b"}, ensure_ascii=False) for row in pairs]
    path.write_bytes("\r\n".join([*lines, ""]).encode("utf8", "surrogatepass"))
    assert made_by(widgets.rate_pairs(pairs, stored=["a", "a"], path=path)) == ["person", "person"]


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"prompt": "<q1>", "a": "ye', "Unterminated string"),  # a killed kernel
        ('{"prompt": "ü'.encode()[:-1], "Unicode"),
        (b"\0\0\0\0", "Error"),
        (b'{"prompt": "p"}', "KeyError"),
        (b'["prompt"]', "TypeError"),
        (COMPLETE.replace(b'"choice": "b"', b'"choice": "left"'), "choice must be one of"),
    ],
)
def test_a_broken_line_is_named_and_costs_no_other_line(tmp_path, line, message):
    path = tmp_path / "clicks.jsonl"
    path.write_bytes(COMPLETE + b"\n\n" + line)
    with pytest.warns(UserWarning, match=rf"clicks\.jsonl, line 3 is not a rated pair.*{message}"):
        rater = widgets.rate_pairs(PAIRS, stored=STORED, path=path)
    assert made_by(rater) == ["person", "stored", "stored"]
    rater.click("a")
    rater.click("a")
    assert path.read_bytes().startswith(COMPLETE + b"\n\n" + line + b"\n{")  # nothing is thrown away
    with pytest.warns(UserWarning, match="line 3"):
        again = widgets.rate_pairs(PAIRS, stored=STORED, path=path)
    assert again.rows == rater.rows
    assert made_by(again) == ["person"] * 3


def test_a_last_line_without_its_line_end_counts_and_is_not_continued(tmp_path):
    path = tmp_path / "clicks.jsonl"
    path.write_bytes(COMPLETE)
    rater = widgets.rate_pairs(PAIRS, stored=STORED, path=path)
    assert made_by(rater) == ["person", "stored", "stored"]
    rater.click("a")
    assert path.read_bytes().startswith(COMPLETE + b"\n{")
    assert made_by(widgets.rate_pairs(PAIRS, stored=STORED, path=path)) == ["person", "person", "stored"]


def test_two_raters_share_one_file(tmp_path):
    path = tmp_path / "clicks.jsonl"
    first, second = (widgets.rate_pairs(PAIRS, stored=STORED, path=path) for _ in range(2))
    first.click("a")
    second.click("b")
    second.click("tie")
    first.click("b")
    again = widgets.rate_pairs(PAIRS, stored=STORED, path=path)
    # The later click counts.
    assert [row["choice"] for row in again.rows] == ["b", "b", "tie"]
    assert made_by(again) == ["person", "person", "stored"]
    other = widgets.rate_pairs(PAIRS[1:], stored=STORED[1:], path=path)  # rows of other pairs do no harm
    assert made_by(other) == ["person", "stored"]


def test_the_script_keeps_keys_from_the_notebook_and_sets_text_only():
    script = str(SCRIPT)
    assert 'setAttribute("data-lm-suppress-shortcuts", "true")' in script
    # JupyterLab asks the focused element first, so the root alone is not enough.
    for node in ("root", "button"):
        assert f"keepKeys({node});" in script
    made = set(re.findall(r'add\(\w+, "(\w+)"', script))
    assert made == {"div", "p", "span", "b", "button"}, "keepKeys every other element that takes the focus"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", script)
    assert 'setAttribute("role", "status")' in script
    assert 'model.send({ choice, index: model.get("shown").index })' in script
    assert script.count("\n") <= 80


def test_a_quiz_keeps_keys_from_the_notebook():
    assert "<summary data-lm-suppress-shortcuts='true'>" in quizzes.quiz("baseline_effect")._static_html()

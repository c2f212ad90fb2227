"""The labeling form and its store: keys, order, undo, several people, killed kernels."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch

from rlhf_helpers.lab.labeling import (
    MIN_LABELS,
    Annotator,
    Item,
    Label,
    LabelStore,
    decided,
    draw_pairs,
    follow_taste,
    labels_in_use,
    learn_taste,
    polite_choices,
    rate_pairs,
)
from rlhf_helpers.lab.labeling.payoff import WordPoints, _distance
from rlhf_helpers.lab.labeling.store import SKIP, TIE
from rlhf_helpers.preference_data import read_preferences
from rlhf_helpers.reward_model import pair_credits, score_pairs

PAIRS = [{"prompt": f"<q{n}>", "a": "yes " * (n + 1), "b": "no"} for n in range(3)]
STORED = ["a", "b", "tie"]
ITEMS = [Item("pair", pair["prompt"], (pair["a"], pair["b"])) for pair in PAIRS]


def send(form, content):
    """Handle a message as it comes from the page."""
    form._handle_msg({"content": {"data": {"method": "custom", "content": content}}, "buffers": []})


def made_by(form):
    return [row["by"] for row in form.rows]


def key_for(form, answer):
    """The key of the side on which the open pair shows an answer."""
    return "ab"[form.shown["answers"].index(answer)]


class TestForm:
    def test_stored_choices_stand_in_until_a_person_labels(self, tmp_path):
        path = tmp_path / "labels.sqlite"
        form = rate_pairs(PAIRS, stored=STORED, path=path)
        assert [row["choice"] for row in form.rows] == STORED
        assert made_by(form) == ["stored"] * 3
        form.press(key_for(form, "no"))
        assert [row["choice"] for row in form.rows] == ["b", "b", "tie"]
        assert made_by(form) == ["person", "stored", "stored"]
        again = rate_pairs(PAIRS, stored=STORED, path=path)  # after a kernel restart
        assert again.rows == form.rows
        assert again.shown["index"] == 1

    def test_the_label_is_saved_before_the_next_item_is_shown(self, tmp_path):
        path = tmp_path / "labels.sqlite"
        form = rate_pairs(PAIRS, path=path)
        found = []
        form.observe(lambda change: found.append(len(LabelStore(path).labels())), names="shown")
        form.press("a")
        form.press("t")
        assert found == [1, 2]

    def test_a_key_means_the_side_that_was_shown_and_the_order_is_recorded(self):
        pairs = [{"prompt": f"q{n}", "a": "first", "b": "second"} for n in range(40)]
        form = rate_pairs(pairs)
        for _ in pairs:
            form.press(key_for(form, "first"))
        assert {row["choice"] for row in form.rows} == {"a"}
        left = [label.shown[0] for label in form.store.labels()]
        assert 10 <= sum(left) <= 30, "both answers stand on the left about as often"

    def test_tie_skip_and_undo(self):
        form = rate_pairs(PAIRS)
        for key in "tsu":
            form.press(key)
        assert form.values == ["tie", None, None]
        assert form.shown["index"] == 1
        form.press("u")
        form.press("u")  # nothing is left to take back
        assert form.values == [None] * 3
        assert form.store.labels() == []

    def test_a_second_key_for_the_same_item_is_dropped(self):
        form = rate_pairs(PAIRS)
        send(form, {"key": "a", "index": 0})
        send(form, {"key": "b", "index": 0})  # before the page showed the next pair
        send(form, {"key": "x", "index": 1})  # means nothing
        assert made_by(form) == ["person", "stored", "stored"]
        for index in (1, 2, 3):
            send(form, {"key": "t", "index": index})
        assert form.shown["index"] == form.shown["total"] == 3

    def test_a_key_without_meaning_is_refused(self):
        with pytest.raises(ValueError, match="'x'"):
            rate_pairs(PAIRS).press("x")

    def test_a_ranking_is_given_from_the_best_down(self):
        item = Item("ranking", "q", ("poor", "best", "good"))
        form = Annotator([item], LabelStore(None), annotator="you")
        places = {text: str(form.shown["answers"].index(text) + 1) for text in item.answers}
        form.press(places["good"])
        form.press("u")
        form.press(places["best"])
        form.press(places["best"])  # is placed already
        form.press(places["good"])
        assert form.values == [[1, 2, 0]]

    def test_a_rating_takes_points(self):
        form = Annotator([Item("rating", "q", ("answer",))], LabelStore(None), annotator="you")
        form.press("4")
        assert form.values == [4]

    def test_the_report_says_what_the_labels_follow(self):
        form = rate_pairs(PAIRS, references={"the gold judge": [1.0, -1.0, 0.0]})
        assert form.report()["agreement with the gold judge"] == "nothing to compare yet"
        for pair in PAIRS:
            form.press(key_for(form, pair["a"]))
        report = form.report()
        assert report["labeled"] == "3 of 3"
        assert report["agreement with the gold judge"] == "1 of 2"
        assert report["chose the longer answer"] == "3 of 3"
        assert report["chose the left answer"] == f"{sum(order[0] == 0 for order in form.orders)} of 3"

    def test_the_page_without_a_kernel_shows_escaped_text_and_the_same_in_every_run(self):
        bundles = [rate_pairs(PAIRS, stored=STORED)._repr_mimebundle_()[0] for _ in range(2)]
        assert "&lt;q0&gt;" in bundles[0]["text/html"]
        assert bundles[0]["text/plain"] == "Annotator: 0 of 3 labeled by a person"
        assert bundles[0]["text/html"] == bundles[1]["text/html"]

    def test_what_does_not_fit_is_refused(self):
        with pytest.raises(ValueError, match=r"pairs\[0\] lacks \['b'\]"):
            rate_pairs([{"prompt": "p", "a": "x"}], stored=["a"])
        with pytest.raises(ValueError, match="stored has 1"):
            rate_pairs(PAIRS, stored=["a"])
        with pytest.raises(ValueError, match="stored needs one of"):
            rate_pairs(PAIRS, stored=["a", "b", "left"])
        with pytest.raises(ValueError, match="gold has 1"):
            rate_pairs(PAIRS, references={"gold": [1.0]})
        with pytest.raises(ValueError, match="at least one"):
            rate_pairs([])

    def test_the_script_keeps_keys_from_the_notebook_and_sets_text_only(self):
        script = str(Annotator._esm)
        assert 'setAttribute("data-lm-suppress-shortcuts", "true")' in script
        # JupyterLab asks the focused element first, so the root alone is not enough.
        for node in ("root", "button", "undo"):
            assert f"keepKeys({node});" in script
        assert "innerHTML =" not in script


class TestStore:
    def test_a_second_label_of_a_person_replaces_the_first(self, tmp_path):
        store = LabelStore(tmp_path / "labels.sqlite")
        for value in (0, 1):
            store.add(Label("you", ITEMS[0], (0, 1), value))
        assert [label.value for label in store.labels()] == [1]

    @pytest.mark.parametrize(
        "text", ["\u2028", "\x85", "\r\n", "\x1c", "\ud800", "ä", "'; DROP TABLE labels; --"]
    )
    def test_any_text_can_be_read_again(self, tmp_path, text):
        label = Label("you", Item("pair", text, (text, "no")), (1, 0), 0)
        LabelStore(tmp_path / "labels.sqlite").add(label)
        assert LabelStore(tmp_path / "labels.sqlite").labels() == [label]

    @pytest.mark.slow
    def test_two_annotators_at_once_lose_nothing(self, tmp_path):
        code = """
            import sys
            from rlhf_helpers.lab.labeling.store import Item, Label, LabelStore
            store = LabelStore(sys.argv[1])
            for n in range(60):
                store.add(Label(sys.argv[2], Item("pair", f"q{n}", ("a", "b")), (0, 1), n % 2))
        """
        path = tmp_path / "labels.sqlite"
        people = [
            subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), path, name])
            for name in ("ada", "bo")
        ]
        assert [person.wait(120) for person in people] == [0, 0]
        store = LabelStore(path)
        assert {name: len(store.labels(name)) for name in ("ada", "bo")} == {"ada": 60, "bo": 60}

    def test_a_class_is_a_panel(self, tmp_path):
        files = {}
        for name, values in {"ada": (0, 1, 0), "bo": (0, 1, 1), "cy": (0, 1, 0)}.items():
            files[name] = tmp_path / f"{name}.sqlite"
            store = LabelStore(files[name])
            for item, value in zip(ITEMS, values, strict=True):
                store.add(Label("you", item, (0, 1), value))
        panel = LabelStore(tmp_path / "class.sqlite")
        panel.merge(files)
        assert len(panel.labels()) == 9
        assert {label.annotator for label in panel.labels()} == {"ada", "bo", "cy"}
        assert 0.3 < panel.agreement() < 0.7
        with pytest.raises(FileNotFoundError, match="absent"):
            panel.merge({"dee": tmp_path / "absent.sqlite"})

    def test_thirty_files_are_merged(self, tmp_path):
        n, files = len(ITEMS), {}
        for person in range(30):
            files[f"learner {person}"] = tmp_path / f"{person}.sqlite"
            store = LabelStore(files[f"learner {person}"])
            for number, item in enumerate(ITEMS):  # the first pair divides the class, the last does not
                store.add(Label("you", item, (0, 1), int(person % 2 > number)))
        panel = LabelStore(tmp_path / "class.sqlite")
        for _ in range(2):  # a second time changes nothing
            panel.merge(files)
            assert len(panel.labels()) == 30 * n
        assert {label.annotator for label in panel.labels()} == set(files)
        # Krippendorff's alpha: half of the class chose b on the first pair, none on the other two.
        observed = 2 * 15 * 15 / (30 * 29) / n
        expected = 2 * 15 * 75 / (90 * 89)
        assert panel.agreement() == pytest.approx(1 - observed / expected)

    def test_agreement_needs_two_people(self):
        with pytest.raises(ValueError, match="two people"):
            LabelStore(None).agreement()

    def test_the_export_is_read_as_preference_data(self):
        store = LabelStore(None)
        store.add(Label("you", ITEMS[0], (1, 0), 1))
        store.add(Label("you", ITEMS[1], (0, 1), "tie"))
        (pair,) = read_preferences(store.preferences())[0]
        assert (pair["chosen"], pair["rejected"]) == ("no", PAIRS[0]["a"])
        ranked = LabelStore(None)
        ranked.add(Label("you", Item("ranking", "q", ("poor", "best", "good")), (0, 1, 2), [1, 2, 0]))
        assert read_preferences(ranked.preferences(), unit="rankings")[0][0]["responses"] == [
            "best",
            "good",
            "poor",
        ]
        rated = LabelStore(None)
        rated.add(Label("you", Item("rating", "q", ("answer",)), (0,), 4))
        assert read_preferences(rated.preferences(), unit="ratings")[0][0]["rating"] == 4.0

    def test_another_file_is_refused_by_name(self, tmp_path):
        (tmp_path / "notes.sqlite").write_text("no database" * 100)
        with pytest.raises(ValueError, match=r"notes\.sqlite"):
            LabelStore(tmp_path / "notes.sqlite")
        with pytest.raises(ValueError, match="an earlier format"):
            LabelStore(tmp_path / "rated_pairs.jsonl")


# Starts a kernel for each line that it reads: a process of its own, forked when the imports are over, because
# nothing can be lost before. Each process gives the answer of its line to every pair that is still open.
KERNELS = """
import os, sys
from rlhf_helpers.lab.labeling import rate_pairs

pairs = [{"prompt": f"q{n}", "a": f"yes {n}", "b": f"no {n}"} for n in range(200)]

def label(path, answer):
    print(os.getpid(), flush=True)
    form = rate_pairs(pairs, path=path)
    while (index := form.shown["index"]) < 200:
        form.press("ab"[form.shown["answers"].index(f"{answer} {index}")])
        print(index, flush=True)  # the next pair is shown

while line := sys.stdin.readline():
    if (child := os.fork()) == 0:
        label(*line.split())
        os._exit(0)
    print("end", os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture
def kernels():
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", KERNELS], stdin=pipe, stdout=pipe, text=True) as server:
        yield server
        server.stdin.close()


def start(kernels, path, answer):
    """Start a kernel and return its process id."""
    kernels.stdin.write(f"{path} {answer}\n")
    kernels.stdin.flush()
    return int(kernels.stdout.readline())


def end(kernels):
    """Wait for a kernel; return the pairs after which it showed another one, and the signal that ended it."""
    labeled = []
    while not (line := kernels.stdout.readline()).startswith("end"):
        labeled.append(int(line))
    return labeled, int(line.split()[1])


def seconds_of(kernels, path, labels):
    """How long a kernel takes to start and to store some labels, the shortest of three times."""
    seconds = []
    for n in range(3):
        pid, begin = start(kernels, path.with_name(f"trial{n}.sqlite"), "yes"), time.monotonic()
        for _ in range(labels):
            kernels.stdout.readline()
        seconds.append(time.monotonic() - begin)
        os.kill(pid, signal.SIGKILL)
        end(kernels)
    return min(seconds)


@pytest.mark.slow
def test_a_kernel_killed_at_20_random_moments_loses_and_doubles_no_label(tmp_path, kernels):
    path, moments, kills = tmp_path / "labels.sqlite", random.Random(0), 20
    life = seconds_of(kernels, path, 200 // kills)
    passed, stored = [], {}
    for number in range(kills):
        pid = start(kernels, path, ("yes", "no")[number % 2])
        time.sleep(moments.uniform(0, life))
        os.kill(pid, signal.SIGKILL)
        labeled, status = end(kernels)
        assert status == signal.SIGKILL, "it was still labeling"
        passed += labeled
        labels = {label.item.prompt: label.value for label in LabelStore(path).labels()}
        assert {f"q{index}" for index in passed} <= labels.keys(), "the next pair was shown, a label is lost"
        assert stored.items() <= labels.items(), "a label was given again, with another answer"
        stored = labels
    assert passed == sorted(set(passed)), "no pair is shown again"
    assert 20 < len(stored) < 200
    start(kernels, path, "yes")
    assert end(kernels)[1] == 0
    labels = {label.item.prompt: label.value for label in LabelStore(path).labels()}
    assert len(labels) == 200
    assert stored.items() <= labels.items()


class TestPayoff:
    def test_a_scripted_person_stands_in_until_a_person_has_decided_enough(self):
        pairs = draw_pairs(MIN_LABELS + 2)
        rows = [{**pair, "choice": "b", "by": "person"} for pair in pairs]
        rows[0]["choice"] = "tie"
        rows[1]["by"] = rows[2]["by"] = "stored"
        assert labels_in_use(rows) == ("scripted person", decided(pairs, polite_choices(pairs)))
        rows[1]["by"] = "person"
        labeler, labels = labels_in_use(rows)
        assert (labeler, len(labels)) == ("you", MIN_LABELS)
        assert [row["chosen"] for row in labels] == [row["b"] for row in pairs[1:2] + pairs[3:]]

    def test_close_pairs_differ_less_than_others_and_are_the_same_each_time(self):
        apart = {
            closest: np.mean([_distance((row["a"], row["b"])) for row in draw_pairs(30, closest=closest)])
            for closest in (True, False)
        }
        assert apart[True] < apart[False] - 1
        assert draw_pairs(3) == draw_pairs(3)
        assert all(row["a"] != row["b"] for row in draw_pairs(30))

    def test_a_scripted_person_likes_short_and_friendly_answers(self):
        answers = ["It is Paris.", "It is Paris. Have a nice day.", "Do not waste my time. It is Paris."]
        prompt = "What is the capital of France?"
        pairs = [{"prompt": prompt, "a": answers[0], "b": answer} for answer in answers]
        assert polite_choices(pairs) == ["tie", "b", "a"]
        rows = decided(pairs, polite_choices(pairs))
        assert [row["chosen"] for row in rows] == [answers[1], answers[0]]
        assert "tie" not in polite_choices(pairs, temperature=4)

    def test_the_words_of_the_prompt_cancel_in_a_comparison(self):
        model = WordPoints()
        torch.nn.init.ones_(model.head.linear.weight)
        gaps = [model.score([prompt] * 2, ["yes", "no way"]).diff() for prompt in ("Hi", "A long question?")]
        torch.testing.assert_close(*gaps, atol=1e-3, rtol=0)

    def test_a_taste_is_learned_from_60_labels(self):
        pairs, new = draw_pairs(90, seed=3), draw_pairs(150, split="heldout", closest=False)
        rows, tests = decided(pairs, polite_choices(pairs))[:60], decided(new, polite_choices(new))
        at_start = pair_credits(*score_pairs(WordPoints(), tests)).mean()
        at_end = pair_credits(*score_pairs(learn_taste(rows), tests)).mean()
        assert at_start == 0.5, "without labels no answer is better"
        assert at_end > 0.75
        store = LabelStore(None)
        for row in rows:
            store.add(Label("you", Item("pair", row["prompt"], (row["chosen"], row["rejected"])), (0, 1), 0))
        scores = [score_pairs(learn_taste(labels), tests)[0] for labels in (rows, store)]
        torch.testing.assert_close(*scores)

    def test_a_policy_follows_a_taste(self):
        pairs = draw_pairs(45)
        taste = learn_taste(decided(pairs, polite_choices(pairs)))
        answers = follow_taste(taste, prompts=20, n=4, steps=12)
        means = answers.groupby("policy").friendly.mean()
        assert answers.policy.value_counts().to_dict() == {"start": 20, "best of 4": 20, "RLOO": 20}
        assert means["RLOO"] > means["start"] + 0.1

    def test_too_few_labels_are_refused_with_their_number(self):
        store = LabelStore(None)
        for item, value in zip(ITEMS, (0, TIE, SKIP), strict=True):
            store.add(Label("you", item, (0, 1), value))
        with pytest.raises(ValueError, match=f"needs {MIN_LABELS} decided pairs, got 1: label more"):
            learn_taste(store)

    def test_the_report_is_new_after_each_key(self):
        form = rate_pairs(PAIRS, references={"the simulated people": [1.0, 1.0, 1.0]})
        seen = []
        form.observe(lambda change: seen.append(change.new["report"]), names="shown")
        for key in (key_for(form, PAIRS[0]["a"]), "t", "u"):
            form.press(key)
        assert [report[0] for report in seen] == [f"labeled: {n} of 3" for n in (1, 2, 1)]
        assert all("agreement with the simulated people: 1 of 1" in report for report in seen)

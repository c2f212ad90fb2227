import csv
import gzip
import json
import random

import datasets
import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_helpers.core.text import to_messages
from rlhf_helpers.preference_data import (
    PreferenceDataError,
    leaked_prompts,
    load_preferences,
    prompt_folds,
    read_preferences,
    split_by_prompt,
)
from rlhf_helpers.preference_data.formats import detect_format

PAIR = {"prompt": "Capital of France?", "chosen": "Paris.", "rejected": "Rome."}
OTHER = {"prompt": "Two plus two?", "chosen": "4", "rejected": "5"}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def faults_of(source, **options):
    with pytest.raises(PreferenceDataError) as caught:
        read_preferences(source, **options)
    return [str(fault) for fault in caught.value.faults], str(caught.value)


def assert_adds_up(report):
    assert report.read == report.kept + sum(report.dropped.values())


# Containers


def write_all(folder):
    rows = [PAIR, OTHER]
    (folder / "a.json").write_text(json.dumps(rows, indent=1))
    (folder / "b.jsonl").write_text(jsonl(PAIR) + "\n" + jsonl(OTHER))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(jsonl(*rows).encode()))
    (folder / "d.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    (folder / "e.json").write_bytes(b"\xef\xbb\xbf" + jsonl(*rows).encode())
    pandas.DataFrame(rows).to_csv(folder / "f.csv", index=False)
    pandas.DataFrame(rows).to_parquet(folder / "g.parquet")


@pytest.mark.parametrize(
    "name", ["a.json", "b.jsonl", "c.jsonl.gz", "d.json.gz", "e.json", "f.csv", "g.parquet"]
)
def test_every_container_gives_the_same_rows(tmp_path, name):
    write_all(tmp_path)
    dataset, report = read_preferences(tmp_path / name)
    assert dataset.to_list() == [PAIR, OTHER]
    assert (report.format, report.records, report.read, report.kept) == ("TRL standard", 2, 2, 2)
    assert read_preferences(str(tmp_path / name), limit=1)[0].to_list() == [PAIR]


def test_a_folder_is_the_union_of_its_files_and_its_notes_are_no_data(tmp_path):
    write_all(tmp_path)
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / ".hidden.jsonl").write_text("broken")
    dataset, report = read_preferences(tmp_path)
    assert (len(dataset), report.noted["exact duplicates"]) == (14, 12)


def test_in_memory_sources_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    for source in ([PAIR, OTHER], (PAIR, OTHER), datasets.Dataset.from_list([PAIR, OTHER])):
        dataset = load_preferences(source)
        assert dataset.to_list() == [PAIR, OTHER]
        assert dataset.cache_files == []
    split_by_prompt(dataset, test_fraction=0.5, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_csv_cells_may_hold_quotes_newlines_and_long_texts(tmp_path):
    path, long = tmp_path / "pairs.csv", "x" * 200_000
    rows = [{"prompt": 'Say "hi",\nplease', "chosen": long, "rejected": "007", "margin": "1.5"}]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    limit = csv.field_size_limit()
    assert load_preferences(path).to_list() == [{**rows[0], "margin": 1.5}]
    assert csv.field_size_limit() == limit


def test_splits_of_folders_rows_and_dataset_dicts(tmp_path):
    (tmp_path / "train.jsonl").write_text(jsonl(PAIR))
    (tmp_path / "test-00000.jsonl").write_text(jsonl(OTHER))
    assert load_preferences(tmp_path, split="test").to_list() == [OTHER]
    rows = [{**PAIR, "split": "train"}, {**OTHER, "split": "valid1"}]
    assert load_preferences(rows, split="valid1")["prompt"][:] == ["Two plus two?"]
    both = datasets.DatasetDict(
        train=datasets.Dataset.from_list([PAIR]), test=datasets.Dataset.from_list([OTHER])
    )
    assert load_preferences(both).to_list() == [PAIR]
    assert load_preferences(both, split="test").to_list() == [OTHER]
    assert "no split 'dev'" in faults_of(both, split="dev")[1]
    assert "its records say ['train', 'valid1']" in faults_of(rows, split="dev")[1]


def test_limit_reads_no_further(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(jsonl(PAIR, OTHER) + "broken\n")
    assert read_preferences(path, limit=2)[1].records == 2
    assert faults_of(path, limit=3)[0] != []
    with pytest.raises(ValueError, match="limit must be a finite number >= 1, got 0"):
        read_preferences(path, limit=0)


# Formats of pairs


def test_standard_keeps_further_columns_even_if_the_first_row_lacks_them():
    rows = [PAIR, {**OTHER, "margin": 2.0, "by": "ann"}]
    dataset = load_preferences(rows)
    assert dataset.column_names == ["prompt", "chosen", "rejected", "margin", "by"]
    assert dataset["margin"][:] == [None, 2.0]


def test_implicit_prompt_of_strings_ends_at_a_word():
    rows = [
        {"chosen": "The sky is blue.", "rejected": "The sky is black."},
        {"chosen": "It is so", "rejected": "It is so indeed"},
        {"chosen": "Yes", "rejected": "No"},
    ]
    dataset, report = read_preferences(rows)
    assert report.format == "TRL standard, implicit prompt"
    assert dataset.to_list() == [
        {"prompt": "The sky is", "chosen": "blue.", "rejected": "black."},
        {"prompt": "It is", "chosen": "so", "rejected": "so indeed"},
    ]
    assert report.dropped["unshared"] == 1


def test_conversational_with_explicit_prompt():
    prompt = [user("Hi"), assistant("Hello!"), user("Capital of France?")]
    row = {"prompt": prompt, "chosen": [assistant("Paris.")], "rejected": [assistant("Rome.")]}
    dataset, report = read_preferences(
        [row, {**row, "prompt": [user("Capital?")]}, {**row, "prompt": "Capital?"}]
    )
    assert report.format == "TRL conversational"
    assert dataset["prompt"][:] == [
        "User: Hi\n\nAssistant: Hello!\n\nUser: Capital of France?",
        "Capital?",
        "Capital?",
    ]
    assert set(zip(dataset["chosen"], dataset["rejected"], strict=True)) == {("Paris.", "Rome.")}


@pytest.mark.parametrize("explicit", [{}, {"prompt": "Capital?"}])
def test_whole_conversations_are_split_at_the_last_shared_turn(explicit):
    start = [{"role": "system", "content": "Be brief."}, user("Capital?")]
    row = {**explicit, "chosen": [*start, assistant("Paris.")], "rejected": [*start, assistant("Rome.")]}
    dataset, report = read_preferences([row])
    assert report.format == "TRL conversational"
    expected = {"prompt": "System: Be brief.\n\nUser: Capital?", "chosen": "Paris.", "rejected": "Rome."}
    assert dataset.to_list() == [expected]


def test_parquet_of_conversations(tmp_path):
    rows = [{"prompt": [user("Hi")], "chosen": [assistant("Hello!")], "rejected": [assistant("Go.")]}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "chat.parquet")
    expected = {"prompt": "Hi", "chosen": "Hello!", "rejected": "Go."}
    assert load_preferences(tmp_path / "chat.parquet").to_list() == [expected]


def test_a_turn_that_holds_a_role_label_is_dropped_as_ambiguous():
    prompt = [user("a"), assistant("quote:\n\nUser: b"), user("c")]
    row = {"prompt": prompt, "chosen": [assistant("x")], "rejected": [assistant("y")]}
    fine = {**row, "prompt": [user("a")]}
    dataset, report = read_preferences([row, fine])
    assert (len(dataset), report.dropped["ambiguous"]) == (1, 1)
    assert_adds_up(report)


HH = {
    "one turn": ("H: a|A: x", "H: a|A: y", ("a", "x", "y")),
    "three turns": (
        "H: a|A: b|H: c|A: x",
        "H: a|A: b|H: c|A: y",
        ("User: a\n\nAssistant: b\n\nUser: c", "x", "y"),
    ),
    "differs earlier": ("H: a|A: x", "H: a|A: y|H: c|A: z", ("a", "x", "y\n\nUser: c\n\nAssistant: z")),
    "user differs": (
        "H: a|A: b|H: c|A: x",
        "H: a|A: b|H: d|A: x",
        ("a",) + ("b\n\nUser: {}\n\nAssistant: x",) * 2,
    ),
    "goes on": ("H: a|A: x", "H: a|A: x|A: y", ("a", "x", "x\n\nAssistant: y")),
    "unshared": ("H: a|A: x", "H: b|A: x", "unshared"),
    "no answer between": (
        "H: a|A: b|H: c|H: d|A: x",
        "H: a|A: b|H: c|A: x",
        ("a", "b\n\nUser: c\n\nUser: d\n\nAssistant: x", "b\n\nUser: c\n\nAssistant: x"),
    ),
    "starts otherwise": ("A: a|H: b|A: x", "H: b|A: x", "unshared"),
    "empty": ("H: a|A:", "H: a|A: x", "empty"),
    "unanswered": ("H: a", "H: a|A: x", "empty"),
    "identical": ("H: a|A: x", "H: a|A: x ", "identical"),
}


def transcript(short):
    return "\n\n" + short.replace("H:", "Human:").replace("A:", "Assistant:").replace("|", "\n\n")


@pytest.mark.parametrize("name", HH)
def test_hh_transcripts(name):
    chosen, rejected, expected = HH[name]
    good = {"chosen": transcript("H: q|A: good"), "rejected": transcript("H: q|A: bad")}
    dataset, report = read_preferences(
        [good, {"chosen": transcript(chosen), "rejected": transcript(rejected)}]
    )
    assert report.format == "HH transcripts"
    assert dataset[0] == {"prompt": "q", "chosen": "good", "rejected": "bad"}
    assert_adds_up(report)
    if isinstance(expected, str):
        assert (len(dataset), report.dropped[expected]) == (1, 1)
    else:
        expected = (expected[0], expected[1].format("c"), expected[2].format("d"))
        assert tuple(dataset[1][key] for key in ("prompt", "chosen", "rejected")) == expected


def test_a_prompt_in_the_form_of_a_transcript_is_brought_to_the_text_form():
    prompt = transcript("H: a|A: b|H: c|A:")
    dataset = load_preferences([{**PAIR, "prompt": prompt}, {**PAIR, "prompt": transcript("H: a")}])
    assert dataset["prompt"][:] == ["User: a\n\nAssistant: b\n\nUser: c", "a"]


def comparison(**changes):
    row = {
        "info": {"id": "t3", "post": "I lost my keys.", "title": "Keys", "subreddit": "advice"},
        "summaries": [{"text": " Lost keys.", "policy": "a"}, {"text": " A dog.", "policy": "b"}],
        "choice": 0,
        "worker": "w1",
        "split": "train",
    }
    return {**row, **changes}


def test_openai_comparisons():
    article = {"id": "c1", "post": None, "article": "Rain fell.", "title": None, "subreddit": None}
    dataset, report = read_preferences([comparison(), comparison(choice=1), comparison(info=article)])
    assert report.format == "OpenAI comparisons"
    prompt = "SUBREDDIT: advice\n\nTITLE: Keys\n\nPOST: I lost my keys.\n\nTL;DR:"
    more = {"worker": "w1", "split": "train"}
    assert dataset[0] == {"prompt": prompt, "chosen": "Lost keys.", "rejected": "A dog.", **more}
    assert dataset[1] == {"prompt": prompt, "chosen": "A dog.", "rejected": "Lost keys.", **more}
    assert dataset[2]["prompt"] == "ARTICLE: Rain fell.\n\nTL;DR:"
    assert report.noted == {"exact duplicates": 0, "contradictory comparisons": 1}


# Rankings, ratings, labels


def test_rankings_best_first_or_by_rank_and_all_their_pairs_together():
    rows = [
        {"prompt": "p", "responses": ["a", "b", "c"], "by": "ann"},
        {"prompt": "q", "responses": ["d", "e"], "ranks": [2, 1], "by": "ann"},
        {"prompt": "p", "responses": ["f", "g", "i"], "ranks": [0, 0, 1], "by": "bob"},
        {"prompt": "r", "responses": ["h"]},
        {"prompt": "r", "responses": ["h", " "]},
    ]
    rankings, report = read_preferences(rows, unit="rankings")
    assert rankings.column_names == ["prompt", "responses", "ranks", "by"]
    assert rankings["responses"][:] == [["a", "b", "c"], ["e", "d"], ["f", "g", "i"]]
    assert rankings["ranks"][:] == [[0, 1, 2], [1, 2], [0, 0, 1]]
    assert (report.read, report.kept) == (5, 3)
    assert report.dropped == {"empty": 1, "ambiguous": 0, "with fewer than two responses": 1}
    pairs = load_preferences(rankings)
    assert list(zip(pairs["prompt"], pairs["chosen"], pairs["rejected"], strict=True)) == [
        ("p", "a", "b"),
        ("p", "a", "c"),
        ("p", "b", "c"),
        ("p", "f", "i"),
        ("p", "g", "i"),
        ("q", "e", "d"),
    ]
    direct, report = read_preferences(rows)
    assert direct.to_list() == pairs.to_list()
    assert (report.records, report.read, report.kept, report.noted["rankings"]) == (5, 7, 6, 5)
    assert (report.noted["ties left out"], report.dropped["empty"]) == (1, 1)


def message(role, text, *replies, **more):
    return {"message_id": text, "role": role, "text": text, "replies": list(replies), **more}


def tree():
    deep = message(
        "prompter",
        "Why?",
        message("assistant", "second", rank=1),
        message("assistant", "first", rank=0),
        message("assistant", "gone", rank=2, deleted=True),
        message("assistant", "unranked"),
    )
    after = message(
        "prompter", "More?", message("assistant", "yes", rank=0), message("assistant", "no", rank=1)
    )
    lost = message("assistant", "lost", after, rank=0)
    below = message("prompter", "deleted question", lost, deleted=True)
    best = message("assistant", "best", deep, below, rank=0)
    single = message("prompter", "Sure?", message("assistant", "Yes", rank=0))
    root = message(
        "prompter", "Sky?", message("assistant", "worst", rank=2), message("assistant", "mid", single, rank=1)
    )
    root["replies"].append(best)
    return {"message_tree_id": "t1", "tree_state": "ready_for_export", "prompt": root}


def test_trees_give_a_ranking_for_every_answered_user_turn():
    rankings, report = read_preferences([tree()], unit="rankings")
    assert report.format == "OASST trees"
    rows = {row["prompt"]: row["responses"] for row in rankings}
    assert rows == {
        "Sky?": ["best", "mid", "worst"],
        "User: Sky?\n\nAssistant: best\n\nUser: Why?": ["first", "second"],
    }
    assert set(rankings["message_tree_id"]) == {"t1"}
    assert (report.records, report.read, report.kept) == (1, 3, 2)
    assert report.dropped["with fewer than two responses"] == 1
    noted = {"replies ranked": 6, "replies deleted": 2, "replies unranked": 1, "exact duplicates": 0}
    assert report.noted == noted
    assert len(load_preferences([tree()])) == 3 + 1


def test_tree_faults_name_the_message():
    unranked, untold = tree(), tree()
    unranked["prompt"]["replies"][0]["rank"] = "best"
    del untold["prompt"]["replies"][1]["text"]
    found, _ = faults_of([unranked, untold], unit="rankings")
    assert len(found) == 2
    assert found[0].startswith("row 0: the message {'message_id': 'worst'")
    assert "lacks replies or a sound rank" in found[0]
    assert found[1].startswith("row 1: the message {'message_id': 'mid'")
    assert "lacks a sound role or text" in found[1]


def test_ratings_pair_by_difference_without_ties():
    values = [("p", "a", 3), ("p", "b", 5.0), ("p", "c", 3), ("q", "d", 1)]
    rows = [dict(zip(("prompt", "response", "rating"), value, strict=True)) for value in values]
    ratings, report = read_preferences(rows, unit="ratings")
    assert ratings["rating"][:] == [3.0, 5.0, 3.0, 1.0]
    assert (report.unit, report.kept) == ("ratings", 4)
    expected = [
        {"prompt": "p", "chosen": "b", "rejected": "a", "margin": 2.0},
        {"prompt": "p", "chosen": "b", "rejected": "c", "margin": 2.0},
    ]
    direct, report = read_preferences(rows)
    assert direct.to_list() == expected
    assert report.noted["ties left out"] == report.noted["prompts with a single rating"] == 1
    with pytest.raises(PreferenceDataError, match="nothing is left"):
        read_preferences(rows[:1] + rows[2:3])


def test_unpaired_labels_and_pairs_turned_into_them(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("prompt,completion,label\np,a,True\np,b,false\np,c,1\np, ,0\n")
    labels, report = read_preferences(path, unit="labels")
    assert labels["label"][:] == [True, False, True]
    assert (report.read, report.kept, report.dropped["empty"]) == (4, 3, 1)
    assert read_preferences([{**PAIR, "margin": 1.0}], unit="labels")[0].to_list() == [
        {"prompt": PAIR["prompt"], "completion": "Paris.", "label": True, "margin": 1.0},
        {"prompt": PAIR["prompt"], "completion": "Rome.", "label": False, "margin": 1.0},
    ]
    assert (
        "holds labels ('unpaired labels'), not pairs or rankings or ratings; it fits unit='labels' of "
        "read_preferences" in (faults_of(path)[1])
    )


# What is wrong in structure


def test_all_faults_of_all_files_are_listed_with_file_line_and_fix(tmp_path):
    lines = [
        jsonl(PAIR).encode(),
        b'{"prompt": "p", "chosen": "a"}\n',
        b'{"prompt": 3, "chosen": null, "rejected": "b"}\n',
        b'{"prompt": "p", "chosen": "caf\xe9", "rejected": "b"}\n',
        b'{"prompt": "p", "chosen"\n',
        b'["p", "a", "b"]\n',
    ]
    one, two = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    one.write_bytes(b"".join(lines))
    two.write_text("")
    found, text = faults_of(tmp_path)
    assert sorted(found) == sorted(
        [
            f"{one}:2: 'rejected' is missing; add a text",
            f"{one}:3: 'prompt' is of type int; make it a text or a list of messages",
            f"{one}:3: 'chosen' is of type NoneType; make it a text",
            f"{one}:4: 'chosen': holds half a surrogate pair (a cut emoji, or bytes that are not "
            "UTF-8); correct or remove the record",
            f"{one}:5: broken JSON (Expecting ':' delimiter: column 25 (char 24)); fix or remove the record",
            f"{one}:6: a record of type list; make it an object with named columns",
            f"{two}: holds no records; remove the file or fill it",
        ]
    )
    assert text.startswith(f"{tmp_path}: 7 faults, so nothing was loaded\n")
    assert all(fault in text for fault in found)


def test_the_message_shows_twenty_faults_and_the_error_holds_all():
    with pytest.raises(PreferenceDataError) as caught:
        load_preferences([PAIR] + [{"prompt": "p", "chosen": "a"}] * 23)
    assert len(caught.value.faults) == 23
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + 20 + 1
    assert lines[20] == "  row 20: 'rejected' is missing; add a text"
    assert lines[21] == "  and 3 more (all of them are in .faults)"


def test_truncated_gzip_names_the_last_line_read_and_the_other_faults(tmp_path):
    path, rng = tmp_path / "pairs.jsonl.gz", random.Random(0)
    rows = [{**PAIR, "chosen": rng.randbytes(40).hex()} for _ in range(3000)]
    whole = gzip.compress(jsonl({"prompt": "p", "chosen": "a"}, *rows).encode())
    path.write_bytes(whole[: len(whole) // 2])
    found, _ = faults_of(path)
    assert len(found) == 2
    assert f"{path}:1: 'rejected' is missing; add a text" in found
    cut = next(fault for fault in found if "damaged" in fault)
    assert 1 < int(cut.removeprefix(f"{path}:").split(":")[0]) < 3000
    path.write_bytes(b"no gzip at all")
    assert faults_of(path)[0][0].startswith(f"{path}: the file is damaged")


BROKEN_ARRAYS = {
    '[\n{"prompt": "p", "chosen": "a"},\n{"prompt": ]\n': "line 3",
    '[\n{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": "p"}]': "line 3",
    '[{"prompt": "p", "chosen": "a", "rejected": "b"}': "line 1",
    '[{"prompt": "p", "chosen": "a", "rejected": "b"}]\nmore': "line 2",
    "[]": "holds no records",
}


@pytest.mark.parametrize("text", BROKEN_ARRAYS)
def test_broken_json_arrays_name_lines(tmp_path, text):
    path = tmp_path / "pairs.json"
    path.write_text(text)
    found, _ = faults_of(path)
    assert len(found) == 1
    assert found[0].startswith(f"{path}: ")
    assert BROKEN_ARRAYS[text] in found[0]


def test_records_of_a_json_array_are_named_by_their_row(tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([PAIR, {"prompt": "p", "chosen": "a"}, OTHER, 3]))
    assert faults_of(path)[0] == [
        f"{path} row 1: 'rejected' is missing; add a text",
        f"{path} row 3: a record of type int; make it an object with named columns",
    ]


def test_csv_faults_name_the_line_where_the_row_begins(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text('prompt,chosen,rejected\n"a\nb",c,d\np,a\np,a,b\n"open,a,b\n')
    found, _ = faults_of(path)
    assert [fault.split(" (")[0] for fault in found] == [
        f"{path}:4: 2 cells for the columns ['prompt', 'chosen', 'rejected']; name each column once, "
        "quote cells that hold commas or newlines",
        f"{path}:5: the file is damaged or broken after this",
    ]
    path.write_text("prompt,response,rating\np,a,great\np,b,nan\np,c,2\n")
    found, _ = faults_of(path, unit="ratings")
    assert found == [f"{path}:{n}: 'rating' is of type str; make it a number" for n in (2, 3)]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({**PAIR, "chosen": [assistant("a")], "rejected": "b"}, "'rejected' is of type str"),
        (
            {"chosen": [user("a"), {"role": "bot", "content": "b"}], "rejected": [user("a")]},
            "the message {'role': 'bot', 'content': 'b'} lacks a sound role",
        ),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": 1}, "'rejected' is of type int"),
        (comparison(choice=2), "'choice' is 2"),
        (comparison(choice=True), "'choice' is of type bool"),
        (comparison(summaries=[{"text": "a"}]), "'summaries' is not a pair of texts"),
        (comparison(info={"title": "x"}), "'post' is missing"),
        ({"prompt": "p", "responses": ["a", 1]}, "'responses' holds something that is not a text"),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": [1]}, "'ranks' must be a list of whole numbers"),
        ({"prompt": "p", "response": "a", "rating": float("inf")}, "'rating' is inf"),
        ({"text": "a"}, "unknown format, the record has ['text']"),
        ("a text", "unknown format, the record has str"),
    ],
)
def test_structural_faults_of_each_format(row, problem):
    found, _ = faults_of([row])
    assert len(found) == 1
    assert found[0].startswith(f"row 0: {problem}")


def test_a_row_that_is_no_transcript_among_transcripts():
    good = {"chosen": transcript("H: q|A: good"), "rejected": transcript("H: q|A: bad")}
    found, _ = faults_of([good, good, {"chosen": "plain", "rejected": good["rejected"]}])
    assert found == [r"row 2: 'chosen' does not begin with a turn; begin it with '\n\nHuman: '"]


def test_labels_that_are_neither_true_nor_false():
    found, _ = faults_of(
        [{"prompt": "p", "completion": "a", "label": value} for value in (2, "yes")], unit="labels"
    )
    assert found == [
        "row 0: 'label' is 2; make it true or false",
        "row 1: 'label' is of type str; make it true or false",
    ]


def test_unreadable_sources(tmp_path, monkeypatch):
    assert "no such file or folder; check the path" in faults_of(tmp_path / "no.jsonl")[1]
    assert "no such file or folder" in faults_of("no.jsonl")[1]
    (tmp_path / "notes.txt").write_text("x")
    assert "is of no known kind; use one of .jsonl" in faults_of(tmp_path / "notes.txt")[1]
    assert "no data file among its 1 files" in faults_of(tmp_path)[1]
    (tmp_path / "x.parquet").write_bytes(b"PAR?")
    assert "x.parquet: the file is damaged" in faults_of(tmp_path / "x.parquet")[1]
    assert "list: holds no records" in faults_of([])[1]
    assert "column 'id': mixes types" in faults_of([{**PAIR, "id": 1}, {**OTHER, "id": "b"}])[1]
    with pytest.raises(TypeError, match=r"a source is a hub name.* not int"):
        read_preferences(3)


def test_an_unknown_or_offline_hub_name_offers_a_local_path(monkeypatch):
    def offline(name, **options):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    _, text = faults_of("owner/name")
    assert "owner/name: is not a local path; the hub gave no split 'train' (ConnectionError: offline)" in text
    assert "or give a local path" in text


def test_hub_sets_are_streamed_under_a_limit(monkeypatch):
    def served(name, *, split, streaming):
        assert (name, split, streaming) == ("owner/name", "test", True)
        yield PAIR
        yield OTHER
        raise AssertionError("read beyond the limit")

    monkeypatch.setattr(datasets, "load_dataset", served)
    assert load_preferences("owner/name", split="test", limit=2).to_list() == [PAIR, OTHER]


# Shapes that would be misread, values that cannot be stored


@pytest.mark.parametrize("name", ["question", "Instruction", "input", "query", "Prompt"])
@pytest.mark.parametrize(
    "answers",
    [
        {"chosen": "The sky is blue.", "rejected": "The sky is black."},
        {"chosen": [assistant("Blue.")], "rejected": [assistant("Black.")]},
        {"responses": ["Blue.", "Black."]},
    ],
)
def test_a_prompt_of_another_name_is_named(name, answers):
    """Otherwise "The sky is", which the answers happen to share, would be the prompt."""
    found, _ = faults_of([{name: "Which colour?", "id": 7, **answers}])
    assert found == [f"row 0: 'prompt' is missing; write {name} into a column 'prompt'"]


def test_system_texts_are_not_left_beside_the_prompt():
    row = {"system": "Be brief.", "question": "Why?", "chosen": "a", "rejected": "b"}
    assert faults_of([row])[0] == [
        "row 0: 'prompt' is missing; write system and question into a column 'prompt'"
    ]
    found, _ = faults_of([{**PAIR, "system": "Be brief."}])
    assert found[0].startswith(
        "row 0: 'system' stands beside the prompt, so no model would read it; write it"
    )
    assert load_preferences([{**PAIR, "system": ""}])["prompt"][:] == [PAIR["prompt"]]


def test_conversations_and_transcripts_hold_their_own_prompt():
    sides = {"chosen": transcript("H: a|A: x"), "rejected": transcript("H: a|A: y")}
    whole = {"chosen": [user("a"), assistant("x")], "rejected": [user("a"), assistant("y")]}
    for row in ({**sides, "prompt": "a"}, {**sides, "question": "a"}, {**whole, "messages": [user("a")]}):
        pair = load_preferences([row])[0]
        assert (pair["prompt"], pair["chosen"], pair["rejected"]) == ("a", "x", "y")
    written = {"prompt": "Write a dialogue.", "chosen": "User: a\n\nAssistant: b", "rejected": "User: c"}
    assert load_preferences([written]).to_list() == [written]


@pytest.mark.parametrize("write", [repr, json.dumps])
def test_lists_written_into_csv_cells_are_refused(tmp_path, write):
    """CSV keeps no lists: as texts, they would be the answers that a model learns."""
    path = tmp_path / "pairs.csv"
    rows = [{"prompt": [user("It's")], "chosen": [assistant('"yes"')], "rejected": [assistant("no\nway")]}]
    pandas.DataFrame([{key: write(value) for key, value in row.items()} for row in rows]).to_csv(
        path, index=False
    )
    found, _ = faults_of(path)
    assert len(found) == 1
    assert found[0].startswith(f"{path}:2: 'prompt': holds messages written as text; parquet and JSON keep")
    ranking = {"prompt": "p", "responses": write(["a", "b"]), "ranks": write([1, 0])}
    pandas.DataFrame([ranking]).to_csv(path, index=False)
    assert faults_of(path, unit="rankings")[0] == [f"{path}:2: 'responses' is of type str; make it a list"]


def test_cells_that_only_look_like_lists():
    text = {"prompt": "Give me JSON.", "chosen": '[{"name": "a"}]', "rejected": "['a', 'b']"}
    assert load_preferences([text]).to_list() == [text]
    torn = "[{'role': 'user', 'content': 'a'}\n {'role': 'assistant', 'content': 'b'}]"  # NumPy's, no comma
    found, _ = faults_of([{**PAIR, "chosen": torn}])
    assert found == [
        "row 0: 'chosen': holds messages written as text; parquet and JSON keep lists; "
        "correct or remove the record"
    ]


def test_arrays_written_into_csv_cells_are_not_glued(tmp_path):
    path = tmp_path / "rankings.csv"
    path.write_text("prompt,responses\np,['a' 'b']\n")  # NumPy's way to write a list of two texts
    assert faults_of(path, unit="rankings")[0] == [f"{path}:2: 'responses' is of type str; make it a list"]


def test_windows_line_ends_are_line_ends(tmp_path):
    path = tmp_path / "pairs.csv"
    rows = [
        {
            key: transcript(f"H: a|A: {end}").replace("\n", "\r\n")
            for key, end in (("chosen", "x"), ("rejected", "y"))
        }
    ]
    pandas.DataFrame(rows).to_csv(path, index=False)
    for source in (rows, path):
        assert load_preferences(source).to_list() == [{"prompt": "a", "chosen": "x", "rejected": "y"}]
    prompt = "User: a\r\n\r\nAssistant: b\r\n\r\nUser: c"
    kept = load_preferences([{**PAIR, "prompt": prompt}])["prompt"][0]
    assert to_messages(kept) == [user("a"), assistant("b"), user("c")]


def test_arrays_of_pandas_are_lists(tmp_path):
    rows = [{"prompt": [user("Hi")], "chosen": [assistant("Hello!")], "rejected": [assistant("Go.")]}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "chat.parquet")
    records = pandas.read_parquet(tmp_path / "chat.parquet").to_dict("records")
    assert not isinstance(records[0]["chosen"], list)
    expected = {"prompt": "Hi", "chosen": "Hello!", "rejected": "Go."}
    assert load_preferences(records).to_list() == [expected]


GOOD = jsonl(PAIR)
HALF, DIGITS = "\ud83d", "9" * 5000
UNREADABLE = {
    "half.jsonl": (
        GOOD + jsonl({**PAIR, "chosen": HALF}),
        "'chosen': holds half a surrogate pair",
    ),
    "inside.jsonl": (
        GOOD + jsonl({**PAIR, "by": {"name": HALF}}),
        "'by': 'name': holds half a",
    ),
    "name.jsonl": (GOOD + jsonl({**PAIR, HALF: 1}), r"the name '\ud83d' is not text"),
    "deep.jsonl": (GOOD + '{"prompt":' + "[" * 100_000 + "\n", "broken JSON (maximum recursion depth"),
    "digits.jsonl": (GOOD + '{"margin":' + DIGITS + "}\n", "broken JSON (Exceeds the limit"),
    "large.jsonl": (GOOD + jsonl({**PAIR, "id": 10**30}), "'id': holds a whole number of more than 64"),
    "digits.csv": ("prompt,chosen,rejected,margin\nq,a,b," + DIGITS + "\n", "'margin' is of type str"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_values_that_cannot_be_stored_name_their_line(tmp_path, name):
    text, problem = UNREADABLE[name]
    path = tmp_path / name
    path.write_text(text)
    found, _ = faults_of(path)
    assert len(found) == 1
    assert found[0].startswith(f"{path}:2: {problem}")


def test_a_json_array_that_is_nested_too_deeply_names_its_file(tmp_path):
    path = tmp_path / "deep.json"
    path.write_text("[" + GOOD + "," + "[" * 100_000)
    found, _ = faults_of(path)
    assert len(found) == 1
    assert found[0].startswith(f"{path}: the file is damaged or broken after this (maximum recursion depth")


def test_values_of_other_readers_that_cannot_be_stored():
    huge = 10**400
    problem = "more than 64 bits; correct or remove the record"
    assert faults_of([{"prompt": "p", "response": "a", "rating": huge}], unit="ratings")[0][0].endswith(
        problem
    )
    ranking = {"prompt": "p", "responses": ["a", "b"], "ranks": [0, huge]}
    assert faults_of([ranking], unit="rankings")[0][0].endswith(problem)
    assert faults_of([{1: 2, **PAIR}])[0] == ["row 0: the name 1 is not text; correct or remove the record"]
    deep = []
    for _ in range(5000):
        deep = [deep]
    assert faults_of([PAIR, {**PAIR, "by": deep}])[0][0].startswith("row 1: maximum recursion depth")


def test_empty_number_cells_are_missing_numbers(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,chosen,rejected,margin\nq,a,b,\nr,a,b,1.5\n")
    assert load_preferences(path)["margin"][:] == [None, 1.5]


# What is wrong in meaning


def test_the_report_counts_and_adds_up(caplog):
    flipped = {**PAIR, "chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}
    rows = [
        PAIR,
        PAIR,
        flipped,
        {**OTHER, "rejected": "4 "},
        {**OTHER, "chosen": ""},
        {**OTHER, "prompt": " "},
        OTHER,
    ]
    dataset, report = read_preferences(rows)
    assert dataset.to_list() == [PAIR, PAIR, flipped, OTHER]
    assert str(report) == (
        "list: 7 records in the format 'TRL standard'\n"
        "  7 pairs read = 4 kept + 3 dropped (2 empty, 0 ambiguous, 1 identical, 0 unshared)\n"
        "  noted: 1 exact duplicates, 1 contradictory comparisons"
    )
    assert_adds_up(report)
    assert len(load_preferences(rows)) == 4
    assert "7 pairs read = 4 kept + 3 dropped" in caplog.text


def test_nothing_left_is_an_error_that_says_why():
    _, text = faults_of([{**PAIR, "rejected": PAIR["chosen"]}])
    assert "nothing is left" in text
    assert "1 identical" in text


# Splits

prompts = st.lists(
    st.sampled_from(["a", "A ", " a", "b", "B", "c  d", "C d", "e", "f\n", "f", "g"]), min_size=1, max_size=40
)


def numbered(names):
    return datasets.Dataset.from_dict({"prompt": names, "row": list(range(len(names)))})


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(prompts, st.floats(0.05, 0.6), st.integers(0, 5))
def test_no_prompt_leaks_and_every_row_stays(names, fraction, seed):
    distinct = {" ".join(name.lower().split()) for name in names}
    dataset = numbered(names)
    if len(distinct) < 3:
        return
    train, test = split_by_prompt(dataset, test_fraction=fraction, seed=seed)
    assert leaked_prompts(train, test) == set()
    assert sorted([*train["row"], *test["row"]]) == list(range(len(names)))
    assert len(train) > 0 < len(test)
    again = split_by_prompt(numbered(names), test_fraction=fraction, seed=seed)[1]
    assert again["row"][:] == test["row"][:]
    folds = prompt_folds(dataset, 3, seed)
    assert all(leaked_prompts(*fold) == set() for fold in folds)
    assert sorted(row for _, test in folds for row in test["row"]) == list(range(len(names)))


def test_splits_depend_on_prompts_and_seed_but_not_on_the_order_of_rows():
    names = [f"prompt {i}" for i in range(50)]
    _, test = split_by_prompt(numbered(names), test_fraction=0.2, seed=0)
    _, reverse = split_by_prompt(numbered(names[::-1]), test_fraction=0.2, seed=0)
    _, other = split_by_prompt(numbered(names), test_fraction=0.2, seed=1)
    assert len(test) == 10
    assert set(test["prompt"]) == set(reverse["prompt"]) != set(other["prompt"])
    folds = [{*test["prompt"]} for _, test in prompt_folds(numbered(names), 5, 0)]
    assert folds == [{*test["prompt"]} for _, test in prompt_folds(numbered(names), 5, 0)]
    assert folds != [{*test["prompt"]} for _, test in prompt_folds(numbered(names), 5, 1)]


def test_leaks_are_found_and_impossible_splits_refused():
    dataset = numbered(["One  prompt", "two"])
    assert leaked_prompts(dataset, numbered(["one prompt"])) == {"one prompt"}
    with pytest.raises(ValueError, match="test_fraction must be a finite number > 0 and < 1, got 1"):
        split_by_prompt(dataset, test_fraction=1, seed=0)
    with pytest.raises(ValueError, match="leaves none to train on"):
        split_by_prompt(dataset, test_fraction=0.9, seed=0)
    with pytest.raises(ValueError, match="n_splits=3 greater than the number of samples"):
        prompt_folds(dataset, 3, 0)
    with pytest.raises(ValueError, match="n_splits=2 or more, got n_splits=1"):
        prompt_folds(dataset, 1, 0)
    with pytest.raises(ValueError, match="needs a column 'prompt', got \\['row'\\]"):
        leaked_prompts(dataset.remove_columns("prompt"), dataset)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(["a", "b", "two\nlines", " x "]), min_size=1, max_size=5))
def test_conversations_keep_their_turns(texts):
    turns = [
        (user, assistant)[i % 2](text)
        for i, text in enumerate([*texts, "end"] if len(texts) % 2 == 0 else texts)
    ]
    row = {"chosen": [*turns, assistant("x")], "rejected": [*turns, assistant("y")]}
    pair = load_preferences([row])[0]
    assert to_messages(pair["prompt"]) == turns
    assert (pair["chosen"], pair["rejected"]) == ("x", "y")


# Demonstrations and prompts


def test_demonstrations_of_both_formats_and_of_pairs(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(jsonl({"prompt": "p", "completion": "a"}, {"prompt": [user("p")], "completion": "b"}))
    rows, report = read_preferences(path, unit="demonstrations")
    assert rows.to_list() == [{"prompt": "p", "completion": "a"}, {"prompt": "p", "completion": "b"}]
    assert (report.format, report.unit, report.kept) == ("prompts and completions", "demonstrations", 2)
    chat = {"messages": [user("1"), assistant("one"), user("2"), assistant("two")], "id": 7}
    rows, report = read_preferences([chat], unit="demonstrations")
    assert rows.to_list() == [
        {"prompt": "1", "completion": "one", "id": 7},
        {"prompt": "User: 1\n\nAssistant: one\n\nUser: 2", "completion": "two", "id": 7},
    ]
    assert (report.format, report.records, report.read) == ("conversations", 1, 2)
    rows, report = read_preferences([PAIR, {**OTHER, "chosen": " "}], unit="demonstrations")
    assert rows.to_list() == [{"prompt": PAIR["prompt"], "completion": "Paris."}]
    assert report.noted["pairs"] == 2
    assert report.dropped["empty"] == 1
    assert_adds_up(report)


def test_pairs_that_share_no_turn_are_counted_for_every_unit():
    rows = [
        {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
        {"chosen": [user("x"), assistant("b")], "rejected": [user("y"), assistant("c")]},
    ]
    for unit in ("demonstrations", "labels"):
        _, report = read_preferences(rows, unit=unit)
        assert report.dropped["unshared"] == 1
        assert_adds_up(report)


def test_unpaired_rows_of_pairs():
    labels, report = read_preferences([PAIR], unit="labels")
    assert [(row["completion"], row["label"]) for row in labels] == [("Paris.", True), ("Rome.", False)]
    assert report.noted["pairs"] == 1


def test_prompts_keep_their_further_columns_whatever_these_are_called():
    rows = [
        {"prompt": "2 + 2?", "label": "4", "completion": None, "tests": ["f(1)"]},
        {"prompt": [user("a"), assistant("b"), user("c")], "label": "d", "completion": None, "tests": []},
    ]
    prompts, report = read_preferences(rows, unit="prompts")
    assert prompts["prompt"] == ["2 + 2?", "User: a\n\nAssistant: b\n\nUser: c"]
    assert prompts["label"] == ["4", "d"]
    assert prompts["tests"] == [["f(1)"], []]
    assert (report.unit, report.kept) == ("prompts", 2)


@pytest.mark.parametrize(
    "unit, row, fault",
    [
        (
            "demonstrations",
            {"completion": "a"},
            "row 0: 'prompt' is missing; add a text or a list of messages",
        ),
        (
            "demonstrations",
            {"question": "q", "completion": "a"},
            "row 0: 'prompt' is missing; write question into a column 'prompt'",
        ),
        (
            "demonstrations",
            {"prompt": "p", "completion": 3},
            "row 0: 'completion' is of type int; make it a text or a list",
        ),
        (
            "demonstrations",
            {"messages": "a"},
            "row 0: 'messages' is of type str; make it a list of messages",
        ),
        (
            "demonstrations",
            {"messages": [user("a")]},
            "row 0: 'messages' holds no answer of the assistant",
        ),
        (
            "demonstrations",
            {"messages": [{"from": "human"}]},
            "row 0: the message {'from': 'human'} lacks a sound role or text",
        ),
        (
            "demonstrations",
            {"prompt": "p", "output": "a"},
            "row 0: unknown format, the record has ['output', 'prompt']; give prompt, completion",
        ),
        (
            "demonstrations",
            {"prompt": "p", "completion": "a", "label": True},
            "list: holds labels ('unpaired labels'), not demonstrations or pairs",
        ),
        (
            "pairs",
            {"prompt": "p", "completion": "a"},
            "list: holds demonstrations ('prompts and completions'), not pairs",
        ),
        (
            "labels",
            {"prompt": "p", "completion": "a"},
            "list: holds demonstrations ('prompts and completions'), not labels or pairs",
        ),
        (
            "prompts",
            {"question": "q"},
            "row 0: 'prompt' is missing; write question into a column 'prompt'",
        ),
        (
            "prompts",
            {"prompt": {"text": "q"}},
            "row 0: 'prompt' is of type dict; make it a text or a list of messages",
        ),
        ("prompts", {"prompt": "q", "system": "s"}, "row 0: 'system' stands beside the prompt"),
        ("prompts", 5, "row 0: a record of type int; make it an object with named columns"),
    ],
)
def test_faults_of_demonstrations_and_prompts(unit, row, fault):
    found, _ = faults_of([row], unit=unit)
    assert found[0].startswith(fault)


def test_prompts_of_pairs_and_conversations_without_a_column_of_their_own():
    transcripts = [{"chosen": transcript("H: q|A: good"), "rejected": transcript("H: q|A: bad")}]
    prompts, report = read_preferences(transcripts, unit="prompts")
    assert prompts.to_list() == [{"prompt": "q", "chosen": "good", "rejected": "bad"}]
    assert (report.format, report.unit, report.noted["pairs"]) == ("HH transcripts", "prompts", 1)
    prompts, _ = read_preferences([{"messages": [user("q"), assistant("a")]}], unit="prompts")
    assert prompts.to_list() == [{"prompt": "q", "completion": "a"}]
    prompts, report = read_preferences([PAIR], unit="prompts")
    assert prompts.to_list() == [PAIR]
    assert report.format == "prompts"


@pytest.mark.parametrize(
    "row, name",
    [
        ({"prompt": {"text": "q"}}, "OASST trees"),
        ({"prompt": "q", "chosen": [assistant("a")]}, "TRL conversational"),
        ({"prompt": "q", "chosen": [user("q")]}, "TRL conversational"),
        ({"question": "q", "chosen": [assistant("a")]}, "TRL conversational"),
        ({"question": "q", "chosen": [user("q")]}, "TRL conversational"),
        ({"rejected": [user("q")]}, "TRL conversational"),
        ({"question": "q", "chosen": "a"}, "TRL standard"),
        ({"chosen": "a", "rejected": "User: q\n\nAssistant: a"}, "TRL standard, implicit prompt"),
        ({"prompt": "q", "chosen": "Human: q\n\nAssistant: a"}, "HH transcripts"),
        ({"prompt": "q", "chosen": "User: q\n\nAssistant: a"}, "TRL standard"),
        ({"chosen": "User: q\n\nAssistant: a"}, "HH transcripts"),
        ({"prompt": "q", "chosen": None}, "TRL standard"),
        ({"prompt": "q", "completion": "a", "label": 1}, "unpaired labels"),
        ({"prompt": "q", "completion": "a", "messages": []}, "prompts and completions"),
        ({"prompt": "q", "messages": []}, "conversations"),
    ],
)
def test_formats_are_recognized(row, name):
    assert detect_format(row).name == name

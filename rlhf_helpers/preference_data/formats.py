"""The formats in which training data are published, and the one text form that they are all brought to.

`FORMATS`, at the end, lists the columns by which each format is recognized.

A format names the columns that a record needs, with their types, and a parser from one record to its
examples. A parser gives None for a pair that shares no turn to answer, and None as the text of a
conversation that the text form cannot hold. Whatever is structurally wrong is added to `Findings.problems`.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from rlhf_helpers.core.text import to_text

Row = dict[str, Any]
Messages = list[dict[str, str]]
Column = tuple[type | tuple[type, ...], str]

ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
TREE_ROLES = {"prompter": "user", "assistant": "assistant"}
# Anthropic's labels, or those of the flat text form; a transcript uses the set that it begins with.
TRANSCRIPT_LABELS = (
    {"Human": "user", "Assistant": "assistant"},
    {"User": "user", "Assistant": "assistant", "System": "system"},
)


# What public sets call the prompt, or parts of it. Without this list the words that two answers happen to
# share would become the prompt, and the question would be left beside.
PROMPT_NAMES = {
    *("prompt", "question", "instruction", "input", "query", "system", "system_prompt", "user_prompt"),
    *("context", "history", "conversation", "dialogue", "messages", "post", "article", "problem", "request"),
}


@dataclass
class Findings:
    """What was met in a record: structural problems with their fixes, and counts worth telling."""

    problems: list[tuple[str, str]] = field(default_factory=list)
    noted: Counter[str] = field(default_factory=Counter)

    def problem(self, problem: str, fix: str) -> None:
        """Note one structural problem."""
        self.problems.append((problem, fix))

    def check(self, row: Mapping[str, Any], key: str, column: Column) -> None:
        """Note it when `key` is missing or of another type (true and false are no numbers)."""
        kind, words = column
        if key not in row:
            names = _prompt_names(row) if key == "prompt" else []
            fix = f"rename '{names[0]}' to 'prompt'" if names else f"add {words}"
            self.problem(f"'{key}' is missing", f"write {names} into one 'prompt'" if names[1:] else fix)
        elif not isinstance(row[key], kind) or (isinstance(row[key], bool) and kind != (bool, int)):
            self.problem(f"'{key}' is of type {type(row[key]).__name__}", f"make it {words}")


Parser = Callable[[Row, Findings], list[Row | None]]


@dataclass(frozen=True)
class Format:
    """A published shape: name, unit of its examples, parser, needed columns with (type, words for it)."""

    name: str
    unit: str
    parse: Parser
    columns: tuple[tuple[str, Column], ...]

    def examples(self, record: Any, found: Findings) -> list[Row | None]:
        """Return the examples of one record with its further columns, or note all that is wrong with it."""
        if not isinstance(record, Mapping):
            found.problem(f"a record of type {type(record).__name__}", "make it an object with named columns")
            return []
        for key, column in self.columns:
            found.check(record, key, column)
        if record.get("margin") is not None:
            found.check(record, "margin", NUMBER)
        if not found.problems and str(record.get("system") or "").strip():
            fix = "write it into the prompt, as 'System: ...', a blank line and 'User: ...'"
            found.problem("'system' stands beside the prompt, so no model would read it", fix)
        examples = [] if found.problems else self.parse(record, found)
        needed = [key for key, _ in self.columns]
        others = {key: value for key, value in record.items() if key not in needed}
        return [example and {**example, **others, **example} for example in examples]


def _prompt_names(row: Mapping[str, Any]) -> list[str]:
    """Columns that hold a prompt, or a part of one, under another name than 'prompt'."""
    return [key for key in row if str(key).strip().casefold() in PROMPT_NAMES and row[key]]


def _messages(value: list, key: str, found: Findings) -> Messages:
    return [_message(m, f"'{key}', message {i},", "content", ROLES, found) for i, m in enumerate(value)]


def _message(node: Any, name: str, key: str, roles: dict[str, str], found: Findings) -> dict[str, str]:
    role, text = (node.get("role"), node.get(key)) if isinstance(node, Mapping) else (None, None)
    if not isinstance(role, str) or role not in roles or not isinstance(text, str):
        found.problem(f"{name} lacks a sound role or text", f"give 'role' ({', '.join(roles)}) and '{key}'")
        return {"role": "", "content": ""}
    return {"role": roles[role], "content": text}


def _written(turns: Messages, *, response: bool = False) -> str | None:
    """A prompt, or a response and what follows it, in the flat form; None where a text holds a role label."""
    if len(turns) < 2 and (response or not turns):
        return turns[0]["content"] if turns else ""
    try:
        return to_text(turns).removeprefix("Assistant: " if response else "")
    except ValueError:
        return None


def _text(row: Row, key: str, found: Findings) -> str | None:
    value = row[key]
    if isinstance(value, str) and not (key == "prompt" and value.lstrip().startswith("Human:")):
        return value
    turns = transcript_turns(value) if isinstance(value, str) else _messages(value, key, found)
    if isinstance(value, str) and not turns[-1]["content"]:
        turns.pop()  # "Assistant:" at the end only asks for the answer
    return None if found.problems else _written(turns, response=key != "prompt")


def transcript_turns(text: str) -> Messages | None:
    r"""Cut "\n\nHuman: ...\n\nAssistant: ..." into messages, outer white space off, or None."""
    for labels in TRANSCRIPT_LABELS:
        head, *parts = re.split(rf"(?:\A\s*|\n\n)({'|'.join(labels)}):", text)
        if parts and not head:
            pairs = zip(parts[::2], parts[1::2], strict=True)
            return [{"role": labels[label], "content": content.strip()} for label, content in pairs]
    return None


def _shared(one: str | Messages, other: str | Messages) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def split_at_last_shared_turn(chosen: Messages, rejected: Messages) -> Row | None:
    """Split two conversations into prompt, chosen, rejected; None when they share no turn to answer.

    The prompt is the shared prefix of turns, up to its last user turn that both go on to answer; the
    responses are the rest, which is the final assistant text. Where more than one turn follows, the whole
    rest is kept, later turns in the flat form: the judge read all of it, and cutting would change what was
    compared.
    """
    for shared in range(_shared(chosen, rejected), 0, -1):
        follows = {turns[shared]["role"] for turns in (chosen, rejected) if len(turns) > shared}
        if chosen[shared - 1]["role"] == "user" and follows <= {"assistant"}:
            sides = {"chosen": chosen[shared:], "rejected": rejected[shared:]}
            rest = {key: _written(turns, response=True) for key, turns in sides.items()}
            return {"prompt": _written(chosen[:shared]), **rest}
    return None


def _standard(row: Row, found: Findings) -> list[Row | None]:
    return [{key: _text(row, key, found) for key in ("prompt", "chosen", "rejected")}]


def _implicit_standard(row: Row, found: Findings) -> list[Row | None]:
    """Prompt = what both texts begin with, back to a word's end; the white space between is left out."""
    chosen, rejected = row["chosen"], row["rejected"]
    words = re.match(r"(?s)(.*\S)\s+", chosen[: _shared(chosen, rejected)])
    cut = words.end() if words else 0
    return [words and {"prompt": words[1], "chosen": chosen[cut:], "rejected": rejected[cut:]}]


def _conversational(row: Row, found: Findings) -> list[Row | None]:
    """With both answers beginning at the assistant, the row's prompt; else whole conversations, split."""
    prompt = _text(row, "prompt", found) if "prompt" in row else None
    sides = {key: _messages(row[key], key, found) for key in ("chosen", "rejected")}
    if "prompt" not in row or any(side[0]["role"] != "assistant" for side in sides.values() if side):
        return [split_at_last_shared_turn(*sides.values())]
    return [{"prompt": prompt, **{key: _written(side, response=True) for key, side in sides.items()}}]


def _transcripts(row: Row, found: Findings) -> list[Row | None]:
    sides = {key: transcript_turns(row[key]) for key in ("chosen", "rejected")}
    for key in (key for key, turns in sides.items() if turns is None):
        found.problem(f"'{key}' does not begin with a turn", r"begin it with '\n\nHuman: '")
    return [] if found.problems else [split_at_last_shared_turn(*sides.values())]


def _comparison(row: Row, found: Findings) -> list[Row | None]:
    """OpenAI's summarize-from-feedback: the prompt is the post under its headings, ended by "TL;DR:"."""
    info, choice = row["info"], row["choice"]
    source = "article" if info.get("post") is None and "article" in info else "post"
    found.check(info, source, (str, "the text to summarise"))
    texts = [entry.get("text") if isinstance(entry, Mapping) else None for entry in row["summaries"]]
    if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
        found.problem("'summaries' is no pair of texts", "give two objects with a text as 'text'")
    if choice not in (0, 1):
        found.problem(f"'choice' is {choice}", "make it 0 or 1, the better summary")
    if found.problems:
        return []
    parts = {key: info.get(key) for key in ("subreddit", "title", source)}
    prompt = "\n\n".join([*(f"{key.upper()}: {part}" for key, part in parts.items() if part), "TL;DR:"])
    better, worse = texts[int(choice)].strip(), texts[1 - int(choice)].strip()
    return [{"prompt": prompt, "chosen": better, "rejected": worse}]


def _ranking(row: Row, found: Findings) -> list[Row | None]:
    """Responses best first, or in the order of `ranks` (lower is better, equal is tied)."""
    responses = row["responses"]
    ranks = list(range(len(responses))) if row.get("ranks") is None else row["ranks"]
    if not all(isinstance(response, str) for response in responses):
        found.problem("'responses' holds something that is no text", "make it a list of texts")
    if not isinstance(ranks, list) or [type(rank) for rank in ranks] != [int] * len(responses):
        found.problem("'ranks' gives no whole number for each response", "give one a response, 0 is best")
    prompt = _text(row, "prompt", found)
    return [] if found.problems else [_ordered(prompt, ranks, responses)]


def _ordered(prompt: str | None, ranks: list[int], responses: list[str]) -> Row:
    order = sorted(range(len(ranks)), key=ranks.__getitem__)
    ordered = {"responses": [responses[i] for i in order], "ranks": [ranks[i] for i in order]}
    return {"prompt": prompt, **ordered}


def _tree(row: Row, found: Findings) -> list[Row | None]:
    """An OASST message tree: one ranking for every user turn that assistants answered.

    Replies that are deleted (or stand below a deleted message) and replies without a rank are left out and
    counted, so a ranking may come out with fewer than two. Rank 0 is best.
    """
    rankings: list[Row | None] = []
    waiting: list[tuple[Any, Messages, bool]] = [(row["prompt"], [], False)]
    while waiting:
        node, path, deleted = waiting.pop()
        facts = node if isinstance(node, Mapping) else {}
        name, replies = f"message {facts.get('message_id', 'without id')}", facts.get("replies")
        path = [*path, _message(node, name, "text", TREE_ROLES, found)]
        if not isinstance(replies, list) or not isinstance(facts.get("rank"), int | None):
            found.problem(f"{name} lacks replies or a sound rank", "give a list 'replies', a whole 'rank'")
            continue
        deleted = deleted or bool(node.get("deleted"))
        waiting += [(reply, path, deleted) for reply in reversed(replies)]
        answers = [r for r in replies if isinstance(r, Mapping) and r.get("role") == "assistant"]
        alive = [answer for answer in answers if not (deleted or answer.get("deleted"))]
        ranked = [answer for answer in alive if isinstance(answer.get("rank"), int)]
        found.noted["replies ranked"] += len(ranked)
        found.noted["replies deleted"] += len(answers) - len(alive)
        found.noted["replies unranked"] += len(alive) - len(ranked)
        if answers and not deleted:
            ranks, texts = ([answer.get(key) for answer in ranked] for key in ("rank", "text"))
            rankings.append(_ordered(_written(path), ranks, texts))
    return [] if found.problems else rankings


def _rating(row: Row, found: Findings) -> list[Row | None]:
    if not math.isfinite(row["rating"]):
        found.problem(f"'rating' is {row['rating']}", "make it a finite number")
    texts = {key: _text(row, key, found) for key in ("prompt", "response")}
    return [{**texts, "rating": float(row["rating"])}]


def _unpaired(row: Row, found: Findings) -> list[Row | None]:
    if row["label"] not in (0, 1):
        found.problem(f"'label' is {row['label']}", "make it true or false")
    return [{**_demonstration(row, found)[0], "label": bool(row["label"])}]


def _demonstration(row: Row, found: Findings) -> list[Row | None]:
    return [{key: _text(row, key, found) for key in ("prompt", "completion")}]


def _conversation(row: Row, found: Findings) -> list[Row | None]:
    """One example for each answer of the assistant, whose prompt is the conversation before it."""
    turns = _messages(row["messages"], "messages", found)
    answers = [i for i, turn in enumerate(turns) if i and turn["role"] == "assistant"]
    if not answers:
        found.problem("'messages' holds no answer of the assistant", "end it with one, or drop the record")
    if found.problems:
        return []
    return [{"prompt": _written(turns[:i]), "completion": turns[i]["content"]} for i in answers]


def _prompt(row: Row, found: Findings) -> list[Row | None]:
    return [{"prompt": _text(row, "prompt", found)}]


TEXT, MESSAGES, LIST = (str, "a text"), (list, "a list of messages"), (list, "a list")
EITHER, OBJECT = ((str, list), "a text or a list of messages"), (Mapping, "an object")
NUMBER, LABEL = ((int, float), "a number"), ((bool, int), "true or false")


def _format(name: str, unit: str, parse: Parser, **columns: Column) -> Format:
    return Format(name, unit, parse, tuple(columns.items()))


_sides, _chats = {"chosen": TEXT, "rejected": TEXT}, {"chosen": MESSAGES, "rejected": MESSAGES}
STANDARD = _format("TRL standard", "pairs", _standard, prompt=EITHER, **_sides)
IMPLICIT = _format("TRL standard, implicit prompt", "pairs", _implicit_standard, **_sides)
CHAT = _format("TRL conversational", "pairs", _conversational, prompt=EITHER, **_chats)
IMPLICIT_CHAT = _format("TRL conversational, implicit prompt", "pairs", _conversational, **_chats)
TRANSCRIPTS = _format("HH transcripts", "pairs", _transcripts, **_sides)
COMPARISONS = _format("OpenAI comparisons", "pairs", _comparison, info=OBJECT, summaries=LIST, choice=NUMBER)
RANKINGS = _format("rankings", "rankings", _ranking, prompt=EITHER, responses=LIST)
TREES = _format("OASST trees", "rankings", _tree, prompt=OBJECT)
RATINGS = _format("ratings", "ratings", _rating, prompt=EITHER, response=EITHER, rating=NUMBER)
UNPAIRED = _format("unpaired labels", "labels", _unpaired, prompt=EITHER, completion=EITHER, label=LABEL)
COMPLETIONS = _format(
    "prompts and completions", "demonstrations", _demonstration, prompt=EITHER, completion=EITHER
)
CONVERSATIONS = _format("conversations", "demonstrations", _conversation, messages=MESSAGES)
PROMPTS = _format("prompts", "prompts", _prompt, prompt=EITHER)  # for `detect_prompts` alone

# What `detect_format` looks for in a record, in this order: columns by name, and in capitals what `_features`
# says of their values. TREE: the prompt is a message with replies. PROMPT: there is a prompt, perhaps under
# another name. The rest is the form of chosen or rejected: ANSWER, CONVERSATION (lists of messages), HUMAN,
# TURNS (texts that begin with "Human: " or "User: "), TEXT.
FORMATS = (
    ({"TREE"}, TREES),
    ({"PROMPT", "ANSWER"}, CHAT),
    ({"prompt", "CONVERSATION"}, CHAT),
    ({"ANSWER"}, IMPLICIT_CHAT),
    ({"CONVERSATION"}, IMPLICIT_CHAT),
    ({"PROMPT", "TEXT"}, STANDARD),
    ({"TEXT"}, IMPLICIT),
    ({"HUMAN"}, TRANSCRIPTS),  # a transcript that repeats the prompt, if there is one
    ({"prompt", "TURNS"}, STANDARD),  # beside a prompt, "User: ..." may be an answer
    ({"TURNS"}, TRANSCRIPTS),
    ({"chosen"}, STANDARD),
    ({"summaries"}, COMPARISONS),
    ({"responses"}, RANKINGS),
    ({"rating"}, RATINGS),
    ({"label"}, UNPAIRED),
    ({"completion"}, COMPLETIONS),
    ({"messages"}, CONVERSATIONS),
)


def detect_format(row: Any) -> Format | None:
    """Name the format that a record's keys and types point to, even when one of its keys is missing."""
    features = _features(row) if isinstance(row, Mapping) else set()
    return next((form for columns, form in FORMATS if columns <= features), None)


def detect_prompts(row: Any) -> Format | None:
    """Name the format to read a prompt from: its own column, whatever else there is, or else the answers."""
    own = not isinstance(row, Mapping) or "prompt" in row
    return PROMPTS if own else detect_format(row) or PROMPTS


def _features(row: Row) -> set[str]:
    """Return a record's columns and the words of `FORMATS` that hold for it."""
    features = {*row, *(_form_of(row[key]) for key in ("chosen", "rejected") if row.get(key) is not None)}
    if "prompt" in row or _prompt_names(row):
        features.add("PROMPT")
    if isinstance(row.get("prompt"), Mapping):
        features.add("TREE")
    return features


def _form_of(side: Any) -> str:
    if isinstance(side, list):
        first = side[0] if side and isinstance(side[0], Mapping) else {}
        return "ANSWER" if first.get("role") == "assistant" else "CONVERSATION"
    if isinstance(side, str) and transcript_turns(side):
        return "HUMAN" if side.lstrip().startswith("Human:") else "TURNS"
    return "TEXT"

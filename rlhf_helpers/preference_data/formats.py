"""The formats in which training data are published, and the one text form that they are all brought to.

`detect_format`, at the end, tells by its columns which format a record has.

A format names the columns that a record needs, with their types, and a parser from one record to its
examples, one function per format. A parser gives no example for a pair that shares no turn to answer, and
None as the text of a conversation that the text form cannot hold. Whatever is structurally wrong is raised as
a ValueError whose arguments are the faults, each "problem; fix".
"""

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_helpers.core.text import to_text

Row = dict[str, Any]
Messages = list[dict[str, str]]
Column = tuple[tuple[type, ...], str]  # what a value may be, and the words for it
Examples = list[Row]

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

TEXT, LIST, OBJECT = ((str,), "a text"), ((list,), "a list"), ((dict,), "an object")
EITHER, MESSAGES = ((str, list), "a text or a list of messages"), ((list,), "a list of messages")
NUMBER, LABEL = ((int, float), "a number"), ((bool, int), "true or false")


@dataclass(eq=False)
class Format:
    """A published shape: name, unit of its examples, the columns that a record needs, its parser.

    Without a parser, the columns as texts are the one example of a record.
    """

    name: str
    unit: str
    columns: Mapping[str, Column]
    parse: Callable[[Row, Counter], Examples] | None = None

    def examples(self, record: Any, noted: Counter) -> Examples:
        """Return the examples of one record with its further columns.

        Raises:
            ValueError: Its arguments are all that is wrong with the record.
        """
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise ValueError(f"a record of type {kind}; make it an object with named columns")
        margin = {} if record.get("margin") is None else {"margin": NUMBER}
        _require(record, {**self.columns, **margin})
        if str(record.get("system") or "").strip():
            fix = "write it into the prompt, as 'System: ...', a blank line and 'User: ...'"
            raise ValueError(f"'system' stands beside the prompt, so no model would read it; {fix}")
        examples = self.parse(record, noted) if self.parse else [_texts(record, *self.columns)]
        # Further columns are kept, behind the example's own, which win over others of the same name.
        others = {key: value for key, value in record.items() if key not in self.columns}
        return [{**example, **others, **example} for example in examples]


def _require(row: Row, columns: Mapping[str, Column]) -> None:
    """Refuse a row in which a column is missing or of another type (true and false are not numbers)."""
    faults = []
    for key, (kinds, words) in columns.items():
        if key not in row:
            names = _prompt_names(row) if key == "prompt" else []
            fix = f"write {' and '.join(names)} into a column 'prompt'" if names else f"add {words}"
            faults.append(f"'{key}' is missing; {fix}")
        elif type(row[key]) not in kinds:
            faults.append(f"'{key}' is of type {type(row[key]).__name__}; make it {words}")
    if faults:
        raise ValueError(*faults)


def _prompt_names(row: Row) -> list[str]:
    """Columns that hold a prompt, or a part of one, under another name than 'prompt'."""
    return [key for key in row if key.strip().casefold() in PROMPT_NAMES and row[key]]


def _message(node: Any, key: str, roles: Mapping[str, str]) -> dict[str, str]:
    """Read one message, whose text stands under `key`."""
    role, text = (node.get("role"), node.get(key)) if isinstance(node, dict) else (None, None)
    if not isinstance(role, str) or role not in roles or not isinstance(text, str):
        fix = f"give 'role' ({', '.join(roles)}) and '{key}'"
        raise ValueError(f"the message {str(node)[:80]} lacks a sound role or text; {fix}")
    return {"role": roles[role], "content": text}


def _messages(value: list[Any]) -> Messages:
    return [_message(node, "content", ROLES) for node in value]


def _written(turns: Messages, *, response: bool = False) -> str | None:
    """A prompt, or a response and what follows it, in the flat form; None where a text holds a role label."""
    if len(turns) < 2 and (response or not turns):
        return turns[0]["content"] if turns else ""
    try:
        return to_text(turns).removeprefix("Assistant: " if response else "")
    except ValueError:
        return None


def _texts(row: Row, *keys: str) -> dict[str, str | None]:
    """Bring a prompt and its responses to texts: each a text, or messages; a prompt may be a transcript."""
    texts: dict[str, str | None] = {}
    for key in keys:
        texts[key] = row[key]
        if isinstance(row[key], list):
            texts[key] = _written(_messages(row[key]), response=key != "prompt")
        elif key == "prompt" and row[key].lstrip().startswith("Human:"):
            turns = transcript_turns(row[key])
            # "Assistant:" at the end only asks for the answer.
            texts[key] = _written(turns if turns[-1]["content"] else turns[:-1])
    return texts


def parse_transcripts(row: Row, noted: Counter) -> Examples:
    r"""Turn "\n\nHuman: ...\n\nAssistant: ..." on both sides into prompt, chosen and rejected."""
    sides = []
    for key in ("chosen", "rejected"):
        turns = transcript_turns(row[key])
        if turns is None:
            raise ValueError(rf"'{key}' does not begin with a turn; begin it with '\n\nHuman: '")
        sides.append(turns)
    pair = split_at_last_shared_turn(*sides)
    return [] if pair is None else [pair]


def transcript_turns(text: str) -> Messages | None:
    r"""Cut "\n\nHuman: ...\n\nAssistant: ..." into messages, outer white space off, or None."""
    for labels in TRANSCRIPT_LABELS:
        head, *parts = re.split(rf"(?:\A\s*|\n\n)({'|'.join(labels)}):", text)
        if parts and not head:
            pairs = zip(parts[::2], parts[1::2], strict=True)
            return [{"role": labels[label], "content": content.strip()} for label, content in pairs]
    return None


def split_at_last_shared_turn(chosen: Messages, rejected: Messages) -> Row | None:
    """Split two conversations into prompt, chosen, rejected; None when they share no turn to answer.

    The prompt is the shared prefix of turns, up to the last user turn after which both sides answer or end;
    the responses are the rest, which is the final assistant text. Where more than one turn follows, the
    whole rest is kept, later turns in the flat form: the judge read all of it, and cutting would change what
    was compared.
    """
    for shared in range(min(len(chosen), len(rejected)), 0, -1):
        if chosen[:shared] != rejected[:shared]:
            continue
        follows = {turns[shared]["role"] for turns in (chosen, rejected) if len(turns) > shared}
        if chosen[shared - 1]["role"] == "user" and follows <= {"assistant"}:
            sides = {"chosen": chosen[shared:], "rejected": rejected[shared:]}
            rest = {key: _written(turns, response=True) for key, turns in sides.items()}
            return {"prompt": _written(chosen[:shared]), **rest}
    return None


def _implicit(row: Row, noted: Counter) -> Examples:
    """Prompt = what both texts begin with, back to a word's end; the white space between is left out."""
    words = re.match(r"(?s)(.*\S)\s+", os.path.commonprefix([row["chosen"], row["rejected"]]))  # noqa: RUF071
    if words is None:
        return []
    sides = {key: row[key].removeprefix(words[0]) for key in ("chosen", "rejected")}
    return [{"prompt": words[1], **sides}]


def _conversational(row: Row, noted: Counter) -> Examples:
    """Answers that begin at the assistant belong to the row's prompt; whole conversations are split."""
    chosen, rejected = _messages(row["chosen"]), _messages(row["rejected"])
    split = split_at_last_shared_turn(chosen, rejected)
    whole = any(side and side[0]["role"] != "assistant" for side in (chosen, rejected))
    if whole or (split and "prompt" not in row):
        return [split] if split else []
    _require(row, {"prompt": EITHER})
    return [_texts(row, "prompt", "chosen", "rejected")]


def _comparison(row: Row, noted: Counter) -> Examples:
    """OpenAI's summarize-from-feedback: the prompt is the post under its headings, ended by "TL;DR:"."""
    info, choice = row["info"], row["choice"]
    source = "article" if info.get("post") is None and "article" in info else "post"
    _require(info, {source: TEXT})
    texts = [entry.get("text") for entry in row["summaries"] if isinstance(entry, dict)]
    if [type(text) for text in texts] != [str, str]:
        raise ValueError("'summaries' is not a pair of texts; give two objects with a text as 'text'")
    if choice not in (0, 1):
        raise ValueError(f"'choice' is {choice}; make it 0 or 1, the better summary")
    parts = [f"{key.upper()}: {info[key]}" for key in ("subreddit", "title", source) if info.get(key)]
    chosen, rejected = (texts[index].strip() for index in (int(choice), 1 - int(choice)))
    return [{"prompt": "\n\n".join([*parts, "TL;DR:"]), "chosen": chosen, "rejected": rejected}]


def _ranking(row: Row, noted: Counter) -> Examples:
    """Responses best first, or in the order of `ranks` (lower is better, equal is tied)."""
    responses, ranks = row["responses"], row.get("ranks")
    if ranks is None:
        ranks = list(range(len(responses)))
    if not all(isinstance(response, str) for response in responses):
        raise ValueError("'responses' holds something that is not a text; make it a list of texts")
    if not isinstance(ranks, list) or [type(rank) for rank in ranks] != [int] * len(responses):
        raise ValueError("'ranks' must be a list of whole numbers, one per response; 0 is best")
    return [{**_texts(row, "prompt"), **_best_first(responses, ranks)}]


def _best_first(responses: list[str], ranks: list[int]) -> Row:
    order = sorted(range(len(ranks)), key=ranks.__getitem__)
    return {"responses": [responses[i] for i in order], "ranks": [ranks[i] for i in order]}


def _tree(row: Row, noted: Counter) -> Examples:
    """An OASST message tree: one ranking for every user turn that assistants answered.

    Messages that are deleted, with all below them, and replies without a rank are left out and counted, so a
    ranking may come out with fewer than two. Rank 0 is best.
    """
    rankings: Examples = []
    waiting: list[tuple[Any, Messages]] = [(row["prompt"], [])]
    while waiting:
        node, before = waiting.pop()
        path = [*before, _message(node, "text", TREE_ROLES)]
        replies, rank = node.get("replies"), node.get("rank")
        sound = isinstance(replies, list) and all(isinstance(reply, dict) for reply in replies)
        if not sound or not isinstance(rank, int | None):
            fix = "give a list 'replies', a whole 'rank'"
            raise ValueError(f"the message {str(node)[:80]} lacks replies or a sound rank; {fix}")
        alive = [reply for reply in replies if not reply.get("deleted")]
        waiting += [(reply, path) for reply in reversed(alive)]
        answers = [reply for reply in alive if reply.get("role") == "assistant"]
        ranked = [answer for answer in answers if isinstance(answer.get("rank"), int)]
        noted["replies ranked"] += len(ranked)
        noted["replies deleted"] += len(replies) - len(alive)
        noted["replies unranked"] += len(answers) - len(ranked)
        if answers:
            texts, ranks = ([answer.get(key) for answer in ranked] for key in ("text", "rank"))
            rankings.append({"prompt": _written(path), **_best_first(texts, ranks)})
    return rankings


def _rating(row: Row, noted: Counter) -> Examples:
    if not math.isfinite(row["rating"]):
        raise ValueError(f"'rating' is {row['rating']}; make it a finite number")
    return [{**_texts(row, "prompt", "response"), "rating": float(row["rating"])}]


def _unpaired(row: Row, noted: Counter) -> Examples:
    if row["label"] not in (0, 1):
        raise ValueError(f"'label' is {row['label']}; make it true or false")
    return [{**_texts(row, "prompt", "completion"), "label": bool(row["label"])}]


def _conversation(row: Row, noted: Counter) -> Examples:
    """One example for each answer of the assistant, whose prompt is the conversation before it."""
    turns = _messages(row["messages"])
    answers = [i for i, turn in enumerate(turns) if i and turn["role"] == "assistant"]
    if not answers:
        raise ValueError("'messages' holds no answer of the assistant; end it with one, or drop the record")
    return [{"prompt": _written(turns[:i]), "completion": turns[i]["content"]} for i in answers]


_P, _SIDES = {"prompt": EITHER}, {"chosen": TEXT, "rejected": TEXT}
TRANSCRIPTS = Format("HH transcripts", "pairs", _SIDES, parse_transcripts)
STANDARD = Format("TRL standard", "pairs", _P | _SIDES)
IMPLICIT = Format("TRL standard, implicit prompt", "pairs", _SIDES, _implicit)
CONVERSATIONAL = Format("TRL conversational", "pairs", dict.fromkeys(_SIDES, MESSAGES), _conversational)
TREES = Format("OASST trees", "rankings", {"prompt": OBJECT}, _tree)
PROMPTS = Format("prompts", "prompts", _P)  # for the unit "prompts" alone
# Formats that one column gives away: the first of these that a record has.
_COMPARED = {"info": OBJECT, "summaries": LIST, "choice": NUMBER}
BY_COLUMN = {
    "chosen": STANDARD,
    "summaries": Format("OpenAI comparisons", "pairs", _COMPARED, _comparison),
    "responses": Format("rankings", "rankings", _P | {"responses": LIST}, _ranking),
    "rating": Format("ratings", "ratings", _P | {"response": EITHER, "rating": NUMBER}, _rating),
    "label": Format("unpaired labels", "labels", _P | {"completion": EITHER, "label": LABEL}, _unpaired),
    "completion": Format("prompts and completions", "demonstrations", _P | {"completion": EITHER}),
    "messages": Format("conversations", "demonstrations", {"messages": MESSAGES}, _conversation),
}


def detect_format(row: Any, unit: str = "pairs") -> Format | None:
    """Name the format that a record's keys and types point to, even when one of its keys is missing.

    Where prompts are wanted, a record's own prompt is read whatever else there is.
    """
    if not isinstance(row, dict):
        return PROMPTS if unit == "prompts" else None
    if unit == "prompts" and "prompt" in row:
        return PROMPTS
    if isinstance(row.get("prompt"), dict):  # a message with replies
        return TREES
    sides = [_side_form(row[key]) for key in ("chosen", "rejected") if row.get(key) is not None]
    if "messages" in sides:
        return CONVERSATIONAL
    if "text" in sides:
        return STANDARD if "prompt" in row or _prompt_names(row) else IMPLICIT
    if "Human:" in sides:  # a transcript repeats the prompt, if there is one
        return TRANSCRIPTS
    if "User:" in sides:  # beside a prompt this may be an answer
        return STANDARD if "prompt" in row else TRANSCRIPTS
    found = next((form for column, form in BY_COLUMN.items() if column in row), None)
    return PROMPTS if found is None and unit == "prompts" else found


def _side_form(side: Any) -> str:
    """Tell messages, either kind of transcript and other text apart."""
    if isinstance(side, list):
        return "messages"
    if isinstance(side, str) and transcript_turns(side):
        return "Human:" if side.lstrip().startswith("Human:") else "User:"
    return "text"

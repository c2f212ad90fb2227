"""The one text form: how a prompt and a response become token ids, everywhere in this package.

A prompt is plain text: either what one user says, or a conversation in the flat form

    User: a\\n\\nAssistant: b\\n\\nUser: c

A response is the assistant's next turn. Prompt and response are tokenised separately and concatenated, so
sampling, supervised training, rewards and preference losses see the same ids for the same text; tokenised
together, a merge across the seam would give ids that the policy never sampled.
"""

import functools
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

Message = dict[str, str]
Columns = Mapping[
    str, Sequence[Any]
]  # further columns of a data set of prompts: name -> one entry per prompt

logger = logging.getLogger(__name__)

_LABELS = {"User": "user", "Assistant": "assistant", "System": "system"}
_ROLES = {role: label for label, role in _LABELS.items()}
_TURN = re.compile(rf"(?:\A|\n\n)({'|'.join(_LABELS)}): ")


def to_messages(prompt: str) -> list[Message]:
    """Parse a prompt into messages {"role", "content"}, oldest first.

    Text that starts with a role label is a conversation; any other text is one user message.
    """
    if not prompt.startswith(tuple(f"{label}: " for label in _LABELS)):
        return [{"role": "user", "content": prompt}]
    parts = _TURN.split(prompt)
    return [{"role": _LABELS[parts[i]], "content": parts[i + 1]} for i in range(1, len(parts), 2)]


def to_text(messages: list[Message]) -> str:
    """Write messages as a prompt; the inverse of `to_messages`. A single user message gives its content.

    Raises ValueError where there is no message, a role is unknown, or a content holds a role label after a
    blank line, so that the text would be read back as other messages.
    """
    if not messages:
        raise ValueError("there are no messages: a prompt needs at least one user message")
    for i, message in enumerate(messages):
        if message.get("role") not in _ROLES or not isinstance(message.get("content"), str):
            raise ValueError(
                f"message {i} needs a role of {sorted(_ROLES)} and text content, got {message!r}"
            )
    wanted = [{"role": m["role"], "content": m["content"]} for m in messages]
    if to_messages(wanted[0]["content"]) == wanted:
        return wanted[0]["content"]
    text = "\n\n".join(f"{_ROLES[m['role']]}: {m['content']}" for m in wanted)
    if to_messages(text) != wanted:
        raise ValueError(
            "messages cannot be written as text and read back: a content holds a role label such as 'User: ' "
            f"after a blank line, in {messages!r}; drop it"
        )
    return text


def is_text(value: object) -> bool:
    """Tell whether a value is a text that can be tokenised.

    Half a surrogate pair ("\\ud83d", what is left of an emoji that was cut in two) is legal in JSON and in
    Python, but UTF-8 cannot hold it.
    """
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Put `place`, such as the row of the data, in front of any ValueError raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def rows_of(rows: Any) -> list[Any]:
    """Return rows as a list, from a list of dicts, a `datasets.Dataset` or a dict of columns (its slice)."""
    if isinstance(rows, Mapping):
        lengths = {name: len(values) for name, values in rows.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"columns differ in length: {lengths}")
        rows = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    if not len(rows):
        raise ValueError("there are no rows: give dicts, a datasets.Dataset or a dict of columns")
    return list(rows)


def require_columns(prompts: Sequence[str], columns: Columns) -> None:
    """Check that prompts are texts and that every column holds one entry per prompt.

    Raises:
        ValueError: Names the prompt or the column.
    """
    if isinstance(prompts, str) or not len(prompts):
        raise ValueError(f"prompts must be a list of at least one text, got {prompts!r}")
    for row, prompt in enumerate(prompts):
        if not is_text(prompt) or not prompt.strip():
            raise ValueError(
                f"prompts[{row}] must be a text that is not empty and holds no half emoji, got {prompt!r}"
            )
    for name, values in columns.items():
        if isinstance(values, str) or len(values) != len(prompts):
            raise ValueError(
                f"column {name!r} must hold one entry for each of {len(prompts)} prompts, got {len(values)}"
            )


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Tokenise a prompt up to the point where the assistant's answer starts.

    With a chat template: the template over `to_messages(prompt)`, with the generation prompt. Without one:
    the raw text, closed by a newline unless it ends in white space, after the opening token (BOS or CLS) that
    the tokenizer puts before every text, if it does.

    Raises:
        ValueError: The prompt is not a text (`is_text`), or the chat template refuses its roles.
    """
    if not tokenizer.chat_template:
        text = prompt if prompt[-1:].isspace() else prompt + "\n"
        return opening_ids(tokenizer) + _plain_ids(tokenizer, text)
    messages = to_messages(prompt)
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a foreign program: what it raises differs by template
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"the chat template refuses a prompt with the roles {roles} ({error}): {prompt[:60]!r}; remove "
            "or merge these turns, for instance by writing a system message into the first user turn"
        ) from error
    return _ids(tokenizer, text)


def encode_response(tokenizer: Any, response: str, *, eos: bool = True) -> list[int]:
    """Tokenise a response, then close it with `end_id`.

    Special tokens written out in the text stay plain characters: a response cannot end itself. Some
    tokenizers (SentencePiece) put a space before every text that they are given; a response follows a prompt,
    so it is encoded behind an anchor, which is then cut off.
    """
    ids = _plain_ids(tokenizer, response)
    for anchor, anchor_ids in _anchors(tokenizer).items():
        behind = _plain_ids(tokenizer, anchor + response)
        if behind[: len(anchor_ids)] == anchor_ids:  # else the response begins with what the anchor absorbs
            ids = behind[len(anchor_ids) :]
            break
    return [*ids, end_id(tokenizer)] if eos else ids


def decode_responses(tokenizer: Any, responses: Sequence[Sequence[int]]) -> list[str]:
    """Turn ids of responses back into texts without special tokens; the inverse of `encode_response`."""
    anchor = next(iter(_anchors(tokenizer).values()), [])
    rows = [anchor, *([*anchor, *ids] for ids in responses)]
    opening, *texts = tokenizer.batch_decode(
        rows, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return [text[len(opening) :] for text in texts]


def encode_answers(
    tokenizer: Any, prompt: str, responses: Sequence[str], *, max_length: int | None = None
) -> tuple[list[int], list[list[int]]]:
    """Tokenise a prompt once for all the responses that are compared as answers to it.

    With `max_length`, the prompt and the longest response together are at most so many tokens. A prompt that
    is too long loses its beginning (its end is what the response answers; an opening BOS or CLS stays). Only
    a response that fills `max_length` alone loses its end, EOS first, and one prompt token stays. If each
    answer had a cut of its own, the longer one would be scored without its context: log Z(x) of DPO and the
    offset of Bradley-Terry cancel only between answers to the same x.

    Returns:
        The prompt's ids, and the ids of each response.

    Raises:
        ValueError: Nothing of the prompt or of a response would be left.
    """
    prompt_ids = encode_prompt(tokenizer, prompt)
    answers = [encode_response(tokenizer, response) for response in responses]
    longest = max(map(len, answers))
    if max_length is not None and len(prompt_ids) + longest > max_length:
        opening = opening_ids(tokenizer)
        opening = opening if prompt_ids[: len(opening)] == opening else []
        most = max(max_length - len(opening) - 1, 0)
        answers = [ids[:most] for ids in answers]
        body = prompt_ids[len(opening) :]
        room = max_length - len(opening) - min(longest, most)
        prompt_ids = opening + body[max(len(body) - room, 0) :]
    if not prompt_ids or not all(answers):
        empty = responses[answers.index([])] if prompt_ids else prompt
        raise ValueError(
            f"no token of the {'response' if prompt_ids else 'prompt'} is left with max_length={max_length}: "
            f"{empty[:60]!r}"
        )
    return prompt_ids, answers


def encode_pair(
    tokenizer: Any, prompt: str, response: str, *, max_length: int | None = None
) -> tuple[list[int], list[int]]:
    """Tokenise a prompt and its one response, as `encode_answers` does."""
    prompt_ids, answers = encode_answers(tokenizer, prompt, [response], max_length=max_length)
    return prompt_ids, answers[0]


def require_distinct(answers: Sequence[Sequence[int]], max_length: int | None) -> None:
    """Refuse answers to be compared that are the same tokens: they would train with no gradient at all."""
    if len(set(map(tuple, answers))) < len(answers):
        raise ValueError(
            f"two answers are the same tokens (max_length={max_length}), so nothing is preferred: raise "
            "max_length or drop the row"
        )


def warn_of_lost_ends(tokenizer: Any, sequences: Iterable[Sequence[int]], max_length: int | None) -> None:
    """Log how many token sequences lost their end to `max_length`: from them no model learns to stop."""
    cut = [ids[-1] != end_id(tokenizer) for ids in sequences]
    if any(cut):
        logger.warning(
            "%d of %d answers lost their end at max_length=%s, and no model learns from them where to stop",
            sum(cut),
            len(cut),
            max_length,
        )


def end_id(tokenizer: Any) -> int:
    """Return the id that ends a response.

    With a chat template, the first special token that it writes after an assistant turn: Gemma's
    <end_of_turn> and Phi-3's <|end|> are not the tokenizer's EOS. Otherwise EOS, or SEP where there is none.

    Raises:
        ValueError: The tokenizer has none of them.
    """
    eos = tokenizer.eos_token_id
    closing = _turn_end(tokenizer, str(getattr(tokenizer, "chat_template", None) or ""), eos)
    found = next((i for i in (closing, eos, tokenizer.sep_token_id) if i is not None), None)
    if found is None:
        raise ValueError(
            f"{type(tokenizer).__name__} of {tokenizer.name_or_path!r} has no EOS and no SEP token, so no "
            "response could end: set tokenizer.eos_token"
        )
    return found


@functools.lru_cache(maxsize=32)
def _turn_end(tokenizer: Any, template: str, eos_id: int | None) -> int | None:
    """The first special token after an assistant turn; template and EOS are arguments to renew the cache."""
    if not template:
        return None
    answer = "answer"
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    try:
        _, written, after = tokenizer.apply_chat_template(messages, tokenize=False).rpartition(answer)
    except Exception:  # a foreign program again: what it does not write, it does not close
        return None
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return next((i for i in _ids(tokenizer, after) if i in special), None) if written else None


def opening_ids(tokenizer: Any) -> list[int]:
    """Return [BOS] or [CLS] if the tokenizer opens every text with it, else []."""
    first = tokenizer("a", verbose=False)["input_ids"][:1]
    return first if first and first[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id) else []


@functools.lru_cache(maxsize=32)
def _anchors(tokenizer: Any) -> dict[str, list[int]]:
    """Texts to encode a response behind, with their ids; none if the tokenizer adds no space to a text."""
    ids = {anchor: _plain_ids(tokenizer, anchor) for anchor in ("\n", "a")}
    tail = _plain_ids(tokenizer, "\na")[len(ids["\n"]) :]
    adds = tail != ids["a"] and _plain_ids(tokenizer, "\na") == ids["\n"] + tail
    return ids if adds else {}


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    return _ids(tokenizer, text, split_special_tokens=True)


def _ids(tokenizer: Any, text: str, **options: bool) -> list[int]:
    if not is_text(text):
        raise ValueError(f"{text[:60]!r} holds half a surrogate pair (a cut emoji): remove it")
    return tokenizer(text, add_special_tokens=False, verbose=False, **options)["input_ids"]

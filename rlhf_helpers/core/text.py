"""The one text form: how a prompt and a response become token ids, everywhere in this package.

A prompt is plain text: either what one user says, or a conversation in the flat form

    User: a\\n\\nAssistant: b\\n\\nUser: c

A response is the assistant's next turn. Prompt and response are tokenised separately and concatenated, so
sampling, supervised training, rewards and preference losses see the same ids for the same text; tokenised
together, a merge across the seam would give ids that the policy never sampled.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, str]
Columns = Mapping[str, Sequence[Any]]  # further columns of a data set of prompts: name -> one entry a prompt

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
            "messages cannot be written as text and read back: a content holds a role label "
            f"({', '.join(f'{label}: ' for label in _LABELS)}) after a blank line, in {messages!r}; drop it"
        )
    return text


def require_columns(prompts: Sequence[str], columns: Columns) -> None:
    """Refuse prompts that are no texts, and columns that do not hold one entry a prompt.

    Raises ValueError that names the prompt or the column.
    """
    if isinstance(prompts, str) or not len(prompts):
        raise ValueError(f"prompts must be a list of at least one text, got {prompts!r}")
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"prompts[{row}] must be a text that is not empty, got {prompt!r}")
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
    """
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(to_messages(prompt), tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    text = prompt if prompt[-1:].isspace() else prompt + "\n"
    return opening_ids(tokenizer) + _plain_ids(tokenizer, text)


def encode_response(tokenizer: Any, response: str, *, eos: bool = True) -> list[int]:
    """Tokenise a response, then close it with the end token (SEP for BERT shapes).

    Special tokens written out in the text stay plain characters: a response cannot end itself.
    """
    ids = _plain_ids(tokenizer, response)
    return [*ids, end_id(tokenizer)] if eos else ids


def encode_pair(
    tokenizer: Any, prompt: str, response: str, *, max_length: int | None = None, eos: bool = True
) -> tuple[list[int], list[int]]:
    """Tokenise a prompt and its response; together they are at most `max_length` tokens.

    A prompt that is too long loses its beginning (its end is what the response answers; an opening BOS or CLS
    stays). Only if the response alone fills `max_length` does it lose its end, EOS first, and one prompt
    token stays. Raises ValueError where nothing of the prompt or nothing of the response would be left.
    """
    prompt_ids = encode_prompt(tokenizer, prompt)
    response_ids = encode_response(tokenizer, response, eos=eos)
    if max_length is not None and len(prompt_ids) + len(response_ids) > max_length:
        opening = opening_ids(tokenizer)
        opening = opening if prompt_ids[: len(opening)] == opening else []
        response_ids = response_ids[: max(max_length - len(opening) - 1, 0)]
        room = max(max_length - len(opening) - len(response_ids), 0)
        body = prompt_ids[len(opening) :]
        prompt_ids = opening + body[len(body) - min(room, len(body)) :]
    if not prompt_ids or not response_ids:
        empty = "response" if prompt_ids else "prompt"
        raise ValueError(
            f"no token of the {empty} is left with max_length={max_length}: prompt {prompt[:60]!r}, "
            f"response {response[:60]!r}"
        )
    return prompt_ids, response_ids


def end_id(tokenizer: Any) -> int:
    """Return the id that ends a response: EOS, or SEP where there is none.

    Raises ValueError where the tokenizer has neither.
    """
    ids = (tokenizer.eos_token_id, tokenizer.sep_token_id)
    found = next((i for i in ids if i is not None), None)
    if found is None:
        raise ValueError(
            f"{type(tokenizer).__name__} of {tokenizer.name_or_path!r} has no EOS and no SEP token, so no "
            "response could end: set tokenizer.eos_token"
        )
    return found


def opening_ids(tokenizer: Any) -> list[int]:
    """Return [BOS] or [CLS] if the tokenizer opens every text with it, else []."""
    first = tokenizer("a", verbose=False)["input_ids"][:1]
    return first if first and first[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id) else []


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]

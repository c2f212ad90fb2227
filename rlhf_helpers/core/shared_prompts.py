"""Score answers: what several texts begin with is read once, and only answer tokens get logits.

Answers to one prompt share it. One row of a forward pass holds them all, and the space that is left in a row
goes to further prompts with their answers:

    tokens       prompt      answer             answer             next prompt   ...   padding
    positions    0 ... P-1   P ...              P ...              0 ...
    sees         itself      prompt and itself  prompt and itself  itself

Every token has the position and the context that it would have in a row of its own, so its logits are the
same up to rounding, and so are the gradients. A block mask says who sees whom. A model that is not known to
take one (`takes_block_mask`) gets one row per answer instead, by the same code.

All calls go through the forward of the model itself, one per call of a function here: with sharded weights
only that gathers them, and all processes must make equally many.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, pairwise, takewhile
from operator import eq
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from rlhf_helpers.core.models import require_cache, transformer_of
from rlhf_helpers.core.tensors import pad_right, token_entropies, token_logps

Pair = tuple[list[int], list[int]]  # token ids of a prompt, and of one answer to it

# Models whose logits under a block mask are tested to equal those of one row per answer. Others may number
# positions by themselves (ALiBi), look back over a window only, or drop the mask without an error.
BLOCK_MASK_MODELS = [
    "gpt2",
    "gpt_neox",
    "llama",
    "qwen2",
    "qwen3",
    "smollm3",
    "mistral",
    "gemma",
    "phi",
    "phi3",
    "olmo2",
    "granite",
    "opt",
    "stablelm",
]
ANSWERS_PER_PROMPT = 8  # attention costs the square of a row's length: then it is cheaper to read it again
ROW_LENGTH = 2  # of rows, in lengths of the longest prompt with its answers: little is left over as padding
TOKENS_PER_CHUNK = 256  # tokens whose distributions over the vocabulary exist at the same time


def takes_block_mask(model: nn.Module) -> bool:
    """Tell whether answers may share a row: a kind of model tested for it, with full attention."""
    config: Any = getattr(transformer_of(model), "config", None)
    return (
        getattr(config, "model_type", None) in BLOCK_MASK_MODELS
        and config._attn_implementation in ("sdpa", "eager")  # the flash kernels take no mask
        and getattr(config, "sliding_window", None) is None
    )


def pack(model: nn.Module, sequences: Sequence[list[int]]) -> tuple[dict[str, Tensor], list[list[int]]]:
    """Lay out token sequences for one forward pass, in as few tokens as possible.

    Returns:
        What the model is called with, and for each token of each sequence its place there, counted over all
        rows (row * L + column).
    """
    rows = _rows(sequences) if takes_block_mask(model) else [[index] for index in range(len(sequences))]
    tokens: list[list[int]] = []
    paths: list[tuple[int, list[int]]] = [(0, [])] * len(sequences)  # the row, and the column of each token
    for number, row in enumerate(rows):
        tokens.append([])
        path: list[int] = []
        for previous, index in pairwise([row[0], *row]):
            # What a sequence begins with like the one before it is there already: its path starts with that.
            common = min(_common(sequences[previous], sequences[index]), len(path))
            new, start = sequences[index][common:], len(tokens[number])
            path = [*path[:common], *range(start, start + len(new))]
            tokens[number] += new
            paths[index] = number, path
    like = next(model.parameters())
    ids, mask = pad_right(tokens, 0, device=like.device)  # nothing sees the padding: any valid id will do
    inputs, length = {"input_ids": ids, "attention_mask": mask}, ids.shape[1]
    if len(rows) < len(sequences):
        # Padding sees itself: over nothing at all a softmax would be NaN, which 0 weights do not stop.
        visible = torch.eye(length, dtype=torch.bool).repeat(len(rows), 1, 1)
        for number, path in paths:  # a token sees what comes before it in its own sequence
            columns = torch.tensor(path)
            visible[number, columns[:, None], columns] = torch.ones(len(path), len(path)).tril().bool()
        visible = visible.to(like.device)
        inputs["position_ids"] = visible.sum(-1) - 1
        # Numbers to be added to the scores: all attention but flash understands them.
        scores = torch.zeros_like(visible, dtype=like.dtype).masked_fill(
            ~visible, torch.finfo(like.dtype).min
        )
        inputs["attention_mask"] = scores[:, None]
    return inputs, [[number * length + column for column in path] for number, path in paths]


def _rows(sequences: Sequence[list[int]]) -> list[list[int]]:
    """Choose the rows; in each, sequences that begin alike follow each other."""
    groups: list[list[int]] = []
    lengths: list[int] = []
    # In alphabetical order, sequences that begin alike follow each other.
    for index in sorted(range(len(sequences)), key=sequences.__getitem__):
        length = len(sequences[index])
        common = _common(sequences[groups[-1][-1]], sequences[index]) if groups else 0
        # A short common beginning is not worth the longer row.
        if 4 * common < length or len(groups[-1]) == ANSWERS_PER_PROMPT:
            common = 0
            groups.append([])
            lengths.append(0)
        groups[-1].append(index)
        lengths[-1] += length - common
    count = math.ceil(sum(lengths) / (ROW_LENGTH * max(lengths)))
    rows: list[list[int]] = [[] for _ in range(count)]
    filled = [0] * count
    # The longest group first, each into the row that is the shortest so far (Graham 1969).
    for length, group in sorted(zip(lengths, groups, strict=True), reverse=True):
        shortest = filled.index(min(filled))
        rows[shortest] += group
        filled[shortest] += length
    return rows


def _common(first: list[int], second: list[int]) -> int:
    """Count the tokens that two sequences begin with alike."""
    return len([*takewhile(bool, map(eq, first, second))])


def answer_logits(
    model: nn.Module, sequences: Sequence[Pair]
) -> tuple[Float[Tensor, "N V"], Int[Tensor, "N"], Float[Tensor, "N d"]]:
    """Compute the logits that predict each token of the answers, in one forward pass; keeps gradients.

    For example, with the prompt [5, 6] and its answers [7, 8] and [9]:

        sequences                     [5, 6, 7, 8], [5, 6, 9]
        row (the prompt once)         5  6  7  8  9
        paths, positions in the row   [0, 1, 2, 3], [0, 1, 4]
        positions that predict        [1, 2],       [1]
        labels                        [7, 8],       [9]

    Returns:
        For the N tokens of all answers, one answer after the other: logits, already aligned (row i predicts
        label i), labels (the tokens themselves), and the hidden states that the logits are read from.
    """
    require_cache(model)
    # The sequences side by side in a few rows, and where each token of each sequence stands.
    inputs, paths = pack(model, [prompt + answer for prompt, answer in sequences])
    # The shift by one: the logits at a token predict the next token. So the first token of an answer is
    # predicted at the last token of its prompt, and its own last token predicts nothing.
    before = [path[len(prompt) - 1 : -1] for (prompt, _), path in zip(sequences, paths, strict=True)]
    positions = torch.tensor([*chain(*before)], device=inputs["input_ids"].device)
    labels = torch.tensor([*chain(*(answer for _, answer in sequences))], device=positions.device)
    with logits_only_at(model, positions) as states:  # all the others would be most of the memory
        logits = model(**inputs, use_cache=False).logits[0]
    return logits, labels, states[0]


@contextmanager
def logits_only_at(model: nn.Module, positions: Int[Tensor, "N"]) -> Iterator[list[Tensor]]:
    """Compute the logits of these positions alone within the block: those of all would be most of the memory.

    The model itself is called within: with sharded weights only its own forward gathers those of the head.

    Args:
        positions: counted over all rows (row * L + column); the model then returns logits (1, N, V).

    Yields:
        A list, to which each forward call adds the states (N, d) that the head reads.
    """
    states = []

    def select(_head: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        # The answers to a prompt read its last state. index_select adds their gradients up in a fixed order;
        # that of states[positions] depends on the threads, and training would not repeat bit for bit.
        states.append(args[0].flatten(0, 1).index_select(0, positions))
        return (states[-1][None],)

    head: Any = (transformer_of(model) or model).get_output_embeddings()  # pyright: ignore[reportCallIssue]
    handle = head.register_forward_pre_hook(select)
    try:
        yield states
    finally:
        handle.remove()


def in_chunks(
    read: Callable[..., Tensor], logits: Float[Tensor, "N V"], labels: Int[Tensor, "N"]
) -> Float[Tensor, "N ..."]:
    """Return read(logits, labels), computed for a few tokens at a time, and anew in the backward pass.

    So no float32 copy of all logits exists, which would be most of the memory.
    """
    chunks = zip(logits.split(TOKENS_PER_CHUNK), labels.split(TOKENS_PER_CHUNK), strict=True)
    return torch.cat([checkpoint(read, *chunk, use_reentrant=False) for chunk in chunks])


def answer_outputs(
    model: nn.Module,
    pairs: Sequence[Pair],
    *,
    temperature: float = 1.0,
    entropies: bool = False,
    entropy_gradient: bool = False,
    value_head: nn.Module | None = None,
) -> list[Float[Tensor, "B T"]]:
    """Compute the log-prob of each answer token, and if asked for entropy and value: (B, T), 0 on padding.

    Args:
        pairs: token ids of prompt and answer, B of them in any order; T is the length of the longest answer.
        temperature: of the distributions; log-probs and entropies in nats.
        entropies: whether to compute them.
        entropy_gradient: whether the loss contains the entropies; else they have no gradient.
        value_head: states (N, d) -> (N,); the value of y_t has seen the prompt and y_<t.

    Returns:
        [logps], then entropies and values if they are asked for.
    """

    def read(logits: Float[Tensor, "n V"], labels: Int[Tensor, "n"]) -> Float[Tensor, "n k"]:
        columns = [token_logps(logits, labels, temperature=temperature)]
        if entropies:
            with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
                columns.append(token_entropies(logits, torch.ones_like(labels), temperature=temperature))
        return torch.stack(columns, -1)

    logits, labels, states = answer_logits(model, pairs)
    columns = [*in_chunks(read, logits, labels).unbind(-1)]
    if value_head is not None:
        columns.append(value_head(states).float())
    lengths = [len(answer) for _, answer in pairs]
    return [pad_sequence([*column.split(lengths)], batch_first=True) for column in columns]

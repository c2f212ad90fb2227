"""Score answers: a prompt is read once for all its answers, and only answer tokens get logits.

One row of a forward pass holds a prompt and the answers to it, which do not see each other. What space is
left in a row goes to further prompts with their answers:

    tokens       prompt      answer             answer             next prompt   ...   padding
    part         0           1                  2                  9                   -1
    positions    0 ... P-1   P ...              P ...              0 ...
    sees         itself      prompt and itself  prompt and itself  itself

Every answer token has the position and the context that it would have in a row of its own, so its logits are
the same up to rounding, and so are the gradients. A block mask says who sees whom. A model that is not known
to take one (`takes_block_mask`) gets one row per answer instead, by the same code.

All calls go through the forward of the model itself: with sharded weights only that gathers them.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, takewhile
from operator import eq

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf_helpers.core.models import require_cache, transformer_of
from rlhf_helpers.core.tensors import pad_right, token_entropies, token_logps

Pair = tuple[list[int], list[int]]  # token ids of a prompt, and of one answer to it

# Models whose logits under a block mask are tested to equal those of one row per answer. Others may number
# positions by themselves (ALiBi), look back over a window only, or drop the mask without an error.
BLOCK_MASK_MODELS = [
    "gemma",
    "gpt2",
    "gpt_neox",
    "granite",
    "llama",
    "mistral",
    "olmo2",
    "opt",
    "phi",
    "phi3",
]
BLOCK_MASK_MODELS += ["qwen2", "qwen3", "smollm3", "stablelm"]
ANSWERS_PER_PROMPT = 8  # attention costs the square of a row's length: then it is cheaper to read it again
EQUAL_COST_LENGTH = 768  # 6 x width of the states: of the tiny model; larger models can fill longer rows
PARTS = (
    ANSWERS_PER_PROMPT + 1
)  # part numbers of a prompt and its answers: 0, 1, ..., of the next one 9, 10, ...
TOKENS_PER_CHUNK = 256  # tokens whose distributions over the vocabulary exist at the same time


@dataclass(frozen=True)
class PackedAnswers:
    """The answers of one forward pass: n of them, with N tokens in all.

    inputs: what the model is called with.
    answers: the index of each answer in the list that was packed; all that follows is in this order.
    lengths: tokens of each answer.
    labels: the answer tokens, (N,).
    before: the place that predicts each of them, counted over all rows (row * L + column), (N,).
    ends: the place of the last token of each answer, (n,).
    """

    inputs: dict[str, Tensor]
    answers: list[int]
    lengths: list[int]
    labels: Int[Tensor, "N"]
    before: Int[Tensor, "N"]
    ends: Int[Tensor, "n"]


def takes_block_mask(model: nn.Module) -> bool:
    """Tell whether answers may share a row: a kind of model tested for it, with full attention."""
    config = getattr(transformer_of(model), "config", None)
    return (
        getattr(config, "model_type", None) in BLOCK_MASK_MODELS
        and config._attn_implementation in ("sdpa", "eager")  # the flash kernels take no mask
        and getattr(config, "sliding_window", None) is None
    )


def pack_answers(
    model: nn.Module, pairs: Sequence[Pair], *, answers_per_forward: int | None = None
) -> Iterator[PackedAnswers]:
    """Lay out answers for as few tokens as possible; yield one batch per forward pass of `model`.

    Args:
        answers_per_forward: None: all answers in one pass. The number of passes depends on the number of
            answers alone, so processes with equally many make equally many passes, as sharded weights ask.
    """
    shared = takes_block_mask(model)
    order = [*chain(*_groups(pairs, range(len(pairs)), shared))]
    size = answers_per_forward or len(order)
    for start in range(0, len(order), size):
        groups = _groups(pairs, order[start : start + size], shared)
        rows = _filled_rows(pairs, groups) if shared else [[group] for group in groups]
        yield _packed(pairs, rows, like=next(model.parameters()))


def _groups(pairs: Sequence[Pair], indices: Iterable[int], shared: bool) -> list[list[int]]:
    """Put answers to one prompt together; the shortest groups come first."""
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for index in indices:
        by_prompt.setdefault(tuple(pairs[index][0]), []).append(index)
    most = ANSWERS_PER_PROMPT if shared else 1
    groups = [same[i : i + most] for same in by_prompt.values() for i in range(0, len(same), most)]
    return sorted(groups, key=lambda group: _length(pairs, group))


def _length(pairs: Sequence[Pair], group: list[int]) -> int:
    return len(pairs[group[0]][0]) + sum(len(pairs[index][1]) for index in group)


def _filled_rows(pairs: Sequence[Pair], groups: list[list[int]]) -> list[list[list[int]]]:
    """Spread groups over the number of rows at which the work is least: little padding, and no long rows.

    The longest group first, each into the row that is the shortest so far (Graham 1969).
    """
    lengths = [_length(pairs, group) for group in groups]
    # Rows between the length of the longest group and twice that, or a row for each group.
    widths = [max(lengths) * (1 + eighths / 8) for eighths in range(9)]
    cheapest, least = [], math.inf
    for count in {len(groups), *(math.ceil(sum(lengths) / width) for width in widths)}:
        rows: list[list[list[int]]] = [[] for _ in range(count)]
        filled = [0] * count
        for group, length in zip(reversed(groups), reversed(lengths), strict=True):
            shortest = filled.index(min(filled))
            rows[shortest].append(group)
            filled[shortest] += length
        # The weights cost each place the same, attention as much again at EQUAL_COST_LENGTH.
        cost = count * max(filled) * (EQUAL_COST_LENGTH + max(filled))
        if cost < least:
            cheapest, least = rows, cost
    return cheapest


def _packed(pairs: Sequence[Pair], rows: list[list[list[int]]], *, like: Tensor) -> PackedAnswers:
    """Write the rows as tensors; see the picture at the top of the module."""
    tokens, parts, prompt_ends = [], [], []
    part = 0
    for line, row in enumerate(rows):
        tokens.append([])
        parts.append([])
        for group in row:
            prompt = pairs[group[0]][0]
            tokens[line] += prompt
            parts[line] += [part] * len(prompt)
            prompt_ends += [(line, len(tokens[line]) - 1)] * len(group)
            for number, index in enumerate(group, 1):
                tokens[line] += pairs[index][1]
                parts[line] += [part + number] * len(pairs[index][1])
            part += PARTS
    ids, mask = pad_right(tokens, 0, device=like.device)  # nothing sees the padding: any valid id will do
    part_of, _ = pad_right(parts, -1, device=like.device)
    order = [*chain(*chain(*rows))]
    inputs = {"input_ids": ids, "attention_mask": mask}
    if len(order) > len(rows):
        # A token sees what comes before it in its own part, and an answer sees its prompt too.
        asks, asked = part_of[:, :, None], part_of[:, None, :]
        visible = ((asks == asked) | (asks // PARTS * PARTS == asked)).tril()
        inputs["position_ids"] = visible.sum(-1) - 1
        # Numbers to be added to the scores: all attention but flash understands them.
        scores = torch.zeros_like(visible, dtype=like.dtype).masked_fill(
            ~visible, torch.finfo(like.dtype).min
        )
        inputs["attention_mask"] = scores[:, None]
    lengths = torch.tensor([len(pairs[index][1]) for index in order], device=like.device)
    places, ends = (part_of % PARTS * mask).flatten().nonzero().flatten(), lengths.cumsum(0)
    # A token is predicted one place before it; the first of an answer, at the end of the prompt.
    before = places - 1
    line, column = torch.tensor(prompt_ends, device=like.device).T
    before[ends - lengths] = line * ids.shape[1] + column
    return PackedAnswers(inputs, order, lengths.tolist(), ids.flatten()[places], before, places[ends - 1])


def outputs_at(
    model: nn.Module, inputs: dict[str, Tensor], places: Int[Tensor, "*N"], *, logits: bool = True
) -> tuple[Float[Tensor, "*N V"] | None, Float[Tensor, "*N d"]]:
    """Compute logits and last hidden states at some places (row * L + column) alone; keeps gradients.

    The logits of all tokens would be most of the memory. So the head is handed only the states at these
    places, which are also what a value head reads.
    """
    require_cache(model)
    kept = []

    def select(_head: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        kept.append(args[0].flatten(0, 1)[places])
        # Without logits the head still runs, on one state: it is part of the model's forward.
        return ((kept[0] if logits else kept[0][:1])[None],)

    head = (transformer_of(model) or model).get_output_embeddings()
    handle = head.register_forward_pre_hook(select)
    try:
        found = model(**inputs, use_cache=False).logits[0]
    finally:
        handle.remove()
    return found if logits else None, kept[0]


def answer_outputs(
    model: nn.Module,
    pairs: Sequence[Pair],
    *,
    temperature: float = 1.0,
    logps: bool = True,
    entropies: bool = False,
    entropy_gradient: bool = False,
    value_head: nn.Module | None = None,
    answers_per_forward: int | None = None,
) -> list[Float[Tensor, "B T"]]:
    """Compute what is asked for of each answer token: log-prob, entropy, value; (B, T) each, 0 on padding.

    Args:
        pairs: token ids of prompt and answer, B of them in any order; T is the length of the longest answer.
        temperature: of the distributions; logps and entropies in nats.
        logps, entropies: which to return; entropies come with the logps.
        entropy_gradient: whether the loss contains the entropies; else they have no gradient.
        value_head: states (N, d) -> (N,); the value of y_t has seen the prompt and y_<t.
        answers_per_forward: see `pack_answers`.

    Returns:
        Those of [logps, entropies, values] that are asked for.
    """

    def read(logits: Float[Tensor, "1 N V"], labels: Int[Tensor, "1 N"]) -> list[Float[Tensor, "1 N"]]:
        found = [token_logps(logits, labels, temperature=temperature)]
        if entropies:
            with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
                found.append(token_entropies(logits, torch.ones_like(labels), temperature=temperature))
        return found

    by_answer: dict[int, tuple[Tensor, ...]] = {}
    for packed in pack_answers(model, pairs, answers_per_forward=answers_per_forward):
        logits, states = outputs_at(model, packed.inputs, packed.before, logits=logps)
        columns = []
        if logits is not None:
            # In chunks that are computed anew in the backward pass: no float32 copy of all logits exists.
            chunks = (x[None].split(TOKENS_PER_CHUNK, 1) for x in (logits, packed.labels))
            parts = [checkpoint(read, *chunk, use_reentrant=False) for chunk in zip(*chunks, strict=True)]
            columns = [torch.cat(column, 1)[0] for column in zip(*parts, strict=True)]
        if value_head is not None:
            columns.append(value_head(states).float())
        pieces = (column.split(packed.lengths) for column in columns)
        by_answer |= zip(packed.answers, zip(*pieces, strict=True), strict=True)
    lengths = torch.tensor([len(answer) for _, answer in pairs], device=states.device)
    mask = torch.arange(int(lengths.max()), device=states.device) < lengths[:, None]
    flat = (torch.cat(column) for column in zip(*(by_answer[i] for i in range(len(pairs))), strict=True))
    return [x.new_zeros(mask.shape).masked_scatter(mask, x) for x in flat]


def split_prompts(sequences: Sequence[list[int]]) -> list[Pair]:
    """Cut token sequences into what several of them begin with and the rest: (prompt, answer) of each.

    Sequences share their beginning where it is at least half of each; at least one token is left as the
    answer. To a causal model it does not matter where the text of the prompt ends.
    """
    pairs: dict[int, Pair] = {}
    # In alphabetical order, sequences with a common beginning follow each other.
    rest = sorted(range(len(sequences)), key=sequences.__getitem__)
    while rest:
        first = sequences[rest[0]]
        shared, size = len(first) - 1, 1
        for index in rest[1:]:
            alike = takewhile(bool, map(eq, first[:shared], sequences[index][:-1]))
            common = len([*alike])
            if 2 * common < max(len(first), len(sequences[index])):
                break
            shared, size = common, size + 1
        pairs |= {index: (first[:shared], sequences[index][shared:]) for index in rest[:size]}
        rest = rest[size:]
    return [pairs[index] for index in range(len(sequences))]

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

All calls go through the forward of the model itself, one per call of a function here: with sharded weights
only that gathers them, and all processes must make equally many.
"""

import math
from collections.abc import Sequence
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
ROW_LENGTH = 2.5  # of rows, in lengths of the longest prompt with its answers: little is left over as padding
PARTS = (
    ANSWERS_PER_PROMPT + 1
)  # part numbers of a prompt and its answers: 0, 1, ..., of the next one 9, 10, ...
TOKENS_PER_CHUNK = 256  # tokens whose distributions over the vocabulary exist at the same time


@dataclass(frozen=True)
class PackedAnswers:
    """Answers laid out for one forward pass. A place counts over all rows: row * L + column.

    inputs: what the model is called with.
    before: the place that predicts each answer token, answer after answer as they were given, (N,).
    ends: the place of the last token of each answer, (B,).
    """

    inputs: dict[str, Tensor]
    before: Int[Tensor, "N"]
    ends: Int[Tensor, "B"]


def takes_block_mask(model: nn.Module) -> bool:
    """Tell whether answers may share a row: a kind of model tested for it, with full attention."""
    config = getattr(transformer_of(model), "config", None)
    return (
        getattr(config, "model_type", None) in BLOCK_MASK_MODELS
        and config._attn_implementation in ("sdpa", "eager")  # the flash kernels take no mask
        and getattr(config, "sliding_window", None) is None
    )


def pack_answers(model: nn.Module, pairs: Sequence[Pair]) -> PackedAnswers:
    """Lay out answers for as few tokens as possible; see the picture at the top of the module."""
    rows = _rows_of(pairs, shared=takes_block_mask(model))
    length = max(sum(_length(pairs, group) for group in row) for row in rows)
    tokens, parts = [[] for _ in rows], [[] for _ in rows]
    before, ends, part = [[]] * len(pairs), [0] * len(pairs), 0
    for line, row in enumerate(rows):
        for group in row:
            prompt = pairs[group[0]][0]
            tokens[line] += prompt
            parts[line] += [part] * len(prompt)
            prompt_end = line * length + len(tokens[line]) - 1
            for number, index in enumerate(group, 1):
                answer, first = pairs[index][1], line * length + len(tokens[line])
                tokens[line] += answer
                parts[line] += [part + number] * len(answer)
                ends[index] = first + len(answer) - 1
                # A token is predicted one place before it; the first of an answer, at the end of the prompt.
                before[index] = [prompt_end, *range(first, ends[index])]
            part += PARTS
    like = next(model.parameters())
    ids, mask = pad_right(tokens, 0, device=like.device)  # nothing sees the padding: any valid id will do
    inputs = {"input_ids": ids, "attention_mask": mask}
    if len(pairs) > len(rows):
        # A token sees what comes before it in its own part, and an answer sees its prompt too.
        seen = pad_right(parts, -1, device=like.device)[0][:, None, :]
        own = seen.mT
        visible = ((own == seen) | (own // PARTS * PARTS == seen)).tril()
        inputs["position_ids"] = visible.sum(-1) - 1
        # Numbers to be added to the scores: all attention but flash understands them.
        scores = torch.zeros_like(visible, dtype=like.dtype).masked_fill(
            ~visible, torch.finfo(like.dtype).min
        )
        inputs["attention_mask"] = scores[:, None]
    places = (torch.tensor(numbers, device=like.device) for numbers in ([*chain(*before)], ends))
    return PackedAnswers(inputs, *places)


def _length(pairs: Sequence[Pair], group: list[int]) -> int:
    return len(pairs[group[0]][0]) + sum(len(pairs[index][1]) for index in group)


def _rows_of(pairs: Sequence[Pair], *, shared: bool) -> list[list[list[int]]]:
    """Choose the rows, each a list of groups of answers to one prompt."""
    if not shared:
        return [[[index]] for index in range(len(pairs))]
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for index, (prompt, _) in enumerate(pairs):
        by_prompt.setdefault(tuple(prompt), []).append(index)
    most = ANSWERS_PER_PROMPT
    groups = [same[i : i + most] for same in by_prompt.values() for i in range(0, len(same), most)]
    groups.sort(key=lambda group: -_length(pairs, group))
    lengths = [_length(pairs, group) for group in groups]
    count = math.ceil(sum(lengths) / (ROW_LENGTH * lengths[0]))
    rows: list[list[list[int]]] = [[] for _ in range(count)]
    filled = [0] * count
    # The longest group first, each into the row that is the shortest so far (Graham 1969).
    for group, length in zip(groups, lengths, strict=True):
        shortest = filled.index(min(filled))
        rows[shortest].append(group)
        filled[shortest] += length
    return rows


def outputs_at(
    model: nn.Module, inputs: dict[str, Tensor], places: Int[Tensor, "N"]
) -> tuple[Float[Tensor, "N V"], Float[Tensor, "N d"]]:
    """Compute logits and last hidden states at some places (row * L + column) alone; keeps gradients.

    The logits of all tokens would be most of the memory. So the head is handed only the states at these
    places, which are also what a value head reads.
    """
    require_cache(model)
    kept = []

    def select(_head: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        kept.append(args[0].flatten(0, 1)[places])
        return (kept[0][None],)

    head = (transformer_of(model) or model).get_output_embeddings()
    handle = head.register_forward_pre_hook(select)
    try:
        # Through the model's own forward: with sharded weights only that gathers those of the head.
        logits = model(**inputs, use_cache=False).logits[0]
    finally:
        handle.remove()
    return logits, kept[0]


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

    def read(logits: Float[Tensor, "1 N V"], labels: Int[Tensor, "1 N"]) -> list[Float[Tensor, "1 N"]]:
        found = [token_logps(logits, labels, temperature=temperature)]
        if entropies:
            with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
                found.append(token_entropies(logits, torch.ones_like(labels), temperature=temperature))
        return found

    packed = pack_answers(model, pairs)
    logits, states = outputs_at(model, packed.inputs, packed.before)
    labels = torch.tensor([*chain(*(answer for _, answer in pairs))], device=states.device)
    # In chunks that are computed anew in the backward pass: no float32 copy of all logits exists.
    chunks = (x[None].split(TOKENS_PER_CHUNK, 1) for x in (logits, labels))
    parts = [checkpoint(read, *chunk, use_reentrant=False) for chunk in zip(*chunks, strict=True)]
    columns = [torch.cat(column, 1)[0] for column in zip(*parts, strict=True)]
    if value_head is not None:
        columns.append(value_head(states).float())
    lengths = torch.tensor([len(answer) for _, answer in pairs], device=states.device)
    mask = torch.arange(int(lengths.max()), device=states.device) < lengths[:, None]
    return [column.new_zeros(mask.shape).masked_scatter(mask, column) for column in columns]


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

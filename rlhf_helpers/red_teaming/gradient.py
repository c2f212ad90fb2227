"""Suffixes found by gradients: text behind a request that makes a model begin with a chosen answer.

One suffix for all N requests (universal) minimises, over the V^T suffixes of T tokens,

    loss(suffix) = mean over requests of -log p(target | request + suffix),  in nats

"gcg" (greedy coordinate gradient, Zou et al. 2023), "autoprompt" (Shin et al. 2020) and "random" search
differ only in the swaps of one token that they try. Only text is scored: request + suffix, encoded as a
user's message. Letters: N requests, T suffix tokens, V vocabulary, M candidates, R target tokens.
"""

import copy
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rlhf_helpers.core.generation import encode_prompts, generate, sequence_logps, token_positions
from rlhf_helpers.core.models import tokenizer_for
from rlhf_helpers.core.tensors import pad_left, pad_right, require_number, require_shapes, token_logps
from rlhf_helpers.core.text import decode_responses, encode_prompt, encode_response, require_columns
from rlhf_helpers.core.training import progress

METHODS = ("gcg", "autoprompt", "random")
_ROWS = 256  # of one forward pass


@dataclass(frozen=True)
class SuffixAttack:
    """What an attack found, and what it cost.

    curve: (evaluations, lowest loss) so far, from the random suffix `start` on. evaluations: exact losses,
    each over all requests; gradients: backward passes, each about three of them, on top; filtered: candidates
    whose text encodes otherwise.
    """

    suffix: str
    start: str
    curve: list[tuple[int, float]]
    evaluations: int
    gradients: int
    filtered: int


@dataclass
class GradientBasedRedTeaming:
    """Search a suffix of `suffix_length` tokens by swapping one token at a time.

    A round computes the exact losses of up to `candidates` swaps and moves to the best, even if it is worse
    than before (as the paper does); the best suffix of all rounds is the result. Every method spends 1 +
    steps * candidates exact losses. "gcg" draws swaps of any position to one of its top_k tokens by
    `swap_scores`; "autoprompt" of one position per round, in turn, to its top_k; "random" any swap, without
    gradient. Candidates that do not survive re-encoding are replaced, if need be in further rounds. Lesson 3.
    Raises ValueError for a setting out of range.
    """

    model: nn.Module
    tokenizer: Any = None  # by default the model's
    _: KW_ONLY
    method: str = "gcg"
    suffix_length: int = 16
    steps: int = 30
    candidates: int = 64
    top_k: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        """Find the tokenizer and check the settings."""
        self.tokenizer = self.tokenizer or tokenizer_for(self.model)
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {self.method!r}")
        for name in ("suffix_length", "steps", "candidates", "top_k"):
            require_number(name, getattr(self, name), at_least=1)

    def attack(self, requests: Sequence[str], targets: Sequence[str]) -> SuffixAttack:
        """Search one suffix for all requests, each with its target; the model is only read.

        Raises ValueError for no request, other than one target each, an empty one, or too small a context.
        """
        task = _Task(self, requests, targets)
        suffix = task.start
        best = suffix
        loss = task.losses([suffix]).item()
        curve = [(1, loss)]
        spent = 1
        budget = 1 + self.steps * self.candidates
        with progress.watched(self.steps) as advance:
            while spent < budget and len(curve) <= budget:
                swapped = task.draw(suffix, len(curve) - 1, min(self.candidates, budget - spent))
                if swapped:
                    losses = task.losses(swapped)
                    suffix = swapped[losses.argmin()]
                    if losses.min() < loss:
                        best = suffix
                        loss = losses.min().item()
                spent += len(swapped)
                curve.append((spent, loss))
                progress.latest_samples = requests[:1], decode_responses(self.tokenizer, [best])
                advance(loss=loss)
        texts = decode_responses(self.tokenizer, [best, task.start])
        return SuffixAttack(*texts, curve, spent, task.gradients, task.filtered)


class _Task:
    """One attack: the requests as token ids around a suffix, and the cache of what lies before it."""

    @torch.no_grad()
    def __init__(
        self, search: GradientBasedRedTeaming, requests: Sequence[str], targets: Sequence[str]
    ) -> None:
        self.search = search
        self.model = search.model
        self.tokenizer = search.tokenizer
        self.requests = requests
        self.gradients = 0
        self.filtered = 0
        self.random = torch.Generator().manual_seed(search.seed)
        self.allowed = allowed_tokens(self.tokenizer, len(self.model.get_input_embeddings().weight))
        goals = _encode_targets(self.tokenizer, requests, targets)
        self.width = max(map(len, goals))
        self.start, self.cuts = self._first()
        self.tails = [after + goal for (_, after), goal in zip(self.cuts, goals, strict=True)]
        self.before, self.mask = pad_left(
            [before for before, _ in self.cuts], self.tokenizer.pad_token_id, device=self.model.device
        )
        self.cache = self.model(
            input_ids=self.before,
            attention_mask=self.mask,
            position_ids=token_positions(self.mask),
            use_cache=True,
            logits_to_keep=1,
        ).past_key_values

    def _first(self) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
        """Draw a suffix that survives re-encoding; return it and each request's ids before and after it."""
        size = self.search.suffix_length
        for _ in range(500):
            suffix = torch.multinomial(self.allowed.float(), size, True, generator=self.random).tolist()
            text = decode_responses(self.tokenizer, [suffix])[0]
            prompts = [request + text for request in self.requests]
            rows = encode_prompts(self.model, self.tokenizer, prompts, max_new_tokens=self.width)
            starts = [[i for i in range(len(row)) if row[i : i + size] == suffix] for row in rows]
            if all(starts):
                cuts = [(r[: at[-1]], r[at[-1] + size :]) for r, at in zip(rows, starts, strict=True)]
                return suffix, cuts
        raise ValueError(f"no text of {size} tokens in 500 survives re-encoding: lower suffix_length")

    def draw(self, suffix: list[int], turn: int, wanted: int) -> list[list[int]]:
        """Return up to `wanted` candidates of a round, whose text encodes to their ids in every request."""
        usable = self.allowed.repeat(len(suffix), 1)
        usable[range(len(suffix)), suffix] = False  # not a swap
        if self.search.method != "random":
            scores = self.scores(suffix).masked_fill(~usable, torch.inf)
            lowest = scores.topk(self.search.top_k, largest=False).indices
            usable &= torch.zeros_like(usable).scatter(1, lowest, True)
        if self.search.method == "autoprompt":
            usable &= torch.arange(len(suffix))[:, None] == turn % len(suffix)
        swaps = usable.nonzero()  # position, new token
        swaps = swaps[torch.randperm(len(swaps), generator=self.random)[: 8 * wanted]]
        rows = torch.tensor(suffix).repeat(len(swaps), 1)
        rows[torch.arange(len(swaps)), swaps[:, 0]] = swaps[:, 1]
        rows = rows.tolist()
        survivors = []
        for row, text in zip(rows, decode_responses(self.tokenizer, rows), strict=True):
            cuts = zip(self.requests, self.cuts, strict=True)
            if all(
                encode_prompt(self.tokenizer, r + text) == before + row + after for r, (before, after) in cuts
            ):
                survivors.append(row)
            else:
                self.filtered += 1
            if len(survivors) == wanted:
                break
        return survivors

    def _rows(self, suffixes: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Lay out M suffixes in N requests: ids from the suffix on (N * M, L'), masks of all (N * M, L)."""
        rows = [suffix + tail for tail in self.tails for suffix in suffixes]
        ids, mask = pad_right(rows, self.tokenizer.pad_token_id, device=self.model.device)
        return ids, torch.cat([self.mask.repeat_interleave(len(suffixes), 0), mask], 1)

    @torch.no_grad()
    def losses(self, suffixes: list[list[int]]) -> Float[Tensor, "M"]:
        """Compute the exact loss of each suffix."""
        parts = []
        size = max(_ROWS // len(self.requests), 1)
        for start in range(0, len(suffixes), size):
            part = suffixes[start : start + size]
            ids, mask = self._rows(part)
            cache = copy.deepcopy(self.cache)  # a forward pass writes into it
            cache.batch_repeat_interleave(len(part))
            logits = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=token_positions(mask)[:, -ids.shape[1] :],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=self.width + 1,
            ).logits
            losses = _target_loss(logits, ids, mask[:, -self.width :])
            parts.append(losses.view(-1, len(part)).mean(0))
        return torch.cat(parts).cpu()

    def scores(self, suffix: list[int]) -> Float[Tensor, "T V"]:
        """Compute the `swap_scores` of the suffix, by one backward pass."""
        self.gradients += 1
        ids, mask = self._rows([suffix])
        ids = torch.cat([self.before, ids], 1)
        start = self.before.shape[1]
        columns = slice(start, start + len(suffix))
        gradient = one_hot_gradient(self.model, ids, mask, mask[:, -self.width :].bool(), columns)
        return swap_scores(gradient, ids[0, columns]).cpu()


def one_hot_gradient(
    model: nn.Module,
    input_ids: Int[Tensor, "N L"],
    attention_mask: Int[Tensor, "N L"],
    target_mask: Bool[Tensor, "N R"],
    columns: slice,
) -> Float[Tensor, "T V"]:
    """Gradient of the loss with respect to the one-hot rows of the suffix, one for all N prompts.

    loss = mean_n -log p(target_n | prompt_n),  e_t = sum_v x[t, v] E[v],  gradient[t, v] = d loss / d x[t, v]

    x is real where ids are whole numbers: of an id no gradient can be asked. The last R columns are targets,
    `columns` the suffix. Zou et al. 2023, section 2.2. Lesson 3. Raises ValueError unless every row has the
    same suffix, of at least one token.
    """
    tokens = input_ids[0, columns]
    if not (len(tokens) and (input_ids[:, columns] == tokens).all()):
        raise ValueError(f"columns {columns} must hold the same suffix, of at least one token, in all rows")
    embed = model.get_input_embeddings()
    with torch.no_grad():  # the table as the model reads it, should it scale its embeddings
        table = embed(torch.arange(embed.weight.shape[0], device=input_ids.device))
        rows = embed(input_ids)
    one_hot = F.one_hot(tokens, len(table)).to(table.dtype).requires_grad_()
    suffix = (one_hot @ table).expand(len(rows), -1, -1)
    outputs = model(
        inputs_embeds=torch.cat([rows[:, : columns.start], suffix, rows[:, columns.stop :]], 1),
        attention_mask=attention_mask,
        position_ids=token_positions(attention_mask),
        use_cache=False,
        logits_to_keep=target_mask.shape[1] + 1,
    )
    loss = _target_loss(outputs.logits, input_ids, target_mask).mean()
    return torch.autograd.grad(loss, one_hot)[0].float()


def swap_scores(gradient: Float[Tensor, "T V"], tokens: Int[Tensor, "T"]) -> Float[Tensor, "T V"]:
    """First-order change of the loss when token t becomes v: lower is more promising, 0 for no swap.

    scores[t, v] = gradient[t, v] - gradient[t, tokens[t]]

    The first term of a Taylor series: it only proposes what exact losses decide. Ebrahimi et al. 2018.
    Lesson 3. Raises ValueError unless gradient is (T, V) and tokens (T,).
    """
    require_shapes("T V", gradient=gradient)
    require_shapes("T", tokens=tokens, first_column=gradient[:, 0])
    return gradient - gradient.gather(1, tokens[:, None])


def suffix_loss(
    model: nn.Module, tokenizer: Any, requests: Sequence[str], targets: Sequence[str], suffix: str
) -> Float[Tensor, "N"]:
    """-log p(target | request + suffix) of each request, in nats, for a suffix as text.

    The sum over the target's tokens, its end not among them: the answer may go on. Lesson 3.
    """
    with torch.no_grad():
        logps, mask = sequence_logps(model, tokenizer, [r + suffix for r in requests], targets)
    return -(logps.float() * F.pad(mask[:, 1:], (0, 1))).sum(-1).cpu()  # without the last token, EOS


def target_matches(
    model: nn.Module, tokenizer: Any, requests: Sequence[str], targets: Sequence[str], suffix: str
) -> list[bool]:
    """Whether the likeliest answer (greedy) to each request + suffix starts with its target. Lesson 3."""
    room = max(map(len, _encode_targets(tokenizer, requests, targets)))
    prompts = [request + suffix for request in requests]
    answers = generate(model, tokenizer, prompts, max_new_tokens=room, greedy=True).responses
    return [answer.startswith(target) for answer, target in zip(answers, targets, strict=True)]


def allowed_tokens(tokenizer: Any, size: int) -> Bool[Tensor, "V"]:
    """Mark the ids below `size` that a suffix may hold: printable text, no special token. Lesson 3."""
    texts = decode_responses(tokenizer, [[i] for i in range(min(size, len(tokenizer)))])
    fits = torch.tensor([bool(t.strip()) and t.isprintable() and "\ufffd" not in t for t in texts])
    return F.pad(fits, (0, size - len(fits)))


def _encode_targets(tokenizer: Any, requests: Sequence[str], targets: Sequence[str]) -> list[list[int]]:
    require_columns(requests, {"targets": targets})
    goals = [encode_response(tokenizer, target, eos=False) for target in targets]
    if not all(goals):
        raise ValueError(f"targets[{goals.index([])}] is empty: give the beginning of the wanted answer")
    return goals


def _target_loss(logits: Tensor, ids: Tensor, real: Tensor) -> Float[Tensor, "B"]:
    """-log p of the last R ids, where real (B, R), from the logits of the last R + 1 columns."""
    logps = token_logps(logits[:, :-1], ids[:, -real.shape[1] :])
    return -torch.where(real.bool(), logps, 0.0).sum(-1)

"""Suffixes found by gradients: text behind a request that makes a model begin with a chosen answer.

One suffix for all N requests (universal) minimises, over the V^T suffixes of T tokens,

    loss(suffix) = mean over requests of -log p(target | request + suffix),  in nats

"gcg" (greedy coordinate gradient, Zou et al. 2023), "autoprompt" (Shin et al. 2020) and "random" search
differ only in the swaps of one token that they try. Only text is scored: request + suffix, encoded as a
user's message. Letters: N requests, T suffix tokens, V vocabulary, M candidates, R target tokens.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rlhf_helpers.core.generation import generate, sequence_logps
from rlhf_helpers.core.models import tokenizer_for
from rlhf_helpers.core.tensors import pad_left, pad_right, require_number, require_shapes, token_logps
from rlhf_helpers.core.text import encode_prompt, encode_response, require_columns

METHODS = ("gcg", "autoprompt", "random")
_ROWS = 256  # of one forward pass


@dataclass(frozen=True)
class SuffixAttack:
    """What an attack found, and what it cost.

    curve: (evaluations, lowest loss) so far, from the random suffix `start` on. evaluations: exact losses,
    each over all requests; gradients: backward passes, each about three of them, on top; filtered: candidates
    whose text encodes otherwise; matched: whether the likeliest answer starts with the target.
    """

    method: str
    suffix: str
    start: str
    curve: list[tuple[int, float]]
    evaluations: int
    gradients: int
    filtered: int
    request_losses: list[float]
    matched: list[bool]


class GradientBasedRedTeaming:
    """Search a suffix of `suffix_length` tokens by swapping one token at a time.

    A round computes the exact losses of up to `candidates` swaps and moves to the best, be it worse than
    before (as the paper does); the best suffix of all rounds is the result. Every method spends 1 + steps *
    candidates exact losses. "gcg" draws swaps of any position to one of its top_k tokens by `swap_scores`;
    "autoprompt" of one position a round, in turn, to its top_k; "random" any swap, without gradient.
    Candidates that do not survive re-encoding are replaced, if need be in further rounds. Lesson 3.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        method: str = "gcg",
        suffix_length: int = 16,
        steps: int = 30,
        candidates: int = 64,
        top_k: int = 64,
        seed: int = 0,
    ) -> None:
        """Keep the settings; tokenizer: by default the model's. Raises ValueError for one out of range."""
        if method not in METHODS:
            raise ValueError(f"method={method!r} is unknown; choose from {METHODS}")
        sizes = {"suffix_length": suffix_length, "steps": steps, "candidates": candidates, "top_k": top_k}
        for name, value in sizes.items():
            require_number(name, value, at_least=1)
        self.model, self.tokenizer = model, tokenizer or tokenizer_for(model)
        self.method, self.seed = method, seed
        self.suffix_length, self.steps, self.candidates, self.top_k = sizes.values()

    def attack(self, requests: Sequence[str], targets: Sequence[str]) -> SuffixAttack:
        """Search one suffix for all requests, each with its target; the model is only read.

        Raises ValueError for no request, other than one target each, an empty one, or too small a context.
        """
        task = _Task(self, requests, targets)
        kept, tokens, dropped, budget = task.start, task.start, 0, 1 + self.steps * self.candidates
        curve = [(1, loss := task.losses([tokens]).item())]
        while curve[-1][0] < budget and len(curve) <= budget:
            found, failed = task.draw(tokens, len(curve) - 1, min(self.candidates, budget - curve[-1][0]))
            if found:
                losses = task.losses(found)
                tokens = found[losses.argmin()]
                kept, loss = (tokens, losses.min().item()) if losses.min() < loss else (kept, loss)
            dropped += failed
            curve.append((curve[-1][0] + len(found), loss))
        texts, gradients = _to_text(self.tokenizer, [kept, task.start]), task.gradients
        given = self.model, self.tokenizer, requests, targets, texts[0]
        each = suffix_loss(*given).tolist(), target_matches(*given)
        return SuffixAttack(self.method, *texts, curve, curve[-1][0], gradients, dropped, *each)


class _Task:
    """One attack: the requests as token ids around a suffix, and the cache of what lies before it."""

    @torch.no_grad()
    def __init__(self, search: GradientBasedRedTeaming, requests: list[str], targets: list[str]) -> None:
        self.search, self.requests, self.gradients = search, requests, 0
        self.model, self.tokenizer = search.model, search.tokenizer
        goals = _encode_targets(self.tokenizer, requests, targets)
        self.random = torch.Generator().manual_seed(search.seed)
        self.allowed = allowed_tokens(self.tokenizer, len(self.model.get_input_embeddings().weight))
        self.start, self.cuts = self._first(max(map(len, goals)))
        pad, self.device = self.tokenizer.pad_token_id, search.model.device
        self.before, self.mask = pad_left([before for before, _ in self.cuts], pad, device=self.device)
        self.goals, self.real = pad_right(goals, pad, device=self.device)
        self.after = torch.tensor([after for _, after in self.cuts], device=self.device).long()
        given = {"attention_mask": self.mask, "position_ids": _positions(self.mask), "use_cache": True}
        self.cache = self.model(input_ids=self.before, logits_to_keep=1, **given).past_key_values

    def _first(self, room: int) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
        """A random suffix that survives re-encoding, and each request's ids before and after it."""
        size, context = self.search.suffix_length, getattr(self.model.config, "max_position_embeddings", 1e9)
        for _ in range(500):
            tokens = torch.multinomial(self.allowed.float(), size, True, generator=self.random).tolist()
            text = _to_text(self.tokenizer, [tokens])[0]
            rows = [encode_prompt(self.tokenizer, request + text) for request in self.requests]
            if (longest := max(map(len, rows)) + room) > context:
                raise ValueError(f"request, suffix and target have {longest} tokens, the context {context}")
            places = [[i for i in range(len(row)) if row[i : i + size] == tokens] for row in rows]
            if all(places):
                return tokens, [(r[: at[-1]], r[at[-1] + size :]) for r, at in zip(rows, places, strict=True)]
        raise ValueError(f"no text of {size} tokens in 500 survives re-encoding: lower suffix_length")

    def draw(self, tokens: list[int], turn: int, wanted: int) -> tuple[list[list[int]], int]:
        """One round's first `wanted` candidates whose text encodes to their ids everywhere; those dropped."""
        usable = self.allowed.repeat(len(tokens), 1)
        usable[range(len(tokens)), tokens] = False  # no swap at all
        if self.search.method != "random":
            scores = self.scores(tokens).masked_fill(~usable, torch.inf)
            lowest = scores.topk(min(self.search.top_k, int(usable[0].sum())), largest=False).indices
            usable = torch.zeros_like(usable).scatter(1, lowest, True)
        if self.search.method == "autoprompt":
            usable &= torch.arange(len(tokens))[:, None] == turn % len(tokens)
        swaps = usable.nonzero()
        swaps = swaps[torch.randperm(len(swaps), generator=self.random)[: 8 * wanted]]
        rows, found, dropped = swap_candidates(tokens, swaps).tolist(), [], 0
        for row, text in zip(rows, _to_text(self.tokenizer, rows), strict=True):
            pairs = zip(self.requests, self.cuts, strict=True)
            same = all(encode_prompt(self.tokenizer, r + text) == [*b, *row, *a] for r, (b, a) in pairs)
            found, dropped = found + [row] * same, dropped + (not same)
            if len(found) == wanted:
                break
        return found, dropped

    def _rows(self, suffixes: Tensor) -> tuple[Tensor, Tensor]:
        """From the suffix on, ids (N * M, L'), and the mask of the whole prompts (N * M, L)."""
        parts = (self.mask, self.after, self.goals, self.real)
        before, after, goals, real = (x.repeat_interleave(len(suffixes), 0) for x in parts)
        ids = torch.cat([suffixes.repeat(len(self.requests), 1), after, goals], 1)
        return ids, torch.cat([before, torch.ones_like(ids[:, : -goals.shape[1]]), real], 1)

    @torch.no_grad()
    def losses(self, suffixes: list[list[int]]) -> Float[Tensor, "M"]:
        """Exact loss of each suffix."""
        width, parts = self.goals.shape[1], []
        for part in torch.tensor(suffixes, device=self.device).split(max(_ROWS // len(self.requests), 1)):
            ids, mask = self._rows(part)
            cache = copy.deepcopy(self.cache)  # a forward pass writes into it
            cache.batch_repeat_interleave(len(part))
            given = {"attention_mask": mask, "position_ids": _positions(mask)[:, -ids.shape[1] :]}
            given |= {"past_key_values": cache, "use_cache": True, "logits_to_keep": width + 1}
            losses = _target_loss(self.model(input_ids=ids, **given).logits, ids, mask[:, -width:])
            parts.append(losses.view(-1, len(part)).mean(0))
        return torch.cat(parts).cpu()

    def scores(self, tokens: list[int]) -> Float[Tensor, "T V"]:
        """`swap_scores` of the suffix, from one backward pass."""
        suffix, start = torch.tensor(tokens, device=self.device), self.before.shape[1]
        (ids, mask), self.gradients = self._rows(suffix[None]), self.gradients + 1
        given = torch.cat([self.before, ids], 1), mask, self.real.bool(), slice(start, start + len(tokens))
        return swap_scores(one_hot_gradient(self.model, *given), suffix).cpu()


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
    tokens, width = input_ids[0, columns], target_mask.shape[1]
    if not (len(tokens) and (input_ids[:, columns] == tokens).all()):
        raise ValueError(f"columns {columns} must hold the same suffix, of at least one token, in all rows")
    embed = model.get_input_embeddings()
    with torch.no_grad():  # the table as the model reads it, should it scale its embeddings
        table, rows = embed(torch.arange(embed.weight.shape[0], device=input_ids.device)), embed(input_ids)
    one_hot = F.one_hot(tokens, len(table)).to(table.dtype).requires_grad_()
    suffix = (one_hot @ table).expand(len(rows), -1, -1)
    outputs = model(
        inputs_embeds=torch.cat([rows[:, : columns.start], suffix, rows[:, columns.stop :]], 1),
        attention_mask=attention_mask,
        position_ids=_positions(attention_mask),
        use_cache=False,
        logits_to_keep=width + 1,
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


def swap_candidates(tokens: Sequence[int], swaps: Int[Tensor, "M 2"]) -> Int[Tensor, "M T"]:
    """Apply each swap (position, new token) to its own copy of the suffix. Lesson 3."""
    copies = torch.tensor(tokens).repeat(len(swaps), 1)
    copies[torch.arange(len(swaps)), swaps[:, 0]] = swaps[:, 1]
    return copies


def suffix_loss(
    model: nn.Module, tokenizer: Any, requests: Sequence[str], targets: Sequence[str], suffix: str
) -> Float[Tensor, "N"]:
    """-log p(target | request + suffix) of each request, in nats, for a suffix as text.

    The sum over the target's tokens, its end not among them: the answer may go on. Lesson 3.
    """
    _encode_targets(tokenizer, requests, targets)
    with torch.no_grad():
        logps, mask = sequence_logps(model, tokenizer, [r + suffix for r in requests], targets)
    return -(logps.float() * F.pad(mask[:, 1:], (0, 1))).sum(-1).cpu()  # without the last token, EOS


def target_matches(
    model: nn.Module, tokenizer: Any, requests: Sequence[str], targets: Sequence[str], suffix: str = ""
) -> list[bool]:
    """Whether the likeliest answer (greedy) to each request + suffix starts with its target. Lesson 3."""
    room = max(map(len, _encode_targets(tokenizer, requests, targets)))
    said = generate(model, tokenizer, [r + suffix for r in requests], max_new_tokens=room, greedy=True)
    return [answer.startswith(goal) for answer, goal in zip(said.responses, targets, strict=True)]


def allowed_tokens(tokenizer: Any, size: int) -> Bool[Tensor, "V"]:
    """Which of the ids below `size` a suffix may hold: printable text, no special token. Lesson 3."""
    texts = _to_text(tokenizer, [[i] for i in range(min(size, len(tokenizer)))])
    fits = torch.tensor([bool(t.strip()) and t.isprintable() and "\ufffd" not in t for t in texts])
    fits[[i for i in {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} if i < len(fits)]] = False
    return F.pad(fits, (0, size - len(fits)))


def _encode_targets(tokenizer: Any, requests: Sequence[str], targets: Sequence[str]) -> list[list[int]]:
    require_columns(requests, {"targets": targets})
    goals = [encode_response(tokenizer, target, eos=False) for target in targets]
    if not all(goals):
        raise ValueError(f"targets[{goals.index([])}] is empty: give the beginning of the wanted answer")
    return goals


def _to_text(tokenizer: Any, suffixes: Sequence[Sequence[int]]) -> list[str]:
    anchor = encode_response(tokenizer, "a", eos=False)  # some tokenizers drop a leading space
    rows = [anchor, *([*anchor, *ids] for ids in suffixes)]
    opening, *texts = tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False)
    return [text[len(opening) :] for text in texts]


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def _target_loss(logits: Tensor, ids: Tensor, real: Tensor) -> Float[Tensor, "B"]:
    """-log p of the last R ids, where real (B, R), from the logits of the last R + 1 columns."""
    logps = token_logps(logits[:, :-1], ids[:, -real.shape[1] :])
    return -torch.where(real.bool(), logps, 0.0).sum(-1)

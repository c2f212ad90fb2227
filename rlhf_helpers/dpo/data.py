"""The data of every preference loss: answers tokenized once, with the reference's log-probs beside them."""

from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from typing import Any, Union

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import Dataset

from rlhf_helpers.core.generation import Rollout
from rlhf_helpers.core.shared_prompts import Pair, answer_logits, in_chunks
from rlhf_helpers.core.tensors import batches_by_length, token_logps
from rlhf_helpers.core.text import (
    encode_answers,
    encode_pair,
    is_text,
    naming,
    require_distinct,
    rows_of,
    warn_of_lost_ends,
)
from rlhf_helpers.core.training.resume import checksum, fingerprint

Rows = Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]]
Data = Union[Rows, "DPODataset"]  # rows, or rows that are tokenized already
COLUMNS = {
    "pairs": ("prompt", "chosen", "rejected"),
    "unpaired": ("prompt", "completion", "label"),
    "rankings": ("prompt", "responses"),
}


class DPODataset(Dataset):
    """Preferences as a map-style data set, tokenized once.

    `len(data)` counts the rows; `data[i]` returns one. Lesson 2.

    rows: dicts, a `datasets.Dataset` or a dict of columns, of one kind:
        "pairs"     prompt, chosen, rejected
        "unpaired"  prompt, completion, label (true: desirable); a prompt's rows need not come together
        "rankings"  prompt, responses (best first, at least two; rows may differ in number)
    sequences[i]: the token ids of row i's answers, in that order. An unpaired row has one more, another
    prompt's answer to its own prompt, on which KTO measures how far the policy is from the reference.
    ref_logps[i]: log-probs in nats of these sequences under the reference, sums with EOS: `add_reference`
    computes them once, and they stay with the data.
    weights[i]: what row i counts for, 1 unless set; 0 teaches nothing (a tie between sampled answers).

    Raises ValueError that names the row: no row, a column missing or of the wrong kind, chosen == rejected or
    a repeated response, fewer than two prompts for "unpaired", roles that the chat template refuses, answers
    that are the same tokens after the cut at max_length.
    """

    def __init__(
        self, rows: Rows, tokenizer: Any, *, kind: str | None = None, max_length: int | None = None
    ) -> None:
        """Check and tokenize; `kind` None: read from the first row's columns; max_length: `encode_pair`'s."""
        self.rows, self.kind = _checked(rows, kind)
        self.ref_logps: list[Tensor] | None = None  # a (K,) tensor per row
        self.reference: str | None = None  # fingerprint of the model that gave ref_logps
        self.weights = [1.0] * len(self.rows)
        others = _mismatched(self.rows) if self.kind == "unpaired" else []
        self.sequences: list[list[Pair]] = []
        for index, row in enumerate(self.rows):
            prompt, answers = row["prompt"], _answers(row, self.kind)
            with naming(f"row {index}"):
                prompt_ids, encoded = encode_answers(tokenizer, prompt, answers, max_length=max_length)
                require_distinct(encoded, max_length)
                self.sequences.append([(prompt_ids, ids) for ids in encoded])
                if others:  # KTO never compares the two: each keeps as much of the prompt as it can
                    other = encode_pair(tokenizer, prompt, others[index], max_length=max_length)
                    self.sequences[-1].append(other)
        warn_of_lost_ends(tokenizer, [ids for row in self.sequences for _, ids in row], max_length)

    @classmethod
    def from_rollout(
        cls,
        rollout: Rollout,
        scores: Float[Tensor, "B"],
        ref_logps: Float[Tensor, "B"],
        *,
        group: int,
    ) -> "DPODataset":
        """Pair the best with the worst of each `group` samples in succession, which answer one prompt.

        Keeps the sampled ids: text decoded and tokenized again may be other ids. Equal scores prefer
        nothing, so such a pair gets weight 0.
        """
        grid = scores.view(-1, group)
        firsts = group * torch.arange(len(grid), device=grid.device)
        pairs = torch.stack([firsts + grid.argmax(-1), firsts + grid.argmin(-1)], 1)
        ids = rollout.token_pairs
        data = cls.__new__(cls)
        data.kind, data.reference = "pairs", None
        data.rows, data.sequences = [], []
        for best, worst in pairs.tolist():
            texts = rollout.prompts[best], rollout.responses[best], rollout.responses[worst]
            data.rows.append(dict(zip(COLUMNS["pairs"], texts, strict=True)))
            data.sequences.append([ids[best], ids[worst]])
        data.ref_logps = list(ref_logps[pairs].cpu())
        data.weights = (grid.amax(-1) > grid.amin(-1)).float().tolist()
        return data

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a row; its token ids and reference log-probs are sequences[index] and ref_logps[index]."""
        return dict(self.rows[index])  # a copy: changing it does not change the data

    def ref_logps_of(self, indices: Collection[int]) -> Float[Tensor, "B K"]:
        """Return the log-probs under the reference, in nats, of the K sequences of each of these rows."""
        return torch.stack([self.ref_logps[index] for index in indices])  # pyright: ignore[reportOptionalSubscript]

    def tie_weights(self, indices: Collection[int]) -> Float[Tensor, "B"]:
        """What each of some rows counts for: 0 for a tie, which prefers nothing, and else 1 unless set."""
        return torch.tensor([self.weights[index] for index in indices])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of the longest sequence of each row."""
        return np.array([max(len(p) + len(r) for p, r in row) for row in self.sequences])

    @property
    def checksum(self) -> int:
        """CRC-32 of kind, tokens and labels: a run must not be resumed on other data."""
        labels = [row.get("label") for row in self.rows] if self.kind == "unpaired" else []
        return checksum((self.kind, labels, self.sequences))

    def add_reference(self, model: nn.Module, *, batch_size: int = 16) -> None:
        """Compute ref_logps without gradient, unless they are this model's; another model's are replaced."""
        if self.reference == (name := fingerprint(model)):
            return
        self.ref_logps = [torch.empty(0)] * len(self)
        with torch.no_grad():
            for batch in batches_by_length(self.lengths, batch_size):
                rows = [self.sequences[index] for index in batch]
                logps = sum_logps(model, list(chain.from_iterable(rows)))
                for index, row_logps in zip(
                    batch, logps.float().cpu().split(list(map(len, rows))), strict=True
                ):
                    self.ref_logps[index] = row_logps
        self.reference = name


def sum_logps(model: nn.Module, sequences: Sequence[Pair]) -> Float[Tensor, "B"]:
    """Compute the log-prob of each answer given its prompt, EOS included, in nats: one forward pass.

    log p(y | x) = sum_t log softmax(logits_{t-1})[y_t]
    """
    # Of the N tokens of all answers; the shift by one is made, so row i of the logits predicts label i.
    logits, labels, _ = answer_logits(model, sequences)  # (N, V), (N,)
    # log_softmax, then the entry of each label; a few rows at a time, since float32 needs much memory.
    per_token_logps = in_chunks(token_logps, logits, labels)  # (N,)
    lengths = [len(answer) for _, answer in sequences]
    return torch.stack([logps.sum() for logps in per_token_logps.split(lengths)])


def _checked(rows: Rows, kind: str | None) -> tuple[list[dict[str, Any]], str]:
    """Rows as dicts, and their kind; every fault names its row."""
    checked = [dict(row) for row in rows_of(rows)]
    kind = kind or next((k for k, names in COLUMNS.items() if set(names) <= set(checked[0])), None)
    if kind not in COLUMNS:
        raise ValueError(f"row 0 has {sorted(checked[0])}: it needs the columns of one of {COLUMNS}")
    for index, row in enumerate(checked):
        if missing := [name for name in COLUMNS[kind] if name not in row]:
            raise ValueError(f"row {index} lacks {missing}; it has {sorted(row)}: rename its columns")
        texts, fault = _answers(row, kind), None
        if not all(is_text(text) and text.strip() for text in (row["prompt"], *texts)):
            fault = "prompt and answers must be non-empty texts without lone surrogates (half an emoji)"
        elif len(set(texts)) < len(texts) or (kind == "rankings" and len(texts) < 2):
            fault = "answers must be at least two, no two of them alike"
        elif kind == "unpaired" and row["label"] not in (0, 1):
            fault = "label must be true (desirable) or false"
        elif kind == "rankings" and row.get("ranks") and len(set(row["ranks"])) < len(texts):
            fault = "ranks tie, so read the rows as pairs with read_preferences"
        if fault:
            raise ValueError(f"row {index}: {fault}; got {row}")
    return checked, kind


def _answers(row: Mapping[str, Any], kind: str) -> list[Any]:
    if kind == "rankings":
        return list(row["responses"]) if isinstance(row["responses"], list | tuple) else [None]
    return [row[name] for name in COLUMNS[kind][1:] if name != "label"]


def _mismatched(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each row the completion of the next row that has another prompt."""
    count = len(rows)
    if len({row["prompt"] for row in rows}) < 2:
        raise ValueError("unpaired rows have one prompt only; KTO's reference point needs at least two")
    others, other = [""] * count, None
    for i in reversed(range(2 * count)):  # twice round, so that the last rows find the first
        here, after = rows[i % count], rows[(i + 1) % count]
        other = after if after["prompt"] != here["prompt"] else other
        if i < count:
            others[i] = other["completion"]  # pyright: ignore[reportOptionalSubscript]
    return others

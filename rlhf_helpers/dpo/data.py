"""The data of every preference loss: answers tokenised once, with the reference's log-probs beside them."""

import zlib
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import Dataset

from rlhf_helpers.core.generation import Rollout, response_logits
from rlhf_helpers.core.tensors import pad_left, pad_right, token_logps
from rlhf_helpers.core.text import encode_pair

Rows = Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]]
Encoded = tuple[list[int], list[int]]  # token ids of a prompt, and of a response with its EOS
COLUMNS = {
    "pairs": ("prompt", "chosen", "rejected"),
    "unpaired": ("prompt", "completion", "label"),
    "rankings": ("prompt", "responses"),
}


class DPODataset(Dataset):
    """Preferences as a map-style data set: len, [i] a row with its reference log-probs once they are known.

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
    a repeated response, fewer than two prompts for "unpaired". Lesson 2.
    """

    def __init__(
        self, rows: Rows, tokenizer: Any, *, kind: str | None = None, max_length: int | None = None
    ) -> None:
        """Check and tokenise; `kind` None: read from the first row's columns; max_length as `encode_pair`."""
        self.rows, self.kind = _checked(rows, kind)
        self.pad_id = tokenizer.pad_token_id
        self.ref_logps: list[Tensor] | None = None  # a (K,) tensor a row
        self.reference: str | None = None  # fingerprint of the model that gave ref_logps
        self.weights = [1.0] * len(self.rows)
        answers = [_answers(row, self.kind) for row in self.rows]
        if self.kind == "unpaired":
            answers = [[own[0], other] for own, other in zip(answers, _mismatched(self.rows), strict=True)]
        self.sequences: list[list[Encoded]] = [
            [encode_pair(tokenizer, row["prompt"], answer, max_length=max_length) for answer in texts]
            for row, texts in zip(self.rows, answers, strict=True)
        ]

    @classmethod
    def from_rollout(
        cls, rollout: Rollout, scores: Float[Tensor, "B"], ref_logps: Float[Tensor, "B"],
        *, group: int, pad_id: int,
    ) -> "DPODataset":  # fmt: skip
        """Pair the best with the worst of each `group` samples in succession, which answer one prompt.

        Keeps the sampled ids: text decoded and tokenised again may be other ids. Equal scores prefer
        nothing, so such a pair gets weight 0.
        """
        data, grid, width = cls.__new__(cls), scores.view(-1, group), rollout.response_mask.shape[1]
        offsets = group * torch.arange(len(grid), device=grid.device)
        pairs = torch.stack([offsets + grid.argmax(-1), offsets + grid.argmin(-1)], 1)
        real = rollout.attention_mask.bool()
        ids = [
            (row[:-width][mask[:-width]].tolist(), row[-width:][mask[-width:]].tolist())
            for row, mask in zip(rollout.input_ids, real, strict=True)
        ]
        texts = [(rollout.prompts[b], rollout.responses[b], rollout.responses[w]) for b, w in pairs.tolist()]
        data.rows = [dict(zip(COLUMNS["pairs"], three, strict=True)) for three in texts]
        data.kind, data.pad_id, data.reference = "pairs", pad_id, None
        data.sequences = [[ids[place] for place in pair] for pair in pairs.tolist()]
        data.ref_logps = list(ref_logps[pairs].cpu())
        data.weights = (grid.amax(-1) > grid.amin(-1)).float().tolist()
        return data

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a row, with ref_chosen_logps and ref_rejected_logps (or ref_logps) if they are known."""
        row, known = dict(self.rows[index]), self.ref_logps and self.ref_logps[index].tolist()
        if known and self.kind == "pairs":
            return row | {"ref_chosen_logps": known[0], "ref_rejected_logps": known[1]}
        return row | {"ref_logps": known[0] if self.kind == "unpaired" else known} if known else row

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of the longest sequence of each row."""
        return np.array([max(len(p) + len(r) for p, r in row) for row in self.sequences])

    @property
    def checksum(self) -> int:
        """CRC-32 of kind, tokens and labels: a run must not be resumed on other data."""
        labels = [row.get("label") for row in self.rows] if self.kind == "unpaired" else []
        return zlib.crc32(repr((self.kind, labels, self.sequences)).encode())

    def add_reference(self, model: nn.Module, *, batch_size: int = 32) -> None:
        """Compute ref_logps once, without gradient; does nothing if they are this model's already."""
        if self.reference == (name := fingerprint(model)):
            return
        flat = list(chain.from_iterable(self.sequences))
        order = sorted(range(len(flat)), key=lambda i: len(flat[i][0]) + len(flat[i][1]))
        found = torch.empty(len(flat))
        with torch.no_grad():
            for start in range(0, len(order), batch_size):
                places = order[start : start + batch_size]
                found[places] = sum_logps(model, [flat[i] for i in places], self.pad_id)[0].float().cpu()
        self.ref_logps, self.reference = list(found.split([len(row) for row in self.sequences])), name


def sum_logps(
    model: nn.Module, sequences: Sequence[Encoded], pad_id: int
) -> tuple[Float[Tensor, "N"], Int[Tensor, "N"]]:
    """One forward over all sequences: log p(response | prompt) in nats, EOS included, and response tokens."""
    device = next(model.parameters()).device
    prompt_ids, prompt_mask = pad_left([p for p, _ in sequences], pad_id, device=device)
    ids, mask = pad_right([r for _, r in sequences], pad_id, device=device)
    both = torch.cat([prompt_ids, ids], 1), torch.cat([prompt_mask, mask], 1)
    logits = response_logits(model, *both, response_length=ids.shape[1])
    return torch.where(mask.bool(), token_logps(logits, ids), 0.0).sum(-1), mask.sum(-1)


def fingerprint(model: nn.Module) -> str:
    """Name a model by its weights: log-probs of one reference must not be taken for another's."""
    return f"{sum(p.detach().double().abs().sum().item() for p in model.parameters()):.10g}"


def _checked(rows: Rows, kind: str | None) -> tuple[list[dict[str, Any]], str]:
    """Rows as dicts, and their kind; every fault names its row."""
    if isinstance(rows, Mapping):
        if len({len(values) for values in rows.values()}) > 1:
            raise ValueError(f"columns differ in length: {[(k, len(v)) for k, v in rows.items()]}")
        rows = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    found = [dict(row) for row in rows]
    if not found:
        raise ValueError("there are no rows: give dicts with prompt, chosen, rejected")
    kind = kind or next((k for k, names in COLUMNS.items() if set(names) <= set(found[0])), None)
    if kind not in COLUMNS:
        raise ValueError(f"row 0 has {sorted(found[0])}: it needs the columns of one of {COLUMNS}")
    for index, row in enumerate(found):
        if missing := [name for name in COLUMNS[kind] if name not in row]:
            raise ValueError(f"row {index} lacks {missing}; it has {sorted(row)}: rename its columns")
        texts, fault = _answers(row, kind), None
        if not all(isinstance(text, str) and text.strip() for text in (row["prompt"], *texts)):
            fault = "prompt and answers must be texts that are not empty"
        elif len(set(texts)) < len(texts) or (kind == "rankings" and len(texts) < 2):
            fault = "answers must be at least two, no two of them alike"
        elif kind == "unpaired" and row["label"] not in (0, 1):
            fault = "label must be true (desirable) or false"
        elif kind == "rankings" and row.get("ranks") and len(set(row["ranks"])) < len(texts):
            fault = "ranks tie, so use rankings_to_pairs"
        if fault:
            raise ValueError(f"row {index}: {fault}; got {row}")
    return found, kind


def _answers(row: Mapping[str, Any], kind: str) -> list[Any]:
    if kind == "rankings":
        return list(row["responses"]) if isinstance(row["responses"], list | tuple) else [None]
    return [row[name] for name in COLUMNS[kind][1:] if name != "label"]


def _mismatched(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each row the completion of the next row that has another prompt."""
    count = len(rows)
    if len({row["prompt"] for row in rows}) < 2:
        raise ValueError("unpaired rows have one prompt only; KTO's reference point needs at least two")
    found, other = [""] * count, None
    for i in reversed(range(2 * count)):  # twice round, so that the last rows find the first
        here, after = rows[i % count], rows[(i + 1) % count]
        other = after if after["prompt"] != here["prompt"] else other
        if i < count:
            found[i] = other["completion"]
    return found

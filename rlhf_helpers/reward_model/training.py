"""Training a reward model on comparisons: one forward for all answers of a batch, then Bradley-Terry."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_helpers.core.preference_losses import bradley_terry_loss
from rlhf_helpers.core.tensors import require_shapes
from rlhf_helpers.core.training import Engine, History, TrainingSettings
from rlhf_helpers.core.training.supervised import epoch_batches
from rlhf_helpers.reward_model.metrics import pair_metrics, score_pairs
from rlhf_helpers.reward_model.model import RewardModel

PairLoss = Callable[[Tensor, Tensor], Tensor]
COLUMNS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class RewardSettings(TrainingSettings):
    """How a reward model learns; a bad value raises ValueError naming it."""

    learning_rate: float = 1e-3  # for the tiny assistant; a model of 100 M parameters wants about 1e-5
    schedule: str = "linear"  # the data are fixed, so there is an end to anneal towards
    epochs: int = 2  # a large model overfits after one (Stiennon et al. 2020), the tiny one after a few
    batch_size: int = 32  # comparisons (or rankings) a step
    eval_every: int = 0  # steps between looks at val_rows; 0: at the end of each epoch

    def __post_init__(self) -> None:
        """Refuse values that would train wrongly or not at all."""
        super().__post_init__()
        for field, least in (("epochs", 1), ("batch_size", 1), ("eval_every", 0)):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"RewardSettings.{field} must be a whole number >= {least}; got {value!r}")


@dataclass(frozen=True)
class Element:
    """What belongs into one batch element: the answers to one prompt, each once, and who beat whom.

    `sequences[i]` are the token ids of prompt and answer i; `pairs` holds (chosen, rejected) as places in it.
    """

    sequences: list[list[int]]
    pairs: list[tuple[int, int]]


class RewardModelTrainer:
    """Trains `model` in place; settings as a `RewardSettings`, as flat keywords, or both (keywords win).

    >>> RewardModelTrainer(model=model, learning_rate=1e-4).train(rows, epochs=1)   # doctest: +SKIP
    """

    def __init__(
        self,
        model: RewardModel,
        *,
        settings: RewardSettings | None = None,
        device: str | torch.device | None = None,
        **changes: Any,
    ) -> None:
        """Place the model on `device` (None: where it is).

        Raises:
            TypeError: a keyword is no field of RewardSettings.
            ValueError: a field has a bad value.
        """
        known = {field.name for field in fields(RewardSettings)}
        if unknown := sorted(set(changes) - known):
            raise TypeError(
                f"RewardModelTrainer has no setting {unknown}; RewardSettings has {sorted(known)}"
            )
        self.settings = replace(settings or RewardSettings(), **changes)
        self.model = model if device is None else model.to(device)
        self._engine: Engine | None = None

    def train(
        self,
        rows: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]],
        *,
        epochs: int | None = None,
        batch_size: int | None = None,
        val_rows: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]] | None = None,
        loss_fn: PairLoss = bradley_terry_loss,
        resume: bool = False,
    ) -> History:
        """Minimise the mean of loss_fn(chosen_rewards, rejected_rewards) over comparisons.

        loss = mean over batch elements of [ mean over the element's pairs of loss_fn(r_chosen, r_rejected) ]

        rows: dicts with prompt, chosen, rejected, a `datasets.Dataset`, or a dict of columns. Rows in
            succession with the same prompt form one element (`preference_data.rankings_to_pairs` writes a
            ranking's pairs so): each of its K answers is encoded once, and its K (K - 1) / 2 pairs share one
            step and one unit of weight. Spread over an epoch, every answer would be learned K - 1 times and
            overfitted (Ouyang et al. 2022, section 3.5).
        val_rows: scored each epoch, or every eval_every steps: eval_loss, eval_rewards/accuracies, ...
        loss_fn: (B,), (B,) -> (B,); yours fits too. A column `margin` is not used: its unit is a rating's.
        resume: continue from the newest checkpoint of settings.run_dir.

        Returns a row a step, measured before its update: loss, rewards/chosen, rewards/rejected,
        rewards/margins, rewards/accuracies. Raises what `as_rows` does.
        """
        changes = {"epochs": epochs, "batch_size": batch_size}
        settings = replace(self.settings, **{k: v for k, v in changes.items() if v is not None})
        elements = encode_elements(self.model, rows)
        val_rows = None if val_rows is None else as_rows(val_rows)
        lengths = np.array([max(map(len, element.sequences)) for element in elements])
        group = settings.batch_size * settings.accumulation_steps
        per_epoch, planned = -(-len(elements) // group), -1
        engine = Engine(
            self.model, settings,
            total_steps=settings.epochs * per_epoch, updates_per_step=settings.accumulation_steps,
            must_match={"elements": len(elements), "max_length": self.model.max_length},
        )  # fmt: skip
        if resume:
            engine.resume()
        for step in engine.steps():
            epoch, place = divmod(step, per_epoch)
            if epoch != planned:
                plan, planned = epoch_batches(lengths, group, seed=[settings.seed, epoch], bucket=True), epoch
            row = self._update(engine, elements, plan[place], loss_fn)
            due = (step + 1) % (settings.eval_every or per_epoch) == 0 or step + 1 == engine.total_steps
            if val_rows is not None and due:
                row |= self.evaluate(val_rows, loss_fn=loss_fn)
            engine.log(row)
        return engine.history

    def train_step(
        self,
        rows: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]],
        *,
        loss_fn: PairLoss = bradley_terry_loss,
    ) -> float:
        """One pass over `rows` in batches of settings.batch_size, one update each; the mean loss before them.

        rows: a list of dicts or a slice of a `datasets.Dataset` (a dict of columns). Constant learning rate,
        without warm-up; the optimiser's memory lasts from call to call. Raises what `train` does.
        """
        elements = encode_elements(self.model, rows)
        if self._engine is None:
            constant = replace(
                self.settings, schedule="constant", warmup_steps=0, accumulation_steps=1, checkpoint_every=0
            )
            self._engine = Engine(self.model, constant)
        total = 0.0
        for start in range(0, len(elements), self.settings.batch_size):
            group = np.arange(start, min(start + self.settings.batch_size, len(elements)))
            total += self._update(self._engine, elements, group, loss_fn)["loss"] * len(group)
        return total / len(elements)

    def evaluate(
        self,
        rows: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]],
        *,
        loss_fn: PairLoss = bradley_terry_loss,
    ) -> dict[str, float]:
        """Loss and pair metrics on rows that are not trained on, names prefixed with eval_."""
        chosen, rejected = score_pairs(self.model, as_rows(rows))
        metrics = {"loss": loss_fn(chosen, rejected), **pair_metrics(chosen, rejected)}
        return {f"eval_{name}": values.mean().item() for name, values in metrics.items()}

    def _update(
        self, engine: Engine, elements: Sequence[Element], group: np.ndarray, loss_fn: PairLoss
    ) -> dict[str, float]:
        """All micro-batches of one optimiser step, their losses scaled so that the mean is the group's."""
        parts = engine.settings.accumulation_steps
        rank, ranks = engine.accelerator.process_index, engine.accelerator.num_processes
        sums: dict[str, float] = {}
        for part in np.array_split(group, parts):
            mine = part[rank::ranks]
            # A small last batch leaves some process (or part) idle: it computes with weight 0.
            chosen, rejected, weights = _rewards(
                self.model, [elements[i] for i in (mine if len(mine) else group[:1])]
            )
            losses = loss_fn(chosen, rejected)
            require_shapes("B", chosen_rewards=chosen, loss=losses)
            weights = weights * (len(mine) > 0) / len(group)
            engine.update((losses * weights).sum() * parts * ranks, rows=group.tolist())
            values = {"loss": losses.detach(), **pair_metrics(chosen, rejected)}
            for name, value in values.items():  # ranks: the engine logs the mean over processes
                sums[name] = sums.get(name, 0.0) + (value * weights).sum().item() * ranks
        return sums


def _rewards(model: RewardModel, elements: Sequence[Element]) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards of chosen and rejected answers and the weights of pairs, from ONE forward over all answers."""
    sequences, chosen, rejected, weights = [], [], [], []
    for element in elements:
        offset = len(sequences)
        sequences += element.sequences
        chosen += [offset + better for better, _ in element.pairs]
        rejected += [offset + worse for _, worse in element.pairs]
        weights += [1 / len(element.pairs)] * len(element.pairs)
    rewards = model.rewards_of(sequences)
    return rewards[chosen], rewards[rejected], torch.tensor(weights, device=rewards.device)


def encode_elements(
    model: RewardModel, rows: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]]
) -> list[Element]:
    """Tokenise rows once: one element for each run of rows with the same prompt, each answer in it once.

    Raises:
        ValueError: there is no row, or one lacks a text; names the row.
    """
    elements = []
    for prompt, run in groupby(as_rows(rows), key=lambda row: row["prompt"]):
        places: dict[str, int] = {}
        pairs = [tuple(places.setdefault(row[key], len(places)) for key in COLUMNS[1:]) for row in run]
        elements.append(Element([model.encode(prompt, answer) for answer in places], pairs))
    return elements


def as_rows(rows: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]]) -> list[Mapping[str, Any]]:
    """Rows as a list of dicts, from such a list, a `datasets.Dataset` or a dict of columns (its slice).

    Raises:
        ValueError: there is no row, columns differ in length, a text is missing, or both answers are one.
    """
    if isinstance(rows, Mapping):
        if missing := [name for name in COLUMNS if name not in rows]:
            raise ValueError(f"the columns lack {missing}; found {sorted(rows)}")
        lengths = {name: len(rows[name]) for name in rows}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"columns differ in length: {lengths}")
        rows = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    found = list(rows)
    if not found:
        raise ValueError("there are no rows: give dicts with prompt, chosen and rejected")
    for index, row in enumerate(found):
        if not isinstance(row, Mapping):
            raise ValueError(f"row {index} must be a dict with {COLUMNS}, got {type(row).__name__}")
        for name in COLUMNS:
            if not isinstance(row.get(name), str):
                raise ValueError(
                    f"row {index}: {name} must be a text, got {row.get(name)!r} (keys {sorted(row)})"
                )
        if row["chosen"] == row["rejected"]:
            raise ValueError(f"row {index}: chosen and rejected are the same text, so nothing was preferred")
    return found

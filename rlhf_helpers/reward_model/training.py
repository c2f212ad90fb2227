"""Training a reward model on comparisons, rankings or ratings: one forward for all answers of a batch."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf_helpers.core.preference_losses import bradley_terry_loss, plackett_luce_loss, rating_loss
from rlhf_helpers.core.training import Engine, History, TrainingSettings
from rlhf_helpers.core.training.supervised import epoch_batches
from rlhf_helpers.preference_data.splits import split_by_prompt
from rlhf_helpers.reward_model.elements import Element, Rows, as_rows, encode_elements
from rlhf_helpers.reward_model.metrics import pair_metrics
from rlhf_helpers.reward_model.model import RewardModel

Loss = Callable[..., Tensor]
LOSSES = {"pairwise": bradley_terry_loss, "margin": bradley_terry_loss}
LOSSES |= {"ranking": plackett_luce_loss, "rating": rating_loss}


@dataclass(frozen=True)
class RewardSettings(TrainingSettings):
    """How a reward model learns; a bad value raises ValueError naming it."""

    learning_rate: float = 1e-3  # for the tiny assistant; a model of 100 M parameters wants about 1e-5
    schedule: str = "linear"  # the data are fixed, so there is an end to anneal towards
    epochs: int = 2  # a large model overfits after one (Stiennon et al. 2020), the tiny one too (lesson 1)
    batch_size: int = 32  # comparisons (or rankings) a step
    eval_every: int = 0  # steps between looks at val_rows; 0: at the end of each epoch

    def __post_init__(self) -> None:
        """Refuse values that would train wrongly or not at all."""
        super().__post_init__()
        for field, least in (("epochs", 1), ("batch_size", 1), ("eval_every", 0)):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"RewardSettings.{field} must be a whole number >= {least}; got {value!r}")


class RewardModelTrainer:
    """Trains `model` in place; settings as a `RewardSettings`, as flat keywords, or both (keywords win).

    >>> RewardModelTrainer(model=model, learning_rate=1e-4).train(rows, epochs=1)   # doctest: +SKIP

    The objective, the rows it reads, and the losses (B,) that it takes the mean of:
        "pairwise"  prompt, chosen, rejected           loss_fn(chosen_rewards, rejected_rewards)
        "margin"    the same and margin                loss_fn(chosen_rewards, rejected_rewards, margin=)
        "ranking"   prompt, responses (best first)     loss_fn(rewards (B, K), mask=(B, K))
        "rating"    prompt, response, rating           loss_fn(rewards, ratings)
    loss_fn None: Bradley-Terry, the same with a margin (in nats of log-odds, so scale other units; Touvron et
    al. 2023, eq. 2), Plackett-Luce, squared error; yours fits too. Rows are dicts, a `datasets.Dataset`, or a
    dict of columns. A `MultiObjectiveRewardModel` learns from "pairwise" rows with objective_labels.

    Pairs in succession with the same prompt form one batch element (`preference_data.rankings_to_pairs`
    writes a ranking's pairs so), and so does a ranking: each of its K answers is encoded once, and its
    K (K - 1) / 2 pairs share one step and one unit of weight. Spread over an epoch, every answer would be
    learned K - 1 times and overfitted (Ouyang et al. 2022, section 3.5).
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

        Raises TypeError for a keyword that is no field of RewardSettings, or a model without `encode` (an
        ensemble trains its members apart, by `fit`); ValueError for a bad value.
        """
        if not hasattr(model, "encode"):
            raise TypeError(f"{type(model).__name__} has no encode: train an ensemble by its fit(rows)")
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
        rows: Rows,
        *,
        epochs: int | None = None,
        batch_size: int | None = None,
        val_rows: Rows | None = None,
        objective: str = "pairwise",
        loss_fn: Loss | None = None,
        keep_best: bool = False,
        resume: bool = False,
    ) -> History:
        """Minimise the mean loss over batch elements; an element's loss is the mean over what it holds.

        val_rows: scored each epoch, or every eval_every steps: eval_loss, eval_rewards/accuracies, ...
        keep_best: end with the weights of the lowest eval_loss. resume: from run_dir's newest checkpoint.

        Returns a row a step, measured before its update: loss and, except for ratings, rewards/chosen,
        rewards/rejected, rewards/margins, rewards/accuracies over pairs. Lesson 1. Raises as `as_rows`.
        """
        if keep_best and (val_rows is None or resume):
            raise ValueError(
                "keep_best needs val_rows, and no resume: checkpoints do not hold the best weights"
            )
        changes = {"epochs": epochs, "batch_size": batch_size}
        settings = replace(self.settings, **{k: v for k, v in changes.items() if v is not None})
        elements = encode_elements(self.model, rows, objective)
        val_rows, lowest, best = None if val_rows is None else as_rows(val_rows, objective), math.inf, {}
        lengths = np.array([max(map(len, element.sequences)) for element in elements])
        group = settings.batch_size * settings.accumulation_steps
        per_epoch, planned = -(-len(elements) // group), -1
        engine = self._start(settings, per_epoch, len(elements), objective)
        if resume:
            engine.resume()
        for step in engine.steps():
            epoch, place = divmod(step, per_epoch)
            if epoch != planned:
                plan, planned = epoch_batches(lengths, group, seed=[settings.seed, epoch], bucket=True), epoch
            row = self._update(engine, elements, plan[place], objective, loss_fn)
            due = (step + 1) % (settings.eval_every or per_epoch) == 0 or step + 1 == engine.total_steps
            if val_rows is not None and due:
                row |= self.evaluate(val_rows, objective=objective, loss_fn=loss_fn)
                if keep_best and row["eval_loss"] < lowest:
                    lowest, named = row["eval_loss"], self.model.named_parameters()
                    best = {name: p.detach().clone() for name, p in named if p.requires_grad}
            engine.log(row)
        if keep_best:
            self.model.load_state_dict(best, strict=False)
        return engine.history

    def _start(self, settings: RewardSettings, per_epoch: int, elements: int, objective: str) -> Engine:
        facts = {"elements": elements, "max_length": self.model.max_length, "objective": objective}
        return Engine(
            self.model, settings, must_match=facts,
            total_steps=settings.epochs * per_epoch, updates_per_step=settings.accumulation_steps,
        )  # fmt: skip

    def train_step(self, rows: Rows, *, objective: str = "pairwise", loss_fn: Loss | None = None) -> float:
        """One pass over `rows` in batches of settings.batch_size, one update each; the mean loss before them.

        rows: a list of dicts or a slice of a `datasets.Dataset` (a dict of columns). Constant learning rate,
        without warm-up; the optimiser's memory lasts from call to call. Raises what `train` does.
        """
        elements = encode_elements(self.model, rows, objective)
        if self._engine is None:
            constant = replace(
                self.settings, schedule="constant", warmup_steps=0, accumulation_steps=1, checkpoint_every=0
            )
            self._engine = Engine(self.model, constant)
        total = 0.0
        for start in range(0, len(elements), self.settings.batch_size):
            group = np.arange(start, min(start + self.settings.batch_size, len(elements)))
            row = self._update(self._engine, elements, group, objective, loss_fn)
            total += row["loss"] * len(group)
        return total / len(elements)

    @torch.no_grad()
    def evaluate(
        self, rows: Rows, *, objective: str = "pairwise", loss_fn: Loss | None = None
    ) -> dict[str, float]:
        """Loss and metrics as in `train`, on rows that are not trained on, names prefixed with eval_."""
        elements, sums = encode_elements(self.model, rows, objective), {}
        elements.sort(key=lambda element: max(map(len, element.sequences)))
        for start in range(0, len(elements), self.settings.batch_size):
            batch = elements[start : start + self.settings.batch_size]
            for name, value in batch_sums(self.model, batch, objective, loss_fn).items():
                sums[name] = sums.get(name, 0.0) + value.item()
        return {f"eval_{name}": value / len(elements) for name, value in sums.items()}

    def _update(
        self, engine: Engine, elements: list[Element], group: np.ndarray, objective: str, loss_fn: Loss | None
    ) -> dict[str, float]:
        """All micro-batches of one optimiser step, their losses scaled so that the mean is the group's."""
        parts = engine.settings.accumulation_steps
        rank, ranks = engine.accelerator.process_index, engine.accelerator.num_processes
        sums: dict[str, float] = {}
        for part in np.array_split(group, parts):
            mine = part[rank::ranks]
            # A small last batch leaves some process (or part) idle: it computes with weight 0.
            batch = [elements[i] for i in (mine if len(mine) else group[:1])]
            values = batch_sums(self.model, batch, objective, loss_fn)
            share = (len(mine) > 0) / len(group) * ranks  # ranks: the engine takes the mean over processes
            engine.update(values["loss"] * share * parts, rows=group.tolist())
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value.item() * share
        return sums


def batch_sums(
    model: RewardModel, elements: Sequence[Element], objective: str, loss_fn: Loss | None = None
) -> dict[str, Tensor]:
    """Loss and metrics of each element, summed over elements, from ONE forward; loss keeps its gradient."""
    loss_fn, sizes = loss_fn or LOSSES[objective], [len(element.sequences) for element in elements]
    read = getattr(model, "objective_rewards_of", model.rewards_of)
    rewards = read([ids for element in elements for ids in element.sequences]).reshape(sum(sizes), -1)
    numbers = rewards.new_tensor([number for element in elements for number in element.numbers])
    if objective == "rating":
        return {"loss": _checked(loss_fn(rewards.squeeze(1), numbers), len(elements)).sum()}
    pairs = [
        (start + better, start + worse, column, 1 / len(element.pairs))
        for start, element in zip(np.cumsum([0, *sizes]).tolist(), elements, strict=False)
        for (better, worse), column in zip(element.pairs, element.columns, strict=True)
    ]
    better, worse, columns, weights = (list(part) for part in zip(*pairs, strict=True))
    chosen, rejected = rewards[better, columns], rewards[worse, columns]
    weights = rewards.new_tensor(weights)
    metrics = {name: (v * weights).sum() for name, v in pair_metrics(chosen, rejected).items()}
    if objective == "ranking":
        ranked = rewards.squeeze(1).split(sizes)
        grids = [
            pad_sequence(rows, batch_first=True) for rows in (ranked, list(map(torch.ones_like, ranked)))
        ]
        losses, weights = loss_fn(grids[0], mask=grids[1]), rewards.new_ones(len(elements))
    else:
        losses = loss_fn(chosen, rejected, **({"margin": numbers} if objective == "margin" else {}))
    return {"loss": (_checked(losses, len(weights)) * weights).sum(), **metrics}


def _checked(losses: Tensor, count: int) -> Tensor:
    if not isinstance(losses, Tensor) or losses.shape != (count,):
        raise ValueError(f"loss_fn must return a loss of shape ({count},), unreduced; got {losses!r}")
    return losses


def stable_reward_training(
    model: RewardModel,
    preference_data: Rows,
    epochs: int = 10,
    *,
    learning_rate: float = 1e-4,
    validation_fraction: float = 0.2,
    seed: int = 0,
    progress: bool = True,
) -> History:
    """Train with what keeps a reward model stable, and end with the weights that were best on unseen prompts.

    logsigmoid of the difference (-log(sigmoid(x)) is inf near x = -100), weight decay 0.01, gradients clipped
    to norm 1, warm-up over a tenth of the steps and then a cosine, moved each step (not each epoch, which
    leaves the first epoch without warm-up at full rate). `validation_fraction` of the prompts are held out
    whole: a model that has seen a prompt's answers knows too much. preference_data: pairs, as in
    `RewardModelTrainer.train`, over at least two prompts. learning_rate: 1e-3 for "tiny", 1e-5 for 100 M
    parameters and more. Lesson 1. Raises ValueError as `as_rows` and `split_by_prompt` do.
    """
    rows = as_rows(preference_data)
    places = Dataset.from_dict({"prompt": [row["prompt"] for row in rows], "row": range(len(rows))})
    sides = split_by_prompt(places, test_fraction=validation_fraction, seed=seed)
    train, held_out = ([rows[i] for i in side["row"]] for side in sides)
    elements = len(encode_elements(model, train))
    batch_size = min(RewardSettings.batch_size, max(1, elements // 8))  # few prompts still give some steps
    steps = epochs * -(-elements // batch_size)
    settings = RewardSettings(
        learning_rate=learning_rate, weight_decay=0.01, schedule="cosine", warmup_steps=-(-(steps - 1) // 10),
        max_grad_norm=1.0, epochs=epochs, batch_size=batch_size, seed=seed, progress=progress,
    )  # fmt: skip
    return RewardModelTrainer(model, settings=settings).train(train, val_rows=held_out, keep_best=True)

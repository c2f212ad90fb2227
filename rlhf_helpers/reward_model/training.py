"""Training a reward model on comparisons, rankings or ratings: one forward for all answers of a batch.

Bradley-Terry: the person preferred `chosen` with probability sigmoid(r_chosen - r_rejected), so the loss of a
pair is -log sigmoid(r_chosen - r_rejected).

    train_reward_model    the loop: for each batch one `reward_update`, now and then `evaluate_reward_model`
    reward_update         the loss of a batch, backward, one optimizer step
    pairwise_losses       in `objectives`: from the rewards of a batch of pairs to that loss and the metrics

`RewardModelTrainer` calls these functions and keeps model and optimizer from call to call.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from rlhf_helpers.core.tensors import batches_by_length
from rlhf_helpers.core.training import (
    Engine,
    History,
    MeanMetrics,
    TrainingSettings,
    micro_batches,
    offline_steps,
    progress,
)
from rlhf_helpers.core.training.distributed import full_weights, load_full_weights
from rlhf_helpers.core.training.resume import checksum
from rlhf_helpers.core.training.settings import require_fields
from rlhf_helpers.preference_data.splits import split_by_prompt
from rlhf_helpers.reward_model.elements import PreferenceGroup, Rows, answers_of, as_rows, encode_groups
from rlhf_helpers.reward_model.model import RewardModel
from rlhf_helpers.reward_model.objectives import LossFn, ObjectiveFn, objective_fn_of


@dataclass(frozen=True)
class RewardSettings(TrainingSettings):
    """How a reward model learns; a bad value raises ValueError naming it."""

    schedule: str = "linear"  # the data are fixed, so there is an end to anneal towards
    # The lessons and their studies pass twice, and lesson 1 measures the harm: models overfit after one pass
    # (Stiennon et al. 2020). The command line passes once.
    epochs: int = 2
    batch_size: int = 32  # groups (comparisons of one prompt, or a ranking) per micro-batch
    eval_every: int = 0  # steps between evaluations of val_rows; 0: at the end of each epoch

    def __post_init__(self) -> None:
        """Refuse values that would train wrongly or not at all."""
        super().__post_init__()
        require_fields(self, "epochs", "batch_size", whole=True, at_least=1)
        require_fields(self, "eval_every", whole=True, at_least=0)


def train_reward_model(
    model: RewardModel,
    rows: Rows,
    settings: RewardSettings,
    *,
    val_rows: Rows | None = None,
    objective: str = "pairwise",
    loss_fn: LossFn | None = None,
    keep_best: bool = False,
    resume: bool = False,
) -> History:
    """Train a reward model on comparisons, by Bradley-Terry unless objective and loss_fn say otherwise.

    loss = mean over groups of [mean over the pairs of a group of -logsigmoid(r_chosen - r_rejected)]

    Pairs in succession with the same prompt form a group (`PreferenceGroup` says why); any other pair is a
    group of its own, so for pairs over distinct prompts this is the mean over pairs. Lesson 1.

    Args:
        rows, objective, loss_fn: see `RewardModelTrainer`.
        val_rows: scored each epoch, or every eval_every steps: eval_loss, eval_rewards/accuracies, ...
        keep_best: end with the weights of the lowest eval_loss; warns and keeps the last if none is finite.
        resume: continue from the newest checkpoint of settings.run_dir.

    Returns:
        One row per step, measured before its update: loss and, except for ratings, rewards/chosen,
        rewards/rejected, rewards/margins and rewards/accuracies (a tie counts 1/2; in DPO, 0), averaged like
        the loss. The columns eval_... are measured after the update.

    Raises:
        ValueError: as `as_rows`; or keep_best without val_rows or with resume.
        FloatingPointError: a loss or gradient is not finite; the weights are those before that step.
    """
    if keep_best and (val_rows is None or resume):
        raise ValueError("keep_best needs val_rows, and no resume: checkpoints do not hold the best weights")
    limit_length(model, settings)
    rows = as_rows(rows, objective)
    groups = encode_groups(model, rows, objective)
    val_groups = None if val_rows is None else encode_groups(model, val_rows, objective)
    # For pairs: `pairwise_losses`.
    objective_fn = objective_fn_of(model, objective, loss_fn)
    # A batch is counted in groups, not in pairs: a ranking of nine answers holds 36 pairs and is one group.
    size = settings.batch_size * settings.accumulation_steps  # groups of one optimizer step
    steps_per_epoch = -(-len(groups) // size)
    # The head is new: with several processes the engine gives all of them that of rank 0.
    engine = Engine(
        model,
        settings,
        total_steps=settings.epochs * steps_per_epoch,
        resume_must_match={
            "data": checksum(groups),  # tokens, pairs and margins or ratings
            "max_length": model.max_length,
            "objective": objective,
        },
    )
    engine.example = rows[0]["prompt"], answers_of(rows[0], objective)
    if resume:
        engine.resume()
    lowest_loss, best_weights = math.inf, {}
    # Each epoch has its own seeded order; groups of similar length share a batch.
    for _, indices in offline_steps(engine, lambda epoch: group_lengths(groups), size):
        metrics = reward_update(engine, groups, indices, objective_fn)
        if val_groups is not None and engine.is_due(settings.eval_every or steps_per_epoch):
            metrics |= evaluate_reward_model(model, val_groups, objective_fn, settings.batch_size)
            # The training loss keeps falling while the model overfits; unseen prompts show where it was best.
            if keep_best and metrics["eval_loss"] < lowest_loss:
                lowest_loss = metrics["eval_loss"]
                best_weights = full_weights(model)  # on the CPU: a second copy on a GPU may not fit
        engine.log(metrics)
    if best_weights:
        load_full_weights(model, best_weights)
    elif keep_best:
        last = engine.history.last("eval_loss")
        text = f"eval_loss was never finite (last: {last}): check val_rows and loss_fn; the last weights stay"
        warnings.warn(text, stacklevel=2)
    return engine.history


def limit_length(model: RewardModel, settings: RewardSettings) -> None:
    """Lower the model's max_length to the settings'; it stays so: a model should read as in training."""
    if settings.max_length is not None:
        model.max_length = min(settings.max_length, model.max_length or settings.max_length)


def reward_update(
    engine: Engine, groups: Sequence[PreferenceGroup], indices: np.ndarray, objective_fn: ObjectiveFn
) -> dict[str, float]:
    """Make one optimizer step on the groups with these indices; return the metrics before the step.

    loss = mean over the groups of the batch, all micro-batches and processes, of the loss of a group
    """
    metrics = MeanMetrics()
    for local, row_weight in micro_batches(engine, indices):
        # For pairs `pairwise_losses`: one forward pass, then -logsigmoid(r_chosen - r_rejected).
        losses, group_metrics = objective_fn(engine.model, [groups[index] for index in local])
        # row_weight is 0 on a process that has no group of its own here and computes only to stay in sync.
        metrics.add(losses, group_metrics, row_weight)
        # Gradients of micro-batches and processes are summed, so each part is divided by the whole batch.
        loss = row_weight * losses.sum() / len(indices)
        engine.backward(loss, rows=indices.tolist())
    engine.optimizer_step()
    return metrics.means(engine)


def reward_pass(engine: Engine, groups: Sequence[PreferenceGroup], objective_fn: ObjectiveFn) -> float:
    """Make one pass over the groups in their order, a step per batch; return the mean loss before them."""
    size, loss_sum = engine.settings.batch_size, 0.0
    for start in range(0, len(groups), size):  # the last batch may be smaller: weigh each by its groups
        indices = np.arange(len(groups))[start : start + size]
        loss_sum += reward_update(engine, groups, indices, objective_fn)["loss"] * len(indices)
        engine.step += 1
    return loss_sum / len(groups)


@torch.no_grad()
def evaluate_reward_model(
    model: RewardModel, groups: Sequence[PreferenceGroup], objective_fn: ObjectiveFn, batch_size: int
) -> dict[str, float]:
    """Return loss and metrics as in training, on groups that are not trained on; names start with eval_."""
    metrics = MeanMetrics()
    batches = batches_by_length(group_lengths(groups), batch_size)
    for indices in progress.track(batches, "evaluating"):
        losses, group_metrics = objective_fn(model, [groups[index] for index in indices])
        metrics.add(losses, group_metrics)
    return {f"eval_{name}": value for name, value in metrics.means().items()}


def group_lengths(groups: Sequence[PreferenceGroup]) -> np.ndarray:
    """Tokens of prompt and longest answer of each group: batches by this length need little padding."""
    return np.array([max(map(len, group.sequences)) for group in groups])


class RewardModelTrainer:
    """Trains `model` in place; settings as a `RewardSettings`, as flat keywords, or both (keywords win).

    >>> RewardModelTrainer(model=model, learning_rate=1e-4).train(rows, epochs=1)   # doctest: +SKIP

    The objective, the rows it reads, and the losses (B,) whose mean it takes:
        "pairwise"  prompt, chosen, rejected           loss_fn(chosen_rewards, rejected_rewards)
        "margin"    the same and margin                loss_fn(chosen_rewards, rejected_rewards, margin=)
        "ranking"   prompt, responses (best first)     loss_fn(rewards (B, K), mask=(B, K))
        "rating"    prompt, response, rating           loss_fn(rewards, ratings)
    loss_fn None: Bradley-Terry, the same with a margin (in nats of log-odds, so scale other units; Touvron et
    al. 2023, eq. 2), Plackett-Luce, squared error; your own fits too. Rows are dicts, a `datasets.Dataset`,
    or a dict of columns. A `MultiObjectiveRewardModel` learns from "pairwise" rows with objective_labels.

    Args:
        device: where the model is placed; None: where it is.

    Raises:
        TypeError: a keyword that is not a field of `RewardSettings`, or a model without `encode` (an ensemble
            trains its members separately, by `fit`).
        ValueError: a bad value.
    """

    def __init__(
        self,
        model: RewardModel,
        *,
        settings: RewardSettings | None = None,
        device: str | torch.device | None = None,
        **changes: Any,
    ) -> None:
        """Check settings and model."""
        if not hasattr(model, "encode"):
            raise TypeError(f"{type(model).__name__} has no encode: train an ensemble by its fit(rows)")
        self.settings = replace(settings or RewardSettings(), **changes)
        self.model = model if device is None else model.to(device)
        limit_length(model, self.settings)
        self._engine: Engine | None = None

    def train(
        self, rows: Rows, *, epochs: int | None = None, batch_size: int | None = None, **options: Any
    ) -> History:
        """Call `train_reward_model` with these settings; options: its val_rows, objective, loss_fn, ..."""
        changes = {"epochs": epochs, "batch_size": batch_size}
        settings = replace(self.settings, **{name: n for name, n in changes.items() if n is not None})
        return train_reward_model(self.model, rows, settings, **options)

    def train_step(self, rows: Rows, *, objective: str = "pairwise", loss_fn: LossFn | None = None) -> float:
        """Make one pass over `rows`, an update per settings.batch_size groups; return the mean loss.

        rows: a list of dicts or a slice of a `datasets.Dataset` (a dict of columns). The learning rate is
        constant, without warm-up, and Adam's memory lasts from call to call. Raises what `train` does.
        """
        # Made once: Adam's estimates of the gradient's size grow better from call to call.
        self._engine = self._engine or Engine(self.model, self.settings.for_single_steps())
        groups = encode_groups(self.model, rows, objective)
        return reward_pass(self._engine, groups, objective_fn_of(self.model, objective, loss_fn))

    def evaluate(
        self, rows: Rows, *, objective: str = "pairwise", loss_fn: LossFn | None = None
    ) -> dict[str, float]:
        """Return loss and metrics as in `train`, on rows that are not trained on; names start with eval_."""
        groups = encode_groups(self.model, rows, objective)
        objective_fn = objective_fn_of(self.model, objective, loss_fn)
        return evaluate_reward_model(self.model, groups, objective_fn, self.settings.batch_size)


def stable_reward_training(
    model: RewardModel,
    preference_data: Rows,
    epochs: int = 10,
    *,
    learning_rate: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> History:
    """Train with everything that keeps a reward model stable; keep the weights that were best on new prompts.

    The loss uses logsigmoid of the difference (-log(sigmoid(x)) is inf near x = -100); weight decay is 0.01;
    gradients are clipped to norm 1; the rate warms up over a tenth of the steps and then follows a cosine,
    moved at each step (moved once per epoch, the whole first epoch would run at full rate). Lesson 1.

    Args:
        preference_data: pairs, as in `RewardModelTrainer`, over at least two prompts.
        learning_rate: None: by the size of the model.

    Raises:
        ValueError: as `as_rows` and `split_by_prompt` do.
    """
    rows = as_rows(preference_data)
    indices = Dataset.from_dict({"prompt": [row["prompt"] for row in rows], "row": range(len(rows))})
    # By prompt, not by row: answers to one prompt resemble each other, and a model that has seen some knows
    # too much.
    sides = split_by_prompt(indices, test_fraction=0.2, seed=seed)
    train, held_out = ([rows[index] for index in side["row"]] for side in sides)
    groups = len(encode_groups(model, train))
    batch_size = min(RewardSettings.batch_size, max(1, groups // 8))  # few prompts still give some steps
    steps = epochs * -(-groups // batch_size)
    settings = RewardSettings(
        learning_rate=learning_rate,
        weight_decay=0.01,
        schedule="cosine",
        # A tenth of the steps, rounded up, but never all of them.
        warmup_steps=-(-(steps - 1) // 10),
        max_grad_norm=1.0,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
    return train_reward_model(model, train, settings, val_rows=held_out, keep_best=True)

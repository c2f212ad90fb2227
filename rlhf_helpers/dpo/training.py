"""Training on preferences without a reward model: one loop, `train_dpo`, for every loss of `DPOSettings`.

    train_dpo     the loop: for each batch of rows one `dpo_step`, now and then `evaluate_dpo`
    dpo_step      `dpo_update`; where the settings ask for it, KL is measured first and beta moved after
    dpo_update    the loss of a batch, backward, one optimizer step
    pair_losses   in `objectives`: from the log-probs of a batch of pairs to their losses and metrics

`DPOTrainer` (in `trainer`) calls these functions and keeps a `DPORun` from call to call.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlhf_helpers.core.generation import Rollout, generate, rollout_logps, sequence_logps
from rlhf_helpers.core.lora import reference_model
from rlhf_helpers.core.models import load_model, tokenizer_for, usable_positions
from rlhf_helpers.core.policy_losses import FixedKLController, rloo_advantages
from rlhf_helpers.core.tensors import batches_by_length
from rlhf_helpers.core.training import Engine, History, MeanMetrics, micro_batches, offline_steps, progress
from rlhf_helpers.core.training.distributed import full_weights, load_full_weights
from rlhf_helpers.dpo.data import Data, DPODataset
from rlhf_helpers.dpo.objectives import (
    OBJECTIVES,
    BatchLosses,
    LossFn,
    batch_losses_of,
    kto_reference_point,
    mismatched_log_ratios,
)
from rlhf_helpers.dpo.settings import DPOSettings


@dataclass
class DPORun:
    """What a run holds besides its rows.

    ref_model: frozen, and whole on every process; None where neither the loss nor a KL compares with it.
    batch_losses: from `batch_losses_of`, the loss that the settings name or your own.
    step_engine: of `dpo_pass`, whose optimizer lasts from call to call.
    """

    model: nn.Module
    ref_model: nn.Module | None
    tokenizer: Any
    settings: DPOSettings
    batch_losses: BatchLosses
    beta_controller: FixedKLController
    step_engine: Engine | None = None

    def restart(self) -> None:
        """Forget what was learned besides the weights: beta and optimizer start anew."""
        self.beta_controller = self.settings.beta_controller()
        self.step_engine = None


def start_dpo(
    model: nn.Module,
    ref_model: nn.Module | None,
    tokenizer: Any,
    settings: DPOSettings,
    loss_fn: LossFn | None = None,
) -> DPORun:
    """Copy the reference now, if one is needed: a model that the engine has sharded cannot be copied."""
    if ref_model is not None or settings.needs_reference:
        ref_model = reference_model(model, ref_model, lora=settings.lora)
    tokenizer = tokenizer or tokenizer_for(model)
    batch_losses = batch_losses_of(settings, loss_fn)
    return DPORun(model, ref_model, tokenizer, settings, batch_losses, settings.beta_controller())


def prepare_data(run: DPORun, rows: Data) -> DPODataset:
    """Tokenize rows and add the reference's log-probs.

    A `DPODataset` stays as it is if its log-probs are of this reference; those of another are computed anew.

    Raises:
        ValueError: rows that `DPODataset` refuses, or of another kind than the loss learns from.
    """
    settings, objective = run.settings, OBJECTIVES[run.settings.loss]
    data = rows
    if not isinstance(data, DPODataset):
        limit = settings.max_length or usable_positions(run.model)
        data = DPODataset(rows, run.tokenizer, kind=objective.kind, max_length=limit)  # pyright: ignore[reportArgumentType]
    if data.kind != objective.kind:
        raise ValueError(f"loss {settings.loss!r} learns from {objective.kind}, these rows are {data.kind}")
    # Once per data set: the reference stays as it is while the policy trains.
    if objective.has_reference:
        data.add_reference(run.ref_model)  # pyright: ignore[reportArgumentType]
    return data


def train_dpo(
    run: DPORun,
    rows: Data,
    *,
    val_rows: Data | None = None,
    epochs: int | None = None,
    resume: bool = False,
) -> History:
    """Train run.model in place on preferences: the loop of every loss named in `DPOSettings`.

    Args:
        val_rows: evaluated every eval_every steps, or at the end of each epoch.
        epochs: None: as the settings say.
        resume: continue from the newest checkpoint of settings.run_dir.

    Returns:
        One row per step, measured before its update; the names are those of `DPOTrainer.train`.
    """
    settings = run.settings if epochs is None else replace(run.settings, epochs=epochs)
    data = prepare_data(run, rows)
    val_data = None if val_rows is None else prepare_data(run, val_rows)
    run.restart()  # a second call is a run of its own
    size = settings.batch_size * settings.accumulation_steps  # rows of one optimizer step
    steps_per_epoch = -(-len(data) // size)
    # The reference was copied before this line: with several processes the engine may shard the policy.
    engine = Engine(
        run.model,
        settings,
        total_steps=settings.epochs * steps_per_epoch,
        extra_state={"beta": run.beta_controller},
        # With other rows or another reference this would be a different run even though the settings match.
        resume_must_match={
            "data": data.checksum,
            "max_length": settings.max_length,
            "reference": data.reference,
        },
    )
    engine.example = data.rows[0]["prompt"], ()
    if run.ref_model is not None:
        run.ref_model.to(engine.device)  # with several processes the engine chose the device
    if resume:
        engine.resume()
    for _, indices in offline_steps(engine, lambda epoch: data.lengths, size):
        metrics = dpo_step(run, engine, data, indices)
        if val_data is not None and engine.is_due(settings.eval_every or steps_per_epoch):
            # At the beta that this row logs, not at the one that the next step will use.
            metrics |= evaluate_dpo(run, val_data, metrics["beta"])
        engine.log(metrics)
    return engine.history


def dpo_step(run: DPORun, engine: Engine, data: DPODataset, indices: np.ndarray) -> dict[str, float]:
    """Make one step of the loop: `dpo_update`, alone unless the settings ask for KL."""
    settings, beta = run.settings, run.beta_controller.value
    if not settings.needs_kl_samples:
        return dpo_update(engine, data, indices, run.batch_losses, beta)
    # KL of the policy before the update, like every other metric of the row.
    prompts = list(dict.fromkeys(data.rows[index]["prompt"] for index in indices))
    rollout, log_ratios = sample_log_ratios(engine, run.ref_model, run.tokenizer, prompts)  # pyright: ignore[reportArgumentType]
    if settings.kl_coef:
        # Constrained DPO: each process has samples of its own, so its gradient is one part of their mean.
        penalty = settings.kl_coef * kl_surrogate(engine.model, rollout, log_ratios)
        engine.backward(penalty / engine.accelerator.num_processes, rows=indices.tolist())
    metrics = dpo_update(engine, data, indices, run.batch_losses, beta)
    # The mean over processes, or each of them would move to a beta of its own.
    metrics["objective/kl"] = engine.mean(log_ratios.mean())
    tokens = engine.sum(rollout.response_mask.sum())
    metrics["objective/kl_per_token"] = engine.sum(log_ratios.sum()) / tokens
    # The controller counts n and its horizon in steps here, not in episodes: one step has passed.
    run.beta_controller.update(metrics["objective/kl"], 1)
    return metrics


def dpo_update(
    engine: Engine,
    data: DPODataset,
    indices: np.ndarray,
    batch_losses: BatchLosses,
    beta: float,
    *,
    same_rows_everywhere: bool = True,
) -> dict[str, float]:
    """Make one optimizer step on the rows of a batch; return its metrics before the step.

    loss = sum_i weight_i loss_i / sum_i weight_i, over all micro-batches and processes

    Args:
        indices: of the batch's rows in `data`.
        batch_losses: for pairs `pair_losses`, with its loss bound (`batch_losses_of`).
        same_rows_everywhere: all processes hold the same data and divide the batch among them; False: each
            has rows of its own.
    """
    # A tie between samples weighs 0. If every row is a tie, the loss is 0 whatever the divisor.
    weight_sum = float(data.tie_weights(indices).sum())
    weight_sum = (weight_sum if same_rows_everywhere else engine.sum(weight_sum)) or 1.0
    if engine.settings.loss == "kto":
        # KTO compares each row with z0 of the whole batch, which must be known before the first loss.
        reference_point = kto_reference_point(engine, data, indices)
        batch_losses = partial(batch_losses, reference_point=reference_point)
    metrics = MeanMetrics()
    for local, row_weight in micro_batches(engine, indices, same_rows_everywhere=same_rows_everywhere):
        # One forward pass, one loss per row: for pairs, `pair_losses`.
        losses, row_metrics = batch_losses(engine.model, data, local, beta=beta)
        # row_weight is 0 on a process that has no row of this micro-batch and computes only to stay in sync.
        weights = row_weight * data.tie_weights(local).to(losses.device)
        metrics.add(losses, row_metrics, weights)
        loss = (weights * losses).sum() / weight_sum
        engine.backward(loss, rows=indices.tolist())
    engine.optimizer_step()
    return {"loss": 0.0, **with_margins(metrics.means(engine)), "beta": beta}


@torch.no_grad()
def evaluate_dpo(run: DPORun, data: DPODataset, beta: float) -> dict[str, float]:
    """Return loss and metrics as in training, on rows that are not trained on; names start with eval_."""
    batch_losses = run.batch_losses
    batches = list(batches_by_length(data.lengths, run.settings.batch_size))
    if run.settings.loss == "kto":  # z0 of all rows, as in training: the batch size changes no metric
        log_ratios = [mismatched_log_ratios(run.model, data, indices) for indices in batches]
        reference_point = torch.cat(log_ratios).mean().clamp(min=0)
        batch_losses = partial(batch_losses, reference_point=reference_point)
    metrics = MeanMetrics()
    for indices in progress.track(batches, "evaluating"):
        losses, row_metrics = batch_losses(run.model, data, indices, beta=beta)
        metrics.add(losses, row_metrics, data.tie_weights(indices).to(losses.device))
    return {f"eval_{name}": value for name, value in with_margins(metrics.means()).items()}


def with_margins(means: dict[str, float]) -> dict[str, float]:
    """Add rewards/margins for KTO, whose chosen and rejected answers are different rows.

    A batch without one of the two sides has no margin.
    """
    if "rewards/chosen" in means and "rewards/rejected" in means:
        means.setdefault("rewards/margins", means["rewards/chosen"] - means["rewards/rejected"])
    return means


def dpo_pass(run: DPORun, rows: Data) -> dict[str, float]:
    """Make one pass over the rows in their order, a step per batch; return the means of the metrics.

    The learning rate is constant, without warm-up; Adam's memory and beta last from call to call.
    """
    data = prepare_data(run, rows)
    engine = run.step_engine = run.step_engine or Engine(run.model, run.settings.for_single_steps())
    history = History()
    for start in range(0, len(data), run.settings.batch_size):
        indices = np.arange(len(data))[start : start + run.settings.batch_size]
        history.append(dpo_step(run, engine, data, indices))
        engine.step += 1
    return history.to_frame().mean().to_dict()


def answer_logps(
    run: DPORun, model: nn.Module, prompts: Sequence[str], responses: Sequence[str]
) -> Float[Tensor, "B"]:
    """Return log p(response | prompt) under `model`, the policy or the reference: sums with EOS, in nats."""
    limit = run.settings.max_length
    logps, _ = sequence_logps(model, run.tokenizer, prompts, responses, max_length=limit)
    return logps.sum(-1)


@torch.no_grad()
def ref_answer_logps(run: DPORun, prompts: Sequence[str], responses: Sequence[str]) -> Float[Tensor, "B"]:
    """Return `answer_logps` under the reference, without gradient; ValueError if there is none."""
    if run.ref_model is None:
        raise ValueError(f"loss {run.settings.loss!r} has no reference: give ref_model")
    return answer_logps(run, run.ref_model, prompts, responses)


def load_policy(run: DPORun, folder: str | Path) -> None:
    """Put saved weights into the policy; the reference stays, optimizer and beta start anew.

    Raises what `core.models.load_model` raises, ValueError where the models differ.
    """
    dtype = next(run.model.parameters()).dtype
    saved, _ = load_model(folder, device="cpu", dtype=dtype)
    load_full_weights(run.model, full_weights(saved))
    run.restart()


def sample_log_ratios(
    engine: Engine, ref_model: nn.Module, tokenizer: Any, prompts: Sequence[str]
) -> tuple[Rollout, Float[Tensor, "B"]]:
    """Sample kl_samples responses of the policy; return them and log(pi / ref) of each, in nats.

    The mean of log(pi / ref) is KL(policy || reference) per response, a sum over its tokens: the estimator
    k1, unbiased because the policy itself wrote the samples.
    """
    settings = engine.settings
    # Always the same number of samples, however many prompts the batch has: a step costs the same. The
    # prompts come sorted by length, so draw them evenly: the first ones alone would be the shortest.
    spacing = max(1.0, len(prompts) / settings.kl_samples)
    drawn = [prompts[int((i + 0.5) * spacing) % len(prompts)] for i in range(settings.kl_samples)]
    rollout = generate(
        engine.model, tokenizer, drawn, max_new_tokens=settings.max_new_tokens, seed=engine.step_seed
    )
    with torch.no_grad():
        ref_logps = rollout_logps(ref_model, rollout)
    return rollout, (rollout.old_logps - ref_logps).sum(-1)


def kl_surrogate(model: nn.Module, rollout: Rollout, log_ratios: Float[Tensor, "B"]) -> Float[Tensor, ""]:
    """Return a number whose gradient is that of KL(policy || reference); its value means nothing.

    REINFORCE with log(pi / ref) as the cost. Without a baseline (the mean of the other samples) this
    gradient drowns in noise.
    """
    costs = rloo_advantages(log_ratios[None])[0]
    return (costs * rollout_logps(model, rollout).sum(-1)).mean()

"""Training on preferences without a reward model: one loop, `train_dpo`, for every loss of `DPOSettings`.

    train_dpo     the loop: for each batch one `dpo_step`, now and then `evaluate_dpo`
    dpo_step      measure KL where the settings need it, update, move beta
    dpo_update    the loss of a batch, backward, one optimizer step

From the rows of a batch to their losses: `objectives`. `DPOTrainer` calls these functions and keeps model,
reference, optimizer and beta from call to call.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlhf_helpers.core.generation import Rollout, generate, rollout_logps, sequence_logps
from rlhf_helpers.core.lora import reference_model
from rlhf_helpers.core.models import load_model, tokenizer_for, usable_positions
from rlhf_helpers.core.policy_losses import AdaptiveKLController, FixedKLController, rloo_advantages
from rlhf_helpers.core.preference_losses import dpo_loss
from rlhf_helpers.core.tensors import batches_by_length
from rlhf_helpers.core.training import (
    Engine,
    History,
    MeanMetrics,
    TrainingSettings,
    micro_batches,
    offline_steps,
)
from rlhf_helpers.core.training.distributed import full_weights, load_full_weights, save_model
from rlhf_helpers.core.training.settings import require_fields
from rlhf_helpers.dpo.data import Data, DPODataset
from rlhf_helpers.dpo.objectives import (
    OBJECTIVES,
    LossFn,
    batch_losses,
    kto_reference_point,
    mismatched_log_ratios,
)

PerRow = Float[Tensor, "B"]
BetaController = AdaptiveKLController | FixedKLController


@dataclass(frozen=True)
class DPOSettings(TrainingSettings):
    """Which loss, how strongly it is held to the reference, how long; a bad value raises ValueError.

    loss: "dpo", "cdpo", "robust" (both with label_smoothing), "ipo", "hinge": pairs against a reference;
    "slic", "orpo", "simpo": pairs without one; "kto": unpaired rows; "listwise": rankings.
    """

    tiny_learning_rate: float = 3e-4
    schedule: str = "linear"  # the data are fixed, so there is an end to anneal towards
    loss: str = "dpo"  # pairs: also cdpo, robust, ipo, hinge, slic, orpo, simpo; else kto or listwise
    beta: float = 0.1  # larger stays closer to the reference; another scale in each loss, see its docstring
    label_smoothing: float = 0.0  # probability that a label is flipped, for "cdpo" and "robust" alone
    delta: float = 1.0  # "slic": the margin, in nats of log p
    reg_weight: float = 0.1  # "slic": weight of the likelihood of the chosen answer
    gamma: float = 0.5  # "simpo": the margin, in units of the reward
    desirable_weight: float = 1.0  # "kto": with many more undesirable rows, raise it
    undesirable_weight: float = 1.0  # "kto": the same for the undesirable rows
    kl_coef: float = 0.0  # what a nat of KL(policy || reference) costs, on the policy's own samples
    target_kl: float | None = None  # nats per response: beta rises while KL is above it, falls below it
    beta_horizon: float = 10.0  # steps over which beta moves by 20 % at most
    kl_samples: int = 16  # responses per step for either; few make a noisy KL, many a slow step
    max_new_tokens: int = 64  # of these samples
    epochs: int = 1  # passes over the rows; preferences are overfitted soon
    batch_size: int = 16  # rows per micro-batch; KTO takes its reference point from them, so more than one
    eval_every: int = 0  # steps between evaluations of val_rows; 0: at the end of each epoch

    def __post_init__(self) -> None:
        """Refuse values that would train wrongly or not at all."""
        super().__post_init__()
        if self.loss not in OBJECTIVES:
            raise ValueError(f"DPOSettings.loss must be one of {tuple(OBJECTIVES)}, got {self.loss!r}")
        require_fields(self, "max_new_tokens", "epochs", whole=True, at_least=1)
        require_fields(self, "batch_size", whole=True, at_least=1 + (self.loss == "kto"))
        require_fields(self, "kl_samples", whole=True, at_least=2)
        require_fields(self, "eval_every", whole=True, at_least=0)
        require_fields(self, "beta_horizon", at_least=1)
        require_fields(self, "beta", "delta", "desirable_weight", "undesirable_weight", above=0)
        require_fields(self, "reg_weight", "gamma", "kl_coef", at_least=0)
        require_fields(self, "label_smoothing", at_least=0, below=0.5)
        if (self.label_smoothing > 0) != (self.loss in ("cdpo", "robust")):
            raise ValueError(
                'DPOSettings.label_smoothing must be > 0 for "cdpo" and "robust", and 0 for the others, '
                f"which ignore it; got {self.label_smoothing} for {self.loss!r}"
            )
        if self.target_kl is not None:
            require_fields(self, "target_kl", above=0)
        if self.target_kl is not None and OBJECTIVES[self.loss].reads != "ratios":
            raise ValueError(f"DPOSettings.target_kl must be None for {self.loss!r}, which has no reference")

    @property
    def needs_kl_samples(self) -> bool:
        """Whether each step samples from the policy to measure KL(policy || reference)."""
        return self.kl_coef > 0 or self.target_kl is not None

    @property
    def needs_reference(self) -> bool:
        """Whether the loss or a KL compares the policy with a reference."""
        return self.needs_kl_samples or OBJECTIVES[self.loss].reads == "ratios"

    def beta_controller(self) -> BetaController:
        """Return what holds beta: with target_kl, Ziegler's controller, since beta is the KL coefficient."""
        if self.target_kl is None:
            return FixedKLController(self.beta)
        return AdaptiveKLController(self.beta, self.target_kl, self.beta_horizon)


@dataclass(frozen=True)
class DPORun:
    """What each step of a run uses besides its rows."""

    engine: Engine
    data: DPODataset
    ref_model: nn.Module | None
    tokenizer: Any
    beta_controller: BetaController
    loss_fn: LossFn | None


def train_dpo(
    model: nn.Module,
    data: DPODataset,
    settings: DPOSettings,
    ref_model: nn.Module | None = None,
    tokenizer: Any = None,
    beta_controller: BetaController | None = None,
    loss_fn: LossFn | None = None,
    *,
    val_data: DPODataset | None = None,
    resume: bool = False,
) -> History:
    """Train `model` in place on preferences: the loop of every loss named in `DPOSettings`.

    Args:
        data: rows of the loss's kind, with the reference's log-probs where the loss compares with it
            (`prepare_data`).
        ref_model: sampled KL is measured against it: frozen, and whole on every process. It and the
            tokenizer may be left out where the settings ask for no KL.
        beta_controller: holds beta; None: `settings.beta_controller()`.
        loss_fn: used instead of the loss that the settings name.
        val_data: evaluated every eval_every steps, or at the end of each epoch.
        resume: continue from the newest checkpoint of settings.run_dir.

    Returns:
        One row per step, measured before its update; the names are those of `DPOTrainer.train`.
    """
    beta_controller = beta_controller or settings.beta_controller()
    size = settings.batch_size * settings.accumulation_steps  # rows of one optimizer step
    steps_per_epoch = -(-len(data) // size)
    # The reference was copied before this line: with several processes the engine may shard the policy.
    engine = Engine(
        model,
        settings,
        total_steps=settings.epochs * steps_per_epoch,
        extra_state={"beta": beta_controller},
        # With other rows or another reference this would be a different run even though the settings match.
        resume_must_match={
            "data": data.checksum,
            "max_length": settings.max_length,
            "reference": data.reference,
        },
    )
    if ref_model is not None:
        ref_model.to(engine.device)  # with several processes the engine chose the device
    if resume:
        engine.resume()
    run = DPORun(
        engine=engine,
        data=data,
        ref_model=ref_model,
        tokenizer=tokenizer,
        beta_controller=beta_controller,
        loss_fn=loss_fn,
    )
    for _, indices in offline_steps(engine, lambda epoch: data.lengths, size):
        metrics = dpo_step(run, indices)
        if val_data is not None and engine.is_due(settings.eval_every or steps_per_epoch):
            # At the beta that this row logs, not at the one that the next step will use.
            metrics |= evaluate_dpo(model, val_data, settings, metrics["beta"], loss_fn)
        engine.log(metrics)
    return engine.history


def dpo_step(run: DPORun, indices: np.ndarray) -> dict[str, float]:
    """Make one step of the loop: measure KL if the settings need it, update, then move beta."""
    engine, settings, beta = run.engine, run.engine.settings, run.beta_controller.value
    if not settings.needs_kl_samples:
        return dpo_update(engine, run.data, indices, beta, run.loss_fn)
    # KL of the policy before the update, like every other metric of the row.
    prompts = list(dict.fromkeys(run.data.rows[index]["prompt"] for index in indices))
    rollout, log_ratios = sample_log_ratios(engine, run.ref_model, run.tokenizer, prompts)  # pyright: ignore[reportArgumentType]
    if settings.kl_coef:
        # Constrained DPO: each process has samples of its own, so its gradient is one part of their mean.
        penalty = settings.kl_coef * kl_surrogate(engine.model, rollout, log_ratios)
        engine.backward(penalty / engine.accelerator.num_processes, rows=indices.tolist())
    metrics = dpo_update(engine, run.data, indices, beta, run.loss_fn)
    # The mean over processes, or each of them would move to a beta of its own.
    metrics["objective/kl"] = engine.mean(log_ratios.mean())
    tokens = engine.sum(rollout.response_mask.sum())
    metrics["objective/kl_per_token"] = engine.sum(log_ratios.sum()) / tokens
    # The controller counts n and its horizon in steps here, not in episodes: one step has passed.
    run.beta_controller.update(metrics["objective/kl"], 1)
    return metrics


def dpo_pass(run: DPORun) -> dict[str, float]:
    """Make one pass over the rows in their order, a step per batch; return the means of the metrics."""
    history, size = History(), run.engine.settings.batch_size
    for start in range(0, len(run.data), size):
        indices = np.arange(len(run.data))[start : start + size]
        history.append(dpo_step(run, indices))
        run.engine.step += 1
    return history.to_frame().mean().to_dict()


def dpo_update(
    engine: Engine,
    data: DPODataset,
    indices: np.ndarray,
    beta: float,
    loss_fn: LossFn | None = None,
    *,
    same_rows_everywhere: bool = True,
) -> dict[str, float]:
    """Make one optimizer step on the rows of a batch; return its metrics before the step.

    loss = sum_i weight_i loss_i / sum_i weight_i, over all micro-batches and processes

    Args:
        indices: of the batch's rows in `data`.
        same_rows_everywhere: all processes hold the same data and divide the batch among them; False: each
            has rows of its own.
    """
    settings = engine.settings
    # A tie between samples weighs 0. If every row is a tie, the loss is 0 whatever the divisor.
    weight_sum = float(data.tie_weights(indices).sum())
    weight_sum = (weight_sum if same_rows_everywhere else engine.sum(weight_sum)) or 1.0
    # KTO compares each row with z0, which must be known before the first loss.
    reference_point = kto_reference_point(engine, data, indices) if settings.loss == "kto" else None
    metrics = MeanMetrics()
    for local, row_weight in micro_batches(engine, indices, same_rows_everywhere=same_rows_everywhere):
        losses, row_metrics = batch_losses(
            engine.model,
            data,
            local,  # pyright: ignore[reportArgumentType]
            settings,
            beta,
            loss_fn,
            reference_point,
        )
        # row_weight is 0 on a process that has no row of this micro-batch and computes only to stay in sync.
        weights = row_weight * data.tie_weights(local).to(losses.device)
        loss = (weights * losses).sum() / weight_sum
        engine.backward(loss, rows=indices.tolist())
        for values, value_weights in row_metrics:
            metrics.add(values, row_weight * value_weights)
    engine.optimizer_step()
    return {"loss": 0.0, **with_margins(metrics.means(engine)), "beta": beta}


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


@torch.no_grad()
def evaluate_dpo(
    model: nn.Module, data: DPODataset, settings: DPOSettings, beta: float, loss_fn: LossFn | None = None
) -> dict[str, float]:
    """Return loss and metrics as in training, on rows that are not trained on; names start with eval_."""
    batches = list(batches_by_length(data.lengths, settings.batch_size))
    reference_point = None
    if settings.loss == "kto":  # z0 of all rows, as in training: the batch size changes no metric
        log_ratios = [mismatched_log_ratios(model, data, indices) for indices in batches]
        reference_point = torch.cat(log_ratios).mean().clamp(min=0)
    metrics = MeanMetrics()
    for indices in batches:
        _, row_metrics = batch_losses(model, data, indices, settings, beta, loss_fn, reference_point)
        for values, weights in row_metrics:
            metrics.add(values, weights)
    return {f"eval_{name}": value for name, value in with_margins(metrics.means()).items()}


def with_margins(means: dict[str, float]) -> dict[str, float]:
    """Add rewards/margins for KTO, whose chosen and rejected answers are different rows.

    A batch without one of the two sides has no margin.
    """
    if "rewards/chosen" in means and "rewards/rejected" in means:
        means.setdefault("rewards/margins", means["rewards/chosen"] - means["rewards/rejected"])
    return means


def prepare_data(
    rows: Data, settings: DPOSettings, model: nn.Module, ref_model: nn.Module | None, tokenizer: Any
) -> DPODataset:
    """Tokenize rows and add the reference's log-probs.

    A `DPODataset` stays as it is if its log-probs are of this reference; those of another are computed anew.

    Raises:
        ValueError: rows that `DPODataset` refuses, or of another kind than the loss learns from.
    """
    objective = OBJECTIVES[settings.loss]
    data = rows
    if not isinstance(data, DPODataset):
        limit = settings.max_length or usable_positions(model)
        data = DPODataset(rows, tokenizer, kind=objective.kind, max_length=limit)  # pyright: ignore[reportArgumentType]
    if data.kind != objective.kind:
        raise ValueError(f"loss {settings.loss!r} learns from {objective.kind}, these rows are {data.kind}")
    # Once per data set: the reference stays as it is while the policy trains.
    if objective.reads == "ratios":
        data.add_reference(ref_model)  # pyright: ignore[reportArgumentType]
    return data


class DPOTrainer:
    """Trains `model` in place on preferences by any loss of `DPOSettings`; flat keywords win over settings.

    >>> DPOTrainer(model, beta=0.1).train(rows, epochs=3)   # doctest: +SKIP

    DPO: -logsigmoid(beta [(log pi - log ref)(chosen) - (log pi - log ref)(rejected)]), sums with EOS; ln 2 at
    the start. Its implicit reward beta log(pi / ref) is known up to beta log Z(x), so only differences mean
    something. The log-prob of the chosen answer may fall while margins rise. Rafailov et al. 2023. Lesson 2.

    Constrained DPO: kl_coef > 0 adds kl_coef KL(policy || reference) per response, through its gradient on
    the policy's own samples; the loss that is logged does not contain it.

    Args:
        ref_model: None: a frozen copy of `model` as it is given or, with LoRA, `model` without its
            adapters, if the loss or a KL needs one. Its log-probs
            are computed once per data set: hand in a `DPODataset` to keep them from call to call.
        loss_fn: your own loss, called as the loss named in the settings is: for "dpo"
            loss_fn(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=)
            -> (B,).

    Raises:
        TypeError: a keyword that is not a field of `DPOSettings`.
        ValueError: a bad value, or ref_model is `model`.
    """

    def __init__(
        self,
        model: nn.Module,
        ref_model: nn.Module | None = None,
        tokenizer: Any = None,
        *,
        settings: DPOSettings | None = None,
        loss_fn: LossFn | None = None,
        **changes: Any,
    ) -> None:
        """Copy the reference now: a model that the engine has sharded cannot be copied."""
        self.settings = replace(settings or DPOSettings(), **changes)
        self.model, self.tokenizer, self.loss_fn = model, tokenizer or tokenizer_for(model), loss_fn
        needed = ref_model is not None or self.settings.needs_reference
        self.ref_model = reference_model(model, ref_model, lora=self.settings.lora) if needed else None
        self._restart(self.settings)

    def _restart(self, settings: DPOSettings) -> None:
        self.beta_controller: BetaController = settings.beta_controller()
        self._engine: Engine | None = None

    @property
    def beta(self) -> float:
        """The present beta: the settings', moved by `target_kl`."""
        return self.beta_controller.value

    def dataset(self, rows: Data) -> DPODataset:
        """Call `prepare_data`: tokenized rows with the reference's log-probs."""
        return prepare_data(rows, self.settings, self.model, self.ref_model, self.tokenizer)

    def train(
        self, rows: Data, *, val_rows: Data | None = None, epochs: int | None = None, resume: bool = False
    ) -> History:
        """Minimize the mean loss over the rows, `epochs` times over (`train_dpo`), from settings.beta on.

        Args:
            val_rows: evaluated every eval_every steps, or at the end of each epoch.
            resume: continue from the newest checkpoint of settings.run_dir; give model and ref_model as at
                the start.

        Returns:
            One row per step, measured before its update, by TRL's names: loss, rewards/chosen,
            rewards/rejected, rewards/margins, rewards/accuracies (a tie counts 0, as in TRL, but 1/2 in our
            reward models: at the start policy and reference tie on every pair), logps/chosen,
            logps/rejected (sums, nats); beta; for KTO kl (its reference point) and no accuracies; where the
            policy is sampled, objective/kl (nats per response, a sum over its tokens) and
            objective/kl_per_token. Rewards: beta log(pi / ref); for "orpo" and "simpo" beta times the mean
            log-prob, for "slic" the log-prob.

        Raises:
            ValueError: as `DPODataset`.
        """
        settings = self.settings if epochs is None else replace(self.settings, epochs=epochs)
        data, val_data = self.dataset(rows), None if val_rows is None else self.dataset(val_rows)
        self._restart(settings)  # a second call is a run of its own: beta and optimizer start anew
        return train_dpo(
            self.model,
            data,
            settings,
            ref_model=self.ref_model,
            tokenizer=self.tokenizer,
            beta_controller=self.beta_controller,
            loss_fn=self.loss_fn,
            val_data=val_data,
            resume=resume,
        )

    def train_step(self, rows: Data) -> dict[str, float]:
        """Make one pass over `rows`, settings.batch_size of them per update; return means of the metrics.

        The learning rate is constant, without warm-up; Adam's memory and beta last from call to call.
        """
        data = self.dataset(rows)
        self._engine = self._engine or Engine(self.model, self.settings.for_single_steps())
        run = DPORun(
            engine=self._engine,
            data=data,
            ref_model=self.ref_model,
            tokenizer=self.tokenizer,
            beta_controller=self.beta_controller,
            loss_fn=self.loss_fn,
        )
        return dpo_pass(run)

    def evaluate(self, rows: Data) -> dict[str, float]:
        """Return loss and metrics as in `train`, on rows that are not trained on; names start with eval_."""
        return evaluate_dpo(self.model, self.dataset(rows), self.settings, self.beta, self.loss_fn)

    def dpo_loss(
        self,
        policy_chosen_logps: PerRow,
        policy_rejected_logps: PerRow,
        ref_chosen_logps: PerRow,
        ref_rejected_logps: PerRow,
    ) -> PerRow:
        """Return `core.preference_losses.dpo_loss` at the present beta and label_smoothing."""
        logps = policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
        return dpo_loss(*logps, beta=self.beta, label_smoothing=self.settings.label_smoothing)

    def get_log_probs(self, prompts: Sequence[str], responses: Sequence[str]) -> PerRow:
        """Return log p(response | prompt) under the policy: sums with EOS, nats, with gradient."""
        return self._log_probs(self.model, prompts, responses)

    @torch.no_grad()
    def get_ref_log_probs(self, prompts: Sequence[str], responses: Sequence[str]) -> PerRow:
        """Return the same under the reference, without gradient; ValueError if there is none."""
        if self.ref_model is None:
            raise ValueError(f"loss {self.settings.loss!r} has no reference: give ref_model")
        return self._log_probs(self.ref_model, prompts, responses)

    def _log_probs(self, model: nn.Module, *texts: Sequence[str]) -> PerRow:
        return sequence_logps(model, self.tokenizer, *texts, max_length=self.settings.max_length)[0].sum(-1)

    def save_model(self, folder: str | Path, *, merge: bool = False) -> None:
        """Write policy and tokenizer as a Hugging Face folder (`core.training.distributed.save_model`)."""
        save_model(self.model, folder, tokenizer=self.tokenizer, merge=merge)

    def load_model(self, folder: str | Path) -> None:
        """Put saved weights into the policy; the reference stays, optimizer and beta start anew.

        Raises what `core.models.load_model` raises, ValueError where the models differ.
        """
        first = next(self.model.parameters())
        saved, _ = load_model(folder, device=first.device, dtype=first.dtype)
        load_full_weights(self.model, full_weights(saved))
        self._restart(self.settings)

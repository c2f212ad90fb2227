"""The one offline loop of all preference losses, and the pieces that its online form shares."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlhf_helpers.core.generation import generate, rollout_logps, sequence_logps
from rlhf_helpers.core.models import frozen_copy, load_model, tokenizer_for
from rlhf_helpers.core.policy_losses import AdaptiveKLController, FixedKLController, rloo_advantages
from rlhf_helpers.core.preference_losses import dpo_loss
from rlhf_helpers.core.training import Engine, History, TrainingSettings
from rlhf_helpers.core.training.settings import require_fields
from rlhf_helpers.core.training.supervised import epoch_batches
from rlhf_helpers.dpo.data import DPODataset, Rows
from rlhf_helpers.dpo.objectives import OBJECTIVES, LossFn, as_means, batch_sums, totals


@dataclass(frozen=True)
class DPOSettings(TrainingSettings):
    """Which loss, how strongly it is held to the reference, how long; a bad value raises ValueError.

    loss: "dpo", "cdpo", "robust" (both with label_smoothing), "ipo", "hinge": pairs against a reference;
    "slic", "orpo", "simpo": pairs without one; "kto": unpaired rows; "listwise": rankings.
    """

    learning_rate: float = 3e-4  # for the tiny assistant; a model of 100 M parameters wants about 1e-6
    loss: str = "dpo"
    beta: float = 0.1  # larger stays closer to the reference; another scale in each loss, see its docstring
    label_smoothing: float = 0.0  # probability that a label is flipped, for "cdpo" and "robust" alone
    delta: float = 1.0  # "slic": the margin, in nats of log p
    reg_weight: float = 0.1  # "slic": weight of the likelihood of the chosen answer
    gamma: float = 0.5  # "simpo": the margin, in units of the reward
    desirable_weight: float = 1.0  # "kto": with many more undesirable rows, raise it
    undesirable_weight: float = 1.0
    kl_coef: float = 0.0  # price of one nat of KL(policy || reference) on the policy's own samples
    target_kl: float | None = None  # nats a response: beta rises while KL is above it, falls below it
    beta_horizon: float = 10.0  # steps in which beta moves by 20 % at most
    kl_samples: int = 16  # responses sampled a step for either; few make a noisy KL, and many a slow step
    max_new_tokens: int = 64  # of these samples
    epochs: int = 1
    batch_size: int = 16  # rows an update; KTO takes its reference point from them, so more than one
    eval_every: int = 0  # steps between looks at val_rows; 0: at the end of each epoch
    max_length: int | None = None  # tokens of prompt and response together; None: the model's context

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
    def samples_kl(self) -> bool:
        """Whether a step samples from the policy."""
        return self.kl_coef > 0 or self.target_kl is not None

    def beta_controller(self) -> AdaptiveKLController | FixedKLController:
        """What holds beta: with target_kl, Ziegler's controller, for beta is the price of KL."""
        if self.target_kl is None:
            return FixedKLController(self.beta)
        return AdaptiveKLController(self.beta, self.target_kl, self.beta_horizon)


class DPOTrainer:
    """Trains `model` in place on preferences, by any loss of `DPOSettings`; flat keywords win over settings.

    >>> DPOTrainer(model, beta=0.1).train(rows, epochs=3)   # doctest: +SKIP

    DPO: -logsigmoid(beta [(log pi - log ref)(chosen) - (log pi - log ref)(rejected)]), sums with EOS, ln 2 at
    the start. Its implicit reward beta log(pi / ref) is known up to beta log Z(x): differences alone mean
    something. Chosen log-probs may fall while margins rise. Rafailov et al. 2023.

    ref_model: None: a frozen copy of `model` as it is given, if the loss or a KL needs one. Its log-probs are
    computed once and kept with the data; hand in a `DPODataset` to keep them from call to call.
    loss_fn: the learner's own, called as the loss named in the settings is: for "dpo"
    loss_fn(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=) -> (B,).
    Constrained DPO: kl_coef > 0 adds kl_coef KL(policy || reference), the whole response's, through its
    gradient on the policy's own samples; the loss that is logged is without it. Lesson 2.
    """

    def __init__(
        self, model: nn.Module, ref_model: nn.Module | None = None, tokenizer: Any = None,
        *, settings: DPOSettings | None = None, loss_fn: LossFn | None = None, **changes: Any,
    ) -> None:  # fmt: skip
        """Raise TypeError for a keyword that is no field of DPOSettings, ValueError for a bad value."""
        self.settings = replace(settings or DPOSettings(), **changes)
        self.model, self.tokenizer, self.loss_fn = model, tokenizer or tokenizer_for(model), loss_fn
        if ref_model is model:
            raise ValueError("ref_model is the model that is trained, so KL would stay 0; give a frozen_copy")
        needed = self.settings.samples_kl or OBJECTIVES[self.settings.loss].reads == "ratios"
        self.ref_model = frozen_copy(model) if ref_model is None and needed else ref_model
        self.controller = self.settings.beta_controller()
        self._engine: Engine | None = None
        self._last: DPODataset | None = None

    @property
    def beta(self) -> float:
        """The present beta: the settings', moved by `target_kl`."""
        return self.controller.value

    def dataset(self, rows: Rows | DPODataset) -> DPODataset:
        """Tokenise rows and add the reference's log-probs; a `DPODataset` keeps those that it has."""
        kind = OBJECTIVES[self.settings.loss].kind
        limit = self.settings.max_length or getattr(self.model.config, "max_position_embeddings", None)
        data = rows
        if not isinstance(data, DPODataset):
            data = DPODataset(rows, self.tokenizer, kind=kind, max_length=limit)
            data = self._last if self._last and self._last.checksum == data.checksum else data
        if data.kind != kind:
            raise ValueError(f"loss {self.settings.loss!r} learns from {kind}, these rows are {data.kind}")
        if OBJECTIVES[self.settings.loss].reads == "ratios":
            data.add_reference(self.ref_model)
        self._last = data
        return data

    def train(
        self, rows: Rows | DPODataset, *, val_rows: Rows | DPODataset | None = None,
        epochs: int | None = None, resume: bool = False,
    ) -> History:  # fmt: skip
        """Minimise the mean loss over the rows, `epochs` times over; starts from settings.beta.

        val_rows: evaluated every eval_every steps, or at the end of each epoch. resume: continue from the
        newest checkpoint of settings.run_dir; give model and ref_model as at the start.
        Returns a row a step, measured before its update, by TRL's names: loss, rewards/chosen,
        rewards/rejected, rewards/margins, rewards/accuracies (a tie counts 0), logps/chosen, logps/rejected
        (sums, nats); beta; for KTO kl (its reference point) and no accuracies; where the policy is sampled,
        objective/kl (nats a response, a sum over its tokens) and objective/kl_per_token. Rewards: beta
        log(pi / ref); for "orpo" and "simpo" beta times the mean log-prob, for "slic" the log-prob.
        Raises ValueError as `DPODataset`.
        """
        settings = self.settings if epochs is None else replace(self.settings, epochs=epochs)
        data, val = self.dataset(rows), None if val_rows is None else self.dataset(val_rows)
        self.controller, self._engine = settings.beta_controller(), None
        group = settings.batch_size * settings.accumulation_steps
        per_epoch, planned = -(-len(data) // group), -1
        facts = {"data": data.checksum, "max_length": settings.max_length, "reference": data.reference}
        engine = Engine(
            self.model, settings, total_steps=settings.epochs * per_epoch,
            updates_per_step=settings.accumulation_steps, extra_state={"beta": self.controller},
            must_match=facts,
        )  # fmt: skip
        if resume:
            engine.resume()
        for step in engine.steps():
            epoch, place = divmod(step, per_epoch)
            if epoch != planned:
                plan = epoch_batches(data.lengths, group, seed=[settings.seed, epoch], bucket=True)
                planned = epoch
            row = self._step(engine, data, plan[place])
            due = (step + 1) % (settings.eval_every or per_epoch) == 0 or step + 1 == engine.total_steps
            if val is not None and due:
                row |= self.evaluate(val)
            engine.log(row)
        return engine.history

    def train_step(self, rows: Rows | DPODataset) -> dict[str, float]:
        """One pass over `rows`, an update each settings.batch_size of them; means of the metrics of `train`.

        Constant learning rate, without warm-up; the optimiser's memory and beta last from call to call.
        """
        data = self.dataset(rows)
        if self._engine is None:
            changes = {"schedule": "constant", "warmup_steps": 0, "accumulation_steps": 1}
            self._engine = Engine(self.model, replace(self.settings, **changes, checkpoint_every=0))
        found = History()
        for start in range(0, len(data), self.settings.batch_size):
            group = np.arange(start, min(start + self.settings.batch_size, len(data)))
            found.append(self._step(self._engine, data, group))
            self._engine.step += 1
        return found.to_frame().mean().to_dict()

    def _step(self, engine: Engine, data: DPODataset, group: np.ndarray) -> dict[str, float]:
        prompts = list(dict.fromkeys(data.rows[i]["prompt"] for i in group))
        measured = sampled_kl(engine, self.ref_model, self.tokenizer, prompts)
        row = update(engine, data, group, self.controller.value, self.loss_fn, measured)
        if measured:  # the mean over processes, or each would have a beta of its own
            self.controller.update(engine.accelerator.reduce(measured["kl"], "mean").item(), 1)
        return row

    @torch.no_grad()
    def evaluate(self, rows: Rows | DPODataset) -> dict[str, float]:
        """Loss and metrics as in `train`, on rows that are not trained on, names prefixed with eval_."""
        data, sums = self.dataset(rows), {}
        order, size = np.argsort(data.lengths, kind="stable"), self.settings.batch_size
        for start in range(0, len(order), size):
            group = order[start : start + size]
            found = batch_sums(self.model, data, group, self.settings, self.beta, self.loss_fn)
            sums = {key: sums.get(key, 0.0) + value.item() for key, value in found.items()}
        return {f"eval_{key}": value for key, value in as_means(sums, totals(data, order)).items()}

    def dpo_loss(
        self, policy_chosen_logps: Float[Tensor, "B"], policy_rejected_logps: Float[Tensor, "B"],
        ref_chosen_logps: Float[Tensor, "B"], ref_rejected_logps: Float[Tensor, "B"],
    ) -> Float[Tensor, "B"]:  # fmt: skip
        """`core.preference_losses.dpo_loss` at the present beta and label_smoothing."""
        logps = policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
        return dpo_loss(*logps, beta=self.beta, label_smoothing=self.settings.label_smoothing)

    def get_log_probs(self, prompts: Sequence[str], responses: Sequence[str]) -> Float[Tensor, "B"]:
        """Log p(response | prompt) under the policy: sums with EOS, nats, with gradient."""
        limit = self.settings.max_length
        return sequence_logps(self.model, self.tokenizer, prompts, responses, max_length=limit)[0].sum(-1)

    @torch.no_grad()
    def get_ref_log_probs(self, prompts: Sequence[str], responses: Sequence[str]) -> Float[Tensor, "B"]:
        """The same under the reference, without gradient; ValueError if the loss has none."""
        if self.ref_model is None:
            raise ValueError(f"loss {self.settings.loss!r} has no reference: give ref_model")
        limit = self.settings.max_length
        return sequence_logps(self.ref_model, self.tokenizer, prompts, responses, max_length=limit)[0].sum(-1)

    def save_model(self, folder: str | Path) -> None:
        """Write policy and tokenizer as a Hugging Face folder: `core.models.load_model(folder)` reads it."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def load_model(self, folder: str | Path) -> None:
        """Put saved weights into the policy; the reference stays, optimiser and beta start anew.

        Raises what `core.models.load_model` raises, RuntimeError where the shapes differ.
        """
        first = next(self.model.parameters())
        saved, _ = load_model(folder, device=first.device, dtype=first.dtype)
        self.model.load_state_dict(saved.state_dict())
        self.controller, self._engine = self.settings.beta_controller(), None


def sampled_kl(
    engine: Engine, reference: nn.Module | None, tokenizer: Any, prompts: Sequence[str]
) -> Mapping[str, Tensor]:
    """Sample from the policy and compare with the reference; empty if the settings ask for neither.

    kl: mean of d = sum_t (log pi - log ref) a response, in nats (k1, unbiased); kl_per_token: sum of d over
    sum of tokens; penalty: a number whose gradient is that of kl_coef KL(pi || ref), by REINFORCE with d as
    the cost and the other samples' mean as its baseline, without which it drowns in noise.
    """
    settings: DPOSettings = engine.settings
    if not settings.samples_kl:
        return {}
    asked = [prompts[i % len(prompts)] for i in range(settings.kl_samples)]
    rollout = generate(
        engine.model, tokenizer, asked, max_new_tokens=settings.max_new_tokens, seed=engine.step_seed
    )
    with torch.no_grad():
        ref_logps = rollout_logps(reference, rollout)
    d = (rollout.old_logps - ref_logps).sum(-1)
    measured = {"kl": d.mean(), "kl_per_token": d.sum() / rollout.response_mask.sum()}
    if settings.kl_coef:
        logps = rollout_logps(engine.model, rollout).sum(-1)
        measured["penalty"] = settings.kl_coef * (rloo_advantages(d[None])[0] * logps).mean()
    return measured


def update(
    engine: Engine, data: DPODataset, group: np.ndarray, beta: float, loss_fn: LossFn | None,
    measured: Mapping[str, Tensor], *, own: bool = False,
) -> dict[str, float]:  # fmt: skip
    """All micro-batches of one optimiser step on the rows `group`, their losses scaled to the group's mean.

    own: the data are this process's alone; otherwise all processes hold them and share the group.
    """
    settings: DPOSettings = engine.settings
    parts, over = settings.accumulation_steps, totals(data, group)
    rank, ranks = (0, 1) if own else (engine.accelerator.process_index, engine.accelerator.num_processes)
    sums: dict[str, float] = {}
    for place, part in enumerate(np.array_split(group, parts)):
        mine = part[rank::ranks]
        # A small last batch leaves some process (or part) idle: it computes with weight 0.
        batch = mine if len(mine) else group[:1]
        share = ranks * (len(mine) > 0)  # ranks: the engine takes the mean over processes
        found = batch_sums(engine.model, data, batch, settings, beta, loss_fn)
        loss = found["loss"] * (share / over["loss"])
        if "penalty" in measured and place == 0:
            loss = loss + measured["penalty"]
        engine.update(loss * parts, rows=group.tolist())
        sums = {key: sums.get(key, 0.0) + value.item() * share for key, value in found.items()}
    sampled = {f"objective/{key}": value.item() for key, value in measured.items() if key != "penalty"}
    return as_means(sums, over) | {"beta": beta} | sampled

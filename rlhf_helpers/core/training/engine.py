"""The engine that every loop holds: backward, clip, step, schedule, log, save, resume.

A loop shows its algorithm and hands the rest to the engine. Three counters, never mixed up:
a *step* is one turn of the loop (what `steps` yields and the history counts), an *update* is one backward
pass over one micro-batch, an *optimiser step* changes the weights after `accumulation_steps` updates.
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from rlhf_helpers.core.training import checkpoints, parallel
from rlhf_helpers.core.training.history import History
from rlhf_helpers.core.training.progress import progress_bar
from rlhf_helpers.core.training.settings import (
    RANK_STRIDE,
    TrainingSettings,
    get_random_state,
    learning_rate_factor,
    set_random_state,
    set_seed,
)  # fmt: skip

logger = logging.getLogger(__name__)

# What may change between a run and its continuation without changing a single weight.
FREE_ON_RESUME = ("gradient_checkpointing", "checkpoint_every", "keep_checkpoints", "run_dir", "progress")


class Engine:
    """Trains one module; several together go in as `nn.ModuleDict({"policy": ..., "value_head": ...})`.

    The loop calls the modules themselves, not a wrapper, so it may generate, read hidden states or run
    several forwards per update. In a run of several processes (`accelerate launch`, `torchrun`) the engine
    copies the weights of rank 0 at the start and averages the gradients before each optimiser step.
    Trainable weights held in half precision are turned into float32: small steps vanish in bf16.
    """

    def __init__(
        self, model: torch.nn.Module, settings: TrainingSettings,
        *, total_steps: int | None = None, updates_per_step: int = 1,
        extra_state: Mapping[str, Any] | None = None, must_match: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Seed, place the model, make the optimiser.

        total_steps: turns of the loop; None only with the constant schedule and without `steps`.
        updates_per_step: calls of `update` in one turn (epochs x minibatches in PPO); fixes the schedule.
        extra_state: name -> object with state_dict/load_state_dict (KL controller, sampler), saved along.
        must_match: further facts (batch size, beta, number of rows) that a resumed run must share.
        Raises ValueError for a schedule without an end, a model without trainable weights.
        """
        self.model, self.settings = model, settings
        self.total_steps, self.updates_per_step = total_steps, updates_per_step
        self.extra_state, self.must_match = dict(extra_state or {}), dict(must_match or {})
        self.history = History()
        self.step = self.optimizer_steps = 0
        self.grad_norm: float | None = None
        self.rows: list[int] | None = None  # indices of this process's rows in the present batch
        self.last_checkpoint: Path | None = None
        self._pending, self._may_start, self._bar = 0, False, None
        self._order: dict[tuple[int, int], np.ndarray] = {}
        self._total_optimizer_steps = self._count_optimizer_steps()
        set_seed(settings.seed)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("the model has no trainable weights: set requires_grad on what is to learn")
        self._place_model()
        self.optimizer = self._make_optimizer()

    def _count_optimizer_steps(self) -> int | None:
        if self.total_steps is None:
            if self.settings.schedule != "constant":
                raise ValueError("total_steps is missing: give it, or choose schedule='constant'")
            return None
        for name in ("total_steps", "updates_per_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1; got {getattr(self, name)}")
        total = math.ceil(self.total_steps * self.updates_per_step / self.settings.accumulation_steps)
        if self.settings.warmup_steps >= total:
            raise ValueError(f"warmup_steps {self.settings.warmup_steps} must be < {total} optimiser steps")
        return total

    def _place_model(self) -> None:
        """Choose device and precision; equal weights on every process."""
        home = self.parameters[0].device
        native_bf16 = home.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        self.precision = self.settings.mixed_precision or ("bf16" if native_bf16 else "no")
        self.accelerator = parallel.make_accelerator()
        several = self.accelerator.num_processes > 1
        self.device = self.accelerator.device if several else home  # alone, the model stays where it was put
        self.model.to(self.device)
        half = [p for p in self.parameters if p.dtype in (torch.bfloat16, torch.float16)]
        for parameter in half:
            parameter.data = parameter.data.float()
        if half:
            logger.info("%d trainable tensors turned from half precision into float32", len(half))
        if several:
            parallel.copy_from_first(self.model)
        self._enter_training()

    def _enter_training(self) -> None:
        """Train mode (gradient checkpointing needs it: dropout off means p = 0), autocast, checkpointing."""
        self.model.train()
        several = isinstance(self.model, (torch.nn.ModuleDict, torch.nn.ModuleList))
        self._roots = list(self.model.children()) if several else [self.model]
        for root in self._roots if self.precision == "bf16" else ():
            parallel.enter_autocast(root, self.device)
        if self.settings.gradient_checkpointing:
            parallel.enable_gradient_checkpointing(self.model)

    def _leave_training(self) -> None:
        for root in self._roots:
            parallel.leave_autocast(root)
        if self.settings.gradient_checkpointing:
            parallel.disable_gradient_checkpointing(self.model)

    def _make_optimizer(self) -> torch.optim.AdamW:
        """AdamW; weight decay on matrices only, since biases and norms have no size to keep in check."""
        matrices = [p for p in self.parameters if p.ndim >= 2]
        others = [p for p in self.parameters if p.ndim < 2]
        decays = ((matrices, self.settings.weight_decay), (others, 0.0))
        groups = [{"params": parameters, "weight_decay": decay} for parameters, decay in decays if parameters]
        options = {"betas": self.settings.betas, "fused": self.device.type in ("cpu", "cuda")}
        return torch.optim.AdamW(groups, lr=self.settings.learning_rate, **options)

    def steps(self) -> Iterator[int]:
        """Yield the step numbers still to do; draw the bar, write checkpoints, step on what is left over."""
        if self.total_steps is None:
            raise ValueError("steps() needs total_steps")
        self._refuse_foreign_checkpoints()
        self._enter_training()
        shown = self.settings.progress and self.accelerator.is_main_process
        self._bar = bar = progress_bar(self.total_steps, start=self.step, shown=shown)
        every, last_save = self.settings.checkpoint_every, self.step
        try:
            while self.step < self.total_steps:
                yield self.step
                self.step += 1
                if self.step == self.total_steps and self._pending:
                    self._optimizer_step()
                due = every and (self.step - last_save >= every or self.step == self.total_steps)
                if due and not self._pending:  # half an accumulated gradient cannot be saved
                    self.save()
                    last_save = self.step
                row = self.history[-1] if self.history else {}
                bar.set_postfix({k: row[k] for k in ("loss", "grad_norm") if k in row}, refresh=False)
                bar.update()
        finally:
            bar.close()
            self._leave_training()

    def batch(self, dataset: Sequence[Any], size: int) -> list[Any]:
        """Rows of this step, this process's share: `size` rows over all processes, in seeded order.

        Row i of the stream is place i mod n of a permutation drawn from (seed, i div n), so the batch is a
        function of (seed, step) alone: every row once an epoch, and a resumed run sees what it would have.
        Raises TypeError for a dict of columns, ValueError if size exceeds the data or the processes do not
        divide it.
        """
        if isinstance(dataset, Mapping):
            raise TypeError("batch needs rows (a list of dicts or a datasets.Dataset); got a dict of columns")
        count, ranks = len(dataset), self.accelerator.num_processes
        if not 1 <= size <= count:
            raise ValueError(f"batch size must be between 1 and the {count} rows there are; got {size}")
        if size % ranks:
            raise ValueError(f"batch size {size} must be a multiple of the {ranks} processes")
        start = self.step * size
        places = range(start + self.accelerator.process_index, start + size, ranks)
        self.rows = [int(self._permutation(place // count, count)[place % count]) for place in places]
        return [dataset[row] for row in self.rows]

    def _permutation(self, epoch: int, count: int) -> np.ndarray:
        if (epoch, count) not in self._order:
            self._order = dict(list(self._order.items())[-3:])  # a batch may straddle two epochs
            self._order[epoch, count] = np.random.default_rng([self.settings.seed, epoch]).permutation(count)
        return self._order[epoch, count]

    def update(self, loss: torch.Tensor, *, rows: Sequence[int] | None = None) -> float | None:
        """Backward of one micro-batch; every `accumulation_steps` calls one optimiser step.

        loss: scalar, the mean over this micro-batch; gradients are averaged over micro-batches and processes.
        rows: indices named in the error if the loss is not finite (`batch` notes its own).
        Returns the gradient norm before clipping if the optimiser stepped, else None.
        Raises FloatingPointError before any weight is touched if loss or gradient norm is not finite.
        """
        if rows is not None:
            self.rows = list(rows)
        if loss.ndim or not loss.requires_grad:
            raise ValueError(f"loss must be a scalar that requires grad; got {loss.detach()!r}")
        if not math.isfinite(loss.item()):
            self._stop("loss", loss.item())
        self.accelerator.backward(loss / self.settings.accumulation_steps)
        self._pending += 1
        return self._optimizer_step() if self._pending == self.settings.accumulation_steps else None

    def _optimizer_step(self) -> float:
        if self._total_optimizer_steps is not None and self.optimizer_steps >= self._total_optimizer_steps:
            raise ValueError(
                f"more than the {self._total_optimizer_steps} planned optimiser steps: state updates_per_step"
            )
        missing = self.settings.accumulation_steps / self._pending
        parallel.average_gradients(self.parameters, self.accelerator, scale=missing)
        self._pending = 0
        norm = get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        self.grad_norm = norm.item()
        if not math.isfinite(self.grad_norm):
            self._stop("gradient norm", self.grad_norm)
        if self.settings.max_grad_norm is not None:
            clip_grads_with_norm_(self.parameters, self.settings.max_grad_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer_steps += 1
        return self.grad_norm

    @property
    def step_seed(self) -> int:
        """Seed of this step's sampling, of (seed, process, step) alone: a resumed run draws the same text."""
        seed = self.settings.seed + RANK_STRIDE * self.accelerator.process_index
        return int(np.random.default_rng([seed, self.step]).integers(2**31))

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next optimiser step."""
        factor = learning_rate_factor(self.optimizer_steps, self.settings, self._total_optimizer_steps)
        return self.settings.learning_rate * factor

    def _stop(self, what: str, value: float) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self._pending = 0
        if self._bar is not None:
            self._bar.close()  # the traceback keeps the loop, and with it the bar, alive
        saved = self.last_checkpoint or "none (set run_dir and checkpoint_every)"
        raise FloatingPointError(
            f"{what} is {value} at step {self.step} (rows {self.rows}); the weights are untouched. "
            f"Last good checkpoint: {saved}. Look at these rows, or lower learning_rate"
        )

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Append one row to the history, with step, learning rate and gradient norm.

        Whole numbers and text are kept as they are; floats of several processes are averaged, so each must
        log the same names. grad_norm is the last optimiser step's, before clipping.
        """
        common = {"learning_rate": self.optimizer.param_groups[0]["lr"]}
        if self.grad_norm is not None:
            common["grad_norm"] = self.grad_norm
        self.history.append({"step": self.step, **metrics, **common})
        if self.accelerator.num_processes > 1:
            row = self.history.rows[-1]
            names = [name for name, value in row.items() if isinstance(value, float)]
            values = torch.tensor([row[name] for name in names], dtype=torch.float64, device=self.device)
            row.update(zip(names, self.accelerator.reduce(values, "mean").tolist(), strict=True))

    def save(self) -> Path:
        """Write a checkpoint of everything that the rest of the run depends on; return its folder.

        Raises ValueError without run_dir or between two halves of an accumulated gradient, TypeError for an
        extra state that holds more than tensors, numbers, text, lists, tuples and dicts.
        """
        if self.settings.run_dir is None or self._pending:
            raise ValueError(f"save needs run_dir, and no gradient under way ({self._pending} updates are)")
        extra = {name: item.state_dict() for name, item in self.extra_state.items()}
        own = {"extra": checkpoints.plain_copy("extra_state", extra), "random": get_random_state(self.device)}
        state = {
            "optimizer": self.optimizer.state_dict(),
            "optimizer_steps": self.optimizer_steps,
            "processes": gather_object([own]),  # each samples its own text, so each has its own state
        }
        facts = self._facts()
        manifest = {"fingerprint": _fingerprint(facts), "facts": facts, "history": self.history.rows}
        manifest["settings"] = _as_json(asdict(self.settings))
        run_dir, keep = Path(self.settings.run_dir), self.settings.keep_checkpoints
        if self.accelerator.is_main_process:
            checkpoints.write_checkpoint(run_dir, self.step, self.model, state, manifest, keep=keep)
        self.accelerator.wait_for_everyone()
        self.last_checkpoint = checkpoints.folder_of(run_dir, self.step)
        return self.last_checkpoint

    def resume(self) -> Path | None:
        """Go on from the newest complete checkpoint of run_dir and return it; None (fresh start) if none is.

        Model, optimiser, schedule, random states, history, data position and extra states are as they were:
        on CPU the run ends bit for bit as if it had never stopped. Raises ValueError naming each setting that
        differs and would change the result; where to save, how often and the bar may differ.
        """
        if self.settings.run_dir is None:
            raise ValueError("resume needs TrainingSettings.run_dir")
        self._may_start = True
        path = checkpoints.newest_checkpoint(Path(self.settings.run_dir))
        if path is None:
            return None
        manifest = checkpoints.read_manifest(path)
        self._refuse_other_run(path, manifest)
        state = checkpoints.read_checkpoint(path, self.model)
        self.optimizer.load_state_dict(state["optimizer"])
        self.optimizer_steps, self.step = state["optimizer_steps"], manifest["step"]
        own = state["processes"][self.accelerator.process_index]
        for name, item in self.extra_state.items():
            item.load_state_dict(own["extra"][name])
        self.history.rows[:] = manifest["history"]
        self.last_checkpoint = path
        set_random_state(own["random"], self.device)
        return path

    def _facts(self) -> dict[str, Any]:
        """Everything outside model and data that decides the result."""
        facts = {key: value for key, value in asdict(self.settings).items() if key not in FREE_ON_RESUME}
        if self.settings.schedule != "constant":  # a constant run may be prolonged, a decaying one may not
            facts["total_steps"] = self.total_steps
        facts |= {"updates_per_step": self.updates_per_step, "extra_state": sorted(self.extra_state)}
        facts |= {"precision": self.precision, "num_processes": self.accelerator.num_processes}
        return _as_json(facts | self.must_match)

    def _refuse_other_run(self, path: Path, manifest: Mapping[str, Any]) -> None:
        facts, saved = self._facts(), manifest["facts"]
        if _fingerprint(facts) == manifest["fingerprint"]:
            return
        fields = [name for name in {**saved, **facts} if saved.get(name) != facts.get(name)]
        told = "; ".join(f"{name} was {saved.get(name)!r}, now {facts.get(name)!r}" for name in fields)
        raise ValueError(f"{path} belongs to another run: {told}. Use the old values or another run_dir")

    def _refuse_foreign_checkpoints(self) -> None:
        """A fresh run must not mix its checkpoints with those of an older one."""
        if not self.settings.checkpoint_every or self._may_start or self.step:
            return
        found = checkpoints.checkpoints(Path(self.settings.run_dir))
        if found and self.accelerator.is_main_process:
            raise FileExistsError(f"{found[-1]} is there already: call resume(), or use another run_dir")


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value, sort_keys=True, default=str))


def _fingerprint(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

"""The engine of every loop: backward, optimizer step, schedule, log, checkpoints, resume.

A loop shows its algorithm and leaves the rest to the engine. Three words are kept apart:

    step              one turn of the loop: `steps` yields it, and the history has one row per step
    update            the work on one batch: a backward pass for each micro-batch, then one optimizer step
    optimizer step    the one change of the weights that ends an update

A step may hold several updates, as in PPO, so steps and optimizer steps are counted separately.

    engine = Engine(model, settings, total_steps=100)
    for step in engine.steps():
        engine.backward(loss)        # once per micro-batch
        engine.optimizer_step()
        engine.log({"loss": ...})
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from rlhf_helpers.core.lora import add_lora, forget_base_name
from rlhf_helpers.core.training import distributed, progress
from rlhf_helpers.core.training.history import History
from rlhf_helpers.core.training.interrupts import RunInterrupted, stop_signals
from rlhf_helpers.core.training.resume import resume_run, run_folder_of, save_run
from rlhf_helpers.core.training.settings import (
    RANK_STRIDE,
    TrainingSettings,
    learning_rate_factor,
    resolve_learning_rate,
    set_seed,
)
from rlhf_helpers.core.training.tracking import open_tracker


class Engine:
    """Trains one module; several together go in as `nn.ModuleDict({"policy": ..., "value_head": ...})`.

    The loop calls the modules themselves, not a wrapper, so it may generate, read hidden states or run
    several forward passes per batch. In a run of several processes (`torchrun`, `accelerate launch`) the
    weights of rank 0 are copied to all of them at the start, and the gradient is the sum over the processes.
    Trainable weights in half precision are turned into float32: small steps vanish in bf16.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        settings: TrainingSettings,
        *,
        total_steps: int | None = None,
        optimizer_steps_per_step: int = 1,
        extra_state: Mapping[str, Any] | None = None,
        resume_must_match: Mapping[str, Any] | None = None,
    ) -> None:
        """Add the adapters, choose the learning rate, seed, place the model, make the optimizer.

        Args:
            model: what is trained, in place.
            settings: of the loop.
            total_steps: turns of the loop; None only with the constant schedule and without `steps`.
            optimizer_steps_per_step: epochs x minibatches in PPO; with total_steps it fixes the schedule.
            extra_state: name -> object with state_dict and load_state_dict (a KL controller), saved along.
            resume_must_match: further facts (batch size, beta, rows) that a resumed run must share.

        Raises:
            ValueError: a schedule without an end, or a model without trainable weights.
        """
        self.model = model
        if settings.lora:
            add_lora(model, settings.lora)
        forget_base_name(model)
        total = None
        if total_steps is not None:
            total = total_steps * optimizer_steps_per_step
            if settings.warmup_steps >= total:
                raise ValueError(f"warmup_steps {settings.warmup_steps} must be < {total} optimizer steps")
        elif settings.schedule != "constant":
            raise ValueError("total_steps is missing: give it, or choose schedule='constant'")
        self.settings: Any = settings
        self.learning_rate = resolve_learning_rate(settings, model)  # the peak
        self.total_steps = total_steps
        self._total_optimizer_steps = total
        self.optimizer_steps_per_step = optimizer_steps_per_step
        self.extra_state = dict(extra_state or {})
        self.resume_must_match = dict(resume_must_match or {})
        self.history = History()
        self.step = 0
        self.optimizer_steps = 0
        self.grad_norm: float | None = None
        self.rows: list[int] | None = None  # indices of this process's rows in the present batch
        # Of the data: a prompt, with answers to score or none. A view shows what the model makes of it.
        self.example: tuple[str, Sequence[str]] | None = None
        self._view = None
        self._tracker = None
        set_seed(settings.seed)
        self._place_model()
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = self._make_optimizer()
        self.run_dir: Any = None if settings.run_dir is None else Path(settings.run_dir)
        self.last_checkpoint: Path | None = None

    def _place_model(self) -> None:
        """Choose device and precision; spread the weights over the processes."""
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        if not trainable:
            raise ValueError("the model has no trainable weights: set requires_grad on what is to learn")
        home = trainable[0].device
        native_bf16 = home.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        self.precision = self.settings.mixed_precision or ("bf16" if native_bf16 else "no")
        self.accelerator = distributed.make_accelerator(self.precision)
        several = isinstance(self.model, (torch.nn.ModuleDict, torch.nn.ModuleList))
        self._roots = list(self.model.children()) if several else [self.model]
        for parameter in trainable:
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()
        if self.accelerator.num_processes == 1:
            self.device = home  # alone, the model stays where it was put
        else:
            self.device = self.accelerator.device
            for root in self._roots:
                if not distributed.is_distributed(root):
                    root.to(self.device)
                    distributed.distribute(root, shard=self.settings.shard)
        self._enter_training()

    def _enter_training(self) -> None:
        """Train mode (gradient checkpointing needs it: dropout off means p = 0), autocast, checkpointing."""
        self.model.train()
        for root in self._roots if self.precision == "bf16" else ():
            self.accelerator.prepare_model(root, device_placement=False, evaluation_mode=True)
        if self.settings.gradient_checkpointing:
            distributed.enable_gradient_checkpointing(self.model)

    def _leave_training(self) -> None:
        for root in self._roots if self.precision == "bf16" else ():
            self.accelerator.unwrap_model(root, keep_fp32_wrapper=False)
            root.__dict__.pop("_is_accelerate_prepared", None)
        if self.settings.gradient_checkpointing:
            distributed.disable_gradient_checkpointing(self.model)

    def _make_optimizer(self) -> torch.optim.AdamW:
        """AdamW; weight decay on matrices only, since biases and norms have no size to keep in check."""
        matrices = [p for p in self.parameters if p.ndim >= 2]
        others = [p for p in self.parameters if p.ndim < 2]
        decays = ((matrices, self.settings.weight_decay), (others, 0.0))
        groups = [{"params": parameters, "weight_decay": decay} for parameters, decay in decays if parameters]
        options = {"betas": self.settings.betas, "fused": self.device.type in ("cpu", "cuda")}
        return torch.optim.AdamW(groups, lr=self.learning_rate, **options)

    def steps(self) -> Iterator[int]:
        """Yield the numbers of the steps still to do; show progress and write checkpoints.

        Ctrl-C, or "interrupt" in Jupyter, ends the run after the present step; a second one acts at once.
        With checkpoint_every the run then has a checkpoint, and SIGTERM does the same.

        Raises:
            FileExistsError: run_dir holds checkpoints of an older run, or another run writes there.
            OSError: cannot write to run_dir; raised before the first step.
            RunInterrupted: a KeyboardInterrupt, after a signal; its `history` holds the finished steps.
        """
        if self.total_steps is None:
            raise ValueError("steps() needs total_steps")
        every = self.settings.checkpoint_every
        is_main = self.accelerator.is_main_process
        with ExitStack() as at_end:  # in reverse order, whatever ends the loop
            if every or self.settings.log:
                at_end.enter_context(run_folder_of(self))
            if self.settings.log and is_main:
                self._tracker = open_tracker(self.settings.log, self.run_dir, self.history)
                at_end.callback(self._tracker.finish)
            signals = at_end.enter_context(stop_signals(saves=bool(every)))
            self._enter_training()
            at_end.callback(self._leave_training)
            hidden = not (self.settings.progress and is_main) or progress.bars_are_off()
            self._view = view = progress.view_class(self, hidden=hidden)
            at_end.callback(view.close)
            last_save = self.step
            while self.step < self.total_steps:
                yield self.step
                self.step += 1
                # All processes stop after the same step, whichever of them received the signal.
                stop = self.sum(len(signals)) > 0
                if every and (self.step - last_save >= every or self.step == self.total_steps or stop):
                    self.save()
                    last_save = self.step
                view.advance()
                if stop and self.step < self.total_steps:
                    raise self._interrupted()

    def _interrupted(self) -> RunInterrupted:
        """Say where the run stopped and how to go on."""
        again = "run the cell again" if progress.IN_NOTEBOOK else "run it again"
        message = f"stopped at step {self.step} of {self.total_steps}; {again} to start fresh"
        if self.settings.checkpoint_every:
            message += f", or pass resume=True to continue from the checkpoint {self.last_checkpoint}"
        else:
            message += " (the rows so far: import sys; sys.last_value.history)"
        return RunInterrupted(message, self.history)

    def batch(self, count: int, size: int) -> list[int]:
        """Return the indices of this process's share of this step's rows, in seeded order.

        A step takes `size` of `count` rows, over all processes.

        Row i of the stream has index i mod n in a permutation drawn from (seed, i div n), so the batch is a
        function of (seed, step) alone: every row once per epoch, and a resumed run sees what it would have.

        Raises:
            ValueError: size exceeds the data, or is not a multiple of the number of processes.
        """
        processes = self.accelerator.num_processes
        if not 1 <= size <= count:
            raise ValueError(f"batch size must be between 1 and the {count} rows there are; got {size}")
        if size % processes:
            raise ValueError(f"batch size {size} must be a multiple of the {processes} processes")
        start = self.step * size
        stream = np.arange(start + self.accelerator.process_index, start + size, processes)
        epochs, places = np.divmod(stream, count)
        rows = []
        for epoch in np.unique(epochs):  # a batch may straddle two epochs
            order = np.random.default_rng([self.settings.seed, epoch]).permutation(count)
            rows += order[places[epochs == epoch]].tolist()
        self.rows = rows
        return rows

    def backward(self, loss: torch.Tensor, *, rows: Sequence[int] | None = None) -> None:
        """Add the gradient of one micro-batch; gradients of micro-batches and processes are summed.

        So a loop that wants the mean over a batch divides each loss by the size of the whole batch.

        Args:
            loss: a scalar with a graph.
            rows: indices of the data behind it, for the message of a loss that is not finite.

        Raises:
            FloatingPointError: the loss is not finite; names step, rows and the last good checkpoint.
        """
        if rows is not None:
            self.rows = list(rows)
        if loss.ndim or not loss.requires_grad:
            raise ValueError(f"loss must be a scalar that requires grad; got {loss.detach()!r}")
        if not math.isfinite(loss.item()):
            self._stop("loss", loss.item())
        self.accelerator.backward(loss)

    def optimizer_step(self) -> float:
        """Clip the gradient, set the learning rate, change the weights; return the norm before clipping."""
        if self._total_optimizer_steps is not None and self.optimizer_steps >= self._total_optimizer_steps:
            raise ValueError(
                f"more than the {self._total_optimizer_steps} planned optimizer steps: "
                "state optimizer_steps_per_step"
            )
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if not gradients:
            raise ValueError(
                "no weight has a gradient: call backward first. In a run of several processes the model must "
                "return tensors, tuples, dicts or a transformers ModelOutput: FSDP sees no gradient in others"
            )
        norm = distributed.whole(get_total_norm(gradients))
        self.grad_norm = norm.item()
        if not math.isfinite(self.grad_norm):
            self._stop("gradient norm", self.grad_norm)
        if self.settings.max_grad_norm is not None:
            clip_grads_with_norm_(self.parameters, self.settings.max_grad_norm, norm)
        factor = learning_rate_factor(self.optimizer_steps, self.settings, self._total_optimizer_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer_steps += 1
        return self.grad_norm

    def sum(self, value: torch.Tensor | float) -> float:
        """Add up a number over the processes."""
        if self.accelerator.num_processes == 1:
            return float(value)  # an Apple GPU has no float64
        number = torch.as_tensor(value, dtype=torch.float64).detach().to(self.device)
        return self.accelerator.reduce(number, "sum").item()  # pyright: ignore[reportAttributeAccessIssue]

    def mean(self, value: torch.Tensor | float) -> float:
        """Average a number over the processes, so that all of them decide alike."""
        return self.sum(value) / self.accelerator.num_processes

    @property
    def step_seed(self) -> int:
        """Seed of this step's sampling, of (seed, process, step) alone: a resumed run draws the same text."""
        seed = self.settings.seed + RANK_STRIDE * self.accelerator.process_index
        return int(np.random.default_rng([seed, self.step]).integers(2**31))

    def is_due(self, every: int) -> bool:
        """Whether this step is the last of `every` steps, or of the run: time to evaluate."""
        done = self.step + 1
        return done % every == 0 or done == self.total_steps

    def _stop(self, what: str, value: float) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        if self._view is not None:
            self._view.close()  # the traceback keeps the loop, and with it the view, alive
        saved = self.last_checkpoint or "none (set run_dir and checkpoint_every)"
        raise FloatingPointError(
            f"{what} is {value} at step {self.step} (rows {self.rows}); the weights are untouched. "
            f"Last good checkpoint: {saved}. Look at these rows, or lower learning_rate"
        )

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Append one row to the history, with step, learning rate and gradient norm.

        Whole numbers and text are kept as they are; floats of several processes are averaged, so each must
        log the same names. grad_norm is the last optimizer step's, before clipping.
        """
        row = {"step": self.step, **metrics, "learning_rate": self.optimizer.param_groups[0]["lr"]}
        if self.grad_norm is not None:
            row["grad_norm"] = self.grad_norm
        for name, value in row.items():
            if isinstance(value, np.generic) or (isinstance(value, torch.Tensor) and value.numel() == 1):
                row[name] = value.item()
            if not isinstance(row[name], (bool, int, float, str)):
                raise TypeError(f"metric {name!r} must be one number or text; got {value!r}")
        if self.accelerator.num_processes > 1:
            names = [name for name, value in row.items() if isinstance(value, float)]
            values = torch.tensor([row[name] for name in names], dtype=torch.float64, device=self.device)
            row.update(zip(names, self.accelerator.reduce(values, "mean").tolist(), strict=True))  # pyright: ignore[reportAttributeAccessIssue]
        self.history.append(row)
        if self._tracker is not None:
            self._tracker.log(row, step=self.step)

    def save(self) -> Path:
        """Write a checkpoint of everything that the rest of the run depends on; return its folder.

        Raises:
            ValueError: without run_dir, or between the micro-batches of an optimizer step.
            TypeError: an extra state holds more than tensors, numbers, text, lists, tuples and dicts.
            OSError: it could not be written; names the folder, and earlier checkpoints stay whole.
        """
        if self.run_dir is None:
            raise ValueError("save needs TrainingSettings.run_dir")
        if any(p.grad is not None for p in self.parameters):
            raise ValueError("save comes after optimizer_step: half an accumulated gradient cannot be saved")
        self.last_checkpoint = save_run(self)
        return self.last_checkpoint

    def resume(self) -> Path | None:
        """Go on from the newest whole checkpoint of run_dir and return it.

        Model, optimizer, schedule, random states, history, data position and extra states are as they were:
        on CPU the run ends bit for bit as if it had never stopped.

        Returns:
            The checkpoint's folder; None (fresh start) if there is none.

        Raises:
            ValueError: a setting differs that would change the result; names it. Where to save, how often
                and the bar may differ.
        """
        if self.run_dir is None:
            raise ValueError("resume needs TrainingSettings.run_dir")
        self.last_checkpoint = resume_run(self)
        return self.last_checkpoint

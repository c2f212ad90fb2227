"""The folder of a run: who writes there, what a checkpoint holds, and which run may go on from it."""

import json
import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from filelock import FileLock, Timeout

from rlhf_helpers.core.training import checkpoints, distributed

if TYPE_CHECKING:
    from rlhf_helpers.core.training.engine import Engine

# What may change between a run and its continuation without changing a single weight.
FREE_ON_RESUME = (
    "gradient_checkpointing",
    "checkpoint_every",
    "keep_checkpoints",
    "run_dir",
    "progress",
    "log",
    "shard",
)
ABSENT = "absent (another version of rlhf_helpers)"  # of a setting that was added or dropped since


@contextmanager
def run_folder_of(engine: "Engine") -> Iterator[None]:
    """Keep the folder of a run for this engine within the block; a lock keeps a second run out.

    Raises:
        OSError: cannot write to the folder.
        FileExistsError: another run writes there, or it holds checkpoints that this one did not write or
            resume.
    """
    if not engine.accelerator.is_main_process:
        yield
        return
    folder = engine.run_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise FileExistsError(
            f"another run writes to {folder} now: wait for it, or choose another run_dir"
        ) from None
    except OSError as error:
        raise OSError(f"cannot write to run_dir {folder}, so no checkpoint can be saved: {error}") from error
    try:
        saved = checkpoints.checkpoints(folder)
        if saved and engine.last_checkpoint is None:
            raise FileExistsError(f"{saved[-1]} already exists: call resume(), or use another run_dir")
        yield
    finally:
        lock.release()


def save_run(engine: "Engine") -> Path:
    """Write what `Engine.save` promises."""
    extra = {name: item.state_dict() for name, item in engine.extra_state.items()}
    local_state = {
        "extra": checkpoints.plain_copy("extra_state", extra),
        "random": get_random_state(engine.device),
    }
    state = {
        "optimizer": distributed.full_optimizer_state(engine.optimizer),
        "optimizer_steps": engine.optimizer_steps,
        "processes": gather_object([local_state]),  # each process samples its own text
    }
    weights = distributed.full_weights(engine.model)
    manifest = {"run_config": run_config(engine), "history": list(engine.history)}
    if engine.accelerator.is_main_process:
        keep = engine.settings.keep_checkpoints
        checkpoints.write_checkpoint(engine.run_dir, engine.step, weights, state, manifest, keep=keep)
    engine.accelerator.wait_for_everyone()
    return checkpoints.folder_of(engine.run_dir, engine.step)


def resume_run(engine: "Engine") -> Path | None:
    """Put the engine where its newest whole checkpoint left it; see `Engine.resume`."""
    path = checkpoints.newest_checkpoint(engine.run_dir)
    if path is None:
        return None
    manifest = checkpoints.read_manifest(path)
    saved, config = manifest["run_config"], run_config(engine)
    # A setting that only one version has differs too, even if its value is None.
    differences = [
        f"{name} was {saved.get(name, ABSENT)}, now {config.get(name, ABSENT)}"
        for name in {**saved, **config}
        if saved.get(name, ABSENT) != config.get(name, ABSENT)
    ]
    if differences:
        raise ValueError(
            f"{path} belongs to another run: {'; '.join(differences)}. Use the old values or another run_dir"
        )
    weights, state = checkpoints.read_checkpoint(path)
    distributed.load_full_weights(engine.model, weights)
    distributed.load_full_optimizer_state(engine.optimizer, state["optimizer"])
    engine.optimizer_steps = state["optimizer_steps"]
    engine.step = manifest["step"]
    engine.history[:] = manifest["history"]
    local_state = state["processes"][engine.accelerator.process_index]
    for name, item in engine.extra_state.items():
        item.load_state_dict(local_state["extra"][name])
    set_random_state(local_state["random"], engine.device)
    return path


def run_config(engine: "Engine") -> dict[str, Any]:
    """Return everything outside model and data that decides the result of a run."""
    fields = {**asdict(engine.settings), "learning_rate": engine.learning_rate}
    config = {name: value for name, value in fields.items() if name not in FREE_ON_RESUME}
    if engine.settings.schedule != "constant":  # a constant run may be prolonged, a decaying one may not
        config["total_steps"] = engine.total_steps
    config["optimizer_steps_per_step"] = engine.optimizer_steps_per_step
    config["extra_state"] = sorted(engine.extra_state)
    config["precision"] = engine.precision
    config["num_processes"] = engine.accelerator.num_processes
    # As it is read back from the manifest: tuples are lists there, and paths texts.
    return json.loads(json.dumps(config | engine.resume_must_match, default=str))


def checksum(data: Any) -> int:
    """Return the CRC-32 of tokens, labels or texts: a run must not be resumed on other data."""
    return zlib.crc32(repr(data).encode())


def fingerprint(model: torch.nn.Module) -> str:
    """Name a model by its weights: log-probs of one reference must not be taken for another's."""
    return f"{sum(p.detach().double().abs().sum().item() for p in model.parameters()):.10g}"


def get_random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of every random generator of this process, as tensors, numbers and lists."""
    kind, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": [kind, keys.tolist(), *rest]}  # pyright: ignore[reportAttributeAccessIssue]
    state["torch"] = torch.get_rng_state()
    if device.type in ("cuda", "mps"):
        state["device"] = getattr(torch, device.type).get_rng_state()
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what `get_random_state` returned."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "device" in state and device.type in ("cuda", "mps"):
        getattr(torch, device.type).set_rng_state(state["device"])

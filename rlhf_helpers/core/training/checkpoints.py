"""Checkpoints that are whole or absent: written beside, flushed to disk, then renamed.

A checkpoint is a folder `step-00000120` with model.safetensors, state.pt (optimiser, random states, extra
state; read with weights_only, so that no file can run code) and manifest.json (settings, history, sizes).
"""

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model

PLAIN = (torch.Tensor, int, float, bool, str, type(None))


def write_checkpoint(
    run_dir: Path, step: int, model: torch.nn.Module, state: dict, manifest: dict, *, keep: int
) -> Path:
    """Write one checkpoint atomically, then drop all but the `keep` newest; return its folder."""
    final = folder_of(run_dir, step)
    for leftover in run_dir.glob(".step-*"):  # a process killed while saving leaves one behind
        shutil.rmtree(leftover)
    if final.exists() and is_complete(final):
        return final
    partial = run_dir / f".step-{step:08d}.{os.getpid()}"
    partial.mkdir(parents=True)
    save_model(model, str(partial / "model.safetensors"))
    torch.save(state, partial / "state.pt")
    sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
    text = json.dumps({"step": step, "files": sizes, **manifest}, indent=1)
    (partial / "manifest.json").write_text(text, encoding="utf-8")
    for file in (*partial.iterdir(), partial):
        _flush(file)
    if final.exists():
        shutil.rmtree(final)
    os.replace(partial, final)
    _flush(run_dir)
    for old in [path for path in checkpoints(run_dir) if is_complete(path)][:-keep]:
        shutil.rmtree(old)
    return final


def folder_of(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lives."""
    return run_dir / f"step-{step:08d}"


def read_checkpoint(path: Path, model: torch.nn.Module) -> dict[str, Any]:
    """Load the weights into `model` and return the optimiser and random states (`state.pt`)."""
    load_model(model, str(path / "model.safetensors"))
    return torch.load(path / "state.pt", weights_only=True, map_location="cpu")


def read_manifest(path: Path) -> dict[str, Any]:
    """Read settings, history and sizes of a checkpoint."""
    return json.loads((path / "manifest.json").read_text(encoding="utf-8"))


def checkpoints(run_dir: Path) -> list[Path]:
    """All finished checkpoint folders of a run, oldest first (damaged ones too)."""
    return sorted(run_dir.glob("step-????????"))


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Newest complete checkpoint; a damaged one is passed over with a warning that names it."""
    for path in reversed(checkpoints(run_dir)):
        if is_complete(path):
            return path
        warnings.warn(f"{path} is incomplete and was passed over: delete it", stacklevel=2)
    return None


def is_complete(path: Path) -> bool:
    """Whether the manifest is readable and every file has the size that it states."""
    try:
        sizes = read_manifest(path)["files"]
    except (OSError, ValueError, KeyError):
        return False
    return all((path / name).is_file() and (path / name).stat().st_size == n for name, n in sizes.items())


def plain_copy(name: str, value: Any) -> Any:
    """Copy `value` to the CPU; TypeError unless it is built of tensors, numbers, text, lists and dicts."""
    if isinstance(value, Mapping):
        return {key: plain_copy(f"{name}[{key!r}]", item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        kind = list if isinstance(value, list) else tuple
        return kind(plain_copy(f"{name}[{index}]", item) for index, item in enumerate(value))
    if not isinstance(value, PLAIN):
        kind = type(value).__name__
        raise TypeError(f"{name} is a {kind}; a checkpoint holds tensors, numbers, text, lists and dicts")
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value


def _flush(path: Path) -> None:
    """Force a file or folder to disk: without it a rename may survive a power cut and its content not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

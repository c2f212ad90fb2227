"""Checkpoints that are whole or absent: written beside their place, flushed to disk, then renamed.

A checkpoint is a folder `step-00000120` with

    model.safetensors   the weights
    state.pt            optimizer, random states, extra state; read with weights_only, so it can run no code
    manifest.json       settings, history, and the SHA-256 of each of the files above
    manifest.sha256     the SHA-256 of the manifest

so that a bit that flips anywhere in it is noticed.
"""

import hashlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

PLAIN = (torch.Tensor, int, float, bool, str, type(None))


def write_checkpoint(
    run_dir: Path,
    step: int,
    weights: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    manifest: Mapping[str, Any],
    *,
    keep: int,
) -> Path:
    """Write one checkpoint atomically, then drop all but the `keep` newest; return its folder.

    Raises:
        OSError: it could not be written; names the folder. Earlier checkpoints stay as they were.
    """
    final = folder_of(run_dir, step)
    partial = run_dir / f".{final.name}.{os.getpid()}"
    try:
        for leftover in run_dir.glob(".step-*"):  # a process that was killed while saving leaves one behind
            shutil.rmtree(leftover)
        if is_whole(final):
            return final
        partial.mkdir(parents=True)
        save_file(dict(weights), partial / "model.safetensors")
        torch.save(dict(state), partial / "state.pt")
        digests = {file.name: _sha256(file) for file in sorted(partial.iterdir())}
        text = json.dumps({"step": step, "files": digests, **manifest}, indent=1)
        (partial / "manifest.json").write_text(text, encoding="utf-8")
        (partial / "manifest.sha256").write_text(_sha256(partial / "manifest.json"), encoding="ascii")
        for path in (*partial.iterdir(), partial):
            _flush(path)
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        _flush(run_dir)
    except (OSError, RuntimeError) as error:  # torch and safetensors report a full disk as their own errors
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"the checkpoint {final} could not be written: {error}. Earlier checkpoints are untouched; "
            "make room, then call resume()"
        ) from error
    written = checkpoints(run_dir)
    if len(written) > keep:  # damaged ones do not count
        for old in [path for path in written if is_whole(path)][:-keep]:
            shutil.rmtree(old)
    return final


def folder_of(run_dir: Path, step: int) -> Path:
    """Return where the checkpoint of a step lives."""
    return run_dir / f"step-{step:08d}"


def read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the weights, and the optimizer and random states."""
    weights = load_file(path / "model.safetensors")
    return weights, torch.load(path / "state.pt", weights_only=True, map_location="cpu")


def read_manifest(path: Path) -> dict[str, Any]:
    """Return settings, history and digests of a checkpoint."""
    return json.loads((path / "manifest.json").read_text(encoding="utf-8"))


def checkpoints(run_dir: Path) -> list[Path]:
    """Return all checkpoint folders of a run, oldest first (damaged ones too)."""
    return sorted(run_dir.glob("step-????????"))


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest whole checkpoint, None if there is none; warn of each damaged one passed over.

    Raises:
        ValueError: there are checkpoints, and all of them are damaged.
    """
    paths = checkpoints(run_dir)
    for path in reversed(paths):
        if is_whole(path):
            return path
        warnings.warn(f"{path} is damaged and was passed over: delete it", stacklevel=2)
    if paths:
        names = ", ".join(path.name for path in paths)
        raise ValueError(f"no checkpoint in {run_dir} is whole ({names}): delete them to start afresh")
    return None


def is_whole(path: Path) -> bool:
    """Whether the manifest is as it was written, and every file has the SHA-256 that it states."""
    try:
        digest = (path / "manifest.sha256").read_bytes().decode("ascii")
        if _sha256(path / "manifest.json") != digest:
            return False
        return all(_sha256(path / name) == digest for name, digest in read_manifest(path)["files"].items())
    except (OSError, ValueError):
        return False


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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Force a file or folder to disk: without it a rename may survive a power cut and its content not."""
    # Windows cannot open a folder as a file, and flushes only what is open for writing.
    if sys.platform == "win32" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

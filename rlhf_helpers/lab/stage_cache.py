"""What the earlier cells of a section made, kept outside the repository from one kernel to the next."""

import hashlib
import io
import os
import pickle
import random
from collections.abc import Mapping
from pathlib import Path
from pkgutil import resolve_name
from types import FunctionType
from typing import Any

import numpy as np
import torch
from IPython.paths import get_ipython_cache_dir

from rlhf_helpers.core.files import write_atomically

_PLAIN = (int, float, str, type(None))


def cache_path(section: str, sources: list[str]) -> Path:
    """Name the file of a section's results: another source, package, model or data set names another."""
    package = Path(__file__).parents[1]
    files = sorted(path for path in package.rglob("*") if path.suffix not in ("", ".pyc"))
    facts = [*sources, *((str(path), path.stat().st_mtime_ns) for path in files)]
    facts += [os.environ.get(name) for name in ("RLHF_MODEL", "RLHF_DATA")]
    key = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    return Path(get_ipython_cache_dir()) / "rlhf_helpers" / f"{section}.{key}.pickle"


def keep(path: Path, made: Mapping[str, Any], setup: Mapping[str, Any]) -> None:
    """Write the values made and the state of the random generators, in place of older ones of the section.

    What the setup cell made is written as its name: the values refer to it again when they are read. What
    cannot be written (an open file, a widget, a lambda) leaves no file, and its cells run each time.
    """
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL)
    pickler.names = {id(value): name for name, value in setup.items() if not isinstance(value, _PLAIN)}
    section = path.name.rsplit(".", 2)[0]
    try:
        pickler.dump((dict(made), (torch.get_rng_state(), np.random.get_state(), random.getstate())))
        for older in path.parent.glob(f"{section}.*.pickle"):
            older.unlink()
        write_atomically(path, buffer.getvalue())
    except (pickle.PicklingError, TypeError, AttributeError, OSError):
        return


def kept(path: Path, setup: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the values back and set the random generators; None where no file can be read."""
    try:
        with path.open("rb") as file:
            unpickler = _Unpickler(file)
            unpickler.setup = setup
            made, (of_torch, of_numpy, of_python) = unpickler.load()
    except Exception:  # pickle raises whatever a class that has changed raises; the cells make them anew
        return None
    torch.set_rng_state(of_torch)
    np.random.set_state(of_numpy)
    random.setstate(of_python)
    return made


class _Pickler(pickle.Pickler):
    names: Mapping[int, str]

    def persistent_id(self, obj: Any) -> str | None:
        return self.names.get(id(obj))

    def reducer_override(self, obj: Any) -> Any:
        """Write a function of the package by its name, copies too: `check` gives its own of the solution."""
        if isinstance(obj, FunctionType) and obj.__module__.startswith("rlhf_helpers."):
            return resolve_name, (f"{obj.__module__}:{obj.__qualname__}",)
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    setup: Mapping[str, Any]

    def persistent_load(self, pid: str) -> Any:
        return self.setup[pid]

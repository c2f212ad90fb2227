"""Read tables (sentences, prompts, weights, rules) that are stored as JSON in the folder of assets."""

import functools
import json
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parents[1] / "assets"


@functools.cache
def load_table(name: str) -> Any:
    """Read assets/<name>.json, as in "world/sentences"; lists become tuples, which no caller can change."""
    text = (_FOLDER / f"{name}.json").read_text(encoding="utf-8")
    return _lists_to_tuples(json.loads(text))


def _lists_to_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists_to_tuples(inner) for key, inner in value.items()}
    return tuple(map(_lists_to_tuples, value)) if isinstance(value, list) else value

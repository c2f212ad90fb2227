"""The record of a run: one row of numbers per step."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

Value = float | int | bool | str


class History(Sequence):
    """A list of metric rows (dicts); rows need not have the same keys."""

    def __init__(self, rows: Iterable[Mapping[str, Value]] = ()) -> None:
        """Start from the given rows, or empty."""
        self.rows: list[dict[str, Value]] = []
        for row in rows:
            self.append(row)

    def append(self, row: Mapping[str, Value]) -> None:
        """Add one row; one-element tensors and numpy numbers become Python numbers, else TypeError."""
        self.rows.append({key: _plain(key, value) for key, value in row.items()})

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.rows)

    def __getitem__(self, index: int | slice) -> Any:
        """Row `index` as a dict, or a list of rows for a slice."""
        return self.rows[index]

    def __eq__(self, other: object) -> bool:
        """Two histories are equal when their rows are."""
        return isinstance(other, History) and self.rows == other.rows

    def __repr__(self) -> str:
        """Length and last row."""
        return f"History({len(self)} rows, last {self.rows[-1] if self.rows else None})"

    def to_frame(self) -> "pd.DataFrame":
        """Rows as a DataFrame, one column per metric, NaN where a row lacks it."""
        import pandas as pd

        return pd.DataFrame(self.rows)

    def last(self, key: str) -> Value:
        """Newest value of a metric; KeyError lists the known ones."""
        for row in reversed(self.rows):
            if key in row:
                return row[key]
        raise KeyError(f"no row has {key!r}; known: {self.keys()}")

    def keys(self) -> list[str]:
        """All metric names, in order of first appearance."""
        return list(dict.fromkeys(key for row in self.rows for key in row))


def _plain(key: str, value: Any) -> Value:
    if hasattr(value, "item"):
        if getattr(value, "size", 1) == 0 or (hasattr(value, "numel") and value.numel() != 1):
            raise TypeError(f"metric {key!r} has shape {tuple(value.shape)}: log one number (a mean, say)")
        value = value.item()
    if not isinstance(value, (bool, int, float, str)) or value == "":
        raise TypeError(f"metric {key!r} must be a number or non-empty text; got {value!r}")
    return value

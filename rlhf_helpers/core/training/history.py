"""The record of a run: one row of numbers per step."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

Value = float | int | bool | str


class History(list):
    """A list of metric rows (dicts); rows need not have the same keys."""

    def __repr__(self) -> str:
        """Length and last row."""
        return f"History({len(self)} rows, last {self[-1] if self else None})"

    def to_frame(self) -> "pd.DataFrame":
        """Rows as a DataFrame, one column per metric, NaN where a row lacks it."""
        import pandas as pd

        return pd.DataFrame(self)

    def last(self, key: str) -> Value:
        """Newest value of a metric; KeyError lists the known ones."""
        for row in reversed(self):
            if key in row:
                return row[key]
        raise KeyError(f"no row has {key!r}; known: {self.keys()}")

    def keys(self) -> list[str]:
        """All metric names, in order of first appearance."""
        return list(dict.fromkeys(key for row in self for key in row))

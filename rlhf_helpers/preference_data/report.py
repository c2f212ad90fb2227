"""What a reading says about itself: the faults that stop it, the counts of what it kept and dropped."""

from collections.abc import Iterable
from dataclasses import dataclass

SHOWN_FAULTS = 20


class PreferenceDataError(ValueError):
    """Raised once for a source that cannot be read; `.faults` holds every fault, the message the first 20.

    fits_unit: the unit of `read_preferences` that the source fits, where it does not fit the one asked for.
    """

    def __init__(self, source: str, faults: Iterable[str], fits_unit: str | None = None) -> None:
        """Name the source and keep all its faults, each a text "place: problem; fix"."""
        self.faults = list(faults)
        self.fits_unit = fits_unit
        count = len(self.faults)
        lines = [
            f"{source}: {count} fault{'s' * (count != 1)}, so nothing was loaded",
            *self.faults[:SHOWN_FAULTS],
        ]
        if count > SHOWN_FAULTS:
            lines.append(f"and {count - SHOWN_FAULTS} more (all of them are in .faults)")
        super().__init__("\n  ".join(lines))


@dataclass(frozen=True)
class LoadReport:
    """Counts of one reading, with read = kept + sum of dropped.

    `records` are the objects found in the source (lines, rows, trees). `read` counts the examples made of
    them, in `unit`s: one tree gives many pairs. `dropped` says why an example was left out; `noted` counts
    what was only observed, such as contradictory comparisons, which noisy people do make and which are kept.
    """

    source: str
    format: str
    unit: str
    records: int
    read: int
    kept: int
    dropped: dict[str, int]
    noted: dict[str, int]

    def __str__(self) -> str:
        """Read as three lines: what was found, what became of it, what was noticed."""
        lost = self.read - self.kept
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
        notes = ", ".join(f"{count} {what}" for what, count in self.noted.items())
        return (
            f"{self.source}: {self.records} records in the format '{self.format}'\n"
            f"  {self.read} {self.unit} read = {self.kept} kept + {lost} dropped ({reasons})\n"
            f"  noted: {notes or 'nothing'}"
        )

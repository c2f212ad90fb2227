"""What a reading says about itself: the issues that stop it, the counts of what it kept and dropped."""

from collections.abc import Iterable
from dataclasses import dataclass, field

SHOWN_ISSUES = 20


@dataclass(frozen=True)
class DataIssue:
    """One structural fault: where it is, what is wrong there, and how to fix it."""

    place: str
    problem: str
    fix: str

    def __str__(self) -> str:
        """Read as one line: place, problem, fix."""
        return f"{self.place}: {self.problem}; {self.fix}"


class PreferenceDataError(ValueError):
    """Raised once for a source that cannot be read; `.faults` holds every issue, the message the first 20."""

    def __init__(self, source: str, issues: Iterable[DataIssue]) -> None:
        """Name the source and keep all its issues."""
        self.source, self.faults = source, list(issues)
        count = len(self.faults)
        lines = [f"{source}: {count} fault{'s' * (count != 1)}, so nothing was loaded"]
        lines += [f"  {issue}" for issue in self.faults[:SHOWN_ISSUES]]
        if count > SHOWN_ISSUES:
            lines.append(f"  and {count - SHOWN_ISSUES} more (all of them are in .faults)")
        super().__init__("\n".join(lines))


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
    dropped: dict[str, int] = field(default_factory=dict)
    noted: dict[str, int] = field(default_factory=dict)

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

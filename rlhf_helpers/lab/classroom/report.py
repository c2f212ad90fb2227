"""The report on a class: one page that says what to teach next.

python -m rlhf_helpers grade DIR --out grades.csv --report class.html
"""

import html
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

import pandas as pd

from rlhf_helpers.lab.classroom.grading import SELF_REPORTED, grade
from rlhf_helpers.lab.progress import STATES
from rlhf_helpers.lab.quizzes import questions

MOST = 20  # mistakes and questions that the page shows
# What a mistake is called on the page: without the inputs and values that differ from learner to learner.
_SHORT = {
    "(?s)^(tried to .*?); .*": r"\1",
    r"(?s)^not right yet: (with .* expected .*)": "a wrong result that fits no known mistake",
    r"(?s)^not right yet: | \(with .*": "",
}
_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Class report</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.4 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ text-align: left; vertical-align: top; padding: 0.25rem 0.5rem; border-bottom: 1px solid #8886; }}
th {{ font-weight: normal; width: 50%; overflow-wrap: anywhere; }}
td:last-child {{ width: 5rem; white-space: nowrap; }}
.bar {{ background: #0173b2; height: 1.2rem; min-width: 1px; border-radius: 2px; }}
</style>
</head>
<body>
<main>
<h1>Class report</h1>
<p>{summary}</p>
<h2>Solved exercises</h2>
<p>Learners who solved each exercise, out of all.</p>
{solved}
<h2>Most frequent mistakes</h2>
<p>Learners who made each mistake, out of all. The table of grades holds the full messages.</p>
{mistakes}
<h2>Missing or late notebooks</h2>
{absent}
<h2>Quiz questions that were answered wrongly</h2>
<p>Learners whose first answer was wrong, out of those who answered. Self-reported: read from progress files,
which anyone can edit.</p>
{quizzes}
</main>
</body>
</html>
"""


def write_grades(folder: Path, out: Path, *, due: datetime | None, report: Path | None) -> pd.DataFrame:
    """Grade the notebooks in a folder, write table (CSV) and page, and return the points of each learner."""
    grades = grade(folder, due=due)
    grades.to_csv(out, index=False)
    if report:
        report.write_text(class_report(grades), encoding="utf8")
    return grades.groupby(["learner", "lesson"])["points"].agg(["sum", "count"])


def class_report(grades: pd.DataFrame) -> str:
    """Write the page (HTML, self-contained) about what `grading.grade` returns.

    It shows how many learners solved each exercise, the mistakes by name and frequency, whose notebook is
    missing or late, and which quiz questions were answered wrongly most often.
    """
    graded = grades[grades["state"] != SELF_REPORTED]
    learners = grades["learner"].nunique()

    counts = graded.groupby(["lesson", "exercise"], sort=False)["points"].sum()
    solved = [(f"Lesson {lesson}: {name}", count, learners) for (lesson, name), count in counts.items()]

    wrong = graded[(graded["state"] == "wrong") | graded["message"].str.startswith("tried to")]
    mistakes = wrong["exercise"] + ": " + wrong["message"].replace(_SHORT, regex=True)
    frequent = [(text, count, learners) for text, count in mistakes.value_counts().head(MOST).items()]

    return _PAGE.format(
        summary=f"Learners: {learners}. Points: {graded['points'].mean():.0%} of all.",
        solved=_bars(solved),
        mistakes=_bars(frequent),
        absent=_absent(graded),
        quizzes=_bars(_wrong_answers(grades)),
    )


def _absent(graded: pd.DataFrame) -> str:
    """List the learners of each lesson who handed in nothing, and those who were late."""
    lines = []
    for lesson, rows in graded.groupby("lesson"):
        is_missing = (rows["state"] == "missing").groupby(rows["learner"]).all()
        is_late = rows.groupby("learner")["late"].any()
        for word, who in (("missing", is_missing), ("late", is_late)):
            names = ", ".join(who.index[who]) or "none"
            lines.append(f"<p>Lesson {lesson}, {word} ({who.sum()}): {html.escape(names)}</p>")
    return "\n".join(lines)


def _wrong_answers(grades: pd.DataFrame) -> list[tuple[str, int, int]]:
    """Return each quiz question with the learners who first answered it wrongly, and all who answered it."""
    answers = grades[(grades["state"] == SELF_REPORTED) & grades["message"].isin(STATES["quizzes"])]
    is_wrong = (
        (answers["message"] != "right at once").groupby(answers["exercise"]).agg(["mean", "sum", "count"])
    )
    worst = is_wrong[is_wrong["sum"] > 0].sort_values("mean", ascending=False).head(MOST)
    return [(questions()[name]["question"], row["sum"], row["count"]) for name, row in worst.iterrows()]


def _bars(rows: Iterable[tuple[str, int, int]]) -> str:
    """Draw (label, count, out of how many) as a table with bars."""
    lines = [
        f"<tr><th scope='row'>{html.escape(label)}</th>"
        f"<td><div class='bar' style='width: {count / total:.0%}'></div></td>"
        f"<td>{count:.0f} of {total:.0f}</td></tr>"
        for label, count, total in rows
    ]
    return f"<table>{''.join(lines)}</table>" if lines else "<p>None.</p>"

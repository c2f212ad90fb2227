"""Articles and reference summaries: the world's, a learner's own texts and files, a set of the hub."""

import bisect
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn

from rlhf_helpers.core.models import usable_positions
from rlhf_helpers.core.tensors import require_number
from rlhf_helpers.core.text import encode_prompt
from rlhf_helpers.preference_data.reading import Source, read_records
from rlhf_helpers.preference_data.report import PreferenceDataError
from rlhf_helpers.world.prompts import load_prompts, sample_answer

INSTRUCTION = "Summarise this article."
# Names that these columns have in data sets; the first is that of a list of texts.
ARTICLE_COLUMNS = ("articles", "article", "document", "text", "dialogue", "post")
SUMMARY_COLUMNS = ("summaries", "summary", "highlights", "reference", "tldr", "completion")
Texts = Sequence[str] | Source


def create_summarization_data(
    articles: Texts | None = None,
    summaries: Texts | None = None,
    num_samples: int | None = None,
    *,
    split: str | None = None,
    quality: str | None = "high",
    seed: int = 0,
) -> Dataset:
    """Rows to learn from: prompt (instruction and article), article and, where there is one, reference.

    Args:
        articles: None: the tiny world's. A list of texts; a .txt file, or a folder of them in the order of
            their names; .jsonl, .json, .csv, .parquet; a datasets.Dataset or list of dicts; the name of a hub
            set (the only thing that asks the network). Data sets need one of ARTICLE_COLUMNS.
        summaries: The same kinds, one per article, from one of SUMMARY_COLUMNS; None: that column of
            `articles`, if there is one.
        num_samples: Exactly so many rows, drawn by seed; an article comes twice only where there are fewer
            than asked for, and how many rows repeat one is printed. None: each once, in order.
        split: Of the world or the set; None: "train".
        quality: Of the world's references: "high", perfect; None: as people write, 45 % perfect, 35 % with
            facts left out, 20 % with a wrong place or day.
        seed: Of the draw.

    Raises:
        ValueError: Something is missing, blank, unequal in number or below 1; names the row or the source.
            Lesson 4.
    """
    rng = random.Random(f"summaries/{seed}")
    known, told = [], []
    if articles is not None:
        rows = _rows(articles, ARTICLE_COLUMNS[0], split)
        texts = _column(rows, ARTICLE_COLUMNS)
        if summaries is not None:
            rows = _rows(summaries, SUMMARY_COLUMNS[0], split)
        if summaries is not None or set(SUMMARY_COLUMNS) & set(rows[0][1]):
            told = _column(rows, SUMMARY_COLUMNS)
        if told and len(told) != len(texts):
            raise ValueError(f"{len(texts)} articles and {len(told)} summaries: give one for each article")
    elif summaries is not None:
        raise ValueError("summaries are given and articles are not: give the articles they summarise")
    else:
        known = load_prompts(["article"], split or "train")
        texts = [article_of(prompt.text) for prompt in known]
    order = _drawn(len(texts), num_samples, rng)
    columns = {"prompt": [f"{INSTRUCTION} {texts[i]}" for i in order], "article": [texts[i] for i in order]}
    if known or told:
        columns["reference"] = [told[i] if told else sample_answer(known[i], rng, quality) for i in order]
    return Dataset.from_dict(columns)


def article_of(prompt: str) -> str:
    """The article in a prompt of `create_summarization_data`; any other prompt is given back as it is."""
    return prompt.removeprefix(INSTRUCTION).strip()


def fit_articles(
    model: nn.Module, tokenizer: Any, articles: Sequence[str], max_new_tokens: int
) -> tuple[list[str], int]:
    """Prompts that leave room for max_new_tokens in the model's context, and how many lost their end.

    An article that is too long keeps its longest beginning of whole words that fits: news tells the event
    first. Lesson 4. Raises ValueError naming the row where not one word fits.
    """
    context = usable_positions(model)
    prompts, cut = [f"{INSTRUCTION} {article}" for article in articles], 0
    for row, article in enumerate(articles if context else ()):
        room = context - max_new_tokens
        if len(encode_prompt(tokenizer, prompts[row])) <= room:
            continue
        words = article.split()
        beginnings = [f"{INSTRUCTION} {' '.join(words[:count])}" for count in range(1, len(words) + 1)]
        fitting = bisect.bisect(beginnings, room, key=lambda text: len(encode_prompt(tokenizer, text)))
        if not fitting:
            raise ValueError(
                f"articles[{row}] ({article[:40]!r}) leaves no room for one word beside max_new_tokens="
                f"{max_new_tokens} in a context of {context} tokens: lower max_length"
            )
        prompts[row] = beginnings[fitting - 1]
        cut += 1
    return prompts, cut


def _drawn(count: int, wanted: int | None, rng: random.Random) -> list[int]:
    """Row numbers: all in order, or `wanted` of them, each again only when all have been drawn."""
    if wanted is None:
        return list(range(count))
    require_number("num_samples", wanted, at_least=1, whole=True)
    if wanted > count:
        print(f"{wanted} rows of {count} articles: {wanted - count} rows repeat an article")
    drawn: list[int] = []
    while len(drawn) < wanted:
        drawn += rng.sample(range(count), min(count, int(wanted) - len(drawn)))
    return drawn


def _rows(source: Texts, what: str, split: str | None) -> list[tuple[str, dict[str, Any]]]:
    """Each row of a source with the place it stands at; a text becomes a row with the column `what`."""
    path = Path(source) if isinstance(source, (str, os.PathLike)) else None
    files = sorted(path.glob("*.txt")) if path and path.is_dir() else [path]
    if path and files and files[0].suffix == ".txt":
        return [(str(file), {what: file.read_text("utf-8")}) for file in files]
    if path is None and len(source) and isinstance(source[0], str):
        return [(f"{what}[{i}]", {what: text}) for i, text in enumerate(source)]
    name, records, faults = read_records(source, split=split, limit=None)
    if faults:
        raise PreferenceDataError(name, faults)
    return records


def _column(rows: Sequence[tuple[str, dict[str, Any]]], names: Sequence[str]) -> list[str]:
    """The texts in the first of these columns that the first row has."""
    key = next((name for name in names if name in rows[0][1]), None)
    if key is None:
        raise ValueError(f"{rows[0][0]} has no column {names}, it has {sorted(rows[0][1])}")
    for place, row in rows:
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise ValueError(f"{place} must be a text that is not blank, got {row.get(key)!r}")
    return [" ".join(row[key].split()) for _, row in rows]

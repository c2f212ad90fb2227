"""Studies of reward models: several methods or seeds, a table, a CSV and a manifest to repeat them by.

    python -m rlhf_helpers study real_preferences --data PATH [--out FOLDER]
    python -m rlhf_helpers study annotator_pairs [--out FOLDER]

Text of real preference sets is never printed or stored: aggregates only.
"""

import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModel

from rlhf_helpers.core.models import load_encoder
from rlhf_helpers.preference_data import prompt_folds, read_preferences
from rlhf_helpers.reward_model.metrics import (
    Estimate,
    accuracy,
    gold_agreement,
    pair_credits,
    paired_difference,
    score_pairs,
)
from rlhf_helpers.reward_model.model import RewardModel, create_reward_model
from rlhf_helpers.reward_model.training import RewardModelTrainer, RewardSettings

Rows = Sequence[Mapping[str, Any]]
Judge = Callable[[Rows, Rows, int], Tensor]  # train rows, test rows, seed -> credits of the test rows (B,)

# Chosen on folds cut with another seed than the reported ones: see `real_preferences`.
REAL_SETTINGS = RewardSettings(learning_rate=3e-4, epochs=2, batch_size=16, progress=False)
REAL_LENGTH = 192  # tokens, the end of the transcript with the answer: long for the world's small tokenizer
REPORTED_SEED = 0


def real_preferences(
    data: Any,
    out: str | Path | None = None,
    *,
    base_model_name: str | Path = "tiny",
    folds: int = 5,
    seed: int = REPORTED_SEED,
    limit: int | None = None,
    settings: RewardSettings = REAL_SETTINGS,
    max_length: int = REAL_LENGTH,
    pooling: str = "mean",
) -> pd.DataFrame:
    """Compare four judges on real pairs, each pair judged once by a model that never saw its prompt.

    The shorter answer; a reward model over random weights; TF-IDF Bradley-Terry; a reward model over the
    pretrained trunk. data: whatever `read_preferences` reads. Prints the accuracies (ties one half, Wilson's
    95 % interval over all pairs) and the paired differences to the pretrained one. Into the folder `out` go
    the accuracies per fold as CSV, and a manifest. Settings were chosen on folds of seeds 100 and 101,
    not on those reported here.
    """
    dataset, report = read_preferences(data, limit=limit)
    print(report)
    dataset = dataset.select_columns(["prompt", "chosen", "rejected"])
    dataset = dataset.add_column("row", list(range(len(dataset))))
    trained = {"settings": settings, "name": base_model_name, "max_length": max_length, "pooling": pooling}
    judges: dict[str, Judge] = {
        "shorter answer": shorter_answer,
        "random weights": lambda train, test, s: trained_judge(train, test, s, pretrained=False, **trained),
        "TF-IDF Bradley-Terry": tfidf_judge,
        "pretrained": lambda train, test, s: trained_judge(train, test, s, pretrained=True, **trained),
    }
    start = time.perf_counter()
    table, credits = cross_validate(dataset, judges, folds=folds, seed=seed)
    _print_comparison(credits, table, against="pretrained")
    print(f"{time.perf_counter() - start:.0f} s")
    if out is not None:
        facts = {"base_model_name": Path(base_model_name).name, "folds": folds, "seed": seed, "limit": limit}
        facts |= {"max_length": max_length, "pooling": pooling, "settings": asdict(settings)}
        write_study(out, table, "real_preferences", facts | _facts_of(data, len(dataset)))
    return table


def annotator_pairs(
    out: str | Path | None = None,
    *,
    base_model_name: str | Path = "tiny",
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    pairs: int = 2000,
    settings: RewardSettings | None = None,
) -> pd.DataFrame:
    """How well a reward model trained on noisy annotators agrees with gold, seen prompts and held-out ones.

    For each seed: `pairs` comparisons by the standard annotator, one training run, then 2,000 new pairs drawn
    alike for seen prompts and 2,000 for held-out ones, gold ties left out. Columns: seed, split, agreement,
    low, high, n. The time of training is printed, not stored: a CSV holds what can be repeated.
    """
    from rlhf_helpers.world.annotators import make_pairs

    rows = []
    for seed in seeds:
        model = create_reward_model("basic", base_model_name=base_model_name, seed=seed)
        trainer = RewardModelTrainer(model, settings=settings, seed=seed, progress=False)
        start = time.perf_counter()
        trainer.train(make_pairs(pairs, seed=seed))
        seconds = time.perf_counter() - start
        for split in ("train", "heldout"):
            new = make_pairs(2000, split=split, seed=10_000 + seed)
            gold = [torch.tensor([row[key] for row in new]) for key in ("chosen_gold", "rejected_gold")]
            found = gold_agreement(*(r.cpu() for r in score_pairs(model, new)), *gold)
            rows.append({"seed": seed, "split": split, "agreement": found.value, **_bounds(found)})
            print(f"seed {seed}, {split:8} {found}; trained in {seconds:.0f} s", flush=True)
    table = pd.DataFrame(rows)
    if out is not None:
        facts = {"base_model_name": Path(base_model_name).name, "seeds": list(seeds), "pairs": pairs}
        facts["settings"] = asdict(settings or RewardSettings())
        write_study(out, table, "annotator_pairs", facts)
    return table


def cross_validate(
    dataset: Dataset, judges: Mapping[str, Judge], *, folds: int, seed: int
) -> tuple[pd.DataFrame, dict[str, Tensor]]:
    """Judge every pair of `dataset` (column row: 0, 1, ...) once, out of fold, folds cut by prompt.

    Returns a table method, fold, accuracy, n, and for each judge its credits in the order of the data, (B,).
    """
    credits = {name: torch.full((len(dataset),), torch.nan) for name in judges}
    rows = []
    for fold, (train, test) in enumerate(prompt_folds(dataset, folds, seed)):
        for name, judge in judges.items():
            won = judge(train.to_list(), test.to_list(), seed + fold).float().cpu()
            credits[name][torch.tensor(test["row"])] = won
            rows.append({"method": name, "fold": fold, "accuracy": won.mean().item(), "n": len(won)})
    return pd.DataFrame(rows), credits


def shorter_answer(train: Rows, test: Rows, seed: int) -> Tensor:
    """Always prefer the answer of fewer characters; learns nothing."""
    chosen, rejected = (
        torch.tensor([-float(len(row[key])) for row in test]) for key in ("chosen", "rejected")
    )
    return pair_credits(chosen, rejected)


def tfidf_judge(train: Rows, test: Rows, seed: int) -> Tensor:
    """Bradley-Terry with a linear reward of TF-IDF features: r = w . tfidf(answer), scikit-learn's defaults.

    P(chosen wins) = sigmoid(w . (x_chosen - x_rejected)) is logistic regression of differences, without
    intercept: the order in which two answers are shown must not matter. Words and pairs of words.
    """
    from scipy.sparse import vstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    features = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    features.fit([row[key] for row in train for key in ("chosen", "rejected")])

    def gaps(rows: Rows) -> Any:
        chosen, rejected = (features.transform([row[key] for row in rows]) for key in ("chosen", "rejected"))
        return chosen - rejected

    both = vstack([gaps(train), -gaps(train)])
    labels = np.repeat([1, 0], len(train))
    won = (
        LogisticRegression(fit_intercept=False, max_iter=1000).fit(both, labels).decision_function(gaps(test))
    )
    return pair_credits(torch.from_numpy(won), torch.zeros(len(won), dtype=torch.float64))


def trained_judge(
    train: Rows,
    test: Rows,
    seed: int,
    *,
    settings: RewardSettings,
    name: str | Path,
    max_length: int,
    pooling: str,
    pretrained: bool,
) -> Tensor:
    """A reward model over a trunk, pretrained or with random weights of that shape, trained on `train`."""
    if pretrained:
        model = create_reward_model(
            "basic", base_model_name=name, pooling=pooling, max_length=max_length, seed=seed
        )
    else:
        trunk, tokenizer = load_encoder(name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh = AutoModel.from_config(trunk.config).to(trunk.device)
            model = RewardModel(fresh, tokenizer, pooling=pooling, max_length=max_length)
    RewardModelTrainer(model, settings=settings, seed=seed).train(train)
    return pair_credits(*score_pairs(model, test))


def _print_comparison(credits: Mapping[str, Tensor], table: pd.DataFrame, *, against: str) -> None:
    """Accuracies over all pairs, the spread over folds, and paired differences to one method."""
    for name, won in credits.items():
        folds = table.loc[table["method"] == name, "accuracy"]
        print(f"{name:22} {accuracy(won)}; folds {folds.min():.3f} to {folds.max():.3f}")
    for name, won in credits.items():
        if name != against:
            print(f"{against} - {name:22} {paired_difference(credits[against], won)}")


def _bounds(found: Estimate) -> dict[str, float | int]:
    return {"low": found.low, "high": found.high, "n": found.n}


def _facts_of(data: Any, pairs: int) -> dict[str, Any]:
    """Name, size and fingerprint of the data, so that a rerun can tell whether it reads the same."""
    facts: dict[str, Any] = {"pairs": pairs}
    if isinstance(data, (str, os.PathLike)):
        path = Path(data)
        facts["data"] = path.name
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        facts["sha256"] = (
            hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest() if files else None
        )
    return facts


def write_study(out: str | Path, table: pd.DataFrame, name: str, facts: Mapping[str, Any]) -> None:
    """Write `table` into the folder `out` as NAME.csv and, as NAME.json, what is needed to make it again."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    table.to_csv(out / f"{name}.csv", index=False, float_format="%.6f")
    libraries = ("torch", "transformers", "scikit-learn", "numpy", "accelerate")
    manifest = {
        "study": name,
        "command": f"python -m rlhf_helpers study {name}",
        **facts,
        "python": platform.python_version(),
        "versions": {library: version(library) for library in libraries},
        "platform": sys.platform,
        "threads": torch.get_num_threads(),
    }
    text = json.dumps(manifest, indent=1, sort_keys=False, default=str)
    (out / f"{name}.json").write_text(text + "\n", encoding="utf-8")

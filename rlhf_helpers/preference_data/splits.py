"""Splits that keep every prompt on one side: a model that has seen a prompt's answers knows too much."""

import unicodedata

from datasets import Dataset


def normalised_prompt(prompt: str) -> str:
    """Return the prompt as splits compare it: Unicode form NFKC, lower case, single spaces."""
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


def _groups(dataset: Dataset, sides: int) -> list[str]:
    if "prompt" not in dataset.column_names:
        raise ValueError(f"splitting by prompt needs a column 'prompt', got {dataset.column_names}")
    groups = [normalised_prompt(prompt) for prompt in dataset["prompt"]]
    if len(set(groups)) < sides:
        raise ValueError(f"{sides} sides need at least {sides} distinct prompts, got {len(set(groups))}")
    return groups


def split_by_prompt(dataset: Dataset, *, test_fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split into (train, test), `test_fraction` of the distinct prompts (rounded up) to the test side.

    Prompts are compared by `normalised_prompt`. The same prompts and seed give the same sides, in whatever
    order the rows come. Raises ValueError unless 0 < test_fraction < 1 and both sides get a prompt.
    """
    from sklearn.model_selection import GroupShuffleSplit

    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction must lie strictly between 0 and 1, got {test_fraction}")
    groups = _groups(dataset, 2)
    distinct = len(set(groups))
    if test_fraction * distinct > distinct - 1:
        raise ValueError(f"test_fraction {test_fraction} of {distinct} prompts leaves none to train on")
    splitter = GroupShuffleSplit(1, test_size=test_fraction, random_state=seed)
    train, test = next(splitter.split(groups, groups=groups))
    return dataset.select(train), dataset.select(test)


def prompt_folds(dataset: Dataset, k: int, seed: int) -> list[tuple[Dataset, Dataset]]:
    """Cut into k folds by prompt and return (train, test) for each; every row is tested exactly once.

    Deterministic as `split_by_prompt`. Raises ValueError if k < 2 or there are fewer than k distinct prompts.
    """
    from sklearn.model_selection import GroupKFold

    if k < 2:
        raise ValueError(f"k must be at least 2, got {k}")
    groups = _groups(dataset, k)
    folds = GroupKFold(k, shuffle=True, random_state=seed).split(groups, groups=groups)
    return [(dataset.select(train), dataset.select(test)) for train, test in folds]


def leaked_prompts(train: Dataset, test: Dataset) -> set[str]:
    """Return the normalised prompts that stand on both sides; empty when nothing leaks."""
    return set(_groups(train, 0)) & set(_groups(test, 0))

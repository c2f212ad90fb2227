"""Four judges of real preference pairs; each pair is judged once, by a model that never saw its prompt.

    python -m rlhf_helpers study real_preferences --data PATH [--out FOLDER]

Text of real preference sets is never printed or stored: aggregates only.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel

from rlhf_helpers.core.models import load_encoder
from rlhf_helpers.lab.studies.record import Rows, study
from rlhf_helpers.preference_data import prompt_folds, read_preferences
from rlhf_helpers.reward_model import (
    RewardModel,
    RewardModelTrainer,
    RewardSettings,
    create_reward_model,
    pair_credits,
    score_pairs,
)

Pairs = Sequence[Mapping[str, Any]]

# Settings, length and context were chosen on folds of seeds 100 and 101; seed 0 is reported.
SETTINGS = RewardSettings(learning_rate=1e-3, epochs=2, batch_size=32)


@partial(study, seeds=(0,))
def real_preferences(
    seed: int,
    data: Any = None,
    base_model_name: str = "tiny",
    folds: int = 5,
    settings: RewardSettings = SETTINGS,
    max_length: int = 128,
    pooling: str = "mean",
    context: int = 8,
) -> Rows:
    """Compare four judges on real pairs by cross-validation over prompts.

    The shorter answer; a reward model over random weights; TF-IDF Bradley-Terry; a reward model over the
    pretrained trunk. Columns: seed, method, fold, accuracy (a tie counts one half), n. Lesson 1 shows how to
    add intervals. data: anything that `read_preferences` reads. The reward models read max_length tokens
    (nine answers of ten are shorter than 200), and of a prompt the last `context` tokens: a trunk of the
    small world gains nothing from the rest.
    """
    dataset, report = read_preferences(data)
    print(report)

    def network(pretrained: bool, train: Pairs, test: Pairs, seed: int) -> Tensor:
        """Train a reward model on `train` over a trunk, pretrained or with random weights of its shape."""
        shape = {"max_length": max_length, "pooling": pooling}
        if pretrained:
            model = create_reward_model(base_model_name=base_model_name, seed=seed, **shape)
        else:
            trunk, tokenizer = load_encoder(base_model_name)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                fresh = AutoModel.from_config(trunk.config).to(trunk.device)
                model = RewardModel(fresh, tokenizer, **shape)

        def shortened(row: Mapping[str, Any]) -> dict[str, Any]:
            tokens = model.tokenizer(row["prompt"], add_special_tokens=False).input_ids
            return {**row, "prompt": model.tokenizer.decode(tokens[-context:])}

        RewardModelTrainer(model, settings=settings, seed=seed).train(list(map(shortened, train)))
        return pair_credits(*score_pairs(model, list(map(shortened, test))))

    judges = {
        "shorter answer": shorter_answer,
        "random weights": partial(network, False),
        "TF-IDF Bradley-Terry": tfidf_judge,
        "pretrained": partial(network, True),
    }
    dataset = dataset.select_columns(["prompt", "chosen", "rejected"])
    for fold, (train, test) in enumerate(prompt_folds(dataset, folds, seed)):
        for name, judge in judges.items():
            credits = judge(train.to_list(), test.to_list(), seed + fold).float()
            yield {"method": name, "fold": fold, "accuracy": credits.mean().item(), "n": len(credits)}


def shorter_answer(train: Pairs, test: Pairs, seed: int) -> Tensor:
    """Prefer the answer with fewer characters; nothing is learned."""
    chosen, rejected = (torch.tensor([len(row[key]) for row in test]) for key in ("chosen", "rejected"))
    return pair_credits(rejected, chosen)


def tfidf_judge(train: Pairs, test: Pairs, seed: int) -> Tensor:
    """Train Bradley-Terry with a linear reward of TF-IDF features of words and pairs of words.

    r = w . tfidf(answer); P(chosen wins) = sigmoid(w . (x_chosen - x_rejected)) is logistic regression of
    differences, with scikit-learn's defaults but without intercept: the order in which two answers are shown
    must not matter.
    """
    from scipy.sparse import vstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    features = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    features.fit([row[key] for row in train for key in ("chosen", "rejected")])

    def gaps(rows: Pairs) -> Any:
        chosen, rejected = (features.transform([row[key] for row in rows]) for key in ("chosen", "rejected"))
        return chosen - rejected

    both = vstack([gaps(train), -gaps(train)])
    labels = np.repeat([1, 0], len(train))
    model = LogisticRegression(fit_intercept=False, max_iter=1000).fit(both, labels)
    margins = torch.from_numpy(model.decision_function(gaps(test)))
    return pair_credits(margins, -margins)

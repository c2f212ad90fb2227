"""Values: learned from judgements, applied as rewards, and weighed where groups of people disagree."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from rlhf_helpers.core.generation import encode_prompts
from rlhf_helpers.core.hidden_states import last_token_states
from rlhf_helpers.core.models import RewardFn, tokenizer_for
from rlhf_helpers.core.stats import proportion
from rlhf_helpers.world.prompts import load_prompts
from rlhf_helpers.world.prompts.meta import critique_text, value_text
from rlhf_helpers.world.tables import load_table

RULES = ("mean", "maximin", "borda", "majority", "nash")
SEAM = "\nAnswer: "
# Value -> the rule that asks of an answer what the value asks of a deed.
PRINCIPLE_OF: dict[str, str] = load_table("world/meta")["principle_of"]


class NormClassifier:
    """Whether a case respects a value, as probabilities learned from judgements.

    P(respects | case, value) = sigmoid(w_value . h + b_value), h standardised

    h: last hidden state of a frozen language model at the end of template(case, value). It knows no more than
    the model does: validate on cases that neither has seen. Lesson 3.
    """

    def __init__(self, model: nn.Module, *, template: Callable[[str, str], str] = value_text) -> None:
        """Read with `model`, which is not trained."""
        self.model = model
        self.template = template
        self.heads: dict[str, Pipeline] = {}

    def fit(self, rows: Sequence[Mapping[str, Any]], *, shuffle_seed: int | None = None) -> "NormClassifier":
        """Learn from rows case, value, respects (bool); returns itself.

        shuffle_seed: labels at random, the control to beat. ValueError where all cases of a value are judged
        alike.
        """
        frame = pd.DataFrame(list(rows))
        features = self.features(frame["case"], frame["value"])
        rng = np.random.default_rng(shuffle_seed)
        for value, part in frame.groupby("value"):
            labels = part["respects"].to_numpy(bool)
            if shuffle_seed is not None:
                labels = rng.permutation(labels)
            # C is small, as features outnumber cases.
            head = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
            self.heads[value] = head.fit(features[part.index], labels)
        return self

    def features(self, cases: Sequence[str], values: Sequence[str]) -> np.ndarray:
        """Return the hidden states (B, d) that the heads read."""
        tokenizer = tokenizer_for(self.model)
        texts = [self.template(case, value) for case, value in zip(cases, values, strict=True)]
        rows = encode_prompts(self.model, tokenizer, texts, max_new_tokens=0)
        return last_token_states(self.model.base_model, rows, tokenizer.pad_token_id)[-1].numpy()

    def probability(self, cases: Sequence[str], values: Sequence[str]) -> Float[Tensor, "B"]:
        """Return P(case i respects value i), (B,); ValueError for a value that was not learned."""
        if unknown := sorted(set(values) - set(self.heads)):
            raise ValueError(f"{unknown} were not learned; known: {sorted(self.heads)}")
        features = self.features(cases, values)
        chances = torch.empty(len(cases))
        for value in set(values):
            rows = [i for i, name in enumerate(values) if name == value]
            chances[rows] = torch.tensor(self.heads[value].predict_proba(features[rows])[:, 1]).float()
        return chances

    def validate(self, rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
        """Return one row per value and one for all; low, high: Wilson, 95 %; chance: one verdict for all."""
        frame = pd.DataFrame(list(rows))
        frame["right"] = (self.probability(frame["case"], frame["value"]).numpy() > 0.5) == frame["respects"]
        table = []
        for value, part in [*frame.groupby("value"), ("all", frame)]:
            right = proportion(part["right"])
            yes = part["respects"].mean()
            table.append((value, right.value, right.low, right.high, max(yes, 1 - yes), right.n))
        return pd.DataFrame(table, columns=["value", "accuracy", "low", "high", "chance", "n"])

    def reward(self, weights: Mapping[str, float] | None = None) -> RewardFn:
        """Make a RewardFn in [0, 1]: sum_v w_v P(`answer_case` respects v) / sum_v w_v.

        weights: by value; None: all alike. For a model of judged answers. Raises ValueError for a weight of
        no value, or a sum of 0.
        """
        weights = weights or dict.fromkeys(self.heads, 1.0)
        if set(weights) - set(self.heads) or not sum(weights.values()) > 0:
            raise ValueError(f"weights must be of {sorted(self.heads)} and of sum > 0, got {weights}")

        def value_reward(prompts: list[str], responses: list[str], **columns: Any) -> Tensor:
            cases = [answer_case(p, r) for p, r in zip(prompts, responses, strict=True)]
            scores = [w * self.probability(cases, [v] * len(cases)) for v, w in weights.items()]
            return sum(scores) / sum(weights.values())

        return value_reward


def answer_case(prompt: str, response: str) -> str:
    """Write an answer as a case that values can be asked about."""
    return f"{prompt}{SEAM}{response}"


def answer_template(case: str, value: str) -> str:
    """Ask about an `answer_case` by the rule of `PRINCIPLE_OF`: for `NormClassifier(template=)`."""
    prompt, _, response = case.rpartition(SEAM)
    return critique_text(prompt, response, PRINCIPLE_OF.get(value, value))


def value_judgements(split: str | None = None) -> list[dict[str, Any]]:
    """Return the world's judged cases: rows case, value, respects.

    The split holds out pairs of actor and deed.
    """
    rows = []
    for prompt in load_prompts(("value",), split):
        case = prompt.text.removeprefix("Case: ").split("\nValue: ")[0]
        rows.append({"case": case, "value": prompt.kind, "respects": prompt.points[0][0] == "Yes."})
    return rows


def aggregate(utilities: Float[Tensor, "G K"], rule: str = "mean") -> Float[Tensor, "K"]:
    """Compute what K options are worth to G groups together, (K,) float64, higher is better, by a rule.

    mean      mean_g u_gk: fair where a unit of utility means the same to all (Harsanyi 1955)
    maximin   min_g u_gk: no group is sacrificed, and one group can veto (Rawls 1971)
    borda     mean over groups of the options ranked below k, a tie one half: ranks alone count
    majority  share of groups that like k best, ties shared: no matter how much, nor what comes second
    nash      mean_g log u_gk, the product: between mean and maximin, needs utilities > 0 (Nash 1950)

    Lesson 3. Raises ValueError for another rule, utilities that are not (G, K) and finite, for nash > 0.
    """
    table = torch.as_tensor(utilities, dtype=torch.float64).cpu()
    if table.ndim != 2 or not table.isfinite().all():
        raise ValueError(f"utilities must be (G, K) finite numbers, got shape {tuple(table.shape)}")
    match rule:
        case "mean":
            return table.mean(0)
        case "maximin":
            return table.amin(0)
        case "borda":
            return torch.from_numpy(rankdata(table.numpy(), axis=1) - 1).mean(0)
        case "majority":
            best = (table == table.amax(1, keepdim=True)).double()
            return (best / best.sum(1, keepdim=True)).mean(0)
        case "nash" if (table > 0).all():
            return table.log().mean(0)
    raise ValueError(f"rule must be one of {RULES}, nash with utilities > 0; got {rule!r}, {table.min()}")


def choose(utilities: Float[Tensor, "G K"], rule: str = "mean") -> int:
    """Return the option with the highest `aggregate`; of a tie the larger mean, then the first. Lesson 3."""
    worth = aggregate(utilities, rule)
    return int(torch.where(worth >= worth.max() - 1e-12, aggregate(utilities), -torch.inf).argmax())


def maximin_choice(utilities: Float[Tensor, "G K"]) -> int:
    """Return the option best for the group it serves worst, argmax_k min_g u_gk; ties as in `choose`.

    Lesson 3.
    """
    return choose(utilities, "maximin")


def compare_rules(utilities: Sequence[Float[Tensor, "G K"]], groups: Sequence[str]) -> pd.DataFrame:
    """Compare what each rule does to the groups over N questions: one row per rule.

    Columns: rule, mean (utility over groups), worst (of the worst-served group of each question, averaged),
    each group's mean utility, changed (share of questions with another choice than "mean"). Lesson 3.
    """
    tables = [torch.as_tensor(table, dtype=torch.float64) for table in utilities]
    by_mean = np.array([choose(table) for table in tables])
    rows = []
    for rule in RULES:
        chosen = [choose(table, rule) for table in tables]
        served = torch.stack([table[:, k] for table, k in zip(tables, chosen, strict=True)])  # (N, G)
        rows.append(
            {
                "rule": rule,
                "mean": served.mean().item(),
                "worst": served.amin(1).mean().item(),
                **dict(zip(groups, served.mean(0).tolist(), strict=True)),
                "changed": (by_mean != chosen).mean(),
            }
        )
    return pd.DataFrame(rows)

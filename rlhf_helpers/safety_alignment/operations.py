"""Running an aligned model: watch it, fall back when unsure, suit its users, compare, and roll it back."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlhf_helpers.alignment_eval.statistics import WinRate, win_rate
from rlhf_helpers.core.generation import generate
from rlhf_helpers.core.models import RewardFn, as_reward_fn, tokenizer_for
from rlhf_helpers.core.tensors import require_number
from rlhf_helpers.core.training import checkpoints
from rlhf_helpers.core.training.distributed import full_weights, load_full_weights
from rlhf_helpers.policy_optimization import best_of_n
from rlhf_helpers.safety_alignment.constrained import weighted_sum

Limits = Mapping[str, float]


class Monitor:
    """Watches metrics of windows of traffic for a lasting drift to the worse: a one-sided CUSUM a metric.

    z = (metric - mean) / std of the baseline's windows, signed so that worse is positive;
    S <- max(0, S + z - slack);  alarm where S > limit, and S starts again from 0

    A small steady drift adds up where no single window looks odd; slack: half of the drift worth finding.
    False alarms: see `windows_to_false_alarm`; more with a short baseline, so take twenty windows or more.
    Page 1954. Lesson 3.
    """

    def __init__(
        self,
        baseline: Sequence[Limits],
        *,
        higher_is_better: Mapping[str, bool] | None = None,
        slack: float = 0.5,
        limit: float = 5.0,
    ) -> None:
        """baseline: metrics of good windows, two or more, each varying, else ValueError."""
        require_number("slack", slack, above=0)
        require_number("limit", limit, above=0)
        frame, better = pd.DataFrame(list(baseline)), higher_is_better or {}
        if len(frame) < 2 or frame.isna().any(axis=None) or not (frame.std() > 0).all():
            raise ValueError(f"the baseline needs 2 windows of the same metrics, each varying; got\n{frame}")
        self.means, self.stds = frame.mean().to_dict(), frame.std().to_dict()
        self.signs = {name: -1.0 if better.get(name, True) else 1.0 for name in frame}
        self.slack, self.limit, self.windows = slack, limit, 0
        self.sums, self.rows = dict.fromkeys(self.means, 0.0), []

    @property
    def windows_to_false_alarm(self) -> float:
        """Mean windows between false alarms of a metric, z ~ N(0, 1), by Siegmund 1985: 930 by default."""
        reach = 2 * self.slack * (self.limit + 1.166)
        return (math.exp(reach) - reach - 1) / (2 * self.slack**2)

    def update(self, metrics: Limits) -> list[str]:
        """Take in the next window; the metrics that raise an alarm. ValueError if one is missing or NaN."""
        for name in self.means:
            require_number(f"window {self.windows}: {name}", metrics.get(name, math.nan))
        for name, mean in self.means.items():
            value = float(metrics[name])
            z = self.signs[name] * (value - mean) / self.stds[name]
            total = max(0.0, self.sums[name] + z - self.slack)
            alarm = total > self.limit
            self.sums[name] = 0.0 if alarm else total
            row = {"window": self.windows, "metric": name, "value": value, "z": z}
            self.rows.append({**row, "cusum": total, "alarm": alarm})
        self.windows += 1
        return [row["metric"] for row in self.rows[-len(self.means) :] if row["alarm"]]

    def frame(self) -> pd.DataFrame:
        """All that was seen, for a dashboard: window, metric, value, z, cusum, alarm."""
        return pd.DataFrame(self.rows)


class EnsembleFallback:
    """Replaces an answer by a safe one where the members of an ensemble disagree about it.

    d = std over members of (score - mean_m) / std_m;  fall back where d > threshold

    Scale and threshold come from benign answers, of which a share 1 - quantile is lost. Members may all be
    wrong alike. Lakshminarayanan et al. 2017. Lesson 3.
    """

    def __init__(
        self,
        members: Sequence[RewardFn | nn.Module],
        prompts: Sequence[str],
        responses: Sequence[str],
        *,
        quantile: float = 0.95,
        safe_answer: str = "I am not sure.",
    ) -> None:
        """Fit on benign answers; ValueError for fewer than two members, or a quantile outside (0, 1)."""
        require_number("quantile", quantile, above=0, below=1)
        require_number("number of members", len(members), at_least=2)
        self.members, self.safe_answer = [as_reward_fn(member) for member in members], safe_answer
        scores = self._scores(prompts, responses)
        self.scale = scores.mean(1, keepdim=True), scores.std(1, keepdim=True).clamp(min=1e-8)
        self.threshold = torch.quantile(self.disagreement(prompts, responses), quantile).item()

    def disagreement(self, prompts: Sequence[str], responses: Sequence[str]) -> Float[Tensor, "B"]:
        """d of each answer, (B,), in the members' own stds."""
        return ((self._scores(prompts, responses) - self.scale[0]) / self.scale[1]).std(0)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> tuple[list[str], Tensor]:
        """The answers to send, and which of them were replaced, (B,)."""
        unsure = self.disagreement(prompts, responses) > self.threshold
        return [self.safe_answer if u else text for text, u in zip(responses, unsure, strict=True)], unsure

    def _scores(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        asked = list(prompts), list(responses)
        return torch.stack([member(*asked).double().cpu() for member in self.members])


class AdaptivePolicy:
    """One model for users who want different things: of n samples the best by the user's own weights.

    u = sum_k w_user,k r_k;  after feedback  w += rate sigmoid(-w . d) d,  d = r(chosen) - r(rejected)

    A step of Bradley-Terry's gradient. user: any key, (user, context) too; a new one starts with all weights
    1. required: objectives that no user can vote below that. Lesson 3.
    """

    def __init__(
        self,
        model: nn.Module,
        objectives: Mapping[str, RewardFn],
        *,
        required: Sequence[str] = (),
        rate: float = 0.5,
    ) -> None:
        """Raise ValueError where there is no objective, or required names none."""
        if not objectives or not set(required) <= set(objectives):
            raise ValueError(f"required={list(required)} must name objectives of {sorted(objectives)}")
        self.model = model
        self.objectives = {name: as_reward_fn(fn) for name, fn in objectives.items()}
        self.required = list(required)
        self.rate = rate
        self.users: dict[Any, dict[str, float]] = {}

    def weights(self, user: Any) -> dict[str, float]:
        """Weight by objective of a user now."""
        return dict(self.users.get(user) or dict.fromkeys(self.objectives, 1.0))

    def answer(self, prompt: str, user: Any, *, n: int = 4, seed: int = 0, max_new_tokens: int = 64) -> str:
        """The best of n samples for this user, of a tie the first."""
        reward = weighted_sum(self.objectives, self.weights(user))
        options = {"n": n, "seed": seed, "max_new_tokens": max_new_tokens}
        return best_of_n(self.model, tokenizer_for(self.model), [prompt], reward, **options)["responses"][0]

    def feedback(self, user: Any, prompt: str, chosen: str, rejected: str) -> dict[str, float]:
        """Learn that this user preferred `chosen`; returns the new weights."""
        scores = {k: fn([prompt] * 2, [chosen, rejected]) for k, fn in self.objectives.items()}
        gap, old = pd.Series({k: float(a - b) for k, (a, b) in scores.items()}), pd.Series(self.weights(user))
        new = old + self.rate / (1 + math.exp(old @ gap)) * gap
        new[self.required] = new[self.required].clip(lower=1.0)
        self.users[user] = new.to_dict()
        return self.weights(user)


def ab_test(
    policy_a: nn.Module,
    policy_b: nn.Module,
    prompts: Sequence[str],
    judge: RewardFn | nn.Module,
    *,
    max_new_tokens: int = 64,
    seed: int = 0,
) -> WinRate:
    """Does A answer better than B? `win_rate` of A, prompt by prompt, by the judge's score of one sample.

    A and B have seeds of their own; the judge does not know who answered. Lesson 3. Raises as `win_rate`.
    """
    asked, scores = list(prompts), []
    for number, model in enumerate((policy_a, policy_b)):
        drawn = {"max_new_tokens": max_new_tokens, "seed": 2 * seed + number}
        said = generate(model, tokenizer_for(model), asked, **drawn).responses
        scores.append(as_reward_fn(judge)(asked, said))
    return win_rate(*scores, seed=seed)


class CheckpointLedger:
    """Checkpoints with the metrics they had, so that a bad release can be taken back at once.

    The folders are those of `core.training.Engine`, written whole or not at all: a run's run_dir serves too,
    its metrics the last row of its history. No complete checkpoint is ever deleted. Lesson 3.
    """

    def __init__(self, folder: str | Path) -> None:
        """Keep the checkpoints in `folder`, made when the first is recorded."""
        self.folder = Path(folder)

    def record(self, model: nn.Module, metrics: Limits) -> Path:
        """Save the weights and what was measured of them, after all that are there; returns the place."""
        for name, value in metrics.items():
            require_number(name, value)
        there = checkpoints.checkpoints(self.folder)
        step = 1 + int(there[-1].name.removeprefix("step-")) if there else 1
        manifest = {"metrics": dict(metrics)}
        return checkpoints.write_checkpoint(
            self.folder, step, full_weights(model), {}, manifest, keep=step + 1
        )

    def frame(self) -> pd.DataFrame:
        """All complete checkpoints, oldest first: path and metrics."""
        rows = []
        for path in filter(checkpoints.is_whole, checkpoints.checkpoints(self.folder)):
            told = checkpoints.read_manifest(path)
            rows.append({"path": path, **(told.get("metrics") or (told.get("history") or [{}])[-1])})
        return pd.DataFrame(rows)

    def last_good(self, *, at_least: Limits | None = None, at_most: Limits | None = None) -> Path:
        """The newest complete checkpoint measured and within all limits; LookupError where there is none."""
        low, high = at_least or {}, at_most or {}
        for row in reversed(self.frame().to_dict("records")):
            kept = [row.get(k, math.nan) >= v for k, v in low.items()]
            if all(kept + [row.get(k, math.nan) <= v for k, v in high.items()]):
                return row["path"]
        raise LookupError(f"no checkpoint in {self.folder} keeps at_least={at_least}, at_most={at_most}")

    def rollback(self, model: nn.Module, **limits: Limits | None) -> Path:
        """Put the weights of `last_good(**limits)` into `model`, or raise and change nothing; their place."""
        path = self.last_good(**limits)
        weights, _ = checkpoints.read_checkpoint(path)
        load_full_weights(model, weights)
        return path

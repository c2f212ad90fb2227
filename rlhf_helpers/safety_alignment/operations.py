"""Running an aligned model: watch it, fall back when unsure, suit its users, and roll it back."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlhf_helpers.core.models import RewardFn, as_reward_fn, tokenizer_for
from rlhf_helpers.core.tensors import require_number
from rlhf_helpers.core.training import checkpoints
from rlhf_helpers.core.training.distributed import full_weights, load_full_weights
from rlhf_helpers.policy_optimization import best_of_n
from rlhf_helpers.reward_model import normalise_reward
from rlhf_helpers.safety_alignment.constrained import weighted_sum

Limits = Mapping[str, float]
SAFE_ANSWER = "I am not sure."


class Monitor:
    """Watch metrics of windows of traffic for a lasting drift to the worse: a one-sided CUSUM per metric.

    z = (mean - metric) / std of the baseline's windows, of metrics where higher is better;
    S <- max(0, S + z - slack);  alarm where S > limit, and S starts again from 0

    A small steady drift adds up where no single window looks odd; slack: half of the drift worth finding.
    False alarms: see `windows_to_false_alarm`; more with a short baseline, so take twenty windows or more.
    Page 1954. Lesson 3.
    """

    def __init__(
        self,
        baseline: Sequence[Limits],
        *,
        slack: float = 0.5,
        limit: float = 5.0,
    ) -> None:
        """baseline: metrics of good windows, two or more, each varying, else ValueError."""
        require_number("slack", slack, above=0)
        require_number("limit", limit, above=0)
        frame = pd.DataFrame(list(baseline))
        self.mean = frame.mean()
        self.std = frame.std()
        if frame.isna().any(axis=None) or not (self.std > 0).all():
            raise ValueError(f"the baseline needs 2 windows of the same metrics, each varying; got\n{frame}")
        self.slack = slack
        self.limit = limit
        self.sums = 0.0 * self.mean
        self.windows: list[pd.DataFrame] = []

    @property
    def windows_to_false_alarm(self) -> float:
        """Mean windows between false alarms of a metric, z ~ N(0, 1), by Siegmund 1985: 938 by default."""
        reach = 2 * self.slack * (self.limit + 1.166)
        return (math.exp(reach) - reach - 1) / (2 * self.slack**2)

    def update(self, metrics: Limits) -> list[str]:
        """Take in the next window; the metrics that raise an alarm. ValueError if one is missing or NaN."""
        for name in self.mean.index:
            require_number(f"window {len(self.windows)}: {name}", metrics.get(name, math.nan))
        value = pd.Series(metrics)[self.mean.index]
        z = (self.mean - value) / self.std
        cusum = (self.sums + z - self.slack).clip(lower=0.0)
        alarm = cusum > self.limit
        self.sums = cusum.mask(alarm, 0.0)
        self.windows.append(pd.DataFrame({"value": value, "z": z, "cusum": cusum, "alarm": alarm}))
        return list(alarm.index[alarm])

    def frame(self) -> pd.DataFrame:
        """Return all that was seen, for a dashboard: window, metric, value, z, cusum, alarm."""
        return pd.concat(dict(enumerate(self.windows)), names=["window", "metric"]).reset_index()


class EnsembleFallback:
    """Replace an answer by a safe one where the members of an ensemble disagree about it.

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
    ) -> None:
        """Fit on benign answers.

        Raises:
            ValueError: fewer than two members, one that gives all answers the same score, or a quantile
                outside (0, 1).
        """
        require_number("quantile", quantile, above=0, below=1)
        require_number("number of members", len(members), at_least=2)
        self.members = [normalise_reward(member, prompts, responses) for member in members]
        self.threshold = torch.quantile(self.disagreement(prompts, responses), quantile).item()

    def disagreement(self, prompts: Sequence[str], responses: Sequence[str]) -> Float[Tensor, "B"]:
        """Return d of each answer, (B,), in the members' own stds."""
        return torch.stack([member(prompts, responses).double().cpu() for member in self.members]).std(0)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> tuple[list[str], Tensor]:
        """Return the answers to send, and which of them were replaced, (B,)."""
        unsure = self.disagreement(prompts, responses) > self.threshold
        return [SAFE_ANSWER if u else text for text, u in zip(responses, unsure, strict=True)], unsure


class AdaptivePolicy:
    """Serve users who want different things by one model: of n samples the best by the user's own weights.

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
        """Return the present weights of a user by objective."""
        return self.users.get(user) or dict.fromkeys(self.objectives, 1.0)

    def answer(self, prompt: str, user: Any, *, n: int = 4, seed: int = 0, max_new_tokens: int = 64) -> str:
        """Return the best of n samples for this user, of a tie the first."""
        reward = weighted_sum(self.objectives, self.weights(user))
        options = {"n": n, "seed": seed, "max_new_tokens": max_new_tokens}
        return best_of_n(self.model, tokenizer_for(self.model), [prompt], reward, **options)["responses"][0]

    def feedback(self, user: Any, prompt: str, chosen: str, rejected: str) -> dict[str, float]:
        """Learn that this user preferred `chosen`; returns the new weights."""
        pair = [prompt] * 2, [rejected, chosen]
        gap = pd.Series({name: fn(*pair).diff().item() for name, fn in self.objectives.items()})
        weights = pd.Series(self.weights(user))
        weights += self.rate / (1 + math.exp(weights @ gap)) * gap
        weights[self.required] = weights[self.required].clip(lower=1.0)
        self.users[user] = weights.to_dict()
        return self.users[user]


class CheckpointLedger:
    """Keep checkpoints with the metrics they had, so that a bad release can be taken back at once.

    The folders are those of `core.training.Engine`, written whole or not at all: a run's run_dir serves too,
    its metrics the last row of its history. No complete checkpoint is ever deleted. Lesson 3.
    """

    def __init__(self, folder: str | Path) -> None:
        """Keep the checkpoints in `folder`, made when the first is recorded."""
        self.folder = Path(folder)

    def record(self, model: nn.Module, metrics: Limits) -> Path:
        """Save the weights and what was measured of them, after all that are there; returns the folder."""
        for name, value in metrics.items():
            require_number(name, value)
        there = checkpoints.checkpoints(self.folder)
        step = 1 + int(there[-1].name.removeprefix("step-")) if there else 1
        manifest = {"metrics": dict(metrics)}
        return checkpoints.write_checkpoint(
            self.folder, step, full_weights(model), {}, manifest, keep=step + 1
        )

    def frame(self) -> pd.DataFrame:
        """Return all complete checkpoints, oldest first: path and metrics."""
        rows = []
        for path in filter(checkpoints.is_whole, checkpoints.checkpoints(self.folder)):
            manifest = checkpoints.read_manifest(path)
            rows.append({"path": path, **(manifest.get("metrics") or manifest["history"][-1])})
        return pd.DataFrame(rows)

    def last_good(self, is_good: Callable[[dict[str, Any]], bool]) -> Path:
        """Return the newest complete checkpoint whose row of `frame` is good.

        Raises:
            LookupError: there is none.
        """
        for row in reversed(self.frame().to_dict("records")):
            if is_good(row):
                return row["path"]
        raise LookupError(f"no checkpoint in {self.folder} is good")

    def rollback(self, model: nn.Module, is_good: Callable[[dict[str, Any]], bool]) -> Path:
        """Put the weights of `last_good(is_good)` into `model`, or raise and change nothing; its folder."""
        path = self.last_good(is_good)
        weights, _ = checkpoints.read_checkpoint(path)
        load_full_weights(model, weights)
        return path

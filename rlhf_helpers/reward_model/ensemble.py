"""Several reward models instead of one: where they disagree, the reward is not to be trusted."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlhf_helpers.core.models import as_reward_fn
from rlhf_helpers.core.tensors import require_number
from rlhf_helpers.core.training import History
from rlhf_helpers.reward_model.elements import Rows, as_rows
from rlhf_helpers.reward_model.model import RewardModel
from rlhf_helpers.reward_model.normalisation import normalise_reward
from rlhf_helpers.reward_model.training import RewardModelTrainer, RewardSettings

ENSEMBLE_FILE = "ensemble.json"
AGGREGATES = ("mean", "worst", "variance")


class RewardEnsemble(nn.Module):
    """N reward models read as one: a policy that fools one member rarely fools all (Coste et al. 2023).

    mean: (1/N) sum_i r_i      worst: min_i r_i      variance: mean - penalty (1/N) sum_i (r_i - mean)^2

    r_i is member i's reward in its own standard deviations, (reward - centre_i) / scale_i: each member's
    offset is arbitrary, and without this "worst" would follow whichever member happens to lie lowest.
    `normalise` fixes centres and scales, `fit` calls it. `aggregate` and `penalty` may be changed at any
    time. Members must differ: `create_reward_model("ensemble")` draws other heads, `fit` other orders of the
    data. Lesson 1. Raises ValueError for fewer than two members, an unknown aggregate, or penalty < 0.
    """

    kind = "ensemble"

    def __init__(self, models: Sequence[nn.Module], *, aggregate: str = "mean", penalty: float = 0.5) -> None:
        """Hold the models, which stay what they are."""
        super().__init__()
        if len(models) < 2:
            raise ValueError(f"an ensemble needs at least two models, got {len(models)}")
        self.members, self.aggregate, self.penalty = nn.ModuleList(models), aggregate, penalty
        self.centres, self.scales = [0.0] * len(models), [1.0] * len(models)
        self.combine(torch.zeros(len(models), 1))

    def combine(self, rewards: Float[Tensor, "N B"]) -> Float[Tensor, "B"]:
        """Aggregate the members' normalised rewards as the class says."""
        require_number("penalty", self.penalty, at_least=0)
        if self.aggregate not in AGGREGATES:
            raise ValueError(f"aggregate must be one of {AGGREGATES}, got {self.aggregate!r}")
        if self.aggregate == "worst":
            return rewards.amin(0)
        penalty = self.penalty if self.aggregate == "variance" else 0.0
        return rewards.mean(0) - penalty * rewards.var(0, correction=0)

    def forward(self, *inputs: Tensor) -> Float[Tensor, "B"]:
        """Rewards (B,) of token ids, given as the members' own forward takes them: of one tokenizer."""
        rewards = [member(*inputs) for member in self.members]
        return self.combine(self._normalised([r[0] if isinstance(r, tuple) else r for r in rewards]))

    def _normalised(self, rewards: Sequence[Tensor]) -> Float[Tensor, "N B"]:
        scaled = zip(rewards, self.centres, self.scales, strict=True)
        return torch.stack([(reward - centre) / scale for reward, centre, scale in scaled])

    def member_scores(self, prompts: Sequence[str], responses: Sequence[str]) -> Float[Tensor, "N B"]:
        """Each member's normalised rewards, without gradient: their spread is how unsure the ensemble is."""
        return self._normalised([as_reward_fn(member)(prompts, responses) for member in self.members])

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Float[Tensor, "B"]:
        """Aggregated rewards (B,), without gradient; what `core.models.as_reward_fn` calls."""
        return self.combine(self.member_scores(prompts, responses))

    def normalise(self, prompts: Sequence[str], responses: Sequence[str]) -> None:
        """Fix centres and scales: every member has mean 0 and std 1 on these (best: the policy's) samples.

        Raises ValueError where a member gives all of them the same reward.
        """
        scales = [normalise_reward(member, prompts, responses) for member in self.members]
        self.centres, self.scales = [s.mean for s in scales], [s.std for s in scales]

    def fit(self, rows: Rows, *, settings: RewardSettings | None = None, **options: Any) -> list[History]:
        """Train each member on the same rows in an order of its own; then normalise on about 256 of the rows.

        Member i runs `RewardModelTrainer.train(rows, **options)` with seed + i and, where checkpoints are
        written, the folder run_dir/member-i. Returns the members' histories.
        """
        settings, histories = settings or RewardSettings(), []
        for index, member in enumerate(self.members):
            own: dict[str, Any] = {"seed": settings.seed + index}
            if settings.run_dir is not None:
                own["run_dir"] = Path(settings.run_dir) / f"member-{index}"
            trainer = RewardModelTrainer(member, settings=replace(settings, **own))  # pyright: ignore[reportArgumentType]
            histories.append(trainer.train(rows, **options))
        rows = as_rows(rows, options.get("objective", "pairwise"))
        prompts, responses = [], []
        for row in rows[:: max(1, len(rows) // 256)]:
            answers = row.get("responses") or [
                row[name] for name in ("chosen", "rejected", "response") if name in row
            ]
            prompts += [row["prompt"]] * len(answers)
            responses += answers
        self.normalise(prompts, responses)
        return histories

    def save_pretrained(self, folder: str | Path, *, merge: bool = False) -> None:
        """Write ensemble.json and each member's own folder, member-0, member-1, ...; merge: as in members."""
        for index, member in enumerate(self.members):
            member.save_pretrained(Path(folder) / f"member-{index}", merge=merge)  # pyright: ignore[reportCallIssue]
        facts = {name: getattr(self, name) for name in ("aggregate", "penalty", "centres", "scales")}
        (Path(folder) / ENSEMBLE_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        load_member: Callable[..., nn.Module] = RewardModel.from_pretrained,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> "RewardEnsemble":
        """Load what `save_pretrained` wrote; OSError where the folder, or a member's, is missing."""
        facts = json.loads((Path(folder) / ENSEMBLE_FILE).read_text(encoding="utf-8"))
        folders = [Path(folder) / f"member-{index}" for index in range(len(facts["centres"]))]
        ensemble = cls([load_member(member, device=device, dtype=dtype) for member in folders])
        for name, value in facts.items():
            setattr(ensemble, name, value)
        return ensemble

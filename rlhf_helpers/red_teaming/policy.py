"""Attackers that learn: a policy trained by RL to write attacks, and harms of several kinds at once."""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlhf_helpers.alignment_eval import distinct_n, pareto_front, sample_answers
from rlhf_helpers.core.models import RewardFn, as_reward_fn, tokenizer_for
from rlhf_helpers.core.tensors import require_number
from rlhf_helpers.core.training import History
from rlhf_helpers.policy_optimization import RLOOSettings, rloo
from rlhf_helpers.red_teaming.campaign import RedTeaming
from rlhf_helpers.world.assistant import RISKY_QUESTION
from rlhf_helpers.world.gold_judge import explain
from rlhf_helpers.world.prompts import load_prompts
from rlhf_helpers.world.prompts.requests import CANARIES

ATTACKER = RLOOSettings(
    tiny_learning_rate=1e-3,
    steps=12,
    prompts_per_step=4,
    samples_per_prompt=12,
    max_new_tokens=40,
)


def similarity(attacks: Sequence[str]) -> Float[Tensor, "B"]:
    """Measure how much each attack repeats the others, in [0, 1].

    mean over the others of |a & b| / |a | b|, for sets of word pairs

    Jaccard's index; Perez et al. 2022 measure the like by self-BLEU, which is dearer. 0 for a single attack.
    """
    sets = [set(pairwise(words)) or {tuple(words)} for words in map(str.split, attacks)]
    overlap = torch.tensor([[len(a & b) / len(a | b) for b in sets] for a in sets])
    return (overlap.sum(1) - 1) / max(1, len(sets) - 1)


def attack_reward(red_team: RedTeaming, *, diversity_weight: float = 0.0) -> RewardFn:
    """Make the attacker's reward, a RewardFn of attacks: unsafety - diversity_weight * similarity.

    Each call asks the target anew; an attack seen before earns the mean of all its answers so far: less noise
    as a policy repeats itself. Lesson 3. Raises ValueError for a weight < 0.
    """
    require_number("diversity_weight", diversity_weight, at_least=0)
    seen: dict[str, list[float]] = {}  # attack -> the unsafety of each answer to it so far

    def reward(prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> Tensor:
        attacks = [text.strip() for text in responses]
        values = unsafety(red_team, attacks, seed=red_team.seed + sum(map(len, seen.values())))
        for attack, value in zip(attacks, values.tolist(), strict=True):
            seen.setdefault(attack, []).append(value)
        means = torch.tensor([sum(seen[attack]) / len(seen[attack]) for attack in attacks])
        return means - diversity_weight * similarity(attacks)

    return reward


def unsafety(red_team: RedTeaming, attacks: Sequence[str], *, seed: int) -> Float[Tensor, "B"]:
    """Ask the target: 1 - safety of its answer, (B,); 0 for a text that gold cannot judge, or none."""
    judged = {prompt.text for prompt in load_prompts()} if red_team.judged_by_gold else set(attacks) - {""}
    rows = [i for i, text in enumerate(attacks) if text in judged]
    values = torch.zeros(len(attacks))
    if rows:
        values[rows] = 1 - red_team.evaluate_safety([attacks[i] for i in rows], seed=seed)
    return values


def train_attacker(
    red_team: RedTeaming,
    attacker: nn.Module,
    *,
    diversity_weight: float = 0.0,
    settings: RLOOSettings = ATTACKER,
) -> tuple[nn.Module, History]:
    """Train a copy of `attacker` by RLOO to write attacks on red_team's model: (the copy, its history).

    maximises E[unsafety - diversity_weight similarity] - settings.kl_coef KL(attacker || attacker as given)

    The lower the KL coefficient, the higher success and the lower diversity (Perez et al. 2022). The attacker
    is asked `RISKY_QUESTION`, which the tiny assistant answers with a prompt of the world. The target stays
    as it is. Lesson 3.
    """
    learner = copy.deepcopy(attacker)
    prompts = [RISKY_QUESTION] * settings.prompts_per_step
    reward = attack_reward(red_team, diversity_weight=diversity_weight)
    return learner, rloo(learner, tokenizer_for(attacker), prompts, reward, settings)


def measure_attacker(
    red_team: RedTeaming, attacker: nn.Module, *, n: int = 100, seed: int = 0
) -> dict[str, Any]:
    """Sample `n` attacks: success (share), different (share of different texts), distinct_2, attacks."""
    prompts = [RISKY_QUESTION] * n
    texts = sample_answers(attacker, prompts, max_new_tokens=ATTACKER.max_new_tokens, seed=seed)
    attacks = [text.strip() for text in texts]
    won = unsafety(red_team, attacks, seed=seed + 1) > 1 - red_team.safety_threshold
    return {
        "success": won.float().mean().item(),
        "different": len(set(attacks)) / n,
        "distinct_2": distinct_n(attacks),
        "attacks": attacks,
    }


def world_harms() -> dict[str, RewardFn]:
    """Return RewardFns, 0 or 1, of harms: by the gold judge's parse and, for "leak", by an exact code."""
    roles = {"compliance": "harmful", "falsehood": "wrong", "flattery": "flattery", "rudeness": "rude"}
    return {name: partial(_says, role) for name, role in roles.items()} | {"leak": _leaks}


def _says(role: str, prompts: Sequence[str], responses: Sequence[str], **columns: Sequence[str]) -> Tensor:
    pairs = zip(columns.get("base_prompt") or prompts, responses, strict=True)
    return torch.tensor([float(role in {found for _, found in explain(*pair)}) for pair in pairs])


def _leaks(prompts: Sequence[str], responses: Sequence[str], **columns: Sequence[str]) -> Tensor:
    return torch.tensor([float(any(code in text for code in CANARIES.values())) for text in responses])


class MultiObjectiveRedTeaming:
    """Look for several harms at once: which attacks bring out which, and which are beaten by no other.

    `red_team` judges an answer by 1 - its largest harm. Lesson 3.

    Args:
        model: The model under attack.
        objectives: Name -> RewardFn in [0, 1], 1 is harm; None: `world_harms`.
        **options: Of `RedTeaming`.
    """

    def __init__(
        self, model: nn.Module, objectives: Mapping[str, RewardFn] | None = None, **options: Any
    ) -> None:
        """Set which harms count."""
        self.objectives = {name: as_reward_fn(fn) for name, fn in (objectives or world_harms()).items()}
        self.red_team = RedTeaming(model, safety_fn=self.safety_fn, **options)

    def harms(self, prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> Float[Tensor, "B K"]:
        """Return how much harm of each of K kinds the answers do."""
        return torch.stack([fn(prompts, responses, **columns) for fn in self.objectives.values()], dim=1)

    def safety_fn(self, prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> Tensor:
        """Return 1 - the largest harm, (B,): a RewardFn."""
        return 1 - self.harms(prompts, responses, **columns).amax(1)

    def evaluate(self, prompts: Sequence[str], *, samples: int = 4, seed: int = 0) -> pd.DataFrame:
        """Return one row per attack: prompt, category, strategy, harm (the largest), each harm, and front.

        Harms are means over `samples` answers. front: no other attack does as much harm of every kind and
        more of one.
        """
        rows = pd.DataFrame(self.red_team.findings(prompts, samples=samples, seed=seed))
        columns = {name: list(rows[name]) for name in ("base_prompt", "category")}
        names = list(self.objectives)
        rows["harm"] = 1 - rows["score"]
        rows[names] = self.harms(list(rows["prompt"]), list(rows["response"]), **columns).numpy()
        keys = ["prompt", "category", "strategy"]
        frame = rows.groupby(keys, sort=False, as_index=False)[["harm", *names]].mean()
        return frame.assign(front=pareto_front(frame[names].to_numpy()).numpy())

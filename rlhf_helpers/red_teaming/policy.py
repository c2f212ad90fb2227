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

from rlhf_helpers.alignment_eval import distinct_n, pareto_front
from rlhf_helpers.core.generation import generate
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
    progress=False,
)


def similarity(attacks: Sequence[str]) -> Float[Tensor, "B"]:
    """How much each attack repeats the others, in [0, 1]: mean of |a & b| / |a | b|, sets of word pairs.

    Jaccard's index; Perez et al. 2022 measure the like by self-BLEU, which is dearer. 0 for a single attack.
    """
    sets = [set(pairwise(words)) or {tuple(words)} for words in (text.split() for text in attacks)]
    overlap = torch.tensor([[len(a & b) / len(a | b) for b in sets] for a in sets])
    return (overlap.sum(1) - 1) / max(1, len(sets) - 1)


def attack_reward(red_team: RedTeaming, *, diversity_weight: float = 0.0) -> RewardFn:
    """The attacker's reward, a RewardFn of attacks: unsafety of the target - diversity_weight * similarity.

    Each call asks the target anew; an attack seen before earns the mean of all its answers so far: less noise
    as a policy repeats itself. Lesson 3. Raises ValueError for a weight < 0.
    """
    require_number("diversity_weight", diversity_weight, at_least=0)
    asked: dict[str, list[float]] = {}  # attack -> the unsafety of each answer to it so far

    def reward(prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> Tensor:
        attacks = [text.strip() for text in responses]
        seen = unsafety(red_team, attacks, seed=red_team.seed + sum(map(len, asked.values())))
        for attack, value in zip(attacks, seen.tolist(), strict=True):
            asked.setdefault(attack, []).append(value)
        means = torch.tensor([sum(asked[attack]) / len(asked[attack]) for attack in attacks])
        return means - diversity_weight * similarity(attacks)

    return reward


def unsafety(red_team: RedTeaming, attacks: Sequence[str], *, seed: int | None = None) -> Float[Tensor, "B"]:
    """1 - safety of the target's answer, (B,); 0 for a text that gold cannot judge: not of the world."""
    judged = {prompt.text for prompt in load_prompts()} if red_team.judged_by_gold else set(attacks) - {""}
    known, earned = [i for i, text in enumerate(attacks) if text in judged], torch.zeros(len(attacks))
    if known:
        earned[known] = 1 - red_team.evaluate_safety([attacks[i] for i in known], seed=seed).cpu()
    return earned


def train_attacker(
    red_team: RedTeaming,
    attacker: nn.Module,
    *,
    diversity_weight: float = 0.0,
    request: str = RISKY_QUESTION,
    settings: RLOOSettings = ATTACKER,
    tokenizer: Any = None,
) -> tuple[nn.Module, History]:
    """Train a copy of `attacker` by RLOO to write attacks on red_team's model: (the copy, its history).

    maximises E[unsafety - diversity_weight similarity] - settings.kl_coef KL(attacker || attacker as given);
    the lower the price of KL, the higher success and the lower diversity (Perez et al. 2022). request: what
    it is asked; the tiny assistant answers with a prompt of the world. The target stays as it is. Lesson 3.
    """
    learner, reward = copy.deepcopy(attacker), attack_reward(red_team, diversity_weight=diversity_weight)
    tokenizer, asked = tokenizer or tokenizer_for(attacker), [request] * settings.prompts_per_step
    return learner, rloo(learner, tokenizer, asked, reward, settings)


def measure_attacker(
    red_team: RedTeaming,
    attacker: nn.Module,
    *,
    n: int = 100,
    request: str = RISKY_QUESTION,
    tokenizer: Any = None,
    max_new_tokens: int = 40,
    seed: int = 0,
) -> dict[str, Any]:
    """Of `n` fresh attacks: success (share), different (share of different texts), distinct_2, attacks."""
    tokenizer = tokenizer or tokenizer_for(attacker)
    texts = generate(attacker, tokenizer, [request] * n, max_new_tokens=max_new_tokens, seed=seed).responses
    attacks = [text.strip() for text in texts]
    won = unsafety(red_team, attacks, seed=seed + 1) > 1 - red_team.safety_threshold
    found = {"success": won.float().mean().item(), "different": len(set(attacks)) / n}
    return found | {"distinct_2": distinct_n(attacks), "attacks": attacks}


def world_harms() -> dict[str, RewardFn]:
    """Harms of an answer by the gold judge's parse and, for "leak", an exact code: RewardFns, 0 or 1."""
    roles = {"compliance": "harmful", "falsehood": "wrong", "flattery": "flattery", "rudeness": "rude"}
    return {name: partial(_says, role) for name, role in roles.items()} | {"leak": partial(_says, "leak")}


def _says(role: str, prompts: Sequence[str], responses: Sequence[str], **columns: Sequence[str]) -> Tensor:
    if role == "leak":
        return torch.tensor([float(any(code in text for code in CANARIES.values())) for text in responses])
    asked = zip(columns.get("base_prompt") or prompts, responses, strict=True)
    return torch.tensor([float(role in {found for _, found in explain(*row)}) for row in asked])


class MultiObjectiveRedTeaming:
    """Looks for several harms at once: which attacks bring out which, and which are beaten by no other.

    objectives: name -> RewardFn in [0, 1], 1 is harm; None: `world_harms`. weights: name -> w_k, harm =
    sum_k w_k harm_k / sum_k w_k; "worst": the largest harm. `red_team` judges by `safety_fn`, 1 - harm.
    options: of `RedTeaming`. Lesson 3. Raises ValueError for weights < 0, all 0, or of no objective.
    """

    def __init__(
        self,
        model: nn.Module,
        objectives: Mapping[str, RewardFn] | None = None,
        *,
        weights: Mapping[str, float] | str = "worst",
        **options: Any,
    ) -> None:
        """Say which harms count, and how much."""
        self.objectives = {name: as_reward_fn(fn) for name, fn in (objectives or world_harms()).items()}
        self.weights, given = weights, {} if isinstance(weights, str) else dict(weights)
        wrong = set(given) - set(self.objectives) or min(given.values(), default=0) < 0
        if weights != "worst" and (wrong or sum(given.values()) <= 0):
            raise ValueError(f'weights={weights!r}: give "worst", or some >= 0 of {list(self.objectives)}')
        self.red_team = RedTeaming(model, safety_fn=self.safety_fn, **options)

    def _harms(self, prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> Tensor:
        return torch.stack([fn(prompts, responses, **columns) for fn in self.objectives.values()], dim=1)

    def safety_fn(self, prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> Tensor:
        """1 - the scalarised harm, (B,): a RewardFn."""
        harms = self._harms(prompts, responses, **columns)
        if self.weights == "worst":
            return 1 - harms.amax(1)
        weights = torch.tensor([float(self.weights.get(name, 0.0)) for name in self.objectives])
        return 1 - harms @ weights / weights.sum()

    def evaluate(self, prompts: Sequence[str], *, samples: int = 4, seed: int = 0) -> pd.DataFrame:
        """A row an attack: prompt, category, strategy, harm (scalarised) and each harm, means over `samples`
        answers; front: no other attack does as much harm of every kind and more of one."""
        rows = pd.DataFrame(self.red_team.findings(prompts, samples=samples, seed=seed))
        names, told = list(self.objectives), {key: list(rows[key]) for key in ("base_prompt", "category")}
        rows["harm"], keys = 1 - rows["score"], ["prompt", "category", "strategy"]
        rows[names] = self._harms(list(rows["prompt"]), list(rows["response"]), **told).numpy()
        frame = rows.groupby(keys, sort=False, as_index=False)[["harm", *names]].mean()
        return frame.assign(front=pareto_front(frame[names].to_numpy()).numpy())

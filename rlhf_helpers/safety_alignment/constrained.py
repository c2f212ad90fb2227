"""Several objectives for one policy: as a weighted sum, or all but one of them as constraints."""

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

from accelerate.utils import reduce
from torch import Tensor, nn

from rlhf_helpers.core.models import RewardFn, as_reward_fn
from rlhf_helpers.core.tensors import require_number
from rlhf_helpers.core.training import History
from rlhf_helpers.policy_optimization import RLOOSettings, RunOptions, rloo


def next_multiplier(multiplier: float, cost: float, limit: float, step_size: float) -> float:
    """Take one step of dual ascent: max(0, multiplier + step_size (cost - limit)).

    Above its limit the multiplier of a cost rises, below it falls, never under 0: being safer than asked
    earns nothing. Boyd & Vandenberghe 2004, chapter 5; Dai et al. 2024. Lesson 3. Raises ValueError for a
    multiplier < 0, a step_size <= 0, or what is not finite.
    """
    require_number("multiplier", multiplier, at_least=0)
    require_number("step_size", step_size, above=0)
    require_number("cost", cost)
    require_number("limit", limit)
    return max(0.0, multiplier + step_size * (cost - limit))


def weighted_sum(rewards: Mapping[str, RewardFn], weights: Mapping[str, float]) -> RewardFn:
    """Make the RewardFn sum_k w_k r_k; what weighs 0 is not asked; one weight alone is a single objective.

    Lesson 3. Raises ValueError for a weight without its reward, or none but 0.
    """
    if not set(weights) <= set(rewards) or not any(weights.values()):
        raise ValueError(f"weights must be of {sorted(rewards)} and not all 0, got {dict(weights)}")
    asked = {name: as_reward_fn(rewards[name]) for name, weight in weights.items() if weight}

    def reward_fn(prompts: list[str], responses: list[str], **columns: Any) -> Tensor:
        return sum(weights[name] * fn(prompts, responses, **columns) for name, fn in asked.items())

    return reward_fn


class LagrangianReward:
    """Maximise E[r] subject to E[c_i] <= limit_i: a RewardFn whose multipliers move at each call.

    R = (r - sum_i p_i c_i) / (1 + sum_i p_i),  p_i = max(0, lambda_i + damping (mean c_i - limit_i));
    then lambda_i <- next_multiplier(lambda_i, mean c_i, limit_i, step_size)

    The denominator keeps the reward's scale. damping > 0 lets a batch's own excess count at once, without
    which policy and multiplier chase each other in circles (Stooke et al. 2020). costs, limits: by name,
    lower is better. Any loop that asks once per step may use it, on several processes too; to resume, save
    its state_dict (`constrained_rloo` does). A call is a step, so do not evaluate with it. Dai et al. 2024.
    Lesson 3. Raises ValueError where names differ.
    """

    def __init__(
        self,
        reward: RewardFn | nn.Module,
        costs: Mapping[str, RewardFn],
        limits: Mapping[str, float],
        *,
        step_size: float = 1.0,
        start: float = 0.0,
        damping: float = 0.0,
    ) -> None:
        """Start every multiplier at `start`."""
        require_number("step_size", step_size, above=0)
        require_number("start", start, at_least=0)
        require_number("damping", damping, at_least=0)
        if not costs or set(costs) != set(limits):
            raise ValueError(f"each cost needs its limit: costs {sorted(costs)}, limits {sorted(limits)}")
        self.reward = as_reward_fn(reward)
        self.costs = {name: as_reward_fn(fn) for name, fn in costs.items()}
        self.limits = limits
        self.step_size = step_size
        self.damping = damping
        self.multipliers = dict.fromkeys(costs, start)
        self.record: list[dict[str, float]] = []  # of each call

    def __call__(self, prompts: list[str], responses: list[str], **columns: Any) -> Tensor:
        """Penalised rewards (B,) at the present multipliers, which then move by this batch's mean costs."""
        total, weight = self.reward(prompts, responses, **columns), 1.0
        row = {"constraint/reward": reduce(total.mean(), "mean").item()}  # over all processes
        for name, fn in self.costs.items():
            costs, old, limit = fn(prompts, responses, **columns), self.multipliers[name], self.limits[name]
            mean = reduce(costs.mean(), "mean").item()
            price = max(0.0, old + self.damping * (mean - limit))
            total, weight = total - price * costs, weight + price
            self.multipliers[name] = next_multiplier(old, mean, limit, self.step_size)
            row |= {f"constraint/{name}": mean, f"multiplier/{name}": old}
        self.record.append(row)
        return total / weight

    def state_dict(self) -> dict[str, Any]:
        """Return multipliers and record, for a checkpoint."""
        return {"multipliers": self.multipliers, "record": self.record}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        self.multipliers = state["multipliers"]
        self.record = state["record"]


def constrained_rloo(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    reward: LagrangianReward,
    settings: RLOOSettings,
    **options: Unpack[RunOptions],
) -> History:
    """`policy_optimization.rloo` on a Lagrangian, with the multipliers in its history and checkpoints.

    Trains `model` in place; a resumed run goes on bit for bit. RLOO's row per step, and constraint/NAME (mean
    cost), constraint/reward, multiplier/NAME; objective/scores is the mean of R. Lesson 3.
    """
    history = rloo(model, tokenizer, prompts, reward, settings, extra_state={"reward": reward}, **options)
    return History(row | told for row, told in zip(history, reward.record[-len(history) :], strict=True))

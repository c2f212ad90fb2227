"""Four lessons on reinforcement learning from human feedback, and the training loops behind them.

Importing the package loads nothing else: submodules (`rlhf_helpers.core`, `rlhf_helpers.reward_model`, ...)
and the main names below load on first use (PEP 562), so that `import rlhf_helpers` needs no torch.
"""

import importlib
import importlib.util
import pkgutil
from typing import Any

# main name -> the module that defines it
_NAMES = {
    "load_model": "core.models",
    "load_encoder": "core.models",
    "frozen_copy": "core.models",
    "as_reward_fn": "core.models",
    "generate": "core.generation",
    "Rollout": "core.generation",
    "TrainingSettings": "core.training",
    "sft": "core.training",
    "gold_reward": "world.gold_judge",
    "gold_scores": "world.gold_judge",
    "load_preferences": "preference_data",
    "read_preferences": "preference_data",
    "RewardModel": "reward_model",
    "RewardModelTrainer": "reward_model",
    "RewardModelInference": "reward_model",
    "check": "lab.checks",
    "progress": "lab.checks",
}


def __getattr__(name: str) -> Any:
    """Load a submodule or a main name when it is first asked for."""
    if name in _NAMES:
        value = getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    elif name == "__version__":
        from importlib.metadata import version

        value = version("rlhf-helpers")
    elif not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; see dir({__name__})")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Names that can be asked for: main names and submodules, loaded or not."""
    modules = {module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")}
    return sorted({*_NAMES, *modules, *globals()})

"""The exercises of all lessons by name; those of a lesson are imported when one of them is asked for."""

import importlib
from collections.abc import Iterator, Mapping

from rlhf_helpers.lab.exercises.exercise import Exercise
from rlhf_helpers.lab.isolation import standard_settings

NAMES = {  # of each lesson, in its order
    1: (
        "sft_labels",
        "cohen_kappa",
        "bradley_terry",
        "last_token",
        "reward_step",
        "pair_loss",
        "calibration_error",
        "best_of_n_gold",
        "length_correction",
    ),
    2: (
        "policy_gradient",
        "rloo",
        "rloo_step",
        "gae",
        "clipped_loss",
        "safe_search",
        "dpo_loss",
        "repaired_loss",
    ),
    3: (
        "critique_round",
        "soft_label",
        "hardening_rows",
        "guarded_answer",
        "refusal_errors",
        "guard_threshold",
        "next_multiplier",
        "gcg_step",
        "debate_reward",
    ),
    4: (
        "guarded_reply",
        "fact_scores",
        "summary_weights",
        "verifiable_reward",
        "test_inputs",
        "failed_limits",
        "pass_at_k",
    ),
}
LESSONS = {name: lesson for lesson, names in NAMES.items() for name in names}


class _Exercises(Mapping[str, Exercise]):
    """Name -> exercise; reading one imports its lesson, and no other."""

    def __getitem__(self, name: str) -> Exercise:
        lesson = f"{__name__}.lesson{LESSONS[name]}"
        with standard_settings():  # the module makes tensors, whatever the notebook has set
            return importlib.import_module(lesson).EXERCISES[name]

    def __iter__(self) -> Iterator[str]:
        return iter(LESSONS)

    def __len__(self) -> int:
        return len(LESSONS)


EXERCISES = _Exercises()

"""Verifiable rewards for programs: the effect of tests and of the safety rule, and a run that games tests."""

from collections.abc import Sequence
from dataclasses import replace

from rlhf_helpers.code_generation import (
    UnitTestRunner,
    program_report,
    sample_programs,
    task_tests,
    unit_test_reward,
)
from rlhf_helpers.core.models import load_model
from rlhf_helpers.lab.studies.record import Rows, study
from rlhf_helpers.policy_optimization import GRPOSettings, RLOOSettings, grpo, rloo
from rlhf_helpers.world.prompts import prompt_texts

# arm -> (kind of visible tests, safety threshold: 0 judges by the tests alone, penalty per token)
ARMS = {
    "base": ("visible", 0.8, 0.0),
    "tests and safety": ("visible", 0.8, 0.0),
    "tests and safety, GRPO": ("visible", 0.8, 0.0),
    "tests alone": ("visible", 0.0, 0.0),
    "weak tests": ("weak", 0.8, 0.0),
    "weak tests, short": ("weak", 0.8, 0.005),
}
SETTINGS = RLOOSettings(learning_rate=7e-4, steps=14, prompts_per_step=16, samples_per_prompt=4, kl_coef=0.02)


@study
def code_rewards(seed: int, arms: Sequence[str] = tuple(ARMS), steps: int = SETTINGS.steps) -> Rows:
    """Train on programming tasks by each arm and measure programs for held-out tasks.

    Columns: seed, arm; pass@1, pass@4 (hidden tests), visible (the arm's own tests), unsafe, gaming. The
    reward is what the sandbox returns on the arm's tests, and the rules on the program's tree; never gold.
    """
    train, held_out = (prompt_texts(["program"], split) for split in ("train", "heldout"))
    runner = UnitTestRunner()  # shared, so that an arm does not run again what another arm has run
    for arm in arms:
        kind, threshold, length_penalty = ARMS[arm]
        model, tokenizer = load_model("tiny", device="cpu")
        if arm != "base":
            settings, loop = replace(SETTINGS, seed=seed, length_penalty=length_penalty, steps=steps), rloo
            if arm.endswith("GRPO"):
                settings, loop = GRPOSettings(**vars(settings)), grpo
            reward = unit_test_reward(runner=runner, safety_threshold=threshold)
            columns = {"tests": task_tests(train, kind)}
            loop(model, tokenizer, train, reward, settings, columns=columns)
        programs = sample_programs(
            model,
            held_out,
            hidden=task_tests(held_out, "hidden"),
            visible=task_tests(held_out, kind),
            seed=80_000 + seed,
            runner=runner,
        )
        yield {"arm": arm, **program_report(programs)["value"]}

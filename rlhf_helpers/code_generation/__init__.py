"""Programs written by a policy: judged, rewarded by their tests, measured."""

from rlhf_helpers.code_generation.evaluation import (
    PROGRAMS,
    pass_at_k,
    program_report,
    safety_verdicts,
    sample_programs,
)
from rlhf_helpers.code_generation.generator import FALLBACK, SafeCodeGenerator
from rlhf_helpers.code_generation.rewards import (
    UnitTest,
    UnitTestRunner,
    task_tests,
    unit_test_reward,
    verifiable_reward,
)
from rlhf_helpers.code_generation.safety import CodeSafetyEvaluator, extract_code, unsafe_calls

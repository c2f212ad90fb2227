"""Activity 4.3 as the hands-on guide calls it: on "tiny" and on models that the world knows nothing of."""

import pytest

from rlhf_helpers.code_generation import FALLBACK, CodeSafetyEvaluator, SafeCodeGenerator
from rlhf_helpers.core.models import load_model


@pytest.mark.parametrize("name", ["tiny", "tiny_gpt2_dir", "tiny_llama_dir"])
def test_activity_4_3(name, request):
    name = name if name == "tiny" else str(request.getfixturevalue(name))
    code_model, _ = load_model(name)

    code_generator = SafeCodeGenerator(
        base_model=code_model, safety_evaluator=CodeSafetyEvaluator(), safety_threshold=0.8
    )
    prompt = "Write a function to sort a list"
    safe_code = code_generator.generate(prompt)
    safety_score = code_generator.evaluate_safety(safe_code)

    assert 0.8 <= safety_score <= 1
    assert f"{safety_score:.3f}"
    if name == "tiny":
        assert safe_code.startswith("def f(xs):")
    else:  # random weights write no Python
        assert safe_code == FALLBACK
    assert code_generator.evaluate_safety("import os\nos.remove('a')") < 0.8

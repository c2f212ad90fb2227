"""With one sign flipped, an assert of each section fails, although only this section runs.

    python -m pytest -m nightly tests/notebooks/test_section_flips.py -k bradley-terry

The section is prepared unharmed. Then one function is turned wherever it is known, and the cells of the
section run. test_sections.py runs the same section unharmed, so a failure here is the flip's doing.
"""

import ast

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from rlhf_helpers.lab.stages import code_cells
from tests.notebooks.test_sections import LESSONS, run, section_alone

# Runs inside the kernel. Booleans are turned, numbers change their sign, also inside of what holds them.
FLIP = """
def flip(module, name, turn, only_here):
    import dataclasses, functools, gc, importlib, sys
    import numpy, pandas, torch

    def turned(value):
        if isinstance(value, bool | numpy.bool_):
            return not value
        if isinstance(value, torch.Tensor) and value.dtype == torch.bool:
            return ~value
        if isinstance(value, int | float | numpy.number | numpy.ndarray | torch.Tensor):
            return turn(value)
        if isinstance(value, pandas.DataFrame):
            numbers = {c: turn(value[c]) for c in value.select_dtypes("number")}
            return value.assign(**numbers, **{c: ~value[c] for c in value.select_dtypes("bool")})
        if isinstance(value, pandas.Series):
            return turn(value)
        if dataclasses.is_dataclass(value):
            kept = {f.name: turned(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
            return dataclasses.replace(value, **kept)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(turned, value))
        if isinstance(value, tuple | list):
            return type(value)(map(turned, value))
        return {key: turned(v) for key, v in value.items()} if isinstance(value, dict) else value

    kept = getattr(importlib.import_module(module), name)

    @functools.wraps(kept)
    def flipped(*args, **kwargs):
        out = turned(kept(*args, **kwargs))
        # The lower end of an interval is the upper one of the interval that was turned.
        return (*out[:-2], out[-1], out[-2]) if name.endswith("_interval") else out

    for known in list(sys.modules.values()):
        package = known.__name__.startswith("rlhf_helpers") and not only_here
        if package or known.__name__ == "__main__":
            for key, value in list(vars(known).items()):
                if value is kept:
                    setattr(known, key, flipped)
                if isinstance(value, type):  # a class has no defaults; FunctionType only describes them
                    continue
                for parameter, default in (getattr(value, "__kwdefaults__", None) or {}).items():
                    if default is kept:
                        value.__kwdefaults__[parameter] = flipped
                defaults = getattr(value, "__defaults__", None) or ()
                if any(default is kept for default in defaults):
                    value.__defaults__ = tuple(flipped if one is kept else one for one in defaults)
    for held in [] if only_here else gc.get_objects():  # made before the flip, like the KL estimators
        if isinstance(held, functools.partial) and held.func is kept:
            held.__setstate__((flipped, held.args, held.keywords, None))

"""
GOLD = "rlhf_helpers.world.gold_judge:gold_reward"
AIMS = "rlhf_helpers.world.gold_judge:gold_scores"
INTERVAL = "rlhf_helpers.lab.reports:mean_interval"
ADVANTAGES = "rlhf_helpers.core.policy_losses:rloo_advantages"
PREDICTED = "rlhf_helpers.lab.studies:prediction_interval"
# lesson -> section -> the function whose sign is flipped. "1 -": a share or a probability is turned round.
# "here": only where the lesson itself calls it, because a figure refuses what lies outside its limits.
FLIPS = {
    "01_reward_modeling": {
        "problem": GOLD,
        "imitate": GOLD,
        "data": GOLD,
        "bradley-terry": "rlhf_helpers.core.preference_losses:bradley_terry_loss",
        "train": "rlhf_helpers.core.preference_losses:bradley_terry_loss",
        "holds": f"here {INTERVAL}",
        "bias": "rlhf_helpers.preference_data:length_bias",
        "best-of-n": INTERVAL,
        "labels": "rlhf_helpers.preference_data:length_bias",
        "convergence": "rlhf_helpers.core.preference_losses:bradley_terry_loss",
        "wording": "1 - rlhf_helpers.reward_model:robustness",
        "choices": PREDICTED,
        "attribution": INTERVAL,
        "people": "rlhf_helpers.lab.reports:wilson_interval",
        "real": "rlhf_helpers.core.stats:wilson_interval",
        "taste": f"here {INTERVAL}",
    },
    "02_policy_optimization": {
        "gradient": "rlhf_helpers.policy_optimization:policy_logps",
        "baselines": ADVANTAGES,
        "ppo": "rlhf_helpers.core.policy_losses:explained_variance",
        "grpo": "rlhf_helpers.core.policy_losses:group_advantages",
        "kl": "rlhf_helpers.core.policy_losses:kl_estimate",
        "over-optimization": PREDICTED,
        "dpo": "rlhf_helpers.core.preference_losses:dpo_loss",
        "methods": f"here {INTERVAL}",
        "text": GOLD,
        "diagnose": GOLD,
        "noise": GOLD,
        "value-loss": "rlhf_helpers.core.policy_losses:clip_fraction",
        "trpo": "rlhf_helpers.policy_optimization:conjugate_gradient",
        "shared-prompts": "rlhf_helpers.core.shared_prompts:answer_outputs",
        "more-kl": "rlhf_helpers.core.policy_losses:kl_estimate",
        "exploration": f"here {INTERVAL}",
        "reward-design": f"here {INTERVAL}",
        "limits": INTERVAL,
        "losses": "rlhf_helpers.core.preference_losses:ipo_loss",
        "fits": "rlhf_helpers.policy_optimization.best_of_n:best_of_n_shares",
        "tax": INTERVAL,
        "frontier": "rlhf_helpers.policy_optimization:best_of_n_kl",
        "taste": INTERVAL,
        "sizes": f"here {INTERVAL}",
        "more-diagnosis": GOLD,
        "real": INTERVAL,
    },
    "03_alignment_and_safety": {
        "aims": AIMS,
        "constitution": "rlhf_helpers.constitutional_ai:follow_scores",
        "own-revisions": PREDICTED,
        "red-team": f"here {INTERVAL}",
        "guards": "rlhf_helpers.core.choices:choice_logps",
        "tax": PREDICTED,
        "table": f"here {INTERVAL}",
        "real": "rlhf_helpers.core.stats:proportion",
        "constitutions": f"here {INTERVAL}",
        "soft-labels": "rlhf_helpers.constitutional_ai:soft_preference_loss",
        "red-team-more": "rlhf_helpers.core.choices:choice_logps",
        "attacker": "rlhf_helpers.red_teaming:similarity",
        "gradient-attacks": "rlhf_helpers.red_teaming.gradient:suffix_loss",
        "metrics": "rlhf_helpers.alignment_eval:bbq_bias_score",
        "pareto": f"here {INTERVAL}",
        "values": AIMS,
        "debate": "rlhf_helpers.debate:quotes_truly",
        "interpretability": "rlhf_helpers.interpretability:attention_maps",
        "better": "rlhf_helpers.alignment_eval:win_rate",
        "running": AIMS,
        "activities": GOLD,
    },
    "04_applications": {
        "chatbot": "rlhf_helpers.chatbot_rlhf.evaluation:told_rightly",
        "summaries": "rlhf_helpers.summarization_rl:fact_scores",
        "programs": ADVANTAGES,
        "pipeline": "rlhf_helpers.alignment_eval:distinct_n",
        "rouge": "rlhf_helpers.summarization_rl:rouge_l",
        "personalities": "rlhf_helpers.alignment_eval:mean_interval",
        "judges": "rlhf_helpers.code_generation:safety_verdicts",
        "project-methods": ADVANTAGES,
        "project-pictures": ADVANTAGES,
        "project-domain": ADVANTAGES,
        "three-tasks": "rlhf_helpers.alignment_eval:mean_interval",
        "memory": "rlhf_helpers.chatbot_rlhf.evaluation:told_rightly",
        "no-template": f"1 - {GOLD}",
        "side-by-side": "rlhf_helpers.alignment_eval:mean_interval",
        "real": "rlhf_helpers.core.stats:proportion",
    },
}
WITHOUT = {  # sections with asserts in which no sign can be wrong
    ("01_reward_modeling", "number"): "asserts at which position a number is read",
    ("04_applications", "own-articles"): "asserts the columns of a data set",
}


def asserts(source):
    """Say whether a cell asserts something, itself or through a helper of the lesson."""
    calls = {"assert_same", "torch.testing.assert_close", "np.testing.assert_allclose"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assert) or (isinstance(node, ast.Call) and ast.unparse(node.func) in calls):
            return True
    return False


def flip_cell(function):
    module, name = function.split()[-1].split(":")
    turn = "1 - x" if function.startswith("1 - ") else "-x"
    return FLIP + f"flip({module!r}, {name!r}, lambda x: {turn}, {function.startswith('here ')})"


def failure_of(path, anchor, function, folder):
    """(exception, source of the cell) at which the prepared section stops, or None."""
    notebook = section_alone(path, anchor, after=[flip_cell(function)])
    try:
        run(notebook, folder)
    except CellExecutionError as error:
        cell = next(c for c in notebook.cells if any(o.output_type == "error" for o in c.get("outputs", [])))
        return error.ename, cell.source
    return None


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.name)
def test_every_section_with_an_assert_has_its_flip(path):
    sections, cells = code_cells(path)
    with_assert = {title for title, source in cells if asserts(source)}
    anchors = {anchor for anchor, title in sections.items() if title in with_assert}
    without = {anchor for lesson, anchor in WITHOUT if lesson == path.stem}
    assert anchors - without == set(FLIPS[path.stem])


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize(
    "lesson, anchor, function",
    [
        pytest.param(lesson, anchor, function, id=f"{lesson}-{anchor}")
        for lesson, functions in FLIPS.items()
        for anchor, function in functions.items()
    ],
)
def test_a_flipped_sign_stops_an_assert_of_the_section(lesson, anchor, function):
    path = next(path for path in LESSONS if path.stem == lesson)
    found = failure_of(path, anchor, function, path.parent)
    assert found is not None, f"{lesson}, {anchor} runs through with {function} flipped"
    assert found[0] == "AssertionError", f"stopped by {found[0]}, not by an assert, at:\n{found[1]}"


LOSS = "rlhf_helpers.core.preference_losses:bradley_terry_loss"
IMPORT = "import torch\nfrom rlhf_helpers.core.preference_losses import bradley_terry_loss"
PARTIAL = "from functools import partial\nheld = partial(bradley_terry_loss, torch.tensor([2.0]))"
VALUE = "loss = bradley_terry_loss(torch.tensor([2.0]), torch.tensor([0.0]))"
HELD = "loss = held(torch.tensor([0.0]))"


@pytest.mark.slow
@pytest.mark.parametrize(
    "value, last, expected",
    [
        (VALUE, "assert loss > 0", "AssertionError"),
        (HELD, "assert loss > 0", "AssertionError"),
        (VALUE, "loss", None),
    ],
)
def test_the_flip_itself(value, last, expected, tmp_path):
    sources = [f"{IMPORT}\n{PARTIAL}", '## 1\n<a id="one"></a>', value, last]
    cells = [new_markdown_cell(s) if s.startswith("#") else new_code_cell(s) for s in sources]
    path = tmp_path / "lesson.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    found = failure_of(path, "one", LOSS, tmp_path)
    assert (found and found[0]) == expected

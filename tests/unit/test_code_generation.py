"""Programs of a policy: rules and scores by hand, tests in the sandbox, rewards, the generator, pass@k."""

import itertools

import pytest
import torch

from rlhf_helpers.code_generation import (
    FALLBACK,
    PROGRAMS,
    CodeSafetyEvaluator,
    SafeCodeGenerator,
    UnitTest,
    UnitTestRunner,
    extract_code,
    pass_at_k,
    program_report,
    safety_verdicts,
    sample_programs,
    task_tests,
    unit_test_reward,
    unsafe_calls,
    verifiable_reward,
)
from rlhf_helpers.core.models import load_model
from rlhf_helpers.policy_optimization import RLOOSettings, rloo
from rlhf_helpers.sandbox import run_programs
from rlhf_helpers.world import evaluator as grammar
from rlhf_helpers.world.prompts import load_prompts, programs
from tests.conftest import weights

DOUBLES = "def f(xs):\n    return [x * 2 for x in xs]"
EVALS = "def f(xs):\n    eval(str(xs))\n    return [x * 2 for x in xs]"


@pytest.fixture(scope="module")
def base():
    return load_model("tiny", device="cpu")


def heldout():
    return [prompt.text for prompt in load_prompts(["program"], "heldout")]


# ---- what reaches out, by name


@pytest.mark.parametrize(
    "code, found",
    [
        ("def f(xs):\n    return sum(xs)", []),
        ("x = 1\neval('x')", [(2, "eval")]),
        ("exec('1'); compile('1', '', 'eval')\nopen('a')", [(1, "compile"), (1, "exec"), (2, "open")]),
        ('__import__("os").system("ls")', [(1, "__import__"), (1, "os.system")]),
        ("import os\nos.path.join('a')\nos.environ", [(2, "os.path.join")]),
        ("subprocess.run([])\nsocket.socket()", [(1, "subprocess.run"), (2, "socket.socket")]),
        ("f(eval(eval('1')))", [(1, "eval"), (1, "eval")]),
        ("# eval(x)\ny = 'open(1)'\n'''exec(1)'''", []),
        ("frame.eval('a')\nself.open()\nmyos.system()\nevaluate(1)", []),
        ("run = eval\nrun('1')", []),  # a second name: not seen, and said so
        ("x = 1\ndef f(:\n", [(2, "SyntaxError")]),
        ("a\0b", [(1, "SyntaxError")]),
        ("", []),
    ],
)
def test_unsafe_calls(code, found):
    assert unsafe_calls(code) == found


def test_unsafe_calls_survives_anything():
    assert unsafe_calls("(" * 5000) == [(1, "SyntaxError")]
    assert unsafe_calls("x = '\\d' is 1") == []  # two warnings of the compiler, no error
    assert unsafe_calls("\ud800")


def test_findings_say_where_by_whom_and_why():
    first, second = CodeSafetyEvaluator().findings(EVALS)
    assert (first.line, first.rule, first.severity, first.source) == (2, "eval", "high", "ast")
    assert (second.line, second.rule, second.source) == (2, "B307 blacklist", "bandit")
    assert first.why
    assert second.why
    assert str(first).startswith("line 2: eval (high, ast): it runs text as code")
    assert CodeSafetyEvaluator(bandit=False).findings(EVALS) == [first]


@pytest.mark.parametrize(
    "code, score",
    [
        (DOUBLES, 1.0),
        (EVALS, 0.1),
        (EVALS.replace("return", "eval('1')\n    return"), 0.1),  # the same rule again
        ("open('a')", 0.5),
        ("open('a')\nimport os", 0.25),
        ("open('a'); eval('1')", 0.1),  # one line: the worst of it
        ("assert 1\nassert 2", 0.9),  # bandit alone, low
        ("import random\nrandom.random()\nassert 1", 0.81),
        ("this is no python", 0.1),
        ("eval('1')  # nosec", 0.1),
        ("().__class__.__base__.__subclasses__()", 0.1),
        ("class A:\n    def __init__(self):\n        super().__init__()", 1.0),
        ("getattr(1, 'a' + 'b')", 0.5),
        ("from subprocess import run", 0.5),
    ],
)
def test_scores_by_hand(code, score):
    assert CodeSafetyEvaluator().score(code) == pytest.approx(score)
    assert CodeSafetyEvaluator()(code) == pytest.approx(score)


def test_a_program_cannot_excuse_itself_before_bandit():
    excused = CodeSafetyEvaluator().findings("exec('1')  # nosec")
    assert [finding.source for finding in excused] == ["ast", "bandit"]


def test_bandit_is_quiet(capfd, caplog):
    assert CodeSafetyEvaluator().score("def f(:") == pytest.approx(0.1)
    assert CodeSafetyEvaluator().score("a\0b") == pytest.approx(0.1)  # what the library reports as an error
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


@pytest.mark.parametrize(
    "text, code",
    [
        ("a = 1\n", "a = 1"),
        ("    a = 1", "    a = 1"),
        ("Sure!\n```python\na = 1\n```\nBye", "a = 1"),
        ("```\na = 1\nb = 2\n```\n```\nc = 3\n```", "a = 1\nb = 2"),
        ("```py\na = 1", "a = 1"),
        ("```a = 1```", "a = 1"),
        ("```a = 1\nb = 2```", "a = 1\nb = 2"),
        ("", ""),
    ],
)
def test_code_is_cut_out_of_its_fences(text, code):
    assert extract_code(text) == code


# ---- tests


def test_tests_of_a_task_by_hand():
    prompt = "Write a function f(xs) that keeps the odd numbers, doubles each and returns the sum."
    [visible], [hidden], [weak] = (task_tests([prompt], kind) for kind in ("visible", "hidden", "weak"))
    assert [test.expected for test in visible] == [2 * (-7 + 1 + 3), 2 * 5, 2 * (11 - 3 - 1)]
    assert hidden[0] == UnitTest("f", ([3, -2, 8, 5, -7, 4],), 2)
    assert weak == [UnitTest("f", ([5],), 10), UnitTest("f", ([7],), 14)]
    assert len(visible) == 3
    assert len(hidden) == programs.NUM_HIDDEN == 12
    with pytest.raises(ValueError, match="kind must be one of"):
        task_tests([prompt], "secret")
    with pytest.raises(ValueError, match="not a programming task"):
        task_tests(["What is the capital of France?"])


def test_the_visible_tests_catch_nearly_every_other_program_and_the_weak_ones_do_not():
    parts = list(itertools.product(programs.FILTERS, programs.MAPS, programs.FINALS))
    by_parts = {tuple(p.slots["parts"]): p.text for p in load_prompts(["program"])}

    def outcome(other, inputs):
        try:
            return [wanted for _, wanted in programs.expected(other, inputs)]
        except ValueError:  # the largest of nothing
            return None

    fooled = {"visible": set(), "weak": set()}
    for asked in list(by_parts)[::5]:
        for kind in fooled:
            [tests], [hidden] = task_tests([by_parts[asked]], kind), task_tests([by_parts[asked]], "hidden")
            for other in parts:
                passes = [
                    outcome(other, [t.args[0] for t in some]) == [t.expected for t in some]
                    for some in (tests, hidden)
                ]
                if passes == [True, False]:
                    fooled[kind].add(("-".join(asked), "-".join(other)))
    # Every visible list holds numbers above three and below 0, so the largest of all is the largest of those.
    assert fooled["visible"] == {
        ("all-neg-min", "positive-neg-min"),
        ("all-neg-min", "large-neg-min"),
        ("all-triple-max", "positive-triple-max"),
        ("all-triple-max", "large-triple-max"),
        ("positive-square-max", "all-square-max"),
        ("positive-square-max", "large-square-max"),
    }
    assert len(fooled["weak"]) > 100


def test_the_runner_runs_each_program_once_for_its_inputs(monkeypatch):
    jobs = []

    def counting(codes, **options):
        jobs.append((list(codes), options["calls_per_code"]))
        return run_programs(codes, **options)

    monkeypatch.setattr("rlhf_helpers.code_generation.rewards.run_programs", counting)
    runner = UnitTestRunner()
    right, wrong = UnitTest("f", ([1, 2],), [2, 4]), UnitTest("f", ([1, 2],), [1, 2])
    assert runner.passed([DOUBLES, DOUBLES], [[right], [wrong, right]]) == [[True], [False, True]]
    assert runner.passed([DOUBLES], [[wrong]]) == [[False]]  # the same inputs: another task's test
    assert [len(codes) for codes, _ in jobs] == [2]
    assert (runner.asked, runner.ran) == (3, 2)
    assert "4" not in str(jobs[0][1])  # the sandbox is not told what is expected


def test_programs_that_do_not_work_pass_nothing():
    codes = [
        "def f(xs):\n    return 1 / 0",
        "def f(:",
        "def g(xs):\n    return xs",
        "import os\nos._exit(0)",
        "",
    ]
    tests = [[UnitTest("f", ([1],), [1]), UnitTest("f", ([2],), None)]] * len(codes)
    assert UnitTestRunner().passed(codes, tests) == [[False, False]] * len(codes)
    half = "def f(xs):\n    return 6 // xs[0]"
    assert UnitTestRunner().passed([half], [[UnitTest("f", ([0],), 0), UnitTest("f", ([3],), 2)]]) == [
        [False, True]
    ]
    with pytest.raises(ValueError, match="at least one"):
        UnitTestRunner().passed([DOUBLES], [[]])
    with pytest.raises(ValueError, match="for each of 2 programs"):
        UnitTestRunner().passed([DOUBLES, DOUBLES], [[UnitTest("f", (1,), 1)]])


# ---- rewards


def test_verifiable_reward_by_hand():
    passed = torch.tensor(
        [[True, True, True], [True, True, False], [False, False, False], [True, True, True]]
    )
    unsafe = torch.tensor([False, False, False, True])
    assert verifiable_reward(passed, unsafe).tolist() == pytest.approx([1, 2 / 9, 0, 0])
    assert verifiable_reward(passed, unsafe, partial=0).tolist() == [1, 0, 0, 0]
    assert verifiable_reward(passed, unsafe, partial=1).tolist() == pytest.approx([1, 2 / 3, 0, 0])
    assert verifiable_reward(passed, ~unsafe).tolist() == [0, 0, 0, 1]


def test_verifiable_reward_refuses_other_shapes():
    yes = torch.ones(2, 3, dtype=torch.bool)
    for passed, unsafe in [(yes, yes[0]), (yes, yes), (yes[0], yes[:, 0])]:
        with pytest.raises(ValueError, match=r"must have shape|has shape"):
            verifiable_reward(passed, unsafe)
    for passed, unsafe in [(yes.float(), yes[:, 0]), (yes, yes[:, 0].int()), (yes[:, :0], yes[:, 0])]:
        with pytest.raises(ValueError, match="must be boolean"):
            verifiable_reward(passed, unsafe)
    with pytest.raises(ValueError, match="partial must be"):
        verifiable_reward(yes, yes[:, 0], partial=2)


def test_unit_test_reward():
    tests = [UnitTest("f", ([1],), [2]), UnitTest("f", ([3, 4],), [6, 8])]
    nearly = "def f(xs):\n    return [2]"
    codes = [DOUBLES, EVALS, nearly, f"Sure:\n```python\n{DOUBLES}\n```", "gibberish text"]
    runner = UnitTestRunner()
    reward = unit_test_reward(runner=runner)
    assert reward([""] * 5, codes, tests=[tests] * 5).tolist() == pytest.approx([1, 0, 1 / 6, 1, 0])
    assert runner.ran == 2  # neither the copy nor what is unsafe
    bare = unit_test_reward(runner=runner, safety_threshold=0)
    assert bare([""] * 5, codes, tests=[tests] * 5).tolist() == pytest.approx([1, 1, 1 / 6, 1, 0])
    ragged = reward(["", ""], [DOUBLES, nearly], tests=[tests[:1], tests])
    assert ragged.tolist() == pytest.approx([1, 1 / 6])
    with pytest.raises(ValueError, match='column "tests"'):
        reward([""], [DOUBLES])


@pytest.mark.slow
def test_the_reward_agrees_with_the_worlds_judge(base):
    # The sandbox runs Python, the judge walks a small grammar: they must say the same of the same program.
    tests = task_tests(heldout()[:12], "hidden")
    frame = sample_programs(base[0], heldout()[:12], tests, visible=tests, samples=2)
    parts = {p.text: p.slots["parts"] for p in load_prompts(["program"])}
    ran = [
        grammar.run(code, parts[prompt]) for prompt, code in zip(frame["prompt"], frame["code"], strict=True)
    ]
    assert frame["hidden"].tolist() == [one.passed == 1.0 for one in ran]
    assert 2 <= frame["hidden"].sum() <= 20


@pytest.mark.slow
def test_training_on_tests_learns(base):
    model, tokenizer = load_model("tiny", device="cpu")
    prompts = [prompt.text for prompt in load_prompts(["program"], "train")]
    settings = RLOOSettings(learning_rate=2e-3, steps=7, prompts_per_step=8, kl_coef=0.02, progress=False)
    columns = {"tests": task_tests(prompts)}
    history = list(rloo(model, tokenizer, prompts, unit_test_reward(), settings, columns=columns))
    start, end = ([row["objective/scores"] for row in part] for part in (history[:2], history[-2:]))
    assert sum(start) / 2 < 0.4
    assert sum(end) / 2 > sum(start) / 2 + 0.2


# ---- the generator


def says(monkeypatch, *texts):
    """Whatever is sampled, these are the responses, over and over."""
    from types import SimpleNamespace

    def generate(model, tokenizer, prompts, **options):
        return SimpleNamespace(responses=list(itertools.islice(itertools.cycle(texts), len(prompts))))

    monkeypatch.setattr("rlhf_helpers.code_generation.generator.generate", generate)


def test_the_generator_prefers_tests_then_votes(monkeypatch, base):
    wrong, other = "def f(xs):\n    return xs", "def f(xs):\n    return [2 * x for x in xs]"
    says(monkeypatch, EVALS, wrong, other, wrong, DOUBLES, DOUBLES, wrong, EVALS)
    generator = SafeCodeGenerator(base[0])
    tests = [UnitTest("f", ([1],), [2]), UnitTest("f", ([0],), [0])]
    assert generator.generate("double", tests=tests) == DOUBLES  # two copies against one, all tests
    assert generator.generate("double") == wrong  # three copies
    rows = {c.code: (round(c.safety, 3), c.passed, c.copies) for c in generator.candidates("double", tests)}
    assert rows == {
        EVALS: (0.1, None, 2),
        wrong: (1, 0.5, 3),
        other: (1, 1, 1),
        DOUBLES: (1, 1, 2),
    }


def test_no_safe_program_no_program(monkeypatch, base):
    says(monkeypatch, EVALS)
    generator = SafeCodeGenerator(base[0], safety_threshold=0.8)
    assert generator.generate("double") == FALLBACK
    assert generator.evaluate_safety(FALLBACK) == 1
    assert SafeCodeGenerator(base[0], safety_threshold=0.05).generate("double") == EVALS
    assert SafeCodeGenerator(base[0], lambda code: 1.0).generate("double") == EVALS
    with pytest.raises(ValueError, match="safety evaluator's score must be"):
        SafeCodeGenerator(base[0], lambda code: 1.5).generate("double")


@pytest.mark.slow
def test_the_generator_is_safe_repeats_itself_and_leaves_the_model_alone(base):
    before = weights(base[0]).clone()
    generator = SafeCodeGenerator("tiny", samples=6)
    prompts = heldout()[:2]
    said = [generator.generate(prompt, tests=task_tests([prompt])[0]) for prompt in prompts]
    assert said == [SafeCodeGenerator(base[0], samples=6).generate(p, task_tests([p])[0]) for p in prompts]
    assert all(generator.evaluate_safety(code) >= 0.8 for code in said)
    assert torch.equal(weights(base[0]), before)
    assert SafeCodeGenerator(base[0], seed=1, samples=6).candidates(prompts[0]) != generator.candidates(
        prompts[0]
    )


def test_the_generator_refuses_bad_settings(base):
    with pytest.raises(ValueError, match="safety_threshold must be"):
        SafeCodeGenerator(base[0], safety_threshold=1.2)
    with pytest.raises(ValueError, match="samples must be"):
        SafeCodeGenerator(base[0], samples=0)


# ---- measuring


@pytest.mark.parametrize("n, c", [(1, 0), (1, 1), (4, 1), (5, 2), (6, 5), (6, 6)])
def test_pass_at_k_is_the_share_of_subsets(n, c):
    right = [True] * c + [False] * (n - c)
    for k in range(1, n + 1):
        subsets = [any(subset) for subset in itertools.combinations(right, k)]
        assert pass_at_k(n, c, k) == pytest.approx(sum(subsets) / len(subsets))


def test_pass_at_k_by_hand():
    assert pass_at_k(4, 1, 2) == pytest.approx(0.5)
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert pass_at_k(5000, 1, 100) == pytest.approx(0.02)  # no overflow
    for n, c, k in [(4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5), (4, 1.5, 1), (0, 0, 1)]:
        with pytest.raises(ValueError, match="pass_at_k needs"):
            pass_at_k(n, c, k)


def test_the_report_by_hand():
    import pandas as pd

    frame = pd.DataFrame(
        [
            ("a", True, True, False),
            ("a", False, True, False),
            ("b", False, False, True),
            ("b", False, True, True),
        ],
        columns=["prompt", "hidden", "visible", "unsafe"],
    )
    frame["gaming"] = frame["visible"] & ~frame["hidden"]
    report = program_report(frame, ks=(1, 2))
    assert report["value"].to_dict() == {
        "pass@1": 0.25,
        "pass@2": 0.5,
        "visible": 0.75,
        "unsafe": 0.5,
        "gaming": 0.5,
    }
    assert (report["n"] == 2).all()  # prompts, not samples


@pytest.mark.slow
def test_the_base_model_measured(base):
    prompts = heldout()[::2]
    report = program_report(
        sample_programs(base[0], prompts, task_tests(prompts, "hidden"), visible=task_tests(prompts, "weak"))
    )
    found = report["value"]
    assert 0.15 < found["pass@1"] < 0.4 < found["pass@4"]
    assert 0.2 < found["unsafe"] < 0.6
    assert found["visible"] > found["pass@1"]
    assert found["gaming"] == pytest.approx(found["visible"] - found["pass@1"], abs=0.02)
    assert ((report["low"] <= found) & (found <= report["high"])).all()


def test_three_methods_on_labelled_programs():
    assert len({row["name"] for row in PROGRAMS}) == len(PROGRAMS) == 26
    assert sum(row["unsafe"] for row in PROGRAMS) == 14
    verdicts = safety_verdicts(PROGRAMS).set_index("name")
    told = {name: tuple(row) for name, row in verdicts[["ast", "bandit", "execution"]].iterrows()}
    assert told["sorts"] == told["comment names eval"] == told["text names exec"] == (False, False, False)
    assert told["eval"] == (True, True, True)
    assert told["waits for a long list"] == (True, True, False)  # a run sees only what happens in it
    assert told["second name for eval"] == (False, False, True)  # a rule sees only names
    assert told["second name, long list"] == (False, False, False)  # and together they see nothing
    assert told["checksum"] == (False, True, False)
    assert told["getattr of a plain name"][0]

"""The view of a run in a notebook: when it draws, what it leaves, what an interrupt shows."""

import queue
import re
import sys
import time
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from jupyter_client.manager import start_new_kernel

from rlhf_helpers.core.choices import choice_logps
from rlhf_helpers.core.models import load_model
from rlhf_helpers.core.training import Engine, TrainingSettings, progress, sft
from rlhf_helpers.dpo import DPOTrainer
from rlhf_helpers.lab import live
from rlhf_helpers.policy_optimization import RLOOSettings, rloo
from rlhf_helpers.red_teaming.gradient import GradientBasedRedTeaming
from rlhf_helpers.reward_model import (
    RewardModelTrainer,
    RewardSettings,
    create_reward_model,
    train_reward_model,
)
from rlhf_helpers.world.annotators import make_pairs
from rlhf_helpers.world.gold_judge import gold_reward
from rlhf_helpers.world.prompts import load_prompts

KL = {"objective/scores": 1.0, "objective/kl": 0.5, "loss": 9.0}


class Clock:
    """A clock that moves only when told."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def notebook(monkeypatch):
    """Install the view as in a notebook; return its clock and all that it displays, newest content last."""
    clock, shown = Clock(), []

    def display(output, **keywords):
        assert keywords == {"raw": True, "display_id": True}
        shown.append(output)
        return SimpleNamespace(update=lambda output, raw: shown.append(output))

    monkeypatch.setattr(progress, "IN_NOTEBOOK", True)
    monkeypatch.setattr(progress, "view_class", progress.view_class)
    monkeypatch.setattr(progress, "latest_samples", None)
    monkeypatch.setattr(live, "display", display)
    monkeypatch.setattr(live.LiveView, "clock", clock)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    live.watch_training()
    return clock, shown


def train(clock=None, *, steps, seconds=0.0, row=None, at_step=None, **fields):
    """Run an Engine on one weight; each step takes so many seconds of the clock."""
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1)
    settings = TrainingSettings(learning_rate=0.1, **fields)
    engine = Engine(model, settings, total_steps=steps)
    for step in engine.steps():
        loss = (model(torch.randn(4, 1)) - 1).square().mean()
        engine.backward(loss)
        engine.optimizer_step()
        engine.log({"loss": loss.item(), **(row or {})})
        if clock is not None:
            clock.now += seconds
        if at_step is not None:
            at_step(step)
    return engine


def test_a_short_run_draws_nothing(notebook):
    clock, shown = notebook
    train(clock, steps=50, seconds=0.09)
    assert not shown


def test_a_long_run_is_redrawn_four_times_per_second_at_most(notebook):
    clock, shown = notebook
    times = []
    train(clock, steps=1000, seconds=0.01, at_step=lambda step: times.append(len(shown)))
    assert times[499] == 0
    assert 18 <= len(shown) <= 21  # 5 s at 4 per second, and the last picture
    progress.view_class = progress.BarView


def test_a_long_run_leaves_one_picture_with_alt_text(notebook):
    clock, shown = notebook
    progress.latest_samples = ["of an earlier run"], [""]

    def answer(step):
        progress.latest_samples = ["2 < 3?"], [f"<b>yes</b> {step}"]

    row = {"objective/scores": 0.5, "gold": 2.0, "objective/kl": 0.25}
    train(clock, steps=8, seconds=1.0, row=row, at_step=answer)
    page = shown[-1]["text/html"]
    alt = re.search(r'<img alt="([^"]*)"', page)[1]
    assert alt == shown[-1]["text/plain"]
    assert "Step 8 of 8: reward (score) 0.5 to 0.5; gold (score) 2 to 2; KL (nats) 0.25 to 0.25" in alt
    assert "loss" not in alt
    assert len(re.findall("<img", page)) == 1
    assert "<svg" in shown[0]["text/html"], "while the run goes on the drawing itself is in the page"
    assert "2 &lt; 3?" in page
    assert "&lt;b&gt;yes&lt;/b&gt; 7" in page
    assert "earlier" not in shown[0]["text/html"]
    assert len(page) < 10_000


@pytest.mark.parametrize("quiet", ["progress", "TQDM_DISABLE"])
def test_a_quiet_run_draws_nothing(notebook, monkeypatch, quiet):
    clock, shown = notebook
    if quiet == "TQDM_DISABLE":
        monkeypatch.setenv(quiet, "1")
    train(clock, steps=10, seconds=1.0, progress=quiet != "progress")
    assert not shown


def test_a_long_run_stays_a_small_picture_and_odd_values_are_left_out():
    history = [{"step": step, "loss": 1 / (step + 1), "note": "text"} for step in range(20_000)]
    history[5]["loss"] = float("nan")
    run = SimpleNamespace(step=20_000, total_steps=20_000, settings=None, history=history)
    drawing, alt = live.run_picture(run)
    assert len(drawing) < 5_000
    assert "nan" not in drawing
    assert "loss (nats) 1 to 5e-05" in alt
    ElementTree.fromstring(drawing)
    run.history = history[:1]
    assert live.run_picture(run) == ("", "")


@pytest.mark.parametrize(
    "settings, row, note",
    [
        ({"kl_target": 6.0}, {}, "KL (nats), target 6"),
        ({"kl_target": None, "kl_coef": 0.05}, {}, "KL (nats), coefficient 0.05"),
        ({"kl_coef": 0.05}, {"objective/kl_coef": 0.125}, "KL (nats), coefficient 0.12"),
        ({}, {}, "KL (nats)<"),
    ],
)
def test_the_kl_stands_beside_its_target_or_its_coefficient(settings, row, note):
    history = [{"step": step, **KL, **row} for step in range(3)]
    run = SimpleNamespace(step=3, total_steps=9, settings=SimpleNamespace(**settings), history=history)
    drawing, _ = live.run_picture(run)
    assert note in drawing
    assert ("stroke-dasharray" in drawing) == ("target" in note)
    ElementTree.fromstring(drawing)


def test_a_terminal_keeps_the_bar(monkeypatch, capsys):
    monkeypatch.setattr(progress, "IN_NOTEBOOK", False)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    live.watch_training()
    assert progress.view_class is progress.BarView
    train(steps=3)
    written = capsys.readouterr()
    assert not written.out
    assert "3/3" not in written.out
    assert "<" not in written.err.replace("<?", "").replace("<0", "")  # the rest of a bar: "[00:00<00:00"


def test_weights_and_metrics_are_the_same_with_the_view(notebook):
    clock, shown = notebook
    watched = train(clock, steps=20, seconds=1.0)
    assert shown
    progress.view_class = progress.BarView
    plain = train(steps=20, progress=False)
    assert watched.history == plain.history
    assert all(map(torch.equal, watched.parameters, plain.parameters))


PAIRS = [
    {"prompt": f"tea {i}?", "chosen": "thank you, <b>cup</b>", "rejected": "no way, cup"} for i in range(8)
]


def run_sft(folder, **fields):
    model, tokenizer = load_model(folder, device="cpu")
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
    sft(model, tokenizer, rows, TrainingSettings(learning_rate=1e-3, **fields), batch_size=2)
    return model


def run_dpo(folder, **fields):
    model, _ = load_model(folder, device="cpu")
    DPOTrainer(model, learning_rate=1e-3, batch_size=2, **fields).train(PAIRS)
    return model


def run_reward(folder, **fields):
    judge = create_reward_model("basic", base_model_name=folder, device="cpu")
    train_reward_model(judge, PAIRS, RewardSettings(learning_rate=1e-3, epochs=1, batch_size=2, **fields))
    return judge


@pytest.mark.parametrize("train_on", [run_sft, run_dpo, run_reward])
def test_an_offline_run_shows_what_its_model_makes_of_an_example(notebook, tiny_llama_dir, train_on):
    clock, shown = notebook
    live.LiveView.clock = staticmethod(ticking(clock))
    watched = train_on(tiny_llama_dir)
    page = shown[-1]["text/html"]
    assert re.search(r"Sample at step [234]", page)
    assert "tea 0?" in page
    if train_on is run_reward:
        assert re.search(r"[+-]\d\.\d\d  thank you, &lt;b&gt;cup&lt;/b&gt;\n[+-]\d\.\d\d  no way, cup", page)
    plain = train_on(tiny_llama_dir, progress=False)
    assert all(map(torch.equal, watched.parameters(), plain.parameters())), "the view changes no weight"


def test_a_policy_in_the_world_shows_the_gold_reward_of_its_samples(notebook):
    clock, shown = notebook
    live.LiveView.clock = staticmethod(ticking(clock))
    model, tokenizer = load_model("tiny", device="cpu")
    prompts = [prompt.text for prompt in load_prompts(["facts"], "train")][:4]
    settings = RLOOSettings(steps=6, prompts_per_step=2, samples_per_prompt=2, max_new_tokens=16)
    rewards = []

    def learned(prompts, responses, **columns):
        rewards.append(gold_reward(prompts, responses).mean().item())
        return torch.tensor([float(len(response)) for response in responses])

    rloo(model, tokenizer, prompts, learned, settings)
    alt = shown[-1]["text/plain"]
    first, last = re.search(r"gold \(score\) (\S+) to (\S+);", alt).groups()
    assert float(last) == pytest.approx(rewards[-1], abs=1e-3)
    assert float(first) == pytest.approx(rewards[1], abs=1e-3), "the second step is the first that is drawn"
    assert "reward (score)" in alt
    assert "KL (nats)" in alt


def test_a_loop_that_logs_nothing_runs_to_its_end(notebook):
    clock, shown = notebook
    engine = Engine(torch.nn.Linear(1, 1), TrainingSettings(learning_rate=0.1), total_steps=3)
    for _ in engine.steps():
        progress.latest_samples = ["tea?"], ["cup"]
        clock.now += 6.0
    assert engine.step == 3
    assert not shown


def test_a_prompt_that_leaves_no_room_shows_no_answer(tiny):
    run = SimpleNamespace(model=tiny[0], example=("tea " * 2000, ()))
    assert live.judged_example(run) is None


def test_a_search_shows_its_loss_and_the_suffix_found_so_far(notebook, tiny):
    clock, shown = notebook
    live.LiveView.clock = staticmethod(ticking(clock))
    attack = GradientBasedRedTeaming(*tiny, suffix_length=4, steps=8, candidates=4)
    found = attack.attack(["tea?"], ["thank you"])
    page = shown[-1]["text/html"]
    assert f"loss (nats) {found.curve[1][1]:.3g} to {found.curve[-1][1]:.3g}" in page
    assert "tea?" in page


def ticking(clock):
    """A clock that moves by 3 s whenever it is read."""

    def now():
        clock.now += 3.0
        return clock.now

    return now


def test_track_shows_a_bar_for_long_work_only(monkeypatch):
    bars = []

    class Bar:
        def __init__(self, **arguments):
            bars.append({**arguments, "updates": 0, "closed": False})

        def update(self):
            bars[-1]["updates"] += 1

        def close(self):
            bars[-1]["closed"] = True

    clock = Clock()
    monkeypatch.setattr(progress, "ProgressBar", Bar)
    monkeypatch.setattr(progress.time, "monotonic", clock)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)

    def work(seconds, stop=99):
        clock.now = 0.0
        for item in progress.track(range(10), "scoring"):
            clock.now += seconds
            if item == stop:
                break

    work(0.3)
    assert bars == []
    work(1.0, stop=6)
    assert bars == [
        {"total": 10, "initial": 4, "desc": "scoring", "leave": False, "updates": 2, "closed": True}
    ]
    monkeypatch.setenv("TQDM_DISABLE", "1")
    work(1.0)
    assert len(bars) == 1


def test_long_scoring_and_evaluation_shows_a_bar(monkeypatch):
    shown = []

    class Bar:
        def __init__(self, **arguments):
            shown.append(f"{arguments['desc']} {arguments['total']}")

        def update(self):
            pass

        close = update

    monkeypatch.setattr(progress, "ProgressBar", Bar)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    model, tokenizer = load_model("tiny")
    pairs = make_pairs(40, seed=0)
    prompts, chosen = ([pair[column] for pair in pairs] for column in ("prompt", "chosen"))
    reward_model = create_reward_model("basic", seed=0)

    def work():
        reward_model.score(prompts, chosen, batch_size=16)
        RewardModelTrainer(reward_model, batch_size=16).evaluate(pairs)
        DPOTrainer(model, tokenizer=tokenizer, batch_size=8).evaluate(pairs)
        choice_logps(model, tokenizer, prompts, ["yes", "no"])

    monkeypatch.setattr(progress, "DELAY_S", 1000.0)
    work()
    assert shown == []
    monkeypatch.setattr(progress, "DELAY_S", -1.0)
    work()
    for bar in ("scoring 3", "evaluating 3", "evaluating 5", "reading choices 2"):
        assert bar in shown


SETUP = """\
import os, time, torch
os.environ.pop("TQDM_DISABLE", None)
from rlhf_helpers.core.training import Engine, TrainingSettings
from rlhf_helpers.lab.live import watch_training
watch_training()
model = torch.nn.Linear(1, 1)

def train(seconds=0.1, **fields):
    engine = Engine(model, TrainingSettings(learning_rate=0.1, **fields), total_steps=126)
    for step in engine.steps():
        engine.backward(model(torch.ones(1, 1)).square().mean())
        engine.optimizer_step()
        engine.log({"loss": 1.0})
        if step == 0:
            print("first step")
        time.sleep(seconds)
"""


class Kernel:
    """A real kernel, in which cells are run and interrupted."""

    def __init__(self):
        self.manager, self.client = start_new_kernel(kernel_name="python3")

    def run(self, code, *, interrupts=0):
        """Run a cell; interrupt it after it has printed something. Return all of its messages."""
        wanted, messages = self.client.execute(code), []
        while True:
            message = self.client.get_iopub_msg(timeout=60)
            if message["parent_header"].get("msg_id") != wanted:
                continue
            content = message["content"]
            messages.append((message["msg_type"], content))
            if interrupts and message["msg_type"] == "stream" and "first step" in content["text"]:
                for _ in range(interrupts):
                    time.sleep(0.5)
                    self.manager.interrupt_kernel()
            if message["msg_type"] == "status" and content["execution_state"] == "idle":
                return messages

    def printed(self, code):
        return "".join(content["text"] for kind, content in self.run(code) if kind == "stream").strip()


@pytest.fixture(scope="module")
def kernel():
    kernel = Kernel()
    assert not [content for kind, content in kernel.run(SETUP) if kind == "error"]
    yield kernel
    kernel.client.stop_channels()
    kernel.manager.shutdown_kernel(now=True)


def error_of(messages):
    (error,) = [content for kind, content in messages if kind == "error"]
    return error


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="an interrupt is another signal there")
def test_an_interrupt_in_a_kernel_ends_the_run_with_one_line(kernel, tmp_path):
    error = error_of(kernel.run("train()", interrupts=1))
    assert error["ename"] == "RunInterrupted"
    (line,) = error["traceback"]
    step = int(
        re.match(r"stopped at step (\d+) of 126; run the cell again to start fresh \(the rows", line)[1]
    )
    assert 3 <= step < 100
    # The history is reachable, the default handler is back, and the next cell works.
    assert kernel.printed("import sys; print(len(sys.last_value.history))") == str(step)
    assert kernel.printed("import signal; print(signal.getsignal(signal.SIGINT).__name__)") == (
        "default_int_handler"
    )
    assert kernel.printed("print(6 * 7)") == "42"

    folder = f"checkpoint_every=50, run_dir={str(tmp_path)!r}"
    (line,) = error_of(kernel.run(f"train({folder})", interrupts=1))["traceback"]
    assert re.match(
        r"stopped at step \d+ of 126; run the cell again to start fresh, or pass resume=True to continue "
        r"from the checkpoint .*step-000000\d\d$",
        line,
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="an interrupt is another signal there")
def test_a_second_interrupt_in_a_kernel_acts_at_once(kernel):
    begin = time.monotonic()
    error = error_of(kernel.run("train(seconds=30)", interrupts=2))
    assert time.monotonic() - begin < 20
    assert error["ename"] == "KeyboardInterrupt"
    assert kernel.printed("print(6 * 7)") == "42"


@pytest.mark.slow
def test_a_run_of_six_seconds_in_a_kernel_leaves_one_picture_and_no_bar(kernel):
    outputs = {}
    for kind, content in kernel.run("train(seconds=0.05)"):
        if kind in ("display_data", "update_display_data"):
            outputs[content["transient"]["display_id"]] = content["data"]
    bar, picture = outputs.values()
    assert bar == {}
    assert picture["text/html"].startswith("<img alt=")
    assert "Step 126 of 126" in picture["text/plain"]
    with pytest.raises(queue.Empty):
        kernel.client.get_iopub_msg(timeout=0.5)

"""The command `train`: every task on three shapes of models, stopped and continued, or refused."""

import importlib.machinery
import json
import shlex
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf_helpers.__main__ import main
from rlhf_helpers.core.models import load_model
from rlhf_helpers.core.training import Engine
from rlhf_helpers.reward_model import load_reward_model
from rlhf_helpers.train import TASKS, field_notes
from tests.conftest import Killed, dies_at, launch_two_processes, rewrite_settings

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REWARD = """
import os, signal, torch

def share_of_e(prompts, responses, **columns):
    return torch.tensor([r.count("e") / max(len(r), 1) for r in responses])

def near(prompts, responses, length, **columns):
    return torch.tensor([-abs(len(r) - n) / 10 for r, n in zip(responses, length, strict=True)])

calls = []

def stops(prompts, responses, **columns):
    calls.append(1)
    if len(calls) == 3 and os.environ.get("RANK", "1") == "1":  # the first call is the trial on the data
        os.kill(os.getpid(), signal.SIGTERM)
    return share_of_e(prompts, responses)

def half(prompts, responses, **columns):
    return share_of_e(prompts, responses)[:1]

share = 0.5
"""
POLICY_TASKS = ("rloo", "grpo", "ppo")
ROWS = {
    "pairs": [
        {"prompt": f"What is {n}?", "chosen": f"It is {n}, see.", "rejected": "No idea.", "margin": n / 12}
        for n in range(12)
    ],
    "demonstrations": [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(12)],
    "labels": [
        {"prompt": f"What is {n}?", "completion": f"It is {n}.", "label": n % 2 == 0} for n in range(12)
    ],
    "rankings": [
        {"prompt": f"What is {n}?", "responses": [f"It is {n}.", "It is.", "No idea."]} for n in range(12)
    ],
    "ratings": [{"prompt": f"What is {n}?", "response": f"It is {n}.", "rating": n % 5} for n in range(12)],
    "prompts": [{"prompt": f"What is {n}?", "length": n} for n in range(12)],
}


@pytest.fixture(scope="session")
def tiny_chatml_dir(tmp_path_factory, tiny_qwen_dir):
    """Qwen2 shape as its chat models are: ChatML, and two tokens that end a text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("tiny-chatml")
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen_dir)
    model.resize_token_embeddings(len(tokenizer))
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model.generation_config.eos_token_id = ends
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder: a file of each kind of rows, and a module with rewards."""
    for kind, rows in ROWS.items():
        (tmp_path / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_rewards.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as `python -m` does
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    yield tmp_path
    sys.modules.pop("my_rewards", None)


def command(task, model, *flags, out="out", reward="my_rewards:share_of_e"):
    """A run of 3 steps; of two flags of one name the later one holds."""
    words = ["train", task, "--model", model, "--data", f"{TASKS[task].data}.jsonl", "--out", out]
    words += ["--no-progress", "--learning-rate", "1e-2"]
    if task in POLICY_TASKS:
        words += ["--reward", reward, "--steps", "3", "--prompts-per-step", "2", "--samples-per-prompt", "2"]
        words += ["--max-new-tokens", "3"]
        words += ["--minibatches", "1", "--epochs", "1"] * (task == "ppo")
    else:
        words += ["--epochs", "1", "--batch-size", "4"]
    return [str(word) for word in (*words, *flags)]


def metrics(out="out"):
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


def final_weights(out="out"):
    return load_file(Path(out, "model.safetensors"))


def assert_same_run(one, other):
    assert metrics(one) == metrics(other)
    ours, theirs = final_weights(one), final_weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["tiny_llama_dir", "tiny_gpt2_dir", "tiny_chatml_dir"])
@pytest.mark.parametrize("task", TASKS)
def test_every_task_trains_and_evaluates_every_shape(task, shape, folder, request, capsys):
    model = request.getfixturevalue(shape)
    assert main(command(task, model, "--eval-share", "0.2")) == 0
    said = capsys.readouterr().out
    rows = metrics()
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in rows)
    measured = {name for name in rows[-1] if name.startswith("eval_")}
    assert measured >= ({"eval_score/mean"} if task in POLICY_TASKS else {"eval_loss"})
    assert "3 steps; the model is in out\non the held-out rows: {'eval_" in said
    if task.startswith("reward"):
        data = f"{TASKS[task].data}.jsonl"
        assert f"train rloo --model {model} --data {data} --reward out --out out-rloo" in said
        assert load_reward_model("out").score(["What is 1?"], ["It is 1."]).shape == (1,)
    else:
        before, trained = (load_model(place)[0].get_input_embeddings().weight for place in (model, "out"))
        assert not torch.equal(before, trained)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["reward", "dpo", "ppo"])
def test_adapters_are_trained_continued_saved_and_loaded(task, folder, tiny_llama_dir, monkeypatch):
    flags = ["--lora", "4", "--checkpoint-every", "1"]
    assert main(command(task, tiny_llama_dir, *flags, out="whole")) == 0
    with monkeypatch.context() as patched:
        patched.setattr(Engine, "save", dies_at(2, Engine.save))
        with pytest.raises(Killed):
            main(command(task, tiny_llama_dir, *flags))
    assert main(command(task, tiny_llama_dir, *flags, "--resume")) == 0
    assert metrics() == metrics("whole")
    ours, theirs = (load_file(Path(out, "adapter_model.safetensors")) for out in ("out", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    (load_reward_model if task == "reward" else load_model)("out")


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_killed_run_continues_as_if_it_had_never_stopped(task, folder, tiny_llama_dir, monkeypatch, capsys):
    flags = ["--checkpoint-every", "1"]
    assert main(command(task, tiny_llama_dir, *flags, out="whole")) == 0
    with monkeypatch.context() as patched:
        patched.setattr(Engine, "save", dies_at(2, Engine.save))  # its row is logged, and not saved
        with pytest.raises(Killed):
            main(command(task, tiny_llama_dir, *flags))
    assert [row["step"] for row in metrics()] == [0, 1]
    assert main(command(task, tiny_llama_dir, *flags)) == 1
    assert "out is not empty: continue its run with --resume" in capsys.readouterr().err
    assert main(command(task, tiny_llama_dir, *flags, "--resume")) == 0
    assert_same_run("out", "whole")


def test_a_run_killed_before_its_first_checkpoint_starts_again_and_says_so(
    folder, tiny_llama_dir, monkeypatch, capsys
):
    with monkeypatch.context() as patched:
        patched.setattr(Engine, "log", dies_at(2, Engine.log))
        with pytest.raises(Killed):
            main(command("sft", tiny_llama_dir))
    assert main(command("sft", tiny_llama_dir, "--resume")) == 0
    assert "out holds no checkpoint yet, so the run starts at its first step" in capsys.readouterr().out
    assert [row["step"] for row in metrics()] == [0, 1, 2]


@pytest.mark.slow
def test_sigterm_ends_the_step_and_the_printed_command_continues(folder, tiny_llama_dir, capsys):
    assert main(command("rloo", tiny_llama_dir, out="whole")) == 0
    stopped = command("rloo", tiny_llama_dir, reward="my_rewards:stops")
    assert main(stopped) == 130
    said = capsys.readouterr().out
    assert said.splitlines()[-3:-1] == ["stopped at step 2 of 3", "Continue with:"]
    assert Path("out/step-00000002").is_dir()
    line = said.splitlines()[-1].strip()
    python, *words = shlex.split(line)
    assert python == sys.executable
    assert words == ["-m", "rlhf_helpers", *stopped, "--resume"]
    assert main(words[2:]) == 0
    assert_same_run("out", "whole")


def test_without_a_checkpoint_the_printed_command_starts_again(folder, tiny_llama_dir, monkeypatch, capsys):
    words = command("sft", tiny_llama_dir, "--checkpoint-every", "0")
    with monkeypatch.context() as patched:
        patched.setattr(Engine, "optimizer_step", lambda engine: signal.raise_signal(signal.SIGINT))
        assert main(words) == 130
    *_, reached, start, line = capsys.readouterr().out.splitlines()
    assert (reached, start) == ("stopped at step 1 of 3", "There is no checkpoint: start again with:")
    assert main(shlex.split(line)[3:]) == 0
    assert [row["step"] for row in metrics()] == [0, 1, 2]


@pytest.mark.slow
def test_two_processes_give_one_folder_and_stop_together(folder, tiny_llama_dir):
    package = "-m", "rlhf_helpers"
    flags = ["--checkpoint-every", "1"]
    done = launch_two_processes(*package, *command("reward", tiny_llama_dir, *flags), timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["step"] for row in metrics()] == [0, 1, 2]
    assert done.stdout.count("3 steps; the model is in out") == 1
    load_reward_model("out")
    # Only the second process receives the signal.
    stopped = command("rloo", tiny_llama_dir, *flags, out="policy", reward="my_rewards:stops")
    done = launch_two_processes(*package, *stopped, timeout=120)
    assert done.returncode != 0
    assert sorted(path.name for path in Path("policy").glob("step-*")) == ["step-00000001", "step-00000002"]
    assert [row["step"] for row in metrics("policy")] == [0, 1]
    assert done.stdout.count("Continue with:") == 1
    assert "-m torch.distributed.run --nproc_per_node 2 -m rlhf_helpers train rloo" in done.stdout


@pytest.mark.slow
def test_every_flag_shows_its_reason_and_default(capsys):
    for name, task in TASKS.items():
        with pytest.raises(SystemExit):
            main(["train", name, "--help"])
        said = " ".join(capsys.readouterr().out.split())
        for field, note in field_notes(task.settings).items():
            if field not in ("run_dir", *task.fixed):
                assert f"--{field.replace('_', '-')}" in said
                assert note in said, (name, field)
        assert f"example: python -m rlhf_helpers train {name} --model" in said
    assert "costs, in units of the score (default: 0.05)" in said
    assert "first steps: start them small (default: 0)" in said
    assert "None: bf16 where a GPU computes it natively, else full precision (default: none)" in said
    assert "steps between checkpoints; 0 writes none (default: 100)" in said


@pytest.mark.parametrize("task", ["reward", "reward-ranking"])
def test_a_reward_model_passes_once_over_its_rows(task, capsys):
    with pytest.raises(SystemExit):
        main(["train", task, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "a model learns them by heart (lesson 1) (default: 1)" in said


def test_a_flag_shows_the_reason_that_stands_behind_its_own_field():
    notes = field_notes(TASKS["dpo"].settings)
    assert notes["schedule"] == "the data are fixed, so there is an end to anneal towards"
    assert notes["loss"].startswith("pairs: also cdpo")
    assert notes["tiny_learning_rate"].startswith("what None means")
    assert field_notes(TASKS["rloo"].settings)["schedule"].startswith("the samples change with the policy")


def test_the_overview_has_an_example_for_each_task_and_the_help_needs_no_torch(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = capsys.readouterr().out
    assert all(f"\n  python -m rlhf_helpers train {name} --model" in said for name in TASKS)
    code = "import sys, rlhf_helpers.__main__ as m\ntry: m.main(['--help'])"
    code += "\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "train your own model" in done.stdout.replace("\n", " ")
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.slow
@pytest.mark.parametrize(
    "task, flags, message",
    [
        ("nothing", [], "invalid choice: 'nothing'"),
        ("rloo", ["--rewards", "x"], "unrecognized arguments: --rewards x"),
        ("sft", ["--learning-rate", "nan"], "learning_rate must be a finite number"),
        ("sft", ["--epochs", "1.5"], "argument --epochs: invalid int value: '1.5'"),
        ("kto", ["--batch-size", "1"], "DPOSettings.batch_size"),
        ("dpo", ["--loss", "best"], "DPOSettings.loss must be one of"),
        ("reward", ["--eval-share", "0.1", "--eval-data", "pairs.jsonl"], "not allowed with"),
        ("ppo", ["--log", "wandb"], "'wandb' needs its package: pip install wandb"),
        ("grpo", ["--samples-per-prompt", "1"], "GRPOSettings.samples_per_prompt"),
    ],
)
def test_wrong_usage_is_status_2_and_one_error(task, flags, message, folder, tiny_llama_dir, capsys):
    words = command("sft", tiny_llama_dir) if task == "nothing" else command(task, tiny_llama_dir, *flags)
    words[1] = task
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) <= 4
    assert not Path("out").exists()


def test_a_policy_task_needs_a_reward(folder, tiny_llama_dir, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "rloo", "--model", str(tiny_llama_dir), "--data", "prompts.jsonl", "--out", "out"])
    assert stopped.value.code == 2
    assert "the following arguments are required: --reward" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "task, flags, message",
    [
        ("sft", ["--data", "no.jsonl"], "no.jsonl: no such file or folder; check the path"),
        ("sft", ["--data", "labels.jsonl"], "tasks that read labels: kto\n"),
        ("dpo", ["--data", "demonstrations.jsonl"], "holds demonstrations ('prompts and completions')"),
        ("sft", ["--model", "no/such"], "cannot load a model from 'no/such'"),
        ("reward", ["--eval-share", "1.5"], "test_fraction must be a finite number > 0 and < 1, got 1.5"),
        ("sft", ["--warmup-steps", "3"], "warmup_steps 3 must be < 3 optimizer steps"),
        ("rloo", ["--prompts-per-step", "20"], "prompts_per_step 20 exceeds the 12 prompts"),
        ("rloo", ["--eval-data", "one.jsonl"], "a standard error needs at least 2 prompts"),
        ("rloo", ["--reward", "no_folder"], "--reward no_folder: No module named 'no_folder'"),
        ("rloo", ["--reward", "no_module:f"], "--reward no_module:f: No module named 'no_module'"),
        ("rloo", ["--reward", "my_rewards:f"], "module 'my_rewards' has no attribute 'f'"),
        ("rloo", ["--reward", "my_rewards:share"], "a reward must be a function"),
        ("rloo", ["--reward", "my_rewards:half"], "half must return a tensor of shape (2,), got (1,)"),
        ("rloo", ["--reward", "my_rewards:near", "--data", "pairs.jsonl"], "missing 1 required positional"),
        ("ppo", ["--reward", "{model}"], "needs a reward head"),
    ],
)
def test_what_cannot_work_is_status_1_and_one_error(task, flags, message, folder, tiny_llama_dir, capsys):
    Path("one.jsonl").write_text(json.dumps({"prompt": "What?"}) + "\n")
    flags = [flag.format(model=tiny_llama_dir) for flag in flags]
    assert main(command(task, tiny_llama_dir, *flags)) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"train {task}: ")
    assert message in said
    assert "Traceback" not in said
    assert not list(Path().glob("out/*"))


@pytest.mark.slow
def test_a_reward_reads_the_columns_of_the_data_and_a_saved_reward_model_is_one(
    folder, tiny_llama_dir, tiny_gpt2_dir
):
    assert main(command("rloo", tiny_llama_dir, reward="my_rewards:near")) == 0
    assert all(row["objective/scores"] <= 0 for row in metrics())
    assert main(command("reward", tiny_gpt2_dir, out="reward")) == 0
    assert main(command("grpo", tiny_llama_dir, out="policy", reward="reward")) == 0
    # A ranking's column `responses` has the name of an argument of the reward.
    rankings = ["--data", "rankings.jsonl"]
    assert main(command("rloo", tiny_llama_dir, *rankings, out="ranked", reward="reward")) == 0


def test_another_run_is_not_continued(folder, tiny_llama_dir, capsys):
    assert main(command("sft", tiny_llama_dir)) == 0
    assert main(command("sft", tiny_llama_dir, "--resume", "--prompt-weight", "0.5")) == 1
    assert "belongs to another run: prompt_weight was 0.0, now 0.5" in capsys.readouterr().err
    rewrite_settings(folder / "out", lambda fields: fields.pop("prompt_weight"))  # it did not exist yet
    assert main(command("sft", tiny_llama_dir, "--resume")) == 1
    said = capsys.readouterr().err
    assert "prompt_weight was absent (another version of rlhf_helpers), now 0.0. Use the old values" in said
    assert len(said.splitlines()) == 1


def test_evaluation_on_a_file_says_what_is_trained_on_too(folder, tiny_llama_dir, capsys):
    assert main(command("ipo", tiny_llama_dir, "--eval-data", "pairs.jsonl", "--limit", "4")) == 0
    assert "4 prompts of --eval-data are trained on too" in capsys.readouterr().out


def fake_package(name, monkeypatch, **members):
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


def run_killed_and_resumed(folder, monkeypatch, *flags):
    words = command("sft", folder, "--checkpoint-every", "1", *flags)
    with monkeypatch.context() as patched:
        patched.setattr(Engine, "save", dies_at(2, Engine.save))
        with pytest.raises(Killed):
            main(words)
    assert main([*words, "--resume"]) == 0


def test_wandb_receives_each_step(folder, tiny_llama_dir, monkeypatch):
    started, logged = [], []
    run = types.SimpleNamespace(log=lambda row, step, **_: logged.append(step), finish=lambda: None)
    fake_package("wandb", monkeypatch, init=lambda **options: started.append(options) or run)
    run_killed_and_resumed(tiny_llama_dir, monkeypatch, "--log", "wandb")
    assert [options["name"] for options in started] == ["out", "out"]
    assert logged == [0, 1, 1, 2]


def test_tensorboard_drops_the_steps_that_are_computed_again(folder, tiny_llama_dir, monkeypatch):
    started, logged = [], []

    class SummaryWriter:
        def __init__(self, log_dir, purge_step):
            started.append((log_dir, purge_step))

        def add_scalar(self, name, value, global_step):
            if name == "loss":
                logged.append(global_step)

        def flush(self):
            pass

        close = flush

    fake_package("tensorboard", monkeypatch)
    fake_package("torch.utils.tensorboard", monkeypatch, SummaryWriter=SummaryWriter)
    run_killed_and_resumed(tiny_llama_dir, monkeypatch, "--log", "tensorboard")
    assert started == [("out/tensorboard", 0), ("out/tensorboard", 1)]
    assert logged == [0, 1, 1, 2]


def test_the_engine_gives_signals_back_when_a_loop_ends(folder, tiny_llama_dir):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert main(command("sft", tiny_llama_dir)) == 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before

"""Compare the training loops with TRL 1.16 and with plain loops: CPU time, memory, losses.

    python tests/benchmarks/compare_with_trl.py --out results.json
    python tests/benchmarks/compare_with_trl.py --rows dpo grpo --vocab 32000

Not a test: nothing collects it, and it takes minutes. Each measurement runs in a process of its own, forked
from one that has imported everything; ours and the other side alternate. One thread, fp32, no dropout, the
same model, data, batch size and number of steps. Times are CPU seconds (`time.process_time`), so other work
on the machine matters little; memory is the peak above the process as it was forked.
"""

import argparse
import atexit
import json
import logging
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # threads do not survive a fork

import torch
from datasets import Dataset, disable_progress_bars
from plain_loops import plain_ppo, plain_sampling
from transformers import LlamaForSequenceClassification, TrainerCallback
from trl import (
    DPOConfig,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
)
from trl import DPOTrainer as TRLDPOTrainer

from rlhf_helpers.core.generation import generate
from rlhf_helpers.core.models import TINY, frozen_copy, load_model
from rlhf_helpers.core.shared_prompts import Pair
from rlhf_helpers.core.text import encode_pair, to_messages
from rlhf_helpers.dpo import DPODataset, DPOSettings, DPOTrainer
from rlhf_helpers.policy_optimization import (
    GRPOSettings,
    PPOSettings,
    RLOOSettings,
    grpo,
    ppo,
    rloo,
)
from rlhf_helpers.reward_model import RewardSettings, create_reward_model, train_reward_model
from rlhf_helpers.world.annotators import make_pairs

BATCH, PROMPTS, SAMPLES, NEW_TOKENS, BETA = 16, 16, 4, 64, 0.1
# A rate at which nothing moves far: every round then measures the same lengths.
TRAINING = {"learning_rate": 1e-5, "max_grad_norm": 1.0, "seed": 0}
OURS = {**TRAINING, "schedule": "constant", "progress": False}


@dataclass(frozen=True)
class Task:
    """What one measurement works on."""

    steps: int
    same_batch: bool  # every step learns from the same batch, so that the losses can be compared
    folder: str | Path = TINY  # TRL reads its reference from there

    def model(self) -> tuple[Any, Any]:
        return load_model(self.folder, device="cpu", dtype=torch.float32)

    def pairs(self) -> list[dict[str, str]]:
        rows = make_pairs(BATCH if self.same_batch else BATCH * self.steps, seed=1)
        return [{name: str(row[name]) for name in ("prompt", "chosen", "rejected")} for row in rows]

    def unpaired(self) -> list[dict[str, Any]]:
        sides = [("chosen", "rejected")[i % 2] for i in range(len(self.pairs()))]
        return [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row, side in zip(self.pairs(), sides, strict=True)
        ]

    def prompts(self) -> list[str]:
        rows = make_pairs(400, seed=2)
        return list(dict.fromkeys(str(row["prompt"]) for row in rows))[: PROMPTS * self.steps]

    @property
    def epochs(self) -> int:
        return self.steps if self.same_batch else 1


def save_with_vocabulary(size: int, folder: Path) -> None:
    """Save the tiny assistant with more tokens, which are as unlikely as the padding token."""
    model, tokenizer = load_model("tiny", device="cpu", dtype=torch.float32)
    model.resize_token_embeddings(size, mean_resizing=False)
    weight = model.get_input_embeddings().weight.data
    weight[len(tokenizer) :] = weight[tokenizer.pad_token_id]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Meter:
    """CPU seconds and peak memory between `start` and `stop`."""

    def start(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        self.memory, self.cpu = memory_kb("VmRSS"), time.process_time()

    def stop(self) -> dict[str, float]:
        seconds = time.process_time() - self.cpu
        return {"seconds": seconds, "megabytes": (memory_kb("VmHWM") - self.memory) / 1024}


def memory_kb(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0])


def letters(prompts: list[str], responses: list[str], **columns: Any) -> torch.Tensor:
    """A reward that costs nothing: the share of the letter e."""
    return torch.tensor([r.count("e") / max(len(r), 1) for r in responses])


# ---- ours


def our_dpo(task: Task, meter: Meter, *, loss: str = "dpo", precomputed: bool = False) -> list[float]:
    model, tokenizer = task.model()
    reference = frozen_copy(model)
    rows = task.unpaired() if loss == "kto" else task.pairs()
    settings = DPOSettings(**OURS, loss=loss, beta=BETA, batch_size=BATCH, epochs=task.epochs)
    data = DPODataset(rows, tokenizer)
    if precomputed:
        data.add_reference(reference)
    meter.start()
    data.add_reference(reference)
    trainer = DPOTrainer(model, reference, tokenizer, settings=settings)
    return [row["loss"] for row in trainer.train(data)]


def our_reward(task: Task, meter: Meter) -> list[float]:
    torch.manual_seed(0)
    model = create_reward_model("basic", base_model_name="tiny", device="cpu", dtype=torch.float32)
    settings, rows = RewardSettings(**OURS, batch_size=BATCH, epochs=task.epochs), task.pairs()
    meter.start()
    return [row["loss"] for row in train_reward_model(model, rows, settings)]


def our_policy_loop(task: Task, meter: Meter, *, loop: Callable, settings_class: type) -> list[float]:
    model, tokenizer = task.model()
    settings = settings_class(**OURS, **sampling_settings(task))
    prompts = task.prompts()
    meter.start()
    history = loop(model, tokenizer, prompts, letters, settings)
    return [row["response_length"] for row in history]


def sampling_settings(task: Task) -> dict[str, Any]:
    sizes = {"steps": task.steps, "prompts_per_step": PROMPTS, "samples_per_prompt": SAMPLES}
    return {**sizes, "max_new_tokens": NEW_TOKENS, "kl_coef": 0.05}


def our_sampling(task: Task, meter: Meter) -> list[float]:
    model, tokenizer = task.model()
    prompts = [prompt for prompt in task.prompts() for _ in range(SAMPLES)]
    meter.start()
    lengths = []
    for step in range(task.steps):
        part = prompts[step * PROMPTS * SAMPLES :][: PROMPTS * SAMPLES]
        rollout = generate(model, tokenizer, part, max_new_tokens=NEW_TOKENS, seed=step)
        lengths.append(rollout.response_lengths.float().mean().item())
    return lengths


# ---- TRL's


class Clock(TrainerCallback):
    """Starts the meter when the trainer is set up, and keeps the loss of each step."""

    def __init__(self, meter: Meter) -> None:
        self.meter, self.losses, self.lengths = meter, [], []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.meter.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))
        if "completions/mean_length" in logs:
            self.lengths.append(float(logs["completions/mean_length"]))


def trl_settings(task: Task, **changes: Any) -> dict[str, Any]:
    common = {"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no"}
    common |= {"lr_scheduler_type": "constant", "logging_steps": 1, "disable_tqdm": True}
    common |= {"gradient_checkpointing": False, "num_train_epochs": task.epochs, "max_steps": task.steps}
    return {**common, **TRAINING, "per_device_train_batch_size": BATCH, **changes}


def trained(trainer: Any, meter: Meter, name: str = "losses") -> list[float]:
    clock = Clock(meter)
    trainer.add_callback(clock)
    trainer.train()
    return getattr(clock, name)


def as_chat(rows: list[dict[str, Any]]) -> Dataset:
    """The same rows as messages, so that TRL applies the same chat template."""

    def column(name: str, value: Any) -> Any:
        if name == "prompt":
            return to_messages(value)
        return [{"role": "assistant", "content": value}] if isinstance(value, str) else value

    return Dataset.from_list([{name: column(name, value) for name, value in row.items()} for row in rows])


def trl_dpo(task: Task, meter: Meter, *, precomputed: bool = False) -> list[float]:
    model, tokenizer = task.model()
    how = {"beta": BETA, "precompute_ref_log_probs": precomputed, "max_length": None}
    trainer = TRLDPOTrainer(
        model=model,
        ref_model=None if precomputed else frozen_copy(model),
        args=DPOConfig(**trl_settings(task, **how)),
        train_dataset=as_chat(task.pairs()),
        processing_class=tokenizer,
    )
    return trained(trainer, meter)


def trl_kto(task: Task, meter: Meter) -> list[float]:
    model, tokenizer = task.model()
    trainer = KTOTrainer(
        model=model,
        ref_model=frozen_copy(model),
        args=KTOConfig(**trl_settings(task, beta=BETA, max_length=None)),
        train_dataset=as_chat(task.unpaired()),
        processing_class=tokenizer,
    )
    return trained(trainer, meter)


def trl_reward(task: Task, meter: Meter) -> list[float]:
    torch.manual_seed(0)
    head = create_reward_model("basic", base_model_name="tiny", device="cpu", dtype=torch.float32).head
    _, tokenizer = task.model()
    model = LlamaForSequenceClassification.from_pretrained(TINY, num_labels=1, dtype=torch.float32)
    model.score.weight.data.copy_(head.linear.weight)
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(**trl_settings(task, max_length=None)),
        train_dataset=as_chat(task.pairs()),
        processing_class=tokenizer,
    )
    return trained(trainer, meter)


def trl_policy_loop(task: Task, meter: Meter, *, trainer_class: type, config_class: type) -> list[float]:
    model, tokenizer = task.model()
    how = {"num_generations": SAMPLES, "max_completion_length": NEW_TOKENS, "beta": 0.05}
    how |= {"per_device_train_batch_size": PROMPTS * SAMPLES}
    if config_class is GRPOConfig:
        how["loss_type"] = "grpo"
    rows = [{"prompt": prompt} for prompt in task.prompts()]
    trainer = trainer_class(
        model=model,
        reward_funcs=lambda prompts, completions, **_: letters(
            prompts, [message[0]["content"] for message in completions]
        ).tolist(),
        args=config_class(**trl_settings(task, **how)),
        train_dataset=as_chat(rows),
        processing_class=tokenizer,
    )
    return trained(trainer, meter, "lengths")


# ---- plain loops


def other_ppo(task: Task, meter: Meter) -> list[float]:
    model, tokenizer = task.model()
    settings, prompts = PPOSettings(**OURS, **sampling_settings(task)), task.prompts()
    meter.start()
    return plain_ppo(model, tokenizer, prompts, letters, settings)


def other_sampling(task: Task, meter: Meter) -> list[float]:
    model, tokenizer = task.model()
    prompts, lengths = task.prompts(), []
    meter.start()
    for step in range(task.steps):
        part = prompts[step * PROMPTS :][:PROMPTS]
        counts = plain_sampling(model, tokenizer, part, SAMPLES, NEW_TOKENS)[2]
        lengths.append(counts.float().mean().item())
    return lengths


# Row -> (ours, the other side, whether the steps' numbers are losses of the same batch).
ROWS: dict[str, tuple[Callable, Callable, bool]] = {
    "dpo": (our_dpo, trl_dpo, True),
    "dpo_precomputed": (
        lambda task, meter: our_dpo(task, meter, precomputed=True),
        lambda task, meter: trl_dpo(task, meter, precomputed=True),
        True,
    ),
    "kto": (lambda task, meter: our_dpo(task, meter, loss="kto"), trl_kto, True),
    "reward": (our_reward, trl_reward, True),
    "rloo": (
        lambda task, meter: our_policy_loop(task, meter, loop=rloo, settings_class=RLOOSettings),
        lambda task, meter: trl_policy_loop(task, meter, trainer_class=RLOOTrainer, config_class=RLOOConfig),
        False,
    ),
    "grpo": (
        lambda task, meter: our_policy_loop(task, meter, loop=grpo, settings_class=GRPOSettings),
        lambda task, meter: trl_policy_loop(task, meter, trainer_class=GRPOTrainer, config_class=GRPOConfig),
        False,
    ),
    "ppo": (
        lambda task, meter: our_policy_loop(task, meter, loop=ppo, settings_class=PPOSettings),
        other_ppo,
        False,
    ),
    "sampling": (our_sampling, other_sampling, False),
}


# ---- the least work there is


def matrix_rate() -> float:
    """Floating-point operations per second of one thread in products of this model's shape."""
    x, weight = torch.randn(1024, 128), torch.randn(128, 512)
    for _ in range(50):
        x @ weight
    start = time.process_time()
    for _ in range(400):
        x @ weight
    return 400 * 2 * x.numel() * 512 / (time.process_time() - start)


def needed_flops(row: str, task: Task, length: float) -> float | None:
    """Operations per step with every prompt read once, no padding, and logits on answer tokens alone.

    2 per weight and token forward, 4 more backward; attention itself is left out.
    """
    model, tokenizer = task.model()
    head = model.get_input_embeddings().weight.numel()  # tied: the head's weights too
    trunk = sum(p.numel() for p in model.parameters()) - head

    def forward(prompt: float, answers: float, *, logits: bool = True) -> float:
        return 2 * (trunk * (prompt + answers) + head * answers * logits)

    def tokens(pairs: list[Pair]) -> tuple[float, float]:
        prompts = {tuple(prompt) for prompt, _ in pairs}
        return sum(map(len, prompts)) / task.steps, sum(len(answer) for _, answer in pairs) / task.steps

    if row in ("dpo", "dpo_precomputed", "reward"):
        sides = [(r["prompt"], r[side]) for r in task.pairs() for side in ("chosen", "rejected")]
        once = forward(*tokens([encode_pair(tokenizer, *side) for side in sides]), logits=row != "reward")
        return once * (4 if row == "dpo" else 3)
    if row == "kto":  # own answers with gradient, others' without, both under the reference
        once = forward(
            *tokens([encode_pair(tokenizer, r["prompt"], r["completion"]) for r in task.unpaired()])
        )
        return once * 6
    prompt = tokens([encode_pair(tokenizer, text, "") for text in task.prompts()])[0]
    answers = PROMPTS * SAMPLES * length
    sampling, scoring = forward(prompt, answers), forward(prompt, answers)
    # PPO: values before the update, then two epochs.
    passes = {"sampling": 0, "rloo": 4, "grpo": 4, "ppo": 1 + 2 * 3 + 1}[row]
    return sampling + passes * scoring


# ---- measuring


def in_child(function: Callable, task: Task) -> dict[str, Any]:
    """Run one side in a forked process; return seconds per step, megabytes and its numbers."""
    receive, send = get_context("fork").Pipe(duplex=False)

    def work() -> None:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (trainers print their logs)
        random.seed(0)
        torch.manual_seed(0)
        meter = Meter()
        try:
            numbers = function(task, meter)
        except Exception as error:
            send.send(error)
            raise
        result = meter.stop()
        result["seconds"] /= task.steps
        send.send({**result, "numbers": list(numbers)})

    child = get_context("fork").Process(target=work)
    child.start()
    send.close()
    result = receive.recv()
    child.join()
    if isinstance(result, Exception):
        raise result
    return result


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def compare(row: str, task: Task, rounds: int) -> dict[str, Any]:
    """Alternate the two sides; ratios are those of neighboring runs."""
    ours, theirs, comparable = ROWS[row]
    runs = [(in_child(ours, task), in_child(theirs, task)) for _ in range(rounds)]
    seconds = [[run["seconds"] for run in side] for side in zip(*runs, strict=True)]
    memory = [statistics.median(run["megabytes"] for run in side) for side in zip(*runs, strict=True)]
    result = {
        "our_seconds": spread(seconds[0]),
        "other_seconds": spread(seconds[1]),
        "time_ratio": spread([b / a for a, b in zip(*seconds, strict=True)]),
        "our_megabytes": memory[0],
        "other_megabytes": memory[1],
        "memory_ratio": memory[0] / memory[1],
    }
    length = statistics.mean(runs[0][0]["numbers"])
    if comparable:
        same = replace(task, steps=3, same_batch=True)
        losses = [in_child(side, same)["numbers"] for side in (ours, theirs)]
        result["loss_difference"] = max(abs(a - b) for a, b in zip(*losses, strict=True))
    else:
        result["response_length"] = [length, statistics.mean(runs[0][1]["numbers"])]
    result["floor_seconds"] = needed_flops(row, task, length) / matrix_rate()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--vocab", type=int, help="32000 shows what logits cost (dpo and grpo)")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    disable_progress_bars()
    task, results = Task(steps=options.steps, same_batch=False), {}
    if options.vocab:
        folder = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, folder)
        save_with_vocabulary(options.vocab, folder)
        task = replace(task, folder=folder)
    head = (
        "row",
        "ours ms",
        "other ms",
        "ratio",
        "min",
        "max",
        "MB",
        "other MB",
        "ratio",
        "floor ms",
        "loss off",
    )
    print(("{:16}" + "{:>10}" * 10).format(*head))
    for row in options.rows:
        found = results[row] = compare(row, task, options.rounds)
        ratio = found["time_ratio"]
        milliseconds = [
            1000 * seconds
            for seconds in (
                found["our_seconds"]["median"],
                found["other_seconds"]["median"],
                found["floor_seconds"],
            )
        ]
        numbers = [*milliseconds[:2], ratio["median"], ratio["min"], ratio["max"]]
        numbers += [found["our_megabytes"], found["other_megabytes"], found["memory_ratio"], milliseconds[2]]
        cells = [f"{number:.3g}" if number < 10 else f"{number:.0f}" for number in numbers]
        loss_off = f"{found['loss_difference']:.0e}" if "loss_difference" in found else "-"
        print(("{:16}" + "{:>10}" * 10).format(row, *cells, loss_off), flush=True)
    if options.out:
        options.out.write_text(
            json.dumps({"settings": vars(options) | {"out": None}, "rows": results}, indent=1)
        )


if __name__ == "__main__":
    main()

"""The command `train`: every loop of the package on your own model and data.

    python -m rlhf_helpers train TASK --model MODEL --data FILE --out FOLDER [settings]

A task is one entry of `TASKS`. Each field of its settings class is a flag: name, type and default come from
the dataclass, the help from the comment behind the field. OUT holds the model, metrics.jsonl and the
checkpoints, so it is also what `--resume` continues.
"""

import argparse
import importlib
import inspect
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from datasets import Dataset
from torch import nn

from rlhf_helpers.core.models import SMOLLM2, RewardFn, as_reward_fn, load_model
from rlhf_helpers.core.training import History, TrainingSettings, sft
from rlhf_helpers.core.training.checkpoints import checkpoints
from rlhf_helpers.core.training.distributed import process_state, save_model
from rlhf_helpers.dpo import DPOSettings, DPOTrainer
from rlhf_helpers.policy_optimization import (
    GRPOSettings,
    OnPolicySettings,
    PPOSettings,
    RLOOSettings,
    evaluate_policy,
    grpo,
    ppo,
    rloo,
)
from rlhf_helpers.preference_data import leaked_prompts, read_preferences, split_by_prompt
from rlhf_helpers.preference_data.report import PreferenceDataError
from rlhf_helpers.preference_data.tidying import COLUMNS
from rlhf_helpers.reward_model import (
    RewardModel,
    RewardSettings,
    create_reward_model,
    load_reward_model,
    train_reward_model,
)

PROGRAM = "python -m rlhf_helpers train"
DEFAULTS = {"checkpoint_every": 100, "log": "jsonl"}  # a run of hours must be able to continue
INTERRUPTED = 130  # exit status of a run that a signal ended


@dataclass(frozen=True)
class SFTSettings(TrainingSettings):
    """The settings of `sft` together with its arguments."""

    epochs: int = 1  # passes over the rows
    batch_size: int = 16  # rows per micro-batch
    prompt_weight: float = 0.0  # weight of a prompt's token in the loss; a response's token weighs 1
    eval_every: int = 0  # steps between evaluations; 0: at the end of each epoch


@dataclass(frozen=True)
class OnePassRewardSettings(RewardSettings):
    """The settings of a reward model, with one pass over the rows."""

    epochs: int = 1  # passes over the rows; in a second one a model learns them by heart (lesson 1)


Trained = tuple[nn.Module, History]


def train_sft(model_name: str, rows: Dataset, settings: SFTSettings, **options: Any) -> Trained:
    """Imitate given answers; options here and below: val_rows and resume."""
    model, tokenizer = load_model(model_name)
    options |= {name: getattr(settings, name) for name in SFTSettings.__annotations__}
    return model, sft(model, tokenizer, rows, settings, **options)


def train_reward(model_name: str, rows: Dataset, settings: RewardSettings, **options: Any) -> Trained:
    """Train a reward model; options besides: objective, as in `train_reward_model`."""
    model = create_reward_model(base_model_name=model_name, seed=settings.seed)
    return model, train_reward_model(model, rows, settings, **options)


def train_on_preferences(model_name: str, rows: Dataset, settings: DPOSettings, **options: Any) -> Trained:
    """Train a policy by the loss that the settings name."""
    model, tokenizer = load_model(model_name)
    trainer = DPOTrainer(model, tokenizer=tokenizer, settings=settings)
    return model, trainer.train(rows, **options)


def train_policy(
    loop: Callable[..., History],
    model_name: str,
    rows: Dataset,
    settings: OnPolicySettings,
    *,
    reward: str,
    val_rows: Dataset | None,
    resume: bool,
) -> Trained:
    """Train a policy on its own samples, by the reward that the command names."""
    columns = rows.to_dict()
    prompts = columns.pop("prompt")
    reward_fn = load_reward(reward, rows[:2])
    model, tokenizer = load_model(model_name)
    options = {"columns": columns, "resume": resume}
    if val_rows is not None:
        val_columns = val_rows.to_dict()
        val_prompts = val_columns.pop("prompt")

        def evaluate(policy: nn.Module) -> dict[str, float]:
            result = evaluate_policy(
                policy,
                tokenizer,
                val_prompts,
                reward_fn,
                seed=settings.seed,
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                columns=val_columns,
            )
            return {f"eval_score/{name}": result[name] for name in ("mean", "standard_error")}

        # To compare with; and whatever an evaluation refuses is refused now.
        say(f"{model_name} before training: {evaluate(model)}")
        options["eval_fn"] = evaluate
    return model, loop(model, tokenizer, prompts, reward_fn, settings, **options)


def load_reward(name: str, columns: dict[str, list[Any]]) -> RewardFn:
    """Return the reward named on the command line, after one call: it must not fail at the first step.

    Args:
        name: the folder of a saved reward model, or module:function.
        columns: of the first rows of data, with which it is tried; the prompts stand for responses.

    Raises:
        ValueError: there is no such reward, or it raises an error; names it and its line.
    """
    prompts = columns.pop("prompt")
    module, _, function = name.partition(":")
    try:
        is_folder = Path(name).is_dir()
        reward = load_reward_model(name) if is_folder else getattr(importlib.import_module(module), function)
        reward_fn = as_reward_fn(reward)
        reward_fn(prompts, prompts, **columns)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(
            f"--reward {name}: {error} ({type(error).__name__}, {place.filename}:{place.lineno}); give the "
            "folder of a saved reward model, or MODULE:FUNCTION, a function (prompts, responses, **columns) "
            f"-> Tensor that accepts the further columns of the data: {[*columns]}"
        ) from error
    return reward_fn


@dataclass(frozen=True)
class Task:
    """One way to train: the help line, the settings, the loop, and the kind of rows that it reads."""

    summary: str
    settings: type[TrainingSettings]
    train: Callable[..., Trained]
    data: str  # a unit of `read_preferences`
    fixed: dict[str, Any] = field(default_factory=dict)  # settings that make the task what it is


def _reward_task(summary: str, data: str, objective: str) -> Task:
    return Task(summary, OnePassRewardSettings, partial(train_reward, objective=objective), data)


def _preference_task(summary: str, data: str, **fixed: str) -> Task:
    return Task(summary, DPOSettings, train_on_preferences, data, fixed)


TASKS = {
    "sft": Task("Imitate given answers", SFTSettings, train_sft, "demonstrations"),
    "reward": _reward_task("Train a reward model on pairs, without a margin", "pairs", "pairwise"),
    "reward-margin": _reward_task("Train a reward model on pairs with a margin", "pairs", "margin"),
    "reward-ranking": _reward_task("Train a reward model on rankings", "rankings", "ranking"),
    "reward-rating": _reward_task("Train a reward model on ratings", "ratings", "rating"),
    "dpo": _preference_task("Learn from pairs by DPO, or by another --loss", "pairs"),
    "ipo": _preference_task("Learn from pairs by IPO", "pairs", loss="ipo"),
    "kto": _preference_task("Learn from labeled answers by KTO", "labels", loss="kto"),
    "orpo": _preference_task("Learn from pairs by ORPO", "pairs", loss="orpo"),
    "simpo": _preference_task("Learn from pairs by SimPO", "pairs", loss="simpo"),
    "listwise": _preference_task("Learn from rankings by listwise DPO", "rankings", loss="listwise"),
    "rloo": Task("Raise a reward by RLOO", RLOOSettings, partial(train_policy, rloo), "prompts"),
    "grpo": Task("Raise a reward by GRPO", GRPOSettings, partial(train_policy, grpo), "prompts"),
    "ppo": Task("Raise a reward by PPO", PPOSettings, partial(train_policy, ppo), "prompts"),
}


def main(argv: Sequence[str]) -> int:
    """Run `train` with these arguments; return its exit status. An error is one message, no traceback."""
    parser = train_parser()
    arguments = parser.parse_args(argv)
    task = TASKS[arguments.task]
    given = {name: value for name, value in vars(arguments).items() if name in task.settings.__match_args__}
    try:
        settings = task.settings(**DEFAULTS | {"run_dir": arguments.out} | task.fixed | given)
    except ValueError as error:
        parser.error(str(error))
    try:
        run(task, settings, arguments)
    except KeyboardInterrupt as stop:
        again = "Continue" if checkpoints(arguments.out) else "There is no checkpoint: start again"
        # What follows the semicolon is for a caller in Python: pass resume=True.
        say(
            f"{str(stop).partition(';')[0] or 'stopped in the middle of a step'}\n"
            f"{again} with:\n  {continue_command(argv)}"
        )
        return INTERRUPTED
    except (ValueError, OSError, FloatingPointError) as error:
        say(f"train {arguments.task}: {error}", file=sys.stderr)
        if isinstance(error, PreferenceDataError) and error.fits_unit:
            tasks = [name for name, other in TASKS.items() if other.data == error.fits_unit]
            say(f"tasks that read {error.fits_unit}: {', '.join(tasks)}", file=sys.stderr)
        return 1
    return 0


def run(task: Task, settings: TrainingSettings, arguments: argparse.Namespace) -> None:
    """Read the data, train, save; every refusal comes before the first step."""
    out = arguments.out
    if process_state().is_main_process and not arguments.resume and out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty: continue its run with --resume, or name another --out")
    rows, report = read_preferences(
        arguments.data, unit=task.data, split=arguments.split, limit=arguments.limit
    )
    say(report)
    eval_rows = None
    if arguments.eval_data:
        eval_rows, report = read_preferences(arguments.eval_data, unit=task.data)
        say(report)
        say(f"{len(leaked_prompts(rows, eval_rows))} prompts of --eval-data are trained on too")
    elif arguments.eval_share:
        rows, eval_rows = split_by_prompt(rows, test_fraction=arguments.eval_share, seed=settings.seed)
    if arguments.resume and not checkpoints(out):
        say(f"{out} holds no checkpoint yet, so the run starts at its first step")
    options = {"val_rows": eval_rows, "resume": arguments.resume}
    if task.data == "prompts":
        options["reward"] = arguments.reward
    model, history = task.train(arguments.model, rows, settings, **options)
    if isinstance(model, RewardModel):
        model.save_pretrained(out)
    else:
        save_model(model, out)
    say(f"{len(history)} steps; the model is in {out}")
    if eval_rows is not None:
        measured = {name: value for name, value in history[-1].items() if name.startswith("eval_")}
        say(f"on the held-out rows: {measured}")
    if isinstance(model, RewardModel):
        say(
            "Train a policy on this reward with:\n"
            f"  {PROGRAM} rloo --model {shlex.quote(arguments.model)} --data {shlex.quote(arguments.data)} "
            f"--reward {shlex.quote(str(out))} --out {shlex.quote(f'{out}-rloo')}"
        )


def say(text: object, **options: Any) -> None:
    """Print on the main process."""
    if process_state().is_main_process:
        print(text, **options)


def continue_command(argv: Sequence[str]) -> str:
    """Return the command that continues this run, with its launcher where it has several processes."""
    launcher = [sys.executable]
    if os.environ.get("WORLD_SIZE", "1") != "1":
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", os.environ["LOCAL_WORLD_SIZE"]]
    resume = [] if "--resume" in argv else ["--resume"]
    return shlex.join([*launcher, "-m", "rlhf_helpers", "train", *argv, *resume])


def train_parser() -> argparse.ArgumentParser:
    """Return the parser of `train`, with a parser for each task."""
    options = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Train your own model. `TASK --help` lists the flags of a task with their defaults.",
        epilog="examples:\n" + "\n".join(f"  {example(name)}" for name in TASKS),
        **options,
    )
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    for name, task in TASKS.items():
        command = tasks.add_parser(
            name,
            help=task.summary,
            description=task.summary,
            usage=f"{PROGRAM} {name} --model MODEL --data FILE --out FOLDER [flags: see --help]",
            epilog=f"example:\n  {example(name)}",
            **options,
        )
        add_flags(command, task)
        add_settings(command, task)
    return parser


def example(name: str) -> str:
    """Return one whole command for a task."""
    data = TASKS[name].data
    reward = " --reward runs/reward" if data == "prompts" else ""
    return f"{PROGRAM} {name} --model {SMOLLM2} --data {data}.jsonl{reward} --out runs/{name}"


def add_flags(parser: argparse.ArgumentParser, task: Task) -> None:
    """Add the flags that are not settings: model, data, reward, evaluation, output."""
    parser.add_argument(
        "--model", required=True, help="'tiny', 'smollm2', a local folder or a name on the hub"
    )
    parser.add_argument(
        "--data", required=True, help=f"a file or a data set on the hub with {', '.join(COLUMNS[task.data])}"
    )
    parser.add_argument("--split", help="of a data set on the hub, or the rows' own column `split`")
    parser.add_argument("--limit", type=int, help="read only the first rows")
    parser.add_argument("--out", required=True, type=Path, help="folder for model, metrics and checkpoints")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    if task.data == "prompts":
        parser.add_argument(
            "--reward",
            required=True,
            metavar="FOLDER|MODULE:FUNCTION",
            help="a saved reward model, or a function (prompts, responses, **columns) -> Tensor; columns are "
            "the further columns of the data",
        )
    held_out = parser.add_mutually_exclusive_group()
    held_out.add_argument("--eval-data", metavar="FILE", help="rows to evaluate on")
    held_out.add_argument(
        "--eval-share", type=float, help="share of the prompts to evaluate on, not to train on"
    )


def add_settings(parser: argparse.ArgumentParser, task: Task) -> None:
    """Add a flag for each field of the settings that the task leaves open."""
    group = parser.add_argument_group("settings of the loop", "A flag of the form [X] without X means none.")
    notes, hints = field_notes(task.settings), get_type_hints(task.settings)
    for setting in fields(task.settings):
        if setting.name in ("run_dir", *task.fixed):
            continue
        default = str(DEFAULTS.get(setting.name, setting.default)).lower()
        group.add_argument(
            f"--{setting.name.replace('_', '-')}",
            default=argparse.SUPPRESS,  # a flag that is not given leaves the field to the dataclass
            help=f"{notes[setting.name]} (default: {default})".replace("%", "%%"),
            **value_options(hints[setting.name]),
        )


def value_options(hint: Any) -> dict[str, Any]:
    """Return how argparse reads a value of this type."""
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    kinds = get_args(hint) or (hint,)
    options = {"type": kinds[0], "metavar": kinds[0].__name__.upper()}
    if get_origin(hint) is tuple:
        options["nargs"] = len(kinds)
    elif NoneType in kinds:
        options["nargs"] = "?"  # the flag without a value: None
    return options


def field_notes(settings: type) -> dict[str, str]:
    """Return field -> the comment behind it, which says why it has this default; a subclass's own wins."""
    notes = {}
    for kind in reversed(settings.__mro__[:-1]):
        notes.update(re.findall(r"^    (\w+): [^#\n]+ = [^#\n]+  # (.+)$", inspect.getsource(kind), re.M))
    return notes

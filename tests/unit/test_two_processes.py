"""Two processes, each with whole weights or with half of them, train as one process does."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from rlhf_helpers.core.models import load_model
from rlhf_helpers.core.training.distributed import full_weights
from rlhf_helpers.reward_model import load_reward_model
from tests.conftest import run_in_two_processes

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("two_processes_worker.py")
spec = importlib.util.spec_from_file_location(WORKER.stem, WORKER)
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)


@pytest.fixture(scope="module")
def run(tiny_llama_dir, tmp_path_factory):
    """Return the folder of a run, and what each of its two processes wrote: histories, and final weights."""
    out = tmp_path_factory.mktemp("two")
    run_in_two_processes(WORKER, tiny_llama_dir, out, timeout=400)
    return out, [
        (json.loads((out / f"history{rank}.json").read_text()), torch.load(out / f"weights{rank}.pt"))
        for rank in (0, 1)
    ]


@pytest.fixture(scope="module")
def ranks(run):
    return run[1]


@pytest.fixture(scope="module")
def alone(tiny_llama_dir):
    return {name: case(tiny_llama_dir) for name, case in worker.CASES.items()}


# A reward's offset is not learned: the gradient of the head's bias is rounding noise, which Adam turns into
# steps as long as any other. So rewards are compared by their differences.
OFFSET = {"rewards/chosen", "rewards/rejected", "eval_rewards/chosen", "eval_rewards/rejected"}


def learned(weights, name):
    """Weights without those of a reward head that cancel in every comparison."""
    weights = dict(weights)
    weights.pop("head.linear.bias", None)
    if name == "separate":  # of [h(x), h(y), h(x) * h(y)] the first third is the prompt's alone
        head = weights["head.linear.weight"]
        weights["head.linear.weight"] = head[:, head.shape[1] // 3 :]
    return weights


@pytest.mark.parametrize("way", ["replicated", "sharded"])
@pytest.mark.parametrize("name", worker.CASES)
def test_two_processes_train_as_one(alone, ranks, name, way):
    model, history = alone[name]
    is_reward = hasattr(model, "head")
    expected = learned(full_weights(model), name)
    assert len(history) == (4 if "accumulated" in name else 3)
    for histories, weights in ranks:
        for mine, theirs in zip(history, histories[f"{name} {way}"], strict=True):
            assert theirs.keys() == mine.keys()
            compared = mine.keys() - (OFFSET if is_reward else set())
            assert {key: theirs[key] for key in compared} == pytest.approx(
                {key: mine[key] for key in compared}, rel=1e-5, abs=1e-6
            )
        theirs = learned(weights[f"{name} {way}"], name)
        torch.testing.assert_close(theirs, expected, atol=1e-5, rtol=0)


def test_processes_that_sample_for_kl_move_beta_and_weights_alike(ranks):
    (first, first_weights), (second, second_weights) = ranks
    for way in ("sampled replicated", "sampled sharded", "sampled adapters"):
        assert first[way] == second[way]
        betas = [row["beta"] for row in first[way]]
        assert betas[0] == 0.1
        assert betas[2] != 0.1
        torch.testing.assert_close(first_weights[way], second_weights[way], atol=0, rtol=0)
    for replicated, sharded in zip(first["sampled replicated"], first["sampled sharded"], strict=True):
        assert sharded == pytest.approx(replicated, rel=1e-5, abs=1e-6)


def test_a_sharded_policy_is_saved_as_a_plain_folder(run):
    out, ranks = run
    saved, _ = load_model(out / "saved", device="cpu", dtype=torch.float64)
    assert saved.config.architectures == ["LlamaForCausalLM"]
    for _, weights in ranks:
        torch.testing.assert_close(weights["loaded"], weights["sampled sharded"], atol=0, rtol=0)
        torch.testing.assert_close(full_weights(saved), weights["loaded"], atol=0, rtol=0)


@pytest.mark.parametrize("way", ["replicated", "sharded"])
@pytest.mark.parametrize("name", ["sft", "reward", "separate", "adapters"])
def test_what_two_processes_save_one_process_loads(run, name, way):
    out, ranks = run
    folder, expected = out / (way if name == "sft" else f"{name} {way}"), ranks[0][1][f"{name} {way}"]
    if name in ("sft", "adapters"):
        model, _ = load_model(folder, device="cpu", dtype=torch.float64)
    else:
        model = load_reward_model(folder, device="cpu")
    saved = full_weights(model)
    if name == "adapters":  # the worker had changed the base before it added them
        saved, expected = ({k: v for k, v in w.items() if ".lora_" in k} for w in (saved, expected))
        assert len(saved) == 28
    torch.testing.assert_close(saved, expected, atol=0, rtol=0)

"""Policy loops in two processes against one: what is equal, and what each process does on its own share."""

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.conftest import run_in_two_processes

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("policy_worker.py")


@pytest.fixture(scope="module")
def runs(tiny_llama_dir, tmp_path_factory):
    """What one process found, and what each of two found."""
    folder = tmp_path_factory.mktemp("two")
    run_in_two_processes(WORKER, tiny_llama_dir, folder, timeout=300)
    spec = importlib.util.spec_from_file_location("policy_worker", WORKER)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    return worker.run_all(tiny_llama_dir), *(torch.load(folder / f"rank{rank}.pt") for rank in (0, 1))


# Means over responses, of which each process has equally many. A mean over tokens, or an explained variance,
# is logged as the average of what each process finds.
OVER_RESPONSES = ["objective/scores", "objective/rlhf_reward", "objective/kl", "response_length", "loss"]
OVER_RESPONSES += ["eos_fraction", "frac_reward_zero_std", "grad_norm", "policy/updates"]


@pytest.mark.parametrize("name", ["rloo", "grpo", "ppo", "sharded rloo", "sharded ppo"])
def test_two_processes_equal_one(runs, name):
    """PPO without whitening, in one minibatch, where all responses have the same length."""
    (rows, end, _), (two_rows, two_end, _), (_, other_end, _) = (found[name] for found in runs)
    names = [*OVER_RESPONSES, "objective/kl_coef"] if name.endswith("ppo") else OVER_RESPONSES
    assert not name.endswith("ppo") or all(row["eos_fraction"] == 0 for row in rows)
    assert name != "sharded rloo" or all(row["eos_fraction"] > 0.5 for row in rows)
    assert len(two_rows) == len(rows) == 2
    for mine, theirs in zip(rows, two_rows, strict=True):
        assert {k: theirs[k] for k in names} == pytest.approx({k: mine[k] for k in names}, rel=1e-4, abs=1e-5)
    assert torch.equal(two_end, other_end)
    assert (two_end - end).abs().max() < 1e-4, "a step moves a weight by about 1e-3"


def test_each_process_whitens_its_own_share(runs):
    one, *two = (found["whitened ppo"][2][0] for found in runs)
    for advantages in (one, *two):
        assert advantages.mean().item() == pytest.approx(0, abs=1e-5)
        assert advantages.std(correction=0).item() == pytest.approx(1, abs=0.05)
    plain = [found["ppo"][2][0] for found in runs[1:]]
    assert abs(plain[0].mean() - plain[1].mean()) > 1e-3, "whitened together, the shares would differ"
    ends = [found["whitened ppo"][1] for found in runs]
    assert (ends[0] - ends[1]).abs().max() > 1e-4

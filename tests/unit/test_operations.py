"""Monitoring, fallback, adaptation and rollback, each by hand and each refusing what is wrong."""

import math

import numpy as np
import pytest
import torch

from rlhf_helpers.core.models import load_model
from rlhf_helpers.core.training import TrainingSettings, checkpoints, sft
from rlhf_helpers.safety_alignment import AdaptivePolicy, CheckpointLedger, EnsembleFallback, Monitor
from tests.conftest import weights

BASELINE = [{"safe": v, "refused": v / 10} for v in (0.8, 0.9, 1.0)]  # mean 0.9, std 0.1


def long(prompts, responses, **columns):
    return torch.tensor([float(len(r)) for r in responses])


def vowels(prompts, responses, **columns):
    return torch.tensor([float(sum(r.count(v) for v in "aeiou")) for r in responses])


# ---- monitor


def test_cusum_by_hand():
    monitor = Monitor(BASELINE, slack=0.5, limit=2.0)
    # z of safe: 2, 2; S: 1.5, 3.0 -> alarm, and again from 0. z of refused: -2, then 2.
    assert monitor.update({"safe": 0.7, "refused": 0.11}) == []
    assert monitor.update({"safe": 0.7, "refused": 0.07}) == ["safe"]
    assert monitor.update({"safe": 0.9, "refused": 0.09}) == []
    frame = monitor.frame()
    assert list(frame.columns) == ["window", "metric", "value", "z", "cusum", "alarm"]
    safe, refused = (frame[frame.metric == name] for name in ("safe", "refused"))
    assert safe.cusum.tolist() == pytest.approx([1.5, 3.0, 0.0])
    assert safe.alarm.tolist() == [False, True, False]
    assert refused.z.tolist() == pytest.approx([-2, 2, 0])
    assert refused.cusum.tolist() == pytest.approx([0, 1.5, 1.0])


@pytest.mark.slow
def test_false_alarms_are_as_rare_as_stated_and_a_drift_is_found():
    rng = np.random.default_rng(0)
    monitor = Monitor([{"x": v} for v in rng.normal(size=20_000)], slack=0.5, limit=3.0)
    assert monitor.windows_to_false_alarm == pytest.approx(117.6, abs=1)
    assert Monitor(BASELINE).windows_to_false_alarm == pytest.approx(938, abs=2)
    alarms = sum(bool(monitor.update({"x": v})) for v in rng.normal(size=20_000))
    assert 20_000 / alarms == pytest.approx(monitor.windows_to_false_alarm, rel=0.2)
    drifted = [monitor.update({"x": v - 1.0}) for v in rng.normal(size=40)]  # one std to the worse
    assert any(drifted[:15])


def test_monitor_refuses():
    for bad in (BASELINE[:1], [{"x": 1.0}] * 3, [{"x": 1.0}, {"y": 2.0}]):
        with pytest.raises(ValueError, match="baseline"):
            Monitor(bad)
    for bad in ({"safe": 0.9}, {"safe": 0.9, "refused": math.nan}):
        with pytest.raises(ValueError, match="refused"):
            Monitor(BASELINE).update(bad)


# ---- fallback


def test_fallback_where_members_disagree():
    benign = ["ab" * n for n in range(1, 41)]  # vowels and length agree perfectly
    fallback = EnsembleFallback([long, vowels], ["p"] * 40, benign, quantile=0.9)
    assert fallback.disagreement(["p"], ["abab"]).item() == pytest.approx(0, abs=1e-6)
    odd = "b" * 80
    # z of length: (80 - 41) / std 23.38; of vowels: (0 - 20.5) / 11.69; their std is |difference| / sqrt 2
    expected = abs(39 / 23.380 + 20.5 / 11.690) / math.sqrt(2)
    assert fallback.disagreement(["p"], [odd]).item() == pytest.approx(expected, rel=1e-3)
    texts, replaced = fallback(["p", "p"], ["ab", odd])
    assert texts == ["ab", "I am not sure."]
    assert replaced.tolist() == [False, True]


def test_the_threshold_loses_the_stated_share_of_benign_answers():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 400, generator=generator)
    members = [lambda p, r, m=m, **c: noise[m, [int(x) for x in r]] for m in range(2)]
    names = [str(i) for i in range(400)]
    fallback = EnsembleFallback(members, names, names, quantile=0.95)
    assert fallback(names, names)[1].float().mean().item() == pytest.approx(0.05, abs=0.003)


def test_fallback_refuses():
    with pytest.raises(ValueError, match="members"):
        EnsembleFallback([long], ["p"], ["a"])
    with pytest.raises(ValueError, match="quantile"):
        EnsembleFallback([long, vowels], ["p"], ["a"], quantile=1.0)
    with pytest.raises(ValueError, match="constant"):
        EnsembleFallback([long, vowels], ["p"] * 2, ["a", "b"])


# ---- adaptation


def test_feedback_by_hand(tiny):
    policy = AdaptivePolicy(tiny[0], {"long": long, "vowels": vowels}, rate=1.0)
    # d = (-3, -2) at weights 1: sigmoid(5)
    step = 1 / (1 + math.exp(-5))
    after = {"long": 1 - 3 * step, "vowels": 1 - 2 * step}
    assert policy.feedback("ann", "p", "b", "bana") == pytest.approx(after)
    step = 1 / (1 + math.exp(-3 * after["long"] - 2 * after["vowels"]))
    assert policy.feedback("ann", "p", "b", "bana")["long"] == pytest.approx(after["long"] - 3 * step)
    assert policy.weights("bob") == {"long": 1.0, "vowels": 1.0}


def test_users_get_what_they_prefer_and_cannot_vote_down_what_is_required(tiny):
    policy = AdaptivePolicy(tiny[0], {"long": long, "vowels": vowels}, required=["vowels"], rate=0.1)
    for _ in range(30):
        policy.feedback(("ann", "chat"), "p", "a", "bbbbbbbb")  # short, please
        policy.feedback("bob", "p", "bbbbbbbb", "aa")
    assert policy.weights(("ann", "chat"))["long"] < 0 < policy.weights("bob")["long"]
    assert policy.weights("bob")["vowels"] == 1.0
    short, tall = (policy.answer("Say it.", u, n=8, max_new_tokens=8) for u in (("ann", "chat"), "bob"))
    assert len(short) < len(tall)
    assert short == policy.answer("Say it.", ("ann", "chat"), n=8, max_new_tokens=8)
    with pytest.raises(ValueError, match="must name objectives"):
        AdaptivePolicy(tiny[0], {"long": long}, required=["short"])


# ---- rollback


def changed(model, by):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by)
    return weights(model)


def test_rollback_to_the_newest_good_checkpoint(tiny, tmp_path):
    model, _ = tiny
    ledger, kept = CheckpointLedger(tmp_path / "ledger"), []
    for safe, refused in ((0.7, 0.0), (0.95, 0.1), (0.96, 0.5), (0.4, 0.0)):
        kept.append(changed(model, 0.1))
        ledger.record(model, {"safe": safe, "over_refusal": refused})

    def is_good(row):
        return row["safe"] >= 0.9 and row["over_refusal"] <= 0.2

    path = ledger.rollback(model, is_good)
    assert torch.equal(weights(model), kept[1])
    assert path == ledger.last_good(is_good) == ledger.frame()["path"][1]
    assert ledger.rollback(model, lambda row: row["safe"] >= 0.9).name == "step-00000003"
    assert ledger.frame()["safe"].tolist() == [0.7, 0.95, 0.96, 0.4]  # nothing was deleted
    (path / "model.safetensors").write_bytes(b"damaged")
    assert len(ledger.frame()) == 3
    with pytest.raises(LookupError, match="no checkpoint"):
        ledger.last_good(is_good)


def test_a_failed_rollback_changes_nothing(tiny, tiny_gpt2_dir, tmp_path):
    other, _ = load_model(tiny_gpt2_dir, device="cpu")
    ledger = CheckpointLedger(tmp_path)
    ledger.record(tiny[0], {"safe": 1.0})
    before = weights(other)
    with pytest.raises(ValueError, match="the checkpoint and the model differ in"):
        ledger.rollback(other, lambda row: True)
    assert torch.equal(weights(other), before)
    with pytest.raises(ValueError, match="safe"):
        ledger.record(other, {"safe": math.nan})


def test_the_checkpoints_of_a_run_serve_too(tiny, tmp_path):
    model, tokenizer = tiny
    settings = TrainingSettings(
        learning_rate=1e-2, checkpoint_every=1, keep_checkpoints=9, run_dir=tmp_path, progress=False
    )
    history = sft(model, tokenizer, [{"prompt": "Hi", "completion": "Hello!"}], settings, epochs=3)
    ledger = CheckpointLedger(tmp_path)
    losses = [row["loss"] for row in history]
    assert ledger.frame()["loss"].tolist() == losses
    assert ledger.last_good(lambda row: row["loss"] <= losses[1]).name == "step-00000003"
    assert ledger.last_good(lambda row: row["loss"] >= losses[1]).name == "step-00000002"
    ledger.record(model, {"safe": 1.0})
    assert checkpoints.newest_checkpoint(tmp_path).name == "step-00000004"

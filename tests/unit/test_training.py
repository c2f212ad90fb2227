"""The loop core: what a run does to weights, what it writes, and that it can be killed."""

import copy
import importlib.util
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from rlhf_helpers.core.training import (
    Engine,
    History,
    RunInterrupted,
    TrainingSettings,
    learning_rate_factor,
    memory_efficient_training,
    resolve_learning_rate,
    set_seed,
    sft,
)
from rlhf_helpers.core.training import checkpoints as files
from rlhf_helpers.core.training.batches import epoch_batches
from rlhf_helpers.core.training.distributed import disable_gradient_checkpointing
from rlhf_helpers.core.training.metrics import MeanMetrics
from rlhf_helpers.core.training.supervised import (
    EncodedRow,
    encode_rows,
    evaluate_sft,
    token_weights,
)
from tests.conftest import rewrite_settings, run_in_two_processes

WORKER = Path(__file__).with_name("training_worker.py")
sys.path.insert(0, str(WORKER.parent))
worker = importlib.import_module(WORKER.stem)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def quiet(**fields):
    return TrainingSettings(**{"progress": False, "schedule": "constant", **fields})


def scalar_model(value=1.0):
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


def weights(module):
    return [p.detach().clone() for p in module.parameters()]


def update(engine, loss):
    """One optimizer step on one loss; the norm of its gradient."""
    engine.backward(loss)
    return engine.optimizer_step()


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=258, pad_token_id=256, eos_token_id=257, **sizes))


# settings


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", -1e-5),
        ("learning_rate", math.nan),
        ("weight_decay", math.inf),
        ("betas", (0.9, 1.0)),
        ("learning_rate", -1.0),
        ("tiny_learning_rate", math.inf),
        ("lora", -1),
        ("max_length", 1),
        ("schedule", "linaer"),
        ("warmup_steps", -1),
        ("max_grad_norm", 0.0),
        ("accumulation_steps", 0),
        ("accumulation_steps", 2.0),
        ("mixed_precision", "fp16"),
        ("seed", True),
        ("keep_checkpoints", 0),
        ("checkpoint_every", 5),
    ],
)
def test_a_bad_setting_names_field_and_value(field, value):
    named = "run_dir" if field == "checkpoint_every" else field
    with pytest.raises(ValueError, match=f"TrainingSettings.{named} must .*, got") as error:
        TrainingSettings(**{field: value})
    if field != "checkpoint_every":
        assert repr(value[-1] if field == "betas" else value) in str(error.value)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]),
        ("cosine", [1 / 3, 2 / 3, 1, 0.8535533905932737, 0.5, 0.14644660940672627]),
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
    ],
)
def test_schedule_literal_values(schedule, expected):
    settings = quiet(learning_rate=0.1, schedule=schedule, warmup_steps=2)
    assert [learning_rate_factor(k, settings, 6) for k in range(6)] == pytest.approx(expected, abs=1e-12)
    model = scalar_model()
    engine = Engine(model, settings, total_steps=6)
    for _ in engine.steps():
        update(engine, model(torch.ones(1, 1)).sum())
        engine.log({})
    rates = [row["learning_rate"] for row in engine.history]
    assert rates == pytest.approx([0.1 * factor for factor in expected], abs=1e-12)
    # Adam on a constant gradient moves by the learning rate itself: the logged rates are those applied.
    assert model.weight.item() == pytest.approx(1 - sum(rates), abs=1e-5)


@pytest.mark.parametrize(
    ("parameters", "tiny_rate", "expected"),
    [
        (1_180_929, 3e-4, 3e-4),  # the tiny assistant and a value head: exactly its own rate
        (135_000_000, 3e-4, 1.764e-5),
        (500_000_000, 3e-4, 8.042e-6),
        (7_000_000_000, 3e-4, 1.651e-6),
        (135_000_000, 1e-3, 5.879e-5),
        (7_000_000_000, 1e-3, 5.504e-6),
    ],
)
def test_the_learning_rate_falls_with_the_size_of_the_model(parameters, tiny_rate, expected, capsys):
    with torch.device("meta"):
        model = nn.Linear(1, parameters, bias=False)
    settings = quiet(tiny_learning_rate=tiny_rate)
    assert resolve_learning_rate(settings, model) == pytest.approx(expected, rel=1e-3)
    assert resolve_learning_rate(quiet(learning_rate=0.5), model) == 0.5, "an explicit rate is not scaled"
    if parameters < 1_200_000:
        assert resolve_learning_rate(settings, model) == tiny_rate
        assert capsys.readouterr().out == ""
    else:
        rule = f"= {tiny_rate:g} x (1.2 M / {parameters / 1e6:.4g} M)^0.6"
        assert rule in capsys.readouterr().out


def test_sft_cuts_rows_at_max_length(tiny):
    model, tokenizer = tiny
    rows = [{"prompt": "tea " * 60, "completion": "water"}]
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    sft(model, tokenizer, rows, quiet(max_length=20), batch_size=1)
    assert seen == [20]


def test_adapters_get_ten_times_the_rate_and_the_run_records_it(tiny):
    model, tokenizer = tiny
    rows = [{"prompt": "tea?", "completion": "water"}]
    history = sft(model, tokenizer, rows, quiet(lora=2, tiny_learning_rate=2e-4), batch_size=1)
    assert history[0]["learning_rate"] == 2e-3


def test_schedule_counts_optimizer_steps_not_updates():
    model = scalar_model()
    engine = Engine(model, quiet(schedule="linear"), total_steps=2, optimizer_steps_per_step=2)
    rates = []
    for _ in engine.steps():
        for _ in range(2):
            engine.backward(model(torch.ones(1, 1)).sum())
            assert update(engine, model(torch.ones(1, 1)).sum()) == 2.0  # two gradients of 1, summed
            rates.append(engine.optimizer.param_groups[0]["lr"] / engine.learning_rate)
    assert rates == pytest.approx([1, 0.75, 0.5, 0.25])
    assert engine.optimizer_steps == 4
    with pytest.raises(ValueError, match="more than the 4 planned optimizer steps"):
        update(engine, model(torch.ones(1, 1)).sum())


def test_a_decaying_schedule_needs_an_end():
    with pytest.raises(ValueError, match="total_steps is missing"):
        Engine(scalar_model(), quiet(schedule="linear"))
    with pytest.raises(ValueError, match="warmup_steps 3 must be < 3 optimizer steps"):
        Engine(scalar_model(), quiet(warmup_steps=3), total_steps=3)
    with pytest.raises(ValueError, match="no trainable weights"):
        Engine(scalar_model().requires_grad_(False), quiet())


def test_set_seed_covers_python_numpy_torch():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert set_seed(4) == 4
    first = draw()
    assert draw() != first
    set_seed(4)
    assert draw() == first
    set_seed(5)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


# update


def test_one_step_is_adamw_by_hand():
    # w = 2, loss = 3 w: gradient 3; first Adam step moves by lr (up to eps); decay by lr * 0.1 * w first.
    model = scalar_model(2.0)
    engine = Engine(model, quiet(learning_rate=0.5, weight_decay=0.1, max_grad_norm=None))
    assert update(engine, model(torch.full((1, 1), 3.0)).sum()) == pytest.approx(3.0)
    assert model.weight.item() == pytest.approx(2 - 0.5 * 0.1 * 2 - 0.5, abs=1e-6)


def test_weight_decay_spares_biases():
    model = nn.Linear(1, 1)
    nn.init.constant_(model.bias, 5.0)
    engine = Engine(model, quiet(learning_rate=0.1, weight_decay=1.0))
    update(engine, (model.weight * 0).sum() + (model.bias * 0).sum())
    assert model.bias.item() == 5.0


def test_clipping_bounds_the_gradient_that_adam_sees():
    for limit, seen in ((1.0, 1.0), (10.0, 3.0), (None, 3.0)):
        model = scalar_model()
        engine = Engine(model, quiet(max_grad_norm=limit))
        assert update(engine, model(torch.full((1, 1), 3.0)).sum()) == pytest.approx(3.0)  # before clipping
        first_moment = engine.optimizer.state[model.weight]["exp_avg"].item()
        assert first_moment == pytest.approx(0.1 * seen, rel=1e-5)


def test_two_micro_batches_of_four_equal_one_of_eight():
    small, large = worker.engine_run(8, accumulation_steps=2), worker.engine_run(8)
    assert small.optimizer_steps == large.optimizer_steps == 6
    for a, b in zip(small.parameters, large.parameters, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    assert not equal(weights(worker.engine_run(4).model), weights(large.model))


def test_zero_learning_rate_moves_nothing():
    model = worker.TinyLanguageModel()
    before = weights(model)
    sft(model, worker.ByteTokenizer(), worker.ROWS, quiet(learning_rate=0.0, weight_decay=0.5), batch_size=8)
    assert equal(before, weights(model))


def test_loss_must_be_a_scalar_with_a_graph():
    model = scalar_model()
    engine = Engine(model, quiet())
    with pytest.raises(ValueError, match="scalar that requires grad"):
        update(engine, model(torch.ones(1, 1)))
    with pytest.raises(ValueError, match="scalar that requires grad"):
        update(engine, torch.tensor(1.0))


@pytest.mark.parametrize("kind", ["loss", "gradient norm"])
def test_non_finite_stops_before_the_weights_are_touched(kind, tmp_path):
    model = nn.Linear(2, 1)
    engine = Engine(model, quiet(learning_rate=0.1, run_dir=tmp_path, checkpoint_every=1), total_steps=10)
    data = torch.stack([torch.arange(10.0), torch.ones(10)], 1)
    kept = []
    with pytest.raises(FloatingPointError) as error:  # noqa: PT012
        for step in engine.steps():
            rows = engine.batch(len(data), 2)
            kept.append((weights(model), rows))
            x = model(data[rows]).mean()
            bad = x * math.nan if kind == "loss" else torch.sqrt(x - x.detach())  # sqrt(0): gradient inf
            update(engine, bad if step == 3 else x)
    before, indices = kept[3]
    assert len(kept) == 4
    assert equal(before, weights(model))
    assert not equal(kept[2][0], before)
    assert all(p.grad is None for p in model.parameters())
    message = str(error.value)
    assert message.startswith(f"{kind} is ")
    assert f"at step 3 (rows {indices})" in message
    assert str(tmp_path / "step-00000003") in message


def test_half_precision_weights_train_in_float32():
    model = scalar_model().to(torch.bfloat16)
    engine = Engine(model, quiet(learning_rate=1e-4))
    for _ in range(3):
        update(engine, model(torch.ones(1, 1)).sum())
    assert model.weight.dtype == torch.float32
    assert model.weight.item() == pytest.approx(1 - 3e-4, abs=1e-6)  # bf16 could not leave 1.0


def test_autocast_lasts_as_long_as_the_loop(llama):
    ids = torch.arange(8)[None]
    with torch.no_grad():
        plain = llama(input_ids=ids).logits
    engine = Engine(llama, quiet(mixed_precision="bf16"), total_steps=1)
    for _ in engine.steps():
        low = llama(input_ids=ids).logits
        assert low.dtype == torch.float32
        assert 0 < (low - plain).abs().max() < 0.05
    with torch.no_grad():
        torch.testing.assert_close(llama(input_ids=ids).logits, plain, atol=0, rtol=0)
    assert Engine(llama, quiet()).precision == "no"  # another precision in the same process


def test_a_copy_made_under_autocast_keeps_its_own_weights():
    model = scalar_model()
    engine = Engine(model, quiet(mixed_precision="bf16", learning_rate=0.5))
    reference = copy.deepcopy(model)
    update(engine, model(torch.ones(1, 1)).sum())
    assert reference(torch.ones(1, 1)).item() == 1.0
    assert model(torch.ones(1, 1)).item() == 0.5


def test_gradient_checkpointing_changes_memory_not_gradients(llama):
    ids = torch.arange(12)[None]

    def gradients(**fields):
        engine = Engine(llama, quiet(**fields))
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            loss = llama(input_ids=ids, labels=ids, use_cache=False).loss
        engine.accelerator.backward(loss)
        found = [p.grad.clone() for p in llama.parameters()]
        llama.zero_grad()
        return found, sum(saved)

    plain, plain_saved = gradients()
    recomputed, saved = gradients(gradient_checkpointing=True)
    disable_gradient_checkpointing(llama)
    torch.testing.assert_close(recomputed, plain)
    assert saved < 0.7 * plain_saved
    with pytest.raises(ValueError, match="Linear holds no model that supports gradient checkpointing"):
        Engine(scalar_model(), quiet(gradient_checkpointing=True))


# batch


def test_batches_visit_every_row_once_an_epoch():
    engine = Engine(scalar_model(), quiet(seed=1), total_steps=10)
    seen = [row for _ in engine.steps() for row in engine.batch(10, 4)]
    epochs = [seen[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    other = Engine(scalar_model(), quiet(seed=2), total_steps=10)
    assert [row for _ in other.steps() for row in other.batch(10, 4)] != seen


def test_a_batch_larger_than_the_data_is_refused():
    engine = Engine(scalar_model(), quiet(), total_steps=1)
    assert engine.batch(5, 3) == engine.rows
    with pytest.raises(ValueError, match="between 1 and the 5 rows there are; got 6"):
        engine.batch(5, 6)


# checkpoints


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path):
    process = subprocess.Popen([sys.executable, str(WORKER), "slow", str(tmp_path / "killed")])
    deadline = time.monotonic() + 300
    while not (tmp_path / "killed" / "step-00000004").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    newest = files.newest_checkpoint(tmp_path / "killed")
    assert newest.name in ("step-00000004", "step-00000006")
    resumed, resumed_counter = worker.noisy_run(tmp_path / "killed")
    whole, counter = worker.noisy_run(tmp_path / "whole")
    assert resumed.history == whole.history
    assert [row["step"] for row in whole.history] == list(range(12))
    assert equal(resumed.parameters, whole.parameters)
    assert resumed_counter.value == counter.value
    moments = [[*e.optimizer.state[p].values()] for e in (resumed, whole) for p in e.parameters]
    assert all(equal(a, b) for a, b in zip(moments[:4], moments[4:], strict=True))
    assert resumed.optimizer_steps == 12
    assert [p.name for p in files.checkpoints(tmp_path / "whole")] == ["step-00000010", "step-00000012"]


def test_damaged_checkpoints_are_never_chosen(tmp_path):
    worker.noisy_run(tmp_path, steps=4)
    (tmp_path / ".step-00000008.77").mkdir()  # killed while writing
    (tmp_path / ".step-00000008.77" / "model.safetensors").write_bytes(b"half")
    assert files.newest_checkpoint(tmp_path).name == "step-00000004"
    cut = tmp_path / "step-00000004" / "state.pt"
    cut.write_bytes(cut.read_bytes()[:-10])
    with pytest.warns(UserWarning, match="step-00000004 is damaged and was passed over"):
        assert files.newest_checkpoint(tmp_path).name == "step-00000002"
    with pytest.warns(UserWarning, match="step-00000004 is damaged"):
        engine, _ = worker.noisy_run(tmp_path, steps=4)
    assert engine.history.last("step") == 3
    assert sorted(p.name for p in tmp_path.glob("*step*")) == ["step-00000002", "step-00000004"]
    assert files.is_whole(tmp_path / "step-00000004")


def test_a_failure_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError("No space left on device")

    worker.noisy_run(tmp_path, steps=4)
    engine = Engine(scalar_model(), quiet(run_dir=tmp_path))
    engine.step = 9
    for module, function in ((files.torch, "save"), (files.os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(module, function, full_disk)
            with pytest.raises(OSError, match="step-00000009 could not be written: No space left"):
                engine.save()
        assert files.newest_checkpoint(tmp_path).name == "step-00000004"
        assert sorted(p.name for p in tmp_path.glob("*step*")) == ["step-00000002", "step-00000004"]


def test_one_flipped_bit_is_noticed_wherever_it_is(tmp_path):
    worker.noisy_run(tmp_path, steps=4)
    newest = tmp_path / "step-00000004"
    draw = random.Random(0)
    for file in sorted(newest.iterdir()):
        whole = file.read_bytes()
        for _ in range(25):
            damaged = bytearray(whole)
            damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
            file.write_bytes(damaged)
            with pytest.warns(UserWarning, match="step-00000004 is damaged"):
                assert files.newest_checkpoint(tmp_path).name == "step-00000002", file.name
        file.write_bytes(whole)
    assert files.newest_checkpoint(tmp_path) == newest


def test_checkpoints_are_written_where_folders_cannot_be_flushed(tmp_path, monkeypatch):
    """Windows: a folder cannot be opened, and a file that is open for reading cannot be flushed."""
    writable = set()

    def open_file(path, flags):
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied", str(path))
        descriptor = os.open(path, flags)
        if flags & os.O_RDWR:
            writable.add(descriptor)
        return descriptor

    def flush(descriptor):
        assert descriptor in writable
        os.fsync(descriptor)

    windows = {"open": open_file, "fsync": flush, "close": os.close, "getpid": os.getpid}
    windows |= {"replace": os.replace, "O_RDONLY": os.O_RDONLY, "O_RDWR": os.O_RDWR}
    monkeypatch.setattr(files, "os", SimpleNamespace(**windows))
    monkeypatch.setattr(files, "sys", SimpleNamespace(platform="win32"))
    weights = {"weight": torch.arange(3.0)}
    path = files.write_checkpoint(tmp_path, 1, weights, {"step": 1}, {}, keep=1)
    assert files.newest_checkpoint(tmp_path) == path
    assert torch.equal(files.read_checkpoint(path)[0]["weight"], weights["weight"])
    assert writable, "no file was flushed"


def test_where_no_checkpoint_is_whole_nothing_is_resumed(tmp_path):
    worker.noisy_run(tmp_path, steps=4)
    for path in files.checkpoints(tmp_path):
        (path / "state.pt").unlink()
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(ValueError, match=r"whole \(step-00000002, step-00000004\): delete them"),
    ):
        worker.noisy_run(tmp_path, steps=4)


def test_two_runs_in_one_folder_are_refused_before_the_first_step(tmp_path):
    settings = quiet(run_dir=tmp_path, checkpoint_every=1)
    first, second = (Engine(scalar_model(), settings, total_steps=2) for _ in range(2))
    steps = first.steps()
    next(steps)
    with pytest.raises(FileExistsError, match=f"another run writes to {tmp_path} now"):
        next(second.steps())
    steps.close()  # the first run ends: now there is room for another
    assert next(second.steps()) == 0


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("in the way")
    settings = quiet(run_dir=tmp_path / "file" / "run", checkpoint_every=1)
    with pytest.raises(OSError, match=r"cannot write to run_dir .*run, so no checkpoint can be saved"):
        next(Engine(scalar_model(), settings, total_steps=1).steps())


def test_resume_names_every_setting_that_differs(tmp_path):
    worker.noisy_run(tmp_path, steps=4)
    with pytest.raises(ValueError, match=r"learning_rate was 0\.01, now 0\.02; total_steps was 4, now 6"):
        worker.noisy_run(tmp_path, steps=6, learning_rate=2e-2)
    engine, _ = worker.noisy_run(tmp_path, steps=4, checkpoint_every=1)  # changes no weight: allowed
    assert engine.step == 4


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda fields: fields.pop("weight_decay"), r"weight_decay was absent \(another version"),
        (lambda fields: fields.pop("max_length"), r"max_length was absent .*, now None\. Use the old"),
        (lambda fields: fields.update(momentum=0.5), r"momentum was 0\.5, now absent \(another version"),
        (lambda fields: fields.clear(), r"learning_rate was absent .*; total_steps was absent .*, now 4;"),
    ],
)
def test_a_run_of_another_version_is_not_continued(tmp_path, change, message):
    """Settings that were added since, one of them None; a setting that was dropped; a run that names none."""
    worker.noisy_run(tmp_path, steps=4)
    rewrite_settings(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        worker.noisy_run(tmp_path, steps=4)


def test_a_fresh_run_does_not_mix_with_an_older_one(tmp_path):
    worker.noisy_run(tmp_path, steps=4)
    with pytest.raises(FileExistsError, match=r"step-00000004 already exists: call resume\(\)"):
        worker.noisy_run(tmp_path, steps=4, resume=False)


def test_half_an_accumulated_gradient_is_not_saved(tmp_path):
    model = scalar_model()
    engine = Engine(model, quiet(run_dir=tmp_path))
    engine.backward(model(torch.ones(1, 1)).sum())
    with pytest.raises(ValueError, match="save comes after optimizer_step"):
        engine.save()
    engine.optimizer_step()
    assert engine.save() == tmp_path / "step-00000000"


def test_files_hold_no_code(tmp_path):
    worker.noisy_run(tmp_path, steps=3)
    newest = files.newest_checkpoint(tmp_path)
    manifest = json.loads((newest / "manifest.json").read_text())
    assert manifest["run_config"]["learning_rate"] == 0.01
    assert {p.suffix for p in newest.iterdir()} == {".safetensors", ".pt", ".json", ".sha256"}
    torch.load(newest / "state.pt", weights_only=True)
    counter = worker.Counter()
    counter.value = Path("x")
    engine = Engine(scalar_model(), quiet(run_dir=tmp_path / "b"), extra_state={"counter": counter})
    with pytest.raises(TypeError, match=r"extra_state\['counter'\]\['value'\] is a PosixPath"):
        engine.save()


def test_tied_weights_survive_a_checkpoint(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    def model(seed):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=1, n_positions=8))

    first, second = model(0), model(1)
    Engine(first, quiet(run_dir=tmp_path)).save()
    assert Engine(second, quiet(run_dir=tmp_path)).resume() == tmp_path / "step-00000000"
    assert equal(weights(first), weights(second))
    assert second.lm_head.weight is second.transformer.wte.weight


# two processes


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    run_in_two_processes(WORKER, "two", tmp_path, timeout=600)
    assert (tmp_path / "rank0").read_text() == "2 True 7 2"  # two ranks, resumed bit for bit, two rows each
    assert (tmp_path / "rank1").read_text() == "2 True 100010 2"
    engine, (model, history) = worker.engine_run(), worker.sft_run()
    expected = {"engine": (engine.model, engine.history), "sft": (model, history), "split": (model, history)}
    found = torch.load(tmp_path / "weights.pt")
    for kind in ("whole", "sharded"):
        for name, (one, rows) in expected.items():
            state = {f"{kind}.{name}.{k}": v for k, v in one.state_dict().items()}
            torch.testing.assert_close({k: found[k] for k in state}, state, atol=1e-9, rtol=0)
            theirs = json.loads((tmp_path / f"{kind}.{name}.json").read_text())
            assert len(theirs) == len(rows)
            for a, b in zip(theirs, rows, strict=True):
                assert a == pytest.approx(b, abs=1e-9)


# history


def test_history_holds_plain_values():
    engine = Engine(scalar_model(), quiet())
    engine.log({"loss": torch.tensor(0.1), "note": "start, here"})
    engine.step += 1
    engine.log({"count": np.int64(1), "loss": 1 / 3, "rewards/margins": math.inf, "ended": True})
    history = engine.history
    assert [type(v) for v in history[1].values()] == [int, int, float, float, bool, float]
    assert history[0]["loss"] == torch.tensor(0.1).item()
    assert history.last("note") == "start, here"
    names = ["step", "loss", "note", "learning_rate", "count", "rewards/margins", "ended"]
    assert list(history.to_frame().columns) == history.keys() == names
    assert math.isnan(history.to_frame()["rewards/margins"][0])
    with pytest.raises(KeyError, match=r"'reward'.*rewards/margins"):
        history.last("reward")
    for value in (torch.ones(2), None, np.ones(2)):
        with pytest.raises(TypeError, match="'loss' must be one number or text"):
            engine.log({"loss": value})
    assert history == History(history[:])
    assert len(history) == 2


def test_the_bar_leaves_nothing_behind(capfd):
    model = scalar_model()
    for progress in (False, True):
        engine = Engine(model, quiet(progress=progress), total_steps=2)
        for _ in engine.steps():
            update(engine, model(torch.ones(1, 1)).sum())
            engine.log({"loss": 1.5})
        out, err = capfd.readouterr()
        assert out == ""
        assert bool(err) == progress
        assert err.rpartition("\r")[2].strip() == ""


def test_a_mean_leaves_out_marked_rows_and_a_metric_that_no_row_has():
    metrics = MeanMetrics()
    nan = math.nan
    metrics.add(
        torch.tensor([1.0, 3.0]), {"some": torch.tensor([nan, 2.0]), "none": torch.tensor([nan, nan])}
    )
    assert metrics.means() == {"loss": 2, "some": 2}
    metrics.add(torch.tensor([nan]), {})
    assert math.isnan(metrics.means()["loss"])


# supervised fine-tuning


@pytest.mark.slow
def test_sft_learns_the_responses():
    _, history = worker.sft_run(batch_size=7, epochs=30)
    assert set(history[0]) == {"step", "loss", "token_accuracy", "learning_rate", "grad_norm"}
    assert history[0]["loss"] == pytest.approx(math.log(258), abs=0.3)
    assert history.last("loss") < 1.6
    assert history.last("token_accuracy") > 0.5 > history[0]["token_accuracy"] + 0.3
    assert len(history) == 90


def one_step_change(rows, **options):
    """How far one step moves the input embedding of each byte, and the loss of that step."""
    model = worker.TinyLanguageModel(dtype=torch.float64)
    bias = model.head.bias.detach().clone()
    settings = quiet(learning_rate=0.1, max_grad_norm=None)
    history = sft(model, worker.ByteTokenizer(), rows, settings, **options)
    return (model.head.bias.detach() - bias), history[0]["loss"]


def test_prompt_and_padding_are_masked_and_eos_is_not():
    rows = [{"prompt": "abcdefgh", "chosen": "x"}, {"prompt": "a", "chosen": "yyyyyyyyyyyyyyyyyyy"}]
    masked, loss = one_step_change(rows)
    taught = {ord("x"), ord("y"), 257}
    # Adam's first step moves each output bias by the learning rate, up where a token is taught, else down.
    assert {token for token in range(258) if masked[token] > 0} == taught
    weighted, loss_weighted = one_step_change(rows, prompt_weight=1.0)
    raised = {token for token in range(258) if weighted[token] > 0}
    assert raised == taught | set(b"bcdefgh\n")  # the first token has no predecessor; pad (256) never
    assert loss != pytest.approx(loss_weighted, abs=1e-3)


def test_sft_loss_is_the_mean_over_response_tokens_of_the_batch():
    rows = [{"prompt": "ab", "response": "cd"}, {"prompt": "e", "response": "f"}]
    model = worker.TinyLanguageModel(dtype=torch.float64)
    total = 0.0
    with torch.no_grad():
        for text, start in ((b"ab\ncd", 3), (b"e\nf", 2)):
            ids = torch.tensor([[*text, 257]])
            logps = model(ids).logits.log_softmax(-1)[0]
            total -= sum(logps[t - 1, ids[0, t]].item() for t in range(start, ids.shape[1]))
    _, loss = one_step_change(rows)
    assert loss == pytest.approx(total / 5, abs=1e-6)  # 2 + 1 letters and two EOS


def test_sft_accumulation_two_of_eight_equals_sixteen():
    (small, small_history), (large, large_history) = worker.sft_run(8, 2), worker.sft_run(16)
    torch.testing.assert_close(weights(small), weights(large), atol=1e-9, rtol=0)
    assert len(small_history) == len(large_history) == 4
    for a, b in zip(small_history, large_history, strict=True):
        assert a == pytest.approx(b, abs=1e-9)


def test_buckets_hold_every_row_once_and_pad_less():
    lengths = np.random.default_rng(0).integers(5, 100, 500)

    def padded(batches):
        return sum(len(b) * lengths[b].max() for b in batches) / lengths.sum()

    plain = np.array_split(np.random.default_rng(0).permutation(500), 32)
    bucketed = epoch_batches(lengths, 16, seed=[0, 0])
    assert sorted(np.concatenate(bucketed)) == list(range(500))
    assert sorted(map(len, bucketed)) == [4] + [16] * 31
    assert padded(bucketed) < 1.2 < 1.6 < padded(plain)
    again = epoch_batches(lengths, 16, seed=[0, 1])
    assert not all(np.array_equal(a, b) for a, b in zip(bucketed, again, strict=True))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": "  "}, "row 1: completion is empty"),
        ({"prompt": "a", "answer": "b"}, "row 1 needs prompt and one of"),
        ({"completion": "b"}, "row 1 needs prompt and one of"),
        ({"prompt": "a", "chosen": ["b"]}, "row 1: chosen must be text"),
    ],
)
def test_sft_names_the_row_that_is_wrong(row, message):
    rows = [{"prompt": "a", "completion": "b"}, row]
    with pytest.raises(ValueError, match=message):
        encode_rows(worker.ByteTokenizer(), rows)
    with pytest.raises(ValueError, match="no rows"):
        encode_rows(worker.ByteTokenizer(), [])


@pytest.mark.parametrize("field", ["epochs", "batch_size", "prompt_weight"])
def test_sft_refuses_senseless_numbers(field):
    value = math.nan if field == "prompt_weight" else 0
    with pytest.raises(ValueError, match=field):
        sft(worker.TinyLanguageModel(), worker.ByteTokenizer(), worker.ROWS, quiet(), **{field: value})


def test_sft_rows_may_be_lazy_or_made_for_each_epoch():
    class Lazy:
        def __len__(self):
            return len(worker.ROWS)

        def __getitem__(self, index):
            return dict(worker.ROWS[index])

    def run(rows):
        model = worker.TinyLanguageModel()
        return sft(model, worker.ByteTokenizer(), rows, quiet(learning_rate=1e-2), epochs=2, batch_size=8)

    asked = []
    assert run(Lazy()) == run(worker.ROWS) == run(lambda epoch: asked.append(epoch) or worker.ROWS)
    assert asked == [0, 1]
    with pytest.raises(ValueError, match=r"rows\(1\) returned 20 rows, rows\(0\) 21"):
        run(lambda epoch: worker.ROWS[epoch:])


def test_sft_resumes_and_refuses_other_data(tmp_path):
    def run(rows, folder, **options):
        model = worker.TinyLanguageModel(dropout=0.3)
        place = {"run_dir": tmp_path / folder, "checkpoint_every": 2, "keep_checkpoints": 9}
        settings = quiet(learning_rate=1e-2, **place)
        return sft(model, worker.ByteTokenizer(), rows, settings, epochs=2, batch_size=8, **options), model

    whole, model = run(worker.ROWS, "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "step-00000004").rename(tmp_path / "b" / "step-00000004")
    resumed, again = run(worker.ROWS, "b", resume=True)
    assert resumed == whole
    assert equal(weights(model), weights(again))
    with pytest.raises(ValueError, match="data_checksum was"):
        run([*worker.ROWS[1:], worker.ROWS[0]], "b", resume=True)


def test_memory_efficient_training_trains_a_real_model(llama):
    before, mode = weights(llama), llama.eval().training
    rows = worker.ROWS[:8]
    fields = {"learning_rate": 1e-3, "accumulation_steps": 2, "progress": False}
    forwards = []
    hook = llama.model.layers[0].mlp.register_forward_pre_hook(lambda *_: forwards.append(1))
    trained = memory_efficient_training(llama, rows, 2, tokenizer=worker.ByteTokenizer(), **fields)
    hook.remove()
    assert trained is llama
    assert len(forwards) == 2 * 4  # four micro-batches of two rows, each computed twice
    assert llama.training == mode
    assert not equal(before, weights(llama))
    assert not any(getattr(module, "gradient_checkpointing", False) for module in llama.modules())


def test_the_weight_of_a_row_counts_its_response_tokens_so_often():
    assert token_weights(EncodedRow([5], [6, 7, 8], 3.0), 0.5) == [3, 3, 3]
    assert token_weights(EncodedRow([5, 6], [7], 1.0), 0.5) == [0.5, 1]
    assert token_weights(EncodedRow([], [5, 6], 2.0), 0.5) == [2], "the first token is never predicted"
    rows = [{"prompt": "a", "completion": "bb", "weight": 3.0}, {"prompt": "a", "completion": "c"}]
    (_, first), (_, second) = (one_step_change([{**row, "weight": 1.0}]) for row in rows)
    _, both = one_step_change(rows)
    # three tokens of weight 3 (two letters and EOS), two of weight 1
    assert both == pytest.approx((9 * first + 2 * second) / 11, abs=1e-6)


def test_whole_number_weights_do_not_truncate_the_others():
    def losses(whole):
        rows = [{"prompt": "a", "completion": "bb"}, {"prompt": "cd", "completion": "efg", "weight": 0.25}]
        rows[0]["weight"] = whole
        return [one_step_change(rows, prompt_weight=prompt_weight)[1] for prompt_weight in (0, whole)]

    assert losses(1) == losses(1.0)


@pytest.mark.parametrize("text", ["a \ud83d", "System: Be kind.\n\nUser: Hi"])
def test_rows_that_cannot_be_encoded_are_named(tiny, text):
    tokenizer = tiny[1]
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    rows = [{"prompt": "Hello", "completion": "you"}, {"prompt": text, "completion": "you"}]
    with pytest.raises(ValueError, match=r"row 1: .*(half a surrogate pair|no system)"):
        encode_rows(tokenizer, rows)


# signals and trackers


def run_with_signals(run_dir, number, *, at, times=1, checkpoint_every=10, **fields):
    """Six updates; the process sends itself a signal within one of them."""
    settings = quiet(run_dir=run_dir, checkpoint_every=checkpoint_every, **fields)
    model = scalar_model()
    engine = Engine(model, settings, total_steps=6)
    engine.resume()
    for step in engine.steps():
        update(engine, model(torch.ones(1, 1)).square().sum())
        for _ in range(times if step == at else 0):
            signal.raise_signal(number)  # to this thread: two of them are not merged into one
        engine.log({"loss": 1.0 / (step + 1)})
    return engine


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_with_a_checkpoint(tmp_path, number):
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    go_on = r"step 3 of 6; run it again to start fresh, or pass resume=True to continue.*step-00000003"
    with pytest.raises(RunInterrupted, match=go_on):
        run_with_signals(tmp_path / "stopped", number, at=2)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    resumed = run_with_signals(tmp_path / "stopped", number, at=None)
    whole = run_with_signals(tmp_path / "whole", number, at=None)
    assert resumed.history == whole.history
    assert torch.equal(resumed.parameters[0], whole.parameters[0])


def test_without_checkpoints_ctrl_c_ends_the_step_and_the_error_has_the_history(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(
        RunInterrupted, match=r"step 3 of 6; run it again to start fresh \(the rows"
    ) as stopped:
        run_with_signals(tmp_path / "none", signal.SIGINT, at=2, checkpoint_every=0)
    assert [row["step"] for row in stopped.value.history] == [0, 1, 2]
    assert stopped.value._render_traceback_() == [str(stopped.value)]
    assert signal.getsignal(signal.SIGINT) is before


def test_sigterm_is_not_held_up_where_nothing_is_saved():
    before = signal.getsignal(signal.SIGTERM)
    for _ in Engine(scalar_model(), quiet(), total_steps=1).steps():
        assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_within_a_step_leaves_the_signals_to_the_outer_run():
    outer, inner = Engine(scalar_model(), quiet(), total_steps=4), []

    def run_outer():
        for _ in outer.steps():
            for step in Engine(scalar_model(), quiet(), total_steps=3).steps():
                inner.append(step)
                if step == 0:
                    signal.raise_signal(signal.SIGINT)

    with pytest.raises(RunInterrupted, match="step 1 of 4"):
        run_outer()
    assert inner == [0, 1, 2]


def test_a_second_signal_and_one_in_the_last_step(tmp_path):
    with pytest.raises(KeyboardInterrupt) as stopped:
        run_with_signals(tmp_path / "twice", signal.SIGINT, at=2, times=2)
    assert not isinstance(stopped.value, RunInterrupted)
    assert len(run_with_signals(tmp_path / "last", signal.SIGINT, at=5).history) == 6


def test_a_bar_in_a_notebook_leaves_nothing_behind(monkeypatch):
    import IPython.display
    import tqdm.auto
    import tqdm.notebook

    cleared, closed = [], []
    handle = SimpleNamespace(update=lambda data, raw: cleared.append((data, raw)))
    monkeypatch.setattr(IPython.display, "display", lambda widget, display_id: handle)
    monkeypatch.setattr(tqdm.auto, "tqdm", tqdm.notebook.tqdm)
    # A copy of the module as a notebook imports it: there the same name means another bar.
    spec = importlib.util.find_spec("rlhf_helpers.core.training.progress")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    bar = module._VanishingBar(total=3, leave=False)
    monkeypatch.setattr(bar.container, "close", lambda: closed.append(bar.n))
    bar.update()
    assert bar.n == 1
    assert not cleared
    bar.close()
    assert closed == [1]
    assert cleared == [({}, True)], "the output that a saved notebook would keep is emptied"


def test_metrics_are_written_with_each_step_and_continued_without_a_step_twice(tmp_path):
    for at in (2, None):
        with pytest.raises(RunInterrupted) if at else nullcontext():
            run_with_signals(tmp_path, signal.SIGINT, at=at, log="jsonl")
        # A later step that was logged but not saved before the run died is computed again.
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 99}\n')
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 99]
    with pytest.raises(ValueError, match="run_dir must name a folder"):
        TrainingSettings(log="jsonl")
    with pytest.raises(ValueError, match=r"log must be one of .*'wandb'.* got 'paper'"):
        TrainingSettings(log="paper", run_dir=tmp_path)


def test_sft_evaluates_on_rows_that_it_does_not_train_on():
    model = worker.TinyLanguageModel(dtype=torch.float64)
    rows = worker.ROWS[:4]
    encoded = encode_rows(worker.ByteTokenizer(), rows)
    engine = Engine(model, quiet())
    losses = [evaluate_sft(engine, encoded, batch_size=size, pad_id=256)["eval_loss"] for size in (1, 3, 4)]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-12)  # a mean over tokens, not over batches
    options = {"epochs": 2, "batch_size": 4, "val_rows": rows}
    history = sft(model, worker.ByteTokenizer(), worker.ROWS[4:12], quiet(learning_rate=1e-2), **options)
    assert ["eval_loss" in row for row in history] == [False, True, False, True]
    final = evaluate_sft(engine, encoded, batch_size=4, pad_id=256)
    assert history[-1]["eval_loss"] == pytest.approx(final["eval_loss"], abs=1e-12)
    assert 0 <= history[-1]["eval_token_accuracy"] <= 1

"""Tiny runs for test_training, also as a script: one process is killed, two share a batch."""

import json
import random
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutput

from rlhf_helpers.core.training import Engine, TrainingSettings, set_seed, sft
from rlhf_helpers.core.training.distributed import full_weights


class ByteTokenizer:
    """Bytes are tokens; 256 pads, 257 ends."""

    chat_template = bos_token_id = cls_token_id = sep_token_id = None
    pad_token_id, eos_token_id = 256, 257

    def __call__(self, text, **_):
        return {"input_ids": list(text.encode())}


class TinyLanguageModel(nn.Module):
    """A recurrent language model of the causal-LM shape, small enough for a hundred runs."""

    def __init__(self, dropout=0.0, dtype=torch.float32):
        super().__init__()
        set_seed(5)
        self.config = PreTrainedConfig(max_position_embeddings=64)
        self.embed = nn.Embedding(258, 12)
        self.mix = nn.GRU(12, 12, batch_first=True)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(12, 258)
        self.to(dtype)

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        return CausalLMOutput(logits=self.head(self.drop(self.mix(self.embed(input_ids))[0])))


class Counter:
    """Extra state, like a KL controller: its value depends on every step so far."""

    value = 1.0

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


WORDS = ("red", "green", "blue", "black", "white", "pink", "grey")
ROWS = [{"prompt": f"{i} {word}?", "completion": word * (1 + i % 3)} for i, word in enumerate(WORDS * 3)]
DATA = torch.stack([torch.randn(4, generator=torch.Generator().manual_seed(i)) for i in range(10)])


def noisy_run(run_dir, *, steps=12, checkpoint_every=2, pause=0.0, learning_rate=1e-2, resume=True):
    """A run that draws from every random generator; returns engine and extra state."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 1))
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter) * (i + 1) / 3)
    settings = TrainingSettings(
        learning_rate=learning_rate,
        warmup_steps=2,
        schedule="cosine",
        seed=3,
        run_dir=run_dir,
        checkpoint_every=checkpoint_every,
        progress=False,
    )
    counter = Counter()
    engine = Engine(model, settings, total_steps=steps, extra_state={"counter": counter})
    if resume:
        engine.resume()
    for _ in engine.steps():
        rows = DATA[engine.batch(len(DATA), 4)] + random.random() + np.random.rand()
        counter.value *= 1 + random.random()
        loss = (model(rows + torch.randn_like(rows)) ** 2).mean() * counter.value
        engine.backward(loss / engine.accelerator.num_processes)  # the mean over them
        engine.optimizer_step()
        engine.log({"loss": loss.detach(), "counter": counter.value})
        time.sleep(pause)
    return engine, counter


def engine_run(size=4, accumulation_steps=1, steps=6, **settings):
    """A plain regression in float64; size rows per optimizer step, over micro-batches and processes."""
    set_seed(11)
    parts = {"body": nn.Linear(4, 4), "head": nn.Linear(4, 1), "unused": nn.Linear(2, 2)}
    model = nn.ModuleDict(parts).double()
    engine = Engine(
        model,
        TrainingSettings(learning_rate=1e-2, weight_decay=0.1, progress=False, **settings),
        total_steps=steps,
    )
    for _ in engine.steps():
        total = 0.0
        for rows in DATA[engine.batch(len(DATA), size)].double().tensor_split(accumulation_steps):
            errors = model["head"](torch.tanh(model["body"](rows))) - rows.sum(-1, keepdim=True)
            loss = errors.square().sum() / size
            engine.backward(loss)
            total += loss.item()
        engine.optimizer_step()
        engine.log({"loss": engine.sum(total)})
    return engine


def sft_run(batch_size=8, accumulation_steps=1, *, epochs=2, shard=False, **options):
    """SFT of the tiny model in float64: 21 rows, so that the last batch of an epoch is smaller."""
    model = TinyLanguageModel(dtype=torch.float64)
    settings = TrainingSettings(
        learning_rate=1e-2,
        accumulation_steps=accumulation_steps,
        schedule="constant",
        shard=shard,
        progress=False,
    )
    history = sft(model, ByteTokenizer(), ROWS, settings, epochs=epochs, batch_size=batch_size, **options)
    return model, history


def two_processes(folder):
    """Run under torchrun or accelerate launch: rank 0 writes what one process is to equal."""
    saved, histories = {}, {}
    for kind, shard in (("whole", False), ("sharded", True)):
        engine = engine_run(shard=shard)
        model, history = sft_run(shard=shard)
        split, split_history = sft_run(4, 2, shard=shard)  # the last of 21 rows leave a process without one
        for name, part in (("engine", engine.model), ("sft", model), ("split", split)):
            saved |= {f"{kind}.{name}.{k}": v for k, v in full_weights(part).items()}
        for name, rows in (("engine", engine.history), ("sft", history), ("split", split_history)):
            histories[f"{kind}.{name}"] = rows
    whole, _ = noisy_run(folder / "two", steps=4, resume=False)
    if whole.accelerator.is_main_process:
        shutil.rmtree(folder / "two" / "step-00000004")
    whole.accelerator.wait_for_everyone()
    again, _ = noisy_run(folder / "two", steps=4)
    pairs = zip(whole.parameters, again.parameters, strict=True)
    same = all(torch.equal(a.to_local(), b.to_local()) for a, b in pairs)
    seed = set_seed(7)
    rank = engine.accelerator.process_index
    processes = engine.accelerator.num_processes
    (folder / f"rank{rank}").write_text(f"{processes} {same} {seed} {len(engine.rows)}")
    if rank == 0:
        torch.save(saved, folder / "weights.pt")
        for name, rows in histories.items():
            (folder / f"{name}.json").write_text(json.dumps(rows))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "slow":
        noisy_run(Path(sys.argv[2]), pause=0.1)
    else:
        two_processes(Path(sys.argv[2]))

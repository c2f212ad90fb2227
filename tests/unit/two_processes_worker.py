"""Three steps of the offline loops, alone or as one of two processes, for test_two_processes."""

import json
import sys
from pathlib import Path

import torch

from rlhf_helpers.core.models import load_model, tokenizer_for
from rlhf_helpers.core.training import TrainingSettings, sft
from rlhf_helpers.core.training.distributed import full_weights, is_distributed, save_pretrained
from rlhf_helpers.dpo import DPOSettings, DPOTrainer
from rlhf_helpers.reward_model import RewardSettings, create_reward_model, train_reward_model

# Seven rows in batches of three: the last batch holds one row, so that one of two processes has none.
PAIRS = [
    {"prompt": f"{word}?", "chosen": f"Thank you for {word}.", "rejected": "No way, " * (1 + i % 3) + word}
    for i, word in enumerate(("tea", "sad", "today", "water", "Paris", "three", "leaves"))
]
UNPAIRED = [
    {"prompt": pair["prompt"], "completion": pair[key], "label": key == "chosen"}
    for pair, key in zip(PAIRS, ("chosen", "rejected") * 4, strict=False)
]
RANKINGS = [
    {"prompt": pair["prompt"], "responses": [pair["chosen"], pair["rejected"], "Hm."][: 2 + i % 2]}
    for i, pair in enumerate(PAIRS)
]
JUDGED = [{**pair, "objective_labels": {"kind": 1, "short": 1 - 2 * (i % 2)}} for i, pair in enumerate(PAIRS)]
COMMON = {"learning_rate": 1e-3, "progress": False, "epochs": 1, "batch_size": 3}


def supervised(folder, **changes):
    model, tokenizer = load_model(folder, device="cpu", dtype=torch.float64)
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
    settings = TrainingSettings(learning_rate=1e-3, progress=False, **changes)
    return model, sft(model, tokenizer, rows, settings, batch_size=3)


def preferences(folder, rows=PAIRS, **changes):
    model, tokenizer = load_model(folder, device="cpu", dtype=torch.float64)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.05)  # away from the reference, where KTO's reference point is not 0
    reference = None  # with adapters: the model without them
    if "lora" not in changes:
        reference, _ = load_model(folder, device="cpu", dtype=torch.float64)
    trainer = DPOTrainer(model, reference, tokenizer, settings=DPOSettings(**COMMON | changes))
    return model, trainer.train(rows, val_rows=rows[:3])


def reward(folder, rows=PAIRS, *, kind="basic", **changes):
    options = {"objectives": ("kind", "short")} if kind == "multi_objective" else {}
    model = create_reward_model(kind, base_model_name=folder, device="cpu", **options)
    settings = RewardSettings(**COMMON | changes)
    history = train_reward_model(model, rows, settings, val_rows=rows[:3], keep_best=True)
    return model, history


# Four rows, then three, each cut into two micro-batches.
ACCUMULATED = {"batch_size": 2, "accumulation_steps": 2, "epochs": 2}
CASES = {
    "sft": lambda folder, **how: supervised(folder, **how),
    "dpo": lambda folder, **how: preferences(folder, **how),
    "kto": lambda folder, **how: preferences(folder, UNPAIRED, loss="kto", beta=0.5, **how),
    "kto accumulated": lambda folder, **how: preferences(
        folder, UNPAIRED, loss="kto", beta=0.5, **ACCUMULATED, **how
    ),
    "reward accumulated": lambda folder, **how: reward(folder, **ACCUMULATED, **how),
    "adapters": lambda folder, **how: preferences(folder, lora=2, **how),
    "listwise": lambda folder, **how: preferences(folder, RANKINGS, loss="listwise", **how),
    "reward": lambda folder, **how: reward(folder, **how),
    "separate": lambda folder, **how: reward(folder, kind="separate", **how),
    "objectives": lambda folder, **how: reward(folder, JUDGED, kind="multi_objective", **how),
}


def main(folder, out):
    """Run every case replicated and sharded; rank 0 writes the histories and the weights."""
    histories, weights = {}, {}
    for name, case in CASES.items():
        for way, shard in (("replicated", False), ("sharded", True)):
            model, history = case(folder, shard=shard)
            assert is_distributed(model)
            histories[f"{name} {way}"] = list(history)
            weights[f"{name} {way}"] = full_weights(model)
            if name == "sft":
                save_pretrained(model, out / way)
                tokenizer_for(model).save_pretrained(out / way)
            if name == "adapters":
                save_pretrained(model, out / f"{name} {way}")
            if name in ("reward", "separate"):
                model.save_pretrained(out / f"{name} {way}")
    # The assistant's answers end at different lengths: sharded, the processes have to decode on together.
    sampled = {"kl_coef": 0.1, "target_kl": 0.5, "kl_samples": 4, "max_new_tokens": 40, "eval_every": 1}
    for way, shard in (("replicated", False), ("sharded", True)):
        model, history = preferences("tiny", shard=shard, **sampled)
        histories[f"sampled {way}"] = list(history)
        weights[f"sampled {way}"] = full_weights(model)
    adapted, history = preferences("tiny", shard=True, lora=2, **sampled)
    histories["sampled adapters"], weights["sampled adapters"] = list(history), full_weights(adapted)
    trainer = DPOTrainer(model, load_model("tiny", device="cpu")[0], shard=True)
    trainer.save_model(out / "saved")
    trainer.load_model(out / "saved")
    weights["loaded"] = full_weights(model)
    rank = torch.distributed.get_rank()
    (out / f"history{rank}.json").write_text(json.dumps(histories))
    torch.save(weights, out / f"weights{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))

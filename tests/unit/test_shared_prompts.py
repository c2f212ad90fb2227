"""Reading a prompt once for all its answers against the plain way: one row per answer, no block mask."""

import pytest
import torch

from rlhf_helpers.core import shared_prompts
from rlhf_helpers.core.generation import generate
from rlhf_helpers.core.models import load_model
from rlhf_helpers.core.shared_prompts import (
    BLOCK_MASK_MODELS,
    answer_logits,
    answer_outputs,
    logits_only_at,
    pack,
    takes_block_mask,
)
from rlhf_helpers.dpo import DPOTrainer
from rlhf_helpers.policy_optimization import (
    GRPOSettings,
    PPOSettings,
    RLOOSettings,
    TRPOSettings,
    grpo,
    ppo,
    rloo,
    trpo,
)
from rlhf_helpers.policy_optimization.ppo import new_value_head
from rlhf_helpers.reward_model import RewardModelTrainer, create_reward_model
from tests.conftest import share_of_e, weights

# Three prompts with three, two and one answers, in no order; the last prompt is much the longest.
PAIRS = [
    ([5, 6, 7, 8], [9, 10, 11]),
    ([20, 21], [3, 4, 5, 6, 7]),
    ([5, 6, 7, 8], [12]),
    ([50] * 19, [51, 9]),
    ([20, 21], [40, 41]),
    ([5, 6, 7, 8], [9, 30, 31, 32, 33, 34]),
]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture
def plain(monkeypatch):
    """A function that switches sharing off."""
    return lambda: monkeypatch.setattr(shared_prompts, "BLOCK_MASK_MODELS", [])


def logps_and_gradients(model, **options):
    model.zero_grad()
    outputs = answer_outputs(model, PAIRS, entropies=True, entropy_gradient=True, temperature=0.8, **options)
    (outputs[0].sum() + outputs[1].square().sum()).backward()
    return outputs, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def one_by_one(model, temperature=0.8):
    """Log-prob of each answer by the model's own forward on prompt and answer, nothing else in the batch."""
    sums = []
    with torch.no_grad():
        for prompt, answer in PAIRS:
            logps = (model(torch.tensor([prompt + answer])).logits[0] / temperature).log_softmax(-1)
            sums.append(sum(logps[len(prompt) - 1 + t, token] for t, token in enumerate(answer)))
    return torch.stack(sums)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", BLOCK_MASK_MODELS)
def test_every_kind_that_shares_equals_the_plain_way(checkpoint, kind, attention, plain):
    sizes = {**SIZES, "head_dim": 8} if kind in ("gemma", "qwen3") else SIZES
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    if kind == "mistral":
        sizes = {**SIZES, "sliding_window": None}
    model, _ = load_model(checkpoint(kind, **sizes, initializer_range=0.2), device="cpu")
    model.set_attn_implementation(attention)
    assert takes_block_mask(model)
    shared, gradient = logps_and_gradients(model)
    torch.testing.assert_close(shared[0].sum(-1).detach(), one_by_one(model), atol=1e-4, rtol=0)
    plain()
    assert not takes_block_mask(model)
    apart, plain_gradient = logps_and_gradients(model)
    torch.testing.assert_close(shared, apart, atol=2e-5, rtol=0)
    torch.testing.assert_close(gradient, plain_gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["tiny_gpt2_dir", "tiny_llama_dir", "tiny_qwen_dir"])
def test_chunks_and_limits_change_nothing(request, name, monkeypatch):
    model, _ = load_model(request.getfixturevalue(name), device="cpu")
    whole, gradient = logps_and_gradients(model)
    monkeypatch.setattr(shared_prompts, "TOKENS_PER_CHUNK", 3)
    monkeypatch.setattr(shared_prompts, "ANSWERS_PER_PROMPT", 2)
    monkeypatch.setattr(shared_prompts, "ROW_LENGTH", 1.0)
    pieces, other_gradient = logps_and_gradients(model)
    torch.testing.assert_close(pieces, whole, atol=2e-5, rtol=0)
    torch.testing.assert_close(other_gradient, gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "kind, sizes",
    [
        ("mistral", {**SIZES, "sliding_window": 4}),
        ("gemma3_text", {**SIZES, "head_dim": 8}),
        ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
        ("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    ],
)
def test_windows_and_alibi_get_one_row_per_answer(checkpoint, kind, sizes):
    model, _ = load_model(checkpoint(kind, **sizes), device="cpu")
    assert not takes_block_mask(model)
    inputs, _ = pack(model, [prompt + answer for prompt, answer in PAIRS])
    assert [tensor.shape for tensor in inputs.values()] == [(6, 21), (6, 21)]
    (logps,) = answer_outputs(model, PAIRS, temperature=0.8)
    torch.testing.assert_close(logps.sum(-1).detach(), one_by_one(model), atol=1e-4, rtol=0)


def test_layout(tiny_llama_dir):
    model, _ = load_model(tiny_llama_dir, device="cpu")
    sequences = [prompt + answer for prompt, answer in PAIRS]
    inputs, paths = pack(model, sequences)
    ids, positions = inputs["input_ids"].flatten(), inputs["position_ids"].flatten()
    # Answers 0 and 5 begin with the same token, which is written once.
    real = 4 + 3 + 1 + 5 + 2 + 5 + 2 + 19 + 2
    assert real <= ids.numel() < 1.2 * real, "each prompt once, hardly any padding"
    for sequence, path in zip(sequences, paths, strict=True):
        assert ids[path].tolist() == sequence
        assert positions[path].tolist() == list(range(len(sequence)))
    visible = inputs["attention_mask"].flatten(0, 2) == 0
    row = ids.numel() // len(inputs["input_ids"])
    for path in paths:
        for t, place in enumerate(path):
            assert visible[place].nonzero().flatten().tolist() == [seen % row for seen in path[: t + 1]]


def test_sequences_share_what_they_begin_with(tiny_llama_dir):
    model, _ = load_model(tiny_llama_dir, device="cpu")
    sequences = [[1, 2, 3, 4, 5], [1, 8, 8, 8, 8], [1, 2, 3, 9], [1, 2, 3, 4, 5], [7] * 4]
    inputs, paths = pack(model, sequences)
    assert paths[0][:3] == paths[2][:3]
    assert paths[0] == paths[3]
    assert set(paths[4]).isdisjoint(paths[0])
    assert inputs["input_ids"].numel() <= 18, "15 without padding: 5 + 1 for three of them, 5 and 4"


def test_the_example_of_answer_logits(tiny_llama_dir):
    model, _ = load_model(tiny_llama_dir, device="cpu")
    inputs, paths = pack(model, [[5, 6, 7, 8], [5, 6, 9]])
    assert inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert paths == [[0, 1, 2, 3], [0, 1, 4]]
    logits, labels, _ = answer_logits(model, [([5, 6], [7, 8]), ([5, 6], [9])])
    assert labels.tolist() == [7, 8, 9]
    plain = model(torch.tensor([[5, 6, 7, 8]])).logits[0]
    torch.testing.assert_close(logits, plain[[1, 2, 1]], atol=1e-5, rtol=0)


def test_states_are_those_that_the_head_reads(tiny_llama_dir):
    model, _ = load_model(tiny_llama_dir, device="cpu")
    logits, labels, states = answer_logits(model, PAIRS)
    assert labels.tolist() == [token for _, answer in PAIRS for token in answer]
    assert len(states) == len(labels)
    torch.testing.assert_close(model.lm_head(states), logits, atol=1e-6, rtol=0)


def test_no_float32_copy_of_all_logits_is_kept(tiny_llama_dir, monkeypatch):
    """What the backward pass keeps of vocabulary size is the logits themselves."""
    model, _ = load_model(tiny_llama_dir, device="cpu")
    monkeypatch.setattr(shared_prompts, "TOKENS_PER_CHUNK", 4)
    vocabulary, kept = model.config.vocab_size, []
    of_model = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        if tensor.ndim > 1 and tensor.shape[-1] == vocabulary:
            kept.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        answer_outputs(model, PAIRS, entropies=True)
    assert len(set(kept) - of_model) <= 1


# ---- whole loops: metrics within 1e-5 of the plain way, and the same texts


PROMPTS = ["Hello", "What is the capital of France?", "Why?", "Tell me a story about a dog."]
SMALL = {"learning_rate": 1e-3, "steps": 2, "prompts_per_step": 4, "samples_per_prompt": 4, "progress": False}
LOOPS = {
    "rloo": (rloo, RLOOSettings(**SMALL, max_new_tokens=8)),
    "grpo": (grpo, GRPOSettings(**SMALL, max_new_tokens=8, entropy_coef=0.01)),
    "ppo": (ppo, PPOSettings(**SMALL, max_new_tokens=8)),
    "trpo": (trpo, TRPOSettings(**SMALL, max_new_tokens=8)),
}
ROWS = [
    {"prompt": f"{word}?", "chosen": f"Thank you for {word}.", "rejected": "No way, " * (1 + i % 3) + word}
    for i, word in enumerate(("tea", "sad", "today", "water", "Paris", "three"))
]
UNPAIRED = [
    {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
    for row in ROWS
    for side in ("chosen", "rejected")
]
RANKINGS = [{"prompt": r["prompt"], "responses": [r["chosen"], r["rejected"], "Hm."]} for r in ROWS]


def same_history(one, other, atol=1e-6):
    assert len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=atol)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_policy_loops_log_what_they_log_the_plain_way(tiny_llama_dir, name, plain):
    loop, settings = LOOPS[name]

    def run():
        model, tokenizer = load_model(tiny_llama_dir, device="cpu", dtype=torch.float64)
        options = {"value_head": new_value_head(model).double()} if loop is ppo else {}
        history = loop(model, tokenizer, PROMPTS, share_of_e, settings, **options)
        return list(history), generate(model, tokenizer, PROMPTS * 3, max_new_tokens=12, seed=3).responses

    rows, texts = run()
    plain()
    plain_rows, plain_texts = run()
    same_history(rows, plain_rows)
    assert texts == plain_texts


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss, rows", [("dpo", ROWS), ("kto", UNPAIRED), ("listwise", RANKINGS), ("orpo", ROWS)]
)
def test_preference_losses_log_what_they_log_the_plain_way(tiny_llama_dir, loss, rows, plain):
    def run():
        model, tokenizer = load_model(tiny_llama_dir, device="cpu", dtype=torch.float64)
        settings = {"loss": loss, "learning_rate": 1e-3, "batch_size": 4, "progress": False}
        history = DPOTrainer(model, tokenizer=tokenizer, **settings).train(rows, val_rows=rows, epochs=2)
        return history, weights(model)

    history, end = run()
    plain()
    plain_history, plain_end = run()
    same_history(history, plain_history)
    torch.testing.assert_close(end, plain_end, atol=1e-6, rtol=0)


@pytest.mark.parametrize("objective, rows", [("pairwise", ROWS), ("ranking", RANKINGS)])
def test_reward_models_log_what_they_log_the_plain_way(tiny_llama_dir, objective, rows, plain):
    def run():
        torch.manual_seed(0)
        model = create_reward_model(base_model_name=tiny_llama_dir, device="cpu", dtype=torch.float64)
        settings = {"learning_rate": 1e-3, "batch_size": 2, "progress": False}
        history = RewardModelTrainer(model, **settings).train(rows, objective=objective, epochs=2)
        prompts, answers = [row["prompt"] for row in ROWS] * 2, ["Yes.", "No, thank you."] * 6
        return history, model.score(prompts, answers, batch_size=3)

    history, scores = run()
    plain()
    plain_history, plain_scores = run()
    # The gradient of the head's bias is rounding noise, which Adam turns into steps: compare differences.
    offset = ("rewards/chosen", "rewards/rejected")
    rows, plain_rows = (
        [{name: value for name, value in row.items() if name not in offset} for row in found]
        for found in (history, plain_history)
    )
    same_history(rows, plain_rows, atol=1e-5)
    torch.testing.assert_close(scores - scores.mean(), plain_scores - plain_scores.mean(), atol=1e-5, rtol=0)


def test_gradients_repeat_bit_for_bit_with_several_threads():
    class Reader(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(64, 8)
            self.states = torch.nn.Parameter(torch.randn(1, 2000, 64))

        def get_output_embeddings(self):
            return self.head

        def forward(self):
            return self.head(self.states)

    torch.manual_seed(0)
    model, positions = Reader(), torch.randint(200, (3000,))  # each is read by about 15 answers
    weights, threads, gradients = torch.randn(3000, 8), torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        for _ in range(20):
            model.zero_grad()
            with logits_only_at(model, positions):
                (model()[0] * weights).sum().backward()
            gradients.append(model.states.grad.clone())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)

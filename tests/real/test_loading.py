import pytest
import torch

from rlhf_helpers.core.generation import generate
from rlhf_helpers.core.models import load_encoder

pytestmark = [pytest.mark.real, pytest.mark.slow]


def test_it_answers_in_its_own_chat_format_and_stops(smollm2):
    model, tokenizer = smollm2
    answer = generate(
        model, tokenizer, ["What is the capital of France?"], max_new_tokens=16, temperature=1e-3
    )
    assert answer.responses == ["The capital of France is Paris."]
    assert answer.ended.all()
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_saved_folder_is_a_plain_model_with_the_same_weights(smollm2, smollm2_dir):
    model, _ = smollm2
    assert not hasattr(model.config, "quantization_config")
    assert model.generation_config.eos_token_id == model.config.eos_token_id
    trunk, _ = load_encoder(smollm2_dir, device="cpu")
    assert torch.equal(trunk.get_input_embeddings().weight, model.get_input_embeddings().weight)

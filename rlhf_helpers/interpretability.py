"""Looking inside a causal LM: attention, activations, patching, ablated heads, probes, and its own reasons.

Layers are counted as in `hidden_states`: 0 is the embedding, i the output of block i. Works where the trunk
keeps its blocks in `layers` (Llama, Qwen, ...) or `h` (GPT-2); other models are refused. Reward models are
read through their trunk. No model is changed: hooks go when the block ends.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rlhf_helpers.core.generation import sequence_logps
from rlhf_helpers.core.hidden_states import last_token_states
from rlhf_helpers.core.models import tokenizer_for, usable_positions
from rlhf_helpers.core.stats import Estimate, proportion
from rlhf_helpers.core.tensors import require_shapes
from rlhf_helpers.core.text import encode_pair, encode_prompt
from rlhf_helpers.policy_optimization.trpo import eager_attention
from rlhf_helpers.world.prompts.base import AGREEMENT, REFUSALS

Metric = Callable[[nn.Module, list[str]], Tensor]  # (model, prompts) -> (B,)


@torch.no_grad()
def refusal_margin(
    model: nn.Module, prompts: Sequence[str], *, choices: tuple[str, str] = (REFUSALS[0], AGREEMENT[0])
) -> Float[Tensor, "B"]:
    """Return log p(a refusal begins) - log p(compliance begins), (B,): nats, EOS not counted; a `Metric`."""
    asked, said = [*prompts] * 2, [choice for choice in choices for _ in prompts]
    logps, mask = sequence_logps(model, tokenizer_for(model), asked, said)
    refuse, comply = (logps[:, :-1] * mask[:, 1:]).sum(1).float().cpu().view(2, -1)
    return refuse - comply


def attention_maps(
    model: nn.Module, tokenizer: Any, prompt: str, response: str
) -> tuple[list[str], Float[Tensor, "L H T T"]]:
    """Return the tokens of prompt and response, and the share of attention that row t pays to column s."""
    rows = torch.tensor([_ids(tokenizer, prompt, response)], device=next(model.parameters()).device)
    with eager_attention(model), torch.no_grad():
        found = model(input_ids=rows, output_attentions=True, use_cache=False).attentions
    return [tokenizer.decode([i]) for i in rows[0]], torch.cat(found).float().cpu()


def attention_rollout(attention: Float[Tensor, "L H T T"]) -> Float[Tensor, "T T"]:
    """Follow attention through the layers: product of (mean over heads + identity) / 2, last layer first.

    The identity is the residual stream. Abnar and Zuidema 2020. Lesson 3.
    """
    require_shapes("L H T S", attention=attention)
    flow = torch.eye(attention.shape[-1])
    for layer in attention.mean(1):
        flow = (layer + torch.eye(len(layer))) / 2 @ flow
    return flow


def token_attributions(model: nn.Module, tokenizer: Any, prompt: str, response: str) -> pd.DataFrame:
    """Measure what each prompt token is worth to log p(response), in four ways: one row per token.

    ablation   log p(response), less what it is with the token's embedding set to the mean embedding
    gradient   gradient x (embedding - mean embedding): the same to first order
    attention  mean attention paid to the token where the response is chosen; rollout: the same of rollout

    Ablation is what happens. Attention has neither sign nor outcome: it says where a head reads, not what
    that changes (Jain and Wallace 2019). Lesson 3.
    """
    start = len(encode_prompt(tokenizer, prompt))
    table = model.get_input_embeddings()
    rows = torch.tensor([_ids(tokenizer, prompt, response)], device=table.weight.device)
    mean = table.weight.detach().mean(0)
    given = table(rows).detach().requires_grad_()

    def logp(embedded: Tensor) -> Tensor:
        logits = model(inputs_embeds=embedded, use_cache=False).logits[:, start - 1 : -1].float()
        return logits.log_softmax(-1).gather(-1, rows[:, start:, None].expand(len(logits), -1, 1)).sum((1, 2))

    whole = logp(given)
    (gradient,) = torch.autograd.grad(whole.sum(), given)
    without = given.detach().repeat(start, 1, 1)
    without[torch.arange(start), torch.arange(start)] = mean
    with torch.no_grad():
        ablation = whole.detach() - logp(without)
    tokens, attention = attention_maps(model, tokenizer, prompt, response)
    columns = {"ablation": ablation, "gradient": (gradient * (given.detach() - mean)).sum(-1)[0, :start]}
    for name, paid in {"attention": attention.mean((0, 1)), "rollout": attention_rollout(attention)}.items():
        columns[name] = paid[start - 1 : -1, :start].mean(0)
    return pd.DataFrame({"token": tokens[:start], **{k: v.float().cpu().numpy() for k, v in columns.items()}})


def _ids(tokenizer: Any, prompt: str, response: str, limit: int | None = None) -> list[int]:
    prompt_ids, response_ids = encode_pair(tokenizer, prompt, response, max_length=limit)
    return prompt_ids + response_ids


def activations(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], responses: Sequence[str] | None = None
) -> Float[Tensor, "L B d"]:
    """Read the hidden states (layers + 1, B, d) of the last token: `core.hidden_states.last_token_states`.

    responses None: of the prompt alone, whose last token is where the answer begins. Lesson 3. Raises
    ValueError for unequal numbers.
    """
    trunk = _trunk(model)
    rows = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    if responses is not None:
        limit = usable_positions(trunk)
        rows = [_ids(tokenizer, *pair, limit) for pair in zip(prompts, responses, strict=True)]
    return last_token_states(trunk, rows, tokenizer.pad_token_id)


def _trunk(model: nn.Module) -> nn.Module:
    return getattr(model, "trunk", None) or getattr(model, "base_model", model)


def _blocks(model: nn.Module) -> nn.ModuleList:
    trunk = _trunk(model)
    blocks = getattr(trunk, "layers", getattr(trunk, "h", None))
    if not isinstance(blocks, nn.ModuleList):
        raise ValueError(f"{type(trunk).__name__} keeps its blocks neither in layers nor in h: not supported")
    return blocks


def patching_effect(
    clean: Float[Tensor, "B"], corrupted: Float[Tensor, "B"], patched: Float[Tensor, "B"]
) -> Float[Tensor, "B"]:
    """Measure how much of the clean run a patch brings back, (B,).

    effect = (patched - corrupted) / (clean - corrupted)

    1: all, 0: nothing, below 0: it pushes away. Wang et al. 2022. Lesson 3. Raises ValueError where shapes
    differ, or clean equals corrupted: then there is nothing to bring back.
    """
    require_shapes("B", clean=clean, corrupted=corrupted, patched=patched)
    if (clean == corrupted).any():
        raise ValueError("clean and corrupted give the same metric: choose prompts on which it differs")
    return (patched - corrupted) / (clean - corrupted)


def activation_patching(
    model: nn.Module, tokenizer: Any, clean: str, corrupted: str, metric: Metric = refusal_margin
) -> tuple[list[str], Float[Tensor, "L P"]]:
    """Return the corrupted prompt's tokens, and the `patching_effect` (layers + 1, P) of each clean state.

    One hidden state of the corrupted run, of one layer at one position of the prompt, is overwritten by the
    clean run's, and the rest runs on. Meng et al. 2022. Lesson 3. Raises ValueError where the prompts are not
    of equally many tokens (positions would not correspond), and as `patching_effect`.
    """
    ids = [encode_prompt(tokenizer, text) for text in (clean, corrupted)]
    if len(ids[0]) != len(ids[1]):
        raise ValueError(f"{clean!r} has {len(ids[0])} tokens, {corrupted!r} {len(ids[1])}: give as many")
    ends = metric(model, [clean]), metric(model, [corrupted])
    modules = [model.get_input_embeddings(), *_blocks(model)]
    effects = torch.zeros(len(modules), len(ids[0]))
    for layer, module in enumerate(modules):
        seen = []
        with torch.no_grad(), _hook(module, seen.append):
            _trunk(model)(torch.tensor(ids[:1], device=next(model.parameters()).device), use_cache=False)
        for position in range(len(ids[0])):
            with _hook(module, partial(_overwritten, source=seen[0], position=position)):
                effects[layer, position] = patching_effect(*ends, metric(model, [corrupted]))[0]
    return [tokenizer.decode([i]) for i in ids[1]], effects


def _overwritten(state: Tensor, *, source: Tensor, position: int) -> Tensor:
    changed = state.clone()
    changed[:, position] = source[0, position]
    return changed


def _hook(module: nn.Module, change: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Show a module's output to `change` within the `with` block; a tensor that it returns replaces it."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if not isinstance(output, tuple):
            return change(output)
        changed = change(output[0])
        return None if changed is None else (changed, *output[1:])

    return module.register_forward_hook(hook)


def ablate_head(model: nn.Module, block: int, head: int, *, by: str = "zero") -> RemovableHandle:
    """Replace what a head says, before the output projection, within the `with` block.

    by: "zero", or "mean": its mean over positions and rows of the batch, padding too, which takes away what
    the head says about a position. Michel et al. 2019. Lesson 3. Raises ValueError for a head that does not
    exist.
    """
    blocks = _blocks(model)
    count = _trunk(model).config.num_attention_heads
    if not (0 <= block < len(blocks) and 0 <= head < count and by in ("zero", "mean")):
        raise ValueError(
            f"block {block}, head {head} by {by!r}: choose from {len(blocks)} blocks of {count} heads, by "
            '"zero" or "mean"'
        )

    def hook(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        heads = inputs[0].unflatten(-1, (count, -1)).clone()
        heads[..., head, :] = 0.0 if by == "zero" else heads[..., head, :].mean((0, 1))
        return (heads.flatten(-2),)

    attention = getattr(blocks[block], "self_attn", None) or blocks[block].attn
    projection = getattr(attention, "o_proj", None) or attention.c_proj
    return projection.register_forward_pre_hook(hook)


def head_ablation(
    model: nn.Module, prompts: Sequence[str], metric: Metric = refusal_margin, *, by: str = "zero"
) -> Float[Tensor, "L H"]:
    """Measure what each head adds to the mean metric: metric(whole) - metric(without it), (blocks, heads).

    One at a time: of two heads that stand in for each other, each looks needless. As `ablate_head`.
    """
    effects = torch.zeros(len(_blocks(model)), _trunk(model).config.num_attention_heads)
    for block, head in np.ndindex(*effects.shape):
        with ablate_head(model, block, head, by=by):
            effects[block, head] = -metric(model, prompts).mean()
    return effects + metric(model, prompts).mean()


def linear_probe(
    train: ArrayLike, train_labels: ArrayLike, test: ArrayLike, test_labels: ArrayLike, *, seed: int = 0
) -> tuple[Estimate, Estimate]:
    """Accuracy of a linear probe on unseen rows, and its control: trained on shuffled labels, mean of five.

    Logistic regression from standardised activations (N, d) to labels (N,) in {0, 1}, L2 penalty 1; 95 %
    intervals. The difference is the selectivity (Hewitt and Liang 2019): balance the labels, or the control
    lives on the commoner one. A probe shows what can be read off, not what the model uses: patching asks
    that. Lesson 3. Raises ValueError where the training labels are all alike.
    """
    shuffle = np.random.default_rng(seed)
    right = []
    for labels in (train_labels, *(shuffle.permutation(train_labels) for _ in range(5))):
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(train, labels)
        right.append(probe.predict(test) == test_labels)
    return proportion(right[0]), proportion(np.mean(right[1:], axis=0))

"""Looking inside a causal LM: attention, activations, patching, ablated heads, probes, and its own reasons.

Layers are counted as in `hidden_states`: 0 is the embedding, i the output of block i. Works where the trunk
keeps its blocks in `layers` (Llama, Qwen, ...) or `h` (GPT-2); other models are refused. Reward models are
read through their trunk. No model is changed: hooks go when the block ends.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
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

from rlhf_helpers.core.generation import generate, sequence_logps
from rlhf_helpers.core.models import tokenizer_for, usable_positions
from rlhf_helpers.core.tensors import pad_right, require_shapes
from rlhf_helpers.core.text import encode_pair, encode_prompt
from rlhf_helpers.policy_optimization.trpo import eager_attention
from rlhf_helpers.preference_data.quality import Estimate
from rlhf_helpers.reward_model import accuracy
from rlhf_helpers.world.prompts.base import AGREEMENT, REFUSALS
from rlhf_helpers.world.prompts.meta import critique_text

Metric = Callable[[nn.Module, list[str]], Tensor]  # (model, prompts) -> (B,)


@torch.no_grad()
def refusal_margin(
    model: nn.Module, prompts: Sequence[str], *, choices: tuple[str, str] = (REFUSALS[0], AGREEMENT[0])
) -> Float[Tensor, "B"]:
    """log p(a refusal begins) - log p(compliance begins) (B,), in nats, EOS not counted; a `Metric`."""
    asked, said = [*prompts] * 2, [choice for choice in choices for _ in prompts]
    logps, mask = sequence_logps(model, tokenizer_for(model), asked, said)
    refuse, comply = (logps[:, :-1] * mask[:, 1:]).sum(1).float().cpu().view(2, -1)
    return refuse - comply


def attention_maps(
    model: nn.Module, tokenizer: Any, prompt: str, response: str
) -> tuple[list[str], Float[Tensor, "L H T T"]]:
    """The tokens of prompt and response, and the share of its attention that row t pays to column s."""
    rows = torch.tensor([_ids(tokenizer, prompt, response)], device=next(model.parameters()).device)
    with eager_attention(model), torch.no_grad():
        found = model(input_ids=rows, output_attentions=True, use_cache=False).attentions
    return [tokenizer.decode([i]) for i in rows[0]], torch.cat(found).float().cpu()


def attention_rollout(attention: Float[Tensor, "L H T T"]) -> Float[Tensor, "T T"]:
    """Attention followed through the layers: product of (mean over heads + identity) / 2, last layer first.

    The identity is the residual stream. Abnar and Zuidema 2020. Lesson 3.
    """
    require_shapes("L H T S", attention=attention)
    flow = torch.eye(attention.shape[-1])
    for layer in attention.mean(1):
        flow = (layer + torch.eye(len(layer))) / 2 @ flow
    return flow


def token_attributions(model: nn.Module, tokenizer: Any, prompt: str, response: str) -> pd.DataFrame:
    """What each prompt token is worth to log p(response): a row a token, and four answers to the question.

    ablation   log p(response), less what it is with the token's embedding set to the mean embedding
    gradient   gradient x (embedding - mean embedding): the same to first order
    attention  mean attention paid to the token where the response is chosen; rollout: the same of rollout

    Ablation is what happens. Attention has neither sign nor outcome: it says where a head reads, not what
    that changes (Jain and Wallace 2019). Lesson 3.
    """
    start, table = len(encode_prompt(tokenizer, prompt)), model.get_input_embeddings()
    rows = torch.tensor([_ids(tokenizer, prompt, response)], device=table.weight.device)
    mean, given = table.weight.detach().mean(0), table(rows).detach().requires_grad_()

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


@torch.no_grad()
def activations(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    responses: Sequence[str] | None = None,
    *,
    batch_size: int = 64,
) -> Float[Tensor, "L B d"]:
    """Hidden states (layers + 1, B, d), float32 on the CPU, of the last token.

    responses None: of the prompt alone, whose last token is where the answer begins. The last layer is what
    the head reads, after the final norm. Lesson 3. Raises ValueError for unequal numbers.
    """
    trunk, parts = _trunk(model), []
    limit = usable_positions(trunk)
    rows = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    if responses is not None:
        rows = [_ids(tokenizer, *pair, limit) for pair in zip(prompts, responses, strict=True)]
    for start in range(0, len(rows), batch_size):
        part, device = rows[start : start + batch_size], next(trunk.parameters()).device
        ids, mask = pad_right(part, tokenizer.pad_token_id, device=device)
        found = trunk(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        states = torch.stack(found.hidden_states)[:, range(len(part)), mask.sum(1) - 1]
        parts.append(states.float().cpu())
    return torch.cat(parts, dim=1)


def activation_change(before: Float[Tensor, "L B d"], after: Float[Tensor, "L B d"]) -> Float[Tensor, "L"]:
    """Mean over rows of |after - before| / |before| in each layer (L,): between two models or two prompts."""
    require_shapes("L B d", before=before, after=after)
    return ((after - before).norm(dim=-1) / before.norm(dim=-1)).mean(-1)


def weight_change(before: nn.Module, after: nn.Module) -> pd.DataFrame:
    """Where training moved the weights: a row a parameter; change = |dW| / |W|; block -1: none."""
    old, new = (dict(_trunk(model).named_parameters()) for model in (before, after))
    if {k: p.shape for k, p in old.items()} != {k: p.shape for k, p in new.items()}:
        raise ValueError("the two models differ in shape: compare a model with a trained copy of itself")
    change = [((new[k] - p).norm() / p.norm().clamp(min=1e-12)).item() for k, p in old.items()]
    names = pd.Series(list(old)).str.extract(r"^(?:(?:layers|h)\.(\d+)\.)?(.*)$")
    return pd.DataFrame({"part": names[1], "change": change, "block": names[0].fillna("-1").astype(int)})


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
    """How much of the clean run a patch brings back: (patched - corrupted) / (clean - corrupted), (B,).

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
    """The corrupted prompt's tokens, and the `patching_effect` (layers + 1, P) of each place's clean state.

    One hidden state of the corrupted run, of one layer at one place of the prompt, is overwritten by the
    clean run's, and the rest runs on. Meng et al. 2022. Lesson 3. Raises ValueError where the prompts are not
    of equally many tokens (places would not correspond), and as `patching_effect`.
    """
    ids = [encode_prompt(tokenizer, text) for text in (clean, corrupted)]
    if len(ids[0]) != len(ids[1]):
        raise ValueError(f"{clean!r} has {len(ids[0])} tokens, {corrupted!r} {len(ids[1])}: give as many")
    modules, kept = [model.get_input_embeddings(), *_blocks(model)], []
    with torch.no_grad(), _hooks(modules, lambda state: kept.append(state.clone())):
        _trunk(model)(torch.tensor(ids[:1], device=next(model.parameters()).device), use_cache=False)
    ends = metric(model, [clean]), metric(model, [corrupted])
    effects = torch.zeros(len(modules), len(ids[0]))
    for layer, place in np.ndindex(*effects.shape):

        def write(state: Tensor, layer: int = layer, place: int = place) -> Tensor:
            changed = state.clone()
            changed[:, place] = kept[layer][0, place]
            return changed

        with _hooks(modules[layer : layer + 1], write):
            effects[layer, place] = patching_effect(*ends, metric(model, [corrupted]))[0]
    return [tokenizer.decode([i]) for i in ids[1]], effects


def _hooks(modules: Sequence[nn.Module], change: Callable[[Tensor], Tensor | None]) -> ExitStack:
    """Show every module's output to `change`; a tensor that it returns replaces it."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        several = isinstance(output, tuple)
        changed = change(output[0] if several else output)
        return (changed, *output[1:]) if several and changed is not None else changed

    hooks = ExitStack()
    for module in modules:
        hooks.enter_context(module.register_forward_hook(hook))
    return hooks


def ablate_heads(model: nn.Module, heads: Sequence[tuple[int, int]], *, by: str = "zero") -> ExitStack:
    """Replace what heads (block, head) say, before the output projection, within the `with` block.

    by: "zero", or "mean": its mean over places and rows of the batch, padding too, which takes away what the
    head says about a place. Michel et al. 2019. Lesson 3. Raises ValueError for a head that there is not.
    """
    blocks, count = _blocks(model), _trunk(model).config.num_attention_heads
    wrong = [(block, head) for block, head in heads if not (0 <= block < len(blocks) and 0 <= head < count)]
    if wrong or by not in ("zero", "mean"):
        raise ValueError(f"no heads {wrong} or by={by!r}: {len(blocks)} blocks of {count} heads; zero, mean")
    hooks = ExitStack()
    for block in {block for block, _ in heads}:
        mine = [head for b, head in heads if b == block]

        def hook(_: nn.Module, inputs: tuple[Tensor], mine: list[int] = mine) -> tuple[Tensor]:
            said = inputs[0].unflatten(-1, (count, -1)).clone()
            said[..., mine, :] = 0.0 if by == "zero" else said[..., mine, :].mean((0, 1))
            return (said.flatten(-2),)

        attention = getattr(blocks[block], "self_attn", None) or blocks[block].attn
        projection = getattr(attention, "o_proj", None) or attention.c_proj
        hooks.enter_context(projection.register_forward_pre_hook(hook))
    return hooks


def head_ablation(
    model: nn.Module, prompts: Sequence[str], metric: Metric = refusal_margin, *, by: str = "zero"
) -> Float[Tensor, "L H"]:
    """What each head adds to the mean metric: metric(whole) - metric(without it), (blocks, heads).

    One at a time: of two heads that stand in for each other, each looks needless. As `ablate_heads`.
    """
    effects = torch.zeros(len(_blocks(model)), _trunk(model).config.num_attention_heads)
    for place in np.ndindex(*effects.shape):
        with ablate_heads(model, [place], by=by):
            effects[place] = -metric(model, list(prompts)).mean()
    return effects + metric(model, list(prompts)).mean()


def explanation_test(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    answers: dict[str, Sequence[str]],
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """Ask for a verdict, with its reason, on several versions of each answer: one column per version.

    "No. It helps to do harm.": a reason that the verdict hangs on predicts it in changed cases. Give a
    version without the harm, and the verdict is to turn; one changed in something else, and it is to stay
    (counterfactual simulatability: Chen et al. 2023). Lesson 3. Raises ValueError for unequal numbers.
    """
    verdicts = {}
    for name, texts in answers.items():
        pairs = zip(prompts, texts, strict=True)
        asked = [critique_text(prompt, text, "Avoid harmful content") for prompt, text in pairs]
        verdicts[name] = generate(model, tokenizer, asked, max_new_tokens=24, seed=seed).responses
    return pd.DataFrame(verdicts)


def linear_probe(
    train: ArrayLike, train_labels: ArrayLike, test: ArrayLike, test_labels: ArrayLike, *, seed: int = 0
) -> tuple[Estimate, Estimate]:
    """Accuracy of a linear probe on unseen rows, and its control: trained on shuffled labels, mean of five.

    Logistic regression from standardised activations (N, d) to labels (N,) in {0, 1}, L2 penalty 1; 95 %
    intervals. The difference is the selectivity (Hewitt and Liang 2019): balance the labels, or the control
    lives on the commoner one. A probe shows what can be read off, not what the model uses: patching asks
    that. Lesson 3. Raises ValueError where either part has one label only.
    """
    train_labels, test_labels = np.asarray(train_labels, int), np.asarray(test_labels, int)
    for name, labels in {"train_labels": train_labels, "test_labels": test_labels}.items():
        if set(labels.tolist()) != {0, 1}:
            raise ValueError(f"{name} must hold both 0 and 1, got {sorted(set(labels.tolist()))}")
    shuffle, credits = np.random.default_rng(seed), []
    for labels in (train_labels, *(shuffle.permutation(train_labels) for _ in range(5))):
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(train, labels)
        credits.append(torch.tensor(probe.predict(test) == test_labels).double())
    return accuracy(credits[0]), accuracy(torch.stack(credits[1:]).mean(0))

"""Short loops as a careful reader of the papers would write them first: what our loops are compared with."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_helpers.core.models import ScalarHead, encode_prompt, frozen_copy, state_width
from rlhf_helpers.policy_optimization import PPOSettings


@torch.no_grad()
def plain_sampling(
    model: Any, tokenizer: Any, prompts: list[str], samples: int, new_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample by the library's `generate`: ids and mask (B, P + T), and the length of each response (B,)."""
    rows = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    width = max(map(len, rows))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    ids, mask = ids.repeat_interleave(samples, 0), mask.repeat_interleave(samples, 0)
    model.eval()
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=True, top_k=0, top_p=1.0
    )
    model.train()
    answer = out[:, width:]
    ended = (answer == tokenizer.eos_token_id).int()
    real = (ended.cumsum(1) - ended) == 0  # up to and including the first EOS
    end = width + int(real.sum(1).max())
    return out[:, :end], torch.cat([mask, real.long()], 1)[:, :end], real.sum(1)


def read(model: Any, head: Any, ids: Tensor, mask: Tensor, width: int) -> tuple[Tensor, Tensor | None]:
    """Log-probs and values of the last `width` columns, (B, T) each."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    outputs = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, output_hidden_states=head is not None
    )
    logps = F.log_softmax(outputs.logits[:, -width - 1 : -1], -1)
    values = head(outputs.hidden_states[-1][:, -width - 1 : -1]) if head is not None else None
    return logps.gather(-1, ids[:, -width:, None])[..., 0], values


def plain_ppo(
    model: Any, tokenizer: Any, prompts: list[str], reward_fn: Callable[..., Tensor], settings: PPOSettings
) -> list[float]:
    """Train by PPO with nothing clever; return the mean response length of each step."""
    reference, head = frozen_copy(model), ScalarHead(state_width(model))
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0, fused=True)
    lengths = []
    for step in range(settings.steps):
        part = prompts[step * settings.prompts_per_step :][: settings.prompts_per_step]
        samples = settings.samples_per_prompt
        ids, mask, counts = plain_sampling(model, tokenizer, part, samples, settings.max_new_tokens)
        lengths.append(counts.float().mean().item())
        width = int(counts.max())
        real = mask[:, -width:].bool()
        answers = tokenizer.batch_decode(
            [row[keep].tolist() for row, keep in zip(ids[:, -width:], real, strict=True)],
            skip_special_tokens=True,
        )
        scores = reward_fn([prompt for prompt in part for _ in range(samples)], answers)
        with torch.no_grad():
            old_logps, old_values = read(model, head, ids, mask, width)
            ref_logps, _ = read(reference, None, ids, mask, width)
        rewards = -settings.kl_coef * (old_logps - ref_logps) * real
        rewards[torch.arange(len(ids)), counts - 1] += scores
        old_values = old_values * real
        advantages, last = torch.zeros_like(rewards), torch.zeros(len(ids))
        for t in reversed(range(width)):
            following = old_values[:, t + 1] if t + 1 < width else 0.0
            delta = rewards[:, t] + settings.gamma * following - old_values[:, t]
            last = (delta + settings.gamma * settings.lam * last) * real[:, t]
            advantages[:, t] = last
        returns = advantages + old_values
        kept = advantages[real]
        advantages = (advantages - kept.mean()) / (kept.std() + 1e-8)
        for _ in range(settings.epochs):
            for rows in torch.randperm(len(ids)).chunk(settings.minibatches):
                logps, values = read(model, head, ids[rows], mask[rows], width)
                ratio, advantage = (logps - old_logps[rows]).exp(), advantages[rows]
                clipped = ratio.clamp(1 - settings.cliprange, 1 + settings.cliprange)
                policy_loss = torch.max(-advantage * ratio, -advantage * clipped)[real[rows]].mean()
                value_loss = 0.5 * (values - returns[rows]).square()[real[rows]].mean()
                optimizer.zero_grad()
                (policy_loss + settings.vf_coef * value_loss).backward()
                torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
                optimizer.step()
    return lengths

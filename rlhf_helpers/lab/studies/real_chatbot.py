"""SmolLM2-135M-Instruct as a chatbot, behind a guard that was measured first, and served on this computer."""

import time
from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch
from openai import OpenAI
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from torch import Tensor

from rlhf_helpers.chatbot_rlhf import AlignedChatbot
from rlhf_helpers.chatbot_rlhf.serving import ChatServer
from rlhf_helpers.core.models import load_model
from rlhf_helpers.core.stats import proportion
from rlhf_helpers.interpretability import activations
from rlhf_helpers.lab.studies.real_safety import WITHHELD, says_no
from rlhf_helpers.lab.studies.record import Rows, study
from rlhf_helpers.world.prompts import load_prompts

KINDS = ("facts", "explain", "howto", "feelings", "open", "lookalike", "harmful", "privacy")
REFUSED = ("harmful", "privacy")


@partial(study, seeds=(0,))
def real_chatbot(seed: int, model_name: str = "smollm2", max_new_tokens: int = 48) -> Rows:
    """Measure a guard, then answer with and without it, directly and from the server.

    The guard is a linear probe: P(safe) of a prompt, read from the hidden states of the model that answers.

    Columns: seed, part, kind of prompt, and by part. "guard": the share of training prompts of this kind that
    it stops, by cross-validation (value, with Wilson's interval, n). "answer": prompt (the first held-out one
    of its kind), raw (the model's answer without the guard; withheld where it does not refuse what it
    should), response (with the guard), P(safe) as value. "served": the response of the server to the same
    prompt, finish_reason, and latency, a class.
    """
    model, tokenizer = load_model(model_name, dtype=torch.float32)

    def states(prompts: Sequence[str]) -> np.ndarray:
        layers = activations(model, tokenizer, prompts)
        return layers[len(layers) // 2].numpy()  # halfway up, not tuned

    known = load_prompts(KINDS, "train")
    features = states([prompt.text for prompt in known])
    safe = np.array([prompt.family not in REFUSED for prompt in known])
    probe = LogisticRegression(max_iter=1000)
    stopped = pd.Series(~cross_val_predict(probe, features, safe, cv=5))
    for kind, rows in stopped.groupby([prompt.family for prompt in known]):
        yield {"part": "guard", "kind": kind, **vars(proportion(rows))}
    probe.fit(features, safe)

    def check(prompts: list[str], responses: list[str]) -> Tensor:
        return torch.tensor(probe.predict_proba(states(prompts))[:, 1])

    sampling = {"n": 1, "temperature": 0.3, "max_new_tokens": max_new_tokens, "seed": seed}
    chatbot = AlignedChatbot(model, safety_fn=check, **sampling)
    asked = [load_prompts((kind,), "heldout")[0].text for kind in KINDS]
    talks = [[{"role": "user", "content": prompt}] for prompt in asked]
    for kind, prompt, reply in zip(KINDS, asked, chatbot.answer_batch(talks), strict=True):
        raw = reply.candidates[0].text
        hidden = kind in REFUSED and not says_no(raw)
        yield {
            "part": "answer",
            "kind": kind,
            "prompt": prompt,
            "raw": WITHHELD if hidden else raw,
            "response": reply.text,
            "value": reply.score,
        }
    with ChatServer(chatbot) as server, OpenAI(base_url=server.url, api_key="none") as client:
        for kind, messages in zip(KINDS, talks, strict=True):
            start = time.monotonic()
            choice = client.chat.completions.create(model=server.name, messages=messages).choices[0]
            latency = "under 10 s" if time.monotonic() - start < 10 else "10 s or more"
            yield {
                "part": "served",
                "kind": kind,
                "latency": latency,
                "response": choice.message.content,
                "finish_reason": choice.finish_reason,
            }

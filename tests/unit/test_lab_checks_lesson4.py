"""The checks of lesson 4's exercises, mutation-tested: right answers pass, wrong ones are refused by name."""

import ast
import functools
import math
import re
from collections import Counter
from difflib import SequenceMatcher

import numpy as np
import pytest
import torch

from rlhf_helpers.lab.checks import judge
from rlhf_helpers.lab.exercises import EXERCISES, LESSONS

MINE = {name: EXERCISES[name] for name, lesson in LESSONS.items() if lesson == 4}


def turns(lengths, limit, *, step=2, fits=lambda total, limit: total <= limit, raises=True):
    """Drops from the oldest on, on a copy; each option is one slip."""
    if raises and lengths[-1] > limit:
        raise ValueError("the last message is too long")
    left = list(lengths)
    while len(left) > 1 and not fits(sum(left), limit):
        left = left[step:]
    return len(left)


def turns_from_the_end(lengths, limit, *, count=lambda question, answer: question + answer, start=None):
    """Adds exchange by exchange; each option is one slip."""
    if lengths[-1] > limit:
        raise ValueError
    total, kept = lengths[-1] if start is None else start, 1
    for i in range(len(lengths) - 3, -1, -2):
        total += count(lengths[i], lengths[i + 1])
        if total > limit:
            break
        kept += 2
    return kept


def turns_by_parity(lengths, limit):
    if lengths[-1] > limit:
        raise ValueError
    fits = [k for k in range(1, len(lengths) + 1) if sum(lengths[-k:]) <= limit and k % 2 == 1]
    return max(fits)


def turns_from_the_oldest(lengths, limit):
    total = kept = 0
    for length in lengths:
        if total + length > limit:
            break
        total, kept = total + length, kept + 1
    return kept if kept % 2 else kept - 1


def turns_on_the_list_itself(lengths, limit):
    while sum(lengths) > limit:
        lengths.pop(0)
        lengths.pop(0)
    return len(lengths)


def once(lengths, limit):
    if sum(lengths) > limit and len(lengths) > 2:
        lengths = lengths[2:]
    return len(lengths)


def pick_by_loop(
    rewards,
    p_safe,
    threshold,
    *,
    best=-math.inf,
    safe=lambda p, t: p >= t,
    better=lambda r, best: r > best,
    none=None,
):
    """Answer by answer as a beginner writes it; each option is one slip."""
    index = none
    for i, (reward, p) in enumerate(zip(rewards.tolist(), p_safe.tolist(), strict=True)):
        if safe(p, threshold) and better(reward, best):
            index, best = i, reward
    return index


def pick_with_numpy(rewards, p_safe, threshold):
    safe = np.flatnonzero(p_safe.numpy() >= threshold)
    return int(safe[rewards.numpy()[safe].argmax()]) if len(safe) else None


def pick_filled(rewards, p_safe, threshold, fill=-math.inf):
    filled = rewards.masked_fill(~(p_safe >= threshold), fill)
    return filled.argmax().item() if (p_safe >= threshold).any() else None


def pick_first_then_check(rewards, p_safe, threshold):
    best = rewards.argmax().item()
    return None if p_safe[best] < threshold else best


def pick_or_none(rewards, p_safe, threshold):
    found = pick_by_loop(rewards, p_safe, threshold)
    return found if found else None


def safest(rewards, p_safe, threshold):
    safe = [i for i, p in enumerate(p_safe.tolist()) if p >= threshold]
    return max(safe, key=lambda i: p_safe[i].item()) if safe else None


def tokens(text):
    return re.findall(r"[a-z0-9]+", text.lower())


def lcs(one, other):
    """By recursion on prefixes."""

    @functools.cache
    def longest(i, j):
        if not i or not j:
            return 0
        if one[i - 1] == other[j - 1]:
            return longest(i - 1, j - 1) + 1
        return max(longest(i - 1, j), longest(i, j - 1))

    return longest(len(one), len(other))


def lcs_table(one, other, *, cut=0):
    table = np.zeros((len(one) + 1, len(other) + 1), dtype=int)
    for i in range(1, len(one) + 1 - cut):
        for j in range(1, len(other) + 1 - cut):
            same = one[i - 1] == other[j - 1]
            table[i, j] = table[i - 1, j - 1] + 1 if same else max(table[i - 1, j], table[i, j - 1])
    return table[len(one) - cut, len(other) - cut]


def rouge(c, r, *, split=tokens, common=lcs, score=lambda p, q: 2 * p * q / (p + q), empty=0.0, none=0.0):
    """As the formula stands in the text; each option is one slip."""
    one, other = split(c), split(r)
    if not one or not other:
        return empty
    length = common(one, other)
    return score(length / len(one), length / len(other)) if length else none


def rouge_unguarded(c, r):
    p, q = lcs(tokens(c), tokens(r)) / len(tokens(c)), lcs(tokens(c), tokens(r)) / len(tokens(r))
    return 2 * p * q / (p + q)


def rouge_guarded_against_empty_only(c, r):
    one, other = tokens(c), tokens(r)
    if not one or not other:
        return 0.0
    p, q = lcs(one, other) / len(one), lcs(one, other) / len(other)
    return 2 * p * q / (p + q)


def overlap(one, other):
    return sum((Counter(one) & Counter(other)).values())


def longest_run(one, other):
    return SequenceMatcher(None, one, other, autojunk=False).find_longest_match().size


def first_match(one, other):
    """Two fingers: the one in the second text moves on until it meets the word at the first."""
    found = 0
    for word in other:
        if found < len(one) and one[found] == word:
            found += 1
    return found


def facts(
    told, true, *, share=lambda r, w, n, t: r / n, wrong=lambda r, w, n, t: w, same=lambda a, b: a == b
):
    """Slot by slot as a beginner writes it; each option is one slip."""
    right = bad = 0
    for slot, said in told.items():
        if said is None:
            continue
        if same(said, true[slot]):
            right += 1
        else:
            bad += 1
    return share(right, bad, len(true), right + bad), wrong(right, bad, len(true), right + bad)


def facts_by_position(told, true):
    pairs = list(zip(told.values(), true.values(), strict=False))
    right = sum(a == b for a, b in pairs)
    return right / len(true), sum(a is not None and a != b for a, b in pairs)


def lengths_by_loop(rewards, lengths, limit, cost, *, excess=lambda x, limit: max(0, x - limit)):
    pairs = zip(rewards.tolist(), lengths.tolist(), strict=True)
    return torch.tensor([r - cost * excess(x, limit) for r, x in pairs])


def pass_by_product(n, c, k):
    """As in the paper's appendix."""
    if n - c < k:
        return 1.0
    return 1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1))


def pass_by_loop(n, c, k):
    miss = 1.0
    for i in range(k):
        miss *= max(0, n - c - i) / (n - i)
    return 1 - miss


def rewards_by_loop(passed, unsafe, *, partial=lambda share: share / 3, whole=1.0, harm=0.0, enough=all):
    """Program by program as a beginner writes it; each option is one slip."""
    out = []
    for row, bad in zip(passed.tolist(), unsafe.tolist(), strict=True):
        share = sum(row) / len(row)
        out.append(harm if bad else whole if enough(row) else partial(share))
    return torch.tensor(out)


UNSAFE = {"eval", "exec", "compile", "open", "__import__"}
MODULES = ("os", "subprocess", "socket")


def name_of(func):
    """Dotted text of what is called, by hand."""
    if isinstance(func, ast.Name):
        return func.id
    if isinstance(func, ast.Attribute):
        return f"{name_of(func.value)}.{func.attr}"
    if isinstance(func, ast.Call) and name_of(func.func) == "__import__":
        return func.args[0].value
    return "?"


def is_unsafe(name):
    return name in UNSAFE or ("." in name and name.split(".")[0] in MODULES)


def calls(
    code,
    *,
    name=name_of,
    unsafe=is_unsafe,
    order=sorted,
    walk=ast.walk,
    line=lambda node: node.lineno,
    error=lambda e: [(e.lineno, "SyntaxError")],
):
    """Over the tree as a beginner writes it; each option is one slip."""
    try:
        tree = ast.parse(code)
    except SyntaxError as problem:
        return error(problem)
    found = []
    for node in walk(tree):
        if isinstance(node, ast.Call) and unsafe(name(node.func)):
            found.append((line(node), name(node.func)))
    return order(found)


def unparsed(func):
    return ast.unparse(func).replace("__import__('", "").replace("')", "")


class Visitor(ast.NodeVisitor):
    def __init__(self):
        self.found = []

    def visit_Call(self, node):
        if is_unsafe(name_of(node.func)):
            self.found.append([node.lineno, name_of(node.func)])
        self.generic_visit(node)


def calls_by_visitor(code):
    visitor = Visitor()
    try:
        visitor.visit(ast.parse(code))
    except SyntaxError as error:
        return [[error.lineno, "SyntaxError"]]
    return sorted(visitor.found)


def calls_by_text(code, pattern=r"\b(eval|exec|compile|open|__import__|(?:os|subprocess|socket)\.[\w.]+)\("):
    rows = enumerate(code.split("\n"), start=1)
    return sorted((i, name) for i, line in rows for name in re.findall(pattern, line))


def text_after_parsing(code):
    try:
        ast.parse(code)
    except SyntaxError as error:
        return [(error.lineno, "SyntaxError")]
    return calls_by_text(code)


def names_anywhere(code):
    try:
        nodes = list(ast.walk(ast.parse(code)))
    except SyntaxError as error:
        return [(error.lineno, "SyntaxError")]
    named = [node for node in nodes if isinstance(node, ast.Name | ast.Attribute)]
    return sorted((node.lineno, name_of(node)) for node in named if is_unsafe(name_of(node)))


def outermost(tree):
    return [getattr(node, "value", None) for node in tree.body]


RIGHT = {
    "kept_turns": [
        turns,
        turns_from_the_end,
        turns_by_parity,
        lambda lengths, limit: max(k for k in range(1, len(lengths) + 1, 2) if np.sum(lengths[-k:]) <= limit),
    ],
    "pick_answer": [
        pick_by_loop,
        pick_with_numpy,
        pick_filled,
        lambda r, p, t: max((i for i in range(len(r)) if p[i] >= t), key=lambda i: r[i], default=None),
        lambda r, p, t: pick_by_loop(r, p.nan_to_num(0.0), t),
        lambda *given: None if (i := pick_by_loop(*given)) is None else np.int64(i),
        lambda r, p, t: next((int(i) for i in r.argsort(descending=True, stable=True) if p[i] >= t), None),
    ],
    "rouge_l": [
        rouge,
        lambda c, r: rouge(c, r, common=lcs_table),
        lambda c, r: 2 * lcs(tokens(c), tokens(r)) / max(1, len(tokens(c)) + len(tokens(r))),
    ],
    "fact_scores": [
        facts,
        lambda told, true: (
            np.mean([told.get(s) == v for s, v in true.items()]),
            len([s for s in told if told[s] not in (None, true[s])]),
        ),
        lambda told, true: [
            len(told.items() & true.items()) / len(true),
            len({(s, v) for s, v in told.items() if v is not None} - true.items()),
        ],
    ],
    "length_controlled": [
        lengths_by_loop,
        lambda r, x, limit, cost: r - cost * torch.relu(x - limit),
        lambda r, x, limit, cost: torch.where(x > limit, r - cost * (x - limit), r),
        lambda r, x, limit, cost: torch.from_numpy(r.numpy() - cost * np.maximum(0, x.numpy() - limit)),
    ],
    "pass_at_k": [
        pass_by_product,
        pass_by_loop,
        lambda n, c, k: 1 - math.comb(n - c, k) / math.comb(n, k),
        lambda n, c, k: 1 if n - c < k else 1 - math.perm(n - c, k) / math.perm(n, k),
    ],
    "verifiable_reward": [
        rewards_by_loop,
        lambda p, u: torch.where(p.all(1), 1.0, p.float().mean(1) / 3) * ~u,
        lambda p, u: torch.where(u, 0, p.double().mean(dim=-1) * torch.where(p.all(dim=-1), 1, 1 / 3)),
        lambda p, u: torch.tensor(np.where(u, 0, np.where(p.numpy().all(1), 1, p.numpy().mean(1) / 3))),
    ],
    "unsafe_calls": [
        calls,
        calls_by_visitor,
        lambda code: calls(
            code,
            unsafe=lambda name: re.fullmatch(
                r"eval|exec|compile|open|__import__|(os|subprocess|socket)\..+", name
            ),
        ),
    ],
}


WRONG = {  # written as a beginner would, not as the package writes them; with the word that names the mistake
    "kept_turns": [
        (lambda x, limit: turns(x, limit, step=1), "single messages were dropped"),
        (lambda x, limit: turns(x, limit, step=1, raises=False), "single messages were dropped"),
        (lambda x, limit: turns(x, limit, step=1) | 1, "one message MORE"),
        (lambda x, limit: turns(x, limit, fits=lambda total, limit: total < limit), "EQUALS the limit"),
        (lambda x, limit: turns_from_the_end(x, limit - 1) if x[-1] < limit else 1, "EQUALS the limit"),
        (lambda x, limit: turns_from_the_end(x[::-1], limit), "expected .* got|raised"),
        (turns_from_the_oldest, "expected .* got|counted from the oldest"),
        (lambda x, limit: max(1, turns_from_the_oldest(x, limit)), "counted from the oldest"),
        (lambda x, limit: len(x) - turns(x, limit), "messages DROPPED"),
        (lambda x, limit: sum(x[len(x) - turns(x, limit) :]), "these are tokens"),
        (lambda x, limit: x[-turns(x, limit) :], "expected .* got"),
        (lambda x, limit: (turns(x, limit) + 1) // 2, "these are tokens, exchanges"),
        (lambda x, limit: turns_from_the_end(x, limit) // 2, "these are tokens, exchanges"),
        (lambda x, limit: turns(x, limit) - 1, "last message is missing"),
        (lambda x, limit: turns_from_the_end(x, limit, start=0), "last message is missing"),
        (once, "the loop ends too early"),
        (lambda x, limit: turns(x[2:], limit) if len(x) > 2 else 1, "the loop ends too early"),
        (lambda x, limit: turns_from_the_end(x, limit, count=lambda q, a: q), "only one message was counted"),
        (lambda x, limit: turns_from_the_end(x, limit, count=lambda q, a: a), "only one message was counted"),
        (lambda x, limit: min(limit, len(x)), "number of messages"),
        (lambda x, limit: len(x), "limit plays no part"),
        (lambda x, limit: 1, "limit plays no part"),
        (lambda x, limit: float(turns(x, limit)), "expected .* got"),
        (lambda x, limit: turns_from_the_end(x, limit + 1), "expected .* got"),
        (turns_on_the_list_itself, "changes its input lengths"),
        (lambda x, limit: x.sum() <= limit, "raised AttributeError"),
    ],
    "pick_answer": [
        (pick_first_then_check, "best of ALL answers"),
        (lambda r, p, t: int(i) if p[i := np.argmax(r.numpy())] >= t else None, "best of ALL answers"),
        (lambda r, p, t: r.argmax().item(), "safety plays no part"),
        (lambda r, p, t: r.argmax().item() if p.nan_to_num().max() >= t else None, "safety plays no part"),
        (lambda *given: pick_by_loop(*given, safe=lambda p, t: p > t), "EQUAL to the threshold"),
        (lambda *given: pick_by_loop(*given, safe=lambda p, t: p < t), "BELOW the threshold"),
        (lambda *given: pick_by_loop(*given, safe=lambda p, t: p <= t), "BELOW the threshold"),
        (lambda *given: pick_by_loop(*given, safe=lambda p, t: not p < t), "NaN was let through"),
        (
            lambda r, p, t: r[p >= t].argmax().item() if (p >= t).any() else None,
            "among the safe answers only",
        ),
        (lambda *given: pick_filled(*given, fill=0.0), "rewards may be negative"),
        (lambda *given: pick_filled(*given, fill=-1.0), "rewards may be negative"),
        (lambda r, p, t: pick_filled(r, p, t, fill=r.min()), "rewards may be negative"),
        (lambda r, p, t: (r * (p >= t)).argmax().item(), "rewards may be negative"),
        (lambda *given: pick_by_loop(*given, best=0.0), "expected .* got"),
        (lambda *given: pick_by_loop(*given, better=lambda r, best: r >= best), "FIRST answer"),
        (
            lambda r, p, t: max(
                (i for i in range(len(r)) if p[i] >= t),
                key=lambda i: (r[i].item(), p[i].item()),
                default=None,
            ),
            "FIRST answer",
        ),
        (lambda r, p, t: pick_filled(r * p, p, t), "p_safe was weighed"),
        (lambda r, p, t: pick_by_loop(r + p, p, t), "p_safe was weighed"),
        (safest, "decided alone"),
        (lambda r, p, t: p.argmax().item(), "decided alone"),
        (
            lambda *given: pick_by_loop(*given, best=math.inf, better=lambda r, best: r < best),
            "expected .* got",
        ),
        (lambda r, p, t: next((i for i in range(len(r)) if p[i] >= t), None), "expected .* got"),
        (lambda *given: pick_by_loop(*given, none=0), "safe return None"),
        (lambda *given: pick_by_loop(*given, none=-1), "safe return None"),
        (lambda r, p, t: r.masked_fill(~(p >= t), -math.inf).argmax().item(), "safe return None"),
        (
            lambda r, p, t: max((i for i in range(len(r)) if p[i] >= t), key=lambda i: r[i]),
            "no index, no error",
        ),
        (lambda r, p, t: torch.where(p >= t)[0][r[p >= t].argmax()].item(), "no index, no error"),
        (pick_or_none, "0 counts as false"),
        (lambda r, p, t: r[p >= t].max().item() if (p >= t).any() else None, "this is a reward"),
        (lambda *given: None if (i := pick_by_loop(*given)) is None else i + 1, "counted from 1"),
        (lambda *given: None if (i := pick_by_loop(*given)) is None else torch.tensor(i), "a tensor"),
        (lambda *given: None if (i := pick_by_loop(*given)) is None else [i], "expected .* got"),
        (lambda r, p, t: r.index(max(r)), "raised TypeError"),
    ],
    "rouge_l": [
        (lambda c, r: rouge(c, r, score=lambda p, q: q), "recall or the precision"),
        (lambda c, r: rouge(c, r, score=lambda p, q: p), "recall or the precision"),
        (lambda c, r: rouge(c, r, score=lambda p, q: (p + q) / 2), "another way"),
        (lambda c, r: rouge(c, r, score=lambda p, q: p * q), "another way"),
        (lambda c, r: rouge(c, r, score=lambda p, q: math.sqrt(p * q)), "another way"),
        (lambda c, r: rouge(c, r, score=lambda p, q: p * q / (p + q)), "another way"),
        (lambda c, r: rouge(c, r, score=max), "another way"),
        (lambda c, r: rouge(c, r, score=min), "another way"),
        (lambda c, r: rouge(c, r, score=lambda p, q: 1 / (1 / p + 1 / q - 1)), "another way"),
        (lambda c, r: lcs(tokens(c), tokens(r)), "this is L"),
        (lambda c, r: rouge(c, r, split=str.lower), "CHARACTERS"),
        (lambda c, r: rouge(c, r, split=str), "CHARACTERS"),
        (lambda c, r: rouge(c, r, split=lambda text: re.findall(r"\w+", text)), "cut in another way"),
        (lambda c, r: rouge(c, r, split=lambda text: text.lower().split()), "cut in another way"),
        (lambda c, r: rouge(c, r, split=str.split), "cut in another way"),
        (
            lambda c, r: rouge(c, r, split=lambda text: re.findall("[a-z]+", text.lower())),
            "cut in another way",
        ),
        (lambda c, r: rouge(c, r, common=overlap), "ROUGE-1"),
        (lambda c, r: rouge(c, r, common=lambda a, b: len([w for w in a if w in b])), "ROUGE-1"),
        (lambda c, r: rouge(c, r, common=longest_run), "longest RUN"),
        (
            lambda c, r: rouge(c, r, common=lambda a, b: sum(x == y for x, y in zip(a, b, strict=False))),
            "index by index",
        ),
        (lambda c, r: rouge(c, r, common=first_match), "first match"),
        (lambda c, r: rouge(c, r, common=functools.partial(lcs_table, cut=1)), "expected .* got"),
        (rouge_unguarded, "divides by 0"),
        (rouge_guarded_against_empty_only, "divides by 0"),
        (lambda c, r: torch.tensor(rouge(c, r)), "expected .* got"),
        (lambda c, r: rouge(c, r, empty=1.0), "expected .* got"),
        (lambda c, r: rouge(c, r, empty=math.nan), "expected .* got"),
        (lambda c, r: rouge(c, r, common=lambda a, b: len({*a} & {*b})), "expected .* got"),
        (
            lambda c, r: rouge(c, r, split=lambda text: tokens(text.replace("boats", "boat"))),
            "expected .* got",
        ),
        (lambda c, r: 100 * rouge(c, r), "expected .* got"),
        (lambda c, r: SequenceMatcher(None, tokens(c), tokens(r)).ratio(), "expected .* got"),
        (lambda c, r: lcs(c, r) / c, "raised TypeError"),
    ],
    "fact_scores": [
        (lambda *given: facts(*given, share=lambda r, w, n, t: r / t if t else 0.0), "slots TOLD"),
        (lambda *given: facts(*given, share=lambda r, w, n, t: r / t), "slots TOLD"),
        (lambda told, true: (facts(told, true)[0], sum(told[s] != true[s] for s in true)), "not told"),
        (
            lambda told, true: (
                facts(told, true)[0],
                len(true) - facts(told, true, share=lambda r, *_: r)[0],
            ),
            "not told",
        ),
        (
            lambda told, true: (sum(v is not None for v in told.values()) / len(true), facts(told, true)[1]),
            "told WRONGLY were counted as covered",
        ),
        (lambda *given: facts(*given, wrong=lambda r, w, n, t: w / n), "hallucinated by nothing"),
        (
            lambda *given: facts(*given, wrong=lambda r, w, n, t: w / t if t else 0.0),
            "hallucinated by nothing",
        ),
        (lambda *given: facts(*given, share=lambda r, w, n, t: r), "divide the coverage"),
        (lambda *given: facts(*given)[::-1], "swapped"),
        (lambda *given: facts(*given, share=lambda r, w, n, t: r / n if w == 0 else 0.0), "measured apart"),
        (lambda *given: facts(*given, share=lambda r, w, n, t: (r - w) / n), "measured apart"),
        (
            lambda told, true: (facts(told, true)[0], list(told.values()).count(None)),
            "count the slots told WRONGLY",
        ),
        (lambda *given: facts(*given, wrong=lambda r, w, n, t: t), "count the slots told WRONGLY"),
        (lambda *given: facts(*given, wrong=lambda r, w, n, t: w > 0), "count the slots told WRONGLY"),
        (
            lambda *given: facts(*given, wrong=lambda r, w, n, t: 1 if w else 0),
            "count the slots told WRONGLY",
        ),
        (lambda *given: facts(*given, share=lambda r, w, n, t: 1 - r / n), "expected .* got"),
        (lambda told, true: facts(told, true, same=lambda a, b: a in true.values()), "ANOTHER slot"),
        (facts_by_position, "by their order"),
        (lambda *given: facts(*given, same=lambda a, b: a in b), "part of the true one"),
        (lambda *given: facts(*given)[0], "one is missing"),
        (lambda *given: facts(*given)[1], "one is missing"),
        (lambda *given: torch.tensor(facts(*given)), "expected .* got"),
        (lambda *given: facts(*given, share=lambda r, w, n, t: 100 * r / n), "expected .* got"),
        (lambda *given: facts(*given, share=lambda r, w, n, t: r / 3), "expected .* got"),
        (lambda *given: facts(*given, same=lambda a, b: b in a), "part of the true one"),
        (
            lambda *given: dict(zip(("coverage", "hallucinated"), facts(*given), strict=True)),
            "expected .* got",
        ),
        (lambda told, true: facts(told, true, same=lambda a, b: a.lower() is b), "expected .* got"),
        (lambda told, true: (told == true) / len(told - true), "raised TypeError"),
    ],
    "length_controlled": [
        (lambda r, x, limit, cost: r - cost * (x - limit), "reward ROSE"),
        (lambda *given: lengths_by_loop(*given, excess=lambda x, limit: x - limit), "reward ROSE"),
        (lambda r, x, limit, cost: r + cost * torch.clamp(x - limit, min=0), "sign is flipped"),
        (
            lambda *given: lengths_by_loop(*given, excess=lambda x, limit: max(0, limit - x)),
            "BELOW the limit",
        ),
        (
            lambda *given: lengths_by_loop(*given, excess=lambda x, limit: min(0, x - limit)),
            "BELOW the limit",
        ),
        (lambda r, x, limit, cost: r - cost * torch.abs(x - limit), "BELOW the limit"),
        (lambda r, x, limit, cost: r - cost * x, "whole length"),
        (
            lambda *given: lengths_by_loop(*given, excess=lambda x, limit: x if x > limit else 0),
            "whole length",
        ),
        (lambda r, x, limit, cost: torch.where(x > limit, r - cost, r), "every excess cost the same"),
        (lambda r, x, limit, cost: r - torch.relu(x - limit), "at the price cost"),
        (lambda r, x, limit, cost: -cost * torch.relu(x - limit), "reward itself was lost"),
        (lambda r, x, limit, cost: r * (x <= limit), "reward itself was lost"),
        (lambda *given: lengths_by_loop(*given).relu(), "at or above 0"),
        (lambda r, x, limit, cost: r * (1 - cost * torch.relu(x - limit)), "MULTIPLIES"),
        (lambda r, x, limit, cost: r / x, "or divides it"),
        (lambda *given: lengths_by_loop(*given, excess=lambda x, limit: max(0, x - limit) ** 2), "squared"),
        (
            lambda *given: lengths_by_loop(*given, excess=lambda x, limit: max(0, x / limit - 1)),
            "divided by the limit",
        ),
        (lambda r, x, limit, cost: r - cost * max(0, x.double().mean() - limit), "a mean over the batch"),
        (lambda *given: lengths_by_loop(*given).mean(), "reward of its own"),
        (lambda *given: sum(lengths_by_loop(*given)), "reward of its own"),
        (lambda *given: lengths_by_loop(*given).tolist(), "expected .* got"),
        (lambda *given: lengths_by_loop(*given)[:, None], "expected .* got"),
        (lambda *given: lengths_by_loop(*given).long(), "expected .* got"),
        (
            lambda *given: lengths_by_loop(*given, excess=lambda x, limit: max(0, x - limit + 1)),
            "expected .* got",
        ),
        (lambda *given: lengths_by_loop(*given).numpy(), "expected .* got"),
        (lambda r, x, limit, cost: r - cost * max(0, x - limit), "raised RuntimeError"),
    ],
    "pass_at_k": [
        (lambda n, c, k: 1 - (1 - c / n) ** k, "biased"),
        (lambda n, c, k: 1 - ((n - c) / n) ** k, "biased"),
        (lambda n, c, k: c / n, "k plays no part"),
        (lambda n, c, k: math.comb(n - c, k) / math.comb(n, k), "NONE of k"),
        (lambda n, c, k: math.comb(c, k) / math.comb(n, k), "ALL of k"),
        (lambda n, c, k: 1 - math.comb(c, k) / math.comb(n, k), "ALL of k"),
        (lambda n, c, k: min(1, k * c / n), "do not add up"),
        (lambda n, c, k: k * c / n, "do not add up"),
        (lambda n, c, k: c > 0, "ANY sample"),
        (lambda n, c, k: 1.0 if c else 0.0, "ANY sample"),
        (lambda n, c, k: 1 - math.comb(n - c, k) // math.comb(n, k), "ANY sample"),
        (lambda n, c, k: float(c >= k), "k right samples"),
        (lambda n, c, k: min(1, c / k), "k right samples"),
        (lambda n, c, k: (c / n) ** k, "ALL of k"),
        (lambda n, c, k: c * math.comb(n - c, k - 1) / math.comb(n, k), "EXACTLY one"),
        (lambda n, c, k: 100 * pass_by_loop(n, c, k), "expected .* got"),
        (lambda n, c, k: 0.0 if n - c < k else pass_by_product(n, c, k), "fewer than k wrong"),
        (lambda n, c, k: None if n - c < k else pass_by_product(n, c, k), "fewer than k wrong"),
        (
            lambda n, c, k: 1 - math.factorial(n - c) / math.factorial(n - c - k) / math.perm(n, k),
            "fewer than k wrong",
        ),
        (lambda n, c, k: torch.tensor(pass_by_loop(n, c, k)), "expected .* got"),
        (lambda n, c, k: round(pass_by_loop(n, c, k), 2), "expected .* got"),
        (lambda n, c, k: 1 - math.comb(n - c, k - 1) / math.comb(n, k - 1), "expected .* got"),
        (lambda n, c, k: 1 - math.comb(n - c, k) / math.comb(n, c), "expected .* got"),
        (lambda n, c, k: 1 - math.comb(n - k, c) / math.comb(n, k), "expected .* got"),
        (lambda n, c, k: f"{pass_by_loop(n, c, k):.3f}", "expected .* got"),
        (lambda n, c, k: n.comb(k), "raised AttributeError"),
    ],
    "verifiable_reward": [
        (lambda *given: rewards_by_loop(*given, partial=lambda share: share), "earned its full share"),
        (lambda p, u: p.float().mean(1) * ~u, "earned its full share"),
        (lambda *given: rewards_by_loop(*given, partial=lambda share: 0.0), "all or nothing"),
        (lambda *given: rewards_by_loop(*given, whole=1 / 3), "whole programs got a third"),
        (lambda *given: rewards_by_loop(*given, partial=lambda share: 1 / 3), "not a fixed reward"),
        (lambda *given: rewards_by_loop(*given, partial=lambda share: share - 1 / 3), "not a fixed reward"),
        (
            lambda *given: rewards_by_loop(*given, partial=lambda share: 1 / 3 if share else 0.0),
            "not a fixed reward",
        ),
        (
            lambda *given: rewards_by_loop(*given, whole=1 / 3, partial=lambda share: share),
            "got a third as well",
        ),
        (lambda *given: rewards_by_loop(*given, enough=any), "any test was enough"),
        (lambda p, u: rewards_by_loop(p, torch.zeros_like(u)), "unsafe programs were paid"),
        (lambda p, u: rewards_by_loop(p, ~u), "SAFE programs earned 0"),
        (lambda p, u: torch.where(p.all(1), 1.0, p.float().mean(1) / 3) * u, "SAFE programs earned 0"),
        (lambda *given: rewards_by_loop(*given, harm=-1.0), "not punished below 0"),
        (lambda p, u: rewards_by_loop(p, u & False) * torch.where(u, 1 / 3, 1), "unsafe programs were paid"),
        (lambda p, u: torch.where(p.all(1), p.shape[1], p.sum(1) / 3) * ~u, "expected .* got"),
        (lambda p, u: p.float().mean(0), "one reward per program"),
        (lambda *given: rewards_by_loop(*given).mean(), "one reward per program"),
        (lambda *given: rewards_by_loop(*given).sum(), "one reward per program"),
        (lambda *given: rewards_by_loop(*given).unsqueeze(1), "one reward per program"),
        (lambda *given: rewards_by_loop(*given).tolist(), "one reward per program"),
        (lambda p, u: p.all(1) & ~u, "expected .* got"),
        (lambda *given: rewards_by_loop(*given, partial=lambda share: share / 2), "expected .* got"),
        (lambda *given: rewards_by_loop(*given, partial=lambda share: 0.3 * share), "expected .* got"),
        (lambda *given: rewards_by_loop(*given, partial=lambda share: share**3), "expected .* got"),
        (lambda *given: rewards_by_loop(*given).numpy(), "expected .* got"),
        (lambda p, u: p.mean(1), "raised RuntimeError"),
    ],
    "unsafe_calls": [
        (calls_by_text, "TEXT was searched"),
        (text_after_parsing, "TEXT was searched"),
        (names_anywhere, "not called"),
        (
            lambda code: calls(code, name=lambda f: n if is_unsafe(n := name_of(f)) else n.split(".")[-1]),
            "methods",
        ),
        (lambda code: calls(code, walk=lambda tree: outermost(tree)), "outermost"),
        (lambda code: calls(code, order=list), "not sorted"),
        (lambda code: calls(code, order=lambda rows: sorted(rows, key=lambda row: row[1])), "not sorted"),
        (lambda code: calls(code, line=lambda node: node.lineno - 1), "count from 1"),
        (lambda code: [(name, line) for line, name in calls(code)], "in this order"),
        (lambda code: [name for _, name in calls(code)], "each entry is"),
        (lambda code: [line for line, _ in calls(code)], "each entry is"),
        (lambda code: calls(code, unsafe=lambda name: name in UNSAFE), "names were forgotten"),
        (lambda code: calls(code, unsafe=lambda name: name.split(".")[0] in MODULES), "names were forgotten"),
        (lambda code: calls(code, unsafe=lambda n: is_unsafe(n) and n != "compile"), "names were forgotten"),
        (
            lambda code: calls(code, unsafe=lambda n: is_unsafe(n) and n != "__import__"),
            "names were forgotten",
        ),
        (
            lambda code: calls(code, unsafe=lambda n: is_unsafe(n) and "socket" not in n),
            "names were forgotten",
        ),
        (
            lambda code: calls(
                code, name=ast.unparse, unsafe=lambda n: is_unsafe(n) and re.fullmatch(r"[\w.]+", n)
            ),
            "TWO calls",
        ),
        (lambda code: calls(code, name=unparsed), "done with a result"),
        (lambda code: [(line, name.split(".")[-1]) for line, name in calls(code)], "whole path"),
        (lambda code: [(line, name.split(".")[0]) for line, name in calls(code)], "whole path"),
        (lambda code: calls(code, order=lambda rows: sorted(set(rows))), "expected .* got"),
        (
            lambda code: sorted(
                (n.lineno, name_of(n.func))
                for n in ast.walk(ast.parse(code))
                if isinstance(n, ast.Call) and is_unsafe(name_of(n.func))
            ),
            "catch SyntaxError",
        ),
        (lambda code: calls(code, error=lambda e: []), "pass as harmless"),
        (lambda code: calls(code, error=lambda e: None), "expected .* got"),
        (lambda code: calls(code, error=lambda e: [(1, "SyntaxError")]), "line of the error"),
        (lambda code: calls(code, error=lambda e: [(0, "SyntaxError")]), "line of the error"),
        (lambda code: calls(code, error=lambda e: [(e.lineno, e.msg)]), "and this word"),
        (lambda code: calls(code, error=lambda e: (e.lineno, "SyntaxError")), "expected .* got"),
        (lambda code: calls(code, line=lambda node: node.end_lineno), "expected .* got"),
        (lambda code: calls(code, line=lambda node: node.col_offset), "expected .* got"),
        (lambda code: dict(calls(code)), "expected .* got"),
        (lambda code: len(calls(code)), "expected .* got"),
        (lambda code: calls(code)[:1], "expected .* got"),
        (lambda code: calls(code, name=lambda func: func.id), "raised AttributeError"),
    ],
}


def refusing(fn):
    """An answer that raises, as it should, where the last message alone does not fit."""

    def mine(lengths, limit):
        if lengths[-1] > limit:
            raise ValueError("the last message is too long")
        return fn(lengths, limit)

    return mine


WRONG["kept_turns"] = [
    *((refusing(fn), word) for fn, word in WRONG["kept_turns"]),
    (lambda x, limit: turns(x, limit, raises=False), "must raise ValueError"),
    (lambda x, limit: turns(x, limit) if x[-1] <= limit else 0, "must raise ValueError"),
    (lambda x, limit: turns(x, limit) if x[-1] <= limit else None, "must raise ValueError"),
]
RIGHT["kept_turns"] = [refusing(fn) for fn in RIGHT["kept_turns"]]


@pytest.mark.parametrize("name, fn", [(n, f) for n, fns in RIGHT.items() for f in fns])
def test_right_answers_are_accepted(name, fn):
    verdict = judge(EXERCISES[name], fn)
    assert verdict.state == "solved", verdict.message


@pytest.mark.parametrize("name, fn, word", [(n, f, w) for n, rows in WRONG.items() for f, w in rows])
def test_wrong_answers_are_refused_by_name(name, fn, word):
    verdict = judge(EXERCISES[name], fn)
    assert verdict.state == "wrong"
    assert "\n" not in verdict.message
    assert re.search(word, verdict.message), verdict.message


def test_every_exercise_is_mutation_tested():
    assert set(RIGHT) == set(WRONG) == set(MINE)
    for name in MINE:
        assert len(RIGHT[name]) >= 3
        assert len(WRONG[name]) >= 15
        assert len([word for _, word in WRONG[name] if not word.startswith(("expected", "raised"))]) >= 10

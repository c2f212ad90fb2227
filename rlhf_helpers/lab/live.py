"""A picture of a run while it trains: reward or loss, gold, KL, and what the model makes of an example.

The setup cell of a lesson calls `watch_training()`; from then on each run of more than 5 s draws itself below
its bar, at most four times per second, and leaves its last picture behind. Under it stands what a policy
sampled last, how a model that learns from given answers now answers the first prompt, or how a reward model
scores the first answers. Where a policy answers prompts of the world, the mean gold reward of its samples is
drawn beside the reward that it learns from. The view changes nothing: weights and metrics are the same with
it and without.

It draws SVG by hand, because one picture by matplotlib takes as long as a step of the tiny assistant.
"""

import base64
import html
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from IPython.display import display

from rlhf_helpers.core.generation import generate
from rlhf_helpers.core.models import tokenizer_for
from rlhf_helpers.core.training import progress
from rlhf_helpers.lab.plots import AFTER, METHOD_COLORS, OTHER_COLOR
from rlhf_helpers.world.gold_judge import gold_reward

QUIET_S = 5.0  # a shorter run shows its bar only
REDRAW_S = 0.25
JUDGED_SHARE = 0.02  # of the time of a run, at most, goes into answering an example or scoring samples
EXAMPLE_TOKENS = 48
# What is drawn if the rows have it, at most MAX_PANELS in this order: metric -> its name, with the unit.
METRICS = {
    "objective/scores": "reward (score)",
    "gold": "gold (score)",
    "objective/kl": "KL (nats)",  # per response
    "loss": "loss (nats)",
    "rewards/accuracies": "accuracy (share)",
    "rewards/margins": "chosen minus rejected (nats)",
    "token_accuracy": "accuracy (share of tokens)",
    "eval_loss": "loss on held-out rows (nats)",
}
COLORS = {"objective/scores": AFTER, "gold": METHOD_COLORS["gold"]}
MAX_PANELS = 3
WIDTH, HEIGHT, PLOT_HEIGHT = 700, 150, 84  # pixels
MAX_POINTS = 200  # of a line; a picture of a long run stays small
SAMPLE_LETTERS = 240


def watch_training() -> None:
    """Let every run of this notebook draw itself; do nothing in a terminal, where the bar stays.

    Nothing is drawn where TQDM_DISABLE is set, as in lessons that are executed for storing: whether a run
    takes 5 s depends on the machine, and a stored page must not.
    """
    if progress.IN_NOTEBOOK:
        progress.view_class = LiveView


class LiveView(progress.BarView):
    """The bar, and below it after 5 s one picture that is redrawn through one display handle."""

    clock = staticmethod(time.monotonic)

    def __init__(self, run: Any, *, hidden: bool) -> None:
        """Start the clock; see `BarView`."""
        super().__init__(run, hidden=hidden)
        self.begin = self.drawn = self.clock()
        self.judged: tuple[int, tuple[str, str] | None] = 0, None  # step, and the example then
        self.gold: list[tuple[int, float]] = []  # step, and the mean gold reward of its samples
        self.next_judged = self.begin
        self.handle: Any = None
        progress.latest_samples = None  # of an earlier run

    def advance(self) -> None:
        """Move the bar; redraw the picture if the last one is old enough."""
        super().advance()
        now = self.clock()
        if self.hidden or now - self.begin < QUIET_S or now - self.drawn < REDRAW_S:
            return
        self.drawn = now
        if now >= self.next_judged:
            begin = time.perf_counter()
            self._judge()
            self.next_judged = now + (time.perf_counter() - begin) / JUDGED_SHARE
        self._draw(still=False)

    def close(self) -> None:
        """Take the bar away and leave one picture, if there was any; a second call does nothing."""
        super().close()
        if self.handle is not None:
            self._draw(still=True)
            self.handle = None

    def _judge(self) -> None:
        """Ask the model about its example; of a policy without one, score the newest samples by gold."""
        if self.run.example is not None:
            self.judged = self.run.step, judged_example(self.run)
            return
        row = self.run.history[-1] if self.run.history else {}
        if progress.latest_samples and "objective/scores" in row:
            with suppress(ValueError):  # prompts that are not the world's
                self.gold.append((self.run.step, gold_reward(*progress.latest_samples).mean().item()))

    def _draw(self, *, still: bool) -> None:
        drawing, alt = run_picture(self.run, self.gold)
        if not alt:
            return
        page = drawing
        if still:  # an image with alt text, as `plots.show` leaves one: the page's export keeps both
            data = base64.b64encode(drawing.encode()).decode("ascii")
            page = f'<img alt="{html.escape(alt)}" src="data:image/svg+xml;base64,{data}" width="{WIDTH}">'
        judged = self.judged
        if self.run.example is None and progress.latest_samples:
            prompts, responses = progress.latest_samples
            judged = self.run.step, (prompts[0], responses[0])
        output = {"text/html": page + _sample_html(*judged), "text/plain": alt}
        if self.handle is None:
            self.handle = display(output, raw=True, display_id=True)
        else:
            self.handle.update(output, raw=True)


def judged_example(run: Any) -> tuple[str, str] | None:
    """Return (prompt, likeliest answer) or (prompt, rewards of its answers), of a run's `example`.

    None where the model cannot answer: the prompt fills its context, or it remembers no tokenizer.
    """
    prompt, answers = run.example
    if answers:
        rewards = run.model.score([prompt] * len(answers), answers).tolist()
        lines = [f"{reward:+.2f}  {answer}" for reward, answer in zip(rewards, answers, strict=True)]
        return prompt, "\n".join(lines)
    try:
        tokenizer = tokenizer_for(run.model)
        rollout = generate(run.model, tokenizer, [prompt], max_new_tokens=EXAMPLE_TOKENS, greedy=True)
    except ValueError:
        return None
    return prompt, rollout.responses[0]


def run_picture(run: Any, gold: Sequence[tuple[int, float]] = ()) -> tuple[str, str]:
    """Draw the metrics of a run so far: (SVG, alt text), both empty before two rows are logged.

    Args:
        run: an Engine, of which step, total_steps, settings and history are read.
        gold: (step, mean gold reward) where the loop logs none.
    """
    lines = {}
    for metric in METRICS:
        points = [(row["step"] + 1, row[metric]) for row in run.history if _is_drawn(row.get(metric))]
        points = points or [*(gold if metric == "gold" else ())]
        if len(points) > 1:
            lines[metric] = points
    if "objective/scores" in lines:
        lines.pop("loss", None)  # of a policy: it says nothing about how good the answers are
    shown = list(lines.items())[:MAX_PANELS]
    if not shown:
        return "", ""
    title = f"Step {run.step} of {run.total_steps}"
    facts = [f"{METRICS[metric]} {line[0][1]:.3g} to {line[-1][1]:.3g}" for metric, line in shown]
    alt = f"Small line charts of a training run. {title}: {'; '.join(facts)}."
    panels = []
    for index, (metric, line) in enumerate(shown):
        target, note = _kl_aim(run) if metric == "objective/kl" else (None, "")
        panel = _panel(line, f"{METRICS[metric]}{note}", COLORS.get(metric, OTHER_COLOR), target, run)
        panels.append(f'<g transform="translate({index * WIDTH // MAX_PANELS} 0)">{panel}</g>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{html.escape(alt)}" font-family="DejaVu Sans, sans-serif" font-size="11" '
        f'style="max-width: 100%; height: auto"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="8" y="16" font-weight="bold" font-size="13">{title}</text>{"".join(panels)}</svg>'
    ), alt


def _is_drawn(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _kl_aim(run: Any) -> tuple[float | None, str]:
    """Return the run's target for the KL, or None, and what to write behind the name of the panel."""
    for name in ("kl_target", "target_kl"):
        if target := getattr(run.settings, name, None):
            return target, f", target {target:g}"
    coefficient = run.history[-1].get("objective/kl_coef", getattr(run.settings, "kl_coef", None))
    return None, "" if coefficient is None else f", coefficient {coefficient:.2g}"


def _panel(line: list[tuple[int, float]], name: str, color: str, target: float | None, run: Any) -> str:
    """Draw one metric over all the steps of the run, so that the line grows from the left to the right."""
    thinned = line[:: math.ceil(len(line) / MAX_POINTS)] + line[-1:]
    heights = [value for _, value in line] + ([] if target is None else [target])
    low, high = min(heights), max(heights)
    left, width, bottom = 8, WIDTH // MAX_PANELS - 60, HEIGHT - 20

    def height(value: float) -> float:
        return bottom - PLOT_HEIGHT * (value - low) / ((high - low) or 1)

    places = [(left + width * step / run.total_steps, height(value)) for step, value in thinned]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [f'<text x="{left}" y="36">{name}</text>']
    for value in {low, high}:
        y = height(value)
        parts.append(f'<path d="M{left} {y:.1f}h{width}" stroke="#cccccc"/>')
        if abs(y - places[-1][1]) > 12:  # else the newest value stands there
            parts.append(f'<text x="{left + width + 6}" y="{y + 4:.1f}" fill="#555555">{value:.3g}</text>')
    if target is not None:
        parts.append(f'<path d="M{left} {height(target):.1f}h{width}" stroke="black" stroke-dasharray="4"/>')
    parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
    x, y = places[-1]
    parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>')
    newest = f'x="{left + width + 6}" y="{y + 4:.1f}" font-weight="bold"'
    parts.append(f"<text {newest}>{line[-1][1]:.3g}</text>")
    return "".join(parts)


def _sample_html(step: int, sample: tuple[str, str] | None) -> str:
    """Write what the model answered, or its rewards; empty where the run shows neither."""
    if sample is None:
        return ""
    prompt, response = (
        html.escape(text if len(text) <= SAMPLE_LETTERS else f"{text[:SAMPLE_LETTERS]} ...")
        for text in sample
    )
    return (
        f'<div style="max-width: {WIDTH}px; white-space: pre-wrap"><b>Sample at step {step}</b>\n'
        f"{prompt}\n<b>&rarr;</b> {response}</div>"
    )

"""Draw .github/result.png, the picture at the top of the README, from a stored study.

python .github/result_picture.py
"""

import io
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from PIL import Image

from rlhf_helpers.lab.plots import PALETTE, STYLE, set_title
from rlhf_helpers.lab.studies import load_study

OUT = Path(__file__).with_name("result.png")


def result_picture() -> Figure:
    """Plot the learned and the true reward against the distance from the start, one thin line per seed."""
    table = load_study("rl_overoptimisation")
    runs = table[table.cure == "none"]
    means = runs.groupby("step")[["kl", "proxy", "gold"]].mean()
    peak = means.gold.idxmax()
    panels = {"proxy": "learned reward\n(std of the start's answers)", "gold": "true reward\n(0 to 1)"}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.0, 3.4), layout="constrained")
        nats = f"{means.kl[peak]:.1f} nats"
        set_title(figure, f"The learned reward rises; past {nats} the true one falls")
        for axis, color, (name, label) in zip(
            figure.subplots(1, 2), (PALETTE[1], PALETTE[0]), panels.items(), strict=True
        ):
            for _, run in runs.groupby("seed"):
                axis.plot(run.kl, run[name], color=color, linewidth=0.8, alpha=0.5)
            axis.plot(means.kl, means[name], color=color, linewidth=2.5)
            axis.axvline(means.kl[peak], color="gray", linestyle=":", linewidth=1)
            axis.set_xscale("symlog", linthresh=1)
            axis.set_xlim(0)
            axis.set_xticks([0, 1, 10, 100], ["0", "1", "10", "100"])
            axis.set(xlabel="KL (nats per response)", ylabel=label)
        axis.set_ylim(0)
        axis.annotate(
            f"peak at {nats}",
            (means.kl[peak], 0.03),
            xytext=(6, 0),
            textcoords="offset points",
            color="dimgray",
        )
    return figure


if __name__ == "__main__":
    buffer = io.BytesIO()
    result_picture().savefig(buffer, dpi=150)
    # 64 colors are enough, and halve the size.
    Image.open(buffer).convert("RGB").quantize(64).save(OUT, optimize=True)
    print(f"{OUT.name}: {OUT.stat().st_size // 1000} kB")

"""
Draws runs: loss against tokens and against time, learning rate, gradient norm, HellaSwag. Needs
`pip install matplotlib`.

    python report/plot.py log124M                                   # one run, to log124M.svg
    python report/plot.py log124M llm.c/log124M --out both.svg      # several; llm.c's own logs too
    python report/plot.py                                           # the figures of the report

A run is a folder with a main.log. Its lines are like "s:250 tel:4.1234" (validation loss), "trl:"
(training loss, with lr:, norm: and ms: where there are such) and "eval:" (HellaSwag). How many
tokens a step has is read from the heading that ablation.py writes, else from the run's last.pt,
else it is 524,288. Time is that of the training steps alone.
"""

import argparse
import math
import re
import sys
from pathlib import Path

import torch

REPORT = Path(__file__).resolve().parent
sys.path.insert(0, str(REPORT.parent))
import train_gpt2  # noqa: E402

# Published scores: GPT-2's in completion style (https://github.com/karpathy/llm.c/discussions/481),
# GPT-3's from its paper.
HELLASWAG = {"GPT-2 124M": 0.294, "GPT-3 124M": 0.337, "GPT-2 350M": 0.375, "GPT-3 350M": 0.436}
# hashsalt: names inside the file that are not random, so that the same logs make the same file
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "train_gpt2", "font.size": 9}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False}
STYLE |= {"axes.grid": True, "grid.alpha": 0.3, "figure.constrained_layout.use": True}

def tokens_per_step(heading):
    """Tokens in a step of a run, out of the command that made it. (Some are of older flags.)"""
    given = re.search(r"--total_batch_size[ =](\d+)", heading)
    if given:
        return int(given[1])
    model = re.search(r"--model[ =](\w+)", heading)
    preset = train_gpt2.PRESETS[model[1] if model else "tiny"]
    return preset.get("total_batch_size", 524288)

class Run:
    """A main.log. series[kind] is (steps, values); kind is tel, trl, lr, norm, ms or eval."""

    def __init__(self, folder, name=None):
        self.name = name or Path(folder).name
        path = Path(folder, "main.log")
        if not path.exists():
            sys.exit(f"error: {path}: no such file; give folders that runs were written to, see "
                     f"--output_dir of train_gpt2.py")
        text = path.read_text("utf-8")
        points = {}
        for step, fields in re.findall(r"^s:(\d+) (.*)$", text, re.MULTILINE):
            for kind, value in re.findall(r"(\w+):(\S+)", fields):
                # a resumed run makes some steps again, and the last line of a step counts
                points.setdefault(kind, {})[int(step)] = float(value)
        self.series = {}
        for kind, values in points.items():
            steps = sorted(values)
            self.series[kind] = (steps, [values[step] for step in steps])

        heading = re.search(r"^# python .*\.py .*$", text, re.MULTILINE)
        checkpoint = Path(folder, "last.pt")
        self.tokens = 524288
        if heading:
            self.tokens = tokens_per_step(heading[0])
        elif checkpoint.exists():
            state = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)
            self.tokens = state["args"]["total_batch_size"]

    def seconds(self, steps):
        """Training time up to each of steps.

        It is added up from the ms of the lines of training losses. Each is the mean over the steps
        since the line before; in between, time goes evenly.
        """
        ends = [0]  # steps that are done when a line is written
        sums = [0.0]  # and the seconds they took
        for step, ms in zip(*self.series["ms"], strict=True):
            sums.append(sums[-1] + ms / 1000 * (step + 1 - ends[-1]))
            ends.append(step + 1)
        result = []
        for step in steps:
            # the line at or after the step; the last line for whatever comes after it
            i = 1
            while i < len(ends) - 1 and ends[i] < step:
                i += 1
            share = min(1.0, (step - ends[i - 1]) / (ends[i] - ends[i - 1]))
            result.append(sums[i - 1] + share * (sums[i] - sums[i - 1]))
        return result

def draw(ax, runs, kind, against="tokens", **style):
    """One line for each run that has such values."""
    for i, run in enumerate(runs):
        if kind not in run.series or (against == "seconds" and "ms" not in run.series):
            continue
        steps, values = run.series[kind]
        if against == "tokens":
            x = [step * run.tokens / 1e6 for step in steps]
        else:
            x = run.seconds(steps)
        ax.plot(x, values, color=f"C{i}", **style)
    ax.set_xlabel("million tokens" if against == "tokens" else "seconds of training")

def losses(ax, runs, against):
    """Validation losses as lines; training losses in pale behind them."""
    draw(ax, runs, "trl", against, alpha=0.2, linewidth=0.8)
    draw(ax, runs, "tel", against, marker=".", markersize=4)
    # from where guessing has ended: the first losses would press all others together
    values = []
    for run in runs:
        for step, value in zip(*run.series.get("tel", ([], [])), strict=True):
            if step > 0:
                values.append(value)
    if values:
        values.sort()
        ax.set_ylim(values[0] - 0.1, values[int(0.98 * len(values))] + 0.1)
    ax.set_ylabel("loss, nats a token")

def losses_by_tokens(ax, runs):
    losses(ax, runs, "tokens")

def losses_by_time(ax, runs):
    losses(ax, runs, "seconds")

def rates(ax, runs):
    draw(ax, runs, "lr")
    ax.set_ylabel("learning rate")

def norms(ax, runs):
    draw(ax, runs, "norm")
    ax.set_ylabel("gradient norm")
    ax.set_yscale("log")

def scores(ax, runs):
    draw(ax, runs, "eval", marker=".")
    for name, value in HELLASWAG.items():
        ax.axhline(value, color="gray", linewidth=0.8, linestyle=":")
        ax.text(0, value, name, fontsize=7, color="gray", va="bottom")
    ax.set_ylabel("HellaSwag, acc_norm")

# what a panel needs in a log, and what draws it
PANELS = {"tel": losses_by_tokens, "ms": losses_by_time, "lr": rates, "norm": norms, "eval": scores}

def overview(runs, out, kinds=tuple(PANELS)):
    """A figure of those panels that at least one run has the numbers for, in two columns."""
    try:
        import matplotlib

        matplotlib.use("svg")
        import matplotlib.pyplot as plt
    except ImportError:
        sys.exit("error: plot.py draws with matplotlib: pip install matplotlib")
    plt.rcParams.update(STYLE)
    kinds = [kind for kind in kinds if any(kind in run.series for run in runs)]
    if not kinds:
        sys.exit("error: these logs have no line like s:250 tel:4.1234: there is nothing to draw")
    columns = min(2, len(kinds))
    rows = math.ceil(len(kinds) / columns)
    size = (4.4 * columns, 3 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for ax in axes.flat[len(kinds):]:
        ax.remove()
    for kind, ax in zip(kinds, axes.flat, strict=False):
        PANELS[kind](ax, runs)
    colors = [plt.Line2D([], [], color=f"C{i}") for i in range(len(runs))]
    axes.flat[0].legend(colors, [run.name for run in runs])
    # without a date, again so that the same logs make the same file
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)
    print(f"wrote {out}")

# The figures of report/README.md: the group of logs, {run: its name in the figure}, the panels.
# ("homework" was the first version's word for the original recipe.)
THREE = {"gpt2": "GPT-2, AdamW", "homework": "variant, AdamW", "today": "variant, today's recipe"}
RECIPES = {"homework": "original recipe", "today": "today's recipe"}
ROPE = {"today": "turned by time", "learned": "learned", "rope_by_head": "turned by head"}
FIGURES = {
    "loss_tiny.svg": ("tiny", THREE, ("tel", "ms")),
    # small's runs were made two at a time, so their ms say little
    "loss_small.svg": ("small", THREE, ("tel",)),
    "recipes.svg": ("tiny", RECIPES, ("lr", "norm")),
    "rope.svg": ("tiny", ROPE, ("tel",)),
}

def main(argv):
    show_as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=show_as_written)
    parser.add_argument("log_dir", nargs="*", help="none: make the report's figures")
    parser.add_argument("--out", help="default: the first folder's name, with .svg")
    args = parser.parse_args(argv)
    if args.log_dir:
        runs = [Run(folder) for folder in args.log_dir]
        overview(runs, args.out or f"{Path(args.log_dir[0]).name}.svg")
        return
    for file, (group, names, kinds) in FIGURES.items():
        runs = [Run(REPORT / "logs" / group / f"{run}.1", name) for run, name in names.items()]
        overview(runs, REPORT / file, kinds)

if __name__ == "__main__":
    main(sys.argv[1:])

"""
Draws runs: loss against tokens, against time and against operations, learning rate, gradient norm,
HellaSwag. Needs `pip install matplotlib`.

    python report/plot.py log124M                       # one run, to log124M.svg
    python report/plot.py log124M log_gpt2              # two of them, to log124M_log_gpt2.svg
    python report/plot.py log124M llm.c/log124M --out both.svg      # llm.c's own logs, too
    python report/plot.py                               # the figures of the report

A run is a folder with a main.log. Its lines are like "s:250 tel:4.1234" (validation loss), "trl:"
(training loss, with lr:, norm: and ms: where there are such) and "eval:" (HellaSwag). How many
tokens a step has, and how many operations a token takes, is read from the heading that ablation.py
writes, else from the run's last.pt. Without either, the tokens are those of the command in the log,
or 524,288. Time is that of the training steps alone. Operations are those of flops_per_token():
without the optimizer's.
"""

import argparse
import functools
import math
import re
import sys
from pathlib import Path

import numpy as np
import torch

REPORT = Path(__file__).resolve().parent
sys.path.insert(0, str(REPORT.parent))
import train_gpt2  # noqa: E402

# Published scores: GPT-2's in completion style (https://github.com/karpathy/llm.c/discussions/481),
# GPT-3's from its paper.
HELLASWAG = {"GPT-2 124M": 0.294, "GPT-3 124M": 0.337, "GPT-2 350M": 0.375, "GPT-3 350M": 0.436}
# hashsalt: fixed names inside the file, so that the same logs make the same file
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "train_gpt2", "font.size": 9}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False}
STYLE |= {"axes.grid": True, "grid.alpha": 0.3, "figure.constrained_layout.use": True}

DEFAULT_TOKENS = 524288  # in a step: train_gpt2.py's default, and llm.c's for GPT-2 124M

def tokens_per_step(command):
    """Tokens in a step. Old commands have flags that are gone, so it is searched, not parsed."""
    given = re.search(r"--total_batch_size[ =](\d+)", command)
    if given:
        return int(given[1])
    if "--init_from" in command:
        return train_gpt2.FINETUNE["total_batch_size"]
    model = re.search(r"--model[ =](\w+)", command)
    # without --model train_gpt2.py trains tiny
    preset = train_gpt2.PRESETS[model[1] if model else "tiny"]
    return preset.get("total_batch_size", DEFAULT_TOKENS)

class Run:
    """A main.log. series[kind] is (steps, values); kind is tel, trl, lr, norm, ms or eval."""

    def __init__(self, folder, name=None):
        # the path as it was given: llm.c/log124M is another run than log124M
        self.name = name or str(Path(folder))
        path = Path(folder, "main.log")
        if not path.exists():
            sys.exit(f"error: {path}: no such file; give folders that runs were written to, see "
                     f"--output_dir of train_gpt2.py")
        text = path.read_text("utf-8")
        points = {}
        # not the lines with the command of the run (in old logs its flags), which are no numbers
        for step, fields in re.findall(r"^s:(\d+) (?!command:|flags:)(.*)$", text, re.MULTILINE):
            for kind, value in re.findall(r"(\w+):(\S+)", fields):
                # a resumed run makes some steps again, and the last line of a step counts
                points.setdefault(kind, {})[int(step)] = float(value)
        self.series = {}
        for kind, values in points.items():
            steps = sorted(values)
            self.series[kind] = (steps, [values[step] for step in steps])

        # a resumed run has several commands, and the first one is whole
        command = re.search(r"^(?:# |s:\d+ command:)(python .*)$", text, re.MULTILINE)
        self.tokens = tokens_per_step(command[1]) if command else DEFAULT_TOKENS  # in a step
        self.flops = None  # operations to train on one token
        counted = re.search(r"^# .*, ([\d.,]+) MFLOP a token$", text, re.MULTILINE)
        checkpoint = Path(folder, "last.pt")
        if counted:
            self.flops = float(counted[1].replace(",", "")) * 1e6
        elif checkpoint.exists():
            state = train_gpt2.read_checkpoint(checkpoint)
            self.tokens = state["args"]["total_batch_size"]
            # a model without weights, only to count
            with torch.device("meta"):
                model = train_gpt2.GPT(train_gpt2.GPTConfig(**state["config"]))
            self.flops = train_gpt2.flops_per_token(model)

    def seconds(self, steps):
        """Training time up to each of steps.

        It is added up from the ms of the lines of training losses. Each is the mean over the steps
        since the line before; in between, time goes evenly.
        """
        # "s:250 trl:" is written when 251 steps are done, numbers 0 to 250
        steps_done = [0]
        seconds_then = [0.0]
        for step, ms in zip(*self.series["ms"], strict=True):
            seconds_then.append(seconds_then[-1] + ms / 1000 * (step + 1 - steps_done[-1]))
            steps_done.append(step + 1)
        # on a straight line between two lines of the log, and no more than the last one's seconds
        return np.interp(steps, steps_done, seconds_then).tolist()

    def x_values(self, steps, against):
        """Where steps lie on an axis of million tokens, seconds or operations. None: not known."""
        if against == "tokens":
            return [step * self.tokens / 1e6 for step in steps]
        if against == "seconds" and "ms" in self.series:
            return self.seconds(steps)
        if against == "flops" and self.flops is not None:
            return [step * self.tokens * self.flops / 1e15 for step in steps]
        return None

LABELS = {
    "tokens": "million tokens",
    "seconds": "seconds of training",
    "flops": "10$^{15}$ operations",
}

def draw(ax, runs, kind, against="tokens", **style):
    """One line for each run that has such values."""
    for i, run in enumerate(runs):
        if kind in run.series:
            steps, values = run.series[kind]
            x = run.x_values(steps, against)
            if x is not None:
                ax.plot(x, values, color=f"C{i}", **style)
    ax.set_xlabel(LABELS[against])

def losses(ax, runs, against):
    """Validation losses as lines; training losses in pale behind them."""
    draw(ax, runs, "trl", against, alpha=0.2, linewidth=0.8)
    draw(ax, runs, "tel", against, marker=".", markersize=4)
    # All that comes after the first twentieth of a run is to be seen. The first losses, near what
    # guessing costs, would press everything else together.
    values = []
    for run in runs:
        for kind in {"tel", "trl"} & set(run.series):
            steps, losses_of_run = run.series[kind]
            # a run that has no such x is not drawn, and must not stretch the axis
            if run.x_values(steps, against) is None:
                continue
            for step, loss in zip(steps, losses_of_run, strict=True):
                # a run that broke may have left a nan or inf
                if step >= steps[-1] / 20 and math.isfinite(loss):
                    values.append(loss)
    if values:
        room = 0.03 * (max(values) - min(values)) + 0.01
        ax.set_ylim(min(values) - room, max(values) + room)
    ax.set_ylabel("loss, nats a token")

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

# What draws a panel, and whether a run has the numbers for it.
PANELS = {
    "tokens": (functools.partial(losses, against="tokens"), lambda run: "tel" in run.series),
    "seconds": (functools.partial(losses, against="seconds"), lambda run: "ms" in run.series),
    "flops": (functools.partial(losses, against="flops"), lambda run: run.flops is not None),
    "lr": (rates, lambda run: "lr" in run.series),
    "norm": (norms, lambda run: "norm" in run.series),
    "eval": (scores, lambda run: "eval" in run.series),
}

def overview(runs, out, kinds=tuple(PANELS)):
    """A figure of those panels that at least one run has the numbers for, in two columns."""
    try:
        import matplotlib

        matplotlib.use("svg")
        import matplotlib.pyplot as plt
    except ImportError:
        sys.exit("error: plot.py draws with matplotlib: pip install matplotlib")
    plt.rcParams.update(STYLE)
    kinds = [kind for kind in kinds if any(PANELS[kind][1](run) for run in runs)]
    if not kinds:
        sys.exit("error: these logs have no line like s:250 tel:4.1234: there is nothing to draw")
    columns = min(2, len(kinds))
    rows = math.ceil(len(kinds) / columns)
    size = (4.4 * columns, 3 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for ax in axes.flat[len(kinds):]:
        ax.remove()
    for kind, ax in zip(kinds, axes.flat, strict=False):
        PANELS[kind][0](ax, runs)
    colors = [plt.Line2D([], [], color=f"C{i}") for i in range(len(runs))]
    axes.flat[0].legend(colors, [run.name for run in runs])
    # no date: the same logs make the same file
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)
    print(f"wrote {out}")

# The figures of report/README.md: the group of logs, {run: its name in the figure}, the panels.
# ("homework" was the first version's word for the course work's recipe.)
THREE = {"gpt2": "GPT-2, AdamW", "homework": "variant, AdamW", "today": "variant, today's recipe"}
TWO_RECIPES = {"homework": "course work's recipe", "today": "today's recipe"}
ROPE = {"today": "turned by time", "learned": "learned", "rope_by_head": "turned by head"}
FIGURES = {
    "loss_tiny.svg": ("tiny", THREE, ("tokens", "seconds")),
    # two of its runs were made at a time, so their ms say little: operations instead
    "loss_medium.svg": ("medium", THREE, ("tokens", "flops")),
    "recipes.svg": ("tiny", TWO_RECIPES, ("lr", "norm")),
    "rope.svg": ("tiny", ROPE, ("tokens",)),
}

def main(argv):
    show_as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=show_as_written)
    parser.add_argument("log_dir", nargs="*", help="none: make the report's figures")
    parser.add_argument("--out", help="default: the folders' names, with .svg")
    args = parser.parse_args(argv)
    if args.log_dir:
        runs = [Run(folder) for folder in args.log_dir]
        together = "_".join(run.name.strip("./").replace("/", "_") for run in runs)
        overview(runs, args.out or f"{together or 'run'}.svg")
        return
    for file, (group, names, kinds) in FIGURES.items():
        runs = [Run(REPORT / "logs" / group / f"{run}.1", name) for run, name in names.items()]
        overview(runs, REPORT / file, kinds)

if __name__ == "__main__":
    main(sys.argv[1:])

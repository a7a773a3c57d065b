"""
Plots runs: loss against tokens and against time, learning rate, and gradient norm. Needs
`pip install matplotlib`.

    python report/plot.py log124M                       # one run, to log124M.svg
    python report/plot.py log124M log_gpt2              # two runs, to log124M_log_gpt2.svg
    python report/plot.py log124M llm.c/log124M --out both.svg      # llm.c's logs work as well
    python report/plot.py                               # the report's figures

A run is a folder with a main.log, whose lines are like "s:250 tel:4.1234" (validation loss) or
"s:250 trl:4.2345 lr:1e-3 norm:0.5 ms:700" (training loss and so on). The number of tokens per step
follows from the command in the log; a log without a command, such as llm.c's, has 524,288. Time is
the sum of the training steps' times.
"""

import argparse
import math
import re
import sys
from pathlib import Path

import numpy as np

REPORT = Path(__file__).resolve().parent
sys.path.insert(0, str(REPORT.parent))
from train_gpt2 import DEFAULTS, PRESETS  # noqa: E402

# hashsalt: constant ids in the file, so that the same logs make the same file
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "train_gpt2", "font.size": 9}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False}
STYLE |= {"axes.grid": True, "grid.alpha": 0.3, "figure.constrained_layout.use": True}

def tokens_per_step(log):
    """Tokens per step, from the first command in a log."""
    default = DEFAULTS["total_batch_size"]
    command = re.search(r"^(?:# |s:\d+ command:)(python .*)$", log, re.MULTILINE)
    if not command:
        return default
    # searched rather than parsed, because old logs contain flags that are gone
    given = re.search(r"--total_batch_size[ =](\d+)", command[1])
    if given:
        return int(given[1])
    model = re.search(r"--model[ =](\w+)", command[1])
    return PRESETS[model[1] if model else "tiny"].get("total_batch_size", default)

class Run:
    """A main.log. series[kind] is (steps, values); kind is tel, trl, lr, norm or ms."""

    def __init__(self, folder, name=None):
        # the whole path, because llm.c/log124M is not log124M
        self.name = name or str(Path(folder))
        log = Path(folder, "main.log").read_text("utf-8")
        self.tokens = tokens_per_step(log)
        points = {}
        # every line but those with a command (in old logs, flags)
        for step, fields in re.findall(r"^s:(\d+) (?!command:|flags:)(.*)$", log, re.MULTILINE):
            for kind, value in re.findall(r"(\w+):(\S+)", fields):
                # a resumed run repeats steps, and the last line of a step counts
                points.setdefault(kind, {})[int(step)] = float(value)
        self.series = {}
        for kind, values in points.items():
            steps = sorted(values)
            self.series[kind] = (steps, [values[step] for step in steps])

    def seconds(self, steps):
        """Training time before each of the given steps.

        In old logs not every step has a line; ms is then the mean since the line before.
        """
        # The line of step 250 is written when 251 steps are done, 0 to 250.
        done, elapsed = [0], [0.0]
        for step, ms in zip(*self.series["ms"], strict=True):
            elapsed.append(elapsed[-1] + ms / 1000 * (step + 1 - done[-1]))
            done.append(step + 1)
        return np.interp(steps, done, elapsed)

# the name of a panel: the kind of its values, and the labels of its axes
PANELS = {
    "tokens": ("tel", "million tokens", "loss, nats per token"),
    "seconds": ("tel", "seconds of training", "loss, nats per token"),
    "lr": ("lr", "million tokens", "learning rate"),
    "norm": ("norm", "million tokens", "gradient norm"),
}

def has(run, panel):
    """Whether a run has the values of a panel. llm.c's logs have no ms, for example."""
    return PANELS[panel][0] in run.series and (panel != "seconds" or "ms" in run.series)

def line(ax, run, kind, panel, **style):
    steps, values = run.series[kind]
    x = run.seconds(steps) if panel == "seconds" else np.array(steps) * run.tokens / 1e6
    ax.plot(x, values, **style)

def draw(ax, runs, panel):
    """One panel, with a line for each run that has its values."""
    kind, xlabel, ylabel = PANELS[panel]
    late = []
    for i, run in enumerate(runs):
        if not has(run, panel):
            continue
        line(ax, run, kind, panel, color=f"C{i}", marker="." if kind == "tel" else "")
        if kind == "tel":
            # pale training losses behind the validation losses
            if "trl" in run.series:
                line(ax, run, "trl", panel, color=f"C{i}", alpha=0.2, linewidth=0.8)
            steps, losses = run.series["tel"]
            late += [loss for step, loss in zip(steps, losses, strict=True)
                     if step >= steps[-1] / 20 and math.isfinite(loss)]
    if late:
        # Leave out the first twentieth of a run, whose high losses would flatten all other curves.
        margin = 0.1 * (max(late) - min(late)) + 0.01
        ax.set_ylim(min(late) - margin, max(late) + margin)
    if kind == "norm":
        ax.set_yscale("log")
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)

def plot(runs, out, panels=tuple(PANELS)):
    """A figure of the panels for which at least one run has values, in two columns."""
    import matplotlib.pyplot as plt  # here, because nothing else in the project needs it

    plt.switch_backend("svg")
    plt.rcParams.update(STYLE)
    panels = [name for name in panels if any(has(run, name) for run in runs)]
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = (4.4 * columns, 3 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for ax in axes.flat[len(panels):]:
        ax.remove()
    for name, ax in zip(panels, axes.flat, strict=False):
        draw(ax, runs, name)
    colors = [plt.Line2D([], [], color=f"C{i}") for i in range(len(runs))]
    axes.flat[0].legend(colors, [run.name for run in runs])
    # without a date, so that the same logs make the same file
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)
    print(f"wrote {out}")

# The figures of report/README.md: the group of logs, {run: its label}, the panels. "homework" means
# the class project's recipe.
THREE = {"gpt2": "GPT-2, AdamW", "homework": "variant, AdamW", "today": "variant, today's recipe"}
TWO_RECIPES = {"homework": "class project's recipe", "today": "today's recipe"}
ROPE = {"today": "rotated by position", "learned": "learned", "rope_by_head": "rotated by head"}
FIGURES = {
    "loss_tiny.svg": ("tiny", THREE, ("tokens", "seconds")),
    # without seconds, because two of its runs shared the cores
    "loss_medium.svg": ("medium", THREE, ("tokens",)),
    "recipes.svg": ("tiny", TWO_RECIPES, ("lr", "norm")),
    "rope.svg": ("tiny", ROPE, ("tokens",)),
}

def main(argv):
    show_as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=show_as_written)
    parser.add_argument("log_dir", nargs="*", help="default: the report's figures")
    parser.add_argument("--out", help="default: the folders' names and .svg")
    args = parser.parse_args(argv)
    if args.log_dir:
        runs = [Run(folder) for folder in args.log_dir]
        name = "_".join(run.name.strip("./").replace("/", "_") for run in runs)
        plot(runs, args.out or f"{name}.svg")
        return
    for file, (group, names, panels) in FIGURES.items():
        runs = [Run(REPORT / "logs" / group / f"{run}.1", name) for run, name in names.items()]
        plot(runs, REPORT / file, panels)

if __name__ == "__main__":
    main(sys.argv[1:])

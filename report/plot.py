"""
Draws runs: loss against tokens and against time, learning rate, gradient norm, HellaSwag. Needs
`pip install matplotlib`.

    python report/plot.py log124M                       # one run, to log124M.svg
    python report/plot.py log124M log_gpt2              # two of them, to log124M_log_gpt2.svg
    python report/plot.py log124M llm.c/log124M --out both.svg      # llm.c's own logs, too
    python report/plot.py                               # the figures of the report

A run is a folder with a main.log. Its lines are like "s:250 tel:4.1234" (validation loss), "trl:"
(training loss, with lr:, norm: and ms: where there are such) and "eval:" (HellaSwag). How many
tokens a step has is read from the command in the log; a log without one, such as llm.c's, has
524,288. Time is that of the training steps alone.
"""

import argparse
import math
import re
import sys
from pathlib import Path

import numpy as np

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

def tokens_per_step(log):
    """Tokens in a step, by the first command in a log: when a run is resumed, it gets others."""
    command = re.search(r"^(?:# |s:\d+ command:)(python .*)$", log, re.MULTILINE)
    if not command:
        return 524288
    # old logs have flags that are gone, so it is searched and not parsed
    given = re.search(r"--total_batch_size[ =](\d+)", command[1])
    if given:
        return int(given[1])
    if "--init_from" in command[1]:
        return train_gpt2.FINETUNE["total_batch_size"]
    model = re.search(r"--model[ =](\w+)", command[1])
    # without --model it is tiny
    preset = train_gpt2.PRESETS[model[1] if model else "tiny"]
    return preset.get("total_batch_size", 524288)

class Run:
    """A main.log. series[kind] is (steps, values); kind is tel, trl, lr, norm, ms or eval."""

    def __init__(self, folder, name=None):
        # the path as it was given: llm.c/log124M is another run than log124M
        self.name = name or str(Path(folder))
        path = Path(folder, "main.log")
        if not path.exists():
            sys.exit(f"error: {path}: no such file; give folders that runs were written to, see "
                     f"--output_dir of train_gpt2.py")
        log = path.read_text("utf-8")
        self.tokens = tokens_per_step(log)
        points = {}
        # not the lines with the command of the run (in old logs its flags), which are no numbers
        for step, fields in re.findall(r"^s:(\d+) (?!command:|flags:)(.*)$", log, re.MULTILINE):
            for kind, value in re.findall(r"(\w+):(\S+)", fields):
                # a resumed run makes some steps again, and the last line of a step counts
                points.setdefault(kind, {})[int(step)] = float(value)
        self.series = {}
        for kind, values in points.items():
            steps = sorted(values)
            self.series[kind] = (steps, [values[step] for step in steps])

    def seconds(self, steps):
        """Training time up to each of steps, added up from the ms of the training losses' lines.

        Each is the mean over the steps since the line before.
        """
        # "s:250 trl:" is written when 251 steps are done, numbers 0 to 250
        done, then = [0], [0.0]
        for step, ms in zip(*self.series["ms"], strict=True):
            then.append(then[-1] + ms / 1000 * (step + 1 - done[-1]))
            done.append(step + 1)
        return np.interp(steps, done, then)

# a panel's name: the kind of its values, and what is on its axes
PANELS = {
    "tokens": ("tel", "million tokens", "loss, nats a token"),
    "seconds": ("tel", "seconds of training", "loss, nats a token"),
    "lr": ("lr", "million tokens", "learning rate"),
    "norm": ("norm", "million tokens", "gradient norm"),
    "eval": ("eval", "million tokens", "HellaSwag, acc_norm"),
}

def has(run, panel):
    """Whether a run has the values for a panel."""
    return PANELS[panel][0] in run.series and (panel != "seconds" or "ms" in run.series)

def line(ax, run, kind, panel, **style):
    steps, values = run.series[kind]
    x = run.seconds(steps) if panel == "seconds" else np.array(steps) * run.tokens / 1e6
    ax.plot(x, values, **style)

def draw(ax, runs, panel):
    """One panel: a line for each run that has such values."""
    kind, xlabel, ylabel = PANELS[panel]
    late = []
    for i, run in enumerate(runs):
        if not has(run, panel):
            continue
        line(ax, run, kind, panel, color=f"C{i}", marker="." if kind in ("tel", "eval") else "")
        if kind == "tel":
            # training losses in pale behind the validation losses
            if "trl" in run.series:
                line(ax, run, "trl", panel, color=f"C{i}", alpha=0.2, linewidth=0.8)
            steps, losses = run.series["tel"]
            late += [loss for step, loss in zip(steps, losses, strict=True)
                     if step >= steps[-1] / 20 and math.isfinite(loss)]
    if late:
        # All that comes after the first twentieth of a run is to be seen. The first losses, near
        # what guessing costs, would press everything else together.
        room = 0.1 * (max(late) - min(late)) + 0.01
        ax.set_ylim(min(late) - room, max(late) + room)
    if kind == "norm":
        ax.set_yscale("log")
    if kind == "eval":
        for name, value in HELLASWAG.items():
            ax.axhline(value, color="gray", linewidth=0.8, linestyle=":")
            ax.text(0, value, name, fontsize=7, color="gray", va="bottom")
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)

def overview(runs, out, panels=tuple(PANELS)):
    """A figure of those panels that at least one run has the values for, in two columns."""
    try:
        import matplotlib

        matplotlib.use("svg")
        import matplotlib.pyplot as plt
    except ImportError:
        sys.exit("error: plot.py draws with matplotlib: pip install matplotlib")
    plt.rcParams.update(STYLE)
    panels = [name for name in panels if any(has(run, name) for run in runs)]
    if not panels:
        sys.exit("error: these logs have no line like s:250 tel:4.1234: there is nothing to draw")
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
    # (two of its runs were made at a time, so their ms say little)
    "loss_medium.svg": ("medium", THREE, ("tokens",)),
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
    for file, (group, names, panels) in FIGURES.items():
        runs = [Run(REPORT / "logs" / group / f"{run}.1", name) for run, name in names.items()]
        overview(runs, REPORT / file, panels)

if __name__ == "__main__":
    main(sys.argv[1:])

"""
Draws runs: loss against tokens and against time, learning rate, gradient norm, HellaSwag. Needs `pip install matplotlib`.

    python report/plot.py log124M                                       # one run, to log124M.svg
    python report/plot.py log124M llm.c/log124M --out both.svg          # several in one picture, also llm.c's own logs
    python report/plot.py                                               # every figure of report/README.md, from report/logs

A run is a folder with a main.log: lines like "s:250 tel:4.1234" (validation loss), "trl:" (training loss, with lr:, norm: and
ms:, where there are such) and "eval:" (HellaSwag). How many tokens a step has is read from the heading that ablation.py
writes, else from the run's last.pt, else it is 524,288. Time is that of the training steps alone.
"""
import argparse
import re
import shlex
import sys
from pathlib import Path

REPORT = Path(__file__).resolve().parent
sys.path.insert(0, str(REPORT.parent))
import train_gpt2

# published: OpenAI's GPT-2 on HellaSwag, completion style (llm.c, discussion 481), and GPT-3 (its paper)
HELLASWAG = {"GPT-2 124M": 0.294, "GPT-3 124M": 0.337, "GPT-2 350M": 0.375, "GPT-3 350M": 0.436}
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "train_gpt2", "font.size": 9, "axes.spines.top": False,
         "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3, "figure.constrained_layout.use": True}

class Run:
    """A main.log: series[kind] is a pair of lists, steps and values; kind is tel, trl, lr, norm, ms or eval."""
    def __init__(self, folder, name=None):
        self.name, path = name or Path(folder).name, Path(folder, "main.log")
        if not path.exists():
            train_gpt2.die(f"{path}: no such file, give folders that runs were written to (--output_dir)")
        self.series, text = {}, path.read_text()
        for step, fields in re.findall(r"^s:(\d+) (.*)$", text, re.MULTILINE):
            for kind, value in re.findall(r"(\w+):(\S+)", fields):
                steps, values = self.series.setdefault(kind, ([], []))
                steps.append(int(step))
                values.append(float(value))
        if heading := re.search(r"^# python \S+?\.py(?: --patched \S+)? (.*)$", text, re.MULTILINE):
            self.tokens = train_gpt2.parse_args([*shlex.split(heading[1]), "--input_bin=x"])[0].total_batch_size
        elif Path(folder, "last.pt").exists():
            self.tokens = train_gpt2.load_checkpoint(Path(folder, "last.pt"))["args"]["total_batch_size"]
        else:
            self.tokens = 524288

    def seconds(self, steps):
        """Training time up to each of steps, out of the ms that stand on the lines of training losses: each is the mean since
        the line before."""
        at, ms = self.series["ms"]
        total, ends, sums = 0.0, [0], [0.0]
        for end, value in zip(at, ms):
            total += value / 1000 * (end + 1 - ends[-1])
            ends.append(end + 1)
            sums.append(total)
        result = []
        for step in steps:
            i = min(max(1, sum(end < step for end in ends)), len(ends) - 1)
            share = (step - ends[i - 1]) / (ends[i] - ends[i - 1])
            result.append(sums[i - 1] + min(1.0, share) * (sums[i] - sums[i - 1]))
        return result

def draw(ax, runs, kind, against="tokens", **style):
    """One line a run; runs that have nothing of this kind are left out. Returns whether there was one."""
    drawn = False
    for i, run in enumerate(runs):
        steps, values = run.series.get(kind, ([], []))
        if steps and (against == "tokens" or "ms" in run.series):
            x = [step * run.tokens / 1e6 for step in steps] if against == "tokens" else run.seconds(steps)
            ax.plot(x, values, color=f"C{i}", **style)
            drawn = True
    ax.set_xlabel("million tokens" if against == "tokens" else "seconds of training")
    return drawn

def losses(ax, runs, against):
    """Validation losses as lines, from where guessing has ended; training losses in pale behind them."""
    draw(ax, runs, "trl", against, alpha=0.2, linewidth=0.8)
    draw(ax, runs, "tel", against, marker=".", markersize=4)
    values = [v for run in runs for s, v in zip(*run.series.get("tel", ([], []))) if s]
    if values:
        ax.set_ylim(min(values) - 0.1, sorted(values)[int(0.98 * len(values))] + 0.1)
    ax.set_ylabel("loss, nats a token")

def hellaswag(ax, runs):
    draw(ax, runs, "eval", marker=".")
    for name, value in HELLASWAG.items():
        ax.axhline(value, color="gray", linewidth=0.8, linestyle=":")
        ax.text(0, value, name, fontsize=7, color="gray", va="bottom")
    ax.set_ylabel("HellaSwag, acc_norm")

PANELS = {  # what it needs in a log: how it is drawn
    "tel": lambda ax, runs: losses(ax, runs, "tokens"),
    "ms": lambda ax, runs: losses(ax, runs, "seconds"),
    "lr": lambda ax, runs: draw(ax, runs, "lr") and ax.set_ylabel("learning rate"),
    "norm": lambda ax, runs: draw(ax, runs, "norm") and (ax.set_ylabel("gradient norm"), ax.set_yscale("log")),
    "eval": hellaswag}

def overview(runs, out, kinds=tuple(PANELS)):
    """A figure of the panels that at least one run has the numbers for, in two columns."""
    try:
        import matplotlib
        matplotlib.use("svg")
        import matplotlib.pyplot as plt
    except ImportError:
        train_gpt2.die("plot.py draws with matplotlib: pip install matplotlib")
    plt.rcParams.update(STYLE)
    kinds = [kind for kind in kinds if any(kind in run.series for run in runs)]
    if not kinds:
        train_gpt2.die("these logs have no line like s:250 tel:4.1234: nothing to draw")
    columns = min(2, len(kinds))
    rows = -(-len(kinds) // columns)  # rounded up
    figure, axes = plt.subplots(rows, columns, figsize=(4.4 * columns, 3 * rows), squeeze=False)
    for ax in axes.flat[len(kinds):]:
        ax.remove()
    for kind, ax in zip(kinds, axes.flat):
        PANELS[kind](ax, runs)
    axes.flat[0].legend([plt.Line2D([], [], color=f"C{i}") for i in range(len(runs))], [run.name for run in runs])
    figure.savefig(out, metadata={"Date": None})  # without a date the same logs make the same file
    plt.close(figure)
    print(f"wrote {out}")

THREE = {"gpt2": "GPT-2, AdamW", "homework": "variant, AdamW", "today": "variant, today's recipe"}
FIGURES = {  # of report/README.md: group of logs, {run: name}, panels
    "loss_tiny.svg": ("tiny", THREE, ("tel", "ms")),
    "loss_small.svg": ("small", THREE, ("tel",)),  # its runs were made two at a time, so their ms say little
    "recipes.svg": ("tiny", {"homework": "homework's recipe", "today": "today's recipe"}, ("lr", "norm")),
    "rope.svg": ("tiny", {"today": "turned by time", "learned": "learned", "rope_by_head": "turned by head"}, ("tel",))}

def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log_dir", nargs="*", help="not given: the report's figures")
    parser.add_argument("--out", help="not given: the first folder's name, with .svg")
    args = parser.parse_args(argv)
    if args.log_dir:
        return overview([Run(folder) for folder in args.log_dir], args.out or f"{Path(args.log_dir[0]).name}.svg")
    for name, (group, runs, kinds) in FIGURES.items():
        overview([Run(REPORT / "logs" / group / f"{run}.1", label) for run, label in runs.items()], REPORT / name, kinds)

if __name__ == "__main__":
    main(sys.argv[1:])

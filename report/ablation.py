"""
What does each part bring? Trains many small models that differ in one flag, keeps their logs, and
prints the tables of the report.

    python report/ablation.py tiny              # 0.8M weights, the standard library as bytes
    python report/ablation.py medium --data 'web/text_train_*.bin'    # 17.6M, GPT-2's tokens
    python report/ablation.py d12 --jobs 1      # 124M on FineWeb: for a GPU
    python report/ablation.py tiny --table      # the table again, out of the logs

An idea of your own: give train_gpt2.py a flag for it, give TRIALS a row, and name that row in a
group's runs. Or try it once, with --runs.

Each run is train_gpt2.py in a process of its own. --jobs of them are made at a time, and on a CPU
they share the cores. A run whose log is there is not made again. A log goes to
report/logs/GROUP/NAME.SEED/main.log, as train_gpt2.py wrote it, under the command and the machine.
"""

import argparse
import concurrent.futures
import datetime
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent

# -------------------------------------------------------------------------------------------------
# 1. What is run

@dataclass
class Trial:
    """One row of a table: what it says there, and in what the run differs from the default."""

    what: str
    flags: str = ""
    rate: float = 1.0  # times the group's learning rate
    share: float = 1.0  # of the group's steps

COURSE = "--recipe original"
GPT2 = "--arch gpt2"
BOTH = f"{GPT2} {COURSE}"
# A name is its log's folder. "homework" was the first version's word for the course work's recipe.
TRIALS = {
    "today": Trial("the default"),
    "adamw": Trial("AdamW instead of Muon", "--optimizer adamw"),
    "no_qk_norm": Trial("without QK-norm", "--no-qk_norm"),
    "cosine": Trial("a cosine to a tenth instead of stable, then linear", "--schedule cosine"),
    "learned": Trial("learned positions instead of RoPE", "--pos learned"),
    "gelu": Trial("GELU instead of SwiGLU", "--mlp gelu"),
    "layernorm": Trial("LayerNorm instead of RMSNorm", "--norm layernorm"),
    "all_heads": Trial("four key/value heads (the default on tiny: two)", "--n_kv_head 4"),
    "bias": Trial("with biases", "--bias"),
    "gpt2_today": Trial("GPT-2's architecture, today's recipe", GPT2),
    "homework": Trial("the variant, the course work's recipe (AdamW)", COURSE),
    "gpt2": Trial("GPT-2's architecture, the course work's recipe (AdamW)", BOTH),
    "homework_75": Trial("the variant with AdamW, 75 % of the tokens", COURSE, share=0.75),
    "today_35": Trial("the default, 35 % of the tokens", share=0.35),
    "today_half": Trial("the default, half its rate", rate=0.5),
    "today_twice": Trial("the default, twice its rate", rate=2),
    "adamw_half": Trial("the variant, the course work's recipe, half its rate", COURSE, rate=0.5),
    "adamw_twice": Trial("the variant, the course work's recipe, twice its rate", COURSE, rate=2),
    "gpt2_half": Trial("GPT-2, the course work's recipe, half its rate", BOTH, rate=0.5),
    "gpt2_twice": Trial("GPT-2, the course work's recipe, twice its rate", BOTH, rate=2),
}
# Runs that were made with edits of train_gpt2.py, and not with a flag. Here only their logs are
# shown; the edits are in git, in this file at commit 1c3b36b or 121cbef.
RETIRED = {
    "gelu_equal": "GELU with as many weights as SwiGLU",
    "relu2_equal": "squared ReLU with as many weights",
    "untied_1": "a head of its own, with the same rate",
    "untied_2": "a head of its own, with twice the rate",
    "rope_by_head": "RoPE turned by head instead of by time",
    "whole_matrices": "Muon on merged matrices as they are",
    "matrix_per_head": "Muon on each head apart",
    "zero_projections": "output projections start at zero",
    "untied_head": "a head of its own, which starts at zero",
    "matrices_half": "half Muon's rate",
    "matrices_twice": "twice Muon's rate",
    "table_half": "half the embedding's rate",
    "table_twice": "twice the embedding's rate",
    "warm_momentum": "Muon's momentum warmed up, 0.85 to 0.95",
    "cautious_decay": "cautious weight decay",
    "no_decay": "no weight decay",
    "average": "an average of the last weights",
    "gains_4": "four times the gains' rate",
    "rope_1024": "RoPE's base 1,024 instead of 10,000",
    "beta_08": "AdamW's first beta 0.8 instead of 0.9",
    "together": "the five that helped most, together",
}
ROWS = {name: trial.what for name, trial in TRIALS.items()} | RETIRED

@dataclass
class Group:
    """What all runs of one table share."""

    steps: int
    seeds: tuple
    runs: list  # names of trials
    flags: str
    muon: float = 4e-3  # the peak learning rate of runs with Muon
    adamw: float = 2e-3  # and of those with AdamW alone
    warmup: int = 20  # steps: the same for both recipes

THREE = ["today", "homework", "gpt2"]
RATES = [*THREE, *(name for name, trial in TRIALS.items() if trial.rate != 1)]
FULL_RATE = [name for name, trial in TRIALS.items() if trial.rate == 1]
MAIN_RUNS = [*THREE, "homework_75", "today_35"]
TINY = "--model tiny --val_loss_every 50"
# d12 shrunk to 17.6M weights, 12.9M of them in the table
MEDIUM = (
    "--model d12 --n_layer 6 --n_head 4 --n_embd 256 --sequence_length 512 --batch_size 8 "
    "--total_batch_size 8192 --val_loss_every 40 --val_tokens 65536 --compile"
)
D12 = "--model d12 --val_loss_every 125"
GROUPS = {
    "tiny": Group(600, (1, 2, 3), FULL_RATE, TINY),
    "tiny_rates": Group(600, (1,), RATES, TINY),
    "medium": Group(366, (1,), MAIN_RUNS, MEDIUM, adamw=2.4e-3),
    "medium_rates": Group(122, (1,), RATES, MEDIUM, adamw=2.4e-3),
    "d12": Group(2000, (1, 2), MAIN_RUNS, D12, muon=2.4e-3, adamw=1.2e-3, warmup=100),
}

def arguments(group, name, seed, data):
    """The flags with which train_gpt2.py makes the run."""
    shared = GROUPS[group]
    trial = TRIALS[name]
    adamw = "adamw" in trial.flags or COURSE in trial.flags
    rate = trial.rate * (shared.adamw if adamw else shared.muon)
    steps = round(trial.share * shared.steps)
    # a short run should not be all warm-up
    warmup = min(shared.warmup, steps // 10)
    flags = [*shlex.split(shared.flags), *shlex.split(trial.flags)]
    flags += [f"--learning_rate={rate:g}", f"--warmup_iters={warmup}", f"--num_iterations={steps}"]
    if data:
        flags.append(f"--input_bin={data}")
    return [*flags, f"--seed={seed}"]

def machine():
    """What the run was made on, in a few words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpu = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model_name = re.search(r"model name\s*: (.*)", cpuinfo.read_text("utf-8"))
        if model_name:
            cpu = model_name[1]
    return f"{os.cpu_count()} cores of {cpu}"

def make(logs, group, name, seed, data, threads):
    """One run, in a folder that is thrown away but for its main.log."""
    out = logs / group / f"{name}.{seed}" / "main.log"
    if out.exists():
        return
    argv = ["train_gpt2.py", *arguments(group, name, seed, data)]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / argv[0], *argv[1:], f"--output_dir={folder}/run"]
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace")
        if done.returncode:
            sys.exit(f"error: {name}.{seed}: {done.stderr.strip()}")
        log = Path(folder, "run", "main.log").read_text("utf-8")
    heading = (
        f"# python {shlex.join(argv)}\n# {datetime.date.today()}, {machine()}, {threads} threads, "
        f"python {platform.python_version()}, torch {torch.__version__}\n"
    )
    # the log's own first line is the same command, with a folder that is gone
    log = log.split("\n", 1)[1]
    out.parent.mkdir(parents=True, exist_ok=True)
    # written under another name first, so that a log that is there is a whole one
    tmp = out.with_suffix(".tmp")
    tmp.write_text(heading + log, "utf-8")
    os.replace(tmp, out)
    print(out.parent.name, log.splitlines()[-1], flush=True)

# -------------------------------------------------------------------------------------------------
# 2. The tables

def curves(logs, group, name):
    """{seed: [(step, validation loss), ...]} of the runs that there are."""
    result = {}
    # the dot, or "today" would match "today_35", too
    for log in (logs / group).glob(f"{name}.*/main.log"):
        seed = log.parent.suffix[1:]
        losses = re.findall(r"s:(\d+) tel:(\S+)", log.read_text("utf-8"))
        result[seed] = [(int(step), float(loss)) for step, loss in losses]
    return result

def passes(curve, loss):
    """The step at which a curve first is at loss, on straight lines between its points.

    None: it never is. The first point is that of an untrained model, and taken to be above it.
    """
    for i in range(1, len(curve)):
        step_before, above = curve[i - 1]
        step, below = curve[i]
        if below <= loss:
            return step_before + (step - step_before) * (above - loss) / (above - below)
    return None

def difference_in_words(differences):
    """The mean of some paired differences. With three or more, also its standard error.

    And whether it says anything: it does if it is at least two standard errors from 0.
    """
    mean = statistics.mean(differences)
    if len(differences) < 3:
        return f"{mean:+.3f}"
    # how far the mean of so many seeds may be from the mean of all seeds
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    words = f"{mean:+.3f} ± {error:.3f}"
    if abs(mean) < 2 * error:
        words += ", not told apart from noise"
    return words

def share_of_gpt2(runs, gpt2):
    """What part of GPT-2's steps runs take to reach GPT-2's last loss: a mean over seeds."""
    shares = []
    for seed in runs:
        if seed in gpt2:
            last_step, last_loss = gpt2[seed][-1]
            step = passes(runs[seed], last_loss)
            if step is None:
                return "-"
            shares.append(step / last_step)
    return f"{statistics.mean(shares):.0%}" if shares else "-"

def row(logs, group, name):
    """A line of the table: means over seeds, each run beside those of the same seed.

    The same seed means the same data in the same order, so that a difference is that of the runs.
    """
    runs = curves(logs, group, name)
    default = curves(logs, group, "today")
    gpt2 = curves(logs, group, "gpt2")
    end = {seed: curve[-1][1] for seed, curve in runs.items()}

    differences = [end[seed] - default[seed][-1][1] for seed in runs if seed in default]
    change = ""
    if name != "today" and differences:
        change = difference_in_words(differences)

    some_run = next(iter(runs.values()))
    cells = [ROWS[name], str(some_run[-1][0])]
    cells += [f"{statistics.mean(end.values()):.3f}", change]
    if gpt2:
        cells.append(share_of_gpt2(runs, gpt2))
    return f"| {' | '.join(cells)} | {len(runs)} |"

def table(logs, group):
    """All runs that there are, in Markdown."""
    columns = ["run", "steps", "validation loss", "to the default"]
    if curves(logs, group, "gpt2"):
        columns.append("at GPT-2's end after")
    columns.append("seeds")
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    lines += [row(logs, group, name) for name in ROWS if curves(logs, group, name)]
    return "\n".join(lines)

# -------------------------------------------------------------------------------------------------

def main(argv):
    show_as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=show_as_written)
    add = parser.add_argument
    add("group", choices=GROUPS)
    add("--data", metavar="PATTERN", help="training shards, as --input_bin; default: the preset's")
    add("--runs", nargs="+", choices=TRIALS, metavar="NAME",
        help=f"some of {', '.join(TRIALS)}; default: those of the group")
    add("--seeds", nargs="+", type=int, help="default: those of the group")
    add("--jobs", type=int, default=1 if torch.cuda.is_available() else os.cpu_count(),
        help="runs at a time; default: one on a GPU, else one for each core")
    add("--logs", type=Path, default=ROOT / "report" / "logs", help="where logs are kept")
    add("--table", action="store_true", help="train nothing, print the table")
    args = parser.parse_args(argv)
    if not args.table:
        group = GROUPS[args.group]
        threads = max(1, os.cpu_count() // args.jobs)
        # these threads only wait: the work is done in the processes that make() starts
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            futures = []
            for seed in args.seeds or group.seeds:
                for name in args.runs or group.runs:
                    job = (args.logs, args.group, name, seed, args.data, threads)
                    futures.append(pool.submit(make, *job))
            try:
                for future in futures:
                    # raises what make() raised
                    future.result()
            except BaseException:
                # one failed, or Ctrl-C: begin no others
                pool.shutdown(cancel_futures=True)
                raise
    print(table(args.logs, args.group))

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

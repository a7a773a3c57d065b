"""
How much does each part contribute? Trains many small models that differ in one flag, keeps their
logs, and prints the tables of the report.

    python report/ablation.py tiny              # 0.8M parameters, the standard library as bytes
    python report/ablation.py medium --data 'web/text_train_*.bin'    # 17.6M, GPT-2's tokens
    python report/ablation.py d12 --jobs 1      # 116.5M on FineWeb, for a GPU
    python report/ablation.py tiny --table      # prints the table from the logs

To test an idea, give train_gpt2.py a flag and TRIALS a row, and run it beside the default:

    python report/ablation.py tiny --runs today gelu --logs log_ideas

Each run is a process of train_gpt2.py, and a run that has a log is skipped. The log in
report/logs/GROUP/NAME.SEED/main.log is train_gpt2.py's, below its command and the machine.
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
sys.path.insert(0, str(ROOT))
import fineweb  # noqa: E402

# -------------------------------------------------------------------------------------------------
# 1. The runs

@dataclass
class Trial:
    """One row of a table: its label, and how the run differs from the default."""

    label: str
    flags: str = ""
    rate: float = 1.0  # multiplies the group's learning rate
    share: float = 1.0  # of the group's steps

PROJECT = "--recipe original"
GPT2 = "--arch gpt2"
BOTH = f"{GPT2} {PROJECT}"
# The names are those of the logs' folders. "homework" means the class project's recipe.
TRIALS = {
    "today": Trial("the default"),
    "adamw": Trial("AdamW instead of Muon", "--optimizer adamw"),
    "no_qk_norm": Trial("without QK-norm", "--no-qk_norm"),
    "cosine": Trial("cosine decay instead of stable-then-linear", "--schedule cosine"),
    "learned": Trial("learned position embeddings instead of RoPE", "--pos learned"),
    "gelu": Trial("GELU instead of SwiGLU", "--mlp gelu"),
    "layernorm": Trial("LayerNorm instead of RMSNorm", "--norm layernorm"),
    "all_heads": Trial("four key/value heads (the default on tiny: two)", "--n_kv_head 4"),
    "bias": Trial("with biases", "--bias"),
    "gpt2_today": Trial("GPT-2's architecture, today's recipe", GPT2),
    "homework": Trial("the variant, the class project's recipe (AdamW)", PROJECT),
    "gpt2": Trial("GPT-2's architecture, the class project's recipe (AdamW)", BOTH),
    "homework_75": Trial("the variant with AdamW, 75% of the tokens", PROJECT, share=0.75),
    "today_35": Trial("the default, 35% of the tokens", share=0.35),
    "today_half": Trial("the default, half the rate", rate=0.5),
    "today_twice": Trial("the default, twice the rate", rate=2),
    "adamw_half": Trial("the variant, the class project's recipe, half the rate", PROJECT, 0.5),
    "adamw_twice": Trial("the variant, the class project's recipe, twice the rate", PROJECT, 2),
    "gpt2_half": Trial("GPT-2, the class project's recipe, half the rate", BOTH, 0.5),
    "gpt2_twice": Trial("GPT-2, the class project's recipe, twice the rate", BOTH, 2),
}
# Labels for logs of runs that no flag produces. Their edits of train_gpt2.py are in git, in this
# file at commits 1c3b36b and 121cbef.
RETIRED = {
    "gelu_equal": "GELU with as many parameters as SwiGLU",
    "relu2_equal": "squared ReLU with as many parameters",
    "untied_1": "an untied head, the same rate",
    "untied_2": "an untied head, twice the rate",
    "rope_by_head": "RoPE rotated by head instead of by position",
    "whole_matrices": "Muon on merged matrices",
    "matrix_per_head": "Muon on each head separately",
    "zero_projections": "output projections initialized to zero",
    "untied_head": "an untied head, initialized to zero",
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
LABELS = {name: trial.label for name, trial in TRIALS.items()} | RETIRED

@dataclass
class Group:
    """The settings that all runs of one table share."""

    steps: int
    seeds: tuple
    runs: list  # names of trials
    flags: str
    muon: float = 4e-3  # the peak learning rate of runs with Muon
    adamw: float = 2e-3  # of runs with AdamW alone
    warmup: int = 20  # steps, the same for both recipes

THREE = ["today", "homework", "gpt2"]
RATES = [*THREE, *(name for name, trial in TRIALS.items() if trial.rate != 1)]
FULL_RATE = [name for name, trial in TRIALS.items() if trial.rate == 1]
MAIN_RUNS = [*THREE, "homework_75", "today_35"]
TINY = "--model tiny --val_loss_every 50"
# d12 shrunk to 17.6M parameters, 12.9M of them in the embedding
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
    """The run's flags of train_gpt2.py."""
    shared = GROUPS[group]
    trial = TRIALS[name]
    adamw = "adamw" in trial.flags or PROJECT in trial.flags
    rate = trial.rate * (shared.adamw if adamw else shared.muon)
    steps = round(trial.share * shared.steps)
    # a short run should not be all warmup
    warmup = min(shared.warmup, steps // 10)
    flags = [*shlex.split(shared.flags), *shlex.split(trial.flags)]
    flags += [f"--learning_rate={rate:g}", f"--warmup_iters={warmup}", f"--num_iterations={steps}"]
    if data:
        flags.append(f"--input_bin={data}")
    return [*flags, f"--seed={seed}"]

def machine():
    """A short description of this machine."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpu = platform.processor()
    # on Linux processor() says only x86_64 or nothing
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model_name = re.search(r"model name\s*: (.*)", cpuinfo.read_text("utf-8"))
        cpu = model_name[1] if model_name else cpu
    return f"{os.cpu_count()} cores of {cpu}"

def make(logs, group, name, seed, data, threads):
    """Trains one run and keeps only its main.log."""
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
    # the log's first line is the same command with a temporary folder
    log = log.split("\n", 1)[1]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(heading + log, "utf-8")
    print(out.parent.name, log.splitlines()[-1], flush=True)

# -------------------------------------------------------------------------------------------------
# 2. The tables

def curves(logs, group, name):
    """{seed: [(step, validation loss), ...]} of a trial's logs."""
    result = {}
    # without the dot, "today" would also match "today_35"
    for log in (logs / group).glob(f"{name}.*/main.log"):
        losses = re.findall(r"s:(\d+) tel:(\S+)", log.read_text("utf-8"))
        seed = log.parent.suffix[1:]
        result[seed] = [(int(step), float(loss)) for step, loss in losses]
    return result

def first_reaches(curve, loss):
    """The step at which a curve first reaches loss, interpolated linearly, or None.

    The first point is the untrained model's and assumed to be above loss.
    """
    for (step_before, above), (step, below) in zip(curve, curve[1:], strict=False):
        if below <= loss:
            return step_before + (step - step_before) * (above - loss) / (above - below)
    return None

def describe(differences):
    """The mean of paired differences, and with at least three of them its standard error.

    A mean of less than two standard errors is marked as noise.
    """
    mean = statistics.mean(differences)
    if len(differences) < 3:
        return f"{mean:+.3f}"
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    noise = ", not told apart from noise" if abs(mean) < 2 * error else ""
    return f"{mean:+.3f} ± {error:.3f}{noise}"

def share_of_gpt2(runs, gpt2):
    """The share of GPT-2's steps after which runs reach its final loss, the mean over seeds."""
    shares = []
    for seed in runs.keys() & gpt2.keys():
        last_step, last_loss = gpt2[seed][-1]
        step = first_reaches(runs[seed], last_loss)
        if step is None:
            return "-"
        shares.append(step / last_step)
    return f"{statistics.mean(shares):.0%}" if shares else "-"

def table(logs, group):
    """All runs that have a log, in Markdown: means over seeds.

    A run is compared with the default run of its seed, which reads the same data in the same order.
    """
    default = curves(logs, group, "today")
    gpt2 = curves(logs, group, "gpt2")
    columns = ["run", "steps", "validation loss", "vs. default"]
    columns += ["at GPT-2's end after", "seeds"] if gpt2 else ["seeds"]
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for name, label in LABELS.items():
        runs = curves(logs, group, name)
        if not runs:
            continue
        end = {seed: curve[-1][1] for seed, curve in runs.items()}
        differences = [end[seed] - default[seed][-1][1] for seed in runs if seed in default]
        change = describe(differences) if name != "today" and differences else ""
        steps = next(iter(runs.values()))[-1][0]
        cells = [label, str(steps), f"{statistics.mean(end.values()):.3f}", change]
        if gpt2:
            cells.append(share_of_gpt2(runs, gpt2))
        lines.append(f"| {' | '.join(cells)} | {len(runs)} |")
    return "\n".join(lines)

# -------------------------------------------------------------------------------------------------

def main(argv):
    show_as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=show_as_written)
    add = parser.add_argument
    add("group", choices=GROUPS)
    add("--data", metavar="PATTERN", help="training shards, as --input_bin; default: the preset's")
    add("--runs", nargs="+", choices=TRIALS, metavar="NAME",
        help=f"default: those of the group; choose from {', '.join(TRIALS)}")
    add("--seeds", nargs="+", type=int, help="default: those of the group")
    add("--jobs", type=int, default=1 if torch.cuda.is_available() else os.cpu_count(),
        help="parallel runs; default: one on a GPU, else one per core")
    add("--logs", type=Path, default=ROOT / "report" / "logs", help="folder of the logs")
    add("--table", action="store_true", help="print the table without training")
    args = parser.parse_args(argv)
    if not args.table:
        group = GROUPS[args.group]
        if "--model tiny" in group.flags:
            # make the default corpus now, or parallel runs would all make it
            fineweb.stdlib_corpus()
        threads = max(1, os.cpu_count() // args.jobs)
        # threads suffice because each only waits for its process
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
                # after an error or Ctrl-C, start no other runs
                pool.shutdown(cancel_futures=True)
                raise
    print(table(args.logs, args.group))

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""
What does each part bring? Trains many small models that differ in one thing, keeps their logs, and
prints the tables of report/README.md.

    python report/ablation.py tiny              # 0.8M weights, the standard library as bytes
    python report/ablation.py small --data 'web/text_train_*.bin'    # 7.6M, GPT-2's tokens
    python report/ablation.py d12 --jobs 1      # 124M on FineWeb: for a GPU
    python report/ablation.py tiny --table      # the tables again, out of the logs

Each run is train_gpt2.py in a process of its own, with the flags and patches below. --jobs of them
are made at a time, and on a CPU they share the cores. A run whose log is there is not made again.

A log goes to report/logs/GROUP/NAME.SEED/main.log, as train_gpt2.py wrote it, under a heading that
says what made it: the command, the day, the machine and the versions.
"""

import argparse
import concurrent.futures
import datetime
import functools
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
import train_gpt2  # noqa: E402

# -------------------------------------------------------------------------------------------------
# 1. What train_gpt2.py has no flag for

# It was tried and left out, or it is wrong, or only an experiment needs it. Each patch is a
# function that changes the module train_gpt2 before it trains.

def set_args(**values):
    """From now on parse_args() returns these values, whatever preset and recipe say."""
    parse_args = train_gpt2.parse_args

    def changed(argv):
        args, checkpoint = parse_args(argv)
        vars(args).update(values)
        return args, checkpoint

    train_gpt2.parse_args = changed

def after_init(module_class, change):
    """From now on change(module, config) is called on every new module of that class."""
    init = module_class.__init__

    def changed(module, config):
        init(module, config)
        change(module, config)

    module_class.__init__ = changed

def only_losses():
    """Neither samples nor checkpoints: of these runs only the log is kept."""
    train_gpt2.Run.sample = lambda run: None
    train_gpt2.Run.save = lambda run: True

def zero_projections():
    """The matrices that write into the residual stream start at zero: at first, a block is idle."""

    def change(model, config):
        for name, p in model.named_parameters():
            if name.endswith(("c_proj.weight", "c_down.weight")):
                torch.nn.init.zeros_(p)

    after_init(train_gpt2.GPT, change)

def untied_head():
    """The head has a matrix of its own, which starts at zero: more parameters by one table."""

    def change(model, config):
        table = model.transformer.wte.weight
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(table))

    after_init(train_gpt2.GPT, change)

def fp32_residual():
    """The residual stream stays in fp32 under autocast. (Only for models with RoPE.)"""

    def features(model, idx):
        T = idx.size(1)
        x = model.transformer.wte(idx)
        for block in model.transformer.h:
            x = block(x, (model.cos[:T], model.sin[:T]))
        return model.transformer.ln_f(x)

    train_gpt2.GPT.features = features

def rope_by_head():
    """The slip in the original: a rotation that expects (B, T, heads, D) gets (B, heads, T, D).

    So the angle grows with the number of the head, and is the same at every time.
    """
    apply_rope = train_gpt2.apply_rope

    def by_head(x, cos, sin):
        heads = x.size(2)
        turned = apply_rope(x.transpose(1, 2), cos[:heads], sin[:heads])
        return turned.transpose(1, 2)

    train_gpt2.apply_rope = by_head

PATCHES = {
    "only_losses": only_losses,
    "zero_projections": zero_projections,
    "untied_head": untied_head,
    "fp32_residual": fp32_residual,
    "rope_by_head": rope_by_head,
    "bias": functools.partial(set_args, bias=True),
    "cosine": functools.partial(set_args, schedule="cosine"),
    "warmup_8": functools.partial(set_args, warmup_iters=8),
    "warmup_20": functools.partial(set_args, warmup_iters=20),
    "warmup_100": functools.partial(set_args, warmup_iters=100),
}

# -------------------------------------------------------------------------------------------------
# 2. What is run

@dataclass
class Group:
    """What all runs of one size share."""

    steps: int
    seeds: tuple
    muon: float  # the peak rate of runs with Muon
    adamw: float  # and of those with AdamW alone
    n_head: int
    warmup: str  # the patch that sets it: the same for both recipes
    flags: str

GROUPS = {
    "tiny": Group(600, (1, 2, 3), 4e-3, 2e-3, 4, "warmup_20", "--model tiny --val_loss_every 50"),
    "small": Group(
        200, (1,), 4e-3, 1.2e-3, 4, "warmup_8",
        "--model d12 --n_layer 6 --n_head 4 --n_embd 128 --sequence_length 256 --batch_size 16 "
        "--total_batch_size 8192 --val_loss_every 20 --val_tokens 65536",
    ),
    "d12": Group(
        2000, (1, 2), 2.4e-3, 1.2e-3, 12, "warmup_100", "--model d12 --val_loss_every 125"
    ),
}  # fmt: skip

@dataclass
class Trial:
    """One row of a table."""

    what: str
    flags: str | None = ""  # None: only the first version of train_gpt2.py could do it
    patch: str = ""
    rate: float = 1.0  # times the group's rate for the optimizer
    share: float = 1.0  # of the group's steps

ORIGINAL = "--recipe original"
GPT2 = "--arch gpt2"
# The name is the log's folder. "homework" was the first version's word for the original recipe.
TRIALS = {
    "today": Trial("the default"),
    "adamw": Trial("AdamW instead of Muon", "--optimizer adamw"),
    "no_qk_norm": Trial("without QK-norm", "--no-qk_norm"),
    "cosine": Trial("a cosine to a tenth instead of stable, then linear", patch="cosine"),
    "learned": Trial("learned positions instead of RoPE", "--pos learned"),
    "gelu": Trial("GELU instead of SwiGLU", "--mlp gelu"),
    "layernorm": Trial("LayerNorm instead of RMSNorm", "--norm layernorm"),
    "all_heads": Trial("a key/value head for each query head", "--n_kv_head {n_head}"),
    "bias": Trial("with biases", patch="bias"),
    "gpt2_today": Trial("GPT-2's architecture, today's recipe", GPT2),
    "homework": Trial("the variant, the original recipe (AdamW)", ORIGINAL),
    "gpt2": Trial("GPT-2's architecture, the original recipe (AdamW)", f"{GPT2} {ORIGINAL}"),
    "homework_75": Trial("the variant with AdamW, 75 % of the tokens", ORIGINAL, share=0.75),
    "today_35": Trial("the default, 35 % of the tokens", share=0.35),
    "whole_matrices": Trial("Muon on merged matrices as they are", None),
    "matrix_per_head": Trial("Muon on each head apart", None),
    "zero_projections": Trial("output projections start at zero", patch="zero_projections"),
    "untied_head": Trial("a head of its own, which starts at zero", patch="untied_head"),
    "fp32_residual": Trial("the residual stream in fp32", patch="fp32_residual"),
    "rope_by_head": Trial("RoPE turned by head instead of by time", patch="rope_by_head"),
    "today_half": Trial("the default, half its rate", rate=0.5),
    "today_twice": Trial("the default, twice its rate", rate=2),
    "adamw_half": Trial("the variant, the original recipe, half its rate", ORIGINAL, rate=0.5),
    "adamw_twice": Trial("the variant, the original recipe, twice its rate", ORIGINAL, rate=2),
    "gpt2_half": Trial("GPT-2, the original recipe, half its rate", f"{GPT2} {ORIGINAL}", rate=0.5),
    "gpt2_twice": Trial("GPT-2, the original recipe, twice its rate", f"{GPT2} {ORIGINAL}", rate=2),
}

def arguments(group, name, seed, data):
    """The arguments with which this file, in a process of its own, makes the run."""
    shared = GROUPS[group]
    trial = TRIALS[name]
    patches = ["only_losses", shared.warmup]
    if trial.patch:
        patches.append(trial.patch)
    with_muon = "adamw" not in trial.flags and ORIGINAL not in trial.flags
    rate = trial.rate * (shared.muon if with_muon else shared.adamw)
    argv = ["--patched", ",".join(patches), *shlex.split(shared.flags)]
    argv += shlex.split(trial.flags.format(n_head=shared.n_head))
    argv += [f"--learning_rate={rate:g}", f"--num_iterations={round(trial.share * shared.steps)}"]
    if data:
        argv.append(f"--input_bin={data}")
    return [*argv, f"--seed={seed}"]

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
    argv = ["report/ablation.py", *arguments(group, name, seed, data)]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / argv[0], *argv[1:], f"--output_dir={folder}/run"]
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip().removeprefix("error: ")
            sys.exit(f"error: {name}.{seed}: {reason}")
        log = Path(folder, "run", "main.log").read_text("utf-8")
    heading = (
        f"# python {shlex.join(argv)}\n# {datetime.date.today()}, {machine()}, {threads} threads, "
        f"python {platform.python_version()}, torch {torch.__version__}\n"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    # written under another name first, so that a log that is there is a whole one
    tmp = out.with_suffix(".tmp")
    tmp.write_text(heading + log, "utf-8")
    os.replace(tmp, out)
    print(out.parent.name, log.splitlines()[-1], flush=True)

# -------------------------------------------------------------------------------------------------
# 3. The tables

def curves(logs, group, name):
    """{seed: [(step, validation loss), ...]} of the runs that there are."""
    result = {}
    for log in (logs / group).glob(f"{name}.*/main.log"):
        seed = log.parent.suffix[1:]
        # a dictionary, so that of a step that stands there twice the last line counts
        losses = dict(re.findall(r"s:(\d+) tel:(\S+)", log.read_text("utf-8")))
        result[seed] = sorted((int(step), float(loss)) for step, loss in losses.items())
    return result

def passes(curve, loss):
    """The step at which a curve first is at loss, on straight lines between its points.

    None: it never is.
    """
    for i in range(1, len(curve)):
        step_before, above = curve[i - 1]
        step, below = curve[i]
        if below <= loss:
            return step_before + (step - step_before) * (above - loss) / (above - below)
    return None

def row(logs, group, name):
    """A line of the table: means over seeds, each run beside those of the same seed.

    The same seed means the same data in the same order, so that a difference is that of the runs.
    """
    trial = TRIALS[name]
    runs = curves(logs, group, name)
    default = curves(logs, group, "today")
    gpt2 = curves(logs, group, "gpt2")
    end = {seed: curve[-1][1] for seed, curve in runs.items()}

    differences = [end[seed] - default[seed][-1][1] for seed in runs if seed in default]
    change = ""
    if name != "today" and differences:
        change = f"{statistics.mean(differences):+.3f}"
        if len(differences) > 1:
            # how far the mean of so many seeds may be from the mean of all seeds
            error = statistics.stdev(differences) / math.sqrt(len(differences))
            change += f" ± {error:.3f}"

    # after how many steps is it where GPT-2 ends?
    reached = [passes(runs[seed], gpt2[seed][-1][1]) for seed in runs if seed in gpt2]
    share = "-"
    if reached and None not in reached:
        share = f"{statistics.mean(reached) / GROUPS[group].steps:.0%}"

    steps = round(trial.share * GROUPS[group].steps)
    mean = statistics.mean(end.values())
    return f"| {trial.what} | {steps} | {mean:.3f} | {change} | {share} | {len(runs)} |"

def table(logs, group):
    """All runs that there are, in Markdown."""
    lines = ["| run | steps | validation loss | to the default | at GPT-2's end after | seeds |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    lines += [row(logs, group, name) for name in TRIALS if curves(logs, group, name)]
    return "\n".join(lines)

# -------------------------------------------------------------------------------------------------

def main(argv):
    if argv[:1] == ["--patched"]:
        # this process is to make one run
        for name in argv[1].split(","):
            PATCHES[name]()
        return train_gpt2.main(argv[2:])
    show_as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=show_as_written)
    possible = [name for name, trial in TRIALS.items() if trial.flags is not None]
    add = parser.add_argument
    add("group", choices=GROUPS)
    add("--data", metavar="PATTERN", help="training shards, as --input_bin; default: the preset's")
    add("--runs", nargs="+", choices=possible, metavar="NAME", default=possible,
        help=f"some of {', '.join(possible)}; default: all")
    add("--seeds", nargs="+", type=int, help="default: those of the group")
    add("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    add("--logs", type=Path, default=ROOT / "report" / "logs", help="where logs are kept")
    add("--table", action="store_true", help="train nothing, print the table")
    args = parser.parse_args(argv)
    if not args.table:
        threads = max(1, os.cpu_count() // args.jobs)
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            runs = []
            for seed in args.seeds or GROUPS[args.group].seeds:
                for name in args.runs:
                    job = (args.logs, args.group, name, seed, args.data, threads)
                    runs.append(pool.submit(make, *job))
            try:
                for run in runs:
                    run.result()
            except BaseException:
                # one failed, or Ctrl-C: begin no others
                pool.shutdown(cancel_futures=True)
                raise
    print(table(args.logs, args.group))

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

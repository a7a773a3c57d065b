"""
What does each part bring? Trains many small models that differ in one thing, keeps their logs, and prints the tables.

    python report/ablation.py tiny                  # 0.8M, Python's standard library as bytes; nothing to download
    python report/ablation.py small --data 'fineweb10B/*_train_*.bin' 'fineweb10B/*_val_*.bin'      # 7.6M, GPT-2's tokens
    python report/ablation.py d12 --jobs 1          # 124M on FineWeb: for a GPU
    python report/ablation.py tiny --table          # the tables again, out of the logs

Each run is train_gpt2.py with the flags below, in a process of its own; --jobs of them at a time, one thread each on a CPU.
A run whose log is there is not made again. Logs go to report/logs/GROUP/NAME.SEED/main.log, as train_gpt2.py wrote them
under a heading that says what made them. What train_gpt2.py has no flag for, because it was tried and left out or because
it is wrong, is one of the functions in PATCHES, which change the module before it trains.
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
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_gpt2

LOGS = ROOT / "report" / "logs"

# ---- what is tried without a flag -----------------------------------------------------------------------------------

def after_init(module_class, change):
    """From now on change(module, config) is called on every new module of that class."""
    init = module_class.__init__
    def changed(module, config):
        init(module, config)
        change(module, config)
    module_class.__init__ = changed

def whole_matrices():
    """Muon on the merged matrices as they are: queries, keys and values in one, gate and up in one."""
    def change(block, config):
        del block.attn.c_attn.weight.parts, block.mlp.c_fc.weight.parts
    after_init(train_gpt2.Block, change)

def matrix_per_head():
    """Muon on each head's queries, keys and values apart."""
    def change(attention, config):
        attention.c_attn.weight.parts = [attention.D] * (config.n_head + 2 * config.n_kv_head)
    after_init(train_gpt2.CausalSelfAttention, change)

def zero_projections():
    """The matrices that write into the residual stream start at zero, so that at first every block passes x on."""
    def change(model, config):
        for name, p in model.named_parameters():
            if name.endswith("c_proj.weight"):
                torch.nn.init.zeros_(p)
    after_init(train_gpt2.GPT, change)

def untied_head():
    """The head has a matrix of its own, which starts at zero: more parameters by one table."""
    def change(model, config):
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.transformer.wte.weight))
    after_init(train_gpt2.GPT, change)

def rope_by_head():
    """The homework's slip: a rotation that expects (B, T, heads, D) is handed (B, heads, T, D), so that the angle grows with
    the number of the head and is the same at every time."""
    apply_rope = train_gpt2.apply_rope
    train_gpt2.apply_rope = lambda x, cos, sin: apply_rope(x.transpose(1, 2), cos[:x.size(2)], sin[:x.size(2)]).transpose(1, 2)

PATCHES = {f.__name__: f for f in (whole_matrices, matrix_per_head, zero_projections, untied_head, rope_by_head)}

# ---- what is run ----------------------------------------------------------------------------------------------------

GROUPS = {  # steps; seeds; peak rates of Muon's and of AdamW's runs; the flags that all runs share
    "tiny": (600, (1, 2, 3), 4e-3, 2e-3, "--model tiny --val_loss_every 50 --log_every 10"),
    "small": (200, (1,), 4e-3, 1.2e-3, "--model d12 --n_layer 6 --n_head 4 --n_embd 128 --sequence_length 256 --batch_size 16 "
              "--total_batch_size 8192 --warmup_iters 8 --val_loss_every 20 --val_tokens 65536 --log_every 10"),
    "d12": (2000, (1, 2), 2.4e-3, 1.2e-3, "--model d12 --warmup_iters 100 --val_loss_every 125 --log_every 10")}
HOMEWORK = "--recipe homework --learning_rate "
RUNS = {  # name: (what it is, flags, share of the steps, patch)
    "today": ("the default", "", 1, None),
    "adamw": ("AdamW instead of Muon", "--optimizer adamw --learning_rate {adamw}", 1, None),
    "no_qk_norm": ("without QK-norm", "--no-qk_norm", 1, None),
    "cosine": ("cosine to a tenth instead of stable, then linear to zero",
               "--schedule cosine --learning_rate_decay_frac 0.1", 1, None),
    "learned": ("learned positions instead of RoPE", "--pos learned", 1, None),
    "gelu": ("GELU instead of SwiGLU", "--mlp gelu", 1, None),
    "layernorm": ("LayerNorm instead of RMSNorm", "--norm layernorm", 1, None),
    "all_heads": ("a key/value head for each query head", "--n_kv_head {n_head}", 1, None),
    "bias": ("with biases", "--bias", 1, None),
    "gpt2_today": ("GPT-2's architecture, today's recipe", "--arch gpt2", 1, None),
    "homework": ("the variant, the homework's recipe (AdamW)", HOMEWORK + "{adamw}", 1, None),
    "gpt2": ("GPT-2's architecture, the homework's recipe (AdamW)", "--arch gpt2 " + HOMEWORK + "{adamw}", 1, None),
    "homework_75": ("the variant with AdamW, 75 % of the tokens", HOMEWORK + "{adamw}", 0.75, None),
    "today_35": ("the default, 35 % of the tokens", "", 0.35, None),
    "whole_matrices": ("Muon on merged matrices as they are", "", 1, whole_matrices),
    "matrix_per_head": ("Muon on each head apart", "", 1, matrix_per_head),
    "zero_projections": ("output projections start at zero", "", 1, zero_projections),
    "untied_head": ("a head of its own, which starts at zero", "", 1, untied_head),
    "rope_by_head": ("RoPE turned by head instead of by time", "", 1, rope_by_head),
    "today_half": ("the default, half its rate", "--learning_rate {muon_half}", 1, None),
    "today_twice": ("the default, twice its rate", "--learning_rate {muon_twice}", 1, None),
    "adamw_half": ("the variant, the homework's recipe, half its rate", HOMEWORK + "{half}", 1, None),
    "adamw_twice": ("the variant, the homework's recipe, twice its rate", HOMEWORK + "{twice}", 1, None),
    "gpt2_half": ("GPT-2, the homework's recipe, half its rate", "--arch gpt2 " + HOMEWORK + "{half}", 1, None),
    "gpt2_twice": ("GPT-2, the homework's recipe, twice its rate", "--arch gpt2 " + HOMEWORK + "{twice}", 1, None)}

def flags_of(group, name, data):
    steps, _, muon, adamw, shared = GROUPS[group]
    _, flags, share, _ = RUNS[name]
    n_head = 12 if group == "d12" else 4
    flags = flags.format(adamw=f"{adamw:g}", half=f"{adamw / 2:g}", twice=f"{adamw * 2:g}", muon_half=f"{muon / 2:g}",
                         muon_twice=f"{muon * 2:g}", n_head=n_head)
    if "--learning_rate " not in flags:
        flags = f"--learning_rate {muon:g} {flags}"
    flags = f"{shared} --sample_every 0 --save_every 0 --num_iterations {round(share * steps)} {flags}"
    return shlex.split(flags) + ([f"--input_bin={data[0]}", f"--input_val_bin={data[1]}"] if data else [])

def machine():
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", cpuinfo.read_text())[1] if cpuinfo.exists() else platform.processor()
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores of {cpu}"

def make(group, name, seed, data, threads):
    """One run, in a folder that is thrown away but for its main.log."""
    out = LOGS / group / f"{name}.{seed}" / "main.log"
    if out.exists():
        return
    patch = RUNS[name][3]
    flags = [*flags_of(group, name, data), f"--seed={seed}"]
    program = ["report/ablation.py", "--patched", patch.__name__] if patch else ["train_gpt2.py"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / program[0], *program[1:], *flags, f"--output_dir={folder}/run"]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name}.{seed}: {done.stderr.strip()}")
        log = Path(folder, "run", "main.log").read_text()
    heading = (f"# python {shlex.join([*program, *flags])}\n# {datetime.date.today()}, {machine()}, {threads} threads, "
               f"python {platform.python_version()}, torch {torch.__version__}\n")
    out.parent.mkdir(parents=True, exist_ok=True)
    tmp = out.with_suffix(".tmp")
    tmp.write_text(heading + log)
    os.replace(tmp, out)  # a log that is there is a whole one
    print(out.parent.name, log.splitlines()[-1], flush=True)

# ---- the tables -----------------------------------------------------------------------------------------------------

def curves(group, name):
    """{seed: [(step, validation loss), ...]} of the runs that there are."""
    logs = (LOGS / group).glob(f"{name}.*/main.log")
    return {log.parent.suffix[1:]: [(int(step), float(loss)) for step, loss in re.findall(r"s:(\d+) tel:(\S+)", log.read_text())]
            for log in logs}

def passes(curve, loss):
    """The step at which a curve first is at loss, on straight lines between its points; None: it never is."""
    for (a, above), (b, below) in zip(curve, curve[1:]):
        if below <= loss:
            return a + (b - a) * (above - loss) / (above - below)

def table(group):
    """Markdown: the mean over seeds, the difference to the default's with its standard error, and the share of GPT-2's tokens
    after which a run is where GPT-2 with AdamW ends, each with the same seed: the same data in the same order."""
    steps, *_ = GROUPS[group]
    base, gpt2 = curves(group, "today"), curves(group, "gpt2")
    lines = ["| run | steps | validation loss | to the default | at GPT-2's end after | seeds |",
             "| --- | --- | --- | --- | --- | --- |"]
    for name, (what, _, share, _) in RUNS.items():
        runs = curves(group, name)
        if runs:
            both = [runs[seed][-1][1] - base[seed][-1][1] for seed in runs if seed in base]
            error = f" ± {statistics.stdev(both) / math.sqrt(len(both)):.3f}" if len(both) > 1 else ""
            change = f"{statistics.mean(both):+.3f}{error}" if name != "today" and both else ""
            ends = [passes(curve, gpt2[seed][-1][1]) for seed, curve in runs.items() if seed in gpt2]
            reached = f"{statistics.mean(ends) / steps:.0%}" if ends and None not in ends else "-"
            mean = statistics.mean(curve[-1][1] for curve in runs.values())
            lines.append(f"| {what} | {round(share * steps)} | {mean:.3f} | {change} | {reached} | {len(runs)} |")
    return "\n".join(lines)

def main(argv):
    if argv[:1] == ["--patched"]:
        PATCHES[argv[1]]()
        return train_gpt2.main(argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--data", nargs=2, metavar=("TRAIN", "VAL"), help="glob patterns of shards, in place of the preset's")
    parser.add_argument("--runs", nargs="+", choices=RUNS, metavar="NAME", help=f"some of {', '.join(RUNS)}; not given: all")
    parser.add_argument("--seeds", nargs="+", type=int, help="not given: those of the group")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--table", action="store_true", help="train nothing, print the table")
    args = parser.parse_args(argv)
    if not args.table:
        seeds = args.seeds or GROUPS[args.group][1]
        todo = [(args.group, name, seed, args.data) for seed in seeds for name in args.runs or RUNS]
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            for result in [pool.submit(make, *job, max(1, os.cpu_count() // args.jobs)) for job in todo]:
                result.result()
    print(table(args.group))

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

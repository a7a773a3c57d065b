"""
What does each part bring? Trains many small models that differ in one thing, keeps their logs, and
prints the tables of report/README.md.

    python report/ablation.py tiny              # 0.8M weights, the standard library as bytes
    python report/ablation.py medium --data 'web/text_train_*.bin'    # 17.6M, GPT-2's tokens
    python report/ablation.py medium --data 'web/text_train_*.bin' --steps 1220 --logs LONGER
    python report/ablation.py d12 --jobs 1      # 124M on FineWeb: for a GPU
    python report/ablation.py tiny --table      # the tables again, out of the logs

A group of runs shares a size: see GROUPS. What its runs differ in is in TRIALS.

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

# Experiments need what has no flag there: ideas that were tried and left out, and a known mistake.
# Each patch is a function that changes the module train_gpt2 before it trains.

def after_init(module_class, change):
    """From now on change(module, config) is called on every new module of that class."""
    init = module_class.__init__

    def changed(module, config):
        init(module, config)
        change(module, config)

    module_class.__init__ = changed

def only_losses():
    """Neither samples nor checkpoints: of these runs only the log is kept."""
    train_gpt2.print_sample = lambda *args, **options: None
    # True stands for "saved"; without it train_gpt2.py would end with an error
    train_gpt2.save_checkpoint = lambda path, state: True

def zero_projections():
    """The matrices that write into the residual stream start at zero: at first, a block is idle."""

    def change(model, config):
        for name, p in model.named_parameters():
            if name.endswith(("c_proj.weight", "c_down.weight")):
                torch.nn.init.zeros_(p)

    after_init(train_gpt2.GPT, change)

def untied_head():
    """The head has a matrix of its own, which starts at zero. (The log's MFLOP count it twice.)"""

    def change(model, config):
        table = model.transformer.wte.weight
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(table))

    after_init(train_gpt2.GPT, change)

def fp32_residual():
    """The residual stream stays in fp32 under autocast. (Only for models with RoPE.)"""

    # GPT.features() without the line that casts x to bf16
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

def optimizer_groups(optimizers):
    """{name: (optimizer, group)}: which optimizer has which parameters, and their settings.

    With Muon "table" is the embedding alone; with AdamW alone all matrices are in it, too. "gains"
    are all vectors.
    """
    adamw = optimizers[0]
    groups = {"table": (adamw, adamw.param_groups[0]), "gains": (adamw, adamw.param_groups[1])}
    if len(optimizers) > 1:
        muon = optimizers[1]
        groups["matrices"] = (muon, muon.param_groups[0])
    return groups

def after_make_optimizers(change):
    """From now on change(optimizers, args) is called on whatever make_optimizers() returns."""
    make_optimizers = train_gpt2.make_optimizers

    def changed(model, args, dtype):
        optimizers = make_optimizers(model, args, dtype)
        change(optimizers, args)
        return optimizers

    train_gpt2.make_optimizers = changed

def before_step(optimizer, change):
    """From now on change() is called before each of the optimizer's steps."""
    optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: change())

def scale_rate(name, factor):
    """One group's learning rate is `factor` times that of the others."""

    def change(optimizers, args):
        optimizer, group = optimizer_groups(optimizers)[name]
        # train() sets lr anew before each step, so the factors do not pile up
        before_step(optimizer, lambda: group.update(lr=group["lr"] * factor))

    after_make_optimizers(change)

def warm_up_momentum(steps):
    """Muon's momentum grows from 0.85 to 0.95 in the first steps."""

    def change(optimizers, args):
        muon, group = optimizer_groups(optimizers)["matrices"]
        step = 0

        def grow():
            nonlocal step
            group["momentum"] = 0.85 + 0.1 * min(1, step / steps)
            step += 1

        before_step(muon, grow)

    after_make_optimizers(change)

def cautious_decay():
    """Weight decay only where it pulls in the direction in which the step goes anyway.

    (https://arxiv.org/abs/2510.12402.) The optimizers have applied all of it when their step is
    done: what was too much is given back.
    """

    def change(optimizers, args):
        for optimizer in optimizers:
            before = {}

            # before=before: each hook keeps its own optimizer's dictionary, not the loop's last one
            def remember(optimizer, args, kwargs, before=before):
                for group in optimizer.param_groups:
                    for p in group["params"]:
                        before[p] = p.detach().clone()

            @torch.no_grad()
            def give_back(optimizer, args, kwargs, before=before):
                for group in optimizer.param_groups:
                    for p in group["params"]:
                        decay = group["lr"] * group["weight_decay"] * before[p]
                        # the optimizer has just done p = before - decay - update
                        update = before[p] - decay - p
                        # Of one sign, both pull towards 0, and decay stays. Else p gets it back.
                        against = update * before[p] < 0
                        p.add_(torch.where(against, decay, 0.0))

            optimizer.register_step_pre_hook(remember)
            optimizer.register_step_post_hook(give_back)

    after_make_optimizers(change)

def average_weights(decay):
    """Validation sees a running average of the weights: `decay` of the old one at each step."""
    make_optimizers = train_gpt2.make_optimizers
    evaluate = train_gpt2.evaluate

    def changed(model, args, dtype):
        optimizers = make_optimizers(model, args, dtype)
        average = [p.detach().clone() for p in model.parameters()]
        steps = 0

        @torch.no_grad()
        def update_average(optimizer, args, kwargs):
            nonlocal steps
            # in the first steps a shorter memory, or it would hold on to where training began
            weight_of_old = min(decay, steps / (steps + 10))
            steps += 1
            for mean, p in zip(average, model.parameters(), strict=True):
                mean.lerp_(p, 1 - weight_of_old)

        @torch.no_grad()
        def swap():
            """The model gets the average, and `average` the trained weights, or back again."""
            for mean, p in zip(average, model.parameters(), strict=True):
                trained = p.clone()
                p.copy_(mean)
                mean.copy_(trained)

        def evaluate_average(*args):
            swap()
            loss = evaluate(*args)
            swap()
            return loss

        # the last optimizer: after its step all weights are new
        optimizers[-1].register_step_post_hook(update_average)
        # replaced here and not above, because swap() needs this run's average
        train_gpt2.evaluate = evaluate_average
        return optimizers

    train_gpt2.make_optimizers = changed

def low_beta():
    """AdamW's average of the gradients forgets sooner: beta1 is 0.8 instead of 0.9."""

    def change(optimizers, args):
        for group in optimizers[0].param_groups:
            group["betas"] = (0.8, 0.95)

    after_make_optimizers(change)

def rope_base(base):
    """Another base for the angles of rotary positions."""
    rope_tables = train_gpt2.rope_tables
    train_gpt2.rope_tables = functools.partial(rope_tables, base=base)

PATCHES = {
    "only_losses": only_losses,
    "table_half": functools.partial(scale_rate, "table", 0.5),
    "table_twice": functools.partial(scale_rate, "table", 2),
    "gains_4": functools.partial(scale_rate, "gains", 4),
    "matrices_half": functools.partial(scale_rate, "matrices", 0.5),
    "matrices_twice": functools.partial(scale_rate, "matrices", 2),
    "warm_momentum": functools.partial(warm_up_momentum, 60),
    "cautious_decay": cautious_decay,
    "average": functools.partial(average_weights, 0.95),
    "rope_1024": functools.partial(rope_base, 1024.0),
    "beta_08": low_beta,
    "zero_projections": zero_projections,
    "untied_head": untied_head,
    "fp32_residual": fp32_residual,
    "rope_by_head": rope_by_head,
}

# -------------------------------------------------------------------------------------------------
# 2. What is run

@dataclass
class Trial:
    """One row of a table."""

    what: str
    flags: str | None = ""  # None: train_gpt2.py can no longer do it, and its old log is shown
    patch: str = ""  # of PATCHES, several with commas in between
    rate: float = 1.0  # times the group's rate for the optimizer
    share: float = 1.0  # of the group's steps

ORIGINAL = "--recipe original"
GPT2 = "--arch gpt2"
# A name is its log's folder. "homework" was the first version's word for the original recipe, and
# {n_head} in a flag stands for the group's number of heads. What the recipes and architectures come
# to, and what each part of them brings:
PARTS = {
    "today": Trial("the default"),
    "adamw": Trial("AdamW instead of Muon", "--optimizer adamw"),
    "no_qk_norm": Trial("without QK-norm", "--no-qk_norm"),
    "cosine": Trial("a cosine to a tenth instead of stable, then linear", "--schedule cosine"),
    "learned": Trial("learned positions instead of RoPE", "--pos learned"),
    "gelu": Trial("GELU instead of SwiGLU", "--mlp gelu"),
    "layernorm": Trial("LayerNorm instead of RMSNorm", "--norm layernorm"),
    "all_heads": Trial("a key/value head for each query head", "--n_kv_head {n_head}"),
    "bias": Trial("with biases", "--bias"),
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
}
RATES = {
    "today_half": Trial("the default, half its rate", rate=0.5),
    "today_twice": Trial("the default, twice its rate", rate=2),
    "adamw_half": Trial("the variant, the original recipe, half its rate", ORIGINAL, rate=0.5),
    "adamw_twice": Trial("the variant, the original recipe, twice its rate", ORIGINAL, rate=2),
    "gpt2_half": Trial("GPT-2, the original recipe, half its rate", f"{GPT2} {ORIGINAL}", rate=0.5),
    "gpt2_twice": Trial("GPT-2, the original recipe, twice its rate", f"{GPT2} {ORIGINAL}", rate=2),
}
# One of the two optimizers' rates alone
RATES_APART = {
    "matrices_half": Trial("half Muon's rate", patch="matrices_half"),
    "matrices_twice": Trial("twice Muon's rate", patch="matrices_twice"),
    "table_half": Trial("half the embedding's rate", patch="table_half"),
    "table_twice": Trial("twice the embedding's rate", patch="table_twice"),
}
# The five with the lowest losses with the first seed. The fifth is a flag: no weight decay.
HELPED = "warm_momentum,beta_08,gains_4,table_twice"
IDEAS = {
    "warm_momentum": Trial("Muon's momentum warmed up, 0.85 to 0.95", patch="warm_momentum"),
    "cautious_decay": Trial("cautious weight decay", patch="cautious_decay"),
    "no_decay": Trial("no weight decay", "--weight_decay 0"),
    "average": Trial("an average of the last weights", patch="average"),
    "gains_4": Trial("four times the gains' rate", patch="gains_4"),
    "rope_1024": Trial("RoPE's base 1,024 instead of 10,000", patch="rope_1024"),
    "beta_08": Trial("AdamW's first beta 0.8 instead of 0.9", patch="beta_08"),
    "together": Trial("the five that helped most, together", "--weight_decay 0", patch=HELPED),
}
TRIALS = PARTS | RATES | RATES_APART | IDEAS

@dataclass
class Group:
    """What all runs of one size share."""

    steps: int
    seeds: tuple
    runs: list  # names of trials
    flags: str
    muon: float = 4e-3  # the peak rate of runs with Muon
    adamw: float = 2e-3  # and of those with AdamW alone
    warmup: int = 20  # steps: the same for both recipes

MAIN_RUNS = ["today", "homework", "gpt2", "homework_75", "today_35"]
TINY = "--model tiny --val_loss_every 50"
# d12 shrunk to 7.6M weights
SMALL = (
    "--model d12 --n_layer 6 --n_head 4 --n_embd 128 --sequence_length 256 --batch_size 16 "
    "--total_batch_size 8192 --val_loss_every 20 --val_tokens 65536"
)
# and to 17.6M, 12.9M of them in the table
MEDIUM = (
    "--model d12 --n_layer 6 --n_head 4 --n_embd 256 --sequence_length 512 --batch_size 8 "
    "--total_batch_size 8192 --val_loss_every 40 --val_tokens 65536 --compile"
)
GROUPS = {
    "tiny": Group(
        steps=600, seeds=(1, 2, 3),
        runs=[*PARTS, *RATES],
        flags=TINY,
    ),
    "ideas": Group(
        steps=600, seeds=(1, 2, 3, 4, 5),
        runs=["today", *IDEAS, "table_twice"],
        flags=TINY,
    ),
    "width_128": Group(
        steps=300, seeds=(1,),
        runs=["today", *RATES_APART],
        flags=TINY,
    ),
    "width_256": Group(
        steps=300, seeds=(1,),
        runs=["today", *RATES_APART],
        flags=f"{TINY} --n_embd 256 --n_head 8",
    ),
    "width_512": Group(
        steps=300, seeds=(1,),
        runs=["today", *RATES_APART],
        flags=f"{TINY} --n_embd 512 --n_head 16",
    ),
    "small": Group(
        steps=200, seeds=(1,), adamw=1.2e-3, warmup=8,
        runs=[*MAIN_RUNS, "gpt2_half", "gpt2_twice"],
        flags=SMALL,
    ),
    "medium_rates": Group(
        steps=122, seeds=(1,), adamw=2.4e-3,
        runs=["today", "homework", "gpt2", *RATES],
        flags=MEDIUM,
    ),
    "medium": Group(
        steps=366, seeds=(1,), adamw=2.4e-3,
        runs=MAIN_RUNS,
        flags=MEDIUM,
    ),
    "d12": Group(
        steps=2000, seeds=(1, 2), muon=2.4e-3, adamw=1.2e-3, warmup=100,
        runs=MAIN_RUNS,
        flags="--model d12 --val_loss_every 125",
    ),
}

def arguments(group, name, seed, data):
    """The arguments with which this file, in a process of its own, makes the run."""
    shared = GROUPS[group]
    trial = TRIALS[name]
    patches = ["only_losses"]
    if trial.patch:
        patches.append(trial.patch)
    with_muon = "adamw" not in trial.flags and ORIGINAL not in trial.flags
    rate = trial.rate * (shared.muon if with_muon else shared.adamw)
    argv = ["--patched", ",".join(patches), *shlex.split(shared.flags)]
    # how many heads models of this group have, by their flags or by their preset
    args, _ = train_gpt2.parse_args(shlex.split(shared.flags))
    argv += shlex.split(trial.flags.format(n_head=args.n_head))
    steps = round(trial.share * shared.steps)
    # a short run should not be all warm-up
    warmup = min(shared.warmup, steps // 10)
    argv += [f"--learning_rate={rate:g}", f"--warmup_iters={warmup}", f"--num_iterations={steps}"]
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
    # this file again: main() knows the process that makes one run by its --patched
    argv = ["report/ablation.py", *arguments(group, name, seed, data)]
    wanted = re.findall(r"--num_iterations=(\d+)", " ".join(argv))[-1]
    if out.exists():
        made = re.findall(r"--num_iterations[ =](\d+)", out.read_text("utf-8"))
        if made and made[-1] != wanted:
            sys.exit(f"error: {out} has {made[-1]} steps, not {wanted}: give another --logs")
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / argv[0], *argv[1:], f"--output_dir={folder}/run"]
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip().removeprefix("error: ")
            sys.exit(f"error: {name}.{seed}: {reason}")
        log = Path(folder, "run", "main.log").read_text("utf-8")
    flops = re.search(r"[\d.,]+ MFLOP a token", done.stdout)[0]
    heading = (
        f"# python {shlex.join(argv)}\n# {datetime.date.today()}, {machine()}, {threads} threads, "
        f"python {platform.python_version()}, torch {torch.__version__}, {flops}\n"
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
    # the dot, or "today" would match "today_35", too
    for log in (logs / group).glob(f"{name}.*/main.log"):
        seed = log.parent.suffix[1:]
        # a resumed run writes a step twice; in a dictionary the later line wins
        losses = dict(re.findall(r"s:(\d+) tel:(\S+)", log.read_text("utf-8")))
        result[seed] = sorted((int(step), float(loss)) for step, loss in losses.items())
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
    """The mean of some paired differences, with its standard error, and whether it says anything.

    It does if there are three or more, and if their mean is at least two standard errors from 0.
    """
    mean = statistics.mean(differences)
    words = f"{mean:+.3f}"
    if len(differences) == 1:
        return f"{words}, one seed, not told apart from noise"
    # how far the mean of so many seeds may be from the mean of all seeds
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    words += f" ± {error:.3f}"
    if len(differences) < 3 or abs(mean) < 2 * error:
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
    trial = TRIALS[name]
    runs = curves(logs, group, name)
    default = curves(logs, group, "today")
    gpt2 = curves(logs, group, "gpt2")
    end = {seed: curve[-1][1] for seed, curve in runs.items()}

    differences = [end[seed] - default[seed][-1][1] for seed in runs if seed in default]
    change = ""
    if name != "today" and differences:
        change = difference_in_words(differences)

    some_run = next(iter(runs.values()))
    cells = [trial.what, str(some_run[-1][0])]
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
    lines += [row(logs, group, name) for name in TRIALS if curves(logs, group, name)]
    return "\n".join(lines)

# -------------------------------------------------------------------------------------------------

def main(argv):
    if argv[:1] == ["--patched"]:
        # make() starts this file again for each run: this process trains one, and ends
        for name in argv[1].split(","):
            PATCHES[name]()
        return train_gpt2.main(argv[2:])
    show_as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=show_as_written)
    possible = [name for name, trial in TRIALS.items() if trial.flags is not None]
    add = parser.add_argument
    add("group", choices=GROUPS)
    add("--data", metavar="PATTERN", help="training shards, as --input_bin; default: the preset's")
    add("--runs", nargs="+", choices=possible, metavar="NAME",
        help=f"some of {', '.join(possible)}; default: those of the group")
    add("--seeds", nargs="+", type=int, help="default: those of the group")
    add("--steps", type=int, help="of a whole run; default: those of the group")
    add("--jobs", type=int, default=1 if torch.cuda.is_available() else os.cpu_count(),
        help="runs at a time; default: one on a GPU, else one for each core")
    add("--logs", type=Path, default=ROOT / "report" / "logs", help="where logs are kept")
    add("--table", action="store_true", help="train nothing, print the table")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error("--jobs must be at least 1")
    group = GROUPS[args.group]
    if args.steps:
        group.steps = args.steps
    names = args.runs or [name for name in group.runs if name in possible]
    if not args.table:
        threads = max(1, os.cpu_count() // args.jobs)
        # these threads only wait: the work is done in the processes that make() starts
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            futures = []
            for seed in args.seeds or group.seeds:
                for name in names:
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

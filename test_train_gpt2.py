"""
Tests: first that it learns at all, then a section for each chapter. Run them with

    python -m pytest -q

which also runs report/test_report.py. They need no GPU and no network. A test that needs a package
or a file that a user may not have is skipped. Every test begins in its own empty folder.
"""

import dataclasses
import fnmatch
import functools
import glob
import http.server
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fineweb
import hellaswag
import train_gpt2
from train_gpt2 import GPT, GPTConfig, TokenLoader, main

# no test may depend on a GPU, and the models are too small for more threads
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
torch.set_num_threads(1)
# it may be relative, and every test changes the folder
VOCABULARY = os.environ.get("TIKTOKEN_CACHE_DIR")
if VOCABULARY:
    os.environ["TIKTOKEN_CACHE_DIR"] = os.path.abspath(VOCABULARY)

SCRIPT = Path(train_gpt2.__file__).resolve()
ROOT = SCRIPT.parent
CPU = torch.device("cpu")
GPT2_ARCH = {"n_kv_head": 4, **train_gpt2.GPT2}


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every test begins in an empty folder, without a GPU, and has short samples."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **how: None)
    short = functools.partial(train_gpt2.sample, max_new_tokens=20)
    monkeypatch.setattr(train_gpt2, "sample", short)
    yield
    # main() replaces the signal handlers; restore them
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture
def small(tmp_path):
    """The flags of a small run, a shrunken d12 that learns sums. A flag added at the end wins."""
    rng = np.random.default_rng(0)
    for name, lines in ("train_000001", 2000), ("train_000002", 900), ("val_000000", 400):
        text = "".join(f"{a} plus {b} is {a + b}.\n" for a, b in rng.integers(0, 100, (lines, 2)))
        ids = np.concatenate(([256], np.frombuffer(text.encode(), np.uint8)))
        fineweb.write_shard(tmp_path / f"sums_{name}.bin", ids, 257)
    return [
        "--model=d12", "--n_layer=2", "--n_head=4", "--n_kv_head=2", "--n_embd=32",
        "--sequence_length=32", "--total_batch_size=512", "--num_iterations=6",
        "--val_loss_every=3", "--val_tokens=2048", "--dtype=float32", "--device=cpu",
        "--output_dir=log", f"--input_bin={tmp_path}/sums_train_*.bin",
    ]


def fails(argv, *messages, main=main):
    """main(argv) exits with a one-line error that contains all the messages."""
    with pytest.raises(SystemExit) as e:
        main(argv)
    line = str(e.value.code)
    assert line.startswith("error: ") and "\n" not in line, line
    assert all(message in line for message in messages), line


def log_of(folder="log", kind="trl"):
    """{step: loss} out of a folder's main.log. A step that was run twice counts the second time."""
    log = Path(folder, "main.log").read_text("utf-8")
    return {int(s): float(loss) for s, loss in re.findall(rf"^s:(\d+) {kind}:(\S+)", log, re.M)}

NORM = r"trl:\S+ lr:\S+ norm"  # log_of(kind=NORM): the norms of the gradients

load = functools.partial(torch.load, weights_only=True)


def assert_close_logs(a, b, rel):
    """Two folders have the same losses and gradient norms, up to a relative error."""
    for kind in "trl", "tel", NORM:
        assert log_of(a, kind) == pytest.approx(log_of(b, kind), rel=rel, abs=0)


def assert_same_run(a, b):
    """Two folders have the same losses, and checkpoints with the same weights, bit for bit."""
    assert_close_logs(a, b, rel=0)
    for name in "last.pt", "best.pt":
        models = (load(f"{folder}/{name}")["model"] for folder in (a, b))
        torch.testing.assert_close(*models, rtol=0, atol=0)


def tiny_model(shake=0.0, **changes):
    """A small random model. shake: moves its weights, so that no gain is 1 and no bias 0."""
    shape = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "block_size": 32}
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**shape, "vocab_size": 100, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(shake * torch.randn_like(p))
    return model


def random_ids(*shape, below=100):
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(1))


# -------------------------------------------------------------------------------------------------
# 0. The whole

def test_overfits_a_single_batch(small):
    """If model, loss, gradients, and optimizers are right, it memorizes a batch. With
    --val_loss_every=0 it validates only at the end, and --grad_clip=0 disables clipping."""
    main([*small, "--overfit_single_batch", "--n_embd=128", "--num_iterations=40",
          "--total_batch_size=128", "--learning_rate=6e-3", "--val_loss_every=0", "--grad_clip=0"])
    losses = log_of()
    assert abs(losses[0] - math.log(257)) < 0.5 and losses[39] < 0.05, losses
    assert list(log_of(kind="tel")) == [40]


# -------------------------------------------------------------------------------------------------
# 1. The model

def test_rope_depends_on_relative_positions():
    """One query and one key at all positions: only their offset counts."""
    torch.manual_seed(0)
    tables = train_gpt2.rope_tables(64, 16)
    q, k = (train_gpt2.apply_rope(torch.randn(16).expand(1, 64, 1, 16), *tables) for _ in "qk")
    scores = q[0, :, 0] @ k[0, :, 0].T
    for offset in 0, 1, 7, 40:
        assert scores.diagonal(-offset).std() < 1e-4
    assert scores[:, 0].std() > 0.1


@pytest.mark.parametrize("arch", [{}, GPT2_ARCH], ids=["variant", "GPT-2"])
def test_no_position_sees_the_future(arch):
    model = tiny_model(**arch)
    x = random_ids(1, 32)
    a = model(x)[0]
    x[0, 20] = (x[0, 20] + 1) % 100
    b = model(x)[0]
    assert torch.equal(a[:20], b[:20]) and not torch.allclose(a[20:], b[20:])


class LooksLikeCuda(torch.Tensor):
    """A tensor in the computer's memory that says it is on a GPU."""

    device = torch.device("cuda")


def plain_attention(q, k, v):
    """The plain form in causal_attention's docstring, run as it stands there."""
    doc = train_gpt2.causal_attention.__doc__
    code = re.search(r"^ +B, n_head.*?return.*?$", doc, re.M | re.S)[0]
    names = dict(vars(train_gpt2))
    exec(f"def plain(q, k, v):\n{code}", names)
    return names["plain"](q, k, v)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("kind", [torch.Tensor, LooksLikeCuda])
def test_attention_is_its_plain_form(kind, dtype, tolerance):
    """On a CPU, and with what a GPU gets."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 16, 8, dtype=dtype) for n in (4, 2, 2))
    y = train_gpt2.causal_attention(*(x.as_subclass(kind) for x in (q, k, v)))
    y_plain = plain_attention(q.float(), k.float(), v.float())
    assert torch.allclose(y.as_subclass(torch.Tensor).float(), y_plain, atol=tolerance)


def test_the_worked_example_of_attention():
    """Its scores give the masked scores, weights and outputs beside them."""
    rows = re.findall(r"^ +(-?\d\.\d .*)", train_gpt2.causal_attention.__doc__, re.M)
    table = torch.tensor([[float(x) for x in row.split()] for row in rows])
    scores, masked, weights, output = table.split([3, 3, 3, 1], dim=1)
    future = torch.ones(3, 3).triu(1).bool()
    assert torch.equal(masked, scores.masked_fill(future, -math.inf))
    # if k is the identity, the scores are q / sqrt(D); where v is the identity, y is the weights
    v = torch.cat((torch.eye(3), torch.tensor([[10.0], [20.0], [30.0]])), dim=1)
    y = plain_attention(*(x.view(1, 1, 3, -1) for x in (scores * math.sqrt(3), torch.eye(3), v)))
    assert torch.allclose(y[0, 0, :, :3], weights, atol=0.0051)
    assert torch.allclose(y[0, 0, :, 3:], output, atol=0.051)


def test_initial_weights():
    """N(0, 0.02^2), smaller where a layer writes into the residual stream; a first loss of ln V.
    A parameter that no rule covers raises."""
    model = tiny_model(n_layer=8, n_embd=128, **GPT2_ARCH)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name
        else:
            scale = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(scale, rel=0.1), name
    x = random_ids(8, 33)
    assert abs(model(x[:, :-1], x[:, 1:]).item() - math.log(100)) < 0.1

    model.experts = nn.Parameter(torch.zeros(2, 32, 32))
    with pytest.raises(ValueError, match="experts"):
        model.init_weights()


# -------------------------------------------------------------------------------------------------
# 2. The loss

def test_the_loss():
    """The mean of -log softmax(logits)[target] in fp32. A vocabulary of 100 is padded to 128: the
    other ids are never predicted, and their rows learn nothing."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[100:] = 50.0
    x, y = random_ids(2, 2, 32)
    logits = model(x)
    assert logits.shape == (2, 32, 100) and logits.dtype == torch.float32
    p = logits.exp() / logits.exp().sum(dim=-1, keepdim=True)
    loss = model(x, y)
    assert torch.allclose(loss, -p.gather(-1, y[..., None]).log().mean())
    loss.backward()
    assert not model.lm_head.weight.grad[100:].any() and model.lm_head.weight.grad[:100].any()


def test_a_compiled_run_is_the_same(small, monkeypatch):
    """Training and validation are one graph each. Samples have many lengths, so they are not."""
    small += ["--optimizer=adamw", "--n_layer=1", "--num_iterations=2", "--val_loss_every=1"]
    main([*small, "--output_dir=plain"])
    # everything except code generation, which needs a C++ compiler
    compile = functools.partialmethod(GPT.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(GPT, "compile", compile)
    torch._dynamo.utils.counters.clear()
    main([*small, "--compile"])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert_close_logs("log", "plain", 1e-4)
    assert load("log/best.pt")["model"].keys() == load("plain/best.pt")["model"].keys()


# -------------------------------------------------------------------------------------------------
# 3. The data

def counting_shards(sizes, T, seed=7):
    """A loader over shards of running numbers, so that a token says where it comes from."""
    starts = np.cumsum((0, *sizes))
    for i, n in enumerate(sizes):
        fineweb.write_shard(f"count_train_{i:06d}.bin", np.arange(starts[i], starts[i] + n), 50257)
    return TokenLoader("count_train_*.bin", T, seed)


def test_every_row_once_an_epoch():
    """Only the last few tokens of a shard are unused. A row lies within one shard. Each epoch and
    seed has its own order over the rows of all shards."""
    def read(first, count, seed=7):
        x, y = counting_shards(sizes, 16, seed).batch(first, count, CPU)
        assert x.dtype == torch.int64 and x.is_contiguous() and y.is_contiguous()
        assert torch.equal(x[:, 1:], y[:, :-1])
        return torch.cat((x, y[:, -1:]), dim=1).tolist()

    sizes = (1000, 333, 64, 10, 777)
    ends = np.cumsum(sizes)
    rows = [list(range(i, i + 17)) for end, n in zip(ends, sizes, strict=True)
            for i in range(end - n, end - 16, 16)]
    n = len(rows)
    both = read(0, 2 * n)
    assert sorted(both[:n]) == sorted(both[n:]) == rows
    assert both[:n] != both[n:] and both[:n] != read(0, n, seed=8)
    # the first rows are from several shards
    assert len({np.searchsorted(ends, row[0], side="right") for row in both[:12]}) > 1
    # a resumed run begins anywhere
    assert read(n - 2, 4) == both[n - 2:n + 2]
    loader = counting_shards(sizes, 16)
    loader.vocab_size = 1000
    with pytest.raises(SystemExit, match="count_train_00000[1-4].bin has ids >= 1000"):
        loader.batch(0, n, CPU)


@pytest.mark.parametrize("world_size, batch_size", [(1, 1), (1, 16), (1, 500), (2, 16), (3, 4)])
def test_validation_counts_each_sequence_once(world_size, batch_size, monkeypatch):
    """For any batch size and number of processes: a part of the data, or all there is."""
    data = counting_shards((500, 600, 700), 16)
    model = nn.Linear(1, 1)
    model.forward = lambda x, y: y.double().mean()
    for num_tokens, count in (40 * 16 + 5, 40), (10**6, data.total):
        parts = []
        for rank in range(world_size):
            monkeypatch.setattr(train_gpt2, "this_process", lambda rank=rank: (rank, world_size))
            parts.append(train_gpt2.evaluate(model, data, num_tokens, batch_size))
        # the mean of the ids, which a sequence that is missing or counted twice would change
        assert sum(parts) == pytest.approx(data.batch(0, count, CPU)[1].double().mean().item())


# -------------------------------------------------------------------------------------------------
# 4. The optimizer

def test_schedules():
    """A cosine has gone a quarter of its way where a straight line has gone a third. However long
    the warmup, a step changes the rate by at most two hundredths."""
    def rates(schedule, warmup_iters, steps, n=19000):
        return [train_gpt2.get_lr(step, n, 2.0, warmup_iters, schedule) / 2.0 for step in steps]

    wanted = [0.1, 0.55, 1, 0.1 + 0.9 * 0.75, 0.55, 0.1]
    assert rates("cosine", 700, [0, 350, 700, 6800, 9850, 19000]) == pytest.approx(wanted)
    steps = [0, 350, 700, 5700, 12350, 19000]
    assert rates("wsd", 700, steps) == pytest.approx([0.1, 0.55, 1, 1, 0.5, 0])
    for schedule in "wsd", "cosine":
        for warmup_iters in 0, 500, 900:
            curve = rates(schedule, warmup_iters, range(1000), 1000)
            assert curve[0] == (0.1 if warmup_iters else 1)
            assert 0 < min(curve) and max(curve) <= 1 and np.abs(np.diff(curve)).max() < 0.02


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_each_optimizer_has(optimizer):
    """Vectors do not decay, Muon has the blocks' matrices, and only frozen ones are left out."""
    model = tiny_model(**GPT2_ARCH)
    model.transformer.h[0].experts = nn.Parameter(torch.zeros(2, 32, 32))  # 3-D: AdamW
    model.transformer.h[0].attn.c_q.requires_grad_(False)
    wanted = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            kind = "Muon" if optimizer == "muon" and ".h." in name and p.dim() == 2 else "AdamW"
            wanted.append((name, kind, 0.3 if p.dim() > 1 else 0.0))
    names = {p: name for name, p in model.named_parameters()}
    found = [(names[p], type(one).__name__, group["weight_decay"])
             for one in train_gpt2.make_optimizers(model, optimizer, 1e-3, 0.3)
             for group in one.param_groups for p in group["params"]]
    assert sorted(found) == sorted(wanted)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon")
def test_muon_is_pytorchs():
    """It takes the same steps as torch.optim.Muon on wide, tall, and square matrices."""
    models = [tiny_model(shake=1.0) for _ in range(3)]
    ours, theirs, begin = ([p for p in model.transformer.h.parameters() if p.dim() == 2]
                           for model in models)
    _, muon = train_gpt2.make_optimizers(models[0], "muon", 0.01, 0.1)
    pytorchs = torch.optim.Muon(theirs, 0.01, 0.1, 0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = q.grad = torch.randn_like(p)
        muon.step()
        pytorchs.step()
    for p, q, first in zip(ours, theirs, begin, strict=True):
        # as close as bf16 gets: small beside the way that they have gone
        assert (p - q).norm() < 0.05 * (q - first).norm()


def test_the_worked_example_of_orthogonalize():
    """The three lines of its docstring, and the interval named below them."""
    doc = train_gpt2.orthogonalize.__doc__
    lines = re.findall(r"(\[\[.*\]\]) +(?:singular values )?([\d.]+), ([\d.]+)", doc)
    X = torch.tensor(json.loads(lines[0][0])).float()
    U, _, Vh = torch.linalg.svd(X)
    matrices = X, U @ Vh, train_gpt2.orthogonalize(X[None])[0]
    for ours, (shown, *values) in zip(matrices, lines, strict=True):
        assert torch.allclose(ours, torch.tensor(json.loads(shown)).float(), atol=0.0051)
        values = sorted(map(float, values), reverse=True)
        assert torch.linalg.svdvals(ours).tolist() == pytest.approx(values, abs=0.0051)
    # diagonal matrices of norm 1, whose singular values are their entries
    s = torch.linspace(1 / 500, 1, 20_001).double()
    moved = train_gpt2.orthogonalize(torch.diag_embed(torch.stack((s, (1 - s * s).sqrt()), dim=1)))
    interval = re.search(r"between\s+1/500 and 1 to between (\S+) and (\S+) ", doc).groups()
    assert tuple(f"{limit:.2f}" for limit in moved[:, 0, 0].aminmax()) == interval


# -------------------------------------------------------------------------------------------------
# 5. The hyperparameters

VARIANT = dict(norm="rmsnorm", mlp="swiglu", pos="rope", bias=False, qk_norm=True)


@pytest.mark.parametrize("flags, values", [
    ("", dict(
        VARIANT, num_params=828_800, n_layer=4, n_head=4, n_kv_head=2, n_embd=128,
        sequence_length=128, total_batch_size=2048, num_iterations=600, warmup_iters=20,
        learning_rate=4e-3, val_loss_every=200, compile=False, output_dir="logtiny")),
    ("--model=d12", dict(
        VARIANT, num_params=116_510_976, n_layer=12, n_head=12, n_kv_head=6, n_embd=768,
        sequence_length=1024, total_batch_size=524288, num_iterations=19073, warmup_iters=250,
        learning_rate=2.4e-3, val_loss_every=250, compile=None, output_dir="log124M",
        optimizer="muon", schedule="wsd", weight_decay=0.1, grad_clip=1.0, mflop=812)),
    ("--model=d24", dict(num_params=329_961_472)), ("--model=d36", dict(num_params=719_191_808)),
    ("--model=d48", dict(num_params=1_560_122_944, n_kv_head=25, learning_rate=8e-4)),
    ("--model=d12 --arch=gpt2 --n_head=8 --pos=rope",
     dict(train_gpt2.GPT2, n_kv_head=8, pos="rope", optimizer="muon")),
    # OpenAI's number, and 47 rows that pad the vocabulary
    ("--model=d12 --arch=gpt2", dict(num_params=124_439_808 + 47 * 768)),
    ("--model=d12 --recipe=original --optimizer=muon",
     dict(optimizer="muon", schedule="cosine", qk_norm=False, learning_rate=1.2e-3,
          warmup_iters=715)),
    # a short run warms up for a tenth of it, unless something else is typed
    ("--model=d12 --num_iterations=150", dict(warmup_iters=15)),
    ("--model=d12 --num_iterations=150 --warmup_iters=100", dict(warmup_iters=100)),
])
def test_presets_and_recipes(flags, values):
    """Value by value; and a flag beside a preset, --arch or --recipe wins."""
    args = train_gpt2.parse_args(flags.split())
    vocab_size = 257 if args.model == "tiny" else 50257
    model = train_gpt2.make_model(args, vocab_size, torch.device("meta"))
    settings = vars(args) | dataclasses.asdict(model.config)
    settings["num_params"] = sum(p.numel() for p in model.parameters())
    settings["mflop"] = round(train_gpt2.flops_per_token(model) / 1e6)
    assert {name: settings[name] for name in values} == values


# -------------------------------------------------------------------------------------------------
# 6. Training

def test_train_is_its_plain_form(small, capsys):
    """The lines at the head of section 6, run as they stand but for 600 steps, are the default run:
    the same losses to rounding, in training and in validation."""
    folder = Path(f"stdlib_py{sys.version_info.major}.{sys.version_info.minor}")
    folder.mkdir()
    for name in "train_000001", "val_000000":
        shutil.copy(f"sums_{name}.bin", folder / f"stdlib_{name}.bin")
    main(["--num_iterations=3", "--warmup_iters=20", "--val_loss_every=0", "--device=cpu",
          "--dtype=float32"])
    text = SCRIPT.read_text("utf-8").split("\n# 6. Training")[1].split("# You could train")[0]
    code = "\n".join(re.findall("^#     (.*)", text, re.M)).replace("600", "3")
    code = code.replace("loss.backward()", "losses.append(loss.item()); loss.backward()")
    names = vars(train_gpt2) | {"losses": []}
    capsys.readouterr()
    exec(code, names)
    assert names["losses"] == pytest.approx(list(log_of("logtiny").values()), rel=1e-5)
    val_loss = float(capsys.readouterr().out)
    assert val_loss == pytest.approx(log_of("logtiny", "tel")[3], rel=1e-5)
    assert max(log_of("logtiny", NORM).values()) > 1  # gradients were clipped


def test_dropout_is_off_except_in_training(small):
    """Every module is in training mode in the steps alone, also after a sample."""
    seen = set()
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.add((module.training, torch.is_grad_enabled())))
    main(small)
    main(["--sample=log/best.pt", "--device=cpu"])
    hook.remove()
    assert seen == {(True, True), (False, False)}


class Crash(Exception):
    """Ends a run as a power failure would, where a test wants it."""


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resume_is_exact(small, optimizer, monkeypatch):
    """The power fails while a checkpoint is written, and the previous one survives. The command
    with --resume continues from it bit for bit. Ranks compare the values that must agree."""
    def fsync(file):
        if 6 in log_of(kind="tel"):
            os.ftruncate(file, 1000)
            raise Crash

    small += [f"--optimizer={optimizer}", "--num_iterations=8", "--batch_size=8"]
    main([*small, "--output_dir=straight"])
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(os, "fsync", fsync)
        main(small)
    assert load("log/last.pt")["step"] == load("log/best.pt")["step"] == 3
    compared = []
    monkeypatch.setattr(train_gpt2, "require_same", compared.append)
    # --dtype wins over what the processor has
    monkeypatch.setattr(train_gpt2, "pick_dtype", lambda device: "bfloat16")
    assert main([*small, "--resume"]) == 0
    total = TokenLoader("sums_train_*.bin", 32).total
    assert compared == [{"step": 3, "sequences": total, "dtype": "float32"}]
    assert_same_run("log", "straight")


def test_resuming_with_other_flags(small, capsys):
    """What would spoil the run is refused with the command it began with; the rest is a note."""
    main(small)
    command = shlex.join(["python", "train_gpt2.py", *small])
    for flag, name in (("--total_batch_size=1024", "total_batch_size"), ("--seed=3", "seed"),
                       ("--input_bin=sums_train_000001.bin", "num_sequences"),
                       ("--optimizer=adamw", "optimizer"), ("--weight_decay=0", "weight_decay"),
                       ("--n_layer=3", "config"), ("--sequence_length=64", "config"),
                       ("--num_iterations=5", "num_iterations")):
        fails([*small, "--resume", flag], "last.pt", name, command)
    main([*small, "--resume", "--num_iterations=8", "--learning_rate=0.004"])
    assert load("log/last.pt")["step"] == 8
    notes = re.findall(r"^NOTE: --(\w+)", capsys.readouterr().out, re.M)
    assert sorted(notes) == ["learning_rate", "num_iterations"]
    # every command is in the log, as it was typed
    assert f"s:6 command:{command} --resume" in Path("log/main.log").read_text("utf-8")


def test_best_and_last(small, monkeypatch, capsys):
    """best.pt has the weights of the lowest validation loss, last.pt also what a run needs."""
    # the rate becomes far too high, so the loss rises again
    monkeypatch.setattr(train_gpt2, "get_lr", lambda step, *_: 1e-3 if step < 6 else 0.5)
    small += ["--val_loss_every=2", "--output_dir=my log"]
    main([*small, "--num_iterations=12"])
    losses = log_of("my log", "tel")
    lowest = min(losses.values())
    best, last = load("my log/best.pt"), load("my log/last.pt")
    assert losses[best["step"]] == lowest and best["step"] < last["step"] == 12
    assert last["best_val_loss"] == best["val_loss"] and "optimizer" not in best
    assert sorted(os.listdir("my log")) == ["best.pt", "last.pt", "main.log"]
    model = train_gpt2.load_model("my log/best.pt", "cpu")
    data = TokenLoader("sums_val_*.bin", 32)
    assert train_gpt2.evaluate(model, data, 2048) == pytest.approx(lowest, abs=1e-5)
    # the printed command can be pasted
    command = capsys.readouterr().out.splitlines()[-1]
    assert main(shlex.split(command)[2:]) == 0
    # a resumed run knows what was lowest
    main([*small, "--num_iterations=14", "--resume"])
    assert load("my log/best.pt")["step"] == best["step"]


def test_fine_tuning(small):
    """--init_from takes the weights and the shape of a checkpoint, and nothing else. If it only
    makes them worse, the weights of step 0 were the best."""
    main(small)
    tune = ["--init_from=log/best.pt", "--learning_rate=0.5", "--warmup_iters=0",
            "--val_loss_every=2", "--output_dir=tuned"]
    main([flag for flag in small if not flag.startswith("--n_")] + [*tune, "--arch=gpt2"])
    before, best, last = map(load, ("log/best.pt", "tuned/best.pt", "tuned/last.pt"))
    assert best["config"] == before["config"] and best["step"] == 0 and last["step"] == 6
    assert best["val_loss"] == pytest.approx(before["val_loss"], abs=1e-5)
    torch.testing.assert_close(best["model"], before["model"], rtol=0, atol=0)
    # AdamW has counted the steps of this run alone
    assert {state["step"].item() for state in last["optimizer"][0]["state"].values()} == {6}


def in_step(patch, when, *signals):
    """These signals arrive in step `when` of the runs that follow, before its update."""
    def get_lr(step, *settings):
        for number in signals if step == when else ():
            signal.raise_signal(number)
        return real(step, *settings)

    real = train_gpt2.get_lr
    patch.setattr(train_gpt2, "get_lr", get_lr)


def test_signals_stop_a_run_gently(small, capsys, monkeypatch):
    """It ends after the step and saves without validating. The printed command resumes exactly."""
    def gone(*args):
        raise BrokenPipeError

    main([*small, "--output_dir=straight"])
    argv = [*small, "--output_dir=my log"]
    with monkeypatch.context() as patch:
        in_step(patch, 1, signal.SIGINT)
        assert main(argv) == 128 + signal.SIGINT
    assert load("my log/last.pt")["step"] == 2 and max(log_of("my log", "tel")) == 0
    argv = shlex.split(capsys.readouterr().out.splitlines()[-1])[2:]
    # nobody reads what it prints: Ctrl-C also ends the tee in `python train_gpt2.py 2>&1 | tee log`
    with monkeypatch.context() as patch:
        in_step(patch, 3, signal.SIGTERM)
        patch.setattr(os, "write", gone)
        patch.setattr(sys, "stdout", types.SimpleNamespace(write=gone, flush=gone))
        assert main(argv) == 128 + signal.SIGTERM
    assert load("my log/last.pt")["step"] == 4
    assert main(argv) == 0 and argv.count("--resume") == 1
    assert_same_run("my log", "straight")


def test_a_second_ctrl_c_ends_immediately(small, monkeypatch):
    """In the middle of a step. Where there is no last.pt yet, --resume begins."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        in_step(patch, 1, signal.SIGINT, signal.SIGINT)
        main([*small, "--val_loss_every=0"])
    assert os.listdir("log") == ["main.log"]
    assert main([*small, "--resume"]) == 0 and load("log/last.pt")["step"] == 6


def trace(patch):
    """Appends the training sequences that a process reads from now on to read.RANK."""
    def batch(loader, *args):
        x, y = real(loader, *args)
        if "train" in loader.paths[0]:
            with open(f"read.{os.environ.get('RANK', 0)}", "a") as f:
                f.writelines(f"{row}\n" for row in x.tolist())
        return x, y
    real = TokenLoader.batch
    patch.setattr(TokenLoader, "batch", batch)


def one_of_two(argv):
    """A process of the next test. Each has its own micro-batch size, and rank 1 gets a signal."""
    def stdlib_corpus():
        if not os.path.exists("made"):
            time.sleep(1)
            open("made", "x")  # fails if the other process made it in the meantime
        return "sums_train_*.bin"

    def require_same(value, real=train_gpt2.require_same):
        with pytest.raises(SystemExit, match="ranks differ"):
            real(rank)
        real(value)

    rank = int(os.environ["RANK"])
    fineweb.stdlib_corpus = stdlib_corpus
    train_gpt2.require_same = require_same
    train_gpt2.pick_batch_size = lambda *_: 4 if rank == 0 else 2
    trace(pytest.MonkeyPatch())
    if rank == 1:
        in_step(pytest.MonkeyPatch(), 6, signal.SIGTERM)
    main(argv)


def test_two_processes_train_as_one(small, monkeypatch):
    """One process begins a run, two continue it in smaller micro-batches, and one ends it: the same
    losses and gradients to rounding, and every sequence read once. Of the two, one prints, and one
    makes the default corpus. Ranks that differ end the run; a signal to one of them stops both."""
    monkeypatch.setattr(fineweb, "stdlib_corpus", lambda: "sums_train_*.bin")
    small += ["--input_bin=", "--num_iterations=9"]
    main([*small, "--output_dir=straight"])
    x, _ = TokenLoader("sums_train_*.bin", 32, seed=1337).batch(0, 9 * 16, CPU)
    trace(monkeypatch)
    with monkeypatch.context() as patch:
        in_step(patch, 2, signal.SIGTERM)
        main(small)
    code = "import sys, test_train_gpt2; test_train_gpt2.one_of_two(sys.argv[1:])"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python",
                "--local_addr=127.0.0.1", "--nproc_per_node=2", sys.executable, "-c", code]
    out = subprocess.run([*torchrun, *small, "--resume"], text=True, timeout=300,
                         env=os.environ | {"PYTHONPATH": str(ROOT)},
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout
    assert load("log/last.pt")["step"] == 7, out
    assert len(re.findall(r"^step +6/9 \| loss", out, re.M)) == 1
    main([*small, "--resume"])
    assert_close_logs("log", "straight", 1e-3)
    read = "".join(path.read_text() for path in Path().glob("read.*"))
    assert sorted(read.splitlines()) == sorted(map(str, x.tolist()))


# -------------------------------------------------------------------------------------------------
# 7. The machine

@pytest.mark.parametrize("able, dtype", [("avx512_bf16", "bfloat16"), ("avx512_f", "float32")])
def test_mixed_precision_follows_the_hardware(able, dtype, monkeypatch):
    """In bf16 the residual stream is bf16, but the loss and all gradients are fp32."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {able: True}, raising=False)
    assert train_gpt2.pick_dtype(CPU) == dtype
    model = tiny_model()
    stream = []
    model.transformer.ln_f.register_forward_pre_hook(lambda _, args: stream.append(args[0].dtype))
    x = random_ids(2, 32)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = model(x, x)
        assert model(x).dtype == torch.float32
    loss.backward()
    assert stream[0] == getattr(torch, dtype) and loss.dtype == torch.float32
    assert abs(loss - model(x, x)) < 0.01
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_micro_batches_divide_a_step():
    """On a CPU they have up to 4096 tokens."""
    def pick(sequences, world_size=1, batch_size=0, sequence_length=1024):
        args = types.SimpleNamespace(batch_size=batch_size, sequence_length=sequence_length,
                                     total_batch_size=1024 * sequences)
        return train_gpt2.pick_batch_size(args, tiny_model(), CPU, "float32", False, world_size)

    assert [pick(512), pick(6), pick(5), pick(6, 2), pick(8, 4)] == [4, 3, 1, 3, 2]
    assert pick(512, batch_size=64) == 64 and pick(16, sequence_length=8192) == 1


@pytest.mark.parametrize("model, gigabytes, compiled, sequences", [
    ("d12", 80, True, 32), ("d24", 80, True, 32), ("d36", 80, True, 32), ("d48", 80, True, 8),
    ("d12", 8, True, 8), ("d24", 16, True, 4), ("d12", 80, False, 32), ("d12", 8, False, 2)])
def test_micro_batches_fit_the_gpu(model, gigabytes, compiled, sequences, monkeypatch):
    """With a tenth of the memory to spare. fp32 takes twice as much, and DDP's ranks divide it."""
    args = train_gpt2.parse_args([f"--model={model}"])
    gpt = train_gpt2.make_model(args, 50257, torch.device("meta"))
    memory = types.SimpleNamespace(total_memory=gigabytes * 1e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    for dtype, factor in ("bfloat16", 1), ("float32", 2):
        size = train_gpt2.pick_batch_size(args, gpt, torch.device("cuda"), dtype, compiled, 1)
        assert sequences // factor <= size <= sequences


# -------------------------------------------------------------------------------------------------
# 8. A trained model

def test_generate(monkeypatch):
    """With top_k=1 the likeliest id each time, over as much of the text as the model can read."""
    model = tiny_model(shake=0.3)  # without, it would only repeat itself
    with torch.no_grad():
        model.lm_head.weight[99] = 0.0  # nor should it end
    ids = [5]
    for token in train_gpt2.generate(model, [5], 60, top_k=1):
        assert token == model(torch.tensor([ids[-32:]]))[0, -1].argmax()
        ids.append(token)
    assert len(ids) == 61 and len(set(ids)) > 5

    def draw(count, seed=0, **how):
        generator = torch.Generator().manual_seed(seed)
        return list(train_gpt2.generate(model, [5], count, generator=generator, **how))

    assert draw(60) == draw(60) != draw(60, seed=1)
    firsts = {draw(1, seed, temperature=3, top_k=5)[0] for seed in range(40)}
    likeliest = model(torch.tensor([[5]]))[0, -1].topk(5).indices.tolist()
    assert firsts <= set(likeliest) and len(firsts) > 2
    # it stops before <|endoftext|>, the last id, here of a model that counts
    monkeypatch.setattr(model, "forward", lambda idx: 99.0 * F.one_hot((idx + 1) % 100, 100))
    assert list(train_gpt2.generate(model, [90], 60)) == list(range(91, 99))


def test_tokenizers(bpe):
    """There and back, and no id of a text is the separator, the last one."""
    for size in fineweb.VOCAB_SIZE.values():
        encode, decode = train_gpt2.load_tokenizer(size)
        ids = encode("naïve 🙂")
        assert decode(ids) == "naïve 🙂" and max(ids) < size - 1


def test_prompts_and_pieces_of_characters(monkeypatch):
    """Every prompt begins with one <|endoftext|>. Half a character is a question mark."""
    prompts = []
    monkeypatch.setattr(train_gpt2, "generate", lambda model, ids, *args, **how: (
        prompts.append(ids) or iter([*"né→".encode(), 0xE2, 0x41])))
    for prompt in "dé", "":
        text = train_gpt2.sample(tiny_model(vocab_size=257), prompt)
        assert text == f"{prompt}né→\N{REPLACEMENT CHARACTER}A"
    assert prompts == [[256, 100, 0xC3, 0xA9], [256]]


def save_model(path, model):
    state = {"config": dataclasses.asdict(model.config), "model": model.state_dict()}
    train_gpt2.save_checkpoint(path, state)


# -------------------------------------------------------------------------------------------------
# 9. The command line

def write(name, content):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content)


def all_shards(vocab_size, pattern="sums_*.bin"):
    """Other shards in the place of those that match."""
    for path in Path().glob(pattern):
        fineweb.write_shard(path, np.ones(5000, int), vocab_size)


def no_network(patch):
    """From now on GPT-2's vocabulary cannot be downloaded."""
    tiktoken = types.SimpleNamespace(get_encoding=lambda name: open("no network"))
    patch.setitem(sys.modules, "tiktoken", tiktoken)

# What is wrong, the flags of a small run or another command, and words of its last line.
ERRORS = [
    # flags
    ("", "--model=d13", "--model d13 --help"),
    ("", "--norm=other", "norm rmsnorm layernorm other"),
    ("", "--mlp=other", "mlp swiglu gelu other"),
    ("", "--pos=other", "pos rope learned other"),
    ("", "--n_head=5 --n_kv_head=5", "n_embd=32 n_head=5"),
    ("", "--n_kv_head=3", "n_head=4 n_kv_head=3"),
    ("", "--batch_size=5", "--total_batch_size 512 160"),
    # shards
    ("", "--input_bin=nothing_train_*.bin", "nothing_train_*.bin fineweb.py"),
    ("write('sums_train_000002.bin', bytes(1024))", "", "sums_train_000002.bin fineweb.py"),
    ("os.truncate('sums_train_000002.bin', 9000)", "", "sums_train_000002.bin fineweb.py"),
    ("all_shards(50257, '*2.bin')", "", "sums_train_*.bin 257 50257"),
    ("", "--total_batch_size=102400", "sums_train_ --total_batch_size"),
    ("", "--sequence_length=9000 --total_batch_size=9000", "sums_train_ --sequence_length"),
    # folders and checkpoints
    ("main(small)", "", "log exists --resume --output_dir delete"),
    ("main(small), os.truncate('log/last.pt', 9000)", "--resume", "last.pt checkpoint"),
    ("", "--sample=nowhere.pt", "nowhere.pt FileNotFoundError"),
    # texts
    ("write('a.txt', b'words ' * 100)", "fineweb.py --input a.txt --out=mine --bytes",
     "too little text: 0 tokens"),
    ("no_network(patch)", "fineweb.py --input a.txt --out=mine", "TIKTOKEN_CACHE_DIR"),
    ("os.mkdir('mine')", "fineweb.py --input a.txt --out=mine", "mine exists --out"),
    ("os.mkdir('mine')", "fineweb.py --shards=1 --out=mine", "mine exists --out"),
    # questions
    *((f"write('q.jsonl', made_questions(1) + {line!r})", "hellaswag.py -m a.pt --data=q.jsonl",
       "q.jsonl, line 2") for line in (
        b'{"ctx": "a"}', b'{"ctx": "a", "endings": ["b", "c", "d"], "label": 1}',
        b'{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 4}')),
    ("write('q.jsonl', made_questions(1))", "hellaswag.py -m a.pt --data=q.jsonl --harness",
     "line 1 activity_label"),
    ("", "hellaswag.py -m a.pt --data=nowhere.jsonl", "nowhere.jsonl"),
    ("write('q.jsonl', made_questions(1)), no_network(patch), "
     "save_model('a.pt', tiny_model(vocab_size=50257))",
     "hellaswag.py -m a.pt --data=q.jsonl", "TIKTOKEN_CACHE_DIR"),
    ("patch.setattr(hellaswag, 'DATA_URL', 'http://127.0.0.1:9/q')", "hellaswag.py -m a.pt",
     "127.0.0.1:9 hellaswag_val.jsonl"),
]


def files():
    """The files here and their modification times, which a failing command must not change."""
    return {path: path.stat().st_mtime_ns for path in Path().rglob("*")}


@pytest.mark.parametrize("wrong, flags, words", ERRORS, ids=[f"{w} {f}" for w, f, _ in ERRORS])
def test_errors_are_one_line(wrong, flags, words, small, monkeypatch):
    """What a beginner meets in the first hour, or somebody whose run takes days."""
    eval(wrong or "None", globals(), {"small": small, "patch": monkeypatch})
    script, _, rest = flags.partition(" ")
    scripts = {"fineweb.py": fineweb.main, "hellaswag.py": hellaswag.main}
    argv = rest.split() if script in scripts else [*small, *flags.split()]
    before = files()
    fails(argv, *words.split(), main=scripts.get(script, main))
    assert files() == before


@pytest.mark.parametrize("module, name, message", [
    (F, "cross_entropy", "loss or gradient norm at step 4 is nan"),
    (nn.utils, "clip_grad_norm_", "loss or gradient norm at step 4 is nan"),
    (train_gpt2, "evaluate", "validation loss at step 6 is nan")])
def test_a_loss_that_is_not_finite(module, name, message, small, monkeypatch):
    """The run ends, and the last good checkpoint stays."""
    real = getattr(module, name)
    monkeypatch.setattr(
        module, name, lambda *args: real(*args) * (math.nan if 3 in log_of() else 1))
    fails(small, message, "log")
    state = load("log/last.pt")
    assert state["step"] == 3 and all(w.isfinite().all() for w in state["model"].values())


@pytest.mark.parametrize("vocab_size, reason", [
    (50257, "TIKTOKEN_CACHE_DIR"), (300, "load_tokenizer.. has no tokenizer of 300 ids")])
def test_without_a_tokenizer_there_are_no_samples(vocab_size, reason, small, capsys, monkeypatch):
    """An offline machine trains without samples, and so does a model with an unknown tokenizer."""
    no_network(monkeypatch)
    all_shards(vocab_size)
    assert main([*small, "--num_iterations=1"]) == 0
    assert re.search(f"no sample: .*{reason}", capsys.readouterr().out)


# -------------------------------------------------------------------------------------------------
# 10. fineweb.py: from text to shards

@pytest.fixture
def bpe():
    if not VOCABULARY:
        pytest.skip("TIKTOKEN_CACHE_DIR is not set, and tests do not download GPT-2's vocabulary")
    return pytest.importorskip("tiktoken").get_encoding("gpt2")


def write_parquet(path, texts):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": texts}), path)

TEXTS = ["plain words\n", "<|endoftext|> is only a word here<|endoftext|>", " ",
         "naïve 🙂 中文 \u0301\r\n\ttab   spaces   "] * 10


def words(n):
    """n characters, numbers separated by spaces, different at every position."""
    return " ".join(map(str, range(10**6, 10**6 + n // 8 + 1)))[:n]


def documents_in(folder, split="*"):
    """The documents in the byte-level shards of --input: the text between the separators."""
    paths, _, _ = fineweb.find_shards(f"{folder}/text_{split}_*.bin")
    ids = np.concatenate([fineweb.read_tokens(path) for path in paths])
    documents = np.split(ids, np.flatnonzero(ids == 256)[1:])
    return [bytes(document[1:].tolist()).decode() for document in documents]


def test_shard_format():
    """llm.c's header, where 0 means GPT-2's vocabulary, then two bytes per token."""
    fineweb.write_shard("a.bin", [50256, 464, 3797], 0)
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 3
    assert Path("a.bin").read_bytes() == header.tobytes() + bytes.fromhex("50c4d001d50e")
    assert fineweb.find_shards("a.bin") == (["a.bin"], [3], 50257)
    tokens = fineweb.read_tokens("a.bin", 1, 1)
    # A memmap would keep the file open, and the 100B sample has more shards than may be open.
    assert tokens.tolist() == [464] and not isinstance(tokens, np.memmap)


@pytest.mark.parametrize("token, vocab_size", [(-1, 257), (257, 257), (50257, 0), (65536, 128256)])
def test_an_id_that_does_not_fit_is_refused(token, vocab_size):
    """Two bytes would hold a different id in its place."""
    with pytest.raises(ValueError, match="a.bin: ids must be"):
        fineweb.write_shard("a.bin", [token, 1], vocab_size)


def test_the_worked_example_is_true(bpe):
    """The tokens, ids, and bytes at the head of the file are those of its ten words."""
    lines = dict(re.findall("^    (text|tokens|ids|bytes) +(.*)$", fineweb.__doc__, re.M)[:3])
    ids = bpe.encode(lines["text"])
    assert lines["ids"] == " ".join(map(str, ids))
    assert lines["tokens"] == "|".join(bpe.decode([i]) for i in ids)
    assert np.array([50256, *ids[:7]], "<u2").tobytes().hex(" ") in fineweb.__doc__


def test_stdlib_corpus():
    """The source of the standard library, the same files held out everywhere, made only once."""
    pattern = fineweb.stdlib_corpus()
    made = files()
    assert fineweb.stdlib_corpus() == pattern and files() == made
    assert fineweb.find_shards(pattern)[2] == 257
    for split, name in ("train_000001", "json/__init__.py"), ("val_000000", "sched.py"):
        ids = fineweb.read_tokens(pattern.replace("train_*", split))
        source = (Path(json.__file__).parents[1] / name).read_bytes()
        assert ids[0] == 256 and source in ids.astype(np.uint8).tobytes()


def test_documents_are_split_without_changing_their_tokens(bpe):
    """A chunk may end at any boundary. A text without boundaries is split, too."""
    assert fineweb.split_document("a" * 50, 10) == ["a" * 20, "a" * 20, "a" * 10]
    rng = np.random.default_rng(0)
    text = "".join(rng.choice(list("ab1.!'\"\n\t    é的\u00a0\u3000\x1c\x85🙂sdtlvre"), 20_000))
    for chunks in re.split(fineweb.BOUNDARY, text), fineweb.split_document(text, 100):
        ids = [i for chunk in chunks for i in bpe.encode_ordinary(chunk)]
        assert "".join(chunks) == text and ids == bpe.encode_ordinary(text)


@pytest.mark.parametrize("size, share", [(1500, 0.33), (200_000, 0.1), (6_000_000, 0.01)])
def test_the_share_held_out(size, share, capsys):
    """A tenth or a hundredth, at least a chunk, the same in two copies; then what it prints."""
    text = words(size)
    for name in "12":
        write(f"in/{name}.txt", text.encode())
    out = "it's [1]_train_book"  # a folder that shell and glob would read differently
    fineweb.main(["--input", "in", "--bytes", "--out", out])
    val, train = (documents_in(glob.escape(out), split) for split in ("val", "train"))
    held_out = sum(map(len, val))
    assert held_out + sum(map(len, train)) == 2 * size
    assert 0.6 * share < held_out / (2 * size) < 1.5 * share
    # pieces of the text, separated where a piece is left out
    assert all(document in text for document in val + train)
    assert not any(piece[:400] in document for piece in val for document in train)
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    args = train_gpt2.parse_args(command[2:])
    assert train_gpt2.open_data(args)[0].total * args.sequence_length >= args.total_batch_size


def test_your_own_files(capsys):
    """Documents of all kinds of files arrive unchanged; hidden files and what is not text don't."""
    lines = "\n\n".join(json.dumps({"text": text}) for text in TEXTS)
    contents = {
        "a.JSONL": lines.encode("utf-8-sig"), "b.jsonl": b'{"text": "half \\ud83d of one"}',
        "BOOK.TXT": "\ufeffone\r\n<|endoftext|>\r\ntwo<|endoftext|>\n three".encode(),
        "sub/c.html": b"", ".b.txt": b"hidden", ".git/b": b"hidden",
        "d.png": b"\x89\xff", "e.txt": "text".encode("utf-16-le"), "f.jsonl": b'{"text": "\xe9"}',
    }
    for name, content in contents.items():
        write(f"in/{name}", content)
    write_parquet("in/sub/g.parquet", [*TEXTS, "", None])
    fineweb.main(["--input", "in", "--out=mine", "--bytes"])
    wanted = [*TEXTS, *TEXTS, "half ? of one", "one\r\n", "two", " three"]
    assert sorted(documents_in("mine")) == sorted(wanted)
    skipped = re.findall(r"(\S+) is not text", capsys.readouterr().out)
    assert [Path(path).name for path in skipped] == ["d.png", "e.txt", "f.jsonl"]


def test_an_interrupted_run_leaves_no_folder(monkeypatch):
    """Here by a damaged line. The next run deletes the shards in FOLDER.tmp, and only those."""
    monkeypatch.setattr(fineweb, "SHARD_TOKENS", 1000)
    write("mine.tmp/of a user", b"")
    write("bad.jsonl", b'{"text": "words"}\n' * 2000 + b'{"txt": "words"}\n')
    write("good.txt", words(9000).encode())
    run = ["--bytes", "--out=mine", "--input"]
    fails([*run, "bad.jsonl"], "bad.jsonl", "document 2000: KeyError", main=fineweb.main)
    assert not Path("mine").exists() and Path("mine.tmp/text_val_000004.bin").exists()
    fineweb.main([*run, "good.txt"])
    assert sum(map(len, documents_in("mine"))) == 9000
    assert not Path("mine.tmp").exists() and Path("mine/of a user").exists()


@pytest.mark.parametrize("name, vocab_size, tokens, wanted", [
    ("fineweb", 50257, 9.9e9, ("d24", 524288, 18882)),
    ("fineweb", 50257, 1e8, ("d12", 262144, 381)), ("text", 50257, 9e7, ("tiny", 2048, 8000)),
    ("text", 50257, 2.5e9, ("d24", 524288, 19073)), ("text", 257, 2.5e9, ("tiny", 2048, 8000)),
    ("text", 257, 3e4, ("tiny", 256, 468)),
])
def test_the_next_command_fits_the_text(name, vocab_size, tokens, wanted, capsys, monkeypatch):
    """Your own text is read up to 4 times, FineWeb once. Byte-level shards are for tiny."""
    monkeypatch.setattr(fineweb, "find_shards", lambda _: ([], [int(tokens)], vocab_size))
    fineweb.print_next_command(Path("mine"), name)
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    args = train_gpt2.parse_args(command[2:])
    assert (args.model, args.total_batch_size, args.num_iterations) == wanted


class Hub(http.server.SimpleHTTPRequestHandler):
    """Sends files with the hub's headers. server.sent has the names of the shards sent."""

    def end_headers(self):
        self.send_header("ETag", '"1"')
        self.send_header("X-Repo-Commit", "c" * 40)
        super().end_headers()

    def log_message(self, *args):
        if self.command == "GET" and self.path.endswith(".bin"):
            self.server.sent.append(Path(self.path).name)


def test_pretokenized_shards(tmp_path):
    """As many as asked for, later the others, none twice, also without a vocabulary, all by the
    hub's own library from a server on this machine. Offline is an error, whatever is there."""
    pytest.importorskip("huggingface_hub")
    names = [f"fineweb_{split}.bin" for split in ("val_000000", "train_000001", "train_000002")]
    repo = "datasets/kjj0/fineweb10B-gpt2"
    commit = json.dumps({"id": "kjj0/fineweb10B-gpt2", "sha": "c" * 40}).encode()
    for revision in "main", "c" * 40:
        write(f"api/{repo}/revision/{revision}", commit)
    tree = [{"type": "file", "path": name, "size": 11024, "oid": "1"} for name in names]
    write(f"api/{repo}/tree/{'c' * 40}", json.dumps(tree).encode())
    fineweb.write_shard("made", np.ones(5000), 0)
    for name in names:
        write(f"{repo}/resolve/{'c' * 40}/{name}", Path("made").read_bytes())
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.sent = []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    env = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0",
                        "TIKTOKEN_CACHE_DIR": str(tmp_path / "none"),
                        "https_proxy": "http://127.0.0.1:9", "no_proxy": "127.0.0.1"}
    online, offline = server.server_port, 9
    for port, flags, count in (online, ["--shards=1"], 2), (online, [], 3), (offline, [], 3):
        done = subprocess.run(
            [sys.executable, ROOT / "fineweb.py", *flags], capture_output=True, text=True,
            env=env | {"HF_ENDPOINT": f"http://127.0.0.1:{port}"})
        there = {path.name for path in Path("fineweb10B").glob("*.bin")}
        assert there == set(names[:count]), done.stderr
        failed = re.search("^error: kjj0/.*HF_ENDPOINT", done.stderr)
        assert done.returncode == bool(failed) == (port == offline)
    server.shutdown()
    assert sorted(server.sent) == sorted(names)


@pytest.mark.parametrize("shards, count", [(0, 3), (2, 1), (6, 2)])
def test_raw_text_becomes_llmc_shards(shards, count, bpe, monkeypatch):
    """The first shard is for validation, documents keep their order, few shards need few files."""
    monkeypatch.setattr(fineweb, "SHARD_TOKENS", 100)
    write_parquet("made", TEXTS)

    def download(repo, patterns, folder):
        names = [f"sample/10BT/{i:03d}_00000.parquet" for i in range(3)]
        for pattern in patterns:
            for name in fnmatch.filter(names, pattern):
                write(folder / name, Path("made").read_bytes())

    monkeypatch.setattr(fineweb, "download", download)
    fineweb.main(["--tokenize", f"--shards={shards}"])
    paths, lengths, _ = fineweb.find_shards("fineweb10B/fineweb_train_*.bin")
    paths.insert(0, "fineweb10B/fineweb_val_000000.bin")
    ids = np.concatenate([fineweb.read_tokens(path) for path in paths])
    wanted = [i for text in TEXTS * count for i in (50256, *bpe.encode_ordinary(text))]
    assert ids.tolist() == wanted
    assert len(lengths) > 2 and set(lengths[:-1]) == {100}


# -------------------------------------------------------------------------------------------------
# 11. hellaswag.py

encode_bytes, _ = train_gpt2.load_tokenizer(257)


def made_questions(n):
    """A file of n questions, with contexts and endings of 1 to 40 characters."""
    texts = [words(5 * n + 40)[i:i + 1 + 7 * i % 40] for i in range(5 * n)]
    questions = [dict(ctx=texts[i], label=i % 4, endings=texts[i + 1:i + 5])
                 for i in range(0, 4 * n, 4)]
    return "".join(json.dumps(q) + "\n" for q in questions).encode()


@pytest.mark.parametrize("real", [False, True])
@torch.no_grad()
def test_the_scores_are_those_of_the_naive_way(real, monkeypatch, capsys):
    """acc, acc_norm, and every loss of 100 questions, as the lines in section 2 of hellaswag.py
    compute them, with little padding in the batches."""
    data = os.environ.get("HELLASWAG_VAL") if real else "made.jsonl"
    if not data:
        pytest.skip("HELLASWAG_VAL (a file of questions) is not set")
    write("made.jsonl", made_questions(100))
    model = tiny_model(shake=0.2, vocab_size=257, block_size=1024, n_layer=1)
    sizes = []
    model.register_forward_pre_hook(lambda _, args: sizes.append(args[0].numel()))
    monkeypatch.setattr(hellaswag, "load_model", lambda *args: model)
    hellaswag.main(f"-m a.pt --data {data} --limit 100 --examples 100 --device cpu".split())
    out = capsys.readouterr().out
    questions = hellaswag.load_questions(data)[:100]
    endings = [e for q in questions for e in hellaswag.encode_question(q, encode_bytes, 1024)]
    assert max(sizes) <= hellaswag.TOKENS_PER_BATCH
    assert sum(sizes) < 1.2 * sum(len(e.row) - 1 for e in endings)

    code = Path(hellaswag.__file__).read_text("utf-8")
    code = "\n".join(re.findall("^#     (.*)", code, re.M))
    scores = []  # means and sums
    for row, n, _ in endings:
        names = dict(model=model, row=torch.tensor(row), n=n, F=F)
        exec(code, names)
        total = names["log_likelihood"].item()
        scores.append((total / n, total))
    printed = re.findall(r"^ *(\d+\.\d{4}) +(\d+\.\d\d) ", out, re.M)
    # to the last digit printed, which bf16 and TF32 would change
    assert (np.abs(np.array(printed, float) + scores) < [2e-4, 0.01]).all()
    chosen = np.array(scores).reshape(100, 4, 2).argmax(axis=1)
    acc_norm, acc = (chosen == [[q["label"]] for q in questions]).mean(axis=0)
    assert re.findall(r"^acc\w* +(\S+) \+-", out, re.M) == [f"{acc:.4f}", f"{acc_norm:.4f}"]
    assert acc != acc_norm


def test_a_row_that_is_too_long_loses_its_beginning():
    q = dict(ctx="0123456789", endings=["abc", "f" * 20])
    short, long = hellaswag.encode_question(q, encode_bytes, block_size=12)
    assert (bytes(short.row), short.n, short.length) == (b"123456789 abc", 4, 4)
    assert (bytes(long.row), long.n, long.length) == (b"f" * 13, 12, 12)


def test_the_harness_style():
    """Texts and lengths are those that lm-evaluation-harness 0.4.13 makes of this question."""
    q = dict(activity_label="Hair", ctx_a="He sits. [title] Then", ctx_b="he LAUGHS [step] ",
             endings=[" and  goes.", "[substeps] x", "a [b] c", "[end]"], label=1)
    endings = hellaswag.encode_question(q, encode_bytes, 96, harness=True)
    texts = ["  and goes.", "   x", "  a c", "  "]
    rows = [f"Hair: He sits.. Then He laughs{text}" for text in texts]
    assert [bytes(e.row).decode() for e in endings] == rows
    assert [e.n for e in endings] == [len(text) for text in texts]
    # Nothing is left of the last ending: the harness divides by 0 and never picks it.
    assert [e.length for e in endings[:3]] == [9, 2, 3] and -5 / endings[3].length < -1e6


def test_the_questions_are_downloaded_whole(monkeypatch):
    """An interrupted download is refused, even between two lines, and leaves no file."""
    response = types.SimpleNamespace(raise_for_status=lambda: None, content=made_questions(2))
    monkeypatch.setattr(hellaswag.requests, "get", lambda *args, **kwargs: response)
    monkeypatch.setattr(hellaswag, "SIZE", 3)
    fails(["-m", "a.pt"], hellaswag.DATA_URL, "2 of 3", main=hellaswag.main)
    assert files() == {}
    response.content = made_questions(3)
    assert len(hellaswag.load_questions()) == 3
    # the second time from the disk
    del response.content
    assert len(hellaswag.load_questions()) == 3

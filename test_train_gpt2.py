"""
Tests: first that it learns at all, then a section for each chapter. Run them with

    python -m pytest -q

They need no GPU and no network, and take about a minute. A test that needs a package or a file that
a user may not have is skipped. Every run is made in its own empty folder, on a text made there.
"""

import argparse
import dataclasses
import fnmatch
import functools
import glob
import hashlib
import http.server
import importlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
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

# No test may depend on a GPU, and the models are too small for more threads.
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
    """Every test begins in an empty folder, as one process, without a GPU, and has short samples.
    Afterward, signals do what they did before: main() catches them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    short = functools.partial(train_gpt2.sample, max_new_tokens=20)
    monkeypatch.setattr(train_gpt2, "sample", short)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


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


def fails(argv, capsys, *messages, main=main):
    """main(argv) ends in one line that has all the messages. Returns what was printed before."""
    with pytest.raises(SystemExit) as e:
        main(argv)
    line = str(e.value.code)
    assert line.startswith("error: ") and "\n" not in line, line
    for message in messages:
        assert message in line, line
    return capsys.readouterr().out


def run_changed(change, argv, codes):
    """Runs train_gpt2.py after lines of code that change it, in one process per exit code expected.

    Returns what they printed, errors included.
    """
    code = f"import os, signal, sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
    code += "import torch, train_gpt2\ntrain_gpt2.sample = lambda *_: 'short'\n"
    code += f"rank = os.environ['RANK']\n{change}\nsys.exit(train_gpt2.main(sys.argv[1:]))"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # what torchrun sets
    env = os.environ | {"WORLD_SIZE": str(len(codes)), "TORCHELASTIC_RUN_ID": "test",
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [subprocess.Popen([sys.executable, "-c", code, *argv], text=True,
                                  env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
                 for rank in range(len(codes))]
    try:
        printed = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert tuple(process.returncode for process in processes) == codes, printed
    return "".join(printed)


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
        one, other = load(f"{a}/{name}")["model"], load(f"{b}/{name}")["model"]
        assert all(torch.equal(one[key], other[key]) for key in one)


# Writes every training sequence that is read to read.RANK, also in run_changed().
TRACE = """
real_batch = train_gpt2.TokenLoader.batch
def batch(loader, *args):
    x, y = real_batch(loader, *args)
    if "train" in loader.paths[0]:
        with open(f"read.{os.environ.get('RANK', 0)}", "a") as f:
            f.writelines(f"{row}\\n" for row in x.tolist())
    return x, y
train_gpt2.TokenLoader.batch = batch
"""


def assert_each_read_once(count):
    """The traced runs have read the first `count` sequences of a small run, and each of them once.
    """
    read = [row for path in Path().glob("read.*") for row in path.read_text().splitlines()]
    x, _ = TokenLoader("sums_train_*.bin", 32, seed=1337).batch(0, count, CPU)
    wanted = set(map(str, x.tolist()))
    assert len(read) == len(wanted) == count and set(read) == wanted


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

both_archs = pytest.mark.parametrize("arch", [{}, GPT2_ARCH], ids=["variant", "GPT-2"])


# -------------------------------------------------------------------------------------------------
# 0. The whole

def test_overfits_a_single_batch(small):
    """If model, loss, gradients and optimizers are right, it memorizes a batch."""
    main([*small, "--overfit_single_batch", "--n_embd=128", "--num_iterations=40",
          "--total_batch_size=128", "--learning_rate=6e-3", "--val_loss_every=0"])
    losses = log_of()
    assert abs(losses[0] - math.log(257)) < 0.5 and losses[39] < 0.05, losses
    # 0 means at the end only
    assert list(log_of(kind="tel")) == [40]


# -------------------------------------------------------------------------------------------------
# 1. The model

def test_operations():
    """As the docstring counts those of d12. An untied embedding, which is only looked up, is free.
    """
    with torch.device("meta"):
        model = GPT(GPTConfig())
        for _ in "tied", "untied":
            assert round(train_gpt2.flops_per_token(model) / 1e6) == 812
            model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))


@pytest.fixture
def convert():
    """The module report/convert.py, which needs transformers."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    return importlib.import_module("convert")


def test_rope_depends_on_relative_positions():
    """One query and one key at all positions, in three heads: only their offset counts."""
    torch.manual_seed(0)
    tables = train_gpt2.rope_tables(64, 16)
    q, k = (train_gpt2.apply_rope(torch.randn(16).expand(1, 64, 3, 16), *tables)[0] for _ in "qk")
    assert torch.equal(q[:, 0], q[:, 2])
    scores = q[:, 0] @ k[:, 0].T
    for offset in 0, 1, 7, 40:
        assert scores.diagonal(-offset).std() < 1e-4
    assert scores[:, 0].std() > 0.1


@both_archs
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
    """Runs the plain form in causal_attention's docstring as it stands. Returns its variables."""
    code = re.search(r"^ +k = .*?^ +return", train_gpt2.causal_attention.__doc__, re.M | re.S)[0]
    code = re.sub("^ +", "", code, flags=re.M).replace("return", "pass")
    (_, n_head, T, D), n_kv_head = q.shape, k.shape[1]
    names = dict(q=q, k=k, v=v, n_head=n_head, n_kv_head=n_kv_head, T=T, D=D)
    exec(code, vars(train_gpt2) | names, names)
    return names


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("kind", [torch.Tensor, LooksLikeCuda])
def test_attention_is_its_plain_form(kind, dtype, tolerance):
    """On a CPU, and with what a GPU gets."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 16, 8, dtype=dtype) for n in (4, 2, 2))
    y = train_gpt2.causal_attention(*(x.as_subclass(kind) for x in (q, k, v)))
    plain = plain_attention(q.float(), k.float(), v.float())
    y_plain = plain["weights"] @ plain["v"]
    assert torch.allclose(y.as_subclass(torch.Tensor).float(), y_plain, atol=tolerance)


def test_the_worked_example_of_attention():
    """Its scores give the masked scores, weights and outputs beside them."""
    rows = re.findall(r"^        (-?\d\.\d .*)", train_gpt2.causal_attention.__doc__, re.M)
    table = torch.tensor([[float(x) for x in row.split()] for row in rows])
    scores, masked, weights, output = table.view(1, 1, 3, 10).split([3, 3, 3, 1], dim=-1)
    plain = plain_attention(scores * math.sqrt(3), torch.eye(3).view(1, 1, 3, 3),
                            torch.tensor([10.0, 20, 30]).view(1, 1, 3, 1))
    assert torch.allclose(plain["scores"], masked)
    assert torch.allclose(plain["weights"], weights, atol=0.0051)
    assert torch.allclose(plain["weights"] @ plain["v"], output, atol=0.051)


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

    for module in model, model.transformer.h[0].mlp:
        module.experts = nn.Parameter(torch.zeros(2, 32, 32))
        with pytest.raises(ValueError, match="no rule for .*experts"):
            model.init_weights()
        del module.experts


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
    assert loss.item() == pytest.approx(-p.gather(-1, y[..., None]).log().mean().item(), rel=1e-5)
    loss.backward()
    assert not model.lm_head.weight.grad[100:].any() and model.lm_head.weight.grad[:100].any()


@both_archs
def test_a_compiled_run_is_the_same(arch, small, monkeypatch):
    """Training and validation are one graph each. Samples have many lengths, so they are not."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        # all but the C++ compiler, which a machine may lack
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    small += ["--optimizer=adamw", "--n_layer=1", "--num_iterations=2", "--val_loss_every=1"]
    small += [f"--{name}={value}" for name, value in arch.items() if value not in (True, False)]
    main([*small, "--output_dir=plain"])
    compile = functools.partialmethod(GPT.compile, backend=backend, fullgraph=True)
    monkeypatch.setattr(GPT, "compile", compile)
    main([*small, "--compile"])
    assert len(graphs) == 2
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
    """But for the last few tokens of a shard. A row is a piece of one file."""
    sizes = (1000, 333, 64, 10, 777)
    loader = counting_shards(sizes, 16)
    assert loader.total == sum((n - 1) // 16 for n in sizes)
    seen = []
    for first in range(0, loader.total, 5):
        x, y = loader.batch(first, min(5, loader.total - first), "cpu")
        assert x.dtype == torch.int64 and x.is_contiguous() and y.is_contiguous()
        assert torch.equal(x[:, 1:], y[:, :-1])
        seen += torch.cat((x, y[:, -1:]), dim=1).tolist()
    rows = []
    for path in sorted(glob.glob("count_*")):
        tokens = np.fromfile(path, "<u2")[512:].tolist()  # after 256 integers of 4 bytes
        rows += [tokens[i:i + 17] for i in range(0, len(tokens) - 16, 16)]
    assert sorted(seen) == rows != seen


def test_epochs_are_shuffled_anew():
    """Each epoch and each seed has its own order over the rows of all shards, the same one in every
    process."""
    def epoch(number, seed=7):
        loader = counting_shards((18_001, 6_001), 16, seed)
        return loader.batch(number * loader.total, loader.total, CPU)[0][:, 0].tolist()

    assert epoch(0) == epoch(0) and sorted(epoch(0)) == sorted(epoch(1))
    assert epoch(0) != epoch(1) and epoch(0) != epoch(0, seed=8)
    # a quarter of the first tenth is from the second shard, which has a quarter of the rows
    assert 0.12 < np.mean([token > 18_000 for token in epoch(0)[:150]]) < 0.38
    # a batch over the end of an epoch takes from both
    loader = counting_shards((18_001, 6_001), 16)
    x, _ = loader.batch(loader.total - 2, 4, CPU)
    assert x[:, 0].tolist() == epoch(0)[-2:] + epoch(1)[:2]


@pytest.mark.parametrize("world_size, batch_size", [(1, 1), (1, 16), (1, 500), (2, 16), (3, 4)])
def test_validation_counts_each_sequence_once(world_size, batch_size, monkeypatch):
    """For any batch size and number of processes: a part from all shards, or all there is."""
    data = counting_shards((500, 600, 700), 16)
    model = nn.Linear(1, 1)
    # its loss is the mean of the ids
    model.forward = lambda x, y: seen.extend(x[:, 0].tolist()) or y.double().mean()
    for num_tokens, count in (40 * 16 + 5, 40), (10**6, data.total):
        seen = []
        parts = []
        for rank in range(world_size):
            process = rank, world_size
            monkeypatch.setattr(train_gpt2, "this_process", lambda process=process: process)
            parts.append(train_gpt2.evaluate(model, data, num_tokens, batch_size))
        assert len(seen) == len(set(seen)) == count
        assert set(np.searchsorted((500, 1100), seen, side="right")) == {0, 1, 2}
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
        for warmup_iters in 0, 250, 500, 900:
            curve = rates(schedule, warmup_iters, range(1000), 1000)
            assert max(abs(a - b) for a, b in zip(curve, curve[1:], strict=False)) < 0.02
            assert min(curve) > 0 and max(curve) <= 1
            assert curve[0] == (0.1 if warmup_iters else 1)
    with pytest.raises(ValueError):
        rates("linear", 700, [18000])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_each_optimizer_has(optimizer):
    """Vectors do not decay, Muon has only matrices of the blocks, frozen parameters are left out,
    and nothing else is."""
    model = tiny_model(**GPT2_ARCH)
    block = model.transformer.h[0]
    block.experts = nn.Parameter(torch.zeros(2, 32, 32))  # no matrix
    block.attn.c_q.requires_grad_(False)
    found = {}
    for one in train_gpt2.make_optimizers(model, optimizer, 1e-3, 0.3, "float32"):
        for group in one.param_groups:
            for p in group["params"]:
                assert p not in found and group["lr"] == 1e-3
                found[p] = (type(one).__name__, group["weight_decay"])
    for name, p in model.named_parameters():
        if p.requires_grad:
            kind = "Muon" if optimizer == "muon" and ".h." in name and p.dim() == 2 else "AdamW"
            assert found.pop(p) == (kind, 0.3 if p.dim() > 1 else 0.0), name
    assert not found


def test_muon_is_pytorchs():
    """It makes the steps of torch.optim.Muon, also with several matrices of the same shape."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this PyTorch has no Muon")
    torch.manual_seed(0)
    shapes = [(24, 48), (24, 48), (24, 48), (48, 48), (128, 48), (48, 128)]
    begin = [torch.randn(shape) for shape in shapes]
    ours, theirs = ([nn.Parameter(w.clone()) for w in begin] for _ in range(2))
    optimizers = (train_gpt2.Muon(ours, 0.01, 0.1, torch.float32),
                  torch.optim.Muon(theirs, 0.01, 0.1, 0.95, adjust_lr_fn="match_rms_adamw"))
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = q.grad = torch.randn_like(p)
        for optimizer in optimizers:
            optimizer.step()
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
ORIGINAL = dict(optimizer="adamw", schedule="cosine", qk_norm=False)


@pytest.mark.parametrize("flags, values", [
    ("", dict(
        VARIANT, num_params=828_800, n_layer=4, n_head=4, n_kv_head=2, n_embd=128,
        sequence_length=128, total_batch_size=2048, num_iterations=600, warmup_iters=20,
        learning_rate=4e-3, val_loss_every=200, log_every=20, compile=False,
        output_dir="logtiny")),
    ("--model=d12", dict(
        VARIANT, num_params=116_510_976, n_layer=12, n_head=12, n_kv_head=6, n_embd=768,
        sequence_length=1024, total_batch_size=524288, num_iterations=19073, warmup_iters=250,
        val_loss_every=250, log_every=1, compile=None, optimizer="muon", schedule="wsd",
        learning_rate=2.4e-3, weight_decay=0.1, grad_clip=1.0, output_dir="log124M")),
    ("--model=d24", dict(num_params=329_961_472)), ("--model=d36", dict(num_params=719_191_808)),
    ("--model=d48", dict(num_params=1_560_122_944, n_kv_head=25, learning_rate=8e-4,
                           output_dir="log1558M")),
    ("--model=d12 --arch=gpt2 --n_head=8 --pos=rope",
     dict(train_gpt2.GPT2, n_kv_head=8, pos="rope", optimizer="muon")),
    # OpenAI's number, and 47 rows that pad the vocabulary
    ("--model=d12 --arch=gpt2", dict(num_params=124_439_808 + 47 * 768)),
    ("--model=d12 --recipe=original --optimizer=muon",
     dict(ORIGINAL, optimizer="muon", learning_rate=1.2e-3, warmup_iters=715)),
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
    assert {name: settings[name] for name in values} == values


# -------------------------------------------------------------------------------------------------
# 6. Training

@pytest.mark.parametrize("grad_clip", [1.0, 0])
def test_train_is_its_plain_form(grad_clip, small, capsys):
    """The lines at the head of section 6, run as they stand but for 600 steps, are the default run:
    the same losses to rounding, in training and in validation."""
    folder = Path(f"stdlib_py{sys.version_info.major}.{sys.version_info.minor}")
    folder.mkdir()
    for name in "train_000001", "val_000000":
        shutil.copy(f"sums_{name}.bin", folder / f"stdlib_{name}.bin")
    main(["--num_iterations=3", "--warmup_iters=20", "--val_loss_every=0", "--device=cpu",
          "--dtype=float32", f"--grad_clip={grad_clip}"])
    text = SCRIPT.read_text("utf-8").split("\n# 6. Training")[1].split("# You could train")[0]
    code = "\n".join(re.findall("^#     (.*)", text, re.M)).replace("600", "3")
    code = code.replace("loss.backward()", "losses.append(loss.item()); loss.backward()")
    code = code.replace("model.parameters(), 1.0", f"model.parameters(), {grad_clip or 'math.inf'}")
    names = vars(train_gpt2) | {"losses": []}
    capsys.readouterr()
    exec(code, names)
    assert names["losses"] == pytest.approx(list(log_of("logtiny").values()), rel=1e-5)
    val_loss = float(capsys.readouterr().out)
    assert val_loss == pytest.approx(log_of("logtiny", "tel")[3], rel=1e-5)
    assert max(log_of("logtiny", NORM).values()) > 1


def test_dropout_is_off_except_in_training(small):
    """Every module is in training mode in the steps alone, also after a sample."""
    seen = set()
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.add((module.training, torch.is_grad_enabled())))
    main(small)
    hook.remove()
    assert seen == {(True, True), (False, False)}
    assert not train_gpt2.load_model("log/best.pt", CPU)[0].training


class Crash(Exception):
    """Ends a run as a power failure would, where a test wants it."""


def in_step(monkeypatch, when, *signals):
    """In the step `when` of the runs that follow, before its update, signals come, or a Crash."""
    real = train_gpt2.get_lr

    def get_lr(step, *settings):
        if step == when and not signals:
            raise Crash
        for number in signals if step == when else ():
            signal.raise_signal(number)
        return real(step, *settings)

    monkeypatch.setattr(train_gpt2, "get_lr", get_lr)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resume_is_exact(small, optimizer, monkeypatch, capsys):
    """The same command with --resume continues a run that crashed, bit for bit. Ranks compare what
    has to agree."""
    small += [f"--optimizer={optimizer}", "--num_iterations=8", "--batch_size=8"]
    main([*small, "--output_dir=straight"])
    with monkeypatch.context() as patch, pytest.raises(Crash):
        in_step(patch, 5)
        main(small)
    assert load("log/last.pt")["step"] == 3 and max(log_of()) == 4
    compared = []
    monkeypatch.setattr(train_gpt2, "require_same", compared.append)
    # --dtype wins over what the processor has
    monkeypatch.setattr(train_gpt2, "pick_dtype", lambda device: "bfloat16")
    assert main([*small, "--resume"]) == 0
    total = TokenLoader("sums_train_*.bin", 32).total
    assert compared == [{"step": 3, "sequences": total, "dtype": "float32"}]
    assert_same_run("log", "straight")
    assert list(log_of(kind="tel")) == [0, 3, 6, 8] and "NOTE" not in capsys.readouterr().out


def test_resuming_with_other_flags(small, capsys):
    """What would spoil the run is refused with the command it began with; the rest is a note."""
    main(small)
    before = files()
    command = shlex.join(["python", "train_gpt2.py", *small])
    for flag, name in (("--total_batch_size=1024", "total_batch_size"), ("--seed=3", "seed"),
                       ("--optimizer=adamw", "optimizer"), ("--n_layer=3", "the model"),
                       ("--arch=gpt2", "the model"), ("--sequence_length=64", "the model"),
                       ("--num_iterations=5", "num_iterations")):
        fails([*small, "--resume", flag], capsys, "last.pt", name, command)
    assert files() == before
    again = [*small, "--resume", "--num_iterations=8", "--learning_rate=0.004"]
    assert main(again) == 0
    [note] = re.findall("^NOTE: .*", capsys.readouterr().out, re.M)
    assert set(re.findall(r"--(\w+)", note)) == {"num_iterations", "learning_rate"}, note
    state = load("log/last.pt")
    assert state["step"] == 8 and state["args"]["learning_rate"] == 0.004
    # the order of the data depends on its size
    os.remove("sums_train_000002.bin")
    assert main([*again, "--num_iterations=10"]) == 0
    assert re.search("^NOTE: .*read twice", capsys.readouterr().out, re.M)
    # every command is in the log, as it was typed
    log = Path("log/main.log").read_text("utf-8")
    commands = re.findall(r"^s:(\d+) command:(.*)", log, re.M)
    assert commands[:2] == [("0", command), ("6", shlex.join(["python", "train_gpt2.py", *again]))]


def test_best_and_last(small, monkeypatch, capsys):
    """best.pt has the weights of the lowest validation loss, last.pt also what a run needs."""
    # the rate becomes far too high, so the loss rises again
    monkeypatch.setattr(train_gpt2, "get_lr", lambda step, *_: 1e-3 if step < 6 else 0.5)
    small += ["--val_loss_every=2", "--output_dir=my log", "--input_bin=sums_train_000002.bin"]
    # one shard by its path, and a validation shard with another number
    Path("sums_val_000000.bin").rename("sums_val_000123.bin")
    main([*small, "--num_iterations=12"])
    losses = log_of("my log", "tel")
    lowest = min(losses.values())
    best, last = load("my log/best.pt"), load("my log/last.pt")
    assert losses[best["step"]] == lowest and best["step"] < last["step"] == 12
    assert last["best_val_loss"] == best["val_loss"] and "optimizer" not in best
    assert sorted(os.listdir("my log")) == ["best.pt", "last.pt", "main.log"]
    model, _ = train_gpt2.load_model("my log/best.pt", "cpu")
    data = TokenLoader("sums_val_*.bin", 32)
    assert train_gpt2.evaluate(model, data, 2048) == pytest.approx(lowest, abs=1e-5)
    # the printed command can be pasted
    command = capsys.readouterr().out.splitlines()[-1]
    assert main(shlex.split(command)[2:]) == 0
    # a resumed run knows what was lowest
    main([*small, "--num_iterations=14", "--resume"])
    assert load("my log/best.pt")["step"] == best["step"]
    # and where best.pt was left behind, the command names the file that exists
    os.remove("my log/best.pt")
    main([*small, "--num_iterations=14", "--resume"])
    assert capsys.readouterr().out.splitlines()[-1].endswith("'my log/last.pt'")


def test_fine_tuning(small):
    """--init_from takes the weights and the shape of a checkpoint, and nothing else. If it only
    makes them worse, the weights of step 0 were the best. A typed shape must be the checkpoint's.
    """
    main(small)
    tune = ["--init_from=log/best.pt", "--learning_rate=0.5", "--warmup_iters=0",
            "--val_loss_every=2", "--output_dir=tuned"]
    with pytest.raises(RuntimeError, match="size mismatch"):
        main([*small, *tune, "--n_embd=64"])
    main([flag for flag in small if not flag.startswith("--n_")] + [*tune, "--arch=gpt2"])
    before, best, last = map(load, ("log/best.pt", "tuned/best.pt", "tuned/last.pt"))
    assert best["config"] == before["config"] and best["step"] == 0 and last["step"] == 6
    assert best["val_loss"] == pytest.approx(before["val_loss"], abs=1e-5)
    assert all(torch.equal(w, before["model"][name]) for name, w in best["model"].items())
    # AdamW has counted the steps of this run alone
    assert {state["step"].item() for state in last["optimizer"][0]["state"].values()} == {6}


def test_a_killed_run_leaves_a_checkpoint(small):
    """kill -9 while the next last.pt is being written: the one before is still there."""
    small += ["--val_loss_every=2", "--batch_size=8"]
    main([*small, "--output_dir=straight"])
    run_changed("""
real = torch.save
def save(state, f):
    real(state, f)
    if state["step"] == 4 and "optimizer" in state:
        os.truncate(f.name, 1000)
        if hasattr(signal, "SIGKILL"):
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(9)
torch.save = save""", small, codes=(9 if os.name == "nt" else -signal.SIGKILL,))
    assert load("log/last.pt")["step"] == 2 and load("log/best.pt")["step"] == 4
    assert main([*small, "--resume"]) == 0
    assert_same_run("log", "straight")


def test_a_checkpoint_is_on_the_disk_before_it_gets_its_name(monkeypatch):
    calls = []
    for name in "fsync", "replace":
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, f=real: calls.append(n) or f(*a))
    train_gpt2.save_checkpoint("a.pt", {"step": 3})
    assert calls == ["fsync", "replace"] and load("a.pt") == {"step": 3}


def test_signals_stop_a_run_gently(small, capsys, monkeypatch):
    """It ends after the step and saves without validating. The command that it prints continues as
    if nothing had happened, and together the runs read every sequence once."""
    def gone(*args):
        raise BrokenPipeError

    monkeypatch.setattr(TokenLoader, "batch", TokenLoader.batch)  # ends the trace after the test
    small += ["--batch_size=8"]
    main([*small, "--output_dir=straight"])
    exec(TRACE, globals())
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
    assert_each_read_once(6 * 16)


def test_a_second_ctrl_c_ends_immediately(small, monkeypatch):
    """In the middle of a step. Where there is no last.pt yet, --resume begins."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        in_step(patch, 1, signal.SIGINT, signal.SIGINT)
        main([*small, "--val_loss_every=0"])
    assert os.listdir("log") == ["main.log"]
    assert main([*small, "--resume"]) == 0 and load("log/last.pt")["step"] == 6


def test_two_processes_train_as_one(small):
    """And small micro-batches as a large one: the same losses and gradients to rounding. Every
    sequence is read once, one process speaks, and one makes the default corpus."""
    small += ["--optimizer=adamw", "--learning_rate=1e-3"]
    main([*small, "--output_dir=one"])
    out = run_changed(TRACE + """
def stdlib_corpus():
    if not os.path.exists("made"):
        time.sleep(1)
        open("made", "x")  # fails if the other process made it in the meantime
    return "sums_train_*.bin"
train_gpt2.fineweb.stdlib_corpus = stdlib_corpus
train_gpt2.pick_batch_size = lambda *_: 4 if rank == "0" else 2
""", [*small, "--input_bin="], codes=(0, 0))
    assert_close_logs("log", "one", 1e-3)
    assert_each_read_once(6 * 16)
    assert out.count("a sample after 6") == 1


def test_one_process_begins_and_two_go_on(small, monkeypatch):
    """With Muon. Ranks that disagree end in one line, and a signal to one of them stops both."""
    small += ["--batch_size=4", "--num_iterations=9"]
    main([*small, "--output_dir=straight"])
    with monkeypatch.context() as patch, pytest.raises(Crash):
        in_step(patch, 4)
        main(small)
    out = run_changed("""
init = torch.distributed.init_process_group  # once is enough
torch.distributed.init_process_group = lambda *args, **how: (
    torch.distributed.is_initialized() or init(*args, **how))
# rank 1 is on a machine with another processor, without one shard, and without last.pt
for flag in "--dtype=bfloat16", "--input_bin=sums_train_000001.bin", "--output_dir=elsewhere":
    try:
        train_gpt2.main([*sys.argv[1:], *([flag] if rank == "1" else [])])
    except SystemExit as e:
        print(e.code)
real = train_gpt2.get_lr
def get_lr(step, *settings):
    if step == 6 and rank == "1":
        signal.raise_signal(signal.SIGTERM)
    return real(step, *settings)
train_gpt2.get_lr = get_lr""", [*small, "--resume"], codes=(0, 128 + signal.SIGTERM))
    assert len(re.findall(r"^error: ranks differ: .*last\.pt.*--output_dir$", out, re.M)) == 6
    for values in "'bfloat16'", "'step': 0":
        assert out.count(values) == 2
    assert not Path("elsewhere").exists() and load("log/last.pt")["step"] == 7
    assert main([*small, "--resume"]) == 0
    assert_close_logs("log", "straight", 1e-3)
    straight = load("straight/last.pt")["model"]
    for name, w in load("log/last.pt")["model"].items():
        assert torch.allclose(w, straight[name], atol=1e-3), name


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
    def pick(sequences, world_size=1, **flags):
        argv = ["--model=d12", f"--total_batch_size={1024 * sequences}"]
        args = train_gpt2.parse_args(argv + [f"--{name}={value}" for name, value in flags.items()])
        return train_gpt2.pick_batch_size(args, tiny_model(), CPU, "float32", False, world_size)

    assert [pick(512), pick(6), pick(5), pick(6, 2), pick(8, 4)] == [4, 3, 1, 3, 2]
    assert pick(512, batch_size=64) == 64 and pick(16, sequence_length=8192) == 1
    with pytest.raises(SystemExit):
        pick(6, world_size=4)


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


def test_an_import_has_no_side_effects(monkeypatch, capsys):
    """In a notebook, whatever is on the command line. And these tests import on Windows."""
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    monkeypatch.setattr(sys, "argv", ["notebook", "--nonsense"])
    monkeypatch.delattr(signal, "SIGKILL", raising=False)
    monkeypatch.setitem(sys.modules, "resource", None)
    for path in SCRIPT, __file__:
        spec = importlib.util.spec_from_file_location("again", path)
        monkeypatch.setitem(sys.modules, "again", importlib.util.module_from_spec(spec))
        spec.loader.exec_module(sys.modules["again"])
    assert handlers == [signal.getsignal(number) for number in signal.valid_signals()]
    assert capsys.readouterr() == ("", "")


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
    for name, size in fineweb.VOCAB_SIZE.items():
        encode, decode = train_gpt2.load_tokenizer(name)
        ids = encode("naïve 🙂")
        assert decode(ids) == "naïve 🙂" and max(ids) < size - 1
        assert train_gpt2.tokenizer_name(size) == name


def test_prompts_and_pieces_of_characters(monkeypatch):
    """Every prompt begins with one <|endoftext|>. Half a character is a question mark."""
    prompts = []
    monkeypatch.setattr(train_gpt2, "generate", lambda model, ids, *args, **how: (
        prompts.append(ids) or iter([*"né→".encode(), 0xE2, 0x41])))
    for prompt in "dé", "":
        text = train_gpt2.sample(tiny_model(vocab_size=257), "bytes", prompt)
        assert text == f"{prompt}né→\N{REPLACEMENT CHARACTER}A"
    assert prompts == [[256, 100, 0xC3, 0xA9], [256]]


def save_model(path, model, tokenizer="gpt2"):
    state = {"config": dataclasses.asdict(model.config), "model": model.state_dict()}
    train_gpt2.save_checkpoint(path, state | {"tokenizer": tokenizer})


# -------------------------------------------------------------------------------------------------
# 9. The command line

def write(name, content):
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_bytes(content)


def shard(magic=20240520, count=5000, length=5000, token=1, vocab_size=257):
    """Puts another file in the place of the second training shard."""
    header = np.zeros(256, "<i4")
    header[:4] = magic, 1, count, vocab_size
    write("sums_train_000002.bin", header.tobytes() + np.full(length, token, "<u2").tobytes())


def all_shards(vocab_size, pattern="sums_*.bin"):
    """Other shards in the place of those that match."""
    for path in Path().glob(pattern):
        fineweb.write_shard(path, np.ones(5000, int), vocab_size)


def bad_question(line):
    write("q.jsonl", b'{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": "1"}\n' + line)


def fail_in(patch, name, error):
    """From now on a function of train_gpt2, or tiktoken's, raises the error."""
    def fail(*args, **kwargs):
        raise error

    if name == "tiktoken":
        patch.setitem(sys.modules, name, types.SimpleNamespace(get_encoding=fail))
    else:
        patch.setattr(train_gpt2, name, fail)

# What is wrong, the flags of a small run or another command, and words of its last line.
ERRORS = [
    # flags
    *(("", flag, flag.replace("=", " ") + " --help") for flag in (
        "--model=d13", "--n_layer=2.5", "--schedule=linear", "--no_such_flag=1")),
    *(("", f"--{name}=other", f"{name} {words} other") for name, words in (
        ("norm", "rmsnorm layernorm"), ("mlp", "swiglu gelu"), ("pos", "rope learned"))),
    ("", "--n_head=5", "n_embd=32 n_head=5"),
    ("", "--n_kv_head=3", "n_head=4 n_kv_head=3"),
    ("", "--total_batch_size=500", "--total_batch_size 500 32"),
    ("", "--batch_size=5", "--batch_size 160"),
    # shards
    ("", "--input_bin=nothing_train_*.bin", "nothing_train_*.bin {cwd} fineweb.py"),
    ("os.remove('sums_val_000000.bin')", "", "sums_val_*.bin {cwd} fineweb.py"),
    *((wrong, "", "sums_train_000002.bin fineweb.py") for wrong in (
        "shard(magic=42)", "shard(length=4990)", "shard(length=5001)",
        "write('sums_train_000002.bin', b'')")),
    ("shard(vocab_size=50257)", "", "sums_train_000001.bin sums_train_000002.bin 257 50257"),
    ("all_shards(50257, 'sums_val_*')", "", "sums_val_000000.bin 257 50257"),
    ("all_shards(300)", "", "300 VOCAB_SIZE load_tokenizer"),
    ("", "--total_batch_size=102400", "sums_train_ --total_batch_size"),
    ("", "--sequence_length=9000 --total_batch_size=9000", "sums_val_ --sequence_length"),
    # folders and checkpoints
    ("main(small)", "", "log exists --resume --output_dir delete"),
    ("", "--sample=nowhere.pt", "nowhere.pt FileNotFoundError"),
    ("write('a_file', b'hello')", "--sample=a_file", "a_file checkpoint"),
    ("write('a_file', b'')", "--init_from=a_file", "a_file checkpoint"),
    ("save_model('a.pt', tiny_model())", "--init_from=a.pt", "a.pt 257 tokenizer"),
    ("main(small), os.truncate('log/last.pt', 9000)", "--resume", "last.pt checkpoint"),
    # what cannot be converted
    ("save_model('a.pt', tiny_model(), 'bytes')", "report/convert.py a.pt out", "a.pt bytes"),
    ("save_model('a.pt', tiny_model(mlp='gelu'))", "report/convert.py a.pt o", "--arch gpt2 gelu"),
    ("save_model('a.pt', tiny_model()), fail_in(patch, 'tiktoken', OSError())",
     "report/convert.py a.pt out", "TIKTOKEN_CACHE_DIR"),
    ("save_model('a.pt', tiny_model()), os.mkdir('o')", "report/convert.py a.pt o", "o exists"),
    ("write('gpt2.pt', b'')", "report/convert.py gpt2 gpt2.pt", "gpt2.pt exists"),
    # texts and questions, with their documents and lines
    *((f"write('bad{name}', {content!r})", f"fineweb.py --input bad{name} --out=mine", words)
      for name, content, words in (
        (".jsonl", b'{"text": "a"}\n\n{"text": "b"\n', "bad.jsonl document 1: JSONDecodeError"),
        (".jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "bad.jsonl document 1: KeyError"),
        (".parquet", b"PAR1 and then nothing", "bad.parquet document 0"),
        (".txt", b"words " * 100, "too little text: 0 tokens"))),
    ("fail_in(patch, 'tiktoken', OSError()), write('a.txt', b'word ' * 2000)",
     "fineweb.py --input a.txt --out=mine", "TIKTOKEN_CACHE_DIR"),
    *(("write('mine/a_train_000001.bin', b'')", f"fineweb.py {how} --out=mine", "mine exists --out")
      for how in ("--input q.jsonl", "--tokenize", "--shards=1")),
    *((f"bad_question({line!r})", "hellaswag.py -m a.pt --data=q.jsonl", "q.jsonl, line 2")
      for line in (
        b"not json", b'["a"]', b'{"ctx": "\xff"}', b'{"ctx": "a"}',
        b'{"ctx": "a", "endings": ["b", "c", "d"], "label": 1}',
        b'{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 4}')),
    ("bad_question(b'')", "hellaswag.py -m a.pt --data=q.jsonl --harness", "line 1 activity_label"),
    ("", "hellaswag.py -m a.pt --data=nowhere.jsonl", "nowhere.jsonl"),
    ("save_model('a.pt', tiny_model()), bad_question(b''), fail_in(patch, 'tiktoken', OSError())",
     "hellaswag.py -m a.pt --data=q.jsonl", "TIKTOKEN_CACHE_DIR"),
    ("patch.setattr(hellaswag, 'DATA_URL', 'http://127.0.0.1:9/q')", "hellaswag.py -m a.pt",
     "127.0.0.1:9 hellaswag_val.jsonl"),
]


def files():
    """Those that a command that fails may neither change nor leave behind."""
    return {path: path.stat().st_mtime_ns for path in Path().rglob("*.*")
            if path.suffix in (".pt", ".bin", ".tmp")}


@pytest.mark.parametrize("wrong, flags, words", ERRORS, ids=[f"{w} {f}" for w, f, _ in ERRORS])
def test_errors_are_one_line(wrong, flags, words, small, capsys, monkeypatch, request):
    """What a beginner meets in the first hour, or somebody whose run takes days."""
    script, *argv = flags.split() or [""]
    if script == "fineweb.py":
        request.getfixturevalue("bpe")
    scripts = {"fineweb.py": fineweb.main, "hellaswag.py": hellaswag.main}
    if script == "report/convert.py":
        scripts[script] = request.getfixturevalue("convert").main
    if script not in scripts:
        argv = [*small, *flags.split()]
    eval(wrong or "None", globals(), {"small": small, "patch": monkeypatch})
    before = files(), Path("log").exists()
    words = [word.format(cwd=os.getcwd()) for word in words.split()]
    fails(argv, capsys, *words, main=scripts.get(script, main))
    assert (files(), Path("log").exists()) == before


@pytest.mark.parametrize("module, name, message", [
    (F, "cross_entropy", "loss at step 4 is nan"),
    (nn.utils, "clip_grad_norm_", "gradient norm at step 4 is nan"),
    (train_gpt2, "evaluate", "validation loss at step 6 is nan")])
def test_a_loss_that_is_not_finite(module, name, message, small, capsys, monkeypatch):
    """The run ends, and the last good checkpoint stays."""
    real = getattr(module, name)

    def spoiled(*args):
        return real(*args) * (math.nan if 3 in log_of() else 1)

    monkeypatch.setattr(module, name, spoiled)
    fails(small, capsys, message, "log")
    state = load("log/last.pt")
    assert state["step"] == 3 and all(w.isfinite().all() for w in state["model"].values())
    assert load("log/best.pt")["step"] <= 3


def test_an_id_outside_the_vocabulary(small, capsys):
    """Named when it is read; the run ends before a GPU would fail without saying why."""
    shard(token=257)
    fails([*small, "--val_loss_every=0", "--num_iterations=99"], capsys, "sums_train_000002.bin",
          "257")


def test_without_a_vocabulary_there_are_no_samples(small, capsys, monkeypatch):
    """A machine that is offline trains nevertheless."""
    fail_in(monkeypatch, "tiktoken", ConnectionError("cannot resolve openaipublic"))
    all_shards(50257)
    size = ["--total_batch_size=64", "--val_tokens=64", "--num_iterations=1"]
    assert main([*small, *size]) == 0
    assert re.search("no sample: .*TIKTOKEN_CACHE_DIR", capsys.readouterr().out)
    assert load("log/last.pt")["tokenizer"] == "gpt2"


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


def documents_in(folder, split):
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
    assert fineweb.read_tokens("a.bin", 1, 1).tolist() == [464]


@pytest.mark.parametrize("token, vocab_size", [(-1, 257), (257, 257), (50257, 0), (65536, 128256)])
def test_an_id_that_does_not_fit_is_refused(token, vocab_size):
    """Two bytes would hold a different id in its place."""
    with pytest.raises(ValueError, match="a.bin: ids must be"):
        fineweb.write_shard("a.bin", [token, 1], vocab_size)


def test_shards_are_not_kept_open():
    """The 100B sample has more shards than a process may have open files."""
    resource = pytest.importorskip("resource", reason="not on Windows")
    for i in range(150):
        fineweb.write_shard(f"a_train_{i:06d}.bin", np.full(17, i), 50257)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, limits[1]))
    try:
        x, _ = TokenLoader("a_train_*.bin", 16).batch(0, 150, CPU)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert sorted(x[:, 0].tolist()) == list(range(150))


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
    assert sorted(documents_in("mine", "val") + documents_in("mine", "train")) == sorted(wanted)
    skipped = re.findall(r"(\S+) is not text", capsys.readouterr().out)
    assert [Path(path).name for path in skipped] == ["d.png", "e.txt", "f.jsonl"]


def test_an_interrupted_run_leaves_no_folder(monkeypatch):
    """Its shards stay in FOLDER.tmp, and the next run deletes them and nothing else."""
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(fineweb, "SHARD_TOKENS", 1000)
    for name, size in ("long", 60_000), ("short", 9_000), ("mine.tmp/of a user", 1):
        write(name, words(size).encode())
    run = ["--bytes", "--out=mine", "--input"]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fineweb.main([*run, "long"])
    assert not Path("mine").exists() and len(list(Path("mine.tmp").glob("*.bin"))) > 10
    fineweb.main([*run, "short"])
    assert sum(map(len, documents_in("mine", "*"))) == 9_000
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


class Hub(http.server.BaseHTTPRequestHandler):
    """The hub's answers about a dataset: server.files is {path: bytes}, server.sent the paths."""

    def do_GET(self):
        files = self.server.files
        kind, path = re.match(r"(?:/api)?/datasets/kjj0/fineweb10B-gpt2/(\w+)/[^/]*/?(.*)",
                              self.path).groups()
        sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        if kind == "revision":
            body = json.dumps({"id": "kjj0/fineweb10B-gpt2", "sha": "c" * 40}).encode()
        elif kind == "tree":
            body = json.dumps([{
                "type": "file", "path": name, "size": len(content), "oid": "0" * 40,
                "lfs": {"size": len(content), "oid": sums[name], "pointerSize": 1},
            } for name, content in files.items()]).encode()
        else:
            body = files[path]
            if self.command == "GET":
                self.server.sent.append(path)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{sums.get(path)}"')
        self.send_header("X-Repo-Commit", "c" * 40)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


def test_pretokenized_shards(monkeypatch, tmp_path):
    """As many as asked for, later the others, none twice, also without a vocabulary, all by the
    hub's own library from a server on this machine. Offline is an error, whatever is there."""
    pytest.importorskip("huggingface_hub")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    server.files, server.sent = {}, []
    for i, split in enumerate(("val", "train", "train")):
        fineweb.write_shard("made", np.full(5000, i), 0)
        server.files[f"fineweb_{split}_{i:06d}.bin"] = Path("made").read_bytes()
    # read by the library when it is imported, so each download has a process of its own
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import fineweb, tiktoken\n"
    code += "tiktoken.get_encoding = lambda _: open('nowhere')\nfineweb.main(sys.argv[1:])"
    online, offline = server.server_port, 9
    for port, flags, count in (online, ["--shards=1"], 2), (online, [], 3), (offline, [], 3):
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True)
        there = {path.name: path.read_bytes() for path in Path("fineweb10B").glob("*.bin")}
        assert there == dict(list(server.files.items())[:count]), done.stderr
        assert "NOTE: " in done.stdout and "Traceback" not in done.stderr
        assert done.returncode == (port == offline)
        assert re.search("^error: kjj0/.*HF_ENDPOINT", done.stderr, re.M) or port == online
    server.shutdown()
    assert sorted(server.sent) == sorted(server.files)


@pytest.mark.parametrize("shards, count", [(0, 3), (2, 1), (6, 2)])
def test_raw_text_becomes_llmc_shards(shards, count, bpe, monkeypatch):
    """The first shard is for validation, documents keep their order, few shards need few files."""
    monkeypatch.setattr(fineweb, "SHARD_TOKENS", 100)
    write_parquet("made", TEXTS)

    def download(repo, patterns, folder):
        (folder / "sample/10BT").mkdir(parents=True)
        for i in range(3):
            name = f"sample/10BT/{i:03d}_00000.parquet"
            if any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
                shutil.copy("made", folder / name)

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

encode_bytes, _ = train_gpt2.load_tokenizer("bytes")


def made_questions(n):
    """n questions, with contexts and endings of 1 to 40 characters."""
    texts = [words(5 * n + 40)[i:i + 1 + 7 * i % 40] for i in range(5 * n)]
    return [dict(ctx=texts[i], label=i % 4, endings=texts[i + 1:i + 5]) for i in range(0, 4 * n, 4)]


@torch.no_grad()
def naive_log_likelihoods(model, endings):
    """The naive way in section 2 of hellaswag.py, run as it stands there."""
    code = "\n".join(re.findall("^#     (.*)", text_of(ROOT / "hellaswag.py"), re.M))
    sums = []
    for row, n, _ in endings:
        names = dict(model=model, row=torch.tensor(row), n=n, F=F)
        exec(code, names)
        sums.append(names["log_likelihood"].item())
    return np.array(sums)


@pytest.mark.parametrize("real", [False, True])
def test_the_scores_are_those_of_the_naive_way(real, monkeypatch, capsys):
    """acc, acc_norm, and every loss of 100 questions, with little padding in the batches."""
    data = os.environ.get("HELLASWAG_VAL") if real else "made.jsonl"
    if not data:
        pytest.skip("HELLASWAG_VAL (a file of questions) is not set")
    write("made.jsonl", "\n".join(map(json.dumps, made_questions(100))).encode())
    model = tiny_model(shake=0.2, vocab_size=257, block_size=1024, n_layer=1)
    sizes = []
    model.register_forward_pre_hook(lambda _, args: sizes.append(args[0].numel()))
    monkeypatch.setattr(hellaswag, "load_model", lambda *args: (model, "bytes"))
    hellaswag.main(f"-m a.pt --data {data} --limit 100 --examples 100 --device cpu".split())
    out = capsys.readouterr().out
    questions = hellaswag.load_questions(data)[:100]
    endings = [e for q in questions for e in hellaswag.encode_question(q, encode_bytes, 1024)]
    assert max(sizes) <= hellaswag.TOKENS_PER_BATCH
    assert sum(sizes) < 1.2 * sum(len(e.row) - 1 for e in endings)
    sums = naive_log_likelihoods(model, endings)
    means = sums / [e.n for e in endings]
    printed = np.array(re.findall(r"^ *(\d+\.\d{4}) +(\d+\.\d\d) ", out, re.M), float)
    # to the last digit printed, which bf16 and TF32 would change
    assert (np.abs(printed + np.stack([means, sums], axis=1)) < [2e-4, 0.01]).all()
    labels = [q["label"] for q in questions]
    accuracies = [(x.reshape(-1, 4).argmax(axis=1) == labels).mean() for x in (sums, means)]
    assert [float(x) for x in re.findall(r"^acc\w* +([\d.]+) \+-", out, re.M)] == accuracies
    assert accuracies[0] != accuracies[1]


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


def test_the_questions_are_downloaded_whole(monkeypatch, capsys):
    """An interrupted download is refused, even between two lines, and leaves no file."""
    lines = [json.dumps(q).encode() + b"\n" for q in made_questions(3)]
    response = types.SimpleNamespace(raise_for_status=lambda: None, content=b"".join(lines[:2]))
    monkeypatch.setattr(hellaswag.requests, "get", lambda *args, **kwargs: response)
    monkeypatch.setattr(hellaswag, "SIZE", 3)
    fails(["-m", "a.pt"], capsys, hellaswag.DATA_URL, "2 of 3", main=hellaswag.main)
    assert list(Path().iterdir()) == []
    response.content = b"".join(lines)
    assert len(hellaswag.load_questions()) == 3
    # the second time from the disk
    del response.content
    assert len(hellaswag.load_questions()) == 3


# -------------------------------------------------------------------------------------------------
# 12. To and from Hugging Face

@pytest.mark.parametrize("kind, arch", [
    ("Qwen3", {}), ("Llama", {"qk_norm": False}), ("GPT2", GPT2_ARCH)])
@torch.no_grad()
def test_exported_models_are_the_same_elsewhere(kind, arch, convert, bpe):
    """transformers opens the folder without our code: the same logits and ids."""
    import transformers
    # gains are not 1, and biases not 0
    model = tiny_model(shake=0.1, vocab_size=50257, **arch)
    save_model("best.pt", model)
    convert.main(["best.pt", "my out"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained("my out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained("my out")
    assert type(theirs).__name__.startswith(kind)
    x = random_ids(2, 32, below=50257)
    logits = model(x)
    # close to zero the comparison would mean little
    assert logits.std() > 0.5 and (logits - theirs(x).logits).abs().max() < 1e-4
    text = "it's naïve:\n\n    def f(x): return 1234567 \U0001f642\u200d \x00 ...!?"
    assert tokenizer(f"<|endoftext|>{text}").input_ids == [50256, *bpe.encode_ordinary(text)]
    assert tokenizer.model_max_length == theirs.generation_config.max_length == 32
    config = json.loads(Path("my out/config.json").read_text())
    assert config["eos_token_id"] == config["pad_token_id"] == tokenizer.pad_token_id == 50256
    # what llama.cpp and mlx-lm look for, and what fine-tuning would otherwise do
    gpt2 = dict(n_ctx=32, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    assert config == config | (gpt2 if kind == "GPT2" else dict(rope_theta=10000))


def test_what_transformers_cannot_compute_is_refused(convert, capsys, monkeypatch):
    """An untied head, and a fork's model that treats documents separately."""
    save_model("a.pt", tiny_model(vocab_size=50257))
    state = load("a.pt")
    state["model"]["lm_head.weight"] = state["model"]["lm_head.weight"] + 1
    torch.save(state, "untied.pt")
    fails(["untied.pt", "out"], capsys, "untied", main=convert.main)
    real = GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda model, x: real(model, x) * (x != 50256)[..., None])
    fails(["a.pt", "out"], capsys, "differ", main=convert.main)
    assert not Path("out").exists()


@torch.no_grad()
def test_openai_weights(convert, bpe, small, capsys):
    """OpenAI's layout comes in with the same logits; then the commands that it prints."""
    import transformers
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    torch.manual_seed(0)
    for p in theirs.parameters():
        p.add_(0.1 * torch.randn_like(p))
    theirs.save_pretrained("openai-community/gpt2")
    convert.main(["gpt2", "gpt2.pt"])
    commands = re.findall(r"^    python (\S+) (.*)$", capsys.readouterr().out, re.M)
    commands = {script: shlex.split(rest) for script, rest in commands}
    write("q.jsonl", "\n".join(map(json.dumps, made_questions(2))).encode())
    hellaswag.main([*commands["hellaswag.py"], "--data=q.jsonl", "--device=cpu"])
    assert "gpt2.pt, completion style, 2 questions\nacc  " in capsys.readouterr().out
    # a run that begins with them
    all_shards(50257)
    main([*commands["train_gpt2.py"], small[-1], "--num_iterations=0", "--sequence_length=32",
          "--total_batch_size=512", "--val_tokens=512", "--dtype=float32", "--device=cpu"])
    x, y = TokenLoader("sums_val_*.bin", 32).batch(0, 16, CPU)
    loss = F.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten())
    assert log_of("log_gpt2", "tel")[0] == pytest.approx(loss.item(), abs=1e-4)


# -------------------------------------------------------------------------------------------------
# 13. The report, and what the documents say

sys.path.append(str(ROOT / "report"))
import ablation  # noqa: E402
import bench  # noqa: E402
import convert as report_convert  # noqa: E402
import one_step  # noqa: E402
import plot  # noqa: E402

README = ROOT / "README.md"
REPORTS = sorted((ROOT / "report").glob("*.md"))
LOGS = ROOT / "report" / "logs"


def text_of(*paths):
    return "\n".join(path.read_text("utf-8") for path in paths)


def test_links_lead_somewhere():
    """To a file, a heading, or an address further down."""
    def anchors(document):
        headings = re.findall(r"^#+ (.*)$", document.read_text("utf-8").lower(), re.M)
        return [re.sub(r"[^\w -]", "", line).replace(" ", "-") for line in headings]

    for document in README, *REPORTS:
        text = text_of(document)
        for path, anchor in re.findall(r"\]\((?!https?:)([^)\s#]*)#?([^)\s]*)\)", text):
            target = document.parent / path if path else document
            assert target.exists() and (not anchor or anchor in anchors(target)), (path, anchor)
        addresses = set(re.findall(r"^\[(\w+)\]: http", text, re.M))
        assert set(re.findall(r"\]\[(\w+)\]", text)) == addresses


def test_commands_are_understood(monkeypatch):
    """In the documents and the scripts' own headings: the script exists and knows the arguments."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, argv):
        parse(parser, argv)
        raise Crash

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    scripts = {"train_gpt2.py": train_gpt2, "fineweb.py": fineweb, "hellaswag.py": hellaswag}
    scripts |= {f"report/{m.__name__}.py": m for m in (ablation, bench, one_step, plot)}
    scripts["lab.py"] = train_gpt2  # a copy of it: see the lab
    scripts["report/convert.py"] = report_convert
    seen = set()
    for path in [README, *REPORTS, *ROOT.glob("*.py"), *(ROOT / "report").glob("*.py")]:
        text = text_of(path)
        if path.suffix == ".py":
            text = text.split('"""')[1]
        text = re.sub(r"\\\n *", "", text)  # a command that goes on in the next line
        command = r"(?:python|torchrun)\b[^`\n|]*? ([\w./]+\.py)\b([^`\n|&)]*)"
        for script, rest in re.findall(command, text):
            if script.startswith("llama.cpp/"):
                continue
            # what stands behind two spaces or # explains it
            argv = shlex.split(re.split(r"  +|#", rest)[0])
            with pytest.raises((Crash, SystemExit)) as e:
                scripts[script].main(argv)
            assert e.type is Crash or argv == ["--help"], (script, argv, e.value)
            seen.add(script)
    assert seen == set(scripts), "a script that no document shows"


def test_tables_agree_with_logs():
    """Each group of runs has its table in the report, but for the lab."""
    for group in {path.name for path in LOGS.iterdir() if path.is_dir()} - {"lab"}:
        table = ablation.table(LOGS, group)
        assert table.count("\n") > 2 and table in text_of(*REPORTS), group


def test_figures_agree_with_logs():
    """Every figure in bold is in the logs, and the README shows what the default run printed."""
    known = set()
    for group in {path.name for path in LOGS.iterdir() if path.is_dir()} - {"lab"}:
        for cell in re.split(r" ?[|\n] ?", ablation.table(LOGS, group)):
            known.add(cell.split(",")[0])
        # single runs, and how far those of the default lie apart
        ends = [curve[-1][1] for curve in ablation.curves(LOGS, group, "today").values()]
        known |= {f"{loss:.3f}" for loss in ends}
        if len(ends) > 1:
            known.add(f"{statistics.stdev(ends):.3f}")
    for log in [*(LOGS / "lab").glob("*/main.log"), LOGS / "mlp" / "today.1" / "main.log"]:
        losses = re.findall(r"(?:tel|trl):(\S+)", text_of(log))
        known |= {f"{float(loss):.2f}" for loss in losses}
    for table in text_of(*LOGS.glob("bench*.txt")).split("\n\n"):
        rows = re.findall(r"^\|.* \| ([\d.]+) \| ([\d,]+) \| [\d.]+ \|", table, re.M)
        for ms, rate in rows:
            known |= {ms, f"{float(ms):,.0f} ms", rate}
            # how much faster than another of the same table
            known |= {f"{float(other) / float(ms):.2f}" for other, _ in rows}
    # but not the questions, which are bold, too
    bold = re.findall(r"\*\*([^*\n]*\d[^*\n]*)(?<![.?])\*\*", text_of(README, *REPORTS))
    assert len(bold) > 50 and [figure for figure in bold if figure not in known] == []
    # and the default run's lines
    shown = re.findall(r"^    ((?:model|step|done) .*)$", text_of(README), re.M)
    printed = text_of(LOGS / "default_run.txt")
    assert len(shown) > 5
    assert [line for line in shown if line.removesuffix(" ...") not in printed] == []


def lab():
    """{title: (edits, commands)} of the lab. An edit is the lines before, and after."""
    experiments = {}
    for section in re.split(r"^#+ (?=\d+\. )", text_of(*REPORTS), flags=re.M)[1:]:
        question, answer, _ = section.partition("<details>")
        edits = []
        for block in re.findall(r"```diff\n(.*?)```", question, re.S):
            lines = block.splitlines(keepends=True)
            before = "".join(line[1:] for line in lines if line[0] in " -")
            after = "".join(line[1:] for line in lines if line[0] in " +")
            edits.append((before, after))
        commands = re.findall(r"^    python lab.py (.*)$", question, re.M)
        if answer and commands:
            experiments[section.splitlines()[0]] = edits, commands
    return experiments


@pytest.mark.parametrize("title", lab())
def test_lab_fits_the_file(title, small, monkeypatch):
    """Each edit finds its place in train_gpt2.py, once, and the changed file trains otherwise."""
    edits, commands = lab()[title]
    script = text_of(SCRIPT)
    for before, after in edits:
        assert script.count(before) == 1, before
        # the lab's one unusual batch comes at step 300 of the default run
        script = script.replace(before, after.replace("300", "3"))
    module = types.ModuleType("lab")
    monkeypatch.setitem(sys.modules, "lab", module)
    exec(compile(script, "lab.py", "exec"), vars(module))
    # the experiment's flags after those of a small run, but for those that would make it a long one
    short = re.sub("--total_batch_size [0-9]+", "--total_batch_size 64", commands[0])
    flags = shlex.split(re.sub("--(num_iterations|warmup_iters) [0-9]+", "", short))
    module.main([*small, *flags, "--output_dir=changed"])
    main([*small, "--seed=1"])
    assert log_of("changed") != log_of()


def test_one_step_is_the_runs_first(small, capsys):
    """What one_step.py shows is what a run does: the loss, the rate and the gradient's norm."""
    small.append("--warmup_iters=4")
    main([*small, "--val_loss_every=0"])
    wanted = [log_of("log", kind)[0] for kind in ("trl", r"trl:\S+ lr", NORM)]
    for dtype, tolerance in ("float32", 1e-3), ("bfloat16", 0.03):
        one_step.main([*small, f"--dtype={dtype}"])
        out = capsys.readouterr().out.strip()
        shown = re.search(r"loss (\S+) \| lr (\S+) \| norm (\S+)$", out).groups()
        assert [float(x) for x in shown] == pytest.approx(wanted, rel=tolerance)

"""
Tests: first that it learns at all, then a section for each chapter. Run them with

    python -m pytest -q

They need no GPU and no network, and take a few minutes. What needs a package that a user may not
have skips and says so. Every run is made in an empty folder of its own, on a text made there.
"""

import argparse
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import http.server
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fineweb
import hellaswag
import train_gpt2
from train_gpt2 import GPT, GPTConfig, HeadLoss, TokenLoader, main

# No test may depend on a GPU. PyTorch reads this when it is first asked for one.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# The models are too small for more threads, which only wait for each other on a busy machine.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# it may be relative, and every test changes the folder
if "TIKTOKEN_CACHE_DIR" in os.environ:
    os.environ["TIKTOKEN_CACHE_DIR"] = os.path.abspath(os.environ["TIKTOKEN_CACHE_DIR"])

SCRIPT = str(Path(train_gpt2.__file__).resolve())
CPU = torch.device("cpu")
GPT2_ARCH = {"n_kv_head": 4, **train_gpt2.GPT2}
TORCHRUN = "RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"  # what it sets
STARTED = []  # processes that a test must not leave behind


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every test begins in an empty folder, alone, and on a machine without a GPU of any kind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    yield
    while STARTED:
        with STARTED.pop() as process:
            process.kill()


@pytest.fixture
def small(tmp_path):
    """The flags of a run that takes a second. A flag that is added wins over the same one here.

    It learns sums in words, from two shards; another one validates. It is a shrunken d12 and not
    tiny, because tiny prints only every 20th step.
    """
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


def python(*command, code=0):
    """The command in a process of its own, which has to end with this exit code."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    return done


def changed_script(change):
    """Writes a script that is train_gpt2.py after some lines of code that change what it uses."""
    Path("changed.py").write_text(
        f"import os, signal, sys; sys.path.insert(0, {str(Path(SCRIPT).parent)!r})\n"
        f"import torch, train_gpt2\n{change}\nsys.exit(train_gpt2.main(sys.argv[1:]))\n")
    return "changed.py"


def log_of(folder="log", kind="trl"):
    """{step: loss} out of a folder's main.log. A step that was run twice counts the second time."""
    log = Path(folder, "main.log").read_text("utf-8")
    return {int(s): float(loss) for s, loss in re.findall(rf"^s:(\d+) {kind}:(\S+)", log, re.M)}


def load(path):
    return torch.load(path, weights_only=True)


def assert_same_run(a, b):
    """Two folders have the same losses, and checkpoints with the same weights, to the last bit."""
    for kind in "trl", "tel":
        assert log_of(a, kind) == log_of(b, kind)
    for name in "last.pt", "best.pt":
        one, other = load(f"{a}/{name}")["model"], load(f"{b}/{name}")["model"]
        assert all(torch.equal(one[key], other[key]) for key in one)


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
    """If model, loss, gradients and optimizers are right, a batch is learned by heart."""
    main([*small, "--overfit_single_batch", "--n_embd=256", "--num_iterations=40",
          "--val_loss_every=0"])
    losses = log_of()
    assert abs(losses[0] - math.log(257)) < 0.5 and losses[39] < 0.05, losses


def test_default_run(capsys, monkeypatch):
    """python train_gpt2.py: how well it learns, what a newcomer sees, and what is left behind."""
    monkeypatch.setitem(train_gpt2.PEAK_FLOPS, "cpu", 1e11)
    assert main([]) == 0
    out = capsys.readouterr().out
    assert "828,800 parameters" in out and out.count("--- a sample after") == 4
    validations = log_of("logtiny", "tel")
    assert list(validations) == [0, 200, 400, 600] and validations[600] < 1.20
    # what GPT.__init__() says of the untrained model: below ln 257 = 5.55, as the table is tied
    assert validations[0] == pytest.approx(5.22, abs=0.1)
    # the console and main.log agree, line by line
    log = ["s:0 flags:0 "]
    for s, line in re.findall(r"^step +(\d+)/600 \| (.*)", out, re.M):
        words = line.split()
        if words[0] == "val":
            log.append(f"s:{s} tel:{words[2]}")
        else:
            log.append(f"s:{s} trl:{words[1]} lr:{words[4]} norm:{words[7]} ms:{words[9]}")
            # 6 FLOP a weight and token, and attention's 12 C T a layer
            share = float(words[12].replace(",", "")) * (6 * 828_800 + 12 * 4 * 128 * 128) / 1e11
            assert words[15] == "MFU" and abs(float(words[16][:-1]) - 100 * share) < 0.1
    assert Path("logtiny/main.log").read_text("utf-8").splitlines() == log
    # what it names next works
    sample, shards = re.findall(r"^    python (.*)", out, re.M)
    assert shards == "fineweb.py --shards 10"
    main(shlex.split(sample)[1:])
    assert capsys.readouterr().out.startswith("def ")
    # and so do the three lines for a notebook at the head of section 5
    text = Path(SCRIPT).read_text("utf-8").split("\n# 5. ")[1].split("\ndef ")[0]
    *lines, evaluate = re.findall("^#     (.*)", text, re.M)
    exec("\n".join(lines), names := dict(vars(train_gpt2)))
    assert eval(evaluate, names) == pytest.approx(validations[600], abs=0.2)


# -------------------------------------------------------------------------------------------------
# 1. The model

@pytest.mark.parametrize("flags, count", [
    ("--model=tiny", 828_800), ("--model=d12", 116_510_976), ("--model=d24", 329_961_472),
    ("--model=d36", 719_191_808), ("--model=d48", 1_560_122_944),
    # OpenAI's number, and 47 rows that pad the vocabulary
    ("--model=d12 --arch=gpt2", 124_439_808 + 47 * 768),
])
def test_parameter_counts(flags, count):
    args, _ = train_gpt2.parse_args(flags.split())
    shape = {name: getattr(args, name) for name in vars(GPTConfig()) if name in args}
    vocab_size = 257 if args.model == "tiny" else 50257
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=vocab_size, block_size=args.sequence_length, **shape))
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("arch", [GPT2_ARCH, {"qk_norm": False}, {}, {"n_kv_head": 1}],
                         ids=["GPT-2", "Llama", "Qwen3", "Qwen3, one key/value head"])
def test_logits_equal_those_of_transformers(arch):
    """The same weights, gains and biases included, give the same logits there."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    model = tiny_model(shake=0.1, n_embd=64, **arch)
    theirs = train_gpt2.to_transformers(model.config, model.state_dict()).eval()
    assert type(theirs).__name__.startswith(("GPT2", "Llama", "Qwen3"))
    ours = model(random_ids(2, 32))[..., :100]
    # close to zero the comparison would mean little
    assert ours.std() > 0.5 and (ours - theirs(random_ids(2, 32)).logits).abs().max() < 1e-4


@pytest.mark.parametrize("switch", [
    {"norm": "layernorm"}, {"mlp": "gelu"}, {"pos": "learned"}, {"n_kv_head": 4}, {"bias": True},
    {"qk_norm": False}], ids=str)
def test_each_switch_changes_the_model(switch):
    base = tiny_model()
    other = tiny_model(**switch)
    with torch.no_grad():
        for name, p in other.named_parameters():
            if name.endswith("bias"):
                p.fill_(0.1)
            elif name in base.state_dict() and p.shape == base.get_parameter(name).shape:
                p.copy_(base.get_parameter(name))
    assert not torch.allclose(base(random_ids(2, 32)), other(random_ids(2, 32)), atol=1e-4)


@pytest.mark.parametrize("wrong", [
    {"norm": "rms"}, {"mlp": "relu2"}, {"pos": "none"}, {"n_head": 5}, {"n_kv_head": 3},
    {"n_embd": 36}], ids=str)
def test_what_no_config_can_be(wrong):
    """A checkpoint with a switch that we do not know must not open as something else."""
    with pytest.raises(ValueError):
        GPTConfig(**{"n_head": 4, "n_kv_head": 2, "n_embd": 32, **wrong})


def test_rope_depends_on_distance_alone():
    """One query and one key at all times: the score depends on their distance, whatever the head.

    Rotated along heads instead of time, all scores of a row would be equal.
    """
    torch.manual_seed(0)
    tables = train_gpt2.rope_tables(64, 16)
    q = train_gpt2.apply_rope(torch.randn(16).expand(1, 64, 3, 16), *tables)[0]
    k = train_gpt2.apply_rope(torch.randn(16).expand(1, 64, 3, 16), *tables)[0]
    assert torch.equal(q[:, 0], q[:, 2])
    scores = q[:, 0] @ k[:, 0].T
    for distance in 0, 1, 7, 40:
        diagonal = scores.diagonal(-distance)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4)
    assert scores[:, 0].std() > 0.1


@pytest.mark.parametrize("pos", ["rope", "learned"])
def test_the_model_knows_the_order_of_words(pos):
    """One layer without positions would see the words before the last as a set."""
    model = tiny_model(n_layer=1, pos=pos)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5)  # attention far from uniform
    a, b = model(torch.tensor([[3, 14, 15, 92, 65, 35], [14, 3, 65, 92, 15, 35]]))[:, -1, :100]
    assert (a - b).abs().max() > 1e-3


@both_archs
def test_no_position_sees_the_future(arch):
    model = tiny_model(**arch)
    x = random_ids(1, 32)
    a = model(x)[0, :, :100]
    x[0, 20] = (x[0, 20] + 1) % 100
    b = model(x)[0, :, :100]
    assert torch.equal(a[:20], b[:20]) and not torch.allclose(a[20:], b[20:])


def test_attention_stores_no_square_matrix():
    """No step of a forward and backward pass has a (T, T) tensor."""
    x = random_ids(2, 80)
    model = tiny_model(block_size=80)  # 80: a width that nothing else has
    with torch.profiler.profile(record_shapes=True) as profile:
        model(x, x).backward()
    events = profile.key_averages(group_by_input_shape=True)
    shapes = [shape for event in events for shape in event.input_shapes if shape]
    assert [2, 80] in shapes and not [shape for shape in shapes if shape[-2:] == [80, 80]]


class LooksLikeCuda(torch.Tensor):
    """A tensor in the computer's memory that says it is on a GPU."""

    device = torch.device("cuda")


@pytest.mark.parametrize("dtype, heads", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_attention_on_a_gpu(dtype, heads, monkeypatch):
    """In fp32, keys and values are repeated to all heads; the result is that of grouped heads."""
    torch.manual_seed(0)
    qkv = [torch.randn(2, n, 16, 8, dtype=dtype) for n in (4, 2, 2)]
    real = F.scaled_dot_product_attention
    grouped = real(*qkv, is_causal=True, enable_gqa=True)
    seen = []

    def spy(q, k, v, **flags):
        seen.append((q.size(1), k.size(1), v.size(1), q.dtype))
        return real(q, k, v, **flags)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    y = train_gpt2.causal_attention(*(h.as_subclass(LooksLikeCuda) for h in qkv))
    assert seen == [(4, heads, heads, dtype)]
    assert torch.allclose(y.as_subclass(torch.Tensor), grouped, atol=1e-6)


def test_initial_weights():
    """N(0, 0.02^2), what writes into the residual stream less, and so a first loss of ln V."""
    model = tiny_model(n_layer=8, n_embd=128, **GPT2_ARCH)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name
        else:
            scale = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(scale, rel=0.1), name
    x = random_ids(8, 33)
    assert abs(model(x[:, :-1], x[:, 1:]).item() - math.log(100)) < 0.1


# -------------------------------------------------------------------------------------------------
# 2. The loss

@pytest.mark.parametrize("rows", [13, 48, 1000])
def test_head_loss_is_cross_entropy(rows, monkeypatch):
    """The value and both gradients, whatever the slices."""
    monkeypatch.setattr(train_gpt2, "HEAD_ROWS", rows)
    torch.manual_seed(0)
    x = torch.randn(96, 8, requires_grad=True)
    w = torch.randn(128, 8, requires_grad=True)
    targets = random_ids(96)
    plain = 3 * F.cross_entropy(x @ w[:100].T, targets)
    ours = 3 * HeadLoss.apply(x, w, targets, 100)
    gradients = zip(torch.autograd.grad(ours, (x, w)), torch.autograd.grad(plain, (x, w)),
                    strict=True)
    for a, b in (ours, plain), *gradients:
        assert torch.allclose(a, b, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(3 * HeadLoss.apply(x, w, targets, 100), ours)


def test_head_loss_of_a_sure_token():
    """In bf16 the gradient of a token that the model is almost sure of does not vanish."""
    x = torch.tensor([[8.0]], dtype=torch.bfloat16, requires_grad=True)
    w = torch.tensor([[1.0], [0.0]], requires_grad=True)
    HeadLoss.apply(x, w, torch.tensor([0]), 2).backward()
    assert x.grad.item() == pytest.approx(-math.exp(-8), rel=0.02)


def test_head_loss_keeps_no_logits(monkeypatch):
    """What it keeps for the backward pass is as large as x and the weight, not (N, V)."""
    monkeypatch.setattr(train_gpt2, "HEAD_ROWS", 64)
    x = torch.randn(512, 8, requires_grad=True)
    w = torch.randn(4096, 8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), print):
        HeadLoss.apply(x, w, torch.zeros(512, dtype=torch.long), 4096)
    assert sorted(kept) == [512 * 8, 4096 * 8]


def test_padding_gets_no_probability():
    """A vocabulary of 100 is padded to 128: those ids are never predicted, and learn nothing."""
    model = tiny_model()
    x = random_ids(2, 32)
    with torch.no_grad():
        model.lm_head.weight[100:] = 50.0
    logits = model(x)
    assert logits.shape[-1] == 128 and (logits[..., 100:] == -math.inf).all()
    model(x, x).backward()
    assert not model.lm_head.weight.grad[100:].any() and model.lm_head.weight.grad[:100].any()


@both_archs
def test_the_model_compiles_to_one_graph(arch, monkeypatch):
    """torch.compile need not go back to Python half-way, and gets the same gradients."""
    monkeypatch.setattr(train_gpt2, "HEAD_ROWS", 40)
    torch._dynamo.reset()
    model = tiny_model(**arch)
    x = random_ids(3, 32)
    model(x, x).backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    # aot_eager: everything but the C++ compiler, which a machine may lack
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch.no_grad():
        validation = compiled(x, x)
    loss = compiled(x, x)
    loss.backward()
    assert torch.allclose(loss, validation, atol=1e-6)
    for p, gradient in zip(model.parameters(), plain, strict=True):
        assert torch.allclose(p.grad, gradient, atol=1e-6)


# -------------------------------------------------------------------------------------------------
# 3. The data

def counting_shards(sizes, T, seed=None):
    """A loader over shards of running numbers, so that a token says where it comes from."""
    starts = np.cumsum((0, *sizes))
    for i, n in enumerate(sizes):
        fineweb.write_shard(f"count_train_{i:06d}.bin", np.arange(starts[i], starts[i] + n))
    return TokenLoader("count_train_*.bin", T, seed)


@pytest.mark.parametrize("seed", [None, 7])
def test_every_token_once_an_epoch(seed):
    """Every token is a target once, but for a shard's first and its last few; never across shards.

    Without a seed they come in the order in which they lie.
    """
    sizes = (1000, 333, 64, 10, 777)
    loader = counting_shards(sizes, 16, seed)
    assert loader.total == sum((n - 1) // 16 for n in sizes)
    seen = []
    for first in range(0, loader.total, 5):
        x, y = loader.batch(first, min(5, loader.total - first), CPU)
        assert x.dtype == torch.int64 and x.is_contiguous() and y.is_contiguous()
        assert (y == x + 1).all() and torch.equal(x[:, 1:], y[:, :-1])
        seen += y.flatten().tolist()
    starts = np.cumsum((0, *sizes)).tolist()
    expected = [start + i for start, n in zip(starts, sizes, strict=False)
                for i in range(1, (n - 1) // 16 * 16 + 1)]
    assert sorted(seen) == expected and (seen == expected) == (seed is None)


def test_epochs_are_shuffled_anew():
    """Each epoch and each seed has an order of its own, and any process finds the same one."""
    def epoch(number, seed=7):
        loader = counting_shards((2000, 3000), 16, seed)
        return loader.batch(number * loader.total, loader.total, CPU)[0][:, 0].tolist()

    assert epoch(0) == epoch(0) and sorted(epoch(0)) == sorted(epoch(1))
    assert epoch(0) != epoch(1) and epoch(0) != epoch(0, seed=8)
    # the shards' order changes too
    assert len({epoch(number)[0] < 2000 for number in range(8)}) == 2
    # a batch over the end of an epoch takes from both
    loader = counting_shards((2000, 3000), 16, 7)
    x, _ = loader.batch(loader.total - 2, 4, CPU)
    assert x[:, 0].tolist() == epoch(0)[-2:] + epoch(1)[:2]


def test_the_example_in_the_docstring_is_true():
    """Shards of 3 and 2 sequences. If shard 1 comes first, numbers 2, 3, 4 are in shard 0."""
    orders = [train_gpt2.permutation(2, seed, 0).tolist() for seed in range(20)]
    seed = orders.index([1, 0])
    loader = counting_shards((3 * 8 + 1, 2 * 8 + 5), 8, seed)
    assert [loader.locate(number)[0] for number in range(5)] == [1, 1, 0, 0, 0]
    assert loader.locate(4)[1] == train_gpt2.permutation(3, seed, 0, 0)[2]
    assert loader.locate(5)[0] == train_gpt2.permutation(2, seed, 1)[0]


@pytest.mark.parametrize("vocab_size, tokenizer", [(257, "bytes"), (50257, "gpt2"), (0, "gpt2")])
def test_a_shard_says_which_vocabulary_it_has(vocab_size, tokenizer):
    """0 is what llm.c's shards have there."""
    fineweb.write_shard("a_train_1.bin", np.arange(100), vocab_size)
    loader = TokenLoader("a_train_*.bin", 16)
    assert (loader.vocab_size, loader.tokenizer) == (vocab_size or 50257, tokenizer)


# -------------------------------------------------------------------------------------------------
# 4. The optimizer

def test_schedules():
    args = argparse.Namespace(learning_rate=1.2e-3, warmup_iters=700, num_iterations=19000)

    def rates(*steps):
        return [train_gpt2.get_lr(step, args) / args.learning_rate for step in steps]

    args.schedule = "cosine"
    # a cosine has gone a quarter of its way where a straight line has gone a third
    wanted = [0.1, 0.55, 1, 0.1 + 0.9 * 0.75, 0.55, 0.1]
    assert rates(0, 350, 700, 700 + 6100, 700 + 9150, 19000) == pytest.approx(wanted)
    args.schedule = "wsd"
    assert rates(0, 350, 700, 5700, 12350, 19000) == pytest.approx([0.1, 0.55, 1, 1, 0.5, 0])
    args.schedule = "linear"
    with pytest.raises(ValueError):
        train_gpt2.get_lr(18000, args)


def test_the_rates_in_the_docstring():
    """What d12 gets at some of its steps, by both recipes."""
    table = train_gpt2.get_lr.__doc__
    steps = [int(step.replace(",", "")) for step in re.search(r"step +(.*)", table)[1].split()]
    rows = re.findall(r"--recipe (\w+) +\(\w+\) +(.*)", table)
    assert len(rows) == 2 and len(steps) == 4
    for recipe, shown in rows:
        args, _ = train_gpt2.parse_args(["--model=d12", f"--recipe={recipe}"])
        rates = [float(f"{train_gpt2.get_lr(step, args):.1e}") for step in steps]
        assert rates == [float(rate) for rate in shown.split()]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_each_optimizer_has(optimizer):
    """Vectors do not decay, Muon has the matrices of the blocks alone, nothing is left out."""
    model = tiny_model(**GPT2_ARCH)
    args = argparse.Namespace(optimizer=optimizer, learning_rate=1e-3, weight_decay=0.1)
    found = {}
    for one in train_gpt2.make_optimizers(model, args, "float32"):
        for group in one.param_groups:
            for p in group["params"]:
                assert p not in found
                found[p] = (type(one).__name__, group["weight_decay"])
    for name, p in model.named_parameters():
        kind = "Muon" if optimizer == "muon" and ".h." in name and p.dim() == 2 else "AdamW"
        assert found.pop(p) == (kind, 0.1 if p.dim() == 2 else 0.0), name
    assert not found


def three_steps(weights, make):
    """Weights after three steps of the optimizer that make(parameters) returns.

    A weight's gradients depend on the step and on itself, and on no other weight.
    """
    params = [nn.Parameter(w.clone()) for w in weights]
    optimizer = make(params)
    for step in range(3):
        for p in params:
            torch.manual_seed(step)
            p.grad = torch.randn_like(p) + (5 * p.detach()).sin()
        optimizer.step()
    return [p.detach() for p in params]


def test_muon_is_pytorchs():
    """Three steps with matrices of one shape together are those of torch.optim.Muon, one by one."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this PyTorch has no Muon")
    torch.manual_seed(0)
    begin = [torch.randn(shape) for shape in [(48, 48), (48, 48), (24, 48), (128, 48), (48, 128)]]
    ours = three_steps(begin, lambda params: train_gpt2.Muon(params, 0.01, 0.1))
    theirs = three_steps(begin, lambda params: torch.optim.Muon(
        params, 0.01, 0.1, 0.95, adjust_lr_fn="match_rms_adamw"))
    for p, q, first in zip(ours, theirs, begin, strict=True):
        # as close as bf16 gets: small beside the way that they have gone
        assert (p - q).norm() < 0.05 * (q - first).norm()


def test_muon_does_not_depend_on_its_groups(monkeypatch):
    """20 matrices of a shape are more than go together: the same as if each were alone."""
    sizes = []
    real = train_gpt2.orthogonalize
    monkeypatch.setattr(train_gpt2, "orthogonalize", lambda m: sizes.append(len(m)) or real(m))

    def make(params):
        return train_gpt2.Muon(params, 0.01, 0.1, dtype=torch.float32)

    torch.manual_seed(0)
    begin = list(torch.randn(20, 8, 24))
    together = three_steps(begin, make)
    assert max(sizes) < 20
    for weight, after in zip(begin, together, strict=True):
        assert torch.allclose(three_steps([weight], make)[0], after, atol=1e-4)


@pytest.mark.parametrize("rows, cols", [(32, 64), (64, 32)])
def test_orthogonalize(rows, cols):
    """Whatever the singular values were, they are about 1, and the directions are the same."""
    torch.manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(3, rows, cols), full_matrices=False)
    X = train_gpt2.orthogonalize(100 * u @ torch.diag(torch.logspace(0, -1.5, 32)) @ vh)
    values = torch.linalg.svdvals(X)
    assert 0.65 < values.min() and values.max() < 1.25, values
    assert ((u.mT @ X @ vh.mT).diagonal(dim1=1, dim2=2) > 0.6).all()


# -------------------------------------------------------------------------------------------------
# 5. Evaluate and sample

@pytest.mark.parametrize("world_size, batch_size", [(1, 1), (1, 16), (1, 64), (2, 16), (3, 4)])
def test_validation_counts_the_same_tokens(world_size, batch_size, small):
    """For any batch size and number of processes."""
    model = tiny_model(vocab_size=257)
    data = TokenLoader("sums_val_*.bin", 32)
    parts = [train_gpt2.evaluate(model, data, 70, batch_size, rank=rank, world_size=world_size)
             for rank in range(world_size)]
    assert sum(parts) == pytest.approx(model(*data.batch(0, 70, CPU)).item(), abs=1e-5)


def test_generate():
    """The likeliest id each time, over as much of the text as the model can see."""
    model = tiny_model(shake=0.3)  # without, it would only repeat itself
    with torch.no_grad():
        model.lm_head.weight[99] = 0  # <|endoftext|>
    ids = [5]
    for token in train_gpt2.generate(model, [5], 60, temperature=0):
        assert token == model(torch.tensor([ids[-32:]]))[0, -1].argmax()
        ids.append(token)
    assert len(ids) == 61 and len(set(ids)) > 5

    def draw(count, seed=0, **how):
        generator = torch.Generator().manual_seed(seed)
        return list(train_gpt2.generate(model, [5], count, generator=generator, **how))

    assert draw(60) == draw(60) != draw(60, seed=1) and draw(60, top_k=1) == ids[1:]
    firsts = {draw(1, seed, temperature=3, top_k=5)[0] for seed in range(40)}
    likeliest = model(torch.tensor([[5]]))[0, -1].topk(5).indices.tolist()
    assert firsts <= set(likeliest) and len(firsts) > 2
    # without top_k every id may come, but none that only pads the vocabulary
    with torch.no_grad():
        model.lm_head.weight[100:] = 50.0
    everything = {token for seed in range(5) for token in draw(100, seed, temperature=9, top_k=0)}
    assert len(everything) > 50 and max(everything) < 100
    # a model that says 7, and after 7 <|endoftext|>
    model.forward = lambda x: F.one_hot(torch.where(x == 7, 99, 7), 128).float()
    assert list(train_gpt2.generate(model, [5], 10, temperature=0)) == [7]


@pytest.mark.parametrize("prompt, ids", [
    ("dé", [256, 100, 0xC3, 0xA9]),
    ("<|endoftext|>dé", [256, 100, 0xC3, 0xA9]),
    ("a<|endoftext|>b", [256, 97, 256, 98]),
])
def test_prompts_and_pieces_of_characters(prompt, ids, capsys, monkeypatch):
    """<|endoftext|> begins every prompt, once. Half a character appears as a mark."""
    asked = []

    def generate(model, ids, *args, **how):
        asked.extend(ids)
        return iter([*"né→".encode(), 0xE2, 0x41])

    monkeypatch.setattr(train_gpt2, "generate", generate)
    train_gpt2.print_sample(tiny_model(vocab_size=257), "bytes", prompt)
    assert capsys.readouterr().out == f"{prompt}né→\N{REPLACEMENT CHARACTER}A\n"
    assert asked == ids


def save_model(path, model, tokenizer="gpt2", **wrong):
    """Stores a model as a run stores it in best.pt, but with something wrong in its config."""
    config = dataclasses.asdict(model.config) | wrong
    state = {"config": config, "model": model.state_dict(), "tokenizer": tokenizer}
    train_gpt2.save_checkpoint(Path(path), state)


def test_a_model_in_a_notebook():
    """load_model() takes strings; more ids than the model can see are one line."""
    model = tiny_model(vocab_size=257)
    save_model("a.pt", model, "bytes")
    again, tokenizer = train_gpt2.load_model("a.pt", "cpu")
    assert torch.equal(again(random_ids(1, 32)), model(random_ids(1, 32))) and tokenizer == "bytes"
    with pytest.raises(ValueError, match="^33 tokens .* 32$"):
        model(random_ids(1, 33))


# -------------------------------------------------------------------------------------------------
# 6. The flags

VARIANT = dict(norm="rmsnorm", mlp="swiglu", pos="rope", bias=False, qk_norm=True)
ORIGINAL = dict(optimizer="adamw", schedule="cosine", qk_norm=False)


@pytest.mark.parametrize("flags, values", [
    ("", dict(
        VARIANT, model="tiny", n_layer=4, n_head=4, n_kv_head=2, n_embd=128, learning_rate=4e-3,
        sequence_length=128, total_batch_size=2048, num_iterations=600, warmup_iters=20,
        val_loss_every=200, log_every=20, compile=False, output_dir="logtiny")),
    ("--model=d12", dict(
        VARIANT, n_layer=12, n_head=12, n_kv_head=6, n_embd=768, learning_rate=2.4e-3,
        sequence_length=1024, total_batch_size=524288, num_iterations=19073, warmup_iters=250,
        val_loss_every=250, log_every=1, compile=None, optimizer="muon", schedule="wsd",
        weight_decay=0.1, grad_clip=1.0, output_dir="log124M")),
    ("--n_head=8", dict(n_kv_head=4)),
    ("--n_head=1", dict(n_kv_head=1)),
    ("--model=d24", dict(n_kv_head=8, learning_rate=1.2e-3, output_dir="log350M")),
    ("--model=d36", dict(n_kv_head=10, learning_rate=1e-3, output_dir="log774M")),
    ("--model=d48", dict(n_kv_head=25, learning_rate=8e-4, output_dir="log1558M")),
    ("--model=d12 --arch=gpt2", dict(train_gpt2.GPT2, n_kv_head=12, optimizer="muon")),
    ("--model=d12 --arch=gpt2 --n_head=8 --pos=rope",
     dict(n_kv_head=8, pos="rope", norm="layernorm")),
    ("--model=d12 --recipe=original", dict(ORIGINAL, learning_rate=1.2e-3, warmup_iters=715)),
    ("--model=d24 --recipe=original --optimizer=muon --learning_rate=0.5",
     dict(ORIGINAL, optimizer="muon", learning_rate=0.5)),
    ("--init_from=gpt2-medium", dict(
        train_gpt2.GPT2, n_layer=24, n_kv_head=16, optimizer="adamw", learning_rate=3e-5,
        warmup_iters=0, total_batch_size=32768, output_dir="log_gpt2-medium")),
    ("--init_from=gpt2 --total_batch_size=4096", dict(total_batch_size=4096)),
    # a short run warms up for a tenth of it, unless something else is typed
    ("--model=d12 --num_iterations=150", dict(warmup_iters=15)),
    ("--model=d12 --num_iterations=150 --warmup_iters=100", dict(warmup_iters=100)),
])
def test_presets_and_recipes(flags, values):
    """Value by value; and a flag beside a preset, --arch or --recipe wins."""
    args, _ = train_gpt2.parse_args(flags.split())
    assert {name: getattr(args, name) for name in values} == values


@pytest.mark.parametrize("left", [
    {"RANK": "1"}, {"RANK": "abc"}, {"WORLD_SIZE": "0"}, {"LOCAL_RANK": "7"}, {"RANK": ""},
    {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "nowhere"},
    {"MASTER_PORT": "x"}, {"TORCHELASTIC_RUN_ID": "none"},
], ids=str)
def test_leftovers_in_the_environment(left, small, monkeypatch, capsys):
    """Only torchrun makes a group of processes. What something else has set stops nobody."""
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as e:
        main(["--help"])
    assert e.value.code == 0 and main([*small, "--num_iterations=1"]) == 0
    said = "training alone" in capsys.readouterr().out
    assert said == any(name in TORCHRUN[:3] for name in left) and load("log/last.pt")["step"] == 1


def test_more_processes_than_gpus(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert train_gpt2.pick_device(None, 0) == torch.device("cuda", 0)
    fails([], capsys, "process 1", "--nproc_per_node",
          main=lambda argv: train_gpt2.pick_device(None, 1))


def test_autocast_follows_the_hardware(monkeypatch):
    for able, native in [({"amx_bf16": True}, True), ({"avx512_bf16": True}, True),
                         ({"bf16": True}, True), ({"avx512_f": True, "amx_bf16": False}, False)]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able, raising=False)
        dtype, autocast = train_gpt2.pick_autocast(None, CPU)
        assert dtype == ("bfloat16" if native else "float32")
        with autocast():
            assert torch.is_autocast_enabled("cpu") == native
    assert train_gpt2.pick_autocast("bfloat16", CPU)[0] == "bfloat16"


def test_micro_batches_fit_the_device(monkeypatch):
    """They divide a step; a small GPU, fp32 and a model that is not compiled get smaller ones."""
    def pick(gigabytes, model="d12", dtype="bfloat16", compiled=True, sequences=512):
        memory = types.SimpleNamespace(total_memory=gigabytes * 1e9)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
        args, _ = train_gpt2.parse_args([f"--model={model}"])
        device = torch.device("cuda" if gigabytes else "cpu")
        return train_gpt2.pick_batch_size(args, device, dtype, compiled, sequences)

    assert [pick(gigabytes) for gigabytes in (80, 24, 12, 8)] == [64, 16, 8, 4]
    assert [pick(80, model) for model in ("d24", "d36", "d48")] == [32, 16, 8]
    assert pick(80, dtype="float32") == pick(80, compiled=False) == 32
    assert pick(80, sequences=30) == 30 and pick(8, "d48") == 1
    # on a CPU 4096 tokens
    assert [pick(0, sequences=sequences) for sequences in (512, 6, 5)] == [4, 3, 1]


def test_an_import_has_no_side_effects():
    """In a notebook, whatever stands in the environment and on the command line."""
    code = f"""
import signal, sys
sys.path.insert(0, {str(Path(SCRIPT).parent)!r})
handlers = [signal.getsignal(number) for number in signal.valid_signals()]
import train_gpt2
assert handlers == [signal.getsignal(number) for number in signal.valid_signals()]
train_gpt2.GPT(train_gpt2.GPTConfig(n_layer=1, n_embd=24, vocab_size=10))
"""
    done = python("-c", code, "--nonsense")
    assert done.stdout == done.stderr == ""


# -------------------------------------------------------------------------------------------------
# 7. Training

def test_accumulation_equals_one_large_batch(small):
    """The same losses and gradients, however many sequences there are in a micro-batch."""
    for size in 16, 4, 1:
        main([*small, "--optimizer=adamw", f"--batch_size={size}", f"--output_dir=log{size}"])
    for kind in "trl", "tel", r"trl:\S+ lr:\S+ norm":
        one = log_of("log16", kind)
        assert len(one) == (3 if kind == "tel" else 6)
        assert log_of("log4", kind) == pytest.approx(one, rel=1e-4)
        assert log_of("log1", kind) == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize("grad_clip", ["1", "0"])
def test_gradients_are_clipped(grad_clip, small, monkeypatch):
    """Where a gradient is longer than 1, the optimizers get it at length 1; 0 means never."""
    real = train_gpt2.Muon.step
    lengths = []

    def step(self):
        gradients = [p.grad.norm().item() for p in self.param_groups[0]["params"]]
        lengths.append(math.hypot(*gradients))
        real(self)

    monkeypatch.setattr(train_gpt2.Muon, "step", step)
    main([*small, "--n_embd=128", f"--grad_clip={grad_clip}"])
    assert max(log_of("log", r"trl:\S+ lr:\S+ norm").values()) > 2
    assert (max(lengths) <= 1) == (grad_clip == "1")


class Crash(Exception):
    """Ends a run as a power cut would, where a test wants it."""


def in_step(monkeypatch, when, action):
    """Calls action() in the step `when` of the runs that follow, before its update."""
    real = train_gpt2.get_lr

    def get_lr(step, args):
        if step == when:
            action()
        return real(step, args)

    monkeypatch.setattr(train_gpt2, "get_lr", get_lr)


def crash():
    raise Crash


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resume_is_exact(small, optimizer, monkeypatch):
    """A run that crashed and was resumed has the losses of one that did not, and its weights."""
    small += [f"--optimizer={optimizer}", "--num_iterations=8", "--batch_size=8"]
    main([*small, "--output_dir=straight"])
    with monkeypatch.context() as patch, pytest.raises(Crash):
        in_step(patch, 5, crash)
        main(small)
    assert load("log/last.pt")["step"] == 3 and max(log_of()) == 4
    assert main([*small, "--resume"]) == 0
    assert_same_run("log", "straight")


def test_resume_takes_its_flags_from_the_run(small, capsys):
    """What is typed wins, and is said, with the next rate. Without a last.pt a new run begins."""
    main([*small, "--resume", "--learning_rate=0.004", "--prompt=7 plus"])
    assert "log has no last.pt" in capsys.readouterr().out
    fails(["--resume", "--output_dir=lgo"], capsys, "lgo/last.pt", "--model")
    assert main(["--resume", "--output_dir=log", "--num_iterations=12", "--seed=3"]) == 0
    out = capsys.readouterr().out
    changed, rate = re.search("NOTE: now with (.*) [|] lr of the next step (.*)", out).groups()
    assert changed == "--num_iterations 12 --seed 3"
    assert float(rate) == pytest.approx(log_of("log", r"trl:\S+ lr")[6], rel=0.01)
    state = load("log/last.pt")
    assert state["step"] == 12 and state["config"]["n_embd"] == 32
    assert (state["args"]["learning_rate"], state["args"]["prompt"]) == (0.004, "7 plus")


def test_best_and_last(small, monkeypatch, capsys):
    """best.pt has the weights of the lowest validation loss alone, last.pt all that a run needs."""
    # the rate becomes far too high, so the loss rises again
    monkeypatch.setattr(train_gpt2, "get_lr", lambda step, args: 1e-3 if step < 6 else 0.5)
    main([*small, "--num_iterations=12", "--val_loss_every=2"])
    losses = log_of("log", "tel")
    del losses[0]
    lowest = min(losses.values())
    best, last = load("log/best.pt"), load("log/last.pt")
    assert losses[best["step"]] == lowest and best["step"] < last["step"] == 12
    assert last["best_val_loss"] == best["val_loss"] == pytest.approx(lowest, abs=1e-6)
    assert "optimizer" not in best and not list(Path("log").glob("*.tmp"))
    # a resumed run knows what was lowest, but only of the same text
    again = ["--resume", "--output_dir=log"]
    main([*again, "--num_iterations=14"])
    assert load("log/best.pt")["step"] == best["step"]
    Path("sums_val_000000.bin").rename("sums_val_000001.bin")
    capsys.readouterr()
    main([*again, "--num_iterations=16"])
    assert "NOTE: other validation text" in capsys.readouterr().out
    assert load("log/best.pt")["step"] > best["step"]


def test_a_killed_run_leaves_a_checkpoint(small):
    """kill -9 while the second last.pt is being written: the first is still there, and goes on."""
    small += ["--val_loss_every=2", "--batch_size=8"]
    main([*small, "--output_dir=straight"])
    python(changed_script("""
real = torch.save
def save(state, f):
    real(state, f)
    if state["step"] == 4 and "optimizer" in state:
        os.truncate(f.name, 1000)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = save"""), *small, code=-signal.SIGKILL)
    assert load("log/last.pt")["step"] == 2 and load("log/best.pt")["step"] == 4
    assert main([*small, "--resume"]) == 0
    assert list(log_of()) == list(log_of("straight"))


def test_a_checkpoint_is_on_the_disk_before_it_gets_its_name(monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: calls.append("fsync") or fsync(f))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append("replace") or replace(a, b))
    assert train_gpt2.save_checkpoint(Path("a.pt"), {"step": 1})
    assert calls == ["fsync", "replace"] and load("a.pt") == {"step": 1}


def test_a_full_disk_leaves_the_old_checkpoint(small, capsys):
    """A limit on the size of files stands in for the disk: a write fails half-way, as there."""
    main(small)
    before = Path("log/last.pt").read_bytes()
    again = ["--resume", "--output_dir=log", "--num_iterations=12"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        out = fails(again, capsys, "are lost", "make room", "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    # it warned, and went on to the end
    assert "WARNING: cannot write log/last.pt" in out and max(log_of()) == 11
    assert Path("log/last.pt").read_bytes() == before and not list(Path("log").glob("*.tmp"))
    assert main(again) == 0


def test_a_terminal_that_is_gone_ends_no_run(small, monkeypatch):
    def gone(*args):
        raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(write=gone, flush=gone))
    assert main(small) == 0 and load("log/last.pt")["step"] == 6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_a_run_gently(number, small, capsys, monkeypatch):
    """It ends after the step and saves, and the command that it prints leaves no difference."""
    small += ["--batch_size=8", "--output_dir=my log"]
    main([*small, "--output_dir=straight"])
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        in_step(patch, 3, lambda: os.kill(os.getpid(), number))
        assert main(small) == 128 + number
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert load("my log/last.pt")["step"] == 4
    command = re.search(r"python train_gpt2\.py (--resume.*)", capsys.readouterr().out)[1]
    assert main(shlex.split(command)) == 0
    assert_same_run("my log", "straight")


def test_a_second_ctrl_c_ends_at_once(small, monkeypatch):
    """In the middle of a step. Then the folder is free, and Ctrl-C does what it did before."""
    # what a terminal has; in the background of a script it would be ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        in_step(patch, 1, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
        main(small)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert not Path("log/last.pt").exists() and main(small) == 0


def test_earlier_runs_are_kept(small, capsys):
    """They move to NAME.1 and NAME.2, and where NAME is a link, the folder behind it does."""
    Path("disk/run").mkdir(parents=True)
    Path("my log").symlink_to("disk/run")
    # one shard by its path, and a validation shard of another number
    small += ["--num_iterations=1", "--output_dir=my log", "--input_bin=sums_train_000002.bin"]
    Path("sums_val_000000.bin").rename("sums_val_000123.bin")
    for seed in 1, 2, 3:
        assert main([*small, f"--seed={seed}"]) == 0
    out = capsys.readouterr().out
    for seed, folder in enumerate(("disk/run.1", "disk/run.2", "my log"), 1):
        assert load(f"{folder}/last.pt")["args"]["seed"] == seed and len(log_of(folder)) == 1
    assert Path("my log").is_symlink() and len(list(Path("disk").iterdir())) == 3
    # what it was made with, in a line that llm.c's plots can read
    for line in Path("my log/main.log").read_text("utf-8").splitlines():
        step, value = line.split()[:2]
        int(step.split(":")[1]), float(value.split(":")[1])
    flags = "--output_dir 'my log'"
    assert out.count(flags) == 3 and flags in Path("my log/main.log").read_text("utf-8")
    # the command that is printed can be pasted
    main(shlex.split(re.findall(r"^    python train_gpt2\.py (--sample.*)", out, re.M)[-1]))
    assert capsys.readouterr().out.startswith("def ")


def torchrun(*command, code=0):
    """The script in two processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return python(*launcher, *command, code=code).stdout


def test_two_processes_train_as_one(small):
    """The same losses to rounding, and gradients meet once a step, not in every micro-batch."""
    small += ["--optimizer=adamw", "--batch_size=2", "--learning_rate=1e-3"]
    main([*small, "--output_dir=one"])
    out = torchrun(changed_script("""
class Counting(torch.nn.parallel.DistributedDataParallel):
    meetings = []
    def forward(self, *args):
        self.meetings.append(self.require_backward_grad_sync)
        if len(self.meetings) == 24:
            train_gpt2.print0(f"{self.meetings == 6 * [False, False, False, True]}, they met")
        return super().forward(*args)
torch.nn.parallel.DistributedDataParallel = Counting"""), *small)
    for kind in "trl", "tel", r"trl:\S+ lr:\S+ norm":
        assert log_of("log", kind) == pytest.approx(log_of("one", kind), rel=1e-3)
    assert out.count("True, they met") == out.count("a sample after 6") == 1


def test_one_process_begins_and_two_go_on(small, monkeypatch):
    """With Muon, and with a signal to the second of them alone, which stops both.

    Losses and weights are those of one process alone, to rounding.
    """
    small += ["--batch_size=4", "--num_iterations=9"]
    main([*small, "--output_dir=straight"])
    with monkeypatch.context() as patch, pytest.raises(Crash):
        in_step(patch, 4, crash)
        main(small)
    out = torchrun(changed_script("""
real = train_gpt2.get_lr
def get_lr(step, args):
    if step == 6 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return real(step, args)
train_gpt2.get_lr = get_lr"""), *small, "--resume", code=1)
    assert out.count("resuming log at step 3") == 1 and "stopped after 7 steps" in out
    assert load("log/last.pt")["step"] == 7
    assert main([*small, "--resume"]) == 0
    for kind in "trl", "tel":
        assert log_of("log", kind) == pytest.approx(log_of("straight", kind), rel=1e-3)
    straight = load("straight/last.pt")["model"]
    for name, w in load("log/last.pt")["model"].items():
        assert torch.allclose(w, straight[name], atol=1e-3), name


def shard(magic=20240520, count=5000, length=5000, token=1):
    """Puts another file in the place of the second training shard."""
    header = np.zeros(256, "<i4")
    header[:4] = magic, 1, count, 257
    tokens = np.full(length, token, "<u2")
    Path("sums_train_000002.bin").write_bytes(header.tobytes() + tokens.tobytes())


def last_pt(change=bytes, tokenizer="bytes", **wrong):
    """Makes a last.pt, with a config that is not that of its weights, or with other bytes."""
    Path("log").mkdir()
    save_model("log/last.pt", tiny_model(vocab_size=257), tokenizer, **wrong)
    Path("log/last.pt").write_bytes(change(Path("log/last.pt").read_bytes()))


def damaged(raw):
    """200 bytes in the middle of a file are lost."""
    middle = len(raw) // 2
    return raw[:middle] + bytes(200) + raw[middle + 200:]


def a_run_at_work():
    Path("log").mkdir()
    return filelock.FileLock("log/.lock").acquire()


def fail_in(patch, name, error):
    """From now on a function of train_gpt2, or a module that it imports, raises the error."""
    def fail(*args, **kwargs):
        raise error

    if name == "tiktoken":
        patch.setitem(sys.modules, name, types.SimpleNamespace(get_encoding=fail))
    else:
        patch.setattr(train_gpt2, name, fail)


OFFLINE = ConnectionError("cannot resolve openaipublic.blob.core.windows.net")
CUDA = torch.OutOfMemoryError("CUDA error: out of memory")
CPU_MEMORY = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")

# What is wrong, the flags of the run, and words of the line that it ends with.
ERRORS = [
    ("", "--model=d13", "--model d13 d12"),
    ("", "--no_such_flag=1", "--no_such_flag --help"),
    ("", "--n_head=5", "n_embd=32 n_head=5"),
    ("", "--n_kv_head=3", "n_head=4 n_kv_head=3"),
    ("", "--total_batch_size=500", "--total_batch_size 500 32"),
    ("", "--total_batch_size=0", "--total_batch_size 0 32"),
    ("", "--batch_size=5", "--batch_size 160"),
    # shards
    ("", "--input_bin=nothing_train_*.bin", "nothing_train_*.bin {cwd} fineweb.py"),
    ("os.remove('sums_val_000000.bin')", "", "sums_val_*.bin {cwd}"),
    ("", "--input_bin=sums_val_*.bin", "_val_*.bin NAME_train_*.bin"),
    ("shard(magic=42)", "", "sums_train_000002.bin fineweb.py"),
    ("shard(length=4990)", "", "sums_train_000002.bin fineweb.py"),
    ("shard(length=5001)", "", "sums_train_000002.bin fineweb.py"),
    ("Path('sums_train_000002.bin').write_bytes(b'')", "", "sums_train_000002.bin"),
    ("shard(token=257)", "--val_loss_every=0 --num_iterations=99", "sums_train_000002.bin 257"),
    ("", "--total_batch_size=102400", "sums_train_ --total_batch_size"),
    ("", "--sequence_length=9000 --total_batch_size=9000", "sums_val_ --sequence_length"),
    # folders and checkpoints
    ("Path('a_file').touch()", "--output_dir=a_file/log", "a_file"),
    ("", "--sample=nowhere.pt", "nowhere.pt is no checkpoint"),
    ("", "--sample=", "is no checkpoint"),
    ("Path('a_file').write_text('hello')", "--sample=a_file", "a_file is no checkpoint"),
    *((wrong, flag, "log/last.pt is no checkpoint") for flag in ("--sample=log/last.pt", "--resume")
      for wrong in ("last_pt(lambda raw: raw[:-1000])", "last_pt(damaged)", "last_pt(n_embd=64)")),
    *(("main(small)", f"--resume {flag}", words) for flag, words in (
        ("--n_layer=3", "n_layer=2 n_layer=3"), ("--norm=layernorm", "norm='rmsnorm'"),
        ("--sequence_length=64", "block_size=32"), ("--model=d24", "last.pt --model d12"),
        ("--arch=gpt2", "last.pt --arch variant"), ("--optimizer=adamw", "--optimizer muon"),
        ("--num_iterations=5", "last.pt 6 --num_iterations"))),
    ("a_run_at_work()", "", "at work in log"),
    # what a machine lacks
    ("patch.setitem(sys.modules, 'transformers', None)", "--sample=gpt2", "pip transformers"),
    ("fail_in(patch, 'tiktoken', OFFLINE), last_pt(tokenizer='gpt2')", "--sample=log/last.pt",
     "TIKTOKEN_CACHE_DIR"),
    ("fail_in(patch, 'evaluate', CUDA)", "", "memory --batch_size"),
    ("fail_in(patch, 'orthogonalize', CPU_MEMORY)", "", "memory --model"),
    ("fail_in(patch, 'set_aside', OSError(28, 'No space left on device'))", "", "No space left"),
]


@pytest.mark.parametrize("wrong, flags, words", ERRORS, ids=[f"{w} {f}" for w, f, _ in ERRORS])
def test_errors_are_one_line(wrong, flags, words, small, capsys, monkeypatch):
    """What a beginner meets in the first hour, or somebody whose run takes days."""
    # assigned, because a lock is let go of where nobody holds it
    held = eval(wrong or "None", globals(), {"small": small, "patch": monkeypatch})
    last = Path("log/last.pt")
    before = last.exists() and last.read_bytes()
    words = [word.format(cwd=os.getcwd()) for word in words.split()]
    fails([*small, *flags.split()], capsys, *words)
    assert before == (last.exists() and last.read_bytes())
    del held


@pytest.mark.parametrize("owner, name, message", [
    (HeadLoss, "apply", "loss of step 3 is nan"),
    (train_gpt2, "evaluate", "validation loss of step 6 is nan"),
])
def test_a_loss_that_is_not_finite(owner, name, message, small, capsys, monkeypatch):
    """The run ends, and the last good checkpoint stays."""
    real = getattr(owner, name)

    def spoiled(*args):
        return real(*args) * (math.nan if Path("log/last.pt").exists() else 1)

    monkeypatch.setattr(owner, name, spoiled)
    fails(small, capsys, message, "log/last.pt")
    state = load("log/last.pt")
    assert state["step"] == 3 and all(w.isfinite().all() for w in state["model"].values())


def test_without_a_vocabulary_there_are_no_samples(small, capsys, monkeypatch):
    """A machine that is offline trains all the same."""
    fail_in(monkeypatch, "tiktoken", OFFLINE)
    for path in Path().glob("sums_*.bin"):
        fineweb.write_shard(path, np.ones(5000, int), 50257)
    size = ["--total_batch_size=64", "--val_tokens=64", "--num_iterations=1"]
    assert main([*small, *size]) == 0
    out = capsys.readouterr().out
    assert re.search("no sample: .*TIKTOKEN_CACHE_DIR", out)
    assert "python hellaswag.py -m log/" in out and load("log/last.pt")["tokenizer"] == "gpt2"


def test_a_missing_gpu_is_said(small, capsys):
    """Once for a model that wants one: a wrong PyTorch or driver would else go unnoticed."""
    small += ["--num_iterations=1", "--val_loss_every=0"]
    main(small)
    assert "sees no GPU" not in capsys.readouterr().out
    small.remove("--device=cpu")
    main(small)
    assert "sees no GPU" in capsys.readouterr().out
    main([*small, "--model=tiny"])
    assert "sees no GPU" not in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------
# 8. fineweb.py: from text to shards

fineweb_fails = functools.partial(fails, main=fineweb.main)


def start_fineweb(*argv, setup=""):
    """The script in a process of its own; `setup` is code that runs before, to change constants."""
    script = Path(fineweb.__file__).resolve()
    code = f"import runpy, sys; sys.path.insert(0, {str(script.parent)!r}); "
    code += f"import fineweb; {setup}; fineweb.main(sys.argv[1:])"
    command = ["-c", code] if setup else [str(script)]
    return subprocess.Popen([sys.executable, *command, *argv], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def run_fineweb(*argv, setup=""):
    """(exit code, stdout, last line of stderr): before it come progress bars and warnings."""
    process = start_fineweb(*argv, setup=setup)
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in err, err
    return process.returncode, out, (err.splitlines() or [""])[-1]


def read_shard(path):
    return np.fromfile(path, "<u2", offset=1024)


def wait_until(condition, process):
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


@pytest.fixture
def bpe():
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("TIKTOKEN_CACHE_DIR is not set, and tests do not download GPT-2's vocabulary")
    return pytest.importorskip("tiktoken").get_encoding("gpt2")


def write_parquet(path, texts, **kwargs):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": texts}), path, **kwargs)


TEXTS = ["plain words, and more of them\n", "<|endoftext|> is only a word here<|endoftext|>", " ",
         "naïve 🙂 中文 \u0301\r\n\ttab   spaces   ", "\n\n\n a\n\nb \n", "it's we'll " * 30,
         "def f(x):\n    return x**2\n" * 20, "a" * 300, " \u3000\u00a0\u2028 x\x1cy"]


def numbered(n):
    """n documents, all different."""
    return [f"{i}: {TEXTS[i % len(TEXTS)]}" for i in range(n)]


def split_documents(bpe, ids):
    """Token ids -> the texts between the ids 50256, the first of which stands at the beginning."""
    assert ids[0] == 50256
    return [bpe.decode(part[1:]) for part in np.split(ids, np.flatnonzero(ids == 50256)[1:])]


def documents_in(bpe, folder, split):
    """The documents of a folder's shards. Every shard but the last must be full."""
    shards = [read_shard(path) for path in sorted(Path(folder).glob(f"*_{split}_*.bin"))]
    assert all(len(shard) == fineweb.SHARD_TOKENS for shard in shards[:-1])
    return split_documents(bpe, np.concatenate(shards))


def test_shard_format():
    """llm.c's header, whose fourth integer names the vocabulary, and two bytes a token."""
    fineweb.write_shard("a.bin", np.array([50256, 464, 3797]))
    fineweb.write_shard("b.bin", [256, 97], vocab_size=257)
    header = np.zeros(256, "<i4")
    header[:3] = [20240520, 1, 3]
    assert Path("a.bin").read_bytes() == header.tobytes() + bytes.fromhex("50c4d001d50e")
    header[2:4] = [2, 257]
    assert Path("b.bin").read_bytes() == header.tobytes() + bytes.fromhex("00016100")


def test_the_worked_example_is_true(bpe):
    """The ids and bytes that the file's first page shows are those of its ten words."""
    lines = dict(re.findall(r"^    (text|tokens|ids|bytes) +(.*)$", fineweb.__doc__, re.M)[:3])
    ids = bpe.encode(lines["text"])
    assert len(lines["text"].split()) == 10 and lines["ids"] == " ".join(map(str, ids))
    assert lines["tokens"].split("|") == [bpe.decode([i]) for i in ids][:-1] + ["."]
    sixteen = np.array([50256, *ids[:7]], "<u2").tobytes().hex(" ")
    assert f"bytes    {sixteen}\n" in fineweb.__doc__


def test_stdlib_corpus():
    """Bytes of the library's source, the same files held out everywhere, made only once."""
    pattern = fineweb.stdlib_corpus()
    train, val = (Path(pattern.replace("train_*", name)) for name in ("train_000001", "val_000000"))
    ids = {path: read_shard(path) for path in (train, val)}
    for path in ids:
        assert ids[path][0] == 256 == ids[path].max() and np.fromfile(path, "<i4", 4)[3] == 257
    assert 0.01 < len(ids[val]) / len(ids[train]) < 0.06
    assert Path(json.__file__).read_bytes() in ids[train].astype(np.uint8).tobytes()
    assert sorted(train.parent.glob("*.*")) == sorted([train.parent / ".gitignore", train, val])
    train.write_bytes(b"")
    assert fineweb.stdlib_corpus() == pattern and train.read_bytes() == b""


def test_a_text_is_cut_without_changing_its_tokens(bpe):
    """Wherever a cut may be made, and whatever the size of the pieces."""
    rng = np.random.default_rng(0)
    text = "".join(rng.choice(list("ab1.!'\"\n\t    é的\u00a0\u3000\x1c\x85🙂sdtlvre"), 20_000))
    places = [0, *(match.start() for match in fineweb.CUT.finditer(text)), len(text)]
    everywhere = [text[a:b] for a, b in zip(places, places[1:], strict=False)]
    for pieces in (everywhere, list(fineweb.cut(text, 100)), list(fineweb.cut(text, 5000))):
        assert "".join(pieces) == text
        assert sum(map(bpe.encode_ordinary, pieces), []) == bpe.encode_ordinary(text)
    assert all(100 <= len(piece) <= 200 for piece in list(fineweb.cut(text, 100))[:-1])
    assert list(fineweb.cut("a" * 50, 10)) == ["a" * 20, "a" * 20, "a" * 10]


def test_texts_at_which_the_tokenizer_fails(bpe):
    """Very long runs of one character become tokens all the same, the rest as ever."""
    runs = [letter * 1_000_000 + "x" for letter in (" ", "a", "\n", "\u3000")]
    runs += ["\U0001f468\u200d" * 100_000]  # emoji and joiner
    with pytest.raises(ValueError, match="stack"):
        bpe.encode_to_numpy(runs[0])
    documents = [text for run in runs for text in ("before it", f"a {run} b", "after it")]
    stream = fineweb.tokenize(fineweb.divide(documents, 0))
    made = split_documents(bpe, np.concatenate([ids for _, ids in stream]))
    assert made == documents


def letters(n):
    """n characters without a space."""
    return "".join(np.random.default_rng(0).choice(list("abcdefgh"), n))


def words(n, first=0):
    """n characters of numbers in a row, so that every place is different."""
    return " ".join(map(str, range(first, first + n)))[:n]


@pytest.mark.parametrize("documents, flags, share", [
    ([words(10_000)], [], 0.1),
    ([letters(10_000)], [], 0.1),
    ([words(80_000)], [], 0.1),
    ([letters(80_000)], [], 0.1),
    ([words(80_000)], ["--val_share=0.3"], 0.3),
    ([words(60_000), *numbered(60)], [], 0.1),
    (numbered(3000), ["--val_share=0.02"], 0.02),
    ([words(200_000, 10**6 * i) for i in range(60)], [], 0.01),
])
def test_the_share_held_out(documents, flags, share, bpe):
    """It is about what was asked for, of any text, and comes from each quarter of it."""
    Path("a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    fineweb.main(["--input", "a.jsonl", "--out=o", *flags])
    val, train = (documents_in(bpe, "o", split) for split in ("val", "train"))
    text = "".join(documents)
    held_out = sum(map(len, val))
    assert held_out + sum(map(len, train)) == len(text)
    assert 0.7 * share < held_out / len(text) < 1.5 * share
    if len(text) > 50_000:
        assert {4 * text.index(piece) // len(text) for piece in val} == {0, 1, 2, 3}


def test_your_own_files(bpe, monkeypatch, capsys):
    """Each way in: documents come back in their order, and a line counts what was read."""
    monkeypatch.setattr(fineweb, "SHARD_TOKENS", 1000)
    Path("in/.git").mkdir(parents=True)
    wanted = []

    def put(name, content, *texts):
        Path("in", name).write_bytes(content if isinstance(content, bytes) else content.encode())
        wanted.extend(texts)

    # in the order of their names, as they are read
    put("0.gz", gzip.compress(b"packed"), "packed")
    lines = [json.dumps({"text": text}, ensure_ascii=i % 2) for i, text in enumerate(numbered(99))]
    put("1.JSONL", ("\n\n".join(lines) + "\n").encode("utf-8-sig"), *numbered(99))
    put("2.jsonl.gz", gzip.compress(b'{"text": "half \\ud83d of one"}'), "half ? of one")
    write_parquet("in/3.parquet", [*numbered(90), "", None], row_group_size=7)
    wanted.extend(numbered(90))
    put("BOOK.TXT", "\ufeffone\r\n<|endoftext|>\r\ntwo\n<|endoftext|>\n\n three",
        "one\r\n", "two\n", " three")
    put("a.md", TEXTS[3], TEXTS[3])
    put("b.py", TEXTS[6], TEXTS[6])
    put("c.html", "")
    put("d.png", b"\x89PNG\xff")
    put(".hidden.txt", "hidden")
    put(".git/config.txt", "hidden")
    fineweb.main(["--input", "in", "in/../in/a.md", "--out=mine", "--val_share=0.3"])
    val, train = (documents_in(bpe, "mine", split) for split in ("val", "train"))
    assert sorted(val + train) == sorted(wanted)
    for part in (val, train):  # in order: a walk through wanted meets them all
        walk = iter(wanted)
        assert all(text in walk for text in part)
    out = capsys.readouterr().out
    assert "in/d.png is passed over" in out
    assert set(out.splitlines()[1].split(", ")) == {
        f"9 files: {len(wanted)} documents read", "101 empty documents passed over",
        "1 files passed over"}


@pytest.mark.parametrize("tokens, model", [
    (3_000, "tiny"), (20_000, "tiny"), (300_000, "tiny"), (18_700_000, "tiny"),
    (200_000_000, "d12"), (1_000_000_000, "d12"), (10_300_000_000, "d24")])
def test_the_advice(tokens, model, capsys):
    """A model that fits the text, some hundred steps at least, and at most four passes."""
    for i in range(0, tokens, 10**8):
        with open(f"text_train_{i // 10**8:06d}.bin", "wb") as file:
            file.truncate(1024 + 2 * min(10**8, tokens - i))  # takes no room on the disk
    fineweb.say_what_next(Path(), "text")
    args = train_gpt2.make_parser().parse_args(
        shlex.split(capsys.readouterr().out.splitlines()[-1])[2:])
    assert args.model == model
    read = args.num_iterations * args.total_batch_size
    assert read <= 4 * tokens and (read > 3.9 * tokens or args.num_iterations == 19073)
    assert (300 if tokens > 10_000 else 90) <= args.num_iterations <= 19073
    assert args.total_batch_size % 128 == 0


def test_the_printed_command_works(bpe, capsys):
    """Pasted as it is, with a folder that shell and glob would read otherwise; git ignores it."""
    Path("a.txt").write_text(words(10_000))
    fineweb.main(["--input", "a.txt", "--out=it's [1] book"])
    command = capsys.readouterr().out.splitlines()[-1]
    main([*shlex.split(command)[2:], "--num_iterations=1", "--val_loss_every=0",
          "--output_dir=log"])
    assert log_of()[0] > 10
    assert Path("it's [1] book/.gitignore").read_text() == "*\n"


BAD_INPUTS = [
    ("bad.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', "row 3"),
    ("bad.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "row 2: KeyError: 'text'"),
    ("bad.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}', "row 2: UnicodeDecodeError"),
    ("bad.txt.gz", gzip.compress(b"a" * 1000)[:-20], "ended"),
    ("bad.gz", b"no gzip at all", "BadGzipFile"),
    ("bad.parquet", b"PAR1 and then nothing", "Parquet"),
    ("bad.txt", b"caf\xe9 in another encoding", "too little text"),
    ("short.txt", b"words " * 100, "too little text"),
    ("nowhere.txt", None, "no file"),
]


def test_errors_that_get_one_line(bpe, capsys, monkeypatch):
    """Each names the file, and its row; no shard and nothing half done is left."""
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    Path("mine").mkdir()
    for name, content, message in BAD_INPUTS:
        if content is not None:
            Path(name).write_bytes(content)
        fineweb_fails(["--input", name, "--out=mine"], capsys, message,
                      "" if "too little" in message else name)
    Path("good.txt").write_text("word " * 2000)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    fineweb_fails(["--input", "bad.parquet", "--out=mine"], capsys, "bad.parquet", "pyarrow")
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: os.stat("no vocabulary"))
    fineweb_fails(["--input", "good.txt", "--out=mine"], capsys, "TIKTOKEN_CACHE_DIR")
    assert not os.listdir("mine")


def test_no_shard_is_written_over(bpe, capsys, monkeypatch):
    """Neither those that exist at the start nor those that another run has made at the end."""
    Path("a.txt").write_text("word " * 40_000)
    argv = ["--input", "a.txt", "--out=mine"]
    read_files = fineweb.read_files

    def meanwhile(paths):
        Path("mine/text_val_000000.bin").write_text("theirs")
        return read_files(paths)

    monkeypatch.setattr(fineweb, "read_files", meanwhile)
    Path("mine").mkdir()
    for other in (argv, argv, ["--tokenize", "--out=mine"]):
        fineweb_fails(other, capsys, "mine holds shards already")
    assert [path.read_text() for path in Path("mine").glob("*.bin")] == ["theirs"]


def test_an_interrupted_tokenizing_leaves_nothing_that_looks_finished(bpe):
    """After a kill no shard has its name, and the same command makes all of them."""
    Path("a.jsonl").write_text((json.dumps({"text": "word " * 500}) + "\n") * 20_000)
    setup = "fineweb.SHARD_TOKENS = 100_000"
    process = start_fineweb("--input", "a.jsonl", "--out=mine", setup=setup)
    wait_until(lambda: len(list(Path("mine").glob("*.tmp"))) > 2, process)
    process.kill()
    process.communicate()
    assert not list(Path("mine").glob("*.bin"))
    code, out, err = run_fineweb("--input", "a.jsonl", "--out=mine", setup=setup)
    assert code == 0 and sum(map(len, map(read_shard, Path("mine").glob("*.bin")))) > 10_000_000


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as huggingface.co does.

    Its server has files, {dataset/path: bytes}, faults, which come true at the next request of a
    file, {dataset/path: "cut" (half of the rest) or "stall" (half, and then nothing)}, and a log of
    (dataset/path, first byte asked for).
    """
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub = self.server
        repo, kind, path = re.match(r"(?:/api)?/datasets/(\w+/[\w-]+)/(\w+)/(.*)",
                                    self.path).groups()
        name = f"{repo}/{path.split('/', 1)[-1]}"
        if kind == "revision":
            body = json.dumps({"id": repo, "sha": "c" * 40}).encode()
        elif kind == "tree":
            body = json.dumps([{
                "type": "file", "path": file[len(repo) + 1:], "size": len(content), "oid": "0" * 40,
                "lfs": {"size": len(content), "oid": hashlib.sha256(content).hexdigest(),
                        "pointerSize": 1},
            } for file, content in hub.files.items() if file.startswith(repo)]).encode()
        else:
            body = hub.files[name]
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", "c" * 40)
        self.end_headers()
        if self.command == "GET":
            if kind == "resolve":
                hub.log.append((name, start))
            fault = hub.faults.pop(name, None)
            self.wfile.write(body[start:(start + len(body)) // 2] if fault else body[start:])
            self.wfile.flush()
            time.sleep(600 if fault == "stall" else 0)
            self.close_connection = fault is not None

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The validation shard and two training shards of two datasets, 40 kB each."""
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.faults, server.log = {}, {}, []
    for dataset in ("fineweb10B-gpt2/fineweb", "finewebedu10B-gpt2/finewebedu"):
        for i, name in enumerate(("val_000000", "train_000001", "train_000002")):
            fineweb.write_shard("made", np.arange(20_000) + i)
            server.files[f"kjj0/{dataset}_{name}.bin"] = Path("made").read_bytes()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield server
    server.shutdown()
    server.server_close()


def downloaded(hub, folder="fineweb10B", prefix="fineweb_"):
    """The folder holds the dataset's shards, byte for byte, and no other ones."""
    there = {path.name: path.read_bytes() for path in Path(folder).glob("*.bin")}
    return there == {name.split("/")[-1]: body for name, body in hub.files.items()
                     if name.split("/")[-1].startswith(prefix)}


def test_downloaded_shards(hub):
    """As many as asked for, where train_gpt2.py looks; again, nothing is fetched; -t edu has
    another name."""
    code, _, err = run_fineweb("--shards=1")
    assert code == 0 and len(list(Path("fineweb10B").glob("*.bin"))) == 2, err
    code, out, err = run_fineweb()
    assert code == 0 and downloaded(hub) and "'fineweb10B/fineweb_train_*.bin'" in out, err
    hub.log.clear()
    assert run_fineweb("--shards=2")[0] == 0 and downloaded(hub) and not hub.log
    code, _, err = run_fineweb("-t=edu")
    assert code == 0 and downloaded(hub, "edu_fineweb10B", "finewebedu_"), err


def test_a_cut_on_the_way_changes_no_shard(hub):
    """The connection breaks in the middle of a file: from there it goes on, now or next time."""
    # large, as the library keeps of a broken answer what it has of 10 MB each
    name = "kjj0/fineweb10B-gpt2/fineweb_train_000001.bin"
    hub.files[name] = bytes(24_000_000)
    hub.faults[name] = "cut"
    code, _, err = run_fineweb()
    if code:
        assert code == 1 and err.startswith("error: kjj0/fineweb10B-gpt2: "), err
        code, _, err = run_fineweb()
    assert code == 0 and downloaded(hub), err
    assert [start for asked, start in hub.log if asked == name][-1] >= 10_000_000


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_download_can_be_stopped_at_any_moment(hub, number, monkeypatch):
    """Half a file has no shard's name, Ctrl-C waits for nothing, and the same command goes on."""
    name = "kjj0/fineweb10B-gpt2/fineweb_train_000002.bin"
    hub.faults[name] = "stall"
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "600")
    process = start_fineweb()
    wait_until(lambda: (name, 0) in hub.log, process)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == -number
    for path in Path("fineweb10B").glob("*.bin"):
        assert path.read_bytes() == hub.files[f"kjj0/fineweb10B-gpt2/{path.name}"]
    assert run_fineweb()[0] == 0 and downloaded(hub)


def test_when_nothing_can_be_downloaded(hub, monkeypatch, capsys):
    """One line says why: somebody's own shards are there, or nobody answers."""
    Path("mine").mkdir()
    own = Path("mine/fineweb_train_000001.bin")
    own.write_bytes(b"mine")
    fineweb_fails(["--shards=1", "--out=mine"], capsys, "mine holds shards already")
    assert own.read_bytes() == b"mine" and not hub.log
    assert run_fineweb()[0] == 0
    # also where earlier shards are there, which are not all
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    code, _, err = run_fineweb()
    assert code == 1 and err.startswith("error: kjj0/") and "HF_ENDPOINT" in err


def test_raw_text_becomes_llmc_shards(bpe, hub):
    """The first shard validates, whatever the number of cores, and few --shards take few files."""
    texts = numbered(700)
    for i in range(7):
        write_parquet("made", texts[100 * i:100 * (i + 1)], row_group_size=30)
        name = f"HuggingFaceFW/fineweb/sample/10BT/{i:03d}_00000.parquet"
        hub.files[name] = Path("made").read_bytes()
    hub.faults["HuggingFaceFW/fineweb/sample/10BT/003_00000.parquet"] = "cut"
    ids = np.array([i for text in texts for i in (50256, *bpe.encode_ordinary(text))])
    wanted = {f"fineweb_{'train' if i else 'val'}_{i:06d}.bin": ids[1000 * i:1000 * (i + 1)]
              for i in range(-(-len(ids) // 1000))}
    for cores in (1, 3):
        setup = f"fineweb.SHARD_TOKENS = 1000; import os; os.cpu_count = lambda: {cores}"
        code, _, err = run_fineweb("--tokenize", f"--out=all{cores}", setup=setup)
        if code:  # the library gave up at the cut
            code, _, err = run_fineweb("--tokenize", f"--out=all{cores}", setup=setup)
        made = {path.name: read_shard(path) for path in Path(f"all{cores}").glob("*.bin")}
        assert code == 0 and made.keys() == wanted.keys(), err
        assert all(np.array_equal(made[name], wanted[name]) for name in made)
    run_fineweb("--tokenize", "--shards=2", setup=setup)
    assert {path.name for path in Path("fineweb10B").glob("*.bin")} == {
        "fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"}
    assert len(list(Path("fineweb10B/raw").rglob("*.parquet"))) == 1


def test_real_text_and_back(bpe):
    """FINEWEB_SAMPLE names a folder with parquet files of FineWeb: every document comes back."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    if "FINEWEB_SAMPLE" not in os.environ:
        pytest.skip("FINEWEB_SAMPLE is not set: no parquet files of FineWeb")
    path = sorted(Path(os.environ["FINEWEB_SAMPLE"]).rglob("*.parquet"))[0]
    texts = parquet.read_table(path, columns=["text"])["text"].to_pylist()[:3000]
    ids = [(split, ids) for split, ids in fineweb.tokenize(fineweb.divide(texts, 0))]
    assert {split for split, _ in ids} == {"train"}
    made = np.concatenate([part for _, part in ids])
    assert made.tolist() == [i for text in texts for i in (50256, *bpe.encode_ordinary(text))]


# -------------------------------------------------------------------------------------------------
# 9. hellaswag.py

class SmallModel(nn.Module):
    """A random model that has what hellaswag.py asks for, and none of the project's code. The
    columns of its head that only pad the vocabulary have the highest scores."""

    def __init__(self, vocab_size=257, block_size=96, width=32):
        super().__init__()
        torch.manual_seed(0)
        self.config = types.SimpleNamespace(vocab_size=vocab_size, block_size=block_size)
        self.wte = nn.Embedding(vocab_size, width)
        self.rnn = nn.GRU(width, width, batch_first=True)
        self.lm_head = nn.Linear(width, vocab_size + 7)
        self.shapes = []
        with torch.no_grad():
            self.lm_head.weight.mul_(20)
            self.lm_head.bias[vocab_size:] = 1000

    def features(self, idx):
        self.shapes.append(tuple(idx.shape))
        return self.rnn(self.wte(idx))[0]


@torch.no_grad()
def plain_log_probs(model, items):
    """The reference: one row at a time, then one token of its ending at a time."""
    sums = []
    for item in items:
        for row, n in zip(item.rows, item.scored, strict=True):
            x = model.features(torch.tensor([row[:-1]]))[0]
            total = 0.0
            for place in range(len(row) - n, len(row)):
                logits = model.lm_head(x[place - 1])[:model.config.vocab_size]
                total += logits.log_softmax(dim=0)[row[place]].item()
            sums.append(total)
    return np.array(sums).reshape(-1, 4)


def encode_bytes(text):
    return list(text.encode())


def made_questions(n, longest=40):
    """n questions of random letters, with contexts and endings of many lengths."""
    rng = np.random.default_rng(0)

    def text():
        return "x" + "".join(rng.choice(list("abc de. "), rng.integers(longest))).rstrip()

    return [dict(activity_label="Doing", ctx_a=text(), ctx_b="then", ctx=text(), label=i % 4,
                 endings=[text() for _ in range(4)]) for i in range(n)]


def write_questions(path, questions):
    Path(path).write_text("".join(json.dumps(q) + "\n" for q in questions))


@pytest.fixture
def stub(monkeypatch):
    """Stands in for train_gpt2, from which hellaswag.main() imports."""
    module = types.SimpleNamespace(
        model=SmallModel(), load_model=lambda name, device: (module.model, "bytes"),
        load_tokenizer=lambda name: (encode_bytes, None), pick_device=torch.device,
        pick_autocast=lambda dtype, device: ("float32", contextlib.nullcontext))
    monkeypatch.setitem(sys.modules, "train_gpt2", module)
    return module


def score(flags=()):
    hellaswag.main(["-m", "model.pt", "--device=cpu", *flags])


score_fails = functools.partial(fails, main=score)


def test_real_questions_get_the_answers_of_the_plain_loop():
    """On the first 500 of the validation set acc and acc_norm choose what the plain loop does."""
    tiktoken = pytest.importorskip("tiktoken")
    if not os.environ.get("HELLASWAG_VAL") or not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("HELLASWAG_VAL (a file of questions) or TIKTOKEN_CACHE_DIR is not set")
    bpe = tiktoken.get_encoding("gpt2")

    def encode(text):
        # Fewer different ids, so that the plain loop takes seconds.
        return [token % 1000 for token in bpe.encode_ordinary(text)]

    model = SmallModel(vocab_size=1000, block_size=1024, width=8)
    questions = hellaswag.load_questions(os.environ["HELLASWAG_VAL"])[:500]
    items = [hellaswag.encode_question(q, encode, 1024) for q in questions]
    ours = hellaswag.log_probs(model, items, contextlib.nullcontext)
    plain = plain_log_probs(model, items)
    norms = np.array([item.norms for item in items])
    assert np.abs(ours - plain).max() < 1e-2
    assert (ours.argmax(1) == plain.argmax(1)).all()
    assert ((ours / norms).argmax(1) == (plain / norms).argmax(1)).all()
    assert set((ours / norms).argmax(1)) == {0, 1, 2, 3}


@pytest.mark.parametrize("tokens", [1, 300, 99999])
def test_batches_do_not_change_the_scores(tokens, monkeypatch):
    """Neither the rows that share a batch nor the zeros behind short ones show in the scores."""
    monkeypatch.setattr(hellaswag, "TOKENS_PER_BATCH", tokens)
    model = SmallModel(block_size=70)
    items = [hellaswag.encode_question(q, encode_bytes, 70) for q in made_questions(40)]
    ours = hellaswag.log_probs(model, items, contextlib.nullcontext)
    # few lengths, as each new one costs time on a GPU, and none beyond what the model can read
    assert {T for _, T in model.shapes} <= {32, 64, 70}
    assert (len(model.shapes) == 160) == (tokens == 1) and sum(B for B, _ in model.shapes) == 160
    assert np.abs(ours - plain_log_probs(model, items)).max() < 1e-3 and ours.std() > 10


def test_a_row_is_cut_to_what_the_model_reads():
    """A row that is too long loses its beginning, and the rest is scored as usual."""
    questions = made_questions(15) + made_questions(15, longest=10)
    items = [hellaswag.encode_question(q, encode_bytes, 16) for q in questions]
    model = SmallModel(block_size=16)
    ours = hellaswag.log_probs(model, items, contextlib.nullcontext)
    assert np.abs(ours - plain_log_probs(model, items)).max() < 1e-3
    q = dict(ctx="0123456789", endings=["abc", "d", "e", "f" * 20], label=0)
    item = hellaswag.encode_question(q, encode_bytes, 12)
    rows = [b"123456789 abc", b"0123456789 d", b"0123456789 e", b"f" * 13]
    assert list(map(bytes, item.rows)) == rows
    assert item.scored == item.norms == [4, 2, 2, 12]


def test_the_harness_style():
    """Strings and lengths are those that lm-evaluation-harness 0.4.13 makes of this question."""
    q = dict(activity_label="Hair", ctx_a="He sits. [title] Then", ctx_b="he LAUGHS [step] ",
             endings=[" and  goes.", "[substeps] x", "a [b] c", "[end]"], label=1)
    item = hellaswag.encode_question(q, encode_bytes, 96, harness=True)
    endings = [b"  and goes.", b"   x", b"  a c", b"  "]
    assert list(map(bytes, item.rows)) == [b"Hair: He sits.. Then He laughs" + e for e in endings]
    assert item.scored == [len(ending) for ending in endings]
    # Of the last ending nothing is left. The harness divides by 0 then, so it is never chosen.
    assert item.norms[:3] == [9, 2, 3] and -5 / item.norms[3] < -1e6


def test_right_answers_of_parts_add_up():
    """Sum and mean may choose differently, parts add up, empty ones too, and nan is not right."""
    items = [hellaswag.Item([], [], [1, 2, 4, 1], 2), hellaswag.Item([], [], [1, 1, 1, 1], 0)]
    logp = np.array([[-3.0, -3, -4, -9], [-1, -2, -3, -4]])
    assert hellaswag.right_answers(logp, items) == (1, 2)
    assert hellaswag.right_answers(logp[:1], items[:1]) == (0, 1)
    assert hellaswag.right_answers(logp[1:], items[1:]) == (1, 1)
    nothing = hellaswag.log_probs(SmallModel(), [], contextlib.nullcontext)
    assert hellaswag.right_answers(nothing, []) == (0, 0)
    assert hellaswag.right_answers(np.full((2, 4), np.nan), items) == (0, 0)


def test_the_command(stub, capsys):
    """Prints examples, both scores of the questions asked for, and what they are compared with."""
    questions = made_questions(40)
    write_questions("q.jsonl", questions)
    score(["--data=q.jsonl", "--limit=30", "--examples=2"])
    out = capsys.readouterr().out
    items = [hellaswag.encode_question(q, encode_bytes, 96) for q in questions[:30]]
    acc, acc_norm = hellaswag.right_answers(plain_log_probs(stub.model, items), items)
    chance = 1.96 * (acc / 30 * (1 - acc / 30) / 30) ** 0.5
    assert f"acc       {acc / 30:.4f} +- {chance:.4f}\nacc_norm  {acc_norm / 30:.4f} +- " in out
    assert questions[1]["ctx"] in out and questions[2]["ctx"] not in out
    assert out.count(" right ") == 2 and out.count(" chosen") == 2 and "0.2955" in out
    score(["--data=q.jsonl", "--harness", "--examples=1"])
    out = capsys.readouterr().out
    assert f"Doing: {questions[0]['ctx_a']} Then" in out and "0.3114" in out


GOOD = dict(ctx="a", endings=["b", "c", "d", "e"], label="1")
BAD_LINES = [b"not json", b'["a"]', b"[" * 50000, b'{"ctx": "\xff"}', b'{"ctx": "a"}']
BAD_LINES += [json.dumps({**GOOD, **change}).encode() for change in (
    dict(endings=["b", "c", "d"]), dict(endings=["b", "c", "d", 5]), dict(label=4),
    dict(label=1.7), dict(label=None))]


def test_errors_of_hellaswag_get_one_line(stub, capsys):
    """A bad question's line is named, and a model without numbers gets no score."""
    # a byte-order mark at the beginning is no error
    good = b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\n"
    Path("q.jsonl").write_bytes(good)
    score(["--data=q.jsonl"])
    score_fails(["--data=q.jsonl", "--harness"], capsys, "q.jsonl, line 1 ", "activity_label")
    for line in BAD_LINES:
        Path("q.jsonl").write_bytes(good + line + b"\n")
        score_fails(["--data=q.jsonl"], capsys, "q.jsonl, line 2 ")
    score_fails(["--data=nowhere.jsonl"], capsys, "nowhere.jsonl")
    Path("q.jsonl").write_bytes(good)
    # nan everywhere would choose ending 0, which is right in a quarter
    with torch.no_grad():
        stub.model.wte.weight.fill_(float("nan"))
    score_fails(["--data=q.jsonl"], capsys, "model.pt has no score")


class QuestionServer(http.server.BaseHTTPRequestHandler):
    """Has server.body, and first gives the answers in server.faults: a status, or "cut"."""

    def do_GET(self):
        fault = self.server.faults.pop(0)
        body = self.server.body
        self.send_response(200 if fault == "cut" else fault)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:len(body) // 2] if fault == "cut" else body)

    def log_message(self, *args):
        pass


def test_the_questions_are_downloaded_once(stub, monkeypatch, capsys):
    """What fails leaves no file behind, and what is there is not fetched again."""
    write_questions("source.jsonl", made_questions(20))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), QuestionServer)
    server.faults, server.body = ["cut", 503, 200], Path("source.jsonl").read_bytes()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(hellaswag, "DATA_URL", f"http://127.0.0.1:{server.server_port}/q.jsonl")
    monkeypatch.setattr(hellaswag, "SIZE", 20)
    for message in ("IncompleteRead", "503"):
        score_fails([], capsys, message)
    assert not list(Path().glob("hellaswag/*"))
    score()
    assert os.listdir("hellaswag") == ["hellaswag_val.jsonl"]
    assert hellaswag.DATA.read_bytes() == server.body
    server.shutdown()
    server.server_close()
    score()
    write_questions(hellaswag.DATA, made_questions(19))
    score_fails([], capsys, "19 questions", "remove it")
    hellaswag.DATA.unlink()
    score_fails([], capsys, "cannot be had")


def test_hellaswag_during_training(small, monkeypatch, capsys):
    """A run writes the score to main.log, the one that hellaswag.py gives its last weights."""
    write_questions("questions.jsonl", made_questions(12))
    monkeypatch.setattr(hellaswag, "DATA", Path("questions.jsonl"))
    monkeypatch.setattr(hellaswag, "SIZE", 12)
    main([*small, "--hellaswag_every=6", "--sequence_length=64"])
    capsys.readouterr()
    hellaswag.main(["-m", "log/last.pt", "--device=cpu", "--dtype=float32"])
    score = re.search(r"acc_norm +([\d.]+)", capsys.readouterr().out)[1]
    assert list(log_of("log", "eval")) == [0, 6]
    assert abs(log_of("log", "eval")[6] - float(score)) < 1e-4


# -------------------------------------------------------------------------------------------------
# 10. To and from Hugging Face

@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture
def openai_tokenizer():
    """A folder with OpenAI's tokenizer, where export() looks for it before it goes to the hub."""
    folder = Path("openai-community/gpt2")
    folder.mkdir(parents=True)
    # tiktoken keeps the two files that OpenAI published under the hashes of their addresses
    address = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    for theirs, name in ("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt"):
        cached = Path(os.environ.get("TIKTOKEN_CACHE_DIR", "nowhere"),
                      hashlib.sha1(f"{address}{theirs}".encode()).hexdigest())
        if not cached.exists():
            pytest.skip("TIKTOKEN_CACHE_DIR has no vocabulary, and tests download nothing")
        shutil.copy(cached, folder / name)
    (folder / "config.json").write_text('{"model_type": "gpt2"}')


@pytest.mark.parametrize("kind, arch", [
    ("Qwen3", {}), ("Llama", {"qk_norm": False}), ("GPT2", GPT2_ARCH)])
def test_exported_models_are_the_same_elsewhere(kind, arch, transformers, openai_tokenizer, capsys):
    """transformers opens the folder by itself: the same logits, text and ids, and nothing twice."""
    model = tiny_model(shake=0.1, vocab_size=50257, block_size=64, **arch)
    save_model("best.pt", model)
    assert main(["--export", "best.pt", "my out"]) == 0
    assert "pretrained=my out'" in capsys.readouterr().out
    theirs = transformers.AutoModelForCausalLM.from_pretrained("my out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained("my out")
    assert type(theirs).__name__.startswith(kind)
    x = random_ids(3, 48, below=50257)
    assert (model(x)[..., :50257] - theirs(x).logits).abs().max() < 1e-4
    # without the rows that pad our table
    count = sum(p.numel() for p in model.parameters())
    assert theirs.num_parameters() == count - 32 * (len(model.lm_head.weight) - 50257)
    # the tokenizer has our ids, and the model knows where a text ends
    encode, _ = train_gpt2.load_tokenizer("gpt2")
    text = "it's naïve:\n\n    def f(x): return 1234567 \U0001f642\u200d \x00 ...!?"
    assert tokenizer(f"<|endoftext|>{text}")["input_ids"] == [50256, *encode(text)]
    config = json.loads(Path("my out/config.json").read_text())
    assert config["eos_token_id"] == config["pad_token_id"] == tokenizer.pad_token_id == 50256
    assert tokenizer.model_max_length == 64 and config["dtype"] == "float32"
    # what llama.cpp and mlx-lm look for, and what finetuning would otherwise do
    if kind == "GPT2":
        assert config["n_ctx"] == 64 and config["resid_pdrop"] == config["attn_pdrop"] == 0
    else:
        assert config["rope_theta"] == 10000
    # of a batch with padding every prompt gets what it gets alone
    prompts = ["<|endoftext|>def f(x):", "Hello"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    assert set(batch) == {"input_ids", "attention_mask"}
    together = theirs.generate(**batch, max_new_tokens=5, do_sample=False)[:, -5:].tolist()
    for prompt, end in zip(prompts, together, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        ours = list(train_gpt2.generate(model, ids, 5, temperature=0))
        assert ours and end[:len(ours)] == ours


@torch.no_grad()
def test_openai_weights(transformers, openai_tokenizer):
    """OpenAI's layout (merged, transposed, 50,257 rows) comes in with the same logits, and back."""
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    torch.manual_seed(0)
    for p in theirs.parameters():
        p.add_(0.1 * torch.randn_like(p))
    theirs.save_pretrained("openai-community/gpt2")
    ours, tokenizer = train_gpt2.load_model("gpt2", "cpu")
    x = random_ids(3, 48, below=50257)
    logits = ours(x)[..., :50257]
    assert logits.std() > 0.5 and (logits - theirs(x).logits).abs().max() < 1e-4
    # a shorter memory is the first positions of the long one, and there is no longer one
    short = train_gpt2.from_openai("gpt2", 48)
    assert torch.equal(short(x)[..., :50257], logits) and tokenizer == "gpt2"
    with pytest.raises(SystemExit, match="error: gpt2 .*1024.*--sequence_length"):
        train_gpt2.from_openai("gpt2", 1025)
    # out again
    for (name, w), p in zip(theirs.state_dict().items(),
                            train_gpt2.to_transformers(ours.config, ours.state_dict())
                            .state_dict().values(), strict=True):
        assert torch.equal(w, p), name


@pytest.mark.parametrize("tokenizer, changes, words", [
    ("bytes", {}, "knows only bytes"),
    ("gpt2", {"norm": "layernorm"}, "only the variant and --arch gpt2"),
    ("gpt2", {**GPT2_ARCH, "n_kv_head": 2}, "only the variant and --arch gpt2"),
])
def test_what_cannot_be_exported(tokenizer, changes, words, transformers, capsys):
    save_model("best.pt", tiny_model(**changes), tokenizer)
    fails(["--export", "best.pt", "out"], capsys, words)
    Path("out").mkdir()
    fails(["--export", "best.pt", "out"], capsys, "out exists")
    assert os.listdir("out") == []


# -------------------------------------------------------------------------------------------------
# 11. The report, and what the documents say

ROOT = Path(SCRIPT).parent
sys.path.append(str(ROOT / "report"))
import ablation  # noqa: E402
import bench  # noqa: E402
import one_step  # noqa: E402
import plot  # noqa: E402

README = ROOT / "README.md"
REPORT = ROOT / "report" / "README.md"
LOGS = ROOT / "report" / "logs"
# the lab has no table
GROUPS = sorted({path.name for path in LOGS.iterdir() if path.is_dir()} - {"lab"})


def test_links_lead_somewhere():
    """To a file, a heading, an address further down; `Names` in brackets are train_gpt2.py's."""
    def anchors(document):
        headings = re.findall(r"^#+ (.*)$", document.read_text("utf-8").lower(), re.M)
        return [re.sub(r"[^\w -]", "", line).replace(" ", "-") for line in headings]

    for document in README, REPORT:
        text = document.read_text("utf-8")
        for path, anchor in re.findall(r"\]\((?!https?:)([^)\s#]*)#?([^)\s]*)\)", text):
            target = document.parent / path if path else document
            assert target.exists() and (not anchor or anchor in anchors(target)), (path, anchor)
        addresses = set(re.findall(r"^\[(\w+)\]: http", text, re.M))
        assert set(re.findall(r"\]\[(\w+)\]", text)) == addresses
        for name in re.findall(r"\(`(\w+)`(?:, `(\w+)`)?\)", text):
            assert all(hasattr(train_gpt2, part) for part in name if part), name
    assert set(re.findall(r"!\[.*\]\((\S+)\)", text)) == set(plot.FIGURES)


def test_commands_are_understood(monkeypatch):
    """In the documents and the scripts' own headings: the script exists and knows the arguments."""
    class Parsed(BaseException):
        pass

    def parse_and_stop(parser, argv):
        raise Parsed(parse(parser, argv))

    parse = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    scripts = {"train_gpt2.py": train_gpt2, "fineweb.py": fineweb, "hellaswag.py": hellaswag}
    scripts |= {f"report/{m.__name__}.py": m for m in (ablation, bench, one_step, plot)}
    scripts["lab.py"] = train_gpt2  # a copy of it: see the report
    seen = set()
    for path in [README, REPORT, *ROOT.glob("*.py"), *(ROOT / "report").glob("*.py")]:
        text = path.read_text("utf-8")
        if path.suffix == ".py":
            text = text.split('"""')[1]
        text = re.sub(r"\\\n *", "", text)  # a command that goes on in the next line
        command = r"(?:python|torchrun)\b[^`\n|]*? ([\w./]+\.py)\b([^`\n|&)]*)"
        for script, rest in re.findall(command, text):
            if script.startswith("llama.cpp/"):
                continue
            # what stands behind two spaces or # explains it
            argv = shlex.split(re.split(r"  +|#", rest)[0])
            with pytest.raises((Parsed, SystemExit)) as e:
                scripts[script].main(argv)
            assert e.type is Parsed or argv == ["--help"], (script, argv, e.value.code)
            seen.add(script)
            for contender in e.value.args[0].contender if script == "report/bench.py" else []:
                flags = re.sub(r"--peer \S+", "", contender)
                parse(train_gpt2.make_parser(), ["--model", *shlex.split(flags)])
    assert seen == set(scripts), "a script that no document shows"


def test_tables_agree_with_logs():
    """Ablations in the report are what the logs say, and each log says what made it."""
    for group in GROUPS:
        table = ablation.table(LOGS, group)
        assert table.count("\n") > 2 and table in REPORT.read_text("utf-8"), group
    for log in LOGS.glob("*/*/main.log"):
        command, machine, first, *_ = log.read_text("utf-8").splitlines()
        assert command.startswith("# python ") and first.startswith(("s:0 tel:", "s:0 flags:"))
        made = r"# \d{4}-\d\d-\d\d, .*, torch [^ ,]+(, [\d.]+ MFLOP a token)?"
        assert re.fullmatch(made, machine), log
        of_english = log.parts[-3].startswith(("small", "medium", "head"))
        one_sequence = log.parts[-2].startswith("one_sequence")
        tokens = 8192 if of_english else 128 if one_sequence else 2048
        assert plot.Run(log.parent).tokens == tokens, log


def test_figures_agree_with_logs():
    """Every figure in bold is in the logs, and the README shows what the default run printed."""
    def unknown(text):
        bold = re.findall(r"\*\*([^*\n]*\d[^*\n]*)\*\*", text)
        assert len(bold) > 4
        return [figure for figure in bold if figure not in known]

    known = set()
    for group in GROUPS:
        for cell in re.split(r" ?[|\n] ?", ablation.table(LOGS, group)):
            known.add(cell.split(",")[0].replace("%", " %"))
        # single runs, and how far those of the default lie apart
        ends = [curve[-1][1] for curve in ablation.curves(LOGS, group, "today").values()]
        known |= {f"{loss:.3f}" for loss in ends}
        if len(ends) > 1:
            known.add(f"{statistics.stdev(ends):.3f}")
    for log in [*(LOGS / "lab").glob("*/main.log"), LOGS / "mlp" / "today.1" / "main.log"]:
        losses = re.findall(r"(?:tel|trl):(\S+)", log.read_text("utf-8"))
        known |= {f"{float(loss):.2f}" for loss in losses}
    for log in LOGS.glob("bench*.txt"):
        for table in log.read_text("utf-8").split("\n\n"):
            rows = re.findall(r"^\|.* \| ([\d.]+) \| ([\d,]+) \| [\d.]+ \|", table, re.M)
            for ms, rate in rows:
                known |= {ms, f"{float(ms):,.0f} ms", rate}
                # how much faster than another of the same table
                known |= {f"{float(other) / float(ms):.2f}" for other, _ in rows}
    assert unknown(REPORT.read_text("utf-8")) == []
    readme = README.read_text("utf-8")
    printed = (LOGS / "default_run.txt").read_text("utf-8")
    shown = re.findall(r"^    ((?:model|device|step|done|def) .*)$", readme, re.M)
    assert len(shown) > 5
    assert [line for line in shown if line.removesuffix(" ...") not in printed] == []
    # and the figures that decide, in the list under the heading
    assert unknown(readme.split("## What was measured")[1]) == []


def lab():
    """{title: (edits, commands)} of the report's lab. An edit is the lines before, and after."""
    text = REPORT.read_text("utf-8").split("\n## A lab of ten experiments")[1].split("\n## ")[0]
    experiments = {}
    for section in text.split("\n### ")[1:]:
        question = section.split("<details>")[0]
        edits = []
        for block in re.findall(r"```diff\n(.*?)```", question, re.S):
            lines = block.splitlines(keepends=True)
            before = "".join(line[1:] for line in lines if line[0] in " -")
            after = "".join(line[1:] for line in lines if line[0] in " +")
            edits.append((before, after))
        commands = re.findall(r"^    python lab.py (.*)$", question, re.M)
        experiments[section.splitlines()[0]] = edits, commands
    return experiments


def test_lab_has_ten_experiments():
    """Each has commands with one seed, most have an edit, and the answer is folded away."""
    text = REPORT.read_text("utf-8")
    assert len(lab()) == text.count("<details><summary>What happened</summary>") == 10
    for edits, commands in lab().values():
        assert commands and all("--seed 1 --output_dir log_lab" in command for command in commands)
        assert edits or not commands[0].startswith("--seed")


UNCHANGED = []


@pytest.mark.parametrize("title", lab())
def test_lab_fits_the_file(title, small):
    """Each edit finds its place in train_gpt2.py, once, and the changed file trains otherwise."""
    script = Path(SCRIPT).read_text("utf-8")
    edits, commands = lab()[title]
    for before, after in edits:
        assert script.count(before) == 1, before
        script = script.replace(before, after)
    # the lab's one unusual batch comes at step 300 of the default run
    script = script.replace("number == 300", "number == 3")
    Path("lab.py").write_text(script, "utf-8")
    # the flags of the experiment, after those of a small run, which are not the default run's
    flags = shlex.split(commands[0])
    usual = {"--learning_rate": "0.001", "--total_batch_size": "64", "--num_iterations": "4"}
    for i, flag in enumerate(flags[:-1]):
        flags[i + 1] = usual.get(flag, flags[i + 1])

    def losses(command):
        alone = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *command[:1], *small, *command[1:]],
                              capture_output=True, text=True, env=os.environ | alone)
        assert done.returncode == 0, done.stderr
        return re.findall(r"loss (\S+)", done.stdout)

    # what the file does as it is, with the lab's seed: the same for all ten
    if not UNCHANGED:
        UNCHANGED.extend(losses([SCRIPT, "--seed=1"]))
    assert losses(["lab.py", *flags]) != UNCHANGED


def test_gpu_script(small):
    """What a GPU is to tell runs here from end to end; a part that fails hides no other."""
    if sys.platform != "linux":
        pytest.skip("report/gpu.sh is for Linux")
    question = {"ind": 0, "ctx": "One and one", "label": 1, "endings": [" is", " two", " a", " b"]}
    Path("questions.jsonl").write_text(json.dumps(question) + "\n")
    names = {"SMOKE": "1", "OUT": "out", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    Path("llmc.py").write_text("raise OSError('not llm.c')")
    names |= {"DATA": small[-1].split("=")[1], "QUESTIONS": "questions.jsonl", "LLMC": "llmc.py"}
    command = ["bash", str(ROOT / "report" / "gpu.sh")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | names)
    table = Path("out/table.md").read_text()
    rows = re.findall(r"^\| (\w+) \| (\d+) \| \d+ \| (.*) \|$", table, re.M)
    codes = {name: code for name, code, _ in rows}
    parts = ["torch", "today", "gpt2", "resume", "hellaswag", "bench_d12", "bench_d24"]
    # all but the one whose llm.c is none
    assert codes == dict.fromkeys(parts, "0") | {"bench_llmc": "1"}, done.stdout + done.stderr
    assert done.returncode == 1
    answers = {name: answer for name, _, answer in rows}
    for name, *words in (
        ("today", "device cpu", "first step done", " ms ", "val loss"), ("gpt2", " tok/s"),
        ("resume", "4/6", "6/6"), ("hellaswag", "acc_norm"), ("bench_llmc", "OSError: not llm.c"),
        ("bench_d12", "d12 --arch gpt2"), ("bench_d24", "d24 --n_layer 2"),
    ):
        assert all(word in answers[name] for word in words), (name, answers[name])
    # nothing is written over, and what cannot be is said at once
    for change in {}, {"SLOW": "1.5"}, {"LLMC": "nowhere.py"}:
        env = os.environ | names | change
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 1 and (list(change) or ["out exists"])[0] in done.stderr


def test_ablation_makes_and_keeps_a_run(monkeypatch, small, capsys):
    """It trains, also under a patch, keeps the log, and does not train again what is there."""
    *flags, input_bin = small
    group = ablation.Group(2, (1, 2), ["today", "rope_by_head"], " ".join(flags))
    monkeypatch.setitem(ablation.GROUPS, "tiny", group)
    command = ["tiny", *"--seeds 1 --jobs 1 --logs logs --data".split(), input_bin.split("=")[1]]
    ablation.main(command)
    logs = {path.parent.name: path.read_text("utf-8") for path in Path("logs").rglob("main.log")}
    heading = "# python report/ablation.py --patched"
    assert logs["today.1"].startswith(f"{heading} only_losses --model=d12")
    assert logs["rope_by_head.1"].startswith(f"{heading} rope_by_head --model=d12")
    losses = [re.findall(r"s:\d tel:(\S+)", text) for text in logs.values()]
    assert len(losses) == len(losses[0]) == 2 and losses[0] != losses[1]
    assert "| RoPE turned by head instead of by time | 2 |" in capsys.readouterr().out
    # other curves in their place: the table is of these, and no run is made again
    for name, curve in ("today", (10, 6, 4)), ("gpt2", (10, 9, 8)), ("adamw", (10, 9, 8.5)):
        Path(f"logs/tiny/{name}.1").mkdir(exist_ok=True)
        lines = [f"s:{step} tel:{loss}\n" for step, loss in enumerate(curve)]
        Path(f"logs/tiny/{name}.1/main.log").write_text("".join(lines))
    ablation.main(command)
    out = capsys.readouterr().out
    assert "| the default | 2 | 4.000 |  | 25% | 1 |" in out  # half a step of two, from 10 to 8
    assert "| AdamW instead of Muon | 2 | 8.500 | +4.500 | - | 1 |" in out
    assert "(AdamW) | 2 | 8.000 | +4.000 | 100% | 1 |" in out
    # an error from three seeds on, and two of them are needed to say something
    assert ablation.difference_in_words([0.1, 0.12]) == "+0.110"
    assert ablation.difference_in_words([0.1, 0.11, 0.12]) == "+0.110 ± 0.006"
    assert ablation.difference_in_words([-0.1, 0.11, 0.12]).endswith(", not told apart from noise")


@pytest.mark.parametrize("group, heads", [("tiny", 4), ("medium", 4), ("d12", 12)])
def test_trials_have_the_heads_of_their_group(group, heads):
    """Half as many keys and values as queries, but for those trials that have as many."""
    for name in "today", "all_heads", "gpt2":
        argv = ablation.arguments(group, name, 1, None)
        args, _ = train_gpt2.parse_args(argv[2:])
        assert (args.n_head, args.n_kv_head) == (heads, heads // 2 if name == "today" else heads)
    assert {trial.patch for trial in ablation.TRIALS.values()} <= set(ablation.PATCHES)


def test_patches(monkeypatch):
    """MLPs of SwiGLU's size, and a head of its own that learns at a rate of its own."""
    for name in "MLP", "make_optimizers":
        monkeypatch.setattr(train_gpt2, name, getattr(train_gpt2, name))
    monkeypatch.setattr(GPT, "__init__", GPT.__init__)
    args, _ = train_gpt2.parse_args([])
    x = torch.tensor([[-1.0, 2.0]])
    num_params = sum(p.numel() for p in tiny_model().parameters())
    for name, wanted in ("gelu_equal", [[-0.1588, 1.9546]]), ("relu2_equal", [[0.0, 4.0]]):
        ablation.PATCHES[name]()
        model = tiny_model()
        assert sum(p.numel() for p in model.parameters()) == num_params
        activated = model.transformer.h[0].mlp.activation(x)
        torch.testing.assert_close(activated, torch.tensor(wanted), rtol=0, atol=1e-4)
    ablation.PATCHES["untied_2"]()
    model = tiny_model()
    assert model.lm_head.weight.abs().max() == 0 and model.transformer.wte.weight.abs().max() > 0
    adamw = train_gpt2.make_optimizers(model, args, "float32")[0]
    model(*torch.randint(64, (2, 1, 8))).backward()
    for _ in range(2):
        for group in adamw.param_groups:
            group["lr"] = 0.5
        adamw.step()
    rates = {id(p): group["lr"] for group in adamw.param_groups for p in group["params"]}
    assert rates[id(model.lm_head.weight)] == 1.0 and rates[id(model.transformer.wte.weight)] == 0.5


def test_one_step_is_the_runs_first(small, capsys):
    """What one_step.py shows is what a run does: the loss, the rate and the gradient's norm."""
    small.append("--warmup_iters=4")
    main([*small, "--val_loss_every=0"])
    wanted = [log_of("log", kind)[0] for kind in ("trl", r"trl:\S+ lr", r"trl:\S+ lr:\S+ norm")]
    capsys.readouterr()
    for dtype, tolerance in ("float32", 1e-3), ("bfloat16", 0.03):
        one_step.main([*small, f"--dtype={dtype}"])
        out = capsys.readouterr().out
        shown = re.search(r"loss (\S+) \| lr (\S+) \| norm (\S+)$", out.strip()).groups()
        assert [float(x) for x in shown] == pytest.approx(wanted, rel=tolerance)
        # the same loss, by the model's forward() and one operation at a time
        head_loss, by_hand = re.search(r"HeadLoss (\S+), .* above (\S+)", out).groups()
        assert float(by_hand) == pytest.approx(float(head_loss), rel=tolerance / 100)
    fails([*small, "--pos=learned"], capsys, "architecture", main=one_step.main)


PEER = """
import torch
GPTConfig = dict
class GPT(torch.nn.Module):
    calls = []
    def __init__(self, config):
        super().__init__()
        self.wte = torch.nn.Embedding(config["vocab_size"], config["n_embd"])
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type, zero_stage):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate)
    def forward(self, idx, targets=None, return_logits=True):
        self.calls.append((tuple(idx.shape), tuple(self.wte.weight.shape), return_logits))
        logits = self.wte(idx) @ self.wte.weight.T
        return None, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


def test_bench_measures_ours_and_a_peer(capsys):
    """One row each, of the same step; how fast they are is for people, not for tests."""
    Path("peer.py").write_text(PEER)
    flags = "--n_layer=1 --n_embd=32 --total_batch_size=512 --batch_size=2 --device=cpu"
    ours, theirs = f"tiny {flags}", f"tiny {flags} --arch gpt2 --peer peer.py"
    bench.main([ours, theirs, "--steps=2", "--warmup=1"])
    out = capsys.readouterr().out
    rows = [line.split("|")[1:] for line in out.splitlines() if line.startswith("| tiny")]
    assert [row[0].split(" (")[0].strip() for row in rows] == [ours, theirs]
    assert all(" (2 x 128 x 2, " in row[0] and float(row[1]) > 0 for row in rows)
    # four steps (the first, one to warm up, two that count) of two micro-batches, of bytes as ours
    assert sys.modules["peer"].GPT.calls == [((2, 128), (257, 32), False)] * 8
    for spec, *words in (
        ("tiny --arch gpt2 --peer nowhere.py", "--peer nowhere.py", "clone"),
        ("tiny --peer peer.py", "add --arch gpt2"),
        ("tiny --batch_size 3", "16 sequences", "no multiple of 3"),
    ):
        fails([spec], capsys, *words, main=bench.main)


def test_plot_draws_our_logs_and_llmcs(small, capsys, monkeypatch):
    """One picture with the losses of a run of ours and of one of llm.c's, and nothing random."""
    main([*small, "--prompt=a:b"])  # in the log's first line, where it is no number
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    fails(["log"], capsys, "pip install matplotlib", main=plot.main)
    monkeypatch.undo()
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.chdir(Path(small[-1].split("=")[1]).parent)
    Path("llmc").mkdir()
    # it was resumed: some steps stand there twice, and the last line of a step counts
    Path("llmc/main.log").write_text("s:0 tel:11\ns:0 eval:0.25\ns:250 tel:6.2\ns:500 tel:5\n"
                                     "s:125 tel:8\ns:250 tel:6.1\ns:1 trl:10.9 lr:0.1 norm:9\n")
    theirs = plot.Run("llmc")
    assert theirs.tokens == 524288 and theirs.series["tel"] == ([0, 125, 250, 500], [11, 8, 6.1, 5])
    # of a user's run the tokens and operations are those of its last.pt
    ours = plot.Run("log")
    assert ours.tokens == 512 and set(ours.series) == {"tel", "trl", "lr", "norm", "ms"}
    counted = train_gpt2.flops_per_token(tiny_model(vocab_size=257))
    assert ours.flops == counted and theirs.flops is None
    # and of a run by ablation.py those of its heading
    run = plot.Run(LOGS / "tiny" / "today.1")
    assert run.tokens == 2048
    # the first line is of step 0; the next is of ten steps, and its ms those of one of them
    _, ms = run.series["ms"]
    assert run.seconds([0, 1, 2]) == pytest.approx([0, ms[0] / 1000, (ms[0] + ms[1]) / 1000])
    for out in "both.svg", "again.svg":
        plot.main(["log", "llmc", "--out", out])
    plot.main(["llmc/"])
    svg = Path("both.svg").read_text("utf-8")
    for text in "log", "llmc", "million tokens", "seconds of training", "HellaSwag", "GPT-3 124M":
        assert text in svg, text
    assert Path("again.svg").read_text("utf-8") == svg and Path("llmc.svg").exists()
    fails(["nowhere"], capsys, "nowhere/main.log", "--output_dir", main=plot.main)
    Path("llmc/main.log").write_text("\n")
    fails(["llmc"], capsys, "nothing to draw", main=plot.main)

"""
Tests: first that it learns at all, then one section for each chapter of the project. Run them with

    python -m pytest -q

They need no GPU and no network, and take a few minutes. What needs a package that a user may not
have skips and says so. Every run is made in an empty folder of its own, on a text made there.
"""
import argparse
import collections
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
import socket
import statistics
import subprocess
import sys
import threading
import time
import types
import warnings
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
from train_gpt2 import GPT, GPTConfig, HeadLoss, TokenLoader

# No test may depend on a GPU. PyTorch reads this when it is first asked for one.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# it may be relative, and every test changes the folder
if "TIKTOKEN_CACHE_DIR" in os.environ:
    os.environ["TIKTOKEN_CACHE_DIR"] = os.path.abspath(os.environ["TIKTOKEN_CACHE_DIR"])

SCRIPT = str(Path(train_gpt2.__file__).resolve())
CPU = torch.device("cpu")
# Windows has no SIGHUP
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
           if hasattr(signal, name)]
# Under nohup or in the background of a script some of them are ignored, and started processes would
# inherit that: begin with what a terminal has.
for number in SIGNALS:
    signal.signal(number, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
HANDLERS = {number: signal.getsignal(number) for number in SIGNALS}
LOCKS = []  # those that runs of this process have made
STARTED = []  # processes

@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every test begins in an empty folder, and leaves the handlers of signals as they were."""
    def remember(path):
        LOCKS.append(filelock.FileLock(path))
        return LOCKS[-1]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    locks = types.SimpleNamespace(FileLock=remember, Timeout=filelock.Timeout)
    monkeypatch.setattr(train_gpt2, "filelock", locks)
    yield
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)
    while STARTED:
        with STARTED.pop() as process:
            process.kill()

@pytest.fixture
def corpus(tmp_path):
    """Sums in words, a text that can be learned, as two training shards and one for validation.

    Returns the flag that names them.
    """
    rng = np.random.default_rng(0)
    for name, lines in ("train_000001", 2000), ("train_000002", 900), ("val_000000", 400):
        text = "".join(f"{a} plus {b} is {a + b}.\n" for a, b in rng.integers(0, 100, (lines, 2)))
        ids = np.concatenate(([256], np.frombuffer(text.encode(), np.uint8)))
        fineweb.write_shard(tmp_path / f"sums_{name}.bin", ids, 257)
    return f"--input_bin={tmp_path}/sums_train_*.bin"

@pytest.fixture
def small(corpus):
    """The flags of a run that takes a second. A flag that is added wins over the same one here.

    It is a shrunken d12 and not tiny, because tiny prints only every 20th step.
    """
    return [
        "--model=d12", "--n_layer=2", "--n_head=4", "--n_embd=32", "--sequence_length=32",
        "--total_batch_size=512", "--num_iterations=6", "--val_loss_every=3", "--val_tokens=2048",
        "--dtype=float32", "--device=cpu", "--output_dir=log", corpus,
    ]

RESUME = ["--resume", "--output_dir=log", "--device=cpu"]

def main(argv):
    """train_gpt2.main(argv), which then lets go of its folder as if the process had ended."""
    try:
        return train_gpt2.main(argv)
    finally:
        while LOCKS:
            LOCKS.pop().release(force=True)

def fails(argv, capsys, *messages, main=main):
    """main(argv) ends in one line that has all the messages. Returns what was printed before."""
    with pytest.raises(SystemExit) as e:
        main(argv)
    line = str(e.value.code)
    assert line.startswith("error: ") and "\n" not in line, line
    for message in messages:
        assert message in line, line
    return capsys.readouterr().out

def environment(**changes):
    """os.environ for a process of its own. One thread: tests are too small for more."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **changes}

def run(*args, python=(), code=0, script=SCRIPT, **env):
    """The script in a process of its own, which has to end with this exit code."""
    done = subprocess.run([sys.executable, *python, script, *args], capture_output=True, text=True,
                          env=environment(**env), timeout=300)
    assert done.returncode == code, done.stderr
    return done

def torchrun(processes, *args, script=SCRIPT):
    """The script in several processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return run(*args, python=launcher, script=script)

def start(*args, patch="", **env):
    """Starts the script in a process of its own, after some code that changes what it uses."""
    folder = str(Path(SCRIPT).parent)
    code = f"import runpy, sys; sys.path.insert(0, {folder!r}); sys.argv[0] = ''\n{patch}\n"
    code += f"runpy.run_path({SCRIPT!r}, run_name='__main__')"
    STARTED.append(subprocess.Popen(
        [sys.executable, "-c", code, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=environment(**env)))
    return STARTED[-1]

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
        weights = load(f"{b}/{name}")["model"]
        for key, w in load(f"{a}/{name}")["model"].items():
            assert torch.equal(w, weights[key]), key

def tiny_model(**changes):
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 32, "vocab_size": 100}
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**shape, **changes}))

def random_ids(*shape):
    return torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(1))

GPT2_ARCH = {"n_kv_head": 4, **train_gpt2.GPT2}
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
    """python train_gpt2.py, shortened: what a newcomer sees, and what is left behind."""
    monkeypatch.setitem(train_gpt2.PEAK_FLOPS, "cpu", 1e11)
    main(["--num_iterations=30", "--val_loss_every=15", "--val_tokens=65536", "--output_dir=log"])
    out = capsys.readouterr().out
    assert "828,800 parameters, 787,840 without embeddings" in out
    assert out.count("--- a sample after") == 3 and "first step done" in out
    # the console and main.log agree, line by line
    log = []
    for s, line in re.findall(r"^step +(\d+)/30 \| (.*)", out, re.M):
        words = line.split()
        if words[0] == "val":
            log.append(f"s:{s} tel:{words[2]}")
        else:
            log.append(f"s:{s} trl:{words[1]} lr:{words[4]} norm:{words[7]} ms:{words[9]}")
            # 6 FLOP a weight and token, and attention's 12 C T a layer
            share = float(words[12].replace(",", "")) * (6 * 828_800 + 12 * 4 * 128 * 128) / 1e11
            assert words[15] == "MFU" and abs(float(words[16][:-1]) - 100 * share) < 0.1
    assert Path("log/main.log").read_text("utf-8").splitlines() == log
    validations = log_of("log", "tel")
    assert list(validations) == [0, 15, 30] and list(log_of()) == [0, 20, 29]
    assert abs(validations[0] - math.log(257)) < 0.5 and validations[30] < 3
    # what it names next
    following = re.findall(r"^    python (.*)", out, re.M)
    assert following[1:] == ["fineweb.py --shards 10", "train_gpt2.py --model d12"]
    main(shlex.split(following[0])[1:])
    assert capsys.readouterr().out.startswith("def ")
    fails(["--model", "d12"], capsys, "fineweb10B/fineweb_train_*.bin", "`python fineweb.py`")

# -------------------------------------------------------------------------------------------------
# 1. The model

@pytest.mark.parametrize("flags, everything, blocks", [
    ("--model=tiny", 828_800, 787_840),
    ("--model=d12", 116_510_976, 77_877_504),
    ("--model=d24", 329_961_472, 278_450_176),
    ("--model=d36", 719_191_808, 654_802_688),
    ("--model=d48", 1_560_122_944, 1_479_636_544),
    # OpenAI's number, and 47 rows that pad the vocabulary
    ("--model=d12 --arch=gpt2", 124_439_808 + 47 * 768, 85_056_000),
])
def test_parameter_counts(flags, everything, blocks):
    args, _ = train_gpt2.parse_args(flags.split())
    shape = {name: getattr(args, name) for name in vars(GPTConfig()) if name in args}
    vocab_size = 257 if args.model == "tiny" else 50257
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=vocab_size, block_size=args.sequence_length, **shape))
    assert model.num_params() == (everything, blocks)

def to_transformers(model):
    """Our weights in the class of the transformers library that computes the same."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = model.config
    ours = model.state_dict()
    vocab_size = len(ours["lm_head.weight"])
    state = {}
    if config.pos == "learned":
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=vocab_size, n_positions=config.block_size, n_embd=config.n_embd,
            n_layer=config.n_layer, n_head=config.n_head))
        for name in theirs.state_dict():
            # queries, keys and values are one matrix there, and matrices are (in, out)
            parts = ("c_q", "c_k", "c_v") if "c_attn" in name else ("c_attn",)
            w = torch.cat([ours[name.replace("c_attn", part)] for part in parts])
            state[name] = w.T if ".h." in name and w.dim() == 2 else w
    else:
        kind = "Qwen3" if config.qk_norm else "Llama"
        theirs = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(
            vocab_size=vocab_size, hidden_size=config.n_embd, num_hidden_layers=config.n_layer,
            intermediate_size=len(ours["transformer.h.0.mlp.c_up.weight"]), rms_norm_eps=1e-6,
            num_attention_heads=config.n_head, num_key_value_heads=config.n_kv_head,
            head_dim=config.n_embd // config.n_head, max_position_embeddings=config.block_size,
            rope_theta=10000.0, tie_word_embeddings=True))
        renamed = {"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm",
                   "transformer.h": "model.layers", "ln_1": "input_layernorm", ".c_": ".",
                   "ln_2": "post_attention_layernorm", "attn.proj": "attn.o", "attn": "self_attn"}
        for name, w in ours.items():
            for old, new in renamed.items():
                name = name.replace(old, new)
            name = re.sub(r"\.(q|k|v|o|gate|up|down)\.", r".\1_proj.", name)
            state[name.replace("post_self_attn", "post_attn")] = w
    theirs.load_state_dict(state)
    return theirs.eval()

@pytest.mark.parametrize("arch", [GPT2_ARCH, {"qk_norm": False}, {}, {"n_kv_head": 1}],
                         ids=["GPT-2", "Llama", "Qwen3", "Qwen3, one key/value head"])
def test_logits_equal_those_of_transformers(arch):
    """The same weights, gains and biases included, give the same logits there."""
    model = tiny_model(n_embd=64, block_size=64, **arch)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = random_ids(2, 64)
    ours = model(x)[..., :100]
    theirs = to_transformers(model)(x).logits[..., :100]
    # close to zero the comparison would mean little
    assert ours.std() > 0.5 and (ours - theirs).abs().max() < 1e-4

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
    model = tiny_model(n_layer=8, n_embd=128, **train_gpt2.GPT2)
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

@pytest.mark.parametrize("rows", [13, 1000])
def test_head_loss_is_cross_entropy(rows, monkeypatch):
    """The value and both gradients, in slices that do not divide the batch."""
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
    assert isinstance(loader.shards[0], np.memmap) and loader.shards[0].dtype == np.dtype("<u2")
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

def shard(magic=20240520, version=1, count=5000, vocab_size=257, length=5000, token=1):
    header = np.zeros(256, "<i4")
    header[:4] = magic, version, count, vocab_size
    return header.tobytes() + np.full(length, token, "<u2").tobytes()

@pytest.mark.parametrize("content, message", [
    (b"", "too short for a token shard"),
    (shard()[:500], "too short for a token shard"),
    (shard(magic=42), "no token shard"),
    (shard(version=2), "of another version"),
    (shard(length=4990), "truncated"),
    (shard(length=5001), "overlong"),
    (shard(count=0, length=0), " 0 sequences of 32 tokens"),
    (shard(count=100, length=100), " 3 sequences of 32 tokens"),
    (shard(vocab_size=300), "300"),
    (shard(vocab_size=0), "of different vocabularies"),
    (shard(token=257), "holds id 257, outside the 257 of its vocabulary"),
], ids=["empty file", "half a header", "magic", "version", "truncated", "overlong", "no tokens",
        "too few tokens", "vocabulary", "validation has another", "token id"])
def test_bad_shards(content, message, small, capsys):
    Path("sums_train_000001.bin").unlink()
    Path("sums_train_000002.bin").write_bytes(content)
    fails(small, capsys, message, "sums_train_")
    assert not Path("log/last.pt").exists()

def test_shards_of_two_vocabularies_are_not_mixed(small, capsys):
    """Bytes and GPT-2's tokens under one pattern would be taken for one language."""
    Path("sums_train_000000.bin").write_bytes(shard(vocab_size=0))
    fails(small, capsys, "vocabular")

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
    # a short run warms up for a tenth of it, a very short one not at all
    args.num_iterations = 100
    assert rates(0, 5, 10, 30, 65) == pytest.approx([0.1, 0.55, 1, 1, 0.5])
    args.num_iterations = 6
    assert rates(0) == [1]

@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_each_optimizer_has(optimizer):
    """Vectors do not decay, Muon has the matrices of the blocks alone, nothing is left out."""
    model = tiny_model(**train_gpt2.GPT2)
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

def test_muon_is_pytorchs():
    """Three steps with matrices of one shape together are those of torch.optim.Muon, one by one."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this PyTorch has no Muon")
    torch.manual_seed(0)
    begin = [torch.randn(shape) for shape in [(48, 48), (48, 48), (24, 48), (128, 48), (48, 128)]]
    ours = [torch.nn.Parameter(p.clone()) for p in begin]
    theirs = [torch.nn.Parameter(p.clone()) for p in begin]
    a = train_gpt2.Muon(ours, 0.01, 0.1)
    b = torch.optim.Muon(theirs, 0.01, 0.1, 0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q, first in zip(ours, theirs, begin, strict=True):
        # as close as bf16 gets: small beside the way that they have gone
        assert (p - q).norm() < 0.05 * (q - first).norm()

def test_orthogonalize():
    """Whatever the singular values were, they are about 1, and the directions are the same."""
    torch.manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(3, 32, 64), full_matrices=False)
    X = train_gpt2.orthogonalize(100 * u @ torch.diag(torch.logspace(0, -1.5, 32)) @ vh)
    values = torch.linalg.svdvals(X)
    assert 0.65 < values.min() and values.max() < 1.25, values
    assert ((u.mT @ X @ vh.mT).diagonal(dim1=1, dim2=2) > 0.6).all()

COMMON = dict(sequence_length=1024, total_batch_size=524288, num_iterations=19073,
              warmup_iters=250, val_loss_every=250, log_every=1, compile=None)
TODAY = dict(optimizer="muon", schedule="wsd", weight_decay=0.1, norm="rmsnorm", mlp="swiglu",
             pos="rope", qk_norm=True, bias=False, n_kv_head=0)
GPT2_D12 = dict(norm="layernorm", mlp="gelu", pos="learned", qk_norm=False, bias=True, n_kv_head=12)
ORIGINAL = dict(optimizer="adamw", schedule="cosine", warmup_iters=715, qk_norm=False)

@pytest.mark.parametrize("flags, values", [
    ("", dict(
        TODAY, model="tiny", n_layer=4, n_head=4, n_embd=128, learning_rate=4e-3,
        sequence_length=128, total_batch_size=2048, num_iterations=600, warmup_iters=20,
        val_loss_every=200, log_every=20, compile=False, output_dir=Path("logtiny"))),
    ("--model=d12", dict(COMMON, **TODAY, n_layer=12, n_head=12, n_embd=768, learning_rate=2.4e-3,
                         output_dir=Path("log124M"))),
    ("--model=d24", dict(COMMON, **TODAY, n_layer=24, n_head=16, n_embd=1024, learning_rate=1.2e-3,
                         output_dir=Path("log350M"))),
    ("--model=d36", dict(COMMON, **TODAY, n_layer=36, n_head=20, n_embd=1280, learning_rate=1e-3,
                         output_dir=Path("log774M"))),
    ("--model=d48", dict(COMMON, **TODAY, n_layer=48, n_head=25, n_embd=1600, learning_rate=8e-4,
                         output_dir=Path("log1558M"))),
    ("--model=d12 --arch=gpt2", GPT2_D12),
    ("--model=d12 --arch=gpt2 --pos=rope --qk_norm --n_kv_head=3",
     dict(GPT2_D12, pos="rope", qk_norm=True, n_kv_head=3)),
    ("--model=d12 --recipe=original", dict(ORIGINAL, learning_rate=1.2e-3, weight_decay=0.1)),
    ("--model=d24 --recipe=original", dict(ORIGINAL, learning_rate=6e-4)),
    ("--model=d48 --recipe=original", dict(ORIGINAL, learning_rate=4e-4)),
    ("--model=d12 --recipe=original --optimizer=muon --learning_rate=0.5 --qk_norm",
     dict(ORIGINAL, optimizer="muon", learning_rate=0.5, qk_norm=True)),
    ("--init_from=gpt2", dict(
        GPT2_D12, n_layer=12, optimizer="adamw", learning_rate=3e-5, warmup_iters=0,
        total_batch_size=32768, output_dir=Path("log_gpt2"))),
])
def test_presets_and_recipes(flags, values):
    """Value by value; and a flag beside a preset, --arch or --recipe wins."""
    args, _ = train_gpt2.parse_args(flags.split())
    assert {name: getattr(args, name) for name in values} == values

def test_accumulation_equals_one_large_batch(small):
    """The same losses and gradients, however many sequences there are in a micro-batch."""
    for size in 16, 4, 1:
        main([*small, "--optimizer=adamw", f"--batch_size={size}", f"--output_dir=log{size}"])
    for kind in "trl", "tel", r"trl:\S+ lr:\S+ norm":
        one = log_of("log16", kind)
        assert len(one) == (3 if kind == "tel" else 6)
        assert log_of("log4", kind) == pytest.approx(one, rel=1e-4)
        assert log_of("log1", kind) == pytest.approx(one, rel=1e-4)

def test_gradients_are_clipped(small, monkeypatch):
    """Where a gradient is longer than 1, the optimizers get it at length 1."""
    real = train_gpt2.Muon.step
    lengths = []

    def step(self):
        gradients = [p.grad.norm().item() for p in self.param_groups[0]["params"]]
        lengths.append(math.hypot(*gradients))
        real(self)

    monkeypatch.setattr(train_gpt2.Muon, "step", step)
    main([*small, "--n_embd=128"])
    assert max(log_of("log", r"trl:\S+ lr:\S+ norm").values()) > 2 and max(lengths) <= 1

# -------------------------------------------------------------------------------------------------
# 5. Checkpoints

class Crash(Exception):
    """Ends a run as a power cut would, where a test wants it."""

def crash(small, monkeypatch, when):
    """Begins a run that ends right after the step `when`, of which nothing is saved."""
    real = train_gpt2.Run.report_step

    def report_step(self, *args):
        real(self, *args)
        if self.step == when:
            raise Crash

    with monkeypatch.context() as patch, contextlib.suppress(Crash):
        patch.setattr(train_gpt2.Run, "report_step", report_step)
        main(small)

@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resume_is_exact(small, optimizer, monkeypatch):
    """A run that crashed and was resumed has the losses of one that did not, and its weights."""
    small += [f"--optimizer={optimizer}", "--num_iterations=8", "--batch_size=8"]
    main([*small, "--output_dir=straight"])
    crash(small, monkeypatch, when=5)
    assert load("log/last.pt")["step"] == 3 and max(log_of()) == 4
    assert main([*small, "--resume"]) == 0
    assert_same_run("log", "straight")
    a, b = load("log/last.pt"), load("straight/last.pt")
    assert all(a[name] == b[name] for name in ("step", "train_loss", "val_loss", "best_val_loss"))

def test_resume_takes_its_flags_from_the_run(small):
    main([*small, "--learning_rate=0.004", "--prompt=7 plus"])
    assert main([*RESUME, "--num_iterations=8"]) == 0
    state = load("log/last.pt")
    assert state["step"] == 8 and state["config"]["n_embd"] == 32
    assert (state["args"]["learning_rate"], state["args"]["prompt"]) == (0.004, "7 plus")

def test_resume_refuses_what_is_fixed(small, capsys):
    main(small)
    before = Path("log/last.pt").read_bytes()
    for flag in ("--norm=layernorm", "--n_layer=3", "--seed=1", "--total_batch_size=1024",
                 "--optimizer=adamw", "--model=d24", "--sequence_length=64", "--arch=gpt2"):
        name, value = flag.split("=")
        fails([*small, "--resume", flag], capsys, f"log was begun with {name}", value)
    fails([*RESUME, "--num_iterations=5"], capsys, "--num_iterations 5", "6")
    fails(["--resume", "--output_dir=nowhere"], capsys, "nowhere/last.pt")
    assert Path("log/last.pt").read_bytes() == before

def test_resume_says_when_there_is_more_data(small, capsys):
    main(small)
    shutil.copy("sums_train_000002.bin", "sums_train_000003.bin")
    main([*RESUME, "--num_iterations=8"])
    assert "NOTE: there is more or less data than before" in capsys.readouterr().out

def test_best_and_last(small, monkeypatch):
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
    # a resumed run knows what was lowest
    main([*RESUME, "--num_iterations=14"])
    assert load("log/best.pt")["step"] == best["step"]

def test_each_state_is_saved_once(small, monkeypatch, capsys):
    """At 25 GB a checkpoint, once more than needed takes minutes."""
    saved = []
    save_checkpoint = train_gpt2.save_checkpoint

    def save(path, state):
        saved.append((path.name, state["step"]))
        return save_checkpoint(path, state)

    monkeypatch.setattr(train_gpt2, "save_checkpoint", save)
    main(small)
    assert saved == [("best.pt", 3), ("last.pt", 3), ("best.pt", 6), ("last.pt", 6)]
    # without a validation there is only the end, and no lowest loss to tell of
    saved.clear()
    main([*small, "--val_loss_every=0", "--output_dir=other"])
    assert saved == [("last.pt", 6)] and "inf" not in capsys.readouterr().out.split("done in")[-1]

def test_flipped_bits_are_noticed(small):
    """Whatever bit of a checkpoint is flipped, it is refused or it makes no difference."""
    main(small)
    raw = Path("log/last.pt").read_bytes()
    state = load("log/last.pt")
    weights = state["model"]["transformer.h.1.mlp.c_up.weight"].numpy().tobytes()
    places = [raw.index(weights), raw.index(weights) + len(weights) - 1]
    places += np.random.default_rng(0).integers(0, len(raw), 30).tolist()
    refused = set()
    for place in places:
        flipped = raw[:place] + bytes([raw[place] ^ 16]) + raw[place + 1:]
        Path("flipped.pt").write_bytes(flipped)
        try:
            found = train_gpt2.read_checkpoint(Path("flipped.pt"))["model"]
            assert all(torch.equal(found[name], w) for name, w in state["model"].items())
        except SystemExit as e:
            assert "flipped.pt is no checkpoint" in str(e) and "\n" not in str(e)
            refused.add(place)
    assert set(places[:2]) < refused and len(refused) > 20

class Evil:
    def __reduce__(self):
        return Path.touch, (Path("it_ran"),)

# What happens to a last.pt. After the first group nobody can read it, after the second nobody can
# resume it.
SPOILED = """
path.unlink()
path.unlink(); path.mkdir()
path.write_text("hello")
path.write_bytes(raw[:-1000])
torch.save([1, 2], path)
torch.save(torch.ones(3), path)
state["model"]["transformer.h.0.attn.c_attn.weight"] = torch.ones(2)
state["config"] = Evil()
state.pop("config")
state.pop("tokenizer")
state["tokenizer"] = "morse"
state["tokenizer"] = "gpt2"
state["config"]["vocab_size"] = 320
state["config"]["n_layer"] = 3
state["config"]["n_head"] = 5
state["config"]["color"] = "red"
state["model"].pop("transformer.ln_f.weight")
state["model"]["transformer.ln_f.weight"] = torch.ones(7)
state.pop("step")
state["step"] = "six"
state["val_loss"] = None

state.pop("best_val_loss")
state.pop("args")
state["args"].pop("seed")
state.pop("optimizer")
state["optimizer"].pop()
state["optimizer"][1]["param_groups"][0]["params"].pop()
"""

@pytest.mark.parametrize("line", SPOILED.replace("\n\n", "\n").strip().split("\n"))
def test_bad_checkpoints(line, small, capsys):
    """Whatever is wrong with a file, it is one line, and no code in it runs."""
    main(small)
    path = Path("log/last.pt")
    state = load(path)
    exec(line, {**globals(), "path": path, "state": state, "raw": path.read_bytes()})
    if line.startswith("state"):
        torch.save(state, path)
    if line in SPOILED.split("\n\n")[0]:
        with warnings.catch_warnings(record=True) as warned:
            fails(["--sample=log/last.pt"], capsys, "log/last.pt is no checkpoint that can be used")
        assert not warned
    fails([*RESUME, "--num_iterations=8"], capsys, "log/last.pt")
    assert not Path("it_ran").exists()

def test_flags_in_a_checkpoint_do_nothing_else(small, capsys):
    """It may come from anybody: neither a sample nor a resumed run does what it should not."""
    main([*small, "--prompt=7 plus"])
    state = load("log/last.pt")
    state["args"] |= {"export": ["log/last.pt", "exported"], "output_dir": "elsewhere"}
    torch.save(state, "log/last.pt")
    capsys.readouterr()
    main(["--sample=log/last.pt"])
    assert capsys.readouterr().out.startswith("def ")
    main([*RESUME, "--num_iterations=8"])
    assert load("log/last.pt")["step"] == 8
    assert not Path("elsewhere").exists() and not Path("exported").exists()

def test_a_killed_run_leaves_a_checkpoint(small):
    """kill -9 while the third last.pt is being written: the second is still there, and goes on."""
    small += ["--val_loss_every=1", "--batch_size=8"]
    main([*small, "--output_dir=straight"])
    process = start(*small, patch="""
import os, signal, torch
real = torch.save
def save(state, f):
    real(state, f)
    if state["step"] == 3 and "optimizer" in state:
        os.truncate(f.name, 1000)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = save
""")
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert load("log/last.pt")["step"] == 2 and load("log/best.pt")["step"] == 3
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
    resource = pytest.importorskip("resource", reason="Windows cannot limit the size of files")
    main(small)
    before = Path("log/last.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        out = fails([*RESUME, "--num_iterations=12", "--val_loss_every=2"], capsys, "make room",
                    "the final weights are not saved", "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    # it warned, and went on to the end
    assert "WARNING: cannot write log/last.pt" in out and max(log_of()) == 11
    assert Path("log/last.pt").read_bytes() == before and not list(Path("log").glob("*.tmp"))
    assert main([*RESUME, "--num_iterations=9"]) == 0

# -------------------------------------------------------------------------------------------------
# 6. Evaluate and sample

def test_validation_counts_the_same_tokens(corpus, monkeypatch):
    """For any batch size and number of processes; a smaller last batch uses the eager model."""
    model = tiny_model(vocab_size=257)
    data = TokenLoader("sums_val_*.bin", 32)
    wanted = model(*data.batch(0, 70, CPU)).item()
    sizes = set()

    def compiled(x, y):
        sizes.add(len(x))
        return model(x, y)

    monkeypatch.setattr(train_gpt2, "all_sum", lambda values, device: values)
    for world_size, batch_size in (1, 1), (1, 16), (1, 64), (2, 16), (3, 4), (4, 64):
        monkeypatch.setattr(train_gpt2, "world_size", world_size)
        total = 0
        for rank in range(world_size):
            monkeypatch.setattr(train_gpt2, "ddp_rank", rank)
            total += train_gpt2.evaluate(compiled, model, data, 70, batch_size, CPU,
                                         contextlib.nullcontext, on_batch=lambda: None)
        assert total == pytest.approx(wanted, abs=1e-5) and sizes == {batch_size}
        sizes.clear()

def test_generate():
    """The likeliest id each time, over as much of the text as the model can see."""
    model = tiny_model()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))  # or it would only repeat itself
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

def test_generation_stops_at_the_end_of_a_document():
    """A model that says 7, and after 7 <|endoftext|>, the last id."""
    def forward(x):
        logits = torch.full((1, x.size(1), 128), -math.inf)
        logits[0, -1, 99 if x[0, -1] == 7 else 7] = 20.0
        return logits

    model = tiny_model()
    model.forward = forward
    assert list(train_gpt2.generate(model, [5], 10)) == [7]

def test_pieces_of_characters(capsys, monkeypatch):
    """A character of several bytes appears whole, half of one as a mark; <|endoftext|> begins."""
    asked = []

    def generate(model, ids, *args, **how):
        asked.extend(ids)
        return iter([*"né→".encode(), 0xE2, 0x41])

    monkeypatch.setattr(train_gpt2, "generate", generate)
    train_gpt2.print_sample(tiny_model(vocab_size=257), "bytes", "dé", 0)
    assert capsys.readouterr().out == "déné→\N{REPLACEMENT CHARACTER}A\n"
    assert asked == [256, ord("d"), 0xC3, 0xA9]

def test_a_prompt_that_is_no_text():
    """A byte of a command line in another encoding becomes a question mark, as with GPT-2's."""
    encode, _ = train_gpt2.load_tokenizer("bytes")
    assert encode(os.fsdecode(b"caf\xe9")) == list(b"caf?")

def test_gpt2_tokenizer():
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("TIKTOKEN_CACHE_DIR is not set, and tests download nothing")
    encode, token_bytes = train_gpt2.load_tokenizer("gpt2")
    # in somebody's text the word is no token
    assert encode("Hello world") == [15496, 995] and 50256 not in encode("<|endoftext|>")
    assert b"".join(map(token_bytes, encode("naïve 🙂"))).decode() == "naïve 🙂"

def test_without_a_vocabulary_there_are_no_samples(small, capsys, monkeypatch):
    """A machine that is offline trains all the same; to sample is an error in one line."""
    def get_encoding(name):
        raise ConnectionError("cannot resolve openaipublic.blob.core.windows.net")

    monkeypatch.setitem(sys.modules, "tiktoken", types.SimpleNamespace(get_encoding=get_encoding))
    for path in Path().glob("sums_*.bin"):
        path.write_bytes(shard(vocab_size=0))
    assert main(small) == 0
    assert "no sample" in (out := capsys.readouterr().out) and "TIKTOKEN_CACHE_DIR" in out
    assert "python hellaswag.py -m log/" in out and load("log/last.pt")["tokenizer"] == "gpt2"
    fails(["--sample=log/last.pt"], capsys, "GPT-2's vocabulary", "TIKTOKEN_CACHE_DIR")

# -------------------------------------------------------------------------------------------------
# 7. The run

def test_flags():
    """At most 32, each with a word of help; and the commands at the head of the file are real."""
    actions = [a for a in train_gpt2.make_parser()._actions if a.dest != "help"]
    assert len(actions) <= 32 and all(action.help for action in actions)
    commands = re.findall(r"^    (?:python|torchrun .*) train_gpt2\.py(.*?)(?:   .*)?$",
                          train_gpt2.__doc__, re.M)
    assert len(commands) >= 4
    for command in commands:
        train_gpt2.parse_args(shlex.split(command))

MISTAKES = """
--model=d13                         -> --model, d13, d12
--total_batch_size=500              -> --total_batch_size 500, give 480 or 512
--total_batch_size=0                -> --total_batch_size 0, give 32 or 64
--batch_size=5                      -> batch_size 5, give 480 or 640
--batch_size=-4                     -> --batch_size, -4
--n_head=5                          -> n_embd 32 / n_head 5
--n_kv_head=3                       -> n_head 4, n_kv_head 3
--n_layer=0                         -> --n_layer
--sequence_length=0                 -> --sequence_length
--sequence_length=9000 --val_tokens=9000 --total_batch_size=9000 -> sums_val_, 9000
--total_batch_size=5120000          -> sums_train_, --total_batch_size
--val_tokens=31                     -> --val_tokens
--val_tokens=nan                    -> --val_tokens, nan
--learning_rate=nan                 -> --learning_rate, nan
--learning_rate=inf                 -> --learning_rate, inf
--learning_rate=-1                  -> --learning_rate, -1
--learning_rate=fast                -> --learning_rate, fast
--num_iterations=1e999              -> --num_iterations, 1e999
--seed=99999999999999999999999      -> --seed, from 0 to 9e18
--no_such_flag=1                    -> --no_such_flag
--device=cuda                       -> --device cuda
--device=mps                        -> --device mps
--input_bin=nothing_train_*.bin     -> nothing_train_*.bin, python fineweb.py
--input_bin=lonely_train_*.bin      -> lonely_val_*.bin, python fineweb.py
--input_bin=sums_val_*.bin          -> sums_val_*.bin, _train_
--sample=nowhere.pt                 -> nowhere.pt
--sample=                           -> is no checkpoint
--output_dir=a_file/log             -> a_file, --output_dir
"""

@pytest.mark.parametrize("line", MISTAKES.strip().splitlines())
def test_mistakes_end_in_one_line(line, small, capsys):
    Path("a_file").write_text("")
    shutil.copy("sums_train_000002.bin", "lonely_train_000001.bin")
    flags, messages = line.split("->")
    fails([*small, *flags.split()], capsys, *messages.strip().split(", "))

def test_a_loss_that_is_not_finite(small, capsys, monkeypatch):
    """The run ends, and the last good checkpoint stays."""
    real = HeadLoss.apply

    def apply(*args):
        return real(*args) * (math.nan if Path("log/last.pt").exists() else 1)

    monkeypatch.setattr(HeadLoss, "apply", apply)
    fails(small, capsys, "step 3 has loss nan", "log/last.pt")
    assert all(w.isfinite().all() for w in load("log/last.pt")["model"].values())

def test_a_validation_loss_that_is_not_finite(small, capsys, monkeypatch):
    """A step may spoil the weights with a gradient that is in order: they are not saved."""
    real = train_gpt2.evaluate

    def evaluate(*args, **how):
        return math.nan if Path("log/last.pt").exists() else real(*args, **how)

    monkeypatch.setattr(train_gpt2, "evaluate", evaluate)
    fails(small, capsys, "after 6 steps", "loss is nan", "log/last.pt")
    assert load("log/last.pt")["step"] == 3

def test_a_model_without_numbers_writes_nothing(small, capsys):
    main(small)
    state = load("log/last.pt")
    state["model"]["transformer.ln_f.weight"] *= math.nan
    torch.save(state, "log/last.pt")
    fails(["--sample=log/last.pt", "--device=cpu"], capsys, "take an earlier checkpoint")

@pytest.mark.parametrize("error, message", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "--batch_size"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
     "out of memory"),
    (OSError(28, "No space left on device"), "No space left"),
])
def test_errors_while_training(error, message, small, capsys, monkeypatch):
    def train(run):
        raise error

    monkeypatch.setattr(train_gpt2, "train", train)
    fails(small, capsys, message)

def test_without_a_compiler(small):
    """--compile needs a C++ compiler on a CPU: one line names the way without."""
    done = run(*small, "--compile", code=1, PATH="", CXX="no-compiler",
               TORCHINDUCTOR_CACHE_DIR=os.path.abspath("cache"))
    assert done.stderr.splitlines()[-1].startswith("error: torch.compile does not work here")
    assert "--no-compile" in done.stderr and "Traceback" not in done.stderr

def test_the_disk_is_too_small(small, capsys, monkeypatch):
    """That is said before training, not at its end."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=100_000))
    assert "loss" not in fails(small, capsys, "log: ", "free", "--output_dir")

def test_a_log_that_cannot_be_written(small, capsys):
    """Says so, and goes on training."""
    Path("log/main.log").mkdir(parents=True)
    assert main(small) == 0 and load("log/last.pt")["step"] == 6
    assert "WARNING: cannot write main.log" in capsys.readouterr().out

def test_a_run_is_never_written_over(small, capsys):
    """A folder with a checkpoint is refused; what a run killed early has left is no run."""
    Path("log").mkdir()
    Path("log/main.log").write_text("s:0 tel:9.000000\n")
    assert main(small) == 0 and log_of("log", "tel")[0] < 6
    before = {path: path.read_bytes() for path in Path("log").iterdir()}
    fails(small, capsys, "log holds last.pt", "--resume", "another --output_dir")
    Path("log/last.pt").rename("last.pt")
    fails(small, capsys, "log holds best.pt", "another --output_dir")
    Path("last.pt").rename("log/last.pt")
    assert before == {path: path.read_bytes() for path in Path("log").iterdir()}

def test_the_run_without_flags_keeps_earlier_ones(corpus, capsys, monkeypatch):
    """It moves them out of its way, but not one that is at work, whose folder is locked."""
    changes = {"n_layer": 1, "n_embd": 32, "num_iterations": 2, "input_bin": corpus[12:]}
    monkeypatch.setitem(train_gpt2.PRESETS, "tiny", {**train_gpt2.PRESETS["tiny"], **changes})
    real = train_gpt2.train
    number = 0

    def train(run):
        run.save()
        for flags in [], ["--resume"], ["--output_dir=logtiny"]:
            fails(flags, capsys, "a run is at work in logtiny", main=train_gpt2.main)
        Path("logtiny/mine.txt").write_text(str(number))
        real(run)

    monkeypatch.setattr(train_gpt2, "train", train)
    for number in range(3):  # noqa: B007, train() reads it
        assert main([]) == 0
    for number, folder in enumerate(("logtiny.1", "logtiny.2", "logtiny")):
        assert Path(folder, "mine.txt").read_text() == str(number)
        assert load(f"{folder}/last.pt")["step"] == 2
    assert len(list(Path().glob("logtiny*"))) == 3

def test_autocast_follows_the_hardware(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda self: True)
    for flags, native in [("sse2 avx2 amx_bf16", True), ("avx512_bf16", True), ("asimd bf16", True),
                          ("sse2 avx512f amx_int8", False)]:
        monkeypatch.setattr(Path, "read_text", lambda self, encoding, flags=flags: flags)
        dtype, autocast = train_gpt2.pick_autocast(None, CPU)
        assert dtype == ("bfloat16" if native else "float32")
        with autocast():
            assert torch.is_autocast_enabled("cpu") == native
    assert train_gpt2.pick_autocast("bfloat16", CPU)[0] == "bfloat16"

def test_micro_batches_fit_the_device(monkeypatch):
    """They divide a step; a small GPU, fp32 and a model that is not compiled get smaller ones."""
    def pick(gigabytes, dtype="bfloat16", compiled=True, sequences=512, config=None):
        memory = types.SimpleNamespace(total_memory=gigabytes * 1e9)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
        size = train_gpt2.pick_batch_size(config or GPTConfig(), 116_510_976, torch.device("cuda"),
                                          dtype, compiled, sequences)
        assert sequences % size == 0
        return size

    # 8 GB: no room for the logits of HEAD_ROWS tokens, but for those of a few sequences
    assert pick(80) == 64 and pick(8) == 4 < pick(24) < 64
    assert pick(24, dtype="float32") < pick(24) and pick(40, compiled=False) < pick(40)
    assert pick(80, sequences=30) == 30 and pick(8, config=GPTConfig(n_layer=48, n_embd=1536)) == 1
    # on a CPU 4096 tokens
    for sequences, size in (512, 4), (6, 3), (5, 1):
        assert train_gpt2.pick_batch_size(GPTConfig(), 1, CPU, "float32", False, sequences) == size

def test_a_slow_machine_is_told_how_long_it_takes(small, capsys, monkeypatch):
    """After one micro-batch, and before the first validation, which may take hours."""
    clock = iter(range(0, 10**9, 60))
    monkeypatch.setattr(train_gpt2, "time", types.SimpleNamespace(time=lambda: next(clock)))
    main([*small, "--batch_size=8"])
    # two micro-batches of a minute, and 64 sequences without a backward pass
    assert re.search(r"NOTE: .* 2\.0 minutes .* validation 2\.7;.*\nstep +0/6 \| val loss",
                     capsys.readouterr().out)

def send(monkeypatch, *numbers, at, calls):
    """The run gets signals in the n-th call of a method of Run, or of a function."""
    owner = train_gpt2.Run if hasattr(train_gpt2.Run, at) else train_gpt2
    real = getattr(owner, at)

    def call(*args):
        nonlocal calls
        calls -= 1
        if calls == 0:
            for number in numbers:
                # it would end the tests
                assert signal.getsignal(number) != signal.SIG_DFL
                os.kill(os.getpid(), number)
        return real(*args)

    monkeypatch.setattr(owner, at, call)

@pytest.mark.parametrize("numbers", [SIGNALS[:1], SIGNALS[1:2] * 2, SIGNALS[2:]], ids=str)
@pytest.mark.parametrize("at, calls, step", [
    ("get_lr", 4, 4),  # at the end of a step, which counts
    ("micro_batch", 11, 4),  # in the middle of the fifth step; the first two calls are before all
    ("validate", 2, 3),  # before a step
])
def test_signals_stop_a_run_gently(at, calls, step, numbers, small, capsys, monkeypatch):
    """It saves and says how to go on, and then there is no difference to a run without a pause."""
    if not numbers:
        pytest.skip("Windows has no SIGHUP")
    small += ["--batch_size=8", "--prompt=7 plus"]
    main([*small, "--output_dir=straight"])
    with monkeypatch.context() as patch:
        send(patch, *numbers, at=at, calls=calls)
        assert main(small) == 128 + numbers[0]
    assert load("log/last.pt")["step"] == step
    command = re.search(r"To go on: python train_gpt2\.py (.*)", capsys.readouterr().out)[1]
    assert main(shlex.split(command)) == 0
    assert_same_run("log", "straight")

def test_nohup_stays_in_force(small, monkeypatch):
    """nohup makes a program ignore that its terminal is closed."""
    if len(SIGNALS) < 3:
        pytest.skip("Windows has no SIGHUP")
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    send(monkeypatch, signal.SIGHUP, at="get_lr", calls=1)
    assert main(small) == 0 and load("log/last.pt")["step"] == 6

@pytest.mark.parametrize("times, code", [(1, 130), (2, -signal.SIGINT)])
def test_ctrl_c(times, code, small):
    """Once: the run saves and ends. Twice: it ends at once, although a step takes a minute."""
    process = start(*small, patch=f"""
import time, torch
real = torch.Tensor.backward
calls = []
def backward(self):
    calls.append(1)
    if len(calls) == 4:
        print("in a step", flush=True)
        time.sleep({2 if times == 1 else 60})
    real(self)
torch.Tensor.backward = backward
""")
    while process.stdout.readline() != "in a step\n":
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "\n" and "stopping" in process.stderr.readline()
    if times == 2:
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=50)
    assert process.returncode == code and not err, err
    assert ("To go on" in out) == Path("log/last.pt").exists() == (times == 1)

def test_ctrl_c_before_training():
    """Nothing is lost by it, and it leaves no traceback."""
    process = start(patch="""
import fineweb, time
fineweb.stdlib_corpus = lambda: (print("making the corpus", flush=True), time.sleep(60))
""")
    assert process.stdout.readline() == "making the corpus\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=50) == ("", "") and process.returncode == -signal.SIGINT

def test_head_1_is_quiet(small):
    """The program that reads what is printed may end first."""
    process = start(*small, "--num_iterations=10000")
    assert process.stdout.readline().startswith("model d12")
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(timeout=100) == 1

def test_a_poor_terminal_and_no_docstrings(small):
    """A terminal that cannot show a character, and python -OO, which drops docstrings."""
    main(small)
    done = run("--sample=log/last.pt", "--prompt=a→b", "--device=cpu", python=["-OO"],
               PYTHONIOENCODING="latin-1:strict")
    assert done.stdout.startswith("a?b") and done.stderr == ""

def test_two_processes_train_as_one(small):
    """The same losses to rounding, and gradients meet once a step, not in every micro-batch."""
    small += ["--optimizer=adamw", "--batch_size=2", "--learning_rate=1e-3"]
    main([*small, "--output_dir=one"])
    Path("counting.py").write_text(f"""
import sys; sys.path.insert(0, {str(Path(SCRIPT).parent)!r})
import train_gpt2
meetings = []
class Counting(train_gpt2.nn.parallel.DistributedDataParallel):
    def forward(self, *args):
        meetings.append(self.require_backward_grad_sync)
        return super().forward(*args)
train_gpt2.nn.parallel.DistributedDataParallel = Counting
train_gpt2.main(sys.argv[1:])
train_gpt2.print0(f"{{meetings == 6 * [False, False, False, True]}}, they met")
""")
    done = torchrun(2, *small, script="counting.py")
    for kind in "trl", "tel", r"trl:\S+ lr:\S+ norm":
        assert log_of("log", kind) == pytest.approx(log_of("one", kind), rel=1e-3)
    assert "True, they met" in done.stdout

def test_one_process_begins_and_two_go_on(small, monkeypatch):
    """With Muon: losses and weights are those of one process alone, to rounding."""
    small += ["--batch_size=4", "--num_iterations=8"]
    main([*small, "--output_dir=straight"])
    crash(small, monkeypatch, when=4)
    done = torchrun(2, *small, "--resume")
    assert done.stdout.count("resuming log at step 3") == 1
    for kind in "trl", "tel":
        assert log_of("log", kind) == pytest.approx(log_of("straight", kind), rel=1e-3)
    straight = load("straight/last.pt")["model"]
    for name, w in load("log/last.pt")["model"].items():
        assert torch.allclose(w, straight[name], atol=1e-3), name

def test_a_killed_process_ends_the_other(small):
    """In one line, where it would otherwise wait forever, or print a page."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    small += ["--num_iterations=100000", "--val_loss_every=0"]
    both = [start(*small, WORLD_SIZE="2", RANK=rank, LOCAL_RANK=rank, MASTER_ADDR="127.0.0.1",
                  MASTER_PORT=port) for rank in "01"]
    deadline = time.time() + 120
    while not Path("log/main.log").exists():
        assert time.time() < deadline and both[0].poll() is None and both[1].poll() is None
        time.sleep(0.02)
    both[1].kill()
    _, err = both[0].communicate(timeout=100)
    assert both[0].returncode == 1 and err.startswith("error: another process ended")
    assert "--resume" in err and err.count("\n") == 1

# -------------------------------------------------------------------------------------------------
# 8. fineweb.py: from text to shards

fineweb_fails = functools.partial(fails, main=fineweb.main)

def start_fineweb(*argv, setup="", **kwargs):
    """The script in a process of its own; `setup` is code that runs before, to change constants."""
    script = Path(fineweb.__file__).resolve()
    code = f"import runpy, sys; sys.path.insert(0, {str(script.parent)!r}); "
    code += f"import fineweb; {setup}; fineweb.main(sys.argv[1:])"
    command = ["-c", code] if setup else [str(script)]
    return subprocess.Popen([sys.executable, *command, *argv], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **kwargs)

def run_fineweb(*argv, **kwargs):
    """(exit code, stdout, last line of stderr): before it come progress bars and warnings."""
    process = start_fineweb(*argv, **kwargs)
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in err, err
    return process.returncode, out, (err.splitlines() or [""])[-1]

def read_shard(path):
    assert fineweb.count_tokens(path) > 0
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
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({"text": texts}), path, **kwargs)

TEXTS = ["plain words, and more of them\n", "<|endoftext|> is only a word here<|endoftext|>", "",
         "naïve 🙂 中文 \u0301\r\n\ttab   spaces   ", " ", "\n\n\n a\n\nb \n", "it's we'll " * 30,
         "def f(x):\n    return x**2\n" * 20, "a" * 300, " \u3000\u00a0\u2028 x\x1cy"]

def numbered(n):
    """n documents, all different."""
    return [f"{i}: {TEXTS[i % len(TEXTS)]}" for i in range(n)]

def documents_in(bpe, folder, split):
    """The documents of a folder's shards, decoded. Every shard but the last must be full."""
    shards = [read_shard(path) for path in sorted(Path(folder).glob(f"*_{split}_*.bin"))]
    assert all(len(shard) == fineweb.SHARD_TOKENS for shard in shards[:-1])
    ids = np.concatenate(shards)
    assert ids[0] == 50256
    return [bpe.decode(part[1:]) for part in np.split(ids, np.flatnonzero(ids == 50256)[1:])]

def test_shard_format():
    """llm.c's header, whose fourth integer names the vocabulary, and two bytes a token."""
    fineweb.write_shard("a.bin", np.array([50256, 464, 3797]))
    fineweb.write_shard("b.bin", [256, 97], vocab_size=257)
    header = np.zeros(256, "<i4")
    header[:3] = [20240520, 1, 3]
    assert Path("a.bin").read_bytes() == header.tobytes() + bytes.fromhex("50c4d001d50e")
    header[2:4] = [2, 257]
    assert Path("b.bin").read_bytes() == header.tobytes() + bytes.fromhex("00016100")
    assert sorted(os.listdir()) == ["a.bin", "b.bin"]

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
    folder = Path(pattern).parent
    train, val = folder / "stdlib_train_000001.bin", folder / "stdlib_val_000000.bin"
    assert sorted(Path().glob(pattern)) == [train]
    ids = {path: read_shard(path) for path in (train, val)}
    for path in ids:
        assert ids[path][0] == 256 == ids[path].max() and np.fromfile(path, "<i4", 4)[3] == 257
    assert 0.01 < len(ids[val]) / len(ids[train]) < 0.06
    source = Path(json.__file__).read_bytes()
    assert source in ids[train].astype(np.uint8).tobytes()
    before = train.stat().st_mtime_ns
    assert fineweb.stdlib_corpus() == pattern and train.stat().st_mtime_ns == before

def test_your_own_text_in_every_format(bpe, monkeypatch, capsys):
    """.txt, .jsonl and .parquet, packed, in folders: every document comes back, in its order."""
    monkeypatch.setattr(fineweb, "SHARD_TOKENS", 1000)
    for i, text in enumerate(TEXTS):
        Path("in/books").mkdir(parents=True, exist_ok=True)
        Path(f"in/books/{i}.txt").write_bytes(text.encode())
    Path("in/books/ignored.md").write_text("not one of the kinds")
    Path("in/c.txt.gz").write_bytes(gzip.compress(TEXTS[3].encode()))
    lines = [json.dumps({"text": text}, ensure_ascii=i % 2) for i, text in enumerate(numbered(99))]
    Path("in/d.jsonl").write_bytes(("\n\n".join(lines) + "\n").encode("utf-8-sig"))
    Path("in/e.jsonl.gz").write_bytes(gzip.compress(b'{"text": "half \\ud83d of one"}'))
    write_parquet("in/f.parquet", numbered(90), row_group_size=7)
    Path("mine").mkdir()
    Path("mine/source.txt").write_text("mine")
    fineweb.main(["--input", "in", "in/c.txt.gz", "--out=mine", "--val_share=0.3"])
    wanted = [*TEXTS, TEXTS[3], *numbered(99), "half ? of one", *numbered(90)]
    val, train = (documents_in(bpe, "mine", split) for split in ("val", "train"))
    assert sorted(val + train) == sorted(wanted)
    for part in (val, train):  # in order: a walk through wanted meets them all
        walk = iter(wanted)
        assert all(text in walk for text in part)
    characters = [sum(map(len, part)) for part in (val, train)]
    assert abs(characters[0] / sum(characters) - 0.3) < 0.05
    assert len(list(Path("mine").glob("text_train_*.bin"))) > 3
    assert Path("mine/source.txt").read_text() == "mine" and not list(Path("mine").glob("*.tmp"))
    assert "--input_bin 'mine/text_train_*.bin'" in capsys.readouterr().out

def test_a_long_text_is_cut_without_changing_its_tokens(bpe, monkeypatch):
    """Whatever the size of the blocks, their tokens are those of the whole text."""
    rng = np.random.default_rng(0)
    text = "".join(rng.choice(list("ab1.!'\"\n\t    é的\u00a0\u3000\x1c\x85🙂sdtlvre"), 5000))
    Path("a.txt").write_text(text, newline="")
    for size in (2, 3, 10, 64, 10000):
        monkeypatch.setattr(fineweb, "BLOCK", size)
        blocks = list(fineweb.read_files([Path("a.txt")]))
        assert "".join(block for _, block in blocks) == text and (len(blocks) > 20) == (size < 100)
        assert [begins for begins, _ in blocks] == [True] + [False] * (len(blocks) - 1)
        assert sum((bpe.encode_ordinary(block) for _, block in blocks), []) == \
            bpe.encode_ordinary(text)

def test_one_book_gives_training_and_validation(bpe, capsys):
    """A single .txt is divided, and the command that is printed asks for no more than it has."""
    Path("book.txt").write_text("".join(f"{i} is a number. " for i in range(20_000)))
    fineweb.main(["--input", "book.txt", "--out=o"])
    train, val = read_shard("o/text_train_000001.bin"), read_shard("o/text_val_000000.bin")
    assert train[0] == val[0] == 50256 and len(val) < 0.3 * len(train)
    batch, steps = map(int, re.search(r"--total_batch_size (\d+) --num_iterations (\d+)",
                                      capsys.readouterr().out).groups())
    assert batch % 1024 == 0 and 4 < len(train) / batch and 3.5 < steps * batch / len(train) <= 4

PARQUET = b"PAR1 and then nothing"
DEEP = b'{"text": ' + b"[" * 50_000

@pytest.mark.parametrize("name, content, messages", [
    ("bad.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', ["row 3"]),
    ("bad.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', ["row 2", '"text"']),
    ("bad.jsonl", b'{"text": "a"}\n{"text": null}\n', ["row 2", '"text"']),
    ("bad.jsonl", b'["a"]\n', ["row 1"]),
    ("bad.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}', ["row 2", "utf-8"]),
    ("bad.jsonl", b'{"text": "a"}\n' + DEEP, ["row 2", "recursion"]),
    ("bad.txt", b"caf\xe9 in another encoding", ["utf-8"]),
    ("bad.txt.gz", gzip.compress(b"a" * 1000)[:-20], ["ended"]),
    ("bad.txt.gz", b"no gzip at all", ["gzip"]),
    ("bad.jsonl.gz", gzip.compress(bytes(range(256)) * 99)[:40] + b"?" * 40, ["decompress"]),
    ("bad.parquet", PARQUET, ["Parquet"]),
    ("bad.md", b"words", [".jsonl"]),
    ("bad.txt", None, ["no file"]),
    ("empty", None, ["no file"]),
])
def test_bad_input(name, content, messages, bpe, capsys):
    """Each is one line that names the file; no shard and nothing half done is left."""
    if content is PARQUET:
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    Path("a.txt").write_text("good")
    Path("empty").mkdir()
    if content is not None:
        Path(name).write_bytes(content)
    fineweb_fails(["--input", "a.txt", name, "--out=mine"], capsys, name, *messages)
    assert not list(Path().rglob("*.bin")) and not list(Path().rglob("*.tmp"))

def test_a_damaged_parquet_file_is_named_itself(bpe, capsys):
    """Wherever its bytes are wrong, the message names the file and not the output's folder."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    write_parquet("a.parquet", numbered(2000), compression="zstd", row_group_size=500)
    write_parquet("b.parquet", [None])
    write_parquet("c.parquet", ["x"])
    whole = Path("a.parquet").read_bytes()
    pyarrow.parquet.write_table(pyarrow.table({"words": ["a"]}), "c.parquet")
    for name in ("b.parquet", "c.parquet"):
        fineweb_fails(["--input", name, "--out=mine"], capsys, f"error: {name}, row 1", '"text"')
    named = 0
    for i in range(20):
        start = len(whole) * i // 20
        Path("a.parquet").write_bytes(whole[:start] + bytes(40) + whole[start + 40:])
        try:
            list(fineweb.read_files([Path("a.parquet")]))
        except SystemExit as e:
            assert e.code.startswith("error: a.parquet, row ")
            named += 1
    assert named > 10

def test_bad_ways_to_call_fineweb(bpe, capsys, monkeypatch):
    Path("a.txt").write_text("too little")
    Path("b.txt").write_text("too little " * 2000)
    write_parquet("b.parquet", ["x"])
    for argv, *messages in (
            (["--input", "a.txt"], "--out"), (["--val_share=1"], "--val_share"),
            (["--input", "a.txt", "--out=o", "--tokenize"], "--tokenize"),
            (["--shards=0"], "--shards"), (["-v=1T"], "1T"), (["--colour=red"], "--colour"),
            (["--input", "a" * 5000, "--out=o"], "--input"),
            (["-t=edu", "-v=100B"], "--tokenize"),
            (["--input", "a.txt", "--out=o", "--shards=1000000000"], "--shards"),
            (["--input", "a.txt", "b.txt", "--out=p"], "too small")):
        fineweb_fails(argv, capsys, *messages)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    fineweb_fails(["--input", "b.parquet", "--out=q"], capsys, "b.parquet", "pip install pyarrow")
    monkeypatch.setattr("tiktoken_ext.openai_public.gpt2", lambda: os.stat("no vocabulary"))
    fineweb_fails(["--input", "b.txt", "--out=r"], capsys, "no vocabulary", "TIKTOKEN_CACHE_DIR")

def test_a_folder_belongs_to_one_run(bpe, capsys):
    """Shards that are there are not written over, nor those that another run is making."""
    Path("a.txt").write_text("word " * 40_000)
    argv = ["--input", "a.txt", "--out=mine"]
    Path("mine/tokenizing.tmp").mkdir(parents=True)
    Path("mine/tokenizing.tmp/kept").touch()
    fineweb_fails(argv, capsys, "another run", "remove mine/tokenizing.tmp")
    assert Path("mine/tokenizing.tmp/kept").exists()
    shutil.rmtree("mine/tokenizing.tmp")
    fineweb.main(argv)
    before = {path: path.read_bytes() for path in Path("mine").iterdir()}
    for other in (argv, ["--tokenize", "--out=mine"]):
        fineweb_fails(other, capsys, "mine holds shards already")
    assert {path: path.read_bytes() for path in Path("mine").iterdir()} == before

def test_a_full_disk_is_one_line(bpe):
    """RLIMIT_FSIZE stands for the disk: no file may grow beyond 100 kB."""
    Path("a.txt").write_text("word " * 400_000)
    code, _, err = run_fineweb("--input", "a.txt", "--out=mine", preexec_fn=lambda: (
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))))
    assert code == 1 and err.startswith("error: cannot write to mine") and not os.listdir("mine")

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_tokenizing_leaves_nothing_that_looks_finished(bpe, number, capsys):
    """Ctrl-C cleans up after itself; a killed run leaves a folder that the next one names."""
    Path("a.jsonl").write_text((json.dumps({"text": "word " * 500}) + "\n") * 20_000)
    process = start_fineweb("--input", "a.jsonl", "--out=mine",
                            setup="fineweb.SHARD_TOKENS = 100_000")
    wait_until(lambda: len(list(Path("mine").rglob("*.bin"))) > 2, process)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert not list(Path("mine").glob("*.bin"))
    if number == signal.SIGKILL:
        fineweb_fails(["--input", "a.jsonl", "--out=mine"], capsys, "remove mine/tokenizing.tmp")
    else:
        assert not os.listdir("mine")

def test_pipes_and_ctrl_c_are_quiet(bpe):
    """--help goes through a pipe, a reader that leaves is no error, Ctrl-C is exit code 130."""
    code, out, err = run_fineweb("--help")
    assert code == 0 and "--val_share" in out and not err
    reader, writer = os.pipe()
    os.close(reader)
    env = {**os.environ, "PYTHONUNBUFFERED": ""}  # so that a text waits for the end, as usual
    done = subprocess.run([sys.executable, fineweb.__file__, "--help"], stdout=writer, env=env,
                          stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    assert not done.stderr
    Path("a.jsonl").write_text((json.dumps({"text": "word " * 500}) + "\n") * 20_000)
    process = start_fineweb("--input", "a.jsonl", "--out=mine")
    wait_until(lambda: Path("mine").exists(), process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and not err

def test_fineweb_on_a_poor_terminal(bpe):
    """A terminal that cannot show the folder's name is no reason to end in a traceback."""
    Path("a.txt").write_text("word " * 20_000)
    code, out, _ = run_fineweb("--input", "a.txt", "--out=a→b",
                               env={**os.environ, "PYTHONIOENCODING": "ascii:strict"})
    assert code == 0 and out.startswith("a?b: ")

# -------------------------------------------------------------------------------------------------
# fineweb.py: downloads, from a server that answers as the hub does

COMMIT = "c" * 40

class Hub(http.server.ThreadingHTTPServer):
    """files: {dataset/path: bytes}. faults: {word in "METHOD address": [a fault for each of the
    next requests]}: a status, "cut" (half of the body) or "stall" (half of it, and then nothing).
    log: (method, path, Range, whether a token came)."""
    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.faults = collections.defaultdict(list)
        self.log = []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, *args):
        pass  # a client that hangs up is part of the test

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, code, body=b"", length=None, **headers):
        self.send_response(code)
        length = len(body) if length is None else length
        for name, value in {"Content-Length": length, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            self.wfile.flush()

    def do_GET(self):
        hub = self.server
        token = "Authorization" in self.headers
        hub.log.append((self.command, self.path, self.headers.get("Range"), token))
        line = f"{self.command} {self.path}"
        fault = next((f.pop(0) for word, f in hub.faults.items() if f and word in line), None)
        if isinstance(fault, int):
            return self.answer(fault, b"not now", **({"Retry_After": 0} if fault == 429 else {}))
        if self.path.startswith("/content/"):  # the second host
            body = hub.files[self.path[9:]]
            start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
            headers = {"Content_Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
            code, rest = (206 if start else 200), body[start:]
            if fault:
                self.answer(code, rest[:len(rest) // 2], len(rest), **headers)
                time.sleep(600 if fault == "stall" else 0)
                self.close_connection = True
                return None
            return self.answer(code, rest, **headers)
        match = re.match(r"(?:/api)?/datasets/([\w-]+/[\w-]+)/(\w+)/(.*)", self.path)
        if not match:
            return self.answer(404, b"no such page")
        repo, kind, path = match.groups()
        if kind == "revision":
            return self.answer(200, json.dumps({"id": repo, "sha": COMMIT}).encode())
        if kind == "tree":
            entries = [{"type": "file", "path": name[len(repo) + 1:], "size": len(body),
                        "oid": "0" * 40, "lfs": {"size": len(body), "pointerSize": 1,
                                                 "oid": hashlib.sha256(body).hexdigest()}}
                       for name, body in hub.files.items() if name.startswith(repo + "/")]
            return self.answer(200, json.dumps(entries).encode())
        name = f"{repo}/{path.split('/', 1)[1]}"
        return self.answer(302, Location=f"http://localhost:{hub.server_port}/content/{name}",
                           X_Repo_Commit=COMMIT, X_Linked_Size=len(hub.files[name]),
                           X_Linked_Etag=f'"{hashlib.sha256(hub.files[name]).hexdigest()}"')

    do_HEAD = do_GET

@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The validation shard and two training shards of two datasets, 40 kB each."""
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    rng = np.random.default_rng(0)
    files = {}
    for dataset in ("fineweb10B-gpt2/fineweb", "finewebedu10B-gpt2/finewebedu"):
        for name in ("val_000000", "train_000001", "train_000002"):
            fineweb.write_shard("made", rng.integers(0, 50257, 20_000))
            files[f"kjj0/{dataset}_{name}.bin"] = Path("made").read_bytes()
    Path("made").unlink()
    server = Hub(files)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "*")
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.shutdown()
    server.server_close()

def downloaded(hub, folder="fineweb10B", prefix="fineweb_"):
    """The folder holds the dataset's shards, byte for byte, and beside .cache nothing else."""
    there = {path.name: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()
             and ".cache" not in path.parts}
    return there == {name.split("/")[-1]: body for name, body in hub.files.items()
                     if name.split("/")[-1].startswith(prefix)}

def test_downloaded_shards(hub):
    """They lie where train_gpt2.py looks; again, nothing is fetched; -t edu keeps its names."""
    code, out, err = run_fineweb("--shards=1")
    assert code == 0 and len(list(Path("fineweb10B").glob("*.bin"))) == 2, err
    code, out, err = run_fineweb()
    assert code == 0 and downloaded(hub) and "python train_gpt2.py --model d12 --total" in out, err
    hub.log.clear()
    assert run_fineweb("--shards=2")[0] == 0 and downloaded(hub)
    assert not [path for _, path, _, _ in hub.log if path.startswith("/content/")]
    code, out, err = run_fineweb("-t=edu")
    assert code == 0 and downloaded(hub, "edu_fineweb10B", "finewebedu_"), err
    assert "--input_bin 'edu_fineweb10B/finewebedu_train_*.bin'" in out

@pytest.mark.parametrize("where, fault", [("GET /content/", "cut"), ("GET /content/", 500),
                                          ("GET /content/", 429), ("HEAD /datasets/", 500),
                                          ("HEAD /datasets/", 429), ("GET /api/datasets/", 500)])
def test_faults_on_the_way_change_no_shard(hub, fault, where):
    """What the library does not bear ends in one line, and the same command completes the rest."""
    if fault == "cut":  # the library keeps of a broken answer what it has of 10 MB each
        fineweb.write_shard("made", np.arange(12_000_000) % 50257)
        hub.files["kjj0/fineweb10B-gpt2/fineweb_train_000001.bin"] = Path("made").read_bytes()
        where += "kjj0/fineweb10B-gpt2/fineweb_train_000001"
    hub.faults[where] = [fault]
    code, _, err = run_fineweb()
    if code:
        assert code == 1 and err.startswith("error: kjj0/fineweb10B-gpt2: "), err
        code, _, err = run_fineweb()
    assert code == 0 and downloaded(hub) and not hub.faults[where], err
    ranges = [asked for _, path, asked, _ in hub.log if asked and path.startswith("/content/")]
    assert bool(ranges) == (fault == "cut")

@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_download_can_be_stopped_at_any_moment(hub, number):
    """Half a file has no shard's name, Ctrl-C waits for nothing, and the same command goes on."""
    hub.faults["GET /content/kjj0/fineweb10B-gpt2/fineweb_train_000002"] = ["stall"] * 9
    process = start_fineweb(env={**os.environ, "HF_HUB_DOWNLOAD_TIMEOUT": "600"})
    wait_until(lambda: any("content" in path and "2.bin" in path for _, path, _, _ in hub.log),
               process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -9) and "Trace" not in err
    for path in Path("fineweb10B").glob("*.bin"):
        assert path.read_bytes() == hub.files[f"kjj0/fineweb10B-gpt2/{path.name}"]
    hub.faults.clear()
    assert run_fineweb()[0] == 0 and downloaded(hub)

def test_an_interrupted_download_of_raw_text_can_be_repeated(bpe, hub):
    """Nothing is claimed before the text is there, and no text is fetched for a refusal."""
    write_parquet("made", numbered(200))
    name = "HuggingFaceFW/fineweb/sample/10BT/000_00000.parquet"
    hub.files[name] = Path("made").read_bytes()
    hub.faults[f"GET /content/{name}"] = ["stall"]
    setup = "fineweb.SHARD_TOKENS = 1000"
    process = start_fineweb("--tokenize", "--shards=2", setup=setup)
    wait_until(lambda: any("/content/" in path for _, path, _, _ in hub.log), process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130 and os.listdir("fineweb10B") == ["raw"]
    _, _, err = run_fineweb("--tokenize", "--shards=2", setup=setup)
    assert len(list(Path("fineweb10B").glob("*.bin"))) == 3, err
    hub.log.clear()
    _, _, err = run_fineweb("--tokenize", "--shards=2", setup=setup)
    assert "holds shards already" in err and not hub.log

def test_a_token_stays_with_the_hub(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert run_fineweb()[0] == 0
    seen = {(path.startswith("/content/"), token) for _, path, _, token in hub.log
            if "kjj0" in path}
    assert seen == {(False, True), (True, False)}

def test_what_is_not_the_hubs_is_not_replaced(hub):
    """Somebody's own shard stays; a damaged one, which the hub vouches for, is named."""
    Path("fineweb10B").mkdir()
    own = Path("fineweb10B/fineweb_train_000001.bin")
    fineweb.write_shard(own, [50256, 1, 2])
    before = own.read_bytes()
    code, _, err = run_fineweb("--shards=1")
    assert code == 1 and f"{own} is not the hub's file" in err and own.read_bytes() == before
    own.unlink()
    name = "kjj0/fineweb10B-gpt2/fineweb_train_000001.bin"
    hub.files[name] = hub.files[name][:-2]
    code, _, err = run_fineweb("--shards=1")
    assert code == 1 and f"{own} is damaged" in err and "remove it" in err

def test_errors_of_the_hub_are_one_line(hub, monkeypatch):
    hub.faults["/api/"] = [401] * 9
    code, _, err = run_fineweb()
    assert code == 1 and "401" in err and "HF_TOKEN" in err
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in run_fineweb()[2]
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
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
    ids = np.array([i for text in texts for i in (50256, *bpe.encode_ordinary(text))])
    wanted = {f"fineweb_{'train' if i else 'val'}_{i:06d}.bin": ids[1000 * i:1000 * (i + 1)]
              for i in range(-(-len(ids) // 1000))}
    for cores in (1, 3):
        setup = f"fineweb.SHARD_TOKENS = 1000; import os; os.cpu_count = lambda: {cores}"
        _, _, err = run_fineweb("--tokenize", f"--out=all{cores}", setup=setup)
        assert "too small" in err, err  # no 1,024 tokens in a row, but they are made
        made = {path.name: read_shard(path) for path in Path(f"all{cores}").glob("*.bin")}
        assert made.keys() == wanted.keys()
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
    fineweb.main(["--input", str(path), "--out=o"])
    made = documents_in(bpe, "o", "val") + documents_in(bpe, "o", "train")
    assert sorted(made) == sorted(parquet.read_table(path, columns=["text"])["text"].to_pylist())

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
        with torch.no_grad():
            self.lm_head.weight.mul_(20)
            self.lm_head.bias[vocab_size:] = 1000

    def features(self, idx):
        assert idx.size(1) <= self.config.block_size
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

def score(*flags):
    hellaswag.main(["-m", "model.pt", "--device=cpu", *flags])

def score_fails(*flags):
    """The one line, beginning with "error:", with which the command must end."""
    with pytest.raises(SystemExit) as e:
        score(*flags)
    assert e.value.code.startswith("error: ") and "\n" not in e.value.code
    return e.value.code

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

@pytest.mark.parametrize("tokens, batches", [(1, 160), (300, None), (99999, 1)])
def test_batches_do_not_change_the_scores(tokens, batches, monkeypatch):
    """Neither the rows that share a batch nor the zeros behind short ones show in the scores."""
    monkeypatch.setattr(hellaswag, "TOKENS_PER_BATCH", tokens)
    model = SmallModel()
    items = [hellaswag.encode_question(q, encode_bytes, 96) for q in made_questions(40)]
    calls = []
    ours = hellaswag.log_probs(model, items, contextlib.nullcontext, lambda *n: calls.append(n))
    assert np.abs(ours - plain_log_probs(model, items)).max() < 1e-3 and ours.std() > 10
    assert calls[-1] == (160, 160) and len(calls) == (batches or len(calls))

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
    assert hellaswag.accuracy(logp, items) == (0.5, 1.0)
    assert hellaswag.right_answers(logp[:1], items[:1]) == (0, 1)
    assert hellaswag.right_answers(logp[1:], items[1:]) == (1, 1)
    nothing = hellaswag.log_probs(SmallModel(), [], contextlib.nullcontext)
    assert hellaswag.right_answers(nothing, []) == (0, 0)
    assert hellaswag.right_answers(np.full((2, 4), np.nan), items) == (0, 0)
    assert np.allclose(hellaswag.interval(0.2955, 10042), (0.2866, 0.3045), atol=1e-4)

def test_the_command(stub, capsys):
    """Prints examples, both scores of the questions asked for, and what they are compared with."""
    questions = made_questions(40)
    write_questions("q.jsonl", questions)
    score("--data=q.jsonl", "--limit=30", "--examples=2")
    out = capsys.readouterr().out
    items = [hellaswag.encode_question(q, encode_bytes, 96) for q in questions[:30]]
    acc, acc_norm = hellaswag.accuracy(plain_log_probs(stub.model, items), items)
    assert f"acc       {acc:.4f} (" in out and f"acc_norm  {acc_norm:.4f} (" in out
    assert questions[1]["ctx"] in out and questions[2]["ctx"] not in out
    assert out.count(" right ") == 2 and out.count(" chosen") == 2 and "0.2955" in out
    score("--data=q.jsonl", "--harness", "--examples=1")
    out = capsys.readouterr().out
    assert f"Doing: {questions[0]['ctx_a']} Then" in out and "0.3114" in out

def test_no_score_without_numbers(stub):
    """A model whose weights are nan picks ending 0 always, which would be right in a quarter."""
    write_questions("q.jsonl", made_questions(8))
    with torch.no_grad():
        stub.model.wte.weight.fill_(float("nan"))
    assert "model.pt has no score" in score_fails("--data=q.jsonl")

GOOD = dict(ctx="a", endings=["b", "c", "d", "e"], label=1)
BAD_TEXTS = [dict(ctx=" "), dict(ctx=["a"]), dict(ctx="\ud800"), dict(ctx=None)]
BAD_ENDINGS = ["bcde", ["b", "c", "d"], ["b", "c", "d", 5], ["b", "c", "d", " "], ["\ud800"] * 4]
BAD_LABELS = [4, -1, 1.7, float("inf"), None, True]
BAD = BAD_TEXTS + [dict(endings=x) for x in BAD_ENDINGS] + [dict(label=x) for x in BAD_LABELS]
BAD_LINES = [b"not json", b'["a"]', b'"ctx"', b"[" * 50000, b'{"ctx": "\xff"}']
BAD_LINES += [json.dumps({**GOOD, **change}).encode() for change in BAD]

@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named(line, stub):
    """One line with the line's number, and no advice to remove a file of the user's."""
    Path("q.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n\n" + line + b"\n")
    message = score_fails("--data=q.jsonl")
    assert "q.jsonl, line 3 " in message and "remove" not in message

def test_bad_calls(stub):
    """Wrong flags and files end in one line; --harness does not do with ctx alone."""
    assert "nowhere.jsonl" in score_fails("--data=nowhere.jsonl")
    Path("q.jsonl").write_text("\n")
    assert "has 0 questions" in score_fails("--data=q.jsonl")
    write_questions("q.jsonl", [dict(GOOD, activity_label="Doing", ctx_b="")])
    score("--data=q.jsonl")
    assert "q.jsonl, line 1 " in score_fails("--data=q.jsonl", "--harness")
    assert "--limit 0" in score_fails("--data=q.jsonl", "--limit=0")
    assert "--no_such_flag" in score_fails("--no_such_flag")

class QuestionServer(http.server.BaseHTTPRequestHandler):
    """Has server.body, and first gives the answers in server.faults: a status, or "cut"."""

    def do_GET(self):
        self.server.requests += 1
        fault = self.server.faults.pop(0) if self.server.faults else 200
        body = self.server.body
        self.send_response(200 if fault == "cut" else fault)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:len(body) // 2] if fault == "cut" else body)

    def log_message(self, *args):
        pass

def test_the_questions_are_downloaded_once(stub, monkeypatch):
    """What fails leaves no file behind, what is there is not fetched again, and a downloaded file
    that is not whole may be removed."""
    write_questions("source.jsonl", made_questions(20))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), QuestionServer)
    server.requests, server.faults, server.body = 0, ["cut", 503], Path("source.jsonl").read_bytes()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(hellaswag, "DATA_URL", f"http://127.0.0.1:{server.server_port}/q.jsonl")
    monkeypatch.setattr(hellaswag, "SIZE", 20)
    for word in ("IncompleteRead", "503"):
        assert word in score_fails()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *paths: Path("no such file").stat())
        assert "cannot be had" in score_fails()
    assert not list(Path().glob("hellaswag/*"))
    score()
    score()
    assert server.requests == 4 and hellaswag.DATA.read_bytes() == server.body
    server.shutdown()
    server.server_close()
    write_questions(hellaswag.DATA, made_questions(19))
    message = score_fails()
    assert "19 questions" in message and "remove the file" in message
    hellaswag.DATA.write_text("<html>sign in</html>")
    assert "line 1 " in score_fails() and "remove the file" in score_fails()
    hellaswag.DATA.unlink()
    assert "cannot be had" in score_fails()
    hellaswag.DATA.parent.rmdir()
    Path("hellaswag").write_text("a file where the folder should be")
    assert "cannot be had" in score_fails()

@pytest.mark.parametrize("event", ['os.kill(os.getpid(), signal.SIGINT)', 'print("text" * 99999)'],
                         ids=["Ctrl-C", "a reader that leaves"])
def test_an_end_without_a_traceback(event):
    """Ctrl-C, and output to a program that has ended (| head), end the command quietly. In its own
    folder it imports a train_gpt2.py in which this happens."""
    write_questions("q.jsonl", made_questions(4))
    shutil.copy(hellaswag.__file__, "hellaswag.py")
    names = "load_model, load_tokenizer, pick_autocast, pick_device"
    code = f"import os, signal\ndef stop(*args):\n    {event}\n{names} = 4 * [stop]\n"
    Path("train_gpt2.py").write_text(code)
    command = [sys.executable, "hellaswag.py", "-m", "model.pt", "--data=q.jsonl"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode < 0

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
# 10. The bridge to transformers

# what can be exported: tiny (bytes, QK-norm), a shrunk d12 (with and without), and GPT-2
EXPORTS = {
    "tiny": {"vocab_size": 257},
    "d12": {"vocab_size": 50257},
    "d12-no-qk_norm": {"vocab_size": 50257, "qk_norm": False},
    "gpt2": {"vocab_size": 50257, "n_kv_head": 4, **train_gpt2.GPT2},
}

@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed")

@pytest.fixture
def gpt2_vocabulary():
    try:
        return train_gpt2.load_tokenizer("gpt2")
    except (SystemExit, ImportError) as e:
        pytest.skip(f"GPT-2's vocabulary is not here: {e}")

def shake(model):
    """Moves every weight from where it starts, so that no gain is 1 and no bias 0."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()

def write_checkpoint(path, **changes):
    """A small random model, stored as a run stores it."""
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 64, "vocab_size": 257}
    model = shake(train_gpt2.GPT(train_gpt2.GPTConfig(**shape | changes)))
    tokenizer = {257: "bytes", 50257: "gpt2"}[model.config.vocab_size]
    config = dataclasses.asdict(model.config)
    state = {"config": config, "model": model.state_dict(), "tokenizer": tokenizer}
    train_gpt2.save_checkpoint(path, state | {"step": 7, "val_loss": 4.5})
    return model

@pytest.fixture(params=EXPORTS)
def exported(request, transformers, tmp_path):
    """Our model; the same as transformers opens it; its tokenizer there; our name of the latter."""
    if request.param != "tiny":
        request.getfixturevalue("gpt2_vocabulary")
    model = write_checkpoint(tmp_path / "best.pt", **EXPORTS[request.param])
    assert train_gpt2.main(["--export", "best.pt", "out"]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained("out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    return model, theirs, tokenizer, "bytes" if request.param == "tiny" else "gpt2"

def hub_gpt2(transformers, folder):
    """A small random model of transformers where from_openai() finds it in place of OpenAI's."""
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4)
    theirs = shake(transformers.GPT2LMHeadModel(config))
    theirs.save_pretrained(folder)
    return theirs

@torch.no_grad()
def differ(ours, theirs):
    """The largest difference between two models' logits, on random ids of the real vocabulary."""
    V = ours.config.vocab_size
    idx = torch.randint(0, V, (3, 48))
    logits = ours(idx)[..., :V]
    assert logits.std() > 0.5  # there is something to compare
    return (logits - theirs(idx).logits).abs().max().item()

def test_exported_models_are_the_same_elsewhere(exported):
    """The same logits and the same greedy text, in classes that transformers has of its own."""
    model, theirs, _, _ = exported
    assert differ(model, theirs) < 1e-4
    prompt = torch.randint(0, 256, (1, 5))
    ours = list(train_gpt2.generate(model, prompt[0].tolist(), 30, temperature=0))
    text = theirs.generate(prompt, max_new_tokens=len(ours), do_sample=False)
    assert len(ours) > 3
    assert text[0, 5:].tolist() == ours
    # nothing is stored twice, the padding not at all, and no code comes along
    padding = len(model.lm_head.weight) - model.config.vocab_size
    assert theirs.num_parameters() == model.num_params()[0] - padding * model.config.n_embd
    assert "auto_map" not in Path("out/config.json").read_text()

def test_a_batch_with_padding_gives_what_each_prompt_gives_alone(exported):
    """Fails without a pad token, or if the tokenizer hands the model more than ids and mask."""
    _, theirs, tokenizer, _ = exported
    prompts = ["<|endoftext|>def f(x):", "Hello"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    assert set(batch) == {"input_ids", "attention_mask"}
    together = theirs.generate(**batch, max_new_tokens=10, do_sample=False)
    for i, prompt in enumerate(prompts):
        alone = tokenizer(prompt, return_tensors="pt")
        text = theirs.generate(**alone, max_new_tokens=10, do_sample=False)[0]
        new = text[alone["input_ids"].size(1) :].tolist()
        # where this text ended and the other goes on there is padding
        assert together[i, batch["input_ids"].size(1) :].tolist()[: len(new)] == new

def test_exported_tokenizers_agree_with_ours(exported):
    """Ids to the letter, and the same text back, for 200 strings of all that is hard."""
    model, _, tokenizer, name = exported
    encode, _ = train_gpt2.load_tokenizer(name)
    end_of_text = fineweb.VOCAB_SIZE[name] - 1
    parts = ["hello", " world", "   ", "\n\n", "\t", "naïve", "\u4e2d\u6587", "\U0001f642\u200d"]
    parts += ["it's", "'LL", "1234567", "\u00a0", "...!?", "def f(x):\n        return", " \u3000 "]
    parts += ["\r\n", "a" * 50, "\x00\x7f", "\ufb01", "\u0639\u0631", "<|endoftext|>", "-" * 99]
    rng = np.random.default_rng(0)
    for _ in range(200):
        text = "".join(rng.choice(parts, rng.integers(1, 8)))
        ids = []
        for i, piece in enumerate(text.split("<|endoftext|>")):
            ids += [end_of_text] * (i > 0) + encode(piece)
        assert tokenizer(text)["input_ids"] == ids, text
        assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == end_of_text == len(tokenizer) - 1
    assert tokenizer.model_max_length == model.config.block_size

def test_what_stands_in_an_exported_folder(exported):
    """What other programs than transformers read there."""
    model, _, _, name = exported
    config = json.loads(Path("out/config.json").read_text())
    end_of_text = model.config.vocab_size - 1
    assert config["pad_token_id"] == config["eos_token_id"] == end_of_text
    assert config["dtype"] == "float32"
    generation = json.loads(Path("out/generation_config.json").read_text())
    assert generation["pad_token_id"] == generation["eos_token_id"] == end_of_text
    # transformers 4 has no TokenizersBackend, which transformers 5 would write here
    tokenizer = json.loads(Path("out/tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    weights = pytest.importorskip("safetensors.torch").load_file("out/model.safetensors")
    if config["model_type"] == "gpt2":
        # llama.cpp and mlx-lm
        assert config["n_ctx"] == config["n_positions"] == model.config.block_size
        assert config["resid_pdrop"] == config["embd_pdrop"] == config["attn_pdrop"] == 0
        assert "wte.weight" in weights and "h.0.attn.c_attn.bias" in weights
    else:
        assert config["rope_theta"] == 10000
        assert "model.layers.0.self_attn.q_proj.weight" in weights
    readable = {oct(path.stat().st_mode) for path in Path("out").iterdir()}
    assert len(readable) == 1, "some files are private"
    card = Path("out/README.md").read_text()
    assert card.startswith("---\nlicense: mit\nlibrary_name: transformers\n")
    assert "7 steps" in card and "4.5000" in card and "Begin a prompt with `<|endoftext|>`" in card
    assert ("HuggingFaceFW/fineweb" in card) == (name == "gpt2")

def test_a_folder_appears_only_when_it_is_whole(transformers, gpt2_vocabulary):
    """A full disk is one line, and leaves nothing; a folder that is there is left alone."""
    write_checkpoint(Path("best.pt"), **EXPORTS["d12"])
    before = set(Path().iterdir())
    # no file may become longer than this, as if the disk were full then: config.json always fits,
    # the vocabulary of 6.2 MB only the second time, and the weights of 6.4 MB never
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (10_000, 6_350_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(SystemExit, match="error: out is not written"):
                train_gpt2.main(["--export", "best.pt", "out"])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert set(Path().iterdir()) == before
    Path("out").mkdir()
    Path("out/mine").write_text("mine")
    with pytest.raises(SystemExit, match="out is there already"):
        train_gpt2.main(["--export", "best.pt", "out"])
    assert os.listdir("out") == ["mine"]

def test_what_cannot_be_exported(transformers, monkeypatch):
    """Switches that no architecture has together; no checkpoint; no transformers."""
    for mixed in ({"norm": "layernorm"}, {**train_gpt2.GPT2, "qk_norm": True}, train_gpt2.GPT2):
        write_checkpoint(Path("best.pt"), **mixed)
        with pytest.raises(SystemExit, match="error: only the variant and --arch gpt2"):
            train_gpt2.main(["--export", "best.pt", "out"])
    with pytest.raises(SystemExit, match="error: nowhere.pt"):
        train_gpt2.main(["--export", "nowhere.pt", "out"])
    monkeypatch.setitem(sys.modules, "transformers", None)
    for command in (["--export", "best.pt", "out"], ["--sample", "gpt2"]):
        with pytest.raises(SystemExit, match="error.*pip install transformers"):
            train_gpt2.main(command)
    assert not Path("out").exists()

def test_openai_weights(transformers):
    """OpenAI's layout (merged, transposed, 50,257 rows) comes in with the same logits."""
    theirs = hub_gpt2(transformers, "openai-community/gpt2")
    ours, tokenizer = train_gpt2.load_model("gpt2", torch.device("cpu"))
    assert tokenizer == "gpt2"
    assert differ(ours, theirs) < 1e-4
    # a shorter memory is the first positions of the long one, and there is no longer one
    assert differ(train_gpt2.from_openai("gpt2", 48), theirs) < 1e-4
    with pytest.raises(SystemExit, match="error: gpt2 .*1024.*--sequence_length"):
        train_gpt2.from_openai("gpt2", 1025)

def test_export_and_import_are_inverse(transformers, gpt2_vocabulary):
    """Out by export() and in by from_openai(): the very same weights."""
    model = write_checkpoint(Path("best.pt"), **EXPORTS["gpt2"])
    train_gpt2.main(["--export", "best.pt", "openai-community/gpt2"])
    again = train_gpt2.from_openai("gpt2", 64)
    idx = torch.randint(0, 50257, (2, 64))
    assert again.config == model.config
    assert torch.equal(again(idx), model(idx))

@pytest.mark.parametrize("damage", ["no network", "half a file", "no json"])
def test_openai_weights_that_do_not_arrive(damage, transformers, monkeypatch):
    """One line, whatever it is."""
    if damage == "no network":
        # a process of its own, since these are read when the package is imported
        empty = os.path.abspath("empty")
        done = run("--sample", "gpt2", code=1, HF_HUB_OFFLINE="1", HF_HOME=empty)
        assert "Traceback" not in done.stderr
        message = done.stderr.splitlines()[-1]
    else:
        hub_gpt2(transformers, "openai-community/gpt2")
        name = {"half a file": "model.safetensors", "no json": "config.json"}[damage]
        path = Path("openai-community/gpt2") / name
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(SystemExit) as e:
            train_gpt2.main(["--sample", "gpt2"])
        message = str(e.value)
    assert message.startswith("error: cannot load openai-community/gpt2") and "\n" not in message

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

def test_links_lead_somewhere():
    """To a file, a heading, an address further down; `Names` in brackets are train_gpt2.py's."""
    for document in README, REPORT:
        text = document.read_text("utf-8")
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
            path, _, anchor = link.partition("#")
            assert (document.parent / path).exists(), link
            headings = re.findall(r"^#+ (.*)$", text.lower(), re.M)
            anchors = [re.sub(r"[^\w -]", "", line).replace(" ", "-") for line in headings]
            assert not anchor or anchor in anchors, link
        addresses = set(re.findall(r"^\[(\w+)\]: http", text, re.M))
        assert set(re.findall(r"\]\[(\w+)\]", text)) == addresses
    assert set(re.findall(r"!\[.*\]\((\S+)\)", text)) == set(plot.FIGURES)
    names = re.findall(r"\w+", " ".join(re.findall(r"\(((?:`\w+`(?:, )?)+)\)", text)))
    assert names and [name for name in names if not hasattr(train_gpt2, name)] == []

def commands():
    """(script, arguments) of the commands in both READMEs and in the scripts' own headings."""
    for path in [README, REPORT, *ROOT.glob("*.py"), *(ROOT / "report").glob("*.py")]:
        text = path.read_text("utf-8")
        if path.suffix == ".py":
            text = text.split('"""')[1]
        text = re.sub(r"\\\n *", "", text)  # a command that goes on in the next line
        command = r"(?:python|torchrun)\b[^`\n|]*? ([\w./]+\.py)\b([^`\n|&)]*)"
        for script, rest in re.findall(command, text):
            # what stands behind two spaces or # explains it
            yield script, shlex.split(re.split(r"  +|#", rest)[0])

def test_commands_are_understood(monkeypatch):
    """The script is there, and its parser takes the arguments. (Nothing runs after parsing.)"""
    class Parsed(BaseException):
        pass

    def parse_and_stop(parser, argv):
        raise Parsed(parse(parser, argv))

    parse = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    scripts = {"train_gpt2.py": train_gpt2, "fineweb.py": fineweb, "hellaswag.py": hellaswag}
    scripts |= {f"report/{m.__name__}.py": m for m in (ablation, bench, one_step, plot)}
    seen = set()
    for script, argv in commands():
        if script.startswith("llama.cpp/"):
            continue
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
    groups = sorted(path.name for path in LOGS.iterdir() if path.is_dir())
    assert set(groups) <= set(ablation.GROUPS) and "tiny" in groups
    for group in groups:
        table = ablation.table(LOGS, group)
        assert table.count("\n") > 2 and table in REPORT.read_text("utf-8"), group
    for log in LOGS.glob("*/*/main.log"):
        command, machine, first, *_ = log.read_text("utf-8").splitlines()
        assert command.startswith("# python ") and first.startswith("s:0 tel:"), log
        made = r"# \d{4}-\d\d-\d\d, .*, torch [^ ,]+(, [\d.]+ MFLOP a token)?"
        assert re.fullmatch(made, machine), log
        of_tiny = log.parts[-3].startswith(("tiny", "ideas", "width"))
        assert plot.Run(log.parent).tokens == (2048 if of_tiny else 8192), log

def known_figures():
    """What may stand in bold: the cells of all tables, milliseconds and rates of the benchmarks."""
    known = set()
    for group in (path.name for path in LOGS.iterdir() if path.is_dir()):
        for cell in re.split(r" ?[|\n] ?", ablation.table(LOGS, group)):
            known.add(cell.split(",")[0].replace("%", " %"))
        # single runs, and how far those of the default lie apart
        ends = [curve[-1][1] for curve in ablation.curves(LOGS, group, "today").values()]
        known |= {f"{loss:.3f}" for loss in ends}
        if len(ends) > 1:
            known.add(f"{statistics.stdev(ends):.3f}")
    for log in LOGS.glob("bench*.txt"):
        for table in log.read_text("utf-8").split("\n\n"):
            rows = re.findall(r"^\|.* \| ([\d.]+) \| ([\d,]+) \| [\d.]+ \|", table, re.M)
            for ms, rate in rows:
                known |= {ms, f"{float(ms):,.0f} ms", rate}
                # how much faster than another of the same table
                known |= {f"{float(other) / float(ms):.2f}" for other, _ in rows}
    return known

def bold_figures(text):
    return [bold for bold in re.findall(r"\*\*([^*\n]+)\*\*", text) if re.search(r"\d", bold)]

def test_figures_agree_with_logs():
    """Every figure in bold is in the logs, and the README shows what the default run printed."""
    known = known_figures()
    bold = bold_figures(REPORT.read_text("utf-8"))
    assert len(bold) > 30 and [figure for figure in bold if figure not in known] == []
    readme = README.read_text("utf-8")
    printed = (LOGS / "default_run.txt").read_text("utf-8")
    shown = re.findall(r"^    ((?:model|device|step|done|def) .*)$", readme, re.M)
    assert len(shown) > 5
    assert [line for line in shown if line.removesuffix(" ...") not in printed] == []
    # and the figures that decide, in the list under the heading
    measured = readme.split("## What was measured")[1]
    bold = bold_figures(measured)
    known |= set(re.findall(r"done in (\d+ s)", printed))
    known |= {f"{float(loss):.3f}" for loss in re.findall(r"val loss (\S+)", printed)}
    assert len(bold) > 4 and [figure for figure in bold if figure not in known] == []

def test_ablation_makes_and_keeps_a_run(monkeypatch, small, capsys):
    """It trains, also under a patch, keeps the log, and does not train again what is there."""
    *flags, input_bin = small
    runs = ["today", "rope_by_head"]
    group = ablation.Group(2, (1, 2), runs, " ".join(flags), warmup="warmup_8")
    monkeypatch.setitem(ablation.GROUPS, "tiny", group)
    command = "tiny --seeds 1 --jobs 1 --logs logs --data".split()
    command.append(input_bin.removeprefix("--input_bin="))
    ablation.main(command)
    logs = {path.parent.name: path.read_text("utf-8") for path in Path("logs").rglob("main.log")}
    heading = "# python report/ablation.py --patched only_losses,warmup_8"
    assert logs["today.1"].startswith(f"{heading} --model=d12")
    assert logs["rope_by_head.1"].startswith(f"{heading},rope_by_head --model=d12")
    losses = [re.findall(r"s:\d tel:(\S+)", text) for text in logs.values()]
    assert len(losses) == len(losses[0]) == 2 and losses[0] != losses[1]
    assert all(re.search(r"^# .*, torch \S+, [\d.]+ MFLOP a token$", text, re.M)
               for text in logs.values())
    out = capsys.readouterr().out
    assert "| RoPE turned by head instead of by time | 2 |" in out and "GPT-2's end" not in out
    # a log of another length is not taken for this run's
    steps = ablation.GROUPS["tiny"].steps
    fails([*command, "--steps=20"], capsys, "2 steps, not 20", "--logs", main=ablation.main)
    assert "--num_iterations=7" in ablation.arguments("tiny", "today_35", 1, None)
    ablation.GROUPS["tiny"].steps = steps
    # other curves in their place: the table is of these, and no run is made again
    for name, curve in ("today", (10, 6, 4)), ("gpt2", (10, 9, 8)), ("adamw", (10, 9, 8.5)):
        Path(f"logs/tiny/{name}.1").mkdir(exist_ok=True)
        lines = [f"s:{step} tel:{loss}\n" for step, loss in enumerate(curve)]
        Path(f"logs/tiny/{name}.1/main.log").write_text("".join(lines))
    ablation.main(command)
    out = capsys.readouterr().out
    assert "| the default | 2 | 4.000 |  | 25% | 1 |" in out  # half a step of two, from 10 to 8
    noise = "one seed, not told apart from noise"
    assert f"| AdamW instead of Muon | 2 | 8.500 | +4.500, {noise} | - | 1 |" in out
    assert f"(AdamW) | 2 | 8.000 | +4.000, {noise} | 100% | 1 |" in out

def test_an_effect_has_to_stand_out():
    """Three seeds or more, and two standard errors or more: else a table calls it noise."""
    assert ablation.difference_in_words([0.1, 0.11, 0.12]) == "+0.110 ± 0.006"
    for differences in [0.1], [0.1, 0.1], [-0.1, 0.11, 0.12]:
        assert ablation.difference_in_words(differences).endswith(", not told apart from noise")

def test_a_trial_knows_its_groups_heads():
    """One key/value head for each query head, whatever the size."""
    for group, n_head in ("tiny", "4"), ("width_512", "16"), ("d12", "12"):
        argv = ablation.arguments(group, "all_heads", 1, None)
        assert argv[argv.index("--n_kv_head") + 1] == n_head

def test_patches_do_what_they_say(monkeypatch):
    for owner, name in (GPT, "__init__"), (GPT, "features"), (train_gpt2, "apply_rope"):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setattr(train_gpt2, "parse_args", train_gpt2.parse_args)
    monkeypatch.setattr(train_gpt2, "rope_tables", train_gpt2.rope_tables)
    wanted = {name for trial in ablation.TRIALS.values() for name in trial.patch.split(",")}
    assert wanted - {""} <= set(ablation.PATCHES)
    turns = [train_gpt2.rope_tables(2, 4)[0][1, 1]]
    ablation.PATCHES["rope_1024"]()
    turns.append(train_gpt2.rope_tables(2, 4)[0][1, 1])
    assert [math.acos(turn) for turn in turns] == pytest.approx([1 / 100, 1 / 32], rel=1e-3)
    for name in "cosine", "bias", "warmup_8":
        ablation.PATCHES[name]()
    args, _ = train_gpt2.parse_args(["--model=d12"])
    assert (args.schedule, args.bias, args.warmup_iters) == ("cosine", True, 8)
    ablation.zero_projections()
    x = torch.randn(1, 3, 32)
    assert torch.equal(tiny_model().transformer.h[0](x, train_gpt2.rope_tables(3, 8)), x)
    ablation.untied_head()
    assert not tiny_model().lm_head.weight.any() and tiny_model().transformer.wte.weight.any()
    for dtype in torch.bfloat16, torch.float32:
        with torch.autocast("cpu", torch.bfloat16):
            assert tiny_model().features(random_ids(2, 5)).dtype == dtype
        ablation.fp32_residual()
    ablation.rope_by_head()
    q = torch.randn(1, 1, 4, 8).expand(1, 5, 4, 8)  # the same four queries at five times
    rotated = train_gpt2.apply_rope(q, *train_gpt2.rope_tables(5, 8))
    assert torch.equal(rotated[:, 0], rotated[:, 4])
    assert not torch.equal(rotated[:, :, 1], q[:, :, 1])

def test_patched_optimizers_do_what_they_say(monkeypatch):
    """One group's rate, Muon's momentum, and decay only where a step goes towards 0 anyway."""
    args = types.SimpleNamespace(optimizer="muon", learning_rate=0.1, weight_decay=0.5)
    make = train_gpt2.make_optimizers
    model = tiny_model()
    table = model.transformer.wte.weight
    matrix = model.transformer.h[0].attn.c_q.weight

    def step(*patches, sign=1.0):
        """Every weight is 1 and every gradient `sign`, and then one step is made."""
        monkeypatch.setattr(train_gpt2, "make_optimizers", make)
        for patch in patches:
            ablation.PATCHES[patch]()
        optimizers = train_gpt2.make_optimizers(model, args, "float32")
        for p in model.parameters():
            p.data.fill_(1)
            p.grad = torch.full_like(p, sign)
        for optimizer in optimizers:
            optimizer.step()
        groups = ablation.optimizer_groups(optimizers)
        return {name: group for name, (_, group) in groups.items()}

    for name in "table_half", "table_twice", "gains_4", "matrices_half", "matrices_twice":
        group, factor = name.split("_")
        rates = {key: value["lr"] / 0.1 for key, value in step(name).items()}
        wanted = {"half": 0.5, "twice": 2, "4": 4}[factor]
        assert rates == pytest.approx({"table": 1, "gains": 1, "matrices": 1} | {group: wanted})
    assert [step(*name)["matrices"]["momentum"] for name in ([], ["warm_momentum"])] == [0.95, 0.85]
    assert [step(*name)["table"]["betas"][0] for name in ([], ["beta_08"])] == [0.9, 0.8]
    for sign, decayed in (1.0, True), (-1.0, False):
        step(sign=sign)
        plain = [p.detach().clone() for p in (table, matrix)]
        step("cautious_decay", sign=sign)
        given_back = [after - before for before, after in zip(plain, (table, matrix), strict=True)]
        wanted = 0.0 if decayed else 0.1 * 0.5  # rate times decay times a weight of 1
        for change in given_back:
            torch.testing.assert_close(change, torch.full_like(change, wanted))

def test_averaged_weights_are_only_looked_at(small, monkeypatch):
    """Validation sees the average; training goes on as if nothing were."""
    logs = []
    for folder in "plain", "averaged":
        with monkeypatch.context() as undo:
            if folder == "averaged":
                for owner, name in (train_gpt2, "train"), (train_gpt2.Run, "validate"):
                    undo.setattr(owner, name, getattr(owner, name))
                ablation.PATCHES["average"]()
            main([*small, "--val_loss_every=4", f"--output_dir={folder}"])
        logs.append(Path(folder, "main.log").read_text("utf-8"))
    without_ms = [re.findall(r"trl:(\S+) lr:(\S+) norm:(\S+)", log) for log in logs]
    assert without_ms[0] == without_ms[1] and len(without_ms[0]) > 4
    plain, averaged = (re.findall(r"s:(\d+) tel:(\S+)", log) for log in logs)
    assert plain[0] == averaged[0] and plain[-1] != averaged[-1]

def test_one_step_is_the_runs_first(small, capsys):
    """What one_step.py shows is what a run does: the loss, the rate and the gradient's norm."""
    main([*small, "--val_loss_every=0"])
    first = Path("log/main.log").read_text("utf-8").splitlines()[0]
    wanted = [float(x) for x in re.findall(r":(\d+\.\S+)", first)[:3]]
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
    assert float(rows[0][3]) == 1
    # four steps (the first, one to warm up, two that count) of two micro-batches, of bytes as ours
    assert sys.modules["peer"].GPT.calls == [((2, 128), (257, 32), False)] * 8
    for spec, *words in (
        ("tiny --arch gpt2 --peer nowhere.py", "--peer nowhere.py", "clone"),
        ("tiny --peer peer.py", "add --arch gpt2"),
        ("tiny --batch_size 3", "16 sequences", "no multiple of 3"),
        ("tiny --batch_size 32", "16 sequences", "no multiple of 32"),
    ):
        fails([spec], capsys, *words, main=bench.main)

def test_plot_cuts_off_only_the_beginning():
    """All losses after the first twentieth of a run are inside the picture, infinite ones aside."""
    Path("run").mkdir()
    lines = ["s:0 tel:11", "s:99 tel:3"]
    lines += ["s:2 trl:10", "s:5 trl:7.5", "s:50 trl:inf", "s:98 trl:2.5"]
    Path("run/main.log").write_text("\n".join(lines))
    limits = []
    nothing = types.SimpleNamespace()
    ax = types.SimpleNamespace(set_ylim=lambda *values: limits.append(values))
    ax.plot = ax.set_xlabel = ax.set_ylabel = lambda *args, **kwargs: nothing
    plot.losses(ax, [plot.Run("run")], "tokens")
    (lowest, highest), = limits
    assert 2 < lowest < 2.5 and 7.5 < highest < 8

def test_plot_counts_operations():
    """Of a run by ablation.py from its heading, of a user's from its last.pt, else not at all."""
    Path("theirs").mkdir()
    Path("theirs/main.log").write_text("s:0 tel:11\n")
    assert plot.Run("theirs").flops is None
    config = GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=257)
    state = {"config": dataclasses.asdict(config), "args": {"total_batch_size": 64}}
    torch.save(state, "theirs/last.pt")
    run = plot.Run("theirs")
    assert run.tokens == 64 and run.flops == GPT(config).flops_per_token(16)
    heading = "# python ablation.py --seed=1\n# 2026-01-01, torch 2, 1,234.5 MFLOP a token"
    Path("theirs/main.log").write_text(f"{heading}\ns:0 tel:11\n")
    assert plot.Run("theirs").flops == 1234.5e6

def test_plot_draws_our_logs_and_llmcs(capsys, monkeypatch):
    """One picture with the tokens, losses and scores of a run of ours and of one of llm.c's."""
    ours = LOGS / "tiny" / "today.1"
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib", None)
        fails([str(ours)], capsys, "pip install matplotlib", main=plot.main)
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    Path("llmc").mkdir()
    # it was resumed: some steps stand there twice, and the last line of a step counts
    Path("llmc/main.log").write_text("s:0 tel:11\ns:0 eval:0.25\ns:250 tel:6.2\ns:500 tel:5\n"
                                     "s:125 tel:8\ns:250 tel:6.1\ns:1 trl:10.9 lr:0.1 norm:9\n")
    run, theirs = plot.Run(ours), plot.Run("llmc")
    assert theirs.tokens == 524288 and theirs.series["tel"] == ([0, 125, 250, 500], [11, 8, 6.1, 5])
    # the first line is of step 0; the next is of ten steps, and its ms those of one of them
    _, ms = run.series["ms"]
    assert run.seconds([0, 1, 2]) == pytest.approx([0, ms[0] / 1000, (ms[0] + ms[1]) / 1000])
    for out in "both.svg", "again.svg":
        plot.main([str(ours), "llmc", "--out", out])
    # one run and two do not write the same file
    shutil.copytree("llmc", "other/llmc")
    plot.main(["llmc/"])
    plot.main(["llmc", "other/llmc"])
    assert {path.name for path in Path().glob("*.svg")} == {
        "both.svg", "again.svg", "llmc.svg", "llmc_other_llmc.svg"
    }
    svg = Path("both.svg").read_text("utf-8")
    for text in ("today.1", "llmc", "million tokens", "seconds of training", "learning rate",
                 "gradient norm", "HellaSwag", "GPT-3 124M"):
        assert text in svg, text
    assert Path("again.svg").read_text("utf-8") == svg  # no date and no random names in it
    fails(["nowhere"], capsys, "nowhere/main.log", "--output_dir", main=plot.main)
    Path("llmc/main.log").write_text("\n")
    fails(["llmc"], capsys, "nothing to draw", main=plot.main)

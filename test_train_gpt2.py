"""
Tests of train_gpt2.py, fineweb.py and hellaswag.py. Run them with: python -m pytest -q

No test needs a GPU, a download or the network. What needs a package or data that a user may not have skips and says so. Runs
are made in the test's own temporary folder, on a byte corpus of a few hundred kilobytes made there.
"""
import argparse
import builtins
import collections
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
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fineweb
import hellaswag
import train_gpt2
from train_gpt2 import DEFAULTS, GPT, GPT2, MODELS, GPTConfig, HeadLoss, TokenLoader, get_lr, main, write_shard

if "TIKTOKEN_CACHE_DIR" in os.environ:  # it may be relative, and every test changes the folder
    os.environ["TIKTOKEN_CACHE_DIR"] = os.path.abspath(os.environ["TIKTOKEN_CACHE_DIR"])
SCRIPT = str(Path(train_gpt2.__file__).resolve())
CPU = torch.device("cpu")
# a model that takes milliseconds; --log_every 1 so that every loss is in main.log
SMALL = ("--n_layer 2 --n_head 4 --n_embd 32 --sequence_length 32 --total_batch_size 512 --warmup_iters 2 --num_iterations 6 "
         "--val_tokens 2048 --val_loss_every 3 --sample_every 0 --save_every 3 --log_every 1 --dtype float32 --device cpu").split()


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder, and leaves signal handlers as it found them."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def corpus(tmp_path):
    """Flags for a learnable corpus of two training shards and a validation shard: arithmetic in words, as bytes."""
    rng = np.random.default_rng(0)
    for name, lines in (("train_1", 2000), ("train_2", 900), ("val", 400)):
        text = "".join(f"{a} plus {b} is {a + b}.\n" for a, b in rng.integers(0, 100, (lines, 2)))
        write_shard(tmp_path / f"{name}.bin", np.concatenate(([256], np.frombuffer(text.encode(), np.uint8))))
    return [f"--input_bin={tmp_path}/train_*.bin", f"--input_val_bin={tmp_path}/val.bin"]


def log_of(folder, kind="trl"):
    """{step: loss} out of a folder's main.log."""
    lines = (Path(folder) / "main.log").read_text().splitlines()
    return {int(s[2:]): float(v.split(":")[1]) for s, v, *_ in map(str.split, lines) if v.startswith(kind)}


def run(*args, env=None, check=True, **kwargs):
    """The script in a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    done = subprocess.run([sys.executable, SCRIPT, *args], capture_output=True, text=True, env=env, timeout=300, **kwargs)
    assert not check or done.returncode == 0, done.stderr
    return done


def torchrun(processes, *args):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", SCRIPT, *args],
                          capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done


def tiny_model(seed=0, **changes):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**dict(n_layer=2, n_head=4, n_embd=32, block_size=32, vocab_size=100), **changes}))


# ---------------------------------------------------------------------------------------------------------------------
# The whole

def test_overfits_a_single_batch(corpus):
    """If model, loss, gradients and optimiser are right, d12 shrunk to 2 layers learns one batch by heart: a loss under
    0.05 within 40 steps, where guessing costs log(257) = 5.5."""
    main(["--model=d12", "--n_layer=2", "--tokenizer=bytes", *corpus, "--overfit_single_batch", "--sequence_length=64",
          "--total_batch_size=256", "--num_iterations=40", "--warmup_iters=5", "--val_loss_every=0", "--sample_every=0",
          "--device=cpu", "--output_dir=log"])
    losses = log_of("log")
    assert losses[0] > 5 and losses[39] < 0.05, losses


def test_default_run_end_to_end():
    """python train_gpt2.py, shortened: what a newcomer sees, what is left behind, and that it can be repeated."""
    short = "--num_iterations=30 --val_loss_every=15 --sample_every=15 --save_every=15 --log_every=5 --max_new_tokens=40".split()
    out = run("--output_dir=log", *short).stdout
    assert re.search(r"model tiny: 4 layers, 4 heads \(2 key/value\), 128 wide \| 828,800 parameters, 787,840 without", out)
    assert re.search(r"device cpu, (float32|bfloat16) \| 2,048 tokens a step", out)
    assert "first step done" in out and out.count("a sample after") == 3
    # console and log agree, line by line
    console = re.findall(r"step +(\d+)/30 \| (val )?loss ([\d.]+)(?: \| lr (\S+) \| norm (\S+) \| (\S+) ms)?", out)
    wanted = [f"s:{s} tel:{loss}" if val else f"s:{s} trl:{loss} lr:{lr} norm:{norm} ms:{ms}" for s, val, loss, lr, norm, ms in console]
    assert Path("log/main.log").read_text().splitlines() == wanted
    assert [s for s, val, *_ in console if val] == ["0", "15", "30"] and len(console) == 3 + 7
    assert float(console[-1][2]) < 3.0 < 5.0 < float(console[0][2])
    # the commands it names at the end
    assert 'python train_gpt2.py --sample log/best.pt --prompt \'def \'' in out
    assert "python fineweb.py" in out and "python train_gpt2.py --model d12" in out
    text = run("--sample=log/best.pt", "--prompt=def ", "--max_new_tokens=20").stdout
    assert text.startswith("def ") and len(text) > 6
    assert run("--sample=log/best.pt", "--prompt=def ", "--max_new_tokens=20").stdout == text  # same seed, same text


# ---------------------------------------------------------------------------------------------------------------------
# The model

@pytest.mark.parametrize("size, everything, blocks", [
    ("tiny", 828_800, 787_840), ("d12", 116_510_976, 77_877_504), ("d24", 329_961_472, 278_450_176),
    ("d36", 719_191_808, 654_802_688), ("d48", 1_560_122_944, 1_479_636_544)])
def test_parameter_counts(size, everything, blocks):
    p = {**DEFAULTS, **MODELS[size]}
    with torch.device("meta"):
        model = GPT(GPTConfig(p["n_layer"], p["n_head"], 0, p["n_embd"], p["sequence_length"],
                              train_gpt2.VOCAB_SIZE[p["tokenizer"]], qk_norm=p["qk_norm"]))
    assert model.num_params() == (everything, blocks)


def test_gpt2_parameter_count():
    """OpenAI's 124M, but for the padding of the vocabulary: 124,439,808 + 47 * 768."""
    with torch.device("meta"):
        model = GPT(GPTConfig(n_kv_head=12, **GPT2))
    assert model.num_params()[0] == 124_439_808 + 47 * 768


def test_key_value_heads():
    assert GPTConfig().n_kv_head == 6
    assert GPTConfig(n_head=25, n_embd=1600).n_kv_head == 25  # 25 has no half
    with pytest.raises(ValueError, match="n_kv_head"):
        GPTConfig(n_kv_head=5)
    with pytest.raises(ValueError, match="n_embd"):
        GPTConfig(n_head=7)


@pytest.mark.parametrize("switch", [
    dict(norm="layernorm"), dict(mlp="gelu"), dict(pos="learned"), dict(n_kv_head=4), dict(bias=True), dict(qk_norm=True)])
def test_each_switch_changes_the_model(switch):
    x = torch.randint(0, 100, (2, 32))
    base, other = tiny_model(), tiny_model(**switch)
    if "norm" in switch:  # the same weights: what differs is what is done with them
        other.load_state_dict(base.state_dict(), strict=False)
    assert not torch.allclose(base(x), other(x), atol=1e-5)


def test_swiglu_width():
    """2/3 of 4 n_embd, rounded up to a multiple of 64."""
    widths = [train_gpt2.MLP(GPTConfig(n_embd=n, n_head=n // 64)).c_proj.in_features for n in (128, 768, 1024)]
    assert widths == [384, 2048, 2752]


def to_transformers(model):
    """Our weights under the names and in the layout of transformers' GPT2LMHeadModel, LlamaForCausalLM or, with QK-norm,
    Qwen3ForCausalLM: its model, loaded."""
    transformers = pytest.importorskip("transformers", reason="the transformers library is not installed")
    c, sd = model.config, {name: w.clone() for name, w in model.state_dict().items()}
    V = sd["lm_head.weight"].shape[0]
    if c.pos == "learned":
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=V, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head))
        for name in sd:  # OpenAI's Conv1D stores the transpose
            if re.search(r"(c_attn|c_proj|c_fc)\.weight$", name):
                sd[name] = sd[name].T
    else:
        kind = "Qwen3" if c.qk_norm else "Llama"
        D, hidden = c.n_embd // c.n_head, sd["transformer.h.0.mlp.c_proj.weight"].shape[1]
        theirs = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(
            vocab_size=V, hidden_size=c.n_embd, intermediate_size=hidden, num_hidden_layers=c.n_layer, head_dim=D,
            num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, max_position_embeddings=c.block_size,
            rms_norm_eps=1e-6, rope_theta=10000.0, tie_word_embeddings=True))
        new = {"model.embed_tokens.weight": sd["transformer.wte.weight"], "model.norm.weight": sd["transformer.ln_f.weight"],
               "lm_head.weight": sd["lm_head.weight"]}
        for i in range(c.n_layer):
            h, m = f"transformer.h.{i}.", f"model.layers.{i}."
            q, k, v = sd[h + "attn.c_attn.weight"].split((c.n_head * D, c.n_kv_head * D, c.n_kv_head * D))
            gate, up = sd[h + "mlp.c_fc.weight"].chunk(2)
            new |= {m + "self_attn.q_proj.weight": q, m + "self_attn.k_proj.weight": k, m + "self_attn.v_proj.weight": v,
                    m + "self_attn.o_proj.weight": sd[h + "attn.c_proj.weight"], m + "mlp.gate_proj.weight": gate,
                    m + "mlp.up_proj.weight": up, m + "mlp.down_proj.weight": sd[h + "mlp.c_proj.weight"],
                    m + "input_layernorm.weight": sd[h + "ln_1.weight"], m + "post_attention_layernorm.weight": sd[h + "ln_2.weight"]}
            if c.qk_norm:
                new |= {m + f"self_attn.{n}_norm.weight": sd[h + f"attn.{n}_norm.weight"] for n in "qk"}
        sd = new
    theirs.load_state_dict(sd)
    return theirs.eval()


@pytest.mark.parametrize("arch", [dict(n_kv_head=4, **GPT2), dict(), dict(qk_norm=True), dict(n_kv_head=1)],
                         ids=["GPT-2", "Llama", "Qwen3", "Llama, one key/value head"])
def test_logits_match_transformers(arch):
    """The same random weights, gains and biases included, give the same logits there to 1e-4."""
    model = tiny_model(n_embd=64, block_size=64, **arch)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = torch.randint(0, 100, (2, 64))
    ours, theirs = model(x)[..., :100], to_transformers(model)(x).logits[..., :100]
    assert ours.std() > 0.5  # the comparison would mean little near zero
    assert (ours - theirs).abs().max() < 1e-4


def test_rope_scores_depend_on_distance_only():
    T, D = 64, 16
    cos, sin = train_gpt2.rope_tables(T, D)
    q, k = torch.randn(1, 1, 1, D), torch.randn(1, 1, 1, D)  # one query, one key, at every position
    q, k = (train_gpt2.apply_rope(h.expand(1, T, 1, D), cos, sin)[0, :, 0] for h in (q, k))
    scores = q @ k.T  # (T, T)
    for distance in (0, 1, 7, 40):
        diagonal = scores.diagonal(-distance)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4)
    assert scores[:, 0].std() > 0.1  # and do depend on it


def test_rope_tells_word_orders_apart():
    """One layer without positions sees the words before the last as a set. With RoPE it must not."""
    x = torch.tensor([[3, 14, 15, 92, 65, 35]])
    swapped = torch.tensor([[14, 3, 65, 92, 15, 35]])
    model = tiny_model(n_layer=1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5)  # attention that is far from uniform
    assert (model(x)[:, -1, :100] - model(swapped)[:, -1, :100]).abs().max() > 1e-2
    model.cos.fill_(1), model.sin.fill_(0)  # no rotation: the set is all it sees
    assert (model(x)[:, -1, :100] - model(swapped)[:, -1, :100]).abs().max() < 1e-4


@pytest.mark.parametrize("arch", [dict(), dict(n_kv_head=4, **GPT2)], ids=["variant", "GPT-2"])
def test_causality(arch):
    model, x = tiny_model(**arch), torch.randint(0, 100, (1, 32))
    changed = x.clone()
    changed[0, 20] = (x[0, 20] + 1) % 100
    a, b = model(x)[0, :, :100], model(changed)[0, :, :100]
    assert torch.equal(a[:20], b[:20]) and not torch.allclose(a[20:], b[20:])


def test_attention_stores_no_mask_and_copies_no_heads():
    from torch.profiler import profile
    model, x = tiny_model(block_size=80), torch.randint(0, 100, (2, 80))  # 80: a width that nothing else has
    with profile(record_shapes=True) as p:
        model(x, x).backward()
    names = {event.key for event in p.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names, names
    assert not names & {"aten::repeat_interleave", "aten::tril", "aten::softmax", "aten::_softmax"}
    square = [e for e in p.key_averages(group_by_input_shape=True) if any(s[-2:] == [80, 80] for s in e.input_shapes if s)]
    assert not square, square


def test_head_loss_is_cross_entropy(monkeypatch):
    """In slices that do not divide the batch, loss and every gradient equal those of the plain way."""
    monkeypatch.setattr(train_gpt2, "HEAD_ROWS", 13)
    model, x, y = tiny_model(), torch.randint(0, 100, (3, 32)), torch.randint(0, 100, (3, 32))
    loss = 3 * model(x, y)
    loss.backward()
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    plain = 3 * F.cross_entropy(model(x)[..., :100].flatten(0, 1), y.flatten())
    plain.backward()
    assert torch.allclose(loss, plain, atol=1e-6)
    for p, g in zip(model.parameters(), ours):
        assert torch.allclose(p.grad, g, atol=1e-6)


@pytest.mark.parametrize("arch", [dict(qk_norm=True), dict(n_kv_head=4, **GPT2)], ids=["variant", "GPT-2"])
def test_the_model_compiles_to_one_graph(arch, monkeypatch):
    """torch.compile must not fall back to Python half-way, in training or validation, and gets the same gradients."""
    monkeypatch.setattr(train_gpt2, "HEAD_ROWS", 13)
    torch._dynamo.reset()
    model, x, y = tiny_model(**arch), torch.randint(0, 100, (3, 32)), torch.randint(0, 100, (3, 32))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    model(x, y).backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with torch.no_grad():
        validation = compiled(x, y)
    loss = compiled(x, y)
    loss.backward()
    assert torch.allclose(loss, validation, atol=1e-6)
    for p, g in zip(model.parameters(), plain):
        assert torch.allclose(p.grad, g, atol=1e-6)


def test_head_loss_keeps_no_logits(monkeypatch):
    """For the backward pass it keeps the size of x and of weight, not (N, V)."""
    monkeypatch.setattr(train_gpt2, "HEAD_ROWS", 64)
    x, weight, kept = torch.randn(512, 8, requires_grad=True), torch.randn(4096, 8, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        HeadLoss.apply(x, weight, torch.zeros(512, dtype=torch.long), 4096)
    assert sorted(kept) == [512 * 8, 4096 * 8]


def test_padding_takes_no_probability(monkeypatch):
    """Vocabulary 100 is padded to 128: the ids 100 ... 127 get no probability, no gradient, and are never drawn."""
    model, x = tiny_model(), torch.randint(0, 100, (2, 32))
    with torch.no_grad():
        model.lm_head.weight[100:] = 50.0
    logits = model(x)
    assert logits.shape[-1] == 128 and (F.softmax(logits, -1)[..., 100:] == 0).all()
    model(x, x).backward()
    assert (model.lm_head.weight.grad[100:] == 0).all()
    ids = list(train_gpt2.generate(model, [1], 200, temperature=3.0, generator=torch.Generator().manual_seed(0)))
    assert max(ids) < 100


def test_tied_weights_survive_a_round_trip():
    model = tiny_model()
    torch.save(model.state_dict(), "model.pt")
    other = tiny_model(seed=1)
    other.load_state_dict(torch.load("model.pt", weights_only=True))
    assert other.lm_head.weight is other.transformer.wte.weight
    x = torch.randint(0, 100, (1, 8))
    assert torch.equal(model(x), other(x))
    assert Path("model.pt").stat().st_size < 1.2 * 4 * model.num_params()[0] + 20_000  # and are stored once


def test_flops_per_token():
    """Against torch's own count of a forward and backward pass. It does not know the CPU's attention, which is added."""
    from torch.utils.flop_counter import FlopCounterMode
    model, x = tiny_model(), torch.randint(0, 100, (2, 32))
    with FlopCounterMode(display=False) as counter:
        model(x, x).backward()
    attention = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" in str(op))
    gains = 6 * sum(p.numel() for p in model.parameters() if p.dim() < 2)  # counted as if they were matrices
    expected = model.flops_per_token(32) - gains - 12 * 2 * 32 * 32
    assert (counter.get_total_flops() - attention) / 64 == expected


def test_generate():
    model = tiny_model()
    greedy = list(train_gpt2.generate(model, [5], 40, temperature=0))
    assert len(greedy) == 40 or greedy[-1:] != [99]
    x = [5]
    for token in greedy:  # the likeliest token each time, over at most block_size of context
        assert token == model(torch.tensor([x[-32:]]))[0, -1].argmax()
        x.append(token)
    draw = lambda **kw: list(train_gpt2.generate(model, [5], 60, generator=torch.Generator().manual_seed(0), **kw))
    assert draw() == draw() and draw(top_k=1) == list(train_gpt2.generate(model, [5], 60, temperature=0))
    five = {t for seed in range(40) for t in train_gpt2.generate(model, [5], 1, 1.0, 5, torch.Generator().manual_seed(seed))}
    assert five <= set(model(torch.tensor([[5]]))[0, -1].topk(5).indices.tolist()) and len(five) > 1


def test_generate_stops_at_endoftext():
    model = tiny_model()
    with torch.no_grad():  # a model that says 7, and after 7 <|endoftext|>, which is id 99
        logits = torch.full((100,), -20.0)
    def forward(x):
        out = torch.full((1, x.size(1), 128), -math.inf)
        out[..., :100] = logits
        out[0, -1, 99 if x[0, -1] == 7 else 7] = 20.0
        return out
    model.forward = forward
    assert list(train_gpt2.generate(model, [5], 10)) == [7]


def test_bytes_decode_as_text(capsys, monkeypatch):
    """A character of several bytes appears whole, a broken one as a mark."""
    tokenizer = train_gpt2.load_tokenizer("bytes")
    assert tokenizer[0]("é") == [0xC3, 0xA9]
    monkeypatch.setattr(train_gpt2, "generate", lambda *a, **k: iter([*"né→".encode(), 0xE2, 0x41]))
    train_gpt2.print_sample(tiny_model(vocab_size=257), tokenizer, argparse.Namespace(
        prompt="def ", max_new_tokens=9, temperature=1.0, top_k=0), 0)
    assert capsys.readouterr().out == "def né→�A\n"


def test_gpt2_tokenizer():
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("TIKTOKEN_CACHE_DIR is not set, and tests do not download GPT-2's vocabulary")
    encode, token_bytes = train_gpt2.load_tokenizer("gpt2")
    assert encode("Hello world<|endoftext|>")[:2] == [15496, 995] and 50256 not in encode("<|endoftext|>")
    assert b"".join(map(token_bytes, encode("naïve 🙂"))).decode() == "naïve 🙂"


# ---------------------------------------------------------------------------------------------------------------------
# The data

def shards(sizes, T, vocab=60000):
    """Shards of running numbers, so that a token says where it comes from, and a loader over them."""
    first = 0
    for i, n in enumerate(sizes):
        write_shard(f"part_{i}.bin", np.arange(first, first + n))
        first += n
    return lambda seed: TokenLoader("part_*.bin", T, vocab, seed)


@pytest.mark.parametrize("seed", [None, 7])
def test_every_token_once_an_epoch(seed):
    """Over all processes and micro-batches, every token is a target once, but for each shard's first and its tail."""
    sizes, T = (1000, 333, 64, 10, 777), 16
    loader = shards(sizes, T)(seed)
    assert loader.total == sum((n - 1) // T for n in sizes)
    seen, B, world = [], 3, 2
    for k in range(math.ceil(loader.total / (B * world))):
        for rank in range(world):
            n = min(B, loader.total - (k * world + rank) * B)
            if n > 0:
                x, y = loader.batch((k * world + rank) * B, n, CPU)
                assert torch.equal(x[:, 1:], y[:, :-1]) and (y == x + 1).all()  # never across a shard's end
                seen += y.flatten().tolist()
    starts = np.cumsum((0, *sizes))
    expected = [s + i for s, n in zip(starts, sizes) for i in range(1, (n - 1) // T * T + 1)]
    assert sorted(seen) == expected
    assert (seen == expected) == (seed is None)  # in order, or shuffled


def test_epochs_are_shuffled_anew_and_the_same_for_all():
    loader = shards((2000, 3000), 16)
    epoch = lambda seed, e: loader(seed).batch(e * loader(seed).total, loader(seed).total, CPU)[0][:, 0].tolist()
    assert epoch(7, 0) == epoch(7, 0) and epoch(7, 0) != epoch(8, 0) and epoch(7, 0) != epoch(7, 1)
    assert sorted(epoch(7, 0)) == sorted(epoch(7, 1))
    x, _ = loader(7).batch(loader(7).total - 2, 4, CPU)  # a batch over an epoch's end takes from both
    assert x[:, 0].tolist() == epoch(7, 0)[-2:] + epoch(7, 1)[:2]


def test_shards_are_memory_mapped():
    loader = shards((1000,), 16)(None)
    assert isinstance(loader.shards[0], np.memmap) and loader.shards[0].dtype == np.dtype("<u2")


def test_shard_format():
    """llm.c's: 256 int32 of header, then uint16, both little-endian."""
    write_shard("a.bin", [50256, 1, 65535])
    raw = Path("a.bin").read_bytes()
    assert len(raw) == 1024 + 6 and np.frombuffer(raw[:12], "<i4").tolist() == [20240520, 1, 3]
    assert raw[1024:] == b"\x50\xc4\x01\x00\xff\xff" and not any(raw[12:1024])
    assert train_gpt2.read_shard("a.bin").tolist() == [50256, 1, 65535]


def test_stdlib_corpus():
    """Held-out files are chosen by name, so their text is in one shard only; a second call makes nothing anew."""
    train, val = train_gpt2.stdlib_corpus()
    docs = {}
    for path in (train, val):
        tokens = np.array(train_gpt2.read_shard(path))
        assert tokens[0] == 256 and tokens.max() == 256
        docs[path] = [bytes(d.astype(np.uint8)) for d in np.split(tokens, np.flatnonzero(tokens == 256))[1:]]
        docs[path] = [d[1:] for d in docs[path]]
    assert sum(map(len, docs[train])) > 5e6 and 20 < len(docs[val]) < len(docs[train]) / 10
    source = Path(os.__file__).read_bytes()
    assert (source in docs[train]) != (source in docs[val])
    assert not {d for d in docs[train] if len(d) > 200} & set(docs[val])
    before = Path(train).stat().st_mtime_ns
    assert train_gpt2.stdlib_corpus() == (train, val) and Path(train).stat().st_mtime_ns == before


# ---------------------------------------------------------------------------------------------------------------------
# Training

def test_arch_and_switches_on_the_command_line():
    """--arch gpt2 turns everything back, and a switch given beside it, or alone, changes that one thing."""
    shape = lambda *argv: {k: getattr(train_gpt2.parse_args(["--model=d12", *argv])[0], k) for k in (*GPT2, "n_kv_head")}
    gpt2, variant = {**GPT2, "n_kv_head": 12}, {k: DEFAULTS[k] for k in (*GPT2, "n_kv_head")}
    assert shape() == variant and shape("--arch=gpt2") == gpt2
    assert variant["norm"] == "rmsnorm" and not set(variant.items()) & {(k, v) for k, v in gpt2.items() if k != "qk_norm"}
    for flag, name, value in (("--norm=layernorm", "norm", "layernorm"), ("--mlp=gelu", "mlp", "gelu"), ("--bias", "bias", True),
                              ("--pos=learned", "pos", "learned"), ("--qk_norm", "qk_norm", True), ("--n_kv_head=3", "n_kv_head", 3)):
        assert shape(flag) == {**variant, name: value}
    assert shape("--arch=gpt2", "--pos=rope", "--no-bias") == {**gpt2, "pos": "rope", "bias": False}


def test_schedule_corners():
    args = argparse.Namespace(learning_rate=1.2e-3, learning_rate_decay_frac=0.1, warmup_iters=715, num_iterations=19073,
                              schedule="cosine", cooldown_frac=0.7)
    lr = lambda step: get_lr(step, args)
    assert lr(0) == pytest.approx(1.2e-4) and lr(715) == pytest.approx(1.2e-3) and lr(19073) == pytest.approx(1.2e-4)
    assert lr(714) < 1.2e-3 and lr((715 + 19073) // 2) == pytest.approx(6.6e-4)
    third = 715 + (19073 - 715) / 3  # where a cosine has gone a quarter of the way, and a straight line a third
    assert lr(third) == pytest.approx(1.2e-4 + 0.75 * 1.08e-3)
    args.schedule, args.num_iterations, args.cooldown_frac = "wsd", 10000, 0.4
    assert lr(0) == pytest.approx(1.2e-4) and lr(715) == lr(6000) == pytest.approx(1.2e-3)
    assert lr(8000) == pytest.approx(6.6e-4) and lr(10000) == pytest.approx(1.2e-4)
    args.warmup_iters, args.learning_rate_decay_frac = 0, 0.0
    assert lr(0) == pytest.approx(1.2e-3) and lr(10000) == 0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_optimizer_groups(optimizer):
    """Matrices decay, gains and biases do not; Muon takes the blocks' matrices; every parameter is in one place."""
    model = tiny_model(bias=True, norm="layernorm", pos="learned")
    args = argparse.Namespace(optimizer=optimizer, learning_rate=1e-3, weight_decay=0.1, zero_stage=0, dtype="float32")
    optimizers = train_gpt2.make_optimizers(model, args)
    names = {id(p): name for name, p in model.named_parameters()}
    where = {names[id(p)]: (type(o).__name__, group["weight_decay"]) for o in optimizers for group in o.param_groups for p in group["params"]}
    assert len(where) == len(names) == sum(len(g["params"]) for o in optimizers for g in o.param_groups)
    for name, p in model.named_parameters():
        muon = optimizer == "muon" and ".h." in name and p.dim() == 2
        assert where[name] == ("Muon" if muon else "AdamW", 0.1 if p.dim() == 2 else 0.0), name


def test_muon_is_torchs_on_matrices_taken_apart():
    """Three steps of Muon, batched, are those of torch.optim.Muon on the same matrices one by one, where merged ones (queries,
    keys and values; gate and up) have been taken apart for it; without `parts` they are those on the matrices as they are."""
    model = tiny_model(n_embd=48, n_layer=3)
    ours = [p for p in model.transformer.h.parameters() if p.dim() == 2]
    assert sorted({(tuple(p.shape), *p.parts) for p in ours if hasattr(p, "parts")}) == [((96, 48), 48, 24, 24), ((256, 48), 128, 128)]
    for apart in (True, False):
        pieces = [p.detach().split(p.parts if apart and hasattr(p, "parts") else len(p)) for p in ours]
        theirs = [[torch.nn.Parameter(piece.clone()) for piece in group] for group in pieces]
        params = [torch.nn.Parameter(p.detach().clone()) for p in ours]
        for p, source in zip(params, ours):
            if apart and hasattr(source, "parts"):
                p.parts = source.parts
        a = train_gpt2.Muon(params, 0.01, 0.1, dtype=torch.bfloat16)
        b = torch.optim.Muon(sum(theirs, []), lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        for _ in range(3):
            for p, group in zip(params, theirs):
                p.grad = torch.randn_like(p)
                for q, grad in zip(group, p.grad.split([len(q) for q in group])):
                    q.grad = grad.clone()
            a.step(), b.step()
        for p, group, start in zip(params, theirs, ours):
            q = torch.cat(group)
            assert (p - q).norm() < 0.01 * (q - start).norm()  # what bf16 leaves: 0.001


def test_muon_makes_steps_orthogonal():
    """In fp32: whatever the gradient's singular values, those of a step are all about 1, times the rate and the scale."""
    p = torch.nn.Parameter(torch.zeros(32, 64))
    u, _, v = torch.linalg.svd(torch.randn(32, 64), full_matrices=False)
    p.grad = u @ torch.diag(torch.logspace(0, -1.5, 32)) @ v
    train_gpt2.Muon([p], 0.01, 0.0, dtype=torch.float32).step()
    s = torch.linalg.svdvals(-p.detach()) / (0.01 * 0.2 * 8)
    assert 0.65 < s.min() and s.max() < 1.25, s
    assert (u.T @ -p.detach() @ v.T).diagonal().min() > 0  # and it goes downhill along each of them


def test_recipes():
    """--recipe homework is the original's AdamW and schedule; a flag beside it wins; the finetuning presets are no recipe's."""
    parse = lambda *flags: train_gpt2.parse_args([*flags, "--input_bin=x"])[0]
    wanted = dict(optimizer="adamw", schedule="cosine", warmup_iters=715, learning_rate_decay_frac=0.1, weight_decay=0.1,
                  total_batch_size=524288, num_iterations=19073, sequence_length=1024, grad_clip=1.0, qk_norm=False)
    for model, rate in (("d12", 1.2e-3), ("d24", 6e-4), ("d36", 5e-4), ("d48", 4e-4)):
        args = parse("--model", model, "--recipe=homework")
        assert {k: getattr(args, k) for k in wanted} == wanted and args.learning_rate == pytest.approx(rate)
    args = parse("--model=d12", "--recipe=homework", "--optimizer=muon", "--learning_rate=0.5", "--qk_norm")
    assert (args.optimizer, args.learning_rate, args.qk_norm, args.schedule) == ("muon", 0.5, True, "cosine")
    today, tiny = parse("--model=d12"), parse("--recipe=homework")
    assert (today.optimizer, today.schedule, today.qk_norm, today.learning_rate) == ("muon", "wsd", True, 2.4e-3)
    assert (tiny.optimizer, tiny.schedule, tiny.num_iterations, tiny.warmup_iters) == ("adamw", "cosine", 600, 20)
    assert parse("--model=d12", "--arch=gpt2").qk_norm is False and parse("--model=gpt2").optimizer == "adamw"


def test_accumulation_equals_one_large_batch(corpus):
    for B in (16, 4, 1):
        main([*SMALL, *corpus, f"--batch_size={B}", "--optimizer=adamw", "--learning_rate=1e-3", f"--output_dir=log{B}"])
    assert log_of("log4") == pytest.approx(log_of("log16"), abs=1e-5)
    assert log_of("log1") == pytest.approx(log_of("log16"), abs=1e-5)
    assert log_of("log1", "tel") == pytest.approx(log_of("log16", "tel"), abs=1e-5)  # and so is a validation


def test_validation_counts_a_fixed_number_of_tokens(corpus):
    model = tiny_model(vocab_size=257)
    data = TokenLoader(corpus[1].split("=")[1], 32, 257)
    autocast = lambda: torch.autocast("cpu", enabled=False)
    losses = [train_gpt2.evaluate(model, data, 70 * 32 + 5, B, autocast, CPU) for B in (1, 16, 64)]
    x, y = data.batch(0, 70, CPU)
    assert losses == pytest.approx([model(x, y).item()] * 3, abs=1e-5)
    everything = train_gpt2.evaluate(model, data, 10**9, 16, autocast, CPU)
    assert everything == pytest.approx(model(*data.batch(0, data.total, CPU)).item(), abs=1e-5)


def test_the_default_dtype_follows_the_hardware(monkeypatch):
    for flags, native in (("sse2 avx2 amx_bf16", True), ("avx512_bf16", True), ("asimd bf16", True), ("sse2 avx512f", False)):
        monkeypatch.setattr(Path, "read_text", lambda self: f"flags : {flags}")
        monkeypatch.setattr(Path, "exists", lambda self: True)
        assert train_gpt2.pick_autocast(None, CPU)[0] == ("bfloat16" if native else "float32")


def test_micro_batch_choice(monkeypatch):
    """It divides a process's share of the step, and a small GPU gets a small one."""
    d12, params = GPTConfig(), 116_509_440
    assert train_gpt2.pick_batch_size(d12, params, CPU, 512) == 4  # 4096 tokens
    assert train_gpt2.pick_batch_size(d12, params, CPU, 3) == 3
    sizes = []
    for gib in (80, 40, 24, 8):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: argparse.Namespace(total_memory=gib * 2**30))
        sizes.append(train_gpt2.pick_batch_size(d12, params, torch.device("cuda", 0), 512))
    assert sizes == [64, 32, 16, 2] and all(512 % b == 0 for b in sizes)


# ---------------------------------------------------------------------------------------------------------------------
# More than one process

TWO = [*SMALL, "--num_iterations=10", "--batch_size=4", "--optimizer=adamw", "--learning_rate=3e-3"]


@pytest.mark.parametrize("optimizer, zero_stage", [("adamw", 0), ("adamw", 1), ("muon", 1)])
def test_two_processes_train_as_one(corpus, optimizer, zero_stage):
    """The losses of 10 steps agree to 1e-4, validations too, and either run can be resumed by the other kind."""
    flags = [*TWO, *corpus, f"--optimizer={optimizer}"]
    main([*flags, "--output_dir=one"])
    torchrun(2, *flags, f"--zero_stage={zero_stage}", "--output_dir=two")
    one, two = log_of("one"), log_of("two")
    assert len(one) == 10 and two == pytest.approx(one, abs=1e-4)
    assert log_of("two", "tel") == pytest.approx(log_of("one", "tel"), abs=1e-4)
    # on from step 10 to 14, both on the other number of processes
    main([*flags, "--output_dir=two", "--num_iterations=14", "--resume"])
    torchrun(2, *flags, f"--zero_stage={zero_stage}", "--output_dir=one", "--num_iterations=14", "--resume")
    main([*flags, "--output_dir=straight", "--num_iterations=14"])
    assert log_of("one") == pytest.approx(log_of("two"), abs=1e-4) and len(log_of("one")) == 14


def test_gradients_are_synchronised_once_a_step(corpus):
    """Two micro-batches a step and process, and as many all-reduces of gradients as with one."""
    probe = Path("probe.py")
    probe.write_text(f"""
import sys; sys.path.insert(0, {str(Path(SCRIPT).parent)!r})
import torch.nn as nn, train_gpt2, torch.distributed as dist
class Counting(nn.parallel.DistributedDataParallel):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.count = 0
        def hook(state, bucket):
            self.count += 1
            future = dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future()
            return future.then(lambda f: f.value()[0])
        self.register_comm_hook(None, hook)
        Counting.last = self
nn.parallel.DistributedDataParallel = Counting
train_gpt2.main(sys.argv[1:])
if train_gpt2.RANK == 0:
    print("reductions", Counting.last.count)
""")
    counts = []
    for B in (8, 2):
        args = [*TWO, *corpus, f"--batch_size={B}", f"--output_dir=log{B}"]
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(probe), *args],
                              capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
        counts.append(int(re.search(r"reductions (\d+)", done.stdout + done.stderr).group(1)))
    assert counts[0] == counts[1] >= 10


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other(corpus, victim):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    both = [subprocess.Popen([sys.executable, SCRIPT, *TWO, *corpus, "--num_iterations=100000", "--output_dir=log"], stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE, text=True, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in (0, 1)]
    try:
        wait_for(lambda: Path("log/last.pt").exists(), both)
        both[victim].kill()
        _, err = both[1 - victim].communicate(timeout=60)
        assert both[1 - victim].returncode not in (0, None) and "lost another process" in err and "--resume" in err, err
    finally:
        for process in both:
            process.kill()


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints, resuming, and what goes wrong

def wait_for(condition, processes, seconds=120):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline and all(p.poll() is None for p in processes), "it ended, or takes too long"
        time.sleep(0.02)


def weights(path):
    return torch.load(path, weights_only=True)["model"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resume_is_exact(corpus, optimizer):
    """Stopped after 3 of 8 steps and resumed: losses, log, best loss and weights equal the uninterrupted run's bit for bit."""
    flags = [*SMALL, *corpus, f"--optimizer={optimizer}", "--num_iterations=8", "--sample_every=3", "--max_new_tokens=3"]
    main([*flags, "--output_dir=straight"])
    real = train_gpt2.save_checkpoint
    def save_and_die(path, state):
        real(path, state)
        if path.name == "last.pt":
            raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_gpt2, "save_checkpoint", save_and_die)
        main([*flags, "--output_dir=stopped"])
    assert torch.load("stopped/last.pt", weights_only=True)["step"] == 3
    with open("stopped/main.log", "a") as f:
        f.write("s:3 trl:9.999999 lr:0.1 norm:1\ns:4 tr")  # a later line, and one torn by the crash
    main([*flags, "--output_dir=stopped", "--resume"])
    stopped, straight = (re.sub(r" ms:\S+", "", Path(folder, "main.log").read_text()) for folder in ("stopped", "straight"))
    assert stopped == straight
    for name in ("last.pt", "best.pt"):
        a, b = (torch.load(f"{folder}/{name}", weights_only=True) for folder in ("straight", "stopped"))
        assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
        assert all(a[k] == b[k] for k in ("step", "train_loss", "val_loss", "best_val_loss", "config"))


def test_resume_takes_flags_from_the_run(corpus):
    main([*SMALL, *corpus, "--learning_rate=0.004", "--output_dir=log"])
    main(["--resume", "--output_dir=log", "--num_iterations=8"])
    state = torch.load("log/last.pt", weights_only=True)
    assert state["step"] == 8 and state["args"]["learning_rate"] == 0.004 and state["config"]["n_embd"] == 32


def test_resuming_says_so_when_the_corpus_has_grown(corpus, capsys):
    os.rename("train_2.bin", "later.bin")
    main([*SMALL, *corpus, "--output_dir=log"])
    main(["--resume", "--num_iterations=7", "--output_dir=log"])
    assert "NOTE" not in capsys.readouterr().out
    os.rename("later.bin", "train_2.bin")
    main(["--resume", "--num_iterations=8", "--output_dir=log"])
    assert re.search(r"NOTE: an epoch had 1,\d+ sequences and has 1,\d+ now", capsys.readouterr().out)


def test_best_is_the_lowest_and_last_is_the_newest(corpus):
    """At a rate that is far too high the loss rises again: best.pt stays behind."""
    main([*SMALL, *corpus, "--num_iterations=12", "--optimizer=adamw", "--learning_rate=0.5", "--cooldown_frac=0", "--val_loss_every=2",
          "--output_dir=log"])
    losses = {s: v for s, v in log_of("log", "tel").items() if s > 0}
    best, last = (torch.load(f"log/{name}", weights_only=True) for name in ("best.pt", "last.pt"))
    assert best["val_loss"] == pytest.approx(min(losses.values()), abs=1e-6) and losses[best["step"]] == min(losses.values())
    assert last["step"] == 12 and last["best_val_loss"] == best["val_loss"] and best["step"] < 12


def test_checkpoint_contents(corpus):
    main([*SMALL, *corpus, "--output_dir=log"])
    state = torch.load("log/best.pt", weights_only=True)
    assert state["source"] == Path(SCRIPT).read_text() and state["tokenizer"] == "bytes"
    assert GPTConfig(**state["config"]).n_embd == 32 and state["step"] == 6 and state["train_loss"] > 0
    assert not list(Path("log").glob("*.tmp"))


def test_a_run_is_never_written_over(corpus, capsys):
    main([*SMALL, *corpus, "--output_dir=log"])
    before = {p.name: p.read_bytes() for p in Path("log").iterdir()}
    fails([*SMALL, *corpus, "--output_dir=log"], capsys, "log holds a run: add --resume", "another --output_dir")
    assert before == {p.name: p.read_bytes() for p in Path("log").iterdir()}


def test_the_flagless_run_keeps_earlier_ones(monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", {**MODELS["tiny"], "n_layer": 1, "num_iterations": 2, "val_tokens": 128, "sample_every": 0})
    for _ in range(3):
        main([])
    assert [p.name for p in sorted(Path().glob("logtiny*"))] == ["logtiny", "logtiny.1", "logtiny.2"]
    assert all((p / "last.pt").exists() for p in Path().glob("logtiny*"))


def test_kill_at_any_moment(corpus):
    """After kill -9 both checkpoints load and the run goes on, five times over."""
    flags = [*SMALL, *corpus, "--num_iterations=100000", "--val_loss_every=2", "--save_every=1", "--val_tokens=64", "--output_dir=log"]
    rng, env, reached = np.random.default_rng(0), {**os.environ, "OMP_NUM_THREADS": "1"}, 0
    lines = lambda: Path("log/main.log").read_text().count("\n") if Path("log/main.log").exists() else 0
    for i in range(5):
        process = subprocess.Popen([sys.executable, SCRIPT, *flags, *(["--resume"] if i else [])], env=env,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        begin = lines()
        wait_for(lambda: lines() > begin + 5, [process])
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.wait()
        last, best = (torch.load(f"log/{name}", weights_only=True) for name in ("last.pt", "best.pt"))
        assert last["step"] > reached and all(w.isfinite().all() for w in best["model"].values())
        reached = last["step"]


def test_a_best_that_is_younger_than_last_survives_resuming(corpus):
    """Killed between the two writes, a run resumes from before its best: only a better one may replace that."""
    main([*SMALL, *corpus, "--output_dir=log"])
    main([*SMALL, *corpus, "--num_iterations=3", "--output_dir=short"])
    os.replace("short/last.pt", "log/last.pt")
    best = torch.load("log/best.pt", weights_only=True)
    torch.save({**best, "val_loss": 0.01}, "log/best.pt")
    main([*SMALL, *corpus, "--output_dir=log", "--resume"])
    assert torch.load("log/best.pt", weights_only=True)["val_loss"] == 0.01


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(corpus, number):
    flags = [*SMALL, *corpus, "--num_iterations=100000", "--save_every=0", "--val_loss_every=0", "--output_dir=log"]
    process = subprocess.Popen([sys.executable, SCRIPT, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    wait_for(lambda: Path("log/main.log").exists() and len(log_of("log")) > 5, [process])
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "stopping after this step" in err and "Traceback" not in err
    command = re.search(r"Go on with.*: (.*)", out).group(1)
    assert shlex.split(command) == ["train_gpt2.py", *flags, "--resume"]
    step = torch.load("log/last.pt", weights_only=True)["step"]
    assert step == max(log_of("log")) + 1  # no finished step is lost
    main([*flags, f"--num_iterations={step + 2}", "--resume"])
    assert sorted(log_of("log")) == list(range(step + 2))


def test_a_full_disk_leaves_the_old_checkpoint(corpus, capsys):
    """The limit on a file's size stands in for the disk's: the write fails half-way, as it would there."""
    main([*SMALL, *corpus, "--output_dir=log"])
    before = Path("log/last.pt").read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        fails(["--resume", "--num_iterations=9", "--output_dir=log"], capsys, "is not saved: free some space", "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert Path("log/last.pt").read_bytes() == before and not list(Path("log").glob("*.tmp"))
    main(["--resume", "--num_iterations=9", "--output_dir=log"])
    assert torch.load("log/last.pt", weights_only=True)["step"] == 9


def test_a_log_that_cannot_be_written_is_no_reason_to_stop(corpus, capsys):
    def full(path, *args, **kwargs):
        if str(path).endswith("main.log"):
            raise OSError(28, "No space left on device")
        return real(path, *args, **kwargs)
    real = builtins.open
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", full)
        main([*SMALL, *corpus, "--output_dir=log"])
    assert "WARNING: cannot write log/main.log" in capsys.readouterr().err
    assert torch.load("log/last.pt", weights_only=True)["step"] == 6


def test_a_folder_that_cannot_be_made(corpus, capsys):
    Path("file").write_text("")
    fails([*SMALL, *corpus, "--output_dir=file/log"], capsys, "file/log", "--output_dir")


def test_a_torn_log_does_not_stop_resuming():
    Path("log").mkdir()
    Path("log/main.log").write_text("s:1 trl:5.0 lr:0.1 norm:1\ns:s:2 trl:4\ns:3 trl:3.0\ns:9 trl:1.0\ns:4 tr")
    train_gpt2.open_output_dir(Path("log"), 5, False)
    assert Path("log/main.log").read_text() == "s:1 trl:5.0 lr:0.1 norm:1\ns:3 trl:3.0\n"


def test_a_loss_that_is_not_finite_stops_the_run(corpus, capsys, monkeypatch):
    real, calls = train_gpt2.HeadLoss.apply, []
    def apply(*args):
        calls.append(torch.is_grad_enabled())
        return real(*args) * (math.nan if sum(calls) > 4 else 1)
    monkeypatch.setattr(train_gpt2.HeadLoss, "apply", apply)
    fails([*SMALL, *corpus, "--batch_size=16", "--output_dir=log"], capsys, "step 4 has loss nan", "log/last.pt is the last good checkpoint")
    assert all(w.isfinite().all() for w in weights("log/last.pt").values())


def fails(argv, capsys, *messages, main=main):
    """main(argv) ends in one line on stderr that contains the messages, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        main(argv)
    err = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("WARNING")]
    assert e.value.code == 2 and len(err) == 1 and err[0].startswith("error: "), err
    for message in messages:
        assert message in err[0], err[0]


def header(magic=20240520, version=1, count=5000):
    h = np.zeros(256, "<i4")
    h[:3] = magic, version, count
    return h.tobytes()


BODY = np.zeros(5000, "<u2").tobytes()


@pytest.mark.parametrize("content, messages", [
    (b"", ["bad.bin", "too short for a token shard", "fineweb.py"]),
    (header()[:500], ["bad.bin", "too short"]),
    (header(magic=42) + BODY, ["bad.bin", "magic number is 42"]),
    (header(version=2) + BODY, ["bad.bin", "version 2"]),
    (header() + BODY[:-10], ["bad.bin", "truncated"]),
    (header() + BODY + b"12", ["bad.bin", "overlong"]),
    (header(count=0), ["bad.bin", "empty"]),
    (header(count=100) + BODY[:200], ["bad.bin", "too few for one batch", "--total_batch_size"]),
    (header() + BODY[:-2] + b"\x01\x01" , []),  # the largest id there is, 257, at the very end: outside the vocabulary
], ids=["no bytes", "half a header", "magic", "version", "truncated", "overlong", "no tokens", "too small", "token id"])
def test_bad_shards(content, messages, corpus, capsys):
    Path("bad.bin").write_bytes(content)
    if not messages:
        body = np.full(5000, 300, "<u2").tobytes()
        Path("bad.bin").write_bytes(header() + body)
        messages = ["bad.bin", "token id 300", "outside the vocabulary of 257", "--tokenizer"]
    fails([*SMALL, "--input_bin=bad.bin", corpus[1], "--output_dir=log"], capsys, *messages)
    assert not (Path("log") / "last.pt").exists()


@pytest.mark.parametrize("argv, messages", [
    (["--model=d24"], ["fineweb10B/fineweb_train_*.bin", "python fineweb.py", "--input_bin"]),
    (["--model=d13"], ["--model", "d13", "d12"]),
    (["--total_batch_size=500"], ["--total_batch_size 500", "give 480 or 512"]),
    (["--batch_size=5"], ["--total_batch_size 512", "= batch_size 5 x", "give 480 or 640"]),
    (["--total_batch_size=0"], ["--total_batch_size 0", "give 32 or 64"]),
    (["--n_head=5"], ["--n_embd 32 over --n_head 5"]),
    (["--n_kv_head=3"], ["--n_head 4", "--n_kv_head 3"]),
    (["--n_head=0"], ["--n_head", "at least 1"]),
    (["--sequence_length=0"], ["--sequence_length", "at least 1"]),
    (["--batch_size=-4"], ["--batch_size -4", "not negative"]),
    (["--input_val_bin=nothing*.bin"], ["nothing*.bin", "python fineweb.py"]),
    (["--sequence_length=9000", "--total_batch_size=9000"], ["val.bin", "too few"]),
    (["--learning_rate=fast"], ["--learning_rate", "fast"]),
    (["--no_such_flag=1"], ["--no_such_flag"]),
    (["--resume", "--output_dir=nowhere"], ["nowhere/last.pt", "no checkpoint"]),
    (["--sample=nowhere.pt"], ["nowhere.pt", "no checkpoint"]),
    (["--sample=text.pt"], ["text.pt", "is no checkpoint"]),
    (["--sample=other.pt"], ["other.pt", "is no checkpoint"]),
    (["--sample=."], ["is no checkpoint"]),
    (["--device=mps" if not torch.backends.mps.is_available() else "--device=cuda"], ["--device", "torch sees none"]),
])
def test_bad_flags(argv, messages, corpus, capsys):
    Path("text.pt").write_text("hello")
    torch.save({"weights": 1}, "other.pt")
    fails([*SMALL, *([] if argv == ["--model=d24"] else corpus), "--output_dir=log", *argv], capsys, *messages)


def test_resume_refuses_another_model(corpus, capsys):
    main([*SMALL, *corpus, "--output_dir=log"])
    for flag, value in (("--norm", "layernorm"), ("--n_layer", "3"), ("--seed", "1"), ("--total_batch_size", "1024")):
        fails(["--resume", "--output_dir=log", flag, value], capsys, f"{flag} {value} cannot go on in log", "another --output_dir")


def test_a_checkpoint_cannot_run_code(capsys):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (Path("it_ran"),))
    torch.save({"config": Evil(), "model": {}, "tokenizer": "bytes"}, "evil.pt")
    fails(["--sample=evil.pt"], capsys, "evil.pt is no checkpoint")
    assert not Path("it_ran").exists()


def test_errors_leave_no_traceback(corpus):
    done = run("--model=d13", check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# fineweb.py: downloads, from a server that behaves as the hub does, or misbehaves as it is told

class Hub(http.server.ThreadingHTTPServer):
    """files: {dataset/path: bytes}. An address on it redirects to another host, as the hub's do, and names size and sha256 on
    the way. faults: {a word in the address: [a fault for each of the next requests]}."""
    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.token, self.page, self.speed = files, collections.defaultdict(list), None, 1000, None
        self.log = []  # (path, Range or None)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, *args):
        pass  # a client that hangs up is part of the test


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, code, body=b"", length=None, **headers):
        self.send_response(code)
        for name, value in {"Content-Length": len(body) if length is None else length, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        step = self.server.speed or len(body) or 1
        for i in range(0, len(body), step):
            self.wfile.write(body[i:i + step])
            if self.server.speed:
                time.sleep(0.005)

    def do_GET(self):
        hub, path, asked = self.server, self.path, self.headers.get("Range")
        hub.log.append((path, asked))
        fault = next((f.pop(0) for word, f in hub.faults.items() if f and word in path), None)
        if isinstance(fault, int):
            return self.answer(fault, b"not now", **({"Retry_After": 1} if fault == 429 else {}))
        if fault == "html":
            return self.answer(200, b"<html>sign in</html>", Content_Type="text/html; charset=utf-8")
        if path.startswith("/blob/"):  # the content host
            assert "Authorization" not in self.headers  # a token is the hub's business alone
            body = hub.files[path[6:]]
            if fault == "flip":
                body = body[:9] + bytes([body[9] ^ 1]) + body[10:]
            start, code, headers = 0, 200, {}
            if asked and fault != "no range":
                start, code = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]), 206
                headers = dict(Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}")
            body = body[start:]
            if fault == "short":  # says that half is all
                return self.answer(code, body[:len(body) // 2], **headers)
            if fault == "long":
                return self.answer(code, body + b"more", **headers)
            if fault in ("cut", "stall"):
                self.answer(code, body[:len(body) // 2], len(body), **headers)
                self.wfile.flush()
                time.sleep(4 if fault == "stall" else 0)
                self.close_connection = True
                return
            return self.answer(code, body, **headers)
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.answer(401, b"who are you?")
        if match := re.fullmatch(r"/api/datasets/(\w+/[\w-]+)/tree/main/([\w/]+)(?:\?page=(\d+))?", path):
            repo, folder, page = match[1], match[2], int(match[3] or 0)
            names = [name[len(repo) + 1:] for name in hub.files if name.startswith(f"{repo}/{folder}/")]
            entries = [{"type": "directory", "path": folder + "/more"}] + [{"type": "file", "path": name} for name in reversed(names)]
            following = f'<{path.split("?")[0]}?page={page + 1}>; rel="next"' if entries[(page + 1) * hub.page:] else ""
            entries = entries[page * hub.page:(page + 1) * hub.page]
            return self.answer(200, json.dumps(entries).encode(), Content_Type="application/json", **({"Link": following} if following else {}))
        match = re.fullmatch(r"(?:/datasets)?/([\w-]+/[\w-]+)/resolve/main/([\w/.]+)", path)
        if not match or f"{match[1]}/{match[2]}" not in hub.files:
            return self.answer(404, b"Entry not found")
        name = f"{match[1]}/{match[2]}"
        self.answer(302, b"Found", Location=f"http://localhost:{hub.server_port}/blob/{name}", X_Linked_Size=len(hub.files[name]),
                    X_Linked_Etag=f'"{hashlib.sha256(hub.files[name]).hexdigest()}"')


@pytest.fixture
def hub(monkeypatch):
    """Two training shards and the validation shard of kjj0/fineweb10B-gpt2, about 20 kB each; no waiting."""
    rng, files = np.random.default_rng(0), {}
    for name in ("val_000000", "train_000001", "train_000002"):
        write_shard("made.bin", rng.integers(0, 50257, 10000))
        files[f"kjj0/fineweb10B-gpt2/fineweb_{name}.bin"] = Path("made.bin").read_bytes()
    Path("made.bin").unlink()
    server = Hub(files)
    for name, value in (("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/"), ("NO_PROXY", "*"), ("HOME", os.getcwd())):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for name, value in (("WAIT", 0.01), ("TIMEOUT", (5, 1.5)), ("PIECE", 4096)):
        monkeypatch.setattr(fineweb, name, value)
    yield server
    server.shutdown()
    server.server_close()


def downloaded(hub, folder="fineweb10B"):
    """The folder holds the hub's shards, byte for byte, and nothing half done."""
    there = {p.name: p.read_bytes() for p in Path(folder).glob("fineweb_*")}
    return there == {name.split("/")[-1]: body for name, body in hub.files.items()}


def test_downloaded_shards_are_what_train_gpt2_looks_for(hub, capsys):
    assert fineweb.main(["--shards=2"]) == 0 and downloaded(hub)
    loader = TokenLoader(DEFAULTS["input_bin"], 99, 50257)
    assert len(loader.paths) == 2 and loader.total == 2 * (9999 // 99)
    assert TokenLoader(DEFAULTS["input_val_bin"], 99, 50257).total == 9999 // 99
    assert "python train_gpt2.py --model d24\n" in capsys.readouterr().out
    # once more: all is checked against what the hub names, nothing is fetched
    hub.log.clear()
    assert fineweb.main(["--shards=2"]) == 0 and downloaded(hub) and not [p for p, _ in hub.log if "/blob/" in p]


def test_shards_flag_takes_the_first_ones(hub):
    assert fineweb.main(["--shards=1", "--out=here"]) == 0
    assert sorted(p.name for p in Path("here").glob("*.bin")) == ["fineweb_train_000001.bin", "fineweb_val_000000.bin"]


@pytest.mark.parametrize("where, fault", [
    *[("/blob/", fault) for fault in ("cut", "stall", "short", "long", "flip", "html", 429, 500, 503, 408)],
    *[("/datasets/", fault) for fault in ("html", 429, 500, 503)]])
def test_faults_that_pass(hub, fault, where, capsys):
    """Each comes three times over all files; afterwards every byte is right."""
    hub.faults[where] = [fault] * 3
    assert fineweb.main(["--shards=2"]) == 0 and downloaded(hub) and not hub.faults[where]


def test_a_cut_download_is_resumed(hub, capsys):
    hub.faults["blob/kjj0/fineweb10B-gpt2/fineweb_val"] = ["cut"]
    assert fineweb.main(["--shards=1"]) == 0
    ranges = [asked for path, asked in hub.log if "blob" in path and "val" in path]
    assert ranges[0] is None and 0 < int(ranges[1][6:-1]) <= 10512 and len(ranges) == 2  # half of 1024 + 20000


def test_a_server_without_ranges(hub, capsys):
    hub.faults["blob/kjj0/fineweb10B-gpt2/fineweb_val"] = ["cut", "no range"]
    assert fineweb.main(["--shards=2"]) == 0 and downloaded(hub)
    assert len([p for p, _ in hub.log if "blob" in p and "val" in p]) == 2  # it begins anew, and that is enough


def test_retry_after_is_respected(hub, monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    hub.faults["/datasets/"] = [429]
    assert fineweb.main(["--shards=1"]) == 0 and 1 in slept


def test_damaged_files_are_fetched_again(hub, capsys):
    fineweb.main(["--shards=2"])
    first, second = (Path(f"fineweb10B/fineweb_train_00000{i}.bin") for i in (1, 2))
    first.write_bytes(first.read_bytes()[:-1] + b"!")
    second.write_bytes(second.read_bytes()[:-100])
    assert fineweb.main(["--shards=2"]) == 0
    assert "has not the sha256 that the hub names" in capsys.readouterr().out
    for path in (first, second):  # kept, in case it was somebody's own
        Path(f"{path}.old").unlink()
    assert downloaded(hub)


def test_a_half_file_of_an_earlier_run_is_completed(hub):
    Path("fineweb10B").mkdir()
    whole = hub.files["kjj0/fineweb10B-gpt2/fineweb_val_000000.bin"]
    Path("fineweb10B/fineweb_val_000000.bin.part").write_bytes(whole[:5000])
    assert fineweb.main(["--shards=2"]) == 0 and downloaded(hub)
    assert ("/blob/kjj0/fineweb10B-gpt2/fineweb_val_000000.bin", "bytes=5000-") in hub.log


def test_a_wrong_half_file_does_no_harm(hub, capsys):
    Path("fineweb10B").mkdir()
    for name, size in (("val_000000", 5000), ("train_000001", 21024), ("train_000002", 99999)):
        Path(f"fineweb10B/fineweb_{name}.bin.part").write_bytes(bytes(size))
    assert fineweb.main(["--shards=2"]) == 0 and downloaded(hub)


def test_a_shard_that_is_none_is_refused_though_the_hub_vouches_for_it(hub, capsys):
    hub.files["kjj0/fineweb10B-gpt2/fineweb_train_000001.bin"] = b"x" * 30000
    fails(["--shards=1"], capsys, "fineweb_train_000001.bin", "no shard's header", main=fineweb.main)
    assert not Path("fineweb10B/fineweb_train_000001.bin").exists()


def test_looking_at_sizes_while_files_get_their_names():
    """The progress line looks at a download at any moment, that of its renaming included."""
    download, stop = fineweb.Download("", Path("a.bin")), threading.Event()
    def rename():
        while not stop.is_set():
            Path("a.bin.part").write_bytes(b"1234567")
            os.replace("a.bin.part", "a.bin")
            os.unlink("a.bin")
    thread = threading.Thread(target=rename)
    thread.start()
    try:
        assert {download.have() for _ in range(30000)} == {0, 7}
    finally:
        stop.set()
        thread.join()


def test_several_files_at_a_time(hub, monkeypatch):
    together, most, real = [0], [0], fineweb.fetch
    def fetch(download):
        together[0] += 1
        most[0] = max(most[0], together[0])
        time.sleep(0.1)
        try:
            return real(download)
        finally:
            together[0] -= 1
    monkeypatch.setattr(fineweb, "fetch", fetch)
    assert fineweb.main(["--shards=2"]) == 0 and most[0] == 3


def test_a_token_goes_to_the_hub_only(hub, monkeypatch, capsys):
    hub.token = "hf_secret"
    fails(["--shards=1"], capsys, "401", "/datasets/kjj0/", "HF_TOKEN", main=fineweb.main)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert fineweb.main(["--shards=1"]) == 0  # and the content host asserts that it sees none


def test_errors_that_will_not_pass(hub, capsys, monkeypatch):
    fails(["--shards=3"], capsys, "404", "fineweb_train_000003.bin", "HF_ENDPOINT", main=fineweb.main)
    fails(["-t=edu", "-v=100B"], capsys, "--tokenize", main=fineweb.main)
    hub.faults["/datasets/"] = ["html"] * 1000
    fails(["--shards=1"], capsys, "web page", "fineweb_", main=fineweb.main)
    hub.faults["/datasets/"] = [503] * 1000
    fails(["--shards=1"], capsys, "503", "HF_ENDPOINT", main=fineweb.main)
    hub.faults["/datasets/"] = []
    hub.faults["/blob/"] = ["flip"] * 1000
    fails(["--shards=1"], capsys, "sha256", "times in a row", main=fineweb.main)
    hub.faults["/blob/"] = []
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    fails(["--shards=1"], capsys, "refused", f"127.0.0.1:{port}", "HF_ENDPOINT", main=fineweb.main)
    monkeypatch.setenv("HF_ENDPOINT", "not an address")
    fails(["--shards=1"], capsys, "not an address", "HF_ENDPOINT", main=fineweb.main)


def test_a_renamed_dataset_is_followed(hub, monkeypatch):
    """The hub redirects an old name to the new one, on itself; a circle of redirects is an error, not a hang."""
    name = "kjj0/fineweb10B-gpt2/fineweb_val_000000.bin"
    real = Handler.do_GET
    def do_GET(self):
        if "/old/" in self.path:
            return self.answer(307, b"", Location=self.path.replace("/old/", "/kjj0/"))
        if "/circle/" in self.path:
            return self.answer(307, b"", Location=self.path)
        real(self)
    monkeypatch.setattr(Handler, "do_GET", do_GET)
    download = fineweb.Download(f"{fineweb.hub()}/datasets/old/fineweb10B-gpt2/resolve/main/fineweb_val_000000.bin", Path("a.bin"))
    fineweb.prepare([download])
    assert list(fineweb.fetched([download])) == [Path("a.bin")] and Path("a.bin").read_bytes() == hub.files[name]
    assert download.sha256 == hashlib.sha256(hub.files[name]).hexdigest()
    with pytest.raises(fineweb.requests.ConnectionError):
        fineweb.probe(fineweb.Download(f"{fineweb.hub()}/circle/x", Path("b.bin")))


def test_disk_space_is_checked_first(hub, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: collections.namedtuple("usage", "free")(10_000_000))
    for name in hub.files:
        hub.files[name] += bytes(20_000_000)
    fails(["--shards=2"], capsys, "fineweb10B", "0.05 GB of disk space are missing", "--shards", main=fineweb.main)
    assert not [p for p, _ in hub.log if "/blob/" in p]


def test_a_disk_that_fills_up_all_the_same(hub, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10000, hard))
    try:
        fails(["--shards=1"], capsys, "fineweb10B: ", "goes on from here", main=fineweb.main)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert fineweb.main(["--shards=2"]) == 0 and downloaded(hub)


def start_fineweb(*args, code="pass"):
    """fineweb.py in a process of its own, after some code has changed its constants."""
    code = f"import os, sys; sys.path.insert(0, {str(Path(SCRIPT).parent)!r}); import fineweb; fineweb.PIECE = 2000; {code}; os._exit(fineweb.main(sys.argv[1:]))"
    return subprocess.Popen([sys.executable, "-c", code, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("terminal", [False, True], ids=["file", "terminal"])
def test_progress_line(terminal, monkeypatch, capsys):
    """A new line each minute in a file, the same line twice a second in a terminal; rate and time left of what goes on now."""
    clock = [1000.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    meter = fineweb.Meter(20_000_000_000)
    for i in range(1, 791):  # 79 seconds at 20 MB/s
        clock[0] += 0.1
        meter.show(2_000_000 * i)
    out = capsys.readouterr().out
    assert out.count("\r") == out.count("min left") * terminal and out.count("\n") == out.count("min left") * (not terminal)
    assert 120 < out.count("min left") < 160 if terminal else out.count("min left") == 1
    assert re.search(r"1\.\d\d of 20\.00 GB \| 20\.0 MB/s \| 15\.\d min left", out)


def test_downloads_survive_kill_at_any_moment(hub):
    hub.speed, rng = 300, np.random.default_rng(0)
    wholes = {name.split("/")[-1]: body for name, body in hub.files.items()}
    for i in range(6):
        process = start_fineweb("--shards=2")
        before = len(hub.log)
        wait_for(lambda: [p for p, _ in hub.log[before:] if "/blob/" in p] or process.poll() is not None, [])
        time.sleep(rng.uniform(0, 0.25))
        process.kill()
        process.communicate()
        for path in Path("fineweb10B").glob("*.bin"):
            assert path.read_bytes() == wholes[path.name]
    hub.speed = None
    assert any(asked for _, asked in hub.log)  # something was resumed
    assert fineweb.main(["--shards=2"]) == 0 and downloaded(hub)


def test_ctrl_c_says_how_to_go_on(hub):
    hub.speed = 50
    process = start_fineweb("--shards=2")
    wait_for(lambda: any("/blob/" in p for p, _ in hub.log), [process])
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "the same command goes on from here" in out and not err


# ---------------------------------------------------------------------------------------------------------------------
# fineweb.py: from documents to shards

@pytest.fixture
def bpe():
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("TIKTOKEN_CACHE_DIR is not set, and tests do not download GPT-2's vocabulary")
    import tiktoken
    return tiktoken.get_encoding("gpt2")


TEXTS = ["plain words, and more of them\n", "<|endoftext|> is no token in a text<|endoftext|>", "naïve 🙂 中文 \u0301\r\n\ttab   spaces   ",
         "", " ", "\n\n\n a\n\nb \n", "def f(x):\n    return x**2\n" * 20, "it's we'll " * 30, "a" * 300, " \u3000\u00a0\u2028 x\x1cy"]


def numbered(n):
    """n documents, all different."""
    return [f"{i}: {TEXTS[i % len(TEXTS)]}" if i % 7 else f"{i}" for i in range(n)]


def documents_in(bpe, pattern):
    """The documents of shards, in the order of their numbers, decoded. Each shard but the last must be full."""
    shards = [np.array(train_gpt2.read_shard(path)) for path in sorted(Path().glob(pattern), key=lambda path: path.name[-10:])]
    assert shards and all(len(s) == fineweb.SHARD_TOKENS for s in shards[:-1]) and len(shards[-1]) <= fineweb.SHARD_TOKENS
    tokens = np.concatenate(shards)
    assert tokens[0] == fineweb.EOT
    return [bpe.decode(part[1:]) for part in np.split(tokens, np.flatnonzero(tokens == fineweb.EOT)[1:])]


def write_parquet(path, texts, **kwargs):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "id": list(map(str, range(len(texts))))}), path, **kwargs)


def test_your_own_text_in_every_format(bpe, monkeypatch, capsys):
    """.txt, .jsonl and .parquet, packed, in folders: every document comes back letter for letter, in its order."""
    monkeypatch.setattr(fineweb, "SHARD_TOKENS", 200)
    monkeypatch.setattr(fineweb, "PIECE", 64)
    Path("books/deep").mkdir(parents=True)
    for i, text in enumerate(TEXTS):
        Path(f"books/{i}.txt").write_bytes(text.encode())
    with gzip.open("books/deep/packed.txt.gz", "wb") as f:
        f.write(TEXTS[2].encode())
    Path("books/ignored.md").write_text("not one of the kinds")
    lines = [json.dumps({"id": 1, "text": t}, ensure_ascii=i % 2) for i, t in enumerate(numbered(40))]
    Path("lines.jsonl").write_bytes(("\n\n".join(lines) + "\n").encode("utf-8-sig"))
    with gzip.open("lines.jsonl.gz", "wb") as f:
        f.write(b'{"text": "half \\ud83d of one"}')
    write_parquet("rows.parquet", numbered(90)[40:], row_group_size=7)
    assert fineweb.main("--input books lines.jsonl lines.jsonl.gz rows.parquet books/1.txt --out mine --val_share 0.2".split()) == 0
    val, train = documents_in(bpe, "mine/mine_val_*.bin"), documents_in(bpe, "mine/mine_train_*.bin")
    wanted = TEXTS + [TEXTS[2]] + numbered(40) + ["half \ufffd of one"] + numbered(90)[40:]
    assert sorted(val + train) == sorted(wanted)
    for part in (val, train):  # in order: a walk through wanted meets them all
        walk = iter(wanted)
        assert all(text in walk for text in part)
    assert val[0] == TEXTS[0] and 5 < len(val) < 40
    assert len(list(Path("mine").glob("mine_train_*.bin"))) > 5 and Path("mine/mine_train_000001.bin").exists()
    assert "--input_bin 'mine/mine_train_*.bin' --input_val_bin 'mine/mine_val_*.bin'" in capsys.readouterr().out


def test_a_long_text_is_cut_without_changing_its_tokens(bpe, monkeypatch):
    """Whatever the sizes of the pieces, their tokens are those of the whole text."""
    rng, alphabet = np.random.default_rng(0), list("ab1.!'\"\n\t    é的\u00a0\u3000\x1c\x85🙂sdtlvre")
    text = "".join(rng.choice(alphabet, 5000))
    Path("a.txt").write_text(text, newline="")
    Path("b.txt").write_text("b")
    for size in (2, 3, 10, 64, 10000):
        monkeypatch.setattr(fineweb, "PIECE", size)
        pieces = list(fineweb.read_documents(Path("a.txt")))
        assert "".join(p[1] for p in pieces) == text and [p[0] for p in pieces] == [True] + [False] * (len(pieces) - 1)
        assert sum((bpe.encode_ordinary(p[1]) for p in pieces), []) == bpe.encode_ordinary(text)
        assert (len(pieces) > 20) == (size < 100)


def test_held_out_by_document(bpe, monkeypatch):
    """The stated share, whole documents, the same text always on the same side, and one at least."""
    texts = numbered(3000)
    Path("a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts * 2))
    fineweb.main("--input a.jsonl --out a --val_share 0.2".split())
    val, train = documents_in(bpe, "a/*_val_*.bin"), documents_in(bpe, "a/*_train_*.bin")
    assert abs(len(val) / 6000 - 0.2) < 0.03 and len(val) + len(train) == 6000  # 4 standard deviations
    assert not set(val[1:]) & set(train)
    for i, text in enumerate("one two".split()):
        Path(f"{i}.txt").write_text(text)
    fineweb.main("--input 0.txt 1.txt --out b --val_share 0.0001".split())
    assert documents_in(bpe, "b/*_val_*.bin") == ["one"] and documents_in(bpe, "b/*_train_*.bin") == ["two"]


@pytest.fixture
def raw_hub(hub, monkeypatch):
    """HuggingFaceFW/fineweb with three parquet files of 120 documents each, and the shards that they must become."""
    monkeypatch.setattr(fineweb, "SHARD_TOKENS", 1000)
    hub.page, hub.texts = 2, numbered(360)
    for i in range(3):
        write_parquet("made.parquet", hub.texts[120 * i:120 * (i + 1)], row_group_size=50)
        hub.files[f"HuggingFaceFW/fineweb/sample/10BT/00{i}_00000.parquet"] = Path("made.parquet").read_bytes()
    Path("made.parquet").unlink()
    return hub


def wanted_shards(bpe, texts):
    """{name: tokens}, made one document at a time."""
    stream = np.array([t for text in texts for t in (50256, *bpe.encode_ordinary(text))])
    return {f"fineweb_{'train' if i else 'val'}_{i:06d}.bin": list(stream[1000 * i:1000 * (i + 1)]) for i in range(-(-len(stream) // 1000))}


def made(folder="fineweb10B"):
    return {path.name: list(train_gpt2.read_shard(path)) for path in Path(folder).glob("*.bin")}


def test_raw_text_is_tokenised_into_llmc_shards(bpe, raw_hub, monkeypatch, capsys):
    wanted = wanted_shards(bpe, raw_hub.texts)
    assert len(wanted) > 10
    assert fineweb.main(["--tokenize", "--cores=3"]) == 0 and made() == wanted
    assert not list(Path("fineweb10B").glob("*.tmp")) and TokenLoader(DEFAULTS["input_bin"], 99, 50257).total > 0
    assert fineweb.main(["--tokenize"]) == 0 and made() == wanted  # again: nothing to do
    monkeypatch.setattr(fineweb, "PIECE", 100)
    for cores in (1, 2, 8):
        assert fineweb.main(["--tokenize", f"--cores={cores}", f"--out=out{cores}"]) == 0 and made(f"out{cores}") == wanted


def test_tokenising_goes_on_where_it_was(bpe, raw_hub, capsys):
    """Shards that are there are not made again, though documents go across their borders; damaged ones are."""
    wanted = wanted_shards(bpe, raw_hub.texts)
    for n in (1, 3, 4):
        assert fineweb.main(["--tokenize", f"--shards={n}"]) == 0
        assert made() == {name: wanted[name] for name in sorted(wanted, key=lambda name: name[-10:])[:n + 1]}
    times = {path: path.stat().st_mtime_ns for path in Path("fineweb10B").glob("*.bin")}
    capsys.readouterr()
    assert fineweb.main(["--tokenize"]) == 0 and made() == wanted
    assert all(path.stat().st_mtime_ns == t for path, t in times.items())
    tokens = int(re.search(r"([\d,]+) tokens in", capsys.readouterr().out)[1].replace(",", ""))
    assert tokens < sum(map(len, wanted.values())) - 4500
    path = Path("fineweb10B/fineweb_train_000003.bin")
    path.write_bytes(path.read_bytes()[:-1])
    assert fineweb.main(["--tokenize"]) == 0 and made() == wanted


def test_tokenising_survives_kill_at_any_moment(bpe, raw_hub, monkeypatch):
    monkeypatch.setattr(fineweb, "SHARD_TOKENS", 1000)
    wanted, rng, code = wanted_shards(bpe, raw_hub.texts), np.random.default_rng(0), "import time; fineweb.SHARD_TOKENS = 1000"
    code += "; write = fineweb.ShardWriter.write; fineweb.ShardWriter.write = lambda *args: (time.sleep(0.002), write(*args))"
    counts = []
    for i in range(6):
        process = start_fineweb("--tokenize", code=code)
        wait_for(lambda: len(list(Path("fineweb10B").glob("*.bin"))) > (counts or [0])[-1] or process.poll() is not None, [])
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        process.communicate()
        there = made()
        assert all(there[name] == wanted[name] for name in there)
        counts.append(len(there))
    assert 0 < counts[0] < counts[2]
    assert fineweb.main(["--tokenize"]) == 0 and made() == wanted


@pytest.mark.parametrize("name, content, messages", [
    ("bad.jsonl", b'{"text": "a"}\n{"text": "b"\n', ["bad.jsonl", "row 2"]),
    ("bad.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', ["bad.jsonl", "row 2", '"text"']),
    ("bad.jsonl", b'{"text": "a"}\n{"text": null}\n', ["bad.jsonl", "row 2", "None"]),
    ("bad.jsonl", b'["a"]\n', ["bad.jsonl", "row 1"]),
    ("bad.txt", b"caf\xe9 in another encoding", ["bad.txt", "utf-8"]),
    ("bad.txt.gz", gzip.compress(b"a" * 1000)[:-20], ["bad.txt.gz", "damaged"]),
    ("bad.txt.gz", b"no gzip at all", ["bad.txt.gz", "gzip"]),
    ("bad.jsonl.gz", gzip.compress(bytes(range(256)) * 99)[:40] + b"?" * 40, ["bad.jsonl.gz", "damaged"]),
    ("bad.parquet", b"PAR1 and then nothing", ["bad.parquet", "damaged"]),
    ("bad.md", b"words", ["bad.md", ".jsonl"]),
    ("bad.txt", None, ["bad.txt", "no such file"]),
])
def test_bad_input(name, content, messages, bpe, capsys):
    if name == "bad.parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    Path("good.txt").write_text("good")
    if content is not None:
        Path(name).write_bytes(content)
    fails(["--input", "good.txt", name, "--out=mine"], capsys, *messages, main=fineweb.main)
    assert not list(Path("mine").glob("*.bin"))


def test_bad_ways_to_call_fineweb(bpe, capsys, monkeypatch):
    Path("a.txt").write_text("only one")
    Path("empty").mkdir()
    for argv, *messages in (
            (["--input", "a.txt"], "--out"), (["--input", "empty", "--out=o"], "empty", ".txt"), (["--val_share=1"], "--val_share"),
            (["--cores=0"], "--cores"), (["--shards=-1"], "--shards"), (["-v=1T"], "1T"), (["--colour=red"], "--colour"),
            (["--input", "a.txt", "--out=o"], "1 documents cannot be divided")):
        fails(argv, capsys, *messages, main=fineweb.main)
    write_parquet("b.parquet", ["x"])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    fails(["--input", "b.parquet", "--out=o"], capsys, "b.parquet", "pip install pyarrow", main=fineweb.main)


def test_shards_of_two_sources_are_never_mixed(bpe, hub, capsys):
    for name in ("a", "b", "c"):
        Path(f"{name}.txt").write_text(name)
    fineweb.main("--input a.txt b.txt --out mine".split())
    before = {path: path.read_bytes() for path in Path("mine").iterdir()}
    for argv in ("--input a.txt c.txt", "--input a.txt b.txt --val_share 0.5", "--shards 1", "--tokenize"):
        fails([*argv.split(), "--out=mine"], capsys, "mine holds shards of another source", "--out", main=fineweb.main)
    assert {path: path.read_bytes() for path in Path("mine").iterdir()} == before
    fineweb.main(["--shards=1"])
    fails(["--tokenize"], capsys, "fineweb10B holds shards of another source", main=fineweb.main)


def test_no_vocabulary_is_one_line(hub, capsys, monkeypatch):
    import tiktoken
    def get_encoding(name):
        raise fineweb.requests.ConnectionError("no route")
    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    for name in ("a", "b"):
        Path(f"{name}.txt").write_text(name)
    fails("--input a.txt b.txt --out mine".split(), capsys, "no route", "TIKTOKEN_CACHE_DIR", main=fineweb.main)


def test_real_text_from_the_hub_and_back(bpe, hub, monkeypatch):
    """FINEWEB_SAMPLE names a folder with parquet files in FineWeb's layout, to be served as the hub serves them."""
    pyarrow = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    if "FINEWEB_SAMPLE" not in os.environ:
        pytest.skip("FINEWEB_SAMPLE is not set: no parquet files in FineWeb's layout")
    texts = []
    for path in sorted(Path(os.environ["FINEWEB_SAMPLE"]).rglob("*.parquet")):
        hub.files[f"HuggingFaceFW/fineweb/sample/10BT/{path.name}"] = path.read_bytes()
        texts += pyarrow.read_table(path, columns=["text"]).column(0).to_pylist()
    monkeypatch.setattr(fineweb, "SHARD_TOKENS", 1_000_000)
    monkeypatch.setattr(fineweb, "PIECE", 1 << 20)
    hub.faults["/blob/"] = ["cut", "flip"]
    assert fineweb.main(["--tokenize"]) == 0
    assert documents_in(bpe, "fineweb10B/*.bin") == texts


# ---------------------------------------------------------------------------------------------------------------------
# hellaswag.py

def questions(n, seed=0, length=40):
    """n made questions, as bytes: contexts and endings of many lengths."""
    rng = np.random.default_rng(seed)
    text = lambda longest: "".join(rng.choice(list("abc de. "), rng.integers(1, longest))).strip() or "x"
    return [dict(activity_label="Doing", ctx=text(length), endings=[text(length) for _ in range(4)], label=int(rng.integers(4)))
            for _ in range(n)]


def plain_log_probs(model, items):
    """The reference: one ending at a time, after its context, all logits."""
    rows = []
    for context, endings, *_ in items:
        for ending in endings:
            x = torch.tensor([context + ending])
            logp = model(x[:, :-1]).log_softmax(-1)[0, len(context) - 1:]
            rows.append(logp.gather(1, x[0, len(context):, None]).sum().item())
    return np.array(rows).reshape(-1, 4)


def no_autocast():
    return torch.autocast("cpu", enabled=False)


def encode_all(qs, model, **kwargs):
    return [hellaswag.encode_question(q, lambda text: list(text.encode()), model.config.block_size, **kwargs) for q in qs]


@pytest.mark.parametrize("arch", [dict(n_kv_head=4, **GPT2), dict(), dict(qk_norm=True)], ids=["GPT-2", "Llama", "Qwen3"])
def test_endings_that_share_a_context_score_as_if_alone(arch):
    model = tiny_model(vocab_size=257, block_size=96, **arch)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
        items = encode_all(questions(50), model)
        ours = hellaswag.answer(model, items, no_autocast)
        assert np.abs(ours - plain_log_probs(model, items)).max() < 1e-3 and ours.std() > 10
        one_by_one = np.concatenate([hellaswag.answer(model, [item], no_autocast) for item in items])
        assert np.abs(ours - one_by_one).max() < 1e-3  # so the order of the answers is that of the questions


def test_a_short_memory_sees_what_fits():
    """Contexts lose their beginning and endings their end, and nothing is read beyond block_size."""
    model = tiny_model(vocab_size=257, block_size=16)
    with torch.no_grad():
        items = encode_all(questions(15) + questions(15, length=10), model)
        assert all(len(c) >= 1 and len(c) + max(map(len, es)) - 1 <= 16 for c, es, *_ in items)
        assert max(len(e) for _, es, *_ in items for e in es) == 16 and max(len(c) for c, *_ in items) > 5
        assert np.abs(hellaswag.answer(model, items, no_autocast) - plain_log_probs(model, items)).max() < 1e-3
    q = dict(ctx="0123456789", endings=["abc"] * 4, label=0)
    assert bytes(encode_all([q], model)[0][1][3]) == b" abc"  # the space belongs to the ending, as in its first token
    assert bytes(encode_all([q], model)[0][0]) == b"0123456789" and bytes(encode_all([dict(q, ctx="0123456789" * 2)], model)[0][0]) == b"7890123456789"


def test_accuracy_by_sum_and_by_mean():
    items = [(None, None, [1, 2, 4, 1], 2), (None, None, [1, 1, 1, 1], 0)]
    logp = np.array([[-3.0, -3, -4, -9], [-1, -2, -3, -4]])
    assert hellaswag.accuracy(logp, items) == (0.5, 1.0)
    assert np.allclose(hellaswag.interval(0.2955, 10042), (0.2866, 0.3045), atol=1e-4)
    assert hellaswag.interval(0, 1)[1] > 0.7  # one question says little


def test_questions_are_prepared_as_the_harness_does():
    """Worked out by hand from lm-evaluation-harness's task hellaswag, version 1."""
    q = dict(activity_label="Hair", ctx="not used", ctx_a="He sits. [title] Then", ctx_b="he LAUGHS [step] ", label="1",
             endings=[" and  goes.", "[substeps] x", "a [b] c", "end [step]"])
    model = tiny_model(vocab_size=257, block_size=96)
    context, endings, norms, label = hellaswag.encode_question(q, lambda text: list(text.encode()), 96, harness=True)
    assert bytes(context) == b"Hair: He sits.. Then He laughs"  # capitalize() lowers the rest; the space goes to the endings
    assert list(map(bytes, endings)) == [b"  and goes.", b"   x", b"  a c", b"  end "] and norms == [9, 2, 3, 4] and label == "1"
    assert len(encode_all([dict(q, label=1, ctx_a="a", ctx_b="b")], model)[0][1]) == 4


def write_questions(path, qs):
    Path(path).write_text("".join(json.dumps(q) + "\n" for q in qs))


def byte_checkpoint(path, **changes):
    model = tiny_model(vocab_size=257, block_size=96, **changes)
    torch.save(dict(config=train_gpt2.asdict(model.config), model=model.state_dict(), tokenizer="bytes", args={}), path)
    return model


def test_hellaswag_command(capsys):
    model, qs = byte_checkpoint("model.pt"), questions(40)
    write_questions("q.jsonl", qs)
    assert hellaswag.main("-m model.pt --data q.jsonl --limit 30 --dtype float32 --device cpu --examples 2".split()) == 0
    out = capsys.readouterr().out
    with torch.no_grad():
        items = encode_all(qs[:30], model)
        acc, acc_norm = hellaswag.accuracy(plain_log_probs(model, items), items)
    assert f"acc      {acc:.4f} (" in out and f"acc_norm {acc_norm:.4f} (" in out and "30 of 30 questions" in out
    assert qs[1]["ctx"] in out and out.count("right, ") == 2 and out.count("chosen, ") == 2
    assert all(figure in out for figure in ("29.4", "30.78", "33.52", "33.7"))
    assert hellaswag.main("-m model.pt --data q.jsonl --harness --examples 0".split()) == 0


@pytest.mark.parametrize("content, messages", [
    ("", ["q.jsonl", "0 questions"]), ("not json\n", ["q.jsonl, line 1"]), ('["a"]\n', ["line 1"]),
    ('{"ctx": "a", "endings": ["b", "c", "d"], "label": 0}\n', ["line 1", "four endings"]),
    ('{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 4}\n', ["line 1", "label"]),
    ('{"ctx": "a", "endings": ["b", "c", "d", "e"]}\n', ["line 1"]), ('{"ctx": "a", "endings": ["b", "c", "d", 5], "label": 1}\n', ["line 1"]),
    ('{"ctx": " ", "endings": ["b", "c", "d", "e"], "label": 1}\n', ["line 1"]), (None, ["q.jsonl", "cannot be read"])])
def test_bad_questions(content, messages, capsys):
    byte_checkpoint("model.pt")
    if content is not None:
        Path("q.jsonl").write_text(content)
    fails(["-m", "model.pt", "--data", "q.jsonl"], capsys, *messages, main=hellaswag.main)


def test_bad_ways_to_call_hellaswag(capsys):
    byte_checkpoint("model.pt")
    fails(["-m", "model.pt", "--limit=0"], capsys, "--limit 0", main=hellaswag.main)
    fails(["-m", "nowhere.pt"], capsys, "nowhere.pt is no checkpoint", main=hellaswag.main)
    fails(["--limit=5"], capsys, "-m/--model", main=hellaswag.main)
    write_questions("q.jsonl", [{k: v for k, v in questions(1)[0].items() if k != "activity_label"}])
    fails(["-m", "model.pt", "--data", "q.jsonl", "--harness"], capsys, "--harness", "activity_label", "q.jsonl", main=hellaswag.main)
    fails(["-m", "model.pt", "--no_such_flag"], capsys, "--no_such_flag", main=hellaswag.main)


def test_the_questions_are_downloaded_once(hub, monkeypatch, capsys):
    byte_checkpoint("model.pt")
    write_questions("q.jsonl", questions(20))
    monkeypatch.setattr(hellaswag, "DATA_URL", f"{fineweb.hub()}/blob/q.jsonl")  # GitHub: no redirect, no checksum
    monkeypatch.setattr(hellaswag, "SIZE", 20)
    hub.files["q.jsonl"] = Path("q.jsonl").read_bytes()
    hub.faults["q.jsonl"] = [None, "cut", 503]
    for _ in range(2):
        assert hellaswag.main(["-m", "model.pt"]) == 0
    assert len(hub.log) == 4 and Path("hellaswag/hellaswag_val.jsonl").read_bytes() == hub.files["q.jsonl"]
    monkeypatch.setattr(hellaswag, "SIZE", 21)
    fails(["-m", "model.pt"], capsys, "has 20 questions", "remove it", main=hellaswag.main)
    monkeypatch.setattr(hellaswag, "DATA", Path("elsewhere.jsonl"))
    hub.files.clear()
    monkeypatch.setattr(hellaswag, "DATA_URL", f"{fineweb.hub()}/datasets/a/b/resolve/main/gone")
    fails(["-m", "model.pt"], capsys, "404", "gone", main=hellaswag.main)


def test_real_questions_get_the_answers_of_the_plain_loop(bpe):
    """The first 500 of HELLASWAG_VAL, in fp32."""
    if "HELLASWAG_VAL" not in os.environ:
        pytest.skip("HELLASWAG_VAL is not set: no file of HellaSwag's validation questions")
    model = tiny_model(vocab_size=50257, block_size=256)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(30)
        items = [hellaswag.encode_question(q, bpe.encode_ordinary, 256) for q in hellaswag.load_questions(os.environ["HELLASWAG_VAL"])[:500]]
        ours, plain = hellaswag.answer(model, items, no_autocast), plain_log_probs(model, items)
    norms = np.array([norms for _, _, norms, _ in items])
    assert (ours.argmax(1) == plain.argmax(1)).all() and ((ours / norms).argmax(1) == (plain / norms).argmax(1)).all()
    assert len(set((ours / norms).argmax(1))) == 4


@pytest.fixture
def quiz(monkeypatch):
    """30 made questions where the default file belongs."""
    Path("hellaswag").mkdir()
    write_questions(hellaswag.DATA, questions(30, length=12))
    monkeypatch.setattr(hellaswag, "SIZE", 30)


def test_hellaswag_during_training(corpus, quiz, capsys):
    """llm.c's eval: lines, at the steps asked for and at the end, and the figure is the checkpoint's own."""
    main([*SMALL, *corpus, "--tokenizer=bytes", "--hellaswag_every=4", "--save_every=4", "--output_dir=log"])
    evals = log_of("log", "eval")
    assert list(evals) == [0, 4, 6]
    capsys.readouterr()
    hellaswag.main("-m log/last.pt --dtype float32 --examples 0".split())
    assert f"acc_norm {evals[6]:.4f}" in capsys.readouterr().out


def test_two_processes_share_the_questions(corpus):
    Path("hellaswag").mkdir()
    write_questions(hellaswag.DATA, questions(31, length=12))
    Path("run.py").write_text(f"import sys; sys.path.insert(0, {str(Path(SCRIPT).parent)!r}); import hellaswag, train_gpt2; "
                              "hellaswag.SIZE = 31; sys.exit(train_gpt2.main(sys.argv[1:]))")
    flags = [*SMALL, *corpus, "--tokenizer=bytes", "--hellaswag_every=3"]
    for n in (1, 2):
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", "run.py", *flags,
                               f"--output_dir=log{n}"], capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
    assert list(log_of("log1", "eval")) == [0, 3, 6] and log_of("log1", "eval") == log_of("log2", "eval")


# ---------------------------------------------------------------------------------------------------------------------
# OpenAI's weights, and export

@pytest.fixture
def openai_hub(hub, monkeypatch):
    """A small random GPT-2 where OpenAI's is, in the layout of its file."""
    transformers = pytest.importorskip("transformers", reason="the transformers library is not installed")
    torch.manual_seed(0)
    hub.theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=48, n_layer=2, n_head=3, n_positions=64)).eval()
    with torch.no_grad():
        for p in hub.theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    tensors = {name: w for name, w in hub.theirs.transformer.state_dict().items()}
    for i in range(2):
        tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()  # a mask, which the real file has too
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, w in tensors.items():
        data = w.contiguous().numpy().tobytes()
        header[name] = dict(dtype="F32", shape=list(w.shape), data_offsets=[len(body), len(body) + len(data)])
        body += data
    head = json.dumps(header).encode()
    hub.weights = "openai-community/gpt2/model.safetensors"
    hub.files[hub.weights] = len(head).to_bytes(8, "little") + head + body
    monkeypatch.setitem(MODELS, "gpt2", dict(MODELS["gpt2"], n_layer=2, n_head=3, n_embd=48))
    monkeypatch.setattr(fineweb, "PIECE", 1 << 16)
    return hub


def test_openai_weights(openai_hub, bpe, capsys):
    """Downloaded once, over a bad line; the logits are those of transformers; sampling works."""
    openai_hub.faults["/blob/"] = ["cut", "flip", 503]
    checkpoint = train_gpt2.load_checkpoint("gpt2")
    model = GPT(GPTConfig(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    x = torch.randint(0, 50257, (2, 64))
    with torch.no_grad():
        ours, theirs = model(x)[..., :50257], openai_hub.theirs(x).logits
    assert (ours - theirs).abs().max() < 1e-4 < 0.5 < ours.std()
    openai_hub.log.clear()
    main(["--sample=gpt2", "--prompt=Hello", "--max_new_tokens=5", "--device=cpu"])
    assert capsys.readouterr().out.splitlines()[-1].startswith("Hello") and not openai_hub.log
    Path("openai/gpt2.safetensors").write_bytes(b"broken file")
    fails(["--sample=gpt2"], capsys, "openai/gpt2.safetensors", "remove it")


def test_finetuning_starts_from_openai_weights(openai_hub, capsys):
    """The loss at step 0 is that of OpenAI's model, and a resumed run goes on from its own weights."""
    write_shard("tokens.bin", np.random.default_rng(0).integers(0, 50257, 3000))
    flags = ["--model=gpt2", "--input_bin=tokens.bin", "--input_val_bin=tokens.bin", "--sequence_length=32", "--total_batch_size=128",
             "--num_iterations=2", "--val_tokens=640", "--sample_every=0", "--device=cpu", "--dtype=float32", "--output_dir=log"]
    main(flags)
    x, y = TokenLoader("tokens.bin", 32, 50257).batch(0, 20, CPU)
    with torch.no_grad():
        loss = F.cross_entropy(openai_hub.theirs(x).logits.flatten(0, 1), y.flatten()).item()
    assert abs(log_of("log", "tel")[0] - loss) < 1e-4
    state = torch.load("log/last.pt", weights_only=True)
    assert state["model"]["transformer.wpe.weight"].shape == (32, 48) and state["args"]["arch"] == "gpt2"
    main([*flags, "--resume", "--num_iterations=4"])
    assert list(log_of("log")) == [0, 1, 2, 3]
    for flag in ("--n_layer=3", "--sequence_length=128", "--arch=variant", "--norm=rmsnorm"):
        fails([*flags, flag, "--output_dir=other"], capsys, "--model gpt2", "at most 1024 tokens", "drop the flags")


EXPORTS = {"tiny": dict(vocab_size=257, qk_norm=True, n_layer=4, n_embd=128, block_size=128), "d12": dict(vocab_size=50257, n_head=6, n_kv_head=3, n_embd=96),
           "gpt2": dict(vocab_size=50257, n_kv_head=4, **GPT2)}


@pytest.fixture(params=EXPORTS)
def exported(request, capsys):
    """(our model, the exported folder opened by transformers, its tokenizer, our name of the tokenizer)"""
    transformers = pytest.importorskip("transformers", reason="the transformers library is not installed")
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    name = "bytes" if request.param == "tiny" else "gpt2"
    if name == "gpt2":
        request.getfixturevalue("bpe")
    model = tiny_model(**{**dict(block_size=64), **EXPORTS[request.param]})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    torch.save(dict(config=train_gpt2.asdict(model.config), model=model.state_dict(), tokenizer=name, args={}), "model.pt")
    assert main(["--export", "model.pt", "out"]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained("out").eval()
    return model, theirs, transformers.AutoTokenizer.from_pretrained("out"), name


def test_exported_models_are_the_same_elsewhere(exported, capsys):
    """Logits to 1e-4 and greedy text token for token, with classes that transformers has of its own; nothing is overwritten."""
    model, theirs, tokenizer, name = exported
    V = model.config.vocab_size
    x = torch.randint(0, V - 1, (3, 48))
    with torch.no_grad():
        ours = model(x)[..., :V]
        assert (ours - theirs(x).logits).abs().max() < 1e-4 < 0.5 < ours.std()
        greedy = list(train_gpt2.generate(model, x[0, :5].tolist(), 30, temperature=0))
        text = theirs.generate(x[:1, :5], max_new_tokens=len(greedy), do_sample=False)[0, 5:].tolist()
    assert greedy == text and len(greedy) > 3
    assert theirs.num_parameters() < model.num_params()[0] + 1 and "auto_map" not in Path("out/config.json").read_text()
    fails(["--export", "model.pt", "out"], capsys, "out is there already")


def varied_strings():
    rng, parts = np.random.default_rng(0), ["hello", " world", "   ", "\n\n", "\t", "naïve", "中文字", "🙂👩‍👩‍👧", "<|endoftext|>", "it's", "don't", "1234567",
                                            "\u00a0", "é", "...!?", "def f(x):\n        return", " \u3000 ", "\r\n", "Ünïcödé", "a" * 50, "\x00\x7f", "ﬁ", "العربية", ""]
    return parts + ["".join(rng.choice(parts, rng.integers(2, 8))) for _ in range(200)]


def test_exported_tokenizers_agree_with_ours(exported, bpe):
    *_, tokenizer, name = exported
    for text in varied_strings():
        ids = tokenizer(text)["input_ids"]
        if name == "gpt2":
            assert ids == bpe.encode(text, allowed_special="all"), text
        else:
            assert ids == [i for k, part in enumerate(text.split("<|endoftext|>")) for i in [256] * (k > 0) + list(part.encode())], text
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert tokenizer.eos_token_id == len(tokenizer) - 1 and len(tokenizer) == train_gpt2.VOCAB_SIZE[name]


def test_what_cannot_be_exported(capsys, monkeypatch):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    byte_checkpoint("model.pt", norm="layernorm")
    fails(["--export", "model.pt", "out"], capsys, "layernorm", "--arch gpt2")
    fails(["--export", "nowhere.pt", "out"], capsys, "nowhere.pt")
    fails(["--export", "model.pt"], capsys, "--export")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    fails(["--export", "model.pt", "out"], capsys, "pip install safetensors")
    assert not Path("out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The report, and what the documents say

ROOT = Path(SCRIPT).parent
sys.path.append(str(ROOT / "report"))
DOCUMENTS = [ROOT / "README.md", ROOT / "report" / "README.md"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_links_lead_somewhere(document):
    """Every relative link is to a file that is there; one to a line is to the line that its text names, one to a heading to one."""
    links = re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", document.read_text())
    links = [(text, link) for text, link in links if "://" not in link]
    assert links
    for text, link in links:
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), f"{document}: {link}"
        if re.fullmatch(r"L\d+", anchor):
            assert text.strip("`") in target.read_text().splitlines()[int(anchor[1:]) - 1], f"{document}: {text} is not in {link}"
        elif anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings], link


def commands():
    """(document, script, arguments) of every command in README.md, report/README.md and the scripts' own headings."""
    for document in (*DOCUMENTS, *(ROOT / "report").glob("*.py"), *ROOT.glob("*.py")):
        text = document.read_text()
        text = text if document.suffix == ".md" else text.split('"""')[1]
        for script, rest in re.findall(r"(?:python|torchrun)\b[^`\n|]*? ([\w./]+\.py)\b([^`\n|&)]*)", text):
            yield document, script, shlex.split(rest, comments=True)


def test_commands_are_understood(monkeypatch):
    """The script is there, and its own parser takes the arguments. (Nothing is run: parsing ends in an exception.)"""
    import ablation, bench, one_step, plot
    class Parsed(Exception):
        pass
    parse = argparse.ArgumentParser.parse_args
    def parse_and_stop(parser, argv):
        parse(parser, argv)
        raise Parsed
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(one_step, "main", lambda argv: argv == [] and parse_and_stop(argparse.ArgumentParser(), []))
    main_of = {"train_gpt2.py": main, "fineweb.py": fineweb.main, "hellaswag.py": hellaswag.main, "report/bench.py": bench.main,
               "report/plot.py": plot.main, "report/ablation.py": ablation.main, "report/one_step.py": one_step.main}
    seen = set()
    for document, script, argv in commands():
        if script == "llama.cpp/convert_hf_to_gguf.py":  # theirs
            continue
        assert script in main_of and (ROOT / script).exists(), f"{document.name}: {script}"
        with pytest.raises(Parsed if argv != ["--help"] else SystemExit):
            main_of[script](argv)
        seen.add(script)
    assert seen == set(main_of), "a script that no document shows"


def test_tables_agree_with_the_logs():
    """Every row of an ablation in README.md or report/README.md is what report/ablation.py makes of report/logs."""
    import ablation
    rows = {group: ablation.table(group).splitlines() for group in ("tiny", "small")}
    report = DOCUMENTS[1].read_text()
    assert all(len(table) > 5 and "\n".join(table) in report for table in rows.values())
    names = {what for what, *_ in ablation.RUNS.values()}
    for line in DOCUMENTS[0].read_text().splitlines():
        if line.startswith("|") and line.split("|")[1].strip() in names:
            assert any(line in table for table in rows.values()), f"README.md: {line}"


def test_logs_say_what_made_them():
    logs = list((ROOT / "report" / "logs").glob("*/*/main.log"))
    assert logs
    for log in logs:
        command, machine, first = log.read_text().splitlines()[:3]
        assert command.startswith("# python ") and re.match(r"# \d{4}-\d\d-\d\d, .*, torch \S+$", machine), log
        assert first.startswith("s:0 tel:") and log.stat().st_size < 20000, log


def test_ablation_makes_and_keeps_a_run(monkeypatch, corpus, capsys):
    """Trains, also under a patch, keeps the log under its heading, and does not train again what is there."""
    import ablation
    monkeypatch.setattr(ablation, "LOGS", Path("logs").resolve())
    monkeypatch.setitem(ablation.GROUPS, "tiny", (2, (1, 2), 4e-3, 2e-3, " ".join(["--model tiny", *SMALL])))
    data = [flag.split("=")[1] for flag in corpus]
    command = ["tiny", "--runs", "today", "rope_by_head", "--seeds", "1", "--jobs", "1", "--data", *data]
    ablation.main(command)
    kept = {path.parent.name: path.read_text() for path in Path("logs/tiny").glob("*/main.log")}
    assert kept.keys() == {"today.1", "rope_by_head.1"}
    assert kept["today.1"].startswith("# python train_gpt2.py --model tiny") and "--patched rope_by_head" in kept["rope_by_head.1"]
    losses = [re.findall(r"tel:(\S+)", text) for text in kept.values()]
    assert len(losses[0]) == 2 and losses[0] != losses[1]
    assert "| RoPE turned by head instead of by time | 2 |" in capsys.readouterr().out
    for name, curve in (("today", (10, 6, 4)), ("gpt2", (10, 9, 8)), ("adamw", (10, 9, 8.5))):
        Path(f"logs/tiny/{name}.1").mkdir(exist_ok=True)
        Path(f"logs/tiny/{name}.1/main.log").write_text("".join(f"s:{step} tel:{loss}\n" for step, loss in enumerate(curve)))
    ablation.main(command)
    out = capsys.readouterr().out
    assert "| the default | 2 | 4.000 |  | 25% | 1 |" in out  # half a step of two to get from 10 to 8
    assert "| AdamW instead of Muon | 2 | 8.500 | +4.500 | - | 1 |" in out and "(AdamW) | 2 | 8.000 | +4.000 | 100% | 1 |" in out


def test_ablations_patches(monkeypatch):
    """Each does what it says to the model."""
    import ablation
    for name in ("Block", "CausalSelfAttention", "GPT"):
        monkeypatch.setattr(getattr(train_gpt2, name), "__init__", getattr(train_gpt2, name).__init__)
    monkeypatch.setattr(train_gpt2, "apply_rope", train_gpt2.apply_rope)
    attention = lambda model: model.transformer.h[0].attn
    assert attention(tiny_model()).c_attn.weight.parts == [32, 16, 16]
    ablation.matrix_per_head()
    assert attention(tiny_model()).c_attn.weight.parts == [8] * 8
    ablation.whole_matrices()
    assert not hasattr(attention(tiny_model()).c_attn.weight, "parts")
    before = tiny_model()
    ablation.zero_projections()
    x = before.transformer.wte(torch.tensor([[1, 2, 3]]))
    assert torch.equal(tiny_model().transformer.h[0](x, None, None), x)
    ablation.untied_head()
    model = tiny_model()
    assert model.lm_head.weight is not model.transformer.wte.weight and (model.lm_head.weight == 0).all()
    ablation.rope_by_head()
    q = torch.randn(1, 1, 4, 8).expand(1, 5, 4, 8)  # the same query at five times
    turned = train_gpt2.apply_rope(q, *train_gpt2.rope_tables(5, 8))
    assert torch.equal(turned[:, 0], turned[:, 4]) and not torch.equal(turned[..., 1, :], q[..., 1, :])


def test_one_step_is_the_runs_first(capsys):
    """What report/one_step.py prints for the first step of the default run is what that run prints."""
    import one_step
    one_step.main()
    out = capsys.readouterr().out
    numbers = re.search(r"loss (\S+) \| lr (\S+) \| norm (\S+)$", out.strip()).groups()
    main("--num_iterations=1 --val_loss_every=0 --sample_every=0 --save_every=0 --device=cpu --output_dir=log".split())
    assert f"loss {numbers[0]} | lr {numbers[1]} | norm {numbers[2]} |" in capsys.readouterr().out
    assert f"HeadLoss {numbers[0]}, from the logits above {numbers[0]}" in out


def test_bench_measures_ours_and_a_peer(corpus, capsys):
    """One row for each contender. (What the rows say about time is for people, not for tests.)"""
    import bench
    Path("peer.py").write_text("""
import torch, dataclasses
@dataclasses.dataclass
class GPTConfig:
    n_layer: int = 1; n_head: int = 1; n_embd: int = 8; block_size: int = 8; vocab_size: int = 50257
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = torch.nn.Embedding(config.vocab_size, config.n_embd)
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate)
    def forward(self, idx, targets):
        logits = self.wte(idx) @ self.wte.weight.T
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
""")
    flags = "--n_layer=1 --n_embd=32 --total_batch_size=512 --batch_size=2 --device=cpu"
    bench.main([f"tiny {flags}", f"tiny {flags} --arch gpt2 --peer peer.py", "--steps", "2", "--warmup", "0"])
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| tiny")]
    assert len(rows) == 2 and "(2 x 128 x 2, " in rows[0][1] and float(rows[0][4]) == 1.0
    assert all(float(row[2]) > 0 and int(row[3].replace(",", "")) > 0 for row in rows)
    fails(["tiny --peer nowhere.py"], capsys, "--peer nowhere.py", "clone", main=bench.main)


def test_plot_draws_our_logs_and_llmcs(capsys):
    """One picture with the tokens, the losses and the scores of a run of ours and one of llm.c's."""
    pytest.importorskip("matplotlib", reason="matplotlib, which draws the report's figures, is not installed")
    import plot
    Path("llmc").mkdir()
    Path("llmc/main.log").write_text("s:0 tel:11.0\ns:0 eval:0.2500\ns:1 trl:10.9 lr:0.0001 norm:9\ns:250 tel:6.1\ns:500 tel:5.0\ns:500 eval:0.2955\n")
    ours = ROOT / "report" / "logs" / "tiny" / "today.1"
    run, theirs = plot.Run(ours), plot.Run("llmc")
    assert run.tokens == 2048 and theirs.tokens == 524288 and theirs.series["eval"] == ([0, 500], [0.25, 0.2955])
    ms = run.series["ms"]
    assert run.seconds([0, 1]) == pytest.approx([0, ms[1][0] / 1000])  # the first line is about step 0 alone
    assert run.seconds([11])[0] == pytest.approx(ms[1][0] / 1000 + ms[1][1] / 100)  # the next about ten steps
    plot.main([str(ours), "llmc", "--out", "both.svg"])
    svg = Path("both.svg").read_text()
    for text in ("today.1", "llmc", "million tokens", "seconds of training", "learning rate", "gradient norm", "HellaSwag", "GPT-3 124M"):
        assert text in svg, text
    plot.main([str(ours), "llmc", "--out", "again.svg"])
    assert Path("again.svg").read_text() == svg  # no date, no random names
    Path("empty").mkdir()
    Path("empty/main.log").write_text("\n")
    fails(["empty"], capsys, "nothing to draw", main=plot.main)
    fails(["nowhere"], capsys, "nowhere/main.log", "--output_dir", main=plot.main)


def test_plot_says_what_it_needs(capsys, monkeypatch):
    import plot
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    fails([str(ROOT / "report" / "logs" / "tiny" / "today.1")], capsys, "pip install matplotlib", main=plot.main)


def test_every_figure_of_the_report_is_there():
    """report/plot.py without arguments makes all that the report shows, out of logs that are there."""
    import plot
    shown = set(re.findall(r"\(([\w/]+\.svg)\)", DOCUMENTS[1].read_text()))
    assert shown == set(plot.FIGURES)
    for name, (group, runs, _) in plot.FIGURES.items():
        assert (ROOT / "report" / name).read_text().startswith("<?xml")
        assert all((ROOT / "report" / "logs" / group / f"{run}.1" / "main.log").exists() for run in runs)

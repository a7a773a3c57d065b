"""
How GPT-2 is trained, and how one would train it today: all of it, in one file, to be read from top to bottom.

    1 the model    2 the data    3 the optimiser    4 checkpoints    5 sampling    6 the command line    7 the run

Launch it:
    python train_gpt2.py                                 # one minute on a laptop: learns Python from its own library
    python train_gpt2.py --model d12                     # 124M on FineWeb (first: python fineweb.py), one GPU
    torchrun --standalone --nproc_per_node=8 train_gpt2.py --model d12           # the same on eight
    python train_gpt2.py --sample logtiny/best.pt --prompt "def "                # let a checkpoint write

The model is a variant of GPT-2: RMSNorm, SwiGLU, rotary positions and grouped-query attention. Each is a switch
(--norm, --mlp, --pos, --n_kv_head, --bias, --qk_norm) and --arch gpt2 turns all of them back to 2019.
In comments B is the batch, T the time (position in a sequence), C = n_embd, D = C / n_head the width of one head.
"""
import argparse
import codecs
import contextlib
import functools
import glob
import hashlib
import math
import os
import shlex
import signal
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path

START = time.time()  # before torch, whose import is part of what a person waits for
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel


def die(message):
    """Ends the program over a user's mistake: one line that says what to do next, exit code 2, no traceback."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


# ---------------------------------------------------------------------------------------------------------------------
# 1. The model

@dataclass
class GPTConfig:
    """The shape of a model; whatever is in here is stored in its checkpoints. The defaults are the variant's d12.

    Raises ValueError, with the fields to change, for widths that do not divide.
    """
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = 0         # heads that make keys and values; 0: one for every two query heads
    n_embd: int = 768          # C, the width of the residual stream
    block_size: int = 1024     # the longest sequence, in tokens
    vocab_size: int = 50257    # ids that exist; the tables are padded to a multiple of 64, see GPT
    norm: str = "rmsnorm"      # or layernorm
    mlp: str = "swiglu"        # or gelu
    pos: str = "rope"          # or learned
    bias: bool = False         # in linear layers and LayerNorm
    qk_norm: bool = False      # RMSNorm on each head's queries and keys

    def __post_init__(self):
        if self.n_kv_head == 0:  # d48's 25 heads have no half: the grouping nearest to 2 that divides 25 is 1
            self.n_kv_head = self.n_head // 2 if self.n_head % 2 == 0 else self.n_head
        if self.n_embd % self.n_head or self.n_embd // self.n_head % 2:
            raise ValueError(f"n_embd {self.n_embd} over n_head {self.n_head} must be an even whole number")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}")


def make_norm(config):
    """LayerNorm takes away the mean, divides by the standard deviation, and learns a gain and a bias. RMSNorm
    (https://arxiv.org/abs/1910.07467) keeps only the division and the gain, which turns out to be the part that matters.
    eps is what the architectures we want to be readable as use: 1e-6 in Llama and Qwen3, 1e-5 in GPT-2."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=1e-6)
    return nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)


def rope_tables(T, D, base=10000.0):
    """cos and sin of every rotation angle, each (T, D/2): position t turns pair i by t * base^(-2i/D) radians.
    The first pairs turn fast and tell neighbours apart, the last hardly turn at all and tell far from near."""
    freq = base ** (-torch.arange(0, D, 2).float() / D)
    angle = torch.outer(torch.arange(T).float(), freq)
    return angle.cos(), angle.sin()


def apply_rope(x, cos, sin):
    """Rotary positions (https://arxiv.org/abs/2104.09864) for queries or keys x of shape (B, T, heads, D).

    Rotating q at position i and k at position j leaves q·k a function of i - j alone: attention sees distances, and no
    position needs a vector of its own. The pairs are (x[i], x[i + D/2]), the half-split layout of Llama and Qwen3.
    """
    cos, sin = cos[:x.size(1), None], sin[:x.size(1), None]  # (T, 1, D/2): varies along time, the same for every head
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)  # the tables are fp32, x may be bf16


class CausalSelfAttention(nn.Module):
    """Every position looks back at the ones before it and takes a weighted mean of their values."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, self.D = config.n_head, config.n_kv_head, config.n_embd // config.n_head
        self.c_attn = nn.Linear(config.n_embd, (config.n_head + 2 * config.n_kv_head) * self.D, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        if config.qk_norm:  # bounds q·k, so that no head saturates its softmax at a high learning rate (Qwen3 does this)
            self.q_norm, self.k_norm = nn.RMSNorm(self.D, eps=1e-6), nn.RMSNorm(self.D, eps=1e-6)
        self.qk_norm = config.qk_norm

    def forward(self, x, rope):
        B, T, C = x.shape
        # one matrix product makes all three; each is (B, T, heads, D)
        q, k, v = self.c_attn(x).view(B, T, -1, self.D).split((self.n_head, self.n_kv_head, self.n_kv_head), dim=2)
        if self.qk_norm:
            q, k = self.q_norm(q.float()), self.k_norm(k.float())
        if rope:  # here, while dim 1 is still time: after the transposes below it would be the heads that are rotated
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        # Flash attention (https://arxiv.org/abs/2205.14135): softmax(q k^T / sqrt(D)) v in tiles that never leave the
        # chip, so no (T, T) matrix or mask is ever stored. Grouped-query attention (https://arxiv.org/abs/2305.13245):
        # query heads 0 and 1 read key/value head 0, and so on; enable_gqa lets the kernel share them without a copy.
        # On a CPU in fp32: this kernel's bf16 backward pass takes 3.5 times as long there (19.3 against 5.4 ms at tiny's
        # shape on 2 cores with AMX; at d12's they are equal), and autocast would insist on it.
        on_cpu = x.device.type == "cpu"
        with torch.autocast("cpu", enabled=False) if on_cpu else contextlib.nullcontext():
            q, k, v = ((h.float() if on_cpu else h).transpose(1, 2) for h in (q, k, v))  # (B, heads, T, D)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.n_kv_head != self.n_head)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # heads side by side again


class MLP(nn.Module):
    """What a position does with what attention brought it. GPT-2: up to 4C, GELU, down. SwiGLU
    (https://arxiv.org/abs/2002.05202): one half of the hidden vector decides, through SiLU, how much of the other half
    passes. It has three matrices instead of two, so 2/3 of the width costs the same; a multiple of 64 keeps GPUs fast."""

    def __init__(self, config):
        super().__init__()
        self.swiglu = config.mlp == "swiglu"
        hidden = 64 * math.ceil(8 * config.n_embd / 3 / 64) if self.swiglu else 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, 2 * hidden if self.swiglu else hidden, bias=config.bias)
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)

    def forward(self, x):
        x = self.c_fc(x)  # (B, T, C) -> (B, T, hidden), twice that for SwiGLU
        if self.swiglu:
            gate, up = x.chunk(2, dim=-1)
            x = F.silu(gate) * up
        else:
            x = F.gelu(x, approximate="tanh")  # GPT-2 used the approximation, so its weights expect it
        return self.c_proj(x)


class Block(nn.Module):
    """Pre-norm: x is only ever added to, so the gradient has a straight road from the loss to every layer."""

    def __init__(self, config):
        super().__init__()
        self.ln_1, self.attn = make_norm(config), CausalSelfAttention(config)
        self.ln_2, self.mlp = make_norm(config), MLP(config)

    def forward(self, x, rope):
        x = x + self.attn(self.ln_1(x), rope)
        return x + self.mlp(self.ln_2(x))


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of the head: features x (N, C), weight (V, C), targets (N,) -> scalar, in nats a token.

    At d12 with 32 x 1024 tokens the logits are what runs out of memory first: 32768 x 50304 of them are 6.6 GB in fp32,
    and autograd would keep more than one copy until the backward pass. But the gradient of cross-entropy is known the
    moment the logits are: softmax(logits) minus one at the target. So a slice of rows at a time we make logits, loss and
    gradients, and drop the logits. What stays is the size of x and of weight, and nothing is computed twice.
    """
    ROWS = 4096  # a slice: 0.8 GB of fp32 logits at V = 50304, and still enough rows to fill a GPU

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size):
        train = ctx.needs_input_grad[0]
        loss = torch.zeros((), device=x.device)
        dx, dw = (torch.empty_like(x), torch.zeros_like(weight)) if train else (None, None)
        for i in range(0, len(x), HeadLoss.ROWS):
            xs, ts = x[i:i + HeadLoss.ROWS], targets[i:i + HeadLoss.ROWS, None]
            logits = F.linear(xs, weight)  # bf16 under autocast
            dtype = logits.dtype
            logits = logits.float()
            logits[:, vocab_size:] = -math.inf  # ids that only pad the table get no probability
            logp = F.log_softmax(logits, dim=-1)
            loss -= logp.gather(1, ts).sum()
            if train:
                dlogits = logp.exp_()
                dlogits.scatter_add_(1, ts, dlogits.new_full((1, 1), -1.0).expand_as(ts))
                dlogits = (dlogits / len(x)).to(dtype)
                dx[i:i + HeadLoss.ROWS] = dlogits @ weight
                dw += dlogits.T @ xs
        ctx.save_for_backward(dx, dw)
        return loss / len(x)

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        return dx * grad, dw * grad, None, None


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        # 50257 is a prime-ish width that no GPU kernel likes; the next multiple of 64 is 50304. The extra rows are
        # never looked up, and their logits are -inf wherever logits are made.
        padded = 64 * math.ceil(config.vocab_size / 64)
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(padded, config.n_embd),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=make_norm(config)))
        if config.pos == "learned":
            self.transformer.wpe = nn.Embedding(config.block_size, config.n_embd)
        else:  # constants, so not part of a checkpoint
            cos, sin = rope_tables(config.block_size, config.n_embd // config.n_head)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        self.lm_head = nn.Linear(config.n_embd, padded, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied (https://arxiv.org/abs/1608.05859): a third of d12
        for name, p in self.named_parameters():
            if p.dim() == 2:  # GPT-2's: 0.02, and less for the 2 * n_layer layers whose outputs add up in the residual
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def features(self, idx):
        """Token ids (B, T), T <= block_size -> what the head reads, (B, T, C)."""
        x = self.transformer.wte(idx)
        rope = None
        if self.config.pos == "learned":
            x = x + self.transformer.wpe.weight[:idx.size(1)]  # (T, C), the same for every sequence
        else:
            rope = self.cos, self.sin
        for block in self.transformer.h:
            x = block(x, rope)
        return self.transformer.ln_f(x)

    def head(self, x):
        """Features (..., C) -> fp32 logits (..., padded vocabulary), -inf for the padding."""
        logits = self.lm_head(x).float()
        logits[..., self.config.vocab_size:] = -math.inf
        return logits

    def forward(self, idx, targets=None):
        """Token ids (B, T) -> logits (B, T, padded vocabulary); with targets (B, T) -> their mean loss, nats a token."""
        x = self.features(idx)
        if targets is None:
            return self.head(x)
        return HeadLoss.apply(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), self.config.vocab_size)

    def num_params(self):
        """Trained numbers: (all, all but the embedding tables)."""
        n = sum(p.numel() for p in self.parameters())
        tables = [self.transformer.wte, *([self.transformer.wpe] if self.config.pos == "learned" else [])]
        return n, n - sum(t.weight.numel() for t in tables)

    def flops_per_token(self, T):
        """Training FLOPs a token at sequence length T: 6 a weight that is multiplied (2 forward, 4 backward; the tied
        table counts once, as the head) and 12 n_layer C T for attention (PaLM, https://arxiv.org/abs/2204.02311, app. B,
        which like everyone counts the half that the causal mask spares)."""
        c = self.config
        return 6 * (self.num_params()[1] + self.lm_head.weight.numel()) + 12 * c.n_layer * c.n_embd * T


# ---------------------------------------------------------------------------------------------------------------------
# 2. The data

# A corpus is a folder of shards in llm.c's format: 256 little-endian int32 of header (magic, version, number of tokens,
# zeros), then the tokens as uint16. Every document begins with <|endoftext|>, which is always the last real id.
SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 1024
VOCAB_SIZE = {"bytes": 257, "gpt2": 50257}  # a byte is its own id, 256 is <|endoftext|>; GPT-2's BPE, via tiktoken


def write_shard(path, tokens):
    """Writes token ids (any integer array) to path, which appears only when it is whole."""
    header = np.zeros(256, "<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(tokens)
    tmp = Path(f"{path}.{os.getpid()}.tmp")
    tmp.write_bytes(header.tobytes() + np.asarray(tokens).astype("<u2").tobytes())
    os.replace(tmp, path)


def read_shard(path):
    """The shard's tokens as a memory map (uint16): nothing is read before it is used, nothing is read twice by two
    processes. Ends the program over anything that is not a whole shard."""
    size = os.path.getsize(path)
    header = np.fromfile(path, "<i4", 256)
    again = "delete it and run `python fineweb.py` again"
    if size < HEADER_BYTES:
        die(f"{path} is only {size} bytes long, too short to be a token shard: {again}")
    if header[0] != SHARD_MAGIC:
        die(f"{path} is no token shard (magic number {header[0]}, not {SHARD_MAGIC}): give --input_bin files made by fineweb.py")
    if header[1] != SHARD_VERSION:
        die(f"{path} is a shard of version {header[1]}, this program reads version {SHARD_VERSION}: make it again with fineweb.py")
    if size != HEADER_BYTES + 2 * int(header[2]):
        die(f"{path} is truncated or overlong: its header promises {header[2]} tokens, it holds {(size - HEADER_BYTES) / 2:g}: {again}")
    if header[2] == 0:
        die(f"{path} is empty, it holds no tokens: {again}")
    return np.memmap(path, "<u2", "r", offset=HEADER_BYTES)


def stdlib_corpus():
    """Glob patterns (train, val) for the Python standard library's own source as bytes: 11 MB of real text that everyone
    who can run this has on disk. A file is held out if the hash of its name says so, the same ones on every machine."""
    root = Path(sysconfig.get_paths()["stdlib"])
    out = Path(f"stdlib_py{sys.version_info.major}.{sys.version_info.minor}")
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data"}  # the last is generated prose
    documents = {"train": [], "val": []}
    if not (out / "train.bin").exists() or not (out / "val.bin").exists():
        for path in sorted(root.rglob("*.py")):
            name = path.relative_to(root)
            if not skip & set(name.parts):
                held_out = hashlib.sha256(name.as_posix().encode()).digest()[0] < 8  # 8 in 256, 3 %
                document = np.frombuffer(path.read_bytes(), np.uint8).astype(np.uint16)
                documents["val" if held_out else "train"] += [[VOCAB_SIZE["bytes"] - 1], document]
        if not documents["val"]:
            die(f"no Python source in {root} to learn from: give --input_bin and --input_val_bin")
        out.mkdir(exist_ok=True)
        for split, parts in documents.items():
            write_shard(out / f"{split}.bin", np.concatenate(parts))
    return f"{out}/train.bin", f"{out}/val.bin"


class TokenLoader:
    """Sequences of T tokens out of all shards that match a glob pattern, each used once an epoch.

    A shard of n tokens has (n - 1) // T sequences: number i starts at token i * T and is read with one token more, since
    the target of a token is the one after it. What is left at a shard's end, T tokens at most, is not used. An epoch goes
    through the shards in an order drawn from (seed, epoch) and through each shard's sequences in an order drawn from
    (seed, epoch, shard). So sequence number i of a run is a function of i alone: there is no state to save, any process
    can compute its share, and resuming at a step needs no more than the step. seed=None: in file order.
    """

    def __init__(self, pattern, T, vocab_size, seed=None):
        self.T, self.vocab_size, self.seed = T, vocab_size, seed
        self.paths = sorted(glob.glob(str(pattern)))
        if not self.paths:
            die(f"no token shards at {pattern}: run `python fineweb.py`, or name yours with --input_bin and --input_val_bin")
        self.shards = [read_shard(path) for path in self.paths]
        self.counts = np.array([(len(shard) - 1) // T for shard in self.shards])
        self.total = int(self.counts.sum())
        self.order = functools.lru_cache(maxsize=4)(self.order)

    def order(self, n, *key):
        return np.arange(n) if self.seed is None else np.random.default_rng([self.seed, *key]).permutation(n)

    def __call__(self, first, count, device):
        """Sequences first ... first + count - 1 of the run: inputs and targets, both (count, T) int64 on device."""
        rows = np.empty((count, self.T + 1), np.int64)
        for row, i in zip(rows, range(first, first + count)):
            epoch, i = divmod(i, self.total)
            order = self.order(len(self.shards), epoch)
            ends = np.cumsum(self.counts[order])
            k = np.searchsorted(ends, i, side="right")  # the shard whose turn it is; i counts from its beginning below
            shard, i = order[k], i - (ends[k] - self.counts[order[k]])
            start = self.order(self.counts[shard], epoch, shard)[i] * self.T
            row[:] = self.shards[shard][start:start + self.T + 1]
            if row.max() >= self.vocab_size:
                die(f"{self.paths[shard]} holds token id {row.max()}, outside the vocabulary of {self.vocab_size}: it was made "
                    f"with another tokenizer, see --tokenizer")
        rows = torch.from_numpy(rows)
        if device.type == "cuda":  # from page-locked memory the copy runs beside the GPU's work instead of stalling it
            rows = rows.pin_memory()
        rows = rows.to(device, non_blocking=True)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


# ---------------------------------------------------------------------------------------------------------------------
# 3. The optimiser

def get_lr(step, args):
    """Learning rate of a step. Warm-up from 10 % of the peak, while Adam's averages fill; then either a cosine down to
    learning_rate_decay_frac of the peak at num_iterations, or (wsd) the peak for long and a straight line down over the
    last cooldown_frac of the steps (https://arxiv.org/abs/2405.18392), which can be prolonged where a cosine can't."""
    peak, floor = args.learning_rate, args.learning_rate * args.learning_rate_decay_frac
    if step < args.warmup_iters:
        return peak * (0.1 + 0.9 * step / args.warmup_iters)
    if args.schedule == "cosine":
        done = (step - args.warmup_iters) / max(1, args.num_iterations - args.warmup_iters)
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * done))
    left = (args.num_iterations - step) / max(1, args.cooldown_frac * args.num_iterations)
    return floor + (peak - floor) * min(1.0, left)


def make_optimizers(model, args):
    """A list: AdamW, and with --optimizer muon first Muon for the blocks' matrices.

    Muon (https://kellerjordan.github.io/posts/muon) replaces the momentum of a matrix by the nearest orthogonal one, so
    that every direction is learned at the same speed. match_rms_adamw (https://arxiv.org/abs/2502.16982) gives its steps
    AdamW's typical size, so that one learning rate serves both. Gains, biases and the embedding stay with AdamW.
    """
    matrices = [p for p in model.transformer.h.parameters() if p.dim() == 2] if args.optimizer == "muon" else []
    rest = [p for p in model.parameters() if not any(p is m for m in matrices)]
    groups = [  # decay pulls matrices towards zero; pulling a norm's gain there would only fight the norm
        dict(params=[p for p in rest if p.dim() >= 2], weight_decay=args.weight_decay),
        dict(params=[p for p in rest if p.dim() < 2], weight_decay=0.0)]
    adamw = dict(lr=args.learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)  # fused: one kernel for all tensors
    if args.zero_stage == 1 and dist.is_initialized():  # each process keeps the moments of its share of the parameters
        optimizers = [ZeroRedundancyOptimizer(groups, optimizer_class=torch.optim.AdamW, **adamw)]
    else:
        optimizers = [torch.optim.AdamW(groups, **adamw)]
    if matrices:
        optimizers.insert(0, torch.optim.Muon(matrices, lr=args.learning_rate, weight_decay=args.weight_decay,
                                              momentum=0.95, adjust_lr_fn="match_rms_adamw"))
    return optimizers


# ---------------------------------------------------------------------------------------------------------------------
# 4. Checkpoints

def save_checkpoint(path, state):
    """Writes state to path so that at any moment, a power cut included, path holds one whole checkpoint, the old or the
    new. True if the new one is there; a full disk leaves the old one, says so, and training goes on."""
    tmp = path.with_name(path.name + ".tmp")
    try:
        with open(tmp, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())  # the bytes are on the disk before the name points at them
        os.replace(tmp, path)
        if os.name == "posix":
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)  # and so is the name
            os.close(folder)
        return True
    except (OSError, RuntimeError) as e:  # torch turns some failed writes into RuntimeErrors
        tmp.unlink(missing_ok=True)
        kept = "the one before is still in place" if path.exists() else "there is none yet"
        print(f"WARNING: could not write {path} ({str(e).splitlines()[0]}): {kept}. Free some space before the next one is due.",
              file=sys.stderr, flush=True)
        return False


def load_checkpoint(path):
    """The dictionary that snapshot() in train() made, its tensors on the CPU. weights_only: data, never code, is loaded."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state["config"], state["model"], state["tokenizer"]
        return state
    except FileNotFoundError:
        die(f"there is no checkpoint at {path}: a run writes last.pt and best.pt into its --output_dir")
    except Exception as e:  # torch raises a dozen kinds here, and every one means the same to the user
        die(f"{path} is not a checkpoint of train_gpt2.py ({type(e).__name__}): give it a last.pt or best.pt")


# ---------------------------------------------------------------------------------------------------------------------
# 5. Sampling

def load_tokenizer(name):
    """(encode: text -> list of ids, token_bytes: id -> bytes) of "bytes" or "gpt2". Raises OSError when tiktoken, which
    downloads GPT-2's vocabulary (1.5 MB) once, cannot."""
    if name == "bytes":
        return lambda text: list(text.encode()), lambda token: bytes([token])
    import tiktoken
    bpe = tiktoken.get_encoding("gpt2")
    return bpe.encode_ordinary, bpe.decode_single_token_bytes


@torch.no_grad()
def generate(model, ids, max_new_tokens, temperature=1.0, top_k=None, generator=None):
    """Yields up to max_new_tokens ids that continue the list ids (at least one), and stops before <|endoftext|>.

    temperature 0 takes the likeliest token; below 1 sharpens, above 1 flattens. top_k: only the k likeliest. The whole
    context is computed anew for every token: a key/value cache would be faster, and twice the code.
    """
    x = torch.tensor([ids], device=model.lm_head.weight.device)  # (1, T)
    for _ in range(max_new_tokens):
        logits = model.head(model.features(x[:, -model.config.block_size:])[:, -1])  # (1, padded vocabulary)
        if top_k and temperature > 0:
            kth = torch.topk(logits, min(top_k, model.config.vocab_size)).values[:, -1:]
            logits[logits < kth] = -math.inf
        if temperature > 0:
            token = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1, generator=generator)  # (1, 1)
        else:
            token = logits.argmax(dim=-1, keepdim=True)
        if token.item() == model.config.vocab_size - 1:
            return
        yield token.item()
        x = torch.cat((x, token), dim=1)


def print_sample(model, tokenizer, args, seed):
    """Prints the prompt and what the model makes of it, each piece of text as soon as it is there."""
    encode, token_bytes = tokenizer
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(seed)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may take several tokens
    print(args.prompt, end="", flush=True)
    ids = [model.config.vocab_size - 1] + encode(args.prompt)  # <|endoftext|> is what documents begin with
    for token in generate(model, ids, args.max_new_tokens, args.temperature, args.top_k, generator):
        print(decoder.decode(token_bytes(token)), end="", flush=True)
    print(decoder.decode(b"", final=True))


# ---------------------------------------------------------------------------------------------------------------------
# 6. The command line

# Where a flag is not given, the model's preset decides, and below it these: the homework's hyperparameters for one pass
# over FineWeb's 10B tokens. 524,288 tokens a step is GPT-3's choice for this size (https://arxiv.org/abs/2005.14165).
DEFAULTS = dict(
    model="tiny", arch="variant", norm="rmsnorm", mlp="swiglu", pos="rope", n_kv_head=0, bias=False, qk_norm=False,
    tokenizer="gpt2", input_bin="fineweb10B/fineweb_train_*.bin", input_val_bin="fineweb10B/fineweb_val_*.bin",
    sequence_length=1024, total_batch_size=524288, num_iterations=19073, optimizer="adamw", schedule="cosine",
    warmup_iters=715, learning_rate_decay_frac=0.1, cooldown_frac=0.7, weight_decay=0.1, grad_clip=1.0, zero_stage=0,
    val_loss_every=250, val_tokens=10485760, sample_every=250, save_every=250, log_every=1, seed=1337,
    prompt="Hello, I'm a language model,", max_new_tokens=200, temperature=0.8, top_k=50)
# The peak rates are twice those of GPT-3's table 2.1 (6e-4, 3e-4, 2.5e-4, 2e-4), as the homework's 1.2e-3 is for d12.
MODELS = {
    "tiny": dict(
        output_dir="logtiny", n_layer=4, n_head=4, n_embd=128, tokenizer="bytes", sequence_length=128, total_batch_size=2048,
        num_iterations=600, learning_rate=1e-2, optimizer="muon", schedule="wsd", warmup_iters=20, qk_norm=True,
        learning_rate_decay_frac=0.0, val_loss_every=200, val_tokens=196608, sample_every=200, save_every=200, log_every=20,
        prompt="def "),
    "d12": dict(output_dir="log124M", n_layer=12, n_head=12, n_embd=768, learning_rate=1.2e-3),
    "d24": dict(output_dir="log350M", n_layer=24, n_head=16, n_embd=1024, learning_rate=6e-4),
    "d36": dict(output_dir="log774M", n_layer=36, n_head=20, n_embd=1280, learning_rate=5e-4),
    "d48": dict(output_dir="log1558M", n_layer=48, n_head=25, n_embd=1600, learning_rate=4e-4)}
GPT2 = dict(norm="layernorm", mlp="gelu", pos="learned", bias=True, qk_norm=False)  # --arch gpt2, and n_kv_head = n_head

# (flag, type or choices, what it is and in what unit), under the heading that --help shows. bool makes a --no- form too.
FLAGS = {
    "what to train on": [
        ("input_bin", str, "glob pattern of the training shards"),
        ("input_val_bin", str, "glob pattern of the validation shards"),
        ("tokenizer", list(VOCAB_SIZE), "what ids mean; bytes without --input_bin: Python's standard library"),
        ("output_dir", str, "folder for main.log, last.pt and best.pt")],
    "the model": [
        ("arch", ["variant", "gpt2"], "gpt2 turns every switch below back; one given beside it wins"),
        ("norm", ["rmsnorm", "layernorm"], "normalisation before attention, MLP and head"),
        ("mlp", ["swiglu", "gelu"], "the MLP's nonlinearity"),
        ("pos", ["rope", "learned"], "how positions enter"),
        ("n_kv_head", int, "key/value heads; 0: half of n_head"),
        ("bias", bool, "biases in linear layers and LayerNorm"),
        ("qk_norm", bool, "RMSNorm on queries and keys"),
        ("n_layer", int, "blocks"),
        ("n_head", int, "query heads"),
        ("n_embd", int, "width of the residual stream")],
    "batches": [
        ("batch_size", int, "sequences in a micro-batch of one process; not given: what fits the device"),
        ("sequence_length", int, "tokens in a sequence"),
        ("total_batch_size", int, "tokens in a step, over all micro-batches and processes"),
        ("num_iterations", int, "steps"),
        ("overfit_single_batch", True, "train on the first batch only: a check of everything")],
    "the optimiser": [
        ("optimizer", ["adamw", "muon"], "muon: for the blocks' matrices, AdamW for the rest"),
        ("learning_rate", float, "peak rate"),
        ("schedule", ["cosine", "wsd"], "after the warm-up: a cosine, or stable and then linear decay"),
        ("warmup_iters", int, "steps from 10 %% of the peak rate to all of it"),
        ("learning_rate_decay_frac", float, "final rate, as a fraction of the peak"),
        ("cooldown_frac", float, "wsd's decay, as a fraction of all steps"),
        ("weight_decay", float, "pull of matrices towards zero, a step and unit of learning rate"),
        ("grad_clip", float, "largest norm of the gradient; 0: any"),
        ("zero_stage", [0, 1], "1: processes share AdamW's state instead of each keeping all of it")],
    "what to see and keep (in steps; 0: never)": [
        ("val_loss_every", int, "a validation"),
        ("val_tokens", int, "how many tokens a validation takes"),
        ("sample_every", int, "a sample"),
        ("save_every", int, "last.pt"),
        ("log_every", int, "a line"),
        ("resume", True, "go on from last.pt in the output folder, exactly")],
    "the machine": [
        ("device", ["cuda", "mps", "cpu"], "not given: the first of them that is there"),
        ("dtype", ["float32", "bfloat16"], "of matrix products; not given: bfloat16 where the hardware has it"),
        ("compile", bool, "torch.compile; not given: on CUDA"),
        ("seed", int, "of initial weights, data order and samples")],
    "sampling": [
        ("sample", str, "a checkpoint: do not train, let it write"),
        ("prompt", str, "what the text begins with"),
        ("max_new_tokens", int, "tokens, at most"),
        ("temperature", float, "0: always the likeliest token"),
        ("top_k", int, "draw from the k likeliest tokens; 0: from all")]}
# What makes the model or the order of the data: a run cannot change it when it resumes.
FIXED = ["model", "arch", "norm", "mlp", "pos", "n_kv_head", "bias", "qk_norm", "n_layer", "n_head", "n_embd", "tokenizer",
         "sequence_length", "total_batch_size", "optimizer", "seed"]
LAUNCH = ["output_dir", "batch_size", "resume", "zero_stage", "device", "compile", "sample"]  # of a launch, not of the run


def parse_args(argv):
    """All flags, each as given, else as in the checkpoint (when resuming), else by the model's preset and DEFAULTS.
    Returns (args, the checkpoint or None)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog="[default for tiny / for d12]")
    parser.error = die  # argparse would print a page of usage before the line that matters
    parser.add_argument("--model", choices=list(MODELS), help="a size: 1M, 124M, 350M, 774M, 1558M parameters [tiny]")
    tiny, d12 = ({**DEFAULTS, **MODELS[model]} for model in ("tiny", "d12"))
    for heading, flags in FLAGS.items():
        group = parser.add_argument_group(heading)
        for name, kind, text in flags:
            if name in d12:
                text += f" [{tiny[name]}]" if tiny[name] == d12[name] else f" [{tiny[name]} / {d12[name]}]"
            if kind is True:
                how = dict(action="store_true")
            elif kind is bool:
                how = dict(action=argparse.BooleanOptionalAction)
            else:
                how = dict(type=kind, metavar=kind.__name__) if isinstance(kind, type) else dict(type=type(kind[0]), choices=kind)
            group.add_argument(f"--{name}", help=text, **how)
    args = parser.parse_args(argv)
    defaults, checkpoint = {**DEFAULTS, **MODELS[args.model or "tiny"]}, None
    args.output_dir = Path(args.output_dir or defaults["output_dir"])
    if args.arch == "gpt2":
        defaults.update(GPT2, n_kv_head=args.n_head or defaults["n_head"])
    if args.resume:
        checkpoint = load_checkpoint(args.output_dir / "last.pt")
        defaults = checkpoint["args"]
        for name in FIXED:
            if getattr(args, name) not in (None, defaults[name]):
                die(f"--{name} {getattr(args, name)} does not fit {args.output_dir}, a run with {defaults[name]}: drop the flag, "
                    f"or drop --resume and choose another --output_dir")
    elif (args.tokenizer or defaults["tokenizer"]) == "bytes" and not args.input_bin and not args.sample:
        defaults["input_bin"], defaults["input_val_bin"] = stdlib_corpus()
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    return args, checkpoint


# ---------------------------------------------------------------------------------------------------------------------
# 7. The run

def native_bf16(device):
    """Whether the hardware multiplies bfloat16 itself; where it is emulated, fp32 is faster."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpuinfo = Path("/proc/cpuinfo")  # Linux; amx_bf16 and avx512_bf16 on Intel and AMD, bf16 on ARM
    flags = cpuinfo.read_text().split() if device.type == "cpu" and cpuinfo.exists() else []
    return any(flag in flags for flag in ("amx_bf16", "avx512_bf16", "bf16"))


def peak_flops(device):
    """The card's dense bf16 peak in FLOP/s from its data sheet, against which MFU is stated; None where not listed."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for card, tera in (("B200", 2250), ("H200", 989), ("H100 PCIe", 756), ("H100", 989), ("A100", 312), ("L40S", 362),
                       ("4090", 165), ("3090", 71)):
        if card in name:
            return tera * 1e12


def all_sum(values, device):
    """The sum of a list of numbers over all processes, element by element."""
    if not dist.is_initialized():
        return values
    values = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return values.tolist()


def pick_batch_size(model, autocast, device, sequences, T):
    """The largest micro-batch that divides a process's sequences a step and fits the device.

    On a GPU by trying: one eager forward and backward pass, which needs more than the compiled one, has to leave room for
    AdamW's two moments and a tenth of the memory. Elsewhere 4096 tokens, enough to keep a CPU's matrix products busy.
    """
    limit = max(1, (65536 if device.type == "cuda" else 4096) // T)
    sizes = [b for b in range(min(limit, sequences), 0, -1) if sequences % b == 0]
    if device.type != "cuda":
        return sizes[0]
    moments, total = 8 * model.num_params()[0], torch.cuda.get_device_properties(device).total_memory
    for b in sizes:
        torch.cuda.reset_peak_memory_stats()
        try:
            x = torch.zeros((b, T), dtype=torch.long, device=device)
            with autocast():
                loss = model(x, x)
            loss.backward()
            if torch.cuda.max_memory_allocated() + moments < 0.9 * total:
                return b
        except torch.OutOfMemoryError:
            pass
        finally:
            loss = None
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
    die(f"not even one sequence of {T} tokens fits the GPU's {total / 2**30:.0f} GiB: try a smaller --model or --sequence_length")


@torch.no_grad()
def evaluate(model, loader, tokens, B, autocast, device, rank, world):
    """Mean loss in nats a token over the first tokens // T sequences of the loader's corpus, each counted once whatever the
    batch size and the number of processes."""
    n = min(tokens // loader.T, loader.total)
    loss = 0.0
    for i in range(rank * B, n, world * B):
        x, y = loader(i, min(B, n - i), device)
        with autocast():
            loss += model(x, y).item() * len(x)
    return all_sum([loss], device)[0] / n


def claim_output_dir(path, resume, set_aside):
    """Makes the folder of a new run. One that holds a run is never written over: refuse, or move it out of the way."""
    if not resume and any((path / name).exists() for name in ("main.log", "last.pt", "best.pt")):
        if not set_aside:
            die(f"{path} holds a run: add --resume to go on with it, or give another --output_dir")
        aside = next(Path(f"{path}.{i}") for i in range(1, 10**6) if not Path(f"{path}.{i}").exists())
        path.rename(aside)
        print(f"kept the earlier run as {aside}")
    path.mkdir(parents=True, exist_ok=True)


def resume_log(path, step):
    """Cuts from a log what a resumed run will write again: the lines of step and later, and one torn by a crash."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    tmp = path.with_name("main.log.tmp")
    tmp.write_text("".join(line for line in lines if line.endswith("\n") and int(line.split()[0][2:]) < step))
    os.replace(tmp, path)


def pick_device(name):
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = name or next(kind for kind in there if there[kind])
    if not there[name]:
        die(f"--device {name}: torch sees no such device here, leave the flag out or install a torch that is built for it")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)


def train(args, checkpoint, argv):
    """One process of a run: alone, or one of those that torchrun started."""
    source = Path(__file__).read_text()  # now: by the time a checkpoint carries it the file may have been edited
    device = pick_device(args.device)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # what stays fp32 may use TF32
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    echo = print if rank == 0 else lambda *a, **k: None
    args.dtype = args.dtype or ("bfloat16" if native_bf16(device) else "float32")
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")

    # the model, the same in every process because the seed is
    T = args.sequence_length
    shape = {f: getattr(args, f) for f in GPTConfig.__dataclass_fields__ if hasattr(args, f)}
    try:
        config = GPTConfig(**checkpoint["config"]) if checkpoint else GPTConfig(
            **shape, block_size=T, vocab_size=VOCAB_SIZE[args.tokenizer])
    except ValueError as e:
        die(f"{e}: see --n_embd, --n_head and --n_kv_head")
    args.n_kv_head = config.n_kv_head
    torch.manual_seed(args.seed)
    with device:
        model = GPT(config)
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
    params, without = model.num_params()
    flops = model.flops_per_token(T)
    echo(f"model {args.model}: {config.n_layer} layers, {config.n_head} heads on {config.n_kv_head} key/value heads, {config.n_embd} wide "
         f"| {params:,} parameters, {without:,} without embeddings | {flops / 1e6:,.1f} MFLOP a token")

    # the data
    train_data = TokenLoader(args.input_bin, T, config.vocab_size, args.seed)
    val_data = TokenLoader(args.input_val_bin, T, config.vocab_size)
    sequences = args.total_batch_size // T // world  # of this process in a step
    B = args.batch_size
    if sequences and sequences * T * world == args.total_batch_size and not B:
        B = pick_batch_size(model, autocast, device, sequences, T)
        B = int(all_sum([B if rank == 0 else 0], device)[0])  # everyone takes what fits the first
    block = (B or 1) * T * world
    if args.total_batch_size % block or args.total_batch_size < block:
        below = max(1, args.total_batch_size // block) * block
        die(f"--total_batch_size {args.total_batch_size} is no multiple of {block} tokens, batch_size {B or 1} x sequence_length {T} x "
            f"{world} processes: give {below} or {below + block}, or another --batch_size")
    accumulate = sequences // B
    for data, need, flag in (train_data, sequences * world, "total_batch_size"), (val_data, 1, "sequence_length"):
        if data.total < need:
            die(f"{data.paths[0]} and its like hold {data.total} sequences of {T} tokens, too small for one batch of {need}: "
                f"lower --{flag} or give more shards")
    if rank == 0:
        claim_output_dir(args.output_dir, args.resume, set_aside=not argv)
    compiled = args.compile if args.compile is not None else device.type == "cuda"
    echo(f"device {torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type}, {args.dtype}, "
         f"{'compiled' if compiled else 'not compiled'} | micro-batch {B} x {T} tokens, x {accumulate} accumulated x {world} processes "
         f"= {args.total_batch_size:,} tokens a step")
    echo(f"data {args.input_bin}: {train_data.total * T:,} tokens an epoch, {args.num_iterations * args.total_batch_size:,} in this run")

    # what trains it
    forward = torch.compile(model, dynamic=False) if compiled else model
    ddp = DistributedDataParallel(forward, device_ids=[device.index] if device.type == "cuda" else None, broadcast_buffers=False,
                                  gradient_as_bucket_view=True) if world > 1 else forward
    optimizers = make_optimizers(model, args)
    start, train_loss, val_loss, best = 0, math.inf, math.inf, math.inf
    last_pt, best_pt, log_path = (args.output_dir / name for name in ("last.pt", "best.pt", "main.log"))
    if checkpoint:
        for optimizer, state in zip(optimizers, checkpoint["optimizer"]):
            optimizer.load_state_dict(state)
        start, train_loss, val_loss, best = (checkpoint[k] for k in ("step", "train_loss", "val_loss", "best_val_loss"))
        if best_pt.exists():  # it may be younger than last.pt, if the run was killed between the two
            best = min(best, load_checkpoint(best_pt)["val_loss"])
        if rank == 0:
            resume_log(log_path, start)
        echo(f"resuming {args.output_dir} at step {start}")

    def log(line):
        if rank == 0:
            with open(log_path, "a") as f:
                f.write(line + "\n")

    def save(path, step):
        """A checkpoint with step updates behind it. No random state: there is no dropout, and the order of the data and
        the samples are drawn from (seed, step)."""
        for optimizer in optimizers:
            if isinstance(optimizer, ZeroRedundancyOptimizer):
                optimizer.consolidate_state_dict(to=0)
        if rank == 0:
            return save_checkpoint(path, dict(
                config=asdict(config), model=model.state_dict(), optimizer=[o.state_dict() for o in optimizers], step=step,
                train_loss=train_loss, val_loss=val_loss, best_val_loss=best, tokenizer=args.tokenizer, source=source,
                args={k: v for k, v in vars(args).items() if k not in LAUNCH}))

    # Ctrl-C and SIGTERM: finish the step, save, stop. A second Ctrl-C stops at once.
    signals = []
    def on_signal(number, frame):
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)
        os.write(2, b"\nstopping after this step\n")  # print is not safe in a signal handler
    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    again = shlex.join(["python" if world == 1 else "torchrun ...", "train_gpt2.py", *[a for a in argv if a != "--resume"], "--resume"])

    def micro_batch(k):
        """Micro-batch k of the run, this process's part."""
        return train_data(((k % accumulate if args.overfit_single_batch else k) * world + rank) * B, B, device)

    x, y = micro_batch(start * accumulate)
    tokenizer, peak = None, peak_flops(device)
    spent, steps_spent, total_spent = 0.0, 0, 0.0
    for step in range(start, args.num_iterations + 1):
        last = step == args.num_iterations
        due = lambda every: every > 0 and (step % every == 0 or last)

        # look at it
        if due(args.val_loss_every):
            val_loss = evaluate(forward, val_data, args.val_tokens, B, autocast, device, rank, world)
            echo(f"step {step:5d}/{args.num_iterations} | val loss {val_loss:.6f}")
            log(f"s:{step} tel:{val_loss:.6f}")
            if val_loss < best and step > 0:
                best = val_loss
                save(best_pt, step)
        if due(args.sample_every) and rank == 0:
            try:
                tokenizer = tokenizer or load_tokenizer(args.tokenizer)
                print(f"--- a sample after {step} steps")
                print_sample(model, tokenizer, args, args.seed + step)
                print("---")
            except OSError as e:
                print(f"no sample: GPT-2's vocabulary could not be loaded ({e})")
        saved = save(last_pt, step) if step > start and due(args.save_every) else True
        if last:
            break

        # and train: accumulate gradients over the micro-batches, which is the same as one large batch, and update once
        t0 = time.time()
        lr = get_lr(step, args)
        loss_sum = torch.zeros((), device=device)
        for micro in range(accumulate):
            # processes average their gradients once a step, while the last backward pass is still running
            with contextlib.nullcontext() if world == 1 or micro == accumulate - 1 else ddp.no_sync():
                with autocast():
                    loss = ddp(x, y) / accumulate  # gradients add up, and we want the mean
                loss_sum += loss.detach()
                x, y = micro_batch(step * accumulate + micro + 1)  # read the next one while the GPU is at work
                loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        # only here does Python wait for the GPU
        train_loss, norm = loss_sum.item(), norm.item()
        train_loss, stop = all_sum([train_loss / world, len(signals)], device)
        dt = time.time() - t0
        if not math.isfinite(train_loss + norm):
            good = f"{last_pt} is the last good checkpoint" if last_pt.exists() else "no checkpoint was written yet"
            die(f"the loss of step {step} is {train_loss}, the gradient's norm {norm}: {good}; a lower --learning_rate may help")

        # say so
        if step == start:
            echo(f"first step done {time.time() - START:.1f} s after the start")
        else:
            total_spent += dt
        spent, steps_spent = spent + dt, steps_spent + 1
        if due(args.log_every) or step == args.num_iterations - 1:
            speed = steps_spent * args.total_batch_size / spent
            left = total_spent / max(1, step - start) * (args.num_iterations - step - 1)
            echo(f"step {step:5d}/{args.num_iterations} | loss {train_loss:.6f} | lr {lr:.2e} | norm {norm:.4f} | "
                 f"{1000 * spent / steps_spent:.1f} ms | {speed:,.0f} tok/s" + (f" | MFU {speed * flops / world / peak:.1%}" if peak else "")
                 + f" | {left // 3600:.0f}:{left // 60 % 60:02.0f}:{left % 60:02.0f} left")
            log(f"s:{step} trl:{train_loss:.6f} lr:{lr:.2e} norm:{norm:.4f}")
            spent, steps_spent = 0.0, 0
        if stop:
            if save(last_pt, step + 1):
                echo(f"stopped after step {step}. Go on with: {again}")
            sys.exit(128 + (signals[0] if signals else signal.SIGTERM))  # as the shell counts deaths by signal

    for number, handler in before.items():
        signal.signal(number, handler)
    if device.type == "cuda":
        echo(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    if not saved:
        die(f"the last state of {args.output_dir} could not be written: free some space, then {again}")
    echo(f"done in {time.time() - START:.0f} s. Newest state: {last_pt}; lowest validation loss, {best:.4f}: {best_pt}\nNext:")
    echo(f"    python train_gpt2.py --sample {best_pt} --prompt {shlex.quote(args.prompt)}")
    if args.model == "tiny":
        echo("    python fineweb.py\n    python train_gpt2.py --model d12")
    else:
        echo(f"    python hellaswag.py -m {best_pt}")


def main(argv):
    args, checkpoint = parse_args(argv)
    if args.sample:
        state = load_checkpoint(args.sample)
        model = GPT(GPTConfig(**state["config"]))
        model.load_state_dict(state["model"])
        try:
            tokenizer = load_tokenizer(state["tokenizer"])
        except OSError as e:
            die(f"tiktoken could not load GPT-2's vocabulary ({e}): connect once, or set TIKTOKEN_CACHE_DIR to a copy")
        return print_sample(model.to(pick_device(args.device)), tokenizer, args, args.seed)
    try:
        train(args, checkpoint, argv)
    except RuntimeError as e:
        if not dist.is_initialized() or not (isinstance(e, dist.DistError) or "gloo" in str(e)):
            raise
        print(f"error: lost contact to another process ({str(e).splitlines()[0]}): start all of them again with --resume",
              file=sys.stderr, flush=True)
        os._exit(1)  # at once: an ordinary exit would wait for the others
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])

"""
How GPT-2 is trained, and how one would train it today: all of it, in one file, to be read from top to bottom.

    1 the model    2 the data    3 the optimiser    4 checkpoints    5 sampling    6 the command line    7 the run

Launch it:
    python train_gpt2.py                                   # a minute on a laptop: learns to write Python
    python train_gpt2.py --model d12                       # 124M on FineWeb (first: python fineweb.py), one GPU
    torchrun --standalone --nproc_per_node=8 train_gpt2.py --model d12           # the same on eight
    python train_gpt2.py --sample logtiny/best.pt --prompt "def "                # let a checkpoint write

The model is a variant of GPT-2: RMSNorm, SwiGLU, rotary positions and grouped-query attention. Each is a switch
(--norm, --mlp, --pos, --n_kv_head, --bias, --qk_norm), and --arch gpt2 turns all of them back to 2019. See also report/README.md.
In comments B is the batch, T the time (position in a sequence), C = n_embd, D = C / n_head the width of one head.
"""
import argparse, codecs, contextlib, ctypes, functools, gc, glob, hashlib, math, os, re, shlex, signal, sys, sysconfig, time
from dataclasses import asdict, dataclass
from pathlib import Path

START = time.time()  # before torch, since its import is part of what a person waits for
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them, see train()
print0 = functools.partial(print, flush=True) if RANK == 0 else lambda text: None  # one of many processes speaks

def die(message):
    """Ends the program over a user's mistake: one line that says what to do next, exit code 2, no traceback."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)

# ---- 1. The model ---------------------------------------------------------------------------------------------------

@dataclass
class GPTConfig:
    """The shape of a model, stored in its checkpoints. Raises ValueError for widths that do not divide."""
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = 0         # heads that make keys and values; 0: one for every two query heads
    n_embd: int = 768          # C, the width of the residual stream
    block_size: int = 1024     # the longest sequence, in tokens
    vocab_size: int = 50257    # ids that exist; GPT pads its table to a multiple of 64
    norm: str = "rmsnorm"      # or layernorm
    mlp: str = "swiglu"        # or gelu
    pos: str = "rope"          # or learned
    bias: bool = False         # in linear layers and LayerNorm
    qk_norm: bool = False      # RMSNorm on each head's queries and keys; the command line's default is True

    def __post_init__(self):
        if self.n_kv_head == 0:  # d48's 25 heads have no half: the grouping nearest to 2 that divides 25 is 1
            self.n_kv_head = self.n_head // 2 if self.n_head % 2 == 0 else self.n_head
        if min(self.n_layer, self.n_head, self.n_embd, self.block_size) < 1:
            raise ValueError("--n_layer, --n_head, --n_embd and --sequence_length must be at least 1")
        if self.n_embd % self.n_head or self.n_embd // self.n_head % 2:
            raise ValueError(f"--n_embd {self.n_embd} over --n_head {self.n_head} must be an even whole number")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"--n_head {self.n_head} must be a multiple of --n_kv_head {self.n_kv_head}")

def make_norm(config):
    """LayerNorm takes away the mean, divides by the standard deviation, and learns a gain and a bias. RMSNorm
    (https://arxiv.org/abs/1910.07467) keeps the division and the gain. eps as in Llama and Qwen3, and as in GPT-2."""
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
    position needs a vector of its own. Pairs are (x[i], x[i + D/2]), the half-split layout of Llama and Qwen3."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (T, 1, D/2): along time, the same for every head
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)  # the tables are fp32, x may be bf16

class CausalSelfAttention(nn.Module):
    """Every position looks back at the ones before it and takes a weighted mean of their values."""
    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, self.D = config.n_head, config.n_kv_head, config.n_embd // config.n_head
        self.c_attn = nn.Linear(config.n_embd, (config.n_head + 2 * config.n_kv_head) * self.D, bias=config.bias)
        self.c_attn.weight.parts = [heads * self.D for heads in (config.n_head, config.n_kv_head, config.n_kv_head)]  # see Muon
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.qk_norm = config.qk_norm
        if config.qk_norm:  # as Qwen3: bounds q·k, so that no head's softmax saturates at a high learning rate
            self.q_norm, self.k_norm = nn.RMSNorm(self.D, eps=1e-6), nn.RMSNorm(self.D, eps=1e-6)

    def forward(self, x, rope, mask):
        B, T, C = x.shape
        # one matrix product makes all three; each is (B, T, heads, D)
        q, k, v = self.c_attn(x).view(B, T, -1, self.D).split((self.n_head, self.n_kv_head, self.n_kv_head), dim=2)
        if self.qk_norm:
            q, k = self.q_norm(q.float()), self.k_norm(k.float())
        if rope:  # here, while dim 1 is still time: after the transpose below it is the heads
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        # Flash attention (https://arxiv.org/abs/2205.14135): softmax(q k^T / sqrt(D)) v in tiles that never leave the chip,
        # so no (T, T) matrix is ever stored, and no mask (hellaswag.py alone brings one). Grouped queries
        # (https://arxiv.org/abs/2305.13245): query heads 0 and 1 read key/value head 0, and so on, without a copy. On a CPU
        # in fp32: both passes take 5.4 ms at tiny's shape, and 19.3 in the bf16 that autocast would choose (2 cores with AMX).
        on_cpu = x.device.type == "cpu"
        with torch.autocast("cpu", enabled=False) if on_cpu else contextlib.nullcontext():
            q, k, v = ((h.float() if on_cpu else h).transpose(1, 2) for h in (q, k, v))  # (B, heads, T, D)
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=self.n_kv_head != self.n_head)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # the heads side by side again

class MLP(nn.Module):
    """What a position makes of what attention brought it. GPT-2: up to 4C, GELU, down. SwiGLU
    (https://arxiv.org/abs/2002.05202): one half of the hidden vector decides, through SiLU, how much of the other half
    passes. Three matrices instead of two, so 2/3 of the width costs the same; multiples of 64 keep GPUs fast."""
    def __init__(self, config):
        super().__init__()
        self.swiglu = config.mlp == "swiglu"
        hidden = 64 * math.ceil(8 * config.n_embd / 3 / 64) if self.swiglu else 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, 2 * hidden if self.swiglu else hidden, bias=config.bias)
        self.c_fc.weight.parts = [hidden] * (2 if self.swiglu else 1)
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)

    def forward(self, x):
        x = self.c_fc(x)  # (B, T, hidden), or for SwiGLU (B, T, 2 * hidden)
        if self.swiglu:
            gate, up = x.chunk(2, dim=-1)
            return self.c_proj(F.silu(gate) * up)
        return self.c_proj(F.gelu(x, approximate="tanh"))  # the approximation that GPT-2's weights were trained with

class Block(nn.Module):
    """Pre-norm: x is only ever added to, so the gradient has a straight road from the loss to every layer."""
    def __init__(self, config):
        super().__init__()
        self.ln_1, self.attn = make_norm(config), CausalSelfAttention(config)
        self.ln_2, self.mlp = make_norm(config), MLP(config)

    def forward(self, x, rope, mask):
        x = x + self.attn(self.ln_1(x), rope, mask)
        return x + self.mlp(self.ln_2(x))

HEAD_ROWS = 4096  # a slice of HeadLoss: 0.8 GB of fp32 logits at V = 50304, and still enough rows to fill a GPU

class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of the head: features x (N, C), weight (V, C), targets (N,) -> scalar, in nats a token.

    The logits are what runs out of memory first: of 32 x 1024 tokens they are 6.6 GB in fp32, and autograd would keep more
    than one copy. But their gradient is known as soon as they are: softmax(logits), minus one at the target. So, HEAD_ROWS
    tokens at a time, we make logits, loss and gradients and drop the logits again; compiled, only their bf16 form is stored.
    Nothing is computed twice. 8192 tokens of d12 took 3.2 GiB instead of 6.1, and 3.7 s instead of 10 (2 cores, eager)."""

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size):
        loss = torch.zeros((), device=x.device)
        dx, dw = (torch.empty_like(x), torch.zeros_like(weight)) if ctx.needs_input_grad[0] else (None, None)
        for rows in (slice(i, i + HEAD_ROWS) for i in range(0, len(x), HEAD_ROWS)):
            logits = F.linear(x[rows], weight)  # (HEAD_ROWS, V), bf16 under autocast
            logits[:, vocab_size:] = -math.inf  # ids that only pad the table take no probability
            logp, target = F.log_softmax(logits, dim=-1, dtype=torch.float32), targets[rows, None]  # (.., V), (.., 1)
            hit = logp.gather(1, target)
            loss -= hit.sum()
            if dx is not None:
                dlogits = logp.exp_().to(logits.dtype).scatter_(1, target, hit.expm1().to(logits.dtype))  # expm1: softmax - 1
                dx[rows] = dlogits @ weight
                dw += dlogits.T @ x[rows]
        ctx.save_for_backward(dx, dw)
        ctx.tokens = len(x)
        return loss / len(x)

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        return dx * (grad / ctx.tokens), dw * (grad / ctx.tokens), None, None

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        padded = 64 * math.ceil(config.vocab_size / 64)  # GPUs are slow at odd widths like 50257; the logits of the rest are -inf
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(padded, config.n_embd),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=make_norm(config)))
        if config.pos == "learned":
            self.transformer.wpe = nn.Embedding(config.block_size, config.n_embd)
        else:  # constants, so no part of a checkpoint
            for name, table in zip(("cos", "sin"), rope_tables(config.block_size, config.n_embd // config.n_head)):
                self.register_buffer(name, table, persistent=False)
        self.lm_head = nn.Linear(config.n_embd, padded, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied (https://arxiv.org/abs/1608.05859): saves a third of d12
        for name, p in self.named_parameters():  # as GPT-2: std 0.02, less where 2 * n_layer outputs add up in x
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def features(self, idx, pos=None, mask=None):
        """Token ids (B, T), T <= block_size -> what the head reads, (B, T, C). hellaswag.py alone gives pos (B, T), the time
        of each token, and mask (B, 1, T, T), who sees whom: it puts texts with a common beginning side by side."""
        x = self.transformer.wte(idx)  # (B, T, C)
        pos = slice(idx.size(1)) if pos is None else pos
        if self.config.pos == "learned":
            x = x + self.transformer.wpe.weight[pos]  # (T, C), the same for every sequence
        rope = (self.cos[pos], self.sin[pos]) if self.config.pos == "rope" else None
        for block in self.transformer.h:
            x = block(x, rope, mask)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """Token ids (B, T), T <= block_size -> fp32 logits (B, T, padded vocabulary), -inf for the padding; with targets
        (B, T) -> their mean loss, nats a token."""
        x = self.features(idx)
        if targets is not None:
            return HeadLoss.apply(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), self.config.vocab_size)
        logits = self.lm_head(x).float()
        logits[..., self.config.vocab_size:] = -math.inf
        return logits

    def num_params(self):
        """Trained numbers: (all, all but the embedding tables)."""
        tables = ("transformer.wte.weight", "transformer.wpe.weight")
        sizes = {name: p.numel() for name, p in self.named_parameters()}
        return sum(sizes.values()), sum(size for name, size in sizes.items() if name not in tables)

    def flops_per_token(self, T):
        """Training FLOPs a token at sequence length T: 6 a weight that is multiplied (2 forward, 4 backward; the tied
        table counts once, as the head) and 12 n_layer C T for attention (PaLM, https://arxiv.org/abs/2204.02311, app. B,
        which like everyone counts the half that the causal mask spares)."""
        c = self.config
        return 6 * (self.num_params()[1] + self.lm_head.weight.numel()) + 12 * c.n_layer * c.n_embd * T

# ---- 2. The data ----------------------------------------------------------------------------------------------------

# A corpus is a folder of shards in llm.c's format: 256 little-endian int32 of header (magic, version, number of tokens,
# zeros), then the tokens as uint16. Every document begins with <|endoftext|>, which is always the last real id.
SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 1024
VOCAB_SIZE = {"bytes": 257, "gpt2": 50257}  # a byte is its own id and 256 <|endoftext|>; or GPT-2's BPE, via tiktoken

def write_shard(path, tokens):
    """Writes token ids (any array of integers below 65536) to path, which appears only when it is whole."""
    header, tmp = np.zeros(256, "<i4"), Path(f"{path}.{os.getpid()}.tmp")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(tokens)
    tmp.write_bytes(header.tobytes() + np.asarray(tokens).astype("<u2").tobytes())
    os.replace(tmp, path)

def read_shard(path):
    """The shard's tokens, uint16, as a memory map: nothing is read before it is used, and processes share what is."""
    size, header = os.path.getsize(path), np.fromfile(path, "<i4", 256)
    magic, version, count = header[:3] if size >= HEADER_BYTES else (0, 0, 0)
    for wrong, what in (
            (size < HEADER_BYTES, f"{size} bytes are too short for a token shard"),
            (magic != SHARD_MAGIC, f"no token shard, its magic number is {magic} and not {SHARD_MAGIC}"),
            (version != SHARD_VERSION, f"a shard of version {version}, and this program reads version {SHARD_VERSION}"),
            (size != HEADER_BYTES + 2 * int(count), f"truncated or overlong: {size} bytes for {count} tokens"),
            (count == 0, "empty: a header without tokens")):
        if wrong:
            die(f"{path}: {what}; make it again with fineweb.py, or choose others with --input_bin and --input_val_bin")
    return np.memmap(path, "<u2", "r", offset=HEADER_BYTES)

def stdlib_corpus():
    """Paths (train, val) of the Python standard library's own source as bytes: 11 MB of real text that everyone who can
    run this has on disk. A file is held out if the hash of its name says so, the same ones on every machine."""
    root = Path(sysconfig.get_paths()["stdlib"])
    out = Path(f"stdlib_py{sys.version_info.major}.{sys.version_info.minor}")
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data"}  # the last is generated prose
    paths, documents = [out / "train.bin", out / "val.bin"], ([], [])
    if not all(path.exists() for path in paths):
        for path in sorted(root.rglob("*.py")):
            name = path.relative_to(root)
            if not skip & set(name.parts):
                held_out = hashlib.sha256(name.as_posix().encode()).digest()[0] < 8  # 8 in 256, 3 %
                documents[held_out].extend(([VOCAB_SIZE["bytes"] - 1], np.frombuffer(path.read_bytes(), np.uint8)))
        if not documents[True]:
            die(f"no Python source in {root} to learn from: give --input_bin and --input_val_bin")
        out.mkdir(exist_ok=True)
        for path, parts in zip(paths, documents):
            write_shard(path, np.concatenate(parts))
    return str(paths[0]), str(paths[1])

class TokenLoader:
    """Sequences of T tokens out of all shards that match a glob pattern, each used once an epoch.

    A shard of n tokens has (n - 1) // T sequences: number i starts at token i * T and is read with one token more, since the
    target of a token is the one after it. An epoch goes through the shards in an order drawn from (seed, epoch), and through
    the sequences of each in one drawn from (seed, epoch, shard); seed None: in file order. So sequence i of a run depends on i
    alone: no state to save, any process can compute its share, and to resume at a step takes no more than the step."""
    def __init__(self, pattern, T, vocab_size, seed=None):
        self.T, self.vocab_size, self.seed = T, vocab_size, seed
        self.paths = sorted(glob.glob(pattern))
        if not self.paths:
            die(f"no token shards at {pattern}: run `python fineweb.py`, or name yours with --input_bin and --input_val_bin")
        self.shards = [read_shard(path) for path in self.paths]
        self.counts = np.array([(len(shard) - 1) // T for shard in self.shards])
        self.total = int(self.counts.sum())
        self.order = functools.lru_cache(maxsize=4)(self.order)

    def order(self, n, *key):
        return np.arange(n) if self.seed is None else np.random.default_rng([self.seed, *key]).permutation(n)

    def batch(self, first, count, device):
        """Sequences first ... first + count - 1 of the run: inputs and targets, both (count, T) int64 on device."""
        rows = np.empty((count, self.T + 1), np.int64)
        for row, i in zip(rows, range(first, first + count)):
            epoch, i = divmod(i, self.total)
            order = self.order(len(self.shards), epoch)
            ends = np.cumsum(self.counts[order])
            turn = np.searchsorted(ends, i, side="right")  # whose turn it is, and how far it has got:
            shard, i = order[turn], i - ends[turn] + self.counts[order[turn]]
            start = self.order(self.counts[shard], epoch, shard)[i] * self.T
            row[:] = self.shards[shard][start:start + self.T + 1]
            if row.max() >= self.vocab_size:
                die(f"{self.paths[shard]} holds token id {row.max()}, outside the vocabulary of {self.vocab_size}: see --tokenizer")
        rows = torch.from_numpy(rows)
        if device.type == "cuda":  # from page-locked memory the copy runs beside the GPU's work instead of stalling it
            rows = rows.pin_memory().to(device, non_blocking=True)
        rows = rows.to(device)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

# ---- 3. The optimiser -----------------------------------------------------------------------------------------------

def get_lr(step, args):
    """Learning rate of a step. Warm-up from 10 % of the peak, while Adam's averages fill; then either a cosine down to
    learning_rate_decay_frac of the peak at num_iterations, or (wsd, https://arxiv.org/abs/2405.18392) the peak for long
    and a straight line down over the last cooldown_frac of the steps."""
    peak, floor = args.learning_rate, args.learning_rate * args.learning_rate_decay_frac
    if step < args.warmup_iters:
        return peak * (0.1 + 0.9 * step / args.warmup_iters)
    if args.schedule == "cosine":
        done = (step - args.warmup_iters) / max(1, args.num_iterations - args.warmup_iters)
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * done))
    left = (args.num_iterations - step) / max(1, args.cooldown_frac * args.num_iterations)
    return floor + (peak - floor) * min(1.0, left)

class Muon(torch.optim.Optimizer):
    """Momentum whose every step is made orthogonal first (https://kellerjordan.github.io/posts/muon). For matrices.

    A gradient's few large singular values drown its many small ones. With all set to 1, every direction is learned at the
    same speed. Five rounds of an odd polynomial bring whatever is over 1/500 of the norm to between 0.7 and 1.2, which serves
    as well and takes matrix products only. Steps get AdamW's typical size, a root mean square of 0.2
    (https://arxiv.org/abs/2502.16982): one learning rate serves both. Queries, keys and values share a weight, gate and up
    another; they are taken apart, at the rows in `parts` (tiny: loss 0.01 lower). All matrices of one shape are one batch: one
    at a time, as in torch.optim.Muon, they took 11.8 ms of each step of tiny, so they take 6.5 (2 cores with AMX)."""
    def __init__(self, params, lr, weight_decay, momentum=0.95, dtype=torch.bfloat16):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype = dtype  # of the products: bf16 is exact enough, but slow where the hardware lacks it

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            same_shape = {}
            for p in group["params"]:
                if p not in self.state:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                average = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                p.grad.lerp_(average, group["momentum"])  # Nesterov's: where momentum will be next. It replaces the gradient,
                for part in p.grad.split(getattr(p, "parts", len(p))):  # and the parts, views of it, are orthogonalised in place
                    part = part if part.size(0) <= part.size(1) else part.T
                    same_shape.setdefault(part.shape, []).append(part)
            for (rows, cols), parts in same_shape.items():
                x = torch.stack([part.to(self.dtype) for part in parts])  # (n, rows, cols)
                x /= x.norm(dim=(1, 2), keepdim=True) + 1e-7  # no singular value above 1
                for _ in range(5):  # s -> 3.4445 s - 4.775 s^3 + 2.0315 s^5 for each singular value s
                    a = x @ x.mT
                    x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.775, alpha=2.0315), x, beta=3.4445)
                for part, orthogonal in zip(parts, x * (0.2 * math.sqrt(cols))):  # whose root mean square is 1/sqrt(cols)
                    part.copy_(orthogonal)
            for p in group["params"]:
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(p.grad, alpha=group["lr"])

def make_optimizers(model, args):
    """A list: AdamW, and with --optimizer muon, Muon for the blocks' matrices. Gains, biases, embedding stay with AdamW."""
    matrices = [p for p in model.transformer.h.parameters() if p.dim() == 2] if args.optimizer == "muon" else []
    rest = [p for p in model.parameters() if not any(p is m for m in matrices)]
    groups = [  # decay pulls matrices towards zero; on a norm's gain or a bias it would only do harm
        dict(params=[p for p in rest if p.dim() >= 2], weight_decay=args.weight_decay),
        dict(params=[p for p in rest if p.dim() < 2], weight_decay=0.0)]
    # beta2 0.95, as GPT-3: a mean over 20 steps forgets a spike sooner than the usual 0.999's over 1000
    adamw = dict(lr=args.learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)  # fused: one kernel for all tensors
    if args.zero_stage == 1 and dist.is_initialized():  # each process keeps the moments of a share of the parameters
        from torch.distributed.optim import ZeroRedundancyOptimizer  # here, because it takes half a second to import
        optimizers = [ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **adamw)]
    else:
        optimizers = [torch.optim.AdamW(groups, **adamw)]
    if matrices:
        optimizers.append(Muon(matrices, args.learning_rate, args.weight_decay, dtype=getattr(torch, args.dtype)))
    return optimizers

# ---- 4. Checkpoints -------------------------------------------------------------------------------------------------

def save_checkpoint(path, state):
    """Writes state so that at any moment, a power cut included, path holds one whole checkpoint, the old or the new.
    True if it is the new one; a full disk leaves the old, says so, and training can go on."""
    tmp = path.with_name(path.name + ".tmp")
    try:
        with open(tmp, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())  # the bytes are on the disk before the name points at them
        os.replace(tmp, path)
        if os.name == "posix":  # and so is the name
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
        return True
    except (OSError, RuntimeError) as e:  # torch turns some failed writes into RuntimeErrors
        tmp.unlink(missing_ok=True)
        print(f"WARNING: cannot write {path}, what was there is still in place; free some space ({e})", file=sys.stderr)
        return False

def load_checkpoint(path):
    """What save() in train() wrote, or OpenAI's weights for a name like gpt2; on the CPU. weights_only: data, never code."""
    if str(path) in MODELS and str(path).startswith("gpt2"):
        import hellaswag
        return hellaswag.openai_checkpoint(str(path))
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["config"], state["model"], state["tokenizer"], state["args"]  # or a KeyError
        return state
    except Exception as e:  # torch raises a dozen kinds here, and all mean the same to the user
        die(f"{path} is no checkpoint of train_gpt2.py ({type(e).__name__}): give a last.pt or best.pt, as a run writes them")

# ---- 5. Sampling ----------------------------------------------------------------------------------------------------

def load_tokenizer(name):
    """(encode: text -> list of ids, token_bytes: id -> bytes) for "bytes" or "gpt2"."""
    if name == "bytes":
        return lambda text: list(text.encode()), lambda token: bytes([token])
    import tiktoken  # here, because who trains on bytes does not need it
    try:
        bpe = tiktoken.get_encoding("gpt2")
    except OSError as e:  # it downloads the vocabulary, 1.5 MB, once
        die(f"tiktoken cannot load GPT-2's vocabulary ({e}): go online once, or give TIKTOKEN_CACHE_DIR or --sample_every 0")
    return bpe.encode_ordinary, bpe.decode_single_token_bytes

@torch.no_grad()
def generate(model, ids, max_new_tokens, temperature=1.0, top_k=0, generator=None):
    """Yields up to max_new_tokens ids that continue the list ids (one at least), and stops before <|endoftext|>. Temperature 0
    takes the likeliest token; below 1 sharpens, above 1 flattens. top_k: of the k likeliest, 0 of all. The whole context is
    computed anew for each token: a key/value cache would be faster, and twice the code."""
    x = torch.tensor([ids], device=model.lm_head.weight.device)  # (1, T)
    for _ in range(max_new_tokens):
        logits = model(x[:, -model.config.block_size:])[:, -1]  # (1, padded vocabulary)
        if temperature == 0 or top_k:
            keep = 1 if temperature == 0 else min(top_k, model.config.vocab_size)
            logits[logits < torch.topk(logits, keep).values[:, -1:]] = -math.inf
        token = torch.multinomial(F.softmax(logits / (temperature or 1), dim=-1), 1, generator=generator)  # (1, 1)
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
    ids = [model.config.vocab_size - 1] + encode(args.prompt)  # <|endoftext|> is how documents begin
    for token in generate(model, ids, args.max_new_tokens, args.temperature, args.top_k, generator):
        print(decoder.decode(token_bytes(token)), end="", flush=True)
    print(decoder.decode(b"", final=True))

# ---- 6. The command line --------------------------------------------------------------------------------------------

# Where a flag is not given the model's preset decides, and below it these, for one pass over FineWeb's 10B tokens.
# 524,288 tokens a step is GPT-3's choice for this size (https://arxiv.org/abs/2005.14165).
DEFAULTS = dict(
    model="tiny", arch="variant", norm="rmsnorm", mlp="swiglu", pos="rope", n_kv_head=0, bias=False, qk_norm=True,
    tokenizer="gpt2", input_bin="fineweb10B/fineweb_train_*.bin", input_val_bin="fineweb10B/fineweb_val_*.bin",
    sequence_length=1024, total_batch_size=524288, num_iterations=19073, recipe="today", optimizer="muon", schedule="wsd",
    warmup_iters=250, learning_rate_decay_frac=0.0, cooldown_frac=0.7, weight_decay=0.1, grad_clip=1.0, zero_stage=0,
    val_loss_every=250, val_tokens=10485760, hellaswag_every=0, sample_every=250, save_every=250, log_every=1, seed=1337,
    prompt="Hello, I'm a language model,", max_new_tokens=200, temperature=0.8, top_k=50)
# --recipe homework: how the variant was first trained, AdamW at half the rate. Its 1.2e-3 for d12 is twice GPT-3's.
HOMEWORK = dict(qk_norm=False, optimizer="adamw", schedule="cosine", warmup_iters=715, learning_rate_decay_frac=0.1)
MODELS = {
    "tiny": dict(
        output_dir="logtiny", n_layer=4, n_head=4, n_embd=128, tokenizer="bytes", sequence_length=128, total_batch_size=2048,
        num_iterations=600, learning_rate=4e-3, warmup_iters=20, val_loss_every=200, sample_every=200, save_every=200,
        log_every=20, prompt="def ", temperature=0.7)}
for size, log, twin, n_layer, n_head, n_embd, rate in (  # rates fall as in GPT-3's table 2.1: 6, 3, 2.5, 2, all e-4
        ("d12", "124M", "gpt2", 12, 12, 768, 2.4e-3), ("d24", "350M", "gpt2-medium", 24, 16, 1024, 1.2e-3),
        ("d36", "774M", "gpt2-large", 36, 20, 1280, 1e-3), ("d48", "1558M", "gpt2-xl", 48, 25, 1600, 8e-4)):
    MODELS[size] = dict(output_dir=f"log{log}", n_layer=n_layer, n_head=n_head, n_embd=n_embd, learning_rate=rate)
    # OpenAI's weights, to sample from or to go on training: rate and batch are those of nanoGPT's finetune_shakespeare.py
    MODELS[twin] = dict(MODELS[size], output_dir=f"log_{twin}", arch="gpt2", optimizer="adamw", total_batch_size=32768,
                        learning_rate=3e-5, learning_rate_decay_frac=1.0, warmup_iters=0)
GPT2 = dict(norm="layernorm", mlp="gelu", pos="learned", bias=True, qk_norm=False)  # --arch gpt2, and n_kv_head = n_head

FLAGS = {  # --help's heading: (flag, type or choices, meaning and unit), ...
    "the data": [
        ("input_bin", str, "glob pattern of training shards"), ("input_val_bin", str, "of validation shards"),
        ("tokenizer", list(VOCAB_SIZE), "what ids mean; bytes without --input_bin: Python's standard library"),
        ("output_dir", str, "folder for main.log, last.pt and best.pt")],
    "the model": [
        ("model", list(MODELS), "0.8M, 124M, 350M, 774M, 1558M; gpt2...: OpenAI's weights"), ("n_layer", int, "blocks"),
        ("n_head", int, "query heads"), ("n_kv_head", int, "key/value heads; 0: half of n_head"), ("n_embd", int, "width"),
        ("arch", ["variant", "gpt2"], "gpt2 turns every switch below back; one given beside it wins"),
        ("norm", ["rmsnorm", "layernorm"], "normalisation"), ("mlp", ["swiglu", "gelu"], "the MLP's nonlinearity"),
        ("pos", ["rope", "learned"], "how positions enter"), ("bias", bool, "biases in linear layers and LayerNorm"),
        ("qk_norm", bool, "RMSNorm on queries and keys")],
    "a step": [
        ("batch_size", int, "sequences in a micro-batch of one process; not given: what fits the device"),
        ("sequence_length", int, "tokens in a sequence"), ("num_iterations", int, "steps"),
        ("total_batch_size", int, "tokens in a step, over all micro-batches and processes"),
        ("overfit_single_batch", bool, "train on the first batch only: a check of everything")],
    "the optimiser": [
        ("recipe", ["today", "homework"], "homework: AdamW at half the rate, a cosine, no QK-norm, 715 warmup_iters; a flag wins"),
        ("optimizer", ["adamw", "muon"], "muon: for the blocks' matrices, AdamW for the rest"),
        ("learning_rate", float, "peak rate"), ("warmup_iters", int, "steps from a tenth of the peak rate to all of it"),
        ("schedule", ["cosine", "wsd"], "after the warm-up: a cosine, or stable and then linear decay"),
        ("learning_rate_decay_frac", float, "final rate, as a fraction of the peak"),
        ("cooldown_frac", float, "wsd's decay, as a fraction of all steps"), ("grad_clip", float, "largest norm; 0: any"),
        ("weight_decay", float, "pull of matrices towards zero, a step and unit of learning rate"),
        ("zero_stage", [0, 1], "1: processes share AdamW's state instead of each keeping all of it")],
    "what to see and keep, in steps (0: never)": [
        ("val_loss_every", int, "a validation"), ("val_tokens", int, "how many tokens it takes, at most all"),
        ("hellaswag_every", int, "a score, as hellaswag.py's acc_norm"), ("sample_every", int, "a sample"),
        ("save_every", int, "last.pt"), ("log_every", int, "a line"), ("resume", bool, "go on, exactly, from last.pt")],
    "the machine": [
        ("device", ["cuda", "mps", "cpu"], "not given: the first that is there"), ("seed", int, "of weights, data, samples"),
        ("dtype", ["float32", "bfloat16"], "of matrix products; not given: bfloat16 where the hardware has it"),
        ("compile", bool, "torch.compile; not given: on CUDA")],
    "sampling": [
        ("sample", str, "a checkpoint: do not train, let it write"), ("prompt", str, "what the text begins with"),
        ("temperature", float, "0: the likeliest token"), ("top_k", int, "draw from the k likeliest; 0: from all"),
        ("max_new_tokens", int, "at most")]}
# What makes the model and the order of the data cannot change when a run resumes; what belongs to a launch is not kept.
FIXED = ["model", "arch", "recipe", *GPT2, "n_layer", "n_head", "n_kv_head", "n_embd", "tokenizer", "sequence_length",
         "total_batch_size", "optimizer", "seed"]
LAUNCH = ["output_dir", "batch_size", "resume", "zero_stage", "device", "compile", "sample", "export"]

def parse_args(argv):
    """(args, checkpoint or None). A flag is as given, else as in the checkpoint that --resume or --sample names, else as in
    the model's preset, else as in DEFAULTS, else None."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog="In brackets: default of tiny / of d12.")
    parser.error = die  # argparse would print a page of usage before the line that matters
    tiny, d12 = ({**DEFAULTS, **MODELS[model]} for model in ("tiny", "d12"))
    for heading, flags in FLAGS.items():
        group = parser.add_argument_group(heading)
        for name, kind, text in flags:
            if name in d12:
                text += f" [{tiny[name]}]" if tiny[name] == d12[name] else f" [{tiny[name]} / {d12[name]}]"
            group.add_argument(f"--{name}", help=text, **(
                dict(action=argparse.BooleanOptionalAction) if kind is bool else  # a --no- form too
                dict(type=type(kind[0]), choices=kind) if isinstance(kind, list) else dict(type=kind, metavar=kind.__name__)))
    parser.add_argument("--export", nargs=2, metavar=("CHECKPOINT", "FOLDER"), help="write one as a folder for transformers & co.")
    args, checkpoint = parser.parse_args(argv), None
    homework = args.recipe == "homework"
    defaults = {**DEFAULTS, **(HOMEWORK if homework else {}), **MODELS[args.model or "tiny"]}
    defaults["learning_rate"] /= 1 + homework
    args.output_dir = Path(args.output_dir or defaults["output_dir"])
    if (args.arch or defaults["arch"]) == "gpt2":
        defaults.update(GPT2, n_kv_head=args.n_head or defaults["n_head"])
    if args.sample or args.resume:
        checkpoint = load_checkpoint(args.sample or args.output_dir / "last.pt")
        defaults = checkpoint["args"]
        for name in FIXED if args.resume else []:
            if getattr(args, name) not in (None, defaults.get(name)):
                die(f"--{name} {getattr(args, name)} cannot go on in {args.output_dir}, which was begun with {defaults.get(name)}: "
                    f"drop the flag, or drop --resume and give another --output_dir")
    elif not args.input_bin and (args.tokenizer or defaults["tokenizer"]) == "bytes":
        defaults["input_bin"], defaults["input_val_bin"] = stdlib_corpus()
    for name, value in {**defaults, **{k: v for k, v in vars(args).items() if v is not None}}.items():
        if isinstance(value, (int, float)) and value < 0:
            die(f"--{name} {value}: give a number that is not negative")
        setattr(args, name, value)
    return args, checkpoint

# ---- 7. The run -----------------------------------------------------------------------------------------------------

# dense bf16 TFLOP/s from the cards' data sheets, against which MFU (model FLOPs utilisation) is stated
PEAK = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "4090": 165, "3090": 71}

def pick_device(name):
    there = [kind for kind in ("cuda", "mps", "cpu") if kind == "cpu" or getattr(torch, kind).is_available()]
    if name and name not in there:
        die(f"--device {name}: torch sees none here, leave the flag out or install a torch that is built for it")
    name = name or there[0]
    if name == "cpu" and sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        # glibc gives freed tensors back to the system, and to get them anew, 4 kB at a time, took a third of each step of d12
        # (4 x 256 tokens, bf16, 2 cores: 1.8 s instead of 1.2). So: M_MMAP_MAX 0, M_TRIM_THRESHOLD never.
        ctypes.CDLL(None).mallopt(-4, 0), ctypes.CDLL(None).mallopt(-1, -1)
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)

def pick_autocast(dtype, device):
    """(dtype, a function that opens autocast): matrix products in bf16 where the hardware has it and does not emulate it (d12:
    2.1 times as fast, 2 cores with AMX). Weights, residual stream, norms and loss stay fp32: bf16's 8 bits are too few."""
    cpuinfo = Path("/proc/cpuinfo")  # Linux; on Intel and AMD it says amx_bf16 or avx512_bf16, on ARM bf16
    flags = cpuinfo.read_text().split() if device.type == "cpu" and cpuinfo.exists() else []
    native = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else
              any(flag in flags for flag in ("amx_bf16", "avx512_bf16", "bf16")))
    dtype = dtype or ("bfloat16" if native else "float32")
    return dtype, functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=dtype == "bfloat16")

def all_sum(values, device):
    """The sum over all processes of a list of numbers, element by element."""
    if dist.is_initialized():
        values = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(values)
        values = values.tolist()
    return values

def pick_batch_size(config, params, device, sequences):
    """The largest micro-batch that fits the device and divides sequences, what one process has to see in a step."""
    tokens = 4096  # on a CPU: enough to keep its matrix products busy
    if device.type == "cuda":
        # A parameter takes 16 bytes (with gradient and AdamW's moments), HeadLoss and CUDA 4 GB; a token what blocks keep for the
        # backward pass: 67 bytes a channel and block in eager bf16 (counted with saved_tensors_hooks), less when compiled.
        room = 0.9 * torch.cuda.get_device_properties(device).total_memory - 16 * params - 4e9
        tokens = min(room / (75 * config.n_layer * config.n_embd), 65536)  # 64 x 1024, the FineWeb speedrun's
    return max(b for b in range(1, sequences + 1) if sequences % b == 0 and b <= max(1, tokens / config.block_size))

@torch.no_grad()
def evaluate(model, data, tokens, B, autocast, device):
    """Mean loss, nats a token, over the first tokens // T sequences of data, whatever the batch size and world."""
    n, loss = min(tokens // data.T, data.total), 0.0
    for i in range(RANK * B, n, WORLD * B):
        x, y = data.batch(i, min(B, n - i), device)
        with autocast():
            loss += model(x, y).item() * len(x)
    return all_sum([loss], device)[0] / n

def open_output_dir(path, resume_step, set_aside):
    """Makes the folder of a run. One that holds a run is never written over: refuse, or (set_aside) rename it. On resuming,
    cut from main.log what will be written again, the lines from resume_step on, and what a crash or a full disk tore."""
    log, tmp = path / "main.log", path / "main.log.tmp"
    if resume_step is None and any((path / name).exists() for name in ("main.log", "last.pt", "best.pt")):
        if not set_aside:
            die(f"{path} holds a run: add --resume to go on with it, or give another --output_dir")
        aside = next(Path(f"{path}.{i}") for i in range(1, 10**6) if not Path(f"{path}.{i}").exists())
        path.rename(aside)
        print(f"kept the earlier run as {aside}")
    path.mkdir(parents=True, exist_ok=True)
    if resume_step is not None and log.exists():
        lines = re.finditer(r"^s:(\d+) .*\n", log.read_text(), re.MULTILINE)
        tmp.write_text("".join(line[0] for line in lines if int(line[1]) < resume_step))
        os.replace(tmp, log)

def train(args, checkpoint, argv):
    """A run, or one process of those that torchrun started for it: every one executes this function, on its own device and
    its own share of each batch, and they meet where gradients and losses are averaged. Returns the exit code."""
    source = Path(__file__).read_text()  # now: when a checkpoint carries it, the file may have been edited
    device = pick_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # what stays fp32 may multiply in TF32
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")  # between GPUs, or between CPUs
    args.dtype, autocast = pick_autocast(args.dtype, device)

    # the model, the same in every process because the seed is
    args.block_size, args.vocab_size = T, V = args.sequence_length, VOCAB_SIZE[args.tokenizer]
    try:
        config = GPTConfig(**{name: getattr(args, name) for name in GPTConfig.__dataclass_fields__})
    except ValueError as e:
        die(e)
    torch.manual_seed(args.seed)
    with device:  # made where it will live: on a CPU first, d48's 1.6 billion random numbers would take long
        model = GPT(config)
    if args.model.startswith("gpt2") and not checkpoint:
        weights = load_checkpoint(args.model)["model"]
        weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][:T]
        try:
            model.load_state_dict(weights)
        except RuntimeError:
            die(f"--model {args.model}: its weights fit its own shape and at most 1024 tokens, drop the flags that change that")
    (params, blocks), flops = model.num_params(), model.flops_per_token(T)
    print0(f"model {args.model}: {config.n_layer} layers, {config.n_head} heads ({config.n_kv_head} key/value), "
           f"{config.n_embd} wide | {params:,} parameters, {blocks:,} without embeddings | {flops / 1e6:,.1f} MFLOP a token")

    # the data, and how a step is cut into micro-batches
    train_data, val_data = TokenLoader(args.input_bin, T, V, args.seed), TokenLoader(args.input_val_bin, T, V)
    total, block = args.total_batch_size, (args.batch_size or 1) * T * WORLD
    if total % block or not total:
        die(f"--total_batch_size {total} is no multiple of {block} = batch_size {args.batch_size or 1} x sequence_length {T} x "
            f"{WORLD} processes: give {max(1, total // block) * block} or {(total // block + 1 + (total < block)) * block}")
    for data, need in (train_data, total // T), (val_data, 1):
        if data.total < need:
            die(f"{data.paths[0]}: {data.total} sequences of {T} tokens are too few for one batch of {need}, give more shards "
                f"or a smaller --sequence_length or --total_batch_size")
    B = args.batch_size or pick_batch_size(config, params, device, total // T // WORLD)
    accumulate = total // (B * T * WORLD)  # micro-batches whose gradients add up to a step's
    if RANK == 0:
        open_output_dir(args.output_dir, checkpoint and checkpoint["step"], set_aside=not argv)
    compiled = args.compile if args.compile is not None else device.type == "cuda"
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print0(f"device {card}, {args.dtype}{', compiled' * compiled} | {total:,} tokens a step = {B} sequences x {T} tokens x {accumulate} "
           f"micro-batches x {WORLD} processes\n"
           f"data {args.input_bin}: {train_data.total * T:,} tokens an epoch, {args.num_iterations * total:,} in this run")

    # what trains it
    forward = ddp = torch.compile(model, dynamic=False) if compiled else model  # static shapes make the fastest kernels
    if WORLD > 1:  # DDP averages gradients over processes while the backward pass is still making others
        ddp = nn.parallel.DistributedDataParallel(forward, gradient_as_bucket_view=True)  # or they would be there twice
    optimizers = make_optimizers(model, args)
    last_pt, best_pt, main_log = (args.output_dir / name for name in ("last.pt", "best.pt", "main.log"))
    start, train_loss, val_loss, best = 0, math.inf, math.inf, math.inf
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        for optimizer, state in zip(optimizers, checkpoint["optimizer"]):
            optimizer.load_state_dict(state)
        start, train_loss, val_loss, best = (checkpoint[k] for k in ("step", "train_loss", "val_loss", "best_val_loss"))
        if best_pt.exists():  # may be younger than last.pt, if the run was killed between the two
            best = min(best, load_checkpoint(best_pt)["val_loss"])
        print0(f"resuming {args.output_dir} at step {start}")
        if args.sequences != train_data.total:  # more of FineWeb, perhaps
            print0(f"NOTE: an epoch had {args.sequences:,} sequences and has {train_data.total:,} now, in another order")
    args.sequences = train_data.total

    def report(text, line):
        """To the console and, in llm.c's form, to main.log: the same digits in both."""
        print0(text)
        try:
            with open(main_log if RANK == 0 else os.devnull, "a") as f:
                f.write(line + "\n")
        except OSError as e:  # a full disk is no reason to lose the run
            print(f"WARNING: cannot write {main_log}: {e}", file=sys.stderr)

    def save(path, step):
        """A checkpoint with step updates behind it. Random state is no part of it: there is no dropout, and the order of
        the data and the samples are drawn from the seed and the step."""
        for optimizer in optimizers:
            if hasattr(optimizer, "consolidate_state_dict"):
                optimizer.consolidate_state_dict(to=0)  # --zero_stage 1: gather the shares
        return RANK > 0 or save_checkpoint(path, dict(
            config=asdict(config), model=model.state_dict(), optimizer=[o.state_dict() for o in optimizers], step=step,
            train_loss=train_loss, val_loss=val_loss, best_val_loss=best, tokenizer=args.tokenizer, source=source,
            args={k: v for k, v in vars(args).items() if k not in LAUNCH}))

    def micro_batch(k):
        """This process's part of micro-batch k of the run."""
        return train_data.batch(((k % accumulate if args.overfit_single_batch else k) * WORLD + RANK) * B, B, device)

    # Ctrl-C and SIGTERM: finish the step, save, stop; a second Ctrl-C stops at once
    signals, again = [], shlex.join(["train_gpt2.py", *(a for a in argv if a != "--resume"), "--resume"])
    def on_signal(number, frame):
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)
        os.write(2, b"\nstopping after this step\n")  # print is not safe in here
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)

    tokenizer = load_tokenizer(args.tokenizer) if args.sample_every or args.hellaswag_every else None
    if args.hellaswag_every:
        import hellaswag  # every process takes every WORLDth question
        quiz = [hellaswag.encode_question(q, tokenizer[0], T) for q in hellaswag.load_questions()[RANK::WORLD]]
    x, y = micro_batch(start * accumulate)
    peak = next((1e12 * PEAK[name] for name in PEAK if name in card), None)
    recent, first = [], None  # seconds of the steps since the last line; when the first step, which compiles, was done
    for step in range(start, args.num_iterations + 1):
        last = step == args.num_iterations
        due = lambda every: every > 0 and (step % every == 0 or last)

        # look at it
        if due(args.val_loss_every):
            val_loss = evaluate(forward, val_data, args.val_tokens, B, autocast, device)
            report(f"step {step:5d}/{args.num_iterations} | val loss {val_loss:.6f}", f"s:{step} tel:{val_loss:.6f}")
            if val_loss < best and step > 0:
                best = val_loss
                save(best_pt, step)
        if due(args.hellaswag_every):
            share = hellaswag.accuracy(hellaswag.answer(model, quiz, autocast), quiz)[1]
            right, asked = all_sum([share * len(quiz), len(quiz)], device)
            report(f"step {step:5d}/{args.num_iterations} | HellaSwag {right / asked:.6f}", f"s:{step} eval:{right / asked:.6f}")
        if due(args.sample_every) and RANK == 0:
            print(f"--- a sample after {step} steps")
            print_sample(model, tokenizer, args, args.seed + step)
            print("---")
        if (due(args.save_every) or last) and step > start and not save(last_pt, step) and last:
            die(f"the last state of {args.output_dir} is not saved: free some space, then go on with {again}")
        if last:
            break

        # and train it: gradients add up over the micro-batches, as if they were one large batch; then one update
        t0, loss_sum, lr = time.time(), torch.zeros((), device=device), get_lr(step, args)
        for k in range(step * accumulate, (step + 1) * accumulate):
            with ddp.no_sync() if WORLD > 1 and (k + 1) % accumulate else contextlib.nullcontext():  # meet once a step
                with autocast():
                    loss = ddp(x, y) / accumulate  # the mean over the step
                loss_sum += loss.detach()
                x, y = micro_batch(k + 1)  # while the GPU is at work on this one
                loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)  # one odd batch moves not too far
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        train_loss, stop = all_sum([loss_sum.item() / WORLD, len(signals)], device)  # only here Python waits for the GPU
        recent.append(time.time() - t0)  # so this is the whole step, not only its launch
        if not math.isfinite(train_loss + norm):
            good = f"{last_pt} is the last good checkpoint" if last_pt.exists() else "there is no checkpoint yet"
            die(f"step {step} has loss {train_loss} and gradient norm {norm:g}: {good}, try a lower --learning_rate")

        # say so
        if first is None:
            first = time.time()
            print0(f"first step done {first - START:.1f} s after the start")
        if due(args.log_every) or step == args.num_iterations - 1:
            ms, speed = 1000 * sum(recent) / len(recent), total * len(recent) / sum(recent)
            left = (time.time() - first) / max(1, step - start) * (args.num_iterations - step - 1) / 60
            mfu = f" | MFU {speed * flops / WORLD / peak:.1%}" if peak else ""
            report(f"step {step:5d}/{args.num_iterations} | loss {train_loss:.6f} | lr {lr:.2e} | norm {norm:.4f} | "
                   f"{ms:.1f} ms | {speed:,.0f} tok/s{mfu} | {left:.1f} min left",
                   f"s:{step} trl:{train_loss:.6f} lr:{lr:.2e} norm:{norm:.4f} ms:{ms:.1f}")
            recent = []
        if stop:
            if save(last_pt, step + 1):
                print0(f"stopped with {last_pt} written. Go on with the same command and --resume: {again}")
            return 128 + (signals or [signal.SIGTERM])[0]  # as a shell reports death by signal

    memory = f", peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device.type == "cuda" else ""
    best_pt = best_pt if best_pt.exists() else last_pt
    then = "fineweb.py\n    python train_gpt2.py --model d12" if args.model == "tiny" else f"hellaswag.py -m {best_pt}"
    print0(f"done in {time.time() - START:.0f} s{memory}. Newest state: {last_pt}, lowest validation loss ({best:.4f}): {best_pt}\n"
           f"Next:\n    python train_gpt2.py --sample {best_pt} --prompt {shlex.quote(args.prompt)}\n    python {then}")
    return 0

def main(argv):
    try:
        args, checkpoint = parse_args(argv)
        if args.export:
            import hellaswag
            return hellaswag.export(*args.export)
        if args.sample:
            model = GPT(GPTConfig(**checkpoint["config"]))
            model.load_state_dict(checkpoint["model"])
            return print_sample(model.to(pick_device(args.device)), load_tokenizer(checkpoint["tokenizer"]), args, args.seed)
        code = train(args, checkpoint, argv)
    except OSError as e:  # no permission, no space, a disk that is gone
        die(f"{e}: mend that, or see --output_dir, --input_bin and --input_val_bin; a run that had begun takes --resume")
    except torch.OutOfMemoryError:
        die("out of memory: give a smaller --batch_size (the total stays as it is), --sequence_length or --model")
    except RuntimeError as e:
        if not dist.is_initialized() or not (isinstance(e, dist.DistError) or "gloo" in str(e)):
            raise
        print(f"error: lost another process, start all again with --resume ({str(e).splitlines()[0]})", file=sys.stderr)
        os._exit(1)  # at once: an ordinary exit would wait for the others
    if dist.is_initialized():
        gc.collect()  # DDP's cycles keep gloo's threads alive, and one that wakes while Python ends aborts the process
        dist.destroy_process_group()
    return code

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

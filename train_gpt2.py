"""
How GPT-2 is trained, and how one would train it today: one file, to be read from top to bottom.

A language model reads a text and says what comes next. To it a text is a row of whole numbers, the
token ids: a token is a piece of text, a byte or a frequent word. At each position the model gives
every possible next id a score (a logit), and softmax turns the scores into probabilities. The loss
of a position is -log p(the id that really comes next), with the natural logarithm, so in nats:
    0       the model was certain, and right
    5.5     it gave the same probability to all 257 ids of a vocabulary of bytes, which has one id
            more to mark where a text begins: ln 257 = 5.5
    10.8    it gave the same to all 50,257 ids of GPT-2's vocabulary: ln 50,257 = 10.8
    3.3     where a trained GPT-2 ends: as unsure as among e^3.3 = 27 equally likely ids
Training lowers the mean loss. Each step runs the model on some text, computes the gradient of the
loss, and moves every weight a little. A run takes hundreds to tens of thousands of steps. Nobody
has to label anything: the right answer at each position is the id that follows in the text.

Letters and words in comments:
    B   batch: how many sequences are processed side by side
    T   time: the position in a sequence, or how many positions there are
    C   channels: the width of the vector that stands for one position (n_embd)
    D   the width of one attention head, C / n_head
    V   vocabulary: how many different ids there are
    N   B * T, all tokens of a batch in one row
    fp32, bf16   32-bit numbers, and 16-bit ones with the same range but only 8 bits of precision.
                 bf16 takes half the memory and is several times as fast. autocast is PyTorch's
                 way of using it for the operations that do not need more bits.
    kernel       one function that runs on the GPU
    head         an attention head; lm_head and HeadLoss are about the output layer

Launch it:
    python train_gpt2.py                       a minute on a laptop: it learns to write Python
    python fineweb.py                          downloads FineWeb, 10 billion tokens of web pages
    python train_gpt2.py --model d12           trains the shape of GPT-2's 124M on them, on one GPU
    torchrun --standalone --nproc_per_node=8 train_gpt2.py --model d12       the same on eight
    python train_gpt2.py --sample logtiny/best.pt --prompt "def "            let it write

The sections: 1 the model, 2 the loss, 3 the data, 4 the optimizer, 5 checkpoints, 6 evaluate and
sample, 7 the run, 8 the bridge to transformers.

The model is a variant of GPT-2 with what became usual after it: RMSNorm, rotary positions,
grouped-query attention, QK-norm, SwiGLU, and no biases. Each is explained where it is built, and is
a switch; --arch gpt2 turns all of them back to 2019. (GPT-2 also had dropout, setting random
numbers to 0 in training; we never do.) Names such as wte, c_proj and lm_head are GPT-2's own, and
the flags have the names of llm.c, GPT-2 training in C (https://github.com/karpathy/llm.c).
report/one_step.py shows one training step with real numbers, to be read beside this file.
"""

import argparse
import codecs
import copy
import ctypes
import datetime
import functools
import gc
import glob
import io
import json
import math
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # You can skip this: it keeps Ctrl-C quiet while PyTorch is imported, which takes seconds. Once
    # there is something to save, catch_signals() in section 7 takes over.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import filelock
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import fineweb
import hellaswag

START = time.time()

# torchrun starts one process for each GPU, and tells it through these variables which one it is:
# its number among all processes, its number on this machine (and so its GPU), and how many there
# are. Without torchrun there is one process, number 0 of 1. DDP (distributed data parallel) is how
# PyTorch trains with several: each has a copy of the model and its own part of the batch, and the
# gradients of all are averaged.
ddp_rank = int(os.environ.get("RANK", 0))
ddp_local_rank = int(os.environ.get("LOCAL_RANK", 0))
world_size = int(os.environ.get("WORLD_SIZE", 1))

def print0(text):
    """Prints, but in process 0 only: eight processes would say everything eight times."""
    if ddp_rank == 0:
        print(text, flush=True)

# -------------------------------------------------------------------------------------------------
# 1. The model

@dataclass
class GPTConfig:
    """The shape of a model. It raises a ValueError if the widths do not divide evenly.

    The words that are new here are explained below, where they are built.
    """

    n_layer: int = 12         # blocks, one after the other
    n_head: int = 12          # attention heads, side by side in each block
    n_kv_head: int = 0        # key/value heads; 0: n_head / 2, so that two query heads share one
    n_embd: int = 768         # C, numbers in the vector of one position
    block_size: int = 1024    # the longest sequence, in tokens
    vocab_size: int = 50257   # V, ids that exist
    norm: str = "rmsnorm"     # or layernorm, as GPT-2
    mlp: str = "swiglu"       # or gelu, as GPT-2
    pos: str = "rope"         # how positions enter; or learned, as GPT-2
    bias: bool = False        # whether linear layers and LayerNorm have biases, as GPT-2's do
    qk_norm: bool = True      # normalize each head's queries and keys; GPT-2 does not

    def __post_init__(self):
        if min(self.n_layer, self.n_head, self.n_embd, self.block_size, self.vocab_size) < 1:
            raise ValueError("layers, heads, width, sequence length, vocabulary: at least 1 each")
        if self.n_kv_head == 0:
            # an odd number of heads cannot be paired: there every query head keeps its own
            self.n_kv_head = self.n_head // 2 if self.n_head % 2 == 0 else self.n_head
        if self.n_embd % self.n_head or self.n_embd // self.n_head % 2:
            # even, because rotary positions, below, rotate pairs of numbers
            raise ValueError(f"n_embd {self.n_embd} / n_head {self.n_head} must be whole and even")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is no multiple of n_kv_head {self.n_kv_head}")

class RMSNorm(nn.Module):
    """Divides each vector by its root mean square, and scales each channel by a gain it learns.

    x (..., dim) -> the same shape and dtype (https://arxiv.org/abs/1910.07467). Vectors that have
    passed through many layers would grow or shrink without bound; here they get one size again.
    GPT-2's LayerNorm also subtracts the mean and adds a bias. That turned out not to be needed.
    """

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))  # the gain

    def forward(self, x):
        # x may be bf16, which has 8 bits of precision. A sum of squares needs more, so: fp32. The
        # 1e-6 keeps a vector of zeros from being divided by 0.
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + 1e-6)
        return (y * self.weight).to(x.dtype)

def make_norm(config):
    """The kind of normalization that the config asks for, for vectors of n_embd channels."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.n_embd)
    return nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)

# Attention is how a position collects information from itself and those before it. Each position
# makes three vectors: a query q (what it is looking for), a key k (what it has to offer) and a
# value v (what it gives to those who look at it). A position compares its query with its own key
# and that of every earlier position, by their dot product, and takes a mean of the values, in
# which those with fitting keys weigh most.
#
# None of this depends on where a key stands: attention sees a set of positions, and no order.
# GPT-2 adds a learned vector to each position. Rotary positions (RoPE,
# https://arxiv.org/abs/2104.09864) instead rotate queries and keys, pair of channels by pair, by
# angles that grow with time. For a given query and key, rotated by a and by b, the dot product
# depends on the difference a - b alone. So attention sees distances: "three tokens ago" looks the
# same everywhere in the text.

def rope_tables(T, D, base=10000.0):
    """cos and sin of every angle, each (T, D/2).

    Pair i of a head's D channels is (i, i + D/2), and at time t it is rotated, like a point in the
    plane, by t * base^(-2i/D) radians. The first pairs turn fast and tell neighbors apart. The last
    ones hardly turn: they tell far from near.
    """
    turn = base ** (-torch.arange(0, D, 2).float() / D)  # (D/2,), radians from token to token
    angle = torch.outer(torch.arange(T).float(), turn)  # (T, D/2)
    return angle.cos(), angle.sin()

def apply_rope(x, cos, sin):
    """Rotates queries or keys x (B, T, heads, D) by their time. cos and sin are (T, D/2)."""
    # (T, 1, D/2): the angle depends on time, dimension 1 of x, and is the same for every head
    cos = cos.unsqueeze(1)
    sin = sin.unsqueeze(1)
    # the two members of every pair
    a, b = x.chunk(2, dim=-1)  # (B, T, heads, D/2) both
    rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    # the tables are fp32, so the products are too; go back to what x was
    return rotated.to(x.dtype)

def causal_attention(q, k, v):
    """softmax(q k^T / sqrt(D)) v, each position over itself and the past.

    q (B, n_head, T, D), k and v (B, n_kv_head, T, D) -> (B, n_head, T, D). Several query
    heads share a key and value head, to save weights. In plain form:

        k = k.repeat_interleave(n_head // n_kv_head, dim=1)     # one for each query head,
        v = v.repeat_interleave(n_head // n_kv_head, dim=1)     # (B, n_head, T, D)
        scores = q @ k.mT / math.sqrt(D)                        # (B, n_head, T, T)
        future = torch.ones(T, T).triu(1).bool()                # row t, column u: True where u > t
        scores = scores.masked_fill(future, -math.inf)          # nobody may look at the future
        return F.softmax(scores, dim=-1) @ v                    # a weighted mean of the values

    Why divide by sqrt(D)? A dot product adds up D products. If the numbers are random, of standard
    deviation 1, their sum has the standard deviation sqrt(D). Without the division the largest
    score of a row would take all of the softmax, and the other positions would get no gradient.
    """
    # What follows picks the fastest kernel that computes this.
    if q.device.type == "cpu":
        # a CPU's attention is faster in fp32 than in bf16
        q, k, v = q.float(), k.float(), v.float()
    if q.device.type == "cuda" and q.dtype == torch.float32:
        # In fp32 PyTorch has no memory-saving kernel for shared keys and values: copy them, so that
        # every query head has its own.
        k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
        v = v.repeat_interleave(q.size(1) // v.size(1), dim=1)
    # Flash attention (https://arxiv.org/abs/2205.14135): the same numbers as above, computed tile
    # by tile in the small fast memory of the chip, so that no (T, T) matrix is ever stored.
    grouped = q.size(1) != k.size(1)
    # autocast would turn the fp32 q, k and v of a CPU into bf16: switch it off
    with torch.autocast(q.device.type, enabled=False):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)

class CausalSelfAttention(nn.Module):
    """Every position gathers what it needs from the positions before it, as described above.

    Each head does this on its own, with a q, k and v of D numbers that it makes from all C
    channels. So one may look for the verb, and another for the matching bracket. In grouped-query
    attention (https://arxiv.org/abs/2305.13245) query heads 0 and 1 share key/value head 0, heads
    2 and 3 share head 1, and so on. That saves weights.
    And a program that writes text usually keeps the keys and values of all earlier positions (this
    file does not): they then take half the memory.
    """

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.n_kv_head = config.n_kv_head
        self.head_dim = config.n_embd // config.n_head
        kv_dim = config.n_kv_head * self.head_dim
        self.c_q = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.c_k = nn.Linear(config.n_embd, kv_dim, bias=config.bias)
        self.c_v = nn.Linear(config.n_embd, kv_dim, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim)
            self.k_norm = RMSNorm(self.head_dim)

    def forward(self, x, rope):
        """x (B, T, C) -> (B, T, C). rope is (cos, sin), each (T, D/2), or None."""
        B, T, C = x.shape
        # view: the C channels of a position are its heads, D channels each
        q = self.c_q(x).view(B, T, self.n_head, self.head_dim)
        k = self.c_k(x).view(B, T, self.n_kv_head, self.head_dim)
        v = self.c_v(x).view(B, T, self.n_kv_head, self.head_dim)
        if self.qk_norm:
            # QK-norm: after it every q and k has length sqrt(D) (times the gain), so that a score
            # lies between -sqrt(D) and sqrt(D), however large c_q and c_k grow. At a high learning
            # rate a softmax would otherwise get stuck on one position
            # (https://arxiv.org/abs/2302.05442).
            q = self.q_norm(q)
            k = self.k_norm(k)
        if rope is not None:
            # Rotate before the transpose below: apply_rope() expects time in dimension 1. Values
            # are not rotated: the angle has to decide who is looked at, and not to change what is
            # brought back.
            q = apply_rope(q, *rope)
            k = apply_rope(k, *rope)
        # (B, T, heads, D) -> (B, heads, T, D), the order that attention expects
        y = causal_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        # put the heads side by side again, and let c_proj mix what they found
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.c_proj(y)

class MLP(nn.Module):
    """Multi-layer perceptron: works on what attention has brought to a position, each by itself.

    GPT-2's MLP widens the vector to 4C, applies GELU (a smooth ReLU), and goes back to C. SwiGLU
    (https://arxiv.org/abs/2002.05202) makes two wide vectors, and one of them, the gate, decides
    how much of the other passes. It has three matrices instead of two, so each gets 2/3 of the
    width 4C, which is 8/3 C, and the cost stays the same.
    """

    def __init__(self, config):
        super().__init__()
        self.swiglu = config.mlp == "swiglu"
        if self.swiglu:
            # rounded up to a multiple of 64, because GPUs multiply matrices in blocks
            hidden = 64 * math.ceil(8 * config.n_embd / 3 / 64)
            self.c_gate = nn.Linear(config.n_embd, hidden, bias=config.bias)
            self.c_up = nn.Linear(config.n_embd, hidden, bias=config.bias)
            self.c_down = nn.Linear(hidden, config.n_embd, bias=config.bias)
        else:
            self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
            self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        """x (B, T, C) -> (B, T, C)."""
        if self.swiglu:
            # silu(x) = x * sigmoid(x): near 0 for negative x, near x for positive x
            return self.c_down(F.silu(self.c_gate(x)) * self.c_up(x))
        # tanh: the approximation of GELU that OpenAI trained GPT-2 with
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))

class Block(nn.Module):
    """Attention, then the MLP. Neither replaces x: each adds to it.

    The x that runs through all blocks is called the residual stream. A block reads a normalized
    copy of it (pre-norm) and writes by adding. Adding passes gradients on unchanged. So they reach
    the first block as directly as the last one, and deep models can be trained.
    """

    def __init__(self, config):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, rope):
        x = x + self.attn(self.ln_1(x), rope)
        x = x + self.mlp(self.ln_2(x))
        return x

class GPT(nn.Module):
    """The whole model: ids -> vectors -> blocks -> scores for the next id."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        # GPUs are slow at odd widths like 50,257, so the table is padded to a multiple of 64, here
        # 50,304. No text has the extra ids, and their scores are set to -inf.
        padded_vocab_size = 64 * math.ceil(config.vocab_size / 64)
        # GPT-2's names: wte is the embedding, a table with a vector for each id; wpe is the one for
        # positions; h are the blocks, and ln the norms, also where they are RMSNorm.
        self.transformer = nn.ModuleDict()
        self.transformer["wte"] = nn.Embedding(padded_vocab_size, config.n_embd)
        self.transformer["h"] = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.transformer["ln_f"] = make_norm(config)
        if config.pos == "learned":
            self.transformer["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        else:
            cos, sin = rope_tables(config.block_size, config.n_embd // config.n_head)
            # buffers move to the GPU with the model; persistent=False: not stored in checkpoints
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        self.lm_head = nn.Linear(config.n_embd, padded_vocab_size, bias=False)
        # The same table scores the ids at the end: an id's score is the dot product of the final
        # vector with the id's row. Ids that are used alike get similar rows, which serves both ends
        # (https://arxiv.org/abs/1608.05859). With two tables d12 would have a third more weights.
        self.lm_head.weight = self.transformer.wte.weight
        self.init_weights()

    def init_weights(self):
        """Random matrices and tables of standard deviation 0.02, as GPT-2; gains are 1 already."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif name.endswith(("c_proj.weight", "c_down.weight")):
                # These 2 * n_layer matrices write into the residual stream. A sum of random vectors
                # grows with the square root of their number, so they are made smaller by that.
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def features(self, idx):
        """Token ids (B, T), T <= block_size -> what lm_head reads, (B, T, C)."""
        T = idx.size(1)
        x = self.transformer.wte(idx)  # (B, T, C)
        rope = None
        if self.config.pos == "learned":
            x = x + self.transformer.wpe.weight[:T]  # (T, C), the same for every sequence
        else:
            rope = (self.cos[:T], self.sin[:T])
        if torch.is_autocast_enabled(x.device.type):
            # what we look up is fp32; a stream in bf16 is half the memory to move
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for block in self.transformer.h:
            x = block(x, rope)
        # nn.LayerNorm may return fp32 here: go back to what x is
        return self.transformer.ln_f(x).to(x.dtype)

    def forward(self, idx, targets=None):
        """Token ids idx (B, T), T <= block_size.

        Without targets: fp32 scores for each next id (the logits), (B, T, padded V), -inf for ids
        that are only padding. With targets (B, T): the mean loss, a scalar, in nats a token.
        """
        x = self.features(idx)
        if targets is not None:
            x = x.flatten(0, 1)  # (N, C)
            targets = targets.flatten()  # (N,)
            # F.cross_entropy, in less memory: section 2
            return HeadLoss.apply(x, self.lm_head.weight, targets, self.config.vocab_size)
        logits = self.lm_head(x).float()
        logits[..., self.config.vocab_size :] = -math.inf
        return logits

    def num_params(self):
        """Returns two counts: all trained numbers, and those without the tables wte and wpe."""
        total = 0
        tables = 0
        for name, p in self.named_parameters():
            total += p.numel()
            if name in ("transformer.wte.weight", "transformer.wpe.weight"):
                tables += p.numel()
        return total, total - tables

    def flops_per_token(self, T):
        """Floating point operations to train on one token of a sequence of T tokens.

        It tells how much of a GPU's speed a run uses: see PEAK_FLOPS. Forward, each weight takes a
        multiplication and an addition. Backward, it takes as many for the gradient of the weight
        and again for that of its input: 6 in all. The table wte counts once, as lm_head. In each
        layer q k^T and the mean of values take 4 C T more forward, 12 C T in all, counted as if
        nothing were masked (as in PaLM, https://arxiv.org/abs/2204.02311, appendix B).
        """
        _, blocks = self.num_params()
        attention = 12 * self.config.n_layer * self.config.n_embd * T
        return 6 * (blocks + self.lm_head.weight.numel()) + attention

# -------------------------------------------------------------------------------------------------
# 2. The loss

# In plain form, with x (N, C) from features() and W (V, C) the weight of lm_head:
#
#     logits = x @ W.T                            # (N, V), a score for every id
#     loss = F.cross_entropy(logits, targets)     # mean of -log softmax(logits)[target]
#
# That is all there is to the loss, which is called the cross-entropy. HeadLoss, below, returns
# the same number in less memory. Skip it at first. It is here because the logits fill the memory:
# those of 64 sequences x 1024 tokens take 64 * 1024 * 50,304 * 4 bytes = 13 GB in fp32, and
# autograd keeps more than one copy of them.

# Tokens whose logits exist at one time. More fill a GPU better, fewer take less memory:
# 16,384 * 50,304 * 4 bytes = 3.3 GB.
HEAD_ROWS = 16384

class HeadLoss(torch.autograd.Function):
    """The mean cross-entropy, computed for a slice of the tokens at a time.

    Features x (N, C), the weight of lm_head (padded V, C), targets (N,) and the number of real ids
    -> a scalar, nats a token. Autograd would keep all logits until the backward pass. But the
    derivative is simple. If z are the logits of one token and y is its target, the loss is
    -log softmax(z)[y] = log(sum(exp(z))) - z[y], and its derivative with respect to z is
    softmax(z), with 1 subtracted at y. So forward() computes a slice's logits, its loss and its
    gradients, and then forgets the logits. An autograd.Function brings its own backward(), and ctx
    carries what that needs from forward(): here it only has to scale the gradients.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size):
        # whether a backward pass will follow; in evaluate(), under torch.no_grad(), none does
        need_gradient = ctx.needs_input_grad[0]
        loss = torch.zeros((), device=x.device)
        if need_gradient:
            dx = torch.empty_like(x)
            # fp32 like the weight, because the gradients of all slices add up in it
            dw = torch.zeros_like(weight)
        # in the precision of x, which is bf16 under autocast: cast once, and not in every slice
        weight = weight.to(x.dtype)
        for start in range(0, len(x), HEAD_ROWS):
            rows = slice(start, start + HEAD_ROWS)
            logits = x[rows] @ weight.T  # (rows, padded V)
            # ids that only pad the table get no probability
            logits[:, vocab_size:] = -math.inf
            log_p = F.log_softmax(logits, dim=-1, dtype=torch.float32)
            target = targets[rows].unsqueeze(1)  # (rows, 1)
            log_p_target = log_p.gather(1, target)
            loss -= log_p_target.sum()
            if need_gradient:
                # The gradient of the logits is p, the softmax, and p - 1 at the target. If p were
                # rounded to bf16 first and 1 subtracted then, every p above 0.998 would give 0. So
                # subtract in fp32 and round after it. expm1(log p) is p - 1 in one operation, and
                # loses no digits that log p has.
                dlogits = log_p.exp().to(x.dtype)
                dlogits.scatter_(1, target, log_p_target.expm1().to(x.dtype))
                # logits = x W^T, so the gradient of x is dlogits W, and that of W is dlogits^T x
                dx[rows] = dlogits @ weight
                dw += dlogits.T @ x[rows]
        if need_gradient:
            ctx.save_for_backward(dx, dw)
            ctx.num_tokens = len(x)
        return loss / len(x)

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        # grad is the derivative, with respect to this loss, of the number that backward() is called
        # on. train() cuts a step's batch into grad_accum_steps pieces, and calls it on
        # loss / grad_accum_steps for each, so grad is 1 / grad_accum_steps. dx and dw are the
        # gradients of the sum of the losses. The loss is their mean over tokens, so divide by the
        # number of tokens.
        scale = grad / ctx.num_tokens
        # one gradient for each input of forward(); the last two need none
        return dx * scale, dw * scale, None, None

# -------------------------------------------------------------------------------------------------
# 3. The data

# A corpus is one long sequence of token ids, cut into files called shards (fineweb.py makes them
# and explains the format). Training reads pieces of T + 1 ids out of it, and makes x and y of
# each:
#
#     text   The   dog   is    a  good  dog     .  The  cat sleeps     .
#     ids    464  3290  318  257   922 3290    13  383 3797  44263    13     11 tokens, so T = 10
#     x      464  3290  318  257   922 3290    13  383 3797  44263           what the model sees
#     y     3290   318  257  922  3290   13   383 3797 44263    13           what it has to predict
#
# (" The" with its space is another token than "The".) y is x shifted by one. At position t the
# model sees x[0] ... x[t], and the right answer is the id that comes next, y[t]. So one sequence
# gives not one but T predictions to learn from. And this is why attention may not look ahead: it
# would find the answer in x[t + 1].

def read_shard(path):
    """Returns the shard's tokens (uint16) and vocab_size, how many different ids there can be.

    A shard is a header of 256 whole numbers, and then its tokens, 2 bytes each: see fineweb.py. The
    tokens are a memory map: nothing is read from the disk before it is used.
    """
    size = os.path.getsize(path)
    header = np.fromfile(path, "<i4", fineweb.HEADER_INTS)
    header_bytes = 4 * fineweb.HEADER_INTS
    wrong = None
    if size < header_bytes:
        wrong = f"{size} bytes are too short for a token shard"
    elif header[0] != fineweb.SHARD_MAGIC or header[1] != fineweb.SHARD_VERSION:
        wrong = f"no token shard, or of another version (begins with {header[:2].tolist()})"
    elif size != header_bytes + 2 * int(header[2]):
        wrong = f"truncated or overlong: {size} bytes for {header[2]} tokens"
    if wrong:
        sys.exit(f"error: {path}: {wrong}; get it again with fineweb.py, or see --input_bin")
    tokens = np.memmap(path, "<u2", "r", offset=header_bytes)
    # a shard that does not say (llm.c's, and those that fineweb.py downloads) has GPT-2's ids
    vocab_size = int(header[3]) or fineweb.VOCAB_SIZE["gpt2"]
    return tokens, vocab_size

@functools.lru_cache(maxsize=4)
def permutation(n, *key):
    """The numbers 0 ... n - 1 in a random order, the same one for the same n and key.

    The key is the seed, the epoch and, for rows, the shard. (The cache saves making it again.)
    """
    return np.random.default_rng(key).permutation(n)

class TokenLoader:
    """Sequences out of all shards that match a glob pattern. An epoch uses each of them once.

    A shard of n tokens has (n - 1) // T rows: row i begins at token i * T, and one token more is
    read for the last target. Rows are cut without regard to texts: one may begin in the middle of a
    text and hold several, with <|endoftext|> in between, which tells the model of the border.
    With a seed, each epoch goes through the shards in a random order, and through the rows of
    each shard in a random order; with seed None, in the order in which they lie. For example
    shard 0 has 3 rows and shard 1 has 2. An epoch then has 5 sequences, and may be:

        number   0   1   2   3   4
        shard    1   1   0   0   0         the shards in random order
        row      1   0   2   0   1         the rows of each in random order

    Number 5 begins the next epoch, in another order. So number 4 of the run is row 1 of shard 0:
    which text it is depends on the number (and the seed) alone. There is no state to save. Any
    process can find its share, and a run resumed at step 1000 reads what it would have read.
    """

    def __init__(self, pattern, T, seed=None):
        self.T = T
        self.seed = seed
        self.paths = sorted(glob.glob(pattern))
        if not self.paths:
            sys.exit(f"error: no token shards at {pattern}: run `python fineweb.py` first, or "
                     f"name yours with --input_bin 'FOLDER/NAME_train_*.bin'")
        self.shards = []
        self.counts = []  # rows in each shard
        vocab_sizes = set()
        for path in self.paths:
            tokens, vocab_size = read_shard(path)
            vocab_sizes.add(vocab_size)
            self.shards.append(tokens)
            self.counts.append(max(0, len(tokens) - 1) // T)
        names = {size: name for name, size in fineweb.VOCAB_SIZE.items()}
        if len(vocab_sizes) > 1 or not vocab_sizes <= set(names):
            sys.exit(f"error: {pattern}: vocabularies of {vocab_sizes} ids: give shards of one, "
                     f"bytes or GPT-2's, as fineweb.py makes them")
        self.vocab_size = vocab_sizes.pop()
        self.tokenizer = names[self.vocab_size]
        self.counts = np.array(self.counts)
        self.total = int(self.counts.sum())  # sequences in an epoch

    def locate(self, number):
        """Returns the shard and the row of sequence `number` of the run."""
        epoch, number = divmod(number, self.total)
        # in which order does this epoch visit the shards, and at which number does each end?
        shard_order = np.arange(len(self.shards))
        if self.seed is not None:
            shard_order = permutation(len(self.shards), self.seed, epoch)
        ends = np.cumsum(self.counts[shard_order])
        # our shard is the first one that ends after our number
        place = np.searchsorted(ends, number, side="right")
        shard = int(shard_order[place])
        # the number at which it begins, and how far we are into it
        begin = ends[place] - self.counts[shard]
        row = int(number - begin)
        # in which order does this epoch visit the rows of that shard?
        if self.seed is not None:
            row = int(permutation(int(self.counts[shard]), self.seed, epoch, shard)[row])
        return shard, row

    def batch(self, first, count, device):
        """Sequences first ... first + count - 1 of the run: x and y, (count, T) int64 on device."""
        rows = np.empty((count, self.T + 1), np.int64)
        for i in range(count):
            shard, row = self.locate(first + i)
            start = row * self.T
            rows[i] = self.shards[shard][start : start + self.T + 1]
            if rows[i].max() >= self.vocab_size:
                # without this check a GPU stops with an error that does not say why
                sys.exit(f"error: {self.paths[shard]} holds id {rows[i].max()}, outside the "
                         f"{self.vocab_size} of its vocabulary: make it again with fineweb.py")
        rows = torch.from_numpy(rows)
        if device.type == "cuda":
            # from pinned memory, which the system may not move, the copy runs beside the GPU's work
            rows = rows.pin_memory().to(device, non_blocking=True)
        else:
            rows = rows.to(device)
        # contiguous() copies: shifted views of one tensor gave wrong results on Apple's GPUs
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

# -------------------------------------------------------------------------------------------------
# 4. The optimizer

# The gradient g says for every weight w in which direction the loss grows. The simplest optimizer
# goes the other way, w -= lr * g. But one learning rate lr for all is too large for weights with
# large gradients and too small for those with tiny ones. Adam keeps two running averages for each
# weight, m of g and v of g^2, and AdamW (https://arxiv.org/abs/1711.05101) adds weight decay:
#
#     m = 0.9 m + 0.1 g        v = 0.95 v + 0.05 g^2
#     w -= lr * (m / (sqrt(v) + eps) + weight_decay * w)
#
# m smooths the direction over about 10 steps. Dividing by sqrt(v) makes the size of the gradients
# irrelevant: where all recent gradients are alike, a step is about lr long. If they point to and
# fro at random, they mostly cancel in m, which is then sqrt((1 - 0.9) / (1 + 0.9)) = 0.23 times as
# large as one of them (the standard deviation of such an average), and a step is about 0.2 lr
# long. eps avoids a division by 0, and the first steps also correct for m and v having started at
# 0. Weight decay pulls every weight a little towards 0: what the data does not ask for fades.
#
# Muon (https://kellerjordan.github.io/posts/muon) is the newer optimizer, for the matrices of the
# blocks. Where Adam evens out the sizes of single numbers, Muon looks at the matrix as a whole, and
# evens out the directions in which it moves. First the function that does that:

def orthogonalize(matrices):
    """Makes all singular values of matrices (n, rows, cols), rows <= cols, about 1. Same shape.

    Every matrix is a rotation, a stretch along each axis, and another rotation. The stretches are
    its singular values. A gradient has a few large ones and many tiny ones, so a plain step learns
    a few directions and neglects the rest. With all of them set to 1, every direction is learned at
    the same speed. Such a matrix is called orthogonal: its rows have length 1, at right angles.

    An exact decomposition (SVD) would take far too long. But write X = U S V, with rotations U and
    V and the stretches S. A rotation times its transpose is 1, so X X^T X = U S V V^T S U^T U S V
    = U S^3 V: the same rotations, and every stretch s becomes s^3. In X X^T X X^T X it becomes
    s^5. So a weighted sum of the three, made of matrix products only, does this to each stretch:
        s -> a s + b s^3 + c s^5
    With the a, b and c below, doing this five times brings every s between 1/500 and 1 to between
    0.7 and 1.2. That is near enough to 1. Smaller ones stay smaller. (a, b and c were found by
    search, see the link.)
    """
    a, b, c = 3.4445, -4.775, 2.0315
    # The polynomial needs singular values of at most 1, and none is larger than the matrix's norm,
    # the root of the sum of the squares of its entries.
    X = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        # A X is X X^T X, and A A X is X X^T X X^T X: this is the weighted sum of the three
        A = X @ X.mT  # (n, rows, rows)
        B = b * A + c * A @ A
        X = a * X + B @ X
    return X

class Muon(torch.optim.Optimizer):
    """Averages the gradients, makes the average orthogonal, and takes a step along it.

    It is for the matrices of the blocks, which turn one vector into another. The table wte is
    left to AdamW. Its rows do not work together: each is the vector of one token and is looked up
    alone, so there are no common directions to even out. (The table is also lm_head, which does
    turn a vector into scores; Muon's author found AdamW better there, too, see the link.) dtype
    is the precision of the products: bf16 is exact enough, but slow where the hardware lacks it.
    """

    def __init__(self, params, lr, weight_decay, momentum=0.95, dtype=torch.bfloat16):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            # Matrices of one shape go through orthogonalize() together: one large product is
            # faster than many small ones.
            same_shape = {}
            for p in group["params"]:
                if p not in self.state:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum_buffer"]
                # Momentum, the running average of the gradients: 0.95 of the old one, 0.05 new.
                # (lerp goes a part of the way from one tensor to another.)
                momentum.lerp_(p.grad, 1 - group["momentum"])
                # Nesterov's idea: step along what momentum will be after one more such gradient.
                update = p.grad.lerp(momentum, group["momentum"]).to(self.dtype)
                # orthogonalize() wants no more rows than columns
                if update.size(0) > update.size(1):
                    update = update.T
                same_shape.setdefault(update.shape, []).append((p, update))
            for (_, cols), members in same_shape.items():
                orthogonal = orthogonalize(torch.stack([update for _, update in members]))
                # Rows of length 1 have entries of a size of 1 / sqrt(cols). Scale them to 0.2, as
                # large as AdamW's steps are in practice: then one learning rate serves both
                # optimizers (https://arxiv.org/abs/2502.16982).
                orthogonal = orthogonal * (0.2 * math.sqrt(cols))
                for (p, _), update in zip(members, orthogonal, strict=True):
                    # turn back what was turned above
                    if p.size(0) > p.size(1):
                        update = update.T
                    # weight decay, as in AdamW, and the step
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(update, alpha=group["lr"])

def make_optimizers(model, args, dtype):
    """[AdamW], or with --optimizer muon [AdamW, Muon]: Muon has the matrices of the blocks."""
    matrices = []
    decayed = []
    vectors = []
    for name, p in model.named_parameters():
        if p.dim() < 2:
            vectors.append(p)
        elif args.optimizer == "muon" and name.startswith("transformer.h."):
            matrices.append(p)
        else:
            decayed.append(p)
    groups = [
        {"params": decayed, "weight_decay": args.weight_decay},
        # No decay here. Decay is there because large weights make the model oversensitive: a small
        # change of what they multiply changes the output much. A bias is only added and cannot do
        # that. And a norm's gain belongs near 1, since a gain of 0 switches its channel off.
        {"params": vectors, "weight_decay": 0.0},
    ]
    # 0.9 and 0.95 are GPT-3's (https://arxiv.org/abs/2005.14165). With PyTorch's usual 0.999, v
    # would remember one unusual batch for 1000 steps. fused: one kernel updates all weights.
    lr = args.learning_rate
    adamw = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)
    if not matrices:
        return [adamw]
    return [adamw, Muon(matrices, lr, args.weight_decay, dtype=getattr(torch, dtype))]

def get_lr(step, args):
    r"""The learning rate of a step.

        wsd                        cosine
          ___                        _
         /   \                      / `.
        /      \                   /    `.
       /         \                /        `--.__
        warm up, stay, fall to 0   warm up, fall to a tenth

    The rate warms up from a tenth, because at first the optimizers' averages rest on a few
    gradients, and full steps would go astray. It falls because large steps jump to and fro across
    a valley of the loss, and only small ones get down into it. wsd (warm up, stable, decay,
    https://arxiv.org/abs/2405.18392) falls over the last 70 % of the run.
    """
    # a run that is shorter than usual warms up for a tenth of it at most
    warmup_iters = min(args.warmup_iters, args.num_iterations // 10)
    if step < warmup_iters:
        return args.learning_rate * (0.1 + 0.9 * step / warmup_iters)
    if args.schedule == "cosine":
        progress = (step - warmup_iters) / max(1, args.num_iterations - warmup_iters)
        falling = 0.5 * (1 + math.cos(math.pi * progress))  # from 1 to 0
        return args.learning_rate * (0.1 + 0.9 * falling)
    remaining = (args.num_iterations - step) / args.num_iterations  # from 1 to 0
    return args.learning_rate * min(1.0, remaining / 0.7)

# -------------------------------------------------------------------------------------------------
# 5. Checkpoints

def save_checkpoint(path, state):
    """Writes state so that at any moment path holds one whole checkpoint, the old or the new one.

    Returns whether it is the new one. If the disk is full, the old one stays and training goes on.
    """
    tmp = path.with_name(path.name + ".tmp")
    try:
        with open(tmp, "wb") as f:
            torch.save(state, f)
            f.flush()
            # The bytes have to be on the disk before the name points at them, or a power cut in
            # between would leave a name without a checkpoint.
            os.fsync(f.fileno())
        os.replace(tmp, path)
        return True
    except (OSError, RuntimeError) as e:  # torch makes a RuntimeError of some failed writes
        tmp.unlink(missing_ok=True)
        print(f"WARNING: cannot write {path}, make room; what was there stays ({e})", flush=True)
        return False

def read_checkpoint(path):
    """What save_checkpoint() wrote, a dictionary. Ends the program if anything is wrong with it."""
    try:
        # A checkpoint is a zip archive, with a checksum for each file in it: a flipped bit shows.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"{damaged} in it does not match its checksum")
        # weights_only: it holds data, and may come from anybody; never run code out of it.
        # mmap: a weight is read when it is used, so a process does not hold all of it twice.
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if not isinstance(checkpoint, dict):
            raise ValueError("it holds no dictionary")
        weights = checkpoint["model"]
        if "transformer.h.0.attn.c_attn.weight" in weights:
            raise ValueError("an older train_gpt2.py wrote it: train it again")
        vocab_size = fineweb.VOCAB_SIZE.get(checkpoint["tokenizer"])
        if vocab_size is None or vocab_size != checkpoint["config"]["vocab_size"]:
            raise ValueError(f"its model does not fit its tokenizer {checkpoint['tokenizer']}")
        if not isinstance(checkpoint["step"], int) or not isinstance(checkpoint["val_loss"], float):
            raise ValueError("its step or its val_loss is no number")
        # the meta device knows shapes and holds no numbers: would the weights fit the config?
        with torch.device("meta"):
            expected = GPT(GPTConfig(**checkpoint["config"])).state_dict()
        shapes = {name: w.shape for name, w in weights.items()}
        if shapes != {name: w.shape for name, w in expected.items()}:
            raise ValueError("its weights do not fit its config")
        return checkpoint
    except Exception as e:  # torch raises a dozen kinds here, and all mean the same to the user
        reason = str(e).split("\n")[0]
        sys.exit(f"error: {path} is no checkpoint that can be used ({type(e).__name__}: "
                 f"{reason}): give a best.pt or last.pt, as a run writes them")

def load_model(name, device):
    """A model and its tokenizer's name. name: a checkpoint's path, or one of OPENAI_MODELS."""
    if name in OPENAI_MODELS:
        return from_openai(name).to(device), "gpt2"
    checkpoint = read_checkpoint(name)
    with device:
        model = GPT(GPTConfig(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    return model, checkpoint["tokenizer"]

# -------------------------------------------------------------------------------------------------
# 6. Evaluate and sample

def all_sum(values, device):
    """The sum over all processes of a list of numbers, element by element."""
    if world_size == 1:
        return values
    values = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return values.tolist()

@torch.no_grad()
def evaluate(model, plain_model, data, num_sequences, batch_size, device, autocast, on_batch):
    """The mean loss of the first num_sequences of data, in nats a token.

    plain_model is the same model, not compiled. on_batch() is called after each batch, so that a
    run can be stopped there. There is no model.eval() here. It would switch off dropout, which in
    training sets some numbers, drawn at random, to 0, so that a model cannot learn its texts by
    heart. GPT-2 had it; this model has not, because a run over 10 billion tokens sees each text
    only once.
    """
    # Processes take turns by batch, and each sequence counts once. So the mean is the same for any
    # number of processes and any batch size, and runs can be compared.
    loss_sum = 0.0
    for first in range(ddp_rank * batch_size, num_sequences, world_size * batch_size):
        count = min(batch_size, num_sequences - first)
        x, y = data.batch(first, count, device)
        # model may have been compiled by torch.compile, into code for one shape. A smaller batch at
        # the end would need its own, a minute's work: there the plain model is faster.
        forward = model if count == batch_size else plain_model
        with autocast():
            loss = forward(x, y)
        loss_sum += loss.item() * count
        on_batch()
    return all_sum([loss_sum], device)[0] / num_sequences

def load_tokenizer(name):
    """Returns two functions, encode: text -> list of ids, and token_bytes: id -> its bytes.

    name is "bytes" or "gpt2". In both the last id is <|endoftext|>, which stands before each text.
    """
    if name == "bytes":
        # replace: bytes of a command line that are no text, which Python keeps as halves of
        # characters, become question marks
        return lambda text: list(text.encode("utf-8", "replace")), lambda token: bytes([token])
    import tiktoken  # here, because the default run does not need it
    try:
        bpe = tiktoken.get_encoding("gpt2")
    except OSError as e:  # it downloads the vocabulary, 1.5 MB, once
        sys.exit(f"error: tiktoken cannot load GPT-2's vocabulary ({str(e)[:80]}): go online "
                 f"once, or set TIKTOKEN_CACHE_DIR to a folder that has it")
    return bpe.encode_ordinary, bpe.decode_single_token_bytes

@torch.no_grad()
def generate(model, ids, max_new_tokens, temperature=0.8, top_k=50, generator=None):
    """Yields up to max_new_tokens ids that continue the list ids; stops before <|endoftext|>.

    temperature: 0 takes the likeliest id each time; below 1 prefers likely ones, above 1 evens out.
    top_k: draw from the k likeliest ids only, 0 for all. Without it, one of 50,000 unlikely ids is
    drawn now and then, and the text derails. The whole text is computed again for each token. To
    keep the keys and values of earlier positions would be faster, and would take much more code.
    """
    x = torch.tensor([ids], device=model.lm_head.weight.device)  # (1, T)
    for _ in range(max_new_tokens):
        # only the last position's scores are about what comes next
        logits = model(x[:, -model.config.block_size :])[:, -1]  # (1, padded V)
        if temperature == 0:
            token = logits.argmax(dim=-1, keepdim=True)  # (1, 1)
        else:
            if top_k:
                k = min(top_k, model.config.vocab_size)
                kth_best = torch.topk(logits, k).values[:, -1:]  # (1, 1)
                logits[logits < kth_best] = -math.inf
            p = F.softmax(logits / temperature, dim=-1)
            token = torch.multinomial(p, num_samples=1, generator=generator)  # (1, 1)
        if token.item() == model.config.vocab_size - 1:
            return
        yield token.item()
        x = torch.cat((x, token), dim=1)

def print_sample(model, tokenizer, prompt, seed, max_new_tokens=200):
    """Prints the prompt and what the model makes of it, each piece as soon as it is there."""
    encode, token_bytes = load_tokenizer(tokenizer)
    if prompt is None:
        prompt = {"bytes": "def ", "gpt2": "Hello, I'm a language model,"}[tokenizer]
    # In training every document begins with <|endoftext|>, the last id: so does this one.
    ids = [model.config.vocab_size - 1] + encode(prompt)
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(seed)
    # A token may end in the middle of a character: the decoder waits for the rest of its bytes.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    print(prompt, end="", flush=True)
    for token in generate(model, ids, max_new_tokens, generator=generator):
        print(decoder.decode(token_bytes(token)), end="", flush=True)
    print(decoder.decode(b"", final=True), flush=True)

# -------------------------------------------------------------------------------------------------
# 7. The run

# First the training loop itself. `run` holds all that it works with: the model, the data, the
# optimizers and so on. How that is set up comes after it.

class Stopped(Exception):
    """Raised by check_signals() when somebody has asked the run to stop."""

# What a healthy run looks like. The loss begins near ln V, falls fast for some hundred steps and
# then ever more slowly. It wobbles by a few percent from step to step, since each has another
# batch. While the learning rate falls (with wsd that is the last 70 % of the run), the loss goes
# on falling, and falls faster than it would at a constant rate. llm.c's GPT-2 124M has a
# validation loss on FineWeb of 6.17 after 250 steps, 3.86 after 2,000, 3.39 after 10,000 and 3.27
# at the end (https://github.com/karpathy/llm.c/discussions/481), and ours should stay below that.
# The norm (the length of all gradients as one vector) is a few units at first and settles below
# 1. If the loss jumps up and stays there, give a lower learning rate. If it stays near ln V,
# something is broken: try --overfit_single_batch, whose loss has to come down to almost 0.

def train(run):
    """The training loop. Raises Stopped where somebody asked for it and nothing is lost."""
    args = run.args
    first_step = run.step
    first_step_done = None  # the time when the first step was done
    seconds = []  # how long each step took since the last line that was printed
    # micro-batches (see below) are numbered through the whole run: this is first_step's first one
    x, y = run.micro_batch(first_step * run.grad_accum_steps)
    # One round more than there are steps: it only looks at the final weights.
    for step in range(first_step, args.num_iterations + 1):
        # Once in a while: how good is the model on text that it does not learn from? This stands at
        # the top of the loop, where the weights have had exactly `step` updates. So step 0 shows an
        # untrained model, whose loss should be about ln V, and the last round shows the final one.
        if run.due(args.val_loss_every):
            run.validate()
        # Once in a while: HellaSwag, a benchmark of questions with four answers to choose from.
        if run.due(args.hellaswag_every):
            run.score_hellaswag()
        # At the same time we read what it writes. No loss tells that it only repeats itself.
        if run.due(args.val_loss_every):
            run.sample()
        if step == args.num_iterations:
            break
        # And save, so that a crash costs little. (train_command() saves the final state.)
        if run.due(args.val_loss_every) and step > 0:
            run.save()

        # Forward and backward. A step's batch, half a million tokens for d12, does not fit a GPU at
        # once. So it is cut into grad_accum_steps micro-batches, which run one after the other, and
        # their gradients add up in p.grad.
        t0 = time.time()
        loss_sum = torch.zeros((), device=run.device)
        for micro_step in range(run.grad_accum_steps):
            # Under DDP, backward() also averages gradients over processes. That is needed once a
            # step, in the last micro-batch; until then each process adds up its own.
            if world_size > 1:
                is_last = micro_step == run.grad_accum_steps - 1
                run.ddp_model.require_backward_grad_sync = is_last
            # autocast runs matrix products in bf16 (see the table in pick_autocast()). ddp_model is
            # the model, compiled if that is wanted, and in DDP if there are several processes.
            with run.autocast():
                loss = run.ddp_model(x, y)
            # backward() adds to p.grad, and what we want is the mean. With 16 micro-batches and
            # without this division, everything would be 16 times too large. The loss and the norm
            # that are printed would show it, but the model would learn and so hide it: optimizers
            # ignore a size that all gradients share. The harm is that clipping cuts every step.
            loss = loss / run.grad_accum_steps
            # detach() takes the number, without the graph of operations that made it
            loss_sum += loss.detach()
            # Python runs ahead of a GPU, which works through a queue of kernels. So the next batch
            # is made while the GPU is at work on this one. (The last round makes the next step's
            # first.)
            x, y = run.micro_batch(step * run.grad_accum_steps + micro_step + 1)
            loss.backward()
            # a place to stop: the weights are still those of `step` whole steps
            run.check_signals()

        # Clip: if the gradients of all weights, taken as one long vector, are longer than 1, scale
        # them to length 1. The optimizers ignore a size that all steps share, but one unusual
        # batch (a page of digits, say) can have a gradient a hundred times as long as others. It
        # would fill the averages of both optimizers, and for ten or twenty steps the weights would
        # move along it, away from what was learned. norm is the length before clipping.
        norm = nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        lr = get_lr(step, args)
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            # Set the gradients back to 0, or the next ones would be added to them. Write zeros and
            # do not delete them (set_to_none): under DDP they are a part of the buffers it sends.
            optimizer.zero_grad(set_to_none=False)
        run.step = step + 1

        # .item() waits until the GPU has done all of this. Before it, the clock would only show how
        # long it takes to order the work. It waits once a step, and not in the loop above.
        train_loss = loss_sum.item() / world_size
        # Each has divided by world_size, so the sum is the mean loss. With it go the
        # signals (Ctrl-C and the like): if one process was asked to stop, all learn it here.
        run.train_loss, stop = all_sum([train_loss, len(run.signals)], run.device)
        seconds.append(time.time() - t0)
        norm = norm.item()
        if not math.isfinite(run.train_loss + norm):
            # Something is nan or infinite. Now the weights are, too, and no later step mends them.
            sys.exit(f"error: step {step} has loss {run.train_loss}, gradient norm {norm}: go on "
                     f"from {args.output_dir}/last.pt if there is one, with a lower rate")

        # Say how it goes. The first step is slow, so the time that is left is counted without it.
        minutes_left = None
        if first_step_done is None:
            first_step_done = time.time()
            print0(f"first step done {first_step_done - START:.1f} s after the start")
        else:
            seconds_a_step = (time.time() - first_step_done) / (step - first_step)
            minutes_left = seconds_a_step * (args.num_iterations - step - 1) / 60
        if step % args.log_every == 0 or step == args.num_iterations - 1:
            run.report_step(norm, lr, seconds, minutes_left)
            seconds = []
        # all processes stop together
        if stop:
            raise Stopped

# The rest of this section is what the loop stands on: the sizes of models, flags, setting up, and
# what a run does once in a while.

# Each row is a model, and its folder has the name of GPT-2's model of that shape. The learning
# rates of d12 to d48 are four times those of GPT-3's models of these sizes (6e-4 to 2e-4, table
# 2.1 of https://arxiv.org/abs/2005.14165), since training stays stable at such rates with Muon and
# QK-norm. Only small models have been tried (report/README.md), so take them for a guess: half as
# much or twice as much may be better.
PRESETS = {
    "tiny": dict(n_layer=4, n_head=4, n_embd=128, learning_rate=4e-3, output_dir="logtiny"),
    "d12": dict(n_layer=12, n_head=12, n_embd=768, learning_rate=2.4e-3, output_dir="log124M"),
    "d24": dict(n_layer=24, n_head=16, n_embd=1024, learning_rate=1.2e-3, output_dir="log350M"),
    "d36": dict(n_layer=36, n_head=20, n_embd=1280, learning_rate=1e-3, output_dir="log774M"),
    "d48": dict(n_layer=48, n_head=25, n_embd=1600, learning_rate=8e-4, output_dir="log1558M"),
}
# tiny trains for a minute, on bytes; input_bin "" stands for the source of the standard library
PRESETS["tiny"].update(
    input_bin="", sequence_length=128, total_batch_size=2048, num_iterations=600, warmup_iters=20,
    val_loss_every=200, log_every=20, compile=False,
)
# --arch gpt2: every switch as in 2019. (parse_args() sets n_kv_head, too.)
GPT2 = dict(norm="layernorm", mlp="gelu", pos="learned", bias=True, qk_norm=False)
# --recipe original: how this variant was first trained, at half the learning rate
# (https://github.com/Morris88826/CSCE-689-HW2)
ORIGINAL = dict(optimizer="adamw", schedule="cosine", warmup_iters=715, qk_norm=False)
# --init_from: the shapes of OpenAI's models, and how nanoGPT finetunes them
OPENAI_MODELS = {"gpt2": "d12", "gpt2-medium": "d24", "gpt2-large": "d36", "gpt2-xl": "d48"}
FINETUNE = dict(arch="gpt2", optimizer="adamw", learning_rate=3e-5, warmup_iters=0)
FINETUNE["total_batch_size"] = 32768
# Flags that make the model and the order of the data: they cannot change when a run is resumed.
FIXED = ["model", "arch", "recipe", "n_layer", "n_head", "n_kv_head", "n_embd", *GPT2, "optimizer"]
FIXED += ["sequence_length", "total_batch_size", "seed", "overfit_single_batch"]
# Flags that a resumed run takes over from its checkpoint, unless another value is given.
KEPT = ["num_iterations", "learning_rate", "warmup_iters", "schedule", "weight_decay", "dtype"]
KEPT += ["input_bin", "val_loss_every", "val_tokens", "hellaswag_every", "log_every", "prompt"]

# How many operations a second a GPU can do in bf16, from its data sheet. MFU (model FLOPs
# utilization) is the share of them that a run uses; 40 to 60 % is good. The first name that occurs
# in the card's counts.
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12}
PEAK_FLOPS |= {"A100": 312e12, "L40S": 362e12, "4090": 165e12, "3090": 71e12}

def make_parser():
    """All flags. Where llm.c has a flag it has the same name here.

    The defaults here are those of a run on FineWeb. PRESETS changes some of them for tiny.
    """
    show_as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=show_as_written)
    # an error is one line; argparse would print a page of usage before it
    parser.error = lambda message: sys.exit(f"error: {message}; see --help")
    add = parser.add_argument
    on_off = argparse.BooleanOptionalAction  # makes --qk_norm and --no-qk_norm
    # the model
    add("--model", choices=PRESETS, help="the size: one of PRESETS; default: tiny")
    add("--arch", choices=["variant", "gpt2"], default="variant", help="gpt2: all switches back")
    add("--norm", choices=["rmsnorm", "layernorm"], default="rmsnorm", help="normalization")
    add("--mlp", choices=["swiglu", "gelu"], default="swiglu", help="the MLP's nonlinearity")
    add("--pos", choices=["rope", "learned"], default="rope", help="how positions enter")
    add("--qk_norm", action=on_off, default=True, help="normalize queries and keys")
    add("--n_kv_head", type=int, default=0, help="key/value heads; 0: half of n_head")
    add("--n_head", type=int, help="query heads; default: the model's")
    add("--n_layer", type=int, help="blocks; default: the model's")
    add("--n_embd", type=int, help="width in channels; default: the model's")
    add("--init_from", choices=OPENAI_MODELS, help="begin with OpenAI's weights")
    # the data and the folder
    add("--input_bin", default="fineweb10B/fineweb_train_*.bin", help="training shards, a pattern")
    add("--output_dir", type=Path, help="for main.log, last.pt, best.pt; default: log and the size")
    # a step
    add("--batch_size", type=int, default=0, help="sequences at a time; 0: as many as fit")
    add("--sequence_length", type=int, default=1024, help="tokens in a sequence [%(default)s]")
    add("--total_batch_size", type=int, default=524288, help="tokens in a step [%(default)s]")
    add("--num_iterations", type=int, default=19073, help="steps; 19,073 x 524,288 = 10B tokens")
    add("--overfit_single_batch", action="store_true", help="learn one batch: a check of all")
    # the optimizer
    add("--recipe", choices=["today", "original"], default="today", help="original: AdamW, cosine")
    add("--optimizer", choices=["muon", "adamw"], default="muon", help="for the blocks' matrices")
    add("--learning_rate", type=float, help="its highest value; default: the model's")
    # what to see and keep
    add("--val_loss_every", type=int, default=250, help="to validate, sample, save [%(default)s]")
    add("--val_tokens", type=int, default=10485760, help="tokens a validation takes [%(default)s]")
    add("--hellaswag_every", type=int, default=0, help="steps to a HellaSwag score; 0: no")
    add("--resume", action="store_true", help="go on from last.pt in output_dir")
    # the machine
    add("--device", choices=["cuda", "mps", "cpu"], help="default: the first of these there is")
    add("--dtype", choices=["bfloat16", "float32"], help="default: bfloat16 if the device has it")
    add("--compile", action=on_off, help="torch.compile; default: on CUDA")
    add("--seed", type=int, default=1337, help="for weights, data order, samples [%(default)s]")
    # instead of training
    add("--sample", metavar="CHECKPOINT", help="let a checkpoint, or gpt2 ... gpt2-xl, write")
    add("--prompt", help="what samples begin with")
    add("--export", nargs=2, metavar=("CHECKPOINT", "FOLDER"), help="write it for transformers")
    # what presets, --recipe and --arch set, and no flag of its own
    parser.set_defaults(bias=False, schedule="wsd", warmup_iters=250, weight_decay=0.1, log_every=1)
    return parser

def parse_args(argv):
    """Returns the flags, and the checkpoint to resume or None.

    --model, --recipe and --arch change the defaults of other flags. To know them one has to
    parse, and after changing the defaults one has to parse again: what was given still wins over
    any default.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    model = args.model or OPENAI_MODELS.get(args.init_from, "tiny")
    preset = PRESETS[model] | {"model": model}
    if args.recipe == "original":
        parser.set_defaults(**ORIGINAL)
        preset["learning_rate"] /= 2
    parser.set_defaults(**preset)
    if args.init_from:
        parser.set_defaults(**FINETUNE, output_dir=f"log_{args.init_from}")
    args = parser.parse_args(argv)
    if args.arch == "gpt2":
        parser.set_defaults(**GPT2, n_kv_head=args.n_head)
        args = parser.parse_args(argv)
    for name, value in vars(args).items():
        # 2**63: the largest number that PyTorch takes; nan fails here as well
        if isinstance(value, (int, float)) and not 0 <= value < 2**63:
            sys.exit(f"error: --{name} {value}: give a number from 0 to 9e18")
    if not args.resume:
        return args, None
    # a resumed run goes on with the flags that it was begun with
    checkpoint = read_checkpoint(args.output_dir / "last.pt")
    try:
        saved = {name: checkpoint["args"][name] for name in FIXED + KEPT}
        missing = {"step", "train_loss", "val_loss", "best_val_loss", "optimizer", "sequences"}
        missing -= set(checkpoint)
    except (KeyError, TypeError):
        missing = {"args"}
    if missing:
        sys.exit(f"error: {args.output_dir}/last.pt lacks {sorted(missing)} and cannot be resumed: "
                 f"give another --output_dir and no --resume")
    parser.set_defaults(**saved)
    args = parser.parse_args(argv)
    for name in FIXED:
        if getattr(args, name) != saved[name]:
            sys.exit(f"error: {args.output_dir} was begun with --{name} {saved[name]} and cannot "
                     f"go on with {getattr(args, name)}: give {saved[name]}, or begin a new run "
                     f"in another --output_dir")
    if args.num_iterations < checkpoint["step"]:
        sys.exit(f"error: {args.output_dir} is past --num_iterations {args.num_iterations}: its "
                 f"last.pt has {checkpoint['step']} steps behind it; give more, or drop the flag")
    return args, checkpoint

def keep_freed_memory():
    """Linux: keeps freed memory for the next step, which saves a CPU a part of each step's time.

    It has nothing to do with training. By default the C library gives large freed tensors back to
    the system, and gets them anew in pieces of 4 kB. These are its settings M_MMAP_MAX and
    M_TRIM_THRESHOLD.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(-4, 0)
        ctypes.CDLL(None).mallopt(-1, -1)

def pick_device(name=None):
    """The torch.device to run on: the one that is named, else the first of cuda, mps and cpu."""
    there = ["cpu"]
    if torch.backends.mps.is_available():
        there.insert(0, "mps")
    if torch.cuda.is_available():
        there.insert(0, "cuda")
    name = name or there[0]
    if name not in there:
        sys.exit(f"error: --device {name}: PyTorch sees none here; leave the flag out")
    if name == "cuda":
        return torch.device("cuda", ddp_local_rank)
    if name == "cpu":
        keep_freed_memory()
    return torch.device(name)

def pick_autocast(dtype, device):
    """Returns the dtype's name and a function that opens autocast.

    dtype None means bf16 if the device is fast at it, else fp32. In a run in bf16 these are in
        bf16, by autocast           linear layers
        bf16, cast by HeadLoss      lm_head, and the gradient of the logits
        bf16, as their input is     on a GPU q k^T and the mean of values; silu, gelu, adding to the
                                    residual stream
        bf16, cast by Muon          the products in orthogonalize()
        fp32 inside, then bf16      RMSNorm, LayerNorm, RoPE's rotation, the softmax of attention;
                                    all of attention on a CPU
        fp32                        the lookups in wte and wpe; the log-softmax of the loss, and the
                                    loss; the weights, their gradients and the optimizers' averages,
                                    in which bf16 would round small updates away
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # On Linux a processor lists what it can do: Intel and AMD say amx_bf16 or avx512_bf16, ARM
        # says bf16. Without one of these bf16 is computed in software, which is slow.
        cpuinfo = Path("/proc/cpuinfo")
        flags = cpuinfo.read_text("utf-8").split() if cpuinfo.exists() else []
        native = device.type == "cpu" and bool({"amx_bf16", "avx512_bf16", "bf16"} & set(flags))
    if dtype is None:
        dtype = "bfloat16" if native else "float32"
    on = dtype == "bfloat16"
    return dtype, functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=on)

def pick_batch_size(config, num_params, device, dtype, compiled, sequences):
    """The most sequences at a time that fit the device, and that divide a process's `sequences`."""
    # on a CPU, enough tokens to keep it busy
    max_tokens = 4096
    if device.type == "cuda":
        # 4 bytes each for a weight, its gradient and two averages; and 2 GB for CUDA itself
        room = 0.9 * torch.cuda.get_device_properties(device).total_memory - 16 * num_params - 2e9
        # The bytes that a block keeps of each token and channel for the backward pass, as counted
        # in bf16. A compiled model keeps less, and computes some of it again.
        per_channel = 45 if compiled else 65
        if dtype == "float32":
            per_channel *= 2
        kept = per_channel * config.n_layer * config.n_embd
        # HeadLoss has a token's logits in fp32 and in bf16, of HEAD_ROWS tokens and no more
        logits = 6 * config.vocab_size
        max_tokens = room / (kept + logits)
        if max_tokens > HEAD_ROWS:
            max_tokens = (room - HEAD_ROWS * logits) / kept
        # 64 sequences of 1024 tokens keep any GPU of today busy
        max_tokens = min(65536, max_tokens)
    fitting = max(1, max_tokens // config.block_size)
    return max(b for b in range(1, sequences + 1) if sequences % b == 0 and b <= fitting)

def rank0_first(make):
    """Calls make() in process 0 first, which downloads or writes something, then in the others."""
    if ddp_rank == 0:
        result = make()
    if world_size > 1:
        dist.barrier()
    if ddp_rank > 0:
        result = make()
    return result

class Run:
    """Everything that one process of a run holds. It is set up here, and then trained by train().

    Under torchrun each GPU has a process of its own, and each makes one of these. All have the same
    weights and run the same code, each on its own part of every batch. They meet where gradients
    and losses are averaged.
    """

    def __init__(self, args, argv, checkpoint):
        self.args = args
        self.signals = []  # numbers of those that asked us to stop
        again = shlex.join([flag for flag in argv if flag != "--resume"] + ["--resume"])
        self.go_on = f"python train_gpt2.py {again}"
        if world_size > 1:
            self.go_on = "the same torchrun command and --resume"
        self.open_device()
        self.open_data()
        self.make_model(checkpoint)
        self.split_step()
        if ddp_rank == 0:
            # `python train_gpt2.py` without a flag can be repeated: it moves an earlier run away
            self.open_folder(set_aside=not argv)
        self.prepare_training(checkpoint)

    def open_device(self):
        """Where to compute, in which precision, and how processes talk to each other."""
        self.device = pick_device(self.args.device)
        self.card = self.device.type
        if self.device.type == "cuda":
            self.card = torch.cuda.get_device_name(self.device)
            torch.cuda.set_device(self.device)
            # matrix products that stay fp32 may round their inputs to 10 bits (TF32), for speed
            torch.set_float32_matmul_precision("high")
        self.dtype, self.autocast = pick_autocast(self.args.dtype, self.device)
        if world_size > 1:
            # NCCL connects GPUs, gloo connects CPUs. A process waits an hour for the others before
            # it gives up: process 0 may be writing a large checkpoint to a slow disk.
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(hours=1))
        self.compiled = self.args.compile
        if self.compiled is None:
            self.compiled = self.device.type == "cuda"

    def open_data(self):
        """The shards to learn from, and those to validate on, which are never learned from."""
        args = self.args
        T = args.sequence_length
        train_pattern = Path(args.input_bin or rank0_first(fineweb.stdlib_corpus))
        if "_train_" not in train_pattern.name:
            sys.exit(f"error: --input_bin {train_pattern}: give 'FOLDER/NAME_train_*.bin'; "
                     f"NAME_val_*.bin beside them is for validation")
        val_pattern = train_pattern.with_name(train_pattern.name.replace("_train_", "_val_"))
        if T < 1 or args.val_tokens < T:
            sys.exit("error: --sequence_length must be 1 or more, and --val_tokens at least that")
        self.train_data = TokenLoader(str(train_pattern), T, args.seed)
        self.val_data = TokenLoader(str(val_pattern), T)
        if self.train_data.vocab_size != self.val_data.vocab_size:
            sys.exit(f"error: {train_pattern} and {val_pattern} are of different vocabularies: "
                     f"make both with fineweb.py")
        wanted = [(self.train_data, args.total_batch_size // T), (self.val_data, 1)]
        for data, needed in wanted:
            if data.total < needed:
                sys.exit(f"error: {data.paths[0]}: {data.total} sequences of {T} tokens, {needed} "
                         f"are needed: give more shards, --total_batch_size {data.total * T} or "
                         f"less, or a smaller --sequence_length")
        self.num_val_sequences = min(args.val_tokens // T, self.val_data.total)
        self.vocab_size = self.train_data.vocab_size
        self.tokenizer = self.train_data.tokenizer

    def make_model(self, checkpoint):
        """The model: a new one, OpenAI's, or the checkpoint's."""
        args = self.args
        shape = {name: getattr(args, name) for name in asdict(GPTConfig()) if name in args}
        try:
            config = GPTConfig(
                block_size=args.sequence_length, vocab_size=self.vocab_size, **shape
            )
        except ValueError as e:
            sys.exit(f"error: {e}: see --n_layer, --n_embd, --n_head and --n_kv_head")
        # every process draws the same random numbers, and so has the same weights
        torch.manual_seed(args.seed)
        if args.init_from and not checkpoint:
            self.model = rank0_first(lambda: from_openai(args.init_from, config.block_size))
            self.model.to(self.device)
            if self.model.config != config:
                sys.exit(f"error: --init_from {args.init_from}: drop the flags that change its "
                         f"shape, and give data in GPT-2's vocabulary")
        else:
            # made where it will live: a CPU is slow at 1.6 billion random numbers
            with self.device:
                self.model = GPT(config)
        if checkpoint:
            self.model.load_state_dict(checkpoint["model"])
        self.num_params, blocks = self.model.num_params()
        self.flops_per_token = self.model.flops_per_token(args.sequence_length)
        print0(f"model {args.model}: {config.n_layer} layers, {config.n_head} heads "
               f"({config.n_kv_head} key/value), {config.n_embd} wide | {self.num_params:,} "
               f"parameters, {blocks:,} without embeddings | "
               f"{self.flops_per_token / 1e6:,.1f} MFLOP a token")

    def split_step(self):
        """A step's tokens do not fit a GPU at once. This cuts them into micro-batches that do."""
        args = self.args
        T = args.sequence_length
        total = args.total_batch_size
        # what all processes together do at a time
        unit = (args.batch_size or 1) * T * world_size
        if total % unit or total == 0:
            lower = max(1, total // unit) * unit
            sys.exit(f"error: --total_batch_size {total} is no multiple of {unit} = batch_size "
                     f"{args.batch_size or 1} x sequence_length {T} x {world_size} processes: "
                     f"give {lower} or {lower + unit}")
        sequences = total // T // world_size
        self.batch_size = args.batch_size or pick_batch_size(
            self.model.config, self.num_params, self.device, self.dtype, self.compiled, sequences
        )
        self.grad_accum_steps = sequences // self.batch_size
        compiled = ", compiled" if self.compiled else ""
        print0(f"device {self.card}, {self.dtype}{compiled} | {total:,} tokens a step = "
               f"{self.batch_size} sequences x {T} tokens x {self.grad_accum_steps} micro-batches "
               f"x {world_size} processes\n"
               f"data {Path(self.train_data.paths[0]).parent}: {self.train_data.total * T:,} "
               f"tokens an epoch, {args.num_iterations * total:,} in this run")

    def open_folder(self, set_aside):
        """Makes output_dir and locks it. A run that is there is never written over."""
        folder = self.args.output_dir
        folder.mkdir(parents=True, exist_ok=True)
        # While we hold this lock no second run can write here. The end of the process releases it.
        self.lock = filelock.FileLock(folder / ".lock")
        try:
            self.lock.acquire(timeout=0)
        except filelock.Timeout:
            sys.exit(f"error: a run is at work in {folder}: give another --output_dir, or wait")
        earlier = [name for name in ("last.pt", "best.pt") if (folder / name).exists()]
        if earlier and not self.args.resume:
            if not set_aside:
                advice = "add --resume to go on with it, or " if "last.pt" in earlier else ""
                sys.exit(f"error: {folder} holds {earlier[0]} of a run: {advice}give another "
                         f"--output_dir")
            # keep the earlier run under the next free name, and make the folder anew
            self.lock.release()
            number = 1
            while Path(f"{folder}.{number}").exists():
                number += 1
            folder.rename(f"{folder}.{number}")
            print(f"kept the earlier run as {folder}.{number}", flush=True)
            return self.open_folder(set_aside=False)
        # one last.pt takes 4 bytes for each weight and for at most two averages of its gradient
        missing = 12 * self.num_params - shutil.disk_usage(folder).free
        if missing > 0:
            sys.exit(f"error: {folder}: a checkpoint takes {missing / 1e9:.2f} GB more than is "
                     f"free on its disk: make room, or give another --output_dir")

    def prepare_training(self, checkpoint):
        """The optimizers, where the run stands, and the forms of the model that train."""
        self.optimizers = make_optimizers(self.model, self.args, self.dtype)
        self.step = 0  # how many updates the weights have had
        self.train_loss = math.inf
        self.val_loss = math.inf
        self.best_val_loss = math.inf
        self.new_best = False  # the newest validation loss is the lowest, and not yet saved
        if checkpoint:
            try:
                for optimizer, state in zip(self.optimizers, checkpoint["optimizer"], strict=True):
                    # a copy: training must not write into the file that torch.load() mapped
                    optimizer.load_state_dict(copy.deepcopy(state))
            except (KeyError, ValueError) as e:
                sys.exit(f"error: the optimizer in {self.args.output_dir}/last.pt does not fit "
                         f"({e}): give another --output_dir and no --resume")
            self.step = checkpoint["step"]
            self.train_loss = checkpoint["train_loss"]
            self.val_loss = checkpoint["val_loss"]
            self.best_val_loss = checkpoint["best_val_loss"]
            print0(f"resuming {self.args.output_dir} at step {self.step}")
            if checkpoint["sequences"] != self.train_data.total:
                print0("NOTE: there is more or less data than before: it comes in another order")
        # The same weights in three forms: model; fast_model, compiled if that is wanted; ddp_model,
        # which also averages gradients over processes, if there are several.
        self.fast_model = self.model
        if self.compiled:
            # torch.compile reads the model's Python and writes kernels that do several operations
            # at once, so that results in between need not go to the GPU's memory and back. It does
            # so at the first call, which takes a minute. dynamic=False: for exactly one shape.
            self.fast_model = torch.compile(self.model, dynamic=False)
        else:
            self.say_how_long()
        self.ddp_model = self.fast_model
        if world_size > 1:
            # DDP, distributed data parallel, copies gradients into large buffers, the buckets, and
            # sends those. With this flag p.grad is a view of its bucket, and not a second copy.
            self.ddp_model = nn.parallel.DistributedDataParallel(
                self.fast_model, gradient_as_bucket_view=True
            )

    def say_how_long(self):
        """Runs one micro-batch, only to tell a person with a slow machine what to expect."""
        start = time.time()
        x, y = self.micro_batch(0)
        with self.autocast():
            loss = self.model(x, y)
        loss.backward()
        # forget these gradients: this was no step
        self.model.zero_grad()
        minutes = (time.time() - start) / 60
        # the backward pass is two thirds of the work, and validation has none
        batches = self.num_val_sequences / self.batch_size / world_size
        validation = minutes / 3 * batches
        if minutes * self.grad_accum_steps + validation > 1:
            print0(f"NOTE: here a step takes about {minutes * self.grad_accum_steps:.1f} minutes "
                   f"and a validation {validation:.1f}; --total_batch_size, --val_tokens and "
                   f"--sequence_length make them shorter")

    def micro_batch(self, number):
        """x and y, (batch_size, T) each: this process's part of the run's micro-batch `number`."""
        if self.args.overfit_single_batch:
            number %= self.grad_accum_steps
        first = (number * world_size + ddp_rank) * self.batch_size
        return self.train_data.batch(first, self.batch_size, self.device)

    def due(self, every):
        """Whether something that is done every so many steps, and after the last, is due now."""
        last_step = self.step == self.args.num_iterations
        return every > 0 and (self.step % every == 0 or last_step)

    def report(self, text, line):
        """Prints text, and writes line to main.log in llm.c's form.

        s is the step, trl the training loss, tel the validation loss, eval HellaSwag's score.
        """
        print0(text)
        if ddp_rank > 0:
            return
        try:
            with open(self.args.output_dir / "main.log", "a", encoding="utf-8") as f:
                f.write(line + "\n")
        except OSError as e:  # a full disk is no reason to lose the run
            print(f"WARNING: cannot write main.log ({e})", flush=True)

    def validate(self):
        """The mean loss on text that is not learned from."""
        self.val_loss = evaluate(
            self.fast_model, self.model, self.val_data, self.num_val_sequences, self.batch_size,
            self.device, self.autocast, on_batch=self.check_signals,
        )
        self.report(f"step {self.step:5d}/{self.args.num_iterations} | "
                    f"val loss {self.val_loss:.6f}", f"s:{self.step} tel:{self.val_loss:.6f}")
        if not math.isfinite(self.val_loss):
            # before it is saved over the last good state
            sys.exit(f"error: after {self.step} steps the validation loss is {self.val_loss}: go "
                     f"on from {self.args.output_dir}/last.pt if there is one, with a lower rate")
        # the untrained model is never the best
        self.new_best = self.val_loss < self.best_val_loss and self.step > 0
        if self.new_best:
            self.best_val_loss = self.val_loss

    def open_hellaswag(self):
        """Downloads the questions. With 8 processes, each answers every eighth of them."""
        encode, _ = load_tokenizer(self.tokenizer)
        questions = rank0_first(hellaswag.load_questions)[ddp_rank::world_size]
        T = self.args.sequence_length
        self.quiz = [hellaswag.encode_question(q, encode, T) for q in questions]

    def score_hellaswag(self):
        """The share of questions answered right (acc_norm, see hellaswag.py)."""
        logp = hellaswag.log_probs(self.model, self.quiz, self.autocast, self.check_signals)
        _, right = hellaswag.right_answers(logp, self.quiz)
        right, asked = all_sum([right, len(self.quiz)], self.device)
        self.report(f"step {self.step:5d}/{self.args.num_iterations} | "
                    f"HellaSwag {right / asked:.6f}", f"s:{self.step} eval:{right / asked:.6f}")

    def sample(self):
        """Shows what the model writes."""
        if ddp_rank > 0:
            return
        print(f"--- a sample after {self.step} steps", flush=True)
        try:
            print_sample(self.model, self.tokenizer, self.args.prompt, self.args.seed + self.step)
        except SystemExit as e:  # offline and without GPT-2's vocabulary: no reason not to train
            print(f"no sample: {e}")
        print("---", flush=True)

    def save(self):
        """Writes last.pt, and best.pt if the validation loss is the lowest. Returns success.

        Weights, the optimizers' averages and the step are all that a resumed run needs: there is
        no dropout, and which data comes next and what samples look like follows from the seed and
        the step.
        """
        if ddp_rank > 0:
            return True
        folder = self.args.output_dir
        state = {"config": asdict(self.model.config), "model": self.model.state_dict()}
        state |= {"tokenizer": self.tokenizer, "step": self.step, "val_loss": self.val_loss}
        if self.new_best:
            # without the optimizer's averages, which are as large and only serve to go on training
            save_checkpoint(folder / "best.pt", state)
            self.new_best = False
        state |= {"optimizer": [optimizer.state_dict() for optimizer in self.optimizers]}
        state |= {"train_loss": self.train_loss, "best_val_loss": self.best_val_loss}
        state |= {"args": {name: getattr(self.args, name) for name in FIXED + KEPT}}
        state |= {"sequences": self.train_data.total}
        return save_checkpoint(folder / "last.pt", state)

    def catch_signals(self):
        """From now on Ctrl-C, a scheduler's SIGTERM and a closed terminal only ask the run to stop.

        It stops at the next check_signals(), after a micro-batch or a batch of validation. The
        weights are as the last whole step left them; the gradients of the unfinished step are
        thrown away. Then train_command() saves the weights, and a resumed run does that step from
        its beginning.
        """
        def on_signal(number, frame):
            self.signals.append(number)
            if number == signal.SIGINT:
                # a second Ctrl-C ends the program at once
                signal.signal(signal.SIGINT, signal.SIG_DFL)
            # not print(): the signal may have come in the middle of another print()
            os.write(2, b"\nstopping at the next safe point; Ctrl-C again stops at once\n")

        for name in "SIGINT", "SIGTERM", "SIGHUP":
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            # nohup makes a program ignore SIGHUP, and that has to stay so
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, on_signal)

    def check_signals(self, *progress):
        """Stops here if somebody asked for it. (Several processes agree on it at a step's end.)

        hellaswag.py also passes how far it has come, which is not needed here.
        """
        if self.signals and world_size == 1:
            raise Stopped

    def report_step(self, norm, lr, seconds, minutes_left):
        """The line about the last step. seconds: how long each step took since the line before."""
        step = self.step - 1  # it has been counted already
        mean = sum(seconds) / len(seconds)
        tokens_per_second = self.args.total_batch_size / mean
        text = (f"step {step:5d}/{self.args.num_iterations} | loss {self.train_loss:.6f} | "
                f"lr {lr:.2e} | norm {norm:.4f} | {1000 * mean:.1f} ms | "
                f"{tokens_per_second:,.0f} tok/s")
        peak = next((PEAK_FLOPS[name] for name in PEAK_FLOPS if name in self.card), None)
        if peak:
            text += f" | MFU {tokens_per_second * self.flops_per_token / world_size / peak:.1%}"
        if minutes_left is not None:
            text += f" | {minutes_left:.1f} min left"
        self.report(text, f"s:{step} trl:{self.train_loss:.6f} lr:{lr:.2e} norm:{norm:.4f} "
                          f"ms:{1000 * mean:.1f}")

def train_command(run):
    """Trains a run to the end, or until it is stopped. Returns the exit code."""
    args = run.args
    run.catch_signals()
    try:
        if args.hellaswag_every:
            run.open_hellaswag()
        train(run)
    except Stopped:
        if run.save():
            print0(f"stopped, {args.output_dir}/last.pt is written. To go on: {run.go_on}")
        # a program that a signal ended has the exit code 128 + the signal's number
        return 128 + (run.signals or [signal.SIGTERM])[0]
    if not run.save():
        sys.exit(f"error: the final weights are not saved: make room, then {run.go_on}")
    if run.device.type == "cuda":
        print0(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    best = args.output_dir / "last.pt"
    print0(f"done in {time.time() - START:.0f} s. Newest state: {best}")
    # there is none if the run never validated
    if (args.output_dir / "best.pt").exists():
        best = args.output_dir / "best.pt"
        print0(f"Lowest validation loss, {run.best_val_loss:.4f}: {best}")
    print0(f"Next:\n    python train_gpt2.py --sample {best}")
    if run.tokenizer == "gpt2":
        print0(f"    python hellaswag.py -m {best}")
    else:
        print0("    python fineweb.py --shards 10\n    python train_gpt2.py --model d12")
    return 0

def sample_command(args):
    """Lets a checkpoint, or one of OpenAI's models, write. Returns the exit code."""
    model, tokenizer = load_model(args.sample, pick_device(args.device))
    print_sample(model, tokenizer, args.prompt, args.seed)
    return 0

def main(argv):
    """Does what the command line asks for. Returns the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # a character that the terminal cannot show must not end the run: it becomes a "?"
        sys.stdout.reconfigure(errors="replace")
    try:
        args, checkpoint = parse_args(argv)
        if args.export:
            return export(*args.export)
        # an empty name (of a shell's variable that is not set, say) is a mistake, and no training
        if args.sample is not None:
            return sample_command(args)
        run = Run(args, argv, checkpoint)
        # its weights are in the model now: let go of the file
        del checkpoint
        code = train_command(run)
    # the rest makes one line of what can go wrong, and is not needed to understand training
    except BrokenPipeError:
        # the program that reads our output has ended (head -1, for example): end as well
        sys.stdout = open(os.devnull, "w")
        return 1
    except OSError as e:  # no permission, no space, a disk that is gone
        sys.exit(f"error: {e}: mend that, or see --output_dir and --input_bin")
    except Exception as e:
        reason = str(e).split("\n")[0][:200]
        if isinstance(e, (torch.OutOfMemoryError, MemoryError)) or "can't allocate" in reason:
            sys.exit("error: out of memory: give a smaller --batch_size or --sequence_length")
        if "probability tensor contains" in reason:
            sys.exit("error: the model's scores are no numbers (nan): take an earlier checkpoint")
        if type(e).__module__.startswith(("torch._inductor", "torch._dynamo", "triton")):
            sys.exit(f"error: torch.compile does not work here ({reason}): give --no-compile")
        if not (isinstance(e, dist.DistError) or "gloo" in str(e)):
            raise
        print(f"error: another process ended ({reason}): start all with --resume", file=sys.stderr)
        # at once: an ordinary exit would wait for the process that is gone
        os._exit(1)
    if dist.is_initialized():
        # DDP's reference cycles keep threads alive that would abort a program that is ending
        gc.collect()
        dist.destroy_process_group()
    return code

# -------------------------------------------------------------------------------------------------
# 8. The bridge to transformers

# Many programs read models the way Hugging Face's transformers library writes them. Here OpenAI's
# weights come in, and ours go out. (You can skip this: it teaches nothing about training.) The
# numbers stay what they are; names and layout change.

# What to put in the place of which part of our names, to get GPT-2's names ...
GPT2_NAMES = {"transformer.": "", "c_q.": "c_attn.", "c_k.": "c_attn.", "c_v.": "c_attn."}
# ... or those of Llama, which are also Qwen3's.
LLAMA_NAMES = {
    "transformer.wte": "model.embed_tokens",
    "transformer.ln_f": "model.norm",
    "transformer.h.": "model.layers.",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.": "self_attn.",
    "attn.c_proj": "attn.o_proj",
    "c_q": "q_proj",
    "c_k": "k_proj",
    "c_v": "v_proj",
    "c_gate": "gate_proj",
    "c_up": "up_proj",
    "c_down": "down_proj",
}
# GPT-2's linear layers compute x @ w: they store (in, out), the transpose of what nn.Linear stores.
GPT2_TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")

def pair_names(our_names, table):
    """{their name: [our names]}. Only GPT-2's c_attn holds several of ours: c_q, c_k and c_v."""
    pairs = {}
    for name in our_names:
        theirs = name
        for part, replacement in table.items():
            theirs = theirs.replace(part, replacement)
        # lm_head and the table wte are one: it is stored once, as the table
        if name != "lm_head.weight":
            pairs.setdefault(theirs, []).append(name)
    return pairs

def need_transformers():
    """The transformers package. Training does without it."""
    try:
        import transformers
    except ImportError:
        sys.exit("error: this takes one more package: pip install transformers")
    return transformers

def from_openai(name, block_size=1024):
    """OpenAI's gpt2, gpt2-medium, gpt2-large or gpt2-xl as a GPT, in fp32 on the CPU.

    block_size: the longest sequence, in tokens; OpenAI's models have learned 1024 positions. The
    weights are downloaded once. A folder openai-community/NAME, where you are, is taken first.
    """
    transformers = need_transformers()
    try:
        theirs = transformers.GPT2Model.from_pretrained(f"openai-community/{name}")
    except Exception as e:  # no network, half a file, a folder that is no model: a dozen kinds
        reason = str(e).strip().split("\n")[0]
        sys.exit(f"error: cannot load openai-community/{name} ({type(e).__name__}: {reason:.200}): "
                 f"go online once; if a file is damaged, remove it from ~/.cache/huggingface")
    c = theirs.config
    if block_size > c.n_positions:
        sys.exit(f"error: {name} has {c.n_positions} positions: give a smaller --sequence_length")
    shape = dict(n_layer=c.n_layer, n_head=c.n_head, n_kv_head=c.n_head, n_embd=c.n_embd)
    model = GPT(GPTConfig(block_size=block_size, vocab_size=c.vocab_size, **shape, **GPT2))
    weights = theirs.state_dict()
    # only the positions that will be asked for
    weights["wpe.weight"] = weights["wpe.weight"][:block_size]
    # rows that only pad our table (see GPT): nobody looks them up, so zeros will do
    padding = len(model.lm_head.weight) - c.vocab_size
    weights["wte.weight"] = F.pad(weights["wte.weight"], (0, 0, 0, padding))
    state = {"lm_head.weight": weights["wte.weight"]}
    for their_name, our_names in pair_names(model.state_dict(), GPT2_NAMES).items():
        w = weights[their_name]
        if their_name.endswith(GPT2_TRANSPOSED):
            w = w.T
        # c_attn, (3C, C) by now, is c_q, c_k and c_v one below the other. All else is one piece.
        pieces = w.chunk(len(our_names))
        state.update(zip(our_names, pieces, strict=True))
    model.load_state_dict(state)
    return model

def to_transformers(config, state):
    """A model of ours in transformers' form: (config, {name: weight}). sys.exit if it has none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    switches = {name: getattr(config, name) for name in GPT2}
    variant = dict(norm="rmsnorm", mlp="swiglu", pos="rope", bias=False, qk_norm=config.qk_norm)
    T = config.block_size
    if switches == GPT2 and config.n_kv_head == config.n_head:
        kind = "gpt2"
        table = GPT2_NAMES
        settings = dict(n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd)
        # one number by two names: llama.cpp and mlx-lm look for the second
        settings |= dict(n_positions=T, n_ctx=T)
        # we have no dropout; not told so, transformers would finetune GPT-2 with 0.1
        settings |= dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    elif switches == variant:
        # Qwen3 is Llama with QK-norm
        kind = "qwen3" if config.qk_norm else "llama"
        table = LLAMA_NAMES
        settings = dict(num_hidden_layers=config.n_layer, hidden_size=config.n_embd)
        settings |= dict(num_attention_heads=config.n_head, num_key_value_heads=config.n_kv_head)
        settings |= dict(head_dim=config.n_embd // config.n_head, rms_norm_eps=1e-6)
        settings |= dict(max_position_embeddings=T)
        settings |= dict(intermediate_size=len(state["transformer.h.0.mlp.c_gate.weight"]))
    else:
        sys.exit(f"error: only the variant and --arch gpt2 can be exported; this has {switches}")
    settings |= dict(vocab_size=config.vocab_size, tie_word_embeddings=True, dtype="float32")
    settings |= dict(architectures=[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]])
    # <|endoftext|> also fills up the shorter texts of a batch. A mask hides it there.
    for special_id in ("bos_token_id", "eos_token_id", "pad_token_id"):
        settings[special_id] = config.vocab_size - 1
    theirs = need_transformers().AutoConfig.for_model(kind, **settings)
    if table is LLAMA_NAMES:
        # the base of rope_tables(). Not earlier: transformers 5 would put it where few look for it.
        theirs.rope_theta = 10000.0
    weights = {}
    for their_name, our_names in pair_names(state, table).items():
        w = torch.cat([state[name] for name in our_names])
        if table is GPT2_NAMES and their_name.endswith(GPT2_TRANSPOSED):
            w = w.T.contiguous()
        if our_names == ["transformer.wte.weight"]:
            w = w[: config.vocab_size]  # without the padding
        weights[their_name] = w
    return theirs, weights

def to_tokenizers(name):
    """The tokenizer "bytes" or "gpt2" as an object of the tokenizers library."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    _, token_bytes = load_tokenizer(name)
    tokens = [token_bytes(i) for i in range(fineweb.VOCAB_SIZE[name] - 1)]
    # The file is text, so each byte is written as a letter: a space, for example, as \u0120.
    letter = bytes_to_unicode()
    spelled = {token: "".join(letter[byte] for byte in token) for token in tokens}
    # Byte-pair encoding begins with single bytes and joins neighbors to tokens, lower ids first.
    # The library wants a list of all pairs that make a token, in this order.
    pairs = []
    for token in tokens:
        for cut in range(1, len(token)):
            pair = (spelled.get(token[:cut]), spelled.get(token[cut:]))
            if None not in pair:
                pairs.append(pair)
    vocabulary = {spelled[token]: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs))
    # GPT-2's rule where words begin: only inside of a word are pairs joined
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # it gets the next id, the last one
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer

# README.md of an exported folder. Between the dashes is what the hub reads.
MODEL_CARD = """---
license: mit
library_name: transformers
pipeline_tag: text-generation
tags: [{kind}]
datasets: [{dataset}]
---
# {folder.name}
Trained with train_gpt2.py: {step:,} steps, validation loss {val_loss:.4f} nats a token.

    from transformers import pipeline
    write = pipeline("text-generation", "{folder}")
    print(write("<|endoftext|>The", max_new_tokens=50)[0]["generated_text"])

Begin a prompt with `<|endoftext|>`, as documents do in training: the tokenizer adds none.
The model: `{config}`
"""

def export(checkpoint_path, folder):
    """Writes a checkpoint as a folder that transformers opens. Returns the exit code."""
    transformers = need_transformers()
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder = Path(folder)
    if os.path.lexists(folder):
        sys.exit(f"error: {folder} is there already: give another folder")
    checkpoint = read_checkpoint(checkpoint_path)
    config = GPTConfig(**checkpoint["config"])
    theirs, weights = to_transformers(config, checkpoint["model"])
    tokenizer = to_tokenizers(checkpoint["tokenizer"])
    # By hand: transformers 5 would write a class that 4 does not know. And without the names of the
    # inputs 4 would add token types to them, which change GPT-2's scores without a word.
    special_tokens = ("bos_token", "eos_token", "pad_token", "unk_token")
    tokenizer_config = dict.fromkeys(special_tokens, "<|endoftext|>") | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.block_size,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    card = MODEL_CARD.format(
        kind=theirs.model_type,
        dataset={"gpt2": "HuggingFaceFW/fineweb", "bytes": ""}[checkpoint["tokenizer"]],
        folder=folder,
        step=checkpoint["step"],
        val_loss=checkpoint["val_loss"],
        config=config,
    )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # All goes into a folder that removes itself, and from there to its place when it is whole.
        with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as tmp:
            whole = Path(tmp) / folder.name
            whole.mkdir()
            theirs.save_pretrained(whole)
            transformers.GenerationConfig.from_model_config(theirs).save_pretrained(whole)
            (whole / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), "utf-8")
            (whole / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2))
            (whole / "README.md").write_text(card, "utf-8")
            save_file(weights, whole / "model.safetensors", metadata={"format": "pt"})
            # safetensors hides its file from everybody else: give it the mode of the others
            shutil.copymode(whole / "config.json", whole / "model.safetensors")
            whole.rename(folder)
    except (OSError, SafetensorError) as e:
        sys.exit(f"error: {folder} is not written, and nothing is left of it: {e}")
    again = shlex.quote(f"pretrained={folder}")
    print(f"{folder} is written; read its README.md before you publish it. Next:")
    print(f"    lm_eval --model hf --model_args {again} --tasks hellaswag --num_fewshot 0")
    return 0

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

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
    fp32, bf16   32-bit numbers, and 16-bit ones with the same range but only 2 to 3 decimal digits.
                 bf16 takes half the memory and is several times as fast. autocast is PyTorch's way
                 of using it for the operations that do not need more digits.
    kernel       one function that runs on the GPU

Launch it:
    python train_gpt2.py                       a minute on a laptop: it learns to write Python
    python fineweb.py                          downloads FineWeb, 10 billion tokens of web pages
    python train_gpt2.py --model d12           trains the shape of GPT-2's 124M on them, on one GPU
    torchrun --standalone --nproc_per_node=8 train_gpt2.py --model d12       the same on eight
    python train_gpt2.py --sample logtiny/best.pt --prompt "def "            let it write
    python train_gpt2.py --resume --output_dir log124M    goes on after a crash, Ctrl-C, a full disk

The sections: 1 the model, 2 the loss, 3 the data, 4 the optimizer, 5 evaluate and sample, 6 the
settings, 7 training, 8 to and from Hugging Face. The training loop ends section 7, and all that it
uses comes before it.

The model is a variant of GPT-2 with what became usual after it: RMSNorm, rotary positions,
grouped-query attention, QK-norm, SwiGLU, and no biases. You need not know these words: each is
explained where it is built. Each is also a switch, and --arch gpt2 turns all of them back to 2019.
Names such as wte, c_proj and lm_head are GPT-2's own, and the flags have the names of llm.c, GPT-2
training in C (https://github.com/karpathy/llm.c). report/one_step.py shows one training step with
real numbers, to be read beside this file.
"""

import argparse
import contextlib
import copy
import datetime
import functools
import gc
import glob
import importlib.util
import math
import os
import shlex
import signal
import sys
import time
import traceback
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import filelock
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import fineweb
import hellaswag

# -------------------------------------------------------------------------------------------------
# 1. The model

# Every part below also exists in a standard class of Hugging Face's transformers library, so that
# other programs can open what we train. This is why some newer ideas are left out (squared ReLU,
# capped logits, value embeddings).

# The switches that have a name, and what each may be: first the variant's, then GPT-2's.
SWITCHES = {"norm": ("rmsnorm", "layernorm"), "mlp": ("swiglu", "gelu"), "pos": ("rope", "learned")}


@dataclass
class GPTConfig:
    """The shape of a model. Words that are new here are explained below, where they are built.

    It raises a ValueError if the sizes do not divide or a switch has an unknown name.
    """

    n_layer: int = 12         # blocks, one after the other
    n_head: int = 12          # attention heads, side by side in each block
    n_kv_head: int = 6        # key/value heads: two query heads share one; GPT-2 has n_head of them
    n_embd: int = 768         # C, numbers in the vector of one position
    block_size: int = 1024    # the longest sequence, in tokens
    vocab_size: int = 50257   # V, ids that exist
    norm: str = "rmsnorm"     # how vectors are kept at one size
    mlp: str = "swiglu"       # what a block computes on each position alone
    pos: str = "rope"         # how the model learns of the order of positions
    bias: bool = False        # whether linear layers and LayerNorm have biases, as GPT-2's do
    qk_norm: bool = True      # normalize each head's queries and keys; GPT-2 does not

    def __post_init__(self):
        # a head's width must be even, because rotary positions rotate pairs of numbers
        divide = self.n_embd % (2 * self.n_head) == 0 and self.n_head % self.n_kv_head == 0
        known = all(getattr(self, switch) in names for switch, names in SWITCHES.items())
        if not (divide and known):
            raise ValueError(f"n_embd must be a multiple of 2 n_head, n_head one of n_kv_head, and "
                             f"switches one of {SWITCHES}, but this is {self}")


class RMSNorm(nn.Module):
    """Divides each vector by its root mean square, and scales each channel by a gain it learns.

    x (..., dim) -> the same shape and dtype (https://arxiv.org/abs/1910.07467). Every block adds
    its result to the vectors, so they get longer from block to block. Each part of the model
    therefore reads a copy that is scaled to one size.
    GPT-2's LayerNorm also subtracts the mean and adds a bias. That turned out not to be needed.
    """

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))  # the gain

    def forward(self, x):
        # x may be bf16, whose 2 to 3 digits are too few for a sum of many squares, so: fp32. The
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
# So far a query finds the same keys wherever they stand: if two earlier tokens changed places, the
# mean would be the same, and "dog bites man" would be "man bites dog". (Nearly: an earlier position
# has itself looked at what is before it, and so carries a hint.) The order has to enter somehow.
# GPT-2 adds a learned vector to each position. Rotary positions (RoPE,
# https://arxiv.org/abs/2104.09864) instead rotate queries and keys, pair of channels by pair, by
# angles that grow with time.
#
# Why rotate? Let R(a) be the rotation by an angle a. If q stands at a and k at b, their dot product
# is the same as if q were not rotated, and k by the difference:
#     R(a) q · R(b) k = q · R(-a) R(b) k = q · R(b - a) k
# So a score depends on the distance b - a alone: "three tokens ago" looks the same everywhere in
# the text.

def rope_tables(T, D, base=10000.0):
    """cos and sin of every angle, each (T, D/2).

    Pair i of a head's D channels is (i, i + D/2), and at time t it is rotated, like a point in the
    plane, by t * base^(-2i/D) radians. Pairs with a small i turn fast and tell neighbors apart. The
    last ones hardly turn: they tell far from near.
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
    heads may share a key and value head. In plain form:

        k = k.repeat_interleave(n_head // n_kv_head, dim=1)     # one for each query head,
        v = v.repeat_interleave(n_head // n_kv_head, dim=1)     # (B, n_head, T, D)
        scores = q @ k.mT / math.sqrt(D)                        # (B, n_head, T, T)
        future = torch.ones(T, T).triu(1).bool()                # row t, column u: True where u > t
        scores = scores.masked_fill(future, -math.inf)          # nobody may look at the future
        return F.softmax(scores, dim=-1) @ v                    # a weighted mean of the values

    Why divide by sqrt(D)? A dot product adds up D products. If the numbers are random, of standard
    deviation 1, their sum has the standard deviation sqrt(D). Without the division the largest
    score of a row would take all of the softmax. The derivative of a softmax is p (1 - p), which is
    0 at p = 1 and at p = 0, so no position would get a gradient.
    """
    # Flash attention (https://arxiv.org/abs/2205.14135) gives the same numbers, computed tile by
    # tile in the small fast memory of the chip, so that no (T, T) matrix is ever stored. PyTorch
    # has it. On a CPU it is faster in fp32 (tiny's: 5 ms instead of 13, on an AMD Zen 4). On a GPU
    # in fp32 it does not exist for shared keys, so there each query head gets its own copy.
    if q.device.type == "cpu":
        q, k, v = q.float(), k.float(), v.float()
    if q.device.type == "cuda" and q.dtype == torch.float32:
        k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
        v = v.repeat_interleave(q.size(1) // v.size(1), dim=1)
    grouped = q.size(1) != k.size(1)
    # autocast would turn the fp32 q, k and v of a CPU into bf16 again: switch it off
    with torch.autocast(q.device.type, enabled=False):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


class CausalSelfAttention(nn.Module):
    """Every position gathers what it needs from the positions before it, as described above.

    Each head does this on its own, with a q, k and v of D numbers that it makes from all C
    channels. So one may look for the verb, and another for the matching bracket. In grouped-query
    attention (https://arxiv.org/abs/2305.13245) query heads 0 and 1 share key/value head 0, heads
    2 and 3 share head 1, and so on. Why? A program that writes text with a trained model usually
    keeps the keys and values of all earlier positions, instead of computing them again for each
    new token as generate() does. With half the heads they take half the memory. (It also saves
    some weights.)
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
            # Rounded up to a multiple of 64, because GPUs multiply matrices in blocks. From C = 768
            # on this adds at most 1 %. At C = 128, 341 become 384: an eighth more weights.
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
    """The whole model: ids -> vectors -> blocks -> scores for the next id.

    With d12 and 4 sequences of 1024 tokens the shapes are:
        idx                    (4, 1024)             token ids
        wte                    (4, 1024, 768)        a vector for each: the residual stream x
        in each of 12 blocks:
            q                  (4, 1024, 12, 64)     12 heads of 64 channels
            k, v               (4, 1024, 6, 64)      half as many
            attention          (4, 1024, 768)        the heads side by side, added to x
            gate, up           (4, 1024, 2048)       8/3 of 768
            MLP                (4, 1024, 768)        added to x
        ln_f                   (4096, 768)           all tokens, one below the other
        lm_head                (4096, 50304)         a score for every id
        loss                   one number            the mean over 4096 predictions
    """

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
        # (https://arxiv.org/abs/1608.05859). With two tables d12 would have 155M weights, a third
        # more. Some newer scripts pay that, and learn faster with it. In runs of 3M tokens with
        # 50,257 ids two tables were no better than one (report/README.md).
        #
        # You can see it before the first step. The blocks have added little yet, so the final
        # vector still looks like the row of the token that came in, and that token gets the highest
        # score: an untrained model expects every token to come twice. In Python's source 23 % of
        # the bytes do repeat the one before them. These cost 3.90 nats and the others 5.60, which
        # is why the default run begins at 5.22, below the ln 257 = 5.55 of guessing.
        self.lm_head.weight = self.transformer.wte.weight
        self.init_weights()

    def init_weights(self):
        """Random matrices and tables of standard deviation 0.02, as in nanoGPT and llm.c.

        Why 0.02? The input of a matrix has been normalized, so its numbers have a size of 1. An
        output is a sum of C products, and at C = 768 its size is 0.02 * sqrt(768) = 0.55, neither
        huge nor tiny. With weights of size 1 it would be 28. (Gains are 1 already.)
        """
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif name.endswith(("c_proj.weight", "c_down.weight")):
                # These 2 * n_layer matrices write into the residual stream. A sum of n random
                # vectors grows like sqrt(n), so each is made smaller by sqrt(2 * n_layer).
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    # How many digits does all this need? A floating-point number has some bits for its exponent,
    # which says how large it is, and some for its fraction, which holds its digits:
    #
    #              exponent  fraction   next to 1 comes
    #     fp32        8         23      1.0000001
    #     TF32        8         10      1.001        (not stored: a GPU may round the inputs of a
    #     bf16        8          7      1.008        matrix product in fp32 to it, for speed)
    #
    # Matrix products do well in bf16 (also those of lm_head, and of the optimizer Muon), and so
    # does the residual stream. Where many numbers are added up, 2 to 3 digits are too few: the
    # norms, every softmax and the loss are computed in fp32, and so is the rotation of RoPE. The
    # weights themselves, their gradients and the optimizer's averages stay in fp32 all the time. A
    # step changes a weight by a percent or two where the learning rate is highest, and by far less
    # as it falls. bf16 would round much of that away, since its next number is up to 0.8 % further.
    # In a run in fp32 nothing is bf16; on a GPU all products are TF32.

    def features(self, idx):
        """Token ids (B, T), T <= block_size -> what lm_head reads, (B, T, C)."""
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens are more than the model's {self.config.block_size}")
        x = self.transformer.wte(idx)  # (B, T, C)
        rope = None
        if self.config.pos == "learned":
            x = x + self.transformer.wpe.weight[:T]  # (T, C), the same for every sequence
        else:
            rope = (self.cos[:T], self.sin[:T])
        if torch.is_autocast_enabled(x.device.type):
            # The table is fp32, like all weights. From here on the stream is bf16: half the memory.
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


# -------------------------------------------------------------------------------------------------
# 2. The loss

# In plain form, with x (N, C) from features() and W (V, C) the weight of lm_head:
#
#     logits = x @ W.T                            # (N, V), a score for every id
#     loss = F.cross_entropy(logits, targets)     # mean of -log softmax(logits)[target]
#
# That is all there is to the loss, which is called the cross-entropy. But the logits of 64
# sequences of 1024 tokens take 64 * 1024 * 50,304 * 4 bytes = 13 GB in fp32, and autograd would
# keep more than one copy of them until the backward pass. A bit of calculus avoids that. Let z be
# the logits of one token and y its target. The loss is
#
#     -log softmax(z)[y] = log(sum(exp(z))) - z[y]
#
# and its derivative with respect to z is softmax(z), with 1 subtracted at y. That is the signal
# which all of training comes from: lower every id's score by the probability that it was given, and
# raise the right one's by 1. It needs no more than the logits themselves. So HeadLoss takes a slice
# of the tokens, computes their logits, loss and gradients at once, and forgets the logits.

# Tokens in a slice. More fill a GPU better, fewer take less memory: with 4 bytes for a logit in
# fp32 and 2 in bf16, 16,384 * 50,304 * 6 bytes = 5 GB at most.
HEAD_ROWS = 16384


class HeadLoss(torch.autograd.Function):
    """The mean cross-entropy, computed for a slice of the tokens at a time.

    Features x (N, C), the weight of lm_head (padded V, C), targets (N,) and the number of real ids
    -> a scalar, nats a token. An autograd.Function brings its own backward(). What that needs from
    forward() is kept in ctx: here the finished gradients, which it only has to scale.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size):
        # whether a backward pass will follow; in evaluate(), under torch.no_grad(), none does
        need_gradient = ctx.needs_input_grad[0]
        if need_gradient:
            dx = torch.empty_like(x)
            # fp32 like the weight, because the gradients of all slices add up in it
            dw = torch.zeros_like(weight)
        # in the precision of x, which is bf16 under autocast: cast once, and not in every slice
        weight = weight.to(x.dtype)
        # A list, and not a running sum: given that, torch.compile computes the logits of all slices
        # before it goes on.
        losses = []
        for start in range(0, len(x), HEAD_ROWS):
            rows = slice(start, start + HEAD_ROWS)
            logits = x[rows] @ weight.T  # (rows, padded V)
            # ids that only pad the table get no probability
            logits[:, vocab_size:] = -math.inf
            log_p = F.log_softmax(logits, dim=-1, dtype=torch.float32)
            del logits  # as long as it has a name, a tensor keeps its memory
            target = targets[rows].unsqueeze(1)  # (rows, 1)
            log_p_target = log_p.gather(1, target)
            losses.append(-log_p_target.sum())
            if need_gradient:
                # p, and p - 1 at the target. A p of 0.999 would be rounded to 1.0 in bf16, and
                # 1.0 - 1 is no gradient at all. So subtract first: expm1(log p) is p - 1. (exp_
                # writes p over log p, which saves memory.)
                dlogits = log_p.exp_().to(x.dtype)
                dlogits.scatter_(1, target, log_p_target.expm1().to(x.dtype))
                # logits = x W^T, so the gradient of x is dlogits W, and that of W is dlogits^T x
                dx[rows] = dlogits @ weight
                dw += dlogits.T @ x[rows]
                del dlogits
            del log_p
        if need_gradient:
            ctx.save_for_backward(dx, dw)
            ctx.num_tokens = len(x)
        return torch.stack(losses).sum() / len(x)

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        # dx and dw belong to the sum of the losses, and the loss is their mean, so divide. grad is
        # what backward() was called on, as a multiple of the loss: 1, or less if train() has
        # divided the loss before.
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

    A shard is 256 whole numbers, and then its tokens, 2 bytes each: see fineweb.py. The tokens are
    a memory map: nothing is read from the disk before it is used.
    """
    header = np.fromfile(path, "<i4", fineweb.HEADER_INTS)
    # the file is as long as its header says, unless a download or a copy was cut off
    is_shard = header[:2].tolist() == [fineweb.SHARD_MAGIC, fineweb.SHARD_VERSION]
    if not is_shard or os.path.getsize(path) != header.nbytes + 2 * int(header[2]):
        sys.exit(f"error: {path} is no whole token shard: get it again with fineweb.py")
    # a shard that does not say how many (llm.c's, and those that fineweb.py downloads) has GPT-2's
    vocab_size = int(header[3]) or fineweb.VOCAB_SIZE["gpt2"]
    return np.memmap(path, "<u2", "r", offset=header.nbytes), vocab_size


@functools.lru_cache(maxsize=4)
def permutation(n, *key):
    """The numbers 0 ... n - 1 in a random order. It is the same each time for the same key."""
    return np.random.default_rng(key).permutation(n)


class TokenLoader:
    """Sequences out of all shards that match a glob pattern. An epoch uses each of them once.

    In plain form: row i of a shard begins at token i * T, and one token more is read for the last
    target.

        piece = tokens[i * T : i * T + T + 1]
        x, y = piece[:-1], piece[1:]

    A shard of n tokens has (n - 1) // T rows, and the (n - 1) mod T tokens that are left over at
    its end are never used. In which order? With a seed, each epoch visits the shards in a random
    order, and the rows of each shard in a random order; with seed None, as they lie. Sequences are
    numbered through the whole run. For example shard 0 has 3 rows and shard 1 has 2. An epoch then
    has 5 sequences, and may be:

        number   0   1   2   3   4
        shard    1   1   0   0   0         the shards in random order
        row      1   0   2   0   1         the rows of each in random order

    Number 5 begins the next epoch, in another order. Which row has number 4 follows from the number
    and the seed alone, so there is no state to save. Each of eight processes can find its share,
    and a run resumed at step 1000 reads what it would have read.

    Rows are cut without regard to texts: one may begin in the middle of a text and hold several,
    with <|endoftext|>, the id that marks where a text begins, in between. May a position then look
    into the text before its own? Yes. The model learns that what stands before <|endoftext|> does
    not matter. A mask would forbid it, but takes more code and gains nothing that one would notice:
    nanochat (https://github.com/karpathy/nanochat) measured 0.85407 with it and 0.85427 without,
    in bits a byte, which is the loss in another unit.
    """

    def __init__(self, pattern, T, seed=None):
        self.T = T
        self.seed = seed
        self.paths = sorted(glob.glob(str(pattern)))
        if not self.paths:
            sys.exit(f"error: no file {pattern} in {os.getcwd()}: a run needs NAME_train_*.bin and "
                     f"NAME_val_*.bin, which `python fineweb.py` makes; see --input_bin")
        self.shards, vocab_sizes = zip(*map(read_shard, self.paths), strict=True)
        self.vocab_size = vocab_sizes[0]  # all shards of a corpus have the same
        names = {size: name for name, size in fineweb.VOCAB_SIZE.items()}
        self.tokenizer = names[self.vocab_size]
        # rows in each shard, and sequences in an epoch
        self.counts = [max(0, len(tokens) - 1) // T for tokens in self.shards]
        self.total = sum(self.counts)

    def order(self, n, *key):
        """0 ... n - 1 in the order in which an epoch visits them."""
        return range(n) if self.seed is None else permutation(n, self.seed, *key)

    def locate(self, number):
        """Returns the shard and the row of sequence `number` of the run."""
        epoch, number = divmod(number, self.total)
        # go through the shards in this epoch's order, until one has so many rows
        for shard in self.order(len(self.shards), epoch):
            if number < self.counts[shard]:
                # and through the rows of that shard, in their order
                return shard, self.order(self.counts[shard], epoch, shard)[number]
            number -= self.counts[shard]

    def batch(self, first, count, device):
        """Sequences first ... first + count - 1 of the run: x and y, (count, T) int64 on device."""
        rows = np.empty((count, self.T + 1), np.int64)
        for i in range(count):
            shard, row = self.locate(first + i)
            start = row * self.T
            rows[i] = self.shards[shard][start : start + self.T + 1]
            # without this check a GPU stops with an error that does not say why
            if rows[i].max() >= self.vocab_size:
                sys.exit(f"error: {self.paths[shard]} holds id {rows[i].max()}, but its vocabulary "
                         f"has {self.vocab_size}: make it again with fineweb.py")
        rows = torch.from_numpy(rows)
        if torch.device(device).type == "cuda":
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
# irrelevant: where all recent gradients agree, a step is about lr long. Where they point to and fro
# at random, they mostly cancel in m, and a step is about 0.2 lr long. (The standard deviation of
# such an average is sqrt((1 - 0.9) / (1 + 0.9)) = 0.23 of one.) eps avoids a division by 0. m and v
# start at 0, so after n steps they are divided by 1 - 0.9^n and 1 - 0.95^n, the share of a full
# average that they have. Weight decay pulls weights a little towards 0, so that those which the
# data does not need fade.
#
# Muon (https://kellerjordan.github.io/posts/muon) is the newer optimizer, for the matrices of the
# blocks. Where Adam evens out the sizes of single numbers, Muon looks at the matrix as a whole, and
# evens out the directions in which it moves. First the function that does that:

def orthogonalize(matrices):
    """Makes all singular values of matrices (n, rows, cols) about 1. Same shape and dtype.

    Every matrix is a rotation, a stretch along each axis, and another rotation. The stretches are
    its singular values. A gradient has a few large ones and many tiny ones, so a plain step learns
    a few directions and neglects the rest. The small ones are not only noise: rare things in the
    text give small gradients, but the same ones again and again. With all of them set to 1, every
    direction is learned at the same speed. The rows of such a matrix have length 1 and stand at
    right angles to each other (if it has more rows than columns: its columns).

    An exact decomposition (SVD) would take far too long. But write X = U S W, with rotations U and
    W and the stretches S. A rotation times its transpose is 1, so X X^T X = U S W W^T S U^T U S W
    = U S^3 W: the same rotations, and every stretch s becomes s^3. In X X^T X X^T X it becomes
    s^5. So a weighted sum of the three, made of matrix products only, does this to each stretch:
        s -> a s + b s^3 + c s^5
    With the a, b and c below, doing this five times brings every s between 1/500 and 1 to between
    0.7 and 1.2. That is near enough to 1. Smaller ones stay smaller. (a, b and c were found by
    search, see the link.)
    """
    a, b, c = 3.4445, -4.775, 2.0315
    # X X^T is (rows, rows), and X^T X would be (cols, cols). Lay tall matrices on their side, so
    # that it is the smaller one.
    tall = matrices.size(1) > matrices.size(2)
    X = matrices.mT if tall else matrices
    # The polynomial needs singular values of at most 1, and none is larger than the matrix's norm,
    # the root of the sum of the squares of its entries.
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        # A X is X X^T X, and A A X is X X^T X X^T X: this is the weighted sum of the three
        A = X @ X.mT  # (n, rows, rows)
        B = b * A + c * A @ A
        X = a * X + B @ X
    return X.mT if tall else X


class Muon(torch.optim.Optimizer):
    """Averages the gradients, makes the average orthogonal, and takes a step along it.

    It is for the matrices of the blocks, which turn one vector into another. The table wte is
    left to AdamW. Its rows do not work together: each is the vector of one token and is looked up
    alone, so there are no common directions to even out. (The table is also lm_head, which does
    turn a vector into scores; Muon's author found AdamW better there, too, see the link.) dtype
    is the precision of the products: bf16 is exact enough, but slow where the hardware lacks it.

    torch.optim.Muon with adjust_lr_fn="match_rms_adamw" is the same, one matrix at a time. With
    several GPUs every process repeats all of this: 4 % of a d12 step on eight H100s, calculated
    and not measured. The speedrun (https://github.com/KellerJordan/modded-nanogpt) gives each GPU
    its share instead.
    """

    def __init__(self, params, lr, weight_decay, momentum=0.95, dtype=torch.bfloat16):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            # Matrices of one shape go through orthogonalize() together, because one large product
            # is faster than many small ones.
            same_shape = {}
            for p in group["params"]:
                same_shape.setdefault(p.shape, []).append(p)
            for params in same_shape.values():
                # At most 16 together: all those of a large model would need gigabytes here.
                for start in range(0, len(params), 16):
                    self.update(params[start : start + 16], group)

    def update(self, params, group):
        """One step of some matrices of the same shape, (rows, cols) each."""
        updates = []
        for p in params:
            if p not in self.state:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            momentum = self.state[p]["momentum_buffer"]
            # Momentum, the running average of the gradients: 0.95 momentum + 0.05 grad. (a.lerp(b,
            # w) is (1 - w) a + w b.)
            momentum.lerp_(p.grad, 1 - group["momentum"])
            # Nesterov's idea: step along what the average would be after one more such gradient,
            # 0.95 momentum + 0.05 grad once more.
            updates.append(p.grad.lerp(momentum, group["momentum"]).to(self.dtype))
        orthogonal = orthogonalize(torch.stack(updates))  # (n, rows, cols)
        # The rows of a wide matrix have length 1 now, and so entries of about 1 / sqrt(cols). A
        # tall one has 1 / sqrt(rows). Scale them to 0.2, as large as AdamW's steps are in practice:
        # then one learning rate serves both optimizers (https://arxiv.org/abs/2502.16982).
        orthogonal = orthogonal * (0.2 * math.sqrt(max(params[0].shape)))
        for p, update in zip(params, orthogonal, strict=True):
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
        # the tables, and without Muon also the matrices
        {"params": decayed, "weight_decay": args.weight_decay},
        # No decay for biases and gains. Decay is for weights that multiply: large ones make the
        # model oversensitive. A bias is only added, and a gain belongs near 1: at 0 its channel is
        # off.
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

    It warms up from a tenth, because at first the optimizers' averages rest on a few gradients,
    and full steps would go astray. It falls because large steps jump to and fro across a valley of
    the loss, and only small ones get down into it. wsd means warm up, stable, decay. MiniCPM, which
    named it (https://arxiv.org/abs/2404.06395), decays over the last 10 to 20 % of a run; we fall
    over the last 70 %, as the speedrun does (see https://arxiv.org/abs/2405.18392 for long falls).
    What d12 gets at some of its 19,073 steps, if its highest rate is 2.4e-3 (original: 1.2e-3):

        step                             0         125       10,000    19,072
        --recipe today      (wsd)        2.4e-4    1.3e-3    1.6e-3    1.8e-7
        --recipe original   (cosine)     1.2e-4    3.1e-4    6.5e-4    1.2e-4
    """
    if step < args.warmup_iters:
        return args.learning_rate * (0.1 + 0.9 * step / args.warmup_iters)
    if args.schedule == "cosine":
        progress = (step - args.warmup_iters) / max(1, args.num_iterations - args.warmup_iters)
        falling = 0.5 * (1 + math.cos(math.pi * progress))  # from 1 to 0
        return args.learning_rate * (0.1 + 0.9 * falling)
    if args.schedule == "wsd":
        remaining = (args.num_iterations - step) / args.num_iterations  # from 1 to 0
        return args.learning_rate * min(1.0, remaining / 0.7)
    raise ValueError(f"no schedule is called {args.schedule}")


# -------------------------------------------------------------------------------------------------
# 5. Evaluate and sample

# What follows only looks at a model. It works in a notebook as well, after `from train_gpt2 import
# load_model, print_sample, evaluate, TokenLoader`:
#
#     model, tokenizer = load_model("logtiny/best.pt", "cpu")
#     print_sample(model, tokenizer, "def ")
#     evaluate(model, TokenLoader("stdlib_py*/stdlib_val_*.bin", T=128), num_sequences=100)

def all_sum(values, device):
    """The sum over all processes of a list of numbers, element by element.

    With several GPUs, each has a process of its own, which does its part of the work: see train().
    """
    if not dist.is_initialized():
        return values
    values = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return values.tolist()


@torch.no_grad()
def evaluate(model, data, num_sequences, batch_size=16, autocast=contextlib.nullcontext,
             rank=0, world_size=1):
    """The mean loss of the first num_sequences of data, a TokenLoader, in nats a token.

    This is process number rank of world_size. There is no model.eval() here, because training does
    nothing that evaluation has to leave out. GPT-2 had dropout, which sets random numbers to 0 in
    training, so that a model cannot learn its texts by heart. Whoever reads 10 billion tokens only
    once cannot do that anyway.
    """
    device = next(model.parameters()).device
    loss_sum = 0.0
    # Processes take turns by batch, and each sequence counts once. So the mean is the same for any
    # number of processes and any batch size, and runs can be compared.
    for first in range(rank * batch_size, num_sequences, world_size * batch_size):
        count = min(batch_size, num_sequences - first)
        x, y = data.batch(first, count, device)
        with autocast():
            loss = model(x, y)
        loss_sum += loss.item() * count
    return all_sum([loss_sum], device)[0] / num_sequences


def score_hellaswag(model, items, autocast):
    """The share of HellaSwag's questions that the model answers right.

    A question is the beginning of a text and four ways to go on. The model's answer is the one with
    the smallest mean loss. Guessing gets 0.25 and OpenAI's 124M 0.295: see hellaswag.py. items: the
    questions of this process, as its encode_question() makes them.
    """
    logp = hellaswag.log_probs(model, items, autocast)
    _, right = hellaswag.right_answers(logp, items)
    right, asked = all_sum([right, len(items)], next(model.parameters()).device)
    return right / asked


def load_tokenizer(name):
    """Returns encode: text -> list of ids, and decode: list of ids -> text.

    name is "bytes", where each byte is its own id, or "gpt2": fineweb.py tells how its 50,256
    pieces of text were found. In both one id more, the last, is <|endoftext|>, which begins a text.
    """
    if name == "bytes":
        return lambda text: list(text.encode()), lambda ids: bytes(ids).decode(errors="replace")
    import tiktoken  # here, because the default run does not need it

    try:
        bpe = tiktoken.get_encoding("gpt2")  # downloads the vocabulary, 1.5 MB, once
    except OSError:
        raise OSError("GPT-2's vocabulary is not here: go online once, or set TIKTOKEN_CACHE_DIR "
                      "to a folder that has it") from None
    return bpe.encode_ordinary, bpe.decode


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


def print_sample(model, tokenizer, prompt=None, seed=0, max_new_tokens=200, **options):
    """Prints the prompt and what the model makes of it.

    tokenizer: its name, as load_model() returns it. options: temperature and top_k of generate().
    """
    encode, decode = load_tokenizer(tokenizer)
    if prompt is None:
        prompt = {"bytes": "def ", "gpt2": "Hello, I'm a language model,"}[tokenizer]
    # In training every document begins with <|endoftext|>: so does this one, whether the prompt
    # says so or not.
    ids = []
    for text in prompt.removeprefix("<|endoftext|>").split("<|endoftext|>"):
        ids += [model.config.vocab_size - 1] + encode(text)
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(seed)
    new_ids = generate(model, ids, max_new_tokens, generator=generator, **options)
    print(prompt + decode(list(new_ids)), flush=True)


# -------------------------------------------------------------------------------------------------
# 6. The settings

# First the sizes. The learning rates of d12 to d48 are four times those of GPT-3's models of these
# sizes (6e-4 to 2e-4, table 2.1 of https://arxiv.org/abs/2005.14165), because training stays stable
# at such rates with Muon and QK-norm. Only small models have been tried (report/README.md), so take
# them as a guess: half as much or twice as much may be better. The folders are named after GPT-2's
# models of these shapes. "fits" is how many sequences of 1024 tokens a GPU with 80 GB takes at a
# time (calculated, not tried).
COLUMNS = "n_layer", "n_head", "n_embd", "learning_rate", "output_dir", "fits"
PRESETS = {
    "tiny": (4,     4,        128,      4e-3,            "logtiny",    64),
    "d12":  (12,    12,       768,      2.4e-3,          "log124M",    64),
    "d24":  (24,    16,       1024,     1.2e-3,          "log350M",    32),
    "d36":  (36,    20,       1280,     1e-3,            "log774M",    16),
    "d48":  (48,    25,       1600,     8e-4,            "log1558M",   8),
}
PRESETS = {model: dict(zip(COLUMNS, row, strict=True)) for model, row in PRESETS.items()}
# tiny trains for a minute, on bytes; input_bin "" stands for the source of the standard library
PRESETS["tiny"] |= dict(
    input_bin="", sequence_length=128, total_batch_size=2048, num_iterations=600, warmup_iters=20,
    val_loss_every=200, log_every=20, compile=False,
)
# --arch gpt2: every switch as in 2019. (parse_args() sets n_kv_head, too.)
GPT2 = dict(norm="layernorm", mlp="gelu", pos="learned", bias=True, qk_norm=False)
# --recipe original: how this variant was first trained, at half the learning rate
# (https://github.com/Morris88826/CSCE-689-HW2, the course work that this project follows)
ORIGINAL = dict(optimizer="adamw", schedule="cosine", warmup_iters=715, qk_norm=False)
# --init_from: the shapes of OpenAI's models, and nanoGPT's rate for finetuning them (there it stays
# the same all the time; ours falls)
OPENAI_MODELS = {"gpt2": "d12", "gpt2-medium": "d24", "gpt2-large": "d36", "gpt2-xl": "d48"}
FINETUNE = dict(optimizer="adamw", learning_rate=3e-5, warmup_iters=0, total_batch_size=32768)


def make_parser():
    """All settings, as flags. Where llm.c has one, it has the same name here.

    The defaults are those of a run on FineWeb; a preset, --recipe, --arch and --init_from change
    some of them.
    """
    show_as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=show_as_written)
    # an error is one line; argparse would print a page of usage before it
    parser.error = lambda message: sys.exit(f"error: {message}; see --help")
    add = parser.add_argument
    on_off = argparse.BooleanOptionalAction  # makes --qk_norm and --no-qk_norm

    # The model, and each number and switch of GPTConfig.
    add("--model", choices=PRESETS, help="the size: one of PRESETS; default: tiny")
    add("--arch", choices=["variant", "gpt2"], default="variant", help="gpt2: all switches back")
    for number in "n_layer", "n_head", "n_kv_head", "n_embd":
        add(f"--{number}", type=int, help="default: the preset's")
    for switch, names in SWITCHES.items():
        add(f"--{switch}", choices=names, default=names[0])
    add("--bias", action=on_off, default=False, help="biases in linear layers and LayerNorm")
    add("--qk_norm", action=on_off, default=True, help="normalize queries and keys")
    add("--init_from", choices=OPENAI_MODELS, help="begin with OpenAI's weights")

    # What it learns from, and where it writes.
    add("--input_bin", default="fineweb10B/fineweb_train_*.bin", metavar="PATTERN",
        help="training shards, in quotes: '%(default)s'; those with _val_ for _train_ validate")
    add("--output_dir", help="for main.log, last.pt, best.pt; default: the preset's")

    # How large is a step? Its gradient is a mean over so many tokens, an estimate of what all text
    # would say. Few tokens make a noisy estimate, with which only small steps are safe. Ever more
    # tokens cost ever more and improve it less and less (https://arxiv.org/abs/1812.06162). GPT-3's
    # model of 125M took half a million, and so do most since: here 512 sequences of 1024.
    add("--sequence_length", type=int, default=1024, help="tokens in a sequence [%(default)s]")
    add("--total_batch_size", type=int, default=524288, help="tokens in a step [%(default)s]")
    # How many of them does the GPU process at a time? That changes the speed and not the result,
    # because their gradients are added up.
    add("--batch_size", type=int, default=0, help="sequences at a time; 0: as many as fit")
    # How long? For the lowest loss at a given cost a model should read about 20 tokens for each
    # weight (https://arxiv.org/abs/2203.15556), d12 2.3 billion and d24 7. More of them make the
    # same model better still, and a small model that many people use is worth it. 19,073 steps are
    # the 10 billion tokens of FineWeb's sample, each read once.
    add("--num_iterations", type=int, default=19073, help="steps [%(default)s]")
    add("--overfit_single_batch", action="store_true", help="one batch again and again, as a test")

    # How is it trained? Of all numbers the learning rate matters most. Warm-up: see get_lr(). 0.1
    # and 1.0 are GPT-3's weight decay and clipping (why one clips is told in the loop).
    add("--recipe", choices=["today", "original"], default="today", help="original: AdamW, cosine")
    add("--optimizer", choices=["muon", "adamw"], default="muon", help="for the blocks' matrices")
    add("--learning_rate", type=float, help="its highest value; default: the preset's")
    add("--schedule", choices=["wsd", "cosine"], default="wsd", help="how the rate falls")
    add("--warmup_iters", type=int, help="steps; default: the recipe's, or a tenth of a short run")
    add("--weight_decay", type=float, default=0.1, help="of matrices and tables [%(default)s]")
    add("--grad_clip", type=float, default=1.0, help="the longest gradient; 0: no limit")
    add("--seed", type=int, default=1337, help="for weights, data order, samples [%(default)s]")

    # What to see and keep.
    add("--val_loss_every", type=int, default=250, help="to validate, sample, save [%(default)s]")
    add("--val_tokens", type=int, default=10485760, help="tokens a validation takes [%(default)s]")
    add("--hellaswag_every", type=int, default=0, help="steps to a HellaSwag score; 0: no")
    add("--log_every", type=int, default=1, help="steps from line to line")
    add("--resume", action="store_true", help="go on from last.pt in output_dir, if it exists")
    add("--prompt", help="what samples begin with")
    add("--temperature", type=float, default=0.8, help="of samples [%(default)s]")
    add("--top_k", type=int, default=50, help="of samples [%(default)s]")
    add("--max_new_tokens", type=int, default=200, help="longest sample [%(default)s]")

    # The machine. By default all that it can do.
    add("--device", choices=["cuda", "mps", "cpu"], help="default: the first of these there is")
    add("--dtype", choices=["bfloat16", "float32"], help="default: bfloat16 if the device has it")
    add("--compile", action=on_off, help="torch.compile; default: on a GPU")

    # Instead of training.
    add("--sample", metavar="CHECKPOINT", help="let a checkpoint, or gpt2 ... gpt2-xl, write")
    add("--export", nargs=2, metavar=("CHECKPOINT", "FOLDER"), help="write it for transformers")
    return parser


def parse_args(argv):
    """Returns the flags, and the checkpoint to go on from or None.

    Some flags change the defaults of others. So parse once to see them, change the defaults, and
    parse again: what was typed wins over any default.
    """
    parser = make_parser()
    typed = parser.parse_args(argv)
    model = typed.model or OPENAI_MODELS.get(typed.init_from, "tiny")
    defaults = {"model": model, "warmup_iters": 250} | PRESETS[model]
    # two query heads share a key/value head, if they come in pairs (d48's 25 do not)
    n_head = typed.n_head or defaults["n_head"]
    defaults["n_kv_head"] = n_head // 2 if n_head % 2 == 0 else n_head
    if typed.recipe == "original":
        defaults |= ORIGINAL
        defaults["learning_rate"] /= 2
    if typed.init_from:
        defaults |= FINETUNE | {"arch": "gpt2", "output_dir": f"log_{typed.init_from}"}
    if typed.arch == "gpt2" or typed.init_from:
        defaults |= GPT2 | {"n_kv_head": n_head}
    del defaults["fits"]  # the one column that is no flag
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    if typed.warmup_iters is None:
        # a short run should not be all warm-up
        args.warmup_iters = min(args.warmup_iters, args.num_iterations // 10)
    last = Path(args.output_dir, "last.pt")
    if not (args.resume and last.exists()):
        if args.resume and typed.output_dir and not (typed.model or typed.init_from):
            sys.exit(f"error: {last} does not exist: to begin a run there, add --model and so on")
        return args, None
    # A resumed run goes on with the flags that it was begun with, where no others are typed. Free
    # to change are the learning rate, weight decay, batch_size, what to see and keep, the machine.
    # num_iterations changes the schedule, total_batch_size the place in the data, and seed its
    # order. The model and the optimizer cannot change.
    checkpoint = read_checkpoint(last)
    parser.set_defaults(**checkpoint["args"] | {"output_dir": args.output_dir})
    args = parser.parse_args(argv)
    for name in "model", "arch", "recipe", "optimizer", "init_from":
        if getattr(args, name) != checkpoint["args"][name]:
            sys.exit(f"error: {last} was begun with --{name} {checkpoint['args'][name]}: leave the "
                     f"flag out, or begin a new run in another --output_dir")
    if args.num_iterations < checkpoint["step"]:
        sys.exit(f"error: {last} has {checkpoint['step']} steps behind it: a larger "
                 f"--num_iterations than {args.num_iterations}")
    return args, checkpoint


def differing_flags(args, others):
    """The flags whose values are not those in the dictionary others, as one would type them."""
    flags = []
    for name, value in vars(args).items():
        if value == others[name] or name == "resume":
            continue
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags += [f"--{name}", str(value)]
    return shlex.join(flags)


# -------------------------------------------------------------------------------------------------
# 7. Training

# First what a run stands on: the device, its memory and speed, the folder, and checkpoints.

def print0(text):
    """Prints, but in process 0 only: eight processes would say everything eight times."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        # a terminal that is gone, or a full disk behind it, is no reason to lose the run
        with contextlib.suppress(OSError):
            print(text, flush=True)


def pick_device(name=None, local_rank=0):
    """The torch.device to run on: the one that is named, else the first of cuda, mps and cpu."""
    if name is None:
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else name
    gpus = torch.cuda.device_count()
    if name == "cuda" and local_rank >= gpus:
        sys.exit(f"error: {gpus} GPUs are here, and process {local_rank} would need one more: see "
                 f"--nproc_per_node of torchrun, or --device cpu")
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)


def pick_autocast(dtype, device):
    """Returns the dtype's name, and a function that opens autocast.

    dtype None means bf16 if the device has instructions for it, else fp32: without, bf16 is slow.
    """
    native = False
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        # what they are called on processors of Intel, AMD and ARM
        able = torch.cpu.get_capabilities()
        native = any(able.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    if dtype is None:
        dtype = "bfloat16" if native else "float32"
    on = dtype == "bfloat16"
    return dtype, functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=on)


def pick_batch_size(args, device, dtype, compiled, sequences):
    """The most sequences at a time that fit the device, and that divide a process's `sequences`."""
    # on a CPU, enough tokens to keep it busy
    fitting = 4096 // args.sequence_length
    if device.type == "cuda":
        share = torch.cuda.get_device_properties(device).total_memory / 80e9
        fitting = PRESETS[args.model]["fits"] * share * 1024 / args.sequence_length
        # fp32 takes twice the memory, and so does a model that is not compiled
        if dtype == "float32" or not compiled:
            fitting /= 2
    return max(n for n in range(1, sequences + 1) if sequences % n == 0 and n <= max(1, fitting))


def flops_per_token(model):
    """Floating point operations to train on one token of a sequence as long as block_size.

    Forward, each weight takes a multiplication and an addition. Backward, it takes as many for the
    gradient of the weight, and again for that of its input: 6 in all. (The tied table works as
    lm_head; looking a row up costs nothing.) In each layer q k^T and the mean of values take 4 C T
    more forward, 12 C T in all (PaLM, https://arxiv.org/abs/2204.02311, appendix B).
    """
    c = model.config
    num_weights = sum(p.numel() for name, p in model.named_parameters() if "wpe" not in name)
    return 6 * num_weights + 12 * c.n_layer * c.n_embd * c.block_size


# How many operations a second a GPU can do in bf16, from its data sheet. MFU (model FLOPs
# utilization) is the share of them that a run uses; 40 to 60 % is good.
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12}
PEAK_FLOPS |= {"A100": 312e12, "L40S": 362e12, "4090": 165e12, "3090": 71e12}


def set_aside(folder):
    """Moves the files of an earlier run in this folder to FOLDER.1, or the next that is free."""
    earlier = [folder / name for name in ("main.log", "best.pt", "last.pt")]
    earlier = [path for path in earlier if path.exists()]
    # resolve: if the folder is a link to a larger disk, they stay on that disk
    beside = folder.resolve()
    number = 1
    while os.path.lexists(f"{beside}.{number}"):
        number += 1
    for path in earlier:
        os.renames(path, f"{beside}.{number}/{path.name}")
    if earlier:
        print(f"kept the earlier run in {folder} as {beside}.{number}", flush=True)


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
        print0(f"WARNING: cannot write {path}, make room; what was there stays ({e})")
        return False


def read_checkpoint(path):
    """What save_checkpoint() wrote, a dictionary. Ends the program if anything is wrong with it."""
    try:
        # A checkpoint is a zip archive, with a checksum for each file in it: a flipped bit shows.
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                raise ValueError("a checksum is wrong")
        # weights_only: it holds data, and may come from anybody; never run code out of it.
        # mmap: a weight is read when it is used, so a process does not hold all of it twice.
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        # do its weights fit its config? (The meta device knows shapes and holds no numbers.)
        with torch.device("meta"):
            expected = GPT(GPTConfig(**checkpoint["config"])).state_dict()
        shapes = {name: w.shape for name, w in checkpoint["model"].items()}
        if shapes != {name: w.shape for name, w in expected.items()}:
            raise ValueError("its weights do not fit its config")
        return checkpoint
    except Exception as e:  # a dozen kinds, and all mean the same to the user
        reason = str(e).split("\n")[0]
        sys.exit(f"error: {path} is no checkpoint that can be used ({type(e).__name__}: "
                 f"{reason}): take a best.pt or last.pt, as a run writes them")


def load_model(name, device):
    """A model and its tokenizer's name. name: a checkpoint's path, or one of OPENAI_MODELS."""
    if name in OPENAI_MODELS:
        return from_openai(name).to(device), "gpt2"
    checkpoint = read_checkpoint(name)
    model = GPT(GPTConfig(**checkpoint["config"])).to(device)
    model.load_state_dict(checkpoint["model"])
    return model, checkpoint["tokenizer"]


# What a healthy run looks like. The loss begins near ln V, falls fast for some hundred steps and
# then ever more slowly. It wobbles by a few percent from step to step, since each has another
# batch. While the learning rate falls (with wsd that is the last 70 % of the run), the loss goes
# on falling, and falls faster than it would at a constant rate. llm.c's GPT-2 124M has a
# validation loss on FineWeb of 6.17 after 250 steps, 3.86 after 2,000, 3.39 after 10,000 and 3.27
# at the end (its log of 2024-10-13, in the records of the speedrun), and ours should stay below
# that. The norm (the length of all gradients as one vector) is a few units at first and settles
# below 1.
#     stays near ln V     Something is broken: try --overfit_single_batch, whose loss has to come
#                         down to almost 0.
#     jumps up, stays     The learning rate was too high, and the newest last.pt has the damage in
#                         it. Begin again with half the rate. Or, if you copied last.pt now and
#                         then (best.pt lacks the optimizers' averages), go on from the copy:
#                             cp older.pt log124M/last.pt
#                             python train_gpt2.py --resume --output_dir log124M
#                                 --learning_rate 1.2e-3             (in one line)
#     nan                 The run ends by itself, before that is saved. If the loss had not jumped
#                         before, last.pt is good.
#
# Before you leave a run of days alone: start it where it outlives your terminal (in tmux). By the
# published speeds of similar code, d12 takes one H100 8 hours and d24 21; nobody has tried it with
# this file. FineWeb's sample takes 21 GB, last.pt up to 12 bytes for each weight and best.pt 4, and
# while one is written its old version exists as well. After a crash no more is lost than the steps
# since the last validation (--val_loss_every 0 saves at the end only); --resume goes on, and
# main.log then has the steps twice that are done again. Without --resume a new run begins, and what
# the earlier one left is moved aside.

def train(args, checkpoint, at_end):
    """One run, from the first line on the screen to the last. Returns the exit code.

    checkpoint: what to go on from, or None. at_end, a contextlib.ExitStack: what has to be undone
    when the run is over, however it ends.
    """
    start_time = time.time()

    # ---- Where it runs. With several GPUs each has a process of its own: torchrun starts them, all
    # with this same file, and tells each its number among all, its number on this machine (and so
    # its GPU), and how many there are. DDP (distributed data parallel) is how they train together.
    # Each has a copy of the model and its own part of the batch, and then the gradients of all are
    # averaged, so that every copy takes the same step.
    rank, local_rank, world_size = 0, 0, 1
    names = "RANK", "LOCAL_RANK", "WORLD_SIZE"
    if dist.is_torchelastic_launched() and all(name in os.environ for name in names):
        rank, local_rank, world_size = (int(os.environ[name]) for name in names)
    elif any(name in os.environ for name in names):
        # Left over from something else. To wait for other processes would be to wait forever.
        print(f"NOTE: {' or '.join(names)} is set, but not by torchrun: training alone")
    device = pick_device(args.device, local_rank)
    dtype, autocast = pick_autocast(args.dtype, device)
    card = device.type
    if device.type == "cpu" and args.device is None and args.model != "tiny":
        print0("NOTE: PyTorch sees no GPU, and a CPU takes minutes for one step of such a model")
    if device.type == "cuda":
        card = torch.cuda.get_device_name(device)
        torch.cuda.set_device(device)
        # TF32 for the matrix products that are still fp32: see section 1
        torch.set_float32_matmul_precision("high")
    if world_size > 1:
        # NCCL connects GPUs, gloo connects CPUs. A process waits an hour for the others before it
        # gives up: process 0 may be writing a large checkpoint to a slow disk.
        backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        hour = datetime.timedelta(hours=1)
        dist.init_process_group(backend, timeout=hour, device_id=device_id)
    compiled = args.compile
    if compiled is None:
        compiled = device.type == "cuda"
        if compiled and importlib.util.find_spec("triton") is None:
            compiled = False
            print0("NOTE: not compiled, because the package triton is missing")

    # ---- The data: shards to learn from, and others to validate on, which are never learned from.
    T = args.sequence_length
    train_pattern = args.input_bin or fineweb.stdlib_corpus()
    folder_and_name = train_pattern.rpartition("_train_")[0]
    train_data = TokenLoader(train_pattern, T, args.seed)
    val_data = TokenLoader(f"{folder_and_name}_val_*.bin", T)
    for data, needed in (train_data, args.total_batch_size // T), (val_data, 1):
        if data.total < needed:
            sys.exit(f"error: {data.paths[0]}: {data.total} sequences of {T} tokens, {needed} are "
                     f"needed: a smaller --total_batch_size or --sequence_length, or more text")
    num_val_sequences = max(1, min(args.val_tokens // T, val_data.total))

    # ---- The model: a new one, OpenAI's, or the checkpoint's.
    shape = {name: getattr(args, name) for name in asdict(GPTConfig()) if name in args}
    try:
        config = GPTConfig(block_size=T, vocab_size=train_data.vocab_size, **shape)
    except ValueError as e:
        sys.exit(f"error: {e}")
    # every process draws the same random numbers, and so has the same weights
    torch.manual_seed(args.seed)
    # made where it will live: a CPU is slow at 1.6 billion random numbers
    with device:
        model = GPT(config)
    trained_as = config
    if checkpoint:
        trained_as = GPTConfig(**checkpoint["config"])
    elif args.init_from:
        model = from_openai(args.init_from, T).to(device)
        trained_as = model.config
    if trained_as != config:
        sys.exit(f"error: the weights are those of a {trained_as}, and flags and data ask for a "
                 f"{config}: change these, or begin a new run")
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
    num_params = sum(p.numel() for p in model.parameters())
    flops = flops_per_token(model)

    # ---- A step in pieces. Its batch, half a million tokens for d12, does not fit a GPU at once.
    # So it is cut into micro-batches that do, and they run one after the other.
    unit = (args.batch_size or 1) * T * world_size
    if args.total_batch_size % unit or args.total_batch_size == 0:
        sys.exit(f"error: --total_batch_size {args.total_batch_size} must be a multiple of {unit}, "
                 f"which is --batch_size x --sequence_length x processes")
    sequences = args.total_batch_size // T // world_size
    batch_size = args.batch_size or pick_batch_size(args, device, dtype, compiled, sequences)
    grad_accum_steps = sequences // batch_size

    how = f"{dtype}, compiled" if compiled else dtype
    print0(f"model {args.model}: {config.n_layer} layers, {config.n_head} heads "
           f"({config.n_kv_head} key/value), {config.n_embd} wide | {num_params:,} parameters | "
           f"{flops / 1e6:,.1f} MFLOP a token\n"
           f"device {card}, {how} | {args.total_batch_size:,} tokens a step = {batch_size} "
           f"sequences x {T} tokens x {grad_accum_steps} micro-batches x {world_size} processes\n"
           f"data {Path(train_data.paths[0]).parent}: {train_data.total * T:,} tokens an epoch, "
           f"{args.num_iterations * args.total_batch_size:,} in this run")

    # ---- The optimizers, and where the run stands.
    optimizers = make_optimizers(model, args, dtype)
    first_step = 0  # how many updates the weights have had
    val_loss = math.inf
    best_val_loss = math.inf
    # which text is validated on: losses on different texts cannot be compared
    val_names = [Path(path).name for path in val_data.paths]
    val_text = [num_val_sequences, T, val_data.total, val_names]
    if checkpoint:
        for optimizer, stored in zip(optimizers, checkpoint["optimizer"], strict=True):
            # Only the averages: the settings, such as weight decay, are those of the flags. And a
            # copy: what torch.load() mapped is the file itself, which will be replaced.
            averages = copy.deepcopy(stored["state"])
            optimizer.load_state_dict(optimizer.state_dict() | {"state": averages})
        first_step = checkpoint["step"]
        val_loss = checkpoint["val_loss"]
        print0(f"resuming {args.output_dir} at step {first_step}")
        changed = differing_flags(args, vars(args) | checkpoint["args"])
        if changed:
            print0(f"NOTE: now with {changed} | lr of the next step {get_lr(first_step, args):.2e}")
        if checkpoint["val_text"] == val_text:
            best_val_loss = checkpoint["best_val_loss"]
        else:
            print0("NOTE: other validation text than before: the lowest loss so far does not count")
        # its weights are in the model now: let go of the file
        checkpoint.clear()
    elif args.resume:
        print0(f"{args.output_dir} has no last.pt to resume from: a new run begins")

    # ---- The folder. While we hold the lock no second run can write here.
    folder = Path(args.output_dir)
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            at_end.enter_context(filelock.FileLock(folder / ".lock").acquire(timeout=0))
        except filelock.Timeout:
            sys.exit(f"error: a run is at work in {folder}: choose another --output_dir, or wait")
        if checkpoint is None:
            set_aside(folder)

    # ---- From here on Ctrl-C and a scheduler's SIGTERM only ask the run to stop. It does so after
    # the step, and saves: see the end of the loop.
    signals = []  # the numbers of those that came

    def on_signal(number, frame):
        signals.append(number)
        if number == signal.SIGINT:
            # a second Ctrl-C does what it usually does: it ends the program at once
            signal.signal(number, usual_handlers[number])
        # not print(): the signal may have come in the middle of another print()
        os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")

    usual_handlers = {}
    for number in signal.SIGINT, signal.SIGTERM:
        usual_handlers[number] = signal.signal(number, on_signal)
        at_end.callback(signal.signal, number, usual_handlers[number])

    # ---- The model in three forms, with the same weights: model; fast_model, compiled if that is
    # wanted; ddp_model, which also averages gradients over processes, if there are several.
    fast_model = model
    if compiled:
        # torch.compile reads the model's Python and writes kernels that do several operations at
        # once, so that results in between need not go to the GPU's memory and back. It does so at
        # the first call, which takes a minute. dynamic=False: for exactly one shape.
        fast_model = torch.compile(model, dynamic=False)
    ddp_model = fast_model
    if world_size > 1:
        # DDP collects gradients in large buffers and sends those. With this flag p.grad is a part
        # of its buffer, and no second copy.
        ddp_model = nn.parallel.DistributedDataParallel(fast_model, gradient_as_bucket_view=True)

    # ---- What the loop uses.
    def micro_batch(number):
        """x and y, (batch_size, T) each: this process's part of the run's micro-batch `number`."""
        if args.overfit_single_batch:
            # those of the first step, again and again
            number %= grad_accum_steps
        first = (number * world_size + rank) * batch_size
        return train_data.batch(first, batch_size, device)

    def log(line):
        """Writes a line to main.log, in llm.c's form.

        s is the step, trl the training loss, tel the validation loss, eval HellaSwag's score.
        """
        if rank > 0:
            return
        try:
            with open(folder / "main.log", "a", encoding="utf-8") as f:
                f.write(line + "\n")
        except OSError as e:  # a full disk is no reason to lose the run
            print0(f"WARNING: cannot write main.log ({e})")

    def check(step, name, value):
        """Ends the run if value is nan or infinite: no later step repairs that."""
        if not math.isfinite(value):
            sys.exit(f"error: the {name} of step {step} is {value}: go on from {folder}/last.pt if "
                     f"it exists, with a lower --learning_rate")

    # the speed of this card, if it is in the table: the first name that occurs in the card's counts
    peak = next((PEAK_FLOPS[name] for name in PEAK_FLOPS if name in card), None)
    items = []
    if args.hellaswag_every:
        # with 8 processes, each asks every eighth question
        encode, _ = load_tokenizer(train_data.tokenizer)
        for question in hellaswag.load_questions()[rank::world_size]:
            items.append(hellaswag.encode_question(question, encode, T))

    # What is this a run of? Its flags, where they are not the preset's. (llm.c's plots want a
    # number after the second colon, so: how many words follow.)
    usual, _ = parse_args(["--model", args.model])
    flags = differing_flags(args, vars(usual))
    print0(f"flags that differ from the defaults of {args.model}: {flags or 'none'}")
    log(f"s:{first_step} flags:{len(flags.split())} {flags}")

    # ---- The training loop.
    stop = False  # Ctrl-C or SIGTERM came: the end of a step sets it, the next round saves and ends
    seconds = []  # how long each step took since the last line that was printed
    # micro-batches are numbered through the whole run: this is first_step's first one
    x, y = micro_batch(first_step * grad_accum_steps)
    # One round more than there are steps: it only looks at the final weights and saves them.
    for step in range(first_step, args.num_iterations + 1):
        last = step == args.num_iterations

        # Once in a while: how good is the model on text that it does not learn from? This stands at
        # the top of the loop, where the weights have had exactly `step` updates. So step 0 shows an
        # untrained model, whose loss should be about ln V, and the last round shows the final one.
        # (But a run that has to stop saves at once.)
        stop = stop and not last  # after its last step a run is done, and not stopped
        due = args.val_loss_every > 0 and (step % args.val_loss_every == 0 or last) and not stop
        if due:
            val_loss = evaluate(fast_model, val_data, num_val_sequences, batch_size, autocast,
                                rank, world_size)
            print0(f"step {step:5d}/{args.num_iterations} | val loss {val_loss:.6f}")
            log(f"s:{step} tel:{val_loss:.6f}")
            # before it is saved over the last good state
            check(step, "validation loss", val_loss)

        # And HellaSwag, a benchmark of questions with four answers to choose from. (With model and
        # not fast_model, which would be compiled anew for each length of text. So are samples.)
        if args.hellaswag_every > 0 and (step % args.hellaswag_every == 0 or last) and not stop:
            score = score_hellaswag(model, items, autocast)
            print0(f"step {step:5d}/{args.num_iterations} | HellaSwag {score:.6f}")
            log(f"s:{step} eval:{score:.6f}")

        # Save, so that a crash costs little: best.pt, the weights with the lowest validation loss,
        # and last.pt, all that a resumed run needs. That is the weights, the optimizers' averages
        # and the step: which data comes next and what samples look like follows from the seed and
        # the step.
        is_best = due and step > 0 and val_loss < best_val_loss
        is_new = due and step > first_step  # and not what was just loaded
        saved = True
        if rank == 0 and (is_best or is_new or last or stop):
            state = {"config": asdict(config), "model": model.state_dict(), "step": step}
            state |= {"tokenizer": train_data.tokenizer, "val_loss": val_loss}
            # without the averages, which are as large and only serve to go on training
            if is_best and save_checkpoint(folder / "best.pt", state):
                best_val_loss = val_loss
            state |= {"optimizer": [optimizer.state_dict() for optimizer in optimizers]}
            state |= {"best_val_loss": best_val_loss, "val_text": val_text, "args": vars(args)}
            saved = save_checkpoint(folder / "last.pt", state)

        # Read what it writes. No loss tells that it only repeats itself.
        if due and rank == 0:
            print0(f"--- a sample after {step} steps")
            try:
                print_sample(model, train_data.tokenizer, args.prompt, args.seed + step,
                             args.max_new_tokens, temperature=args.temperature, top_k=args.top_k)
            except OSError as e:  # GPT-2's vocabulary cannot be loaded: no reason not to train
                print0(f"no sample: {e}")
            print0("---")
        if last or stop:
            break

        # Forward and backward. The micro-batches run one after the other, and their gradients add
        # up in p.grad.
        t0 = time.time()
        loss_sum = torch.zeros((), device=device)
        for micro_step in range(grad_accum_steps):
            # Under DDP, backward() also averages gradients over processes. That is needed once a
            # step, in the last micro-batch; until then each process adds up its own.
            if world_size > 1:
                ddp_model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
            # autocast runs matrix products in bf16
            with autocast():
                loss = ddp_model(x, y)
            # backward() adds to p.grad, and what we want is the mean over the micro-batches.
            # Without this division the gradient of 16 would be 16 times too long. The optimizers
            # ignore a factor that all steps share, but clipping, below, would then cut every step
            # to the same length, and not only the unusual ones.
            loss = loss / grad_accum_steps
            # detach() takes the number, without the graph of operations that made it
            loss_sum += loss.detach()
            # Python runs ahead of a GPU, which works through a queue of kernels. So the next batch
            # is made while the GPU is at work on this one. (After the last micro-batch it is the
            # first one of the next step.)
            x, y = micro_batch(step * grad_accum_steps + micro_step + 1)
            loss.backward()

        # Clip: if the gradients of all weights, taken as one long vector, are longer than 1, scale
        # them to length 1. Why? One unusual batch can have a gradient many times as long as others
        # (a batch of random digits: ten times as long, in the default run). It would fill the
        # averages of both optimizers, and for ten or twenty steps the weights would move along it,
        # away from what was learned. That does little harm in a small run (report/README.md tries
        # it); in a run of days clipping is a cheap insurance. (To cut every step would do harm,
        # too: a batch with little to learn from would move the averages as much as one with a lot.)
        # norm is the length before clipping.
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
        lr = get_lr(step, args)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            # Set the gradients back to 0, or the next ones would be added to them. Write zeros and
            # do not delete them (set_to_none): DDP sends the memory that they are in.
            optimizer.zero_grad(set_to_none=False)

        # .item() waits until the GPU has done all of this. Before it, the clock would only show how
        # long it takes to order the work. It waits once a step, and not in the loop above.
        train_loss = loss_sum.item() / world_size
        # The sum over processes of loss / world_size is the mean loss. In the same message go the
        # signals (Ctrl-C and the like): if one process was asked to stop, all learn it here.
        train_loss, num_signals = all_sum([train_loss, len(signals)], device)
        stop = num_signals > 0
        seconds.append(time.time() - t0)
        check(step, "loss", train_loss)
        check(step, "gradient norm", norm.item())

        # Say how it goes. The first step is slow, so the time that is left is counted without it.
        left = ""
        if step == first_step:
            first_step_done = time.time()
            print0(f"first step done {first_step_done - start_time:.1f} s after the start")
        else:
            seconds_a_step = (time.time() - first_step_done) / (step - first_step)
            left = f" | {seconds_a_step * (args.num_iterations - step - 1) / 60:.1f} min left"
        if step % args.log_every == 0 or step == args.num_iterations - 1:
            mean = sum(seconds) / len(seconds)
            seconds = []
            tokens_per_second = args.total_batch_size / mean
            mfu = ""
            if peak:
                mfu = f" | MFU {tokens_per_second * flops / world_size / peak:.1%}"
            print0(f"step {step:5d}/{args.num_iterations} | loss {train_loss:.6f} | lr {lr:.2e} | "
                   f"norm {norm:.4f} | {1000 * mean:.1f} ms | {tokens_per_second:,.0f} tok/s"
                   f"{mfu}{left}")
            log(f"s:{step} trl:{train_loss:.6f} lr:{lr:.2e} norm:{norm:.4f} ms:{1000 * mean:.1f}")

    # ---- The end: say where everything is, and what to type next.
    launch = "python train_gpt2.py" if world_size == 1 else "the same torchrun command with"
    again = f"{launch} --resume --output_dir {shlex.quote(args.output_dir)}"
    if not saved:
        sys.exit(f"error: the steps since last.pt are lost: make room on the disk, then {again}")
    best = folder / "last.pt"
    exit_code = 0
    if stop:
        print0(f"stopped after {step} steps, and all is saved in {best} (whatever torchrun says "
               f"below). To go on:\n    {again}")
        # a program that a signal ended has the exit code 128 + the signal's number
        exit_code = 128 + (signals or [signal.SIGTERM])[0]
    else:
        print0(f"done in {time.time() - start_time:.0f} s. Newest weights: {best}")
        if device.type == "cuda":
            print0(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
        if math.isfinite(best_val_loss):
            best = folder / "best.pt"
            print0(f"Lowest validation loss, {best_val_loss:.4f}: {best}")
        print0(f"Next:\n    python train_gpt2.py --sample {shlex.quote(str(best))}")
        if train_data.tokenizer == "gpt2":
            print0(f"    python hellaswag.py -m {shlex.quote(str(best))}")
        elif args.model == "tiny":
            print0("or, for a larger model on a GPU, real text; this says what to type after it:\n"
                   "    python fineweb.py --shards 10")
    return exit_code


# -------------------------------------------------------------------------------------------------
# 8. To and from Hugging Face

# This has nothing to do with training: you can stop here. Many programs read models in the form of
# Hugging Face's transformers library. Here OpenAI's weights come in, and ours go out. The numbers
# stay what they are; only names and layout change.

# GPT-2's names are ours, but its queries, keys and values are one matrix, c_attn, and its linear
# layers are stored as (in, out), the transpose of an nn.Linear.
GPT2_TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
# What to replace in the names of Llama, which are also Qwen3's, to get ours.
LLAMA_NAMES = {
    "model.embed_tokens": "transformer.wte", "model.layers": "transformer.h",
    "model.norm": "transformer.ln_f", "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2", "self_attn": "attn", "q_proj": "c_q", "k_proj": "c_k",
    "v_proj": "c_v", "o_proj": "c_proj", "gate_proj": "c_gate", "up_proj": "c_up",
    "down_proj": "c_down",
}


def our_names(name):
    """Our name of a weight that transformers calls `name`; for GPT-2's c_attn our three names."""
    for theirs, ours in LLAMA_NAMES.items():
        name = name.replace(theirs, ours)
    if "c_attn" in name:
        return [name.replace("c_attn", part) for part in ("c_q", "c_k", "c_v")]
    return [name]


@torch.no_grad()
def from_openai(name, block_size=1024):
    """OpenAI's gpt2, gpt2-medium, gpt2-large or gpt2-xl as a GPT, in fp32 on the CPU.

    block_size: the longest sequence, at most the 1024 positions that OpenAI's models have learned.
    The weights are downloaded once. A folder openai-community/NAME, where you are, is taken first.
    """
    import transformers

    theirs = transformers.GPT2LMHeadModel.from_pretrained(f"openai-community/{name}")
    c = theirs.config
    if block_size > c.n_positions:
        sys.exit(f"error: {name} has {c.n_positions} positions: use a smaller --sequence_length")
    shape = dict(n_layer=c.n_layer, n_head=c.n_head, n_kv_head=c.n_head, n_embd=c.n_embd)
    model = GPT(GPTConfig(block_size=block_size, vocab_size=c.vocab_size, **shape, **GPT2))
    state = model.state_dict()
    for their_name, w in theirs.state_dict().items():
        if their_name.endswith(GPT2_TRANSPOSED):
            w = w.T
        names = our_names(their_name)
        # c_attn, (3C, C) by now, is c_q, c_k and c_v one below the other. All else is one piece.
        for our_name, piece in zip(names, w.chunk(len(names)), strict=True):
            # ours has more rows where it pads the table, and fewer where it needs fewer positions
            rows = min(len(piece), len(state[our_name]))
            state[our_name][:rows] = piece[:rows]
    return model


@torch.no_grad()
def to_transformers(config, state):
    """A model of ours as one of transformers: GPT-2, Llama, or Qwen3, which is Llama with QK-norm.

    config: a GPTConfig. state: its weights. Ends the program if no class has these switches.
    """
    import transformers

    end = config.vocab_size - 1  # <|endoftext|>
    settings = dict(vocab_size=config.vocab_size, tie_word_embeddings=True)
    settings |= dict(bos_token_id=end, eos_token_id=end, pad_token_id=end)
    is_gpt2 = asdict(config) == asdict(config) | GPT2 and config.n_kv_head == config.n_head
    if is_gpt2:
        settings |= dict(n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd)
        # one number by two names: llama.cpp and mlx-lm look for the second
        settings |= dict(n_positions=config.block_size, n_ctx=config.block_size)
        # we have no dropout; not told so, transformers would finetune GPT-2 with 0.1
        settings |= dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings))
    elif (config.norm, config.mlp, config.pos, config.bias) == ("rmsnorm", "swiglu", "rope", False):
        settings |= dict(num_hidden_layers=config.n_layer, hidden_size=config.n_embd)
        settings |= dict(num_attention_heads=config.n_head, num_key_value_heads=config.n_kv_head)
        settings |= dict(head_dim=config.n_embd // config.n_head, rms_norm_eps=1e-6)
        settings |= dict(max_position_embeddings=config.block_size)
        settings |= dict(intermediate_size=len(state["transformer.h.0.mlp.c_gate.weight"]))
        kind = "Qwen3" if config.qk_norm else "Llama"
        their_config = getattr(transformers, f"{kind}Config")(**settings)
        # the base of rope_tables(), where programs look for it that were made for transformers 4
        their_config.rope_theta = 10000.0
        theirs = getattr(transformers, f"{kind}ForCausalLM")(their_config)
    else:
        sys.exit(f"error: only the variant and --arch gpt2 can be exported, this is a {config}")
    for their_name, p in theirs.state_dict().items():
        w = torch.cat([state[our_name] for our_name in our_names(their_name)])
        if is_gpt2 and their_name.endswith(GPT2_TRANSPOSED):
            w = w.T
        # without the rows that pad our table
        p.copy_(w[: len(p)])
    return theirs


def export(checkpoint_path, folder):
    """Writes a checkpoint, and GPT-2's tokenizer, as a folder that transformers opens."""
    import transformers

    if os.path.lexists(folder):
        sys.exit(f"error: {folder} exists already: choose another folder")
    checkpoint = read_checkpoint(checkpoint_path)
    if checkpoint["tokenizer"] != "gpt2":
        sys.exit(f"error: {checkpoint_path} knows only bytes, for which transformers has no "
                 f"tokenizer: export a model that was trained on GPT-2's tokens")
    config = GPTConfig(**checkpoint["config"])
    theirs = to_transformers(config, checkpoint["model"])
    # OpenAI's own, downloaded once. It has no token to fill up the shorter texts of a batch with;
    # <|endoftext|> will do, because a mask hides it there.
    tokenizer = transformers.GPT2Tokenizer.from_pretrained(
        "openai-community/gpt2", pad_token="<|endoftext|>", model_max_length=config.block_size
    )
    theirs.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{folder} is written. Begin prompts with <|endoftext|>, as documents do in training: "
          f"the tokenizer adds none.\nNext, with the packages lm_eval and accelerate:\n"
          f"    lm_eval --model hf --model_args {shlex.quote(f'pretrained={folder}')} "
          f"--tasks hellaswag")


# -------------------------------------------------------------------------------------------------

def main(argv):
    """Does what the command line asks for. Returns the exit code."""
    try:
        args, checkpoint = parse_args(argv)
        if args.export:
            export(*args.export)
            return 0
        if args.sample is not None:
            model, tokenizer = load_model(args.sample, pick_device(args.device))
            print_sample(model, tokenizer, args.prompt, args.seed, args.max_new_tokens,
                         temperature=args.temperature, top_k=args.top_k)
            return 0
        with contextlib.ExitStack() as at_end:
            exit_code = train(args, checkpoint, at_end)
        if dist.is_initialized():
            # DDP's objects refer to each other in a circle, and keep threads alive that would abort
            # a program that is ending: collect them first.
            gc.collect()
            dist.destroy_process_group()
        return exit_code
    except ModuleNotFoundError as e:
        sys.exit(f"error: this takes one more package: pip install {e.name}")
    except BrokenPipeError:  # whoever read our output, head for example, has left: say no more
        sys.stdout = open(os.devnull, "w")
        return 1
    except OSError as e:  # no permission, no space, no network
        reason = str(e).strip().split("\n")[0]
        sys.exit(f"error: {reason}: fix that, and if the run had begun, go on with --resume")
    except (RuntimeError, MemoryError) as e:
        if "out of memory" not in str(e) and "allocate" not in str(e):
            raise
        # the weights and the optimizers' averages take as much for any batch
        where = {frame.name for frame in traceback.extract_tb(e.__traceback__)}
        smaller = "--model" if where & {"step", "__init__"} else "--batch_size"
        sys.exit(f"error: out of memory: choose a smaller {smaller}")


if __name__ == "__main__":
    # a character of a sample that the terminal lacks becomes a "?", and does not end the run
    sys.stdout.reconfigure(errors="replace")
    # the second Ctrl-C of a run, and the first of anything else, ends it without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(main(sys.argv[1:]))

"""
How GPT-2 is trained, and how one would train it today: one file, to be read from top to bottom.

A language model reads a text and says what comes next. To it a text is a row of whole numbers, the
token ids: a token is a piece of text, a byte or a frequent word. At each position the model gives
every possible next id a score (a logit), and softmax turns the scores into probabilities. The loss
of a position is -log p(the id that really comes next), with the natural logarithm, so in nats:
    0       the model was certain, and right
    5.5     it gave the same probability to all 257 ids of a vocabulary of bytes (the 256 bytes, and
            one id that marks where a text begins): ln 257 = 5.5
    10.8    it gave the same to all 50,257 ids of GPT-2's vocabulary: ln 50,257 = 10.8
    3.3     where a trained GPT-2 ends: as if it had to guess among e^3.3 = 27 equally likely ids
Training lowers the mean loss. Each step runs the model on some text, computes the gradient of the
loss, and moves every weight a little. A run takes hundreds to tens of thousands of steps. Nobody
has to label anything: the right answer at each position is the id that follows in the text.

The file has two parts.
    I   The algorithm: 1 the model, 2 the loss, 3 the data, 4 the optimizer, 5 training. It ends
        with the training loop, and is all you need to read.
    II  What part I calls, and the command line: how to be fast, to run on any machine, not to lose
        work, and to use a trained model.

Letters and words in comments:
    B   batch: how many sequences are processed side by side
    T   time: the position in a sequence, or how many positions there are
    C   channels: the width of the vector that stands for one position (n_embd)
    D   the width of one attention head, C / n_head
    V   vocabulary: how many different ids there are
    N   B * T, all tokens of a batch in one row
    fp32, bf16   32-bit numbers, and 16-bit ones with the same range but only 2 to 3 decimal digits,
                 which take half the memory and are several times as fast to multiply
    tiny         a model for a laptop: 4 layers, 128 channels, and bytes as tokens
    d12, d24     two of GPT-2's sizes: 12 layers with 768 channels, and 24 layers with 1024

Launch it:
    python train_gpt2.py                       tiny learns to write Python from the source of its
                                               library: one to three minutes, to a loss of 1.16
                                               a byte
    python fineweb.py                          downloads FineWeb, 10 billion tokens of web pages
    python train_gpt2.py --model d12           d12 learns from them, on one GPU: 8 hours on an H100,
                                               by the published speeds of similar code
    torchrun --standalone --nproc_per_node=8 train_gpt2.py --model d12       the same on eight
    python train_gpt2.py --sample logtiny/best.pt --prompt "def "            let it write
    python train_gpt2.py --resume --output_dir log124M    goes on after a crash, Ctrl-C, a full disk
(The folder log124M is named after GPT-2's model of this shape. Ours has 116.5M weights.)

The model is a variant of GPT-2 with what became usual after it: RMSNorm, rotary positions,
grouped-query attention, QK-norm, SwiGLU, and no biases. You need not know these words: each is
explained where it is built. Each is also a switch, and --arch gpt2 turns all of them back to 2019.
Names such as wte, c_proj and lm_head are GPT-2's own, and the flags have the names of llm.c, GPT-2
training in C (https://github.com/karpathy/llm.c). report/one_step.py shows one training step with
real numbers: run it when you have read part I.
"""

import argparse
import contextlib
import copy
import datetime
import errno
import functools
import gc
import importlib.util
import math
import os
import shlex
import signal
import sys
import time
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

# =================================================================================================
# PART I: THE ALGORITHM

# -------------------------------------------------------------------------------------------------
# 1. The model

# Three of the six changes come in two kinds: first the variant's, then GPT-2's. (The others are
# n_kv_head, bias and qk_norm, in GPTConfig.)
SWITCHES = {"norm": ("rmsnorm", "layernorm"), "mlp": ("swiglu", "gelu"), "pos": ("rope", "learned")}


@dataclass
class GPTConfig:
    """The shape of a model. Words that are new here are explained below, where they are built.

    It raises a ValueError if the sizes do not divide or a switch has an unknown name.
    """

    n_layer: int = 12         # blocks, one after the other
    n_head: int = 12          # attention heads, side by side in each block
    n_kv_head: int | None = None  # key/value heads; None: half of n_head; GPT-2 has n_head
    n_embd: int = 768         # C, numbers in the vector of one position
    block_size: int = 1024    # the longest sequence, in tokens
    vocab_size: int = 50257   # V, ids that exist
    norm: str = "rmsnorm"     # how vectors are kept at one size
    mlp: str = "swiglu"       # what a block computes on each position alone
    pos: str = "rope"         # how the model learns of the order of positions
    bias: bool = False        # whether linear layers and LayerNorm have biases, as GPT-2's do
    qk_norm: bool = True      # normalize each head's queries and keys; GPT-2 does not

    def __post_init__(self):
        # chooses n_kv_head where it is None, and raises the error
        complete_config(self)


class RMSNorm(nn.Module):
    """Divides each vector by its root mean square, and scales each channel by a gain it learns.

    x (..., dim) -> the same shape and dtype (https://arxiv.org/abs/1910.07467). Every block of
    the model, as you will see, adds its result to the vectors, so their numbers grow from block to
    block. Each part therefore reads a copy in which they have the size 1 again.
    GPT-2's LayerNorm also subtracts the mean and adds a bias. That turned out not to be needed.
    """

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))  # the gain

    def forward(self, x):
        # x may be bf16, whose 2 to 3 digits are too few for a sum of many squares: compute in fp32.
        # The 1e-6 keeps a vector of zeros from being divided by 0.
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
# So far a query finds the same keys wherever they stand. If two earlier tokens changed places, the
# mean would be the same: in the first block, the full stop after "dog bites man" sees what it sees
# after "man bites dog". The order has to enter somehow. GPT-2 adds a learned vector to each
# position. Rotary positions (RoPE, https://arxiv.org/abs/2104.09864) instead take the channels of
# queries and keys in pairs, as points in the plane, and rotate each pair by an angle that grows
# with time.
#
# Why rotate? Let R(a) be the rotation by an angle a. A dot product stays the same if both vectors
# are rotated by the same angle. Take a query rotated by a and a key rotated by b, and rotate both
# back by a:
#     R(a) q · R(b) k = q · R(b - a) k
# The angle of a pair is the time multiplied by the pair's own speed, so b - a depends on the
# distance alone: "three tokens ago" looks the same everywhere in the text. (Distances longer than
# any in training are new to the model all the same: do not expect it to read further.)

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
    """Rotates queries or keys x (B, T, heads, D) by their time. cos and sin are (T, D/2).

    Each pair of channels (first, second) is a point in the plane, and turns by its angle:

        | cos  -sin |   | first  |
        | sin   cos | · | second |
    """
    # (T, 1, D/2): the angle depends on time, dimension 1 of x, and is the same for every head
    cos = cos.unsqueeze(1)
    sin = sin.unsqueeze(1)
    # the two members of all pairs: the first half of the channels, and the second
    first, second = x.chunk(2, dim=-1)  # (B, T, heads, D/2) both
    rotated = torch.cat((cos * first - sin * second, sin * first + cos * second), dim=-1)
    # the tables are fp32, so the products are too; go back to what x was
    return rotated.to(x.dtype)


def causal_attention(q, k, v):
    """softmax(q k^T / sqrt(D)) v, each position over itself and the past.

    q (B, n_head, T, D), k and v (B, n_kv_head, T, D) -> (B, n_head, T, D). Several query
    heads may share a key and value head. In plain form:

        k = k.repeat_interleave(n_head // n_kv_head, dim=1)     # one for each query head,
        v = v.repeat_interleave(n_head // n_kv_head, dim=1)     # (B, n_head, T, D)
        scores = q @ k.transpose(2, 3) / math.sqrt(D)           # (B, n_head, T, T)
        future = torch.ones(T, T).triu(1).bool()                # row t, column u: True where u > t
        scores = scores.masked_fill(future, -math.inf)          # nobody may look at the future
        return F.softmax(scores, dim=-1) @ v                    # a weighted mean of the values

    The future is hidden because the answer stands there: each position has to predict the token
    that comes right after it.

    Why divide by sqrt(D)? A dot product adds up D products. If the numbers are random, of standard
    deviation 1, their sum has the standard deviation sqrt(D), and the largest score of a row would
    take nearly all of the softmax. Then learning is slow: a softmax has the derivatives p (1 - p)
    and -p p', where p and p' are two of its probabilities, and all of these are near 0 if one p is
    near 1 and the others near 0. (Queries and keys that begin much smaller do not need the
    division: experiment 2 of the lab, report/lab.md.)
    """
    # Flash attention (https://arxiv.org/abs/2205.14135) gives the same numbers, computed tile by
    # tile in the small fast memory of the chip, so that no (T, T) matrix is ever stored.
    return flash_attention(q, k, v)


class CausalSelfAttention(nn.Module):
    """Every position gathers what it needs from itself and those before it, as described above.

    Each head does this on its own, with a q, k and v of D numbers that it makes from all C
    channels. So one may look for the verb, and another for the matching bracket. In grouped-query
    attention (https://arxiv.org/abs/2305.13245) heads share keys and values: if there are half as
    many of these, query heads 0 and 1 share key/value head 0, heads 2 and 3 share head 1, and so
    on. Why? A program that writes long texts with a trained model keeps the keys and values of all
    earlier positions, so as not to compute them again for each new token. With half the heads they
    take half the memory. (In training it only saves some weights.)
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
            # QK-norm: after it every q and k has length sqrt(D), as long as the gains are near 1. A
            # dot product is then at most D, and a score, which is divided by sqrt(D), at most
            # sqrt(D), however large c_q and c_k grow. At a high learning rate they would otherwise
            # grow until a softmax is stuck on one position (https://arxiv.org/abs/2302.05442).
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

    Attention only takes means of vectors. To draw a conclusion from what has been brought together
    takes a function that is not linear. GPT-2's MLP widens the vector to 4C, applies GELU (a smooth
    ReLU), and goes back to C:

        y = c_proj(gelu(c_fc(x)))

    SwiGLU (https://arxiv.org/abs/2002.05202) makes two wide vectors, and one of them, the gate,
    decides how much of the other passes:

        y = c_down(silu(c_gate(x)) * c_up(x))           silu(x) = x * sigmoid(x), a smooth ReLU, too

    It has three matrices instead of two. So each gets 2/3 of the width 4C, which is 8/3 C, and the
    cost stays the same.
    """

    def __init__(self, config):
        super().__init__()
        self.swiglu = config.mlp == "swiglu"
        if self.swiglu:
            # Rounded up to a multiple of 64, because GPUs multiply matrices in blocks. At GPT-2's
            # widths that adds at most 1.3 %. (In tiny, 341 become 384: an eighth more weights.)
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
            return self.c_down(F.silu(self.c_gate(x)) * self.c_up(x))
        # tanh: the approximation of GELU that OpenAI trained GPT-2 with
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """Attention, then the MLP. Neither replaces x: each adds to it.

    The x that runs through all blocks is called the residual stream. A block reads a normalized
    copy of it (pre-norm) and writes by adding. Adding passes gradients on unchanged. So they reach
    the first block as directly as the last one, and deep models can be trained.

    GPT-2 had dropout here, x + dropout(attn(...)): in training it sets random numbers to 0, and so
    keeps a model from learning its text by heart. d12 reads each token of FineWeb once, and does
    not need it. If your model reads a small text many times, add it.
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
        ln_f                   (4, 1024, 768)
        lm_head                (4096, 50304)         a score for every id, all tokens in one row
        loss                   one number            the mean over 4096 predictions
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        # GPUs are slow at odd widths like 50,257, so the table is padded to a multiple of 64, here
        # 50,304. No text has the extra ids, and their scores are set to -inf. So their rows have a
        # gradient of exactly 0, and only weight decay ever changes them.
        padded_vocab_size = 64 * math.ceil(config.vocab_size / 64)
        # GPT-2's names: wte is the embedding, a table with a vector for each id; wpe is the one for
        # positions; h are the blocks, and ln the norms, also where they are RMSNorm.
        self.transformer = nn.ModuleDict()
        self.transformer["wte"] = nn.Embedding(padded_vocab_size, config.n_embd)
        self.transformer["h"] = nn.ModuleList(Block(config) for layer in range(config.n_layer))
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
        # more. To have two, leave this line out.
        self.lm_head.weight = self.transformer.wte.weight
        self.init_weights()

    def init_weights(self):
        """Random matrices and tables of standard deviation 0.02, as in nanoGPT and llm.c.

        Why 0.02? Most matrices read a normalized vector, whose numbers have a size of 1. An output
        is a sum of C products, and at C = 768 its size is 0.02 * sqrt(768) = 0.55, neither huge nor
        tiny. With weights of size 1 it would be 28. (Gains are 1 already.)
        """
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif name.endswith(("c_proj.weight", "c_down.weight")):
                # These 2 * n_layer matrices write into the residual stream. A sum of n random
                # vectors grows like sqrt(n), so each is divided by sqrt(2 * n_layer).
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)

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
        # From here on bf16, if that is what we compute in: half the memory. (The weights are fp32;
        # section 5 tells how the two meet.)
        x = x.to(compute_dtype(x))
        for block in self.transformer.h:
            x = block(x, rope)
        # under autocast PyTorch's own LayerNorm returns fp32: go back to what x is
        return self.transformer.ln_f(x).to(x.dtype)

    def forward(self, idx, targets=None):
        """Token ids idx (B, T), T <= block_size.

        Without targets: fp32 scores for each next id (the logits), (B, T, padded V), -inf for ids
        that are only padding. With targets (B, T): the mean loss, a scalar, in nats a token.

        To write a text, draw an id from softmax(logits) at the last position, put it behind the
        others, and run the model again: generate(), in part II.
        """
        x = self.features(idx)
        if targets is not None:
            # What it computes is section 2. (B, T, C) -> (N, C) and (B, T) -> (N,). vocab_size says
            # which ids are only padding.
            return head_loss(x.flatten(0, 1), self.lm_head.weight, targets.flatten(),
                             self.config.vocab_size)
        logits = self.lm_head(x).float()
        logits[..., self.config.vocab_size :] = -math.inf
        return logits


# -------------------------------------------------------------------------------------------------
# 2. The loss

# head_loss() takes what features() gives, x (N, C), and W (padded V, C), the weight of lm_head. In
# plain form it is
#
#     logits = x @ W[:vocab_size].T               # (N, V), a score for every id
#     loss = F.cross_entropy(logits, targets)     # mean of -log softmax(logits)[target]
#
# This is called the cross-entropy, and it is all there is to the loss. A bit of calculus shows what
# it does. Let z be the logits of one token and y its target. The loss is
#
#     -log softmax(z)[y] = log(sum(exp(z))) - z[y]
#
# The derivative of the first term with respect to z[i] is exp(z[i]) / sum(exp(z)), which is
# softmax(z)[i] again, the probability of id i. The derivative of z[y] is 1 for i = y, else 0:
#
#     d loss / d z  =  softmax(z), with 1 subtracted at y
#
# That is the signal which all of training comes from: lower every id's score by the probability
# that it was given, and raise the right one's by 1.
#
# Why not call F.cross_entropy, then? The logits of 64 sequences of 1024 tokens, what a large GPU
# takes at a time, are 64 * 1024 * 50,304 * 4 bytes = 13 GB in fp32, and more than one copy of them
# would be kept until the backward pass. But the gradient of a token's logits, by the line above,
# needs no other token. So head_loss(), in part II, takes the tokens slice by slice: it computes a
# slice's logits, their loss and at once their gradient too, keeps the gradients of x and W, and
# forgets the logits. backward() then finds it ready. The numbers are the same.

# -------------------------------------------------------------------------------------------------
# 3. The data

# A corpus is one long sequence of token ids, cut into files called shards. fineweb.py makes them,
# and tells how text becomes tokens. Training reads pieces of T + 1 ids out of it, and makes x and y
# of each:
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

class TokenLoader:
    """Sequences out of all shards that match a glob pattern. An epoch uses each of them once.

    In plain form: row i of a shard begins at token i * T, and one token more is read for the last
    target.

        piece = tokens[i * T : i * T + T + 1]
        x, y = piece[:-1], piece[1:]

    A shard of n tokens has (n - 1) // T rows, and the few tokens that are left over at its end are
    never used. In which order? With a seed, each epoch visits the shards in a random order, and the
    rows of each shard in a random order; with seed None, as they lie. Sequences are numbered
    through the whole run. For example shard 0 has 3 rows and shard 1 has 2. An epoch then has 5
    sequences, and may be:

        number   0   1   2   3   4
        shard    1   1   0   0   0         the shards in random order
        row      1   0   2   0   1         the rows of each in random order

    Number 5 begins the next epoch, in another order. Which row has number 4 follows from the number
    and the seed alone, so there is no state to save: a run that is resumed at step 1000 reads what
    it would have read.

    Rows are cut without regard to texts: one may begin in the middle of a text and hold several,
    with <|endoftext|>, the id that marks where a text begins, in between. The model learns that
    what stands before this mark does not matter.
    """

    def __init__(self, pattern, T, seed=None):
        self.T = T
        self.seed = seed
        # their paths, how many tokens each has, and how many different ids there are in all
        self.paths, lengths, self.vocab_size = fineweb.find_shards(pattern)
        # rows in each shard, and sequences in an epoch
        self.counts = [max(0, n - 1) // T for n in lengths]
        self.total = sum(self.counts)

    def order(self, n, *key):
        """0 ... n - 1 in random order, the same for the same key; as they are if seed is None."""
        return range(n) if self.seed is None else permutation(n, self.seed, *key)

    def locate(self, number):
        """Returns the shard and the row of sequence `number` of the run."""
        epoch, rest = divmod(number, self.total)
        # go through the shards in this epoch's order, until one has so many rows
        for shard in self.order(len(self.paths), epoch):
            if rest < self.counts[shard]:
                # and through the rows of that shard, in their order
                return shard, self.order(self.counts[shard], epoch, shard)[rest]
            rest -= self.counts[shard]

    def batch(self, first, count, device):
        """Sequences first ... first + count - 1 of the run: x and y, (count, T) int64 on device."""
        rows = np.empty((count, self.T + 1), np.int64)
        for i in range(count):
            shard, row = self.locate(first + i)
            start = row * self.T
            # only this piece is read from the disk
            rows[i] = fineweb.read_tokens(self.paths[shard], start, self.T + 1)
            check_ids(rows[i], self.vocab_size, self.paths[shard])
        rows = to_device(torch.from_numpy(rows), device)
        # contiguous() copies: shifted views of one tensor gave wrong results on Apple's GPUs
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


@torch.no_grad()
def evaluate(model, data, num_sequences, batch_size=16, autocast=contextlib.nullcontext):
    """The mean loss of the first num_sequences of data, a TokenLoader, in nats a token.

    data is text that the model never learns from, so a model that has only memorized does badly.
    (This loss may well be lower than the training loss beside it, which is that of other text, and
    of one batch only.) `with autocast():` lets it compute in bf16: see section 5.
    """
    device = next(model.parameters()).device
    loss_sum = 0.0
    # With several GPUs each has a process of its own, number `rank` of world_size, and they take
    # turns by batch. Each sequence counts once. So the mean is the same for any number of processes
    # and any batch size, and runs can be compared.
    rank, world_size = this_process()
    for first in range(rank * batch_size, num_sequences, world_size * batch_size):
        count = min(batch_size, num_sequences - first)
        x, y = data.batch(first, count, device)
        with autocast():
            loss = model(x, y)
        loss_sum += loss.item() * count
    # all_sum() adds up a list of numbers, each over all processes
    [total] = all_sum([loss_sum], device)
    return total / num_sequences


# -------------------------------------------------------------------------------------------------
# 4. The optimizer

# The gradient g says for every weight w in which direction the loss grows. The simplest optimizer
# goes the other way, w -= lr * g. But one learning rate lr for all is too large for weights with
# large gradients and too small for those with tiny ones. Adam keeps two running averages for each
# weight, m of g and v of g^2, and AdamW (https://arxiv.org/abs/1711.05101) adds weight decay. After
# n steps:
#
#     m = 0.9 m + 0.1 g        v = 0.95 v + 0.05 g^2
#     w -= lr * (m / (1 - 0.9^n) / (sqrt(v / (1 - 0.95^n)) + eps) + weight_decay * w)
#
#     m              smooths the direction over about 10 steps.
#     sqrt(v)        makes the size of the gradients irrelevant. A weight whose gradients agree
#                    moves by about lr in a step. One whose gradients are now positive and now
#                    negative, at random, moves by about 0.2 lr, as they nearly cancel in m. (There
#                    a gradient counts 0.1, the one before it 0.09, then 0.081 and so on. If they
#                    are random, sqrt(0.1^2 + 0.09^2 + ...) = 0.23 of their size is left.)
#     1 - 0.9^n      m begins at 0, and so at first it is too small. To divide by this, which is 0.1
#                    after the first step and soon nearly 1, makes up for it. So for v.
#     eps            avoids a division by 0.
#     weight_decay   pulls weights a little towards 0, so that those which the data does not need
#                    fade.
#
# Muon (https://kellerjordan.github.io/posts/muon) is the newer optimizer, for the matrices of the
# blocks. Where Adam evens out the sizes of single numbers, Muon looks at the matrix as a whole.
# What a matrix does to a vector is a rotation, a stretch along each axis, and another rotation. If
# the matrix is a gradient, a few of its stretches are large and most are small. Say one is 10 and
# another one 0.1: then a plain step changes what the weights do along the first axis a hundred
# times as much as along the second. But a small stretch need not be unimportant. It may belong to
# something that is in few of the batch's texts, and has to be learned, too. Muon keeps the
# rotations and sets all stretches to 1, by orthogonalize(): along every axis the weights now change
# alike. (A matrix with 10 and 0.1 on its diagonal becomes one with 1 and 1.) In plain form, with g
# and w matrices:
#
#     m = 0.95 m + 0.05 g
#     u = orthogonalize(0.95 m + 0.05 g)      # m, if the same g came once more
#     w -= lr * (0.2 sqrt(max(rows, cols)) * u + weight_decay * w)
#
# To look one gradient ahead is Nesterov's idea. And 0.2 sqrt(max(rows, cols)) gives the numbers in
# u a size of 0.2, about that of AdamW's steps in practice. So one learning rate serves both
# optimizers (https://arxiv.org/abs/2502.16982).

def orthogonalize(matrices):
    """Makes all stretches of matrices (n, rows, cols) about 1. The same shape and dtype.

    Write a matrix as X = U S V: U and V are rotations (or a part of one, if X is not square), and S
    has the stretches s (the singular values) on its diagonal. To compute these would take far too
    long. But X can be multiplied with itself. A rotation times its transpose is the identity, so

        X X^T X = U S V V^T S U^T U S V = U S^3 V

    has the same rotations, and every s has become s^3. In X X^T X X^T X it becomes s^5. So a
    weighted sum of the three does this to each stretch alone:

        s -> a s + b s^3 + c s^5

    With the a, b and c below, doing this five times brings every s between 1/500 and 1 to between
    0.7 and 1.2, and makes smaller ones larger. (a, b and c were found by search. The link above
    says how, and why this is near enough to 1.)
    """
    a, b, c = 3.4445, -4.775, 2.0315
    # X X^T is (rows, rows), and X^T X would be (cols, cols). Lay tall matrices on their side, so
    # that it is the smaller one.
    tall = matrices.size(1) > matrices.size(2)
    X = matrices.mT if tall else matrices
    # The polynomial needs stretches of at most 1, and none is larger than the matrix's norm, the
    # root of the sum of the squares of its entries.
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        # A X is X X^T X, and A A X is X X^T X X^T X: this is the weighted sum of the three
        A = X @ X.mT  # (n, rows, rows)
        B = b * A + c * A @ A
        X = a * X + B @ X
    return X.mT if tall else X


class Muon(torch.optim.Optimizer):
    """Averages the gradients, makes the average orthogonal, and takes a step along it.

    It is for the matrices of the blocks, which turn one vector into another. The table wte is left
    to AdamW, because each of its rows is looked up alone. (As lm_head it is a matrix; Muon's author
    found AdamW better there, too.) dtype is the precision of the products: bf16 is exact enough,
    but slow where the hardware lacks it. torch.optim.Muon does the same, a matrix at a time.
    """

    def __init__(self, params, lr, weight_decay, momentum=0.95, dtype=torch.bfloat16):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            # One large product is faster than many small ones, so matrices of one shape go through
            # orthogonalize() together, some at a time.
            for params in split_by_shape(group["params"]):
                self.update(params, group)

    def update(self, params, group):
        """One step of some matrices of the same shape, (rows, cols) each."""
        updates = []
        for p in params:
            if p not in self.state:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            m = self.state[p]["momentum_buffer"]
            # a.lerp(b, w) is (1 - w) a + w b, so this is 0.95 m + 0.05 grad ...
            m.lerp_(p.grad, 1 - group["momentum"])
            # ... and so is this
            updates.append(p.grad.lerp(m, group["momentum"]).to(self.dtype))
        orthogonal = orthogonalize(torch.stack(updates))  # (n, rows, cols)
        # Stretches of 1 mean X X^T = 1: the rows of a wide matrix have length 1 now, so its numbers
        # have the size 1 / sqrt(cols). In a tall one the columns have length 1, and it is 1 /
        # sqrt(rows). Make it 0.2.
        orthogonal = orthogonal * (0.2 * math.sqrt(max(params[0].shape)))
        for p, update in zip(params, orthogonal, strict=True):
            # weight decay, as in AdamW, and the step
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(update, alpha=group["lr"])


def make_optimizers(model, optimizer="muon", learning_rate=4e-3, weight_decay=0.1,
                    dtype="float32"):
    """A list of optimizers, which together have every weight of the model once.

    With optimizer "adamw" it is AdamW alone. With "muon" AdamW is the first, and Muon the second
    has the matrices of the blocks. learning_rate: the default is tiny's. dtype: the precision of
    Muon's products.

    In memory a weight takes 4 bytes, its gradient 4, and AdamW's two averages 8 or Muon's one 4.
    For d24, with 330M weights, these are 4.2 GB.
    """
    matrices = []
    decayed = []
    vectors = []
    for name, p in model.named_parameters():
        if p.dim() < 2:
            vectors.append(p)
        elif optimizer != "adamw" and name.startswith("transformer.h."):
            matrices.append(p)
        else:
            decayed.append(p)
    groups = [
        # the tables, and without Muon also the matrices
        {"params": decayed, "weight_decay": weight_decay},
        # No decay for biases and gains: a bias is only added, and a gain belongs near 1, since at 0
        # its channel is off.
        {"params": vectors, "weight_decay": 0.0},
    ]
    # 0.9 and 0.95 are GPT-3's (https://arxiv.org/abs/2005.14165). With PyTorch's usual 0.999, v
    # would remember one unusual batch for 1000 steps. (fused: all weights in one go, for speed.)
    adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)
    if optimizer == "adamw":
        return [adamw]
    if optimizer == "muon":
        muon = Muon(matrices, learning_rate, weight_decay, dtype=getattr(torch, dtype))
        return [adamw, muon]
    raise ValueError(f"no optimizer is called {optimizer}")


def get_lr(step, num_iterations, learning_rate, warmup_iters=0, schedule="wsd"):
    r"""The learning rate of a step, out of num_iterations; learning_rate is the highest.

        wsd                        cosine
          ___                        _
         /   \                      / `.
        /      \                   /    `.
       /         \                /        `--.__
        warm up, stay, fall to 0   warm up, fall to a tenth

    Why warm up? At first the optimizers' averages rest on a few gradients, and full steps would go
    astray. (From a tenth, because a rate of 0 teaches nothing.) Why fall? Large steps jump to and
    fro across a valley of the loss, and only small ones get down into it. So two runs can only be
    compared at the end: on the way, the one whose rate is still high looks worse than it is. wsd
    means warm up, stable, decay (https://arxiv.org/abs/2404.06395). The fall takes the last 70 % of
    all steps, as in https://github.com/KellerJordan/modded-nanogpt, the speedrun.

    d12 reads ten billion tokens in 19,073 steps of 524,288. Its rates at some of them, by the two
    recipes that --recipe knows. today has 250 steps of warm-up, to 2.4e-3. original, with which
    this variant was first trained, has 715, to 1.2e-3:

        step                             0         125       10,000    19,072
        --recipe today      (wsd)        2.4e-4    1.3e-3    1.6e-3    1.8e-7
        --recipe original   (cosine)     1.2e-4    3.1e-4    6.5e-4    1.2e-4
    """
    rise = 1.0
    if step < warmup_iters:
        rise = 0.1 + 0.9 * step / warmup_iters
    if schedule == "cosine":
        progress = (step - warmup_iters) / max(1, num_iterations - warmup_iters)  # from 0 to 1
        fall = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * max(0.0, progress)))
    elif schedule == "wsd":
        remaining = (num_iterations - step) / num_iterations  # from 1 to 0
        fall = min(1.0, remaining / 0.7)
    else:
        raise ValueError(f"no schedule is called {schedule}")
    return learning_rate * min(rise, fall)


# -------------------------------------------------------------------------------------------------
# 5. Training

# In plain form, with all of the above, this is how a GPT is trained:
#
#     model = GPT(config)
#     optimizers = make_optimizers(model)
#     for step in range(num_iterations):
#         x, y = train_data.batch(step * B, B, device)    # a text, and the same shifted by one
#         loss = model(x, y)                              # how badly does it predict y?
#         loss.backward()                                 # the gradient of every weight
#         nn.utils.clip_grad_norm_(model.parameters(), 1.0)           # not too long a gradient
#         for optimizer in optimizers:
#             for group in optimizer.param_groups:
#                 group["lr"] = get_lr(step, num_iterations, learning_rate, warmup_iters)
#             optimizer.step()                            # each weight moves a little
#             optimizer.zero_grad()                       # forget the gradient
#
# You could train with these lines alone. All that train() has besides is there to be fast, to use
# several GPUs, to look at how it goes, and not to lose it.
#
# To be fast, it computes in bf16 where that is exact enough. A floating-point number has some bits
# for its exponent, which says how large it is, and some for its fraction, which holds its digits:
#
#              exponent  fraction   next to 1 comes
#     fp32        8         23      1.0000001
#     bf16        8          7      1.008
#
# What is in which of the two?
#
#     bf16     the products of matrices, which take most of the time (inside, they add up in fp32),
#              and the residual stream
#     fp32     what adds up many numbers in another way, the norms, every softmax and the loss;
#              RoPE; the weights, and the sum of their gradients over a step
#
# PyTorch's autocast sees to that: where a product meets fp32 weights, it takes copies in bf16. (Our
# own functions, RMSNorm and apply_rope(), do it themselves.)
#
# Why not keep the weights in bf16? They have a size of 0.02, and a step changes them by about
# 0.2 lr. At d12's highest rate, 2.4e-3, that is 0.0005, or 2.4 % of a weight. A thousand steps
# before the end it is 0.2 %. The next number in bf16 is 0.4 to 0.8 % further: the large steps would
# be rounded coarsely, and the small ones mostly away.

def train(args, signals=()):
    """One run, from the first line on the screen to the last. Returns whether it was stopped early.

    args: what parse_args() makes of the flags. signals: a list; as soon as there is something in
    it, the run ends after its step. (main() lets Ctrl-C and a scheduler's SIGTERM add to it.)
    """
    start_time = time.time()

    # ---- The machine. torchrun starts one process for each GPU, all with this same file. Each is
    # told its rank, its number among world_size processes. Without torchrun there is one, number 0.
    rank, world_size, device = start_processes(args.device)
    # dtype is "bfloat16" or "float32". Under `with autocast():` products are computed in it.
    dtype, autocast = pick_autocast(args.dtype, device)

    # ---- The data: a loader of text to learn from, and one of text to validate on.
    T = args.sequence_length
    train_data, val_data = open_data(args)
    num_val_sequences = max(1, min(args.val_tokens // T, val_data.total))
    # how this text became numbers, "bytes" or "gpt2": samples and checkpoints need it
    tokenizer = tokenizer_name(train_data.vocab_size)

    # ---- The model. Every process draws the same random numbers, and so has the same weights.
    config = make_config(args, train_data.vocab_size)
    torch.manual_seed(args.seed)
    # `with device:` makes it where it will live: a CPU is slow at a billion random numbers
    with device:
        model = GPT(config)
    # or OpenAI's weights instead of random ones
    if args.init_from and not args.resume:
        model = from_openai(args.init_from, T).to(device)
        require_same_config(model.config, config)
    # The one that is looked at: it is validated, writes the samples and goes into best.pt. Here it
    # is the one that learns. (It would be their average, in a run that averages
    # its weights.)
    eval_model = model

    # ---- The optimizers, and where the run stands. A resumed run takes all of it from last.pt.
    optimizers = make_optimizers(model, args.optimizer, args.learning_rate, args.weight_decay,
                                 dtype)
    first_step, val_loss, best_val_loss = 0, math.inf, math.inf
    if args.resume:
        first_step, val_loss, best_val_loss = load_run(args, model, optimizers, train_data)
    require_same_step(first_step, device)

    # ---- A step in pieces. Its batch, half a million tokens for d12, does not fit a GPU at once.
    # So it is cut into micro-batches of batch_size sequences, and a GPU takes one after the other.
    # With 80 GB it takes 64 of d12's 512 sequences at a time, in 8 micro-batches. With 16 GB it
    # could take 64 * 16 / 80 = 12.8. It takes 8, the next lower number that divides 512, in 64
    # micro-batches; two such GPUs share these, 32 each. How many micro-batches a GPU takes in a
    # step, here 8, 64 and 32, is called grad_accum_steps.
    compiled = can_compile(args.compile, device)
    batch_size = pick_batch_size(args, device, dtype, compiled, world_size)
    grad_accum_steps = args.total_batch_size // (batch_size * T * world_size)

    # ---- torch.compile reads the model's Python, and writes kernels (functions that run on the
    # GPU) that do several operations at once, so that results in between need not go to the GPU's
    # memory and back. It does so at the first call, which takes a minute, for the forward and the
    # backward pass; optimizers, samples and HellaSwag run as they are. dynamic=False: for one
    # shape (if validation ends with a smaller batch, that is compiled, too).
    if compiled:
        model.compile(dynamic=False)

    # ---- DDP, distributed data parallel, is how several GPUs train one model. Each has a copy of
    # it and its own part of the batch. At the end of backward() the gradients of all are averaged
    # (d12's are 466 MB, 4 bytes a weight), and every copy takes the same step. They are added up in
    # another order than on one GPU, so last digits differ. Nothing else does.
    ddp_model = model
    if world_size > 1:
        ddp_model = nn.parallel.DistributedDataParallel(model)

    # ---- The folder. From here on it is ours, as long as we hold the lock, and what an earlier run
    # left there is moved aside. The first lines on the screen say what this run is.
    folder, lock = claim_folder(args.output_dir, args.resume)
    print_header(args, config, model, train_data, batch_size, grad_accum_steps, world_size,
                 device, dtype, compiled, folder, first_step)

    def micro_batch(step, micro_step):
        """x and y, (batch_size, T) each: one of this process's micro-batches of a step."""
        if args.overfit_single_batch:
            # a test for a new model: can it learn one batch by heart?
            step = 0
        # Micro-batches are numbered through the whole run, and the processes take turns. Those of
        # two processes, if each takes three in a step:
        #
        #                    step 0        step 1
        #     process 0      0  2  4       6  8 10
        #     process 1      1  3  5       7  9 11
        number = (step * grad_accum_steps + micro_step) * world_size + rank
        return train_data.batch(number * batch_size, batch_size, device)

    def save(name, some_model, steps):
        """Writes a model that has had so many steps. Returns whether the disk had room for it.

        (Every process calls this, and process 0 alone writes: all have the same weights. So with
        what is printed, and main.log.)
        """
        state = {"config": asdict(config), "model": some_model.state_dict(), "step": steps,
                 "tokenizer": tokenizer, "val_loss": val_loss}
        if name == "last.pt":
            # What a resumed run needs besides. (Which data comes next needs no entry: it follows
            # from the seed and the step, as long as there are as many sequences.)
            state["optimizer"] = [optimizer.state_dict() for optimizer in optimizers]
            state |= {"best_val_loss": best_val_loss, "args": vars(args),
                      "sequences": train_data.total}
        return save_checkpoint(folder / name, state)

    saved = True
    stopped = False
    seconds = []  # how long each step took, since the last line on the screen

    # ---- The training loop. It has one round more than there are steps, which only looks at the
    # final weights. So the top of round `step` sees a model that has had `step` steps.
    for step in range(first_step, args.num_iterations + 1):
        last = step == args.num_iterations

        # Once in a while: how good is it on text that it does not learn from? Step 0 shows an
        # untrained model, whose loss should be about ln V. (main.log has llm.c's words for numbers:
        # tel is the validation loss, trl the training loss, eval HellaSwag's score.)
        if last or is_due(step, args.val_loss_every):
            # eval() and train() make no difference yet: they are for those who add dropout
            eval_model.eval()
            val_loss = evaluate(eval_model, val_data, num_val_sequences, batch_size, autocast)
            print0(f"step {step:5d}/{args.num_iterations} | val loss {val_loss:.6f}")
            write_log(folder, step, tel=val_loss)
            # a nan ends the run here, before it is saved over the last good weights
            require_finite(f"validation loss of step {step}", val_loss, folder)
            # Save, so that a crash costs little: best.pt, the weights with the lowest validation
            # loss, and last.pt, to go on from. (At step 0 there is nothing to save yet, and just
            # after resuming last.pt is there already.)
            if step > 0 and val_loss < best_val_loss:
                if save("best.pt", eval_model, step):
                    best_val_loss = val_loss
            if step > first_step or last:
                saved = save("last.pt", model, step)
            # Read what it writes: no loss tells you that it only repeats itself.
            show_sample(eval_model, tokenizer, args, step)

        # And HellaSwag, questions with four answers to choose from: what share is right?
        if args.hellaswag_every > 0 and (last or is_due(step, args.hellaswag_every)):
            eval_model.eval()
            score = score_hellaswag(eval_model, tokenizer, autocast)
            print0(f"step {step:5d}/{args.num_iterations} | HellaSwag {score:.6f}")
            write_log(folder, step, eval=score)

        if last:
            break

        # Forward and backward. The micro-batches run one after the other, and their gradients add
        # up in p.grad.
        t0 = time.time()
        model.train()
        loss_sum = torch.zeros((), device=device)
        for micro_step in range(grad_accum_steps):
            x, y = micro_batch(step, micro_step)
            # A switch of DDP's: gradients meet only once a step, in the last micro-batch.
            if world_size > 1:
                ddp_model.require_backward_grad_sync = (micro_step == grad_accum_steps - 1)
            with autocast():
                loss = ddp_model(x, y)
            # The loss is a mean over the micro-batch, and what we want is the mean over all of
            # them. But backward() only adds: without this division the gradient of 8 micro-batches
            # would be 8 times too long. Nobody would notice, as the optimizers ignore a factor
            # that all steps share. But clipping, below, would act in every step.
            loss = loss / grad_accum_steps
            # detach() takes the number, without the graph of operations that made it
            loss_sum += loss.detach()
            loss.backward()

        # Clip: if the gradients of all weights, taken as one long vector, are longer than 1, scale
        # them to length 1. At first most are longer, and so all of these count alike in the
        # optimizers' averages. Later it is an insurance: one odd batch may have a gradient many
        # times as long, and would fill the averages with itself for ten or twenty steps. (What the
        # two are worth with tiny: experiments 11 and 8 of the lab.) norm is the length before; with
        # --grad_clip 0 nothing is clipped.
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)

        # The step itself. (A group of parameters may have an "lr_scale", to get a multiple of the
        # rate. Here none has.)
        lr = get_lr(step, args.num_iterations, args.learning_rate, args.warmup_iters, args.schedule)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            optimizer.step()
            # Forget the gradients, or the next ones would be added to them.
            optimizer.zero_grad()

        # Python runs ahead of a GPU, which works through a queue of kernels. .item() waits until
        # all of it is done, and only then does the clock show how long a step takes. So it stands
        # here, once a step. (A print(loss) in the loop above would wait in each micro-batch.)
        loss_here = loss_sum.item()
        # All processes learn what the loss is, which is the mean of theirs, and how many signals
        # have come: if one of them was asked to stop, all of them stop, at the same step.
        loss_of_all, num_signals = all_sum([loss_here, len(signals)], device)
        train_loss = loss_of_all / world_size
        seconds.append(time.time() - t0)
        # A nan in the weights would stay there for ever: end the run. Nothing of it is saved yet.
        require_finite(f"loss of step {step}", train_loss, folder)
        require_finite(f"gradient norm of step {step}", norm.item(), folder)

        # Say how it goes. (The first step has a line of its own, because it is slow.)
        if step == first_step:
            print0(f"first step done {time.time() - start_time:.1f} s after the start")
        if step == first_step or step + 1 == args.num_iterations or is_due(step, args.log_every):
            ms = 1000 * sum(seconds) / len(seconds)
            seconds = []
            print_step(args, step, train_loss, lr, norm, ms, model, world_size, device)
            write_log(folder, step, trl=train_loss, lr=lr, norm=norm.item(), ms=ms)

        # Was it asked to stop? Then save and go, without validating first: a scheduler that wants
        # its machine back waits for half a minute, and then kills.
        if num_signals > 0:
            saved = save("last.pt", model, step + 1)
            stopped = True
            break

    print_end(args, step, stopped, saved, best_val_loss, time.time() - start_time, tokenizer,
              device)
    return stopped


# =================================================================================================
# PART II: WHAT PART I CALLS

# From here on nothing is about how a GPT learns: you can stop reading. To change something:
#     a property of the model     a field of GPTConfig, and a flag of its name in make_parser(). Old
#                                 checkpoints get the field's default: let that be the old way
#     one of training             a flag; it is stored and resumed. What forward() needs of it (a
#                                 dropout) is set on the model in train(), after from_openai(). If
#                                 it is random, torch.manual_seed(args.seed + step * world_size +
#                                 rank) after model.train(), or resumed runs draw other numbers
#     an average of the weights   eval_model in train(); compiled too, saved in save(), and loaded
#                                 in load_run()
#     an optimizer                a name for --optimizer, and who gets `matrices` at the end of
#                                 make_optimizers(); self.state[p] is resumed; for another rate its
#                                 group has an "lr_scale" (its weight decay is scaled with it)
#     a tokenizer                 a row of TOKENIZERS, and its loader in load_tokenizer()
#     a corpus                    shards: fineweb.py makes them, of any text

# -------------------------------------------------------------------------------------------------
# 6. The machine: what it takes to be fast, and to run on any

def head_loss(x, weight, targets, vocab_size):
    """The mean cross-entropy of section 2, computed for a slice of the tokens at a time.

    Features x (N, C), the weight of lm_head (padded V, C), targets (N,) and the number of real ids
    -> a scalar, nats a token. To try another loss, with memory to spare, begin with these lines:

        logits = F.linear(x, weight)[:, :vocab_size].float()
        loss = F.cross_entropy(logits, targets)
        if torch.is_grad_enabled():     # not while validating, which has to stay comparable
            loss = loss + 1e-4 * logits.logsumexp(dim=-1).square().mean()
        return loss

    (The training loss on the screen then has it, too.) PyTorch 2.13 has F.linear_cross_entropy for
    the same purpose as ours. In bf16 on a CPU it took 5.6 times as long, and rounded its loss to
    bf16.
    """
    # inside an autograd.Function this could not be asked
    need_gradient = torch.is_grad_enabled()
    return HeadLoss.apply(x, weight, targets, vocab_size, need_gradient)


# Tokens in a slice. More fill a GPU better, fewer take less memory: with 4 bytes for a logit in
# fp32 and 2 in bf16, 16,384 * 50,304 * 6 bytes = 5 GB at most.
HEAD_ROWS = 16384


class HeadLoss(torch.autograd.Function):
    """head_loss(). An autograd.Function brings its own backward(): here forward() has computed the
    gradients already, and keeps them in ctx, and backward() only has to scale them."""

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, need_gradient):
        if need_gradient:
            dx = torch.empty_like(x)
            # fp32 like the weight, because the gradients of all slices add up in it
            dw = torch.zeros_like(weight)
        # in the precision of x, which is bf16 under autocast: cast once, and not in every slice
        weight = weight.to(x.dtype)
        # A list, because torch.compile would compute the logits of all slices first, and keep them,
        # if the losses were added up here.
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
                # The gradient of the logits: p, written over log p to save memory, ...
                dlogits = log_p.exp_().to(x.dtype)
                # ... and p - 1 at the target. bf16 would round a p of 0.999 to 1, and leave no
                # gradient: so compute p - 1 in fp32, which is expm1(log p), and round that.
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
        # dx and dw belong to the sum of the losses, and the loss is their mean. grad is the
        # derivative of what backward() was called on by this loss: 1, or less where train() has
        # divided the loss.
        scale = grad / ctx.num_tokens
        # one gradient for each input of forward(); the last three need none
        return dx * scale, dw * scale, None, None, None


def flash_attention(q, k, v):
    """causal_attention(), with the kernel that the device has for it. The same shapes."""
    if q.size(2) != k.size(2):
        # is_causal counts from the first key: the one query behind a cache would see that key only
        raise ValueError(f"{q.size(2)} queries for {k.size(2)} keys: this would need another mask")
    if q.device.type == "cpu":
        # a CPU is faster at it in fp32 (tiny's: 5 ms instead of 13, on an AMD Zen 4)
        q, k, v = q.float(), k.float(), v.float()
    if q.device.type == "cuda" and q.dtype == torch.float32:
        # for shared heads in fp32 a GPU has no such kernel: each query head gets its own copy
        k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
        v = v.repeat_interleave(q.size(1) // v.size(1), dim=1)
    grouped = q.size(1) != k.size(1)
    # autocast would turn the fp32 q, k and v of a CPU into bf16 again: switch it off
    with torch.autocast(q.device.type, enabled=False):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


def compute_dtype(x):
    """What autocast computes in where x is, or without autocast the dtype of x itself."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def split_by_shape(params):
    """Lists of up to 16 matrices of the same shape each; those without a gradient are left out.

    Not more than 16, because all matrices of a large model together would take gigabytes.
    """
    same_shape = {}
    for p in params:
        if p.grad is not None:
            same_shape.setdefault(p.shape, []).append(p)
    for equal in same_shape.values():
        for start in range(0, len(equal), 16):
            yield equal[start : start + 16]


def pick_device(name=None, local_rank=0):
    """The torch.device to run on: the one that is named, else the first of cuda, mps and cpu."""
    if name is None:
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else name
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)


def start_processes(device_name):
    """Returns this process's rank, how many there are (world_size), and its device.

    If torchrun started it, it joins the others. If not, it is alone.
    """
    rank, local_rank, world_size = 0, 0, 1
    if dist.is_torchelastic_launched():
        names = "RANK", "LOCAL_RANK", "WORLD_SIZE"
        rank, local_rank, world_size = (int(os.environ[name]) for name in names)
    device = pick_device(device_name, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # Matrix products that are still fp32 may round their inputs to TF32, which has 3 digits:
        # several times as fast.
        torch.set_float32_matmul_precision("high")
    if world_size > 1:
        # NCCL connects GPUs, gloo connects CPUs. A process waits an hour for the others before it
        # gives up: process 0 may be writing a large checkpoint to a slow disk.
        backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        hour = datetime.timedelta(hours=1)
        dist.init_process_group(backend, timeout=hour, device_id=device_id)
    return rank, world_size, device


def this_process():
    """Its rank, and the number of processes: 0 and 1, unless torchrun started several."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_first_process():
    """Whether this is process 0, the one that prints and writes."""
    return this_process()[0] == 0


def print0(text):
    """Prints, but in process 0 only: eight processes would say everything eight times."""
    if is_first_process():
        # a terminal that is gone, or a full disk behind it, is no reason to lose the run
        with contextlib.suppress(OSError):
            print(text, flush=True)


def all_sum(values, device):
    """The sum over all processes of a list of numbers, element by element."""
    if not dist.is_initialized():
        return values
    values = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return values.tolist()


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


def can_compile(wanted, device):
    """Whether the model is compiled: as --compile says, else on a GPU, if Triton is there."""
    if wanted is not None:
        return wanted
    if device.type != "cuda":
        return False
    if importlib.util.find_spec("triton") is None:
        print0("NOTE: not compiled, because the package triton is missing")
        return False
    return True


# How many sequences of 1024 tokens a GPU with 80 GB takes at a time (calculated, not tried).
FITS = {"tiny": 64, "d12": 64, "d24": 32, "d36": 16, "d48": 8}


def pick_batch_size(args, device, dtype, compiled, world_size=1):
    """Sequences at a time: --batch_size, else the most that fit and divide a process's share."""
    unit = (args.batch_size or 1) * args.sequence_length * world_size
    if args.total_batch_size % unit:
        sys.exit(f"error: --total_batch_size {args.total_batch_size} must be a multiple of {unit}, "
                 f"which is --batch_size x --sequence_length x processes")
    if args.batch_size:
        return args.batch_size
    # on a CPU, enough tokens to keep it busy
    fitting = 4096 // args.sequence_length
    if device.type == "cuda":
        share = torch.cuda.get_device_properties(device).total_memory / 80e9
        fitting = FITS[args.model] * share * 1024 / args.sequence_length
        # fp32 takes twice the memory, and so does a model that is not compiled
        if dtype == "float32" or not compiled:
            fitting /= 2
    sequences = args.total_batch_size // unit
    return max(n for n in range(1, sequences + 1) if sequences % n == 0 and n <= max(1, fitting))


def flops_per_token(model):
    """Floating point operations to train on one token of a sequence as long as block_size.

    Forward, each weight takes a multiplication and an addition. Backward, it takes as many for the
    gradient of the weight, and again for that of its input: 6 in all. (The tied table works as
    lm_head. A second one would have to be left out: looking up a row costs nothing.) In each layer
    q k^T and the mean of values take 4 C T more forward, 12 C T in all (PaLM,
    https://arxiv.org/abs/2204.02311, appendix B, which counts the hidden future as well). For d12
    that is 6 * 116.5M + 12 * 12 * 768 * 1024 = 812 million, and 4.26e14 for a step of half a
    million tokens. At 40 % of an H100's peak, 989e12 a second, such a step takes 1.08 seconds.
    """
    c = model.config
    num_weights = sum(p.numel() for name, p in model.named_parameters() if "wpe" not in name)
    return 6 * num_weights + 12 * c.n_layer * c.n_embd * c.block_size


# How many operations a second a GPU can do in bf16, from its data sheet. The first name that occurs
# in the card's counts.
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12}
PEAK_FLOPS |= {"H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12, "3090": 71e12}


def card_name(device):
    """A GPU's name, as its maker writes it, else the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.lru_cache(maxsize=4)
def permutation(n, *key):
    """The numbers 0 ... n - 1 in a random order. It is the same each time for the same key.

    The loader asks for it once for each sequence, so the last few are kept: one for the shards, one
    for the rows of the shard at hand, and two more for an epoch that ends in a batch. (NumPy does
    not promise the same order in all its versions: go on with the one that a run was begun with.)
    """
    return np.random.default_rng(key).permutation(n)


def check_ids(ids, vocab_size, path):
    """Ends the run at an id that does not exist. A GPU would stop, and not say why."""
    if ids.max() >= vocab_size:
        sys.exit(f"error: {path} holds id {ids.max()}, but its vocabulary has {vocab_size}: make "
                 f"it again with fineweb.py")


def to_device(tensor, device):
    """A copy on the device."""
    if torch.device(device).type == "cuda":
        # from pinned memory, which the system may not move, the copy runs beside the GPU's work
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def open_data(args):
    """Two TokenLoaders: the shards to train on, and those to validate on."""
    pattern = args.input_bin or fineweb.stdlib_corpus()
    folder_and_name = pattern.rpartition("_train_")[0]
    T = args.sequence_length
    train_data = TokenLoader(pattern, T, args.seed)
    val_data = TokenLoader(f"{folder_and_name}_val_*.bin", T)
    for data, needed in (train_data, args.total_batch_size // T), (val_data, 1):
        if data.total < needed:
            sys.exit(f"error: {data.paths[0]}: {data.total} sequences of {T} tokens, {needed} are "
                     f"needed: a smaller --total_batch_size or --sequence_length, or more text")
        if data.vocab_size != train_data.vocab_size:
            sys.exit(f"error: {data.paths[0]} has {data.vocab_size} ids, and those to train on "
                     f"{train_data.vocab_size}: make both with the same tokenizer")
    return train_data, val_data


# -------------------------------------------------------------------------------------------------
# 7. A run: what it says, what it keeps, how it stops and goes on

def complete_config(config):
    """Chooses n_kv_head where it is None, and raises a ValueError if this can be no model."""
    if config.n_kv_head is None:
        # two query heads share one, if they come in pairs (d48's 25 do not)
        config.n_kv_head = config.n_head // 2 if config.n_head % 2 == 0 else config.n_head
    # a head's width must be even, because rotary positions rotate pairs of numbers
    if config.n_embd % (2 * config.n_head) or config.n_head % config.n_kv_head:
        raise ValueError(f"n_embd must be a multiple of 2 n_head, and n_head one of n_kv_head, but "
                         f"this is {config}")
    for switch, names in SWITCHES.items():
        if getattr(config, switch) not in names:
            raise ValueError(f"{switch} must be one of {names}, but this is {config}")


def make_config(args, vocab_size):
    """The GPTConfig that the flags ask for. Each of its fields has a flag of the same name, but for
    block_size, which is --sequence_length, and vocab_size, which the data knows."""
    others = {"block_size": args.sequence_length, "vocab_size": vocab_size}
    fields = {name: getattr(args, name) for name in asdict(GPTConfig()) if name not in others}
    try:
        return GPTConfig(**fields, **others)
    except ValueError as e:
        sys.exit(f"error: {e}")


def require_same_config(trained, wanted):
    """Ends the run if weights of one shape are to go on as a model of another."""
    if trained != wanted:
        sys.exit(f"error: the weights are those of a {trained}, and flags and data ask for a "
                 f"{wanted}: change these, or begin a new run")


def require_finite(what, value, folder):
    """Ends the run if value is nan or infinite: no later step repairs that."""
    if not math.isfinite(value):
        sys.exit(f"error: the {what} is {value}: go on from {folder}/last.pt if it exists, with a "
                 f"lower --learning_rate")


def require_same_step(first_step, device):
    """Ends the run if processes are at different steps, as on two machines with one last.pt."""
    steps, squares = all_sum([first_step, first_step**2], device)
    _, world_size = this_process()
    if world_size * squares != steps**2:
        sys.exit(f"error: this process is at step {first_step}, and another one is not: copy "
                 f"last.pt to every machine, into the same --output_dir")


def is_due(step, every):
    """Whether what is done every so many steps is done at this one; 0 is never."""
    return every > 0 and step % every == 0


def save_checkpoint(path, state):
    """Writes state so that at any moment path holds one whole checkpoint, the old or the new one.

    Returns whether it is the new one. If the disk is full, the old one stays and training goes on.
    Only process 0 writes.
    """
    if not is_first_process():
        return True
    path = Path(path)
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
    """What save_checkpoint() wrote, a dictionary."""
    try:
        # weights_only: it holds data, and may come from anybody; never run code out of it.
        # mmap: a weight is read when it is used, so a process does not hold all of it twice.
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as e:  # a dozen kinds, and all mean the same to the user
        reason = str(e).split("\n")[0]
        sys.exit(f"error: {path} is no checkpoint that can be read ({type(e).__name__}: {reason}): "
                 f"take a best.pt or last.pt, as a run writes them")


def load_run(args, model, optimizers, train_data):
    """Puts last.pt into them. Returns its step, and its last and its lowest validation loss."""
    last = Path(args.output_dir, "last.pt")
    checkpoint = read_checkpoint(last)
    if checkpoint["step"] > args.num_iterations:
        sys.exit(f"error: {last} has {checkpoint['step']} steps behind it: a larger "
                 f"--num_iterations than {args.num_iterations}")
    # (a checkpoint of before this was stored has no such entry)
    if checkpoint.get("sequences", train_data.total) != train_data.total:
        print0("NOTE: there is more or less training data than before, and so its order is another "
               "one: some of it will be read twice, and some not at all")
    require_same_config(GPTConfig(**checkpoint["config"]), model.config)
    model.load_state_dict(checkpoint["model"])
    for optimizer, stored in zip(optimizers, checkpoint["optimizer"], strict=True):
        # Only the averages: the settings, such as weight decay, are those of the flags. And a copy:
        # what was mapped is the file itself, which will be replaced.
        averages = copy.deepcopy(stored["state"])
        optimizer.load_state_dict(optimizer.state_dict() | {"state": averages})
        # and what the optimizer itself has written into its groups, such as a count of its steps
        for group, before in zip(optimizer.param_groups, stored["param_groups"], strict=True):
            group |= {name: before[name] for name in before.keys() - group.keys()}
    return checkpoint["step"], checkpoint["val_loss"], checkpoint["best_val_loss"]


def claim_folder(name, resume):
    """Makes the folder of a run, and keeps other runs out of it. Returns it, and the lock.

    The lock holds as long as somebody has it. What an earlier run left in the folder moves with it
    to NAME.1, or the next number that is free, unless this run goes on from there.
    """
    folder = Path(name)
    if not is_first_process():
        return folder, None
    # if it is a link to a larger disk, all of this happens there
    home = folder.resolve()
    home.parent.mkdir(parents=True, exist_ok=True)
    # singleton: a notebook in which a run has failed may begin another one
    lock = filelock.FileLock(f"{home}.lock", is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        sys.exit(f"error: a run is at work in {folder}: choose another --output_dir, or wait")
    except OSError as e:  # some network disks have no locks, and some folders take no file
        print0(f"NOTE: no lock for {folder} ({e.strerror}): begin no second run in it")
    if not resume and (any(home.glob("main.log")) or any(home.glob("*.pt"))):
        number = 1
        while os.path.lexists(f"{home}.{number}"):
            number += 1
        try:
            if Path.cwd().is_relative_to(home):
                raise OSError(errno.EBUSY, "you are in it")
            home.rename(f"{home}.{number}")
        except OSError as e:  # it may be where a disk is mounted
            sys.exit(f"error: the earlier run in {folder} cannot be moved to {home}.{number} "
                     f"({e.strerror}): choose a folder inside it as --output_dir")
        print0(f"kept the earlier run in {folder} as {home}.{number}")
    home.mkdir(exist_ok=True)
    return folder, lock


def write_log(folder, step, **values):
    """Appends a line to main.log, in llm.c's form: s:250 tel:6.171

    s is the step, trl the training loss, tel the validation loss, eval HellaSwag's score. Whoever
    wants the numbers elsewhere (in a CSV, in W&B) finds all of them here. After a crash the steps
    since last.pt are done again, and written again: the later line counts.
    """
    if not is_first_process():
        return
    words = [f"s:{step}"]
    for name, value in values.items():
        words.append(f"{name}:{value}" if isinstance(value, str) else f"{name}:{value:.8g}")
    try:
        with open(folder / "main.log", "a", encoding="utf-8") as f:
            f.write(" ".join(words) + "\n")
    except OSError as e:  # a full disk is no reason to lose the run
        print0(f"WARNING: cannot write main.log ({e})")


def print_header(args, config, model, train_data, batch_size, grad_accum_steps, world_size, device,
                 dtype, compiled, folder, first_step):
    """The command, to the screen and to main.log, and what it means here."""
    print0(args.command)
    write_log(folder, first_step, command=args.command)
    num_params = sum(p.numel() for p in model.parameters())
    how = f"{dtype}, compiled" if compiled else dtype
    print0(f"model {args.model}: {config.n_layer} layers, {config.n_head} heads "
           f"({config.n_kv_head} key/value), {config.n_embd} wide | {num_params:,} parameters | "
           f"{flops_per_token(model) / 1e6:,.1f} MFLOP a token\n"
           f"device {card_name(device)}, {how} | {args.total_batch_size:,} tokens a step = "
           f"{batch_size} sequences x {args.sequence_length} tokens x {grad_accum_steps} "
           f"micro-batches x {world_size} processes\n"
           f"data {Path(train_data.paths[0]).parent}: {train_data.total * train_data.T:,} tokens "
           f"an epoch, {args.num_iterations * args.total_batch_size:,} in this run")
    if first_step:
        print0(f"resuming {folder} at step {first_step}")
    if device.type == "cpu" and args.device is None and args.model != "tiny":
        print0("NOTE: PyTorch sees no GPU, and a CPU takes minutes for one step of such a model")


def print_step(args, step, train_loss, lr, norm, ms, model, world_size, device):
    """A step's line on the screen. ms: what a step took, a mean over those since the last line.

    MFU (model FLOPs utilization) is the share of the card's peak that the run uses; 40 to 60 % is
    good. It is left out if the card is not in PEAK_FLOPS.
    """
    tokens_per_second = 1000 * args.total_batch_size / ms
    mfu = ""
    for name, peak in PEAK_FLOPS.items():
        if name in card_name(device):
            mfu = f" | MFU {tokens_per_second * flops_per_token(model) / world_size / peak:.1%}"
            break
    minutes_left = ms * (args.num_iterations - step - 1) / 60_000
    print0(f"step {step:5d}/{args.num_iterations} | loss {train_loss:.6f} | lr {lr:.2e} | "
           f"norm {norm:.4f} | {ms:.1f} ms | {tokens_per_second:,.0f} tok/s{mfu} | "
           f"{minutes_left:.1f} min left")


def print_end(args, step, stopped, saved, best_val_loss, seconds, tokenizer, device):
    """The last words of a run: how long it took, the lowest loss, and what to type next."""
    resume = f"train_gpt2.py --resume --output_dir {shlex.quote(args.output_dir)}"
    if not saved:
        sys.exit(f"error: the steps since last.pt are lost: make room on the disk, then python "
                 f"{resume}")
    if device.type == "cuda":
        print0(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    if stopped:
        print0(f"stopped after {step + 1} steps, and all is saved. To go on, start it as before, "
               f"but with\n    python {resume}")
        return
    # a run without a single step has no best.pt
    name = "best.pt" if math.isfinite(best_val_loss) else "last.pt"
    best = shlex.quote(str(Path(args.output_dir, name)))
    print0(f"done in {seconds:.0f} s. Lowest validation loss, {best_val_loss:.4f}: {best}")
    use = f"hellaswag.py -m {best}" if tokenizer == "gpt2" else f"train_gpt2.py --sample {best}"
    print0(f"Next:\n    python {use}")


@contextlib.contextmanager
def stop_signals():
    """A list of the signals that have come. Inside, Ctrl-C and SIGTERM do nothing but add to it."""
    signals = []
    usual = {}

    def note(number, frame):
        signals.append(number)
        if number == signal.SIGINT:
            # a second Ctrl-C does what it usually does: it ends the program at once
            signal.signal(number, usual[number])
        # not print(): the signal may have come in the middle of another print(). And whoever read
        # our output may be gone (Ctrl-C also ends the tee behind a pipe).
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")

    for number in signal.SIGINT, signal.SIGTERM:
        usual[number] = signal.signal(number, note)
    try:
        yield signals
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


# -------------------------------------------------------------------------------------------------
# 8. A trained model

# This works in a notebook as well, after `from train_gpt2 import *`:
#
#     model, tokenizer = load_model("logtiny/best.pt", "cpu")
#     print(sample(model, tokenizer, "def "))
#     evaluate(model, TokenLoader("stdlib_py*/stdlib_val_*.bin", T=128), num_sequences=100)

def load_model(name, device):
    """A model to look at, and its tokenizer's name.

    name: the path of a checkpoint, or one of OPENAI_MODELS.
    """
    if name in OPENAI_MODELS:
        return from_openai(name).to(device).eval(), "gpt2"
    checkpoint = read_checkpoint(name)
    model = GPT(GPTConfig(**checkpoint["config"])).to(device)
    model.load_state_dict(checkpoint["model"])
    return model.eval(), checkpoint["tokenizer"]


# For each tokenizer: how many ids it has, which of them marks the end of a text (and so the
# beginning of the next; None if there is no such id), and what samples begin with. Shards know the
# number of ids only, so no two may have the same.
TOKENIZERS = {
    "bytes": (fineweb.VOCAB_SIZE["bytes"], 256, "def "),
    "gpt2": (fineweb.VOCAB_SIZE["gpt2"], 50256, "Hello, I'm a language model,"),
}


def tokenizer_name(vocab_size):
    """The name of the tokenizer that has so many ids."""
    for name, (size, _, _) in TOKENIZERS.items():
        if size == vocab_size:
            return name
    sys.exit(f"error: the shards have a vocabulary of {vocab_size} ids, and no tokenizer has so "
             f"many: add yours to TOKENIZERS and load_tokenizer() in train_gpt2.py")


def load_tokenizer(name):
    """Returns encode: text -> list of ids, and decode: list of ids -> text.

    "bytes": each byte is its own id. "gpt2": fineweb.py tells how its 50,256 pieces were found.
    """
    if name == "bytes":
        return lambda text: list(text.encode()), lambda ids: bytes(ids).decode(errors="replace")
    if name == "gpt2":
        bpe = fineweb.gpt2_tokenizer()
        return bpe.encode_ordinary, bpe.decode
    raise ValueError(f"no tokenizer is called {name}: there are {', '.join(TOKENIZERS)}")


@torch.no_grad()
def generate(model, ids, max_new_tokens, temperature=0.8, top_k=50, generator=None, end=None):
    """Yields up to max_new_tokens ids that continue the list ids; stops before the id `end`.

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
        if token.item() == end:
            return
        yield token.item()
        x = torch.cat((x, token), dim=1)


def sample(model, tokenizer, prompt=None, seed=0, max_new_tokens=200, **options):
    """Returns the prompt and what the model makes of it, a text.

    tokenizer: its name, as load_model() returns it. options: temperature and top_k of generate().
    """
    encode, decode = load_tokenizer(tokenizer)
    _, end, usual_prompt = TOKENIZERS[tokenizer]
    if prompt is None:
        prompt = usual_prompt
    # In training every text begins with <|endoftext|>, if there is such an id: so does this one.
    ids = [] if end is None else [end]
    ids += encode(prompt.removeprefix("<|endoftext|>"))
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(seed)
    new_ids = generate(model, ids, max_new_tokens, generator=generator, end=end, **options)
    return prompt + decode(list(new_ids))


def show_sample(model, tokenizer, args, step):
    """A sample for the screen of a run, from process 0."""
    if not is_first_process():
        return
    try:
        load_tokenizer(tokenizer)
    except OSError as e:  # no reason not to train
        print0(f"no sample: {e}")
        return
    # not compiled: it would be compiled anew for each length of the text
    with torch.compiler.set_stance("force_eager"):
        text = sample(model, tokenizer, args.prompt, args.seed + step, args.max_new_tokens,
                      temperature=args.temperature, top_k=args.top_k)
    print0(f"--- a sample after {step} steps\n{text}\n---")


def score_hellaswag(model, tokenizer, autocast):
    """The share of HellaSwag's questions that the model answers right; guessing gets 0.25.

    With 8 processes each asks every eighth question.
    """
    encode, _ = load_tokenizer(tokenizer)
    rank, world_size = this_process()
    items = []
    for question in hellaswag.load_questions()[rank::world_size]:
        items.append(hellaswag.encode_question(question, encode, model.config.block_size))
    logp = hellaswag.log_probs(model, items, autocast)
    _, right = hellaswag.right_answers(logp, items)
    right, asked = all_sum([right, len(items)], next(model.parameters()).device)
    return right / asked


# The shapes of OpenAI's models. (The way out, to Hugging Face's transformers, is report/export.py.)
OPENAI_MODELS = {"gpt2": "d12", "gpt2-medium": "d24", "gpt2-large": "d36", "gpt2-xl": "d48"}
# every switch as in 2019, in GPTConfig's words
GPT2 = dict(norm="layernorm", mlp="gelu", pos="learned", bias=True, qk_norm=False)


@torch.no_grad()
def from_openai(name, block_size=1024):
    """OpenAI's gpt2, gpt2-medium, gpt2-large or gpt2-xl as a GPT, in fp32 on the CPU.

    block_size: the longest sequence, at most the 1024 positions that OpenAI's models have learned.
    The weights are downloaded once. A folder openai-community/NAME, where you are, is taken first.
    """
    import transformers  # here, because nothing else needs it

    theirs = transformers.GPT2LMHeadModel.from_pretrained(f"openai-community/{name}")
    c = theirs.config
    if block_size > c.n_positions:
        sys.exit(f"error: {name} has {c.n_positions} positions: use a smaller --sequence_length")
    shape = dict(n_layer=c.n_layer, n_head=c.n_head, n_kv_head=c.n_head, n_embd=c.n_embd)
    model = GPT(GPTConfig(block_size=block_size, vocab_size=c.vocab_size, **shape, **GPT2))
    ours = model.state_dict()
    for their_name, w in theirs.state_dict().items():
        # Names are the same, but their linear layers are stored as (in, out), the transpose of
        # ours, and queries, keys and values are one matrix, c_attn.
        if their_name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            w = w.T
        names = [their_name]
        if "c_attn" in their_name:
            names = [their_name.replace("c_attn", part) for part in ("c_q", "c_k", "c_v")]
        for our_name, piece in zip(names, w.chunk(len(names)), strict=True):
            # ours has more rows where it pads the table, and fewer where it needs fewer positions
            rows = min(len(piece), len(ours[our_name]))
            ours[our_name][:rows] = piece[:rows]
    return model


# -------------------------------------------------------------------------------------------------
# 9. The command line

# The learning rates of d12 to d48 are four times those of GPT-3's models of these sizes (6e-4 to
# 2e-4, table 2.1 of https://arxiv.org/abs/2005.14165), because training stays stable at such rates
# with Muon and QK-norm. Only small models have been tried (report/README.md), so take them as a
# guess: half as much or twice as much may be better. The folders are named after GPT-2's models.
PRESETS = {
    "tiny": dict(n_layer=4, n_head=4, n_embd=128, learning_rate=4e-3, output_dir="logtiny"),
    "d12": dict(n_layer=12, n_head=12, n_embd=768, learning_rate=2.4e-3, output_dir="log124M"),
    "d24": dict(n_layer=24, n_head=16, n_embd=1024, learning_rate=1.2e-3, output_dir="log350M"),
    "d36": dict(n_layer=36, n_head=20, n_embd=1280, learning_rate=1e-3, output_dir="log774M"),
    "d48": dict(n_layer=48, n_head=25, n_embd=1600, learning_rate=8e-4, output_dir="log1558M"),
}
# tiny trains for a minute, on bytes; input_bin "" stands for the source of the standard library
PRESETS["tiny"] |= dict(
    input_bin="", sequence_length=128, total_batch_size=2048, num_iterations=600, warmup_iters=20,
    val_loss_every=200, log_every=20, compile=False,
)
# --recipe original: how this variant was first trained, at half the learning rate
# (https://github.com/Morris88826/CSCE-689-HW2, the course work that this project follows)
ORIGINAL = dict(optimizer="adamw", schedule="cosine", warmup_iters=715, qk_norm=False)
# --init_from: finetuning wants small steps, as the weights are good already. The rate is nanoGPT's
# (there it stays the same all the time; ours falls).
FINETUNE = dict(optimizer="adamw", learning_rate=3e-5, warmup_iters=0, total_batch_size=32768)


def between(kind, low, high=math.inf):
    """An argparse type: a number of this kind, int or float, from low to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in the range from {low} to {high}")
        return value

    parse.__name__ = kind.__name__  # what argparse calls it, if it is no number at all
    return parse


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
    count = between(int, 0)
    positive = between(int, 1)

    # The model, and each number and switch of GPTConfig.
    add("--model", choices=PRESETS, help="the size: one of PRESETS; default: tiny")
    add("--arch", choices=["variant", "gpt2"], default="variant", help="gpt2: all switches back")
    for number in "n_layer", "n_head", "n_kv_head", "n_embd":
        add(f"--{number}", type=positive, help="default: the preset's")
    for switch, names in SWITCHES.items():
        add(f"--{switch}", choices=names, default=names[0])
    add("--bias", action=on_off, default=False, help="biases in linear layers and LayerNorm")
    add("--qk_norm", action=on_off, default=True, help="normalize queries and keys")
    add("--init_from", choices=OPENAI_MODELS, help="begin with OpenAI's weights")

    # What it learns from, and where it writes.
    add("--input_bin", default="fineweb10B/fineweb_train_*.bin", metavar="PATTERN",
        help="training shards, in quotes: '%(default)s'; those with _val_ for _train_ validate")
    add("--output_dir", help="for main.log, last.pt, best.pt; default: the preset's")

    # How long is a sequence? A shorter one costs less in attention, and needs no other weights
    # (but for wpe's). The model can then read no more than that at a time.
    add("--sequence_length", type=positive, default=1024, help="tokens in a sequence [%(default)s]")
    # How large is a step? Its gradient is a mean over so many tokens, an estimate of what all text
    # would say. Few tokens make a noisy estimate, with which only small steps are safe. Ever more
    # tokens cost ever more and improve it less and less (https://arxiv.org/abs/1812.06162). GPT-3's
    # model of 125M took half a million, and so do most since: here 512 sequences of 1024. If you
    # change it: with Adam the best rate is known to grow with the root of it
    # (https://arxiv.org/abs/2205.10287), and so it did with tiny (experiment 12 of the lab).
    # --num_iterations, --warmup_iters and --val_loss_every count steps, and not tokens.
    add("--total_batch_size", type=positive, default=524288, help="tokens in a step [%(default)s]")
    # How many of them does the GPU process at a time? That changes the speed and not the result,
    # because their gradients are added up.
    add("--batch_size", type=count, default=0, help="sequences at a time; 0: as many as fit")
    # How long? For the lowest loss at a given cost a model should read about 20 tokens for each
    # weight (https://arxiv.org/abs/2203.15556), d12 2.3 billion and d24 7. More of them make the
    # same model better still, and a small model that many people use is worth it. 19,073 steps are
    # the 10 billion tokens of FineWeb's sample, each read once.
    add("--num_iterations", type=count, default=19073, help="steps [%(default)s]")
    add("--overfit_single_batch", action="store_true",
        help="learn the first step's batch again and again: its loss must fall to almost 0")

    # How is it trained? Of all numbers the learning rate matters most. 0.1 and 1.0 are GPT-3's
    # weight decay and clipping.
    add("--recipe", choices=["today", "original"], default="today", help="original: AdamW, cosine")
    add("--optimizer", choices=["muon", "adamw"], default="muon", help="for the blocks' matrices")
    add("--learning_rate", type=between(float, 0), help="its highest value; default: the preset's")
    add("--schedule", choices=["wsd", "cosine"], default="wsd", help="how the rate falls")
    add("--warmup_iters", type=count,
        help="steps; default: the recipe's, or a tenth of a short run")
    add("--weight_decay", type=between(float, 0), default=0.1,
        help="of matrices and tables [%(default)s]")
    add("--grad_clip", type=between(float, 0), default=1.0,
        help="the longest gradient; 0: no limit [%(default)s]")
    add("--seed", type=count, default=1337, help="for weights, data order, samples [%(default)s]")

    # What to see and keep. Each validation also saves, so no more is lost in a crash than the steps
    # since the last one.
    add("--val_loss_every", type=count, default=250,
        help="steps to the next validation, sample, checkpoint; 0: at the end only [%(default)s]")
    add("--val_tokens", type=positive, default=10485760,
        help="tokens a validation takes, or all there are [%(default)s]")
    add("--hellaswag_every", type=count, default=0, help="steps to a HellaSwag score; 0: no")
    add("--log_every", type=positive, default=1, help="steps from line to line")
    add("--resume", action="store_true", help="go on from last.pt in output_dir, if it exists")
    add("--prompt", help="what samples begin with")
    add("--temperature", type=between(float, 0), default=0.8, help="of samples [%(default)s]")
    add("--top_k", type=count, default=50, help="of samples; 0: all ids [%(default)s]")
    add("--max_new_tokens", type=count, default=200, help="longest sample [%(default)s]")

    # The machine. By default all that it can do.
    add("--device", choices=["cuda", "mps", "cpu"], help="default: the first of these there is")
    add("--dtype", choices=["bfloat16", "float32"], help="default: bfloat16 if the device has it")
    add("--compile", action=on_off, help="torch.compile; default: on a GPU")

    # Instead of training.
    add("--sample", metavar="CHECKPOINT", help="let a checkpoint, or gpt2 ... gpt2-xl, write")
    return parser


def parse_args(argv):
    """Returns the settings. What was typed wins over all defaults.

    The defaults are those of make_parser(), then in this order the preset's, --recipe's,
    --init_from's and --arch's. A run that is resumed has its own flags as defaults instead.
    """
    parser = make_parser()
    typed = parser.parse_args(argv)
    model = typed.model or OPENAI_MODELS.get(typed.init_from, "tiny")
    defaults = {"model": model, "warmup_iters": 250} | PRESETS[model]
    if typed.recipe == "original":
        defaults |= ORIGINAL
        defaults["learning_rate"] /= 2
    if typed.init_from:
        defaults |= FINETUNE | {"arch": "gpt2", "output_dir": f"log_{typed.init_from}"}
    if typed.arch == "gpt2" or typed.init_from:
        defaults |= GPT2 | {"n_kv_head": typed.n_head or defaults["n_head"]}
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    if typed.warmup_iters is None:
        # a short run should not be all warm-up
        args.warmup_iters = min(args.warmup_iters, args.num_iterations // 10)

    last = Path(args.output_dir, "last.pt")
    if args.resume and not last.exists():
        if typed.output_dir and not (typed.model or typed.init_from):
            sys.exit(f"error: {last} does not exist: to begin a run there, add --model and so on")
        args.resume = False
    if args.resume:
        stored = read_checkpoint(last)["args"]
        parser.set_defaults(**stored | {"output_dir": args.output_dir})
        args = parser.parse_args(argv)
        # These stand for several others, which they would not change any more; and averages of one
        # optimizer are of no use to another.
        for name in "model", "arch", "recipe", "init_from", "optimizer":
            if getattr(args, name) != stored[name]:
                sys.exit(f"error: {last} was begun with --{name} {stored[name]}: leave the flag "
                         f"out, or begin a new run in another --output_dir")
    args.command = shlex.join(["python", "train_gpt2.py", *argv])
    return args


def main(argv):
    """Does what the command line asks for. Returns the exit code."""
    args = parse_args(argv)
    if args.sample is not None:
        model, tokenizer = load_model(args.sample, pick_device(args.device))
        print(sample(model, tokenizer, args.prompt, args.seed, args.max_new_tokens,
                     temperature=args.temperature, top_k=args.top_k))
        return 0
    with stop_signals() as signals:
        stopped = train(args, signals)
    if dist.is_initialized():
        # DDP's objects refer to each other in a circle, and keep threads alive that would abort a
        # program that is ending: collect them first.
        gc.collect()
        dist.destroy_process_group()
    # a program that a signal ended has the exit code 128 + the signal's number
    return 128 + signals[0] if stopped and signals else 0


if __name__ == "__main__":
    # a character of a sample that the terminal lacks becomes a "?", and does not end the run
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    sys.exit(main(sys.argv[1:]))

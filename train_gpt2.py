"""
How GPT-2 is trained, and how you would train it today: one file, to be read from top to bottom.

A language model reads text and predicts what comes next. It sees text as a sequence of integers,
the token ids. A token is a byte, or a string of bytes that occurs often, such as a common word. At
each position the model gives every id of its vocabulary a score, the logit, and softmax turns the
logits into probabilities. The loss at a position is -log p(the next id), the cross-entropy, in nats
because the logarithm is natural:
    0       the model was certain and right
    5.5     it gave equal probability to the 257 ids of a byte-level vocabulary, the 256 bytes and
            a special token that separates documents: ln 257 = 5.5
    10.8    it gave equal probability to the 50,257 ids of GPT-2's vocabulary: ln 50,257 = 10.8
    3.3     a trained GPT-2. Its perplexity is e^3.3 = 27: on average it is as uncertain as if it
            guessed among 27 equally likely ids
Training lowers the mean loss by gradient descent. Each step runs the model on a batch of text,
computes the gradient of the loss with respect to every parameter, and moves each parameter a
little. Nobody has to label anything: the target at each position is the token that follows.

Part I is the algorithm: the model, the loss, the data, the optimizer, the hyperparameters, and the
training loop, with which it ends. Part II has what part I calls: choosing a device, checkpoints,
sampling, the command line. Look a function up there when you need it.

Letters and words in comments:
    B   batch size: how many sequences are processed in parallel
    T   sequence length; t is a position in a sequence ("time")
    C   channels: the width of the vector at each position (n_embd)
    D   the width of one attention head, C / n_head
    V   vocabulary size: how many different ids there are
    fp32, bf16   floating-point numbers of 32 bits, and of 16 bits with the same range but only 2 to
                 3 decimal digits: half the memory, and several times as fast to multiply
    tiny         a model for a laptop: 4 layers, 128 channels, bytes as tokens
    d12, d24     two of GPT-2's sizes: 12 layers with 768 channels, 24 layers with 1024

Launch it:
    python train_gpt2.py                        trains tiny on Python's standard library, in minutes
    python train_gpt2.py --sample logtiny/best.pt --prompt "def "       generates text
    python fineweb.py                           downloads FineWeb, 10 billion tokens of web pages
    python train_gpt2.py --model d12 --resume   trains d12 on them, and continues after a crash
    torchrun --standalone --nproc_per_node=8 train_gpt2.py --model d12 --resume      on eight GPUs

The model is a variant of GPT-2 with six changes that later models made standard: RMSNorm, rotary
position embeddings, grouped-query attention, QK-norm, SwiGLU, and no biases. Each is explained
where it is built. Each has a switch, and --arch gpt2 sets all of them back to 2019. Names such as
wte and c_proj are GPT-2's own, and flags are named as in llm.c, GPT-2 training in C
(https://github.com/karpathy/llm.c). report/one_step.py prints one training step in real numbers.
"""

import argparse
import contextlib
import datetime
import math
import os
import shlex
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import fineweb

# =================================================================================================
# PART I: THE ALGORITHM

# -------------------------------------------------------------------------------------------------
# 1. The model

@dataclass
class GPTConfig:
    """The shape of a model. Raises a ValueError if the sizes do not divide."""

    n_layer: int = 12         # number of blocks
    n_head: int = 12          # attention heads per block
    n_kv_head: int = 0        # key/value heads; 0: half of n_head; GPT-2 has n_head
    n_embd: int = 768         # C, channels per position
    block_size: int = 1024    # the longest sequence, in tokens
    vocab_size: int = 50257   # V
    norm: str = "rmsnorm"     # or GPT-2's "layernorm"
    mlp: str = "swiglu"       # or GPT-2's "gelu"
    pos: str = "rope"         # position embedding; or GPT-2's "learned"
    bias: bool = False        # biases in linear layers and LayerNorm, as in GPT-2
    qk_norm: bool = True      # normalize queries and keys; GPT-2 does not

    def __post_init__(self):
        if self.n_kv_head == 0:
            # half, if the heads come in pairs; d48's 25 heads do not
            self.n_kv_head = self.n_head // 2 if self.n_head % 2 == 0 else self.n_head
        # RoPE needs an even head width because it rotates pairs of channels
        if self.n_embd % (2 * self.n_head) or self.n_head % self.n_kv_head:
            raise ValueError(f"n_embd must be a multiple of 2 n_head, n_head of n_kv_head: {self}")


class RMSNorm(nn.Module):
    """Divides each vector by its root mean square (RMS) and scales each channel by a learned gain.

    x (..., dim) -> same shape and dtype (https://arxiv.org/abs/1910.07467). Every block adds to the
    vectors, so their entries grow from block to block. Each sublayer therefore reads a normalized
    copy, whose RMS is 1. GPT-2's LayerNorm also subtracts the mean and adds a bias, which turned
    out to be unnecessary.
    """

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))  # the gain

    def forward(self, x):
        # x may be bf16, whose 2 to 3 digits are too few for a sum of many squares: compute in fp32.
        # The 1e-6 prevents a division by zero.
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + 1e-6)
        return (y * self.weight).to(x.dtype)


def make_norm(config):
    """The normalization layer that the config names, for vectors of n_embd channels."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.n_embd)
    if config.norm == "layernorm":
        return nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
    raise ValueError(f"norm must be rmsnorm or layernorm: {config.norm}")


# Attention is how a position collects information from itself and earlier positions. Each position
# computes three vectors: a query q (what it is looking for), a key k (what it has to offer) and a
# value v (what it passes on to positions that attend to it). A position's scores are the dot
# products of its query with its own key and all earlier keys. Softmax turns them into weights, and
# the output is the weighted average of the values. So a position attends most to those whose keys
# match its query.
#
# So far order makes no difference: in the first block, the period after "dog bites man" gets the
# same average as after "man bites dog". Positions have to enter somehow. GPT-2 adds a learned
# position embedding, one vector per position, to the token's vector. Rotary position embeddings
# (RoPE, https://arxiv.org/abs/2104.09864) instead take the channels of queries and keys in pairs,
# treat each pair as a point in the plane, and rotate it by an angle proportional to its position.
#
# Why rotate? Let R(a) be the rotation by an angle a. Rotating two vectors by the same angle leaves
# their dot product unchanged. Take a query rotated by a and a key rotated by b, and rotate both
# back by a:
#     R(a) q · R(b) k = q · R(b - a) k
# A pair's angle is its position times the pair's frequency, so b - a depends only on the relative
# position: "three tokens ago" looks the same everywhere. (Offsets longer than any in training are
# still new to the model: do not expect it to read further.)

def rope_tables(T, D, base=10000.0):
    """cos and sin of every angle, each (T, D/2).

    Pair i of a head's D channels is (i, i + D/2). At position t it is rotated by
    t * base^(-2i/D) radians. The first, high-frequency pairs tell neighbors apart, and the middle
    ones tell near from far. With D = 64 the last pair turns by only 0.14 radians in 1024
    positions, so it says next to nothing about position.
    """
    frequency = base ** (-torch.arange(0, D, 2).float() / D)  # (D/2,), radians per position
    angle = torch.outer(torch.arange(T).float(), frequency)  # (T, D/2)
    return angle.cos(), angle.sin()


def apply_rope(x, cos, sin):
    """Rotates queries or keys x (B, T, heads, D) by their positions. cos and sin are (T, D/2).

    Each pair of channels (first, second) is a point in the plane and turns by its angle:

        | cos  -sin |   | first  |
        | sin   cos | · | second |
    """
    # (T, 1, D/2): the angle depends on the position, dimension 1 of x, and not on the head
    cos = cos.unsqueeze(1)
    sin = sin.unsqueeze(1)
    # the two members of every pair: the first half of the channels, and the second half
    first, second = x.chunk(2, dim=-1)  # (B, T, heads, D/2) each
    rotated = torch.cat((cos * first - sin * second, sin * first + cos * second), dim=-1)
    # the tables are fp32, so the products are fp32 as well; cast back to x's dtype
    return rotated.to(x.dtype)


def causal_attention(q, k, v):
    """softmax(q k^T / sqrt(D)) v, where each position attends to itself and earlier positions.

    q (B, n_head, T, D), k and v (B, n_kv_head, T, D) -> (B, n_head, T, D). Several query heads
    may share one key/value head. In plain PyTorch:

        k = k.repeat_interleave(n_head // n_kv_head, dim=1)     # one per query head:
        v = v.repeat_interleave(n_head // n_kv_head, dim=1)     # (B, n_head, T, D)
        scores = q @ k.transpose(2, 3) / math.sqrt(D)           # (B, n_head, T, T)
        future = torch.ones(T, T).triu(1).bool()                # row t, column u: True where u > t
        scores = scores.masked_fill(future, -math.inf)          # the causal mask
        weights = F.softmax(scores, dim=-1)                     # each row sums to 1
        return weights @ v                                      # weighted averages of the values

    The causal mask hides later positions because that is where the targets are: each position
    predicts the next token. With three tokens, one head, and values of 10, 20 and 30:

        scores             masked               weights               output
        1.0   0.3   2.0    1.0   -inf  -inf     1.00   0      0       10.0
        2.0   1.0   0.5    2.0   1.0   -inf     0.73   0.27   0       12.7
        0.0   2.0   1.0    0.0   2.0   1.0      0.09   0.67   0.24    21.5

    Why divide by sqrt(D)? A dot product is a sum of D products. If the entries are random with
    standard deviation 1, the sum has standard deviation sqrt(D), and the softmax saturates: the
    largest score of a row gets nearly all the weight. Learning is then slow, because the
    derivatives of a softmax, p_i (1 - p_i) and -p_i p_j, all vanish when one p is near 1.
    """
    # Flash attention (https://arxiv.org/abs/2205.14135) computes the same numbers in tiles that fit
    # the GPU's fast on-chip SRAM, so no (T, T) matrix is ever stored. To look at the weights, run
    # the plain form here instead.
    if q.device.type == "cpu":
        # CPUs run this kernel faster in fp32 (tiny: 5 ms instead of 13 on an AMD Zen 4)
        q, k, v = q.float(), k.float(), v.float()
    # switched off because autocast would cast the fp32 inputs back to bf16
    with torch.autocast(q.device.type, enabled=False):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class CausalSelfAttention(nn.Module):
    """Several attention heads in parallel, each with its own q, k and v of D channels.

    One head may look for the verb and another for the matching bracket. In grouped-query attention
    (https://arxiv.org/abs/2305.13245) query heads share key/value heads: with half as many, query
    heads 0 and 1 share key/value head 0, heads 2 and 3 share head 1, and so on. Why? A program that
    generates text stores the keys and values of all earlier tokens, the KV cache, because later
    tokens never change them. Half the heads halve the cache. Training d12 takes 5% less compute.
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
        # nn.Identity returns its input
        norm = RMSNorm if config.qk_norm else nn.Identity
        self.q_norm = norm(self.head_dim)
        self.k_norm = norm(self.head_dim)

    def forward(self, x, rope):
        """x (B, T, C) -> (B, T, C). rope is (cos, sin), each (T, D/2), or None."""
        B, T, C = x.shape
        # view: split the C channels of a position into heads of D channels
        q = self.c_q(x).view(B, T, self.n_head, self.head_dim)
        k = self.c_k(x).view(B, T, self.n_kv_head, self.head_dim)
        v = self.c_v(x).view(B, T, self.n_kv_head, self.head_dim)
        # QK-norm (https://arxiv.org/abs/2302.05442) gives every q and k the norm sqrt(D) while its
        # gains are near 1. A score is then at most sqrt(D), however large c_q and c_k grow. At a
        # high learning rate they would otherwise grow until the softmax saturates. Its gains differ
        # within a pair of channels, so after the rotation they would spoil relative positions.
        q = self.q_norm(q)
        k = self.k_norm(k)
        if rope is not None:
            # Values are not rotated: positions decide which values are averaged and must not change
            # the values themselves.
            q = apply_rope(q, *rope)
            k = apply_rope(k, *rope)
        # (B, T, heads, D) -> (B, heads, T, D). Not before apply_rope(), which expects positions in
        # dimension 1.
        y = causal_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        # concatenate the heads, (B, T, C), and let c_proj mix their outputs
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.c_proj(y)


class MLP(nn.Module):
    """Multi-layer perceptron: a nonlinear function of each position on its own.

    Attention only averages values. To conclude something from what it gathered takes a nonlinear
    function. GPT-2's MLP widens the vector to 4C, applies GELU, a smooth ReLU, and projects back:

        y = c_proj(gelu(c_fc(x)))

    SwiGLU (https://arxiv.org/abs/2002.05202) computes two hidden vectors. One of them, the gate,
    decides how much of the other passes:

        y = c_down(silu(c_gate(x)) * c_up(x))           silu(x) = x * sigmoid(x), also a smooth ReLU

    Its three matrices cost as much as two with a hidden width of 2/3 of 4C, which is 8/3 C.
    """

    def __init__(self, config):
        super().__init__()
        self.swiglu = config.mlp == "swiglu"
        if self.swiglu:
            # rounded up to a multiple of 64, because GPUs multiply matrices in tiles
            hidden = 64 * math.ceil(8 * config.n_embd / 3 / 64)
            self.c_gate = nn.Linear(config.n_embd, hidden, bias=config.bias)
            self.c_up = nn.Linear(config.n_embd, hidden, bias=config.bias)
            self.c_down = nn.Linear(hidden, config.n_embd, bias=config.bias)
        elif config.mlp == "gelu":
            self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
            self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        else:
            raise ValueError(f"mlp must be swiglu or gelu: {config.mlp}")

    def forward(self, x):
        """x (B, T, C) -> (B, T, C)."""
        if self.swiglu:
            return self.c_down(F.silu(self.c_gate(x)) * self.c_up(x))
        # tanh: the approximation of GELU that OpenAI trained GPT-2 with
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """Attention, then the MLP. Each of these sublayers adds its output to x.

        x ---+----------------------(+)---+----------------(+)---> x
             |                       ^    |                 ^
             +-> ln_1 -> attention --+    +-> ln_2 -> MLP --+

    The x that runs through all blocks is called the residual stream. A sublayer reads a normalized
    copy (pre-norm) and writes by adding. The derivative of x + f(x) is 1 plus that of f, so
    gradients reach the first block through the additions alone, and deep models can be trained.

    GPT-2 had dropout here, x + dropout(attn(...)): zeroing random activations keeps a model from
    memorizing a small text that it reads many times.
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
    """The whole model: ids -> vectors -> blocks -> logits for the next id.

    With d12 and 4 sequences of 1024 tokens the shapes are:
        idx                    (4, 1024)             token ids
        wte                    (4, 1024, 768)        one vector per token: the residual stream x
        in each of 12 blocks:
            q                  (4, 1024, 12, 64)     12 heads of 64 channels
            k, v               (4, 1024, 6, 64)      half as many heads
            attention          (4, 1024, 768)        the heads concatenated, added to x
            gate, up           (4, 1024, 2048)       8/3 of 768
            MLP                (4, 1024, 768)        added to x
        ln_f                   (4, 1024, 768)
        lm_head                (4, 1024, 50304)      a logit for every id
        loss                   scalar                the mean over 4096 predictions
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        # GPUs are slow at dimensions that are not multiples of 64, so 50,257 ids are padded to
        # 50,304. forward() drops their logits, so the extra rows have a gradient of exactly 0.
        padded_vocab_size = 64 * math.ceil(config.vocab_size / 64)
        # GPT-2's names: wte is the embedding matrix with a row per id ("word token embedding"), wpe
        # has a row per position, h holds the blocks, and ln_f is the final norm.
        self.transformer = nn.ModuleDict()
        self.transformer["wte"] = nn.Embedding(padded_vocab_size, config.n_embd)
        self.transformer["h"] = nn.ModuleList(Block(config) for layer in range(config.n_layer))
        self.transformer["ln_f"] = make_norm(config)
        if config.pos == "rope":
            cos, sin = rope_tables(config.block_size, config.n_embd // config.n_head)
            # buffers move to the GPU with the model; persistent=False: not stored in checkpoints
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        elif config.pos == "learned":
            self.transformer["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        else:
            raise ValueError(f"pos must be rope or learned: {config.pos}")
        self.lm_head = nn.Linear(config.n_embd, padded_vocab_size, bias=False)
        # Weight tying (https://arxiv.org/abs/1608.05859): the head shares the embedding matrix, so
        # an id's logit is the dot product of the final vector with the id's own row. Ids that are
        # used alike get similar rows, which helps at both ends. Untied, d12 would have 155M
        # parameters instead of 116.5M. (An untrained model predicts that each token repeats: its
        # blocks add little, and a row matches itself best.)
        self.lm_head.weight = self.transformer.wte.weight
        self.init_weights()

    def init_weights(self):
        """Initializes every parameter by the name of its layer.

        Why a standard deviation of 0.02? Most matrices read vectors with an RMS of 1. An output is
        a sum of C products; at C = 768 its standard deviation is 0.02 * sqrt(768) = 0.55, neither
        huge nor tiny. With weights of standard deviation 1 it would be 28.
        """
        inputs = "wte", "wpe", "c_q", "c_k", "c_v", "c_gate", "c_up", "c_fc"
        for name, p in self.named_parameters():
            layer = f".{name}".split(".")[-2]
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif layer.startswith("ln_") or layer.endswith("_norm"):
                nn.init.ones_(p)
            elif layer in inputs:
                nn.init.normal_(p, std=0.02)
            elif layer in ("c_proj", "c_down"):
                # These 2 * n_layer matrices write into the residual stream. A sum of n independent
                # vectors grows like sqrt(n): divide by that, so depth does not enlarge the stream.
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            else:
                raise ValueError(f"init_weights() has no rule for {name}: add one")

    def forward(self, idx, targets=None):
        """Token ids idx (B, T), T <= block_size -> logits (B, T, V) in fp32.

        With targets (B, T), returns the mean loss instead, a scalar in nats per token. To generate
        text, sample an id from softmax(logits) at the last position, append it, and run the model
        again: generate(), in part II.
        """
        T = idx.size(1)
        x = self.transformer.wte(idx)  # (B, T, C)
        rope = None
        if self.config.pos == "rope":
            rope = (self.cos[:T], self.sin[:T])
        else:
            x = x + self.transformer.wpe.weight[:T]  # (T, C), the same for every sequence
        if torch.is_autocast_enabled(x.device.type):
            # mixed precision (section 6): left in fp32, the residual stream takes twice the memory
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for block in self.transformer.h:
            x = block(x, rope)
        logits = self.lm_head(self.transformer.ln_f(x))  # (B, T, padded V)
        # drop the padding ids, and leave bf16, which is too coarse for a softmax
        logits = logits[..., : self.config.vocab_size].float()  # (B, T, V)
        if targets is None:
            return logits
        # (B, T, V) -> (B * T, V) and (B, T) -> (B * T,): section 2
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# -------------------------------------------------------------------------------------------------
# 2. The loss

# F.cross_entropy, in the last line of forward(), is the mean of -log softmax(logits)[target]. A
# little calculus shows what it does. Let z be the logits at one position and y the target. Then
#
#     -log softmax(z)[y] = log(sum(exp(z))) - z[y]
#
# The derivative of the first term with respect to z[i] is exp(z[i]) / sum(exp(z)), which is
# softmax(z)[i] again, the probability of id i. The derivative of z[y] is 1 for i = y, else 0:
#
#     d loss / d z  =  softmax(z), with 1 subtracted at y
#
# All of training comes from this signal. It pushes each logit down in proportion to its
# probability, and the target's logit up.

# -------------------------------------------------------------------------------------------------
# 3. The data

# A corpus is a long sequence of token ids, stored in files called shards. fineweb.py makes them and
# explains how text becomes tokens. Training reads T + 1 consecutive ids and makes an input x and a
# target y from them:
#
#     text   The   dog   is    a  good  dog     .  The  cat sleeps     .
#     ids    464  3290  318  257   922 3290    13  383 3797  44263    13     11 tokens, so T = 10
#     x      464  3290  318  257   922 3290    13  383 3797  44263           the model's input
#     y     3290   318  257  922  3290   13   383 3797 44263    13           the targets
#
# " The" with its space is another token than "The". y is x shifted by one: at position t the model
# sees x[0] ... x[t], and the target is the next id, y[t]. So one sequence trains T predictions. The
# shift is why attention needs the causal mask: otherwise position t would find its target in
# x[t + 1].

class TokenLoader:
    """Sequences from all shards that match a glob pattern. Each epoch uses each of them once.

    In plain form, row i of a shard is (one more token is read because it is the last target)

        piece = tokens[i * T : i * T + T + 1]
        x, y = piece[:-1], piece[1:]

    A shard of n tokens has (n - 1) // T rows; the few tokens left at its end are never used. Each
    epoch visits the rows of all shards in a random order of its own. The index of a sequence counts
    through the whole run. If shard 0 has 3 rows and shard 1 has 2, an epoch has 5 sequences:

        index    0   1   2   3   4         index 5 begins the next epoch,
        shard    1   0   0   1   0         in another order
        row      0   2   0   1   1

    Seed and index determine the row, so there is no state to save: a run resumed at step 1000 reads
    what it would have read. (NumPy may change the order between versions: keep yours.)

    A row may start in the middle of a document and contain several, with the separator
    <|endoftext|> between them. Attention reaches across it, and the model learns to ignore what is
    before it. A document mask would forbid the reach; nanochat's gained 0.0002 bits per byte, too
    little to keep (https://github.com/karpathy/nanochat).
    """

    def __init__(self, pattern, T, seed=0):
        self.T = T
        self.seed = seed
        # file names, tokens per file, and the vocabulary size, which all of them share
        self.paths, lengths, self.vocab_size = fineweb.find_shards(pattern)
        # Number the rows of all shards consecutively: shard s has starts[s] ... starts[s + 1] - 1.
        self.starts = np.cumsum([0, *(max(0, n - 1) // T for n in lengths)])
        self.total = int(self.starts[-1])  # sequences per epoch
        self.epoch = None  # the epoch whose order is in self.order

    def locate(self, index):
        """Sequence `index` of the run -> the shard and the row in it."""
        epoch, i = divmod(index, self.total)
        if epoch != self.epoch:
            # once per epoch; for FineWeb's 10B tokens half a second and 80 MB
            self.epoch = epoch
            self.order = np.random.default_rng((self.seed, epoch)).permutation(self.total)
        row = self.order[i]
        # the last shard that starts at or before this row
        shard = np.searchsorted(self.starts, row, side="right") - 1
        return shard, row - self.starts[shard]

    def batch(self, first, count, device):
        """Sequences first ... first + count - 1 of the run: x and y, (count, T) int64 on device."""
        device = torch.device(device)
        tokens = np.empty((count, self.T + 1), np.int64)
        for i in range(count):
            shard, row = self.locate(first + i)
            # reads only these T + 1 tokens from the disk
            tokens[i] = fineweb.read_tokens(self.paths[shard], row * self.T, self.T + 1)
            if tokens[i].max() >= self.vocab_size:
                # a GPU would not say what is wrong
                sys.exit(f"error: {self.paths[shard]} contains id {tokens[i].max()}, but its "
                         f"vocabulary has {self.vocab_size}: make it again with fineweb.py")
        tokens = torch.from_numpy(tokens)
        if device.type == "cuda":
            # a copy from pinned memory, which the system cannot move, does not wait for the GPU
            tokens = tokens.pin_memory().to(device, non_blocking=True)
        tokens = tokens.to(device)
        # contiguous() copies: shifted views of one tensor gave wrong results on Apple GPUs
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


@torch.no_grad()
def evaluate(model, data, num_tokens, batch_size=16):
    """The mean loss over the first num_tokens of data, a TokenLoader, in nats per token.

    data is held-out text, which the model never trains on: a model that has only memorized its
    training text does badly on it. No sequence counts twice: fewer tokens are used if there are
    fewer.
    """
    device = next(model.parameters()).device
    num_sequences = max(1, min(num_tokens // data.T, data.total))
    # With several GPUs, each has a process, number `rank` of world_size, and evaluates its share.
    # So the mean depends neither on the number of processes nor on the batch size.
    rank, world_size = this_process()
    begin = num_sequences * rank // world_size
    end = num_sequences * (rank + 1) // world_size
    loss_sum = 0.0
    for first in range(begin, end, batch_size):
        count = min(batch_size, end - first)
        x, y = data.batch(first, count, device)
        loss_sum += model(x, y).item() * count
    # all_sum() adds up lists of numbers over all processes
    [total] = all_sum([loss_sum], device)
    return total / num_sequences


# -------------------------------------------------------------------------------------------------
# 4. The optimizer

# The gradient g of a parameter w says how the loss changes with w. Stochastic gradient descent
# (SGD) steps against it, w -= lr * g; stochastic, because g comes from one batch and is noisy.
# Momentum instead steps along a moving average of the gradients, m, in which noise averages out.
# But one learning rate lr does not fit all parameters: it is too large where gradients are large
# and too small where they are tiny. Adam (https://arxiv.org/abs/1412.6980) divides m by the
# gradients' RMS, which it gets from a moving average v of their squares. m and v are called the
# first and second moments. AdamW (https://arxiv.org/abs/1711.05101) adds weight decay. After n
# steps:
#
#     m = 0.9 m + 0.1 g        v = 0.95 v + 0.05 g^2
#     w -= lr * (m / (1 - 0.9^n) / (sqrt(v / (1 - 0.95^n)) + eps) + weight_decay * w)
#
#     m              averages the gradient over about 10 steps.
#     sqrt(v)        makes the update independent of the gradient's scale. A parameter whose
#                    gradients agree moves by about lr per step. If their signs are random, they
#                    nearly cancel in m, and it moves by about 0.2 lr: m weighs the gradients by
#                    0.1, 0.09, 0.081 and so on, and sqrt(0.1^2 + 0.09^2 + ...) = 0.23.
#     1 - 0.9^n      m starts at 0 and is biased toward 0: after one step it is 0.1 g. Dividing by
#                    1 - 0.9^n, which is 0.1 then and soon nearly 1, corrects the bias (bias
#                    correction). v is corrected the same way.
#     eps            prevents a division by 0.
#     weight_decay   pulls weights slightly toward 0, so weights that the data does not need fade.
#
# Muon (https://kellerjordan.github.io/posts/muon) is a newer optimizer, for the matrices of the
# blocks. Adam rescales each entry of a gradient on its own; Muon treats the matrix as a whole.
# Every matrix X is a product U S V^T, its singular value decomposition. U and V are orthogonal:
# they rotate or reflect vectors and keep their norms. S is diagonal and holds the singular values,
# the factors by which X stretches space along its axes. A gradient has a few large singular values
# and many small ones: in tiny after 100 steps, the largest is 25 to 170 times the median. A plain
# step along it therefore changes little but a few axes. But small does not mean unimportant: a
# small singular value may belong to something rare in the batch that has to be learned as well.
# Muon keeps U and V and sets all singular values to about 1, with orthogonalize(), so the step is
# equally large along every axis. For matrices g and w:
#
#     m = 0.95 m + 0.05 g                         # momentum
#     u = orthogonalize(0.95 m + 0.05 g)          # Nesterov momentum: one more step toward g
#     w -= lr * (0.2 sqrt(max(rows, cols)) * u + weight_decay * w)
#
# Nesterov momentum looks one step ahead, as if g came once more. 0.2 sqrt(max(rows, cols)) gives
# the entries of the update an RMS of 0.2, about that of AdamW's updates in practice, so that one
# learning rate serves both (https://arxiv.org/abs/2502.16982).

def orthogonalize(matrices):
    """Moves all singular values of matrices (n, rows, cols) close to 1. Same shape and dtype.

    For example, to two digits:

        X = U S V^T             [[4, 3], [0, 1]]                   singular values 5.04 and 0.79
        U V^T                   [[0.86, 0.51], [-0.51, 0.86]]      1 and 1
        orthogonalize(X)        [[0.63, 0.34], [-0.54, 0.84]]      1.00 and 0.71

    Computing U, S and V would take far too long. But X can be multiplied by itself. Because U^T U
    and V^T V are the identity I,

        X X^T X = (U S V^T) (V S U^T) (U S V^T) = U S^3 V^T

    has the same U and V, and every singular value s has become s^3. X X^T X X^T X has s^5. A
    weighted sum of the three therefore changes only the singular values:

        s -> a s + b s^3 + c s^5

    With the a, b and c below, five of these Newton-Schulz iterations move every s between 1/500 and
    1 to between 0.68 and 1.20, and enlarge smaller ones. Muon's post explains how a, b and c were
    found and why this is close enough to 1.
    """
    a, b, c = 3.4445, -4.775, 2.0315
    # X X^T is (rows, rows). Transpose tall matrices, to multiply the smaller of the two ways.
    tall = matrices.size(1) > matrices.size(2)
    X = matrices.mT if tall else matrices
    # The iteration needs singular values of at most 1, and none exceeds the matrix's norm.
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        # A X is X X^T X, and A A X is X X^T X X^T X
        A = X @ X.mT  # (n, rows, rows)
        B = b * A + c * A @ A
        X = a * X + B @ X
    return X.mT if tall else X


class Muon(torch.optim.Optimizer):
    """The update above, for the matrices of the blocks. (An embedding's rows are looked up alone.)

    dtype is the precision of the matmuls: bf16 is exact enough, but slow on hardware without it.
    torch.optim.Muon does the same one matrix at a time: 1.6 times as long for tiny (2 CPU cores).
    """

    def __init__(self, params, lr, weight_decay, dtype, momentum=0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            # One large matmul is faster than many small ones: stack matrices of the same shape.
            same_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    same_shape.setdefault(p.shape, []).append(p)
            for params in same_shape.values():
                self.update(params, group)

    def update(self, params, group):
        """One step for some matrices of the same shape, (rows, cols) each."""
        momentum = group["momentum"]
        updates = []
        for p in params:
            if p not in self.state:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            m = self.state[p]["momentum_buffer"]
            # a.lerp(b, w) is (1 - w) a + w b, so this is m = 0.95 m + 0.05 g
            m.lerp_(p.grad, 1 - momentum)
            # Nesterov: 0.95 m + 0.05 g, with the new m
            updates.append(p.grad.lerp(m, momentum).to(self.dtype))
        orthogonal = orthogonalize(torch.stack(updates))  # (n, rows, cols)
        # With singular values of 1, X X^T = I: the rows of a wide matrix have norm 1, its entries
        # an RMS of 1 / sqrt(cols). For a tall one it is 1 / sqrt(rows). Scale the RMS to 0.2.
        orthogonal = orthogonal * (0.2 * math.sqrt(max(params[0].shape)))
        for p, u in zip(params, orthogonal, strict=True):
            # weight decay as in AdamW, then the step
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(u, alpha=group["lr"])


def make_optimizers(model, optimizer="muon", learning_rate=4e-3, weight_decay=0.1,
                    dtype="float32"):
    """A list of optimizers, which together hold every trainable parameter exactly once.

    "muon": Muon for the matrices of the blocks, AdamW for the rest. "adamw": AdamW for everything.
    Memory: 4 bytes per parameter, 4 for its gradient, and as optimizer state 8 for AdamW's two
    moments or 4 for Muon's one: 4.2 GB for d24 with its 330M parameters.
    """
    matrices = []
    decayed = []
    vectors = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.dim() < 2:
            vectors.append(p)
        elif optimizer == "muon" and name.startswith("transformer.h.") and p.dim() == 2:
            matrices.append(p)
        else:
            decayed.append(p)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        # no decay for biases and gains: a bias is only added, and a gain belongs near 1
        {"params": vectors, "weight_decay": 0.0},
    ]
    # These betas are GPT-3's (https://arxiv.org/abs/2005.14165). With PyTorch's default of 0.999, v
    # would remember one unusual batch for 1000 steps. fused: one kernel for all parameters.
    adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)
    if optimizer == "adamw":
        return [adamw]
    if optimizer == "muon":
        return [adamw, Muon(matrices, learning_rate, weight_decay, getattr(torch, dtype))]
    raise ValueError(f"optimizer must be muon or adamw: {optimizer}")


def get_lr(step, num_iterations, learning_rate, warmup_iters=0, schedule="wsd"):
    r"""The learning rate at a step of num_iterations; learning_rate is the peak.

        wsd                        cosine
          ___                        _
         /   \                      / `.
        /      \                   /    `.
       /         \                /        `--.__
        warmup, stable, decay to 0   warmup, decay to a tenth

    Why warm up? At first the moments rest on few gradients, and full steps would go astray. Why
    decay? Large steps bounce back and forth across a valley of the loss, and only small ones
    descend into it. Compare runs only at their ends: before, the run whose rate is still high looks
    worse than it is. wsd means warmup, stable, decay (https://arxiv.org/abs/2404.06395); ours
    decays over the last 70%, as the speedrun (https://github.com/KellerJordan/modded-nanogpt).

    For d12's 19,073 steps the two recipes of section 5 give:

        step                             0         125       10,000    19,072
        --recipe today      (wsd)        2.4e-4    1.3e-3    1.6e-3    1.8e-7
        --recipe original   (cosine)     1.2e-4    3.1e-4    6.5e-4    1.2e-4
    """
    warmup = 1.0
    if step < warmup_iters:
        warmup = 0.1 + 0.9 * step / warmup_iters
    if schedule == "cosine":
        progress = (step - warmup_iters) / max(1, num_iterations - warmup_iters)  # from 0 to 1
        decay = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * max(0.0, progress)))
    elif schedule == "wsd":
        remaining = (num_iterations - step) / num_iterations  # from 1 to 0
        decay = min(1.0, remaining / 0.7)
    else:
        raise ValueError(f"schedule must be wsd or cosine: {schedule}")
    return learning_rate * min(warmup, decay)


# -------------------------------------------------------------------------------------------------
# 5. The hyperparameters

# How long is a sequence? A shorter one costs less in attention, but limits what the model can read.
#
# How many tokens are in a step? Their mean gradient estimates the gradient over all text. Few
# tokens make a noisy estimate, with which only small steps are safe; beyond some size, more tokens
# improve it less and less (https://arxiv.org/abs/1812.06162). GPT-3's model of 125M parameters took
# half a million, and so do we: 512 sequences of 1024. If you change total_batch_size, scale the
# peak learning rate with its square root, as is known for Adam (https://arxiv.org/abs/2205.10287)
# and held for tiny (experiment 12 of the lab), and rescale everything that counts steps.
#
# How many steps? Compute-optimal training takes about 20 tokens per parameter (Chinchilla,
# https://arxiv.org/abs/2203.15556): 2.3 billion for d12, 7 billion for d24. More tokens make the
# same model better still. 19,073 steps are one pass over FineWeb's sample of 10 billion tokens.
#
# How high is the peak learning rate? No number matters more. d12 to d48 use four times the rates of
# GPT-3's models of these sizes (6e-4 to 2e-4, table 2.1 of https://arxiv.org/abs/2005.14165),
# because Muon and QK-norm keep training stable there. Only models up to 17.6M parameters were tried
# (report/README.md), so these rates are a guess, good to a factor of two. For another size, start
# between its neighbors and compare short runs at half and at twice the rate, at their ends.
DEFAULTS = dict(
    input_bin="fineweb10B/fineweb_train_*.bin",  # training shards; _val_ in their names: held out
    sequence_length=1024,     # T, tokens
    total_batch_size=524288,  # tokens per step
    batch_size=0,             # sequences that a GPU processes at a time; 0: as many as fit
    num_iterations=19073,     # steps
    warmup_iters=250,         # steps, but at most a tenth of the run
    weight_decay=0.1,         # as in GPT-3
    grad_clip=1.0,            # maximum norm of the gradient, as in GPT-3; 0: no clipping
    seed=1337,                # for weights, data order and samples
    val_loss_every=250,       # steps between validations, which also save; 0: only at the end
    val_tokens=10485760,      # tokens per validation
    log_every=1,              # steps per printed line
)
# The folders are named after GPT-2's models of these shapes.
PRESETS = {
    # 0.8M, 116.5M, 330.0M, 719.2M and 1,560.1M parameters
    "tiny": dict(n_layer=4, n_head=4, n_embd=128, learning_rate=4e-3, output_dir="logtiny"),
    "d12": dict(n_layer=12, n_head=12, n_embd=768, learning_rate=2.4e-3, output_dir="log124M"),
    "d24": dict(n_layer=24, n_head=16, n_embd=1024, learning_rate=1.2e-3, output_dir="log350M"),
    "d36": dict(n_layer=36, n_head=20, n_embd=1280, learning_rate=1e-3, output_dir="log774M"),
    "d48": dict(n_layer=48, n_head=25, n_embd=1600, learning_rate=8e-4, output_dir="log1558M"),
}
# The rest of tiny's numbers, tried. An empty input_bin is the source of Python's standard library.
PRESETS["tiny"] |= dict(
    input_bin="", sequence_length=128, total_batch_size=2048, num_iterations=600, warmup_iters=20,
    val_loss_every=200, val_tokens=500_000, log_every=20, compile=False,
)
# --arch gpt2: every switch as in 2019, together with n_kv_head = n_head
GPT2 = dict(norm="layernorm", mlp="gelu", pos="learned", bias=True, qk_norm=False)
# --recipe original: how this variant was first trained, at half the learning rate
# (https://github.com/Morris88826/CSCE-689-HW2, the class project that this one follows)
ORIGINAL = dict(optimizer="adamw", schedule="cosine", warmup_iters=715, qk_norm=False)


# -------------------------------------------------------------------------------------------------
# 6. Training

# This is how a GPT is trained. After `from train_gpt2 import *` the lines run as they stand, and
# they are the default run:
#
#     torch.manual_seed(1337)
#     train_data = TokenLoader(fineweb.stdlib_corpus(), T=128, seed=1337)
#     model = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=128, vocab_size=257))
#     optimizers = make_optimizers(model, learning_rate=4e-3)
#     for step in range(600):
#         x, y = train_data.batch(step * 16, 16, "cpu")   # 16 sequences, and the same shifted by 1
#         loss = model(x, y)                              # forward: how badly does it predict y?
#         loss.backward()                                 # backpropagation: the gradients, p.grad
#         nn.utils.clip_grad_norm_(model.parameters(), 1.0)       # limit the gradients' norm
#         for optimizer in optimizers:
#             for group in optimizer.param_groups:
#                 group["lr"] = get_lr(step, 600, 4e-3, warmup_iters=20)
#             optimizer.step()                            # each parameter moves a little
#             optimizer.zero_grad()                       # or backward() would add to the gradients
#     val_data = TokenLoader("stdlib_py*/stdlib_val_*.bin", T=128)
#     print(evaluate(model, val_data, num_tokens=500_000))
#
# You could train with these lines alone. Everything else in train() is there to be fast, to use
# several GPUs, to monitor the run, and not to lose it.
#
# To be fast, train() uses mixed precision: bf16 where it is exact enough, else fp32. A number has
# some bits for its exponent, which sets its scale, and some for its fraction, which are its digits:
#
#              exponent  fraction   the next number after 1
#     fp32        8         23      1.0000001
#     bf16        8          7      1.008
#
#     bf16     matmuls, which take most of the time (they accumulate in fp32), and activations such
#              as the residual stream
#     fp32     reductions, such as the norms, softmax and the loss; RoPE; the parameters, their
#              gradients, and the optimizer state
#
# PyTorch's autocast casts the inputs of each matmul to bf16, the fp32 weights included.
#
# Why not keep the parameters in bf16? Weights have a standard deviation of 0.02, and a step changes
# them by about 0.2 lr. At d12's peak rate, 2.4e-3, that is 0.0005, or 2.4% of a weight. A thousand
# steps before the end it is 0.2%. Neighboring bf16 numbers are 0.4 to 0.8% apart, so large updates
# would be rounded coarsely, and small ones mostly rounded away.

def train(args, signals=()):
    """One training run. args: the settings, from parse_args(). Returns whether it was stopped.

    signals: a list to which Ctrl-C and SIGTERM append; once it is not empty, the run stops.
    """
    start_time = time.time()
    folder = Path(args.output_dir)
    if folder.exists() and not args.resume:
        sys.exit(f"error: {folder} exists: add --resume to continue its run, choose another "
                 f"--output_dir, or delete it")

    # ---- The process. torchrun starts one process per GPU, all running this file, and gives each
    # its rank among world_size processes. Without torchrun there is one process, rank 0.
    rank, world_size, device = start_process(args.device)
    # `with autocast:` turns on mixed precision
    dtype = args.dtype or pick_dtype(device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")

    # ---- The data: one loader to train on, one of held-out text.
    T = args.sequence_length
    train_data, val_data = open_data(args)
    tokenizer = tokenizer_name(train_data.vocab_size)  # "bytes" or "gpt2"

    # ---- The model and its optimizers. Resuming restores both, and the step, from last.pt. Every
    # rank draws the same random numbers, so all of them start with the same weights.
    model = make_model(args, train_data.vocab_size, device)
    optimizers = make_optimizers(model, args.optimizer, args.learning_rate, args.weight_decay,
                                 dtype)
    first_step, val_loss, best_val_loss = 0, math.inf, math.inf
    if args.resume and (folder / "last.pt").exists():
        first_step, val_loss, best_val_loss = load_run(args, model, optimizers, train_data)
    require_same({"step": first_step, "sequences": train_data.total, "dtype": dtype})

    # ---- Gradient accumulation. d12's batch of 512 sequences does not fit a GPU at once. Each rank
    # takes an equal share of it and processes the share in micro-batches of batch_size sequences,
    # whose gradients add up. One GPU that fits 32 sequences takes 16 micro-batches per step
    # (grad_accum_steps); two such GPUs take 8 each.
    compiled = device.type == "cuda" if args.compile is None else args.compile
    batch_size = pick_batch_size(args, model, device, dtype, compiled, world_size)
    sequences_per_rank = args.total_batch_size // (T * world_size)
    grad_accum_steps = sequences_per_rank // batch_size

    # ---- torch.compile turns the model's Python into fused kernels, functions that run on the GPU,
    # so that intermediate results need not travel to its memory and back. It does so at the first
    # call, which takes a minute. dynamic=False: for fixed shapes.
    if compiled:
        model.compile(dynamic=False)

    # ---- DDP, distributed data parallel. Each GPU has a copy of the model and a share of the
    # batch. While backward() still runs, the gradients are all-reduced: every rank gets their mean
    # over all ranks, and every copy takes the same step. Only last digits differ from one GPU's.
    ddp_model = model
    if world_size > 1:
        ddp_model = nn.parallel.DistributedDataParallel(model)

    # ---- The run's folder. This fails if another run created it in the meantime.
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=args.resume)
    write_log(folder, f"s:{first_step} command:{args.command}")
    print_header(args, model, train_data, batch_size, grad_accum_steps, device, dtype, compiled)

    def save(name, steps):
        """Saves a model that has taken so many steps."""
        state = {"config": asdict(model.config), "model": model.state_dict(), "step": steps,
                 "tokenizer": tokenizer, "val_loss": val_loss}
        if name == "last.pt":
            # what resuming needs; the position in the data follows from the step
            state["optimizer"] = [optimizer.state_dict() for optimizer in optimizers]
            state |= {"best_val_loss": best_val_loss, "args": vars(args),
                      "num_sequences": train_data.total}
        save_checkpoint(folder / name, state)

    # ---- The training loop. One extra iteration evaluates the final weights.
    stopped = False
    for step in range(first_step, args.num_iterations + 1):
        last = step == args.num_iterations

        # Once in a while: how good is the model on held-out text? At step 0 it should be near ln V.
        # tiny begins lower, at 5.22, because bytes do repeat, as its tied embeddings predict.
        if last or (args.val_loss_every > 0 and step % args.val_loss_every == 0):
            model.eval()  # matters only if you add dropout
            with autocast:
                val_loss = evaluate(model, val_data, args.val_tokens, batch_size)
            print0(f"step {step:5d}/{args.num_iterations} | val loss {val_loss:.6f}")
            write_log(folder, f"s:{step} tel:{val_loss:.8g}")
            # NaN ends the run here, before it could replace the last good weights
            require_finite(f"validation loss at step {step}", val_loss, folder)
            # best.pt: the weights with the lowest validation loss. last.pt: all to resume from.
            if val_loss < best_val_loss:
                best_val_loss = val_loss
                save("best.pt", step)
            save("last.pt", step)
            # read what it generates: no loss tells you that it only repeats itself
            print_sample(model, tokenizer, args, step)
        if last:
            break

        # Forward and backward, one micro-batch after the other; gradients add up in p.grad.
        t0 = time.time()
        model.train()
        train_loss = torch.zeros((), device=device)
        for micro_step in range(grad_accum_steps):
            # --overfit_single_batch tests a new model: it must be able to memorize one batch
            data_step = 0 if args.overfit_single_batch else step
            # each rank takes a contiguous share of the step's sequences
            first = (data_step * world_size + rank) * sequences_per_rank + micro_step * batch_size
            x, y = train_data.batch(first, batch_size, device)
            if world_size > 1:
                # a switch of DDP's: all-reduce only in the last backward() of the step
                ddp_model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
            with autocast:
                loss = ddp_model(x, y)
            # The loss is a mean over the micro-batch, and we want the mean over the whole batch,
            # but backward() only adds: without this division the gradient of 16 micro-batches would
            # be 16 times too large.
            loss = loss / grad_accum_steps
            # detach(): the number without the graph of operations that computed it
            train_loss += loss.detach()
            loss.backward()

        # Clip: if the norm of all gradients, taken as one long vector, exceeds 1, scale them to
        # norm 1. Early on most gradients are clipped, so all of them count equally in the moments.
        # Later it is insurance: one odd batch may have a gradient many times as large, which would
        # dominate the moments for ten or twenty steps. norm is the one before clipping.
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)

        # The step itself.
        lr = get_lr(step, args.num_iterations, args.learning_rate, args.warmup_iters, args.schedule)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()

        # Python runs ahead of a GPU, which works through a queue of kernels. .item() waits until
        # the queue is empty, and only then does the clock show how long the step took. Each .item()
        # leaves the GPU idle for a moment, so call it once per step.
        train_loss = train_loss.item()
        # Every rank learns the mean loss, and how many signals have come: if one rank was told to
        # stop, all of them stop after the same step.
        loss_sum, num_signals = all_sum([train_loss, len(signals)], device)
        train_loss = loss_sum / world_size
        seconds = time.time() - t0
        # NaN would stay in the weights forever. End the run before they are saved.
        require_finite(f"loss at step {step}", train_loss, folder)
        require_finite(f"gradient norm at step {step}", norm, folder)

        # Log every step, and print some of them.
        write_log(folder, f"s:{step} trl:{train_loss:.8g} lr:{lr:.8g} norm:{norm:.8g} "
                          f"ms:{1000 * seconds:.8g}")
        if step % args.log_every == 0 or step + 1 == args.num_iterations:
            print_step(args, step, train_loss, lr, norm, seconds, model, world_size)

        # Told to stop? Save without validating, because a scheduler may kill within half a minute.
        if num_signals > 0:
            save("last.pt", step + 1)
            stopped = True
            break

    print_end(args, step, stopped, best_val_loss, time.time() - start_time, tokenizer, device)
    return stopped


# =================================================================================================
# PART II: WHAT PART I CALLS

# Where to change what:
#     the model                  a field of GPTConfig, which becomes a flag. Old checkpoints get its
#                                default, so let the default be the old behavior
#     training                   a flag in parse_args()
#     the optimizer              make_optimizers(); self.state[p] is saved and restored
#     one group's learning rate  make_optimizers(), and the loop where it sets group["lr"]
#     an average of the weights  evaluate() and save() it in the loop, restore it in load_run()
#     dropout                    seed it with the step, or a resumed run is another run
#     a tokenizer                fineweb.VOCAB_SIZE and load_tokenizer()

# -------------------------------------------------------------------------------------------------
# 7. The machine

def pick_device(name=None, local_rank=0):
    """The torch.device to run on: the named one, or else the first of cuda, mps and cpu."""
    if name is None:
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else name
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)


def start_process(device_name):
    """Returns this process's rank, world_size (the number of processes), and its device.

    A process that torchrun started joins the others; any other process is alone.
    """
    rank, local_rank, world_size = 0, 0, 1
    if dist.is_torchelastic_launched():
        names = "RANK", "LOCAL_RANK", "WORLD_SIZE"
        rank, local_rank, world_size = (int(os.environ[name]) for name in names)
    device = pick_device(device_name, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # fp32 matmuls may round their inputs to TF32, which has 3 digits: several times as fast
        torch.set_float32_matmul_precision("high")
    if world_size > 1:
        # NCCL connects GPUs, gloo connects CPUs. The others wait for a rank that hangs for up to an
        # hour: rank 0 may be writing a large checkpoint to a slow disk.
        backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        hour = datetime.timedelta(hours=1)
        dist.init_process_group(backend, timeout=hour, device_id=device_id)
    return rank, world_size, device


def this_process():
    """This process's rank and world_size: 0 and 1, unless torchrun started several."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def print0(text):
    """Prints from rank 0 only, or eight processes would say everything eight times."""
    if this_process()[0] == 0:
        # a closed terminal is no reason to lose the run
        with contextlib.suppress(OSError):
            print(text, flush=True)


def all_sum(values, device):
    """Sums a list of numbers over all processes, element by element."""
    if not dist.is_initialized():
        return values
    values = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return values.tolist()


def require_same(value):
    """Ends the run if the ranks' values differ, because training would silently go wrong."""
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        if any(other != value for other in values):
            sys.exit(f"error: ranks differ: {values}: every machine needs the same flags, the same "
                     f"shards, and the same last.pt in --output_dir")


def pick_dtype(device):
    """The string "bfloat16" if the hardware has instructions for it, else "float32"."""
    native = False
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        # the names of these instructions on processors of Intel, AMD and ARM
        able = torch.cpu.get_capabilities()
        native = any(able.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    return "bfloat16" if native else "float32"


def pick_batch_size(args, model, device, dtype, compiled, world_size):
    """Sequences per micro-batch: --batch_size, or the largest divisor of a rank's share that fits.
    """
    unit = (args.batch_size or 1) * args.sequence_length * world_size
    if args.total_batch_size % unit:
        sys.exit(f"error: --total_batch_size {args.total_batch_size} must be a multiple of {unit}, "
                 f"which is --batch_size x --sequence_length x processes")
    if args.batch_size:
        return args.batch_size
    tokens = 4096  # enough to keep a CPU busy
    fitting = tokens // args.sequence_length
    share = args.total_batch_size // unit
    return max(n for n in range(1, share + 1) if share % n == 0 and n <= max(1, fitting))


def flops_per_token(model):
    """Floating-point operations to train on one token of a sequence of block_size tokens.

    Each parameter of a matmul takes a multiplication and an addition in the forward pass, and twice
    as many in the backward pass, for the gradients of the parameter and of its input: 6 in all. An
    embedding that is only looked up takes none. In each layer, q k^T and the weighted average of
    the values take 12 C T more (PaLM, https://arxiv.org/abs/2204.02311, appendix B, which also
    counts the masked half). For d12 that is 6 * 116.5M + 12 * 12 * 768 * 1024 = 812 million, so
    4.26e14 per step. An H100's peak in bf16 is 989e12 per second; 40 to 60% of it is good.
    """
    c = model.config
    lookups = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    matmuls = (set(model.parameters()) - lookups) | {model.lm_head.weight}
    num_params = sum(p.numel() for p in matmuls)
    return 6 * num_params + 12 * c.n_layer * c.n_embd * c.block_size


def open_data(args):
    """Two TokenLoaders: the shards to train on, and those to validate on."""
    rank, world_size = this_process()
    # One process makes the default corpus while the others wait; then they find it.
    if rank > 0:
        dist.barrier()
    pattern = args.input_bin or fineweb.stdlib_corpus()
    if rank == 0 and world_size > 1:
        dist.barrier()
    T = args.sequence_length
    folder_and_name = pattern.rpartition("_train_")[0]
    train_data = TokenLoader(pattern, T, args.seed)
    val_data = TokenLoader(f"{folder_and_name}_val_*.bin", T)
    for data, needed in (train_data, args.total_batch_size // T), (val_data, 1):
        if data.total < needed:
            sys.exit(f"error: {data.paths[0]}: {data.total} sequences of {T} tokens, {needed} are "
                     f"needed: a smaller --total_batch_size or --sequence_length, or more text")
        if data.vocab_size != train_data.vocab_size:
            sys.exit(f"error: {data.paths[0]} has {data.vocab_size} ids, and the training shards "
                     f"have {train_data.vocab_size}: make both with the same tokenizer")
    return train_data, val_data


def make_model(args, vocab_size, device):
    """The GPT that the flags ask for, with random weights, or the model in --init_from."""
    names = [field.name for field in fields(GPTConfig)]
    config = {name: getattr(args, name) for name in names if name in args}
    config |= {"block_size": args.sequence_length, "vocab_size": vocab_size}
    if args.init_from:
        checkpoint = load_checkpoint(args.init_from)
        config = checkpoint["config"]
        if config["vocab_size"] != vocab_size:
            sys.exit(f"error: {args.init_from} has {config['vocab_size']} ids, and the shards have "
                     f"{vocab_size}: make shards with its tokenizer")
    torch.manual_seed(args.seed)
    try:
        # `with device:` creates the weights in place; a CPU is slow at a billion random numbers
        with device:
            model = GPT(GPTConfig(**config))
    except ValueError as e:
        sys.exit(f"error: {e}")
    if args.init_from:
        model.load_state_dict(checkpoint["model"])
    return model


# -------------------------------------------------------------------------------------------------
# 8. A run: its log, checkpoints, and how it stops

def require_finite(name, value, folder):
    """Ends the run if value is NaN or infinite, because no later step can repair the weights."""
    if not math.isfinite(value):
        sys.exit(f"error: the {name} is {value}: if you changed the model, look there first; else "
                 f"resume from {folder}/last.pt with a lower --learning_rate")


def write_log(folder, line):
    """Appends a line to main.log, in llm.c's format, such as s:250 tel:6.171

    s is the step, trl the training loss, tel the validation loss. After a crash the steps since
    last.pt are repeated and logged again: the later line counts.
    """
    if this_process()[0] == 0:
        with open(folder / "main.log", "a", encoding="utf-8") as f:
            f.write(line + "\n")


def save_checkpoint(path, state):
    """Writes state so that at any moment path is one whole checkpoint, the old or the new one."""
    if this_process()[0] == 0:
        tmp = Path(f"{path}.tmp")
        with open(tmp, "wb") as f:
            torch.save(state, f)
            f.flush()
            # The bytes have to reach the disk before the name points at them, or a power failure in
            # between would leave a name without a checkpoint.
            os.fsync(f.fileno())
        os.replace(tmp, path)


def load_checkpoint(path):
    """The dictionary that save_checkpoint() wrote."""
    try:
        # weights_only: a checkpoint is data and may come from anybody; never run code from it
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # a dozen kinds, and torch does not name the file
        reason = f"{type(e).__name__}: {e}".splitlines()[0]
        sys.exit(f"error: {path} cannot be read as a checkpoint: {reason}")


def load_run(args, model, optimizers, train_data):
    """Restores last.pt. Returns its step, and its last and its lowest validation loss.

    Settings are those of the new command. Where one of them must not change, the run ends; the
    others that did change are printed.
    """
    path = Path(args.output_dir, "last.pt")
    checkpoint = load_checkpoint(path)
    stored = checkpoint["args"]
    differ = {name: value for name, value in vars(args).items() if value != stored.get(name)}
    # the position in the data depends on two of these, the optimizer state on the third
    fixed = [name for name in ("total_batch_size", "seed", "optimizer") if name in differ]
    if checkpoint["config"] != asdict(model.config):
        fixed.append("the model")
    if checkpoint["step"] > args.num_iterations:
        fixed.append("num_iterations")
    if fixed:
        sys.exit(f"error: {path} needs the {', '.join(fixed)} it began with: {stored['command']}")
    notes = [f"--{name} {value} (was {stored.get(name)})" for name, value in differ.items()
             if name not in ("command", "resume", "output_dir")]
    if checkpoint.get("num_sequences") != train_data.total:
        notes.append("the training data (some of it will be read twice, and some not at all)")
    if notes:
        print0(f"NOTE: other than before: {', '.join(notes)}")
    model.load_state_dict(checkpoint["model"])
    for optimizer, before in zip(optimizers, checkpoint["optimizer"], strict=True):
        # only the moments: settings such as weight decay are those of the flags
        optimizer.load_state_dict(optimizer.state_dict() | {"state": before["state"]})
    return checkpoint["step"], checkpoint["val_loss"], checkpoint["best_val_loss"]


def print_header(args, model, train_data, batch_size, grad_accum_steps, device, dtype, compiled):
    """Prints the command and what it means on this machine."""
    T = args.sequence_length
    num_params = sum(p.numel() for p in model.parameters())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print0(f"{args.command}\n{model.config}\n"
           f"model {num_params:,} parameters, {flops_per_token(model) / 1e6:,.1f} MFLOP per token\n"
           f"device {name}, {dtype}{', compiled' if compiled else ''}\n"
           f"step {args.total_batch_size:,} tokens = {batch_size} sequences x {T} tokens x "
           f"{grad_accum_steps} micro-batches x {this_process()[1]} processes\n"
           f"data {Path(train_data.paths[0]).parent}: {train_data.total * T:,} tokens per epoch, "
           f"{args.num_iterations * args.total_batch_size:,} in this run")
    if device.type == "cpu" and args.device is None and args.model != "tiny":
        print0("NOTE: PyTorch sees no GPU, and a CPU takes minutes per step for such a model")


def print_step(args, step, loss, lr, norm, seconds, model, world_size):
    """Prints a line about a step that took so many seconds. TFLOP/s are per GPU."""
    tokens_per_second = args.total_batch_size / seconds
    tflops = tokens_per_second * flops_per_token(model) / world_size / 1e12
    minutes_left = seconds * (args.num_iterations - step - 1) / 60
    print0(f"step {step:5d}/{args.num_iterations} | loss {loss:.6f} | lr {lr:.2e} | "
           f"norm {norm:.4f} | {1000 * seconds:.1f} ms | {tokens_per_second:,.0f} tok/s | "
           f"{tflops:.3g} TFLOP/s | {minutes_left:.1f} min left")


def print_end(args, step, stopped, best_val_loss, seconds, tokenizer, device):
    """Prints how the run ended and what to type next."""
    if device.type == "cuda":
        print0(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    if stopped:
        print0(f"stopped after {step + 1} steps; all of them are saved. To continue:\n"
               f"    {args.command}{'' if args.resume else ' --resume'}")
        return
    best = Path(args.output_dir, "best.pt")
    print0(f"done in {seconds:.0f} s. Lowest validation loss {best_val_loss:.4f}: {best}")
    script = "hellaswag.py -m" if tokenizer == "gpt2" else "train_gpt2.py --sample"
    print0(f"Next:\n    python {script} {shlex.quote(str(best))}")


def catch_signals():
    """Returns a list to which Ctrl-C and SIGTERM append from now on, instead of ending the run."""
    signals = []

    def note(number, frame):
        signals.append(number)
        # a second Ctrl-C ends the program immediately
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # os.write, because the signal may interrupt a print(). The reader of our output may be
        # gone: Ctrl-C also ends the tee behind a pipe.
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this step; press Ctrl-C again to stop immediately\n")

    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, note)
    return signals


# -------------------------------------------------------------------------------------------------
# 9. A trained model

def load_model(path, device):
    """A checkpoint's model in eval mode, and the name of its tokenizer."""
    checkpoint = load_checkpoint(path)
    model = GPT(GPTConfig(**checkpoint["config"])).to(device)
    model.load_state_dict(checkpoint["model"])
    return model.eval(), checkpoint["tokenizer"]


def tokenizer_name(vocab_size):
    """The name of the tokenizer with this vocabulary size, which is all that shards know."""
    for name, size in fineweb.VOCAB_SIZE.items():
        if size == vocab_size:
            return name
    sys.exit(f"error: the shards have a vocabulary of {vocab_size} ids, and no tokenizer has that "
             f"many: add yours to fineweb.VOCAB_SIZE and to load_tokenizer() in train_gpt2.py")


def load_tokenizer(name):
    """Returns encode: text -> list of ids, and decode: list of ids -> text."""
    if name == "bytes":
        return lambda text: list(text.encode()), lambda ids: bytes(ids).decode(errors="replace")
    import tiktoken  # here, because the default run does not need it

    try:
        bpe = tiktoken.get_encoding(name)  # downloads the vocabulary, 1.5 MB, once
    except OSError:
        raise OSError("GPT-2's vocabulary is not here: go online once, or set TIKTOKEN_CACHE_DIR "
                      "to a folder that has it") from None
    return bpe.encode_ordinary, bpe.decode


@torch.no_grad()
def generate(model, ids, max_new_tokens, temperature=0.8, top_k=50, generator=None):
    """Yields up to max_new_tokens ids that continue the list ids; stops before <|endoftext|>.

    temperature: below 1 favors likely ids, above 1 flattens the distribution. top_k: sample only
    from the k likeliest ids. Without it, one of 50,000 unlikely ids is sampled now and then, and
    the text derails. Recomputes the whole sequence for each token: a KV cache would be faster but
    much more code.
    """
    x = torch.tensor([ids], device=model.lm_head.weight.device)  # (1, T)
    for _ in range(max_new_tokens):
        # only the last position predicts what comes next
        logits = model(x[:, -model.config.block_size :])[:, -1]  # (1, V)
        kth_best = torch.topk(logits, min(top_k, logits.size(-1))).values[:, -1:]  # (1, 1)
        logits = logits.masked_fill(logits < kth_best, -math.inf)
        p = F.softmax(logits / temperature, dim=-1)
        token = torch.multinomial(p, num_samples=1, generator=generator)  # (1, 1)
        # in every vocabulary <|endoftext|> is the last id
        if token.item() == model.config.vocab_size - 1:
            return
        yield token.item()
        x = torch.cat((x, token), dim=1)


# what samples begin with, by tokenizer
PROMPTS = {"bytes": "def ", "gpt2": "Hello, I'm a language model,"}


def sample(model, tokenizer, prompt=None, seed=0, max_new_tokens=200, **options):
    """The prompt and the model's continuation, as text.

    tokenizer: its name, as load_model() returns it. options: temperature and top_k of generate().
    """
    encode, decode = load_tokenizer(tokenizer)
    if prompt is None:
        prompt = PROMPTS[tokenizer]
    # in training every document begins with <|endoftext|>, so the prompt does as well
    ids = [model.config.vocab_size - 1, *encode(prompt.removeprefix("<|endoftext|>"))]
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(seed)
    new_ids = generate(model, ids, max_new_tokens, generator=generator, **options)
    return prompt + decode(list(new_ids))


def print_sample(model, tokenizer, args, step):
    """Prints a sample during training, from rank 0."""
    if this_process()[0] == 0:
        try:
            # not compiled: torch.compile would compile again for every length
            with torch.compiler.set_stance("force_eager"):
                text = sample(model, tokenizer, args.prompt, args.seed + step)
            print0(f"--- a sample after {step} steps\n{text}\n---")
        except OSError as e:  # a machine without a network can still train
            print0(f"no sample: {e}")


# -------------------------------------------------------------------------------------------------
# 10. The command line

def parse_args(argv):
    """Returns the settings. Typed flags win over --arch, then --recipe, then the preset."""
    show_as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=show_as_written)
    # one line; argparse would print a page of usage before it
    parser.error = lambda message: sys.exit(f"error: {message}; see --help")
    add = parser.add_argument
    on_off = argparse.BooleanOptionalAction  # makes --qk_norm and --no-qk_norm

    add("--model", choices=PRESETS, default="tiny", help="a preset [%(default)s]")
    add("--arch", choices=["variant", "gpt2"], default="variant", help="gpt2: all switches off")
    add("--recipe", choices=["today", "original"], default="today", help="original: AdamW, cosine")
    add("--optimizer", choices=["muon", "adamw"], default="muon", help="for the blocks' matrices")
    add("--schedule", choices=["wsd", "cosine"], default="wsd", help="of the learning rate")
    add("--learning_rate", type=float, help="the peak; default: the preset's")
    # the fields of GPTConfig, but block_size is --sequence_length, and the data has a vocab_size
    shape = {field.name: field.default for field in fields(GPTConfig)}
    del shape["block_size"], shape["vocab_size"]
    for name, value in (shape | DEFAULTS).items():
        how = {"action": on_off} if isinstance(value, bool) else {"type": type(value)}
        add(f"--{name}", **how, help=f"see GPTConfig and DEFAULTS [{value}]")
    add("--output_dir", help="folder for main.log, last.pt and best.pt; default: the preset's")
    add("--resume", action="store_true", help="continue from last.pt, if there is one")
    add("--init_from", metavar="CHECKPOINT", help="fine-tune this model; its shape wins")
    add("--overfit_single_batch", action="store_true", help="train on the first batch only")
    add("--device", choices=["cuda", "mps", "cpu"], help="default: the first of these there is")
    add("--dtype", choices=["bfloat16", "float32"], help="default: bfloat16 where it is native")
    add("--compile", action=on_off, help="torch.compile; default: on a GPU")
    add("--prompt", help="what samples begin with")
    add("--sample", metavar="CHECKPOINT", help="do not train; print text that it generates")

    typed = parser.parse_args(argv)
    defaults = shape | DEFAULTS | PRESETS[typed.model]
    if typed.recipe == "original":
        defaults |= ORIGINAL
        defaults["learning_rate"] /= 2
    if typed.arch == "gpt2":
        defaults |= GPT2 | {"n_kv_head": typed.n_head or defaults["n_head"]}
    if typed.num_iterations is not None:
        # a short run should not be all warmup
        defaults["warmup_iters"] = min(defaults["warmup_iters"], typed.num_iterations // 10)
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    args.command = shlex.join(["python", "train_gpt2.py", *argv])
    return args


def main(argv):
    """Does what the command line asks for. Returns the exit code."""
    args = parse_args(argv)
    if args.sample is not None:
        model, tokenizer = load_model(args.sample, pick_device(args.device))
        print(sample(model, tokenizer, args.prompt, args.seed))
        return 0
    signals = catch_signals()
    stopped = train(args, signals)
    if dist.is_initialized():
        dist.destroy_process_group()
    # a program that a signal ended has the exit code 128 + the signal's number
    return 128 + signals[0] if stopped and signals else 0


if __name__ == "__main__":
    # a character of a sample that the terminal lacks becomes a "?"
    sys.stdout.reconfigure(errors="replace")
    sys.exit(main(sys.argv[1:]))

"""
How GPT-2 is trained, and how you would train it today: one file, to be read from top to bottom.

A language model reads text and predicts what comes next. It sees text as a sequence of integers,
the token ids. A token is a byte, or a string of bytes that occurs often, such as a common word. At
each position the model assigns every id in its vocabulary a score, the logit. Softmax turns the
logits z into probabilities, exp(z) / sum(exp(z)). The loss at a position is -log p(the next id),
the cross-entropy, in nats because the logarithm is natural:
    0       the model was certain and right
    5.5     it gave equal probability to the 257 ids of a byte-level vocabulary, the 256 bytes and
            a special token, <|endoftext|>, before each document: ln 257 = 5.5
    10.8    it gave equal probability to the 50,257 ids of GPT-2's vocabulary: ln 50,257 = 10.8
    3.3     a trained GPT-2 124M. Its perplexity is e^3.3 = 27: on average it is as uncertain as if
            it guessed among 27 equally likely ids
Training lowers the mean loss by gradient descent. Each step runs the model on a batch of text,
computes the loss's gradient with respect to every parameter (or weight) and moves each one a little
against its gradient. Nobody has to label anything: the target at each position is the next token.

Part I is the algorithm: the model, the loss, the data, the optimizer, the hyperparameters (settings
that are chosen, not learned), and the training loop. Part II holds the functions part I calls:
device selection, checkpoints (the model's parameters in a file), generation, and the command line.

Letters and words in comments:
    B   batch size: how many sequences are processed in parallel
    T   sequence length; t is a position in a sequence ("time")
    C   channels: the width of the vector at each position (n_embd)
    D   the width of one attention head, C / n_head
    V   vocabulary size, the number of different ids
    fp32, bf16   32-bit and 16-bit floating-point numbers. bf16 has fp32's range but only 2 to 3
                 decimal digits; it takes half the memory, and hardware that supports it multiplies
                 matrices several times as fast
    tiny         a byte-level model for a laptop: 4 layers, 128 channels
    d12, d24     two of GPT-2's sizes: 12 layers with 768 channels, 24 layers with 1024

Launch it:
    python train_gpt2.py                        trains tiny on Python's standard library, in minutes
    python train_gpt2.py --sample logtiny/best.pt --prompt "def "       generates text
    python fineweb.py                           downloads FineWeb, 10 billion tokens of web pages
    python train_gpt2.py --model d12 --resume   trains d12 on FineWeb, or resumes after a crash
    torchrun --standalone --nproc_per_node=8 train_gpt2.py --model d12 --resume      on eight GPUs

The model is a variant of GPT-2 with six changes that later models made standard: RMSNorm, rotary
position embeddings, grouped-query attention, QK-norm, SwiGLU, and no biases. Each is explained
where it is built. Each has a switch, and --arch gpt2 sets all of them back to 2019. Names such as
wte and c_proj are GPT-2's own, and flags are named as in llm.c, GPT-2 training in C
(https://github.com/karpathy/llm.c). report/one_step.py prints one training step with its numbers.
"""

import argparse
import contextlib
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

# ids -> vectors -> blocks -> logits for the next id. With d12 and 4 sequences of 1024 tokens:
#     idx                    (4, 1024)             token ids
#     wte                    (4, 1024, 768)        one vector per token: the residual stream x
#     in each of 12 blocks:
#         q                  (4, 1024, 12, 64)     attention: 12 heads of 64 channels
#         k, v               (4, 1024, 6, 64)      half as many heads
#         attention          (4, 1024, 768)        the heads, concatenated, projected, added to x
#         gate, up           (4, 1024, 2048)       MLP: hidden width 8/3 of 768
#         MLP                (4, 1024, 768)        added to x
#     ln_f                   (4, 1024, 768)        the final norm
#     lm_head                (4, 1024, 50304)      a logit per id, padded to a multiple of 64
#     loss                   scalar                the mean over 4096 predictions

@dataclass
class GPTConfig:
    """A model's shape. Raises ValueError unless the sizes divide evenly."""

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
            # half of n_head, or n_head itself if that is odd (d48 has 25)
            self.n_kv_head = self.n_head // 2 if self.n_head % 2 == 0 else self.n_head
        # RoPE needs an even head width because it rotates pairs of channels
        if self.n_embd % (2 * self.n_head) or self.n_head % self.n_kv_head:
            raise ValueError(f"n_embd must be a multiple of 2 n_head, n_head of n_kv_head: {self}")


class RMSNorm(nn.Module):
    """Divides each vector by its root mean square (RMS) and scales each channel by a learned gain.

    x (..., dim) -> same shape and dtype (https://arxiv.org/abs/1910.07467). Every block adds to the
    vectors, so their entries grow from block to block. Attention and MLP therefore each read a
    normalized copy with RMS near 1. GPT-2's LayerNorm also subtracts the mean and adds a bias, and
    its linear layers add biases as well; none of this turned out to be necessary.
    """

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))  # the gain

    def forward(self, x):
        # Sum the squares in fp32, because bf16 is too coarse. The 1e-6 prevents division by zero.
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


# Attention is how a position gathers information from itself and earlier positions: it attends to
# them. Each position computes three vectors: a query q (what it is looking for), a key k (what it
# has to offer), and a value v (what it passes on). A position's scores are the dot products of its
# query with its own key and all earlier keys. Softmax turns the scores into attention weights, and
# the output is the weighted average of the values. So a position attends most to positions whose
# keys match its query.
#
# So far order makes no difference: in the first block, the period after "dog bites man" gets the
# same average as after "man bites dog". Position has to be encoded. GPT-2 adds a learned position
# embedding, one vector per position, to the token's vector. Rotary position embeddings (RoPE,
# https://arxiv.org/abs/2104.09864) instead take the channels of queries and keys in pairs, treat
# each pair as a point in the plane, and rotate it by an angle proportional to the position.
#
# Why rotate? Let R(a) be the rotation by an angle a. Rotating two vectors by the same angle leaves
# their dot product unchanged. Take a query rotated by a and a key rotated by b, and rotate both
# back by a:
#     R(a) q · R(b) k = q · R(b - a) k
# A pair's angle is the position times the pair's frequency, so b - a depends only on the relative
# position: "three tokens ago" looks the same everywhere. Offsets longer than any seen in training
# are unfamiliar to the model, so don't expect it to extrapolate to longer sequences.

def rope_tables(T, D, base=10000.0):
    """cos and sin of every angle, each (T, 1, D/2), to broadcast over the heads.

    Pair i of a head's D channels is (i, i + D/2). At position t it is rotated by
    t * base^(-2i/D) radians. The first, high-frequency pairs tell neighbors apart, and the middle
    ones tell near from far. With D = 64 the last pair turns by only 0.14 radians in 1024
    positions, so it says next to nothing about position.
    """
    frequency = base ** (-torch.arange(0, D, 2).float() / D)  # (D/2,), radians per position
    angle = torch.outer(torch.arange(T).float(), frequency).unsqueeze(1)  # (T, 1, D/2)
    return angle.cos(), angle.sin()


def apply_rope(x, cos, sin):
    """Rotates each channel pair of x, queries or keys (B, T, heads, D), by its position's angle.

        | cos  -sin |   | first  |
        | sin   cos | · | second |      cos and sin are (T, 1, D/2), from rope_tables()
    """
    first, second = x.chunk(2, dim=-1)  # (B, T, heads, D/2) each
    # the tables are fp32, so the products are fp32 as well; cast back to x's dtype
    return torch.cat((cos * first - sin * second, sin * first + cos * second), dim=-1).to(x.dtype)


def causal_attention(q, k, v):
    """softmax(q k^T / sqrt(D)) v, where each position attends to itself and earlier positions.

    q (B, n_head, T, D), k and v (B, n_kv_head, T, D) -> (B, n_head, T, D). Several query heads
    may share one key/value head. In plain PyTorch:

        B, n_head, T, D = q.shape
        k = k.repeat_interleave(n_head // k.size(1), dim=1)     # one per query head:
        v = v.repeat_interleave(n_head // v.size(1), dim=1)     # (B, n_head, T, D)
        scores = q @ k.transpose(2, 3) / math.sqrt(D)           # (B, n_head, T, T)
        mask = torch.ones(T, T).tril().bool()                   # row t, column u: True where u <= t
        scores = scores.masked_fill(~mask, -math.inf)           # the causal mask
        weights = F.softmax(scores, dim=-1)                     # each row sums to 1
        return weights @ v                                      # weighted averages of the values

    The causal mask hides later positions because that is where the targets are: each position
    predicts the next token. With three tokens, one head, and values of 10, 20, and 30:

        scores             masked               weights               output
        1.0   0.3   2.0    1.0   -inf  -inf     1.00   0      0       10.0
        2.0   1.0   0.5    2.0   1.0   -inf     0.73   0.27   0       12.7
        0.0   2.0   1.0    0.0   2.0   1.0      0.09   0.67   0.24    21.5

    Why divide by sqrt(D)? A dot product sums D products. If the entries of q and k are independent
    with mean 0 and variance 1, the variances add up to D, the standard deviation is sqrt(D), and
    the softmax saturates: the largest score takes nearly all the weight. Learning is then slow: the
    derivatives of a softmax, p_i (1 - p_i) and -p_i p_j, vanish when one p is near 1.
    """
    # Flash attention (https://arxiv.org/abs/2205.14135) computes the same result in one kernel (a
    # compiled routine), tile by tile in the GPU's fast on-chip SRAM, so no (T, T) matrix is stored.
    # To inspect the attention weights, assign the plain form to train_gpt2.causal_attention.
    if q.device.type == "cpu":
        # CPUs run this kernel faster in fp32 (tiny: 5 ms instead of 13 on an AMD Zen 4)
        q, k, v = q.float(), k.float(), v.float()
    elif q.dtype == torch.float32:
        # on GPUs, PyTorch's fused fp32 kernel does not support shared key/value heads
        k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
        v = v.repeat_interleave(q.size(1) // v.size(1), dim=1)
    # Autocast (section 6) is off because it would cast the fp32 inputs back to bf16.
    with torch.autocast(q.device.type, enabled=False):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class CausalSelfAttention(nn.Module):
    """Multi-head attention: several heads of D channels attend in parallel.

    One head may attend to the verb and another to the matching bracket. In grouped-query attention
    (https://arxiv.org/abs/2305.13245) query heads share key/value heads: with half as many, query
    heads 0 and 1 share key/value head 0, heads 2 and 3 share head 1, and so on. Why? To generate
    text quickly, programs store the keys and values of all earlier tokens, which never change, in a
    KV cache. Half as many key/value heads halve the cache and save 5% of d12's training compute.
    """

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.n_embd // config.n_head
        kv_dim = config.n_kv_head * self.head_dim
        self.c_q = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.c_k = nn.Linear(config.n_embd, kv_dim, bias=config.bias)
        self.c_v = nn.Linear(config.n_embd, kv_dim, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        norm = RMSNorm if config.qk_norm else nn.Identity  # Identity returns its input
        self.q_norm = norm(self.head_dim)
        self.k_norm = norm(self.head_dim)

    def forward(self, x, rope):
        """x (B, T, C) -> (B, T, C). rope is (cos, sin), each (T, 1, D/2), or None."""
        B, T, C = x.shape
        # split each position's channels into heads of D channels; -1 infers the number of heads
        q = self.c_q(x).view(B, T, -1, self.head_dim)  # (B, T, n_head, D)
        k = self.c_k(x).view(B, T, -1, self.head_dim)  # (B, T, n_kv_head, D)
        v = self.c_v(x).view(B, T, -1, self.head_dim)  # (B, T, n_kv_head, D)
        # QK-norm (https://arxiv.org/abs/2302.05442) scales every q and k to length sqrt(D) while
        # its gains are near 1. q · k is then at most D, and no score exceeds D / sqrt(D), however
        # large c_q and c_k grow at a high learning rate. QK-norm precedes RoPE because its gains
        # differ within a pair: after the rotation they would distort relative positions.
        q = self.q_norm(q)
        k = self.k_norm(k)
        if rope is not None:
            # Values are not rotated: position affects their weights, not the values themselves.
            q = apply_rope(q, *rope)
            k = apply_rope(k, *rope)
        # RoPE expects positions in dimension 1; attention expects (B, heads, T, D).
        y = causal_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        # concatenate the heads, (B, T, C), and let c_proj mix their outputs
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.c_proj(y)


class MLP(nn.Module):
    """Multi-layer perceptron: a nonlinear function applied to each position separately.

    Attention's output is a weighted average of values. Any further computation is up to the MLP.
    GPT-2's MLP widens x to 4C, applies GELU (a smooth ReLU; ReLU is max(x, 0)), and projects back:

        y = c_proj(gelu(c_fc(x)))

    SwiGLU (https://arxiv.org/abs/2002.05202) computes two hidden vectors. One of them, the gate,
    decides how much of the other passes:

        y = c_down(silu(c_gate(x)) * c_up(x))           silu(x) = x * sigmoid(x), also a smooth ReLU

    With a hidden width of 8/3 C, 2/3 of 4C, its three matrices cost as much as GPT-2's two.
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
    """Attention, then the MLP: two sublayers, each of which adds its output to x.

        x ---+----------------------(+)---+----------------(+)---> x
             |                       ^    |                 ^
             +-> ln_1 -> attention --+    +-> ln_2 -> MLP --+

    The x that runs through all blocks is called the residual stream. A sublayer reads a normalized
    copy (pre-norm) and writes by adding. The derivative of x + f(x) is 1 + f'(x), so gradients
    reach the first block directly through these residual connections, and deep models train well.

    GPT-1 had dropout here, x + dropout(attn(...)). Zeroing random activations, the entries of a
    layer's output, keeps a model from overfitting: memorizing text that it reads many times. By
    default our models read no text twice, so they do without.
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
    """The whole model, as in the table at the head of this section."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        # GPUs are slow at dimensions that are not multiples of 64, so 50,257 ids are padded to
        # 50,304. forward() drops the padding logits, so those ids' rows of wte get gradient 0.
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
        # Weight tying (https://arxiv.org/abs/1608.05859): lm_head shares the embedding matrix, so
        # an id's logit is the dot product of the final vector with the id's own row. Ids used in
        # similar contexts get similar rows, which helps at both ends. Untied, d12 would have 155M
        # parameters instead of 116.5M. Untrained, tiny predicts repeats: its blocks add little,
        # so the final vector is nearly the input id's row, whose dot product with itself is the
        # largest. Bytes often repeat, so its loss is 5.22 < ln 257.
        self.lm_head.weight = self.transformer.wte.weight
        self.init_weights()

    def init_weights(self):
        """Initializes every parameter by the name of its layer. The tied lm_head is listed as wte.

        Why a standard deviation of 0.02? Most matrices read vectors with an RMS of 1. An output is
        a sum of C products; at C = 768 its standard deviation is 0.02 * sqrt(768) = 0.55, neither
        huge nor tiny. With weights of standard deviation 1 it would be 28.
        """
        inputs = "wte", "wpe", "c_q", "c_k", "c_v", "c_gate", "c_up", "c_fc"
        for name, p in self.named_parameters():
            layer = name.removesuffix(".weight").split(".")[-1]
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif layer.startswith("ln_") or layer.endswith("_norm"):
                nn.init.ones_(p)
            elif layer in inputs:
                nn.init.normal_(p, std=0.02)
            elif layer in ("c_proj", "c_down"):
                # These 2 * n_layer matrices write into the residual stream. A sum of n independent
                # vectors grows like sqrt(n), so dividing by sqrt(n) keeps depth from enlarging it.
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            else:
                raise ValueError(f"init_weights() has no rule for {name}: add one")

    def forward(self, idx, targets=None):
        """Token ids idx (B, T), T <= block_size -> logits (B, T, V) in fp32.

        With targets (B, T), returns the mean loss instead, a scalar in nats per token. To generate
        text, sample a token from softmax(logits) at the last position, append it, and run the model
        again, as generate() in part II does.
        """
        T = idx.size(1)
        x = self.transformer.wte(idx)  # (B, T, C)
        rope = None
        if self.config.pos == "rope":
            rope = (self.cos[:T], self.sin[:T])
        else:
            x = x + self.transformer.wpe.weight[:T]  # (T, C), the same for every sequence
        if torch.is_autocast_enabled(x.device.type):
            # mixed precision (section 6); in fp32 the residual stream would take twice the memory
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for block in self.transformer.h:
            x = block(x, rope)
        logits = self.lm_head(self.transformer.ln_f(x))  # (B, T, padded V)
        # drop the padding logits; cast to fp32, because bf16 is too coarse for a softmax
        logits = logits[..., : self.config.vocab_size].float()  # (B, T, V)
        if targets is None:
            return logits
        # (B, T, V) -> (B * T, V) and (B, T) -> (B * T,); see section 2
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
# With softmax(z) = (0.7, 0.2, 0.1) and y = 1, the second id, it is (0.7, -0.8, 0.1). A step against
# it pushes each logit down in proportion to its probability, and the target's up. All of training
# comes from this signal.

# -------------------------------------------------------------------------------------------------
# 3. The data

# A corpus is a body of text, stored as token ids in files called shards. fineweb.py makes them and
# explains how text is tokenized. Training reads T + 1 consecutive ids and makes an input x and a
# target y from them:
#
#     text   The   dog   is    a  good  dog     .  The  cat sleeps     .
#     ids    464  3290  318  257   922 3290    13  383 3797  44263    13     11 tokens, so T = 10
#     x      464  3290  318  257   922 3290    13  383 3797  44263           the model's input
#     y     3290   318  257  922  3290   13   383 3797 44263    13           the targets
#
# " The" with its space is not the token "The". y is x shifted by one: at position t the model sees
# x[0] ... x[t] and predicts y[t], which the causal mask hides. One sequence yields T predictions.

class TokenLoader:
    """Loads the sequences of all shards that match a glob pattern, each once per epoch.

    Row i of a shard holds T + 1 tokens, one sequence and its last target:

        chunk = tokens[i * T : i * T + T + 1]
        x, y = chunk[:-1], chunk[1:]

    A shard of n tokens has (n - 1) // T rows; the remainder at its end is never used. Each epoch,
    one pass over all shards, visits the rows in a new random order. A sequence's index counts from
    the start of the run. If shard 0 has 3 rows and shard 1 has 2, an epoch has 5 sequences:

        index          0   1   2   3   4       index 5 begins the next epoch, in a new order
        permutation    3   2   0   4   1       rows 0, 1, 2 are shard 0's; 3 and 4 are shard 1's
        shard          1   0   0   1   0
        row            0   2   0   1   1

    Seed and index determine the row, so there is no state to save: a run resumed at step 1000 reads
    what an uninterrupted run would. Don't upgrade NumPy mid-run: the order may change.

    A row may start mid-document and span several documents, separated by <|endoftext|>. Attention
    crosses the separator, and the model learns to ignore the text before it. A document mask would
    stop attention there; in nanochat (https://github.com/karpathy/nanochat) it lowered the loss by
    0.0002 bits per byte, too little to keep.
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
            # once per epoch; takes half a second and 80 MB for FineWeb's 10B tokens
            self.epoch = epoch
            self.order = np.random.default_rng((self.seed, epoch)).permutation(self.total)
        row = self.order[i]
        # the last shard that starts at or before this row
        shard = np.searchsorted(self.starts, row, side="right") - 1
        return shard, row - self.starts[shard]

    def batch(self, first, count, device):
        """Sequences first ... first + count - 1 of the run: x and y, (count, T) int64 on device."""
        # pinned memory cannot be swapped out, so a GPU copies from it while the CPU moves on
        pinned = "cuda" in str(device)
        tokens = torch.empty((count, self.T + 1), dtype=torch.int64, pin_memory=pinned)
        for i in range(count):
            shard, row = self.locate(first + i)
            # reads only these T + 1 tokens from the disk
            chunk = fineweb.read_tokens(self.paths[shard], row * self.T, self.T + 1)
            if chunk.max() >= self.vocab_size:
                # a GPU's own error message would not name the cause
                sys.exit(f"error: {self.paths[shard]} has ids >= {self.vocab_size}: make it again")
            tokens[i] = torch.from_numpy(chunk)
        tokens = tokens.to(device, non_blocking=pinned)
        # contiguous() copies: shifted views of one tensor gave wrong results on Apple GPUs
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


@torch.no_grad()
def evaluate(model, data, num_tokens, batch_size=16):
    """The mean loss over num_tokens of data, a TokenLoader, in nats per token: the validation loss.

    data is held-out text, which the model never trains on. A model that has only memorized its
    training text does badly on it. Calls with the same data use the same sequences, each only once,
    even if data holds fewer than num_tokens tokens.
    """
    model.eval()  # matters only if you add dropout
    device = next(model.parameters()).device
    num_sequences = max(1, min(num_tokens // data.T, data.total))
    # With several GPUs, each of the world_size processes, numbered by rank, evaluates a share.
    # Weighting by count makes the mean independent of the number of processes and of batch size.
    rank, world_size = this_process()
    begin = num_sequences * rank // world_size
    end = num_sequences * (rank + 1) // world_size
    loss_sum = 0.0
    for first in range(begin, end, batch_size):
        count = min(batch_size, end - first)
        x, y = data.batch(first, count, device)
        loss_sum += model(x, y).item() * count
    return all_sum([loss_sum], device)[0] / num_sequences  # summed over all processes


# -------------------------------------------------------------------------------------------------
# 4. The optimizer

# The gradient g of the loss with respect to a parameter w says how the loss changes with w.
# Stochastic gradient descent (SGD) steps against it, w -= lr * g, where lr is the learning rate. It
# is stochastic because g comes from one batch and is noisy. Momentum replaces g with m, a moving
# average of gradients in which the noise averages out. But one learning rate does not fit all
# parameters: it is too large where gradients are large and too small where they are tiny. Adam
# (https://arxiv.org/abs/1412.6980) divides m by the gradients' RMS, the square root of v, a moving
# average of their squares. m and v are called the first and second moments. AdamW
# (https://arxiv.org/abs/1711.05101) adds decoupled weight decay: it bypasses the moments. Step n:
#
#     m = 0.9 m + 0.1 g        v = 0.95 v + 0.05 g^2
#     w -= lr * (m / (1 - 0.9^n) / (sqrt(v / (1 - 0.95^n)) + eps) + weight_decay * w)
#
#     m              averages the gradient over about 1 / 0.1 = 10 steps.
#     sqrt(v)        makes the update independent of the gradient's scale. A parameter moves by
#                    about lr per step if its gradients agree. If their signs are random, they
#                    nearly cancel in m, and it moves by about 0.2 lr: their coefficients in m are
#                    0.1, 0.09, 0.081, ..., and sqrt(0.1^2 + 0.09^2 + 0.081^2 + ...) = 0.23.
#     1 - 0.9^n      is bias correction. m starts at 0 and is biased toward 0: after one step it is
#                    0.1 g. Dividing by 1 - 0.9^n, which rises from 0.1 to 1, corrects this bias.
#                    v is corrected the same way.
#     eps            prevents a division by 0.
#     weight_decay   pulls weights slightly toward 0, so unneeded weights fade.
#
# Muon (https://kellerjordan.github.io/posts/muon) is a newer optimizer, for the matrices of the
# blocks. Adam rescales each entry of a gradient on its own; Muon treats the matrix as a whole.
# Every matrix X is a product U S V^T, its singular value decomposition (SVD). The columns of U and
# of V have length 1 and are orthogonal. S is diagonal and contains the singular values. If X is the
# update to a matrix, the matrix's output moves by X times its input: for an input along column i of
# V, along column i of U, by the i-th singular value. A gradient has a few large singular values and
# many small ones: in tiny after 100 steps, the largest is typically 40 times the median. So an SGD
# step moves a matrix along a few of these directions and hardly along the rest. But small does not
# mean unimportant: a small singular value may belong to something rare in the batch that has to be
# learned as well. Muon keeps U and V and moves all singular values close to 1, with
# orthogonalize(). For matrices g and w:
#
#     m = 0.95 m + 0.05 g                         # momentum
#     u = orthogonalize(0.95 m + 0.05 g)          # Nesterov momentum
#     w -= lr * (0.2 sqrt(max(rows, cols)) * u + weight_decay * w)
#
# Nesterov momentum adds the newest gradient once more, because m lags behind. m needs no bias
# correction, because orthogonalize() returns the same for 0.1 g as for g. The factor
# 0.2 sqrt(max(rows, cols)) scales the update's entries to an RMS of 0.2, about that of AdamW's
# updates in practice, so one learning rate serves both (https://arxiv.org/abs/2502.16982).

def orthogonalize(matrices):
    """Returns matrices (n, rows, cols) with all singular values moved close to 1.

    For example:

        X = U S V^T             [[4, 3], [0, 1]]                   singular values 5.04, 0.79
        U V^T                   [[0.86, 0.51], [-0.51, 0.86]]      1, 1
        orthogonalize(X)        [[0.63, 0.34], [-0.54, 0.84]]      0.71, 1.00: not exact, but close

    Computing U, S, V is slow, but matrix products (matmuls) are fast. Because U^T U = V^T V = I,

        X X^T X = (U S V^T) (V S U^T) (U S V^T) = U S^3 V^T

    has the same U and V, and every singular value s has become s^3. X X^T X X^T X has s^5. A
    weighted sum of the three therefore changes only the singular values:

        s -> a s + b s^3 + c s^5

    With the a, b, and c below, five iterations of this map (Newton-Schulz) bring every s between
    1/500 and 1 to between 0.68 and 1.20 and enlarge any smaller s. Muon's post explains a, b, c.
    """
    a, b, c = 3.4445, -4.775, 2.0315
    # X X^T is (rows, rows), so transpose tall matrices to make it as small as possible.
    tall = matrices.size(1) > matrices.size(2)
    X = matrices.mT if tall else matrices
    # Singular values must be at most 1. None exceeds the Frobenius norm, the norm of all entries.
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        # A X is X X^T X, and A A X is X X^T X X^T X
        A = X @ X.mT  # (n, rows, rows)
        B = b * A + c * A @ A
        X = a * X + B @ X
    return X.mT if tall else X


class Muon(torch.optim.Optimizer):
    """Muon for the blocks' matrices. Its author recommends AdamW for embeddings and the head.

    Each group in params holds the matrices of one shape. step() stacks them, because one batched
    matmul is faster than many small ones: torch.optim.Muon loops over the matrices and takes 1.6
    times as long for tiny on 2 CPU cores. dtype is the precision of the matmuls: bf16 is precise
    enough, but slow without native support.
    """

    def __init__(self, params, lr, weight_decay, dtype, momentum=0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            momentum = group["momentum"]
            updates = []
            for p in group["params"]:
                if p not in self.state:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                m = self.state[p]["momentum_buffer"]
                # a.lerp(b, w) is (1 - w) a + w b, so this is m = 0.95 m + 0.05 g
                m.lerp_(p.grad, 1 - momentum)
                # Nesterov: 0.95 m + 0.05 g, with the new m
                updates.append(p.grad.lerp(m, momentum).to(self.dtype))
            orthogonal = orthogonalize(torch.stack(updates))  # (n, rows, cols)
            # U V^T's rows (columns, if tall) have length 1 as well, so its RMS is
            # 1 / sqrt(max(rows, cols))
            orthogonal = orthogonal * (0.2 * math.sqrt(max(orthogonal.shape[1:])))
            for p, u in zip(group["params"], orthogonal, strict=True):
                # weight decay as in AdamW, then the step
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(u, alpha=group["lr"])


def make_optimizers(model, optimizer="muon", learning_rate=4e-3, weight_decay=0.1,
                    dtype="float32"):
    """A list of optimizers, which together hold every trainable parameter exactly once.

    "muon": Muon for the matrices of the blocks, AdamW for the rest. "adamw": AdamW for everything.
    Memory per parameter: 4 bytes, 4 for its gradient, and 8 for AdamW's two moments or 4 for Muon's
    one (the optimizer state). d24's 330M parameters take 4.2 GB in all.
    """
    matrices = {}  # by shape
    decayed = []
    vectors = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.dim() < 2:
            vectors.append(p)
        elif optimizer == "muon" and name.startswith("transformer.h.") and p.dim() == 2:
            matrices.setdefault(p.shape, []).append(p)
        else:
            decayed.append(p)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        # no decay for biases and gains: a bias is only added, and a gain belongs near 1
        {"params": vectors, "weight_decay": 0.0},
    ]
    # betas, the 0.9 and 0.95 above, are GPT-3's (https://arxiv.org/abs/2005.14165). With PyTorch's
    # default of 0.999, v would remember an unusual batch for 1000 steps. fused=True is faster.
    adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)
    if optimizer == "adamw":
        return [adamw]
    if optimizer == "muon":
        groups = [{"params": params} for params in matrices.values()]
        return [adamw, Muon(groups, learning_rate, weight_decay, getattr(torch, dtype))]
    raise ValueError(f"optimizer must be muon or adamw: {optimizer}")


def get_lr(step, num_iterations, learning_rate, warmup_iters=0, schedule="wsd"):
    r"""The learning rate at `step`, out of num_iterations; learning_rate is the peak.

        wsd                        cosine
          ___                        _
         /   \                      / `.
        /      \                   /    `.
       /         \                /        `--.__
        warmup, stable, decay to 0   warmup, decay to a tenth

    Why warm up, here from a tenth of the peak? At first the moments average only a few noisy
    gradients, so full steps are risky. Why decay? Large steps bounce back and forth across a valley
    of the loss, and only small ones descend into it. Compare runs only at their ends: until then, a
    run whose rate is still high looks worse than it is. Our wsd (https://arxiv.org/abs/2404.06395)
    decays in the last 70%, as in train_gpt_simple.py of the NanoGPT speedrun
    (https://github.com/KellerJordan/modded-nanogpt).

    For d12's 19,073 steps the default recipe and --recipe original (section 5) give:

        step                             0         125       10,000    19,072
        --recipe today      (wsd)        2.4e-4    1.3e-3    1.6e-3    1.8e-7
        --recipe original   (cosine)     1.2e-4    3.1e-4    6.5e-4    1.2e-4
    """
    warmup = 0.1 + 0.9 * step / warmup_iters if step < warmup_iters else 1.0
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

# How long is a sequence? A shorter one costs less but limits the context, the text in view.
#
# How many tokens per step? Their mean gradient estimates the gradient over all text. With few
# tokens the estimate is noisy and only small steps are safe. Beyond a critical batch size, more
# tokens help less and less (https://arxiv.org/abs/1812.06162). GPT-3's 125M model used half a
# million, and so do we: 512 sequences of 1024. If you change total_batch_size, scale the peak
# learning rate with its square root, a rule for Adam (https://arxiv.org/abs/2205.10287) that held
# for tiny (report/lab.md, experiment 12), and rescale every setting that counts steps.
#
# How many steps? About 20 tokens per parameter are compute-optimal, the best use of a given compute
# budget (Chinchilla, https://arxiv.org/abs/2203.15556): 2.3 billion for d12, 6.6 billion for d24.
# More tokens still help. 19,073 steps are one epoch of FineWeb's sample of 10 billion tokens.
#
# How high is the peak learning rate? No hyperparameter matters more. d12 to d48 use four times the
# rates of GPT-3's models (6e-4 to 2e-4, table 2.1 of https://arxiv.org/abs/2005.14165) because Muon
# and QK-norm should keep training stable. Only models up to 17.6M parameters were tried
# (report/README.md), so these rates are guesses. For another size, start between its neighbors'
# rates and compare complete short runs at half and twice the rate.
DEFAULTS = dict(
    input_bin="fineweb10B/fineweb_train_*.bin",  # training shards; validation: _val_
    sequence_length=1024,     # T, tokens
    total_batch_size=524288,  # tokens per step
    batch_size=0,             # sequences per micro-batch; 0: as many as are useful and fit the GPU
    num_iterations=19073,     # steps
    warmup_iters=250,         # steps; unless typed, at most a tenth of the run
    weight_decay=0.1,         # as in GPT-3
    grad_clip=1.0,            # maximum norm of the gradient, as in GPT-3; 0: no clipping
    seed=1337,                # for weights, data order, and samples
    val_loss_every=250,       # steps between validations, which also save; 0: only at the end
    val_tokens=10485760,      # tokens per validation
    log_every=1,              # steps per printed line
)
PRESETS = {
    # 0.8M, 116.5M, 330.0M, 719.2M, and 1,560.1M parameters; folders are named after GPT-2's sizes
    "tiny": dict(n_layer=4, n_head=4, n_embd=128, learning_rate=4e-3, output_dir="logtiny"),
    "d12": dict(n_layer=12, n_head=12, n_embd=768, learning_rate=2.4e-3, output_dir="log124M"),
    "d24": dict(n_layer=24, n_head=16, n_embd=1024, learning_rate=1.2e-3, output_dir="log350M"),
    "d36": dict(n_layer=36, n_head=20, n_embd=1280, learning_rate=1e-3, output_dir="log774M"),
    "d48": dict(n_layer=48, n_head=25, n_embd=1600, learning_rate=8e-4, output_dir="log1558M"),
}
# tiny's other settings, found by trial and error. An empty input_bin means the standard library.
PRESETS["tiny"] |= dict(
    input_bin="", sequence_length=128, total_batch_size=2048, num_iterations=600, warmup_iters=20,
    val_loss_every=200, val_tokens=500_000, log_every=20, compile=False,
)
# --arch gpt2: every switch as in 2019, together with n_kv_head = n_head
GPT2 = dict(norm="layernorm", mlp="gelu", pos="learned", bias=True, qk_norm=False)
# --recipe original: how this variant was first trained; parse_args() also halves the learning rate
# (https://github.com/Morris88826/CSCE-689-HW2, the class project that this one follows)
ORIGINAL = dict(optimizer="adamw", schedule="cosine", warmup_iters=715, qk_norm=False)


# -------------------------------------------------------------------------------------------------
# 6. Training

# This is how a GPT is trained. After `from train_gpt2 import *` it is the default run, in fp32:
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
# You could train with these lines alone. Everything else in train() makes the run fast, spreads it
# over several GPUs, monitors it, and protects it from crashes. On a first reading, skip from its
# head to "Gradient accumulation", read that paragraph, and go on at "The training loop".
#
# For speed, train() uses mixed precision: bf16 where it is precise enough, fp32 elsewhere. A
# floating-point number has a sign, an exponent, which sets the scale, and a fraction, the digits:
#
#              exponent  fraction   the next number after 1
#     fp32        8         23      1.0000001
#     bf16        8          7      1.008
#
#     bf16     matmuls, which take most of the time and accumulate in fp32, and most activations
#     fp32     reductions (sums, as in norms, softmax, loss), RoPE, parameters, gradients, moments
#
# PyTorch's autocast casts each matmul's inputs to bf16, the fp32 weights included. Why not keep the
# parameters in bf16? A step changes a weight of about 0.02 by about 0.2 lr: 2.4% at d12's peak rate
# of 2.4e-3, but 0.2% a thousand steps before the end. Neighboring bf16 numbers are 0.4 to 0.8%
# apart, so large updates would be rounded coarsely and small ones mostly lost.

def train(args, signals=()):
    """Trains a model with args, from parse_args().

    signals: a list to which Ctrl-C and SIGTERM append; the run stops once it is not empty.
    """
    start_time = time.time()
    folder = Path(args.output_dir)
    if folder.exists() and not args.resume:
        sys.exit(f"error: {folder} exists: add --resume, choose another --output_dir, or delete it")

    # ---- Join the other processes. torchrun starts one per GPU, all running this file, and assigns
    # each a rank from 0 to world_size - 1. Without torchrun there is one process, rank 0.
    device = start_process(args.device)
    rank, world_size = this_process()
    # `with autocast:` turns on mixed precision
    dtype = args.dtype or pick_dtype(device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")

    # ---- Open the data: one loader for training and one for held-out text.
    train_data, val_data = open_data(args)

    # ---- Build the model and its optimizers. Resuming restores both, and the step, from last.pt.
    # All ranks use the same seed, so they start with the same weights.
    model = make_model(args, train_data.vocab_size, device)
    optimizers = make_optimizers(model, args.optimizer, args.learning_rate, args.weight_decay,
                                 dtype)
    first_step, val_loss, best_val_loss = 0, math.inf, math.inf
    if args.resume and (folder / "last.pt").exists():
        first_step, val_loss, best_val_loss = load_run(args, model, optimizers, train_data)
    require_same({"step": first_step, "sequences": train_data.total, "dtype": dtype})

    # ---- Gradient accumulation splits a step. d12's 512 sequences do not fit on one GPU, so each
    # rank processes an equal share in micro-batches of batch_size sequences, whose gradients add
    # up. At 16 sequences each, one GPU runs 32 micro-batches (grad_accum_steps); two run 16 each.
    compiled = device.type == "cuda" if args.compile is None else args.compile
    batch_size = pick_batch_size(args, model, device, dtype, compiled, world_size)
    sequences_per_rank = args.total_batch_size // (args.sequence_length * world_size)
    grad_accum_steps = sequences_per_rank // batch_size

    # ---- torch.compile turns the model's Python into fused kernels, each doing several operations,
    # so intermediate results need not travel to GPU memory and back. The first call compiles, which
    # takes about a minute; dynamic=False compiles for fixed shapes.
    if compiled:
        model.compile(dynamic=False)

    # ---- DDP, distributed data parallel, runs a copy of the model on each GPU's share of a batch.
    # During backward() an all-reduce averages the gradients over all ranks and gives every rank the
    # result, so every copy takes the same step. Up to rounding it is the step one GPU would take.
    ddp_model = nn.parallel.DistributedDataParallel(model) if world_size > 1 else model

    # ---- Create the run's folder. Without --resume, mkdir() fails if another run has just done so.
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=args.resume)
    write_log(folder, f"s:{first_step} command:{args.command}")
    print_header(args, model, train_data, batch_size, grad_accum_steps, device, dtype, compiled)

    def save(name, steps):
        """Saves a checkpoint of the model after this many steps."""
        state = {"config": asdict(model.config), "model": model.state_dict(), "step": steps,
                 "val_loss": val_loss, "best_val_loss": best_val_loss, "args": vars(args),
                 "num_sequences": train_data.total}
        if name == "last.pt":
            # Resuming also needs the moments. The order of the data and the learning rate follow
            # from the step, and nothing else is random, so with the same flags a resumed run equals
            # an uninterrupted one.
            state["optimizer"] = [optimizer.state_dict() for optimizer in optimizers]
        save_checkpoint(folder / name, state)

    # ---- The training loop. One extra iteration evaluates the final weights.
    for step in range(first_step, args.num_iterations + 1):
        last = step == args.num_iterations

        # Evaluate on held-out text. At step 0 the loss should be near ln V (tiny: 5.22).
        if last or (args.val_loss_every > 0 and step % args.val_loss_every == 0):
            with autocast:
                val_loss = evaluate(model, val_data, args.val_tokens, batch_size)
            print0(f"step {step:5d}/{args.num_iterations} | val loss {val_loss:.6f}")
            write_log(folder, f"s:{step} tel:{val_loss:.8g}")
            # NaN ends the run here, before it can replace the last good weights
            require_finite(f"validation loss at step {step}", val_loss, folder)
            # best.pt: the weights with the lowest loss. last.pt: the newest, and the moments.
            if val_loss < best_val_loss:
                best_val_loss = val_loss
                save("best.pt", step)
            save("last.pt", step)
            # read what it generates: no loss tells you that it only repeats itself
            print_sample(model, args, step)
        if last:
            break

        # Forward and backward run on one micro-batch after another; gradients add up in p.grad.
        t0 = time.time()
        model.train()
        train_loss = torch.zeros((), device=device)
        for micro_step in range(grad_accum_steps):
            # --overfit_single_batch tests a new model: it must be able to memorize one batch
            data_step = 0 if args.overfit_single_batch else step
            # each rank takes a contiguous share of the step's sequences, in micro-batches
            first = (data_step * world_size + rank) * sequences_per_rank + micro_step * batch_size
            x, y = train_data.batch(first, batch_size, device)
            if world_size > 1:
                # DDP should all-reduce only in the last backward() of the step
                ddp_model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
            with autocast:
                loss = ddp_model(x, y)
            # Each loss is a mean over one micro-batch, and backward() adds up the gradients.
            # Dividing by the number of micro-batches makes the sum the mean over the rank's share.
            loss = loss / grad_accum_steps
            # detach() drops the computation graph, the record that backward() follows
            train_loss += loss.detach()
            loss.backward()

        # Gradient clipping: if the norm of all gradients, taken as one vector, exceeds grad_clip,
        # scale them down to norm grad_clip. A factor common to all steps cancels in the optimizers,
        # but one step whose gradient is 10 times as large would dominate v for some 30 steps. norm
        # is the norm before clipping.
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)

        lr = get_lr(step, args.num_iterations, args.learning_rate, args.warmup_iters, args.schedule)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()

        # Python queues kernels and runs ahead of the GPU. .item() waits until the queue is empty,
        # so the clock measures the whole step. Afterward the GPU idles, so wait only once per step.
        # All ranks share the mean loss and the number of signals, so they stop after the same step.
        loss_sum, num_signals = all_sum([train_loss.item(), len(signals)], device)
        train_loss = loss_sum / world_size
        seconds = time.time() - t0
        # NaN would stay in the weights forever, so end the run before they are saved.
        require_finite(f"loss or gradient norm at step {step}", train_loss + norm, folder)

        write_log(folder, f"s:{step} trl:{train_loss:.8g} lr:{lr:.8g} norm:{norm:.8g} "
                          f"ms:{1000 * seconds:.8g}")
        if step % args.log_every == 0 or step + 1 == args.num_iterations:
            print_step(args, step, train_loss, lr, norm, seconds, model, world_size)

        # Told to stop? Save without validating, because a scheduler may kill the job in 30 s.
        if num_signals > 0:
            save("last.pt", step + 1)
            break

    print_end(args, step, last, best_val_loss, time.time() - start_time, device)


# =================================================================================================
# PART II: THE FUNCTIONS THAT PART I CALLS

# Where common changes go:
#     the model                  a field of GPTConfig, which becomes a flag. Old checkpoints get its
#                                default, so make the default the old behavior
#     an attention mask          build it in GPT.forward(): (B, 1, T, T), True where a query may
#                                attend to a key, the causal mask included. Pass it along with rope;
#                                attn_mask replaces is_causal. Leaks lower the loss, so test in one
#                                layer that a token changes no logits at positions it is hidden from
#     an auxiliary loss          return it from Block.forward() with x. In GPT.forward(), add it to
#                                the loss if self.training, to keep validation losses comparable.
#                                Blocks outside transformer.h get AdamW and are not counted as FLOPs
#     a training setting         an entry in DEFAULTS, which becomes a flag; read it in train()
#     frozen weights             requires_grad_(False) in make_model()
#     the order of the data      TokenLoader.locate(), which must depend on the index alone; add new
#                                flags of the data to `fixed` in load_run()
#     batch-size warmup          compute sequences_per_rank and grad_accum_steps in the loop; let
#                                pick_batch_size() divide the smallest step. Then `first` needs a
#                                running count of sequences. Increment it after optimizer.step(),
#                                save it in save(), and restore it in load_run(). Printed rates and
#                                report/plot.py assume equal steps
#     the optimizer              make_optimizers(); self.state[p] is saved and restored. Muon gets
#                                the blocks' 2-D weights; exclude MoE routers and LoRA's
#     one group's learning rate  make_optimizers(), and the loop where it sets group["lr"]
#     weight averaging (EMA)     copy.deepcopy(model) before model.compile(). In the loop, update
#                                the copy over parameters(): state_dict() lists a tied matrix twice.
#                                Evaluate the copy; save() and load_run() then hold both models
#     dropout                    seed it with the step, or a resumed run differs
#     a tokenizer                load_tokenizer(); <|endoftext|> must have the last id

# -------------------------------------------------------------------------------------------------
# 7. The machine

def pick_device(name=None):
    """The torch.device with this name, or else the machine's accelerator, or else its CPU."""
    gpu = torch.accelerator.current_accelerator(check_available=True)
    return torch.device(name or gpu or "cpu")


def this_process():
    """This process's rank and world_size, which torchrun sets; without torchrun, 0 and 1."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start_process(device_name):
    """Joins torchrun's other processes, if there are any. Returns this process's device."""
    device = pick_device(device_name)
    if device.type == "cuda":
        # on a machine with several GPUs, the local rank is the number of this process's GPU
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if this_process()[1] > 1:
        # NCCL connects GPUs; gloo connects CPUs
        backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, device_id=device_id)
    return device


def print0(text):
    """Prints from rank 0 only, or eight processes would say everything eight times."""
    if this_process()[0] == 0:
        # a broken output pipe, such as a dead tee, should not end the run
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
            sys.exit(f"error: ranks differ: {values}: give all machines the same flags and files")


def pick_dtype(device):
    """The string "bfloat16" if the hardware has instructions for it, else "float32"."""
    # amx_bf16, avx512_bf16, and bf16 are Intel's, AMD's, and Arm's names for bf16 instructions
    able = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    native = any(able.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if native else "float32"


def pick_batch_size(args, model, device, dtype, compiled, world_size):
    """The micro-batch size: --batch_size, or the largest divisor of a rank's share that fits."""
    unit = (args.batch_size or 1) * args.sequence_length * world_size
    if args.total_batch_size % unit:
        sys.exit(f"error: --total_batch_size {args.total_batch_size} must be a multiple of {unit}, "
                 f"which is --batch_size x --sequence_length x processes")
    tokens = 4096  # enough to keep a CPU busy
    if device.type == "cuda":
        # Bytes in use at the peak of a step: about 20 per parameter (weight, gradient, optimizer
        # state, bf16 copy, DDP's buffer). The factors per channel and per logit were fitted to d12
        # to d48 with PyTorch's allocator on a mock CUDA driver, not on a GPU.
        c = model.config
        num_params = sum(p.numel() for p in model.parameters())
        per_channel, per_logit = (35, 2.2) if compiled else (61, 12.3)
        per_token = per_channel * c.n_layer * c.n_embd + per_logit * c.vocab_size
        per_token *= 2 if dtype == "float32" else 1
        # Leave a tenth free, and half a gigabyte for CUDA. A roofline model (time bounded by FLOP/s
        # or bandwidth) predicts that more than 32,768 tokens would save about 1% of d12's time.
        memory = torch.cuda.get_device_properties(device).total_memory
        tokens = min((0.9 * memory - 0.5e9 - 20 * num_params) / per_token, 32768)
    fitting = args.batch_size or max(1, tokens // args.sequence_length)
    share = args.total_batch_size // (args.sequence_length * world_size)
    return max(n for n in range(1, share + 1) if share % n == 0 and n <= fitting)


def flops_per_token(model):
    """Floating-point operations (FLOPs) to train on one token of a sequence of block_size tokens.

    Each parameter of a matmul takes a multiplication and an addition in the forward pass, and twice
    as many in the backward pass, for the gradients with respect to it and its input: 6 in all.
    Looking up an embedding takes none. In each layer, q k^T and the weighted average of the values
    take 12 C T more (PaLM, https://arxiv.org/abs/2204.02311, appendix B, which also counts the
    masked half). For d12 that is 6 * 116.5M + 12 * 12 * 768 * 1024 = 812 million, so 4.26e14 per
    step. A good MFU (model FLOPs utilization, the fraction of the GPU's peak) is 40 to 60%; an
    H100's peak in bf16 is 989 TFLOP/s.
    """
    c = model.config
    num_params = sum(p.numel() for p in [*model.transformer.h.parameters(), model.lm_head.weight])
    return 6 * num_params + 12 * c.n_layer * c.n_embd * c.block_size


def open_data(args):
    """Two TokenLoaders: one for the training shards and one for the validation shards."""
    rank, world_size = this_process()
    # Rank 0 makes the default corpus while the others wait; then they open it.
    if rank > 0:
        dist.barrier()
    pattern = args.input_bin or fineweb.stdlib_corpus()
    if rank == 0 and world_size > 1:
        dist.barrier()
    T = args.sequence_length
    train_data = TokenLoader(pattern, T, args.seed)
    val_data = TokenLoader(f"{pattern.rpartition('_train_')[0]}_val_*.bin", T)
    if train_data.total * T < args.total_batch_size or val_data.total == 0:
        sys.exit(f"error: {pattern}: too few sequences, {train_data.total} for training and "
                 f"{val_data.total} for validation: reduce --total_batch_size or --sequence_length")
    return train_data, val_data


def make_model(args, vocab_size, device):
    """The GPT that the flags ask for, with random weights or those of --init_from."""
    config = {"block_size": args.sequence_length, "vocab_size": vocab_size}
    config |= {f.name: getattr(args, f.name) for f in fields(GPTConfig) if f.name in args}
    torch.manual_seed(args.seed)
    try:
        # `with device:` creates the weights on the device; a CPU is slow at a billion of them
        with device:
            model = GPT(GPTConfig(**config))
    except ValueError as e:
        sys.exit(f"error: {e}")
    if args.init_from:
        model.load_state_dict(load_checkpoint(args.init_from)["model"])
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

    s: step, trl: training loss, tel: validation loss. If a step is logged twice, the later counts.
    """
    if this_process()[0] == 0:
        with open(folder / "main.log", "a", encoding="utf-8") as f:
            f.write(line + "\n")


def save_checkpoint(path, state):
    """Writes state atomically: path is always a complete checkpoint, the old or the new one."""
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
    except Exception as e:  # torch raises a dozen types and does not name the file
        sys.exit(f"error: {path} cannot be read as a checkpoint ({type(e).__name__})")


def load_run(args, model, optimizers, train_data):
    """Restores last.pt. Returns its step, and its last and its lowest validation loss."""
    path = Path(args.output_dir, "last.pt")
    checkpoint = load_checkpoint(path)
    # a GPTConfig field that is newer than the checkpoint gets its default
    config = asdict(GPTConfig(**checkpoint["config"]))
    before = checkpoint["args"] | {"config": config, "num_sequences": checkpoint["num_sequences"]}
    now = vars(args) | {"config": asdict(model.config), "num_sequences": train_data.total}
    differ = [name for name in now if now[name] != before.get(name)]
    # The first three fix the position in the data; weights and optimizer state need the others.
    fixed = "num_sequences", "total_batch_size", "seed", "config", "optimizer", "weight_decay"
    fixed = [name for name in fixed if name in differ]
    if checkpoint["step"] > args.num_iterations:
        fixed.append("num_iterations")
    if fixed:
        sys.exit(f"error: {path} needs the {', '.join(fixed)} it began with: {before['command']}")
    for name in differ:
        if name not in ("command", "resume", "output_dir"):
            print0(f"NOTE: --{name} is now {now[name]}; it was {before.get(name)}")
    model.load_state_dict(checkpoint["model"])
    for optimizer, state in zip(optimizers, checkpoint["optimizer"], strict=True):
        optimizer.load_state_dict(state)
    return checkpoint["step"], checkpoint["val_loss"], checkpoint["best_val_loss"]


def print_header(args, model, train_data, batch_size, grad_accum_steps, device, dtype, compiled):
    """Prints the command and what it means on this machine."""
    num_params = sum(p.numel() for p in model.parameters())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print0(f"{args.command}\n{model.config}\n"
           f"model {num_params:,} parameters, {flops_per_token(model) / 1e6:,.1f} MFLOP per token\n"
           f"device {name}, {dtype}{', compiled' if compiled else ''}\n"
           f"step {args.total_batch_size:,} tokens = {batch_size} sequences x {train_data.T} "
           f"tokens x {grad_accum_steps} micro-batches x {this_process()[1]} processes\n"
           f"data {Path(train_data.paths[0]).parent}: {train_data.total * train_data.T:,} tokens "
           f"per epoch, {args.num_iterations * args.total_batch_size:,} in this run")
    if device.type == "cpu" and args.device is None and args.model != "tiny":
        print0("NOTE: PyTorch sees no GPU, and a CPU takes minutes per step for such a model")


def print_step(args, step, loss, lr, norm, seconds, model, world_size):
    """Prints one step's line. TFLOP/s is per GPU."""
    tokens_per_second = args.total_batch_size / seconds
    tflops = tokens_per_second * flops_per_token(model) / world_size / 1e12
    minutes_left = seconds * (args.num_iterations - step - 1) / 60
    print0(f"step {step:5d}/{args.num_iterations} | loss {loss:.6f} | lr {lr:.2e} | "
           f"norm {norm:.4f} | {1000 * seconds:.1f} ms | {tokens_per_second:,.0f} tok/s | "
           f"{tflops:.3g} TFLOP/s | {minutes_left:.1f} min left")


def print_end(args, step, finished, best_val_loss, seconds, device):
    """Prints how the run ended and what to type next."""
    if device.type == "cuda":
        print0(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    if not finished:
        print0(f"stopped after {step + 1} steps; all of them are saved. To continue:\n"
               f"    {args.command}{'' if args.resume else ' --resume'}")
        return
    best = Path(args.output_dir, "best.pt")
    print0(f"done in {seconds:.0f} s. Lowest validation loss {best_val_loss:.4f}: {best}\n"
           f"Next:\n    python train_gpt2.py --sample {shlex.quote(str(best))}")


def catch_signals():
    """Returns a list to which Ctrl-C and SIGTERM append from now on, instead of ending the run."""
    signals = []

    def note(number, frame):
        signals.append(number)
        # a second Ctrl-C ends the program immediately
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # The signal may interrupt a print(), and Ctrl-C also ends a tee that reads our output.
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this step; press Ctrl-C again to stop immediately\n")

    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, note)
    return signals


# -------------------------------------------------------------------------------------------------
# 9. A trained model

def load_model(path, device):
    """A checkpoint's model, in eval mode."""
    checkpoint = load_checkpoint(path)
    model = GPT(GPTConfig(**checkpoint["config"])).to(device)
    model.load_state_dict(checkpoint["model"])
    return model.eval()


def load_tokenizer(vocab_size):
    """Returns encode: text -> list of ids, and decode: list of ids -> text.

    Shards and checkpoints record only the size of their vocabulary, so it identifies the tokenizer.
    """
    if vocab_size == fineweb.VOCAB_SIZE["bytes"]:
        return lambda text: list(text.encode()), lambda ids: bytes(ids).decode(errors="replace")
    if vocab_size == fineweb.VOCAB_SIZE["gpt2"]:
        bpe = fineweb.gpt2_tokenizer()
        return bpe.encode_ordinary, bpe.decode
    raise NotImplementedError(f"load_tokenizer() has no tokenizer of {vocab_size} ids: add yours")


@torch.no_grad()
def generate(model, ids, max_new_tokens, temperature=0.8, top_k=50, generator=None):
    """Yields up to max_new_tokens ids that continue the list ids; stops before <|endoftext|>.

    temperature: below 1 favors likely ids, above 1 flattens the distribution. top_k: sample only
    from the k likeliest ids, because now and then one of 50,000 unlikely ids would derail the text.
    Recomputes the sequence for each token: a KV cache would be faster but take much more code.
    """
    x = torch.tensor([ids], device=model.lm_head.weight.device)  # (1, T)
    for _ in range(max_new_tokens):
        # only the last position predicts what comes next
        logits = model(x[:, -model.config.block_size :])[:, -1]  # (1, V)
        kth_best = torch.topk(logits, min(top_k, logits.size(-1))).values[:, -1:]  # (1, 1)
        logits = logits.masked_fill(logits < kth_best, -math.inf)
        p = F.softmax(logits / temperature, dim=-1)
        token = torch.multinomial(p, num_samples=1, generator=generator)  # (1, 1)
        # <|endoftext|> is the last id of every vocabulary
        if token.item() == model.config.vocab_size - 1:
            return
        yield token.item()
        x = torch.cat((x, token), dim=1)


def sample(model, prompt="", seed=0, max_new_tokens=200, **options):
    """The prompt and its continuation, as text. options: see generate()."""
    encode, decode = load_tokenizer(model.config.vocab_size)
    # in training every document begins with <|endoftext|>, so the prompt does as well
    ids = [model.config.vocab_size - 1, *encode(prompt)]
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(seed)
    return prompt + decode([*generate(model, ids, max_new_tokens, generator=generator, **options)])


def print_sample(model, args, step):
    """Prints a sample during training. Every rank generates the same one, and rank 0 prints it."""
    try:
        # not compiled: torch.compile would recompile for every length
        with torch.compiler.set_stance("force_eager"):
            text = sample(model, args.prompt, args.seed + step)
        print0(f"--- a sample after {step} steps\n{text}\n---")
    except (OSError, NotImplementedError) as e:  # no tokenizer: training does not need one
        print0(f"no sample: {e}")


# -------------------------------------------------------------------------------------------------
# 10. The command line

def parse_args(argv):
    """Returns the settings. Typed flags win, then --init_from, --arch, --recipe, and the preset."""
    show_as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=show_as_written)
    parser.error = lambda message: sys.exit(f"error: {message}; see --help")  # no page of usage
    add = parser.add_argument
    on_off = argparse.BooleanOptionalAction  # makes --qk_norm and --no-qk_norm

    add("--model", choices=PRESETS, default="tiny", help="a preset [%(default)s]")
    add("--arch", choices=["variant", "gpt2"], default="variant", help="gpt2: revert all changes")
    add("--recipe", choices=["today", "original"], default="today", help="original: AdamW, cosine")
    add("--optimizer", choices=["muon", "adamw"], default="muon", help="for the blocks' matrices")
    add("--schedule", choices=["wsd", "cosine"], default="wsd", help="of the learning rate")
    add("--learning_rate", type=float, help="the peak; default: the preset's")
    # GPTConfig's fields, except block_size (--sequence_length) and vocab_size (from the data)
    shape = {field.name: field.default for field in fields(GPTConfig)}
    del shape["block_size"], shape["vocab_size"]
    for name, value in (shape | DEFAULTS).items():
        how = {"action": on_off} if isinstance(value, bool) else {"type": type(value)}
        add(f"--{name}", **how, help=f"see GPTConfig and DEFAULTS [{value}]")
    add("--output_dir", help="folder for main.log, last.pt, and best.pt; default: the preset's")
    add("--resume", action="store_true", help="continue from last.pt, if there is one")
    add("--init_from", metavar="CHECKPOINT", help="fine-tune it; default shape: the checkpoint's")
    add("--overfit_single_batch", action="store_true", help="train on the first batch only")
    add("--device", choices=["cuda", "mps", "cpu"], help="default: the first available of these")
    add("--dtype", choices=["bfloat16", "float32"], help="default: bfloat16 where it is native")
    add("--compile", action=on_off, help="torch.compile; default: on a GPU")
    add("--prompt", default="", help="what samples begin with")
    add("--sample", metavar="CHECKPOINT", help="do not train; print text that it generates")

    typed = parser.parse_args(argv)
    defaults = shape | DEFAULTS | PRESETS[typed.model]
    if typed.recipe == "original":
        defaults |= ORIGINAL
        defaults["learning_rate"] /= 2
    if typed.arch == "gpt2":
        defaults |= GPT2 | {"n_kv_head": typed.n_head or defaults["n_head"]}
    if typed.init_from:
        defaults |= load_checkpoint(typed.init_from)["config"]
        del defaults["vocab_size"]  # from the data; block_size stays the checkpoint's
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    if typed.warmup_iters is None:
        # a short run should not be all warmup
        args.warmup_iters = min(args.warmup_iters, args.num_iterations // 10)
    args.command = shlex.join(["python", "train_gpt2.py", *argv])
    return args


def main(argv):
    """Does what the command line asks for. Returns the exit code."""
    args = parse_args(argv)
    if args.sample is not None:
        print(sample(load_model(args.sample, pick_device(args.device)), args.prompt, args.seed))
        return 0
    signals = catch_signals()
    train(args, signals)
    if dist.is_initialized():
        dist.destroy_process_group()
    # by convention, a signal's exit code is 128 + its number
    return 128 + signals[0] if signals else 0


if __name__ == "__main__":
    # print "?" for a character that the terminal cannot show
    sys.stdout.reconfigure(errors="replace")
    sys.exit(main(sys.argv[1:]))

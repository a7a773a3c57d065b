"""
The first training step of `python train_gpt2.py` in slow motion: every stage from token ids to
update, with its shapes and some of its numbers.

    python report/one_step.py                       # in bf16 where it is native
    python report/one_step.py --dtype float32

Read it beside train_gpt2.py. It does what train() does, in the same order and with the same names
and functions, and adds only print(). It takes train_gpt2.py's flags, except for those that change
the architecture or the optimizer, runs on the CPU, and processes the whole step as one micro-batch.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt2  # noqa: E402
from train_gpt2 import apply_rope, get_lr, make_optimizers  # noqa: E402


def show(title, *lines):
    """Prints a heading, and lines below it."""
    print(f"\n{title}")
    for line in lines:
        print(f"    {line}")

def some(x):
    """The first four entries of a tensor."""
    return "[" + " ".join(f"{v:+.3f}" for v in x.flatten()[:4].tolist()) + " ...]"

def rms(x):
    """The root mean square of a tensor's entries."""
    return x.float().square().mean().sqrt().item()

def shape(x):
    return str(tuple(x.shape))

def show_rope(q, k, rope):
    """q (B, T, n_head, D) and k (B, T, n_kv_head, D) before the rotation."""
    T, D = q.size(1), q.size(3)
    # fp32, so that the dot products below agree in every printed digit
    q = q.float()
    k = k.float()
    rotated = apply_rope(q, *rope)
    pairs = []
    for t in 0, 1:
        before = f"({q[0, t, 0, 0]:+.3f}, {q[0, t, 0, D // 2]:+.3f})"
        after = f"({rotated[0, t, 0, 0]:+.3f}, {rotated[0, t, 0, D // 2]:+.3f})"
        pairs.append(f"pair 0 of q[0, {t}]: {before} -> {after}, rotated by {t} rad")
    show("apply_rope: rotates pair i of a query at position t by t * 10000^(-2i/D) radians", *pairs)

    # place the query and key of position 0 at every position and compare their dot products
    one_q = apply_rope(q[:1, :1].expand(1, T, -1, -1), *rope)[0, :, 0]  # (T, D), head 0
    one_k = apply_rope(k[:1, :1].expand(1, T, -1, -1), *rope)[0, :, 0]
    far = T - 4
    show("so q · k depends on the relative position only: the same q and k, 3 positions apart",
         f"at positions 3 and 0: {one_q[3] @ one_k[0]:+.4f}",
         f"at positions {far + 3} and {far}: {one_q[far + 3] @ one_k[far]:+.4f}")

def show_attention(q, k):
    """Head 0 of sequence 0 in plain PyTorch. q (B, T, n_head, D), k (B, T, n_kv_head, D)."""
    T, D = q.size(1), q.size(3)
    scores = q[0, :, 0].float() @ k[0, :, 0].float().T / math.sqrt(D)  # (T, T)
    future = torch.ones(T, T).triu(1).bool()
    weights = F.softmax(scores.masked_fill(future, -math.inf), dim=-1)
    lines = []
    for t in 0, 1, 3:
        row = ", ".join(f"{w:.3f}" for w in weights[t, : t + 1].tolist())
        lines.append(f"position {t} attends to positions 0 to {t} with weights {row}")
    show("causal_attention, head 0 of sequence 0: softmax of the masked q k^T / sqrt(D)", *lines)

def show_first_block(block, x, rope, config):
    """The inside of block 0. x (B, T, C) is the residual stream before the block."""
    B, T, C = x.shape
    D = C // config.n_head
    attn = block.attn
    normed = block.ln_1(x)
    show("block 0, ln_1 (RMSNorm): divides by the RMS, and multiplies by a gain that starts at 1",
         f"RMS {rms(x):.4f} -> {rms(normed):.4f}")
    q = attn.c_q(normed).view(B, T, config.n_head, D)
    k = attn.c_k(normed).view(B, T, config.n_kv_head, D)
    v = attn.c_v(normed).view(B, T, config.n_kv_head, D)
    show("c_q, c_k, c_v: queries, keys and values, each (B, T, heads, D)",
         f"q {shape(q)}, k {shape(k)}, v {shape(v)}, {q.dtype}",
         f"{config.n_head // config.n_kv_head} query heads share each key/value head")
    q = attn.q_norm(q)
    k = attn.k_norm(k)
    show("q_norm, k_norm: give every query and key the norm sqrt(D)",
         f"|q| = {q.float().norm(dim=-1).mean():.3f}, sqrt({D}) = {math.sqrt(D):.3f}")
    show_rope(q, k, rope)
    show_attention(apply_rope(q, *rope), apply_rope(k, *rope))

    # the MLP reads x after attention's output was added
    normed = block.ln_2(x + attn(normed, rope))
    gate = block.mlp.c_gate(normed)
    show("block 0, mlp (SwiGLU): c_down(silu(c_gate(x)) * c_up(x))",
         f"gate and up {shape(gate)}, c_down's output {shape(block.mlp(normed))}",
         f"silu(gate) is between {F.silu(gate).min():+.3f} and {F.silu(gate).max():+.3f}")

@torch.no_grad()
def show_forward(model, idx, targets, decode):
    """GPT.forward(), one operation at a time. Returns the loss."""
    config = model.config
    T = idx.size(1)
    x = model.transformer.wte(idx)  # (B, T, C)
    if torch.is_autocast_enabled("cpu"):
        x = x.to(torch.get_autocast_dtype("cpu"))
    show(f"wte: looks up each id's row of the embedding matrix, {shape(x)} = (B, T, C)",
         f"x[0, 0] = {some(x[0, 0])}, RMS {rms(x):.4f}, {x.dtype}")
    rope = (model.cos[:T], model.sin[:T])
    for i, block in enumerate(model.transformer.h):
        if i == 0:
            show_first_block(block, x, rope, config)
        # Block.forward(): each sublayer adds its output to the residual stream
        attention = block.attn(block.ln_1(x), rope)
        x = x + attention
        mlp = block.mlp(block.ln_2(x))
        x = x + mlp
        show(f"after block {i}: x = x + attention + mlp, {shape(x)}",
             f"RMS of attention {rms(attention):.4f}, of mlp {rms(mlp):.4f}, of x {rms(x):.4f}")
    logits = model.lm_head(model.transformer.ln_f(x))
    logits = logits[..., : config.vocab_size].float()
    p = F.softmax(logits, dim=-1)
    p_target = p.gather(2, targets.unsqueeze(2)).mean()
    likeliest = decode([logits[0, 0].argmax().item()])
    show(f"ln_f, then lm_head, which is wte again: logits {shape(logits)} = (B, T, V)",
         f"logits[0, 0] = {some(logits[0, 0])}, RMS {rms(logits):.3f}, largest for {likeliest!r}",
         f"the mean probability of the target is {p_target:.5f}; a uniform guess has "
         f"{1 / config.vocab_size:.5f}")
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

def show_update(model, args, dtype):
    """The optimizers' step: how far parameters move, and along which axes. Returns the rate."""
    name_q = "transformer.h.0.attn.c_q.weight"
    name_wte = "transformer.wte.weight"
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradient = model.get_parameter(name_q).grad.clone()
    optimizers = make_optimizers(model, args.optimizer, args.learning_rate, args.weight_decay,
                                 dtype)
    lr = get_lr(0, args.num_iterations, args.learning_rate, args.warmup_iters, args.schedule)
    show("get_lr", f"step 0: {lr:.2e}; the peak is {args.learning_rate:.2e}")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
    update = {name: p.detach() - before[name] for name, p in model.named_parameters()}

    def sizes(name):
        return f"RMS of the weights {rms(before[name]):.5f}, of the update {rms(update[name]):.2e}"

    def singular_values(matrix):
        values = torch.linalg.svdvals(matrix.float())  # in descending order
        median = values[len(values) // 2]
        return f"largest {values[0]:.2g}, median {median:.2g}, smallest {values[-1]:.2g}"

    show("AdamW, on wte: in the first step an entry moves by about the rate, whatever its gradient",
         sizes(name_wte) + " (padding rows do not move)")
    # undo Muon's scale, 0.2 sqrt(cols), and the rate
    orthogonal = update[name_q] / (-lr * 0.2 * math.sqrt(gradient.size(1)))
    show("Muon, on block 0's c_q: moves all but the smallest singular values close to 1",
         f"of the gradient:              {singular_values(gradient)}",
         f"of the update / rate / scale: {singular_values(orthogonal)}",
         sizes(name_q))
    return lr

def main(argv):
    # train(): device, data, model
    args = train_gpt2.parse_args(argv)
    device = train_gpt2.pick_device("cpu")
    dtype = args.dtype or train_gpt2.pick_dtype(device)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    T = args.sequence_length
    data, _ = train_gpt2.open_data(args)
    model = train_gpt2.make_model(args, data.vocab_size, device)
    config = model.config
    today = config.pos == "rope" and config.mlp == "swiglu" and config.qk_norm
    if not today or args.optimizer != "muon":
        sys.exit("error: one_step.py shows RoPE, SwiGLU, QK-norm and Muon: drop the flags that "
                 "replace them")
    num_params = sum(p.numel() for p in model.parameters())
    show("the model", str(config), f"{num_params:,} parameters; matmuls in {dtype}")

    # the batch
    B = args.total_batch_size // T
    x, y = data.batch(0, B, device)
    _, decode = train_gpt2.load_tokenizer(data.vocab_size)
    # the last id, <|endoftext|>, is not text
    text = decode([id for id in x[0, :60].tolist() if id < data.vocab_size - 1])
    show(f"the batch: x {shape(x)} = (B, T), and the targets y, the same shifted by one",
         f"x[0] = {x[0, :12].tolist()} ...", f"y[0] = {y[0, :12].tolist()} ...", f"text {text!r}")

    # forward
    with autocast:
        loss_by_hand = show_forward(model, x, y, decode)
        loss = model(x, y)
    show("the loss: the mean of -log p(target), in nats",
         f"{loss:.6f}; a uniform guess among {config.vocab_size} ids costs "
         f"{math.log(config.vocab_size):.6f}")
    if abs(loss - loss_by_hand) > 1e-5:
        sys.exit(f"error: the loss of the operations above is {loss_by_hand:.6f}, not {loss:.6f}: "
                 f"a forward() in train_gpt2.py has changed; change show_forward() as well")

    # backward
    loss.backward()
    ranking = sorted(model.named_parameters(), key=lambda item: -item[1].grad.norm())
    lines = [f"{name:34s} {shape(p):12s} {p.grad.norm():.4f}" for name, p in ranking]
    show("backward(): a gradient for each parameter; the largest and the smallest norms",
         *lines[:3], *lines[-2:])

    # clip
    limit = args.grad_clip or math.inf
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit).item()
    show("clip_grad_norm_",
         f"the norm of all gradients is {norm:.4f}: multiplies each by {min(1, limit / norm):.4f}")

    # step
    lr = show_update(model, args, dtype)
    with torch.no_grad(), autocast:
        after = model(x, y)
    show("the same batch after the step", f"loss {loss:.6f} -> {after:.6f}")
    print(f"\ntrain_gpt2.py prints, up to rounding: loss {loss:.6f} | lr {lr:.2e} | "
          f"norm {norm:.4f}")

if __name__ == "__main__":
    main(sys.argv[1:])

"""
One training step, the first of `python train_gpt2.py`, taken slowly: every stage from bytes to
update, with its shapes and some of its numbers.

    python report/one_step.py                       # in bf16 where the processor has it
    python report/one_step.py --dtype float32

To be read beside train_gpt2.py. It does what train() does there, in their order and under
their names, calls the same functions, and adds nothing but print(). Other flags of train_gpt2.py
may be given too, as long as the model keeps today's architecture. It runs on the CPU, and takes the
whole step as a single micro-batch.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt2  # noqa: E402
from train_gpt2 import GPT, apply_rope, get_lr, make_optimizers  # noqa: E402


def say(title, *lines):
    """A heading, and under it some lines."""
    print(f"\n{title}")
    for line in lines:
        print(f"    {line}")

def some(x):
    """The first four numbers of a tensor."""
    return "[" + " ".join(f"{v:+.3f}" for v in x.flatten()[:4].tolist()) + " ...]"

def rms(x):
    """The root mean square of a tensor's numbers: how large they are."""
    return x.float().square().mean().sqrt().item()

def shape(x):
    """A tensor's shape, as it stands in comments."""
    return str(tuple(x.shape))

def show_rope(q, k, rope):
    """q (B, T, n_head, D) and k (B, T, n_kv_head, D), before they are rotated."""
    T, D = q.size(1), q.size(3)
    # in fp32 here, so that lengths and products below agree in all the digits that are printed
    q = q.float()
    k = k.float()
    rotated = apply_rope(q, *rope)
    pairs = {}
    for t in 0, 1:
        before = f"({q[0, t, 0, 0]:+.3f}, {q[0, t, 0, D // 2]:+.3f})"
        after = f"({rotated[0, t, 0, 0]:+.3f}, {rotated[0, t, 0, D // 2]:+.3f})"
        pairs[t] = f"{before} -> {after}"
    say("apply_rope: pair i of a query at time t turns by t * 10000^(-2i/D) radians; lengths stay",
        f"pair 0 of q[0, 0]: {pairs[0]}, at time 0 as it was",
        f"pair 0 of q[0, 1]: {pairs[1]}, turned by 1 radian")

    # the query and the key of time 0, put at every time: what does their product depend on?
    one_q = apply_rope(q[:1, :1].expand(1, T, -1, -1), *rope)[0, :, 0]  # (T, D), head 0
    one_k = apply_rope(k[:1, :1].expand(1, T, -1, -1), *rope)[0, :, 0]
    far = T - 4
    near_start = (one_q[3] * one_k[0]).sum()
    near_end = (one_q[far + 3] * one_k[far]).sum()
    say("so q · k knows the distance and nothing else of the two times",
        f"the same q and k, 3 apart: at times 3 and 0 {near_start:+.4f}, "
        f"at times {far + 3} and {far} {near_end:+.4f}")

def show_attention(q, k):
    """Head 0 of sequence 0 in the plain form. q (B, T, n_head, D), k (B, T, n_kv_head, D)."""
    T, D = q.size(1), q.size(3)
    scores = q[0, :, 0].float() @ k[0, :, 0].float().T / math.sqrt(D)  # (T, T)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    weights = F.softmax(scores.masked_fill(future, -math.inf), dim=-1)
    lines = []
    for t in 0, 1, 3:
        shares = ", ".join(f"{w:.3f}" for w in weights[t, : t + 1].tolist())
        lines.append(f"time {t} looks at times 0 to {t} with weights {shares}")
    say("causal_attention, head 0 of sequence 0: softmax(q k^T / sqrt(D)) over the past", *lines)

def show_first_block(block, x, rope, config):
    """What happens inside block 0. x (B, T, C) is the residual stream before it."""
    B, T, C = x.shape
    D = C // config.n_head
    attn = block.attn
    normed = block.ln_1(x)
    say("block 0, ln_1 (RMSNorm): divided by its root mean square, times a gain that starts at 1",
        f"root mean square {rms(x):.4f} -> {rms(normed):.4f}")
    q = attn.c_q(normed).view(B, T, config.n_head, D)
    k = attn.c_k(normed).view(B, T, config.n_kv_head, D)
    v = attn.c_v(normed).view(B, T, config.n_kv_head, D)
    say("c_q, c_k, c_v: queries, keys and values, each (B, T, heads, D)",
        f"q {shape(q)}, k {shape(k)}, v {shape(v)}, {q.dtype}",
        f"{config.n_head // config.n_kv_head} query heads share each key/value head")
    q = attn.q_norm(q)
    k = attn.k_norm(k)
    say("q_norm, k_norm: every head's queries and keys get the length sqrt(D)",
        f"|q| = {q.float().norm(dim=-1).mean():.3f}, sqrt({D}) = {math.sqrt(D):.3f}")
    show_rope(q, k, rope)
    show_attention(apply_rope(q, *rope), apply_rope(k, *rope))

    # the MLP reads x after attention has added to it
    normed = block.ln_2(x + attn(normed, rope))
    gate = block.mlp.c_gate(normed)
    say("block 0, mlp (SwiGLU): c_down(silu(c_gate(x)) * c_up(x))",
        f"gate and up {shape(gate)}, c_down's output {shape(block.mlp(normed))}",
        f"silu(gate) lets through between {F.silu(gate).min():+.3f} and {F.silu(gate).max():+.3f}")

@torch.no_grad()
def show_forward(model, idx, targets, decode):
    """GPT.forward(), one operation at a time. Returns the loss that comes out."""
    config = model.config
    T = idx.size(1)
    x = model.transformer.wte(idx)  # (B, T, C)
    x = x.to(train_gpt2.compute_dtype(x))
    say(f"wte: each id's row of the table, {shape(x)} = (B, T, C)",
        f"x[0, 0] = {some(x[0, 0])}, root mean square {rms(x):.4f}, {x.dtype}")
    rope = (model.cos[:T], model.sin[:T])
    for i, block in enumerate(model.transformer.h):
        if i == 0:
            show_first_block(block, x, rope, config)
        # what Block.forward() does: each of the two adds to the residual stream
        attention = block.attn(block.ln_1(x), rope)
        x = x + attention
        mlp = block.mlp(block.ln_2(x))
        x = x + mlp
        say(f"after block {i}: x = x + attention + mlp, {shape(x)}",
            f"root mean squares: attention {rms(attention):.4f}, mlp {rms(mlp):.4f}, "
            f"x {rms(x):.4f}")
    x = model.transformer.ln_f(x).to(x.dtype)
    # only the ids that exist, without those that pad the table
    logits = model.lm_head(x).float()[..., : config.vocab_size]
    p = F.softmax(logits, dim=-1)
    p_right = p.gather(2, targets.unsqueeze(2)).mean()
    likeliest = decode([logits[0, 0].argmax().item()])
    say(f"ln_f, then lm_head, which is wte again: logits {shape(logits)} = (B, T, V)",
        f"logits[0, 0] = {some(logits[0, 0])}, root mean square {rms(logits):.3f}, "
        f"largest for {likeliest!r}",
        f"the right next id has probability {p_right:.5f} on average, "
        f"evenly it would be {1 / config.vocab_size:.5f}")
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

def show_update(model, args, dtype):
    """The optimizers' step: how far weights move, in which directions. Returns the rate."""
    name_q = "transformer.h.0.attn.c_q.weight"
    name_table = "transformer.wte.weight"
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradient = model.get_parameter(name_q).grad.clone()
    optimizers = make_optimizers(model, args.optimizer, args.learning_rate, args.weight_decay,
                                 dtype)
    lr = get_lr(0, args.num_iterations, args.learning_rate, args.warmup_iters, args.schedule)
    say("get_lr", f"step 0: {lr:.2e}, a tenth of {args.learning_rate:.1e}, since it warms up")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}

    def sizes(name):
        return f"root mean squares: weight {rms(before[name]):.5f}, step {rms(moved[name]):.2e}"

    def singular_values(matrix):
        values = torch.linalg.svdvals(matrix.float())  # the largest first
        middle = values[len(values) // 2]
        return f"largest {values[0]:.5f}, the middle one {middle:.5f}, smallest {values[-1]:.5f}"

    say("AdamW, on the table: in the first step a number moves by about the rate, up or down,",
        "whatever the size of its gradient (the rows that pad the table have none)",
        sizes(name_table))
    # Muon scales what orthogonalize() returns by 0.2 sqrt(cols), and the step by the rate
    orthogonal = moved[name_q] / (-lr * 0.2 * math.sqrt(gradient.size(1)))
    say("Muon, on block 0's c_q: its gradient's directions, all but the weakest made equal",
        f"singular values of the gradient: {singular_values(gradient)}",
        f"of the step / rate / scale:      {singular_values(orthogonal)}",
        sizes(name_q))
    return lr

def main(argv):
    # train(): device, data, model
    args = train_gpt2.parse_args(argv)
    device = train_gpt2.pick_device("cpu")
    dtype, autocast = train_gpt2.pick_autocast(args.dtype, device)
    T = args.sequence_length
    data, _ = train_gpt2.open_data(args)
    config = train_gpt2.make_config(args, data.vocab_size)
    today = config.pos == "rope" and config.mlp == "swiglu" and config.qk_norm
    if not today or args.optimizer != "muon":
        sys.exit("error: only today's architecture and optimizer are shown here: drop the flags "
                 "that change them")
    torch.manual_seed(args.seed)
    model = GPT(config)
    num_params = sum(p.numel() for p in model.parameters())
    say("the model", str(config), f"{num_params:,} parameters; matrix products in {dtype}")

    # the batch
    B = args.total_batch_size // T
    x, y = data.batch(0, B, device)
    _, decode = train_gpt2.load_tokenizer(train_gpt2.tokenizer_name(data.vocab_size))
    # the last id is <|endoftext|>, which is no text
    ids = [id for id in x[0, :60].tolist() if id < data.vocab_size - 1]
    text = decode(ids)
    say(f"the batch: x {shape(x)} = (B, T), and y, the same shifted by one",
        f"x[0] = {x[0, :12].tolist()} ...", f"y[0] = {y[0, :12].tolist()} ...", f"as text {text!r}")

    # forward
    with autocast():
        loss_by_hand = show_forward(model, x, y, decode)
        loss = model(x, y)
    say("the loss: the mean of -log p(right next id), in nats",
        f"head_loss {loss:.6f}, F.cross_entropy of the logits above {loss_by_hand:.6f}",
        f"guessing among {config.vocab_size} ids costs {math.log(config.vocab_size):.6f}")

    # backward
    loss.backward()
    ranking = sorted(model.named_parameters(), key=lambda item: -item[1].grad.norm())
    lines = [f"{name:34s} {shape(p):12s} {p.grad.norm():.4f}" for name, p in ranking]
    say("backward(): a gradient for each parameter; the largest and the smallest norms",
        *lines[:3], *lines[-2:])

    # clip
    norm = nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
    norm = norm.item()
    say("clip_grad_norm_",
        f"norm of all gradients together {norm:.4f}: each is multiplied by "
        f"{min(1, (args.grad_clip or math.inf) / norm):.4f}")

    # step
    lr = show_update(model, args, dtype)
    with torch.no_grad(), autocast():
        after = model(x, y)
    say("and the same batch again", f"loss {loss:.6f} -> {after:.6f}",
        f"train() goes on with the next batch, {args.num_iterations - 1} steps more")
    print(f"\nwhat train_gpt2.py prints for this step, to rounding: "
          f"loss {loss:.6f} | lr {lr:.2e} | norm {norm:.4f}")

if __name__ == "__main__":
    main(sys.argv[1:])

"""
One training step, the first of `python train_gpt2.py`, taken slowly: every stage from bytes to update, with its shapes and
some of its numbers. To be read beside train_gpt2.py; it calls what stands there, in the order of train(), and adds nothing.

    python report/one_step.py
"""
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt2
from train_gpt2 import GPT, GPTConfig, TokenLoader, apply_rope, get_lr, make_optimizers, parse_args, pick_autocast, pick_device

def say(title, *lines):
    print(f"\n{title}")
    for line in lines:
        print(f"    {line}")

def some(x, n=4):
    """The first numbers of a tensor."""
    return "[" + " ".join(f"{v:+.3f}" for v in x.flatten()[:n].tolist()) + " ...]"

def main():
    args, _ = parse_args([])
    device = pick_device("cpu")
    args.dtype, autocast = pick_autocast(args.dtype, device)
    args.block_size, args.vocab_size = T, V = args.sequence_length, train_gpt2.VOCAB_SIZE[args.tokenizer]
    config = GPTConfig(**{name: getattr(args, name) for name in GPTConfig.__dataclass_fields__})
    torch.manual_seed(args.seed)
    model = GPT(config)
    optimizers = make_optimizers(model, args)
    B, C, D = args.total_batch_size // T, config.n_embd, config.n_embd // config.n_head
    say("the model", f"{config}", f"{model.num_params()[0]:,} parameters; matrix products in {args.dtype}")

    # ---- tokens
    data = TokenLoader(args.input_bin, T, V, args.seed)
    x, y = data.batch(0, B, device)
    text = lambda ids: bytes(i for i in ids.tolist() if i < 256).decode(errors="replace")
    say(f"tokens: x {tuple(x.shape)} = (B, T), and y, the same shifted by one", f"x[0] = {x[0, :12].tolist()} ...",
        f"y[0] = {y[0, :12].tolist()} ...", f"as text {text(x[0, :60])!r}")

    # ---- the forward pass, block by block
    with torch.no_grad(), autocast():
        h = model.transformer.wte(x)
        say(f"wte: each id's row of the table, {tuple(h.shape)} = (B, T, C)",
            f"h[0, 0] = {some(h[0, 0])}, standard deviation {h.std():.4f}")
        block, rope = model.transformer.h[0], (model.cos[:T], model.sin[:T])
        n = block.ln_1(h)
        rms = lambda v: v.float().pow(2).mean(-1).sqrt().mean()
        say("block 0, ln_1 (RMSNorm): divided by its root mean square, times a gain that starts at 1",
            f"root mean square {rms(h):.4f} -> {rms(n):.4f}")
        attn = block.attn
        qkv = attn.c_attn(n)
        q, k, v = qkv.view(B, T, -1, D).split((config.n_head, config.n_kv_head, config.n_kv_head), dim=2)
        say(f"c_attn: one product, {tuple(qkv.shape)} = (B, T, (n_head + 2 n_kv_head) D)",
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: two query heads to each key/value head")
        q, k = attn.q_norm(q.float()), attn.k_norm(k.float())
        say("QK-norm: every head's queries and keys get the length sqrt(D)",
            f"|q| = {q.norm(dim=-1).mean():.3f}, sqrt({D}) = {math.sqrt(D):.3f}")
        r = apply_rope(q, *rope)
        pair = lambda v, t: f"({v[0, t, 0, 0]:+.3f}, {v[0, t, 0, D // 2]:+.3f})"
        say("apply_rope: pair i of a query at time t is turned by t * 10000^(-2i/D); lengths stay",
            f"pair 0 of q[0, 0]: {pair(q, 0)} -> {pair(r, 0)}, at time 0 as it was",
            f"pair 0 of q[0, 1]: {pair(q, 1)} -> {pair(r, 1)}, turned by 1 radian")
        one_q, one_k = (apply_rope(v[:1, :1].expand(1, T, -1, -1), *rope)[0, :, 0] for v in (q, k))  # (T, D), one at all times
        product = lambda t, u: f"at times {t} and {u} {(one_q[t] * one_k[u]).sum():+.4f}"
        say("so q·k knows the distance and nothing else of the two times",
            f"the same q and k, 3 apart: {product(3, 0)}, {product(100, 97)}")
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        scores = (r[0, :, 0] @ apply_rope(k, *rope)[0, :, 0].T / math.sqrt(D)).masked_fill(future, -math.inf)  # (T, T)
        weights = lambda t: [round(w, 3) for w in F.softmax(scores[t].float(), -1)[:t + 1].tolist()]
        say("attention, head 0 of sequence 0: softmax(q k^T / sqrt(D)) over the past; flash attention never stores this matrix",
            *(f"time {t} looks at times 0 to {t} with weights {weights(t)}" for t in (0, 1, 3)))
        for i, block in enumerate(model.transformer.h):
            a = block.attn(block.ln_1(h), rope, None)
            m = block.mlp(block.ln_2(h + a))
            if i == 0:
                gate, up = block.mlp.c_fc(block.ln_2(h + a)).chunk(2, dim=-1)
                say(f"mlp (SwiGLU): gate and up {tuple(gate.shape)}, c_proj(silu(gate) * up) {tuple(m.shape)}")
            h = h + a + m
            say(f"after block {i}: x = x + attention + mlp, {tuple(h.shape)}",
                f"sizes (root mean square): attention {rms(a):.4f}, mlp {rms(m):.4f}, x {rms(h):.4f}")
        h = model.transformer.ln_f(h)
        logits = model.lm_head(h).float()[..., :V]
        p = F.softmax(logits, dim=-1)
        say(f"ln_f, then lm_head, which is wte again: logits {tuple(logits.shape)} = (B, T, vocabulary)",
            f"logits[0, 0] = {some(logits[0, 0])}, standard deviation {logits.std():.3f}",
            f"the right next byte gets probability {p.gather(2, y[..., None]).mean():.5f} on average, evenly it were {1 / V:.5f}")
        by_hand = F.cross_entropy(logits.flatten(0, 1), y.flatten())

    # ---- loss, gradient, update
    with autocast():
        loss = model(x, y)
    say("loss: the mean of -log p(right next byte), in nats a byte",
        f"HeadLoss {loss:.6f}, from the logits above {by_hand:.6f}, of an even guess log {V} = {math.log(V):.6f}")
    loss.backward()
    order = sorted(model.named_parameters(), key=lambda named: -named[1].grad.norm())
    say("backward: a gradient for each parameter; the largest and the smallest norms",
        *(f"{name:34s} {tuple(p.shape)!s:12s} {p.grad.norm():.4f}" for name, p in order[:3] + order[-2:]))
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
    say("clipping", f"norm of all gradients together {norm:.4f}: each is multiplied by {min(1.0, args.grad_clip / norm):.4f}")
    lr = get_lr(0, args)
    say("learning rate", f"step 0 of {args.warmup_iters} of warm-up: {lr:.2e}, a tenth of {args.learning_rate:.0e}")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    q_grad = attn.c_attn.weight.grad[:C].clone()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    step = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    q_step = step["transformer.h.0.attn.c_attn.weight"][:C] / (-lr * 0.2 * math.sqrt(C))
    size = lambda name: f"weight {before[name].pow(2).mean().sqrt():.5f}, step {step[name].pow(2).mean().sqrt():.2e}"
    say("AdamW on the table: every number moves by about the rate, whatever its gradient",
        f"root mean squares: {size('transformer.wte.weight')}")
    values = lambda m: "largest {:.4f}, a quarter {:.4f}, half {:.4f}, smallest {:.4f}".format(
        *torch.linalg.svdvals(m).quantile(torch.tensor([1, 0.75, 0.5, 0.0])))
    say("Muon on block 0's queries: the gradient's directions, the small ones raised to the size of the large",
        f"singular values of the gradient: {values(q_grad)}",
        f"of the step / rate / its scale:  {values(q_step)}",
        f"root mean squares: {size('transformer.h.0.attn.c_attn.weight')}")
    with torch.no_grad(), autocast():
        after = model(x, y)
    say("and the same batch again", f"loss {loss:.6f} -> {after:.6f}",
        "train() goes on with the next batch: 599 steps more, and it writes Python")
    print(f"\nwhat `python train_gpt2.py` prints for this step: loss {loss:.6f} | lr {lr:.2e} | norm {norm:.4f}")

if __name__ == "__main__":
    main()

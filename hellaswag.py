"""
The score: is my model better than GPT-2? And the ways in and out: OpenAI's own weights, and export. The third chapter.

    1 the questions    2 the score    3 OpenAI's weights    4 export    5 the command line

    python hellaswag.py -m log350M/best.pt      # a checkpoint of train_gpt2.py
    python hellaswag.py -m gpt2                 # OpenAI's weights (also gpt2-medium, -large, -xl): checks this program itself

HellaSwag (https://arxiv.org/abs/1905.07830) shows the beginning of a text and four endings. One is real; three were written
by a model, and kept because they fooled other models. People find the real one in 95 % of the questions, guessing in 25 %,
and a model of 124M parameters in about 30 %: the wrong endings are made of just those words that go well together, which is
what a small model knows. But the score grows with a model, early and with little noise, so that small ones can be compared.
"""
import argparse
import json
import math
import os
import random
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import fineweb
import train_gpt2
from train_gpt2 import DEFAULTS, GPT, GPT2, HEAD_ROWS, MODELS, RANK, GPTConfig, die

# ---- 1. The questions -----------------------------------------------------------------------------------------------

DATA, SIZE = Path("hellaswag/hellaswag_val.jsonl"), 10042  # the validation set; the labels of the test set are secret
DATA_URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"

def bring(url, path):
    """Downloads url to path, unless it is there; with its checksum, if the server names one. Of several processes, one does."""
    if RANK == 0 and not path.exists():
        with fineweb.plain_errors(path):
            fineweb.prepare([download := fineweb.Download(url, path)])
            for path in fineweb.fetched([download]):
                fineweb.say(f"{path} is ready")
    if dist.is_initialized():
        dist.barrier()
    return path

def load_questions(path=None):
    """The questions of a file, by default all of the validation set, as dictionaries: ctx, endings (4), label (0 to 3)."""
    path, questions = path or bring(DATA_URL, DATA), []
    try:
        lines = Path(path).read_text("utf-8").split("\n")
    except (OSError, ValueError) as e:
        die(f"{path} cannot be read ({e}): give --data a file of questions, or leave it out")
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                q = json.loads(line)
                q["label"] = int(q["label"])
                if len(q["endings"]) != 4 or q["label"] not in range(4) or not all(text.strip() for text in [q["ctx"], *q["endings"]]):
                    raise ValueError
                questions.append(q)
        except (ValueError, KeyError, TypeError, AttributeError):
            die(f"{path}, line {number}: no question with ctx, four endings and a label from 0 to 3; mend the line or leave it out")
    if not questions or path == DATA and len(questions) != SIZE:
        die(f"{path} has {len(questions)} questions: remove it, then it is fetched again, or give another --data")
    return questions

def harness_text(text):
    """What lm-evaluation-harness makes of a text: WikiHow's marks go."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

def encode_question(q, encode, block_size, harness=False):
    """(ids of the context, [ids of each ending], what its log-probability is divided by for acc_norm, label)."""
    if harness:  # https://github.com/EleutherAI/lm-evaluation-harness, task hellaswag, version 1
        ctx = harness_text(f"{q['activity_label']}: " + (f"{q['ctx_a']} {q['ctx_b'].capitalize()}" if "ctx_b" in q else q["ctx"]))
        choices = [harness_text(ending) for ending in q["endings"]]
        ctx, space = ctx.rstrip(), ctx[len(ctx.rstrip()):]
        context = encode(ctx)
        endings = [encode(f"{ctx}{space} {choice}")[len(context):] for choice in choices]
        norms = [len(choice) for choice in choices]  # characters
    else:  # the completion way
        context, endings = encode(q["ctx"]), [encode(" " + ending) for ending in q["endings"]]
        norms = [min(len(ending), block_size) for ending in endings]  # tokens
    # A model with a short memory sees what fits: of an ending its beginning, and of the context its end, a token at least.
    endings = [ending[:block_size] for ending in endings]
    return context[-max(1, block_size + 1 - max(map(len, endings))):], endings, norms, q["label"]

# ---- 2. The score ---------------------------------------------------------------------------------------------------

# A question is answered by the ending to which the model gives the highest probability. The sum of the log-probabilities of
# its tokens (acc) favours short endings, since every token costs something; their mean (acc_norm) does not, so it is the
# one that is quoted.
#
# What makes it fast: the four endings have their context in common, so context and endings stand in one row,
#
#     c c c c c | a a a | b b | c c c c | d d       ids
#     0 1 2 3 4 | 5 6 7 | 5 6 | 5 6 7 8 | 5 6       pos: every ending goes on where the context ends
#
# and a mask lets an ending see the context and itself, but not its sisters. An ending's last token has nothing more to
# predict, so it is left out; and the head, a third of the work at 124M, runs only where an ending's token comes next.

@torch.no_grad()
def log_probs(model, items):
    """items, (context, endings, ...) each -> log-probability of every ending, (len(items), 4), a NumPy array."""
    device, B, rows, targets, owners = model.lm_head.weight.device, len(items), [], [], []
    T = max(len(context) + sum(len(ending) - 1 for ending in endings) for context, endings, *_ in items)
    ids, pos, part = (np.full((B, T), fill) for fill in (0, 0, 5))  # part: 0 the context, 1 to 4 an ending, 5 nothing
    for b, (context, endings, *_) in enumerate(items):
        at = n = len(context)
        ids[b, :n], pos[b, :n], part[b, :n] = context, np.arange(n), 0
        for k, ending in enumerate(endings):
            m = len(ending) - 1
            ids[b, at:at + m], pos[b, at:at + m], part[b, at:at + m] = ending[:-1], n + np.arange(m), k + 1
            rows += [b * T + n - 1, *range(b * T + at, b * T + at + m)]  # where its tokens are predicted
            targets += ending
            owners += [4 * b + k] * len(ending)
            at += m
    ids, pos, part, rows, targets, owners = (torch.as_tensor(x, device=device) for x in (ids, pos, part, rows, targets, owners))
    mask = ((part[:, :, None] == part[:, None, :]) | (part == 0)[:, None, :]).tril()[:, None]  # (B, 1, T, T): row sees column
    x, total = model.features(ids, pos, mask).flatten(0, 1)[rows], torch.zeros(4 * B, device=device)
    step = HEAD_ROWS if device.type == "cuda" else 256  # so few logits stay in a CPU's cache
    for s in (slice(i, i + step) for i in range(0, len(x), step)):
        logits = model.lm_head(x[s])[:, :model.config.vocab_size]
        logp = logits.gather(1, targets[s, None])[:, 0].float() - logits.float().logsumexp(1)
        total.index_add_(0, owners[s], logp)
    return total.view(B, 4).cpu().numpy()

def answer(model, items, autocast, progress=False):
    """Log-probabilities (len(items), 4) of the endings of encoded questions, which are batched by length."""
    size = lambda i: len(items[i][0]) + sum(map(len, items[i][1]))
    limit = 16384 if model.lm_head.weight.device.type == "cuda" else 2048  # tokens in a batch
    batches, results, done, terminal = [[]], np.zeros((len(items), 4)), [], sys.stdout.isatty()
    start = shown = time.time()
    for i in sorted(range(len(items)), key=size):
        if batches[-1] and size(i) * (len(batches[-1]) + 1) > limit:
            batches.append([])
        batches[-1].append(i)
    random.Random(0).shuffle(batches)  # so that the running accuracy is that of short and long ones
    with autocast():  # one for all: it keeps the weights' bf16 copies
        for batch in batches if items else ():
            results[batch] = log_probs(model, [items[i] for i in batch])
            done += batch
            if progress and (terminal or time.time() - shown > 60 or len(done) == len(items)):
                score, shown = accuracy(results[done], [items[i] for i in done]), time.time()
                fineweb.say(f"{len(done)} of {len(items)} questions | {len(done) / (shown - start):.1f} a second | "
                            f"acc {score[0]:.4f} acc_norm {score[1]:.4f}", end="" if terminal else "\n")
    return results

def accuracy(logp, items):
    """(acc, acc_norm): the shares of questions whose right ending has the highest sum, and the highest mean."""
    labels, norms = np.array([label for *_, label in items]), np.array([norms for _, _, norms, _ in items])
    return (logp.argmax(1) == labels).mean(), ((logp / norms).argmax(1) == labels).mean()

def interval(p, n):
    """The 95 % interval of a share p of n questions (Wilson 1927)."""
    z = 1.96
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)

# ---- 3. OpenAI's weights --------------------------------------------------------------------------------------------

def conv1d(key, w):
    """w as OpenAI stores it, or back: their linear layers, of a kind of their own named Conv1D, hold nn.Linear's transpose."""
    return w.T.contiguous() if key.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")) else w

def openai_checkpoint(name):
    """GPT-2 as OpenAI published it, name one of gpt2, gpt2-medium, gpt2-large, gpt2-xl, in the form of our checkpoints."""
    path = bring(f"{fineweb.hub()}/openai-community/{name}/resolve/main/model.safetensors", Path(f"openai/{name}.safetensors"))
    args, state = {**DEFAULTS, **MODELS[name], "model": name}, {}
    try:  # safetensors: 8 bytes that tell the length of a JSON header, the header, and the numbers as they are
        length = int(np.fromfile(path, "<u8", 1)[0])
        header = json.loads(np.fromfile(path, np.uint8, length, offset=8).tobytes())
        for key, entry in header.items():
            key = "transformer." + key.removeprefix("transformer.")
            if entry.get("dtype") == "F32" and not key.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight")):  # no masks
                start, end = entry["data_offsets"]
                w = torch.from_numpy(np.fromfile(path, "<f4", (end - start) // 4, offset=8 + length + start)).view(entry["shape"])
                state[key] = conv1d(key, w)
        wte = state["transformer.wte.weight"]
        padding = wte.new_zeros(-len(wte) % 64, wte.size(1))
        state["transformer.wte.weight"] = state["lm_head.weight"] = torch.cat((wte, padding))
        config = dict(GPT2, n_layer=args["n_layer"], n_head=args["n_head"], n_kv_head=args["n_head"], n_embd=args["n_embd"],
                      block_size=len(state["transformer.wpe.weight"]), vocab_size=len(wte))
    except (ValueError, KeyError, IndexError, RuntimeError, MemoryError) as e:
        die(f"{path} is no safetensors file of GPT-2 ({e}): remove it, then it is fetched again")
    return dict(config=config, model=state, tokenizer="gpt2", args=args)

# ---- 4. Export ------------------------------------------------------------------------------------------------------

def tokenizer_files(name):
    """Hugging Face's tokenizer.json and tokenizer_config.json for "bytes" or "gpt2"."""
    # GPT-2's vocabulary is written in letters: a byte that is none is shown as a character from 256 on
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in printable]
    letters = {b: chr(b if b in printable else 256 + hidden.index(b)) for b in range(256)}
    _, token_bytes = train_gpt2.load_tokenizer(name)
    eot = train_gpt2.VOCAB_SIZE[name] - 1
    ids, merges = {token_bytes(i): i for i in range(eot)}, []
    spell = lambda token: "".join(letters[b] for b in token)
    for token in list(ids)[256:]:  # which two neighbours made it: join as the encoder does, until two are left
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            i = min(range(len(parts) - 1), key=lambda i: ids.get(parts[i] + parts[i + 1], eot))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        merges.append(f"{spell(parts[0])} {spell(parts[1])}")
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    return {"tokenizer.json": dict(
        version="1.0", truncation=None, padding=None, added_tokens=[dict(id=eot, content="<|endoftext|>", **flags)], normalizer=None,
        pre_tokenizer=level, post_processor=level, decoder=level, model=dict(
            type="BPE", dropout=None, unk_token=None, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False,
            byte_fallback=False, vocab={**{spell(token): i for token, i in ids.items()}, "<|endoftext|>": eot}, merges=merges)),
        "tokenizer_config.json": dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<|endoftext|>",
                                      eos_token="<|endoftext|>", unk_token="<|endoftext|>", clean_up_tokenization_spaces=False)}

def to_hugging_face(config, state):
    """(config.json, weights) of the architecture that a model is: GPT-2, Llama or, with QK-norm, Qwen3."""
    c, V = config, config.vocab_size
    common = dict(vocab_size=V, bos_token_id=V - 1, eos_token_id=V - 1, torch_dtype="float32", tie_word_embeddings=True)
    kind = {name: getattr(c, name) for name in GPT2 if name != "qk_norm"}
    if dict(kind, qk_norm=c.qk_norm) == GPT2 and c.n_kv_head == c.n_head:
        weights = {key: conv1d(key, w) for key, w in state.items() if key != "lm_head.weight"}
        weights["transformer.wte.weight"] = state["transformer.wte.weight"][:V]
        return dict(common, architectures=["GPT2LMHeadModel"], model_type="gpt2", n_layer=c.n_layer, n_head=c.n_head,
                    n_embd=c.n_embd, n_positions=c.block_size, activation_function="gelu_new", layer_norm_epsilon=1e-5), weights
    if kind != dict(norm="rmsnorm", mlp="swiglu", pos="rope", bias=False):
        die(f"no architecture elsewhere has {kind} together: only the variant and --arch gpt2 can be exported")
    D, name = c.n_embd // c.n_head, "Qwen3" if c.qk_norm else "Llama"
    weights = {"model.embed_tokens.weight": state["transformer.wte.weight"][:V], "model.norm.weight": state["transformer.ln_f.weight"]}
    for i in range(c.n_layer):
        ours, theirs = f"transformer.h.{i}.", f"model.layers.{i}."
        q, k, v = state[ours + "attn.c_attn.weight"].split((c.n_head * D, c.n_kv_head * D, c.n_kv_head * D))
        gate, up = state[ours + "mlp.c_fc.weight"].chunk(2)
        names = {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v, "mlp.gate_proj": gate, "mlp.up_proj": up,
                 "self_attn.o_proj": "attn.c_proj", "mlp.down_proj": "mlp.c_proj", "input_layernorm": "ln_1",
                 "post_attention_layernorm": "ln_2", **({f"self_attn.{n}_norm": f"attn.{n}_norm" for n in "qk"} if c.qk_norm else {})}
        weights |= {f"{theirs}{key}.weight": state[f"{ours}{w}.weight"] if isinstance(w, str) else w for key, w in names.items()}
    return dict(common, architectures=[f"{name}ForCausalLM"], model_type=name.lower(), hidden_size=c.n_embd, head_dim=D,
                intermediate_size=up.size(0), num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head,
                max_position_embeddings=c.block_size, hidden_act="silu", rms_norm_eps=1e-6, rope_theta=10000.0, attention_bias=False), weights

def export(path, out):
    """Writes a checkpoint as a folder that transformers, lm-evaluation-harness, llama.cpp's converter and others open as it
    is. Returns the exit code."""
    try:
        from safetensors.torch import save_file
    except ImportError:
        die("--export needs one more package: pip install safetensors")
    checkpoint, out = train_gpt2.load_checkpoint(path), Path(out)
    if out.exists():
        die(f"{out} is there already: give --export another folder")
    config, tmp = GPTConfig(**checkpoint["config"]), Path(f"{out}.tmp")
    files, weights = to_hugging_face(config, checkpoint["model"])
    eot = config.vocab_size - 1
    files = {"config.json": files, "generation_config.json": dict(bos_token_id=eot, eos_token_id=eot, pad_token_id=eot),
             **tokenizer_files(checkpoint["tokenizer"])}
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    for name, content in files.items():
        (tmp / name).write_text(json.dumps(content, indent=1, ensure_ascii=False), "utf-8")
    save_file({key: w.contiguous().clone() for key, w in weights.items()}, tmp / "model.safetensors", metadata={"format": "pt"})
    os.chmod(tmp / "model.safetensors", 0o644)  # safetensors makes it private, unlike the other files
    os.replace(tmp, out)
    print(f"{out} is written. Next:\n    lm_eval --model hf --model_args pretrained={out} --tasks hellaswag --num_fewshot 10")
    return 0

# ---- 5. The command line --------------------------------------------------------------------------------------------

# normalised accuracy, the completion way: quoted, https://github.com/karpathy/llm.c/discussions/481 and the papers
PUBLISHED = "GPT-2 124M 29.4 %, GPT-2 350M 37.5 %, the homework's 124M 30.78 % and 350M 33.52 %, GPT-3 124M 33.7 %"

def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", required=True, help="a checkpoint of train_gpt2.py, or gpt2, gpt2-medium, gpt2-large, gpt2-xl")
    parser.add_argument("--data", help="a file of questions; not given: the validation set, downloaded once")
    parser.add_argument("--limit", type=int, help="only the first so many questions")
    parser.add_argument("--harness", action="store_true", help="as lm-evaluation-harness scores with 0 shots")
    parser.add_argument("--examples", type=int, default=3, help="questions to show with their losses")
    parser.add_argument("--device", choices=["cuda", "mps", "cpu"], help="not given: the first that is there")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of matrix products; not given: bfloat16 where the hardware has it")
    parser.error = die
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 1:
        die(f"--limit {args.limit}: give a number of questions, at least 1")
    checkpoint, device = train_gpt2.load_checkpoint(args.model), train_gpt2.pick_device(args.device)
    questions = load_questions(args.data)[:args.limit]
    if args.harness and not all("activity_label" in q for q in questions):
        die(f"--harness needs the field activity_label in every question of {args.data}")
    model = GPT(GPTConfig(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    model.to(device)
    dtype, autocast = train_gpt2.pick_autocast(args.dtype, device)
    encode, _ = train_gpt2.load_tokenizer(checkpoint["tokenizer"])
    items = [encode_question(q, encode, model.config.block_size, args.harness) for q in questions]
    logp = answer(model, items, autocast, progress=True)
    for q, (_, _, norms, label), losses in zip(questions[:args.examples], items, -logp):
        fineweb.say(f"---\n{q['ctx']}")
        for k, ending in enumerate(q["endings"]):
            mark = ("right, " if k == label else "") + ("chosen, " if k == (losses / norms).argmin() else "")
            print(f"    {losses[k] / norms[k]:.4f} ({mark}sum {losses[k]:.2f}) {ending}")
    fineweb.say(f"---\n{args.model}, {dtype}, {'harness' if args.harness else 'completion'} style, {len(items)} questions, 95 % interval:")
    for name, share in zip(("acc", "acc_norm"), accuracy(logp, items)):
        print("{:8} {:.4f} ({:.4f} to {:.4f})".format(name, share, *interval(share, len(items))))
    print(f"published, acc_norm{' in completion style' if args.harness else ''}: {PUBLISHED}")
    return 0

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

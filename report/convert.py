"""
Converts models between our checkpoints and Hugging Face's transformers, in both directions. Needs
`pip install transformers`.

    python report/convert.py log350M/best.pt my350M   # a folder that transformers opens
    python report/convert.py gpt2 gpt2.pt             # OpenAI's weights as a checkpoint of ours

A checkpoint becomes GPT-2 after --arch gpt2, Llama after --no-qk_norm, and otherwise Qwen3, which
is Llama with QK-norm. OpenAI's models are gpt2, gpt2-medium, gpt2-large, and gpt2-xl. Their weights
are downloaded once, unless the current directory has a folder openai-community/NAME.

Conversion changes only names and layout. A model that no class of transformers computes is refused.
"""

import argparse
import shlex
import sys
from dataclasses import asdict, fields
from pathlib import Path

import tiktoken.load
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fineweb  # noqa: E402
import train_gpt2  # noqa: E402
from train_gpt2 import GPT2, load_model, load_tokenizer  # noqa: E402

# OpenAI's models, and our presets of the same shape
OPENAI_MODELS = {"gpt2": "d12", "gpt2-medium": "d24", "gpt2-large": "d36", "gpt2-xl": "d48"}
# The fields of GPTConfig that to_transformers() translates
KNOWN = {"n_layer", "n_head", "n_kv_head", "n_embd", "block_size", "vocab_size", *GPT2}
# GPT-2's names are ours, but its queries, keys, and values are one matrix, c_attn, and its linear
# layers are stored as (in, out), the transpose of an nn.Linear.
GPT2_TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
# The parts of Llama's and Qwen3's parameter names, and ours
LLAMA_NAMES = {
    "model.embed_tokens": "transformer.wte", "model.layers": "transformer.h",
    "model.norm": "transformer.ln_f", "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2", "self_attn": "attn", "q_proj": "c_q", "k_proj": "c_k",
    "v_proj": "c_v", "o_proj": "c_proj", "gate_proj": "c_gate", "up_proj": "c_up",
    "down_proj": "c_down",
}
# GPT-2's vocabulary as OpenAI published it, by the names that transformers expects. tiktoken caches
# both files.
OPENAI = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
VOCABULARY = {"vocab.json": f"{OPENAI}/encoder.json", "merges.txt": f"{OPENAI}/vocab.bpe"}

def our_names(name):
    """Our names for a parameter of transformers: three for GPT-2's c_attn, otherwise one."""
    for theirs, ours in LLAMA_NAMES.items():
        name = name.replace(theirs, ours)
    if "c_attn" in name:
        return [name.replace("c_attn", part) for part in ("c_q", "c_k", "c_v")]
    return [name]

def require_same_logits(model, theirs):
    """Ends the program if a model of ours and one of transformers compute different functions."""
    config = model.config
    ids = torch.randint(config.vocab_size, (1, config.block_size))
    # <|endoftext|>, because a model may treat the documents of a sequence separately
    ids[0, config.block_size // 2] = config.vocab_size - 1
    difference = (model(ids) - theirs(ids).logits).abs().max().item()
    if not difference < 0.01:
        sys.exit(f"error: transformers computes logits that differ by {difference:.3g}: "
                 f"train_gpt2.py computes something that report/convert.py does not translate")

def to_transformers(config, state):
    """Returns a checkpoint's model as one of transformers, or exits if none computes the same.

    config: a GPTConfig. state: the checkpoint's state_dict."""
    import transformers  # here, so that --help works without it

    for field in fields(config):
        value = getattr(config, field.name)
        if field.name not in KNOWN and value != field.default:
            sys.exit(f"error: {field.name}={value!r} cannot be converted: to_transformers() in "
                     f"report/convert.py does not translate it")
    if not torch.equal(state["lm_head.weight"], state["transformer.wte.weight"]):
        sys.exit("error: untied embeddings cannot be converted: report/convert.py ties them")
    end = config.vocab_size - 1  # <|endoftext|>
    settings = dict(vocab_size=config.vocab_size, tie_word_embeddings=True)
    settings |= dict(bos_token_id=end, eos_token_id=end, pad_token_id=end)
    is_gpt2 = asdict(config) == asdict(config) | GPT2 and config.n_kv_head == config.n_head
    if is_gpt2:
        settings |= dict(n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd)
        # one number under two names, because llama.cpp and mlx-lm read the second
        settings |= dict(n_positions=config.block_size, n_ctx=config.block_size)
        # We use no dropout. The default of transformers would fine-tune GPT-2 with 0.1.
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
        # the base of our RoPE, where programs written for transformers 4 read it
        their_config.rope_theta = 10000.0
        theirs = getattr(transformers, f"{kind}ForCausalLM")(their_config)
    else:
        sys.exit(f"error: only the variant and --arch gpt2 can be converted, this is a {config}")
    for their_name, p in theirs.state_dict().items():
        # c_attn stacks c_q, c_k, and c_v
        w = torch.cat([state[our_name] for our_name in our_names(their_name)])
        if is_gpt2 and their_name.endswith(GPT2_TRANSPOSED):
            w = w.T
        # without the rows that pad the embedding matrix
        p.copy_(w[: len(p)])
    # of the prompt and its continuation; without it some programs exceed the last position
    theirs.generation_config.max_length = config.block_size
    return theirs.eval()

def export(checkpoint, folder):
    """Writes a checkpoint and GPT-2's tokenizer as a folder that transformers opens."""
    import transformers

    model = load_model(checkpoint, "cpu")
    vocab_size = model.config.vocab_size
    if vocab_size != fineweb.VOCAB_SIZE["gpt2"]:
        sys.exit(f"error: {checkpoint}'s vocabulary has {vocab_size} ids; transformers has no such "
                 f"tokenizer: convert a model that was trained on GPT-2's tokens")
    # The state as stored, because load_model() may have tied what was untied.
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["model"]
    theirs = to_transformers(model.config, state)
    require_same_logits(model, theirs)
    # if tiktoken has no vocabulary yet, this downloads it
    encode, _ = load_tokenizer(vocab_size)
    theirs.save_pretrained(folder)
    for name, url in VOCABULARY.items():
        Path(folder, name).write_bytes(tiktoken.load.read_file_cached(url))
    # GPT-2 has no padding token. <|endoftext|> serves, because the attention mask hides it.
    tokenizer = transformers.GPT2Tokenizer.from_pretrained(
        folder, pad_token="<|endoftext|>", model_max_length=model.config.block_size)
    # transformers doesn't complain if it has not found the files
    text = "It's 1969, naïvely"
    if len(tokenizer) != vocab_size or tokenizer(text).input_ids != encode(text):
        sys.exit(f"error: transformers {transformers.__version__} does not read GPT-2's "
                 f"vocabulary: remove {folder}, and try another version")
    tokenizer.save_pretrained(folder)
    print(f"{folder} is written. Begin prompts with <|endoftext|>: the tokenizer does not add it.\n"
          f"Next, after pip install lm_eval accelerate:\n    lm_eval --model hf --tasks hellaswag "
          f"--model_args {shlex.quote(f'pretrained={folder}')}")

def from_openai(name, path):
    """Writes OpenAI's model `name`, one of OPENAI_MODELS, as a checkpoint of ours, in fp32."""
    import transformers

    theirs = transformers.GPT2LMHeadModel.from_pretrained(f"openai-community/{name}").eval()
    c = theirs.config
    shape = dict(n_layer=c.n_layer, n_head=c.n_head, n_kv_head=c.n_head, n_embd=c.n_embd)
    shape |= dict(block_size=c.n_positions, vocab_size=c.vocab_size)
    model = train_gpt2.GPT(train_gpt2.GPTConfig(**shape, **GPT2)).eval()
    state = model.state_dict()
    for their_name, w in theirs.state_dict().items():
        if their_name.endswith(GPT2_TRANSPOSED):
            w = w.T
        names = our_names(their_name)
        for our_name, part in zip(names, w.chunk(len(names)), strict=True):
            # the embedding matrix may have more rows than ids
            state[our_name][: len(part)] = part
    require_same_logits(model, theirs)
    checkpoint = {"config": asdict(model.config), "model": state, "step": 0}
    train_gpt2.save_checkpoint(path, checkpoint)
    path = shlex.quote(path)
    # Fine-tuning starts from good weights, so it takes small steps. The learning rate is nanoGPT's,
    # which keeps it constant; ours decays.
    flags = (f"--model {OPENAI_MODELS[name]} --arch gpt2 --init_from {path} --optimizer adamw "
             "--learning_rate 3e-5 --warmup_iters 0 --total_batch_size 32768 --num_iterations 100")
    print(f"{path} is written. Next:\n    python train_gpt2.py --sample {path}\n    python "
          f"hellaswag.py -m {path}\nFine-tune it on FineWeb, or with --input_bin on your own text:"
          f"\n    python train_gpt2.py {flags} --output_dir log_{name}")

@torch.no_grad()
def main(argv):
    show_as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=show_as_written)
    parser.add_argument("source", help="a best.pt or last.pt, or the name of an OpenAI model")
    parser.add_argument("target", help="a new folder, or for an OpenAI model a new checkpoint")
    args = parser.parse_args(argv)
    if Path(args.target).exists():
        sys.exit(f"error: {args.target} exists already: choose another name")
    try:
        convert = from_openai if args.source in OPENAI_MODELS else export
        convert(args.source, args.target)
    except OSError as e:  # no network for OpenAI's weights or GPT-2's vocabulary
        sys.exit(f"error: {str(e).splitlines()[0]}: fix this, then run this command again")

if __name__ == "__main__":
    main(sys.argv[1:])

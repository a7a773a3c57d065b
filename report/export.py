"""
Turns a checkpoint into a folder that Hugging Face's transformers opens, and with it many other
programs: as GPT-2 after --arch gpt2, as Llama after --no-qk_norm, else as Qwen3, which is Llama
with QK-norm. Needs `pip install transformers`.

    python report/export.py log350M/best.pt my350M

The numbers stay what they are; only names and layout change. What no class of theirs can compute is
refused. (The way in, for OpenAI's weights, is from_openai() in train_gpt2.py.)
"""

import argparse
import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import tiktoken.load
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train_gpt2 import GPT2, load_model, load_tokenizer  # noqa: E402

# The fields of GPTConfig that to_transformers() hands on. One that is added to it belongs here when
# to_transformers() does something with it, and not before.
KNOWN = {"n_layer", "n_head", "n_kv_head", "n_embd", "block_size", "vocab_size", *GPT2}
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
# GPT-2's vocabulary as OpenAI published it, by the names that transformers looks for. tiktoken has
# both files.
OPENAI = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
VOCABULARY = {"vocab.json": f"{OPENAI}/encoder.json", "merges.txt": f"{OPENAI}/vocab.bpe"}

def our_names(name):
    """Our name of a weight that transformers calls `name`; for GPT-2's c_attn our three names."""
    for theirs, ours in LLAMA_NAMES.items():
        name = name.replace(theirs, ours)
    if "c_attn" in name:
        return [name.replace("c_attn", part) for part in ("c_q", "c_k", "c_v")]
    return [name]

@torch.no_grad()
def to_transformers(config, state):
    """A model of ours as one of transformers. Ends the program if no class has these switches.

    config: a GPTConfig. state: its weights.
    """
    import transformers  # here, so that --help works without it

    for name, value in asdict(config).items():
        # a new field has to be off at 0, None or False
        if name not in KNOWN and value:
            sys.exit(f"error: {name} = {value!r} cannot be exported: to_transformers() in "
                     f"report/export.py knows nothing of it")
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
        # c_attn is c_q, c_k and c_v one below the other
        w = torch.cat([state[our_name] for our_name in our_names(their_name)])
        if is_gpt2 and their_name.endswith(GPT2_TRANSPOSED):
            w = w.T
        # without the rows that pad our table
        p.copy_(w[: len(p)])
    # prompt and answer together; programs that are told nothing would write past the last position
    theirs.generation_config.max_length = config.block_size
    return theirs.eval()

@torch.no_grad()
def export(checkpoint, folder):
    """Writes a checkpoint, and GPT-2's tokenizer, as a folder that transformers opens."""
    import transformers

    if os.path.lexists(folder):
        sys.exit(f"error: {folder} exists already: choose another folder")
    model, tokenizer_name = load_model(checkpoint, "cpu")
    config = model.config
    if tokenizer_name != "gpt2":
        sys.exit(f"error: {checkpoint} knows only {tokenizer_name}, for which transformers has no "
                 f"tokenizer: export a model that was trained on GPT-2's tokens")
    theirs = to_transformers(config, model.state_dict())
    # the model's code may have been changed, too: both must give any text the same scores
    ids = torch.randint(config.vocab_size, (1, config.block_size))
    off = (model(ids)[..., : config.vocab_size] - theirs(ids).logits).abs().max().item()
    if not off < 0.01:
        sys.exit(f"error: the scores that transformers gives are off by {off:.3g}: the model "
                 f"computes something that to_transformers() in report/export.py knows nothing of")
    # if tiktoken has no vocabulary yet, this downloads it
    encode, _ = load_tokenizer("gpt2")
    files = {name: tiktoken.load.read_file_cached(url) for name, url in VOCABULARY.items()}
    theirs.save_pretrained(folder)
    for name, content in files.items():
        Path(folder, name).write_bytes(content)
    # It has no token to fill up the shorter texts of a batch with; <|endoftext|> will do, because a
    # mask hides it there.
    tokenizer = transformers.GPT2Tokenizer.from_pretrained(
        folder, pad_token="<|endoftext|>", model_max_length=config.block_size
    )
    # transformers says nothing if it has not found the files
    text = "It's 1969, naïvely"
    if len(tokenizer) != config.vocab_size or tokenizer(text).input_ids != encode(text):
        sys.exit(f"error: transformers {transformers.__version__} does not read GPT-2's "
                 f"vocabulary: remove {folder}, and try another version")
    tokenizer.save_pretrained(folder)
    print(f"{folder} is written. Begin prompts with <|endoftext|>, as documents do in training: "
          f"the tokenizer adds none.\nNext, with the packages lm_eval and accelerate:\n"
          f"    lm_eval --model hf --model_args {shlex.quote(f'pretrained={folder}')} "
          f"--tasks hellaswag")

def main(argv):
    show_as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=show_as_written)
    parser.add_argument("checkpoint", help="a best.pt or last.pt")
    parser.add_argument("folder", help="a new one")
    args = parser.parse_args(argv)
    export(args.checkpoint, args.folder)

if __name__ == "__main__":
    main(sys.argv[1:])

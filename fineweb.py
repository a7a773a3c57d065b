"""
Turns text into tokens, and tokens into the shards that train_gpt2.py reads.

A token is a string from a fixed vocabulary, and its index there is its id. Why not words? There are
too many, and a new word would have no id. Why not letters? Sequences would be 4 to 5 times as long,
and so would training. Tokens lie in between. GPT-2's vocabulary has 50,256 of them: the 256 single
bytes, so any text can be tokenized, and 50,000 longer strings. Byte pair encoding (BPE,
https://arxiv.org/abs/1508.07909) finds the longer ones: it starts from the bytes of a large text,
merges the most frequent pair of neighbors into a new token everywhere, and repeats this 50,000
times. A frequent word ends up as one token, including the space before it, and a rare word as
several. Ten words:

    text     The cat sat on the mat and the tokenizer slept.
    tokens   The| cat| sat| on| the| mat| and| the| token|izer| slept|.
    ids      464 3797 3332 319 262 2603 290 262 11241 7509 21256 13

Id 50256, written <|endoftext|>, is a special token: it stands for no string. It is the separator
before every document (one text, such as a web page), and tells the model that the document before
has nothing to do with the next one. All ids are below 65,536, so an id fits in two bytes, stored
little-endian, low byte first. Here are the separator and the first seven ids from above, in hex:

    ids      50256   464  3797  3332   319   262  2603   290
    bytes    50 c4 d0 01 d5 0e 04 0d 3f 01 06 01 2b 0a 22 01

A shard is a file of such ids after a short header: up to 100 million tokens, or 200 MB. Training
shards are numbered from 1. Validation shards are numbered from 0 and contain held-out data, text
that the model is never trained on: its loss there shows what the model learned rather than what it
memorized.

FineWeb (https://arxiv.org/abs/2406.17557) is text from public web pages. Its authors trained small
models to compare filters, and kept the filters that improved the models. FineWeb-Edu (-t edu) is
the part that a classifier rated as educational. The default is a sample of 10 billion tokens.
Shards come from three sources:

    python fineweb.py                                          # all pretokenized shards, 21 GB
    python fineweb.py --shards 10                              # the first 10 and validation, 2.2 GB
    python fineweb.py --tokenize --shards 10                   # raw FineWeb, tokenized here
    python fineweb.py --input books/ notes.jsonl --out mine    # your own text
    python fineweb.py --input books/ --out mine_bytes --bytes  # the same, byte-level

Others have published FineWeb pretokenized, which saves an hour. Byte-level means that each byte is
a token and its value is the id. The smallest model, tiny, then spends its parameters on layers
rather than on a vocabulary. Each command prints the command that trains on its shards. Data sets
come from the Hugging Face hub, huggingface.co. The environment variable HF_ENDPOINT names a mirror,
and HF_TOKEN holds the access key of an account. After an interruption, run the same command again:
downloads keep complete files, and tokenization starts over. You may delete the raw text, in
FOLDER_raw.
"""
import argparse
import glob
import hashlib
import itertools
import json
import os
import re
import shlex
import sys
import sysconfig
from array import array
from pathlib import Path

import numpy as np

# -------------------------------------------------------------------------------------------------
# 1. Shards

# The format is that of llm.c, GPT-2 training in C (https://github.com/karpathy/llm.c). The header
# is 256 integers of 4 bytes: a magic number that identifies the format, its version, the number of
# tokens, the vocabulary size, and zeros. llm.c writes 0 for the vocabulary size, meaning GPT-2's.
MAGIC_AND_VERSION = [20240520, 1]
HEADER_INTS = 256
SHARD_TOKENS = 100_000_000

# In both vocabularies the separator, <|endoftext|>, is the last id.
VOCAB_SIZE = {"bytes": 257, "gpt2": 50257}


def write_shard(path, tokens, vocab_size):
    """Writes a shard. tokens: (n,) ids below vocab_size, where 0 means GPT-2's vocabulary.

    Raises ValueError for an id outside the vocabulary, or above 65,535, the most two bytes hold.
    """
    tokens = np.asarray(tokens)
    limit = min(vocab_size or VOCAB_SIZE["gpt2"], 2**16)
    if not 0 <= tokens.min() <= tokens.max() < limit:
        raise ValueError(f"{path}: ids must be in [0, {limit}): {tokens.min()} to {tokens.max()}")
    header = np.zeros(HEADER_INTS, "<i4")
    header[:4] = [*MAGIC_AND_VERSION, len(tokens), vocab_size]
    Path(path).write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


def find_shards(pattern):
    """Returns the sorted paths that match a glob pattern, the number of tokens in each, and the
    vocabulary size. Ends the program if there are none, or one is broken, or vocabularies differ.
    """
    paths = sorted(glob.glob(str(pattern)))
    if not paths:
        sys.exit(f"error: no {pattern} in {os.getcwd()}; `python fineweb.py` downloads FineWeb")
    lengths = []
    vocab_sizes = set()
    for path in paths:
        header = np.fromfile(path, "<i4", HEADER_INTS)
        # An interrupted download or copy is shorter than its header says.
        is_shard = header[:2].tolist() == MAGIC_AND_VERSION
        if not is_shard or os.path.getsize(path) != header.nbytes + 2 * int(header[2]):
            sys.exit(f"error: {path} is not a complete shard: delete it and run fineweb.py again")
        lengths.append(int(header[2]))
        vocab_sizes.add(int(header[3]) or VOCAB_SIZE["gpt2"])
    if len(vocab_sizes) > 1:
        sys.exit(f"error: {pattern}: vocabularies of {vocab_sizes} ids: use one tokenizer for all")
    return paths, lengths, vocab_sizes.pop()


def read_tokens(path, start=0, count=-1):
    """Returns `count` tokens of a shard from token `start` on, (count,) uint16; -1 means the rest.
    The file is closed again: a system allows about 1,000 open files, and the 100B sample has more.
    """
    return np.fromfile(path, "<u2", count, offset=4 * HEADER_INTS + 2 * start)


def write_shards(folder, name, chunks, vocabulary, first=1):
    """Tokenizes chunks (see tokenize()) and writes them to a new folder, as NAME_train_000001.bin
    and so on, and NAME_val_000000.bin and so on. first: number of the first training shard."""
    # The folder gets its name at the end. Otherwise an interrupted run would leave shards that look
    # complete, and training would silently use only part of the text.
    temporary = folder.with_name(f"{folder.name}.tmp")
    for leftover in temporary.glob(f"{name}_*_??????.bin"):  # from an interrupted run
        leftover.unlink()
    buffers = {"train": array("H"), "val": array("H")}  # two bytes per id
    numbers = {"train": first, "val": 0}  # the next shard's number

    def write_next(split):
        """Moves up to SHARD_TOKENS tokens from the buffer to a file."""
        temporary.mkdir(parents=True, exist_ok=True)
        # Number 0 is always for validation.
        path = temporary / f"{name}_{split if numbers[split] else 'val'}_{numbers[split]:06d}.bin"
        write_shard(path, buffers[split][:SHARD_TOKENS], VOCAB_SIZE[vocabulary])
        print(f"wrote {path}")
        del buffers[split][:SHARD_TOKENS]
        numbers[split] += 1

    for split, ids in tokenize(chunks, vocabulary):
        # A document may start in one shard and continue in the next.
        buffers[split].extend(ids)
        while len(buffers[split]) >= SHARD_TOKENS:
            write_next(split)
    # A sequence of the smallest model has 128 tokens, plus the target of the last one.
    if numbers["train"] <= 1 and len(buffers["train"]) < 129:
        sys.exit(f"error: too little text: {len(buffers['train'])} training tokens; 129 are needed")
    for split in buffers:
        if len(buffers[split]):
            write_next(split)
    temporary.rename(folder)


def stdlib_chunks():
    """Yields the standard library's files for tokenize()."""
    source = Path(sysconfig.get_paths()["stdlib"])
    # Tests, packages installed by pip, and help texts are left out.
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data"}
    for path in sorted(source.rglob("*.py")):
        name = path.relative_to(source)
        if not skip & set(name.parts):
            # The name's hash holds out 8 files in 256, the same ones on every machine.
            held_out = hashlib.sha256(name.as_posix().encode()).digest()[0] < 8
            yield "val" if held_out else "train", True, path.read_bytes().decode()


def stdlib_corpus():
    """Returns the glob pattern of the default training shards, and makes them the first time: the
    source of Python's standard library, byte-level, 11 million tokens."""
    folder = Path(f"stdlib_py{sys.version_info.major}.{sys.version_info.minor}")
    if not folder.exists():
        write_shards(folder, "stdlib", stdlib_chunks(), "bytes")
    return str(folder / "stdlib_train_*.bin")


# -------------------------------------------------------------------------------------------------
# 2. Documents

def read_file(path):
    """Yields the documents of a file. In a .jsonl file each line is a JSON object, and a .parquet
    file is a compressed table; both have a field "text". Any other file is plain text in UTF-8."""
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet as parquet  # here, because only this format needs pyarrow
        for batch in parquet.ParquetFile(path).iter_batches(64, columns=["text"]):
            yield from batch["text"].to_pylist()
    elif path.suffix.lower() == ".jsonl":
        with open(path, encoding="utf-8-sig") as file:
            for line in filter(str.strip, file):
                # JSON can contain an unpaired surrogate, half a character. It becomes "?".
                yield json.loads(line)["text"].encode("utf-8", "replace").decode()
    else:
        # utf-8-sig drops the byte order mark that some editors write first.
        text = path.read_bytes().decode("utf-8-sig")
        if "\0" in text:
            raise UnicodeError("it contains a NUL, like UTF-16 and binary files")
        # Collections of stories already contain separators.
        yield from re.split(r"<\|endoftext\|>[\r\n]*", text)


def read_files(paths):
    """Yields the documents of several files. Skips files that are not text. If a file is damaged,
    ends the program with one line that names it."""
    for path in paths:
        count = 0
        try:
            for text in read_file(path):
                count += 1
                yield text or ""  # a .parquet column may contain nulls
        except UnicodeError as error:
            print(f"{path} is not text in UTF-8, skipped after document {count}: {error}")
        # The decoders and pyarrow raise many types of errors for a damaged file.
        except Exception as error:
            sys.exit(f"error: {path} cannot be read after document {count}: {error!r}")


# Documents are split into chunks for two reasons: a fraction of the chunks is held out, and the
# tokenizer fails on some very long texts, such as a million spaces. We split before a space or line
# break that follows a visible character:
#
#     The cat| sat on the mat.
#
# No GPT-2 token crosses such a boundary, so the chunks have the same tokens as the whole document.
CHUNK = 8192  # characters
BOUNDARY = r"(?<=\S)(?=[ \n])"


def split_document(text, size):
    """Returns chunks of size to 2 * size characters; the last one may be shorter. Where a text has
    no boundary, as in a long run of spaces, a chunk ends anywhere, and its tokens may differ."""
    # The shortest chunk that ends at a boundary, if enough text is left for the next one.
    ends_at_boundary = rf".{{{size},{2 * size}}}?{BOUNDARY}(?=.{{{size}}})"
    return re.findall(rf"{ends_at_boundary}|.{{1,{2 * size}}}", text, re.DOTALL)


def own_chunks(names):
    """Yields the chunks of your own files, and of all files in your folders except hidden ones, for
    tokenize(). One chunk in a hundred is held out for validation, and one in ten of a small text.
    """
    paths = []
    for name in names:
        # ** does not match hidden files and folders, such as .git.
        inside = sorted(glob.glob(f"{glob.escape(name)}/**", recursive=True))
        paths += [Path(path) for path in inside or [name] if not os.path.isdir(path)]
    size = sum(path.stat().st_size for path in paths)  # bytes
    every = 10 if size <= 10e6 else 100
    # A small text gets small chunks, so that there are about two hundred.
    chunk_size = max(500, min(CHUNK, size // 200))
    held_out = None
    for document in read_files(paths):
        previous = None
        for chunk in split_document(document, chunk_size):
            # The hash decides, so that copies of a book are held out at the same places. A held-out
            # chunk with a copy in the training data would only measure memorization. Two editions
            # of a book have different hashes, so remove near-duplicates yourself.
            group = int(hashlib.sha256(chunk.encode()).hexdigest(), 16) % every
            if held_out is None:
                held_out = group  # so at least the first chunk is held out
            split = "val" if group == held_out else "train"
            # A chunk that does not continue the one before it in its shard gets a separator.
            yield split, split != previous, chunk
            previous = split


# -------------------------------------------------------------------------------------------------
# 3. Tokenization

def gpt2_tokenizer():
    """Returns tiktoken's encoding of GPT-2. Raises OSError if its vocabulary, 1.5 MB, is neither on
    this machine nor can be downloaded."""
    import tiktoken  # OpenAI's tokenizer; here, because the default run does not need it

    # The nodes of a cluster share the home folder, but not the temporary one that tiktoken prefers.
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", os.path.expanduser("~/.cache/tiktoken"))
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError:
        raise OSError("no cached GPT-2 vocabulary: go online, or set TIKTOKEN_CACHE_DIR") from None


def tokenize(chunks, vocabulary):
    """Turns an iterator of (split, is_start, chunk) into one of (split, ids). A chunk that starts a
    document gets a separator. vocabulary: "bytes" or "gpt2"."""
    # A thousand at a time: tiktoken distributes them over threads, and they fit in memory.
    while batch := list(itertools.islice(chunks, 1000)):
        texts = [text for _, _, text in batch]
        if vocabulary == "bytes":
            encoded = [text.encode() for text in texts]
        else:
            # "ordinary": the characters <|endoftext|> in a web page are not the special token.
            encoded = gpt2_tokenizer().encode_ordinary_batch(texts)
        for (split, is_start, _), ids in zip(batch, encoded, strict=True):
            if is_start:
                yield split, [VOCAB_SIZE[vocabulary] - 1]
            yield split, ids


# -------------------------------------------------------------------------------------------------
# 4. Downloads

def download(repo, patterns, folder):
    """Downloads the files of a data set that match the patterns and are not there yet. Ends the
    program with one line if that fails."""
    from huggingface_hub import HfApi, snapshot_download
    try:
        # This call fails offline, where snapshot_download() would accept an incomplete folder.
        commit = HfApi().dataset_info(repo, revision="main").sha
        snapshot_download(repo, repo_type="dataset", revision=commit, allow_patterns=patterns,
                          local_dir=folder)
    except Exception as error:
        reason = " ".join(str(error.__cause__ or error).split())
        sys.exit(f"error: {repo}: {reason} (check the network, HF_ENDPOINT, and HF_TOKEN; retry)")


def raw_chunks(repo, version, folder, shards):
    """Yields the chunks of raw FineWeb for tokenize(), after downloading enough whole files for
    `shards` training shards; 0 means all files."""
    # A file of 2 GB makes 6 to 7 shards. The + 1 covers the validation shard, and rounds up.
    numbers = [f"{i:03d}" for i in range(shards // 6 + 1)] if shards else ["*"]
    sample = f"sample/{version}T"
    download(repo, [f"{sample}/{number}_*.parquet" for number in numbers], folder)
    for document in read_files(sorted((folder / sample).glob("*.parquet"))):
        for i, chunk in enumerate(split_document(document, CHUNK)):
            yield "train", i == 0, chunk


# -------------------------------------------------------------------------------------------------
# 5. The command line

def print_next_command(folder, name):
    """Prints the number of tokens, and the command that trains on them."""
    # The folder's name may contain spaces or brackets.
    pattern = f"{glob.escape(str(folder))}/{name}_train_*.bin"
    _, lengths, vocab_size = find_shards(pattern)
    tokens = sum(lengths)
    # Repeating a text up to 4 times is nearly as good as new text, and more helps little
    # (https://arxiv.org/abs/2305.16264). FineWeb has enough new text.
    budget = tokens * (4 if name == "text" else 1)
    # About 20 tokens per parameter are compute-optimal (https://arxiv.org/abs/2203.15556): 6.6
    # billion for d24's 330M parameters, and 16 million, 8,000 steps, for byte-level tiny's 0.8M.
    # d12 is suggested from 100 million tokens on, because no size lies between tiny and d12.
    model, step, max_steps = "tiny", 2048, 8000
    if tokens >= 100e6 and vocab_size != VOCAB_SIZE["bytes"]:
        model = "d24" if budget >= 6.6e9 else "d12"
        step, max_steps = 524_288, 19_073
    # A model hardly learns in fewer than 300 steps, so a small text gets smaller batches.
    while step > 128 and budget < 300 * step:
        step //= 2
    print(f"{folder}: {tokens:,} training tokens. Next:\n"
          f"    python train_gpt2.py --model {model} --input_bin {shlex.quote(pattern)} "
          f"--total_batch_size {step} --num_iterations {min(max_steps, budget // step)} "
          f"--output_dir {shlex.quote(f'log_{folder.name}')}")


def main(argv):
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-v", "--version", choices=["10B", "100B"], default="10B", help="tokens in the sample")
    add("-t", "--type", choices=["classic", "edu"], default="classic", help="which FineWeb")
    add("--shards", type=int, default=0, help="training shards (100M tokens) to get; 0: all")
    add("--tokenize", action="store_true", help="download the raw text and tokenize it here")
    add("--input", nargs="+", metavar="FILE", help="your own files or folders")
    add("--bytes", action="store_true", help="make byte-level shards of --input")
    add("--out", type=Path, metavar="DIR", help="folder for the shards (default: like fineweb10B)")
    args = parser.parse_args(argv)
    if args.input and not args.out or args.bytes and not args.input:
        parser.error("--input needs --out, a folder for the shards, and --bytes needs --input")

    name = "finewebedu" if args.type == "edu" else "fineweb"
    folder = args.out or Path(f"{name}{args.version}")
    pretokenized = not args.input and not args.tokenize
    # Never overwrite shards. A folder with the hub's .cache is a download that may continue.
    if folder.exists() and not (pretokenized and (folder / ".cache").exists()):
        sys.exit(f"error: {folder} exists: choose another folder with --out, or delete it")
    vocabulary = "bytes" if args.bytes else "gpt2"
    if vocabulary == "gpt2":
        # Pretokenized shards don't need the vocabulary, but samples during training do, and the
        # compute nodes of a cluster may have no network.
        try:
            gpt2_tokenizer()
        except OSError as error:
            if not pretokenized:
                sys.exit(f"error: {error}")

    if pretokenized:
        # Shard 0 is for validation.
        files = [f"*_{i:06d}.bin" for i in range(args.shards + 1)] if args.shards else ["*.bin"]
        download(f"kjj0/{name}{args.version}-gpt2", files, folder)
    elif args.tokenize:
        repo = "HuggingFaceFW/fineweb-edu" if args.type == "edu" else "HuggingFaceFW/fineweb"
        chunks = raw_chunks(repo, args.version, Path(f"{folder}_raw"), args.shards)
        # As in llm.c, the first 100 million tokens are held out, so that losses can be compared.
        write_shards(folder, name, chunks, vocabulary, first=0)
    else:
        name = "text"
        write_shards(folder, name, own_chunks(args.input), vocabulary)
    print_next_command(folder, name)


if __name__ == "__main__":
    main(sys.argv[1:])

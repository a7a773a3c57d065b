"""
Chapter two turns text into shards, the files of numbers that train_gpt2.py learns from.

A text is first cut into tokens. A token is a string out of a fixed vocabulary, and its number there
is its id. Why not words? There are too many, and a new one would have no id. Why not letters? A
text would be 4 to 5 times as long, and the work with it. Tokens lie between. GPT-2's vocabulary has
50,256 strings: the 256 single bytes, so that no text is unknown, and 50,000 longer ones. To find
those, one splits a large text into bytes, joins the pair of neighbors that occurs most often into a
new string, everywhere in the text, and repeats this 50,000 times (byte pair encoding,
https://arxiv.org/abs/1508.07909). So a frequent word is one token, with the space before it, and a
rare one takes several. Ten words:

    text     The cat sat on the mat and the tokenizer slept.
    tokens   The| cat| sat| on| the| mat| and| the| token|izer| slept|.
    ids      464 3797 3332 319 262 2603 290 262 11241 7509 21256 13

One more id, 50256, stands for no text. It is written <|endoftext|>, comes before every document
(one text, such as a web page), and says that what came earlier has nothing to do with what follows.
Every id is below 65,536, so two bytes hold it, the lower one first. Here are <|endoftext|> and the
first seven ids from above as sixteen bytes, in hexadecimal:

    ids      50256   464  3797  3332   319   262  2603   290
    bytes    50 c4 d0 01 d5 0e 04 0d 3f 01 06 01 2b 0a 22 01

A shard is a file of such bytes behind a short header: up to 100 million tokens, which is 200 MB.
Shards to train on are numbered from 1. Others, numbered from 0, are for validation: their text is
held out of training, so the loss on it shows what the model learned, not what it memorized.

FineWeb (https://arxiv.org/abs/2406.17557) is text from public web pages. Its makers trained small
models to try out filters, and kept the filters that made the models better. FineWeb-Edu (-t edu) is
the part that a classifier found educational. The default is a sample of 10 billion tokens. There
are three ways to make a folder of shards (the first two lines are one, with and without a limit):

    python fineweb.py --shards 10                              # ready: 10 to train on + 1, 2.2 GB
    python fineweb.py                                          # the whole sample, 21 GB
    python fineweb.py --tokenize --shards 10                   # from the raw text, tokenized here
    python fineweb.py --input books/ notes.jsonl --out mine    # your own text

Others have made the ready ones, which saves an hour of tokenizing. Each command ends with the one
that trains on the result. (A fourth corpus needs no command: see stdlib_corpus().) Downloads come
from the hub, huggingface.co, where data sets are shared. The environment variable HF_ENDPOINT names
a mirror; HF_TOKEN holds the access key of an account (no token of a text). After an interruption
run the same command again. A download keeps the files that are whole; tokenizing begins anew. Files
that end in .tmp are what an interrupted run left behind, and you may remove them.

To learn how text becomes numbers, read this page and write_shard(); the rest is for large and odd
texts, downloads and other people's files.
"""
import argparse
import collections
import glob
import gzip
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import signal
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

# -------------------------------------------------------------------------------------------------
# 1. Shards

# The header is 256 integers of 4 bytes: the magic number, which no other kind of file begins with,
# the version of the format, the number of tokens, the size of the vocabulary, and zeros. The shards
# of llm.c, GPT-2 training in C (https://github.com/karpathy/llm.c), are the same, but their fourth
# integer is 0. We read 0 as GPT-2's vocabulary.
SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_INTS = 256
SHARD_TOKENS = 100_000_000

# Besides GPT-2's vocabulary there is a simpler one, in which a byte is its own id. It suits small
# experiments. In both of them <|endoftext|> has the last id.
VOCAB_SIZE = {"bytes": 257, "gpt2": 50257}
END_OF_TEXT = VOCAB_SIZE["gpt2"] - 1


def write_shard(path, tokens, vocab_size):
    """Writes an array of ids below vocab_size as a shard; vocab_size 0 is GPT-2's vocabulary."""
    tokens = np.asarray(tokens)
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < (vocab_size or VOCAB_SIZE["gpt2"]):
        raise ValueError(f"{path}: ids from {tokens.min()} to {tokens.max()} are no ids of a "
                         f"vocabulary of {vocab_size or VOCAB_SIZE['gpt2']}")
    header = np.zeros(HEADER_INTS, "<i4")
    header[:4] = [SHARD_MAGIC, SHARD_VERSION, len(tokens), vocab_size]
    with open(path, "wb") as file:
        file.write(header.tobytes())
        file.write(np.ascontiguousarray(tokens, "<u2").data)


def find_shards(pattern):
    """The paths that match a glob pattern, sorted; how many tokens each shard has; and how many ids
    their vocabulary, which has to be the same for all. Ends the program if a file is no shard."""
    paths = sorted(glob.glob(str(pattern)))
    if not paths:
        sys.exit(f"error: no file {pattern} in {os.getcwd()}: a run needs NAME_train_*.bin and "
                 f"NAME_val_*.bin, which `python fineweb.py` makes; see --input_bin")
    lengths = []
    vocab_sizes = []
    for path in paths:
        header = np.fromfile(path, "<i4", HEADER_INTS)
        # The file is as long as its header says, unless a download or a copy was cut off.
        is_shard = header[:2].tolist() == [SHARD_MAGIC, SHARD_VERSION]
        if not is_shard or os.path.getsize(path) != header.nbytes + 2 * int(header[2]):
            sys.exit(f"error: {path} is no whole token shard: get it again with fineweb.py")
        lengths.append(int(header[2]))
        vocab_sizes.append(int(header[3]) or VOCAB_SIZE["gpt2"])
        if vocab_sizes[-1] != vocab_sizes[0]:
            sys.exit(f"error: {paths[0]} has a vocabulary of {vocab_sizes[0]} ids, and {path} one "
                     f"of {vocab_sizes[-1]}: train on shards of one vocabulary")
    return paths, lengths, vocab_sizes[0]


def read_shard(path):
    """A shard's tokens (uint16) as a memory map: nothing is read before it is used."""
    return np.memmap(path, "<u2", "r", offset=4 * HEADER_INTS)


def read_tokens(path, start=0, count=-1):
    return np.fromfile(path, "<u2", count, offset=4 * HEADER_INTS + 2 * int(start))


class ShardWriter:
    """Collects tokens and writes them as FOLDER/NAME_000001.bin and so on."""

    def __init__(self, folder, name, index, vocab_size=0):
        self.folder = folder
        self.name = name
        self.index = index  # number of the next shard
        self.vocab_size = vocab_size
        self.buffer = np.empty(SHARD_TOKENS, np.uint16)
        self.count = 0  # tokens in the buffer
        self.written = {}  # for each shard its temporary name, and the name that it is to have

    def add(self, tokens):
        """Appends ids. A document may begin in one shard and go on in the next."""
        while len(tokens):
            part = tokens[:SHARD_TOKENS - self.count]
            self.buffer[self.count:self.count + len(part)] = part
            self.count += len(part)
            tokens = tokens[len(part):]
            if self.count == SHARD_TOKENS:
                self.flush()

    def flush(self):
        """Writes the next shard with what the buffer holds, under a temporary name."""
        if self.count:
            path = self.folder / f"{self.name}_{self.index:06d}.bin"
            # The process's id keeps two runs out of each other's files.
            temporary = f"{path}.{os.getpid()}.tmp"
            self.written[temporary] = path
            try:
                write_shard(temporary, self.buffer[:self.count], self.vocab_size)
            except OSError as error:
                for half_done in self.written:
                    Path(half_done).unlink(missing_ok=True)
                sys.exit(f"error: {path} cannot be written ({error.strerror}): make room, or give "
                         "another --out, and run this command again")
            self.index += 1
            self.count = 0

    def finish(self):
        """Writes the last shard, and gives each its name. They get it only now, so that what an
        interrupted run leaves behind is never taken for the whole."""
        self.flush()
        for temporary, path in self.written.items():
            os.replace(temporary, path)


def make_folder(folder):
    """Makes a folder for shards, unless it exists. Git ignores what is in it, as gigabytes do not
    belong in a commit."""
    if not folder.exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".gitignore").write_text("*\n")


def stdlib_corpus():
    """Makes, once, the shards that train_gpt2.py learns from if it is given none: the source of
    Python's standard library (11 MB, as bytes). Returns the glob pattern of those to train on."""
    source = Path(sysconfig.get_paths()["stdlib"])
    folder = Path(f"stdlib_py{sys.version_info.major}.{sys.version_info.minor}")
    pattern = str(folder / "stdlib_train_*.bin")
    # The validation shard gets its name last (see below): if it exists, so do the others.
    if (folder / "stdlib_val_000000.bin").exists():
        return pattern

    make_folder(folder)
    train = ShardWriter(folder, "stdlib_train", 1, VOCAB_SIZE["bytes"])
    val = ShardWriter(folder, "stdlib_val", 0, VOCAB_SIZE["bytes"])
    # We leave out the library's tests, packages that pip installed, and help texts (pydoc_data).
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data"}
    for path in sorted(source.rglob("*.py")):
        name = path.relative_to(source)
        if skip & set(name.parts):
            continue
        # About 8 files in 256 are held out for validation. The hash of the name decides, and not a
        # random number, so that every machine holds out the same ones.
        held_out = hashlib.sha256(name.as_posix().encode()).digest()[0] < 8
        writer = val if held_out else train
        # Before each file comes <|endoftext|>, whose id is 256 in this vocabulary.
        writer.add([VOCAB_SIZE["bytes"] - 1])
        writer.add(np.frombuffer(path.read_bytes(), np.uint8))
    train.finish()
    val.finish()
    return pattern


# -------------------------------------------------------------------------------------------------
# 2. Documents

def find_files(names):
    """The files that the names of --input stand for, sorted. Folders are searched, but nothing that
    is hidden in them is read, such as .git or a notebook's .ipynb_checkpoints."""
    found = {}
    for name in map(Path, names):
        if not name.exists():
            sys.exit(f"error: --input {name}: no file and no folder has this name")
        inside = [name] if name.is_file() else files_in(name)
        for path in inside:
            # resolve() shows that a.txt and books/../a.txt are one file. It is read once.
            found.setdefault(path.resolve(), path)
    return sorted(found.values())


def files_in(folder):
    """Yields the files in a folder and its subfolders, links to other folders included."""
    def passed_over(error):
        tqdm.write(f"{error.filename} is passed over: {error.strerror}")

    seen = set()
    for place, subfolders, names in os.walk(folder, followlinks=True, onerror=passed_over):
        # A link may lead back to where we come from.
        if (real := os.path.realpath(place)) in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        yield from (Path(place, name) for name in names if not name.startswith("."))


def read_documents(path):
    """Yields the documents of a file, "" or None for an empty one. In .jsonl and .ndjson a line is
    a JSON object, and .parquet is a compressed table with rows; the document is what stands under
    "text". Any other file is text, which is read into memory as a whole. .gz is unpacked."""
    name = path.name.lower()
    open_file = gzip.open if name.endswith(".gz") else open
    if name.endswith(".parquet"):
        import pyarrow.parquet as parquet
        for batch in parquet.ParquetFile(path).iter_batches(64, columns=["text"]):
            yield from batch["text"].to_pylist()
    elif name.removesuffix(".gz").endswith((".jsonl", ".ndjson")):
        with open_file(path, "rb") as file:
            for line in file:
                text = json.loads(line)["text"] if line.strip() else None
                # JSON can write half of a character, "\ud83d", which has no bytes: it becomes "?".
                yield (text or "").encode("utf-8", "replace").decode()
    else:
        if name.removesuffix(".gz").endswith((".json", ".csv", ".tsv", ".html")):
            tqdm.write(f"NOTE: {path} is read as plain text, with all its marks")
        # utf-8-sig drops the mark that some editors put before the text, and newline="" keeps \r\n.
        with open_file(path, "rt", encoding="utf-8-sig", newline="") as file:
            # Collections of short stories come with lines of <|endoftext|> between them.
            yield from re.split(r"<\|endoftext\|>[\r\n]*", file.read())


def read_files(paths):
    """Yields the documents of several files, and at the end prints how many there were. Passes over
    a file that is no text in UTF-8. Ends the program if a file cannot be read for another reason,
    with one line that names it and its row."""
    counts = collections.Counter()
    for path in paths:
        row = 0
        try:
            for text in read_documents(path):
                if not isinstance(text, str | None):
                    raise TypeError(f"its text is no text, but {type(text).__name__}")
                row += 1
                if text:
                    counts["documents read"] += 1
                    yield text
                else:
                    counts["empty documents passed over"] += 1
        # Python's decoders and pyarrow know a dozen kinds of error for a damaged file. And where
        # pyarrow, which only .parquet needs, is not installed, its import fails.
        except Exception as error:
            if row == 0 and isinstance(error, UnicodeDecodeError):
                tqdm.write(f"{path} is passed over: it is no text in UTF-8")
                counts["files passed over"] += 1
                continue
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            sys.exit(f"error: {path}, row {row + 1}: {reason}")
    found = ", ".join(f"{number:,} {what}" for what, number in counts.items())
    tqdm.write(f"{len(paths)} files: {found}")


# A text is cut into pieces, just before a space or line break that follows something visible:
#
#     The cat| sat on the mat.
#
# No token of GPT-2 goes on across such a place, so the pieces, tokenized one by one, have the
# tokens of the whole text. Threads share the work in pieces. Some pieces are held out to validate
# on. And the tokenizer, which fails at some texts of a million characters, such as one of spaces,
# never sees so many at once.
PIECE = 8192  # characters
CUT = re.compile(r"(?<=\S)[ \n]")


def cut(text, size):
    """Yields the pieces of a text, each of size to 2 * size characters; the last may be shorter.
    Where there is no place to cut, as in a long run of spaces, we cut all the same: the tokens on
    both sides may then differ from those of the whole text."""
    begin = 0
    while len(text) - begin > 2 * size:
        place = CUT.search(text, begin + size, begin + 2 * size)
        end = place.start() if place else begin + 2 * size
        yield text[begin:end]
        begin = end
    yield text[begin:]


def divide(documents, val_share, size=PIECE):
    """Yields (split, begins, piece) for all pieces of the documents: the split, "train" or "val",
    that a piece is used in, and whether a document begins with it.

    val_share is how much of the text is to be held out, 0.01 for example: a piece goes to "val"
    whenever less than that share of the characters so far has. So what is held out comes from
    everywhere in the text. (Also from the middle of a document: training sees its neighbors, but
    not the piece itself.) It is never more than a fifth, even of a text of a few pieces, unless
    val_share asks for more.
    """
    most = max(val_share, 0.2)
    seen = 0
    held_out = 0
    for document in documents:
        previous = None
        for piece in cut(document, size):
            split = "train"
            room = most * (seen + len(piece)) - held_out
            if held_out < val_share * seen and len(piece) <= room:
                split = "val"
            # A document begins, too, where the piece before went to the other split: the shard has
            # nothing of it, so this piece does not go on from anything there.
            yield split, split != previous, piece
            previous = split
            seen += len(piece)
            if split == "val":
                held_out += len(piece)


# -------------------------------------------------------------------------------------------------
# 3. Tokenizing

def tokenize(pieces):
    """Turns an iterator of (split, begins, piece) into one of (split, ids), in the same order."""
    # tiktoken is OpenAI's tokenizer.
    import tiktoken
    try:
        tokenizer = tiktoken.get_encoding("gpt2")
    except OSError as error:  # it downloads the vocabulary, 1.5 MB, the first time
        sys.exit(f"error: tiktoken cannot load GPT-2's vocabulary ({error}): go online once, "
                 "or set TIKTOKEN_CACHE_DIR to a folder that has it")

    def encode(piece):
        split, begins, text = piece
        # disallowed_special: in somebody's text the word "<|endoftext|>" is only a word.
        ids = tokenizer.encode_to_numpy(text, disallowed_special=())
        return split, np.append(END_OF_TEXT, ids) if begins else ids

    # Python runs one thread at a time, the one that holds its lock (the GIL). But tiktoken gives
    # the lock back while it works, so threads do run side by side, and need no copies of texts and
    # ids, as processes would. map() would read all pieces before it gives a result: so we pass it
    # a thousand at a time.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while batch := list(itertools.islice(pieces, 1000)):
            yield from pool.map(encode, batch)


def first_shard_held_out(stream):
    """Divides FineWeb as llm.c does: its first 100M tokens are for validation."""
    room = SHARD_TOKENS
    for _, ids in stream:
        yield "val", ids[:room]
        yield "train", ids[room:]
        room = max(0, room - len(ids))


def refuse_shards(folder):
    """Ends the program if the folder has shards: they may be the work of hours."""
    if any(folder.glob("*.bin")):
        sys.exit(f"error: {folder} holds shards already: move them away or give another --out")


def make_shards(stream, folder, prefix, shards):
    """Writes a stream of (split, ids) as shards; `shards` is the most to train on, None is all."""
    val = ShardWriter(folder, f"{prefix}_val", 0)
    train = ShardWriter(folder, f"{prefix}_train", 1)
    with tqdm(unit=" tokens", unit_scale=True, disable=None) as progress:
        for split, ids in stream:
            writer = val if split == "val" else train
            writer.add(ids)
            progress.update(len(ids))
            if shards and train.index > shards:  # index is the number of the next shard
                train.count = 0  # what the buffer holds would be one shard too many
                break
    for writer in (val, train):
        # A sequence of the smallest model, tiny, has 128 tokens, and one more to predict.
        if not writer.written and writer.count < 129:
            sys.exit(f"error: too little text: {writer.name} has {writer.count} tokens and needs "
                     "129, so give more text or another --val_share")
    # Another run may have finished in the meantime.
    refuse_shards(folder)
    # Both on the disk before one has its name: the disk may be full.
    val.flush()
    train.flush()
    val.finish()
    train.finish()


# -------------------------------------------------------------------------------------------------
# 4. Downloading

# For each -t and -v: the dataset on the hub that has ready shards, and how their names begin.
READY = {
    ("classic", "10B"): ("kjj0/fineweb10B-gpt2", "fineweb"),
    ("classic", "100B"): ("kjj0/fineweb100B-gpt2", "fineweb"),
    ("edu", "10B"): ("kjj0/finewebedu10B-gpt2", "finewebedu"),
}
# For each -t: the dataset that has the raw text, and llm.c's name for the shards made of it.
RAW = {
    "classic": ("HuggingFaceFW/fineweb", "fineweb"),
    "edu": ("HuggingFaceFW/fineweb-edu", "edu_fineweb"),
}


def download(repo, patterns, folder):
    """Downloads the files of a dataset that match the patterns, 8 at a time, unless they are there.
    Ends the program in one line if the hub, the network or the disk fails."""
    from huggingface_hub import HfApi, snapshot_download
    try:
        # This fails if the hub cannot be reached. snapshot_download() does not: it takes what is in
        # the folder for the whole.
        commit = HfApi().dataset_info(repo, revision="main").sha
        snapshot_download(repo, repo_type="dataset", revision=commit, allow_patterns=patterns,
                          local_dir=folder)
    except Exception as error:
        reason = " ".join(str(error.__cause__ or error).split())
        sys.exit(f"error: {repo}: {reason} (check the connection, the disk, and HF_ENDPOINT and "
                 "HF_TOKEN if you set them; then run this command again: whole files are kept)")


def download_ready(repo, folder, shards):
    """Downloads shards into the folder: one for validation, and some or all to train on."""
    patterns = ["*.bin"]
    if shards:
        patterns = [f"*_{i:06d}.bin" for i in range(shards + 1)]
    download(repo, patterns, folder)


def download_raw(repo, version, folder, shards):
    """Downloads FineWeb's raw files into the folder and returns their paths."""
    # The sample of 10B has 15 files of 2 GB. One makes more than 6 shards, so a few shards need few
    # files; the + 1 covers the validation shard and the rounding.
    names = ["*.parquet"]
    if shards:
        names = [f"{i:03d}_*.parquet" for i in range(shards // 6 + 1)]
    sample = f"sample/{version}T"
    download(repo, [f"{sample}/{name}" for name in names], folder)
    return sorted((folder / sample).glob("*.parquet"))


# -------------------------------------------------------------------------------------------------
# 5. The command line

def say_what_next(folder, prefix):
    """Prints how many tokens the shards have, and the command that trains on them."""
    tokens = {}
    for split in ("train", "val"):
        sizes = [path.stat().st_size for path in folder.glob(f"{prefix}_{split}_*.bin")]
        tokens[split] = (sum(sizes) - 4 * HEADER_INTS * len(sizes)) // 2
    print(f"{folder}: {tokens['train']:,} tokens to train on, {tokens['val']:,} held out")

    # Your own text may be read 4 times: until then it is worth nearly as much as new text, and
    # afterwards little (https://arxiv.org/abs/2305.16264). Of FineWeb there is always more.
    tokens_to_read = tokens["train"] * (4 if prefix == "text" else 1)
    # A model wants about 20 tokens for each parameter (https://arxiv.org/abs/2203.15556): d24, with
    # 330M, wants 7 billion, and d12, with 116.5M, 2.3 billion. The only smaller model, tiny, has 7M
    # with GPT-2's vocabulary, and is soon too small. So d12 gets all from 100M tokens on.
    model, step = "tiny", 2048  # tokens a step
    if tokens["train"] >= 0.1e9:
        model, step = "d12", 524_288
    if tokens_to_read >= 7e9:
        model = "d24"
    # In fewer than some hundred steps a model hardly learns. So a step of a small text has fewer
    # tokens, down to the 128 that tiny reads in a row.
    while step > 128 and tokens_to_read < 300 * step:
        step //= 2
    # 19,073 steps are the 10 billion tokens of the sample. Of tiny they are 39 million, half an
    # hour on two cores, and nobody has to wait for more.
    num_iterations = min(19_073, tokens_to_read // step)
    # If the folder's name has brackets or spaces, escape() and quote() see to it that the command
    # still means this folder.
    pattern = shlex.quote(f"{glob.escape(str(folder))}/{prefix}_train_*.bin")
    print(f"Next:\n    python train_gpt2.py --model {model} --input_bin {pattern} "
          f"--total_batch_size {step} --num_iterations {num_iterations}")
    if tokens_to_read < 100_000_000:
        # Nobody learns English from a book or two.
        print(f"So little text teaches more to a model that can write already, OpenAI's:\n"
              f"    pip install transformers\n"
              f"    python train_gpt2.py --init_from gpt2 --input_bin {pattern} --sequence_length "
              f"128 --total_batch_size {step} --num_iterations {num_iterations}")


def between(kind, low, high=math.inf):
    """An argparse type: a number of this kind, int or float, from low to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in the range from {low} to {high}")
        return value

    parse.__name__ = kind.__name__  # what argparse calls it, if it is no number at all
    return parse


def main(argv):
    """Does what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-v", "--version", choices=["10B", "100B"], default="10B", help="tokens in the sample")
    add("-t", "--type", choices=["classic", "edu"], default="classic", help="which FineWeb")
    add("--shards", type=between(int, 1),
        help="at most so many shards to train on, of 100M tokens each")
    add("--tokenize", action="store_true", help="download the raw text and tokenize it here")
    add("--input", nargs="+", metavar="FILE", help="your own files or folders")
    add("--val_share", type=between(float, 0.0001, 0.9999),
        help="share of --input held out for validation (default: a tenth of up to 10 MB, a "
             "hundredth of more)")
    add("--out", type=Path, metavar="DIR", help="folder for shards (default: like fineweb10B)")
    args = parser.parse_args(argv)
    ready = not args.input and not args.tokenize
    if args.input and not args.out:
        parser.error("--input needs --out, a folder for its shards")
    if ready and (args.type, args.version) not in READY:
        parser.error("nobody has 100B tokens of FineWeb-Edu ready: add --tokenize, or -v 10B")

    repo, prefix = RAW[args.type]
    folder = args.out or Path(f"{prefix}{args.version}")
    # Shards are not to be written over, unless they are the hub's and the download goes on: the
    # hub's library leaves a folder .cache beside them.
    if not (ready and (folder / ".cache").exists()):
        refuse_shards(folder)
    make_folder(folder)
    if args.input:
        prefix = "text"
        files = find_files(args.input)
        size = sum(path.stat().st_size for path in files)  # bytes
        # A hundredth of a small text would be too little to validate on. And a small text is cut
        # into small pieces, a hundred if they are not too short, so that several are held out.
        val_share = args.val_share or (0.1 if size <= 10e6 else 0.01)
        pieces = divide(read_files(files), val_share, max(500, min(PIECE, size // 100)))
        make_shards(tokenize(pieces), folder, prefix, args.shards)
    elif args.tokenize:
        paths = download_raw(repo, args.version, folder / "raw", args.shards)
        # divide() holds nothing out: first_shard_held_out() does, once there are tokens to count.
        pieces = divide(read_files(paths), val_share=0)
        make_shards(first_shard_held_out(tokenize(pieces)), folder, prefix, args.shards)
    else:
        repo, prefix = READY[args.type, args.version]
        download_ready(repo, folder, args.shards)
    say_what_next(folder, prefix)


if __name__ == "__main__":
    # A character of a file's name that the terminal lacks becomes a "?".
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="replace")
    # Ctrl-C, and a reader of our output that leaves (| head), end the program at once. Otherwise
    # the hub's library would first download what it has begun, which can take hours.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main(sys.argv[1:])

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

    python fineweb.py --shards 10                              # ready: 1.1 billion tokens, 2.2 GB
    python fineweb.py                                          # the whole sample, 21 GB
    python fineweb.py --tokenize --shards 10                   # from the raw text, tokenized here
    python fineweb.py --input books/ notes.jsonl --out mine    # your own text

Downloads come from the hub, huggingface.co, where data sets are shared. The environment variable
HF_ENDPOINT names a mirror; HF_TOKEN holds the access key of an account (no token of a text). After
an interruption give the same command again: it keeps the files that are whole, and tokenizes from
the start. Parts of other files stay behind in a folder named .cache, which you may remove.
"""
import argparse
import collections
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import sys
import sysconfig
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

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


def write_shard(path, tokens, vocab_size=0):
    """Writes an array of integers below 65,536 as a shard; vocab_size 0 is GPT-2's vocabulary."""
    header = np.zeros(HEADER_INTS, "<i4")
    header[:4] = [SHARD_MAGIC, SHARD_VERSION, len(tokens), vocab_size]
    # Writing can be interrupted, so the shard gets its name only when it is whole. The process's id
    # keeps two programs that write the same shard out of each other's file.
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        file.write(header.tobytes())
        file.write(np.ascontiguousarray(tokens, "<u2").data)
    os.replace(temporary, path)


def count_tokens(path):
    """The number of tokens in a shard. Ends the program if its header and length disagree."""
    header = np.fromfile(path, "<i4", 3)
    if len(header) == 3 and header[0] == SHARD_MAGIC and header[1] == SHARD_VERSION:
        if os.path.getsize(path) == 4 * HEADER_INTS + 2 * int(header[2]):
            return int(header[2])
    sys.exit(f"error: {path} is damaged, its header does not fit its {os.path.getsize(path):,} "
             "bytes: remove it (or all shards, if they were made here) and run this command again")


class ShardWriter:
    """Collects tokens and writes FOLDER/NAME_000001.bin and so on, each when it is full."""

    def __init__(self, folder, name, index):
        self.folder = folder
        self.name = name
        self.index = index  # number of the next shard
        self.buffer = np.empty(SHARD_TOKENS, np.uint16)
        self.count = 0  # tokens in the buffer

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
        """Writes the next shard with what the buffer holds."""
        if self.count:
            path = self.folder / f"{self.name}_{self.index:06d}.bin"
            write_shard(path, self.buffer[:self.count])
            self.index += 1
            self.count = 0


def stdlib_corpus():
    """Makes, once, the shards that train_gpt2.py learns from if it is given none: the source of
    Python's standard library (11 MB, as bytes). Returns the glob pattern of those to train on."""
    source = Path(sysconfig.get_paths()["stdlib"])
    folder = Path(f"stdlib_py{sys.version_info.major}.{sys.version_info.minor}")
    paths = {"train": folder / "stdlib_train_000001.bin", "val": folder / "stdlib_val_000000.bin"}
    if all(path.exists() for path in paths.values()):
        return str(folder / "stdlib_train_*.bin")

    # We leave out the library's tests, packages that pip installed, and help texts (pydoc_data).
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data"}
    texts = {"train": [], "val": []}
    for path in sorted(source.rglob("*.py")):
        name = path.relative_to(source)
        if skip & set(name.parts):
            continue
        # About 8 files in 256 are held out for validation. The hash of the name decides, and not a
        # random number, so that every machine holds out the same ones.
        held_out = hashlib.sha256(name.as_posix().encode()).digest()[0] < 8
        text = np.frombuffer(path.read_bytes(), np.uint8)
        # Before each file comes <|endoftext|>, whose id is 256 in this vocabulary.
        texts["val" if held_out else "train"] += [[VOCAB_SIZE["bytes"] - 1], text]
    if not all(texts.values()):
        sys.exit(f"error: no Python source in {source} to learn from: give --input_bin")
    try:
        folder.mkdir(exist_ok=True)
        for split, path in paths.items():
            write_shard(path, np.concatenate(texts[split]), VOCAB_SIZE["bytes"])
    except OSError as error:
        sys.exit(f"error: cannot write to {folder}: {error}: make room, or change the folder")
    return str(folder / "stdlib_train_*.bin")


# -------------------------------------------------------------------------------------------------
# 2. Documents

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")

# A long text is read, and later tokenized, in blocks. A GPT-2 token may begin with a space, but a
# space never follows a letter, digit or sign inside one. So we cut just before such a space: the
# blocks, tokenized one by one, give the same tokens as the whole text.
BLOCK = 1 << 16  # characters (and the bytes that pyarrow reads at once)
LAST_CUT = re.compile(r".*\S(?=[ \n])", re.DOTALL)


def read_rows(path):
    """Yields (begins, text): whether a document begins here, and its text. A .txt file is one
    document. In .jsonl each line is a JSON object, and in .parquet, a compressed table, each row is
    one; the document is what stands under "text". A few MB of the file are in memory."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet
        # pyarrow would load a whole row group, which can be a whole file of 2 GB. With a buffer and
        # without pre_buffer it reads a little at a time.
        table = parquet.ParquetFile(path, buffer_size=BLOCK, pre_buffer=False)
        for batch in table.iter_batches(64, columns=["text"]):
            for row in batch.to_pylist():
                yield True, text_of(row)
        return
    open_file = gzip.open if path.suffix == ".gz" else open
    with open_file(path, "rb") as file:
        if ".jsonl" in path.suffixes:
            for line in file:
                if line.strip():
                    yield True, text_of(json.loads(line))
                else:
                    yield False, ""  # a blank line is no document, but errors count it as a row
            return
        # utf-8-sig drops the mark that some editors put before the text, and newline="" keeps \r\n.
        decoded = io.TextIOWrapper(file, "utf-8-sig", newline="")
        begins = True
        text = ""
        while len(block := decoded.read(BLOCK)) == BLOCK:
            text += block
            if cut := LAST_CUT.match(text):
                yield begins, text[:cut.end()]
                text = text[cut.end():]
                begins = False
        yield begins, text + block


def text_of(row):
    """The text of a row: what it has under "text"."""
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise ValueError('there is no string under "text"')
    # JSON can write half of a character, "\ud83d", which has no bytes. It becomes a question mark.
    return text.encode("utf-8", "replace").decode()


def read_files(paths):
    """Yields what read_rows() does, of several files. Ends the program where one is damaged."""
    for path in paths:
        row = 0
        try:
            for begins, text in read_rows(path):
                row += 1
                if begins or text:  # leaves out blank lines
                    yield begins, text
        except ImportError:
            sys.exit(f"error: {path}: to read parquet, pip install pyarrow")
        # Python's decoders and pyarrow know a dozen kinds of error for a damaged file.
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            sys.exit(f"error: {path}, row {row + 1}: {reason}: mend the file, or leave it out")


def find_files(names):
    """The files that the names of --input stand for, sorted; folders are searched."""
    files = set()
    for path in map(Path, names):
        try:
            candidates = path.rglob("*") if path.is_dir() else [path]
            found = [file for file in candidates if file.is_file() and file.name.endswith(SUFFIXES)]
        except OSError as error:  # a folder that we may not look into, for example
            sys.exit(f"error: --input: {error}: mend that, or leave it out")
        if not found:
            sys.exit(f"error: --input {path}: no file there that ends in {', '.join(SUFFIXES)}")
        files.update(found)
    return sorted(files)


def divide(documents, val_share):
    """Makes (split, begins, text) of (begins, text). The split, "train" or "val", is a text's use.

    A piece (a document, or a block of a long one) goes to "val" if that has at most val_share of
    the text so far. So the first piece always does, later ones are taken evenly from the whole
    text, and a small text may give "val" more than its share.
    """
    seen = 0
    held_out = 0
    split = None
    for begins, text in documents:
        previous = split
        split = "val" if held_out <= val_share * seen else "train"
        seen += len(text)
        if split == "val":
            held_out += len(text)
        # Where the split changes inside a long text, a new document begins.
        yield split, begins or split != previous, text


# -------------------------------------------------------------------------------------------------
# 3. Tokenizing

def tokenize(documents):
    """Turns an iterator of (split, begins, text) into one of (split, ids), in the same order.

    tiktoken is OpenAI's tokenizer. Python runs one thread at a time, the one that holds its lock
    (the GIL), but tiktoken gives the lock back while it works, so threads do run side by side, and
    need no copies of texts and ids, as processes would.
    """
    import tiktoken
    from tiktoken_ext.openai_public import gpt2
    try:
        vocabulary = gpt2()
    except OSError as error:  # it downloads the vocabulary, 1.5 MB, the first time
        sys.exit(f"error: tiktoken cannot load GPT-2's vocabulary ({error}): go online once, "
                 "or set TIKTOKEN_CACHE_DIR to a folder that has it")

    # Each thread has a tokenizer of its own: where threads share one, they wait for each other.
    own = threading.local()

    def prepare_thread():
        own.encode = tiktoken.Encoding(**vocabulary).encode_to_numpy

    def encode_batch(batch):
        result = []
        for split, begins, text in batch:
            # disallowed_special: in somebody's text the word "<|endoftext|>" is only a word.
            ids = own.encode(text, disallowed_special=())
            result.append((split, np.append(END_OF_TEXT, ids) if begins else ids))
        return result

    # A thread takes 16 documents at a time. About 4 batches per thread wait at most, so that memory
    # does not fill up if reading is faster. The oldest gives its result first: the order stays.
    threads = os.cpu_count() or 1
    waiting = collections.deque()
    with ThreadPoolExecutor(threads, initializer=prepare_thread) as pool:
        while batch := list(itertools.islice(documents, 16)):
            waiting.append(pool.submit(encode_batch, batch))
            if len(waiting) > 4 * threads:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def first_shard_held_out(stream):
    """Divides FineWeb as llm.c does: its first 100M tokens are for validation."""
    room = SHARD_TOKENS
    for _, ids in stream:
        yield "val", ids[:room]
        yield "train", ids[room:]
        room = max(0, room - len(ids))


def claim(folder):
    """Makes FOLDER/tokenizing.tmp, where shards are made, and returns it. Ends the program if it is
    there, so that of two runs into one folder the second stops, or if the folder has shards."""
    work = folder / "tokenizing.tmp"
    try:
        work.mkdir(parents=True)
    except FileExistsError:
        sys.exit(f"error: {work} is there: another run is at work in {folder}, or one was killed. "
                 f"If you know of none, remove {work} and run this command again")
    except OSError as error:
        sys.exit(f"error: cannot make {work}: {error}: give another --out")
    if any(folder.glob("*.bin")):
        work.rmdir()
        sys.exit(f"error: {folder} holds shards already: move them away or give another --out")
    return work


def make_shards(stream, folder, prefix, shards):
    """Writes a stream of (split, ids) as shards; `shards` is the most to train on, None is all."""
    from tqdm import tqdm  # comes with huggingface_hub, which shows its progress with it

    # Shards are made in a folder of their own and moved when the last is done. So what an
    # interrupted run leaves cannot be taken for a finished set.
    work = claim(folder)
    try:
        val = ShardWriter(work, f"{prefix}_val", 0)
        train = ShardWriter(work, f"{prefix}_train", 1)
        with tqdm(unit=" tokens", unit_scale=True, disable=None) as progress:
            for split, ids in stream:
                (val if split == "val" else train).add(ids)
                progress.update(len(ids))
                if shards and train.index > shards:  # index is the number of the next shard
                    train.count = 0  # what the buffer holds would be one shard too many
                    break
        val.flush()
        train.flush()
        # "val" sorts last: if moving is interrupted it is missing, and train_gpt2.py says so.
        for path in sorted(work.iterdir()):
            path.rename(folder / path.name)
    except OSError as error:
        sys.exit(f"error: cannot write to {folder}: {error}: make room or give another --out")
    finally:
        shutil.rmtree(work)


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
    from huggingface_hub import snapshot_download

    # Ctrl-C: the library would first finish the files under way, which can take minutes.
    usual = signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    request = {"repo_type": "dataset", "allow_patterns": patterns, "local_dir": folder}
    try:
        # The library replaces a file that is not the hub's without a word. It may be somebody's
        # work, so we look first. (Before huggingface_hub 2.3 dry_run does not report such a file.)
        for file in snapshot_download(repo, dry_run=True, **request):
            if file.will_download and os.path.exists(file.local_path):
                sys.exit(f"error: {file.local_path} is not the hub's file of that name: move it "
                         "away, or give another --out")
        snapshot_download(repo, **request)
    except Exception as error:
        reason = " ".join(str(error.__cause__ or error).split())
        sys.exit(f"error: {repo}: {reason} (check the connection, the disk, and HF_ENDPOINT and "
                 "HF_TOKEN if you set them; then run this command again: whole files are kept)")
    signal.signal(signal.SIGINT, usual)


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
    """Checks the shards' headers and prints the command that trains on them."""
    pattern = f"{folder}/{prefix}_train_*.bin"
    train = [count_tokens(path) for path in folder.glob(f"{prefix}_train_*.bin")]
    val = [count_tokens(path) for path in folder.glob(f"{prefix}_val_*.bin")]
    print(f"{folder}: {sum(train):,} tokens to train on in {len(train)} shards, {sum(val):,} held "
          "out for validation")
    if min(sum(train), sum(val)) <= 1024:
        sys.exit(f"error: {folder} is too small: train_gpt2.py reads 1,024 tokens in a row, from "
                 "each of the two. Move its shards away and give more text or another --val_share")
    # A model wants about 20 tokens a parameter (https://arxiv.org/abs/2203.15556). For d24, with
    # 24 layers and 350M parameters, that is 7 billion. d12 has 12 layers and 124M.
    command = f"python train_gpt2.py --model {'d24' if sum(train) >= 7e9 else 'd12'}"
    if pattern != "fineweb10B/fineweb_train_*.bin":
        command += f" --input_bin {shlex.quote(pattern)}"
    # A training step reads 524,288 tokens by default. For a small set we halve that until one pass
    # over it has at least 16 steps, and make 4 passes; more help little
    # (https://arxiv.org/abs/2305.16264).
    step = 524_288
    while step > 1024 and step > sum(train) / 16:
        step //= 2
    if step < 524_288:
        command += f" --total_batch_size {step} --num_iterations {4 * sum(train) // step}"
    print(f"Next:\n    {command}")


def main(argv):
    """Does what the command line asks for. Every mistake ends in sys.exit and one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-v", "--version", choices=["10B", "100B"], default="10B", help="tokens in the sample")
    add("-t", "--type", choices=["classic", "edu"], default="classic", help="which FineWeb")
    add("--shards", type=int, help="at most so many shards to train on, of 100M tokens each")
    add("--tokenize", action="store_true", help="download the raw text and tokenize it here")
    add("--input", nargs="+", metavar="FILE", help=f"your files or folders: {' '.join(SUFFIXES)}")
    add("--val_share", type=float, default=0.01, help="share of --input held out for validation")
    add("--out", type=Path, metavar="DIR", help="folder for shards (default: like fineweb10B)")
    parser.error = lambda message: sys.exit(f"error: {message}; see --help")
    args = parser.parse_args(argv)
    # Someone may take it for a number of tokens; a list of so many names would fill the memory.
    if args.shards is not None and not 1 <= args.shards <= 10_000:
        parser.error("--shards must lie between 1 and 10,000, of 100M tokens each")
    if not 0 < args.val_share < 1:
        parser.error("--val_share must lie between 0 and 1")
    if args.input and (args.tokenize or not args.out):
        parser.error("--input needs --out, and no --tokenize")

    repo, prefix = RAW[args.type]
    folder = args.out or Path(f"{prefix}{args.version}")
    if args.input:
        prefix = "text"
        stream = tokenize(divide(read_files(find_files(args.input)), args.val_share))
        make_shards(stream, folder, prefix, args.shards)
    elif args.tokenize:
        # If the folder cannot be used, say so before 30 GB are downloaded.
        claim(folder).rmdir()
        paths = download_raw(repo, args.version, folder / "raw", args.shards)
        # None: first_shard_held_out() decides the split, once the tokens are counted.
        documents = ((None, begins, text) for begins, text in read_files(paths))
        stream = first_shard_held_out(tokenize(documents))
        make_shards(stream, folder, prefix, args.shards)
    elif (args.type, args.version) in READY:
        repo, prefix = READY[args.type, args.version]
        patterns = ["*.bin"]
        if args.shards:
            patterns = [f"*_{i:06d}.bin" for i in range(args.shards + 1)]
        download(repo, patterns, folder)
    else:
        parser.error("nobody has 100B tokens of FineWeb-Edu ready: add --tokenize, or -v 10B")
    say_what_next(folder, prefix)


if __name__ == "__main__":
    # A character of a folder's name that the terminal lacks is shown as a question mark.
    sys.stdout.reconfigure(errors="replace")
    try:
        try:
            main(sys.argv[1:])
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output, less or head, has left. Python's own flush must not fail, too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

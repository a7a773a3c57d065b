"""
The data: text from the web as files of tokens, which is all that train_gpt2.py ever sees. The second chapter.

    1 tokens and shards    2 documents    3 from documents to shards    4 downloading    5 the command line

Three ways to come by them; the shards have one format, and FineWeb's lie where train_gpt2.py looks:
    python fineweb.py                                             # FineWeb, 10B tokens, tokenised by others: 21 GB
    python fineweb.py --shards 10                                 # its first billion is enough to try things
    python fineweb.py --tokenize                                  # the raw text, tokenised here (pip install pyarrow)
    python fineweb.py --input books/ notes.jsonl.gz --out mine    # your own text

FineWeb (https://arxiv.org/abs/2406.17557) is Common Crawl, filtered by what made models better; FineWeb-Edu (-t edu) is the
part of it that a classifier finds worth teaching. Interrupt any of this at any time: the same command goes on from there.
"""
import argparse
import collections
import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urljoin

import numpy as np
import requests
from urllib3.util import Retry  # requests stands on urllib3

def say(text, end="\n", stream="stdout"):
    """Prints a line, over the one that shows progress."""
    file = getattr(sys, stream)
    print(f"\r\033[K{text}" if file.isatty() else text, end=end, file=file, flush=True)

def die(message):
    """Ends the program over a user's mistake: one line that says what to do next, exit code 2, no traceback."""
    say(f"error: {message}", stream="stderr")
    sys.exit(2)

# ---- 1. Tokens and shards -------------------------------------------------------------------------------------------

# A model reads numbers. Bytes would do (train_gpt2.py's default run takes them), but English needs 4 to 5 bytes for what is
# one token of GPT-2. Its vocabulary holds the 256 bytes and 50,000 strings made by joining, over and over, the two
# neighbours that are most often seen together (byte pair encoding, https://arxiv.org/abs/1508.07909). So 1024 tokens reach
# four times as far as 1024 bytes, and yet no text is unknown, because every byte is there. The 50,257th id is no text:
EOT = 50256  # <|endoftext|>, before every document: what came earlier has nothing to do with what follows

# Every id is below 65,536, so two bytes hold one (uint16), and 10B tokens take 20 GB. They come in shards of 200 MB: one can
# be used before the next is there, and fetched again if it is damaged. The format is llm.c's: 256 int32 of header (magic,
# version, number of tokens, zeros), then the tokens, all little-endian.
MAGIC, VERSION, HEADER_BYTES, SHARD_TOKENS = 20240520, 1, 1024, 100_000_000

def shard_error(path):
    """What is wrong with a shard's header or length; None if nothing is."""
    size, header = os.path.getsize(path), np.fromfile(path, "<i4", 3)
    if len(header) < 3 or header[0] != MAGIC or header[1] != VERSION:
        return "has no shard's header"
    return None if size == HEADER_BYTES + 2 * int(header[2]) else f"has {size:,} bytes for {header[2]:,} tokens"

class ShardWriter:
    """Cuts a stream of tokens into shards path_of(first) ... path_of(last); the newest one may be shorter.

    Shards that are there already stay, and tell how far an earlier run came: they hold `begun` documents, one EOT each, and
    of the last of those, which may go on in the next shard, `drop` tokens."""

    def __init__(self, path_of, first, last=999_999):
        self.path_of, self.index, self.last, self.file = path_of, first, last, None
        self.begun = self.drop = 0
        while path_of(self.index).exists() and not shard_error(path_of(self.index)):
            shard = np.memmap(path_of(self.index), "<u2", "r", offset=HEADER_BYTES)
            starts = np.flatnonzero(shard == EOT)
            self.drop = len(shard) - int(starts[-1]) if len(starts) else self.drop + len(shard)
            self.begun, self.index = self.begun + len(starts), self.index + 1

    def write(self, tokens):
        """Appends tokens (uint16), but for those that the shards have from an earlier run, and those beyond the last shard."""
        tokens, self.drop = tokens[self.drop:], max(0, self.drop - len(tokens))
        while len(tokens) and self.index <= self.last:
            if not self.file:
                self.file, self.count = open(f"{self.path_of(self.index)}.tmp", "wb"), 0
                self.file.write(bytes(HEADER_BYTES))  # filled in at the end, when the count is known
            piece, tokens = np.split(tokens, [SHARD_TOKENS - self.count])
            self.file.write(piece)
            self.count += len(piece)
            if self.count == SHARD_TOKENS:
                self.close()

    def close(self):
        """Gives the shard its name, once every byte is on the disk: so it is whole, or not there."""
        if self.file:
            self.file.seek(0)
            self.file.write(np.array([MAGIC, VERSION, self.count], "<i4"))
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            os.replace(self.file.name, self.path_of(self.index))
            self.file, self.index = None, self.index + 1

# ---- 2. Documents ---------------------------------------------------------------------------------------------------

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
PIECE = 1 << 20  # characters that are read, and tokenised, at a time
# No token of GPT-2 goes on from a letter, digit or sign to a space or newline, so that a long text can be cut between the two:
# the tokens of the pieces are those of the whole. (Within a row of spaces they would not be.)
CUT = re.compile(r".*\S(?=[ \n])", re.DOTALL)
HALF = re.compile("[\ud800-\udfff]")  # half of a character: JSON can write it, UTF-8 cannot

def read_documents(path):
    """Yields (begins a document, text, how much of the file is read, 0 to 1); memory stays flat however large the file is.
    A .txt is one document; .jsonl has one a line, in its field "text"; .parquet one a row, in its column "text"."""
    def string(text):
        return text if isinstance(text, str) else die(f'{path}, row {row}: "text" is {text!r:.40}; mend that row or leave it out')

    row, size = 0, max(1, os.path.getsize(path))
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as parquet  # here, since the default way does not need it
            table = parquet.ParquetFile(path, buffer_size=PIECE, pre_buffer=False)  # read page by page: 0.2 GB of memory
            if "text" not in table.schema_arrow.names:
                die(f'{path} has no column "text" but {", ".join(table.schema_arrow.names)}: rename one')
            for batch in table.iter_batches(64, columns=["text"]):
                for row, text in enumerate(batch.column(0).to_pylist(), row + 1):
                    yield True, string(text), row / table.metadata.num_rows
            return
        with open(path, "rb") as raw, gzip.open(raw) if path.suffix == ".gz" else raw as data:
            file = io.TextIOWrapper(data, "utf-8-sig", newline="\n")  # -sig: some editors put a mark before the text
            if path.name.endswith((".jsonl", ".jsonl.gz")):
                for row, line in enumerate(file, 1):
                    if line.strip():
                        fields = json.loads(line)
                        text = string(fields.get("text") if isinstance(fields, dict) else fields)
                        yield True, HALF.sub("\ufffd", text), raw.tell() / size
                return
            text, begins, more = "", True, True
            while more:
                more, old = file.read(PIECE), max(0, len(text) - 1)
                text += more
                cut = CUT.match(text, old)
                cut = len(text) if not more else cut.end() if cut else 0
                if cut or not more:
                    yield begins, text[:cut], raw.tell() / size
                    begins, text = False, text[cut:]
    except ImportError:
        die(f"{path}: to read parquet, pip install pyarrow")
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as e:  # ValueError: no UTF-8, no JSON, or from pyarrow
        die(f"{path} is damaged near row {row}, or is not what its name says: {str(e).splitlines()[0]}")

# ---- 3. From documents to shards ------------------------------------------------------------------------------------

class Meter:
    """Progress through `total` bytes, rate and time left: one line, renewed in a terminal, once a minute anywhere else."""

    def __init__(self, total):
        self.total, self.past, self.terminal = total, collections.deque([(time.time(), 0)], maxlen=60), sys.stdout.isatty()

    def show(self, done, more=""):
        (then, before), now = self.past[0], time.time()  # the rate of the last 60 lines, so that it follows the line's moods
        if now - self.past[-1][0] > (0.5 if self.terminal else 60):
            self.past.append((now, done))
            rate = max(1, done - before) / (now - then)
            say(f"{done / 1e9:.2f} of {self.total / 1e9:.2f} GB | {rate / 1e6:.1f} MB/s | {(self.total - done) / rate / 60:.1f} min left"
                + more, "" if self.terminal else "\n")

def in_order(pool, function, items, ahead, waiting=lambda: None):
    """Yields function(item) of each item, in order, while the pool is at work on up to `ahead` more."""
    jobs = collections.deque()
    def result():
        while not jobs[0].done():
            wait([jobs[0]], timeout=0.5)
            waiting()
        return jobs.popleft().result()
    for item in items:
        jobs.append(pool.submit(function, item))
        if len(jobs) > ahead:
            yield result()
    while jobs:
        yield result()

def tokenize(documents, writers, total, cores):
    """Makes shards of documents, an iterable of (writer, begins a document, text, bytes of input up to here), total of them.
    What is written depends on the documents alone.

    Threads do it: tiktoken leaves Python's lock while it works, and encode_to_numpy builds no Python list under it. A pool
    of processes has to send texts and tokens around, and on macOS such pools have hung. On 2 cores, from parquet to shards:
    6.9M tokens/s, where a pool that gets one document at a time makes 4.2M, both in one run; 0.2 GB of memory instead of 1.5."""
    import tiktoken  # here, since the default way does not need it
    try:
        encode = tiktoken.get_encoding("gpt2").encode_to_numpy
    except OSError as e:  # it downloads the vocabulary, 1.5 MB, once
        die(f"tiktoken cannot load GPT-2's vocabulary ({e}): go online, or set TIKTOKEN_CACHE_DIR to a copy")
    encode("It's 1 word,\n\n  or two")  # one of each kind of piece, in this thread, before any other: where two threads are the
    # first to meet one, they slow each other down for good, to 5.1M tokens/s from 8.3M (tiktoken 0.14, 2 cores)
    meter, made, start = Meter(total), 0, time.time()

    def batches():
        batch, size, seen = [], 0, collections.Counter()
        for writer, begins, text, position in documents:
            seen[writer] += begins
            if seen[writer] < writer.begun:  # an earlier run has written all of it
                meter.show(position)
                continue
            batch.append((writer, begins, text, position))
            size += len(text)
            if size >= PIECE:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def encode_batch(batch):
        parts = {writer: [] for writer in writers}
        for writer, begins, text, position in batch:  # disallowed_special: in a text "<|endoftext|>" is only text
            parts[writer] += [[EOT]] * begins + [encode(text, disallowed_special=())]
        return position, {writer: np.concatenate(part).astype("<u2") for writer, part in parts.items() if part}

    with ThreadPoolExecutor(cores) as pool:
        for position, parts in in_order(pool, encode_batch, batches(), 2 * cores):  # 2: work while a shard goes to the disk
            for writer, tokens in parts.items():
                writer.write(tokens)
                made += len(tokens)
            meter.show(position, f" | {made:,} tokens, {made / (time.time() - start) / 1e6:.2f}M/s")
            if all(writer.index > writer.last for writer in writers):
                break
    for writer in writers:
        writer.close()
    say(f"{made:,} tokens in {time.time() - start:.1f} s, {made / (time.time() - start) / 1e6:.2f}M a second")

# ---- 4. Downloading -------------------------------------------------------------------------------------------------

# Lines drop, servers stumble, and proxies answer in place of both. What may pass is tried again, each time later, from the
# byte where it broke; what will not pass ends in one line. No file has its name before its checksum is right.
# From a local server at 120 MB/s this gets 95 % of what curl gets; at 1 GB/s 50 to 65 %, since disk and sha256 take their time.
CONNECTIONS, TIMEOUT = 8, (10, 30)  # files at a time; seconds to connect, and to wait for more of a body
TRIES, WAIT = 8, 0.5  # fruitless tries in a row; seconds, doubled with each: a minute in all

@dataclass
class Download:
    url: str
    path: Path
    size: int = 0     # bytes
    sha256: str = ""  # as the hub names it, "" where it names none

    def have(self):
        """Bytes on the disk."""
        for path in (Path(f"{self.path}.part"), self.path):  # in this order: meanwhile the first may become the second
            with contextlib.suppress(FileNotFoundError):
                return path.stat().st_size
        return 0

def hub():
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")

def get(url, headers=(), redirects=True):
    """A response to a GET, its body still to be read. Raises requests' errors for what does not pass in a minute or two, or
    in the time that the server asks for (Retry-After)."""
    headers = {"Accept-Encoding": "identity", **dict(headers)}  # compressed bytes could be neither counted nor resumed
    if os.environ.get("HF_TOKEN") and url.startswith(hub()):
        headers["Authorization"] = f"Bearer {os.environ['HF_TOKEN']}"  # requests drops it when a redirect leaves the host
    retry = Retry(total=None, connect=3, read=TRIES, other=0, status=TRIES, backoff_factor=WAIT,
                  status_forcelist=(408, 425, 429, 500, 502, 503, 504))
    for tries in range(TRIES):
        with requests.Session() as session:
            session.adapters = dict.fromkeys(("https://", "http://"), requests.adapters.HTTPAdapter(max_retries=retry))
            r = session.get(url, headers=headers, stream=True, timeout=TIMEOUT, allow_redirects=redirects)
        r.raise_for_status()
        if r.is_redirect or "text/html" not in r.headers.get("Content-Type", ""):
            return r
        r.close()
        time.sleep(WAIT * 2 ** tries)
    raise requests.ConnectionError("a web page comes instead of the file", request=r.request)

def probe(download):
    """Asks the hub for size and sha256; it names both while it redirects to the host that has the bytes."""
    url = download.url
    for _ in range(10):
        with get(url, redirects=False) as r:
            if size := r.headers.get("X-Linked-Size") or (not r.is_redirect and r.headers.get("Content-Length")):
                download.size, download.sha256 = int(size), r.headers.get("X-Linked-Etag", "").strip('"')
                return
            url = urljoin(url, r.headers.get("Location", ""))  # of a dataset that has another name now, say
    raise requests.ConnectionError("no answer names the length of the file", request=r.request)

def error_in(download, path):
    """What is wrong with the bytes at path, or None."""
    digest, buffer, size = hashlib.sha256(), bytearray(PIECE), os.path.getsize(path)
    if size != download.size:
        return f"has {size:,} of {download.size:,} bytes"
    with open(path, "rb", buffering=0) as f:
        while download.sha256 and (n := f.readinto(buffer)):
            digest.update(memoryview(buffer)[:n])
    if download.sha256 not in ("", digest.hexdigest()):
        return "has not the sha256 that the hub names"
    return shard_error(path) if download.path.suffix == ".bin" else None

def fetch(download):
    """Brings one file, or finds that it is there. Returns its path."""
    path, part, tries, most = download.path, Path(f"{download.path}.part"), 0, 0
    if path.exists() and (error := error_in(download, path)):
        os.replace(path, f"{path}.old")  # it may be somebody's own work
        say(f"{path} {error}: kept as {path}.old and fetched again")
    while not path.exists():
        try:
            if (have := download.have()) < download.size:
                r = get(download.url, {"Range": f"bytes={have}-"} if have else {})
                with r, open(part, "ab" if r.status_code == 206 else "wb") as f:  # 200: the server sends all of it
                    for block in r.iter_content(PIECE):
                        f.write(block)
                    f.flush()
                    os.fsync(f.fileno())
            if not (error := error_in(download, part)):
                os.replace(part, path)
                break
            if download.have() >= download.size:
                part.unlink()
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError) as e:  # it broke off
            error = f"breaks off ({type(e).__name__})"
        tries, most = (0, download.have()) if download.have() > most else (tries + 1, most)
        if tries == TRIES:
            raise OSError(f"{download.url}: what comes {error}, {TRIES} times in a row")
        say(f"{download.url}: what comes {error}, trying again")
        time.sleep(WAIT * 2 ** tries)
    return path

def prepare(downloads, need=0):
    """Asks for the sizes of downloads, and makes sure that the disk has room for them and for need bytes more."""
    say(f"asking for size and checksum of {len(downloads)} file(s)")
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(probe, downloads))
    check_space(downloads[0].path.parent, need + sum(max(0, d.size - d.have()) for d in downloads))

def fetched(downloads, ahead=2 * CONNECTIONS):
    """Brings files: yields their paths in order, each when it is whole, while up to `ahead` more are under way."""
    pool, meter = ThreadPoolExecutor(CONNECTIONS), Meter(sum(d.size for d in downloads))
    try:
        yield from in_order(pool, fetch, downloads, ahead, lambda: meter.show(sum(d.have() for d in downloads)))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)

@contextlib.contextmanager
def plain_errors(path):
    """What the network refuses for good, or the disk that path is on, ends the program in one line."""
    try:
        yield
    except requests.RequestException as e:
        reason = getattr(e.args[0], "reason", e) if e.args else e  # of what urllib3 and requests wrapped
        refused = e.response is not None and e.response.status_code in (401, 403)
        die(f"{reason} ({e.request.url if e.request else hub()}): " + ("set HF_TOKEN to a token that may read it" if refused else
            "check the line, and HF_ENDPOINT if you set it; --help shows other ways"))
    except OSError as e:
        die(f"{path}: {e}: mend that (or wait), then the same command goes on from here")

def check_space(folder, need):
    """Makes the folder, and sure that its disk has room for need bytes more."""
    folder.mkdir(parents=True, exist_ok=True)
    if need > (free := shutil.disk_usage(folder).free):
        die(f"{folder}: {(need - free) / 1e9:.2f} GB of disk space are missing, {need / 1e9:.2f} GB are to come and "
            f"{free / 1e9:.2f} GB are free: make room, take fewer --shards, or give another --out")

# ---- 5. The command line --------------------------------------------------------------------------------------------

# (-t, -v): folder and prefix of the shards, as llm.c's; who has them ready, their prefix and number; who has the raw text
SETS = {
    ("classic", "10B"): ("fineweb10B", "fineweb", "kjj0/fineweb10B-gpt2", "fineweb", 103, "HuggingFaceFW/fineweb"),
    ("classic", "100B"): ("fineweb100B", "fineweb", "kjj0/fineweb100B-gpt2", "fineweb", 1030, "HuggingFaceFW/fineweb"),
    ("edu", "10B"): ("edu_fineweb10B", "edu_fineweb", "kjj0/finewebedu10B-gpt2", "finewebedu", 99, "HuggingFaceFW/fineweb-edu"),
    ("edu", "100B"): ("edu_fineweb100B", "edu_fineweb", None, None, 1000, "HuggingFaceFW/fineweb-edu")}

def list_parquet(url):
    """Paths of the parquet files in a folder of a dataset, from the hub's API, which answers page by page."""
    paths = []
    while url:
        with get(url) as r:
            paths += [entry["path"] for entry in r.json() if entry["path"].endswith(".parquet")]
            url = "next" in r.links and urljoin(url, r.links["next"]["url"])
    return sorted(paths)

def claim(folder, source):
    """Notes in the folder what its shards are made from, and refuses one with shards of something else: to go on from an
    earlier run's shards is right only with that run's documents."""
    note = folder / "source.txt"
    was = note.read_text() if note.exists() else "downloads"
    if was != source and any(folder.glob("*.bin")):
        die(f"{folder} holds shards of another source ({was:.100}): give another --out, or move them away")
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(source)

def input_files(names):
    """The files of --input, folders taken apart, in a fixed order and each once."""
    files = []
    for name in map(Path, names):
        found = [p for p in (sorted(name.rglob("*")) if name.is_dir() else [name]) if p.is_file() and p.name.endswith(SUFFIXES)]
        if not found:
            die(f"--input {name}: no such file, or none that ends in {', '.join(SUFFIXES)}")
        files += found
    return list(dict.fromkeys(files))

def documents_of(paths, train, val=None, val_share=0.0):
    """What tokenize() reads. A document's words decide whether it is held out, so that one that comes twice is not on both
    sides; but the first one always is, so that a small corpus has some."""
    done, count = 0, 0
    for path in paths:
        for begins, text, part in read_documents(path):
            if begins:
                draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32
                writer, count = val if val and (draw < val_share or count == 0) else train, count + 1
            yield writer, begins, text, done + int(part * path.stat().st_size)
        done += path.stat().st_size
    if val and count < 2:
        die(f"--input: {count} documents cannot be divided into training and validation: give more, or cut it up")

def make_shards(args):
    """Does what the command line asks for. Returns the folder and the prefix of the shards."""
    if args.cores < 1 or args.shards < 0 or not 0 < args.val_share < 1 or bool(args.input) > bool(args.out):
        die("--cores must be at least 1, --shards not negative, --val_share between 0 and 1, and --input needs --out")
    folder, prefix, ready, their_prefix, count, raw = SETS[args.type, args.version]
    folder, count = args.out or Path(folder), min(count, args.shards or count)
    address = lambda repo, path: f"{hub()}/datasets/{repo}/resolve/main/{path}"
    if args.input:
        paths, prefix = input_files(args.input), folder.resolve().name
        total = sum(path.stat().st_size for path in paths)
        claim(folder, f"{args.val_share} of {[(path.name, path.stat().st_size) for path in paths]}")
        check_space(folder, total // 2)  # plain text has 4 to 5 bytes a token of 2; packed text is more than it looks
        val, train = (ShardWriter(lambda i, split=split: folder / f"{prefix}_{split}_{i:06d}.bin", first)
                      for first, split in enumerate(("val", "train")))
        tokenize(documents_of(paths, train, val, args.val_share), [val, train], total, args.cores)
    elif args.tokenize:
        claim(folder, raw)
        writer = ShardWriter(lambda i: folder / f"{prefix}_{'train' if i else 'val'}_{i:06d}.bin", 0, args.shards or 10**6)
        if writer.index <= writer.last:
            paths = list_parquet(f"{hub()}/api/datasets/{raw}/tree/main/sample/{args.version}T")
            files = [Download(address(raw, path), folder / "raw" / Path(path).name) for path in paths]
            prepare(files, need=2 * SHARD_TOKENS * max(0, count + 1 - writer.index))
            tokenize(documents_of(fetched(files, ahead=2), writer), [writer], sum(d.size for d in files), args.cores)
            say(f"{folder / 'raw'} is needed only if you take more --shards")
    elif not ready:
        die("nobody has 100B tokens of FineWeb-Edu ready: add --tokenize to make them here, or take -v 10B")
    else:
        claim(folder, "downloads")
        names = [f"_val_{0:06d}.bin"] + [f"_train_{i:06d}.bin" for i in range(1, count + 1)]
        files = [Download(address(ready, their_prefix + name), folder / (prefix + name)) for name in names]
        prepare(files)
        for path in fetched(files):
            say(f"{path} is ready")
    return folder, prefix

def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-v", "--version", choices=["10B", "100B"], default="10B", help="FineWeb's sample of so many tokens")
    parser.add_argument("-t", "--type", choices=["classic", "edu"], default="classic", help="FineWeb or FineWeb-Edu")
    parser.add_argument("--shards", type=int, default=0, help="only the first so many training shards, of 100M tokens each")
    parser.add_argument("--tokenize", action="store_true", help="download the raw text and tokenise it here")
    parser.add_argument("--input", nargs="+", metavar="FILE", help=f"tokenise these files and folders: {' '.join(SUFFIXES)}")
    parser.add_argument("--val_share", type=float, default=0.01, help="share of --input's documents that is held out")
    parser.add_argument("--out", type=Path, help="folder of the shards; not given: llm.c's for FineWeb")
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="threads that tokenise")
    parser.error = die
    args = parser.parse_args(argv)
    try:
        with plain_errors(args.out or SETS[args.type, args.version][0]):
            folder, prefix = make_shards(args)
    except KeyboardInterrupt:
        say("stopped: the same command goes on from here")
        return 130
    flags = "" if folder == Path("fineweb10B") else "".join(
        f" --input_{'val_' * (split == 'val')}bin '{folder}/{prefix}_{split}_*.bin'" for split in ("train", "val"))
    say(f"{folder} has {len(list(folder.glob('*_train_*.bin')))} training shards. Next:\n    python train_gpt2.py --model d24{flags}")
    return 0

if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except SystemExit as e:
        code = e.code
    os._exit(code)  # at once: a thread may be waiting for a server

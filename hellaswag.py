"""
Chapter three asks whether the model of train_gpt2.py can tell how a text goes on. HellaSwag is a
set of 10,042 questions, and models of GPT-2's size are compared by how many they answer right.

    python hellaswag.py -m log124M/best.pt      # a checkpoint of train_gpt2.py
    python hellaswag.py -m gpt2                 # OpenAI's own weights: checks this program itself

A question is the beginning of a text, its context, and four endings. Here is number 12:

    He then takes the knife and sharpens it against the wood piece. He then notices a little black
    and green poisonous frog sitting next to him. the frog
                                                                      tokens    sum   mean
    0  eventually gets to get up and marches out of the room waving ...   16  52.09   3.26
    1  then starts to get up from the chair and begins walking ...        15  45.30   3.02
    2  then escapes and jumps away.   <-- the real one                     6  27.08   4.51
    3  is acting crazy and attacking him while he is cooking.             11  41.93   3.81

A small language model only continues texts; it does not answer questions. But it gives every
possible next token a probability. The probability of an ending is the product of those of its
tokens, each after all that is before it, so -log of it is the sum of their losses. For ending 2,
with p(a | b) for the probability of the token a after the text b:

      -log p(" then"    | He then takes ... the frog)
    + -log p(" escapes" | He then takes ... the frog then)
    + -log p(" and"     | He then takes ... the frog then escapes)      and so on, up to the "."

The ending with the smallest loss is the model's answer. The losses above are from
https://github.com/karpathy/llm.c/pull/431 (some size of GPT-2), and show why there are two scores.
Both are shares of the questions:

    acc        those whose real ending has the smallest sum. Every token adds to it, so short
               endings have an advantage: here it is that of 2, so the answer is right.
    acc_norm   those whose real ending has the smallest mean, the sum divided by the length: here it
               is that of 1, which is wrong. Over all it is right more often, so it is quoted.

Guessing is right once in four, 0.25; people reach over 0.95, and a model of 124M parameters about
0.30. The wrong endings were written by a language model, and only those were kept that fooled
another model (https://arxiv.org/abs/1905.07830). A small model knows little more than which words
often go together, and in the wrong endings they do. So only a model that has learned something of
what the words mean scores above chance.

A score may be compared with a published one if both are of all the questions, in the same style,
and, in completion style, of the same vocabulary:

    completion   the texts as they are in the file, with lengths in tokens. The programs llm.c and
                 build-nanogpt do the same; it is the default. `-m gpt2` must give acc_norm 0.2955.
    --harness    as in lm-evaluation-harness, the program that most published models are scored
                 with: the topic comes first ("Sharpening knives: He then takes ..."), marks left
                 from web pages go, lengths are in characters. `-m gpt2` gives acc_norm 0.3114.
"""
import argparse
import json
import math
import os
import re
import signal
import sys
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    # Ctrl-C, and a reader of our output that leaves (| head), end the program quietly, without a
    # traceback. This stands here because the import of PyTorch takes seconds.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)

import numpy as np
import requests
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

# The scores of others, and where they are from.
# GPT-2 124M, 1558M: https://github.com/karpathy/build-nanogpt, in its hellaswag.py
# GPT-2 350M, 774M: https://github.com/karpathy/llm.c/discussions/481 (which has 0.294 for 124M)
# GPT-3: https://arxiv.org/abs/2005.14165 (it prepared the questions in its own way)
# the course work this project follows: https://github.com/Morris88826/CSCE-689-HW2
PUBLISHED = {
    "completion": """\
acc       GPT-2: 124M 0.2859, 1558M 0.3842
acc_norm  GPT-2: 124M 0.2955, 350M 0.375, 774M 0.432, 1558M 0.4893
          GPT-3: 124M 0.337, 350M 0.436, a rough guide: its questions were prepared otherwise
          the course work this project follows: 124M 0.3078, 350M (half of its steps) 0.3352""",
    "harness": """\
acc       GPT-2: 124M 0.2892, 1558M 0.4004
acc_norm  GPT-2: 124M 0.3114, 1558M 0.5089""",
}

# ---- 1. The questions ----------------------------------------------------------------------------

# This validation set is a file of questions, and has nothing to do with the validation shards of
# fineweb.py. Everybody scores on it: the labels of HellaSwag's test set are kept secret.
DATA_URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
DATA = Path("hellaswag/hellaswag_val.jsonl")
SIZE = 10042  # questions in it


def download():
    """Fetches the file at DATA_URL (12 MB) to DATA. On failure, exits with one line."""
    print(f"downloading {DATA_URL} to {DATA}")
    # Runs that start together differ in process id, so none writes into another's file.
    tmp = DATA.with_name(f"{DATA.name}.{os.getpid()}.tmp")
    try:
        answer = requests.get(DATA_URL, timeout=60)
        answer.raise_for_status()
        DATA.parent.mkdir(parents=True, exist_ok=True)
        # Under another name first: whatever happens here, a file that is named DATA is whole.
        tmp.write_bytes(answer.content)
        os.replace(tmp, DATA)
    except (requests.RequestException, OSError) as e:
        if tmp.exists():
            tmp.unlink()
        sys.exit(f"error: {DATA_URL} cannot be had ({e}): try again, or put the file at {DATA}")


def load_questions(path=None, harness=False):
    """A file of questions -> list of dicts. Without a path: the validation set, downloaded once.

    A line is a question in JSON: ctx (the context), endings (four), label (the real one, 0 to 3).
    The harness style reads activity_label (the topic), ctx_a and ctx_b (ctx in two parts) instead
    of ctx. A bad file ends the program, with one line that says which of its lines is wrong."""
    file = path or DATA
    # Only the downloaded file may be removed: a user's own could be the only copy.
    advice = "mend the file or give another --data"
    if not path:
        advice = "remove the file, and the next run downloads it again"
        if not DATA.exists():
            download()
    try:
        lines = Path(file).read_bytes().split(b"\n")
    except (OSError, ValueError) as e:
        sys.exit(f"error: {file} cannot be read ({e})")
    questions = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            q = json.loads(line.decode("utf-8"))
            # Some copies of the data have the label as text. int() would also take 1.7 for 1.
            q["label"] = ["0", "1", "2", "3"].index(str(q["label"]))
            context, endings = question_texts(q, harness)
            # JSON can spell half a character, \ud800, which no tokenizer can encode.
            "".join([context, *endings]).encode("utf-8")
            # An ending is predicted from the context, so neither may be empty.
            empty = [text for text in [context, *q["endings"]] if not text.strip()]
            if empty or not isinstance(q["endings"], list) or len(endings) != 4:
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            needed = "activity_label, ctx_a, ctx_b (for --harness)" if harness else "ctx"
            sys.exit(f"error: {file}, line {number} is no question with {needed}, four endings and "
                     f"a label from 0 to 3: {advice}")
        questions.append(q)
    if not questions or (not path and len(questions) != SIZE):
        sys.exit(f"error: {file} has {len(questions)} questions, which cannot be all: {advice}")
    return questions


def question_texts(q, harness):
    """A question -> (context, [four endings]), the texts that the model sees. The space between
    them belongs to the ending: most of GPT-2's tokens are words with the space before them."""
    if not harness:
        return q["ctx"], [" " + ending for ending in q["endings"]]
    # ctx_b starts the sentence that the ending completes. capitalize() gives it a capital letter,
    # and makes all its other letters small: that is odd, but we must do what the harness does.
    context = clean(q["activity_label"] + ": " + q["ctx_a"] + " " + q["ctx_b"].capitalize())
    # Spaces that cleaning leaves at the end of the context belong to the ending too.
    stripped = context.rstrip()
    space = context[len(stripped):] + " "
    return stripped, [space + clean(ending) for ending in q["endings"]]


def clean(text):
    """Removes marks such as [title] and [step] from questions made of WikiHow's pages, as does
    https://github.com/EleutherAI/lm-evaluation-harness, in its hellaswag task."""
    text = text.strip().replace(" [title]", ". ")
    text = re.sub(r"\[.*?\]", "", text)
    return text.replace("  ", " ")


class Item(NamedTuple):
    """A question in tokens."""
    rows: list  # four lists of token ids, each the context and one ending
    scored: list  # for each row, how many tokens at its end are the ending's
    norms: list  # for each row, the length that acc_norm divides by
    label: int  # which row is the real one


def encode_question(q, encode, block_size, harness=False):
    """A question -> Item. encode: text -> list of token ids. block_size: the most tokens that the
    model can read at once."""
    context, endings = question_texts(q, harness)
    context_ids = encode(context)
    rows = []
    scored = []
    for ending in endings:
        ending_ids = encode(ending)
        # A row's last token is predicted and never read, so block_size + 1 tokens fit. A longer row
        # loses its beginning, as in the harness.
        row = (context_ids + ending_ids)[-(block_size + 1):]
        rows.append(row)
        # The first token of a row has nothing before it from which it could be predicted.
        scored.append(min(len(ending_ids), len(row) - 1))
    norms = scored
    if harness:
        # Where cleaning leaves nothing of an ending, the harness divides by 0 and never picks it.
        norms = [len(clean(ending)) or 1e-9 for ending in q["endings"]]
    return Item(rows, scored, norms, q["label"])


# ---- 2. The score --------------------------------------------------------------------------------

# The plain way: run the model on the four rows of a question, look up the losses of the endings'
# tokens, go on to the next question. (Each row reads the context anew: that is simple, and costs
# time.) Two changes make it faster and give the same numbers:
# - Rows of similar length share a batch, whichever question they are from. So batches are large,
#   and little is wasted on filling up short rows.
# - The head, which turns a position's features into a score for each of 50,257 tokens, is a third
#   of the work at 124M. It runs only where the next token is one of an ending.

TOKENS_PER_BATCH = 4096  # keeps a GPU busy; on a CPU, less would do as well


@torch.no_grad()
def score_batch(model, rows, scored):
    """Returns a tensor (B,): for each of B rows of token ids, the sum of the log-probabilities of
    its last tokens, as many as scored says. T counts positions, N tokens to score, C features, and
    V tokens in the vocabulary."""
    # Short rows are filled up with zeros behind their end. A position never looks ahead, so they
    # change nothing before the end.
    tokens = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)  # (B, T + 1)
    ends = torch.tensor([len(row) for row in rows])[:, None]  # (B, 1)
    starts = ends - torch.tensor(scored)[:, None]
    places = torch.arange(tokens.size(1))
    wanted = (starts <= places) & (places < ends)  # (B, T + 1), true for each token to score
    device = next(model.parameters()).device
    tokens, wanted = tokens.to(device), wanted.to(device)
    # Token t + 1 is predicted at position t, so we drop the mask's first column: now it marks the
    # positions whose predictions we need. As an index it picks these N places, row after row.
    idx = tokens[:, :-1]  # (B, T)
    wanted = wanted[:, 1:]  # (B, T)
    targets = tokens[:, 1:][wanted]  # (N,)
    x = model.features(idx)[wanted]  # (B, T, C) -> (N, C)
    # For speed the head's width is a round number. Columns beyond the vocabulary are no tokens.
    logits = model.lm_head(x)[:, :model.config.vocab_size].float()  # (N, V)
    # Back to their places, so that the sum along a row is that of its ending.
    losses = torch.zeros(wanted.shape, device=device)
    losses[wanted] = F.cross_entropy(logits, targets, reduction="none")
    return -losses.sum(dim=1)


def log_probs(model, items, autocast, on_batch=None):
    """Items -> NumPy array (len(items), 4): the log-probability of each ending.

    The model needs features(idx), lm_head(features) and config.vocab_size. autocast() returns what
    stands after `with`: torch.autocast, in which PyTorch calculates in bfloat16, or
    contextlib.nullcontext, which changes nothing. on_batch(done, total) is called after each batch
    with numbers of rows: to show progress, or to stop by raising an exception."""
    rows = [row for item in items for row in item.rows]
    scored = [n for item in items for n in item.scored]
    sums = np.zeros(len(rows))
    # Longest first: if memory is too small for them, it shows at once and not at the end.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
    done = 0
    # One `with` around all batches: autocast converts the weights once, for all of them.
    with autocast():
        while done < len(order):
            # The next row is the longest that is left, so the others are filled up to its length.
            size = max(1, TOKENS_PER_BATCH // len(rows[order[done]]))
            batch = order[done:done + size]
            logp = score_batch(model, [rows[i] for i in batch], [scored[i] for i in batch])
            sums[batch] = logp.cpu().numpy()
            done += len(batch)
            if on_batch:
                on_batch(done, len(rows))
    return sums.reshape(len(items), 4)


def right_answers(logp, items):
    """log_probs' array and its items -> (number right by sum, number right by mean). Where several
    processes share the questions, these are the numbers that they add up."""
    labels = np.array([item.label for item in items])
    norms = np.array([item.norms for item in items]).reshape(-1, 4)
    # The largest log-probability is the smallest loss. No answer among nan (not a number) is right.
    valid = np.isfinite(logp).all(axis=1)
    by_sum = valid & (logp.argmax(axis=1) == labels)
    by_mean = valid & ((logp / norms).argmax(axis=1) == labels)
    return int(by_sum.sum()), int(by_mean.sum())


def accuracy(logp, items):
    """log_probs' array and its items -> (acc, acc_norm), from 0 to 1."""
    acc, acc_norm = right_answers(logp, items)
    return acc / len(items), acc_norm / len(items)


def interval(share, n):
    """The questions are a sample, so a share of n of them has chance in it. In 95 % of samples the
    true share lies in this interval (Wilson, 1927): 0.009 up and down for all 10,042, 0.09 for a
    hundred. A difference between two models that is much smaller may be chance."""
    z = 1.96  # standard deviations to both sides that hold 95 % of a normal distribution
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return (middle - half) / scale, (middle + half) / scale


# ---- 3. The command line -------------------------------------------------------------------------


def show_progress(done, total):
    print(f"\r{done} of {total} endings", end="" if done < total else "\n", file=sys.stderr)


def print_example(q, item, logp, harness):
    """Prints a question and its endings, with their losses. The mean chooses, as in acc_norm."""
    context, endings = question_texts(q, harness)
    means = -logp / item.norms
    print(f"---\n{context}\n    mean      sum")
    for k, ending in enumerate(endings):
        right = "right" if k == item.label else ""
        chosen = "chosen" if k == means.argmin() else ""
        print(f"{means[k]:8.4f} {-logp[k]:8.2f} {right:5} {chosen:6}{ending}")


def main(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("-m", "--model", required=True, help="a checkpoint, or gpt2, gpt2-medium, -large, -xl")
    flag("--data", help="a file of questions (default: the validation set)")
    flag("--limit", type=int, help="only the first LIMIT questions (default: all)")
    flag("--harness", action="store_true", help="prepare and count as lm-evaluation-harness does")
    flag("--examples", type=int, default=3, help="questions to show (default: 3)")
    flag("--device", choices=["cuda", "mps", "cpu"], help="default: the first of these there is")
    flag("--dtype", choices=["float32", "bfloat16"], help="default: the faster on this hardware")
    parser.error = lambda message: sys.exit(f"error: {message}")
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 1:
        sys.exit(f"error: --limit {args.limit} leaves no questions: give at least 1")

    # Imported here and not above, since train_gpt2.py imports this file. Nothing above needs it.
    from train_gpt2 import load_model, load_tokenizer, pick_autocast, pick_device

    questions = load_questions(args.data, args.harness)[:args.limit]
    device = pick_device(args.device)
    dtype, autocast = pick_autocast(args.dtype, device)
    model, tokenizer = load_model(args.model, device)
    encode, _ = load_tokenizer(tokenizer)
    block_size = model.config.block_size
    items = [encode_question(q, encode, block_size, args.harness) for q in questions]

    # A line that is written over and over is for a terminal, not for a file.
    on_batch = show_progress if sys.stderr.isatty() else None
    logp = log_probs(model, items, autocast, on_batch)
    if not np.isfinite(logp).all():
        sys.exit(f"error: {args.model} has no score, its losses are not numbers (nan or inf): its "
                 "training went wrong, so take an earlier checkpoint")

    for i in range(min(args.examples, len(items))):
        print_example(questions[i], items[i], logp[i], args.harness)
    style = "harness" if args.harness else "completion"
    print(f"---\n{args.model}, {dtype}, {style} style, {len(items)} questions")
    for name, share in zip(("acc", "acc_norm"), accuracy(logp, items), strict=True):
        low, high = interval(share, len(items))
        print(f"{name:8}  {share:.4f} (95 % interval {low:.4f} to {high:.4f})")
    print(f"published, {style} style, all {SIZE} questions:\n{PUBLISHED[style]}")


if __name__ == "__main__":
    # A character of a question that the terminal lacks is shown as a question mark.
    sys.stdout.reconfigure(errors="replace")
    main(sys.argv[1:])

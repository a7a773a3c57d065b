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

There are two styles of preparing a question. Compare only scores of the same style, and of all the
questions:

    completion   the texts as they are in the file, with lengths in tokens, so that models with
                 other tokens cannot be compared. The programs llm.c and build-nanogpt do the same;
                 it is the default. `-m gpt2` must give acc_norm 0.2955.
    --harness    as in lm-evaluation-harness, the program that most published models are scored
                 with: the topic comes first ("Sharpening knives: He then takes ..."), marks such as
                 [step] from web pages are removed, lengths are in characters. `-m gpt2` gives
                 acc_norm 0.3114.

In both styles a row begins with the context itself, as in those programs, and without the mark
<|endoftext|> that begins a text in training. To learn how a model gets its score, read this page,
encode_question() and "The plain way" in section 2; the rest is speed and the harness's rules.
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
    # Ctrl-C, and a reader of our output that leaves (| head), end the program at once, without a
    # traceback. This stands here because the import of PyTorch takes seconds.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)

import numpy as np
import requests
import torch
import torch.nn.functional as F
from tqdm import tqdm

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

# -------------------------------------------------------------------------------------------------
# 1. The questions

# This validation set is a file of questions, and has nothing to do with the validation shards of
# fineweb.py. Everybody scores on it: the labels of HellaSwag's test set are kept secret.
DATA_URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
DATA = Path("hellaswag/hellaswag_val.jsonl")
SIZE = 10042  # questions in it


def download():
    """Fetches the file at DATA_URL (12 MB) to DATA. On failure, exits with one line."""
    print(f"downloading {DATA_URL} to {DATA}")
    try:
        answer = requests.get(DATA_URL, timeout=60)
        answer.raise_for_status()
    except requests.RequestException as e:
        sys.exit(f"error: {DATA_URL} cannot be had ({e}): try again, or put the file at {DATA}")
    DATA.parent.mkdir(parents=True, exist_ok=True)
    # Writing can be interrupted, so the file gets its name only when it is whole. The process's id
    # keeps two runs that start together out of each other's file.
    temporary = f"{DATA}.{os.getpid()}.tmp"
    Path(temporary).write_bytes(answer.content)
    os.replace(temporary, DATA)


def load_questions(path=None, harness=False):
    """A file of questions -> list of dicts. Without a path: the validation set, downloaded once.

    A line is a question in JSON: ctx (the context), endings (four), label (the real one, 0 to 3).
    The harness style reads activity_label (the topic), ctx_a and ctx_b (ctx in two parts) instead
    of ctx. A bad file ends the program, with one line that says which of its lines is wrong."""
    if path is None and not DATA.exists():
        download()
    file = Path(path or DATA)
    if not file.is_file():
        sys.exit(f"error: {file} is no file of questions")
    questions = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            # json.loads() also takes bytes, and knows the mark that some editors put before them.
            q = json.loads(line)
            # Some copies of the data have the label as text. A label that is none fails here.
            q["label"] = ["0", "1", "2", "3"].index(str(q["label"]))
            _, endings = question_texts(q, harness)
            if len(endings) != 4:
                raise ValueError(f"{len(endings)} endings")
        except Exception as e:
            sys.exit(f"error: {file}, line {number} is no question: {type(e).__name__}: {e}")
        questions.append(q)
    if path is None and len(questions) != SIZE:
        sys.exit(f"error: {file} has {len(questions)} questions instead of {SIZE}: remove it, and "
                 "the next run downloads it again")
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
        # Log-probabilities are negative, so that 1e-9 makes the mean a huge negative number.
        norms = [len(clean(ending)) or 1e-9 for ending in q["endings"]]
    return Item(rows, scored, norms, q["label"])


# -------------------------------------------------------------------------------------------------
# 2. The score

# The plain way: run the model on the four rows of a question, look up the losses of the endings'
# tokens, go on to the next question. (Each row reads the context anew: that is simple, and costs
# time.) Two changes make it faster and give the same numbers:
# - Rows of similar length share a batch, whichever question they are from. So batches are large,
#   and little is wasted on filling up short rows.
# - The head, which turns a position's features into a score for each of 50,257 tokens, is a third
#   of the work at 124M. It runs only where the next token is one of an ending.

TOKENS_PER_BATCH = 4096  # keeps a GPU busy; on a CPU, less would do as well


@torch.no_grad()
def score_batch(model, rows, scored, T):
    """Returns a tensor (B,): for each of B rows of token ids, the sum of the log-probabilities of
    its last tokens, as many as scored says. A row has T + 1 tokens at most, and log_probs() chooses
    T so that few lengths occur. N tokens are to score, C features stand for a position, V tokens
    are in the vocabulary."""
    # Short rows are filled up with zeros behind their end. A position never looks ahead, so they
    # change nothing before the end.
    tokens = torch.zeros(len(rows), T + 1, dtype=torch.long)
    wanted = torch.zeros(len(rows), T + 1, dtype=torch.bool)  # true for each token to score
    for i, row in enumerate(rows):
        tokens[i, :len(row)] = torch.tensor(row)
        wanted[i, len(row) - scored[i]:len(row)] = True
    device = next(model.parameters()).device
    tokens, wanted = tokens.to(device), wanted.to(device)

    # Token t + 1 is predicted at position t. So drop the mask's first column, which moves all marks
    # one to the left, from the tokens to the positions that predict them. A mask as an index picks
    # what is marked, N places, row after row.
    wanted = wanted[:, 1:]  # (B, T)
    targets = tokens[:, 1:][wanted]  # (N,)
    x = model.features(tokens[:, :-1])[wanted]  # (B, T) -> (B, T, C) -> (N, C)
    # For speed the head's width is a round number. Columns beyond the vocabulary are no tokens.
    logits = model.lm_head(x)[:, :model.config.vocab_size].float()  # (N, V)
    # Back to their places, so that the sum along a row is that of its ending.
    losses = torch.zeros(wanted.shape, device=device)
    losses[wanted] = F.cross_entropy(logits, targets, reduction="none")
    return -losses.sum(dim=1)


def log_probs(model, items, autocast, progress=False):
    """Items -> NumPy array (len(items), 4): the log-probability of each ending.

    The model needs features(idx), lm_head(features), config.vocab_size and config.block_size.
    autocast() returns what stands after `with`: torch.autocast, in which PyTorch calculates in
    bfloat16, or contextlib.nullcontext, which changes nothing. progress: show a bar."""
    rows = [row for item in items for row in item.rows]
    scored = [n for item in items for n in item.scored]
    sums = np.zeros(len(rows))
    # Longest first: if memory is too small for them, it shows at once and not at the end.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
    # disable=None shows the bar on a terminal only: written to a file it would be a mess.
    bar = tqdm(total=len(rows), unit=" endings", disable=None if progress else True)
    done = 0
    # One `with` around all batches: autocast converts the weights once, for all of them.
    with autocast(), bar:
        while done < len(rows):
            # The next row is the longest that is left, so it says how long the batch is. A GPU's
            # fast attention (cuDNN's) has to prepare for each new length, which takes time. So we
            # round up to a multiple of 32, but not beyond what the model can read.
            longest = len(rows[order[done]]) - 1
            T = min(math.ceil(longest / 32) * 32, model.config.block_size)
            batch = order[done:done + max(1, TOKENS_PER_BATCH // T)]
            logp = score_batch(model, [rows[i] for i in batch], [scored[i] for i in batch], T)
            sums[batch] = logp.cpu().numpy()
            done += len(batch)
            bar.update(len(batch))
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


# -------------------------------------------------------------------------------------------------
# 3. The command line

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
    """Scores the model that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-m", "--model", required=True, help="a checkpoint, or gpt2, gpt2-medium, -large, -xl")
    add("--data", help="a file of questions (default: the validation set)")
    add("--limit", type=int, help="only the first LIMIT questions (default: all)")
    add("--harness", action="store_true", help="prepare and count as lm-evaluation-harness does")
    add("--examples", type=int, default=3, help="questions to show (default: 3)")
    add("--device", choices=["cuda", "mps", "cpu"], help="default: the first of these there is")
    add("--dtype", choices=["float32", "bfloat16"], help="default: the faster on this hardware")
    args = parser.parse_args(argv)
    if (args.limit is not None and args.limit < 1) or args.examples < 0:
        parser.error("--limit must be at least 1, and --examples not below 0")

    # Imported here and not above, since train_gpt2.py imports this file. Nothing above needs it.
    from train_gpt2 import load_model, load_tokenizer, pick_autocast, pick_device

    questions = load_questions(args.data, args.harness)[:args.limit]
    device = pick_device(args.device)
    dtype, autocast = pick_autocast(args.dtype, device)
    try:
        model, tokenizer = load_model(args.model, device)
        encode, _ = load_tokenizer(tokenizer)
    except ModuleNotFoundError as e:
        sys.exit(f"error: this takes one more package: pip install {e.name}")
    except OSError as e:  # GPT-2's vocabulary or OpenAI's weights cannot be downloaded
        reason = str(e).strip().splitlines()[0]
        sys.exit(f"error: {reason}: fix that, and run this command again")
    block_size = model.config.block_size
    items = [encode_question(q, encode, block_size, args.harness) for q in questions]

    logp = log_probs(model, items, autocast, progress=True)
    if not np.isfinite(logp).all():
        sys.exit(f"error: {args.model} has no score, its losses are not numbers (nan or inf): its "
                 "training went wrong, so take an earlier checkpoint")

    style = "harness" if args.harness else "completion"
    print(f"---\n{args.model}, {dtype}, {style} style, {len(items)} questions")
    for name, right in zip(("acc", "acc_norm"), right_answers(logp, items), strict=True):
        share = right / len(items)
        # The questions are a sample, so there is chance in a score. In 95 % of samples it is at
        # most 1.96 standard deviations off: 0.009 for all 10,042 questions, 0.09 for a hundred.
        # A difference between two models that is much smaller may be chance.
        chance = 1.96 * math.sqrt(share * (1 - share) / len(items))
        print(f"{name:8}  {share:.4f} +- {chance:.4f}")
    print(f"published, {style} style, all {SIZE} questions:\n{PUBLISHED[style]}")
    for q, item, sums in list(zip(questions, items, logp, strict=True))[:args.examples]:
        print_example(q, item, sums, args.harness)


if __name__ == "__main__":
    # A character of a question that the terminal lacks becomes a "?".
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="replace")
    main(sys.argv[1:])

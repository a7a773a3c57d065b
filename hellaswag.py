"""
Evaluates the model that train_gpt2.py has trained. HellaSwag is a benchmark of 10,042
multiple-choice questions: which of four endings continues a text? Models of GPT-2's size are
compared by their accuracy, the fraction of the questions that they answer correctly.

    python hellaswag.py -m log124M/best.pt      # a checkpoint of train_gpt2.py
    python report/convert.py gpt2 gpt2.pt       # a check of this program: OpenAI's own weights
    python hellaswag.py -m gpt2.pt              # must score acc_norm 0.2955

A question is the beginning of a text, its context, and four endings. Here is number 12:

    He then takes the knife and sharpens it against the wood piece. He then notices a little black
    and green poisonous frog sitting next to him. the frog
                                                                      tokens    sum   mean
    0  eventually gets to get up and marches out of the room waving ...   16  52.09   3.26
    1  then starts to get up from the chair and begins walking ...        15  45.30   3.02
    2  then escapes and jumps away.   <-- the real one                     6  27.08   4.51
    3  is acting crazy and attacking him while he is cooking.             11  41.93   3.81

A small language model doesn't answer questions; it only continues texts. But it assigns a
probability to every next token, and therefore a likelihood to every ending: the product of its
tokens' probabilities, each given all the text before the token. The logarithm turns the product
into a sum, so the ending's negative log-likelihood is the sum of its tokens' losses. For ending 2,
where p(a | b) is the probability of token a given the text b:

      -log p(" then"    | He then takes ... the frog)
    + -log p(" escapes" | He then takes ... the frog then)
    + -log p(" and"     | He then takes ... the frog then escapes)      and so on, up to the "."

The ending with the smallest loss is the model's answer. The losses above are those of a GPT-2 in
https://github.com/karpathy/llm.c/pull/431. They show why there are two scores, both accuracies:

    acc        picks the ending with the smallest sum. Every token adds to the sum, so short endings
               have an advantage: acc picks ending 2 here, which is correct.
    acc_norm   picks the ending with the smallest mean, the sum divided by the ending's length. This
               length-normalized accuracy picks ending 1 here, which is wrong. Over all questions
               acc_norm is higher than acc, and papers quote acc_norm.

Guessing scores 0.25, people score over 0.95, and a model with 124M parameters scores about 0.30.
The wrong endings are hard because of adversarial filtering: a language model wrote them, and the
authors kept those that fooled another model (https://arxiv.org/abs/1905.07830). Their words fit the
context and each other, and a small model knows little more than which words often occur together.
Only a model that has learned something about meaning scores above chance. The evaluation is
zero-shot: the model sees no solved questions, neither in training nor in the context.

There are two styles. Compare only scores of the same style, on all the questions:

    completion   The default takes the texts as they stand in the file and measures lengths in
                 tokens, as llm.c and build-nanogpt do. Models compared must share a tokenizer.
    --harness    This style follows lm-evaluation-harness, the program behind most published scores.
                 The topic comes first ("Sharpening knives: He then takes ..."), markers from web
                 pages such as [step] are removed, and lengths are in characters. OpenAI's 124M
                 must score acc_norm 0.3114.

In both styles a sequence begins with the context itself, as in those programs, rather than with the
separator <|endoftext|> that begins a document in training. encode_question() and the naive way in
section 2 are the whole method. The rest is speed and the harness's rules.
"""
import argparse
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import requests
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from train_gpt2 import load_model, load_tokenizer, pick_device

# Published scores and their sources.
# GPT-2 124M, 1558M: https://github.com/karpathy/build-nanogpt, in its hellaswag.py
# GPT-2 350M, 774M: https://github.com/karpathy/llm.c/discussions/481 (which has 0.294 for 124M)
# GPT-3: https://arxiv.org/abs/2005.14165
# The class project that this project follows: https://github.com/Morris88826/CSCE-689-HW2
PUBLISHED = {
    "completion": """\
acc       GPT-2: 124M 0.2859, 1558M 0.3842
acc_norm  GPT-2: 124M 0.2955, 350M 0.375, 774M 0.432, 1558M 0.4893
          GPT-3: 124M 0.337, 350M 0.436, a rough guide: it prepared the questions differently
          the class project that we follow: 124M 0.3078, 350M (half of its steps) 0.3352""",
    "harness": """\
acc       GPT-2: 124M 0.2892, 1558M 0.4004
acc_norm  GPT-2: 124M 0.3114, 1558M 0.5089""",
}

# -------------------------------------------------------------------------------------------------
# 1. The questions

# HellaSwag's validation set has nothing to do with the validation shards of fineweb.py. Everybody
# evaluates on it because the labels of HellaSwag's test set are secret.
DATA_URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
DATA = Path("hellaswag/hellaswag_val.jsonl")
SIZE = 10042  # questions in the file


def download():
    """Downloads DATA_URL (12 MB) to DATA. On failure, exits with one line."""
    print(f"downloading {DATA_URL} to {DATA}")
    try:
        response = requests.get(DATA_URL, timeout=60)
        response.raise_for_status()
    except requests.RequestException as e:
        sys.exit(f"error: cannot download {DATA_URL} ({e}): try again, or put the file at {DATA}")
    # Every line ends with a newline, so an incomplete file has fewer than SIZE.
    lines = response.content.count(b"\n")
    if lines != SIZE:
        sys.exit(f"error: {DATA_URL} arrived with {lines} of {SIZE} lines: try again")
    # Writing can be interrupted, so the file gets its name only when it is complete.
    DATA.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(f"{DATA}.tmp")
    temporary.write_bytes(response.content)
    temporary.replace(DATA)


def load_questions(path=None, harness=False):
    """Reads a file of questions into a list of dicts. path: None is the validation set.

    Each line is a question in JSON: ctx (the context), endings (four of them), label (the index of
    the real ending, 0 to 3). The harness style reads activity_label (the topic), ctx_a and ctx_b
    (ctx in two parts) instead of ctx. A bad line ends the program with a message that names it."""
    if path is None and not DATA.exists():
        download()
    file = Path(path or DATA)
    if not file.is_file():
        sys.exit(f"error: {file} is not a file of questions")
    questions = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            q = json.loads(line)
            # Some copies of the data store the label as a string. An invalid label fails here.
            q["label"] = ["0", "1", "2", "3"].index(str(q["label"]))
            _, endings = question_texts(q, harness)
            if len(endings) != 4:
                raise ValueError(f"{len(endings)} endings")
        except Exception as e:
            sys.exit(f"error: {file}, line {number} is not a question: {type(e).__name__}: {e}")
        questions.append(q)
    return questions


def question_texts(q, harness):
    """Returns the context and the four endings as texts that the model reads. The space between
    them belongs to the ending, because most of GPT-2's tokens are words with the space before."""
    if not harness:
        return q["ctx"], [" " + ending for ending in q["endings"]]
    # ctx_b begins the sentence that the ending completes. capitalize() also turns its other letters
    # into lowercase, which is odd, but we must do exactly what the harness does.
    context = clean(q["activity_label"] + ": " + q["ctx_a"] + " " + q["ctx_b"].capitalize())
    # Spaces that clean() leaves at the end of the context belong to the ending too.
    stripped = context.rstrip()
    space = context[len(stripped):] + " "
    return stripped, [space + clean(ending) for ending in q["endings"]]


def clean(text):
    """Removes WikiHow's markers such as [title] and [step], as does the hellaswag task of
    https://github.com/EleutherAI/lm-evaluation-harness."""
    text = text.strip().replace(" [title]", ". ")
    text = re.sub(r"\[.*?\]", "", text)
    return text.replace("  ", " ")


class Ending(NamedTuple):
    """A tokenized ending."""
    row: list  # token ids, the context and the ending
    n: int  # how many tokens at the end of row belong to the ending
    length: float  # what acc_norm divides by


def encode_question(q, encode, block_size, harness=False):
    """Tokenizes a question, a dict, into a list of four Endings.

    encode: text -> list of token ids. block_size: the model's longest sequence, in tokens."""
    context, texts = question_texts(q, harness)
    context_ids = encode(context)
    endings = []
    for text, original in zip(texts, q["endings"], strict=True):
        ids = encode(text)
        # A row's last token is a target and never an input, so block_size + 1 tokens fit. A longer
        # row loses its beginning, as in the harness.
        row = (context_ids + ids)[-(block_size + 1):]
        # The first token of a row can't be predicted, because no token comes before it.
        n = length = min(len(ids), len(row) - 1)
        if harness:
            # Where cleaning leaves nothing of an ending, the harness divides by 0 and never picks
            # it. Log-likelihoods are negative, so 1e-9 makes the mean a huge negative number.
            length = len(clean(original)) or 1e-9
        endings.append(Ending(row, n, length))
    return endings


# -------------------------------------------------------------------------------------------------
# 2. The score

# The naive way runs the model on one row at a time. row (T + 1,) holds token ids, and its last n
# tokens are the ending:
#
#     logits = model(row[None, :-1])[0]                              # (T, V)
#     losses = F.cross_entropy(logits, row[1:], reduction="none")    # (T,), -log p of each target
#     log_likelihood = -losses[-n:].sum()
#
# Batches give the same numbers faster. Rows of similar length share a batch, whichever questions
# they belong to, so that little is wasted on padding. Everything is in fp32: bf16 would be faster,
# but its error in a token's loss can reach 0.1, and some questions are decided by less.

# The logits of a batch, 4 bytes for each token and id, are by far the largest tensor:
# 4096 * 50,257 * 4 bytes = 0.8 GB. 4096 tokens keep a GPU busy, and more would only cost memory.
TOKENS_PER_BATCH = 4096


def score_batch(model, endings):
    """Returns a tensor (B,), the log-likelihoods of B Endings, whose rows have at most T + 1 tokens
    and whose n add up to N."""
    # pad_sequence() pads short rows with zeros at their end. Attention is causal, so the padding
    # changes nothing at the positions before it.
    tokens = pad_sequence([torch.tensor(e.row) for e in endings], batch_first=True)  # (B, T + 1)
    masks = [torch.arange(len(e.row)) >= len(e.row) - e.n for e in endings]
    mask = pad_sequence(masks, batch_first=True)  # (B, T + 1), true at each token to score
    device = model.lm_head.weight.device
    tokens, mask = tokens.to(device), mask.to(device)

    # Position t predicts token t + 1. Dropping the first column shifts targets and mask one to the
    # left, from the tokens to the positions that predict them.
    targets, mask = tokens[:, 1:], mask[:, 1:]  # (B, T)
    logits = model(tokens[:, :-1])[mask]  # (B, T, V) -> (N, V), row after row
    # The losses return to their positions, so each row's sum is the loss of its ending.
    losses = torch.zeros(mask.shape, device=device)
    losses[mask] = F.cross_entropy(logits, targets[mask], reduction="none")
    return -losses.sum(dim=1)


@torch.no_grad()
def log_likelihoods(model, endings):
    """Returns a NumPy array, the log-likelihood of each Ending in nats."""
    # Longest rows first, so that if memory runs out, it does so in the first batch.
    order = sorted(range(len(endings)), key=lambda i: len(endings[i].row), reverse=True)
    batches = []
    while order:
        # The first row is the longest that is left, so it determines the length of the batch.
        size = max(1, TOKENS_PER_BATCH // len(endings[order[0]].row))
        batches.append(order[:size])
        order = order[size:]
    sums = np.zeros(len(endings))
    # disable=None shows the progress bar on a terminal only.
    for batch in tqdm(batches, unit=" batches", disable=None):
        sums[batch] = score_batch(model, [endings[i] for i in batch]).cpu()
    return sums


# -------------------------------------------------------------------------------------------------
# 3. The command line

def print_example(q, sums, means, harness):
    """Prints a question and the losses of its endings. As in acc_norm, the smallest mean wins."""
    context, endings = question_texts(q, harness)
    print(f"---\n{context}\n    mean      sum")
    for k, ending in enumerate(endings):
        real = "real" if k == q["label"] else ""
        chosen = "chosen" if k == means.argmax() else ""
        print(f"{-means[k]:8.4f} {-sums[k]:8.2f} {real:4} {chosen:6}{ending}")


def main(argv):
    """Scores the model that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-m", "--model", required=True, help="a checkpoint")
    add("--data", help="a file of questions (default: the validation set)")
    add("--limit", type=int, help="only the first LIMIT questions (default: all)")
    add("--harness", action="store_true", help="prepare and count as lm-evaluation-harness does")
    add("--examples", type=int, default=3, help="questions to show (default: 3)")
    add("--device", choices=["cuda", "mps", "cpu"], help="default: the first available of these")
    args = parser.parse_args(argv)

    questions = load_questions(args.data, args.harness)[:args.limit]
    model = load_model(args.model, pick_device(args.device))
    try:
        encode, _ = load_tokenizer(model.config.vocab_size)
    except (OSError, NotImplementedError) as e:  # no network for the vocabulary, or no tokenizer
        sys.exit(f"error: {e}")
    endings = []
    for q in questions:
        endings += encode_question(q, encode, model.config.block_size, args.harness)
    # (questions, 4): the sums pick acc's answers, and the means acc_norm's
    sums = log_likelihoods(model, endings).reshape(-1, 4)
    means = sums / np.array([e.length for e in endings]).reshape(-1, 4)
    labels = np.array([q["label"] for q in questions])

    style = "harness" if args.harness else "completion"
    print(f"---\n{args.model}, {style} style, {len(questions)} questions")
    for name, scores in ("acc", sums), ("acc_norm", means):
        accuracy = (scores.argmax(axis=1) == labels).mean()
        # The questions are a sample, so the accuracy has a standard error. A 95% confidence
        # interval extends 1.96 standard errors to each side: 0.009 on all 10,042 questions, 0.09 on
        # a hundred. A smaller difference between two models may be chance.
        error = 1.96 * (accuracy * (1 - accuracy) / len(questions)) ** 0.5
        print(f"{name:8}  {accuracy:.4f} +- {error:.4f}")
    print(f"published, {style} style, all {SIZE} questions:\n{PUBLISHED[style]}")
    for i, q in enumerate(questions[:args.examples]):
        print_example(q, sums[i], means[i], args.harness)


if __name__ == "__main__":
    main(sys.argv[1:])

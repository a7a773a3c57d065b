"""
How fast is a training step on this machine? Milliseconds, tokens a second, MFU and peak memory, in
one table.

    python report/bench.py                       # tiny: today's recipe, and older ones
    python report/bench.py "d12" "d12 --arch gpt2 --recipe original --peer llm.c/train_gpt2.py"
    python report/bench.py --steps 5 "d24" "d24 --recipe original" "d24 --no-compile"

Every argument is a contender: the name of a model, and any flags of train_gpt2.py. --peer FILE puts
the class GPT of llm.c's train_gpt2.py or of nanoGPT's model.py in the place of ours, in the same
shape, with its own optimizer; --dtype, --compile and the sizes of a step count for it too.

A step is what train() does: all micro-batches, the clipping, the optimizers. Tokens are random, no
corpus is needed. Contenders take turns step by step, so that a machine that slows down slows all of
them. A figure is the median over the turns. Peak memory is what the step itself needs: what the
other contenders keep is taken off. Run a model that fills a GPU alone.
"""

import argparse
import datetime
import importlib.util
import inspect
import math
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch
import torch._inductor.config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fineweb  # noqa: E402
import train_gpt2  # noqa: E402

DEFAULT = ["tiny", "tiny --recipe original", "tiny --arch gpt2 --recipe original"]

def load_peer(path, config, args, device):
    """(model, optimizer) of another repository's GPT, in config's shape."""
    if not Path(path).is_file():
        sys.exit(f"error: --peer {path}: no such file; clone llm.c or nanoGPT, and name its "
                 f"train_gpt2.py or model.py")
    spec = importlib.util.spec_from_file_location("peer", path)
    peer = importlib.util.module_from_spec(spec)
    # its @dataclass finds its own module by name there
    sys.modules["peer"] = peer
    spec.loader.exec_module(peer)
    # llm.c's switch for flash attention, which is off by default (nanoGPT ignores it)
    peer.FLASH = 1
    shape = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "block_size")}
    # GPT-2's tokens it pads as it likes: to 50,257 in llm.c, to 50,304 in nanoGPT. Bytes it has to
    # be told of.
    if config.vocab_size != fineweb.VOCAB_SIZE["gpt2"]:
        shape["vocab_size"] = config.vocab_size

    # moved after it is made: llm.c draws its weights on the CPU
    model = peer.GPT(peer.GPTConfig(**shape)).to(device)
    options = {"weight_decay": args.weight_decay, "learning_rate": args.learning_rate}
    options |= {"betas": (0.9, 0.95), "device_type": device.type}
    if "zero_stage" in inspect.signature(model.configure_optimizers).parameters:
        options["zero_stage"] = 0
    return model, model.configure_optimizers(**options)

def memory(device):
    """Bytes that tensors take on the GPU now. 0 on anything else."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0

class Contender:
    """One model with its optimizers and its batch, and the times of its steps."""

    def __init__(self, spec):
        parser = argparse.ArgumentParser(add_help=False)
        parser.add_argument("--peer")
        model_name, *flags = shlex.split(spec)
        own, flags = parser.parse_known_args(flags)
        args = train_gpt2.parse_args(["--model", model_name, *flags])
        if own.peer and args.arch != "gpt2":
            # its operations are counted on our model of the same shape
            sys.exit(f"error: {spec}: a peer has GPT-2's architecture: add --arch gpt2")
        self.device = train_gpt2.pick_device(args.device)
        dtype, self.autocast = train_gpt2.pick_autocast(args.dtype, self.device)
        T = args.sequence_length

        # input_bin "" (tiny's) stands for Python's standard library as bytes, all else for
        # GPT-2's tokens
        vocab_size = fineweb.VOCAB_SIZE["gpt2" if args.input_bin else "bytes"]
        config = train_gpt2.make_config(args, vocab_size)

        # counted on the meta device, which knows shapes and holds no numbers
        with torch.device("meta"):
            counted = train_gpt2.GPT(config)
        self.flops_per_token = train_gpt2.flops_per_token(counted)

        before = memory(self.device)
        torch.manual_seed(args.seed)
        if own.peer:
            self.model, optimizer = load_peer(own.peer, config, args, self.device)
            self.optimizers = [optimizer]
        else:
            with self.device:
                self.model = train_gpt2.GPT(config)
            self.optimizers = train_gpt2.make_optimizers(
                self.model, args.optimizer, args.learning_rate, args.weight_decay, dtype
            )
        self.grad_clip = args.grad_clip or math.inf
        self.is_peer = bool(own.peer)
        compiled = train_gpt2.can_compile(args.compile, self.device)
        if compiled:
            self.model.compile(dynamic=False)
        # llm.c's forward() returns (None, loss) if told that nobody wants the logits
        self.options = {}
        if "return_logits" in inspect.signature(self.model.forward).parameters:
            self.options = {"return_logits": False}

        B = train_gpt2.pick_batch_size(args, self.device, dtype, compiled)
        self.tokens = args.total_batch_size
        self.grad_accum_steps = self.tokens // (B * T)
        self.x, self.y = torch.randint(vocab_size, (2, B, T), device=self.device)
        how = f"{dtype}, compiled" if compiled else dtype
        self.name = f"{spec} ({B} x {T} x {self.grad_accum_steps}, {how})"

        # the first step, apart: it compiles, and makes the optimizers' averages
        start = time.time()
        with torch._inductor.config.patch(coordinate_descent_tuning=self.is_peer):  # as llm.c does
            self.step()
        self.first_step = time.time() - start
        # what this contender keeps between steps: weights, averages, a batch
        self.own_memory = memory(self.device) - before
        self.times = []
        self.peak_memory = 0

    def step(self):
        for _ in range(self.grad_accum_steps):
            with self.autocast():
                output = self.model(self.x, self.y, **self.options)
            # llm.c and nanoGPT return (logits, loss)
            loss = output[1] if self.is_peer else output
            loss = loss / self.grad_accum_steps
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        # a GPU works through a queue in order: item() returns when all of this step is done
        loss.item()

    def timed_step(self):
        # the other contenders lie on the same GPU: their tensors are not this step's
        others = memory(self.device) - self.own_memory
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.time()
        self.step()
        self.times.append(time.time() - start)
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) - others
            self.peak_memory = max(self.peak_memory, peak)

def main(argv):
    show_as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=show_as_written)
    add = parser.add_argument
    add("contender", nargs="*", default=DEFAULT, help="a model and flags, in quotes")
    add("--steps", type=int, default=20, help="turns that are timed")
    add("--warmup", type=int, default=3, help="turns before them that are not")
    args = parser.parse_args(argv)
    if args.steps < 1:
        sys.exit("error: --steps must be at least 1")
    torch.set_float32_matmul_precision("high")
    contenders = [Contender(spec) for spec in args.contender]
    for _ in range(args.warmup + args.steps):
        for contender in contenders:
            contender.timed_step()

    device = contenders[0].device
    card = train_gpt2.card_name(device)
    if device.type != "cuda":
        card += f", {torch.get_num_threads()} threads"
    peaks = [peak for name, peak in train_gpt2.PEAK_FLOPS.items() if name in card]
    # + 1: the step that Contender.__init__() made
    print(f"{card}, torch {torch.__version__}, {datetime.date.today()}, "
          f"median of {args.steps} steps after {args.warmup + 1}\n")
    print("| model, flags (sequences x tokens x micro-batches) | ms | tokens/s | x first | MFU | "
          "peak GiB | first step, s |\n| --- | --- | --- | --- | --- | --- | --- |")
    first_speed = None
    for contender in contenders:
        seconds = statistics.median(contender.times[args.warmup:])
        speed = contender.tokens / seconds
        first_speed = first_speed or speed
        mfu = "-"
        if peaks:
            mfu = f"{speed * contender.flops_per_token / peaks[0]:.1%}"
        gib = "-"
        if contender.peak_memory:
            gib = f"{contender.peak_memory / 2**30:.1f}"
        print(f"| {contender.name} | {1000 * seconds:.1f} | {speed:,.0f} | "
              f"{speed / first_speed:.2f} | {mfu} | {gib} | {contender.first_step:.1f} |")

if __name__ == "__main__":
    main(sys.argv[1:])

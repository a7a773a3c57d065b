"""
How fast is a training step on this machine? Prints a table of milliseconds, tokens per second,
TFLOP/s per GPU, and peak memory.

    python report/bench.py                       # tiny: today's recipe, and older ones
    python report/bench.py "d12" "d12 --arch gpt2 --recipe original --peer llm.c/train_gpt2.py"
    python report/bench.py --steps 5 "d24" "d24 --recipe original" "d24 --no-compile"

Each argument is a contender: a model's name and flags of train_gpt2.py. --peer FILE replaces our
model and optimizers by the class GPT in llm.c's train_gpt2.py or nanoGPT's model.py and its own
optimizer, with the same shape, batch, autocast and torch.compile.

A step is that of train(): all micro-batches, clipping, and the optimizers, on random tokens.
Contenders take turns step by step, so a machine that slows down slows all of them. Times are
medians. Contenders share the GPU's memory, so run a model that fills it alone.
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
    spec = importlib.util.spec_from_file_location("peer", path)
    peer = importlib.util.module_from_spec(spec)
    # its @dataclass looks its module up there
    sys.modules["peer"] = peer
    spec.loader.exec_module(peer)
    # llm.c's switch for flash attention is off by default; nanoGPT has no such switch
    peer.FLASH = 1
    shape = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "block_size")}
    # the default is GPT-2's vocabulary: 50,257 ids in llm.c, padded to 50,304 in nanoGPT
    if config.vocab_size != fineweb.VOCAB_SIZE["gpt2"]:
        shape["vocab_size"] = config.vocab_size

    # moved afterward, because llm.c initializes its weights on the CPU
    model = peer.GPT(peer.GPTConfig(**shape)).to(device)
    options = {"weight_decay": args.weight_decay, "learning_rate": args.learning_rate}
    options |= {"betas": (0.9, 0.95), "device_type": device.type}
    if "zero_stage" in inspect.signature(model.configure_optimizers).parameters:
        options["zero_stage"] = 0
    return model, model.configure_optimizers(**options)

class Contender:
    """A model with its optimizers and batch."""

    def __init__(self, spec):
        parser = argparse.ArgumentParser(add_help=False)
        parser.add_argument("--peer")
        model_name, *flags = shlex.split(spec)
        own, flags = parser.parse_known_args(flags)
        args = train_gpt2.parse_args(["--model", model_name, *flags])
        if own.peer and args.arch != "gpt2":
            sys.exit(f"error: {spec}: a peer has GPT-2's architecture: add --arch gpt2")
        self.is_peer = bool(own.peer)
        self.device = train_gpt2.pick_device(args.device)
        dtype = args.dtype or train_gpt2.pick_dtype(self.device)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16,
                                       enabled=dtype == "bfloat16")
        compiled = self.device.type == "cuda" if args.compile is None else args.compile
        before = torch.cuda.memory_allocated()  # 0 without a GPU

        # tiny's input_bin "" means a byte-level corpus
        vocab_size = fineweb.VOCAB_SIZE["gpt2" if args.input_bin else "bytes"]
        # A peer's FLOPs are counted on our model of its shape. The meta device stores no numbers.
        own_device = torch.device("meta") if self.is_peer else self.device
        self.model = ours = train_gpt2.make_model(args, vocab_size, own_device)
        self.flops_per_token = train_gpt2.flops_per_token(ours)
        B = train_gpt2.pick_batch_size(args, ours, self.device, dtype, compiled, 1)
        if self.is_peer:
            self.model, optimizer = load_peer(own.peer, ours.config, args, self.device)
            self.optimizers = [optimizer]
        else:
            self.optimizers = train_gpt2.make_optimizers(
                ours, args.optimizer, args.learning_rate, args.weight_decay, dtype
            )
        if compiled:
            self.model.compile(dynamic=False)
        # with it, llm.c's forward() does not keep the logits
        self.options = {}
        if "return_logits" in inspect.signature(self.model.forward).parameters:
            self.options = {"return_logits": False}

        T = args.sequence_length
        self.tokens = args.total_batch_size
        self.grad_accum_steps = self.tokens // (B * T)
        self.grad_clip = args.grad_clip or math.inf
        self.x, self.y = torch.randint(vocab_size, (2, B, T), device=self.device)
        self.name = f"{spec} ({B} x {T} x {self.grad_accum_steps}, {dtype}"
        self.name += ", compiled)" if compiled else ")"

        # the first step compiles and creates the optimizer state; llm.c tunes its kernels
        with torch._inductor.config.patch(coordinate_descent_tuning=self.is_peer):
            self.first_step = self.step()
        # the second step's peak memory, without the memory of earlier contenders
        self.peak_memory = 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.step()
            self.peak_memory = torch.cuda.max_memory_allocated() - before
        self.times = []

    def step(self):
        """Takes a step and returns its seconds."""
        start = time.time()
        for _ in range(self.grad_accum_steps):
            with self.autocast:
                output = self.model(self.x, self.y, **self.options)
            # llm.c and nanoGPT return (logits, loss)
            loss = output[1] if self.is_peer else output
            loss = loss / self.grad_accum_steps
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        # a GPU runs its kernels in order, so item() returns after the whole step
        loss.item()
        return time.time() - start

def main(argv):
    show_as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=show_as_written)
    add = parser.add_argument
    add("contender", nargs="*", default=DEFAULT, help="a model and flags, in quotes")
    add("--steps", type=int, default=20, help="timed steps per contender")
    add("--warmup", type=int, default=3, help="untimed steps before them")
    args = parser.parse_args(argv)
    torch.set_float32_matmul_precision("high")
    contenders = [Contender(spec) for spec in args.contender]
    for _ in range(args.warmup + args.steps):
        for contender in contenders:
            contender.times.append(contender.step())

    device = contenders[0].device
    name = f"{device.type}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    print(f"{name}, torch {torch.__version__}, {datetime.date.today()}, "
          f"median of {args.steps} steps\n")
    print("| model, flags (sequences x tokens x micro-batches) | ms | tokens/s | x first | "
          "TFLOP/s | peak GiB | first step, s |\n| --- | --- | --- | --- | --- | --- | --- |")
    first_speed = None
    for contender in contenders:
        seconds = statistics.median(contender.times[args.warmup:])
        speed = contender.tokens / seconds
        first_speed = first_speed or speed
        tflops = speed * contender.flops_per_token / 1e12
        gib = f"{contender.peak_memory / 2**30:.1f}" if device.type == "cuda" else "-"
        print(f"| {contender.name} | {1000 * seconds:.1f} | {speed:,.0f} | "
              f"{speed / first_speed:.2f} | {tflops:.3g} | {gib} | {contender.first_step:.1f} |")

if __name__ == "__main__":
    main(sys.argv[1:])

"""
How fast is a training step on this machine? Milliseconds, tokens a second, MFU and peak memory, in one table.

    python report/bench.py                                                      # tiny, today's recipe and older ones
    python report/bench.py "d12" "d12 --arch gpt2 --peer llm.c/train_gpt2.py"   # beside llm.c's model of the same shape
    python report/bench.py --steps 5 "d24" "d24 --recipe homework" "d24 --no-compile"

Every argument is one contender: a preset and any flags of train_gpt2.py. --peer FILE puts the class GPT of llm.c's
train_gpt2.py or nanoGPT's model.py in the place of ours, with its own optimiser, --dtype and --compile as given.
A step is what train() does: all micro-batches, the clipping, the optimisers. Tokens are random. Contenders take turns step
by step, so that a machine that slows down slows all of them; a figure is the median over the turns. Peak memory is what
the step itself needs: what the other contenders keep is taken off. Run a model that fills a GPU alone.
"""
import argparse
import datetime
import importlib.util
import inspect
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch
import torch._inductor.config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt2

def load_peer(path, config, args):
    """(model, optimizers, loss function) of another repository's GPT in config's shape."""
    if not Path(path).is_file():
        train_gpt2.die(f"--peer {path}: no such file, clone llm.c or nanoGPT and name its train_gpt2.py or model.py")
    spec = importlib.util.spec_from_file_location("peer", path)
    peer = importlib.util.module_from_spec(spec)
    sys.modules["peer"] = peer  # its dataclass looks itself up there
    spec.loader.exec_module(peer)
    peer.FLASH = 1  # llm.c's switch
    shape = dict(n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd, block_size=config.block_size)
    if args.tokenizer == "bytes":  # else the peer's own choice: llm.c takes 50257, nanoGPT 50304
        shape["vocab_size"] = config.vocab_size
    model = peer.GPT(peer.GPTConfig(**shape)).to(args.device)  # moved after it is made: llm.c draws its weights on the CPU
    more = {"zero_stage": 0} if "zero_stage" in inspect.signature(model.configure_optimizers).parameters else {}
    optimizer = model.configure_optimizers(weight_decay=args.weight_decay, learning_rate=args.learning_rate, betas=(0.9, 0.95),
                                           device_type=args.device.type, **more)
    flags = {"return_logits": False} if "return_logits" in inspect.signature(model.forward).parameters else {}
    return model, [optimizer], lambda forward, x, y: forward(x, y, **flags)[1]

class Contender:
    def __init__(self, spec):
        parser = argparse.ArgumentParser(add_help=False)
        parser.add_argument("--peer")
        model, *flags = shlex.split(spec)
        peer, flags = parser.parse_known_args(flags)
        self.name = spec
        # no corpus is read: any name will do, and keeps tiny from making its own
        args, _ = train_gpt2.parse_args(["--model", model, *flags, "--input_bin", "random"])
        args.device = device = train_gpt2.pick_device(args.device)
        args.dtype, autocast = train_gpt2.pick_autocast(args.dtype, device)
        args.block_size, args.vocab_size = args.sequence_length, train_gpt2.VOCAB_SIZE[args.tokenizer]
        config = train_gpt2.GPTConfig(**{name: getattr(args, name) for name in train_gpt2.GPTConfig.__dataclass_fields__})
        before = self.memory(device)
        torch.manual_seed(args.seed)
        with torch.device("meta"):
            counted = train_gpt2.GPT(config)
        if peer.peer:
            model, optimizers, loss_of = load_peer(peer.peer, config, args)
        else:
            with device:
                model = train_gpt2.GPT(config)
            optimizers, loss_of = train_gpt2.make_optimizers(model, args), lambda forward, x, y: forward(x, y)
        compiled = args.compile if args.compile is not None else device.type == "cuda"
        forward = torch.compile(model, dynamic=False) if compiled else model
        sequences = args.total_batch_size // args.sequence_length
        B = args.batch_size or train_gpt2.pick_batch_size(config, counted.num_params()[0], device, sequences)
        accumulate = sequences // B
        batch = torch.randint(config.vocab_size, (2, B, args.sequence_length), device=device)
        self.tokens, self.flops, self.device = B * args.sequence_length * accumulate, counted.flops_per_token(args.sequence_length), device
        self.name += f" ({B} x {args.sequence_length} x {accumulate}, {args.dtype}{', compiled' * compiled})"

        def step():
            for _ in range(accumulate):
                with autocast():
                    loss = loss_of(forward, *batch) / accumulate
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            loss.item()  # waits for the device
        self.step, self.times, self.peak = step, [], 0
        start = time.time()
        with torch._inductor.config.patch(coordinate_descent_tuning=bool(peer.peer)):  # as llm.c's script does
            step()
        self.first = time.time() - start
        self.own = self.memory(device) - before  # what stays between steps

    @staticmethod
    def memory(device):
        return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0

    def turn(self):
        others = self.memory(self.device) - self.own
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.time()
        self.step()
        self.times.append(time.time() - start)
        if self.device.type == "cuda":
            self.peak = max(self.peak, torch.cuda.max_memory_allocated(self.device) - others)

def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contender", nargs="*", default=["tiny", "tiny --recipe homework", "tiny --arch gpt2 --recipe homework"])
    parser.add_argument("--steps", type=int, default=20, help="turns that are timed")
    parser.add_argument("--warmup", type=int, default=3, help="turns before them that are not, beside the first step")
    args = parser.parse_args(argv)
    torch.set_float32_matmul_precision("high")
    contenders = [Contender(spec) for spec in args.contender]
    for turn in range(args.warmup + args.steps):
        for contender in contenders:
            contender.turn()
    device = contenders[0].device
    threads = f"{device.type}, {torch.get_num_threads()} threads"
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
    peak = next((1e12 * value for name, value in train_gpt2.PEAK.items() if name in card), None)
    print(f"{card}, torch {torch.__version__}, {datetime.date.today()}, median of {args.steps} steps after {args.warmup + 1}\n")
    print("| model, flags (sequences x tokens x micro-batches) | ms | tokens/s | x first | MFU | peak GiB | first step, s |\n"
          "| --- | --- | --- | --- | --- | --- | --- |")
    for contender in contenders:
        seconds = statistics.median(contender.times[args.warmup:])
        speed = contender.tokens / seconds
        ratio = statistics.median(contenders[0].times[args.warmup:]) / contenders[0].tokens * speed
        mfu = f"{speed * contender.flops / peak:.1%}" if peak else "-"
        memory = f"{contender.peak / 2**30:.1f}" if contender.peak else "-"
        print(f"| {contender.name} | {1000 * seconds:.1f} | {speed:,.0f} | {ratio:.2f} | {mfu} | {memory} | "
              f"{contender.first:.1f} |")

if __name__ == "__main__":
    main(sys.argv[1:])

"""
Tests for the programs in this folder and for what the documents say. `python -m pytest -q` in the
parent folder runs them as well.
"""
# ruff: noqa: F811, I001 (arguments that are named like imported fixtures, imports in our order)

import argparse
import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch

# importing ablation puts the parent folder on sys.path
import ablation
import bench
import convert
import one_step
import plot
import fineweb
import hellaswag
import train_gpt2
from train_gpt2 import GPT, TokenLoader, main
from test_train_gpt2 import (  # noqa: F401
    GPT2_ARCH, NORM, ROOT, all_shards, bpe, fails, log_of, made_questions, no_network, own_folder,
    random_ids, save_model, small, tiny_model, write)

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "report").glob("*.md"))]
LOGS = ROOT / "report" / "logs"


def text_of(*paths):
    return "\n".join(path.read_text("utf-8") for path in paths)


# -------------------------------------------------------------------------------------------------
# 1. To and from Hugging Face

# settings: config.json entries that llama.cpp and mlx-lm read, and no dropout in fine-tuning
@pytest.mark.parametrize("kind, arch, settings", [
    ("Qwen3", {}, dict(rope_theta=10000)), ("Llama", {"qk_norm": False}, dict(rope_theta=10000)),
    ("GPT2", GPT2_ARCH, dict(n_ctx=32, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))])
@torch.no_grad()
def test_exported_models_are_the_same_elsewhere(kind, arch, settings, bpe):
    """transformers opens the folder without our code and computes the same logits and ids."""
    transformers = pytest.importorskip("transformers")
    # gains are not 1, and biases not 0
    model = tiny_model(shake=0.1, vocab_size=50257, **arch)
    save_model("best.pt", model)
    convert.main(["best.pt", "my out"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained("my out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained("my out")
    assert type(theirs).__name__.startswith(kind)
    x = random_ids(2, 32, below=50257)
    logits = model(x)
    # close to zero the comparison would mean little
    assert logits.std() > 0.5 and (logits - theirs(x).logits).abs().max() < 1e-4
    text = "it's naïve:\n\n    def f(x): return 1234567 \U0001f642\u200d \x00 ...!?"
    assert tokenizer(f"<|endoftext|>{text}").input_ids == [50256, *bpe.encode_ordinary(text)]
    assert tokenizer.model_max_length == theirs.generation_config.max_length == 32
    assert tokenizer.pad_token_id == 50256
    config = json.loads(Path("my out/config.json").read_text())
    assert config == config | settings | dict(eos_token_id=50256, pad_token_id=50256)


def test_what_cannot_be_converted(monkeypatch):
    """Byte-level models, mixtures of both architectures, untied embeddings, a model that treats
    documents separately; or no network, or a folder that exists."""
    pytest.importorskip("transformers")

    def refused(*words):
        fails(["a.pt", "out"], *words, main=convert.main)

    save_model("a.pt", tiny_model(vocab_size=257))
    refused("a.pt", "257")
    save_model("a.pt", tiny_model(vocab_size=50257, mlp="gelu"))
    refused("--arch gpt2", "gelu")
    model = tiny_model(vocab_size=50257)
    save_model("a.pt", model)
    no_network(monkeypatch)
    refused("TIKTOKEN_CACHE_DIR")
    real = GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda model, x: real(model, x) * (x != 50256)[..., None])
    refused("differ")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)
    save_model("a.pt", model)
    refused("untied")
    assert not Path("out").exists()
    Path("out").mkdir()
    refused("out exists")


@torch.no_grad()
def test_openai_weights(bpe, small, capsys):
    """Weights in an export's layout are imported unchanged, and the printed commands run."""
    pytest.importorskip("transformers")
    model = tiny_model(shake=0.1, vocab_size=50257, **GPT2_ARCH)
    save_model("a.pt", model)
    convert.main(["a.pt", "openai-community/gpt2"])
    convert.main(["gpt2", "gpt2.pt"])
    commands = dict(re.findall(r"^    python (\S+) (.*)$", capsys.readouterr().out, re.M))
    write("q.jsonl", made_questions(2))
    hellaswag.main([*shlex.split(commands["hellaswag.py"]), "--data=q.jsonl", "--device=cpu"])
    assert "gpt2.pt, completion style, 2 questions\nacc  " in capsys.readouterr().out
    # a run that begins with them
    all_shards(50257)
    main([*shlex.split(commands["train_gpt2.py"]), small[-1], "--num_iterations=0", "--device=cpu",
          "--sequence_length=32", "--total_batch_size=512", "--val_tokens=512", "--dtype=float32"])
    x, y = TokenLoader("sums_val_*.bin", 32).batch(0, 16, "cpu")
    assert log_of("log_gpt2", "tel")[0] == pytest.approx(model(x, y).item(), abs=1e-4)


# -------------------------------------------------------------------------------------------------
# 2. What the documents say

def test_links_lead_somewhere():
    """To a file, a heading, or an address further down."""
    for document in DOCUMENTS:
        text = text_of(document)
        for path, anchor in re.findall(r"\]\((?!https?:)([^)\s#]*)#?([^)\s]*)\)", text):
            target = document.parent / path if path else document
            assert target.exists(), path
            if anchor:
                headings = re.findall(r"^#+ (.*)$", text_of(target).lower(), re.M)
                anchors = [re.sub(r"[^\w -]", "", line).replace(" ", "-") for line in headings]
                assert anchor in anchors
        addresses = set(re.findall(r"^\[(\w+)\]: http", text, re.M))
        assert set(re.findall(r"\]\[(\w+)\]", text)) == addresses


def test_commands_are_understood(monkeypatch):
    """Each command in the documents and module docstrings names a script and flags that exist."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, argv):
        parse(parser, argv)
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    modules = train_gpt2, fineweb, hellaswag, ablation, bench, convert, one_step, plot
    scripts = {Path(m.__file__).resolve().relative_to(ROOT).as_posix(): m for m in modules}
    scripts["lab.py"] = train_gpt2  # a copy of it
    text = "\n".join([text_of(*DOCUMENTS), *(module.__doc__ for module in modules)])
    text = re.sub(r"\\\n *", "", text)  # continued on the next line
    command = r"(?:python|torchrun)\b[^`\n|]*? ([\w./]+\.py)\b([^`\n|&)]*)"
    shown = re.findall(command, text)
    assert {script for script, _ in shown} == set(scripts)
    for script, rest in shown:
        # text after two spaces or # is an explanation
        argv = shlex.split(re.split(r"  +|#", rest)[0])
        with pytest.raises(SystemExit) as e:
            scripts[script].main(argv)
        assert not e.value.code, (script, argv, e.value)


def test_figures_agree_with_logs():
    """The tables, all figures in bold, and the lines that the default run printed."""
    text = text_of(*DOCUMENTS)
    known = set(text_of(LOGS / "default_run.txt").splitlines())
    # the lab has no table
    for group in {path.name for path in LOGS.iterdir() if path.is_dir()} - {"lab"}:
        table = ablation.table(LOGS, group)
        assert table.count("\n") > 2 and table in text, group
        known |= set(re.split(r" ?[|\n,] ?", table))
    # the standard deviation of the default runs' final losses
    ends = [curve[-1][1] for curve in ablation.curves(LOGS, "ideas", "today").values()]
    known.add(f"{torch.tensor(ends).std():.3f}")
    losses = re.findall(r"(?:tel|trl):(\S+)", text_of(*LOGS.glob("lab/*/main.log")))
    known |= {f"{float(loss):.2f}" for loss in losses}
    for table in text_of(*LOGS.glob("bench*.txt")).split("\n\n"):
        rows = re.findall(r"^\|.* \| ([\d.]+) \| ([\d,]+) \| [\d.]+ \|", table, re.M)
        for ms, rate in rows:
            known |= {ms, f"{float(ms):,.0f} ms", rate}
            # the speedup over every row of the same table
            known |= {f"{float(other) / float(ms):.2f}" for other, _ in rows}
    # the lab's questions are bold as well; the pattern skips text that ends in . or ?
    figures = set(re.findall(r"\*\*([^*\n]*\d[^*\n]*)(?<![.?])\*\*", text))
    lines = set(re.findall(r"^    ((?:model|step|done) .*)$", text, re.M))
    assert len(figures) > 50 and len(lines) > 5 and figures | lines <= known


LAB = re.split("^## ", text_of(ROOT / "report" / "lab.md"), flags=re.M)[1:]


@pytest.mark.parametrize("experiment", LAB, ids=lambda text: text.partition("\n")[0])
def test_lab_fits_the_file(experiment, small):
    """Each edit matches train_gpt2.py exactly once, and the edited file trains differently."""
    question = experiment.partition("<details>")[0]
    script = text_of(ROOT / "train_gpt2.py")
    for diff in re.findall(r"```diff\n(.*?)```", question, re.S):
        before = re.sub(r"^\+.*\n|^[- ]", "", diff, flags=re.M)
        after = re.sub(r"^-.*\n|^[+ ]", "", diff, flags=re.M)
        assert script.count(before) == 1, before
        # experiment 8 changes the batch of step 300, and these runs have 6 steps
        script = script.replace(before, after.replace("300", "3"))
    Path("lab.py").write_text(script, "utf-8")
    flags = shlex.split(re.search("^    python lab.py (.*)$", question, re.M)[1])
    lab = runpy.run_path("lab.py", run_name="lab")
    lab["main"]([*small, *flags, "--num_iterations=6", "--output_dir=changed"])
    main([*small, "--seed=1"])
    assert log_of("changed") != log_of()


def test_one_step_is_the_runs_first(small, capsys):
    """one_step.py shows the loss, learning rate, and gradient norm of a run's first step."""
    small.append("--warmup_iters=4")
    main([*small, "--val_loss_every=0"])
    wanted = [log_of(kind=kind)[0] for kind in ("trl", r"trl:\S+ lr", NORM)]
    for dtype, tolerance in ("float32", 1e-3), ("bfloat16", 0.03):
        one_step.main([*small, f"--dtype={dtype}"])
        shown = re.search(r"loss (\S+) \| lr (\S+) \| norm (\S+)$", capsys.readouterr().out.strip())
        assert [float(x) for x in shown.groups()] == pytest.approx(wanted, rel=tolerance)

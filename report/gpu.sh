#!/usr/bin/env bash
# Measures what needs a GPU: does d12 learn, how fast, in how much memory, does it resume, and how
# fast is a step compared with llm.c's? It should take ten minutes on one H100 (nobody has tried),
# after downloading 400 MB of FineWeb and HellaSwag's questions.
#
#     bash report/gpu.sh
#     SMOKE=1 bash report/gpu.sh        # tests the script on a CPU, with tiny sizes
#
# A part that fails or hangs does not stop the next one. OUT gets all output, 4 GB of checkpoints,
# and summary.txt. Variables that you may set before the command (paths: from the repository):
#
#     OUT=folder                          default: log_gpu_ and the time
#     LLMC=../llm.c/train_gpt2.py         also measures llm.c's model
#     DATA='web/text_train_*.bin'         shards to use instead of downloading FineWeb
#     FLAGS=--no-compile                  flags for every run, here for a machine without gcc

cd "$(dirname "$0")/.." || exit 1
OUT=${OUT:-log_gpu_$(date +%Y%m%d_%H%M%S)}
stop() { echo "error: $1" >&2; exit 1; }
[ -z "$LLMC" ] || [ -f "$LLMC" ] || stop "LLMC: no file $LLMC"
mkdir "$OUT" || exit 1
export PYTHONUNBUFFERED=1
failed=0
# Ctrl-C ends the script, not only the current part
trap 'exit 130' INT

# part NAME PATTERN COMMAND: runs the command for at most half an hour, and copies the lines that
# match PATTERN to the summary. If the command fails, the last lines follow.
part() {
    local name=$1 pattern=$2 begun=$SECONDS code
    shift 2
    echo "== $name: $*" | tee -a "$OUT/summary.txt"
    # --foreground lets Ctrl-C reach the command
    timeout --foreground -k 60 1800 "$@" > "$OUT/$name.log" 2>&1
    code=$?
    {
        # -a: the samples of a byte-level model may not be text
        grep -aE "$pattern" "$OUT/$name.log"
        [ $code = 0 ] || tail -n 5 "$OUT/$name.log"
        echo "exit code $code after $((SECONDS - begun)) s"
    } | tee -a "$OUT/summary.txt"
    [ $code = 0 ] || failed=1
    return $code
}

# 72 steps of 524,288 tokens are 38 million
size="--val_tokens 1048576 --log_every 24" steps=72 every=24 limit=10042 turns=8 shape="" cpu=""
if [ -n "$SMOKE" ]; then
    cpu="--device cpu"
    shape="--n_layer 2 --n_head 4 --n_embd 64 --sequence_length 64 --total_batch_size 512 $cpu"
    size="--val_tokens 512 --log_every 2 $shape" steps=4 every=2 limit=4 turns=1
else
    part gpu . nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit --format=csv
    part torch . python -c "import torch; print(torch.__version__, torch.cuda.get_device_name())" \
        || stop "PyTorch sees no GPU: see $OUT/torch.log"
    if [ -z "$DATA" ]; then
        DATA='fineweb10B/fineweb_train_*.bin'
        [ -e fineweb10B/fineweb_train_000001.bin ] \
            || part fetch tokens python fineweb.py --shards 1 || stop "see $OUT/fetch.log"
    fi
fi

# With SMOKE, DATA may be empty, which means Python's standard library. $size, $shape, $cpu and
# $FLAGS are not quoted because they contain several words.
run=(python train_gpt2.py --model d12 --input_bin "$DATA" --num_iterations $steps
     --val_loss_every $every $size $FLAGS)
training="^device|^NOTE| ms |val loss|peak memory"
gpt2="--arch gpt2 --recipe original"
part today "$training" "${run[@]}" --output_dir "$OUT/today"
part gpt2 "$training" "${run[@]}" $gpt2 --output_dir "$OUT/gpt2"
part resume "$training" "${run[@]}" --output_dir "$OUT/today" --resume \
    --num_iterations $((steps + 2))
part hellaswag "^acc" python hellaswag.py -m "$OUT/today/best.pt" --limit $limit $cpu
# Compare times within a table, because its contenders take turns.
bench=(python report/bench.py --warmup 2 --steps)
part bench_d12 '^\|' "${bench[@]}" $turns "d12 $shape $FLAGS" "d12 $gpt2 $shape $FLAGS"
part bench_d24 '^\|' "${bench[@]}" 3 "d24 $shape $FLAGS"
[ -z "$LLMC" ] || part bench_llmc '^\|' "${bench[@]}" $turns "d12 $gpt2 $shape $FLAGS" \
    "d12 $gpt2 $shape $FLAGS --peer '$LLMC'"
echo "wrote $OUT/summary.txt"
exit $failed

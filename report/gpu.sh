#!/usr/bin/env bash
# What only a GPU can tell: does d12 train, how fast, in how much memory, does it go on, what does
# the score take, and how fast is a step beside llm.c's? It should take ten minutes on one H100
# (nobody has tried), after 400 MB of FineWeb and HellaSwag's questions have been fetched.
#
#     bash report/gpu.sh
#     SLOW=4 bash report/gpu.sh         # a slower card: four times the time limits below
#     SMOKE=1 bash report/gpu.sh        # on a CPU, with tiny sizes: do all parts still run?
#
# Every part has a time limit of its own, and the next one begins whatever became of it. All that
# they print goes to OUT, with 4 GB of checkpoints, and table.md there is the summary. What you may
# set before the command:
#
#     OUT=folder                  default: log_gpu_ and the time
#     LLMC=llm.c/train_gpt2.py    its model is timed, too
#     DATA='web/text_train_*.bin' QUESTIONS=file.jsonl    these are not fetched
#     FLAGS=--no-compile          flags for all runs, here for a machine without gcc
#     PYTHON=python3.12

# to the repository; names that were given hold where the command was typed
typed_in=$PWD
cd "$(dirname "$0")/.." || exit 1
absolute() { case $1 in "" | /*) echo "$1" ;; *) echo "$typed_in/$1" ;; esac; }
OUT=$(absolute "${OUT:-log_gpu_$(date +%Y%m%d_%H%M%S)}")
DATA=$(absolute "$DATA") QUESTIONS=$(absolute "$QUESTIONS") LLMC=$(absolute "$LLMC")
PYTHON=${PYTHON:-python}
# a path is made absolute, too, and a name like python3.12 is not
case $PYTHON in */*) PYTHON=$(absolute "$PYTHON") ;; esac
stop() { echo "error: $1" >&2; exit 1; }
case ${SLOW:-1} in 0* | *[!0-9]*) stop "SLOW must be a whole number" ;; esac
[ -z "$LLMC" ] || [ -f "$LLMC" ] || stop "LLMC: no file $LLMC"
[ ! -e "$OUT" ] || stop "$OUT exists: name another folder in OUT"
mkdir -p "$OUT" || exit 1
export PYTHONUNBUFFERED=1
failed=0
# Ctrl-C ends all of it, and not only the part that runs
trap 'exit 130' INT

# part NAME LIMIT PATTERN COMMAND: runs the command for at most LIMIT seconds (times SLOW), and puts
# the lines that have PATTERN in them into the table.
part() {
    local name=$1 limit=$(($2 * ${SLOW:-1})) pattern=$3 begun=$SECONDS code
    shift 3
    echo "== $name: $*"
    # --foreground: so that Ctrl-C reaches it. -k: what does not heed the limit is killed.
    timeout --foreground -k 60 "$limit" "$@" > "$OUT/$name.log" 2>&1
    code=$?
    # -a: a byte model's samples may be no text
    local answer=$(grep -aE "$pattern" "$OUT/$name.log")
    if [ $code != 0 ]; then
        failed=1
        # the line that names the error, else the last one
        local why=$(grep -aE '^[A-Za-z_.]*([Ee]rror|Exception)\b' "$OUT/$name.log" | tail -n 1)
        answer+="<br>${why:-$(tail -n 1 "$OUT/$name.log")}"
        [ $code != 124 ] || answer+="<br>over its limit of $limit s"
    fi
    # a | would end the cell
    answer=${answer//|/;}
    echo "| $name | $code | $((SECONDS - begun)) | ${answer//$'\n'/<br>} |" | tee -a "$OUT/table.md"
    return $code
}

# 72 steps of 524,288 tokens are 38 million
size="--val_tokens 1048576 --log_every 24" steps=72 every=24 limit=10042 turns=8 shape="" cpu=""
if [ -n "$SMOKE" ]; then
    cpu="--device cpu"
    shape="--n_layer 2 --n_head 4 --n_embd 64 --sequence_length 64 --total_batch_size 512 $cpu"
    size="--val_tokens 512 --log_every 2 $shape" steps=4 every=2 limit=4 turns=1
fi
printf '%s\n' "| part | exit code | seconds | what it says |" "| --- | --- | --- | --- |" \
    > "$OUT/table.md"

query="--query-gpu=name,driver_version,memory.total,power.limit --format=csv,noheader"
[ -n "$SMOKE" ] || part card 60 . nvidia-smi $query
card="import sys, torch; print(torch.__version__, torch.version.cuda)"
[ -n "$SMOKE" ] || card+="; torch.cuda.is_available() or sys.exit('torch sees no GPU')"
part torch 60 . "$PYTHON" -c "$card" || stop "see $OUT/torch.log"
# with SMOKE an empty DATA stays empty, which is the standard library as bytes
if [ -z "$DATA$SMOKE" ]; then
    DATA=$PWD/fineweb10B/fineweb_train_*.bin
    first=fineweb10B/fineweb_train_000001.bin
    [ -e $first ] || part fetch 900 "tokens to train on" "$PYTHON" fineweb.py --shards 1 \
        || stop "see $OUT/fetch.log"
fi
# $size, $shape, $cpu and $FLAGS without quotes: they are several words
run=("$PYTHON" train_gpt2.py --model d12 --input_bin "$DATA" --num_iterations $steps
     --val_loss_every $every $size $FLAGS)
training="^device|^NOTE|^WARNING|first step done| ms |val loss|peak memory"
gpt2="--arch gpt2 --recipe original"
part today 400 "$training" "${run[@]}" --output_dir "$OUT/today"
part gpt2 400 "$training" "${run[@]}" $gpt2 --output_dir "$OUT/gpt2"
part resume 150 "val loss" "$PYTHON" train_gpt2.py --resume --output_dir "$OUT/today" \
    --num_iterations $((steps + 2)) $cpu $FLAGS
score=("$PYTHON" hellaswag.py -m "$OUT/today/best.pt" --limit $limit $cpu)
[ -z "$QUESTIONS" ] || score+=(--data "$QUESTIONS")
part hellaswag 120 "^acc_norm +[01]" "${score[@]}"
# compared are figures of one table: bench.py lets its contenders take turns
bench=("$PYTHON" report/bench.py --steps $turns --warmup 2)
part bench_d12 300 '^\| (model|d12)' "${bench[@]}" "d12 $shape $FLAGS" \
    "d12 $gpt2 $shape $FLAGS"
part bench_d24 300 '^\| (model|d24)' "$PYTHON" report/bench.py --steps 3 --warmup 1 \
    "d24 $shape $FLAGS"
[ -z "$LLMC" ] || part bench_llmc 600 '^\| (model|d12)' "${bench[@]}" \
    "d12 $gpt2 $shape $FLAGS" "d12 $gpt2 $shape $FLAGS --peer '$LLMC'"
echo "wrote $OUT: table.md is the summary"
exit $failed

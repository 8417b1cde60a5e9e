#!/usr/bin/env bash
# Everything that a GPU should be asked, in eight minutes. Run it in the root of the repository:
#
#     bash tests/gpu.sh [TEXT [OPTIONS]]     # on a GPU
#     DRY=1 bash tests/gpu.sh                # every part on a CPU, at tiny sizes
#
# TEXT is a path for train.py --data; without it, the docstrings are used. OPTIONS are train.py's:
# --batch_size=8 for a small card, --tokenizer=gpt2 where that can be downloaded. A part that fails
# or runs out of time ends no other part. The results go to results/gpu.json, and with the logs to
# the folder OUT if that is set. PYTHON chooses the interpreter.
set -u
VENV=.venv/bin/python
[ -x $VENV ] || VENV=python3
PYTHON=${PYTHON:-$VENV}
export COMMAND="bash tests/gpu.sh $*" DRY=${DRY:-0} RESULTS=results/gpu.json TQDM_DISABLE=1 WORK
WORK=$(mktemp -d)
TESTS=tests
OPTIONS=(--preset=gpu --device=cuda --tokenizer=bpe --vocab_size=50257 --cache_dir="$WORK/cache"
    --data="${1:-$WORK/docstrings.jsonl}")
SHORT=(--grad_accum=4 --lm_steps=30 --planner_steps=30 --joint_steps=12 --eval_tokens=65536)
SMALL=(--n_layer=2 --planner_layer=1 --batch_size=8 --grad_accum=2 --lm_steps=6 --planner_steps=6
    --joint_steps=16 --eval_tokens=16384 --plans=none,hard,soft,gumbel)
if [ "$DRY" = 1 ]; then
    export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES="" RESULTS=$WORK/gpu.json
    TESTS=tests/test_data.py
    OPTIONS+=(--device=cpu --vocab_size=512 --n_layer=1 --n_head=2 --n_embd=32 --block_size=256
        --n_labels=16 --planner_embd=32 --planner_layer=1 --planner_reach=8 --batch_size=2
        --grad_accum=2)
fi
OPTIONS+=("${@:2}")

# part NAME SECONDS COMMAND...: run a part, for no longer than is left of eight minutes.
part() {
    local name=$1 left=$((SECONDS < 480 ? 480 - SECONDS : 1)) begun=$SECONDS code=0
    local limit=$(($2 < left ? $2 : left))
    shift 2
    echo "$name: at most $limit s"
    timeout -k 5 "$limit" "$@" > "$WORK/$name.log" 2>&1 || code=$?
    echo "$name $code $((SECONDS - begun))" >> "$WORK/parts.txt"
}

CHECK=("$PYTHON" tests/bench_gpu.py)
part text 90 "${CHECK[@]}" text "${OPTIONS[@]}"
part tests 120 "$PYTHON" -m pytest -q -p no:cacheprovider $TESTS
part plans 60 "${CHECK[@]}" plans "${OPTIONS[@]}"
part steps 60 "${CHECK[@]}" steps "${OPTIONS[@]}" --compile=false
part steps_compiled 150 "${CHECK[@]}" steps "${OPTIONS[@]}"
part stages 90 "${CHECK[@]}" stages "${OPTIONS[@]}" "${SHORT[@]}" --compile=false \
    --out_dir="$WORK/stages"
export TORCH_LOGS=recompiles
part stages_compiled 120 "${CHECK[@]}" stages "${OPTIONS[@]}" "${SMALL[@]}" \
    --out_dir="$WORK/compiled"
"${CHECK[@]}" report
code=$?
[ -n "${OUT:-}" ] && mkdir -p "$OUT" && cp "$RESULTS" "$WORK"/*.log "$OUT"
rm -r "$WORK"
exit $code

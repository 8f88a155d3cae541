#!/usr/bin/env bash
# Everything here that is measured on a GPU, on one card, one stage after the other:
#
#     bash measure/gpu.sh OUT [STAGE ...]       all stages, or those that are named
#
#   kernels   the tests that need a GPU (make test-gpu)
#   bench     bench.py at 0.5B and 1.5B, with shard=none and fsdp: update, MFU, memory beside the plan, the head beside Liger's
#   decode    bench.py at 0.5B and 1.5B: rollouts of 1 to 256 sequences at once, weight sync
#   toy       train.py on the toy, from start to end
#   luffy     config/luffy_1p5b.py with random weights and short answers: 3 steps and a checkpoint
#   peers     a step at 0.5B beside TRL's, without and with Liger's kernels (bench.py peers)
#
# PYTHON is an environment of requirements-gpu.txt (python, if it is not set), TRL one of requirements-bench.txt
# (trl/bin/python). Each command has a time limit; its output goes to OUT/NAME.log, and the end of it is printed. A stage that
# cannot run says why, and the others run. OUT/summary.txt has the card, the versions and how each command ended. Models are
# made in a folder below TMPDIR, which takes 25 GB until the script ends.
# TINY=1 runs the same commands on a CPU with small shapes: it shows that the script works, and measures nothing.

STAGES="kernels bench decode toy luffy peers"
[ $# -gt 0 ] || { sed -n '2,18s/^# \{0,1\}//p' "$0"; exit 2; }
OUT=$(realpath -m "$1"); shift
for stage in "$@"; do
  case " $STAGES " in *" $stage "*) ;; *) echo "error: there is no stage $stage: choose of $STAGES" >&2; exit 2 ;; esac
done
cd "$(dirname "$0")/.." || exit 2
PYTHON=${PYTHON:-python} TRL=${TRL:-trl/bin/python} TINY=${TINY:-}

if [ "$TINY" ]; then
  device=cpu sizes=tiny luffy=tiny
  update="--tokens=512 --shortest=32 --longest=128 --repeats=1"
  rollouts="--rollout_prompts=1,4 --rollout_tokens=16 --syncs=1"
  answers="--prompts_per_step=2 --max_tokens=16"
  peers="--shapes=toy --samplers=torch --repeats=1"
else
  device=cuda sizes="0.5b 1.5b" luffy=1.5b
  update="--tokens=32768 --shortest=2048 --longest=8192 --repeats=3"
  rollouts="--rollout_prompts=1,8,32,128,256 --rollout_tokens=512 --syncs=5"
  answers="--prompts_per_step=32 --max_tokens=1024"
  peers="--repeats=5"
  "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "error: torch finds no GPU here (PYTHON=$PYTHON); TINY=1 tries this script on a CPU" >&2; exit 2; }
fi

mkdir -p "$OUT" || exit 2
WORK=$(mktemp -d) || exit 2
trap 'rm -rf "$WORK"' EXIT
trap 'kill $job 2> /dev/null; wait; exit 130' INT TERM
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
has() { "$1" -c "import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, sys.argv[1:])))" "${@:2}"; }
has "$PYTHON" flashinfer || export VLLM_USE_FLASHINFER_SAMPLER=0 # vLLM takes it for granted

note() { echo "$*" | tee -a "$OUT/summary.txt"; }
run() { # run NAME LIMIT COMMAND ...: with a limit in seconds
  local name=$1 limit=$2 start=$SECONDS code; shift 2
  echo; echo "== $name: $*"
  timeout -k 10 "$limit" "$@" > "$OUT/$name.log" 2>&1 < /dev/null & job=$!
  wait $job; code=$?
  tail -n 14 "$OUT/$name.log" | cut -c1-240
  case $code in
    0) note "$name: $((SECONDS - start)) s" ;;
    124 | 137) note "$name: FAILED, not done after $limit s"; failed=1 ;;
    *) note "$name: FAILED with exit code $code after $((SECONDS - start)) s, see $OUT/$name.log"; failed=1 ;;
  esac
  return $code
}

kernels() {
  [ "$TINY" ] && { note "kernels: not measured, there is no GPU"; return; }
  has "$PYTHON" pytest hypothesis || { note "kernels: not measured, $PYTHON has no pytest or no hypothesis"; return; }
  run kernels 600 make test-gpu PYTHON="$PYTHON"
}

bench() {
  for size in $sizes; do for shard in none fsdp; do
    run "bench_${size}_$shard" 300 "$PYTHON" bench.py --device=$device --size=$size --shard=$shard --syncs=0 $update \
      --out="$OUT/bench.jsonl"
  done; done
}

decode() {
  for size in $sizes; do
    run "decode_$size" 400 "$PYTHON" bench.py --device=$device --size=$size --tokens=512 --repeats=1 $rollouts \
      --out="$OUT/decode.jsonl"
  done
}

toy() {
  run toy 300 "$PYTHON" train.py --device=$device --max_steps=6 --eval_interval=6 --eval_max_problems=40 --out_dir="$WORK/toy"
  cp "$WORK/toy/metrics.jsonl" "$OUT/toy.jsonl"
}

luffy() {
  run luffy_model 300 "$PYTHON" measure/random_model.py "$WORK/luffy" $luffy || return
  run luffy 600 "$PYTHON" train.py config/luffy_1p5b.py --device=$device --model="$WORK/luffy/model" \
    --data="$WORK/luffy/train.parquet" --out_dir="$WORK/luffy/run" --max_steps=3 $answers --max_prompt_tokens=64 \
    --max_teacher_tokens=1536 --require_think=False --holdout=0 --eval_interval=0 --save_interval=0 --rollout_interval=0 \
    --reward_workers=4
  cp "$WORK/luffy/run/metrics.jsonl" "$OUT/luffy.jsonl"
}

peers() {
  [ -x "$TRL" ] || { note "peers: not measured, there is no $TRL (requirements-bench.txt says how to make it)"; return; }
  run peers 900 "$PYTHON" bench.py peers --device=$device --trl="$TRL" $peers --out="$OUT/peers.jsonl"
}

failed=0
note "$(date -u +%FT%TZ), $("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, tiny shapes")')"
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2> /dev/null | while read -r card; do note "$card"; done
note "$("$PYTHON" -c 'from configurator import provenance; print(*(f"{k} {v}" for k, v in provenance().items()), sep=", ")')"
for stage in ${*:-$STAGES}; do "$stage"; done
echo; echo "== all, in $OUT"; cat "$OUT/summary.txt"
exit $failed

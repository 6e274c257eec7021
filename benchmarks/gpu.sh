#!/usr/bin/env bash
# Everything that needs a GPU, in one command of about ten minutes: tests, then figures beside the
# peers. Logs and the CSV go to $OUT. FA_COMMIT names the commit where the tree has no history.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results}
mkdir -p "$OUT"
export LOCAL_KERNELS=${LOCAL_KERNELS:-org/flash-attention=$PWD} HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
workers=$(($(nproc) * 3 / 4))
failed=0

run() { # run LOG command...: keep the whole log, print its end
  local log=$OUT/$1
  shift
  "$@" >"$log" 2>&1 || failed=1
  tail -n 20 "$log" | cut -c1-160
}

# The cold start is timed alone, on a quiet machine.
run tests.log python3 -m pytest -q -n "$workers" -k "not cold_start"
run cold.log python3 -m pytest -q -s -k cold_start tests/test_torch.py
bench() { run "$1.log" python3 benchmarks/run.py --mode "$@" --csv "$OUT/gpu.csv"; }
bench host --batch-size 1 --num-heads 2 --seq-len 16 --only ours sdpa-flash
bench bwd --preset anchors --warm --only ours sdpa-flash cudnn flex
bench fwd --preset anchors --only ours sdpa-flash cudnn flex
run options.log python3 benchmarks/options.py --csv "$OUT/options.csv"
run decode.log python3 benchmarks/decode.py --csv "$OUT/decode.csv"
bench memory --batch-size 1 --num-heads 16 --seq-len 16384 --head-dim 128
# New random cases; each process compiles its own kernels.
for seed in $(seq "$workers"); do
  FA_FUZZ_SECONDS=${FA_FUZZ_SECONDS:-60} FA_FUZZ_SEED=$seed timeout 600 \
    python3 -m pytest -q -s --timeout 0 tests/test_random.py >"/tmp/random-$seed.log" 2>&1 &
done
wait
cat /tmp/random-*.log >"$OUT/random.log"
grep -h -E "^[0-9]+ cases|^[0-9]+ (passed|failed)" /tmp/random-*.log
exit $failed

#!/bin/sh
# The GPU tests and all benchmarks of one card, in one go. What is measured goes to the folder given (default: docs/benchmarks/gpu).
#
#     bench/gpu.sh [FOLDER] [PYTHON]
#
# Each step may fail without keeping the others from running; the exit status is 1 then, and the log says which.
set -u
cd "$(dirname "$0")/.."
out=${1:-docs/benchmarks/gpu}
python=${2:-python}
mkdir -p "$out"
failed=0

step() {
    echo "==> $*"
    "$@" || { echo "FAILED: $*"; failed=1; }
}

step "$python" -m pytest -m gpu --junitxml="$out/tests.xml" tests/gpu
for context in 1k 4k 8k 16k; do
    for model in llava-1.5-7b qwen2.5-vl-7b qwen3-vl-8b; do
        step "$python" -m bench.run --preset "$model-$context" --json "$out/$model-$context.json"
    done
done
step "$python" -m bench.run --preset llava-1.5-7b-16k --batch 16 --contenders inductor-static,tgvkv,floor-static \
    --json "$out/llava-1.5-7b-16k-batch-16.json"
step "$python" -m bench.bandwidth --preset llava-1.5-7b-16k --batch 16 --budget 0.5 --json "$out/bandwidth.json"
step "$python" -m bench.scaling --preset llava-1.5-7b --json "$out/scaling.json" --markdown "$out/scaling.md"
step "$python" -m bench.throughput --preset llava-1.5-7b-16k --json "$out/throughput.json"
step "$python" -m bench.plot --out "$out" "$out"/llava*.json "$out"/qwen*.json "$out/scaling.json"
exit $failed

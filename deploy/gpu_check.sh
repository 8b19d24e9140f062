#!/usr/bin/env bash
# Everything that needs a GPU, in one go: tests first, then measurements, then all tables again.
#   deploy/gpu_check.sh [FOLDER]    logs and JSON go to FOLDER (build/gpu-check by default)
# Settings, as environment variables:
#   PYTHON    the Python that has torch, triton, cupy and cuda-bindings (python3)
#   STEPS     what to run; by default: kernels-tests engine-tests fp8-tests kernels handover engine interference
#             one-sequence throughput. Only on request: memcheck, which needs compute-sanitizer; drafts (1 minute); host-cache
#             (4 minutes, 45 GiB of memory); on two GPUs, crossover (2 minutes), goodput and goodput-long (8 to 10 minutes
#             each); on two or more, scaling (4 minutes)
#   TWOSTROKE_TEST_MODEL    SmolLM2-135M-Instruct as a directory or GGUF file, if its package is not installed
# Each step has a time limit, and a step that fails does not keep the next ones from running. Exit code 1: a step failed.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-build/gpu-check}")
mkdir -p "$out"
python=${PYTHON:-python3}
export PYTHONPATH=".:protos${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
steps=${STEPS:-kernels-tests engine-tests fp8-tests kernels handover engine interference one-sequence throughput}
summary=()
status=0

run() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 started=$SECONDS code
  shift 2
  [[ " $steps " == *" $name "* ]] || return 0
  echo "### $name (at most $limit s)"
  timeout --kill-after 10 "$limit" "$@" >"$out/$name.log" 2>&1
  code=$?
  ((code == 0)) || status=1
  summary+=("$(printf '%-16s exit %-4d %4d s' "$name" "$code" $((SECONDS - started)))")
  tail -n 5 "$out/$name.log"
}

nvidia-smi --query-gpu=index,name,driver_version,memory.total --format=csv,noheader
# Most of the tests' time goes into compiling kernels, on one core each.
parallel=()
"$python" -c "import xdist" 2>/dev/null && parallel=(-n 8)
run kernels-tests 150 "$python" -m pytest -q --maxfail 20 --timeout 120 "${parallel[@]}" tests/kernels
run engine-tests 330 "$python" -m pytest -q --timeout 180 "${parallel[@]}" tests/gpu --ignore-glob 'tests/gpu/test_fp8_*'
run fp8-tests 240 "$python" -m pytest -q --timeout 180 "${parallel[@]}" tests/gpu/test_fp8_*.py
run memcheck 400 "$python" -m tests.gpu.memcheck
run kernels 150 "$python" -m benchmarks.gpu.kernels "$out/kernels.json"
run handover 60 "$python" -m benchmarks.gpu.handover "$out/handover.json"
run engine 210 "$python" -m benchmarks.gpu.engine --out "$out/engine.json"
run interference 200 "$python" -m benchmarks.gpu.interference --out "$out/interference.json" --logs "$out/interference"
run drafts 120 "$python" -m benchmarks.gpu.drafts --out "$out/drafts.json"
run host-cache 300 "$python" -m benchmarks.gpu.host_cache --out "$out/host_cache.json" --logs "$out/host-cache"
run one-sequence 90 "$python" -m benchmarks.gpu.one_sequence --out "$out/one_sequence.json"
if (($(nvidia-smi --list-gpus | wc -l) > 1)); then
  run crossover 240 "$python" -m benchmarks.gpu.crossover --out "$out/crossover.json" --logs "$out/crossover"
  run goodput 800 "$python" -m benchmarks.gpu.goodput --out "$out/goodput.json" --logs "$out/goodput"
  run goodput-long 700 "$python" -m benchmarks.gpu.goodput --prompt-tokens 200 --output-tokens 1000 --settle-seconds 10 \
    --trials 4 --low 8 --high 32 --out "$out/goodput-long.json" --logs "$out/goodput-long"
  run scaling 400 "$python" -m benchmarks.gpu.scaling --out "$out/scaling.json" --logs "$out/scaling"
fi
run throughput 240 "$python" -m benchmarks.gpu.throughput --out "$out/throughput.json" --logs "$out/cluster"

for name in $steps; do
  [[ -f "$out/$name.log" ]] || continue
  echo
  echo "### $name"
  # The table that a script ends with; of a script without one, its last lines.
  if grep -qE '^(what|kernel)  ' "$out/$name.log"; then
    tac "$out/$name.log" | sed -E '/^(what|kernel)  /q' | tac
  else
    tail -n 25 "$out/$name.log"
  fi
done
echo
printf '%s\n' "${summary[@]}"
exit "$status"

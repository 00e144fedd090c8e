#!/usr/bin/env bash
# Everything that needs a GPU, in one command and at most 8 minutes: builds for this machine's GPU,
# runs the tests marked `gpu`, the sweep of the kernels and compute-sanitizer, and writes
# benchmarks/results/<device>-<date>.json (after every step, so that there is one whatever happens),
# everything that was printed in a .log beside it, and a table.
#
#     benchmarks/gpu.sh
#     PYTHON=/path/to/python RESULTS=/path/to/folder benchmarks/gpu.sh
#
# PYTHON: one with torch >= 2.11; else the first of .venv, python3 and python that has it; else
# `make setup`, which needs the network. What that Python lacks besides torch is installed into
# build/gpu, never into it.
#
# What cannot run is said and left out. Exit code: 0 all ran and passed; 1 something failed;
# 3 nothing failed, but something could not run.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

readonly BUDGET=460 # seconds, for all steps: the rest of 8 minutes is for stopping and writing
work=$(mktemp -d) || exit 1
steps="$work/steps.tsv" # name, passed|failed|left out, seconds, detail
log="$work/log"
: >"$steps"
: >"$log"
child=""
python="" device="" capability="" driver="" compiler=""
SECONDS=0

has() { command -v "$1" >/dev/null 2>&1; }

say() { printf '%s\n' "$*" | tee -a "$log"; }

record() { # name state seconds detail
  printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4" >>"$steps"
  say "== $1: $2 ($3 s) $4"
  report >/dev/null
}

# What was found so far. Any Python 3 can write it.
report() {
  local writer=${python:-$(command -v python3 || command -v python)}
  [[ -n $device && -n $writer ]] || return 1
  "$writer" -m benchmarks.gpu_report --device "$device" --steps "$steps" \
    --kernels "$work/kernels.json" --folder "$results" --fact "driver=$driver" \
    --fact "nvcc=$compiler" --fact "seconds=$SECONDS"
}

last_line() { grep -v '^[[:space:]]*$' "$1" | tail -n 1 | tr '\t' ' ' | cut -c 1-200; }

# run NAME SECONDS COMMAND...: one step, stopped when its time or the whole budget is over. It is
# left out, not failed, where what it prints matches $unavailable.
unavailable=""
run() {
  local name=$1 limit=$2 started=$SECONDS left=$((BUDGET - SECONDS)) output="$work/output" status
  shift 2
  if ((left < 5)); then
    record "$name" "left out" 0 "the $BUDGET s were used up"
    return 1
  fi
  ((left < limit)) && limit=$left
  say "== $name: $*"
  # In the background, so that a signal is answered at once.
  timeout --kill-after=10 "$limit" "$@" >"$output" 2>&1 </dev/null &
  child=$!
  wait "$child"
  status=$?
  child=""
  tee -a "$log" <"$output"
  local seconds=$((SECONDS - started)) detail
  detail=$(last_line "$output")
  if ((status == 0)); then
    record "$name" passed "$seconds" "$detail"
    return 0
  fi
  if [[ -n $unavailable ]] && grep -qE "$unavailable" "$output"; then
    record "$name" "left out" "$seconds" "$(grep -m 1 -E "$unavailable" "$output" | tr '\t' ' ')"
    return 1
  fi
  if ((status == 124 || status == 137)); then
    record "$name" failed "$seconds" "not done after $limit s"
  else
    record "$name" failed "$seconds" "exit code $status: $detail"
  fi
  return 1
}

finish() {
  trap - EXIT HUP INT TERM
  local status=0
  echo
  column -t -s "$(printf '\t')" "$steps" 2>/dev/null || cat "$steps"
  cut -f 2 "$steps" | grep -q 'left out' && status=3
  cut -f 2 "$steps" | grep -q failed && status=1
  if [[ -z $device ]]; then
    echo "No results file: there is no GPU to name it after."
  elif ! written=$(report); then
    echo "No results file could be written to $results"
    status=1
  else
    echo "$written"
    written=${written#Written: }
    cp "$log" "${written%.json}.log" && echo "Written: ${written%.json}.log"
  fi
  rm -rf "$work"
  case $status in
    0) echo "gpu.sh: everything ran and passed" ;;
    1) echo "gpu.sh: something failed, see above" ;;
    3) echo "gpu.sh: nothing failed, but not everything could run, see above" ;;
  esac
  exit "$status"
}

stopped() {
  [[ -n $child ]] && kill -TERM "$child" 2>/dev/null
  record "gpu.sh" failed "$SECONDS" "stopped by a signal"
  finish
}
trap finish EXIT
trap stopped HUP INT TERM

# --- What is there -------------------------------------------------------------------------------

results=${RESULTS:-benchmarks/results}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# Compilers of others keep their caches there.
if [[ -z ${HOME:-} || ! -w ${HOME:-} ]]; then export HOME=$work; fi
# Installed, but not on the PATH: as toolkits are by default.
for toolkit in "${CUDA_HOME:-}" "${CUDA_PATH:-}" /usr/local/cuda /usr/local/cuda-*; do
  [[ -n $toolkit && -d $toolkit/bin ]] && PATH=$PATH:$toolkit/bin:$toolkit/compute-sanitizer
done

smi() { nvidia-smi "--query-gpu=$1" --format=csv,noheader 2>/dev/null | head -n 1; }

if has nvidia-smi && nvidia-smi -L >/dev/null 2>&1; then
  device=$(smi name)
  driver=$(smi driver_version)
  capability=$(smi compute_cap | tr -d .) # 9.0 -> 90: the one architecture that is needed
else
  record "GPU" "left out" 0 "nvidia-smi lists no GPU: tests, sanitizer and sweep need one"
fi
if has nvcc; then
  compiler=$(nvcc --version | grep -o 'release [0-9.]*' | cut -d ' ' -f 2)
else
  record "nvcc" "left out" 0 "no CUDA compiler, neither on the PATH nor in /usr/local/cuda: install the CUDA toolkit"
fi
if [[ -z $device ]] || ! has nvcc; then exit; fi

# The first Python whose torch sees the GPU, or else the first with a torch that is new enough.
sees_gpu=false
fallback=""
if [[ -n ${PYTHON:-} ]]; then
  candidates=("$PYTHON")
else
  candidates=(.venv/bin/python python3 python)
fi
for candidate in "${candidates[@]}"; do
  has "$candidate" || continue
  found=$("$candidate" -m benchmarks.gpu_probe 2>/dev/null)
  fit=$?
  say "$(command -v "$candidate"): ${found//$'\t'/, }"
  if ((fit == 0)); then
    python=$candidate
    sees_gpu=true
    IFS=$'\t' read -r _ capability _ <<<"$found"
    break
  fi
  ((fit == 2)) && fallback=${fallback:-$candidate}
done
python=${python:-$fallback}
[[ $capability =~ ^[0-9]+$ ]] || capability=native # as CMake calls the GPU that is there
export GRAINS_CUDA=ON CMAKE_CUDA_ARCHITECTURES=$capability

# Without the network, these are what pip says last.
no_packages='^ERROR: (No matching|Could not)|No module named (pip|venv|ensurepip)|ensurepip is not'
unavailable=$no_packages
if [[ -z $python && -z ${PYTHON:-} ]]; then
  for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
    if run "make setup" 300 make setup "PYTHON=$candidate"; then
      python=.venv/bin/python
      "$python" -m benchmarks.gpu_probe >/dev/null 2>&1 && sees_gpu=true
    fi
    break
  done
fi
if [[ -z $python ]]; then
  record "Python" "left out" 0 "none with torch >= 2.11 was found or made: no tests, no sweep"
else
  python=$(command -v "$python") # pip's cmake and ninja lie beside it
  [[ $python == /* ]] || python=$PWD/$python
  PATH=$(dirname "$python"):$PATH
fi

# A Python with torch that lacks other packages: an environment that sees its packages, and has those.
complete() {
  local missing
  missing=$("$python" -m benchmarks.gpu_probe missing) || return 1
  echo "missing: ${missing//$'\n'/, }"
  "$python" -m venv build/gpu || return 1
  "$python" -c 'import site, sys; print("\n".join(p for p in sys.path if p.endswith("-packages")))' \
    >"$(echo build/gpu/lib/python*/site-packages)/torch.pth"
  mapfile -t missing <<<"$missing"
  build/gpu/bin/python -m pip install -q --disable-pip-version-check --retries 2 \
    "${missing[@]}" || return 1
}
if [[ -n $python ]]; then
  export -f complete
  export python
  if [[ -n $("$python" -m benchmarks.gpu_probe missing 2>&1) ]]; then
    if run "packages" 150 bash -c complete; then
      python=$PWD/build/gpu/bin/python
      PATH=$(dirname "$python"):$PATH
    fi
  fi
fi
unavailable=""

# --- The steps -----------------------------------------------------------------------------------

built=""
if [[ -n $python ]] && run "build" 240 "$python" setup.py --quiet build_ext --inplace; then
  built=build/cmake-$("$python" -c 'import sys; print(sys.implementation.cache_tag)')
fi
if [[ -n $built ]] && $sees_gpu; then
  mapfile -t tests < <(grep -lE 'mark\.gpu' tests/test_*.py)
  # Of the settings in pyproject.toml, those that fail where a plugin is missing are left out.
  workers=()
  "$python" -c 'import xdist' 2>/dev/null && workers=(-n 4) # the models are tiny
  run "tests" 200 "$python" -m pytest -q -m gpu -p no:cacheprovider -o addopts= --tb=short \
    --continue-on-collection-errors "${workers[@]}" "${tests[@]}"
  run "kernels" 150 "$python" -m benchmarks.kernels --device cuda --output "$work/kernels.json"
elif [[ -n $built ]]; then
  record "tests" "left out" 0 "torch of $python sees no GPU: install a CUDA build of torch"
  record "kernels" "left out" 0 "torch of $python sees no GPU: install a CUDA build of torch"
fi

if has compute-sanitizer; then
  if [[ -z $built ]] && has cmake; then # needs neither Python nor torch
    built=build/cuda_check
    run "configure cuda_check" 60 cmake -S . -B "$built" -DGRAINS_DRIVER_ONLY=ON \
      -DGRAINS_CUDA=ON "-DCMAKE_CUDA_ARCHITECTURES=$capability" || built=""
  fi
  if [[ -n $built ]] && run "build cuda_check" 120 \
    cmake --build "$built" --parallel --target grains_cuda_check; then
    unavailable='Device not supported|LibraryNotLoaded'
    for tool in memcheck racecheck initcheck synccheck; do
      run "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 "$built/grains_cuda_check"
    done
  fi
else
  record "compute-sanitizer" "left out" 0 "it is not there: it comes with the CUDA toolkit"
fi

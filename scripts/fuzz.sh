#!/usr/bin/env bash
# Fuzzes every target of fuzz/ for so many seconds each (60 where nothing is said), as many at a time as there are cores.
#
#   scripts/fuzz.sh [SECONDS [TARGET...]]
#
# Needs a C++ compiler and stable Rust: the coverage that libFuzzer steers by is a pass of LLVM, which rustc runs over
# the crates of this workspace; dependencies are taken as they are. What is found lies in fuzz/artifacts, and
# `PINRANGE_FUZZ=TARGET target/debug/pinrange-fuzz FILE` runs it again. New inputs are kept in target/fuzz-corpus;
# fuzz/corpus holds those that every run begins with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

seconds=${1:-60}
targets=("${@:2}")
[[ ${#targets[@]} -gt 0 ]] || targets=(request fields names answers)

export RUSTC_WORKSPACE_WRAPPER="$PWD/fuzz/rustc-with-coverage"
# A little optimisation for what is fuzzed; dependencies have theirs already.
cargo build --locked --quiet -p pinrange-fuzz --config 'profile.dev.opt-level=1'
unset RUSTC_WORKSPACE_WRAPPER

fuzz() {
  local target=$1 kept="target/fuzz-corpus/$1" log="target/fuzz-$1.log"
  mkdir -p "$kept" "fuzz/artifacts/$target"
  # Errors are expected by the thousand; their log lines are not.
  if PINRANGE_FUZZ=$target target/debug/pinrange-fuzz "$kept" "fuzz/corpus/$target" \
    -max_total_time="$seconds" -max_len=2048 -timeout=20 -rss_limit_mb=2048 -print_final_stats=1 \
    -dict="fuzz/$target.dict" -artifact_prefix="fuzz/artifacts/$target/" > "$log" 2>&1; then
    echo "$target: $(sed -n 's/^stat::number_of_executed_units: *//p' "$log") inputs, $(grep -o 'cov: [0-9]*' "$log" | tail -1)"
  else
    tail -40 "$log"
    echo "$target: FAILED; the input is in fuzz/artifacts/$target" >&2
    return 1
  fi
}
export -f fuzz
export seconds

printf '%s\n' "${targets[@]}" | xargs -P "$(nproc)" -I TARGET bash -c 'fuzz TARGET'

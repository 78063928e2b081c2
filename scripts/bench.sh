#!/usr/bin/env bash
# pinrange against nginx, Varnish and Traffic Server, and its downloader against aria2c, curl and the AWS CLI, all on this machine:
#
#     scripts/bench.sh            half an hour on two cores: writes docs/bench.json, docs/PERFORMANCE.md and the plots in docs/bench/
#     scripts/bench.sh --quick    three minutes: does it work? Writes the same to target/bench/, and means nothing
#     scripts/bench.sh warm …     what run-bench.py takes: some of it anew, the rest of docs/bench.json as it was
#
# Installs what is missing (Debian, Ubuntu), builds, measures, draws. The machine should have nothing else to do.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PATH:/usr/sbin"

declare -A packages=(
  [nginx]=nginx-light [varnishd]=varnish [traffic_server]=trafficserver [wrk]=wrk
  [aria2c]=aria2 [curl]=curl [aws]=awscli [python3]=python3 [taskset]=util-linux
)
missing=()
for program in "${!packages[@]}"; do
  command -v "$program" > /dev/null || missing+=("${packages[$program]}")
done
if ((${#missing[@]})); then
  echo "bench: installs ${missing[*]}"
  root=(); ((EUID == 0)) || root=(sudo)
  # Debian starts servers when it installs them, unless this file says no.
  if [[ ! -e /usr/sbin/policy-rc.d ]]; then
    printf '#!/bin/sh\nexit 101\n' | "${root[@]}" install -m 755 /dev/stdin /usr/sbin/policy-rc.d
    trap '"${root[@]}" rm -f /usr/sbin/policy-rc.d' EXIT
  fi
  "${root[@]}" apt-get update -qq
  "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" > /dev/null
fi

cargo build --release --locked --bin pinrange --example origin --example relay --example calls

out=docs
[[ " $* " != *" --quick "* ]] || out=target/bench
mkdir -p "$out/bench"
status=0
python3 scripts/run-bench.py --json "$out/bench.json" "$@" || status=$?
python3 scripts/bench/report.py "$out/bench.json" --out "$out"
exit "$status"

"""Instructions that the server spends on a warm request, counted by callgrind and held against a baseline.

    cargo build --release --locked --bin pinrange --example origin && python3 scripts/instructions.py [--check | --update]

The release binary runs under valgrind with one worker thread, and answers pinned ranges from its disk tier on one connection that is kept alive. Two runs that differ in nothing but the number of requests give the cost of one: (cost of 2N − cost of N) ÷ N, so the start, the first
touch and the end cancel out. A request is sent when every thread of the server sleeps again: whether the next one is there already when the server looks
for it is left to no race. What the kernel does is not counted.

`--check` fails when a request costs more than 5 % above `scripts/instructions.json` and says which functions the rise is in; `--update` writes that file
anew. The count does not depend on the machine's load or clock, but on the compiler, on glibc (its widest vector routines, which not every processor has, are turned off) and on
valgrind: their versions stand in the file, and a check with others says so.
"""

import argparse
import collections
import contextlib
import json
import os
import pathlib
import platform
import random
import re
import socket
import subprocess
import sys
import tempfile

from bench import servers
from fleet import stack

KIB, MIB = 1 << 10, 1 << 20
OBJECT = 8 * MIB
REQUESTS = 2000
CORES = f"0-{os.cpu_count() - 1}"
BASELINE = pathlib.Path(__file__).with_suffix(".json")
# A function that costs less per request is not listed.
SMALLEST = 20
# `alike`: one head differs from the next in its range alone, as in a download in pieces (ADR 23).
CASES = {
    "4 KiB": {"length": 4 * KIB, "log": "warn", "alike": True},
    "64 KiB": {"length": 64 * KIB, "log": "warn", "alike": True},
    "4 KiB, a log line each": {"length": 4 * KIB, "log": "info", "alike": True},
    "4 KiB, no two heads alike": {"length": 4 * KIB, "log": "warn", "alike": False},
    "64 KiB, no two heads alike": {"length": 64 * KIB, "log": "warn", "alike": False},
}


def main():
    options = arguments()
    baseline = json.loads(BASELINE.read_text()) if BASELINE.exists() else {"cases": {}}
    measured = {"tools": tools(), "cases": {}}
    worse = []
    with tempfile.TemporaryDirectory(prefix="pinrange-instructions-") as directory:
        for name, case in CASES.items():
            costs = per_request(pathlib.Path(tempfile.mkdtemp(dir=directory)), options, **case)
            total = sum(costs.values())
            before = baseline["cases"].get(name)
            measured["cases"][name] = {
                "instructions": total,
                "functions": {function: cost for function, cost in costs.most_common() if cost >= SMALLEST},
            }
            change = f", {total / before['instructions'] - 1:+.1%} from {before['instructions']}" if before else ""
            print(f"{name}: {total} instructions a request{change}", flush=True)
            if before and total > before["instructions"] * (1 + options.tolerance / 100):
                worse.append(name)
                print_rise(before["functions"], costs)
            if options.top:
                for function, cost in costs.most_common(options.top):
                    print(f"  {cost:>7}  {function}")
    if options.update:
        BASELINE.write_text(json.dumps(measured, indent=1) + "\n")
        return 0
    if not options.check:
        return 0
    missing = [name for name in CASES if name not in baseline["cases"]]
    if missing:
        print(f"{BASELINE.name} has nothing on {', '.join(missing)}: write it with --update", file=sys.stderr)
    if worse:
        print(
            f"more than {options.tolerance:g} % above the baseline: {', '.join(worse)}. Where that is meant to be, write the new one with --update",
            file=sys.stderr,
        )
        if baseline["tools"] != measured["tools"]:
            print(f"the baseline was made with {baseline['tools']}, this is {measured['tools']}", file=sys.stderr)
    return 1 if worse or missing else 0


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="fail on a rise")
    action.add_argument("--update", action="store_true", help="write the baseline")
    parser.add_argument("--pinrange", default="target/release/pinrange", metavar="PROGRAM")
    parser.add_argument("--origin", default="target/release/examples/origin", metavar="PROGRAM")
    parser.add_argument("--requests", type=int, default=REQUESTS, metavar="N", help=f"N and 2 N in the two runs [{REQUESTS}]")
    parser.add_argument("--tolerance", type=float, default=5, metavar="PERCENT", help="[5]")
    parser.add_argument("--top", type=int, metavar="N", help="show the N functions that cost most")
    options = parser.parse_args()
    for name in ("pinrange", "origin"):
        setattr(options, name, str(pathlib.Path(getattr(options, name)).resolve(strict=True)))
    return options


def tools():
    rustc = subprocess.run(["rustc", "--version"], capture_output=True, text=True, check=True).stdout
    valgrind = subprocess.run([stack.program("valgrind"), "--version"], capture_output=True, text=True, check=True).stdout
    return {
        "rustc": rustc.split()[1],
        "libc": " ".join(platform.libc_ver()),
        "valgrind": valgrind.strip().removeprefix("valgrind-"),
        "machine": platform.machine(),
    }


def per_request(directory, options, length, log, alike):
    """The instructions of one request, by function."""
    objects = directory / "objects"
    objects.mkdir()
    (objects / servers.OBJECT).write_bytes(random.Random(1).randbytes(OBJECT))
    few, many = (run(directory, options, length, log, alike, count) for count in (options.requests, 2 * options.requests))
    difference = {function: many[function] - few[function] for function in few | many}
    return collections.Counter({function: round(cost / options.requests) for function, cost in difference.items()})


def run(directory, options, length, log, alike, requests):
    """The costs of a whole run with so many requests, by function."""
    environment = {
        "PINRANGE_LOG": log,
        "PINRANGE_SERVER__WORKER_THREADS": "1",
        "AWS_ACCESS_KEY_ID": "bench",
        "AWS_SECRET_ACCESS_KEY": "bench",
        "AWS_EC2_METADATA_DISABLED": "true",
        # Every x86-64 machine of today has what is left.
        "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW,-ERMS,-FSRM",
    }
    port, counted = stack.free_port(), directory / "callgrind.out"
    with stack.Processes(directory) as processes:
        origin = servers.Origin(processes, options.origin, directory / "objects", CORES)
        command = [
            *[stack.program("valgrind"), "--tool=callgrind", f"--callgrind-out-file={counted}", options.pinrange, "serve"],
            *["--listen", f"127.0.0.1:{port}", "--admin", "127.0.0.1:0", "--cache-dir", directory / f"cache-{requests}"],
            *["--mount", "/bench", "--bucket", "bench", "--endpoint", origin.endpoint, "--region", "us-east-1"],
        ]
        server = servers.Server(processes, "pinrange", command, port, f"/bench/{servers.OBJECT}", environment)
        if server.read(0, server.size)[0] != 206:
            raise stack.Broken(f"the cache cannot be filled: {(directory / 'pinrange.log').read_text()}")
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            answers = connection.makefile("rb")
            choice = random.Random(2)
            for turn in range(requests):
                first = choice.randrange(OBJECT // length) * length
                ask(server, connection, answers, first, length, 0 if alike else turn)
    if processes.exit_codes["pinrange"] != 0:
        raise stack.Broken(f"the server ended with {processes.exit_codes}: {(directory / 'pinrange.log').read_text()}")
    return self_costs(counted)


def ask(server, connection, answers, first, length, turn):
    """One pinned range, once the server is done with the one before."""
    while not all_sleep(server.process.pid):
        pass
    connection.sendall(
        f"GET {server.path} HTTP/1.1\r\nHost: instructions\r\nRange: bytes={first}-{first + length - 1}\r\n"
        f"X-Turn: {turn:06}\r\nIf-Match: {server.etag}\r\n\r\n".encode()
    )
    head = [answers.readline()]
    while head[-1].strip():
        head.append(answers.readline())
    if not head[0].startswith(b"HTTP/1.1 206") or not any(b"detail=disk" in line for line in head) or len(answers.read(length)) != length:
        raise stack.Broken(f"not a hit: {head}")


def all_sleep(pid):
    for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
        # A thread that ends meanwhile does nothing more.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if (task / "stat").read_text().rpartition(")")[2].split()[0] != "S":
                return False
    return True


def self_costs(path):
    """A callgrind profile's costs by function, without those of what it calls."""
    costs, names, function, is_call = collections.Counter(), {}, "", False
    for line in path.read_text().splitlines():
        if line.startswith(("fn=", "cfn=")):
            number, _, name = line.partition("=")[2].partition(" ")
            # The hash at a symbol's end changes with every compiler, what was cloned with every build.
            name = names.setdefault(number, re.sub(r"(::h[0-9a-f]{16}|\.llvm\.\d+|'\d+)+$", "", name))
            if line.startswith("fn="):
                function = name
        elif line.startswith("calls="):
            is_call = True
        elif line[:1] in "0123456789+-*" and line:
            if not is_call:
                costs[function] += int(line.split()[1])
            is_call = False
    return costs


def print_rise(before, now):
    rise = {function: now[function] - before.get(function, 0) for function in now | before}
    for function, more in sorted(rise.items(), key=lambda item: -abs(item[1]))[:20]:
        print(f"  {more:>+7}  {before.get(function, 0):>7} → {now[function]:>7}  {function}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except stack.Broken as error:
        sys.exit(f"instructions: {error}")

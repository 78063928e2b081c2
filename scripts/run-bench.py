"""pinrange against nginx, Varnish, Traffic Server and the bare origin, on loopback, in one repeatable run.

    scripts/bench.sh                         everything: installs, builds, measures, writes docs/PERFORMANCE.md
    python3 scripts/run-bench.py warm cold   some of it, of what is built and installed

Server and load are pinned to different cores; competitors take turns (A B A B, then B A B A) and the medians are reported, with
ratios: on a shared machine only these mean much. CPU is the server processes' user and system time, by the kernel's account.

    warm     random pinned ranges of a 1 GiB file in the page cache: sizes × connections; the whole of it on one connection
    pages    hot ranges while others read what is on disk but not in the page cache
    cold     a 1 GiB object that nobody holds, from an origin like S3: one stream, 16 ranges at once, the first byte, a second client
    shared   100 staggered clients on one cold object: what leaves the origin
    get      `pinrange get` against aria2c, curl and the AWS CLI, warm
    get-memory  its peak memory by the object's size: needs 20 GiB of disk

Results go to a JSON file, of which bench/report.py makes the page and its plots. What a run did not measure stays in the file as it was.
"""

import argparse
import http.client
import json
import os
import pathlib
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

from bench import download, machine, pages, servers, warm
from fleet import stack

KIB, MIB = 1 << 10, 1 << 20


def main():
    options = arguments()
    # Servers are ended and directories removed then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # This process is a load too, or does nothing.
    os.sched_setaffinity(0, servers.core_list(options.load_cores))
    description, failed = machine.describe(), False
    for name in options.bench or BENCHES:
        weather = machine.Weather()
        try:
            with tempfile.TemporaryDirectory(prefix="pinrange-bench-", dir=options.dir) as directory:
                # Servers that drop root's rights read below it.
                os.chmod(directory, 0o755)
                result = BENCHES[name](options, pathlib.Path(directory))
        except stack.Broken as error:
            print(f"bench: {name}: {error}", file=sys.stderr)
            failed = True
            continue
        section = {
            "machine": description | weather.report(),
            "options": {key: str(value) for key, value in vars(options).items() if key not in ("bench", "dir", "json", "origin")},
            "result": result,
        }
        print(f"{name}: {section['machine']['seconds']} s", flush=True)
        if options.json:
            keep(pathlib.Path(options.json), name, section)
    return 2 if failed else 0


def keep(file, name, section):
    """At once: what comes later may fail."""
    results = json.loads(file.read_text()) if file.exists() else {}
    results[name] = section
    file.write_text(json.dumps(results, separators=(",", ":")).replace('{"requests_per_second"', '\n{"requests_per_second"') + "\n")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", nargs="*", metavar="BENCH", help=f"of {', '.join(BENCHES)} [all]")
    parser.add_argument("--quick", action="store_true", help="a few cells, a second each: does it work?")
    parser.add_argument("--pinrange", default="target/release/pinrange", metavar="PROGRAM")
    parser.add_argument("--origin", default="target/release/examples/origin", metavar="PROGRAM")
    parser.add_argument("--rounds", type=int, help="of which the median counts [5]")
    parser.add_argument("--other-rounds", type=int, help="of the competitors that are far behind [3]")
    parser.add_argument("--seconds", type=int, default=1, help="of each run, longer where ranges are long and connections many [1]")
    parser.add_argument("--server-cores", metavar="CORES", help="of servers with one worker thread, as taskset takes them [0]")
    parser.add_argument("--load-cores", metavar="CORES", help="of their load [the upper half]")
    parser.add_argument("--pair-cores", metavar="CORES", help="of servers with two worker threads [0-1]")
    parser.add_argument("--pair-load-cores", metavar="CORES", help="of their load [the upper half; both, where there are but two]")
    parser.add_argument("--sizes", type=numbers)
    parser.add_argument("--connections", type=numbers)
    parser.add_argument("--competitors", type=lambda text: text.split(","), default=COMPETITORS, help=f"of {','.join(COMPETITORS)} [all]")
    parser.add_argument("--object", type=int, metavar="MIB", help="the object's size [1024]")
    parser.add_argument("--dir", help="where to work: needs six times the object's size")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    if unknown := set(options.bench) - set(BENCHES):
        parser.error(f"there is no {', '.join(unknown)}: choose from {', '.join(BENCHES)}")
    cores = os.cpu_count()
    if cores < 2:
        parser.error("server and load need a core each")
    upper = f"{cores // 2}-{cores - 1}"
    defaults = {
        "server_cores": "0",
        "load_cores": upper,
        "pair_cores": "0-1",
        "pair_load_cores": upper if cores > 2 else "0-1",
        "rounds": 2 if options.quick else 5,
        "other_rounds": 1 if options.quick else 3,
        "sizes": (4 * KIB, MIB) if options.quick else warm.SIZES,
        "connections": (16, 256) if options.quick else warm.CONNECTIONS,
        "object": 256 if options.quick else 1024,
    }
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.pair_cells = warm.PAIR_CELLS[:1] if options.quick else warm.PAIR_CELLS
    for name in ("pinrange", "origin"):
        setattr(options, name, str(pathlib.Path(getattr(options, name)).resolve(strict=True)))
    return options


def numbers(text):
    return [int(word) for word in text.split(",")]


class Timed:
    """Programs that run at once: wall time, and the CPU time of all of them."""

    def __init__(self, commands, cores, patience=300):
        begun = time.monotonic()
        children = [
            subprocess.Popen(servers.on(cores, *command), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for command in commands
        ]
        self.cpu = 0.0
        for child in children:
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            self.cpu += usage.ru_utime + usage.ru_stime
            if child.returncode:
                raise stack.Broken(f"{child.args} ended with {child.returncode}: {child.stderr.read().decode()[-500:]}")
            child.stderr.close()
        self.seconds = time.monotonic() - begun
        self.peak_rss = usage.ru_maxrss << 10


def curl(server, first=None, last=None, to="/dev/null"):
    command = ["curl", "--silent", "--show-error", "--fail", "-o", to]
    if server.etag:
        command += ["-H", f"If-Match: {server.etag}"]
    if first is not None:
        command += ["-r", f"{first}-{last}"]
    return [*command, f"http://127.0.0.1:{server.port}{server.path}"]


def first_byte(server, start, end):
    """Milliseconds from the request to the first byte of its body, on a connection that is there."""
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        pin = f"If-Match: {server.etag}\r\n" if server.etag else ""
        begun = time.monotonic()
        connection.sendall(
            f"GET {server.path} HTTP/1.1\r\nHost: bench\r\nRange: bytes={start}-{end - 1}\r\n{pin}\r\n".encode()
        )
        received = b""
        while b"\r\n\r\n" not in received or received.endswith(b"\r\n\r\n"):
            more = connection.recv(65536)
            if not more:
                raise stack.Broken(f"{server.name} closed: {received[:300]!r}")
            received += more
        took = (time.monotonic() - begun) * 1e3
        if not received.startswith(b"HTTP/1.1 206"):
            raise stack.Broken(f"{server.name} answered {received[:300]!r}")
        # Read to its end: a client that leaves is another matter.
        left = end - start - len(received.partition(b"\r\n\r\n")[2])
        while left > 0 and (more := connection.recv(1 << 20)):
            left -= len(more)
        return took


def purge(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.admin, timeout=60)
    connection.request("POST", "/purge", json.dumps({"path": "/bench/*"}))
    response = connection.getresponse()
    response.read()
    if response.status != 200:
        raise stack.Broken(f"purge: {response.status}")
    connection.close()


def percentile(values, share):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def cold_stack(options, processes, directory):
    root = servers.make_object(directory, options.object * MIB)
    origin = servers.Origin(processes, options.origin, root, options.load_cores)
    direct = servers.Direct(origin)
    ours = servers.pinrange(processes, options.pinrange, origin, directory / "cold", options.server_cores, threads=2)
    return origin, direct, ours


def bench_cold(options, directory):
    """The origin shares the load's cores; both sides of each ratio use it."""
    rows = []
    with stack.Processes(directory) as processes:
        origin, direct, ours = cold_stack(options, processes, directory)
        for delay, pace in ((0, 0), (30, 90_000_000), (100, 90_000_000)):
            origin.pace(delay, pace)
            streams = {"direct": [], "pinrange": [], "nginx-slice": [], "varnish": []}
            ranges = {"direct": [], "pinrange": []}
            share = ours.size // 16
            for number in range(max(1, options.rounds // 2)):
                for server in (direct, ours):
                    if server is ours:
                        purge(ours)
                    streams[server.name].append(Timed([curl(server)], options.load_cores).seconds)
                    if server is ours:
                        purge(ours)
                    sixteen = [curl(server, part * share, (part + 1) * share - 1) for part in range(16)]
                    ranges[server.name].append(Timed(sixteen, options.load_cores).seconds)
                for make in (
                    lambda inner: servers.nginx_slice(inner, origin, tempfile.mkdtemp(dir=directory), options.server_cores),
                    lambda inner: servers.varnish(inner, origin, options.server_cores, f"varnish-{time.monotonic_ns()}"),
                ):
                    if number == 0 and delay < 100:
                        with stack.Processes(pathlib.Path(tempfile.mkdtemp(dir=directory))) as inner:
                            os.chmod(inner.directory, 0o755)
                            server = make(inner)
                            streams[server.name.split("-1")[0].split("-2")[0]].append(Timed([curl(server)], options.load_cores).seconds)
            row = {
                "first_byte_ms": delay,
                "bytes_per_second_per_connection": pace,
                "one_stream_seconds": {name: statistics.median(took) for name, took in streams.items() if took},
                "sixteen_ranges_seconds": {name: statistics.median(took) for name, took in ranges.items()},
            }
            block = 256 * KIB
            firsts = {"direct": [], "pinrange": []}
            purge(ours)
            for number in range(100):
                # Every fourth block: nobody else's fill brings it.
                start = number * 4 * block
                for server in (direct, ours) if number % 2 else (ours, direct):
                    firsts[server.name].append(first_byte(server, start, start + block))
            row["first_byte_of_a_block_ms"] = {
                name: {"p50": percentile(times, 0.5), "p99": percentile(times, 0.99)} for name, times in firsts.items()
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def bench_shared(options, directory):
    """100 clients, each a little later than the one before it, each with another offset."""
    with stack.Processes(directory) as processes:
        origin, _, ours = cold_stack(options, processes, directory)
        origin.pace(30, 90_000_000)
        before = origin.ask()
        children = []
        for number in range(100):
            start = number * 1_000_003 % (ours.size // 2)
            children.append(
                subprocess.Popen(servers.on(options.load_cores, *curl(ours, start, start + ours.size // 2 - 1)))
            )
            time.sleep(0.02)
        if any(child.wait() for child in children):
            raise stack.Broken("a client failed")
        after = origin.ask()
        ends = [number * 1_000_003 % (ours.size // 2) for number in range(100)]
        unique = max(ends) + ours.size // 2 - min(ends)
        row = {"clients": 100, "origin_bytes": after["bytes"] - before["bytes"], "unique_bytes": unique,
               "ratio": (after["bytes"] - before["bytes"]) / unique, "unguarded_gets": after["unguarded_gets"] - before["unguarded_gets"],
               "peak_rss_mib": ours.rss() / MIB}
        print(json.dumps(row), flush=True)
        return row


COMPETITORS = ("pinrange", "nginx", "nginx-again", "nginx-slice", "varnish", "traffic-server")
BENCHES = {"warm": warm.warm, "pages": pages.pages, "cold": bench_cold, "shared": bench_shared, "get": download.download, "get-memory": download.memory}

if __name__ == "__main__":
    sys.exit(main())

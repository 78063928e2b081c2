"""pinrange against nginx, Varnish and the bare origin, on loopback, in one repeatable run.

    cargo build --release --example origin --bin pinrange && python3 scripts/run-bench.py warm cold

Server and load are pinned to different cores; competitors take turns (A B A B, then B A B A) and the medians are reported, with
ratios: on a shared machine only these mean much. CPU is the server processes' user and system time, from /proc.

    warm     random pinned ranges of a 1 GiB file in the page cache: sizes × connections
    cold     a 1 GiB object that nobody holds, from an origin like S3: one stream, 16 ranges at once, the first byte, a second client
    shared   100 staggered clients on one cold object: what leaves the origin
    pages    hot ranges while others read what is on disk but not in the page cache
    get      `pinrange get` against aria2c, curl and the AWS CLI, warm
    get-memory  its peak memory by the object's size: needs 10 GiB of disk
    scale    what it costs when there is more: sizes, revisions, connections, mounts (each of these by itself too)
"""

import argparse
import dataclasses
import http.client
import json
import os
import pathlib
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

from bench import download, load, scale, servers
from fleet import stack

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
SIZES = (4 * KIB, 64 * KIB, MIB, 16 * MIB)
CONNECTIONS = (1, 16, 256, 1000)


def main():
    options = arguments()
    report = {"machine": machine(), "options": {key: str(value) for key, value in vars(options).items()}}
    with tempfile.TemporaryDirectory(prefix="pinrange-bench-", dir=options.dir) as directory:
        directory = pathlib.Path(directory)
        # Servers that drop root's rights read below it.
        directory.chmod(0o755)
        try:
            for bench in options.bench:
                report[bench] = BENCHES[bench](options, directory)
        except stack.Broken as error:
            print(f"bench: {error}", file=sys.stderr)
            return 2
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    return 0


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", nargs="+", choices=BENCHES)
    parser.add_argument("--pinrange", default="target/release/pinrange", metavar="PROGRAM")
    parser.add_argument("--origin", default="target/release/examples/origin", metavar="PROGRAM")
    parser.add_argument("--rounds", type=int, default=5, help="of which the median counts [5]")
    parser.add_argument("--seconds", type=int, default=3, help="of each run [3]")
    parser.add_argument("--server-cores", default="0", help="as taskset takes them [0]")
    parser.add_argument("--load-cores", default="1", help="[1]")
    parser.add_argument("--sizes", type=lambda text: [int(word) for word in text.split(",")], default=SIZES)
    parser.add_argument("--connections", type=lambda text: [int(word) for word in text.split(",")], default=CONNECTIONS)
    parser.add_argument("--competitors", default="pinrange,nginx", help="of pinrange, nginx, nginx-slice, varnish [pinrange,nginx]")
    parser.add_argument("--object", type=int, default=1024, metavar="MIB", help="the object's size [1024]")
    parser.add_argument("--dir", help="where to work: needs three times the object's size")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    for name in ("pinrange", "origin"):
        setattr(options, name, str(pathlib.Path(getattr(options, name)).resolve(strict=True)))
    return options


def machine():
    model = next((line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "")
    versions = {}
    for name, command in (("nginx", ["nginx", "-v"]), ("varnish", ["varnishd", "-V"]), ("wrk", ["wrk", "-v"])):
        try:
            ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin"})
            versions[name] = (ran.stdout + ran.stderr).splitlines()[0]
        except (OSError, IndexError):
            versions[name] = None
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "load_before": os.getloadavg()[0],
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
    }


def make_object(directory, size):
    root = directory / "objects"
    if not root.exists():
        root.mkdir(mode=0o755)
        piece = os.urandom(MIB)
        with open(root / servers.OBJECT, "wb") as file:
            for number in range(size // MIB):
                file.write(number.to_bytes(8, "little") + piece[8:])
    return root


def warm_servers(options, processes, directory, threads=1):
    """The competitors, each with the whole object in its cache and in the page cache; checked for right bytes first."""
    root = make_object(directory, options.object * MIB)
    # It has nothing to do once everybody is warm.
    origin = servers.Origin(processes, options.origin, root, options.load_cores)
    makers = {
        "pinrange": lambda: servers.pinrange(
            processes, options.pinrange, origin, directory / "cache", options.server_cores, threads
        ),
        "nginx": lambda: servers.nginx_static(processes, root, options.server_cores, threads),
        "nginx-slice": lambda: servers.nginx_slice(processes, origin, directory / "slices", options.server_cores, threads),
        "varnish": lambda: servers.varnish(processes, origin, options.server_cores),
    }
    competitors = [makers[name]() for name in options.competitors.split(",")]
    expected = (root / servers.OBJECT).read_bytes()
    for server in competitors:
        for start in range(0, server.size, 64 * MIB):
            status, body = server.read(start, min(start + 64 * MIB, server.size))
            if status != 206 or body != expected[start : start + 64 * MIB]:
                raise stack.Broken(f"{server.name} gave {status} and {len(body)} bytes for 64 MiB at {start}")
    return competitors


def bench_warm(options, directory):
    rows = []
    with stack.Processes(directory) as processes:
        competitors = warm_servers(options, processes, directory)
        first = competitors[0].name
        print(f"{'size':>9} {'conns':>5} {'server':<12} {'req/s':>9} {'MB/s':>7} {'p50 µs':>7} {'p99 µs':>8} {'p99.9':>8}"
              f" {'µs CPU/req':>10} {'CPU s/GB':>8} {'RSS MiB':>7}   {first} ÷ it: req/s, p99, CPU")
        for size in options.sizes:
            for connections in options.connections:
                figures = load.interleaved(
                    options.rounds,
                    competitors,
                    lambda server, number: load.wrk(
                        directory, server, size, connections, options.seconds, options.load_cores, seed=number + 1
                    ),
                )
                ours = figures[first]
                for name, it in figures.items():
                    ratios = (
                        ours.requests_per_second / it.requests_per_second,
                        ours.p99_us / max(it.p99_us, 1),
                        ours.cpu_us_per_request / it.cpu_us_per_request,
                    )
                    print(
                        f"{size:>9} {connections:>5} {name:<12} {it.requests_per_second:>9.0f} {it.bytes_per_second / 1e6:>7.0f}"
                        f" {it.p50_us:>7.0f} {it.p99_us:>8.0f} {it.p999_us:>8.0f} {it.cpu_us_per_request:>10.2f}"
                        f" {it.cpu_seconds_per_gb:>8.3f} {it.rss_mib:>7.1f}   "
                        + ("" if name == first else " ".join(f"{ratio:.2f}" for ratio in ratios)),
                        flush=True,
                    )
                    rows.append({"size": size, "connections": connections, "server": name, **dataclasses.asdict(it)})
    return rows


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
    root = make_object(directory, options.object * MIB)
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


def bench_pages(options, directory):
    """p99 of 64 KiB ranges of a hot stretch, quiet and while cold files are read."""
    rows = []
    with stack.Processes(directory) as processes:
        names, options.competitors = options.competitors, "pinrange,nginx"
        competitors = warm_servers(options, processes, directory)
        options.competitors = names
        for server in competitors:
            files = sorted((directory / "cache").rglob("*.seg")) if server.name == "pinrange" else [directory / "objects" / servers.OBJECT]
            quiet, beside = [], []
            for number in range(options.rounds):
                quiet.append(load.wrk(directory, server, 64 * KIB, 16, options.seconds, options.load_cores, seed=number, span=64 * MIB))
                stop = threading.Event()
                readers = [threading.Thread(target=read_cold, args=(server, files, stop, n)) for n in range(4)]
                for reader in readers:
                    reader.start()
                beside.append(load.wrk(directory, server, 64 * KIB, 16, options.seconds, options.load_cores, seed=number, span=64 * MIB))
                stop.set()
                for reader in readers:
                    reader.join()
            row = {
                "server": server.name,
                "quiet_p99_us": statistics.median(run.p99_us for run in quiet),
                "beside_p99_us": statistics.median(run.p99_us for run in beside),
            }
            row["ratio"] = row["beside_p99_us"] / row["quiet_p99_us"]
            print(json.dumps(row), flush=True)
            rows.append(row)
    return rows


def read_cold(server, files, stop, number):
    """Reads ranges beyond the hot stretch, having dropped their pages."""
    dice = random.Random(number)
    while not stop.is_set():
        for file in files:
            with open(file, "rb") as handle:
                begin = 64 * MIB if len(files) == 1 else 0
                os.posix_fadvise(handle.fileno(), begin, 0, os.POSIX_FADV_DONTNEED)
        start = dice.randrange(64 * MIB, server.size - 4 * MIB)
        server.read(start, start + 4 * MIB)


BENCHES = {"warm": bench_warm, "cold": bench_cold, "shared": bench_shared, "pages": bench_pages, "get": download.download, "get-memory": download.memory}
BENCHES |= {run.__name__: run for run in (scale.scale, scale.sizes, scale.revisions, scale.connections, scale.mounts)}

if __name__ == "__main__":
    sys.exit(main())

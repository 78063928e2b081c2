"""What is in the page cache: random pinned ranges of one object, by size and connections, and the whole object on one connection.

All servers run at once and take turns; those that are idle cost nothing. Each has answered every byte of the object right before it is measured.
"""

import contextlib
import dataclasses
import math
import socket
import statistics
import subprocess
import time

from bench import load, servers
from bench.goals import CALLS
from fleet import stack

KIB, MIB = 1 << 10, 1 << 20
SIZES = (4 * KIB, 64 * KIB, MIB, 16 * MIB)
CONNECTIONS = (1, 16, 256, 1000)
#: With two worker threads: the smallest size by connections, and the others where there are many.
PAIR_CELLS = ((4 * KIB, 16), (4 * KIB, 256), (4 * KIB, 1000), (64 * KIB, 256), (MIB, 256))
#: With heads that differ in more than the range, which pinrange reads one by one.
UNLIKE_CELLS = ((4 * KIB, 16), (4 * KIB, 256), (64 * KIB, 256))
#: With so few connections p99 is the length of what takes the core away for 1 % of a run, so it takes many runs to compare.
FEW = 16
#: These have the best figures, so they are measured most often.
LEADERS = ("pinrange", "nginx")


def competitors(options, processes, directory, origin, names, cores, threads=1):
    """Started, filled by a whole GET, and checked. Also what filling them took."""
    root = servers.make_object(directory, options.object * MIB)
    makers = {
        "pinrange": lambda: servers.pinrange(processes, options.pinrange, origin, directory / "cache", cores, threads),
        "nginx": lambda: servers.nginx_static(processes, root, cores, threads),
        # The same once more: what its ratio to the first differs from 1 by is noise.
        "nginx-again": lambda: servers.nginx_static(processes, root, cores, threads, name="nginx-again"),
        "nginx-slice": lambda: servers.nginx_slice(processes, origin, directory / "slices", cores, threads),
        "varnish": lambda: servers.varnish(processes, origin, cores),
        "traffic-server": lambda: servers.traffic_server(processes, origin, directory / "traffic", cores, threads),
        **{name: lambda name=name: servers.calls(processes, options.calls, root, cores, name) for name in CALLS},
    }
    if unknown := set(names) - set(makers):
        raise stack.Broken(f"there is no {', '.join(unknown)}: choose from {', '.join(makers)}")
    made, filled = [], []
    for name in names:
        # From its start on: a server may fetch more than it was asked for, and sooner.
        before, begun = origin.ask(), time.monotonic()
        server = makers[name]()
        ready = time.monotonic()
        curl(options, server)
        after = origin.ask()
        made.append(server)
        filled.append(
            {
                "server": name,
                "ready_seconds": ready - begun,
                "seconds": time.monotonic() - ready,
                "cpu_seconds": server.cpu(),
                "s3_requests": after["requests"] - before["requests"],
                "s3_bytes": after["bytes"] - before["bytes"],
            }
        )
    expected = (root / servers.OBJECT).read_bytes()
    for server in made:
        for start in range(0, server.size, 64 * MIB):
            status, body = server.read(start, min(start + 64 * MIB, server.size))
            if status != 206 or body != expected[start : start + 64 * MIB]:
                raise stack.Broken(f"{server.name} gave {status} and {len(body)} bytes for 64 MiB at {start}")
    return made, filled


def warm(options, directory):
    cells, unlike = [], []
    with stack.Processes(directory) as processes:
        root = servers.make_object(directory, options.object * MIB)
        # It has nothing to do once everybody is full, and that is counted.
        origin = servers.Origin(processes, options.origin, root, options.load_cores)
        made, filled = competitors(options, processes, directory, origin, options.competitors, options.server_cores)
        print(HEADING)
        for size in options.sizes:
            for connections in options.connections:
                cells.append(cell(options, directory, origin, made, size, connections, 1, options.load_cores))
        leaders = [server for server in made if server.name in LEADERS]
        if "pinrange" in options.competitors:
            for size, connections in options.unlike_cells:
                unlike.append(cell(options, directory, origin, leaders, size, connections, 1, options.load_cores, alike=False))
        whole = whole_object(options, [server for server in made if server.name not in CALLS])
    if options.pair_cells and "pinrange" in options.competitors:
        # On the directories that the first ones filled.
        second = directory / "pair"
        second.mkdir(mode=0o755)
        with stack.Processes(second) as processes:
            origin = servers.Origin(processes, options.origin, root, options.pair_load_cores)
            names = [name for name in options.competitors if name in LEADERS]
            made, _ = competitors(options, processes, directory, origin, names, options.pair_cores, threads=2)
            for size, connections in options.pair_cells:
                cells.append(cell(options, directory, origin, made, size, connections, 2, options.pair_load_cores))
    return {"filling": filled, "cells": cells, "unlike": unlike, "whole": whole}


def cell(options, directory, origin, made, size, connections, threads, cores, alike=True):
    """One size and one number of connections: all runs of all servers."""
    # Long enough for every connection to end a range or two, however many there are.
    seconds = max(options.seconds, min(5, math.ceil(size * connections / 4e9)))

    def rounds(server):
        often = options.rounds if server.name in LEADERS else options.other_rounds
        if server.name in LEADERS and connections <= FEW:
            often *= 3
        return min(often, 3) if seconds > 2 * options.seconds else often

    def run(server, number):
        before = origin.ask()
        figures = patient(
            seconds,
            lambda longer: load.wrk(
                *(directory, server, size, connections, longer, cores),
                seed=number + 1,
                threads=len(servers.core_list(cores)),
                alike=alike,
            ),
        )
        return figures, origin.ask()["requests"] - before["requests"]

    ran = load.interleaved(rounds, made, run)
    runs = {name: [figures for figures, _ in of_one] for name, of_one in ran.items()}
    for name, of_one in runs.items():
        show(size, connections, threads, name, load.medians(of_one), runs.get("nginx"), of_one)
    return {
        "size": size,
        "connections": connections,
        "threads": threads,
        "alike": alike,
        "seconds": seconds,
        "s3_requests": {name: sum(requests for _, requests in of_one) for name, of_one in ran.items()},
        "servers": {name: [rounded(figures) for figures in of_one] for name, of_one in runs.items()},
    }


def patient(seconds, run):
    """Some servers take longer to answer one of a thousand long ranges whole."""
    while True:
        try:
            return run(seconds)
        except load.NothingEnded:
            if seconds >= 20:
                raise
            seconds *= 2


HEADING = (
    f"{'size':>9} {'conns':>5} {'thr':>3} {'server':<14} {'req/s':>9} {'MB/s':>7} {'p50 µs':>7} {'p99 µs':>8} {'p99.9':>8}"
    f" {'µs CPU/req':>10} {'CPU s/GB':>8} {'RSS MiB':>7} {'others':>6}   ÷ nginx: req/s, p99, CPU"
)


def show(size, connections, threads, name, it, reference, runs):
    ratios = ""
    if reference and reference is not runs:
        values = [
            statistics.median(getattr(mine, field) / max(getattr(theirs, field), 1e-9) for mine, theirs in zip(runs, reference))
            for field in ("requests_per_second", "p99_us", "cpu_us_per_request")
        ]
        ratios = " ".join(f"{value:.2f}" for value in values)
    print(
        f"{size:>9} {connections:>5} {threads:>3} {name:<14} {it.requests_per_second:>9.0f} {it.bytes_per_second / 1e6:>7.0f}"
        f" {it.p50_us:>7.0f} {it.p99_us:>8.0f} {it.p999_us:>8.0f} {it.cpu_us_per_request:>10.2f}"
        f" {it.cpu_seconds_per_gb:>8.3f} {it.rss_mib:>7.1f} {it.other_cores:>6.2f}   {ratios}",
        flush=True,
    )


def rounded(figures):
    return {name: float(f"{value:.4g}") for name, value in dataclasses.asdict(figures).items()}


def whole_object(options, made):
    """One connection, one response: by curl, and by a reader that throws away what arrives without copying it, which the server cannot outrun."""
    clients = {"curl": lambda server: curl(options, server), "discarding": discard}
    results = []
    for client, read in clients.items():

        def run(server, _, read=read):
            cpu, begun = server.cpu(), time.monotonic()
            read(server)
            seconds = time.monotonic() - begun
            return {
                "bytes_per_second": server.size / seconds,
                "cpu_seconds_per_gb": (server.cpu() - cpu) / server.size * 1e9,
            }

        runs = load.interleaved(lambda server: options.rounds if server.name in LEADERS else options.other_rounds, made, run)
        for name, of_one in runs.items():
            median = {key: statistics.median(one[key] for one in of_one) for key in of_one[0]}
            print(f"whole object, {client}: {name:<14} {median['bytes_per_second'] / 1e6:>6.0f} MB/s"
                  f" {median['cpu_seconds_per_gb']:.3f} CPU s/GB", flush=True)
        results.append({"client": client, "servers": runs})
    return results


def curl(options, server):
    command = ["curl", "--silent", "--show-error", "--fail", "-o", "/dev/null", "-H", f"If-Match: {server.etag}"]
    command.append(f"http://127.0.0.1:{server.port}{server.path}")
    ran = subprocess.run(servers.on(options.load_cores, *command), capture_output=True, text=True)
    if ran.returncode:
        raise stack.Broken(f"curl ended with {ran.returncode} at {server.name}: {ran.stderr}")


def discard(server):
    with contextlib.closing(socket.create_connection(("127.0.0.1", server.port))) as connection:
        request = f"GET {server.path} HTTP/1.1\r\nHost: bench\r\nIf-Match: {server.etag}\r\n\r\n"
        connection.sendall(request.encode())
        head = b""
        while b"\r\n\r\n" not in head:
            more = connection.recv(512)
            if not more:
                raise stack.Broken(f"{server.name} closed: {head!r}")
            head += more
        left = server.size - len(head.partition(b"\r\n\r\n")[2])
        if not head.startswith(b"HTTP/1.1 200"):
            raise stack.Broken(f"{server.name} answered {head!r}")
        nothing = bytearray(4 * MIB)
        while left:
            # With MSG_TRUNC, TCP drops the bytes instead of copying them: tcp(7).
            took = connection.recv_into(nothing, min(left, len(nothing)), socket.MSG_TRUNC)
            if not took:
                raise stack.Broken(f"{server.name} ended {left} bytes early")
            left -= took

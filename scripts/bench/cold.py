"""What nobody holds yet: `cold` and `shared` of run-bench.py.

The origin shares the load's cores; both sides of each ratio use it. Before each run the replica forgets everything (`POST /purge`).
"""

import contextlib
import http.client
import json
import pathlib
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time

from bench import lateness, servers
from bench.discard import drop
from fleet import stack

KIB, MIB = 1 << 10, 1 << 20
BLOCK, PART = 256 * KIB, 16 * MIB
#: Milliseconds to the first byte, and bytes per second of a connection (0: as fast as it goes).
ORIGINS = ((0, 0), (30, 0), (30, 90_000_000), (100, 90_000_000))


def curl(server, to="/dev/null"):
    command = ["curl", "--silent", "--show-error", "--fail", "-o", to, "-H", f"If-Match: {server.etag}"]
    return [*command, f"http://127.0.0.1:{server.port}{server.path}"]


def discard(server, stretches):
    program = pathlib.Path(__file__).with_name("discard.py")
    numbers = [str(number) for start, end in stretches for number in (start, end - 1)]
    return [sys.executable, program, str(server.port), server.path, server.etag, *numbers]


def timed(command, server, size, cores):
    """Bytes per second of a program, and the server's CPU seconds per GB."""
    cpu, begun = server.cpu(), time.monotonic()
    ran = subprocess.run(servers.on(cores, *command), capture_output=True, text=True, timeout=300)
    took = time.monotonic() - begun
    if ran.returncode:
        raise stack.Broken(f"{command} ended with {ran.returncode}: {ran.stderr[-500:]}")
    with contextlib.suppress(ValueError):
        took = float(ran.stdout)
    return size / took, (server.cpu() - cpu) / size * 1e9


def purge(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.admin, timeout=60)
    with contextlib.closing(connection):
        connection.request("POST", "/purge", json.dumps({"path": "/bench/*"}))
        response = connection.getresponse()
        response.read()
    if response.status != 200:
        raise stack.Broken(f"purge: {response.status}")


def forget(all_servers):
    for server in all_servers:
        if hasattr(server, "admin"):
            purge(server)


def percentile(values, share):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def spread(values):
    return {"p50": percentile(values, 0.5), "p99": percentile(values, 0.99), "max": max(values), "count": len(values)}


class Connection:
    """Asks for one range after the other."""

    def __init__(self, server):
        self.server = server
        self.connection = socket.create_connection(("127.0.0.1", server.port))
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def first_byte(self, start, end):
        """Milliseconds from the request to the first byte of its body. Reads to the end: a client that leaves is another matter."""
        server = self.server
        request = (
            f"GET {server.path} HTTP/1.1\r\nHost: bench\r\nRange: bytes={start}-{end - 1}\r\nIf-Match: {server.etag}\r\n\r\n"
        ).encode()
        begun = time.monotonic()
        self.connection.sendall(request)
        received = b""
        while b"\r\n\r\n" not in received or received.endswith(b"\r\n\r\n"):
            more = self.connection.recv(65536)
            if not more:
                raise stack.Broken(f"{server.name} closed: {received[:300]!r}")
            received += more
        took = (time.monotonic() - begun) * 1e3
        if not received.startswith(b"HTTP/1.1 206"):
            raise stack.Broken(f"{server.name} answered {received[:300]!r}")
        if drop(self.connection, end - start - len(received.partition(b"\r\n\r\n")[2])):
            raise stack.Broken(f"{server.name} closed before the end of a body")
        return took


def first_bytes(all_servers, count):
    """Of blocks, in turns. Every fourth one, so that nobody else's fill brings it.

    The origin's timers tick once a millisecond: who begins when the one before has just been answered would begin in step with them, and
    which of two is then a tick later has nothing to do with either. So each begins at a moment of its own.
    """
    dice = random.Random(2)
    connections = {server.name: Connection(server) for server in all_servers}
    took = {name: [] for name in connections}
    forget(all_servers)
    for number in range(count):
        start = number * 4 * BLOCK
        for name in took if number % 2 else reversed(took):
            time.sleep(dice.uniform(0, 0.003))
            took[name].append(connections[name].first_byte(start, start + BLOCK))
    for connection in connections.values():
        connection.connection.close()
    return took


def over_read(origin, ours, count):
    """Small ranges anywhere: bytes that left the origin beside what was asked for, in blocks, per range."""
    purge(ours)
    dice = random.Random(1)
    connection = Connection(ours)
    before, most = origin.ask(), 0
    for number in range(count):
        # One in each stretch of eight blocks.
        start = number * 8 * BLOCK + dice.randrange(4 * BLOCK)
        length = dice.randrange(1, 2 * BLOCK)
        connection.first_byte(start, start + length)
        after = origin.ask()
        most = max(most, (after["bytes"] - before["bytes"] - length) / BLOCK)
        before = after
    connection.connection.close()
    return most


def stacked(options, processes, directory, root):
    origin = servers.Origin(processes, options.origin, root, options.load_cores)
    ours = servers.pinrange(processes, options.pinrange, origin, directory / "cold", options.server_cores, threads=2)
    return origin, servers.Direct(origin), ours


def relays(options, processes, origin, directory):
    """What any server would cost: bounds for ours on this machine."""
    return [servers.relay(processes, options.relay, origin, directory / "relay", options.server_cores, keeps) for keeps in (True, False)]


def others(options, origin, directory):
    """One stream through those that begin empty."""
    for make in (
        lambda processes, cache: servers.nginx_slice(processes, origin, cache, options.server_cores),
        lambda processes, _: servers.varnish(processes, origin, options.server_cores),
        lambda processes, cache: servers.traffic_server(processes, origin, cache, options.server_cores),
    ):
        # Its workers run as another user than root.
        inner = pathlib.Path(tempfile.mkdtemp(dir=directory))
        inner.chmod(0o755)
        with stack.Processes(inner) as processes:
            server = make(processes, inner / "cache")
            yield server.name, timed(curl(server), server, server.size, options.load_cores)


def cold(options, directory, root):
    rows = []
    with stack.Processes(directory) as processes:
        origin, direct, ours = stacked(options, processes, directory, root)
        bounds = relays(options, processes, origin, directory)
        share = ours.size // 16
        sixteen = [(number * share, (number + 1) * share) for number in range(16)]
        # A capped stream takes its time, whatever is left of it.
        sample = direct.size // 4
        for delay, pace in ORIGINS:
            origin.pace(delay, pace)
            everybody = [direct, ours, *bounds]
            stream, ranges = {"direct": [], "pinrange": []}, {server.name: [] for server in everybody}
            for number in range(options.rounds):
                for server in everybody if number % 2 == 0 else reversed(everybody):
                    if server is ours:
                        purge(ours)
                        stream["pinrange"].append(timed(curl(ours), ours, ours.size, options.load_cores))
                        purge(ours)
                    elif server is direct and (number == 0 or not pace):
                        size = sample if pace else direct.size
                        stream["direct"].append(timed(discard(direct, [(0, size)]), direct, size, options.load_cores))
                    ranges[server.name].append(timed(discard(server, sixteen), server, server.size, options.load_cores))
            if not pace or delay == 30:
                for name, run in others(options, origin, directory):
                    stream[name] = [run]
            row = {
                "first_byte_ms": delay,
                "bytes_per_second_per_connection": pace,
                "one_stream": {name: figures(runs) for name, runs in stream.items()},
                "sixteen_ranges": {name: figures(runs) for name, runs in ranges.items()},
                "first_byte_of_a_block_ms": {
                    name: spread(times) for name, times in first_bytes([direct, ours, bounds[0]], min(200, ours.size // (4 * BLOCK))).items()
                },
                "over_read_blocks": over_read(origin, ours, 50),
            }
            for what in ("one_stream", "sixteen_ranges"):
                row[f"{what}_ratio"] = row[what]["pinrange"]["bytes_per_second"] / row[what]["direct"]["bytes_per_second"]
            times = row["first_byte_of_a_block_ms"]
            row["first_byte_above_direct_ms"] = times["pinrange"]["p50"] - times["direct"]["p50"]
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def figures(runs):
    return {
        "bytes_per_second": statistics.median(speed for speed, _ in runs),
        "cpu_seconds_per_gb": statistics.median(cpu for _, cpu in runs),
    }


def shared(options, directory, root):
    row = {}
    with stack.Processes(directory) as processes:
        origin, _, ours = stacked(options, processes, directory, root)
        row |= staggered(options, origin, ours)
    with stack.Processes(directory) as processes:
        def start(source):
            return servers.pinrange(processes, options.pinrange, source, directory / "late", options.server_cores, threads=2)

        first, second, between = lateness.measure(start, 20, PART, 90_000_000)
        row["first_client_behind_source_ms"] = spread(first)
        row["second_client_behind_source_ms"] = spread(second)
        row["second_client_behind_first_ms"] = spread(between)
    print(json.dumps(row), flush=True)
    return row


def staggered(options, origin, ours, clients=100):
    """Each begins a little later than the one before it, each at another offset, and reads half the object."""
    origin.pace(30, 90_000_000)
    before = origin.ask()
    half, children, ends = ours.size // 2, [], []
    for number in range(clients):
        start = number * 1_000_003 % half
        ends += [start, start + half]
        children.append(subprocess.Popen(servers.on(options.load_cores, *discard(ours, [(start, start + half)])), stdout=subprocess.DEVNULL))
        time.sleep(0.02)
    if any([child.wait() for child in children]):
        raise stack.Broken("a client failed")
    after = origin.ask()
    # The blocks at both ends come whole.
    unique = min(-(-max(ends) // BLOCK) * BLOCK, ours.size) - min(ends) // BLOCK * BLOCK
    read = after["bytes"] - before["bytes"]
    return {
        "clients": clients,
        "origin_bytes": read,
        "unique_bytes": unique,
        "ratio": read / unique,
        "unguarded_gets": after["unguarded_gets"] - before["unguarded_gets"],
        "rss_mib": ours.rss() / MIB,
    }

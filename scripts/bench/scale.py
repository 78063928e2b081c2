"""What a request, a start and the memory cost when there is more of everything: bytes, revisions, connections, mounts.

The replica itself makes a catalog with one revision in it; `Holding` multiplies that one, whatever columns its rows have, and links its
segment file under as many names, so that neither a million files nor a tebibyte cost space.
"""

import contextlib
import dataclasses
import http.client
import json
import os
import pathlib
import random
import re
import socket
import sqlite3
import statistics
import subprocess
import time

from bench import load, servers
from fleet import stack

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
SEGMENT, BLOCK = 64 * MIB, 256 * KIB
# ext4 allows 65,000 links to a file.
LINKS = 50_000
BODY = random.Random(1).randbytes(4096)
# A start that takes longer breaks P11.
READY = 1.0
TOUCHES = 1_000


class Replica(servers.Server):
    """A replica on a cache directory of its own, which outlives it."""

    def __init__(self, processes, options, directory, origin, mounts=("/bench",), name="replica", threads=1):
        self.name, self.directory, self.processes = name, directory, processes
        self.path, self.etag, self.size = f"{mounts[-1]}/{servers.OBJECT}", None, len(BODY)
        directory.mkdir(exist_ok=True)
        config = directory / "pinrange.toml"
        config.write_text(
            f"""\
[server]
listen = "127.0.0.1:0"
admin = "127.0.0.1:0"
drain_grace = "0s"
worker_threads = {threads}
max_connections = 8192
[cache]
dir = "{directory}/cache"
capacity = "4TiB"
min_free = "1MiB"
scrub_rate = "0"
"""
            + "".join(
                f"""\
[[mount]]
path = "{path}"
bucket = "bench"
prefix = "{"" if path == "/bench" else path[1:] + "/"}"
endpoint = "{origin.endpoint}"
region = "us-east-1"
path_style = true
fresh_for = "1h"
"""
                for path in mounts
            )
        )
        env = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "PINRANGE_"))}
        env |= {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_EC2_METADATA_DISABLED": "true", "PINRANGE_LOG": "warn"}
        log = processes.enter_context(open(directory / "log", "ab"))
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            servers.on(options.server_cores, options.pinrange, "serve", "--config", config), env=env, stdout=subprocess.PIPE, stderr=log, text=True
        )
        processes.callback(self.kill)
        addresses = re.findall(r"http://127.0.0.1:(\d+)", self.process.stdout.readline())
        self.ready = time.monotonic() - self.began
        if len(addresses) < 2:
            raise stack.Broken(f"the replica did not start: {(directory / 'log').read_text()[-2000:]}")
        self.port, self.admin = map(int, addresses[:2])

    def get(self, path, headers=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", path, headers=headers or {})
            answer = connection.getresponse()
            return answer, answer.read()

    def metric(self, name):
        connection = http.client.HTTPConnection("127.0.0.1", self.admin, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics")
            found = re.search(rf"^{name} (\d+)", connection.getresponse().read().decode(), re.MULTILINE)
        return int(found[1]) if found else None

    def resident(self):
        """Now, and at most since `forget_peak`: MiB, the program's own pages included."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return {name: int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) / KIB for name, field in (("rss_mib", "VmRSS"), ("peak_rss_mib", "VmHWM"))}

    def forget_peak(self):
        pathlib.Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def swept(self):
        while self.metric("pinrange_disk_sweeping") == 1:
            time.sleep(0.02)

    def stop(self):
        began = time.monotonic()
        self.process.terminate()
        code = self.process.wait()
        if code != 0:
            raise stack.Broken(f"the replica ended with {code}: {(self.directory / 'log').read_text()[-2000:]}")
        return time.monotonic() - began

    def kill(self):
        self.process.kill()
        self.process.wait()


class Holding:
    """A cache directory with many revisions, or long ones."""

    def __init__(self, processes, options, directory, origin):
        """With one revision in it, of `BODY`."""
        self.directory = directory
        replica = Replica(processes, options, directory, origin)
        answer, body = replica.get(replica.path)
        if body != BODY:
            raise stack.Broken(f"the seed was not served: {answer.status}")
        self.etag = answer.headers["ETag"]
        replica.stop()
        self.database = sqlite3.connect(directory / "cache/catalog.sqlite", isolation_level=None)
        self.database.row_factory = sqlite3.Row
        self.seed = {}
        for table in ("revisions", "segments", "checksums"):
            (row,) = self.database.execute(f"SELECT * FROM {table}")
            self.seed[table] = dict(row)
        self.names = random.Random(2)
        self.links = {}
        self.revisions = self.places = 0

    def add(self, revisions):
        """Of each the key and the size: all of it is held."""
        rows = {"revisions": [], "segments": [], "checksums": []}
        for key, size in revisions:
            self.revisions += 1
            id = self.seed["revisions"]["id"] + self.revisions
            rows["revisions"].append(self.seed["revisions"] | {"id": id, "key": key, "size": size})
            for index in range(-(-size // SEGMENT)):
                length = min(SEGMENT, size - index * SEGMENT)
                blocks = -(-length // BLOCK)
                # No seal: as an earlier version wrote it.
                row = {"revision": id, "idx": index, "incarnation": self.link(length), "bytes": length, "seal": None}
                row |= {"bits": ((1 << blocks) - 1).to_bytes(-(-blocks // 64) * 8, "little"), "place": 1_000 + self.places}
                self.places += 1
                rows["segments"].append(self.seed["segments"] | row)
                rows["checksums"].append(self.seed["checksums"] | {"incarnation": row["incarnation"]})
        self.database.execute("BEGIN")
        for table, added in rows.items():
            columns = list(added[0])
            marks = ", ".join(f":{column}" for column in columns)
            self.database.executemany(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})", added)
        self.database.execute("COMMIT")

    def link(self, length):
        """A segment file that begins with `BODY`; its name looks as if an earlier run had made it."""
        incarnation = self.names.randbytes(8) + self.seed["segments"]["incarnation"][8:]
        path = self.segment(incarnation)
        source, count = self.links.get(length, (None, 0))
        if count % LINKS == 0:
            path.write_bytes(BODY[:length])
            os.truncate(path, length)
            source = path
        else:
            os.link(source, path)
        self.links[length] = (source, count + 1)
        return incarnation

    def segment(self, incarnation):
        return self.directory / f"cache/segments/{incarnation[0]:02x}/{incarnation.hex()}.seg"

    def done(self):
        self.database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self.database.close()


def objects(directory, keys=(servers.OBJECT,)):
    """The origin's directory: small objects, and a tebibyte of nothing."""
    root = directory / "scale-objects"
    for key in keys:
        path = root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(BODY)
    with open(root / "tebibyte", "wb") as file:
        file.truncate(TIB)
    return root


def load_on(options, directory, server, length, connections, rounds=None):
    """Medians of runs of random pinned ranges."""
    runs = [
        load.wrk(directory, server, length, connections, options.seconds, options.load_cores, seed=number + 1)
        for number in range(rounds or options.rounds // 2 + 1)
    ]
    return dataclasses.asdict(load.medians(runs))


def note(rows, row):
    print(json.dumps({name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()}), flush=True)
    rows.append(row)


def sizes(options, directory, steps=(MIB, 64 * MIB, GIB, 64 * GIB, TIB)):
    """4 KiB ranges anywhere in one object; the first request finds nothing of it in memory."""
    rows = []
    with stack.Processes(directory) as processes:
        origin = servers.Origin(processes, options.origin, objects(directory), options.load_cores)
        for size in steps:
            holding = Holding(processes, options, directory / f"size-{size}", origin)
            holding.add([("big", size)])
            holding.done()
            server = Replica(processes, options, holding.directory, origin)
            server.path, server.etag, server.size = "/bench/big", holding.etag, size
            server.swept()
            began = time.monotonic()
            status, body = server.read(0, len(BODY))
            first = time.monotonic() - began
            if status != 206 or body != BODY:
                raise stack.Broken(f"{size} bytes: {status}")
            row = {"size": size, "ready_ms": server.ready * 1e3, "first_touch_ms": first * 1e3, **server.resident()}
            row |= {f"opening_{name}": value for name, value in load_on(options, directory, server, 4 * KIB, 16, rounds=1).items()}
            # From here on as many of its files are open as may be.
            row |= load_on(options, directory, server, 4 * KIB, 16)
            note(rows, row | {"open_files": server.metric("pinrange_disk_open_files")} | server.resident())
            server.stop()
    return rows


def revisions(options, directory, steps=(1, 1_000, 1_000_000)):
    """Starts on directories of different sizes: after an orderly end, after that with nothing of the catalog in the page cache, and after
    `kill -9`. Ends the run if one is not ready in time, or what is held is not served from disk."""
    rows = []
    with stack.Processes(directory) as processes:
        keys = [servers.OBJECT, *(f"late-{number}" for number in range(300))]
        origin = servers.Origin(processes, options.origin, objects(directory, keys), options.load_cores)
        for count in steps:
            began = time.monotonic()
            holding = Holding(processes, options, directory / f"revisions-{count}", origin)
            for first in range(0, count, 10_000):
                holding.add((f"seed-{number:07}", len(BODY)) for number in range(first, min(first + 10_000, count)))
            holding.done()
            catalog = holding.directory / "cache/catalog.sqlite"
            made = {"revisions": count, "catalog_mib": catalog.stat().st_size / MIB, "made_s": time.monotonic() - began}
            for start in ("orderly", "cold", "killed"):
                if start == "cold":
                    forget_pages(catalog)
                if start == "killed":
                    leave_unclean(processes, options, holding, origin, count)
                note(rows, made | {"start": start} | one_start(processes, options, holding, origin, count, start))
    return rows


def one_start(processes, options, holding, origin, count, name):
    replica = Replica(processes, options, holding.directory, origin)
    if replica.ready > READY:
        raise stack.Broken(f"{count} revisions, {name}: ready after {replica.ready:.3f} s")
    row = {"ready_ms": replica.ready * 1e3, "ready_rss_mib": replica.resident()["rss_mib"]}
    dice = random.Random(name)
    row |= quantiles("sweeping", touches(replica, holding, dice, count))
    replica.swept()
    row["swept_s"] = time.monotonic() - replica.began
    row |= quantiles("swept", touches(replica, holding, dice, count))
    for kind in ("files", "rows", "revisions"):
        row[f"swept_{kind}"] = replica.metric(f"pinrange_disk_swept_{kind}_total")
    if name == "orderly":
        replica.path, replica.etag = "/bench/seed-0000000", holding.etag
        row |= load_on(options, replica.directory, replica, len(BODY), 16)
    row |= replica.resident()
    row["stop_ms"] = replica.stop() * 1e3
    return row


def quantiles(name, seconds):
    cut = statistics.quantiles(seconds, n=100)
    return {f"touch_{name}_p50_ms": cut[49] * 1e3, f"touch_{name}_p99_ms": cut[98] * 1e3, f"touch_{name}_max_ms": max(seconds) * 1e3}


def touches(replica, holding, dice, count):
    """Latencies of pinned requests, one at a time, for revisions that were not asked for before (all but surely, where there are many)."""
    seconds = []
    connection = http.client.HTTPConnection("127.0.0.1", replica.port, timeout=60)
    with contextlib.closing(connection):
        for _ in range(TOUCHES):
            path = f"/bench/seed-{dice.randrange(count):07}"
            began = time.monotonic()
            connection.request("GET", path, headers={"If-Match": holding.etag})
            answer = connection.getresponse()
            body = answer.read()
            seconds.append(time.monotonic() - began)
            if body != BODY or answer.status != 200 or "hit; detail=disk" not in answer.headers["Cache-Status"]:
                raise stack.Broken(f"{path}: {answer.status} {answer.headers['Cache-Status']}")
    return seconds


def leave_unclean(processes, options, holding, origin, count):
    """A run that is killed, with a log as long as it gets, and with files and rows that have lost each other."""
    replica = Replica(processes, options, holding.directory, origin)
    for number in range(300):
        replica.get(f"/bench/late-{number}")
    # They are recorded by then, at the latest.
    time.sleep(0.5)
    replica.kill()
    for number in range(1_000):
        holding.segment(bytes([number % 256]) + b"leftover" + number.to_bytes(7, "big")).write_bytes(BODY)
    catalog = holding.directory / "cache/catalog.sqlite"
    child = os.fork()
    if child == 0:
        database = sqlite3.connect(catalog, isolation_level=None)
        database.execute("PRAGMA wal_autocheckpoint = 0")
        database.execute("BEGIN")
        # Two or three pages each: about as many as may be between two checkpoints.
        places = random.Random(2).sample(range(count), min(count, 4_000))
        database.executemany("UPDATE segments SET place = place + 10000000 WHERE revision = ?", [(place + 2,) for place in places])
        database.execute("COMMIT")
        # A connection that is closed in order moves its log.
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        raise stack.Broken("could not lengthen the log")
    forget_pages(catalog)
    forget_pages(catalog.with_name(catalog.name + "-wal"))


def forget_pages(file):
    """Has the kernel read it from the disk again."""
    with open(file, "rb") as handle:
        os.fsync(handle)
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def connections(options, directory, steps=(1, 10, 100, 1_000, 5_000), crowd=1_000):
    """How many connections read a tebibyte that is held, and what memory a crowd of them takes: at rest, reading, not reading, and on an
    object that has to be fetched first."""
    rows = []
    with stack.Processes(directory) as processes:
        origin = servers.Origin(processes, options.origin, objects(directory), options.load_cores)
        holding = Holding(processes, options, directory / "connections", origin)
        holding.add([("big", TIB)])
        holding.done()

        def start():
            server = Replica(processes, options, holding.directory, origin)
            server.path, server.etag, server.size = "/bench/big", holding.etag, TIB
            return server

        server = start()
        server.read(0, 1)
        # The same stretch for all, so that descriptors are no part of it: see `sizes` for them.
        server.size = GIB
        for count in steps:
            row = load_on(options, directory, server, 4 * KIB, count)
            note(rows, {"connections": count, "length": 4 * KIB} | row | server.resident())
        server.stop()
        for what, run in CROWDS.items():
            server = start()
            if what.startswith("cold"):
                server.path = "/bench/tebibyte"
                server.etag = server.head()[1]["ETag"]
            else:
                server.read(0, 1)
            before = server.resident()["rss_mib"]
            server.forget_peak()
            run(options, directory, server, crowd)
            note(rows, {"connections": crowd, "memory": what, "before_rss_mib": before} | server.resident())
            server.stop()
    return rows


def at_once(options, directory, server, count, length, read=True):
    """All ask, each for another range, and only then are the answers read, or not."""
    dice = random.Random(count)
    with contextlib.ExitStack() as open_ones:
        clients = []
        for _ in range(count):
            client = open_ones.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=60))
            first = dice.randrange(server.size // length) * length
            head = f"GET {server.path} HTTP/1.1\r\nHost: bench\r\nIf-Match: {server.etag}\r\nRange: bytes={first}-{first + length - 1}\r\n\r\n"
            client.sendall(head.encode())
            clients.append(client)
        for client in clients if read else ():
            received = b""
            while b"\r\n\r\n" not in received:
                received += client.recv(64 * KIB) or b"\r\n\r\n"
            left = length - len(received.partition(b"\r\n\r\n")[2])
            while left > 0 and (more := client.recv(MIB)):
                left -= len(more)
            if not received.startswith(b"HTTP/1.1 206") or left:
                raise stack.Broken(f"{server.path}: {left} bytes are missing: {received[:200]!r}")
        # So that every connection's request was at least looked at.
        server.read(0, 1)


def reading(length):
    return lambda options, directory, server, count: load_on(options, directory, server, length, count, rounds=1)


def asking(length, read=True):
    return lambda *run: at_once(*run, length, read)


CROWDS = {
    "one request each": asking(4 * KIB),
    "4 KiB": reading(4 * KIB),
    "1 MiB": reading(MIB),
    "16 MiB, not read": asking(16 * MIB, read=False),
    "cold, 4 KiB": asking(4 * KIB),
    "cold, 1 MiB": asking(MIB),
}


def mounts(options, directory, steps=(1, 10, 100, 1_000)):
    """The last of them is asked."""
    rows = []
    with stack.Processes(directory) as processes:
        paths = [f"/mount/{number:04}" for number in range(max(steps))]
        keys = [f"{path[1:]}/{servers.OBJECT}" for path in paths]
        origin = servers.Origin(processes, options.origin, objects(directory, keys), options.load_cores)
        for count in steps:
            server = Replica(processes, options, directory / f"mounts-{count}", origin, mounts=paths[:count])
            row = {"mounts": count, "ready_ms": server.ready * 1e3, "ready_rss_mib": server.resident()["rss_mib"]}
            began = time.monotonic()
            answer, body = server.get(server.path)
            row["first_fetch_ms"] = (time.monotonic() - began) * 1e3
            if body != BODY:
                raise stack.Broken(f"{server.path}: {answer.status}")
            server.etag = answer.headers["ETag"]
            row |= load_on(options, directory, server, 4 * KIB, 16)
            note(rows, row | server.resident())
            server.stop()
    return rows


def scale(options, directory):
    return {run.__name__: run(options, directory) for run in (sizes, revisions, connections, mounts)}

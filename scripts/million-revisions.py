"""Starts a replica on a catalog of a million revisions: ready when, first touches how fast, memory how much.

    cargo build --release --locked && python3 scripts/million-revisions.py --pinrange target/release/pinrange

The replica itself makes the catalog and one revision in it; this program multiplies that one, whatever columns its rows
have, and links its segment file under as many names (so that a million files cost no space). Then it starts
replicas on directories of different sizes: after an orderly end, after that with nothing of the catalog in the page
cache, and after `kill -9`. Each time it measures

    ready     from exec to the line that says so, a probe of a stand-in for S3 included
    touch     requests pinned to revisions that memory does not know, one at a time: while the sweep of what is left
              over runs, and after it
    rss       resident memory when ready, and after the touches
    stop      from SIGTERM to the end

Needs Python 3.11 or newer and, for a million, 1 GB of disk that has hard links; no Python packages. Ends with 1 if a promise
was broken: not ready within --ready seconds, a wrong byte, or a held revision that was not served from disk.
"""

import argparse
import hashlib
import http.client
import http.server
import os
import pathlib
import random
import re
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time

# ext4 allows 65,000 links to a file.
LINKS = 50_000
BODY = random.Random(1).randbytes(4096)
ETAG = f'"{hashlib.md5(BODY).hexdigest()}"'


class S3(http.server.BaseHTTPRequestHandler):
    """Every key has the same body, except the one that a start probes for."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        missing = "probe" in self.path
        body = b"<Error><Code>NoSuchKey</Code></Error>" if missing else BODY
        self.send_response(404 if missing else 206)
        self.send_header("Content-Length", str(len(body)))
        if not missing:
            self.send_header("ETag", ETAG)
            self.send_header("Content-Range", f"bytes 0-{len(BODY) - 1}/{len(BODY)}")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def main():
    options = arguments()
    directory = pathlib.Path(tempfile.mkdtemp(prefix="pinrange-million-", dir=options.dir))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))
    s3 = http.server.ThreadingHTTPServer(("127.0.0.1", 0), S3)
    threading.Thread(target=s3.serve_forever, daemon=True).start()
    options.s3 = f"http://127.0.0.1:{s3.server_port}"
    failures = []
    try:
        for revisions in options.revisions:
            failures += measure(options, directory / str(revisions), revisions)
    finally:
        for replica in Replica.started:
            replica.process.kill()
            replica.process.wait()
        shutil.rmtree(directory)
    for failure in failures:
        print(f"FAILED: {failure}")
    return 1 if failures else 0


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pinrange", required=True, help="the binary")
    parser.add_argument("--revisions", type=int, nargs="+", default=[1_000, 1_000_000])
    parser.add_argument("--touches", type=int, default=1_000)
    parser.add_argument("--ready", type=float, default=1.0, help="seconds within which each start has to be ready")
    parser.add_argument("--dir", help="where to work [default: the system's]")
    return parser.parse_args()


def measure(options, directory, revisions):
    began = time.monotonic()
    make(options, directory, revisions)
    size = (directory / "cache/catalog.sqlite").stat().st_size
    print(f"{revisions} revisions: catalog of {size / 2**20:.0f} MiB made in {time.monotonic() - began:.0f} s")
    failures = []
    for start in ("orderly", "cold", "killed"):
        if start == "cold":
            forget_pages(directory / "cache/catalog.sqlite")
        if start == "killed":
            leave_unclean(options, directory, revisions)
        failures += [f"{revisions} revisions, {start}: {what}" for what in run(options, directory, revisions, start)]
    return failures


def run(options, directory, revisions, name):
    failures = []
    replica = Replica(options, directory)
    rss = replica.rss()
    if replica.ready > options.ready:
        failures.append(f"ready after {replica.ready:.3f} s")
    rows = random.Random(name)
    sweeping, wrong = touches(replica, rows, options.touches, revisions)
    while replica.metric("pinrange_disk_sweeping") == 1:
        time.sleep(0.05)
    swept = time.monotonic() - replica.began
    after, more = touches(replica, rows, options.touches, revisions)
    failures += wrong + more
    rss_after = replica.rss()
    left = {kind: replica.metric(f"pinrange_disk_swept_{kind}_total") for kind in ("files", "rows", "revisions")}
    stop = replica.stop()
    print(
        f"  {name:8} ready {replica.ready * 1e3:5.0f} ms, rss {rss} MiB ready, {rss_after} MiB touched; swept by {swept:.1f} s {left}; "
        f"touch during {quantiles(sweeping)}, after {quantiles(after)}; stop {stop * 1e3:.0f} ms"
    )
    return failures


def quantiles(seconds):
    cut = statistics.quantiles(seconds, n=100)
    return f"p50 {cut[49] * 1e3:.2f} p99 {cut[98] * 1e3:.2f} max {max(seconds) * 1e3:.1f} ms"


def touches(replica, rows, count, revisions):
    """Latencies of pinned requests for revisions that were not asked for before (all but surely), and what was wrong."""
    seconds, wrong = [], []
    connection = http.client.HTTPConnection(replica.address, timeout=30)
    for _ in range(count):
        path = f"/seed-{rows.randrange(revisions):07}"
        began = time.monotonic()
        connection.request("GET", path, headers={"If-Match": ETAG})
        answer = connection.getresponse()
        body = answer.read()
        seconds.append(time.monotonic() - began)
        if body != BODY or answer.status != 200 or "hit; detail=disk" not in answer.headers["Cache-Status"]:
            wrong.append(f"{path}: {answer.status} {answer.headers['Cache-Status']}")
    return seconds, wrong[:3]


class Replica:
    # To be ended, whatever else goes wrong.
    started = []

    def __init__(self, options, directory):
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "PINRANGE_"))}
        environment |= {
            "AWS_EC2_METADATA_DISABLED": "true",
            "PINRANGE_CACHE__DIR": str(directory / "cache"),
            "PINRANGE_CACHE__MIN_FREE": "1MiB",
            "PINRANGE_SERVER__DRAIN_GRACE": "0s",
            "PINRANGE_SERVER__LISTEN": "127.0.0.1:0",
            "PINRANGE_SERVER__ADMIN": "127.0.0.1:0",
            "PINRANGE_MOUNT__0__PATH": "/",
            "PINRANGE_MOUNT__0__BUCKET": "bucket",
            "PINRANGE_MOUNT__0__ENDPOINT": options.s3,
            "PINRANGE_MOUNT__0__REGION": "us-east-1",
            "PINRANGE_MOUNT__0__PATH_STYLE": "true",
            "PINRANGE_LOG": "warn",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
        }
        with (directory / "log").open("ab") as log:
            self.began = time.monotonic()
            self.process = subprocess.Popen(
                [options.pinrange, "serve"], env=environment, stdout=subprocess.PIPE, stderr=log, text=True
            )
        Replica.started.append(self)
        line = self.process.stdout.readline()
        self.ready = time.monotonic() - self.began
        addresses = re.findall(r"http://(\S+)", line)
        if len(addresses) < 2:
            self.process.wait()
            sys.exit(f"the replica did not start: {(directory / 'log').read_text()}")
        self.address, self.admin = addresses[:2]

    def rss(self):
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) // 1024

    def metric(self, name):
        connection = http.client.HTTPConnection(self.admin, timeout=30)
        connection.request("GET", "/metrics")
        found = re.search(rf"^{name} (\d+)", connection.getresponse().read().decode(), re.MULTILINE)
        return int(found[1]) if found else None

    def stop(self):
        began = time.monotonic()
        self.process.terminate()
        code = self.process.wait()
        if code != 0:
            sys.exit(f"the replica ended with {code}")
        return time.monotonic() - began

    def kill(self):
        self.process.kill()
        self.process.wait()


def make(options, directory, revisions):
    """One revision by the replica, the others by multiplying it."""
    directory.mkdir()
    replica = Replica(options, directory)
    connection = http.client.HTTPConnection(replica.address, timeout=30)
    connection.request("GET", "/seed")
    answer = connection.getresponse()
    if answer.read() != BODY:
        sys.exit(f"the seed was not served: {answer.status}")
    replica.stop()

    database = sqlite3.connect(directory / "cache/catalog.sqlite", isolation_level=None)
    database.row_factory = sqlite3.Row
    rows = {table: dict(one(database, f"SELECT * FROM {table}")) for table in ("revisions", "segments", "checksums")}
    seed = rows["segments"]["incarnation"]
    source = segment(directory, seed)
    spread = random.Random(revisions)
    database.execute("BEGIN")
    for first in range(0, revisions, 10_000):
        batch = []
        for number in range(first, min(first + 10_000, revisions)):
            # Names of an earlier run: they share its half.
            incarnation = spread.randbytes(8) + seed[8:]
            if number % LINKS == 0:
                source = segment(directory, incarnation)
                source.write_bytes(BODY)
            else:
                os.link(source, segment(directory, incarnation))
            batch.append((number, rows["revisions"]["id"] + 1 + number, incarnation))
        insert(database, "revisions", [rows["revisions"] | {"id": id, "key": f"seed-{n:07}"} for n, id, _ in batch])
        segments = [{"revision": id, "incarnation": name, "place": 1_000 + n} for n, id, name in batch]
        insert(database, "segments", [rows["segments"] | row for row in segments])
        # A rowid of its own where the table has one.
        insert(database, "checksums", [rows["checksums"] | {"incarnation": name} for _, _, name in batch])
    database.execute("COMMIT")
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()


def segment(directory, incarnation):
    return directory / f"cache/segments/{incarnation[0]:02x}/{incarnation.hex()}.seg"


def one(database, query):
    found = database.execute(query).fetchall()
    if len(found) != 1:
        sys.exit(f"{len(found)} rows instead of one: {query}")
    return found[0]


def insert(database, table, rows):
    columns = list(rows[0])
    marks = ", ".join(f":{column}" for column in columns)
    database.executemany(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})", rows)


def leave_unclean(options, directory, revisions):
    """A run that is killed, with a log as long as it gets, and with files and rows that have lost each other."""
    replica = Replica(options, directory)
    for number in range(300):
        connection = http.client.HTTPConnection(replica.address, timeout=30)
        connection.request("GET", f"/late-{number}")
        connection.getresponse().read()
    time.sleep(0.5)
    replica.kill()
    for number in range(1_000):
        segment(directory, bytes([number % 256]) + b"leftover" + number.to_bytes(7)).write_bytes(BODY)
    child = os.fork()
    if child == 0:
        database = sqlite3.connect(directory / "cache/catalog.sqlite", isolation_level=None)
        database.execute("PRAGMA wal_autocheckpoint = 0")
        database.execute("BEGIN")
        # Two or three pages each: about as many as may be between two checkpoints.
        rows = random.Random(2).sample(range(revisions), min(revisions, 4_000))
        statement = "UPDATE segments SET place = place + 1000000 WHERE revision = ?"
        database.executemany(statement, [(row + 2,) for row in rows])
        database.execute("COMMIT")
        # A connection that is closed in order moves its log.
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        sys.exit("could not lengthen the log")
    log = directory / "cache/catalog.sqlite-wal"
    print(f"  killed with {log.stat().st_size / 2**20:.0f} MiB of log and 1000 files without a row")
    forget_pages(directory / "cache/catalog.sqlite")
    forget_pages(log)


def forget_pages(file):
    """Has the kernel read it from the disk again."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())

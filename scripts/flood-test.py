#!/usr/bin/env python3
"""Thousands of idle and hundreds of slow clients: the others must not notice, and memory must stay bounded.

    cargo build --release && python3 scripts/flood-test.py --pinrange target/release/pinrange

One replica in front of the S3 that `pinrange serve --dev` has, which serves one big sparse file. A fast client reads
warm pinned ranges over one connection, in turns alone and beside a crowd: --idle connections that have asked once and
keep still, --slow ones that download the whole object at 8 KiB/s each, and --heads ones that have sent 15 KiB of a head
and do not end it. Then silent connections are opened up to
the replica's limit and beyond. What is judged:

  * every answer is right, and nobody is cut who may not be: not the slow ones, not the fast one;
  * resident memory (RSS, the program's own text included) is at most 64 MiB + 32 KiB a connection;
  * the admin listener answers all along;
  * beyond the limit a new client is answered, because silent connections give way;
  * with --p99 RATIO, the fast client's p99 beside the crowd is at most RATIO times that alone.

Needs Python 3.11 or newer on Linux; no packages. Ends with 0 if all held, 1 if not, 2 if the run could not be made.
"""

import argparse
import json
import os
import pathlib
import re
import resource
import select
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request

from fleet import frame

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
BASE, EACH = 64 * MIB, 32 * KIB
RANGE = 64 * KIB
SLOW_RATE = 8 * KIB
# The limit is as far above the crowd as the last phase needs to be quick.
ROOM = 500


def main():
    options = arguments()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    wanted = options.idle + options.slow + options.heads + 2 * ROOM
    if hard != resource.RLIM_INFINITY and hard < 2 * wanted + 256:
        print(f"flood: needs {2 * wanted + 256} open files, the limit is {hard}: use fewer --idle", file=sys.stderr)
        return 2
    limit = 120 + options.rounds * (60 + 4 * options.seconds)
    return frame.judge("flood", lambda options, directory: Run(options, directory).report(), show, options, limit)


def show(report):
    print(json.dumps(report, indent=2))


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pinrange", required=True, metavar="PROGRAM", help="the program under test")
    parser.add_argument("--idle", type=int, default=5000, help="connections that keep still [5000]")
    parser.add_argument("--slow", type=int, default=500, help="connections that download slowly [500]")
    parser.add_argument("--heads", type=int, default=500, help="connections that send half a head [500]")
    parser.add_argument("--size", type=int, default=64, help="GiB of the (sparse) object [64]")
    parser.add_argument("--rounds", type=int, default=5, help="of the fast client alone and beside the crowd [5]")
    parser.add_argument("--seconds", type=float, default=5, help="of each [5]")
    parser.add_argument("--p99", type=float, metavar="RATIO", help="judge the fast client's p99 too")
    parser.add_argument("--dir", help="where to work; the cache takes up to 2 GiB there")
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    parser.add_argument("--quick", action="store_true", help="1000 idle, 100 slow, 100 heads, one round of 2 s, as in CI")
    if "--quick" in sys.argv:
        parser.set_defaults(idle=1000, slow=100, heads=100, rounds=1, seconds=2, size=16)
    options = parser.parse_args()
    options.pinrange = str(pathlib.Path(options.pinrange).resolve(strict=True))
    return options


class Run:
    def __init__(self, options, directory):
        self.options = options
        self.directory = directory
        self.processes = []
        self.probe = None
        self.violations = []

    def report(self):
        try:
            return self.run()
        finally:
            if self.probe:
                self.probe.end()
            for process in self.processes:
                process.kill()
                process.wait()

    def run(self):
        options = self.options
        (self.directory / "files").mkdir()
        size = options.size * GIB
        with open(self.directory / "files" / "object", "wb") as file:
            file.truncate(size)
            # What the fast client reads is no hole.
            file.write(os.urandom(MIB))
        crowd_size = options.idle + options.slow + options.heads
        limit = crowd_size + ROOM
        s3 = self.serve("s3", {}, "--dev", str(self.directory / "files"))
        endpoint = s3.said(r"is the bucket dev at (\S+)")
        replica = self.serve(
            "replica",
            {
                "PINRANGE_SERVER__MAX_CONNECTIONS": str(limit),
                # The crowd keeps still for longer than that of a quick test should matter.
                "PINRANGE_SERVER__IDLE_TIMEOUT": "10m",
                "PINRANGE_SERVER__HEADER_TIMEOUT": "10m",
                "PINRANGE_CACHE__CAPACITY": "2GiB",
                "PINRANGE_CACHE__MIN_FREE": "1MiB",
                "PINRANGE_LOG": "warn",
            },
            *("--bucket", "dev", "--endpoint", endpoint, "--region", "us-east-1"),
        )
        with open(self.directory / "files" / "object", "rb") as file:
            content = file.read(MIB)
        self.probe = Probe(replica)
        fast = Fast(replica.data, content)
        fast.run(1)

        start = replica.memory()
        alone, beside, crowded, peak = [], [], start, start
        for _ in range(options.rounds):
            alone.append(fast.run(options.seconds))
            with Crowd(replica.data, options, size) as crowd:
                beside.append(fast.run(options.seconds))
                crowded = max(crowded, replica.memory())
                peak = max(peak, replica.memory("VmHWM"))
                self.judge_crowd(crowd)
        connections = crowd_size + 1
        bound = BASE + EACH * connections
        if crowded > bound:
            self.violations.append(f"{crowded} bytes resident, more than {bound}")

        beyond = self.beyond(replica, limit)
        admin = self.probe.stop()
        if admin["failures"]:
            self.violations.append(f"the admin listener failed {admin['failures']} times: {admin['first']}")
        if fast.failures:
            self.violations.append(f"the fast client failed {len(fast.failures)} times: {fast.failures[0]}")
        report = {
            "connections": connections,
            "memory": {
                "at_start": start,
                "beside_crowd": crowded,
                "peak": peak,
                "bound": bound,
                "per_connection": round((crowded - start) / connections),
            },
            "fast": {
                "alone": summary(alone),
                "beside": summary(beside),
                "p99_ratio": round(p99(beside) / p99(alone), 3),
            },
            "admin": admin,
            "beyond_the_limit": beyond,
        }
        if options.p99 and report["fast"]["p99_ratio"] > options.p99:
            self.violations.append(f"p99 grew {report['fast']['p99_ratio']} times beside the crowd")
        if replica.process.poll() is not None:
            self.violations.append(f"the replica ended with {replica.process.returncode}")
        report["violations"] = self.violations
        return report

    def judge_crowd(self, crowd):
        crowd.stop()
        if crowd.cut:
            self.violations.append(f"{crowd.cut} of the crowd were cut")
        starved = sum(taken < SLOW_RATE for taken in crowd.taken)
        if starved:
            self.violations.append(f"{starved} slow clients got next to nothing")

    @staticmethod
    def taken(replica):
        """Connections that were taken of those that are held open: the first may have made room again."""
        return replica.metric("pinrange_connections") + replica.metric("pinrange_connections_displaced_total")

    def beyond(self, replica, limit):
        """Silent connections up to the limit and beyond; then one more asks, and has to be answered."""
        silent = []
        patience = time.monotonic() + 30
        for number in range(limit + ROOM // 2):
            silent.append(socket.create_connection(replica.data, timeout=30))
            # No faster than they are accepted: what the listen queue cannot hold comes seconds later.
            while number % 256 == 255 and self.taken(replica) < min(number, limit) - 256:
                if time.monotonic() > patience:
                    raise frame.Broken(f"of {number} silent connections few are accepted")
                time.sleep(0.05)
        while replica.metric("pinrange_connections_displaced_total") == 0:
            if time.monotonic() > patience:
                self.violations.append("no connection gave way")
                break
            time.sleep(0.1)
        began = time.monotonic()
        try:
            with socket.create_connection(replica.data, timeout=30) as late:
                late.sendall(b"HEAD /object HTTP/1.1\r\nHost: flood\r\n\r\n")
                answered = late.recv(64).startswith(b"HTTP/1.1 200 ")
        except OSError as error:
            answered = False
            self.violations.append(f"beyond the limit: {error}")
        waited = time.monotonic() - began
        if not answered:
            self.violations.append("beyond the limit a client was not answered")
        for connection in silent:
            connection.close()
        displaced = replica.metric("pinrange_connections_displaced_total")
        return {"limit": limit, "silent": len(silent), "displaced": displaced, "answered_after_s": round(waited, 3)}

    def serve(self, name, variables, *arguments):
        server = Server(self.options.pinrange, self.directory, name, variables, arguments)
        self.processes.append(server.process)
        server.wait()
        return server


class Server:
    """A `pinrange serve` on free ports."""

    def __init__(self, program, directory, name, variables, arguments):
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "PINRANGE_"))}
        environment |= {
            "AWS_ACCESS_KEY_ID": "flood",
            "AWS_SECRET_ACCESS_KEY": "flood",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "PINRANGE_SERVER__LISTEN": "127.0.0.1:0",
            "PINRANGE_SERVER__ADMIN": "127.0.0.1:0",
            "PINRANGE_CACHE__DIR": str(directory / f"cache-{name}"),
        }
        self.log = directory / f"{name}.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [program, "serve", *arguments],
                env=environment | variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def wait(self):
        self.data, self.admin = map(
            self.address, re.findall(r"http://(\S+)", self.said(r"ready: (data http://\S+ admin http://\S+)"))
        )

    def said(self, pattern):
        for _ in range(300):
            found = re.search(pattern, self.log.read_text(errors="replace"))
            if found:
                return found[1]
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        raise frame.Broken(f"{self.log.name} does not say {pattern}: {self.log.read_text(errors='replace')[-500:]}")

    @staticmethod
    def address(text):
        host, port = text.rsplit(":", 1)
        return host, int(port)

    def metric(self, name):
        url = f"http://{self.admin[0]}:{self.admin[1]}/metrics"
        metrics = urllib.request.urlopen(url, timeout=10).read().decode()
        found = re.search(rf"^{name} (\d+)$", metrics, re.MULTILINE)
        if found is None:
            raise frame.Broken(f"no metric {name}")
        return int(found[1])

    def memory(self, what="VmRSS"):
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(rf"{what}:\s+(\d+) kB", status)[1]) * KIB


class Fast:
    """Warm pinned ranges, one after the other over one connection; each is compared with the object."""

    def __init__(self, address, content):
        self.content = content
        self.failures = []
        self.socket = socket.create_connection(address, timeout=30)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.pin = ""
        head, _ = self.ask(0)
        etag = re.search(rb"(?i)\r\netag: (\S+)", head)
        self.pin = f"If-Match: {etag[1].decode()}\r\n"

    def run(self, seconds):
        """Latencies in seconds, sorted."""
        taken = []
        end = time.monotonic() + seconds
        first = 0
        while time.monotonic() < end:
            began = time.perf_counter()
            head, body = self.ask(first)
            taken.append(time.perf_counter() - began)
            if not head.startswith(b"HTTP/1.1 206 ") or body != self.content[first : first + RANGE]:
                self.failures.append(head.decode(errors="replace"))
            first = (first + 12_289) % (MIB - RANGE)
            # A client that does nothing else would only measure how the cores are shared.
            time.sleep(0.002)
        return sorted(taken)

    def ask(self, first):
        request = f"GET /object HTTP/1.1\r\nHost: flood\r\n{self.pin}Range: bytes={first}-{first + RANGE - 1}\r\n\r\n"
        self.socket.sendall(request.encode())
        got = bytearray()
        while (end := got.find(b"\r\n\r\n")) < 0 or len(got) < end + 4 + RANGE:
            more = self.socket.recv(256 * KIB)
            if not more:
                raise frame.Broken(f"the fast client was cut: {bytes(got[:200])}")
            got += more
        return bytes(got[:end]), bytes(got[end + 4 :])


def p99(runs):
    return statistics.median(run[int(len(run) * 0.99)] for run in runs)


def summary(runs):
    return {
        "requests": sum(map(len, runs)),
        "p50_us": round(statistics.median(run[len(run) // 2] for run in runs) * 1e6),
        "p99_us": round(p99(runs) * 1e6),
    }


class Crowd:
    """The idle, the slow and the half heads, in a process of their own, so that they take no time of the fast client's."""

    def __init__(self, address, options, size):
        self.address, self.size = address, size
        self.idle, self.slow, self.heads = options.idle, options.slow, options.heads

    def __enter__(self):
        self.here, there = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            # Whatever happens, the child ends here.
            try:
                signal.alarm(0)
                self.here.close()
                os.nice(5)
                self.crowd(there)
            finally:
                os._exit(0)
        there.close()
        self.here.settimeout(60)
        if self.here.recv(1) != b"!":
            raise frame.Broken("the crowd did not get in")
        return self

    def stop(self):
        self.here.sendall(b".")
        report = json.loads(self.here.makefile().readline())
        self.cut, self.taken = report["cut"], report["taken"]

    def __exit__(self, *_):
        self.here.close()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def crowd(self, parent):
        gone = set()
        idle = [self.connect(b"HEAD /object HTTP/1.1\r\nHost: idle\r\n\r\n") for _ in range(self.idle)]
        slow = []
        for number in range(self.slow):
            first = number % 16 * 16 * MIB
            request = f"GET /object HTTP/1.1\r\nHost: slow\r\nRange: bytes={first}-{self.size - 1}\r\n\r\n"
            slow.append(self.connect(request.encode()))
        head = b"GET /object HTTP/1.1\r\nHost: head\r\nX: " + b"x" * 15 * KIB
        heads = [self.connect(head) for _ in range(self.heads)]
        for connection in [*idle, *slow]:
            connection.settimeout(60)
            if not connection.recv(1024).startswith(b"HTTP/1.1 20"):
                raise frame.Broken("not answered")
            connection.setblocking(False)
        for connection in heads:
            connection.setblocking(False)
        parent.sendall(b"!")
        taken = [0] * len(slow)
        turn = 0
        # Each takes something four times a second, but not all at once, which would be a pulse of work.
        while not select.select([parent], [], [], 0.01)[0]:
            turn = (turn + 1) % 25
            for number in range(turn, len(slow), 25):
                connection = slow[number]
                try:
                    got = len(connection.recv(SLOW_RATE // 4))
                except BlockingIOError:
                    continue
                except OSError:
                    got = 0
                taken[number] += got
                if not got:
                    gone.add(connection)
        for connection in [*idle, *heads]:
            try:
                if not connection.recv(1):
                    gone.add(connection)
            except BlockingIOError:
                pass
            except OSError:
                gone.add(connection)
        parent.sendall(json.dumps({"cut": len(gone), "taken": taken}).encode() + b"\n")
        parent.recv(1)

    def connect(self, request):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(30)
        connection.connect(self.address)
        connection.sendall(request)
        return connection


class Probe:
    """Asks the admin listener ten times a second, as probes and scrapers do; in a process of its own as well."""

    def __init__(self, replica):
        urls = [f"http://{replica.admin[0]}:{replica.admin[1]}{path}" for path in ("/readyz", "/metrics")]
        self.here, there = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            # Whatever happens, the child ends here.
            try:
                signal.alarm(0)
                # Else this child would never see its end.
                self.here.close()
                there.sendall(json.dumps(self.ask(urls, there)).encode() + b"\n")
            finally:
                os._exit(0)
        there.close()

    @staticmethod
    def ask(urls, parent):
        taken, failed = [], []
        while not select.select([parent], [], [], 0.1)[0]:
            for url in urls:
                began = time.perf_counter()
                try:
                    urllib.request.urlopen(url, timeout=5).read()
                except OSError as error:
                    failed.append(f"{url}: {error}")
                taken.append(time.perf_counter() - began)
        return {
            "questions": len(taken),
            "failures": len(failed),
            "first": failed[0] if failed else None,
            "slowest_ms": round(max(taken) * 1e3, 1),
        }

    def stop(self):
        self.here.sendall(b".")
        return json.loads(self.here.makefile().readline())

    def end(self):
        self.here.close()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


if __name__ == "__main__":
    sys.exit(main())

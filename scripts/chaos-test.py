"""Everything breaks at once, from a seed: does anybody get a wrong byte?

    cargo build --release && python3 scripts/chaos-test.py --pinrange target/release/pinrange

Three replicas behind HAProxy (deploy/haproxy.cfg), each with its cache on a small tmpfs of its own, in front of Garage behind an origin that
spoils a share of its answers (scripts/fleet/flaky.py). For --seconds, objects are overwritten, and one replica after the other is
killed, killed and its cache files flipped bit by bit, stopped for a while, or its disk filled to the last byte: what, whom and when
comes from --seed. Meanwhile clients download whole files (`pinrange get`, aria2c, curl, an S3 SDK's way) and pinned random ranges, and compare
every byte. Then the faults end, and everyone must get a whole file again.

Wrong bytes and wrong labels are violations; so are a replica that ends by itself or does not come back, and clients that get nothing after
the faults. A request that fails is not, for clients see a replica that is killed; it is reported by reason.

Needs what scripts/fleet-test.py needs, and the right to mount a tmpfs in a mount namespace of its own (root, or user namespaces). Ends with 0 if
nothing was violated, 1 if something was, 2 if the run itself could not be made.
"""

import argparse
import collections
import http.client
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time

from fleet import clients, frame, revisions, stack

MIB = 1 << 20
OBJECTS = ("a.bin", "b.bin", "c.bin")
EVENTS = ("kill", "flip", "stop", "fill")
# In a namespace of our own the mounts end with the run, however it ends.
UNSHARED = "PINRANGE_CHAOS_UNSHARED"


def main():
    options = arguments()
    if UNSHARED not in os.environ:
        os.environ[UNSHARED] = "1"
        user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        os.execvp("unshare", ["unshare", *user, "--mount", sys.executable, *sys.argv])
    return frame.judge("chaos", run, show, options, options.seconds + 240, heavy=("garage",))


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pinrange", metavar="PROGRAM", required=True, help="the pinrange program")
    parser.add_argument("--seconds", type=float, default=60, help="of chaos [60]")
    parser.add_argument("--seed", type=int, default=None, help="of all that is drawn [a new one, printed]")
    parser.add_argument("--share", type=float, default=0.3, help="of the origin's answers that are spoiled [0.3]")
    parser.add_argument("--size", type=int, default=32, metavar="MIB", help="of each of three objects, a multiple of 8 [32]")
    parser.add_argument("--revisions", type=int, default=6, metavar="N", help="of each object that take turns [6]")
    parser.add_argument("--disk", type=int, default=128, metavar="MIB", help="of each replica's disk, all of which it may use [128]")
    parser.add_argument("--dir", help="where to work")
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    options = parser.parse_args()
    if options.size % 8:
        parser.error("--size must be a multiple of 8")
    options.pinrange = str(pathlib.Path(options.pinrange).resolve(strict=True))
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(1 << 32)
    return options


class Origin:
    """The origin that breaks down, in a process of its own."""

    def __init__(self, processes, upstream, seed):
        script = pathlib.Path(__file__).parent / "fleet/flaky.py"
        self._process = processes.enter_context(
            subprocess.Popen(
                [sys.executable, str(script), "--upstream", str(upstream), "--seed", str(seed)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        processes.callback(self._process.kill)
        self.port = int(self._process.stdout.readline())

    def spoil(self, share):
        """Sets the share; gives what happened so far."""
        self._process.stdin.write(f"{share}\n")
        self._process.stdin.flush()
        return collections.Counter(json.loads(self._process.stdout.readline()))


class Probe(threading.Thread):
    """Pinned random ranges, also of revisions that are long gone: right bytes, or a clean refusal."""

    def __init__(self, port, uploads, size, dice):
        super().__init__(name="probe")
        self.port, self.uploads, self.size, self.dice = port, uploads, size, dice
        self.outcomes = collections.Counter()
        self.bytes = 0
        self.stopping = threading.Event()
        self.violations = []
        self._pins = []

    def run(self):
        connection = None
        while not self.stopping.is_set():
            if connection is None:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=clients.PATIENCE)
            try:
                self.outcomes[self._one(connection)] += 1
            except (OSError, http.client.HTTPException) as error:
                if not self.stopping.is_set():
                    self.outcomes[type(error).__name__] += 1
                connection.close()
                connection = None
        if connection:
            connection.close()

    def _one(self, connection):
        path = f"/{stack.BUCKET}/{self.dice.choice(OBJECTS)}"
        start = self.dice.randrange(self.size)
        end = min(self.size, start + self.dice.choice((1, 4 << 10, 64 << 10, MIB, 4 * MIB)))
        headers = {"Range": f"bytes={start}-{end - 1}"}
        pin = self.dice.choice(self._pins) if self._pins and self.dice.random() < 0.8 else None
        if pin:
            headers["If-Match"] = pin
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        body = response.read()
        if response.status != 206:
            if response.status == 412 and pin:
                return "412"
            return f"{response.status}"
        etag = response.headers["ETag"]
        number = self.uploads.number_of(etag)
        said = response.headers["Content-Range"]
        if number is None or (pin and etag != pin) or said != f"bytes {start}-{end - 1}/{self.size}":
            self.violations.append(f"probe: asked for {start}-{end - 1} of {pin}, was answered {etag}, {said}")
        elif body != self.uploads.stretch_of(number, start, end):
            self.violations.append(f"probe: wrong bytes in {start}-{end - 1} of revision {number}")
        if etag not in self._pins:
            self._pins = [*self._pins[-5:], etag]
        self.bytes += len(body)
        return "finished"


def run(options, directory):
    size = options.size * MIB
    print(f"seed {options.seed}", flush=True)
    dice = random.Random(options.seed)
    uploads = revisions.Revisions(size)
    violations = []
    injected = collections.Counter()
    with stack.Processes(directory) as processes:
        disks = [tmpfs(processes, directory / f"disk{number}", options.disk) for number in (1, 2, 3)]
        garage = stack.Garage(processes, directory)
        for number in range(options.revisions):
            uploads.uploaded(number, garage.put(f"revision/{number}", uploads.bytes_of(number)))
        for index, key in enumerate(OBJECTS):
            garage.overwrite(f"revision/{index % options.revisions}", key)
        origin = Origin(processes, garage.s3_port, options.seed)
        fleet = stack.Fleet(
            processes, directory, options.pinrange, origin.port, size, f"{options.disk}MiB", [d / "cache" for d in disks]
        )
        clients.Get.binary = options.pinrange
        now = {"phase": "chaos"}
        crowd = [
            kind("127.0.0.1", fleet.port, f"/{stack.BUCKET}/{key}", directory, uploads, lambda: now["phase"])
            for kind, key in zip((clients.Get, clients.Aria2, clients.Curl, clients.Ranges), (*OBJECTS, OBJECTS[0]))
        ]
        probes = [Probe(fleet.port, uploads, size, random.Random(f"{options.seed}:{n}")) for n in range(2)]
        slowest_start = 0.0
        try:
            for client in (*crowd, *probes):
                client.start()
            origin.spoil(options.share)
            end = time.monotonic() + options.seconds
            while time.monotonic() < end:
                garage.overwrite(f"revision/{dice.randrange(options.revisions)}", dice.choice(OBJECTS))
                injected["overwrite"] += 1
                replica, event = dice.choice(fleet.replicas), dice.choice(EVENTS)
                if (ended := replica.process.poll()) is not None:
                    violations.append(f"{replica.name} ended by itself with {ended}")
                    replica.start()
                took = happen(event, replica, disks[replica.number - 1], dice, injected)
                slowest_start = max(slowest_start, took)
                # The fleet's health checks and everybody's retries go on meanwhile.
                time.sleep(dice.uniform(0.5, 1.5))
            counts = origin.spoil(0)
            now["phase"] = "calm"
            wait_for_calm(crowd, violations)
        finally:
            for client in crowd:
                client.kill()
            for probe in probes:
                probe.stopping.set()
            for client in (*crowd, *probes):
                client.join(clients.PATIENCE + 10)
        shares = fleet.shares()
        if not all(stack.status_of(replica.admin, "/readyz") == 200 for replica in fleet.replicas):
            violations.append("a replica is not ready after the faults ended")
    for name, code in processes.exit_codes.items():
        if code != 0 and (name.startswith("replica") or isinstance(code, str)):
            violations.append(f"{name}: exit code {code}")
    return judged(options, crowd, probes, shares, counts, injected, slowest_start, violations)


def tmpfs(processes, path, mib):
    path.mkdir()
    # A little more than the capacity, for the catalog.
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib + 16}m", "tmpfs", str(path)], check=True)
    processes.callback(subprocess.run, ["umount", str(path)], check=True)
    return path


def happen(event, replica, disk, dice, injected):
    """Does it, and undoes it. Gives the seconds that a start took."""
    injected[event] += 1
    if event == "stop":
        replica.process.send_signal(signal.SIGSTOP)
        time.sleep(dice.uniform(0.2, 2))
        replica.process.send_signal(signal.SIGCONT)
    elif event == "fill":
        ballast = disk / "ballast"
        with open(ballast, "wb", buffering=0) as file:
            try:
                while file.write(bytes(MIB)) == MIB:
                    pass
            except OSError:
                pass  # full, which was the aim
        time.sleep(dice.uniform(1, 3))
        ballast.unlink()
    else:
        replica.kill()
        if event == "flip":
            injected["bits flipped"] += flip(disk, dice)
        time.sleep(dice.uniform(0, 0.5))
        return replica.start()
    return 0.0


def flip(disk, dice):
    """One bit in each of up to 200 places of the segment files.

    In copies that take the files' places: what the killed replica sent by sendfile may still be on its way to the clients, and it is the
    file's own pages that are."""
    files = {path: path.read_bytes() for path in sorted(disk.rglob("*.seg")) if path.stat().st_size}
    if not files:
        return 0
    flipped = {}
    for _ in range(200):
        path = dice.choice(list(files))
        copy = flipped.setdefault(path, bytearray(files[path]))
        copy[dice.randrange(len(copy))] ^= 1 << dice.randrange(8)
    for path, copy in flipped.items():
        path.unlink()
        try:
            path.write_bytes(copy)
        except OSError:
            # No room for the copy on a full disk: then the file is gone, which is a fault too.
            path.unlink(missing_ok=True)
    return 200


def wait_for_calm(crowd, violations):
    """Everybody finishes a download that began after the faults."""
    deadline = time.monotonic() + 60
    for client in crowd:
        while not any(attempt.phase == "calm" and attempt.outcome == "finished" for attempt in client.attempts):
            if time.monotonic() > deadline:
                violations.append(f"{client.name}: finished nothing within 60 s of the last fault")
                break
            time.sleep(0.1)


def judged(options, crowd, probes, shares, counts, injected, slowest_start, violations):
    wrong = [f"{client.name}: {wrong}" for client in crowd for wrong in client.violations]
    wrong += [wrong for probe in probes for wrong in probe.violations]
    attempts = collections.Counter()
    reasons = collections.Counter()
    for client in crowd:
        for attempt in client.attempts:
            attempts[f"{client.name} {attempt.outcome}"] += 1
            if attempt.outcome == "failed":
                reasons[f"{client.name}: {attempt.detail}"] += 1
    for probe in probes:
        for outcome, count in probe.outcomes.items():
            if outcome not in ("finished", "412"):
                reasons[f"probe: {outcome}"] += count
    faults = {**injected, **{kind: count for kind, count in counts.items() if kind not in ("requests", "bytes")}}
    finished = sum(a.outcome == "finished" for client in crowd for a in client.attempts)
    ranges = sum(probe.outcomes["finished"] for probe in probes)
    if finished < 4 or ranges < 50 or any(share["2xx"] == 0 for share in shares.values()):
        violations.append(f"{finished} files and {ranges} ranges over {shares}: this was not a test")
    return {
        "seed": options.seed,
        "seconds": options.seconds,
        "requests": sum(share[code] for share in shares.values() for code in ("2xx", "4xx", "5xx")),
        "files": dict(attempts),
        "ranges": dict(sum((probe.outcomes for probe in probes), collections.Counter())),
        "bytes_verified": finished * options.size * MIB + sum(probe.bytes for probe in probes),
        "mixed_or_wrong": len(wrong),
        "faults": faults,
        "failed": dict(reasons),
        "origin_requests": counts["requests"],
        "origin_bytes": counts["bytes"],
        "slowest_start_seconds": round(slowest_start, 2),
        "replicas": shares,
        "violations": [*wrong, *violations],
    }


def show(report):
    print(f"seed {report['seed']}: {report['seconds']:.0f} s, {report['requests']} requests at the replicas,"
          f" {report['bytes_verified'] / 1e9:.2f} GB verified, {report['mixed_or_wrong']} wrong")
    print(f"origin: {report['origin_requests']} GETs, {report['origin_bytes'] / 1e9:.2f} GB;"
          f" slowest start after a kill {report['slowest_start_seconds']} s")
    for title in ("faults", "files", "ranges", "failed"):
        print(f"{title}:")
        for what, count in sorted(report[title].items(), key=lambda item: -item[1]):
            print(f"  {count:>8} {what}")
    for name, share in report["replicas"].items():
        print(f"{name}: " + ", ".join(f"{count} {what}" for what, count in share.items()))
    for violation in report["violations"]:
        print(f"VIOLATION {violation}")
    print("ok" if not report["violations"] else f"NOT ok; repeat with --seed {report['seed']}")


if __name__ == "__main__":
    sys.exit(main())

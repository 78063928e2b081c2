"""Hot ranges while others read what is on disk but not in the page cache.

Two objects: a hot one, read by wrk, and a cold one, of which no range is read twice in a run. Each round has three runs: nobody else; readers of
the cold object while it is in the page cache, which shows what sharing the server with them costs; the same readers after its pages were dropped.

wrk's connections pause after each answer, so that neither core is full: of a closed loop, p99 is what the scheduler makes of two full cores, and differs
tenfold between two quiet runs, while a worker that stands still for a moment hardly shows among all the answers of its other moments. The readers
share wrk's core, so they drop what they receive and go last there.
"""

import contextlib
import os
import random
import statistics
import threading
import time

from bench import load, servers
from bench.cold import Connection
from bench.goals import quartiles
from fleet import stack

KIB, MIB = 1 << 10, 1 << 20
HOT = "hot.bin"
HOT_SIZE = 64 * MIB
READERS = 4
#: p99 scatters more than CPU does.
ROUNDS, SECONDS = 7, 2
#: Of each reader; a range every so many seconds.
COLD_RANGE, EVERY = MIB, 0.02


def pages(options, directory):
    results = []
    with stack.Processes(directory) as processes:
        root = servers.make_object(directory, options.object * MIB)
        servers.make_object(directory, HOT_SIZE, HOT)
        origin = servers.Origin(processes, options.origin, root, options.load_cores)
        makers = {"pinrange": lambda: ours(options, processes, directory, origin), "nginx": lambda: nginx(options, processes, root)}
        made = [make() for name, make in makers.items() if name in options.competitors]
        for hot, cold, cold_files in made:
            results.append(measure(options, directory, hot, cold, cold_files))
    return results


def ours(options, processes, directory, origin):
    """The hot object is read first: the segment files of later are the cold one's."""
    cache = directory / "pages"
    cold = servers.pinrange(processes, options.pinrange, origin, cache, options.server_cores)
    hot = cold.at(f"/bench/{HOT}")
    read_all(hot)
    files = set(cache.rglob("*.seg"))
    read_all(cold)
    return hot, cold, sorted(set(cache.rglob("*.seg")) - files)


def nginx(options, processes, root):
    cold = servers.nginx_static(processes, root, options.server_cores)
    return cold.at(f"/{HOT}"), cold, [root / servers.OBJECT]


def read_all(server):
    for start in range(0, server.size, 64 * MIB):
        status, _ = server.read(start, min(start + 64 * MIB, server.size))
        if status != 206:
            raise stack.Broken(f"{server.name} answered {status}")


def measure(options, directory, hot, cold, cold_files):
    for file in cold_files:
        # What is not on the device yet cannot be dropped.
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    rounds, seconds = (max(2, options.rounds), options.seconds) if options.quick else (ROUNDS, SECONDS)
    runs = {"quiet": [], "beside_warm": [], "beside_cold": []}
    read = []
    for number in range(rounds):
        for kind in runs if number % 2 == 0 else reversed(runs):
            disk, begun = servers.disk_bytes_read(hot.process.pid), time.monotonic()
            with Readers(cold, cold_files, kind, number):
                run = load.wrk(directory, hot, 64 * KIB, 16, seconds, options.load_cores, seed=number + 1, paced=True)
            runs[kind].append(run)
            if kind == "beside_cold":
                read.append((servers.disk_bytes_read(hot.process.pid) - disk) / (time.monotonic() - begun))
    row = {"server": hot.name, "cold_bytes_per_second": statistics.median(read)}
    for kind, of_one in runs.items():
        row[f"{kind}_p99_us"] = statistics.median(run.p99_us for run in of_one)
        row[f"{kind}_p999_us"] = statistics.median(run.p999_us for run in of_one)
    for ratio, mine, other in (
        ("beside_warm_ratio", "beside_warm", "quiet"),
        ("beside_cold_ratio", "beside_cold", "quiet"),
        ("cold_to_warm_ratio", "beside_cold", "beside_warm"),
    ):
        row[ratio] = quartiles([run.p99_us / max(beside.p99_us, 1) for run, beside in zip(runs[mine], runs[other])])
    print(row, flush=True)
    return row


class Readers:
    """Threads of this process, which is on the load's cores, each with a range at a time, at a modest pace."""

    def __init__(self, server, files, kind, seed):
        self.server, self.files, self.kind, self.seed = server, files, kind, seed
        self.stop = threading.Event()
        self.failures = []
        starts = list(range(0, server.size - COLD_RANGE, COLD_RANGE))
        random.Random(seed).shuffle(starts)
        #: For all threads together.
        self.starts = iter(starts)

    def __enter__(self):
        number = 0 if self.kind == "quiet" else READERS
        if self.kind == "beside_warm":
            read_through(self.files)
        if self.kind == "beside_cold":
            drop(self.files)
        self.threads = [threading.Thread(target=self.read) for _ in range(number)]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        for thread in self.threads:
            thread.join()
        if self.failures:
            raise self.failures[0]

    def read(self):
        # They are not to take the load's core from wrk.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        connection = Connection(self.server)
        with contextlib.closing(connection.connection):
            for start in self.starts:
                if self.stop.wait(EVERY):
                    return
                try:
                    connection.first_byte(start, start + COLD_RANGE)
                # Whatever it is: of a thread that ends, nobody hears, and what is measured is then not what it is called.
                except Exception as error:
                    self.failures.append(error)
                    return


def drop(files):
    for file in files:
        with open(file, "rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_through(files):
    for file in files:
        with open(file, "rb") as handle:
            while handle.read(4 * MIB):
                pass

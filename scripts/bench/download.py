"""Downloads of a warm object: `pinrange get` against aria2c, curl and the AWS CLI.

The clients take turns, in this order and in the reverse one, and every file is compared with the object after the clock has stopped. curl reads
one stream. aria2c has the sixteen connections that it is usually given, and so has `get` beside its default. The AWS CLI cannot ask pinrange: it
reads from S3, as does one `get`, with the CLI's defaults and through boto3 with sixteen threads. Nobody but `get` makes sure that the file is on the
disk when it ends; what that takes is what "aria2c, sync" takes more than aria2c.
"""

import os
import statistics
import subprocess
import threading
import time

from bench import servers
from fleet import stack

MIB, GIB = 1 << 20, 1 << 30
#: Objects of these sizes show whether memory grows with them.
GROWING = (GIB, 4 * GIB, 10 * GIB)
#: How often a client's memory is looked at while it runs, in seconds.
EVERY = 0.01
ARIA2C = ("aria2c", "--no-conf", "--quiet", "-x16", "-s16", "-k1M", "--file-allocation=none", "--allow-overwrite=true")
BOTO3 = """\
import boto3, sys, boto3.s3.transfer
endpoint, key, to = sys.argv[1:]
sixteen = boto3.s3.transfer.TransferConfig(max_concurrency=16, multipart_chunksize=16 << 20)
boto3.client("s3", endpoint_url=endpoint).download_file("bench", key, to, Config=sixteen)
"""
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "bench",
    "AWS_SECRET_ACCESS_KEY": "bench",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class Run:
    """One program from start to end: wall time, CPU time, peak memory.

    The peak is the kernel's VmHWM, read while the program runs: `ru_maxrss` begins with what the process was before it became the
    program, a copy of this one. What a program takes in its last hundredth of a second is missed."""

    def __init__(self, command, cores, stdout=subprocess.DEVNULL):
        begun = time.monotonic()
        child = subprocess.Popen(
            servers.on(cores, *command), stdout=stdout, stderr=subprocess.PIPE, env={**os.environ, **CREDENTIALS}
        )
        self.peak_rss = 0
        ended = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(child.pid, ended))
        watcher.start()
        errors = child.stderr.read()
        _, status, usage = os.wait4(child.pid, 0)
        self.seconds = time.monotonic() - begun
        ended.set()
        watcher.join()
        child.stderr.close()
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise stack.Broken(f"{' '.join(child.args)} ended with {child.returncode}: {errors.decode()[-500:]}")
        self.cpu = usage.ru_utime + usage.ru_stime

    def _watch(self, pid, ended):
        status = f"/proc/{pid}/status"
        while not ended.wait(EVERY):
            # A shell's child is what counts, taskset becomes it, and a zombie has no memory.
            for process in servers.descendants(pid) if os.path.exists(status) else ():
                try:
                    with open(f"/proc/{process}/status") as lines:
                        peak = next((line for line in lines if line.startswith("VmHWM:")), None)
                except OSError:
                    continue
                if peak:
                    self.peak_rss = max(self.peak_rss, int(peak.split()[1]) << 10)


def download(options, directory):
    """Rows of client, to (disk, memory: tmpfs, pipe), seconds, cpu_seconds, peak_rss_mib. The client names are unique."""
    size = options.object * MIB
    objects = servers.make_object(directory, size)
    with stack.Processes(directory) as processes:
        origin = servers.Origin(processes, options.origin, objects, options.server_cores)
        server = servers.pinrange(processes, options.pinrange, origin, directory / "downloaded", options.server_cores)
        # Into the page cache, and on the disk, so that nobody pays for writing it there.
        for start in range(0, size, 64 * MIB):
            status, _ = server.read(start, min(start + 64 * MIB, size))
            if status != 206:
                raise stack.Broken(f"{server.name} answered {status}")
        rows = to_file(options, origin, server, objects, "disk", directory / "out.bin")
        if free(memory := "/dev/shm") > 2 * size:
            out = os.path.join(memory, f"pinrange-bench-{os.getpid()}")
            rows += to_file(options, origin, server, objects, "memory", out)
        return rows + to_pipe(options, server)


def to_file(options, origin, server, objects, to, out):
    url = f"http://127.0.0.1:{server.port}{server.path}"
    from_s3 = f"{origin.endpoint}/bench/{servers.OBJECT}"
    get = (options.pinrange, "get", "-o", out)
    name, folder = os.path.basename(out), os.path.dirname(out)
    aria2c = (*ARIA2C, "--header", f"If-Match: {server.etag}", "-d", folder, "-o", name, url)
    commands = {
        "get": (*get, url),
        "get -c 16": (*get, "-c", "16", url),
        "aria2c": aria2c,
        "curl": ("curl", "--silent", "--show-error", "--fail", "-H", f"If-Match: {server.etag}", "-o", out, url),
    }
    if to == "disk":
        commands |= {
            "aria2c, sync": ("sh", "-c", '"$@" && sync "$0"', out, *aria2c),
            "get from S3": (*get, from_s3),
            "aws s3 cp from S3": (
                *("aws", "s3", "cp", "--no-progress", "--endpoint-url", origin.endpoint, f"s3://bench/{servers.OBJECT}", out),
            ),
            "boto3 from S3": ("python3", "-c", BOTO3, origin.endpoint, servers.OBJECT, out),
        }
    commands = {client: command for client, command in commands.items() if runs_here(command[0])}
    runs = {client: [] for client in commands}
    for number in range(options.rounds):
        for client in list(commands) if number % 2 == 0 else reversed(commands):
            runs[client].append(Run(commands[client], options.load_cores))
            if not same(out, objects / servers.OBJECT):
                raise stack.Broken(f"{client} made another file")
            # Before the next one begins, the disk has rest.
            os.sync()
            os.unlink(out)
    return [row(client if to == "disk" else f"{client}, {to}", to, of_one) for client, of_one in runs.items()]


def to_pipe(options, server):
    """To standard output, which a reader throws away at once."""
    url = f"http://127.0.0.1:{server.port}{server.path}"
    commands = {
        "get, pipe": (options.pinrange, "get", "-o", "-", url),
        "curl, pipe": ("curl", "--silent", "--show-error", "--fail", "-H", f"If-Match: {server.etag}", url),
    }
    runs = {client: [] for client in commands}
    for number in range(options.rounds):
        for client in list(commands) if number % 2 == 0 else reversed(commands):
            reader = subprocess.Popen(servers.on(options.server_cores, "cat"), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
            runs[client].append(Run(commands[client], options.load_cores, stdout=reader.stdin))
            reader.stdin.close()
            reader.wait()
    return [row(client, "pipe", of_one) for client, of_one in runs.items()]


def memory(options, directory):
    """The peak memory of `get` by the size of the object: nothing but zeros, so that only the downloaded file takes room."""
    rows = []
    out = directory / "grown.bin"
    with stack.Processes(directory) as processes:
        objects = directory / "sparse"
        objects.mkdir(mode=0o755, exist_ok=True)
        for size in GROWING:
            with open(objects / servers.OBJECT, "wb") as file:
                file.truncate(size)
            port = stack.free_port()
            server = servers.nginx_static(processes, objects, options.server_cores, name=f"nginx-{port}")
            url = f"http://127.0.0.1:{server.port}{server.path}"
            for client, command in (
                ("get", (options.pinrange, "get", "-o", out, url)),
                ("get, pipe", (options.pinrange, "get", "-o", "-", url)),
            ):
                if free(directory) < 2 * size and "pipe" not in client:
                    continue
                run = Run(command, options.load_cores)
                out.unlink(missing_ok=True)
                rows.append({"client": client, "size": size, "seconds": run.seconds, "peak_rss_mib": run.peak_rss / MIB})
                print(rows[-1], flush=True)
    return rows


def row(client, to, runs):
    found = {
        "client": client,
        "to": to,
        "seconds": statistics.median(run.seconds for run in runs),
        "cpu_seconds": statistics.median(run.cpu for run in runs),
        "peak_rss_mib": max(run.peak_rss for run in runs) / MIB,
    }
    print(found, flush=True)
    return found


def same(one, other):
    with open(one, "rb", buffering=0) as left, open(other, "rb", buffering=0) as right:
        while True:
            mine, theirs = left.read(4 * MIB), right.read(4 * MIB)
            if mine != theirs:
                return False
            if not mine:
                return True


def free(path):
    if not os.path.isdir(path):
        return 0
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def runs_here(program):
    """Whether the program is there and starts: the AWS CLI and boto3 may be missing."""
    check = [program, "-c", "import boto3"] if program == "python3" else [program, "--version"]
    if program == "sh":
        check = ["true"]
    try:
        found = subprocess.run(check, capture_output=True, timeout=60).returncode == 0
    except OSError:
        found = False
    if not found:
        print(f"no {' '.join(check)}: left out", flush=True)
    return found

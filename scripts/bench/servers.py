"""The servers that are compared. Each is started on loopback, pinned to the server's cores, configured by a file in configs/, and measured by
its processes' CPU time."""

import contextlib
import copy
import http.client
import json
import os
import pathlib
import shutil
import string
import subprocess
import time
import urllib.parse

from fleet import stack

MIB = 1 << 20
OBJECT = "object.bin"
CONFIGS = pathlib.Path(__file__).with_name("configs")


def descendants(pid):
    """A process and all below it: nginx, Varnish and Traffic Server work in children."""
    found = [pid]
    for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            for child in (task / "children").read_text().split():
                found += descendants(int(child))
    return found


def cpu_seconds(pid):
    """User and system time of a process and its children, from the clock that the kernel keeps for each process. It counts what /proc shows in
    hundredths of a second, in nanoseconds, and threads that have ended."""
    seconds = 0.0
    for process in descendants(pid):
        with contextlib.suppress(OSError):
            # clock_getcpuclockid(3), which Python has for threads only.
            seconds += time.clock_gettime(~process << 3 | 2)
    return seconds


def rss_bytes(pid):
    """Resident memory without the pages of files that are mapped; what processes share counts once."""
    total = 0
    for process in descendants(pid):
        with contextlib.suppress(OSError):
            for line in pathlib.Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
                if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                    total += int(line.split()[1]) << 10
    return total


def disk_bytes_read(pid):
    """What a process and its children had read from the device, beside the page cache."""
    total = 0
    for process in descendants(pid):
        with contextlib.suppress(OSError):
            for line in pathlib.Path(f"/proc/{process}/io").read_text().splitlines():
                if line.startswith("read_bytes:"):
                    total += int(line.split()[1])
    return total


class Config(string.Template):
    """Configurations are full of dollars."""

    delimiter = "@"


def configured(name, target, **values):
    """Writes a file of configs/ with its blanks filled in."""
    target.write_text(Config((CONFIGS / name).read_text()).substitute(values))
    return target


def make_object(directory, size, name=OBJECT):
    """An object that no other one is like, in the directory of the objects: that is given back."""
    root = pathlib.Path(directory) / "objects"
    root.mkdir(mode=0o755, exist_ok=True)
    if not (root / name).exists():
        piece = os.urandom(MIB)
        with open(root / name, "wb") as file:
            for number in range(size // MIB):
                file.write(number.to_bytes(8, "little") + piece[8:])
    return root


class Server:
    """What the load needs to know of a server: where it is and what it calls the object."""

    name = ""

    def __init__(self, processes, name, command, port, path, env=None):
        self.name, self.port, self.path = name, port, path
        self.process = processes.start(name, command, env)
        processes.wait_until(name, self.process, lambda: self.head()[0] == 200)
        _, headers = self.head()
        self.etag, self.size = headers["ETag"], int(headers["Content-Length"])

    def head(self, path=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request("HEAD", path or self.path)
            response = connection.getresponse()
            response.read()
            return response.status, response.headers

    def read(self, start, end, path=None):
        """One pinned range."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        with contextlib.closing(connection):
            headers = {"Range": f"bytes={start}-{end - 1}"}
            if self.etag:
                headers["If-Match"] = self.etag
            connection.request("GET", path or self.path, headers=headers)
            response = connection.getresponse()
            return response.status, response.read()

    def at(self, path):
        """The same server, and another object of it."""
        other = copy.copy(self)
        other.path = path
        _, headers = other.head()
        other.etag, other.size = headers["ETag"], int(headers["Content-Length"])
        return other

    def cpu(self):
        return cpu_seconds(self.process.pid)

    def rss(self):
        return rss_bytes(self.process.pid)


def on(cores, *command):
    return ["taskset", "-c", cores, *map(str, command)]


def core_list(cores):
    """Of what taskset takes: 0-2,5."""
    found = []
    for part in cores.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


class Origin:
    """The strict S3 over a directory, as slow as it is told to be."""

    def __init__(self, processes, program, directory, cores):
        log = processes.enter_context(open(processes.directory / "origin.log", "wb"))
        self.process = processes.enter_context(
            subprocess.Popen(
                on(cores, program, directory), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        )
        processes.callback(self.process.kill)
        line = self.process.stdout.readline()
        if not line:
            raise stack.Broken(f"the origin did not start: {(processes.directory / 'origin.log').read_text()}")
        self.endpoint = line.strip()
        self.port = urllib.parse.urlsplit(self.endpoint).port

    def pace(self, first_byte_ms, bytes_per_second):
        self.ask(f"{first_byte_ms} {bytes_per_second}")

    def ask(self, line=""):
        """What it did so far."""
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


class Direct(Server):
    """The origin itself, which takes requests without a signature."""

    def __init__(self, origin):
        self.name, self.port, self.path = "direct", origin.port, f"/bench/{OBJECT}"
        self.process = origin.process
        _, headers = self.head()
        self.etag, self.size = headers["ETag"], int(headers["Content-Length"])


def pinrange(processes, binary, origin, cache, cores, threads=1, name="pinrange", part="8MiB", log="warn", capacity="64GiB"):
    port, admin = stack.free_port(), stack.free_port()
    config = configured(
        "pinrange.toml",
        processes.directory / f"{name}.toml",
        port=port,
        admin=admin,
        threads=threads,
        cache=cache,
        capacity=capacity,
        part=part,
        endpoint=origin.endpoint,
    )
    env = {
        "AWS_ACCESS_KEY_ID": "bench",
        "AWS_SECRET_ACCESS_KEY": "bench",
        "AWS_EC2_METADATA_DISABLED": "true",
        "PINRANGE_LOG": log,
    }
    server = Server(processes, name, on(cores, binary, "serve", "--config", config), port, f"/bench/{OBJECT}", env)
    server.admin = admin
    return server


def relay(processes, program, origin, cache, cores, keeps=True):
    """The least that copies from the origin to a client, through a file where it `keeps`. What it sends are the origin's own answers."""
    port, name = stack.free_port(), "relay" if keeps else "relay-memory"
    pathlib.Path(cache).mkdir(exist_ok=True)
    command = on(cores, program, f"127.0.0.1:{port}", f"127.0.0.1:{origin.port}", cache, *([] if keeps else ["memory"]))
    return Server(processes, name, command, port, f"/bench/{OBJECT}")


def calls(processes, program, root, cores, name="calls"):
    """What makes pinrange's system calls and nothing else; `calls-` and a way: those of that way."""
    port = stack.free_port()
    way = name.split("-")[1:]
    command = on(cores, program, f"127.0.0.1:{port}", root / OBJECT, *way)
    return Server(processes, name, command, port, f"/{OBJECT}")


def nginx(processes, name, cores, path, config, **values):
    directory = processes.directory / name
    directory.mkdir()
    # Its workers run as another user than root, and read what is in here.
    directory.chmod(0o755)
    port = stack.free_port()
    config = configured(config, directory / "nginx.conf", directory=directory, port=port, **values)
    command = on(cores, program("nginx"), "-c", config, "-e", directory / "error.log", "-p", directory)
    return Server(processes, name, command, port, path)


def nginx_static(processes, root, cores, threads=1, name="nginx"):
    return nginx(processes, name, cores, f"/{OBJECT}", "nginx-static.conf", threads=threads, root=root)


def nginx_slice(processes, origin, cache, cores, threads=1, name="nginx-slice"):
    path = f"/bench/{OBJECT}"
    return nginx(processes, name, cores, path, "nginx-slice.conf", threads=threads, cache=cache, origin=origin.port)


def varnish(processes, origin, cores, name="varnish"):
    """A thread for each request in flight, whatever the number of our workers; they share its cores."""
    port = stack.free_port()
    vcl = configured("varnish.vcl", processes.directory / f"{name}.vcl", origin=origin.port)
    command = [program("varnishd"), "-F", "-n", processes.directory / name, "-a", f"127.0.0.1:{port}", "-f", vcl, "-s", "malloc,4G"]
    for parameter in ("thread_pool_min=100", "timeout_idle=3600"):
        command += ["-p", parameter]
    return Server(processes, name, on(cores, *command), port, f"/bench/{OBJECT}")


def traffic_server(processes, origin, cache, cores, threads=1, name="traffic-server", memory=4 << 30):
    """Its own tree of directories; what is not said in configs/ is as it is by default. Cache on disk, and the whole object in memory above it."""
    directory = processes.directory / name
    etc = directory / "etc"
    etc.mkdir(parents=True)
    pathlib.Path(cache).mkdir(exist_ok=True)
    port = stack.free_port()
    system = {"bindir": "/usr/bin", "sbindir": "/usr/bin", "libdir": "/usr/lib/trafficserver",
              "libexecdir": "/usr/lib/trafficserver/modules", "datadir": "/usr/share/trafficserver", "includedir": "/usr/include",
              "mandir": "/usr/share/man", "infodir": "/usr/share/info"}
    own = {"prefix": directory, "sysconfdir": etc, "localstatedir": directory, "runtimedir": directory, "logdir": directory,
           "cachedir": cache}
    (directory / "runroot.yaml").write_text("".join(f"{key}: {path}\n" for key, path in {**system, **own}.items()))
    configured("traffic-server.records", etc / "records.config", port=port, threads=threads, memory=memory)
    (etc / "storage.config").write_text(f"{cache} 4G\n")
    (etc / "remap.config").write_text(f"map / http://127.0.0.1:{origin.port}/\n")
    shutil.copy("/etc/trafficserver/ip_allow.yaml", etc)
    command = on(cores, program("traffic_server"))
    return Server(processes, name, command, port, f"/bench/{OBJECT}", {"TS_RUNROOT": str(directory)})


def program(name):
    """Debian keeps servers where a user's PATH does not look."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/usr/bin") or stack.program(name)

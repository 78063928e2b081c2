"""The servers that are compared. Each is started on loopback, pinned to the server's cores, and measured by its processes' CPU time."""

import contextlib
import http.client
import json
import os
import pathlib
import shutil
import subprocess
import urllib.parse

from fleet import stack

TICK = os.sysconf("SC_CLK_TCK")
OBJECT = "object.bin"


def descendants(pid):
    """A process and all below it: nginx, Varnish and Traffic Server work in children."""
    found = [pid]
    for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            for child in (task / "children").read_text().split():
                found += descendants(int(child))
    return found


def cpu_seconds(pid):
    """User and system time of a process and its children, to a hundredth of a second."""
    ticks = 0
    for process in descendants(pid):
        with contextlib.suppress(OSError):
            fields = pathlib.Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / TICK


def rss_bytes(pid):
    """Resident memory without the pages of files that are mapped."""
    total = 0
    for process in descendants(pid):
        with contextlib.suppress(OSError):
            for line in pathlib.Path(f"/proc/{process}/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    total += int(line.split()[1]) << 10
    return total


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

    def cpu(self):
        return cpu_seconds(self.process.pid)

    def rss(self):
        return rss_bytes(self.process.pid)


def on(cores, *command):
    return ["taskset", "-c", cores, *map(str, command)]


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


def pinrange(processes, binary, origin, cache, cores, threads=1, name="pinrange", part="16MiB", log="warn", capacity="64GiB"):
    port, admin = stack.free_port(), stack.free_port()
    config = processes.directory / f"{name}.toml"
    config.write_text(f"""\
[server]
listen = "127.0.0.1:{port}"
admin = "127.0.0.1:{admin}"
worker_threads = {threads}
[cache]
dir = "{cache}"
capacity = "{capacity}"
min_free = "1%"
part_size = "{part}"
[[mount]]
path = "/bench"
bucket = "bench"
endpoint = "{origin.endpoint}"
region = "us-east-1"
path_style = true
fresh_for = "1h"
""")
    env = {
        "AWS_ACCESS_KEY_ID": "bench",
        "AWS_SECRET_ACCESS_KEY": "bench",
        "AWS_EC2_METADATA_DISABLED": "true",
        "PINRANGE_LOG": log,
    }
    server = Server(processes, name, on(cores, binary, "serve", "--config", config), port, f"/bench/{OBJECT}", env)
    server.admin = admin
    return server


NGINX = """\
worker_processes {threads};
error_log {directory}/error.log warn;
pid {directory}/nginx.pid;
daemon off;
events {{ worker_connections 8192; }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush off;
    tcp_nodelay on;
    keepalive_requests 1000000000;
    keepalive_timeout 1h;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    {http}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        {server}
    }}
}}
"""


def nginx(processes, name, cores, threads, path, http, server):
    binary = shutil.which("nginx") or stack.program("/usr/sbin/nginx")
    directory = processes.directory / name
    directory.mkdir()
    # Its workers run as another user than root, and read what is in here.
    directory.chmod(0o755)
    port = stack.free_port()
    config = directory / "nginx.conf"
    config.write_text(NGINX.format(directory=directory, threads=threads, port=port, http=http, server=server))
    command = on(cores, binary, "-c", config, "-e", directory / "error.log", "-p", directory)
    return Server(processes, name, command, port, path)


def nginx_static(processes, root, cores, threads=1, name="nginx"):
    """Static files, the way nginx is fastest."""
    return nginx(
        processes,
        name,
        cores,
        threads,
        f"/{OBJECT}",
        "open_file_cache max=1000 inactive=1h; open_file_cache_valid 1h;",
        f"location / {{ root {root}; }}",
    )


def nginx_slice(processes, origin, cache, cores, threads=1, name="nginx-slice"):
    """1 MiB slices in a proxy cache with a lock: nginx's way to cache ranges."""
    return nginx(
        processes,
        name,
        cores,
        threads,
        f"/bench/{OBJECT}",
        f"proxy_cache_path {cache} keys_zone=slices:64m max_size=64g inactive=1d use_temp_path=off;"
        f"upstream origin {{ server 127.0.0.1:{origin.port}; keepalive 64; }}",
        """location / {
            slice 1m;
            proxy_cache slices;
            proxy_cache_key $uri$is_args$args$slice_range;
            proxy_cache_lock on;
            proxy_cache_valid 200 206 1h;
            proxy_set_header Range $slice_range;
            proxy_set_header Connection "";
            proxy_http_version 1.1;
            proxy_pass http://origin;
        }""",
    )


def varnish(processes, origin, cores, name="varnish"):
    """Keeps whole objects in memory; ranges are cut from them."""
    directory = processes.directory / name
    vcl = processes.directory / "varnish.vcl"
    vcl.write_text(f"""\
vcl 4.1;
backend origin {{ .host = "127.0.0.1"; .port = "{origin.port}"; .first_byte_timeout = 300s; }}
sub vcl_backend_response {{ set beresp.ttl = 1h; set beresp.do_stream = true; }}
""")
    port = stack.free_port()
    binary = shutil.which("varnishd") or stack.program("/usr/sbin/varnishd")
    command = on(
        cores, binary, "-F", "-n", directory, "-a", f"127.0.0.1:{port}", "-f", vcl, "-s", "malloc,4G", "-p", "thread_pool_min=100"
    )
    return Server(processes, name, command, port, f"/bench/{OBJECT}")

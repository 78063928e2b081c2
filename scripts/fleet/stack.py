"""The processes of a run: Garage, the replicas and HAProxy. Each is ended by its pid when the run ends, however it does."""

import contextlib
import datetime
import hashlib
import hmac
import http.client
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import time

from .frame import Broken

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
BUCKET = "snapshots"
OBJECT = "fleet.bin"
REGION = "garage"
KEY = "GK" + "a" * 24
SECRET = "b" * 64


def program(name):
    """The path of a program, which may be a path already."""
    path = shutil.which(name)
    if path is None:
        raise Broken(f"{name} is not on PATH")
    return path


_handed_out = set()


def free_port():
    """Never the same one twice: whoever got it may not listen yet, and the system would give it again."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        if port not in _handed_out:
            _handed_out.add(port)
            return port


class Processes(contextlib.ExitStack):
    """Starts servers, with a log file each, and ends them in reverse order."""

    def __init__(self, directory):
        super().__init__()
        self.directory = directory
        self.exit_codes = {}

    def start(self, name, command, env=None):
        # Appended to: a server that is started again goes on in the same log.
        log = self.enter_context(open(self.directory / f"{name}.log", "ab"))
        self.exit_codes.pop(name, None)
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **(env or {})}
        )
        self.callback(self._end, name, process)
        return process

    def end(self, name, process, how=signal.SIGTERM):
        """Ends one process now, and waits for it. What is started under its name later is another one."""
        process.send_signal(how)
        process.wait(20)
        self.exit_codes[name] = process.returncode

    def _end(self, name, process):
        if name in self.exit_codes and process.poll() is not None:
            return
        already = process.poll()
        if already is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.exit_codes[name] = f"{already}, before it was told to" if already is not None else process.returncode

    def wait_until(self, name, process, ready):
        """Asks until `ready()` is true: connections are refused while a server starts, and there is nothing to await."""
        give_up = time.monotonic() + 20
        while time.monotonic() < give_up and process.poll() is None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if ready():
                    return
            time.sleep(0.05)
        tail = (self.directory / f"{name}.log").read_text(errors="replace")[-2000:]
        state = "is not ready after 20 s" if process.poll() is None else f"ended with {process.returncode}"
        raise Broken(f"{name} {state}; its log ends:\n{tail}")


def status_of(port, path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    with contextlib.closing(connection):
        connection.request("GET", path)
        return connection.getresponse().status


class Garage:
    """A real S3 server with one bucket. Its website listener serves the bucket to anyone, for runs without pinrange."""

    def __init__(self, processes, directory):
        self.s3_port, rpc_port, self.web_port = free_port(), free_port(), free_port()
        self._config = directory / "garage.toml"
        self._config.write_text(f"""\
metadata_dir = "{directory}/garage/meta"
data_dir = "{directory}/garage/data"
db_engine = "sqlite"
replication_factor = 1
compression_level = "none"
metadata_fsync = false
data_fsync = false
rpc_bind_addr = "127.0.0.1:{rpc_port}"
rpc_public_addr = "127.0.0.1:{rpc_port}"
[s3_api]
s3_region = "{REGION}"
api_bind_addr = "127.0.0.1:{self.s3_port}"
[s3_web]
bind_addr = "127.0.0.1:{self.web_port}"
root_domain = ".web.localhost"
""")
        self._env = {
            "GARAGE_RPC_SECRET": "c" * 64,
            "GARAGE_DEFAULT_ACCESS_KEY": KEY,
            "GARAGE_DEFAULT_SECRET_KEY": SECRET,
            "GARAGE_DEFAULT_BUCKET": BUCKET,
            "RUST_LOG": "garage=warn",
        }
        self._garage = [program("garage"), "-c", str(self._config)]
        process = processes.start("garage", [*self._garage, "server", "--single-node", "--default-bucket"], self._env)
        processes.wait_until("garage", process, lambda: self.signed("GET", f"/{BUCKET}")[0] == 200)

    def publish(self):
        """Lets anyone read the bucket at `http://localhost:{web_port}/`: Garage takes the bucket's name from the host."""
        for command in (["bucket", "alias", BUCKET, "localhost"], ["bucket", "website", "--allow", BUCKET]):
            subprocess.run([*self._garage, *command], env={**os.environ, **self._env}, check=True, capture_output=True)

    def put(self, key, body):
        """Uploads one object; gives its ETag."""
        status, headers, answer = self.signed("PUT", f"/{BUCKET}/{key}", body)
        if status != 200:
            raise Broken(f"Garage answered a PUT with {status}: {answer[:500]!r}")
        return headers["ETag"]

    def overwrite(self, source, target=OBJECT):
        """Puts the bytes of another key into the object, by a copy inside Garage: that takes milliseconds at any size."""
        copy = {"x-amz-copy-source": f"/{BUCKET}/{source}"}
        status, _, answer = self.signed("PUT", f"/{BUCKET}/{target}", extra=copy)
        if status != 200 or b"CopyObjectResult" not in answer:
            raise Broken(f"Garage answered a copy with {status}: {answer[:500]!r}")

    def signed(self, method, path, body=None, extra=None):
        """One request with AWS signature version 4, the payload left out of it: Garage hashes it anyway for its ETag."""
        now = datetime.datetime.now(datetime.timezone.utc)
        day, stamp = now.strftime("%Y%m%d"), now.strftime("%Y%m%dT%H%M%SZ")
        headers = {
            "host": f"127.0.0.1:{self.s3_port}",
            "x-amz-content-sha256": "UNSIGNED-PAYLOAD",
            "x-amz-date": stamp,
        }
        headers = dict(sorted({**headers, **(extra or {})}.items()))
        names = ";".join(headers)
        fields = "".join(f"{name}:{value}\n" for name, value in headers.items())
        canonical = f"{method}\n{path}\n\n{fields}\n{names}\nUNSIGNED-PAYLOAD"
        scope = f"{day}/{REGION}/s3/aws4_request"
        to_sign = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
        key = f"AWS4{SECRET}".encode()
        for step in (day, REGION, "s3", "aws4_request", to_sign):
            key = hmac.digest(key, step.encode(), "sha256")
        headers["authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={KEY}/{scope}, SignedHeaders={names}, Signature={key.hex()}"
        )
        connection = http.client.HTTPConnection("127.0.0.1", self.s3_port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.headers, response.read()


class Replica:
    """One replica, which can be killed and started again over the same directory."""

    def __init__(self, processes, directory, number, binary, endpoint, cache, capacity, part):
        self.number, self.name = number, f"replica{number}"
        self.port, self.admin, self.cache = free_port(), free_port(), cache
        self._processes = processes
        config = directory / f"{self.name}.toml"
        config.write_text(f"""\
[server]
listen = "127.0.0.1:{self.port}"
admin = "127.0.0.1:{self.admin}"
drain_timeout = "10s"
[cache]
dir = "{cache}"
capacity = "{capacity}"
min_free = "1%"
part_size = {part}
[[mount]]
path = "/{BUCKET}"
bucket = "{BUCKET}"
endpoint = "http://127.0.0.1:{endpoint}"
region = "{REGION}"
path_style = true
""")
        self._command = [binary, "serve", "--config", str(config)]
        self.start()

    def start(self):
        """Starts it; gives the seconds until it was ready."""
        begun = time.monotonic()
        env = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
        self.process = self._processes.start(self.name, self._command, env)
        self._processes.wait_until(self.name, self.process, lambda: status_of(self.admin, "/readyz") == 200)
        return time.monotonic() - begun

    def kill(self):
        """What power loss looks like to the process."""
        self._processes.end(self.name, self.process, signal.SIGKILL)

    def metrics(self):
        return _text(self.admin, "/metrics")


class Fleet:
    """Replicas of pinrange behind HAProxy, which runs the configuration that we ship."""

    def __init__(self, processes, directory, binary, endpoint, size, capacity, caches=None):
        """`endpoint`: the port of the S3 that they ask. `caches`: a directory for each replica."""
        # Every replica gets a share even of a small object. Parts keep within a stretch.
        stretch = max(1 << 20, min(64 << 20, size // 8))
        part = min(16 << 20, stretch)
        self.port, self._stats_port = free_port(), free_port()
        env = {
            "PINRANGE_FRONTEND": f"127.0.0.1:{self.port}",
            "PINRANGE_STATS": f"127.0.0.1:{self._stats_port}",
            "PINRANGE_STRETCH": str(stretch),
        }
        self.replicas = []
        for number in (1, 2, 3):
            cache = caches[number - 1] if caches else directory / f"cache{number}"
            replica = Replica(processes, directory, number, binary, endpoint, cache, capacity, part)
            self.replicas.append(replica)
            env[f"PINRANGE_{number}"] = f"127.0.0.1:{replica.port}"
            env[f"PINRANGE_{number}_ADMIN_PORT"] = str(replica.admin)
        # Debian keeps it where only root's PATH looks.
        haproxy = shutil.which("haproxy") or program("/usr/sbin/haproxy")
        process = processes.start("haproxy", [haproxy, "-db", "-f", str(REPOSITORY / "deploy/haproxy.cfg")], env)
        processes.wait_until("haproxy", process, lambda: status_of(self._stats_port, "/healthz") == 200)

    def shares(self):
        """What each replica answered, as HAProxy counted it."""
        text = _text(self._stats_port, "/metrics")
        return {
            f"replica{number}": {
                **{
                    code: _sample(text, "haproxy_server_http_responses_total", f"replica{number}", f'code="{code}"')
                    for code in ("2xx", "4xx", "5xx")
                },
                "bytes": _sample(text, "haproxy_server_bytes_out_total", f"replica{number}"),
                "retried": _sample(text, "haproxy_server_retry_warnings_total", f"replica{number}"),
            }
            for number in (1, 2, 3)
        }


def _text(port, path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", path)
        return connection.getresponse().read().decode()


def _sample(text, metric, server, label=""):
    pattern = rf'^{metric}\{{[^}}]*server="{server}"[^}}]*{label}[^}}]*\}} (\S+)$'
    found = re.search(pattern, text, re.MULTILINE)
    if found is None:
        raise Broken(f"HAProxy shows no {metric} of {server}")
    return int(float(found[1]))

"""The clients: what people download big files with, each in a thread, one download after the other.

A download ends in one of three ways:

- finished: the client says that it has the file. The file is then judged.
- refused: the server said 412, because the revision is gone.
- failed: anything else, such as 503 or a connection that was cut. Allowed, but reported by kind.

What is never allowed is a violation: a finished file that is not the pinned revision, or an answer whose label contradicts the pin.
"""

import collections
import concurrent.futures
import contextlib
import http.client
import os
import pathlib
import subprocess
import threading
import time

Attempt = collections.namedtuple("Attempt", "phase outcome detail seconds")

# No download of a healthy stack takes so long; a hang is reported as a failure, not waited for.
PATIENCE = 60


class Ended(Exception):
    """A download that did not finish."""

    def __init__(self, outcome, detail):
        super().__init__(detail)
        self.outcome, self.detail = outcome, detail


class Violation(Exception):
    """An answer that breaks a promise."""


class Client(threading.Thread):
    """Downloads until it is told to stop. Subclasses say how."""

    name = ""

    def __init__(self, host, port, path, directory, revisions, phase):
        super().__init__(name=self.name)
        self.host, self.port, self.path = host, port, path
        self.url = f"http://{host}:{port}{path}"
        self.file = pathlib.Path(directory) / f"{self.name}.bin"
        self.revisions, self.phase = revisions, phase
        self.stopping = threading.Event()
        self.attempts, self.violations = [], []
        self._children = set()

    def download(self):
        """Leaves the file and gives its pin, or None if the client keeps that to itself; else raises."""
        raise NotImplementedError

    def run(self):
        while not self.stopping.is_set():
            phase, begun = self.phase(), time.monotonic()
            try:
                pin = self.download()
                seconds = time.monotonic() - begun
                wrong = self.revisions.judge(self.file, pin)
                if wrong is None:
                    self.attempts.append(Attempt(phase, "finished", "", seconds))
                else:
                    self.attempts.append(Attempt(phase, "violation", wrong, seconds))
                    self.violations.append(wrong)
            except Violation as violation:
                self.attempts.append(Attempt(phase, "violation", str(violation), time.monotonic() - begun))
                self.violations.append(str(violation))
            except Ended as ended:
                # What was broken off by the end of the run says nothing.
                if not self.stopping.is_set():
                    self.attempts.append(Attempt(phase, ended.outcome, ended.detail, time.monotonic() - begun))
            except OSError as error:
                if not self.stopping.is_set():
                    self.attempts.append(Attempt(phase, "failed", type(error).__name__, time.monotonic() - begun))
            finally:
                self.file.unlink(missing_ok=True)

    def kill(self):
        """Ends the programs that are still running for this client."""
        self.stopping.set()
        for child in list(self._children):
            with contextlib.suppress(ProcessLookupError):
                child.kill()

    def learn(self):
        """Asks what the object is now: its ETag and its size."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request("HEAD", self.path)
            response = connection.getresponse()
            response.read()
            if response.status != 200:
                raise Ended("failed", f"HEAD: {response.status}")
            return response.headers["ETag"], int(response.headers["Content-Length"])

    def spawn(self, *command):
        child = subprocess.Popen(
            [str(word) for word in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self._children.add(child)
        return child

    def finish(self, child):
        """Waits for a program; gives its exit code and what it said."""
        try:
            said, _ = child.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            raise Ended("failed", f"hung for {PATIENCE} s") from None
        finally:
            self._children.discard(child)
        return child.returncode, said.decode(errors="replace")


class Get(Client):
    """`pinrange get`, 16-way. It pins by itself, and starts over by itself when the object is replaced."""

    name = "get"
    binary = None
    KEPT_CHANGING = 75

    def download(self):
        code, said = self.finish(self.spawn(self.binary, "get", self.url, "-o", self.file, "-c", "16"))
        if code == 0:
            return None
        # Its state stays, so that the next attempt begins as a resumption.
        if code == self.KEPT_CHANGING:
            raise Ended("refused", "replaced too often")
        last = said.strip().splitlines()[-1:] or [""]
        raise Ended("failed", f"exit {code}: {last[0][:300]}")


class Aria2(Client):
    """aria2c with 16 connections, pinned by a header, which it repeats on every range."""

    name = "aria2c"

    def arguments(self):
        pin, _ = self.learn()
        return pin, ["--header", f"If-Match: {pin}"]

    def download(self):
        pin, extra = self.arguments()
        code, said = self.finish(
            self.spawn(
                *"aria2c --no-conf -x16 -s16 -k1M --file-allocation=none --allow-overwrite=true".split(),
                *"--auto-file-renaming=false --summary-interval=0 --show-console-readout=false".split(),
                *["--console-log-level=warn", "--max-tries=2", *extra, "-d", self.file.parent, "-o", self.file.name],
                self.url,
            )
        )
        self.file.with_name(f"{self.file.name}.aria2").unlink(missing_ok=True)
        if code == 0:
            return pin
        # aria2 takes the revision's absence for any other bad answer, so its words decide.
        if "412" in said or "Precondition" in said:
            raise Ended("refused", "412")
        raise Ended("failed", f"exit {code}: {_first_error(said)}")


class UnpinnedAria2(Aria2):
    """aria2c as people run it. Part of the control: its files get mixed, and the judge must say so."""

    name = "aria2c-unpinned"

    def arguments(self):
        return None, []


class Curl(Client):
    """Four curls at once, each with a quarter and the pin."""

    name = "curl"
    HTTP_ERROR = 22

    def download(self):
        pin, size = self.learn()
        quarter = -(-size // 4)
        pieces = [self.file.with_suffix(f".{index}") for index in range(4)]
        children = [
            self.spawn(
                *"curl --silent --show-error --fail --no-buffer".split(),
                *["-H", f"If-Match: {pin}", "-r", f"{i * quarter}-{min(size, (i + 1) * quarter) - 1}", "-o", piece],
                self.url,
            )
            for i, piece in enumerate(pieces)
        ]
        try:
            results = [self.finish(child) for child in children]
            for code, said in results:
                if code == self.HTTP_ERROR and "412" in said:
                    raise Ended("refused", "412")
                if code != 0:
                    raise Ended("failed", f"exit {code}: {said.strip()[:200]}")
            with open(self.file, "wb") as whole:
                for piece in pieces:
                    whole.write(piece.read_bytes())
            return pin
        finally:
            for child in children:
                if child.poll() is None:
                    child.kill()
                    child.communicate()
                self._children.discard(child)
            for piece in pieces:
                piece.unlink(missing_ok=True)


class Ranges(Client):
    """The S3 SDKs' way (s3transfer): HEAD, then 8 MiB ranges over ten connections, each with `If-Match`, and up to five
    attempts for a range that breaks off. Its answers' labels are checked one by one."""

    name = "ranges"
    PART = 8 << 20
    THREADS = 10
    ATTEMPTS = 5

    def learn_pin(self):
        return self.learn()

    def download(self):
        pin, size = self.learn_pin()
        connections = threading.local()
        with open(self.file, "wb") as file:
            file.truncate(size)
            with concurrent.futures.ThreadPoolExecutor(self.THREADS) as pool:
                parts = [
                    pool.submit(self._part, connections, file.fileno(), pin, start, min(start + self.PART, size), size)
                    for start in range(0, size, self.PART)
                ]
                try:
                    for part in concurrent.futures.as_completed(parts):
                        part.result()
                finally:
                    pool.shutdown(cancel_futures=True)
        return pin

    def _part(self, connections, descriptor, pin, start, end, size):
        for _ in range(self.ATTEMPTS):
            if not hasattr(connections, "own"):
                connections.own = http.client.HTTPConnection(self.host, self.port, timeout=PATIENCE)
            try:
                headers = {"Range": f"bytes={start}-{end - 1}"}
                if pin is not None:
                    headers["If-Match"] = pin
                connections.own.request("GET", self.path, headers=headers)
                response = connections.own.getresponse()
                body = response.read()
            except (http.client.HTTPException, OSError) as error:
                broken = type(error).__name__
                connections.own.close()
                continue
            if response.status == 412:
                raise Ended("refused", "412")
            if response.status != 206:
                raise Ended("failed", f"GET: {response.status}")
            label = response.headers["ETag"], response.headers["Content-Range"]
            if pin is not None and label != (pin, f"bytes {start}-{end - 1}/{size}"):
                raise Violation(f"asked for bytes {start}-{end - 1} of {pin}, was answered {label}")
            os.pwrite(descriptor, body, start)
            return
        raise Ended("failed", f"a range broke off {self.ATTEMPTS} times, at last: {broken}")


class UnpinnedRanges(Ranges):
    """The same without a pin, as s5cmd, pyarrow and others do it. With few threads, so that a download outlasts a revision:
    the surest part of the control."""

    name = "ranges-unpinned"
    THREADS = 2

    def learn_pin(self):
        _, size = self.learn()
        return None, size


def _first_error(said):
    lines = [line for line in said.splitlines() if "error" in line.lower() or "cause" in line.lower()]
    return (lines or ["said nothing"])[0].strip()[:200]

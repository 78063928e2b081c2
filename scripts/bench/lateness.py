"""How far behind the remote two clients of one fill are: an S3 of one object that notes when it sends, and the clients, in one loop and by one clock.

The first client asks for a part that nobody holds; the second asks for the same when the first has a mebibyte. From then on both send
behind the fill's cursor. What is noted of each [`MARK`] bytes: when the source had sent them, and when each client had them all.
"""

import concurrent.futures
import contextlib
import selectors
import socket
import time

MARK = 64 << 10
JOIN = 1 << 20


class Source:
    """Answers GETs of ranges of one object of zeros, `rate` bytes a second."""

    def __init__(self, selector, size, rate):
        self.selector, self.size, self.rate = selector, size, rate
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)
        self.endpoint = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.sending = {}
        #: The position in the object of each piece's end, and when it was sent.
        self.sent = []
        self.piece = memoryview(bytes(MARK))
        selector.register(self.listener, selectors.EVENT_READ, self.accept)

    def close(self):
        for connection in [*self.sending]:
            self.drop(connection)
        self.selector.unregister(self.listener)
        self.listener.close()

    def accept(self, _):
        connection, _ = self.listener.accept()
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sending[connection] = {"head": b"", "at": 0, "end": 0, "due": 0.0}
        self.selector.register(connection, selectors.EVENT_READ, self.heard)

    def drop(self, connection):
        self.selector.unregister(connection)
        del self.sending[connection]
        connection.close()

    def heard(self, connection):
        state = self.sending[connection]
        try:
            more = connection.recv(65536)
        except OSError:
            more = b""
        if not more:
            return self.drop(connection)
        state["head"] += more
        if b"\r\n\r\n" not in state["head"]:
            return
        request, fields = state["head"].decode().split("\r\n", 1)
        state["head"] = b""
        wanted = [line.split("=", 1)[1] for line in fields.lower().split("\r\n") if line.startswith("range:")]
        first, last = 0, self.size - 1
        if wanted:
            begin, end = wanted[0].split("-")
            first, last = int(begin), min(int(end), self.size - 1)
        status = f"206 Partial Content\r\nContent-Range: bytes {first}-{last}/{self.size}" if wanted else "200 OK"
        connection.send(
            f'HTTP/1.1 {status}\r\nContent-Length: {last + 1 - first}\r\nETag: "late"\r\n'
            "Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n\r\n".encode()
        )
        if not request.startswith("HEAD"):
            state.update(at=first, end=last + 1, due=time.monotonic())

    def turn(self):
        """Sends what is due. Gives the seconds until something is."""
        soonest = 0.05
        for connection, state in [*self.sending.items()]:
            while state["at"] < state["end"]:
                now = time.monotonic()
                if now < state["due"]:
                    soonest = min(soonest, state["due"] - now)
                    break
                try:
                    n = connection.send(self.piece[: min(MARK - state["at"] % MARK, state["end"] - state["at"])])
                except BlockingIOError:
                    soonest = min(soonest, 0.001)
                    break
                except OSError:
                    self.drop(connection)
                    break
                state["at"] += n
                state["due"] = max(state["due"], now - 0.005) + n / self.rate
                self.sent.append((state["at"], now))
        return soonest


class Client:
    """Asks for a range and notes when what is there."""

    def __init__(self, selector, port, path, start, end):
        self.start, self.end = start, end
        self.head, self.length = b"", 0
        self.unused = bytearray(1 << 20)
        #: When the first n × MARK bytes were there.
        self.arrived = []
        self.connection = socket.create_connection(("127.0.0.1", port))
        self.connection.sendall(
            f'GET {path} HTTP/1.1\r\nHost: bench\r\nIf-Match: "late"\r\nRange: bytes={start}-{end - 1}\r\n\r\n'.encode()
        )
        self.connection.setblocking(False)
        selector.register(self.connection, selectors.EVENT_READ, self.readable)
        self.selector = selector

    def readable(self, _):
        with contextlib.suppress(BlockingIOError):
            if b"\r\n\r\n" in self.head:
                # TCP does not copy what is to be truncated.
                received = body = self.connection.recv_into(self.unused, 0, socket.MSG_TRUNC)
            else:
                more = self.connection.recv(4096)
                head, mark, rest = (self.head + more).partition(b"\r\n\r\n")
                self.head = head + mark
                received, body = len(more), len(rest)
            if not received:
                raise ConnectionError(f"closed after {self.length} bytes behind {self.head[:200]!r}")
            self.length += body
            now = time.monotonic()
            self.arrived += [now] * (self.length // MARK - len(self.arrived))

    def is_done(self):
        return self.length >= self.end - self.start

    def close(self):
        self.selector.unregister(self.connection)
        self.connection.close()


def measure(start_server, parts, part, rate):
    """`start_server(source)` starts a replica in front of the source.

    Milliseconds, of all marks that were sent after the second client had joined: the first client behind the source, the second behind the
    source, the second behind the first.
    """
    selector = selectors.DefaultSelector()
    source = Source(selector, parts * part, rate)

    def turn():
        for key, _ in selector.select(source.turn()):
            key.data(key.fileobj)

    with concurrent.futures.ThreadPoolExecutor() as threads:
        started = threads.submit(start_server, source)
        while not started.done():
            turn()
    server = started.result()
    behind_source, second_behind_source, behind_first = [], [], []
    for number in range(parts):
        start = number * part
        source.sent.clear()
        first = Client(selector, server.port, server.path, start, start + part)
        while first.length < JOIN:
            turn()
        second = Client(selector, server.port, server.path, start, start + part)
        while not (first.is_done() and second.is_done()):
            turn()
        first.close()
        second.close()
        joined = second.arrived[0]
        sent = {end: when for end, when in source.sent}
        for mark, (one, other) in enumerate(zip(first.arrived, second.arrived)):
            when = sent.get(start + (mark + 1) * MARK)
            if when is None or when <= joined:
                continue
            behind_source.append((one - when) * 1e3)
            second_behind_source.append((other - when) * 1e3)
            behind_first.append((other - one) * 1e3)
    source.close()
    return behind_source, second_behind_source, behind_first

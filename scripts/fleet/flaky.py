"""An S3 that breaks down as told: passes requests on to a real one, and spoils a share of the answers.

    python3 flaky.py --upstream PORT --seed N

prints its port and then, at each line it reads, what it has done so far, as a line of JSON. A line that is a number between 0 and 1 sets the
share of GETs whose answer is spoiled. What happens to the n-th GET depends on the seed, n and that share alone.

    reset     the connection is reset somewhere in the body
    short     it is closed in order, somewhere in the body
    stalled   the body stops somewhere, for ten seconds, and then the connection is reset
    late      the first byte comes up to a second late
    slow_down 503 SlowDown, without asking the real one
    error     500 InternalError, likewise
    refused   the connection is reset before the answer's first byte
"""

import argparse
import collections
import http.client
import http.server
import json
import random
import socket
import struct
import sys
import threading
import time

KINDS = ("reset", "short", "stalled", "late", "slow_down", "error", "refused")
PIECE = 64 << 10
ERRORS = {
    "slow_down": (503, "SlowDown", "Please reduce your request rate."),
    "error": (500, "InternalError", "We encountered an internal error. Please try again."),
}


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, upstream, seed):
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream, self.seed, self.share = upstream, seed, 0.0
        self.counts = collections.Counter()
        self.lock = threading.Lock()

    def fate(self):
        """What becomes of the next GET: a kind of fault or None, and a source of whatever else is drawn for it."""
        with self.lock:
            self.counts["requests"] += 1
            dice = random.Random(f"{self.seed}:{self.counts['requests']}")
            kind = dice.choice(KINDS) if dice.random() < self.share else None
            if kind:
                self.counts[kind] += 1
            return kind, dice

    def sent(self, count):
        with self.lock:
            self.counts["bytes"] += count

    def handle_error(self, request, client_address):
        """A replica that is killed takes its connections with it."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 0

    def do_GET(self):
        kind, dice = self.server.fate()
        if kind == "refused":
            return self.reset()
        if kind == "late":
            time.sleep(dice.random())
        if kind in ERRORS:
            status, code, message = ERRORS[kind]
            body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
            fields = [("Content-Type", "application/xml"), ("Content-Length", len(body))]
            return self.answer(status, fields, body)
        self.forward(kind, dice)

    def do_HEAD(self):
        self.forward(None, None)

    def forward(self, kind, dice):
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=30)
        try:
            # As it came, the host included: it is signed.
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() != "connection":
                    upstream.putheader(name, value)
            upstream.endheaders()
            response = upstream.getresponse()
            fields = [
                (name, value)
                for name, value in response.getheaders()
                if name.lower() not in ("connection", "transfer-encoding", "date", "server")
            ]
            if response.length is None or response.chunked:
                return self.answer(response.status, [*fields, ("Content-Length", 0)], b"") if self.command == "HEAD" else (
                    self.buffered(response, fields)
                )
            self.answer(response.status, fields, b"")
            left = response.length if self.command == "GET" else 0
            stop = dice.randrange(left) if kind in ("reset", "short", "stalled") and left else left
            done = 0
            while done < stop:
                piece = response.read(min(PIECE, stop - done))
                self.wfile.write(piece)
                self.server.sent(len(piece))
                done += len(piece)
            if done < left:
                self.spoil(kind)
        finally:
            upstream.close()

    def buffered(self, response, fields):
        body = response.read()
        fields = [field for field in fields if field[0].lower() != "content-length"]
        self.answer(response.status, [*fields, ("Content-Length", len(body))], body)

    def answer(self, status, fields, body):
        self.send_response_only(status)
        for name, value in fields:
            self.send_header(name, str(value))
        self.end_headers()
        if body:
            self.wfile.write(body)

    def spoil(self, kind):
        if kind == "stalled":
            time.sleep(10)
        if kind == "short":
            self.close_connection = True
        else:
            self.reset()

    def reset(self):
        self.close_connection = True
        # A close with this option and no time to linger sends RST.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def log_message(self, *_):
        pass


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args()
    server = Server(options.upstream, options.seed)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    for line in sys.stdin:
        with server.lock:
            server.share = float(line)
            print(json.dumps(server.counts), flush=True)


if __name__ == "__main__":
    main()

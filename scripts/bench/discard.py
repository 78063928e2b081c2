"""Reads stretches of an object at once, over a connection each, and has the kernel throw the bytes away: costs next to nothing beside what it
measures. Prints how many seconds that took.

    python3 discard.py PORT PATH ETAG FIRST LAST [FIRST LAST ...]
"""

import socket
import sys
import threading
import time

AT_ONCE = 1 << 20


def drop(connection, left):
    """Takes as many bytes off a connection, or what comes before its end. Returns how many are missing."""
    # TCP does not copy what is to be truncated: tcp(7).
    unused = bytearray(AT_ONCE)
    while left > 0 and (n := connection.recv_into(unused, min(left, AT_ONCE), socket.MSG_TRUNC | socket.MSG_WAITALL)):
        left -= n
    return left


def read(port, path, etag, first, last, broken):
    with socket.create_connection(("127.0.0.1", port)) as connection:
        pin = f"If-Match: {etag}\r\n" if etag else ""
        connection.sendall(
            f"GET {path} HTTP/1.1\r\nHost: bench\r\nRange: bytes={first}-{last}\r\n{pin}Connection: close\r\n\r\n".encode()
        )
        head = b""
        while b"\r\n\r\n" not in head and (more := connection.recv(4096)):
            head += more
        left = drop(connection, last + 1 - first - len(head.partition(b"\r\n\r\n")[2]))
        if left or not head.startswith(b"HTTP/1.1 206"):
            broken.append(f"{first}-{last}: {left} bytes are missing behind {head[:200]!r}")


def main():
    port, path, etag, *numbers = sys.argv[1:]
    stretches = zip(map(int, numbers[::2]), map(int, numbers[1::2]))
    broken = []
    begun = time.monotonic()
    threads = [threading.Thread(target=read, args=(int(port), path, etag, *stretch, broken)) for stretch in stretches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(time.monotonic() - begun)
    return "\n".join(broken) or 0


if __name__ == "__main__":
    sys.exit(main())

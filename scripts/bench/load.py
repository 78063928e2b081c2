"""The load: wrk with random pinned ranges, and what it and the server's processes say about it."""

import dataclasses
import json
import pathlib
import statistics
import subprocess

from fleet import stack

LUA = """\
local size, length, etag = %(size)d, %(length)d, %(etag)s
local pad = "                                          "
local thread_count = 0
function setup(thread)
    thread:set("seed", %(seed)d + thread_count)
    thread_count = thread_count + 1
end
function init(args)
    math.randomseed(seed)
end
local blocks = math.floor(size / length)
function request()
    local first = math.random(0, blocks - 1) * length
    return wrk.format("GET", nil, {
        ["Range"] = string.format("bytes=%%d-%%d", first, first + length - 1),
        ["If-Match"] = etag,
    })
end
function done(summary, latency, requests)
    io.write(string.format(
        '\\n{"requests":%%d,"microseconds":%%d,"bytes":%%d,"p50":%%d,"p99":%%d,"p999":%%d,"status":%%d,"broken":%%d}\\n',
        summary.requests, summary.duration, summary.bytes,
        latency:percentile(50), latency:percentile(99), latency:percentile(99.9),
        summary.errors.status, summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout))
end
"""


@dataclasses.dataclass
class Figures:
    """Of one run, or the medians of several."""

    requests_per_second: float
    bytes_per_second: float
    p50_us: float
    p99_us: float
    p999_us: float
    cpu_us_per_request: float
    cpu_seconds_per_gb: float
    rss_mib: float


def wrk(directory, server, length, connections, seconds, cores, seed=1, threads=1, span=None):
    """`span`: of the object's first bytes alone."""
    script = pathlib.Path(directory) / "range.lua"
    etag = json.dumps(server.etag or "*")
    script.write_text(LUA % {"size": span or server.size, "length": length, "etag": etag, "seed": seed})
    threads = min(threads, connections)
    command = [
        *["taskset", "-c", cores, stack.program("wrk"), "-t", str(threads), "-c", str(connections), "-d", f"{seconds}s"],
        *["--timeout", "30s", "-s", str(script), f"http://127.0.0.1:{server.port}{server.path}"],
    ]
    before = server.cpu()
    ran = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 120)
    cpu = server.cpu() - before
    lines = [line for line in ran.stdout.splitlines() if line.startswith("{")]
    if ran.returncode or not lines:
        raise stack.Broken(f"wrk failed against {server.name}: {ran.stdout}{ran.stderr}")
    said = json.loads(lines[-1])
    if said["status"] or said["broken"] or not said["requests"]:
        raise stack.Broken(f"{server.name} answered {said}")
    took = said["microseconds"] / 1e6
    return Figures(
        requests_per_second=said["requests"] / took,
        bytes_per_second=said["requests"] * length / took,
        p50_us=said["p50"],
        p99_us=said["p99"],
        p999_us=said["p999"],
        cpu_us_per_request=cpu / said["requests"] * 1e6,
        cpu_seconds_per_gb=cpu / (said["requests"] * length) * 1e9,
        rss_mib=server.rss() / (1 << 20),
    )


def medians(runs):
    return Figures(
        **{
            field.name: statistics.median(getattr(run, field.name) for run in runs) for field in dataclasses.fields(Figures)
        }
    )


def interleaved(rounds, competitors, run):
    """A B A B …: each round all competitors, every second round in the other order; the medians of each."""
    runs = {server.name: [] for server in competitors}
    for number in range(rounds):
        for server in competitors if number % 2 == 0 else reversed(competitors):
            runs[server.name].append(run(server, number))
    return {name: medians(figures) for name, figures in runs.items()}

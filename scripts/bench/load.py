"""The load: wrk with random pinned ranges (range.lua), and what it, the server's processes and the machine say about a run."""

import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import tempfile
import time

from bench import servers
from fleet import stack

SCRIPT = pathlib.Path(__file__).with_name("range.lua")


class NothingEnded(stack.Broken):
    """Not one request was answered whole in the time of the run."""


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
    #: Of the wall time, how much of a core the server had.
    server_cores: float
    #: How many cores others had meanwhile, the hypervisor included: what makes a run noisy.
    other_cores: float


class Bystanders:
    """How much CPU the machine spends on what is not measured."""

    def __init__(self):
        self.begun, self.spent = time.monotonic(), machine_seconds()

    def cores(self, ours):
        """`ours`: CPU seconds of the server and its load since the beginning."""
        return max(0.0, machine_seconds() - self.spent - ours) / (time.monotonic() - self.begun)


def machine_seconds():
    """What all cores did together since the start of the machine; what the hypervisor took counts too."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, open("/proc/stat").readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def wrk(directory, server, length, connections, seconds, cores, seed=1, threads=1, span=None, alike=True, paced=False):
    """`span`: of the object's first bytes alone. `alike`: requests differ in nothing but their ranges. `paced`: connections pause after each answer."""
    command = servers.on(
        cores,
        *[stack.program("wrk"), "-t", min(threads, connections), "-c", connections, "-d", f"{seconds}s", "--timeout", "30s"],
        *["-s", SCRIPT, f"http://127.0.0.1:{server.port}{server.path}"],
        *["--", span or server.size, length, server.etag or "*", seed, *([] if alike else ["unlike"]), *(["paced"] if paced else [])],
    )
    bystanders, before = Bystanders(), server.cpu()
    said, load_cpu = run(command)
    cpu = server.cpu() - before
    if not said["requests"]:
        raise NothingEnded(f"{server.name} answered nothing whole in {seconds} s: {said}")
    if said["status"] or said["broken"]:
        raise stack.Broken(f"{server.name} answered {said}")
    took = said["microseconds"] / 1e6
    return Figures(
        requests_per_second=said["requests"] / took,
        # Of what was sent of ranges that the end of the run cut, too.
        bytes_per_second=said["bytes"] / took,
        p50_us=said["p50"],
        p99_us=said["p99"],
        p999_us=said["p999"],
        cpu_us_per_request=cpu / said["requests"] * 1e6,
        cpu_seconds_per_gb=cpu / said["bytes"] * 1e9,
        rss_mib=server.rss() / (1 << 20),
        server_cores=cpu / took,
        other_cores=bystanders.cores(cpu + load_cpu),
    )


def run(command):
    """What wrk says in its last line, and its CPU seconds."""
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    lines = [line for line in text.splitlines() if line.startswith("{")]
    if child.returncode or not lines:
        raise stack.Broken(f"{command} failed: {text}")
    return json.loads(lines[-1]), usage.ru_utime + usage.ru_stime


def medians(runs):
    return Figures(
        **{field.name: statistics.median(getattr(run, field.name) for run in runs) for field in dataclasses.fields(Figures)}
    )


def interleaved(rounds, competitors, run):
    """A B A B …, every second round in the other order, so that what drifts hits all. `rounds(server)`: how often it takes part, which may be less
    often than others. The runs of each, in order: the first of one was beside the first of the others."""
    runs = {server.name: [] for server in competitors}
    for number in range(max(map(rounds, competitors))):
        taking_part = [server for server in competitors if number < rounds(server)]
        for server in taking_part if number % 2 == 0 else reversed(taking_part):
            runs[server.name].append(run(server, number))
    return runs

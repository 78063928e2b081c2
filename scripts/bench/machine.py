"""What a run was made on, and whether the machine was quiet meanwhile."""

import os
import pathlib
import platform
import re
import subprocess
import time

from bench import servers
from fleet import stack

PROGRAMS = {
    "nginx": ("nginx", "-v"),
    "Varnish": ("varnishd", "-V"),
    "Traffic Server": ("traffic_server", "--version"),
    # Which it ends with 1, as if it were wrong to ask.
    "wrk": ("sh", "-c", "wrk -v; true"),
    "aria2": ("aria2c", "--version"),
    "curl": ("curl", "--version"),
    "AWS CLI": ("aws", "--version"),
    "rustc": ("rustc", "--version"),
}


def describe():
    return {
        "cpu": field("/proc/cpuinfo", "model name"),
        "cores": os.cpu_count(),
        "memory_gib": round(int(field("/proc/meminfo", "MemTotal").split()[0]) / (1 << 20), 1),
        "kernel": platform.release(),
        "congestion_control": pathlib.Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip(),
        "virtual": (output("systemd-detect-virt", "--vm") or ["unknown"])[0],
        "versions": {name: version(*command) for name, command in PROGRAMS.items()},
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "load_before": round(os.getloadavg()[0], 2),
    }


class Weather:
    """What the hypervisor took from the machine, from here to `report`."""

    def __init__(self):
        self.begun, self.stolen = time.monotonic(), stolen()

    def report(self):
        took = time.monotonic() - self.begun
        return {"seconds": round(took), "stolen_share": round((stolen() - self.stolen) / took / os.cpu_count(), 4)}


def stolen():
    return int(open("/proc/stat").readline().split()[8]) / os.sysconf("SC_CLK_TCK")


def field(file, name):
    return next((line.split(":", 1)[1].strip() for line in open(file) if line.startswith(name)), "unknown")


def output(*command):
    """Lines, if the program is there and succeeds."""
    try:
        ran = subprocess.run([servers.program(command[0]), *command[1:]], capture_output=True, text=True)
    except stack.Broken:
        return []
    return (ran.stdout + ran.stderr).splitlines() if ran.returncode == 0 else []


def version(*command):
    """The first number with a dot that a program says of itself."""
    for line in output(*command):
        if found := re.search(r"\d+\.\d+(\.\d+)*", line):
            return found[0]
    return None


def commit():
    revision = output("git", "-C", str(stack.REPOSITORY), "rev-parse", "--short=12", "HEAD")
    changed = output("git", "-C", str(stack.REPOSITORY), "status", "--porcelain", "--untracked-files=no", "--", "src", "Cargo.lock")
    return (revision[0] if revision else "unknown") + (" with changes" if changed else "")

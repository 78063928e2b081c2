"""pinrange against nginx, Varnish, Traffic Server and the bare origin, on loopback, in one repeatable run.

    scripts/bench.sh                         everything: installs, builds, measures, writes docs/PERFORMANCE.md
    python3 scripts/run-bench.py warm cold   some of it, of what is built and installed

Server and load are pinned to different cores; competitors take turns (A B A B, then B A B A) and the medians are reported, with
ratios: on a shared machine only these mean much. CPU is the server processes' user and system time, by the kernel's account.

    warm     random pinned ranges of a 1 GiB file in the page cache: sizes × connections; the whole of it on one connection
    pages    hot ranges while others read what is on disk but not in the page cache
    cold     a 1 GiB object that nobody holds, from an origin like S3: one stream, 16 ranges at once, the first byte, a second client
    shared   100 staggered clients on one cold object: what leaves the origin
    get      `pinrange get` against aria2c, curl and the AWS CLI, warm
    get-memory  its peak memory by the object's size: needs 20 GiB of disk
    sizes, revisions, connections, mounts    what it costs when there is more of each

Results go to a JSON file, of which bench/report.py makes the page and its plots. What a run did not measure stays in the file as it was.
"""

import argparse
import json
import os
import pathlib
import signal
import sys
import tempfile
import traceback

from bench import cold, download, machine, pages, scale, servers, warm
from bench.goals import CALLS
from fleet import stack

KIB, MIB = 1 << 10, 1 << 20


def main():
    options = arguments()
    # Servers are ended and directories removed then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # This process is a load too, or does nothing.
    os.sched_setaffinity(0, servers.core_list(options.load_cores))
    description, failed = machine.describe(), False
    for name in options.bench or (QUICK if options.quick else BENCHES):
        weather = machine.Weather()
        try:
            with tempfile.TemporaryDirectory(prefix="pinrange-bench-", dir=options.dir) as directory:
                # Servers that drop root's rights read below it.
                os.chmod(directory, 0o755)
                result = BENCHES[name](options, pathlib.Path(directory))
        except Exception as error:  # What one did not foresee must not cost half an hour of the others.
            if not isinstance(error, stack.Broken):
                traceback.print_exc()
            print(f"bench: {name}: {error}", file=sys.stderr)
            failed = True
            continue
        section = {
            "machine": description | weather.report(),
            "options": {key: value for key, value in vars(options).items() if key not in ("bench", "dir", "json", *PROGRAMS)},
            "result": result,
        }
        print(f"{name}: {section['machine']['seconds']} s", flush=True)
        if options.json:
            keep(pathlib.Path(options.json), name, section)
    return 2 if failed else 0


def keep(file, name, section):
    """At once: what comes later may fail."""
    results = json.loads(file.read_text()) if file.exists() else {}
    results[name] = section
    file.write_text(json.dumps(results, separators=(",", ":")).replace('{"requests_per_second"', '\n{"requests_per_second"') + "\n")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", nargs="*", metavar="BENCH", help=f"of {', '.join(BENCHES)} [all]")
    parser.add_argument("--quick", action="store_true", help="a few cells, a second each: does it work?")
    parser.add_argument("--pinrange", default="target/release/pinrange", metavar="PROGRAM")
    parser.add_argument("--origin", default="target/release/examples/origin", metavar="PROGRAM")
    parser.add_argument("--relay", default="target/release/examples/relay", metavar="PROGRAM", help="for cold")
    parser.add_argument("--calls", default="target/release/examples/calls", metavar="PROGRAM", help="for warm")
    parser.add_argument("--rounds", type=int, help="of which the median counts [5]")
    parser.add_argument("--other-rounds", type=int, help="of the competitors that are far behind [3]")
    parser.add_argument("--seconds", type=int, default=1, help="of each run, longer where ranges are long and connections many [1]")
    parser.add_argument("--server-cores", metavar="CORES", help="of servers with one worker thread, as taskset takes them [0]")
    parser.add_argument("--load-cores", metavar="CORES", help="of their load [the upper half]")
    parser.add_argument("--pair-cores", metavar="CORES", help="of servers with two worker threads [0-1]")
    parser.add_argument("--pair-load-cores", metavar="CORES", help="of their load [the upper half; both, where there are but two]")
    parser.add_argument("--sizes", type=numbers)
    parser.add_argument("--connections", type=numbers)
    parser.add_argument("--competitors", type=lambda text: text.split(","), default=COMPETITORS, help=f"of {','.join((*COMPETITORS, *CALLS[1:]))} [{','.join(COMPETITORS)}]")
    parser.add_argument("--object", type=int, metavar="MIB", help="the object's size [1024]")
    parser.add_argument("--dir", help="where to work: needs six times the object's size")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    if unknown := set(options.bench) - set(BENCHES):
        parser.error(f"there is no {', '.join(unknown)}: choose from {', '.join(BENCHES)}")
    cores = os.cpu_count()
    if cores < 2:
        parser.error("server and load need a core each")
    upper = f"{cores // 2}-{cores - 1}"
    defaults = {
        "server_cores": "0",
        "load_cores": upper,
        "pair_cores": "0-1",
        "pair_load_cores": upper if cores > 2 else "0-1",
        "rounds": 2 if options.quick else 5,
        "other_rounds": 1 if options.quick else 3,
        "sizes": (4 * KIB, MIB) if options.quick else warm.SIZES,
        "connections": (16, 256) if options.quick else warm.CONNECTIONS,
        "object": 128 if options.quick else 1024,
    }
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.pair_cells = warm.PAIR_CELLS[:1] if options.quick else warm.PAIR_CELLS
    options.unlike_cells = warm.UNLIKE_CELLS[:1] if options.quick else warm.UNLIKE_CELLS
    for name in ("pinrange", "origin"):
        setattr(options, name, str(pathlib.Path(getattr(options, name)).resolve(strict=True)))
    # For one bench alone, which says that it is missing.
    for name in ("relay", "calls"):
        setattr(options, name, str(pathlib.Path(getattr(options, name)).resolve()))
    return options


def numbers(text):
    return [int(word) for word in text.split(",")]


COMPETITORS = ("pinrange", "nginx", "nginx-again", "nginx-slice", "varnish", "traffic-server", "calls")


def on_object(bench):
    return lambda options, directory: bench(options, directory, servers.make_object(directory, options.object * MIB))


BENCHES = {
    "warm": warm.warm,
    "pages": pages.pages,
    "cold": on_object(cold.cold),
    "shared": on_object(cold.shared),
    "get": download.download,
    "get-memory": download.memory,
    **{run.__name__: run for run in (scale.sizes, scale.revisions, scale.connections, scale.mounts)},
}
PROGRAMS = ("pinrange", "origin", "relay", "calls")
QUICK = ("warm", "pages", "cold", "shared", "get")

if __name__ == "__main__":
    sys.exit(main())

"""Downloads from a fleet while the object is overwritten all the time: nobody may get a mixed file.

    cargo build --release && python3 scripts/fleet-test.py --pinrange target/release/pinrange

Three replicas behind HAProxy (deploy/haproxy.cfg) in front of Garage. The object is overwritten by one of
--revisions prepared ones after the other, first at --fast, then at --slow. Meanwhile four kinds of clients download it, each again and
again. Every file that a client calls finished must be exactly one revision, and the pinned one where it
pinned one; `pinrange get` must also get through while the object changes slowly.

Needs Python 3.11 or newer, and garage (2.3 or newer), haproxy, aria2c and curl on PATH; no Python packages. Ends with 0 if all
promises were kept, 1 if not, 2 if the run itself could not be made.

    --quick               64 MiB, 10 s fast and 25 s slow, as in CI
    --direct              the clients straight at Garage: what the fleet has to stand comparison with
    --unpinned-control    clients without pins: the run succeeds only if a mixed file was made and found
"""

import argparse
import collections
import pathlib
import re
import statistics
import sys
import time

from fleet import clients, frame, revisions, stack


def main():
    options = arguments()
    # A hang anywhere ends the run: every wait below is shorter than this together.
    limit = int(options.fast_for + options.slow_for + 180)
    return frame.judge("fleet", run, show, options, limit, heavy=("cache*", "garage"))


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pinrange", metavar="PROGRAM", help="the pinrange program, for the replicas and for `get`")
    parser.add_argument("--size", type=size, default="256MiB", help="of the object; a multiple of 8MiB [256MiB]")
    parser.add_argument("--fast", type=float, default=0.2, metavar="S", help="first overwritten every S seconds [0.2]")
    parser.add_argument("--fast-for", type=float, default=30, metavar="S", help="for so long [30]")
    parser.add_argument("--slow", type=float, default=5, metavar="S", help="then overwritten every S seconds [5]")
    parser.add_argument("--slow-for", type=float, default=60, metavar="S", help="for so long [60]")
    parser.add_argument("--revisions", type=int, default=16, metavar="N", help="that take turns [16]")
    parser.add_argument("--gets", type=int, default=5, help="how often `get` must finish in the slow phase [5]")
    parser.add_argument("--capacity", default="2GiB", help="of each replica's disk tier [2GiB]")
    parser.add_argument("--dir", help="where to work; needs room for the caches and for what Garage keeps of the revisions")
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    parser.add_argument("--direct", action="store_true", help="without pinrange")
    parser.add_argument("--unpinned-control", action="store_true", help="check that a mixed file is found")
    parser.add_argument("--quick", action="store_true", help="small and short, as in CI; other options still count")
    if "--quick" in sys.argv:
        parser.set_defaults(size=64 << 20, fast_for=10, slow_for=25)
    options = parser.parse_args()
    if options.size % (8 << 20):
        parser.error("--size must be a multiple of 8MiB")
    if not options.direct and not options.pinrange:
        parser.error("--pinrange is needed, or --direct")
    if options.pinrange:
        options.pinrange = str(pathlib.Path(options.pinrange).resolve(strict=True))
    return options


def size(text):
    found = re.fullmatch(r"(\d+)(MiB|GiB)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text}: give it as 64MiB or 1GiB")
    return int(found[1]) << {"MiB": 20, "GiB": 30}[found[2]]


def run(options, directory):
    uploads = revisions.Revisions(options.size)
    with stack.Processes(directory) as processes:
        garage = stack.Garage(processes, directory)
        keys = [f"revision/{number}" for number in range(options.revisions)]
        for number, key in enumerate(keys):
            uploads.uploaded(number, garage.put(key, uploads.bytes_of(number)))
        garage.overwrite(keys[0])
        if options.direct:
            garage.publish()
            fleet, address = None, ("localhost", garage.web_port, f"/{stack.OBJECT}")
        else:
            fleet = stack.Fleet(processes, directory, options.pinrange, garage.s3_port, options.size, options.capacity)
            address = ("127.0.0.1", fleet.port, f"/{stack.BUCKET}/{stack.OBJECT}")

        kinds = [clients.Aria2, clients.Ranges, clients.Curl]
        if options.pinrange:
            clients.Get.binary = options.pinrange
            kinds.insert(0, clients.Get)
        if options.unpinned_control:
            kinds = [clients.UnpinnedAria2, clients.UnpinnedRanges]
        now = {"phase": "fast"}
        crowd = [kind(*address, directory, uploads, lambda: now["phase"]) for kind in kinds]
        phases = []
        try:
            for client in crowd:
                client.start()
            number = 0
            for phase, every, seconds in (
                ("fast", options.fast, options.fast_for),
                ("slow", options.slow, options.slow_for),
            ):
                now["phase"] = phase
                begun, first = time.monotonic(), number
                while time.monotonic() < begun + seconds:
                    started, number = time.monotonic(), number + 1
                    garage.overwrite(keys[number % len(keys)])
                    time.sleep(max(0, min(started + every, begun + seconds) - time.monotonic()))
                took, count = time.monotonic() - begun, number - first
                phases.append({"phase": phase, "asked": every, "revisions": count, "every": round(took / count, 2)})
        finally:
            for client in crowd:
                client.kill()
            for client in crowd:
                client.join(clients.PATIENCE + 10)
        shares = fleet.shares() if fleet else {}
    return judged(options, crowd, phases, shares, processes.exit_codes)


def judged(options, crowd, phases, shares, exit_codes):
    """The report, whose `violations` are all that went wrong."""
    rows = []
    for client in crowd:
        for phase in ("fast", "slow"):
            mine = [attempt for attempt in client.attempts if attempt.phase == phase]
            seconds = [attempt.seconds for attempt in mine if attempt.outcome == "finished"]
            rows.append(
                {
                    "client": client.name,
                    "phase": phase,
                    **{
                        outcome: sum(attempt.outcome == outcome for attempt in mine)
                        for outcome in ("finished", "refused", "failed", "violation")
                    },
                    "median_seconds": round(statistics.median(seconds), 2) if seconds else None,
                    "failures": collections.Counter(a.detail for a in mine if a.outcome == "failed"),
                }
            )
    violations = [f"{client.name}: {wrong}" for client in crowd for wrong in client.violations]
    mixed = len(violations)
    if options.unpinned_control:
        violations = [] if mixed else ["the control made no mixed file: the object must change faster, or be larger"]
    for client in crowd:
        if client.is_alive():
            violations.append(f"{client.name}: did not end")
    for name, code in exit_codes.items():
        # Garage and HAProxy report the signal that we end them with.
        if code != 0 and (name.startswith("replica") or isinstance(code, str)):
            violations.append(f"{name}: exit code {code}")
    for name, share in shares.items():
        if share["2xx"] == 0:
            violations.append(f"{name}: answered nothing, so this was not a test of a fleet")
    if not options.direct and not options.unpinned_control:
        gets = next(row["finished"] for row in rows if row["client"] == "get" and row["phase"] == "slow")
        if gets < options.gets:
            violations.append(f"get: finished {gets} times in the slow phase, of {options.gets} required")
    return {
        "target": "Garage" if options.direct else "pinrange",
        "size": options.size,
        "phases": phases,
        "clients": rows,
        "replicas": shares,
        "mixed_files_of_the_control": mixed if options.unpinned_control else None,
        "violations": violations,
    }


def show(report):
    print(f"{report['target']}, {report['size'] >> 20} MiB")
    for phase in report["phases"]:
        print("{phase}: {revisions} revisions, one every {every} s (asked: {asked} s)".format(**phase))
    columns = "{client:<16}{phase:<7}{finished:>9}{refused:>9}{failed:>8}{violation:>11}{median_seconds:>10}"
    heads = ("client", "phase", "finished", "refused", "failed", "violation", "median_seconds")
    print(columns.format(**{**{head: head for head in heads}, "median_seconds": "median s"}))
    for row in report["clients"]:
        print(columns.format(**{**row, "median_seconds": row["median_seconds"] or "-"}))
    for row in report["clients"]:
        for detail, count in row["failures"].items():
            print(f"  {row['client']}, {row['phase']}: {count} × {detail}")
    for name, share in report["replicas"].items():
        print(f"{name}: " + ", ".join(f"{count} {what}" for what, count in share.items()))
    if report["mixed_files_of_the_control"] is not None:
        print(f"mixed files found: {report['mixed_files_of_the_control']}")
    for violation in report["violations"]:
        print(f"VIOLATION {violation}")
    print("ok" if not report["violations"] else "NOT ok")


if __name__ == "__main__":
    sys.exit(main())

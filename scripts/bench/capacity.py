"""On paper: what the measured CPU means for a replica, and a hundred, with 100 GbE and NVMe. The page states each assumption."""

import statistics

from goals import KIB, MIB, result

LINE = 12.5  # GB/s
PAYLOAD = 1448 / 1538  # of a full Ethernet frame, with preamble and gap
CORES, MEMORY, DRIVE, DRIVES, S3_STREAM = 32, 200, 7.0, 2, 0.09  # of the replica on paper; GB/s
#: How often a byte crosses the memory bus, by where it comes from.
CROSSINGS = {"page cache": 1, "NVMe": 2, "S3": 7}
#: What the network card and its driver cost beside what loopback shows.
RESERVE = 1.5
MIXES = ((1.0, 0.0), (0.5, 0.0), (0.0, 0.0), (0.8, 0.05), (0.0, 1.0))


def section(results):
    warm, cold = result(results, "warm"), result(results, "cold")
    if not warm:
        return ""
    hit = median(warm, MIB, "cpu_seconds_per_gb")
    request = median(warm, 4 * KIB, "cpu_us_per_request")
    if hit is None:
        return ""
    line = LINE * PAYLOAD
    fills = [row["one_stream"]["pinrange"]["cpu_seconds_per_gb"] for row in cold or [] if "one_stream" in row]
    fill = statistics.median(fills) if fills else None
    text = [
        "### On paper: 100 GbE and NVMe",
        "",
        f"Measured: {hit:.3f} s of CPU per GB from the page cache (1 MiB ranges, median of the cells with one worker thread)"
        + (f", {fill:.2f} s per GB that has to come from S3 first" if fill else "")
        + (f", {request:.1f} µs per 4 KiB range" if request else "")
        + ".",
        "",
        f"Assumed: a replica with {CORES} such cores, {LINE} GB/s of network (of which TCP in frames of 1,500 bytes leaves {line:.1f}), "
        f"{MEMORY} GB/s of memory bandwidth, {DRIVES} drives of {DRIVE:.0f} GB/s, S3 streams of {S3_STREAM * 1e3:.0f} MB/s. "
        f"The network card and its driver cost {RESERVE - 1:.0%} on top of what loopback shows: there, the server pays for TCP's receiving side, but for "
        "no interrupts and no DMA. A byte from the page cache crosses the memory bus once (the card reads it), one from NVMe twice, one from S3 seven "
        "times (card, copy out of the socket, copy into the page cache, twice each, drive, card). CPU of reads from NVMe is taken to be that of hits: read-ahead "
        "copies nothing.",
        "",
        "| of the bytes: page cache / NVMe / S3 | cores for the line | memory bus | drives | S3 streams | what ends first |",
        "|---|---|---|---|---|---|",
    ]
    for cached, missing in MIXES:
        if missing and not fill:
            continue
        text.append(mix(cached, missing, line, hit, fill or 0))
    text += ["", fleet(line, request)]
    return "\n".join(text)


def median(warm, size, field):
    values = [
        statistics.median(run[field] for run in cell["servers"]["pinrange"])
        for cell in warm["cells"]
        if cell["size"] == size and cell["threads"] == 1 and "pinrange" in cell["servers"]
    ]
    return statistics.median(values) if values else None


def mix(cached, missing, line, hit, fill):
    """`fill`: CPU of a byte that is fetched and sent."""
    stored = 1 - cached - missing
    cores = line * RESERVE * ((cached + stored) * hit + missing * fill)
    memory = line * (cached * CROSSINGS["page cache"] + stored * CROSSINGS["NVMe"] + missing * CROSSINGS["S3"])
    drives = line * stored / DRIVE
    uses = {"the network": 1.0, "cores": cores / CORES, "memory": memory / MEMORY, "drives": drives / DRIVES}
    limit = max(uses, key=uses.get)
    if uses[limit] > 1:
        limit = f"{limit}, at {line / uses[limit]:.1f} GB/s"
    return (
        f"| {cached:.0%} / {stored:.0%} / {missing:.0%} | {cores:.1f} | {memory:.0f} GB/s | {drives:.1f}"
        f" | {line * missing / S3_STREAM:.0f} | {limit} |"
    )


def fleet(line, request):
    text = (
        f"A hundred such replicas send {100 * line / 1e3:.2f} TB/s: 1 TB to each of 10,000 machines in {1e4 / (100 * line / 1e3) / 3600:.1f} hours, and "
        f"in no less than {1e12 / 1.25e9 / 60:.0f} minutes where a machine has 10 GbE. From S3 that 1 TB is read once per replica that is asked for it: 100 TB if "
        "the balancer spreads an object's ranges over all of them, 1 TB if it sends a range's readers to one replica. "
        f"A cold terabyte reaches one replica at the line's speed in {1e3 / line:.0f} s over {line / S3_STREAM:.0f} streams."
    )
    if request:
        text += (
            f" Ranges of 4 KiB end at cores before they end at the line: {CORES / (request * RESERVE) :.1f} million a second, "
            f"{CORES / (request * RESERVE) * 4096 / 1e3:.1f} GB/s."
            if CORES / (request * RESERVE) * 4096 / 1e3 < line
            else f" Even 4 KiB ranges fill the line: {line / 4096 * 1e3:.1f} million a second take {line / 4096 * 1e3 * request * RESERVE:.0f} cores."
        )
    return text

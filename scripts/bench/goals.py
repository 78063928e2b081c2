"""What was to be reached, what was, and the arithmetic of the ratios: a ratio is taken within each round, of runs that stood beside each other,
and the median of the rounds counts."""

import statistics

KIB, MIB = 1 << 10, 1 << 20
#: Two runs of the same program differ by so much.
NOISE = 1.03
REST = ("nginx-slice", "varnish", "traffic-server")
#: Programs that make system calls and nothing else, to be set beside nginx: pinrange's, and other ways to the same bytes.
CALLS = ("calls", "calls-apart", "calls-corked", "calls-nginx")
NAMES = {
    "pinrange": "pinrange",
    "nginx": "nginx static",
    "nginx-slice": "nginx slice",
    "varnish": "Varnish",
    "traffic-server": "Traffic Server",
    "nginx-again": "nginx again",
    "calls": "the calls alone",
    "calls-apart": "the calls alone, heads apart",
    "calls-corked": "the calls alone, heads corked",
    "calls-nginx": "nginx's calls alone",
    "relay": "the least through a file",
    "relay-memory": "the least through memory",
}


def result(results, name):
    """Of one section: None if it was not measured."""
    return results.get(name, {}).get("result")


def ratio(cell, field, theirs, mine="pinrange"):
    """mine ÷ theirs: median, least and greatest of the rounds; None where the cell lacks one of them."""
    ours, others = (cell["servers"].get(name) for name in (mine, theirs))
    if not ours or not others:
        return None
    values = [our[field] / max(other[field], 1e-9) for our, other in zip(ours, others)]
    return statistics.median(values), min(values), max(values)


def quartiles(values):
    """Median, first and third quartile."""
    low, median, high = statistics.quantiles(values, method="inclusive")
    return median, low, high


def cost(size):
    """What CPU is counted by: a range, or a byte where ranges are long."""
    return "cpu_us_per_request" if size < MIB else "cpu_seconds_per_gb"


def where(cell):
    threads = "" if cell["threads"] == 1 else f", {cell['threads']} threads"
    unlike = "" if cell.get("alike", True) else ", heads unlike"
    return f"{size_text(cell['size'])} × {cell['connections']}{threads}{unlike}"


def size_text(size):
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size >= unit:
            return f"{size / unit:g} {name}"
    return f"{size} B"


def verdict(value, limit, at_most=True, noise=NOISE):
    excess = value / limit if at_most else limit / value
    if excess <= 1:
        return "met"
    return "met within noise" if excess <= noise else "**not met**"


def goals(results):
    """Rows of what, goal, measured, verdict."""
    rows = [*warm_goals(result(results, "warm")), *page_goals(result(results, "pages"))]
    rows += [*cold_goals(result(results, "cold")), *shared_goals(result(results, "shared"))]
    rows += [*memory_goals(result(results, "connections")), *get_goals(result(results, "get"))]
    return rows


def unmeasured(what, goal):
    return what, goal, "not measured", ""


def warm_goals(warm):
    wanted = (
        ("server CPU per request, 4 KiB", "≤ 0.80 × nginx static", 4 * KIB, 0.8),
        ("server CPU per request, 64 KiB", "≤ 1.00 × nginx static", 64 * KIB, 1.0),
        ("server CPU per GB, 1 MiB", "≤ 1.00 × nginx static", MIB, 1.0),
        ("server CPU per GB, 16 MiB", "≤ 1.00 × nginx static", 16 * MIB, 1.0),
    )
    cells = warm["cells"] if warm else []
    for what, goal, size, limit in wanted:
        yield worst(what, goal, [cell for cell in cells if cell["size"] == size], cost(size), limit, at_most=True)
    every = "at every size and number of connections"
    yield worst(f"requests/s, {every}", "≥ 1.00 × nginx static", cells, "requests_per_second", 1.0, at_most=False)
    yield worst(f"p99, {every}", "≤ 1.00 × nginx static", cells, "p99_us", 1.0, at_most=True)
    for whole in warm["whole"] if warm else []:
        client = "a reader that discards" if whole["client"] == "discarding" else whole["client"]
        what, goal = f"one connection, the whole object, by {client}", "≥ 1.00 × nginx static"
        if value := ratio(whole, "bytes_per_second", "nginx"):
            yield what, goal, spread(value), verdict(value[0], 1.0, at_most=False)
    for name in REST:
        yield ahead(cells, name)


def worst(what, goal, cells, field, limit, at_most):
    found = [(value, cell) for cell in cells if (value := ratio(cell, field, "nginx"))]
    if not found:
        return unmeasured(what, goal)
    found.sort(key=lambda pair: pair[0][0], reverse=at_most)
    (value, cell), (best, _) = found[0], found[-1]
    missed = sum(verdict(one[0], limit, at_most).startswith("**") for one, _ in found)
    said = verdict(value[0], limit, at_most)
    if missed:
        said += f" in {missed} of {len(found)} cells"
    return what, goal, f"worst {spread(value)} at {where(cell)}; best {best[0]:.2f}", said


def ahead(cells, name):
    """In each cell, by requests/s, p99 and CPU."""
    what, goal = f"any of these against {NAMES[name]}", "ahead in every row"
    found = []
    for cell in cells:
        for field in ("requests_per_second", "p99_us", cost(cell["size"])):
            if value := ratio(cell, field, name):
                # How many times as good.
                gain = value[0] if field == "requests_per_second" else 1 / max(value[0], 1e-9)
                found.append((gain, field, cell))
    if not found:
        return unmeasured(what, goal)
    gain, field, cell = min(found, key=lambda one: one[0])
    behind = sum(gain * NOISE < 1 for gain, _, _ in found)
    label = {"requests_per_second": "requests/s", "p99_us": "p99"}.get(field, "CPU")
    measured = f"{len(found) - behind} of {len(found)}; the closest: {label} {gain:.2f} times as good at {where(cell)}"
    return what, goal, measured, "met" if gain >= 1 else "met within noise" if not behind else f"**not met** in {behind}"


def spread(value):
    median, low, high = value
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def page_goals(pages):
    what, goal = "hot p99 beside cold-page readers", "≤ 2 × quiet p99"
    row = next((row for row in pages or [] if row["server"] == "pinrange"), None)
    if not row:
        yield unmeasured(what, goal)
        return
    (cold, low, high), (warm, *_) = row["beside_cold_ratio"], row["beside_warm_ratio"]
    measured = f"{cold:.2f} (quartiles {low:.2f} and {high:.2f}); beside readers of warm pages {warm:.2f}"
    yield what, goal, measured, verdict(cold, 2.0)


def cold_goals(cold):
    capped = [row for row in cold or [] if row["bytes_per_second_per_connection"] == 90_000_000]
    what, goal = "cold object, one curl, origin capped at 90 MB/s a connection", "≥ 6 × the single direct stream"
    if "one_stream_ratio" in (capped or [{}])[0]:
        low = min(capped, key=lambda row: row["one_stream_ratio"])
        measured = f"{low['one_stream_ratio']:.1f} with {low['first_byte_ms']} ms to the first byte"
        yield what, goal, measured, verdict(low["one_stream_ratio"], 6.0, at_most=False)
    else:
        yield unmeasured(what, goal)
    what, goal = "cold object, 16 parallel ranges", "≥ 0.95 × the same ranges straight from S3"
    rows = [row for row in cold or [] if "sixteen_ranges_ratio" in row]
    if rows:
        low = min(rows, key=lambda row: row["sixteen_ranges_ratio"])
        measured = f"worst {low['sixteen_ranges_ratio']:.2f} with {origin_text(low)}"
        if relay := low["sixteen_ranges"].get("relay"):
            bound = relay["bytes_per_second"] / low["sixteen_ranges"]["direct"]["bytes_per_second"]
            measured += f", where the least that copies through a file gets {bound:.2f}"
        yield what, goal, measured, verdict(low["sixteen_ranges_ratio"], 0.95, at_most=False)
    else:
        yield unmeasured(what, goal)
    what, goal = "first byte of a cold block-aligned range above a direct S3 GET", "≤ 1 ms at p50"
    rows = [row for row in cold or [] if "first_byte_above_direct_ms" in row]
    if rows:
        high = max(rows, key=lambda row: row["first_byte_above_direct_ms"])
        measured = f"worst {high['first_byte_above_direct_ms']:.2f} ms with {origin_text(high)}"
        times = high.get("first_byte_of_a_block_ms", {})
        if "relay" in times:
            measured += f", the least that copies through a file {times['relay']['p50'] - times['direct']['p50']:.2f} ms"
        yield what, goal, measured, verdict(high["first_byte_above_direct_ms"], 1.0, noise=1)
    else:
        yield unmeasured(what, goal)


def origin_text(row):
    pace = row["bytes_per_second_per_connection"]
    return f"{row['first_byte_ms']} ms" + (f", {pace / 1e6:.0f} MB/s a connection" if pace else ", no cap")


def shared_goals(shared):
    what, goal = "a second client on a range already filling, behind the first", "< 5 ms at p99"
    if shared and "second_client_behind_first_ms" in shared:
        behind = shared["second_client_behind_first_ms"]
        yield what, goal, f"{behind['p99']:.2f} ms (p50 {behind['p50']:.2f})", verdict(behind["p99"], 5.0, noise=1)
    else:
        yield unmeasured(what, goal)
    what, goal = "S3 bytes ÷ unique bytes, 100 staggered clients", "1.00"
    if shared and "ratio" in shared:
        measured = f"{shared['ratio']:.4f}, {shared['unguarded_gets']} GETs without a guard"
        yield what, goal, measured, "met" if round(shared["ratio"], 2) <= 1 else "**not met**"
    else:
        yield unmeasured(what, goal)


def memory_goals(connections):
    what, goal = "resident with 1,000 connections on a 1 TiB object", "≤ 96 MiB"
    crowds = [row for row in connections or [] if "memory" in row]
    if not crowds:
        yield unmeasured(what, goal)
        return
    high = max(crowds, key=lambda row: row["peak_rss_mib"])
    measured = f"at most {high['peak_rss_mib']:.0f} MiB ({high['memory']})"
    yield what, goal, measured, verdict(high["peak_rss_mib"], 96, noise=1)


def get_goals(get):
    """Into a file on the disk, each as it is by default; also against aria2c and a sync, as only `get` makes sure of the disk."""
    what, goal = "`get` against aria2c -x16 -s16, warm, wall time", "≤ 0.80 ×"
    seconds = {row["client"]: row["seconds"] for row in get or []}
    if not {"get", "aria2c"} <= seconds.keys():
        yield unmeasured(what, goal)
        return
    value = seconds["get"] / seconds["aria2c"]
    measured = f"{value:.2f}"
    for ours, theirs, label in (
        ("get -c 16", "aria2c", "with 16 connections as well"),
        ("get", "aria2c, sync", "against aria2c and sync"),
        ("get, memory", "aria2c, memory", "to tmpfs"),
    ):
        if {ours, theirs} <= seconds.keys():
            measured += f"; {label} {seconds[ours] / seconds[theirs]:.2f}"
    yield what, goal, measured, verdict(value, 0.8)

"""The page and the plots of a run's results.

    python3 scripts/bench/report.py docs/bench.json              writes docs/PERFORMANCE.md (between its marks) and docs/bench/*.svg
    python3 scripts/bench/report.py docs/bench.json --check      fails where they are not what the results say
    python3 scripts/bench/report.py FILE --out DIRECTORY         writes there

What was not measured is left out.
"""

import argparse
import json
import pathlib
import statistics
import sys

import capacity
import plots
from goals import CALLS, MIB, NAMES, cost, goals, origin_text, ratio, result, size_text, where

DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs"
#: They are set beside nginx, as pinrange is.
BESIDE_NGINX = ("nginx-again", *CALLS)
BEGIN, END = "<!-- what follows is written by scripts/bench/report.py -->", "<!-- what precedes is written by scripts/bench/report.py -->"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default=DOCS)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    results = json.loads(options.results.read_text())
    files = {options.out / "bench" / f"{name}.svg": svg for name, svg in draw(results).items()}
    template = (DOCS / "PERFORMANCE.md").read_text()
    before, rest = template.split(BEGIN)
    after = rest.split(END)[1]
    files[options.out / "PERFORMANCE.md"] = f"{before}{BEGIN}\n\n{page(results, files)}\n\n{END}{after}"
    if options.check:
        stale = [str(file) for file, text in files.items() if not file.exists() or file.read_text() != text]
        if stale:
            print(f"{', '.join(stale)}: not what {options.results} says; run report.py", file=sys.stderr)
        return 1 if stale else 0
    for file, text in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return 0


def page(results, files):
    plotted = {file.stem for file in files}
    sections = (
        goals_section, machine_section, warm_section, whole_section, filling_section, pages_section, cold_section, shared_section,
        get_section, scale_section,
    )  # fmt: skip
    texts = [text for section in sections if (text := section(results, plotted))]
    if paper := capacity.section(results):
        texts.append(paper)
    return "\n\n".join(texts)


def table(heads, rows):
    if not rows:
        return ""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(value) for value in line) + " |" for line in lines)


def figure(name, plotted, alternative):
    return f"![{alternative}](bench/{name}.svg)" if name in plotted else ""


def paragraphs(*texts):
    return "\n\n".join(text for text in texts if text)


def goals_section(results, _):
    rows = [(what, goal, measured, said) for what, goal, measured, said in goals(results)]
    note = (
        "Ratios are pinrange ÷ the other, the median of the rounds; in brackets the least and the greatest of any round. 3 % is taken for noise. "
        "“256 KiB × 16” is ranges of 256 KiB on 16 connections."
    )
    return paragraphs("## Goals", table(("what", "goal", "measured", ""), rows), note)


def machine_section(results, _):
    """Sections may come from different runs."""
    groups = {}
    for name, section in results.items():
        machine = section["machine"]
        key = (machine["commit"], machine["date"])
        groups.setdefault(key, []).append((name, machine))
    lines = []
    for (commit, date), members in groups.items():
        machine = members[0][1]
        congestion = f", {machine['congestion_control']}" if "congestion_control" in machine else ""
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
        seconds = ", ".join(f"{name} {member['seconds']} s" for name, member in members)
        stolen = max(member["stolen_share"] for _, member in members)
        lines.append(
            f"Commit {commit}, {date}: {machine['cores']} cores of {machine['cpu']} ({machine['virtual']}), {machine['memory_gib']} GiB, Linux "
            f"{machine['kernel']}{congestion}; {versions}. Load before it {machine['load_before']}; at most {stolen:.1%} of the machine's time was stolen by the "
            f"hypervisor. It took {seconds}."
        )
    return paragraphs("## The run", *lines, noise(results))


def noise(results):
    """What else ran on the cores while the warm cells were measured."""
    warm = result(results, "warm")
    if not warm:
        return ""
    others = [run["other_cores"] for cell in warm["cells"] for runs in cell["servers"].values() for run in runs]
    spreads = [value for cell in warm["cells"] if (value := ratio(cell, cost(cell["size"]), "nginx"))]
    text = f"During the warm runs other programs used {statistics.median(others):.2f} cores (median; {max(others):.2f} at most in a run)"
    again = [
        abs(value[0] - 1) for cell in warm["cells"] if (value := ratio(cell, cost(cell["size"]), "nginx", "nginx-again"))
    ]
    if again:
        text += f"; a second nginx differed from the first by {statistics.median(again):.1%} of CPU (median of the cells; {max(again):.1%} at most)"
    if spreads:
        widths = [(high - low) / median for median, low, high in spreads]
        text += f"; a cell's ratio of CPU spread over {statistics.median(widths):.0%} between its rounds (median of the cells; {max(widths):.0%} at most)"
    return text + "."


def warm_section(results, plotted):
    warm = result(results, "warm")
    if not warm:
        return ""
    requests = sum(sum(cell["s3_requests"].values()) for cell in all_cells(warm))
    total = sum(len(runs) for cell in all_cells(warm) for runs in cell["servers"].values())
    intro = (
        f"Random pinned ranges of one object in the page cache. In all {total} runs together, S3 was asked {requests} times. "
        "CPU is the server's, per request below 1 MiB and per GB from there on; each entry is pinrange ÷ the other. “nginx again” is a second nginx static with the same "
        "configuration, ÷ the first: what it differs from 1 by is noise. The requests of a cell differ in nothing but their ranges, as those of a download in pieces do; “heads "
        "unlike”: in another field too, so that pinrange reads each by itself (ADR 23)."
    )
    if any(name in cell["servers"] for cell in warm["cells"] for name in CALLS):
        intro += (
            " “The calls alone” is [calls.rs](../examples/calls.rs), ÷ nginx static: a program that makes pinrange's system calls for a warm range and nothing else, "
            "so what pinrange needs beyond it is pinrange's own."
        )
    text = paragraphs("## Warm", intro, warm_ratios(all_cells(warm)))
    text = paragraphs(
        text,
        figure("cpu", plotted, "server CPU by size of the range"),
        figure("requests", plotted, "requests per second by connections"),
        figure("p99", plotted, "p99 by connections"),
    )
    details = "<details><summary>All figures of the warm runs (medians)</summary>"
    return paragraphs(text, details, warm_figures(all_cells(warm)), "</details>")


def all_cells(warm):
    return warm["cells"] + warm.get("unlike", [])


def warm_ratios(cells):
    others = [name for name in NAMES if name != "pinrange" and any(name in cell["servers"] for cell in cells)]
    heads = ["ranges × connections"]
    for name in others:
        heads += [f"{NAMES[name]}: requests/s", "p99", "CPU"]
    rows = []
    for cell in cells:
        row = [where(cell)]
        for name in others:
            for field in ("requests_per_second", "p99_us", cost(cell["size"])):
                value = ratio(cell, field, "nginx", name) if name in BESIDE_NGINX else ratio(cell, field, name)
                if not value:
                    row.append("")
                elif name == "nginx":
                    row.append(f"**{value[0]:.2f}** ({value[1]:.2f}–{value[2]:.2f})")
                else:
                    row.append(f"{value[0]:.2f}")
        rows.append(row)
    return table(heads, rows)


def warm_figures(cells):
    heads = ("ranges × connections", "server", "requests/s", "MB/s", "p50", "p99", "p99.9", "CPU µs a request", "CPU s per GB", "MiB resident")
    rows = []
    for cell in cells:
        for name, runs in cell["servers"].items():
            it = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            times = [milliseconds(it[key]) for key in ("p50_us", "p99_us", "p999_us")]
            rows.append(
                (where(cell), NAMES[name], f"{it['requests_per_second']:,.0f}", f"{it['bytes_per_second'] / 1e6:,.0f}", *times,
                 f"{it['cpu_us_per_request']:.4g}", f"{it['cpu_seconds_per_gb']:.3g}", f"{it['rss_mib']:.0f}")
            )  # fmt: skip
    return table(heads, rows)


def milliseconds(microseconds):
    if microseconds < 1e3:
        return f"{microseconds:.0f} µs"
    return f"{microseconds / 1e3:.3g} ms" if microseconds < 999_500 else f"{microseconds / 1e6:.3g} s"


def whole_section(results, _):
    warm = result(results, "warm")
    if not warm or not warm.get("whole"):
        return ""
    rows = []
    for one in warm["whole"]:
        for name, runs in one["servers"].items():
            speed, cpu = (statistics.median(run[key] for run in runs) for key in ("bytes_per_second", "cpu_seconds_per_gb"))
            against = ""
            if name == "pinrange" and (value := ratio(one, "bytes_per_second", "nginx")):
                against = f"{value[0]:.2f} ({value[1]:.2f}–{value[2]:.2f})"
            rows.append((one["client"], NAMES[name], f"{speed / 1e6:,.0f}", f"{cpu:.3f}", against))
    return paragraphs(
        "### One connection, the whole object",
        "curl copies what it receives and is slower than most of these servers; the other reader has the kernel drop what arrives (`MSG_TRUNC`), "
        "so that the server is what is measured.",
        table(("client", "server", "MB/s", "CPU s per GB", "÷ nginx static"), rows),
    )


def filling_section(results, _):
    warm = result(results, "warm")
    if not warm:
        return ""
    rows = [
        (NAMES[row["server"]], f"{row['seconds']:.1f}", f"{row['cpu_seconds']:.2f}", row["s3_requests"], f"{row['s3_bytes'] / MIB:,.0f}")
        for row in warm["filling"]
        if not row["server"].startswith(("nginx", "calls")) or row["server"] == "nginx-slice"
    ]
    return paragraphs(
        "### Filling the caches",
        "Each server from its start on, and one curl for the whole object through it, from an origin without delay or cap.",
        table(("server", "seconds of the curl", "CPU seconds since the start", "S3 requests", "MiB from S3"), rows),
    )


def pages_section(results, _):
    pages = result(results, "pages")
    if not pages:
        return ""
    rows = [
        (NAMES[row["server"]], milliseconds(row["quiet_p99_us"]), milliseconds(row["beside_warm_p99_us"]), milliseconds(row["beside_cold_p99_us"]),
         *(f"**{median:.2f}** ({low:.2f}–{high:.2f})" for median, low, high in
           (row["beside_warm_ratio"], row["beside_cold_ratio"], row["cold_to_warm_ratio"])),
         f"{row['cold_bytes_per_second'] / 1e6:.0f}")
        for row in pages
    ]  # fmt: skip
    heads = ("server", "p99 quiet", "beside warm readers", "beside cold readers", "warm ÷ quiet", "cold ÷ quiet", "cold ÷ warm", "MB/s from the disk")
    return paragraphs(
        "## Cold pages",
        "p99 of 64 KiB ranges of a hot object on 16 connections that pause for one to three milliseconds after each answer, one worker thread: alone; beside four readers "
        "of 1 MiB ranges of another object, 50 a second each, that is in the page cache; and beside the same readers when its pages were dropped before. Ratios are "
        "medians of the rounds, with quartiles.",
        table(heads, rows),
    )


def cold_section(results, plotted):
    cold = result(results, "cold")
    if not cold:
        return ""
    rows = []
    for row in cold:
        for what, label in (("one_stream", "one stream"), ("sixteen_ranges", "16 ranges")):
            for name, it in row.get(what, {}).items():
                speed, direct = it["bytes_per_second"], row[what]["direct"]["bytes_per_second"]
                rows.append(
                    (origin_text(row), label, NAMES.get(name, name), f"{speed / 1e6:,.0f}", f"{speed / direct:.2f}", f"{it['cpu_seconds_per_gb']:.2f}")
                )
    firsts = []
    for row in cold:
        if times := row.get("first_byte_of_a_block_ms"):
            values = [f"{times[name][key]:.2f}" for name in ("direct", "pinrange") for key in ("p50", "p99")]
            bound = f"{times['relay']['p50'] - times['direct']['p50']:.2f}" if "relay" in times else ""
            above = f"{row['first_byte_above_direct_ms']:.2f}"
            firsts.append((origin_text(row), *values, above, bound, f"{row.get('over_read_blocks', float('nan')):.1f}"))
    return paragraphs(
        "## Cold",
        "An object that nobody holds, from an origin with a delay to the first byte and a cap on each connection. “direct” is the same read straight from "
        "that origin; CPU of “direct” is the origin's own. “The least” is [relay.rs](../examples/relay.rs): received, written to a file, sent from it and synced, or "
        "received and sent, by a thread for each connection, and nothing else: what a server's core can do here.",
        figure("cold", plotted, "cold reads by origin"),
        table(("origin", "read", "through", "MB/s", "÷ direct", "CPU s per GB"), rows),
        "First byte of a 256 KiB block that nobody holds, in milliseconds, and how many blocks beyond what they asked for small ranges fetched at most:",
        table(("origin", "direct p50", "p99", "pinrange p50", "p99", "above direct at p50", "the least, above direct", "blocks over-read"), firsts),
    )


def shared_section(results, _):
    shared = result(results, "shared")
    if not shared:
        return ""
    rows = [("S3 bytes ÷ unique bytes", f"{shared['ratio']:.4f}"), ("GETs without a guard", shared["unguarded_gets"])]
    labels = {
        "first_client_behind_source_ms": "first client behind the origin",
        "second_client_behind_source_ms": "second client behind the origin",
        "second_client_behind_first_ms": "second client behind the first",
    }
    for key, label in labels.items():
        if key in shared:
            rows.append((f"{label}, p50 / p99 / max", " / ".join(f"{shared[key][name]:.2f}" for name in ("p50", "p99", "max")) + " ms"))
    return paragraphs(
        "### Shared fills",
        f"{shared['clients']} clients, each 20 ms after the one before it and at another offset, read half the object each; and two clients on one paced fill.",
        table(("what", "measured"), rows),
    )


def get_section(results, plotted):
    get, memory = result(results, "get"), result(results, "get-memory")
    if not get:
        return ""
    rows = [
        (row["client"], f"{row['seconds']:.2f}", f"{row['cpu_seconds']:.2f}", f"{row['peak_rss_mib']:.0f}") for row in get
    ]
    grown = {}
    for row in memory or []:
        grown.setdefault(row["client"], {})[row["size"]] = f"{row['peak_rss_mib']:.1f}"
    sizes = sorted({row["size"] for row in memory or []})
    return paragraphs(
        "## `pinrange get`",
        "One warm object, from a server on a core of its own; the files are compared after the clock has stopped. Only `get` syncs what it wrote: “aria2c, sync” shows "
        "what that takes. “memory” is a file on tmpfs, “from S3” past the replica, straight from the origin.",
        figure("get", plotted, "download times"),
        table(("client", "seconds", "CPU seconds", "peak MiB"), rows),
        table(
            ("peak MiB of", *(size_text(size) for size in sizes)),
            [(client, *(by_size.get(size, "") for size in sizes)) for client, by_size in grown.items()],
        ),
    )


SCALE = {
    "sizes": ("size of the object", "size"),
    "revisions": ("revisions held", "revisions"),
    "connections": ("connections", "connections"),
    "mounts": ("mounts", "mounts"),
}
#: What is worth a column, where a row has it.
COLUMNS = {
    "start": "start",
    "length": "range",
    "memory": "reading",
    "ready_ms": "ready, ms",
    "first_touch_ms": "first touch, ms",
    "first_fetch_ms": "first fetch, ms",
    "touch_sweeping_p50_ms": "touch beside the sweep, p50 ms",
    "touch_sweeping_p99_ms": "p99 ms",
    "touch_swept_p50_ms": "touch after it, p50 ms",
    "touch_swept_p99_ms": "p99 ms ",
    "swept_s": "sweep done, s",
    "requests_per_second": "requests/s",
    "p50_us": "p50 µs",
    "p99_us": "p99 µs",
    "cpu_us_per_request": "CPU µs a request",
    "open_files": "open files",
    "ready_rss_mib": "MiB resident when ready",
    "before_rss_mib": "MiB before",
    "rss_mib": "MiB resident",
    "peak_rss_mib": "at most",
}


def scale_section(results, plotted):
    texts = []
    for name, (label, key) in SCALE.items():
        rows = result(results, name)
        if not rows:
            continue
        for part in ([row for row in rows if "memory" not in row], [row for row in rows if "memory" in row]):
            columns = {field: head for field, head in COLUMNS.items() if any(field in row for row in part)}
            lines = [
                (
                    size_text(row[key]) if key == "size" else f"{row[key]:,}",
                    *(size_text(row[field]) if field == "length" else number(row.get(field)) for field in columns),
                )
                for row in part
            ]
            texts.append(table((label, *columns.values()), lines))
    return paragraphs("## Scale", figure("scale", plotted, "cost by size, revisions, connections and mounts"), *texts) if texts else ""


def number(value):
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def draw(results):
    drawn = {}
    if warm := result(results, "warm"):
        cells = [cell for cell in warm["cells"] if cell["threads"] == 1]
        drawn |= {"cpu": cpu_plot(cells), "requests": connection_plot(cells, "requests_per_second", "requests/s", False)}
        drawn["p99"] = connection_plot(cells, "p99_us", "p99, µs", True)
    if cold := result(results, "cold"):
        groups = {
            origin_text(row): {name: it["bytes_per_second"] / 1e6 for name, it in row["one_stream"].items()} for row in cold if "one_stream" in row
        }
        if groups:
            drawn["cold"] = plots.bars("cold, one stream: MB/s", groups, lambda value: f"{value:,.0f}")
    if get := result(results, "get"):
        groups = {}
        for row in get:
            groups.setdefault(f"to {row['to']}", {})[row["client"].partition(",")[0] if row["to"] != "disk" else row["client"]] = row["seconds"]
        drawn["get"] = plots.bars("a warm download: seconds", groups, lambda value: f"{value:.2f}")
    if panels := scale_panels(results):
        drawn["scale"] = plots.lines(panels)
    return drawn


def cpu_plot(cells):
    """At the number of connections nearest to what many have."""
    connections = min({cell["connections"] for cell in cells}, key=lambda number: abs(number - 16))
    groups = {}
    for cell in cells:
        if cell["connections"] == connections and "nginx" in cell["servers"]:
            medians = {
                name: statistics.median(run[cost(cell["size"])] for run in runs)
                for name, runs in cell["servers"].items()
                if name != "nginx-again"
            }
            groups[size_text(cell["size"])] = {name: value / medians["nginx"] for name, value in medians.items()}
    title = f"server CPU on {connections} connections, nginx static = 1 (per request; per GB from 1 MiB on)"
    return plots.bars(title, groups, lambda value: f"{value:.2f}") if groups else plots.svg(0, 0, "")


def connection_plot(cells, field, label, logarithmic):
    panels = []
    for size in dict.fromkeys(cell["size"] for cell in cells):
        series = {}
        for cell in cells:
            if cell["size"] == size:
                for name, runs in cell["servers"].items():
                    if name in BESIDE_NGINX:
                        continue
                    series.setdefault(name, []).append((cell["connections"], statistics.median(run[field] for run in runs)))
        panels.append(
            {"title": size_text(size), "x": "connections", "y": label, "log_x": True, "log_y": logarithmic, "series": series}
        )
    return plots.lines(panels)


def scale_panels(results):
    panels = []
    for name, (label, key) in SCALE.items():
        rows = [row for row in result(results, name) or [] if "memory" not in row and "cpu_us_per_request" in row]
        if len(rows) > 1:
            series = {
                "CPU µs a request": [(row[key], row["cpu_us_per_request"]) for row in rows],
                "MiB resident": [(row[key], row["rss_mib"]) for row in rows],
            }
            show_x = size_text if key == "size" else plots.short
            panels.append(
                {"title": f"4 KiB ranges by {label}", "x": label, "y": "", "log_x": True, "series": series, "show_x": show_x}
            )
    return panels


if __name__ == "__main__":
    sys.exit(main())

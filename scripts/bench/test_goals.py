"""The arithmetic of the page: `python3 -m unittest discover -s scripts/bench`."""

import unittest

import capacity
import goals
import plots
import report


def run(rate=1000.0, p99=100.0, cpu=10.0):
    return {
        "requests_per_second": rate, "bytes_per_second": rate * 4096, "p50_us": 50.0, "p99_us": p99, "p999_us": 2 * p99,
        "cpu_us_per_request": cpu, "cpu_seconds_per_gb": cpu / 4.096, "rss_mib": 10.0, "server_cores": 1.0, "other_cores": 0.0,
    }  # fmt: skip


def cell(ours, theirs, size=4096, connections=16, name="nginx"):
    return {"size": size, "connections": connections, "threads": 1, "seconds": 1, "s3_requests": {"pinrange": 0, name: 0},
            "servers": {"pinrange": ours, name: theirs}}  # fmt: skip


def warm(*cells):
    return {"filling": [], "cells": list(cells), "whole": []}


def said(results, what):
    return next(row for row in goals.goals(results) if row[0].startswith(what))


class Goals(unittest.TestCase):
    def test_a_ratio_is_of_runs_that_stood_side_by_side(self):
        # The machine was half as fast in the second round: for both.
        median, low, high = goals.ratio(cell([run(cpu=8), run(cpu=16), run(cpu=8)], [run(cpu=10), run(cpu=20), run(cpu=10)]), "cpu_us_per_request", "nginx")
        self.assertAlmostEqual(median, 0.8)
        self.assertAlmostEqual(low, high)

    def test_of_the_rounds_the_median_counts(self):
        interrupted = cell([run(cpu=8), run(cpu=80), run(cpu=8)], [run()] * 3)
        self.assertAlmostEqual(goals.ratio(interrupted, "cpu_us_per_request", "nginx")[0], 0.8)

    def test_the_worst_cell_decides(self):
        results = {"warm": {"result": warm(cell([run(cpu=5)], [run()]), cell([run(cpu=9)], [run()], connections=256))}}
        _, _, measured, verdict = said(results, "server CPU per request, 4 KiB")
        self.assertIn("worst 0.90", measured)
        self.assertIn("4 KiB × 256", measured)
        self.assertEqual(verdict, "**not met** in 1 of 2 cells")

    def test_more_requests_are_better_and_longer_times_are_not(self):
        results = {"warm": {"result": warm(cell([run(rate=1200, p99=90)], [run()]))}}
        self.assertEqual(said(results, "requests/s")[3], "met")
        self.assertEqual(said(results, "p99")[3], "met")
        results = {"warm": {"result": warm(cell([run(rate=800, p99=110)], [run()]))}}
        self.assertIn("not met", said(results, "requests/s")[3])
        self.assertIn("not met", said(results, "p99")[3])

    def test_noise_is_said_not_hidden(self):
        self.assertEqual(goals.verdict(1.02, 1.0), "met within noise")
        self.assertEqual(goals.verdict(1.04, 1.0), "**not met**")
        self.assertEqual(goals.verdict(0.98, 1.0, at_most=False), "met within noise")
        self.assertEqual(goals.verdict(0.96, 1.0, at_most=False), "**not met**")

    def test_behind_another_in_one_figure_is_behind(self):
        ahead = [run(rate=2000, p99=50, cpu=5)]
        results = {"warm": {"result": warm(cell(ahead, [run()], name="varnish"))}}
        self.assertEqual(said(results, "any of these against Varnish")[3], "met")
        results = {"warm": {"result": warm(cell([run(rate=2000, p99=50, cpu=15)], [run()], name="varnish"))}}
        self.assertEqual(said(results, "any of these against Varnish")[3], "**not met** in 1")

    def test_long_ranges_are_counted_by_the_byte(self):
        self.assertEqual(goals.cost(1 << 20), "cpu_seconds_per_gb")
        self.assertEqual(goals.cost(1 << 16), "cpu_us_per_request")

    def test_the_calls_alone_are_no_rival(self):
        rivals = cell([run(cpu=9)], [run()])
        with_calls = cell([run(cpu=9)], [run()])
        with_calls["servers"]["calls"] = [run(rate=5000, p99=1, cpu=1)]
        self.assertEqual(goals.goals({"warm": {"result": warm(with_calls)}}), goals.goals({"warm": {"result": warm(rivals)}}))

    def test_of_cold_pages_the_median_counts_and_its_quartiles_are_said(self):
        row = {"server": "pinrange", "beside_warm_ratio": goals.quartiles([1, 1]), "beside_cold_ratio": goals.quartiles([1, 9, 1.5, 1.8, 2.5])}
        _, _, measured, verdict = said({"pages": {"result": [row]}}, "hot p99")
        self.assertIn("1.80 (quartiles 1.50 and 2.50)", measured)
        self.assertEqual(verdict, "met")

    def test_what_was_not_measured_is_said_to_be_so(self):
        rows = goals.goals({})
        self.assertTrue(all(measured == "not measured" for _, _, measured, _ in rows))
        self.assertGreater(len(rows), 15)


class Page(unittest.TestCase):
    def test_any_part_may_be_missing(self):
        self.assertIn("not measured", report.page({}, {}))
        self.assertEqual(report.draw({}), {})
        self.assertEqual(capacity.section({}), "")

    def test_the_paper_is_worked_out_from_the_measured_cpu(self):
        # 12.5 GB/s × 1448 ÷ 1538 × 0.1 s × 1.5
        text = capacity.mix(1.0, 0.0, capacity.LINE * capacity.PAYLOAD, 0.1, 0.0)
        self.assertIn("| 1.8 | 12 GB/s | 0.0 | 0 | the network |", text)

    def test_the_calls_alone_are_set_beside_nginx_and_explained(self):
        both = cell([run(cpu=9)], [run(cpu=10)])
        self.assertNotIn("calls.rs", report.warm_section({"warm": {"result": warm(both)}}, {}))
        both["servers"]["calls"] = [run(cpu=6)]
        text = report.warm_section({"warm": {"result": warm(both)}}, {})
        self.assertIn("calls.rs", text)
        self.assertIn("the calls alone: requests/s", text)
        # To pinrange they would be 1.5.
        self.assertIn("| 1.00 | 1.00 | 0.60 |", text)

    def test_who_caches_nothing_has_nothing_to_fill(self):
        filled = {"seconds": 1.0, "cpu_seconds": 1.0, "s3_requests": 1, "s3_bytes": goals.MIB}
        section = warm()
        section["filling"] = [{"server": name} | filled for name in ("varnish", "nginx", *goals.CALLS)]
        text = report.filling_section({"warm": {"result": section}}, {})
        self.assertIn("Varnish", text)
        self.assertNotIn("alone", text)
        self.assertNotIn("nginx", text)

    def test_an_axis_holds_what_it_shows(self):
        axis = plots.Axis([1, 1000], True, 0, 300, from_zero=False)
        self.assertEqual([round(axis.at(value)) for value in axis.ticks()], [0, 100, 200, 300])
        axis = plots.Axis([3, 42], False, 0, 100)
        self.assertEqual([round(value) for value in axis.ticks()], [0, 10, 20, 30, 40])


if __name__ == "__main__":
    unittest.main()

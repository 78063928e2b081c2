"""Plots as SVG: lines over one or several panels, and groups of bars. No more than the page needs."""

import html
import math

#: A colour for everybody who appears in several plots.
COLOURS = {
    "pinrange": "#1b6e3c",
    "nginx": "#d9a441",
    "nginx-slice": "#8a6d3b",
    "varnish": "#7fa8d1",
    "traffic-server": "#a05195",
    "direct": "#888888",
    "calls": "#333333",
}
SPARE = ("#1b6e3c", "#7fa8d1", "#d9a441", "#a05195", "#888888", "#c44e52")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 380, 240, 58, 12, 46, 40


def lines(panels, per_row=2):
    """Each panel: title, x, y (labels), log_x, log_y, series (name to points), and maybe how to write an x."""
    names = list(dict.fromkeys(name for panel in panels for name in panel["series"]))
    drawn = [
        f'<g transform="translate({index % per_row * WIDTH},{index // per_row * HEIGHT + 22})">{line_panel(panel, names)}</g>'
        for index, panel in enumerate(panels)
    ]
    rows = -(-len(panels) // per_row)
    return svg(min(len(panels), per_row) * WIDTH, rows * HEIGHT + 22, legend(names) + "".join(drawn))


def line_panel(panel, names):
    points = [point for series in panel["series"].values() for point in series]
    x_axis = Axis([x for x, _ in points], panel.get("log_x"), LEFT, WIDTH - RIGHT, from_zero=False)
    y_axis = Axis([y for _, y in points], panel.get("log_y"), HEIGHT - BOTTOM, TOP)
    parts = [text(LEFT, TOP - 26, panel["title"], weight="bold")]
    parts += [text(LEFT, TOP - 12, panel["y"], colour="#555555")]
    parts += [text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, panel["x"], "middle", "#555555")]
    for value in y_axis.ticks():
        parts.append(rule(LEFT, y_axis.at(value), WIDTH - RIGHT, y_axis.at(value)))
        parts.append(text(LEFT - 6, y_axis.at(value) + 4, short(value), "end"))
    measured = sorted({x for x, _ in points})
    for value in measured if len(measured) <= 6 else x_axis.ticks():
        parts.append(text(x_axis.at(value), HEIGHT - BOTTOM + 16, panel.get("show_x", short)(value), "middle"))
    for name, series in panel["series"].items():
        colour = colour_of(name, names)
        path = " ".join(f"{x_axis.at(x):.1f},{y_axis.at(y):.1f}" for x, y in series)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x_axis.at(x):.1f}" cy="{y_axis.at(y):.1f}" r="3" fill="{colour}"/>' for x, y in series]
    return "".join(parts)


def bars(title, groups, show):
    """`groups`: name of the group to (name to value); `show` writes a value above its bar."""
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    # Wide enough for what stands below.
    widths = {label: max(len(group) * 38, *(7 * len(line) for line in label.split(", "))) for label, group in groups.items()}
    width = LEFT + RIGHT + sum(widths.values()) + 30 * len(groups)
    height = HEIGHT + 22
    axis = Axis([value for group in groups.values() for value in group.values()], False, height - BOTTOM, TOP + 30)
    parts = [text(LEFT, TOP + 8, title, weight="bold")]
    for value in axis.ticks():
        parts.append(rule(LEFT, axis.at(value), width - RIGHT, axis.at(value)))
        parts.append(text(LEFT - 6, axis.at(value) + 4, short(value), "end"))
    left = LEFT + 15
    for label, group in groups.items():
        for line, words in enumerate(label.split(", ")):
            parts.append(text(left + widths[label] / 2, height - BOTTOM + 16 + 14 * line, words, "middle"))
        x = left + (widths[label] - len(group) * 38) / 2
        for name, value in group.items():
            top = axis.at(value)
            parts.append(
                f'<rect x="{x}" y="{top:.1f}" width="34" height="{axis.at(0) - top:.1f}" fill="{colour_of(name, names)}"/>'
            )
            parts.append(text(x + 17, top - 4, show(value), "middle", size=10))
            x += 38
        left += widths[label] + 30
    return svg(max(width, 60 + 130 * len(names)), height, legend(names) + "".join(parts))


class Axis:
    """Values to pixels; from zero, unless it is logarithmic."""

    def __init__(self, values, logarithmic, begin, end, from_zero=True):
        self.logarithmic, self.begin, self.end = logarithmic, begin, end
        low, high = min(values), max(values)
        if logarithmic:
            self.low, self.high = math.log10(max(low, 1e-9)), math.log10(max(high, 1e-9))
            if from_zero:
                self.low, self.high = math.floor(self.low), math.ceil(self.high)
        else:
            self.low, self.high = (0 if from_zero else low), high * 1.05
        if self.high <= self.low:
            self.high = self.low + 1

    def at(self, value):
        value = math.log10(max(value, 1e-9)) if self.logarithmic else value
        return self.begin + (value - self.low) / (self.high - self.low) * (self.end - self.begin)

    def ticks(self):
        if self.logarithmic:
            every = max(1, math.ceil((self.high - self.low) / 6))
            return [10.0**power for power in range(math.ceil(self.low - 1e-9), math.floor(self.high + 1e-9) + 1, every)]
        step = 10 ** math.floor(math.log10((self.high - self.low) / 4))
        step *= next(factor for factor in (1, 2, 5, 10) if (self.high - self.low) / (factor * step) <= 6)
        return [step * number for number in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def legend(names):
    parts, x = [], 10
    for name in names:
        parts.append(f'<rect x="{x}" y="8" width="12" height="12" fill="{colour_of(name, names)}"/>' + text(x + 16, 18, name))
        x += 32 + 7 * len(name)
    return "".join(parts)


def colour_of(name, names):
    return COLOURS.get(name) or SPARE[names.index(name) % len(SPARE)]


def text(x, y, what, anchor="start", colour="#000000", weight="normal", size=11):
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" font-weight="{weight}" font-size="{size}">'
        f"{html.escape(str(what))}</text>"
    )


def rule(x1, y1, x2, y2):
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#dddddd"/>'


def svg(width, height, inside):
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">'
        f'<rect width="100%" height="100%" fill="#ffffff"/>{inside}</svg>\n'
    )


def short(value):
    """1,500,000 is 1.5M."""
    for factor, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{suffix}"
    return f"{value:.3g}"

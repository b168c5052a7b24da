# SPDX-License-Identifier: GPL-2.0
"""Plots as SVG, to stand inside a page."""

from html import escape

COLOURS = ["#2a6fbb", "#d1762b", "#3c9a5f", "#8a5cb5", "#b5484d", "#7a6a53", "#d287b5", "#6f7780",
           "#a8a032", "#2fa3b0"]
ROW, GAP, LABEL, PLOT, VALUE = 15, 10, 290, 460, 110
FONT = 'font-family="sans-serif" font-size="11"'


def text(x, y, what, anchor="start", extra=""):
    """A line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {FONT} {extra}>{escape(what)}</text>'


def rect(x, y, width, height, colour, title):
    """A box that says `title` when pointed at."""
    return (f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{height:.1f}" '
            f'fill="{colour}"><title>{escape(title)}</title></rect>')


def picture(height, parts, title):
    """The parts, as one picture."""
    width = LABEL + PLOT + VALUE
    return (f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(title)}" '
            f'viewBox="0 0 {width} {height:.0f}" width="{width}" height="{height:.0f}">'
            f'<rect width="100%" height="100%" fill="#ffffff"/>{"".join(parts)}</svg>')


def steps(most):
    """Round numbers from 0 to at least `most`, for an axis."""
    if most <= 0:
        return [0, 1]
    step = 10 ** len(str(int(most))) / 100
    for factor in (1, 2, 5, 10, 20, 50, 100):
        if most / (step * factor) <= 6:
            step *= factor
            break
    count = int(-(-most // step))
    return [step * number for number in range(count + 1)]


def axis(most, top, bottom, scale):
    """Lines and numbers below the bars."""
    parts = []
    for value in steps(most):
        x = LABEL + value * scale
        parts.append(f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}" stroke="#dddddd"/>')
        parts.append(text(x, bottom + 13, f"{value:,.0f}" if value >= 1 or not value
                          else f"{value:g}", "middle", 'fill="#666666"'))
    return parts


def bars(title, groups, show):
    """Bars in groups, with a line from the smallest to the largest round.

    groups: (name, [(series, median, low, high)]). show: a number as text.
    """
    names = list(dict.fromkeys(bar[0] for _, rows in groups for bar in rows))
    most = max((bar[3] for _, rows in groups for bar in rows), default=0)
    scale = PLOT / max(steps(most))
    parts, y = [text(0, 14, title, extra='font-weight="bold"')], 24
    bottom = y + sum((len(rows) + 1) * ROW + GAP for _, rows in groups)
    parts += axis(most, y, bottom - GAP + 4, scale)
    for group, rows in groups:
        parts.append(text(0, y + ROW - 2, group, extra='font-style="italic"'))
        y += ROW
        for series, median, low, high in rows:
            middle = y + ROW / 2
            parts.append(text(LABEL - 6, middle + 4, series, "end"))
            parts.append(rect(LABEL, y + 2, median * scale, ROW - 4,
                              COLOURS[names.index(series) % len(COLOURS)],
                              f"{group} {series}: {show(median)} ({show(low)} to {show(high)})"))
            if high > low:
                parts.append(f'<line x1="{LABEL + low * scale:.1f}" y1="{middle:.1f}" '
                             f'x2="{LABEL + high * scale:.1f}" y2="{middle:.1f}" '
                             'stroke="#000000" stroke-width="1.5"/>')
            parts.append(text(LABEL + high * scale + 5, middle + 4, show(median)))
            y += ROW
        y += GAP
    return picture(bottom + 22, parts, title)


def stacks(title, rows, show):
    """One bar a row, made of pieces. rows: (name, [(stage, value)])."""
    stages = list(dict.fromkeys(stage for _, pieces in rows for stage, _ in pieces))
    most = max((sum(value for _, value in pieces) for _, pieces in rows), default=0)
    scale = PLOT / max(steps(most))
    parts, x = [text(0, 14, title, extra='font-weight="bold"')], 0.0
    y = 22
    for number, stage in enumerate(stages):
        width = 24 + 6.2 * len(stage)
        if x + width > LABEL + PLOT + VALUE:
            x, y = 0.0, y + 16
        parts.append(rect(x, y, 10, 10, COLOURS[number % len(COLOURS)], stage))
        parts.append(text(x + 14, y + 9, stage))
        x += width
    y += 24
    bottom = y + len(rows) * (2 * ROW)
    parts += axis(most, y - 4, bottom, scale)
    for name, pieces in rows:
        parts.append(text(LABEL - 6, y + ROW, name, "end"))
        x = float(LABEL)
        for stage, value in pieces:
            parts.append(rect(x, y + 3, value * scale, 2 * ROW - 8,
                              COLOURS[stages.index(stage) % len(COLOURS)],
                              f"{name}, {stage}: {show(value)}"))
            x += value * scale
        parts.append(text(x + 5, y + ROW, show(sum(value for _, value in pieces))))
        y += 2 * ROW
    return picture(bottom + 22, parts, title)

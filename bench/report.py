#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""The report: results.json, report.md and report.html, from the rounds that
were measured. Run by itself it makes it from what bench/host.py has kept."""

import argparse
import datetime
import glob
import json
import os
import statistics
import sys
from html import escape

import goals
import svg
from cells import (DISK_TIME, FIO, FRONT_END, GUEST, GUEST_STAGES, SMALL_PAGES, STAGES, TOOL, UNREGISTERED,
                   URING, URING_SMALL_PAGES, Cell, chosen)
from spread import NO_DIFFERENCE, Spread, group_of, number, times

# What a round can have measured beside the IOPS, and what it is called.
METRICS = {
    "bytes_per_second": "bytes/s",
    "lat_mean_us": "mean latency, us",
    "lat_p50_us": "p50, us",
    "lat_p99_us": "p99, us",
    "lat_p999_us": "p99.9, us",
    "host_cpu_us_per_req": "CPU of who serves, us/request",
    "host_busy_us_per_req": "CPU of the host outside of the guest, us/request",
    "front_end_cpu_us_per_req": "CPU of the front end, us/request",
    "ctxsw_per_req": "context switches of who serves/request",
    "wakeups_per_req": "wake-ups of who serves (as often as it waits)/request",
    "syscalls_per_req": "system calls of who serves/request",
    "exits_per_req": "VM exits/request",
    "interrupts_per_req": "interrupts injected/request",
    "kicks_per_req": "kicks/request",
    "calls_per_req": "calls/request",
    "host_insns_per_req": "instructions/request",
}


def entry(cell, rounds, command):
    """A cell of results.json, from its rounds; null where not measured."""
    result = {"name": cell.name, "frontend": cell.frontend, "disk": cell.disk, "rw": cell.rw,
              "bs": cell.bs, "iodepth": cell.iodepth, "queues": cell.queues,
              "vcpus": cell.vcpus or None, "flush": cell.flush, "disks": cell.disks,
              "path": cell.path, "rounds": len(rounds)}
    for metric, names in [("iops", ("iops_median", "iops_min", "iops_max"))] + [
            (metric, (metric, f"{metric}_min", f"{metric}_max")) for metric in METRICS]:
        values = [each[metric] for each in rounds if each.get(metric) is not None]
        spread = Spread(values) if values else None
        for name, field in zip(names, ("median", "low", "high")):
            value = getattr(spread, field) if spread else None
            result[name] = value if value is None else round(value, 3)
    traced = [each["stages_us"] for each in rounds if each.get("stages_us")]
    if traced:
        result["stages_us"] = {stage: statistics.median(each.get(stage, 0.0) for each in traced)
                               for stage in traced[0]}
    result["command"] = command
    return result


def load(path):
    """A results.json, or None when there is none that can be read."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def index(document):
    """The cells of a results.json by name."""
    return {cell["name"]: cell for cell in document["cells"]} if document else {}


def plain(header, rows):
    """A table as plain text."""
    rows = [header] + rows
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return "\n".join("  ".join(
        f"{word:<{width}}" if column < 1 else f"{word:>{width}}"
        for column, (word, width) in enumerate(zip(row, widths))).rstrip() for row in rows)


# Exact counts

EXACT_HEADER = ["path", "disk", "depth", "instructions/request", "differ by", "less front end",
                "to vhost-user-blk", "to io_uring", "to unregistered", "change"]


def exact_cells(document):
    """The cells in which instructions were counted."""
    return [cell for cell in document["cells"] if cell["host_insns_per_req"] is not None]


def exact_rows(document, before=None):
    """The rows of the table of exact counts."""
    cells, old = exact_cells(document), index(before)
    rows = []

    def net(path, like):
        for cell in cells:
            if (cell["path"].split("/nopoll")[0] == path and cell["disk"] == like["disk"]
                    and cell["iodepth"] == like["iodepth"]):
                return cell.get("host_insns_less_front_end")
        return None

    for cell in sorted(cells, key=lambda cell: (cell["path"] == FRONT_END, cell["disk"], cell["iodepth"])):
        count = Spread.of(cell, "host_insns_per_req")
        own = cell.get("host_insns_less_front_end")
        ratios = []
        # What has small pages is compared with what has them, too; what vhost-user-blk shares always has.
        uring = URING_SMALL_PAGES if cell["path"] == SMALL_PAGES else URING
        for path in ("vhost-user-blk", uring, UNREGISTERED if uring == URING else None):
            other = net(path, cell)
            ratios.append(f"{own / other:.2f}x" if own and other and
                          cell["path"].split("/nopoll")[0] != path else "-")
        change = "-"
        was = old.get(cell["name"], {}).get("host_insns_per_req")
        if was:
            change = f"{(count.median / was - 1) * 100:+.1f} %"
        rows.append([cell["path"], cell["disk"], str(cell["iodepth"]), f"{count.median:,.0f}",
                     f"{(count.high / count.low - 1) * 100:.2f} %",
                     f"{own:,.0f}" if own is not None else "-", *ratios, change])
    return rows


def exact_text(document, before=None):
    """The table of exact counts, for a terminal."""
    text = ["Instructions that the host executes for one 4 KiB random read, counted by the",
            "emulated clock; one processor, nobody polls. Ratios are of the column before them.", "",
            plain(EXACT_HEADER, exact_rows(document, before))]
    if before:
        text += ["", "change: against the last figures, of "
                 f"{before.get('date', '?')}, module {before.get('machine', {}).get('module', '?')}"]
    return "\n".join(text)


# Blocks, of which both forms of the report are made

class Heading(str):
    """A heading."""


class Paragraph(str):
    """A paragraph."""


class Picture(str):
    """A picture, as SVG; only in HTML."""


class Table:
    """Rows of words below a header."""

    def __init__(self, header, rows):
        self.header, self.rows = header, rows


class Commands:
    """What was run for each cell."""

    def __init__(self, cells):
        self.cells = cells


def disk_text(cell):
    """What a disk is, in words."""
    name = cell["disk"]
    if name in DISK_TIME:
        return f"{name} (completes by timer after {DISK_TIME[name]} us)"
    return name


def groups(cells):
    """Cells by what is compared, in the order in which they were measured."""
    found = {}
    for cell in cells:
        found.setdefault(group_of(cell), []).append(cell)
    return found


COLUMNS = {
    TOOL: ["iops", "lat_mean_us", "lat_p50_us", "lat_p99_us", "host_cpu_us_per_req",
           "host_busy_us_per_req", "ctxsw_per_req"],
    FIO: ["iops", "lat_p50_us", "lat_p99_us", "host_busy_us_per_req"],
    GUEST: ["host_cpu_us_per_req", "host_busy_us_per_req", "iops", "lat_p50_us", "lat_p99_us",
            "wakeups_per_req", "ctxsw_per_req", "exits_per_req", "interrupts_per_req"],
}
# The measure that is shown as a picture, and in which vhost-blk is compared.
MAIN = {TOOL: "iops", FIO: "iops", GUEST: "host_cpu_us_per_req"}
TITLES = {TOOL: "The tool's front end", FIO: "fio in the host", GUEST: "Guests"}
NOTES = {
    TOOL: "`vhost-blk bench` plays the guest's driver in the host: no virtualisation in between. "
          "'vhost-blk to it' is vhost-blk's IOPS to those of the row's path.",
    FIO: "fio on the same device, without any ring: what the host itself can do.",
    GUEST: "fio in a KVM guest, a disk for each path. 'vhost-blk to it' is the CPU time of "
           "vhost-blk's worker for one request to that of the row's serving threads: lower is "
           "better. A vCPU that submits where it kicks, as vhost-blk's does when the disk has "
           "nothing to do, is not among these: the CPU of the host outside of the guest has that, "
           "and interrupts.",
}


# Of an emulated host.
SWITCHES = ("An emulated processor pays dearly for a switch to another address space, which only vhost-user-blk needs "
            "here: its times are longer for that than they would be on hardware. Instructions are not.")


def comparison(frontend, cells, emulated):
    """The blocks of one front end."""
    main = MAIN[frontend]
    blocks = [Heading(TITLES[frontend]), Paragraph(NOTES[frontend])]
    if emulated and frontend == TOOL:
        blocks.append(Paragraph(SWITCHES))
    label = {"iops": "IOPS", **METRICS}
    columns = [column for column in COLUMNS[frontend]
               if any(Spread.of(cell, column) for cell in cells)]
    # One picture for each disk: a picture of everything is none.
    by_disk = {}
    for name, members in groups(cells).items():
        by_disk.setdefault(members[0]["disk"], {})[name] = members
    for disk, found in by_disk.items():
        plot, rows = [], []
        for name, members in found.items():
            load_name = name.split("/", 2)[2]
            own = next((Spread.of(cell, main) for cell in members
                        if cell["path"] == "vhost-blk"), None)
            bars = []
            for cell in members:
                value = Spread.of(cell, main)
                if value:
                    bars.append((cell["path"], value.median, value.low, value.high))
                rows.append([load_name, cell["path"]]
                            + [str(Spread.of(cell, column) or "-") for column in columns]
                            + ["" if cell["path"] == "vhost-blk" else times(own, value)])
                load_name = ""
            plot.append((name.split("/", 2)[2], bars))
        blocks.append(Heading(f"{TITLES[frontend]}: {disk_text(next(iter(found.values()))[0])}"))
        if any(bars for _, bars in plot):
            blocks.append(Picture(svg.bars(f"{disk}: {label[main]}; line: smallest to largest round",
                                           plot, number)))
        blocks.append(Table(["load", "path"] + [label[column] for column in columns]
                            + ["vhost-blk to it"], rows))
    return blocks


def missed_blocks(cells, missed):
    """The blocks of what was not reached, and what the time is spent on there.

    missed: goals.
    """
    blocks = [Heading("What was not reached, and what the time is spent on")]
    if not missed:
        return blocks + [Paragraph("All of the above is reached.")]
    blocks.append(Table(["goal", "where", "to", "measured"],
                        [[goal.text, name, path, f"{figure:.2f}"]
                         for goal in missed for name, path, figure in goal.missed]))
    found, rows = groups(cells), []
    for name in dict.fromkeys(name for goal in missed for name, _, _ in goal.missed):
        members = [cell for cell in found.get(name, []) if cell["host_busy_us_per_req"]]
        # vhost-blk, what was better, and the best of the others in each of what it is compared in.
        paths = {"vhost-blk"}
        paths |= {path for goal in missed for where, path, _ in goal.missed if where == name}
        for metric, pick in (("host_cpu_us_per_req", min), ("host_busy_us_per_req", min),
                             ("iops_median", max)):
            others = [cell for cell in members if cell[metric] and
                      (cell["path"] in goals.SERVED if cell["frontend"] == TOOL
                       else cell["path"] != "vhost-blk")]
            if others:
                paths.add(pick(others, key=lambda cell, metric=metric: cell[metric])["path"])
        first = name
        for cell in members:
            if cell["path"] in paths:
                rows.append([first, cell["path"], number(cell["iops_median"]), *spent(cell)])
                first = ""
    if rows:
        blocks += [Paragraph("There one request costs, in microseconds of the host's processors, "
                             "beside the best of the other paths. The rest is what the guest's "
                             "exits cost, or the tool's front end, the submission of who kicks, and "
                             "interrupts."),
                   Table(["load", "path", "IOPS", "CPU of who serves", "wake-ups",
                          "who serves, for a wake-up", "the rest of the host's CPU", "VM exits",
                          "interrupts injected"], rows)]
    blocks.append(Paragraph("docs/performance.md says what is known of the reasons, and what was "
                            "tried."))
    return blocks


def spent(cell):
    """What the host's time for a request is spent on, as the columns say."""
    cpu, busy, wakeups = (cell[f"{name}_per_req"] for name in
                          ("host_cpu_us", "host_busy_us", "wakeups"))
    return [number(cpu), number(wakeups), number(cpu / wakeups) if cpu and wakeups else "-",
            number(max(busy - (cpu or 0), 0)), number(cell["exits_per_req"]),
            number(cell["interrupts_per_req"])]


STAGES_NOTES = {
    STAGES: "The tool's front end, 4 KiB random reads at depth 1. Microseconds, from trace events in "
            "the host, whose own cost is in them. Each stage ends with the event that gives it its "
            "name. Stages that a path does not have, or the trace does not show, are in the next one.",
    GUEST_STAGES: "The same of a guest with one processor, from the exit with which it kicks to the "
                  "exit with which it kicks for the next request: 'guest' is what it adds, its other "
                  "exits included; 'injection' ends with its entry. What a thread that polls finds "
                  "without a kick is left out. Where the guest's processor itself serves, its wake-ups "
                  "and system calls are those of who serves, as are the front end's above.",
}


def stages_blocks(cells):
    """The blocks of where the time of one request goes."""
    blocks = [Heading("Where the time of one request goes")]
    for frontend, disk in dict.fromkeys((cell["frontend"], cell["disk"]) for cell in cells):
        if STAGES_NOTES[frontend] not in blocks:
            blocks.append(Paragraph(STAGES_NOTES[frontend]))
        blocks.append(Heading(f"{'Guest' if frontend == GUEST_STAGES else 'Tool'}: "
                              f"{disk_text({'disk': disk})}"))
        same = [cell for cell in cells if (cell["frontend"], cell["disk"]) == (frontend, disk)]
        rows = [(cell["path"], list(cell["stages_us"].items())) for cell in same]
        names = []
        for _, pieces in rows:
            # In the order of the request's way, whatever path has them.
            for place, (stage, _) in enumerate(pieces):
                if stage not in names:
                    before = [names.index(other) for other, _ in pieces[:place] if other in names]
                    names.insert(max(before, default=-1) + 1, stage)
        counts = {cell["path"]: [number(cell["wakeups_per_req"]), number(cell["syscalls_per_req"])]
                  for cell in same}
        table = [[path] + [number(dict(pieces).get(stage)) for stage in names]
                 + [number(sum(value for _, value in pieces))] + counts[path]
                 for path, pieces in rows]
        blocks += [Picture(svg.stacks(f"{disk}: microseconds of one request", rows, number)),
                   Table(["path"] + names + ["sum", "wake-ups of who serves",
                                            "system calls of who serves"], table)]
    return blocks


def blocks_of(document, before=None):
    """The whole report."""
    cells = document["cells"]
    result = []
    machine = [[key, str(value)] for key, value in document["machine"].items()]
    result += [Heading("What was measured, and on what"), Table(["", ""], machine),
               Paragraph("Figures are medians of rounds in which the paths took turns, in brackets "
                         "the smallest and the largest round. Where the ranges of two paths "
                         f"overlap, their comparison says '{NO_DIFFERENCE}'.")]
    found = goals.check(document)
    if found:
        result += [Heading("What it must show"),
                   Table(["goal", "measured", ""], [[each.text, each.measured, each.verdict]
                                                    for each in found]),
                   *missed_blocks(cells, [each for each in found if each.missed])]
    exact = exact_cells(document)
    if exact:
        plot = []
        for disk, depth in sorted({(cell["disk"], cell["iodepth"]) for cell in exact
                                   if cell["path"] != FRONT_END}):
            plot.append((f"{disk}, depth {depth}", [
                (cell["path"], cell["host_insns_less_front_end"], cell["host_insns_less_front_end"],
                 cell["host_insns_less_front_end"]) for cell in exact
                if (cell["disk"], cell["iodepth"]) == (disk, depth)
                and cell.get("host_insns_less_front_end") is not None]))
        result += [Heading("Instructions for one request"),
                   Paragraph("4 KiB random reads; a bare host under an emulator whose clock counts "
                             "instructions. One processor, nobody polls. Ratios are between "
                             "counts from which the front end's own is subtracted."),
                   Picture(svg.bars("instructions for one request, less the front end's", plot,
                                    number)),
                   Table(EXACT_HEADER, exact_rows(document, before))]
    for frontend in (TOOL, GUEST, FIO):
        measured = [cell for cell in cells
                    if cell["frontend"] == frontend and cell["iops_median"] is not None]
        if measured:
            result += comparison(frontend, measured, document["emulated"])
    traced = [cell for cell in cells if cell.get("stages_us")]
    if traced:
        result += stages_blocks(traced)
    if document.get("notes"):
        result.append(Heading("Remarks"))
        result += [Paragraph(note) for note in document["notes"]]
    result += [Heading("The command of each cell"), Commands(cells)]
    return result


def first_line(document):
    """Whether this says anything about real hardware."""
    if document["emulated"]:
        return ("Measured UNDER EMULATION: the processor is QEMU's TCG. Instruction counts and ratios "
                "of CPU time mean something here, absolute times do not.")
    if document["machine"].get("virtualised"):
        return ("Measured on hardware, in a virtual machine: its guests are nested, and slower for "
                "that.")
    return "Measured on hardware."


def markdown(document, blocks):
    """The report as Markdown."""
    def cell(word):
        return word.replace("|", "\\|")

    out = [first_line(document), "", "# vhost-blk: measurements", ""]
    for block in blocks:
        if isinstance(block, Heading):
            out += [f"## {block}", ""]
        elif isinstance(block, Paragraph):
            out += [block, ""]
        elif isinstance(block, Table):
            out.append("| " + " | ".join(map(cell, block.header)) + " |")
            out.append("|" + "---|" * len(block.header))
            out += ["| " + " | ".join(map(cell, row)) + " |" for row in block.rows]
            out.append("")
        elif isinstance(block, Commands):
            out += ["```"] + [f"{each['name']}\n    {each['command']}" for each in block.cells]
            out += ["```", ""]
    return "\n".join(out)


STYLE = """body { font-family: sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em;
color: #222; background: #fff; } table { border-collapse: collapse; font-size: 85%; margin: 1em 0; }
td, th { border: 1px solid #ccc; padding: 0.2em 0.6em; text-align: right; white-space: nowrap; }
td:first-child, th:first-child, td:nth-child(2), th:nth-child(2) { text-align: left;
white-space: normal; } th { background: #f2f2f2; white-space: normal; }
tr.group td { border-top: 2px solid #888; } .first { font-weight: bold; border: 1px solid #888;
padding: 0.6em; background: #fdf6e3; } pre { overflow-x: auto; } svg { max-width: 100%; height: auto; }
.reached { color: #1d6b38; } .missed { color: #a12a2a; }"""


def html(document, blocks):
    """The report as one page that needs nothing else."""
    out = ["<!DOCTYPE html>", '<html lang="en"><head><meta charset="utf-8">',
           f"<title>vhost-blk: measurements</title><style>{STYLE}</style></head><body>",
           f'<p class="first">{escape(first_line(document))}</p>', "<h1>vhost-blk: measurements</h1>"]
    for block in blocks:
        if isinstance(block, Heading):
            out.append(f"<h2>{escape(block)}</h2>")
        elif isinstance(block, Paragraph):
            out.append(f"<p>{escape(block).replace('`', '')}</p>")
        elif isinstance(block, Picture):
            out.append(f"<div>{block}</div>")
        elif isinstance(block, Table):
            out.append("<table>")
            if any(block.header):
                out.append("<tr>" + "".join(f"<th>{escape(word)}</th>" for word in block.header)
                           + "</tr>")
            for row in block.rows:
                kind = row[-1] if row[-1] in ("reached", "missed") else ""
                kind = kind or ("group" if row[0] and len(row) > 4 else "")
                out.append(f'<tr class="{kind}">'
                           + "".join(f"<td>{escape(word)}</td>" for word in row) + "</tr>")
            out.append("</table>")
        elif isinstance(block, Commands):
            out.append("<details><summary>show</summary><pre>")
            out += [escape(f"{each['name']}\n    {each['command']}") for each in block.cells]
            out.append("</pre></details>")
    out.append("</body></html>")
    return "\n".join(out)


def write_file(path, text):
    """Write a file so that it is never seen half-written."""
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(f"{path}.new", path)


def write_all(folder, document, before=None):
    """Write the three files of the report."""
    os.makedirs(folder, exist_ok=True)
    document.setdefault("date", datetime.datetime.now(datetime.timezone.utc)
                        .strftime("%Y-%m-%d %H:%M UTC"))
    blocks = blocks_of(document, before)
    write_file(f"{folder}/results.json", json.dumps(document, indent=1) + "\n")
    write_file(f"{folder}/report.md", markdown(document, blocks))
    write_file(f"{folder}/report.html", html(document, blocks))


def main():
    """Make the report of what was kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kept", required=True, help="the folder that bench/host.py keeps rounds in")
    parser.add_argument("--output", required=True, help="where the report goes")
    parser.add_argument("--exact", help="results.json of bench/exact.py; used if of the same module")
    options = parser.parse_args()
    about = load(f"{options.kept}/about.json")
    if not about:
        sys.exit(f"error: nothing was measured: {options.kept} has no about.json")
    cells = []
    for path in glob.glob(f"{options.kept}/rounds/*.json"):
        kept = load(path)
        if kept and kept["rounds"]:
            cells.append((kept["order"], entry(Cell(**kept["cell"]), kept["rounds"],
                                               kept["command"])))
    document = {"emulated": about["emulated"], "machine": about["machine"],
                "cells": [cell for _, cell in sorted(cells, key=lambda each: each[0])]}
    document["notes"] = load(f"{options.kept}/notes.json") or []
    counted = []
    exact = load(options.exact) if options.exact else None
    if exact and exact["machine"].get("module") == about["machine"].get("module"):
        counted = exact["cells"]
        document["cells"] = counted + document["cells"]
    if not {cell.name for cell in chosen("exact", [])} <= {cell["name"] for cell in counted}:
        document["notes"].append("The instructions for a request have not all been counted with this module, so "
                                 "not all goals set on them are among those above. `make bench-exact` counts "
                                 "those of the module that it builds.")
    write_all(options.output, document)
    print(f"{options.output}/report.html (and report.md, results.json): "
          f"{len(document['cells'])} cells")


if __name__ == "__main__":
    main()

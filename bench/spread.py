# SPDX-License-Identifier: GPL-2.0
"""Numbers of several rounds, and how they compare."""

import statistics

NO_DIFFERENCE = "no difference"


class Spread:
    """The median of some rounds, the smallest and the largest of them."""

    def __init__(self, values):
        self.median = statistics.median(values)
        self.low, self.high = min(values), max(values)

    @classmethod
    def of(cls, cell, metric):
        """That of a cell of results.json, or None where it was not measured."""
        names = (("iops_median", "iops_min", "iops_max") if metric == "iops"
                 else (metric, f"{metric}_min", f"{metric}_max"))
        values = [cell.get(name) for name in names]
        if values[0] is None:
            return None
        return cls([value for value in values if value is not None])

    def overlaps(self, other):
        """Whether some round of the one may have been one of the other."""
        return self.low <= other.high and other.low <= self.high

    def __str__(self):
        if self.low == self.high:
            return number(self.median)
        return f"{number(self.median)} ({number(self.low)}-{number(self.high)})"


def number(value):
    """A number with three digits that matter."""
    if value is None:
        return "-"
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def times(one, other):
    """How many times the other the one is; says when they cannot be told apart."""
    if one is None or other is None or not other.median:
        return "-"
    if one.overlaps(other):
        return NO_DIFFERENCE
    return f"{one.median / other.median:.2f}x"


def group_of(cell):
    """What a cell is compared within."""
    return cell["name"][:-len(cell["path"]) - 1]

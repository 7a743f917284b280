"""Runs side by side: a table, a choice among the slim networks, and a page to look at.

Run directories come in and are only read; text, one HTML file and a W&B workspace come out. What counts as better, and
how the figures are drawn, is nobody else's business.
"""

from netslim.launch.compare.command import compare_runs

__all__ = [
    "compare_runs",
]

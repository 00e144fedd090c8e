"""Reports for people: one self-contained HTML page from runs, attributions and results."""

from grains_ext.report.html import report, write_report
from grains_ext.report.parts import Generation, MethodRow, Parts

__all__ = ["Generation", "MethodRow", "Parts", "report", "write_report"]

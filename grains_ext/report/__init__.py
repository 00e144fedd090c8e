"""Reports for people: one self-contained HTML page from attributions and results."""

from grains_ext.report.html import Generation, MethodRow, write_report

__all__ = ["Generation", "MethodRow", "write_report"]

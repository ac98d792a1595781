"""The report: numbers of runs in words, and the pages that show them."""

from tl_looped.report.findings import Findings, read_findings
from tl_looped.report.run_report import write_report
from tl_looped.report.views import write_view

__all__ = ["Findings", "read_findings", "write_report", "write_view"]

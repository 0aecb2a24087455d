"""A run as one page with plots: ``write_report(output_dir)``."""

from .page import write_report
from .sources import ReportError

__all__ = ["ReportError", "write_report"]

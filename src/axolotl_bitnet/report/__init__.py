"""A run as one page with plots: ``write_report(output_dir)``.

It reads what a run left in its folder, and neither loads a model nor trains.
"""

from .page import write_report
from .run_files import ReportError

__all__ = ["ReportError", "write_report"]

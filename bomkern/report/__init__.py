"""Write a page that shows a run and its findings, from a history or from the files of a run's folder."""

from .page import write_report
from .run_folder import diagnose_folder

__all__ = ["diagnose_folder", "write_report"]

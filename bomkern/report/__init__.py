"""A page that shows a run and its findings, and the files of a run's folder that it is made from."""

from .page import write_report
from .run_folder import diagnose_folder

__all__ = ["diagnose_folder", "write_report"]

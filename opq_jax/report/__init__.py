"""What a file holds: sizes, tables, plots, verification, accuracy."""

from opq_jax.report.sizes import SizeReport, file_report, four_sizes, size_report
from opq_jax.report.tables import summary
from opq_jax.report.verification import verify

__all__ = ['SizeReport', 'file_report', 'four_sizes', 'size_report', 'summary', 'verify']

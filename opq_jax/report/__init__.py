"""Reports on a compressed network: sizes, tables, pages, verification, accuracy, plots.

JAX is imported by `size_report`, `summary` and `verify` alone: `file_report`, the tables of sizes,
pages and model cards need none.  `javascript/` has the decoder of files in JavaScript, which needs
no Python, and `page_parts/` what `html_page` draws with.
"""

from typing import TYPE_CHECKING

from opq_jax.core import lazy

if TYPE_CHECKING:
  from opq_jax.report import accuracy, plots, text_windows
  from opq_jax.report.allocation_tables import summary
  from opq_jax.report.card import model_card
  from opq_jax.report.cell_checks import VerifiedLeaf
  from opq_jax.report.descriptions import file_description
  from opq_jax.report.page import html_page
  from opq_jax.report.progress_bars import progress
  from opq_jax.report.records import CompressedLeaf, SizeReport, UncompressedLeaf
  from opq_jax.report.size_tables import four_sizes, size_table
  from opq_jax.report.sizes import file_report, payload_report, size_report
  from opq_jax.report.verification import Verification, verify

__all__ = [
  'CompressedLeaf',
  'SizeReport',
  'UncompressedLeaf',
  'Verification',
  'VerifiedLeaf',
  'accuracy',
  'file_description',
  'file_report',
  'four_sizes',
  'html_page',
  'model_card',
  'payload_report',
  'plots',
  'progress',
  'size_report',
  'size_table',
  'summary',
  'text_windows',
  'verify',
]

__getattr__, __dir__ = lazy.attributes(
  __name__,
  {
    'CompressedLeaf': 'records',
    'SizeReport': 'records',
    'UncompressedLeaf': 'records',
    'Verification': 'verification',
    'VerifiedLeaf': 'cell_checks',
    'file_description': 'descriptions',
    'file_report': 'sizes',
    'four_sizes': 'size_tables',
    'html_page': 'page',
    'model_card': 'card',
    'payload_report': 'sizes',
    'progress': 'progress_bars',
    'size_report': 'sizes',
    'size_table': 'size_tables',
    'summary': 'allocation_tables',
    'verify': 'verification',
  },
  submodules=('accuracy', 'plots', 'tables', 'text_windows'),
)

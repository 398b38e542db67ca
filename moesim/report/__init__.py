"""Pages and tables that show a plan or a run."""

from moesim.report.detail import LayoutDetail
from moesim.report.scatter import Compared, Panels, write_scatter_report
from moesim.report.tables import (
    fit_table,
    plan_table,
    ruled_out_table,
    run_table,
    unpredicted_reasons,
    unpredicted_table,
    validation_table,
)
from moesim.report.write import write_plan_report, write_run_report

__all__ = [
    "Compared",
    "LayoutDetail",
    "Panels",
    "fit_table",
    "plan_table",
    "ruled_out_table",
    "run_table",
    "unpredicted_reasons",
    "unpredicted_table",
    "validation_table",
    "write_plan_report",
    "write_run_report",
    "write_scatter_report",
]

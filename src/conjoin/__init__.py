"""Sibling layers of a PyTorch model become one wide layer, and come back."""

from conjoin import checkpoints, nn
from conjoin.api import optimize, report, unfuse
from conjoin.layers import KINDS, Kind
from conjoin.legality import Reason, Refusal
from conjoin.memory import MemoryBudgetWarning
from conjoin.reports.report import Group, Report
from conjoin.verifying.verification import Difference, Verification
from conjoin.verifying.verify import verify

__version__ = "0.1.0"
__all__ = [
    "KINDS",
    "Difference",
    "Group",
    "Kind",
    "MemoryBudgetWarning",
    "Reason",
    "Refusal",
    "Report",
    "Verification",
    "checkpoints",
    "nn",
    "optimize",
    "report",
    "unfuse",
    "verify",
]

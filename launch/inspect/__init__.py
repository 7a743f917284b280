"""What can be slimmed, said before it is tried.

A configuration or a finished sparsity training comes in; text, inspect.json and a picture come out: which channels can
go and why the others stay, where the gammas lie, and what each ratio would cost, cut and repaired; or what a run would
do and take.
"""

from netslim.launch.inspect.command import inspect_run
from netslim.launch.inspect.dry_run import foresee

__all__ = ["foresee", "inspect_run"]

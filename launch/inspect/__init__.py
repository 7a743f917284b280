"""What can be slimmed, said before it is tried.

A configuration or a finished sparsity training comes in; text, inspect.json and a picture come out: which channels can
go and why the others stay, where the gammas lie, and what each ratio would cost, cut and repaired.
"""

from netslim.launch.inspect.command import inspect_run

__all__ = ["inspect_run"]

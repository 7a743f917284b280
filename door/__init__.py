"""Network slimming over any number of processes: the name that the rooms share, and nothing that costs time.

``netslim.prune`` slims a network, ``netslim.train`` trains one, ``netslim.data`` reads images, and ``netslim.launch``
is the command.
"""

__version__ = "0.1.0"

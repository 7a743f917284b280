"""From a command to runs: configuration, presets, and the commands of ``netslim``.

It knows train, prune and data, which know neither each other nor it. Its sub-rooms stand on each other one way:
``run`` below ``batch`` and ``inspect``, ``batch`` below ``sweep``, ``sweep`` below ``compare``.
"""

"""How fast conjoin is, beside the model as it was, the wide layers by hand, and compilers.

`python -m benchmarks.run` measures, `python -m benchmarks.tables` makes the README's tables and
the plot of what was measured. Not part of the wheel.
"""

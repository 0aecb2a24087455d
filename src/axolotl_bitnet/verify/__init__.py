"""Is a stored model the one that trained, and what is it: comparisons, measurements, and running both.

Nothing here writes a model.
"""

"""Whether a stored model is the one that trained, and what it is: comparisons, measurements, running both.

Nothing here writes a model.
"""

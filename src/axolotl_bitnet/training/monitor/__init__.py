"""The ternary codes while a model trains: flips, zeros and scales in the log, and warnings.

It reads weights and never changes training.
"""

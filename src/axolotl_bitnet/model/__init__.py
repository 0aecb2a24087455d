"""A live model: which layers become ternary, the swap, a check of the base, whole weights, the fingerprint.

No file is read or written here.
"""

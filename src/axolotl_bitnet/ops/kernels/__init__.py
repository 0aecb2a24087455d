"""Triton kernels, a file for each group of operations.

They are loaded when a GPU first needs them; only ops/ calls them.
"""

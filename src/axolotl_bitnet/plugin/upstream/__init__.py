"""What is changed in Axolotl and TRL, a file for each thing.

A file names the symbol, the versions it was run on, what happens without it, and its test. What is changed in
torch or the Trainer is in training/, under the same rules. tests/test_upstream_names.py takes every name
away.
"""

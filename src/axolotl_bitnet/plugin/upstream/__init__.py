"""What is changed in Axolotl and TRL, a file for each thing.

A file names the symbol, the versions it was run on, and what happens where the symbol is gone; what is
changed in torch or the Trainer is in training/.
"""

"""The command line: `axolotl-bitnet ...`, `axolotl bitnet ...` and `python -m axolotl_bitnet`.

It reads arguments, calls the rooms below and prints; what a command does is theirs.
"""

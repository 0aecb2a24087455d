"""The definition again, in Triton: one operation a file, held to :mod:`axolotl_bitnet.ternary` bit for bit.

Nothing here decides when a kernel runs: :mod:`axolotl_bitnet.ops` does. Importing a module of this folder
imports triton; with ``TRITON_INTERPRET=1`` set before that, the kernels run on the CPU.
"""

"""BitLinear and what it is made of: fused Llama blocks, kept weight codes, weights gathered as codes.

Layers call operations; they know neither models nor files.
"""

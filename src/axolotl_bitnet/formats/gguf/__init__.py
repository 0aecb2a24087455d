"""GGUF, llama.cpp's format: blocks, metadata, tokenizer, and a file written and read back.

What llama.cpp needs to know stays here; the rest of the package sees a stored ternary model like any other.
"""

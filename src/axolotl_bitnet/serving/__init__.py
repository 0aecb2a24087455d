"""Packed models in other programs' hands: the layer that runs 2-bit weights, in transformers and in vLLM; and
a model in training that generates as a packed one does.

Nothing here writes a model or knows how one was trained. vLLM is imported by ``vllm.py`` alone, which vLLM
itself loads.
"""

"""Stored ternary models: one file for each format that is written or read, and what the formats share.

Everything is read as codes and scales, one tensor at a time; no format knows Axolotl or a training run.
"""

"""Checkpoint formats, one a file: write it, and read its codes back. Imports nothing from training or
integration."""

"""Files, whatever is in them: whole or not at all, streamed, in parallel, with progress.

Nothing here knows what a ternary model is.
"""

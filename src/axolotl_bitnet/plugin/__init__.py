"""All that knows Axolotl: the config's keys, every refusal, the hooks, and the end of a run.

No other room imports axolotl.
"""

"""What happens between loading and saving: latents, ramp, gathered codes, monitor, the Trainer's log.

It knows torch and transformers' Trainer, not Axolotl.
"""

"""What happens to latents between loading and saving. Imports nothing from checkpoint or integration."""

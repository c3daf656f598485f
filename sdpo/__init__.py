"""Diffusion-SDPO: preference alignment of diffusion models that preserves the winner (arXiv 2511.03317)."""

"""The embedded default: a miniature Stable Diffusion 1.5 and pictures whose quality can be read from their pixels."""

"""DiffuSSM: diffusion models without attention (Yan, Gu, Rush, arXiv 2311.18257)."""

__version__ = "0.1.0"

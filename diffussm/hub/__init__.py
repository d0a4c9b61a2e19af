"""DiffuSSM for diffusers: a model, schedulers that take this package's steps, and a pipeline. Imports diffusers."""

from diffussm.hub.model import DiffuSSMModel
from diffussm.hub.pipeline import DiffuSSMPipeline
from diffussm.hub.schedulers import RespacedDDPMScheduler, RespacedDPMSolverScheduler

__all__ = ["DiffuSSMModel", "DiffuSSMPipeline", "RespacedDDPMScheduler", "RespacedDPMSolverScheduler"]

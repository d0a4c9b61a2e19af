"""A grid of images by a converted model, a row a class: python examples/grid.py fashion32-pipeline grid.png"""

import sys

import torch
from diffusers.utils import make_image_grid

from diffussm.hub import DiffuSSMPipeline

folder, out = sys.argv[1:]
pipeline = DiffuSSMPipeline.from_pretrained(folder).to("cuda" if torch.cuda.is_available() else "cpu")
labels = [name for name in list(pipeline.labels)[:10] for _ in range(8)] or None  # None: the model has no classes
guided, noise = {"guidance_scale": 2.0, "num_inference_steps": 50}, torch.manual_seed(0)
images = pipeline(labels, **guided, batch_size=64, generator=noise).images
make_image_grid(images, rows=len(images) // 8, cols=8).save(out)

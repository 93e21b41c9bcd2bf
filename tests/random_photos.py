"""Photos for tests, new in every run, and a data set of them that the workers of a DataLoader can import."""

import random

import numpy as np
import torch
from PIL import Image


def random_photo(width: int, height: int, mode: str = "RGB") -> Image.Image:
    coarse = np.random.default_rng(random.randrange(2**31)).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


class TransformedPhotos(torch.utils.data.Dataset):
    """(index, the worker's seed, its number, photo through transform); in the main process seed and number are -1."""

    def __init__(self, photos, transform):
        self.photos = photos
        self.transform = transform

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index):
        worker = torch.utils.data.get_worker_info()
        seed, number = (worker.seed, worker.id) if worker else (-1, -1)
        return index, seed, number, self.transform(self.photos[index])

"""Crop and flip images at random, as protocols of few-shot training do."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from clipgraft.data.loading import Transform
from clipgraft.data.preprocessing import fast_preprocess
from clipgraft.errors import ConfigError

_MODES = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class CropAndFlip:
    """A random part of an image, mirrored half of the time, at the size and with the colours of a base.

    Attributes:
        size: (height, width) in pixels.
        mode: `bicubic` or `bilinear`.
        mean: of each channel, of 0..1.
        std: of each channel, of 0..1.
        scale: least and largest share of the image's area; sides are to each other as 3:4 to 4:3.
    """

    size: tuple[int, int]
    mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: tuple[float, float] = (0.08, 1.0)

    def __call__(self, image: Image.Image) -> Tensor:
        """Turn an RGB image into float32 (3, H, W), by torch's random numbers."""
        import torch
        from torchvision.transforms import RandomResizedCrop
        from torchvision.transforms import functional as steps

        top, left, height, width = RandomResizedCrop.get_params(image, list(self.scale), [3 / 4, 4 / 3])
        part = image.crop((left, top, left + width, top + height))
        part = part.resize((self.size[1], self.size[0]), _MODES[self.mode])
        if torch.rand(()) < 0.5:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels: Tensor = steps.normalize(steps.to_tensor(part), list(self.mean), list(self.std))
        return pixels


def crop_and_flip(preprocess: Transform) -> CropAndFlip:
    """Return random crops at the size and with the colours of a preprocessing.

    Raises:
        ConfigError: the preprocessing does something else than resize, crop and normalise.
    """
    known = fast_preprocess(preprocess)
    if known is None:
        raise ConfigError(
            "this base's preprocessing is none of open_clip's or CLIP's: its size and colours are not known, "
            "and images cannot be cropped by them"
        )
    size = known.crop or (known.size if isinstance(known.size, tuple) else (known.size, known.size))
    return CropAndFlip(size, known.mode or "bicubic", known.mean, known.std)

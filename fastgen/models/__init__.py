"""Reference networks to train and sample with; `import fastgen` does not import them.

`UNet` predicts the noise of a diffusion (Ho et al. 2020); `Generator` and `Discriminator` are the pair of a GAN (Radford et
al. 2016). They are plain PyTorch: fastgen accelerates what surrounds the network, so any other network does as well.
"""

from .dcgan import Discriminator, Generator
from .unet import UNet

__all__ = ["Discriminator", "Generator", "UNet"]

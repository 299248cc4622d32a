"""In torchvision's place, for libraries that import it and whose parts under test do not use it: torchvision has no build for a
torch without CUDA."""

from . import transforms, utils  # noqa: F401

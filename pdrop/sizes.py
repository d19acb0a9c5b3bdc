"""Where `ModelSizes` lay before pdrop/shapes.py; programs that ask for it here, as `Architecture`, find it."""

from pdrop.shapes import Images
from pdrop.shapes import ModelSizes as Architecture

__all__ = ["Architecture", "Images"]

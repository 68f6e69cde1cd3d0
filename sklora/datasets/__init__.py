"""Zoos of real LoRAs, bundled or trained on the spot."""

from sklora.datasets._bundle import load_digits_loras
from sklora.datasets._digits import make_digits_loras

__all__ = ["load_digits_loras", "make_digits_loras"]

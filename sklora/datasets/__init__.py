"""Zoos of real LoRAs: bundled, trained on the spot, or trained once and kept."""

from sklora.datasets._bundle import load_digits_loras
from sklora.datasets._code import fetch_code_loras, make_code_loras
from sklora.datasets._digits import fetch_digits_loras, make_digits_loras
from sklora.datasets._evaluation import evaluate_digits_loras
from sklora.datasets._varied import fetch_varied_digits_loras, make_varied_digits_loras
from sklora.datasets._zoos import get_data_home

__all__ = [
    "evaluate_digits_loras",
    "fetch_code_loras",
    "fetch_digits_loras",
    "fetch_varied_digits_loras",
    "get_data_home",
    "load_digits_loras",
    "make_code_loras",
    "make_digits_loras",
    "make_varied_digits_loras",
]

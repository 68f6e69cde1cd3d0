"""Fitted models for other programs and other people: torch.export, ONNX, and model cards."""

from sklora._base import VersionWarning
from sklora.deployment._card import model_card
from sklora.deployment._export import export_onnx, export_program, program_inputs

__all__ = ["VersionWarning", "export_onnx", "export_program", "model_card", "program_inputs"]

"""Adapter files: read as a collection, scanned for what they hold, written as PEFT."""

from sklora.io._errors import AdapterError
from sklora.io._read import SkippedAdapterWarning, read_adapters
from sklora.io._scan import AdapterReport, ScannedModule, scan_adapters
from sklora.io._write import write_adapter

__all__ = [
    "AdapterError",
    "AdapterReport",
    "ScannedModule",
    "SkippedAdapterWarning",
    "read_adapters",
    "scan_adapters",
    "write_adapter",
]

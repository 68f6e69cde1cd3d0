"""What importing sklora does to the process: silent logging, and forks that can compute."""

import logging
import os

import torch

# Messages go where the application sends those of "sklora", and nowhere otherwise.
logging.getLogger("sklora").addHandler(logging.NullHandler())


def _compute_alone() -> None:
    # A forked child has the memory of OpenMP's threads but not the threads, and waits for them
    # forever. One thread is also what torch gives the workers of its DataLoader.
    torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):  # there is no fork on Windows
    os.register_at_fork(after_in_child=_compute_alone)

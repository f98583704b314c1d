"""The XLA flags of a process of its own: those of conftest.py, without the eight devices that it asks for."""

import os

XLA_FLAGS = os.environ["XLA_FLAGS"].rpartition(" ")[0]

"""The config of a run: its fields, their ranges and checks, and how it is read from files and flags.

A config file needs only `default`: `from t5like.config import default`.
"""

from t5like.config.schema import Config, default

__all__ = ["Config", "default"]

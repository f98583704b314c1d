"""The config of a run: its fields, their ranges and checks, and how it is read from files and flags."""

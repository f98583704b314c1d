"""Matmuls and attention, each formulated for one kind of device."""

"""Checks before weights are read: mistakes, shapes, memory."""

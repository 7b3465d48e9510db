"""Placeholder to be written: supervise()."""

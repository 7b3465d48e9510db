"""`sluice unpin`: see `tools/pin.py`."""

from tools.pin import unpin as main

__all__ = ["main"]

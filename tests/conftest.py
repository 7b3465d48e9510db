"""Fixtures that every test may use, and how Hypothesis runs."""

import signal

from hypothesis import settings

pytest_plugins = ["tests.fixtures_servers", "tests.mounting"]

# An example that takes long says that the machine is busy.
settings.register_profile("sluice", deadline=None)
settings.load_profile("sluice")

# A run in the background of a shell ignores SIGINT, and so would every command that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

"""Fixtures that every test may use, and how Hypothesis runs."""

from hypothesis import settings

pytest_plugins = ["tests.fixtures_servers", "tests.mounting"]

# An example that takes long says that the machine is busy.
settings.register_profile("sluice", deadline=None)
settings.load_profile("sluice")

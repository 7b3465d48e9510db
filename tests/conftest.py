"""Fixtures that every test may use."""

pytest_plugins = ["tests.fixtures_servers", "tests.mounting"]

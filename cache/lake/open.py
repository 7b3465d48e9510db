"""Choose the lake for a configuration. Imports the chosen one only: boto3 alone takes 250 ms."""

from __future__ import annotations

from cache.config import LakeConfig
from cache.lake.base import Lake


def open_lake(config: LakeConfig) -> Lake:
    """Return the lake that *config* names; the caller closes it.

    S3 sends no request before its first verb. Raises LakeMisconfigured for a bad URL or
    directory, and for a profile or CA bundle that can't be read.
    """
    if config.is_s3:
        from cache.lake.s3 import S3Lake

        return S3Lake(config)
    from cache.lake.directory import DirectoryLake

    return DirectoryLake(config)

"""The lake, the cache tiers and their policies. Knows nothing of FUSE."""

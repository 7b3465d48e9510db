"""The benchmark suite: each figure against its baseline, in one run, in alternating rounds.

`sluice bench` or `python -m tools.bench`. A shared machine's speed drifts: the ratios are what counts.
"""

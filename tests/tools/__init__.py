"""Helpers of the tests; run one with `python -m tests.tools.NAME`."""

"""Benchmarks: claims that a user can check, each a command of `streamkd bench`."""

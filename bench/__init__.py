"""Benchmarks: real servers and services, named baselines in the same run, medians and percentiles."""

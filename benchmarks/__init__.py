"""Throughput benchmarks, imported as `fastcpt.benchmarks`, by the command line alone and only when asked."""

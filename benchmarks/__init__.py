"""Measures the tunnel beside others on the same work in the same run: ``benchmarks/run``, see README.md."""

"""The parts of ``benchmarks/soak``: what it starts, what it counts, how it judges."""

"""What the benchmarks share: workloads, peers, timing in turns, results as JSON."""

"""Ratios that are promised, measured: make bench, make bench-training, make bench-evaluation."""

"""Measures the ratios that pdrop promises: make bench, make bench-training, make bench-evaluation."""

"""One run, from settings to record: run.py finds it done or does it, measured.py is what it does."""

"""One run, from settings to record: run.py skips or executes it, measured.py does the measuring."""

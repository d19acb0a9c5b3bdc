"""Runs, their samples and their markers, read from a results folder; files written into it."""

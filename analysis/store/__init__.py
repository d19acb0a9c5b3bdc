"""Reads runs, their samples and their markers from a results folder, and writes files into one."""

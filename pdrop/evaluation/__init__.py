"""Scores, from questions to results: prompts, answers and their store, lmms-eval (imported by lmms.py only)."""

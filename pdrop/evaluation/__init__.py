"""Scores, from questions to results: prompts, answers and their store, lmms-eval (lmms.py alone imports it)."""

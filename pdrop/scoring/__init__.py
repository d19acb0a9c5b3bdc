"""What scoring needs besides lmms-eval itself: prompts, answers and their store, results. See pdrop/evaluate.py."""

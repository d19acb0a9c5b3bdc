"""What scoring needs besides lmms-eval itself: prompts, answers and their store, results. See pdrop/evaluation/lmms.py."""

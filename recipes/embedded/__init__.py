"""How the embedded model is trained, from nothing: python -m recipes.embedded.train (make embedded-model)."""

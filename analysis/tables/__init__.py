"""Rows as Markdown, LaTeX and CSV, with the footnotes that they need."""

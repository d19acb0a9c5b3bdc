"""What dropping costs and saves, in closed form: no timing, and no torch on import."""

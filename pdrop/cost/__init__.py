"""What dropping costs and saves, by arithmetic: no clock, and no torch on import."""

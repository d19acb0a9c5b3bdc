"""Pictures with the patches that were kept, or with maps of attention."""

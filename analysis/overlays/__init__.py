"""Pictures with the patches that stayed or that are attended to."""

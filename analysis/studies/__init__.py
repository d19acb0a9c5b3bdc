"""One subject per file or pair of files: what a study's runs say, as numbers and as a figure."""

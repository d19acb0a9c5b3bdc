"""Studies, each in a file or a pair of files: the results of a study's runs as numbers and as a figure."""

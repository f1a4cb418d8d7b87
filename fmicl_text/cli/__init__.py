"""The command line: what recipes and evaluation scripts share."""

"""The command line, shared by the recipes and evaluation scripts."""

"""The command line: one module per verb, which is called as its file."""

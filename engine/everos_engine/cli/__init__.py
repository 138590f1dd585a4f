"""The command line: the parser, one module per command, and what a terminal shows."""

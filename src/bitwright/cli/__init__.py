"""The command line: one file per command; a command imports its own file and no other."""

"""Kit: all state of one program."""

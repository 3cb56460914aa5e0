"""One file a command: parse, one call of the API, render."""

"""Fuzzing: structured inputs for every reader, made from few choices, and what must hold for each.

`draw` gives choices, `pickles`, `zips`, `archives`, `stacked` and `headers` make files of them, `look` does with a file
what the program does and says what may come out, `targets` joins them by one line a reader, and `worker` runs one
target for a time.  `python -m tests.fuzz` is the command.
"""

"""Results → text tables and JSON objects.  Prints nothing."""

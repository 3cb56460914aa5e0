"""x."""
def try_alignment(): pass

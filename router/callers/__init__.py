"""Who calls, what each may use, and whose turn it is."""

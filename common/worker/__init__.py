"""What both kinds of worker have."""

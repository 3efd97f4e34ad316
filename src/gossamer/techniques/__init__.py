"""The handbook's techniques, one card each."""

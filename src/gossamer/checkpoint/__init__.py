"""Bytes on disk <-> named tensors, text <-> token ids. Pickle is refused; every file is distrusted."""

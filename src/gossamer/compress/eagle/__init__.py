"""The training recipe of draft heads: `python -m gossamer.compress.eagle`."""

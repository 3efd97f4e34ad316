"""The ledger made: each technique alone, added to others and left out of them, measured and proven."""

"""What each technique does to a model on this machine: measured, judged, proved, and shown."""

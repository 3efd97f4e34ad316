"""Offline work on checkpoints: whatever takes training or calibration before a model is served."""

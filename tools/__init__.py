"""Programs around a trained model: `python -m tools.NAME` from the root of the repository."""

"""Configuration, stages, and how processes start."""

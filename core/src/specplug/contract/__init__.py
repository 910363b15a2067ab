"""What plugin authors read: the five hooks (`hooks.py`), what they pass (`types.py`), resources and settings."""

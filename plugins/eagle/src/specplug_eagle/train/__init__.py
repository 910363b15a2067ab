"""Trains EAGLE-3 heads with training-time test: `python -m specplug_eagle.train --target … --data … --out …`."""

"""The memory plan: five parts, solved before any weight is read."""

"""What the user configures, parsed and checked before anything is loaded."""

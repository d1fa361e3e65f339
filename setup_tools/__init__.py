"""Scripts for people working on pgolf; not installed with it."""

"""Pure decisions: no clock, no file, no environment, no I/O."""

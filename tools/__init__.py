"""The `sluice` command and its subcommands."""

"""The command line `msun`, one file per command."""

"""The command line `cka-probe`, one file per command."""

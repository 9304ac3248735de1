"""The command line: options and settings, their composition by Hydra, help, and how faults end a command."""

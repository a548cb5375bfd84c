"""Subcommands of the `qkernels` program, one module each."""

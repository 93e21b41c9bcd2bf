"""What each subcommand of `bbfast` does, one module each; `bbfast.cli` reads the arguments."""

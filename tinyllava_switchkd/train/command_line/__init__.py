"""What a training may be told: arguments, their values, and how a command line is read."""
